"""Runs the native kernel of this checkout under sanitizers, and fails with what they report.

python tests/sanitizers

It takes g++, and jax for the headers of its FFI. The vector code is compiled for the best
instruction set of this machine, and without optimization, with which it takes three times as long.
"""

import concurrent.futures
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "jax_dwbp/_impl/native"
COMPILE = (
    *("g++", "-std=gnu++17", "-O0", "-g1", "-march=native", "-pthread", "-Wall", "-Wextra"),
    *["-DJAX_DWBP_X86"] * (platform.machine() == "x86_64"),
    *("-isystem", jax.ffi.include_dir()),
    *(str(HERE / "driver.cc"), *map(str, sorted(NATIVE.glob("*.cc")))),
)
# For each its options, and what the driver runs.
SANITIZERS = {
    "AddressSanitizer and UndefinedBehaviorSanitizer": (
        (
            "-fsanitize=address,undefined",
            # Where these fail, so do the address or the processor. They would double the time.
            "-fno-sanitize=null,alignment,object-size,pointer-overflow",
            "-fno-sanitize-recover=all",
            # Calls are compiled faster than what is inlined.
            "--param=asan-instrumentation-with-call-threshold=0",
        ),
        ("small",),
    ),
    # Only where there are several threads can they race.
    "ThreadSanitizer": (("-fsanitize=thread",), ()),
}
# A thread that comes late may not look at the stack of a call that has returned.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=1"}


def check(name: str) -> bool:
    options, arguments = SANITIZERS[name]
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/driver"
        for command in ((*COMPILE, *options, "-o", program), (program, *arguments)):
            done = subprocess.run(
                command,
                env=ENVIRONMENT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            if done.returncode:
                print(f"{name}:\n{done.stdout}")
                return False
    print(f"{name}: {done.stdout}", end="")
    return True


if __name__ == "__main__":
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sys.exit(not all(list(pool.map(check, SANITIZERS))))
