"""Properties of cached references, ADM's files among them, and of images streamed in ADM's format."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_inception import DIM, pictures, small_extractors

from common.errors import UserError
from metrics import reference as reference_module
from metrics.features import Features
from metrics.moments import Moments, frechet_distance
from metrics.npz_images import iterate_npz_images, npz_image_shape, write_npz_images
from metrics.reference import ReferenceBuilder, load_reference

IMAGES = pictures(24, 0)
FACTS = {"source": "pictures", "split": "train", "crop": "centre", "size": 48}


@pytest.fixture(scope="module")
def adm():
    return small_extractors()[0]


@pytest.fixture(scope="module")
def features(adm):
    return adm.features(IMAGES)


@pytest.fixture
def saved(adm, features, tmp_path):
    reference = ReferenceBuilder(24).add(features, np.arange(24)).finish(adm, FACTS, "real.npz")
    reference.save(tmp_path / "real.npz")
    return tmp_path / "real.npz", reference


def part(features, chosen):
    return Features(features.pool[chosen], None, features.spatial[chosen])


# References


def test_a_reference_comes_back_from_its_file(adm, features, saved):
    path, made = saved
    read = load_reference(path, adm, FACTS)
    for mine, theirs in ((made.pool, read.pool), (made.spatial, read.spatial)):
        np.testing.assert_array_equal(mine.mean, theirs.mean)
        np.testing.assert_array_equal(mine.cov, theirs.cov)
    np.testing.assert_allclose(read.pool.cov, np.cov(features.pool, rowvar=False), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(read.spatial.cov, np.cov(features.spatial, rowvar=False), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(read.features, features.pool)
    assert read.distance_of_halves == made.distance_of_halves > 0
    assert read.identity == made.identity
    assert read.metadata == {**adm.identity, **FACTS, "num_images": 24, "code_version": 1}


def test_the_file_has_adms_keys_and_no_objects(saved, adm):
    with np.load(saved[0], allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "features", "metadata"} <= set(file)
        shapes = [file[key].shape for key in ("mu", "sigma", "mu_s", "sigma_s")]
        assert {file[key].dtype for key in ("mu", "sigma", "mu_s", "sigma_s")} == {np.dtype(np.float64)}
        metadata = json.loads(str(file["metadata"]))
    assert shapes == [(DIM,), (DIM, DIM), (2023,), (2023, 2023)]
    assert {"num_images", "resize", "crop", "size", "weights_sha256", "layout", "split", "source"} <= set(
        metadata
    )
    assert {"code_version", "protocol"} <= set(metadata)


def test_a_reference_split_over_processes_equals_that_of_one(adm, features):
    one = ReferenceBuilder(24, kept=9).add(features, np.arange(24)).finish(adm, FACTS)
    ranks = [ReferenceBuilder(24, kept=9) for _ in range(3)]
    for rank, builder in enumerate(ranks):
        for indices in np.array_split(np.arange(24)[rank::3], 2):
            builder.add(part(features, indices), indices)
    together = ranks[1].merge(ranks[2]).merge(ranks[0]).finish(adm, FACTS)
    np.testing.assert_allclose(together.pool.cov, one.pool.cov, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(together.spatial.cov, one.spatial.cov, rtol=1e-7, atol=1e-10)
    np.testing.assert_array_equal(together.features, one.features)
    assert together.distance_of_halves == pytest.approx(one.distance_of_halves, rel=1e-6)
    assert one.features.shape == (9, DIM)


def test_kept_features_and_halves_are_spread_over_sorted_files(adm):
    by_class = np.repeat(np.arange(10), 100).astype(np.float32)  # files sorted by class
    pool = np.stack([by_class, -by_class], axis=1)
    builder = ReferenceBuilder(1000, kept=100).add(Features(pool), np.arange(1000))
    reference = builder.finish(adm, {})
    counts = np.bincount(reference.features[:, 0].astype(int), minlength=10)
    assert len(reference.features) == 100
    assert counts.min() >= 3
    assert reference.distance_of_halves < 0.1 * frechet_distance(
        Moments().update(pool[:500]), Moments().update(pool[500:])
    )
    assert reference.spatial is None


def test_each_image_counts_once_and_none_is_missing(adm, features):
    builder = ReferenceBuilder(24).add(part(features, slice(0, 9)), np.arange(9))
    for indices in (np.arange(8, 17), np.array([20] * 9), np.arange(9, 17)):
        with pytest.raises(ValueError, match="once"):
            builder.add(part(features, slice(0, 9)), indices)
    with pytest.raises(ValueError, match="once"):
        builder.merge(builder)
    with pytest.raises(ValueError, match="15 of 24"):
        builder.finish(adm, FACTS)


@pytest.mark.parametrize("key", ["size", "split", "weights_sha256", "resize", "protocol", "code_version"])
def test_a_reference_made_otherwise_is_refused_by_the_first_key_that_differs(adm, saved, key, monkeypatch):
    path, wanted, extractor = saved[0], dict(FACTS), adm
    if key in FACTS:
        wanted[key] = "other"
    elif key == "code_version":
        monkeypatch.setattr(reference_module, "CODE_VERSION", 2)
    elif key == "protocol":
        extractor = small_extractors()[1]
    elif key == "weights_sha256":
        extractor = small_extractors("e" * 64)[0]
    else:
        extractor = small_extractors()[0]
        extractor.identity = extractor.identity | {key: "other"}
    with pytest.raises(
        UserError, match=f"made with {key} = .* wanted is .*: make the reference anew"
    ) as error:
        load_reference(path, extractor, wanted)
    assert "\n" not in str(error.value)


def test_what_is_no_reference_is_one_line(adm, tmp_path, saved):
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "torn.npz").write_bytes(saved[0].read_bytes()[:-2000])
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "objects.npz", metadata=np.array({"a": 1}, object))
    np.savez(tmp_path / "empty.npz", metadata=np.array("{}"))
    np.savez(
        tmp_path / "nan.npz",
        metadata=np.array('{"num_images": 9}'),
        mu=np.zeros(2),
        sigma=np.full((2, 2), np.nan),
    )
    names = [
        "text.npz",
        "torn.npz",
        "one.npy",
        "foreign.npz",
        "objects.npz",
        "empty.npz",
        "nan.npz",
        "absent.npz",
    ]
    for name in names:
        with pytest.raises(UserError, match=name) as error:
            load_reference(tmp_path / name, adm)
        assert "\n" not in str(error.value)


def test_a_reference_whose_writing_fails_leaves_nothing(saved, monkeypatch):
    path, reference = saved
    before = path.read_bytes()

    def half(file, **_):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="space"):
        reference.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["real.npz"]


# ADM's files


def test_a_file_of_adms_suite_gives_its_own_moments_and_the_features_of_its_images(adm, features, tmp_path):
    mu, sigma, mu_s, sigma_s = np.zeros(5), np.eye(5), np.zeros(7), np.eye(7)
    np.savez(tmp_path / "a.npz", arr_0=IMAGES[:10], mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    reference = load_reference(tmp_path / "a.npz", adm, FACTS)
    np.testing.assert_array_equal(reference.pool.cov, sigma)
    np.testing.assert_array_equal(reference.spatial.cov, sigma_s)
    np.testing.assert_allclose(reference.features, features.pool[:10], rtol=1e-5, atol=1e-5)
    assert reference.distance_of_halves is None
    identity = reference.identity
    assert identity["name"] == "a.npz"
    np.savez(tmp_path / "a.npz", arr_0=IMAGES[:10], mu=mu, sigma=2 * sigma, mu_s=mu_s, sigma_s=sigma_s)
    assert load_reference(tmp_path / "a.npz", adm).identity["sha256"] != identity["sha256"]
    np.savez(tmp_path / "few.npz", arr_0=IMAGES[:3], mu=mu, sigma=sigma)
    with pytest.raises(UserError, match=r"few\.npz holds 3 images"):
        load_reference(tmp_path / "few.npz", adm)
    with pytest.raises(UserError, match="size = 48, wanted is 512"):
        load_reference(tmp_path / "a.npz", adm, {"size": 512})
    with pytest.raises(UserError, match="protocol adm, not clean"):
        load_reference(tmp_path / "a.npz", small_extractors()[1])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_covariance_of_fewer_images_than_dimensions_is_one_although_rounding_leaves_it_below_0(
    adm, features, tmp_path, dtype
):
    moments = [(part.mean(0), np.cov(part.T.astype(dtype))) for part in (features.pool, features.spatial)]
    (mu, sigma), (mu_s, sigma_s) = moments
    assert np.linalg.eigvalsh(sigma)[0] < 0
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma.astype(dtype), mu_s=mu_s, sigma_s=sigma_s.astype(dtype))
    np.testing.assert_array_equal(load_reference(tmp_path / "a.npz", adm).pool.cov, sigma.astype(dtype))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("mu", lambda mu: mu.astype(str)),
        ("mu", lambda mu: mu + 1j),
        ("mu", lambda mu: mu[None]),
        ("mu", lambda mu: mu[:0]),
        ("sigma", lambda sigma: sigma * np.nan),
        ("sigma", lambda sigma: -sigma),
        ("sigma", lambda sigma: sigma + np.eye(len(sigma), k=1)),
        ("sigma", lambda sigma: sigma[:, :-1]),
        ("sigma_s", lambda sigma: sigma - 1e-3 * np.eye(len(sigma))),
        ("sigma_s", lambda sigma: None),
    ],
)
def test_a_file_of_adms_suite_with_what_no_images_have_is_one_line(adm, tmp_path, key, change):
    arrays = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    arrays["sigma_s"][0, 0] = 0  # semi-definite
    np.savez(tmp_path / "good.npz", **arrays)
    load_reference(tmp_path / "good.npz", adm)
    arrays[key] = change(arrays[key])
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=rf"a\.npz is not a whole reference .*'{key}'"):
        load_reference(tmp_path / "a.npz", adm)


def test_a_sample_file_of_adms_suite_gives_the_moments_of_its_images(adm, features, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_module, "CHUNK", 7)
    write_npz_images(tmp_path / "s.npz", [IMAGES], 24, (48, 48))
    reference = load_reference(tmp_path / "s.npz", adm)
    np.testing.assert_allclose(reference.pool.cov, np.cov(features.pool.T), rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(reference.spatial.mean, features.spatial.mean(axis=0), rtol=1e-4, atol=1e-6)


# Images in ADM's format


@pytest.mark.parametrize("chunk", [1, 7, 24, 100])
def test_images_survive_the_file_and_numpy_reads_it(tmp_path, chunk):
    parts = [IMAGES[i : i + 5] for i in range(0, 24, 5)]
    write_npz_images(tmp_path / "x.npz", iter(parts), 24, (48, 48))
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
    assert npz_image_shape(tmp_path / "x.npz") == (24, 48, 48, 3)
    np.savez_compressed(tmp_path / "y.npz", arr_0=IMAGES, arr_1=np.arange(24))  # deflated, with labels
    for name in ("x.npz", "y.npz"):
        chunks = list(iterate_npz_images(tmp_path / name, chunk))
        assert max(map(len, chunks)) == min(chunk, 24)
        np.testing.assert_array_equal(np.concatenate(chunks), IMAGES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz", "y.npz"]


def test_damaged_and_foreign_files_of_images_are_one_line(tmp_path):
    write_npz_images(tmp_path / "good.npz", [IMAGES], 24, (48, 48))
    whole = bytearray((tmp_path / "good.npz").read_bytes())
    whole[5000] ^= 1
    (tmp_path / "bit.npz").write_bytes(whole)
    (tmp_path / "torn.npz").write_bytes(whole[:5000])
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=IMAGES)
    deflated = bytearray((tmp_path / "deflated.npz").read_bytes())
    deflated[5000:5100] = bytes(100)
    (tmp_path / "deflated.npz").write_bytes(deflated)
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=IMAGES.astype(np.float32))
    np.savez(tmp_path / "grey.npz", arr_0=IMAGES[..., 0])
    with zipfile.ZipFile(tmp_path / "long.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (20, 48, 48, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(IMAGES.tobytes())
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(IMAGES))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}], object))
    for name in (
        "bit",
        "torn",
        "long",
        "deflated",
        "text",
        "other",
        "float",
        "grey",
        "fortran",
        "objects",
        "absent",
    ):
        with pytest.raises(UserError, match=f"{name}.npz") as error:
            list(iterate_npz_images(tmp_path / f"{name}.npz", 10))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", [IMAGES[:23], IMAGES[:, :40], IMAGES.astype(np.float32)])
def test_images_other_than_announced_leave_no_file(tmp_path, images):
    with pytest.raises(ValueError, match=r"24 images|must be"):
        write_npz_images(tmp_path / "x.npz", [images], 24, (48, 48))
    assert not list(tmp_path.iterdir())


def test_a_killed_write_leaves_no_file_and_the_old_one_whole(tmp_path):
    code = """
import os, signal, sys
import numpy as np
from metrics.npz_images import write_npz_images
def images():
    yield np.zeros((50, 64, 64, 3), np.uint8)
    os.kill(os.getpid(), signal.SIGKILL)
write_npz_images(sys.argv[1], images(), 100, (64, 64))
"""
    write_npz_images(tmp_path / "old.npz", [IMAGES], 24, (48, 48))
    before = (tmp_path / "old.npz").read_bytes()
    for name in ("new.npz", "old.npz"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            cwd=Path(__file__).parents[2],
            env=os.environ,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "new.npz").exists()
    assert (tmp_path / "old.npz").read_bytes() == before
