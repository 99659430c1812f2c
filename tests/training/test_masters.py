"""bf16 with fp32 masters, accumulated gradients, and what must not happen between two lines of the log."""

import pytest
import torch
from conftest import demo_overrides, small_model
from small_runs import CONFIG, FILES, assert_same_run, stopped_at, tensors, train

import train as train_script
from configs.loading import load_config
from training.masters import Masters
from training.meter import Means
from training.parts import build_parts
from training.ranks import Ranks
from training.state import TrainingState


def config(miniature, run, *more):
    return load_config(CONFIG, demo_overrides(miniature, run, *more))


def resumes_exactly(miniature, tmp_path, monkeypatch, *knobs):
    """Whether a run that was stopped equals an unbroken one, which is returned."""
    whole = train(miniature, tmp_path / "whole", *knobs)
    stopped_at(3, miniature, tmp_path / "run", monkeypatch, *knobs)
    assert_same_run(train(miniature, tmp_path / "run", *knobs), whole)
    return whole


def test_in_fp32_masters_are_the_weights_themselves():
    model = small_model()
    masters = Masters(model, torch.float32)
    assert all(masters.parameters[name] is p for name, p in model.trained_parameters().items())


@pytest.mark.parametrize("mode", ["lora", "partial"])
def test_in_bf16_all_weights_are_bf16_and_what_is_trained_has_an_exact_copy(mode):
    model = small_model(train=mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = Masters(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert masters.parameters.keys() == model.trained_parameters().keys()
    assert all(
        torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in masters.parameters.items()
    )


def test_updates_too_small_for_bf16_add_up_in_the_masters():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.trained_parameters = lambda: dict(layer.named_parameters())
    torch.nn.init.ones_(layer.weight)
    masters = Masters(layer, torch.bfloat16)
    for _ in range(100):
        masters.parameters["weight"].data += 1e-4  # bf16 knows nothing between 1 and 1.0078
        masters.publish()
    assert layer.weight.item() == pytest.approx(1.01, abs=0.004)


def test_gradients_are_added_up_in_fp32():
    layer = torch.nn.Linear(3, 2, bias=False)
    layer.trained_parameters = lambda: dict(layer.named_parameters())
    masters = Masters(layer, torch.bfloat16)
    gradients = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        masters.collect()
        assert layer.weight.grad is None
    assert torch.equal(masters.parameters["weight"].grad, sum(g.float() for g in gradients))


def test_bf16_gradients_point_where_fp32_ones_do(batch):
    latents, timesteps, text, tokens = batch
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model()
        masters = Masters(model, dtype)
        out = model(latents, timesteps, text)
        (
            out.float().square().mean() + (model.get_aligned_tokens()["mid"] - tokens).square().sum(-1).mean()
        ).backward()
        masters.collect()
        found.append(torch.cat([p.grad.flatten() for p in masters.parameters.values()]))
    assert found[1].dtype == torch.float32
    assert torch.cosine_similarity(*found, dim=0) > 0.999
    assert found[1].norm() / found[0].norm() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("mode", [pytest.param("lora", marks=pytest.mark.thorough), "full"])
def test_a_bf16_run_resumes_exactly_and_keeps_fp32_checkpoints(miniature, tmp_path, monkeypatch, mode):
    knobs = ["train.precision=bf16", f"model.train={mode}", "model.lora_rank=4"]
    whole = resumes_exactly(miniature, tmp_path, monkeypatch, *knobs)
    for file in FILES:
        assert {t.dtype for t in tensors(whole, 6, file).values()} == {torch.float32}
    exported = tensors(whole, 6, FILES[1])
    assert any((t.bfloat16().float() != t).any() for t in exported.values())


def test_channels_last_changes_the_layout_and_not_the_mathematics(miniature, tmp_path):
    steps = ["train.steps=2", "train.checkpoint_every=2"]
    plain = train(miniature, tmp_path / "plain", *steps)
    last = train(miniature, tmp_path / "last", *steps, "train.channels_last=true")
    found = tensors(last, 2)
    for name, value in tensors(plain, 2).items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=5e-4)
    parts = build_parts(config(miniature, tmp_path / "x", "train.channels_last=true"))
    assert parts.model.backbone.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_channels_last_run_resumes_exactly(miniature, tmp_path, monkeypatch):
    resumes_exactly(miniature, tmp_path, monkeypatch, "train.channels_last=true")


def state_of(miniature, tmp_path, *more):
    parts = build_parts(config(miniature, tmp_path / "run", *more))
    return parts, TrainingState(parts.config, parts.masters, parts.coefficient, Ranks(cpu=True), {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulated_halves_make_the_gradient_of_the_whole(miniature, tmp_path, batch, precision):
    latents, text = torch.randn(4, 4, 16, 16), torch.randn(4, 5, 32)
    timesteps = torch.tensor([1, 300, 600, 900])
    found = []
    for parts_of_step in (1, 2):
        parts, state = state_of(
            miniature,
            tmp_path,
            f"optim.accumulate={parts_of_step}",
            f"train.precision={precision}",
            "align.coeff=0",
        )
        for some in torch.arange(4).chunk(parts_of_step):
            output = parts.model.predict(latents[some], timesteps[some], {"prompt_embeds": text[some]})
            errors = output.float().square().flatten(1).mean(1)
            state.backward({"loss": errors.mean()}, some.tolist(), errors)
        found.append(torch.cat([p.grad.flatten() for p in state.parameters.values()]))
    close = {"fp32": 1e-4, "bf16": 2e-2}[precision]
    assert (found[0] - found[1]).norm() < close * found[0].norm()


def test_means_are_weighted_and_leave_out_what_had_no_weight():
    means = Means()
    means.add([("loss", torch.tensor(1.0), 1.0)])
    means.add([("loss", torch.tensor(2.0), 1.0)])
    means.add([("loss", torch.tensor(6.0), 1.0), ("late", torch.tensor(5.0), 1.0)], torch.tensor(False))
    means.add([("loss", torch.tensor(float("nan")), 1.0)], torch.tensor(True))
    means.add([("by", torch.tensor([6.0, 0.0]), torch.tensor([3, 0]))])
    again = Means()
    again.load_state_dict(means.state_dict(), torch.device("cpu"))
    others = Means()
    others.load_state_dict(means.state_dict(), torch.device("cpu"), zero=True)
    assert means.read() == again.read() == {"loss": 3.0, "late": 5.0, "by/1": 2.0}
    assert others.read() == means.read() == {}


def test_nothing_waits_for_the_device_between_two_lines_of_the_log(miniature, tmp_path, monkeypatch):
    """Each of these would make the host wait for a GPU; on a CPU they are only counted."""
    waits = []
    for name in (
        "item",
        "tolist",
        "__bool__",
        "__float__",
        "__int__",
        "numpy",
        "cpu",
        "nonzero",
        "__index__",
    ):
        method = getattr(torch.Tensor, name)

        def waiting(tensor, *args, _method=method, _name=name, **kwargs):
            if counting[0] and tensor.device.type == "cpu" and in_step[0]:
                waits.append(_name)
            return _method(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, waiting)
    counting, in_step = [False], [False]
    update, loss_of = TrainingState.update, train_script.loss_of

    def loss_and_count(*args):
        in_step[0] = counting[0] = True
        return loss_of(*args)

    def update_and_stop_counting(state):
        update(state)
        in_step[0] = False

    monkeypatch.setattr(train_script, "loss_of", loss_and_count)
    monkeypatch.setattr(TrainingState, "update", update_and_stop_counting)
    # AdamW and the moving average look at numbers that live on the host; EMAModel and clip_grad_norm_ look at no tensor.
    train(miniature, tmp_path / "run", "data.read_threads=0")
    assert waits == []
