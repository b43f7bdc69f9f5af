"""Sharded arrays under plain `jit` on 8 host devices: values, and what the program sends."""

import contextlib
import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HAS_NATIVE, IMPLEMENTATIONS, KERNELS, OPS, Case
from covering import covering
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_dwbp._spec import OPS as RECORDS

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
ACTIVATIONS = {"batch": P("i"), "channels": P(None, None, None, "i"), "height": P(None, "i")}
FILTERS = {"batch": P(), "channels": P(None, None, "i"), "height": P()}
every_op = pytest.mark.parametrize("op", OPS)
NAMES = (*IMPLEMENTATIONS, *KERNELS)
pytestmark = pytest.mark.usefixtures("interpreted")


def mesh_of(**axes):
    sizes = tuple(axes.values())
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)


def specs(op, activation, of_filter):
    """Of the operands and of the result."""
    return {
        "forward": (activation, of_filter, activation),
        "input_grad": (of_filter, activation, activation),
        "filter_grad": (activation, activation, of_filter),
    }[op]


def compiled(function, operands, mesh, in_specs, out_specs=None):
    """The compiled function, its operands where they belong, and what it sends."""
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(operands, in_specs, strict=True)
    ]
    out = None if out_specs is None else jax.tree.map(lambda s: NamedSharding(mesh, s), out_specs)
    executable = jax.jit(function, out_shardings=out).lower(*placed).compile()
    return executable, placed, sent_by(executable)


def sent_by(executable):
    """For each kind of collective, the elements of each that one device gets."""
    sent = {kind: [] for kind in COLLECTIVES}
    for line in str(executable.as_text()).splitlines():
        match = re.match(r"\s*(?:ROOT )?\S+ = (.*?) ([a-z-]+)\(", line)
        if match and match[2] in sent:
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                sent[match[2]].append(math.prod(int(n) for n in shape.split(",") if n))
    return {kind: sizes for kind, sizes in sent.items() if sizes}


def check_that_nothing_is_sent(op, sharded, multiplier, **options):
    """But for the filter gradient's sum over the batch."""
    case = Case("sharded", (8, 5, 6, 8), (3, 3, 8, multiplier), (2, 1))
    run = functools.partial(case.run, op, **options)
    operands = case.operands(op)
    *in_specs, out_spec = specs(op, ACTIVATIONS[sharded], FILTERS[sharded])
    program, placed, sent = compiled(run, operands, mesh_of(i=8), in_specs)
    result = program(*placed)
    assert result.sharding.spec == out_spec  # by itself
    summed = op == "filter_grad" and sharded == "batch"
    assert sent == ({"all-reduce": [9 * 8 * multiplier]} if summed else {})
    case.check(op, result, case.expected(op, *operands), "float32")


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("sharded", ["batch", "channels"])
@every_op
def test_batch_and_channels_send_nothing(op, sharded, multiplier, data_format):
    check_that_nothing_is_sent(op, sharded, multiplier, data_format=data_format)


@covering(
    op=OPS,
    implementation=NAMES,
    sharded=["batch", "channels"],
    multiplier=[1, 2],
    data_format=["NHWC", "NCHW"],
)
def test_nothing_is_sent_by_name(op, implementation, sharded, multiplier, data_format):
    options = {"implementation": implementation, "data_format": data_format}
    check_that_nothing_is_sent(op, sharded, multiplier, **options)


@every_op
def test_channels_that_do_not_divide(op):
    """The batch does, whatever C is."""
    case = Case("sharded", (8, 5, 6, 6), (3, 3, 6, 2))
    operands = case.operands(op)
    *in_specs, _ = specs(op, ACTIVATIONS["batch"], P())
    program, placed, sent = compiled(
        functools.partial(case.run, op), operands, mesh_of(i=8), in_specs
    )
    assert set(sent) == ({"all-reduce"} if op == "filter_grad" else set())
    case.check(op, program(*placed), case.expected(op, *operands), "float32")


def with_arrays(function, operands, shardings, mesh):
    return jax.jit(function).lower(*map(jax.device_put, operands, shardings))


def with_types(function, operands, shardings, mesh):
    types = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(operands, shardings, strict=True)
    )
    return jax.jit(function).lower(*types)


def with_in_shardings(function, operands, shardings, mesh):
    return jax.jit(function, in_shardings=shardings).lower(*operands)


def with_in_shardings_of_types(function, operands, shardings, mesh):
    types = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
    return jax.jit(function, in_shardings=shardings).lower(*types)


def with_set_mesh(function, operands, shardings, mesh):
    with jax.set_mesh(mesh):
        return jax.jit(function, in_shardings=[s.spec for s in shardings]).lower(*operands)


def with_constraints(function, operands, shardings, mesh):
    def constrained(*operands):
        return function(*map(jax.lax.with_sharding_constraint, operands, shardings))

    return jax.jit(constrained).lower(*operands)


def with_explicit_axes(function, operands, shardings, mesh):
    mesh = jax.make_mesh(
        mesh.axis_sizes, mesh.axis_names, (AxisType.Explicit,), devices=mesh.devices.ravel()
    )
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(x, NamedSharding(mesh, s.spec))
            for x, s in zip(operands, shardings, strict=True)
        )
        return jax.jit(function).lower(*placed)


WAYS = (
    *(with_arrays, with_types, with_in_shardings, with_in_shardings_of_types),
    *(with_set_mesh, with_constraints, with_explicit_axes),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("sharded", ACTIVATIONS)
@every_op
def test_mesh_is_found_however_it_is_given(op, way, sharded):
    """Each device runs the kernel of one device, and what is sent is no more than has to be."""
    case = Case("sharded", (8, 8, 6, 8), (3, 3, 8, 1))
    operands, mesh = case.operands(op), mesh_of(i=4)
    *in_specs, _ = specs(op, ACTIVATIONS[sharded], FILTERS[sharded])
    shardings = [NamedSharding(mesh, spec) for spec in in_specs]
    program = way(functools.partial(case.run, op), operands, shardings, mesh).compile()
    assert ("jax_dwbp_depthwise_conv2d" in str(program.as_text())) == HAS_NATIVE
    sent = sent_by(program)
    rows = {"collective-permute": [8 * 6 * 8] * 2} if sharded == "height" else {}
    summed = op == "filter_grad" and sharded != "channels"
    assert sent == rows | ({"all-reduce": [9 * 8]} if summed else {})


@every_op
def test_mesh_of_the_result_is_enough(op):
    case = Case("sharded", (8, 8, 6, 8), (3, 3, 8, 1))
    *_, out_spec = specs(op, ACTIVATIONS["channels"], FILTERS["channels"])
    out = NamedSharding(mesh_of(i=8), out_spec)
    operands = case.operands(op)
    program = jax.jit(functools.partial(case.run, op), out_shardings=out).lower(*operands).compile()
    assert ("jax_dwbp_depthwise_conv2d" in str(program.as_text())) == HAS_NATIVE
    assert sent_by(program) == {}
    case.check(op, program(*operands), case.expected(op, *operands), "float32")


@every_op
def test_mesh_of_the_context_is_enough(op):
    """Nothing is divided, and each device runs the kernel."""
    case = Case("whole", (8, 8, 6, 8), (3, 3, 8, 1))
    operands = case.operands(op)
    with jax.set_mesh(mesh_of(i=8)):
        program = jax.jit(functools.partial(case.run, op)).lower(*operands).compile()
    assert ("jax_dwbp_depthwise_conv2d" in str(program.as_text())) == HAS_NATIVE
    assert sent_by(program) == {}


def lost(function, *operands, **options):
    """What warnings say of the kernel, that is lost where they come."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowered = function.trace(*operands).lower(**options)
    messages = [str(warning.message) for warning in caught]
    assert ("CustomSPMDPartitioning" in lowered.as_text()) == (not messages)
    return " ".join(messages)


@pytest.mark.skipif(not HAS_NATIVE, reason="it was not compiled")
def test_warnings_say_why_the_kernel_is_lost():
    case = Case("sharded", (4, 8, 6, 6), (3, 3, 6, 1))
    run = functools.partial(case.run, "forward")
    operands = case.operands("forward")
    two_by_three, three_by_two = mesh_of(a=2, b=3), mesh_of(c=3, d=2)
    cut = {
        "": (NamedSharding(two_by_three, P("a")), NamedSharding(two_by_three, P())),
        "by meshes that cut them differently": (
            NamedSharding(two_by_three, P("a")),
            NamedSharding(three_by_two, P()),
        ),
    }
    for reason, shardings in cut.items():
        message = lost(jax.jit(run, in_shardings=shardings), *operands)
        assert reason in message and bool(message) == bool(reason)
    divided = jax.jit(run, in_shardings=cut[""])
    message = lost(divided, *operands, lowering_platforms=("cpu", "tpu"))
    assert "run by xla_taps and not by native_cpu" in message
    assert "lowered for several platforms" in message


@pytest.mark.parametrize("other", (1, 2))
def test_axes_of_a_mesh_outside_of_a_shard_map(other):
    """One of size 1 divides nothing."""
    case = Case("sharded", (8, 8, 6, 8), (3, 3, 8, 1))
    mesh, operands = mesh_of(i=4, j=other), case.operands("forward")
    sharded = jax.shard_map(
        functools.partial(case.run, "forward"),
        mesh=mesh,
        in_specs=(P("i"), P()),
        out_specs=P("i"),
        axis_names={"i"},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = jax.jit(sharded).lower(*operands).compile()
    assert [
        "not in the hands of a `jax.shard_map`" in str(warning.message) for warning in caught
    ] == [True] * (HAS_NATIVE and other > 1)
    kernel = "jax_dwbp_depthwise_conv2d" in str(program.as_text())
    assert kernel == (HAS_NATIVE and other == 1)
    case.check("forward", program(*operands), case.expected("forward", *operands), "float32")


@every_op
def test_float64_that_is_off_where_it_is_compiled(op):
    case = Case("sharded", (8, 8, 6, 8), (3, 3, 8, 1))
    operands, mesh = case.operands(op, "float64"), mesh_of(i=4)
    *in_specs, _ = specs(op, ACTIVATIONS["height"], FILTERS["height"])
    shardings = [NamedSharding(mesh, spec) for spec in in_specs]
    lowered = with_in_shardings(functools.partial(case.run, op), operands, shardings, mesh)
    with jax.enable_x64(False):
        program = lowered.compile()
    case.check(op, program(*operands), case.expected(op, *operands), "float64")


def test_warning_where_there_is_no_mesh():
    """What XLA divides is known only after the op, so the kernel is lost, but not silently."""
    case = Case("sharded", (8, 8, 6, 8), (3, 3, 8, 1))
    operands = case.operands("forward")

    def constrained(x, f, **options):
        y = case.run("forward", x, f, **options)
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh_of(i=8), P("i")))

    match = "run by xla_taps and not by native_cpu: it is divided among devices, and no mesh"
    with pytest.warns(UserWarning, match=match) if HAS_NATIVE else contextlib.nullcontext():
        program = jax.jit(constrained).lower(*operands).compile()
    assert "jax_dwbp_depthwise_conv2d" not in str(program.as_text())
    case.check("forward", program(*operands), case.expected("forward", *operands), "float32")
    # Nothing is lost by what XLA can divide.
    jax.jit(functools.partial(constrained, implementation="xla_taps")).lower(*operands)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_gradient_of_a_network(implementation):
    """Two layers and all their gradients, batch and channels sharded: sums of filters, no more."""
    first = Case("first", (4, 9, 8, 4), (3, 3, 4, 2), (2, 2))
    second = Case("second", first.output, (5, 5, 8, 1))
    mesh = mesh_of(batch=4, model=2)
    x, f = first.operands("forward")
    _, g = second.operands("forward")

    def loss(x, f, g, implementation=implementation):
        y = jnp.sin(first.run("forward", x, f, implementation=implementation))
        return jnp.sum(second.run("forward", y, g, implementation=implementation) ** 2)

    activation, of_filter = P("batch", None, None, "model"), P(None, None, "model")
    in_specs = (activation, of_filter, of_filter)
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    program, placed, sent = compiled(gradient, (x, f, g), mesh, in_specs, in_specs)
    assert set(sent) == {"all-reduce"}
    assert sum(sent["all-reduce"]) == (f.size + g.size) // 2
    exact = [a.astype(np.float64) for a in (x, f, g)]
    want = jax.grad(functools.partial(loss, implementation="lax"), argnums=(0, 1, 2))(*exact)
    for got, w in zip(program(*placed), want, strict=True):
        np.testing.assert_allclose(got, w, rtol=1e-5, atol=1e-5 * np.max(np.abs(w)))


# Filter, stride, low and high pad and dilation of the rows, for heights that 2, 4 and 8 divide.
ROWS = {
    "same": (3, 1, 1, 1, 1),
    "large": (5, 1, 2, 2, 1),
    "even": (4, 1, 1, 2, 1),
    "causal": (4, 1, 3, 0, 1),
    "dilated": (3, 1, 2, 2, 2),
    "strided": (3, 2, 0, 1, 1),
    "strided_low": (5, 2, 2, 1, 1),
    "strided_dilated": (3, 2, 2, 1, 2),
    "stride_above_filter": (2, 4, 0, 0, 1),
    "three_to_one": (5, 3, 1, 1, 1),
}


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("name", ROWS)
@every_op
def test_height_sends_the_rows_that_windows_share(op, name, parts):
    kernel, stride, low, high, dilation = ROWS[name]
    height = 96
    case = Case(name, (2, height, 5, 3), (kernel, 2, 3, 2), (stride, 1),
                ((low, high), (1, 0)), (dilation, 1))  # fmt: skip
    _, out, width, depth = case.output
    assert out == height // stride
    operands = case.operands(op)
    in_specs = specs(op, P(None, "i"), P())[:2]
    run = functools.partial(case.run, op)
    program, placed, sent = compiled(run, operands, mesh_of(i=parts), in_specs)
    result = program(*placed)
    case.check(op, result, case.expected(op, *operands), "float32")
    if op != "filter_grad":
        assert result.sharding.spec == P(None, "i")

    reach = (kernel - 1) * dilation
    if op == "input_grad":
        # Of the dy rows o that meet the rows h = o * stride - low + k * dilation of a part.
        row, before, after = 2 * width * depth, -((low - reach) // stride), (low + stride - 1)
        after = (height // parts - 1 + low) // stride + 1 - out // parts
    else:
        row, before, after = 2 * 5 * 3, low, reach + 1 - stride - low
    halos = sorted(row * rows for rows in (before, after) if rows > 0)
    assert sorted(sent.pop("collective-permute", [])) == halos
    assert sent == ({"all-reduce": [kernel * 2 * 3 * 2]} if op == "filter_grad" else {})


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        (Case("crop", (1, 32, 4, 2), (9, 3, 2, 1), (1, 1), ((2, 0), (1, 1)), (2, 1)), 2),
        (Case("parts_of_all_phases", (1, 40, 4, 2), (5, 3, 2, 1), (3, 1), ((5, 5), (1, 1))), 4),
    ],
    ids=str,
)
@every_op
def test_rows_whose_parts_are_not_alike(op, case, parts):
    """Where P is not H / stride, both are divided if the caller says so."""
    height, out = case.input[1], case.output[1]
    assert out * case.strides[0] != height and out % parts == height % parts == 0
    operands = case.operands(op)
    *in_specs, out_spec = specs(op, P(None, "i"), P())
    run = functools.partial(case.run, op)
    program, placed, sent = compiled(run, operands, mesh_of(i=parts), in_specs, out_spec)
    assert "all-gather" not in sent and len(sent["collective-permute"]) <= 2
    case.check(op, program(*placed), case.expected(op, *operands), "float32")


def check_divided(case, op, name, spec, parts):
    """The array `name`, be it an operand or the result, is divided by `spec`, and nothing else.

    For a result nothing is gathered: each device computes its part.
    """
    operands = case.operands(op)
    names = (*RECORDS[op].operands, RECORDS[op].result)
    *in_specs, out_spec = (spec if array == name else P() for array in names)
    run = functools.partial(case.run, op)
    program, placed, sent = compiled(run, operands, mesh_of(i=parts), in_specs, out_spec)
    result = program(*placed)
    shared = [array.is_fully_replicated for array in (*placed, result)]
    assert shared == [array != name for array in names]
    if name == RECORDS[op].result:
        assert "all-gather" not in sent
    case.check(op, result, case.expected(op, *operands), "float32")


@pytest.mark.parametrize(("parts", "channels", "multiplier"), [(8, 6, 4), (8, 2, 4), (6, 3, 2)])
@every_op
def test_lanes_that_divide_and_channels_that_do_not(op, parts, channels, multiplier):
    """Parts of the lanes that are not whole channels, and half or a third of the mesh that are."""
    case = Case("lanes", (2, 5, 4, channels), (3, 3, channels, multiplier))
    check_divided(case, op, "dy", P(None, None, None, "i"), parts)


@pytest.mark.parametrize(("parts", "height", "stride"), [(8, 16, 4), (6, 18, 2), (4, 12, 6)])
@every_op
def test_rows_of_the_input_that_divide_and_of_the_output_that_do_not(op, parts, height, stride):
    case = Case("rows", (2, height, 4, 2), (3, 3, 2, 1), (stride, 1))
    assert height % parts == 0 != case.output[1] % parts
    check_divided(case, op, "x", P(None, "i"), parts)


@every_op
def test_rows_of_the_output_that_divide_and_of_the_input_that_do_not(op):
    case = Case("rows", (2, 34, 4, 2), (3, 3, 2, 1), padding="VALID")
    check_divided(case, op, "dy", P(None, "i"), 8)


@pytest.mark.parametrize(
    ("case", "gathered"),
    [
        (Case("beyond_the_neighbour", (2, 8, 5, 2), (5, 3, 2, 1)), True),
        (Case("all_of_the_neighbour", (2, 8, 5, 2), (3, 3, 2, 1)), False),
        (Case("parts_without_a_phase", (2, 24, 5, 2), (3, 3, 2, 1), (3, 1)), False),
        (Case("only_padding", (2, 8, 5, 2), (3, 3, 2, 1), (1, 1), ((9, 9), (1, 1))), True),
    ],
    ids=str,
)
@every_op
def test_rows_are_gathered_where_they_can_not_be_divided(op, case, gathered):
    operands = case.operands(op)
    in_specs = specs(op, P(None, "i"), P())[:2]
    program, placed, sent = compiled(
        functools.partial(case.run, op), operands, mesh_of(i=8), in_specs
    )
    assert ("all-gather" in sent) == gathered
    case.check(op, program(*placed), case.expected(op, *operands), "float32")


@every_op
def test_one_axis_of_the_mesh_for_two_of_the_arrays(op):
    """Which can divide the images, the rows or the channels, but not two of these."""
    case = Case("twice", (8, 8, 5, 8), (3, 3, 8, 1))
    operands = case.operands(op)
    of = {"x": P("i"), "f": P(None, None, "i"), "dy": P(None, "i")}
    in_specs = [of[name] for name in RECORDS[op].operands]
    program, placed, _ = compiled(functools.partial(case.run, op), operands, mesh_of(i=8), in_specs)
    case.check(op, program(*placed), case.expected(op, *operands), "float32")


@every_op
def test_empty(op):
    """What has nothing to sum is divided as it is."""
    case = Case("empty", (8, 5, 6, 3), (3, 3, 3, 0))
    operands = case.operands(op)
    in_specs = specs(op, P("i"), P())[:2]
    program, placed, sent = compiled(
        functools.partial(case.run, op), operands, mesh_of(i=8), in_specs
    )
    assert not sent
    np.testing.assert_array_equal(program(*placed), case.expected(op, *operands))


def check_all_axes(op, **options):
    case = Case("all", (2, 8, 8, 4), (3, 3, 4, 2))
    operands = case.operands(op)
    mesh = mesh_of(h=2, w=2, c=2)
    in_specs = specs(op, P(None, "h", "w", "c"), P(None, None, "c"))[:2]
    run = functools.partial(case.run, op, **options)
    program, placed, sent = compiled(run, operands, mesh, in_specs)
    assert set(sent) == {"collective-permute"} | ({"all-reduce"} if op == "filter_grad" else set())
    case.check(op, program(*placed), case.expected(op, *operands), "float32")


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@every_op
def test_all_axes_at_once(op, data_format):
    check_all_axes(op, data_format=data_format)


@covering(op=OPS, implementation=NAMES, data_format=["NHWC", "NCHW"])
def test_all_axes_at_once_by_name(op, implementation, data_format):
    check_all_axes(op, implementation=implementation, data_format=data_format)


@pytest.mark.parametrize(
    ("case", "of", "axis"),
    [
        (case, of, axis)
        for case in (
            Case("one_channel", (8, 8, 5, 1), (3, 3, 1, 8)),
            Case("one_row", (8, 8, 5, 2), (3, 3, 2, 1), (8, 1)),
            Case("one_row_and_column", (8, 2, 2, 8), (3, 3, 8, 2), (2, 2)),
            Case("one_image", (1, 8, 5, 2), (3, 3, 2, 2)),
            Case("one_tap", (8, 8, 5, 2), (1, 1, 2, 1)),
        )
        for of, shape in (("x", case.input), ("f", case.filter), ("dy", case.output))
        for axis, size in enumerate(shape)
        if size % 8 == 0
    ],
    ids=str,
)
@every_op
def test_axes_of_size_one(op, case, of, axis):
    """With each axis that eight devices divide, of each array."""
    check_divided(case, op, of, P(*[None] * axis, "i"), 8)


LINE = Case("line", (2, 16, 4), (5, 4, 2), (2,), ((2, 1),))
VOLUME = Case("volume", (2, 8, 16, 4, 4), (3, 3, 3, 4, 1), (1, 2, 1))


@covering(
    divided=[(LINE, 1), (VOLUME, 1), (VOLUME, 2), (VOLUME, 3)],
    op=OPS,
    data_format=["NHWC", "NCHW"],
)
def test_each_axis_of_lines_and_volumes(op, divided, data_format):
    """What windows share is sent to the neighbours, and nothing else."""
    case, axis = divided
    parts = 4
    operands = case.operands(op)
    *in_specs, out_spec = specs(op, P(*[None] * axis, "i"), P())
    run = functools.partial(case.run, op, data_format=data_format)
    program, placed, sent = compiled(run, operands, mesh_of(i=parts), in_specs, out_spec)
    size, kernel, stride = case.input[axis], case.filter[axis - 1], case.strides[axis - 1]
    low = 2 if case is LINE else (kernel - stride) // 2
    shape = case.output if op == "input_grad" else case.input
    of_one = math.prod(shape) // shape[axis]
    if op == "input_grad":
        before = -((low - kernel + 1) // stride)
        after = (size // parts - 1 + low) // stride + 1 - size // stride // parts
    else:
        before, after = low, kernel - stride - low
    assert sorted(sent.pop("collective-permute")) == sorted(
        of_one * count for count in (before, after) if count > 0
    )
    assert sent == ({"all-reduce": [math.prod(case.filter)]} if op == "filter_grad" else {})
    case.check(op, program(*placed), case.expected(op, *operands), "float32")


@every_op
def test_all_axes_of_a_volume(op):
    operands, mesh = VOLUME.operands(op), mesh_of(d=2, h=2, w=2)
    *in_specs, out_spec = specs(op, P(None, "d", "h", "w"), P())
    run = functools.partial(VOLUME.run, op)
    program, placed, sent = compiled(run, operands, mesh, in_specs, out_spec)
    assert set(sent) == {"collective-permute"} | ({"all-reduce"} if op == "filter_grad" else set())
    VOLUME.check(op, program(*placed), VOLUME.expected(op, *operands), "float32")


@pytest.mark.parametrize(
    ("case", "of", "axis", "op"),
    [
        (case, of, axis, OPS[(i + axis) % 3])
        for case in (
            Case("line", (8, 16, 8), (8, 8, 2)),
            Case("volume", (8, 8, 16, 8, 8), (8, 3, 1, 8, 1), (1, 2, 8)),
        )
        for i, (of, shape) in enumerate(
            {"x": case.input, "f": case.filter, "dy": case.output}.items()
        )
        for axis, size in enumerate(shape)
        if size % 8 == 0
    ],
    ids=str,
)
def test_axes_of_lines_and_volumes_that_divide(op, case, of, axis):
    check_divided(case, op, of, P(*[None] * axis, "i"), 8)


@pytest.mark.parametrize("own_filters", [False, True])
@pytest.mark.parametrize("axis", ["problems", "batch"])
@every_op
def test_vmap(op, own_filters, axis):
    case = Case("vmapped", (8, 4, 5, 2), (3, 2, 2, 2))
    problems = [case.operands(op, seed=seed) for seed in range(8)]
    filters = {"forward": 1, "input_grad": 0}.get(op)
    stacked, in_axes, in_specs = [], [], []
    for i, operand in enumerate(zip(*problems, strict=True)):
        shared = i == filters and not own_filters
        stacked.append(operand[0] if shared else np.stack(operand))
        in_axes.append(None if shared else 0)
        divided = P("i") if axis == "problems" else P(None, "i") if i != filters else P()
        in_specs.append(P() if shared else divided)
    run = jax.vmap(functools.partial(case.run, op), in_axes)
    program, placed, sent = compiled(run, stacked, mesh_of(i=8), in_specs)
    assert set(sent) == ({"all-reduce"} if (op, axis) == ("filter_grad", "batch") else set())
    for i, result in enumerate(program(*placed)):
        a, b = (x if axis is None else x[i] for x, axis in zip(stacked, in_axes, strict=True))
        case.check(op, result, case.expected(op, a, b), "float32")


@every_op
def test_vmap_over_an_axis_of_the_mesh(op):
    """`spmd_axis_name`: constraints inside divide the mapped axis too, here of whole arrays."""
    case = Case("spmd", (4, 6, 5, 4), (3, 3, 4, 2))
    problems = [case.operands(op, seed=seed) for seed in range(2)]
    mesh = mesh_of(problems=2, batch=4)
    *in_specs, out_spec = specs(op, P("batch"), P())

    def run(a, b):
        result = case.run(op, *map(jax.lax.with_sharding_constraint, (a, b), shardings))
        return jax.lax.with_sharding_constraint(result, NamedSharding(mesh, out_spec))

    shardings = [NamedSharding(mesh, spec) for spec in in_specs]
    stacked = [np.stack(operand) for operand in zip(*problems, strict=True)]
    mapped = jax.vmap(run, spmd_axis_name="problems")
    program, placed, sent = compiled(mapped, stacked, mesh, [P(), P()])
    assert set(sent) == ({"all-reduce"} if op == "filter_grad" else set())
    results = program(*placed)
    assert results.sharding.spec == P("problems", *out_spec)
    for result, operands in zip(results, problems, strict=True):
        case.check(op, result, case.expected(op, *operands), "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sum_of_devices_is_rounded_once(dtype):
    case = Case("half", (8, 9, 8, 2), (3, 3, 2, 1))
    operands = case.operands("filter_grad", dtype)
    program, placed, _ = compiled(
        functools.partial(case.run, "filter_grad"), operands, mesh_of(i=8), [P("i"), P("i")]
    )
    case.check("filter_grad", program(*placed), case.expected("filter_grad", *operands), dtype)


@pytest.mark.parametrize("order", ["ab", "ba", "ca", "bc"])
@pytest.mark.parametrize(
    "case",
    [
        Case("alike", (2, 24, 5, 2), (5, 3, 2, 2)),
        Case("parts_of_all_phases", (1, 40, 4, 2), (5, 3, 2, 1), (3, 1), ((5, 5), (1, 1))),
    ],
    ids=str,
)
@every_op
def test_axes_of_the_mesh_in_any_order(op, case, order):
    """Parts of the rows that follow each other in another order than the mesh's."""
    operands = case.operands(op)
    *in_specs, out_spec = specs(op, P(None, tuple(order)), P())
    run = functools.partial(case.run, op)
    mesh = mesh_of(a=2, b=2, c=2)
    program, placed, sent = compiled(run, operands, mesh, in_specs, out_spec)
    assert "collective-permute" in sent and "all-gather" not in sent
    case.check(op, program(*placed), case.expected(op, *operands), "float32")


@every_op
def test_mesh_whose_devices_are_not_in_order(op):
    case = Case("reversed", (8, 16, 6, 4), (3, 3, 4, 1))
    operands = case.operands(op)
    devices = np.array(jax.devices())[[3, 1, 0, 2, 7, 5, 6, 4]].reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("h", "c"), axis_types=(AxisType.Auto,) * 2)
    in_specs = specs(op, P(None, "h", None, "c"), P(None, None, "c"))[:2]
    program, placed, _ = compiled(functools.partial(case.run, op), operands, mesh, in_specs)
    case.check(op, program(*placed), case.expected(op, *operands), "float32")
