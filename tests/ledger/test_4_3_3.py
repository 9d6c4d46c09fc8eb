"""The ledger of page 4.3.3: the simplex, divergence, Fisher information, natural gradient."""

import math

import pytest
import torch
from torch import Tensor

from lmlosses.analysis.geometry import (
    empirical_fisher,
    fisher_information,
    fisher_rao_distance,
    gaussian_fisher_information,
    natural_gradient_step,
    observed_information,
    simplex_gradient_step,
    sphere_gradient_step,
)
from lmlosses.lab.models import sinusoidal_positions
from lmlosses.lab.training import gradient_descent, natural_gradient_descent
from lmlosses.losses import (
    brier,
    cross_entropy,
    entropy,
    half_squared_error,
    kl_divergence,
)
from lmlosses.normalizers import softmax
from lmlosses.optim import Adam


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, atol=1e-9):
    """Assert that numbers agree, whether they come as tensors, lists or floats."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def coin(logit: Tensor) -> Tensor:
    """One toss; class 0 has the log-odds that are given."""
    return torch.stack([logit, torch.zeros_like(logit)], dim=-1)


def coin_of_probability(p: Tensor) -> Tensor:
    """One toss; class 0 has the probability that is given."""
    return torch.stack([p.log(), (1 - p).log()], dim=-1)


def adam_after(gradients, *, lr, betas, eps=1e-8, start=(0.0, 0.0)):
    """The parameter, and the optimizer's state, after one step per gradient."""
    w = torch.nn.Parameter(f64(*start))
    optimizer = Adam([w], lr=lr, betas=betas, eps=eps)
    for gradient in gradients:
        w.grad = f64(*gradient)
        optimizer.step()
    return w.detach(), optimizer.state[w]


def test_eq_4_3_17():
    """Softmax and steps on the simplex land on it; (1.1, -0.1) sums to one and is not on it."""
    start = softmax(f64(3.0, -1.0, 0.5))
    for p in (start, simplex_gradient_step(start, f64(5.0, -20.0, 0.0), lr=0.3)):
        assert all(entry >= 0 for entry in p.tolist())
        assert abs(math.fsum(p.tolist()) - 1) < 1e-12
    with pytest.raises(ValueError, match="probabilities"):
        simplex_gradient_step(f64(1.1, -0.1), f64(0.0, 0.0), lr=0.1)


def test_claim_4_3_compact_manifold():
    """Bounded and closed; but interior points can converge to a corner outside the interior."""
    corner, other = f64(1.0, 0.0, 0.0), f64(0.0, 1.0, 0.0)
    close(fisher_rao_distance(corner, other), math.pi)
    gaps = [1e-1, 1e-3, 1e-5]
    towards = torch.stack([f64(1 - gap, gap / 2, gap / 2) for gap in gaps])
    left = fisher_rao_distance(towards, corner.expand(3, 3))
    close(left, [2 * math.acos(math.sqrt(1 - gap)) for gap in gaps], atol=1e-7)
    assert bool((towards > 0).all()) and not bool((corner > 0).all())
    # the way to a corner is finite, and a path may not be continued straight beyond it
    center = torch.full((3,), 1 / 3, dtype=torch.float64)
    close(fisher_rao_distance(center, corner), 2 * math.acos(1 / math.sqrt(3)))
    beyond = center + 1.01 * (corner - center)
    assert float(beyond.min()) < 0


def test_claim_4_3_triangle():
    """Corners are pairwise sqrt(2) apart for every C; they span a triangle only for C = 3."""
    spanned = {}
    for classes in (2, 3, 4):
        corners = torch.eye(classes, dtype=torch.float64)
        first, second = torch.triu_indices(classes, classes, offset=1)
        close(brier(corners[first], second).sqrt(), [math.sqrt(2)] * len(first))
        spanned[classes] = int(torch.linalg.matrix_rank(corners[1:] - corners[0]))
    assert spanned == {2: 1, 3: 2, 4: 3}


def test_eq_4_3_18():
    p, p_hat = [0.7, 0.2, 0.1], [0.5, 0.1, 0.4]
    squares = math.fsum((a - b) ** 2 for a, b in zip(p, p_hat, strict=True))
    close(squares, 0.14)
    close(brier(f64(*p_hat), f64(*p)), squares)
    close(brier(f64(0.9, 0.1), torch.tensor(0)), 0.02)


def test_claim_4_3_straight_line_distance():
    """The square of the distance, which breaks the triangle inequality, or the distance."""
    ends, middle = f64(1.0, 0.0), f64(0.5, 0.5)
    first, second = brier(middle, ends), brier(f64(0.0, 1.0), middle)
    direct = brier(f64(0.0, 1.0), ends)
    close([first, second, direct], [0.5, 0.5, 2.0])
    assert first + second < direct - 0.9
    assert first.sqrt() + second.sqrt() > direct.sqrt() - 1e-12
    close(direct.sqrt(), math.dist((1, 0), (0, 1)))
    assert abs(direct - math.dist((1, 0), (0, 1))) > 0.5


def test_eq_4_3_19():
    p, p_hat = f64(0.5, 0.3, 0.2), f64(0.2, 0.2, 0.6)
    by_hand = -math.fsum(a * math.log(b) for a, b in zip(p.tolist(), p_hat.tolist(), strict=True))
    close(cross_entropy(p_hat.log(), p), by_hand)
    close(entropy(p.log()) + kl_divergence(p.log(), p_hat.log()), by_hand)
    close(entropy(p.log()), torch.special.entr(p).sum())
    impossible = f64(1.0, 0.0, 0.0).log()
    assert cross_entropy(impossible, p) == math.inf == kl_divergence(p.log(), impossible)


def test_claim_4_3_corresponds_to_divergence():
    """Equal for a one-hot target; for a soft one apart by H(p), with the same gradient."""
    model = f64(0.8, 0.2)
    one_hot = f64(1.0, 0.0)
    close(cross_entropy(model.log(), one_hot), -math.log(0.8))
    close(kl_divergence(one_hot.log(), model.log()), -math.log(0.8))
    fair = f64(0.5, 0.5)
    close(cross_entropy(fair.log(), fair), math.log(2))
    close(kl_divergence(fair.log(), fair.log()), 0.0)

    logits = f64(1.0, -0.5).requires_grad_()
    for loss in (
        cross_entropy(logits, fair),
        kl_divergence(fair.log(), logits.log_softmax(-1)),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        close(gradient, logits.softmax(-1).detach() - fair)


def test_claim_4_3_divergence_asymmetric():
    fair, biased = f64(0.5, 0.5).log(), f64(0.9, 0.1).log()
    there, back = kl_divergence(fair, biased), kl_divergence(biased, fair)
    close(there, 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    close(back, 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert there - back > 0.1


def test_claim_4_3_binary_squared_error():
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        close(brier(f64(q, 1 - q), f64(1.0, 0.0)), 2 * (1 - q) ** 2)


def test_claim_4_3_binary_cross_entropy():
    for q in (0.01, 0.1, 0.5, 0.9):
        close(cross_entropy(f64(q, 1 - q).log(), f64(1.0, 0.0)), -math.log(q))


def test_claim_4_3_symmetric_change():
    """Printed: as much from 1 to 0.5 as from 0.5 to 0. It is 0.5 and then 1.5."""
    right, half, wrong = brier(
        torch.stack([f64(1.0, 0.0), f64(0.5, 0.5), f64(0.0, 1.0)]), torch.zeros(3).long()
    ).tolist()
    assert abs((half - right) - (wrong - half)) > 0.9
    close([half - right, wrong - half], [0.5, 1.5])


def test_claim_4_3_from_zero_to_two():
    q = torch.linspace(1, 0, 11, dtype=torch.float64)
    losses = brier(torch.stack([q, 1 - q], dim=-1), torch.zeros(11).long()).tolist()
    close([losses[0], losses[-1]], [0.0, 2.0])
    assert losses == sorted(losses)


def test_claim_4_3_accelerating():
    q = f64(1.0, 0.5, 0.1, 0.01).requires_grad_()
    losses = cross_entropy(torch.stack([q, 1 - q], dim=-1).log(), torch.zeros(4).long())
    close(losses, [0.0, 0.693147, 2.302585, 4.605170], atol=1e-6)
    slopes = [1.0, 2.0, 10.0, 100.0]
    # the gradient of a normalized distribution: -1 / q, and ever steeper
    h = 1e-6
    for value, slope in zip([0.5, 0.1, 0.01], slopes[1:], strict=True):
        up, down = (
            cross_entropy(f64(v, 1 - v).log(), torch.tensor(0)) for v in (value + h, value - h)
        )
        close((up - down) / (2 * h), -slope, atol=1e-3)
    nothing = cross_entropy(f64(0.0, 1.0).log(), torch.tensor(0))
    assert nothing == math.inf


def test_claim_4_3_similar_severity():
    """Printed: squared error rates them alike, cross-entropy very differently."""
    target = torch.tensor([0, 0])
    model = torch.stack([f64(0.9, 0.1), f64(0.1, 0.9)])
    small, large = brier(model, target).tolist()
    close([small, large], [0.02, 1.62])
    ratio = large / small
    assert not 0.5 < ratio < 2
    close(ratio, 81.0, atol=1e-6)
    small, large = cross_entropy(model.log(), target).tolist()
    close([small, large], [-math.log(0.9), -math.log(0.1)])
    assert 21 < large / small < 22 < ratio
    # only close to certainty in the wrong class does cross-entropy pull ahead of any bound
    extreme = f64(1e-60, 1.0)
    assert cross_entropy(extreme.log(), torch.tensor(0)) / small > 1000
    assert brier(extreme, torch.tensor(0)) / 0.02 < 101


def test_eq_4_3_20():
    """Equal for a coin in any coordinate; for the uniform distribution on (0, a) they differ."""
    p = f64(0.3)
    close(fisher_information(coin_of_probability, p), [[1 / 0.21]])
    hessians = [observed_information(coin_of_probability, p, torch.tensor([y])) for y in (0, 1)]
    close(hessians[0], [[1 / 0.09]])
    close(hessians[1], [[1 / 0.49]])
    close(0.3 * hessians[0] + 0.7 * hessians[1], [[1 / 0.21]])

    # log density -log(a) inside (0, a): its score and its second derivative are constants
    a = torch.tensor(2.0, dtype=torch.float64)
    score = torch.func.grad(lambda end: -end.log())(a)
    minus_hessian = -torch.func.grad(torch.func.grad(lambda end: -end.log()))(a)
    close([score**2, minus_hessian], [0.25, -0.25])


def test_claim_4_3_fisher_is_a_metric():
    """Positive where parameters name distributions uniquely; zero along a shift of all logits."""
    close(fisher_information(coin, f64(0.0)), [[0.25]])

    def logits_themselves(z):
        return z[None]

    z = f64(0.2, -0.4, 1.0)
    p = torch.softmax(z, dim=0)
    fisher = fisher_information(logits_themselves, z)
    close(fisher, torch.diag(p) - torch.outer(p, p))
    close(fisher @ torch.ones(3, dtype=torch.float64), [0.0, 0.0, 0.0])
    eigenvalues = torch.linalg.eigvalsh(fisher)
    assert abs(eigenvalues[0]) < 1e-12 < 0.1 < eigenvalues[1]


def test_eq_4_3_21():
    """For logits linear in the parameters; for a coin given by its probability, not."""
    inputs = torch.tensor([[1.0, 2.0], [0.5, -1.0], [-2.0, 0.3]], dtype=torch.float64)
    w = f64(0.4, -0.7)

    def linear(w):
        return coin(inputs @ w)

    p = torch.sigmoid(inputs @ w)
    by_hand = inputs.T @ torch.diag(p * (1 - p)) @ inputs / 3
    close(fisher_information(linear, w), by_hand)
    for labels in ([0, 0, 0], [1, 0, 1]):
        close(observed_information(linear, w, torch.tensor(labels)), by_hand)

    p = f64(0.3)
    seen = observed_information(coin_of_probability, p, torch.tensor([0])).item()
    expected = fisher_information(coin_of_probability, p).item()
    close([seen, expected], [100 / 9, 100 / 21])
    assert seen > 2 * expected


def test_claim_4_3_no_fisher_for_squared_error():
    """Printed: no direct link. The Hessian of its mean is the Gaussian's Fisher information."""
    inputs = torch.tensor([[1.0, 2.0], [0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    targets, w = f64(1.0, 0.0, 2.0), f64(0.3, -0.2)
    by_hand = [[2 / 3, 1 / 3], [1 / 3, 2.0]]
    close(gaussian_fisher_information(lambda w: inputs @ w, w), by_hand)
    close(gaussian_fisher_information(lambda w: inputs @ w, w, variance=4.0)[1, 1], 0.5)

    def loss(w):
        return half_squared_error(inputs @ w, targets).mean()

    hessian = torch.func.hessian(loss)(w)
    close(hessian, by_hand)
    assert hessian.abs().max() > 1  # a link, and not by both being zero


def test_eq_4_3_22():
    """To second order, in matching coordinates: diag(1/p), or diag(p) - pp^T in logits."""
    p, direction = f64(0.5, 0.3, 0.2), f64(1.0, -2.0, 1.0)
    for size, cubic in ((1e-2, 3e-5), (1e-3, 3e-8)):
        delta = size * direction
        quadratic = math.fsum(d * d / q for d, q in zip(delta.tolist(), p.tolist(), strict=True))
        close(kl_divergence(p.log(), (p + delta).log()), 0.5 * quadratic, atol=cubic)

    z = p.log()
    logit_fisher = fisher_information(lambda z: z[None], z)
    close(logit_fisher, torch.diag(p) - torch.outer(p, p))
    delta = 1e-2 * direction
    divergence = kl_divergence(p.log(), (z + delta).log_softmax(-1))
    close(divergence, 0.5 * delta @ logit_fisher @ delta, atol=3e-6)
    # outside: a probability step with the logits' matrix, and a step that is not small
    mixed = 0.5 * delta @ logit_fisher @ delta
    assert kl_divergence(p.log(), (p + delta).log()) > 10 * mixed
    far = f64(0.3, -0.2, -0.1)
    true = kl_divergence(p.log(), (p + far).log())
    assert abs(true - 0.5 * (far**2 / p).sum()) > 0.2 * true


def test_claim_4_3_approximate_distance():
    """A distance would double with the step; the divergence quadruples: it is half the square."""
    p, direction = f64(0.5, 0.3, 0.2), f64(1.0, -2.0, 1.0)
    once, twice = p + 1e-4 * direction, p + 2e-4 * direction
    short, long = kl_divergence(p.log(), once.log()), kl_divergence(p.log(), twice.log())
    assert abs(long / short - 4) < 0.01
    length = fisher_rao_distance(p, once)
    assert abs(fisher_rao_distance(p, twice) / length - 2) < 0.01
    close(length, math.sqrt((1e-8 * direction**2 / p).sum()), atol=1e-7)
    close(short, 0.5e-8 * (1 / 0.5 + 4 / 0.3 + 1 / 0.2), atol=1e-10)
    assert length > 1000 * short


def test_claim_4_3_position_identity():
    """Sinusoidal rows differ and are far from orthogonal; learned rows may coincide."""
    positions = sinusoidal_positions(50, 64).double()
    close(positions[0], [0.0, 1.0] * 32)
    frequencies = [10000 ** (-2 * i / 64) for i in range(32)]
    close((positions[0] * positions[1]).sum(), sum(map(math.cos, frequencies)), atol=1e-5)
    unit = positions / positions.norm(dim=-1, keepdim=True)
    cosines = unit @ unit.T
    close(cosines[0, 1], 0.966, atol=1e-3)
    off_diagonal = cosines[~torch.eye(50, dtype=torch.bool)]
    assert off_diagonal.max() < 0.97 and cosines[:-1, 1:].diagonal().min() > 0.96
    learned = torch.nn.Embedding(50, 64)
    torch.nn.init.zeros_(learned.weight)
    assert torch.equal(learned.weight[0], learned.weight[49])


def test_claim_4_3_riemannian_adam():
    """Geometry of the constraint ignores the loss's curvature; geometry of the loss is that."""
    point, gradient = f64(1.0, 0.0), f64(0.0, -1.0)
    flat, steep = (torch.diag(f64(1.0, curvature)) for curvature in (1.0, 100.0))
    # on the sphere the step knows the point and the gradient, and no curvature can enter
    moved = sphere_gradient_step(point, gradient, lr=0.1)
    close(moved, [math.cos(0.1), math.sin(0.1)])
    close(natural_gradient_step(point, gradient, flat, lr=0.1), [1.0, 0.1])
    natural = natural_gradient_step(point, gradient, steep, lr=0.1)
    close(natural, [1.0, 0.001])
    assert (moved - natural).abs().max() > 0.09
    close(moved.norm(), 1.0)


def test_eq_4_3_23():
    gradients = [(1.0, -2.0), (0.5, 4.0), (-3.0, 0.0)]
    _, state = adam_after(gradients, lr=0.1, betas=(0.8, 0.9))
    m = [0.0, 0.0]
    for gradient in gradients:
        m = [0.8 * old + 0.2 * new for old, new in zip(m, gradient, strict=True)]
    close(state["exp_avg"], m)
    assert state["exp_avg"][0] < 0  # -0.392: the last gradient, not yet the first two


def test_eq_4_3_24():
    gradients = [(1.0, -2.0), (0.5, 4.0), (-3.0, 0.0)]
    _, state = adam_after(gradients, lr=0.1, betas=(0.8, 0.9))
    v = [0.0, 0.0]
    for gradient in gradients:
        v = [0.9 * old + 0.1 * new * new for old, new in zip(v, gradient, strict=True)]
    close(state["exp_avg_sq"], v)
    close(state["exp_avg_sq"], [1.0035, 0.81 * 0.4 + 0.9 * 1.6 + 0.0])


def test_eq_4_3_25():
    """Under a constant gradient the corrected moments are g and g^2 from the first step on."""
    for steps in (1, 2, 7):
        w, _ = adam_after([(0.01, -50.0)] * steps, lr=0.1, betas=(0.9, 0.99), eps=0.0)
        close(w, [-0.1 * steps, 0.1 * steps])
    # uncorrected, the first step would be (1 - 0.9) / sqrt(1 - 0.99) = 1 here, and 3.2 usually
    uncorrected = 0.1 * (1 - 0.9) / math.sqrt(1 - 0.999)
    w, _ = adam_after([(1.0, 1.0)], lr=0.1, betas=(0.9, 0.999), eps=0.0)
    assert abs(-w[0] - uncorrected) > 0.2
    close(w, [-0.1, -0.1])


def test_eq_4_3_26():
    """Against torch, with an eps that matters: outside the root, added to it."""
    gradients = [(1.0, -2.0), (0.5, 4.0), (-3.0, 0.1)]
    mine, _ = adam_after(gradients, lr=0.1, betas=(0.8, 0.9), eps=0.5, start=(1.0, 2.0))
    theirs = torch.nn.Parameter(f64(1.0, 2.0))
    optimizer = torch.optim.Adam([theirs], lr=0.1, betas=(0.8, 0.9), eps=0.5)
    for gradient in gradients:
        theirs.grad = f64(*gradient)
        optimizer.step()
    close(mine, theirs.detach())
    once, _ = adam_after([(2.0, 2.0)], lr=0.1, betas=(0.8, 0.9), eps=0.5)
    close(once, [-0.1 * 2 / 2.5] * 2)


def test_claim_4_3_adam_is_euclidean():
    """Printed: a Euclidean step. Turned coordinates would not matter then; they do."""
    gradient = (1.0, 100.0)
    step, state = adam_after([gradient], lr=0.1, betas=(0.9, 0.999))
    cos, sin = math.cos(0.5), math.sin(0.5)
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    turned, _ = adam_after([tuple((turn @ f64(*gradient)).tolist())], lr=0.1, betas=(0.9, 0.999))
    assert (turn.T @ turned - step).norm() > 0.05
    euclidean = -0.1 * f64(*gradient)
    close(turn.T @ (-0.1 * turn @ f64(*gradient)), euclidean)
    assert torch.cosine_similarity(step, euclidean, dim=0) < 0.8
    # the metric that it does use: diag(sqrt(v_hat)), here the gradient's own sizes
    close(state["exp_avg_sq"] / (1 - 0.999), [1.0, 1e4], atol=1e-6)
    close(step, -0.1 * torch.linalg.solve(torch.diag(f64(1.0, 100.0)), f64(*gradient)))


def test_eq_4_3_27():
    """Free coordinates: exactly the formula. On a sphere it leaves; a singular metric fails."""
    metric = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    inverse = torch.tensor([[3.0, -1.0], [-1.0, 2.0]], dtype=torch.float64) / 5
    params, gradient = f64(1.0, -1.0), f64(2.0, 4.0)
    printed = params - 0.5 * inverse @ gradient
    close(natural_gradient_step(params, gradient, metric, lr=0.5), printed)

    north, pull = f64(0.0, 1.0), f64(-1.0, 0.0)
    straight = north - 0.5 * pull
    assert straight.norm() > 1.1
    close(sphere_gradient_step(north, pull, lr=0.5), [math.sin(0.5), math.cos(0.5)])
    with pytest.raises(ValueError, match="damping"):
        natural_gradient_step(params, gradient, torch.ones(2, 2).double(), lr=0.5)


def test_eq_4_3_28():
    """Printed: C by C whatever the inputs. In w there is a Kronecker factor x x^T."""
    weights = torch.tensor([[0.5, -1.0], [0.2, 0.3], [-0.4, 0.1]], dtype=torch.float64)
    inputs = torch.tensor([[1.0, 2.0], [-0.5, 1.0]], dtype=torch.float64)

    def model(w):
        return inputs @ w.reshape(3, 2).T

    p = torch.softmax(inputs @ weights.T, dim=-1)
    eye = torch.eye(3, dtype=torch.float64)
    printed, corrected = torch.zeros(3, 3).double(), torch.zeros(6, 6).double()
    for n in range(2):
        for y in range(3):  # labels drawn from the model
            residual = torch.outer(p[n] - eye[y], p[n] - eye[y])
            printed += p[n, y] * residual / 2
            corrected += p[n, y] * torch.kron(residual, torch.outer(inputs[n], inputs[n])) / 2
    fisher = fisher_information(model, weights.flatten())
    assert fisher.shape != printed.shape
    close(fisher, corrected)

    # with the data's labels: another matrix
    labels = torch.tensor([0, 2])
    seen = torch.zeros(6, 6).double()
    for n, y in enumerate(labels.tolist()):
        gradient = torch.outer(p[n] - eye[y], inputs[n]).flatten()
        seen += torch.outer(gradient, gradient) / 2
    empirical = empirical_fisher(model, weights.flatten(), labels)
    close(empirical, seen)
    assert (empirical - fisher).abs().max() > 0.1

    # one weight, input 2, even odds: the printed form gives 1/4, the metric in w is 1
    close(fisher_information(lambda w: coin(2 * w), f64(0.0)), [[1.0]])


def test_claim_4_3_rescaling():
    metric = torch.diag(f64(4.0, 0.25))
    moved = natural_gradient_step(f64(0.0, 0.0), f64(1.0, 1.0), metric, lr=1.0)
    close(moved, [-0.25, -4.0])


def test_claim_4_3_natural_gradient_accelerates():
    """Fewer steps on a long valley; from a confidently wrong start the full step overshoots."""
    inputs = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.1], [-1.0, 0.0]]).double()
    inputs = torch.cat([inputs, inputs])
    targets = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1])

    def model(w):
        return coin(inputs @ w)

    def loss(w):
        return cross_entropy(model(w), targets).mean()

    start = f64(0.0, 0.0)
    best = start.clone()  # independent: Newton's method by hand
    for _ in range(50):
        p = torch.sigmoid(inputs @ best)
        gradient = inputs.T @ (p - (targets == 0).double())
        best = best - torch.linalg.solve(inputs.T @ (inputs * (p * (1 - p))[:, None]), gradient)
    natural = natural_gradient_descent(model, start, targets, lr=1.0, steps=8)
    close(natural[-1], best, atol=1e-8)
    plain = gradient_descent(loss, start, lr=4.0, steps=8)  # 1 / the largest curvature
    close(plain[1], -4.0 * torch.func.grad(loss)(start))
    assert (plain[-1] - best).norm() > 0.5 * best.norm()

    far = f64(-6.0, 0.0)
    overshot = natural_gradient_descent(model, far, targets, lr=1.0, steps=1)[-1]
    damped = natural_gradient_descent(model, far, targets, lr=1.0, steps=1, damping=0.1)[-1]
    assert loss(overshot) > 10 * loss(far) and loss(damped) < loss(far)
