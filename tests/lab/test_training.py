"""Tests of lmlosses.lab.training."""

import pytest
import torch

from lmlosses import cpu_generator, cross_entropy, token_mean
from lmlosses.lab.data import gaussian_blobs
from lmlosses.lab.text import batches
from lmlosses.lab.training import (
    gradient_descent,
    natural_gradient_descent,
    train,
)
from lmlosses.lab.transformer import TinyTransformer
from lmlosses.optim import Adam


def bowl(point):
    return 0.5 * point.square().sum()


# ---- gradient descent


def test_the_path_in_a_round_bowl_shrinks_by_one_minus_lr():
    path = gradient_descent(bowl, torch.tensor([8.0, -4.0]), lr=0.25, steps=3)
    shrink = 0.75 ** torch.arange(4.0).unsqueeze(-1)
    torch.testing.assert_close(path, shrink * torch.tensor([8.0, -4.0]))


def test_gradient_descent_agrees_with_torch_sgd_on_a_matrix():
    start = torch.randn(2, 3, generator=cpu_generator(0), dtype=torch.float64)

    def loss(point):
        return (point.sin() * point).sum() + point[0].prod()

    point = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([point], lr=0.1)
    expected = [start]
    for _ in range(5):
        optimizer.zero_grad()
        loss(point).backward()
        optimizer.step()
        expected.append(point.detach().clone())
    torch.testing.assert_close(
        gradient_descent(loss, start, lr=0.1, steps=5), torch.stack(expected)
    )


def test_no_steps_leave_the_start_and_zero_lr_stays_there():
    start = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(gradient_descent(bowl, start, lr=0.1, steps=0), start[None])
    still = gradient_descent(bowl, start, lr=0.0, steps=2)
    torch.testing.assert_close(still, start.expand(3, 2))


def test_a_path_carries_no_gradient_and_leaves_its_start_alone():
    start = torch.tensor([1.0], requires_grad=True)
    path = gradient_descent(bowl, start, lr=0.5, steps=2)
    assert not path.requires_grad
    assert start.item() == 1.0 and start.grad is None


def test_gradient_descent_works_inside_no_grad_and_on_a_number():
    with torch.no_grad():
        path = gradient_descent(bowl, torch.tensor(4.0), lr=0.5, steps=1)
    torch.testing.assert_close(path, torch.tensor([4.0, 2.0]))


def test_gradient_descent_runs_where_values_cannot_be_read():
    start = torch.empty(3, device="meta")
    assert gradient_descent(bowl, start, lr=0.1, steps=2).shape == (3, 3)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loss", "start", "settings", "error", "message"),
    [
        (bowl, torch.ones(2), {"lr": -0.1, "steps": 1}, ValueError, "lr must not be negative"),
        (bowl, torch.ones(2), {"lr": 0.1, "steps": -1}, ValueError, "steps must not be negative"),
        (
            lambda point: point.square(),
            torch.ones(2),
            {"lr": 0.1, "steps": 1},
            ValueError,
            r"the loss must have 0 axes; got shape \(2,\)",
        ),
        (
            bowl,
            torch.ones(2, dtype=torch.long),
            {"lr": 0.1, "steps": 1},
            TypeError,
            "start must be a floating-point tensor",
        ),
        (
            lambda point: 1.0,
            torch.ones(2),
            {"lr": 0.1, "steps": 1},
            TypeError,
            "the loss must be a torch.Tensor; got float 1.0",
        ),
    ],
)
def test_gradient_descent_refuses(loss, start, settings, error, message):
    with pytest.raises(error, match=message):
        gradient_descent(loss, start, **settings)


# ---- natural gradient descent

COIN_TARGETS = torch.tensor([0, 0, 0, 1])


def coin(logit):
    return torch.stack([logit, torch.zeros_like(logit)], dim=-1).expand(4, 2)


def test_the_first_natural_step_of_a_coin_by_hand():
    # at p = 1/2: gradient p - 3/4 = -1/4, information 1/4
    path = natural_gradient_descent(coin, torch.zeros(1), COIN_TARGETS, lr=1.0, steps=1)
    torch.testing.assert_close(path, torch.tensor([[0.0], [1.0]]))
    damped = natural_gradient_descent(
        coin, torch.zeros(1), COIN_TARGETS, lr=0.5, steps=1, damping=0.25
    )
    torch.testing.assert_close(damped, torch.tensor([[0.0], [0.25]]))


def two_class_problem():
    centers = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    inputs, targets = gaussian_blobs(40, centers=centers, scale=1.0, generator=cpu_generator(0))
    inputs = inputs.double()

    def model(params):
        margin = inputs @ params
        return torch.stack([torch.zeros_like(margin), margin], dim=-1)

    return model, targets


def test_with_linear_logits_natural_gradient_descent_is_newtons_method():
    model, targets = two_class_problem()

    def loss(point):
        return torch.nn.functional.cross_entropy(model(point), targets)

    point = torch.zeros(2, dtype=torch.float64)
    expected = [point]
    for _ in range(4):
        gradient = torch.func.grad(loss)(point)
        hessian = torch.autograd.functional.hessian(loss, point)
        point = point - torch.linalg.solve(hessian, gradient)
        expected.append(point)
    path = natural_gradient_descent(model, expected[0], targets, lr=1.0, steps=4)
    torch.testing.assert_close(path, torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_natural_gradient_descent_converges_where_the_gradient_vanishes():
    model, targets = two_class_problem()
    end = natural_gradient_descent(
        model, torch.zeros(2, dtype=torch.float64), targets, lr=1.0, steps=12
    )[-1].requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(end), targets)
    (gradient,) = torch.autograd.grad(loss, end)
    assert gradient.norm() < 1e-9


def test_the_natural_path_ends_in_the_same_place_in_other_coordinates():
    model, targets = two_class_problem()
    change = torch.tensor([[10.0, 3.0], [0.0, 0.1]], dtype=torch.float64)
    start = torch.tensor([0.3, -0.2], dtype=torch.float64)
    path = natural_gradient_descent(model, start, targets, lr=0.5, steps=3)
    other = natural_gradient_descent(
        lambda point: model(change @ point),
        torch.linalg.solve(change, start),
        targets,
        lr=0.5,
        steps=3,
    )
    torch.testing.assert_close(other @ change.T, path, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_start_becomes_float32(dtype):
    start = torch.zeros(1, dtype=dtype)
    path = natural_gradient_descent(coin, start, COIN_TARGETS, lr=1.0, steps=1)
    assert path.dtype == torch.float32
    torch.testing.assert_close(path, torch.tensor([[0.0], [1.0]]))


def test_a_natural_path_carries_no_gradient_and_may_have_no_steps():
    start = torch.zeros(1, requires_grad=True)
    assert not natural_gradient_descent(coin, start, COIN_TARGETS, lr=1.0, steps=2).requires_grad
    assert natural_gradient_descent(coin, start, COIN_TARGETS, lr=1.0, steps=0).shape == (1, 1)


def test_a_natural_path_runs_where_values_cannot_be_read():
    start = torch.empty(1, device="meta")
    path = natural_gradient_descent(coin, start, COIN_TARGETS.to("meta"), lr=1.0, steps=2)
    assert path.shape == (3, 1) and path.device.type == "meta"


def test_natural_gradient_descent_refuses():
    def overparametrized(params):
        return params.expand(4, 2)

    with pytest.raises(ValueError, match="fisher must be positive definite.*raise damping"):
        natural_gradient_descent(overparametrized, torch.zeros(2), COIN_TARGETS, lr=1.0, steps=1)
    with pytest.raises(ValueError, match="lr must not be negative; got -1.0"):
        natural_gradient_descent(coin, torch.zeros(1), COIN_TARGETS, lr=-1.0, steps=1)
    with pytest.raises(ValueError, match="steps must not be negative; got -1"):
        natural_gradient_descent(coin, torch.zeros(1), COIN_TARGETS, lr=1.0, steps=-1)
    with pytest.raises(ValueError, match="damping must not be negative; got -1.0"):
        natural_gradient_descent(coin, torch.zeros(1), COIN_TARGETS, lr=1.0, steps=1, damping=-1.0)


@pytest.mark.bad_input
def test_natural_gradient_descent_refuses_a_start_of_whole_numbers():
    with pytest.raises(TypeError, match="start must be a floating-point tensor"):
        natural_gradient_descent(
            coin, torch.zeros(1, dtype=torch.long), COIN_TARGETS, lr=1.0, steps=1
        )


# ---- the loop for small models


def regression(seed=0):
    inputs = torch.randn(20, 3, generator=cpu_generator(seed), dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    return weight, lambda: (inputs @ weight - inputs.sum(-1)).square().mean()


def test_losses_come_back_from_before_each_step():
    weight, loss = regression()
    expected = loss().item()
    losses = train(loss, torch.optim.SGD([weight], lr=0.1), steps=40)
    assert losses.shape == (40,) and losses.dtype == torch.float64
    assert not losses.requires_grad and losses[0].item() == expected
    assert (losses[1:] < losses[:-1]).all() and loss() < losses[-1]


def test_loop_agrees_with_gradient_descent():
    weight, loss = regression()
    inputs = torch.randn(20, 3, generator=cpu_generator(0), dtype=torch.float64)
    path = gradient_descent(
        lambda point: (inputs @ point - inputs.sum(-1)).square().mean(),
        weight.detach().clone(), lr=0.1, steps=7,
    )  # fmt: skip
    train(loss, torch.optim.SGD([weight], lr=0.1), steps=7)
    torch.testing.assert_close(weight.detach(), path[-1])


def test_rate_is_asked_for_each_step_and_set_in_every_group():
    one, two = (torch.nn.Parameter(torch.tensor(0.0)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [two], "lr": 7.0}], lr=5.0)
    asked = []

    def rate(step):
        asked.append(step)
        return 10.0**-step

    train(lambda: one + two, optimizer, steps=3, lr=rate)
    assert set(asked) == {0, 1, 2}
    assert one.item() == two.item() == pytest.approx(-1.11)


def test_without_a_rate_the_optimizers_own_stays():
    weight, loss = regression()
    optimizer = torch.optim.SGD([weight], lr=0.125)
    train(loss, optimizer, steps=2)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_every_step_draws_its_own_batch_and_gradients_do_not_add_up():
    point = torch.nn.Parameter(torch.tensor(0.0))
    slopes = iter([1.0, 10.0, 100.0])
    losses = train(lambda: next(slopes) * point, torch.optim.SGD([point], lr=1.0), steps=3)
    assert losses.tolist() == [0.0, -10.0, -1100.0]
    assert point.item() == -111.0


def test_a_small_transformer_repeats_itself_and_learns_more_than_the_frequencies():
    text = torch.arange(4).repeat(50)

    def run():
        model = TinyTransformer(4, dim=8, layers=1, heads=1, generator=cpu_generator(0))
        stream = batches(text, batch=8, length=6, generator=cpu_generator(1))

        def loss():
            tokens = next(stream)
            return token_mean(cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]))

        return train(loss, Adam(model.parameters(), lr=0.02), steps=40)

    losses = run()
    assert losses[-1] < 0.2 < 1.2 < losses[0]
    assert torch.equal(losses, run())


def test_no_steps_move_nothing():
    weight, loss = regression()
    assert train(loss, torch.optim.SGD([weight], lr=0.1), steps=0).shape == (0,)
    assert not weight.any()


@pytest.mark.bad_input
def test_losses_that_are_not_one_number_are_refused():
    weight, loss = regression()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ValueError, match=r"the loss must have 0 axes; got shape \(3,\)"):
        train(lambda: weight, optimizer, steps=1)
    with pytest.raises(TypeError, match="the loss must be a torch.Tensor; got float 1.0"):
        train(lambda: 1.0, optimizer, steps=1)
    with pytest.raises(ValueError, match="steps must not be negative; got -1"):
        train(loss, optimizer, steps=-1)
    with pytest.raises(TypeError, match="steps must be a whole number; got float 1.0"):
        train(loss, optimizer, steps=1.0)
