"""cuDNN's search is on where shapes stay and given back after; compiled code is kept; the average has EMAModel's bits."""

import os

import pytest
import torch
from diffusers.training_utils import EMAModel
from small_runs import stopped_at, train

import train as train_script
from evaluation.sample import ImageSampler
from training.kernels import CACHE, keep_compiled, to_channels_last
from training.state import TrainingState, average_step


def flags():
    """All of torch's flags for kernels that a training might change."""
    cudnn = torch.backends.cudnn
    places = (torch.backends, torch.backends.cuda.matmul, cudnn, cudnn.conv, cudnn.rnn)
    return [cudnn.benchmark, cudnn.deterministic, *(place.fp32_precision for place in places)]


def test_convolutions_are_searched_in_steps_and_samples_and_all_flags_are_given_back(
    miniature, tmp_path, monkeypatch
):
    seen, loss_of, draw = [], train_script.loss_of, ImageSampler.draw

    def loss_and_note(*args):
        seen.append(("step", torch.backends.cudnn.benchmark))
        return loss_of(*args)

    def draw_and_note(sampler, *args):
        decode = sampler.codec.decode
        sampler.codec.decode = lambda x: seen.append(("sample", torch.backends.cudnn.benchmark)) or decode(x)
        return draw(sampler, *args)

    monkeypatch.setattr(train_script, "loss_of", loss_and_note)
    monkeypatch.setattr(ImageSampler, "draw", draw_and_note)
    before = flags()
    assert before[0] is False
    train(miniature, tmp_path / "run", "train.eval_every=6", "eval.num_samples=10")
    assert set(seen) == {("step", True), ("sample", True)}
    assert flags() == before
    stopped_at(3, miniature, tmp_path / "stopped", monkeypatch)
    assert flags() == before
    monkeypatch.setattr(TrainingState, "update", lambda _: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        train(miniature, tmp_path / "broken")
    assert flags() == before


def test_compiled_code_is_kept_where_a_restart_leaves_it_unless_the_user_names_a_place(tmp_path, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(CACHE, str(tmp_path / "mine"))
    keep_compiled()
    assert cache_dir() == str(tmp_path / "mine")
    monkeypatch.delenv(CACHE)
    keep_compiled()
    assert cache_dir() == str(tmp_path / "cache" / "torch" / "inductor")
    monkeypatch.delenv(CACHE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled()
    assert CACHE not in os.environ


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_average_has_the_bits_of_emamodel(layout):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 3, 3), (64, 32, 1, 1), (7, 1, 1, 1), (130, 17, 3, 3)]
    weights = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(memory_format=layout))
        for shape in shapes
    ]
    ours, theirs = (EMAModel(weights, decay=0.9995, foreach=True) for _ in range(2))
    for step in range(40):
        with torch.no_grad():
            for weight in weights:
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
        average_step(ours, weights)
        theirs.step(weights)
        assert ours.optimization_step == theirs.optimization_step == step + 1
        assert ours.cur_decay_value == theirs.cur_decay_value
        for a, b in zip(ours.shadow_params, theirs.shadow_params, strict=True):
            assert torch.equal(a, b), step


def test_channels_last_is_for_2_d_convolutions_and_leaves_3_d_ones_alone():
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv3d(4, 8, 3), torch.nn.Linear(4, 8))
    before = [weight.clone() for weight in network.parameters()]
    to_channels_last(network)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[1].weight.is_contiguous()
    assert all(map(torch.equal, network.parameters(), before))
