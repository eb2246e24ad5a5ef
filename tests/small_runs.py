"""The smallest run that has everything: real files, a tokenizer trained on them, a Mixtral with dropout, all options in
YAML."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    # Randomness in every step, so that a resumed run shows whether it continues the same random numbers.
    "attention_dropout": 0.2,
}


def write_texts(folder: Path, num_files: int = 16, words_per_file: int = 300) -> Path:
    """Write files of made-up sentences, the same every time, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 6))) for _ in range(80)]
    for number in range(num_files):
        text = " ".join(draw.choice(words) + draw.choice(["", "", "", ".", ","]) for _ in range(words_per_file))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def small_options(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a small run.

    Args:
        folder: Where the texts and the data cache lie; written on first use.
        **sections: Options to change, by section: ``trainer={"max_steps": 3}``.
    """
    texts = folder / "texts"
    if not texts.is_dir():
        write_texts(texts)
    options: dict[str, Any] = {
        "seed_everything": 7,
        "model": {"model": MODEL, "learning_rate": 0.01, "warmup_steps": 2},
        "data": {
            "sources": f"{texts}/*.txt",
            "vocab_size": 300,
            "block_size": 16,
            "batch_size": 2,
            "validation": 4,
            "test": 4,
            "calibration": 8,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_steps": 12,
            "val_check_interval": 3,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 4}}],
        },
    }
    options = copy.deepcopy(options)
    for section, values in sections.items():
        options[section].update(values)
    return options


def write_config(path: Path, options: dict[str, Any]) -> Path:
    """Write options as a config file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path
