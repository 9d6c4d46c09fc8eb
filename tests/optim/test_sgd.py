import itertools

import pytest
import torch
from pytorch_optimizer import SignSGD as PeerSignSGD
from torch import Tensor

from lmlosses.optim.sgd import SGD, SignSGD

DOUBLE = torch.float64
SHAPES = [(3, 4), (5,), ()]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=DOUBLE))
        for shape in SHAPES
    ]


def run(optimizer: torch.optim.Optimizer, steps: int = 50, seed: int = 1) -> list[Tensor]:
    """Parameters after steps under gradients of very different sizes, the same in each run."""
    generator = torch.Generator().manual_seed(seed)
    params = optimizer.param_groups[0]["params"]
    for scale in torch.linspace(-4, 1, steps).tolist():
        for param in params:
            draw = torch.randn(param.shape, generator=generator, dtype=DOUBLE)
            param.grad = draw * 10.0**scale
        optimizer.step()
    return params


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


# values known by hand


def test_momentum_is_a_geometric_sum():
    param = torch.nn.Parameter(torch.zeros(1, dtype=DOUBLE))
    optimizer = SGD([param], lr=1.0, momentum=0.5)
    for expected in (-1.0, -2.5, -4.25):
        param.grad = torch.ones(1, dtype=DOUBLE)
        optimizer.step()
        assert param.item() == expected


def test_first_gradient_is_not_dampened():
    param = torch.nn.Parameter(torch.zeros(1, dtype=DOUBLE))
    optimizer = SGD([param], lr=1.0, momentum=0.5, dampening=0.75)
    for expected in (-1.0, -1.75):  # then 0.5 of the buffer and a quarter of the gradient
        param.grad = torch.ones(1, dtype=DOUBLE)
        optimizer.step()
        assert param.item() == expected


def test_signs_move_by_the_learning_rate_alone():
    param = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    param.grad = torch.tensor([1e-30, -1e30, 0.0])
    SignSGD([param], lr=0.25, weight_decay=2.0).step()
    assert torch.equal(param.data, torch.tensor([0.25, 0.75, 0.5]))


def test_sign_of_the_mean_outlives_one_contrary_gradient():
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = SignSGD([param], lr=1.0, momentum=0.9)
    for gradient, expected in ((1.0, -1.0), (-0.5, -2.0), (-0.5, -1.0)):
        param.grad = torch.tensor([gradient])  # means 0.1, 0.04, -0.014
        optimizer.step()
        assert param.item() == expected


# agreement with something independent


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "weight_decay", "maximize"),
    [
        settings
        for settings in itertools.product(
            (0.0, 0.9), (0.0, 0.3, 1.0), (False, True), (0.0, 0.1), (False, True)
        )
        if not (settings[2] and (settings[0] == 0 or settings[1] != 0))
    ],
)
def test_fifty_steps_agree_with_torch(momentum, dampening, nesterov, weight_decay, maximize):
    settings = {
        "lr": 0.05, "momentum": momentum, "dampening": dampening, "nesterov": nesterov,
        "weight_decay": weight_decay, "maximize": maximize,
    }  # fmt: skip
    mine, reference = SGD(parameters(), **settings), torch.optim.SGD(parameters(), **settings)
    ours, theirs = run(mine), run(reference)
    agree(ours, theirs)
    if momentum:
        name = "momentum_buffer"
        agree([mine.state[p][name] for p in ours], [reference.state[p][name] for p in theirs])


@pytest.mark.parametrize("way", ["fused", "foreach"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
    ],
)
def test_each_way_of_stepping_gives_the_rule(way, settings):
    one, other = (
        SGD(parameters(), lr=0.05, **settings),
        SGD(parameters(), lr=0.05, **{way: True}, **settings),
    )
    ours, theirs = run(one), run(other)
    agree(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert set(one.state[a]) == set(other.state[b])
        for name, value in one.state[a].items():
            torch.testing.assert_close(other.state[b][name], value, rtol=1e-12, atol=1e-12)


def test_fused_is_torchs_fused_to_the_bit():
    settings = {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}
    ours = run(SGD(parameters(), fused=True, **settings))
    theirs = run(torch.optim.SGD(parameters(), fused=True, **settings))
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.equal(mine, reference)


def test_fused_does_not_dampen_the_first_gradient_of_a_late_parameter():
    ends = []
    for fused in (False, True):
        early, late = (torch.nn.Parameter(torch.zeros(2, dtype=DOUBLE)) for _ in range(2))
        optimizer = SGD([early, late], lr=1.0, momentum=0.5, dampening=0.75, fused=fused)
        for step in range(3):
            early.grad = torch.ones(2, dtype=DOUBLE)
            late.grad = torch.ones(2, dtype=DOUBLE) if step else None
            optimizer.step()
        ends.append(torch.stack([early.detach(), late.detach()]))
    assert torch.equal(ends[0], ends[1])
    assert ends[0][1, 0] == -1.75  # 1, then 0.5 + 0.25


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_signs_agree_with_a_peer(momentum, weight_decay):
    settings = {"lr": 0.05, "momentum": momentum, "weight_decay": weight_decay}
    agree(run(SignSGD(parameters(), **settings)), run(PeerSignSGD(parameters(), **settings)))


# laws


def test_signs_do_not_see_the_scale_of_the_gradient():
    ends = []
    for scale in (1.0, 1e-6):
        optimizer = SignSGD(parameters(), lr=0.1, momentum=0.9)
        params = optimizer.param_groups[0]["params"]
        generator = torch.Generator().manual_seed(3)
        for _ in range(10):
            for param in params:
                param.grad = scale * torch.randn(param.shape, generator=generator, dtype=DOUBLE)
            optimizer.step()
        ends.append(params)
    agree(ends[0], ends[1])


def test_momentum_can_be_scheduled():
    optimizer = SGD(parameters(), lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)
    for momentum in (0.5, 0.95):
        optimizer.param_groups[0]["momentum"] = reference.param_groups[0]["momentum"] = momentum
        agree(run(optimizer, steps=3), run(reference, steps=3))


# errors


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (SGD, {"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1\.0"),
        (SGD, {"dampening": 1.5}, r"dampening must lie in \[0, 1\]; got 1\.5"),
        (
            SGD,
            {"nesterov": True},
            r"nesterov needs a positive momentum and no dampening; got momentum 0\.0",
        ),
        (
            SGD,
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            r"got momentum 0\.9, dampening 0\.1",
        ),
        (SignSGD, {"momentum": -0.1}, r"momentum must lie in \[0, 1\); got -0\.1"),
    ],
)
def test_settings_out_of_range_are_refused(rule, settings, message):
    with pytest.raises(ValueError, match=message):
        rule([torch.nn.Parameter(torch.zeros(1))], **settings)
