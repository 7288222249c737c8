"""Errors that are the user's to mend: one sentence that says what is wrong and the way out."""


class UserError(Exception):
    """Bad input or a missing resource. The command line prints the message alone, without a traceback, and exits with 2."""
