"""The plan's names still open: each door hands over to the code that serves any family."""

import importlib

import pytest

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
