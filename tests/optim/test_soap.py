import copy

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lmlosses.optim.soap import SOAP


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def twins(*shape, dtype=torch.float64):
    start = drawn(*shape, dtype=dtype)
    return nn.Parameter(start.clone()), nn.Parameter(start.clone())


def gradient(step, *shape):
    return drawn(*shape, seed=1000 + step) * 10.0 ** (step / 10 - 3)


def slow_soap(start, gradients, *, lr, beta1, beta2, eps, decay, frequency):
    """Algorithms 3 and 4 for a matrix, momentum kept unturned, as they are printed."""
    w, momentum, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    left = (1 - beta2) * gradients[0] @ gradients[0].T
    right = (1 - beta2) * gradients[0].T @ gradients[0]
    q_left, q_right = (torch.linalg.eigh(m)[1].flip(1) for m in (left, right))
    for t, g in enumerate(gradients[1:], start=1):
        momentum = beta1 * momentum + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * (q_left.T @ g @ q_right) ** 2
        adam = (q_left.T @ momentum @ q_right) / (1 - beta1**t)
        adam = adam / (second.sqrt() + eps) * (1 - beta2**t) ** 0.5
        w = (1 - lr * decay) * (w - lr * q_left @ adam @ q_right.T)
        left = beta2 * left + (1 - beta2) * g @ g.T
        right = beta2 * right + (1 - beta2) * g.T @ g
        if t % frequency == 0:
            by_left = (q_left.T @ left @ q_left).diagonal().sort(descending=True)[1]
            by_right = (q_right.T @ right @ q_right).diagonal().sort(descending=True)[1]
            second = second[by_left][:, by_right]
            q_left = torch.linalg.qr(left @ q_left[:, by_left])[0]
            q_right = torch.linalg.qr(right @ q_right[:, by_right])[0]
    return w


def test_first_step_finds_the_axes_and_moves_nothing():
    param = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    param.grad = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    optimizer = SOAP([param])
    optimizer.step()
    assert torch.equal(param.data, torch.ones(2, 2, dtype=torch.float64))
    axes = torch.tensor([[0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[param]["Q_1"].abs(), axes)
    assert not optimizer.state[param]["exp_avg"].any()


def test_second_step_of_a_rank_one_gradient_has_the_length_of_the_rate():
    # along its axes the gradient is one number, and Adam's first step is its sign
    param = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    optimizer = SOAP([param], lr=0.1, weight_decay=0.0)
    slope = torch.outer(drawn(3), drawn(5, seed=1))
    for _ in range(2):
        param.grad = slope.clone()
        optimizer.step()
    # entries that are zero up to rounding are divided by eps and stay small
    torch.testing.assert_close(param.data, -0.1 * slope / slope.norm(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(6, 6), (5, 8), (7,), (3, 4, 5), ()])
def test_fifty_steps_without_a_turn_agree_with_pytorch_optimizer(shape):
    ours, theirs = twins(*shape)
    settings = {"lr": 0.1, "weight_decay": 0.3, "precondition_frequency": 1000}
    mine, reference = SOAP([ours], **settings), pytorch_optimizer.SOAP([theirs], **settings)
    for step in range(50):
        ours.grad = gradient(step, *shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (5, 8), (8, 5), (3, 4, 5)])
@pytest.mark.parametrize("options", [{}, {"correct_bias": False, "shampoo_beta": 0.5}])
def test_fifty_steps_with_turns_agree_with_pytorch_optimizer(shape, options):
    # whose QR is in float32 whatever the parameters are
    ours, theirs = twins(*shape)
    settings = {"lr": 0.1, "precondition_frequency": 5, **options}
    mine, reference = SOAP([ours], **settings), pytorch_optimizer.SOAP([theirs], **settings)
    for step in range(50):
        ours.grad = gradient(step, *shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - drawn(*shape)).abs().max() > 0.5


@pytest.mark.parametrize("frequency", [1, 7])
def test_fifty_steps_with_turns_agree_with_the_printed_algorithm(frequency):
    param = nn.Parameter(drawn(5, 5))
    settings = {"lr": 0.1, "eps": 1e-8}
    optimizer = SOAP([param], precondition_frequency=frequency, weight_decay=0.3, **settings)
    gradients = [gradient(step, 5, 5) for step in range(50)]
    for one in gradients:
        param.grad = one.clone()
        optimizer.step()
    expected = slow_soap(
        drawn(5, 5), gradients, beta1=0.95, beta2=0.95, decay=0.3, frequency=frequency, **settings
    )
    torch.testing.assert_close(param.data, expected, rtol=1e-11, atol=1e-11)


def test_turning_rows_and_columns_turns_the_path():
    left, right = (torch.linalg.qr(drawn(n, n, seed=n))[0] for n in (5, 5))
    plain, turned = nn.Parameter(drawn(5, 5)), nn.Parameter(left @ drawn(5, 5) @ right)
    optimizers = [SOAP([p], lr=0.1, eps=0.0, precondition_frequency=3) for p in (plain, turned)]
    for step in range(20):
        plain.grad = drawn(5, 5, seed=step)
        turned.grad = left @ plain.grad @ right
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(left @ plain @ right, turned, rtol=1e-8, atol=1e-8)


def test_axes_stay_orthonormal():
    param = nn.Parameter(drawn(6, 4, dtype=torch.float32))
    optimizer = SOAP([param], precondition_frequency=1)
    for step in range(30):
        param.grad = gradient(step, 6, 4).float()
        optimizer.step()
    for name, size in (("Q_0", 6), ("Q_1", 4)):
        axes = optimizer.state[param][name]
        torch.testing.assert_close(axes.T @ axes, torch.eye(size), rtol=0, atol=1e-5)


def test_without_turned_axes_it_is_adamw_one_step_late():
    ours, theirs = twins(4, 3)
    mine = SOAP([ours], lr=0.1, max_precond_dim=0, weight_decay=0.0, eps=0.0)
    adam = torch.optim.Adam([theirs], lr=0.1, betas=(0.95, 0.95), eps=0.0)
    for step in range(10):
        ours.grad = drawn(4, 3, seed=step)
        mine.step()
        if step > 0:
            theirs.grad = drawn(4, 3, seed=step)
            adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_vectors_are_turned_only_on_request():
    def names(**settings):
        param = nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        optimizer = SOAP([param], **settings)
        optimizer.step()
        return set(optimizer.state[param])

    assert names() == {"step", "exp_avg", "exp_avg_sq"}
    assert names(precondition_1d=True) == names() | {"GG_0", "Q_0"}


def test_long_axes_are_left_as_they_are():
    param = nn.Parameter(torch.ones(4, 9))
    param.grad = torch.ones(4, 9)
    optimizer = SOAP([param], max_precond_dim=8)
    optimizer.step()
    assert {"GG_0", "Q_0"} < set(optimizer.state[param])
    assert not {"GG_1", "Q_1"} & set(optimizer.state[param])


def test_normalized_updates_have_a_root_mean_square_of_the_rate():
    param = nn.Parameter(drawn(4, 3))
    optimizer = SOAP([param], lr=0.1, normalize_grads=True, weight_decay=0.0, correct_bias=False)
    for step in range(5):
        before = param.detach().clone()
        param.grad = drawn(4, 3, seed=step)
        optimizer.step()
    assert (param - before).square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-12)


def test_interrupted_run_continues_to_the_bit():
    whole, part = twins(4, 6)
    first, second = (SOAP([p], precondition_frequency=2) for p in (whole, part))
    for step in range(5):
        whole.grad, part.grad = gradient(step, 4, 6), gradient(step, 4, 6)
        first.step()
        second.step()
    resumed = nn.Parameter(part.detach().clone())
    third = SOAP([resumed])
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for step in range(5, 12):
        whole.grad, resumed.grad = gradient(step, 4, 6), gradient(step, 4, 6)
        first.step()
        third.step()
    assert torch.equal(whole, resumed)


def test_gradient_of_zeros_moves_nothing_but_decay():
    param = nn.Parameter(torch.ones(3, 3))
    optimizer = SOAP([param], lr=0.1, weight_decay=0.5, precondition_frequency=1)
    for _ in range(3):
        param.grad = torch.zeros(3, 3)
        optimizer.step()
    torch.testing.assert_close(param.data, torch.full((3, 3), 0.95**2))


def test_half_precision_keeps_its_state_in_single():
    param = nn.Parameter(drawn(4, 3, dtype=torch.bfloat16))
    optimizer = SOAP([param], precondition_frequency=1)
    for step in range(3):
        param.grad = drawn(4, 3, seed=step, dtype=torch.bfloat16)
        optimizer.step()
    state = optimizer.state[param]
    assert param.dtype == torch.bfloat16 and param.isfinite().all()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_step_runs_on_the_meta_device():
    param = nn.Parameter(torch.zeros(4, 3, device="meta"))
    optimizer = SOAP([param], lr=torch.zeros((), device="meta"), precondition_frequency=1)
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()


@pytest.mark.bad_input
def test_sharded_tensor_is_refused():
    sharded = nn.Parameter(torch.zeros(2, 2))
    sharded.to_local = lambda: sharded
    with pytest.raises(TypeError, match="SOAP reads whole tensors .* DTensor for parameter 0"):
        SOAP([sharded])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must not be negative; got -1.0"),
        ({"betas": (1.0, 0.9)}, ValueError, r"beta1 must lie in \[0, 1\); got 1\.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"beta2 must lie in \[0, 1\); got 1\.0"),
        ({"shampoo_beta": 1.0}, ValueError, r"shampoo_beta must lie in \[0, 1\); got 1\.0"),
        ({"eps": -1e-8}, ValueError, "eps must not be negative"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must not be negative"),
        ({"precondition_frequency": 0}, ValueError, "precondition_frequency must be positive"),
        ({"precondition_frequency": 2.5}, TypeError, "frequency must be a whole number"),
        ({"max_precond_dim": -1}, ValueError, "max_precond_dim must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        SOAP([nn.Parameter(torch.zeros(2, 2))], **settings)
