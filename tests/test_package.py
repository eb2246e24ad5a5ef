"""The package as it is installed: what the wheel holds, what importing it costs, and that it shadows nobody."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "lightning", "numpy", "jsonargparse", "datasets", "matplotlib"}


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], ["nonsense"]])
def test_answers_without_heavy_imports(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from moe_lightning.cli import main\n"
        "status = main(sys.argv[1:])\n"
        f"loaded = {sorted(HEAVY)!r}\n"
        "print('status', status, 'loaded', [name for name in loaded if name in sys.modules])"
    )
    result = run_python(code, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"status {2 if arguments == ['nonsense'] else 0} loaded []"


def test_help_names_every_command() -> None:
    from moe_lightning.cli import COMMANDS, help_text

    text = help_text()
    assert all(f"\n  {name}" in text for name in COMMANDS)
    assert list(COMMANDS) == [
        "fit",
        "validate",
        "test",
        "predict",
        "compress",
        "collect",
        "cache-logits",
        "plan",
        "benchmark",
        "report",
        "sweep",
    ]


def test_unknown_command_is_one_line_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    from moe_lightning.cli import main

    assert main(["fti"]) == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err


def test_nothing_of_ours_shadows_a_library() -> None:
    """A folder ``kernels`` with an ``__init__.py`` on the path would break ``import transformers``."""
    assert not list((ROOT / "kernels").glob("*.py"))
    result = run_python(
        "import sys; sys.path.insert(0, ''); import transformers, transformers.integrations\n"
        "from transformers import MixtralForCausalLM\n"
        "module = sys.modules.get('kernels'); print(getattr(module, '__file__', None))"
    )
    assert result.returncode == 0, result.stderr
    assert str(ROOT) not in result.stdout


def test_version_is_the_same_everywhere() -> None:
    from moe_lightning import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_torch_but_not_triton() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert "torch" in pins and "+" not in pins["torch"]
    assert "triton" not in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for text in project["dependencies"]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "triton":
            assert requirement.specifier.contains(pins[name]), f"{text} does not allow {pins.get(name)}"


def test_wheel_holds_packages_and_configs(tmp_path: Path) -> None:
    """Build a plain wheel: both packages, and the config files themselves where the tree has a link."""
    # A copy, since setuptools leaves a build folder beside the sources. Links stay links, as in a fresh clone.
    import shutil

    source = tmp_path / "source"
    source.mkdir()
    for name in ("moe_lightning", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-c",
        "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for config in (ROOT / "configs").rglob("*.yaml"):
        assert f"moe_lightning/configs/{config.relative_to(ROOT / 'configs').as_posix()}" in names
    for package, folder in (("moe_lightning", ROOT), ("moe_kernels", ROOT / "kernels")):
        for path in (folder / package).rglob("*.py"):
            assert path.relative_to(folder).as_posix() in names
    tables = (ROOT / "kernels").rglob("*.json")
    assert {table.relative_to(ROOT / "kernels").as_posix() for table in tables} <= names
    assert "moe_lightning/py.typed" in names
    assert not [name for name in names if name.startswith(("kernels/", "configs/", "tests/"))]
