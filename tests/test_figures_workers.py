"""The processes of the figures: what one of their jobs can do to the others, nothing."""

import os

from figures import workers

ABORT = "(os := __import__('os')).write(2, b'begins\\nfails\\n\\nin a compiler\\n'), os.abort()"
PROCESS = "print('what compilers print') or __import__('os').getpid()"


def run(monkeypatch, *programs, processes=1):
    monkeypatch.setattr(os, "cpu_count", lambda: processes)
    jobs = [(program,) for program in programs]
    return list(workers.run(eval, jobs, {"FIGURES": "set"}, timeout=3))


def test_a_job_that_aborts_fails_alone(monkeypatch):
    before, abort, raising, after, last = run(
        monkeypatch, PROCESS, ABORT, "1 / 0", PROCESS, PROCESS
    )
    assert abort == (None, "exit status -6: fails in a compiler")
    assert raising == (None, "ZeroDivisionError: division by zero")
    assert before[1] == after[1] == last[1] is None
    assert before[0] != after[0] == last[0]


def test_a_job_that_takes_too_long_is_stopped(monkeypatch):
    (_, error), last = run(monkeypatch, "__import__('time').sleep(60)", "1 + 1")
    assert error == "it took more than 3 s: " and last == (2, None)


def test_the_results_are_in_order(monkeypatch):
    programs = [f"({i}, __import__('os').environ['FIGURES'])" for i in range(20)]
    results = run(monkeypatch, *programs, processes=2)
    assert results == [((i, "set"), None) for i in range(20)]
