"""From scores to probabilities: softmax with a temperature and a mask, and its Jacobian.

A class is left out in two ways that mean the same: its logit is ``-inf``, or its mask is False.
What stands there is never read, gets probability 0 and gradient 0, and cannot turn the gradient
of anything else, a learned temperature included, into NaN.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lmlosses._checks import (
    check_bool,
    check_floating,
    check_ndim,
    check_not_empty_axis,
    check_positive,
    check_same_shape,
    compute_dtype,
    reads_values,
)


def _check_temperature(temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor):
        check_positive(temperature=temperature)
        return
    check_floating(temperature=temperature)
    check_ndim("temperature", temperature, 0)
    if reads_values(temperature):
        check_positive(temperature=temperature.detach().item())


def _scaled(
    logits: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits over temperature with -inf where a class is left out, and where that is.

    A row with no class left is all zeros, so that its softmax exists; the caller fills it.
    """
    check_floating(logits=logits)
    check_not_empty_axis("logits", logits)
    _check_temperature(temperature)
    left_out = logits == -math.inf
    if mask is not None:
        check_bool(mask=mask)
        check_same_shape("mask", mask, of="logits", reference=logits)
        left_out = left_out | ~mask
    logits = logits.to(compute_dtype(logits))

    # Shifting a row changes no probability. With the largest logit at 0, a temperature near 0
    # sends the others to -inf instead of sending the largest to +inf.
    lowest = torch.finfo(logits.dtype).min
    largest = logits.detach().masked_fill(left_out, lowest).amax(dim=-1, keepdim=True)
    scaled = (logits - largest).masked_fill(left_out, 0.0) / temperature
    row_is_empty = left_out.all(dim=-1, keepdim=True)
    return scaled.masked_fill(left_out & ~row_is_empty, -math.inf), left_out


def softmax(
    logits: Float[Tensor, "*batch classes"],
    *,
    temperature: float | Float[Tensor, ""] = 1.0,
    mask: Bool[Tensor, "*batch classes"] | None = None,
) -> Float[Tensor, "*batch classes"]:
    r"""Probabilities proportional to the exponentials of the logits, along the last axis.

    With :math:`z` the logits, :math:`\tau` the temperature and :math:`m_j = 1` where a class may
    be chosen,

    .. math:: p_i = \frac{m_i \exp(z_i / \tau)}{\sum_j m_j \exp(z_j / \tau)} .

    Equal logits give equal probabilities at every temperature. As :math:`\tau \to 0` all of the
    probability goes to the largest logit, as :math:`\tau \to \infty` it spreads evenly.

    Args:
        logits: Unnormalized log-probabilities. Half precision is computed in float32; ``-inf``
            leaves a class out.
        temperature: A positive number, or a scalar tensor that may be learned.
        mask: True where a class may be chosen; every class may without it.

    Returns:
        Probabilities in at least float32. A row in which nothing may be chosen is all zeros, with
        zero gradient: attention that may look nowhere returns 0.

    Raises:
        TypeError: If ``logits`` or a tensor ``temperature`` is not floating point, or ``mask``
            not boolean.
        ValueError: If there is no class, the temperature is not a positive scalar, or the
            shapes of ``mask`` and ``logits`` differ.

    Example:
        >>> import math
        >>> import torch
        >>> from lmlosses.normalizers import softmax
        >>> logits = torch.tensor([0.0, math.log(3.0), 100.0])
        >>> softmax(logits, mask=torch.tensor([True, True, False]))
        tensor([0.2500, 0.7500, 0.0000])

    References:
        Textbook equation (4.3.35); with scores over their temperature, (4.3.34).
    """
    scaled, left_out = _scaled(logits, temperature, mask)
    return scaled.softmax(dim=-1).masked_fill(left_out, 0.0)


def log_softmax(
    logits: Float[Tensor, "*batch classes"],
    *,
    temperature: float | Float[Tensor, ""] = 1.0,
    mask: Bool[Tensor, "*batch classes"] | None = None,
) -> Float[Tensor, "*batch classes"]:
    r"""Logarithms of the softmax probabilities along the last axis, in nats.

    .. math:: \log p_i = \frac{z_i}{\tau} - \log \sum_j m_j \exp(z_j / \tau)

    Exact where ``softmax(...).log()`` is not: a probability of :math:`e^{-200}` underflows to 0
    in float32, its logarithm is -200.

    Args:
        logits: Unnormalized log-probabilities. Half precision is computed in float32; ``-inf``
            leaves a class out.
        temperature: A positive number, or a scalar tensor that may be learned.
        mask: True where a class may be chosen; every class may without it.

    Returns:
        Log-probabilities in at least float32, ``-inf`` for a class left out. A row in which
        nothing may be chosen is all ``-inf``, with zero gradient and never NaN.

    Raises:
        TypeError: If ``logits`` or a tensor ``temperature`` is not floating point, or ``mask``
            not boolean.
        ValueError: If there is no class, the temperature is not a positive scalar, or the
            shapes of ``mask`` and ``logits`` differ.

    Example:
        >>> import torch
        >>> from lmlosses.normalizers import log_softmax
        >>> log_softmax(torch.tensor([0.0, 200.0, float("-inf")]))
        tensor([-200.,    0.,   -inf])

    References:
        The logarithm of textbook equation (4.3.35).
    """
    scaled, left_out = _scaled(logits, temperature, mask)
    return scaled.log_softmax(dim=-1).masked_fill(left_out, -math.inf)


def softmax_jacobian(
    logits: Float[Tensor, "*batch classes"], *, temperature: float | Float[Tensor, ""] = 1.0
) -> Float[Tensor, "*batch classes classes"]:
    r"""Derivative of each softmax probability in each logit.

    .. math:: \frac{\partial p_i}{\partial z_j} = \frac{p_i (\delta_{ij} - p_j)}{\tau}

    At :math:`\tau = 1` this is also the Hessian of the cross-entropy in the logits and the Fisher
    information of the categorical distribution. It is symmetric and positive semidefinite, and
    its rows sum to zero, since adding a constant to all logits changes nothing.

    Args:
        logits: Unnormalized log-probabilities. Half precision is computed in float32.
        temperature: A positive number, or a scalar tensor that may be learned.

    Returns:
        One matrix for each row of logits, in at least float32.

    Raises:
        TypeError: If ``logits`` or a tensor ``temperature`` is not floating point.
        ValueError: If there is no class or the temperature is not a positive scalar.

    Example:
        >>> import torch
        >>> from lmlosses.normalizers import softmax_jacobian
        >>> softmax_jacobian(torch.zeros(2))
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])

    References:
        Inside textbook equations (4.3.8) to (4.3.10).
    """
    p = softmax(logits, temperature=temperature)
    return (p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)) / temperature
