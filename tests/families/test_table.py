"""The table of families: how the family of a base model is found, and the config to start from."""

from pathlib import Path

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
