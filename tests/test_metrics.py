"""Tests of lmlosses.metrics."""

import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score

from lmlosses import cpu_generator, metrics
from lmlosses.metrics import accuracy, auc, expected_calibration_error, reliability_curve


def random_predictions(samples=400, classes=4, seed=0):
    generator = cpu_generator(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(-1), torch.randint(classes, (samples,), generator=generator)


# ---- accuracy


def test_accuracy_is_the_share_of_right_answers():
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
    assert accuracy(scores, torch.tensor([0, 1, 1, 0])).item() == 0.75


def test_accuracy_agrees_with_scikit_learn():
    scores, targets = random_predictions()
    expected = accuracy_score(targets.numpy(), scores.argmax(-1).numpy())
    assert accuracy(scores, targets).item() == pytest.approx(expected, abs=1e-15)


def test_a_tie_goes_to_the_first_class():
    assert accuracy(torch.zeros(2, 3), torch.tensor([0, 1])).item() == 0.5


def test_accuracy_counts_over_all_batch_axes():
    scores, targets = random_predictions(24)
    batched = accuracy(scores.reshape(2, 3, 4, 4), targets.reshape(2, 3, 4))
    assert batched == accuracy(scores, targets)


def test_accuracy_of_an_empty_batch_is_zero():
    assert accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).item() == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("scores", "targets", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3, dtype=torch.long),
            ValueError,
            r"targets must have shape \(2,\), the shape of scores without its last axis",
        ),
        (
            torch.zeros(2, 0),
            torch.zeros(2, dtype=torch.long),
            ValueError,
            "scores must have at least one entry along axis -1",
        ),
        (
            torch.zeros(1, 3),
            torch.tensor([3]),
            ValueError,
            r"targets must lie in \[0, 3\), the number of classes; got values from 3 to 3",
        ),
        (torch.zeros(1, 3), torch.zeros(1), TypeError, "targets must be an integer tensor"),
        (
            torch.zeros(1, 3, dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
            TypeError,
            "scores must be a floating-point tensor",
        ),
    ],
)
def test_accuracy_refuses(scores, targets, error, message):
    with pytest.raises(error, match=message):
        accuracy(scores, targets)


# ---- auc


def slow_auc(scores, targets):
    wins = pairs = 0.0
    for positive in scores[targets == 1].tolist():
        for negative in scores[targets == 0].tolist():
            wins += (positive > negative) + 0.5 * (positive == negative)
            pairs += 1
    return wins / pairs


def test_auc_of_three_and_a_half_pairs_out_of_four():
    assert auc(torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([1, 1, 0, 0])).item() == 0.875


@pytest.mark.parametrize("seed", range(5))
def test_auc_agrees_with_scikit_learn_and_with_counting_pairs_under_many_ties(seed):
    generator = cpu_generator(seed)
    scores = torch.randint(6, (60,), generator=generator).double()
    targets = torch.randint(2, (60,), generator=generator)
    value = auc(scores, targets).item()
    assert value == pytest.approx(roc_auc_score(targets.numpy(), scores.numpy()), abs=1e-12)
    assert value == pytest.approx(slow_auc(scores, targets), abs=1e-12)


def test_perfect_ranking_scores_one_reversed_zero_and_constant_one_half():
    targets = torch.tensor([0, 0, 1, 1, 1])
    scores = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert auc(scores, targets).item() == 1.0
    assert auc(-scores, targets).item() == 0.0
    assert auc(torch.zeros(5), targets).item() == 0.5


def test_auc_sees_only_the_order_of_the_scores():
    generator = cpu_generator(0)
    scores = torch.randn(50, generator=generator)
    targets = torch.randint(2, (50,), generator=generator)
    assert auc(scores, targets) == auc(1e4 * scores.exp() - 1e4, targets)


def test_infinite_scores_are_ordered_and_may_tie():
    scores = torch.tensor([torch.inf, torch.inf, 0.0, -torch.inf])
    assert auc(scores, torch.tensor([1, 0, 1, 0])).item() == 0.625


def test_labels_of_any_dtype_mean_the_same():
    scores = torch.tensor([0.3, 0.1, 0.2])
    labels = torch.tensor([1, 0, 1])
    values = [auc(scores, labels.to(d)) for d in (torch.bool, torch.int32, torch.float32)]
    assert [value.item() for value in values] == [1.0, 1.0, 1.0]


def test_auc_is_counted_exactly_where_float32_would_round():
    # ranks sum to 1e8, past the whole numbers of float32; the k-th of n positives beats k of
    # n + 1 negatives, so the answer is one half to the last bit
    scores = torch.arange(20_001).float()
    assert auc(scores, torch.arange(20_001) % 2).item() == 0.5


def test_auc_with_one_class_is_nan_where_values_are_not_read(monkeypatch):
    monkeypatch.setattr(metrics, "reads_values", lambda *tensors: False)
    assert auc(torch.tensor([0.1, 0.2]), torch.tensor([1, 1])).isnan()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([1, 1], "targets must contain both classes.*got 2 positives and 0 negatives"),
        ([0, 0], "targets must contain both classes.*got 0 positives and 2 negatives"),
        ([0, 2], "targets must be 0 or 1 everywhere"),
        ([], "targets must contain both classes.*got 0 positives and 0 negatives"),
    ],
)
def test_auc_refuses_labels_that_pose_no_question(targets, message):
    with pytest.raises(ValueError, match=message):
        auc(torch.zeros(len(targets)), torch.tensor(targets, dtype=torch.long))


def test_auc_refuses_scores_that_are_not_numbers():
    with pytest.raises(ValueError, match="scores must not be NaN"):
        auc(torch.tensor([0.0, torch.nan]), torch.tensor([0, 1]))


@pytest.mark.bad_input
def test_auc_refuses_wrong_shapes_and_types():
    with pytest.raises(ValueError, match=r"targets must have shape \(2,\), the shape of scores"):
        auc(torch.zeros(2), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="scores must have 1 axes"):
        auc(torch.zeros(2, 1), torch.tensor([[0], [1]]))
    with pytest.raises(TypeError, match="scores must be a floating-point tensor"):
        auc(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="targets must be a torch.Tensor"):
        auc(torch.zeros(2), [0, 1])


# ---- calibration


def slow_calibration(probabilities, targets, bins):
    """Sample by sample and bin by bin, as the definition has it: (b/B, (b+1)/B]."""
    rows = []
    for b in range(bins):
        inside = []
        for row, target in zip(probabilities, targets, strict=True):
            confidence, prediction = row.max(dim=0)
            if b / bins < confidence <= (b + 1) / bins:
                inside.append((confidence.item(), float(prediction == target)))
        n = max(len(inside), 1)
        rows.append(
            (
                sum(c for c, _ in inside) / n,
                sum(a for _, a in inside) / n,
                len(inside) / len(targets),
            )
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_reliability_curve_agrees_with_a_slow_loop(bins):
    probabilities, targets = random_predictions(200)
    curve = reliability_curve(probabilities, targets, bins=bins)
    torch.testing.assert_close(
        torch.stack(curve, dim=-1),
        slow_calibration(probabilities, targets, bins),
        rtol=1e-12,
        atol=1e-12,
    )
    assert curve.weight.sum().item() == pytest.approx(1, abs=1e-12)


def test_calibration_error_agrees_with_a_slow_loop():
    probabilities, targets = random_predictions(300)
    slow = slow_calibration(probabilities, targets, 15)
    expected = (slow[:, 2] * (slow[:, 1] - slow[:, 0]).abs()).sum()
    value = expected_calibration_error(probabilities, targets)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert value > 0.1  # the targets are random: nothing here is calibrated


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    probabilities = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    curve = reliability_curve(probabilities, torch.tensor([0, 0, 0]), bins=4)
    torch.testing.assert_close(curve.weight, torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3]))
    torch.testing.assert_close(curve.confidence, torch.tensor([0.0, 0.5, 0.75, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_edge_is_exact_for_the_default_bins(dtype):
    for k in range(8, 15):  # k / 15, rounded to the dtype, must not slip into the next bin
        top = torch.tensor(k / 15, dtype=dtype)
        probabilities = torch.stack([top, 1 - top]).unsqueeze(0)
        weight = reliability_curve(probabilities, torch.tensor([0])).weight
        assert weight.argmax().item() == k - 1


def test_a_calibrated_model_has_an_error_near_zero_and_an_overconfident_one_has_not():
    generator = cpu_generator(0)
    logits = torch.randn(20_000, 3, generator=generator)
    probabilities = logits.softmax(-1)
    targets = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
    assert expected_calibration_error(probabilities, targets) < 0.015
    assert expected_calibration_error((3 * logits).softmax(-1), targets) > 0.2


def test_sure_and_wrong_is_an_error_of_one():
    probabilities = torch.tensor([[1.0, 0.0]])
    assert expected_calibration_error(probabilities, torch.tensor([1])).item() == 1.0
    assert expected_calibration_error(probabilities, torch.tensor([0])).item() == 0.0


def test_calibration_of_an_empty_batch_is_zero():
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    for entry in reliability_curve(*empty, bins=4):
        torch.testing.assert_close(entry, torch.zeros(4))
    assert expected_calibration_error(*empty).item() == 0


def test_calibration_counts_over_all_batch_axes():
    probabilities, targets = random_predictions(24)
    batched = expected_calibration_error(
        probabilities.reshape(2, 12, 4).transpose(0, 1), targets.reshape(2, 12).T
    )
    torch.testing.assert_close(batched, expected_calibration_error(probabilities, targets))


@pytest.mark.bad_input
@pytest.mark.parametrize("function", [reliability_curve, expected_calibration_error])
@pytest.mark.parametrize(
    ("probabilities", "targets", "bins", "error", "message"),
    [
        (torch.zeros(1, 2), [0], 15, ValueError, "probabilities must sum to 1 along the last"),
        (torch.tensor([[1.5, -0.5]]), [0], 15, ValueError, "probabilities must not be negative"),
        (torch.ones(1, 1), [0], 0, ValueError, "bins must be positive; got 0"),
        (torch.ones(1, 1), [1], 15, ValueError, r"targets must lie in \[0, 1\)"),
        (torch.ones(1, 1), [0, 0], 15, ValueError, r"targets must have shape \(1,\)"),
        (torch.zeros(1, 0), [0], 15, ValueError, "probabilities must have at least one entry"),
        (torch.ones(1, 1, dtype=torch.long), [0], 15, TypeError, "probabilities must be a float"),
    ],
)
def test_calibration_refuses(function, probabilities, targets, bins, error, message):
    with pytest.raises(error, match=message):
        function(probabilities, torch.tensor(targets), bins=bins)


# ---- all of them

CLASSIFIER_METRICS = [
    accuracy,
    expected_calibration_error,
    lambda p, t: reliability_curve(p, t).confidence,
    lambda p, t: reliability_curve(p, t).accuracy,
    lambda p, t: reliability_curve(p, t).weight,
]


@pytest.mark.parametrize("metric", CLASSIFIER_METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(metric, dtype):
    probabilities, targets = random_predictions(64)
    assert metric(probabilities.to(dtype), targets).dtype == torch.float32
    assert metric(probabilities, targets).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_calibration_equals_float64_on_the_same_numbers(dtype):
    # multiples of 1/64 are exact in half precision, so both see the same probabilities
    top = (32 + torch.arange(32)) / 64
    probabilities = torch.stack([top, 1 - top], dim=-1)
    targets = torch.arange(32) % 2
    for half, double in zip(
        reliability_curve(probabilities.to(dtype), targets),
        reliability_curve(probabilities.double(), targets),
        strict=True,
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), double, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_auc_is_float32_and_the_same(dtype):
    scores = torch.randn(40, generator=cpu_generator(0)).to(dtype)
    targets = torch.arange(40) % 2
    value = auc(scores, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), auc(scores.double(), targets), rtol=1e-6, atol=0)


def test_metrics_run_where_values_cannot_be_read():
    meta = torch.device("meta")
    probabilities = torch.empty(6, 3, device=meta)
    targets = torch.empty(6, dtype=torch.long, device=meta)
    for metric in CLASSIFIER_METRICS:
        assert metric(probabilities, targets).device == meta
    assert auc(probabilities[:, 0], targets).shape == ()


def test_metrics_do_not_mind_memory_layout():
    probabilities, targets = random_predictions(20)
    strided = torch.stack([probabilities, probabilities], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    for metric in CLASSIFIER_METRICS:
        torch.testing.assert_close(metric(strided, targets), metric(probabilities, targets))
    binary = targets % 2
    torch.testing.assert_close(auc(strided[:, 1], binary), auc(probabilities[:, 1], binary))
