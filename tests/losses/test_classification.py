import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F

from lmlosses.losses import (
    binary_cross_entropy,
    binary_focal,
    brier,
    cross_entropy,
    entropy,
    focal,
    hinge,
    kl_divergence,
    multiclass_hinge,
    zero_one,
)

DOUBLE = torch.float64
FORBIDDEN = -math.inf
GAMMAS = [0.0, 0.3, 1.0, 2.0, 5.0]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def logits():
    return 2 * torch.randn(4, 6, 5, generator=_generator(0), dtype=DOUBLE)


@pytest.fixture
def indices():
    return torch.randint(5, (4, 6), generator=_generator(1))


@pytest.fixture
def probabilities():
    return torch.randn(4, 6, 5, generator=_generator(2), dtype=DOUBLE).softmax(-1)


@pytest.fixture
def weight():
    return torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=DOUBLE)


@pytest.fixture
def odds():
    return 3 * torch.randn(7, 5, generator=_generator(3), dtype=DOUBLE)


@pytest.fixture
def answers():
    return torch.randint(2, (7, 5), generator=_generator(4)).double()


def _gradient(loss, logits, *rest, **settings):
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, *rest, **settings).sum(), logits)
    return gradient


# cross_entropy


def test_uniform_model_scores_log_vocab():
    loss = cross_entropy(torch.zeros(3, 7), torch.tensor([0, 3, 6]))
    torch.testing.assert_close(loss, torch.full((3,), math.log(7)))


def test_three_to_one_against_costs_log_four_and_for_costs_log_four_thirds():
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2)
    loss = cross_entropy(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(loss, torch.tensor([math.log(4), math.log(4 / 3)]))


def test_smoothing_spreads_its_share_over_all_classes():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # surprises log 4 and log 4/3
    loss = cross_entropy(logits, torch.tensor([1]), label_smoothing=0.2)
    expected = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_a_class_weight_multiplies_the_surprise_of_that_class():
    logits = torch.zeros(2, 2)
    loss = cross_entropy(logits, torch.tensor([0, 1]), weight=torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(loss, torch.tensor([1.0, 5.0]) * math.log(2))


def test_shared_probability_costs_the_shared_surprise():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    loss = cross_entropy(logits, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(loss, torch.tensor([0.25 * math.log(4) + 0.75 * math.log(4 / 3)]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_and_its_gradient_agree_with_torch(
    logits, indices, probabilities, weight, smoothing, weighted, soft
):
    targets = probabilities if soft else indices
    settings = {"label_smoothing": smoothing, "weight": weight if weighted else None}

    def torchs(logits, targets, **settings):
        logits = logits.movedim(-1, 1)
        targets = targets.movedim(-1, 1) if soft else targets
        return F.cross_entropy(logits, targets, reduction="none", **settings)

    torch.testing.assert_close(
        cross_entropy(logits, targets, **settings), torchs(logits, targets, **settings)
    )
    torch.testing.assert_close(
        _gradient(cross_entropy, logits, targets, **settings),
        _gradient(torchs, logits, targets, **settings),
    )


def test_mean_cross_entropy_agrees_with_scikit_learn(logits, indices):
    expected = sklearn.metrics.log_loss(
        indices.ravel().numpy(), logits.reshape(-1, 5).softmax(-1).numpy()
    )
    assert cross_entropy(logits, indices).mean().item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_cross_entropy_is_softmax_minus_target(logits, indices, probabilities):
    one_hot = F.one_hot(indices, 5)
    torch.testing.assert_close(
        _gradient(cross_entropy, logits, indices), logits.softmax(-1) - one_hot
    )
    torch.testing.assert_close(
        _gradient(cross_entropy, logits, probabilities), logits.softmax(-1) - probabilities
    )


def test_certain_probabilities_are_the_same_as_indices(logits, indices, weight):
    one_hot = F.one_hot(indices, 5).double()
    for settings in ({}, {"label_smoothing": 0.3}, {"label_smoothing": 0.3, "weight": weight}):
        torch.testing.assert_close(
            cross_entropy(logits, one_hot, **settings), cross_entropy(logits, indices, **settings)
        )


def test_cross_entropy_is_entropy_plus_divergence(logits, probabilities):
    target, model = probabilities.log(), logits.log_softmax(-1)
    torch.testing.assert_close(
        cross_entropy(logits, probabilities), entropy(target) + kl_divergence(target, model)
    )


def test_shifting_every_logit_changes_nothing(logits, indices):
    for loss in (cross_entropy, focal):
        torch.testing.assert_close(
            loss(logits + 1e4, indices), loss(logits, indices), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_may_be_any_kind_of_whole_number(logits, indices, dtype, weight):
    for loss in (cross_entropy, focal, multiclass_hinge, zero_one):
        assert torch.equal(loss(logits, indices.to(dtype)), loss(logits, indices))
    assert torch.equal(
        cross_entropy(logits, indices.to(dtype), weight=weight),
        cross_entropy(logits, indices, weight=weight),
    )
    p = logits.softmax(-1)
    assert torch.equal(brier(p, indices.to(dtype)), brier(p, indices))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_a_forbidden_class_is_the_same_as_none(
    logits, indices, probabilities, weight, smoothing, weighted, soft
):
    targets = probabilities if soft else indices
    plain = {"label_smoothing": smoothing, "weight": weight if weighted else None}
    wider = dict(plain)
    if weighted:
        wider["weight"] = torch.cat([weight, torch.tensor([7.0, 0.0], dtype=DOUBLE)])
    wide_logits = F.pad(logits, (0, 2), value=FORBIDDEN)
    wide_targets = F.pad(targets, (0, 2)) if soft else targets

    torch.testing.assert_close(
        cross_entropy(wide_logits, wide_targets, **wider), cross_entropy(logits, targets, **plain)
    )
    gradient = _gradient(cross_entropy, wide_logits, wide_targets, **wider)
    torch.testing.assert_close(
        gradient, F.pad(_gradient(cross_entropy, logits, targets, **plain), (0, 2))
    )


def test_a_target_probability_of_zero_on_a_forbidden_class_has_a_finite_gradient():
    logits = torch.tensor([[0.0, FORBIDDEN]])
    targets = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss.sum(), targets)
    assert loss.item() == 0
    assert gradient.isfinite().all()


def test_a_target_probability_of_zero_on_an_allowed_class_keeps_its_gradient():
    targets = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = cross_entropy(torch.zeros(1, 2), targets)
    (gradient,) = torch.autograd.grad(loss.sum(), targets)
    torch.testing.assert_close(gradient, torch.full((1, 2), math.log(2)))


def test_a_forbidden_target_costs_infinitely_much_without_nan():
    logits = torch.tensor([[0.0, 0.0, FORBIDDEN]])
    assert cross_entropy(logits, torch.tensor([2])).item() == math.inf
    assert cross_entropy(logits, torch.tensor([[0.5, 0.25, 0.25]])).item() == math.inf


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_cost_their_distance_and_have_finite_gradients(extreme):
    logits, target = torch.tensor([[extreme, 0.0]]), torch.tensor([0])
    expected = torch.tensor([max(0.0, -extreme)])
    for loss in (cross_entropy, focal):
        torch.testing.assert_close(loss(logits, target), expected)
        assert _gradient(loss, logits, target).isfinite().all()


# binary_cross_entropy


def test_a_logit_of_zero_costs_log_two_either_way():
    loss = binary_cross_entropy(torch.zeros(3), torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(loss, torch.full((3,), math.log(2)))


def test_odds_of_three_to_one_for_yes():
    logits = torch.full((3,), math.log(3.0))
    yes, no = math.log(4 / 3), math.log(4)
    torch.testing.assert_close(
        binary_cross_entropy(logits, torch.tensor([1.0, 0.0, 0.25])),
        torch.tensor([yes, no, 0.25 * yes + 0.75 * no]),
    )
    torch.testing.assert_close(
        binary_cross_entropy(logits, torch.tensor([1.0, 0.0, 0.25]), pos_weight=2.0),
        torch.tensor([2 * yes, no, 0.5 * yes + 0.75 * no]),
    )


@pytest.mark.parametrize(
    "pos_weight", [None, torch.tensor([0.5, 1.0, 2.0, 0.0, 9.0], dtype=DOUBLE)]
)
def test_binary_cross_entropy_and_its_gradient_agree_with_torch(odds, pos_weight):
    targets = torch.rand(7, 5, generator=_generator(5), dtype=DOUBLE)

    def torchs(logits, targets, **settings):
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none", **settings)

    for compared in (lambda f: f, lambda f: lambda *a, **k: _gradient(f, *a, **k)):
        torch.testing.assert_close(
            compared(binary_cross_entropy)(odds, targets, pos_weight=pos_weight),
            compared(torchs)(odds, targets, pos_weight=pos_weight),
        )


def test_binary_cross_entropy_is_cross_entropy_of_two_classes(odds, answers):
    two = torch.stack([torch.zeros_like(odds), odds], dim=-1)
    torch.testing.assert_close(
        binary_cross_entropy(odds, answers), cross_entropy(two, answers.long())
    )


def test_the_gradient_of_binary_cross_entropy_is_sigmoid_minus_target(odds, answers):
    torch.testing.assert_close(
        _gradient(binary_cross_entropy, odds, answers), odds.sigmoid() - answers
    )


def test_a_confident_no_is_as_accurate_as_a_confident_yes():
    logits = torch.tensor([-20.0, 20.0, -80.0, 80.0])
    targets = torch.tensor([0.0, 1.0, 0.0, 1.0])
    expected = torch.tensor([math.exp(-20), math.exp(-20), math.exp(-80), math.exp(-80)])
    torch.testing.assert_close(binary_cross_entropy(logits, targets), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [binary_cross_entropy, binary_focal, hinge])
def test_yes_and_no_are_mirror_images(odds, loss):
    targets = torch.rand(7, 5, generator=_generator(6), dtype=DOUBLE)
    torch.testing.assert_close(loss(odds, targets), loss(-odds, 1 - targets))


def test_a_positive_weight_may_have_any_shape_that_broadcasts(odds, answers):
    whole = torch.full((7, 5), 3.0, dtype=DOUBLE)
    expected = binary_cross_entropy(odds, answers, pos_weight=whole)
    for shape in [(), (1,), (5,), (7, 1), (1, 5)]:
        weight = torch.full(shape, 3.0)
        assert torch.equal(binary_cross_entropy(odds, answers, pos_weight=weight), expected)
    assert torch.equal(binary_cross_entropy(odds, answers, pos_weight=3), expected)


@pytest.mark.parametrize("loss", [binary_cross_entropy, binary_focal, hinge])
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_odds_have_finite_losses_and_gradients(loss, extreme):
    logits, targets = torch.full((3,), extreme), torch.tensor([0.0, 1.0, 0.5])
    assert loss(logits, targets).isfinite().all()
    assert _gradient(loss, logits, targets).isfinite().all()


@pytest.mark.parametrize("loss", [binary_cross_entropy, lambda *a: binary_focal(*a, gamma=0.0)])
def test_an_infinite_logit_on_the_right_side_costs_nothing(loss):
    logits, targets = torch.tensor([FORBIDDEN, math.inf]), torch.tensor([0.0, 1.0])
    assert loss(logits, targets).tolist() == [0.0, 0.0]
    assert _gradient(loss, logits, targets).tolist() == [0.0, 0.0]


# brier


def test_brier_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0]])
    score = brier(p, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(score, torch.tensor([0.08, 0.5, 2.0, 0.0]))
    shared = brier(p[:1], torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(shared, torch.tensor([0.18]))


def test_mean_brier_agrees_with_scikit_learn(logits, indices):
    p = logits.softmax(-1)
    expected = sklearn.metrics.brier_score_loss(
        indices.ravel().numpy(), p.reshape(-1, 5).numpy(), labels=range(5)
    )
    assert brier(p, indices).mean().item() == pytest.approx(expected, rel=1e-12)


def test_brier_is_the_squared_distance_and_takes_certain_probabilities_for_indices(
    logits, indices, probabilities
):
    p = logits.softmax(-1)
    torch.testing.assert_close(
        brier(p, probabilities), torch.linalg.vector_norm(p - probabilities, dim=-1) ** 2
    )
    assert torch.equal(brier(p, F.one_hot(indices, 5).double()), brier(p, indices))


@pytest.mark.parametrize("score", [brier, lambda p, y: cross_entropy(p.log(), y)])
def test_telling_the_truth_minimizes_the_expected_score(score):
    truth = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)

    def expected(stated):
        rows = stated.expand(3, 3)
        return (truth * score(rows, torch.arange(3))).sum()

    candidates = torch.randn(200, 3, generator=_generator(7), dtype=DOUBLE).softmax(-1)
    assert all(expected(stated) > expected(truth) for stated in candidates)


def test_focal_loss_is_not_minimized_by_the_truth():
    truth = torch.tensor([0.9, 0.1], dtype=DOUBLE)
    logits = truth.log().requires_grad_()
    risk = (truth * focal(logits.expand(2, 2), torch.arange(2))).sum()
    (gradient,) = torch.autograd.grad(risk, logits)
    assert gradient[0] > 0.01  # descent states less confidence than is true


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_probabilities_are_compared_in_float32(
    half, logits, indices, probabilities
):
    p, q = logits.softmax(-1).to(half), probabilities.to(half)
    one_hot = F.one_hot(indices, 5).double()
    for score, target in ((brier(p, indices), one_hot), (brier(p, q), q.double())):
        assert score.dtype == torch.float32
        exact = (p.double() - target).square().sum(-1)
        torch.testing.assert_close(score.double(), exact, rtol=1e-5, atol=1e-6)
    loss = cross_entropy(logits.to(half), q)
    exact = -(q.double() * logits.to(half).double().log_softmax(-1)).sum(-1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


# zero_one


def test_a_wrong_decision_costs_one():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [-3.0, -2.0]])
    assert zero_one(scores, torch.tensor([1, 1, 0])).tolist() == [0.0, 1.0, 1.0]


def test_mean_zero_one_agrees_with_scikit_learn(logits, indices):
    expected = sklearn.metrics.zero_one_loss(
        indices.ravel().numpy(), logits.reshape(-1, 5).argmax(-1).numpy()
    )
    assert zero_one(logits, indices).mean().item() == pytest.approx(expected)


def test_zero_one_cannot_be_trained_on(logits, indices):
    assert not zero_one(logits.requires_grad_(), indices).requires_grad


@pytest.mark.parametrize(
    "bound", [lambda s, y: cross_entropy(s, y) / math.log(2), multiclass_hinge]
)
def test_surrogates_bound_the_zero_one_loss_from_above(logits, indices, bound):
    assert (bound(logits, indices) >= zero_one(logits, indices)).all()


# focal


def test_focal_by_hand():
    logits = torch.tensor([[math.log(9.0), 0.0]] * 2)  # 0.9 and 0.1
    losses = focal(logits, torch.tensor([0, 1]), gamma=2.0)
    torch.testing.assert_close(
        losses, torch.tensor([-(0.1**2) * math.log(0.9), -(0.9**2) * math.log(0.1)])
    )


@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_agrees_with_a_slow_loop(logits, indices, weight, gamma):
    p = logits.softmax(-1)
    losses = focal(logits, indices, gamma=gamma)
    weighted = focal(logits, indices, gamma=gamma, weight=weight)
    for at in np.ndindex(4, 6):
        y = indices[at].item()
        right = p[(*at, y)].item()
        expected = -((1 - right) ** gamma) * math.log(right)
        assert losses[at].item() == pytest.approx(expected, rel=1e-9)
        assert weighted[at].item() == pytest.approx(weight[y].item() * expected, rel=1e-9)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_binary_focal_agrees_with_a_slow_loop(odds, answers, gamma):
    losses = binary_focal(odds, answers, gamma=gamma)
    balanced = binary_focal(odds, answers, gamma=gamma, alpha=0.25)
    for at in np.ndindex(7, 5):
        yes = 1 / (1 + math.exp(-odds[at].item()))
        right, share = (yes, 0.25) if answers[at] == 1 else (1 - yes, 0.75)
        expected = -((1 - right) ** gamma) * math.log(right)
        assert losses[at].item() == pytest.approx(expected, rel=1e-9)
        assert balanced[at].item() == pytest.approx(share * expected, rel=1e-9)


def test_focal_with_gamma_zero_is_cross_entropy(logits, indices, odds, answers):
    torch.testing.assert_close(focal(logits, indices, gamma=0), cross_entropy(logits, indices))
    torch.testing.assert_close(
        binary_focal(odds, answers, gamma=0), binary_cross_entropy(odds, answers)
    )


def test_binary_focal_is_focal_of_two_classes(odds, answers):
    two = torch.stack([torch.zeros_like(odds), odds], dim=-1)
    torch.testing.assert_close(binary_focal(odds, answers), focal(two, answers.long()))


def test_gamma_is_two_unless_said(logits, indices, odds, answers):
    assert torch.equal(focal(logits, indices), focal(logits, indices, gamma=2.0))
    assert torch.equal(binary_focal(odds, answers), binary_focal(odds, answers, gamma=2.0))


def test_a_soft_target_mixes_the_two_focal_losses(odds):
    ones = torch.ones_like(odds)
    mixed = 0.3 * binary_focal(odds, ones, alpha=0.4) + 0.7 * binary_focal(
        odds, 0 * ones, alpha=0.4
    )
    torch.testing.assert_close(binary_focal(odds, 0.3 * ones, alpha=0.4), mixed)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("saturated", [20.0, 1e4, -1e4])
def test_saturated_focal_losses_and_both_their_derivatives_are_finite(gamma, saturated):
    for loss, logits, target in (
        (focal, torch.tensor([[saturated, 0.0, 0.0]]), torch.tensor([0])),
        (binary_focal, torch.tensor([saturated]), torch.ones(1)),
        (binary_focal, torch.tensor([saturated]), torch.zeros(1)),
    ):
        logits.requires_grad_()
        value = loss(logits, target, gamma=gamma)
        (first,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits)
        assert all(tensor.isfinite().all() for tensor in (value, first, second))


def test_focal_stays_accurate_where_one_minus_p_rounds_to_zero():
    logits = torch.tensor([[30.0, 0.0]])
    loss = focal(logits, torch.tensor([0]), gamma=0.5)
    torch.testing.assert_close(loss, torch.tensor([math.exp(-45)]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_class_forbidden_to_focal_is_the_same_as_none(logits, indices, gamma):
    wide = F.pad(logits, (0, 2), value=FORBIDDEN)
    torch.testing.assert_close(
        focal(wide, indices, gamma=gamma), focal(logits, indices, gamma=gamma)
    )
    torch.testing.assert_close(
        _gradient(focal, wide, indices, gamma=gamma),
        F.pad(_gradient(focal, logits, indices, gamma=gamma), (0, 2)),
    )


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("row", [[3.0], [3.0, FORBIDDEN]])
def test_the_only_class_left_costs_nothing_in_focal(gamma, row):
    logits, target = torch.tensor([row]), torch.tensor([0])
    assert focal(logits, target, gamma=gamma).item() == 0
    assert (_gradient(focal, logits, target, gamma=gamma) == 0).all()


# hinges


def test_hinge_by_hand():
    scores = torch.tensor([0.5, 2.0, -1.0, 0.5, -2.0])
    targets = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    assert hinge(scores, targets).tolist() == [0.5, 0.0, 2.0, 1.5, 0.0]
    assert _gradient(hinge, scores, targets).tolist() == [-1.0, 0.0, -1.0, 1.0, 0.0]


def test_mean_hinge_agrees_with_scikit_learn(odds, answers):
    expected = sklearn.metrics.hinge_loss(answers.ravel().numpy(), odds.ravel().numpy())
    assert hinge(odds, answers).mean().item() == pytest.approx(expected, rel=1e-12)


def test_multiclass_hinge_by_hand():
    scores = torch.tensor([[3.0, 2.5, 0.0], [3.0, 1.0, 0.0], [1.0, 4.0, 2.0], [0.0, 0.0, 0.0]])
    targets = torch.zeros(4, dtype=torch.long)
    assert multiclass_hinge(scores, targets).tolist() == [0.5, 0.0, 4.0, 1.0]
    expected = [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.5, 0.5]]
    assert _gradient(multiclass_hinge, scores, targets).tolist() == expected


def test_mean_multiclass_hinge_agrees_with_scikit_learn(logits, indices):
    expected = sklearn.metrics.hinge_loss(
        indices.ravel().numpy(), logits.reshape(-1, 5).numpy(), labels=np.arange(5)
    )
    assert multiclass_hinge(logits, indices).mean().item() == pytest.approx(expected, rel=1e-12)


def test_multiclass_hinge_of_two_classes_is_hinge_of_their_difference(odds, answers):
    two = torch.stack([torch.zeros_like(odds), odds], dim=-1)
    torch.testing.assert_close(multiclass_hinge(two, answers.long()), hinge(odds, answers))


@pytest.mark.parametrize("row", [[3.0], [3.0, FORBIDDEN]])
def test_without_a_rival_multiclass_hinge_costs_nothing(row):
    scores, target = torch.tensor([row]), torch.tensor([0])
    assert multiclass_hinge(scores, target).item() == 0
    assert (_gradient(multiclass_hinge, scores, target) == 0).all()


@pytest.mark.parametrize(("extreme", "expected"), [(1e4, 0.0), (-1e4, 20001.0)])
def test_extreme_scores_have_finite_hinges(extreme, expected):
    scores, target = torch.tensor([[extreme, 0.0, -extreme]]), torch.tensor([0])
    assert multiclass_hinge(scores, target).item() == expected
    assert _gradient(multiclass_hinge, scores, target).isfinite().all()


# errors

OF_INDICES = {
    "cross_entropy": (cross_entropy, "logits"),
    "brier": (brier, "probabilities"),
    "zero_one": (zero_one, "scores"),
    "focal": (focal, "logits"),
    "multiclass_hinge": (multiclass_hinge, "scores"),
}
of_indices = pytest.mark.parametrize(("loss", "first"), OF_INDICES.values(), ids=OF_INDICES)
of_answers = pytest.mark.parametrize(
    ("loss", "first"),
    [(binary_cross_entropy, "logits"), (binary_focal, "logits"), (hinge, "scores")],
)
of_either = pytest.mark.parametrize(
    ("loss", "first"), [OF_INDICES["cross_entropy"], OF_INDICES["brier"]]
)
EVEN = torch.full((2, 3), 1 / 3)


@pytest.mark.bad_input
@of_indices
@pytest.mark.parametrize("shape", [(3,), (2, 1), (1,), ()])
def test_refuses_indices_of_another_shape(loss, first, shape):
    with pytest.raises(ValueError) as raised:
        loss(EVEN, torch.zeros(shape, dtype=torch.long))
    assert str(raised.value) == (
        f"targets must have shape (2,), the shape of {first} without its last axis; got {shape}"
    )


@of_indices
@pytest.mark.parametrize("wrong", [[0, 3], [-1, 0], [-100, 2]])
def test_refuses_an_index_that_is_no_class(loss, first, wrong):
    with pytest.raises(ValueError) as raised:
        loss(EVEN, torch.tensor(wrong))
    assert str(raised.value) == (
        f"targets must lie in [0, 3), the classes of {first}; "
        f"got values from {min(wrong)} to {max(wrong)}"
    )


@pytest.mark.bad_input
@of_indices
def test_refuses_targets_of_another_kind(loss, first):
    with pytest.raises(TypeError, match="targets must be an integer tensor; got torch.bool"):
        loss(EVEN, torch.tensor([True, False]))
    with pytest.raises(TypeError, match=r"targets must be a torch.Tensor; got list \[0, 1\]"):
        loss(EVEN, [0, 1])


@pytest.mark.bad_input
@pytest.mark.parametrize("loss", [zero_one, focal, multiclass_hinge])
def test_refuses_probabilities_where_a_class_is_wanted(loss):
    with pytest.raises(TypeError, match="targets must be an integer tensor; got torch.float32"):
        loss(torch.zeros(2), torch.tensor(1.0))


@pytest.mark.bad_input
@of_indices
def test_refuses_scores_that_are_not_floating_point(loss, first):
    with pytest.raises(TypeError, match=f"{first} must be a floating-point tensor; got torch.int"):
        loss(torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=f"{first} must be a torch.Tensor; got NoneType None"):
        loss(None, torch.tensor([0, 1]))


@pytest.mark.bad_input
@of_indices
def test_refuses_scores_without_a_class(loss, first):
    with pytest.raises(ValueError, match=f"{first} must have at least one entry along axis -1"):
        loss(torch.zeros(2, 0), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=rf"{first} must have at least 1 axes; got shape \(\)"):
        loss(torch.tensor(1.0), torch.tensor(0))


@pytest.mark.bad_input
@of_either
@pytest.mark.parametrize("shape", [(2,), (2, 1), (3,), (2, 4)])
def test_refuses_target_probabilities_of_another_shape(loss, first, shape):
    with pytest.raises(ValueError) as raised:
        loss(EVEN, torch.zeros(shape))
    assert str(raised.value) == (
        f"targets must have shape (2, 3), the shape of {first}; got {shape}"
    )


@pytest.mark.bad_input
@of_either
def test_refuses_scores_without_a_class_with_target_probabilities(loss, first):
    with pytest.raises(ValueError, match=f"{first} must have at least one entry along axis -1"):
        loss(torch.zeros(2, 0), torch.zeros(2, 0))


@of_either
def test_refuses_target_probabilities_that_are_no_distribution(loss, first):
    with pytest.raises(
        ValueError, match="targets must sum to 1 along the last axis; got a sum of 0.9"
    ):
        loss(EVEN, torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.3, 0.3]]))
    with pytest.raises(ValueError, match="targets must not be negative or NaN; got -0.5"):
        loss(EVEN, torch.tensor([[1.0, 0.0, 0.0], [-0.5, 0.5, 1.0]]))


@pytest.mark.bad_input
@of_either
def test_refuses_integer_scores_with_target_probabilities(loss, first):
    with pytest.raises(TypeError, match=f"{first} must be a floating-point tensor"):
        loss(torch.zeros(2, 3, dtype=torch.long), EVEN)


def test_brier_refuses_logits():
    with pytest.raises(ValueError, match="probabilities must not be negative or NaN; got -1"):
        brier(torch.tensor([[-1.0, 1.0, 1.0]]), torch.tensor([0]))
    with pytest.raises(
        ValueError, match="probabilities must sum to 1 along the last axis; got a sum of 6"
    ):
        brier(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]))


@pytest.mark.bad_input
@pytest.mark.parametrize("loss", [cross_entropy, focal])
def test_refuses_class_weights_of_another_shape_or_kind(loss):
    target = torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"weight must have shape \(3,\), one entry per class; got \(2,\)"
    ):
        loss(EVEN, target, weight=torch.ones(2))
    with pytest.raises(TypeError, match="weight must be a floating-point tensor; got torch.int64"):
        loss(EVEN, target, weight=torch.ones(3, dtype=torch.long))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 10.0])
def test_refuses_a_smoothing_outside_the_unit_interval(smoothing):
    with pytest.raises(
        ValueError, match=rf"label_smoothing must lie in \[0, 1\); got {smoothing}"
    ):
        cross_entropy(EVEN, torch.tensor([0, 1]), label_smoothing=smoothing)


@pytest.mark.bad_input
@of_answers
@pytest.mark.parametrize("shape", [(3, 1), (1,), ()])
def test_refuses_answers_of_another_shape(loss, first, shape):
    with pytest.raises(ValueError) as raised:
        loss(torch.zeros(3), torch.zeros(shape))
    assert str(raised.value) == (
        f"targets must have shape (3,), the shape of {first}; got {shape}"
    )


@of_answers
@pytest.mark.parametrize(
    ("targets", "low", "high"),
    [([-1.0, 1.0], "-1", "1"), ([0.0, 1.5], "0", "1.5"), ([math.nan, 1.0], "nan", "nan")],
)
def test_refuses_answers_that_are_no_probabilities(loss, first, targets, low, high):
    with pytest.raises(ValueError) as raised:
        loss(torch.zeros(2), torch.tensor(targets))
    assert str(raised.value) == (f"targets must lie in [0, 1]; got values from {low} to {high}")


@pytest.mark.bad_input
@of_answers
def test_refuses_answers_that_are_not_floating_point(loss, first):
    for dtype in (torch.long, torch.bool):
        with pytest.raises(
            TypeError, match=f"targets must be a floating-point tensor; got {dtype}"
        ):
            loss(torch.zeros(2), torch.zeros(2, dtype=dtype))
    with pytest.raises(
        TypeError, match=f"{first} must be a floating-point tensor; got torch.int64"
    ):
        loss(torch.zeros(2, dtype=torch.long), torch.zeros(2))


@pytest.mark.parametrize("shape", [(2,), (4, 3), (2, 4, 3), (3, 1, 3)])
def test_refuses_a_positive_weight_that_would_not_broadcast(shape):
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError) as raised:
        binary_cross_entropy(logits, logits, pos_weight=torch.ones(shape))
    assert str(raised.value) == (
        f"pos_weight must broadcast to (2, 3), the shape of logits; got {shape}"
    )


@pytest.mark.bad_input
def test_refuses_a_positive_weight_that_is_negative_or_no_number():
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match="pos_weight must not be negative; got -1.0"):
        binary_cross_entropy(zero, zero, pos_weight=-1.0)
    with pytest.raises(TypeError, match="pos_weight must be a real number; got str '2'"):
        binary_cross_entropy(zero, zero, pos_weight="2")
    with pytest.raises(TypeError, match="pos_weight must be a floating-point tensor"):
        binary_cross_entropy(zero, zero, pos_weight=torch.tensor(2))


@pytest.mark.bad_input
def test_refuses_focal_settings_out_of_range():
    zero = torch.zeros(2)
    for loss, arguments in ((focal, (EVEN, torch.tensor([0, 1]))), (binary_focal, (zero, zero))):
        with pytest.raises(ValueError, match="gamma must not be negative; got -0.5"):
            loss(*arguments, gamma=-0.5)
        with pytest.raises(TypeError, match="gamma must be a real number; got NoneType None"):
            loss(*arguments, gamma=None)
    for alpha in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match=rf"alpha must lie in \(0, 1\); got {alpha}"):
            binary_focal(zero, zero, alpha=alpha)
