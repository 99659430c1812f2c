"""Hostile input that nobody thought of: records and configs, changed at random from a fixed seed (`make test-full`).

A reader returns what fits its schema or raises `UserError` with one line; a command keeps the promise of `hostile.py`.
"""

import copy
import json
from pathlib import Path

import pytest
import yaml
from hostile import contents, copy_house, run
from house import SETTINGS, build
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from spoil import only, put

from cache.manifest import read_manifest
from common.errors import UserError
from common.reading import read_record
from common.stages import Record
from configs.loading import load_config
from evaluation.sample import SamplesManifest
from export import read_made_from
from miniature.make import Quality
from report.records import points_file, read_alignment
from training.checkpoint import state_of
from training.run_folder import RunFolder

pytestmark = pytest.mark.thorough
REPORT, TRAIN, DEMO = (
    "evaluate report runs/a -o page.html",
    "train --config a.yaml run=runs/b",
    "0 --out data --quick",
)
# Each record, its reader in this process, and the command that reads it.
RECORDS = {
    "runs/a/run.json": (lambda path: RunFolder(path.parent).commands(), REPORT),
    "runs/a/metrics.jsonl": (lambda path: RunFolder(path.parent).metrics(), REPORT),
    "runs/a/eval/points.jsonl": (lambda path: points_file(path).read(), REPORT),
    "runs/a/eval/align.json": (lambda path: read_alignment(path.parent), REPORT),
    "runs/a/export/made_from.json": (read_made_from, "export runs/a"),
    "runs/a/checkpoints/step-0000006/state.json": (lambda path: state_of(path.parent), "export runs/a"),
    "runs/a/samples/*/manifest.json": (
        lambda path: read_record(path, SamplesManifest, "remove it"),
        "evaluate sample runs/a eval.num_samples=4 eval.seed=1",
    ),
    "cache/latents/manifest.json": (lambda path: read_manifest(path.parent, "latents"), TRAIN),
    "cache/tokens/manifest.json": (lambda path: read_manifest(path.parent, "tokens"), TRAIN),
    "cache/text/manifest.json": (lambda path: read_manifest(path.parent, "text"), TRAIN),
    "data/models/quality.json": (lambda path: read_record(path, Quality, "remove it"), DEMO),
    "runs/study/stages.json": (Record, "ablate --base a.yaml --out runs/study lora.yaml --seeds 0"),
}
STAGES = [{"stage": "x", "seconds": 1.0, "command": "y", "group": 0}]
LEAVES = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1.5,
        10**30,
        -1e308,
        float("nan"),
        "",
        "x",
        "../../x",
        "\x00",
        "\ud800",
        "7",
        [],
        {},
        [[]],
        {"a": 1},
    ]
).map(copy.deepcopy)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("house"))
    put(folder / "runs/study/stages.json", json.dumps(STAGES))
    return folder


def examples(count: int) -> settings:
    """So many examples, always the same; a slow machine is no failure."""
    quiet = {
        "database": None,
        "deadline": None,
        "suppress_health_check": list(HealthCheck),
        "phases": [Phase.generate],
    }
    return settings(max_examples=count, derandomize=True, **quiet)


def places(content, above=()):
    """The keys to every value below a JSON value."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def change_value(draw, content):
    """Replace, remove or add one value somewhere below."""
    everywhere = list(places(content))
    if not everywhere:  # all of it was removed
        return
    *above, last = draw(st.sampled_from(everywhere))
    node = content
    for key in above:
        node = node[key]
    how = draw(st.sampled_from(("replace", "remove", "add")))
    if how == "remove":
        del node[last]
    elif how == "add" and isinstance(node, dict):
        node[draw(st.sampled_from(("new", "", "λ", "step")))] = draw(LEAVES)
    else:
        node[last] = draw(LEAVES)


def change_bytes(draw, data: bytes) -> bytes:
    """Cut out, overwrite or insert a few bytes."""
    start = draw(st.integers(0, len(data)))
    return data[:start] + draw(st.binary(max_size=8)) + data[start + draw(st.integers(0, 40)) :]


def changed(draw, data: bytes, read, write) -> bytes:
    """A file's content after one to three changes, of values or of bytes."""
    if draw(st.integers(0, 3)) == 0:
        return change_bytes(draw, data)
    content = read(data)
    for _ in range(draw(st.integers(1, 3))):
        change_value(draw, content)
    return write(content)


def as_json(content) -> bytes:
    return json.dumps(content).encode()


def changed_record(draw, path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".json":
        return changed(draw, data, json.loads, as_json)
    lines = data.splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = changed(draw, lines[at], json.loads, lambda content: as_json(content) + b"\n")
    return b"".join(lines)


def answers(action) -> None:
    """`action` succeeds, or raises what a user reads as one line."""
    said = None
    try:
        action()
    except UserError as error:
        said = str(error)
    assert said is None or 0 < len(said) < 700


@pytest.mark.parametrize("pattern", RECORDS)
def test_a_changed_record_is_read_or_refused(pattern, house, tmp_path):
    read, _ = RECORDS[pattern]
    path = only(copy_house(house, tmp_path / "house"), pattern)
    before = path.read_bytes()

    @examples(300)
    @given(st.data())
    def check(data):
        put(path, before)
        put(path, changed_record(data.draw, path))
        answers(lambda: read(path))

    check()


@pytest.mark.parametrize(
    "pattern", [pattern for pattern in RECORDS if "study" not in pattern]
)  # that one trains
def test_a_command_keeps_its_promise_with_a_changed_record(pattern, house, tmp_path):
    command, number = RECORDS[pattern][1], iter(range(10**6))

    @examples(6)
    @given(st.data())
    def check(data):
        folder = copy_house(house, tmp_path / str(next(number)))
        path = only(folder, pattern)
        put(path, changed_record(data.draw, path))
        before = contents(folder)
        outcome = run(command, folder, patience=60)
        said = outcome.err + outcome.out
        assert outcome.code in (0, 2), said
        assert "Traceback" not in said
        if outcome.code == 2:
            assert sum("error: " in line for line in outcome.err.replace("\r", "\n").split("\n")) == 1, said
            after = contents(folder)
            assert {name: after.get(name) for name in before} == before, said

    check()


def test_a_changed_config_is_read_or_refused(tmp_path):
    path, before = tmp_path / "a.yaml", SETTINGS.encode()

    @examples(1500)
    @given(st.data())
    def check(data):
        write = lambda content: yaml.safe_dump(content).encode()  # noqa: E731
        put(path, changed(data.draw, before, yaml.safe_load, write))
        answers(lambda: load_config(path))

    check()


def test_any_value_of_a_setting_is_read_or_refused(tmp_path):
    put(tmp_path / "a.yaml", SETTINGS)
    keys = st.sampled_from(
        ["train.steps", "optim.lr", "align.taps", "data.csv", "model.base", "eval.reference", "seed", "x"]
    )
    text = st.one_of(
        st.text(max_size=12), st.text("0123456789.-+eE_:xob~!&*[]{}<>|'\" \t#%@`,?", max_size=12)
    )

    @examples(3000)
    @given(keys, text)
    def check(key, value):
        answers(lambda: load_config(tmp_path / "a.yaml", [f"{key}={value}"]))

    check()
