"""Runs a command for as long as its parent process lives. Standard library only: it is run as a script.

    python watchdog.py PARENT_PID GRACE_SECONDS COMMAND ...

The command leads a process group of its own. On SIGTERM, or once the parent is gone (even by SIGKILL), the
group gets SIGTERM and, when the command has ended or the grace is over, SIGKILL. Exits with the command's
exit code. Linux's PR_SET_PDEATHSIG would not do: it follows the parent's thread instead of the process,
and reaches the command but not the processes that the command has started.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

POLL_S = 0.1


def main(parent: int, grace_s: float, command: list[str]) -> int:
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command, process_group=0)
    while child.poll() is None and not stopping and os.getppid() == parent:
        time.sleep(POLL_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        os.killpg(child.pid, signal.SIGKILL)  # the command, or what it has left behind
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
