"""What the package's two programs share: how a command line is run, and how a file is written."""

import os
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import BinaryIO

from absl import flags


def main(
    name: str,
    doc: str | None,
    values: flags.FlagValues,
    argv: Sequence[str],
    run: Callable[[], int],
) -> int:
    """Parses `argv`, program name included, into `values`, and returns the status that `run` does.

    A flags.Error or RuntimeError (XLA's: no such device, no memory) is one line on stderr and 2.
    """
    try:
        _, *extra = values(argv)
        if extra:
            raise flags.Error(f"unexpected argument {extra[0]!r}: all arguments are --flag=value")
        if values.help:
            print(f"{doc}{values.get_help(include_special_flags=False)}")
            return 0
        return run()
    except (flags.Error, RuntimeError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


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
