"""Imports point down only: scripts -> loss, dataset, run folder -> models, cache, evaluation -> nothing of ours."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOTTOM = {"errors", "files", "signals"}
CACHE = {f"preprocessing.{room}" for room in ("samples", "images", "manifest", "reader")}
# What each room may import of ours. A room that is not named here is a script and may import everything but scripts.
FLOORS = {
    "errors": set(),
    "files": set(),
    "signals": set(),
    "device": BOTTOM,
    "configs": BOTTOM | {"configs"},
    "models": BOTTOM | {"models"},
    "evaluation": BOTTOM | {"evaluation"},
    "preprocessing.encodings": set(),
    "preprocessing.lmdb_pages": set(),
    "preprocessing.manifest": BOTTOM | {"preprocessing.encodings"},
    "preprocessing.reader": BOTTOM | {"preprocessing.manifest", "preprocessing.lmdb_pages"},
    "preprocessing.locks": set(),
    "preprocessing.plan": BOTTOM | {"preprocessing.manifest"},
    "preprocessing.shards": BOTTOM
    | {f"preprocessing.{room}" for room in ("locks", "manifest", "plan", "reader")},
    "preprocessing.samples": BOTTOM,
    "preprocessing.classes": BOTTOM,
    "preprocessing.images": BOTTOM,
    "preprocessing.options": BOTTOM,
    "preprocessing.contact_sheet": set(),
    "preprocessing.pipeline": BOTTOM | CACHE | {"preprocessing.plan", "preprocessing.shards"},
    "preprocessing.encoders": BOTTOM
    | {"device", "models", "preprocessing.encodings", "preprocessing.manifest", "preprocessing.pipeline"},
    "loss_sd15": BOTTOM | {"models.alignment", "models.diffusion"},
    "dataset_sd15": BOTTOM | CACHE,
    "training": BOTTOM | {"configs", "training"},
    "build_sd15": BOTTOM | {"configs", "dataset_sd15", "device", "loss_sd15", "models", "training"},
    "selftest_sd15": BOTTOM | {"build_sd15", "dataset_sd15", "device", "models"},
}
SCRIPTS = {"train_sd15", "evaluate_sd15", "demo"}
# Outside libraries that have one room each.
ONE_ROOM = {"lmdb": "preprocessing.shards", "yaml": "configs.loading", "peft": "models.sd15_unet_aligned"}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("tests", ".venv", "benchmarks") and not parts[0].startswith("."):
            yield ".".join(parts), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def within(name, rooms):
    return any(name == room or name.startswith(room + ".") for room in rooms)


OURS = {name for name, _ in modules()} | {name.split(".")[0] for name, _ in modules()}


@pytest.mark.parametrize(
    ("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_point_down(name, path):
    room = next((room for room in FLOORS if within(name, {room})), None)
    for imported in imports(path):
        if within(imported, ONE_ROOM):
            assert within(name, {ONE_ROOM[imported.split(".")[0]]}), f"{name} must not know {imported}"
        if not within(imported, OURS):
            continue
        assert not within(imported, SCRIPTS), f"{name} imports the script {imported}"
        if room is not None:
            assert within(imported, FLOORS[room]), f"{name} must not import {imported}"


def test_no_file_outgrows_a_room():
    long = {name: lines for name, path in modules() if (lines := path.read_text().count("\n")) > 310}
    assert not long


def test_nothing_is_unpickled():
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), name
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "yaml.load"), name
