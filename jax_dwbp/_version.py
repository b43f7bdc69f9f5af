"""The version of the package, from its metadata, and what tells its states apart."""

import functools
import hashlib
import importlib.metadata
import importlib.resources

try:
    __version__ = importlib.metadata.version("jax_dwbp")
except importlib.metadata.PackageNotFoundError:  # a copy in another project
    __version__ = "unknown"


@functools.cache
def sources() -> str:
    """A digest of the package's Python, which a version that is still worked on is not."""
    digest = hashlib.sha256()
    package = importlib.resources.files("jax_dwbp")
    for folder in (package, package / "_impl"):
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                digest.update(file.read_bytes())
    return digest.hexdigest()
