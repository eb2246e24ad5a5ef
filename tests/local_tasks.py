"""Tasks of lm-eval with local data, made of the help topics of Python."""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import re
from pathlib import Path

import yaml


def topics() -> str:
    """Return the text of all topics."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def write_tasks(folder: Path, questions: int = 24) -> Path:
    """Write tasks that need no network, and their data, and return the folder.

    ``endings``: which of four ends a sentence has. ``likelihood``: sentences, whole. ``next_word``: what the model
    writes. ``both``: a group with a mean, ``pair``: one without, ``sentences``: a tag.

    Args:
        folder: Gets them.
        questions: How many ``endings`` has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=\.)\s{2,}", topics()) if 60 < len(part) < 140]
    draw.shuffle(sentences)
    ends = [" ".join(sentence.split()[-3:]) for sentence in sentences]
    endings = []
    for number in range(questions):
        choices = [ends[number], *draw.sample(ends, 3)]
        order = draw.sample(range(4), 4)
        start = " ".join(sentences[number].split()[:-3])
        endings.append({"start": start, "choices": [choices[place] for place in order], "answer": order.index(0)})
    words = [sentence.split() for sentence in sentences[40:48]]
    rows = {
        "endings": endings,
        "likelihood": [{"text": sentence} for sentence in sentences[50:56]],
        "next_word": [{"prompt": " ".join(item[:8]), "next": item[8]} for item in words],
    }
    tasks: dict[str, dict[str, object]] = {
        "endings": {
            "output_type": "multiple_choice",
            "fewshot_split": "test",
            "doc_to_text": "{{start}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "tag": ["sentences"],
        },
        "likelihood": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "next_word": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": " {{next}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "likeness", "aggregation": "mean", "higher_is_better": True}],
            "tag": ["sentences"],
        },
    }
    for name, task in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows[name])) + "\n")
        task |= {"task": name, "dataset_path": "json", "test_split": "test"}
        task["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    # Other than a share of exact matches, which a tiny model has none of, it changes with every letter.
    (folder / "likeness.py").write_text(
        "from difflib import SequenceMatcher\n\n\n"
        "def process_results(doc, results):\n"
        "    return {'likeness': SequenceMatcher(None, doc['prompt'] + doc['next'], results[0]).ratio()}\n"
    )
    with (folder / "next_word.yaml").open("a") as file:
        file.write("process_results: !function likeness.process_results\n")
    mean = [{"metric": "acc", "weight_by_size": True}]
    (folder / "half.yaml").write_text(yaml.safe_dump(tasks["endings"] | {"task": "half", "tag": []}))
    (folder / "both.yaml").write_text(
        yaml.safe_dump({"group": "both", "task": ["endings", "half"], "aggregate_metric_list": mean})
    )
    (folder / "pair.yaml").write_text(yaml.safe_dump({"group": "pair", "task": ["endings", "likelihood"]}))
    return folder
