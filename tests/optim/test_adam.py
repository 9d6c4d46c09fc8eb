import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lmlosses.optim import Adam


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


@pytest.mark.parametrize("settings", [{}, {"maximize": True}, {"lr": 0.3, "betas": (0.5, 0.7)}])
def test_fifty_steps_agree_with_torch(settings):
    ours, theirs, gradients = same_start()
    mine, reference = Adam([ours], **settings), torch.optim.Adam([theirs], **settings)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            mine.state[ours][name], reference.state[theirs][name], rtol=1e-12, atol=1e-12
        )


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
