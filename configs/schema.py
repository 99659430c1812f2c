"""A training run's settings, and what they must be together. The knobs: `sections.py`; how they are read: `loading.py`."""

from pydantic import model_validator

from configs.align import Align
from configs.evaluation import FEWEST_MEASURED, Eval
from configs.sections import Data, Diffusion, FilePath, Model, Optim, Section, Teacher, Train, knob
from method.alignment import OVER_THE_BATCH


class Config(Section):
    run: FilePath = knob(..., "folder that this run writes")
    seed: int = knob(
        0, "seed of noise, timesteps, caption dropout, data order and head weights", ge=0, lt=2**63
    )
    model: Model = Model()
    teacher: Teacher = Teacher()
    data: Data
    align: Align = Align()
    diffusion: Diffusion = Diffusion()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _what_is_set_can_act(self):
        align, teacher, steps = self.align, self.teacher, self.train.steps
        outside = teacher.source != "backbone"
        if align.coeff > 0 and align.head == "conv1x1" and outside and teacher.dim % 32:
            raise ValueError(
                f"the head conv1x1 normalises 32 groups, and teacher.dim = {teacher.dim} is no multiple: choose another "
                "align.head"
            )
        if align.cutoff_step >= steps > 1 and align.coeff > 0:
            raise ValueError(
                f"align.cutoff_step = {align.cutoff_step} is never reached in {steps} steps: lower it, or set 0"
            )
        if align.similarity_threshold is not None and 1 / (1 - align.similarity_ema_decay) > steps:
            raise ValueError(
                f"the average of align.similarity_ema_decay = {align.similarity_ema_decay} needs more than the {steps} steps "
                "there are before it decides: lower it"
            )
        if teacher.source != "online" and teacher.decoder is not None:
            raise ValueError("teacher.decoder is for teacher.source=online: set that, or leave it out")
        if teacher.source == "online" and teacher.model is None and align.coeff > 0:
            raise ValueError("teacher.source=online needs teacher.model, for instance facebook/dinov2-large")
        if outside and teacher.block is not None:
            raise ValueError("teacher.block is for teacher.source=backbone: set that, or leave it out")
        if not outside and teacher.block is None and align.coeff > 0:
            raise ValueError(
                "teacher.source=backbone needs teacher.block, the name of a tap behind align.taps"
            )
        if teacher.source == "cached" and self.data.tokens is None:
            raise ValueError(
                "'data.tokens' is missing (folder of cached teacher tokens, script 3): set it, or teacher.source=online"
            )
        if self.train.eval_every and self.eval.num_samples < FEWEST_MEASURED:
            raise ValueError(
                f"eval.num_samples = {self.eval.num_samples} is too few to be measured every train.eval_every steps: choose "
                f"{FEWEST_MEASURED} or more, or train.eval_every=0"
            )
        sample_gram = align.coeff > 0 and align.manifold_coeff > 0 and align.manifold in OVER_THE_BATCH
        if sample_gram and self.data.batch_size < 2:
            raise ValueError(
                "the sample Gram of one image says nothing: raise data.batch_size to 2 or more, "
                "or set align.manifold=token"
            )
        return self
