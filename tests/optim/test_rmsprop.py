import itertools
import math

import pytest
import torch
from torch import Tensor

from lmlosses.optim.rmsprop import RMSprop

DOUBLE = torch.float64


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=DOUBLE))
        for shape in [(3, 4), (5,), ()]
    ]


def run(optimizer: torch.optim.Optimizer, steps: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    params = optimizer.param_groups[0]["params"]
    for scale in torch.linspace(-3, 2, steps).tolist():
        for param in params:
            draw = torch.randn(param.shape, generator=generator, dtype=DOUBLE)
            param.grad = draw * 10.0**scale
        optimizer.step()
    return params


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_first_step_is_longer_than_the_learning_rate():
    param = torch.nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    param.grad = torch.tensor([1e-3, -1e3], dtype=DOUBLE)
    RMSprop([param], lr=0.5, alpha=0.75, eps=0.0).step()  # 1 / sqrt(1 - 0.75) = 2
    torch.testing.assert_close(param.data, torch.tensor([-1.0, 1.0], dtype=DOUBLE))


def test_centered_divides_by_the_spread():
    param = torch.nn.Parameter(torch.zeros(1, dtype=DOUBLE))
    optimizer = RMSprop([param], lr=1.0, alpha=0.5, eps=0.0, centered=True)
    param.grad = torch.ones(1, dtype=DOUBLE)
    optimizer.step()  # mean square 1/2, mean 1/2: spread 1/4
    assert abs(param.item() + 2) < 1e-15


@pytest.mark.parametrize(
    ("alpha", "eps", "weight_decay", "momentum", "centered", "maximize"),
    list(
        itertools.product(
            (0.99, 0.5), (1e-8, 0.1), (0.0, 0.1), (0.0, 0.9), (False, True), (False, True)
        )
    ),
)
def test_fifty_steps_agree_with_torch(alpha, eps, weight_decay, momentum, centered, maximize):
    settings = {
        "lr": 0.01, "alpha": alpha, "eps": eps, "weight_decay": weight_decay,
        "momentum": momentum, "centered": centered, "maximize": maximize,
    }  # fmt: skip
    mine = RMSprop(parameters(), **settings)
    reference = torch.optim.RMSprop(parameters(), **settings)
    ours, theirs = run(mine), run(reference)
    agree(ours, theirs)
    for name in set(mine.state[ours[0]]) - {"step"}:
        agree([mine.state[p][name] for p in ours], [reference.state[p][name] for p in theirs])


@pytest.mark.parametrize("settings", [{}, {"centered": True, "momentum": 0.9, "alpha": 0.9}])
def test_lists_of_tensors_give_the_rule(settings):
    ours = run(RMSprop(parameters(), **settings))
    theirs = run(RMSprop(parameters(), foreach=True, **settings))
    agree(ours, theirs)


def test_only_what_is_asked_for_is_remembered():
    for settings, names in (
        ({}, {"step", "square_avg"}),
        ({"centered": True}, {"step", "square_avg", "grad_avg"}),
        ({"momentum": 0.9}, {"step", "square_avg", "momentum_buffer"}),
    ):
        optimizer = RMSprop(parameters(), **settings)
        params = run(optimizer, steps=1)
        assert set(optimizer.state[params[0]]) == names


def test_centered_survives_a_gradient_that_never_changes():
    """Rounding brings the mean square below the square of the mean; torch's weights turn NaN."""
    gradient = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = RMSprop([param], lr=1e-6, alpha=0.5, centered=True)
    lowest = 0.0
    for _ in range(60):
        param.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[param]
        lowest = min(lowest, (state["square_avg"] - state["grad_avg"] ** 2).min().item())
    assert lowest < 0
    assert param.isfinite().all()


def test_scale_of_the_gradient_does_not_matter_where_eps_is_negligible():
    ends = []
    for scale in (1.0, 1e6):
        param = torch.nn.Parameter(torch.zeros(3, dtype=DOUBLE))
        optimizer = RMSprop([param], eps=0.0, momentum=0.5)
        for step in range(5):
            param.grad = scale * torch.tensor([1.0, -2.0, math.sin(step)], dtype=DOUBLE) + scale
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.0}, r"alpha must lie in \[0, 1\); got 1\.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1\.0"),
        ({"eps": -1e-8}, r"eps must not be negative; got -1e-08"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RMSprop([torch.nn.Parameter(torch.zeros(1))], **settings)
