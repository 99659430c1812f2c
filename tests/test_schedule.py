import math

import pytest

from models.schedule import CoefficientSchedule


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
