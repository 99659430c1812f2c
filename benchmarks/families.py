"""Write the table of all families into docs/families.md, from what they say of themselves and from their networks on "meta".

python benchmarks/families.py
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.families.table import FAMILIES

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- the table: python benchmarks/families.py -->\n", "<!-- end of the table -->\n"
HEADER = (
    "family", "base model", "weights", "latents", "taps", "`auto`", "text of a prompt", "LoRA targets", "export loads in",
)  # fmt: skip


def row(name: str) -> tuple[str, ...]:
    """What the table says of one family, of its usual base model."""
    family = FAMILIES[name](FAMILIES[name].default_base)
    network, _ = family.network_of_shapes(local=True)
    taps, main = family.tap_names(network), family.main_tap(network)
    text = family.text_shapes(network)
    megabytes = sum(map(math.prod, text.values())) * 2 / 1e6
    weights = sum(p.numel() for p in network.parameters()) / 1e9
    loads = "load_lora_weights" if family.loads_lora else "PeftModel"
    return (
        f"`{name}`",
        f"[{family.default_base}](https://huggingface.co/{family.default_base})",
        f"{weights:.2f} B",
        " × ".join(map(str, family.latent_shape(network))),
        ", ".join(taps) if len(taps) < 4 else f"{taps[0]} … {taps[-1]}",
        main,
        f"{', '.join(f'{field} {shape}' for field, shape in text.items())}: {megabytes:.2g} MB",
        ", ".join(family.lora_targets),
        f"`{family.pipeline}`, {loads}",
    )


def table() -> str:
    lines = [HEADER, ("---",) * len(HEADER), *map(row, FAMILIES)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
    print(DOCUMENT)


if __name__ == "__main__":
    main()
