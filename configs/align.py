"""The knobs of the alignment: its taps, losses, heads, and the schedule of its coefficient λ."""

from typing import Annotated, Literal

from pydantic import model_validator

from configs.sections import (
    Above0,
    AsTuple,
    AtLeast0,
    Count,
    Decay,
    OneNeedsNoList,
    Positive,
    Section,
    Share,
    knob,
)
from method.alignment import MANIFOLD_LOSSES, OVER_THE_BATCH, PROJECTIONS
from method.coefficient import DECAYS


class Align(Section):
    taps: Annotated[tuple[str, ...], AsTuple, OneNeedsNoList] = knob(
        ("auto",),
        "where the network is read, by the names of its family: enc_last, mid, dec_first of a U-Net, block0, block1, … of a "
        "transformer; auto = mid, or the block at a third of the depth. The loss is the mean over taps (in a shell: "
        "'align.taps=[enc_last,mid]')",
        min_length=1,
    )
    coeff: AtLeast0 = knob(0.8, "λ, weight of the alignment loss; 0 = no alignment work at all")
    manifold_coeff: AtLeast0 = knob(3.0, "w, weight of the manifold loss beside the token loss")
    manifold: Literal[tuple(MANIFOLD_LOSSES)] = knob(
        "sample",
        "Gram matrix of pooled tokens across the batch (B×B), of tokens within an image (N×N), or both; relation = "
        "VideoREPA's, of all tokens of a clip or image with a margin",
    )
    relation_margin: float = knob(
        0.1, "manifold=relation: differences of similarities below this cost nothing", ge=0, le=2
    )
    upper_only: bool = knob(False, "compare the strict upper triangle of the Gram matrices only")
    gather: bool = knob(
        False,
        "take the sample Gram over the batches of all ranks together; its meaning depends on their number",
    )
    head: Literal[tuple(PROJECTIONS)] = knob(
        "conv1x1",
        "what projects the features: the plan's 1×1 conv, GroupNorm, GELU; LayerNorm and one layer; REPA's three "
        "layers with SiLU; iREPA's 3×3 conv",
    )
    head_hidden: int = knob(2048, "width of the hidden layers of head = mlp", ge=1, le=16_384)
    spatial_norm: Share | None = knob(
        None,
        "iREPA's α: the teacher's tokens become (y − α·mean) / std over each image's tokens; null = as they are",
    )
    neighbours: int = knob(
        0,
        "CREPA's d: each frame of a clip is aligned with its own teacher frame and those d frames away; 0 = its own alone",
        ge=0,
        le=1024,
    )
    cumulative: bool = knob(False, "all frames up to `neighbours` away, not only those at that distance")
    neighbour_tau: float = knob(1.0, "τ: a frame that is n frames away weighs exp(−n/τ)", gt=0, le=1e6)
    normalize_by_frames: bool = knob(
        True, "the token loss of a clip is the mean over its frames; false = the sum"
    )
    normalize_neighbours: bool = knob(False, "divide the loss of each frame by the sum of its weights")
    spatial: bool = knob(True, "compare tokens place by place; false = the mean token of each frame or image")
    schedule: Literal[tuple(DECAYS)] = knob("constant", "how λ goes to coeff_end after the warm-up")
    warmup_steps: Count = knob(0, "λ rises linearly from 0 over these steps")
    decay_steps: Count = knob(0, "length of the decay, counted after the warm-up; 0 = to the end")
    coeff_end: AtLeast0 = knob(0.0, "λ at the end of the decay")
    power: Above0 = knob(1.0, "exponent of the polynomial schedule")
    cutoff_step: Count = knob(0, "λ = 0 from this step on; 0 = never")
    similarity_threshold: float | None = knob(
        None, "λ = 0 once the moving average of the mean cosine reaches this; null = never", ge=-1, le=1
    )
    similarity_ema_decay: Decay = knob(
        0.99, "decay of that average; it decides nothing before it has seen 1 / (1 − decay) steps"
    )
    threshold_mode: Literal["permanent", "recoverable"] = knob(
        "permanent", "whether λ stays 0, or comes back when the average falls below the threshold"
    )
    similarity_every: Positive = knob(
        10, "while λ is 0 but recoverable, measure the similarity at every so many steps"
    )

    @model_validator(mode="after")
    def _what_is_set_can_act(self):
        if len(set(self.taps)) != len(self.taps):
            raise ValueError(f"align.taps names a tap twice: {', '.join(self.taps)}")
        without = {"coeff_end": 0.0, "decay_steps": 0, "power": 1.0}
        idle = [name for name, default in without.items() if getattr(self, name) != default]
        if self.schedule == "constant" and idle:
            raise ValueError(
                f"align.{idle[0]} has no effect while align.schedule is constant: choose another schedule"
            )
        if self.coeff == 0 and self.coeff_end > 0:
            raise ValueError(
                f"align.coeff_end = {self.coeff_end:g} has no effect while align.coeff = 0, which leaves the alignment "
                "out: raise align.coeff, or set align.coeff_end=0"
            )
        if self.relation_margin != 0.1 and (self.manifold != "relation" or self.manifold_coeff == 0):
            raise ValueError("align.relation_margin has no effect without align.manifold=relation")
        alone = {"cumulative": False, "neighbour_tau": 1.0, "normalize_neighbours": False}
        idle = [name for name, default in alone.items() if getattr(self, name) != default]
        if self.neighbours == 0 and idle:
            raise ValueError(f"align.{idle[0]} has no effect while align.neighbours = 0: set that too")
        if self.spatial_norm == 1 and not self.spatial:
            raise ValueError(
                "align.spatial_norm = 1 takes away the mean tokens that align.spatial=false compares: choose one of them"
            )
        if self.spatial_norm == 1 and self.manifold in OVER_THE_BATCH and self.manifold_coeff > 0:
            raise ValueError(
                "align.spatial_norm = 1 takes away the mean tokens that the sample Gram compares: set align.manifold=token, "
                "align.manifold_coeff=0, or a smaller align.spatial_norm"
            )
        return self
