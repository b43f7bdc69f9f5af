"""`python -m jax_dwbp`: its report on a picture, the op on files, and one line for each error."""

import errno
import os
import re
import signal
import stat
import sys
import zipfile
from pathlib import Path

import fresh_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DEFAULT_ON_CPU, DTYPES, SMALL, from_layout, layout_shape, to_layout
from jax import lax

import jax_dwbp
from jax_dwbp.__main__ import main

CASES = {case.name: case for case in SMALL}
FILES = ("plain", "unequal_strides", "valid_unused_rows", "explicit", "dilated_strided")
DATA_FORMATS = ("NHWC", "NCHW")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- On a picture.


def check_lines(report):
    return report[report.index("\ncheck ") :].splitlines()[2:]


def test_photograph(capsys):
    pytest.importorskip("skimage")
    assert main(["jax_dwbp"]) == 0
    report = capsys.readouterr().out
    for expected in (
        f"jax_dwbp        {jax_dwbp.__version__}\n",
        f"jax {jax.__version__}, ",
        "device          cpu, ",
        "photograph of Chelsea the cat, from scikit-image ",
        "\nx               float32[1, 300, 451, 3] ",
        "\nf               float32[5, 5, 3, 2] ",
        "\ny = F(x)        float32[1, 150, 226, 6] ",
        "\ndy              float32[1, 150, 226, 6] ",
        "\ndx              float32[1, 300, 451, 3] ",
        "\nstrides         (1, 2, 2, 1)\n",
        "\npadding         SAME\n",
        f"\nimplementation  {DEFAULT_ON_CPU}\n",
    ):
        assert expected in report
    assert re.search(r"\nfirst call +\d+\.\d\d ms, .*\nlater calls +\d+\.\d\d ms, ", report)

    lines = check_lines(report)
    assert [re.split("  +", line)[0] for line in lines] == [
        "<F(x), dy> = <x, dx>",
        "finite difference = grad by filter",
        "finite difference = grad by out_backprop",
    ]
    for line in lines:
        left, right, difference, allowed, verdict = line.split()[-5:]
        assert float(left) == pytest.approx(float(right), rel=float(allowed))
        assert float(difference) <= float(allowed) < 1e-3
        assert verdict == "pass"


def test_generated_picture(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert main(["jax_dwbp"]) == 0
    report = capsys.readouterr().out
    assert "scikit-image is not installed: pip install jax_dwbp[main]" in report
    assert [line.split()[-1] for line in check_lines(report)] == ["pass"] * 3


@pytest.mark.parametrize(
    "damage, verdicts",
    [
        (lambda dx: dx * jnp.float32(1.0001), ["FAIL", "pass", "pass"]),
        (lax.stop_gradient, ["pass", "FAIL", "FAIL"]),
        (lambda dx: dx * jnp.float32("nan"), ["FAIL"] * 3),
    ],
    ids=("result", "gradient", "nan"),
)
def test_failed_check(damage, verdicts, capsys, monkeypatch):
    op = jax_dwbp.depthwise_conv2d_native_backprop_input
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setattr(
        jax_dwbp,
        "depthwise_conv2d_native_backprop_input",
        lambda *args, **options: damage(op(*args, **options)),
    )
    assert main(["jax_dwbp"]) == 1
    lines = check_lines(capsys.readouterr().out)
    assert [line.split()[-1] for line in lines] == verdicts


# ---- On files.


def write(case, data_format="NHWC", dtype="float32"):
    """The operands of `case` as f.npy and dy.npy; returns them in NHWC."""
    f, dy = case.operands("input_grad", dtype)
    np.save("f.npy", f)
    np.save("dy.npy", to_layout(dy, data_format))
    return f, dy


def command(case, layout="NHWC", /, **changes):
    """The command line for the files that `write` wrote. None leaves out a flag."""
    values = {
        "input_sizes": layout_shape(case.input, layout),
        "filter": "f.npy",
        "out_backprop": "dy.npy",
        **case.attributes(layout),
        "output": "dx.npy",
        **changes,
    }
    texts = {
        name: value if isinstance(value, str) else ",".join(map(str, value))
        for name, value in values.items()
        if value is not None
    }
    return ["jax_dwbp", *(f"--{name}={text}" for name, text in texts.items())]


def check_output(case, f, dy, data_format="NHWC", dtype="float32"):
    got = from_layout(np.load("dx.npy"), data_format)
    case.check("input_grad", got, case.expected("input_grad", f, dy), dtype)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("case", [CASES[name] for name in FILES], ids=str)
def test_files(case, data_format, capsys):
    f, dy = write(case, data_format)
    assert main(command(case, data_format)) == 0
    check_output(case, f, dy, data_format)
    shape = layout_shape(case.input, data_format)
    assert capsys.readouterr() == (f"{shape} float32 by {DEFAULT_ON_CPU} in dx.npy\n", "")


@pytest.mark.parametrize("x64", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, x64, capsys):
    case = CASES["multiplier"]
    f, dy = write(case, dtype=dtype)
    with jax.enable_x64(x64):
        assert main(command(case)) == 0
    assert f" {dtype} by " in capsys.readouterr().out
    got = np.load("dx.npy")
    got = got.view(jnp.bfloat16) if dtype == "bfloat16" else got
    case.check("input_grad", got, case.expected("input_grad", f, dy), dtype)


@pytest.mark.parametrize(
    "stored", (lambda x: x.astype(">f4"), np.asfortranarray), ids=("big_endian", "fortran_order")
)
def test_memory_layout_of_files(stored):
    case = CASES["plain"]
    f, dy = write(case)
    np.save("f.npy", stored(f))
    assert main(command(case)) == 0
    check_output(case, f, dy)


def test_npz():
    case = CASES["plain"]
    f, dy = case.operands("input_grad")
    np.savez("one.npz", f)
    np.savez_compressed("two.npz", f=f, dy=dy)
    changes = {"filter": "one.npz", "out_backprop": "two.npz:dy", "output": "dx.npz"}
    assert main(command(case, **changes)) == 0
    with np.load("dx.npz") as outputs:
        assert outputs.files == ["dx"]
        case.check("input_grad", outputs["dx"], case.expected("input_grad", f, dy), "float32")


def test_implementation(capsys):
    case = CASES["plain"]
    f, dy = write(case)
    assert main(command(case, implementation="lax")) == 0
    check_output(case, f, dy)
    assert " by lax in dx.npy" in capsys.readouterr().out


def test_defaults_and_pairs():
    case = CASES["stride2"]
    f, dy = write(case)
    changes = {"explicit_paddings": None, "data_format": None, "dilations": None, "strides": (2, 2)}
    assert main(command(case, **changes)) == 0
    check_output(case, f, dy)


@pytest.mark.parametrize(
    "attrs",
    (
        "data_format_ = NCHW; dilations_ = {1, 1, 2, 2}; explicit_paddings_ = {}",
        'data_format_="NCHW";dilations_={1,1,2,2}',
        " dilations_ = { 1,1,\n 2,2 } ;\n data_format_ = 'NCHW' ; ",
    ),
)
def test_attrs(attrs):
    case = CASES["dilated_strided"]
    f, dy = write(case, "NCHW")
    changes = {"explicit_paddings": None, "data_format": None, "dilations": None}
    assert main(command(case, "NCHW", attrs=attrs, **changes)) == 0
    check_output(case, f, dy, "NCHW")


def test_attrs_with_explicit_paddings():
    case = CASES["explicit"]
    f, dy = write(case)
    attrs = "explicit_paddings_ = {0, 0, 2, 0, 1, 3, 0, 0}"
    assert main(command(case, explicit_paddings=None, attrs=attrs)) == 0
    check_output(case, f, dy)


def test_attrs_that_agree_with_flags():
    case = CASES["plain"]
    f, dy = write(case)
    assert main(command(case, attrs="data_format_ = NHWC; dilations_ = {1, 1, 1, 1}")) == 0
    check_output(case, f, dy)


# ---- Errors.

ERRORS = {
    "missing file": ({"filter": "nope.npy"}, "--filter=nope.npy: can't read an array: No such "),
    "directory as file": ({"filter": "directory.npy"}, "can't read an array: Is a directory"),
    "text as npy": ({"out_backprop": "text.npy"}, "--out_backprop=text.npy: can't read an array: "),
    "text as npz": ({"filter": "text.npz"}, "--filter=text.npz: can't read an array: "),
    "truncated npy": ({"filter": "truncated.npy"}, "--filter=truncated.npy: can't read an array: "),
    "damaged npz": ({"filter": "damaged.npz:a"}, "--filter=damaged.npz:a: can't read an array: "),
    "pickled objects": ({"filter": "objects.npy"}, "read an array: Object arrays cannot be loaded"),
    "other kind of file": (
        {"filter": "text.txt"},
        "--filter=text.txt: can't read an array: not file.npy, file.npz or file.npz:name",
    ),
    "npz of several": (
        {"filter": "two.npz"},
        "read an array: the file has ['a', 'b'], name one as file.npz:name",
    ),
    "npz and no such name": ({"filter": "two.npz:c"}, "can't read an array: the file has ['a', "),
    "npz of no arrays": ({"filter": "none.npz"}, "none.npz: can't read an array: the file has []"),
    "integers": (
        {"filter": "integers.npy"},
        "--filter=integers.npy: must hold float16, bfloat16, float32, float64, got int64",
    ),
    "strings": ({"filter": "strings.npy"}, "--filter=strings.npy: must hold float16, "),
    "two dtypes": ({"filter": "double.npy"}, "`filter` and `out_backprop` must share a dtype"),
    "filter rank": ({"filter": "rank3.npy"}, "`filter` must be 4-dimensional"),
    "out_backprop rank": ({"out_backprop": "rank3.npy"}, "`out_backprop` must be 4-dimensional"),
    "out_backprop shape": ({"out_backprop": "f.npy"}, "`out_backprop` must have shape"),
    "no out_backprop": (
        {"out_backprop": None, "output": None},
        "missing --out_backprop, --output: to run on files takes them all",
    ),
    "integer": ({"strides": "1,2.5,2,1"}, "flag --strides=1,2.5,2,1: must be comma-separated "),
    "empty integer": ({"input_sizes": "2,,6,3"}, "flag --input_sizes=2,,6,3: must be comma-"),
    "no sizes": ({"input_sizes": ""}, "`input_sizes` must be 4 integers, got ()"),
    "few strides": ({"strides": "1,2,2"}, "`strides` must be 4 integers"),
    "dilations": ({"dilations": "1,0,1,1"}, "`dilations` must be positive"),
    "padding": ({"padding": "same"}, "`padding` must be 'SAME'"),
    "explicit_paddings": ({"padding": "EXPLICIT"}, "`explicit_paddings` must be 8 integers"),
    "data_format": ({"data_format": "NHCW"}, "`data_format` must be 'NHWC' or 'NCHW', got 'NHCW'"),
    "implementation": ({"implementation": "fast"}, "`implementation` must be out of "),
    # More than an address space of 47 bits.
    "memory": ({"input_sizes": "2,3000000,3000000,3", "strides": "600000,500000"}, "Out of memory"),
    "unknown flag": ({"fliter": "f.npy"}, "Unknown command line flag 'fliter'"),
    "output kind": ({"output": "dx.txt"}, "--output=dx.txt: must end in .npy or .npz"),
    "no output directory": ({"output": "nope/dx.npy"}, "--output=nope/dx.npy: No such file or "),
    "file as directory": ({"output": "f.npy/dx.npy"}, "--output=f.npy/dx.npy: Not a directory"),
    "directory as output": ({"output": "directory.npy"}, "--output=directory.npy: Is a directory"),
    "attrs field": (
        {"attrs": "data_format = NHWC"},
        "no field 'data_format', the fields are data_format_, dilations_, explicit_paddings_",
    ),
    "attrs separator": (
        {"attrs": "data_format_ = NHWC, dilations_ = {1, 1, 1, 1}"},
        "data_format_ must be a word or a quoted string, got 'NHWC, dilations_ = {1, 1, 1, 1}'",
    ),
    "attrs quotes": ({"attrs": 'data_format_ = "NHWC'}, "data_format_ must be a word or a quoted "),
    "attrs braces": ({"attrs": "dilations_ = NHWC"}, "dilations_ must be integers in braces"),
    "attrs integer": ({"attrs": "dilations_ = {1, a}"}, "dilations_ must be comma-separated "),
    "attrs without value": ({"attrs": "dilations_"}, "dilations_ must be integers in braces"),
    "attrs twice": (
        {"attrs": "data_format_ = NHWC; data_format_ = NCHW"},
        "data_format_ has two different values",
    ),
    "attrs against flag": (
        {"attrs": "dilations_ = {1, 2, 2, 1}"},
        "--dilations is (1, 1, 1, 1), but (1, 2, 2, 1) in --attrs",
    ),
}


def write_unusable_files(f):
    Path("text.txt").write_text("text")
    Path("text.npy").write_text("text")
    Path("text.npz").write_text("text")
    Path("directory.npy").mkdir()
    Path("truncated.npy").write_bytes(Path("f.npy").read_bytes()[:-8])
    np.savez("two.npz", a=f, b=f)
    damaged = Path("two.npz").read_bytes().replace(f.tobytes(), bytes(f.nbytes))
    Path("damaged.npz").write_bytes(damaged)
    with zipfile.ZipFile("none.npz", "w") as archive:
        archive.writestr("text.txt", "text")
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    np.save("integers.npy", f.astype(np.int64))
    np.save("strings.npy", f.astype(str))
    np.save("double.npy", f.astype(np.float64))
    np.save("rank3.npy", f[0])


def contents():
    return {path.name: path.is_file() and path.read_bytes() for path in Path().iterdir()}


def check_error(status, capsys, message):
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("jax_dwbp: ")
    assert message in line


@pytest.mark.parametrize("changes, message", ERRORS.values(), ids=ERRORS)
def test_error(changes, message, capsys):
    case = CASES["plain"]
    f, _ = write(case)
    write_unusable_files(f)
    Path("dx.npy").write_text("an earlier result")
    before = contents()
    check_error(main(command(case, **changes)), capsys, message)
    assert contents() == before


def test_positional_argument(capsys):
    check_error(main(["jax_dwbp", "f.npy"]), capsys, "unexpected argument 'f.npy'")


@pytest.mark.parametrize("output", ("dx.npy", "dx.npz"))
@pytest.mark.parametrize(
    "error",
    (OSError(errno.ENOSPC, "No space left on device"), OSError("18 requested and 3 written")),
    ids=("system", "numpy"),
)
def test_full_disk(error, output, capsys, monkeypatch):
    def save(file, *args, **kwargs):
        file.write(b"the first block")
        raise error

    case = CASES["plain"]
    write(case)
    Path(output).write_text("an earlier result")
    before = contents()
    monkeypatch.setattr(np, "save", save)
    monkeypatch.setattr(np, "savez", save)
    status = main(command(case, output=output))
    check_error(status, capsys, f"--output={output}: {error.strerror or error}")
    assert contents() == before


@pytest.mark.parametrize("output", ("dx.npy", "dx.npz"))
def test_output_keeps_its_link_and_its_mode(output):
    case = CASES["plain"]
    f, dy = write(case)
    Path("other").mkdir()
    target = Path("other", output)
    target.write_text("an earlier result")
    target.chmod(0o640)
    Path(output).symlink_to(target)
    assert main(command(case, output=output)) == 0
    assert Path(output).is_symlink() and os.listdir("other") == [output]
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    got = np.load(target)
    got = got["dx"] if output == "dx.npz" else got
    case.check("input_grad", got, case.expected("input_grad", f, dy), "float32")


def test_output_through_a_link_to_no_file_yet():
    write(CASES["plain"])
    Path("dx.npy").symlink_to("target.npy")
    assert main(command(CASES["plain"])) == 0
    assert Path("dx.npy").is_symlink() and np.load("target.npy").shape == CASES["plain"].input


def test_help(capsys):
    assert main(["jax_dwbp", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for argument in command(CASES["plain"], attrs="", implementation=""):
        assert argument.partition("=")[0] in text


# ---- The module as a program.


def program(*arguments):
    """Its exit status and output, in a process that starts with JAX's defaults."""
    return fresh_process.finish(fresh_process.start("-W", "error", "-m", *arguments))


def test_program():
    case = CASES["plain"]
    f, dy = write(case, dtype="float64")
    line = f"{case.input} float64 by {DEFAULT_ON_CPU} in dx.npy\n"
    assert program(*command(case)) == (0, line, "")
    check_output(case, f, dy, dtype="float64")


def test_program_reports_errors():
    line = "jax_dwbp: --filter=f.npy: can't read an array: No such file or directory\n"
    assert program(*command(CASES["plain"])) == (2, "", line)


# By what JAX says itself, and where it fails without a word.
@pytest.mark.parametrize("platform", ("abacus", "cuda"))
@pytest.mark.parametrize("arguments", (["jax_dwbp"], ["jax_dwbp.bench"], command(CASES["plain"])))
def test_program_without_a_device(platform, arguments, monkeypatch):
    write(CASES["plain"])
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    status, out, err = program(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"{re.escape(arguments[0])}: .*{platform}.*\n", err)


def prepared(preparation, *argv):
    """The exit status and output of `main(argv)` in a process of its own, after `preparation`."""
    start = "import os, resource, signal, sys\nfrom jax_dwbp.__main__ import main"
    source = f"{start}\n{preparation}\nsys.exit(main({argv!r}))"
    return fresh_process.finish(fresh_process.start("-W", "error", "-c", source))


TOO_LARGE = "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))"


@pytest.mark.parametrize("output", ("dx.npy", "dx.npz"))
def test_output_that_the_system_does_not_take(output):
    write(CASES["plain"])
    Path(output).write_text("an earlier result")
    Path(f"full{output}").symlink_to("/dev/full")
    before = os.listdir(), Path(output).read_text()
    for preparation, path, reason in (
        (TOO_LARGE, output, "File too large"),
        ("", f"full{output}", "No space left on device"),
    ):
        expected = f"jax_dwbp: --output={path}: {reason}\n"
        assert prepared(preparation, *command(CASES["plain"], output=path)) == (2, "", expected)
        assert (os.listdir(), Path(output).read_text()) == before
    assert Path(f"full{output}").is_symlink()


@pytest.mark.parametrize("name", ("SIGTERM", "SIGHUP"))
def test_output_of_a_program_that_is_ended(name):
    write(CASES["plain"])
    Path("dx.npy").write_text("an earlier result")
    before = contents()
    # As the file is complete, but not yet where it belongs.
    end = f"os.replace = lambda *paths: os.kill(os.getpid(), signal.{name})"
    ended = prepared(end, *command(CASES["plain"]))
    assert ended == (128 + signal.Signals[name], "", "")
    assert contents() == before
    ignored = f"signal.signal(signal.{name}, signal.SIG_IGN)\n{end}"
    status, _, err = prepared(ignored, *command(CASES["plain"]))
    assert (status, err) == (0, "")


@pytest.mark.parametrize("argv", (["jax_dwbp"], ["jax_dwbp", "--help"], command(CASES["plain"])))
def test_standard_output_that_is_closed_early(argv):
    write(CASES["plain"])
    process = fresh_process.start("-W", "error", "-m", *argv)
    assert process.stdout is not None
    process.stdout.close()
    status, _, err = fresh_process.finish(process)
    assert (status, err) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("argv", (["jax_dwbp"], ["jax_dwbp", "--help"], command(CASES["plain"])))
def test_standard_output_that_is_full(argv):
    write(CASES["plain"])
    full = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    expected = "jax_dwbp: standard output: No space left on device\n"
    assert prepared(full, *argv) == (2, "", expected)
