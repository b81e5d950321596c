"""The log of a run that goes on: each step has one line."""

import json

import pytest

from ldm_jax.runlog import RunLog, drop_later_lines


def test_lines_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 5, "loss": 1}\n{"step": 10, "loss": 2}\n{"step": 15}\n{"step": 2')
    drop_later_lines(path, 10)
    assert path.read_text() == '{"step": 5, "loss": 1}\n{"step": 10, "loss": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_lines_that_are_not_of_the_log_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'\xff\xfe\n[]\n{"loss": 1}\n{"step": 1}\n')
    drop_later_lines(path, 1)
    assert path.read_text() == '{"step": 1}\n'


def test_a_log_that_goes_on_has_each_step_once(tmp_path):
    for start, steps in [(0, (1, 2, 3)), (2, (3, 4))]:
        with RunLog(tmp_path, steps=4, start=start, batch_size=1) as log:
            for step in steps:
                log.write(step, {"loss": float(step)})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("at_peak", [None, 1e6])
def test_the_share_of_the_peak_is_logged_where_it_is_known(tmp_path, at_peak):
    with RunLog(tmp_path, 2, 0, batch_size=8, images_at_peak=at_peak) as log:
        log.add_step({"loss": 1.0}, 0.0)
        values = log.close_window(1)
    expected = values["images_per_second"] / at_peak if at_peak else None
    assert values.get("share_of_peak") == expected
