"""Evaluate runs of Stable Diffusion 1.5: `evaluate.py`, under the name that the plan gave it.

python evaluate_sd15.py curve runs/A runs/A_baseline configs/A.yaml    # metrics of every checkpoint, cheap protocol
python evaluate_sd15.py final runs/A runs/A_baseline                   # the plan's protocol, and a guidance sweep
python evaluate_sd15.py align runs/A                                   # CCA, CKA, CKNNA … on held-out images
python evaluate_sd15.py report runs/A runs/A_baseline configs/A.yaml -o report.html
"""

from evaluate import main
from training.ranks import run_ranks

__all__ = ["main"]

if __name__ == "__main__":
    run_ranks(main)
