import pytest
import torch
from diffusers import DDPMScheduler

from method.paths import DiffusionPath, NoiseSchedule, error_weight, velocity

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 1, 300, 998, 999])
SCHEDULE = NoiseSchedule(DDPMScheduler(**SD15).alphas_cumprod)


# The algebra of the three spaces, which the weights of the loss are derived from.
def add_noise(x_0, noise, alpha, sigma):
    return alpha * x_0 + sigma * noise


def epsilon_from_v(v, x_t, alpha, sigma):
    return alpha * v + sigma * x_t


def v_from_epsilon(epsilon, x_t, alpha, sigma):
    return (epsilon - sigma * x_t) / alpha


def x_0_from_v(v, x_t, alpha, sigma):
    return alpha * x_t - sigma * v


def x_0_from_epsilon(epsilon, x_t, alpha, sigma):
    return (x_t - sigma * epsilon) / alpha


@pytest.fixture
def process():
    scheduler = DDPMScheduler(**SD15)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    return scheduler, x_0, noise, *NoiseSchedule(scheduler.alphas_cumprod).at(T)


def test_noising_and_velocity_equal_diffusers(process):
    scheduler, x_0, noise, alpha, sigma = process
    torch.testing.assert_close(add_noise(x_0, noise, alpha, sigma), scheduler.add_noise(x_0, noise, T))
    torch.testing.assert_close(velocity(x_0, noise, alpha, sigma), scheduler.get_velocity(x_0, noise, T))


def test_conversions_between_epsilon_v_and_x0_invert_each_other(process):
    _, x_0, noise, alpha, sigma = process
    x_t, v = add_noise(x_0, noise, alpha, sigma), velocity(x_0, noise, alpha, sigma)
    close = {"rtol": 1e-3, "atol": 1e-3}  # fp32, divided by α = 0.07 at the noisy end
    torch.testing.assert_close(epsilon_from_v(v, x_t, alpha, sigma), noise, **close)
    torch.testing.assert_close(v_from_epsilon(noise, x_t, alpha, sigma), v, **close)
    torch.testing.assert_close(x_0_from_v(v, x_t, alpha, sigma), x_0, **close)
    torch.testing.assert_close(x_0_from_epsilon(noise, x_t, alpha, sigma), x_0, **close)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x0_equals_what_ddpm_scheduler_predicts(process, prediction_type):
    _, x_0, noise, alpha, sigma = process
    scheduler = DDPMScheduler(**SD15, prediction_type=prediction_type, clip_sample=False)
    output = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    x_t = add_noise(x_0, noise, alpha, sigma)
    ours = (x_0_from_v if prediction_type == "v_prediction" else x_0_from_epsilon)(output, x_t, alpha, sigma)
    for i, t in enumerate(T):
        theirs = scheduler.step(output[i], t, x_t[i]).pred_original_sample
        torch.testing.assert_close(ours[i], theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("prediction", "parameterization"), [("v", "epsilon"), ("epsilon", "v")])
def test_error_weight_equals_converting_the_output_first(process, prediction, parameterization):
    _, x_0, noise, alpha, sigma = (tensor if i == 0 else tensor.double() for i, tensor in enumerate(process))
    x_t, v = add_noise(x_0, noise, alpha, sigma), velocity(x_0, noise, alpha, sigma)
    output = torch.randn(x_0.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    if prediction == "v":
        converted, own_error = v_from_epsilon(output, x_t, alpha, sigma) - v, output - noise
    else:
        converted, own_error = epsilon_from_v(output, x_t, alpha, sigma) - noise, output - v
    weight = error_weight(prediction, parameterization, alpha, v_weight_max=1e9)
    torch.testing.assert_close(weight * own_error.square(), converted.square(), rtol=1e-4, atol=1e-4)


def test_error_weight_is_clipped_only_where_it_would_explode(process):
    alpha = process[3]
    weight = error_weight("v", "epsilon", alpha, v_weight_max=5.0).flatten()
    assert weight[-1] == 5.0
    assert weight[0] == pytest.approx(alpha[0].item() ** -2)
    assert (error_weight("v", "v", alpha, 5.0) == 1).all()


def test_error_weight_refuses_an_unknown_space():
    with pytest.raises(ValueError, match="epsilon"):
        error_weight("x0", "epsilon", torch.ones(1), 5.0)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_min_snr_is_the_clipped_error_of_x_0_for_either_network(gamma, prediction):
    """min(SNR, γ) |x_0 − x̂_0|², from x̂_0 of what the network put out."""
    x_0, noise, other = (
        torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    t = torch.tensor([0, 50, 300, 600, 900, 999])
    alpha, sigma = (value.double() for value in SCHEDULE.at(t))
    x_0, noise, other = x_0.double(), noise.double(), other.double()
    x_t = add_noise(x_0, noise, alpha, sigma)
    weight = (alpha / sigma).square().clamp(max=gamma)  # min(SNR, γ)
    outputs = {
        "epsilon": (other, noise, x_0_from_epsilon(other, x_t, alpha, sigma)),
        "v": (other, velocity(x_0, noise, alpha, sigma), x_0_from_v(other, x_t, alpha, sigma)),
    }
    for parameterization, (output, target, estimate) in outputs.items():
        ours = error_weight(prediction, parameterization, alpha, 5.0, gamma) * (output - target).square()
        torch.testing.assert_close(ours, weight * (x_0 - estimate).square(), rtol=1e-4, atol=1e-9)


def test_min_snr_weights_are_the_published_ones_and_survive_zero_terminal_snr():
    alpha = torch.tensor([0.999, 0.7, 0.1, 1e-4, 0.0], dtype=torch.float64)
    snr = alpha**2 / (1 - alpha**2)
    clipped = snr.clamp(max=5.0)
    torch.testing.assert_close(error_weight("v", "v", alpha, 5.0, 5.0), clipped / (snr + 1))
    published = torch.where(snr > 0, clipped / snr, 1.0)  # min(SNR, γ) / SNR is 1 below γ
    torch.testing.assert_close(error_weight("v", "epsilon", alpha, 5.0, 5.0), published)


def test_v_and_epsilon_losses_agree_where_theory_says_so():
    """A v-network and the ε-network that says the same: equal x_t, converted outputs, equal losses in either space."""
    x_0, noise, v = (
        torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(i)).double() for i in range(3)
    )
    t = torch.tensor([0, 100, 300, 500, 640])  # 1/α² stays below the ceiling
    alpha, sigma = (value.double() for value in SCHEDULE.at(t))
    x_t = add_noise(x_0, noise, alpha, sigma)
    epsilon = epsilon_from_v(v, x_t, alpha, sigma)
    error = {"v": (v - velocity(x_0, noise, alpha, sigma)).square(), "epsilon": (epsilon - noise).square()}
    for prediction in ("v", "epsilon"):
        losses = [error_weight(prediction, net, alpha, 100.0) * error[net] for net in ("v", "epsilon")]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-9)
    losses = [error_weight("v", net, alpha, 100.0, 5.0) * error[net] for net in ("v", "epsilon")]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-9)


def test_the_ceiling_lowers_the_loss_of_an_epsilon_network_where_noise_prevails():
    alpha, _ = SCHEDULE.at(torch.tensor([400, 999]))
    below, above = error_weight("v", "epsilon", alpha, 5.0).flatten()
    assert below == pytest.approx(1 / alpha[0].item() ** 2)
    assert above == 5.0 < 1 / alpha[1].item() ** 2


@pytest.mark.parametrize("output", ["epsilon", "v"])
def test_a_path_gives_what_a_step_needs(process, output):
    scheduler, x_0, noise, alpha, _ = process
    path = DiffusionPath(scheduler.alphas_cumprod, output=output, prediction="v")
    x_t, target, weight = path(x_0, noise, T)
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, noise, T))
    expected = noise if output == "epsilon" else scheduler.get_velocity(x_0, noise, T)
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(weight, error_weight("v", output, alpha, 5.0))
    drawn = path.draw(20_000, x_0.device, torch.Generator().manual_seed(0))
    assert (drawn.min(), drawn.max()) == (0, 999)
    assert path.quarter(torch.tensor([0, 249, 250, 999])).tolist() == [0, 0, 1, 3]
    assert path.spread(3).tolist() == [249, 499, 749]
