"""The snippets of the README, as they are written, one after the other."""

import importlib.util
import re
from pathlib import Path

import jax

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@jax.enable_x64(False)
@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_snippets():
    """Those that need packages that are not here are left out, but the first two run anywhere."""
    names, ran = {}, 0
    for snippet in SNIPPETS:
        packages = re.findall(r"^(?:import|from) (\w+)", snippet, re.MULTILINE)
        if all(importlib.util.find_spec(package) for package in packages):
            exec(snippet, names)
            ran += 1
    assert ran >= 2
    assert names["per_example"].shape == (8, 3, 3, 144, 1)
