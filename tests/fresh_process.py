"""Python in a process of its own, for what is settled when one starts: the environment, imports.

It imports what this process would: the same package, and the modules of this folder.
"""

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`python *arguments`, in the environment of this process and `environment`."""
    ours = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUNBUFFERED": "",  # as it is for who has not asked: output is late
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **ours, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit status, and what it wrote to stdout and to stderr."""
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()  # if it takes longer
    return process.returncode, out, err


def output(process: subprocess.Popen[str]) -> str:
    """What it wrote to stdout, if it succeeded."""
    status, out, err = finish(process)
    assert status == 0, f"a process ended with {status}:\n{out[-4000:]}\n{err[-4000:]}"
    return out


def run(*arguments: str | Path, **environment: str) -> str:
    """What `python *arguments` writes to stdout."""
    return output(start(*arguments, **environment))


def call(function: Callable, *arguments: Any, **environment: str) -> str:
    """What `function` prints, which imports all that it uses. Warnings are errors.

    The arguments must be equal to what their `repr` says.
    """
    source = textwrap.dedent(inspect.getsource(function))
    program = f"{source}\n{function.__name__}(*{arguments!r})"
    return run("-W", "error", "-c", program, **environment)
