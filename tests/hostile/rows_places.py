"""Something else in the place of what is written, what others wrote beside it, and two things that contradict each other."""

import json
import os
import shutil

from hostile import Case
from spoil import both, edit, edit_line, fifo, nothing, put, remove, set_key, write

TRAIN, AGAIN = "train --config a.yaml run=runs/b", "train --config a.yaml"
MORE = f"{AGAIN} train.steps=8 --allow-change train.steps"
REPORT = "evaluate report runs/a -o page.html"
VERIFY = "5 --csv data/train.csv --latents cache/latents --tokens cache/tokens --text cache/text"
OWN = "evaluate metrics images eval.extractor=data/models/classifier eval.reference=real.classifier.npz"
SCRIPT_2 = "2 --csv data/train.csv --base data/models/sd15-mini --image-size 32 --workers 0 --batch-size 16 --out cache/latents"


def moved(name: str, to: str):
    """A folder elsewhere, and a link in its place."""

    def spoil(folder):
        shutil.move(folder / name, folder / to)
        (folder / name).symlink_to(os.path.relpath(folder / to, (folder / name).parent))

    return spoil


def without_newline(name: str):
    def spoil(folder):
        put(folder / name, (folder / name).read_bytes().rstrip(b"\n"))

    return spoil


def steps_of(name: str, *expected):
    def check(folder):
        steps = [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]
        assert steps == list(expected), steps

    return check


def damaged_twice(folder):
    put(folder / "runs/a/checkpoints/damaged-step-0000006/mine.txt", b"x")
    put(folder / "runs/a/checkpoints/step-0000006/ema.safetensors", b"x")


def rows():
    for what in ("s", "data", "a.yaml"):
        yield Case(f"a sheet called {what}", nothing, f"{VERIFY} --sheet {what}", (".png",))
    no_metrics = edit_line("runs/a/eval/points.jsonl", set_key("metrics", to={}))
    yield Case("a point without metrics", no_metrics, REPORT, ("points.jsonl", "metrics"))
    for name, command in {
        "runs/a/.lock": AGAIN,
        "runs/a/.export.lock": "export runs/a",
        "cache/latents/.lock": SCRIPT_2,
        "runs/a/skipped.jsonl": AGAIN,
    }.items():
        yield Case(f"{name} is a FIFO", fifo(name), command, (name.rsplit("/")[-1], "regular file"))
    locked = write("runs/b/.lock", b"mine")
    yield Case("a lock that held words of one's own", locked, TRAIN, (), goes_on=True, check=lambda folder: _holds(folder / "runs/b/.lock", b"mine"))  # fmt: skip
    yield Case("numbers written over a reference", nothing, f"{OWN} --out real.classifier.npz", (".json",))
    yield Case("numbers of two folders in one file", _two_folders, OWN.replace("images", "images images2", 1) + " --out n.json", ("one folder",))  # fmt: skip
    yield Case("a picture beside a JSON of one's own", write("p.json", b"{}"), "evaluate pictures runs/a -o p.png eval.num_samples=20", ("p.json",))  # fmt: skip
    yield Case("the last point has lost its newline", without_newline("runs/a/eval/points.jsonl"), "evaluate metrics runs/a eval.bootstrap=4", (), goes_on=True, loses=("runs/a/eval", "runs/a/samples"), check=steps_of("runs/a/eval/points.jsonl", 6, 6))  # fmt: skip
    yield Case("the last line of metrics has lost its newline", without_newline("runs/a/metrics.jsonl"), MORE, (), goes_on=True, loses=("runs/a/",), check=steps_of("runs/a/metrics.jsonl", 2, 4, 6, 8))  # fmt: skip

    def bom(folder):
        return put(
            folder / "runs/a/eval/points.jsonl",
            b"\xef\xbb\xbf" + (folder / "runs/a/eval/points.jsonl").read_bytes(),
        )

    yield Case("points with a byte order mark", bom, REPORT, ("page.html",), goes_on=True)
    theirs = write("runs/a/export/pipeline/unet/config.json", b"mine")
    yield Case(
        "a pipeline of one's own in the export",
        theirs,
        "export runs/a --pipeline",
        ("config.json", "move it away"),
    )
    yield Case("an export whose ema is a link elsewhere", both(moved("runs/a/export/ema", "ema"), remove("runs/a/export/README.md")), "export runs/a", ("link",))  # fmt: skip
    for place in ("runs/a/export", "runs/a/checkpoints"):
        spoil = both(lambda folder, place=place: shutil.rmtree(folder / place), write(place, b"x"))
        yield Case(f"{place} is a file", spoil, "export runs/a" if "export" in place else AGAIN, ("no folder",) if "export" in place else ())  # fmt: skip
    yield Case("a damaged checkpoint beside an earlier one", damaged_twice, AGAIN, (), goes_on=True, loses=("runs/a/",), check=lambda folder: _holds(folder / "runs/a/checkpoints/damaged-step-0000006/mine.txt", b"x"))  # fmt: skip
    yield Case("a checkpoint is a link", moved("runs/a/checkpoints/step-0000002", "far"), MORE, (), goes_on=True, loses=("runs/a/",), check=lambda folder: _holds(folder / "far/trained.safetensors"))  # fmt: skip
    yield Case("an epsilon that fp32 rounds to 0", nothing, f"{TRAIN} optim.eps=1e-50", ("optim.eps",))
    null = write("o.yaml", b"optim: null\n")
    yield Case(
        "a null section and an override of it",
        null,
        "train --config a.yaml --config o.yaml run=runs/b optim.lr=1e-3",
        ("optim",),
    )
    two = "evaluate metrics runs/a/checkpoints/step-0000004 --checkpoint 6"
    yield Case("a checkpoint's folder and another step", nothing, two, ("step 4", "6"))
    alone = "evaluate curve runs/a/checkpoints/step-0000004 --out c"
    yield Case(
        "a curve of one checkpoint", nothing, alone, ("curve.png",), goes_on=True, loses=("runs/a/eval",)
    )
    begun = edit("runs/a/export/made_from.json", set_key("checkpoint", to="unfinished"))
    again = "export runs/a --out runs/a/export"
    yield Case("an export that was cut", begun, again, ("export",), goes_on=True, loses=("runs/a/export",))
    few = edit_line("runs/a/eval/points.jsonl", set_key("protocol", "num_samples", to=5))
    yield Case("fewer samples than classes, reported", few, REPORT, ("page.html",), goes_on=True)
    yield Case(
        "a run that lost its config", remove("runs/a/config.yaml"), f"{AGAIN} seed=9", ("config.yaml",)
    )
    renamed = lambda folder: shutil.move(folder / "runs/a", folder / "runs/a.yaml")  # noqa: E731
    yield Case(
        "a run called a.yaml",
        renamed,
        "evaluate report runs/a.yaml -o page.html",
        ("page.html",),
        goes_on=True,
    )
    empty = lambda folder: (folder / "o").mkdir()  # noqa: E731
    yield Case("an export into an empty folder", empty, "export runs/a --out o", ("o",), goes_on=True)
    listed = lambda folder: shutil.copy(folder / "data/train.csv", folder / "list")  # noqa: E731
    yield Case("a reference of a list without a suffix", listed, "evaluate reference list --size 32 --out r eval.extractor=data/models/classifier", ("r.classifier.npz",), goes_on=True)  # fmt: skip
    yield Case("a study of too few samples", nothing, "ablate lora.yaml --base a.yaml --out runs/st --set eval.num_samples=2", ("num_samples",))  # fmt: skip
    yield Case("another class file of 1,000 names", _many_classes, "4 --class-names c.json --base data/models/sd15-mini --out cache/text", ("cache/text",))  # fmt: skip
    yield Case(
        "a split without a name",
        nothing,
        '1 --imagenet data/ILSVRC --split "" --per-class 6 --out new.csv',
        (),
    )
    for name, command in {
        "text": "4 --class-names data/imagenet_classes.json --base data/models/sd15-mini --out text",
        "page_figures": REPORT,
        "runs/st": "ablate lora.yaml --base a.yaml --out runs/st",
    }.items():
        yield Case(f"{name} is a file", write(name, b"x"), command, (name,))


def _holds(path, data=None) -> None:
    assert path.exists(), path
    assert data is None or path.read_bytes() == data


def _two_folders(folder):
    shutil.copytree(folder / "images", folder / "images2")


def _many_classes(folder):
    put(folder / "c.json", json.dumps({str(i): f"class {i}" for i in range(1000)}))
