import copy
import pickle
import warnings

import pytest
import torch

from lmlosses.optim.adam import Adam, AdamW
from lmlosses.optim.adopt import ADOPT
from lmlosses.optim.cautious import cautious
from lmlosses.optim.lion import Lion
from lmlosses.optim.schedule_free import ScheduleFreeAdamW

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peers warn on import
    import pytorch_optimizer

DOUBLE = torch.float64


def _gradients(*shape: int, steps: int = 50) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(steps, *shape, generator=generator, dtype=DOUBLE))


def _parameters(count: int = 1) -> list[torch.nn.Parameter]:
    start = torch.linspace(-1, 1, 12, dtype=DOUBLE).view(3, 4)
    return [torch.nn.Parameter(start.clone()) for _ in range(count)]


def _run(optimizer, param, gradients):
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()


# values known by hand


def test_entries_that_disagree_wait_and_the_others_share_their_steps():
    param = torch.nn.Parameter(torch.zeros(4, dtype=DOUBLE))
    optimizer = cautious(Lion)([param], lr=1.0)
    _run(optimizer, param, [torch.ones(4, dtype=DOUBLE)])
    assert param.tolist() == [-0.8] * 4  # 4 / (4 + 1)
    _run(optimizer, param, [torch.tensor([1.0, -0.01, 0.0, -1.0], dtype=DOUBLE)])
    first, second, third, fourth = param.tolist()  # 4 / (2 + 1)
    assert (second, third) == (-0.8, -0.8)
    assert first == pytest.approx(-0.8 - 4 / 3) and fourth == pytest.approx(-0.8 + 4 / 3)


def test_all_that_disagree_move_nothing():
    param = torch.nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    optimizer = cautious(Lion)([param], lr=1.0)
    opposite = torch.full((2,), -1e-3, dtype=DOUBLE)
    _run(optimizer, param, [torch.ones(2, dtype=DOUBLE), opposite])
    assert param.tolist() == [-2 / 3] * 2


def test_decay_is_not_masked():
    param = torch.nn.Parameter(torch.ones(2, dtype=DOUBLE))
    param.grad = torch.zeros(2, dtype=DOUBLE)
    cautious(Lion)([param], lr=0.1, weight_decay=0.5).step()
    assert param.tolist() == [0.95, 0.95]


def test_tiny_gradients_that_agree_are_kept():
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.tensor([1e-30])  # its square is below the smallest float32
    cautious(ADOPT)([param], lr=1.0).step()
    optimizer = cautious(Adam)([param], lr=1.0, eps=1e-40)
    optimizer.step()
    assert param.item() < 0


# agreement with something independent


@pytest.mark.parametrize(
    "settings", [{"lr": 0.01, "weight_decay": 0.3}, {"lr": 0.1, "betas": (0.5, 0.8)}]
)
def test_fifty_steps_of_lion_agree_with_a_peer(settings):
    ours, theirs = _parameters(2)
    gradients = _gradients(3, 4)
    _run(cautious(Lion)([ours], **settings), ours, gradients)
    _run(pytorch_optimizer.Lion([theirs], cautious=True, **settings), theirs, gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_fifty_steps_of_adamw_agree_with_a_slow_loop():
    (param,) = _parameters()
    theta = param.detach().clone()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    lr, decay, beta1, beta2 = 0.01, 0.3, 0.9, 0.99
    for t, g in enumerate(_gradients(3, 4), start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        phi = (u * g > 0).double()
        theta = theta - lr * decay * theta - lr * 12 / (1 + phi.sum()) * phi * u
    _run(cautious(AdamW)([param], lr, (beta1, beta2), weight_decay=decay), param, _gradients(3, 4))
    torch.testing.assert_close(param.data, theta, rtol=1e-12, atol=1e-12)


def test_adopt_agrees_with_a_peer_that_counts_its_clip_alike():
    ours, theirs = _parameters(2)
    gradients = _gradients(3, 4)
    peer = pytorch_optimizer.ADOPT(
        [theirs], 0.01, clip_lambda=lambda step: (step - 1) ** 0.25, cautious=True
    )
    _run(cautious(ADOPT)([ours], 0.01), ours, gradients)
    _run(peer, theirs, gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [Lion, Adam, ADOPT])
def test_lists_count_a_share_for_each_tensor(rule):
    shapes = [(3, 4), (7,), ()]
    ends = []
    for foreach in (False, True):
        params = [torch.nn.Parameter(torch.ones(shape, dtype=DOUBLE)) for shape in shapes]
        optimizer = cautious(rule)(params, lr=0.1, foreach=foreach)
        for step in range(10):
            for param in params:
                param.grad = _gradients(*param.shape)[step]
            optimizer.step()
        ends.append(params)
    for one_by_one, together in zip(*ends, strict=True):
        torch.testing.assert_close(one_by_one, together, rtol=1e-12, atol=1e-12)


# laws


def test_no_entry_moves_against_its_gradient():
    (param,) = _parameters()
    optimizer = cautious(Adam)([param], lr=0.1, betas=(0.99, 0.9))
    for gradient in _gradients(3, 4):
        before = param.detach().clone()
        _run(optimizer, param, [gradient])
        assert ((param - before) * gradient <= 0).all()


def test_state_is_that_of_the_rule():
    ours, theirs = _parameters(2)
    mine, plain = cautious(Lion)([ours]), Lion([theirs])
    for optimizer, param in ((mine, ours), (plain, theirs)):
        _run(optimizer, param, _gradients(3, 4))
    assert torch.equal(mine.state[ours]["exp_avg"], plain.state[theirs]["exp_avg"])


def test_class_is_made_once_and_named():
    assert cautious(Lion) is cautious(Lion) and issubclass(cautious(Lion), Lion)
    assert cautious(Lion).__name__ == "CautiousLion" and cautious(Lion) is not cautious(AdamW)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_instances_are_copied_with_their_state(duplicate):
    (param,) = _parameters()
    optimizer = cautious(Lion)([param], lr=0.1)
    _run(optimizer, param, _gradients(3, 4, steps=5))
    twin = duplicate(optimizer)
    assert type(twin) is cautious(Lion)
    (other,) = twin.param_groups[0]["params"]
    for gradient in _gradients(3, 4, steps=3):
        _run(optimizer, param, [gradient])
        _run(twin, other, [gradient])
    assert other is not param and torch.equal(other, param)


# errors


@pytest.mark.bad_input
@pytest.mark.parametrize("rule", [torch.optim.AdamW, "Lion"])
def test_what_is_no_elementwise_rule_is_refused(rule):
    with pytest.raises(TypeError, match="rule must be an ElementwiseRule such as Lion; got"):
        cautious(rule)


def test_schedule_free_is_refused():
    with pytest.raises(TypeError, match="can skip entries; ScheduleFreeAdamW cannot"):
        cautious(ScheduleFreeAdamW)


def test_fused_kernels_are_refused():
    with pytest.raises(ValueError, match="fused must be false, its kernels have no mask"):
        cautious(AdamW)(_parameters(), fused=True)
