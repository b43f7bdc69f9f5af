"""`python tests/figures gpu`: how it counts, what it accepts, and its errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cases import OPS
from figures import cuda, gpu, ptx, sass, workers

H100 = cuda.TARGETS["sm_90a"]

# A loop of four trips, of which ptxas made one of two trips. Each adds four words.
PTX = """
.visible .entry k(
	.param .u64 .ptr .align 16 k_param_0,
	.param .u64 .ptr .align 16 k_param_1
)
.reqntid 64, 1, 1
{
	.reg .pred %p<2>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	ld.param::entry.b64 %rd1, [k_param_0];
	ld.param::entry.b64 %rd2, [k_param_1];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 16;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	mov.b32 %r2, 0;
	mov.b32 %r3, 0;
$L__BB0_1:
	ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd4];
	add.f32 %r3, %r3, %r4;
	add.f32 %r3, %r3, %r5;
	add.f32 %r3, %r3, %r6;
	add.f32 %r3, %r3, %r7;
	add.s64 %rd4, %rd4, 1024;
	add.s32 %r2, %r2, 1;
	setp.lt.s32 %p1, %r2, 4;
	@%p1 bra $L__BB0_1;
	st.global.b32 [%rd5], %r3;
	ret;
}
"""
SASS = """
	.section	.text.k,"ax",@progbits
        .type           k,@function
k:
.text.k:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   IMAD.WIDE.U32 R2, R0, 0x10, R4 ;
.L_x_0:
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128 R12, desc[UR4][R2.64+0x400] ;
        /*0050*/                   FADD R6, R6, R8 ;
        /*0060*/                   FADD R6, R6, R9 ;
        /*0070*/                   FADD R6, R6, R10 ;
        /*0080*/                   FADD R6, R6, R11 ;
        /*0090*/                   FADD R6, R6, R12 ;
        /*00a0*/                   FADD R6, R6, R13 ;
        /*00b0*/                   FADD R6, R6, R14 ;
        /*00c0*/                   FADD R6, R6, R15 ;
        /*00d0*/                   IADD3 R7, R7, 0x2, RZ ;
        /*00e0*/                   ISETP.GE.AND P0, PT, R7, 0x4, PT ;
        /*00f0*/              @!P0 BRA `(.L_x_0) ;
        /*0100*/               @P1 EXIT ;
        /*0110*/                   STG.E desc[UR4][R4.64], R6 ;
        /*0120*/                   EXIT ;
.L_x_1:
        /*0130*/                   BRA `(.L_x_1);
        /*0140*/                   NOP;
        /*0150*/                   NOP;
.L_x_2:
"""
REPORT = """
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers, used 0 barriers
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 376 bytes cmem[0]
"""


def launch(blocks=264):
    [kernel] = ptx.parse(PTX)
    return cuda.Launch(kernel, PTX, (blocks, 1, 1), 0)


@pytest.fixture
def assembled(monkeypatch):
    """ptxas and nvdisasm, which need not be installed."""
    monkeypatch.setattr(cuda, "assemble", lambda module, arch: (SASS, REPORT))


def test_sass():
    function = sass.parse(SASS)["k"]
    assert len(function.opcodes) == 19
    assert function.opcodes[:4] == ["LDC", "S2R", "IMAD.WIDE.U32", "LDG.E.128"]
    assert function.loops == [(3, 16)]
    assert sass.registers_and_spills(REPORT, "k") == (168, 12)
    assert sass.registers_and_spills(REPORT, "other") == (9, 0)
    with pytest.raises(RuntimeError, match="no registers of missing"):
        sass.registers_and_spills(REPORT, "missing")


def test_count():
    [kernel] = ptx.parse(PTX)
    traffic = gpu._Traffic(2, threads=64)
    executed = ptx.run(kernel, (3, 1, 1), traffic.addresses, traffic) / 6
    assert executed.tolist() == [1] * 8 + [4] * 9 + [1] * 2
    counts = sass.count(sass.parse(SASS)["k"], kernel, executed)
    # Two trips of 13 instructions, 8 FADD, an IADD3 and an ISETP among them; and IMAD.
    assert counts == (6 + 2 * 13, 2 * 8 + 1, 2 * 2)


def test_count_without_the_loop():
    """ptxas unrolled all of it, as the arithmetic shows."""
    [kernel] = ptx.parse(PTX)
    before, body, after = re.split(r"\.L_x_0:\n|.*BRA `\(\.L_x_0\) ;\n", SASS)
    function = sass.parse(before + 2 * body + after)["k"]
    assert function.loops == []
    executed = np.array([1] * 8 + [4] * 9 + [1] * 2)
    assert sass.count(function, kernel, executed) == (6 + 2 * 12, 2 * 8 + 1, 2 * 2)


@pytest.mark.parametrize(
    ("stride", "width", "wavefronts", "sectors"),
    (
        (4, 4, 1, 4),  # neighbours
        (16, 16, 4, 16),
        (0, 4, 1, 1),  # all the same
        (128, 4, 32, 32),
        (128, 16, 32, 32),
        (2, 2, 1, 2),
    ),
)
def test_traffic(stride, width, wavefronts, sectors):
    """Of a warp, and of another one that only has one thread left."""
    traffic = gpu._Traffic(1, threads=64)
    thread = np.arange(64)
    addresses, active = traffic.addresses[0] + stride * (thread % 32), thread < 33
    dtype = np.dtype(np.uint16 if width == 2 else np.uint32)
    traffic.load(addresses, active, width // dtype.itemsize, dtype)
    assert traffic.wavefronts == wavefronts + 1
    assert traffic.loaded() == 32 * sectors
    traffic.load(addresses, active, width // dtype.itemsize, dtype)
    assert traffic.loaded() == 32 * sectors  # L1 has them
    traffic.store(addresses, active, [np.zeros(64, dtype)] * (width // dtype.itemsize))
    assert traffic.stored == 32 * sectors
    assert traffic.wavefronts == 3 * (wavefronts + 1)


def test_traffic_of_blocks():
    """Each loads what it needs, whatever others load, and stores it."""
    traffic = gpu._Traffic(1, threads=32)
    addresses, active = traffic.addresses[0] + 4 * (np.arange(64) % 32), np.full(64, True)
    for _ in range(2):
        traffic.load(addresses, active, 1, np.dtype(np.uint32))
    assert traffic.loaded() == 2 * 128
    traffic.store(addresses, active, [np.zeros(64, np.uint32)])
    assert traffic.stored == 2 * 128


def test_kernel_cost(assembled):
    cost = gpu._kernel_cost(launch(), H100)
    cycles = {name: seconds * H100.clock for name, seconds in cost["seconds"].items()}
    # Two blocks of two warps on each multiprocessor.
    assert cycles["issue"] == pytest.approx(4 * 32 / 4)
    assert cycles["fp32"] == pytest.approx(4 * 17 / 4)
    assert cycles["alu"] == pytest.approx(4 * 4 / 2)
    assert cycles["l1"] == pytest.approx(4 * (4 * 4 + 4))  # 16 bytes for a thread, and 4 of 16
    loaded, stored = 4 * 1024, 64 * 32 // 2
    assert cost["seconds"]["l2"] == pytest.approx(264 * (loaded + stored) / H100.l2_rate)
    assert (cost["registers"], cost["spilled_bytes"], cost["warps"]) == (168, 12, 12)
    assert cost["instructions"] == pytest.approx(264 * 64 * 32)
    # Half of the multiprocessors have nothing to do, so the others take as long.
    half = gpu._kernel_cost(launch(66), H100)["seconds"]
    assert half["issue"] * H100.clock == pytest.approx(2 * 32 / 4)


def test_program_cost(assembled):
    program = cuda.Program([launch(), launch()], temporary_bytes=100, compile_seconds=2.5)
    one = gpu._kernel_cost(launch(), H100)["seconds"]
    assert max(one, key=lambda name: one[name]) == "l2"
    cost = gpu._cost(program, H100, moved=1000)
    assert cost["figure"] == pytest.approx(2 * one["l2"] / (1000 / H100.memory_rate))
    assert (cost["binding"], cost["kernels"], cost["compile_seconds"]) == ("l2", 2, 2.5)
    cost = gpu._cost(program, H100, moved=10**9)
    assert (cost["binding"], cost["figure"]) == ("memory", pytest.approx(1 + 2e-7))


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "warps"),
    ((128, 168, 0, 12), (128, 40, 0, 48), (128, 16, 0, 64), (32, 16, 0, 32), (128, 32, 100000, 8)),
)
def test_resident_warps(threads, registers, shared, warps):
    assert gpu._resident_warps(threads, registers, shared, H100) == warps


def test_targets():
    description = H100.description()
    assert "core_count: 132" in description
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in description
    assert "major: 8 minor: 0  }" in cuda.TARGETS["sm_80"].description()
    assert "major: 10 minor: 0" in cuda.TARGETS["sm_100a"].description()


def test_launches(tmp_path):
    (tmp_path / "module.1.ptx").write_text(PTX)
    thunks = tmp_path / "module.thunk_sequence.txt"
    line = (
        "001: kCustomKernel [source | sink] k grid: [3, 2, 1] threads: [64, 1, 1]  "
        "shared_memory: 8 bytes"
    )
    thunks.write_text(f"{line}\n{line}\n")
    found = cuda._launches(tmp_path)
    assert [(f.kernel.name, f.grid, f.shared_bytes) for f in found] == [("k", (3, 2, 1), 8)] * 2
    thunks.write_text(f"{line}\n002: kConvolution [source | sink]\n")
    with pytest.raises(RuntimeError, match="more than kernels: 002: kConvolution"):
        cuda._launches(tmp_path)


def test_cases():
    assert len({case.name for case in gpu.CASES}) == len(gpu.CASES)
    for case in gpu.CASES:
        spec = case.spec
        sizes = zip(spec.in_spatial, case.layer.strides, strict=True)
        assert spec.out_spatial == tuple(-(-size // stride) for size, stride in sizes)
    limits = {case.name: case.limit() for case in gpu.CASES}
    assert limits["56x56x144 k3 s1 bfloat16"] == limits["56x56x144 k3 s2 float32"] == 1.2
    assert limits["56x56x144 k5 s1 float32"] == 1.3
    assert limits["56x56x144 k7 s1 float32"] == 1.5
    assert limits["56x56x144 k7 s1 bfloat16"] is limits["56x56x144 k13 s1 float32"] is None


# ---- The command line, without a compiler.

ROW = {
    "op": "input_grad",
    "target": "sm_90a",
    "figure": 1.1,
    "binding": "l1",
    "instructions_per_output": 14.2,
    "registers": 128,
    "spilled_bytes": 0,
    "warps": 16,
    "kernels": 1,
    "compile_seconds": 1.5,
}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What is measured of a case: `ROW` with these changes, or this failure."""
    results = {}

    def measure(case, op, target, is_costed, xla_taps):
        found = results.get(case.name, {})
        if isinstance(found, str):
            return None, found
        found = {"xla_taps": 2.5 if xla_taps else None} | found
        row = ROW | {"case": case.name, "op": op, "target": target} | found
        return (row if is_costed else None), None

    def run_jobs(function, jobs, environment, timeout):
        assert function is gpu._measure and environment["JAX_PLATFORMS"] == "cpu"
        return (measure(*job) for job in jobs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "run", run_jobs)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "versions", lambda: {"ptxas": "13.0"})
    return results


def run(*arguments):
    return gpu.main(["gpu", *arguments])


def test_table(measured, capsys):
    arguments = ("--filter=k[35] s1 float32", "--ops=forward", "--targets=sm_80,sm_90a")
    assert run(*arguments, "--json=cost.json") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 + err.count("\n")
    assert "| 56x56x144 k5 s1 float32 | forward | sm_80 | 1.10 | l1 | 14.2 | 128 | 0 | 16 |" in out
    found = json.loads(Path("cost.json").read_text())
    assert found["meta"]["versions"]["ptxas"] == "13.0"
    assert {row["target"] for row in found["rows"]} == {"sm_80", "sm_90a"}


def test_table_beside_xla_taps(measured, capsys):
    arguments = ("--filter=k3 s1 float32", "--ops=forward", "--targets=sm_90a")
    for flag, cell in ((), "2.50"), (("--noxla_taps",), "-"):
        assert run(*arguments, *flag) == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"| 1.5 | {cell} |")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"figure": 1.31}, "1.31 times the roofline, at most 1.3 is accepted"),
        ({"spilled_bytes": 8}, "8 bytes of registers spilled"),
        ({"warps": 8}, "8 warps, at least 12 are accepted"),
        ({"compile_seconds": 10.1}, "10 s to compile"),
    ),
)
def test_check(measured, capsys, change, message):
    name = "56x56x144 k5 s1 float32"
    measured[name] = change
    assert run(f"--filter={name}", "--ops=forward") == 0
    assert run("--ops=forward", "--check", "--targets=sm_90a") == 1
    assert f"figures gpu: forward, {name}: {message}" in capsys.readouterr().err


def test_check_only_compiles_for_other_targets(measured, capsys):
    assert run("--check") == 0
    out, err = capsys.readouterr()
    _, _, *rows = out.splitlines()
    assert len(rows) == 3 * len(gpu.CASES) and all("| sm_90a |" in row for row in rows)
    # Each case for one of them, and each op for each of them.
    others = [line for line in err.splitlines() if not line.endswith("sm_90a")]
    assert all(any(case.name in line for line in others) for case in gpu.CASES)
    found = {(re.split("[ ,]", line)[1], line.split(", ")[-1]) for line in others}
    assert found == {(op, target) for op in OPS for target in ("sm_80", "sm_100a")}


@pytest.fixture
def compiled(monkeypatch):
    """The targets that were compiled for, where the first time takes 11 s and each other one 9."""
    targets = []

    def compile_program(function, operands, target):
        targets.append(target.arch)
        return cuda.Program([], temporary_bytes=0, compile_seconds=9.0 if targets[1:] else 11.0)

    monkeypatch.setattr(cuda, "compile_program", compile_program)
    monkeypatch.setattr(
        gpu,
        "_cost",
        lambda program, *_: {"instructions": 1.0, "compile_seconds": program.compile_seconds},
    )
    return targets


def test_measure_only_compiles_for_other_targets(compiled):
    assert gpu._measure(gpu.CASES[0], "forward", "sm_80", False, False) is None
    row = gpu._measure(gpu.CASES[0], "forward", "sm_90a", True, False)
    assert compiled == ["sm_80", "sm_90a"]
    assert row and (row["target"], row["xla_taps"]) == ("sm_90a", None)


def test_measure_compiles_again_what_took_too_long(compiled):
    row = gpu._measure(gpu.CASES[0], "forward", "sm_90a", True, False)
    assert compiled == ["sm_90a", "sm_90a"]
    assert row and row["compile_seconds"] == 9.0


def test_failing_case(measured, capsys):
    measured["56x56x144 k31 s1 float32"] = "exit status -6: ptxas aborted"
    assert run("--ops=forward", "--targets=sm_90a", "--json=cost.json") == 1
    out, err = capsys.readouterr()
    assert "forward, 56x56x144 k31 s1 float32, sm_90a: exit status -6: ptxas aborted" in err
    assert len(out.splitlines()) == 2 + len(gpu.CASES) - 1
    assert len(json.loads(Path("cost.json").read_text())["meta"]["failures"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (
            ["--filter=nothing"],
            "--filter=nothing: found in none of the cases 56x56x144 k3 s1 float32, ",
        ),
        (["--filter=("], "--filter=(: not a regular expression: "),
        (["--ops=backward"], "--ops=backward: must be out of forward, input_grad, filter_grad"),
        (["--targets=sm_70"], "--targets=sm_70: must be out of sm_80, sm_90a, sm_100a"),
        (["--json=no/where"], "--json=no/where: not a file in a directory that can be written"),
        (["--check", "--targets=sm_80"], "--check: is of sm_90a, which is not among the --targets"),
        (["more"], "unexpected argument 'more': all arguments are --flag=value"),
        (["--batch=1"], "Unknown command line flag 'batch'"),
    ),
)
def test_errors(measured, capsys, arguments, message):
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("figures gpu: ")
    assert message in err
    assert err.count("\n") == 1


def test_missing_wheels(measured, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "_WHEELS", {"no-such-wheel": "", "other": "tool"})
    assert run() == 2
    expected = "no-such-wheel is not installed: pip install --no-deps no-such-wheel other\n"
    assert capsys.readouterr().err == f"figures gpu: {expected}"


def test_help(capsys):
    assert run("--help") == 0
    assert "x-times" not in (out := capsys.readouterr().out)
    assert "--[no]check: Fail if sm_90a is beyond what is accepted. Only compile for" in out
