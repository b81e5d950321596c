"""Pods that are not there: names, messages counted in a program, and steps compiled for them."""

import math
import sys

import pytest

from benchmarks.processes import run_processes
from configs import tiny
from ldm_jax import chips
from ldm_jax.chips import CHIPS, LATENCY, Message, Target, estimate_seconds, parse_target
from ldm_jax.forecast import count_messages, describe, forecast_step


@pytest.mark.parametrize(
    "text, target",
    [
        ("v5e:16x16", Target("v5e", "16x16", 1, 256)),
        ("2*v5p:4x4x4", Target("v5p", "4x4x4", 2, 128)),
        ("64*h100", Target("h100", "", 1, 64)),
        ("8", Target("h100", "", 1, 8)),
        (" H200 ", Target("h200", "", 1, 1)),
    ],
)
def test_names_of_pods(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["", "v5e", "v9:2x2", "h100:2x2", "0*h100", "v5e:0x2", "eight"])
def test_names_that_mean_no_pod_are_refused(text):
    with pytest.raises(ValueError, match="compile_for must look like v5e:16x16"):
        parse_target(text)


PROGRAM = """
  %a = (f32[8,4]{1,0}, bf16[16]{0}, /*index=2*/f32[2]{0}) all-reduce(%x), replica_groups=[2,4]<=[8]
  %b = f32[64]{0:T(128)} all-gather(%c), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}
  %d = f32[64]{0} all-gather(%c), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  %e = (f32[4]{0}, f32[8]{0}) all-gather-start(%f), channel_id=4, replica_groups=[1,8]<=[8]
  %g = f32[8]{0} all-gather-done(%e)
  %h = f32[3]{0} all-reduce(%i), channel_id=5, replica_groups={{0},{1}}, to_apply=%add
  %j = f32[5]{0} reduce-scatter(%k), channel_id=6, dimensions={0}, to_apply=%add
  %l = ((f32[9]{0}), f32[9]{0}) all-reduce-start(%m), replica_groups=mesh['a'=2,'b'=3] {'a','b'}
  %p = f32[6]{0} all-reduce(%q), replica_groups=mesh['a'=2,'b'=4], device_ids=(0) {'b':(1)2}
  %n = f32[7]{0} all-reduce-start(%o), replica_groups=mesh['a'=2,'b'=3] {'b'}, to_apply=%add
"""


def test_messages_are_counted_by_kind_dtype_and_group():
    assert count_messages(PROGRAM) == [
        Message("all-gather", "f32", 2, 2, 2 * 64 * 4),
        Message("all-reduce", "bf16+f32", 4, 1, 8 * 4 * 4 + 16 * 2 + 2 * 4),
        Message("all-reduce", "f32", 6, 1, 9 * 4),
        Message("all-gather", "f32", 8, 1, 8 * 4),
        Message("all-reduce", "f32", 3, 1, 7 * 4),
        Message("all-reduce", "f32", 2, 1, 6 * 4),
        Message("reduce-scatter", "f32", 0, 1, 5 * 4),
    ]


def test_messages_take_the_time_of_a_ring():
    pod, links = parse_target("v5e:4x4"), CHIPS["v5e"].links
    reduce = estimate_seconds(Message("all-reduce", "f32", 16, 1, 10**9), pod)
    assert math.isclose(reduce, 2 * 15 / 16 * 1e9 / links + LATENCY)
    gather = estimate_seconds(Message("all-gather", "f32", 0, 3, 10**9), pod)
    assert math.isclose(gather, 15 / 16 * 1e9 / links + 3 * LATENCY)
    # The two halves of a ring all-reduce.
    scatter = estimate_seconds(Message("reduce-scatter", "f32", 16, 0, 10**9 // 16), pod)
    assert math.isclose(reduce - LATENCY, 2 * scatter, rel_tol=1e-6)


def test_messages_between_hosts_or_slices_take_their_network():
    message = Message("all-reduce", "f32", 16, 1, 10**9)
    times = [estimate_seconds(message, parse_target(pod)) for pod in ("v5e:4x4", "2*v5e:2x4")]
    assert times[1] / times[0] > 0.9 * CHIPS["v5e"].links / CHIPS["v5e"].network
    eight = estimate_seconds(message._replace(group=8), parse_target("16*h100"))
    all_of_them = estimate_seconds(message, parse_target("16*h100"))
    assert all_of_them > chips.CHIPS["h100"].links / chips.CHIPS["h100"].network * eight / 1.2


def get_config(mesh, batch_size=64):
    config = tiny.get_config()
    config.sharding.mesh, config.batch_size = mesh, batch_size
    config.network.latent_image_size = 8
    config.network.widths = (32, 64)
    return config


@pytest.mark.slow
def test_gpus_are_forecast_from_virtual_devices():
    target = parse_target("8*h100")
    found = {mesh: forecast_step(get_config(mesh), target, (512,)) for mesh in ("data", "fsdp")}
    data, fsdp = found["data"], found["fsdp"]
    assert data.fits and data.devices == 8 and data.batch_size == 64
    sent = sum(m.bytes for m in data.messages if m.kind == "all-reduce")
    # Every weight's gradient once, and the loss. The gradient of a bias that shifts all of a
    # softmax's logits is zero, which the compiler sees.
    assert 0.999 * 4 * data.weights <= sent <= 4 * data.weights + 4
    assert {m.kind for m in data.messages} == {"all-reduce"}
    # One message each: the weights that are split, whole; parts of their gradients; and the other
    # gradients with the loss and sums of squares, one for the norm and one per array for clipping.
    assert [m.count for m in fsdp.messages] == [1, 1, 1]
    sizes = {m.kind: m.bytes for m in fsdp.messages}
    gathered, others = sizes["all-gather"], 4 * fsdp.weights - sizes["all-gather"]
    assert 0.9 < gathered / (4 * fsdp.weights) < 1 and sizes["reduce-scatter"] == gathered / 8
    assert others - 0.001 * 4 * fsdp.weights <= sizes["all-reduce"] <= others + 100
    assert fsdp.state_bytes < 0.5 * data.state_bytes
    # Four copies of the weights (state, average, two moments) and a device's part of the batch.
    batch = 8 * 2 * (2 * 8 * 8 * 4 + 512)
    assert abs(data.state_bytes - 16 * data.weights - batch) < 100
    assert data.flops > 6 * 8 * data.weights  # Each weight counts at least once at each sample.
    assert 0 < data.efficiency < 1
    text = describe(data, target)
    assert "8 x h100, 8 devices, batch 64 (8 a device)" in text and "scaling efficiency" in text


@pytest.mark.slow
def test_a_batch_in_parts_takes_the_arithmetic_and_messages_of_the_whole_and_less_memory():
    found = []
    for accumulate in (1, 4):
        config = tiny.get_config()
        config.batch_size, config.training.accumulate = 64, accumulate
        found.append(forecast_step(config, parse_target("2*h100"), (512,)))
    whole, parts = found
    assert abs(parts.flops / whole.flops - 1) < 0.1
    # But for gradients that are zero, which the compiler sees outside a loop alone.
    (one,), (other,) = parts.messages, whole.messages
    assert one[:4] == other[:4] and abs(one.bytes / other.bytes - 1) < 1e-3
    assert parts.peak_bytes < 0.5 * whole.peak_bytes


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="divisible by the 8 devices, got 60"):
        forecast_step(get_config("data", 60), parse_target("8"), (512,))


def test_too_few_virtual_devices_are_refused():
    with pytest.raises(ValueError, match="needs 9 virtual CPU devices, got 8"):
        forecast_step(get_config("data", 72), parse_target("9"), (512,))


def compile_for(pod, *flags):
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--compile_for={pod}"]
    (result,) = run_processes([[*command, *flags]], timeout=500)
    return result


@pytest.mark.slow
def test_a_tpu_pod_is_compiled_for_without_one():
    code, output = compile_for("v5e:2x4", "--config.sharding.mesh=data=2,fsdp=4")
    lines = {line[:16].strip(): line for line in output.splitlines()}
    assert code == 0 and "8 x v5e:2x4, 8 devices, batch 16 (2 a device)" in output, output
    assert "GB of 16 GB" in lines["memory a device"]
    assert "all-gather, f32, groups of 4" in output and "reduce" in output
    assert "scaling efficiency" in lines["estimate"]


@pytest.mark.slow
def test_what_does_not_fit_a_chip_is_said_and_ends_with_1():
    code, output = compile_for("v5e:2x2", "--config.batch_size=1048576")
    assert code == 1 and "DOES NOT FIT" in output, output
    assert "GB of 16 GB" in output


@pytest.mark.slow
def test_a_topology_that_does_not_exist_is_named():
    code, output = compile_for("v5e:3x5")
    assert code == 1 and "there is no TPU topology v5e:3x5" in output, output
