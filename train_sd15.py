"""Train Stable Diffusion 1.5 with U-REPA: `train.py`, under the name that the plan gave it.

python train_sd15.py --config configs/A.yaml
python train_sd15.py --config configs/A.yaml align.coeff=0 run=runs/A_baseline
python train_sd15.py --config configs/A.yaml --plan         # what will it cost? Says so, and trains nothing
python train_sd15.py --config configs/A.yaml --self-test    # is every part alive? Says so, and trains nothing
accelerate launch --num_processes 4 train_sd15.py --config configs/A.yaml data.batch_size=12
"""

from train import main
from training.ranks import run_ranks

__all__ = ["main"]

if __name__ == "__main__":
    run_ranks(main)
