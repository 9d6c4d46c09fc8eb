"""Tests of lmlosses.analysis.geometry."""

import inspect
import math

import pytest
import torch

from lmlosses import cpu_generator
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

SAMPLES, INPUTS, HIDDEN, CLASSES = 7, 2, 3, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=cpu_generator(seed), dtype=torch.float64)


def linear_model(features):
    """Logits linear in the parameters: one row of weights per class."""
    return lambda params: features @ params.reshape(-1, features.shape[1]).T


def curved_model(features):
    """A network with one hidden layer, its parameters in one vector."""

    def model(params):
        first, second = params.split([HIDDEN * INPUTS, CLASSES * HIDDEN])
        hidden = torch.tanh(features @ first.reshape(HIDDEN, INPUTS).T)
        return hidden @ second.reshape(CLASSES, HIDDEN).T

    return model, draw(HIDDEN * INPUTS + CLASSES * HIDDEN, seed=1)


def slow_outer_products(model, params, weights_per_class):
    """Sample by sample, class by class: weight times the outer product of the score."""
    total = torch.zeros(len(params), len(params), dtype=torch.float64)
    point = params.clone().requires_grad_()
    logps = model(point).log_softmax(-1)
    for n in range(len(logps)):
        for c in range(logps.shape[1]):
            (score,) = torch.autograd.grad(logps[n, c], point, retain_graph=True)
            total += weights_per_class[n, c] * torch.outer(score, score)
    return total / len(logps)


# ---- Fisher information


def test_a_coin_has_fisher_information_p_times_one_minus_p():
    def coin(logit):
        return torch.stack([logit, torch.zeros(1)], dim=-1)

    for p in (0.5, 0.9):
        logit = torch.tensor([p]).logit()
        torch.testing.assert_close(fisher_information(coin, logit), torch.tensor([[p - p * p]]))


def test_fisher_information_agrees_with_a_slow_double_loop():
    model, params = curved_model(draw(SAMPLES, INPUTS))
    expected = slow_outer_products(model, params, model(params).softmax(-1))
    torch.testing.assert_close(fisher_information(model, params), expected, rtol=1e-10, atol=1e-12)


def test_fisher_information_is_the_softmax_jacobian_between_two_jacobians():
    model, params = curved_model(draw(SAMPLES, INPUTS))
    jacobian = torch.func.jacrev(model)(params)
    p = model(params).softmax(-1)
    middle = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    expected = torch.einsum("nci,ncd,ndj->ij", jacobian, middle, jacobian) / SAMPLES
    torch.testing.assert_close(fisher_information(model, params), expected, rtol=1e-10, atol=1e-12)


def test_fisher_information_is_the_curvature_of_the_divergence():
    model, params = curved_model(draw(SAMPLES, INPUTS))
    here = model(params).log_softmax(-1)

    def divergence(moved):
        there = model(moved).log_softmax(-1)
        return (here.exp() * (here - there)).sum(-1).mean()

    torch.testing.assert_close(
        torch.func.hessian(divergence)(params),
        fisher_information(model, params),
        rtol=1e-9,
        atol=1e-12,
    )


def test_fisher_information_is_what_sampled_labels_give_on_average():
    model, params = curved_model(draw(SAMPLES, INPUTS))
    p = model(params).softmax(-1)
    fisher = fisher_information(model, params)
    draws = 3000
    labels = torch.multinomial(p, draws, replacement=True, generator=cpu_generator(0))
    counts = torch.nn.functional.one_hot(labels, CLASSES).sum(dim=1) / draws
    sampled = slow_outer_products(model, params, counts)
    # the counts are off by 1 / sqrt(3000) = 0.02 or so; the data's own labels by far more
    assert (sampled - fisher).norm() < 0.1 * fisher.norm()


def test_fisher_information_is_blind_to_a_shift_of_all_logits():
    features = draw(SAMPLES, INPUTS)
    fisher = fisher_information(linear_model(features), draw(CLASSES * INPUTS, seed=1))
    shift = torch.ones(CLASSES, 1, dtype=torch.float64) * draw(INPUTS, seed=2)
    assert (fisher @ shift.flatten()).norm() < 1e-14 < 0.01 < fisher.norm()
    assert torch.linalg.eigvalsh(fisher)[0] > -1e-14


def test_fisher_information_survives_a_forbidden_class():
    features = draw(SAMPLES, INPUTS)
    forbidden = torch.tensor([False, False, True, False])

    def model(params):
        return linear_model(features)(params).masked_fill(forbidden, -torch.inf)

    def without(params):
        return linear_model(features)(params)[:, ~forbidden]

    params = draw(CLASSES * INPUTS, seed=1)
    torch.testing.assert_close(
        fisher_information(model, params), fisher_information(without, params)
    )


# ---- observed information and the empirical Fisher


def test_where_logits_are_linear_the_hessian_is_the_fisher_information_whatever_the_labels():
    features = draw(SAMPLES, INPUTS)
    model, params = linear_model(features), draw(CLASSES * INPUTS, seed=1)
    fisher = fisher_information(model, params)
    for seed in range(3):
        targets = torch.randint(CLASSES, (SAMPLES,), generator=cpu_generator(seed))
        torch.testing.assert_close(
            observed_information(model, params, targets), fisher, rtol=1e-10, atol=1e-12
        )


def test_where_logits_are_curved_the_hessian_is_not_the_fisher_information():
    model, params = curved_model(draw(SAMPLES, INPUTS))
    targets = torch.arange(SAMPLES) % CLASSES
    hessian = observed_information(model, params, targets)
    fisher = fisher_information(model, params)
    assert (hessian - fisher).norm() > 0.3 * fisher.norm()
    assert torch.linalg.eigvalsh(hessian)[0] < -0.01


def test_over_labels_from_the_model_the_hessian_averages_to_the_fisher_information():
    model, params = curved_model(draw(1, INPUTS))
    p = model(params).softmax(-1).squeeze(0)
    average = sum(
        p[c] * observed_information(model, params, torch.tensor([c])) for c in range(CLASSES)
    )
    torch.testing.assert_close(average, fisher_information(model, params), rtol=1e-9, atol=1e-12)


def test_observed_information_agrees_with_finite_differences_of_the_gradient():
    model, params = curved_model(draw(SAMPLES, INPUTS))
    targets = torch.arange(SAMPLES) % CLASSES

    def gradient(point):
        point = point.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(point), targets)
        return torch.autograd.grad(loss, point)[0]

    step = 1e-5 * torch.eye(len(params), dtype=torch.float64)
    columns = [(gradient(params + e) - gradient(params - e)) / 2e-5 for e in step]
    torch.testing.assert_close(
        observed_information(model, params, targets), torch.stack(columns), rtol=0, atol=1e-8
    )


def test_the_empirical_fisher_agrees_with_a_slow_loop():
    model, params = curved_model(draw(SAMPLES, INPUTS))
    targets = torch.arange(SAMPLES) % CLASSES
    chosen = torch.nn.functional.one_hot(targets, CLASSES)
    torch.testing.assert_close(
        empirical_fisher(model, params, targets),
        slow_outer_products(model, params, chosen),
        rtol=1e-10,
        atol=1e-12,
    )


def test_over_labels_from_the_model_the_empirical_fisher_averages_to_the_fisher_information():
    model, params = curved_model(draw(1, INPUTS))
    p = model(params).softmax(-1).squeeze(0)
    average = sum(
        p[c] * empirical_fisher(model, params, torch.tensor([c])) for c in range(CLASSES)
    )
    torch.testing.assert_close(average, fisher_information(model, params), rtol=1e-9, atol=1e-12)


def test_at_surprising_labels_the_empirical_fisher_is_far_from_the_fisher_information():
    model, params = curved_model(draw(SAMPLES, INPUTS))
    params = 3 * params
    surprising = model(params).argmin(dim=-1)
    empirical = empirical_fisher(model, params, surprising)
    assert empirical.trace() > 3 * fisher_information(model, params).trace()


# ---- Gaussian Fisher information


def test_a_linear_regression_has_the_gram_matrix_of_its_inputs_as_fisher_information():
    inputs = draw(SAMPLES, INPUTS)
    fisher = gaussian_fisher_information(lambda w: inputs @ w, draw(INPUTS, seed=1), variance=0.25)
    torch.testing.assert_close(fisher, inputs.T @ inputs / (SAMPLES * 0.25))


def test_gaussian_fisher_information_is_the_curvature_of_the_divergence():
    inputs = draw(SAMPLES, INPUTS)
    params, variance = draw(INPUTS, seed=1), 0.7

    def model(w):
        return torch.tanh(inputs @ w)

    def divergence(moved):  # between two normal distributions of one variance
        return (model(moved) - model(params)).square().mean() / (2 * variance)

    torch.testing.assert_close(
        gaussian_fisher_information(model, params, variance=variance),
        torch.func.hessian(divergence)(params),
    )


# ---- all the matrices


@pytest.mark.parametrize(
    "function",
    [
        gaussian_fisher_information,
        natural_gradient_step,
        sphere_gradient_step,
        simplex_gradient_step,
    ],
)
def test_settings_are_named(function):
    for name, parameter in inspect.signature(function).parameters.items():
        assert (name in ("variance", "lr", "damping")) == (
            parameter.kind is parameter.KEYWORD_ONLY
        )


MATRICES = {
    "fisher_information": lambda model, params, targets: fisher_information(model, params),
    "observed_information": observed_information,
    "empirical_fisher": empirical_fisher,
    "gaussian_fisher_information": lambda model, params, targets: gaussian_fisher_information(
        lambda point: model(point).sum(-1), params
    ),
}


@pytest.mark.parametrize("name", MATRICES)
def test_without_samples_there_is_no_information(name):
    empty = torch.zeros(0, INPUTS)
    matrix = MATRICES[name](
        linear_model(empty), torch.ones(CLASSES * INPUTS), torch.zeros(0, dtype=torch.long)
    )
    torch.testing.assert_close(matrix, torch.zeros(CLASSES * INPUTS, CLASSES * INPUTS))


@pytest.mark.parametrize("name", MATRICES)
def test_information_is_a_mean_over_samples(name):
    features, params = draw(SAMPLES, INPUTS), draw(CLASSES * INPUTS, seed=1)
    targets = torch.arange(SAMPLES) % CLASSES
    once = MATRICES[name](linear_model(features), params, targets)
    twice = MATRICES[name](linear_model(features.repeat(2, 1)), params, targets.repeat(2))
    torch.testing.assert_close(twice, once)
    torch.testing.assert_close(once, once.T)


@pytest.mark.parametrize("name", MATRICES)
def test_information_is_formed_where_values_cannot_be_read(name):
    features = torch.empty(SAMPLES, INPUTS, device="meta")
    targets = torch.empty(SAMPLES, dtype=torch.long, device="meta")
    params = torch.empty(CLASSES * INPUTS, device="meta", requires_grad=True)
    matrix = MATRICES[name](linear_model(features), params, targets)
    assert matrix.shape == (CLASSES * INPUTS, CLASSES * INPUTS)
    if name != "gaussian_fisher_information":  # a linear model's has no gradient
        matrix.sum().backward()
        assert params.grad.device.type == "meta"


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_information_near_the_float64_one(name, dtype):
    features, params = draw(SAMPLES, INPUTS).to(dtype), draw(CLASSES * INPUTS, seed=1).to(dtype)
    targets = torch.arange(SAMPLES) % CLASSES
    matrix = MATRICES[name](linear_model(features), params, targets)
    assert matrix.dtype == torch.float32
    exact = MATRICES[name](linear_model(features.double()), params.double(), targets)
    assert exact.dtype == torch.float64
    # the model itself runs in half precision
    scale = exact.abs().max().item()
    torch.testing.assert_close(matrix.double(), exact, rtol=0, atol=0.03 * scale)


@pytest.mark.parametrize("name", MATRICES)
def test_extreme_logits_carry_no_nan(name):
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    params = 1e4 * torch.tensor([1.0, -1.0, 0.5, 1.0, -1.0, -1.0, 0.0, 0.0])
    assert MATRICES[name](linear_model(features), params, torch.tensor([0, 1])).isfinite().all()


@pytest.mark.bad_input
@pytest.mark.parametrize("name", MATRICES)
def test_parameters_that_are_not_a_vector_of_numbers_are_refused(name):
    model, targets = linear_model(torch.ones(1, 2)), torch.tensor([0])
    with pytest.raises(ValueError, match="params must have 1 axes"):
        MATRICES[name](model, torch.ones(2, 2), targets)
    with pytest.raises(TypeError, match="params must be a floating-point tensor"):
        MATRICES[name](model, torch.ones(4, dtype=torch.long), targets)


@pytest.mark.parametrize(
    "name", ["fisher_information", "observed_information", "empirical_fisher"]
)
def test_a_model_that_returns_no_logits_is_refused(name):
    params, targets = torch.ones(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="logits must have 2 axes"):
        MATRICES[name](lambda p: p, params, targets)
    with pytest.raises(ValueError, match="logits must have at least one entry along axis -1"):
        MATRICES[name](lambda p: p.new_zeros(2, 0), params, targets)
    with pytest.raises(TypeError, match="logits must be a floating-point tensor"):
        MATRICES[name](lambda p: torch.ones(2, 2, dtype=torch.long), params, targets)


@pytest.mark.parametrize("function", [observed_information, empirical_fisher])
def test_targets_that_do_not_fit_the_logits_are_refused(function):
    model, params = linear_model(torch.ones(3, 2)), torch.ones(8)
    with pytest.raises(ValueError, match=r"targets must have shape \(3,\), the shape of logits"):
        function(model, params, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 4\), the number of classes"):
        function(model, params, torch.tensor([0, 1, 4]))


@pytest.mark.bad_input
@pytest.mark.parametrize("function", [observed_information, empirical_fisher])
def test_targets_that_are_not_indices_are_refused(function):
    with pytest.raises(TypeError, match="targets must be an integer tensor"):
        function(linear_model(torch.ones(3, 2)), torch.ones(8), torch.zeros(3))


def test_a_regression_needs_one_prediction_per_sample_and_a_variance():
    with pytest.raises(ValueError, match="predictions must have 1 axes"):
        gaussian_fisher_information(lambda p: p.reshape(1, 2), torch.ones(2))
    with pytest.raises(TypeError, match="predictions must be a floating-point tensor"):
        gaussian_fisher_information(lambda p: torch.ones(2, dtype=torch.long), torch.ones(2))
    with pytest.raises(ValueError, match="variance must be positive; got 0.0"):
        gaussian_fisher_information(lambda p: p, torch.ones(2), variance=0.0)


# ---- the natural gradient


def positive_definite(dim, seed=0):
    root = draw(dim, dim, seed=seed)
    return root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)


def test_a_stretched_valley_becomes_round():
    fisher = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    step = natural_gradient_step(torch.zeros(2), torch.tensor([4.0, 1.0]), fisher, lr=0.5)
    torch.testing.assert_close(step, torch.tensor([-0.5, -0.5]))


def test_natural_gradient_agrees_with_the_explicit_inverse():
    params, gradient, fisher = draw(5), draw(5, seed=1), positive_definite(5)
    damped = fisher + 0.3 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(
        natural_gradient_step(params, gradient, fisher, lr=0.7, damping=0.3),
        params - 0.7 * torch.linalg.inv(damped) @ gradient,
        rtol=1e-9,
        atol=1e-9,
    )


def test_natural_gradient_is_the_same_step_in_other_coordinates():
    params, gradient, fisher = draw(4), draw(4, seed=1), positive_definite(4)
    change = draw(4, 4, seed=2)  # params = change @ other
    other = torch.linalg.solve(change, params)
    moved = natural_gradient_step(other, change.T @ gradient, change.T @ fisher @ change, lr=0.7)
    torch.testing.assert_close(
        change @ moved,
        natural_gradient_step(params, gradient, fisher, lr=0.7),
        rtol=1e-7,
        atol=1e-9,
    )


def test_with_no_information_damping_leaves_a_gradient_step():
    params, gradient = draw(3), draw(3, seed=1)
    step = natural_gradient_step(
        params, gradient, torch.zeros(3, 3, dtype=torch.float64), lr=0.5, damping=2.0
    )
    torch.testing.assert_close(step, params - 0.25 * gradient)


def test_one_full_natural_step_solves_least_squares():
    inputs, targets = draw(SAMPLES, INPUTS), draw(SAMPLES, seed=1)
    start = draw(INPUTS, seed=2)
    gradient = inputs.T @ (inputs @ start - targets) / SAMPLES
    fisher = gaussian_fisher_information(lambda w: inputs @ w, start)
    torch.testing.assert_close(
        natural_gradient_step(start, gradient, fisher, lr=1.0),
        torch.linalg.lstsq(inputs, targets).solution,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softmax_over_all_classes_needs_damping(dtype):
    features = draw(SAMPLES, INPUTS).to(dtype)
    params = draw(CLASSES * INPUTS, seed=1).to(dtype)
    fisher = fisher_information(linear_model(features), params)
    message = r"fisher must be positive definite once damping is added; with damping=0.0 .*raise"
    with pytest.raises(ValueError, match=message):
        natural_gradient_step(params, torch.ones_like(params), fisher, lr=1.0)
    step = natural_gradient_step(params, torch.ones_like(params), fisher, lr=1.0, damping=1e-3)
    assert step.isfinite().all()


def test_an_indefinite_or_zero_metric_is_refused():
    for fisher in (torch.diag(torch.tensor([1.0, -1.0])), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="fisher must be positive definite"):
            natural_gradient_step(torch.zeros(2), torch.ones(2), fisher, lr=1.0)


def test_natural_gradient_of_nothing_is_nothing():
    empty = natural_gradient_step(torch.zeros(0), torch.zeros(0), torch.zeros(0, 0), lr=1.0)
    assert empty.shape == (0,)


def test_natural_gradient_passes_gradcheck():
    def symmetric(params, gradient, root):
        return natural_gradient_step(params, gradient, root @ root.T, lr=0.7, damping=0.5)

    arguments = [draw(3), draw(3, seed=1), draw(3, 3, seed=2)]
    arguments = [argument.requires_grad_() for argument in arguments]
    assert torch.autograd.gradcheck(symmetric, arguments)
    assert torch.autograd.gradgradcheck(symmetric, arguments)


@pytest.mark.bad_input
def test_natural_gradient_refuses_what_does_not_fit():
    two, eye = torch.ones(2), torch.eye(2)
    with pytest.raises(ValueError, match=r"gradient must have shape \(2,\), the shape of params"):
        natural_gradient_step(two, torch.ones(3), eye, lr=1.0)
    with pytest.raises(ValueError, match=r"fisher must have shape \(2, 2\), two axes of the"):
        natural_gradient_step(two, two, torch.eye(3), lr=1.0)
    with pytest.raises(ValueError, match="params must have 1 axes"):
        natural_gradient_step(eye, eye, eye, lr=1.0)
    with pytest.raises(ValueError, match="lr must not be negative; got -1.0"):
        natural_gradient_step(two, two, eye, lr=-1.0)
    with pytest.raises(ValueError, match="damping must not be negative; got -0.1"):
        natural_gradient_step(two, two, eye, lr=1.0, damping=-0.1)
    with pytest.raises(TypeError, match="fisher must be a floating-point tensor"):
        natural_gradient_step(two, two, torch.eye(2, dtype=torch.long), lr=1.0)


# ---- the sphere


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(draw(*shape, seed=seed), dim=-1)


def test_thirty_degrees_to_the_north():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    moved = sphere_gradient_step(east, -2 * north, lr=math.pi / 12)
    torch.testing.assert_close(moved, torch.tensor([math.sqrt(3) / 2, 0.5]))


def test_the_step_follows_a_great_circle_by_the_length_of_the_tangent_gradient():
    point, gradient = unit(5, 4), draw(5, 4, seed=1)
    tangent = gradient - (gradient * point).sum(-1, keepdim=True) * point
    moved = sphere_gradient_step(point, gradient, lr=0.1)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close((moved * point).sum(-1).acos(), 0.1 * tangent.norm(dim=-1))
    assert ((moved * tangent).sum(-1) < 0).all()  # downhill
    # it stays in the plane of the point and the gradient
    for row, start, direction in zip(moved, point, tangent, strict=True):
        assert torch.linalg.svdvals(torch.stack([row, start, direction]))[-1] < 1e-12


def test_to_first_order_the_step_is_the_projected_gradient():
    point, gradient, lr = unit(3), draw(3, seed=1), 1e-6
    velocity = (sphere_gradient_step(point, gradient, lr=lr) - point) / lr
    projected = gradient - (gradient @ point) * point
    torch.testing.assert_close(velocity, -projected, rtol=0, atol=1e-5)


def test_a_gradient_that_points_outwards_moves_nothing():
    point = unit(3)
    torch.testing.assert_close(sphere_gradient_step(point, 5 * point, lr=1.0), point)
    torch.testing.assert_close(sphere_gradient_step(point, torch.zeros(3).double(), lr=1.0), point)


def test_a_thousand_steps_stay_on_the_sphere_and_find_the_top_eigenvector():
    matrix = positive_definite(4).float()
    point = unit(4, seed=3).float()
    for _ in range(1000):  # minimizing -x A x / 2, whose outward gradient is negative
        point = sphere_gradient_step(point, -matrix @ point, lr=0.1)
    assert point.norm().item() == pytest.approx(1, abs=1e-6)
    eigenvector = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    assert (point @ eigenvector).abs().item() == pytest.approx(1, abs=1e-5)


def test_a_positive_outward_gradient_does_not_make_rounding_grow():
    point, target = unit(4, seed=3).float(), unit(4, seed=5).float()
    for _ in range(500):  # the outward gradient is +1 at the end: errors would double each time
        point = sphere_gradient_step(point, -target + 20 * point, lr=0.05)
    assert point.norm().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(point, target, rtol=0, atol=1e-5)


def test_sphere_step_passes_gradcheck():
    gradient = draw(2, 3, seed=1).requires_grad_()
    raw = draw(2, 3).requires_grad_()

    def step(raw, gradient):
        return sphere_gradient_step(torch.nn.functional.normalize(raw, dim=-1), gradient, lr=0.3)

    assert torch.autograd.gradcheck(step, (raw, gradient))
    assert torch.autograd.gradgradcheck(step, (raw, gradient))


def test_a_point_off_the_sphere_is_refused():
    with pytest.raises(ValueError, match="point must lie on the unit sphere; got a vector of nor"):
        sphere_gradient_step(torch.tensor([[1.0, 0.0], [0.9, 0.0]]), torch.zeros(2, 2), lr=0.1)


# ---- the simplex


def distributions(*shape, seed=0):
    return draw(*shape, seed=seed).softmax(-1)


def test_a_unit_step_triples_the_odds():
    gradient = torch.tensor([0.0, math.log(3.0)])
    moved = simplex_gradient_step(torch.tensor([0.5, 0.5]), gradient, lr=1.0)
    torch.testing.assert_close(moved, torch.tensor([0.75, 0.25]))


def test_to_first_order_the_simplex_step_is_the_fisher_rao_gradient():
    p, gradient, lr = distributions(5), draw(5, seed=1), 1e-6
    velocity = (simplex_gradient_step(p, gradient, lr=lr) - p) / lr
    torch.testing.assert_close(velocity, -p * (gradient - p @ gradient), rtol=0, atol=1e-5)


def test_the_fisher_rao_gradient_is_the_natural_gradient_in_logits_carried_to_the_simplex():
    p, gradient = distributions(4), draw(4, seed=1)
    metric = torch.diag(p) - torch.outer(p, p)  # Fisher information of the logits
    natural = torch.linalg.pinv(metric) @ (metric @ gradient)
    torch.testing.assert_close(
        metric @ natural, p * (gradient - p @ gradient), rtol=1e-9, atol=1e-12
    )
    # and the step itself is the plain one in logits
    torch.testing.assert_close(
        simplex_gradient_step(p, gradient, lr=0.3), (p.log() - 0.3 * gradient).softmax(-1)
    )


def test_the_simplex_step_solves_its_mirror_descent_problem():
    p, gradient, lr = distributions(4), draw(4, seed=1), 0.7
    best = simplex_gradient_step(p, gradient, lr=lr)

    def objective(q):
        return lr * gradient @ q + (q * (q / p).log()).sum()

    for seed in range(20):
        other = (best.log() + 0.1 * draw(4, seed=seed)).softmax(-1)
        assert objective(other) > objective(best)


def test_a_constant_in_the_gradient_changes_nothing():
    p, gradient = distributions(3, 5), draw(3, 5, seed=1)
    torch.testing.assert_close(
        simplex_gradient_step(p, gradient + 1e4, lr=1.0),
        simplex_gradient_step(p, gradient, lr=1.0),
        rtol=1e-10,
        atol=0,
    )


def test_a_zero_probability_stays_zero_even_under_an_infinite_gradient():
    p = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    gradient = torch.tensor([0.0, math.log(3.0), -torch.inf], requires_grad=True)
    moved = simplex_gradient_step(p, gradient, lr=1.0)
    torch.testing.assert_close(moved, torch.tensor([0.75, 0.25, 0.0]))
    moved[0].backward()
    assert p.grad.isfinite().all() and gradient.grad.isfinite().all()


def test_an_enormous_step_lands_in_a_corner():
    moved = simplex_gradient_step(torch.tensor([0.2, 0.8]), torch.tensor([-1e4, 1e4]), lr=1e4)
    torch.testing.assert_close(moved, torch.tensor([1.0, 0.0]))


def test_simplex_step_passes_gradcheck():
    logits, gradient = draw(2, 3).requires_grad_(), draw(2, 3, seed=1).requires_grad_()

    def step(logits, gradient):
        return simplex_gradient_step(logits.softmax(-1), gradient, lr=0.3)

    assert torch.autograd.gradcheck(step, (logits, gradient))
    assert torch.autograd.gradgradcheck(step, (logits, gradient))


# ---- the Fisher-Rao distance


def test_distributions_without_overlap_are_pi_apart():
    distance = fisher_rao_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert distance.item() == pytest.approx(math.pi, rel=1e-6)


def test_fisher_rao_distance_agrees_with_the_arc_cosine():
    p, q = distributions(6, 4), distributions(6, 4, seed=1)
    expected = 2 * (p * q).sqrt().sum(-1).acos()
    torch.testing.assert_close(fisher_rao_distance(p, q), expected, rtol=1e-10, atol=0)


def test_fisher_rao_distance_is_the_length_of_the_path_under_the_fisher_metric():
    p, q = distributions(3), distributions(3, seed=1)
    a, b = p.sqrt(), q.sqrt()
    angle = (a @ b).acos()
    t = torch.linspace(0, 1, 2001, dtype=torch.float64).unsqueeze(-1)
    path = ((((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()).square()
    step, middle = path.diff(dim=0), (path[1:] + path[:-1]) / 2
    length = (step.square() / middle).sum(-1).sqrt().sum()  # the metric is 1 / p
    torch.testing.assert_close(fisher_rao_distance(p, q), length, rtol=1e-6, atol=0)


def test_half_the_squared_distance_is_the_divergence_close_by():
    p = distributions(4)
    for size in (1e-2, 1e-3):
        q = (p.log() + size * draw(4, seed=1)).softmax(-1)
        divergence = (p * (p / q).log()).sum()
        ratio = 0.5 * fisher_rao_distance(p, q).square() / divergence
        assert ratio.item() == pytest.approx(1, abs=2 * size)


def test_the_distance_is_symmetric_and_obeys_the_triangle_inequality():
    p, q, r = (distributions(50, 3, seed=seed) for seed in range(3))
    torch.testing.assert_close(fisher_rao_distance(p, q), fisher_rao_distance(q, p))
    detour = fisher_rao_distance(p, r) + fisher_rao_distance(r, q)
    assert (fisher_rao_distance(p, q) <= detour + 1e-12).all()


def test_nearby_distributions_keep_their_distance_in_float32():
    p = torch.tensor([0.5, 0.5])
    q = torch.tensor([0.5 + 1e-4, 0.5 - 1e-4])
    # the arc cosine of the nearest float32 numbers would give 0 or 7e-4
    assert fisher_rao_distance(p, q).item() == pytest.approx(2e-4, rel=1e-3)
    assert fisher_rao_distance(p, p).item() == 0


def test_fisher_rao_gradients_are_finite_at_corners_and_at_equality():
    for other in ([0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]):
        p = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
        fisher_rao_distance(p, torch.tensor(other)).backward()
        assert p.grad.isfinite().all()


def test_fisher_rao_distance_passes_gradcheck():
    def distance(first, second):
        return fisher_rao_distance(first.softmax(-1), second.softmax(-1))

    arguments = draw(2, 3).requires_grad_(), draw(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(distance, arguments)
    assert torch.autograd.gradgradcheck(distance, arguments)


# ---- the steps and the distance together

# each takes two tensors [batch, classes], the first of them on its manifold
ROW_FUNCTIONS = {
    "sphere": (unit, lambda x, y: sphere_gradient_step(x, y, lr=0.3)),
    "simplex": (distributions, lambda x, y: simplex_gradient_step(x, y, lr=0.3)),
    "distance": (distributions, lambda x, y: fisher_rao_distance(x, y)),
}


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_rows_of_a_batch_do_not_see_each_other(name):
    make, function = ROW_FUNCTIONS[name]
    first, second = make(2, 3, 4), make(2, 3, 4, seed=1)
    batched = function(first, second)
    torch.testing.assert_close(batched[1, 2], function(first[1, 2], second[1, 2]))
    strided = function(first.transpose(0, 1), second.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(strided, batched)
    assert function(first[:0], second[:0]).numel() == 0


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_computed_in_float32(name, dtype):
    # multiples of a quarter are exact in half precision
    simplex = torch.tensor([[0.25, 0.5, 0.25], [0.75, 0.0, 0.25]], dtype=dtype)
    sphere = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]], dtype=dtype)
    first = sphere if name == "sphere" else simplex
    second, function = simplex.flip(0), ROW_FUNCTIONS[name][1]
    value = function(first, second)
    assert value.dtype == torch.float32
    expected = function(first.double(), second.double())
    assert expected.dtype == torch.float64
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_rows_run_where_values_cannot_be_read(name):
    first = torch.empty(2, 3, device="meta", requires_grad=True)
    second = torch.empty(2, 3, device="meta", requires_grad=True)
    ROW_FUNCTIONS[name][1](first, second).sum().backward()
    assert first.grad.device.type == "meta" and second.grad.device.type == "meta"


def test_a_natural_step_runs_where_values_cannot_be_read():
    params = torch.empty(3, device="meta", requires_grad=True)
    fisher = torch.empty(3, 3, device="meta", requires_grad=True)
    natural_gradient_step(params, torch.empty(3, device="meta"), fisher, lr=1.0).sum().backward()
    assert params.grad.device.type == "meta" and fisher.grad.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_natural_step_is_computed_in_float32(dtype):
    params, gradient = draw(3).to(dtype), draw(3, seed=1).to(dtype)
    fisher = positive_definite(3).to(dtype)
    value = natural_gradient_step(params, gradient, fisher, lr=0.1, damping=0.1)
    assert value.dtype == torch.float32
    expected = natural_gradient_step(
        params.double(), gradient.double(), fisher.double(), lr=0.1, damping=0.1
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("sphere", "point", "gradient"),
        ("simplex", "probabilities", "gradient"),
        ("distance", "p", "q"),
    ],
)
def test_rows_refuse_what_does_not_fit(name, first, second):
    function = ROW_FUNCTIONS[name][1]
    row = torch.tensor([[1.0, 0.0]])
    with pytest.raises(
        ValueError, match=rf"{second} must have shape \(1, 2\), the shape of {first}"
    ):
        function(row, row[0])
    with pytest.raises(ValueError, match=f"{first} must have at least one entry along axis -1"):
        function(row[:, :0], row[:, :0])
    with pytest.raises(TypeError, match=f"{first} must be a floating-point tensor"):
        function(row.long(), row)
    with pytest.raises(TypeError, match=f"{second} must be a floating-point tensor"):
        function(row, row.long())


@pytest.mark.parametrize("step", [sphere_gradient_step, simplex_gradient_step])
def test_a_negative_rate_is_refused(step):
    with pytest.raises(ValueError, match="lr must not be negative; got -0.1"):
        step(torch.tensor([1.0, 0.0]), torch.zeros(2), lr=-0.1)


def test_what_does_not_sum_to_one_is_refused():
    half, whole = torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="probabilities must sum to 1 along the last axis"):
        simplex_gradient_step(half, whole, lr=0.1)
    with pytest.raises(ValueError, match="p must sum to 1 along the last axis"):
        fisher_rao_distance(half, whole)
    with pytest.raises(ValueError, match="q must sum to 1 along the last axis"):
        fisher_rao_distance(whole, half)
