"""The house keeps its order: import floors, one writer and one reader of files, small documented files, a quick `--help`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "varcli"
SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

# from the ground up; a room imports rooms of lower floors, and itself
FLOORS = (
    {"errors", "shapes", "config", "scales", "progress", "devices"},
    {"artifacts"},
    {"data", "pretrained", "distributed", "kernels"},
    {"tokenizer", "transformer"},
    {"order"},
    {"training", "sampling", "metrics", "interop", "scaling"},
    {"report", "bench", "audit"},
    {"cli"},
    {"__main__"},
)
SAME_FLOOR = {"errors", "shapes", "config", "scales", "progress", "devices"}  # words everybody shares, also one another

MAX_LINES = 400
MAX_TRACKED_BYTES = 56 * 2**20  # lite0, emoji64 and its models are most of it


def _floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> list[str]:
    """Every module named by an import statement, at the top or inside a function, as a dotted name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_every_room_has_a_floor():
    rooms = {_room(path) for path in SOURCES} - {"__init__"}
    assert rooms <= set().union(*FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_point_down(path: Path):
    room = _room(path)
    if room == "__init__":
        return
    for name in _imports(_parse(path)):
        parts = name.split(".")
        if parts[0] != "varcli" or parts[1] in (room, "__version__", "__init__"):
            continue
        other = parts[1]
        below = _floor(other) < _floor(room) or (other in SAME_FLOOR and room in SAME_FLOOR)
        assert below, f"{room} (floor {_floor(room)}) imports {other} (floor {_floor(other)})"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_terminal_libraries_stay_in_cli(path: Path):
    if _room(path) in ("cli", "__main__"):
        return
    assert not {name.split(".")[0] for name in _imports(_parse(path))} & {"typer", "rich", "click"}


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_core_prints_nothing(path: Path):
    if path == PACKAGE / "cli" / "console.py":
        return
    calls = [_called(node) for node in ast.walk(_parse(path)) if isinstance(node, ast.Call)]
    assert "print" not in calls


# file -> what it may do that the others may not, with the reason
WRITERS = {
    "artifacts/write.py",  # the writer
    "artifacts/lock.py",  # a note beside the lock, which may be torn
    "artifacts/manifest.py",  # reads files to hash them
}
_WRITING = re.compile(r"(^|\.)(write_text|write_bytes|tofile|np\.save|np\.savez|np\.savez_compressed|save_file)$")


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_are_written_in_one_place(path: Path):
    name = path.relative_to(PACKAGE).as_posix()
    if name in WRITERS:
        return
    own_writers = {  # functions of artifacts/write.py that share a name with a method
        name.rsplit(".", 1)[1] for name in _imports(_parse(path)) if name.startswith("varcli.artifacts.write.")
    }
    for node in ast.walk(_parse(path)):
        if not isinstance(node, ast.Call):
            continue
        called = _called(node)
        if called not in own_writers:
            assert not _WRITING.search(called), f"{name}:{node.lineno} calls {called}"
        if called == "open" or called.endswith(".open"):
            mode = _mode(node, 1 if called == "open" else 0)
            assert mode is None or not set(mode) & set("wax+"), f"{name}:{node.lineno} opens for writing"


def _mode(node: ast.Call, position: int) -> str | None:
    given = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] + node.args[position : position + 1]
    if given and isinstance(given[0], ast.Constant) and isinstance(given[0].value, str):
        return given[0].value
    return None


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_nothing_reads_a_pickle_but_the_guarded_loader(path: Path):
    name = path.relative_to(PACKAGE).as_posix()
    tree = _parse(path)
    banned = {"pickle", "_pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "yaml"}
    assert not {entry.split(".")[0] for entry in _imports(tree)} & banned
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _called(node)
        if name != "artifacts/foreign.py":
            assert called not in ("torch.load", "torch.save"), f"{name}:{node.lineno} calls {called}"
        assert called not in ("eval", "exec"), f"{name}:{node.lineno} calls {called}"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            assert not (keyword.arg == "weights_only" and value is not True), f"{name}:{node.lineno}"
            assert not (keyword.arg == "allow_pickle" and value is not False), f"{name}:{node.lineno}"
        if called == "torch.load":
            assert any(keyword.arg == "weights_only" for keyword in node.keywords), f"{name}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_are_small_and_documented(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the module has no docstring"
    undocumented = []
    for node in _public(tree):
        if not ast.get_docstring(node):
            undocumented.append(f"{node.name} (line {node.lineno})")
        if isinstance(node, ast.ClassDef):
            undocumented += [
                f"{node.name}.{method.name} (line {method.lineno})"
                for method in _public(node)
                if not ast.get_docstring(method) and not _is_known_by_name(method)
            ]
    assert not undocumented


def _public(node: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if isinstance(node, ast.ClassDef) and node.name.startswith("_"):
        return []
    return [child for child in node.body if isinstance(child, kinds) and not child.name.startswith("_")]


def _is_known_by_name(method: ast.AST) -> bool:
    """`forward` of a network's inner block, and methods that say all by name and type."""
    return isinstance(method, ast.FunctionDef) and method.name in ("forward", "extra_repr")


def test_no_path_of_one_machine_is_in_the_tree():
    # put together here, so that this file does not hold them itself
    places = [b"/" + b"work/", b"/" + b"tmp/w/", b"/" + b"root/"]
    for name in _tracked():
        if Path(name).suffix in (".py", ".md", ".toml", ".json", ".sh", "") and (ROOT / name).is_file():
            content = (ROOT / name).read_bytes()
            assert not [place for place in places if place in content], name


def test_tracked_tree_clones_fast():
    total = sum((ROOT / name).lstat().st_size for name in _tracked() if (ROOT / name).exists())
    assert total < MAX_TRACKED_BYTES


def _tracked() -> list[str]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listing.decode("utf-8", "surrogateescape").split("\0") if name]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["--version"], ["--no-such-option"]], ids=" ".join
)
def test_help_imports_no_heavy_library(arguments: list[str]):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "varcli", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in imported
    heavy = {"torch", "torchvision", "numpy", "scipy", "PIL", "safetensors", "matplotlib", "huggingface_hub"}
    assert not imported & heavy
