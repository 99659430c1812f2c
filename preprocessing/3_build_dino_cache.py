"""Script 3: cache the patch tokens of every image, by DINOv2 or another teacher.

    python preprocessing/3_build_dino_cache.py --csv data/imagenet/train_200k.csv --out data/imagenet/cache_200k/tokens

    # half the disk: int8 with an fp16 scale for every 64 channels
    python preprocessing/3_build_dino_cache.py --csv data/imagenet/train_200k.csv --out data/imagenet/cache_200k/tokens \\
        --dtype int8

    # another teacher: a DINOv3 ViT or the vision tower of a SigLIP 2, here with 16 x 16 patches of 16 px, that is at 256 px
    python preprocessing/3_build_dino_cache.py --csv data/imagenet/train_200k.csv --out data/imagenet/cache_200k/siglip2 \\
        --teacher google/siglip2-base-patch16-256 --grid 16

The script stores L2-normalised patch tokens (grid², D). For ViT-L/14 at the default grid of 14, that is at 196 px, they are
(196, 1024). With the default view the teacher sees the same central crop as the VAE, so its tokens and the latent cells cover
the same area: for latents of --size WIDTHxHEIGHT give the same --size here, and a --grid of that shape, such as --size 1024x768
--grid 37x28. Run the same command again to resume; a longer list of images is added to a finished cache. To use several GPUs,
start it with torchrun, as in script 2.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that imports from the root work

from common.arguments import Parser, between
from common.errors import run_script
from preprocessing.options import add_encoding_options, add_size_option, add_teacher_options


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_encoding_options(parser)
    add_teacher_options(parser)
    add_size_option(parser, "of the latents (script 2), whose crop the teacher sees")
    folded = "of clips: frames that the base model's VAE folds into a latent frame (default 4; LTX-Video 8)"
    parser.add_argument("--frames-per-latent", type=between(1, 64), default=4, help=folded)
    args = parser.parse_args(argv)

    from preprocessing.encoders import encode_images

    encode_images(args, tokens=args.out)


if __name__ == "__main__":
    run_script(main)
