"""Tests of lmlosses.schedules.phases."""

import math

import pytest
import torch
import transformers
from torch.optim import lr_scheduler

from lmlosses.schedules import (
    constant,
    cosine,
    inverse_sqrt,
    join,
    linear,
    one_cycle,
    one_minus_sqrt,
    warmup,
    warmup_cosine,
    wsd,
)
from tests.schedules.test_curves import agree, rates_of


def values(schedule, steps=40):
    return [schedule(step) for step in range(steps)]


# ---- join


def test_pieces_count_their_own_steps():
    schedule = join([constant(value=9.0), linear(total_steps=4)], boundaries=[3])
    assert values(schedule, 9) == [9.0, 9.0, 9.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_a_piece_between_equal_boundaries_never_shows():
    pieces = [constant(value=float(value)) for value in range(4)]
    assert values(join(pieces, boundaries=[0, 2, 2]), 4) == [1.0, 1.0, 3.0, 3.0]


def test_join_is_torchs_sequential_lr():
    def make(optimizer):
        up = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 6)
        flat = lr_scheduler.ConstantLR(optimizer, 1.0, 1)
        down = lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return lr_scheduler.SequentialLR(optimizer, [up, flat, down], [6, 11])

    pieces = [
        linear(start=0.03, end=0.3, total_steps=6),
        constant(value=0.3),
        cosine(start=0.3, total_steps=20),
    ]
    agree(join(pieces, boundaries=[6, 11]), rates_of(make, steps=32))


def test_a_join_can_be_a_piece():
    inner = join([constant(value=2.0), constant(value=3.0)], boundaries=[1])
    outer = join([constant(), inner], boundaries=[2])
    assert values(outer, 5) == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert outer(torch.arange(5)).tolist() == values(outer, 5)


# ---- the first step, and the last


def test_a_warmup_wastes_no_step_on_a_rate_of_zero():
    assert values(warmup(warmup_steps=4, peak=0.5), 7) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5]
    )
    assert warmup(warmup_steps=0)(0) == 1.0


def test_the_first_value_can_be_chosen_and_the_line_stays_straight():
    assert values(warmup(warmup_steps=4, start=0.2), 6) == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    )
    assert values(warmup(warmup_steps=4, start=1 / 5)) == pytest.approx(
        values(warmup(warmup_steps=4))
    )
    assert values(warmup(warmup_steps=2, peak=0.0, start=0.4), 4) == [0.4, 0.2, 0.0, 0.0]


@pytest.mark.parametrize("decay", [linear, cosine, one_minus_sqrt])
def test_the_end_comes_at_the_total_and_one_stride_earlier_is_above_it(decay):
    settings = {"warmup_steps": 3, "total_steps": 20, "end": 0.1}
    for schedule in (wsd(decay_steps=5, decay=decay, **settings), warmup_cosine(**settings)):
        assert schedule(19) > 0.1 + 1e-3
        assert {schedule(step) for step in (20, 21, 40, 999)} == {0.1}
        assert schedule(3) == pytest.approx(1.0, abs=1e-15) and schedule(2) == 0.75


def test_warmup_cosine_to_the_bit():
    """Stored runs were made with it: this is how it was written when they were made."""
    for peak, w, n in ((0.015, 20, 300), (5e-3, 5, 96), (0.003, 100, 8000), (6e-3, 0, 7)):
        schedule = warmup_cosine(peak=peak, warmup_steps=w, total_steps=n)
        for step in range(0, n + 9, 1 + n // 500):
            if step < w:
                expected = peak * (step + 1) / (w + 1)
            else:
                done = min(1.0, (step - w) / (n - w))
                expected = peak * (1 + math.cos(math.pi * done)) / 2
            assert schedule(step) == expected


def test_phases_may_be_empty():
    assert values(wsd(warmup_steps=0, decay_steps=0, total_steps=3), 5) == [1, 1, 1, 0, 0]
    assert values(wsd(warmup_steps=0, decay_steps=3, total_steps=3), 5) == pytest.approx(
        [1, 2 / 3, 1 / 3, 0, 0]
    )
    assert values(wsd(warmup_steps=2, decay_steps=2, total_steps=4, start=0.0), 6) == [
        0, 0.5, 1, 0.5, 0, 0,
    ]  # fmt: skip
    assert values(warmup_cosine(warmup_steps=3, total_steps=3), 5) == [0.25, 0.5, 0.75, 0, 0]
    assert values(one_cycle(warmup_steps=0, total_steps=0), 2) == pytest.approx([4e-6, 4e-6])


def test_before_its_decay_wsd_knows_no_end():
    short = wsd(warmup_steps=4, decay_steps=10, total_steps=40)
    long = wsd(warmup_steps=4, decay_steps=90, total_steps=900)
    assert values(short, 31) == values(long, 31) and short(31) < long(31)


def test_four_times_the_steps_halve_an_inverse_square_root():
    schedule = inverse_sqrt(warmup_steps=10, peak=0.3)
    assert schedule(40) == pytest.approx(0.15) and schedule(1000) == pytest.approx(0.03)


def test_inverse_square_root_is_the_transformers():
    dim, warm = 512, 8
    schedule = inverse_sqrt(warmup_steps=warm, start=0.0, peak=(dim * warm) ** -0.5)
    for step in range(1, 60):
        expected = dim**-0.5 * min(step**-0.5, step * warm**-1.5)
        assert schedule(step) == pytest.approx(expected, abs=1e-15)


# ---- the same curves elsewhere


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(6, 30), (0, 30), (30, 30), (1, 40)])
def test_hugging_faces_curves_start_at_zero(warmup_steps, total_steps):
    w, n, peak = warmup_steps, total_steps, 0.3
    line = {"warmup_steps": w, "peak": peak, "start": 0.0}
    agree(warmup(**line), rates_of(lambda o: transformers.get_constant_schedule_with_warmup(o, w)))
    agree(
        join(
            [
                linear(start=0.0, end=peak, total_steps=w),
                linear(start=peak, total_steps=n - w),
            ],
            boundaries=[w],
        ),
        rates_of(lambda o: transformers.get_linear_schedule_with_warmup(o, w, n)),
    )
    inside = n if w == n else n + 1  # without a decay theirs still has the peak at the end
    agree(
        warmup_cosine(total_steps=n, **line),
        rates_of(lambda o: transformers.get_cosine_schedule_with_warmup(o, w, n), steps=inside),
    )
    agree(
        inverse_sqrt(timescale=w or 10_000, **line),
        rates_of(lambda o: transformers.get_inverse_sqrt_schedule(o, w)),
    )


def test_hugging_faces_cosine_climbs_again_and_ours_does_not():
    theirs = rates_of(lambda o: transformers.get_cosine_schedule_with_warmup(o, 5, 20), steps=36)
    ours = warmup_cosine(warmup_steps=5, total_steps=20, peak=0.3, start=0.0)
    assert theirs[35] == pytest.approx(0.3) and ours(35) == 0.0


@pytest.mark.parametrize(
    ("decay", "name"), [(linear, "linear"), (cosine, "cosine"), (one_minus_sqrt, "1-sqrt")]
)
@pytest.mark.parametrize(("w", "d"), [(5, 8), (0, 8), (5, 0), (0, 0), (14, 16)])
def test_hugging_faces_wsd_warms_up_from_the_end_value(decay, name, w, d):
    theirs = rates_of(
        lambda o: transformers.get_wsd_schedule(
            o, w, d, num_training_steps=30, decay_type=name, min_lr_ratio=0.1
        )
    )
    ours = wsd(
        warmup_steps=w, decay_steps=d, total_steps=30, peak=0.3, end=0.03, start=0.03, decay=decay
    )
    agree(ours, theirs)


@pytest.mark.parametrize(("anneal", "name"), [(cosine, "cos"), (linear, "linear")])
def test_one_cycle_is_torchs_counted_otherwise(anneal, name):
    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer, 0.3, total_steps=40, pct_start=0.3, anneal_strategy=name,
            cycle_momentum=False,
        )  # fmt: skip

    ours = one_cycle(warmup_steps=11, total_steps=39, peak=0.3, anneal=anneal)
    agree(ours, rates_of(make, steps=39))  # one more step and torch's raises
    assert ours(39) == pytest.approx(0.3 / 25 / 10_000)
    assert ours(1000) == ours(39)


def test_torchs_three_phases_are_a_join():
    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer, 0.3, total_steps=40, pct_start=0.3, three_phase=True, cycle_momentum=False
        )

    low = 0.3 / 25
    pieces = [
        cosine(start=low, end=0.3, total_steps=11),
        cosine(start=0.3, end=low, total_steps=11),
        cosine(start=low, end=low / 10_000, total_steps=17),
    ]
    agree(join(pieces, boundaries=[11, 22]), rates_of(make, steps=39))


def test_the_way_down_can_be_ones_own():
    def in_two_stairs(*, start, end, total_steps):
        middle = constant(value=(start + end) / 2)
        return join([middle, constant(value=end)], boundaries=[total_steps])

    schedule = wsd(warmup_steps=0, decay_steps=2, total_steps=4, end=0.2, decay=in_two_stairs)
    assert values(schedule, 6) == [1.0, 1.0, 0.6, 0.6, 0.2, 0.2]


# ---- errors


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: join([constant()], boundaries=[3]),
            ValueError,
            "schedules must be one more than boundaries, of which there are 1; got 1",
        ),
        (lambda: join([], boundaries=[]), ValueError, "schedules must be one more"),
        (
            lambda: join([constant()] * 3, boundaries=[3, 2]),
            ValueError,
            r"boundaries must not decrease; got \[3, 2\]",
        ),
        (
            lambda: join([constant()] * 2, boundaries=[-1]),
            ValueError,
            "boundaries must not be negative; got -1",
        ),
        (
            lambda: join([constant()] * 2, boundaries=[1.5]),
            TypeError,
            "boundaries must be a whole number; got float 1.5",
        ),
        (lambda: warmup(warmup_steps=-1), ValueError, "warmup_steps must not be negative"),
        (lambda: warmup(warmup_steps=1, peak=-1.0), ValueError, "peak must not be negative"),
        (lambda: warmup(warmup_steps=1, start=-1.0), ValueError, "start must not be negative"),
        (
            lambda: warmup_cosine(warmup_steps=6, total_steps=5),
            ValueError,
            "warmup_steps must not exceed total_steps, which is 5; got 6",
        ),
        (
            lambda: warmup_cosine(warmup_steps=0, total_steps=5.0),
            TypeError,
            "total_steps must be a whole number; got float 5.0",
        ),
        (
            lambda: wsd(warmup_steps=6, decay_steps=5, total_steps=10),
            ValueError,
            r"warmup_steps \+ decay_steps must not exceed total_steps, which is 10; got 6 \+ 5",
        ),
        (
            lambda: wsd(warmup_steps=1, decay_steps=-1, total_steps=10),
            ValueError,
            "decay_steps must not be negative; got -1",
        ),
        (
            lambda: wsd(warmup_steps=1, decay_steps=1, total_steps=10, end=-0.1),
            ValueError,
            "end must not be negative; got -0.1",
        ),
        (
            lambda: inverse_sqrt(warmup_steps=3, timescale=0),
            ValueError,
            "timescale must be positive; got 0",
        ),
        (
            lambda: one_cycle(warmup_steps=5, total_steps=4),
            ValueError,
            "warmup_steps must not exceed total_steps, which is 4; got 5",
        ),
        (
            lambda: one_cycle(warmup_steps=1, total_steps=4, peak=-1.0),
            ValueError,
            "peak must not be negative; got -1.0",
        ),
    ],
)
def test_phases_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
