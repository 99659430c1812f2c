"""Training on the smallest demo: exact resume, λ = 0 equals absent, exports that ordinary tools load."""

import json
import os
import re
import shlex
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import demo_overrides, run_numbered
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fork_server import said, start
from safetensors.torch import load_file, save_file
from small_runs import CONFIG, assert_same_run, equal, stopped_at, tensors, timeless, train

import train as train_script
from cache import batch_stream
from common.errors import UserError
from configs.loading import load_config
from method.paths import DiffusionPath
from method.sampler import initial_noise, sample_latents
from models.latents import decode_images
from training import checkpoint
from training.masters import Masters
from training.metric_log import MetricLog
from training.network import output_of
from training.parts import build_model, family_for, load_run_model
from training.ranks import Ranks
from training.run_folder import RunFolder
from training.state import TrainingState


@pytest.fixture(scope="module")
def unbroken(miniature, tmp_path_factory):
    return train(miniature, tmp_path_factory.mktemp("runs") / "unbroken")


@pytest.mark.parametrize("stop_at", [3, 4])
def test_a_stopped_and_resumed_run_equals_the_unbroken_one(
    miniature, unbroken, tmp_path, monkeypatch, stop_at, capsys
):
    stopped = stopped_at(stop_at, miniature, tmp_path / "run", monkeypatch)
    assert stopped.checkpoint_steps()[-1] == stop_at
    assert "go on with" in capsys.readouterr().out
    resumed = train(miniature, tmp_path / "run")
    for file in ("trained.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert equal(tensors(resumed, file=file), tensors(unbroken, file=file))
    assert timeless(resumed) == timeless(unbroken)
    assert [line["step"] for line in timeless(resumed)] == [2, 4, 6]


def test_text_may_leave_the_device_when_a_run_is_resumed(miniature, unbroken, tmp_path, monkeypatch):
    stopped_at(3, miniature, tmp_path / "run", monkeypatch)
    resumed = train(miniature, tmp_path / "run", "data.text_on_device=false")
    assert_same_run(resumed, unbroken)


CUTOFF = [
    "align.similarity_threshold=-0.5",
    "align.similarity_ema_decay=0.5",
    "train.log_every=1",
    "train.steps=8",
]


@pytest.mark.parametrize(
    ("mode", "measured", "stops"),
    [
        ("permanent", [1, 2], [2]),
        ("recoverable", [1, 2, 3, 5, 7], [5]),
        pytest.param("permanent", [1, 2], [1], marks=pytest.mark.thorough),
        pytest.param("recoverable", [1, 2, 3, 5, 7], [2], marks=pytest.mark.thorough),
    ],
)
def test_a_similarity_cutoff_ends_the_alignment_and_survives_a_resume(
    miniature, tmp_path, monkeypatch, mode, measured, stops
):
    """The average decides from its second value on; a recoverable one is measured every other step."""
    knobs = [*CUTOFF, f"align.threshold_mode={mode}", "align.similarity_every=2"]
    whole = train(miniature, tmp_path / "whole", *knobs)
    lines = whole.metrics()
    assert [line["step"] for line in lines if line["coeff"] > 0] == [1, 2]
    assert [line["step"] for line in lines if "loss_token" in line] == measured
    assert all(line["loss"] == line["loss_diff"] for line in lines[2:])
    for stop_at in stops:
        run = tmp_path / f"{mode}{stop_at}"
        stopped_at(stop_at, miniature, run, monkeypatch, *knobs)
        resumed = train(miniature, run, *knobs)
        for file in ("trained.safetensors", "optimizer.safetensors"):
            assert equal(tensors(resumed, 8, file), tensors(whole, 8, file))
        assert timeless(resumed) == timeless(whole)


def test_means_are_over_the_steps_that_had_the_term(miniature, tmp_path):
    """λ is 0 at step 0 and no head is evaluated there: the cosine of that step is absent, and no 0."""
    each = train(miniature, tmp_path / "each", "align.warmup_steps=1", "train.log_every=1", "train.steps=3")
    once = train(miniature, tmp_path / "once", "align.warmup_steps=1", "train.log_every=3", "train.steps=3")
    cosines = [line.get("cosine/mid") for line in each.metrics()]
    assert cosines[0] is None
    (line,) = once.metrics()
    assert line["cosine/mid"] == pytest.approx((cosines[1] + cosines[2]) / 2)
    assert line["loss_token"] == pytest.approx(1 - line["cosine/mid"])
    assert line["loss_manifold"] == pytest.approx(line["loss_manifold/mid"])


def test_a_run_on_moments_and_int8_tokens_draws_anew_and_resumes_exactly(
    miniature, unbroken, tmp_path, monkeypatch
):
    csv, models = miniature / "train.csv", miniature / "models"
    moments = ["--base", models / "sd15-mini", "--image-size", 32, "--posterior", "moments", "--unscaled"]
    run_numbered(
        "2_encode_vae_latents", "--csv", csv, "--workers", 0, "--out", tmp_path / "latents", *moments
    )
    compact = ["--teacher", models / "dinov2-mini", "--grid", 4, "--dtype", "int8"]
    run_numbered("3_build_dino_cache", "--csv", csv, "--workers", 0, "--out", tmp_path / "tokens", *compact)
    cache = [f"data.latents={tmp_path}/latents", f"data.tokens={tmp_path}/tokens"]
    whole = train(miniature, tmp_path / "whole", *cache)
    stopped_at(3, miniature, tmp_path / "run", monkeypatch, *cache)
    resumed = train(miniature, tmp_path / "run", *cache)
    assert equal(tensors(resumed), tensors(whole))
    exact, drawn = (run.metrics()[-1] for run in (unbroken, whole))
    assert drawn["loss_diff"] != exact["loss_diff"]
    assert drawn["loss_token"] == pytest.approx(
        exact["loss_token"], rel=0.05
    )  # the same images, the same teacher


def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(miniature, unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        write = MetricLog.line
        patch.setattr(MetricLog, "line", lambda log, line: kill(line) or write(log, line))

        def kill(line):
            if line["step"] == 4:
                raise SystemError("killed")

        with pytest.raises(SystemError):
            train(miniature, run)
    assert RunFolder(run).checkpoint_steps() == [2]
    (run / "checkpoints" / ".step-0000004.partial").mkdir()  # a checkpoint that was never finished
    (run / "checkpoints" / "step-0000004").mkdir()
    resumed = train(miniature, run)
    assert equal(tensors(resumed), tensors(unbroken))
    assert [line["step"] for line in resumed.metrics()] == [2, 4, 6]


def test_the_newest_checkpoints_are_kept_by_step_number(miniature, unbroken, tmp_path):
    assert unbroken.checkpoint_steps() == [2, 4, 6]
    run = train(miniature, tmp_path / "run", "train.keep_checkpoints=2")
    assert run.checkpoint_steps() == [4, 6]


def test_metrics_after_the_checkpoint_are_forgotten(unbroken, tmp_path):
    run = RunFolder(shutil.copytree(unbroken.path, tmp_path / "copy"))
    run.forget_after(3)
    assert [line["step"] for line in run.metrics()] == [2]
    run.log.append({"step": 4})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5')  # a process killed while it wrote
    assert [line["step"] for line in run.metrics()] == [2, 4]


def test_heads_have_their_own_learning_rate(miniature, tmp_path):
    config = load_config(CONFIG, demo_overrides(miniature, tmp_path, "optim.lr=0.01", "optim.head_lr=0.5"))
    model = build_model(config.model, config.align, config.teacher, config.seed, family_for(config))
    state = TrainingState(config, Masters(model, torch.float32), None, Ranks(cpu=True), {})
    groups = state.optimizer.param_groups
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    assert rates == {
        id(p): 0.5 if name.startswith("heads.") else 0.01 for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_the_whole_group_lets_the_trainer_save(miniature, tmp_path, name):
    """As a batch system sends it, and as a terminal that is lost."""
    many = ["data.read_threads=2", "train.steps=1000", "train.checkpoint_every=1000"]
    words = ["train_sd15", "--config", CONFIG, *demo_overrides(miniature, tmp_path / "run", *many)]
    process = start(shlex.join(map(str, words)), tmp_path)
    while not (tmp_path / "run" / "config.yaml").exists() or not RunFolder(tmp_path / "run").metrics():
        assert process.is_alive(), said(tmp_path)
        time.sleep(0.1)
    os.killpg(process.pid, getattr(signal, name))
    process.join(60)
    assert process.exitcode == 0, said(tmp_path)
    assert "go on with: python train_sd15.py" in said(tmp_path)[0]
    assert len(RunFolder(tmp_path / "run").checkpoint_steps()) == 1


def test_a_finished_run_does_nothing_more(miniature, unbroken, capsys):
    before = (unbroken.path / "metrics.jsonl").read_bytes()
    train(miniature, unbroken.path)
    assert "is complete" in capsys.readouterr().out
    assert (unbroken.path / "metrics.jsonl").read_bytes() == before


def test_zero_coefficient_equals_a_run_without_heads_bit_for_bit(miniature, tmp_path, monkeypatch):
    baseline = train(miniature, tmp_path / "baseline", "align.coeff=0")
    assert not [name for name in tensors(baseline) if name.startswith("heads.")]
    # The same steps with heads built and λ silenced by the schedule: only the heads may differ.
    monkeypatch.setattr(train_script, "self_test", lambda *_, **__: None)  # refuses a λ that never acts
    silenced = train(
        miniature, tmp_path / "silenced", "align.coeff=0.8", "align.cutoff_step=1", "align.warmup_steps=1"
    )
    with_heads = tensors(silenced)
    assert [name for name in with_heads if name.startswith("heads.")]
    assert equal(
        tensors(baseline), {name: value for name, value in with_heads.items() if name.startswith("backbone.")}
    )


def test_alignment_changes_the_unet(miniature, unbroken, tmp_path):
    baseline = train(miniature, tmp_path / "baseline", "align.coeff=0")
    name = "backbone.mid_block.resnets.1.conv2.weight"
    assert not torch.equal(tensors(baseline)[name], tensors(unbroken)[name])
    assert not any("loss_align" in line for line in baseline.metrics())
    assert all(line["loss_align"] > 0 for line in unbroken.metrics())


def test_every_step_draws_its_own_noise_and_every_seed_another(miniature, tmp_path, monkeypatch):
    drawn = []
    call = DiffusionPath.__call__

    def note(path, x_0, noise, t):
        drawn.append(noise.flatten()[0].item())
        return call(path, x_0, noise, t)

    monkeypatch.setattr(DiffusionPath, "__call__", note)
    monkeypatch.setattr(train_script, "self_test", lambda *_, **__: None)  # draws for itself
    for seed in (0, 0, 1):
        train(miniature, tmp_path / f"{len(drawn)}", f"seed={seed}", "train.steps=3")
    assert drawn[:3] == drawn[3:6]
    assert len(set(drawn[3:])) == 6


def test_captions_are_dropped_as_often_as_the_config_says(miniature, tmp_path, monkeypatch):
    asked = []
    drop = batch_stream.drop_captions
    monkeypatch.setattr(batch_stream, "drop_captions", lambda *args: asked.append(args[2]) or drop(*args))
    train(miniature, tmp_path / "run", "data.caption_dropout=0.3", "train.steps=2")
    assert asked == [0.3, 0.3]


def test_ema_is_the_moving_average_of_the_weights(miniature, tmp_path):
    run = train(
        miniature, tmp_path / "run", "train.steps=3", "train.checkpoint_every=1", "optim.ema_decay=0.15"
    )
    name = "backbone.conv_in.weight"
    ema = tensors(run, 1, "ema.safetensors")[name]
    for step in (2, 3):
        decay = min(0.15, (1 + step - 1) / (10 + step - 1))  # diffusers' warm-up of the decay
        ema = decay * ema + (1 - decay) * tensors(run, step=step)[name]
        torch.testing.assert_close(tensors(run, step, "ema.safetensors")[name], ema)


@pytest.mark.parametrize(
    ("mode", "cfg"),
    [
        ("lora", 1.0),
        ("lora", 3.0),
        ("partial", 3.0),
        ("full", 3.0),
        pytest.param("partial", 1.0, marks=pytest.mark.thorough),
        pytest.param("full", 1.0, marks=pytest.mark.thorough),
    ],
)
def test_export_in_stock_pipeline_gives_our_own_image(miniature, tmp_path_factory, mode, cfg):
    folder = tmp_path_factory.getbasetemp() / f"export_{mode}"  # trained once for both values of cfg
    more = [f"model.train={mode}", "model.lora_rank=4", "model.lora_alpha=8", "optim.lr=0.02"]
    run = train(miniature, folder, *more)
    base = f"{miniature}/models/sd15-mini"
    pipe = StableDiffusionPipeline.from_pretrained(base)
    if mode == "lora":
        pipe.load_lora_weights(run.path / "export" / "ema")
        loaded = {name for name, _ in pipe.unet.named_parameters() if "lora_" in name}
        trained = {name for name in tensors(run) if "lora_" in name}
        assert len(loaded) == len(trained) > 0  # a file of mixed key names would lose its attention half here
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(run.path / "export" / "ema" / "unet")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise([7], (4, 16, 16))
    text = pipe.encode_prompt("a photo of a three", "cpu", 1, True, negative_prompt="")
    theirs = pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], latents=noise, num_inference_steps=4, guidance_scale=cfg,
        output_type="np", height=32, width=32,
    ).images  # fmt: skip
    model = load_run_model(run, 6, torch.device("cpu"))
    assert output_of(run.config) == "v"
    fields, null = {"prompt_embeds": text[0]}, {"prompt_embeds": text[1][0]}
    latents = sample_latents(
        model.predict, pipe.scheduler, fields, null, [7], shape=(4, 16, 16), steps=4, cfg=cfg
    )
    ours = decode_images(model.family.load_codec(), latents)
    assert np.abs(ours / 255 - theirs).max() < 0.003  # half a level of the 8-bit image
    bare = load_run_model(run, 6, torch.device("cpu"), weights="base")
    plain = sample_latents(
        bare.predict, pipe.scheduler, fields, null, [7], shape=(4, 16, 16), steps=4, cfg=cfg
    )
    assert not torch.allclose(plain, latents, atol=1e-2)  # the weights matter


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.dim=96", r"tokens \(16, 64\) on a grid .*, the config's teacher makes \(16, 96\)"),
        ("teacher.grid=5", "teacher.grid"),
        ("teacher.model=facebook/dinov2-large", "dinov2-mini, teacher.model says facebook/dinov2-large"),
        ("data.csv=nowhere.csv", "make it again with script 1"),
        ("data.latents=nowhere", "is not a cache"),
        ("model.base=nowhere", "does not exist"),
        ("model.base=runwayml/stable-diffusion-v1-5", "use stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("data.batch_size=1000", "fewer than data.batch_size"),
        ("train.device=tpu", "device 'tpu' cannot be used"),
    ],
)
def test_a_wrong_path_or_teacher_is_one_line(miniature, tmp_path, override, message):
    with pytest.raises(UserError, match=message) as error:
        train(miniature, tmp_path / "run", override)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_cache_of_another_base_is_refused_and_of_the_same_weights_elsewhere_taken(
    miniature, tmp_path, part
):
    base = tmp_path / "base"
    shutil.copytree(miniature / "models" / "sd15-mini", base)
    train(miniature, tmp_path / "same", f"model.base={base}")
    (file,) = (base / part).glob("*.safetensors")
    changed = load_file(file)
    changed[min(changed)] = changed[min(changed)] + 1
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=f"the cache was made with the {part} of .*sd15-mini, which is not that of"
    ):
        train(miniature, tmp_path / "other", f"model.base={base}")


def test_a_full_disk_at_a_checkpoint_is_one_line_and_keeps_the_one_before(
    miniature, unbroken, tmp_path, monkeypatch
):
    save = checkpoint.save_file
    run = tmp_path / "run"

    def full(tensors, file):
        if "0000004" in str(file):
            raise OSError(28, "No space left on device")
        save(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match="free some disk"):
            train(miniature, run)
    assert RunFolder(run).checkpoint_steps() == [2]
    assert not list((run / "checkpoints").glob(".*"))
    assert equal(tensors(train(miniature, run)), tensors(unbroken))


def test_a_folder_that_is_no_sd15_is_one_line(miniature, tmp_path):
    with pytest.raises(UserError, match=r"model_index.json cannot be read"):
        train(miniature, tmp_path / "run", f"model.base={miniature}/models/dinov2-mini")


def test_resuming_with_another_config_is_refused_and_says_what_changed(miniature, unbroken):
    with pytest.raises(UserError, match=r"align.coeff: 0.8 -> 0.5"):
        train(miniature, unbroken.path, "align.coeff=0.5")
    train(miniature, unbroken.path, "train.log_every=3", "eval.num_samples=8")  # cannot change the result


def test_a_run_records_where_it_came_from(unbroken):
    recorded = json.loads((unbroken.path / "run.json").read_text())
    assert recorded["versions"]["torch"] == torch.__version__.split("+")[0]
    assert recorded["command"]
    assert (
        RunFolder(unbroken.path).settings() == unbroken.settings()
    )  # what decides the result; eval.* may change
    assert any((unbroken.path / "tensorboard").iterdir())


def test_two_trainings_cannot_share_a_run_folder(miniature, tmp_path):
    config = load_config(CONFIG, demo_overrides(miniature, tmp_path / "run"))
    with RunFolder.claimed(config) as run:
        run.adopt()
        with pytest.raises(UserError, match="another process"):
            train(miniature, tmp_path / "run", "align.coeff=0.5")
    assert RunFolder(tmp_path / "run").config == config


def test_a_run_that_has_no_checkpoint_yet_may_change_its_config(miniature, tmp_path):
    with pytest.raises(UserError, match="lower it"):
        train(miniature, tmp_path / "run", "data.batch_size=1000")
    run = train(miniature, tmp_path / "run", "data.batch_size=5", "train.steps=1")
    assert run.config.data.batch_size == 5


def test_the_script_reports_an_error_in_one_line_and_exits_2(tmp_path):
    process = start(f"train_sd15 --config {CONFIG} align.coef=1", tmp_path)
    process.join(60)
    assert process.exitcode == 2
    assert re.fullmatch(r"error: [^\n]*did you mean 'align.coeff'[^\n]*\n", said(tmp_path)[1])


def test_evaluation_settings_may_change_after_the_training(miniature, tmp_path, capsys):
    """The same command with other eval settings trains nothing, and is what evaluation then reads."""
    run = train(miniature, tmp_path / "run", "train.steps=2")
    before = tensors(run, step=2)
    again = train(miniature, tmp_path / "run", "train.steps=2", "eval.cfg=3.0", "data.read_threads=0")
    assert again.config.eval.cfg == 3.0
    assert equal(tensors(again, step=2), before)
    with pytest.raises(UserError, match="started with another config"):
        train(miniature, tmp_path / "run", "train.steps=2", "align.coeff=0.1")
    assert RunFolder(tmp_path / "run").config.align.coeff == 0.8


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            r"^out of memory: .*optim\.accumulate.*expandable_segments",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), r"^out of memory: .*optim\.accumulate"),
        (MemoryError(), r"^out of memory: .*optim\.accumulate"),
        (
            torch._dynamo.exc.TorchDynamoException("no compiler\nat all"),
            r"\(no compiler\): train\.compile=none",
        ),
    ],
)
def test_what_the_machine_lacks_is_one_line_that_says_what_to_do(
    miniature, tmp_path, monkeypatch, error, message
):
    monkeypatch.setattr(train_script, "loss_of", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=message):
        train(miniature, tmp_path / "run")
