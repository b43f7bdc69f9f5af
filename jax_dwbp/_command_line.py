"""What the package's programs share: how a command line is run, and how a file is written."""

import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from absl import flags


def main(
    name: str,
    doc: str | None,
    values: flags.FlagValues,
    argv: Sequence[str],
    run: Callable[[], int],
) -> int:
    """Parses `argv`, program name included, into `values`, and returns the status that `run` does.

    A flags.Error, RuntimeError (XLA's: no such device, no memory) or MemoryError is one line on
    stderr and 2.
    """
    try:
        _, *extra = values(argv)
        if extra:
            raise flags.Error(f"unexpected argument {extra[0]!r}: all arguments are --flag=value")
        if values.help:
            print(f"{doc}{values.get_help(include_special_flags=False)}")
            return 0
        return run()
    except (flags.Error, RuntimeError, MemoryError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def chosen(flag: str, names: Sequence[str], known: Sequence[str]) -> list[Any]:
    """The value of --`flag`, a list out of what is known, without repetitions."""
    if not names or not set(names) <= set(known):
        raise flags.Error(f"--{flag}={','.join(names)}: must be out of {', '.join(known)}")
    return list(dict.fromkeys(names))


def found(pattern: str, what: str, items: Sequence[Any]) -> list[Any]:
    """Those whose name has --filter, a regular expression, in it."""
    try:
        some = [item for item in items if re.search(pattern, item.name)]
    except re.error as error:
        raise flags.Error(f"--filter={pattern}: not a regular expression: {error}") from error
    if not some:
        names = ", ".join(item.name for item in items)
        raise flags.Error(f"--filter={pattern}: found in none of the {what} {names}")
    return some


def check_output(flag: str, path: str | None) -> None:
    """That saving is going to succeed, before what is saved has cost its time."""
    if path is None:
        return
    directory = os.path.dirname(path) or "."
    writable = os.path.isdir(directory) and os.access(directory, os.W_OK)
    if not writable or os.path.isdir(path):
        raise flags.Error(f"--{flag}={path}: not a file in a directory that can be written")


def save(flag: str, path: str, write: Callable[[BinaryIO], object]) -> None:
    """Writes the whole file that --`flag` names or, on any error, nothing."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise flags.Error(f"--{flag}={path}: {reason(error)}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def reason(error: Exception) -> object:
    """What to say of `error`: of the system's, the text without its number and the file again."""
    return getattr(error, "strerror", None) or error
