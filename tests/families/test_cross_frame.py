"""CREPA on the families of video transformers: from the latents of clips to gradients at every cell of every frame."""

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from method.neighbours import Neighbours
from method.objective import Objective
from miniature.families import make_pipeline
from models.aligned import AlignedModel
from models.families.table import FAMILIES, family_of
from models.families.transformer import VideoTransformer

CPU = torch.device("cpu")
VIDEO = [name for name, family in FAMILIES.items() if issubclass(family, VideoTransformer)]
FRAMES, GRID = 3, (3, 5)


@pytest.fixture(scope="module", params=VIDEO)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_pipeline(request.param, folder / "base")
    return family_of(str(folder / "base"))


def inputs_of(family, network):
    """Latents `(2, C, 3, 4, 6)` and the text of two prompts."""
    C = family.latent_shape(network)[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, C, FRAMES, 4, 6, generator=generator), family.encode_text(["a one", "a two"], CPU)


def aligned(family, **options):
    network = family.load_network()
    taps = family.tap_names(network)
    model = AlignedModel(family, network, [taps[0]], 32, train="full", **options).train()
    return model, taps


@pytest.mark.parametrize("head", ["linear", "conv3x3"])
def test_the_loss_over_neighbours_reaches_every_cell_of_every_frame(family, head):
    model, taps = aligned(family, head=head)
    x_0, text = inputs_of(family, model.backbone)
    n = FRAMES * GRID[0] * GRID[1]
    teacher = F.normalize(torch.randn(2, n, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    path = family.path(x_0.shape[1:])
    objective = Objective(path, manifold="relation", neighbours=Neighbours(neighbours=1))
    captured, read = {}, model.get_aligned_tokens

    def reading(grid):
        captured.update(model.taps.captured)
        for feature in captured.values():
            feature.retain_grad()
        return read(grid)

    model.get_aligned_tokens = reading
    generator = torch.Generator().manual_seed(0)
    terms = objective(model, x_0, teacher, text, grid=(FRAMES, *GRID), generator=generator)
    terms["loss_align"].backward()
    (feature,) = captured.values()
    assert feature.shape[2] == FRAMES
    assert (feature.grad.abs().sum(1) > 0).all()
    assert -1 <= terms[f"cosine/{taps[0]}"] <= 1
    assert terms["loss_token"] > 1 - terms[f"cosine/{taps[0]}"]  # a sum over neighbours, not a mean


def test_a_teacher_of_other_frames_is_one_line(family):
    model, _ = aligned(family, head="linear")
    x_0, text = inputs_of(family, model.backbone)
    path = family.path(x_0.shape[1:])
    model.predict(x_0, path.spread(2), text, capture=True)
    with pytest.raises(UserError, match="has 3 frames, the teacher's tokens 4: make both") as error:
        model.get_aligned_tokens((4, *GRID))
    assert "\n" not in str(error.value)


def test_a_block_of_the_network_teaches_clips_as_well(family):
    model, taps = aligned(family, head="linear", teacher_block=family.tap_names(family.load_network())[-1])
    x_0, text = inputs_of(family, model.backbone)
    objective = Objective(family.path(x_0.shape[1:]), manifold_coeff=0, neighbours=Neighbours(neighbours=1))
    terms = objective(model, x_0, None, text, generator=torch.Generator().manual_seed(0))
    terms["loss_align"].backward()
    behind = model.backbone.get_submodule(family.tap(model.backbone, taps[-1]).path).parameters()
    assert all(p.grad is None or not p.grad.any() for p in behind)
    assert all(p.grad.any() for p in model.heads.parameters())
