"""The last step of ``make demo``: prove what the quickstart run claims, and print it as a table.

Reads the three models that ``moe-lightning fit -c configs/quickstart.yaml`` left in its run directory (before
compression, compressed, recovered), measures them on the same held-out text, and compares the criterion's choice of
experts with random ones. Every claim is asserted before anything is printed.

    python examples/quickstart.py [RUN_DIR]
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

import moe_lightning as ml
from moe_lightning.checkpoints import stored_bytes
from moe_lightning.evaluation import decoded_tokens_per_second, tokens_per_second
from moe_lightning.files import write_atomically

MODELS = ("original", "compressed", "recovered")
RANDOM_SEEDS = (0, 1, 2)
SPEED_ROUNDS = 5


def measure_folder(folder: Path, model: Any, data: ml.TextDataModule) -> dict[str, float]:
    size = ml.measure(model, data.block_size)
    likelihood = ml.evaluate(model, data.test_dataloader())
    return {
        "perplexity": likelihood.perplexity,
        "bits_per_byte": likelihood.bits_per_byte,
        "tokens": likelihood.num_tokens,
        "parameters": size.parameters,
        "bytes": size.bytes,
        "bytes_on_disk": stored_bytes(folder),
    }


def add_speeds(rows: dict[str, dict[str, float]], models: dict[str, Any], data: ml.TextDataModule) -> None:
    """Time the models in turn, several times: what slows this machine down for a while then hits all of them."""
    sample = next(iter(data.test_dataloader()))["input_ids"]
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(SPEED_ROUNDS):
        for name, model in models.items():
            prefill[name].append(tokens_per_second(model, sample, repeats=3))
            decode[name].append(decoded_tokens_per_second(model, sample[:1, :64], new_tokens=16, repeats=3))
    for name, row in rows.items():
        row["prefill_tokens_per_second"] = statistics.median(prefill[name])
        row["decode_tokens_per_second"] = statistics.median(decode[name])


def random_perplexities(folder: Path, data: ml.TextDataModule, method: ml.Novices) -> list[float]:
    found = []
    for seed in RANDOM_SEEDS:
        model = ml.from_pretrained(folder)
        control = ml.Novices(
            ratio=method.ratio,
            keep=method.keep,
            criterion="random",
            scope="layer",
            novice=method.novice,
            rank=method.rank,
            seed=seed,
        )
        ml.compress(model, data.calibration_batches(), control, progress=False)
        found.append(ml.evaluate(model, data.test_dataloader()).perplexity)
    return found


def main(run_dir: str = "runs/quickstart") -> None:
    run = Path(run_dir)
    config = yaml.safe_load((run / "config.fit.yaml").read_text())
    data = ml.TextDataModule(**config["data"]).prepare()
    compress = next(item for item in config["trainer"]["callbacks"] if item["class_path"].endswith("Compress"))
    method = ml.Novices(**compress["init_args"]["methods"][0]["init_args"])

    models = {name: ml.from_pretrained(run / "models" / name) for name in MODELS}
    rows = {name: measure_folder(run / "models" / name, model, data) for name, model in models.items()}
    add_speeds(rows, models, data)
    randoms = random_perplexities(run / "models" / "original", data, method)
    original, compressed, recovered = (rows[name] for name in MODELS)

    for row in (compressed, recovered):
        assert row["parameters"] < original["parameters"], "the compressed model has no fewer parameters"
        assert row["bytes_on_disk"] < original["bytes_on_disk"], "the compressed model is no smaller on disk"
    assert max(original["perplexity"], recovered["perplexity"]) < compressed["perplexity"], (
        f"expected before and recovered below compressed, got {original['perplexity']:.3f}, "
        f"{recovered['perplexity']:.3f}, {compressed['perplexity']:.3f}"
    )
    assert min(randoms) > compressed["perplexity"], (
        f"a random choice of experts ({min(randoms):.3f}) was no worse than {method.criterion} "
        f"({compressed['perplexity']:.3f})"
    )
    results = {"models": rows, "random_choice_perplexities": randoms, "threads": torch.get_num_threads()}
    write_atomically(run / "results" / "quickstart.json", json.dumps(results, indent=2) + "\n")

    tokens = int(original["tokens"])
    print(f"\nHeld-out text: {tokens:,} tokens of the Python standard library; {torch.get_num_threads()} CPU threads\n")
    print("| model | perplexity | bits/byte | parameters | on disk | prefill tokens/s | decode tokens/s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, row in zip(("before", "compressed", "recovered"), rows.values(), strict=True):
        print(
            f"| {name} | {row['perplexity']:.3f} | {row['bits_per_byte']:.4f} | {row['parameters']:,} "
            f"| {row['bytes_on_disk'] / 2**20:.1f} MiB | {row['prefill_tokens_per_second']:,.0f} "
            f"| {row['decode_tokens_per_second']:,.0f} |"
        )
    share = (compressed["perplexity"] - recovered["perplexity"]) / (compressed["perplexity"] - original["perplexity"])
    if share < 1:
        print(f"\nTuning the novices alone won back {share:.0%} of the lost perplexity.")
    else:
        print("\nTuning the novices alone won back all of the lost perplexity, and more: they saw further text.")
    print(
        f"The same number of experts chosen at random, same novices: perplexity {statistics.median(randoms):.3f} "
        f"(median of {len(randoms)} seeds, best {min(randoms):.3f})."
    )
    print(f"\nThe whole story: {run / 'report.html'}")
    print("\nWhat to try next:")
    print(f"  .venv/bin/tensorboard --logdir {run}/logs")
    print(f"  .venv/bin/moe-lightning benchmark --model {run}/models/recovered --against {run}/models/original")
    fit = ".venv/bin/moe-lightning fit -c configs/quickstart.yaml"
    print(f"  {fit} --data.sources 'MY_TEXTS/**/*.txt' --run_dir runs/mine")
    print("  .venv/bin/moe-lightning compress -c configs/compress.yaml --model MY_MIXTRAL --output MY_SMALLER_MIXTRAL")


if __name__ == "__main__":
    main(*sys.argv[1:])
