"""The scaling benchmark at toy size, on several devices and in several processes."""

import pytest
from test_benchmarks import run_rows


@pytest.mark.slow
def test_scaling_trains_samples_and_restores_on_several_devices(tmp_path):
    arguments = ("--devices=1,2", "--steps=4", "--ways=data,fsdp,pmap")
    rows = run_rows("scaling", tmp_path, "--parts=train,sample,checkpoint", *arguments)
    found = [(row["work"], row["devices"], row["way"]) for row in rows]
    trained = [("train", 1, "data"), ("train", 1, "pmap")]
    trained += [("train", 2, way) for way in ("data", "pmap", "fsdp")]
    sampled = [("sample", 1, "jit"), ("sample", 2, "jit"), ("sample", 2, "shard_map")]
    assert found == [*trained, *sampled, ("checkpoint", 1, "fsdp"), ("checkpoint", 2, "fsdp")]
    assert all(row["img/s"] > 0 and row["efficiency"] > 0 for row in rows[:8])
    assert rows[0]["messages MB"] == 0 < rows[2]["messages MB"]
    assert rows[5]["difference"] == 0 and all(row["difference"] < 0.1 for row in rows[6:8])
    assert rows[7]["messages MB"] == 0  # Each device draws its own pictures alone.
    assert all(row["same noise"] for row in rows[5:8]) and all(row["same"] for row in rows[8:])


@pytest.mark.slow
def test_scaling_trains_in_one_process_for_each_device(tmp_path):
    [row] = run_rows("scaling", tmp_path, "--parts=processes", "--devices=2", "--ways=fsdp")
    assert row["devices"] == 2 and row["img/s"] > 0 and row["messages MB"] > 0
