"""The version of the package, from its metadata."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("jax_dwbp")
except importlib.metadata.PackageNotFoundError:  # a copy in another project
    __version__ = "unknown"
