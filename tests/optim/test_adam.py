import copy
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lmlosses.optim import Adam, AdamW


class Start(NamedTuple):
    ours: Tensor
    theirs: Tensor
    gradients: list[Tensor]


def same_start(seed: int = 0, steps: int = 50) -> Start:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    gradients = [
        torch.randn(3, 4, generator=generator, dtype=torch.float64) * 10.0**scale
        for scale in torch.linspace(-6, 3, steps).tolist()
    ]
    return Start(torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone()), gradients)


def test_first_step_moves_every_entry_by_the_step_size():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    param.grad = torch.tensor([1e-3, -1e3], dtype=torch.float64)
    Adam([param], lr=0.5, eps=0.0).step()
    torch.testing.assert_close(param.data, torch.tensor([-0.5, 0.5], dtype=torch.float64))


def test_decoupled_decay_is_the_same_for_every_gradient():
    param = torch.nn.Parameter(torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64))
    param.grad = torch.tensor([0.0, 1e-3, 1e3], dtype=torch.float64)
    AdamW([param], lr=0.5, weight_decay=0.1, eps=1e-30).step()
    expected = torch.tensor([1.9, 1.4, 1.4], dtype=torch.float64)  # 5 % of 2, and a step of 0.5
    torch.testing.assert_close(param.data, expected)


def test_coupled_decay_vanishes_beside_a_large_gradient():
    param = torch.nn.Parameter(torch.tensor([2.0, 2.0], dtype=torch.float64))
    param.grad = torch.tensor([0.0, 1e3], dtype=torch.float64)
    Adam([param], lr=0.5, weight_decay=0.1, eps=0.0).step()
    expected = torch.tensor([1.5, 1.5], dtype=torch.float64)  # a full step either way
    torch.testing.assert_close(param.data, expected)


def take_steps(start: Start, *optimizers: torch.optim.Optimizer) -> None:
    for gradient in start.gradients:
        start.ours.grad, start.theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


def agree(one: torch.optim.Optimizer, other: torch.optim.Optimizer, start: Start) -> None:
    """The same parameters and the same state, name by name, to a rounding or two."""
    torch.testing.assert_close(start.ours, start.theirs, rtol=1e-12, atol=1e-12)
    mine, reference = one.state[start.ours], other.state[start.theirs]
    assert set(mine) == set(reference)
    for name, value in mine.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "amsgrad", "weight_decay", "maximize", "numbers"),
    list(
        itertools.product(
            ("Adam", "AdamW"),
            (False, True),
            (0.0, 0.1),
            (False, True),
            ({}, {"lr": 0.3, "betas": (0.5, 0.7), "eps": 0.1}),
        )
    ),
)
def test_fifty_steps_agree_with_torch(rule, amsgrad, weight_decay, maximize, numbers):
    start = same_start()
    settings = {
        "amsgrad": amsgrad, "weight_decay": weight_decay, "maximize": maximize, **numbers,
    }  # fmt: skip
    mine = {"Adam": Adam, "AdamW": AdamW}[rule]([start.ours], **settings)
    reference = getattr(torch.optim, rule)([start.theirs], **settings)
    take_steps(start, mine, reference)
    agree(mine, reference, start)


def test_defaults_are_torchs():
    for rule, reference in ((Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)):
        theirs = reference([torch.nn.Parameter(torch.zeros(1))]).defaults
        for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
            assert rule([torch.nn.Parameter(torch.zeros(1))]).defaults[name] == theirs[name]


@pytest.mark.parametrize("rule", [Adam, AdamW])
@pytest.mark.parametrize("way", ["fused", "foreach"])
@pytest.mark.parametrize(
    "settings", [{}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}]
)
def test_each_way_of_stepping_gives_the_rule(rule, way, settings):
    start = same_start()
    mine, other = rule([start.ours], **settings), rule([start.theirs], **{way: True}, **settings)
    take_steps(start, mine, other)
    agree(mine, other, start)


@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
def test_fused_is_torchs_fused_to_the_bit(rule):
    start = same_start()
    settings = {"amsgrad": True, "weight_decay": 0.1, "fused": True}
    mine = {"Adam": Adam, "AdamW": AdamW}[rule]([start.ours], **settings)
    reference = getattr(torch.optim, rule)([start.theirs], **settings)
    take_steps(start, mine, reference)
    assert torch.equal(start.ours, start.theirs)


def test_fused_and_the_rule_share_a_checkpoint():
    start = same_start(steps=10)
    plain, fused = AdamW([start.ours]), AdamW([start.theirs], fused=True)
    take_steps(start, plain, fused)
    for one, other in ((plain, fused), (fused, plain)):
        checkpoint = copy.deepcopy(one.state_dict())
        checkpoint["param_groups"][0]["fused"] = other.param_groups[0]["fused"]
        other.load_state_dict(checkpoint)
        take_steps(start, plain, fused)
        agree(plain, fused, start)


def test_fused_refuses_half_precision():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    message = "fused takes float32 or float64 parameters; got torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        AdamW([param], fused=True).step()


def test_amsgrad_remembers_the_largest_second_moment():
    ends = []
    for amsgrad in (False, True):
        param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = Adam([param], lr=1.0, betas=(0.0, 0.5), eps=0.0, amsgrad=amsgrad)
        for gradient in (8.0, 1.0):
            before = param.item()
            param.grad = torch.tensor([gradient], dtype=torch.float64)
            optimizer.step()
        ends.append(before - param.item())
    # second moments 32, then 16.5, corrected by 0.75
    torch.testing.assert_close(ends, [(0.75 / 16.5) ** 0.5, (0.75 / 32) ** 0.5])


def test_scale_of_the_gradient_does_not_matter_where_eps_is_negligible():
    start = same_start()
    optimizers = [AdamW([start.ours], eps=0.0), AdamW([start.theirs], eps=0.0)]
    for gradient in start.gradients:
        start.ours.grad, start.theirs.grad = gradient, 1e5 * gradient
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(start.ours, start.theirs, rtol=1e-12, atol=1e-12)


def test_step_leaves_the_gradient_alone():
    ours, _, gradients = same_start()
    ours.grad = gradients[0].clone()
    Adam([ours], maximize=True).step()
    assert torch.equal(ours.grad, gradients[0])


def test_parameter_without_gradient_does_not_move():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([param], lr=1.0)
    optimizer.step()
    assert torch.equal(param.data, torch.ones(2)) and not optimizer.state[param]


def test_groups_keep_their_own_settings():
    slow, fast = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    slow.grad, fast.grad = torch.ones(1), torch.ones(1)
    Adam([{"params": [slow], "lr": 0.1}, {"params": [fast], "lr": 0.2}]).step()
    torch.testing.assert_close(slow.data * 2, fast.data)


def test_interrupted_run_continues_to_the_bit():
    whole, part, gradients = same_start(steps=10)
    optimizers = [Adam([whole]), Adam([part])]
    for gradient in gradients[:5]:
        whole.grad, part.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    resumed = torch.nn.Parameter(part.detach().clone())
    second = Adam([resumed])
    second.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for gradient in gradients[5:]:
        whole.grad, resumed.grad = gradient.clone(), gradient.clone()
        optimizers[0].step()
        second.step()
    assert torch.equal(whole, resumed)


def test_closure_is_evaluated_with_gradients():
    param = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = Adam([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert param.item() < 2.0


def test_step_runs_on_the_meta_device():
    param = torch.nn.Parameter(torch.zeros(3, device="meta"))
    param.grad = torch.zeros(3, device="meta")
    Adam([param]).step()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"lr must not be negative; got -1\.0"),
        ({"betas": (1.0, 0.9)}, r"beta1 must lie in \[0, 1\); got 1\.0"),
        ({"betas": (0.9, -0.1)}, r"beta2 must lie in \[0, 1\); got -0\.1"),
        ({"eps": float("nan")}, "eps must be finite; got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Adam([torch.nn.Parameter(torch.zeros(1))], **settings)


@pytest.mark.bad_input
def test_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([0])).sum().backward()
    with pytest.raises(TypeError, match="Adam takes dense real gradients; got torch.sparse_coo"):
        Adam(embedding.parameters()).step()
