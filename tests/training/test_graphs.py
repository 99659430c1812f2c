"""A compiled training has one graph, whatever happens between its steps: a second one is minutes on a GPU."""

import pytest
import torch
from small_runs import train
from torch._dynamo.utils import counters

from benchmarks.gpu_bench import traced_only

BETWEEN_STEPS = [
    "align.warmup_steps=2",  # λ is 0 at the first step
    "align.cutoff_step=5",  # and at the last
    "train.preview_every=2",
    "train.preview_images=2",
    "train.eval_every=3",
    "train.precision=fp32",
]


@pytest.mark.thorough  # test_alignment_that_comes_and_goes_compiles_twice_and_no_more is the quick form of it
def test_a_training_with_warm_up_cutoff_previews_and_evaluations_has_one_graph(miniature, tmp_path):
    with traced_only():
        run = train(miniature, tmp_path / "run", "train.compile=default", *BETWEEN_STEPS)
    assert (run.path / "previews").is_dir()
    assert (run.path / "eval/points.jsonl").exists()
    assert {line["coeff"] for line in run.metrics()} > {0.0}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.compiler.reset()
