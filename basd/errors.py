"""Errors that are the user's to mend: one sentence that says what is wrong and the way out."""

import errno
import re

_IN_ADDRESS = re.compile(r"//([^/\s:@]*):\S*@")
_IN_QUERY = re.compile(r"(?i)\b(password|passwd|pwd|token)=[^&\s;'\")]+")


def without_passwords(text: str) -> str:
    """A text, such as the error of a library, with *** in place of every password of an address in it."""
    return _IN_QUERY.sub(r"\1=***", _IN_ADDRESS.sub(r"//\1:***@", text))


class UserError(Exception):
    """Bad input or a missing resource. The command line prints the message alone, without a traceback, and exits with 2.

    No message shows a password, whoever wrote its text.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_passwords(message))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback (IPython's hook)."""
        return [str(self)]


# Why an arm that found no room for its checkpoint or its record was given back.
DISK_FULL = "the disk is full"
# Why an arm was given back that found no memory beside the others of its cohort; alone it fails.
TOO_MANY_ARMS = "memory is not enough for so many arms side by side; train fewer at a time"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that the disk or the quota is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors keeps no error number
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def reason_of(error: BaseException) -> str:
    """One line for people: the message, and the kind of error where that is not BASD's own."""
    text = " ".join(str(error).split())
    own = type(error).__module__.startswith("basd.")
    return text if own and text else f"{type(error).__name__}: {text}" if text else type(error).__name__
