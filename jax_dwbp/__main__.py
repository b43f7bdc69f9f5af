"""TensorFlow's DepthwiseConv2dNativeBackpropInput in JAX: on a photograph, or on files.

  python -m jax_dwbp

runs the op on a photograph of scikit-image (a generated picture without that package), reports
shapes, implementation and times, and checks the result. The exit status is 1 if a check fails.

  python -m jax_dwbp --input_sizes=8,56,56,144 --filter=f.npy --out_backprop=dy.npy \\
      --strides=1,2,2,1 --padding=SAME --output=dx.npy

runs the op on files. Inputs are file.npy, file.npz with one array, or file.npz:name; the output is
.npy or .npz (there named dx). All in one dtype: float16, float32, float64, or bfloat16, which
NumPy's files hold as 2-byte voids. The exit status is 2 if the op can't run; no output is written.

JAX's environment variables apply, as JAX_PLATFORMS=cpu.
"""

import functools
import importlib.metadata
import math
import platform
import re
import statistics
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import jax_dwbp
from jax_dwbp import _command_line
from jax_dwbp._spec import DTYPES

_REPETITIONS = 20


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name included, and returns the exit status."""
    values = _flag_values()
    run = _run_on_picture if len(argv) == 1 else lambda: _run_on_files(values.flag_values_dict())
    return _command_line.main("jax_dwbp", __doc__, values, argv, run)


# ---- The command line.


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(entry) for entry in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ValueError(f"must be comma-separated integers, got {text!r}") from None


def _braced_integers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\{[^{}]*\}", text):
        raise ValueError(f"must be integers in braces, got {text!r}")
    return _integers(text[1:-1])


def _word(text: str) -> str:
    match = re.fullmatch(r"""(["']?)(\w+)\1""", text)
    if match is None:
        raise ValueError(f"must be a word or a quoted string, got {text!r}")
    return match[2]


_FIELDS = {
    "data_format_": _word,
    "dilations_": _braced_integers,
    "explicit_paddings_": _braced_integers,
}
_STRING = flags.ArgumentParser[str]()


class _IntegersParser(flags.ArgumentParser[tuple[int, ...]]):
    def parse(self, argument: str) -> tuple[int, ...]:
        return _integers(argument)


class _AttrsParser(flags.ArgumentParser[dict[str, Any]]):
    """Assignments to the fields of TensorFlow's C++ `Attrs`, to attributes by our names."""

    def parse(self, argument: str) -> dict[str, Any]:
        attributes = {}
        for assignment in filter(None, map(str.strip, argument.split(";"))):
            field, _, text = map(str.strip, assignment.partition("="))
            if field not in _FIELDS:
                raise ValueError(f"no field {field!r}, the fields are {', '.join(_FIELDS)}")
            try:
                value = _FIELDS[field](text)
            except ValueError as error:
                raise ValueError(f"{field} {error}") from None
            if attributes.setdefault(field.removesuffix("_"), value) != value:
                raise ValueError(f"{field} has two different values")
        return attributes


_FLAGS = {
    "input_sizes": (_IntegersParser(), "The shape of the result, as 8,56,56,144."),
    "filter": (_STRING, "The file of the filter, [R, S, C, M]."),
    "out_backprop": (_STRING, "The file of the gradient by the output of the convolution."),
    "strides": (_IntegersParser(), "As 1,2,2,1 in the order of --data_format, or as 2,2."),
    "padding": (_STRING, "SAME, VALID or EXPLICIT."),
    "explicit_paddings": (_IntegersParser(), "For EXPLICIT, as 0,0,1,1,1,1,0,0."),
    "data_format": (_STRING, "NHWC (the default) or NCHW."),
    "dilations": (_IntegersParser(), "Like --strides; 1,1,1,1 by default."),
    "attrs": (
        _AttrsParser(),
        "Fields of TensorFlow's C++ Attrs in place of their flags: "
        '"data_format_ = NHWC; dilations_ = {1, 2, 2, 1}; explicit_paddings_ = {}".',
    ),
    "implementation": (_STRING, "The implementation to run; by default the best."),
    "output": (_STRING, "The file for the result, .npy or .npz."),
}
_REQUIRED = ("input_sizes", "filter", "out_backprop", "strides", "padding", "output")
_ATTRIBUTES = ("explicit_paddings", "data_format", "dilations")


def _flag_values() -> flags.FlagValues:
    """The flags, unset. In a set of their own: absl's global one keeps values from call to call."""
    values = flags.FlagValues()
    for name, (parser, text) in _FLAGS.items():
        flags.DEFINE(parser, name, None, text, values, module_name="flags")
    flags.DEFINE_bool("help", False, "Show this.", values, module_name="flags", short_name="h")
    return values


# ---- The op on files.


def _run_on_files(values: dict[str, Any]) -> int:
    missing = [f"--{name}" for name in _REQUIRED if values[name] is None]
    if missing:
        raise flags.Error(f"missing {', '.join(missing)}: to run on files takes them all")
    output = values["output"]
    if not output.endswith((".npy", ".npz")):
        raise flags.Error(f"--output={output}: must end in .npy or .npz")
    op = functools.partial(
        jax_dwbp.depthwise_conv2d_native_backprop_input,
        values["input_sizes"],
        strides=values["strides"],
        padding=values["padding"],
        implementation=values["implementation"],
        **_attributes(values),
    )
    f, dy = (_load(name, values[name]) for name in ("filter", "out_backprop"))
    _command_line.device()
    try:
        with jax.enable_x64(True):  # float64 files stay float64
            # Without the wait, an allocation that fails makes XLA abort the process in np.asarray.
            dx = np.asarray(jax.block_until_ready(op(f, dy)))
            [selection] = jax_dwbp.implementations(op, f, dy)
    except (TypeError, ValueError) as error:
        raise flags.Error(str(error)) from error
    is_archive = output.endswith(".npz")
    _command_line.save(
        "output", output, lambda file: np.savez(file, dx=dx) if is_archive else np.save(file, dx)
    )
    print(f"{dx.shape} {dx.dtype} by {selection.runs} in {output}")
    return 0


def _attributes(values: dict[str, Any]) -> dict[str, Any]:
    """Those that were given, by their own flag or by --attrs."""
    attributes = dict(values["attrs"] or {})
    for name in _ATTRIBUTES:
        value = values[name]
        if value is not None and attributes.setdefault(name, value) != value:
            raise flags.Error(f"--{name} is {value}, but {attributes[name]} in --attrs")
    return attributes


def _load(name: str, location: str) -> np.ndarray:
    """The array at `location`, the value of the flag `name`, in one of the dtypes of the op."""
    try:
        array = _read(location)
    except Exception as error:  # a damaged file can raise anything, zlib.error and EOFError too
        message = f"--{name}={location}: can't read an array: {_command_line.reason(error)}"
        raise flags.Error(message) from error
    if array.dtype == np.dtype("V2"):  # as np.save writes it
        return array.view(jnp.bfloat16)
    if array.dtype.name not in DTYPES:
        raise flags.Error(f"--{name}={location}: must hold {', '.join(DTYPES)}, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="))


def _read(location: str) -> np.ndarray:
    if location.endswith(".npy"):
        with open(location, "rb") as file:
            return np.lib.format.read_array(file)
    match = re.fullmatch(r"(.+\.npz)(?::(.*))?", location)
    if match is None:
        raise ValueError("not file.npy, file.npz or file.npz:name")
    path, name = match.groups()
    with zipfile.ZipFile(path) as archive:
        names = [e.removesuffix(".npy") for e in archive.namelist() if e.endswith(".npy")]
        if name is None and len(names) == 1:
            [name] = names
        if name not in names:
            raise ValueError(f"the file has {names}, name one as file.npz:name")
        with archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file)


# ---- The op on a picture, with its checks.


class _Check(NamedTuple):
    """That two numbers, computed in two ways, are equal to the rounding of float32."""

    identity: str
    left: float
    right: float
    allowed: float  # the absolute difference

    def passes(self) -> bool:
        return abs(self.left - self.right) <= self.allowed

    def __str__(self) -> str:
        scale = max(abs(self.left), abs(self.right)) or 1.0
        return (
            f"{self.identity:<40} {self.left:>16.8f} {self.right:>16.8f} "
            f"{abs(self.left - self.right) / scale:>12.1e} {self.allowed / scale:>9.1e}  "
            f"{'pass' if self.passes() else 'FAIL'}"
        )


def _run_on_picture() -> int:
    device = _command_line.device()
    source, picture = _picture()
    x = jnp.asarray(picture[None], jnp.float32) / 255
    f = _filter_bank(x.shape[-1])
    # The checks are on float32, and accelerators compute in less by default.
    attributes = {"strides": (1, 2, 2, 1), "padding": "SAME", "precision": "highest"}
    forward = functools.partial(jax_dwbp.depthwise_conv2d_native, filter=f, **attributes)
    op = functools.partial(jax_dwbp.depthwise_conv2d_native_backprop_input, x.shape, **attributes)
    y = forward(x)
    dy = y - forward(x[:, :, ::-1])
    dx, first = _timed(op, f, dy)
    later = statistics.median(_timed(op, f, dy)[1] for _ in range(_REPETITIONS))
    [selection] = jax_dwbp.implementations(op, f, dy)

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy")]
    for label, value in (
        ("jax_dwbp", jax_dwbp.__version__),
        ("versions", f"{', '.join(versions)}, Python {platform.python_version()}"),
        ("device", f"{device.platform}, {device.device_kind}"),
        ("picture", source),
        ("x", f"{_described(x)}  the picture, from 0 to 1"),
        ("f", f"{_described(f)}  a Gaussian and its horizontal derivative, for each color"),
        ("y = F(x)", f"{_described(y)}  the convolution of x by f"),
        ("dy", f"{_described(dy)}  F(x) - F(x mirrored)"),
        ("dx", f"{_described(dx)}  the result, the gradient of <F(x), dy> by x"),
        *attributes.items(),
        ("implementation", selection.runs),
        ("first call", f"{first * 1e3:.2f} ms, with compilation"),
        ("later calls", f"{later * 1e3:.2f} ms, the median of {_REPETITIONS}"),
    ):
        print(f"{label:<16}{value}")

    checks = _checks(op, x, f, y, dy, dx)
    print(f"\n{'check':<40} {'left':>16} {'right':>16} {'rel. diff.':>12} {'allowed':>9}")
    for check in checks:
        print(check)
    return 0 if all(check.passes() for check in checks) else 1


def _picture() -> tuple[str, np.ndarray]:
    """What it is, and the picture in uint8."""
    try:
        from skimage import data
    except ImportError:
        row, column, color = np.ogrid[:300, :451, :3]
        rings = np.cos((row**2 + column**2) / 400 + color)
        source = "generated rings, as scikit-image is not installed: pip install jax_dwbp[main]"
        return source, (127.5 + 127.5 * rings).astype(np.uint8)
    version = importlib.metadata.version("scikit-image")
    return f"photograph of Chelsea the cat, from scikit-image {version}", data.chelsea()


def _filter_bank(channels: int) -> jax.Array:
    """A Gaussian and its derivative along the rows, for each channel."""
    taps = np.arange(-2, 3)
    gaussian = np.exp(-(taps**2) / 2)
    gaussian /= gaussian.sum()
    bank = np.stack([np.outer(gaussian, gaussian), np.outer(gaussian, taps * gaussian)], axis=-1)
    return jnp.asarray(np.repeat(bank[:, :, None], channels, axis=2), jnp.float32)


def _timed(op: Callable, *args: jax.Array) -> tuple[jax.Array, float]:
    """The result and the seconds it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(op(*args))
    return result, time.perf_counter() - start


def _described(x: jax.Array) -> str:
    return f"{f'{x.dtype}{list(x.shape)}':<24}"


def _checks(
    op: Callable, x: jax.Array, f: jax.Array, y: jax.Array, dy: jax.Array, dx: jax.Array
) -> tuple[_Check, ...]:
    r, s, _, m = f.shape
    n, p, q, _ = y.shape
    return (
        _Check(
            "<F(x), dy> = <x, dx>",
            _inner(y, dy),
            _inner(x, dx),
            _rounding(r * s * m) * _inner(x, op(abs(f), abs(dy))),
        ),
        _derivative_check("filter", op, f, dy, x, n * p * q),
        _derivative_check("out_backprop", lambda dy, f: op(f, dy), dy, f, x, r * s * m),
    )


def _derivative_check(
    name: str, op: Callable, at: jax.Array, other: jax.Array, v: jax.Array, terms: int
) -> _Check:
    """The central difference of <op(at, other), v> by `at`, and the same from its gradient.

    The op is linear in `at`, so that any step will do, and one of the size of `at` loses nothing to
    rounding. It is positive, as v is: what is compared must not cancel.
    """
    step = jnp.asarray(np.random.default_rng(0).uniform(size=at.shape), jnp.float32)
    gradient = jax.grad(lambda at: jnp.vdot(op(at, other), v))(at)
    return _Check(
        f"finite difference = grad by {name}",
        (_inner(op(at + step, other), v) - _inner(op(at - step, other), v)) / 2,
        _inner(step, gradient),
        _rounding(terms) * _inner(op(abs(at) + step, abs(other)), v),
    )


def _rounding(terms: int) -> float:
    """What the rounding of a float32 sum may do, as a multiple of the sum of the absolute terms.

    It grows like a random walk over the terms.
    """
    return float(jnp.finfo(jnp.float32).eps) * math.sqrt(terms)


def _inner(a: jax.Array, b: jax.Array) -> float:
    """In float64, so that all the rounding is that of the op."""
    return float(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))


def _leave_flags_to_main(argv: list[str]) -> list[str]:
    # absl would log INFO, where JAX tells about each backend that the machine doesn't have.
    flags.FLAGS([argv[0], "--verbosity=-1"])
    return argv


if __name__ == "__main__":
    app.run(main, flags_parser=_leave_flags_to_main)
