"""Script 5: check a cache before a training relies on it.

    python preprocessing/5_verify_cache.py --csv data/imagenet/train_200k.csv --latents data/imagenet/cache_200k/latents \\
        --tokens data/imagenet/cache_200k/tokens --text data/imagenet/text --sheet data/imagenet/cache_200k/sheet.png

The script checks that

    - the manifests are valid and the shards have the recorded sizes,
    - every image of the CSV is in both fields,
    - the text has the classes or the captions of the CSV, and is finite,
    - the VAE and the teacher saw the same crop, or the teacher its official view of it,
    - the values of randomly chosen images are finite, token norms are near 1, latents are in range, and the tokens of an
      image differ.

With --sheet it also decodes eight latents, compares them with their images, and draws image, decoded latent and tokens; of a
list of clips it decodes four, and draws their first, middle and last latent frames. With
--full it also compares every checksum, which reads the whole cache. The exit code is 1 when a check fails.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that imports from the root work

from common.arguments import Parser, positive
from common.errors import run_script
from common.files import expand_home
from common.sides import height_width, same_aspect, written
from preprocessing.options import add_device_option

SHEET_IMAGES, SHEET_CLIPS = 8, 4
PSNR_FLOOR = 12  # dB between decoded latent and image; an assumed limit, far below what a working VAE reaches


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--csv", type=Path, required=True, help="the images: CSV of script 1")
    add("--latents", type=Path, required=True, help="folder of script 2")
    add("--tokens", type=Path, required=True, help="folder of script 3")
    add("--text", type=Path, required=True, help="folder of script 4")
    number = "random images whose values are checked (default 256)"
    add("--samples", type=positive, default=256, help=number)
    add("--full", action="store_true", help="compare every checksum too (reads everything)")
    sheet = "decode eight latents and draw image, VAE and tokens"
    add("--sheet", type=Path, metavar="PNG", help=sheet)
    add(
        "--base",
        type=expand_home,
        help="whose VAE decodes for --sheet (default: the one that made the latents)",
    )
    add_device_option(parser)
    args = parser.parse_args(argv)
    if args.sheet is not None and args.sheet.suffix != ".png":
        parser.error(f"--sheet {args.sheet}: give a file that ends in .png")

    from cache.image_list import is_captioned, read_samples
    from cache.reader import FieldReader
    from cache.text import TextReader

    samples, checks = read_samples(args.csv), Checks()
    latents, tokens = FieldReader(args.latents, "latents"), FieldReader(args.tokens, "tokens")
    text = TextReader(args.text)
    present = check_images(checks, samples, (latents, tokens))
    if is_captioned(samples):
        check_prompts(checks, samples, text.prompts)
    else:
        check_classes(checks, samples, text)
    labels = random.Random(0).sample(range(len(text)), min(args.samples, len(text)))
    for name, values in text.fields_of(labels).items():
        what = f"text {name} {tuple(values.shape)} of random prompts is finite"
        checks(values.isfinite().all().item(), what)
    check_views(checks, latents.spec, tokens.spec)
    if present:
        chosen = random.Random(0).sample(present, min(args.samples, len(present)))
        check_values(args, checks, chosen, latents, tokens)
    if args.full:
        check_checksums(checks, (latents, tokens, text.reader))
    checks.conclude()


class Checks:
    """Prints the result of each check, with a remedy where it failed, and counts the failures."""

    failed = 0

    def __call__(self, good: bool, what: str, remedy: str = "delete that field and make it again") -> None:
        self.failed += not good
        print(f"ok   {what}" if good else f"FAIL {what} → {remedy}")

    def conclude(self) -> None:
        if self.failed:
            print(f"error: {self.failed} check(s) failed; what to do stands behind each", file=sys.stderr)
            raise SystemExit(1)
        print("the cache is good")


def check_images(checks: Checks, samples, readers) -> list:
    """Check that both fields have every image that could be read, and return the images that both have."""
    in_both = set.intersection(*(set(reader.ids) for reader in readers))
    present = [sample for sample in samples if sample.id in in_both]
    noun = "images" if samples[0].frames is None else "clips"
    unreadable = {key for reader in readers for key in reader.unreadable}
    listed = {sample.id for sample in samples}
    missing = listed - in_both
    lacking = {reader.spec.field: len(listed - set(reader.ids) - unreadable) for reader in readers}
    each = (f"{field} lack {n}: run their script with this CSV" for field, n in lacking.items() if n)
    checks(
        missing <= unreadable,
        f"{len(present)} of {len(samples)} {noun} are in both fields, {len(missing & unreadable)} could not be read, "
        f"{len(missing - unreadable)} are missing",
        " and ".join(each),
    )
    return present


def check_views(checks: Checks, latents, tokens) -> None:
    """Check that the tokens fill their grid, and that the teacher saw the VAE's crop or its official view of it.

    Of clips, both must be of the same moments, and the tokens of every latent frame.
    """
    from cache.manifest import crop_of

    (rows, columns), kind = height_width(tokens.view["grid"]), tokens.view["kind"]
    if "frames" in tokens.view or "frames" in latents.view:
        moments, f = (
            [[spec.view.get(name) for name in ("frames", "fps")] for spec in (latents, tokens)],
            latents.shape[1],
        )
        checks(
            moments[0] == moments[1] and tokens.view.get("latent_frames") == f,
            f"{moments[0][0]} frames at {moments[0][1]} a second are {f} latent frames; the teacher saw {moments[1][0]} at "
            f"{moments[1][1]} as {tokens.view.get('latent_frames')} ({tokens.view.get('frames_of_teacher')})",
            "make both fields of the same list, with script 3's --frames-per-latent as the VAE has it",
        )  # fmt: skip
    cells = tokens.view.get("latent_frames", 1) * rows * columns
    of_frames = f"{tokens.view['latent_frames']} frames of " if "latent_frames" in tokens.view else ""
    checks(
        tokens.shape[0] == cells > 1,
        f"tokens {tokens.shape} {tokens.dtype} = {of_frames}grid {rows} × {columns}",
    )
    what = "square" if same_aspect(latents.view["size"], 1) else "crop"
    seen = {"aligned": "the same", "official": "only its central 87.5 %,"}.get(kind, kind)
    checks(
        kind in (latents.view["kind"], "official")
        and same_aspect(crop_of(latents.view), crop_of(tokens.view)),
        f"the VAE saw the central {what} at {written(latents.view['size'])} px, the teacher {seen} at "
        f"{written(tokens.view['size'])} px",
        "make both fields of the same view, with the same --size",
    )


def check_values(args, checks: Checks, chosen, latents, tokens) -> None:
    """Check the values of the chosen images, and draw the sheet of the first of them."""
    from cache.dataset import latents_of

    ids, count, spec = [sample.id for sample in chosen], tokens.spec.shape[0], latents.spec
    x = latents_of(latents.read(ids), spec.details)  # (n, C, h, w)
    y = tokens.read(ids).float()  # (n, N, D)
    finite = (x.isfinite().all() and y.isfinite().all()).item()
    checks(finite, f"values of {len(ids)} random images are finite")
    norms = y.norm(dim=-1)  # (n, N)
    near = (norms - 1).abs().max().item() < 1e-2
    checks(near, f"token norms lie in {norms.min():.4f} … {norms.max():.4f} (1 expected)")
    alike = ((y.sum(1).square().sum(-1).mean() - count) / (count * (count - 1))).item()
    checks(alike < 0.999, f"tokens of an image differ: mean cosine {alike:.3f} between two of them")
    spread = f"mean {x.mean():+.3f}, std {x.std():.3f} (about 1 expected)"
    checks(0.2 < x.std().item() < 5, f"latents {spec.shape} {spec.dtype}: {spread}")
    if args.sheet:
        grid, count = (
            height_width(tokens.spec.view["grid"]),
            SHEET_IMAGES if chosen[0].frames is None else SHEET_CLIPS,
        )
        check_sheet(args, checks, chosen[:count], x, y, spec, grid)


def check_checksums(checks: Checks, readers) -> None:
    """Compare every checksum, which reads all values."""
    from tqdm import tqdm

    with tqdm(total=sum(map(len, readers)), desc="checksums", unit="value", leave=False) as bar:
        bad = [f"{reader.folder}/{name}" for reader in readers for name in reader.damaged_shards(bar.update)]
    what = f"{len(bad)} shards differ from their checksums" if bad else "every checksum agrees"
    checks(not bad, what, f"delete and make anew: {', '.join(bad)}")


def check_sheet(args, checks: Checks, samples, latents, tokens, spec, grid) -> None:
    """Decode the latents of a few images, compare them with the images, and draw the sheet; tokens lie on `grid (h, w)`."""
    import numpy as np

    from cache.clips import read_clip
    from cache.views import read_view
    from common.device import pick_device
    from models.families.table import family_of
    from models.latents import decode_images
    from preprocessing.contact_sheet import draw_contact_sheet
    from preprocessing.encoders import frames_of_latents

    n, size, device = len(samples), spec.view["size"], pick_device(args.device)
    revision = spec.source["revision"] if args.base is None else None
    codec = family_of(args.base or spec.source["model"], revision).load_codec().to(device)
    decoded, tokens = (
        decode_images(codec, latents[:n], rows=1),
        tokens[:n].numpy(),
    )  # (n, [F,] H, W, 3), (n, N, D)
    names = [sample.id for sample in samples]
    if samples[0].frames is None:
        images = np.stack([read_view(sample.img_path, size) for sample in samples])  # (n, H, W, 3)
    else:
        clips = np.stack([read_clip(s.img_path, s.start, s.frames, s.fps, size) for s in samples])
        f = spec.shape[1]
        shown = sorted({0, f // 2, f - 1})  # latent frames, m of them
        middle = [frames_of_latents(clips.shape[1], codec.frames, "middle")[frame][0] for frame in shown]
        images, decoded = (pixels[:, middle].reshape(-1, *pixels.shape[2:]) for pixels in (clips, decoded))
        tokens = tokens.reshape(n, f, -1, tokens.shape[-1])[:, shown].reshape(
            n * len(shown), -1, tokens.shape[-1]
        )
        names = [f"{name} frame {number}" for name in names for number in middle]
    errors = np.square(images.astype(np.float64) - decoded).mean((1, 2, 3))  # (n,)
    psnr = 10 * np.log10(255**2 / np.maximum(errors, 1e-9))
    checks(
        psnr.min() > PSNR_FLOOR,
        f"decoded latents are their images: PSNR {psnr.min():.1f} … {psnr.max():.1f} dB, the lowest is "
        f"{names[psnr.argmin()]} (over {PSNR_FLOOR} expected)",
        "look at the sheet: another VAE, or other images",
    )
    draw_contact_sheet(args.sheet, names, images, decoded, tokens.reshape(len(images), *grid, -1))
    print(f"     {args.sheet}")


def check_prompts(checks: Checks, samples, known: list[str]) -> None:
    """Check that the text has every prompt of a captioned list."""
    from cache.image_list import different_prompts

    prompts = different_prompts(samples)
    lacking = sorted(set(prompts) - set(known))
    shown = f", {len(lacking)} are missing, such as {lacking[0]!r:.60}" if lacking else ""
    what = f"the text has {len(prompts) - len(lacking)} of the {len(prompts)} different prompts of the CSV{shown}"
    checks(not lacking, what, "run script 4 with --csv and this CSV")


def check_classes(checks: Checks, samples, text) -> None:
    """Check that the text table has all classes of the image list, under the same numbers."""
    synset_of = {sample.class_id: sample.synset for sample in samples}
    prompts, synsets = text.prompts[: text.n_classes], text.synsets
    most, count = max(synset_of), len(synset_of)
    what = f"text has {len(prompts)} classes and the null prompt; the CSV counts to {most}"
    checks(most < len(prompts), what, "run script 4 with the names of all classes")
    if most < len(prompts) and synsets:
        right = sum(synsets[number] == synset for number, synset in synset_of.items())
        what = f"{right} of {count} classes have the prompt of their synset"
        checks(right == count, what, "run script 4 with the class file that numbered the CSV")
    shown = sorted(synset_of)[:: max(1, count // 3)][:3]
    print("     " + ", ".join(f"{n} {synset_of[n]}: {prompts[n]!r}" for n in shown if n < len(prompts)))


if __name__ == "__main__":
    run_script(main)
