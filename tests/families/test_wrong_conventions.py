"""Each convention of a family, broken: a table of what is wrong, and of the check of the contract that sees it.

`arguments` compares what the network is told with what the official pipeline tells it; `sampler` compares images and pixels;
`oracle` puts the training target into the official sampler; `codec` is the VAE's normalisation; `tokens` moves a cell of the
latents and looks where the features move; `modes` compares train with eval.
"""

import pytest
import torch
from loaded import LONG, prepared, stock_of
from test_contract import check_arguments, check_codec, check_oracle, check_sampler, noise_of
from test_tokens import check_modes, check_tokens

from common.errors import UserError
from models.families.table import FAMILIES

CHECKS = {
    "arguments": lambda family: check_arguments(family, stock_of(family)),
    "sampler": lambda family: check_sampler(family, stock_of(family)),
    "oracle": lambda family: check_oracle(family, stock_of(family), torch.randn_like(noise_of(family))),
    "codec": check_codec,
    "tokens": check_tokens,
    "modes": check_modes,
}


def of_text(field, change):
    """The forward, with one field of the text changed."""

    def forward(own, self, network, x_t, t, text):
        return own(self, network, x_t, t, text | {field: change(text[field])})

    return forward


def of_conditions(name, change):
    """The further arguments of the network, one of them changed."""

    def conditions(own, self, network, x, text):
        found = own(self, network, x, text)
        return found | {name: change(found[name])}

    return conditions


def of_codec(change):
    """The codec, changed in place."""

    def load_codec(own, self):
        codec = own(self)
        change(codec)
        return codec

    return load_codec


def of_path(change):
    """The path, its (x_t, target, weight) changed."""

    def path(own, self, *args):
        found = own(self, *args)
        return lambda x_0, noise, t: change(*found(x_0, noise, t))

    return path


def result(change):
    """A method's result, changed."""
    return lambda own, self, *args: change(own(self, *args))


def of_empty_prompt(own, self, device):
    return {name: rows[0] for name, rows in self.encode_text([""], device).items()}


def normalised_twice(codec):
    own = codec.normalise
    codec.normalise = lambda z: own(own(z))


def first(_own, _self, hidden, count, _text, _tap):
    return hidden[:, :count]


def last(_own, _self, hidden, count, _text, _tap):
    return hidden[:, -count:]


def scaled_twice(codec):
    codec.scaling **= 2


def without_mean(codec):
    codec.mean = 0.0


def without_std(codec):
    codec.std = 1.0


def patches_transposed(codec):
    own = codec.from_cells
    codec.from_cells = lambda z: own(z).mT


def inverted(mask):
    return 1 - mask


def channels_last(packed):
    return packed.unflatten(2, (-1, 4)).transpose(2, 3).flatten(2)


def mu_of_cells(_own, self, shape, _steps):
    return self.shifted_mu(shape[-2] * shape[-1])


def behind_text_alone(_own, _self, hidden, count, text, _tap):
    length = text["prompt_embeds"].shape[1]
    return hidden if hidden.shape[1] == count else hidden[:, length : length + count]


WIDTH_FIRST = result(lambda ids: ids[:, [1, 0, 3, 2, 5, 4]])
WITHOUT_MASK = {"prompt_embeds": "encoder_hidden_states"}
SWAPPED = tuple(FAMILIES["sd3"].text_fields[i] for i in (1, 0, 3, 2))
MASK = "prompt_attention_mask"
# Family, what is wrong, the fact or method that is overridden, with what, the check that sees it.
WRONG = [
    # time
    ("sd15", "time runs backwards", "forward", lambda own, self, n, x, t, text: own(self, n, x, 999 - t, text), "arguments"),
    ("pixart", "told t / 1000", "clock", result(lambda t: t / 1000), "arguments"),
    ("flux", "told 1000 σ", "clock", result(lambda t: 1000 * t), "arguments"),
    ("flux2", "told 1000 σ", "clock", result(lambda t: 1000 * t), "arguments"),
    ("chroma", "told 1000 σ", "clock", result(lambda t: 1000 * t), "arguments"),
    ("auraflow", "told 1 - σ", "clock", result(lambda t: 1 - t), "arguments"),
    ("sd3", "told σ, not 1000 σ", "clock", result(lambda t: t / 1000), "arguments"),
    ("sd3", "a clock 0.1 % off", "clock", result(lambda t: 1.001 * t), "arguments"),
    ("hidream", "told 1000 - 1000 σ", "clock", result(lambda t: 1000 - t), "arguments"),
    ("sana", "timestep_scale forgotten", "clock", lambda own, self, network, t: 1000 * t, "arguments"),
    ("lumina2", "told σ, not 1 - σ", "clock", result(lambda t: 1 - t), "arguments"),
    # sign, target and output
    ("flux", "the sign of the output", "sign", -1, "sampler"),
    ("sana", "the sign of the output", "sign", -1, "sampler"),
    ("lumina2", "the sign of the output", "sign", 1, "sampler"),
    ("hidream", "the sign of the output", "sign", 1, "sampler"),
    ("pixart", "the learned variances are not cut", "unpack", lambda own, self, y, shape: y, "sampler"),
    ("pixart", "the variances are taken", "unpack", lambda own, self, y, shape: y[:, shape[1] :], "sampler"),
    ("sd3", "the target's sign", "path", of_path(lambda x_t, target, weight: (x_t, -target, weight)), "oracle"),
    ("flux", "x_0 is the target", "path", of_path(lambda x_t, target, weight: (x_t, x_t - target, weight)), "oracle"),
    ("sdxl", "v is the target of an ε-network", "own_output", "v", "oracle"),
    ("pixart", "v is the target of an ε-network", "own_output", "v", "oracle"),
    # guidance that the network is told
    ("flux", "another guidance", "guidance", 1.0, "arguments"),
    ("flux2", "another guidance", "guidance", 1.0, "arguments"),
    ("flux", "no guidance", "conditions", of_conditions("guidance", lambda _: None), "arguments"),
    # masks
    ("pixart", "the mask is dropped", "arguments", WITHOUT_MASK, "arguments"),
    ("sana", "the mask is dropped", "arguments", WITHOUT_MASK, "arguments"),
    ("pixart", "the mask is inverted", "forward", of_text(MASK, inverted), "arguments"),
    ("sana", "the mask is inverted", "forward", of_text(MASK, inverted), "arguments"),
    ("lumina2", "the mask is all ones", "forward", of_text(MASK, torch.ones_like), "arguments"),
    ("chroma", "the mask is all ones", "conditions", of_conditions("attention_mask", torch.ones_like), "arguments"),
    ("chroma", "the mask is inverted", "conditions", of_conditions("attention_mask", inverted), "arguments"),
    ("chroma", "the mask masks", "conditions", of_conditions("attention_mask", torch.Tensor.bool), "arguments"),
    # text and the null prompt
    ("sdxl", "the null text is that of the empty prompt", "null_text", of_empty_prompt, "arguments"),
    ("sana", "the null text has the instruction", "null_text", of_empty_prompt, "arguments"),
    ("lumina2", "the null text has the system prompt", "null_text", of_empty_prompt, "arguments"),
    ("sd3", "prompt and null prompt are swapped", "text_fields", SWAPPED, "arguments"),
    ("hidream", "layers and prompts are swapped", "text_batch_dim", {}, "arguments"),
    ("flux", "no pooled text", "forward", of_text("pooled_prompt_embeds", torch.zeros_like), "arguments"),
    # sizes and places
    ("sdxl", "time_ids are width first", "time_ids", WIDTH_FIRST, "arguments"),
    ("kolors", "time_ids are width first", "time_ids", WIDTH_FIRST, "arguments"),
    ("sdxl", "time_ids are in cells", "pixels_of_cell", 1, "arguments"),
    ("flux", "img_ids are swapped", "conditions", of_conditions("img_ids", lambda ids: ids[:, [0, 2, 1]]), "arguments"),
    ("chroma", "img_ids are swapped", "conditions", of_conditions("img_ids", lambda ids: ids[:, [0, 2, 1]]), "arguments"),
    ("flux2", "img_ids are swapped", "conditions", of_conditions("img_ids", lambda ids: ids[..., [0, 2, 1, 3]]), "arguments"),
    ("flux2", "txt_ids are not counted", "conditions", of_conditions("txt_ids", torch.zeros_like), "arguments"),
    # packing
    ("flux", "packed width first", "pack", lambda own, self, x: own(self, x.mT), "arguments"),
    ("flux", "a patch's channels last", "pack", result(channels_last), "arguments"),
    ("flux2", "unpacked width first", "unpack",
     lambda own, self, y, shape: own(self, y, (*shape[:2], shape[3], shape[2])).mT, "arguments"),
    ("hidream", "patches of the train mode are transposed", "unpack",
     lambda own, self, y, shape: y if y.shape == shape else own(self, y.unflatten(3, (2, 2)).mT.flatten(3), shape), "modes"),
    # latents
    ("sd15", "the latents are scaled twice", "load_codec", of_codec(scaled_twice), "sampler"),
    ("sana", "the latents are scaled twice", "load_codec", of_codec(scaled_twice), "sampler"),
    ("flux", "shift_factor is forgotten", "load_codec", of_codec(without_mean), "sampler"),
    ("lumina2", "shift_factor is forgotten", "load_codec", of_codec(without_mean), "sampler"),
    ("flux2", "the batch norm's variance is forgotten", "load_codec", of_codec(without_std), "sampler"),
    ("flux2", "patches of latents are transposed", "load_codec", of_codec(patches_transposed), "codec"),
    ("sd3", "encoding normalises twice", "load_codec", of_codec(normalised_twice), "codec"),
    # the solver's times
    ("flux", "mu is missing", "mu_of", result(lambda _: None), "sampler"),
    ("flux", "mu is of cells, not of tokens", "mu_of", mu_of_cells, "sampler"),
    ("flux", "the scheduler's own σ", "own_sigmas", False, "sampler"),
    ("flux2", "mu is FLUX.1's", "mu_of", mu_of_cells, "sampler"),
    # taps
    ("flux2", "text is read as the picture", "picture", first, "tokens"),
    ("chroma", "text is read as the picture", "picture", first, "tokens"),
    ("auraflow", "text is read as the picture", "picture", first, "tokens"),
    ("auraflow", "the registers are forgotten", "picture", behind_text_alone, "tokens"),
    ("hidream", "text is read as the picture", "picture", last, "tokens"),
    ("lumina2", "ragged text is taken for even", "picture", last, "tokens"),
    ("sd3", "the text's stream is read", "stream", 0, "tokens"),
    ("hidream", "the text's stream is read", "stream", 1, "tokens"),
    ("sana", "features are width first", "features", result(lambda x: x.mT), "tokens"),
    ("pixart", "cells are read column by column", "features", result(lambda x: x.mT.reshape(x.shape)), "tokens"),
]  # fmt: skip
# What the checks say: numbers or shapes that differ, or the network, the tap or the scheduler refuses.
SEEN = (AssertionError, RuntimeError, TypeError, ValueError, UserError)


def broken(kind, name, change):
    """A subclass with one method or fact overridden; a method gets what it overrides as its first argument."""
    own = getattr(kind, name)
    member = (lambda self, *args: change(own, self, *args)) if callable(own) else change
    return type(kind.__name__, (kind,), {name: member})


def rows():
    """`make test` breaks each method or fact once for each check that sees it, and `make test-full` in every family."""
    known = set()
    for name, what, member, change, check in WRONG:
        marks = [pytest.mark.thorough] * ((member, check) in known)
        known.add((member, check))
        yield pytest.param(name, member, change, check, id=f"{name}-{what}", marks=marks)


@pytest.mark.parametrize(("name", "member", "change", "check"), rows())
def test_a_wrong_convention_is_seen(base_of, name, member, change, check):
    family = prepared(broken(FAMILIES[name], member, change)(base_of(name)), LONG)
    with pytest.raises(SEEN):
        CHECKS[check](family)
