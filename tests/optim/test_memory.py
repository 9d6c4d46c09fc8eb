import pytest
import torch
from torch import nn

from lmlosses.optim.adam import AdamW
from lmlosses.optim.lion import Lion
from lmlosses.optim.memory import state_bytes


def _stepped(kind, *shapes, dtype=torch.float32, **settings):
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = kind(params, lr=0.1, **settings)
    optimizer.step()
    return optimizer


def test_adamw_holds_two_numbers_for_each_and_a_counter_for_each_tensor():
    held = state_bytes(_stepped(AdamW, (100, 10), (10,)))
    assert held.by_name == {"step": 8, "exp_avg": 4040, "exp_avg_sq": 4040}
    assert held.parameters == 1010
    assert held.total == 8088
    assert held.per_parameter == 8088 / 1010


def test_lion_holds_half_of_that():
    held = state_bytes(_stepped(Lion, (1000,)))
    assert held.by_name["exp_avg"] == 4000 and set(held.by_name) == {"step", "exp_avg"}


def test_half_precision_is_remembered_in_single_here_and_in_half_by_torch():
    ours = state_bytes(_stepped(AdamW, (1000,), dtype=torch.bfloat16))
    theirs = state_bytes(_stepped(torch.optim.AdamW, (1000,), dtype=torch.bfloat16))
    assert ours.by_name["exp_avg"] == 4000
    assert theirs.by_name["exp_avg"] == 2000


def test_the_count_is_of_storage_not_of_what_a_view_shows():
    optimizer = _stepped(Lion, (8,))
    (state,) = optimizer.state.values()
    state["exp_avg"] = torch.zeros(100)[:8]
    assert state_bytes(optimizer).by_name["exp_avg"] == 400


def test_tensors_in_lists_are_found():
    optimizer = _stepped(Lion, (8,))
    (state,) = optimizer.state.values()
    state["axes"] = [torch.zeros(2, 2), {"more": (torch.zeros(3),)}]
    state["name"] = "no tensor"
    held = state_bytes(optimizer).by_name
    assert held["axes"] == 28 and held["name"] == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, Lion])
def test_nothing_is_held_before_the_first_step(kind):
    held = state_bytes(kind([nn.Parameter(torch.ones(3))], lr=0.1))
    assert (held.total, held.parameters, held.per_parameter) == (0, 3, 0.0)


def test_the_meta_device_is_counted_as_if_it_held_something():
    param = nn.Parameter(torch.empty(1000, device="meta"))
    param.grad = torch.empty_like(param)
    optimizer = AdamW([param])
    optimizer.step()
    assert state_bytes(optimizer).by_name["exp_avg"] == 4000
