"""The TPU kernel, run by NumPy: its views, its tiles and its limits. test_pallas has the specs."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pallas_numpy
import pytest
from cases import FRAMEWORKS, LAYERS, OPS, SMALL, TENSORFLOW, XLA, Case
from jax.extend.core import jaxprs_in_params

from jax_dwbp._impl import pallas_tpu, taps
from jax_dwbp._impl.pallas_tpu import plan as planning
from jax_dwbp._impl.pallas_tpu import sources
from jax_dwbp._spec import OPS as RECORDS

MB = 1 << 20

every_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def plan_anew(interpreted):
    planning.best_plan.cache_clear()
    yield
    planning.best_plan.cache_clear()


def plan_of(case, op: Any = "forward", dtype="float32") -> Any:
    return planning.best_plan(RECORDS[op], case.spec(), case.input[0], jnp.dtype(dtype))


def shapes_of(case, op, dtype):
    x, f, dy = (
        jax.ShapeDtypeStruct((1, *shape), dtype) for shape in (case.input, case.filter, case.output)
    )
    return {"forward": (x, f), "input_grad": (f, dy), "filter_grad": (x, dy)}[op]


def unsupported(case, op: Any = "forward", dtype="float32", platform: str | None = "tpu"):
    return pallas_tpu.unsupported(RECORDS[op], case.spec(), platform, *shapes_of(case, op, dtype))


def run(case, op, a, b):
    """On arrays with an axis of problems."""
    return pallas_numpy.run(functools.partial(getattr(pallas_tpu, op), case.spec()), a, b)


def check(case, op, dtype="float32"):
    a, b = case.operands(op, dtype)
    case.check(op, run(case, op, a[None], b[None])[0], case.expected(op, a, b), dtype)


# Each more than a block of N, of C and of loops over rows and columns, where N and C leave a rest.
VIEWS = {
    "gnhwc": Case("few_images", (3, 19, 21, 130), (3, 2, 130, 1), (2, 2)),
    "ghwnc": Case("images_in_sublanes", (33, 5, 11, 130), (3, 2, 130, 1), (2, 2)),
    "ghwcn": Case("images_in_lanes", (130, 9, 13, 17), (2, 3, 17, 1), (1, 2)),
}


@pytest.mark.parametrize("view", VIEWS)
@every_op
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_views(view, op, dtype):
    plan = plan_of(VIEWS[view], op, dtype)
    assert plan.view == view
    assert max(plan.grid["n"], plan.grid["c"]) > 1
    check(VIEWS[view], op, dtype)


@pytest.mark.parametrize("view", VIEWS)
@every_op
def test_views_as_they_are_compiled(not_interpreted, view, op):
    """In pieces of more rows than are interpreted at a time."""
    assert plan_of(VIEWS[view], op).accumulators[0] > 2
    check(VIEWS[view], op)


@pytest.mark.parametrize("case", [case for case in SMALL if case.filter[3] == 1], ids=str)
@every_op
def test_values_of_few_images_in_place(monkeypatch, case, op):
    """They are copied by default."""
    monkeypatch.setattr(planning, "_views", lambda spec, batch: ["ghwnc"])
    check(case, op)


# Borders of more pieces than are peeled, and taps that are further apart than a piece is wide.
@pytest.mark.parametrize(
    "case",
    (
        Case("border", (8, 9, 25, 3), (3, 3, 3, 1), padding=((9, 9), (9, 9))),
        Case("border of strides", (8, 9, 7, 3), (2, 3, 3, 1), (2, 3), ((9, 8), (8, 9))),
        Case("apart", (8, 9, 15, 3), (2, 3, 3, 1), dilations=(2, 5), padding="SAME"),
    ),
    ids=str,
)
@every_op
def test_wide_borders_in_place(case, op):
    plan = plan_of(case, op)
    assert not plan.copies
    looped = [
        window.pieces(size, peels=True)[1]
        for window, size in zip((plan.rows, plan.columns), plan.accumulators, strict=True)
    ]
    if case.name == "border" and op != "input_grad":
        assert all(looped) and not any(piece.inside for pieces in looped for piece in pieces)
    check(case, op)


@every_op
def test_pieces_meet_a_border_or_do_not(op):
    rows = plan_of(Case("", (8, 14, 28, 128), (3, 3, 128, 1)), op).rows
    before, looped, after = rows.pieces(2, peels=True)
    assert [(p.start, p.count) for p in (*before, *after)] == [(0, 2), (12, 2)]
    assert [p.start for p in looped] == [2, 4, 6, 8, 10] and all(p.inside for p in looped)
    before, looped, after = rows.pieces(4, peels=False)
    assert not before and len(looped) == 3 and [(p.start, p.count) for p in after] == [(12, 2)]
    assert not any(p.inside for p in looped)


def test_runs():
    assert sources._runs([-1, 0, 1], 1, 4) == [range(-1, 2)]
    assert sources._runs([-5, 0, 5], 1, 4) == [range(i, i + 1) for i in (-5, 0, 5)]
    assert sources._runs([0, 1, 2, 3, 4], 2, 4) == [range(0, 5, 2), range(1, 4, 2)]


@pytest.mark.parametrize(
    ("batch", "channels", "multiplier", "view"),
    (
        (1, 256, 1, "gnhwc"),
        (7, 32, 2, "gnhwc"),
        (8, 128, 1, "ghwnc"),
        (64, 128, 1, "ghwnc"),
        (63, 32, 1, "ghwnc"),
        (64, 32, 1, "ghwcn"),
        (64, 32, 2, "ghwnc"),
    ),
)
def test_the_view_is_the_layout_around_it(batch, channels, multiplier, view):
    case = Case("", (batch, 14, 14, channels), (3, 3, channels, multiplier))
    assert {plan_of(case, op).view for op in OPS} == {view}


TILED = Case("tiled", (32, 23, 10, 6), (5, 3, 6, 1), (2, 1), ((3, 0), (1, 1)), (2, 1))


@every_op
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_rows_in_tiles(monkeypatch, op, dtype):
    """The first, the middle and the last tile, which is not a whole one."""
    whole = plan_of(TILED, op, dtype)
    assert whole.rows.tiles == 1
    monkeypatch.setattr(planning, "VMEM", (whole.bytes // 2,) * 2)
    planning.best_plan.cache_clear()
    plan = plan_of(TILED, op, dtype)
    assert plan.rows.tiles > 2 and plan.columns.tiles == 1
    check(TILED, op, dtype)


@every_op
def test_rows_and_columns_in_tiles(monkeypatch, op):
    case = Case("both", (32, 11, 37, 6), (3, 4, 6, 1), (1, 2), ((2, 1), (5, 4)))
    monkeypatch.setattr(planning, "VMEM", (448 << 10,) * 2)
    plan = plan_of(case, op)
    assert plan.rows.tiles > 2 and plan.columns.tiles > 2
    check(case, op)


@every_op
def test_one_long_row_of_one_image(monkeypatch, op):
    """Cut, it can't have W in the sublanes."""
    case = Case("long", (1, 1, 100, 3), (1, 4, 3, 1), padding=((0, 0), (3, 0)))
    assert plan_of(case, op).view == "gnhwc"
    monkeypatch.setattr(planning, "VMEM", (MB // 4,) * 2)
    planning.best_plan.cache_clear()
    plan = plan_of(case, op)
    assert plan.view == "ghwnc" and plan.columns.tiles > 2
    check(case, op)


@every_op
def test_many_taps_are_looped_over(op):
    case = Case("looped", (1, 12, 13, 2), (11, 9, 2, 1))
    assert case.filter[0] * case.filter[1] > planning._UNROLLED
    check(case, op)


@every_op
@pytest.mark.parametrize(("channels", "multiplier"), ((130, 3), (5, 60)))
def test_lanes_of_a_channel_in_several_registers(op, channels, multiplier):
    case = Case("lanes", (2, 4, 5, channels), (2, 3, channels, multiplier))
    assert plan_of(case, op).chunks == 3
    check(case, op)


def gathers(jaxpr):
    inner = (gathers(j) for eqn in jaxpr.eqns for j in jaxprs_in_params(eqn.params))
    return sum(eqn.primitive.name == "gather" for eqn in jaxpr.eqns) + sum(inner)


@pytest.mark.parametrize("multiplier", (8, 32, 33, 200, 800))
def test_lanes_of_a_large_multiplier_are_looped_over(multiplier):
    """Each takes a gather of all registers, of which a program can't have any number."""
    case = Case("lanes", (2, 1, 8, 5), (1, 1, 5, multiplier))
    kernel = functools.partial(pallas_tpu.input_grad, case.spec())
    jaxpr = jax.make_jaxpr(kernel)(*shapes_of(case, "input_grad", "float32"))
    chunks = plan_of(case, "input_grad").chunks
    unrolled = multiplier * chunks <= 64
    assert gathers(jaxpr.jaxpr) == chunks * (multiplier if unrolled else 2)


@pytest.mark.parametrize(("batch", "multiplier"), ((2, 2), (2, 1), (8, 1)))
@every_op
def test_infinities_stay_in_their_lane(op, batch, multiplier):
    case = Case("inf", (batch, 4, 5, 3), (2, 3, 3, multiplier))
    a, b = case.operands(op)
    which = b if op == "input_grad" else a
    which[0, 2, 2, 1] = np.inf
    [got] = run(case, op, a[None], b[None])
    with np.errstate(invalid="ignore"):
        expected = case.expected(op, a, b)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    assert not np.isfinite(got).all() and np.isfinite(got).any()


def test_infinities_that_no_window_has_are_not_summed(monkeypatch):
    """The last tile has rows of dy that are not there, at the row of x that is left over."""
    case = Case("left over", (2, 24, 6, 3), (3, 3, 3, 1), (2, 1), "VALID")
    monkeypatch.setattr(planning, "VMEM", (180 << 10,) * 2)
    rows = plan_of(case, "filter_grad").rows
    assert rows.tiles > 1 and rows.axis.count % rows.tile
    x, dy = case.operands("filter_grad")
    x[:, -1] = np.inf
    [got] = run(case, "filter_grad", x[None], dy[None])
    case.check("filter_grad", got, case.expected("filter_grad", x, dy), "float32")


@every_op
def test_problems_have_filters_of_their_own(op):
    case = Case("problems", (2, 5, 6, 3), (3, 2, 3, 2), (1, 2))
    operands = [case.operands(op, seed=seed) for seed in range(3)]
    got = run(case, op, *(np.stack(arrays) for arrays in zip(*operands, strict=True)))
    for result, (x, y) in zip(got, operands, strict=True):
        case.check(op, result, case.expected(op, x, y), "float32")


@every_op
def test_no_tap_meets_the_input(op):
    case = Case("apart", (1, 2, 3, 2), (1, 1, 2, 2), (5, 5), ((1, 4), (1, 4)))
    check(case, op)


@every_op
def test_a_wrong_plan_fails(monkeypatch, op):
    """One tap too far: the tolerance would not hide it."""
    case = Case("wrong", (2, 5, 6, 3), (3, 3, 3, 1))
    check(case, op)
    right = taps.axes

    def wrong(op, spec):
        rows, columns = right(op, spec)
        first, *others = columns.phases[0]
        return rows, columns._replace(
            phases=[[first._replace(offset=first.offset + 1), *others], *columns.phases[1:]]
        )

    monkeypatch.setattr(planning, "axes", wrong)
    planning.best_plan.cache_clear()
    with pytest.raises(AssertionError, match="of what is allowed"):
        check(case, op)


# ---- What it can't run.


def test_unsupported():
    case = Case("small", (2, 5, 6, 3), (3, 3, 3, 1))
    for op in OPS:
        assert unsupported(case, op) is None
        assert unsupported(case, op, "bfloat16") is None
        for dtype in ("float16", "float64"):
            reason = unsupported(case, op, dtype)
            assert reason == f"a TPU computes in float32 and bfloat16, got {dtype}"
    wide = Case("wide", (2, 5, 200, 3), (1, 129, 3, 1))
    assert unsupported(wide) == "filters may have at most 128 columns, got 129"
    assert unsupported(Case("widest", (2, 5, 200, 3), (1, 128, 3, 1))) is None
    for strides, reason in (
        ((16, 16), None),
        ((1, 257), "strides may have a product of at most 256, got (1, 257)"),
    ):
        strided = Case("strided", (2, 5, 6, 3), (3, 3, 3, 1), strides)
        assert unsupported(strided, "input_grad") == reason
        assert unsupported(strided) is None
    many = Case("many", (2, 5, 6, 3), (3, 3, 3, 2000))
    assert "at most 4096 outputs, got 6000" in str(unsupported(many))


@every_op
def test_columns_are_cut_as_the_last_resort(op):
    """Here one tile of rows needs more than the least VMEM, and all smaller ones do."""
    plan = plan_of(Case("", (128, 28, 28, 128), (31, 31, 128, 1)), op, "bfloat16")
    assert plan.bytes > planning.VMEM[0]
    assert (plan.rows.tiles, plan.columns.tiles) == (1, 1)


@every_op
def test_tiles_have_few_rows_that_are_not_there(op):
    plan = plan_of(Case("", (128, 112, 112, 32), (3, 3, 32, 1)), op, "bfloat16")
    assert plan.rows.tiles > 1 and plan.rows.tile * plan.rows.tiles == 112


@every_op
@pytest.mark.parametrize("size", (199, 240, 1024))
def test_the_fewest_rows_are_moved_of_what_fits(monkeypatch, op, size):
    """Of all tiles of rows, which are not tried one by one."""
    case = Case("", (8, size, 10, 6), (5, 3, 6, 1), (2, 1))
    whole = plan_of(case, op)
    for divisor in (1, 2, 3, 5, 8):
        limit = whole.bytes // divisor
        monkeypatch.setattr(planning, "VMEM", (limit,) * 2)
        planning.best_plan.cache_clear()
        window = whole.rows
        every = [
            whole._replace(rows=planning.window_of(window.axis, tiles, 1))
            for tiles in range(1, window.axis.count + 1)
        ]
        fitting = [plan for plan in every if plan.bytes <= limit]
        assert plan_of(case, op) == min(fitting, key=lambda plan: plan.rows.moved)


@every_op
def test_what_it_takes_fits_the_vmem(op):
    fitting = Case("fits", (32, 4096, 64, 128), (31, 31, 128, 1))
    assert plan_of(fitting, op).bytes <= planning.VMEM[-1]
    for beyond in (
        Case("lanes", (32, 40, 40, 128), (31, 31, 128, 32)),
        Case("taps", (1, 10**5, 1, 16), (57_345, 1, 16, 1)),
    ):
        assert "VMEM" in str(unsupported(beyond, op))


# ---- Lowering, which needs no TPU.


def lower(case, op, dtype="float32"):
    function = jax.jit(getattr(pallas_tpu, op), static_argnums=0)
    traced = function.trace(case.spec(), *shapes_of(case, op, dtype))
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@every_op
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("x64", (False, True))
def test_it_lowers_for_a_tpu(not_interpreted, view, op, x64):
    with jax.enable_x64(x64):
        assert "tpu_custom_call" in lower(VIEWS[view], op, jnp.bfloat16)


@pytest.mark.parametrize(
    ("case", "op"),
    [
        *itertools.product(SMALL, OPS),
        *itertools.product((*TENSORFLOW, *XLA, *FRAMEWORKS, *LAYERS), ("input_grad",)),
    ],
    ids=str,
)
def test_the_table_lowers(not_interpreted, case, op):
    assert "tpu_custom_call" in lower(case, op)


# Columns that are left over by those that are computed at a time: one of them has a single row of
# lanes, of which JAX's own gather is another one.
@pytest.mark.parametrize("width", (1, 2, 15, 16, 17, 18, 33, 34))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("batch", (1, 8))
def test_lanes_of_any_width_lower(not_interpreted, batch, stride, width):
    for multiplier in (2, 3):
        filter = (3, 3, 8, multiplier)
        case = Case("widths", (batch, 3, width, 8), filter, (stride, stride))
        assert "tpu_custom_call" in lower(case, "input_grad")


@every_op
def test_one_image_in_sublanes_lowers(not_interpreted, op):
    """Of a long row, which is cut: each column is a single row of lanes."""
    case = Case("long", (1, 1, 200_000, 3), (1, 4, 3, 2), padding=((0, 0), (3, 0)))
    plan = plan_of(case, op)
    assert plan.block["n"] == 1 and plan.columns.tiles > 1
    assert "tpu_custom_call" in lower(case, op)


@every_op
def test_steps_that_add_to_one_result_are_in_order(op):
    """Of the filter gradient; a chip of several cores may divide those of the others."""
    case = VIEWS[next(iter(VIEWS))]
    jaxpr = jax.make_jaxpr(functools.partial(getattr(pallas_tpu, op), case.spec()))(
        *shapes_of(case, op, jnp.bfloat16)
    )
    [call] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    semantics = call.params["compiler_params"].dimension_semantics
    assert len(semantics) == len(call.params["grid_mapping"].grid)
    assert ("arbitrary" in semantics) == (op == "filter_grad")
