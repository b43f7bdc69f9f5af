"""What only another process can tell: artifacts and caches that outlive one, forks, environments.

The functions before the tests are what these processes run, so each imports what it uses.
"""

import dataclasses
import functools
import pathlib

import fresh_process
import jax
import numpy as np
import pytest
from cases import DEFAULT_ON_CPU, HAS_NATIVE, IMPLEMENTATIONS, KERNELS, OPS, Case
from jax import export

CASE = Case("fresh", (2, 7, 8, 3), (3, 3, 3, 2), (2, 1))
# One program to XLA, but for how it is divided.
_SHARDED = Case("sharded", (4, 8, 6, 3), (3, 3, 3, 1))
SHARDED = [
    (_SHARDED, None),
    (dataclasses.replace(_SHARDED, dilations=(2, 2)), None),
    (dataclasses.replace(_SHARDED, padding=((0, 2), (1, 1))), None),
    (dataclasses.replace(_SHARDED, padding=((2, 0), (1, 1))), None),
    *((_SHARDED, name) for name in IMPLEMENTATIONS),
]


def three_ops(x, f, dy, implementation=None):
    """The results of all three, as the first and its two gradients."""

    def forward(x, f):
        return CASE.run("forward", x, f, implementation=implementation)

    y, gradient = jax.vjp(forward, x, f)
    return y, *gradient(dy)


def call_exported(directory):
    import pathlib
    import sys

    import numpy as np
    from jax import export

    path = pathlib.Path(directory)
    exported = export.deserialize(bytearray((path / "exported").read_bytes()))
    with np.load(path / "operands.npz") as operands:
        np.savez(path / "results.npz", *exported.call(*operands.values()))
    assert "jax_dwbp" not in sys.modules


def call_exported_by_name(directory):
    """With the package imported and nothing of it called."""
    import pathlib

    import numpy as np
    from jax import export

    import jax_dwbp

    path = pathlib.Path(directory)
    exported = export.deserialize(bytearray((path / "exported").read_bytes()))
    with np.load(path / "operands.npz") as operands:
        np.savez(path / "results.npz", *exported.call(*operands.values()))
    assert jax_dwbp.__version__


def compile_and_run(directory, implementations):
    """Prints how often the compilation cache had the program, and saves its results."""
    import jax
    import numpy as np
    from test_fresh_process import three_ops

    def run(*operands):
        return [x for name in implementations for x in three_ops(*operands, implementation=name)]

    with np.load(f"{directory}/operands.npz") as operands:
        arguments = [*operands.values()]
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    program = jax.jit(run).lower(*arguments).compile()
    print(events.count("/jax/compilation_cache/cache_hits"))
    np.savez(f"{directory}/results.npz", *program(*arguments))


def compile_and_run_sharded(directory):
    """Prints how often the cache had one of the `SHARDED` programs, and saves their results."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    from test_fresh_process import SHARDED

    mesh = jax.make_mesh((2, 2), ("n", "h"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    shardings = [NamedSharding(mesh, spec) for spec in (P("n", "h"), P())]
    events, results = [], []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    for case, name in SHARDED:
        operands = SHARDED[0][0].operands("forward")
        program = jax.jit(
            lambda x, f, case=case, name=name: case.run("forward", x, f, implementation=name),
            in_shardings=shardings,
        )
        results.append(program(*operands))
    print(events.count("/jax/compilation_cache/cache_hits"))
    np.savez(f"{directory}/results.npz", *results)


def fork_and_run(directory, environments):
    """Forks a process for each environment, which saves a result and prints who can compute it."""
    import os

    import jax
    import numpy as np

    import jax_dwbp

    jax.config.update("jax_num_cpu_devices", 3)  # an error once JAX has started its devices
    with np.load(f"{directory}/operands.npz") as operands:
        x, f, _ = operands.values()
    for name, environment in environments.items():
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0, name
            continue
        os.environ.update(environment)
        arguments = x, f, (1, 2, 1, 1), "SAME"
        np.save(f"{directory}/{name}.npy", jax_dwbp.depthwise_conv2d_native(*arguments))
        [found] = jax_dwbp.implementations(jax_dwbp.depthwise_conv2d_native, *arguments)
        can = sorted(name for name, reason in found.reasons.items() if reason is None)
        print(name, jax.device_count(), found.runs, *can, flush=True)
        os._exit(0)


@pytest.fixture
def operands(tmp_path):
    x, f = CASE.operands("forward")
    _, dy = CASE.operands("filter_grad")
    np.savez(tmp_path / "operands.npz", x, f, dy)
    return x, f, dy


def check(path, operands):
    """The results of `three_ops`, once or more."""
    x, f, dy = operands
    of = {"forward": (x, f), "input_grad": (f, dy), "filter_grad": (x, dy)}
    with np.load(path / "results.npz") as results:
        results = [*results.values()]
    assert results and len(results) % len(OPS) == 0
    for i, got in enumerate(results):
        op = OPS[i % len(OPS)]
        CASE.check(op, got, CASE.expected(op, *of[op]), "float32")


def test_artifacts_need_no_package(tmp_path, operands):
    exported = export.export(jax.jit(three_ops))(*operands)
    (tmp_path / "exported").write_bytes(exported.serialize())
    fresh_process.call(call_exported, str(tmp_path))
    check(tmp_path, operands)


@pytest.mark.skipif(not HAS_NATIVE, reason="it was not compiled")
def test_artifacts_of_the_native_kernel(tmp_path, operands):
    """By name it is exported, for where the package is imported."""
    run = functools.partial(three_ops, implementation="native_cpu")
    check_of_calls = export.DisabledSafetyCheck.custom_call("jax_dwbp_depthwise_conv2d")
    exported = export.export(jax.jit(run), disabled_checks=[check_of_calls])(*operands)
    (tmp_path / "exported").write_bytes(exported.serialize())
    fresh_process.call(call_exported_by_name, str(tmp_path))
    check(tmp_path, operands)


def test_compilation_cache(tmp_path, operands):
    """One process fills it and the next one uses it."""
    for hits in ("0\n", "1\n"):
        found = fresh_process.call(
            *(compile_and_run, str(tmp_path), IMPLEMENTATIONS),
            JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )
        assert found == hits
        check(tmp_path, operands)
        (tmp_path / "results.npz").unlink()


@pytest.mark.parametrize("flag", ("0", "1"))
def test_compilation_cache_of_sharded_programs(tmp_path, flag):
    """The next process finds those that differ in nothing but how they are divided, each its own.

    The flag is JAX's, and takes the rules of the partition out of what the cache looks at.
    """
    for hits in (0, len(SHARDED)):
        found = fresh_process.call(
            *(compile_and_run_sharded, str(tmp_path)),
            JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY=flag,
        )
        assert int(found) == hits
        with np.load(tmp_path / "results.npz") as results:
            for (case, _), got in zip(SHARDED, results.values(), strict=True):
                x, f = SHARDED[0][0].operands("forward")
                case.check("forward", got, case.expected("forward", x, f), "float32")


def test_forks_and_environments(tmp_path, operands):
    """Import starts no devices, and a fork may have an instruction set of its own."""
    results = {}
    for interpreted, environments in (
        ("", {"plain": {}, "baseline": {"JAX_DWBP_MAX_ISA": "baseline"}}),
        ("1", {"interpreted": {}}),
    ):
        out = fresh_process.call(
            *(fork_and_run, str(tmp_path), environments),
            XLA_FLAGS="",
            OPENBLAS_NUM_THREADS="1",  # Python warns of threads
            JAX_DWBP_INTERPRET=interpreted,
        )
        able = ("fft", *IMPLEMENTATIONS, *(KERNELS if interpreted else ()))
        assert out.splitlines() == [
            " ".join((name, "3", DEFAULT_ON_CPU, *sorted(able))) for name in environments
        ]
        results |= {name: np.load(tmp_path / f"{name}.npy") for name in environments}
    x, f, _ = operands
    for result in results.values():
        CASE.check("forward", result, CASE.expected("forward", x, f), "float32")
    np.testing.assert_array_equal(results["plain"], results["interpreted"])
    # The baseline of x86 rounds each product.
    cpu = pathlib.Path("/proc/cpuinfo")
    if HAS_NATIVE and cpu.exists() and " fma " in cpu.read_text():
        assert (results["plain"] != results["baseline"]).any()
