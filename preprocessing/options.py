"""Command-line options that several preprocessing scripts share. Imports nothing heavy, so that `--help` is instant."""

import argparse
from pathlib import Path


def new_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose `--help` is the script's own docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_encoding_options(parser: argparse.ArgumentParser) -> None:
    """What scripts 2 and 3 have in common."""
    parser.add_argument("--csv", type=Path, required=True, help="images to encode: CSV of script 1")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of this field; the same command resumes"
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="images per forward (default 32)")
    parser.add_argument(
        "--workers", type=not_negative, default=4, help="processes that decode images (default 4; 0 = none)"
    )
    parser.add_argument(
        "--dtype", choices=["float16", "float32"], default="float16", help="stored as (default float16)"
    )
    add_device_option(parser)


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Which Stable Diffusion the script reads a part of."""
    parser.add_argument(
        "--base",
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        help="Stable Diffusion 1.5: hub id or local diffusers folder (default %(default)s)",
    )
    parser.add_argument("--revision", help="hub revision (commit) of the base model")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (default) = cuda when present, else cpu")


def not_negative(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, not {value}")
    return value


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
