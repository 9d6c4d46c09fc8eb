"""Tests of lmlosses.lab.memory."""

import pytest
import torch

from lmlosses.lab.memory import largest_tensor
from lmlosses.logprobs import pair_stats


def test_largest_tensor_is_the_square_and_not_the_sum_of_all():
    rows = torch.ones(50, 2)
    assert largest_tensor(lambda: (rows @ rows.t()).exp().sum()) == 50 * 50 * 4


def test_what_the_backward_pass_makes_counts():
    rows = torch.ones(50, 1, requires_grad=True)
    assert largest_tensor(lambda: (rows * 2).sum().backward()) == 200
    # expanded forward, filled backward
    wide = lambda: (rows.expand(50, 50).square()).sum().backward()  # noqa: E731
    assert largest_tensor(wide) == 50 * 50 * 4


def test_a_view_counts_as_what_it_views_and_nothing_as_nothing():
    rows = torch.ones(50, 2)
    assert largest_tensor(lambda: rows[:1].exp()) == 400
    assert largest_tensor(lambda: None) == 0


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_it_sees_into_the_operators_of_the_library(implementation):
    queries = torch.ones(256, 2, requires_grad=True)
    own = torch.arange(256)
    found = largest_tensor(
        lambda: pair_stats(
            queries, torch.ones(256, 2), own, implementation=implementation, workspace=2**15
        ).logps.sum().backward()
    )  # fmt: skip
    assert (found >= 256 * 256 * 4) == (implementation == "reference") and found > 256 * 2 * 4


def test_errors_pass_through():
    with pytest.raises(ZeroDivisionError, match="division"):
        largest_tensor(lambda: 1 / 0)
