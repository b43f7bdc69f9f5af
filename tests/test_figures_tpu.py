"""The static figures of TPUs: the reading of a listing, and with libtpu a compilation."""

import pytest
from figures import tpu

# A loop over the grid of 3 steps, in it a loop of 5 trips and in that one of 7. A branch delays two
# bundles; a predicated instruction of the outer loop stands among those of the inner one.
LISTING = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.hbm [shape: f32[8,128], index: 0] }
   0x1   :  { %s2 = smov.u32 0 }
   0x2 LB: > { %s3 = sphi %s2, %s4 /* copy :: iteration index, stage = 0 */ } /* Start region 10 */
   0x3   : > { %10 = sbr.rel (%p9_p1) target = $region20 }
   0x4   : > { %s5 = smov.u32 0 }
   0x5 LB: >> { %s6 = sphi %s5, %s7 } /* Start region 11 :: Start region 12 */
   0x6   : >> { %p8_p2 = scmp.ge.s32.totalorder %s7, 5 /* loop exit test */ }
   0x7   : > { %s9 = smov.u32 (%p8_p2), 0 }
   0x8 LB: >>> { %v1 = vld [vmem:[%s6]] } /* Start region 13 */
   0x9   : >>> { %p4_p3 = scmp.ge.s32.totalorder (!%p8_p2), %s7, 7 /* loop exit test */
    ;;  %v2 = vadd.f32 %v1, %v1 }
   0xa   : >>> { %11 = sbr.rel (!%p4_p3) target = $region13 }
   0xb   : >>> { %v3 = vadd.f32 %v1, %v1 }
   0xc   : >>> { %v4 = vadd.f32 %v1, %v1 }
   0xd   : >> { %12 = sbr.rel (!%p8_p2) target = $region12 }
   0xe   : >> { %v5 = vadd.f32 %v1, %v1 }
   0xf   : > { %p7_p4 = scmp.ge.s32.totalorder %s3, 5 /* loop exit test */ }
  0x10   : > { %13 = sbr.rel (!%p7_p4) target = $region10 }
  0x11   :  { %14 = vsyncpa [#allocation1], 1 }
"""


def test_issue_cycles():
    inner, middle, outer, once = 5, 5, 5, 3
    assert tpu.issue_cycles(LISTING) == once + 3 * (outer + 5 * (middle + 7 * inner))


def test_a_loop_without_a_static_count_is_no_figure():
    listing = LISTING.replace("%s7, 5 /* loop exit test */", "%s7, %s8")
    with pytest.raises(ValueError, match="not static"):
        tpu.issue_cycles(listing)


def test_floors():
    layer = tpu.Layer("", (8, 28, 28, 128), (3, 3))
    forward, filter_grad = (
        tpu.Problem(layer, op, "v5e", "float32") for op in ("forward", "filter_grad")
    )
    assert forward.valu_floor == 17 / 4
    assert filter_grad.valu_floor == 18 / 4
    # A register is 4096 bytes, which are read and written at 820 GB/s and 1.5 GHz.
    assert forward.hbm_floor == pytest.approx(2 * 4096 / 820 * 1.5, rel=1e-2)
    strided = tpu.Layer("", (8, 28, 28, 128), (3, 3), strides=(2, 2))
    assert tpu.Problem(strided, "input_grad", "v5e", "float32").valu_floor == 3.5 / 4


def test_limits():
    layer = tpu.Layer("", (128, 28, 28, 256), (3, 3))
    row = {"layer": layer, "op": "forward", "chip": "v5e", "dtype": "bfloat16"}
    strided = {**row, "layer": tpu.Layer("", (128, 28, 28, 256), (3, 3), strides=(2, 2))}
    doubled = {**row, "layer": tpu.Layer("", (8, 28, 28, 128), (3, 3), 2), "op": "input_grad"}

    def failures(row, ours, lax):
        named = (("pallas_tpu", ours), ("lax", lax))
        return tpu._table_failures(
            [{**row, "implementation": name, "value": value} for name, value in named]
        )

    assert not failures(row, 6.3, 7)
    assert not failures(strided, 6.4, 5)
    [failure] = failures(row, 6.4, 7)
    assert "times the VALU floor" in failure
    assert not failures(doubled, 19, 400)
    [failure] = failures(doubled, 21, 400)
    assert "a 20th" in failure


def jobs(*arguments):
    values = tpu._flag_values()
    values(["tpu", "--implementations=pallas_tpu", *arguments])
    return tpu._jobs(values)


def test_what_is_checked():
    sample, whole = jobs("--check"), jobs("--check", "--all")
    assert len(sample) < len(whole) / 3 and set(sample) < set(whole)
    assert len(set(sample)) == len(sample)
    # What has a limit has it on the first chip, and some of that on each of the others.
    limited = {p for kind, p, _ in whole if kind == "table" and tpu._factor(p)}
    checked = limited & {p for kind, p, _ in sample if kind == "table"}
    assert {p for p in limited if p.chip == "v5e"} < checked
    assert {(p.chip, p.layer.kernel) for p in limited} == {
        (p.chip, p.layer.kernel) for p in checked
    }
    # Pairs, of which networks of the table have but one each.
    pairs = [("layer", "op"), ("layer", "chip"), ("layer", "dtype"), ("op", "chip")]
    for kind in ("table", "matrix"):
        for a, b in pairs:
            found, every = (
                {(getattr(p, a), getattr(p, b)) for k, p, _ in some if k == kind}
                for some in (sample, whole)
            )
            assert found == every
    layers, every = ({p.layer for k, p, _ in x if k == "network"} for x in (sample, whole))
    assert layers == every


def test_a_table_is_of_all():
    assert jobs() == [
        ("table", p, "pallas_tpu") for kind, p, _ in jobs("--check", "--all") if kind == "table"
    ]


def test_what_moves_around_the_kernel():
    entry = """
ENTRY %main (x: bf16[8,4,4,128]) -> bf16[8,4,4,128] {
  %x = bf16[8,4,4,128]{3,0,2,1} parameter(0)
  %fusion.1 = bf16[4,4,8,128]{3,2,1,0} fusion(%x, %before), kind=kOutput, calls=%f.1
  %f.ref = f32[3,3,1,128]{3,2,1,0} fusion(%f), kind=kLoop, calls=%f.2
  %kernel = bf16[4,4,8,128]{3,2,1,0} custom-call(%fusion.1, %f.ref)
  ROOT %fusion.3 = bf16[8,4,4,128]{3,0,2,1} fusion(%kernel, %after), kind=kOutput, calls=%f.3
}
"""
    assert tpu._moved(entry, 8 * 4 * 4 * 128) == []
    loop = "  %c = bf16[4,4,8,128]{3,2,1,0} fusion(%fusion.1), kind=kLoop, calls=%f.4"
    copy = "  %d = bf16[4,4,8,128]{2,3,1,0} copy(%kernel)"
    moved = tpu._moved(f"{entry}{loop}\n{copy}\n", 8 * 4 * 4 * 128)
    assert [text.split()[0] for text in moved] == ["fusion", "copy"]


def test_the_command_line(capsys):
    assert tpu.main(["tpu", "--chips=v1"]) == 2
    assert "--chips=v1: must be out of v5e, v6e, tpu7x" in capsys.readouterr().err
    assert tpu.main(["tpu", "--help"]) == 0
    assert "--check" in capsys.readouterr().out
