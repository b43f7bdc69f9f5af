"""`jax.distributed` with two real processes: a sharded network trains as it does in one."""

import json
import socket
from pathlib import Path

import fresh_process
import numpy as np

PROGRAM = Path(__file__).parent / "two_processes.py"


def start(processes, index, port):
    devices = f"--xla_force_host_platform_device_count={8 // processes}"
    return fresh_process.start(
        *(PROGRAM, str(processes), str(index), str(port)),
        XLA_FLAGS=devices,
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )


def printed(process):
    lines = fresh_process.output(process).splitlines()
    return json.loads(lines[-1])  # after what the collectives log


def test_two_processes_train_as_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [start(2, index, port) for index in range(2)]
    first, second = (printed(process) for process in both)
    alone = printed(start(1, 0, 0))
    assert first == second
    assert set(first["collectives"]) == set(alone["collectives"])
    assert set(first["collectives"]) == {"all-reduce", "collective-permute"}
    assert len(alone["losses"]) == 10 and alone["losses"][-1] < alone["losses"][0] - 0.1
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-5)
