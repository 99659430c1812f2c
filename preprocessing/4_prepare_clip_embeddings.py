"""Script 4: the CLIP text embedding of every class, and of the null prompt.

    python preprocessing/4_prepare_clip_embeddings.py --class-names data/imagenet/imagenet_classes.json --out data/imagenet/text

Writes one table (n_classes + 1, 77, 768): row c is the prompt of class c, the last row is the null prompt that caption
dropout and classifier-free guidance use. The file of class names is one of

    {"0": "tench", ...}                     names by class number
    {"0": ["n01440764", "tench"], ...}      imagenet_class_index.json
    n01440764 tench, Tinca tinca            LOC_synset_mapping.txt of Kaggle's download; the name ends at the comma
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

from common.errors import UserError, run_script
from preprocessing.classes import read_classes
from preprocessing.options import add_base_options, add_device_option, new_parser


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--class-names", type=Path, required=True, help="file of class names, in one of the formats above"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument(
        "--template", default="a photo of a {class_name}", help="prompt of a class (default '%(default)s')"
    )
    add_base_options(parser)
    add_device_option(parser)
    args = parser.parse_args(argv)
    if "{class_name}" not in args.template:
        raise UserError("--template must contain {class_name}")
    classes = read_classes(args.class_names)
    prompts = [args.template.replace("{class_name}", name) for _, name in classes] + [""]
    synsets = [synset for synset, _ in classes]

    import torch
    from tqdm import tqdm

    from cache.manifest import MANIFEST, FieldSpec, insist_same, read_table, write_table
    from common.device import pick_device
    from models.pipeline_parts import load_part, weights_digest

    device = pick_device(args.device)
    tokenizer = load_part(args.base, "tokenizer", args.revision)
    encoder = load_part(args.base, "text_encoder", args.revision).to(device).eval()
    spec = FieldSpec(
        field="text",
        shape=(tokenizer.model_max_length, encoder.config.hidden_size),
        dtype="float16",
        meaning="last hidden state of the CLIP text encoder; row c = class c, last row = null prompt",
        source={"model": args.base, "revision": args.revision, "weights_sha256": weights_digest(encoder)},
        details={"template": args.template, "prompts": prompts, "n_classes": len(classes)}
        | ({"synsets": synsets} if None not in synsets else {}),
    )
    if (args.out / MANIFEST).exists():  # a training may have read it
        insist_same(args.out, read_table(args.out)[1], spec.as_json())
        print(f"{args.out} is complete: embeddings of {len(classes)} classes and the null prompt")
        return
    rows = []
    with torch.no_grad():
        for start in tqdm(range(0, len(prompts), 64), desc="text", unit="batch"):
            tokens = tokenizer(
                prompts[start : start + 64],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            rows.append(encoder(tokens.input_ids.to(device)).last_hidden_state.half().cpu())  # (b, 77, 768)
    table = torch.cat(rows)  # (n_classes + 1, 77, 768)
    write_table(args.out, table, spec)
    print(
        f"{args.out}: embeddings of {len(classes)} classes and the null prompt, {tuple(table.shape)} float16"
    )


if __name__ == "__main__":
    run_script(main)
