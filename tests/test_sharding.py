"""`shard_map` and sharded inputs on 8 host devices: values, gradients of replicated operands."""

import dataclasses
import functools
import itertools

import fresh_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HAS_NATIVE, IMPLEMENTATIONS, OPS, OTHER_RANKS, Case
from covering import covering
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_dwbp
from jax_dwbp._spec import OPS as RECORDS

pytestmark = pytest.mark.usefixtures("unoptimized")
P = PartitionSpec
CASE = Case("sharded", (8, 5, 6, 2), (3, 3, 2, 2), (2, 1))
BIG_FILTER = Case("sharded_big_filter", (8, 9, 9, 2), (9, 8, 2, 1))
every_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(scope="module")
def mesh():
    assert len(jax.devices()) == 8, "conftest.py asks for 8 host devices before jax is imported"
    return jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))


def specs(op):
    return {
        "forward": ((P("batch"), P()), P("batch")),
        "input_grad": ((P(), P("batch")), P("batch")),
        "filter_grad": ((P("batch"), P("batch")), P()),
    }[op]


def sharded(case, op, mesh, **options):
    """The op on shards of the batch; filter gradients are summed over them."""
    in_specs, out_specs = specs(op)

    def local(a, b):
        result = case.run(op, a, b, **options)
        return jax.lax.psum(result, "batch") if op == "filter_grad" else result

    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def with_gradients(run):
    """`run` and the gradients by its operands of the sum of its result's sines."""

    def both(a, b):
        result, transposed = jax.vjp(run, a, b)
        return run(a, b), *transposed(jnp.cos(result))

    return both


def expected_with_gradients(case, op, a, b):
    """What `with_gradients` is for an op: the gradients are the two other ops."""
    results = [case.expected(op, a, b)]
    record = RECORDS[op]
    known = {**dict(zip(record.operands, (a, b), strict=True)), record.result: np.cos(results[0])}
    others = {other.result: other for other in RECORDS.values()}
    for other in (others[name] for name in record.operands):
        results.append(case.expected(other.name, *(known[operand] for operand in other.operands)))
    return results


def assert_close(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w.astype("float64"), atol=1e-11)


def check_values_and_gradients(mesh, op, jit, case=CASE, **options):
    both = with_gradients(sharded(case, op, mesh, **options))
    operands = case.operands(op, "float64")
    got = (jax.jit(both) if jit else both)(*operands)
    assert_close(got, expected_with_gradients(case, op, *operands))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("forward_mode", [False, True])
@every_op
def test_values_and_gradients(mesh, op, forward_mode, jit):
    check_values_and_gradients(mesh, op, jit, forward_mode=forward_mode)


@covering(
    case=[dataclasses.replace(case, input=(8, *case.input[1:])) for case in OTHER_RANKS[::4]],
    op=OPS,
    forward_mode=[False, True],
)
def test_lines_and_volumes(mesh, op, forward_mode, case):
    check_values_and_gradients(mesh, op, True, case=case, forward_mode=forward_mode)


@covering(op=OPS, implementation=IMPLEMENTATIONS, forward_mode=[False, True], jit=[False, True])
def test_values_and_gradients_by_name(mesh, op, implementation, forward_mode, jit):
    options = {"implementation": implementation, "forward_mode": forward_mode}
    check_values_and_gradients(mesh, op, jit, **options)


@covering(case=[CASE, BIG_FILTER], implementation=IMPLEMENTATIONS, check_vma=[False, True])
def test_gradient_inside(mesh, case, implementation, check_vma):
    """`grad` of the local loss: the replicated filter's gradient is summed over the shards."""
    x, f = case.operands("forward", "float64")
    both = with_gradients(functools.partial(case.run, "forward", implementation=implementation))

    def local(x, f):
        y, dx, df = both(x, f)
        return y, dx, df if check_vma else jax.lax.psum(df, "batch")

    got = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("batch"), P()),
            out_specs=(P("batch"), P("batch"), P()),
            check_vma=check_vma,
        )
    )(x, f)
    assert_close(got, expected_with_gradients(case, "forward", x, f))


def lowered_for_sharded_inputs(mesh, op):
    """The op's program, checked, as it is before it is partitioned."""
    in_specs, _ = specs(op)
    operands = CASE.operands(op)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(operands, in_specs, strict=True)
    ]
    lowered = jax.jit(functools.partial(CASE.run, op)).lower(*placed)
    CASE.check(op, lowered.compile()(*placed), CASE.expected(op, *operands), "float32")
    return lowered.as_text()


@every_op
def test_sharded_inputs_under_jit(mesh, op):
    assert lowered_for_sharded_inputs(mesh, op).count("@CustomSPMDPartitioning") == 1


def without_shardy():
    import warnings

    import jax
    from jax.sharding import AxisType
    from test_sharding import OPS, lowered_for_sharded_inputs

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    for op in OPS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            text = lowered_for_sharded_inputs(mesh, op)
        lost = sum("divided among devices, by GSPMD" in str(w.message) for w in caught)
        print(op, "sdy." in text, "@CustomSPMDPartitioning" in text, lost)


def test_without_shardy():
    """GSPMD knows no rule and is left to what it does for lax, of which a warning tells."""
    found = fresh_process.call(
        without_shardy, JAX_USE_SHARDY_PARTITIONER="0", JAX_DISABLE_MOST_OPTIMIZATIONS="1"
    )
    assert found.splitlines() == [f"{op} False False {int(HAS_NATIVE)}" for op in OPS]


@pytest.fixture(scope="module")
def explicit_mesh():
    return jax.make_mesh((8,), ("i",), axis_types=(AxisType.Explicit,))


EXPLICIT = Case("explicit", (8, 16, 6, 8), (3, 3, 8, 2), (2, 1))


def check_explicit_sharding(explicit_mesh, op, sharded, jit, case=EXPLICIT, **options):
    """Values and gradients, with types that say so."""
    filters = {"forward": 1, "input_grad": 0, "filter_grad": 2}[op]
    whole = [None] * case.rank
    activation = {"batch": P("i"), "channels": P(None, *whole, "i"), "rows": P(None, "i")}
    of_filter = P(*whole, "i", None) if sharded == "channels" else P()
    specs = [of_filter if i == filters else activation[sharded] for i in range(3)]
    operands = case.operands(op, "float64")
    both = with_gradients(functools.partial(case.run, op, **options))
    with jax.set_mesh(explicit_mesh):
        placed = [
            jax.device_put(x, NamedSharding(explicit_mesh, spec))
            for x, spec in zip(operands, specs[:2], strict=True)
        ]
        got = (jax.jit(both) if jit else both)(*placed)
    assert_close(got, expected_with_gradients(case, op, *operands))
    for g, spec in zip(got, [specs[2], *specs[:2]], strict=True):
        assert jax.typeof(g).sharding.is_equivalent_to(
            NamedSharding(explicit_mesh.abstract_mesh, spec), g.ndim
        )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("sharded", ["batch", "channels", "rows"])
@every_op
def test_explicit_sharding(explicit_mesh, op, sharded, data_format, jit):
    check_explicit_sharding(explicit_mesh, op, sharded, jit, data_format=data_format)


@covering(
    op=OPS,
    implementation=IMPLEMENTATIONS,
    sharded=["batch", "channels", "rows"],
    data_format=["NHWC", "NCHW"],
    jit=[False, True],
)
def test_explicit_sharding_by_name(explicit_mesh, op, implementation, sharded, data_format, jit):
    options = {"implementation": implementation, "data_format": data_format}
    check_explicit_sharding(explicit_mesh, op, sharded, jit, **options)


@covering(
    case=(
        Case("line", (8, 16, 8), (3, 8, 2), (2,)),
        Case("volume", (8, 16, 5, 4, 8), (3, 2, 2, 8, 1), (2, 1, 2)),
    ),
    op=OPS,
    sharded=["batch", "channels", "rows"],
    data_format=["NHWC", "NCHW"],
)
def test_explicit_sharding_of_lines_and_volumes(explicit_mesh, case, op, sharded, data_format):
    """The first spatial axis is what "rows" are."""
    check_explicit_sharding(explicit_mesh, op, sharded, True, case, data_format=data_format)


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)], ids=str)
@every_op
def test_vmap_over_an_explicitly_sharded_axis(op, in_axes):
    """Values and derivatives of two orders, of the map and mapped, and the types that they have."""
    case = Case("explicit", (3, 6, 5, 2), (3, 3, 2, 2), (2, 1))
    problems = [case.operands(op, "float64", seed=seed) for seed in range(8)]
    operands = [
        np.stack(stack) if axis == 0 else stack[0]
        for stack, axis in zip(zip(*problems, strict=True), in_axes, strict=True)
    ]

    def loss(run, a, b):
        return jnp.sum(jnp.sin(run(a, b)))

    run = functools.partial(case.run, op)
    mapped = jax.vmap(run, in_axes)
    gradient = jax.grad(functools.partial(loss, run), argnums=(0, 1))
    second = jax.grad(lambda a, b: sum(jnp.sum(g**2) for g in gradient(a, b)), argnums=(0, 1))
    gradient_of_mapped = jax.grad(functools.partial(loss, mapped), argnums=(0, 1))

    @jax.jit
    def everything(*operands):
        others = (gradient_of_mapped, jax.vmap(gradient, in_axes), jax.vmap(second, in_axes))
        return mapped(*operands), *itertools.chain(*(other(*operands) for other in others))

    as_operands = ["i" if axis == 0 else None for axis in in_axes]
    want = everything(*operands)
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, P(entry)) for x, entry in zip(operands, as_operands, strict=True)
        ]
        got = everything(*placed)
    for g, w, entry in zip(got, want, ["i", *as_operands, *"iiii"], strict=True):
        np.testing.assert_allclose(g, w, atol=1e-10)
        assert [*jax.typeof(g).sharding.spec] == [entry] + [None] * (g.ndim - 1)


@every_op
def test_nested_vmap_over_an_explicitly_sharded_axis(op):
    """That of the outer map, with which the axis of the inner one is joined."""
    case = Case("explicit", (2, 5, 4, 2), (3, 2, 2, 1))
    problems = [case.operands(op, "float64", seed=seed) for seed in range(8)]
    operands = [np.stack(x).reshape(4, 2, *x[0].shape) for x in zip(*problems, strict=True)]
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, P("i")) for x in operands]
        got = jax.jit(jax.vmap(jax.vmap(functools.partial(case.run, op))))(*placed)
    assert [*jax.typeof(got).sharding.spec] == ["i"] + [None] * (got.ndim - 1)
    for result, problem in zip(got.reshape(8, *got.shape[2:]), problems, strict=True):
        np.testing.assert_allclose(
            result, case.expected(op, *problem).astype("float64"), atol=1e-12
        )


@pytest.mark.parametrize("sharded", [P("i"), P(None, "i"), P(None, None, "i")], ids=str)
@pytest.mark.parametrize("out_sharding", [None, P("i")], ids=str)
def test_stand_in_with_explicit_sharding(sharded, out_sharding):
    """Of the batch, rows and columns, on a mesh with an axis that nothing uses."""
    x, f = Case("explicit", (4, 8, 8, 2), (3, 3, 2, 1)).operands("forward", "float64")
    f = f.reshape(3, 3, 1, 2)

    def loss(x, f, **options):
        y = jax_dwbp.conv_general_dilated(
            *(x, f, (1, 1), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
            **options,
        )
        return jnp.sum(jnp.sin(y)), y

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    want, wanted_y = gradient(x, f)
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, sharded), jax.device_put(f, P())
        got, y = jax.jit(functools.partial(gradient, out_sharding=out_sharding))(*placed)
    for g, w in zip((*got, y), (*want, wanted_y), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-12)
    spec = sharded if out_sharding is None else out_sharding
    assert jax.typeof(y).sharding.spec == P(*spec, *[None] * (4 - len(spec)))


def test_other_explicit_sharding_is_refused(explicit_mesh):
    """Operands that do not go together, a part that needs more than its neighbours have, and a
    sharded filter: an error, not a wrong type."""
    case = Case("rows", (8, 8, 6, 8), (3, 3, 8, 2))
    x, f = case.operands("forward")
    _, dy = case.operands("input_grad")
    tall = np.ones((5, 3, 8, 1), np.float32)
    by_batch, by_rows, by_channels = P("i"), P(None, "i"), P(None, None, None, "i")
    with jax.set_mesh(explicit_mesh):

        def put(x, spec):
            return jax.device_put(x, NamedSharding(explicit_mesh, spec))

        for x_spec, filter_, filter_spec in (
            (by_channels, f, P()),
            (by_rows, tall, P()),
            (P(), np.ones((8, 3, 8, 1), np.float32), P("i")),
        ):
            with pytest.raises(NotImplementedError, match="alike in both operands"):
                jax_dwbp.depthwise_conv2d_native(
                    put(x, x_spec), put(filter_, filter_spec), (1, 1), "SAME"
                )
        with pytest.raises(NotImplementedError, match="alike in both operands"):
            jax_dwbp.depthwise_conv2d_native_backprop_filter(
                put(x, by_batch), f.shape, put(dy, by_rows), (1, 1), "SAME"
            )


def test_explicit_sharding_in_the_place_of_lax(explicit_mesh):
    rng = np.random.default_rng(0)
    x, f = rng.uniform(size=(8, 5, 6, 4)), rng.uniform(size=(3, 3, 1, 8))

    def run(conv, x, f):
        numbers = ("NHWC", "HWIO", "NHWC")
        return conv(x, f, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4)

    with jax.set_mesh(explicit_mesh):
        x = jax.device_put(x, NamedSharding(explicit_mesh, P("i")))
        f = jax.device_put(f, NamedSharding(explicit_mesh, P()))
        got, want = (
            run(jax_dwbp.conv_general_dilated, x, f),
            run(jax.lax.conv_general_dilated, x, f),
        )
    assert jax.typeof(got) == jax.typeof(want)
    np.testing.assert_allclose(got, want, atol=1e-12)


def in_the_place_of_lax(x, f):
    return jax_dwbp.conv_general_dilated(
        *(x, f.reshape(3, 3, 1, 8), (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=8,
    )


def two_layers(run, x, f):
    return jax.lax.scan(lambda x, _: (run(x, f), None), x, None, length=2)[0]


# Each goes on to compute with a gradient, which needs it to have the type of the filter.
@pytest.mark.parametrize(
    "derive",
    [
        lambda loss, run, x, f: f - jax.grad(loss, argnums=1)(x, f),
        lambda loss, run, x, f: jax.grad(lambda f: loss(run(x, f), f))(f),
        lambda loss, run, x, f: jax.grad(lambda f: jnp.sum(jax.grad(loss, argnums=1)(x, f)))(f),
        lambda loss, run, x, f: jax.grad(lambda x: jnp.sum(two_layers(run, x, f)))(x),
    ],
    ids=["step", "layers", "twice", "scan"],
)
@pytest.mark.parametrize("function", ["reverse_mode", "forward_mode", "in_the_place_of_lax"])
def test_filter_from_before_the_explicit_mesh(explicit_mesh, function, derive):
    case = Case("before_the_mesh", (8, 5, 6, 8), (3, 3, 8, 1))
    run = functools.partial(case.run, "forward", forward_mode=function == "forward_mode")
    run = in_the_place_of_lax if function == "in_the_place_of_lax" else run

    def loss(x, f):
        return jnp.sum(jnp.sin(run(x, f)))

    x, f = map(jnp.asarray, case.operands("forward", "float64"))
    want = derive(loss, run, x, f)
    with jax.set_mesh(explicit_mesh):
        x = jax.device_put(x, NamedSharding(explicit_mesh, P("i")))
        np.testing.assert_allclose(derive(loss, run, x, f), want, atol=1e-10)


@every_op
def test_explicit_sharding_without_a_mesh_in_the_context(explicit_mesh, op):
    case = Case("explicit", (8, 5, 6, 2), (3, 3, 2, 2), (2, 1))
    run = functools.partial(case.run, op)
    gradient = jax.grad(lambda a, b: jnp.sum(jnp.sin(run(a, b))), argnums=(0, 1))
    operands = case.operands(op, "float64")
    activation, of_filter = P("i"), P()
    *in_specs, out_spec = {
        "forward": (activation, of_filter, activation),
        "input_grad": (of_filter, activation, activation),
        "filter_grad": (activation, activation, of_filter),
    }[op]
    placed = [
        jax.device_put(x, NamedSharding(explicit_mesh, spec))
        for x, spec in zip(operands, in_specs, strict=True)
    ]
    want = [run(*operands), *gradient(*operands)]
    # A gradient of anything outside of a jit JAX itself refuses there.
    got = [jax.jit(run)(*placed), *jax.jit(gradient)(*placed)]
    for g, w in zip([*got, run(*placed)], [*want, want[0]], strict=True):
        np.testing.assert_allclose(g, w, atol=1e-11)
    assert got[0].sharding.is_equivalent_to(NamedSharding(explicit_mesh, out_spec), got[0].ndim)


def test_explicit_sharding_over_two_meshes_is_refused(explicit_mesh):
    x, f = CASE.operands("forward")
    other = jax.make_mesh((2, 4), ("j", "k"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.device_put(x, NamedSharding(explicit_mesh, P("i")))
    f = jax.device_put(f, NamedSharding(other, P(None, None, "j")))
    with pytest.raises(ValueError, match="sharded over one mesh"):
        jax_dwbp.depthwise_conv2d_native(x, f, (1, 1), "SAME")
