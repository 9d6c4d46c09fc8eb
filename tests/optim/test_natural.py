import pytest
import torch
from torch import nn

from lmlosses.analysis.geometry import fisher_information, natural_gradient_step
from lmlosses.optim.natural import NaturalGradient, conjugate_gradients

DOUBLE = torch.float64


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _positive(size, seed=0):
    root = _draw(size, size, seed=seed)
    return root @ root.T + torch.eye(size, dtype=DOUBLE)


def _param(values, grad):
    param = nn.Parameter(values.clone())
    param.grad = grad.clone()
    return param


def _dense(matrix, params):
    """The product with a matrix on all entries of the parameters in turn."""

    def product(vectors):
        flat = matrix @ torch.cat([vector.reshape(-1) for vector in vectors])
        parts = flat.split([param.numel() for param in params])
        return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]

    return product


class Classifier:
    """Two layers, eight samples, three classes; parameters as a list or as one vector."""

    def __init__(self):
        self.inputs, self.targets = _draw(8, 4, seed=1), torch.arange(8) % 3
        self.shapes = [(4, 3), (3,), (3, 3)]
        self.start = [0.5 * _draw(*shape, seed=2 + i) for i, shape in enumerate(self.shapes)]

    def logits(self, first, bias, second):
        return (self.inputs @ first + bias).tanh() @ second

    def from_vector(self, vector):
        parts = vector.split([12, 3, 9])
        return self.logits(*(p.view(s) for p, s in zip(parts, self.shapes, strict=True)))

    def product(self, params):
        """Fisher products without a Jacobian: forward mode, the softmax's metric, reverse mode."""
        values = tuple(param.detach() for param in params)

        def times(vectors):
            logits, slope = torch.func.jvp(self.logits, values, tuple(vectors))
            p = logits.softmax(dim=-1)
            pulled = p * (slope - (p * slope).sum(dim=-1, keepdim=True)) / len(logits)
            return torch.func.vjp(self.logits, *values)[1](pulled)

        return times


def test_a_stretched_axis_is_stepped_along_as_if_it_were_not():
    stretched = torch.tensor([4.0, 1.0])
    param = _param(torch.zeros(2), torch.tensor([4.0, 1.0]))
    optimizer = NaturalGradient([param], lr=0.5, damping=0.0)
    optimizer.step(fisher_product=lambda vectors: [stretched * v for v in vectors])
    torch.testing.assert_close(param.data, torch.tensor([-0.5, -0.5]))


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_steps_of_a_classifier_agree_with_the_step_through_its_matrix(damping):
    task = Classifier()
    params = [nn.Parameter(value.clone()) for value in task.start]
    vector = torch.cat([value.reshape(-1) for value in task.start])
    optimizer = NaturalGradient(params, lr=0.5, damping=damping, iterations=80, tolerance=1e-15)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(task.logits(*params), task.targets).backward()
        gradient = torch.cat([param.grad.reshape(-1) for param in params])
        fisher = fisher_information(task.from_vector, vector)
        vector = natural_gradient_step(vector, gradient, fisher, lr=0.5, damping=damping)
        optimizer.step(fisher_product=task.product(params))
    found = torch.cat([param.detach().reshape(-1) for param in params])
    torch.testing.assert_close(found, vector, rtol=1e-9, atol=1e-9)


def test_on_a_quadratic_one_step_goes_to_the_minimum():
    matrix, minimum, start = _positive(6), _draw(6, seed=4), _draw(6, seed=5)
    param = _param(start, matrix @ (start - minimum))
    optimizer = NaturalGradient([param], lr=1.0, damping=0.0, tolerance=1e-14)
    optimizer.step(fisher_product=lambda vectors: [matrix @ vectors[0]])
    torch.testing.assert_close(param.data, minimum, rtol=1e-10, atol=1e-10)


def test_the_step_does_not_depend_on_the_coordinates():
    matrix, gradient, change = _positive(5), _draw(5, seed=1), _draw(5, 5, seed=2)
    steps = []
    # w = C u: the gradient becomes C^T g, the Fisher matrix C^T F C, and a step du moves C du
    for coordinates in (torch.eye(5, dtype=DOUBLE), change):
        param = _param(torch.zeros(5, dtype=DOUBLE), coordinates.T @ gradient)
        fisher = coordinates.T @ matrix @ coordinates
        optimizer = NaturalGradient([param], damping=0.0, iterations=50, tolerance=1e-14)
        optimizer.step(fisher_product=lambda vectors, fisher=fisher: [fisher @ vectors[0]])
        steps.append(coordinates @ param.data)
    torch.testing.assert_close(*steps, rtol=1e-8, atol=1e-8)


def test_much_damping_leaves_a_gradient_step():
    matrix, gradient = _positive(5), _draw(5, seed=1)
    param = _param(torch.zeros(5, dtype=DOUBLE), gradient)
    optimizer = NaturalGradient([param], lr=1e9, damping=1e9)
    optimizer.step(fisher_product=lambda vectors: [matrix @ vectors[0]])
    torch.testing.assert_close(param.data, -gradient, rtol=1e-6, atol=1e-6)


def test_each_group_has_its_own_rate_and_damping():
    first, second = (_param(torch.zeros(3), torch.ones(3)) for _ in range(2))
    groups = [{"params": [first], "damping": 1.0}, {"params": [second], "damping": 3.0, "lr": 2.0}]
    optimizer = NaturalGradient(groups, lr=1.0)
    optimizer.step(fisher_product=lambda vectors: [0 * v for v in vectors])
    torch.testing.assert_close(first.data, torch.full((3,), -1.0))
    torch.testing.assert_close(second.data, torch.full((3,), -2 / 3))


def test_a_parameter_without_gradient_is_a_constant_to_the_others():
    matrix = _positive(5)
    moving, still = _param(_draw(3), _draw(3, seed=1)), nn.Parameter(_draw(2, seed=2))
    before = (moving.detach().clone(), still.detach().clone())
    seen = []
    full = _dense(matrix, [moving, still])

    def product(vectors):
        seen.append(vectors[1].clone())
        return full(vectors)

    optimizer = NaturalGradient([moving, still], damping=0.0, tolerance=1e-14)
    optimizer.step(fisher_product=product)
    expected = before[0] - torch.linalg.solve(matrix[:3, :3], moving.grad)
    torch.testing.assert_close(moving.data, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(still, before[1]) and not torch.stack(seen).any()


def test_the_product_may_be_differentiated_through_and_sees_the_closures_parameters():
    param = nn.Parameter(torch.tensor([2.0, 1.0], dtype=DOUBLE))
    optimizer = NaturalGradient([param], lr=1.0, damping=0.0, tolerance=1e-14)
    graph = {}

    def closure():
        loss = (param**4).sum()
        (param.grad,) = torch.autograd.grad(loss, param)
        (graph["slope"],) = torch.autograd.grad((param**4).sum(), param, create_graph=True)
        return loss

    def hessian_product(vectors):
        return torch.autograd.grad(graph["slope"] @ vectors[0], param, retain_graph=True)

    assert optimizer.step(closure, fisher_product=hessian_product).item() == 17.0
    # Newton's step for the fourth power: a third of the way
    expected = torch.tensor([4 / 3, 2 / 3], dtype=DOUBLE)
    torch.testing.assert_close(param.data, expected, rtol=1e-12, atol=1e-12)


# conjugate gradients


def test_conjugate_gradients_solve_in_as_many_products_as_there_are_entries():
    matrix, right = _positive(7), _draw(7, seed=3)
    found = conjugate_gradients(lambda v: matrix @ v, right, iterations=7, tolerance=0.0)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("looks", [True, False])
def test_after_the_tolerance_nothing_changes_and_where_it_may_look_nothing_is_computed(
    looks, monkeypatch
):
    matrix, right = _positive(7), _draw(7, seed=3)
    calls = []

    def product(vector):
        calls.append(vector)
        return matrix @ vector

    early = conjugate_gradients(product, right, iterations=100, tolerance=1e-2)
    needed = len(calls)
    if not looks:  # as on a device
        monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    calls.clear()
    found = conjugate_gradients(product, right, iterations=100, tolerance=1e-2)
    assert torch.equal(found, early)
    assert len(calls) == (needed if looks else 100) and needed < 7
    assert (matrix @ found - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize("looks", [True, False])
def test_where_the_matrix_is_not_positive_the_solution_stays(looks, monkeypatch):
    if not looks:
        monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=DOUBLE))
    right = torch.tensor([1.0, 1.0], dtype=DOUBLE)
    found = conjugate_gradients(lambda v: matrix @ v, right, iterations=5, tolerance=0.0)
    assert torch.equal(found, torch.zeros(2, dtype=DOUBLE))


@pytest.mark.parametrize("looks", [True, False])
def test_a_gradient_of_zero_is_left_alone(looks, monkeypatch):
    if not looks:
        monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    found = conjugate_gradients(lambda v: v, torch.zeros(3), iterations=5, tolerance=0.0)
    assert torch.equal(found, torch.zeros(3))


# errors


@pytest.mark.bad_input
def test_a_step_without_curvature_is_refused():
    param = _param(torch.zeros(2), torch.ones(2))
    optimizer = NaturalGradient([param])
    with pytest.raises(TypeError, match="fisher_product"):
        optimizer.step()
    with pytest.raises(TypeError, match="fisher_product must be a function; got None"):
        optimizer.step(fisher_product=None)
    assert not param.any()


@pytest.mark.bad_input
def test_products_of_other_shapes_are_refused():
    param = _param(torch.zeros(2), torch.ones(2))
    optimizer = NaturalGradient([param])
    with pytest.raises(ValueError, match="must return 1 tensors, one for each parameter; got 2"):
        optimizer.step(fisher_product=lambda vectors: [vectors[0], vectors[0]])
    with pytest.raises(ValueError, match=r"tensor 0 of fisher_product must have shape \(2,\)"):
        optimizer.step(fisher_product=lambda vectors: [vectors[0][:1]])
    assert not param.any()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1.0}, r"damping must not be negative; got -1\.0"),
        ({"tolerance": -1.0}, r"tolerance must not be negative; got -1\.0"),
        ({"iterations": 0}, "iterations must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NaturalGradient([nn.Parameter(torch.zeros(1))], **settings)


@pytest.mark.bad_input
def test_groups_are_solved_together_and_cannot_differ_in_how():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "iterations": 3}]
    with pytest.raises(ValueError, match="iterations must be the same in all groups.*20; got 3"):
        NaturalGradient(groups)
