"""The families of backbones by name, and how the family of a base model is found."""

from common.errors import UserError
from models.backbone import Backbone
from models.families.auraflow import AuraFlow
from models.families.flux import Chroma, Flux
from models.families.flux2 import Flux2
from models.families.hidream import HiDream
from models.families.kandinsky5 import Kandinsky5Video
from models.families.kolors import Kolors
from models.families.ltxvideo import LTXVideo
from models.families.lumina2 import Lumina2
from models.families.pixart import PixArt
from models.families.sana import Sana
from models.families.sanavideo import SanaVideo
from models.families.sd3 import SD3
from models.families.sd15 import SD15
from models.families.sdxl import SDXL
from models.families.wan import Wan
from models.pipeline_parts import load_pipeline_class

FAMILIES: dict[str, type[Backbone]] = {
    "sd15": SD15,
    "sdxl": SDXL,
    "kolors": Kolors,
    "flux": Flux,
    "flux2": Flux2,
    "sd3": SD3,
    "chroma": Chroma,
    "sana": Sana,
    "pixart": PixArt,
    "hidream": HiDream,
    "auraflow": AuraFlow,
    "lumina2": Lumina2,
    "wan": Wan,
    "ltxvideo": LTXVideo,
    "sanavideo": SanaVideo,
    "kandinsky5_video": Kandinsky5Video,
}


def family_named(name: str) -> type[Backbone]:
    """The family of a name of the table; raises `UserError` for another."""
    if name not in FAMILIES:
        raise UserError(f"--family {name:.60}: one of {', '.join(FAMILIES)} was expected")
    return FAMILIES[name]


def family_of(base: str, revision: str | None = None) -> Backbone:
    """The backbone of a diffusers folder or hub id, found by the pipeline class that its model_index.json names.

    The usual base models of the families are known without asking a hub. Raises `UserError` for a folder without a
    model_index.json, and for a pipeline of no family.
    """
    for family in FAMILIES.values():
        if base == family.default_base:
            return family(base, revision)
    found = load_pipeline_class(base, revision)
    for family in FAMILIES.values():
        if found == family.pipeline:
            return family(base, revision)
    raise UserError(
        f"{base} is a {found}; the families known here are "
        + ", ".join(f"{name} ({family.pipeline})" for name, family in FAMILIES.items())
    )
