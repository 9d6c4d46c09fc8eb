"""Tests of lmlosses.schedules.curves, and of what all schedules have in common."""

import copy
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

from lmlosses.schedules import (
    Schedule,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    join,
    linear,
    multi_step,
    one_cycle,
    one_minus_sqrt,
    step_decay,
    warmup,
    warmup_cosine,
    wsd,
)

EVERY = {
    "constant": constant(value=0.7),
    "step_decay": step_decay(step_size=7, gamma=0.5),
    "multi_step": multi_step(milestones=[12, 5, 12, 30], gamma=0.316, peak=2.0),
    "multi_step without a milestone": multi_step(milestones=[]),
    "exponential": exponential(gamma=0.9, peak=0.3),
    "linear": linear(start=0.2, end=1.3, total_steps=30),
    "cosine": cosine(start=1.1, end=0.1, total_steps=30),
    "one_minus_sqrt": one_minus_sqrt(end=0.05, total_steps=30),
    "nothing": linear(total_steps=0),
    "warmup": warmup(warmup_steps=6),
    "warmup_cosine": warmup_cosine(warmup_steps=5, total_steps=30, peak=0.3, end=0.03),
    "no warmup": warmup_cosine(warmup_steps=0, total_steps=30, start=0.0),
    "all warmup": warmup_cosine(warmup_steps=30, total_steps=30),
    "wsd": wsd(warmup_steps=5, decay_steps=8, total_steps=30, start=0.0),
    "wsd, cosine": wsd(warmup_steps=5, decay_steps=8, total_steps=30, end=0.1, decay=cosine),
    "wsd, 1 - sqrt": wsd(warmup_steps=0, decay_steps=8, total_steps=30, decay=one_minus_sqrt),
    "wsd without its decay": wsd(warmup_steps=3, decay_steps=0, total_steps=30),
    "wsd without its plateau": wsd(warmup_steps=10, decay_steps=20, total_steps=30),
    "wsd of no steps": wsd(warmup_steps=0, decay_steps=0, total_steps=0),
    "inverse_sqrt": inverse_sqrt(warmup_steps=5, peak=0.4),
    "inverse_sqrt without a warmup": inverse_sqrt(warmup_steps=0),
    "one_cycle": one_cycle(warmup_steps=9, total_steps=30),
    "one_cycle, linear": one_cycle(warmup_steps=0, total_steps=30, anneal=linear),
    "join": join([linear(total_steps=5), constant(), cosine(total_steps=9)], boundaries=[5, 5]),
}
every = pytest.mark.parametrize("schedule", EVERY.values(), ids=EVERY)


def rates_of(make, *, lr=0.3, steps=40):
    """What one of torch's schedulers sets the rate to at each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def agree(schedule, rates):
    assert [schedule(step) for step in range(len(rates))] == pytest.approx(rates, abs=1e-12)


# ---- what holds for every schedule


@every
def test_a_tensor_of_steps_gives_the_same_numbers_in_its_shape(schedule):
    values = torch.tensor([schedule(step) for step in range(42)], dtype=torch.float64)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64):
        steps = torch.arange(42).to(dtype).reshape(2, 3, 7)
        found = schedule(steps)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, values.reshape(2, 3, 7), rtol=1e-14, atol=1e-15)
    assert schedule(torch.tensor(17)).shape == ()
    assert schedule(torch.zeros(0)).shape == (0,)


@every
def test_no_value_is_read_so_that_no_call_waits_for_a_device(schedule):
    for steps in (torch.empty(3, device="meta"), torch.empty((), dtype=int, device="meta")):
        found = schedule(steps)
        assert found.shape == steps.shape and found.device.type == "meta"


@every
def test_a_value_is_a_finite_float_and_depends_on_the_step_alone(schedule):
    once = [schedule(step) for step in range(60)]
    assert all(type(value) is float and 0 <= value < 3 for value in once)
    assert [schedule(step) for step in reversed(range(60))] == once[::-1]


@every
def test_nothing_happens_after_the_end(schedule):
    later = [schedule(step) for step in (30, 31, 59, 60, 61, 90, 10**6)]
    assert all(after <= before for before, after in zip(later, later[1:], strict=False))
    endless = repr(schedule).startswith(("exponential", "step_decay")) or "inverse" in repr(
        schedule
    )
    assert endless or len(set(later)) == 1
    assert schedule(torch.tensor(10**6)).item() == pytest.approx(later[-1], abs=1e-15)


@every
def test_a_schedule_can_be_copied_and_sent_to_another_process(schedule):
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert [twin(step) for step in range(40)] == [schedule(step) for step in range(40)]
        assert repr(twin) == repr(schedule)


@every
def test_its_name_tells_its_settings(schedule):
    assert " at 0x" not in repr(schedule)


def test_a_name_can_be_read():
    assert repr(cosine(total_steps=9)) == "cosine(start=1.0, end=0.0, total_steps=9)"
    assert repr(Schedule(abs)) == "Schedule(<built-in function abs>)"


@every
def test_negative_steps_are_refused_where_they_can_be_seen(schedule):
    with pytest.raises(ValueError, match="step must not be negative; got -1"):
        schedule(-1)
    with pytest.raises(ValueError, match="step must not be negative; got -2"):
        schedule(torch.tensor([3, -2]))


@pytest.mark.bad_input
@every
def test_steps_that_are_no_numbers_are_refused(schedule):
    for step in (1.0, True, "1", None):
        with pytest.raises(TypeError, match="step must be a whole number"):
            schedule(step)
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="step must be an integer or floating-point tensor"):
            schedule(torch.zeros(2, dtype=dtype))


@pytest.mark.compiles
def test_schedules_compile():
    schedule = EVERY["wsd, cosine"]
    compiled = torch.compile(lambda step: schedule(step), backend="eager", fullgraph=True)
    steps = torch.arange(40)
    torch.testing.assert_close(compiled(steps), schedule(steps))


# ---- one by one


def test_constant_is_torchs_scheduler_that_does_nothing():
    agree(constant(value=0.3), rates_of(lambda o: lr_scheduler.ConstantLR(o, 1.0, 5)))


def test_step_decay_is_torchs_step_lr():
    schedule = step_decay(step_size=7, gamma=0.4, peak=0.3)
    agree(schedule, rates_of(lambda o: lr_scheduler.StepLR(o, 7, 0.4)))


def test_multi_step_is_torchs_multi_step_lr_in_any_order_of_milestones():
    schedule = multi_step(milestones=[20, 8, 20, 0], gamma=0.4, peak=0.3)
    rates = rates_of(lambda o: lr_scheduler.MultiStepLR(o, [8, 20, 20], 0.4))
    agree(schedule, [0.4 * rate for rate in rates])  # torch never passes a milestone at 0
    agree(multi_step(milestones=[8, 20, 20], gamma=0.4, peak=0.3), rates)


def test_exponential_is_torchs_exponential_lr():
    agree(exponential(gamma=0.9, peak=0.3), rates_of(lambda o: lr_scheduler.ExponentialLR(o, 0.9)))


def test_linear_is_torchs_linear_lr():
    schedule = linear(start=0.3 * 0.2, end=0.3 * 0.9, total_steps=12)
    agree(schedule, rates_of(lambda o: lr_scheduler.LinearLR(o, 0.2, 0.9, 12)))


def test_cosine_is_torchs_up_to_the_end_where_torchs_climbs_again():
    schedule = cosine(start=0.3, end=0.02, total_steps=25)
    rates = rates_of(lambda o: lr_scheduler.CosineAnnealingLR(o, 25, 0.02))
    agree(schedule, rates[:26])
    assert schedule(39) == 0.02 and rates[39] > 0.1


def test_one_minus_sqrt_by_hand():
    schedule = one_minus_sqrt(start=0.5, end=0.1, total_steps=100)
    values = [schedule(step) for step in (0, 1, 25, 64, 100)]
    assert values == pytest.approx([0.5, 0.46, 0.3, 0.18, 0.1])


def test_a_phase_of_no_steps_is_at_its_end():
    for curve in (linear, cosine, one_minus_sqrt):
        assert curve(start=0.7, end=0.2, total_steps=0)(0) == pytest.approx(0.2)


def test_a_drop_to_zero_is_a_drop_to_zero():
    assert [exponential(gamma=0.0)(step) for step in range(3)] == [1.0, 0.0, 0.0]
    assert exponential(gamma=0.0)(torch.arange(3)).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: constant(value=-1.0), ValueError, "value must not be negative; got -1.0"),
        (lambda: step_decay(step_size=0), ValueError, "step_size must be positive; got 0"),
        (lambda: step_decay(step_size=2.0), TypeError, "step_size must be a whole number"),
        (lambda: step_decay(step_size=1, gamma=1.5), ValueError, r"gamma must lie in \[0, 1\]"),
        (lambda: multi_step(milestones=[3, -1]), ValueError, "milestones must not be negative"),
        (lambda: multi_step(milestones=[0.5]), TypeError, "milestones must be a whole number"),
        (lambda: exponential(gamma=-0.1), ValueError, r"gamma must lie in \[0, 1\]"),
        (lambda: exponential(gamma=0.5, peak=-1), ValueError, "peak must not be negative"),
        (lambda: linear(total_steps=-1), ValueError, "total_steps must not be negative; got -1"),
        (lambda: linear(total_steps=2.0), TypeError, "total_steps must be a whole number"),
        (lambda: cosine(start=-1.0, total_steps=1), ValueError, "start must not be negative"),
        (lambda: cosine(end=float("nan"), total_steps=1), ValueError, "end must be finite"),
        (lambda: one_minus_sqrt(end="0", total_steps=1), TypeError, "end must be a real number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
