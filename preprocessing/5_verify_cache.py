"""Script 5: check a cache before a training relies on it.

    python preprocessing/5_verify_cache.py --csv data/imagenet/train_200k.csv --latents data/imagenet/cache_200k/latents \\
        --tokens data/imagenet/cache_200k/tokens --text data/imagenet/text --sheet data/imagenet/cache_200k/sheet.png

The script checks that

    - the manifests are valid and the shards have the recorded sizes,
    - every image of the CSV is in both fields,
    - the text table has the classes of the CSV,
    - the VAE and the teacher saw the same square, or the teacher its official view of it,
    - the values of randomly chosen images are finite, token norms are near 1, latents are in range, and the tokens of an
      image differ.

With --sheet it also decodes eight latents, compares them with their images, and draws image, decoded latent and tokens. With
--full it also compares every checksum, which reads the whole cache. The exit code is 1 when a check fails.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that imports from the root work

from common.errors import run_script
from preprocessing.options import add_device_option, new_parser, positive

SHEET_IMAGES = 8
PSNR_FLOOR = 12  # dB between decoded latent and image; an assumed limit, far below what a working VAE reaches


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--csv", type=Path, required=True, help="the images: CSV of script 1")
    parser.add_argument("--latents", type=Path, required=True, help="folder of script 2")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of script 3")
    parser.add_argument("--text", type=Path, required=True, help="folder of script 4")
    parser.add_argument(
        "--samples", type=positive, default=256, help="random images whose values are checked (default 256)"
    )
    parser.add_argument("--full", action="store_true", help="compare every checksum too (reads everything)")
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="decode eight latents and draw image, VAE and tokens"
    )
    parser.add_argument(
        "--base", help="whose VAE decodes for --sheet (default: the one that made the latents)"
    )
    add_device_option(parser)
    args = parser.parse_args(argv)

    from tqdm import tqdm

    from cache.dataset import latents_of
    from cache.image_list import read_samples
    from cache.reader import FieldReader
    from cache.text import read_table

    samples = read_samples(args.csv)
    latents, tokens = FieldReader(args.latents, "latents"), FieldReader(args.tokens, "tokens")
    table, text = read_table(args.text)
    in_both = set(latents.ids) & set(tokens.ids)
    present = [sample for sample in samples if sample.id in in_both]
    chosen = random.Random(0).sample(present, min(args.samples, len(present)))

    checks = Checks()
    unreadable = {key for reader in (latents, tokens) for key in reader.unreadable}
    listed = {sample.id for sample in samples}
    missing = listed - in_both
    lacking = {r.spec.field: len(listed - set(r.ids) - unreadable) for r in (latents, tokens)}
    checks(
        missing <= unreadable,
        f"{len(present)} of {len(samples)} images are in both fields, {len(missing & unreadable)} could not be read, "
        f"{len(missing - unreadable)} are missing",
        " and ".join(
            f"{field} lack {n}: run their script with this CSV" for field, n in lacking.items() if n
        ),
    )
    check_classes(checks, samples, text["details"])
    for name, values in table.fields.items():
        checks(values.isfinite().all().item(), f"text {name} {tuple(values.shape)} is finite")

    grid = tokens.spec.view["grid"]
    checks(
        tokens.spec.shape[0] == grid**2 > 1,
        f"tokens {tokens.spec.shape} {tokens.spec.dtype} = grid {grid} × {grid}",
    )
    checks(
        tokens.spec.view["kind"] in (latents.spec.view["kind"], "official"),
        "the VAE saw the central square at {size} px, the teacher ".format(**latents.spec.view)
        + {"aligned": "the same at {size} px", "official": "only its central 87.5 %, at {size} px"}.get(
            tokens.spec.view["kind"], "{kind} at {size} px"
        ).format(**tokens.spec.view),
        "make both fields of the same view",
    )
    if chosen:
        ids = [sample.id for sample in chosen]
        x = latents_of(latents.read(ids), latents.spec.details)  # (n, C, h, w)
        y = tokens.read(ids).float()  # (n, N, D)
        checks(
            (x.isfinite().all() and y.isfinite().all()).item(),
            f"values of {len(ids)} random images are finite",
        )
        norms = y.norm(dim=-1)  # (n, N)
        checks(
            (norms - 1).abs().max().item() < 1e-2,
            f"token norms lie in {norms.min():.4f} … {norms.max():.4f} (1 expected)",
        )
        alike = ((y.sum(1).square().sum(-1).mean() - grid**2) / (grid**2 * (grid**2 - 1))).item()
        checks(alike < 0.999, f"tokens of an image differ: mean cosine {alike:.3f} between two of them")
        checks(
            0.2 < x.std().item() < 5,
            f"latents {latents.spec.shape} {latents.spec.dtype}: mean {x.mean():+.3f}, std {x.std():.3f} (about 1 expected)",
        )
        if args.sheet:
            check_sheet(args, checks, chosen[:SHEET_IMAGES], x, y, latents.spec)
    if args.full:
        with tqdm(total=len(latents) + len(tokens), desc="checksums", unit="value", leave=False) as bar:
            bad = [
                f"{reader.folder}/{name}"
                for reader in (latents, tokens)
                for name in reader.damaged_shards(bar.update)
            ]
        checks(
            not bad,
            f"{len(bad)} shards differ from their checksums" if bad else "every checksum agrees",
            f"delete and make anew: {', '.join(bad)}",
        )
    checks.conclude()


def check_sheet(args, checks: "Checks", samples, latents, tokens, spec) -> None:
    """Decode the latents of a few images, compare them with the images, and draw the contact sheet."""
    import numpy as np

    from cache.views import read_view
    from common.device import pick_device
    from models.families.table import family_of
    from models.latents import decode_images
    from preprocessing.contact_sheet import draw_contact_sheet

    n, device = len(samples), pick_device(args.device)
    images = np.stack([read_view(sample.img_path, spec.view["size"]) for sample in samples])  # (n, S, S, 3)
    revision = spec.source["revision"] if args.base is None else None
    codec = family_of(args.base or spec.source["model"], revision).load_codec().to(device)
    decoded = decode_images(codec, latents[:n], rows=1)  # (n, S, S, 3)
    errors = np.square(images.astype(np.float64) - decoded).mean((1, 2, 3))  # (n,)
    psnr = 10 * np.log10(255**2 / np.maximum(errors, 1e-9))
    checks(
        psnr.min() > PSNR_FLOOR,
        f"decoded latents are their images: PSNR {psnr.min():.1f} … {psnr.max():.1f} dB, the lowest is "
        f"{samples[psnr.argmin()].id} (over {PSNR_FLOOR} expected)",
        "look at the sheet: another VAE, or other images",
    )
    draw_contact_sheet(args.sheet, [sample.id for sample in samples], images, decoded, tokens[:n].numpy())
    print(f"     {args.sheet}")


def check_classes(checks: "Checks", samples, details: dict) -> None:
    """Check that the text table has all classes of the image list, under the same numbers."""
    synset_of = {sample.class_id: sample.synset for sample in samples}
    prompts, synsets = details["prompts"][:-1], details.get("synsets")
    enough = max(synset_of) < len(prompts)
    checks(
        enough,
        f"text table has {len(prompts)} classes and the null prompt; the CSV counts to {max(synset_of)}",
        "run script 4 with the names of all classes",
    )
    if enough and synsets:
        wrong = [number for number, synset in synset_of.items() if synsets[number] != synset]
        checks(
            not wrong,
            f"{len(synset_of) - len(wrong)} of {len(synset_of)} classes have the prompt of their synset",
            "run script 4 with the class file that numbered the CSV",
        )
    shown = sorted(synset_of)[:: max(1, len(synset_of) // 3)][:3]
    print("     " + ", ".join(f"{n} {synset_of[n]}: {prompts[n]!r}" for n in shown if n < len(prompts)))


class Checks:
    """Prints the result of each check, with a remedy where it failed, and counts the failures."""

    def __init__(self):
        self.failed = 0

    def __call__(self, good: bool, what: str, remedy: str = "delete that field and make it again") -> None:
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {what}" + ("" if good else f" → {remedy}"))

    def conclude(self) -> None:
        if self.failed:
            print(
                f"error: {self.failed} check(s) failed; what to do stands behind each",
                file=sys.stderr,
            )
            raise SystemExit(1)
        print("the cache is good")


if __name__ == "__main__":
    run_script(main)
