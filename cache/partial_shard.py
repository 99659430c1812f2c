"""A shard that is not whole yet: what it was begun for, and whether a file is that.

`shard-00000.begun` is written before the first value: the digest of the folder's settings, and later the images that could not
be read. Without it, values of other settings but the same size and ids could be sealed as ours.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from cache.lmdb_pages import DamagedFile, value_ranges
from cache.manifest import Sha256
from common.errors import UserError
from common.files import write_json
from common.reading import JsonRecord, read_record

PARTIAL, BEGUN = ".lmdb.partial", ".begun"
PAGE = min(32768, os.sysconf("SC_PAGE_SIZE"))  # of LMDB, in bytes


class Begun(JsonRecord):
    """shard-00000.begun."""

    settings_sha256: Sha256
    unreadable: dict[str, str]  # from ids to reasons


class PartialShard:
    """One partial shard of a folder, whose settings have the digest `settings_sha256`."""

    def __init__(self, path: Path, settings_sha256: str):
        self.path, self._notes = path.with_suffix(PARTIAL), path.with_suffix(BEGUN)
        self._settings_sha256 = settings_sha256
        self._anew = f"delete {self.path} and run the same command"

    def note(self, unreadable: dict[str, str]) -> None:
        """Write down the images that could not be read, of which a new shard has none."""
        write_json(self._notes, {"settings_sha256": self._settings_sha256, "unreadable": unreadable})

    @property
    def unreadable(self) -> dict[str, str]:
        """The ids of the images that could not be read, and why."""
        return read_record(self._notes, Begun, self._anew)["unreadable"]

    def stored(self, planned: Sequence[str], value_bytes: int) -> set[str] | None:
        """Return the ids of the stored values, or None if there is no file; raises `UserError` if it is damaged or not ours.

        The file is read without LMDB, whose memory map would end the process where a page lies outside of a truncated file.
        """
        # The file is this short if the disk was full before the first two pages were written.
        if self.path.is_file() and self.path.stat().st_size < 2 * PAGE:
            self.path.unlink()
        if not os.path.lexists(self.path):
            return None
        if not self.path.is_file():
            raise UserError(f"{self.path} is no regular file: {self._anew}")
        try:
            with open(self.path, "rb") as file:
                found = list(value_ranges(file.fileno(), to_write=True))
        except DamagedFile as error:
            raise UserError(f"{self.path} is damaged ({error}): {self._anew}") from None
        ids = {key.decode(errors="replace") for key, _, _ in found}
        ours = ids <= set(planned) and {size for _, _, size in found} <= {value_bytes}
        begun = os.path.lexists(self._notes) and read_record(self._notes, Begun, self._anew)
        if not ours or not begun or begun["settings_sha256"] != self._settings_sha256:
            raise UserError(f"{self.path} was begun for another cache: {self._anew}")
        return ids

    def forget(self) -> None:
        """Remove the notes, once the shard is sealed."""
        self._notes.unlink(missing_ok=True)
