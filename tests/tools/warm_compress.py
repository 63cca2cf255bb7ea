"""tools/compress.py, whose steps are forked from this process rather than started anew: seconds, not a minute."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

COMPRESS = Path(__file__).resolve().parents[2] / "tools/compress.py"


def run(command: tuple[str, ...]) -> SimpleNamespace:
    """``subprocess.run`` of a Python script."""
    assert command[0] == sys.executable
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.argv = list(command[1:])
            run_path(command[1], run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return SimpleNamespace(returncode=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


subprocess.run, sys.argv[0] = run, str(COMPRESS)
run_path(str(COMPRESS), run_name="__main__")
