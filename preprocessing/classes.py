"""Read a class file, which lists the classes, their order and their names.

There are three formats, recognised by their content; a file of no such format raises `UserError`:

    {"0": "tench", ...}                        names by class number
    {"0": ["n01440764", "tench"], ...}         imagenet_class_index.json
    n01440764 tench, Tinca tinca               LOC_synset_mapping.txt, one line a class; the name ends at the comma

In all of them the number of a class is the position of its synset in sorted order, as in torchvision's `ImageFolder`.
"""

import json
from collections import Counter
from pathlib import Path

from pydantic_core import from_json

from common.errors import UserError
from common.reading import read_text

LIMIT = 2**26  # bytes; the names of ImageNet-21k take 1 MB
NAMES_ONLY = '{"0": "tench", ...}'
WITH_SYNSETS = 'LOC_synset_mapping.txt or imagenet_class_index.json ({"0": ["n01440764", "tench"], ...})'
FORMATS = f"give {NAMES_ONLY} or {WITH_SYNSETS}"


def read_synsets(path: str | Path) -> list[str]:
    """Return the synsets in the order of class numbers; raises `UserError` when the file has names only."""
    synsets = [synset for synset, _ in read_classes(path)]
    if None in synsets:
        raise UserError(f"{path} holds names but no synsets: give {WITH_SYNSETS}")
    return synsets


def read_classes(path: str | Path) -> list[tuple[str | None, str]]:
    """Return (synset, name) of every class, in the order of class numbers; the synset is None in a file of names only."""
    text = read_text(path, LIMIT, remedy=FORMATS).strip()
    if not text:
        raise UserError(f"{path} is empty: {FORMATS}")
    classes = _from_json(path, text) if text[0] in "{[" else _from_lines(path, text)
    synsets = [synset for synset, _ in classes if synset is not None]
    if twice := [synset for synset, count in Counter(synsets).items() if count > 1]:
        raise UserError(f"{path} names the synset {twice[0]} twice")
    for number, (synset, in_order) in enumerate(zip(synsets, sorted(synsets), strict=True)):
        if synset != in_order:
            places = "class numbers are places of the sorted synsets"
            raise UserError(f"{path} numbers {synset} as {number}, but {places}")
    return classes


def _from_json(path, text: str) -> list[tuple[str | None, str]]:
    try:
        from_json(text)  # refuses deep nests and halves of characters, which json takes
        # Pairs are kept because a dict would hide that a number occurs twice.
        pairs = json.loads(text, object_pairs_hook=tuple)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {FORMATS}") from None
    numbers = [number for number, _ in pairs] if isinstance(pairs, tuple) else []
    if twice := [number for number, count in Counter(numbers).items() if count > 1]:
        raise UserError(f"{path} names the class {twice[0]:.60} twice")
    if not numbers or (missing := {str(number) for number in range(len(numbers))} - set(numbers)):
        lacks = f"; {min(missing, key=int)} is missing" if numbers else ""
        raise UserError(f'{path} must map every class number from "0" on to a name, without a gap{lacks}')
    classes = []
    for number, entry in sorted(pairs, key=lambda pair: int(pair[0])):
        match entry:
            case str(name) if name.strip():
                classes.append((None, name))
            case [str(synset), str(name)] if synset.strip() and name.strip():
                # imagenet_class_index.json has great_white_shark where the other formats have great white shark.
                classes.append((synset.strip(), name.strip().replace("_", " ")))
            case _:
                raise UserError(
                    f'{path} must map class numbers to names, such as {{"0": "tench"}} or {{"0": ["n01440764", "tench"]}}, '
                    f"and maps {number} to {json.dumps(entry)}"
                )
    if len({synset is None for synset, _ in classes}) > 1:
        raise UserError(f"{path} gives some classes a synset and others none; give all of them one, or none")
    return classes


def _from_lines(path, text: str) -> list[tuple[str | None, str]]:
    classes = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        synset, *names = line.split(maxsplit=1)
        if looks := _looks_like(synset):
            raise UserError(f"line {number} of {path} looks like {looks}: {FORMATS}")
        name = names[0].split(",")[0].strip() if names else ""
        if not name:
            raise UserError(
                f'{path} is not JSON, and its line {number} has no name after the synset, as in "n01440764 tench, Tinca tinca"'
            )
        classes.append((synset, name))
    return sorted(classes)


def _looks_like(word: str) -> str | None:
    """Return which other format a line that begins with this word has, or None if the word can be a synset."""
    if word == "-" or word.endswith(":"):
        return "YAML"
    if "," in word:
        return "a CSV"
    return "a numbered list" if word.rstrip(".)").isdecimal() else None
