"""What a run leaves for other tools and for the eye: kohya's names, whole pipelines, model cards, previews, logs."""

import builtins
import io
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from fork_server import said, start
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import assert_same_run, equal, stopped_at, tensors, timeless, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import export
import train as train_script
from common.errors import UserError
from common.plain_text import quoted
from evaluation import sample
from method.sampler import initial_noise
from models.families.sd15 import SD15
from training.run_folder import RunFolder

LORA = ["model.train=lora", "model.lora_rank=4", "model.lora_alpha=8", "optim.lr=0.02"]


@pytest.fixture(scope="module")
def lora_run(miniature, tmp_path_factory):
    return train(miniature, tmp_path_factory.mktemp("export") / "lora", *LORA)


def image_of(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise([7], (4, 16, 16))
    found = pipe(
        "a photo of a three", latents=noise, num_inference_steps=4, guidance_scale=2.0, output_type="np", height=32, width=32
    )  # fmt: skip
    return found.images


def pipeline(miniature):
    return StableDiffusionPipeline.from_pretrained(f"{miniature}/models/sd15-mini")


@pytest.fixture(scope="module")
def expected(miniature, lora_run):
    """The image of the EMA weights, loaded as PEFT wrote them."""
    pipe = pipeline(miniature)
    plain = image_of(pipe)
    pipe.load_lora_weights(lora_run.path / "export" / "ema")
    image = image_of(pipe)
    assert np.abs(image - plain).max() > 0.01
    return image


def test_kohyas_names_make_the_same_image(miniature, lora_run, expected):
    export.main([str(lora_run.path), "--kohya"])
    file = lora_run.path / "export" / "kohya" / "ema.safetensors"
    names = load_file(file).keys()
    assert all(name.startswith("lora_unet_") for name in names)
    assert {name.split(".", 1)[1] for name in names} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {value.item() for name, value in load_file(file).items() if name.endswith("alpha")} == {8.0}
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_base_model_version"] == "sd_v1"
    pipe = pipeline(miniature)
    pipe.load_lora_weights(file)
    assert np.abs(image_of(pipe) - expected).max() < 0.005  # fp16


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_whole_pipeline_makes_the_same_image(miniature, lora_run, expected, tmp_path, mode):
    run = lora_run if mode == "lora" else train(miniature, tmp_path / "full", "optim.lr=0.02")
    export.main([str(run.path), "--pipeline"])
    pipe = StableDiffusionPipeline.from_pretrained(run.path / "export" / "pipeline")
    assert not [name for name, _ in pipe.unet.named_parameters() if "lora" in name or "head" in name]
    if mode == "full":
        other = pipeline(miniature)
        other.unet = other.unet.from_pretrained(run.path / "export" / "ema" / "unet")
        expected = image_of(other)
    assert np.abs(image_of(pipe) - expected).max() < 1e-4


def test_an_earlier_checkpoint_can_be_exported_elsewhere(lora_run, tmp_path, capsys):
    export.main([str(lora_run.path), "--checkpoint", "4", "--out", str(tmp_path / "four")])
    found = load_file(tmp_path / "four" / "raw" / "pytorch_lora_weights.safetensors")
    wanted = {
        name.replace(".default", "").replace("backbone.", "unet.", 1): value
        for name, value in tensors(lora_run, 4).items()
        if name.startswith("backbone.")
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert "step 4 of 6" in (tmp_path / "four" / "README.md").read_text()
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 2, 4, 6"):
        export.main([str(lora_run.path), "--checkpoint", "5"])


def test_a_run_that_went_on_is_exported_again(miniature, tmp_path):
    run = train(miniature, tmp_path / "run", *LORA)
    export.main([str(run.path), "--kohya", "--out", str(tmp_path / "mine")])
    before = load_file(run.path / "export" / "ema" / "pytorch_lora_weights.safetensors")
    allow = ["--allow-change", "train.steps"]
    train(miniature, run.path, *LORA, "train.steps=9", flags=allow)
    after = load_file(run.path / "export" / "ema" / "pytorch_lora_weights.safetensors")
    assert not any(torch.equal(before[name], after[name]) for name in before if "lora_B" in name)
    card = (run.path / "export" / "README.md").read_text()
    assert "step 9 of 9" in card
    with pytest.raises(UserError, match="mine is there already and holds something else"):
        export.main([str(run.path), "--out", str(tmp_path / "mine")])
    # What is there and is the same stays as it is.
    stamp = (run.path / "export" / "README.md").stat().st_mtime_ns
    export.main([str(run.path), "--kohya"])
    assert (run.path / "export" / "README.md").stat().st_mtime_ns == stamp
    assert (run.path / "export" / "kohya" / "ema.safetensors").exists()


@pytest.fixture
def exported(lora_run, tmp_path):
    """A copy of the run whose export is followed by a link, beside a file of the user's."""
    run = shutil.copytree(lora_run.path, tmp_path / "run")
    shutil.move(run / "export", tmp_path / "far")
    (run / "export").symlink_to(tmp_path / "far")
    (run / "export" / "mine.txt").write_text("mine")
    return run


def files_of(folder):
    return {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


def test_an_export_replaces_what_it_wrote_and_nothing_else(exported):
    old, before = (
        json.loads((exported / "export" / "made_from.json").read_text()),
        files_of(exported / "export"),
    )
    shutil.rmtree(exported / "checkpoints" / "step-0000006")
    export.main([str(exported)])
    note = json.loads((exported / "export" / "made_from.json").read_text())
    assert (old["checkpoint"], note["checkpoint"]) == ("step-0000006", "step-0000004")
    assert (exported / "export").is_symlink()
    assert (exported / "export" / "mine.txt").read_text() == "mine"
    assert files_of(exported / "export") == before


@pytest.mark.parametrize("where", [[], ["--out", "elsewhere"]])
def test_an_export_that_lost_a_file_is_made_whole_again(exported, where, monkeypatch, capsys):
    monkeypatch.chdir(exported)
    export.main([str(exported), *where])
    folder = exported / (where[1] if where else "export")
    weights = folder / "ema" / "pytorch_lora_weights.safetensors"
    before = load_file(weights)
    weights.unlink()
    export.main([str(exported), *where])
    assert equal(load_file(weights), before)
    export.main([str(exported), *where])
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../precious.txt", "{tmp}/precious.txt"])
def test_an_edited_note_removes_nothing_outside_the_export(exported, tmp_path, name):
    (tmp_path / "precious.txt").write_text("mine")
    file = exported / "export" / "made_from.json"
    note = json.loads(file.read_text())
    note["written"][name.format(tmp=tmp_path)] = 4
    file.write_text(json.dumps(note))
    shutil.rmtree(exported / "checkpoints" / "step-0000006")
    with pytest.raises(UserError, match=r"made_from\.json.*leaves the folder"):
        export.main([str(exported)])
    assert (tmp_path / "precious.txt").exists()


def test_of_two_exports_at_once_one_waits_and_the_result_is_whole(exported):
    both = [start("export . --out new", exported, name) for name in "ab"]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert sum("is there already" in said(exported, name)[0] for name in "ab") == 1
    note = json.loads((exported / "new" / "made_from.json").read_text())
    assert {name: (exported / "new" / name).stat().st_size for name in note["written"]} == note["written"]


def test_kohya_is_refused_without_lora(miniature, tmp_path):
    run = train(miniature, tmp_path / "run", "train.steps=1")
    with pytest.raises(UserError, match="--kohya is for LoRA"):
        export.main([str(run.path), "--kohya"])
    with pytest.raises(UserError, match="not a run folder"):
        export.main([str(tmp_path)])


def test_kohyas_names_are_refused_for_a_family_that_its_tools_do_not_know(lora_run, monkeypatch):
    monkeypatch.setattr(SD15, "kohya_base", None)
    with pytest.raises(UserError, match=r"have no name for Stable Diffusion 1\.5: leave --kohya out"):
        export.main([str(lora_run.path), "--kohya"])


def test_a_model_card_says_what_it_is_and_parses(lora_run):
    text = (lora_run.path / "export" / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["library_name"] == "diffusers"
    assert card["base_model"] == lora_run.config.model.base
    assert "u-repa" in card["tags"]
    assert "lora" in card["tags"]
    last = lora_run.metrics()[-1]
    assert f"| loss | {last['loss']:.6g} |" in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["align"]["coeff"] == 0.8


def test_a_model_card_survives_any_name(lora_run, tmp_path):
    run = shutil.copytree(lora_run.path, tmp_path / "# `a|b` <i>\n---\n*c*")
    config = yaml.safe_load((run / "config.yaml").read_text())
    base = shutil.copytree(config["model"]["base"], tmp_path / 'ba"se: {\n```')
    config["model"]["base"], config["data"]["csv"] = str(base), "a`b\n```\n.csv"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    card = export.model_card(RunFolder(run), 6)
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == str(base)
    title, *blocks = (t for t in MarkdownIt().parse(body) if t.type in ("inline", "fence"))
    assert "".join(t.content for t in title.children) == r"# `a|b` <i>\n---\n*c*"
    loading, settings = (block.content for block in blocks if block.type == "fence")
    assert f"from_pretrained({quoted(base.resolve())})" in loading
    assert yaml.safe_load(settings)["data"]["csv"] == "a`b\n```\n.csv"
    assert any(
        t.content == r"a`b\n```\n.csv" for b in blocks for t in b.children or () if t.type == "code_inline"
    )


PREVIEWS = ["train.preview_every=2", "train.preview_images=5", "eval.cfg=2"]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_previews_change_nothing_and_resume_exactly(miniature, tmp_path, monkeypatch, precision):
    knobs = [f"train.precision={precision}"]
    without = train(miniature, tmp_path / "without", *knobs)
    seen = train(miniature, tmp_path / "with", *knobs, *PREVIEWS)
    assert_same_run(seen, without)
    files = sorted(path.name for path in (seen.path / "previews").glob("*.png"))
    assert files == ["step-0000002.png", "step-0000004.png", "step-0000006.png"]
    stopped_at(3, miniature, tmp_path / "run", monkeypatch, *knobs, *PREVIEWS)
    resumed = train(miniature, tmp_path / "run", *knobs, *PREVIEWS)
    assert_same_run(resumed, without)
    for name in files:
        assert (seen.path / "previews" / name).read_bytes() == (resumed.path / "previews" / name).read_bytes()


def test_previews_show_the_moving_average(miniature, tmp_path):
    """With another decay the same weights are trained, and another picture is drawn."""
    pictures = []
    for decay in (0.0, 0.97):
        knobs = [
            f"optim.ema_decay={decay}",
            "optim.lr=0.02",
            "train.preview_every=6",
            "train.preview_images=4",
        ]
        run = train(miniature, tmp_path / str(decay), *knobs)
        pictures.append(
            np.asarray(Image.open(run.path / "previews" / "step-0000006.png").convert("RGB")).astype(int)
        )
    assert np.abs(pictures[0] - pictures[1]).max() > 3


def test_a_preview_that_cannot_be_drawn_ends_no_training(miniature, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise UserError("the decoder made no picture")

    modes, loss_of = [], train_script.loss_of
    monkeypatch.setattr(sample, "decode_images", fail)
    monkeypatch.setattr(
        train_script,
        "loss_of",
        lambda parts, *args: modes.append(parts.model.backbone.training) or loss_of(parts, *args),
    )
    run = train(miniature, tmp_path / "run", *PREVIEWS)
    assert modes == [True] * 6
    assert run.checkpoint_steps()[-1] == 6
    assert "no preview of step 6: the decoder made no picture" in capsys.readouterr().out
    monkeypatch.undo()
    assert_same_run(run, train(miniature, tmp_path / "without"))


def test_a_resumed_run_leaves_no_gap_on_tensorboard(miniature, tmp_path, monkeypatch):
    knobs = ["train.log_every=1"]
    run = stopped_at(4, miniature, tmp_path / "run", monkeypatch, *knobs)
    shutil.rmtree(
        run.checkpoint_folder / "step-0000004"
    )  # as if killed after step 4, which goes back to step 2
    train(miniature, run.path, *knobs)
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_metrics_and_previews_are_on_tensorboard(miniature, tmp_path):
    run = train(miniature, tmp_path / "run", *PREVIEWS)
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert {"loss", "loss_diff", "cosine/mid", "coeff", "grad_norm", "lr", "lr_heads", "it_per_s"} <= set(
        board.Tags()["scalars"]
    )
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in run.metrics()]
    )
    assert [event.step for event in board.Images("preview")] == [2, 4, 6]
    picture = Image.open(io.BytesIO(board.Images("preview")[-1].encoded_image_string))
    assert picture.size == Image.open(run.path / "previews" / "step-0000006.png").size


def test_losses_by_quarter_of_the_timesteps_make_up_the_whole(miniature, tmp_path):
    run = train(miniature, tmp_path / "run", "train.log_every=6", "data.batch_size=16")
    (line,) = timeless(run)
    quarters = [line[f"loss_diff_by_quarter/{i}"] for i in (1, 2, 3, 4)]
    assert min(quarters) < line["loss_diff"] < max(quarters)


def test_weights_and_biases_that_is_not_installed_is_one_line(miniature, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install wandb"):
        train(miniature, tmp_path / "run", "train.wandb=project")


def test_weights_and_biases_gets_every_line(miniature, tmp_path, monkeypatch):
    logged, ids = [], []

    class Wandb:
        Image = staticmethod(lambda path: path)
        log = staticmethod(lambda line, step: logged.append((step, set(line))))
        finish = staticmethod(lambda: logged.append("finished"))

        @classmethod
        def init(cls, **settings):
            assert settings["project"] == "project"
            ids.append(settings["id"])
            return cls

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    run = train(
        miniature, tmp_path / "run", "train.wandb=project", "train.preview_every=6", "train.preview_images=4"
    )
    assert [entry[0] for entry in logged[:-1]] == [2, 4, 6, 6]
    assert logged[-1] == "finished"
    assert logged[0][1] == set(run.metrics()[0])
    train(
        miniature,
        tmp_path / "run",
        "train.wandb=project",
        "train.steps=7",
        flags=["--allow-change", "train.steps"],
    )
    train(miniature, tmp_path / "other" / "run", "train.wandb=project")
    assert ids[0] == ids[1] != ids[2]
