"""Power-function averages against sums over all steps, written out, and the authors' own numbers.

The weights of step k count for (k/t)^(gamma + 1) - ((k - 1)/t)^(gamma + 1) in an average after step
t: what a profile tracked by hand is compared with. "Authors" are the outputs of NVlabs/edm2's
training/phema.py, in float64.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import FIELDS, create_meta, create_small_state, create_state, target_of

from ldm_jax import checkpoint, power_ema, sharding, training
from ldm_jax.digest import get_digests
from ldm_jax.latents import LatentScale
from ldm_jax.unet import get_network

AUTHORS = {0.05: 16.972198602303447, 0.10: 6.937203937601809, 0.07: 11.244939447857924}
LENGTHS = (0.05, 0.1)


def count_weights(sigma_rel, steps):
    """What each of `steps` steps counts for, float64."""
    ends = np.arange(steps + 1) / steps
    return np.diff(ends ** (power_ema.sigma_rel_to_gamma(sigma_rel) + 1))


def get_sigma_rel(gamma):
    """Equation 123, the closed form."""
    return np.sqrt(gamma + 1) / (gamma + 2) / np.sqrt(gamma + 3)


@pytest.mark.parametrize("sigma_rel", [0.005, 0.05, 0.0807, 0.1, 0.28])
def test_gamma_and_sigma_rel_are_inverse_of_each_other(sigma_rel):
    gamma = power_ema.sigma_rel_to_gamma(sigma_rel)
    np.testing.assert_allclose(get_sigma_rel(gamma), sigma_rel, rtol=1e-10)
    # The width is the standard deviation of the profile, here of its sum over many steps.
    weights, times = count_weights(sigma_rel, 100_000), (np.arange(100_000) + 0.5) / 100_000
    mean = weights @ times
    np.testing.assert_allclose(np.sqrt(weights @ (times - mean) ** 2), sigma_rel, rtol=1e-4)


def test_gamma_is_that_of_the_authors():
    for sigma_rel, gamma in AUTHORS.items():
        np.testing.assert_allclose(power_ema.sigma_rel_to_gamma(sigma_rel), gamma, rtol=1e-12)
    np.testing.assert_allclose(get_sigma_rel(0.0), power_ema.LONGEST)


def test_the_rate_is_one_at_first_that_of_the_authors_and_keeps_its_digits():
    get_rate = jax.jit(power_ema.get_rate)
    assert get_rate(AUTHORS[0.05], jnp.int32(1)) == 1
    betas = [1 - get_rate(AUTHORS[sigma_rel], jnp.int32(10)) for sigma_rel in LENGTHS]
    np.testing.assert_allclose(betas, [0.15053493247717484, 0.4333247206821348], rtol=1e-5)
    late = -np.expm1((AUTHORS[0.05] + 1) * np.log1p(-1e-6))
    np.testing.assert_allclose(get_rate(AUTHORS[0.05], jnp.int32(10**6)), late, rtol=1e-5)


def test_inner_products_are_those_of_the_profiles():
    t = (np.arange(200_000) + 0.5) / 200_000

    def profile(end, gamma):
        return np.where(t < end, (gamma + 1) * t**gamma / end ** (gamma + 1), 0)

    for a, b in [((0.5, 3.0), (1.0, 7.0)), ((1.0, 3.0), (0.25, 17.0)), ((0.7, 5.0), (0.7, 5.0))]:
        expected = np.mean(profile(*a) * profile(*b))
        a, b = np.float64(a), np.float64(b)
        np.testing.assert_allclose(power_ema.inner_product(*a, *b), expected, rtol=1e-3)
        np.testing.assert_allclose(power_ema.inner_product(*b, *a), expected, rtol=1e-3)


def test_what_was_kept_is_reconstructed_exactly():
    steps, lengths = np.repeat(np.arange(50, 1001, 50), 2), np.tile(LENGTHS, 20)
    fit = power_ema.fit_profile(steps, lengths, 1000, 0.1)
    np.testing.assert_allclose(fit.weights, [0] * 39 + [1], atol=1e-9)
    assert fit.error < 1e-6 and fit.is_good


@pytest.mark.parametrize("sigma_rel, tolerance", [(0.07, 1e-3), (0.08, 1e-3), (0.15, 3e-3)])
def test_a_third_length_is_that_of_an_average_tracked_directly(sigma_rel, tolerance):
    """The tolerance is relative to how far the weights wander around what is to be found."""
    steps, every = 2000, 50
    rng = np.random.default_rng(0)
    drift = np.log1p(np.arange(1, steps + 1))[:, None] * rng.normal(size=64)
    path = drift + rng.normal(size=(steps, 64)).cumsum(0) * 0.05 + rng.normal(size=(steps, 64))
    snapshots, known = [], []
    for t in range(every, steps + 1, every):
        for length in LENGTHS:
            snapshots.append({"params/w": count_weights(length, t) @ path[:t]})
            known.append((t, length))
    fit = power_ema.fit_profile(*zip(*known), steps, sigma_rel)
    found = power_ema.reconstruct(iter(snapshots), fit.weights)["params/w"]
    wanted = count_weights(sigma_rel, steps) @ path
    rms = lambda x: np.sqrt(np.mean(x**2))  # noqa: E731
    assert rms(found - wanted) < tolerance * rms(path[steps // 2 :] - wanted)
    nearest = min(rms(s["params/w"] - wanted) for s in snapshots)
    assert rms(found - wanted) < nearest / 20
    # The error that a fit states is that of the profile it makes.
    made = sum(
        w * np.pad(count_weights(length, t), (0, steps - t))
        for w, (t, length) in zip(fit.weights, known)
    )
    target = count_weights(sigma_rel, steps)
    np.testing.assert_allclose(rms(made - target) / rms(target), fit.error, rtol=0.1)


def test_a_length_that_few_snapshots_cannot_give_has_a_large_error():
    known = zip(*[(t, length) for t in range(100, 1001, 100) for length in LENGTHS])
    steps, lengths = known
    errors = [power_ema.fit_profile(steps, lengths, 1000, s).error for s in (0.01, 0.03, 0.08)]
    assert errors[0] > 0.3 > errors[1] > 0.05 > 0.01 > errors[2]
    shortest, longest = power_ema.get_reach(steps, lengths, 1000)
    assert 0.03 < shortest < 0.05 and 0.15 < longest < 0.25
    for length in (shortest, longest):
        assert power_ema.fit_profile(steps, lengths, 1000, length).is_good


def test_a_running_variance_is_never_negative():
    snapshots = [{"batch_stats/a/var": np.float32([1, 4]), "params/var": np.float32([1, 4])}] * 2
    total = power_ema.reconstruct(snapshots, np.array([1.0, -2.0]))
    np.testing.assert_array_equal(total["batch_stats/a/var"], [0, 0])
    np.testing.assert_array_equal(total["params/var"], [-1, -4])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: power_ema.sigma_rel_to_gamma(0.0), r"must lie in \(0, 0.2887\), got 0.0"),
        (lambda: power_ema.sigma_rel_to_gamma(0.3), r"must lie in \(0, 0.2887\), got 0.3"),
        (lambda: power_ema.add_averages(create_small_state(), (0.1, 0.1)), "must differ"),
        (lambda: power_ema.add_averages(create_small_state(), (0.1, -1)), "got -1"),
        (lambda: power_ema.fit_profile([10], [0.1], 5, 0.1), r"up to 5 are needed.*\[10\]"),
        (lambda: power_ema.fit_profile([], [], 5, 0.1), r"up to 5 are needed.*\[\]"),
    ],
)
def test_wrong_lengths_and_steps_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Run:
    """A small network with its step; `states` are those after each step, as numpy."""

    def __init__(self, sigma_rels, mesh=None, steps=4):
        network, optimizer = get_network(**FIELDS), optax.sgd(0.05)

        def create(key):
            state = training.create_train_state(key, network, optimizer, (8, 8, 4), (6,))
            return power_ema.add_averages(state, sigma_rels)

        state = sharding.compile_creation(create, mesh)(jax.random.key(0))
        state.params["conv_out"]["kernel"] += 0.1  # Zero, it would keep all others still.
        self.step = training.get_train_step(network, optimizer, LatentScale(2.0), mesh=mesh)
        self.states = []
        for k in range(steps):
            state = self.take(state, k)
            self.states.append(jax.device_get(state))
        self.state = state

    def take(self, state, k):
        rng = np.random.default_rng(k)
        batch = {
            "latents_mean": rng.uniform(-2.5, 2.5, (8, 8, 8, 4)).astype(np.float32),
            "text_embeddings": rng.standard_normal((8, 6)).astype(np.float32),
        }
        return self.step(state, jax.random.key(0), batch)[0]


@pytest.fixture(scope="module")
def run():
    return Run(LENGTHS)


def test_the_step_keeps_the_sum_over_all_steps(run):
    for sigma_rel in LENGTHS:
        weights = count_weights(sigma_rel, 4)
        for part in ("params", "batch_stats"):
            latest = [getattr(state, part) for state in run.states]
            expected = jax.tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs)), *latest)
            found = run.states[-1].power_emas[str(sigma_rel)][part]
            chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_else_of_the_state_or_its_step_changes(run):
    plain = Run(())
    assert type(plain.state) is training.TrainState
    for name in vars(plain.state):  # Two programs: XLA rounds each in its own way.
        chex.assert_trees_all_close(
            getattr(run.states[-1], name), getattr(plain.states[-1], name), rtol=1e-5, atol=1e-6
        )
    kept = {name.split("/")[0] for name in get_digests(create_state())}
    assert kept == {"step", "params", "batch_stats", "ema_params", "ema_batch_stats", "opt_state"}


def test_the_averages_are_sharded_as_the_weights_are(run):
    mesh = sharding.get_mesh("fsdp", jax.devices()[:4])
    spread = Run(LENGTHS, mesh)
    for average in spread.state.power_emas.values():
        specs = jax.tree.map(lambda x: x.sharding.spec, average["params"])
        assert specs == jax.tree.map(lambda x: x.sharding.spec, spread.state.params)
        assert any(any(x.sharding.spec) for x in jax.tree.leaves(average["params"]))
    chex.assert_trees_all_close(
        spread.states[-1].power_emas, run.states[-1].power_emas, rtol=1e-3, atol=1e-4
    )


def test_a_restored_state_goes_on_as_if_nothing_had_happened(tmp_path):
    run = Run(LENGTHS, steps=2)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save_checkpoint(manager, run.state, create_meta())
    with checkpoint.open_checkpoints(tmp_path) as manager:
        restored = checkpoint.restore_checkpoint(manager, target_of(run.state), create_meta())
        plain = training.TrainState(
            **{k: v for k, v in vars(run.state).items() if k != "power_emas"}
        )
        message = "also has power_emas/0.05/.*or other power_ema.sigma_rels"
        with pytest.raises(ValueError, match=message):
            checkpoint.restore_checkpoint(manager, target_of(plain), create_meta())
    assert type(restored) is power_ema.ProfiledState
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(run.state))
    ends = [run.take(state, 2) for state in (restored, run.state)]
    chex.assert_trees_all_equal(*jax.device_get(ends))
