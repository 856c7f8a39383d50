"""Reads a YAML recipe, and the chain of recipes it is based on, into settings that know where they stand."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distillax.errors import UserError

PACKAGED = Path(__file__).parent / "recipes"  # those that come with the program


@dataclass(frozen=True)
class Setting:
    """A value as it was typed (text, None for null, or a list of those), and where: `file:line`."""

    value: Any
    where: str


def parse_value(text: str) -> Any:
    """One value typed as YAML, as `Setting.value` holds it. Raises yaml.YAMLError."""
    return _plain(yaml.compose(text, Loader=yaml.SafeLoader))


def packaged(name: str) -> Path | None:
    """The recipe that comes with the program under this name: `sft.yml`, `recipes/sft.yml`, or `sft`."""
    file = PACKAGED / f"{name.removeprefix('recipes/').removesuffix('.yml')}.yml"
    return file if file.parent == PACKAGED and file.is_file() else None


def read_recipe(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Setting]:
    """The settings of a recipe laid over those of its `base:`, by dotted key (`train.steps`).

    A base is a path relative to the recipe that names it; `chain` holds the recipes that led here. Where
    there is no such file, it may be one that comes with the program. Raises UserError for a missing or
    broken file, a key given twice, and bases that lead back to themselves.
    """
    if not chain and not path.is_file():
        path = packaged(str(path)) or path
    if path.resolve() in [seen.resolve() for seen in chain]:
        loop = " -> ".join(str(seen) for seen in (*chain, path))
        raise UserError(f"{chain[-1]}: its base leads back to itself ({loop}); remove one of these bases.")
    if not path.is_file():
        asked = f"{chain[-1]}: base " if chain else ""
        folders = (path.parent, Path("recipes"), PACKAGED)
        here = [file for folder in folders for file in sorted(folder.glob("*.yml"))]
        near = difflib.get_close_matches(path.stem, [file.stem for file in here], n=1)
        hint = next(
            (
                f"did you mean {file.name if file.parent == PACKAGED else file}?"
                for file in here
                if near == [file.stem]
            ),
            "give the path of a YAML file.",
        )
        raise UserError(f"{asked}{path}: no such recipe; {hint}")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file; give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        raise UserError(_not_yaml(error, path)) from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines; this file holds something else.")
    own = _flatten(node, path, "")
    base = own.pop("base", None)
    if base is None:
        return own
    if not isinstance(base.value, str) or not base.value:
        raise UserError(f"{base.where}: base must be the path of a recipe.")
    above = path.parent / base.value
    if not above.is_file():
        above = packaged(base.value) or above
    return read_recipe(above, (*chain, path)) | own


def _not_yaml(error: yaml.YAMLError, path: Path) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "unreadable"
    if "find expected ':'" in problem:  # which YAML looks for as far as the next line
        mark, problem = getattr(error, "context_mark", mark), "a line without `: `"
    where = f"{path}:{mark.line + 1}" if mark else path
    before = ", or the one before" * ("not allowed here" in problem)
    return f"{where}: not valid YAML: {problem}; correct this line{before}."


def _flatten(mapping: yaml.MappingNode, path: Path, prefix: str) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for key_node, node in mapping.value:
        name, where = prefix + str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if isinstance(node, yaml.MappingNode):
            new = _flatten(node, path, f"{name}.") or {name: Setting(None, where)}
        else:
            _refuse_joined(name, node, path)
            new = {name: Setting(_plain(node), where)}
        if twice := settings.keys() & new.keys():
            raise UserError(f"{where}: {min(twice)} is given twice in this file; remove one of the two.")
        settings |= new
    return settings


def _refuse_joined(name: str, node: yaml.Node, path: Path) -> None:
    """YAML takes an indented line without a colon for more of the value above it, without a word."""
    for value in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        bare = isinstance(value, yaml.ScalarNode) and value.style is None
        if bare and value.end_mark.line > value.start_mark.line:
            raise UserError(
                f"{path}:{value.end_mark.line + 1}: this line is read as part of {name}; write it as "
                f"`key: value`, indented as the other keys are, or the whole value of {name} on one line."
            )


def _plain(node: yaml.Node | None) -> Any:
    """A YAML value as text, None or a list: types are the keys' business."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(name.value): _plain(value) for name, value in node.value}
    if not isinstance(node, yaml.ScalarNode) or (node.tag.endswith(":null") and node.value):
        return None
    return node.value
