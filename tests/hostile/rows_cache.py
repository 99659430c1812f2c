"""Lists of images, class files, caches, references and samples: damaged, edited, or of something else."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
from hostile import Case
from spoil import both, cut, drop_key, edit, fifo, link, nothing, only, put, remove, replace, set_key, write

from evaluation.image_files import missing_images

TRAIN = "train --config a.yaml run=runs/b"
LIST = "1 --imagenet data/ILSVRC --split train --per-class 6 --out new.csv"
TEXT = "4 --class-names classes.txt --base data/models/sd15-mini --out cache_new/text"
LATENTS = (
    "2 --csv data/train.csv --base data/models/sd15-mini --image-size 32 --workers 0 --out cache_new/latents"
)
TOKENS = "3 --csv data/train.csv --teacher data/models/dinov2-mini --grid 4 --workers 0 --out cache/tokens"
SCORE = "evaluate metrics images --out found.json eval.reference=real.classifier.npz eval.extractor=data/models/classifier"
MANIFEST, TOKENS_MANIFEST, TEXT_MANIFEST = (
    "cache/latents/manifest.json",
    "cache/tokens/manifest.json",
    "cache/text/manifest.json",
)
PROMPTS = "cache/text/prompts.json"
AGAIN = "4 --class-names data/imagenet_classes.json --base data/models/sd15-mini --out cache/text"
CAPTIONS = "4 --csv data/train.csv --base data/models/sd15-mini --out cache_new/text"


def lines(change):
    """Change the lines of data/train.csv."""

    def spoil(folder):
        path = folder / "data/train.csv"
        put(path, "\n".join(change(path.read_text().splitlines())) + "\n")

    return spoil


def npz(change):
    """Change the arrays of the reference."""

    def spoil(folder):
        path = folder / "real.classifier.npz"
        arrays = dict(np.load(path))
        change(arrays)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        put(path, buffer.getvalue())

    return spoil


def scaled(name, by):
    return npz(lambda arrays: arrays.__setitem__(name, by(arrays[name])))


def fields(number, value):
    """Set field `number` of the first row."""

    def change(rows):
        parts = rows[1].split(",")
        parts[number] = value
        return [rows[0], ",".join(parts), *rows[2:]]

    return lines(change)


def unfinished(folder):
    """Take the last shard of the tokens back to a `.partial` that is cut off."""
    shard = only(folder, "cache/tokens/shard-*.lmdb")
    data = shard.read_bytes()
    shard.unlink()
    for name in ("manifest.json", shard.with_suffix(".json").name):
        (folder / "cache/tokens" / name).unlink()
    put(shard.with_name(f"{shard.name}.partial"), data[: len(data) // 2 // 4096 * 4096])


def of_another_cache(folder):
    """A `.partial` of the held-out images in the place of ours."""
    unfinished(folder)
    partial = only(folder, "cache/tokens/*.partial")
    put(partial, only(folder, "cache_val/tokens/shard-*.lmdb").read_bytes())


def drawn(folder):
    """The folder of the 20 samples that were measured; its name depends on the number of threads."""
    return only(folder, "runs/a/samples/*/000019.png").parent


def other_image(folder):
    """Another picture in the place of a sample."""
    put(drawn(folder) / "000001.png", (drawn(folder) / "000002.png").read_bytes())


def _as_before(folder):
    """The samples are those of an undisturbed drawing, and the log knows each."""
    for path in (folder / "images").glob("*.png"):
        assert (drawn(folder) / path.name).read_bytes() == path.read_bytes(), path.name
    assert not missing_images(drawn(folder), range(20))


def _never_delete(folder):
    assert "delete" not in (folder / ".err").read_text()


LATIN = "id,img_path,class_id,synset\né,a,0,b\n".encode("latin-1")


def rows():
    for what, data, says in (
        ("lines of numbers", "\n".join(f"{i} name{i}" for i in range(12)), "number"),
        ("YAML", "0: tench\n1: goldfish\n", "classes.txt"),
        ("a list in YAML", "- tench\n- goldfish\n", "classes.txt"),
        ("a CSV", "0,tench\n1,goldfish\n", "classes.txt"),
        ("names alone", "tench\ngoldfish\n", "classes.txt"),
        ("a Python dict", "{0: 'tench'}", "classes.txt"),
        ("nothing", "", "empty"),
        ("a deep list", "[" * 3000, "classes.txt"),
        ("a gap", '{"0": "a", "2": "b"}', "1"),
        ("a number twice", '{"0": "a", "0": "b"}', "classes.txt"),
        ("numbers in other digits", '{"٠": "a", "١": "b"}', "classes.txt"),
        ("5,000 digits", '{"' + "9" * 5000 + '": "a"}', "classes.txt"),
        ("a surrogate", '{"0": "\\ud800"}', "classes.txt"),
        ("a list", '["a", "b"]', "classes.txt"),
        ("a number", "3", "classes.txt"),
        ("bytes", b"\xff\xfe\x00", "classes.txt"),
        ("a synset twice", "n01440764 a\nn01440764 b\n", "twice"),
        ("a name of blanks", '{"0": "  "}', "classes.txt"),
    ):
        yield Case(f"a class file that holds {what}", write("classes.txt", data), TEXT, (says,))
    yield Case("a class file that is a FIFO", fifo("classes.txt"), TEXT, ("classes.txt",))
    yield Case("a class file that is a device", link("classes.txt", "/dev/zero"), TEXT, ("classes.txt",))
    good = '\ufeff{"0": "zero",\r\n "1": "one"}'
    yield Case(
        "a class file with a BOM and CRLF", write("classes.txt", good), TEXT, ("of 2 classes",), goes_on=True
    )

    for what, spoil, says in (
        ("a field too many", lines(lambda rows: [rows[0], rows[1] + ",x", *rows[2:]]), "train.csv"),
        ("a field too few", lines(lambda rows: [rows[0], rows[1].rsplit(",", 1)[0], *rows[2:]]), "train.csv"),
        ("a class in other digits", fields(2, "٣"), "train.csv"),
        ("a class with an underscore", fields(2, "1_0"), "train.csv"),
        ("a class with blanks", fields(2, " 1"), "train.csv"),
        ("a class with a sign", fields(2, "+1"), "train.csv"),
        ("a negative class", fields(2, "-1"), "class"),
        ("a class of 5,000 digits", fields(2, "9" * 5000), "train.csv"),
        ("a class that is a name", fields(2, "three"), "train.csv"),
        ("no class", fields(2, ""), "train.csv"),
        ("an empty id", fields(0, ""), "id"),
        ("an id with a NUL", fields(0, "a\0b"), "train.csv"),
        ("an id with a line break", fields(0, '"a\nb"'), "id"),
        ("an id of 600 letters", fields(0, "x" * 600), "x"),
        ("an id twice", lines(lambda rows: [*rows, rows[1]]), "twice"),
        ("no rows", lines(lambda rows: rows[:1]), "no images"),
        ("no header", lines(lambda rows: rows[1:]), "columns"),
        ("an open quote", lines(lambda rows: [rows[0], '"' + rows[1], *rows[2:]]), "train.csv"),
        ("a field of 200,000 letters", fields(3, "x" * 200_000), "train.csv"),
        ("an image that is missing", fields(1, "none.png"), "none.png"),
        ("an image whose name has a NUL", fields(1, "a\0b"), "train.csv"),
    ):
        yield Case(f"a list with {what}", spoil, LATENTS, (says,))
    yield Case("a list that is empty", write("data/train.csv", b""), LATENTS, ("train.csv",))
    yield Case(
        "a list in UTF-16", write("data/train.csv", "id,img_path\n".encode("utf-16")), LATENTS, ("train.csv",)
    )
    yield Case("a list in Latin-1", write("data/train.csv", LATIN), LATENTS, ("train.csv", "UTF-8"))
    yield Case("a list that is a FIFO", fifo("data/train.csv"), LATENTS, ("train.csv",))
    yield Case("a list that is a folder", both(remove("data/train.csv"), lambda folder: (folder / "data/train.csv").mkdir()), LATENTS, ("train.csv",))  # fmt: skip
    bom = lines(lambda rows: ["\ufeff" + rows[0], *rows[1:]])
    crlf = lines(lambda rows: [row + "\r" for row in rows])
    yield Case("a list with a BOM", bom, LATENTS, ("complete",), goes_on=True)
    yield Case("a list with CRLF", crlf, LATENTS, ("complete",), goes_on=True)

    for file, what, change, says in (
        (MANIFEST, "more values than there are", set_key("num_samples", to=61), "latents"),
        (MANIFEST, "fewer values than there are", set_key("num_samples", to=59), "latents"),
        (MANIFEST, "another shape", set_key("shape", to=[4, 8, 8]), "latents"),
        (MANIFEST, "a shape of nothing", set_key("shape", to=[0, 16, 16]), "latents"),
        (MANIFEST, "a negative shape", set_key("shape", to=[-4, 16, 16]), "latents"),
        (MANIFEST, "a shape of truth", set_key("shape", to=[True, 16, 16]), "latents"),
        (MANIFEST, "another scaling factor", set_key("details", "scaling_factor", to=0.5), "latents"),
        (MANIFEST, "other ids", set_key("ids_sha256", to="0" * 64), "latents"),
        (MANIFEST, "a shard elsewhere", set_key("shards", 0, "file", to="../../cache_val/latents/shard-00000.lmdb"), "latents"),
        (MANIFEST, "a shard at an absolute path", set_key("shards", 0, "file", to="/etc/passwd"), "latents"),
        (MANIFEST, "a shard twice", lambda m: m["shards"].append(m["shards"][0]), "latents"),
        (MANIFEST, "no shards", set_key("shards", to=[]), "latents"),
        (MANIFEST, "a shard of another size", set_key("shards", 0, "bytes", to=10), "latents"),
        (MANIFEST, "a shard of more values", set_key("shards", 0, "count", to=61), "latents"),
        (MANIFEST, "another version", set_key("version", to=2), "latents"),
        (MANIFEST, "a later version", set_key("version", to=99), "latents"),
        (MANIFEST, "another field", set_key("field", to="tokens"), "latents"),
        (MANIFEST, "another dtype", set_key("dtype", to="float64"), "latents"),
        (TOKENS_MANIFEST, "another grid", set_key("view", "grid", to=8), "tokens"),
        (TOKENS_MANIFEST, "no grid", drop_key("view", "grid"), "tokens"),
        (TOKENS_MANIFEST, "another width", set_key("shape", to=[16, 32]), "tokens"),
        (TEXT_MANIFEST, "more prompts", set_key("num_prompts", to=11), "text"),
        (TEXT_MANIFEST, "fewer prompts", set_key("num_prompts", to=2), "text"),
        (TEXT_MANIFEST, "more values than there are", set_key("num_samples", to=12), "text"),
        (TEXT_MANIFEST, "a template without a name", set_key("details", "template", to="x"), "text"),
        (TEXT_MANIFEST, "another digest", set_key("prompts_sha256", to="0" * 64), "text"),
        (TEXT_MANIFEST, "another shape", set_key("shape", to=[4932]), "text"),
        (TEXT_MANIFEST, "a field of another shape", set_key("details", "fields", "prompt_embeds", "shape", to=[77, 16]), "text"),
        (TEXT_MANIFEST, "a field of another type", set_key("details", "fields", "prompt_embeds", "dtype", to="int8"), "text"),
        (TEXT_MANIFEST, "no fields", set_key("details", "fields", to={}), "text"),
        (PROMPTS, "prompts of other classes", lambda m: m["prompts"].reverse(), "prompts.json"),
        (PROMPTS, "fewer prompts", lambda m: m["prompts"].pop(), "prompts.json"),
        (PROMPTS, "prompts that are numbers", set_key("prompts", 0, to=3), "prompts.json"),
        (PROMPTS, "fewer classes", set_key("n_classes", to=2), "prompts.json"),
        (PROMPTS, "classes of text", set_key("n_classes", to="x"), "prompts.json"),
        (PROMPTS, "a negative number of classes", set_key("n_classes", to=-1), "prompts.json"),
    ):  # fmt: skip
        yield Case(f"{file} has {what}", edit(file, change), TRAIN, (says,))
    also = both(
        *(
            edit(f"cache/tokens/{name}.json", set_key("view", "grid", to=8))
            for name in ("manifest", "settings")
        )
    )
    yield Case("both records of the tokens have another grid", also, TRAIN, ("tokens",))
    scale = both(*(edit(f"cache/latents/{name}.json", set_key("details", "scaling_factor", to="x")) for name in ("manifest", "settings")))  # fmt: skip
    yield Case("both records of the latents have no factor", scale, TRAIN, ("latents",))
    for what, spoil, says in (
        ("a shard is missing", remove("cache/latents/shard-*.lmdb"), "shard-00000.lmdb"),
        ("a shard is empty", write("cache/latents/shard-00000.lmdb", b""), "shard-00000.lmdb"),
        ("a shard is cut off", cut("cache/latents/shard-*.lmdb"), "shard-00000.lmdb"),
        ("a shard is noise", write("cache/latents/shard-00000.lmdb", b"\x07" * 278528), "shard-00000.lmdb"),
        ("a shard is a FIFO", fifo("cache/latents/shard-00000.lmdb"), "shard-00000.lmdb"),
        ("a shard of text is cut off", cut("cache/text/shard-00000.lmdb"), "shard-00000.lmdb"),
        ("a shard of text is missing", remove("cache/text/shard-00000.lmdb"), "shard-00000.lmdb"),
        ("a shard of text is a FIFO", fifo("cache/text/shard-00000.lmdb"), "shard-00000.lmdb"),
        ("the prompts are missing", remove(PROMPTS), "prompts.json"),
        ("the text is of an older format", write("cache/text/text.safetensors", b"x"), "script 4"),
        ("the list and the cache differ", lines(lambda rows: rows[:2]), ""),
    ):
        if says:
            yield Case(what, spoil, TRAIN, (says,))
    for what, spoil, command, says in (
        ("its prompts are of other classes", edit(PROMPTS, lambda m: m["prompts"].reverse()), AGAIN, "other classes"),
        ("it is of an older format", write("cache/text/text.safetensors", b"x"), AGAIN, "older format"),
        ("it is of another base model", nothing, AGAIN + " --revision x", "another source"),
        ("it has another type", nothing, AGAIN + " --dtype bfloat16", "another"),
        ("it has shards of another size", nothing, AGAIN + " --shard-size 3", "--shard-size"),
        ("the list has no prompts", nothing, CAPTIONS, "has no prompts"),
        ("the prompts do not exist", nothing, AGAIN + " --prompts none.txt", "none.txt"),
        ("the prompts are a FIFO", fifo("p.txt"), AGAIN + " --prompts p.txt", "p.txt"),
        ("the prompts are not UTF-8", write("p.txt", b"\xff\xfe"), AGAIN + " --prompts p.txt", "p.txt"),
        ("classes and captions are given", nothing, AGAIN + " --csv data/train.csv", "not allowed with"),
        ("neither classes nor captions are given", nothing, "4 --out cache_new/text", "required"),
    ):  # fmt: skip
        yield Case(f"text is made where {what}", spoil, command, (says,))
    for what, spoil in (
        ("its prompts are missing", remove(PROMPTS)),
        ("its manifest is missing", remove(TEXT_MANIFEST)),
        ("a shard is missing", remove("cache/text/shard-00000.lmdb")),
    ):
        yield Case(f"text is made anew where {what}", spoil, AGAIN, ("is complete",), goes_on=True)
    yield Case("a partial shard is cut off", unfinished, TOKENS, ("partial",))
    yield Case("a partial shard is of another cache", of_another_cache, TOKENS, ("partial",))
    yield Case("a partial shard is empty", both(unfinished, lambda folder: put(only(folder, "cache/tokens/*.partial"), b"")), TOKENS, ("complete",), goes_on=True, loses=("cache/tokens/",))  # fmt: skip
    yield Case("a partial shard is noise", both(unfinished, lambda folder: put(only(folder, "cache/tokens/*.partial"), b"\7" * 40960)), TOKENS, ("partial",))  # fmt: skip

    for what, spoil in {
        "is cut off": cut("real.classifier.npz"),
        "is empty": write("real.classifier.npz", b""),
        "is a FIFO": fifo("real.classifier.npz"),
        "lacks its mean": npz(lambda arrays: arrays.pop("mu")),
        "has a mean of text": scaled("mu", lambda mu: mu.astype(str)),
        "has a complex mean": scaled("mu", lambda mu: mu + 1j),
        "has a mean of another size": scaled("mu", lambda mu: mu[:-1]),
        "has a mean that is not finite": scaled("mu", lambda mu: mu * np.nan),
        "has a covariance that is not symmetric": scaled("sigma", lambda s: s + np.triu(np.ones_like(s), 1)),
        "has a covariance that is negative": scaled("sigma", lambda s: s - 10 * np.eye(len(s))),
        "has a complex covariance": scaled("sigma", lambda s: s + 1j),
        "has a covariance of text": scaled("sigma", lambda s: s.astype(str)),
        "has a covariance of another size": scaled("sigma", lambda s: s[:-1]),
        "has features of text": scaled("features", lambda f: f.astype(str)),
        "has complex features": scaled("features", lambda f: f + 1j),
        "has metadata of a number": npz(lambda arrays: arrays.update(metadata=np.array(3))),
        "has metadata that is deep": npz(lambda arrays: arrays.update(metadata=np.array("[" * 3000))),
        "has metadata that is a list": npz(lambda arrays: arrays.update(metadata=np.array("[1]"))),
        "counts no images": npz(lambda arrays: arrays.update(metadata=np.array(json.dumps(json.loads(str(arrays["metadata"])) | {"num_images": -3})))),
        "counts 0 images": npz(lambda arrays: arrays.update(metadata=np.array(json.dumps(json.loads(str(arrays["metadata"])) | {"num_images": 0})))),
        "has a covariance a little below 0": scaled("sigma", lambda s: s - 1e-3 * np.linalg.eigvalsh(s)[-1] * np.eye(len(s))),
        "has a covariance of integers": scaled("sigma", lambda s: s.astype(int)),
        "has features of one dimension": scaled("features", lambda f: f[0]),
        "has no features at all": scaled("features", lambda f: f[:0]),
        "has features that are not finite": scaled("features", lambda f: f + np.inf),
        "has a distance of text": npz(lambda arrays: arrays.update(distance_of_halves=np.array("x"))),
        "has other features than the extractor": npz(_narrower),
        "is a device": link("real.classifier.npz", "/dev/zero"),
        "is a pickle": write("real.classifier.npz", pickle.dumps({"mu": 1})),
        "holds objects": npz(lambda arrays: arrays.update(mu=np.array([{}, []], dtype=object))),
    }.items():  # fmt: skip
        yield Case(f"a reference {what}", spoil, SCORE, ("real.classifier.npz",))
    again = "evaluate metrics runs/a eval.bootstrap=6"
    yield Case("a sample is another picture", other_image, again, ("000001.png",))
    yield Case("a sample is of another size", _resized, again, ("png",))
    yield Case("a sample is grey", _grey, again, ("png",))
    first = lambda spoil: lambda folder: spoil(drawn(folder) / "000001.png")  # noqa: E731
    yield Case("a sample is a FIFO", first(_as_fifo), again, ("000001.png",))
    yield Case("a sample is a link to another", first(lambda path: (path.unlink(), path.symlink_to("000002.png"))), again, ("000001.png",))  # fmt: skip
    anew = {"goes_on": True, "loses": ("runs/a/eval/", "runs/a/samples/"), "check": _as_before}
    yield Case(
        "a sample is cut off", first(lambda path: put(path, path.read_bytes()[:-9])), again, (), **anew
    )
    for what, change in {
        "is missing": lambda path: path.unlink(),
        "lacks a line": lambda path: put(path, b"".join(path.read_bytes().splitlines(keepends=True)[1:])),
        "ends in half a line": lambda path: put(path, path.read_bytes()[:-5]),
        "has a line of nonsense": lambda path: put(path, b"\xff\n" + path.read_bytes()),
        "has a deep line": lambda path: put(path, b"[" * 3000 + b"\n" + path.read_bytes()),
    }.items():
        spoil = lambda folder, change=change: change(drawn(folder) / "images.jsonl")  # noqa: E731
        yield Case(f"the log of samples {what}", spoil, again, (), **anew)
    log = lambda folder: _as_fifo(drawn(folder) / "images.jsonl")  # noqa: E731
    yield Case("the log of samples is a FIFO", log, again, ("images.jsonl",))
    bombs = "evaluate metrics images eval.reference=real.classifier.npz eval.extractor=data/models/classifier"
    yield Case("an image of one's own is damaged", cut("images/000000.png"), bombs, ("images/000000.png",))
    yield Case(
        "an image of one's own is a text bomb",
        _text_bomb("images/000000.png"),
        bombs,
        ("images/000000.png", "take it out"),
        check=_never_delete,
    )
    yield Case("an image of one's own is a FIFO", fifo("images/000000.png"), bombs, ("images/000000.png",))
    for what, how in {
        "a device": link("images/zero.png", "/dev/zero"),
        "a folder": lambda folder: (folder / "images/zero.png").mkdir(),
        "a link to nothing": link("images/zero.png", "none.png"),
        "text": write("images/zero.png", b"hello"),
        "grey": write("images/zero.png", _png((32, 32), "L")),
        "of another size": write("images/zero.png", _png((16, 16), "RGB")),
        "a decompression bomb": lambda folder: bomb(folder / "images/zero.png"),
    }.items():
        says = ("images",) if "size" in what else ("images/zero.png",)
        yield Case(f"an image of one's own is {what}", how, bombs, says)
    own = bombs.replace("metrics images", "metrics own.npz")
    for what, how in {
        "a FIFO": fifo("own.npz"),
        "a device": link("own.npz", "/dev/zero"),
        "a pickle": write("own.npz", pickle.dumps([1])),
        "empty": write("own.npz", b""),
        "of numbers": write("own.npz", _npz_of((8, 4, 4, 3), "<f8")),
        "of more images than it has": write("own.npz", _npz_of((10**9, 4, 4, 3))),
        "of fewer images than none": write("own.npz", _npz_of((-8, 4, 4, 3))),
        "of an image beyond memory": write("own.npz", _npz_of((8, 10**6, 10**6, 3))),
    }.items():  # fmt: skip
        yield Case(f"an .npz of one's own is {what}", how, own, ("own.npz",))
    yield Case("the file of times is damaged", write("times.json", b"{"), "evaluate report runs/a -o page.html --times times.json", ("times.json",))  # fmt: skip
    yield Case("the file of times is deep", write("times.json", b"[" * 3000), "evaluate report runs/a -o page.html --times times.json", ("times.json",))  # fmt: skip
    page = "evaluate report runs/a -o page.html --times times.json"
    yield Case("the file of times is a FIFO", fifo("times.json"), page, ("times.json",))
    for what, data in {
        "holds an object": "{}",
        "holds numbers": "[1]",
        "lacks the seconds": '[{"stage": "a", "command": "b"}]',
        "has seconds of text": '[{"stage": "a", "command": "b", "seconds": "1"}]',
        "has seconds that are none": '[{"stage": "a", "command": "b", "seconds": NaN}]',
    }.items():
        yield Case(f"the file of times {what}", write("times.json", data), page, ("times.json",))
    plain = '[{"stage": "a|<b>\u202e", "command": "c`d", "seconds": 1}]'
    yield Case(
        "the file of times has no groups", write("times.json", plain), page, ("page.html",), goes_on=True
    )
    yield Case("a weights file is cut off", cut("runs/a/checkpoints/step-0000006/ema.safetensors"), "export runs/a --out new", ("step-0000006",))  # fmt: skip
    yield Case("a list in another order of columns", replace("data/train.csv", "id,img_path", "img_path,id"), LATENTS, ("columns",))  # fmt: skip
    yield Case("a class file of another split", write("data/LOC_synset_mapping.txt", "n0 a\n"), LIST + " --classes data/LOC_synset_mapping.txt", ("LOC_synset_mapping.txt",))  # fmt: skip
    yield Case("no such split", nothing, LIST.replace("train", "none"), ("none",))
    yield Case("no such folder of images", nothing, LIST.replace("data/ILSVRC", "data/none"), ("data/none",))


def _png(size, mode):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def _resized(folder):
    put(drawn(folder) / "000001.png", _png((16, 16), "RGB"))


def _grey(folder):
    put(drawn(folder) / "000001.png", _png((32, 32), "L"))


def _as_fifo(path):
    path.unlink()
    os.mkfifo(path)


def _narrower(arrays):
    """The first dimensions alone, of all that a reference holds."""
    arrays.update(mu=arrays["mu"][:-1], sigma=arrays["sigma"][:-1, :-1], features=arrays["features"][:, :-1])


def _npz_of(shape, descr="|u1"):
    """An .npz of 8 images of 4 × 4, with this shape in its header."""
    buffer, npy = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("arr_0.npy", npy.getvalue() + bytes(8 * 4 * 4 * 3))
    return buffer.getvalue()


def bomb(path):
    """A picture of 20,000 × 20,000 pixels in a few kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1_000_000)
    put(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def _text_bomb(name):
    """A compressed text chunk that grows a thousandfold."""

    def spoil(folder):
        data = _png((8, 8), "RGB")
        text = b"zTXta\0\0" + zlib.compress(b"x" * 80_000_000)
        chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
        put(folder / name, data[:33] + chunk + data[33:])

    return spoil
