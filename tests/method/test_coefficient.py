import json
import math
from pathlib import Path

import pytest
import torch
from fork_server import two_ranks

from method.coefficient import Coefficient, CoefficientSchedule, SimilarityCutoff


def test_decay_is_counted_after_the_warmup():
    coefficient = CoefficientSchedule(
        coeff=1.0, schedule="linear", warmup_steps=100, decay_steps=5000, total_steps=9000
    )
    assert coefficient(0) == 0
    assert coefficient(50) == 0.5
    assert coefficient(100) == 1.0
    assert coefficient(2600) == 0.5
    assert coefficient(5000) > 0  # a decay counted from step 0 would have ended here
    assert coefficient(5100) == coefficient(8999) == 0


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("constant", 0.8), ("linear", 0.5), ("cosine", 0.5), ("polynomial", 0.2 + 0.6 * 0.25)],
)
def test_halfway_through_the_decay(schedule, middle):
    coefficient = CoefficientSchedule(
        coeff=0.8, coeff_end=0.2, schedule=schedule, power=2.0, warmup_steps=10, total_steps=110
    )
    assert coefficient(60) == pytest.approx(middle)


def test_decay_of_zero_steps_reaches_to_the_end_of_training():
    coefficient = CoefficientSchedule(coeff=0.8, schedule="cosine", warmup_steps=10, total_steps=110)
    assert coefficient(109) == pytest.approx(0.4 * (1 + math.cos(math.pi * 0.99)))
    assert coefficient(110) == 0


def test_cutoff_silences_from_its_step_on():
    coefficient = CoefficientSchedule(coeff=0.8, cutoff_step=7, total_steps=10)
    assert [coefficient(step) > 0 for step in (0, 6, 7, 9)] == [True, True, False, False]


def test_a_coefficient_of_zero_stays_zero():
    coefficient = CoefficientSchedule(
        coeff=0.0, coeff_end=0.5, schedule="linear", warmup_steps=5, total_steps=10
    )
    assert {coefficient(step) for step in range(11)} == {0.0}


def schedule(coeff=0.8, total_steps=100, **knobs):
    return CoefficientSchedule(coeff=coeff, total_steps=total_steps, **knobs)


def feed(cutoff, values):
    """Observe the values in turn; what `off` said after each."""
    said = []
    for value in values:
        cutoff.observe(torch.tensor(value))
        said.append(cutoff.off)
    return said


def plain_average(values, decay):
    """The bias-corrected EMA as a weighted mean, written out."""
    weights = [(1 - decay) * decay ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def test_the_average_is_bias_corrected():
    values = [0.9, -0.2, 0.4, 0.35, 0.1]
    cutoff = SimilarityCutoff(2.0, ema_decay=0.9)
    for n in range(1, len(values) + 1):
        cutoff.observe(torch.tensor(values[n - 1]))
        assert cutoff.average == pytest.approx(plain_average(values[:n], 0.9))


def test_one_noisy_batch_cannot_end_the_alignment():
    """The known-bad average starts at its first value, so that a first batch above the threshold latches for good."""
    values = [0.99] + [0.1] * 30
    assert not any(feed(SimilarityCutoff(0.5, ema_decay=0.9), values))
    bad, latched = values[0], False
    for value in values:
        bad = 0.9 * bad + 0.1 * value
        latched = latched or bad >= 0.5
    assert latched


def test_nothing_is_decided_before_as_many_values_as_the_average_covers():
    # Uncorrected, the average of four values of 0.6 would still be 0.41.
    assert feed(SimilarityCutoff(0.5, ema_decay=0.75), [0.6] * 6) == [False] * 3 + [True] * 3
    assert feed(SimilarityCutoff(0.5, ema_decay=0.0), [0.9, 0.1]) == [True, True]
    assert SimilarityCutoff(0.5, ema_decay=0.99).enough == 100


@pytest.mark.parametrize(("mode", "after"), [("permanent", True), ("recoverable", False)])
def test_a_permanent_cutoff_stays_and_a_recoverable_one_comes_back(mode, after):
    said = feed(SimilarityCutoff(0.5, ema_decay=0.5, mode=mode), [0.9] * 4 + [0.0] * 6)
    assert said[3] is True
    assert said[-1] is after


def test_a_cutoff_silences_the_schedule_and_asks_for_nothing_more():
    coefficient = Coefficient(schedule(), SimilarityCutoff(0.5, ema_decay=0.0))
    assert (coefficient(0), coefficient.evaluates_heads(0)) == (0.8, True)
    coefficient.observe(torch.tensor(0.6))
    assert coefficient(1) == 0
    assert not any(coefficient.evaluates_heads(step) for step in range(1, 30))


def test_a_recoverable_cutoff_measures_every_k_steps_and_comes_back():
    cutoff = SimilarityCutoff(0.5, ema_decay=0.0, mode="recoverable", every=4)
    coefficient = Coefficient(schedule(), cutoff)
    coefficient.observe(torch.tensor(0.6))
    assert [step for step in range(1, 13) if coefficient.evaluates_heads(step)] == [4, 8, 12]
    coefficient.observe(torch.tensor(0.2))
    assert coefficient(5) == 0.8


def test_the_schedule_is_asked_first():
    """While the schedule itself says 0 nothing is measured, recoverable or not."""
    cutoff = SimilarityCutoff(0.5, ema_decay=0.0, mode="recoverable", every=1)
    coefficient = Coefficient(schedule(warmup_steps=2, cutoff_step=5), cutoff)
    assert [step for step in range(8) if coefficient.evaluates_heads(step)] == [1, 2, 3, 4]
    assert not Coefficient(schedule(coeff=0.0)).evaluates_heads(3)


@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_a_restored_cutoff_goes_on_as_the_unbroken_one(mode):
    values = [0.4, 0.7, 0.3, 0.9, 0.8, 0.9, 0.1, 0.0, 0.2, 0.6]
    unbroken = SimilarityCutoff(0.6, ema_decay=0.5, mode=mode)
    expected = feed(unbroken, values)
    assert True in expected
    for stop in range(len(values)):
        first = SimilarityCutoff(0.6, ema_decay=0.5, mode=mode)
        for value in values[:stop]:
            first.observe(torch.tensor(value))  # the last one not yet read when the state is saved
        second = SimilarityCutoff(0.6, ema_decay=0.5, mode=mode)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert feed(second, values[stop:]) == expected[stop:]
        assert second.average == unbroken.average


def _rank(rank, world, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    cutoff = SimilarityCutoff(0.5, ema_decay=0.0)
    # One rank alone would cut off at its first value, the other never.
    said = feed(cutoff, [[0.9, 0.7, 0.9], [0.0, 0.2, 0.4]][rank])
    Path(folder, f"{rank}.json").write_text(json.dumps([said, cutoff.average]))
    torch.distributed.destroy_process_group()


def test_ranks_decide_alike_by_their_mean(tmp_path):
    two_ranks(_rank, 2, str(tmp_path), clean=(tmp_path / "store").unlink)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1]
    assert said[0][0] == [False, False, True]
    assert said[0][1] == pytest.approx(0.65)
