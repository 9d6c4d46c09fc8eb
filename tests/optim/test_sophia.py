import copy
import itertools
import math

import pytest
import torch
from pytorch_optimizer import SophiaH as TheirSophiaH
from torch import Tensor
from torch.nn import functional

from lmlosses.optim.sophia import SophiaG, SophiaH

F64 = torch.float64
PLAIN = {"betas": (0.0, 0.0), "gamma": 1.0, "weight_decay": 0.0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64)


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=F64))


def bowl(curvature: Tensor, point: Tensor) -> Tensor:
    """A loss whose Hessian is diagonal, so that random signs give it exactly."""
    return (curvature * point.square()).sum() / 2


def gauss_newton_diagonal(inputs: Tensor, weight: Tensor) -> Tensor:
    """Of softmax regression, by hand: mean of x_i^2 p_c (1 - p_c), one row a class."""
    p = (inputs @ weight.T).softmax(dim=-1)
    return torch.einsum("nc,ni->ci", p * (1 - p), inputs.square()) / len(inputs)


def one_estimate(inputs: Tensor, weight: Tensor, **settings) -> Tensor:
    param = torch.nn.Parameter(weight.clone())
    optimizer = SophiaG([param], **PLAIN)
    optimizer.update_curvature(inputs @ param.T, **settings)
    return optimizer.state[param]["hessian"]


# the step


def test_step_is_newtons_in_a_bowl_and_a_sign_step_where_curvature_is_not_positive():
    param = parameter(0.6, 3.0, 2.0, 2.0)
    optimizer = SophiaH([param], lr=1.0, **PLAIN)
    loss = bowl(torch.tensor([5.0, 0.1, -3.0, 1e-13], dtype=F64), param)
    optimizer.update_curvature(loss)
    loss.backward()
    optimizer.step()
    # Newton reaches the bottom; a step of 3 is clipped to 1; uphill curvature still goes down;
    # a gradient of 2e-13 under the floor 1e-12 gives 0.2
    torch.testing.assert_close(param.data, torch.tensor([0.0, 2.0, 3.0, 1.8], dtype=F64))


def test_two_steps_by_hand():
    param = parameter(1.0)
    optimizer = SophiaH(
        [param], lr=0.5, betas=(0.5, 0.75), gamma=2.0, weight_decay=0.2, update_every=2
    )
    loss = 4 * param.square().sum() / 2
    optimizer.update_curvature(loss)  # h = 0.25 * 4 = 1
    param.grad = torch.tensor([3.0], dtype=F64)
    optimizer.step()  # m = 1.5, quotient 1.5 / 2; 1 - 0.1 - 0.5 * 0.75
    torch.testing.assert_close(param.data, torch.tensor([0.525], dtype=F64))
    param.grad = torch.tensor([9.0], dtype=F64)
    optimizer.step()  # m = 5.25, clipped to 1; 0.9 * 0.525 - 0.5
    torch.testing.assert_close(param.data, torch.tensor([-0.0275], dtype=F64))


def slow_loop(point, gradients, estimates, *, lr, beta1, beta2, gamma, eps, decay, every):
    """Algorithm 3 entry by entry in plain numbers."""
    point = point.tolist()
    m, h = [0.0] * len(point), [0.0] * len(point)
    for t, gradient in enumerate(gradients, start=1):
        for i in range(len(point)):
            m[i] = beta1 * m[i] + (1 - beta1) * gradient[i].item()
            if (t - 1) % every == 0:
                h[i] = beta2 * h[i] + (1 - beta2) * estimates[t - 1][i].item()
            quotient = m[i] / max(gamma * h[i], eps)
            point[i] -= lr * decay * point[i]
            point[i] -= lr * max(-1.0, min(1.0, quotient))
    return torch.tensor(point, dtype=F64)


@pytest.mark.parametrize("every", [1, 10])
def test_fifty_steps_agree_with_a_slow_loop_from_the_paper(every):
    param = torch.nn.Parameter(normal(6))
    gradients, estimates = normal(50, 6, seed=1), normal(50, 6, seed=2) * 3 + 2
    settings = {"lr": 0.02, "gamma": 0.3, "eps": 1e-12}
    optimizer = SophiaH(
        [param], betas=(0.9, 0.8), weight_decay=0.1, update_every=every, **settings
    )
    expected = slow_loop(
        param.detach(), gradients, estimates, beta1=0.9, beta2=0.8, decay=0.1, every=every,
        **settings,
    )  # fmt: skip
    for gradient, estimate in zip(gradients, estimates, strict=True):
        if optimizer.needs_curvature:
            optimizer.update_curvature(bowl(estimate, param))
        param.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(param.data, expected, rtol=1e-12, atol=1e-12)


def test_fifty_steps_agree_with_version_one_of_the_paper_as_pytorch_optimizer_has_it():
    ours, theirs = (torch.nn.Parameter(normal(3, 4)) for _ in range(2))
    rho, lr, decay = 0.04, 0.06, 0.5
    mine = SophiaH(
        [ours], lr=lr * rho, gamma=rho, eps=rho * 1e-12, weight_decay=decay / rho, betas=(0.9, 0.8)
    )
    reference = TheirSophiaH(
        [theirs], lr=lr, p=rho, eps=1e-12, weight_decay=decay, betas=(0.9, 0.8)
    )
    for step in range(50):
        ours.grad, theirs.grad = normal(3, 4, seed=step), normal(3, 4, seed=step)
        given = None
        if mine.needs_curvature:
            curvature = normal(3, 4, seed=100 + step) * 3 + 2
            mine.update_curvature(bowl(curvature, ours))
            given = [curvature]
        mine.step()
        reference.step(hessian=given)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def official_step(point, momentum, hessian, grad, *, lr, beta1, rho, bs, decay):
    """The authors' code restated: the batch factor is in the step, 1e-15 is added."""
    point = point * (1 - lr * decay)
    momentum = beta1 * momentum + (1 - beta1) * grad
    ratio = (momentum.abs() / (rho * bs * hessian + 1e-15)).clamp(max=1)
    return point - lr * momentum.sign() * ratio, momentum


def test_fifty_steps_agree_with_the_authors_code_once_its_batch_size_is_ours():
    inputs, targets = normal(12, 3), torch.arange(12) % 4
    param = torch.nn.Parameter(normal(4, 3, seed=1))
    optimizer = SophiaG([param], lr=0.02, betas=(0.9, 0.8), gamma=0.3, weight_decay=0.1)
    point, momentum, hessian = param.detach(), torch.zeros(4, 3), torch.zeros(4, 3)
    for step in range(50):
        logits = inputs @ param.T
        if optimizer.needs_curvature:
            optimizer.update_curvature(logits, generator=torch.Generator().manual_seed(step))
            # the same labels: the estimate is 12 times their squared gradient
            fresh = SophiaG([param], **PLAIN)
            fresh.update_curvature(logits, generator=torch.Generator().manual_seed(step))
            hessian = 0.8 * hessian + 0.2 * fresh.state[param]["hessian"] / 12
        optimizer.zero_grad()
        functional.cross_entropy(logits, targets).backward()
        point, momentum = official_step(
            point, momentum, hessian, param.grad, lr=0.02, beta1=0.9, rho=0.3, bs=12, decay=0.1
        )
        optimizer.step()
    torch.testing.assert_close(param.data, point, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("curvature", [-1e30, -1.0, 0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("gradient", [-1e30, -1e-30, 0.0, 1.0])
def test_no_entry_moves_by_more_than_the_learning_rate(curvature, gradient):
    param = parameter(0.0)
    optimizer = SophiaH([param], lr=0.1, **PLAIN)
    optimizer.update_curvature(bowl(torch.tensor([curvature], dtype=F64), param))
    param.grad = torch.tensor([gradient], dtype=F64)
    optimizer.step()
    assert abs(param.item()) <= 0.1 and param.item() * gradient <= 0


def test_without_a_gradient_only_the_decay_moves_a_weight():
    param = parameter(2.0)
    optimizer = SophiaH([param], lr=0.1, weight_decay=0.5)
    optimizer.update_curvature(bowl(torch.tensor([0.0], dtype=F64), param))
    param.grad = torch.zeros(1, dtype=F64)
    optimizer.step()
    torch.testing.assert_close(param.data, torch.tensor([1.9], dtype=F64))


def test_minimum_is_a_fixed_point():
    param = parameter(0.0, 0.0)
    optimizer = SophiaH([param], lr=0.1)
    for _ in range(20):
        loss = bowl(torch.tensor([1e6, 1e-6], dtype=F64), param)
        if optimizer.needs_curvature:
            optimizer.update_curvature(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(param.data, torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("way", [{"foreach": True}, {"foreach": False}])
def test_lists_of_tensors_give_the_same_step(way):
    params = [parameter(1.0, 2.0), parameter(3.0)]
    alone = [parameter(1.0, 2.0), parameter(3.0)]
    for group, optimizer in (
        (params, SophiaH(params, lr=0.1, **way)),
        (alone, SophiaH(alone, lr=0.1)),
    ):  # noqa: E501
        for _ in range(12):
            loss = sum(p.square().sum() for p in group)
            if optimizer.needs_curvature:
                optimizer.update_curvature(loss, generator=torch.Generator().manual_seed(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))


# Gauss-Newton-Bartlett


def test_expected_gnb_estimate_is_the_gauss_newton_diagonal_over_all_labels(monkeypatch):
    inputs, weight = normal(3, 2), normal(4, 2, seed=1)
    p = (inputs @ weight.T).softmax(dim=-1)
    expected = torch.zeros(4, 2, dtype=F64)
    for labels in itertools.product(range(4), repeat=3):
        chosen = torch.tensor(labels)
        monkeypatch.setattr("lmlosses.optim.sophia._sample", lambda *_, chosen=chosen: chosen)
        chance = p[torch.arange(3), chosen].prod()
        expected += chance * one_estimate(inputs, weight)
    truth = gauss_newton_diagonal(inputs, weight)
    torch.testing.assert_close(expected, truth, rtol=1e-12, atol=1e-12)


def test_mean_of_many_gnb_estimates_covers_the_gauss_newton_diagonal():
    inputs, weight, draws = normal(5, 2), normal(3, 2, seed=1), 400
    generator = torch.Generator().manual_seed(3)
    found = torch.stack([one_estimate(inputs, weight, generator=generator) for _ in range(draws)])
    error = found.std(dim=0) / math.sqrt(draws)
    truth = gauss_newton_diagonal(inputs, weight)
    assert ((found.mean(dim=0) - truth).abs() < 4 * error).all()
    # and the interval is narrow enough to tell the batch factor of 5
    assert ((found.mean(dim=0) / 5 - truth).abs() > 8 * error / 5).all()


def test_gnb_estimate_is_the_squared_gradient_of_the_mean_times_the_batch():
    inputs, weight = normal(6, 3), normal(4, 3, seed=1)
    generator = torch.Generator().manual_seed(7)
    found = one_estimate(inputs, weight, generator=generator)
    clock = torch.empty(6, 4, dtype=F64).exponential_(generator=torch.Generator().manual_seed(7))
    p = (inputs @ weight.T).softmax(dim=-1)
    labels = (p / clock).argmax(dim=-1)
    gradient = (p - functional.one_hot(labels, 4)).T @ inputs / 6
    torch.testing.assert_close(found, 6 * gradient.square(), rtol=1e-12, atol=1e-12)


def test_labels_follow_the_models_own_distribution():
    from lmlosses.optim.sophia import _sample

    p = torch.tensor([0.7, 0.2999, 1e-4], dtype=torch.float32)
    labels = _sample(p.log().expand(200_000, 3), torch.Generator().manual_seed(0))
    counts = labels.bincount(minlength=3)
    spread = (200_000 * p * (1 - p)).sqrt()
    assert ((counts - 200_000 * p).abs() < 4 * spread).all()


def test_impossible_classes_are_never_drawn():
    logits = torch.tensor([0.0, -math.inf, 0.0]).expand(1000, 3).clone().requires_grad_()
    param = logits.detach().clone().requires_grad_()
    optimizer = SophiaG([param], **PLAIN)
    optimizer.update_curvature(param)
    found = optimizer.state[param]["hessian"]
    assert found[:, 1].eq(0).all() and found[:, 0].gt(0).all()


def test_masked_positions_do_not_count_even_when_they_are_nan():
    inputs, weight = normal(5, 3), normal(4, 3, seed=1)
    mask = torch.tensor([True, False, True, True, False])
    with_nan = torch.where(mask.unsqueeze(-1), inputs, torch.nan)
    param = torch.nn.Parameter(weight.clone())
    optimizer = SophiaG([param], **PLAIN)
    rows = torch.where(mask.unsqueeze(-1), inputs, 0.0) @ param.T
    rows = torch.where(mask.unsqueeze(-1), rows, with_nan.sum(dim=-1, keepdim=True))
    optimizer.update_curvature(rows, mask, generator=torch.Generator().manual_seed(2))
    clock = torch.empty(5, 4, dtype=F64).exponential_(generator=torch.Generator().manual_seed(2))
    p = (inputs @ weight.T).softmax(dim=-1)
    error = (p - functional.one_hot((p / clock).argmax(dim=-1), 4))[mask]
    expected = 3 * (error.T @ inputs[mask] / 3).square()
    torch.testing.assert_close(optimizer.state[param]["hessian"], expected)


def test_shape_of_the_batch_does_not_matter():
    inputs, weight = normal(6, 3), normal(4, 3, seed=1)
    flat, shaped = (
        one_estimate(x, weight, generator=torch.Generator().manual_seed(1))
        for x in (inputs, inputs.view(2, 3, 3))
    )
    torch.testing.assert_close(flat, shaped)
    one = one_estimate(inputs[0], weight, generator=torch.Generator().manual_seed(1))
    row = one_estimate(inputs[:1], weight, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one, row)


def test_nothing_counted_gives_a_curvature_of_zero():
    found = one_estimate(normal(2, 3), normal(4, 3), mask=torch.zeros(2, dtype=torch.bool))
    assert torch.equal(found, torch.zeros(4, 3, dtype=F64))


@pytest.mark.parametrize("backward_first", [True, False])
def test_one_forward_pass_serves_the_curvature_and_the_gradient(backward_first):
    inputs, param = normal(6, 3), torch.nn.Parameter(normal(4, 3, seed=1))
    optimizer = SophiaG([param])
    logits = inputs @ param.T
    loss = functional.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    if backward_first:
        loss.backward(retain_graph=True)
        before = param.grad.clone()
    optimizer.update_curvature(logits)
    if not backward_first:
        assert param.grad is None
        loss.backward()
    else:
        assert torch.equal(param.grad, before)


def test_batch_of_bfloat16_is_estimated_in_float32():
    param = torch.nn.Parameter(normal(4, 3).bfloat16())
    optimizer = SophiaG([param], **PLAIN)
    optimizer.update_curvature(normal(6, 3, seed=1).bfloat16() @ param.T)
    assert optimizer.state[param]["hessian"].dtype == torch.float32
    assert optimizer.state[param]["hessian"].gt(0).all()


# Hutchinson


def test_expected_hutchinson_estimate_over_all_signs_is_the_hessian_diagonal(monkeypatch):
    matrix = normal(3, 3)
    hessian = matrix + matrix.T
    param = torch.nn.Parameter(normal(3, seed=1))
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        u = torch.tensor(signs, dtype=F64)
        monkeypatch.setattr("lmlosses.optim.sophia._signs_like", lambda *_, u=u: u)
        optimizer = SophiaH([param], **PLAIN)
        optimizer.update_curvature(param @ hessian @ param / 2)
        found.append(optimizer.state[param]["hessian"])
        torch.testing.assert_close(found[-1], u * (hessian @ u))
    estimates = torch.stack(found)
    torch.testing.assert_close(estimates.mean(dim=0), hessian.diagonal())
    # the variance that the docstring promises
    off = (hessian - hessian.diagonal().diag()).square().sum(dim=1)
    torch.testing.assert_close(estimates.var(dim=0, correction=0), off)


def test_signs_are_as_often_minus_as_plus_one():
    from lmlosses.optim.sophia import _signs_like

    signs = _signs_like(torch.zeros(10_000), torch.Generator().manual_seed(0))
    assert signs.abs().eq(1).all() and abs(signs.mean()) < 0.04


def test_hessian_between_two_parameters_enters_the_estimate():
    first, second = parameter(1.0), parameter(2.0)
    optimizer = SophiaH([first, second], **PLAIN)
    generator = torch.Generator().manual_seed(0)
    optimizer.update_curvature((first * second).sum() * 3, generator=generator)
    found = optimizer.state[first]["hessian"].item(), optimizer.state[second]["hessian"].item()
    assert found[0] == found[1] and abs(found[0]) == 3.0  # u1 u2 H12 for both


def test_loss_that_is_linear_in_a_parameter_has_no_curvature_there():
    bent, straight = parameter(1.0), parameter(1.0)
    optimizer = SophiaH([bent, straight], **PLAIN)
    optimizer.update_curvature(bent.square().sum() + straight.sum())
    assert optimizer.state[bent]["hessian"].item() == 2.0
    assert optimizer.state[straight]["hessian"].item() == 0.0
    assert not optimizer.needs_curvature
    alone = SophiaH([straight], **PLAIN)
    alone.update_curvature(straight.sum())
    assert alone.state[straight]["hessian"].item() == 0.0


def test_ascent_uses_the_curvature_of_the_negated_loss():
    down, up = parameter(0.4), parameter(0.4)
    falling, rising = (
        SophiaH([down], lr=1.0, **PLAIN),
        SophiaH([up], lr=1.0, maximize=True, **PLAIN),
    )
    for param, optimizer, sign in ((down, falling, 1), (up, rising, -1)):
        loss = sign * 2 * param.square().sum()
        optimizer.update_curvature(loss)
        loss.backward()
        optimizer.step()
    assert down.item() == up.item() == 0.0


# the age of the curvature


def test_step_without_curvature_is_refused_and_moves_nothing():
    known, new = parameter(1.0), parameter(1.0)
    optimizer = SophiaH([known])
    optimizer.update_curvature(known.square().sum())
    optimizer.add_param_group({"params": [new]})
    known.grad, new.grad = torch.ones(1, dtype=F64), torch.ones(1, dtype=F64)
    with pytest.raises(RuntimeError, match=r"has no curvature.*call SophiaH\.update_curvature"):
        optimizer.step()
    assert known.item() == new.item() == 1.0 and optimizer.needs_curvature


def test_curvature_serves_so_many_steps_and_no_more():
    param = parameter(1.0)
    optimizer = SophiaH([param], update_every=3)
    assert optimizer.needs_curvature
    optimizer.update_curvature(param.square().sum())
    param.grad = torch.ones(1, dtype=F64)
    for _ in range(3):
        assert not optimizer.needs_curvature
        optimizer.step()
    assert optimizer.needs_curvature
    with pytest.raises(RuntimeError, match=r"has served 3 steps, and update_every is 3; call"):
        optimizer.step()
    optimizer.update_curvature(param.square().sum())
    optimizer.step()


def test_parameter_that_the_curvature_did_not_reach_may_not_move():
    used, side = parameter(1.0), parameter(1.0)
    optimizer = SophiaH([used, side])
    optimizer.update_curvature(used.square().sum())
    used.grad = torch.ones(1, dtype=F64)
    optimizer.step()  # without a gradient for the other all is well
    assert not optimizer.needs_curvature and side.item() == 1.0
    side.grad = torch.ones(1, dtype=F64)
    with pytest.raises(RuntimeError, match="did not depend on this parameter"):
        optimizer.step()


def test_frozen_parameter_is_left_alone():
    used, frozen = parameter(1.0), parameter(1.0)
    frozen.requires_grad_(False)
    optimizer = SophiaH([used, frozen])
    optimizer.update_curvature((used * frozen).square().sum())
    assert not optimizer.needs_curvature and frozen not in optimizer.state


def test_curvature_may_be_updated_in_the_closure():
    param = parameter(1.0)
    optimizer = SophiaH([param], lr=0.1, update_every=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        optimizer.update_curvature(loss)
        loss.backward()
        return loss

    values = [optimizer.step(closure).item() for _ in range(3)]
    assert values[0] > values[1] > values[2]


def train(param, optimizer, steps, generator):
    inputs = normal(8, 3, seed=5)
    for _ in range(steps):
        logits = inputs @ param.T
        if optimizer.needs_curvature:
            optimizer.update_curvature(logits, generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(logits, torch.arange(8) % 4).backward()
        optimizer.step()


def test_interrupted_run_continues_to_the_bit_with_the_age_of_its_curvature():
    whole, part = (torch.nn.Parameter(normal(4, 3)) for _ in range(2))
    sources = [torch.Generator().manual_seed(0) for _ in range(2)]
    train(whole, SophiaG([whole], lr=0.01), 27, sources[0])
    first = SophiaG([part], lr=0.01)
    train(part, first, 14, sources[1])
    resumed = torch.nn.Parameter(part.detach().clone())
    second = SophiaG([resumed], lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    age = second.state[resumed]["curvature_age"]
    assert age.item() == 4 and age.device.type == "cpu"
    train(resumed, second, 13, sources[1])
    assert torch.equal(whole, resumed)


def test_curvature_and_step_run_on_the_meta_device():
    param = torch.nn.Parameter(torch.zeros(4, 3, device="meta"))
    inputs = torch.zeros(2, 5, 3, device="meta")
    for optimizer in (SophiaG([param]), SophiaH([param])):
        logits = inputs @ param.T
        if isinstance(optimizer, SophiaG):
            optimizer.update_curvature(logits, torch.ones(2, 5, device="meta").bool())
        else:
            optimizer.update_curvature(logits.square().sum())
        logits.sum().backward()
        optimizer.step()
        copied = type(optimizer)([param])
        copied.load_state_dict(optimizer.state_dict())
        assert not copied.needs_curvature


# errors


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr must not be negative; got -1\.0"),
        ({"betas": (1.0, 0.9)}, ValueError, r"beta1 must lie in \[0, 1\); got 1\.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"beta2 must lie in \[0, 1\); got 1\.0"),
        ({"gamma": 0.0}, ValueError, r"gamma must be positive; got 0\.0"),
        ({"eps": 0.0}, ValueError, r"eps must be positive; got 0\.0"),
        ({"update_every": 0}, ValueError, "update_every must be positive; got 0"),
        ({"update_every": 2.0}, TypeError, r"update_every must be a whole number; got float 2\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        SophiaG([parameter(1.0)], **settings)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("logits", "mask", "error", "message"),
    [
        (torch.zeros(2, 3), None, ValueError, "logits must depend on the parameters"),
        (
            torch.zeros(2, 3, requires_grad=True), None, ValueError,
            "logits must depend on a parameter of this optimizer",
        ),
        (torch.zeros(2, 3).long(), None, TypeError, "logits must be a floating-point tensor"),
        (torch.zeros(2, 0), None, ValueError, "logits must have at least one entry along axis -1"),
        (torch.zeros(2, 3), torch.ones(2), TypeError, "mask must be a boolean tensor"),
        (torch.zeros(2, 3), torch.ones(3).bool(), ValueError, r"mask must have shape \(2,\)"),
    ],
)  # fmt: skip
def test_logits_that_do_not_fit_are_refused(logits, mask, error, message):
    with pytest.raises(error, match=message):
        SophiaG([parameter(1.0)]).update_curvature(logits, mask)


@pytest.mark.bad_input
def test_loss_that_does_not_fit_is_refused():
    param = parameter(1.0, 2.0)
    optimizer = SophiaH([param])
    with pytest.raises(ValueError, match="loss must have 0 axes; got shape"):
        optimizer.update_curvature(param.square())
    with pytest.raises(ValueError, match="loss must depend on the parameters"):
        optimizer.update_curvature(param.detach().sum())


def test_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    with pytest.raises(TypeError, match=r"Sophia takes dense real gradients; got torch\.sparse"):
        SophiaG(embedding.parameters()).update_curvature(embedding(torch.tensor([0])))
