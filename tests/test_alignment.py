import pytest
import torch
import torch.nn.functional as F

from models.alignment import AlignHead, both_grams_loss, manifold_gram_loss, token_gram_loss, token_loss

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


@pytest.mark.parametrize("loss", [token_loss, *GRAMS, both_grams_loss])
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


@pytest.mark.parametrize("loss", [token_loss, *GRAMS])
def test_losses_compute_in_fp32_under_autocast(loss):
    x, y = tokens(0), tokens(1)
    plain = loss(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(x, y).equal(plain)
    assert loss(x.half(), y).dtype == torch.float32


def test_head_projects_first_then_upsamples_then_normalises():
    head = AlignHead(8, 32, grid=(4, 6))
    feat = torch.randn(2, 8, 2, 3)
    with torch.no_grad():
        projected = head.proj(feat)  # on the U-Net's own 2×3 cells
        expected = (
            F.interpolate(projected, (4, 6), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        )
        out = head(feat)
        other_order = head.proj(F.interpolate(feat, (4, 6), mode="bilinear", align_corners=False))
    assert out.shape == (2, 24, 32)
    torch.testing.assert_close(out, F.normalize(expected, dim=-1))
    assert not torch.allclose(out, F.normalize(other_order.flatten(2).transpose(1, 2), dim=-1))
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 24))


def test_head_of_the_plan_has_its_shapes_and_its_parameters():
    head = AlignHead(1280, 1024, grid=14)
    assert head(torch.randn(1, 1280, 8, 8)).shape == (1, 196, 1024)
    assert sum(p.numel() for p in head.parameters()) == 1280 * 1024 + 2 * 1024  # no bias in the projection


def test_head_tokens_run_row_by_row():
    head = AlignHead(4, 32, grid=(2, 3))
    feat = torch.zeros(1, 4, 2, 3)
    feat[0, :, 0, 2] = 1  # row 0, column 2: the third token
    out = head(feat)[0]  # (6, 32)
    assert all(out[i].equal(out[0]) == (i != 2) for i in range(6))


def test_head_refuses_a_width_that_its_group_norm_cannot_split():
    with pytest.raises(ValueError, match="multiple of 32"):
        AlignHead(8, 48, grid=2)
