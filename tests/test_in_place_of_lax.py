"""The context in which `jax.lax.conv_general_dilated` is ours, and that nothing else is changed."""

import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_dwbp

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
