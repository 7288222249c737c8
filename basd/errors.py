"""Errors that are the user's to mend: one sentence that says what is wrong and the way out."""

import errno


class UserError(Exception):
    """Bad input or a missing resource. The command line prints the message alone, without a traceback, and exits with 2."""


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
