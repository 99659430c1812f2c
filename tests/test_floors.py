"""Imports point down only, and every room is listed here: a file in a room that this test does not know fails."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The rooms from the ground up, and what each may import of the others. Within a room files may import each other,
# without a circle.
FLOORS = {
    "common": set(),
    "method": set(),
    "configs": {"common", "method"},
    "cache": {"common"},
    "models": {"common", "method"},
    "models.families": {
        "common",
        "method",
        "models.backbone",
        "models.latents",
        "models.pipeline_parts",
        "models.taps",
    },
    "models.teachers": {"common", "models.latents", "models.pipeline_parts"},
    "metrics": {"common"},
    "report": {"common", "metrics"},
    "preprocessing": {"common", "cache", "models"},
    "miniature": {"common", "models.teachers", "cache.films"},
    "training": {"common", "configs", "method", "cache", "models"},
    "evaluation": {"common", "configs", "method", "cache", "models", "metrics", "report", "training"},
}
COMMANDS = {"train", "evaluate", "export", "ablate", "demo"}
DOORS = {"train_sd15", "evaluate_sd15", "loss_sd15", "dataset_sd15", "models.sd15_unet_aligned"}
# Scripts that stand in a room, and the room from which they may also import.
SCRIPTS = {"preprocessing.0_make_demo": {"miniature"}}
# A command calls another only where it hands over: training ends with an export.
BETWEEN_COMMANDS = {("train", "export"), ("train_sd15", "train"), ("evaluate_sd15", "evaluate")}
# Outside libraries that have one room each.
ONE_ROOM = {
    "lmdb": {"cache.shards"},
    "yaml": {"configs.dialect"},
    "peft": {"models.aligned"},
    "av": {"cache.clips", "cache.films"},
    "cv2": {"metrics.video"},
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("tests", "benchmarks", "runs", "data") and not parts[0].startswith("."):
            yield ".".join(part for part in parts if part != "__init__"), path


MODULES = dict(modules())


def imports(path):
    """The modules that a file imports, by the names of their files."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                within_package = f"{node.module}.{alias.name}"
                yield within_package if within_package in MODULES else node.module


def within(name, rooms):
    return any(name == room or name.startswith(room + ".") for room in rooms)


def room_of(name):
    """The innermost room that a module stands in."""
    found = [room for room in FLOORS if within(name, {room})]
    return max(found, key=len) if found else None


def test_every_file_stands_in_a_room_or_is_a_command_or_a_door():
    unknown = {name for name in MODULES if room_of(name) is None} - COMMANDS - DOORS
    assert not unknown, f"tests/test_floors.py does not know {sorted(unknown)}: which room does it belong to?"
    assert MODULES.keys() >= COMMANDS | DOORS


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    room = room_of(name)
    for imported in imports(MODULES[name]):
        if (library := imported.split(".")[0]) in ONE_ROOM:
            assert within(name, ONE_ROOM[library]), f"{name} must not know {imported}"
        if imported not in MODULES:
            continue
        if imported in COMMANDS | DOORS:
            assert (name, imported) in BETWEEN_COMMANDS, f"{name} imports the command {imported}"
        elif room is not None and name not in DOORS:
            allowed = FLOORS[room] | {room} | SCRIPTS.get(name, set())
            assert within(imported, allowed), f"{name} must not import {imported}"


def test_no_file_imports_itself_by_a_detour():
    arrows = {
        name: {found for found in imports(path) if found in MODULES and found != name}
        for name, path in MODULES.items()
    }
    done, walked = set(), []

    def walk(name):
        assert name not in walked, f"a circle: {' -> '.join([*walked[walked.index(name) :], name])}"
        if name in done:
            return
        walked.append(name)
        for found in sorted(arrows[name]):
            walk(found)
        done.add(walked.pop())

    for name in arrows:
        walk(name)


def test_no_file_outgrows_a_room():
    long = {name: lines for name, path in MODULES.items() if (lines := path.read_text().count("\n")) > 320}
    assert not long


def test_nothing_is_unpickled():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), name
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "yaml.load"), name
