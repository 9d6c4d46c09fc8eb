import copy
import warnings

import pytest
import torch

from lmlosses.optim.schedule_free import ScheduleFreeAdamW

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peers warn on import
    import schedulefree

DOUBLE = torch.float64


def _gradients(steps: int = 50) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(steps, 3, 4, generator=generator, dtype=DOUBLE)
    return list(drawn * torch.logspace(-3, 2, steps, dtype=DOUBLE)[:, None, None])


def _parameters(count: int = 1, dtype: torch.dtype = DOUBLE) -> list[torch.nn.Parameter]:
    start = torch.linspace(-1, 1, 12, dtype=DOUBLE).view(3, 4).to(dtype)
    return [torch.nn.Parameter(start.clone()) for _ in range(count)]


def _run(optimizer, param, gradients):
    for gradient in gradients:
        param.grad = gradient.to(param.dtype, copy=True)
        optimizer.step()


# values known by hand


def test_first_step_is_that_of_adam_and_the_average_starts_with_it():
    param = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=DOUBLE))
    param.grad = torch.tensor([3.0, -1e-3], dtype=DOUBLE)
    optimizer = ScheduleFreeAdamW([param], lr=0.5, eps=0.0)
    optimizer.step()
    torch.testing.assert_close(param.data, torch.tensor([0.5, 1.5], dtype=DOUBLE))
    optimizer.eval()
    torch.testing.assert_close(param.data, torch.tensor([0.5, 1.5], dtype=DOUBLE))


def test_average_is_the_plain_mean_of_the_fast_points():
    (param,) = _parameters()
    optimizer = ScheduleFreeAdamW([param], lr=0.1)
    fast = []
    for gradient in _gradients(7):
        _run(optimizer, param, [gradient])
        fast.append(optimizer.state[param]["z"].clone())
    optimizer.eval()
    torch.testing.assert_close(param.data, torch.stack(fast).mean(dim=0))


def test_warmup_climbs_in_equal_parts_and_weighs_by_their_squares():
    param = torch.nn.Parameter(torch.zeros(1, dtype=DOUBLE))
    optimizer = ScheduleFreeAdamW([param], lr=0.4, eps=0.0, warmup_steps=4)
    one = torch.ones(1, dtype=DOUBLE)
    fast = []
    for _ in range(2):
        _run(optimizer, param, [one])
        fast.append(optimizer.state[param]["z"].item())
    assert fast == pytest.approx([-0.1, -0.3])
    optimizer.eval()
    assert param.item() == pytest.approx((1 * -0.1 + 4 * -0.3) / 5)


# agreement with something independent


@pytest.mark.parametrize("peer", ["AdamWScheduleFree", "AdamWScheduleFreeReference"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.9)},
        {"lr": 0.1, "warmup_steps": 10, "r": 1.0},
        {"lr": 0.1, "warmup_steps": 10, "weight_lr_power": 0.5, "weight_decay": 0.1},
    ],
)
def test_fifty_steps_agree_with_the_authors(peer, settings, capsys):
    ours, theirs = _parameters(2)
    mine = ScheduleFreeAdamW([ours], **settings)
    reference = getattr(schedulefree, peer)([theirs], **settings)
    reference.train()
    for gradient in _gradients():
        _run(mine, ours, [gradient])
        _run(reference, theirs, [gradient])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name in ("z", "exp_avg_sq"):
        torch.testing.assert_close(
            mine.state[ours][name], reference.state[theirs][name], rtol=1e-12, atol=1e-12
        )
    mine.eval()
    reference.eval()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_rate_that_changes_agrees_with_the_authors():
    ours, theirs = _parameters(2)
    mine = ScheduleFreeAdamW([ours])
    reference = schedulefree.AdamWScheduleFree([theirs])
    reference.train()
    for step, gradient in enumerate(_gradients()):
        for optimizer, param in ((mine, ours), (reference, theirs)):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + abs(step - 20))
            _run(optimizer, param, [gradient])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_rate_that_is_a_tensor_is_the_number():
    ours, theirs = _parameters(2)
    settings = {"warmup_steps": 5, "weight_decay": 0.1}
    rate = torch.tensor(0.1, dtype=DOUBLE)
    _run(ScheduleFreeAdamW([ours], rate, **settings), ours, _gradients())
    _run(ScheduleFreeAdamW([theirs], 0.1, **settings), theirs, _gradients())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# laws


def test_modes_turn_into_each_other_and_back():
    (param,) = _parameters()
    optimizer = ScheduleFreeAdamW([param], lr=0.1)
    _run(optimizer, param, _gradients(20))
    y = param.detach().clone()
    optimizer.train()
    assert torch.equal(param, y)
    optimizer.eval()
    x = param.detach().clone()
    assert (x - y).abs().max() > 1e-3
    optimizer.eval()
    assert torch.equal(param, x)
    optimizer.train()
    torch.testing.assert_close(param.data, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_run_saved_in_either_mode_continues_to_the_bit(mode, dtype):
    whole, resumed = _parameters(2, dtype)
    settings = {"lr": 0.05, "warmup_steps": 8, "weight_decay": 0.1, "r": 0.5}
    first = ScheduleFreeAdamW([whole], **settings)
    _run(first, whole, _gradients()[:5])
    getattr(first, mode)()
    with torch.no_grad():
        resumed.copy_(whole)
    second = ScheduleFreeAdamW([resumed])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, param in ((first, whole), (second, resumed)):
        optimizer.train()
        _run(optimizer, param, _gradients()[5:])
        optimizer.eval()
    assert torch.equal(whole, resumed)


def test_constant_rate_converges_where_the_fast_point_wanders():
    (param,) = _parameters()
    optimizer = ScheduleFreeAdamW([param], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        noise = torch.randn(3, 4, generator=generator, dtype=DOUBLE)
        _run(optimizer, param, [param.detach() + noise])
    optimizer.eval()
    assert param.norm() < 0.5 * optimizer.state[param]["z"].norm()


def test_late_parameter_is_corrected_by_its_own_count():
    early, late = _parameters(2)
    optimizer = ScheduleFreeAdamW([early, late], lr=0.1, eps=0.0)
    _run(optimizer, early, _gradients(9))
    before = late.detach().clone()
    late.grad = torch.full_like(late, 7.0)
    optimizer.step()
    z = optimizer.state[late]["z"]
    torch.testing.assert_close(z, before - 0.1)


def test_rate_of_zero_moves_nothing():
    (param,) = _parameters()
    before = param.detach().clone()
    _run(ScheduleFreeAdamW([param], lr=0.0), param, _gradients(3))
    assert torch.equal(param, before)
    _run(ScheduleFreeAdamW([param], lr=torch.tensor(0.0)), param, _gradients(3))
    assert torch.equal(param, before)


# errors


def test_step_in_evaluation_mode_is_refused_before_anything_moves():
    (param,) = _parameters()
    optimizer = ScheduleFreeAdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"step needs training mode: .* train\(\)"):
        optimizer.step()
    assert not optimizer.state[param]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.0, 0.9)}, r"beta1 must lie in \(0, 1\); got 0\.0"),
        ({"betas": (0.9, 1.0)}, r"beta2 must lie in \[0, 1\); got 1\.0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative; got -1"),
        ({"weight_lr_power": -1.0}, r"weight_lr_power must not be negative; got -1\.0"),
        ({"r": float("inf")}, "r must be finite; got inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScheduleFreeAdamW(_parameters(), **settings)


@pytest.mark.bad_input
def test_warmup_is_a_whole_number():
    with pytest.raises(TypeError, match="warmup_steps must be a whole number; got float 2.5"):
        ScheduleFreeAdamW(_parameters(), warmup_steps=2.5)
