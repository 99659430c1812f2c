"""The door for models: what is no folder, what is in a hub's local cache, and what the libraries raise."""

import json
import os

import diffusers
import huggingface_hub.constants
import pytest
import torch

from common.errors import UserError
from common.pretrained import (
    HfApi,
    PixelStatistics,
    check_files,
    foreign_files,
    load_pretrained,
    local_folder,
    read_optional,
)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A hub's local cache that holds one small VAE as `owner/vae`, and a hub that nobody may ask."""
    folder = tmp_path / "models--owner--vae"
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(folder / "snapshots" / ("a" * 40) / "vae")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a" * 40)
    for module in (huggingface_hub.constants, diffusers.utils.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    asked = []
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: asked.append(1) or 1 / 0)
    return vae, folder / "snapshots" / ("a" * 40) / "vae", asked


def load(name):
    return load_pretrained(diffusers.AutoencoderKL, name, f"vae of {name}", part="vae")


@pytest.mark.parametrize(
    "name",
    [
        "none",
        "./a/b",
        "/a/b",
        "~/none",
        "none/",
        "a/b/c",
        "a/b.pth",
        "a/b.safetensors",
        "tests/none",
        "C:\\a",
        "",
    ],
)
def test_what_is_no_folder_and_no_hub_id_is_said_without_asking_a_hub(name):
    with pytest.raises(UserError, match="does not exist"):
        local_folder(name)
    assert local_folder("owner/name") is None


def test_a_hub_is_not_asked_for_what_is_in_the_local_cache(cached):
    vae, _, asked = cached
    for name, value in load("owner/vae").state_dict().items():
        assert value.equal(vae.state_dict()[name])
    assert not asked


def test_a_hub_that_does_not_answer_is_asked_once_and_one_line(cached):
    with pytest.raises(UserError, match=r"owner/other.* not whole\) in the local cache .*division by zero"):
        load("owner/other")
    assert cached[2] == [1]


def test_a_file_that_a_hub_id_need_not_have_is_read_or_its_absence_told(cached, capsys):
    def read():
        return read_optional("owner/vae", "preprocessor_config.json", PixelStatistics, "teacher owner/vae")

    assert read() is None
    assert cached[2] == [1]
    warning = "warning: teacher owner/vae is used without its preprocessor_config.json: division by zero\n"
    assert capsys.readouterr().err == warning
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    path = cached[1].parent / "preprocessor_config.json"
    path.write_text(json.dumps(facts))
    assert read() == facts
    path.write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        read()
    assert cached[2] == [1]


def test_damaged_files_of_a_cache_are_named_as_such(cached):
    (cached[1] / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"owner/vae: .*local cache"):
        load("owner/vae")


def test_a_folder_that_lacks_weights_or_is_of_another_class_is_refused(cached):
    folder = cached[1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(UserError, match="of the kind 'AutoencoderTiny'; AutoencoderKL was expected"):
        load(str(folder.parent))
    (folder / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(UserError, match="lacks weights"):
        load(str(folder.parent))


def test_a_pickle_alone_and_a_fifo_are_named(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"model\.bin is a pickle"):
        check_files(tmp_path, network=True)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json is no regular file"):
        check_files(tmp_path, network=True)


def test_whatever_a_library_raises_is_one_short_line():
    for error in (KeyError("a"), RecursionError("deep\nin"), TypeError("x" * 10_000), AssertionError()):
        with pytest.raises(UserError, match="cannot load it: ") as caught, foreign_files("it"):
            raise error
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)
