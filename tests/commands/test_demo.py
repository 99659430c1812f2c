"""The demo of a family's tiny pipeline: its very commands, one after the other, end with a page."""

import re
from pathlib import Path

import pytest
from fork_server import said, start

from demo import NOTE, Demo
from models.families.table import FAMILIES
from models.families.transformer import VideoTransformer

ROOT = Path(__file__).parents[2]
NAMES = [name for name, kind in FAMILIES.items() if not issubclass(kind, VideoTransformer)]


@pytest.mark.parametrize(
    "name", [name if name == "pixart" else pytest.param(name, marks=pytest.mark.thorough) for name in NAMES]
)
def test_the_quick_demo_of_a_family_ends_with_a_page_that_says_what_it_is(name, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    demo = Demo(name)
    (tmp_path / demo.record).parent.mkdir(parents=True)
    (tmp_path / demo.record).write_text("[]")
    for group in demo.stages():
        for stage in group:
            # As the fork server names the scripts.
            command = re.sub(r"^(preprocessing/)?(\d(?=_)|[a-z]+)\S*", r"\2", stage.command)
            process = start(command, tmp_path, stage.name.replace(" ", "_"), {"OMP_NUM_THREADS": "1"})
            process.join(300)
            assert process.exitcode == 0, said(tmp_path, stage.name.replace(" ", "_"))[1][-2000:]
            assert (tmp_path / stage.product).exists(), stage.name
    page = (tmp_path / demo.page).read_text()
    assert NOTE in page
    assert "aligned" in page
