"""Kernels run on the GPU where there is one, elsewhere in triton's interpreter (`tests/conftest.py` asks for it)."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
