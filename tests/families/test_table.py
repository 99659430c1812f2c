"""The table of families: how the family of a base model is found, and the config to start from."""

import json
from pathlib import Path

import diffusers
import pytest

from common.errors import UserError
from configs.loading import load_config
from models.families.table import FAMILIES, family_of

ROOT = Path(__file__).parents[2]


def test_every_family_has_a_config_to_start_from():
    for name, family in FAMILIES.items():
        config = load_config(ROOT / "configs" / "families" / f"{name}.yaml")
        assert type(family_of(config.model.base)) is family
        network = (
            family(config.model.base).network_of_shapes(local=True)[0]
            if config.align.taps != ("auto",)
            else None
        )
        assert network is None or set(config.align.taps) <= set(family(config.model.base).tap_names(network))
        assert config.model.lora_targets in ("auto", *family.lora_targets)


def test_the_usual_base_models_need_no_hub():
    for name, family in FAMILIES.items():
        assert type(family_of(family.default_base)) is FAMILIES[name]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "model_index.json cannot be read"),
        ("{", r"model_index.json: it is damaged"),
        ('{"_class_name": "OtherPipeline"}', "is a OtherPipeline"),
    ],
)
def test_a_folder_of_no_family_is_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=said) as error:
        family_of(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_folder_and_no_hub_id_is_one_line():
    with pytest.raises(UserError, match="does not exist"):
        family_of("./nowhere")


@pytest.mark.parametrize(
    ("config", "solver", "shift"),
    [
        ({"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0}, "unipc", 5.0),
        ({"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 4.0}, "dpm++", 4.0),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}, "euler", 2.0),
        ({"_class_name": "FlowMatchLCMScheduler", "shift": 6.0}, "euler", 6.0),
    ],
)
def test_a_flows_scheduler_is_read_as_its_own_config_says(tmp_path, config, solver, shift):
    """Some base models of one family have one, some another; read as another class, the shift would be lost."""
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} | config
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    family = FAMILIES["hidream"](str(tmp_path))
    assert family.sampler_of("auto") == solver
    assert family.path((16, 8, 8)).shift == family.shift_of((16, 8, 8)) == shift
    assert family.scheduler is family.scheduler


@pytest.mark.parametrize("shift", [-3.0, 0.0])
def test_a_scheduler_whose_shift_is_none_is_one_line(tmp_path, shift):
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"has shift = {shift}"):
        FAMILIES["sd3"](str(tmp_path)).path((16, 8, 8))


def test_a_network_without_blocks_is_one_line():
    network = diffusers.SD3Transformer2DModel(num_layers=0, attention_head_dim=4, num_attention_heads=1)
    with pytest.raises(UserError, match="has no blocks"):
        FAMILIES["sd3"]("base").check(network)
