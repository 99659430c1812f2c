"""The contract of a backbone, held by every family of the table on a small pipeline of its real classes."""

import diffusers
import pytest
import torch
from loaded import CPU, PROMPTS, prepared, shapes_of, stock_of, text_of
from official import (
    SCALES,
    as_oracle,
    assert_same_arguments,
    call_arguments,
    in_cells,
    laid_out,
    name_of,
    options_of,
    recorded,
)
from peft import PeftModel

import miniature.families
from common.errors import UserError
from export import kohya_weights
from method.sampler import initial_noise, is_flow, sample_latents
from miniature.parts import CELLS
from models.aligned import AlignedModel, family_lora
from models.backbone import Backbone
from models.families.table import FAMILIES, family_of
from models.families.transformer import Transformer, VideoTransformer

# A new family is one line here: the names of its official pipeline's solver that ends at x_0 exactly, or None where its own
# does.
EXACT_SOLVERS = {
    "sd15": "DDIMScheduler",
    "sdxl": None,
    "kolors": None,
    "flux": None,
    "flux2": None,
    "sd3": None,
    "chroma": None,
    "sana": "FlowMatchEulerDiscreteScheduler",
    "pixart": None,
    "hidream": None,
    "auraflow": None,
    "lumina2": None,
    "wan": "FlowMatchEulerDiscreteScheduler",
    "ltxvideo": None,
    "sanavideo": "FlowMatchEulerDiscreteScheduler",
    "kandinsky5_video": None,
}


@pytest.fixture(params=FAMILIES)
def family(request, base_of) -> Backbone:
    return prepared(family_of(base_of(request.param)))


@pytest.fixture
def stock(family):
    return stock_of(family)


def frames_of(family, count: int) -> list[int]:
    """The dimension of time that clips have and images do not."""
    return [count] * isinstance(family, VideoTransformer)


def noise_of(family, count=2, wide=2) -> torch.Tensor:
    """Noise `(n, C, h, wide·h)`, not square: height and width must not be confused."""
    C, *_ = family.latent_shape(shapes_of(family.base))
    h = CELLS // 2 if isinstance(family, Transformer) else CELLS
    return torch.randn(
        count, C, *frames_of(family, 2), h, wide * h, generator=torch.Generator().manual_seed(0)
    )


def taps_of(family) -> tuple[str, ...]:
    return family.measured_taps(shapes_of(family.base))


def model_of(family, taps=(), train="full", **options) -> AlignedModel:
    lora = family_lora(family, 4, 4, next(iter(family.lora_targets)))
    return AlignedModel(family, family.load_network(), taps, 64, train=train, lora=lora, **options).train()


def inputs(family, count=2):
    """x_t `(n, C, h, w)`, timesteps `(n,)` and text of `count` prompts."""
    x_t = noise_of(family, count)
    path = family.path(x_t.shape[1:])
    return x_t, path.spread(count), text_of(family, count)


def exact_scheduler(family, stock):
    """The official scheduler, or one of the same noise that ends at x_0 itself."""
    solver = EXACT_SOLVERS[name_of(family)]
    if solver is None:
        return stock.scheduler
    if solver == "FlowMatchEulerDiscreteScheduler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=family.shift_of(noise_of(family).shape[1:]))
    return getattr(diffusers, solver).from_config(
        stock.scheduler.config, set_alpha_to_one=True, clip_sample=False
    )


def test_every_family_of_the_table_is_tested():
    assert EXACT_SOLVERS.keys() == FAMILIES.keys() == miniature.families.PIPELINES.keys()


def test_a_base_model_is_found_by_its_pipeline(family, stock):
    assert family.base.endswith(name_of(family))
    assert type(stock).__name__ == family.pipeline


@torch.no_grad()
def check_arguments(family, stock):
    """`predict` hands the network what the pipeline's own call does, from prompts and with guidance where there is any.

    So the text and the null prompt are the pipeline's too.
    """
    model = model_of(family, taps_of(family)).eval()
    noise, text, null = noise_of(family), family.encode_text(PROMPTS, CPU), family.null_text(CPU)
    # Where text is as long as the longest prompt of a call, the pipeline's null prompt has a length of its own.
    guidance = 1.0 if family.variable_text else 3.0
    seen, step = [], stock.scheduler.step  # (x_t as the network gets it, t)
    scale = getattr(stock.scheduler, "scale_model_input", lambda x, t: x)

    def noted(output, t, x, *args, **options):
        seen.append((in_cells(family, scale(x, t), noise.shape).clone(), t))
        return step(output, t, x, *args, **options)

    stock.scheduler.step = noted
    try:
        with recorded(getattr(stock, family.part)) as theirs:
            stock(
                prompt=PROMPTS, latents=laid_out(family, noise), num_inference_steps=3, output_type="latent",
                **options_of(family, stock, noise.shape, guidance),
            )  # fmt: skip
    finally:
        stock.scheduler.step = step
    nulls = {name: null[name].expand_as(rows) for name, rows in text.items()}
    both = {name: torch.cat([nulls[name], text[name]]) for name in text}
    with recorded(model.backbone) as ours:
        for x, t in seen:
            t = t.double() / stock.scheduler.config.num_train_timesteps if is_flow(stock.scheduler) else t
            if len(theirs) == len(seen) and rows_of(theirs) == 2 * len(x):  # one forward of both halves
                model.predict(torch.cat([x, x]), t.expand(2 * len(x)), both)
            else:
                model.predict(x, t.expand(len(x)), text)
                if len(theirs) > len(seen):
                    model.predict(x, t.expand(len(x)), nulls)
    assert_same_arguments(ours, theirs)


def rows_of(calls) -> int:
    """The batch of the network's first forward."""
    return next(len(calls[0][name]) for name in ("sample", "hidden_states") if name in calls[0])


def test_predict_hands_the_network_what_the_pipelines_own_call_does(family, stock):
    check_arguments(family, stock)


@torch.no_grad()
def check_oracle(family, stock, x_0):
    noise = noise_of(family)
    text, null = family.encode_text(PROMPTS, CPU), family.null_text(CPU)
    arguments = call_arguments(family, stock, noise, text, null, cfg=1.0)
    stock.scheduler = exact_scheduler(family, stock)
    with as_oracle(stock, family, x_0):
        found = stock(**arguments, num_inference_steps=12, output_type="latent", return_dict=False)[0]
    found = in_cells(family, found, x_0.shape)
    torch.testing.assert_close(found, x_0, atol=1e-3, rtol=1e-3)


def test_the_official_sampler_brings_the_training_target_of_x_0_back_to_x_0(family, stock):
    check_oracle(family, stock, torch.randn_like(noise_of(family)))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_our_sampler_draws_what_the_official_pipeline_does_from_cached_text(family, stock, cfg):
    if cfg > 1 and SCALES.get(name_of(family), "") is None:
        pytest.skip("the pipeline has no guidance by a null prompt")
    check_sampler(family, stock, cfg)


@torch.no_grad()
def check_sampler(family, stock, cfg=1.0):
    seeds, steps = [3, 4], 3
    text, null = family.encode_text(PROMPTS, CPU), family.null_text(CPU)
    shape, sampler = noise_of(family).shape[1:], family.sampler_of("auto")
    stock.scheduler = solver = family.sampling_scheduler(family.own_output, sampler, steps, shape)
    arguments = call_arguments(family, stock, initial_noise(seeds, shape), text, null, cfg)
    theirs = stock(**arguments, num_inference_steps=steps, output_type="latent", return_dict=False)[0]
    theirs = in_cells(family, theirs, (len(seeds), *shape))
    model = model_of(family).eval()
    ours = sample_latents(
        model.predict, solver, text, null, seeds, shape=shape, steps=steps, cfg=cfg, rows=len(seeds),
        spacing=family.spacing(shape, steps, sampler),
    )  # fmt: skip
    if cfg == 1:
        assert ours.equal(theirs)
    # Two forwards of B rows and one of 2B sum in another order, which random weights blow up.
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    pixels = stock(**arguments, num_inference_steps=steps, output_type="np", return_dict=False)[0]
    decoded = (family.load_codec().decode(theirs) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(torch.from_numpy(pixels), decoded, atol=1e-5, rtol=1e-5)


def test_the_fields_of_text_have_the_shapes_that_the_family_gives(family):
    shapes = family.text_shapes(shapes_of(family.base))
    family.prepare_text([*PROMPTS, ""], CPU)
    text, null = family.encode_text(["a photo of a three", ""], CPU), family.null_text(CPU)
    for name in family.variable_text:
        longest, width = text[name].shape[1:]
        assert shapes[name][0] > longest
        shapes[name] = longest, width
    assert {name: tuple(values.shape[1:]) for name, values in text.items()} == shapes
    assert {name: tuple(values.shape) for name, values in null.items()} == shapes
    assert all(values.isfinite().all() for values in (*text.values(), *null.values()))


def test_the_text_of_a_prompt_does_not_depend_on_the_others(family):
    prompts = [*PROMPTS, "a much longer prompt, of many more words than the others have"]
    family.prepare_text(prompts, CPU)
    text = family.encode_text(prompts, CPU)
    for name, row in family.encode_text(PROMPTS[:1], CPU).items():
        torch.testing.assert_close(row[0], text[name][0], atol=1e-5, rtol=1e-5)


def test_predict_is_the_networks_own_output_with_and_without_taps(family, stock):
    x_t, t, text = inputs(family)
    with torch.no_grad():
        expected = own_output(family, stock, x_t, t, text)
        for taps in ((), taps_of(family)):
            model = model_of(family, taps).eval()
            assert model.predict(x_t, t, text, capture=True).equal(expected)
            assert set(model.taps.captured) == set(taps)


def own_output(family, stock, x_t, t, text):
    """Of the stock pipeline's network, whose arguments are checked above."""
    return family.forward(getattr(stock, family.part), x_t, t, as_floats(text))


def as_floats(text):
    return {name: x.float() if x.is_floating_point() else x for name, x in text.items()}


def test_gradient_reaches_every_cell_of_every_tap_whether_the_teachers_grid_is_finer_or_coarser(family):
    x_t, t, text = inputs(family)
    # Each cell by itself: the GroupNorm of conv1x1 would carry gradient to cells that the resizing skips.
    model = model_of(family, taps_of(family), head="linear")
    for grid in ((5, 7), (1, 2), (2, 2)):
        model.predict(x_t, t, text, capture=True)
        features = dict(model.taps.captured)
        for feature in features.values():
            feature.retain_grad()
        tokens = model.get_aligned_tokens(grid)
        for name, x in tokens.items():
            frames = features[name].shape[2:-2].numel()  # 1 of images
            assert x.shape == (2, frames * grid[0] * grid[1], 64)
        generator = torch.Generator().manual_seed(1)
        sum((x * torch.randn(x.shape, generator=generator)).sum() for x in tokens.values()).backward()
        for feature in features.values():
            assert (feature.grad.abs().sum(1) > 0).all()
        model.clear_hooks()


def test_encode_and_decode_are_inverse_in_their_normalisation(family):
    check_codec(family)


def check_codec(family):
    codec = family.load_codec()
    x_0 = torch.randn(2, codec.channels, *frames_of(family, 2), 4, 4)
    z = codec.vae.decode
    seen = []
    codec.vae.decode = lambda value, *rest, **options: seen.append(value) or z(value, *rest, **options)
    codec.decode(x_0)
    torch.testing.assert_close(codec.normalise(codec.to_cells(seen[0])), x_0, atol=1e-4, rtol=1e-4)
    pixels = torch.rand(1, 3, *frames_of(family, codec.frames + 1), 32, 32) * 2 - 1
    mean, std = codec.posterior(pixels)
    assert codec.encode(pixels).equal(codec.normalise(mean))
    moved = codec.normalise(mean + std) - codec.normalise(mean)
    torch.testing.assert_close(codec.normalise_spread(std), moved, atol=1e-5, rtol=1e-4)


def test_what_is_trained_is_named_alike_in_every_family_and_the_network_stays_stock(family, stock):
    for train in ("lora", "partial", "full"):
        names = model_of(family, ("auto",), train).trained_parameters()
        assert {name.split(".")[0] for name in names} == {"backbone", "heads"}
    own = getattr(stock, family.part).state_dict().keys()
    assert model_of(family, taps_of(family), "full").backbone.state_dict().keys() == own


def test_lora_is_loaded_by_the_stock_pipeline_and_changes_its_network_alike(family, stock, tmp_path):
    x_t, t, text = inputs(family)
    with torch.no_grad():
        bare = own_output(family, stock, x_t, t, text)
    for targets in family.lora_targets:
        lora = family_lora(family, 4, 8, targets)
        model = AlignedModel(family, family.load_network(), (), 64, train="lora", lora=lora).eval()
        for parameter in model.trained_parameters().values():
            torch.nn.init.normal_(parameter, std=0.2)
        model.export(tmp_path / targets)
        load_exported(stock, family, tmp_path / targets)
        with torch.no_grad():
            theirs = own_output(family, stock, x_t, t, text)
            torch.testing.assert_close(theirs, model.predict(x_t, t, text))
        assert (theirs - bare).abs().max() > 1e-3
        if family.loads_lora:
            stock.unload_lora_weights()


def test_the_size_of_images_is_that_of_the_latents(family):
    codec, shape = family.load_codec(), family.latent_shape(shapes_of(family.base))
    if isinstance(family, VideoTransformer):
        pytest.skip("the size of clips is chosen by the user")
    side = family.image_size(codec)
    if side > 64:
        pytest.skip("the network's config says no size, and the family's usual one is large")
    x_0 = codec.encode(torch.zeros(1, 3, side, side))
    assert x_0.shape[1:] == shape


def test_a_network_on_meta_has_the_shapes_of_the_loaded_one(family):
    network, known = family.network_of_shapes()
    assert known
    loaded = family.load_network().state_dict()
    assert {name: value.shape for name, value in network.state_dict().items()} == {
        n: v.shape for n, v in loaded.items()
    }
    assert all(value.is_meta for value in network.state_dict().values())


def test_a_name_that_a_family_does_not_have_is_one_line_that_lists_those_it_has(family):
    with pytest.raises(UserError, match=r"align\.taps has 'nowhere': .* has "):
        model_of(family, ["nowhere"])
    with pytest.raises(UserError, match=r"model\.lora_targets = 'nothing'"):
        family_lora(family, 4, 4, "nothing")


def load_exported(stock, family, folder):
    if family.loads_lora:
        stock.load_lora_weights(folder)
    else:
        network = PeftModel.from_pretrained(getattr(stock, family.part), folder)
        setattr(stock, family.part, network.eval())


def test_kohyas_names_of_lora_are_those_that_the_stock_pipeline_reads(family, stock):
    """diffusers' own reader of kohya's files maps the names back."""
    if family.kohya_base is None:
        pytest.skip("kohya's tools do not know this family")
    x_t, t, text = inputs(family)
    for targets in family.lora_targets:
        lora = family_lora(family, 4, 8, targets)
        model = AlignedModel(family, family.load_network(), (), 64, train="lora", lora=lora).eval()
        for parameter in model.trained_parameters().values():
            torch.nn.init.normal_(parameter, std=0.2)
        stock.load_lora_weights(kohya_weights(model, alpha=8.0, dtype=torch.float32))
        with torch.no_grad():
            theirs = own_output(family, stock, x_t, t, text)
            torch.testing.assert_close(theirs, model.predict(x_t, t, text))
        stock.unload_lora_weights()
