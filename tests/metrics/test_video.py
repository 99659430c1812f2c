"""Metrics of clips against answers that are known."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from scipy import ndimage

from common.errors import UserError
from metrics.extractors import load_video_classifier
from metrics.moments import Moments, frechet_distance
from metrics.video import compare_clips, measure_clips, measure_motion, temporal_consistency, warp


def texture(seed=0, side=96):
    noise = np.random.default_rng(seed).normal(size=(side, side, 3))
    smooth = ndimage.gaussian_filter(noise, (3, 3, 0), mode="wrap")
    return ((smooth / np.abs(smooth).max() + 1) * 127).astype(np.uint8)


def moving(shift, frames=5, seed=0):
    """A texture that is shifted by (y, x) pixels a frame, around the edge."""
    picture = texture(seed)
    return np.stack([np.roll(picture, (shift[0] * i, shift[1] * i), (0, 1)) for i in range(frames)])


def inner(clip, border=16):
    return clip[:, border:-border, border:-border].copy()


def test_a_still_clip_neither_moves_nor_flickers():
    still = measure_motion(moving((0, 0)))
    assert still == {"flicker": 0, "warping_error": 0, "motion": 0, "difference": 0}


@pytest.mark.parametrize("shift", [(2, 1), (0, -3), (-2, 0)])
def test_a_shifted_texture_differs_but_warps_onto_itself(shift):
    found = measure_motion(inner(moving(shift)))
    assert found["motion"] == pytest.approx(np.hypot(*shift), rel=0.1)
    assert found["difference"] > 5
    assert found["warping_error"] < 2e-4
    # What the same frames would give if nothing were warped.
    clip = inner(moving(shift)).astype(np.float64) / 255
    assert np.square(np.diff(clip, axis=0)).mean() > 10 * found["warping_error"]


def test_brightness_that_jumps_is_flicker_of_its_own_size():
    clip = np.stack([np.clip(texture().astype(int) // 2 + 40 + 6 * (i % 2), 0, 255) for i in range(5)])
    found = measure_motion(clip.astype(np.uint8))
    assert found["flicker"] == pytest.approx(6, abs=0.1)
    assert found["warping_error"] == pytest.approx((6 / 255) ** 2, rel=0.1)


def test_flicker_is_measured_of_what_stands_still_alone():
    """The left half stands, with a jump of 4 levels, while the right half moves."""
    clip = moving((0, 4), 4)
    clip[:, :, :48] = np.stack([texture(1)[:, :48] // 2 + 20 + 4 * (i % 2) for i in range(4)])
    found = measure_motion(clip)
    assert found["flicker"] == pytest.approx(4, abs=1)
    assert found["difference"] > 2 * found["flicker"]


def test_warping_reads_at_the_moved_place():
    picture = np.arange(30, dtype=np.float32).reshape(5, 6)
    flow = np.zeros((5, 6, 2), np.float32)
    flow[..., 0], flow[..., 1] = 1, 0.5
    moved = warp(picture, flow)
    assert np.allclose(moved[:4, :5], picture[:4, 1:] + 3)


def frame_features(clips):
    """Blocks of 8 px as the features of cells, without their mean: (n, F, N, D)."""
    n, f, h, w, _ = clips.shape
    blocks = clips.astype(np.float64).reshape(n, f, h // 8, 8, w // 8, 8, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    blocks = blocks.reshape(n, f, -1, 192)
    return blocks - blocks.mean((1, 2, 3), keepdims=True)


def test_shuffled_frames_are_less_consistent_and_move_more():
    clips = np.stack([moving((1, 1), 8, seed) for seed in range(3)])
    order = np.array([3, 0, 6, 2, 7, 1, 5, 4])
    ordered, shuffled = (temporal_consistency(frame_features(c)) for c in (clips, clips[:, order]))
    assert (shuffled < ordered - 0.1).all()
    ordered, shuffled = (measure_clips(c)["warping_error"] for c in (clips, clips[:, order]))
    assert (shuffled > 5 * ordered).all()


def test_consistency_is_the_cosine_of_neighbours():
    features = np.random.default_rng(0).normal(size=(4, 5, 7, 11))
    expected = [
        np.mean(
            [
                a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                for t in range(4)
                for a, b in zip(clip[t], clip[t + 1], strict=True)
            ]
        )
        for clip in features
    ]
    assert np.allclose(temporal_consistency(features), expected)
    assert np.allclose(temporal_consistency(features[:, :, 0]), temporal_consistency(features[:, :, :1]))
    assert np.allclose(temporal_consistency(np.ones((2, 3, 4))), 1)


def test_every_measure_stands_beside_that_of_real_clips():
    rng = np.random.default_rng(0)
    drawn, real = ([moving(shift, 3, seed) for seed in range(3)] for shift in ((2, 0), (0, 1)))
    features = rng.normal(size=(3, 2)), rng.normal(size=(9, 2))
    frames = [frame_features(np.stack(clips)) for clips in (drawn, real)]
    found = compare_clips(
        measure_clips(drawn), measure_clips(real), drawn_features=features[0],
        real_features=features[1], drawn_frames=frames[0], real_frames=frames[1]
    )  # fmt: skip
    names = {"flicker", "warping_error", "motion", "difference", "consistency", "fd"}
    assert found.keys() == {f"video_{name}3" for name in names}
    for name in names - {"fd", "consistency"}:
        ours, theirs = measure_clips(drawn)[name], measure_clips(real)[name]
        entry = found[f"video_{name}3"]
        assert (entry["value"], entry["real"]) == (
            pytest.approx(np.nanmean(ours)),
            pytest.approx(np.nanmean(theirs)),
        )
    expected = frechet_distance(*(Moments().update(part) for part in features))
    assert found["video_fd3"]["value"] == pytest.approx(expected)
    assert found["video_fd3"]["error"] > 0


def test_where_nothing_stands_still_that_is_said():
    entry = compare_clips(*(measure_clips([moving(shift, 3)]) for shift in ((3, 3), (0, 0))))[
        "video_flicker1"
    ]
    assert (entry["value"], entry["real"]) == (None, 0)
    assert entry["notes"] == ["1 of 1 clips have no pixel to measure"]


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (4, 8, 8), (4, 8, 8, 4)])
def test_what_is_no_clip_is_refused(shape):
    with pytest.raises(ValueError, match="a clip is"):
        measure_motion(np.zeros(shape, np.uint8))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """{name: the folder of a small video classifier of random weights}."""
    folder = tmp_path_factory.mktemp("video")
    small = {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    small |= {"num_frames": 4, "intermediate_size": 16, "num_labels": 5}
    kinds = {
        "videomae": (transformers.VideoMAEConfig, transformers.VideoMAEForVideoClassification),
        "vivit": (transformers.VivitConfig, transformers.VivitForVideoClassification),
        "timesformer": (transformers.TimesformerConfig, transformers.TimesformerForVideoClassification),
    }
    torch.manual_seed(0)
    for name, (config, model) in kinds.items():
        more = {"tubelet_size": [2, 8, 8]} if name == "vivit" else {}
        model(config(**small, **more)).save_pretrained(folder / name)
        half, size = [0.5] * 3, {"height": 16, "width": 16}
        preparation = {"image_mean": half, "image_std": half, "size": size}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder


@pytest.mark.parametrize("name", ["videomae", "vivit", "timesformer"])
def test_features_of_clips_are_what_the_models_last_layer_takes(classifiers, name):
    extractor = load_video_classifier(classifiers / name, "cpu")
    clips = np.stack([inner(moving((1, 2), 7, seed), 40) for seed in range(3)])  # (3, 7, 16, 16, 3)
    found = extractor.features(clips, batch_size=2)
    pixels = torch.from_numpy(clips[:, [0, 2, 4, 6]]).permute(0, 1, 4, 2, 3) / 127.5 - 1
    with torch.no_grad():
        logits = extractor.model(pixel_values=pixels).logits
        expected = extractor.head(torch.from_numpy(found.pool))
    torch.testing.assert_close(torch.from_numpy(found.logits), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected, logits, atol=1e-5, rtol=1e-5)
    assert (found.labels == logits.argmax(-1).numpy()).all()
    assert (extractor.identity["protocol"], extractor.identity["frames"]) == ("video", 4)


def test_another_model_and_another_number_of_frames_are_one_line(classifiers, tmp_path):
    config = json.loads((classifiers / "videomae/config.json").read_text())
    for change, says in (
        ({"architectures": ["ViTForImageClassification"]}, "video classifier"),
        ({"num_frames": 0}, "num_frames"),
    ):
        folder = tmp_path / says
        shutil.copytree(classifiers / "videomae", folder)
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=says):
            load_video_classifier(folder, "cpu")
    with pytest.raises(UserError, match="no such folder"):
        load_video_classifier(tmp_path / "none", "cpu")
