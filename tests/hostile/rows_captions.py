"""Folders of captioned images, and lists of captions: what people have, damaged and odd."""

import json
import os

from hostile import Case
from spoil import both, fifo, link, nothing, put, write

CSV, JSONL = "images/metadata.csv", "images/metadata.jsonl"
LIST = "1 --images images --out new.csv"
LATENTS = "2 --csv new.csv --base data/models/sd15-mini --image-size 32 --workers 0 --out cache_new/latents"
GOOD = "file_name,text\n000000.png,a zero\n000001.png,a one\n"


def row(name="000000.png", text="a zero"):
    return json.dumps({"file_name": name, "text": text}) + "\n"


def folder_named(name):
    return lambda folder: (folder / name).mkdir(parents=True)


def no_utf8(folder):
    """An image whose name is Latin-1, and its caption."""
    for ending, data in ((b"png", (folder / "images/000000.png").read_bytes()), (b"txt", b"a zero")):
        with open(os.path.join(os.fsencode(folder), b"images", b"\xe9." + ending), "wb") as file:
            file.write(data)


def copied(source, target):
    return lambda folder: put(folder / target, (folder / source).read_bytes())


def _captioned(folder):
    """The list of the training images, with prompts in the place of classes."""
    ids = [line.split(",")[0] for line in (folder / "data/train.csv").read_text().splitlines()[1:]]
    put(folder / "data/train.csv", "id,img_path,prompt\n" + "".join(f"{key},x.png,a {key}\n" for key in ids))


def _no_list(folder):
    assert not (folder / "new.csv").exists()


def _is_clean(folder):
    assert (folder / "new.csv").read_text().endswith(",a zero\n")


def rows():
    for what, name in (
        ("an absolute path", "/etc/passwd"),
        ("a path above the folder", "../data/train.csv"),
        ("a path that goes up and down", "sub/../../x.png"),
        ("no name", ""),
    ):
        yield Case(f"metadata.csv with {what}", write(CSV, f"file_name,text\n000001.png,x\n{name},y\n"), LIST, (f"line 3 of {CSV}", "file_name"), check=_no_list)  # fmt: skip
        yield Case(f"metadata.jsonl with {what}", write(JSONL, row() + row(name)), LIST, (f"line 2 of {JSONL}", "file_name"))  # fmt: skip
    for what, text, says in (
        ("a name twice", GOOD + "./000001.png,a two\n", "line 4"),
        ("no header", "000000.png,a zero\n", "file_name"),
        ("no captions", "file_name,caption\n000000.png,a zero\n", "columns text"),
        ("two columns of captions", "file_name,text,text\n000000.png,a,b\n", "2 columns text"),
        ("a field too many", GOOD + "000002.png,a,two\n", "line 4"),
        ("an open quote", GOOD + '000002.png,"a two\n', "line 4"),
        ("a caption of 20,000 letters", GOOD + f"000002.png,{'x' * 20_000}\n", "line 4"),
        ("a caption of 200,000 letters", GOOD + f"000002.png,{'x' * 200_000}\n", "line 4"),
        ("nothing", "", "columns file_name"),
        ("only images that are not there", "file_name,text\na.png,a\n", "nothing is left"),
        ("only empty captions", "file_name,text\n000000.png, \n", "nothing is left"),
        ("bytes", b"\xff\xfe\x00", "UTF-8"),
    ):
        yield Case(
            f"metadata.csv with {what}", write(CSV, text), LIST, (CSV.split("/")[0], says), check=_no_list
        )
    for what, text, says in (
        ("half a line", row() + row()[:20], "line 2"),
        ("a name twice", row() + row(), "line 2"),
        ("a number for a name", row() + '{"file_name": 3, "text": "x"}', "line 2"),
        ("a list for a caption", row() + row(text=["a"]), "line 2"),
        ("no caption", row() + row(text=None), "line 2"),
        ("no key of the caption", '\n{"file_name": "000000.png"}\n', "line 2"),
        ("a list for a line", row() + "[1, 2]\n", "line 2"),
        ("a surrogate", row() + '{"file_name": "000001.png", "text": "\\ud800"}', "line 2"),
        ("a deep list", row() + "[" * 5000, "line 2"),
        ("one array", "[" + row() + "]", "line 1"),
    ):
        yield Case(f"metadata.jsonl with {what}", write(JSONL, text), LIST, (says, JSONL), check=_no_list)
    for name in (CSV, JSONL):
        yield Case(f"{name} that is a FIFO", fifo(name), LIST, (name, "no regular file"))
        yield Case(f"{name} that is a folder", folder_named(name), LIST, (name, "no regular file"))
        yield Case(f"{name} that is a dangling link", link(name, "gone"), LIST, (name,))
        yield Case(f"{name} that is a device", link(name, "/dev/zero"), LIST, (name, "no regular file"))
    yield Case("metadata of both kinds", both(write(CSV, GOOD), write(JSONL, row())), LIST, ("both",))
    yield Case(
        "metadata in a subfolder",
        write("images/train/metadata.csv", GOOD),
        LIST,
        ("give --images images/train",),
    )
    yield Case("images without captions", nothing, LIST, ("no captions", "metadata.csv"))
    yield Case("captions of a folder that is not there", nothing, "1 --images none --out new.csv", ("none",))
    yield Case("captions of a file", nothing, "1 --images data/train.csv --out new.csv", ("data/train.csv",))
    yield Case("neither images nor ImageNet", nothing, "1 --out new.csv", ("--images",))
    yield Case(
        "images and ImageNet",
        nothing,
        "1 --images images --imagenet data/ILSVRC --out new.csv",
        ("--images",),
    )

    texts = write("images/000000.txt", "a zero")
    yield Case("a caption of bytes", both(texts, write("images/000001.txt", b"\xff\xfe\x00")), LIST, ("images/000001.txt", "UTF-8"))  # fmt: skip
    yield Case("a caption that is a device", both(texts, link("images/000001.txt", "/dev/zero")), LIST, ("000001",), goes_on=True)  # fmt: skip
    yield Case("a caption that is a FIFO", both(texts, fifo("images/000001.txt")), LIST, ("000001.txt left out, no regular file", "1 captioned"), goes_on=True)  # fmt: skip
    yield Case("a caption that is a folder", both(texts, folder_named("images/000001.txt")), LIST, ("000001.txt left out", "1 captioned"), goes_on=True)  # fmt: skip
    yield Case("a FIFO and a folder named like images", both(texts, fifo("images/a.png"), folder_named("images/b.jpg")), LIST, ("a.png, b.jpg left out, no regular file",), goes_on=True)  # fmt: skip
    yield Case("a loop of links among the images", both(texts, link("images/loop", "../images"), link("images/c.png", "c.png")), LIST, ("1 captioned",), goes_on=True)  # fmt: skip
    yield Case("only an empty caption", write("images/000000.txt", " \n"), LIST, ("nothing is left",))
    yield Case("images that differ in their extension", both(texts, copied("images/000000.png", "images/000000.jpg")), LIST, ("extension",))  # fmt: skip
    yield Case("a captioned image whose name is no UTF-8", no_utf8, LIST, ("UTF-8", "rename"), check=_no_list)
    noisy = write(CSV, '\ufefffile_name,text\r\n000000.png," a\r\n\x07zero\u2028"\r\n')
    yield Case("captions with a BOM, CRLF and control characters", noisy, LIST, ("1 captioned",), goes_on=True,
        check=_is_clean)  # fmt: skip

    pictures, previews = (
        "evaluate pictures runs/a -o p.png --prompts",
        "train --config a.yaml run=runs/b train.preview_every",
    )
    for command, says in {
        f"{pictures} 'a cat'": "script 4 with --prompts FILE",
        f"{pictures} 10": "are 0 to 9",
        f"{pictures} -1": "are 0 to 9",
        f"{pictures} ''": "script 4 with --prompts FILE",
        f"{previews}=2 'train.preview_prompts=[a cat]'": "script 4 with --prompts FILE",
        f"{previews}=0 'train.preview_prompts=[a cat]'": "train.preview_every",
        f"{previews}=2 train.preview_images=1 'train.preview_prompts=[a, b]'": "train.preview_images",
        f"{previews}=2 'train.preview_prompts=[3]'": "train.preview_prompts",
        "4 --csv data/train.csv --base data/models/sd15-mini --out cache_new/text": "no prompts",
    }.items():
        yield Case(command, nothing, command, (says,))
    yield Case("a captioned list whose prompts the text lacks", _captioned, "train --config a.yaml run=runs/b", ("lacks the prompt", "script 4 with --csv"))  # fmt: skip

    head = "id,img_path,prompt\n"
    for what, text, says in (
        ("no prompt", head + "a,images/000000.png,\n", "line 2"),
        ("a prompt of two lines", head + 'a,images/000000.png,"x\ny"\n', "line 3"),
        ("a prompt with a control character", head + "a,images/000000.png,x\x07\n", "line 2"),
        ("a prompt of 20,000 letters", head + f"a,images/000000.png,{'x' * 20_000}\n", "line 2"),
        ("a class too many", head + "a,images/000000.png,x,0\n", "line 2"),
        ("an id twice", head + "a,images/000000.png,x\n" * 2, "twice"),
        ("an id with a NUL", head + "a\0,images/000000.png,x\n", "new.csv"),
        ("no header", "a,images/000000.png,x\n", "columns"),
        ("no rows", head, "no images"),
    ):
        yield Case(f"a captioned list with {what}", write("new.csv", text), LATENTS, ("new.csv", says))
