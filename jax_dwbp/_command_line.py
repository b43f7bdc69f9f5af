"""What the package's programs share: how a command line is run, and how a file is written."""

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import jax
from absl import flags

# What there is to say of a standard output that can't be written.
_OF_WRITING = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(
    name: str,
    doc: str | None,
    values: flags.FlagValues,
    argv: Sequence[str],
    run: Callable[[], int],
) -> int:
    """Parses `argv`, program name included, into `values`, and returns the status that `run` does.

    A flags.Error, RuntimeError (XLA's: no such device, no memory) or MemoryError is one line on
    stderr and 2, and so is a standard output that can't be written. One that its reader has closed
    is no error: the program ends with the status of those that SIGPIPE ends.
    """
    try:
        _, *extra = values(argv)
        if extra:
            raise flags.Error(f"unexpected argument {extra[0]!r}: all arguments are --flag=value")
        if values.help:
            print(f"{doc}{values.get_help(include_special_flags=False)}")
            status = 0
        else:
            status = run()
        print(end="", flush=True)  # at exit it would be too late for an error
        return status
    except (flags.Error, RuntimeError, MemoryError) as error:
        message = str(error)
    except OSError as error:
        if error.filename is not None or error.errno not in _OF_WRITING:
            raise
        # Else what is left of standard output would be tried again at exit.
        with contextlib.suppress(io.UnsupportedOperation):  # it is not a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        message = f"standard output: {reason(error)}"
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def device() -> Any:
    """The one that JAX computes on by default. That there is none is an error that `main` tells."""
    try:
        return jax.devices()[0]
    except AssertionError as error:  # JAX's, which leaves out a platform that has no devices
        platforms = jax.config.jax_platforms  # pyright: ignore
        raise flags.Error(f"JAX_PLATFORMS={platforms}: no such device") from error


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
    if path is None or _is_stream(path):
        return
    directory = os.path.dirname(os.path.realpath(path))
    writable = os.path.isdir(directory) and os.access(directory, os.W_OK)
    if not writable or os.path.isdir(path):
        raise flags.Error(f"--{flag}={path}: not a file in a directory that can be written")


def save(flag: str, path: str, write: Callable[[BinaryIO], object]) -> None:
    """Writes the whole file that --`flag` names or, on any error, nothing.

    A link stays one to the file, and the file keeps its mode.
    """
    # NumPy writes to memory as to any stream; of a file that can't take it all it hides the reason.
    content = io.BytesIO()
    try:
        write(content)
        if _is_stream(path):
            with open(path, "wb") as file:
                file.write(content.getbuffer())
        else:
            _replace(os.path.realpath(path), content.getbuffer())
    except OSError as error:
        raise flags.Error(f"--{flag}={path}: {reason(error)}") from error


def _is_stream(path: str) -> bool:
    """Is it a device or a pipe? It is written to, where a file is replaced."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _replace(path: str, content: memoryview) -> None:
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    with _signals_as_exceptions():
        try:
            with open(temporary, "xb") as file:
                file.write(content)
            if os.path.exists(path):
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """What would end the process at once ends it by SystemExit, with the same status in a shell."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    signals = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) == signal.SIG_DFL]
    for number in signals:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


def reason(error: Exception) -> object:
    """What to say of `error`: of the system's, the text without its number and the file again."""
    return getattr(error, "strerror", None) or error
