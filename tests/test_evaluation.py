"""Properties of evaluation/: sampling, features, Fréchet distance, on small random networks."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from transformers import ResNetConfig, ResNetForImageClassification

from errors import UserError
from evaluation import metrics, sampling
from evaluation.features import load_extractor
from evaluation.metrics import Moments, frechet_distance

SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64, 64),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    return net.eval()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    net = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.3,
    )
    return net.eval()


@pytest.fixture(scope="module")
def text():
    return torch.randn(7, 5, 32, generator=torch.Generator().manual_seed(2))  # (7, L, D)


@pytest.fixture(scope="module")
def null_text():
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(3))  # (L, D)


def ddim(prediction_type="epsilon"):
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def sample(unet, text, null_text, seeds, *, steps=3, cfg=1.0, **kwargs):
    return sampling.sample_latents(
        unet, ddim(), text, null_text, seeds, shape=SHAPE, steps=steps, cfg=cfg, **kwargs
    )


# Sampling


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_images_equal_those_of_the_stable_diffusion_pipeline(
    unet, vae, text, null_text, prediction_type, cfg
):
    seeds, scheduler = [11, 5], ddim(prediction_type)
    pipeline = StableDiffusionPipeline(
        vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=text[:2],
        negative_prompt_embeds=null_text.expand(2, -1, -1),
        latents=sampling.initial_noise(seeds, SHAPE),
        num_inference_steps=4,
        guidance_scale=cfg,
        output_type="pil",
    ).images
    latents = sampling.sample_latents(
        unet, ddim(prediction_type), text[:2], null_text, seeds, shape=SHAPE, steps=4, cfg=cfg
    )
    images = sampling.decode_latents(vae, latents)
    assert images.std() > 3  # not a flat picture, which would hide any difference
    np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image in expected]))


def test_decoding_rounds_as_the_image_processor_does(vae):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4)) * 0.5
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    expected = VaeImageProcessor().postprocess(decoded, output_type="pil")
    images = sampling.decode_latents(vae, latents, batch_size=2)
    np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image in expected]))


def test_an_image_does_not_depend_on_the_batch_it_is_in(unet, text, null_text):
    """Close, not bit-equal: convolutions and matrix products sum in another order for another batch size."""
    seeds = [40 + i for i in range(7)]
    whole = sample(unet, text, null_text, seeds, cfg=3.0)
    for size in (1, 3):
        parts = [
            sample(unet, text[i : i + size], null_text, seeds[i : i + size], cfg=3.0)
            for i in range(0, 7, size)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, atol=2e-5, rtol=1e-4)
    assert torch.equal(sampling.initial_noise(seeds, SHAPE)[3:4], sampling.initial_noise(seeds[3:4], SHAPE))
    assert not torch.allclose(whole[0], whole[1], atol=0.1)


@pytest.mark.parametrize(("cfg", "high", "rows"), [(1.0, 1.0, 2), (3.0, 1.0, 4), (3.0, 0.0, 2)])
def test_unguided_steps_cost_one_forward_and_guided_steps_two(unet, text, null_text, cfg, high, rows):
    seen = []
    handle = unet.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    try:
        sample(unet, text[:2], null_text, [0, 1], steps=5, cfg=cfg, guidance_high=high)
    finally:
        handle.remove()
    assert seen == [rows] * 5


def test_a_guidance_interval_ends_at_equal_noise_or_at_equal_index():
    """REPA's 0.7 has sigma / alpha = 0.7 / 0.3; on SD's schedule that is index 605, not 700."""
    abar, t = ddim().alphas_cumprod, torch.arange(1000)
    assert sum(sampling.guided_steps(abar, t, high=0.7, space="snr")) - 1 == 605
    assert sum(sampling.guided_steps(abar, t, high=0.7, space="index")) - 1 == 700
    assert ((1 - abar[605]) / abar[605]).sqrt() <= 7 / 3 < ((1 - abar[606]) / abar[606]).sqrt()


def test_sampling_refuses_what_would_break_its_promises(unet, text, null_text):
    with pytest.raises(ValueError, match="only DDIM"):
        sampling.sample_latents(unet, DDPMScheduler(), text, null_text, range(7), shape=SHAPE, steps=2, cfg=1)
    with pytest.raises(ValueError, match="6 seeds for 7"):
        sample(unet, text, null_text, list(range(6)))
    with pytest.raises(ValueError, match="null_text"):
        sample(unet, text, null_text[None], list(range(7)))
    with pytest.raises(ValueError, match="at least 1"):
        sample(unet, text, null_text, list(range(7)), cfg=0.0)


def test_the_scheduler_handed_in_is_left_as_it_was(unet, text, null_text):
    scheduler = ddim()
    before = scheduler.timesteps.clone()
    sampling.sample_latents(unet, scheduler, text[:1], null_text, [0], shape=SHAPE, steps=2, cfg=1)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps is None


def test_labels_are_balanced_in_every_consecutive_stretch():
    labels = sampling.balanced_labels(35, 10)
    assert labels[:12] == [*range(10), 0, 1]
    assert all(len(set(labels[i : i + 10])) == 10 for i in range(25))


def test_a_diverged_run_is_reported_instead_of_painted_black(vae):
    with pytest.raises(UserError, match="not finite"):
        sampling.decode_latents(vae, torch.full((1, 4, 8, 8), float("nan")))


def test_images_survive_the_disk_and_fewer_than_asked_for_are_refused(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    sampling.save_images(images[:3], tmp_path)
    sampling.save_images(images[3:], tmp_path, names=range(3, 5))
    np.testing.assert_array_equal(sampling.load_images(tmp_path, 5), images)
    np.testing.assert_array_equal(sampling.load_images(tmp_path, 2, start=3), images[3:])
    assert {path.name for path in tmp_path.iterdir()} == {f"{i:06d}.png" for i in range(5)}
    with pytest.raises(UserError, match="5 of the 6"):
        sampling.load_images(tmp_path, 6)
    (tmp_path / "000005.png").write_bytes((tmp_path / "000004.png").read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        sampling.load_images(tmp_path, 6)
    sampling.save_images(images[:1, :4], tmp_path, names=[5])
    with pytest.raises(UserError, match="mixes image sizes"):
        sampling.load_images(tmp_path, 6)


# Features


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("classifier")
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=10
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    facts = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def test_features_are_the_pooled_ones_and_labels_those_of_the_model(classifier_folder):
    images = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    extractor = load_extractor(classifier_folder, "cpu")
    features, labels = extractor.features(images, batch_size=2)
    model = ResNetForImageClassification.from_pretrained(classifier_folder).eval()
    pixels = (images / 255.0 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    with torch.no_grad():
        x = torch.from_numpy(pixels).float().permute(0, 3, 1, 2)
        expected = model.resnet(x).pooler_output.flatten(1)
        logits = model(x).logits
    assert (extractor.name, extractor.dim, features.dtype) == ("classifier", 12, np.float32)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(labels, logits.argmax(-1).numpy())


def test_features_of_a_smooth_picture_hardly_depend_on_its_size(classifier_folder):
    """Aliasing would show here: a fine stripe pattern averages to grey when it is reduced properly."""
    stripes = np.zeros((1, 128, 128, 3), np.uint8)
    stripes[:, :, ::4] = stripes[:, :, 3::4] = 255  # each reduced pixel's centre falls between two black ones
    grey = np.full((1, 32, 32, 3), 127, np.uint8)
    extractor = load_extractor(classifier_folder, "cpu")
    a, b, black = (extractor.features(x)[0] for x in (stripes, grey, 0 * grey))
    assert np.abs(a - b)[0].max() < 0.2 * np.abs(black - b).max()


def test_a_missing_or_foreign_folder_is_one_line_to_the_user(classifier_folder, tmp_path, vae):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError):
            load_extractor(path, "cpu")
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="image classifier"):
        load_extractor(tmp_path / "vae", "cpu")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((classifier_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        load_extractor(tmp_path / "half", "cpu")
    name = "preprocessor_config.json"
    (tmp_path / "half" / name).write_bytes((classifier_folder / name).read_bytes())
    with pytest.raises(UserError) as caught:
        load_extractor(tmp_path / "half", "cpu")
    assert "\n" not in str(caught.value)


# Fréchet distance


def moments(x, parts=1):
    total = Moments(x.shape[1])
    for part in np.array_split(x, parts):
        total.update(part)
    return total


def test_streaming_moments_equal_numpy_on_the_whole():
    """With a mean of 1e6, where sums of squares in float64 would be wrong in the third digit."""
    x = np.random.default_rng(0).normal(size=(501, 7)) @ np.diag(np.arange(1, 8)) + 1e6
    streamed = moments(x, parts=9)
    assert streamed.count == 501
    np.testing.assert_allclose(streamed.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(streamed.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_refuse_foreign_and_infinite_features():
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        Moments(3).update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        Moments().update(np.array([[np.inf, 0.0]]))
    with pytest.raises(ValueError, match="needs 2"):
        _ = Moments().update(np.zeros((1, 4))).cov


def with_moments(mean, covariance, n=64):
    """Data with exactly this mean and covariance."""
    d = len(mean)
    x = np.random.default_rng(1).normal(size=(n, d))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(scipy.linalg.cholesky(np.cov(x, rowvar=False)))
    return moments(x @ scipy.linalg.cholesky(covariance) + mean)


def test_frechet_distance_equals_the_closed_form_for_commuting_covariances():
    s, t = np.array([1.0, 4.0, 9.0, 0.25]), np.array([4.0, 1.0, 16.0, 0.25])
    a = with_moments(np.zeros(4), np.diag(s))
    b = with_moments(np.array([1.0, 0.0, -2.0, 0.0]), np.diag(t))
    expected = 5.0 + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("n", [200, 20])
def test_frechet_distance_equals_sqrtm_also_with_fewer_images_than_dimensions(n):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(n, 30)), rng.normal(size=(n, 30)) @ rng.normal(size=(30, 30)) * 0.2 + 0.1
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    offset = 1e-12 * np.eye(30)  # sqrtm itself is unreliable on singular products
    root = scipy.linalg.sqrtm((s + offset) @ (t + offset)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0.0, abs=1e-5)


def test_class_accuracy_is_the_share_of_hits():
    assert metrics.class_accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75
    with pytest.raises(ValueError, match="labels"):
        metrics.class_accuracy(np.array([0, 1]), np.array([0]))
