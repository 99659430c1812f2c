"""The door for every file that is read. Every room may import this; it imports nothing of ours but errors and files.

`open_regular`, `read_bytes` and `read_text` open regular files alone, and the last two take no more than a bound of bytes, so
that a FIFO, a device or a file of the wrong kind is one line and not a hang. `read_record` reads a JSON file that this program
wrote, by the schema that stands where it is written: a `JsonRecord`. `JsonLines` does the same for logs of one JSON object a
line.
"""

import codecs
import fcntl
import functools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic takes typing's only from Python 3.12 on

from common.errors import UserError
from common.files import write_atomically

LIMIT = 2**28  # bytes: the largest file that is read whole, a CSV of two million images
T = TypeVar("T")
_adapter = functools.cache(TypeAdapter)  # from a schema; it takes milliseconds to make


@with_config(ConfigDict(extra="forbid", strict=True))
class JsonRecord(TypedDict):
    """What schemas of our JSON files inherit: no other keys than they name, no "3" for 3."""


class UnreadableFile(UserError):
    """The file system does not give the file: it is absent, locked away, or its disk fails. Says nothing of its content."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; raises `UserError` for anything else."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would wait for its writer
            raise UserError(f"{path} is no regular file: give a file")
        return open(path, "rb")
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # NUL or a lone surrogate in the name
        raise UserError(f"{str(path)!r} can be no file name") from None


def read_bytes(path: str | Path, limit: int = LIMIT) -> bytes:
    """Return the bytes of a regular file; raises `UserError` as above, and for a file of more than `limit` bytes."""
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror}") from None
    if len(data) > limit:
        raise UserError(f"{path} is too large for what is read here (over {limit:,} bytes): check the path")
    return data


def read_text(path: str | Path, limit: int = LIMIT, *, remedy: str | None = None) -> str:
    """Return the text of a UTF-8 file, without a byte order mark and with \\n as line ends; raises `UserError` as above.

    `remedy` says what to do where there is no file.
    """
    if remedy is not None and not os.path.lexists(path):
        raise UnreadableFile(f"cannot read {path}, which does not exist: {remedy}")
    try:
        text = read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8") from None
    return text.replace("\r\n", "\n")


def read_record(path: str | Path, schema: type[T], remedy: str) -> T:
    """Return what a JSON file of ours holds; raises `UserError` with file, key and `remedy` unless it fits the schema."""
    return parse_record(read_bytes(path), schema, str(path), remedy)


def parse_record(data: bytes | str, schema: type[T], where: str, remedy: str) -> T:
    """Return what a JSON text of ours holds; raises `UserError` with `where`, key and `remedy` unless it fits the schema."""
    try:
        return _adapter(schema).validate_json(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_complaint(error)}: {remedy}") from None


class JsonLines(Generic[T]):
    """A log of one JSON object a line, which processes append to and read at the same time.

    `remedy` says in errors what to do where a line is damaged. None: such a line is left out, and a warning says so.
    `allow_nan` lets numbers be written that are not finite, which other readers of JSON refuse.
    """

    def __init__(
        self, path: Path, schema: type[T], remedy: str | None = "remove that line", *, allow_nan: bool = True
    ):
        self.path, self._schema, self._remedy, self._allow_nan = path, schema, remedy, allow_nan

    def read(self) -> list[T]:
        """Return all lines in order.

        A last line that a crash has cut is left out, and a warning on stderr says so. Raises `UserError` for a line that does
        not fit the schema, where there is a `remedy`.
        """
        if not self.path.exists():
            return []
        *lines, rest = read_bytes(self.path).removeprefix(codecs.BOM_UTF8).split(b"\n")
        if rest and self._is_whole(rest):  # an editor took the end of the line away
            lines.append(rest)
        elif rest:
            print(f"warning: {self.path}: its last line is incomplete and is left out", file=sys.stderr)
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                where = f"line {number} of {self.path}"
                found.append(parse_record(line, self._schema, where, self._remedy or "it is left out"))
            except UserError as error:
                if self._remedy is not None:
                    raise
                print(f"warning: {error}", file=sys.stderr)
        return found

    def append(self, line: T, *, unless: Callable[[T], bool] | None = None) -> None:
        """Add a line, after what a crash left of one is gone; add nothing where `unless` holds for a line that is there."""
        with self._locked() as file:
            if unless is not None and any(map(unless, self.read())):
                return
            file.seek(0)
            *_, rest = (data := file.read()).split(b"\n")
            if rest and self._is_whole(rest):
                file.write(b"\n")
            else:  # a crash left half a line, or nothing
                file.truncate(len(data) - len(rest))
            file.write(self._encoded([line]))

    def _is_whole(self, line: bytes) -> bool:
        try:
            parse_record(line, self._schema, "", "")
        except UserError:
            return False
        return True

    def split(self, stays: Callable[[T], bool], into: Path | None = None) -> int:
        """Keep the lines for which `stays` holds; the others go to the log `into`, or nowhere. Returns their number."""
        if not self.path.exists():
            return 0
        with self._locked():
            lines = self.read()
            gone = [line for line in lines if not stays(line)]
            if into is not None:
                other = JsonLines(into, self._schema, allow_nan=self._allow_nan)
                for line in gone:
                    other.append(line)
            kept = self._encoded(filter(stays, lines))
            if kept != read_bytes(self.path):
                write_atomically(self.path, kept)
        return len(gone)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Yield the file, open and locked; wait while another process holds it.

        The lock is on the file itself: network file systems lock only what is open for writing, which a folder never is.
        `split` puts another file in its place: whoever waited for the old one opens the new one.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"{self.path} is no regular file: move it away")
            with open(self.path, "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    yield file
                    return

    def _encoded(self, lines: Iterable[T]) -> bytes:
        texts = (json.dumps(line, ensure_ascii=False, allow_nan=self._allow_nan) for line in lines)
        return "".join(f"{text}\n" for text in texts).encode()


def _complaint(error: ValidationError) -> str:
    """The first of pydantic's complaints in a few words, with its key."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"]))
    match problem["type"]:
        case "json_invalid":
            return f"it is damaged ({problem['ctx']['error']})"
        case "missing":
            return f"'{key}' is missing"
        case "union_tag_not_found":
            return f"{problem['ctx']['discriminator']} is missing"
        case "extra_forbidden":
            return f"'{key}' is not known here, so a newer version wrote it"
        case _:
            message = problem["msg"].removeprefix("Value error, ")
            return f"'{key}' is {problem['input']!r:.60}: {message}" if key else message
