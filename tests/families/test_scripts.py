"""Every family of images by the real scripts: cache and text, a run (some are stopped and go on), export, samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_numbered
from loaded import stock_of
from official import SCALES, call_arguments
from PIL import Image
from small_runs import assert_same_run, stop_after
from test_contract import load_exported

import evaluate
import export
import train as train_script
from cache.text import TextReader, convert
from method.sampler import initial_noise
from models.families.table import FAMILIES, family_of
from models.families.transformer import VideoTransformer
from training.run_folder import RunFolder

NAMES = [name for name, kind in FAMILIES.items() if not issubclass(kind, VideoTransformer)]
SIZE, STEPS, SAMPLES = 64, 4, 2
# What a training keeps is the same for all families, so some are stopped and go on: a U-Net and transformers of several kinds.
RESUMED = NAMES[::4]


@pytest.fixture(scope="module")
def listed(miniature, tmp_path_factory) -> Path:
    """A list of one image of each digit, for all families."""
    csv = tmp_path_factory.mktemp("scripts") / "train.csv"
    images = ["--imagenet", miniature / "ILSVRC", "--split", "train", "--per-class", 1]
    run_numbered("1_sample_imagenet_subset", *images, "--out", csv)
    return csv


def make_cache(miniature, csv, base, cache) -> None:
    teacher = ["--fused", cache / "tokens", "--teacher", miniature / "models/dinov2-mini", "--grid", 4]
    encoding = ["--csv", csv, "--base", base, "--image-size", SIZE, "--workers", 0]
    run_numbered("2_encode_vae_latents", *encoding, "--out", cache / "latents", *teacher)
    classes = ["--class-names", miniature / "imagenet_classes.json", "--base", base]
    run_numbered("4_prepare_text_embeddings", *classes, "--out", cache / "text")


# The scripts run on these in test_crops.py, test_large.py, test_sizes.py and test_demo.py too, or on their siblings.
ELSEWHERE = ("sdxl", "flux", "sd3", "pixart", "kolors", "chroma", "sana")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name in ELSEWHERE else name for name in NAMES]
)
def test_from_a_list_to_samples_that_the_stock_pipeline_draws_alike(
    name, base_of, miniature, listed, tmp_path, monkeypatch
):
    base, cache = base_of(name), tmp_path / "cache"
    make_cache(miniature, listed, base, cache)
    settings = ["--config", f"configs/families/{name}.yaml", "--config", "configs/demo_quick.yaml"]
    settings += [f"model.base={base}", f"data.csv={listed}", "data.batch_size=2", "optim.lr=0.05"]
    settings += [f"data.{field}={cache / field}" for field in ("latents", "tokens", "text")]

    def train(run):
        train_script.main([*settings, f"run={tmp_path / run}", f"train.steps={STEPS}"])
        return RunFolder(tmp_path / run)

    if name in RESUMED:
        undisturbed = train("undisturbed")
        with monkeypatch.context() as patch:
            stop_after(patch, STEPS // 2)
            assert not (train("run").path / "export").exists()
    run = train("run")
    if name in RESUMED:
        assert_same_run(run, undisturbed, STEPS)

    export.main([str(run.path)])
    family, stock = family_of(base), stock_of(family_of(base))
    steps, cfg = 2, 1.0 if SCALES.get(name, "") is None else 2.0
    drawn = [f"eval.num_samples={SAMPLES}", f"eval.sampling_steps={steps}", f"eval.cfg={cfg}"]
    evaluate.main(["sample", str(run.path), *drawn])
    (folder,) = (run.path / "samples").iterdir()
    text, cpu = TextReader(cache / "text"), torch.device("cpu")
    rows, null = (convert(x, cpu, torch.float32) for x in (text.fields_of(range(SAMPLES)), text.null))
    side = SIZE // family.load_codec().down
    shape = family.latent_shape(family.load_network())[0], side, side
    stock.scheduler = family.sampling_scheduler(family.own_output, family.sampler_of("auto"), steps, shape)
    noise = initial_noise([run.config.eval.seed + i for i in range(SAMPLES)], shape)
    arguments = call_arguments(family, stock, noise, rows, null, cfg)
    options = {"num_inference_steps": steps, "output_type": "np", "return_dict": False}
    bare = stock(**arguments, **options)[0]
    load_exported(stock, family, run.path / "export/ema")
    theirs = stock(**arguments, **options)[0]
    ours = np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) / 255 for i in range(SAMPLES)])
    # PNG files are rounded to 1/255; the stored text is the same.
    assert np.abs(ours - theirs).max() < 0.003
    assert np.abs(ours - bare).max() > 0.005
