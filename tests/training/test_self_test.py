"""The self-test says what is alive, changes nothing, and stops for each of the known ways to be dead, each in its own words."""

import shutil

import pytest
import torch
from conftest import demo_overrides

import train as train_script
from cache.manifest import FieldSpec
from cache.reader import FieldReader
from cache.shards import FieldWriter
from cache.text import TextReader, write_text
from common.errors import UserError
from configs.loading import load_config
from method.alignment import AlignHead
from models.families.sd15 import SD15
from models.taps import Tap
from training import self_test as self_test_module
from training.parts import build_parts

CONFIG = "configs/demo.yaml"


@pytest.fixture
def self_test(miniature, tmp_path, monkeypatch):
    """Run `--self-test` with overrides on the smallest demo."""
    monkeypatch.chdir(train_script.__file__.rsplit("/", 1)[0])

    def run(*more):
        overrides = demo_overrides(miniature, tmp_path / "run", *more)
        train_script.main(["--config", CONFIG, *overrides, "--self-test"])

    return run


def parts_of(miniature, tmp_path, *more):
    return build_parts(load_config(CONFIG, demo_overrides(miniature, tmp_path / "run", *more)))


def rewritten(source, field, folder, change):
    """A copy of a cached field whose values `(n, …)` went through `change`."""
    reader = FieldReader(source, field)
    ids = list(reader.ids)
    writer = FieldWriter(folder, FieldSpec(**{**vars(reader.spec), "dtype": "float32"}), ids)
    values = dict(zip(ids, change(reader.read(ids).float()), strict=True))
    for shard, batch in writer.pending(len(ids)):
        writer.put(shard, batch, writer.spec.encode(torch.stack([values[key] for key in batch])))
    writer.finish()
    return folder


def test_it_says_what_is_alive_and_makes_no_run_folder(self_test, tmp_path, capsys):
    self_test(
        "align.taps=[enc_last,mid,dec_first]", "model.train=lora", "model.lora_rank=4", "align.warmup_steps=2"
    )
    said = capsys.readouterr().out
    assert "60 images, 6 of each of 10 classes" in said
    for tap, path in (("enc_last", "down_blocks.3.resnets.0"), ("mid", "mid_block.resnets.1")):
        assert f"tap {tap}" in said
        assert f"{path} (64, 2, 2) float32 → conv1x1 → 4×4" in said
    assert said.count("cells reached 100%") == 3
    assert "rank 4, scale 8, in 18 modules: down_blocks.3 2, mid_block 12, up_blocks.0 4" in said
    assert "reaches 18 of 18 LoRA modules" in said
    assert "0 at 0, 0.8 at 2 (end of warm-up), 0.8 at 3 (middle), 0.8 at 5 (end)" in said
    assert "passed" in said
    assert not (tmp_path / "run").exists()


def test_a_baseline_has_nothing_to_align(self_test, capsys):
    self_test("align.coeff=0")
    said = capsys.readouterr().out
    assert "baseline" in said
    assert "tap " not in said


def test_its_numbers_are_those_of_a_step_by_hand(miniature, tmp_path, capsys):
    parts = parts_of(miniature, tmp_path)
    self_test_module.self_test(parts)
    said = capsys.readouterr().out
    values = self_test_module.read_probe(parts)
    latents, teacher = values["latent"][:4], values["dino_tokens"][:4]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    t = parts.loss.path.draw(4, latents.device, generator)
    alpha, sigma = parts.loss.path.schedule.at(t)
    text = parts.batches.prompts(values["label"][:4])
    parts.model.predict(alpha * latents + sigma * noise, t, text, capture=True)
    feature = parts.model.taps.captured["mid"]
    feature.retain_grad()
    x = parts.model.heads["mid"](feature, (4, 4))
    parts.loss.alignment({"mid": x}, teacher)["loss_align"].backward()
    cosine = torch.nn.functional.cosine_similarity(x, teacher, dim=-1).mean()
    assert f"cosine {cosine:+.3f}, L_align's gradient there {feature.grad.norm():.3g}," in said


def test_it_leaves_no_trace(miniature, tmp_path):
    parts = parts_of(miniature, tmp_path)
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    random = torch.get_rng_state()
    self_test_module.self_test(parts)
    assert all(value.equal(before[name]) for name, value in parts.model.state_dict().items())
    assert all(p.grad is None for p in parts.model.parameters())
    assert torch.get_rng_state().equal(random)
    assert parts.model.training
    assert not parts.model.taps.captured


def test_a_run_is_tested_before_its_first_step(miniature, tmp_path, monkeypatch):
    parts = parts_of(miniature, tmp_path)
    monkeypatch.setattr(train_script, "self_test", lambda *_, **__: (_ for _ in ()).throw(UserError("dead")))
    monkeypatch.setattr(train_script, "take_steps", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match="dead"):
        train_script.train(parts, [])
    assert not (parts.config.run / "config.yaml").exists()


def tapped_at(monkeypatch, tap, prepare=lambda unet: None):
    def tap_of(_family, unet, _name):
        prepare(unet)
        return tap

    monkeypatch.setattr(SD15, "tap", tap_of)


def test_a_path_that_does_not_exist(self_test, monkeypatch):
    tapped_at(monkeypatch, Tap("mid_block.resnets.7"))
    with pytest.raises(UserError, match=r"tap mid: the backbone has no block mid_block\.resnets\.7"):
        self_test()


def test_a_tap_that_does_not_fire(self_test, monkeypatch):
    tapped_at(monkeypatch, Tap("idle"), lambda unet: unet.add_module("idle", torch.nn.Identity()))
    with pytest.raises(UserError, match=r"tap mid \(idle\) did not fire"):
        self_test()


def test_a_detached_tap(self_test, monkeypatch):
    tapped_at(monkeypatch, Tap("mid_block.resnets.1", read=lambda output, args, kwargs: output.detach()))
    with pytest.raises(UserError, match="carries no gradient"):
        self_test()


@pytest.mark.parametrize(
    ("knob", "said"), [("teacher.dim=32", "teacher.dim"), ("teacher.grid=8", "teacher.grid")]
)
def test_a_teacher_of_another_width_or_grid_than_the_cache(self_test, knob, said):
    with pytest.raises(UserError, match=r"holds tokens .* set teacher\.dim and teacher\.grid") as error:
        self_test(knob)
    assert said in str(error.value)


def test_a_head_that_passes_no_gradient(miniature, tmp_path):
    parts = parts_of(miniature, tmp_path)
    torch.nn.init.zeros_(parts.model.heads["mid"].proj[0].weight)
    with pytest.raises(UserError, match="gets no gradient"):
        self_test_module.self_test(parts)


def test_a_head_that_reads_some_cells_only(self_test, monkeypatch):
    """As one that shrinks to the grid of a CLS vector does: gradient reaches the centre alone."""
    forward = AlignHead.forward
    monkeypatch.setattr(
        AlignHead,
        "forward",
        lambda head, feat, grid: forward(head, feat * torch.tensor([1.0, 0.0])[:, None], grid),
    )
    with pytest.raises(UserError, match="only 50% of the cells"):
        self_test()


def test_lora_on_no_module(self_test, monkeypatch):
    monkeypatch.setitem(SD15.lora_targets, "attention", r"^nowhere\..*$")
    with pytest.raises(UserError, match="LoRA finds no module"):
        self_test("model.train=lora", "model.lora_targets=attention")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["tokens", "latents"])
def test_nan_in_a_shard(self_test, miniature, tmp_path, field, value):
    """Our writer stores none, so bytes of a finished shard are changed, as a failing disk does."""
    folder = shutil.copytree(miniature / "cache" / field, tmp_path / field)
    reader = FieldReader(folder, field)
    stored = reader.spec.encode(reader.read(reader.ids[7:8])).numpy().tobytes()
    (shard,) = folder.glob("*.lmdb")
    content = shard.read_bytes()
    assert content.count(stored) == 1
    damaged = torch.tensor([value], dtype=torch.float16).numpy().tobytes() + stored[2:]
    shard.write_bytes(content.replace(stored, damaged))
    with pytest.raises(UserError, match=f"{field} holds NaN or infinity for {reader.ids[7]}"):
        self_test(f"data.{field}={folder}")


def test_a_teacher_that_is_a_cls_vector_in_disguise(self_test, miniature, tmp_path):
    """What `unsqueeze(1)` and an expansion to the grid make of DINOv2's pooled output."""
    folder = rewritten(
        miniature / "cache" / "tokens", "tokens", tmp_path / "tokens", lambda y: y[:, :1].expand_as(y)
    )
    with pytest.raises(UserError, match="these are no patch tokens"):
        self_test(f"data.tokens={folder}")


def test_tokens_that_are_not_normalised(self_test, miniature, tmp_path):
    folder = rewritten(miniature / "cache" / "tokens", "tokens", tmp_path / "tokens", lambda y: 3 * y)
    with pytest.raises(UserError, match="not L2-normalised"):
        self_test(f"data.tokens={folder}")


def test_latents_of_another_scale(self_test, miniature, tmp_path):
    folder = rewritten(miniature / "cache" / "latents", "latents", tmp_path / "latents", lambda z: z / 0.05)
    with pytest.raises(UserError, match="standard deviation"):
        self_test(f"data.latents={folder}")


def test_tokens_that_are_the_same_for_all_images(self_test, miniature, tmp_path):
    folder = rewritten(
        miniature / "cache" / "tokens", "tokens", tmp_path / "tokens", lambda y: y[:1].expand_as(y)
    )
    with pytest.raises(UserError, match="the same for all images"):
        self_test(f"data.tokens={folder}")


def test_some_images_with_copies_of_one_token(self_test, miniature, tmp_path):
    def spoil(y):
        return torch.cat([y[:10, :1].expand_as(y[:10]), y[10:]])

    folder = rewritten(miniature / "cache" / "tokens", "tokens", tmp_path / "tokens", spoil)
    with pytest.raises(UserError, match="of 10 in 60 images all tokens are equal"):
        self_test(f"data.tokens={folder}")


@pytest.mark.parametrize("scale", [1 / 0.18215, 0.18215])
def test_latents_unscaled_or_scaled_twice(self_test, miniature, tmp_path, scale):
    folder = rewritten(miniature / "cache" / "latents", "latents", tmp_path / "latents", lambda z: z * scale)
    with pytest.raises(UserError, match="standard deviation"):
        self_test(f"data.latents={folder}")


def test_frozen_heads(miniature, tmp_path):
    parts = parts_of(miniature, tmp_path)
    parts.model.heads.requires_grad_(False)
    with pytest.raises(UserError, match="the heads must be trained"):
        self_test_module.self_test(parts)


def test_fewer_images_than_a_batch(self_test):
    with pytest.raises(UserError, match=r"60 images are fewer than data\.batch_size = 61"):
        self_test("data.batch_size=61")


@pytest.mark.parametrize("coeff", [0, 0.8])
def test_a_network_that_cannot_learn(miniature, tmp_path, coeff):
    parts = parts_of(miniature, tmp_path, f"align.coeff={coeff}", "model.train=lora", "model.lora_rank=4")
    for name, parameter in parts.model.backbone.named_parameters():
        if ".lora_" in name:
            torch.nn.init.zeros_(parameter)  # both matrices: no gradient ever
    with pytest.raises(UserError, match="sends no gradient"):
        self_test_module.self_test(parts)


@pytest.mark.parametrize(
    "knobs",
    [
        ["model.train=partial", "model.gradient_checkpointing=true"],
        ["model.train=lora", "model.lora_targets=attention", "align.taps=[mid,dec_first]"],
        ["train.precision=bf16", "align.head=conv3x3", "align.spatial_norm=0.5"],
        ["diffusion.snr_gamma=5", "diffusion.parameterization=epsilon", "align.manifold=both"],
        ["data.batch_size=1", "align.manifold=token"],
        ["align.coeff=0", "model.train=lora"],
    ],
)
def test_no_false_alarm(self_test, capsys, knobs):
    self_test(*knobs)
    assert "passed" in capsys.readouterr().out


def rewrite_text(miniature, folder, change):
    """Store the miniature's text with other embeddings: `change` gets those of the prompts and that of the null prompt."""
    text = TextReader(miniature / "cache" / "text")
    listed = {"n_classes": text.n_classes, "synsets": text.synsets, "prompts": text.prompts}
    values, null = text.fields_of(range(len(text)))["prompt_embeds"], text.null["prompt_embeds"]
    write_text(folder, text.spec, listed, {"prompt_embeds": change(values, null)}, text.null)


def test_classes_with_one_embedding(self_test, miniature, tmp_path):
    rewrite_text(miniature, tmp_path / "text", lambda values, null: values[:1].expand_as(values))
    with pytest.raises(UserError, match="have one embedding"):
        self_test(f"data.text={tmp_path}/text")


def test_a_class_that_is_the_null_prompt(self_test, miniature, tmp_path):
    rewrite_text(
        miniature, tmp_path / "text", lambda values, null: torch.cat([values[:4], null[None], values[5:]])
    )
    with pytest.raises(UserError, match="embedding of the null prompt"):
        self_test(f"data.text={tmp_path}/text")


def test_a_coefficient_that_never_acts(self_test):
    with pytest.raises(UserError, match="λ is 0 at every step"):
        self_test("align.cutoff_step=1", "align.warmup_steps=1", "train.steps=1000000000")


def test_a_lack_of_memory(self_test, monkeypatch):
    def lack(*_):
        torch.empty(2**50)

    monkeypatch.setattr(self_test_module, "check_gradients", lack)
    with pytest.raises(UserError, match=r"^out of memory: lower data\.batch_size"):
        self_test()


@pytest.mark.parametrize("coeff", [0, 0.8])
def test_an_output_that_is_not_finite(miniature, tmp_path, coeff):
    parts = parts_of(miniature, tmp_path, f"align.coeff={coeff}")
    torch.nn.init.constant_(parts.model.backbone.conv_in.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        self_test_module.self_test(parts)
