"""Commands as the console runs them, in this process."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

from ds_local import cli
from ds_local.cli.ending import status_of


def command(*arguments: object) -> subprocess.CompletedProcess:
    """`ds-local VERB ...`: exit status, what it said, its errors."""
    words = [str(argument) for argument in arguments]
    out, err, argv = io.StringIO(), io.StringIO(), list(sys.argv)
    code: object = None
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = status_of(lambda: cli.main(words))
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv[:] = argv
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
