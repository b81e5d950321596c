"""The PyTorch peers against our network: same weights, same outputs, statistics and gradients.

What is measured against them is only worth something if they compute the same function.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks import torch_peer, torch_unet
from benchmarks.torch_unet import TorchUNet, load_jax_variables, to_torch
from ldm_jax.sampler import Denoiser, dynamic_thresholding, get_diffuser
from ldm_jax.unet import get_network

FIELDS = {"latent_image_size": 8, "block_depth": 2, "emb_size": 12, "latent_channels": 3}
FIELDS["widths"] = (16, 24, 32)
BATCH = 5
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def to_nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def to_nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def relative_error(value, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(value, np.float64) - expected) / np.linalg.norm(expected)


class Case:
    """Our network with random weights and statistics, none of them zero or one, and a batch."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.network = get_network(**FIELDS)
        size, channels = FIELDS["latent_image_size"], FIELDS["latent_channels"]
        self.x_t, self.target = rng.standard_normal((2, BATCH, size, size, channels), np.float32)
        self.noise_levels = np.linspace(0.05, 0.9, BATCH, dtype=np.float32)
        self.text = rng.standard_normal((BATCH, FIELDS["emb_size"]), np.float32)
        self.inputs = self.x_t, self.noise_levels, self.text
        shapes = flatten_dict(jax.eval_shape(self.network.init, jax.random.key(0), *self.inputs))
        drawn = {path: self.draw(rng, path, leaf.shape) for path, leaf in shapes.items()}
        gradient = jax.jit(jax.grad(self.loss, has_aux=True))
        self.start = unflatten_dict(drawn)
        params, batch_stats = self.start["params"], self.start["batch_stats"]
        self.gradients, (self.trained_x_zero, self.trained) = gradient(params, batch_stats)
        # Running statistics within a fifth of the batch's own: the activations grow with others.
        batch = jax.tree.map(lambda new, old: 100 * new - 99 * old, self.trained, batch_stats)
        statistics = jax.tree.map(lambda x: x * rng.uniform(0.8, 1.2, x.shape), batch)
        self.variables = self.start | {"batch_stats": statistics}
        self.x_zero = jax.jit(self.network.apply)(self.variables, *self.inputs)

    @staticmethod
    def draw(rng, path, shape):
        value = rng.standard_normal(shape)
        if path[-1] == "kernel":
            value = value / np.sqrt(np.prod(shape[:-1])) / (1 + ("query" in path or "key" in path))
        elif path[-1] == "var":
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.2 * value + (path[-1] == "scale")
        return value.astype(np.float32)

    def loss(self, params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        x_zero, updates = self.network.apply(
            variables, *self.inputs, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.abs(x_zero - self.target)), (x_zero, updates["batch_stats"])

    def get_model(self, tokens, variables=None):
        model = TorchUNet(**FIELDS, tokens=tokens)
        load_jax_variables(model, variables or self.variables)
        return model

    @property
    def torch_inputs(self):
        return to_nchw(self.x_t), torch.tensor(self.noise_levels), torch.tensor(self.text)


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.fixture(params=torch_unet.TOKENS)
def tokens(request):
    return request.param


@pytest.fixture
def model(case, tokens):
    return case.get_model(tokens)


def test_outputs_with_running_statistics_agree(case, model):
    with torch.no_grad():
        x_zero = to_nhwc(model.eval()(*case.torch_inputs))
    assert np.std(case.x_zero) > 0.1
    assert relative_error(x_zero, case.x_zero) < TOLERANCE


def test_outputs_statistics_and_gradients_of_a_training_step_agree(case, tokens):
    model, positions = case.get_model(tokens, case.start), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda module, x, name=name: positions.update({name: x[0].numel() / x[0].shape[1]})
            )
    x_zero = model.train()(*case.torch_inputs)
    (x_zero - to_nchw(case.target)).abs().mean().backward()
    assert relative_error(to_nhwc(x_zero), case.trained_x_zero) < TOLERANCE

    state, old = model.state_dict(), to_torch(case.start["batch_stats"])
    for name, new in to_torch(case.trained).items():
        if name.endswith("running_var"):  # PyTorch's is that of n - 1 degrees of freedom.
            n = positions[name.rpartition(".")[0]]
            new = 0.99 * old[name] + (new - 0.99 * old[name]) * n / (n - 1)
        assert relative_error(state[name], new) < TOLERANCE, name

    expected, found = to_torch(case.gradients), dict(model.named_parameters())
    for name in [
        "text.weight",
        "conv_in.weight",
        "down.0.1.residual.conv_1.weight",
        "down.1.0.spatial.query.weight",
        "bottleneck.1.cross.norm_cond.weight",
        "up.0.0.cross.value.weight",
        "up.1.1.spatial.norm_out.bias",
        "conv_out.weight",
    ]:
        assert relative_error(found[name].grad, expected[name]) < TOLERANCE, name


def test_queries_and_keys_of_the_tiled_form_are_computed_and_get_no_gradient(case):
    model = case.get_model("tiled")
    model(*case.torch_inputs).abs().mean().backward()
    total = sum(p.grad.norm() ** 2 for p in model.parameters()) ** 0.5
    dead = {name: p for name, p in model.named_parameters() if torch_unet.DEAD.search(name)}
    assert len(dead) == 6 * 2 * 4  # Weight and bias of three layers; four stages of two units.
    assert all(p.grad.norm() < 1e-6 * total for p in dead.values())


def test_both_forms_have_the_numbers_of_weights_that_the_networks_have():
    with torch.device("meta"):
        sizes = {
            tokens: sum(p.numel() for p in TorchUNet(16, tokens=tokens).parameters())
            for tokens in torch_unet.TOKENS
        }
    assert sizes == {"tiled": 83_821_700, "one": 83_151_812}


def test_the_sampler_draws_the_latents_of_ours_from_the_same_noise(case, model):
    diffuser = get_diffuser(Denoiser(case.network, case.variables), diffusion_steps=7)
    expected = diffuser.reverse_diffusion(case.x_t, case.text)
    sample = torch_peer.make_sampler(model, BATCH, steps=7)
    latents = to_nhwc(sample(to_nchw(case.x_t), torch.tensor(case.text)))
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(latents, expected, atol=TOLERANCE)
    assert sample().shape == (BATCH, 3, 8, 8)


@pytest.mark.parametrize("perc", [0, 50, 99.5, 99.75, 100])
def test_thresholding_by_topk_is_that_by_percentile(perc):
    x = 3 * np.random.default_rng(0).standard_normal((4, 8, 8, 3), np.float32)
    found = to_nhwc(torch_peer.dynamic_thresholding(to_nchw(x), perc))
    np.testing.assert_allclose(found, dynamic_thresholding(x, perc), atol=1e-5)


def test_noise_levels_follow_the_truncated_law():
    a = np.sort(torch_peer.draw_noise_levels(40_000, torch.device("cpu")).numpy())
    z = np.abs(np.random.default_rng(0).standard_normal(40_000))
    expected = np.sin(z[z < 3] / 3)
    quantiles = np.linspace(0.01, 0.99, 9)
    np.testing.assert_allclose(
        np.quantile(a, quantiles), np.quantile(expected, quantiles), atol=0.01
    )
    assert 0 <= a[0] and a[-1] < np.sin(1)


def test_a_training_step_learns_and_moves_the_average(model, monkeypatch):
    averages, lerp = [], torch._foreach_lerp_

    def spy(average, current, weight):
        lerp(average, current, weight)
        averages.append(([x.clone() for x in average], [x.clone() for x in current], weight))

    monkeypatch.setattr(torch, "_foreach_lerp_", spy)
    start = [x.clone() for x in model.state_dict().values()]
    step = torch_peer.make_train_step(model, batch_size=8)
    losses = [step().item() for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    average, current, weight = averages[0]
    assert len(averages) == 30 and weight == pytest.approx(0.001)
    for x, new, old in zip(average, current, start, strict=True):
        torch.testing.assert_close(x, 0.999 * old + 0.001 * new)
    assert any((new != old).any() for new, old in zip(current, start))


def test_compilation_makes_one_graph_of_a_step_and_changes_nothing(case, model, monkeypatch):
    graphs, compile = [], torch.compile

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda f, mode: compile(f, backend=count, fullgraph=True, dynamic=False)
    )
    inputs = to_nchw(case.x_t), torch.tensor(case.text)
    expected = torch_peer.make_sampler(model, BATCH, steps=4)(*inputs)
    latents = torch_peer.make_sampler(model, BATCH, "compile", steps=4)(*inputs)
    torch.testing.assert_close(latents, expected)
    assert len(graphs) == 1
    step = torch_peer.make_train_step(model, 2, "compile")
    assert np.isfinite([step().item() for _ in range(3)]).all()
    assert len(graphs) == 2


def test_wrong_arguments_say_what_is_needed(case):
    model = case.get_model("one")
    with pytest.raises(ValueError, match="tokens must be one of .* got 'many'"):
        TorchUNet(8, tokens="many")
    with pytest.raises(ValueError, match=r"divisible by 8 \(3 poolings by 2\), got 20"):
        TorchUNet(20)
    with pytest.raises(ValueError, match="mode must be one of .* got 'fast'"):
        torch_peer.make_train_step(model, 2, "fast")
    with pytest.raises(ValueError, match=r"shapes .*\(5, 12\)\), got .*\(5, 11\)"):
        model(*case.torch_inputs[:2], torch.zeros(5, 11))


def test_variables_of_another_network_are_refused(case):
    model, params = case.get_model("one"), case.variables["params"]
    with pytest.raises(ValueError, match=r"conv_in.bias must be \(16,\), got None"):
        load_jax_variables(model, case.variables | {"params": params | {"conv_in": {}}})
    text = {"text": {"kernel": np.zeros((13, 256)), "bias": np.zeros(256)}}
    with pytest.raises(ValueError, match=r"text.weight must be \(256, 12\), got \(256, 13\)"):
        load_jax_variables(model, case.variables | {"params": params | text})
