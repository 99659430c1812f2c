"""Script 5: check a cache before a training relies on it.

    python preprocessing/5_verify_cache.py --csv data/imagenet/train_200k.csv --latents data/imagenet/cache_200k/latents \\
        --tokens data/imagenet/cache_200k/tokens --text data/imagenet/text

Checks manifests, shard sizes, that every image of the CSV is in both fields, and the values of random samples: finite,
token norms near 1, latents in range, tokens that differ within an image. --full also compares every checksum. Exit code 1
when a check fails.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

from errors import run_script
from preprocessing.options import new_parser, positive


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
    args = parser.parse_args(argv)

    import numpy as np

    from preprocessing.manifest import read_table
    from preprocessing.samples import read_samples
    from preprocessing.shards import FieldReader

    samples = read_samples(args.csv)
    latents, tokens = FieldReader(args.latents, "latents"), FieldReader(args.tokens, "tokens")
    table, text = read_table(args.text)
    in_both = set(latents.ids) & set(tokens.ids)
    present = [sample.id for sample in samples if sample.id in in_both]
    chosen = random.Random(0).sample(present, min(args.samples, len(present)))

    checks = Checks()
    missing = len(samples) - len(present)
    left_out = sum(reader.manifest["num_requested"] - len(reader) for reader in (latents, tokens))
    checks(
        missing <= left_out,
        f"{len(present)} of {len(samples)} images are in both fields; {left_out} known as unreadable",
    )
    classes = 1 + max(sample.class_id for sample in samples)
    n_classes = text["details"]["n_classes"]
    checks(
        classes <= n_classes,
        f"text table has {n_classes} classes and the null prompt; the CSV needs {classes}",
    )
    checks(table.isfinite().all().item(), f"text table {tuple(table.shape)} is finite")

    grid = tokens.spec.view["grid"]
    checks(
        tokens.spec.shape[0] == grid**2 > 1,
        f"tokens {tokens.spec.shape} = grid {grid} × {grid}, view {tokens.spec.view}",
    )
    if chosen:
        x, y = latents.read(chosen).astype(np.float32), tokens.read(chosen).astype(np.float32)
        checks(
            np.isfinite(x).all() and np.isfinite(y).all(), f"values of {len(chosen)} random images are finite"
        )
        norms = np.linalg.norm(y, axis=-1)  # (n, N)
        checks(
            abs(norms - 1).max() < 1e-2,
            f"token norms lie in {norms.min():.4f} … {norms.max():.4f} (1 expected)",
        )
        alike = (np.square(y.sum(1)).sum(-1).mean() - grid**2) / (grid**2 * (grid**2 - 1))
        checks(alike < 0.999, f"tokens of an image differ: mean cosine {alike:.3f} between two of them")
        std = x.std()
        checks(
            0.2 < std < 5,
            f"latents {latents.spec.shape}: mean {x.mean():+.3f}, std {std:.3f} (about 1 expected)",
        )
    if args.full:
        bad = [f"{reader.folder}/{name}" for reader in (latents, tokens) for name in reader.damaged_shards()]
        checks(not bad, "every checksum agrees" if not bad else f"damaged: {', '.join(bad)}")
    checks.conclude()


class Checks:
    """Print each check as it is made and remember whether one failed."""

    def __init__(self):
        self.failed = 0

    def __call__(self, good: bool, what: str) -> None:
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {what}")

    def conclude(self) -> None:
        if self.failed:
            print(
                f"error: {self.failed} check(s) failed; delete the folder of the field at fault and run its script again",
                file=sys.stderr,
            )
            raise SystemExit(1)
        print("the cache is good")


if __name__ == "__main__":
    run_script(main)
