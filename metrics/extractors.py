"""Load the feature extractors that the settings name."""

from pathlib import Path

import torch

from metrics.features import Extractor
from metrics.folder_extractors import load_classifier, load_dinov2
from metrics.inception import find_weights, load_inception


def load_extractors(
    setting: str | Path, device: str | torch.device, *, dinov2: str | Path | None = None
) -> list[Extractor]:
    """The extractors that a setting names; all can be fed by one reading of the images.

    "inception", or a .pth of its weights: the protocols "adm" and "clean", which share one network. A transformers folder of an
    image classifier: "classifier". `dinov2` is a transformers folder whose features are given beside these, never alone.
    Nothing is ever downloaded; raises `UserError` for files that are missing or of another kind.
    """
    device = torch.device(device)
    if str(setting) == "inception" or Path(setting).suffix == ".pth":
        extractors = load_inception(find_weights(setting), device)
    else:
        extractors = [load_classifier(Path(setting), device)]
    return extractors if dinov2 is None else [*extractors, load_dinov2(Path(dinov2), device)]
