"""Measure what each way to recover brings back on one trained model, over several orders of the training text.

    python benchmarks/recovery_quality.py runs/quickstart/models/original
    python benchmarks/recovery_quality.py MODEL --only chain --seeds 1 --output benchmarks/results

Every row is a config of ``configs/recover``: half of the experts of the model go, and 60 steps, a tenth of those that
the quickstart trains its model with, bring back what they can. It is run as anybody would run it,
``moe-lightning fit -c recover/NAME``, once for each order of the training text; the splits are the same for all. The
folders that the run exports are loaded again and judged on held-out text. The recovered share is that of the lost loss,
``(compressed - recovered) / (compressed - original)`` in nats per token. Intervals over seeds are those of Student's t.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import moe_lightning as ml
from moe_lightning.evaluation import perplexity_ratio_interval

NAMES = ("router", "novices", "lora", "full", "chain")
TEST_BLOCKS = 400
# Quantiles 0.975 of Student's t, by the number of seeds.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}


def run(name: str, model: str, folder: Path, seed: int) -> tuple[int, float]:
    """Run a config, and return the tokens that it trained on and the seconds that it took."""
    command = [sys.executable, "-c", "from moe_lightning.cli import main; main()", "fit", "-c", f"recover/{name}"]
    command += ["--model.checkpoint", model, "--run_dir", str(folder), "--data.order_seed", str(seed)]
    command += ["--data.test", str(TEST_BLOCKS), "--seed_everything", str(1000 + seed)]
    start = time.perf_counter()
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{name}, seed {seed}:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    return checkpoint["global_step"] * 8 * 256, time.perf_counter() - start


def held_out(model: str) -> list[Any]:
    """Return the test batches of the quickstart's text."""
    data = ml.TextDataModule(
        sources="python-stdlib",
        tokenizer=model,
        block_size=256,
        batch_size=8,
        max_bytes=8_000_000,
        validation=64,
        test=TEST_BLOCKS,
        calibration=128,
    )
    data.prepare_data()
    data.setup("test")
    return list(data.test_dataloader())


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Return the mean of some numbers and half the width of its 95 % interval; infinite for one number."""
    count = len(values)
    if count == 1:
        return values[0], math.inf
    return statistics.mean(values), STUDENT[count] * statistics.stdev(values) / math.sqrt(count)


def words(values: list[float], form: str) -> str:
    """Return a mean with its interval for a table."""
    mean, half = over_seeds(values)
    return f"{mean:{form}}" if math.isinf(half) else f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def main() -> None:
    """Run, measure and print a table."""
    parser = argparse.ArgumentParser(description="Measure what each way to recover brings back.")
    parser.add_argument("model", help="folder of the trained model with its tokenizer")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="configs to run")
    parser.add_argument("--seeds", type=int, choices=(1, *STUDENT), default=3, help="orders of the training text")
    parser.add_argument("--output", default=None, help="folder for the Markdown and JSON files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = held_out(options.model)
    original = ml.evaluate(ml.from_pretrained(options.model), batches, progress=False)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    head = (
        f"Perplexity of the original {original.perplexity:.2f} on {int(original.tokens.sum()):,} tokens held out; "
        f"{options.seeds} orders of the training text, 95 % intervals over them; torch {torch.__version__}, commit "
        f"{commit.stdout.strip() or 'unknown'}\n"
    )
    table = [
        "| config | tokens | compressed / original | recovered / original | share of the lost loss | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    print(head, *table, sep="\n", flush=True)
    rows = []
    for name in options.only:
        found: dict[str, list[float]] = {key: [] for key in ("compressed", "recovered", "share", "seconds", "tokens")}
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "run"
                tokens, seconds = run(name, str(Path(options.model).resolve()), folder, seed)
                results = {
                    kind: ml.evaluate(ml.from_pretrained(str(folder / "models" / kind)), batches, progress=False)
                    for kind in ("compressed", "recovered")
                }
            for kind, result in results.items():
                found[kind].append(perplexity_ratio_interval(result, original).value)
            lost = math.log(found["compressed"][-1])
            found["share"].append((lost - math.log(found["recovered"][-1])) / lost)
            found["seconds"].append(seconds)
            found["tokens"].append(tokens)
        cells = [words(found[kind], ".4f") for kind in ("compressed", "recovered")]
        seconds = statistics.median(found["seconds"])
        cells += [words(found["share"], ".1%"), f"{seconds:.0f}"]
        table.append(f"| {name} | {int(found['tokens'][0]):,} | {' | '.join(cells)} |")
        print(table[-1], flush=True)
        rows.append({"config": name, **found})
        if options.output:
            target = Path(options.output)
            target.mkdir(parents=True, exist_ok=True)
            (target / "recovery-quality.md").write_text("\n".join([head, *table, ""]), encoding="utf-8")
            result = {
                "machine": f"{platform.machine()} CPU",
                "perplexity": original.perplexity,
                "seeds": options.seeds,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "commit": commit.stdout.strip(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "rows": rows,
            }
            (target / "recovery-quality.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
