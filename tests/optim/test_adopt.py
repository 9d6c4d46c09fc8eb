import warnings

import pytest
import torch

from lmlosses.optim.adopt import ADOPT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peers warn on import
    import pytorch_optimizer

DOUBLE = torch.float64


def _gradients(steps: int = 50, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(steps, 3, 4, generator=generator, dtype=DOUBLE)
    return list(drawn * torch.logspace(-6, 3, steps, dtype=DOUBLE)[:, None, None])


def _run(optimizer, param, gradients):
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()


def _parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=DOUBLE))


# values known by hand


def test_first_gradient_moves_nothing_and_sets_the_second_moment():
    param = _parameter(1.0, 2.0)
    optimizer = ADOPT([param], lr=1.0, weight_decay=0.5, decouple=True)
    param.grad = torch.tensor([3.0, -0.5], dtype=DOUBLE)
    optimizer.step()
    assert param.tolist() == [1.0, 2.0]
    state = optimizer.state[param]
    assert state["exp_avg_sq"].tolist() == [9.0, 0.25] and state["exp_avg"].tolist() == [0.0, 0.0]


def test_second_gradient_is_divided_by_the_first():
    param = _parameter(0.0)
    optimizer = ADOPT([param], lr=1.0, betas=(0.75, 0.5))
    _run(optimizer, param, [torch.tensor([g], dtype=DOUBLE) for g in (4.0, 2.0)])
    assert param.item() == -0.25 * 2 / 4
    assert optimizer.state[param]["exp_avg_sq"].item() == 0.5 * 16 + 0.5 * 4


@pytest.mark.parametrize(("moves", "bound"), [(1, 1.0), (16, 2.0)])
def test_quotient_is_clipped_at_the_fourth_root_of_the_move(moves, bound):
    param = _parameter(0.0)
    optimizer = ADOPT([param], lr=1.0, betas=(0.0, 0.999))
    _run(optimizer, param, [torch.ones(1, dtype=DOUBLE)] * moves)
    before = param.item()
    _run(optimizer, param, [torch.tensor([-1e9], dtype=DOUBLE)])
    assert param.item() - before == pytest.approx(bound)


def test_entry_without_a_gradient_stays():
    param = _parameter(1.0)
    _run(ADOPT([param], lr=1.0), param, [torch.zeros(1, dtype=DOUBLE)] * 3)
    assert param.item() == 1.0


# agreement with something independent


@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 0.3, "betas": (0.5, 0.7)}, {"weight_decay": 0.3}, {"maximize": True, "eps": 0.1}],
)
def test_fifty_steps_agree_with_a_peer(settings):
    """The peer's default counts the clip from the first call; the paper from the first move."""
    start = torch.linspace(-1, 1, 12, dtype=DOUBLE).view(3, 4)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = ADOPT([ours], **settings)
    reference = pytorch_optimizer.ADOPT(
        [theirs], clip_lambda=lambda step: (step - 1) ** 0.25, **settings
    )
    _run(mine, ours, _gradients())
    _run(reference, theirs, _gradients())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            mine.state[ours][name], reference.state[theirs][name], rtol=1e-12, atol=1e-12
        )


def test_fifty_decoupled_steps_agree_with_a_slow_loop():
    """The peer shrinks in the first call too; the authors' code moves nothing there."""
    lr, decay, beta1, beta2 = 0.05, 0.4, 0.8, 0.9
    param = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=DOUBLE).view(3, 4))
    theta, gradients = param.detach().clone(), _gradients(seed=1)
    m, v = torch.zeros_like(theta), gradients[0] ** 2
    for t, g in enumerate(gradients[1:], start=1):
        theta = theta - lr * decay * theta
        m = beta1 * m + (1 - beta1) * torch.clamp(
            g / v.sqrt().clamp(min=1e-6), -(t**0.25), t**0.25
        )
        theta = theta - lr * m
        v = beta2 * v + (1 - beta2) * g**2
    optimizer = ADOPT([param], lr, (beta1, beta2), weight_decay=decay, decouple=True)
    _run(optimizer, param, gradients)
    torch.testing.assert_close(param.data, theta, rtol=1e-12, atol=1e-12)


# laws


def test_goes_downhill_where_adam_climbs():
    """One gradient in five is 10, the others -1: 1.2 on average, yet Adam makes them equal."""

    def end(optimizer_class):
        param = _parameter(0.0)
        optimizer = optimizer_class([param], lr=0.01, betas=(0.0, 0.1))
        large = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.2
        for gradient in torch.where(large, 10.0, -1.0).to(DOUBLE):
            param.grad = gradient.view(1).clone()
            optimizer.step()
        return param.item()

    assert end(torch.optim.Adam) > 1.0
    assert end(ADOPT) < -1.0


def test_second_moment_never_contains_the_gradient_it_divides():
    """The same second gradient is divided by the same root, whatever its size."""
    moved = []
    for size in (0.25, 0.5):
        param = _parameter(0.0)
        optimizer = ADOPT([param], lr=1.0, betas=(0.0, 0.0))
        _run(optimizer, param, [torch.tensor([g], dtype=DOUBLE) for g in (1.0, size)])
        moved.append(param.item())
    assert moved == [-0.25, -0.5]


# errors


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"beta1 must lie in \[0, 1\); got 1\.0"),
        ({"betas": (0.9, 1.0)}, r"beta2 must lie in \[0, 1\); got 1\.0"),
        ({"eps": 0.0}, r"eps must be positive; got 0\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ADOPT([_parameter(0.0)], **settings)
