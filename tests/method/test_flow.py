"""Flow matching: its path, how its times are drawn, and every solver that takes it from noise to data."""

import pytest
import torch
from scipy import stats

from method.paths import FlowPath
from method.sampler import guidance_plan, is_flow, sample_latents, set_steps
from models.pipeline_parts import FLOW_SAMPLERS, SAMPLERS

CPU = torch.device("cpu")


def test_x_t_and_the_target_lie_on_the_line_between_data_and_noise():
    x_0, noise = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0.0, 0.25, 1.0])
    x_t, target, weight = FlowPath()(x_0, noise, t)
    for i in range(3):
        torch.testing.assert_close(x_t[i], x_0[i] + t[i] * target[i])
    assert weight.eq(1).all()
    torch.testing.assert_close(x_t[2] - (1 - t[2]) * target[2], noise[2])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_uniform_before_the_shift(shift):
    t = FlowPath(shift=shift).draw(20_000, CPU, torch.Generator().manual_seed(0)).double()
    u = t / (shift - (shift - 1) * t)  # the inverse of the shift
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01
    assert ((t > 0) & (t < 1)).all()


def test_times_are_the_sigmoid_of_a_normal_number():
    path = FlowPath(draw="logit_normal", logit_mean=0.5, logit_std=2.0)
    t = path.draw(20_000, CPU, torch.Generator().manual_seed(0)).double()
    assert stats.kstest(((t.logit() - 0.5) / 2).clamp(-9, 9).numpy(), "norm").pvalue > 0.01


def test_quarters_and_spread_times_go_from_data_to_noise():
    path = FlowPath()
    assert path.quarter(torch.tensor([0.0, 0.3, 0.6, 0.99, 1.0])).tolist() == [0, 1, 2, 3, 3]
    assert path.spread(3).tolist() == [0.25, 0.5, 0.75]
    assert path.times(torch.tensor([0, 500])).tolist() == [0.0, 0.5]


def test_an_unknown_draw_is_refused():
    with pytest.raises(ValueError, match="uniform, logit_normal"):
        FlowPath(draw="cosine")


def scheduler_of(name):
    kind = FLOW_SAMPLERS[name]
    if name in ("euler", "heun"):
        return kind(shift=3.0)
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_every_solver_takes_the_true_velocity_of_a_point_back_to_it(name):
    """Towards one point x_0 the velocity is (x_t − x_0) / t."""
    x_0 = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    seen = []

    def predict(x_t, t, text):
        seen.append(t[0].item())
        return ((x_t - x_0) / t.view(-1, 1, 1, 1)).float()

    text = {"prompt_embeds": torch.zeros(2, 3, 4)}
    solver = scheduler_of(name)
    assert is_flow(solver)
    found = sample_latents(
        predict, solver, text, {"prompt_embeds": torch.zeros(3, 4)}, [0, 1], shape=(4, 4, 4), steps=20
    )
    # DPM-Solver++ and UniPC count their times in whole thousandths, which the velocity near x_0 feels.
    torch.testing.assert_close(
        found, x_0.expand(2, -1, -1, -1), atol=1e-4 if name in ("euler", "heun") else 0.05, rtol=0
    )
    assert seen[0] == pytest.approx(1.0, abs=1e-2)
    assert all(0 < t <= 1 for t in seen)


def test_guidance_acts_where_the_time_is_in_its_interval():
    solver = scheduler_of("euler")
    set_steps(solver, 10, {})
    times = (solver.timesteps / 1000).tolist()
    plan = guidance_plan(solver, 4.0, 0.2, 0.8, "snr")
    assert plan == [0.2 <= t <= 0.8 for t in times]
    assert guidance_plan(solver, 1.0, 0.0, 1.0, "snr") == [False] * 10


def test_schedulers_of_a_ddpm_are_no_flow():
    assert not any(is_flow(kind()) for kind in SAMPLERS.values())
