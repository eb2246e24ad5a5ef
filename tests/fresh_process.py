"""What the fresh process of ``test_methods.py`` runs: load every folder and save its parameters and logits."""

import sys
from pathlib import Path

import torch

import moe_lightning as ml


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    inputs = torch.load(folder / "inputs.pt")
    results = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        model = ml.from_pretrained(path)
        with torch.no_grad():
            results[path.name] = (model.state_dict(), model(input_ids=inputs).logits)
    torch.save(results, folder / "logits.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
