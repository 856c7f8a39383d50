"""The command line. One subcommand is: parse, make a config, call one function.

Exit codes: 0 done, 2 the user's mistake, or too little memory (one sentence, no traceback), 1 ours, 130
interrupted, 143 ended by SIGTERM (0 while it trains, once a checkpoint is saved).
"""

import contextlib
import errno
import itertools
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from distillax.cli import commands, environment, memory, output, parsing
from distillax.errors import Stopped, UserError, without_secrets

# What is wrong with the path that was given, and not with us.
_PATH_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip

_KEEPING = {"generate", "capture", "train", "run"}  # commands that keep unfinished work
_ON_SIGTERM = _KEEPING - {"train"}  # which sees to it itself, with other processes


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as an interrupt does, with what it has kept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code. What is our own fault is raised.

    Without `argv` it is that of the process, which then ends here unless all went well.
    """
    if argv is not None:
        return _guarded(list(argv))
    environment.use_huge_pages(sys.argv[1:2])
    _keep_interrupts()
    if _ON_SIGTERM.intersection(sys.argv[1:2]) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _guarded(sys.argv[1:], alone=True)
    except Exception:  # whatever it is: only its traceback is due, as Python itself prints it
        traceback.print_exc()
        code = 1
    if code:
        # What was broken off may still be computing in threads of JAX, under which Python's own way
        # to end, taking the interpreter apart, crashes.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def _guarded(words: list[str], alone: bool = False) -> int:
    try:
        return _run(words, alone)
    except UserError as error:
        return _mistake(str(error), words)
    except Stopped as stopped:
        _tell(stopped)
        return 0
    except _Terminated as stopped:
        _tell(f"stopped by SIGTERM{_kept(stopped, words)}")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt as interrupt:
        _tell(str(interrupt) or f"interrupted{_kept(interrupt, words)}")
        return 130
    except output.OutputClosed:
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in _PATH_ERRORS and error.filename:
            told = f"{error.filename}: {error.strerror}; choose another path, or make room there"
            return _mistake(told, words)
        return _resources(error, words)
    except Exception as error:
        return _resources(error, words)


def _kept(interrupt: KeyboardInterrupt, words: list[str]) -> str:
    """How the command goes on, which whoever kept something has noted."""
    kept = "the same command goes on from what was kept, if anything"
    notes = getattr(interrupt, "__notes__", [kept] if _KEEPING.intersection(words[:1]) else [])
    return "".join(f"; {note}" for note in notes)


def _resources(error: Exception, words: list[str]) -> int:
    """Where the machine was too small for it; else the error is our fault, and raised."""
    told = memory.sentence(error, "".join(words[:1]))
    if told is None and (reason := re.search(r"([\w ]+) \[os_error_code=", str(error))):
        where = re.search(r'"(/[^"]*)"', str(error))
        told = f"{where[1] if where else 'the disk'}:{reason[1]}; choose another path, or make room there"
    if told is None:
        raise error
    return _mistake(told, words)


def _run(words: list[str], alone: bool) -> int:
    """`alone`: the process is ours, and nobody's else who may want PyTorch in it, or have log handlers."""
    parser = parsing.make_parser(commands.COMMANDS, words)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    try:
        args, unknown = parser.parse_known_args(words)
    except SystemExit as done:  # --help and --version; mistakes are UserErrors
        output.flush()
        return int(done.code or 0)
    if hasattr(args, "words") and not any(word.startswith("-") for word in unknown):
        args.words, unknown = [*args.words, *unknown], []  # keys that came after an option
    if unknown:
        raise UserError(parsing.unknown(unknown[0], args.parser))
    environment.prepare()
    if alone:
        environment.say_warnings_once()
        environment.leave_torch_out(words[0])
    try:
        args.run(args)
    except UserError as error:
        raise UserError(parsing.with_its_flag(str(error), args)) from None
    return 0


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # one is enough: a second must not break off what is kept
    raise _Terminated


def _keep_interrupts() -> None:
    """An interrupt that falls into a callback of the garbage collector, of which JAX has one, is
    raised again just after it: Python would print it and go on."""
    usual = sys.unraisablehook
    lost: list[type[BaseException]] = []

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            lost.append(unraisable.exc_type)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            usual(unraisable)

    def again(*_: object) -> None:
        raise lost.pop()

    signal.signal(signal.SIGALRM, again)
    sys.unraisablehook = hook


def _mistake(sentence: str, words: list[str]) -> int:
    """Prints what the user did wrong, tokens blacked out."""
    secrets = [word for before, word in itertools.pairwise(words) if before == "--hf-access-token"]
    secrets += [w.partition("=")[2] for w in words if "access_token=" in w.replace("-", "_")]
    _tell("error:", without_secrets(sentence, secrets))
    return 2


def _tell(*words: object) -> None:
    """Says why it ends, where anybody listens: the reader of a pipe may have been interrupted, too."""
    with contextlib.suppress(OSError):
        print("distillax:", *words, file=sys.stderr, flush=True)
