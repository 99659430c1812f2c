"""The option names of other trainers: renamed where they mean the same, refused with the name to use where not."""

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from common.errors import UserError
from configs.aliases import AS_IT_IS, REFUSED, RENAMED, SUGGESTED, hub_id
from configs.loading import knobs, load_config

ROOT = Path(__file__).parents[2]
BASE = ROOT / "configs" / "A.yaml"


def over(tmp_path, settings):
    file = tmp_path / "over.yaml"
    file.write_text(yaml.safe_dump(settings))
    return load_config([BASE, file])


def test_the_documented_example_means_what_its_users_know(tmp_path):
    """image_repa.*: cosine, 100 steps of warm-up, cut off at 5000, λ 0.5, w 3."""
    known = {
        "urepa_lambda": 0.5,
        "urepa_manifold_weight": 3.0,
        "urepa_scheduler": "cosine",
        "urepa_warmup_steps": 100,
        "urepa_cutoff_step": 5000,
    }
    align = over(tmp_path, known).align
    assert (align.coeff, align.manifold_coeff, align.schedule) == (0.5, 3.0, "cosine")
    assert (align.warmup_steps, align.cutoff_step) == (100, 5000)


def test_the_similarity_options_mean_what_their_users_know(tmp_path):
    known = {
        "urepa_scheduler": "polynomial",
        "urepa_similarity_threshold": 0.85,
        "urepa_similarity_ema_decay": 0.9,
        "urepa_threshold_mode": "recoverable",
        "urepa_decay_steps": 7,
        "urepa_lambda_end": 0.1,
        "urepa_power": 2.0,
    }
    align = over(tmp_path, known).align
    assert (align.similarity_threshold, align.similarity_ema_decay, align.threshold_mode) == (
        0.85,
        0.9,
        "recoverable",
    )
    assert (align.decay_steps, align.coeff_end, align.power) == (7, 0.1, 2.0)


def test_an_alias_of_a_later_file_wins_and_a_deliberate_zero_stays_zero(tmp_path):
    assert over(tmp_path, {"urepa_lambda": 0}).align.coeff == 0
    assert over(tmp_path, {"urepa_manifold_weight": 0}).align.manifold_coeff == 0
    assert load_config(BASE, ["urepa_lambda=0.25"]).align.coeff == 0.25


def test_enabled_is_what_it_is_here(tmp_path):
    assert over(tmp_path, {"urepa_enabled": True}) == load_config(BASE)


def test_an_alias_over_an_extended_file_is_no_second_name(tmp_path):
    (tmp_path / "below.yaml").write_text(BASE.read_text())
    file = tmp_path / "above.yaml"
    file.write_text("extends: below.yaml\nurepa_lambda: 0.5\n")
    assert load_config(file).align.coeff == 0.5


def test_both_names_of_one_setting_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"urepa_lambda and align\.coeff are the same setting"):
        over(tmp_path, {"urepa_lambda": 0.5, "align": {"coeff": 0.8}})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"urepa_enabled": False}, "align.coeff=0"),
        ({"crepa_enabled": False}, "align.coeff=0"),
        ({"urepa_encoder_image_size": 500}, "a multiple of that"),
        ({"urepa_use_tae": True}, "teacher.source=online"),
        ({"crepa_use_backbone_features": True}, "needs teacher.block"),
        ({"crepa_teacher_block_index": 12}, "is for teacher.source=backbone"),
        ({"crepa_adjacent_distance": -1}, "align.neighbours = -1"),
        ({"crepa_adjacent_distance": 1, "crepa_adjacent_tau": 0}, "align.neighbour_tau = 0"),
        ({"crepa_adjacent_tau": 2.0}, "no effect while align.neighbours = 0"),
        ({"crepa_cumulative_neighbors": True}, "no effect while align.neighbours = 0"),
        ({"crepa_adjacent_distance": 1, "align": {"neighbours": 1}}, "are the same setting"),
        ({"crepa_spatial_align": True, "align": {"spatial": True}}, "are the same setting"),
        ({"crepa_drop_vae_encoder": False}, "loads no VAE"),
        ({"urepa_nonsense": 1}, "unknown key 'urepa_nonsense'"),
        ({"urepa_lambda": 0.5, "crepa_lambda": 0.5}, "urepa_lambda and crepa_lambda are the same setting"),
        ({"urepa_model": "dinov2_vitg14", "teacher": {"model": "x"}}, "urepa_model and teacher.model"),
        ({"urepa_model": 3}, "teacher.model = 3"),
        ({"pretrained_model_name_or_path": "x"}, "did you mean 'model.base'?"),
        ({"--learning_rate": 1e-4}, "did you mean 'optim.lr'?"),
    ],
)
def test_what_has_no_equal_is_refused_with_the_name_to_use(tmp_path, settings, said):
    with pytest.raises(UserError, match=re.escape(said)):
        over(tmp_path, settings)


class TestJson:
    THEIRS: ClassVar = {
        "--urepa_enabled": True,
        "urepa_lambda": 0.5,
        "urepa_manifold_weight": 3.0,
        "urepa_model": "dinov2_vitg14",
        "urepa_encoder_image_size": 518,
        "urepa_use_tae": False,
    }

    @pytest.mark.parametrize("indent", [None, 2, "\t"])
    def test_the_documented_example_is_laid_over_a_config_of_ours(self, tmp_path, indent):
        file = tmp_path / "their.json"
        file.write_text(json.dumps(self.THEIRS, indent=indent))
        config = load_config([ROOT / "configs/families/sd15.yaml", file])
        assert (config.align.coeff, config.align.manifold_coeff) == (0.5, 3.0)
        teacher = config.teacher
        assert (teacher.model, teacher.dim, teacher.grid) == ("facebook/dinov2-giant", 1536, 37)

    def test_half_of_it_is_one_line(self, tmp_path):
        file = tmp_path / "their.json"
        file.write_text(json.dumps(self.THEIRS)[:40])
        with pytest.raises(UserError, match=r"their\.json is not valid") as error:
            load_config([BASE, file])
        assert "\n" not in str(error.value)


def test_crepa_of_an_image_is_repa_on_a_block_without_a_manifold_loss(tmp_path):
    known = {"crepa_enabled": True, "crepa_block_index": 8, "crepa_lambda": 0.5, "crepa_spatial_align": True}
    config = over(tmp_path, known | {"crepa_encoder": "dinov2_vitb14_reg", "crepa_encoder_image_size": 224})
    assert (config.align.taps, config.align.coeff, config.align.manifold_coeff) == (("block8",), 0.5, 0.0)
    assert config.teacher.model == "facebook/dinov2-with-registers-base"
    assert (config.teacher.dim, config.teacher.grid) == (768, 16)
    assert over(tmp_path, known | {"align": {"manifold_coeff": 2.0}}).align.manifold_coeff == 2.0
    by_hand = load_config(
        BASE, ["align.manifold_coeff=2.0", "crepa_enabled=true", "urepa_model=dinov2_vits14"]
    )
    assert (by_hand.align.manifold_coeff, by_hand.teacher.dim) == (2.0, 384)


def test_the_neighbours_of_crepa_are_those_of_here(tmp_path):
    known = {"crepa_adjacent_distance": 2, "crepa_adjacent_tau": 0.5, "crepa_cumulative_neighbors": True}
    known |= {"crepa_normalize_by_frames": False, "crepa_normalize_neighbour_sum": True}
    align = over(tmp_path, known | {"crepa_spatial_align": False, "crepa_drop_vae_encoder": True}).align
    assert (align.neighbours, align.neighbour_tau, align.cumulative) == (2, 0.5, True)
    assert (align.normalize_by_frames, align.normalize_neighbours, align.spatial) == (False, True, False)


def test_backbone_features_are_a_block_of_the_network_as_teacher(tmp_path):
    known = {"crepa_use_backbone_features": True, "crepa_block_index": 8, "crepa_teacher_block_index": 16}
    config = over(tmp_path, known)
    assert (config.teacher.source, config.teacher.block) == ("backbone", "block16")
    assert config.align.taps == ("block8",)
    assert over(tmp_path, {"crepa_use_backbone_features": False}).teacher.source == "cached"


def test_the_published_files_are_the_models_on_the_hub_and_other_names_are_themselves():
    assert hub_id("/x/dinov2_vitl14_reg4_pretrain.pth") == hub_id("dinov2_vitl14_reg")
    assert hub_id("facebook/dinov2-large") == hub_id("dinov2_vitl14") == "facebook/dinov2-large"
    assert hub_id("dinov2_vitl14_mine.pth") == "dinov2_vitl14_mine.pth"


def test_every_alias_points_at_a_knob_and_stands_in_the_docs():
    assert {*RENAMED.values(), *SUGGESTED.values()} <= set(knobs())
    assert not set(RENAMED) & set(REFUSED)
    assert set(AS_IT_IS) <= set(REFUSED) | set(RENAMED)
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for alias in (*RENAMED, *REFUSED):
        assert f"`{alias}`" in page, alias
    for alias, key in RENAMED.items():
        assert re.search(rf"`{alias}`[^\n]*`{re.escape(key)}`", page), alias


def test_every_option_name_of_the_option_documents_is_known():
    """As listed there for U-REPA, for REPA and CREPA, and for the coefficient's schedule under either prefix."""
    schedule = (
        "enabled lambda encoder encoder_image_size use_tae scheduler warmup_steps decay_steps lambda_end power cutoff_step "
        "similarity_threshold similarity_ema_decay threshold_mode"
    )
    urepa = "manifold_weight model"
    crepa = (
        "block_index spatial_align adjacent_distance adjacent_tau cumulative_neighbors normalize_by_frames "
        "normalize_neighbour_sum use_backbone_features teacher_block_index drop_vae_encoder"
    )
    names = {f"urepa_{name}" for name in f"{schedule} {urepa}".split()}
    names |= {f"crepa_{name}" for name in f"{schedule} {crepa}".split()}
    assert names <= set(RENAMED) | set(REFUSED)
