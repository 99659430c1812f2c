"""Large networks on one card: their plans, frozen weights in bf16 and in fewer bits, and the guidance that they are told."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import demo_overrides, run_numbered
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import export
import train
from common.errors import UserError
from configs.loading import load_config
from evaluation.sample import image_recipe
from evaluation.targets import Target
from miniature.families import CELLS
from models.aligned import AlignedModel, family_lora
from models.families.table import FAMILIES, family_of
from training.parts import build_parts, family_for
from training.plan import forward_of, model_of_shapes, planned_bytes, print_plan
from training.plan_count import count_step, saved_bytes
from training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# {family: (weights in billions, LoRA weights of rank 32 in millions)} of its usual base model.
SIZES = {
    "sd15": (0.86, 7.5), "sdxl": (2.57, 48.7), "kolors": (2.58, 48.7), "flux": (11.9, 52.3), "flux2": (32.2, 107.0),
    "sd3": (2.24, 18.8), "chroma": (8.9, 52.3), "sana": (1.6, 22.9), "pixart": (0.61, 16.5), "hidream": (17.1, 31.5),
    "auraflow": (6.8, 31.5), "lumina2": (2.6, 14.7), "wan": (1.42, 23.6), "ltxvideo": (1.9, 29.4),
    "sanavideo": (1.91, 22.9), "kandinsky5_video": (2.15, 34.6),
}  # fmt: skip
QUICK = ("sd15",)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in FAMILIES],
)
def test_the_comment_of_a_config_is_what_its_plan_says_without_a_base_model(name, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = ROOT / "configs" / "families" / f"{name}.yaml"
    print_plan(load_config(file, ["train.device=cpu"]))
    said = capsys.readouterr().out
    memory = re.search(r"about ([\d.]+) GB on each device.* a card of (\d+) GB", said)
    hours = re.search(r"H100 .* ([\d.]+) h for", said)
    told = re.search(r"([\d.]+) GB, a card of (\d+) GB; ([\d.]+) h on an H100", file.read_text())
    assert told.groups() == (*memory.groups(), *hours.groups())
    trained, frozen = re.search(r"([\d,]+) of the .*, ([\d,]+) are frozen", said).groups()
    sizes = int(frozen.replace(",", "")) / 1e9, int(trained.replace(",", "")) / 1e6
    assert sizes == pytest.approx(SIZES[name], rel=0.02)


def test_the_recipe_for_flux_on_a_small_card_fits_it():
    """With a seventh of it to spare, as its comment says; in 4 bits it fits a smaller one."""
    file = ROOT / "configs" / "small_flux.yaml"
    told = re.findall(r"predicts ([\d.]+) GB", file.read_text())
    saved = None
    for more, card in (([], 24), (["model.quantize=nf4"], 16)):
        config = load_config(file, more)
        model, _ = model_of_shapes(config, torch.bfloat16)
        if saved is None:
            forward = forward_of(model, (16, 128, 128), (37, 37))
            saved = saved_bytes(lambda forward=forward: forward(1), list(model.parameters()))
        planned = sum(planned_bytes(config, model, torch.bfloat16, saved).values()) / 1e9
        assert planned < 0.85 * card
        assert f"{planned:.1f}" == told.pop(0)
    assert not told


def lora_model(family, network):
    return AlignedModel(family, network, ("auto",), 64, lora=family_lora(family, 4, 4, "auto")).train()


def real_forward(model, shape):
    """A loss of a batch of 1 on the CPU, as `forward_of` makes it, with text of full length."""
    text = {
        name: torch.ones(1, *row, dtype=torch.uint8) if name.endswith("mask") else torch.randn(1, *row)
        for name, row in model.family.text_shapes(model.backbone).items()
    }
    output = model.predict(torch.randn(1, *shape), torch.full((1,), 0.5), text, capture=True)
    loss = output.square().mean() + sum(x.square().mean() for x in model.get_aligned_tokens((3, 3)).values())
    model.clear_hooks()
    return loss


@pytest.mark.parametrize("name", ["hidream", "lumina2"])
def test_a_network_that_looks_at_values_costs_on_shapes_what_it_costs_on_numbers(name, base_of):
    family = family_of(base_of(name))
    model = lora_model(family, family.load_network())
    shape = (family.latent_shape(model.backbone)[0], CELLS, CELLS)
    # Of a CPU's kernels of attention PyTorch 2.11 counts this one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        real_forward(model, shape)
    network, _ = family.network_of_shapes()
    with torch.device("meta"):
        shapes = lora_model(family, network)
        family.forecast(network)
    assert count_step(forward_of(shapes, shape, (3, 3))).forward == counter.get_total_flops()


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_checkpointing_is_known_to_the_model_and_counted_and_can_be_undone(name, base_of):
    family = family_of(base_of(name))
    kept, gradients = {}, {}
    for device in ("meta", "cpu"):
        network = family.network_of_shapes()[0] if device == "meta" else family.load_network()
        with torch.device(device):
            model = lora_model(family, network)
        forward = forward_of(model, (4, CELLS, CELLS), (3, 3))
        if device == "cpu":

            def forward(_, model=model):
                torch.manual_seed(0)
                return real_forward(model, (4, CELLS, CELLS))

        for on in (False, True, False):
            model.checkpoint(on)
            assert model.checkpointing is on
            kept.setdefault((device, on), set()).add(
                saved_bytes(lambda f=forward: f(1), list(model.parameters()))
            )
        if device == "cpu":
            for on in (False, True):
                model.zero_grad()
                model.checkpoint(on)
                forward(1).backward()
                gradients[on] = {
                    n: p.grad.clone() for n, p in model.trained_parameters().items() if p.grad is not None
                }
    assert all(len(found) == 1 for found in kept.values())  # the same again once it is off
    kept = {key: found.pop() for key, found in kept.items()}
    # Without checkpointing, a CPU's attention with a mask keeps its N×N matrix.
    for on in (False, True) if name == "flux" else (True,):
        assert kept["meta", on] == pytest.approx(kept["cpu", on], rel=0.05)
    assert kept["cpu", True] < 0.3 * kept["cpu", False]
    assert all(gradients[True][name].equal(value) for name, value in gradients[False].items())
    model.compile_backbone()
    compiled = {n for n, module in model.backbone.named_modules() if module._compiled_call_impl is not None}
    assert compiled == set(family.blocks(model.backbone).values())


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "sdxl"])
def test_frozen_weights_that_are_loaded_in_bf16_have_the_bits_of_those_that_are_cast(name, base_of):
    family = family_of(base_of(name))
    cast = lora_model(family, family.load_network())
    loaded = lora_model(family, family.load_network(torch.bfloat16))
    masters = loaded.trained_parameters()
    assert all(p.dtype == torch.float32 and p.equal(masters[n]) for n, p in cast.trained_parameters().items())
    assert {p.dtype for n, p in loaded.backbone.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    ours, theirs = loaded.to(torch.bfloat16).state_dict(), cast.to(torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(value.equal(theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def flux_data(miniature, base_of, tmp_path_factory):
    """Overrides for trainings of a small Flux on the miniature's images, with its own latents and text."""
    root, base = tmp_path_factory.mktemp("flux"), base_of("flux")
    for split in ("train", "val"):
        run_numbered(
            "2_encode_vae_latents", "--csv", miniature / f"{split}.csv", "--workers", 0, "--batch-size", 16, "--base", base,
            "--image-size", 64, "--out", root / split,
        )  # fmt: skip
    names = ["--class-names", miniature / "imagenet_classes.json"]
    run_numbered("4_prepare_text_embeddings", *names, "--base", base, "--out", root / "text")
    return [
        f"model.base={base}", f"data.latents={root}/train", f"eval.latents={root}/val", f"data.text={root}/text",
        "model.train=lora", "model.lora_rank=4", "model.lora_targets=auto", "align.taps=auto", "align.head=linear",
        "diffusion.prediction=auto", "eval.cfg=1.0", "data.batch_size=2", "train.steps=2", "train.checkpoint_every=1",
        "train.precision=bf16", "train.preview_every=0", "train.eval_every=0",
    ]  # fmt: skip


def start(flux_data, miniature, run, *more) -> RunFolder:
    train.main(
        ["--config", str(ROOT / "configs/demo.yaml"), *demo_overrides(miniature, run, *flux_data, *more)]
    )
    return RunFolder(run)


def settings_of(run: RunFolder) -> dict:
    return image_recipe(Target(run, 2, "ema", run.config.eval), CPU)


def test_the_guidance_that_is_set_is_told_everywhere(flux_data, miniature, tmp_path, monkeypatch):
    told, forward = [], FluxTransformer2DModel.forward

    def noted(network, *args, guidance=None, **options):
        if not guidance.is_meta:  # of the count of operations
            told.append(set(guidance.tolist()))
        return forward(network, *args, guidance=guidance, **options)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", noted)
    monkeypatch.setattr("evaluation.align.draw_alignment", lambda *_: None)
    digests = []
    for scale, setting in ((3.5, []), (1.25, ["diffusion.guidance=1.25"])):
        run = start(flux_data, miniature, tmp_path / f"run{scale}", *setting)
        trained = len(told)
        evaluate.main(["align", str(run.path), "--no-base", "--timesteps", "500"])
        held_out = len(told)
        evaluate.main(["sample", str(run.path), "eval.num_samples=2"])
        assert 0 < trained < held_out < len(told)
        assert told == [{scale}] * len(told)
        told.clear()
        digests.append(settings_of(run))
    assert [found.pop("guidance") for found in digests] == [3.5, 1.25]


def test_guidance_is_refused_where_the_network_is_told_none(base_of, miniature, tmp_path):
    for name in ("sd15", "chroma", "sana"):
        overrides = [f"model.base={base_of(name)}", "diffusion.guidance=2.0"]
        config = load_config(ROOT / "configs/demo.yaml", demo_overrides(miniature, tmp_path, *overrides))
        with pytest.raises(UserError, match=r"^diffusion\.guidance is for [^\n]* leave it out$"):
            family_for(config)
    family = family_of(base_of("flux"))
    network = FluxTransformer2DModel.from_config(
        dict(family.load_network().config) | {"guidance_embeds": False}
    )
    family.check(network)
    family.guidance = 2.0
    with pytest.raises(UserError, match=r"^diffusion\.guidance = 2, but [^\n]* is told none: leave it out$"):
        family.check(network)


def test_a_run_on_weights_of_8_bits_resumes_exactly_and_exports_lora_alone(
    flux_data, miniature, tmp_path, monkeypatch
):
    pytest.importorskip("torchao")
    quantized = "model.quantize=int8"
    whole = start(flux_data, miniature, tmp_path / "whole", quantized)
    start(flux_data, miniature, tmp_path / "parts", quantized, "train.steps=1")
    parts = start(flux_data, miniature, tmp_path / "parts", quantized, "--allow-change", "train.steps")
    for file in ("trained.safetensors", "ema.safetensors"):
        ours, theirs = (load_file(run.newest_checkpoint() / file) for run in (whole, parts))
        assert all(value.equal(theirs[name]) for name, value in ours.items())
    assert {value.dtype for value in ours.values()} == {torch.float32}
    plain = start(flux_data, miniature, tmp_path / "plain")
    ours, theirs = (
        load_file(run.path / "export/raw/pytorch_lora_weights.safetensors") for run in (whole, plain)
    )
    assert ours.keys() == theirs.keys()
    with pytest.raises(UserError, match=r"^[^\n]*not merged into these: leave --pipeline out[^\n]*$"):
        export.main([str(whole.path), "--pipeline"])
    with pytest.raises(UserError, match=r"computes in bf16: [^\n]*eval\.precision=bf16"):
        evaluate.main(["sample", str(whole.path), "eval.num_samples=2", "eval.precision=fp32"])
    evaluate.main(["sample", str(whole.path), "eval.num_samples=2", "eval.precision=bf16"])
    config = whole.config
    network = build_parts(config).model.backbone
    linear = network.transformer_blocks[0].attn.to_q.base_layer.weight
    assert type(linear).__name__ == "Int8Tensor"


def test_the_plan_counts_weights_in_fewer_bits(base_of, miniature, tmp_path):
    found, kept = {}, {}
    for name in ("none", "int8", "nf4"):
        more = [
            f"model.base={base_of('flux')}",
            "align.taps=auto",
            "model.train=lora",
            "model.lora_targets=auto",
            f"model.quantize={name}",
        ]
        config = load_config(ROOT / "configs/demo.yaml", demo_overrides(miniature, tmp_path, *more))
        model, _ = model_of_shapes(config, torch.bfloat16)
        planned = planned_bytes(config, model, torch.bfloat16, saved=0)
        found[name], kept[name] = planned["weights"], planned["kept for backward"]
        linear = sum(
            m.weight.numel()
            for n, m in model.backbone.named_modules()
            if type(m) is torch.nn.Linear and "lora_" not in n
        )
    assert found["none"] - found["int8"] == linear
    # torchao unpacks a weight in forward, and backward keeps that unless its block is recomputed.
    assert kept == {"none": 0, "int8": 2 * linear, "nf4": 0}
    assert found["int8"] - found["nf4"] == pytest.approx(linear * (1 - 4.127 / 8), rel=1e-3)


@pytest.mark.parametrize(("name", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_one_line_with_its_name(base_of, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    family = family_of(base_of("flux"))
    with pytest.raises(
        UserError, match=rf"^model\.quantize = {name} needs [^\n]*pip install {package}[^\n]*$"
    ):
        family.load_network(torch.bfloat16, name, torch.device("cuda"))
    if name == "nf4":
        with pytest.raises(UserError, match=r"^model\.quantize = nf4 needs a GPU[^\n]*$"):
            family.load_network(torch.bfloat16, name, CPU)


@pytest.mark.parametrize("trained", ["partial", "full"])
def test_weights_that_are_trained_are_not_quantized(trained, miniature, tmp_path):
    more = [f"model.train={trained}", "model.quantize=int8"]
    with pytest.raises(UserError, match=r"model\.quantize = int8 is for model\.train=lora"):
        load_config(ROOT / "configs/demo.yaml", demo_overrides(miniature, tmp_path, *more))
