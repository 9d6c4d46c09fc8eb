"""What section 4 of the notes answers to its five questions, held to numbers."""

import math

import torch
from torch import Tensor
from torch.testing import assert_close

from lmlosses.lab.streaming import expected_losses
from lmlosses.losses import cross_entropy
from lmlosses.optim import Adam, AdamW, Lion
from lmlosses.schedules import constant, cosine, warmup_cosine, wsd

STREAM = torch.logspace(0, -3, 20, dtype=torch.float64)  # curvatures of a noisy regression


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradient(function, point: Tensor) -> Tensor:
    point = point.detach().requires_grad_()
    return torch.autograd.grad(function(point), point)[0]


def of_first(logits: Tensor) -> Tensor:
    """Cross-entropy of the first class."""
    return cross_entropy(logits, torch.zeros(logits.shape[:-1], dtype=torch.long))


def two_classes(p: float) -> Tensor:
    """Logits of a model that gives the target the probability p and another class the rest."""
    return f64(p, 1 - p).log()


def entropy_of(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def after(rule, start: Tensor, gradients: list[Tensor], **settings) -> Tensor:
    """Where an optimizer goes when it is fed these gradients."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = rule([parameter], **settings)
    for grad in gradients:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def held(rule, **settings) -> tuple[int, Tensor]:
    """Bytes of state per parameter after a step from 0 with gradient 1, and that step."""
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = rule([parameter], lr=0.1, **settings)
    parameter.grad = torch.ones(1000)
    optimizer.step()
    counted = sum(
        value.numel() * value.element_size()
        for name, value in optimizer.state[parameter].items()
        if name != "step"
    )
    return counted // 1000, parameter.detach()


def settled(rule, noise: Tensor, *, decay: float, steps: int = 800) -> Tensor:
    """Mean place of weights whose loss is (w - 1)^2 / 4, with a gradient noise of either sign."""
    parameter = torch.nn.Parameter(torch.full_like(noise, 0.5))
    optimizer = rule([parameter], lr=0.05, weight_decay=decay)
    total = torch.zeros_like(noise)
    for step in range(steps):
        parameter.grad = 0.5 * (parameter.detach() - 1) + noise * (-1) ** step
        optimizer.step()
        if step >= steps - 100:
            total += parameter.detach()
    return total / 100


def losses_at(rates: Tensor, *, noise: float = 64.0) -> Tensor:
    """Expected loss of SGD on a noisy regression, before the first step and after each."""
    return expected_losses(rates, STREAM, batch=16, noise=noise)


def test_notes_4_q1_gradient():
    """Probability minus one at the target, probability elsewhere; checked by differences."""
    logits = drawn(2, 5)
    targets = torch.tensor([3, 0])
    found = gradient(lambda z: cross_entropy(z, targets).sum(), logits)
    for row in range(2):
        weights = [math.exp(z) for z in logits[row].tolist()]
        for i in range(5):
            expected = weights[i] / sum(weights) - (1 if i == targets[row] else 0)
            assert abs(found[row, i].item() - expected) < 1e-12
            nudge = torch.zeros(2, 5, dtype=torch.float64)
            nudge[row, i] = 1e-6
            up, down = (cross_entropy(logits + s * nudge, targets).sum() for s in (1, -1))
            assert abs((up - down).item() / 2e-6 - expected) < 1e-8


def test_notes_4_q1_uncertain():
    """Least certain at one half; the gradient is twice as large for the certainly wrong."""
    size = {p: -gradient(of_first, two_classes(p))[0].item() for p in (1e-4, 0.5, 0.8, 0.99)}
    for p, value in size.items():
        assert abs(value - (1 - p)) < 1e-12
    # inside: as long as the target leads, uncertainty and gradient grow together
    assert entropy_of(0.5) > entropy_of(0.8) > entropy_of(0.99)
    assert size[0.5] > size[0.8] > size[0.99]
    # outside: nearly certain, of the wrong class
    assert entropy_of(1e-4) < 0.002 < 0.69 < entropy_of(0.5) and size[1e-4] > 1.99 * size[0.5]


def test_notes_4_q1_others():
    """The entry of a wrong class is its probability, so it grows with the belief in it."""
    pushes = [gradient(of_first, f64(0.0, belief, 0.0))[1].item() for belief in (-2.0, 0.0, 2.0)]
    expected = [math.exp(b) / (2 + math.exp(b)) for b in (-2.0, 0.0, 2.0)]
    assert_close(f64(*pushes), f64(*expected))
    assert pushes[0] < pushes[1] < pushes[2]


def test_notes_4_q2_coupled():
    """Adam with L2 is Adam on g + lambda w, step by step."""
    start, decay = drawn(4, seed=1), 0.3
    grads = [drawn(4, seed=seed) for seed in range(2, 8)]
    mean, square, w = torch.zeros(4).double(), torch.zeros(4).double(), start.clone()
    for t, grad in enumerate(grads, start=1):
        g = grad + decay * w
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        step = (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w - 0.01 * step
    assert_close(after(Adam, start, grads, lr=0.01, weight_decay=decay), w)


def test_notes_4_q2_diluted():
    """The pull of a step goes like one over the gradient's size; where it ends does not."""
    sizes = f64(0.1, 1.0, 10.0)
    grads = [sizes * (-1) ** step for step in range(200)]
    one = torch.ones(3, dtype=torch.float64)
    settings = {"lr": 1e-4, "eps": 1e-8}
    pulls = {
        rule: (
            after(rule, one, grads, weight_decay=0.0, **settings)
            - after(rule, one, grads, weight_decay=0.01, **settings)
        )
        / (200 * 1e-4 * 0.01)
        for rule in (Adam, AdamW)
    }
    assert_close(pulls[Adam], 1 / sizes, rtol=0.05, atol=0)  # weakened and strengthened
    assert_close(pulls[AdamW], one, rtol=0.05, atol=0)
    # outside: at rest, pull and gradient are scaled alike, and the end is that of plain L2
    ends = settled(Adam, f64(0.25, 1.0, 4.0), decay=0.5)
    assert_close(ends, torch.full((3,), 0.5).double(), rtol=0, atol=0.02)


def test_notes_4_q2_decoupled():
    """The decay takes the weight from before the step; after it, the step would shrink as well."""
    start, lr, decay = f64(2.0, -1.0), 0.1, 0.5
    grads = [f64(1.0, -3.0)]
    step = f64(1.0, -1.0)  # the first step of Adam has size 1
    found = after(AdamW, start, grads, lr=lr, weight_decay=decay, eps=0.0)
    assert_close(found, start - lr * step - lr * decay * start)
    printed = (1 - lr * decay) * (start - lr * step)
    assert_close(printed - found, lr * decay * lr * step)  # 0.005 here
    assert (printed - found).abs().min() > 0.004
    # inside: with the product of the two small, as in practice, nobody can tell
    usual = after(AdamW, start, grads, lr=3e-4, weight_decay=0.1, eps=0.0)
    assert ((1 - 3e-5) * (start - 3e-4 * step) - usual).abs().max() < 1e-8


def test_notes_4_q2_uniform():
    """One rate of shrinking for all; not one effect: the noisier the gradient, the smaller."""
    idle = after(AdamW, f64(2.0, -7.0), [f64(0.0, 0.0)] * 10, lr=0.1, weight_decay=0.5)
    assert_close(idle / f64(2.0, -7.0), torch.full((2,), 0.95**10).double())
    noise = f64(0.25, 1.0, 4.0)
    ends = settled(AdamW, noise, decay=0.5)
    assert_close(ends, 0.5 / (0.5 + 0.5 * noise), rtol=0, atol=0.04)
    # the penalized loss (w - 1)^2 / 4 + w^2 / 4 has its minimum at one half, for each weight
    coupled = settled(Adam, noise, decay=0.5)
    assert (coupled.max() - coupled.min()) < 0.03 and (ends.max() - ends.min()) > 0.5


def test_notes_4_q2_proved():
    """No theorem of better: where the penalized loss is the aim, the coupled form reaches it."""
    aim = lambda w: ((w - 1) ** 2 / 4 + w**2 / 4).sum().item()  # noqa: E731
    noise = f64(0.25, 1.0, 4.0)
    coupled, decoupled = settled(Adam, noise, decay=0.5), settled(AdamW, noise, decay=0.5)
    best = 3 / 8
    assert aim(coupled) < best + 0.001
    assert aim(decoupled) > best + 0.08
    # and the end of AdamW is the one that its own rule predicts, so it is no accident
    assert_close(decoupled, 1 / (1 + noise), rtol=0, atol=0.04)


def test_notes_4_q3_sharpness():
    """The odds of the hardest against the easiest negative are e to their gap over tau."""
    s = f64(0.7, 0.6, 0.2)
    for tau, odds in ((1.0, math.exp(0.4)), (0.1, math.exp(4.0)), (0.05, math.exp(8.0))):
        push = gradient(lambda s, tau=tau: of_first(s / tau), s)
        assert abs((push[1] / push[2]).item() / odds - 1) < 1e-9
        total = sum(math.exp(v / tau) for v in (0.7, 0.6, 0.2))
        assert abs(push[1].item() - math.exp(0.6 / tau) / total / tau) < 1e-9


def descent(tau: float, lr: float, steps: int = 60) -> Tensor:
    """Gaps of two queries that disagree about one pair of keys; the truth is a tie."""

    def loss(gap: Tensor) -> Tensor:
        scores = torch.stack([gap, -gap]) / (2 * tau)
        return (of_first(scores) + of_first(scores.flip(0))) / 2

    path = [f64(0.5).squeeze()]
    for _ in range(steps):
        path.append(path[-1] - lr * gradient(loss, path[-1]))
    return torch.stack(path)


def test_notes_4_q3_unstable():
    """The curvature grows like 1 / tau^2: a rate that was fine jumps to and fro; scaled, not."""
    warm = descent(1.0, 1.0)
    assert (warm.diff() < 0).all() and 0 < warm[-1] < 1e-6
    cold = descent(0.07, 1.0)
    assert cold[-20:].abs().max() > 6 and (cold[-20:-1] * cold[-19:] < 0).all()
    assert cold.diff().abs().max() <= 1 / (2 * 0.07)  # thrown about, but bounded
    # the same path in units of tau when the rate is scaled with its square
    start = 0.5 / 0.07
    scaled, gap = descent(0.07, 0.07**2) / 0.07, start
    for point in scaled[1:].tolist():
        gap -= (1 / (1 + math.exp(-gap)) - 0.5) / 1.0
        assert abs(gap - point) < 1e-9


def test_notes_4_q3_large():
    """All negatives alike, and less progress from a step of one size."""
    s = f64(0.3, 0.6, -0.5)
    gained = []
    for tau in (0.2, 5.0, 50.0):
        push = gradient(lambda s, tau=tau: of_first(s / tau), s)
        gained.append((push[0].abs() * tau).item())
        total = sum(math.exp(v / tau) for v in (0.3, 0.6, -0.5))
        assert abs(push[0].item() + (1 - math.exp(0.3 / tau) / total) / tau) < 1e-12
    assert abs(gained[2] - 2 / 3) < 0.01  # what a model that knows nothing would get
    flat = gradient(lambda s: of_first(s / 50.0), s)
    assert 1 < (flat[1] / flat[2]).item() < 1.03 and flat.abs().max() < 0.014


def test_notes_4_q3_sensitivity():
    """A lead of tau multiplies the odds by e, whatever tau."""
    for tau in (0.01, 0.07, 1.0):
        log_odds = [
            (math.log(math.expm1(of_first(f64(lead * tau, 0.0) / tau).item()))) for lead in (1, 3)
        ]
        assert_close(f64(*log_odds), f64(-1.0, -3.0))


def learned_scale(similar: Tensor, *, bound: float, steps: int = 150) -> float:
    """1 / tau after training its logarithm alone, from 1 / 0.07."""
    labels = torch.arange(len(similar))
    log_scale = torch.nn.Parameter(f64(math.log(1 / 0.07)).squeeze())
    optimizer = Adam([log_scale], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(similar * log_scale.exp(), labels).mean().backward()
        optimizer.step()
        log_scale.data.clamp_(max=math.log(bound))
    return log_scale.exp().item()


def test_notes_4_q3_learnable():
    """It adjusts itself if something is in the way; where all is separated it runs off."""
    assert abs(math.log(1 / 0.07) - 2.659) < 1e-3
    clean = torch.eye(4, dtype=torch.float64) * 0.05
    assert learned_scale(clean, bound=math.inf) > 150
    assert abs(learned_scale(clean, bound=100.0) - 100) < 1e-9
    # inside: one query in four with its key behind; the slope is zero at a finite scale
    mixed = clean.clone()
    mixed[0] = f64(0.0, 0.05, 0.0, 0.0)
    found = learned_scale(mixed, bound=math.inf)

    def mean_loss(scale: float) -> float:
        z = 1 + 3 * math.exp(-0.05 * scale)  # three rows; and the one whose key is behind
        behind = math.log(math.exp(0.05 * scale) + 3)
        return (3 * math.log(z) + behind) / 4

    grid = min((mean_loss(s / 10), s / 10) for s in range(10, 2000))[1]
    assert abs(found - grid) < 0.05 * grid and found < 60
    there = cross_entropy(mixed * found, torch.arange(4)).mean().item()
    assert abs(there - mean_loss(found)) < 1e-9


def test_notes_4_q4_one_moment():
    """One number per parameter is kept, two by Adam; and it is an average of gradients."""
    lion, moved = held(Lion)
    adam, _ = held(AdamW)
    assert (lion, adam) == (4, 8) and torch.equal(moved, torch.full((1000,), -0.1))
    parameter = torch.nn.Parameter(torch.zeros(2).double())
    optimizer = Lion([parameter])
    for grad in (f64(1.0, -2.0), f64(3.0, 0.0)):
        parameter.grad = grad
        optimizer.step()
    kept = [v for k, v in optimizer.state[parameter].items() if k != "step"]
    assert len(kept) == 1
    assert_close(kept[0], 0.99 * 0.01 * f64(1.0, -2.0) + 0.01 * f64(3.0, 0.0))


def test_notes_4_q4_one_third():
    """Half of the state; a third of weights and state; a quarter with the gradients."""
    (lion, by_lion), (adam, by_adam) = held(Lion), held(AdamW, weight_decay=0.0)
    assert_close(by_lion, by_adam, rtol=1e-5, atol=0)  # both moved by the rate, as they should
    assert_close(by_lion, torch.full((1000,), -0.1))
    assert 1 - lion / adam == 0.5  # of the state, of which the notes say a third
    assert abs(1 - (4 + lion) / (4 + adam) - 1 / 3) < 1e-12
    assert 1 - (8 + lion) / (8 + adam) == 0.25
    # 16-bit weights and gradients, master weights and state in 32 bits: the same quarter
    assert 1 - (2 + 2 + 4 + lion) / (2 + 2 + 4 + adam) == 0.25


def test_notes_4_q4_same_size():
    """Plus or minus the rate; unless a momentum is exactly zero, or there is decay."""
    start = f64(1.0, -4.0, 2.0, 3.0)
    grads = [f64(1e-9, -5.0, 1e6, 0.0)]
    moved = after(Lion, start, grads, lr=0.1) - start
    assert_close(moved, f64(-0.1, 0.1, -0.1, 0.0))
    decayed = after(Lion, start, grads, lr=0.1, weight_decay=0.5) - start
    assert_close(decayed, f64(-0.15, 0.3, -0.2, -0.15))


def test_notes_4_q4_normalization():
    """Rescaled gradients change no step; with equal betas it is the sign of a momentum."""
    grads = [drawn(6, seed=seed) for seed in range(20)]
    start = torch.zeros(6, dtype=torch.float64)
    plain = after(Lion, start, grads, lr=0.1)
    scales = f64(1e-4, 1.0, 7.0, 1e3, 1e6, 0.3)
    assert torch.equal(plain, after(Lion, start, [g * scales for g in grads], lr=0.1))
    mean, w = torch.zeros(6, dtype=torch.float64), start.clone()
    for grad in grads:
        mean = 0.9 * mean + 0.1 * grad
        w = w - 0.1 * mean.sign()
    assert_close(after(Lion, start, grads, lr=0.1, betas=(0.9, 0.9)), w)
    assert (plain - w).abs().max() > 0.15  # with its own betas it is something else


def alignment(truth: Tensor, batch: int) -> tuple[float, float, float]:
    """Cosine with the true gradient: of a step of Lion, of a raw one, of Lion's mean step."""
    noisy = truth + 10 * drawn(4000, len(truth)) / math.sqrt(batch)
    steps = -after(Lion, torch.zeros_like(noisy), [noisy], lr=1.0)
    cosine_with = lambda v: v @ truth / (v.norm(dim=-1) * truth.norm())  # noqa: E731
    return (
        cosine_with(steps).mean().item(),
        cosine_with(noisy).mean().item(),
        cosine_with(steps.mean(dim=0)).item(),
    )


def test_notes_4_q4_large_batch():
    """Signs are right more often; what they lose is less for even gradients, more for uneven."""
    even, uneven = f64(1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.0), f64(1.0, *7 * [0.1])
    small, large = alignment(even, 10), alignment(even, 100_000)
    assert 0 < small[0] < large[0] and small[0] / small[1] < 0.9 < 0.98 < large[0] / large[1]
    few, many = alignment(uneven, 10), alignment(uneven, 1_000_000)
    assert 0 < few[0] < many[0]
    assert few[0] / few[1] > 0.75 and many[0] / many[1] < 0.6
    # magnitudes survive in the mean of noisy signs and in no sign of a clean gradient
    assert few[2] > 0.98 and abs(many[2] - 1.7 / math.sqrt(8 * 1.07)) < 0.01


def test_notes_4_q4_cost():
    """Adam's step on pure noise is 0.23 of Lion's: the rate three to ten times smaller."""
    noise = [drawn(4000, seed=seed) for seed in range(40)]
    start = torch.zeros(4000, dtype=torch.float64)
    sizes = {}
    for rule, settings in ((AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.0}), (Lion, {})):
        last = after(rule, start, noise, lr=1.0, **settings)
        sizes[rule] = (
            last - after(rule, start, noise[:-1], lr=1.0, **settings)
        ).norm() / 4000**0.5
    assert abs(sizes[Lion].item() - 1) < 1e-9
    assert abs(sizes[AdamW].item() - math.sqrt(0.1 / 1.9)) < 0.01
    assert 3 < (sizes[Lion] / sizes[AdamW]).item() < 10
    # with a rate four times smaller, the same shrinking asks for a decay four times larger
    idle, one = [torch.zeros(1).double()], torch.ones(1).double()
    adamw = after(AdamW, one, idle, lr=4e-4, weight_decay=0.1)
    assert_close(after(Lion, one, idle, lr=1e-4, weight_decay=0.4), adamw)
    assert_close(adamw, f64(1 - 4e-5))


def test_notes_4_q5_cosine_falls():
    """From the peak on; the usual warmup climbs first, and a bare cosine formula climbs later."""
    rates = cosine(start=3e-4, end=3e-5, total_steps=100)(torch.arange(101))
    expected = [3e-5 + 0.5 * (3e-4 - 3e-5) * (1 + math.cos(math.pi * t / 100)) for t in range(101)]
    assert_close(rates, f64(*expected))
    assert (rates.diff() < 0).all()
    warmed = warmup_cosine(peak=3e-4, warmup_steps=10, total_steps=100)(torch.arange(101))
    assert (warmed[:11].diff() > 0).all() and (warmed[10:].diff() < 0).all()
    assert abs(warmed[10].item() - 3e-4) < 1e-12 and abs(warmed[55].item() - 1.5e-4) < 1e-12
    bare = [0.5 * (1 + math.cos(math.pi * t / 100)) for t in (100, 150)]
    assert bare[1] > bare[0]  # past the end the formula alone goes up again


def test_notes_4_q5_wsd_shape():
    """Up, level for most of the way, and down at the end."""
    schedule = wsd(warmup_steps=10, decay_steps=10, total_steps=100, peak=2.0)
    rates = schedule(torch.arange(101))
    assert (rates[:11].diff() > 0).all() and (rates[10:91] == 2.0).all()
    assert_close(rates[90:], 2.0 * (1 - torch.arange(11).double() / 10))


def test_notes_4_q5_anytime():
    """Usable to go on from, or to decay from; as it is, it has the noise of the peak rate."""
    steps = torch.arange(1000)
    stable = losses_at(constant(value=1.0)(steps))
    ends = []
    for stop in (400, 1000):
        run = losses_at(wsd(warmup_steps=0, decay_steps=100, total_steps=stop)(steps[:stop]))
        assert_close(run[: stop - 100], stable[: stop - 100])
        ends.append(run[-1].item())
    assert_close(f64(*ends), f64(1.1916, 0.6617), rtol=1e-3, atol=0)
    assert_close(stable[[400, 1000]], f64(6.7432, 6.2216), rtol=1e-3, atol=0)
    # what the stable phase has learned between is seen after a decay alone
    assert ends[1] < 0.56 * ends[0] and stable[1000] > 0.92 * stable[400]
    assert stable[1000] > 9 * ends[1]


def test_notes_4_q5_cosine_total():
    """The rate at step 500 depends on the total from the start; WSD's does not before its end."""
    short, long = (cosine(start=1.0, total_steps=n)(500) for n in (1000, 2000))
    assert abs(short - 0.5) < 1e-12 and abs(long - (1 + math.cos(math.pi / 4)) / 2) < 1e-12
    levels = [wsd(warmup_steps=0, decay_steps=100, total_steps=n)(500) for n in (1000, 2000)]
    assert levels == [1.0, 1.0]
    # stopped half way, a run planned for 2000 has lost to one planned for 1000
    steps = torch.arange(1000)
    planned, stopped = (
        losses_at(cosine(start=1.0, total_steps=n)(steps))[-1].item() for n in (1000, 2000)
    )
    assert abs(planned - 0.523) < 1e-3 and abs(stopped - 2.291) < 1e-3


def best_of(schedule, noise: float) -> float:
    """Least final loss over a grid of peaks, with the best of them inside."""
    peaks = torch.logspace(-1, 0.3, 27, dtype=torch.float64)
    ends = losses_at(peaks[:, None] * schedule(torch.arange(1000)), noise=noise)[:, -1]
    assert 0 < ends.argmin() < 26
    return ends.min().item()


def test_notes_4_q5_choice_cosine():
    """Cosine wins where noise is the limit, WSD where distance is: both at their best peaks."""
    by_cosine = cosine(total_steps=1000)
    by_wsd = wsd(warmup_steps=0, decay_steps=100, total_steps=1000)
    assert_close(best_of(by_cosine, 64.0), 0.326, rtol=0.01, atol=0)
    assert_close(best_of(by_wsd, 64.0), 0.662, rtol=0.01, atol=0)
    assert_close(best_of(by_cosine, 4.0), 0.156, rtol=0.02, atol=0)
    assert_close(best_of(by_wsd, 4.0), 0.0785, rtol=0.02, atol=0)
    # "uses each step": in the sum of rates WSD goes nearly twice as far
    total = [schedule(torch.arange(1000)).sum().item() for schedule in (by_cosine, by_wsd)]
    assert_close(f64(*total), f64(500.5, 950.5))


def test_notes_4_q5_choice_wsd():
    """A longer run has the shorter one's stable phase in it, to the bit; cosine's ends at zero."""
    one, two = (
        wsd(warmup_steps=5, decay_steps=20, total_steps=n, peak=0.5)(torch.arange(n))
        for n in (100, 200)
    )
    assert torch.equal(one[:80], two[:80]) and two[80:180].min() == 0.5
    from_checkpoint = losses_at(torch.cat([one[:80], two[80:]]))
    assert from_checkpoint[-1] == losses_at(two)[-1]
    ended = cosine(start=0.5, total_steps=100)
    assert ended(100) == 0.0 and abs(ended(50) - 0.25) < 1e-12  # to go on, it must be warmed up
    gone_on = losses_at(ended(torch.arange(200)))
    assert gone_on[100] == gone_on[-1]
