"""Runs the native kernel of this checkout under sanitizers, and fails with what they report.

python tests/sanitizers [FOLDER]

It takes g++, and jax for the headers of its FFI. The vector code is compiled for the best
instruction set of this machine, and without optimization, with which it takes three times as long.
What is compiled is kept in the folder, and what is there is not compiled again.
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
    *("g++", "-std=gnu++20", "-O0", "-g1", "-march=native", "-pthread", "-Wall", "-Wextra"),
    *["-DJAX_DWBP_X86"] * (platform.machine() == "x86_64"),
    *("-isystem", jax.ffi.include_dir()),
)
SOURCES = (HERE / "driver.cc", *sorted(NATIVE.glob("*.cc")))
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


def compile_source(folder: Path, name: str, source: Path) -> Path:
    target = folder / f"{name.split()[0]}_{source.stem}.o"
    if not target.exists():
        run(*COMPILE, *SANITIZERS[name][0], "-c", str(source), "-o", str(target))
    return target


def check(folder: Path, name: str, objects: list[Path]) -> None:
    options, arguments = SANITIZERS[name]
    program = str(folder / name.split()[0])
    run(*COMPILE, *options, *map(str, objects), "-o", program)
    print(f"{name}: {run(program, *arguments)}", end="")


def run(*command: str) -> str:
    done = subprocess.run(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout}")
    return done.stdout


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {
            name: [pool.submit(compile_source, folder, name, source) for source in SOURCES]
            for name in SANITIZERS
        }
        compiled = {name: [each.result() for each in objects[name]] for name in SANITIZERS}
        list(pool.map(lambda name: check(folder, name, compiled[name]), SANITIZERS))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
