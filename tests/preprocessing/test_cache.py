"""Scripts 2, 3 and 5 on real files: what ends up in the cache, resume after kills, several processes, growth, verification."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import image_tree, run_numbered, sample
from fork_server import fork_server
from PIL import Image
from torchvision import transforms

from cache.image_list import read_samples
from cache.manifest import read_manifest
from cache.reader import FieldReader
from cache.text import TextReader
from cache.views import read_view
from common.errors import UserError
from models.families.table import family_of
from models.teachers.dinov2 import DINOv2Encoder
from models.teachers.table import load_teacher
from preprocessing import pipeline

KILLS = int(os.environ.get("KILLS", "2"))  # of each scenario


def latents(miniature, csv, out, *more):
    base = miniature / "models" / "sd15-mini"
    run_numbered(
        "2_encode_vae_latents", "--csv", csv, "--out", out, "--base", base, "--image-size", 32,
        "--workers", 0, "--batch-size", 4, "--shard-size", 20, *more,
    )  # fmt: skip


def tokens(miniature, csv, out, *more):
    teacher = miniature / "models" / "dinov2-mini"
    run_numbered(
        "3_build_dino_cache", "--csv", csv, "--out", out, "--teacher", teacher, "--grid", 4,
        "--workers", 0, "--batch-size", 4, "--shard-size", 20, *more,
    )  # fmt: skip


def fused(miniature, csv, root, *more):
    teacher = miniature / "models" / "dinov2-mini"
    more = ["--fused", root / "tokens", "--teacher", teacher, "--grid", 4, *more]
    latents(miniature, csv, root / "latents", *more)


def checksums(folder, field):
    return [shard["checksum"] for shard in read_manifest(folder, field)["shards"]]


def assert_same_fields(root, undisturbed):
    """Byte-identical values, each id once."""
    for folder in sorted(path for path in undisturbed.iterdir() if path.is_dir()):
        field = folder.name
        assert read_manifest(root / field, field) == read_manifest(folder, field) | {
            "shards": read_manifest(root / field, field)["shards"]
        }
        assert checksums(root / field, field) == checksums(folder, field)
        reader = FieldReader(root / field, field)
        assert len(set(reader.ids)) == len(reader.ids) == reader.manifest["num_samples"]
        assert reader.damaged_shards() == []


def verify(miniature, *more):
    fields = [
        ("csv", "train.csv"),
        ("latents", "cache/latents"),
        ("tokens", "cache/tokens"),
        ("text", "cache/text"),
    ]
    run_numbered(
        "5_verify_cache", *(part for name, path in fields for part in (f"--{name}", miniature / path)), *more
    )


@pytest.fixture(scope="module")
def undisturbed(miniature, tmp_path_factory):
    """Both fields of the miniature's list in three shards, made by scripts 2 and 3."""
    root = tmp_path_factory.mktemp("undisturbed")
    latents(miniature, miniature / "train.csv", root / "latents")
    tokens(miniature, miniature / "train.csv", root / "tokens")
    return root


class TestValues:
    def test_fields_are_joined_by_id_and_say_what_they_are(self, miniature):
        latents, tokens = (FieldReader(miniature / "cache" / name, name) for name in ("latents", "tokens"))
        assert set(latents.ids) == set(tokens.ids) == {s.id for s in read_samples(miniature / "train.csv")}
        assert latents.spec.view == {"kind": "aligned", "size": 32}
        assert tokens.spec.view == {"kind": "aligned", "size": 32, "patch": 8, "grid": 4}
        for reader in (latents, tokens):
            assert len(reader.spec.source["weights_sha256"]) == 64
            assert reader.spec.source["precision"] == "fp32"

    def test_they_are_those_of_the_image_with_that_id(self, miniature):
        chosen = read_samples(miniature / "train.csv")[7]
        teacher = load_teacher(str(miniature / "models" / "dinov2-mini"), grid=4)
        pixels = torch.tensor(read_view(chosen.img_path, 32)).permute(2, 0, 1)[None] / 255
        expected = torch.nn.functional.normalize(teacher(pixels), dim=-1)[0]
        cached = FieldReader(miniature / "cache" / "tokens", "tokens").read([chosen.id])[0].float()
        assert (cached - expected).abs().max() < 1e-3
        assert (cached.norm(dim=-1) - 1).abs().max() < 1e-3
        vae = family_of(str(miniature / "models" / "sd15-mini")).load("vae")
        with torch.no_grad():
            mode = vae.encode(pixels * 2 - 1).latent_dist.mode()[0] * vae.config.scaling_factor
        cached = FieldReader(miniature / "cache" / "latents", "latents").read([chosen.id])[0].float()
        assert (cached - mode).abs().max() < 2e-3 * mode.abs().max()

    def test_the_teacher_may_see_its_official_view(self, miniature, tmp_path):
        tokens(miniature, miniature / "train.csv", tmp_path / "tokens", "--view", "official")
        reader, chosen = FieldReader(tmp_path / "tokens", "tokens"), read_samples(miniature / "train.csv")[7]
        assert reader.spec.view == {"kind": "official", "size": 32, "patch": 8, "grid": 4}
        # DINOv2's evaluation transform at 32 px.
        resize = transforms.Resize(round(32 * 256 / 224), transforms.InterpolationMode.BICUBIC)
        seen = transforms.Compose([resize, transforms.CenterCrop(32), transforms.ToTensor()])
        pixels = seen(Image.open(chosen.img_path).convert("RGB"))[None]
        teacher = load_teacher(str(miniature / "models" / "dinov2-mini"), grid=4)
        expected = torch.nn.functional.normalize(teacher(pixels), dim=-1)[0]
        assert (reader.read([chosen.id])[0].float() - expected).abs().max() < 1e-3

    def test_what_is_kept_of_the_posterior(self, miniature, undisturbed, tmp_path):
        csv, ids = miniature / "train.csv", [s.id for s in read_samples(miniature / "train.csv")]
        kinds = {
            "moments": ["--posterior", "moments"],
            "sample": ["--posterior", "sample"],
            "again": ["--posterior", "sample", "--batch-size", 7],
            "unscaled": ["--unscaled"],
        }
        stored = {"mode": FieldReader(undisturbed / "latents", "latents").read(ids).float()}
        for name, options in kinds.items():
            latents(miniature, csv, tmp_path / name, "--dtype", "float32", *options)
            reader = FieldReader(tmp_path / name, "latents")
            stored[name] = reader.read(ids)
        factor = reader.spec.details["scaling_factor"]
        mean, std = stored["moments"].chunk(2, dim=1)
        assert torch.allclose(mean, stored["mode"], rtol=1e-3, atol=1e-3)
        assert torch.allclose(stored["unscaled"] * factor, mean, rtol=1e-5, atol=1e-6)
        drawn = (stored["sample"] - mean) / std
        assert abs(drawn.mean()) < 0.05
        assert abs(drawn.std() - 1) < 0.05
        assert abs((drawn[0] * drawn[1]).mean()) < 0.2  # each image has noise of its own
        assert torch.allclose(stored["sample"], stored["again"], atol=1e-5)  # not of batches or order

    def test_text_has_the_prompt_of_each_class_and_the_null_prompt(self, miniature):
        text = TextReader(miniature / "cache" / "text")
        names = json.loads((miniature / "imagenet_classes.json").read_text())
        assert text.prompts == [f"a photo of a {names[str(i)]}" for i in range(10)]
        assert text.fields_of(range(10))["prompt_embeds"].shape == (10, 77, 32)
        assert text.null["prompt_embeds"].shape == (77, 32)

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
    def test_compact_tokens_are_the_same_tokens(self, miniature, undisturbed, tmp_path, dtype):
        tokens(miniature, miniature / "train.csv", tmp_path, "--dtype", dtype)
        ids = [s.id for s in read_samples(miniature / "train.csv")]
        compact, full = FieldReader(tmp_path, "tokens"), FieldReader(undisturbed / "tokens", "tokens")
        cosine = torch.cosine_similarity(compact.read(ids).float(), full.read(ids).float(), dim=-1)
        assert cosine.min() > 1 - 1e-4
        assert compact.spec.agrees_with(full.spec)


class TestFused:
    def test_one_decode_pass_makes_what_two_scripts_make(self, miniature, undisturbed, tmp_path, monkeypatch):
        reads = []
        read_image = pipeline.read_image
        monkeypatch.setattr(pipeline, "read_image", lambda path: reads.append(path) or read_image(path))
        fused(miniature, miniature / "train.csv", tmp_path)
        assert_same_fields(tmp_path, undisturbed)
        assert len(reads) == len(set(reads)) == 60

    def test_where_one_field_is_further_only_the_other_is_made(self, miniature, undisturbed, tmp_path):
        shutil.copytree(undisturbed / "tokens", tmp_path / "tokens")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.lmdb")}
        fused(miniature, miniature / "train.csv", tmp_path)
        assert_same_fields(tmp_path, undisturbed)
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.lmdb")}

    @pytest.mark.parametrize("kill_at", [1, 2, 5, 6])
    def test_stopped_between_the_fields_of_one_batch_it_goes_on(
        self, miniature, undisturbed, tmp_path, monkeypatch, kill_at
    ):
        put, calls = pipeline.FieldWriter.put, []

        def die(writer, *args):
            if writer.spec.field == "tokens":
                calls.append(args)
                if len(calls) == kill_at:
                    raise SystemError("killed")
            put(writer, *args)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.FieldWriter, "put", die)
            with pytest.raises(SystemError):
                fused(miniature, miniature / "train.csv", tmp_path)
        fused(miniature, miniature / "train.csv", tmp_path)
        assert_same_fields(tmp_path, undisturbed)

    def test_fields_that_grew_at_different_times_and_other_batches(self, miniature, tmp_path):
        sample(miniature / "ILSVRC", tmp_path / "small.csv", 5)
        sample(miniature / "ILSVRC", tmp_path / "large.csv", 6)
        latents(miniature, tmp_path / "small.csv", tmp_path / "latents")
        fused(miniature, tmp_path / "large.csv", tmp_path, "--batch-size", 7)
        readers = [FieldReader(tmp_path / field, field) for field in ("latents", "tokens")]
        assert set(readers[0].ids) == set(readers[1].ids)
        assert len(readers[0]) == 60

    def test_an_unreadable_image_is_left_out_of_both_fields(self, miniature, tmp_path, capsys):
        image_tree(tmp_path, {"n01": 3, "n02": 3})
        sample(tmp_path, tmp_path / "list.csv", 3)
        (tmp_path / "train" / "n01" / "n01_1.JPEG").write_bytes(b"no image")
        fused(miniature, tmp_path / "list.csv", tmp_path / "cache")
        for field in ("latents", "tokens"):
            manifest = read_manifest(tmp_path / "cache" / field, field)
            assert (manifest["num_samples"], manifest["num_unreadable"]) == (5, 1)
            assert "n01/n01_1" in (tmp_path / "cache" / field / "unreadable.csv").read_text()
        assert "1 images could not be read" in capsys.readouterr().err

    def test_no_readable_image_is_an_error(self, miniature, tmp_path):
        image_tree(tmp_path, {"n01": 2})
        sample(tmp_path, tmp_path / "list.csv", 2)
        for path in (tmp_path / "train" / "n01").iterdir():
            path.write_bytes(b"")
        with pytest.raises(UserError, match="not one of 2 images could be read"):
            tokens(miniature, tmp_path / "list.csv", tmp_path / "tokens")


class TestSeveralProcesses:
    def test_two_parts_make_what_one_process_makes(self, miniature, undisturbed, tmp_path, capsys):
        csv = miniature / "train.csv"
        latents(miniature, csv, tmp_path / "latents", "--shard", "1/2")
        assert "part 1 of 2 is done, 1 of 3 shards are there" in capsys.readouterr().out
        assert not (tmp_path / "latents" / "manifest.json").exists()
        latents(miniature, csv, tmp_path / "latents", "--shard", "0/2")
        tokens(miniature, csv, tmp_path / "tokens", "--shard", "0/1")
        assert_same_fields(tmp_path, undisturbed)

    def test_torchruns_rank_is_the_part(self, miniature, undisturbed, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in ("1", "0"):
            monkeypatch.setenv("RANK", rank)
            fused(miniature, miniature / "train.csv", tmp_path)
        assert_same_fields(tmp_path, undisturbed)

    @pytest.mark.parametrize("wrong", ["2/2", "1", "-1/2", "a/b"])
    def test_a_part_that_is_none_is_refused(self, miniature, tmp_path, wrong, capsys):
        with pytest.raises(SystemExit) as stop:
            tokens(miniature, miniature / "train.csv", tmp_path, f"--shard={wrong}")
        assert stop.value.code == 2
        assert "must be I/N" in capsys.readouterr().err

    @pytest.mark.parametrize(("rank", "world"), [("", "2"), ("5", "2"), ("0", "0"), ("x", "1")])
    def test_an_odd_rank_is_one_line(self, miniature, tmp_path, monkeypatch, rank, world):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(UserError, match="RANK/WORLD_SIZE"):
            tokens(miniature, miniature / "train.csv", tmp_path)


class TestGrowth:
    def test_more_images_are_added_to_a_finished_cache(self, miniature, tmp_path):
        root = miniature / "ILSVRC"
        sample(root, tmp_path / "small.csv", 4)
        sample(root, tmp_path / "large.csv", 6)
        tokens(miniature, tmp_path / "small.csv", tmp_path / "tokens")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.lmdb")}
        tokens(miniature, tmp_path / "large.csv", tmp_path / "tokens")
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
        reader = FieldReader(tmp_path / "tokens", "tokens")
        assert set(reader.ids) == {s.id for s in read_samples(tmp_path / "large.csv")}
        with pytest.raises(UserError, match="was begun for other images too"):
            tokens(miniature, miniature / "val.csv", tmp_path / "tokens")

    def test_running_again_does_nothing(self, miniature, undisturbed, capsys):
        before = {path: path.stat().st_mtime_ns for path in (undisturbed / "tokens").iterdir()}
        tokens(miniature, miniature / "train.csv", undisturbed / "tokens")
        assert "is complete: 60 tokens" in capsys.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in (undisturbed / "tokens").iterdir()}


class TestErrors:
    def test_a_missing_class_folder_is_an_error_before_anything_is_written(self, miniature, tmp_path):
        image_tree(tmp_path, {"n01": 3, "n02": 3})
        sample(tmp_path, tmp_path / "list.csv", 3)
        shutil.rmtree(tmp_path / "train" / "n01")
        with pytest.raises(
            UserError, match=r"3 of the 6 images of .* do not exist, the first is .*n01_\d.JPEG"
        ):
            tokens(miniature, tmp_path / "list.csv", tmp_path / "tokens")
        assert not (tmp_path / "tokens").exists()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_disk_that_goes_away_does_not_pass_for_damaged_images(
        self, miniature, tmp_path, monkeypatch, workers
    ):
        image_tree(tmp_path, {"n01": 12})
        sample(tmp_path, tmp_path / "list.csv", 12)
        put, images = pipeline.FieldWriter.put, tmp_path / "train"

        def put_then_unmount(*args):
            put(*args)
            if images.exists():
                images.rename(tmp_path / "elsewhere")

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.FieldWriter, "put", put_then_unmount)
            with pytest.raises(UserError, match="is the disk still mounted") as error:
                tokens(
                    miniature,
                    tmp_path / "list.csv",
                    tmp_path / "tokens",
                    "--batch-size",
                    1,
                    "--workers",
                    workers,
                )
            assert "\n" not in str(error.value)
        (tmp_path / "elsewhere").rename(images)
        tokens(miniature, tmp_path / "list.csv", tmp_path / "tokens", "--batch-size", 1)
        assert read_manifest(tmp_path / "tokens", "tokens")["num_samples"] == 12

    def test_a_decoding_process_that_dies_is_one_line_and_nothing_is_lost(
        self, miniature, undisturbed, tmp_path, monkeypatch
    ):
        read_image = pipeline.read_image

        def die_at_the_fortieth(path):
            if path == read_samples(miniature / "train.csv")[40].img_path:
                os.kill(os.getpid(), signal.SIGKILL)
            return read_image(path)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "read_image", die_at_the_fortieth)
            with pytest.raises(UserError, match="a decoding process died"):
                tokens(miniature, miniature / "train.csv", tmp_path / "tokens", "--workers", 1)
        tokens(miniature, miniature / "train.csv", tmp_path / "tokens")
        assert checksums(tmp_path / "tokens", "tokens") == checksums(undisturbed / "tokens", "tokens")

    def test_a_batch_too_large_for_the_gpu_is_one_line(self, miniature, tmp_path, monkeypatch):
        def no_memory(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(DINOv2Encoder, "forward", no_memory)
        with pytest.raises(UserError, match="lower --batch-size"):
            tokens(miniature, miniature / "train.csv", tmp_path / "tokens")

    def test_a_disk_that_is_full_at_the_last_batch_is_told_of(self, miniature, tmp_path, monkeypatch):
        put = pipeline.FieldWriter.put

        def full(writer, shard, ids, *args):
            if shard == 2 and ids[-1] == writer.plan[2][-1]:
                raise UserError("cannot write")
            put(writer, shard, ids, *args)

        monkeypatch.setattr(pipeline.FieldWriter, "put", full)
        with pytest.raises(UserError, match="cannot write"):
            tokens(miniature, miniature / "train.csv", tmp_path / "tokens")

    def test_too_small_a_disk_is_found_before_anything_is_encoded(self, miniature, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match="free some"):
            tokens(miniature, miniature / "train.csv", tmp_path / "tokens")
        assert not list((tmp_path / "tokens").glob("*.lmdb*"))

    def test_int8_of_a_width_that_has_no_groups_is_refused(self, miniature, tmp_path, monkeypatch):
        from preprocessing import encoders

        monkeypatch.setattr(encoders, "GROUP", 48)
        with pytest.raises(UserError, match="multiple of 48, the teacher's is 64"):
            tokens(miniature, miniature / "train.csv", tmp_path, "--dtype", "int8")


class TestInterruption:
    """A fork server starts each process with the libraries imported, so that kills fall into the work and not before it."""

    # The others show what these two do.
    @pytest.mark.parametrize(
        "scenario",
        [
            *(pytest.param(name, marks=pytest.mark.thorough) for name in ("script 2", "script 3")),
            "fused",
            "two processes",
            "decoding workers",
        ],
    )
    def test_kills_at_random_moments_lose_nothing(self, miniature, undisturbed, tmp_path, scenario):
        server, chance, kills, rounds, alone = fork_server(), random.Random(scenario), 0, 0, []
        while kills < KILLS:
            assert rounds < 10 + KILLS
            root, rounds, finished = tmp_path / str(rounds), rounds + 1, False
            while not finished:
                started, begun = server.Event(), time.monotonic()
                jobs = [
                    server.Process(target=start_script, args=(started, *arguments))
                    for arguments in commands(scenario, miniature, root)
                ]
                for job in jobs:
                    job.start()
                assert started.wait(60)
                if len(alone) == 2 and kills < KILLS:  # two rounds show how long it takes
                    time.sleep(chance.uniform(0, min(alone)))
                    kills += sum(job.is_alive() for job in jobs)
                    for job in jobs:
                        job.kill()
                for job in jobs:
                    job.join(120)
                finished = [job.exitcode for job in jobs] == [0] * len(jobs)
                if len(alone) < 2:
                    assert finished
                    alone.append(time.monotonic() - begun)
            wanted = tmp_path / "wanted"
            for field in ("latents", "tokens"):
                if (root / field).exists() and not (wanted / field).exists():
                    shutil.copytree(undisturbed / field, wanted / field)
            assert_same_fields(root, wanted)

    @pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_lets_the_batches_in_flight_become_durable(
        self, miniature, undisturbed, tmp_path, monkeypatch, stop
    ):
        encode, seen = pipeline._encode, []

        def encode_then_stop(*args):
            seen.append(args[2])
            if len(seen) == 3:
                os.kill(os.getpid(), stop)
            return encode(*args)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "_encode", encode_then_stop)
            with pytest.raises(KeyboardInterrupt):
                tokens(miniature, miniature / "train.csv", tmp_path / "tokens")
            seen.clear()
            patch.setattr(pipeline, "_encode", lambda *args: seen.append(args[2]) or encode(*args))
            tokens(miniature, miniature / "train.csv", tmp_path / "tokens")
        assert len(seen) == 15 - 3
        assert checksums(tmp_path / "tokens", "tokens") == checksums(undisturbed / "tokens", "tokens")


def commands(scenario, miniature, root):
    csv = miniature / "train.csv"
    return {
        "script 2": [(latents, miniature, csv, root / "latents")],
        "script 3": [(tokens, miniature, csv, root / "tokens")],
        "fused": [(fused, miniature, csv, root)],
        "two processes": [(fused, miniature, csv, root, "--shard", f"{i}/2") for i in range(2)],
        "decoding workers": [(tokens, miniature, csv, root / "tokens", "--workers", 2)],
    }[scenario]


def start_script(started, script, *arguments):
    torch.set_num_threads(1)
    store = pipeline._store
    pipeline._store = lambda stored: (
        time.sleep(0.02),
        store(stored),
    )  # encoders of real size take longer still
    started.set()
    script(*arguments)


class TestVerification:
    def test_it_passes_and_then_finds_damage(self, miniature, tmp_path, capsys):
        verify(miniature, "--full")
        assert "the cache is good" in capsys.readouterr().out
        other = tmp_path / "other.csv"
        text = (miniature / "train.csv").read_text().replace("n00000001_", "n00000001_x")
        other.write_text(text)
        with pytest.raises(SystemExit) as stop:
            verify(miniature, "--csv", other)
        assert stop.value.code == 1
        assert "FAIL" in capsys.readouterr().out

    def test_it_fails_where_the_cache_lacks_images_of_the_list(self, miniature, tmp_path, capsys):
        rows = (miniature / "train.csv").read_text().splitlines()
        longer, shorter = tmp_path / "longer.csv", tmp_path / "shorter.csv"
        longer.write_text("\n".join([*rows, *(row.replace("_", "_more", 1) for row in rows[1:])]) + "\n")
        shorter.write_text("\n".join(rows[:20]) + "\n")
        with pytest.raises(SystemExit):
            verify(miniature, "--csv", longer)
        said = capsys.readouterr().out
        assert "60 of 120 images are in both fields, 0 could not be read, 60 are missing" in said
        verify(miniature, "--csv", shorter)  # a cache may hold more than one list needs

    def test_full_names_the_shard_with_a_flipped_byte_and_quick_does_not_look(
        self, miniature, tmp_path, capsys
    ):
        shutil.copytree(miniature / "cache" / "tokens", tmp_path / "tokens")
        reader, shard = FieldReader(tmp_path / "tokens", "tokens"), tmp_path / "tokens" / "shard-00000.lmdb"
        stored = reader.spec.encode(reader.read(reader.ids[:1])).numpy().tobytes()
        shard.write_bytes(
            shard.read_bytes().replace(stored, stored[:100] + bytes([stored[100] ^ 1]) + stored[101:])
        )
        verify(miniature, "--tokens", tmp_path / "tokens")
        with pytest.raises(SystemExit):
            verify(miniature, "--tokens", tmp_path / "tokens", "--full")
        assert (
            f"1 shards differ from their checksums → delete and make anew: {shard}" in capsys.readouterr().out
        )

    def test_it_finds_text_of_other_classes_and_says_which_field_lacks_images(
        self, miniature, undisturbed, tmp_path, capsys
    ):
        for name, first in (("right", 0), ("shifted", 1)):
            lines = [f"n{i + first:08d} name{i}" for i in range(10)]
            (tmp_path / f"{name}.txt").write_text("\n".join(lines))
            arguments = [
                "--class-names",
                tmp_path / f"{name}.txt",
                "--base",
                miniature / "models" / "sd15-mini",
            ]
            run_numbered("4_prepare_text_embeddings", *arguments, "--out", tmp_path / name)
        verify(miniature, "--text", tmp_path / "right")
        assert "10 of 10 classes have the prompt of their synset" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            verify(miniature, "--text", tmp_path / "shifted")
        assert (
            "FAIL 0 of 10 classes have the prompt of their synset → run script 4" in capsys.readouterr().out
        )
        sample(miniature / "ILSVRC", tmp_path / "small.csv", 5)
        tokens(miniature, tmp_path / "small.csv", tmp_path / "tokens")
        with pytest.raises(SystemExit):
            verify(miniature, "--tokens", tmp_path / "tokens")
        assert "10 are missing → tokens lack 10: run their script with this CSV" in capsys.readouterr().out

    def test_text_is_not_overwritten_by_another(self, miniature, tmp_path, capsys):
        names, base = miniature / "imagenet_classes.json", miniature / "models" / "sd15-mini"
        arguments = ["--class-names", names, "--base", base, "--out", tmp_path / "text"]
        run_numbered("4_prepare_text_embeddings", *arguments)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "text").iterdir()}
        run_numbered("4_prepare_text_embeddings", *arguments)
        assert "is complete" in capsys.readouterr().out
        with pytest.raises(
            UserError, match=r"was made for other classes \('a photo of a zero' there, 'a zero' here\)"
        ):
            run_numbered("4_prepare_text_embeddings", *arguments, "--template", "a {class_name}")
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "text").iterdir()} == before

    def test_the_sheet_shows_images_beside_their_decoded_latents(self, miniature, tmp_path, capsys):
        with pytest.raises(SystemExit):  # the VAE of the smallest miniature is untrained
            verify(miniature, "--sheet", tmp_path / "sheet.png")
        sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
        assert sheet.shape[1] > 8 * 192
        assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50
        assert "FAIL decoded latents are their images" in capsys.readouterr().out


def test_precision_is_recorded_and_bf16_is_close(miniature, undisturbed, tmp_path):
    tokens(miniature, miniature / "train.csv", tmp_path, "--precision", "bf16")
    rough, exact = FieldReader(tmp_path, "tokens"), FieldReader(undisturbed / "tokens", "tokens")
    cosine = torch.cosine_similarity(rough.read(exact.ids).float(), exact.read(exact.ids).float(), dim=-1)
    assert rough.spec.source["precision"] == "bf16"
    assert 0.999 < cosine.min() < 1 - 1e-6  # computed in another precision, and the same tokens
