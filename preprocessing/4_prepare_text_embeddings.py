"""Script 4: make the text fields of every prompt, and of the null prompt, with the base model's text encoders.

    # one prompt for each class
    python preprocessing/4_prepare_text_embeddings.py --class-names LOC_synset_mapping.txt --out data/imagenet/text

    # the captions of one or several lists
    python preprocessing/4_prepare_text_embeddings.py --csv data/photos/train.csv data/photos/val.csv --out data/photos/text

The script stores what the pipeline's own call would hand to its network; for Stable Diffusion 1.5 that is prompt_embeds
(77, 768). The null prompt, which caption dropout and classifier-free guidance use, is stored beside the prompts. Equal prompts
are stored once. Run the same command again to resume; more prompts are added to a finished folder. To use several GPUs, start
it with torchrun, as in script 2. The file of class names has one of these formats:

    {"0": "tench", ...}                     names by class number
    {"0": ["n01440764", "tench"], ...}      imagenet_class_index.json
    n01440764 tench, Tinca tinca            LOC_synset_mapping.txt of Kaggle's download; the name ends at the comma
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that imports from the root work

from common.arguments import Parser, between
from common.errors import UserError, run_script
from preprocessing.options import add_base_options, add_device_option, add_shard_options


def main(argv: list[str] | None = None, about: str | None = __doc__) -> None:
    parser = Parser(about)
    add, lists = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    lists.add_argument("--class-names", type=Path, help="file of class names, in one of the formats above")
    lists.add_argument(
        "--csv", type=Path, nargs="+", help="lists of captioned images: CSV of script 1 with prompts"
    )
    add("--prompts", type=Path, metavar="FILE", help="further prompts, one a line")
    add("--out", type=Path, required=True, help="folder of the text; the same command resumes")
    add("--template", default="a photo of a {class_name}", help="prompt of a class (default '%(default)s')")
    shorter = "tokens of a prompt, fewer than the pipeline's own: shorter text makes every step cheaper; sample with it too"
    add("--max-sequence-length", type=between(1, 4096), metavar="N", help=shorter)
    add("--batch-size", type=between(1, 65_536), default=64, help="prompts encoded at a time (default 64)")
    dtype = "stored as (default: bfloat16 where the encoders compute in it or fp16 overflows, else float16)"
    add("--dtype", choices=["float16", "bfloat16", "float32"], help=dtype)
    add_base_options(parser)
    add_shard_options(
        parser, "prompts in one file (default: 10000, fewer of large text, or what the folder has)"
    )
    add_device_option(parser)
    args = parser.parse_args(argv)
    if args.class_names is not None and "{class_name}" not in args.template:
        raise UserError("--template must contain {class_name}")

    from preprocessing.text_fields import make_text

    make_text(args)


if __name__ == "__main__":
    run_script(main)
