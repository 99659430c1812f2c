"""Points as lines of a file, and how many steps it took to reach a value."""

import json

import numpy as np
import pytest

from common.errors import UserError
from report.curves import series_of, speedup, steps_to_reach
from report.records import headline, kind_of, lower_is_better, points_file, points_under, protocols


def test_steps_to_reach_a_value_lie_where_the_line_between_two_checkpoints_crosses_it():
    steps, values = [100, 200, 400], [9.0, 5.0, 1.0]
    fine = np.arange(100, 401)
    drawn = np.interp(fine, steps, values)
    for goal in (8.0, 5.0, 4.2, 1.0):
        assert steps_to_reach(steps, values, goal) == pytest.approx(fine[drawn <= goal + 1e-12][0], abs=1)
    assert steps_to_reach(steps, values, 0.5) is None
    assert steps_to_reach(steps, values, 20.0) == 100  # there already
    assert steps_to_reach([1, 2, 3, 4], [5.0, 2.0, 4.0, 1.0], 3.0) == pytest.approx(
        1 + 2 / 3
    )  # the first time
    with pytest.raises(ValueError, match="must rise"):
        steps_to_reach([2, 1], [1.0, 2.0], 1.0)


def test_a_run_that_needs_half_of_the_steps_is_twice_as_fast():
    series = {
        "slow": {"steps": [100, 200], "values": [8.0, 4.0]},
        "fast": {"steps": [50, 100], "values": [8.0, 4.0]},
        "never": {"steps": [100, 200], "values": [9.0, 8.0]},
    }
    found = speedup(series, "slow")
    assert found["slow"] == {"goal": 4.0, "reached": 200, "factor": 1}
    assert found["fast"] == {"goal": 4.0, "reached": 100, "factor": 2}
    assert found["never"] == {"goal": 4.0, "reached": None, "factor": None}


def point(step, value, kind="curve", **protocol):
    metrics = {"adm_fid10k": {"value": value, "error": 0.1}}
    return {"step": step, "images_seen": 2 * step, "kind": kind, "protocol": protocol, "metrics": metrics}


def test_a_series_is_by_step_and_the_last_point_of_a_step_counts():
    points = [point(4, 3.0), point(2, 9.0), point(4, 5.0)]
    assert series_of(points, "adm_fid10k") == {
        "steps": [2, 4], "images": [4, 8], "values": [9.0, 5.0], "errors": [0.1, 0.1],
    }  # fmt: skip
    assert series_of(points, "adm_is10k") == {}


def test_points_of_another_protocol_or_purpose_are_left_out():
    points = [
        point(2, 1.0, cfg=1),
        point(2, 2.0, cfg=7.5),
        point(2, 3.0, kind="final", cfg=1),
        point(1, 4.0, cfg=1),
    ]
    assert points_under(points, {"cfg": 1}, ("curve",)) == [points[3], points[0]]
    assert protocols(points) == [{"cfg": 1}, {"cfg": 7.5}]


def test_names_say_what_is_measured_and_which_way_is_better():
    names = ["adm_is50k", "adm_sfid10k", "clean_fid2500", "adm_kid10k", "dinov2_fd300", "adm_precision10k"]
    assert [kind_of(name) for name in names] == ["is", "sfid", "fid", "kid", "fd", "precision"]
    assert [lower_is_better(name) for name in names] == [False, True, True, True, True, False]
    assert headline(names) == "clean_fid2500"  # sFID is no headline


WHOLE = {
    "target": "a", "images_seen": 4, "model": {}, "distance_of_halves": {"adm": None}, "samples": "samples/a",
    "command": "python evaluate.py", "date": "2026-01-01", "seconds": {"samples": 1.0},
}  # fmt: skip
PROTOCOL = {
    "sampler": "ddim", "steps": 2, "eta": 0.0, "cfg": 1.0, "guidance_interval": None, "guidance_space": None,
    "dtype": "float32", "labels": "balanced", "classes": 10, "seed": 0, "weights": "ema", "num_samples": 20, "judges": {},
}  # fmt: skip


def whole_point(step: int, value: float) -> dict:
    metric = {"value": value, "error": None, "error_kind": None, "notes": []}
    return WHOLE | {"step": step, "kind": "curve", "protocol": PROTOCOL, "metrics": {"clean_fid20": metric}}


def test_points_survive_a_crash_and_damage_is_named(tmp_path):
    log = points_file(tmp_path / "eval" / "points.jsonl")
    assert log.read() == []
    one, two = whole_point(1, 2.0), whole_point(2, 1.0)
    log.append(one)
    with open(log.path, "ab") as opened:
        opened.write('{"λ": "'.encode()[:3])
    assert log.read() == [one]
    log.append(two)
    assert log.read() == [one, two]
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [one, two]
    for damage in (b"oops\n", b"null\n", b'{"step": 3}\n', b"\xce\n"):
        log.path.write_bytes(json.dumps(one).encode() + b"\n" + damage)
        with pytest.raises(UserError, match="line 2 of"):
            log.read()
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append(whole_point(3, float("nan")))
