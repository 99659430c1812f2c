"""The demo of a family's tiny pipeline: its very commands, one after the other, end with a page."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_server import said, start

from demo import NOTE, Demo
from models.families.table import FAMILIES
from models.families.transformer import VideoTransformer

ROOT = Path(__file__).parents[2]
NAMES = [name for name, kind in FAMILIES.items() if not issubclass(kind, VideoTransformer)]


def run_stages(demo: Demo, folder: Path, quicker: Callable[[str], str] = str) -> str:
    """Run all stages of a demo in a folder, each changed by `quicker`; returns its page."""
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / demo.record).parent.mkdir(parents=True)
    (folder / demo.record).write_text("[]")
    for group in demo.stages():
        for stage in group:
            # As the fork server names the scripts.
            command = re.sub(r"^(preprocessing/)?(\d(?=_)|[a-z]+)\S*", r"\2", quicker(stage.command))
            name = stage.name.replace(" ", "_")
            process = start(command, folder, name, {"OMP_NUM_THREADS": "1"})
            process.join(300)
            assert process.exitcode == 0, said(folder, name)[1][-2000:]
            assert stage.name.startswith("verify") or (folder / stage.product).exists(), stage.name
    return (folder / demo.page).read_text()


@pytest.mark.parametrize(
    "name", [name if name == "pixart" else pytest.param(name, marks=pytest.mark.thorough) for name in NAMES]
)
def test_the_quick_demo_of_a_family_ends_with_a_page_that_says_what_it_is(name, tmp_path):
    page = run_stages(Demo(name), tmp_path)
    assert NOTE in page
    assert "aligned" in page


@pytest.mark.thorough
def test_the_demo_of_moving_digits_ends_with_a_page_of_films(tmp_path):
    """Its very commands, on fewer digits and for fewer steps."""
    steps = "train.steps=4 eval.num_samples=20 eval.sampling_steps=2 eval.bootstrap=2"

    def quicker(command: str) -> str:
        command = re.sub(" --sheet .*", "", command)  # an untrained VAE's pictures are not the images
        return command.replace("--moving", "--moving --quick").replace(" run=", f" {steps} run=")

    page = run_stages(Demo(None, clips=True), tmp_path, quicker)
    assert "data:video/mp4" in page
    assert "crepa" in page
