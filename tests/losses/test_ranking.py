import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from lmlosses.losses import entropy, listnet, margin_ranking, pairwise_auc

DOUBLE = torch.float64


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# values known by hand


def test_a_tied_pair_costs_log_two():
    losses = pairwise_auc(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0, 1.0]))
    log_two = torch.full((2,), math.log(2))
    torch.testing.assert_close(losses[0, ::2], log_two)
    torch.testing.assert_close(losses[1, 1], log_two[0])


def test_a_pair_in_order_by_log_three_costs_log_four_thirds():
    loss = pairwise_auc(torch.tensor([math.log(3.0)]), torch.tensor([0.0]))
    torch.testing.assert_close(loss, torch.tensor([[math.log(4 / 3)]]))
    wrong = pairwise_auc(torch.tensor([0.0]), torch.tensor([math.log(3.0)]))
    torch.testing.assert_close(wrong, torch.tensor([[math.log(4)]]))


def test_positives_are_rows_and_negatives_columns():
    losses = pairwise_auc(torch.tensor([5.0, 0.0]), torch.tensor([0.0, 0.0, 0.0]))
    assert losses.shape == (2, 3)
    assert (losses[0] < losses[1]).all()


def test_the_margin_falls_short_by_hand():
    first, second = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.5, 1.5, -3.0])
    targets = torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(
        margin_ranking(first, second, targets, margin=1.0), torch.tensor([0.5, 1.5, 0.0])
    )
    torch.testing.assert_close(
        margin_ranking(first, second, targets), torch.tensor([0.0, 0.5, 0.0])
    )


def test_equal_scores_of_a_list_cost_the_logarithm_of_its_length():
    loss = listnet(torch.full((2, 5), 7.0), torch.tensor([[3.0, 1, 0, 0, 2], [0, 0, 0, 0, 0]]))
    torch.testing.assert_close(loss, torch.full((2,), math.log(5)))


# agreement with something independent


def test_every_pair_agrees_with_a_slow_loop():
    positives, negatives = _draw(4), _draw(6, seed=1)
    losses = pairwise_auc(positives, negatives)
    for i, positive in enumerate(positives.tolist()):
        for j, negative in enumerate(negatives.tolist()):
            expected = math.log1p(math.exp(-(positive - negative)))
            assert losses[i, j].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_margin_ranking_agrees_with_torch(margin):
    first, second = _draw(5, 3), _draw(5, 3, seed=1)
    targets = _draw(5, 3, seed=2).sign()
    expected = F.margin_ranking_loss(first, second, targets, margin=margin, reduction="none")
    assert torch.equal(margin_ranking(first, second, targets, margin=margin), expected)


def test_listnet_agrees_with_a_slow_loop_and_with_torch():
    scores, relevances = _draw(4, 6), _draw(4, 6, seed=1)
    losses = listnet(scores, relevances)
    torch.testing.assert_close(
        losses, F.cross_entropy(scores, relevances.softmax(-1), reduction="none")
    )
    for loss, s, r in zip(losses.tolist(), scores.tolist(), relevances.tolist(), strict=True):
        worth, strength = sum(map(math.exp, r)), sum(map(math.exp, s))
        slow = -sum(
            math.exp(b) / worth * math.log(math.exp(a) / strength)
            for a, b in zip(s, r, strict=True)
        )
        assert loss == pytest.approx(slow, rel=1e-12)


# laws


def test_the_mean_over_pairs_bounds_what_the_area_under_the_curve_misses():
    for seed in range(5):
        positives, negatives = _draw(20, seed=seed) + 0.5, _draw(30, seed=seed + 50)
        truth = [1] * 20 + [0] * 30
        missed = 1 - roc_auc_score(truth, torch.cat([positives, negatives]).numpy())
        bound = pairwise_auc(positives, negatives).mean().item() / math.log(2)
        assert missed < bound


def test_raising_every_score_changes_no_ranking_loss():
    first, second, targets = _draw(5), _draw(5, seed=1), _draw(5, seed=2).sign()
    for loss in (
        pairwise_auc,
        listnet,
        lambda a, b: margin_ranking(a, b, targets, margin=0.3),
    ):
        torch.testing.assert_close(
            loss(first + 1e4, second + 1e4), loss(first, second), rtol=1e-9, atol=1e-9
        )


def test_ranking_gradients_pull_positives_up_and_negatives_down():
    positives, negatives = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    up, down = torch.autograd.grad(
        pairwise_auc(positives, negatives).sum(), (positives, negatives)
    )
    assert up.tolist() == [-1.5, -1.5]
    assert down.tolist() == [1.0, 1.0, 1.0]


def test_swapping_the_pair_and_its_target_changes_nothing():
    first, second, targets = _draw(6), _draw(6, seed=1), _draw(6, seed=2).sign()
    assert torch.equal(
        margin_ranking(first, second, targets, margin=0.4),
        margin_ranking(second, first, -targets, margin=0.4),
    )


def test_the_least_listnet_loss_is_the_entropy_of_the_truth():
    relevances = _draw(4, 6)
    best = entropy(relevances.log_softmax(-1))
    scores = (relevances + 3.0).requires_grad_()
    losses = listnet(scores, relevances)
    torch.testing.assert_close(losses, best)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    assert (listnet(_draw(4, 6, seed=1), relevances) > best).all()


def test_padding_a_list_with_minus_infinity_changes_nothing():
    scores, relevances = _draw(3, 4), _draw(3, 4, seed=1)
    padding = torch.full((3, 2), -math.inf, dtype=DOUBLE)
    padded = torch.cat([scores, padding], -1).requires_grad_()
    worth = torch.cat([relevances, padding], -1).requires_grad_()
    losses = listnet(padded, worth)
    torch.testing.assert_close(losses, listnet(scores, relevances))
    for gradient in torch.autograd.grad(losses.sum(), (padded, worth)):
        assert gradient.isfinite().all() and (gradient[:, 4:] == 0).all()


def test_an_item_that_is_worth_something_and_cannot_come_first_costs_infinitely_much():
    scores = torch.tensor([0.0, -math.inf])
    assert listnet(scores, torch.zeros(2)).item() == math.inf


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_scores_have_finite_losses_and_gradients(extreme):
    for loss in (
        lambda s: pairwise_auc(s, torch.zeros(2)),
        lambda s: margin_ranking(s, torch.zeros(2), torch.ones(2)),
        lambda s: listnet(s, torch.tensor([0.0, 1.0])),
    ):
        scores = torch.tensor([extreme, 0.0], requires_grad=True)
        values = loss(scores)
        (gradient,) = torch.autograd.grad(values.sum(), scores)
        assert values.isfinite().all() and gradient.isfinite().all()


def test_a_pair_far_out_of_order_costs_its_distance():
    loss = pairwise_auc(torch.tensor([-1e4]), torch.tensor([1e4]))
    torch.testing.assert_close(loss, torch.tensor([[2e4]]))


def test_a_pair_far_in_order_still_tells_its_distance():
    loss = pairwise_auc(torch.tensor([40.0], dtype=DOUBLE), torch.tensor([0.0], dtype=DOUBLE))
    torch.testing.assert_close(
        loss, torch.tensor([[math.exp(-40)]], dtype=DOUBLE), rtol=1e-12, atol=0
    )


# errors


@pytest.mark.bad_input
def test_pairwise_auc_refuses_scores_that_are_no_list():
    with pytest.raises(ValueError, match=r"positive_scores must have 1 axes; got shape \(2, 2\)"):
        pairwise_auc(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"negative_scores must have 1 axes; got shape \(\)"):
        pairwise_auc(torch.zeros(2), torch.tensor(0.0))
    with pytest.raises(TypeError, match="negative_scores must be a floating-point tensor"):
        pairwise_auc(torch.zeros(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="positive_scores must be a floating-point tensor"):
        pairwise_auc(torch.zeros(2, dtype=torch.long), torch.zeros(2))


@pytest.mark.bad_input
def test_margin_ranking_refuses_shapes_that_would_broadcast():
    two = torch.ones(2)
    with pytest.raises(
        ValueError, match=r"second must have shape \(2,\), the shape of first; got \(2, 1\)"
    ):
        margin_ranking(two, two.unsqueeze(1), two)
    with pytest.raises(
        ValueError, match=r"targets must have shape \(2,\), the shape of first; got \(1,\)"
    ):
        margin_ranking(two, two, torch.ones(1))


@pytest.mark.bad_input
@pytest.mark.parametrize("position", range(3))
def test_margin_ranking_refuses_whole_numbers(position):
    arguments = [torch.ones(2), torch.ones(2), torch.ones(2)]
    arguments[position] = arguments[position].long()
    name = ("first", "second", "targets")[position]
    with pytest.raises(
        TypeError, match=f"{name} must be a floating-point tensor; got torch.int64"
    ):
        margin_ranking(*arguments)


@pytest.mark.parametrize("wrong", [0.0, 0.5, -2.0, math.nan])
def test_margin_ranking_refuses_targets_that_are_neither_one_nor_minus_one(wrong):
    with pytest.raises(ValueError, match=f"targets must be 1 or -1; got {wrong:.3g}"):
        margin_ranking(torch.zeros(3), torch.zeros(3), torch.tensor([1.0, -1.0, wrong]))


@pytest.mark.bad_input
def test_margin_ranking_refuses_a_margin_that_is_negative_or_no_number():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="margin must not be negative; got -0.1"):
        margin_ranking(one, one, one, margin=-0.1)
    with pytest.raises(TypeError, match="margin must be a real number; got NoneType None"):
        margin_ranking(one, one, one, margin=None)


@pytest.mark.bad_input
def test_listnet_refuses_what_is_no_list_of_items():
    with pytest.raises(
        ValueError, match=r"relevances must have shape \(2, 3\), the shape of scores; got \(3,\)"
    ):
        listnet(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="scores must have at least one entry along axis -1"):
        listnet(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(TypeError, match="scores must be a floating-point tensor"):
        listnet(torch.zeros(2, dtype=torch.long), torch.zeros(2))
    with pytest.raises(TypeError, match="relevances must be a floating-point tensor"):
        listnet(torch.zeros(2), torch.zeros(2, dtype=torch.long))
