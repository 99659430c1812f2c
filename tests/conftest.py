"""Small models of the real classes, shared by the tests.

Libraries are imported inside the functions: pytest's own process, which only hands out the tests, needs none of them.
"""

import functools
import gc
import importlib

import pytest
from fork_server import collect_rarely

TEXT_WIDTH, TEACHER_DIM, TEACHER_GRID = 32, 64, 4
collect_rarely()


def pytest_collection_finish():
    """What is imported lives as long as the process: the garbage collector need not walk through it again and again."""
    gc.freeze()


def pytest_sessionfinish():
    """Libraries count what is left at the end and would report a leak."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def work_little():
    """In this process as in those of the fork server."""
    importlib.import_module("fork_server").work_little()


def small_unet(seed: int = 0):
    """SD-1.5's U-Net in its block types, small in its widths; 16×16 latents give a 2×2 mid-block."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=2,
            attention_head_dim=2,
            cross_attention_dim=TEXT_WIDTH,
            norm_num_groups=8,
        )


def small_model(align_layers=("mid",), train="full", seed: int = 0, grid=TEACHER_GRID):
    from models.sd15_unet_aligned import SD15UNetAligned, lora_config

    return SD15UNetAligned(
        small_unet(),
        align_layers,
        TEACHER_DIM,
        grid=grid,
        train=train,
        lora_config=lora_config(4, 4),
        seed=seed,
    ).train()


ALL_TAPS = ("enc_last", "mid", "dec_first")


def thin_unet():
    """One layer per block, to compile in seconds."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 8, 16, 16), layers_per_block=1, attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH, norm_num_groups=4,
    ).train()  # fmt: skip


def thin_model(train):
    from models.sd15_unet_aligned import SD15UNetAligned, lora_config

    lora = lora_config(4, 4)
    return SD15UNetAligned(thin_unet(), ALL_TAPS, TEACHER_DIM, grid=4, train=train, lora_config=lora).train()


@pytest.fixture
def batch():
    """Latents (3, 4, 16, 16), timesteps (3,), text (3, 5, width), teacher tokens (3, 16, D)."""
    import torch

    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, 16, 16, generator=generator)
    timesteps = torch.tensor([3, 500, 999])
    text = torch.randn(3, 5, TEXT_WIDTH, generator=generator)
    tokens = torch.nn.functional.normalize(torch.randn(3, 16, TEACHER_DIM, generator=generator), dim=-1)
    return latents, timesteps, text, tokens


def run_numbered(name: str, *argv: object) -> None:
    """Run a numbered preprocessing script's `main` in this process."""
    importlib.import_module(f"preprocessing.{name}").main([str(argument) for argument in argv])


def image_tree(root, counts, size=(20, 16), split="train"):
    """Folder root/{split}/{class}/ with the given numbers of images."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for synset, count in counts.items():
        folder = root / split / synset
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{synset}_{i}.JPEG")


def sample(root, out, per_class, seed=0, *more):
    """The list that script 1 makes of the tree, as `Sample`s."""
    from cache.image_list import read_samples

    arguments = ["--imagenet", root, "--per-class", per_class, "--out", out, "--seed", seed, *more]
    run_numbered("1_sample_imagenet_subset", *arguments)
    return read_samples(out)


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """From a family's name to the folder of its tiny pipeline, which is made when it is asked for."""
    from miniature.families import make_pipeline

    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def base(name: str) -> str:
        make_pipeline(name, folder / name)
        return str(folder / name)

    return base


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The smallest demo: digits, untrained small models and their cache, made by the real scripts."""
    root = tmp_path_factory.mktemp("miniature")
    models = root / "models"
    run_numbered("0_make_demo", "--out", root, "--quick")
    for split, cache in (("train", "cache"), ("val", "cache_val")):
        csv = root / f"{split}.csv"
        run_numbered(
            "1_sample_imagenet_subset",
            "--imagenet",
            root / "ILSVRC",
            "--split",
            split,
            "--per-class",
            6,
            "--out",
            csv,
        )
        encoding = ["--csv", csv, "--workers", 0, "--batch-size", 16]
        run_numbered(
            "2_encode_vae_latents",
            *encoding,
            "--base",
            models / "sd15-mini",
            "--image-size",
            32,
            "--out",
            root / cache / "latents",
        )
        run_numbered(
            "3_build_dino_cache",
            *encoding,
            "--teacher",
            models / "dinov2-mini",
            "--grid",
            4,
            "--out",
            root / cache / "tokens",
        )
    run_numbered(
        "4_prepare_text_embeddings",
        *[
            "--class-names",
            root / "imagenet_classes.json",
            "--base",
            models / "sd15-mini",
            "--out",
            root / "cache" / "text",
        ],
    )
    return root


def demo_overrides(miniature, run, *more: str) -> list[str]:
    """configs/demo.yaml's settings, turned to the smallest demo and to a few steps."""
    return [
        f"run={run}",
        f"model.base={miniature}/models/sd15-mini",
        *(f"data.{name}={miniature}/{path}" for name, path in DATA_PATHS.items()),
        *(f"eval.{name}={miniature}/{path}" for name, path in EVAL_PATHS.items()),
        *[
            "data.batch_size=4",
            "train.steps=6",
            "train.log_every=2",
            "train.checkpoint_every=2",
            "optim.warmup_fraction=0.0",
        ],
        *["eval.num_samples=20", "eval.sampling_steps=2", "eval.bootstrap=5"],
        *more,
    ]


DATA_PATHS = {"csv": "train.csv", "latents": "cache/latents", "tokens": "cache/tokens", "text": "cache/text"}
EVAL_PATHS = {
    "csv": "val.csv",
    "latents": "cache_val/latents",
    "tokens": "cache_val/tokens",
    "extractor": "models/classifier",
}
