"""Assemble the page about several runs from what was recorded of them; nothing is measured anew."""

from pathlib import Path

from report.material import Material
from report.page import write_page
from report.section_alignment import alignment_section
from report.section_metrics import curve_section, final_section, results_section
from report.section_runs import findings_section, making_section, samples_section, training_section

SECTIONS = (
    results_section,
    curve_section,
    final_section,
    samples_section,
    alignment_section,
    training_section,
    findings_section,
    making_section,
)


def write_report(page: Path, material: Material) -> Path:
    """Write the page; its figures go to `material.folder`. Returns the page's file path."""
    material.folder.mkdir(parents=True, exist_ok=True)
    names = [
        f"`{name}` (bare base model)" if run.is_base else f"`{name}` (λ = {run.settings['align.coeff']:g})"
        for name, run in material.runs.items()
    ]
    lead = (
        f"{', '.join(names)}: what was measured on these very runs. Every number stands with its protocol; those of different "
        "protocols do not compare."
    )
    blocks = [block for section in SECTIONS for block in section(material)]
    return write_page(page, title=f"U-REPA: {', '.join(material.runs)}", lead=lead, sections=blocks)
