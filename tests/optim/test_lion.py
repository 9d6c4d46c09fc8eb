import warnings

import pytest
import torch

from lmlosses.optim.lion import Lion

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peers warn on import
    import lion_pytorch
    import pytorch_optimizer

DOUBLE = torch.float64


def _parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=DOUBLE))


def _gradients(steps: int = 50) -> list[torch.Tensor]:
    """Sizes from 1e-6 to 1e3, and an entry that is often zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(steps, 3, 4, generator=generator, dtype=DOUBLE)
    drawn *= torch.logspace(-6, 3, steps, dtype=DOUBLE)[:, None, None]
    drawn[::3, 0, 0] = 0.0
    return list(drawn)


# values known by hand


def test_every_entry_moves_by_the_rate_whatever_its_gradient():
    param = _parameter(0.0, 0.0, 0.0)
    param.grad = torch.tensor([1e-300, -1e300, 3.0], dtype=DOUBLE)
    Lion([param], lr=0.25).step()
    assert param.tolist() == [-0.25, 0.25, -0.25]


def test_entry_that_never_had_a_gradient_stays():
    param = _parameter(1.0, 1.0)
    optimizer = Lion([param], lr=0.25)
    for _ in range(3):
        param.grad = torch.tensor([0.0, 1.0], dtype=DOUBLE)
        optimizer.step()
    assert param.tolist() == [1.0, 0.25]


def test_entry_without_a_gradient_today_follows_its_memory():
    param = _parameter(0.0)
    optimizer = Lion([param], lr=0.25)
    for gradient in (1.0, 0.0, 0.0):
        param.grad = torch.tensor([gradient], dtype=DOUBLE)
        optimizer.step()
    assert param.item() == -0.75


def test_step_and_memory_have_a_rate_each():
    """Memory 0.01 after the gradient 1; then 0.009 - 0.1 s changes sign at s = 0.09."""
    for opposing, moved in ((-0.0899, -2.0), (-0.0901, 0.0)):
        param = _parameter(0.0)
        optimizer = Lion([param], lr=1.0)
        for gradient in (1.0, opposing):
            param.grad = torch.tensor([gradient], dtype=DOUBLE)
            optimizer.step()
        assert param.item() == moved


def test_decay_shrinks_before_the_step_by_rate_times_decay():
    param = _parameter(2.0, 2.0)
    param.grad = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    Lion([param], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(param.data, torch.tensor([1.9, 1.8], dtype=DOUBLE))


# agreement with something independent


@pytest.mark.parametrize("peer", [lion_pytorch.Lion, pytorch_optimizer.Lion])
@pytest.mark.parametrize(
    "settings", [{}, {"lr": 0.3, "betas": (0.5, 0.7)}, {"lr": 0.01, "weight_decay": 2.0}]
)
def test_fifty_steps_agree_with_peers(peer, settings):
    start = torch.linspace(-1, 1, 12, dtype=DOUBLE).view(3, 4)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine, reference = Lion([ours], **settings), peer([theirs], **settings)
    for gradient in _gradients():
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        mine.state[ours]["exp_avg"], reference.state[theirs]["exp_avg"], rtol=1e-12, atol=1e-12
    )


# laws


def test_scaling_the_loss_changes_nothing():
    params = [_parameter(0.3, -0.7) for _ in range(2)]
    optimizers = [Lion([param], lr=0.01, weight_decay=0.1) for param in params]
    for gradient in _gradients():
        for param, optimizer, scale in zip(params, optimizers, (1.0, 1024.0), strict=True):
            param.grad = gradient[0, :2] * scale
            optimizer.step()
    assert torch.equal(params[0], params[1])


def test_decay_keeps_parameters_in_a_box_of_one_over_it():
    param = _parameter(*[0.0] * 4)
    optimizer = Lion([param], lr=0.05, weight_decay=4.0)
    for gradient in _gradients(200):
        param.grad = gradient[0] - 1e4  # always downhill to the right
        optimizer.step()
    assert param.abs().max() <= 0.25 and (param - 0.25).abs().max() < 1e-9


# errors


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (1.0, 0.99)}, r"beta1 must lie in \[0, 1\); got 1\.0"),
        ({"betas": (0.9, -0.1)}, r"beta2 must lie in \[0, 1\); got -0\.1"),
        ({"weight_decay": -1.0}, r"weight_decay must not be negative; got -1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Lion([_parameter(0.0)], **settings)
