import pytest
import torch
from conftest import small_model
from diffusers import DDPMScheduler

from cache.text import drop_captions
from loss_sd15 import SD15Loss
from method.alignment import manifold_gram_loss, token_loss
from method.objective import PER_IMAGE, TERMS
from method.paths import NoiseSchedule

ALPHAS_CUMPROD = DDPMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
).alphas_cumprod
SCHEDULE = NoiseSchedule(ALPHAS_CUMPROD)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(loss, latents, own):
    """The noise and timesteps that a loss draws."""
    return torch.randn(latents.shape, generator=own), loss.path.draw(len(latents), latents.device, own)


def evaluate(batch, model=None, *, coeff=None, **knobs):
    latents, _, text, tokens = batch
    loss = SD15Loss(ALPHAS_CUMPROD, **knobs)
    fields = {"prompt_embeds": text}
    return loss(model or small_model(), latents, tokens, fields, generator=generator(), align_coeff=coeff)


def test_terms_add_up_to_the_equation(batch):
    terms = evaluate(batch, align_coeff=0.8, manifold_coeff=3.0)
    assert tuple(terms) == (*TERMS, "cosine/mid", "loss_manifold/mid", *PER_IMAGE)
    torch.testing.assert_close(terms["loss_align"], terms["loss_token"] + 3.0 * terms["loss_manifold"])
    torch.testing.assert_close(terms["loss"], terms["loss_diff"] + 0.8 * terms["loss_align"])


def test_a_scheduled_coefficient_wins_over_the_constructors(batch):
    terms = evaluate(batch, align_coeff=0.8, coeff=0.2)
    torch.testing.assert_close(terms["loss"], terms["loss_diff"] + 0.2 * terms["loss_align"])


def test_diffusion_term_equals_a_hand_written_step(batch):
    latents, _, text, _ = batch
    model = small_model([])
    own = generator()
    noise = torch.randn(latents.shape, generator=own)
    t = torch.randint(1000, (3,), generator=own)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    output = model.backbone(scheduler.add_noise(latents, noise, t), t, text).sample
    expected = {
        ("epsilon", "epsilon"): (output - noise).square().mean(),
        ("v", "v"): (output - scheduler.get_velocity(latents, noise, t)).square().mean(),
        ("v", "epsilon"): (
            (1 / scheduler.alphas_cumprod[t]).clamp(max=5.0).view(-1, 1, 1, 1) * (output - noise).square()
        ).mean(),
    }
    for (prediction, parameterization), value in expected.items():
        terms = evaluate(batch, model, coeff=0, prediction=prediction, parameterization=parameterization)
        torch.testing.assert_close(terms["loss_diff"], value)


def test_alignment_is_the_mean_over_taps(batch):
    latents, _, text, tokens = batch
    model = small_model(["enc_last", "mid", "dec_first"])
    terms = evaluate(batch, model)
    loss = SD15Loss(ALPHAS_CUMPROD)
    noise, t = drawn(loss, latents, generator())
    alpha, sigma = SCHEDULE.at(t)
    model(alpha * latents + sigma * noise, t, text)
    heads = model.get_aligned_tokens().values()
    torch.testing.assert_close(terms["loss_token"], sum(token_loss(x, tokens) for x in heads) / 3)
    torch.testing.assert_close(terms["loss_manifold"], sum(manifold_gram_loss(x, tokens) for x in heads) / 3)


def test_metrics_name_each_tap(batch):
    model = small_model(["enc_last", "mid"])
    terms = evaluate(batch, model)
    cosines = [terms[f"cosine/{tap}"] for tap in ("enc_last", "mid")]
    torch.testing.assert_close(1 - sum(cosines) / 2, terms["loss_token"])
    assert cosines[0] != cosines[1]
    manifolds = [terms[f"loss_manifold/{tap}"] for tap in ("enc_last", "mid")]
    torch.testing.assert_close(sum(manifolds) / 2, terms["loss_manifold"])


def test_the_options_of_the_alignment_reach_it(batch):
    model = small_model()
    for knobs in ({"manifold": "token"}, {"upper_only": True}, {"spatial_norm": 0.5}, {"manifold": "both"}):
        assert evaluate(batch, model, **knobs)["loss_align"] != evaluate(batch, model)["loss_align"], knobs


def test_a_manifold_weight_of_zero_is_zero(batch):
    """`weight or 3.0` would turn the deliberate 0 into 3."""
    terms = evaluate(batch, manifold_coeff=0.0)
    assert terms["loss_manifold"] == 0
    assert terms["loss_align"] == terms["loss_token"]


def test_a_coefficient_of_zero_evaluates_no_head_and_needs_no_tokens(batch):
    latents, timesteps, text, _ = batch
    model = small_model()
    for head in model.heads.values():
        head.register_forward_hook(lambda *_: pytest.fail("a head was evaluated"))
    terms = evaluate((latents, timesteps, text, None), model, coeff=0.0)
    assert terms["loss"] is terms["loss_diff"]
    assert not model.taps.captured


def test_a_measured_zero_trains_as_an_unmeasured_one_bit_for_bit(batch):
    latents, _, text, tokens = batch
    gradients = []
    for measure in (False, True):
        model = small_model()
        loss = SD15Loss(ALPHAS_CUMPROD)
        terms = loss(
            model,
            latents,
            tokens,
            {"prompt_embeds": text},
            generator=generator(),
            align_coeff=0.0,
            measure=measure,
        )
        terms["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert (terms["loss_token"] > 0) == measure
        assert not terms["loss_token"].requires_grad
        assert not model.taps.captured
    assert all(p is None for name, p in gradients[1].items() if name.startswith("heads."))
    unet = [name for name in gradients[0] if name.startswith("backbone.")]
    assert all(gradients[0][name].equal(gradients[1][name]) for name in unet)


def test_alignment_without_tokens_is_an_error(batch):
    latents, timesteps, text, _ = batch
    with pytest.raises(ValueError, match="teacher's tokens"):
        evaluate((latents, timesteps, text, None))


def test_zero_coefficient_trains_as_if_heads_were_absent_bit_for_bit(batch):
    trained = []
    for taps in ((), ("mid",)):
        model = small_model(taps)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            evaluate(batch, model, coeff=0.0)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model.backbone.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_no_graph_outlives_the_loss(batch):
    model = small_model()
    evaluate(batch, model)
    assert not model.taps.captured


def test_same_generator_draws_the_same_noise_and_timesteps(batch):
    latents = batch[0]
    loss = SD15Loss(ALPHAS_CUMPROD)
    (noise_a, t_a), (noise_b, t_b), (noise_c, _) = (drawn(loss, latents, generator(s)) for s in (0, 0, 1))
    assert noise_a.equal(noise_b)
    assert t_a.equal(t_b)
    assert not noise_a.equal(noise_c)
    assert set(drawn(loss, torch.zeros(20000, 1, 1, 1), generator())[1].tolist()) >= {0, 999}


def test_captions_are_dropped_at_the_asked_rate_and_become_the_null_prompt():
    text, null = torch.ones(10_000, 2, 3), torch.full((2, 3), 7.0)

    def drop_captions_of(text, null, *args):
        """The one field of a text that has but one."""
        return drop_captions({"field": text}, {"field": null}, *args)["field"]

    dropped = drop_captions_of(text, null, 0.1, generator())
    share = (dropped == 7).all(-1).all(-1).float().mean()
    assert 0.09 < share < 0.11
    assert ((dropped == 7) | (dropped == 1)).all()
    assert drop_captions_of(text, null, 0.0, generator()).equal(text)
    assert (drop_captions_of(text, null, 1.0, generator()) == 7).all()
