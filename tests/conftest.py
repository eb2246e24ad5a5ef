"""What every test gets: one thread, fixed seeds, no network."""

import os

# Before torch is imported anywhere, and inherited by the subprocesses that tests start. Two torch threads on a busy
# two-core machine are many times slower than one, and bit-identical results hold for one thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("SLURM_JOB_ID", None)

import random

import numpy
import pytest
import torch

torch.set_num_threads(1)

# Kernels run in triton's interpreter where there is no GPU. It must be asked for before anybody imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed Python, numpy and torch the same for every test, whatever order tests run in."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
