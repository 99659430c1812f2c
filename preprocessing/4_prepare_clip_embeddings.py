"""Script 4 for Stable Diffusion 1.5, under the name that the plan gave it: `4_prepare_text_embeddings.py`.

python preprocessing/4_prepare_clip_embeddings.py --class-names LOC_synset_mapping.txt --out data/imagenet/text
"""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that imports from the root work

from common.errors import run_script


def main(argv: list[str] | None = None) -> None:
    import_module("preprocessing.4_prepare_text_embeddings").main(argv, __doc__)


if __name__ == "__main__":
    run_script(main)
