import itertools
import math

import pytest
import torch
from torch import Tensor

from lmlosses.optim.adagrad import Adagrad

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
    for scale in torch.linspace(-6, 3, steps).tolist():
        for param in params:
            draw = torch.randn(param.shape, generator=generator, dtype=DOUBLE)
            param.grad = draw * 10.0**scale
        optimizer.step()
    return params


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_constant_gradient_gives_steps_like_one_over_root_t():
    param = torch.nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    optimizer = Adagrad([param], lr=0.5, eps=0.0)
    expected = 0.0
    for step in range(1, 6):
        param.grad = torch.tensor([1e-3, -1e3], dtype=DOUBLE)
        optimizer.step()
        expected += 0.5 / math.sqrt(step)
        torch.testing.assert_close(param.data, torch.tensor([-expected, expected], dtype=DOUBLE))


def test_accumulator_starts_where_it_is_told():
    param = torch.nn.Parameter(torch.zeros(1, dtype=DOUBLE))
    param.grad = torch.tensor([3.0], dtype=DOUBLE)
    Adagrad([param], lr=1.0, initial_accumulator_value=16.0, eps=0.0).step()
    assert abs(param.item() + 3 / 5) < 1e-15


@pytest.mark.parametrize(
    ("lr_decay", "initial_accumulator_value", "eps", "weight_decay", "maximize"),
    list(itertools.product((0.0, 0.1), (0.0, 0.3), (1e-10, 0.1), (0.0, 0.1), (False, True))),
)
def test_fifty_steps_agree_with_torch(
    lr_decay, initial_accumulator_value, eps, weight_decay, maximize
):
    settings = {
        "lr": 0.1, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
        "initial_accumulator_value": initial_accumulator_value, "maximize": maximize,
    }  # fmt: skip
    mine = Adagrad(parameters(), **settings)
    reference = torch.optim.Adagrad(parameters(), **settings)
    ours, theirs = run(mine), run(reference)
    agree(ours, theirs)
    agree([mine.state[p]["sum"] for p in ours], [reference.state[p]["sum"] for p in theirs])


@pytest.mark.parametrize("way", ["fused", "foreach"])
@pytest.mark.parametrize(
    "settings", [{}, {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3}]
)
def test_each_way_of_stepping_gives_the_rule(way, settings):
    one = Adagrad(parameters(), lr=0.1, **settings)
    other = Adagrad(parameters(), lr=0.1, **{way: True}, **settings)
    ours, theirs = run(one), run(other)
    agree(ours, theirs)
    for name in ("sum", "step"):
        agree([one.state[p][name] for p in ours], [other.state[p][name] for p in theirs])


def test_fused_is_torchs_fused_to_the_bit():
    settings = {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}
    ours = run(Adagrad(parameters(), fused=True, **settings))
    theirs = run(torch.optim.Adagrad(parameters(), fused=True, **settings))
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.equal(mine, reference)


def test_order_of_the_gradients_does_not_change_the_sum():
    sums = []
    for order in ((1.0, 2.0, 3.0), (3.0, 1.0, 2.0)):
        param = torch.nn.Parameter(torch.zeros((), dtype=DOUBLE))
        optimizer = Adagrad([param])
        for gradient in order:
            param.grad = torch.tensor(gradient, dtype=DOUBLE)
            optimizer.step()
        sums.append(optimizer.state[param]["sum"].item())
    assert sums == [14.0, 14.0]


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["lr_decay", "initial_accumulator_value", "eps"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must not be negative; got -0\.1"):
        Adagrad([torch.nn.Parameter(torch.zeros(1))], **{name: -0.1})
