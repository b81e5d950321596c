"""Traces: written by hand in XLA's format, with known times, and of a real call on a CPU."""

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.profiling import Kernel, StepWindow, describe, profile_calls, summarise_trace


def write_trace(path, planes):
    """An xplane.pb of {plane: {line: [(kernel, start, duration), ...]}}, times in microseconds."""
    text = ""
    for plane, lines in planes.items():
        kernels = sorted({event[0] for events in lines.values() for event in events})
        text += f'planes {{ name: "{plane}" '
        for i, kernel in enumerate(kernels, 1):
            text += f'event_metadata {{ key: {i} value {{ id: {i} name: "{kernel}" }} }} '
        for line, events in lines.items():
            text += f'lines {{ name: "{line}" '
            for kernel, start, duration in events:
                text += (
                    f"events {{ metadata_id: {kernels.index(kernel) + 1} "
                    f"offset_ps: {start}000000 duration_ps: {duration}000000 }} "
                )
            text += "} "
        text += "} "
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))


def summarise(folder):
    return {k.name: (k.count, round(k.seconds * 1e6, 6)) for k in summarise_trace(folder)}


def test_kernels_of_all_streams_and_gpus_are_added_up_once(tmp_path):
    gpu = {
        "Stream #13(Compute,MemcpyD2D)": [("gemm", 0, 50), ("copy", 50, 10), ("gemm", 60, 50)],
        "Stream #14(Compute)": [("gemm", 20, 5)],
        "XLA Modules": [("jit_step", 0, 110)],
        "Framework Ops": [("dot", 0, 50), ("dot", 60, 50)],
    }
    host = {"python": [("gemm", 0, 900)]}
    planes = {"/device:GPU:0": gpu, "/device:GPU:1": gpu, "/host:CPU": host}
    write_trace(tmp_path / "plugins/profile/1/host.xplane.pb", planes)
    assert summarise(tmp_path) == {"gemm": (6, 210.0), "copy": (2, 20.0)}
    assert [k.name for k in summarise_trace(tmp_path)] == ["gemm", "copy"]


def test_a_loop_counts_what_its_operations_leave_it(tmp_path):
    operations = [("while", 0, 100), ("fusion", 10, 30), ("fusion", 40, 30), ("copy", 100, 5)]
    write_trace(tmp_path / "host.xplane.pb", {"/device:TPU:0": {"XLA Ops": operations}})
    assert summarise(tmp_path) == {"fusion": (2, 60.0), "while": (1, 40.0), "copy": (1, 5.0)}


def test_kernels_that_overlap_in_part_count_whole(tmp_path):
    events = [("a", 0, 10), ("b", 8, 10)]
    write_trace(tmp_path / "host.xplane.pb", {"/device:GPU:0": {"Stream #1": events}})
    assert summarise(tmp_path) == {"a": (1, 10.0), "b": (1, 10.0)}


def test_the_table_shows_a_step_and_sums_up_the_rest():
    kernels = [Kernel("x" * 99, 20, 0.06), Kernel("b", 10, 0.03), Kernel("c", 10, 0.01)]
    head, first, others, everything = describe(kernels, steps=10, rows=1).splitlines()
    assert head.split() == ["ms", "a", "step", "share", "runs", "a", "step", "kernel"]
    assert first.split() == ["6.000", "60.0%", "2.0", "x" * 57 + "..."]
    assert others.split() == ["4.000", "40.0%", "2.0", "2", "others"]
    assert everything.split() == ["10.000", "100.0%", "4.0", "all", "kernels"]


def test_calls_on_a_cpu_leave_a_trace_and_no_kernels(tmp_path):
    f, calls = jax.jit(lambda x: x @ x), []

    def run():
        calls.append(f(jnp.eye(8)))
        return calls[-1]

    assert profile_calls(run, tmp_path, calls=3) is calls[-1]
    assert len(calls) == 3
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    assert summarise_trace(tmp_path) == []
    assert "no device plane" in describe([])


def test_a_folder_without_traces_and_no_calls_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trace"):
        summarise_trace(tmp_path)
    with pytest.raises(ValueError, match="calls must be at least 1, got 0"):
        profile_calls(lambda: None, tmp_path, calls=0)


def run_window(steps, folder, last=6):
    state, traced = jnp.zeros(()), []
    with StepWindow(steps, folder) as window:
        for step in range(1, last + 1):
            window.before(step, state)
            traced += [step] if window._open else []
            state = state + 1
            window.after(state)
    return traced


def test_a_window_of_steps_is_traced_and_said(tmp_path, capsys):
    assert run_window("3:2", tmp_path) == [3, 4]
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"traced the steps 3 to 4 into {tmp_path}: look at it with")
    assert "no device plane" in said


def test_a_window_that_the_run_cuts_short_or_misses_is_said(tmp_path, capsys):
    assert run_window("6:5", tmp_path) == [6]
    assert capsys.readouterr().out.startswith("traced the steps 6 to 6")
    assert run_window("7:1", tmp_path / "none") == []
    assert capsys.readouterr().out == "no trace: the run took no step 7\n"
    assert run_window("", tmp_path / "none") == [] and not (tmp_path / "none").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("steps", ["20", "20:", "0:5", "20:0", "-1:5", "a:b"])
def test_windows_in_another_form_are_refused(steps, tmp_path):
    with pytest.raises(ValueError, match="profile must look like 20:5"):
        StepWindow(steps, tmp_path)
