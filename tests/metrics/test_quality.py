"""Properties of the metrics, against torch-fidelity, clean-fid, scipy, and loops of three lines, on random weights."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid.fid import compute_fid
from small_inception import DIM, SmallInception, picture_folder, pictures, small_extractors
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation.image_files import load_images
from metrics import quality as metrics
from metrics.features import Features, FeatureSet
from metrics.moments import Moments, frechet_distance
from metrics.reference import Reference, ReferenceBuilder

N = 60


def moments(x, parts=1):
    total = Moments()
    for part in np.array_split(x, parts):
        total.update(part)
    return total


def normal(n, d, seed, mean=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * rng.uniform(0.5, 2, size=d) + mean).astype(np.float32)


# The upstream libraries, from the same PNG files


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return (
        picture_folder(root / "samples", pictures(N, 0)),
        picture_folder(root / "real", pictures(N + 10, 1, tint=(25, -10, 5))),
    )


@pytest.fixture(scope="module")
def theirs(folders):
    return calculate_metrics(
        input1=folders[0], input2=folders[1], fid=True, isc=True, kid=True, prc=True, kid_subset_size=40, isc_splits=4,
        samples_shuffle=False, feature_extractor="small-inception", cuda=False, cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ours(folders):
    """{protocol: (features of the samples, features of the real images)}."""
    sets = [load_images(folder, range(n)) for folder, n in zip(folders, (N, N + 10), strict=True)]
    return {e.protocol: [e.features(images, batch_size=16) for images in sets] for e in small_extractors()}


def test_fid_equals_torch_fidelitys(ours, theirs):
    samples, real = ours["adm"]
    fid = frechet_distance(moments(samples.pool, 3), moments(real.pool, 2))
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_fid_equals_clean_fids(ours, folders):
    network = SmallInception("small-inception", ["2048"])
    expected = compute_fid(
        *folders, custom_feat_extractor=network.pool, mode="clean", device=torch.device("cpu"), num_workers=0,
        use_dataparallel=False, verbose=False,
    )  # fmt: skip
    samples, real = ours["clean"]
    assert frechet_distance(moments(samples.pool), moments(real.pool)) == pytest.approx(expected, rel=1e-6)
    adm = frechet_distance(*(moments(features.pool) for features in ours["adm"]))
    assert adm != pytest.approx(expected, rel=1e-3)  # the two columns are not interchangeable


def test_inception_score_equals_torch_fidelitys_on_equal_splits(ours, theirs):
    mean, error = metrics.inception_score(ours["adm"][0].logits, split_size=N // 4)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert error == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    assert mean > 1.001


def test_kid_equals_torch_fidelitys(ours, theirs):
    samples, real = ours["adm"]
    mean, error = metrics.kid(samples.pool, real.pool, subset_size=40)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert error == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)


def test_precision_and_recall_equal_torch_fidelitys(ours, theirs):
    samples, real = ours["adm"]
    found = metrics.precision_recall(samples.pool, real.pool)
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0 < found[1] != found[0] < 1


# Moments and the Fréchet distance


def test_streaming_moments_equal_numpy_on_the_whole():
    """With a mean of 1e6, where sums of squares in float64 would be wrong in the third digit."""
    x = np.random.default_rng(0).normal(size=(501, 7)) @ np.diag(np.arange(1, 8)) + 1e6
    streamed = moments(x, parts=9)
    assert streamed.count == 501
    np.testing.assert_allclose(streamed.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(streamed.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_split_over_processes_equal_those_of_one():
    x = normal(101, 6, 0, mean=1e3)
    whole, parts = moments(x), [moments(x[rank::3]) for rank in range(3)]
    together = Moments().merge(parts[0]).merge(parts[1]).merge(Moments()).merge(parts[2])
    assert together.count == 101
    np.testing.assert_allclose(together.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(together.cov, whole.cov, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(parts[0].cov, moments(x[0::3]).cov)  # not what another merged into


def test_moments_refuse_foreign_and_infinite_features():
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        moments(np.eye(3)).update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        Moments().update(np.array([[np.inf, 0.0]]))
    with pytest.raises(ValueError, match="needs 2"):
        _ = Moments().update(np.zeros((1, 4))).cov
    with pytest.raises(ValueError, match="3 and 4"):
        moments(np.eye(3)).merge(moments(np.eye(4)))
    given = Moments.of(np.zeros(4), np.eye(4), None)
    for continued in (lambda: given.update(np.eye(4)), lambda: Moments().merge(given)):
        with pytest.raises(ValueError, match="given"):
            continued()
    with pytest.raises(ValueError, match="not finite"):
        Moments.of(np.zeros(2), np.full((2, 2), np.nan), 9)


def test_frechet_distance_equals_the_closed_form_for_commuting_covariances():
    s, t = np.array([1.0, 4.0, 9.0, 0.25]), np.array([4.0, 1.0, 16.0, 0.25])
    a, b = Moments.of(np.zeros(4), np.diag(s), 9), Moments.of([1.0, 0.0, -2.0, 0.0], np.diag(t), None)
    expected = 5.0 + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("n", [200, 20])
def test_frechet_distance_equals_sqrtm_also_with_fewer_images_than_dimensions(n):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(n, 30)), rng.normal(size=(n, 30)) @ rng.normal(size=(30, 30)) * 0.2 + 0.1
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    offset = 1e-12 * np.eye(30)  # sqrtm itself is unreliable on singular products
    root = scipy.linalg.sqrtm((s + offset) @ (t + offset)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("n", [200, 20])
def test_the_root_of_a_covariance_is_computed_once_and_anew_after_more_features(n, monkeypatch):
    x = normal(n, 30, 0).astype(np.float64)
    reference = moments(x)
    np.testing.assert_allclose(reference.root @ reference.root.T, reference.cov, atol=1e-10)
    with monkeypatch.context() as patch:
        for solver in ("cholesky", "eigh"):
            patch.delattr(np.linalg, solver)
        frechet_distance(moments(2 * x), reference)
    reference.update(3 * x + 1)
    np.testing.assert_allclose(reference.root @ reference.root.T, reference.cov, atol=1e-10)


def test_sfid_needs_the_order_of_channels_that_adm_has(ours):
    """A reference of ADM's suite is NHWC. Flattened as CHW the same features are other coordinates: the known bad."""
    samples, real = (features.spatial for features in ours["adm"])
    assert samples.shape[1] == 17 * 17 * 7 == 2023
    channels_first = samples.reshape(-1, 17, 17, 7).transpose(0, 3, 1, 2).reshape(N, -1)
    keep = np.random.default_rng(0).choice(2023, 400, replace=False)  # all of them would take seconds
    right, wrong = (
        frechet_distance(moments(x[:, keep]), moments(real[:, keep])) for x in (samples, channels_first)
    )
    assert wrong > 1.5 * right


# Definitions, by loops


def test_precision_and_recall_equal_their_definition_by_loops():
    x, y = normal(50, 5, 0), normal(70, 5, 1, mean=1.0)

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[3 - 1]

    def covered(points, others):
        radii = [radius(others, j) for j in range(len(others))]
        inside = [any(np.linalg.norm(p - o) <= r for o, r in zip(others, radii, strict=True)) for p in points]
        return np.mean(inside)

    found = metrics.precision_recall(x, y)
    assert found == pytest.approx((covered(x, y), covered(y, x)), abs=1e-12)
    assert found[0] != found[1]


def test_precision_and_recall_do_not_depend_on_blocks_or_on_an_offset(monkeypatch):
    x, y = normal(53, 5, 0), normal(70, 5, 1, mean=1.0)
    whole = metrics.precision_recall(x, y)
    assert (
        metrics.precision_recall(x + 5000, y + 5000) == whole
    )  # |x|² + |y|² - 2 x·y would have lost its digits
    monkeypatch.setattr(metrics, "ROWS", 7)
    assert metrics.precision_recall(x, y) == whole
    with pytest.raises(ValueError, match="neighbours"):
        metrics.precision_recall(x[:3], y)


def test_identical_sets_have_full_precision_and_recall_and_foreign_ones_none():
    x = normal(40, 5, 0)
    assert metrics.precision_recall(x, x) == (1.0, 1.0)
    assert metrics.precision_recall(x, x + 1e3) == (0.0, 0.0)


def test_inception_score_equals_adms_definition_with_a_shorter_last_split():
    logits = normal(23, 6, 0) * 2
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for start in range(0, 23, 10):
        part = p[start : start + 10]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1).mean()))
    mean, error = metrics.inception_score(logits, split_size=10)
    assert (mean, error) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    assert metrics.inception_score(logits)[1] is None  # one split has no spread


def test_inception_score_is_exact_and_finite_for_certain_images():
    certain = np.eye(8, dtype=np.float32)[np.arange(80) % 8] * 2000
    assert metrics.inception_score(certain)[0] == pytest.approx(8.0)
    assert metrics.inception_score(np.zeros((9, 4)))[0] == pytest.approx(1.0)


def test_images_sorted_by_class_ruin_adms_inception_score_but_not_the_fid():
    """The trap: 298 became 62 in guided-diffusion's issue 165."""
    certain = np.eye(8, dtype=np.float32)[np.arange(80) % 8] * 30
    ordered = certain[np.argsort(certain.argmax(axis=1), kind="stable")]
    assert metrics.inception_score(certain, split_size=20)[0] > 7
    assert metrics.inception_score(ordered, split_size=20)[0] < 3
    theirs = [
        isc_features_to_metric(torch.from_numpy(x), 4)["inception_score_mean"] for x in (certain, ordered)
    ]
    assert min(theirs) > 5  # torch-fidelity shuffles
    np.testing.assert_allclose(moments(ordered).cov, moments(certain).cov, atol=1e-9)


KERNEL = {
    "kid_kernel": "poly",
    "kid_kernel_poly_degree": 3,
    "kid_kernel_poly_gamma": None,
    "kid_kernel_poly_coef0": 1,
}


def test_kid_is_torch_fidelitys_to_the_last_bit():
    x, y = normal(70, 6, 0), normal(90, 6, 1, mean=0.2)
    for size in (50, 70):
        expected = kid_features_to_metric(
            torch.from_numpy(x), torch.from_numpy(y), kid_subsets=100, kid_subset_size=size, rng_seed=2020, verbose=False,
            **KERNEL,
        )  # fmt: skip
        assert metrics.kid(x, y, subset_size=size) == tuple(expected.values())
    assert metrics.kid(x, y) == metrics.kid(x, y, subset_size=70)


def test_kid_is_unbiased_where_the_frechet_distance_is_not():
    same = [(normal(60, 6, 2 * i), normal(60, 6, 2 * i + 1)) for i in range(30)]
    same = [(x / x.std(0), y / y.std(0)) for x, y in same]
    values = [metrics.kid(x, y, subsets=1)[0] for x, y in same]
    assert abs(np.mean(values)) < 3 * np.std(values) / len(values) ** 0.5
    assert metrics.kid(*same[0], subsets=2)[1] is None  # each subset is the whole
    distances = [frechet_distance(moments(x), moments(y)) for x, y in same]
    assert np.mean(distances) > 10 * np.std(distances) / len(distances) ** 0.5


def test_precision_and_recall_say_which_is_which():
    """Samples of one of two modes: precise, but half of the real images are missed."""
    real = np.concatenate([normal(100, 4, 0), normal(100, 4, 1, mean=50.0)])
    precision, recall = metrics.precision_recall(normal(100, 4, 2), real)
    theirs = prc_features_to_metric(
        torch.from_numpy(normal(100, 4, 2)), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=1000,
        save_cpu_ram=False, verbose=False,
    )  # fmt: skip
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert precision > 0.8 > 0.55 > recall


# Errors and the whole


def test_bootstrap_equals_distances_of_resampled_images():
    x, reference = normal(80, 5, 0, mean=2.0), moments(normal(300, 5, 1))
    rng, distances = np.random.default_rng(3), []
    for _ in range(6):
        distances.append(frechet_distance(moments(x[rng.integers(80, size=80)]), reference))
    found = metrics.bootstrap_fd(x, reference, 6, seed=3)
    assert found == pytest.approx(np.std(distances, ddof=1), rel=1e-8)
    with pytest.raises(ValueError, match="2 resamples"):
        metrics.bootstrap_fd(x, reference, 1)


def test_bootstrap_is_about_the_spread_over_other_images_also_with_fewer_than_dimensions():
    reference = moments(normal(3000, 8, 100))
    scale = np.random.default_rng(100).uniform(0.5, 2, size=8)
    draws = [np.random.default_rng(i).normal(size=(200, 8)) * scale + 0.7 for i in range(60)]
    truth = np.std([frechet_distance(moments(x), reference) for x in draws], ddof=1)
    found = np.mean([metrics.bootstrap_fd(x, reference, 10, seed=i) for i, x in enumerate(draws[:20])])
    assert found == pytest.approx(truth, rel=0.3)
    assert 0 < metrics.bootstrap_fd(normal(10, 40, 0), moments(normal(200, 40, 1)), 4) < np.inf


def test_names_tell_the_protocol_and_the_number_of_images():
    names = [metrics.metric_name("adm", "fid", n) for n in (300, 2500, 10_000, 50_000)]
    assert names == ["adm_fid300", "adm_fid2500", "adm_fid10k", "adm_fid50k"]


@pytest.fixture(scope="module")
def references(ours):
    found = {}
    for extractor in small_extractors():
        real = ours[extractor.protocol][1]
        builder = ReferenceBuilder(len(real), seed=1)
        found[extractor.protocol] = builder.add(real, np.arange(len(real))).finish(extractor, {})
    return found


def test_a_score_holds_everything_its_protocol_offers_and_how_sure_it_is(ours, references):
    samples, real = ours["adm"]
    found = metrics.score(FeatureSet().add(samples), references["adm"], n=N, bootstrap=2, seed=5)
    assert list(found) == [f"adm_{name}{N}" for name in ("fid", "sfid", "is", "precision", "recall", "kid")]
    kinds = {name.removeprefix("adm_").removesuffix(str(N)): row["error_kind"] for name, row in found.items()}
    assert kinds == {
        "fid": "bootstrap", "sfid": None, "is": None, "precision": None, "recall": None, "kid": "subsets"
    }  # fmt: skip
    for row in found.values():
        assert set(row) == {"value", "error", "error_kind", "notes"}
        assert (row["error"] is None) == (row["error_kind"] is None)
    pool = moments(real.pool)
    assert found[f"adm_fid{N}"]["value"] == pytest.approx(frechet_distance(moments(samples.pool), pool))
    assert found[f"adm_fid{N}"]["error"] == pytest.approx(metrics.bootstrap_fd(samples.pool, pool, 2, 5))
    sfid = frechet_distance(moments(samples.spatial), moments(real.spatial))
    assert found[f"adm_sfid{N}"]["value"] == pytest.approx(sfid, rel=1e-6)
    assert "2023 dimensions" in found[f"adm_sfid{N}"]["notes"][0]
    assert found[f"adm_kid{N}"]["notes"] == [f"subsets of {N}, not 1000"]
    precision, recall = metrics.precision_recall(samples.pool, real.pool)
    assert (found[f"adm_precision{N}"]["value"], found[f"adm_recall{N}"]["value"]) == (precision, recall)
    json.dumps(found, allow_nan=False)

    clean = metrics.score(FeatureSet().add(ours["clean"][0]), references["clean"], n=N, bootstrap=0)
    assert list(clean) == [f"clean_fid{N}", f"clean_kid{N}"]
    assert clean[f"clean_fid{N}"]["error"] is None
    with pytest.raises(ValueError, match="61 images were asked for"):
        metrics.score(FeatureSet().add(samples), references["adm"], n=N + 1)


def test_what_a_reference_cannot_answer_is_left_out():
    real = moments(normal(50, DIM, 0))
    reference = Reference("r.npz", "adm", real, None, None, None, {})
    features = Features(normal(30, DIM, 1), normal(30, 4, 2), normal(30, 9, 3))
    found = metrics.score(FeatureSet().add(features), reference, n=30, bootstrap=0)
    assert list(found) == ["adm_fid30", "adm_is30"]


def test_a_classifier_also_counts_hits():
    reference = Reference("r.npz", "classifier", moments(normal(50, 6, 0)), None, normal(50, 6, 0), None, {})
    labels = np.arange(30) % 3
    features = FeatureSet().add(Features(normal(30, 6, 1), normal(30, 3, 2), None, labels))
    found = metrics.score(features, reference, n=30, bootstrap=0, intended=np.zeros(30, int))
    assert list(found) == [
        f"classifier_{name}30" for name in ("fd", "is", "precision", "recall", "kid", "accuracy")
    ]
    assert found["classifier_accuracy30"]["value"] == pytest.approx(1 / 3)


def test_class_accuracy_is_the_share_of_hits():
    assert metrics.class_accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75
    with pytest.raises(ValueError, match="labels"):
        metrics.class_accuracy(np.array([0, 1]), np.array([0]))


def test_the_class_that_a_caption_names_is_found_by_whole_words():
    names = ["one", "two", "moving left"]
    prompts = ["a two", "One, bold", "stones moving left", "a two"]
    assert metrics.named_classes(prompts, names).tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize("prompt", ["a stone", "one or two", ""])
def test_captions_that_name_no_class_or_several_have_none(prompt):
    assert metrics.named_classes(["a one", prompt], ["one", "two"]) is None
