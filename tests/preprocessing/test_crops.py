"""Size and crop of each image: measured by script 2 for the families that are told them, and handed to the network exactly."""

import csv

import pytest
import torch
from conftest import run_numbered
from PIL import ExifTags, Image

import train
from cache.reader import FieldReader
from cache.views import size_and_crop
from configs.loading import load_config
from evaluation.heldout import Bench, heldout_images
from miniature.families import make_pipeline
from models.families.sdxl import SDXL
from training.parts import build_parts
from training.self_test import self_test

CPU = torch.device("cpu")
# Width and height of each image, whether EXIF turns it, and what SDXL is told of its square of 64 px.
IMAGES = {
    "wide": ((512, 300), False, (300, 512, 0, 22, 64, 64)),  # 109 px wide once resized, 22.5 are cut
    "tall": ((300, 514), False, (514, 300, 22, 0, 64, 64)),
    "square": ((1023, 1023), False, (1023, 1023, 0, 0, 64, 64)),
    "turned": ((300, 1000), True, (300, 1000, 0, 74, 64, 64)),  # lies in its file; 213 px wide, 74.5 are cut
    "small": ((33, 40), False, (40, 33, 6, 0, 64, 64)),  # enlarged: 77 px high, 6.5 are cut
}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, miniature):
    """Lists and caches of a tiny SDXL, and latents of SD-1.5, of images of all shapes: [root, overrides]."""
    root = tmp_path_factory.mktemp("crops")
    (root / "photos").mkdir()
    make_pipeline("sdxl", root / "sdxl")
    generator = torch.Generator().manual_seed(0)
    with open(root / "photos/metadata.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file_name", "text"])
        for i in range(30):
            (name, (size, turned, _)), exif = [*IMAGES.items()][i % len(IMAGES)], Image.Exif()
            exif[ExifTags.Base.Orientation] = 6 if turned else 1
            pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).resize(size).save(root / f"photos/{name}_{i}.png", exif=exif)
            lines.writerow([f"{name}_{i}.png", f"a photo of {i}"])
    lists = ["--out", root / "train.csv", "--hold-out", 16, "--hold-out-csv", root / "val.csv"]
    run_numbered("1_sample_imagenet_subset", "--images", root / "photos", *lists)
    models = miniature / "models"
    for split in ("train", "val"):
        few = ["--csv", root / f"{split}.csv", "--workers", 0, "--batch-size", 4]
        for base, folder in ((root / "sdxl", "latents"), (models / "sd15-mini", "plain")):
            size = ["--image-size", 64, "--out", root / split / folder]
            run_numbered("2_encode_vae_latents", *few, "--base", base, *size)
        teacher = ["--teacher", models / "dinov2-mini", "--grid", 4, "--out", root / split / "tokens"]
        run_numbered("3_build_dino_cache", *few, *teacher)
    text = ["--csv", root / "train.csv", "--base", root / "sdxl", "--out", root / "text"]
    run_numbered("4_prepare_text_embeddings", *text)
    places = {
        "data.csv": "train.csv",
        "data.text": "text",
        "eval.csv": "val.csv",
        "run": "run",
        "model.base": "sdxl",
    }
    places |= {f"{part}.{field}": f"{split}/{field}" for part, split in (("data", "train"), ("eval", "val"))
               for field in ("latents", "tokens")}  # fmt: skip
    overrides = [f"{key}={root / place}" for key, place in places.items()]
    return root, [
        *overrides,
        "data.batch_size=4",
        "train.steps=2",
        "train.log_every=1",
        "eval.extractor=inception",
    ]


def told_of(key):
    return torch.tensor(IMAGES[key.split("_")[0]][2], dtype=torch.float32)


@pytest.mark.parametrize("name", IMAGES)
def test_size_and_crop_are_those_worked_out_by_hand(name):
    (width, height), turned, told = IMAGES[name]
    assert size_and_crop(*((height, width) if turned else (width, height)), 64) == told


@pytest.mark.parametrize(
    ("width", "height", "told"),
    [
        (800, 300, (300, 800, 0, 10, 32, 64)),
        (300, 300, (300, 300, 16, 0, 32, 64)),
        (64, 32, (32, 64, 0, 0, 32, 64)),
    ],
)
def test_size_and_crop_of_a_view_that_is_no_square(width, height, told):
    """A view of 64 × 32: 800 × 300 becomes 85 × 32 and loses 10 and 11 columns; 300 × 300 becomes 64 × 64 and loses 32 rows."""
    assert size_and_crop(width, height, (32, 64)) == told


def test_script_2_stores_them_behind_the_latents_of_families_that_are_told_them(captioned):
    root, _ = captioned
    reader, plain = (FieldReader(root / "train" / name, "latents") for name in ("latents", "plain"))
    assert reader.spec.details["size_and_crop"] is True
    assert reader.spec.value_bytes == 4 * 8 * 8 * 2 + 24
    raw = reader.read_raw(reader.ids)
    assert reader.spec.size_and_crop(raw).equal(torch.stack([*map(told_of, reader.ids)]))
    assert {key.split("_")[0] for key in reader.ids} == IMAGES.keys()
    # The latents before them are what they are without.
    latents = raw[:, :-24].contiguous().view(torch.float16).view(-1, 4, 8, 8)
    assert reader.read(reader.ids).equal(latents)
    assert "size_and_crop" not in plain.spec.details
    assert plain.spec.size_and_crop(plain.read_raw(plain.ids)) is None
    assert plain.spec.value_bytes == torch.tensor(plain.spec.shape).prod() * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trained_batch_hands_exactly_these_to_the_network(captioned, precision):
    """In bf16 1023 would be 1024. Captions may be dropped; what is true of an image stays."""
    _, overrides = captioned
    more = [f"train.precision={precision}", "data.caption_dropout=1.0"]
    parts = build_parts(load_config("configs/demo.yaml", [*overrides, *more]))
    batch, seen = next(iter(train.open_stream(parts, first_step=0))), []
    hook = parts.model.backbone.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["added_cond_kwargs"]["time_ids"].clone()), with_kwargs=True
    )
    train.loss_of(parts, batch, torch.Generator().manual_seed(0), 0.5, True)
    hook.remove()
    (told,) = seen
    assert told.dtype == torch.float32
    assert told.equal(torch.stack([told_of(parts.dataset.ids[i]) for i in batch.indices]))
    item = parts.dataset[0]
    assert item["size_and_crop"].equal(told_of(parts.dataset.ids[0]))


def test_the_embedding_of_a_side_is_not_that_of_its_neighbour_in_bf16(captioned):
    _, overrides = captioned
    parts = build_parts(load_config("configs/demo.yaml", [*overrides, "train.precision=bf16", "run=none"]))
    text = parts.batches.prompts(torch.tensor([0, 0]))
    sides = torch.tensor([[1023.0, 1023, 0, 0, 64, 64], [1024.0, 1024, 0, 0, 64, 64]])
    x_t = torch.randn(1, 4, 8, 8).expand(2, 4, 8, 8)
    with torch.no_grad():
        found = parts.model.eval().predict(x_t, torch.tensor([5, 5]), text | {"time_ids": sides})
    assert not found[0].equal(found[1])


def test_the_self_test_says_whether_the_cache_has_them(captioned, monkeypatch, capsys, tmp_path):
    root, overrides = captioned
    self_test(build_parts(load_config("configs/demo.yaml", overrides)))
    assert "size and crop of each image" in capsys.readouterr().out
    monkeypatch.setattr(SDXL, "image_conditions", ())  # as another family of this VAE
    images = ["--csv", root / "train.csv", "--workers", 0, "--out", tmp_path]
    run_numbered("2_encode_vae_latents", *images, "--base", root / "sdxl")
    monkeypatch.undo()
    self_test(build_parts(load_config("configs/demo.yaml", [*overrides, f"data.latents={tmp_path}"])))
    said = capsys.readouterr().out
    assert f"time_ids       not in {tmp_path}: every image counts as whole and of its own size" in said


def test_held_out_images_are_told_of_too(captioned):
    _, overrides = captioned
    config = load_config("configs/demo.yaml", overrides)
    held, ids = heldout_images(config), FieldReader(config.eval.latents, "latents").ids
    bench = Bench(config, held, 0, CPU, lambda: None)
    told = torch.cat([text["time_ids"] for *_, text in bench.batches()])
    in_list = [line["id"] for line in csv.DictReader(config.eval.csv.open())]
    assert sorted(in_list) == sorted(ids)
    assert told.equal(torch.stack([*map(told_of, in_list)]))
