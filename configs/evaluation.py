"""The knobs of evaluation: held-out images, what judges samples, and how they are drawn."""

from typing import Annotated, Literal

from pydantic import model_validator

from configs.sections import AsTuple, FilePath, OneNeedsNoList, Place, Section, Share, knob
from method.sampler import NOISE_LEVELS

FEWEST_MEASURED = 4  # samples: precision and recall look at the third neighbour of each


class Eval(Section):
    csv: FilePath | None = knob(None, "held-out images (script 1 on val), for `align`")
    latents: FilePath | None = knob(None, "their latents")
    tokens: FilePath | None = knob(None, "their teacher tokens")
    extractor: Place = knob(
        "inception",
        "what sees the images: inception (ADM's network, its weights in the standard cache), the path of its .pth, "
        "or the folder of an image classifier, whose numbers compare with nothing published",
    )
    dinov2: Place | None = knob(
        None,
        "folder of a DINOv2 for a Fréchet distance beside the others; it favours models trained towards DINO",
    )
    video_extractor: Place | None = knob(
        None,
        "folder of a video classifier such as VideoMAE, for a Fréchet distance of whole clips beside the others",
    )
    reference: Annotated[tuple[FilePath, ...], AsTuple, OneNeedsNoList] = knob(
        (),
        "reference statistics, .npz: ADM's own file, or those of `reference` (several, in a shell: "
        "'eval.reference=[A.npz,B.npz]'); empty = made of the training images, once, and kept beside data.csv",
    )
    num_samples: int = knob(10_000, "images that are drawn and measured", ge=2, le=1_000_000)
    sampler: Literal["auto", "ddim", "ddpm", "dpm++", "euler", "heun", "unipc"] = knob(
        "auto",
        "diffusers' scheduler: ddim (auto), ddpm or dpm++ of a DDPM; euler, heun, dpm++ or unipc of flow matching, where auto "
        "is the base model's own",
    )
    sampling_steps: int = knob(50, "denoising steps", ge=1, le=10_000)
    eta: Share = knob(0.0, "noise that DDIM adds at each step, as a share of DDPM's")
    cfg: float = knob(1.0, "guidance scale; 1 = unguided, one forward a step", ge=1, le=1000)
    guidance_low: Share = knob(
        0.0,
        "guide only at noise levels from this on, 0 (clean) to 1 (noise); an unguided step costs one forward",
    )
    guidance_high: Share = knob(1.0, "guide only at noise levels up to this; 1 = always (plan: 0.7)")
    guidance_space: Literal[tuple(NOISE_LEVELS)] = knob(
        "snr",
        "what a noise level is: REPA's time of equal signal-to-noise ratio, where 0.7 is DDPM index 605, "
        "or the share of the DDPM index, where 0.7 is index 700",
    )
    labels: Literal["balanced", "random"] = knob(
        "balanced", "image i shows class i mod n, or one drawn at random, as DiT, ADM and REPA do"
    )
    seed: int = knob(0, "image i starts from the noise of seed + i", ge=0, lt=2**62)
    batch_size: int = knob(
        16, "images in a forward while sampling; on a CPU, where that gains nothing, always 16", ge=1, le=4096
    )
    precision: Literal["auto", "bf16", "fp32"] = knob(
        "auto", "of the network while sampling; auto = bf16 on a GPU that has it, else fp32"
    )
    compile: bool = knob(False, "torch.compile the network before sampling; pays above some 1,000 images")
    keep_images: bool = knob(
        True, "false = of images that were measured only the first 100 stay (10k PNGs of 512 px: 4 GB)"
    )
    bootstrap: int = knob(10, "resamplings behind the error of a Fréchet distance; 0 = none", ge=0, le=10_000)

    @model_validator(mode="after")
    def _nothing_ignored(self):
        if self.eta and self.sampler not in ("auto", "ddim"):
            raise ValueError("eval.eta is DDIM's: set eval.sampler=ddim, or eval.eta=0")
        if self.bootstrap == 1:
            raise ValueError("eval.bootstrap = 1 gives no spread: choose 2 or more, or 0 for none")
        if self.guidance_low > self.guidance_high:
            raise ValueError(
                f"the guidance interval is empty: eval.guidance_low = {self.guidance_low:g} is above eval.guidance_high = "
                f"{self.guidance_high:g}"
            )
        return self
