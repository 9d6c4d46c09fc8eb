"""Tests of lmlosses.analysis.curvature."""

import gc

import pytest
import torch

from lmlosses import cpu_generator
from lmlosses.analysis.curvature import (
    gauss_newton_product,
    gauss_newton_vp,
    hessian,
    hessian_product,
    hvp,
)
from lmlosses.analysis.geometry import fisher_information

SAMPLES, INPUTS, HIDDEN, CLASSES = 6, 2, 3, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=cpu_generator(seed), dtype=torch.float64)


def problem():
    """A network with curved outputs, its cross-entropy, and both as functions of one vector."""
    model = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, CLASSES)
    ).double()
    for index, param in enumerate(model.parameters()):
        param.data = draw(*param.shape, seed=index)
    inputs, targets = draw(SAMPLES, INPUTS, seed=9), torch.arange(SAMPLES) % CLASSES
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def outputs():
        return model(inputs)

    def of_outputs(logits):
        return torch.nn.functional.cross_entropy(logits, targets)

    def outputs_at(flat):
        parts = flat.split([param.numel() for param in params])
        named = {n: v.view_as(p) for n, v, p in zip(names, parts, params, strict=True)}
        return torch.func.functional_call(model, named, (inputs,))

    return outputs, of_outputs, params, outputs_at


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def vectors_like(params, seed=5):
    return [draw(*param.shape, seed=seed + index) for index, param in enumerate(params)]


def exact_hessian():
    outputs, of_outputs, params, outputs_at = problem()
    return torch.func.hessian(lambda w: of_outputs(outputs_at(w)))(flat(params))


# ---- Hessian


def test_hvp_of_a_quadratic_is_its_matrix_times_the_vector():
    matrix = draw(4, 4)
    matrix = matrix + matrix.T
    w = draw(4, seed=1).requires_grad_()
    v = draw(4, seed=2)
    (found,) = hvp(lambda: 0.5 * w @ matrix @ w, [w], [v])
    torch.testing.assert_close(found, matrix @ v, rtol=1e-13, atol=1e-13)


def test_hvp_agrees_with_torch_func_hessian():
    outputs, of_outputs, params, _ = problem()
    v = vectors_like(params)
    found = hvp(lambda: of_outputs(outputs()), params, v)
    assert [t.shape for t in found] == [p.shape for p in params]
    torch.testing.assert_close(flat(found), exact_hessian() @ flat(v), rtol=1e-10, atol=1e-12)


def test_hvp_is_the_difference_of_two_gradients():
    outputs, of_outputs, params, outputs_at = problem()
    v, here, h = vectors_like(params), flat(params), 1e-5
    gradient = torch.func.grad(lambda w: of_outputs(outputs_at(w)))
    expected = (gradient(here + h * flat(v)) - gradient(here - h * flat(v))) / (2 * h)
    found = flat(hvp(lambda: of_outputs(outputs()), params, v))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_hessian_agrees_with_torch_func_hessian():
    outputs, of_outputs, params, _ = problem()
    found = hessian(lambda: of_outputs(outputs()), params)
    torch.testing.assert_close(found, exact_hessian(), rtol=1e-10, atol=1e-12)


def test_hessian_product_gives_the_same_at_every_call_even_under_dropout():
    w = draw(50).requires_grad_()
    product = hessian_product(lambda: torch.nn.functional.dropout(w, 0.5).pow(4).sum(), [w])
    ones = [torch.ones_like(w)]
    first, second = product(ones)[0], product(ones)[0]
    assert torch.equal(first, second) and (first == 0).any() and (first > 0).any()


def test_parameters_that_the_loss_does_not_see_have_a_zero_block():
    w, unused = draw(2).requires_grad_(), draw(3).requires_grad_()
    found = hessian(lambda: (w**3).sum(), [w, unused])
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[0, 0], expected[1, 1] = 6 * w[0], 6 * w[1]
    torch.testing.assert_close(found, expected.detach())


def test_a_linear_loss_has_no_curvature():
    w, u = draw(2).requires_grad_(), draw(2).requires_grad_()
    assert not hessian(lambda: w.sum(), [w]).any()
    assert not hessian(lambda: w.sum() + u.square().sum(), [w, u])[:2].any()


def test_a_parameter_of_no_dimension_is_a_parameter():
    w = torch.tensor(2.0, requires_grad=True)
    assert hvp(lambda: w**3, [w], [torch.tensor(1.0)])[0] == 12
    assert hessian(lambda: w**3, [w]).tolist() == [[12.0]]


def test_nan_in_the_loss_comes_out_as_nan():
    w = torch.tensor([-1.0], requires_grad=True)
    assert hvp(lambda: w.sqrt().sum(), [w], [torch.ones(1)])[0].isnan().all()


def test_products_work_under_no_grad_and_leave_no_gradient_and_no_graph():
    outputs, of_outputs, params, _ = problem()
    with torch.no_grad():
        found = hvp(lambda: of_outputs(outputs()), params, vectors_like(params))
    assert all(param.grad is None for param in params)
    assert not any(tensor.requires_grad for tensor in found)


def test_products_do_not_keep_tensors_alive():
    outputs, of_outputs, params, _ = problem()
    v = vectors_like(params)

    def alive():
        hvp(lambda: of_outputs(outputs()), params, v)
        gauss_newton_vp(outputs, of_outputs, params, v)
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        counts = [alive() for _ in range(4)]
    finally:
        gc.enable()
    assert counts[1] == counts[-1]


def test_half_precision_parameters_get_a_hessian_in_float32():
    w = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    found = hessian(lambda: w.float().square().sum(), [w])
    assert found.dtype == torch.float32
    assert torch.equal(found, 2 * torch.eye(2))


def test_products_run_without_reading_the_device():
    w = torch.zeros(3, 2, device="meta", requires_grad=True)
    v = [torch.zeros(3, 2, device="meta")]
    assert hvp(lambda: w.pow(3).sum(), [w], v)[0].shape == (3, 2)
    assert hessian(lambda: w.pow(3).sum(), [w]).shape == (6, 6)
    square = lambda z: z.square().sum()  # noqa: E731
    assert gauss_newton_vp(lambda: w.exp(), square, [w], v)[0].shape == (3, 2)


# ---- Gauss-Newton


def test_gauss_newton_is_the_jacobian_around_the_hessian_of_the_loss_in_the_outputs():
    outputs, of_outputs, params, outputs_at = problem()
    v = vectors_like(params)
    jacobian = torch.func.jacrev(outputs_at)(flat(params)).flatten(0, 1)
    logits = outputs().detach()
    middle = torch.func.hessian(of_outputs)(logits).reshape(logits.numel(), -1)
    expected = jacobian.T @ middle @ jacobian @ flat(v)
    found = flat(gauss_newton_vp(outputs, of_outputs, params, v))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    # the loss is curved in the parameters, so this is not the Hessian
    assert (found - exact_hessian() @ flat(v)).norm() > 0.01 * found.norm()


def test_gauss_newton_of_cross_entropy_is_the_fisher_information():
    outputs, of_outputs, params, outputs_at = problem()
    v = vectors_like(params)
    fisher = fisher_information(outputs_at, flat(params))
    found = flat(gauss_newton_product(outputs, of_outputs, params)(v))
    torch.testing.assert_close(found, fisher @ flat(v), rtol=1e-10, atol=1e-12)


def test_gauss_newton_is_the_hessian_where_outputs_are_linear():
    features, targets = draw(SAMPLES, INPUTS), torch.arange(SAMPLES) % CLASSES
    w = draw(CLASSES, INPUTS, seed=1).requires_grad_()
    v = [draw(CLASSES, INPUTS, seed=2)]

    def of_outputs(logits):
        return torch.nn.functional.cross_entropy(logits, targets)

    found = gauss_newton_vp(lambda: features @ w.T, of_outputs, [w], v)
    torch.testing.assert_close(found, hvp(lambda: of_outputs(features @ w.T), [w], v))


def test_gauss_newton_skips_what_the_outputs_do_not_see_and_losses_without_curvature():
    w, unused = draw(2).requires_grad_(), draw(3).requires_grad_()
    v = vectors_like([w, unused])
    found = gauss_newton_vp(lambda: w.exp(), lambda z: z.square().sum(), [w, unused], v)
    torch.testing.assert_close(found[0], (2 * (2 * w).exp() * v[0]).detach())
    assert not found[1].any()
    assert not gauss_newton_vp(lambda: w.exp(), torch.sum, [w], v[:1])[0].any()


# ---- bad input


@pytest.fixture
def w():
    return torch.ones(2, requires_grad=True)


def test_losses_that_are_no_single_number_are_refused(w):
    with pytest.raises(ValueError, match=r"loss must return one number.*got shape \(2,\)"):
        hvp(lambda: w**2, [w], [torch.ones(2)])
    with pytest.raises(ValueError, match=r"loss must return one number.*got shape \(1,\)"):
        hessian(lambda: (w**2).sum(dim=0, keepdim=True), [w])
    with pytest.raises(ValueError, match=r"loss must return one number.*got shape \(2,\)"):
        gauss_newton_product(lambda: w, lambda z: z, [w])


def test_losses_without_a_graph_are_refused(w):
    with pytest.raises(ValueError, match="loss must depend on .*got a constant"):
        hvp(lambda: (w**2).sum().detach(), [w], [torch.ones(2)])
    with pytest.raises(ValueError, match="outputs must depend on .*got a constant"):
        gauss_newton_product(lambda: w.detach(), torch.sum, [w])
    with pytest.raises(ValueError, match="loss must depend on .*got a constant"):
        gauss_newton_product(lambda: w, lambda z: z.detach().sum(), [w])


def test_losses_that_are_no_real_numbers_are_refused(w):
    with pytest.raises(TypeError, match="loss must be a floating-point tensor; got torch.int64"):
        hessian(lambda: w.sum().long(), [w])
    with pytest.raises(TypeError, match="outputs must be a floating-point tensor; got torch.int"):
        gauss_newton_product(lambda: w.long(), torch.sum, [w])


@pytest.mark.bad_input
def test_losses_that_return_a_number_are_refused(w):
    with pytest.raises(TypeError, match="loss must be a torch.Tensor; got float 1.0"):
        hessian(lambda: 1.0, [w])


def test_parameters_that_cannot_be_differentiated_by_are_refused(w):
    with pytest.raises(ValueError, match=r"params\[1\] must require a gradient"):
        hessian(lambda: w.sum(), [w, torch.ones(1)])
    with pytest.raises(TypeError, match=r"params\[1\] must be a floating-point.*got torch.int64"):
        hessian(lambda: w.sum(), [w, torch.ones(1, dtype=torch.long)])


def test_problems_without_parameters_are_refused(w):
    with pytest.raises(ValueError, match="params must hold at least one entry; got 0 tensors"):
        hessian(lambda: w.sum(), [])
    with pytest.raises(ValueError, match="params must hold at least one entry; got 1 tensors"):
        hessian(lambda: w.sum(), [torch.zeros(0, requires_grad=True)])


def test_parameters_that_come_twice_are_refused(w):
    with pytest.raises(ValueError, match=r"got params\[0\] again as params\[1\]"):
        hessian(lambda: w.sum(), [w, w])


@pytest.mark.bad_input
def test_one_tensor_is_no_list_of_parameters(w):
    with pytest.raises(TypeError, match=r"params must be a list of tensors; got one tensor"):
        hessian(lambda: w.sum(), w)


def test_vectors_that_do_not_fit_are_refused(w):
    with pytest.raises(ValueError, match="vectors must be a list of 1 tensors.*got 2"):
        hvp(lambda: w.sum(), [w], [torch.ones(2), torch.ones(2)])
    with pytest.raises(ValueError, match=r"vectors\[0\] must have shape \(2,\).*got \(2, 1\)"):
        hvp(lambda: w.sum(), [w], [torch.ones(2, 1)])
    with pytest.raises(TypeError, match=r"vectors\[0\] must be a floating-point tensor"):
        hvp(lambda: w.sum(), [w], [torch.ones(2, dtype=torch.long)])
    with pytest.raises(ValueError, match=r"vectors\[0\] must be on cpu.*got meta"):
        hvp(lambda: w.sum(), [w], [torch.ones(2, device="meta")])
