"""The door for every CSV: UTF-8 with or without a byte order mark, any line ends, the columns as they must be."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically
from common.reading import read_text


def read_csv(
    path: str | Path, columns: Sequence[str] | Sequence[Sequence[str]], remedy: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line and the fields of every row below the header; empty lines are skipped.

    Raises `UserError` with line and `remedy` where the header differs from `columns`, or from all of several headers, or where
    a row has more or fewer fields.
    """
    headers = [list(columns)] if isinstance(columns[0], str) else list(map(list, columns))
    rows = csv_rows(path, remedy)
    if next(rows, (1, None))[1] not in headers:
        raise UserError(f"{path}: the columns must be {' or '.join(map(', '.join, headers))}: {remedy}")
    yield from rows


def csv_rows(path: str | Path, remedy: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line and the fields of every row, of the header first; empty lines below it are skipped.

    Raises `UserError` with line and `remedy` where a row has more or fewer fields than the header.
    """
    rows = csv.reader(io.StringIO(read_text(path, remedy=remedy), newline=""), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        yield rows.line_num, header
        for row in filter(None, rows):
            if len(row) != len(header):
                counts = f"{len(row)} fields instead of {len(header)}"
                raise UserError(f"line {rows.line_num} of {path} has {counts}: {remedy}")
            yield rows.line_num, row
    except csv.Error as error:  # an open quote, or a field of more than 131,072 characters
        raise UserError(f"line {rows.line_num} of {path} is damaged ({error}): {remedy}") from None


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write header and rows atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_atomically(path, text.getvalue().encode())
