import pytest
import torch
from torch import nn

from lmlosses.optim.adafactor import Adafactor


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def twins(*shape):
    return nn.Parameter(drawn(*shape)), nn.Parameter(drawn(*shape))


def gradient(step, *shape):
    return drawn(*shape, seed=1000 + step) * 10.0 ** (step / 10 - 3)


def test_first_step_moves_every_entry_by_its_share_of_the_weights():
    # the root mean square of the weights is 2; a rank-one square is met exactly
    param = nn.Parameter(torch.full((2, 3), 2.0, dtype=torch.float64))
    slopes = torch.outer(torch.tensor([1.0, -50.0]), torch.tensor([1.0, 2.0, 3.0]))
    param.grad = slopes.double()
    Adafactor([param], lr=0.1).step()
    torch.testing.assert_close(param.data, 2.0 - 0.2 * param.grad.sign())


@pytest.mark.parametrize("shape", [(5, 8), (7,), (3, 4, 5), (), (1, 1)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1, "lr": 0.5},
        {"d": 2.0, "beta2_decay": -0.5, "eps": (1e-3, 1e-2), "maximize": True},
        {"eps": (0.5, 3.0), "lr": 1.0},
    ],
)
def test_fifty_steps_agree_with_torch(settings, shape):
    ours, theirs = twins(*shape)
    mine, reference = Adafactor([ours], **settings), torch.optim.Adafactor([theirs], **settings)
    for step in range(50):
        ours.grad = gradient(step, *shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name, tensor in reference.state[theirs].items():
        torch.testing.assert_close(mine.state[ours][name], tensor, rtol=1e-12, atol=0)


def test_state_of_a_matrix_is_a_row_and_a_column():
    param = nn.Parameter(torch.ones(30, 40))
    param.grad = torch.ones(30, 40)
    optimizer = Adafactor([param])
    optimizer.step()
    sizes = {name: tensor.numel() for name, tensor in optimizer.state[param].items()}
    assert sizes == {"step": 1, "row_var": 30, "col_var": 40}


def test_factored_estimate_keeps_the_means_of_rows_and_columns():
    from lmlosses.optim.adafactor import _second_moment

    square = drawn(4, 6).square()
    state = {"row_var": torch.zeros(4, 1).double(), "col_var": torch.zeros(1, 6).double()}
    estimate = _second_moment(square.sqrt(), state, 1.0, 1e-30)
    torch.testing.assert_close(estimate.mean(dim=0), square.mean(dim=0))
    torch.testing.assert_close(estimate.mean(dim=1), square.mean(dim=1))
    assert torch.linalg.matrix_rank(estimate) == 1


def test_no_update_is_larger_than_d_allows():
    param = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    optimizer = Adafactor([param], lr=0.1, beta2_decay=-2.0)
    for scale in (1e-6, 1e-6, 1e-6, 1.0):  # a gradient a million times the usual
        before = param.detach().clone()
        param.grad = torch.full_like(param, scale)
        optimizer.step()
    relative = (param - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert relative.item() == pytest.approx(0.1, rel=1e-9)


def test_rate_as_a_tensor_is_the_rate():
    ours, theirs = twins(4, 3)
    rate = torch.tensor(0.9, dtype=torch.float64)
    optimizers = (
        Adafactor([ours], lr=rate, weight_decay=0.1),
        Adafactor([theirs], lr=0.9, weight_decay=0.1),
    )
    for step in range(3):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = drawn(4, 3, seed=step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    assert rate.item() == 0.9


def test_half_precision_is_computed_in_single():
    half = nn.Parameter(drawn(4, 3, dtype=torch.bfloat16))
    single = nn.Parameter(half.detach().float())
    pair = Adafactor([half]), Adafactor([single])
    half.grad = drawn(4, 3, seed=1, dtype=torch.bfloat16)
    single.grad = half.grad.float()
    for optimizer in pair:
        optimizer.step()
    assert torch.equal(half.data, single.data.bfloat16())
    assert pair[0].state[half]["row_var"].dtype == torch.float32


def test_zero_gradient_and_empty_parameter_are_survived():
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(0, 3))]
    for param in params:
        param.grad = torch.zeros_like(param)
    Adafactor(params).step()
    assert torch.equal(params[0].data, torch.ones(2, 2))


def test_step_runs_on_the_meta_device():
    params = [nn.Parameter(torch.zeros(*shape, device="meta")) for shape in ((4, 3), (5,))]
    for param in params:
        param.grad = torch.zeros_like(param)
    Adafactor(params, lr=torch.zeros((), device="meta")).step()


@pytest.mark.bad_input
def test_sharded_tensor_is_refused():
    sharded = nn.Parameter(torch.zeros(2, 2))
    sharded.to_local = lambda: sharded
    with pytest.raises(TypeError, match="Adafactor reads whole tensors .* for parameter 0"):
        Adafactor([sharded])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative; got -1.0"),
        ({"beta2_decay": 0.1}, "beta2_decay must not be positive; got 0.1"),
        ({"eps": (-1.0, 1e-3)}, "eps1 must not be negative; got -1.0"),
        ({"eps": (None, -1.0)}, "eps2 must not be negative; got -1.0"),
        ({"d": 0.5}, "d must be at least 1; got 0.5"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Adafactor([nn.Parameter(torch.zeros(2))], **settings)
