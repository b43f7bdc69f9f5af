"""The interpreter of PTX: what small kernels compute, and what it must not let pass."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from figures import ptx

THREADS = 64


def kernel(body, threads=THREADS, parameters=2, shared=""):
    """A kernel of those parameters, whose addresses are in %rd1, %rd2, ...; %r1 is the thread."""
    names = [f"k_param_{i}" for i in range(parameters)]
    declared = ",\n".join(f".param .u64 .ptr .align 16 {name}" for name in names)
    loads = "\n".join(f"ld.param::entry.b64 %rd{i}, [{name}];" for i, name in enumerate(names, 1))
    [found] = ptx.parse(
        f"""
        .version 9.0
        .target sm_90a
        {shared}
        .visible .entry k(
        {declared}
        )
        .reqntid {threads}, 1, 1
{{
        .reg .pred %p<9>;
        .reg .b16 %rs<9>;
        .reg .b32 %r<40>;
        .reg .b64 %rd<20>;
        {loads}
        mov.u32 %r1, %tid.x; // a comment; with a semicolon
        {body}
        ret;
}}
"""
    )
    return found


def run(body, inputs, outputs, blocks=1, **options):
    found = kernel(body, parameters=len(inputs) + len(outputs), **options)
    memory = ptx.Memory(inputs, outputs)
    ptx.run(found, (blocks, 1, 1), memory.addresses, memory, shared_bytes=0)
    return memory.outputs()


def unary(instructions, operand, dtype: Any = np.uint32):
    """What 32-bit instructions make of %r2, of `operand`, in %r3."""
    operand = np.asarray(operand)
    body = f"""
        mul.wide.u32 %rd8, %r1, 4;
        add.s64 %rd9, %rd1, %rd8;
        add.s64 %rd10, %rd2, %rd8;
        ld.global.b32 %r2, [%rd9];
        {instructions}
        st.global.b32 [%rd10], %r3;
    """
    [result] = run(body, [operand], [np.empty(operand.shape, dtype)], threads=operand.size)
    return result


def words(seed=0, low=-(2**31), high=2**31):
    return np.random.default_rng(seed).integers(low, high, THREADS).astype(np.int32)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    (
        ("add.s32 %r3, %r2, -7;", lambda a: a - 7),
        ("sub.s32 %r3, 5, %r2;", lambda a: 5 - a),
        ("mul.lo.s32 %r3, %r2, %r2;", lambda a: a * a),
        ("mul.hi.s32 %r3, %r2, 715827883;", lambda a: a * 715827883 >> 32),
        ("mul.hi.u32 %r3, %r2, 715827883;", lambda a: a % 2**32 * 715827883 >> 32),
        ("mad.lo.s32 %r3, %r2, -5, 3;", lambda a: -5 * a + 3),
        ("div.s32 %r3, %r2, 7;", lambda a: np.trunc(a / 7).astype(np.int64)),
        ("rem.s32 %r3, %r2, 7;", lambda a: np.fmod(a, 7)),
        ("div.u32 %r3, %r2, 7;", lambda a: a % 2**32 // 7),
        ("min.s32 %r3, %r2, 0;", lambda a: np.minimum(a, 0)),
        ("max.u32 %r3, %r2, 9;", lambda a: np.maximum(a % 2**32, 9)),
        ("shl.b32 %r3, %r2, 5;", lambda a: a << 5),
        ("shl.b32 %r3, %r2, 32;", lambda a: 0 * a),
        ("shr.s32 %r3, %r2, 40;", lambda a: a >> 31),
        ("shr.u32 %r3, %r2, 31;", lambda a: a % 2**32 >> 31),
        ("and.b32 %r3, %r2, 0xffff0000;", lambda a: a & 0xFFFF0000),
        ("not.b32 %r3, %r2;", lambda a: ~a),
        ("neg.s32 %r3, %r2;", lambda a: -a),
        ("bfe.u32 %r3, %r2, 3, 4;", lambda a: a >> 3 & 15),
        ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, 2, %p1;", lambda a: np.where(a < 0, 1, 2)),
        (
            "setp.gt.u32 %p1, %r2, 9; setp.lt.and.s32 %p2, %r2, 0, %p1; selp.b32 %r3, 1, 2, !%p2;",
            lambda a: np.where(a < 0, 2, 1),
        ),
        (
            "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};",
            lambda a: a << 16 | a % 2**32 >> 16,
        ),
        ("prmt.b32 %r3, %r2, 0, 0x4012;", lambda a: a >> 16 & 255 | a & 0xFF00 | (a & 255) << 16),
        ("cvt.s64.s32 %rd5, %r2; shr.s64 %rd5, %rd5, 4; cvt.u32.u64 %r3, %rd5;", lambda a: a >> 4),
        ("cvt.u16.u32 %rs1, %r2; mul.wide.u16 %r3, %rs1, 7;", lambda a: a % 2**16 * 7),
    ),
)
def test_integers(instructions, expected):
    operand = words()
    wide = expected(operand.astype(np.int64))
    np.testing.assert_array_equal(unary(instructions, operand), wide.astype(np.uint32))


def test_fma_rounds_once():
    a = np.full(THREADS, 1 + 2.0**-12, np.float32)
    body = "fma.rn.f32 %r3, %r2, %r2, 0fBF800000;"
    assert np.float32(a[0] * a[0]) - np.float32(1) != 2**-11 + 2.0**-24
    np.testing.assert_array_equal(unary(body, a, np.float32), np.float32(2**-11 + 2.0**-24))
    twice = "mul.rn.f32 %r4, %r2, %r2; add.rn.f32 %r3, %r4, 0fBF800000;"
    np.testing.assert_array_equal(unary(twice, a, np.float32), a * a - np.float32(1))


@pytest.mark.parametrize(
    ("name", "half"), (("bf16", ml_dtypes.bfloat16), ("f16", np.float16)), ids=str
)
def test_halves(name, half):
    a = np.random.default_rng(0).uniform(-9, 9, THREADS).astype(np.float32)
    packed = f"cvt.rn.{name}x2.f32 %r3, %r2, 0f3F800000;"
    halves = unary(packed, a).view(half).reshape(THREADS, 2)
    np.testing.assert_array_equal(halves[:, 1], a.astype(half))
    np.testing.assert_array_equal(halves[:, 0], half(1))
    there_and_back = f"cvt.rn.{name}.f32 %rs1, %r2; cvt.f32.{name} %r3, %rs1;"
    expected = a.astype(half).astype(np.float32)
    np.testing.assert_array_equal(unary(there_and_back, a, np.float32), expected)


@pytest.mark.parametrize(
    ("comparison", "expected"),
    (("lt", (1, 0, 0, 0)), ("ne", (1, 1, 0, 0)), ("ltu", (1, 0, 0, 1)), ("eq", (0, 0, 1, 0))),
)
def test_comparisons_with_a_nan(comparison, expected):
    a = np.tile(np.array((1, 3, 2, np.nan), np.float32), THREADS // 4)
    body = f"setp.{comparison}.f32 %p1, %r2, 0f40000000; selp.b32 %r3, 1, 0, %p1;"
    np.testing.assert_array_equal(unary(body, a), np.tile(expected, THREADS // 4))


def test_vectors_and_masks_and_blocks():
    """Four words at a time, of which threads beyond the last leave theirs alone."""
    a = np.arange(480, dtype=np.float32).reshape(120, 4)
    body = """
        mov.u32 %r2, %ctaid.x;
        mad.lo.s32 %r3, %r2, 64, %r1;
        setp.lt.s32 %p1, %r3, 120;
        mul.wide.s32 %rd8, %r3, 16;
        add.s64 %rd9, %rd1, %rd8;
        add.s64 %rd10, %rd2, %rd8;
        mov.b32 %r4, 0f00000000;
        mov.b32 %r5, %r4;
        mov.b32 %r6, %r4;
        mov.b32 %r7, %r4;
        @%p1 ld.global.v4.b32 { %r4, %r5, %r6, %r7 }, [ %rd9 + 0 ];
        add.f32 %r4, %r4, %r7;
        @%p1 st.global.v4.b32 [%rd10+0], {%r4, %r5, %r6, %r7};
    """
    [result] = run(body, [a], [np.empty_like(a)], blocks=2)
    np.testing.assert_array_equal(result, a + np.array((1, 0, 0, 0), np.float32) * a[:, 3:])
    unmasked = body.replace("@%p1 ", "")
    for missing in ("ld", "st"):
        body = unmasked.replace("ld.", "@%p1 ld." if missing == "st" else "ld.")
        body = body.replace("st.", "@%p1 st." if missing == "ld" else "st.")
        with pytest.raises(ptx.BadAccess, match="16 bytes at 1920 of buffer") as error:
            run(body, [a], [np.empty_like(a)], blocks=2)
        assert f"in k: {missing}.global.v4.b32" in error.value.__notes__[0]


def test_eight_words_and_pairs():
    """As for the newest GPUs."""
    body = """
        shl.b32 %r2, %r1, 5;
        cvt.u64.u32 %rd8, %r2;
        add.s64 %rd9, %rd1, %rd8;
        add.s64 %rd10, %rd2, %rd8;
        ld.global.v8.b32 {%r3, %r4, %r5, %r6, %r7, %r8, %r9, %r10}, [%rd9];
        mov.b64 %rd3, {%r3, %r4};
        mov.b64 %rd4, {%r5, %r6};
        mov.b64 %rd5, {%r7, %r8};
        fma.rn.f32x2 %rd6, %rd3, %rd4, %rd5;
        add.rn.f32x2 %rd7, %rd6, %rd3;
        mov.b64 {%r3, %r4}, %rd6;
        mov.b64 {_, %r6}, %rd7;
        st.global.v8.b32 [%rd10], {%r3, %r4, %r5, %r6, %r7, %r8, %r9, %r10};
    """
    a = np.arange(8 * THREADS, dtype=np.float32).reshape(THREADS, 8)
    [result] = run(body, [a], [np.empty_like(a)])
    np.testing.assert_array_equal(result[:, :2], a[:, :2] * a[:, 2:4] + a[:, 4:6])
    np.testing.assert_array_equal(result[:, 3], result[:, 1] + a[:, 1])
    np.testing.assert_array_equal(result[:, [2, 4, 5, 6, 7]], a[:, [2, 4, 5, 6, 7]])


def test_loops_and_divergence():
    """Each thread adds up the numbers to its own: some are through while others go on."""
    body = """
        mov.b32 %r3, 0;
        mov.b32 %r4, 0;
        $L__BB0_1:
        setp.ge.s32 %p1, %r4, %r2;
        @%p1 bra $L__BB0_2;
        add.s32 %r4, %r4, 1;
        add.s32 %r3, %r3, %r4;
        bra.uni $L__BB0_1;
        $L__BB0_2:
    """
    a = words(low=0, high=20)
    np.testing.assert_array_equal(unary(body, a), a * (a + 1) // 2)


def test_executed():
    found = kernel("setp.lt.s32 %p1, %r1, 32; @%p1 bra $L; mov.b32 %r2, 0;\n$L:\nmov.b32 %r3, 0;")
    memory = ptx.Memory([], [np.empty(4, np.int32)] * 2)
    executed = ptx.run(found, (3, 1, 1), memory.addresses, memory)
    counts = dict(zip([i.text for i in found.instructions], executed, strict=True))
    assert counts["mov.b32 %r2, 0"] == 3  # the second of two warps
    assert counts["mov.b32 %r3, 0"] == 6
    assert ptx.run(found, (3, 1, 1), memory.addresses, memory, blocks=[1]).max() == 2


@pytest.mark.parametrize(
    ("mode", "amount", "source"),
    (
        ("bfly", 5, lambda i: i ^ 5),
        ("idx", 7, lambda i: 7 + 0 * i),
        ("up", 3, lambda i: np.where(i < 3, i, i - 3)),
        ("down", 3, lambda i: np.where(i > 28, i, i + 3)),
    ),
)
def test_shuffles(mode, amount, source):
    a = words()
    result = unary(f"shfl.sync.{mode}.b32 %r3, %r2, {amount}, 31, -1;", a).view(np.int32)
    expected = a.reshape(-1, 32)[:, source(np.arange(32))]
    np.testing.assert_array_equal(result.reshape(-1, 32), expected)


SHARED = ".shared .align 16 .b8 buffer[256];"
REVERSED = """
    mov.b32 %r9, buffer;
    shl.b32 %r4, %r1, 2;
    add.s32 %r5, %r9, %r4;
    sub.s32 %r6, 252, %r4;
    st.shared.b32 [%r5], %r2;
    bar.sync 0;
    ld.shared.b32 %r3, [%r6];
"""


def test_shared_memory():
    """Each of the blocks has its own."""
    a = np.arange(3 * THREADS, dtype=np.int32)
    body = f"""
        mov.u32 %r7, %ctaid.x;
        mad.lo.s32 %r8, %r7, 64, %r1;
        mul.wide.s32 %rd8, %r8, 4;
        add.s64 %rd9, %rd1, %rd8;
        add.s64 %rd10, %rd2, %rd8;
        ld.global.b32 %r2, [%rd9];
        {REVERSED}
        st.global.b32 [%rd10], %r3;
    """
    [result] = run(body, [a], [np.empty_like(a)], blocks=3, shared=SHARED)
    np.testing.assert_array_equal(result.reshape(3, -1), a.reshape(3, -1)[:, ::-1])
    with pytest.raises(ptx.BadAccess, match="at 252 of buffer"):
        run(body, [a], [np.empty_like(a)], blocks=3, shared=SHARED.replace("256", "252"))


def test_matrices():
    """Row i // 4, words 2 * (i % 4) of an 8x8 matrix of halves belong to thread i."""
    body = """
        mov.b32 %r9, buffer;
        shl.b32 %r4, %r1, 4;
        and.b32 %r4, %r4, 127;
        add.s32 %r4, %r4, %r9;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {%r2};
        bar.sync 0;
        shl.b32 %r5, %r1, 2;
        add.s32 %r5, %r5, %r9;
        ld.shared.b32 %r6, [%r5];
        add.s32 %r6, %r6, 1;
        bar.sync 0;
        st.shared.b32 [%r5], %r6;
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r4];
    """
    a = np.arange(32, dtype=np.int32)
    memory = ptx.Memory([a], [np.empty_like(a)])
    found = kernel(
        f"""
        mul.wide.u32 %rd8, %r1, 4;
        add.s64 %rd9, %rd1, %rd8;
        add.s64 %rd10, %rd2, %rd8;
        ld.global.b32 %r2, [%rd9];
        {body}
        st.global.b32 [%rd10], %r3;
        """,
        threads=32,
        shared=SHARED,
    )
    ptx.run(found, (1, 1, 1), memory.addresses, memory)
    np.testing.assert_array_equal(memory.outputs()[0], a + 1)


@pytest.mark.parametrize(
    ("body", "message"),
    (
        ("ld.global.b32 %r2, [%rd1+256];", "4 bytes at 256 of buffer 1"),
        ("ld.global.b32 %r2, [%rd1+-4];", "4 bytes"),
        ("ld.global.b32 %r2, [%rd1+2];", "4 bytes at 2 of buffer 1"),
        ("ld.global.v2.b32 {%r2, %r3}, [%rd1+4];", "8 bytes at 4 of buffer 1"),
        ("mov.b64 %rd5, 0; ld.global.b32 %r2, [%rd5];", "4 bytes at 0 of buffer 0"),
        ("st.global.b32 [%rd1], %r1;", "1 of them are read only"),
        ("st.global.b16 [%rd2+256], 0;", "2 bytes at 256 of buffer 2"),
        ("add.s32 %r2, %r3, 1;", "%r3 is read before it is written"),
        ("mov.u32 %r2, %smid;", "%smid is read before it is written"),
        ("div.s32 %r2, %r1, 0;", "a division by zero"),
        ("setp.lt.s32 %p1, %r1, 3; @%p1 bra $L; bar.sync 0;\n$L:\n", "not at the barrier"),
    ),
)
def test_bad_accesses(body, message):
    a = np.zeros(THREADS, np.int32)
    with pytest.raises(ptx.BadAccess, match=message):
        run(body, [a], [np.empty_like(a)])


@pytest.mark.parametrize(
    "body",
    (
        "sin.approx.f32 %r2, %r1;",
        "fma.rz.f32 %r2, %r1, %r1, %r1;",
        "add.sat.s32 %r2, %r1, %r1;",
        "cvt.rz.f32.s32 %r2, %r1;",
        "cvt.bf16.f32 %rs1, %r1;",
        "ld.global.v3.b32 {%r2, %r3, %r4}, [%rd1];",
        "ld.const.b32 %r2, [%rd1];",
        "st.global.b32 [%rd2], {%r1, %r1};",
        "shfl.sync.bfly.b32 %r2, %r1, 1, 7, -1;",
        "bar.sync.aligned 0;",
        "atom.global.add.u32 %r2, [%rd2], 1;",
        "mov.u32 %rd5, %r1;",
        "mov.u64 %rd5, %r1;",
        "add.s32 %r2, %r1;",
        "mov.b32 out, %r1;",
    ),
)
def test_unknown_instructions(body):
    a = np.zeros(THREADS, np.int32)
    with pytest.raises(ptx.Unsupported):
        run(body, [a], [np.empty_like(a)])


def test_what_was_not_stored_is_nan():
    [result] = run("", [], [np.empty(3, np.float32)])
    assert np.isnan(result).all()


def test_arguments():
    memory = ptx.Memory([], [])
    with pytest.raises(ValueError, match="takes"):
        ptx.run(kernel(""), (1, 1, 1), memory.addresses, memory)
