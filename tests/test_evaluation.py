"""Properties of evaluation/: sampling and alignment metrics, on small random networks."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor

from errors import UserError
from evaluation import alignment_metrics, sampling

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


# Alignment


def in_sample_cca(x, y):
    """The tempting mistake, kept as the known bad: all dimensions, fitted and reported on the same tokens."""
    q, r = (np.linalg.qr(z.reshape(-1, z.shape[-1]) - z.mean(axis=(0, 1)))[0] for z in (x, y))
    return np.linalg.svd(q.T @ r, compute_uv=False)


def tokens(rng, n=160, t=4, d=24, shared_within_image=0.7):
    """Independent images whose tokens share most of their variance, as real ones do."""
    return shared_within_image * rng.normal(size=(n, 1, d)) + 0.3 * rng.normal(size=(n, t, d))


def test_heldout_cca_of_independent_tokens_is_null_where_in_sample_cca_reads_one():
    rng = np.random.default_rng(3)
    x, y = tokens(rng, n=40, d=100), tokens(rng, n=40, d=100)
    assert in_sample_cca(x, y)[:30].mean() > 0.95
    result = alignment_metrics.heldout_cca(x, y, k=8, seed=0)
    assert abs(result["mean_rho"]) < 0.2
    assert abs(result["null_mean_rho"]) < 0.2
    assert (result["n_fit"], result["n_test"], result["k"]) == (20, 20, 8)


def test_heldout_cca_ignores_a_layout_that_all_images_share():
    rng = np.random.default_rng(4)
    layout = rng.normal(size=(1, 16, 24)) * 5
    x, y = tokens(rng, t=16) + layout, tokens(rng, t=16) + layout
    assert abs(alignment_metrics.heldout_cca(x, y, k=8, seed=0)["mean_rho"]) < 0.15


def test_heldout_cca_finds_shared_directions_through_any_linear_map():
    rng = np.random.default_rng(5)
    shared = tokens(rng, n=400, d=8)
    x = np.concatenate([shared, tokens(rng, n=400, d=8)], axis=-1) @ rng.normal(size=(16, 16))
    y = np.concatenate([shared, tokens(rng, n=400, d=12)], axis=-1) @ rng.normal(size=(20, 20))
    result = alignment_metrics.heldout_cca(x, y, k=16, seed=0)
    assert result["top_rho"] > 0.95
    assert result["mean_rho"] == pytest.approx(0.5, abs=0.08)  # 8 of 16 directions are shared
    assert abs(result["null_mean_rho"]) < 0.1
    identical = alignment_metrics.heldout_cca(x, x, k=16, seed=0)
    assert identical["mean_rho"] == pytest.approx(1.0, abs=1e-6)


def test_cca_looks_at_the_largest_components():
    rng = np.random.default_rng(14)
    shared = tokens(rng, d=4)
    x, y = (np.concatenate([shared, 0.05 * tokens(rng, d=12)], axis=-1) for _ in range(2))
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    assert alignment_metrics.heldout_cca(x @ rotation, y, k=4, seed=0)["mean_rho"] > 0.95


def test_cca_refuses_more_directions_than_there_are():
    x = tokens(np.random.default_rng(6), d=5)
    with pytest.raises(ValueError, match=r"\[1, 5\]"):
        alignment_metrics.heldout_cca(x, x, k=6, seed=0)


def test_no_image_is_paired_with_itself_in_the_null():
    rng = np.random.default_rng(7)
    for n in (2, 3, 10):
        index = np.arange(n) + 5
        moved = alignment_metrics._mispair(index, rng)
        assert sorted(moved) == sorted(index)
        assert (moved != index).all()


def test_cknna_is_one_for_rotated_features_and_null_for_independent_ones():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(200, 12))
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    same = alignment_metrics.cknna(x, 3 * x @ rotation, k=10)
    assert same["cknna"] == pytest.approx(1.0, abs=1e-9)
    assert abs(same["null_cknna"]) < 0.1
    assert abs(alignment_metrics.cknna(x, rng.normal(size=(200, 12)), k=10)["cknna"]) < 0.1


def test_cknna_equals_its_definition_by_loops():
    rng = np.random.default_rng(15)
    x = rng.normal(size=(30, 6))
    y = x + 0.7 * rng.normal(size=(30, 6))

    def masked(side, *others):
        unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (side, *others)]
        out = np.zeros((30, 30))
        for i in range(30):
            near = set(range(30))
            for z in unit:
                order = [j for j in np.argsort(-(z @ z[i])) if j != i]
                near &= set(order[:5])
            for j in near:
                out[i, j] = unit[0][i] @ unit[0][j]
        return out

    hsic = alignment_metrics._hsic_unbiased
    expected = hsic(masked(x, y), masked(y, x))
    expected /= np.sqrt(hsic(masked(x), masked(x)) * hsic(masked(y), masked(y)))
    assert 0.1 < expected < 0.95
    assert alignment_metrics.cknna(x, y, k=5)["cknna"] == pytest.approx(expected, abs=1e-12)


def test_unbiased_hsic_equals_its_definition_by_loops():
    """Song et al. 2012, eq. 4: averages over pairs, quadruples and triples of distinct images."""
    from itertools import permutations

    rng = np.random.default_rng(9)
    a, b = (m + m.T for m in rng.normal(size=(2, 6, 6)))
    pairs = np.mean([a[i, j] * b[i, j] for i, j in permutations(range(6), 2)])
    triples = np.mean([a[i, j] * b[i, q] for i, j, q in permutations(range(6), 3)])
    quadruples = np.mean([a[i, j] * b[q, r] for i, j, q, r in permutations(range(6), 4)])
    assert alignment_metrics._hsic_unbiased(a, b) == pytest.approx(pairs + quadruples - 2 * triples)


def test_pooling_tokens_is_average_pooling_and_exact_by_area():
    rng = np.random.default_rng(10)
    x = rng.normal(size=(2, 8 * 4, 3)).astype(np.float32)
    image = torch.from_numpy(x).view(2, 8, 4, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(image, (4, 2)).permute(0, 2, 3, 1).reshape(2, 4, 3)
    pooled = alignment_metrics.pool_tokens(x, (8, 4), (2, 2))
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-6)
    fine = rng.normal(size=(1, 14 * 14, 2))
    repeated = fine.reshape(1, 14, 14, 2).repeat(4, axis=1).repeat(4, axis=2).reshape(1, 56 * 56, 2)
    np.testing.assert_allclose(
        alignment_metrics.pool_tokens(fine, (14, 14), (8, 8)),
        alignment_metrics.pool_tokens(repeated, (56, 56), (8, 8)),
        atol=1e-12,
    )
    with pytest.raises(ValueError, match="finer"):
        alignment_metrics.pool_tokens(x, (8, 4), (8, 8))


def test_ridge_recovers_a_linear_map_on_images_it_was_not_fitted_on():
    rng = np.random.default_rng(11)
    x = tokens(rng, d=6)
    y = x @ rng.normal(size=(6, 9)) + rng.normal(size=9)
    projected, index = alignment_metrics.ridge_project(x, y, seed=0, ridge=0.0)
    np.testing.assert_allclose(projected, y[index], atol=1e-8)
    np.testing.assert_array_equal(index, alignment_metrics.split_by_image(len(x), 0)[1])
    loose, _ = alignment_metrics.ridge_project(x, y, seed=0)
    assert alignment_metrics.paired_cosine(loose, y[index]) > 0.99
    y[index] = 0.0  # the test half's answers must not matter
    blind, _ = alignment_metrics.ridge_project(x, y, seed=0)
    np.testing.assert_array_equal(blind, loose)


def test_paired_cosine_needs_the_pairing():
    x = np.random.default_rng(12).normal(size=(50, 4, 32))
    assert alignment_metrics.paired_cosine(x, 3 * x) == pytest.approx(1.0)
    assert alignment_metrics.paired_cosine(x, -x) == pytest.approx(-1.0)
    assert abs(alignment_metrics.paired_cosine(x, np.roll(x, 1, axis=0))) < 0.1


def test_joint_tsne_is_reproducible_and_lays_equal_tokens_on_each_other():
    x = np.random.default_rng(13).normal(size=(30, 8))
    first = alignment_metrics.joint_tsne(x, 2 * x, seed=0)
    assert first.shape == (2, 30, 2)
    np.testing.assert_array_equal(first, alignment_metrics.joint_tsne(x, 2 * x, seed=0))
    nearest = np.linalg.norm(first[0][:, None] - first[1][None], axis=-1).argmin(axis=1)
    assert (nearest == np.arange(30)).mean() > 0.9
