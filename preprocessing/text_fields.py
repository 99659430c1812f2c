"""What script 4 does: list the prompts, encode them with a family's text encoders, and store their named fields in shards."""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cache.image_list import different_prompts, is_captioned, one_line_prompt, read_samples
from cache.manifest import SETTINGS, TextSpec, read_settings
from cache.text import NULL, Prompts, join_prompts, key_of, open_writer
from common.device import pick_device
from common.errors import UserError
from common.reading import read_text
from common.signals import StopSignal
from models.backbone import Backbone
from models.families.table import family_of
from models.pipeline_parts import weights_digest
from preprocessing.classes import read_classes
from preprocessing.options import part_of
from preprocessing.pipeline import check_disk, failures_explained, report

# What turns prompts into tokens, by the names of the packages: some pipelines clean text only where the last two are installed.
PACKAGES = {
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "ftfy": "ftfy",
    "bs4": "beautifulsoup4",
}
Fields = Mapping[str, Tensor]


def make_text(args: Namespace) -> None:
    """Encode every prompt that the command line of script 4 names; a second call resumes an interrupted one."""
    listed = join_prompts(args.out, list_prompts(args))
    classes, others = listed["n_classes"], len(listed["prompts"]) - listed["n_classes"]
    print(f"{args.out}: prompts of {classes:,} classes, {others:,} others, and the null prompt")
    # The text encoders are kept by the family, and so let go of at the end.
    family = family_of(args.base, args.revision)
    family.max_sequence_length = args.max_sequence_length
    encode_text(args, family, listed, pick_device(args.device))


def list_prompts(args: Namespace) -> Prompts:
    """Return the prompts of the classes, or of the captioned lists in order of appearance, and further ones behind them."""
    classes = [] if args.class_names is None else read_classes(args.class_names)
    prompts = [args.template.replace("{class_name}", name) for _, name in classes]
    synsets = [synset for synset, _ in classes if synset is not None]
    others = [prompt for path in args.csv or () for prompt in captions_of(path)]
    if args.prompts is not None:
        others += filter(None, map(one_line_prompt, read_text(args.prompts).split("\n")))
    known = set(prompts)
    prompts += [prompt for prompt in dict.fromkeys(others) if prompt not in known]
    return {"n_classes": len(classes), "synsets": synsets, "prompts": prompts}


def captions_of(path: Path) -> list[str]:
    """Return the prompts of a list of images; raises `UserError` where it has none."""
    samples = read_samples(path)
    if not is_captioned(samples):
        raise UserError(
            f"{path} has no prompts: give a list with the columns id, img_path, prompt, or --class-names for one of classes"
        )
    return different_prompts(samples)


def encode_text(args: Namespace, family: Backbone, listed: Prompts, device: torch.device) -> None:
    """Store the fields of all prompts and of the null prompt."""
    folder, prompts, part = args.out, listed["prompts"], part_of(args)
    known = read_settings(folder)["details"] if (folder / SETTINGS).exists() else {"fields": {}}
    family.prepare_text(prompts, device)
    null = {name: values[None] for name, values in family.null_text(device).items()}  # {name: (1, …)}
    lengths = find_lengths(family, prompts, null, known["fields"], args.batch_size, device)
    null = cut(null, lengths, folder)

    def encode(texts: Sequence[str]) -> Fields:
        return cut(family.encode_text(texts, device), lengths, folder)

    spec = text_spec(args, family, encode(prompts[: args.batch_size]), null, known["fields"], device)
    writer = open_writer(folder, spec, listed, part=part, shard_size=args.shard_size)
    prompt_of, null_row = {key_of(prompt): prompt for prompt in prompts}, spec.encode(null)[0]
    try:
        chunks = writer.pending(args.batch_size)
        check_disk([writer], "prompts")
        mine, left = sum(len(writer.plan[n]) for n in writer.mine), sum(len(keys) for _, keys in chunks)
        with failures_explained(), progress_bar("text", mine, left) as bar, StopSignal() as stop:
            for shard, keys in chunks:
                texts = [prompt_of[key] for key in keys if key != NULL]
                rows = iter(spec.encode(encode(texts)) if texts else ())
                writer.put(
                    shard, keys, torch.stack([null_row if key == NULL else next(rows) for key in keys])
                )
                bar.update(len(keys))
                if stop.requested:
                    raise KeyboardInterrupt
        report(writer, writer.finish(), part)
    finally:
        writer.close()


def text_spec(
    args: Namespace, family: Backbone, first: Fields, null: Fields, known: Mapping, device: torch.device
) -> TextSpec:
    """Return the specification of the text: its fields as a folder has them, or as `first` prompts and the null prompt ask."""
    named = {}
    for name, values in first.items():
        dtype = known.get(name, {}).get("dtype") if args.dtype is None else args.dtype
        dtype = (
            stored_type([values, null[name]]) if dtype is None or not values.is_floating_point() else dtype
        )
        named[name] = {"shape": list(values.shape[1:]), "dtype": dtype}
    weights = family.prompt_encoder(device).weights
    source = {"model": args.base, "revision": args.revision, "weights_sha256": weights_digest(weights)}
    computed = {"bf16" if p.dtype == torch.bfloat16 else "fp32" for p in weights.parameters()}
    source |= {"precision": " and ".join(sorted(computed))}
    source |= {name: version_of(package) for name, package in PACKAGES.items()}
    details = {} if args.class_names is None else {"template": args.template}
    details |= {"trimmed": dict(family.trimmed_text)} if family.trimmed_text else {}
    if args.max_sequence_length is not None:
        details |= {"max_sequence_length": args.max_sequence_length}
    return TextSpec.of(named, "text fields as the base model's pipeline makes them", source, details)


def stored_type(values: Sequence[Tensor]) -> str:
    """Return the type to store a field in: bf16 if it was computed so, fp16 of fp32 unless it overflows, uint8 of masks."""
    if not values[0].is_floating_point():
        return "uint8"
    fits = all(rows.half().isfinite().all() for rows in values)
    return "float16" if fits and values[0].dtype != torch.bfloat16 else "bfloat16"


def find_lengths(
    family: Backbone,
    prompts: Sequence[str],
    null: Fields,
    known: Mapping,
    batch_size: int,
    device: torch.device,
) -> dict[str, int]:
    """Return for each trimmed field and its mask how many positions are stored: those of the longest prompt.

    A folder that was begun has them; for a new one all prompts are encoded once before.
    """
    masks = set(family.trimmed_text.values())
    longest = {mask: known[mask]["shape"][0] for mask in masks if mask in known}
    if masks - longest.keys():
        longest = {mask: length_of(null[mask]) for mask in masks}
        chunks = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        print("all prompts are encoded twice, first to find the longest")
        with failures_explained(), progress_bar("lengths", len(prompts), len(prompts)) as bar:
            for texts in chunks:
                fields = family.encode_text(texts, device)
                longest = {mask: max(count, length_of(fields[mask])) for mask, count in longest.items()}
                bar.update(len(texts))
        print(
            f"the longest prompt has {', '.join(f'{n} positions in {mask}' for mask, n in longest.items())}"
        )
    return longest | {name: longest[mask] for name, mask in family.trimmed_text.items()}


def length_of(mask: Tensor) -> int:
    """Return the last position that any row of a mask `(n, L)` has, counted from 1."""
    return int(mask.any(0).nonzero().max()) + 1 if mask.any() else 1


def cut(fields: Fields, lengths: Mapping[str, int], folder: Path) -> dict[str, Tensor]:
    """Return fields with only the first positions of those in `lengths`; raises `UserError` for a prompt that is longer."""
    for name, length in lengths.items():
        if not fields[name].is_floating_point() and fields[name][:, length:].any():
            raise UserError(
                f"a prompt is longer than the {length} positions that {folder} stores: choose another --out for this list"
            )
    return {
        name: values[:, : lengths[name]] if name in lengths else values for name, values in fields.items()
    }


def progress_bar(name: str, total: int, left: int) -> tqdm:
    # Under torchrun, one process per machine shows a bar.
    hidden = os.environ.get("LOCAL_RANK", "0") != "0"
    return tqdm(total=total, initial=total - left, unit="prompt", desc=name, disable=hidden, smoothing=0.05)


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
