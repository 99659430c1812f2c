"""JSON that this program wrote, damaged or edited by hand."""

from hostile import Case, run
from spoil import both, cut, drop_key, edit, edit_line, fifo, replace, set_key, write

POINTS, METRICS, ALIGN = "runs/a/eval/points.jsonl", "runs/a/metrics.jsonl", "runs/a/eval/align.json"
# Each record, the command that reads it, and one of its keys of type int.
RECORDS = {
    "runs/a/run.json": ("evaluate report runs/a -o page.html", "versions"),
    "runs/a/export/made_from.json": ("export runs/a", "files"),
    "runs/a/checkpoints/step-0000006/state.json": ("export runs/a", "step"),
    "cache/latents/manifest.json": ("train --config a.yaml run=runs/b", "num_samples"),
    "cache/latents/settings.json": ("train --config a.yaml run=runs/b", "shape"),
    "cache/tokens/manifest.json": ("train --config a.yaml run=runs/b", "num_samples"),
    "cache/text/manifest.json": ("train --config a.yaml run=runs/b", "num_prompts"),
    "cache/text/settings.json": ("train --config a.yaml run=runs/b", "shape"),
    "cache/text/prompts.json": ("train --config a.yaml run=runs/b", "n_classes"),
    "data/models/quality.json": ("0 --out data --quick", "models"),
    "data/demo.json": ("0 --out data --quick", "seed"),
    "runs/a/samples/*/manifest.json": ("evaluate sample runs/a eval.num_samples=4", "settings"),
    ALIGN: ("evaluate report runs/a -o page.html", "rows"),
    "runs/study/stages.json": ("ablate --base a.yaml --out runs/study lora.yaml", "0"),
}
DAMAGE = {
    "is empty": b"",
    "is cut off": b'{"format": "urepa-cache", "vers',
    "holds a list": b"[1, 2]",
    "holds null": b"null",
    "holds a number": b"7",
    "is 3,000 levels deep": b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}",
    "is not UTF-8": b'{"a": "\xff\xfe"}',
    "holds an unknown object": b'{"what": 1}',
}


def rows():
    for file, (command, key) in RECORDS.items():
        name = file.rsplit("/", 1)[-1]
        for damage, data in DAMAGE.items():
            yield Case(f"{file} {damage}", write(file, data), command, (name,))
        if "*" not in file and "study" not in file:
            yield Case(f"{file} is a FIFO", fifo(file), command, (name,))
            for what, value in (("text", "x"), ("null", None), ("a nest", {"a": [1]})):
                yield Case(
                    f"{file} has {what} as {key}", edit(file, set_key(key, to=value)), command, (name,)
                )
            yield Case(f"{file} lacks {key}", edit(file, drop_key(key)), command, (name,))
            yield Case(f"{file} has a key of the future", edit(file, set_key("new", to=1)), command, (name,))
    report, curve = "evaluate report runs/a -o page.html", "evaluate metrics runs/a"
    for key in ("step", "kind", "model", "protocol", "metrics"):
        yield Case(f"a point lacks {key}", edit_line(POINTS, drop_key(key)), curve, ("points.jsonl",))
    for key in ("step", "protocol", "metrics", "samples", "images_seen"):
        yield Case(
            f"a point has null as {key}", edit_line(POINTS, set_key(key, to=None)), report, ("points.jsonl",)
        )
    yield Case(
        "a metric is text",
        edit_line(POINTS, set_key("metrics", to={"a": {"value": "x"}})),
        report,
        ("points",),
    )
    yield Case("a point is deep", write(POINTS, b"[" * 3000 + b"\n"), report, ("points.jsonl",))
    yield Case("a point is not UTF-8", write(POINTS, b'{"step": "\xff"}\n'), report, ("points.jsonl",))
    yield Case("points are a FIFO", fifo(POINTS), report, ("points.jsonl",))
    for what, line in (
        ("text", '{"step": "x"}'),
        ("deep", "[" * 3000),
        ("no object", "3"),
        ("not UTF-8", b"\xff"),
    ):
        data = line if isinstance(line, bytes) else line.encode()
        says = ("metrics.jsonl", "line 1", "left out")
        yield Case(f"a line of metrics is {what}", write(METRICS, data + b"\n"), report, says, goes_on=True)
    half = (cut(METRICS, 0.9), cut(POINTS, 0.9))
    yield Case("half a line of metrics", half[0], report, ("metrics.jsonl", "incomplete"), goes_on=True)
    yield Case("half a line of points", half[1], report, ("points.jsonl", "incomplete"), goes_on=True)
    for key, to in (
        ("rows", {}),
        ("rows", [1]),
        ("timesteps", "x"),
        ("taps", 3),
        ("heldout_loss_diff", "x"),
        ("step", None),
    ):
        yield Case(
            f"align.json has {to!r} as {key}", edit(ALIGN, set_key(key, to=to)), report, ("align.json",)
        )
    edited = edit("runs/a/checkpoints/step-0000006/state.json", set_key("ema_step", to=3))
    sample = "evaluate sample runs/lora eval.num_samples=4"
    scaled = both(
        lambda folder: run(sample, folder, 60), replace("runs/lora/config.yaml", "alpha: 4", "alpha: 8")
    )
    yield Case(
        "a run's LoRA scale was edited", scaled, sample, ("4 images",), goes_on=True, check=_two_folders
    )
    yield Case("a state was edited", edited, "export runs/a", ("step-0000006",))


def _two_folders(folder):
    """What was drawn by another scale is not taken for what this one draws."""
    assert len(list((folder / "runs/lora/samples").iterdir())) == 2
