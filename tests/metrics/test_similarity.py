"""Properties of the alignment metrics: they read nothing where there is nothing, and equal independent references."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch

from common.errors import UserError
from metrics import embedding, probes
from metrics import similarity as alignment_metrics
from metrics.embedding import Panel, Source, embed_sources, joint_embedding
from metrics.probes import probe_accuracy, ridge_alignment
from metrics.similarity_rows import entry, nearest_timestep, row_of, value_of
from metrics.spatial import Distances, distances_on, spatial_metrics
from report.plot_alignment import plot_embedding, plot_timesteps

# CCA, CKNNA, CKA, cosine, ridge


def in_sample_cca(x, y):
    """The tempting mistake, kept as the known bad: all dimensions, fitted and reported on the same tokens."""
    q, r = (np.linalg.qr(z.reshape(-1, z.shape[-1]) - z.mean(axis=(0, 1)))[0] for z in (x, y))
    return np.linalg.svd(q.T @ r, compute_uv=False)


def tokens(rng, n=160, t=4, d=24, shared_within_image=0.7):
    """Independent images whose tokens share most of their variance, as real ones do."""
    return shared_within_image * rng.normal(size=(n, 1, d)) + 0.3 * rng.normal(size=(n, t, d))


def test_heldout_cca_of_independent_tokens_is_null_where_in_sample_cca_reads_one():
    rng = np.random.default_rng(3)
    x, y = tokens(rng, n=40, d=100), tokens(rng, n=40, d=100)
    assert in_sample_cca(x, y)[:30].mean() > 0.95
    result = alignment_metrics.heldout_cca(x, y, k=8, seed=0)
    assert abs(result["mean_rho"]) < 0.2
    assert abs(result["null_mean_rho"]) < 0.2
    assert (result["n_fit"], result["n_test"], result["k"]) == (20, 20, 8)


def test_heldout_cca_ignores_a_layout_that_all_images_share():
    rng = np.random.default_rng(4)
    layout = rng.normal(size=(1, 16, 24)) * 5
    x, y = tokens(rng, t=16) + layout, tokens(rng, t=16) + layout
    assert abs(alignment_metrics.heldout_cca(x, y, k=8, seed=0)["mean_rho"]) < 0.15


def test_heldout_cca_finds_shared_directions_through_any_linear_map():
    rng = np.random.default_rng(5)
    shared = tokens(rng, n=400, d=8)
    x = np.concatenate([shared, tokens(rng, n=400, d=8)], axis=-1) @ rng.normal(size=(16, 16))
    y = np.concatenate([shared, tokens(rng, n=400, d=12)], axis=-1) @ rng.normal(size=(20, 20))
    result = alignment_metrics.heldout_cca(x, y, k=16, seed=0)
    assert result["top_rho"] > 0.95
    assert result["mean_rho"] == pytest.approx(0.5, abs=0.08)  # 8 of 16 directions are shared
    assert abs(result["null_mean_rho"]) < 0.1
    identical = alignment_metrics.heldout_cca(x, x, k=16, seed=0)
    assert identical["mean_rho"] == pytest.approx(1.0, abs=1e-6)


def test_cca_looks_at_the_largest_components():
    rng = np.random.default_rng(14)
    shared = tokens(rng, d=4)
    x, y = (np.concatenate([shared, 0.05 * tokens(rng, d=12)], axis=-1) for _ in range(2))
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    assert alignment_metrics.heldout_cca(x @ rotation, y, k=4, seed=0)["mean_rho"] > 0.95


def test_cca_refuses_more_directions_than_there_are():
    x = tokens(np.random.default_rng(6), d=5)
    with pytest.raises(ValueError, match=r"\[1, 5\]"):
        alignment_metrics.heldout_cca(x, x, k=6, seed=0)


def test_no_image_is_paired_with_itself_in_the_null():
    rng = np.random.default_rng(7)
    for n in (2, 3, 10):
        index = np.arange(n) + 5
        moved = alignment_metrics.mispair(index, rng)
        assert sorted(moved) == sorted(index)
        assert (moved != index).all()


def test_cknna_is_one_for_rotated_features_and_null_for_independent_ones():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(200, 12))
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    same = alignment_metrics.cknna(x, 3 * x @ rotation, k=10)
    assert same["cknna"] == pytest.approx(1.0, abs=1e-9)
    assert abs(same["null_cknna"]) < 0.1
    assert abs(alignment_metrics.cknna(x, rng.normal(size=(200, 12)), k=10)["cknna"]) < 0.1


def test_cknna_equals_its_definition_by_loops():
    rng = np.random.default_rng(15)
    x = rng.normal(size=(30, 6))
    y = x + 0.7 * rng.normal(size=(30, 6))

    def masked(side, *others):
        unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (side, *others)]
        out = np.zeros((30, 30))
        for i in range(30):
            near = set(range(30))
            for z in unit:
                order = [j for j in np.argsort(-(z @ z[i])) if j != i]
                near &= set(order[:5])
            for j in near:
                out[i, j] = unit[0][i] @ unit[0][j]
        return out

    hsic = alignment_metrics._hsic_unbiased
    expected = hsic(masked(x, y), masked(y, x))
    expected /= np.sqrt(hsic(masked(x), masked(x)) * hsic(masked(y), masked(y)))
    assert 0.1 < expected < 0.95
    assert alignment_metrics.cknna(x, y, k=5)["cknna"] == pytest.approx(expected, abs=1e-12)


def test_unbiased_hsic_equals_its_definition_by_loops():
    """Song et al. 2012, eq. 4: averages over pairs, quadruples and triples of distinct images."""
    rng = np.random.default_rng(9)
    a, b = (m + m.T for m in rng.normal(size=(2, 6, 6)))
    pairs = np.mean([a[i, j] * b[i, j] for i, j in permutations(range(6), 2)])
    triples = np.mean([a[i, j] * b[i, q] for i, j, q in permutations(range(6), 3)])
    quadruples = np.mean([a[i, j] * b[q, r] for i, j, q, r in permutations(range(6), 4)])
    assert alignment_metrics._hsic_unbiased(a, b) == pytest.approx(pairs + quadruples - 2 * triples)


def test_pooling_tokens_is_average_pooling_and_exact_by_area():
    rng = np.random.default_rng(10)
    x = rng.normal(size=(2, 8 * 4, 3)).astype(np.float32)
    image = torch.from_numpy(x).view(2, 8, 4, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(image, (4, 2)).permute(0, 2, 3, 1).reshape(2, 4, 3)
    pooled = alignment_metrics.pool_tokens(x, (8, 4), (2, 2))
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-6)
    fine = rng.normal(size=(1, 14 * 14, 2))
    repeated = fine.reshape(1, 14, 14, 2).repeat(4, axis=1).repeat(4, axis=2).reshape(1, 56 * 56, 2)
    np.testing.assert_allclose(
        alignment_metrics.pool_tokens(fine, (14, 14), (8, 8)),
        alignment_metrics.pool_tokens(repeated, (56, 56), (8, 8)),
        atol=1e-12,
    )
    with pytest.raises(ValueError, match="finer"):
        alignment_metrics.pool_tokens(x, (8, 4), (8, 8))


def test_paired_cosine_needs_the_pairing():
    x = np.random.default_rng(12).normal(size=(50, 4, 32))
    assert alignment_metrics.paired_cosine(x, 3 * x) == pytest.approx(1.0)
    assert alignment_metrics.paired_cosine(x, -x) == pytest.approx(-1.0)
    assert abs(alignment_metrics.paired_cosine(x, np.roll(x, 1, axis=0))) < 0.1


def test_a_side_that_is_already_reduced_gives_the_same_cca():
    rng = np.random.default_rng(16)
    x = tokens(rng)
    y = x @ rng.normal(size=(24, 30)) + tokens(rng, d=30)
    whole = alignment_metrics.heldout_cca(x, y, k=6, seed=3)
    reduced = alignment_metrics.heldout_cca(x, alignment_metrics.reduce_tokens(y, k=6, seed=3), k=6, seed=3)
    assert whole["mean_rho"] > 0.5
    assert reduced == pytest.approx(whole)


def test_float32_tokens_are_summed_in_float64():
    """With a mean of 1000 beside a spread of 1, sums in float32 would lose the third digit."""
    rng = np.random.default_rng(17)
    x = tokens(rng)
    y = x @ rng.normal(size=(24, 24)) + tokens(rng)
    low = [(side + 1000).astype(np.float32) for side in (x, y)]
    exact = [side.astype(np.float64) for side in low]
    ours = alignment_metrics.heldout_cca(*low, k=6, seed=0)["mean_rho"]
    assert ours == pytest.approx(alignment_metrics.heldout_cca(*exact, k=6, seed=0)["mean_rho"], abs=1e-7)
    ridge, _ = ridge_alignment(*low, seed=0, ridge=0.1)
    assert ridge["r2"] == pytest.approx(ridge_alignment(*exact, seed=0, ridge=0.1)[0]["r2"], abs=1e-5)


def biased_cka(x, y):
    """The usual form, kept as the known bad: it reads high on independent data once there are many dimensions."""
    a, b = x - x.mean(axis=0), y - y.mean(axis=0)
    return np.linalg.norm(a.T @ b) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))


def test_unbiased_cka_of_independent_features_is_null_where_biased_cka_reads_high():
    rng = np.random.default_rng(18)
    x, y = rng.normal(size=(2, 200, 1024))
    assert biased_cka(x, y) > 0.8
    found = alignment_metrics.unbiased_cka(x, y)
    assert abs(found["cka"]) < 0.05
    assert abs(found["null_cka"]) < 0.05


def test_unbiased_cka_equals_its_definition_by_u_centred_kernels():
    """Nguyen et al. 2021 by way of Szekely and Rizzo 2014, entry by entry; and 1 under rotation, scale and offset."""
    rng = np.random.default_rng(19)
    x = rng.normal(size=(12, 5))
    y = np.concatenate([x[:, :2], rng.normal(size=(12, 2))], axis=1)
    n = 12

    def centred(side):
        kernel = side @ side.T
        np.fill_diagonal(kernel, 0)
        rows, total = kernel.sum(axis=1), kernel.sum()
        out = np.zeros_like(kernel)
        for i, j in permutations(range(n), 2):
            out[i, j] = kernel[i, j] - (rows[i] + rows[j]) / (n - 2) + total / ((n - 1) * (n - 2))
        return out

    a, b = centred(x), centred(y)
    expected = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    assert 0.1 < expected < 0.95
    assert alignment_metrics.unbiased_cka(x, y)["cka"] == pytest.approx(expected)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert alignment_metrics.unbiased_cka(x, 3 * x @ rotation + 100)["cka"] == pytest.approx(1)
    assert np.isnan(alignment_metrics.unbiased_cka(x, np.ones((12, 3)))["cka"])


def test_ridge_recovers_a_linear_map_on_images_it_was_not_fitted_on():
    rng = np.random.default_rng(11)
    x = tokens(rng, d=6)
    y = x @ rng.normal(size=(6, 9)) + rng.normal(size=9)
    index = alignment_metrics.split_by_image(len(x), 0)[1]
    exact, projected = ridge_alignment(x, y, seed=0, ridge=0.0)
    np.testing.assert_allclose(projected, y[index], atol=1e-8)
    assert (exact["cosine"], exact["r2"]) == pytest.approx((1, 1))
    found, loose = ridge_alignment(x, y, seed=0)
    assert found["cosine"] > 0.99
    assert abs(found["null_r2"]) < 0.2
    assert found["null_cosine"] < found["cosine"] - 0.1
    y[index] = 0.0  # the test half's answers must not matter
    _, blind = ridge_alignment(x, y, seed=0)
    np.testing.assert_array_equal(blind, loose)


def test_a_ridge_map_of_few_images_with_many_channels_is_null_where_a_small_penalty_overfits():
    rng = np.random.default_rng(29)
    x, y = tokens(rng, n=80, d=120), tokens(rng, n=80, d=20)
    small, _ = ridge_alignment(x, y, seed=0, ridge=1e-2)
    assert small["r2"] < -0.3  # the known bad
    chosen, _ = ridge_alignment(x, y, seed=0)
    assert chosen["r2"] == pytest.approx(0, abs=0.05)
    assert chosen["null_r2"] == pytest.approx(0, abs=0.05)


def test_the_penalty_is_the_best_of_the_ladder_on_images_held_back():
    """The error that sums of products tell is that of predictions, for every penalty."""
    rng = np.random.default_rng(30)
    x = rng.normal(size=(40, 6))
    y = x @ rng.normal(size=(6, 3)) + 4 * rng.normal(size=(40, 3))
    a, b, c, d = x[:12], y[:12], x[12:], y[12:]
    errors = {}
    for penalty in probes.RIDGE_PENALTIES:
        strength = penalty * np.trace(a.T @ a) / 6
        weights = np.linalg.solve(a.T @ a + strength * np.eye(6), a.T @ b)
        errors[penalty] = ((c @ weights - d) ** 2).sum()
    best = min(errors, key=errors.get)
    assert 1e-3 < best < 1e3
    assert probes._best(np.linalg.eigh(a.T @ a), a.T @ b, c.T @ c, c.T @ d) == best


def test_ridge_equals_scikit_learns():
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    rng = np.random.default_rng(20)
    x, noise = tokens(rng, d=6), tokens(rng, d=9)
    y = x @ rng.normal(size=(6, 9)) + noise
    fit, test = alignment_metrics.split_by_image(len(x), 2)
    a, b, c, d = (z.reshape(-1, z.shape[-1]) for z in (x[fit], y[fit], x[test], y[test]))
    strength = 0.05 * len(a) * a.var(axis=0).mean()
    theirs = Ridge(alpha=strength).fit(a, b).predict(c)
    found, projected = ridge_alignment(x, y, seed=2, ridge=0.05)
    np.testing.assert_allclose(projected.reshape(theirs.shape), theirs, atol=1e-8)
    assert found["r2"] == pytest.approx(r2_score(d, theirs, multioutput="variance_weighted"), abs=0.02)
    assert found["cosine"] == pytest.approx(
        torch.cosine_similarity(*map(torch.tensor, (theirs, d))).mean().item()
    )


# Spatial metrics


def spatial_by_loops(image, width, far, reach):
    """One image's LDS, CDS and RMSC, pair by pair."""
    unit = [token / np.linalg.norm(token) for token in image]
    at = {}
    for p, u in enumerate(unit):
        for q, v in enumerate(unit):
            distance = abs(p // width - q // width) + abs(p % width - q % width)
            at.setdefault(distance, []).append(float(u @ v))
    distant = [cosine for distance, found in at.items() if distance >= far for cosine in found]
    means = [np.mean(at[d]) for d in range(1, reach + 1)]
    centre = np.mean(unit, axis=0)
    return (
        np.mean(at[1]) - np.mean(distant),
        -np.polynomial.Polynomial.fit(range(1, reach + 1), means, 1).convert().coef[1],
        np.sqrt(np.mean([((u - centre) ** 2).sum() for u in unit])),
    )


def smooth_images(rng, n, side, d=6):
    """Tokens that change slowly over the grid."""
    rows, columns = np.divmod(np.arange(side * side), side)
    waves = [np.cos(2 * (rows * a + columns * b) / side) for a, b in ((1, 0), (0, 1), (1, 1))]  # (T,) each
    return np.einsum("kt,nkd->ntd", waves, rng.normal(size=(n, 3, d))) + 0.2 * rng.normal(
        size=(n, side**2, d)
    )


@pytest.mark.parametrize(("side", "far", "reach"), [(16, 6, 8), (8, 3, 4), (14, 5, 7), (4, 2, 2)])
def test_spatial_metrics_equal_plain_loops_with_irepas_constants_and_scaled_ones(side, far, reach):
    images = smooth_images(np.random.default_rng(21), 3, side)
    assert distances_on((side, side)) == Distances(far, reach)
    expected = np.mean([spatial_by_loops(image, side, far, reach) for image in images], axis=0)
    found = spatial_metrics(images, (side, side), seed=0)
    assert [found[name]["value"] for name in ("lds", "cds", "rmsc")] == pytest.approx(list(expected))
    assert expected[0] > 0.1


def test_quantities_that_a_small_grid_does_not_have_are_none():
    x = np.random.default_rng(22).normal(size=(5, 9, 4))
    assert distances_on((2, 2)) == distances_on((2, 16)) == Distances(None, None)
    assert distances_on((3, 3)) == Distances(None, 2)
    found = spatial_metrics(x, (3, 3), seed=0)
    assert found["lds"] == {"value": None, "null": None}
    assert found["cds"]["value"] is not None
    assert spatial_metrics(x[:, :4], (2, 2), seed=0)["rmsc"]["value"] > 0
    with pytest.raises(ValueError, match=r"\(N, 4\*4, D\)"):
        spatial_metrics(x, (4, 4), seed=0)


def test_shuffled_positions_have_no_spatial_structure_and_rmsc_needs_none():
    images = smooth_images(np.random.default_rng(23), 60, 8)
    found = spatial_metrics(images, (8, 8), seed=0)
    assert found["lds"]["value"] > 0.2
    assert abs(found["lds"]["null"]) < 0.02
    assert found["cds"]["value"] > 0.05
    assert abs(found["cds"]["null"]) < 0.01
    order = np.random.default_rng(0).permutation(64)
    assert spatial_metrics(images[:, order], (8, 8), seed=0)["rmsc"] == pytest.approx(found["rmsc"])
    same = np.repeat(images[:, :1], 64, axis=1) * np.arange(1, 65)[:, None]  # equal but for their lengths
    assert spatial_metrics(same, (8, 8), seed=0)["rmsc"]["value"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("h", "w"), [(4, 8), (8, 4)])
def test_a_grid_that_is_not_square_is_read_row_by_row_and_scaled_by_its_shorter_side(h, w):
    rows, columns = np.divmod(np.arange(h * w), w)
    wave = np.stack([np.cos(rows), np.sin(rows), columns / w], axis=1)  # (T, 3)
    images = wave + 0.1 * np.random.default_rng(24).normal(size=(2, h * w, 3))
    expected = np.mean([spatial_by_loops(image, w, 2, 2) for image in images], axis=0)
    found = spatial_metrics(images, (h, w), seed=0)
    assert [found[name]["value"] for name in ("lds", "cds", "rmsc")] == pytest.approx(list(expected))


# Linear probe


def test_the_probe_reads_separable_classes_and_is_at_chance_for_shuffled_ones():
    rng = np.random.default_rng(25)
    classes = np.arange(200) % 8
    features = np.eye(8)[classes] @ rng.normal(size=(8, 300)) + 0.01 * rng.normal(size=(200, 300))
    found = probe_accuracy(features, classes, seed=0)
    assert found["accuracy"] == 1
    assert found["null_accuracy"] == pytest.approx(1 / 8, abs=0.08)
    assert found["chance"] == pytest.approx(1 / 8, abs=0.06)
    assert (found["num_classes"], found["n_fit"], found["n_test"]) == (8, 100, 100)
    blind = probe_accuracy(features, rng.permutation(classes), seed=0)
    assert blind["accuracy"] == pytest.approx(1 / 8, abs=0.12)


def test_the_probe_sees_no_image_of_the_other_half():
    rng = np.random.default_rng(26)
    classes = np.arange(120) % 3
    features = rng.normal(size=(120, 200))  # enough dimensions to learn 120 labels by heart
    assert probe_accuracy(features, classes, seed=0)["accuracy"] < 0.6


def test_only_classes_with_enough_images_are_probed():
    features = np.random.default_rng(27).normal(size=(60, 5))
    assert probe_accuracy(features, np.arange(60) // 3, seed=0) is None  # three images of each
    mixed = np.where(
        np.arange(60) < 40, np.arange(60) % 2, 2 + np.arange(60)
    )  # two classes, twenty single images
    found = probe_accuracy(features, mixed, seed=0)
    assert (found["num_classes"], found["n_fit"] + found["n_test"]) == (2, 40)


# Embedding


def test_a_joint_embedding_is_reproducible_and_lays_equal_tokens_on_each_other():
    x = np.random.default_rng(13).normal(size=(30, 8))
    first = joint_embedding(x, 2 * x, 0)
    assert first.shape == (2, 30, 2)
    np.testing.assert_array_equal(first, joint_embedding(x, 2 * x, 0))
    nearest = np.linalg.norm(first[0][:, None] - first[1][None], axis=-1).argmin(axis=1)
    assert (nearest == np.arange(30)).mean() > 0.9


def test_centring_takes_away_what_only_separates_the_sources(monkeypatch):
    monkeypatch.setattr(embedding, "TOKENS", 400)  # all of them
    rng = np.random.default_rng(28)
    teacher = rng.normal(size=(40, 4, 8))
    offset = Source(teacher + 20 * rng.normal(size=8), teacher, np.arange(40) % 12)
    panels = embed_sources({"a": offset}, seed=0)["a"]
    raw, centred = panels["raw"].numbers, panels["centred"].numbers
    assert raw["paired_cosine"] < 0.4 < 0.8 < centred["paired_cosine"]
    assert raw["paired_cosine"] - raw["null_paired_cosine"] < 0.2
    assert (raw["tokens"], raw["cknna_images"]) == (4 * raw["images"], 40)
    assert len(np.unique(panels["raw"].classes)) == 10
    np.testing.assert_array_equal(panels["raw"].classes, panels["centred"].classes)


def test_umap_that_is_not_installed_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setattr(embedding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        embedding.check_installed("umap")
    embedding.check_installed("tsne")


def panel(n=6, classes=3):
    points = np.random.default_rng(1).normal(size=(2, n, 2))
    names = (
        "paired_cosine",
        "null_paired_cosine",
        "cknna",
        "null_cknna",
        "cknna_images",
        "cknna_k",
        "tokens",
        "images",
    )
    return Panel(*points, np.arange(n) % classes, dict.fromkeys(names, 0.5))


def test_the_embedding_is_drawn_beside_its_coordinates_and_numbers(tmp_path):
    drawn = {"raw": panel(), "centred": panel()}
    plot_embedding(tmp_path / "e.png", {"a": drawn}, {0: "zero"})
    content = json.loads((tmp_path / "e.json").read_text())["sources"]["a"]
    np.testing.assert_allclose(content["centred"]["teacher"], panel().teacher)
    assert "paired cosine 0.50 (random pairs 0.50)" in content["raw"]["caption"]
    with pytest.raises(ValueError, match="1 to 10"):
        plot_embedding(tmp_path / "x.png", {"a": {"raw": panel(11, 11), "centred": panel(11, 11)}}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"e.png", "e.json"}


# Rows of align.json


def result_of(models=("run", "base"), value=0.5):
    metrics = {"cknna": entry(value, 0.01), "cca": entry(None, None)}
    rows = [
        {"model": model, "tap": tap, "timestep": t, "features": "tap", "metrics": metrics}
        for model in models
        for tap in ("mid", "dec_first")
        for t in (50, 250)
    ]
    return {
        "taps": ["mid", "dec_first"],
        "main_tap": "mid",
        "timesteps": [50, 250],
        "num_timesteps": 1000,
        "rows": rows,
    }


def test_rows_are_found_by_what_they_are_and_missing_ones_are_none():
    result = result_of()
    result["rows"][1]["metrics"] = {"cknna": entry(0.25, 0.125)}
    assert value_of(result, "cknna") == 0.25  # the run's mid tap at 250
    assert value_of(result, "cknna", "null") == 0.125
    assert value_of(result, "cknna", model="base", tap="dec_first", timestep=50) == 0.5
    assert row_of(result, features="head") is None
    assert value_of(result, "cosine", features="head") is None
    assert value_of(result, "cca") is None
    assert entry(float("nan"), np.inf, n=3) == {"value": None, "null": None, "n": 3}
    assert nearest_timestep([50, 200, 300, 750]) == 200


@pytest.mark.parametrize("models", [("run", "base"), ("base",)])
def test_the_figure_of_timesteps_says_what_the_rows_say(tmp_path, models):
    plot_timesteps(tmp_path / "t.png", result_of(models))
    drawn = json.loads((tmp_path / "t.json").read_text())
    assert set(drawn["metrics"]["cknna"]) == set(models)
    assert drawn["metrics"]["cknna"]["base"]["mid"] == {"null": [0.01, 0.01], "value": [0.5, 0.5]}
    assert drawn["metrics"]["cca"]["base"]["mid"]["value"] == [None, None]
