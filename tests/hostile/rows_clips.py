"""Folders of films and lists of clips: what is no film, and what makes no sense."""

from hostile import Case
from spoil import both, fifo, link, nothing, write

LIST = "1 --videos films --out new.csv --frames 9 --fps 8"
TOKENS = "3 --csv new.csv --teacher data/models/dinov2-mini --grid 4 --workers 0 --out tokens_new"
LATENTS = "2 --csv new.csv --base data/models/sd15-mini --image-size 32 --workers 0 --out latents_new"
HEAD = "id,img_path,start,fps,frames,prompt\n"
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


def captioned(name, data):
    return both(write(f"films/{name}", data), write(f"films/{name.rsplit('.', 1)[0]}.txt", "a film"))


def _no_list(folder):
    assert not (folder / "new.csv").exists()


def rows():
    for what, command, says in (
        ("a folder without films", "1 --videos images --out new.csv --frames 9 --fps 8", "0 films and no captions"),
        ("a folder that is not there", "1 --videos none --out new.csv --frames 9 --fps 8", "none is no folder"),
        ("a file for a folder", "1 --videos data/train.csv --out new.csv --frames 9 --fps 8", "train.csv is no folder"),
        ("frames without a rate", "1 --videos images --out new.csv --frames 9", "--fps"),
        ("a rate without frames", "1 --videos images --out new.csv --fps 9", "--frames"),
        ("10 frames", "1 --videos images --out new.csv --frames 10 --fps 8", "use 9 or 13"),
        ("no frames", "1 --videos images --out new.csv --frames 0 --fps 8", "--frames"),
        ("a rate of nan", "1 --videos images --out new.csv --frames 9 --fps nan", "--fps"),
        ("a rate of 0", "1 --videos images --out new.csv --frames 9 --fps 0", "--fps"),
        ("a rate of a million", "1 --videos images --out new.csv --frames 9 --fps 1e6", "--fps"),
        ("no windows", f"{LIST} --windows 0", "--windows"),
        ("frames of images", "1 --images images --out new.csv --frames 9", "--frames is for --videos"),
        ("windows of images", "1 --images images --out new.csv --windows 9", "--windows is for --videos"),
        ("classes of films", f"{LIST} --classes data/imagenet_classes.json", "--classes is for images"),
        ("films and images", "1 --videos images --images images --out new.csv --frames 9 --fps 8", "--images"),
    ):  # fmt: skip
        yield Case(f"clips: {what}", nothing, command, (says,), check=_no_list)
    for what, name, data in (
        ("an empty film", "a.mp4", b""),
        ("a text", "a.mkv", b"no film at all " * 50),
        ("zeros", "a.mov", bytes(100_000)),
        ("a playlist of another file", "a.ts", PLAYLIST),
        ("a list of files", "a.webm", "ffconcat version 1.0\nfile /etc/passwd\n"),
        ("a box that is longer than the file", "a.mp4", b"\x7f\xff\xff\xffftypisom" + bytes(100)),
    ):
        yield Case(f"clips: nothing but {what}", captioned(name, data), LIST, ("no film of 9 frames",), check=_no_list)  # fmt: skip
    yield Case("clips: a film that is a FIFO", both(write("films/a.txt", "x"), fifo("films/a.mp4")), LIST, ("0 films",))  # fmt: skip
    yield Case("clips: a film that is a device", both(write("films/a.txt", "x"), link("films/a.mp4", "/dev/zero")), LIST, ("0 films",))  # fmt: skip
    yield Case("clips: a film that is a loop of links", both(write("films/a.txt", "x"), link("films/a.mp4", "a.mp4")), LIST, ("0 films",))  # fmt: skip
    for what, text, says in (
        ("a start before the film", "a,x.mp4,-1,8,9,p\n", "line 2"),
        ("a start of nan", "a,x.mp4,nan,8,9,p\n", "line 2"),
        ("a rate of 0", "a,x.mp4,0,0,9,p\n", "line 2"),
        ("half a frame", "a,x.mp4,0,8,8.5,p\n", "line 2"),
        ("a billion frames", "a,x.mp4,0,8,1000000000,p\n", "line 2"),
        ("no prompt", "a,x.mp4,0,8,9,\n", "line 2"),
        ("two lengths", "a,x.mp4,0,8,9,p\nb,x.mp4,0,8,13,p\n", "same frames"),
        ("two rates", "a,x.mp4,0,8,9,p\nb,x.mp4,0,9,9,p\n", "same frames"),
        ("an id twice", "a,x.mp4,0,8,9,p\na,x.mp4,1,8,9,p\n", "twice"),
        ("a film that is not there", "a,films/none.mp4,0,8,9,p\n", "films/none.mp4"),
    ):
        yield Case(f"a list of clips with {what}", write("new.csv", HEAD + text), TOKENS, (says,))
    bad = both(write("films/a.mp4", b"x" * 999), write("new.csv", HEAD + "a,films/a.mp4,0,8,9,p\n"))
    yield Case("a list of clips, none of which is one", bad, TOKENS, ("not one of 1 clips", "unreadable.csv"))
    yield Case(
        "a list of clips that the VAE cannot fold", bad, f"{TOKENS} --frames-per-latent 3", ("9 frames",)
    )
    yield Case("a list of clips for a model of images", bad, LATENTS, ("new.csv lists clips", "--images"))
    images = write("new.csv", HEAD + "a,images/000000.png,0,8,9,p\n")
    yield Case("a list of clips that are images", images, TOKENS, ("not one of 1 clips",))
