"""The house rules that a machine can check: imports point down, modules stay short, recipes load."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillax.config import PipelineConfig, TrainConfig
from distillax.settings import load_config

REPO = Path(__file__).resolve().parents[1]
SOURCE = REPO / "src" / "distillax"
MODULES = sorted(SOURCE.rglob("*.py"))

# A part may import parts of a lower level, and its own modules. Level 0 may be imported by all.
LEVELS = {
    "errors": 0,
    "recipe": 0,
    "config": 0,
    "settings": 0,
    "run_dir": 0,
    "progress": 0,
    "models": 1,
    "data": 2,
    "checkpoints": 2,
    "parallel": 2,
    "train": 3,
    "teachers": 3,
    "report": 3,
    "evaluate": 4,
    "plan": 4,
    "api": 5,
    "stages": 5,
    "comparison": 6,
    "preflight": 6,
    "pipeline": 7,
    "__init__": 7,
    "cli": 8,
    "__main__": 9,
}
LEAVES = {
    "errors": set(),
    "recipe": {"errors"},
    "config": {"recipe", "settings"},
    "settings": {"errors", "recipe"},
    "run_dir": {"errors"},
    "progress": {"errors"},
}
NEVER = {"torch", "vllm", "pickle", "dill", "cloudpickle"}
MODULE_LINES, FUNCTION_LINES = 400, 60


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a module, wherever in the file it stands."""
    package = ["distillax", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from distillax import x` names a part by x; elsewhere the module is enough.
            if module == "distillax":
                yield from ((node.lineno, f"distillax.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def upward_imports(path: Path) -> Iterator[str]:
    part = part_of(path)
    for line, module in imported_modules(path):
        names = module.split(".")
        if names[0] != "distillax" or len(names) < 2 or names[1] == part:
            continue
        target = "__init__" if names[1] == "__version__" else names[1]
        allowed = target in LEAVES[part] if part in LEAVES else LEVELS.get(target, 99) < max(LEVELS[part], 1)
        if not allowed:
            yield f"{path.relative_to(REPO)}:{line}: {part} imports {target}"


def test_every_part_has_its_level():
    assert {part_of(path) for path in MODULES} <= LEVELS.keys()


def test_imports_point_down():
    assert [line for path in MODULES for line in upward_imports(path)] == []


def test_an_upward_import_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("test_architecture.SOURCE", tmp_path)
    monkeypatch.setattr("test_architecture.REPO", tmp_path)
    (tmp_path / "models").mkdir()
    module = tmp_path / "models" / "bad.py"
    module.write_text("def f():\n    from ..train import loop\n\nfrom distillax import data, errors\n")
    found = sorted(upward_imports(module))
    assert found == ["models/bad.py:2: models imports train", "models/bad.py:4: models imports data"]


def test_torch_vllm_and_pickle_are_never_imported():
    found = [
        f"{path.relative_to(REPO)}:{line}: {module}"
        for path in MODULES
        for line, module in imported_modules(path)
        if module.split(".")[0] in NEVER
    ]
    assert found == []


def test_modules_and_functions_stay_short():
    long = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MODULE_LINES:
            long.append(f"{path.relative_to(REPO)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{path.relative_to(REPO)}:{node.lineno}: {node.name} has {lines} lines")
    assert long == []


def test_the_map_of_the_house_is_complete():
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("src/distillax/\n") : text.index("recipes/ ")]
    drawn = set(re.findall(r"^ +(\w+\.py) ", tree, re.M)) - {"__init__.py"}
    assert drawn == {path.name for path in MODULES} - {"__init__.py"}


def lines_of(path: Path, name: str) -> int:
    """Of a function, or of `Class.method`; KeyError if the module has none by that name."""
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        inner = {
            x.name: x for x in ast.iter_child_nodes(node) if isinstance(x, ast.FunctionDef | ast.ClassDef)
        }
        node = inner[part]
    assert isinstance(node, ast.FunctionDef)
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_one_step_is_read_in_under_200_lines():
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## One step, in reading order\n")[1].split("\n## ")[0]
    items = re.findall(r"^\d+\. `(train/\w+\.py)`: (.*(?:\n   .*)*)", section, re.M)
    named = [(module, name) for module, said in items for name in re.findall(r"`([\w.]+)`", said)]
    # All that the step goes through, from the batch to the update, is among them.
    must = {"_Training.run", "make_step", "accumulate", "online", "_sums_and_gradients", "Online.__call__"}
    assert must <= {name for _, name in named}
    read = {(module, name): lines_of(SOURCE / module, name) for module, name in named if name != "chunked"}
    assert "under 200 lines" in section and sum(read.values()) < 200, read


@pytest.mark.parametrize("recipe", sorted(path.name for path in REPO.glob("recipes/*.yml")))
def test_every_recipe_loads(recipe):
    path = REPO / "recipes" / recipe
    cls = PipelineConfig if re.search(r"^train:", path.read_text(encoding="utf-8"), re.M) else TrainConfig
    load_config(cls, str(path))


def test_no_tracked_file_names_a_folder_of_one_machine():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    homes = re.compile(r"(?<![\w./-])/(?:work|root|home/\w+|Users/\w+)/")
    found = []
    for name in filter(None, listed):
        path = REPO / name
        if path.is_file() and not path.is_symlink():
            text = path.read_bytes().decode("utf-8", errors="replace")
            found += [f"{name}: {match.group()}" for match in homes.finditer(text)]
    assert found == []
