"""Properties of the feature extractors, against torch-fidelity, clean-fid and transformers, on random weights."""

import hashlib
import json

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from diffusers import AutoencoderKL
from small_inception import SmallInception, pictures, small_extractors
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetForImageClassification

from common.errors import UserError
from metrics.extractors import load_extractors
from metrics.features import FeatureSet
from metrics.inception import (
    FILES,
    HASH,
    AdmExtractor,
    find_weights,
    load_inception,
    resize_adm,
    resize_clean,
)

CPU = torch.device("cpu")


# Inception


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file in the format of Inception's weights, of the real size."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save({}, folder / "empty.pth")
        network = FeatureExtractorInceptionV3("x", ["2048"], str(folder / "empty.pth"))
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


def test_features_of_the_whole_network_are_torch_fidelitys_and_clean_fids(random_weights):
    sha256 = hashlib.sha256(random_weights.read_bytes()).hexdigest()
    adm, clean = load_inception(random_weights, CPU, sha256=sha256[:8])
    images = pictures(2, 0, side=64)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased", "logits"], str(random_weights))
    maps = []
    theirs.Mixed_6d.register_forward_hook(lambda *args: maps.append(args[-1]))
    pool, unbiased, biased = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    found = adm.features(images, batch_size=2)
    np.testing.assert_allclose(found.pool, pool, rtol=1e-5, atol=1e-5 * pool.abs().max())
    np.testing.assert_allclose(found.logits, unbiased, rtol=1e-5, atol=1e-5 * unbiased.abs().max())
    assert (unbiased - biased).abs().max() > 1e-4  # the bias would show
    spatial = maps[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert found.spatial.shape == (2, 2023)
    np.testing.assert_allclose(found.spatial, spatial, rtol=1e-5, atol=1e-5 * spatial.max())

    resize = build_resizer("clean")
    resized = np.stack([resize(image) for image in images]).transpose(0, 3, 1, 2)
    layers = torch.nn.Sequential(*list(theirs.children())[:-1])
    expected = layers((torch.from_numpy(resized) - 128) / 128).flatten(1)
    found = clean.features(images, batch_size=2)
    assert (found.logits, found.spatial, found.labels) == (None, None, None)
    np.testing.assert_allclose(found.pool, expected, rtol=1e-4, atol=1e-5 * expected.max())
    assert (pool - expected).abs().max() > 1e-3 * expected.max()  # the two protocols do differ
    assert adm.classifier is clean.classifier  # one network
    assert adm.identity["weights_sha256"] == sha256


@pytest.mark.parametrize("shape", [(40, 56), (350, 400), (512, 512), (299, 299)])
def test_each_protocol_resizes_as_its_library(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    x = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    theirs = build_resizer("clean")(image).transpose(2, 0, 1)
    assert np.abs(resize_clean(x)[0].numpy() - theirs).max() < 1e-4
    ours = resize_adm(x)[0].permute(1, 2, 0).numpy()
    rows, columns = (np.arange(299, dtype=np.float32) * np.float32(side / 299) for side in shape)
    for i, j in [(0, 0), (7, 291), (298, 298), (150, 33)]:  # TensorFlow 1: corners at corners, no half pixels
        y, z = int(rows[i]), int(columns[j])
        block = image[y : y + 2, z : z + 2].astype(np.float64)
        block = np.pad(block, ((0, 2 - len(block)), (0, 2 - block.shape[1]), (0, 0)), mode="edge")
        v, h = rows[i] - y, columns[j] - z
        expected = (1 - v) * ((1 - h) * block[0, 0] + h * block[0, 1])
        expected += v * ((1 - h) * block[1, 0] + h * block[1, 1])
        np.testing.assert_allclose(ours[i, j], expected, atol=1e-3)


def test_features_do_not_depend_on_the_batch_and_leave_no_hook():
    images = pictures(5, 1)
    for extractor in small_extractors():
        one, all_ = extractor.features(images, batch_size=1), extractor.features(images, batch_size=64)
        np.testing.assert_allclose(one.pool, all_.pool, rtol=1e-5, atol=1e-6)
        assert not extractor.spatial._forward_hooks
        assert one.pool.dtype == np.float32
        for wrong in (images.astype(np.float32), images[0], images[:0], images[..., :1]):
            with pytest.raises(ValueError, match="uint8"):
                extractor.features(wrong)


def precisions():
    """All of torch's flags for fp32; Dynamo guards on them."""
    flags = torch.backends
    places = (flags, flags.cuda.matmul, flags.cudnn, flags.cudnn.conv, flags.cudnn.rnn)
    return [place.fp32_precision for place in places]


@pytest.fixture(params=["none", "tf32"])
def matmul(request):
    """The flags of matrix products, as torch starts or as a training may have set them."""
    flags = torch.backends.cuda.matmul
    before, flags.fp32_precision = flags.fp32_precision, request.param
    yield flags
    flags.fp32_precision = before


def test_precision_is_full_and_every_flag_is_given_back(matmul):
    conv = torch.backends.cudnn.conv
    seen, before = [], precisions()

    class Spy(SmallInception):
        def __init__(self):
            super().__init__("small-inception", ["2048"])
            self.AvgPool.register_forward_hook(self.note)

        @staticmethod
        def note(*_):
            seen.append((conv.fp32_precision, matmul.fp32_precision, torch.is_autocast_enabled("cpu")))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        AdmExtractor(Spy(), "0").features(pictures(1, 0))
    assert seen == [("ieee", "ieee", False)]
    assert precisions() == before


def test_weights_are_found_where_torch_hub_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(UserError) as missing:
        load_extractors("inception", "cpu")
    folder = tmp_path / "hub" / "checkpoints"
    for part in ("https://github.com/toshas/torch-fidelity", str(folder / FILES[0])):
        assert part in str(missing.value)
    assert "\n" not in str(missing.value)
    folder.mkdir(parents=True)
    (folder / FILES[1]).write_bytes(b"x")
    assert find_weights("inception") == folder / FILES[1]
    (folder / FILES[0]).write_bytes(b"x")
    assert find_weights("inception") == folder / FILES[0]
    with pytest.raises(UserError, match=f"not {HASH}") as wrong:
        load_extractors("inception", "cpu")
    assert "\n" not in str(wrong.value)
    with pytest.raises(UserError, match=r"elsewhere\.pth"):
        load_extractors(tmp_path / "elsewhere.pth", "cpu")


class Touch:
    """What a pickle could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.mark.parametrize("kind", ["pickle", "torn", "another network", "a list"])
def test_weights_that_are_none_are_one_line_and_run_no_code(tmp_path, kind):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    content = {"pickle": Touch(trace), "another network": {"a": torch.zeros(1)}, "a list": [1]}
    torch.save(content.get(kind, {"a": torch.zeros(9)}), path)
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:200])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_inception(path, CPU, sha256=sha256)
    assert "\n" not in str(error.value)
    assert not trace.exists()


def test_a_set_of_features_joins_its_chunks_in_order():
    adm, clean = small_extractors()
    images = pictures(7, 2)
    whole, chunks = adm.features(images), FeatureSet()
    for start in range(0, 7, 3):
        chunks.add(adm.features(images[start : start + 3]))
    assert len(chunks) == 7
    np.testing.assert_allclose(chunks.pool, whole.pool, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(chunks.logits, whole.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(chunks.spatial.cov, np.cov(whole.spatial.T), rtol=1e-4, atol=1e-5)
    assert FeatureSet().add(clean.features(images)).logits is None


# Classifiers and DINOv2


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("classifier")
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=10
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    facts = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_features_are_the_pooled_ones_and_labels_those_of_the_model(classifier_folder):
    images = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    (extractor,) = load_extractors(classifier_folder, "cpu")
    features = extractor.features(images, batch_size=2)
    model = ResNetForImageClassification.from_pretrained(classifier_folder).eval()
    pixels = (images / 255.0 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    with torch.no_grad():
        x = torch.from_numpy(pixels).float().permute(0, 3, 1, 2)
        expected = model.resnet(x).pooler_output.flatten(1)
        logits = model(x).logits
    assert (extractor.protocol, features.pool.shape, features.pool.dtype) == (
        "classifier",
        (5, 12),
        np.float32,
    )
    np.testing.assert_allclose(features.pool, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(features.logits, logits.numpy(), atol=1e-5)
    np.testing.assert_array_equal(features.labels, logits.argmax(-1).numpy())
    weights = (classifier_folder / "model.safetensors").read_bytes()
    assert extractor.identity["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_features_of_a_smooth_picture_hardly_depend_on_its_size(classifier_folder):
    """Aliasing would show here: a fine stripe pattern averages to grey when it is reduced properly."""
    stripes = np.zeros((1, 128, 128, 3), np.uint8)
    stripes[:, :, ::4] = stripes[:, :, 3::4] = 255  # each reduced pixel's centre falls between two black ones
    grey = np.full((1, 32, 32, 3), 127, np.uint8)
    (extractor,) = load_extractors(classifier_folder, "cpu")
    a, b, black = (extractor.features(x).pool for x in (stripes, grey, 0 * grey))
    assert np.abs(a - b)[0].max() < 0.2 * np.abs(black - b).max()


def test_dinov2_is_read_at_its_cls_token_beside_another_extractor(dinov2_folder, classifier_folder):
    images = pictures(3, 4, side=64)
    classifier, dinov2 = load_extractors(classifier_folder, "cpu", dinov2=dinov2_folder)
    assert (classifier.protocol, dinov2.protocol) == ("classifier", "dinov2")
    assert dinov2.size == (42, 42)  # smaller than 224: what it was trained on
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (42, 42), mode="bicubic", antialias=True).clamp(0, 255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = model((x / 255 - mean) / std).last_hidden_state[:, 0]
    np.testing.assert_allclose(dinov2.features(images).pool, expected, atol=1e-5)
    with pytest.raises(UserError, match="beside another"):
        load_extractors(dinov2_folder, "cpu")


@pytest.mark.parametrize(
    ("image_size", "facts", "side"), [(518, {"crop_size": 448}, 224), (56, {"size": 28}, 28)]
)
def test_dinov2_of_full_size_sees_224_pixels_and_a_small_one_what_it_was_trained_on(
    dinov2_folder, classifier_folder, tmp_path, image_size, facts, side
):
    config = json.loads((dinov2_folder / "config.json").read_text()) | {"image_size": image_size}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**config)).save_pretrained(tmp_path)
    facts = facts | {"image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    dinov2 = load_extractors(classifier_folder, "cpu", dinov2=tmp_path)[1]
    assert dinov2.size == (side, side)
    assert dinov2.identity["mean"] == [0.5] * 3


def test_a_missing_or_foreign_folder_is_one_line_to_the_user(classifier_folder, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError):
            load_extractors(path, "cpu")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="image classifier"):
        load_extractors(tmp_path / "vae", "cpu")
    with pytest.raises(UserError, match="Dinov2Model was expected"):
        load_extractors(classifier_folder, "cpu", dinov2=classifier_folder)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((classifier_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        load_extractors(tmp_path / "half", "cpu")
    name = "preprocessor_config.json"
    (tmp_path / "half" / name).write_bytes((classifier_folder / name).read_bytes())
    with pytest.raises(UserError) as caught:
        load_extractors(tmp_path / "half", "cpu")
    assert "\n" not in str(caught.value)
