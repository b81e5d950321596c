"""Group norms against linen's; their kernels, run by Pallas' interpreter, against XLA."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from stand_ins import as_on_a_gpu, count_lowered, needs_triton

from ldm_jax import group_kernels, tiles
from ldm_jax.group_kernels import Terms
from ldm_jax.group_norms import EPSILON, GROUP_SIZE, GroupNorm, group_norm
from ldm_jax.sharding import AXES, get_mesh


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 4, 48), (3, 48), (2, 5, 32)])
def test_the_norm_and_its_weights_are_linen_s(affine, shape):
    x = 2 * draw(*shape) + 3
    linen = nn.GroupNorm(
        num_groups=None,
        group_size=GROUP_SIZE,
        epsilon=EPSILON,
        use_scale=affine,
        use_bias=affine,
    )
    theirs = linen.init(jax.random.key(0), x)
    chex.assert_trees_all_equal(GroupNorm(affine).init(jax.random.key(0), x), theirs)
    weights = jax.tree.map(lambda w: draw(*w.shape, seed=1), theirs)
    found, expected = GroupNorm(affine).apply(weights, x), linen.apply(weights, x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def create_terms(shape, names, dtype):
    b, *_, c = shape
    made = {
        "bias": draw(c, seed=2),
        "scale": jnp.asarray(draw(b, c, seed=3), dtype),
        "shift": jnp.asarray(draw(b, c, seed=4), dtype),
        "keep": draw(*shape, seed=5) > -1,
    }
    return Terms(**{name: made[name] for name in names})


def norm_literally(x, terms, swish, gain):
    """In float64, sample by sample and group by group."""
    x = np.float64(x) + (0 if terms.bias is None else np.float64(terms.bias))
    y = np.zeros_like(x)
    for sample in range(len(x)):
        for first in range(0, x.shape[-1], GROUP_SIZE):
            part = x[sample, ..., first : first + GROUP_SIZE]
            v = (part - part.mean()) / np.sqrt(part.var() + EPSILON)
            y[sample, ..., first : first + GROUP_SIZE] = v
    if terms.scale is not None:
        y = y * np.float64(terms.scale)[:, None, None] + np.float64(terms.shift)[:, None, None]
    y = y / (1 + np.exp(-y)) if swish else y
    return y if terms.keep is None else np.where(terms.keep, y * gain, 0)


SETS = [
    (),
    ("scale", "shift"),
    ("bias", "scale", "shift"),
    ("bias", "scale", "shift", "keep"),
]
OPTIONS = {"swish": True, "gain": 1.25}


@pytest.mark.parametrize("names", SETS)
def test_xla_does_what_the_terms_say(names):
    x = 2 * draw(2, 4, 4, 32) + 1
    terms = create_terms(x.shape, names, np.float32)
    expected = norm_literally(x, terms, **OPTIONS)
    np.testing.assert_allclose(group_norm(x, terms, **OPTIONS), expected, atol=1e-5)


@pytest.fixture
def by_kernels(monkeypatch):
    """Runs the branch for a GPU of our kernels, of any dtype, in Pallas' interpreter."""
    monkeypatch.setattr(group_kernels, "can_run", lambda x: True)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x))


def derive(x, terms, dy, **options):
    """The result and the gradients of the map and the terms."""
    run = lambda x, terms: group_norm(x, terms._replace(keep=keep), **options)  # noqa: E731
    keep = terms.keep
    y, pullback = jax.vjp(jax.jit(run), x, terms._replace(keep=None))
    return y, *pullback(dy)


SHAPES = [(3, 16, 16, 32), (12, 8, 8, 48), (1, 8, 16, 64), (5, 8, 8, 160)]


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("names", SETS)
@pytest.mark.parametrize("swish", [False, True])
def test_kernels_norm_as_xla_does_and_so_do_their_gradients(by_kernels, shape, names, swish):
    x, dy = 2 * draw(*shape) + 1, draw(*shape, seed=1)
    terms = create_terms(shape, names, np.float32)
    options = OPTIONS | {"swish": swish}
    found = derive(x, terms, dy, by_kernels=True, **options)
    expected = derive(x, terms, dy, **options)
    np.testing.assert_allclose(found[0], norm_literally(x, terms, **options), atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    for mine, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, exact, atol=2e-5 * np.abs(exact).max())


@needs_triton
def test_kernels_round_less_than_xla_does(by_kernels):
    shape, dtype = (4, 8, 8, 32), jnp.bfloat16
    x, dy = (jnp.asarray(draw(*shape, seed=seed), dtype) for seed in (0, 1))
    terms = create_terms(shape, SETS[-1], dtype)
    exactly = [jax.tree.map(jnp.float32, tree) for tree in (x, terms._replace(keep=None), dy)]
    exactly[1] = exactly[1]._replace(keep=terms.keep)
    exact = derive(*exactly, **OPTIONS)
    found, xla = (derive(x, terms, dy, by_kernels=way, **OPTIONS) for way in (True, False))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, xla)
    for mine, others, exact in zip(*map(jax.tree.leaves, (found, xla, exact)), strict=True):
        mine, others = (np.linalg.norm(np.float32(x) - exact) for x in (mine, others))
        # Sums over many numbers hang on the numbers' rounding, the same for both.
        assert mine < (0.9 if exact.ndim == 4 else 1.05) * others


@needs_triton
def test_kernels_keep_the_variance_of_a_map_far_from_zero(by_kernels):
    x = draw(2, 8, 8, 16) + 1000
    found = group_norm(x, by_kernels=True)
    np.testing.assert_allclose(found, norm_literally(x, Terms(), False, 1.0), atol=1e-3)


@needs_triton
def test_kernels_map_over_batches(by_kernels):
    x, dy = draw(3, 2, 8, 8, 32), draw(3, 2, 8, 8, 32, seed=1)
    terms = Terms(draw(3, 32, seed=2), draw(3, 2, 32, seed=3), draw(3, 2, 32, seed=4))
    run = partial(derive, by_kernels=True, swish=True)
    found = jax.vmap(run)(x, terms, dy)
    expected = [run(x[i], jax.tree.map(lambda t, i=i: t[i], terms), dy[i]) for i in range(3)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    chex.assert_trees_all_close(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "shape, dtype, fit",
    [
        ((2, 16, 16, 192), "bfloat16", True),
        ((2, 8, 8, 16), "bfloat16", True),
        ((2, 16, 16, 192), "float32", False),
        ((2, 1, 1, 192), "bfloat16", False),  # Tokens' values.
        ((2, 192), "bfloat16", False),
        ((2, 12, 12, 192), "bfloat16", False),
        ((2, 4, 4, 192), "bfloat16", False),
        ((2, 32, 32, 192), "bfloat16", False),
    ],
)
def test_kernels_refuse_what_they_are_not_for(monkeypatch, shape, dtype, fit):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert not group_kernels.can_run(x)  # Without a GPU.
    monkeypatch.setattr(tiles, "are_possible", lambda: True)
    assert group_kernels.can_run(x) == fit


@pytest.mark.parametrize(
    "terms",
    [
        Terms(scale=np.ones((2, 32))),
        Terms(shift=np.ones((2, 32))),
        Terms(scale=np.ones(32), shift=np.ones(32)),
    ],
)
def test_a_scale_without_a_shift_or_for_no_sample_is_refused(terms):
    with pytest.raises(ValueError, match=r"scale and shift must have shape \(2, 32\), or be None"):
        group_norm(draw(2, 4, 4, 32), terms)


def spread_over_devices(x, terms, dy):
    """The result and gradients of a batch in parts, and a bias on all of eight devices."""

    def on_a_device(x, terms, dy):
        varying = terms._replace(bias=jax.lax.pcast(terms.bias, AXES, to="varying"))
        run = lambda x, terms: group_norm(x, terms, swish=True, by_kernels=True)  # noqa: E731
        y, pullback = jax.vjp(run, x, varying)
        dx, d_terms = pullback(dy)
        return y, dx, d_terms._replace(bias=jax.lax.psum(d_terms.bias, AXES))

    part, whole = PartitionSpec(AXES), PartitionSpec()
    of_terms = Terms(whole, part, part, None)
    return jax.shard_map(
        on_a_device,
        mesh=get_mesh("data=2,fsdp=4"),
        in_specs=(part, of_terms, part),
        out_specs=(part, part, of_terms),
        check_vma=True,
    )(x, terms, dy)


def test_spread_by_hand_they_are_those_of_one_device(monkeypatch):
    monkeypatch.setattr(group_kernels, "can_run", lambda x: True)
    x, dy = draw(16, 8, 8, 32), draw(16, 8, 8, 32, seed=1)
    terms = create_terms(x.shape, ("bias", "scale", "shift"), np.float32)
    found = jax.jit(spread_over_devices)(x, terms, dy)
    chex.assert_trees_all_close(found, derive(x, terms, dy, swish=True), rtol=1e-4, atol=1e-4)


@needs_triton
def test_spread_by_hand_they_lower_to_kernels_on_a_gpu(monkeypatch):
    as_on_a_gpu(monkeypatch)
    map_, row = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((16, 8, 8, 32), (16, 32)))
    terms = Terms(jax.ShapeDtypeStruct((32,), "float32"), row, row)
    assert count_lowered(spread_over_devices, (map_, terms, map_)) == 2
