"""Official pipelines and text encoders of the tiny base models, loaded once a process: tests get copies of what they change."""

import functools
from copy import copy, deepcopy

import torch

from models.backbone import Backbone
from models.families.table import family_of

CPU = torch.device("cpu")
PROMPTS = ["a photo of a three", "a drawing of a two"]
# In a batch with PROMPTS[0], the text is ragged where the network cuts it at its mask.
LONG = "a much longer prompt, of many more words than the other one has"


@functools.cache
def _pipeline(base: str):
    family = family_of(base)
    pipeline = family.pipeline_class.from_pretrained(base, **family.load_options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_of(family: Backbone):
    """The family's own pipeline of diffusers, with a network and a scheduler of its own."""
    found = copy(_pipeline(family.base))
    for part in (family.part, "scheduler"):
        setattr(found, part, deepcopy(getattr(found, part)))
    return found


@functools.cache
def _encoder(base: str):
    return family_of(base).prompt_encoder(CPU)


def prepared(family: Backbone, *more: str) -> Backbone:
    """The family, with text encoders that have taken note of `PROMPTS`, of the empty prompt and of `more`."""
    family._prompt_encoder = copy(_encoder(family.base))
    family._prompt_encoder.family = family
    family.prepare_text([*PROMPTS, *more, ""], CPU)
    return family


@functools.cache
def _text(base: str, prompts: tuple[str, ...]):
    return prepared(family_of(base)).encode_text(prompts, CPU)


def text_of(family: Backbone, count: int = 2):
    """The text fields of the first `count` of `PROMPTS`, for tests of something else than the text."""
    return dict(_text(family.base, tuple(PROMPTS[:count])))


@functools.cache
def shapes_of(base: str):
    """The network on the device "meta", not to be changed."""
    return family_of(base).network_of_shapes()[0]


@functools.cache
def codec_of(base: str):
    """The VAE, not to be changed."""
    return family_of(base).load_codec()
