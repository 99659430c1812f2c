"""What is written is whole or absent, goes where a link leads, replaces no device, and leaves nothing of a killed writer."""

import fcntl
import os

import pytest

from common.errors import UserError
from common.files import file_written_whole, write_atomically, written_whole


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    write_atomically(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "file").read_bytes() == b"x"


def test_what_is_no_file_or_no_folder_is_not_replaced(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "fifo")
    for name in ("null", "fifo", "."):
        with pytest.raises(UserError, match="not replaced"):
            write_atomically(tmp_path / name, b"x")
    for name in ("null", "fifo"):
        with pytest.raises(UserError, match="not replaced"), written_whole(tmp_path / name):
            pass
    assert (tmp_path / "null").is_char_device()


def test_a_failure_leaves_neither_the_file_nor_a_part_of_it(tmp_path):
    with pytest.raises(TypeError), file_written_whole(tmp_path / "a") as file:
        file.writelines([b"half", None])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["another", "ours"])
def test_what_a_killed_writer_left_is_removed_also_where_it_had_our_number(tmp_path, number):
    """In a container every process may have the number 1."""
    old = tmp_path / f".a.{os.getpid() if number == 'ours' else 7}.partial"
    old.mkdir()
    (old / "half").touch()
    if number == "another":
        os.utime(old, (0, 0))
    with written_whole(tmp_path / "a") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "new"]


def test_what_another_writer_holds_or_has_just_made_stays(tmp_path):
    held, fresh = tmp_path / ".a.7.partial", tmp_path / ".a.8.partial"
    fresh.touch()
    with open(held, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(held, (0, 0))
        write_atomically(tmp_path / "a", b"x")
        assert held.exists()
        assert fresh.exists()
