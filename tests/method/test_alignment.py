import math

import pytest
import torch
import torch.nn.functional as F
from fork_server import two_ranks

from method import alignment
from method.alignment import (
    PROJECTIONS,
    AlignHead,
    AlignmentLoss,
    both_grams_loss,
    manifold_gram_loss,
    relation_loss,
    resize_cells,
    spatial_norm,
    token_gram_loss,
    token_loss,
)

GRAMS = [manifold_gram_loss, token_gram_loss]


def tokens(seed, b=4, n=9, d=32):
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed))


def rotation(d, seed=0):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def cosine(u, v):
    return (
        sum(a * b for a, b in zip(u, v, strict=True)) / (sum(a * a for a in u) * sum(b * b for b in v)) ** 0.5
    )


def test_token_loss_equals_a_plain_loop():
    x, y = tokens(0, 2, 3, 4), tokens(1, 2, 3, 4)
    total = sum(1 - cosine(x[b, n].tolist(), y[b, n].tolist()) for b in range(2) for n in range(3))
    assert token_loss(x, y).item() == pytest.approx(total / 6, abs=1e-6)


def test_sample_gram_equals_a_plain_loop():
    x, y = tokens(0, 3, 2, 4), tokens(1, 3, 2, 4)
    px, py = x.mean(1).tolist(), y.mean(1).tolist()
    squares = [[(cosine(px[i], px[j]) - cosine(py[i], py[j])) ** 2 for j in range(3)] for i in range(3)]
    assert manifold_gram_loss(x, y).item() == pytest.approx(sum(map(sum, squares)) / 9, abs=1e-6)
    upper = [squares[i][j] for i in range(3) for j in range(i + 1, 3)]
    assert manifold_gram_loss(x, y, upper_only=True).item() == pytest.approx(sum(upper) / 3, abs=1e-6)


def test_token_gram_equals_a_plain_loop():
    x, y = tokens(0, 2, 3, 4), tokens(1, 2, 3, 4)
    squares = [
        (cosine(x[b, i].tolist(), x[b, j].tolist()) - cosine(y[b, i].tolist(), y[b, j].tolist())) ** 2
        for b in range(2)
        for i in range(3)
        for j in range(3)
    ]
    assert token_gram_loss(x, y).item() == pytest.approx(sum(squares) / 18, abs=1e-6)


def test_relations_equal_a_plain_loop_over_the_tokens_of_all_frames():
    frames, places = 2, 3
    x, y = tokens(0, 2, frames * places, 4), tokens(1, 2, frames * places, 4)
    pairs = [(i, j) for i in range(frames * places) for j in range(frames * places)]
    for margin in (0.0, 0.1, 0.5):
        beyond = {
            (b, i, j): max(
                0.0,
                abs(cosine(x[b, i].tolist(), x[b, j].tolist()) - cosine(y[b, i].tolist(), y[b, j].tolist()))
                - margin,
            )
            for b in range(2)
            for i, j in pairs
        }
        assert relation_loss(x, y, margin=margin).item() == pytest.approx(sum(beyond.values()) / 72, abs=1e-6)
        upper = [value for (_, i, j), value in beyond.items() if i < j]
        assert relation_loss(x, y, True, margin).item() == pytest.approx(sum(upper) / 30, abs=1e-6)


@pytest.mark.parametrize("upper_only", [False, True])
def test_relations_of_many_tokens_are_the_same_a_few_rows_at_a_time(upper_only, monkeypatch):
    found = []
    for rows in (alignment.ROWS, 4):
        monkeypatch.setattr(alignment, "ROWS", rows)
        x = tokens(0).requires_grad_()
        loss = relation_loss(x, tokens(1), upper_only)
        found.append((loss, *torch.autograd.grad(loss, x)))
    for whole, in_rows in zip(*found, strict=True):
        torch.testing.assert_close(whole, in_rows)


def test_relations_within_the_margin_cost_nothing_and_those_beyond_send_gradient_to_every_token():
    x = tokens(0).requires_grad_()
    assert relation_loss(x, x.detach() + 0.01 * tokens(1), margin=0.1).item() == 0
    loss = AlignmentLoss(manifold="relation", relation_margin=0.2)({"t": x}, tokens(1))["loss_manifold"]
    assert loss == relation_loss(x, tokens(1), margin=0.2) > 0
    loss.backward()
    assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("gram", GRAMS)
def test_gram_losses_vanish_for_equal_structure_under_any_rotation(gram):
    x = tokens(0)
    assert gram(x, x).item() == 0
    assert gram(x, x @ rotation(32)).item() == pytest.approx(0, abs=1e-9)
    assert token_loss(x, x @ rotation(32)).item() > 0.5  # which the token loss is there to see


@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("upper_only", [False, True])
def test_gram_losses_are_positive_on_noise_and_send_gradient_to_every_token(gram, upper_only):
    x, y = tokens(0).requires_grad_(), tokens(1)
    loss = gram(x, y, upper_only)
    loss.backward()
    assert loss.item() > 1e-3
    assert (x.grad.abs().sum(-1) > 0).all()


def test_both_grams_is_their_sum():
    x, y = tokens(0), tokens(1)
    assert both_grams_loss(x, y) == manifold_gram_loss(x, y) + token_gram_loss(x, y)


@pytest.mark.parametrize("loss", [token_loss, *GRAMS, both_grams_loss, relation_loss])
def test_losses_refuse_a_cls_vector_and_unequal_shapes(loss):
    with pytest.raises(ValueError, match="CLS"):
        loss(tokens(0, n=1), tokens(1, n=1))
    with pytest.raises(ValueError, match="equal"):
        loss(tokens(0, n=4), tokens(1, n=9))
    with pytest.raises(ValueError, match="equal"):
        loss(tokens(0)[:, 0], tokens(1)[:, 0])


def test_sample_gram_refuses_a_single_image():
    with pytest.raises(ValueError, match="two images"):
        manifold_gram_loss(tokens(0, b=1), tokens(1, b=1))


@pytest.mark.parametrize("loss", [token_loss, *GRAMS, relation_loss])
def test_losses_compute_in_fp32_under_autocast(loss):
    x, y = tokens(0), tokens(1)
    plain = loss(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(x, y).equal(plain)
    assert loss(x.half(), y).dtype == torch.float32


def test_head_projects_first_then_upsamples_then_normalises():
    head = AlignHead(8, 32)
    feat = torch.randn(2, 8, 2, 3)
    with torch.no_grad():
        projected = head.proj(feat)  # on the U-Net's own 2×3 cells
        expected = (
            F.interpolate(projected, (4, 6), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        )
        out = head(feat, (4, 6))
        other_order = head.proj(F.interpolate(feat, (4, 6), mode="bilinear", align_corners=False))
    assert out.shape == (2, 24, 32)
    torch.testing.assert_close(out, F.normalize(expected, dim=-1))
    assert not torch.allclose(out, F.normalize(other_order.flatten(2).transpose(1, 2), dim=-1))
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 24))


def test_head_of_the_plan_has_its_shapes_and_its_parameters():
    head = AlignHead(1280, 1024)
    assert head(torch.randn(1, 1280, 8, 8), (14, 14)).shape == (1, 196, 1024)
    assert sum(p.numel() for p in head.parameters()) == 1280 * 1024 + 2 * 1024  # no bias in the projection


def test_head_tokens_run_row_by_row():
    head = AlignHead(4, 32)
    feat = torch.zeros(1, 4, 2, 3)
    feat[0, :, 0, 2] = 1  # row 0, column 2: the third token
    out = head(feat, (2, 3))[0]  # (6, 32)
    assert all(out[i].equal(out[0]) == (i != 2) for i in range(6))


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("size", [(2, 3), (6, 5), (3, 8)])
def test_a_head_maps_each_frame_of_a_clip_like_an_image(kind, size):
    """Coarser and finer grids than the teacher's (4, 6), and one of both; time is never resized."""
    head = AlignHead(8, 32, kind, hidden=16)
    feat = torch.randn(2, 8, 5, *size)
    out = head(feat, (5, 4, 6))
    assert out.shape == (2, 5 * 24, 32)
    for i in range(5):
        torch.testing.assert_close(out[:, i * 24 : (i + 1) * 24], head(feat[:, :, i], (4, 6)))
    for wrong in (feat[:, :, :4], feat[:, :, 0]):
        with pytest.raises(ValueError, match="5 frames"):
            head(wrong, (5, 4, 6))


def test_head_refuses_a_width_that_its_group_norm_cannot_split():
    with pytest.raises(ValueError, match="multiple of 32"):
        AlignHead(8, 48)


def plain_head(kind, head, feat):
    """Each projection by hand, from the head's own weights: `(B, C, h, w)` -> `(B, D, h, w)`."""
    p = dict(head.proj.named_parameters())
    cells = feat.permute(0, 2, 3, 1)  # (B, h, w, C)
    if kind == "conv1x1":
        x = torch.einsum("bhwc,dc->bdhw", cells, p["0.weight"][:, :, 0, 0])
        b, d, h, w = x.shape
        groups = x.reshape(b, 32, -1)
        x = (groups - groups.mean(2, keepdim=True)) / (
            groups.var(2, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        x = x.reshape(b, d, h, w) * p["1.weight"][:, None, None] + p["1.bias"][:, None, None]
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))
    if kind == "linear":
        mean, var = cells.mean(-1, keepdim=True), cells.var(-1, unbiased=False, keepdim=True)
        x = (cells - mean) / (var + 1e-5).sqrt() * p["0.weight"] + p["0.bias"]
        return (x @ p["1.weight"].T + p["1.bias"]).permute(0, 3, 1, 2)
    if kind == "mlp":
        x = cells @ p["0.weight"].T + p["0.bias"]
        x = (x * x.sigmoid()) @ p["2.weight"].T + p["2.bias"]
        x = (x * x.sigmoid()) @ p["4.weight"].T + p["4.bias"]
        return x.permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(feat, (1, 1, 1, 1))
    h, w = feat.shape[2:]
    return p["bias"][:, None, None] + sum(
        torch.einsum("bchw,dc->bdhw", padded[:, :, i : i + h, j : j + w], p["weight"][:, :, i, j])
        for i in range(3)
        for j in range(3)
    )


def shaken(module):
    """The module with all parameters redrawn, so that no bias is 0 and no norm an identity."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("kind", list(PROJECTIONS))
@torch.no_grad()
def test_each_head_equals_its_formula_then_upsamples(kind):
    torch.manual_seed(0)
    head = shaken(AlignHead(24, 64, kind=kind, hidden=40))
    feat = torch.randn(2, 24, 2, 3)
    projected = plain_head(kind, head, feat)
    assert projected.shape == (2, 64, 2, 3)
    up = F.interpolate(projected, (4, 6), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(head(feat, (4, 6)), F.normalize(up, dim=-1), atol=2e-6, rtol=1e-4)


def test_heads_of_the_table_have_their_sizes():
    count = {k: sum(p.numel() for p in AlignHead(1280, 1024, k).parameters()) for k in PROJECTIONS}
    assert count == {
        "conv1x1": 1280 * 1024 + 2 * 1024,
        "linear": 2 * 1280 + 1280 * 1024 + 1024,
        "mlp": (1280 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 1024,
        "conv3x3": 9 * 1280 * 1024 + 1024,
    }


@pytest.mark.parametrize("kind", list(PROJECTIONS))
def test_a_video_is_mapped_frame_by_frame(kind):
    head = AlignHead(8, 32, kind=kind, hidden=16)
    video = torch.randn(2, 8, 3, 2, 2)  # (B, C, f, h, w)
    out = head(video, (4, 4))
    assert out.shape == (2, 3 * 16, 32)
    frames = [head(video[:, :, f], (4, 4)) for f in range(3)]
    torch.testing.assert_close(out, torch.cat(frames, dim=1))


def test_spatial_norm_equals_numpy_and_keeps_no_mean_at_one():
    y = tokens(0, 3, 7, 5)
    a = y.double().numpy()
    expected = (a - 0.6 * a.mean(1, keepdims=True)) / (a.std(1, ddof=1, keepdims=True) + 1e-6)
    torch.testing.assert_close(spatial_norm(y, 0.6), torch.from_numpy(expected).float())
    assert spatial_norm(y, 1.0).mean(1).abs().max() < 1e-6
    assert spatial_norm(y.half(), 1.0).dtype == torch.float32


def test_spatial_norm_tells_tokens_apart_that_share_most():
    shared = 5 * torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    y = shared + tokens(1, 2, 9, 32)

    def within(t):
        t = F.normalize(t, dim=-1)
        return ((t @ t.mT).sum() - 2 * 9) / (2 * 9 * 8)

    assert within(y) > 0.9
    assert abs(within(spatial_norm(y, 1.0))) < 0.2


def test_alignment_loss_takes_the_teacher_through_the_norm():
    x, y = tokens(0), tokens(1)
    terms = AlignmentLoss(spatial_norm=0.5, manifold="token")({"t": x}, y)
    torch.testing.assert_close(terms["loss_token"], token_loss(x, spatial_norm(y, 0.5)))
    torch.testing.assert_close(terms["loss_manifold"], token_gram_loss(x, spatial_norm(y, 0.5)))


def test_a_manifold_weight_of_zero_computes_no_gram(monkeypatch):
    monkeypatch.setitem(alignment.MANIFOLD_LOSSES, "sample", lambda *_: pytest.fail("computed"))
    terms = AlignmentLoss(manifold_coeff=0)({"t": tokens(0)}, tokens(1))
    assert terms["loss_align"] == terms["loss_token"]
    assert "loss_manifold/t" not in terms


def _rank(rank, world, folder, upper_only, gather):
    """One process of two: its share of the batch, its loss, its gradient of a shared weight."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    x, y, weight = tokens(0, 6), tokens(1, 6), rotation(32).clone().requires_grad_()
    mine = slice(rank * 3, rank * 3 + 3)
    loss = manifold_gram_loss(x[mine] @ weight, y[mine], upper_only, gather)
    loss.backward()
    torch.save({"loss": loss.detach(), "grad": weight.grad}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("upper_only", [False, True])
def test_gathered_sample_gram_of_two_ranks_equals_one_process_with_the_whole_batch(tmp_path, upper_only):
    two_ranks(_rank, 2, str(tmp_path), upper_only, True, clean=(tmp_path / "store").unlink)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    weight = rotation(32).clone().requires_grad_()
    whole = manifold_gram_loss(tokens(0, 6) @ weight, tokens(1, 6), upper_only)
    whole.backward()
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], whole.detach())
    mean = (ranks[0]["grad"] + ranks[1]["grad"]) / 2  # what DistributedDataParallel forms
    torch.testing.assert_close(mean, weight.grad)


def test_without_gathering_each_rank_has_the_gram_of_its_own_images(tmp_path):
    two_ranks(_rank, 2, str(tmp_path), False, False, clean=(tmp_path / "store").unlink)
    for rank in range(2):
        own = slice(rank * 3, rank * 3 + 3)
        expected = manifold_gram_loss(tokens(0, 6)[own] @ rotation(32), tokens(1, 6)[own])
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)["loss"]
        torch.testing.assert_close(found, expected)


def test_gathering_alone_changes_nothing():
    assert manifold_gram_loss(tokens(0), tokens(1), gather=True).equal(
        manifold_gram_loss(tokens(0), tokens(1))
    )


@pytest.mark.parametrize("grid", [(14, 14), (3, 3), (14, 3)])
def test_cells_are_resized_in_fp32_whatever_the_networks_precision(grid):
    """In bf16, the gradient of a cell is a sum over all that it reaches; a simulation loses 0.4 % of it, fp32 0.17 %."""
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert resize_cells(x, grid).equal(resize_cells(x.float(), grid))


@pytest.mark.parametrize(
    ("cells", "grid"), [((2, 8), (5, 3)), ((7, 3), (4, 5)), ((8, 6), (3, 4)), ((2, 3), (5, 7))]
)
def test_each_direction_is_averaged_or_interpolated_by_itself_as_in_a_plain_loop(cells, grid):
    """The teacher's grid may be finer than the features from top to bottom and coarser from left to right."""
    x = torch.randn(1, 1, *cells, requires_grad=True)
    rows, columns = (weights(n, m) for n, m in zip(cells, grid, strict=True))  # (H, h), (W, w)
    found = resize_cells(x, grid)
    torch.testing.assert_close(found[0, 0], rows @ x[0, 0] @ columns.T)
    found.backward(torch.rand_like(found) + 0.1)
    assert (x.grad > 0).all()


def weights(n, m):
    """(m, n) how much of each of n cells goes into each of m, cell by cell."""
    found = torch.zeros(m, n)
    for i in range(m):
        if m <= n:
            covered = range(math.floor(i * n / m), math.ceil((i + 1) * n / m))
            for j in covered:
                found[i, j] = 1 / len(covered)
        else:
            centre = min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
            below = min(math.floor(centre), n - 2)
            found[i, below], found[i, below + 1] = below + 1 - centre, centre - below
    return found
