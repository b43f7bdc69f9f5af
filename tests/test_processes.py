"""`jax.distributed` with two real processes: a sharded network trains as it does in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).parent / "two_processes.py"


def start(processes, index, port):
    devices = f"--xla_force_host_platform_device_count={8 // processes}"
    return subprocess.Popen(
        [sys.executable, PROGRAM, str(processes), str(index), str(port)],
        env=os.environ | {"XLA_FLAGS": devices},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])  # after what the collectives log


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
