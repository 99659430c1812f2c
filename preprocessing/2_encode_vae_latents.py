"""Script 2: cache the VAE latent of every image, and with --fused also the teacher's tokens, in the same pass.

    python preprocessing/2_encode_vae_latents.py --csv data/imagenet/train_200k.csv --out data/imagenet/cache_200k/latents

    # both fields; every image is read and decoded once, and script 3 is not needed
    python preprocessing/2_encode_vae_latents.py --csv data/imagenet/train_200k.csv --out data/imagenet/cache_200k/latents \\
        --fused data/imagenet/cache_200k/tokens

    # landscapes, and the teacher's tokens of the same crop (4:3)
    python preprocessing/2_encode_vae_latents.py --csv data/photos/train.csv --out data/photos/latents --size 1024x768 \\
        --fused data/photos/tokens --grid 37x28

    # four GPUs, each writing its own shards
    torchrun --nproc-per-node 4 preprocessing/2_encode_vae_latents.py --csv data/imagenet/train_200k.csv \\
        --out data/imagenet/cache_200k/latents

The VAE of the base model sees the central square of the image, resized to --image-size S, or with --size WIDTHxHEIGHT the
largest central crop of that shape, resized to it. The script stores the mode of the posterior as the network is trained on it:
for Stable Diffusion 1.5 times the VAE's scaling factor, (4, S/8, S/8). Run the same command again to resume; a longer
list of images is added to a finished cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that imports from the root work

from common.arguments import Parser
from common.errors import UserError, run_script
from preprocessing.options import add_encoding_options, add_latent_options, add_teacher_options


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_encoding_options(parser)
    add_latent_options(parser)
    fused = parser.add_argument_group("with --fused", "script 3's options, for the teacher's tokens")
    where = "folder of tokens to make in the same pass"
    fused.add_argument("--fused", type=Path, metavar="TOKENS", help=where)
    add_teacher_options(fused, prefix="teacher-")
    args = parser.parse_args(argv)
    if args.fused and args.fused.resolve() == args.out.resolve():
        raise UserError("--fused and --out name the same folder: each field needs its own")

    from preprocessing.encoders import encode_images

    encode_images(args, latents=args.out, tokens=args.fused)


if __name__ == "__main__":
    run_script(main)
