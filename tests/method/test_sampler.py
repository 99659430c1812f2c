"""Properties of sampling: an image depends on its own seed alone, and equals diffusers' own, on small random networks."""

import errno
import json
import os
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor

from common.errors import UserError
from evaluation import image_files
from evaluation.image_files import LOG, ImageWriter, load_images, missing_images, save_images
from method import sampler as sampling
from models.latents import LatentCodec, decode_images

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


SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}


def ddim(prediction_type="epsilon"):
    return DDIMScheduler(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
    )


def ddpm(prediction_type="epsilon"):
    return DDPMScheduler(**SCHEDULE, clip_sample=False, prediction_type=prediction_type)


def dpm(prediction_type="epsilon"):
    return DPMSolverMultistepScheduler(**SCHEDULE, prediction_type=prediction_type)


def sample(unet, text, null_text, seeds, *, scheduler=None, steps=3, cfg=1.0, **kwargs):
    scheduler = scheduler or ddim()
    return sampling.sample_latents(
        predicting(unet), scheduler, {"prompt_embeds": text}, {"prompt_embeds": null_text}, seeds,
        shape=SHAPE, steps=steps, cfg=cfg, **kwargs,
    )  # fmt: skip


def predicting(unet):
    """The `predict` of a plain U-Net, which the sampler calls."""
    return lambda x_t, t, text: unet(x_t, t, encoder_hidden_states=text["prompt_embeds"], return_dict=False)[
        0
    ]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(("scheduler", "eta"), [(ddim, 0.0), (ddim, 0.7), (ddpm, 0.0), (dpm, 0.0)])
def test_images_equal_those_of_the_stable_diffusion_pipeline(
    unet, vae, text, null_text, scheduler, eta, cfg, prediction_type
):
    """The same generators for the first noise and for that of the steps; the same number of rows, so bit for bit."""
    seeds = [11, 5]
    pipeline = StableDiffusionPipeline(
        vae, None, None, unet, scheduler(prediction_type), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=text[:2],
        negative_prompt_embeds=null_text.expand(2, -1, -1),
        generator=sampling.generators(seeds),
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=cfg,
        eta=eta,
        output_type="pil",
    ).images
    latents = sample(
        unet,
        text[:2],
        null_text,
        seeds,
        scheduler=scheduler(prediction_type),
        steps=4,
        cfg=cfg,
        eta=eta,
        rows=2,
    )
    images = decode_images(LatentCodec(vae), latents, rows=2)
    assert images.std() > 3  # not a flat picture, which would hide any difference
    np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image in expected]))


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [(ddim, 50), (ddim, 125), (ddim, 250), (ddim, 500), (ddpm, 250), (dpm, 50), (dpm, 250)],
)
def test_samples_of_a_gaussian_have_its_spread(scheduler, steps):
    """With the exact predictor of data of standard deviation 0.5. diffusers' DDIM reads 0.66 at 600 steps."""
    solver = scheduler()

    def exact(x, t, _text):
        abar = solver.alphas_cumprod[int(t[0])]
        return (1 - abar).sqrt() * x / (abar * 0.25 + 1 - abar)  # E[ε | x_t]

    text = torch.zeros(64, 1, 1)
    latents = sampling.sample_latents(
        exact, solver, {"text": text}, {"text": text[0]}, list(range(64)), shape=SHAPE, steps=steps, rows=64
    )
    assert latents.std().item() == pytest.approx(0.5, rel=0.06)


def test_decoding_rounds_as_the_image_processor_does(vae):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4)) * 0.5
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    expected = VaeImageProcessor().postprocess(decoded, output_type="pil")
    images = decode_images(LatentCodec(vae), latents, rows=3)
    np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image in expected]))


@pytest.mark.parametrize(("scheduler", "eta"), [(ddim, 1.0), (ddpm, 0.0), (dpm, 0.0)])
def test_an_image_is_bit_for_bit_the_same_in_every_batch(unet, vae, text, null_text, scheduler, eta):
    """Alone, among seven, among sixteen, and in another order."""
    seeds = [40 + i for i in range(16)]
    many = text.repeat(3, 1, 1)[:16]  # (16, L, D)

    def images(order, size):
        found = [
            decode_images(
                LatentCodec(vae),
                sample(
                    unet,
                    many[part],
                    null_text,
                    [seeds[i] for i in part],
                    scheduler=scheduler(),
                    cfg=3.0,
                    eta=eta,
                ),
            )
            for part in (order[start : start + size] for start in range(0, len(order), size))
        ]
        return dict(zip(order, np.concatenate(found), strict=True))

    whole = images(list(range(16)), 16)
    for order, size in (([0, 3, 15], 1), (list(range(16)), 7), (list(reversed(range(16))), 16)):
        for index, image in images(order, size).items():
            np.testing.assert_array_equal(image, whole[index])
    assert (whole[0] != whole[7]).mean() > 0.5  # one caption, two seeds


@pytest.mark.parametrize(
    ("cfg", "low", "high", "rows"),
    [
        (1.0, 0.0, 1.0, [2] * 5),
        (3.0, 0.0, 1.0, [4] * 5),
        (3.0, 0.0, 0.0, [2] * 5),
        (3.0, 0.3, 0.7, [2, 2, 4, 4, 2]),
    ],
)
def test_unguided_steps_cost_one_forward_and_guided_steps_two(unet, text, null_text, cfg, low, high, rows):
    seen = []
    handle = unet.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    try:
        sample(
            unet, text[:2], null_text, [0, 1], steps=5, cfg=cfg, guidance_low=low, guidance_high=high,
            guidance_space="index", rows=2,
        )  # fmt: skip
    finally:
        handle.remove()
    assert seen == rows  # timesteps 999, 799, 599, 399, 199
    scheduler = ddim()
    scheduler.set_timesteps(5)
    plan = sampling.guidance_plan(scheduler, cfg, low, high, "index")
    assert sampling.forwards_per_image(plan) == sum(rows) / 2


def test_guidance_outside_its_interval_is_none_and_inside_it_is_all(unet, text, null_text):
    def drawn(**kwargs):
        return sample(unet, text[:2], null_text, [0, 1], steps=5, rows=2, **kwargs)

    assert torch.equal(drawn(cfg=3.0, guidance_high=0.0), drawn(cfg=1.0))
    assert torch.equal(drawn(cfg=3.0, guidance_low=0.0, guidance_high=1.0), drawn(cfg=3.0))
    assert not torch.allclose(drawn(cfg=3.0, guidance_high=0.7), drawn(cfg=3.0), atol=1e-3)
    assert not torch.allclose(drawn(cfg=3.0, guidance_low=0.5), drawn(cfg=3.0), atol=1e-3)


def test_a_guidance_interval_ends_at_equal_noise_or_at_equal_index():
    """REPA's 0.7 has sigma / alpha = 0.7 / 0.3; on SD's schedule that is index 605, not 700."""
    abar, t = ddim().alphas_cumprod, torch.arange(1000)
    assert sum(sampling.guided_steps(abar, t, high=0.7, space="snr")) - 1 == 605
    assert sum(sampling.guided_steps(abar, t, high=0.7, space="index")) - 1 == 700
    assert ((1 - abar[605]) / abar[605]).sqrt() <= 7 / 3 < ((1 - abar[606]) / abar[606]).sqrt()
    inside = sampling.guided_steps(abar, t, low=0.3, high=0.7, space="index")
    assert [i for i, guided in enumerate(inside) if guided] == list(range(300, 701))  # both ends belong to it


@pytest.mark.parametrize(("space", "forwards"), [("snr", (401, 402)), ("index", (425, 425))])
def test_the_plans_protocol_costs_as_many_forwards_as_the_schedule_says(space, forwards):
    """250 DDIM steps guided up to 0.7: an unguided forward for each, and one more for each guided step."""
    scheduler = ddim()
    scheduler.set_timesteps(250)
    plan = sampling.guidance_plan(scheduler, 7.5, 0.0, 0.7, space)
    assert forwards[0] <= sampling.forwards_per_image(plan) <= forwards[1]


def test_sampling_refuses_what_would_break_its_promises(unet, text, null_text):
    with pytest.raises(ValueError, match="has no eta"):
        sample(unet, text, null_text, list(range(7)), scheduler=ddpm(), eta=0.5)
    with pytest.raises(ValueError, match="6 seeds for 7"):
        sample(unet, text, null_text, list(range(6)))
    with pytest.raises(ValueError, match="null_text"):
        sample(unet, text, null_text[None], list(range(7)))
    with pytest.raises(ValueError, match="at least 1"):
        sample(unet, text, null_text, list(range(7)), cfg=0.0)
    with pytest.raises(ValueError, match="guidance interval"):
        sample(unet, text, null_text, list(range(7)), cfg=2.0, guidance_low=0.8, guidance_high=0.7)


def test_the_scheduler_handed_in_is_left_as_it_was(unet, text, null_text):
    scheduler = ddim()
    before = scheduler.timesteps.clone()
    sample(unet, text[:1], null_text, [0], scheduler=scheduler, steps=2)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps is None


def test_labels_are_balanced_in_every_consecutive_stretch():
    labels = sampling.balanced_labels(range(35), 10)
    assert labels[:12] == [*range(10), 0, 1]
    assert all(len(set(labels[i : i + 10])) == 10 for i in range(25))


def test_random_labels_depend_on_the_seed_and_the_index_alone():
    labels = sampling.random_labels(range(2000), 10, seed=3)
    assert sampling.random_labels([1999, 7], 10, seed=3) == [labels[1999], labels[7]]
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 140
    assert counts.max() < 260
    assert sampling.random_labels(range(50), 10, seed=4) != labels[:50]


def test_a_diverged_run_is_reported_instead_of_painted_black(vae):
    with pytest.raises(UserError, match="not finite"):
        decode_images(LatentCodec(vae), torch.full((1, 4, 8, 8), float("nan")))


def test_images_survive_the_disk_and_fewer_than_asked_for_are_refused(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    save_images(images[:3], tmp_path, range(3))
    save_images(images[3:], tmp_path, range(3, 5))
    np.testing.assert_array_equal(load_images(tmp_path, range(5)), images)
    np.testing.assert_array_equal(load_images(tmp_path, [4, 1]), images[[4, 1]])
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{i:06d}.png" for i in range(5)} | {LOG}
    assert missing_images(tmp_path, range(3, 7)) == [5, 6]
    with pytest.raises(UserError, match="lacks 1 of the 6"):
        load_images(tmp_path, range(6))
    whole = (tmp_path / "000004.png").read_bytes()
    (tmp_path / "000005.png").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="lacks 1 of the 6"):
        load_images(tmp_path, range(6))
    (tmp_path / "000005.png").write_bytes(whole)  # the log does not know it
    with pytest.raises(UserError, match="lacks 1 of the 6"):
        load_images(tmp_path, range(6))
    (tmp_path / "000003.png").write_bytes(whole)
    for read in (load_images, missing_images):
        with pytest.raises(UserError, match=r"000003\.png is not the picture that was drawn there"):
            read(tmp_path, range(5))
    save_images(images[3:4], tmp_path, [3])
    save_images(images[:1, :4], tmp_path, [5])
    with pytest.raises(UserError, match="mixes image sizes"):
        load_images(tmp_path, range(6))


def random_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)


def names_of(folder):
    return [json.loads(line)["name"] for line in (folder / LOG).read_text().splitlines()]


def test_the_next_images_are_drawn_while_these_are_written(tmp_path, monkeypatch):
    drawn, write, most = threading.Event(), image_files.write_atomically, []

    def write_late(path, data):
        assert drawn.wait(20), "save waits for its images"
        time.sleep(0.001 * (int(path.stem) % 3))  # the first are not the first to be there
        most.append(len(writer._waiting))
        write(path, data)

    monkeypatch.setattr(image_files, "write_atomically", write_late)
    monkeypatch.setattr(image_files, "WAITING", 4)
    with ImageWriter(tmp_path) as writer:
        writer.save(random_images(4), range(4))
        drawn.set()
        writer.save(random_images(20), range(4, 24))
    assert names_of(tmp_path) == [f"{i:06d}.png" for i in range(24)]
    assert max(most) <= 4
    np.testing.assert_array_equal(load_images(tmp_path, range(4)), random_images(4))


def save_batches(folder, batches, end=lambda: None):
    """Save batches of three images each, then do `end`; returns how many were handed over."""
    saved = []
    with suppress(OSError, KeyboardInterrupt), ImageWriter(folder) as writer:
        for batch in range(batches):
            writer.save(random_images(3), range(3 * batch, 3 * batch + 3))
            saved.append(batch)
        end()
        return "no error"
    return len(saved)


@pytest.mark.parametrize("batches", [1, 30])
def test_an_error_of_a_writing_thread_is_raised_and_the_other_images_stay(tmp_path, monkeypatch, batches):
    write = image_files.write_atomically

    def write_to_full_disk(path, data):
        if path.stem == "000001":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(image_files, "write_atomically", write_to_full_disk)
    monkeypatch.setattr(image_files, "WAITING", 4)
    assert save_batches(tmp_path, batches) in (1, 2, 3)  # it does not go on to the end
    assert names_of(tmp_path)[:2] == ["000000.png", "000002.png"]
    assert missing_images(tmp_path, range(3)) == [1]


def test_an_interrupt_loses_no_image_that_was_drawn(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    assert save_batches(tmp_path, 3, interrupt) == 3
    assert not missing_images(tmp_path, range(9))
