"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Bad input. The message is one sentence: what, where (file, row, key), and what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """
