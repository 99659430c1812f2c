"""The parser of every command line. Every room may import this; it imports nothing of ours but errors and files."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from common.errors import one_line
from common.files import expand_home
from common.sides import as_kept

SIDE = 16_384  # the largest side in pixels: far above what anyone needs


class Parser(argparse.ArgumentParser):
    """An argparse parser whose `type=Path` arguments have the home folder for `~`, as `expand_home` says.

    What is wrong is one line, without the usage. `doc` stands at the beginning of `--help` as it is. Parsers of subcommands are
    of this class too.
    """

    def __init__(self, doc: str | None = None, **details: Any):
        details = {"description": doc, "formatter_class": argparse.RawDescriptionHelpFormatter} | details
        super().__init__(**details)
        self.register("type", Path, lambda text: Path(expand_home(text)))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message):.500} (see --help)\n")


def between(least: int, most: int) -> Callable[[str], int]:
    """Return an argparse type: an integer from `least` to `most`."""

    def integer(text: str) -> int:
        if not least <= (value := int(text)) <= most:
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, not {text:.40}")
        return value

    return integer


def sides(least: int, most: int) -> Callable[[str], int | tuple[int, int]]:
    """Return an argparse type: the side of a square, or WIDTHxHEIGHT, which becomes (height, width) unless it is a square."""

    def read(text: str) -> int | tuple[int, int]:
        width, by, height = text.partition("x")
        try:
            across = between(least, most)(width)
            return as_kept(between(least, most)(height), across) if by else across
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a side or WIDTHxHEIGHT, not {text:.40}") from None

    return read


positive = between(1, 10**9)
