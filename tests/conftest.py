import importlib.util
import os

# Eight devices; and programs that a thread each compiles, as there is a process for each core.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
)
# Else TensorFlow's results depend on the machine; and it must be set before it is imported.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import covering
import jax
import pytest
import quick

from jax_dwbp._impl import interpret

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs, not modules with doctests.
collect_ignore = ["clients", "tensorflow_suite.py", "two_processes.py", "keras_on_jax.py"]
# They compile for what is not here, by compilers of hundreds of megabytes.
for _compiler, _test in (
    ("jax_cuda13_plugin", "test_pallas_gpu_ptx.py"),
    ("libtpu", "test_figures_tpu_compiled.py"),
):
    if importlib.util.find_spec(_compiler) is None:
        collect_ignore.append(_test)


def pytest_addoption(parser):
    parser.addoption(
        "--whole", action="store_true", help="run whole products of parameters, not samples"
    )


def pytest_configure(config):
    covering.whole = config.getoption("--whole")


def pytest_collection_modifyitems(items):
    quick.mark(items)


@pytest.fixture
def unoptimized():
    """For programs that take longer to compile than to run: LLVM does less, XLA does the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def interpreted(unoptimized):
    """A CPU interprets Pallas kernels: large programs."""
    with interpret(True):
        yield


@pytest.fixture
def not_interpreted(interpreted):
    with interpret(False):
        yield
