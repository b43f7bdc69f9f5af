"""`python -m jax_dwbp.bench`: its tables and files, its checks of results, and its errors."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

import fresh_process
import jax
import numpy as np
import pytest
from cases import DEFAULT_ON_CPU, DTYPES, IMPLEMENTATIONS

from jax_dwbp import _select, bench
from jax_dwbp.bench import command, contestants, layers, peers, tables, timing

GROUPS = dict(layers.GROUPS)
ALIKE = ((1, 1), (1, 1))
TINY = (
    layers.Layer("plain", (5, 6), 3, 1, (3, 3), (1, 1), ALIKE),
    layers.Layer("strided", (8, 7), 2, 1, (5, 5), (2, 2), ((2, 2), (2, 2))),
    layers.Layer("multiplied", (5, 6), 3, 2, (3, 3), (1, 1), ALIKE),
    layers.Layer("causal", (1, 12), 3, 1, (1, 4), (1, 1), ((0, 0), (3, 0))),
)
PLANE = layers.Layer("plane", (5, 6), 1, 1, (3, 3), (1, 1), ALIKE, batch=2)
FIRST = layers.Layer("first", (8, 7), 2, 2, (5, 5), (2, 2), ((2, 2), (2, 2)), 1, data_format="NCHW")
HALVES = layers.Layer("halves", (5, 6), 3, 1, (3, 3), (1, 1), ALIKE, 2, ("bfloat16", "float16"))
DOUBLE = layers.Layer("double", (5, 6), 1, 1, (3, 3), (1, 1), ALIKE, 1, ("float64",))
MANY = layers.Layer("many", (5, 6), 2, 2, (3, 3), (1, 1), ALIKE, batch=1, problems=3)
VOLUME = layers.Layer("volume", (4, 5, 6), 2, 2, (3, 1, 3), (1, 1, 2), ((1, 1), (0, 0), (1, 1)), 2)
TINY_GROUPS = {
    "networks": TINY,
    "pictures": (PLANE,),
    "nchw": (FIRST,),
    "half": (HALVES,),
    "double": (DOUBLE,),
    "volumes": (VOLUME,),
    "problems": (MANY,),
}
# A skip would be taken for a test that is missing: the tests need no peer but TensorFlow.
PEERS = [name for name, peer in peers.PEERS.items() if not peer.missing]

needs_matplotlib = pytest.mark.skipif(
    not importlib.util.find_spec("matplotlib"), reason="needs matplotlib"
)


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """Layers that cost no time, a rate that costs none, no load, and a directory for files."""
    monkeypatch.chdir(tmp_path)
    for name, group in TINY_GROUPS.items():
        monkeypatch.setitem(layers.GROUPS, name, group)
    monkeypatch.setattr(timing, "fma_rate", lambda: 1e11)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def run(*arguments):
    """The exit status, with one call of each contestant and no peers unless told otherwise."""
    return bench.main(["bench", "--peers=", "--blocks=1", "--block_seconds=0", *arguments])


def figures():
    return json.loads(Path("speed.json").read_text())


def test_layers():
    every = sum(GROUPS.values(), ())
    assert len({layer.name for layer in every}) == len(every)
    for layer in every:
        task = layers.Task(layer, "forward", 1, "float32")
        sizes = zip(layer.sizes, layer.strides, strict=True)
        assert task.output == tuple(-(-size // stride) for size, stride in sizes)
        assert all(low >= high for low, high in layer.padding)
    [strided] = [layer for layer in every if layer.name == "efficientnet-b0 56x56x144 k5 s2"]
    assert strided == layers.Layer(strided.name, (56, 56), 144, 1, (5, 5), (2, 2), ((2, 2), (2, 2)))


def test_figures(capsys):
    ops, names = ("filter_grad", "step"), ("plain", "causal")
    assert run("--batch=1,2", "--ops=filter_grad,step", "--filter=n$|sal", "--json=speed.json") == 0
    found = figures()
    assert found["meta"]["mismatches"] == []
    assert found["meta"]["versions"]["jax"] == jax.__version__
    contenders = ("default", *IMPLEMENTATIONS, "copy")
    assert sorted((r["op"], r["batch"], r["layer"], r["contestant"]) for r in found["rows"]) == (
        sorted(itertools.product(ops, (1, 2), names, contenders))
    )
    for row in found["rows"]:
        assert row["dtype"] == "float32"
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert row["calls"] >= 1
        assert row["compile_seconds"] > 0
        assert row["temp_bytes"] >= 0
        if row["contestant"] == "default":
            assert row["runs"] == [DEFAULT_ON_CPU] * (3 if row["op"] == "step" else 1)
        # 5x6x3 read and written, 3x3x3 read; 5x6x3 sums of 3x3.
        if (row["op"], row["layer"], row["batch"]) == ("filter_grad", "plain", 1):
            assert (row["bytes"], row["multiply_adds"]) == (4 * (90 + 90 + 27), 90 * 9)

    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 8
    assert "\n### step, batch 2, in milliseconds\n" in out
    tables = [line.split(" | ") for line in out.splitlines() if line.startswith("| plain ")]
    assert [len(row) for row in tables] == [len(IMPLEMENTATIONS) + 6] * 4 + [
        len(IMPLEMENTATIONS) + 5
    ] * 4
    assert (
        len(re.findall(r"\nlax / default: [\d.]+, the geometric mean of 2; the least ", out)) == 4
    )
    assert "best peer / default: " not in out


def test_first_implementation_is_the_one_of_the_ratios(capsys):
    """Each is timed once, however often it is named."""
    assert run("--filter=^(?!strided)", "--ops=step", "--implementations=lax,default,lax") == 0
    out = capsys.readouterr().out
    assert "| layer | lax | default | copy | best peer / lax | lax / copy | lax, share of" in out
    assert "strided" not in out
    assert "geometric mean" not in out


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    assert run("--filter=plain", "--ops=step", f"--dtype={dtype}", "--json=speed.json") == 0
    assert {row["dtype"] for row in figures()["rows"]} == {dtype}


def test_groups(capsys):
    """A layer has its batch size, dtypes, layout and problems, and a table tells the first two."""
    groups = ("nchw", "half", "double", "volumes", "problems")
    arguments = (f"--groups={','.join(groups)}", "--ops=forward", "--json=speed.json")
    assert run("--implementations=lax", *arguments) == 0
    rows = [row for row in figures()["rows"] if row["contestant"] == "lax"]
    keys = ("layer", "batch", "dtype", "bytes")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        # x, f and y: 8x7x2, 5x5x2x2 and 4x4x4, and so on.
        ("first", 1, "float32", 4 * (112 + 100 + 64)),
        ("halves", 2, "bfloat16", 2 * (180 + 27 + 180)),
        ("halves", 2, "float16", 2 * (180 + 27 + 180)),
        ("double", 1, "float64", 8 * (30 + 9 + 30)),
        ("volume", 2, "float32", 4 * (2 * 240 + 36 + 2 * 240)),
        ("many", 1, "float32", 3 * 4 * (60 + 36 + 120)),
    ]
    out = capsys.readouterr().out
    titles = re.findall("^### (.*), in milliseconds$", out, re.MULTILINE)
    assert titles == [f"{group}, forward" for group in groups]
    for label in ("first, batch 1", "halves, batch 2, bfloat16", "double, batch 1, float64"):
        assert out.count(f"\n| {label} | ") == 2  # of times, and of compilation


def test_own_settings_are_replaced():
    """Once for all dtypes that a layer has."""
    arguments = ("--groups=half,pictures", "--ops=forward", "--batch=3", "--dtype=float64")
    assert run("--implementations=lax", "--json=speed.json", *arguments) == 0
    rows = [(r["layer"], r["batch"], r["dtype"]) for r in figures()["rows"] if "runs" in r]
    assert rows == [("halves", 3, "float64"), ("plane", 3, "float64")]


def test_folded():
    """Channels are those of all problems, in NHWC."""
    layer = dataclasses.replace(FIRST, problems=3, batch=2)
    task = layers.Task(layer, "step", 2, "float32")
    x, f, dy = operands = task.operands()
    assert [operand.shape for operand in operands] == [
        *((3, 2, 2, 8, 7), (3, 5, 5, 2, 2), (3, 2, 4, 4, 4)),
    ]
    folded_x, folded_f, folded_dy = task.folded_operands(operands)
    for problem in range(3):
        for c in range(2):
            np.testing.assert_array_equal(folded_x[..., 2 * problem + c], x[problem, :, c])
            np.testing.assert_array_equal(folded_f[:, :, 2 * problem + c], f[problem, :, :, c])
        for c in range(4):
            np.testing.assert_array_equal(folded_dy[..., 4 * problem + c], dy[problem, :, c])
    for result, expected in zip(
        task.folded_results([dy, x, f]), (folded_dy, folded_x, folded_f), strict=True
    ):
        np.testing.assert_array_equal(result, expected)


# ---- Peers.


def computed(peer, groups, ops):
    """The names of the layers, by op, that a peer does not lack."""
    return [
        (op, layer.name)
        for group in groups
        for op in ops
        for layer in layers.GROUPS[group]
        if not peers.PEERS[peer].lacks(layers.Task(layer, op, 2, layer.dtypes[0]))
    ]


@pytest.mark.parametrize("peer", PEERS)
def test_peers(peer, capsys):
    """That they compute the same, which the benchmark checks."""
    arguments = (f"--peers={peer}", "--implementations=lax", "--batch=2", "--json=speed.json")
    assert run(*arguments) == 0
    timed = [(row["op"], row["layer"]) for row in figures()["rows"] if row["contestant"] == peer]
    assert timed == computed(peer, ["networks"], layers.OPS)
    assert capsys.readouterr().out.count("\nbest peer / lax: ") == len({op for op, _ in timed})


@pytest.mark.parametrize("peer", PEERS)
def test_peers_in_other_groups(peer):
    groups, ops = ["pictures", "nchw", "double", "problems"], ["input_grad", "filter_grad"]
    arguments = (f"--groups={','.join(groups)}", f"--ops={','.join(ops)}", "--json=speed.json")
    assert run(f"--peers={peer}", "--implementations=lax", *arguments) == 0
    timed = [(row["op"], row["layer"]) for row in figures()["rows"] if row["contestant"] == peer]
    assert timed == computed(peer, groups, ops)


@pytest.mark.parametrize(
    "options, layer, reason",
    (
        ({}, FIRST, None),
        ({"ops": ("step",)}, PLANE, "it computes step, not forward"),
        ({"dtypes": ("float64", "float16")}, PLANE, "it computes float64, float16, not float32"),
        ({"data_formats": ("NHWC",)}, FIRST, "it computes NHWC, not NCHW"),
        ({"planes": True}, PLANE, None),
        ({"planes": True}, TINY[0], "it filters one channel to a result of the same size"),
        (
            {"planes": True},
            dataclasses.replace(PLANE, padding=((0, 0), (0, 0))),
            "it filters one channel to a result of the same size",
        ),
    ),
)
def test_what_a_peer_lacks(options, layer, reason):
    task = layers.Task(layer, "forward", 2, "float32")
    assert peers.Peer((), contestants.compiled, **options).lacks(task) == reason


def test_no_peers_on_accelerators(capsys, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "peer", peers.Peer(("json",), contestants.compiled))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert command._peers(["peer"]) == []
    assert capsys.readouterr().err == "without peer: they take part on a CPU\n"


def test_peer_that_has_no_kernel(capsys, monkeypatch):
    """The others are timed without it."""

    def no_kernel(*args):
        raise RuntimeError("no\n kernel")

    monkeypatch.setitem(peers.PEERS, "peer", peers.Peer(("json",), no_kernel))
    assert run("--peers=peer", "--implementations=lax", "--filter=plain", "--ops=forward") == 0
    out, err = capsys.readouterr()
    assert err.endswith("\n  without peer: no kernel\n")
    assert "| layer | lax | copy |" in out


@pytest.mark.parametrize("dtype, status", (("bfloat16", 0), ("float32", 1)))
def test_peer_that_rounds_its_sums(dtype, status, capsys, monkeypatch):
    """In half types it is left out, in others it is wrong."""

    def rounding(task, x, f, dy):
        zeros = np.zeros_like(np.asarray(dy))
        return contestants.Contestant("peer", lambda: None, lambda _: [zeros])

    monkeypatch.setitem(peers.PEERS, "peer", peers.Peer(("json",), rounding))
    arguments = ("--filter=plain", "--ops=forward", f"--dtype={dtype}", "--json=speed.json")
    assert run("--peers=peer", "--implementations=lax", *arguments) == status
    timed = [row["contestant"] for row in figures()["rows"]]
    assert timed == ([] if status else ["lax", "copy"])
    assert "peer - lax is " in capsys.readouterr().err


def test_implementation_that_can_not_run(capsys, monkeypatch):
    wide = layers.Layer("wide", (1, 80), 2, 1, (2, 64), (1, 1), ((1, 0), (63, 0)))
    monkeypatch.setitem(layers.GROUPS, "networks", (wide,))
    assert run("--ops=forward", "--implementations=xla_taps,lax") == 0
    out, err = capsys.readouterr()
    assert "  without xla_taps: " in err and "at most 63 columns, got 64" in err
    assert re.search(r"\| wide \| - \| [\d.]+ \([^)]*\) \| [^|]+ \| - \| - \| - \|\n", out)


def test_blocks(monkeypatch):
    """A slow contestant is called less often, and every contestant in turn."""
    calls = []

    def peer(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)
            return [np.zeros((2, 5, 6, 3), np.float32)]

        return lambda *args: contestants.Contestant(name, call, list)

    monkeypatch.setattr(layers.Task, "check", lambda *args: None)
    for name, seconds in (("slow", 0.5), ("fast", 0.001)):
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(("json",), peer(name, seconds)))
    task = layers.Task(TINY[0], "forward", 2, "float32")
    rows = timing.measure(task, ["default"], ["slow", "fast"], blocks=9, seconds=0.02)
    timed = {row["contestant"]: row["calls"] for row in rows}
    assert timed["slow"] == 4  # until 2 seconds are spent
    assert timed["fast"] >= 9
    assert calls[:2] == ["slow", "fast"]
    turns = [name for name, last in zip(calls[2:], calls[1:], strict=False) if name != last]
    assert turns == ["slow", "fast"] * 4


MS = 1e-3


@pytest.mark.parametrize(
    "times, turn",
    (
        ([8.1 * MS] * 3 + [1 * MS] * 9, 8 * MS),
        ([15.6 * MS] * 6 + [1 * MS] * 2, 16 * MS),
        ([8.1 * MS] * 3 + [1 * MS] * 10, None),  # too few
        ([32 * MS] * 2 + [1 * MS], None),
        ([8.3 * MS] * 9 + [1 * MS] * 9, None),  # not quite
        ([8 * MS] * 9 + [5 * MS] * 9, None),  # it is slow
        ([8 * MS] * 9, None),
    ),
)
def test_calls_that_wait_for_a_core(times, turn):
    assert timing.stands_at(times) == turn


def test_warning_of_a_core_that_is_held(capsys, monkeypatch):
    times = iter([[4 * MS] * 9, [16 * MS] * 5 + [2 * MS] * 4])  # of lax, and of the copy
    monkeypatch.setattr(timing, "consecutive", lambda call, seconds: next(times))
    monkeypatch.setattr(timing, "_SLOW", -1)  # no warming up
    timing.measure(layers.Task(PLANE, "forward", 1, "float32"), ["lax"], [], 1, 1)
    assert capsys.readouterr().err == (
        "  copy: many calls take 16 ms, and others less than half of that: "
        "something else seems to hold a core\n"
    )


@pytest.mark.parametrize("load, warns", ((2.0, False), (2.1, True)))
def test_warning_of_load(load, warns, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    timing.warn_of_load()
    line = "the load of the last minute is 2.1 on 4 cores: something else seems to run, "
    assert capsys.readouterr().err.startswith(line) == warns


# ---- Tables.


def made_up(layer, contestant, low, median, high):
    """A row for `tables`."""
    row = {"layer": layer, "op": "forward", "batch": 8, "dtype": "float32", "multiply_adds": 1}
    times = {"contestant": contestant, "low": low, "median": median, "high": high}
    return row | times | {"runs": ["us"], "compile_seconds": 1, "temp_bytes": 0}


def test_ratios_in_the_noise():
    """Where quartiles overlap nobody wins, but the mean is that of all medians."""
    rows = [
        *(made_up("plain", "us", 1, 2, 3), made_up("plain", "a", 4, 8, 9)),
        *(made_up("strided", "us", 1, 2, 3), made_up("strided", "a", 3, 4, 5)),
        made_up("strided", "b", 4, 5, 6),
        *(made_up("causal", "us", 3, 4, 5), made_up("causal", "b", 1, 2, 2.9)),
    ]
    report = list(tables.report(tables.collected(rows), ["us"], ["a", "b", "absent"], 1))
    assert report[1] == (
        "| layer | us | a | b | copy | best peer / us | us / copy | us, share of FMA rate |"
    )
    assert [line.split(" | ")[5] for line in report[3:6]] == ["4", "~2", "0.5"]
    assert report[6] == (
        "\nbest peer / us: 1.59, the geometric mean of 3; the least is 0.5, of causal"
    )


def test_ratio_is_that_of_the_best_peer():
    cells = {name: {"median": median} for name, median in (("us", 2.0), ("a", 8.0), ("b", 3.0))}
    assert tables._ratio(cells, ["a", "b", "missing"], "us") == 1.5
    assert tables._ratio(cells, ["missing"], "us") is tables._ratio(cells, ["a"], "missing") is None


def test_copy_moves_as_many_bytes_as_the_op(monkeypatch):
    """It reads half of them and writes half."""
    sizes = []
    monkeypatch.setattr(jax.numpy, "ones", lambda size, dtype: sizes.append(size) or np.ones(size))
    task = layers.Task(TINY[0], "forward", 2, "float32")
    timing.measure(task, ["lax"], [], blocks=1, seconds=0)
    # Two images of 5x6x3 that are read and written, and 3x3x3 taps.
    assert sizes == [(90 * 2 + 90 * 2 + 27) // 2]


# ---- Wrong results.

WRONG = {
    "value": lambda y: y * 1.001,
    "nan": lambda y: y.at[0, 0, 0, 0, 0].set(np.nan),
    "shape": lambda y: y[:, :, 1:],
}


@pytest.fixture
def wrong(request, monkeypatch):
    right = _select.XLA_TAPS
    wrong = dataclasses.replace(
        right, input_grad=lambda *args: WRONG[request.param](right.input_grad(*args))
    )
    monkeypatch.setitem(_select._TABLE, "xla_taps", wrong)
    jax.clear_caches()
    yield
    jax.clear_caches()  # of what was traced with it


@pytest.mark.parametrize("wrong", ("value", "nan"), indirect=True)
def test_wrong_result(wrong, capsys):
    assert run("--filter=plain|causal", "--ops=forward,input_grad", "--json=speed.json") == 1
    found = figures()
    assert {row["op"] for row in found["rows"]} == {"forward"}
    assert len(found["meta"]["mismatches"]) == 2
    out, err = capsys.readouterr()
    assert "### forward" in out and "### input_grad" not in out
    messages = [line for line in err.splitlines() if line.startswith("jax_dwbp.bench: ")]
    assert re.fullmatch(
        r"jax_dwbp\.bench: input_grad, batch 8, float32, plain: "
        r"(lax|xla_taps|default) - default is ([\d.e+]+|nan) of what is allowed",
        messages[0],
    )


@pytest.mark.parametrize("wrong", ("value",), indirect=True)
def test_wrong_result_is_not_timed(wrong, monkeypatch):
    monkeypatch.setattr(timing, "consecutive", lambda *args: pytest.fail("timed"))
    assert run("--filter=plain", "--ops=step", "--json=speed.json") == 1
    assert figures()["rows"] == []


@needs_matplotlib
@pytest.mark.parametrize("wrong", ("value",), indirect=True)
def test_wrong_result_is_not_plotted(wrong):
    assert run("--filter=plain", "--ops=step", "--plot=speed.png") == 1
    assert not Path("speed.png").exists()


def test_wrong_shape():
    task = layers.Task(TINY[0], "forward", 2, "float32")
    want = [np.zeros((2, 5, 6, 3), np.float32)]
    task.check("same", want, "reference", want)
    with pytest.raises(layers.Mismatch, match="wrong - reference is inf of what is allowed"):
        task.check("wrong", [want[0][:1]], "reference", want)


# ---- Files.


@needs_matplotlib
def test_plot():
    arguments = ("--filter=plain|causal", "--ops=forward,step", "--plot=speed.png")
    assert run(*arguments) == 0
    assert Path("speed.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert os.listdir() == ["speed.png"]


measured = {}  # once for all tests


@pytest.fixture
def saved(capsys):
    """What was printed beside speed.json."""
    if not measured:
        assert run("--filter=plain|causal", "--ops=forward,step", "--json=speed.json") == 0
        measured.update(out=capsys.readouterr().out, json=Path("speed.json").read_text())
    Path("speed.json").write_text(measured["json"])
    return measured["out"]


def show(*arguments):
    """What is in speed.json."""
    return bench.main(["bench", "--read=speed.json", *arguments])


def test_read(saved, capsys, monkeypatch):
    """The figures of a file are reported as when they were measured."""
    monkeypatch.setattr(timing, "measure", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(timing, "fma_rate", lambda: pytest.fail("measured"))
    assert show("--json=again.json") == 0
    assert capsys.readouterr() == (saved, "")
    assert figures() == json.loads(Path("again.json").read_text())
    assert show("--ops=step", "--filter=plain", "--json=again.json") == 0
    rows = [row for row in figures()["rows"] if (row["op"], row["layer"]) == ("step", "plain")]
    assert json.loads(Path("again.json").read_text())["rows"] == rows != []


@needs_matplotlib
def test_read_and_plot():
    assert run("--filter=plain", "--ops=step", "--json=speed.json", "--plot=speed.png") == 0
    assert show("--plot=again.png") == 0
    assert Path("again.png").read_bytes() == Path("speed.png").read_bytes()


def test_read_mismatches(saved, capsys):
    """Those of the rows that are asked for."""
    found = figures()
    found["meta"]["mismatches"] = ["step, batch 8, float32, plain: lax - default is nan"]
    Path("speed.json").write_text(json.dumps(found))
    assert show("--ops=forward") == 0
    assert capsys.readouterr().err == ""
    assert show("--ops=step") == 1
    assert capsys.readouterr().err == f"jax_dwbp.bench: {found['meta']['mismatches'][0]}\n"


@pytest.mark.parametrize("flag", ("--implementations=lax", "--peers=", "--blocks=3"))
def test_read_times_nothing(saved, flag, capsys):
    assert show(flag) == 2
    assert capsys.readouterr().err.startswith(f"jax_dwbp.bench: {flag.partition('=')[0]}: says how")


def test_read_other_rows(saved, capsys):
    assert show("--batch=3") == 2
    assert capsys.readouterr().err.endswith(
        "--read=speed.json: has none of the rows that are asked for\n"
    )


def test_read_nothing(capsys):
    assert show() == 2
    assert capsys.readouterr().err.endswith("--read=speed.json: No such file or directory\n")


@pytest.mark.parametrize("text", ("", "\0", "{}", "[1]", "null", '{"rows": [{}], "meta": {}}'))
def test_read_something_else(text, capsys):
    Path("speed.json").write_text(text)
    assert show() == 2
    assert capsys.readouterr() == ("", "jax_dwbp.bench: --read=speed.json: not a file of --json\n")


@pytest.mark.parametrize("change", (None, "text", 0, [], {}))
def test_read_what_was_edited(saved, change, capsys):
    """Nothing that a file may have is a traceback."""
    rows, meta = figures()["rows"], figures()["meta"]
    for name in (*meta, *rows[0]):
        edited = {"meta": dict(meta), "rows": [dict(row) for row in rows]}
        for found in (edited["meta"], *edited["rows"]):
            if name in found:
                found[name] = change
        Path("speed.json").write_text(json.dumps(edited))
        assert show() in (0, 2), name
        out, err = capsys.readouterr()
        assert (out == "") == (err.count("\n") == 1), name
        assert err or name != "median"


def test_device_that_is_full(saved, capsys):
    assert show("--json=/dev/full") == 2
    assert capsys.readouterr().err == "jax_dwbp.bench: --json=/dev/full: No space left on device\n"
    assert Path("/dev/full").is_char_device()


def test_link_to_nowhere(saved, capsys):
    Path("again.json").symlink_to("nope/again.json")
    assert show("--json=again.json") == 2
    expected = "jax_dwbp.bench: --json=again.json: not a file in a directory that can be written\n"
    assert capsys.readouterr() == ("", expected)


def test_full_disk(capsys, monkeypatch):
    def replace(*args):
        raise OSError(28, "No space left on device")

    Path("speed.json").write_text("earlier figures")
    monkeypatch.setattr(os, "replace", replace)
    assert run("--filter=plain", "--ops=forward", "--json=speed.json") == 2
    assert capsys.readouterr().err.endswith("--json=speed.json: No space left on device\n")
    assert os.listdir() == ["speed.json"]
    assert Path("speed.json").read_text() == "earlier figures"


# ---- Errors.

ERRORS = {
    "filter": ("--filter=resnet", "--filter=resnet: found in none of the layers plain, strided, "),
    "group": ("--groups=networks,video", "--groups=networks,video: must be out of networks, "),
    "expression": ("--filter=(", "--filter=(: not a regular expression: "),
    "op": (
        "--ops=forward,backward",
        "--ops=forward,backward: must be out of forward, input_grad, filter_grad, step",
    ),
    "no ops": ("--ops=", "--ops=: must be out of forward, "),
    "batch": ("--batch=8,0", "--batch=8,0: must be positive integers, as 1,8,32"),
    "no batch": ("--batch=", "--batch=: must be positive integers"),
    "dtype": ("--dtype=int8", "flag --dtype=int8: value should be one of <float16|bfloat16|"),
    "implementation": (
        "--implementations=fast",
        "--implementations=fast: must be out of default, ",
    ),
    "no implementations": ("--implementations=", "--implementations=: must be out of default, "),
    "peer": ("--peers=jax", "--peers=jax: must be out of tensorflow, torch, torch_nchw"),
    "peer that is missing": ("--peers=torch_nchw", "--peers=torch_nchw: torch is not installed"),
    "blocks": ("--blocks=0", "flag --blocks=0: "),
    "block_seconds": ("--block_seconds=-1", "flag --block_seconds=-1: "),
    "no duration": ("--block_seconds=nan", "--block_seconds=nan: must be finite"),
    "large batch": ("--batch=1" + 19 * "0", "0: must be positive integers"),
    "directory": ("--json=nope/a.json", "--json=nope/a.json: not a file in a directory that can "),
    "directory as file": ("--plot=.", "--plot=.: not a file in a directory that can be written"),
    "matplotlib": ("--plot=a.png", "--plot=a.png: matplotlib is not installed"),
    "flag": ("--layer=plain", "Unknown command line flag 'layer'"),
    "argument": ("plain", "unexpected argument 'plain': all arguments are --flag=value"),
}


@pytest.mark.parametrize("argument, message", ERRORS.values(), ids=ERRORS)
def test_error(argument, message, capsys, monkeypatch):
    for package in ("matplotlib", "torch"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(timing, "measure", lambda *args: pytest.fail("measured"))
    assert run(argument) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("jax_dwbp.bench: ")
    assert message in line
    assert os.listdir() == []


def test_one_file_for_both(capsys):
    assert run("--json=speed", "--plot=speed") == 2
    assert capsys.readouterr().err.endswith("--plot=speed: is the file of --json too\n")


def test_no_memory(capsys, monkeypatch):
    def no_memory(*args):
        raise MemoryError("Unable to allocate 1.2 TiB")

    monkeypatch.setattr(layers.Task, "operands", no_memory)
    assert run() == 2
    assert capsys.readouterr().err.endswith("jax_dwbp.bench: Unable to allocate 1.2 TiB\n")


def test_help(capsys):
    assert bench.main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for argument, _ in ERRORS.values():
        flag = argument.partition("=")[0]
        assert flag in text or flag in ("--layer", "plain")


def test_program():
    """As it is run, with a layer and the rate of the machine."""
    arguments = "--filter=7x7x960 --ops=input_grad --batch=1 --peers= --blocks=1 --block_seconds=0"
    process = fresh_process.start("-W", "error", "-m", "jax_dwbp.bench", *arguments.split())
    status, out, err = fresh_process.finish(process)
    *load, progress = err.splitlines()
    assert (status, progress) == (0, "1/1 input_grad, batch 1, float32, mobilenetv2 7x7x960 k3 s1")
    assert len(load) <= 1  # it is told of, and there may be one
    assert re.search(r"\nfloat32 matmul: [\d.e+]+ GFMA/s\n", out)
    assert "\n| mobilenetv2 7x7x960 k3 s1 | " in out
