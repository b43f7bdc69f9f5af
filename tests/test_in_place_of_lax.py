"""lax's convolutions run here after `install` and in the context, and nothing else is changed."""

import functools
import pickle
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HAS_NATIVE
from jax.extend.core.primitives import conv_general_dilated_p
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_dwbp
from jax_dwbp import _in_place_of_lax

KERNEL = "jax_dwbp_depthwise_conv2d" if HAS_NATIVE else "stablehlo.multiply"
X, F = jnp.ones((1, 4, 6, 5)), jnp.ones((4, 1, 3, 3))


def conv(x, f, feature_group_count=4):
    return jax.lax.conv_general_dilated(
        x, f, (1, 1), "SAME", feature_group_count=feature_group_count
    )


def runs_here(function):
    """Whether its convolution is that of this package."""
    return "depthwise_conv2d" in str(jax.make_jaxpr(lambda x, f: function(x, f))(X, F))


def test_within_and_after():
    assert not runs_here(conv)
    with jax_dwbp.in_place_of_lax():
        with jax_dwbp.in_place_of_lax():
            assert runs_here(conv)
        assert runs_here(conv)
    assert not runs_here(conv)


def test_is_left_on_an_error():
    with pytest.raises(ZeroDivisionError), jax_dwbp.in_place_of_lax():
        raise ZeroDivisionError
    assert not runs_here(conv)


def test_what_is_not_depthwise_and_lax_by_name_are_lax_own():
    x, f = jnp.ones((1, 5, 6, 4)), jnp.ones((3, 3, 4, 1))
    with jax_dwbp.in_place_of_lax():
        dense = jax.lax.conv_general_dilated(
            x, f, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        by_name = jax_dwbp.depthwise_conv2d_native(x, f, (1, 1), "SAME", implementation="lax")
    np.testing.assert_allclose(dense[..., 0], by_name.sum(-1), rtol=1e-6)


def test_functions_traced_outside_and_within():
    """Each is what it is where it is called, whichever was first."""
    jitted = jax.jit(lambda x, f: conv(x, f))
    inner = jax.jit(lambda x, f: jitted(x, f))
    assert not runs_here(inner)
    with jax_dwbp.in_place_of_lax():
        assert runs_here(inner) and runs_here(jitted)
    assert not runs_here(inner) and not runs_here(jitted)


def test_other_threads_have_lax():
    found, entered, ended = [], threading.Event(), threading.Event()

    def other():
        entered.wait()
        found.append(runs_here(conv))
        ended.set()

    thread = threading.Thread(target=other)
    thread.start()
    with jax_dwbp.in_place_of_lax():
        entered.set()
        ended.wait()
        assert runs_here(conv)
    thread.join()
    assert found == [False]


def test_who_keeps_the_function_has_lax_afterwards():
    with jax_dwbp.in_place_of_lax():
        from jax.lax import conv_general_dilated as kept

        assert runs_here(lambda x, f: kept(x, f, (1, 1), "SAME", feature_group_count=4))
    assert not runs_here(lambda x, f: kept(x, f, (1, 1), "SAME", feature_group_count=4))


def test_it_stays_one_function(monkeypatch):
    """However often others patch it and take that back; and it has a name to be pickled by."""
    with jax_dwbp.in_place_of_lax():
        chosen = jax.lax.conv_general_dilated
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(jax.lax, "conv_general_dilated", lambda *args, **kwargs: None)
            with jax_dwbp.in_place_of_lax():
                assert runs_here(conv)
        with jax_dwbp.in_place_of_lax():
            assert jax.lax.conv_general_dilated is chosen
    assert pickle.loads(pickle.dumps(chosen)) is chosen


def test_patches_of_others_stay(monkeypatch):
    called = []
    with jax_dwbp.in_place_of_lax():
        before = jax.lax.conv_general_dilated

        def patched(*args, **kwargs):
            called.append(args)
            return before(*args, **kwargs)

        monkeypatch.setattr(jax.lax, "conv_general_dilated", patched)
        assert runs_here(conv) and len(called) == 1
    assert jax.lax.conv_general_dilated is patched
    assert not runs_here(conv) and len(called) == 2
    with jax_dwbp.in_place_of_lax():
        assert runs_here(conv)
    assert not runs_here(conv) and len(called) == 3


@pytest.fixture
def installed():
    jax_dwbp.install()
    yield
    jax_dwbp.uninstall()


def lowered(function, *args):
    # Another function each time, so that no cache of traces is looked at.
    return jax.jit(lambda *args: function(*args)).lower(*(args or (X, F))).as_text()


def test_install_and_uninstall():
    jitted = jax.jit(lambda x, f: conv(x, f))
    outside = jitted(X, F)
    before = lowered(conv)
    for _ in range(2):
        jax_dwbp.install()
        assert KERNEL in jitted.lower(X, F).as_text()
        np.testing.assert_allclose(jitted(X, F), outside, rtol=1e-6)
        jax_dwbp.uninstall()
        assert jitted.lower(X, F).as_text().count("stablehlo.convolution") == 1
        assert lowered(conv) == before


def test_installed_it_does_not_matter_where_the_function_is_from(installed):
    primitive = conv_general_dilated_p
    names = jax.lax.conv_dimension_numbers(X.shape, F.shape, None)

    def bound(x, f):
        return primitive.bind(
            x,
            f,
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            dimension_numbers=names,
            feature_group_count=4,
            batch_group_count=1,
            precision=None,
            preferred_element_type=None,
            out_sharding=None,
        )

    assert KERNEL in lowered(bound)
    patches = functools.partial(
        jax.lax.conv_general_dilated_patches, filter_shape=(3, 3), window_strides=(1, 1)
    )
    assert KERNEL in lowered(lambda x, f: patches(x, padding="SAME"))


def test_installed_for_all_threads(installed):
    texts = []
    thread = threading.Thread(target=lambda: texts.append(lowered(conv)))
    thread.start()
    thread.join()
    assert KERNEL in texts[0]


def test_within_the_context_all_of_lax_is_ours():
    """Where it is around what is lowered: also a function that was bound before."""
    bound = functools.partial(jax.lax.conv_transpose, strides=(2, 2), padding="VALID")

    def transposed(x, f):
        return bound(x, f, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, f = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
    assert KERNEL not in lowered(transposed, x, f)
    with jax_dwbp.in_place_of_lax():
        assert KERNEL in lowered(transposed, x, f)


def test_installed_what_is_not_depthwise_is_lowered_as_before():
    def dense(x, f):
        convolve = functools.partial(jax.lax.conv_general_dilated, padding="SAME")
        return jax.value_and_grad(lambda x, f: convolve(x, f, (1, 1)).sum(), (0, 1))(x, f)

    x, f = jnp.ones((2, 4, 6, 5)), jnp.ones((8, 4, 3, 3))
    before = lowered(dense, x, f)
    jax_dwbp.install()
    after = lowered(dense, x, f)
    jax_dwbp.uninstall()
    assert before == after


def test_installed_lax_by_name_is_lax_own(installed):
    text = lowered(
        lambda x, f: jax_dwbp.depthwise_conv2d_native(
            x, f, (1, 1), "SAME", implementation="lax", data_format="NCHW"
        ),
        *(X, F.transpose(2, 3, 0, 1)),
    )
    assert text.count("stablehlo.convolution") == 1


def test_installed_a_program_for_other_machines_has_no_kernel(installed):
    exported = jax.export.export(jax.jit(lambda x, f: conv(x, f)))(X, F)
    text = str(exported.mlir_module())
    assert "custom_call" not in text and "stablehlo.convolution" not in text


def test_installed_the_result_has_the_type_that_is_asked_for(installed):
    def widened(x, f):
        return jax.lax.conv_general_dilated(
            *(x, f, (1, 1), "SAME"),
            feature_group_count=4,
            preferred_element_type=jnp.float32,
        )

    rng = np.random.default_rng(0)
    x, f = (jnp.asarray(rng.uniform(-1, 1, array.shape), jnp.bfloat16) for array in (X, F))
    assert KERNEL in lowered(widened, x, f)
    y = widened(x, f)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, conv(x.astype("float64"), f.astype("float64")), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": np.int64(4)},
        {"window_strides": np.array([2, 2])},
        {"rhs_dilation": np.array([2, 2])},
        {"lhs_dilation": np.array([2, 2]), "padding": ((1, 1), (1, 1))},
    ],
    ids=str,
)
def test_installed_integers_may_be_those_of_numpy(installed, options):
    options = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4, **options}

    def gradients(x, f):
        convolve = functools.partial(jax.lax.conv_general_dilated, **options)
        return jax.value_and_grad(lambda x, f: jnp.sin(convolve(x, f)).sum(), (0, 1))(x, f)

    got = gradients(X, F)
    assert "stablehlo.convolution" not in lowered(gradients)
    jax_dwbp.uninstall()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, gradients(X, F))


@pytest.mark.parametrize("group", (1, 2))
def test_installed_empty_operands_are_lax_own(installed, group):
    x, f = jnp.ones((0, 4, 6, 5)), jnp.ones((4, group, 3, 3))
    assert conv(x, f, feature_group_count=4 // group).shape == (0, 4, 6, 5)


def test_installed_complex_operands_are_real_ones(installed):
    """Which is lax's doing."""
    x, f = (jnp.asarray(np.asarray(a) * k) for a, k in ((X, 1 + 2j), (F, 3 - 1j)))
    assert KERNEL in lowered(conv, x, f)
    np.testing.assert_allclose(conv(x, f), np.asarray(conv(X, F)) * (5 + 5j), rtol=1e-6)


def test_installed_one_program_has_lax_by_name_and_what_takes_its_place(installed):
    """JAX lowers a primitive of the same operands and parameters once in a program."""
    x, f = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 1))

    def by_name(x, f):
        options = {"strides": (1, 1), "padding": "SAME", "implementation": "lax"}
        return jax_dwbp.depthwise_conv2d_native(x, f, **options)

    def plain(x, f):
        numbers = ("NHWC", "HWIO", "NHWC")
        options = {"dimension_numbers": numbers, "feature_group_count": 4}
        return jax.lax.conv_general_dilated(x, f.reshape(3, 3, 1, 4), (1, 1), "SAME", **options)

    for first, second in ((by_name, plain), (plain, by_name)):
        text = lowered(lambda x, f, first=first, second=second: (first(x, f), second(x, f)), x, f)
        assert text.count("stablehlo.convolution") == 1 and KERNEL in text


def test_installed_what_fails_here_is_lowered_as_before(installed, monkeypatch):
    monkeypatch.setattr(_in_place_of_lax, "op_of", lambda conv: 1 // 0)
    with pytest.warns(UserWarning, match="is not looked at: integer division"):
        assert lowered(conv).count("stablehlo.convolution") == 1


def test_installed_what_the_stand_in_left_is_looked_at_again(installed):
    """`vmap` of a dense one with a filter each has groups."""
    x, f = jnp.ones((5, 1, 3, 8, 8)), jnp.ones((5, 3, 3, 3, 3))
    run = jax.vmap(lambda x, f: jax_dwbp.conv_general_dilated(x, f, (1, 1), "SAME"))
    [found] = jax_dwbp.implementations(run, x, f, platform="cpu")
    assert found.op != "conv_general_dilated" and KERNEL in lowered(run, x, f)


@pytest.mark.parametrize("channels", (1, 4))
@pytest.mark.parametrize("sizes", ("b, 8, 8", "b, h, 8"))
def test_installed_sizes_may_be_symbolic(installed, sizes, channels):
    """Of a batch it runs here, else it is lax's. So is what has no groups, where it is exported."""

    def gradients(x, f):
        convolve = functools.partial(conv, feature_group_count=channels)
        return jax.grad(lambda x, f: jnp.sin(convolve(x, f)).sum(), (0, 1))(x, f)

    batch, *spatial = sizes.split(", ")
    shape = jax.export.symbolic_shape(f"{batch}, {channels}, {', '.join(spatial)}")
    x, f = jnp.ones((3, channels, 8, 8)), jnp.ones((channels, 1, 3, 3))
    program = jax.export.export(jax.jit(lambda x, f: gradients(x, f)))(
        jax.ShapeDtypeStruct(shape, x.dtype), f
    )
    is_lax = "h" in sizes or channels == 1
    assert ("stablehlo.convolution" in str(program.mlir_module())) == is_lax
    for got, want in zip(program.call(x, f), gradients(x, f), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [PartitionSpec("d"), PartitionSpec(None, "d"), PartitionSpec(None, None, "d")],
    ids=("batch", "channels", "rows"),
)
def test_installed_sharded_programs_are_those_of_the_ops(installed, spec):
    """The same kernels and collectives as the package's own, for values and gradients."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    channels = PartitionSpec("d" if "d" in spec[1:2] else None)
    rng = np.random.default_rng(0)
    x, f = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((8, 16, 16, 9), (16, 1, 3, 3)))
    placed = (
        jax.device_put(x, NamedSharding(mesh, spec)),
        jax.device_put(f, NamedSharding(mesh, channels)),
    )

    def own(x, f):
        f = f.transpose(2, 3, 0, 1)
        return jax_dwbp.depthwise_conv2d_native(x, f, (1, 1), "SAME", data_format="NCHW")

    def program(convolve):
        def gradients(x, f):
            return jax.grad(lambda x, f: jnp.sin(convolve(x, f)).sum(), (0, 1))(x, f)

        return jax.jit(gradients).lower(*placed).compile()

    ours, want = program(functools.partial(conv, feature_group_count=16)), program(own)
    names = r"(all-reduce|all-gather|collective-permute|all-to-all|custom-call)\("
    sent = [sorted(re.findall(names, str(program.as_text()))) for program in (ours, want)]
    assert sent[0] == sent[1]
    for got, expected in zip(ours(*placed), want(*placed), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
