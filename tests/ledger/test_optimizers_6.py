"""What section 3 of the notes says about schedules, held to numbers."""

import math
from collections.abc import Callable

import pytest
import torch

from lmlosses.lab.streaming import expected_losses
from lmlosses.schedules import (
    Schedule,
    cosine,
    inverse_sqrt,
    join,
    linear,
    multi_step,
    warmup,
    warmup_cosine,
    wsd,
)

CURVATURES = torch.logspace(0, -3, 20, dtype=torch.float64)


def printed_cosine(t: float, total: int, warm: int, high: float, low: float = 0.0) -> float:
    """The notes' code of 3.1, branch by branch."""
    if t < warm:
        return high * t / warm
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * (t - warm) / (total - warm)))


def printed_wsd(
    t: float, total: int, warm: int, decay: int, high: float, low: float = 0.0
) -> float:
    """The notes' code of 3.2, branch by branch."""
    if t < warm:
        return high * t / warm
    if t < total - decay:
        return high
    return low + (high - low) * (1 - (t - (total - decay)) / decay)


def tuned(shape: Schedule, *, steps: int, noise: float, low: float = -0.8) -> float:
    """Expected loss at the end with the best of some peak rates, that best one inside."""
    peaks = torch.logspace(low, 0.4, 49, dtype=torch.float64)
    rates = torch.tensor([shape(step) for step in range(steps)], dtype=torch.float64)
    ends = expected_losses(peaks[:, None] * rates, CURVATURES, batch=4, noise=noise)[:, -1]
    assert 0 < int(ends.argmin()) < len(peaks) - 1
    return ends.min().item()


def refused(call: Callable[[], object], message: str) -> bool:
    with pytest.raises(ValueError, match=message):
        call()
    return True


def test_notes_3_1_cosine():
    """Inside, the curve; before the warmup ends, and after the total, something else."""

    def printed(t: int, total: int = 40, warm: int = 8) -> float:
        return 0.1 + 0.5 * (2 - 0.1) * (1 + math.cos((t - warm) / (total - warm) * math.pi))

    whole = warmup_cosine(warmup_steps=8, total_steps=40, peak=2.0, end=0.1, start=0.0)
    part = cosine(start=2.0, end=0.1, total_steps=32)
    for t in range(8, 41):
        assert abs(whole(t) - printed(t)) < 1e-12 and abs(part(t - 8) - printed(t)) < 1e-12
    assert printed(0) > 1.7 > 0.1 > whole(0)
    assert abs(printed(72) - 2.0) < 1e-12
    assert abs(whole(72) - 0.1) < 1e-12 and abs(part(64) - 0.1) < 1e-12
    with pytest.raises(ZeroDivisionError):
        printed(40, warm=40)


def test_notes_3_1_code():
    ours = warmup_cosine(warmup_steps=10, total_steps=50, peak=0.3, end=0.03, start=0.0)
    for t in range(51):
        assert abs(ours(t) - printed_cosine(t, 50, 10, 0.3, 0.03)) < 1e-12
    assert printed_cosine(0, 50, 10, 0.3) == 0.0  # a step that moves nothing
    assert printed_cosine(49, 50, 10, 0.3, 0.03) > 0.03 + 1e-4
    assert printed_cosine(90, 50, 10, 0.3, 0.03) == pytest.approx(0.3)
    assert ours(90) == pytest.approx(0.03)
    with pytest.raises(ZeroDivisionError):
        printed_cosine(50, 50, 50, 0.3)
    assert warmup_cosine(warmup_steps=50, total_steps=50, end=0.1)(50) == pytest.approx(0.1)


def test_notes_3_1_sketch():
    """Level at the end, as drawn; level at the peak, where a corner is drawn."""
    curve = [cosine(total_steps=100)(t) for t in range(101)]
    falls = [before - after for before, after in zip(curve, curve[1:], strict=False)]
    assert abs(sum(falls) - 1) < 1e-12
    assert max(falls[-10:]) < 0.3 * max(falls)
    assert max(falls[:10]) < 0.3 * max(falls) and sum(falls[:10]) < 0.025
    assert falls.index(max(falls)) in (49, 50)


def test_notes_3_2_users():
    """Two stairs, as DeepSeek LLM, against a plateau and a decay."""
    stairs = multi_step(milestones=[800, 900], gamma=0.316)
    plateau = wsd(warmup_steps=1, decay_steps=290, total_steps=1000, end=0.1, decay=cosine)
    seen = [stairs(t) for t in range(1, 1001)]
    assert sorted(set(seen)) == pytest.approx([0.1, 0.316, 1.0], rel=2e-3)
    assert seen.count(stairs(0)) == 799 and stairs(0) == 1.0
    ways_down = [plateau(t) for t in range(711, 1000)]
    assert len(set(ways_down)) == 289 and plateau(710) == pytest.approx(1.0)
    assert ways_down[144] == pytest.approx(0.55, abs=1e-9) and plateau(1000) == 0.1
    assert max(abs(plateau(t) - stairs(t)) for t in range(700, 1000)) > 0.3


def test_notes_3_2_sketch():
    schedule = wsd(warmup_steps=100, decay_steps=80, total_steps=800, end=0.1)
    curve = [schedule(t) for t in range(1000)]
    changes = [after - before for before, after in zip(curve, curve[1:], strict=False)]
    assert all(change > 0 for change in changes[:100]) and not any(changes[100:720])
    assert all(change < -1e-3 for change in changes[720:800]) and not any(changes[800:])
    assert max(curve) == 1.0 and curve[-1] == pytest.approx(0.1)


def test_notes_3_2_warmup():
    """In a long run, as said; in a run of 1000 steps nothing is left for the other phases."""
    long = wsd(warmup_steps=2000, decay_steps=30_000, total_steps=300_000, start=0.0)
    assert long(1000) == pytest.approx(0.5) and long(2000) == long(200_000) == 1.0
    short = [printed_wsd(t, 1000, 2000, 100, 1.0) for t in range(1000)]
    assert max(short) == short[-1] < 0.5
    assert refused(
        lambda: wsd(warmup_steps=2000, decay_steps=100, total_steps=1000),
        "warmup_steps .* must not exceed total_steps, which is 1000",
    )


def test_notes_3_2_stable():
    schedule = wsd(warmup_steps=20, decay_steps=100, total_steps=1000, peak=0.7)
    at_peak = [t for t in range(1000) if schedule(t) == 0.7]
    assert at_peak == list(range(20, 901)) and len(at_peak) > 0.8 * 1000


def test_notes_3_2_decay():
    """Little noise: a tenth will do. Much noise: one half is best and a tenth costs 60 %."""
    ends = {}
    for noise in (1.0, 16.0):
        for share in (0.1, 0.2, 0.5):
            decay_steps = round(1000 * share)
            shape = wsd(warmup_steps=20, decay_steps=decay_steps, total_steps=1000)
            assert shape(1000 - decay_steps) == 1.0 and shape(1000) == 0.0
            ends[noise, share] = tuned(shape, steps=1000, noise=noise)
    assert ends[1.0, 0.1] < 1.05 * ends[1.0, 0.2] < ends[1.0, 0.5]
    assert ends[16.0, 0.5] < ends[16.0, 0.2] < ends[16.0, 0.1]
    assert 1.5 < ends[16.0, 0.1] / ends[16.0, 0.5] < 1.7


def test_notes_3_2_anytime():
    """One peak rate, runs of several lengths: undecayed, decayed, and a cosine tuned to each."""
    for steps in (300, 1000):
        stable = [warmup(warmup_steps=20)(t) for t in range(steps)]
        decayed = wsd(warmup_steps=20, decay_steps=steps // 5, total_steps=steps)
        assert [decayed(t) for t in range(steps * 4 // 5)] == stable[: steps * 4 // 5]
        assert stable[0] == 1 / 21 and stable[-1] == 1.0
        rates = torch.tensor([stable, [decayed(t) for t in range(steps)]], dtype=torch.float64)
        losses = expected_losses(0.7 * rates, CURVATURES, batch=4, noise=4.0)[:, -1].tolist()
        wave = warmup_cosine(warmup_steps=20, total_steps=steps)
        assert wave(20) == 1.0 and wave(steps) == 0.0
        annealed = tuned(wave, steps=steps, noise=4.0)
        constant = tuned(warmup(warmup_steps=20), steps=steps, noise=4.0)
        assert losses[0] > 1.2 * constant and losses[0] > 2 * annealed  # far from the best
        assert abs(losses[1] / annealed - 1) < 0.06
    assert losses[0] > 4.5 * losses[1]


def test_notes_3_2_code():
    ours = wsd(warmup_steps=10, decay_steps=20, total_steps=100, peak=0.3, end=0.03, start=0.0)
    for t in range(101):
        assert abs(ours(t) - printed_wsd(t, 100, 10, 20, 0.3, 0.03)) < 1e-12
    assert printed_wsd(103, 100, 10, 20, 0.3, 0.03) < 0 < 0.029 < ours(103) < 0.031
    with pytest.raises(ZeroDivisionError):
        printed_wsd(100, 100, 10, 0, 0.3)
    assert wsd(warmup_steps=10, decay_steps=0, total_steps=100, end=0.1)(100) == 0.1
    overlapping = [printed_wsd(t, 100, 50, 80, 1.0) for t in range(100)]
    assert overlapping[49] - overlapping[50] > 0.3 and max(overlapping) < 1.0
    assert refused(
        lambda: wsd(warmup_steps=50, decay_steps=80, total_steps=100),
        r"warmup_steps \+ decay_steps must not exceed total_steps",
    )


def test_notes_3_3_cosine():
    """As steep as pi / 2 lines in the middle, nearly level at both ends, and there at the end."""
    wave, line = cosine(total_steps=1000), linear(total_steps=1000)

    def slope(schedule: Schedule, t: int) -> float:
        return (schedule(t - 1) - schedule(t + 1)) / 2 * 1000

    assert abs(slope(wave, 500) / slope(line, 500) - math.pi / 2) < 1e-5
    assert abs(slope(line, 500) - 1) < 1e-9
    assert max(slope(wave, 20), slope(wave, 980)) < 0.1
    assert wave(1000) == 0.0 and wave(0) == line(0) == 1.0


def test_notes_3_3_wsd():
    """Until its decay it does not know when the run ends; a cosine knows from the peak on."""
    runs = [wsd(warmup_steps=5, decay_steps=n // 10, total_steps=n) for n in (100, 400)]
    waves = [warmup_cosine(warmup_steps=5, total_steps=n) for n in (100, 400)]
    assert [runs[0](t) for t in range(91)] == [runs[1](t) for t in range(91)]
    assert runs[0](0) == waves[0](0) == pytest.approx(1 / 6) and runs[0](90) == 1.0
    assert runs[0](95) == pytest.approx(0.5) and runs[1](400) == 0.0
    assert abs(waves[0](50) - waves[1](50)) > 0.4


def test_notes_3_3_linear():
    """The shape by hand; then ahead of the cosine in a short run and behind it in a long one."""
    shape = join(
        [linear(start=0.0, total_steps=4, end=1.0), linear(total_steps=10)], boundaries=[4]
    )
    assert [shape(t) for t in (0, 2, 4, 9, 14, 15)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    ratio = {}
    for steps in (300, 3000):
        line, wave = linear(total_steps=steps), cosine(total_steps=steps)
        assert line(0) == wave(0) == 1.0 and abs(wave(steps // 2) - 0.5) < 1e-12
        ratio[steps] = tuned(line, steps=steps, noise=4.0) / tuned(wave, steps=steps, noise=4.0)
    assert 0.95 < ratio[300] < 1.0 < 1.05 < ratio[3000] < 1.3


def test_notes_3_3_inverse_sqrt():
    """The transformer's own formula, which counts its steps from 1."""
    schedule = inverse_sqrt(warmup_steps=4000, start=0.0, peak=(512 * 4000) ** -0.5)
    for step in (1, 100, 3999, 4000, 4001, 16_000, 400_000):
        printed = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert schedule(step) == pytest.approx(printed, rel=1e-12)
    assert schedule(16_000) == pytest.approx(schedule(4000) / 2)
    assert schedule(10**6) > 0.9 * schedule(900_000)
