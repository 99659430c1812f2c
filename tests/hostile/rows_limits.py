"""Images that are none, sizes beyond memory, devices that cannot train, folders that cannot be written, and odd names."""

import os
import shutil
import socket

from hostile import Case
from rows_cache import LATENTS, _png, _text_bomb, bomb
from spoil import both, fifo, link, nothing, only, put

from cache.text import TextReader, write_text

TRAIN = "train --config a.yaml run=runs/b"
FIRST = "data/ILSVRC/Data/CLS-LOC/train"
UNREADABLE = "cache_new/latents/unreadable.csv"


def first_image(replace_by):
    """Put something else in the place of the list's first image."""

    def spoil(folder):
        name = (folder / "data/train.csv").read_text().splitlines()[1].split(",")[1]
        path = folder / name
        path.unlink()
        replace_by(path)

    return spoil


def listed(folder):
    """The image is left out and listed, not the end of everything."""
    assert (folder / UNREADABLE).read_text().count("\n") == 2


def sock(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def wide(path):
    """60,000 × 1 pixels."""
    put(path, _png((60_000, 1), "RGB"))


def named(run):
    """Another name for the run."""

    def spoil(folder):
        shutil.move(folder / "runs/a", folder / "runs" / run)
        path = folder / "runs" / run / "config.yaml"
        put(path, path.read_text().replace("run: runs/a", "run: x"))

    return spoil


def classes_named(name):
    """Another name for class 0, whose text stays as it was."""

    def spoil(folder):
        text = TextReader(folder / "cache/text")
        prompts = [f"a photo of a {name}", *text.prompts[1:]]
        fields, null = text.fields_of(range(len(text))), text.null
        shutil.rmtree(text.folder)
        listed = {"n_classes": text.n_classes, "synsets": text.synsets, "prompts": prompts}
        write_text(text.folder, text.spec, listed, fields, null)

    return spoil


def page_is_safe(folder):
    """The page shows names and does not run them."""
    page = (folder / "page.html").read_text()
    assert "<script>alert" not in page
    assert "\u202e" not in page
    quiet(folder)


def quiet(folder):
    """No library warns of letters or labels."""
    assert "Warning" not in (folder / ".err").read_text()


ODD = (
    "a$b$c",
    "$\\frac{1}{0}$",
    "<b>bold<b>",
    "a|b",
    "a&b",
    "x_{y}^{z}",
    "‮live",
    "a`b",
    "100%",
    "#1",
    "*star*",
    "_under",
    "two\nlines",
    "\x1b[31mred",
    "日本語",
    "ends\\",
)


def rows():
    for what, how in {
        "a FIFO": lambda path: os.mkfifo(path),
        "a socket": sock,
        "a folder": lambda path: path.mkdir(),
        "empty": lambda path: put(path, b""),
        "text": lambda path: put(path, b"hello"),
        "a text bomb": lambda path: _text_bomb(path.name)(path.parent),
        "a decompression bomb": bomb,
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a device": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        yield Case(
            f"an image that is {what}", first_image(how), LATENTS, ("left out",), goes_on=True, check=listed
        )
    yield Case("an image of 60,000 × 1 pixels", first_image(wide), LATENTS, ("complete",), goes_on=True)
    official = "3 --csv data/train.csv --teacher data/models/dinov2-mini --grid 14 --workers 0 --view official --out cache_new/latents"  # fmt: skip
    yield Case(
        "a wide image in the official view",
        first_image(wide),
        official,
        ("left out",),
        goes_on=True,
        check=listed,
    )

    def not_utf8(folder):
        picture = only(folder, f"{FIRST}/*/*")
        os.rename(os.fsencode(picture), os.fsencode(picture.parent) + b"/\xff\xfe.JPEG")

    again = "1 --imagenet data/ILSVRC --split train --per-class 6 --out new.csv"
    yield Case("an image whose name is no UTF-8", not_utf8, again.replace("6", "12"), (r"\xff\xfe.JPEG",))
    yield Case("a picture that is a FIFO in the tree", _fifo_in_tree, again, ("new.csv",), goes_on=True)

    for setting, says in {
        "device=meta": "train.device",
        "train.device=meta": "meta",
        "train.device=xla": "xla",
        "train.device=cuda": "cuda",
        "train.device=mps": "mps",
        "train.device=nonsense": "nonsense",
        "train.device=cpu:7": "cpu",
        "align.head_hidden=1000000000000": "head_hidden",
        "model.lora_rank=1000000000": "lora_rank",
        "teacher.grid=100000": "grid",
        "teacher.grid=[4,4,4]": "[height, width]",
        "teacher.grid=[4,1e999]": "[height, width]",
        "teacher.grid=[2,8]": "not of the shape of latents",
        "teacher.dim=1000000000000": "dim",
        "data.batch_size=1000000000": "batch_size",
        "data.batch_size=0": "batch_size",
        "train.steps=0": "steps",
        "train.steps=-3": "steps",
        "train.steps=99999999999999999999": "steps",
        "optim.lr=-1": "lr",
        "optim.accumulate=1000000000000": "accumulate",
        "data.read_threads=1000000": "read_threads",
        "optim.lr=1e30": "lr",
        "train.eval_every=2 eval.num_samples=2": "num_samples",
        "train.eval_every=2 eval.num_samples=3": "num_samples",
        "eval.num_samples=0": "num_samples",
        "eval.batch_size=0": "batch_size",
        "seed=99999999999999999999": "seed",
    }.items():
        train = "lora" if "lora" in setting else "a"
        yield Case(
            f"a training with {setting}",
            nothing,
            f"train --config {train}.yaml run=runs/b {setting}",
            (says,),
        )
    for command, says in {
        "evaluate metrics runs/a eval.num_samples=2": "num_samples",
        "evaluate metrics runs/a eval.num_samples=1000000000000": "num_samples",
        "evaluate metrics runs/a eval.sampling_steps=100000": "sampling_steps",
        "evaluate metrics runs/a eval.batch_size=1000000000000": "batch_size",
        "evaluate metrics runs/a --device meta": "meta",
        "evaluate metrics runs/a --device nonsense": "nonsense",
        "evaluate align runs/a --timesteps 5000": "5000",
        "evaluate align runs/a --num-images 2": "2",
        "evaluate align runs/a --num-images 99999": "99999",
        "evaluate pictures runs/a --classes 99 -o p.png": "99",
        "evaluate reference data/train.csv --size 7 --out x eval.extractor=data/models/classifier": "--size",
        "evaluate reference data/train.csv --size 99999999 --out x eval.extractor=data/models/classifier": "99999999",
        "2 --csv data/train.csv --base data/models/sd15-mini --image-size 33 --workers 0 --out new": "33",
        "2 --csv data/train.csv --base data/models/sd15-mini --image-size 9999999 --workers 0 --out new": "9999999",
        "2 --csv data/train.csv --base data/models/sd15-mini --image-size 0 --workers 0 --out new": "image-size",
        "2 --csv data/train.csv --base data/models/sd15-mini --image-size 32 --batch-size 0 --out new": "batch-size",
        "2 --csv data/train.csv --base data/models/sd15-mini --image-size 32 --device meta --workers 0 --out new": "meta",
        "3 --csv data/train.csv --teacher data/models/dinov2-mini --grid 100000 --workers 0 --out new": "100000",
        "3 --csv data/train.csv --teacher data/models/dinov2-mini --grid 0 --workers 0 --out new": "grid",
        "3 --csv data/train.csv --teacher data/models/dinov2-mini --grid 4x --workers 0 --out new": "WIDTHxHEIGHT",
        "3 --csv data/train.csv --teacher data/models/dinov2-mini --grid 4x4x4 --workers 0 --out new": "4x4x4",
        "3 --csv data/train.csv --teacher data/models/dinov2-mini --grid 4x2 --view official --workers 0 --out new": "squares",
        "3 --csv data/train.csv --teacher data/models/dinov2-mini --size 64x32 --workers 0 --out new": "--size 64x32",
        "2 --csv data/train.csv --base data/models/sd15-mini --size 64x33 --workers 0 --out new": "64x33",
        "2 --csv data/train.csv --base data/models/sd15-mini --size 99999x32 --workers 0 --out new": "99999",
        "2 --csv data/train.csv --base data/models/sd15-mini --size 64x32 --image-size 32 --out new": "--size",
        "1 --imagenet data/ILSVRC --split train --per-class 0 --out new.csv": "per-class",
        "1 --imagenet data/ILSVRC --split train --per-class 99999 --out new.csv": "per-class",
        "5 --csv data/train.csv --latents cache/none --tokens cache/tokens --text cache/text": "cache/none",
        "0 --out data/ILSVRC --quick": "ILSVRC",
    }.items():
        yield Case(command, nothing, command, (says,))
    for command in ("report {} -o page.html", "curve {}", "sample {}"):
        name = "a\udcff"
        yield Case(f"a run whose name is no UTF-8: {command}", named(name), f"evaluate {command.format(f'runs/{name}')}", (r"a\udcff", "rename"))  # fmt: skip
    for name in ODD:
        if "/" not in name:
            report = f"evaluate report 'runs/{name}' -o page.html"
            yield Case(
                f"a run called {name}, reported",
                named(name),
                report,
                ("page.html",),
                goes_on=True,
                check=page_is_safe,
            )
        curve = f"evaluate curve 'runs/{name}'"
        yield Case(
            f"a run called {name}, drawn",
            named(name),
            curve,
            ("curve.png",),
            goes_on=True,
            loses=("runs/",),
            check=quiet,
        )
    pictures = "evaluate pictures runs/a -o p.png eval.num_samples=20"
    for name in ("$x$", "<script>alert(1)</script>", "a|b", "‮live", "$\\frac{1}{0}$", "日本語", "two\nlines"):
        spoil = classes_named(name)
        yield Case(
            f"a class called {name}, drawn",
            spoil,
            pictures,
            ("p.png",),
            goes_on=True,
            loses=("runs/", "cache/text"),
            check=quiet,
        )
    out = "export runs/a --out new"
    yield Case("an output that is a device", link("new", "/dev/null"), out, ("new",), check=_still_a_device)
    yield Case("a page that is a device", link("page.html", "/dev/null"), "evaluate report runs/a -o page.html", ("page.html",), check=_still_a_device)  # fmt: skip
    yield Case(
        "a list that is to be a device",
        link("new.csv", "/dev/null"),
        again,
        ("new.csv",),
        check=_still_a_device,
    )
    yield Case(
        "an output that is a FIFO", fifo("page.html"), "evaluate report runs/a -o page.html", ("page.html",)
    )
    yield Case("a run that is a file", lambda folder: put(folder / "runs/b", b""), TRAIN, ("runs/b",))
    yield Case(
        "an output below a file",
        lambda folder: put(folder / "new", b""),
        "export runs/a --out new/x",
        ("new",),
    )
    yield Case(
        "an export that holds one's own file",
        lambda folder: put(folder / "new/mine.txt", b"x"),
        out,
        ("new",),
    )
    gone = both(lambda folder: shutil.rmtree(folder / "runs/a/export/ema"), nothing)
    yield Case("an export that lacks its EMA", gone, "export runs/a", ("export",), goes_on=True, loses=("runs/a/export/",), check=lambda folder: only(folder, "runs/a/export/ema/unet/*.safetensors"))  # fmt: skip
    mine = lambda folder: put(folder / "runs/a/export/mine.txt", b"x")  # noqa: E731
    more = "train --config a.yaml train.steps=8 --allow-change train.steps"
    yield Case("a run goes on though the export holds one's own file", mine, more, (), goes_on=True, loses=("runs/a/export/ema", "runs/a/export/raw", "runs/a/export/made_from.json", "runs/a/export/README.md", "runs/a/"), check=lambda folder: only(folder, "runs/a/export/mine.txt"))  # fmt: skip


def _still_a_device(folder):
    path = next(folder / name for name in ("new", "page.html", "new.csv") if (folder / name).is_symlink())
    assert path.is_char_device(), path


def _fifo_in_tree(folder):
    os.mkfifo(only(folder, f"{FIRST}/*") / "pipe.JPEG")
