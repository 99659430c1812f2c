"""Everything that only a GPU can show, in one command and without a network: proofs first, then speed.

    python benchmarks/gpu_check.py                                     # full size: needs a GPU; 9 minutes a part
    python benchmarks/gpu_check.py --part proof --dir /tmp
    python benchmarks/gpu_check.py --size small --results runs/check   # CPU: that every part runs

A Stable Diffusion 1.5 folder and a DINOv2-L with random weights and a cache of random values are made on the spot. `proof`
(`gpu_proofs.py`) holds what a training promises against what it does, `speed` and `attention` (`gpu_speed.py`) measure. Each
part writes its own JSON, so that they may run one by one. The exit code is 1 where a proof fails or a measurement breaks off;
a missed target of speed is only printed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

from benchmarks.gpu_bench import BROKE_OFF, prepare
from benchmarks.gpu_proofs import prove
from benchmarks.gpu_speed import compare_attention, measure_speed
from benchmarks.report import benchmark_parser, publish, temporary_folder
from benchmarks.train_step import device_of

PARTS = {"proof": prove, "speed": measure_speed, "attention": compare_attention}


def main() -> None:
    parser = benchmark_parser(
        __doc__,
        minutes=(8, "after which a part begins nothing more, and says what it left out"),
    )
    parser.add_argument("--size", choices=("full", "small"), default="full", help="(default full)")
    parser.add_argument(
        "--part", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), dest="parts", help="(default all)"
    )
    args = parser.parse_args()
    device = device_of(parser, args)
    failed = 0
    with temporary_folder(args.dir) as folder:
        bench = prepare(folder, args.size, device, 60 * args.minutes)
        for name in args.parts:
            rows, targets = PARTS[name](bench)
            publish(argparse.Namespace(**vars(args), part=name), rows, targets)
            if name == "proof":
                failed += sum(not found["pass"] for found in targets)
            failed += sum(BROKE_OFF in row.get("note", "") for row in rows)
    if failed:
        print(f"{failed} targets of proofs failed, or measurements broke off", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
