"""Configs and key=value settings: every way in which YAML can be wrong, or can mean something else than it looks like."""

from hostile import Case
from house import SETTINGS
from spoil import both, fifo, link, nothing, write

TRAIN = "train --config bad.yaml run=runs/b"
KEYS = (  # of the base model's, the teacher's and the run's sections: a value that is none
    ("align.coeff", "true", "align.coeff"),
    ("align.coeff", "yes", "align.coeff"),
    ("train.steps", "true", "train.steps"),
    ("train.steps", "1:30", "train.steps"),
    ("train.steps", "1_0", "train.steps"),
    ("train.steps", "0b10", "train.steps"),
    ("train.steps", "6.0", "train.steps"),
    ("train.steps", "'6'", "train.steps"),
    ("train.steps", "2024-02-30", "train.steps"),
    ("train.steps", "2024-02-20", "train.steps"),
    ("train.steps", "!!int x", "train.steps"),
    ("train.steps", "!!float x", "train.steps"),
    ("train.steps", "!!python/object:os.system x", "train.steps"),
    ("train.steps", "!!binary x", "train.steps"),
    ("train.steps", "!!timestamp x", "train.steps"),
    ("train.steps", "!!bool x", "train.steps"),
    ("train.steps", "!!set x", "train.steps"),
    ("train.steps", "!!omap x", "train.steps"),
    ("train.steps", "!!pairs x", "train.steps"),
    ("train.steps", "0x_", "train.steps"),
    ("train.steps", "0b_", "train.steps"),
    ("train.steps", "'" + "9" * 5000 + "'", "train.steps"),
    ("train.steps", "9" * 5000, "train.steps"),
    ("train.steps", "[" * 3000, "train.steps"),
    ("train.steps", "*a", "train.steps"),
    ("train.steps", "&a", "train.steps"),
    ("train.steps", "{", "train.steps"),
    ("train.steps", "null", "train.steps"),
    ("train.steps", "", "train.steps"),
    ("train.steps", "1e400", "train.steps"),
    ("train.steps", ".nan", "train.steps"),
    ("optim.lr", ".nan", "optim.lr"),
    ("optim.lr", ".inf", "optim.lr"),
    ("optim.lr", "1e-4x", "optim.lr"),
    ("data.csv", "7", "data.csv"),
    ("data.csv", "true", "data.csv"),
    ("data.csv", "1.5", "data.csv"),
    ("data.csv", "2024-02-20", "2024-02-20"),
    ("data.csv", "'a\\x00b'", "a"),
    ("model.base", "7", "model.base"),
    ("eval.extractor", "1", "eval.extractor"),
    ("eval.bootstrap", "false", "eval.bootstrap"),
    ("data.batch_size", "4.0", "data.batch_size"),
    ("seed", "-1", "seed"),
    ("seed", "1e3", "seed"),
)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "a date that is none": ("seed: 2024-02-30\n", ""),
    "an integer that is none": ("seed: !!int x\n", ""),
    "a hexadecimal without digits": ("seed: 0x_\n", ""),
    "5,000 digits": (f"seed: {'9' * 5000}\n", ""),
    "3,000 levels of lists": ("seed: " + "[" * 3000 + "]" * 3000, ""),
    "3,000 levels of mappings": ("seed: " + "{a: " * 3000 + "}" * 3000, ""),
    "an alias of itself": ("seed: &a [*a]\n", ""),
    "a mapping that holds itself": ("model: &a {base: *a}\n", ""),
    "an alias bomb": (BOMB, ""),
    "an alias bomb below a key": ("model:\n" + "".join(f"  {line}\n" for line in BOMB.splitlines()), ""),
    "a merge of a number": ("<<: 3\nseed: 1\n", ""),
    "a tag of Python": ("seed: !!python/object/apply:os.system [touch hacked]\n", ""),
    "two documents": ("seed: 1\n---\nseed: 2\n", ""),
    "a tab": ("model:\n\tbase: x\n", ""),
    "a lone surrogate": ('seed: "\\ud800"\n', ""),
    "a NUL": (b"seed: 1\x00\n", ""),
    "bytes that are no UTF-8": (b"seed: \xff\n", ""),
    "UTF-16": ("seed: 1\n".encode("utf-16"), ""),
    "nothing": ("", "no settings"),
    "only a comment": ("# nothing\n", "no settings"),
    "a list": ("- seed\n", ""),
    "a number": ("3\n", ""),
    "a key given twice": ("seed: 1\nseed: 2\n", "twice"),
    "a section given twice": ("model: {}\nmodel: {}\n", "twice"),
    "a section that is a number": (SETTINGS.replace("optim: {lr: 0.0001, warmup_fraction: 0.0}", "optim: 3"), "optim"),
    "a section that is a list": (SETTINGS.replace("optim: {lr: 0.0001, warmup_fraction: 0.0}", "optim: [lr]"), "optim"),
    "a number as a key": ("1: 2\n", "1"),
    "a list as a key": ("[a]: 2\n", "key"),
    "extends of a number": ("extends: 3\n", ""),
    "extends of itself": ("extends: bad.yaml\n", "itself"),
    "extends of a missing file": ("extends: none.yaml\n", "none.yaml"),
    "extends of a list": ("extends: [a.yaml]\n", ""),
    "a value beyond all floats": (SETTINGS.replace("0.0001", "1.0e+400"), "optim.lr"),
}  # fmt: skip


def rows():
    for what, (data, says) in FILES.items():
        words = ("bad.yaml", says) if says not in ("1", "optim", "optim.lr") else (says,)
        yield Case(f"a config with {what}", write("bad.yaml", data), TRAIN, words)
    for what, data, says in (
        ("half of it", '{"urepa_lambda": 0.5, "urepa_mod', "their.json"),
        ("a list", '["urepa_lambda"]', "no settings"),
        ("a key twice", '{"urepa_lambda": 0.5, "urepa_lambda": 1}', "twice"),
        ("both methods", '{"urepa_lambda": 0.5, "crepa_lambda": 1}', "same setting"),
        ("an image size of no patches", '{"urepa_encoder_image_size": 500}', "multiple"),
        ("an endless image size", '{"urepa_encoder_image_size": 1e999}', "teacher.grid"),
        ("a negative image size", '{"crepa_encoder_image_size": -518}', "teacher.grid"),
        ("another teacher", '{"urepa_model": "dinov2_vitg14"}', "--teacher facebook/dinov2-giant"),
        ("a tap of no such network", '{"crepa_block_index": 8}', "block8"),
        ("a video's neighbours", '{"crepa_adjacent_distance": 1}', "align.neighbours = 1"),
        ("a decay of 0", '{"crepa_adjacent_tau": 0}', "align.neighbour_tau"),
        (
            "a teacher before the tap",
            '{"teacher": {"source": "backbone", "block": "enc_last"}}',
            "teacher.block = enc_last must lie behind the tap mid",
        ),
        (
            "a teacher that is no block",
            '{"crepa_use_backbone_features": true, "crepa_teacher_block_index": 12}',
            "teacher.block has 'block12'",
        ),
        ("backbone features of no block", '{"crepa_use_backbone_features": true}', "teacher.block"),
        ("another trainer's settings", '{"train_batch_size": 4}', "data.batch_size"),
        ("a name for a number", '{"urepa_lambda": "half"}', "align.coeff"),
    ):
        command = "train --config a.yaml --config their.json run=runs/b"
        yield Case(f"JSON with {what}", write("their.json", data), command, (says,))
    tabs = '{\n\t"--urepa_enabled": true,\n\t"urepa_lambda":0.5\n}'
    command = "train --config a.yaml --config their.json --self-test"
    yield Case("JSON with tabs", write("their.json", tabs), command, ("passed",), goes_on=True)
    yield Case("a config of 300 MB", _sparse("bad.yaml"), TRAIN, ("bad.yaml", "too large"))
    yield Case("a config that is a FIFO", fifo("bad.yaml"), TRAIN, ("bad.yaml",))
    yield Case(
        "a config that is a folder", lambda folder: (folder / "bad.yaml").mkdir(), TRAIN, ("bad.yaml",)
    )
    yield Case("a config that links to itself", link("bad.yaml", "bad.yaml"), TRAIN, ("bad.yaml",))
    yield Case("a config that is a device", link("bad.yaml", "/dev/zero"), TRAIN, ("bad.yaml",))
    yield Case("a config that is missing", nothing, TRAIN, ("bad.yaml",))
    ring = both(write("bad.yaml", "extends: b.yaml\n"), write("b.yaml", "extends: bad.yaml\n"))
    yield Case("a ring of extends", ring, TRAIN, ("itself",))
    for key, value, says in KEYS:
        shown = value if len(value) < 30 else f"{value[:6]}…"
        command = f'train --config a.yaml run=runs/b "{key}={value}"'
        yield Case(f"{key}={shown}", nothing, command, (says,))
    for command, says in {
        "train --config a.yaml run=runs/b train.steps=010": "steps 0 to 10",
        "evaluate metrics runs/a eval.num_samples=010": "fd10",
    }.items():
        yield Case(f"{command} is ten", nothing, command, (says,), goes_on=True, loses=("runs/a/eval",))
    for command, says in {
        "train --config a.yaml run=runs/b steps=3": "steps",
        "train --config a.yaml run=runs/b train.step=3": "train.steps",
        "train --config a.yaml run=runs/b train=3": "train",
        "train --config a.yaml run=runs/b train.steps.x=3": "train.steps",
        "train --config a.yaml run=runs/b =3": "=3",
        "train --config a.yaml run=runs/b align.coeff": "align.coeff",
        "train --config a.yaml run=runs/b diffusion.shift=.inf": "error: diffusion.shift = inf",
        "train --config a.yaml run=": "run",
        "train --config a.yaml run=3": "run",
        "train --config a.yaml --allow-change nothing.known": "nothing.known",
        "train --config a.yaml --allow-change train.step": "train.steps",
        "train --config a.yaml run=~nobody_here/x": "~nobody_here",
        "train --config ~nobody_here/a.yaml": "~nobody_here",
        "evaluate metrics ~nobody_here/a": "~nobody_here",
        "export runs/a --out ~nobody_here/x": "~nobody_here",
        "3 --csv data/train.csv --teacher ~nobody_here/x --out new": "~nobody_here",
        "evaluate metrics runs/a eval.cfg=true": "eval.cfg",
        "evaluate metrics runs/a train.steps=3": "train.steps",
        "evaluate metrics runs/a eval.nothing=3": "eval.nothing",
        "evaluate metrics runs/none": "runs/none",
        "evaluate metrics data": "data",
        "evaluate curve a.yaml none.yaml": "none.yaml",
        "evaluate report runs/a -o page.pdf": "page.pdf",
        "evaluate pictures runs/a -o picture.jpg": "picture.jpg",
        "export runs/none": "runs/none",
        "export runs/a --checkpoint 5": "5",
        "ablate --base none.yaml --out runs/study lora.yaml": "none.yaml",
        "ablate --base a.yaml --out runs/study none.yaml": "none.yaml",
    }.items():
        yield Case(command, nothing, command, (says,))


def _sparse(name: str):
    def spoil(folder):
        with open(folder / name, "wb") as file:
            file.truncate(300_000_000)

    return spoil
