"""Find the byte range of every value in an LMDB file by reading its page layout (data format 1, LMDB 0.9).

Only the pages of the b-tree are read, about 40 bytes for each value. Once the ranges are known, a whole batch can be requested
from the disk at once. LMDB's own `txn.get` would load a cold value page by page through the memory map, which is about twenty
times slower, and a truncated file would end the process with SIGBUS. The layout is that of `struct MDB_page`, `MDB_node` and
`MDB_meta` in LMDB's mdb.c.
"""

import os
import struct
from collections.abc import Iterator

MAGIC, DATA_VERSION = 0xBEEFC0DE, 1
HEADER = struct.Struct("<QHHHH")  # page number, pad, flags, lower, upper: the first 16 bytes of a page
META = struct.Struct("<II16x40xQ40xQ8xQ")  # magic, version, roots of free list and values, transaction number
NODE = struct.Struct("<HHHH")  # two halves of size or child, flags, key size
BRANCH, LEAF, OVERFLOW, META_PAGE = 1, 2, 4, 8
BIG_DATA = 1
NO_ROOT = 2**64 - 1
MAX_DEPTH = 32


class DamagedFile(ValueError):
    """The file is not a whole LMDB file of the known format; the message says what is wrong."""


def value_ranges(file: int, *, to_write: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """Yield `(key, offset, size)` of every value of an open LMDB file, in the order of its keys.

    The file is read without a memory map. Raises `DamagedFile` where a page contradicts the format or lies outside the file;
    with `to_write` also where the pages do that which only a writer reads.
    """
    pages = _Pages(file)
    if to_write and pages.free != NO_ROOT:
        for _ in _walk(pages, pages.free, MAX_DEPTH):
            pass
    if pages.root != NO_ROOT:
        yield from _walk(pages, pages.root, MAX_DEPTH)


class _Pages:
    def __init__(self, file: int):
        self.file, self.bytes = file, os.fstat(file).st_size
        first = os.pread(file, 4096, 0)
        if len(first) < 4096 or HEADER.unpack_from(first)[2] & META_PAGE == 0:
            raise DamagedFile("it is no LMDB file")
        # LMDB stores the page size in the record of its free list.
        self.size = struct.unpack_from("<I", first, 16 + 24)[0]
        if self.size < 512 or self.size & (self.size - 1):
            raise DamagedFile(f"a page size of {self.size} bytes")
        second = os.pread(file, 4096, self.size)
        if len(second) < 4096:
            raise DamagedFile("it is cut short")
        metas = [META.unpack_from(page, 16) for page in (first, second)]
        if any(meta[:2] != (MAGIC, DATA_VERSION) for meta in metas):
            raise DamagedFile("it is no LMDB file of data format 1")
        _, _, self.free, self.root, _ = max(metas, key=lambda meta: meta[-1])  # of the newest transaction

    def read(self, number: int) -> bytes:
        if (number + 1) * self.size > self.bytes:
            raise DamagedFile(f"page {number} lies outside the file")
        page = os.pread(self.file, self.size, number * self.size)
        if len(page) != self.size or HEADER.unpack_from(page)[0] != number:
            raise DamagedFile(f"page {number} is not where it should be")
        return page


def _walk(pages: _Pages, number: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    if depth == 0:
        raise DamagedFile("its tree has a cycle")
    page = pages.read(number)
    _, _, flags, lower, _ = HEADER.unpack_from(page)
    if lower < HEADER.size or lower > pages.size:
        raise DamagedFile(f"page {number} is damaged")
    starts = struct.unpack_from(f"<{(lower - HEADER.size) // 2}H", page, HEADER.size)
    try:
        if flags & BRANCH:
            nodes = [NODE.unpack_from(page, start) for start in starts]
            children = [low | high << 16 | top << 32 for low, high, top, _ in nodes]
            for child in children:
                if child * pages.size < pages.bytes:
                    will_need(pages.file, child * pages.size, pages.size)
            for child in children:
                yield from _walk(pages, child, depth - 1)
        elif flags & LEAF:
            for start in starts:
                yield _value(pages, page, number, start)
        else:
            raise DamagedFile(f"page {number} is of no known kind")
    except struct.error:
        raise DamagedFile(f"page {number} is damaged") from None


def _value(pages: _Pages, page: bytes, number: int, start: int) -> tuple[bytes, int, int]:
    low, high, flags, key_size = NODE.unpack_from(page, start)
    size, data = low | high << 16, start + NODE.size + key_size
    key = page[start + NODE.size : data]
    if flags & BIG_DATA:  # the value fills pages of its own, after a single header
        (first,) = struct.unpack_from("<Q", page, data)
        offset = first * pages.size + HEADER.size
    else:
        offset = number * pages.size + data
    if offset + size > pages.bytes:
        raise DamagedFile(f"the value of {key!r} lies outside the file")
    return key, offset, size


def will_need(file: int, offset: int, size: int) -> None:
    """Ask the kernel to load these bytes in advance, on systems that offer that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)
