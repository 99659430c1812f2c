"""Script 2: cache the VAE latent of every image.

    python preprocessing/2_encode_vae_latents.py --csv data/imagenet/train_200k.csv --out data/imagenet/cache_200k/latents

The VAE of the base model sees the central square of the image at --image-size. Stored is the mode of its posterior times
the VAE's scaling factor, (4, S/8, S/8) for Stable Diffusion: what the U-Net is trained on. Run the same command again to
resume.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

from errors import UserError, run_script
from preprocessing.options import add_base_options, add_encoding_options, new_parser, positive


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add_encoding_options(parser)
    add_base_options(parser)
    parser.add_argument(
        "--image-size", type=positive, default=512, help="side of the square in pixels (default 512)"
    )
    args = parser.parse_args(argv)

    import torch

    from device import pick_device
    from models.base_model import load_part
    from preprocessing.manifest import FieldSpec
    from preprocessing.pipeline import encode_field, read_images_to_encode, weights_digest

    samples = read_images_to_encode(args.csv)
    device = pick_device(args.device)
    vae = load_part(args.base, "vae", args.revision).to(device).eval().requires_grad_(False)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if args.image_size % factor:
        raise UserError(
            f"--image-size {args.image_size} is not a multiple of {factor}, the VAE's down-sampling"
        )
    cells = args.image_size // factor

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.to(device).float() / 127.5 - 1  # (n, 3, S, S) in [-1, 1]
        return vae.encode(images).latent_dist.mode() * vae.config.scaling_factor  # (n, 4, S/8, S/8)

    spec = FieldSpec(
        field="latents",
        shape=(vae.config.latent_channels, cells, cells),
        dtype=args.dtype,
        meaning="mode of the VAE posterior times scaling_factor",
        source={"model": args.base, "revision": args.revision, "weights_sha256": weights_digest(vae)},
        view={"kind": "aligned", "size": args.image_size},
        details={"scaling_factor": vae.config.scaling_factor},
    )
    encode_field(
        samples, args.out, spec, encode, size=args.image_size, view="aligned", batch_size=args.batch_size,
        workers=args.workers,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
