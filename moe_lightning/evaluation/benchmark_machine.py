"""What a benchmark ran on, in words: without it, its figures mean nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moe_lightning import __version__

_PACKAGES = ("torch", "transformers", "triton")


def machine() -> dict[str, Any]:
    """Return what this machine is: CPU, cores, load, system, and GPU where there is one."""
    try:
        load: float | None = round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        load = None
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": load,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_bytes"] = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return found


def _cpu() -> str:
    """Return the name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Return the versions of what computes; None for what is not installed."""
    found: dict[str, str | None] = {"moe-lightning": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def device_in_words(device: torch.device) -> str:
    """Say what a device is: the GPU's name, or ``cpu``.

    Args:
        device: The device.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
