"""With which options, data, versions and machine."""

from __future__ import annotations

from typing import Any

from moe_lightning.reporting.report.blocks import Block, Code, Details, Section, Text, table
from moe_lightning.reporting.report.quality import missing
from moe_lightning.reporting.report.read import OPTIONS, Run


def circumstances(run: Run) -> dict[str, str]:
    """Return versions, device, threads and data of a run, by name.

    Args:
        run: The run.

    Returns:
        From where quality was measured, and from the history of the last plan; empty where neither is there.
    """
    found: dict[str, str] = {}
    context = dict(run.quality.context) if run.quality is not None else {}
    history = [step for record in run.compressions for step in record.history]
    last = history[-1] if history else {}
    context.pop("reference", None)  # a fingerprint for a run that goes on
    if isinstance(tested := context.pop("test", None), dict):
        # Where a test was made otherwise than the run.
        other = {name: value for name, value in tested.items() if not _same(value, context.get(name))}
        context |= {f"test: {name}": value for name, value in other.items()}
    versions = context.pop("versions", None) or last.get("versions") or {}
    data = context.pop("data", None) or (last.get("calibration") or {}).get("data") or {}
    if run.offline is not None:
        found["model"] = str(run.offline.get("model", ""))
    found |= {str(name): _plain(value) for name, value in context.items() if value is not None}
    if isinstance(data, dict):
        splits = data.get("splits") or {}
        found |= {f"data: {name}": _plain(value) for name, value in data.items() if name != "splits"}
        for name, split in splits.items() if isinstance(splits, dict) else ():
            found[f"data: {name}"] = _plain(split)
    else:
        found["data"] = str(data)
    found |= {f"version of {name}": str(value) for name, value in versions.items()}
    return found


def settings_section(run: Run) -> Section:
    """Return options, versions, device and data.

    Args:
        run: The run.
    """
    blocks: list[Block] = [Text(f"Folder: {run.folder.resolve()}")]
    known = circumstances(run)
    if known:
        blocks.append(table(["", "value"], [[name, value] for name, value in known.items()], "ll"))
    for command, text in run.configs.items():
        count = text.count("\n")
        blocks.append(Details(f"config.{command}.yaml: every option ({count:,} lines)", [Code(text, "yaml")]))
    if not run.configs and run.offline is None:
        how = "moe-lightning fit writes them to config.fit.yaml"
        blocks += missing(run, "The options were not kept", how, file=OPTIONS)
    elif not run.configs:
        blocks += missing(run, "Methods, data and seeds stand in the history of the plan", "see plan.json")
    return Section("Settings", blocks)


def _same(one: Any, other: Any) -> bool:
    """Say whether two settings are equal; data are where their fingerprints are: not all of it was read in both."""
    if isinstance(one, dict) and isinstance(other, dict) and "fingerprint" in one:
        return bool(one["fingerprint"] == other.get("fingerprint"))
    return bool(one == other)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 9999 else str(value)
