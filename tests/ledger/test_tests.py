"""The ledger's tests are tested: each fails when a function that its row names is broken."""

import functools
import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from lmlosses.precision import LossScaler
from lmlosses.schedules import Schedule
from tests.ledger.rows import ROWS
from tests.ledger.test_rows import resolve

BREAKS = {
    "negated": lambda tensor: -tensor,
    "nudged": lambda tensor: tensor * 1.1 + 0.1,
}


def changed(result: Any, change: Any) -> Any:
    """The result with every floating-point number in it changed."""
    if isinstance(result, Tensor):
        return change(result) if result.is_floating_point() else result
    if isinstance(result, float):
        return change(result)
    if isinstance(result, list):
        return [changed(part, change) for part in result]
    if isinstance(result, tuple):
        parts = [changed(part, change) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    if isinstance(result, Schedule):  # one whose values are wrong
        return lambda step: changed(result(step), change)
    return result


def broken(target: Any, change: Any) -> Any:
    """A function that returns wrong numbers, or an optimizer that leaves wrong ones behind."""
    if isinstance(target, type) and issubclass(target, torch.optim.Optimizer):

        def update(self, param, grad, state, group):  # type: ignore[no-untyped-def]
            target.update(self, param, grad, state, group)
            for tensor in (param, *state.values()):
                if isinstance(tensor, Tensor) and tensor is not state["step"]:
                    tensor.copy_(change(tensor))

        return type(target.__name__, (target,), {"update": update})
    if isinstance(target, type) and issubclass(target, LossScaler):

        def scale(self, loss):  # type: ignore[no-untyped-def]
            return change(target.scale(self, loss))

        def next_scale(self, finite):  # type: ignore[no-untyped-def]
            return change(target.next_scale(self, finite))

        return type(target.__name__, (target,), {"scale": scale, "next_scale": next_scale})
    if isinstance(target, type):
        original = target.forward

        def forward(self, *arguments: Any, **settings: Any) -> Any:  # type: ignore[no-untyped-def]
            return changed(original(self, *arguments, **settings), change)

        return type(target.__name__, (target,), {"forward": forward})

    @functools.wraps(target)
    def wrapper(*arguments: Any, **settings: Any) -> Any:
        return changed(target(*arguments, **settings), change)

    return wrapper


def test_breaking_changes_every_kind_of_result():
    pair = torch.ones(2), 1.0
    for change in BREAKS.values():
        tensor, number = changed(pair, change)
        assert not torch.equal(tensor, pair[0]) and number != 1.0


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize(
    ("row", "name"),
    [pytest.param(row, name, id=f"{row.id}-{name}") for row in ROWS for name in row.api],
)
def test_entry_fails_when_its_function_is_broken(row, name, how, monkeypatch):
    path, _, function = row.test.partition("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    target = resolve(name)
    replacement = broken(target, BREAKS[how])
    for holder in list(sys.modules.values()):
        if getattr(holder, "__name__", "").split(".")[0] == "lmlosses" or holder is module:
            for attribute, value in list(vars(holder).items()):
                if value is target:
                    monkeypatch.setattr(holder, attribute, replacement)
    try:
        getattr(module, function)()
    except Warning:  # not a failure of the test: an accident on the way
        raise
    except Exception:  # a wrong number, or a check that refuses it
        return
    pytest.fail(f"{function} passes although {name} is {how}")
