"""Runs jobs in processes that last. A compiler may abort one: that is the failure of its job alone.

for result, error in run(function, jobs, environment, timeout): ...
"""

import concurrent.futures
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def run(
    function: Callable,
    jobs: Sequence[tuple],
    environment: Mapping[str, str],
    timeout: float,
) -> Iterator[tuple[Any, str | None]]:
    """function(*job) or what went wrong, for each of the jobs and in their order.

    There is a process for each core, and a new one for one that ended or took `timeout` seconds.
    """
    count = os.cpu_count() or 1
    workers = [_Worker(environment) for _ in range(count)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def one(job):
        worker = idle.get()
        try:
            return worker.run(function, job, timeout)
        finally:
            idle.put(worker)

    try:
        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            yield from threads.map(one, jobs)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    def __init__(self, environment: Mapping[str, str]):
        # A program run by its folder has that in its path, not the folder with its package.
        path = {"PYTHONPATH": str(Path(__file__).parents[1])}
        self._environment = {**os.environ, **path, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, function: Callable, job: tuple, timeout: float) -> tuple[Any, str | None]:
        process: Any = self._process or self._start()
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            pickle.dump((function, job), process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            late, status = timer.finished.is_set(), process.wait()
            self._errors.seek(0)
            lines = [line for line in self._errors.read().splitlines() if line.strip()]
            self.stop()
            ended = f"it took more than {timeout} s" if late else f"exit status {status}"
            return None, f"{ended}: {' '.join(lines[-2:])[-500:]}"
        finally:
            timer.cancel()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from figures import workers; workers._serve()"],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        return self._process


def _serve() -> None:
    """What a process does until it is stopped."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for what compilers print
    while True:
        function, job = pickle.load(sys.stdin.buffer)
        try:
            answer = function(*job), None
        except Exception as error:  # whatever compilers raise
            answer = None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        pickle.dump(answer, results)
        results.flush()
