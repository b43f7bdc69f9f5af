"""The version of the package, from its metadata, and what tells its states apart."""

import functools
import hashlib
import importlib.metadata
import importlib.resources
from collections.abc import Iterator
from importlib.resources.abc import Traversable

try:
    __version__ = importlib.metadata.version("jax_dwbp")
except importlib.metadata.PackageNotFoundError:  # a copy in another project
    __version__ = "unknown"


@functools.cache
def sources() -> str:
    """A digest of the package's Python, which a version that is still worked on is not."""
    digest = hashlib.sha256()
    for file in _python(importlib.resources.files("jax_dwbp")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _python(folder: Traversable) -> Iterator[Traversable]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _python(entry)
        elif entry.name.endswith(".py"):
            yield entry
