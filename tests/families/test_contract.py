"""The contract of a backbone, held by every family of the table on a small pipeline of its real classes."""

import inspect
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cache.dataset import latents_of
from common.errors import UserError
from configs.loading import load_config
from models.aligned import AlignedModel, family_lora
from models.backbone import Backbone
from models.families.table import FAMILIES, family_of

# Where the fixture `miniature` keeps the small pipeline of each family: a new family is one line here.
PIPELINES = {"sd15": "models/sd15-mini"}
CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]


@pytest.fixture(params=FAMILIES)
def family(request, miniature) -> Backbone:
    return family_of(str(miniature / PIPELINES[request.param]))


@pytest.fixture
def stock(family):
    """The family's own pipeline of diffusers."""
    pipeline = family.pipeline_class.from_pretrained(family.base, **family.load_options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def model_of(family, taps=(), train="full", **options) -> AlignedModel:
    lora = family_lora(family, 4, 4, next(iter(family.lora_targets)))
    return AlignedModel(family, family.load_network(), taps, 64, train=train, lora=lora, **options).train()


def inputs(family, count=2):
    """x_t `(n, C, h, w)`, timesteps `(n,)` and text of `count` prompts."""
    shape = family.latent_shape(family.load_network())
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(count, *shape, generator=generator)
    prompts = [f"a photo of a {i}" for i in range(count)]
    return x_t, torch.arange(count) * 400 + 50, family.encode_text(prompts, CPU)


def test_every_family_of_the_table_is_tested():
    assert PIPELINES.keys() == FAMILIES.keys()


def test_a_base_model_is_found_by_its_pipeline(family, stock):
    name = next(name for name, path in PIPELINES.items() if family.base.endswith(path))
    assert type(family) is FAMILIES[name]
    assert type(stock).__name__ == family.pipeline


def test_every_family_has_a_config_to_start_from():
    for name, family in FAMILIES.items():
        config = load_config(ROOT / "configs" / "families" / f"{name}.yaml")
        assert type(family_of(config.model.base)) is family
        assert set(config.align.taps) <= set(family.taps)
        assert config.model.lora_targets in family.lora_targets


def test_the_usual_base_models_need_no_hub():
    for name, family in FAMILIES.items():
        assert type(family_of(family.default_base)) is FAMILIES[name]


def test_the_fields_of_text_have_the_shapes_that_the_family_gives(family):
    fields, shapes = (
        family.encode_text(["a photo of a three", ""], CPU),
        family.text_shapes(family.load_network()),
    )
    assert {name: tuple(values.shape[1:]) for name, values in fields.items()} == shapes


@torch.no_grad()
def test_predict_hands_the_network_what_the_pipelines_own_call_does(family, stock):
    """From prompts, with guidance: so the text and the null prompt are the pipeline's too."""
    model = model_of(family, family.taps).eval()
    x_t, _, text = inputs(family)
    seen = []  # by the pipeline's scheduler: (x_t, t)
    step = stock.scheduler.step
    stock.scheduler.step = lambda output, t, x, *a, **k: (
        seen.append((x.clone(), t)) or step(output, t, x, *a, **k)
    )
    prompts = [f"a photo of a {i}" for i in range(len(x_t))]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    with recorded(getattr(stock, family.part)) as theirs:
        stock(prompts, latents=x_t, **options)
    null = {
        name: rows.expand(len(x_t), *rows.shape[1:]) for name, rows in family.encode_text([""], CPU).items()
    }
    both = {name: torch.cat([null[name], text[name]]) for name in text}
    with recorded(model.backbone) as ours:
        for x, t in seen:
            model.predict(torch.cat([x, x]), t.expand(2 * len(x)), both)
    assert len(ours) == len(theirs) == 2
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            # A pipeline hands over one timestep for all rows, and text that was never stored in fp16.
            torch.testing.assert_close(
                mine[name], value.expand(mine[name].shape), atol=1e-3, rtol=1e-3, msg=name
            )


def tensors_in(arguments, above=""):
    """(name, tensor) of arguments, those inside of dicts too: SDXL's conditions are one."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield f"{above}{name}", value.clone()
        elif isinstance(value, dict):
            yield from tensors_in(value, f"{above}{name}.")


@contextmanager
def recorded(network):
    """The tensors of each forward by the names of their arguments."""
    calls, names = [], inspect.signature(network.forward)

    def note(_, args, kwargs):
        calls.append(dict(tensors_in(names.bind(*args, **kwargs).arguments)))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    hook.remove()


def test_predict_is_the_networks_own_output_with_and_without_taps(family, stock):
    x_t, t, text = inputs(family)
    with torch.no_grad():
        expected = own_output(family, stock, x_t, t, text)
        for taps in ((), family.taps):
            model = model_of(family, taps).eval()
            assert model.predict(x_t, t, text, capture=True).equal(expected)
            assert set(model.taps.captured) == set(taps)


def own_output(family, stock, x_t, t, text):
    """Of the stock pipeline's network, whose arguments are checked above."""
    return family.forward(getattr(stock, family.part), x_t, t, {name: x.float() for name, x in text.items()})


def test_gradient_reaches_every_cell_of_every_tap_whether_the_teachers_grid_is_finer_or_coarser(family):
    x_t, t, text = inputs(family)
    # Each cell by itself: the GroupNorm of conv1x1 would carry gradient to cells that the resizing skips.
    model = model_of(family, family.taps, head="linear")
    for grid in ((5, 7), (1, 2), (2, 2)):
        model.predict(x_t, t, text, capture=True)
        features = dict(model.taps.captured)
        for feature in features.values():
            feature.retain_grad()
        tokens = model.get_aligned_tokens(grid)
        assert all(x.shape == (2, grid[0] * grid[1], 64) for x in tokens.values())
        generator = torch.Generator().manual_seed(1)
        sum((x * torch.randn(x.shape, generator=generator)).sum() for x in tokens.values()).backward()
        for feature in features.values():
            assert (feature.grad.abs().sum(1) > 0).all()
        model.clear_hooks()


def test_encode_and_decode_are_inverse_in_their_normalisation(family):
    codec = family.load_codec()
    x_0 = torch.randn(2, codec.channels, 4, 4)
    z = codec.vae.decode
    seen = []
    codec.vae.decode = lambda value, **options: seen.append(value) or z(value, **options)
    codec.decode(x_0)
    torch.testing.assert_close(codec.normalise(seen[0]), x_0)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = codec.posterior(pixels)
    assert codec.encode(pixels).equal(codec.normalise(mean))
    moved = codec.normalise(mean + std) - codec.normalise(mean)
    torch.testing.assert_close(codec.normalise_spread(std), moved, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "normalisation",
    [
        {},
        {"shift_factor": 0.3, "scaling_factor": 0.4},
        {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
def test_a_codec_shifts_and_scales_by_its_config(miniature, normalisation):
    codec_class = type(family_of(str(miniature / "models/sd15-mini")).load_codec())
    vae = family_of(str(miniature / "models/sd15-mini")).load("vae")
    vae.register_to_config(**normalisation)
    codec = codec_class(vae)
    z = torch.randn(2, 4, 3, 3)
    wide = lambda name, default: torch.tensor(normalisation.get(name, default)).view(1, -1, 1, 1)  # noqa: E731
    mean = wide("latents_mean", [normalisation.get("shift_factor", 0.0)])
    expected = (z - mean) * vae.config.scaling_factor / wide("latents_std", [1.0])
    torch.testing.assert_close(codec.normalise(z), expected)
    # A cache of the VAE's own z is normalised when it is read.
    unscaled = {"posterior": "mode", "scaled": False} | codec.normalisation
    torch.testing.assert_close(latents_of(z, unscaled), expected)
    spread = torch.rand(2, 4, 3, 3)
    drawn = latents_of(
        torch.cat([z, spread], 1), unscaled | {"posterior": "moments"}, torch.Generator().manual_seed(1)
    )
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, expected + codec.normalise_spread(spread) * noise)


def test_what_is_trained_is_named_alike_in_every_family_and_the_network_stays_stock(family, stock):
    for train in ("lora", "partial", "full"):
        names = model_of(family, family.taps[:1], train).trained_parameters()
        assert {name.split(".")[0] for name in names} == {"backbone", "heads"}
    own = getattr(stock, family.part).state_dict().keys()
    assert model_of(family, family.taps, "full").backbone.state_dict().keys() == own


def test_lora_is_loaded_by_the_stock_pipeline_and_changes_its_network_alike(family, stock, tmp_path):
    for targets in family.lora_targets:
        lora = family_lora(family, 4, 8, targets)
        model = AlignedModel(family, family.load_network(), (), 64, train="lora", lora=lora).eval()
        for parameter in model.trained_parameters().values():
            torch.nn.init.normal_(parameter, std=0.05)
        model.export(tmp_path / targets)
        stock.load_lora_weights(tmp_path / targets)
        x_t, t, text = inputs(family)
        with torch.no_grad():
            theirs = own_output(family, stock, x_t, t, text)
            torch.testing.assert_close(theirs, model.predict(x_t, t, text))
            bare = model_of(family).eval().predict(x_t, t, text)
        assert (theirs - bare).abs().max() > 1e-3
        stock.unload_lora_weights()


def test_the_size_of_images_is_that_of_the_latents(family):
    codec = family.load_codec()
    side = family.image_size(codec)
    x_0 = codec.encode(torch.zeros(1, 3, side, side))
    assert x_0.shape[1:] == family.latent_shape(family.load_network())


def test_a_network_on_meta_has_the_shapes_of_the_loaded_one(family):
    network, known = family.network_of_shapes()
    assert known
    loaded = family.load_network().state_dict()
    assert {name: value.shape for name, value in network.state_dict().items()} == {
        n: v.shape for n, v in loaded.items()
    }
    assert all(value.is_meta for value in network.state_dict().values())


def test_a_name_that_a_family_does_not_have_is_one_line_that_lists_those_it_has(family):
    with pytest.raises(UserError, match=r"align\.taps has 'nowhere': .* has " + ", ".join(family.taps)):
        model_of(family, ["nowhere"])
    with pytest.raises(UserError, match=r"model\.lora_targets = 'nothing'"):
        family_lora(family, 4, 4, "nothing")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "model_index.json cannot be read"),
        ("{", r"model_index.json: it is damaged"),
        ('{"_class_name": "OtherPipeline"}', "is a OtherPipeline"),
    ],
)
def test_a_folder_of_no_family_is_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=said) as error:
        family_of(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_folder_and_no_hub_id_is_one_line():
    with pytest.raises(UserError, match="does not exist"):
        family_of("./nowhere")
