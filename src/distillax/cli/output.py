"""Standard output, which may be closed."""

import sys


class OutputClosed(Exception):
    """Nobody reads standard output any more."""


def say(*lines: object) -> None:
    """Prints lines at once, whatever standard output is. Raises OutputClosed if nobody reads it."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        raise OutputClosed from None


def flush() -> None:
    """Writes what was printed by others. Raises OutputClosed if nobody reads it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise OutputClosed from None
