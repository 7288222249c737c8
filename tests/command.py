"""`basd` in the process of the tests, where what a command says is tested: a process of its own first imports for seconds."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from pathlib import Path
from unittest import mock

from basd.cli import main


def basd_here(*arguments: str, cwd: Path, cache: Path) -> tuple[int, str]:
    """Exit status and output of `basd ARGUMENTS` in that directory; what it sets for its process is set back."""
    said, environment = io.StringIO(), {"BASD_CACHE": str(cache), "COLUMNS": "160"}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            mock.patch.dict(os.environ, environment),
            mock.patch.object(sys, "argv", ["basd", *arguments]),
        ):
            status = main(arguments)
    except SystemExit as left:  # of argparse
        status = int(left.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, said.getvalue()
