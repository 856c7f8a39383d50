"""The exceptions that are no faults of ours, what their messages quote and list, and what none may hold."""

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one sentence: what, where (file, row, key), and what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class Stopped(Exception):
    """A run was asked to stop (SIGTERM) and has saved what it had. The message says how to go on; the
    command line prints it and exits with code 0."""


def out_of_memory(error: BaseException) -> str | None:
    """What was too small, and what it could not take where the error says so; None if it is another error.

    JAX's is told by its text: compiler, allocators and CUDA's libraries raise it under several types.
    """
    text = str(error)
    if "os_error_code=" in text:  # TensorStore's, of a full disk or of too many files
        return None
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        memory = "this machine's memory is too small"
    elif re.search("RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY", text):
        memory = "the memory of the device is too small"
    else:
        return None
    size = re.search(
        r"allocat\w* ([\d.]+ ?(?:[KMGTP]i?B|[kKMGTP]|bytes)\b)|(Used [\d.]+\w of [\d.]+\w)", text
    )
    return f"{memory} ({(size[1] or size[2]).replace('Used', 'it needs')})" if size else memory


@contextmanager
def about(what: str) -> Iterator[None]:
    """Puts the key, row or prompt that is wrong before the sentence of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def without_secrets(sentence: str, secrets: Iterable[str] = ()) -> str:
    """The sentence with these secrets, and whatever is a token of the Hugging Face hub, blacked out."""
    for secret in filter(None, [os.environ.get("HF_TOKEN", ""), *secrets]):
        sentence = sentence.replace(secret, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", sentence)


def changed_values(changes: Iterable[tuple[str, object, object]], limit: int = 80) -> str:
    """The first changed keys, each as `key=old (now new)`, of which one may be `not given`; the key alone
    where its values, a list or a hash, are long."""
    said = []
    for key, old, new in changes:
        was = f"{key}={_written(old)}" if _given(old) else f"{key} not given"
        both = f"{was} (now {_written(new) if _given(new) else 'not given'})"
        said.append(both if len(both) <= limit else key)
    return listed(said, 8)


def _given(value: object) -> bool:
    return not isinstance(value, str | list | tuple) or bool(value)


def _written(value: object) -> object:
    """As a recipe has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else value


def listed(items: Sequence[str], limit: int = 5) -> str:
    """The first few of many, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def first_line(error: BaseException) -> str:
    """Of what another library says, which may be nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".;")
