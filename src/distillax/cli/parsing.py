"""argparse, with our errors, and arguments that derive from the config's keys."""

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from distillax import __version__
from distillax.errors import UserError

SOURCE = "Hugging Face folder or hub id, GGUF file, or Orbax checkpoint"
_PLACES = {"MODEL", "DATA", "TOKENIZER"}  # what an option names by a path or a hub id
# The columns of a data set, unless --data-columns names them.
PROMPTS = "default: messages, prompt, question, conversations or instruction"
PAIRS = (
    "default: messages; prompt completion; prompt response; question answer; conversations; "
    "instruction output; instruction response; or input output"
)


@dataclass(frozen=True)
class Command:
    """A subcommand: `arguments` adds them to its parser, `run` does the work."""

    summary: str
    example: str
    arguments: Callable[[Any], None]
    run: Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """Mistakes become UserErrors, so that they look like all others."""

    words: Sequence[str] = ()  # of the command line

    def error(self, message: str) -> NoReturn:
        flags = [word for word in self.words if word.startswith("--") and word != "--"]
        wrong = [word for word in flags if word.partition("=")[0] not in self._option_string_actions]
        # What is missing may be there under another name; of a subcommand that is missing we know no options.
        if wrong and "required" in message and not self._subparsers:
            raise UserError(unknown(wrong[0], self))
        raise UserError(f"{message}; see `{self.prog} --help`")


def make_parser(commands: Mapping[str, Command], words: list[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the subcommand that was asked for: the others' cost time.

    It raises UserError for a mistake. What it parses has `run`, and `parser` to name it in errors.
    """
    parser = Parser(
        prog="distillax",
        description="Distil a large language model into a smaller one.",
        epilog="example:\n  distillax run recipes/demo.yml teacher=MODEL prompts.path=prompts.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"distillax {__version__}")
    if words and not words[0].startswith("-") and words[0] not in commands:
        near = difflib.get_close_matches(words[0], commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
        raise UserError(f"there is no command {words[0]}; {hint}")
    group = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)
    for name, command in commands.items():
        sub = add_parser(group, name, command.summary, command.example)
        sub.set_defaults(parser=sub, run=command.run)
        if name in words[:1]:
            sub.words = words[1:]
            command.arguments(sub)
    return parser


def add_parser(group: Any, name: str, summary: str, example: str) -> Parser:
    return group.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_source_and_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument("folder", metavar="DIR", help="the folder to write")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the weights (default: the source's own)")
    add_token(parser)


def add_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-access-token", metavar="TOKEN", help="default: the environment's HF_TOKEN")


def add_data(parser: argparse.ArgumentParser, flag: str, columns: str) -> None:
    parser.add_argument(flag, required=True, metavar="DATA", help="hub id, folder, .parquet, .json or .jsonl")
    name = "configuration of a data set on the hub that has several"
    parser.add_argument("--data-name", metavar="NAME", help=name)
    parser.add_argument("--data-split", default="train", metavar="SPLIT", help="default: train")
    parser.add_argument("--data-columns", nargs="+", metavar="COLUMN", help=columns)


def add_flags(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """A flag a key, as text: types are the config's business. One not given is not in the namespace."""
    from distillax.settings import describe

    for name, kind, default, meaning in describe(config):
        text = meaning.replace("null:", "default:").replace("%", "%%")
        text += "" if default in ("", "null") else f" (default: {default})"
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        metavar = kind.removesuffix("|null")
        if metavar == "true|false":
            options["action"] = argparse.BooleanOptionalAction
        elif metavar.startswith("list"):
            options |= {"nargs": "+", "action": "extend", "metavar": name.rpartition("_")[2].upper()}
        else:
            options["metavar"] = metavar if "|" in metavar else metavar.upper()
        if name == "keep_truncated":  # its opposite has a name of its own
            options["action"] = "store_true"
            drop: dict[str, Any] = options | {"action": "store_false", "help": "leave out unfinished answers"}
            parser.add_argument("--drop-truncated", **drop)
        parser.add_argument(flag_of(name), **options)


def flag_of(name: str) -> str:
    """`top_p` -> `--top-p`."""
    return "--" + name.replace("_", "-")


def with_flags(sentence: str, config: type[Any]) -> str:
    """What the config says of its keys, in the words of the command line: `top_p must ...` and `top_p=2`."""
    names = "|".join(config.model_fields)
    said = re.sub(rf"^(command line: )?({names})\b", lambda m: flag_of(m[2]), sentence)
    return re.sub(rf"(?<![-\w])({names})=(?=\w)", lambda m: f"{flag_of(m[1])} ", said)


def with_its_flag(sentence: str, args: argparse.Namespace) -> str:
    """A sentence that begins with a model or a file that was given, with the flag or the key before it, if
    that is the only one: `--student x does not exist`, `teacher=x does not exist`."""
    named = [(a.option_strings[-1] + " ", a.dest) for a in args.parser._actions if a.metavar in _PLACES]
    given = [(flag, value) for flag, dest in named if (value := getattr(args, dest, None))]
    pairs = (word.partition("=") for word in getattr(args, "words", ()))
    given += [(f"{key}=", value) for key, _, value in pairs if re.search(r"(teacher|source|path)$", key)]
    ours = ("", "teacher", "student", "data")  # with which sentences begin that are of no file
    begins = [(flag, (f"{value} ", f"{value}: ")) for flag, value in given if value not in ours]
    found = [flag for flag, words in begins if sentence.startswith(words)]
    return found[0] + sentence if len(found) == 1 else sentence


def add_keys(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """`[RECIPE.yml] [key=value ...]` as `words`, and every key of the config in the help, those of a section
    that has the keys of another command by that command's name."""
    from distillax.config import TrainConfig
    from distillax.recipe import PACKAGED
    from distillax.settings import describe

    parser.usage = f"{parser.prog} {{RECIPE.yml|key=value}} [key=value ...]"
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(PACKAGED.glob("*.yml"))}
    fit = [n for n, text in texts.items() if ("\nprompts:" in text) == ("prompts" in config.model_fields)]
    known = f"; a file, or one that comes with distillax: {', '.join(fit)}" if fit else ""
    text = f"keys win over the recipe{known}"
    parser.add_argument("words", nargs="+", metavar="RECIPE.yml, key=value", help=text)
    width = max(40, min(shutil.get_terminal_size().columns, 110) - 2)
    lines = [parser.epilog or "", "", "keys, with their types and defaults:"]
    sections = {
        name: field.description
        for name, field in config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, TrainConfig)
    }
    rows = [
        (f"{name}: {kind} = {default or chr(34) * 2}", meaning)
        for name, kind, default, meaning in describe(config)
        if name.partition(".")[0] not in sections
    ]
    for head, meaning in [*rows, *((f"{name}.KEY", meaning) for name, meaning in sections.items())]:
        for text, indent in ((head, "  "), (meaning, "      ")):
            wrap = textwrap.TextWrapper(width, indent, "      ", break_on_hyphens=False)
            lines.append(wrap.fill(text))
    parser.epilog = "\n".join(lines)


def recipe_and_overrides(words: list[str]) -> tuple[str | None, list[str]]:
    """The first word is a recipe, unless it is a key=value."""
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return words[0], words[1:]
    return None, words


def add_thinking(parser: argparse.ArgumentParser) -> None:
    text = "passed to the chat template (default: as the data set was generated)"
    parser.add_argument("--enable-thinking", action=argparse.BooleanOptionalAction, help=text)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    dtypes = ("auto", "bfloat16", "float32")
    parser.add_argument(
        "--dtype", choices=dtypes, default="auto", help="of the matrix products (default: auto)"
    )


def check_output(flag: str, file: Path | None) -> None:
    """Raises UserError for a file that could not be written, before the work that it is for."""
    if file and file.parent.exists() and not file.parent.is_dir():
        raise UserError(f"{flag} {file}: {file.parent} is no folder; choose another path")
    if file and not file.parent.is_dir():
        raise UserError(f"{flag} {file}: there is no folder {file.parent}; make it first")
    if file and file.is_dir():
        raise UserError(f"{flag} {file} is a folder; give a file in it")


def split_of(data: str, split: str) -> str:
    """The split to read. Raises UserError for one of a single file, which has none."""
    from distillax.data.rows import refuse_split_of_file

    refuse_split_of_file(data, split, f"--data-split {split}")
    return split


def columns(words: list[str] | None) -> tuple[str, ...]:
    """Columns given as `a b` or `a,b`."""
    return tuple(name for word in words or () for name in word.split(",") if name)


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def positive(text: str) -> int:
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def whole_numbers(text: str) -> list[int]:
    return [whole(part) for part in text.split(",")]


def unknown(word: str, parser: argparse.ArgumentParser) -> str:
    """The sentence about a word that the parser has no place for."""
    name = word.partition("=")[0]  # what follows may be a secret
    if not word.startswith("-"):
        return f"unexpected argument {name}; see `{parser.prog} --help`"
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--") and flag != "--help"]
    longer = [flag for flag in flags if flag.startswith(f"{name}-")]
    near = longer or difflib.get_close_matches(name, flags, n=1)
    otherwise = f"see `{parser.prog} --help`"
    if "key=value" in (parser.usage or ""):
        otherwise = "keys are given as key=value"
    return f"unknown option {name}; {f'did you mean {near[0]}?' if near else otherwise}"
