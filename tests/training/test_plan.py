"""What --plan says against what is measured or known."""

import re

import pytest
import torch
from conftest import demo_overrides, small_model, thin_model
from small_runs import CONFIG, ROOT, train
from torch.utils.flop_counter import FlopCounterMode

import train as train_script
from common.errors import UserError
from configs.loading import load_config
from training.meter import Meter, peak_of
from training.plan import (
    count_step,
    forward_of,
    model_of_shapes,
    plan_disk,
    plan_memory,
    planned_bytes,
    saved_bytes,
    step_flops,
)
from training.plan_count import StepCost
from training.plan_time import count_work, seconds_by_kind


def test_the_plan_of_config_a_has_the_known_operations_and_sizes(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    train_script.main(["--config", str(ROOT / "configs" / "A.yaml"), f"run={tmp_path}/A", "--plan"])
    said = capsys.readouterr().out
    assert "7,462,912 of the U-Net are trained (lora), 1,312,768 of heads, 859,520,964 are frozen" in said
    assert "48 images: 69.01 TFLOP (804 forward and 633 backward GFLOP an image)" in said
    line = next(line for line in said.splitlines() if line.startswith("  forward GFLOP"))
    parts = {name: float(flops) for name, flops in map(str.split, line.split("GFLOP")[1].split(","))}
    assert sum(parts.values()) == pytest.approx(804.4, abs=0.3)  # each is rounded
    assert (parts["mid_block"], parts["alignment"]) == (12.39, 0.1678)
    card = next(line for line in said.splitlines() if line.startswith("  H100"))
    milliseconds, mfu = (float(re.search(found, card)[1]) for found in (r"about (\d+) ms", r"MFU (\d+)%"))
    assert mfu == pytest.approx(100 * 69.01e12 / (milliseconds / 1e3) / 989e12, abs=0.6)
    assert "HFU" not in card
    assert "no GPU has confirmed" in said
    assert "minutes more before the first step" in said
    assert not (tmp_path / "A").exists()


def test_the_plan_counts_the_state_of_the_optimiser_that_is_chosen(capsys):
    config = load_config(ROOT / "configs" / "A.yaml")
    model, _ = model_of_shapes(config, torch.bfloat16)
    trained = sum(p.numel() for p in model.trained_parameters().values())
    for name, moments in (("adamw", 8), ("adamw8bit", 2.03125)):
        config = load_config(ROOT / "configs" / "A.yaml", [f"optim.name={name}"])
        plan_memory(config, model, torch.bfloat16, saved=0)
        plan_disk(config, model)
        said = capsys.readouterr().out
        # fp32 gradients, masters and moving average, and gradients in bf16
        assert f" {(4 + 4 + 4 + 2 + moments) * trained / 1e9:.3g} gradients, masters, AdamW and EMA" in said
        assert f" {(4 + 4 + moments) * trained / 1e9:.2f} GB each" in said


def test_the_recipe_for_a_small_card_fits_it():
    """With a seventh of it to spare, also where all weights are trained, as its comment says."""
    told = re.findall(r"([\d.]+) GB", (ROOT / "configs" / "small_gpu.yaml").read_text())[1:]
    for more in ([], ["model.train=full", "data.batch_size=12", "optim.accumulate=4"]):
        config = load_config(ROOT / "configs" / "small_gpu.yaml", more)
        model, _ = model_of_shapes(config, torch.bfloat16)
        forward = forward_of(model, (4, 64, 64), (14, 14))
        saved = saved_bytes(lambda forward=forward: forward(1), list(model.parameters()))
        planned = sum(planned_bytes(config, model, torch.bfloat16, saved).values()) / 1e9
        assert planned < 0.85 * 24
        assert f"{planned:.1f}" == told.pop(0)


def small_forward(train, checkpointing=False):
    """A thin network that keeps attention's N×N matrix to itself, as on a GPU."""
    model = thin_model(train).to("meta")
    if checkpointing:
        model.checkpoint()
    inputs = [(4, 16, 16), (), (5, 32)]

    def forward(batch):
        latents, t, text = (torch.ones(batch, *shape, device="meta") for shape in inputs)
        return model(latents, t.long(), text).square().mean()

    return forward


@pytest.mark.parametrize("train", ["lora", pytest.param("full", marks=pytest.mark.thorough)])
def test_the_kinds_of_work_are_all_operations_and_those_that_checkpointing_repeats(train):
    plain = count_step(small_forward(train))
    repeated = count_step(small_forward(train, checkpointing=True))
    again = (repeated.flops - plain.flops) / plain.forward
    work = count_work(small_forward(train), again)
    operations = sum(count for kind, count in work.items() if kind != "the rest")
    assert operations == pytest.approx(repeated.flops, rel=1e-6)
    assert work["convolutions"] > 0
    assert work["the rest"] > 0
    assert again > 0.3


def test_attention_counts_with_its_padding_and_views_move_nothing():
    query = torch.ones(1, 2, 16, 40, device="meta", requires_grad=True)  # heads of 40 are filled up to 64

    def forward(_batch):
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, query, query)[0]
        return found.transpose(1, 2).exp().sum()

    with FlopCounterMode(display=False) as counter:
        forward(1).backward()
    work = count_work(forward)
    assert work["attention"] == pytest.approx(counter.get_total_flops() * 64 / 40)
    assert work.keys() == {"attention", "the rest"}
    entries = query.numel()
    # exp: one read, one written; its backward: two and one; sum, and the sum of three gradients of query.
    assert 5 * 4 * entries <= work["the rest"] <= 16 * 4 * entries


def test_the_time_of_a_step_is_what_its_work_takes_at_the_rates_of_a_card():
    work = {"convolutions": 2e12, "attention": 1e12, "the rest": 4e9}
    found = seconds_by_kind(work, 3, 10**9, peak=100e12, bandwidth=1e12, compiled=False)
    assert found == pytest.approx(
        {
            "convolutions": 6e12 / 50e12,
            "linear layers": 0.0,
            "attention": 3e12 / 35e12,
            "the rest": 12e9 / 0.8e12,
            "update": 64e9 / 0.8e12,
        }
    )
    fused = seconds_by_kind(work, 3, 10**9, peak=100e12, bandwidth=1e12, compiled=True)
    assert fused["the rest"] == found["the rest"] / 2


def test_the_measured_step_stands_beside_the_plan(miniature, tmp_path, capsys):
    run = train(miniature, tmp_path / "run", "train.steps=4", "train.log_every=1")
    rates = sorted(line["it_per_s"] for line in run.metrics()[1:])
    capsys.readouterr()
    arguments = demo_overrides(miniature, tmp_path / "run", "train.steps=4", "train.log_every=1")
    train_script.main(["--config", str(CONFIG), *arguments, "--plan"])
    said = capsys.readouterr().out
    assert f"{1e3 / rates[1]:.0f} ms a step, {rates[1]:.2f} it/s" in said
    assert "3 lines of its log" in said


def test_frozen_early_blocks_do_no_autograd_work():
    """The plan's LoRA backward is 79 % of a forward, not 200 %: nothing before down_blocks.3 is entered."""
    config = load_config(ROOT / "configs" / "A.yaml")
    model, _ = model_of_shapes(config, torch.bfloat16)
    touched = {}
    for name, block in model.backbone.named_children():
        blocks = block if name in ("down_blocks", "up_blocks") else [block]
        for i, part in enumerate(blocks):

            def note(_module, _args, output, name=f"{name}.{i}"):
                first = output[0] if isinstance(output, tuple) else output
                touched[name] = first.requires_grad

            part.register_forward_hook(note)
    cost = count_step(forward_of(model, (4, 64, 64), (14, 14)))
    assert [name for name, grad in touched.items() if grad] == [
        "down_blocks.3", "mid_block.0", "up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3", "conv_norm_out.0",
        "conv_act.0", "conv_out.0",
    ]  # fmt: skip
    assert cost.backward / cost.forward == pytest.approx(0.787, abs=0.01)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_bytes_on_shapes_are_what_autograd_keeps(train, checkpointing):
    found = [kept_by(device, train, checkpointing) for device in ("meta", "cpu")]
    assert found[0] == pytest.approx(found[1], rel=0.05)


def kept_by(device, train, checkpointing):
    model = small_model(train=train).to(device)
    if checkpointing:
        model.checkpoint()
    with torch.device(device):
        inputs = torch.ones(2, 4, 16, 16), torch.zeros(2, dtype=torch.long), torch.ones(2, 5, 32)
        return saved_bytes(lambda: model(*inputs).square().mean(), list(model.parameters()))


def test_saved_bytes_leave_weights_out_and_count_each_storage_once():
    first, second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
    x = torch.ones(3, 8)

    def forward():
        hidden = first(x).exp()  # keeps its result, which the second layer keeps too
        return second(hidden).sum()

    weights = [*first.parameters(), *second.parameters()]
    assert saved_bytes(forward, weights) == 4 * (3 * 8 + 3 * 16)


def test_operations_are_counted_per_image():
    layer = torch.nn.Linear(8, 4, bias=False, device="meta")
    cost = count_step(lambda n: layer(torch.empty(n, 8, device="meta")).sum(), batch=3)
    assert (cost.forward, cost.backward) == (2 * 8 * 4, 2 * 8 * 4)


def test_a_plan_needs_no_cache_and_says_what_is_missing(miniature, tmp_path, capsys):
    overrides = demo_overrides(miniature, tmp_path / "run", f"data.latents={tmp_path}/none")
    train_script.main(["--config", str(CONFIG), *overrides, "--plan"])
    said = capsys.readouterr().out
    assert f"{tmp_path}/none is not there yet: script 2 makes it" in said
    assert "120 images" in said or "60 images" in said
    with pytest.raises(UserError, match="nowhere does not exist"):
        train_script.main(["--config", str(CONFIG), *overrides, "model.base=nowhere", "--plan"])


def test_a_meter_reads_rates_since_the_last_reading(monkeypatch):
    clock = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr("training.meter.time.perf_counter", lambda: next(clock))
    stream = type("Stream", (), {"waited": 5.0})()
    meter = Meter(3e12, 48, torch.device("cpu"), stream)
    for _ in range(4):
        meter.step()
    stream.waited = 5.5
    assert meter.read() == {"it_per_s": 2, "images_per_s": 96, "tflop_per_s": 6, "data_wait": 0.25}
    meter.step()
    assert meter.read()["it_per_s"] == 1


def test_what_checkpointing_computes_again_counts_for_the_hardware_alone(miniature, tmp_path, monkeypatch):
    """HFU against MFU: 29 % more with checkpointing on SD-1.5, for no result."""
    plain, again = (
        step_flops(
            load_config(
                CONFIG, demo_overrides(miniature, tmp_path / "run", f"model.gradient_checkpointing={on}")
            )
        )
        for on in ("false", "true")
    )
    assert plain[0] == plain[1] == again[0]
    assert again[1] > 1.1 * again[0]
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("training.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(3e12, 1, torch.device("cpu"), type("Stream", (), {"waited": 0.0})(), done=4e12)
    meter.peak = 10e12
    meter.step()
    line = meter.read()
    assert (line["mfu"], line["hfu"], line["tflop_per_s"]) == (0.15, 0.2, 2)


def test_operations_are_counted_anew_for_another_model_and_not_for_another_schedule(
    miniature, tmp_path, monkeypatch
):
    counted = []
    monkeypatch.setattr("training.plan._COUNTED", {})
    monkeypatch.setattr(
        "training.plan.count_step", lambda forward: counted.append(forward) or StepCost(1, 1, {})
    )
    for times, *more in (
        (1, "align.coeff=0.8"), (1, "align.coeff=0.5", "align.warmup_steps=2", "align.manifold_coeff=0"),
        (2, "align.coeff=0"), (3, "align.taps=[enc_last,mid]"), (4, "align.head=mlp"), (5, "model.train=lora"),
        (6, "align.head=mlp", "align.head_hidden=8"), (7, "teacher.grid=5"),
    ):  # fmt: skip
        step_flops(load_config(CONFIG, demo_overrides(miniature, tmp_path / "run", *more)))
        assert len(counted) == times, more


def test_a_paused_meter_counts_no_time(monkeypatch):
    clock = iter([0.0, 1.0, 7.0, 8.0])
    monkeypatch.setattr("training.meter.time.perf_counter", lambda: next(clock))
    stream = type("Stream", (), {"waited": 0.0})()
    meter = Meter(1.0, 1, torch.device("cpu"), stream)
    meter.step()
    with meter.paused():
        stream.waited = 3.0
    meter.step()
    stream.waited = 3.5
    line = meter.read()
    assert (line["it_per_s"], line["data_wait"]) == (1, 0.25)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
     ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12), ("NVIDIA B200", 2250e12),
     ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla T4", None)],
)  # fmt: skip
def test_peaks_are_known_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(torch.device("cuda")) == peak


def test_the_plan_counts_the_text_where_it_will_be(miniature, tmp_path, capsys):
    overrides = demo_overrides(miniature, tmp_path / "run")
    for setting, says in (
        ("auto", f"{11 * 77 * 32 * 4 / 1e9:.3g} GB on each device, of all prompts"),
        ("false", f"{5 * 77 * 32 * 4 / 1e9:.3g} GB on each device, read with each batch, 5 kB an image"),
    ):
        command = ["--config", str(CONFIG), *overrides, f"data.text_on_device={setting}", "--plan"]
        train_script.main(command)
        assert says in capsys.readouterr().out
