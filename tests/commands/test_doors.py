"""The plan's names still open: each door hands over to the code that serves any family."""

import importlib
import runpy

import pytest
from small_runs import ROOT

from training import ranks

DOORS = {
    "train_sd15": ("main",),
    "evaluate_sd15": ("main",),
    "loss_sd15": ("SD15Loss", "manifold_gram_loss"),
    "dataset_sd15": ("SD15AlignedDataset",),
    "models.sd15_unet_aligned": ("SD15UNetAligned", "AlignHead"),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_has_the_names_of_the_plan_and_says_how_to_use_them(door):
    module = importlib.import_module(door)
    assert all(hasattr(module, name) for name in DOORS[door])
    assert f"python {door}.py" in module.__doc__ or f"from {door} import" in module.__doc__


def test_the_doors_of_the_commands_are_the_commands():
    for door, command in (("train_sd15", "train"), ("evaluate_sd15", "evaluate")):
        assert importlib.import_module(door).main is importlib.import_module(command).main


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_door_lets_several_processes_end_together(command, monkeypatch):
    """A process that ended in the group was aborted now and then by the group's own threads."""
    ended = []
    monkeypatch.setattr(importlib.import_module(command), "main", lambda: ended.append("main"))
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "barrier", lambda: ended.append("barrier"))
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: ended.append("group"))
    runpy.run_path(str(ROOT / f"{command}_sd15.py"), run_name="__main__")
    assert ended == ["main", "barrier", "group"]


def test_the_plans_dataset_has_the_plans_arguments(miniature):
    names = ("csv_path", "latent_dir", "dino_dir", "clip_embeddings_path")
    places = ("train.csv", "cache/latents", "cache/tokens", "cache/text")
    given = {name: miniature / place for name, place in zip(names, places, strict=True)}
    assert len(importlib.import_module("dataset_sd15").SD15AlignedDataset(**given)) == 60
