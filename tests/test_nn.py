"""Every criterion against its model in torch.nn, counted in units in the last place."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lmlosses import losses, nn

REDUCTIONS = ["none", "mean", "sum"]
DTYPES = [torch.float32, torch.float64]
NAMES = [
    "MSELoss",
    "L1Loss",
    "HuberLoss",
    "GaussianNLLLoss",
    "CrossEntropyLoss",
    "BCEWithLogitsLoss",
    "KLDivLoss",
    "MarginRankingLoss",
]


class Case(NamedTuple):
    """A criterion's name, settings as drawn tensors and numbers, and its drawn arguments."""

    name: str
    draw: Callable[[torch.Generator, torch.dtype], tuple[dict[str, object], tuple[Tensor, ...]]]


def _real(*shape: int) -> Callable[[torch.Generator, torch.dtype], Tensor]:
    return lambda g, dtype: 2 * torch.randn(*shape, generator=g, dtype=dtype)


def _unit(*shape: int) -> Callable[[torch.Generator, torch.dtype], Tensor]:
    return lambda g, dtype: torch.rand(*shape, generator=g, dtype=dtype)


def _index(*shape: int, ignored: bool = False) -> Callable[[torch.Generator, torch.dtype], Tensor]:
    def draw(g: torch.Generator, dtype: torch.dtype) -> Tensor:
        indices = torch.randint(7, shape, generator=g)
        dropped = torch.rand(shape, generator=g) < 0.3
        return indices.masked_fill(dropped, -100) if ignored else indices

    return draw


def _distribution(*shape: int, axis: int = 1, log: bool = False):
    def draw(g: torch.Generator, dtype: torch.dtype) -> Tensor:
        scores = _real(*shape)(g, dtype)
        return scores.log_softmax(axis) if log else scores.softmax(axis)

    return draw


def _sign(*shape: int) -> Callable[[torch.Generator, torch.dtype], Tensor]:
    return lambda g, dtype: torch.randint(2, shape, generator=g).to(dtype) * 2 - 1


def _case(name, *arguments, **settings) -> Case:
    def draw(g, dtype):
        drawn = {
            key: value(g, dtype) if callable(value) else value for key, value in settings.items()
        }
        return drawn, tuple(argument(g, dtype) for argument in arguments)

    return Case(name, draw)


CASES = {
    "MSELoss": _case("MSELoss", _real(6, 5), _real(6, 5)),
    "MSELoss of whole numbers": _case("MSELoss", _real(6, 5), _index(6, 5)),
    "L1Loss": _case("L1Loss", _real(6, 5), _real(6, 5)),
    "HuberLoss": _case("HuberLoss", _real(6, 5), _real(6, 5)),
    "HuberLoss with delta": _case("HuberLoss", _real(6, 5), _real(6, 5), delta=0.3),
    "GaussianNLLLoss": _case("GaussianNLLLoss", _real(6, 5), _real(6, 5), _unit(6, 5)),
    "GaussianNLLLoss in full": _case(
        "GaussianNLLLoss", _real(6, 5), _real(6, 5), _unit(6, 5), full=True, eps=0.1
    ),
    "GaussianNLLLoss with one variance a row": _case(
        "GaussianNLLLoss", _real(6, 5), _real(6, 5), _unit(6)
    ),
    "GaussianNLLLoss with an axis of one": _case(
        "GaussianNLLLoss", _real(6, 5, 3), _real(6, 5, 3), _unit(6, 1, 3)
    ),
    "CrossEntropyLoss": _case("CrossEntropyLoss", _real(6, 7), _index(6)),
    "CrossEntropyLoss of one sample": _case("CrossEntropyLoss", _real(7), _index()),
    "CrossEntropyLoss over an image": _case(
        "CrossEntropyLoss", _real(3, 7, 4, 2), _index(3, 4, 2, ignored=True)
    ),
    "CrossEntropyLoss, weighted": _case(
        "CrossEntropyLoss", _real(3, 7, 4), _index(3, 4, ignored=True), weight=_unit(7)
    ),
    "CrossEntropyLoss, smoothed": _case(
        "CrossEntropyLoss", _real(3, 7, 4), _index(3, 4, ignored=True), label_smoothing=0.2
    ),
    "CrossEntropyLoss, all smooth": _case(
        "CrossEntropyLoss", _real(6, 7), _index(6), label_smoothing=1.0
    ),
    "CrossEntropyLoss, smoothed and weighted": _case(
        "CrossEntropyLoss",
        _real(3, 7, 4),
        _index(3, 4, ignored=True),
        weight=_unit(7),
        label_smoothing=0.2,
    ),
    "CrossEntropyLoss that ignores a class": _case(
        "CrossEntropyLoss", _real(9, 7), _index(9), ignore_index=2, label_smoothing=0.2
    ),
    "CrossEntropyLoss of probabilities": _case(
        "CrossEntropyLoss", _real(3, 7, 4), _distribution(3, 7, 4)
    ),
    "CrossEntropyLoss of probabilities, smoothed and weighted": _case(
        "CrossEntropyLoss",
        _real(3, 7, 4),
        _distribution(3, 7, 4),
        weight=_unit(7),
        label_smoothing=0.2,
    ),
    "CrossEntropyLoss of one sample's probabilities": _case(
        "CrossEntropyLoss", _real(7), _distribution(7, axis=0)
    ),
    "BCEWithLogitsLoss": _case("BCEWithLogitsLoss", _real(6, 5), _unit(6, 5)),
    "BCEWithLogitsLoss, weighted": _case(
        "BCEWithLogitsLoss", _real(6, 5), _unit(6, 5), weight=_unit(6, 1), pos_weight=_unit(5)
    ),
    "KLDivLoss": _case("KLDivLoss", _distribution(6, 5, log=True), _distribution(6, 5)),
    "KLDivLoss of logarithms": _case(
        "KLDivLoss",
        _distribution(6, 5, log=True),
        _distribution(6, 5, log=True),
        log_target=True,
    ),
    "MarginRankingLoss": _case("MarginRankingLoss", _real(9), _real(9), _sign(9)),
    "MarginRankingLoss with margin": _case(
        "MarginRankingLoss", _real(9), _real(9), _sign(9), margin=0.5
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _units_in_the_last_place(ours: Tensor, torchs: Tensor) -> float:
    """Largest distance, each in units of the spacing of numbers at torch's value."""
    assert ours.shape == torchs.shape and ours.dtype == torchs.dtype
    a, b = ours.detach().numpy(), torchs.detach().numpy()
    spacing = np.spacing(np.abs(b), dtype=b.dtype)
    return float((np.abs(a - b) / spacing).max())


def _both(case, settings, reduction):
    ours = getattr(nn, case.name)(**settings, reduction=reduction)
    with warnings.catch_warnings():
        # torch warns that the mean of a divergence is not batchmean
        warnings.simplefilter("ignore")
        theirs = getattr(torch.nn, case.name)(**settings, reduction=reduction)
    return ours, theirs


def _call(criterion, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return criterion(*arguments)


@every_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_four_units_in_the_last_place_of_torch(case, reduction, dtype):
    for seed in range(10):
        settings, arguments = case.draw(torch.Generator().manual_seed(seed), dtype)
        ours, theirs = _both(case, settings, reduction)
        expected = _call(theirs, arguments)
        if not expected.isfinite().all():
            continue  # a mean over nothing, which is a departure with a test of its own
        assert _units_in_the_last_place(ours(*arguments), expected) <= 4


@every_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_are_torchs(case, reduction):
    settings, arguments = case.draw(torch.Generator().manual_seed(3), torch.float64)
    gradients = []
    for criterion in _both(case, settings, reduction):
        tracked = [
            argument.clone().requires_grad_(argument.is_floating_point()) for argument in arguments
        ]
        value = _call(criterion, tracked)
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64)
        gradients.append(
            torch.autograd.grad(
                (value.reshape(-1) * weights).sum(), [t for t in tracked if t.requires_grad]
            )
        )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_batchmean_of_a_divergence_divides_by_the_batch():
    draw = CASES["KLDivLoss"].draw
    for shape in [(6, 5), (6,), ()]:
        _, (model, target) = draw(torch.Generator().manual_seed(0), torch.float64)
        model, target = (
            value.flatten()[: math.prod(shape)].reshape(shape) for value in (model, target)
        )
        ours = nn.KLDivLoss(reduction="batchmean")(model, target)
        theirs = torch.nn.KLDivLoss(reduction="batchmean")(model, target)
        assert _units_in_the_last_place(ours, theirs) <= 4


def test_batchmean_is_the_mean_of_the_divergences_of_the_rows():
    _, (model, target) = CASES["KLDivLoss of logarithms"].draw(
        torch.Generator().manual_seed(0), torch.float64
    )
    expected = losses.kl_divergence(target, model).mean()
    batchmean = nn.KLDivLoss(reduction="batchmean", log_target=True)(model, target)
    torch.testing.assert_close(batchmean, expected)
    from_probabilities = nn.KLDivLoss(reduction="batchmean")(model, target.exp())
    torch.testing.assert_close(from_probabilities, expected)


@pytest.mark.parametrize("var", [0.0, 0.5, 2])
def test_a_gaussian_variance_may_be_one_number(var):
    predictions, targets = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    ours = nn.GaussianNLLLoss(reduction="none")(predictions, targets, var)
    theirs = torch.nn.GaussianNLLLoss(reduction="none")(predictions, targets, float(var))
    assert _units_in_the_last_place(ours, theirs) <= 4


def test_a_gaussian_variance_of_one_prediction_without_axes():
    one, two, var = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.5)
    ours = nn.GaussianNLLLoss()(one, two, var)
    torch.testing.assert_close(ours, torch.nn.GaussianNLLLoss()(one, two, var))


def test_the_full_gaussian_loss_agrees_with_the_function_of_log_variances():
    predictions, targets = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    var = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    torch.testing.assert_close(
        nn.GaussianNLLLoss(full=True, reduction="none")(predictions, targets, var),
        losses.gaussian_nll(predictions, targets, var.log()),
    )


def test_the_variances_given_are_left_as_they_were():
    var = torch.zeros(3)
    nn.GaussianNLLLoss(eps=0.5)(torch.zeros(3), torch.zeros(3), var)
    assert var.tolist() == [0.0, 0.0, 0.0]


def test_binary_cross_entropy_agrees_with_the_exact_function_to_a_rounding_step_of_the_logit():
    logits = 10 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    targets = torch.rand(500, generator=torch.Generator().manual_seed(1)).round()
    pos_weight = torch.tensor([3.0])
    for settings in ({}, {"pos_weight": pos_weight}):
        ours = nn.BCEWithLogitsLoss(reduction="none", **settings)(logits, targets)
        exact = losses.binary_cross_entropy(logits, targets, **settings)
        assert ((ours - exact).abs() <= 4 * 2**-24 * (1 + logits.abs())).all()


# the same arguments


@pytest.mark.parametrize("name", NAMES)
def test_takes_torchs_arguments_in_torchs_order_with_torchs_defaults(name):
    for method in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(getattr(module, name), method)).parameters
            for module in (nn, torch.nn)
        )
        described = [
            [(p.name, p.kind, p.default) for p in parameters.values()]
            for parameters in (ours, theirs)
        ]
        assert described[0] == described[1]


def test_every_criterion_is_tested():
    defined = {
        name
        for name, value in vars(nn).items()
        if inspect.isclass(value) and value.__module__ == nn.__name__ and not name.startswith("_")
    }
    assert (
        defined - {"LinearCrossEntropyLoss", "LearnedTemperature"}  # which have tests of their own
        == set(NAMES)
        == {case.name for case in CASES.values()}
    )


@pytest.mark.parametrize("name", ["CrossEntropyLoss, weighted", "BCEWithLogitsLoss, weighted"])
def test_weights_travel_in_torchs_state_dict(name):
    case = CASES[name]
    settings, arguments = case.draw(torch.Generator().manual_seed(0), torch.float32)
    ours, theirs = _both(case, settings, "mean")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    blank = getattr(nn, case.name)(**{key: torch.zeros_like(v) for key, v in settings.items()})
    blank.load_state_dict(theirs.state_dict())
    assert torch.equal(blank(*arguments), ours(*arguments))
    assert all(buffer.device.type == "meta" for buffer in ours.to("meta").buffers())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("HuberLoss", "GaussianNLLLoss")]
)
@pytest.mark.parametrize("legacy", ["size_average", "reduce"])
@pytest.mark.parametrize("value", [True, False])
def test_refuses_arguments_that_reduction_replaced(name, legacy, value):
    with pytest.raises(
        ValueError, match=f"^{legacy} was replaced by reduction; got {legacy}={value}$"
    ):
        getattr(nn, name)(**{legacy: value})


@pytest.mark.bad_input
@pytest.mark.parametrize("name", NAMES)
def test_refuses_an_unknown_reduction(name):
    known = "none, mean, sum, batchmean" if name == "KLDivLoss" else "none, mean, sum"
    with pytest.raises(ValueError, match=f"^reduction must be one of {known}; got 'median'$"):
        getattr(nn, name)(reduction="median")


# departures


@every_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_the_float32_loss_of_the_same_input(case, reduction, half):
    settings, arguments = case.draw(torch.Generator().manual_seed(0), half)
    criterion = getattr(nn, case.name)
    result = criterion(**settings, reduction=reduction)(*arguments)
    assert result.dtype == torch.float32

    def exactly(value):
        is_half = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if is_half else value

    wider = {key: exactly(value) for key, value in settings.items()}
    exact = criterion(**wider, reduction=reduction)(*map(exactly, arguments))
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [label for label in CASES if "one sample" not in label])
def test_an_empty_batch_costs_nothing(label):
    case = CASES[label]
    settings, arguments = case.draw(torch.Generator().manual_seed(0), torch.float32)
    settings = {
        key: value[:0] if key == "weight" and case.name == "BCEWithLogitsLoss" else value
        for key, value in settings.items()
    }
    empty = [argument[:0] for argument in arguments]
    empty[0].requires_grad_()
    for reduction in ("mean", "sum"):
        value = getattr(nn, case.name)(**settings, reduction=reduction)(*empty)
        assert value.item() == 0
        (gradient,) = torch.autograd.grad(value, empty[0])
        assert gradient.shape == empty[0].shape
    assert getattr(nn, case.name)(**settings, reduction="none")(*empty).numel() == 0


def test_batchmean_of_an_empty_batch_costs_nothing():
    assert nn.KLDivLoss(reduction="batchmean")(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"weight": torch.ones(3)}])
def test_targets_that_are_all_ignored_cost_nothing(settings):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.full((4,), -100)
    for reduction, expected in (("mean", 0.0), ("sum", 0.0), ("none", [0.0] * 4)):
        value = nn.CrossEntropyLoss(reduction=reduction, **settings)(logits, targets)
        assert value.tolist() == expected
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert torch.equal(gradient, torch.zeros(4, 3))


def test_class_weights_that_sum_to_zero_cost_nothing():
    logits = torch.zeros(2, 3, requires_grad=True)
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 0.0, 1.0]))
    value = criterion(logits, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0 and torch.equal(gradient, torch.zeros(2, 3))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_stands_in_an_ignored_row_reaches_neither_loss_nor_gradient(garbage, smoothing):
    logits = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1], [2, -100], [-100, 0], [1, 1]])
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    spoiled = logits.clone()
    spoiled[1, :, 1] = garbage
    spoiled[2, :, 0] = garbage
    spoiled.requires_grad_()
    value = criterion(spoiled, targets)
    assert torch.equal(value, criterion(logits, targets))
    (gradient,) = torch.autograd.grad(value, spoiled)
    assert gradient.isfinite().all()
    assert (gradient[1, :, 1] == 0).all() and (gradient[2, :, 0] == 0).all()


def test_a_forbidden_class_takes_no_share_of_the_smoothing():
    logits = torch.tensor([[1.0, 2.0, -math.inf]])
    criterion = nn.CrossEntropyLoss(label_smoothing=0.2)
    torch.testing.assert_close(
        criterion(logits, torch.tensor([0])), criterion(logits[:, :2], torch.tensor([0]))
    )


def test_a_target_of_probability_zero_on_a_forbidden_class_adds_nothing_to_a_divergence():
    model = torch.tensor([[0.5, 0.5, 0.0]]).log().requires_grad_()
    target = torch.tensor([[0.9, 0.1, 0.0]])
    for criterion, given in (
        (nn.KLDivLoss(reduction="none"), target),
        (nn.KLDivLoss(reduction="none", log_target=True), target.log()),
    ):
        terms = criterion(model, given)
        (gradient,) = torch.autograd.grad(terms.sum(), model)
        assert terms[0, 2].item() == 0
        torch.testing.assert_close(gradient, -target)


@every_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_runs_forward_and_backward_without_reading_a_value(case, reduction):
    settings, arguments = case.draw(torch.Generator().manual_seed(0), torch.float32)
    criterion = getattr(nn, case.name)(**settings, reduction=reduction).to("meta")
    arguments = [argument.to("meta") for argument in arguments]
    arguments[0].requires_grad_()
    value = criterion(*arguments)
    (gradient,) = torch.autograd.grad(value.sum(), arguments[0])
    assert value.device.type == "meta" and gradient.shape == arguments[0].shape


# errors

OF_ONE_SHAPE = ["MSELoss", "L1Loss", "HuberLoss", "BCEWithLogitsLoss", "KLDivLoss"]


@pytest.mark.bad_input
@pytest.mark.parametrize("name", [*OF_ONE_SHAPE, "GaussianNLLLoss"])
def test_refuses_shapes_that_torch_would_broadcast(name):
    rest = (torch.ones(4, 3),) if name == "GaussianNLLLoss" else ()
    with pytest.raises(
        ValueError, match=r"^target must have shape \(4, 3\), the shape of input; got \(4, 1\)$"
    ):
        getattr(nn, name)()(torch.zeros(4, 3), torch.zeros(4, 1), *rest)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", [*OF_ONE_SHAPE, "GaussianNLLLoss", "CrossEntropyLoss"])
def test_refuses_an_input_that_is_not_floating_point(name):
    rest = (torch.ones(4, 3),) if name == "GaussianNLLLoss" else ()
    with pytest.raises(TypeError, match="^input must be a floating-point tensor; got torch.int64"):
        getattr(nn, name)()(torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3), *rest)
    with pytest.raises(TypeError, match="^target must be a torch.Tensor; got float 0.0"):
        getattr(nn, name)()(torch.zeros(4, 3), 0.0, *rest)


@pytest.mark.bad_input
def test_margin_ranking_refuses_what_does_not_match():
    three, criterion = torch.ones(3), nn.MarginRankingLoss()
    with pytest.raises(
        ValueError, match=r"^input2 must have shape \(3,\), the shape of input1; got \(1,\)$"
    ):
        criterion(three, torch.ones(1), three)
    with pytest.raises(
        ValueError, match=r"^target must have shape \(3,\), the shape of input1; got \(1,\)$"
    ):
        criterion(three, three, torch.ones(1))
    with pytest.raises(TypeError, match="^input2 must be a floating-point tensor"):
        criterion(three, three.long(), three)
    with pytest.raises(TypeError, match="^input1 must be a floating-point tensor"):
        criterion(three.long(), three, three)
    with pytest.raises(TypeError, match="^target must be a torch.Tensor; got int 1"):
        criterion(three, three, 1)
    with pytest.raises(ValueError, match="^targets must be 1 or -1; got 0$"):
        criterion(three, three, torch.zeros(3))


def test_margin_ranking_takes_whole_numbers_as_targets():
    first, second = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    loss = nn.MarginRankingLoss(reduction="none")(first, second, torch.tensor([1, -1]))
    assert loss.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shape", [(4,), (1,), (1, 1, 5), (3, 4, 1, 1), (3, 5)])
def test_gaussian_refuses_variances_that_do_not_fit(shape):
    zeros = torch.zeros(3, 4, 5)
    with pytest.raises(ValueError) as raised:
        nn.GaussianNLLLoss()(zeros, zeros, torch.ones(shape))
    assert str(raised.value) == (
        "var must have shape (3, 4, 5), the shape of input, or that with one axis of size 1 or "
        f"without its last axis; got {shape}"
    )


@pytest.mark.bad_input
def test_gaussian_refuses_variances_that_are_negative_or_no_numbers():
    zero, criterion = torch.zeros(2), nn.GaussianNLLLoss()
    with pytest.raises(ValueError, match="^var must not be negative or NaN; got -0.5$"):
        criterion(zero, zero, torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match="^var must not be negative or NaN; got nan$"):
        criterion(zero, zero, torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="^var must not be negative; got -0.5$"):
        criterion(zero, zero, -0.5)
    with pytest.raises(TypeError, match="^var must be a floating-point tensor; got torch.int64$"):
        criterion(zero, zero, torch.tensor([1, 1]))


@pytest.mark.bad_input
def test_cross_entropy_refuses_targets_that_do_not_fit():
    logits, criterion = torch.zeros(4, 3, 2), nn.CrossEntropyLoss()
    with pytest.raises(ValueError) as raised:
        criterion(logits, torch.zeros(4, 3, dtype=torch.long))
    assert str(raised.value) == (
        "target must have shape (4, 2), the shape of input without its classes; got (4, 3)"
    )
    with pytest.raises(
        ValueError, match=r"^target must have shape \(4, 3, 2\), the shape of input; got \(4, 2\)$"
    ):
        criterion(logits, torch.zeros(4, 2))
    with pytest.raises(ValueError) as raised:
        criterion(logits, torch.tensor([[0, 1], [2, 3], [-100, -1], [0, 0]]))
    assert str(raised.value) == (
        "target must lie in [0, 3), the classes of input, or be ignore_index; "
        "got values from -1 to 3"
    )
    with pytest.raises(TypeError, match="^target must be an integer tensor; got torch.bool$"):
        criterion(logits, torch.zeros(4, 2, dtype=torch.bool))


@pytest.mark.bad_input
def test_cross_entropy_refuses_an_input_without_classes():
    criterion = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"^input must have at least 1 axes; got shape \(\)$"):
        criterion(torch.tensor(0.0), torch.tensor(0))
    with pytest.raises(
        ValueError, match=r"^input must have at least one entry along axis 1; got shape \(2, 0\)$"
    ):
        criterion(torch.zeros(2, 0), torch.tensor([0, 0]))


@pytest.mark.bad_input
def test_cross_entropy_refuses_settings_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"^weight must have shape \(3,\), one entry per class; got \(2,\)$"
    ):
        nn.CrossEntropyLoss(weight=torch.ones(2))(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(
        TypeError, match="^weight must be a floating-point tensor; got torch.int64"
    ):
        nn.CrossEntropyLoss(weight=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"^label_smoothing must lie in \[0, 1\]; got 1.5$"):
        nn.CrossEntropyLoss(label_smoothing=1.5)
    with pytest.raises(ValueError) as raised:
        nn.CrossEntropyLoss(ignore_index=0)(torch.zeros(1, 3), torch.full((1, 3), 1 / 3))
    assert str(raised.value) == (
        "ignore_index needs targets that are class indices; "
        "got ignore_index=0 with targets of torch.float32"
    )


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_binary_cross_entropy_refuses_weights_that_do_not_fit(name):
    zero = torch.zeros(4, 3)
    with pytest.raises(
        ValueError, match=rf"^{name} must broadcast to \(4, 3\), the shape of input; got \(4,\)$"
    ):
        nn.BCEWithLogitsLoss(**{name: torch.ones(4)})(zero, zero)
    with pytest.raises(TypeError, match=f"^{name} must be a floating-point tensor"):
        nn.BCEWithLogitsLoss(**{name: torch.tensor([1])})


@pytest.mark.bad_input
def test_refuses_settings_out_of_range():
    with pytest.raises(ValueError, match="^delta must be positive; got 0.0$"):
        nn.HuberLoss(delta=0.0)
    with pytest.raises(ValueError, match="^eps must be positive; got 0.0$"):
        nn.GaussianNLLLoss(eps=0.0)
    with pytest.raises(ValueError, match="^margin must not be negative; got -1.0$"):
        nn.MarginRankingLoss(margin=-1.0)
    with pytest.raises(
        TypeError, match="^target must be a floating-point tensor; got torch.int64$"
    ):
        nn.KLDivLoss()(torch.zeros(2), torch.tensor([0, 1]))


# the layer and the loss in one: equal to torch to the rounding of the products


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("axes", [(), (2, 3)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_loss_agrees_with_torchs(
    reduction, axes, soft, weighted, smoothing, bias
):
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(11, generator=generator, dtype=torch.float64) if weighted else None
    settings = {
        "out_features": axes, "bias": bias, "dtype": torch.float64, "reduction": reduction,
        "weight": weight, "label_smoothing": smoothing,
    }  # fmt: skip
    theirs = torch.nn.LinearCrossEntropyLoss(5, 11, **settings)
    ours = nn.LinearCrossEntropyLoss(5, 11, **settings)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    if soft:
        target = torch.randn(7, 11, *axes, generator=generator, dtype=torch.float64).softmax(1)
    else:
        target = torch.randint(11, (7, *axes), generator=generator)
        target[2] = -100
    results = []
    for criterion in (ours, theirs):
        leaf = hidden.clone().requires_grad_()
        loss = criterion(leaf, target)
        gradients = torch.autograd.grad(loss.sum(), [leaf, *criterion.parameters()])
        results.append((loss, *gradients))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_agrees_with_torchs_chunked_function(reduction):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = _real(9, 5)(generator, torch.float64), _real(7, 5)(generator, torch.float64)
    target = _index(9, ignored=True)(generator, torch.float64)
    target[0] = 3
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    functional = torch.nn.functional.linear_cross_entropy
    for index, shown in ((None, target), (3, target.masked_fill(target == -100, 2))):
        settings = {"reduction": reduction, "ignore_index": index}
        expected = functional(hidden, weight, shown, options=options, **settings)
        found = nn.linear_cross_entropy(hidden, weight, shown, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_linear_cross_entropy_loss_has_torchs_arguments_and_a_workspace():
    for ours, theirs in (
        (nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss),
        (nn.linear_cross_entropy, torch.nn.functional.linear_cross_entropy),
    ):
        parameters, model = (inspect.signature(f).parameters for f in (ours, theirs))
        assert list(parameters) == [*model, "workspace"]
        for name, parameter in model.items():
            assert (parameters[name].default, parameters[name].kind) == (
                parameter.default,
                parameter.kind,
            ), name


def test_linear_cross_entropy_loss_of_one_sample_is_a_scalar():
    criterion = nn.LinearCrossEntropyLoss(3, 4)
    hidden = torch.ones(3)
    expected = torch.nn.functional.cross_entropy(criterion.linear(hidden), torch.tensor(2))
    torch.testing.assert_close(criterion(hidden, torch.tensor(2)), expected)
    settings = {"reduction": "none"}
    loss = nn.linear_cross_entropy(hidden, criterion.linear.weight, torch.tensor(2), **settings)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("axes", [(), (2,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_cross_entropy_of_ignored_targets_is_zero_with_zero_gradients(axes, weighted):
    criterion = nn.LinearCrossEntropyLoss(
        3, 4, out_features=axes, weight=torch.rand(4) if weighted else None
    )
    hidden = torch.full((5, 3), math.nan, requires_grad=True)
    loss = criterion(hidden, torch.full((5, *axes), -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any() and not criterion.linear.weight.grad.any()


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses():
    generator = torch.Generator().manual_seed(0)
    ids, target = torch.randint(9, (2, 12), generator=generator)
    gradients = []
    for lean in (True, False):
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(9, 6, dtype=torch.float64)
        criterion = nn.LinearCrossEntropyLoss(6, 9, dtype=torch.float64)
        criterion.linear.weight = embedding.weight
        hidden = embedding(ids).tanh()
        if lean:
            criterion(hidden, target).backward()
        else:
            logits = criterion.linear(hidden)
            torch.nn.functional.cross_entropy(logits, target).backward()
        gradients.append(embedding.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input": torch.zeros(1, 2, 3)},
            r"input must have shape \[batch, dim\].*\(1, 2, 3\)",
        ),
        ({"linear_weight": torch.zeros(3)}, "linear_weight must have at least 2 axes"),
        ({"linear_weight": torch.zeros(4, 5)}, r"weight must have shape \(vocab, 3\)"),
        ({"target": torch.tensor([0, 1, 2])}, r"target must have shape \(2,\).*got \(3,\)"),
        ({"target": torch.tensor([0, 4])}, r"target must lie in \[0, 4\).*from 0 to 4"),
        ({"linear_bias": torch.zeros(5)}, r"linear_bias must have shape \(4,\).*got \(5,\)"),
        ({"weight": torch.ones(3)}, r"weight must have shape \(4,\).*got \(3,\)"),
        ({"reduction": "median"}, "reduction must be one of none, mean, sum; got 'median'"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\]; got 1.5"),
        ({"options": 256}, "options tune torch's chunks.*got 256"),
    ],
)
def test_linear_cross_entropy_names_what_it_refuses(change, message):
    arguments = {
        "input": torch.zeros(2, 3),
        "linear_weight": torch.zeros(4, 3),
        "target": torch.tensor([0, 3]),
    }
    with pytest.raises(ValueError, match=message):
        nn.linear_cross_entropy(**(arguments | change))


@pytest.mark.bad_input
def test_linear_cross_entropy_loss_names_what_it_refuses():
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\).*got \(3,\)"):
        nn.LinearCrossEntropyLoss(3, 4, weight=torch.ones(3))
    with pytest.raises(ValueError, match="options tune torch's chunks"):
        nn.LinearCrossEntropyLoss(3, 4, options=torch.nn.LinearCrossEntropyOptions())
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        nn.LinearCrossEntropyLoss(3, 4, label_smoothing=-0.1)
    with pytest.raises(ValueError, match="ignore_index needs targets that are class indices"):
        criterion = nn.LinearCrossEntropyLoss(3, 4, ignore_index=2)
        criterion(torch.zeros(2, 3), torch.full((2, 4), 0.25))


# a temperature that is learned


def test_a_learned_temperature_starts_where_it_is_told_and_stores_its_inverses_logarithm():
    for initial in (0.01, 0.07, 1.0):
        temperature = nn.LearnedTemperature(initial)
        assert temperature().item() == pytest.approx(initial, rel=1e-6)
        (param,) = temperature.parameters()
        assert param.shape == temperature().shape == ()
        assert param.item() == pytest.approx(math.log(1 / initial), abs=1e-6)
    # CLIP starts at a scale of 1 / 0.07 and stops at 100
    assert nn.LearnedTemperature().log_inverse.exp().item() == pytest.approx(1 / 0.07)
    assert nn.LearnedTemperature().smallest == 1 / 100


def test_a_step_on_a_learned_temperature_changes_it_by_a_factor():
    temperature = nn.LearnedTemperature(0.2).double()
    (3.0 * temperature()).backward()
    # the derivative of 3 e^-a in a is minus that itself
    assert temperature.log_inverse.grad.item() == pytest.approx(-0.6)
    with torch.no_grad():
        temperature.log_inverse += 0.5
    assert temperature().item() == pytest.approx(0.2 * math.exp(-0.5))


@pytest.mark.parametrize("bound, beyond", [(0.01, 50.0), (1.0, -50.0)])
def test_a_learned_temperature_is_moved_back_to_the_bound_it_passed_and_can_leave_it(
    bound, beyond
):
    temperature = nn.LearnedTemperature(0.07)
    temperature.log_inverse.data.fill_(beyond)
    assert temperature().item() == pytest.approx(bound, rel=1e-6)
    assert temperature.log_inverse.item() == pytest.approx(-math.log(bound))
    # at the bound it still has its gradient, so that one step leads back
    temperature().backward()
    assert temperature.log_inverse.grad.item() == pytest.approx(-bound, rel=1e-5)
    with torch.no_grad():
        temperature.log_inverse -= math.copysign(0.1, beyond)
    assert 0.01 < temperature().item() < 1.0


def test_on_pairs_that_separate_a_bound_stops_what_would_run_away():
    pairs = torch.eye(4)
    bounded, free = nn.LearnedTemperature(0.07), torch.nn.Parameter(torch.tensor(-math.log(0.07)))
    for param, read in ((bounded.log_inverse, bounded), (free, lambda: (-free).exp())):
        optimizer = torch.optim.Adam([param], lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            losses.clip_loss(pairs, pairs, temperature=read()).mean().backward()
            optimizer.step()
    assert bounded().item() == pytest.approx(0.01, rel=1e-6)
    assert free.neg().exp().item() < 0.009


def test_a_learned_temperature_may_be_read_twice_in_a_step_and_beyond_its_bound():
    temperature = nn.LearnedTemperature(0.1, smallest=0.05, largest=0.5)
    temperature.log_inverse.data.fill_(9.0)
    first = temperature()
    (first * temperature()).backward()
    assert temperature.log_inverse.grad.item() == pytest.approx(-2 * 0.05**2)


def test_a_learned_temperature_travels_in_a_state_dict_and_keeps_its_dtype():
    temperature = nn.LearnedTemperature(0.1)
    other = nn.LearnedTemperature(0.5)
    other.load_state_dict(temperature.state_dict())
    assert other().item() == temperature().item()
    for dtype in (torch.float64, torch.bfloat16):
        assert nn.LearnedTemperature(0.1).to(dtype)().dtype == dtype


def test_a_learned_temperature_reads_no_value_from_the_device():
    temperature = nn.LearnedTemperature().to("meta")
    vectors = torch.empty(3, 2, device="meta", requires_grad=True)
    losses.clip_loss(vectors, vectors, temperature=temperature()).mean().backward()
    assert temperature.log_inverse.grad.device.type == "meta"


@pytest.mark.compiles
def test_a_compiled_temperature_stays_within_its_bounds():
    temperature = nn.LearnedTemperature(0.07)
    temperature.log_inverse.data.fill_(50.0)
    compiled = torch.compile(temperature, fullgraph=True, backend="aot_eager")
    found = compiled()
    found.backward()
    assert found.item() == pytest.approx(0.01, rel=1e-6)
    assert temperature.log_inverse.item() == pytest.approx(math.log(100))
    assert temperature.log_inverse.grad.item() == pytest.approx(-0.01, rel=1e-5)


@pytest.mark.bad_input
def test_a_learned_temperature_names_what_it_refuses():
    between = r"initial must lie between smallest, 0.01, and largest, 1.0; got"
    for initial in (0.001, 2.0):
        with pytest.raises(ValueError, match=f"{between} {initial}"):
            nn.LearnedTemperature(initial)
    with pytest.raises(ValueError, match="initial must lie between smallest, 0.5, and largest, 0"):
        nn.LearnedTemperature(0.3, smallest=0.5, largest=0.2)
    for name in ("initial", "smallest", "largest"):
        with pytest.raises(ValueError, match=f"{name} must be positive; got 0.0"):
            nn.LearnedTemperature(**{name: 0.0})
        with pytest.raises(ValueError, match=f"{name} must be finite; got inf"):
            nn.LearnedTemperature(**{name: math.inf})
        with pytest.raises(TypeError, match=f"{name} must be a real number; got str '1'"):
            nn.LearnedTemperature(**{name: "1"})
