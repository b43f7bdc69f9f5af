"""Compiles functions for NVIDIA GPUs that need not be there, to the PTX and SASS of their kernels.

XLA compiles for a device that it is told everything about; jax-cuda13-plugin brings it, without
any driver. ptxas and nvdisasm come from NVIDIA's wheels.
"""

import dataclasses
import functools
import importlib.metadata
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from figures import ptx

_KIB = 1024
# The wheels that are needed, without what they require: that would be gigabytes.
_WHEELS = {
    "jax-cuda13-plugin": "",
    "jax-cuda13-pjrt": "",
    "nvidia-nvvm": "",
    "nvidia-cuda-nvcc": "ptxas",
    "nvidia-cuda-nvdisasm": "nvdisasm",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What NVIDIA publishes of a GPU, but for the rate of its L2 cache, which is an assumption."""

    arch: str
    device_kind: str
    multiprocessors: int
    clock: float  # Hz, under load
    memory_rate: float  # bytes/s
    l2_rate: float  # bytes/s
    l2_bytes: int
    fp32_lanes: int  # of a multiprocessor
    shared_kib: int  # of a multiprocessor; a block gets one less
    memory_bytes: float

    # The same for all of them, of a multiprocessor.
    issue_lanes = 128  # a warp a cycle from each of four schedulers
    alu_lanes = 64
    wavefronts = 1  # of 128 bytes from L1 or shared memory
    warps = 64
    blocks = 32
    registers = 65536

    def description(self) -> str:
        """The text form of what XLA wants to know."""
        major, minor, accelerated = re.fullmatch(r"sm_(\d+)(\d)(a?)", self.arch).groups()  # pyright: ignore[reportOptionalMemberAccess]
        feature = "feature_extension: ACCELERATED_FEATURES" if accelerated else ""
        return f"""
gpu_device_info {{
  name: "{self.device_kind}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}{accelerated}"
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  core_count: {self.multiprocessors}
  fpus_per_core: {self.fp32_lanes}
  clock_rate_ghz: {self.clock / 1e9}
  memory_bandwidth: {self.memory_rate:.0f}
  device_memory_size: {self.memory_bytes:.0f}
  l2_cache_size: {self.l2_bytes}
  shared_memory_per_core: {self.shared_kib * _KIB}
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_block_optin: {(self.shared_kib - 1) * _KIB}
  registers_per_core_limit: {self.registers}
  registers_per_block_limit: {self.registers}
  threads_per_core_limit: {self.warps * 32}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
device_description_str: "{self.device_kind}"
"""


TARGETS = {
    target.arch: target
    for target in (
        Target(
            "sm_80", "NVIDIA A100-SXM4-80GB", 108, 1.41e9, 2.04e12, 4e12, 40 << 20, 64, 164, 80e9
        ),
        Target(
            "sm_90a",
            "NVIDIA H100 80GB HBM3",
            132,
            1.755e9,
            3.35e12,
            5.5e12,
            50 << 20,
            128,
            228,
            80e9,
        ),
        Target("sm_100a", "NVIDIA B200", 148, 1.85e9, 8e12, 11e12, 126 << 20, 128, 228, 180e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: ptx.Kernel
    module: str  # the text of the PTX that has it
    grid: tuple[int, int, int]
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
    launches: list[Launch]  # in their order
    temporary_bytes: int
    compile_seconds: float


def missing() -> str | None:
    """What has to be installed first."""
    for wheel, tool in _WHEELS.items():
        try:
            importlib.metadata.distribution(wheel)
            if tool:
                _tool(tool)
        except importlib.metadata.PackageNotFoundError:
            return f"{wheel} is not installed: pip install --no-deps {' '.join(_WHEELS)}"
    return None


def versions() -> dict[str, str]:
    """Of what compiles."""
    return {wheel: importlib.metadata.version(wheel) for wheel in _WHEELS}


def compile_program(
    function: Callable, shapes: Sequence[jax.ShapeDtypeStruct], target: Target
) -> Program:
    """`function` on arrays of these shapes, compiled for one device of `target`."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.arch,
        target_config=target.description(),
        topology="1x1x1",
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    device = AbstractDevice(target.device_kind, target.multiprocessors, "gpu")
    mesh = AbstractMesh((1,), ("_",), (AxisType.Explicit,), abstract_device=device)
    args = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
    with tempfile.TemporaryDirectory() as dump:
        start = _cpu_seconds()
        with use_abstract_mesh(mesh):
            lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
        compiled = lowered.compile(
            {
                "xla_gpu_autotune_level": "0",  # there is nothing to time on
                "xla_dump_to": dump,
                "xla_dump_emitter_re": "ptx",
            }
        )
        seconds = _cpu_seconds() - start
        memory = compiled.memory_analysis()
        temporary_bytes = memory.temp_size_in_bytes if memory else 0
        return Program(_launches(Path(dump)), temporary_bytes, seconds)


def _cpu_seconds() -> float:
    """Of this process and those that it started, on all cores: what else runs here matters less."""
    return sum(os.times()[:4])


def _launches(dump: Path) -> list[Launch]:
    kernels = {}
    for path in dump.glob("*.ptx"):
        text = path.read_text()
        kernels |= {kernel.name: (kernel, text) for kernel in ptx.parse(text)}
    [thunks] = dump.glob("*.thunk_sequence.txt")
    launches = []
    for line in thunks.read_text().splitlines():
        match = re.search(
            r"kCustomKernel.*?\]\s+(\S+) grid: \[(\d+), (\d+), (\d+)\].*shared_memory: (\d+)", line
        )
        if match is None:
            raise RuntimeError(f"XLA runs more than kernels: {line.strip()}")
        name, x, y, z, shared_bytes = match.groups()
        kernel, text = kernels[name]
        launches.append(Launch(kernel, text, (int(x), int(y), int(z)), int(shared_bytes)))
    return launches


@functools.cache
def assemble(module: str, arch: str) -> tuple[str, str]:
    """The SASS of a module's kernels, and what ptxas says of their registers and spills."""
    with tempfile.TemporaryDirectory() as directory:
        source, binary = Path(directory, "kernels.ptx"), Path(directory, "kernels.cubin")
        source.write_text(module)
        report = _run(_tool("ptxas"), "-v", f"-arch={arch}", source, "-o", binary).stderr
        return _run(_tool("nvdisasm"), "-c", binary).stdout, report


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
    return done


def _tool(name: str) -> Path:
    [wheel] = (wheel for wheel, tool in _WHEELS.items() if tool == name)
    for file in importlib.metadata.files(wheel) or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise importlib.metadata.PackageNotFoundError(wheel)
