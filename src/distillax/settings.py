"""From a YAML recipe and key=value overrides to a validated configuration, or one sentence.

Every value in a recipe and on the command line is text until the type of its key reads it. So `1e-4`,
`run_name=2024-01-01` and `train_data_columns=['messages']` mean the same in both places, and no YAML 1.1
surprise (`no`, `1e-4`, octal numbers) gets in between.
"""

import difflib
import re
import sys
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from distillax.errors import UserError
from distillax.recipe import Setting, read_recipe

Config = TypeVar("Config", bound=BaseModel)


def load_config(
    cls: type[Config],
    recipe_path: str | None,
    overrides: Sequence[str] = (),
    commands: Mapping[str, type[BaseModel]] | None = None,
) -> Config:
    """The config of `recipe_path` (and of the `base:` chain above it) with `key=value` overrides applied. A
    recipe that is of another of these commands, by their configs, is refused by that command's name.

    Raises UserError, one sentence, for a missing or broken recipe, an unknown key (with the nearest known
    one), a value of the wrong type and an override without `=`. Values of secrets are never shown.
    """
    leaves, sections = _known_keys(cls)
    settings = dict(recipe := read_recipe(Path(recipe_path)) if recipe_path else {})
    for number, override in enumerate(overrides, start=1):
        name, equals, value = override.partition("=")
        if not equals and name.endswith((".yml", ".yaml")):
            raise UserError(f"command line: {name} is a recipe; give one at most, before all keys.")
        if not equals:  # shown only if it is a key: it may be a token that lost its key
            shown = f"`{name}`" if name in leaves else f"override number {number}"
            raise UserError(f"command line: {shown} has no value; give overrides as key=value.")
        settings[name] = Setting(None if value in ("null", "~") else value, "command line")
    for name, setting in settings.items():
        if name in sections and setting.value in (None, ""):
            continue  # an empty section
        if name not in leaves:
            if name in recipe and (command := _command_of(recipe, commands or {})):
                raise UserError(f"{recipe_path} has {name}, so it is a recipe for `{command} {recipe_path}`.")
            raise UserError(f"{setting.where}: {_unknown(name, leaves, sections)}")
    values: dict[str, Any] = {}
    for name, setting in settings.items():
        if name in leaves:
            *parents, last = name.split(".")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = setting.value
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError(_wrong_value(error, settings, leaves)) from None


def refusal(cls: type[BaseModel], error: ValidationError, values: Mapping[str, Any]) -> UserError:
    """What is wrong with the `values` that `cls` was called with, in the sentence that `load_config` has for
    it, and the name of the class for the place."""
    leaves, sections = _known_keys(cls)
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    no_section = name in sections and first["type"] != "value_error"  # that of a rule, which says all itself
    if first["type"] == "extra_forbidden" or no_section:
        return UserError(f"{cls.__name__}: {_unknown(name, leaves, sections)}")
    return UserError(_wrong_value(error, dict(_settings(values, cls.__name__)), leaves))


def _settings(values: Mapping[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    for name, value in values.items():
        yield prefix + name, Setting(value, where)
        if isinstance(value, Mapping):
            yield from _settings(value, where, f"{prefix}{name}.")


def dump(config: BaseModel) -> str:
    """The effective config as YAML, every key, without secrets. `load_config` reads it back unchanged."""
    values = config.model_dump(mode="json")  # each on one line, however long
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=sys.maxsize)


def describe(cls: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key of `cls`, sections as dotted keys, in order."""
    rows = []
    for name, field in _fields(cls):
        default = "null" if field.default is None else field.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        elif isinstance(default, bool):
            default = str(default).lower()
        rows.append((name, _type_name(field.annotation), str(default), field.description or ""))
    return rows


def _fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _known_keys(cls: type[BaseModel]) -> tuple[dict[str, Any], set[str]]:
    """Every dotted key with its annotation, and the names of the sections."""
    leaves = {name: field.annotation for name, field in _fields(cls)}
    return leaves, {name.rpartition(".")[0] for name in leaves} - {""}


def _type_name(annotation: Any) -> str:
    """`int`, `text`, `true|false`, `cosine|constant`, `list of text`, `int|null`, ..."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        names = [str(arg) or '""' for arg in args]
        return ("|" if len(names) < 5 else " | ").join(names)  # a long list may wrap
    if origin is tuple:
        return f"list of {_type_name(args[0])}"
    if origin in (Union, types.UnionType):
        return "|".join(_type_name(arg) for arg in args)
    known = {str: "text", bool: "true|false", SecretStr: "secret", type(None): "null"}
    return known.get(annotation) or annotation.__name__


def _command_of(recipe: Collection[str], commands: Mapping[str, type[BaseModel]]) -> str | None:
    """The first command that knows all keys of a recipe."""
    known = ((command, _known_keys(cls)[0].keys()) for command, cls in commands.items())
    return next((command for command, leaves in known if leaves >= set(recipe)), None)


def _unknown(name: str, leaves: Mapping[str, Any], sections: set[str]) -> str:
    if name in sections:
        return f"{name} is a section, not a value; set its keys, as in {name}.KEY=VALUE."
    # `steps` in a pipeline means `train.steps`; otherwise the nearest by spelling.
    inside = [leaf for leaf in leaves if leaf.endswith(f".{name}")]
    near = inside or difflib.get_close_matches(name, leaves, n=1, cutoff=0.6)
    near = near[:1] or [leaf for leaf in leaves if name in re.split("[._]", leaf)][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the known keys."
    if f"train.{name}" in leaves:
        hint += f" Without a section, {name} is a key of distillax train and its recipes."
    if "." in name and not sections:
        hint = "keys with a section are those of a recipe for distillax run."
    return f"unknown key {name}; {hint}"


def _wrong_value(error: ValidationError, settings: Mapping[str, Setting], leaves: Mapping[str, Any]) -> str:
    """The first problem of a validation as one sentence: where, key, value, and what it must be."""
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    name = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in leaves), "")
    message = first["msg"].removeprefix("Value error, ")
    if not name:  # a rule over several keys names them itself
        return message if message.endswith(".") else f"{message}."
    type_name = _type_name(leaves[name])
    expected = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
    kind = first["type"].split("_")[0]
    if type_name.startswith("list") and kind != "value":
        must = "must be a " + type_name.replace("int", "whole numbers")
    elif kind in expected:
        must = f"must be {expected[kind]}"
    else:
        must = message.replace("Input should be", "must be", 1)
    setting = settings[name]
    shown = "null" if setting.value is None else repr(setting.value)
    return f"{setting.where}: {name} {must}{'' if 'secret' in type_name else f', not {shown}'}."
