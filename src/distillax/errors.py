"""The exceptions that are no faults of ours."""


class UserError(ValueError):
    """Bad input. The message is one sentence: what, where (file, row, key), and what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class Stopped(Exception):
    """A run was asked to stop (SIGTERM) and has saved what it had. The message says how to go on; the
    command line prints it and exits with code 0."""
