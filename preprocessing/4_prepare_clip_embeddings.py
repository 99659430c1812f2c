"""Script 4: make the text embeddings of the prompt of every class, and of the null prompt.

    python preprocessing/4_prepare_clip_embeddings.py --class-names data/imagenet/imagenet_classes.json --out data/imagenet/text

The script writes a table of named fields. For Stable Diffusion 1.5 there is one, prompt_embeds (n_classes + 1, 77, 768). Row c
is the prompt of class c; the last row is the null prompt, which caption dropout and classifier-free guidance use. The file of
class names has one of these formats:

    {"0": "tench", ...}                     names by class number
    {"0": ["n01440764", "tench"], ...}      imagenet_class_index.json
    n01440764 tench, Tinca tinca            LOC_synset_mapping.txt of Kaggle's download; the name ends at the comma
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that imports from the root work

from common.arguments import Parser
from common.errors import UserError, run_script
from preprocessing.classes import read_classes
from preprocessing.options import add_base_options, add_device_option

ROWS = 64  # prompts that are encoded at a time


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    formats = "file of class names, in one of the formats above"
    add("--class-names", type=Path, required=True, help=formats)
    add("--out", type=Path, required=True, help="folder of the table")
    add("--template", default="a photo of a {class_name}", help="prompt of a class (default '%(default)s')")
    add_base_options(parser)
    add_device_option(parser)
    args = parser.parse_args(argv)
    if "{class_name}" not in args.template:
        raise UserError("--template must contain {class_name}")
    classes = read_classes(args.class_names)
    prompts = [args.template.replace("{class_name}", name) for _, name in classes] + [""]
    synsets = [synset for synset, _ in classes]

    import torch

    from cache.manifest import MANIFEST, check_same
    from cache.text import read_table, text_spec, write_table
    from common.device import pick_device
    from models.families.table import family_of
    from models.pipeline_parts import weights_digest

    family = family_of(args.base, args.revision)
    encoder = family.prompt_encoder(pick_device(args.device))
    digest = weights_digest(encoder.weights)
    null = {name: values.half()[None] for name, values in encoder([""])[1].items()}  # {name: (1, …)}
    details = {"template": args.template, "prompts": prompts, "n_classes": len(classes)}
    spec = text_spec(
        null,
        "text fields as the base model's pipeline makes them; row c = class c, last row = null prompt",
        source={"model": args.base, "revision": args.revision, "weights_sha256": digest},
        details=details | ({"synsets": synsets} if None not in synsets else {}),
    )
    what = f"embeddings of {len(classes)} classes and the null prompt"
    if (args.out / MANIFEST).exists():  # a training may have used this table, so it is not replaced
        check_same(args.out, read_table(args.out)[1], spec.as_json())
        print(f"{args.out} is complete: {what}")
        return
    rows = [
        encoder(prompts[start : min(start + ROWS, len(classes))])[0] for start in range(0, len(classes), ROWS)
    ]
    fields = {
        name: torch.cat([*(row[name].half() for row in rows), null[name]]) for name in null
    }  # (n_classes + 1, …)
    write_table(args.out, fields, spec)
    listed = ", ".join(f"{name} {tuple(values.shape)} {spec.dtype}" for name, values in fields.items())
    print(f"{args.out}: {what}, {listed}")


if __name__ == "__main__":
    run_script(main)
