"""What textbook subsections 4.6.5 and 4.6.6 say, held to numbers: the losses compared."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from lmlosses.analysis.curvature import hessian
from lmlosses.analysis.dynamics import best_lr, distance_rate, gradient_descent_on_quadratic
from lmlosses.analysis.landscape import convexity_gap
from lmlosses.lab.alignment import minimize
from lmlosses.lab.models import scaled_dot_product_attention
from lmlosses.lab.streaming import expected_losses
from lmlosses.lab.training import gradient_descent
from lmlosses.losses import cross_entropy, squared_error
from lmlosses.losses.policy import ppo_clip_loss
from lmlosses.losses.preference import dpo_loss
from lmlosses.losses.reward import (
    bradley_terry_loss,
    kl_regularized_objective,
    optimal_policy,
)
from lmlosses.optim.adam import Adam
from lmlosses.optim.groups import layerwise_groups
from lmlosses.optim.sgd import SGD
from lmlosses.schedules import wsd

Loss = Callable[[Tensor], Tensor]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def slope(loss: Loss, at: Tensor) -> Tensor:
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(at).sum(), at)[0]


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def gap_halfway(loss: Loss, start: Tensor, end: Tensor) -> float:
    """How far the loss lies below the middle of its chord."""
    point = start.clone()
    gaps = convexity_gap(lambda: loss(point), [point], [start], [end], f64(0.5))
    assert gaps.shape == (1,)
    return gaps.item()


def curvature(loss: Loss, at: Tensor) -> Tensor:
    at = at.detach().clone().requires_grad_()
    return hessian(lambda: loss(at), [at])


def two(margin: Tensor) -> Tensor:
    """Logits of two classes, the first of which leads by the margin."""
    return torch.stack([margin, torch.zeros_like(margin)], dim=-1)


def first(margin: Tensor) -> Tensor:
    return torch.zeros(margin.shape, dtype=torch.long)


def behind_softmax(margin: Tensor) -> Tensor:
    """Squared error of two probabilities against the one-hot vector of the first class."""
    one_hot = f64(1.0, 0.0).expand(*margin.shape, 2)
    return squared_error(two(margin).softmax(-1), one_hot).sum(-1)


def surprise(margin: Tensor) -> Tensor:
    return cross_entropy(two(margin), first(margin))


def value(logits: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The objective of RLHF for a policy of two or more answers and an even reference."""
    even = torch.full_like(rewards, -math.log(rewards.shape[-1]))
    return kl_regularized_objective(
        logits.log_softmax(-1), even.expand_as(logits), rewards.expand_as(logits), beta=beta
    )


def steps_until(loss: Loss, start: Tensor, lr: float, target: float, limit: int = 300) -> int:
    """Steps of descent until the loss is at most the target; the limit if it never is."""
    path = gradient_descent(lambda v: loss(v).sum(), start, lr=lr, steps=limit)
    below = [step for step, point in enumerate(path) if loss(point).sum() <= target]
    return below[0] if below else limit


# ---- the table: squared error


def test_table_4_6_5_mse_convexity():
    """Convex in the output, by hand; not behind a sigmoid, not in the product of two weights."""
    one = f64(1.0)
    by_output = lambda w: squared_error(w, one).sum()  # noqa: E731
    assert abs(gap_halfway(by_output, f64(0.0), f64(2.0)) - 1) < 1e-12
    squashed = lambda z: squared_error(z.sigmoid(), one).sum()  # noqa: E731
    expected = ((1 - sigma(-8)) ** 2 + 0.25) / 2 - (1 - sigma(-4)) ** 2
    assert abs(gap_halfway(squashed, f64(-8.0), f64(0.0)) - expected) < 1e-12 and expected < -0.3
    layers = lambda w: squared_error(w[:1] * w[1:], one).sum()  # noqa: E731
    assert abs(gap_halfway(layers, f64(1.0, 1.0), f64(-1.0, -1.0)) + 1) < 1e-12


def test_table_4_6_5_mse_saturation():
    """Wrong by 10 the slope is -20 on the output itself and -0.00009 behind a sigmoid."""
    at = f64(-1.0, -10.0)
    assert_close(slope(lambda z: squared_error(z, f64(0.0, 0.0)), at), 2 * at)
    behind = slope(lambda z: squared_error(z.sigmoid(), f64(1.0, 1.0)), at)
    by_hand = [2 * (sigma(z) - 1) * sigma(z) * sigma(-z) for z in (-1.0, -10.0)]
    assert_close(behind, f64(*by_hand))
    assert -1e-4 < behind[1] < 0 < -0.2 - behind[0]


def test_table_4_6_5_mse_stability():
    """In float16 a square overflows from an error of 256 on; in float32 that is far off."""
    error = torch.tensor([255.0, 256.0, 1000.0], dtype=torch.float16)
    assert (error * error).isfinite().tolist() == [True, False, False]
    library = squared_error(error, torch.zeros_like(error))  # computed in float32
    assert library.tolist() == [255.0**2, 256.0**2, 1e6]
    for large in (1e19, 3e19):
        square = squared_error(torch.tensor([large]), torch.zeros(1))
        assert square.isfinite().item() == (large**2 < 3.4e38)
    # a target that is off pulls as hard as it is far off: nothing bounds the gradient
    assert_close(slope(lambda z: squared_error(z, f64(0.0)), f64(1e4)), f64(2e4))


def test_table_4_6_5_mse_difficulty():
    """One step or thousands: the condition decides. Behind a softmax no rate of descent helps."""
    for condition, needed in ((1.0, 1), (1000.0, 3450)):
        features = f64(1.0, math.sqrt(condition)).diag()
        loss = lambda w, x=features: squared_error(x @ w, f64(0.0, 0.0)).sum() / 2  # noqa: E731
        lr = 2 / (1 + condition)
        path = gradient_descent(loss, f64(1.0, 1.0), lr=lr, steps=40)
        rate = distance_rate(lr=lr, smoothness=condition, strong_convexity=1.0)
        assert_close(path[-1].norm() / path[0].norm(), f64(rate**40)[0], atol=1e-12, rtol=1e-6)
        steps = 1 if rate < 1e-9 else math.ceil(math.log(1e-3) / math.log(rate))
        assert abs(steps - needed) < 10
    start = f64(-12.0)
    assert steps_until(behind_softmax, start, lr=1.0, target=0.1) == 300
    assert steps_until(surprise, start, lr=1.0, target=0.1) < 40


# ---- the table: cross-entropy


def test_table_4_6_5_cross_entropy_convexity():
    """Convex in the logits, whose Hessian is a covariance; not in two layers of weights."""
    target = torch.tensor(0)
    loss = lambda z: cross_entropy(z, target)  # noqa: E731
    expected = (math.log(1 + math.exp(4)) + math.log(1 + math.exp(-4))) / 2 - math.log(2)
    assert abs(gap_halfway(loss, f64(-4.0, 0.0), f64(4.0, 0.0)) - expected) < 1e-12
    for seed in range(5):
        assert gap_halfway(loss, 3 * noise(5, seed=seed), 3 * noise(5, seed=seed + 50)) >= -1e-12
    layers = lambda w: cross_entropy(torch.stack([w[0] * w[1], 0 * w[0]]), target)  # noqa: E731
    bent = math.log(1 + math.exp(-4)) - math.log(2)
    assert abs(gap_halfway(layers, f64(2.0, 2.0), f64(-2.0, -2.0)) - bent) < 1e-12


def test_table_4_6_5_cross_entropy_saturation():
    """In the logit the slope tends to -1 where the answer is wrong and to 0 where it is right."""
    margins = f64(-20.0, -10.0, -1.0, 10.0)
    found = slope(surprise, margins)
    assert_close(found, f64(*(sigma(m) - 1 for m in margins.tolist())))
    assert found[0] < -0.999999 and found[1] < -0.9999 and -1e-4 < found[3] < 0


def test_table_4_6_5_cross_entropy_stability():
    """Softmax, then log: infinite at a margin of 104 in float32 and 17.4 in float16."""
    for dtype, margin in ((torch.float16, 17.5), (torch.float32, 104.0), (torch.float64, 746.0)):
        logits = torch.tensor([0.0, margin], dtype=dtype)
        assert (-logits.softmax(-1)[0].log()).item() == math.inf
        assert abs(cross_entropy(logits, torch.tensor(0)).item() - margin) < 1e-5
        before = torch.tensor([0.0, 0.95 * margin], dtype=dtype)
        assert before.softmax(-1)[0].log().isfinite()


def test_table_4_6_5_cross_entropy_difficulty():
    """Harder than squared error, says the table; easier, says the text below it. Both happen."""
    x = torch.cat([noise(20, 2) + 1, noise(20, 2, seed=1) - 1])
    y = torch.arange(2).repeat_interleave(20)
    signs = 1.0 - 2 * y.double()

    def by_class(w: Tensor) -> Tensor:
        return cross_entropy(two(x @ w), y).mean()

    def by_output(w: Tensor) -> Tensor:
        return squared_error(x @ w, signs).mean()

    def by_probability(w: Tensor) -> Tensor:
        return squared_error((x @ w).sigmoid(), (1 - y).double()).mean()

    steps = {}
    for name, loss in (("ce", by_class), ("output", by_output), ("probability", by_probability)):
        start = f64(-4.0, -4.0)
        least = loss(minimize(loss, f64(0.5, 0.5), steps=30)).item()
        assert 0 <= least < 0.6
        target = least + 0.1 * (loss(f64(0.0, 0.0)).item() - least)
        largest = curvature(loss, f64(0.0, 0.0)).diagonal().sum().item()
        steps[name] = steps_until(loss, start, lr=1 / largest, target=target, limit=80)
    assert steps["output"] < steps["ce"] < steps["probability"]
    assert_close(surprise(f64(-3.0)), f64(math.log1p(math.exp(3))))
    assert squared_error(f64(3.0), f64(1.0)).item() == 4


# ---- the table: InfoNCE


def contrast(similarities: Tensor, temperature: float) -> Tensor:
    at = torch.arange(len(similarities))
    return cross_entropy(similarities / temperature, at).mean()


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    return F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T


def test_table_4_6_5_infonce_convexity():
    """A cross-entropy: convex in the similarities. Not in queries and keys together."""
    for seed in range(5):
        ends = noise(4, 4, seed=seed), noise(4, 4, seed=seed + 30)
        assert gap_halfway(lambda s: contrast(s, 0.1), *ends) >= -1e-12
    ends = 2 * torch.eye(2).double(), -2 * torch.eye(2).double()
    between = math.log(2) - math.log(1 + math.exp(-4))
    both = lambda q: contrast(q @ q.T, 1.0)  # noqa: E731
    assert abs(gap_halfway(both, *ends) + between) < 1e-12  # the middle is the worse


def test_table_4_6_5_infonce_saturation():
    """None in the score. Through a cosine it is gone where the query is opposite to its key."""
    assert_close(slope(surprise, f64(-20.0)), f64(-1.0), atol=1e-8, rtol=0)

    def of_angle(angle: Tensor) -> Tensor:
        return cross_entropy(two(2 * angle.cos() / 0.1), first(angle))

    angles = f64(math.pi / 2, 2.0, 3.0, math.pi)
    found = slope(of_angle, angles)
    by_hand = [2 * math.sin(a) / 0.1 * sigma(-20 * math.cos(a)) for a in angles.tolist()]
    assert_close(found, f64(*by_hand), atol=1e-9, rtol=1e-9)
    assert of_angle(angles)[3] > 19.9 and abs(found[3]) < 1e-12 < found[0]


def test_table_4_6_5_infonce_stability():
    """The naive form ends at a temperature of 1/11.1 in float16 and 1/88.7 in float32."""
    for dtype, works, breaks in (
        (torch.float16, 0.1, 0.07),
        (torch.float32, 0.012, 0.01),
    ):
        for temperature in (works, breaks):
            scores = torch.tensor([0.0, 1 / temperature], dtype=dtype)
            naive = -(scores.exp()[0] / scores.exp().sum()).log()
            assert naive.isfinite().item() == (temperature == works)
            exact = scores[1].double().item() + math.log1p(math.exp(-scores[1].item()))
            assert abs(cross_entropy(scores, torch.tensor(0)).item() - exact) < 1e-4


def test_table_4_6_5_infonce_difficulty():
    """Rates a hundred times apart learn, and a huge one stays finite; not so squared error."""
    keys = torch.eye(3).double()
    start = noise(3, 3)
    loss = lambda q: contrast(cosines(q, keys), 0.1)  # noqa: E731
    for lr, most in ((0.1, 0.05), (10.0, 0.05), (1000.0, 1.0)):
        end = gradient_descent(loss, start, lr=lr, steps=120)[-1]
        assert end.isfinite().all() and 0 < loss(end) < most, lr
    least = math.log1p(2 * math.exp(-10))  # on the keys themselves; between them it is less
    assert abs(loss(keys).item() - least) < 1e-9
    squares = lambda q: squared_error(q, keys).sum()  # noqa: E731
    assert squares(gradient_descent(squares, start, lr=0.4, steps=50)[-1]) < 1e-6
    assert squares(gradient_descent(squares, start, lr=1.1, steps=50)[-1]) > 1e4


# ---- the table: RLHF


def test_table_4_6_5_rlhf_convexity():
    """Convex in the probabilities, in rewards, in DPO's logits; not in the policy's logits."""
    rewards = f64(1.0, 0.0)

    def of_probability(p: Tensor) -> Tensor:
        logps = torch.cat([p, 1 - p]).log()
        return -kl_regularized_objective(logps, f64(0.5, 0.5).log(), rewards, beta=0.5)

    entropy = lambda p: -p * math.log(p) - (1 - p) * math.log(1 - p)  # noqa: E731
    bent = 0.5 * (entropy(0.5) - (entropy(0.2) + entropy(0.8)) / 2)
    assert abs(gap_halfway(of_probability, f64(0.2), f64(0.8)) - bent) < 1e-12
    of_logit = lambda z: -value(two(z[0]), rewards, 0.01)  # noqa: E731
    assert gap_halfway(of_logit, f64(-8.0), f64(0.0)) < -0.2
    soft = lambda m: math.log1p(math.exp(-m))  # noqa: E731
    lead = lambda r: bradley_terry_loss(r[0], r[1])  # noqa: E731
    expected = (soft(-3) + soft(3)) / 2 - soft(0)
    assert abs(gap_halfway(lead, f64(0.0, 3.0), f64(3.0, 0.0)) - expected) < 1e-12

    def pair(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(-1)
        reference = f64(0.5)[0].log()
        return dpo_loss(logps[0], logps[1], reference, reference, beta=1.0)

    assert abs(gap_halfway(pair, f64(0.0, 3.0, 1.0), f64(3.0, 0.0, 1.0)) - expected) < 1e-12


def test_table_4_6_5_rlhf_saturation():
    """A policy that is surely wrong hardly moves; a reward model that is, does."""
    at = f64(-10.0)
    p = sigma(-10.0)
    found = slope(lambda z: -value(two(z), f64(1.0, 0.0), 0.1), at)
    assert_close(found, f64(-p * (1 - p) * (1 + 0.1 * 10)))
    assert abs(found.item()) < 1e-4
    zero, one = f64(0.0), f64(1.0)
    assert_close(slope(lambda r: bradley_terry_loss(r, zero), at), f64(-(1 - p)))
    assert_close(slope(lambda h: ppo_clip_loss(h, zero, one), f64(-10.0)), f64(-math.exp(-10)))
    assert slope(lambda h: ppo_clip_loss(h, zero, one), f64(0.3)).item() == 0  # beyond its range


def test_table_4_6_5_rlhf_stability():
    """Every naive piece breaks in float32, and each has a stable form."""
    # a ratio of the probabilities of two answers of 120 nats: zero over zero
    logp = torch.tensor([-120.0])
    assert (logp.exp() / logp.exp()).isnan().all()
    loss = dpo_loss(logp + 2, logp, logp, logp, beta=0.5)
    assert_close(loss, torch.tensor([math.log1p(math.exp(-1))]))
    # the logarithm of a sigmoid
    assert torch.tensor([-100.0]).sigmoid().log().item() == -math.inf
    assert_close(bradley_terry_loss(-logp.abs(), torch.zeros(1)), torch.tensor([120.0]))
    # a ratio that overflows, where its clip should have held it
    ratio = torch.tensor([90.0])
    assert ratio.exp().item() == math.inf
    held = ppo_clip_loss(ratio, torch.zeros(1), torch.ones(1))
    assert_close(held, torch.tensor([-1.2]))
    pushed = ppo_clip_loss(ratio, torch.zeros(1), -torch.ones(1))
    assert 1e8 < pushed.item() < math.inf


def test_table_4_6_5_rlhf_difficulty():
    """Known answers: a formula gives the best policy. By gradient from a wrong one: no progress."""  # noqa: E501
    rewards, beta = f64(1.0, 0.0), 0.5
    even = f64(0.5, 0.5).log()
    best = optimal_policy(even, rewards, beta=beta)
    assert_close(best[0] - best[1], f64(2.0)[0])
    top = kl_regularized_objective(best, even, rewards, beta=beta)
    partition = beta * math.log((math.exp(2) + 1) / 2)
    assert abs(top.item() - partition) < 1e-12
    by_gradient = lambda z: -value(two(z), rewards, beta)  # noqa: E731
    wrong = by_gradient(f64(-20.0)).item()
    assert -0.01 < wrong - beta * math.log(2) < 0.01
    assert steps_until(by_gradient, f64(-20.0), 4.0, -0.9 * partition, limit=200) == 200
    assert steps_until(by_gradient, f64(0.0), 4.0, -0.9 * partition, limit=200) < 10
    reward_model = lambda r: bradley_terry_loss(r, f64(0.0))  # noqa: E731
    assert steps_until(reward_model, f64(-20.0), 4.0, 0.1, limit=200) < 20
    assert_close(reward_model(f64(-3.0)), f64(math.log1p(math.exp(3))))


# ---- the prose below the table


def test_claim_4_6_mse_constant_hessian():
    """2 X^T X / N at every weight; in two layers another at every point, and not positive."""
    x, y = noise(7, 3), noise(7, seed=1)
    loss = lambda w: squared_error(x @ w, y).mean()  # noqa: E731
    for seed in (2, 3):
        assert_close(curvature(loss, 5 * noise(3, seed=seed)), 2 * x.T @ x / 7)
    layers = lambda w: squared_error(w[0] * w[1], f64(1.0)[0])  # noqa: E731
    for point in (f64(0.0, 0.0), f64(1.0, 1.0), f64(2.0, -1.0)):
        u, v = point.tolist()
        by_hand = f64(2 * v * v, 4 * u * v - 2, 4 * u * v - 2, 2 * u * u).view(2, 2)
        assert_close(curvature(layers, point), by_hand)
    assert torch.linalg.eigvalsh(curvature(layers, f64(0.0, 0.0)))[0] < -1.9
    flat = curvature(lambda w: squared_error(x[:2] @ w, y[:2]).mean(), f64(0.0, 0.0, 0.0))
    assert torch.linalg.eigvalsh(flat)[0].abs() < 1e-10  # convex, but not strongly


def test_claim_4_6_mse_saturation_classification():
    """Without a squashing output nothing saturates, and the classifier is learned."""
    x = torch.cat([noise(20, 2) + 2, noise(20, 2, seed=1) - 2])
    y = torch.ones(40).double()
    y[20:] = 0
    plain = lambda w: squared_error(x @ w + 0.5, y).mean()  # noqa: E731
    squashed = lambda w: squared_error((x @ w).sigmoid(), y).mean()  # noqa: E731
    start = f64(-6.0, -6.0)  # sure and wrong
    learned = gradient_descent(plain, start, lr=0.08, steps=60)[-1]
    right = ((x @ learned + 0.5 > 0.5) == (y > 0.5)).double().mean()
    assert right > 0.95 and 0 < plain(learned) < 0.2
    stuck = gradient_descent(squashed, start, lr=0.08, steps=60)[-1]
    wrong = ((x @ stuck > 0) == (y > 0.5)).double().mean()
    assert wrong < 0.1 and squashed(stuck) > 0.9
    assert squared_error(f64(0.5), f64(2.0)).item() == 2.25


def test_claim_4_6_ce_hessian_predictions():
    """diag(p) - p p^T: known once the predictions are, whatever the label."""
    for seed in range(3):
        logits = 2 * noise(4, seed=seed)
        p = logits.exp() / logits.exp().sum()
        for label in (0, 3):
            target = torch.tensor(label)
            found = curvature(lambda z, t=target: cross_entropy(z, t), logits)
            assert_close(found, p.diag() - torch.outer(p, p))


def test_claim_4_6_ce_easier_than_mse():
    """Easier where both are behind a softmax; against squared error of the output, not."""
    start, lr = f64(-8.0), 1.0
    behind = steps_until(behind_softmax, start, lr, target=0.1)
    through = steps_until(surprise, start, lr, target=0.1)
    assert_close(surprise(start), f64(math.log1p(math.exp(8))))
    plain = steps_until(lambda z: squared_error(z, f64(1.0)), start, lr=0.4, target=0.01)
    assert plain < through < behind == 300


def test_claim_4_6_infonce_local_minima():
    """Not convex, and every start ends at one value; two layers give cross-entropy the same."""

    def loss(v: Tensor) -> Tensor:
        return contrast(cosines(v[0], v[1]), 0.5)

    ends = []
    for seed in range(3):
        start = noise(2, 3, 2, seed=seed)
        assert torch.linalg.eigvalsh(curvature(loss, start))[0] < -1e-3
        ends.append(loss(minimize(loss, start, steps=40)).item())
    # three pairs in the plane: each on its own corner of a triangle
    best = math.log1p(2 * math.exp(-1.5 / 0.5))
    assert max(abs(end - best) for end in ends) < 1e-6


def test_claim_4_6_infonce_knobs():
    """A tenth of the temperature: a hundred times the curvature. More keys: a higher floor."""
    for temperature in (1.0, 0.1):
        function = lambda s, t=temperature: contrast(s, t)  # noqa: E731
        found = curvature(function, torch.zeros(2, 2, dtype=torch.float64))
        assert_close(torch.linalg.eigvalsh(found)[-1], f64(0.25 / temperature**2)[0])
    similarities = f64(0.5, 0.4, 0.0, -0.4)  # the key, a hard negative, two easy ones
    for temperature, low, high in ((3.0, 0.3, 0.45), (0.05, 0.99, 1.0)):
        function = lambda s, t=temperature: cross_entropy(s / t, torch.tensor(0))  # noqa: E731
        pulls = slope(function, similarities)[1:]
        assert low < pulls[0] / pulls.sum() < high
    for negatives in (1, 63):
        perfect = torch.full((negatives + 1,), -1.0, dtype=torch.float64)
        perfect[0] = 1
        floor = cross_entropy(perfect / 0.5, torch.tensor(0)).item()
        assert abs(floor - math.log1p(negatives * math.exp(-4))) < 1e-9


def test_claim_4_6_reward_error():
    """It arrives, multiplied; but a fixed error leaves the objective as smooth as it was."""
    even = torch.full((3,), -math.log(3), dtype=torch.float64)
    true, judged, beta = f64(1.0, 0.0, 0.0), f64(1.0, 0.0, 1.5), 0.2
    good, misled = (optimal_policy(even, r, beta=beta) for r in (true, judged))
    assert_close((misled - good)[2] - (misled - good)[1], f64(1.5 / beta)[0])  # odds times e^7.5
    lost = [
        kl_regularized_objective(policy, even, true, beta=beta).item() for policy in (good, misled)
    ]
    kl = (misled.exp() * (misled - good)).sum().item()
    assert abs(lost[0] - lost[1] - beta * kl) < 1e-9 and 0.5 < lost[0] - lost[1] < 2 * 1.5
    run = lambda z: -value(z, judged, beta)  # noqa: E731
    path = gradient_descent(run, torch.zeros(3, dtype=torch.float64), lr=1.0, steps=60)
    values = torch.stack([run(z) for z in path])
    assert (values.diff() <= 1e-12).all()  # never a step up, all the way to the wrong policy
    assert path[-1].softmax(-1)[2] > 0.8 > 0.2 > path[-1].softmax(-1)[0]


def test_claim_4_6_kl_complexity():
    """With the KL term the best policy is known and approached geometrically; without, 1 / t."""
    rewards = f64(1.0, 0.0)
    best = optimal_policy(f64(0.5, 0.5).log(), rewards, beta=0.5)
    top = value(best, rewards, 0.5).item()
    assert abs(top - 0.5 * math.log((math.exp(2) + 1) / 2)) < 1e-12
    short = {}
    for beta, least in ((0.5, top), (1e-9, 1.0)):
        run = lambda z, b=beta: -value(two(z[0]), rewards, b)  # noqa: E731
        path = gradient_descent(run, f64(0.0), lr=4.0, steps=120)
        short[beta] = [least + run(path[step]).item() for step in (30, 60, 120)]
    assert short[0.5][2] < 1e-10
    for before, after in zip(short[1e-9], short[1e-9][1:], strict=False):
        assert 1.8 < before / after < 2.3  # twice the steps, half the distance
    assert short[1e-9][2] > 1e-3


def test_claim_4_6_mse_rate_insensitive():
    """A hair beyond 2 / L squared error is lost; cross-entropy still learns at thrice its 2 / L."""  # noqa: E501
    x = torch.cat([noise(20, 2) + 2, noise(20, 2, seed=1) - 2])
    y = torch.arange(2).repeat_interleave(20)
    signs = 1.0 - 2 * y.double()
    squares = lambda w: squared_error(x @ w, signs).mean()  # noqa: E731
    nats = lambda w: cross_entropy(two(x @ w), y).mean()  # noqa: E731
    start = f64(0.0, 0.0)
    ends = {}
    for name, loss in (("squares", squares), ("nats", nats)):
        # the curvature is largest at zero for both
        largest = torch.linalg.eigvalsh(x.T @ x / 40)[-1].item() * (2 if loss is squares else 0.25)
        for factor in (0.9, 1.1, 3.0):
            end = gradient_descent(loss, start, lr=factor * 2 / largest, steps=60)[-1]
            ends[name, factor] = loss(end).item()
    assert 0.05 < ends["squares", 0.9] < 0.5 and ends["squares", 1.1] > 1e3
    assert 0 < ends["nats", 0.9] < 0.1 and 0 < ends["nats", 3.0] < 0.1
    assert nats(start).item() > 0.69 and squares(start).item() == 1


def test_claim_4_6_mse_best_rate():
    """2 / (mu + L) wins on a linear model; in two layers the curvature it needs changes."""
    curvatures = f64(1.0, 4.0, 9.0)
    loss = lambda w: squared_error(curvatures.sqrt() * w, torch.zeros(3).double()).sum() / 2  # noqa: E731  # noqa: E501
    start = f64(1.0, 1.0, 1.0)
    lr = best_lr(smoothness=9.0, strong_convexity=1.0)
    assert abs(lr - 0.2) < 1e-12
    left = [loss(gradient_descent(loss, start, lr=r, steps=200)[-1]) for r in (0.18, lr, 0.22)]
    assert left[1] < 0.2 * left[0] and left[1] < 0.2 * left[2]
    exact = (0.8**400 * (1 + 9) + 0.2**400 * 4) / 2
    assert abs(left[1] / exact - 1) < 1e-6
    layers = lambda w: squared_error(w[0] * w[1], f64(1.0)[0])  # noqa: E731
    tops = [torch.linalg.eigvalsh(curvature(layers, p))[-1] for p in (f64(1, 1), f64(4, 0.25))]
    assert tops[1] > 8 * tops[0] > 0
    without = lambda w: squared_error(w[:1], f64(0.0)).sum()  # noqa: E731
    assert torch.linalg.eigvalsh(curvature(without, f64(1.0, 1.0)))[0] == 0  # no mu at all


def test_claim_4_6_mse_large_rates():
    """On one weight: at 1.05 times 2 / L the error grows by a tenth a step, for ever."""
    largest = 4.0
    loss = lambda w: squared_error(math.sqrt(largest / 2) * w, f64(0.0)).sum()  # noqa: E731
    lr = 1.05 * 2 / largest
    path = gradient_descent(loss, f64(1.0), lr=lr, steps=50)
    assert_close(path[-1].abs(), f64(1.1**50))
    exact = gradient_descent_on_quadratic(
        f64(largest).view(1, 1), f64(1.0), torch.tensor([50]), lr=lr
    )
    assert_close(exact[0], path[-1])
    bound = distance_rate(lr=lr, smoothness=largest, strong_convexity=largest)
    assert abs(bound - 1.1) < 1e-12
    below = gradient_descent(loss, f64(1.0), lr=0.95 * 2 / largest, steps=50)
    assert_close(below[-1].abs(), f64(0.9**50))


def test_claim_4_6_ce_rate_by_stage():
    """On data that can be told apart, the largest stable step grows as the model gets surer."""
    x = f64(1.0, 2.0, -1.0, -2.0)
    y = torch.tensor([0, 0, 1, 1])
    loss = lambda w: cross_entropy(two(x * w), y).mean()  # noqa: E731
    path = gradient_descent(loss, f64(0.0), lr=1.0, steps=100)
    limits = [2 / curvature(loss, path[step]).item() for step in (0, 10, 100)]
    for step, limit in zip((0, 10, 100), limits, strict=True):
        w = path[step].item()
        by_hand = sum(v * v * sigma(v * w) * sigma(-v * w) for v in x.tolist()) / 4
        assert abs(limit * by_hand / 2 - 1) < 1e-9
    assert 2.5 * limits[0] < limits[1] and 5 * limits[1] < limits[2]


def adam_path(scale: float, lr: float, steps: int, decay: bool = False) -> list[float]:
    """Adam on scale times the square of one weight, from 1."""
    weight = torch.nn.Parameter(f64(1.0))
    optimizer = Adam([weight], lr=lr)
    path = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) if decay else lr
        optimizer.zero_grad()
        (scale * squared_error(weight, f64(0.0))).sum().backward()
        optimizer.step()
        path.append(weight.item())
    return path


def test_claim_4_6_adam_relieves():
    """A loss a thousand times as steep takes the same path; but a step stays a rate long."""
    gentle, steep = adam_path(1.0, 0.1, 20), adam_path(1000.0, 0.1, 20)
    assert max(abs(a - b) for a, b in zip(gentle, steep, strict=True)) < 1e-6
    assert abs(gentle[0] - 0.9) < 1e-6
    # the rate itself is still to be chosen: a hundred times smaller is a hundred times slower,
    # and a hundred times larger overshoots a hundred times as far
    assert adam_path(1.0, 0.001, 100)[-1] > 0.85
    assert max(abs(w) for w in adam_path(1.0, 10.0, 10)) > 8.9
    assert abs(sum(adam_path(1.0, 0.1, 20)[:3]) - (0.9 + 0.8004 + 0.7015)) < 2e-3


def test_claim_4_6_llm_rate_sensitive():
    """A two-layer model of pairs of tokens: Adam learns at rates a factor of thirty apart."""
    tokens = torch.arange(8)
    follow = (3 * tokens + 1) % 8
    ends = {}
    for lr in (1e-4, 0.01, 0.3, 30.0):
        table = torch.nn.Parameter(noise(8, 8) * 0.3)
        output = torch.nn.Parameter(noise(8, 8, seed=1) * 0.3)
        optimizer = Adam([table, output], lr=lr)
        for _ in range(60):
            optimizer.zero_grad()
            loss = cross_entropy(table.tanh() @ output, follow).mean()
            loss.backward()
            optimizer.step()
        ends[lr] = cross_entropy(table.tanh() @ output, follow).mean().item()
    start = cross_entropy((noise(8, 8) * 0.3).tanh() @ (noise(8, 8, seed=1) * 0.3), follow).mean()
    assert abs(start.item() - math.log(8)) < 0.3
    assert ends[1e-4] > 1.9  # too slow
    assert 0 <= ends[0.3] < 0.5 and 0 <= ends[0.01] < 1.9


def test_claim_4_6_attention_scale():
    """Larger queries and keys: a softmax that saturates, no gradient to them; values keep theirs."""  # noqa: E501
    query, key, val = (noise(4, 8, seed=s) for s in range(3))
    toward = noise(4, 8, seed=3)
    sizes = {}
    for scale in (1.0, 30.0):
        parts = [t.detach().clone().requires_grad_() for t in (scale * query, scale * key, val)]
        out = scaled_dot_product_attention(*parts).output
        (out * toward).sum().backward()
        sizes[scale] = [part.grad.norm().item() for part in parts]
        p = (scale**2 * query @ key.T / math.sqrt(8)).softmax(-1)
        assert_close(parts[2].grad, p.T @ toward)
        assert_close(out, p @ val)
    for near, far in zip(sizes[1.0][:2], sizes[30.0][:2], strict=True):
        assert far < 1e-6 * near
    assert sizes[30.0][2] > 0.5 * sizes[1.0][2]


def test_claim_4_6_layerwise():
    """y = a b x. New outputs, few samples: slow the lower layer. New inputs: that is the one."""

    def after(change: str, decay: float) -> float:
        """Error of the map as a whole after some steps on what has changed."""
        lower, upper = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
        model = torch.nn.Sequential(lower, upper).double()
        with torch.no_grad():
            lower.weight.copy_(torch.eye(2))
            upper.weight.copy_(torch.ones(1, 2))
        groups = layerwise_groups(model, [lower, upper], lr=0.1, decay=decay)
        assert [group["lr"] for group in groups] == [0.1 * decay, 0.1]
        x = torch.eye(2).double()
        # the outputs' weights are now (1, -1); or the inputs come mixed, below the same outputs
        if change == "outputs":
            wanted, kept = f64(1.0, -1.0), torch.eye(2).double()
        else:
            wanted, kept = f64(3.0, 1.0), None
        optimizer = SGD(groups, lr=0.1)
        for _ in range(31):
            optimizer.zero_grad()
            squared_error(model(x)[:, 0], wanted).sum().backward()
            optimizer.step()
        assert lower.weight.diagonal().min() > 0.2
        if kept is not None:  # the features that another head still reads
            return (lower.weight - kept).abs().max().item()
        return (upper.weight - 1).abs().max().item()

    assert after("outputs", 0.1) < 0.5 * after("outputs", 1.0)  # features survive
    assert after("inputs", 0.1) > 1.2 * after("inputs", 1.0)  # the head has to move instead


def test_claim_4_6_condition_slower():
    """The bound says so. From a start along the steepest direction one step does, at any kappa."""
    hundred = torch.tensor([100])
    left = {}
    for condition in (10.0, 1000.0):
        quadratic = f64(1.0, condition).diag()
        lr = best_lr(smoothness=condition, strong_convexity=1.0)
        for name, start in (("all", f64(1.0, 1.0)), ("steep", f64(0.0, 1.0))):
            rate = lr if name == "all" else 1 / condition
            end = gradient_descent_on_quadratic(quadratic, start, hundred, lr=rate)[0]
            assert (end >= 0).all()
            left[name, condition] = (end.norm() / start.norm()).item()
        bound = distance_rate(lr=lr, smoothness=condition, strong_convexity=1.0) ** 100
        assert abs(left["all", condition] / bound - 1) < 1e-9
        assert distance_rate(lr=lr, smoothness=condition, strong_convexity=1.0) > 0
    assert left["all", 10.0] < 1e-8 and left["all", 1000.0] > 0.8
    assert left["steep", 10.0] == left["steep", 1000.0] == 0


def test_claim_4_6_noise_escapes():
    """x^2 - y^2 from y = 0: descent stays; noise along y leaves, noise along x does not."""
    ends = {}
    for kind, amount in (("none", (0.0, 0.0)), ("along x", (0.1, 0.0)), ("along y", (0.0, 0.1))):
        point = torch.nn.Parameter(f64(1.0, 0.0))
        optimizer = SGD([point], lr=0.05)
        draws = noise(61, 2, seed=4) * f64(*amount)
        for draw in draws:
            point.grad = 2 * point.detach() * f64(1.0, -1.0) + draw
            optimizer.step()
        ends[kind] = point.tolist()
    assert abs(ends["none"][0] - 0.9**61) < 1e-12 and ends["none"][1] == 0
    assert ends["along x"][1] == 0 and 1e-4 < abs(ends["along x"][0]) < 0.2
    assert abs(ends["along y"][1]) > 0.5


def test_claim_4_6_schedule_oscillates():
    """Between 1 / L and 2 / L every step changes sides; a rate that falls stops it."""
    path = gradient_descent_on_quadratic(f64(1.0).view(1, 1), f64(1.0), torch.arange(6), lr=1.9)
    assert_close(path[:, 0], f64(*[(-0.9) ** k for k in range(6)]))
    point, seen = 1.0, []
    schedule = wsd(warmup_steps=0, decay_steps=4, total_steps=6, peak=1.9)
    for step in range(6):
        rate = float(schedule(step))
        assert abs(rate - [1.9, 1.9, 1.9, 1.425, 0.95, 0.475][step]) < 1e-12
        point *= 1 - rate
        seen.append(point)
    assert seen[0] < 0 < seen[1] and abs(seen[-1]) < 0.03 < abs(path[-1].item())


def test_claim_4_6_fast_not_better():
    """Under noise the larger rate leads at first and ends higher."""
    fast, slow = (
        expected_losses(torch.full((400,), lr, dtype=torch.float64), f64(1.0), batch=1, noise=1.0)
        for lr in (0.3, 0.05)
    )
    assert abs(fast[1].item() - 0.38) < 1e-12
    assert fast[5] < slow[5] - 0.05 and fast[-1] > 5 * slow[-1]
    floor = 0.3 / (4 - 6 * 0.3)  # eta sigma^2 / (4 - 6 eta) for one feature and one sample
    assert abs(fast[-1].item() - floor) < 1e-9


def test_claim_4_6_llm_stages():
    """Two weights are enough: a decay beats every constant rate, for the noise's sake."""
    total = 200
    schedule = wsd(warmup_steps=0, decay_steps=150, total_steps=total, peak=0.4)
    rates = f64(*[float(schedule(step)) for step in range(total)])
    assert rates[0] == 0.4 and abs(rates[-1] - 0.4 / 150) < 1e-9 and (rates.diff() <= 0).all()

    def end(rates: Tensor, noise: float) -> float:
        return expected_losses(rates, f64(1.0, 0.02), batch=1, noise=noise)[-1].item()

    constants = [end(torch.full_like(rates, lr), 1.0) for lr in (0.05, 0.1, 0.2, 0.25, 0.3, 0.4)]
    assert 0 < end(rates, 1.0) < 0.6 * min(constants)
    # without noise there is nothing to settle: the constant rate is the better
    assert 0 <= end(torch.full_like(rates, 0.4), 0.0) < end(rates, 0.0)


def test_claim_4_6_final_performance():
    """All minima of this loss are equal and zero, and they predict differently."""
    x, y = f64(1.0, 1.0), f64(1.0)
    unseen = f64(1.0, -1.0)
    spread = []
    for start in (f64(0.0, 0.0), f64(3.0, -3.0)):
        loss = lambda w: squared_error((x @ w).view(1), y).sum()  # noqa: E731
        end = gradient_descent(loss, start, lr=0.1, steps=60)[-1]
        assert 0 <= loss(end) < 1e-8
        spread.append((unseen @ end).item())
    assert abs(spread[0]) < 1e-9 and abs(spread[1] - 6) < 1e-9


def test_claim_4_6_theory_and_practice():
    """The rates need eta < 2 / L. Here it is not so at the start, and descent still ends well."""
    loss = lambda w: squared_error(w[0] * w[1], f64(1.0)[0]) / 2  # noqa: E731
    start, lr = f64(3.0, 0.4), 0.3
    sharp = torch.linalg.eigvalsh(curvature(loss, start))[-1].item()
    path = gradient_descent(loss, start, lr=lr, steps=200)
    values = torch.stack([loss(point) for point in path])
    assert lr > 1.3 * 2 / sharp and (values.diff() > 0).any()  # the bound promises nothing
    assert 0 <= values[-1] < 1e-6
    flat = torch.linalg.eigvalsh(curvature(loss, path[-1]))[-1].item()
    assert abs(flat - path[-1].square().sum().item()) < 1e-2
    assert flat < 2 / lr < sharp  # it left for a place where the rate is allowed
