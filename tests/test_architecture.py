"""The floor plan, enforced: who may import whom, who may know torch, and how large things may be.

`FLOORS` is the one-way ladder of sharded_lamb. A module imports only from lower floors, or from
its own folder, and no file imports itself by way of others.
"""

import ast
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sharded_lamb"

# From the ground up. A unit is a folder of the package, or a module in its root; units on one floor do not know
# each other, and imports within a folder are free (but never a cycle).
FLOORS = (
    {"pictures"},
    {"shapes", "timeline", "faults"},
    {"core", "watchdog", "cluster"},
    {"kernels", "comm"},
    {"sharding"},
    {"gradients"},
    {"optim"},
    {"__init__", "checkpoint", "telemetry"},
    {"deepspeed", "integrations", "verify", "plan"},
    {"convert", "bench"},
    {"preflight"},
    {"recipes"},
    {"bert"},
    {"gpu_check"},
    {"__main__"},
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}

WITHOUT_PROCESS_GROUPS = {"core", "kernels"}
WITHOUT_TORCH = {
    "core/hyperparams.py",
    "core/names.py",
    "core/layout.py",
    "core/footprint.py",
    "faults.py",
    "shapes.py",
}

TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "sharded_lamb",
    "launch",
    "configs",
    "tests",
    ".ci",
}

MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 450
# Spelled so that this file does not contain them.
MACHINE_PATHS = tuple(f"/{name}/" for name in ("work", "root", "home"))


@dataclass(frozen=True)
class Import:
    target: str  # absolute dotted name; for `from a import b`, "a.b"
    line: int
    type_checking_only: bool


def imports_of(source: str, package: str) -> list[Import]:
    """Every import in `source`, a module of `package`, at any depth."""
    imports: list[Import] = []

    def visit(node: ast.AST, type_checking_only: bool) -> None:
        if isinstance(node, ast.Import):
            imports.extend(Import(alias.name, node.lineno, type_checking_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            imports.extend(
                Import(f"{base}.{alias.name}", node.lineno, type_checking_only) for alias in node.names
            )
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, type_checking_only)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, type_checking_only)

    visit(ast.parse(source), False)
    return imports


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    kept = parents[: len(parents) - node.level + 1]
    return ".".join([*kept, node.module] if node.module else kept)


def unit_of_import(target: str) -> str | None:
    """The unit that a dotted name belongs to; None outside the package."""
    parts = target.split(".")
    if parts[0] != PACKAGE:
        return None
    return parts[1] if len(parts) > 1 and parts[1] in _units() else "__init__"


def mentions_process_groups(source: str, package: str) -> list[int]:
    """Lines that import torch.distributed or reach it as an attribute of torch."""
    lines = [
        imported.line
        for imported in imports_of(source, package)
        if imported.target == "torch.distributed" or imported.target.startswith("torch.distributed.")
    ]
    lines += [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    return lines


def runtime_torch_imports(source: str, package: str) -> list[int]:
    return [
        imported.line
        for imported in imports_of(source, package)
        if imported.target.split(".")[0] == "torch" and not imported.type_checking_only
    ]


def upward_imports(source: str, package: str, unit: str) -> list[str]:
    """What `source`, a module of `unit`, imports from its own floor or a higher one."""
    bad = []
    for imported in imports_of(source, package):
        target = unit_of_import(imported.target)
        if target is None or target == unit or not {target, unit} <= FLOOR_OF.keys():
            continue  # a unit that is not on the plan has a test of its own
        if FLOOR_OF[target] >= FLOOR_OF[unit]:
            bad.append(f"line {imported.line}: {unit} imports {target}")
    return list(dict.fromkeys(bad))


def cycle_in(graph: Mapping[str, set[str]]) -> list[str] | None:
    """A cycle of a graph {node: what it points to}, its first node again at the end; None where there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in sorted(graph[node]):
            cycle = walk(target, [*path, node])
            if cycle:
                return cycle
        done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := walk(node, []))), None)


def _file_graph() -> dict[str, set[str]]:
    """{module: the modules that it imports at any depth}, by dotted names; a folder's is its ``__init__``."""
    dotted = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in _modules()}
    names = {name.removesuffix(".__init__") for name in dotted.values()}
    graph: dict[str, set[str]] = {}
    for path, name in dotted.items():
        targets = set()
        for imported in imports_of(path.read_text(), _package_of(path)):
            target = imported.target
            while target and target not in names:
                target = target.rpartition(".")[0]
            if target and not imported.type_checking_only:
                targets.add(target)
        own = name.removesuffix(".__init__")
        graph[own] = targets - {own}
    return graph


@cache
def _modules() -> dict[Path, str]:
    """Every module of the package and its unit."""
    folder = ROOT / PACKAGE
    return {path: _unit_of_path(path.relative_to(folder)) for path in sorted(folder.rglob("*.py"))}


def _unit_of_path(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


@cache
def _units() -> set[str]:
    return set(_modules().values()) | set(FLOOR_OF)


def _package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


@cache
def _repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    return [path for path in paths if (ROOT / path).is_file()]


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_every_module_is_on_the_floor_plan() -> None:
    unknown = sorted({unit for unit in _modules().values() if unit not in FLOOR_OF})
    assert not unknown, f"{unknown}: add it to the floor plan (FLOORS here, and sharded_lamb/README.md)"


def test_imports_run_one_way() -> None:
    bad = [
        f"{path.relative_to(ROOT)} {problem}"
        for path, unit in _modules().items()
        for problem in upward_imports(path.read_text(), _package_of(path), unit)
    ]
    assert not bad, "\n".join(bad)


def test_what_recipes_share_knows_no_recipe() -> None:
    shared = f"{PACKAGE}.recipes.training"
    bad = [
        f"{name} imports {target}"
        for name, targets in _file_graph().items()
        if name.startswith(shared)
        for target in targets
        if target.startswith(f"{PACKAGE}.recipes.") and not target.startswith(shared)
    ]
    assert not bad, bad


def test_no_file_imports_itself_by_way_of_others() -> None:
    cycle = cycle_in(_file_graph())
    assert cycle is None, " → ".join(cycle or [])


def test_the_package_root_holds_folders_and_public_modules_only() -> None:
    root = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert root == {"__init__", "__main__", "faults", "shapes", "telemetry", "timeline"}


def test_the_math_knows_no_process_group() -> None:
    bad = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, unit in _modules().items()
        if unit in WITHOUT_PROCESS_GROUPS
        for line in mentions_process_groups(path.read_text(), _package_of(path))
    ]
    assert not bad, f"torch.distributed in {bad}"


def test_layouts_names_and_hyperparameters_are_free_of_torch() -> None:
    bad = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in _modules()
        if str(path.relative_to(ROOT / PACKAGE)) in WITHOUT_TORCH
        for line in runtime_torch_imports(path.read_text(), _package_of(path))
    ]
    assert not bad, f"torch imported at run time in {bad}"


def test_functions_and_files_stay_small() -> None:
    bad = [
        f"{name}: {lines} lines, at most {MAX_FUNCTION_LINES}"
        for path in _modules()
        for name, lines in _functions(path)
        if lines > MAX_FUNCTION_LINES
    ]
    for path in _modules():
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            bad.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {MAX_FILE_LINES}")
    assert not bad, "\n".join(bad)


def test_the_top_level_is_closed() -> None:
    names = {path.parts[0] for path in _repository_files()}
    unexpected = sorted(name for name in names - TOP_LEVEL if not name.startswith("."))
    assert not unexpected, f"{unexpected}: the top level is closed; find it a place below"


def test_no_file_names_a_machine() -> None:
    bad = []
    for path in _repository_files():
        content = (ROOT / path).read_bytes()
        if b"\0" in content:
            continue  # not text
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            bad += [f"{path}:{number} contains {needle}" for needle in MACHINE_PATHS if needle in line]
    assert not bad, "\n".join(bad)


# The checks above can fail:


@pytest.mark.parametrize(
    ("unit", "source", "clean"),
    [
        ("kernels", "from sharded_lamb.core.rule import x", True),
        ("kernels", "from sharded_lamb import core", True),
        ("kernels", "from sharded_lamb.comm.collectives import x", False),
        ("core", "import sharded_lamb.optim.sharded", False),
        ("core", "def f():\n    from sharded_lamb import sharding", False),
        ("core", "import sharded_lamb", False),
        ("core", "from sharded_lamb import faults", True),
        ("verify", "from sharded_lamb import Lamb", True),
        ("bench", "from sharded_lamb.convert import x", False),
        ("core", "if TYPE_CHECKING:\n    from sharded_lamb.comm.topology import Topology", False),
    ],
)
def test_upward_imports_are_seen(unit: str, source: str, clean: bool) -> None:
    assert (upward_imports(source, PACKAGE, unit) == []) is clean


def test_imports_within_a_folder_are_free() -> None:
    package = f"{PACKAGE}.kernels"
    assert upward_imports("from . import eager\nfrom ..core.rule import x", package, "kernels") == []
    assert upward_imports("from ..sharding.buckets import x", package, "kernels") != []


def test_cycles_are_seen() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_process_groups_are_seen(source: str) -> None:
    assert mentions_process_groups(source, PACKAGE)


def test_torch_at_run_time_is_told_from_torch_in_annotations() -> None:
    assert runtime_torch_imports("def f():\n    import torch.nn", PACKAGE) == [2]
    assert (
        runtime_torch_imports("if TYPE_CHECKING:\n    import torch\nelse:\n    torch = None", PACKAGE) == []
    )


@pytest.mark.parametrize(
    "file",
    [
        "optim/base.py",
        "optim/agreed_options.py",
        "optim/lamb.py",
        "optim/parts.py",
        "optim/registration.py",
        "optim/sharded_state.py",
        "optim/sharded.py",
        "deepspeed/optimizer.py",
    ],
)
def test_optimizers_rebind_no_attribute_that_a_wrapper_would_keep(file: str) -> None:
    """Methods run on wrappers: only construction, and setters of properties, may write an attribute of ``self``."""
    written = []
    for cls in ast.walk(ast.parse((ROOT / PACKAGE / file).read_text())):
        if not (isinstance(cls, ast.ClassDef) and cls.name.endswith(("Lamb", "Optimizer", "Options"))):
            continue
        for method in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
            if method.name in ("__init__", "__setstate__"):
                continue
            for node in ast.walk(method):
                is_own = (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "self"
                )
                if is_own and isinstance(node.ctx, (ast.Store, ast.Del)):
                    written.append(f"{cls.name}.{method.name}: self.{node.attr}")
    assert not written, f"keep it in self._live, or in an object that is mutated in place: {written}"
