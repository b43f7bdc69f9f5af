"""A call goes down the modules of the package, and imports go the same way."""

import ast
import importlib.resources
import re
import shutil
from pathlib import Path

import pytest

import jax_dwbp
from jax_dwbp import _version

PACKAGE = Path(jax_dwbp.__file__).parent
# A module imports from the rows below its own, and those of the first row from each other too.
LAYERS = (
    (
        *("__init__", "__main__", "tf2jax", "_api", "_command_line"),
        *("_in_place_of_lax", "_conv_general_dilated", "_tensorflow_neighbours"),
        *("bench.__init__", "bench.__main__", "bench.command", "bench.tables", "bench.timing"),
        *("bench.contestants", "bench.peers", "bench.layers"),
    ),
    ("_depthwise",),
    ("_rules",),
    ("_partition",),
    ("_select",),
    (
        *("_impl.lax", "_impl.xla_taps", "_impl.fft", "_impl.native_cpu", "_impl.pallas_gpu"),
        "_impl.pallas_tpu.__init__",
    ),
    ("_impl.pallas_tpu.kernels",),
    ("_impl.pallas_tpu.sources",),
    ("_impl.pallas_tpu.plan",),
    ("_impl.depth",),
    ("_impl.taps",),
    ("_impl.__init__",),
    ("_spec", "_compat", "_version"),
)
ROW = {module: row for row, modules in enumerate(LAYERS) for module in modules}


def imported(path):
    """The modules of the package that a file imports, also within functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        root, *parts = name.split(".")
        if root == "jax_dwbp":
            # Of what is imported from a module, the module is what matters.
            while parts and ".".join(parts) not in ROW and f"{'.'.join(parts)}.__init__" not in ROW:
                parts.pop()
            module = ".".join(parts)
            yield module if module in ROW else f"{module}.__init__".lstrip(".")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_go_down(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for name in imported(path):
        assert ROW[name] > ROW[module] or ROW[name] == ROW[module] == 0, (module, name)


def test_the_digest_is_of_all_sources(monkeypatch, tmp_path):
    """By it the compilation cache tells versions apart that divide a program in their own ways."""
    shutil.copytree(PACKAGE, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(importlib.resources, "files", lambda name: tmp_path)
    digests = {_version.sources.__wrapped__()}
    files = list(tmp_path.rglob("*.py"))
    for file in files:
        file.write_text(file.read_text() + "# changed")
        digests.add(_version.sources.__wrapped__())
    assert len(digests) == len(files) + 1


def test_what_jax_does_not_promise_is_in_one_place():
    """But for what registers the rules of a primitive."""
    words = r"\b(jax\.(_src|interpreters|extend|core)|custom_partitioning)\b"
    found = {path.name for path in PACKAGE.rglob("*.py") if re.search(words, path.read_text())}
    assert found == {"_compat.py", "_rules.py", "pallas_gpu.py"}
