"""Script 3: cache the DINOv2 patch tokens of every image.

    python preprocessing/3_build_dino_cache.py --csv data/imagenet/train_200k.csv --out data/imagenet/cache_200k/tokens

Stored are the L2-normalised patch tokens (grid², D): 196 × 1024 for ViT-L/14 at the default grid 14, that is 196 px. With
the default view the teacher sees the same central square as the VAE, so that its tokens lie over the latent cells. Run the
same command again to resume.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

from errors import UserError, run_script
from preprocessing.options import add_encoding_options, new_parser, positive


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add_encoding_options(parser)
    parser.add_argument(
        "--teacher", default="facebook/dinov2-large", help="DINOv2: hub id or folder (default %(default)s)"
    )
    parser.add_argument("--revision", help="hub revision (commit) of the teacher")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--grid",
        type=positive,
        default=14,
        help="tokens per side (default 14: 196 px; 16: 224 px; 37: 518 px)",
    )
    size.add_argument("--image-size", type=positive, help="the same in pixels, a multiple of the patch")
    parser.add_argument(
        "--view",
        choices=["aligned", "official"],
        default="aligned",
        help="aligned (default) = the VAE's square; official = DINOv2's transform, its central 87.5 %%",
    )
    args = parser.parse_args(argv)

    import torch

    from device import pick_device
    from models.dinov2_encoder import DINOv2Encoder
    from preprocessing.manifest import FieldSpec
    from preprocessing.pipeline import encode_field, read_images_to_encode, weights_digest

    samples = read_images_to_encode(args.csv)
    device = pick_device(args.device)
    teacher = DINOv2Encoder.from_pretrained(args.teacher, args.grid, args.revision).to(device)
    if args.image_size:
        patch = teacher.model.config.patch_size
        if args.image_size % patch:
            below = args.image_size // patch * patch
            raise UserError(
                f"--image-size {args.image_size} is not a multiple of the patch {patch}: use {below} or {below + patch}"
            )
        teacher = DINOv2Encoder(teacher.model, args.image_size // patch).to(device)
    if teacher.grid < 2:
        raise UserError("one token per image cannot be aligned spatially: use --grid 2 or more")

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        tokens = teacher(pixels.to(device).float() / 255)  # (n, N, D)
        return torch.nn.functional.normalize(tokens, dim=-1)

    spec = FieldSpec(
        field="tokens",
        shape=(teacher.grid**2, teacher.dim),
        dtype=args.dtype,
        meaning="L2-normalised DINOv2 patch tokens after the final LayerNorm, row by row",
        source={
            "model": args.teacher,
            "revision": args.revision,
            "weights_sha256": weights_digest(teacher.model),
            "implementation": f"transformers.{type(teacher.model).__name__}",
        },
        view={
            "kind": args.view,
            "size": teacher.size,
            "patch": teacher.model.config.patch_size,
            "grid": teacher.grid,
        },
    )
    encode_field(
        samples,
        args.out,
        spec,
        encode,
        size=teacher.size,
        view=args.view,
        batch_size=args.batch_size,
        workers=args.workers,
    )


if __name__ == "__main__":
    run_script(main)
