"""CREPA's loss against plain loops over clips, frames, neighbours and places."""

import itertools
import math

import pytest
import torch

from method.alignment import AlignmentLoss, similarity_of, spatial_norm, token_loss
from method.neighbours import Neighbours

B, N, D = 2, 4, 8
# What a loop over every case takes: distance, cumulative, by frames, normalised, spatial.
KNOBS = list(itertools.product((0, 1, 2, 4), (False, True), (False, True), (False, True), (False, True)))


def clips(seed, frames, dtype=torch.float64):
    return torch.randn(B, frames * N, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def cosine(u, v):
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))


def frame_of(tokens, b, i, spatial):
    """The tokens of a frame as lists, or its mean token alone."""
    places = tokens[b, i * N : (i + 1) * N].tolist()
    return places if spatial else [[sum(column) / N for column in zip(*places, strict=True)]]


def similarities(x, y, frames, spatial):
    """{(i, k): the cosine of the student's frame i with the teacher's frame k, averaged over clips and places}."""
    found = {}
    for i in range(frames):
        for k in range(frames):
            pairs = [
                pair
                for b in range(B)
                for pair in zip(frame_of(x, b, i, spatial), frame_of(y, b, k, spatial), strict=True)
            ]
            found[i, k] = sum(cosine(u, v) for u, v in pairs) / len(pairs)
    return found


def by_loop(found, frames, distance, cumulative, tau, by_frames, normalised):
    """(loss, similarity) of `similarities`."""
    losses, bounded = [], []
    for i in range(frames):
        loss, similar, weights = 1 - found[i, i], found[i, i], 1.0
        for k in range(frames):
            n = abs(i - k)
            if n == 0 or not (n <= distance if cumulative else n == distance):
                continue
            weight = math.exp(-n / tau)
            loss, similar, weights = (
                loss + weight * (1 - found[i, k]),
                similar + weight * found[i, k],
                weights + weight,
            )
        losses.append(loss / weights if normalised else loss)
        bounded.append(similar / weights)
    return sum(losses) / (frames if by_frames else 1), sum(bounded) / frames


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_it_equals_plain_loops(frames, tau):
    x, y = clips(0, frames), clips(1, frames)
    found = {spatial: similarities(x, y, frames, spatial) for spatial in (False, True)}
    for distance, cumulative, by_frames, normalised, spatial in KNOBS:
        compare = Neighbours(
            neighbours=distance,
            cumulative=cumulative,
            neighbour_tau=tau,
            normalize_by_frames=by_frames,
            normalize_neighbours=normalised,
            spatial=spatial,
        )
        loss, similarity = compare(x, y, frames)
        expected = by_loop(found[spatial], frames, distance, cumulative, tau, by_frames, normalised)
        assert loss.item() == pytest.approx(expected[0], abs=1e-9), compare
        assert similarity.item() == pytest.approx(expected[1], abs=1e-9), compare


def test_its_gradient_is_that_of_the_papers_negative_sum():
    """−Σ_i (s_ii + Σ_k exp(−|i − k| / τ) s_ik): a constant less, and the sum over frames."""
    x, y = clips(0, 3).requires_grad_(), clips(1, 3)
    loss, _ = Neighbours(neighbours=1, neighbour_tau=2.0, normalize_by_frames=False)(x, y, 3)
    u, v = (torch.nn.functional.normalize(z.unflatten(1, (3, N)), dim=-1) for z in (x, y))  # (B, 3, N, D)
    weight = math.exp(-0.5)
    terms = [
        (weight if i != k else 1.0) * (u[:, i] * v[:, k]).sum(-1).mean()
        for i in range(3)
        for k in range(3)
        if abs(i - k) <= 1
    ]
    paper = -sum(terms)
    torch.testing.assert_close(
        loss - paper, torch.tensor(3 + 4 * weight, dtype=torch.float64), check_dtype=False
    )
    torch.testing.assert_close(*(torch.autograd.grad(z, x, retain_graph=True)[0] for z in (loss, paper)))


def test_the_ends_of_a_clip_do_not_repeat_themselves():
    """The known-bad clamp: the first frame's missing neighbour would be the first frame once more."""
    x, y = clips(0, 2), clips(1, 2)
    found = similarities(x, y, 2, True)
    weight = math.exp(-1)
    frames = [
        1 - found[i, i] + weight * (1 - found[i, 1 - i]) for i in range(2)
    ]  # one neighbour each, not two
    loss, _ = Neighbours(neighbours=1)(x, y, 2)
    assert loss.item() == pytest.approx(sum(frames) / 2, abs=1e-9)
    clamped = sum(frames) / 2 + weight * sum(1 - found[i, i] for i in range(2)) / 2
    assert abs(loss.item() - clamped) > 0.01


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("neighbours", [0, 1, 2])
def test_gradient_reaches_every_cell_of_every_frame(neighbours, spatial):
    x = clips(0, 3, torch.float32).requires_grad_()
    loss = AlignmentLoss(manifold_coeff=0, neighbours=Neighbours(neighbours=neighbours, spatial=spatial))
    loss({"t": x}, clips(1, 3, torch.float32), (3, 2, 2))["loss_align"].backward()
    assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("grid", [None, (2, 6), (1, 2, 6)])
def test_an_image_is_a_clip_of_one_frame_and_its_loss_is_todays_bit_for_bit(grid):
    x, y = clips(0, 3, torch.float32), clips(1, 3, torch.float32)
    for neighbours in (0, 2):
        loss = AlignmentLoss(manifold_coeff=0, neighbours=Neighbours(neighbours=neighbours))
        terms = loss({"t": x}, y, grid)
        assert terms["loss_align"].equal(token_loss(x, y))
        assert similarity_of(terms).equal(1 - token_loss(x, y))


def test_without_neighbours_a_clip_is_aligned_frame_by_frame():
    x, y = clips(0, 5, torch.float32), clips(1, 5, torch.float32)
    terms = AlignmentLoss(manifold_coeff=0)({"t": x}, y, (5, 2, 2))
    torch.testing.assert_close(terms["loss_token"], token_loss(x, y))


def test_what_a_cutoff_watches_stays_a_cosine():
    """The sum over neighbours reaches 1 + 2 exp(−1/τ), against which a threshold of 0.9 says nothing."""
    x = clips(0, 1, torch.float32).repeat(1, 5, 1)  # a still clip
    for normalised, by_frames in itertools.product((False, True), repeat=2):
        knobs = {"normalize_neighbours": normalised, "normalize_by_frames": by_frames}
        terms = AlignmentLoss(manifold_coeff=0, neighbours=Neighbours(neighbours=1, **knobs))(
            {"t": x}, x, (5, 2, 2)
        )
        assert similarity_of(terms).item() == pytest.approx(1, abs=1e-6)
        assert terms["loss_token"].item() == pytest.approx(0, abs=1e-5)


def test_a_cls_vector_of_each_frame_is_refused():
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="CLS"):
        AlignmentLoss(manifold_coeff=0)({"t": x}, y, (5, 1, 1))


def test_a_clip_is_normalised_spatially_frame_by_frame():
    x, y = clips(0, 2, torch.float32), clips(1, 2, torch.float32)
    whole = torch.cat([spatial_norm(frame, 0.5) for frame in y.chunk(2, dim=1)], dim=1)
    terms = AlignmentLoss(manifold_coeff=0, spatial_norm=0.5)({"t": x}, y, (2, 2, 2))
    torch.testing.assert_close(terms["loss_token"], token_loss(x, whole))
