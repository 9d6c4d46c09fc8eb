"""Losses of a predicted number: one value per entry, unreduced.

Which loss is a statement about the noise: squared error is the negative log-likelihood of
Gaussian noise of constant width, absolute error that of Laplace noise, and `gaussian_nll` and
`laplace_nll` let the model say how wide the noise is.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_open_unit_interval,
    check_positive,
    check_same_shape,
    compute_dtype,
)


def _errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """Predictions minus targets in at least float32."""
    check_floating(predictions=predictions, targets=targets)
    check_same_shape("targets", targets, of="predictions", reference=predictions)
    dtype = compute_dtype(predictions, targets)
    return predictions.to(dtype) - targets.to(dtype)


def _spread(name: str, values: Tensor, errors: Tensor) -> Tensor:
    """What the model says about the width of the noise, checked and in at least float32."""
    check_floating(**{name: values})
    check_same_shape(name, values, of="predictions", reference=errors)
    return values.to(compute_dtype(values, errors))


def squared_error(
    predictions: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""Square of the error, in the squared unit of the targets.

    .. math:: L = (\hat y - y)^2

    An error of 3 costs 9. The best constant prediction is the mean of the targets.

    Args:
        predictions: What the model says. Half precision is computed in float32.
        targets: What it should have said.

    Returns:
        One loss per entry, unreduced, in at least float32. See `lmlosses.reductions`.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> from lmlosses.losses import squared_error
        >>> squared_error(torch.tensor([3.0, -1.0]), torch.tensor([0.0, 1.0]))
        tensor([9., 4.])

    References:
        The summand of textbook equation (4.3.2), twice that of (4.3.1).
    """
    return _errors(predictions, targets).square()


def half_squared_error(
    predictions: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""Half the square of the error, whose derivative is the error itself.

    .. math:: L = \tfrac{1}{2} (\hat y - y)^2

    An error of 3 costs 4.5. Up to a constant it is the negative log-likelihood in nats of
    Gaussian noise of unit variance.

    Args:
        predictions: What the model says. Half precision is computed in float32.
        targets: What it should have said.

    Returns:
        One loss per entry, unreduced, in at least float32. See `lmlosses.reductions`.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> from lmlosses.losses import half_squared_error
        >>> half_squared_error(torch.tensor([3.0, -1.0]), torch.tensor([0.0, 1.0]))
        tensor([4.5000, 2.0000])

    References:
        Textbook equation (4.3.1).
    """
    return 0.5 * _errors(predictions, targets).square()


def absolute_error(
    predictions: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""Size of the error, in the unit of the targets.

    .. math:: L = |\hat y - y|

    An error of -3 costs 3. The best constant prediction is a median of the targets, which one
    wild target cannot move. At an error of 0 the gradient is 0.

    Args:
        predictions: What the model says. Half precision is computed in float32.
        targets: What it should have said.

    Returns:
        One loss per entry, unreduced, in at least float32. See `lmlosses.reductions`.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> from lmlosses.losses import absolute_error
        >>> absolute_error(torch.tensor([3.0, -1.0]), torch.tensor([0.0, 1.0]))
        tensor([3., 2.])
    """
    return _errors(predictions, targets).abs()


def huber(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    delta: float = 1.0,
) -> Float[Tensor, "*batch"]:
    r"""Squared near zero and absolute far from it, so that one wild target pulls only so hard.

    With :math:`e = \hat y - y` and the width :math:`\delta`,

    .. math::
        L = \begin{cases} \tfrac{1}{2} e^2 & |e| \le \delta \\
            \delta (|e| - \tfrac{1}{2} \delta) & |e| > \delta \end{cases}

    An error of 3 costs 2.5 at :math:`\delta = 1`, against 4.5 for `half_squared_error`.

    Args:
        predictions: What the model says. Half precision is computed in float32.
        targets: What it should have said.
        delta: The error beyond which the loss grows linearly, and the largest slope.

    Returns:
        One loss per entry, unreduced, in at least float32. See `lmlosses.reductions`.

    Raises:
        TypeError: If a tensor is not floating point or ``delta`` not a number.
        ValueError: If the shapes differ or ``delta`` is not positive.

    Example:
        >>> import torch
        >>> from lmlosses.losses import huber
        >>> huber(torch.tensor([0.5, 3.0, -3.0]), torch.zeros(3))
        tensor([0.1250, 2.5000, 2.5000])

    References:
        Huber (1964), Robust estimation of a location parameter, Annals of Mathematical
        Statistics 35(1).
    """
    check_positive(delta=delta)
    errors = _errors(predictions, targets)
    # the error cut to [-delta, delta] makes both cases one product, with no branch in which an
    # infinite error could meet a zero gradient
    cut = errors.clamp(-delta, delta)
    return cut * (errors - 0.5 * cut)


def log_cosh(
    predictions: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""Logarithm of the hyperbolic cosine of the error: a Huber loss without a corner.

    .. math:: L = \log \cosh(\hat y - y)

    Near zero it is half the squared error, far from it the absolute error less :math:`\log 2`;
    its derivative is the hyperbolic tangent of the error.

    Args:
        predictions: What the model says. Half precision is computed in float32.
        targets: What it should have said.

    Returns:
        One loss per entry, unreduced, in at least float32; accurate for errors of every size.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> from lmlosses.losses import log_cosh
        >>> log_cosh(torch.tensor([0.1, 1e4]), torch.zeros(2))
        tensor([4.9917e-03, 9.9993e+03])
    """
    errors = _errors(predictions, targets)
    size = errors.abs()
    # cosh e = 1 + 2 sinh^2(e/2) keeps small errors, cosh e = e^|e| (1 + e^-2|e|) / 2 large ones
    near = (2 * (errors.clamp(-1.0, 1.0) / 2).sinh().square()).log1p()
    far = size - F.logsigmoid(2 * size) - math.log(2)
    return torch.where(size < 1, near, far)


def quantile_loss(
    predictions: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"], *, quantile: float
) -> Float[Tensor, "*batch"]:
    r"""Asymmetric absolute error whose best constant prediction is a quantile of the targets.

    With :math:`q` the quantile,

    .. math:: L = \max\bigl(q (y - \hat y),\; (q - 1)(y - \hat y)\bigr) .

    At :math:`q = 0.9` a prediction that is 1 too low costs 0.9, one that is 1 too high 0.1. At
    :math:`q = 0.5` it is half the absolute error. Also called the pinball loss.

    Args:
        predictions: What the model says. Half precision is computed in float32.
        targets: What it should have said.
        quantile: Share of the targets that should lie below the prediction, in ``(0, 1)``.

    Returns:
        One loss per entry, unreduced, in at least float32. See `lmlosses.reductions`.

    Raises:
        TypeError: If a tensor is not floating point or ``quantile`` not a number.
        ValueError: If the shapes differ or ``quantile`` is outside ``(0, 1)``.

    Example:
        >>> import torch
        >>> from lmlosses.losses import quantile_loss
        >>> quantile_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), quantile=0.9)
        tensor([0.9000, 0.1000])

    References:
        Koenker and Bassett (1978), Regression quantiles, Econometrica 46(1).
    """
    check_open_unit_interval(quantile=quantile)
    shortfall = -_errors(predictions, targets)
    return torch.maximum(quantile * shortfall, (quantile - 1) * shortfall)


def gaussian_nll(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    log_variances: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    r"""Negative log-likelihood of a target under Gaussian noise of predicted width, in nats.

    With :math:`s = \log \sigma^2`,

    .. math:: L = \tfrac{1}{2} \bigl(\log 2\pi + s + (y - \hat y)^2 e^{-s}\bigr) .

    All constants are included, so it is minus the logarithm of a density, and can be negative. A
    perfect prediction at unit variance costs :math:`\tfrac{1}{2} \log 2\pi \approx 0.919`. For a
    fixed error the best variance is its square.

    Args:
        predictions: Mean of the distribution. Half precision is computed in float32.
        targets: What was observed.
        log_variances: Logarithm of the variance, an unbounded output of the model: there is
            nothing to clamp. Float32 holds values above -176.

    Returns:
        One loss per entry, unreduced, in at least float32. See `lmlosses.reductions`.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> from lmlosses.losses import gaussian_nll
        >>> gaussian_nll(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor([0.9189, 1.4189])

    References:
        Nix and Weigend (1994), Estimating the mean and variance of the target probability
        distribution, ICNN. The noise model of textbook equation (4.3.29).
    """
    errors = _errors(predictions, targets)
    log_variances = _spread("log_variances", log_variances, errors)
    # half of the exponent on each factor of the square: exp(-s) alone overflows twice as soon
    standardized = errors * (-0.5 * log_variances).exp()
    return 0.5 * (math.log(2 * math.pi) + log_variances + standardized.square())


def _gaussian_nll_of_variances(predictions: Tensor, targets: Tensor, variances: Tensor) -> Tensor:
    """Gaussian negative log-likelihood without its constant, from variances as torch takes them.

    Not by way of their logarithms, since exp(log(v)) is off by |log v| rounding steps.
    """
    errors = _errors(predictions, targets)
    variances = _spread("var", variances, errors)
    return 0.5 * (variances.log() + errors.square() / variances)


def laplace_nll(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    log_scales: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    r"""Negative log-likelihood of a target under Laplace noise of predicted width, in nats.

    With :math:`s = \log b` the logarithm of the scale,

    .. math:: L = \log 2 + s + |y - \hat y| \, e^{-s} .

    All constants are included, so it is minus the logarithm of a density, and can be negative. A
    perfect prediction at unit scale costs :math:`\log 2 \approx 0.693`. For a fixed error the
    best scale is its size.

    Args:
        predictions: Median of the distribution. Half precision is computed in float32.
        targets: What was observed.
        log_scales: Logarithm of the scale, the mean absolute deviation; an unbounded output of
            the model. Float32 holds values above -88.

    Returns:
        One loss per entry, unreduced, in at least float32. See `lmlosses.reductions`.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> from lmlosses.losses import laplace_nll
        >>> laplace_nll(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor([0.6931, 1.6931])
    """
    errors = _errors(predictions, targets)
    log_scales = _spread("log_scales", log_scales, errors)
    return math.log(2) + log_scales + errors.abs() * (-log_scales).exp()
