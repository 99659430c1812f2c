"""The option names of other trainers: renamed where they mean the same, refused with the name to use where not."""

import re
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from configs.aliases import REFUSED, RENAMED, SUGGESTED
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
        ({"urepa_model": "dinov2_vitg14"}, "--teacher facebook/dinov2-giant"),
        ({"urepa_model": "dinov2_vitb14_reg"}, "--teacher facebook/dinov2-with-registers-base"),
        ({"urepa_encoder_image_size": 518}, "teacher.grid=37"),
        ({"urepa_use_tae": True}, "teacher.source=online"),
        ({"urepa_nonsense": 1}, "unknown key 'urepa_nonsense'"),
    ],
)
def test_what_has_no_equal_is_refused_with_the_name_to_use(tmp_path, settings, said):
    with pytest.raises(UserError, match=re.escape(said)):
        over(tmp_path, settings)


def test_every_alias_points_at_a_knob_and_stands_in_the_docs():
    assert {*RENAMED.values(), *SUGGESTED.values()} <= set(knobs())
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for alias in (*RENAMED, *REFUSED):
        assert f"`{alias}`" in page, alias
    for alias, key in RENAMED.items():
        assert re.search(rf"`{alias}`[^\n]*`{re.escape(key)}`", page), alias


def test_every_option_name_of_the_option_documents_is_known():
    """As listed there for U-REPA, and for the coefficient's schedule under either prefix."""
    known = (
        "enabled lambda manifold_weight model encoder_image_size use_tae scheduler warmup_steps decay_steps lambda_end power "
        "cutoff_step similarity_threshold similarity_ema_decay threshold_mode"
    )
    assert {f"urepa_{name}" for name in known.split()} <= set(RENAMED) | set(REFUSED)
