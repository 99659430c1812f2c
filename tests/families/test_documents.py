"""docs/families.md says of every family what its code says."""

import sys
from pathlib import Path

from models.families.table import FAMILIES

ROOT = Path(__file__).parents[2]


def test_the_table_of_families_is_what_they_say_of_themselves():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import families

    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert families.table() in text, "python benchmarks/families.py"


def test_every_family_has_a_line_in_what_is_special_or_is_the_plans():
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert all(name == "sd15" or f"**{name}" in text or f", {name}" in text for name in FAMILIES)
