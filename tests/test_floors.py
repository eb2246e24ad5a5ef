"""Imports go down the floors of the architecture: never up, never sideways, never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_lightning"

# Bottom first. Names on one line must not import each other.
FLOORS = [
    {"plan", "files", "hub", "schedules", "moe_kernels"},
    {"experts"},
    {"architectures"},
    # sizes holds `measure`: a module of that name would hide the function ml.measure.
    {"surgery", "sizes", "divergence"},
    {"statistics"},
    {"criteria"},
    # The base class that trimming, slimming and recovery share, and that compression drives.
    {"method"},
    {"trimming", "slimming", "recovery"},
    {"compression"},
    {"checkpoints", "data", "evaluation"},
    {"reporting", "modules"},
    {"callbacks", "sweep"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# The package itself gathers names from all floors, lazily; nothing may import from it except the version.
TOP = "moe_lightning"


def sources() -> list[tuple[str, Path]]:
    """Return (room, file) of every source file; the room is the top-level name that the file belongs to."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        found.append((TOP if parts == ("__init__.py",) else parts[0].removesuffix(".py"), path))
    found += [("moe_kernels", path) for path in sorted((ROOT / "kernels" / "moe_kernels").rglob("*.py"))]
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """Return (line, absolute dotted name) of all imports in a file, those inside functions and relative ones included.

    ``from a.b import c`` yields ``a.b.c``: whether c is a module or a name in one makes no difference to the room.
    Imports for type checkers count too: an annotation is knowledge of the other room.
    """
    if path.is_relative_to(PACKAGE):
        package = ["moe_lightning", *path.relative_to(PACKAGE).parent.parts]
    else:
        package = list(path.relative_to(ROOT / "kernels").parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    found.append((node.lineno, argument.value))
    return found


def room_of(module: str) -> str | None:
    """Return the room that a dotted name belongs to; None for other people's modules."""
    parts = module.split(".")
    if parts[0] == "moe_kernels":
        return "moe_kernels"
    if parts[0] != "moe_lightning":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else TOP


def violations(room: str, imports: list[tuple[int, str]]) -> list[str]:
    found = []
    for line, module in imports:
        target = room_of(module)
        if target is None or target == room or room == TOP:
            continue
        if room == "moe_kernels":
            found.append(f"line {line}: moe_kernels imports {module}, but it may import nothing of ours")
        elif target == TOP:
            if module != "moe_lightning.__version__":
                found.append(f"line {line}: {room} imports {module}: import from the room where the name lives")
        elif FLOOR_OF[target] >= FLOOR_OF[room]:
            direction = "sideways" if FLOOR_OF[target] == FLOOR_OF[room] else "up"
            found.append(f"line {line}: {room} imports {direction} from {module}")
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {room for room, _ in sources()} - {TOP}
    assert rooms <= FLOOR_OF.keys(), f"give {sorted(rooms - FLOOR_OF.keys())} a floor in architecture and in FLOORS"


def test_imports_go_down() -> None:
    found = [
        f"{path.relative_to(ROOT)} {violation}"
        for room, path in sources()
        for violation in violations(room, imported_modules(path))
    ]
    assert not found, "\n".join(found)


def test_no_circles_inside_a_room() -> None:
    """Modules of one room may import each other, but not in a circle."""
    names = {}
    for _, path in sources():
        base = PACKAGE.parent if path.is_relative_to(PACKAGE) else ROOT / "kernels"
        names[".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")] = path
    edges: dict[str, set[str]] = {}
    for name, path in names.items():
        edges[name] = set()
        for _, module in imported_modules(path):
            # "a.b.c" is module a.b.c, or the name c of module a.b.
            target = module if module in names else module.rpartition(".")[0]
            # A package's __init__ gathers from its own modules, which may import siblings through the package's name.
            if target in names and target != name and target != TOP and name != TOP:
                edges[name].add(target)
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            pytest.fail("imports in a circle: " + " -> ".join([*trail[trail.index(name) :], name]))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])


@pytest.mark.parametrize(
    ("room", "imports", "count"),
    [
        ("plan", ["json", "torch"], 0),
        ("experts", ["moe_lightning.plan.ModelShape", "moe_kernels.grouped"], 0),
        ("experts", ["moe_lightning.cli"], 1),
        ("data", ["moe_lightning.evaluation.likelihood"], 1),
        ("moe_kernels", ["moe_lightning.plan"], 1),
        ("cli", ["moe_lightning.compress"], 1),
        ("cli", ["moe_lightning.__version__", "moe_lightning.callbacks.Compress"], 0),
    ],
)
def test_the_rule_itself(room: str, imports: list[str], count: int) -> None:
    assert len(violations(room, [(1, module) for module in imports])) == count
