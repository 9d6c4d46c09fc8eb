"""Linear regression on a stream: a noisy problem whose every learning curve can be computed.

Each step of SGD sees a fresh batch, so nothing is ever fitted twice and the loss of interest is
the expected one. It obeys an exact recursion: schedules can be compared without a seed, and a
simulation beside it shows that the recursion is about the real thing.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_ndim,
    check_non_negative,
    check_positive,
    check_same_device,
    check_whole,
)


def _check(curvatures: Tensor, batch: int, noise: float) -> None:
    check_floating(curvatures=curvatures)
    check_ndim("curvatures", curvatures, 1)
    check_whole(batch=batch)
    check_positive(batch=batch)
    check_non_negative(noise=noise)


def expected_losses(
    rates: Float[Tensor, "*runs steps"],
    curvatures: Float[Tensor, "dim"],
    *,
    batch: int,
    noise: float,
) -> Float[Tensor, "*runs steps_and_start"]:
    r"""Expected loss of SGD on a stream of linear regressions, after every step, exactly.

    Features :math:`x_i \sim N(0, \lambda_i)` are independent, targets are
    :math:`w^* \cdot x + \epsilon` with :math:`\epsilon \sim N(0, \sigma^2)`, and a step uses the
    mean gradient of :math:`b` fresh samples. The expected squares :math:`m_i` of the errors
    :math:`w_i - w^*_i` then follow

    .. math:: m_i \leftarrow \left( 1 - 2 \eta \lambda_i + \eta^2 \lambda_i^2 (1 + 1/b) \right) m_i
        + \frac{\eta^2 \lambda_i}{b} \Big( \sigma^2 + \sum_j \lambda_j m_j \Big)

    and the loss is :math:`\tfrac12 \sum_i \lambda_i m_i`, above the :math:`\sigma^2 / 2` that no
    weights can avoid. The start is :math:`m_i = 1 / \lambda_i`: each feature costs one half.

    Args:
        rates: The rate :math:`\eta` of each step; several runs at once in leading axes.
        curvatures: The variances :math:`\lambda_i` of the features.
        batch: Samples :math:`b` of a step.
        noise: Variance :math:`\sigma^2` of the targets' noise.

    Returns:
        The loss before the first step and after each one; infinite where SGD diverges.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype, or ``batch`` is no whole number.
        ValueError: If ``batch`` is not positive or ``noise`` negative.

    Example:
        >>> import torch
        >>> from lmlosses.lab.streaming import expected_losses
        >>> one = torch.ones(1)
        >>> expected_losses(torch.tensor([0.0, 0.5]), one, batch=1, noise=0.0)
        tensor([0.5000, 0.5000, 0.3750])

    References:
        The recursion of least squares under SGD with Gaussian features; Bordelon and Pehlevan
        (2022), arXiv:2106.02713, section 3.
    """
    _check(curvatures, batch, noise)
    check_floating(rates=rates)
    check_same_device(of="curvatures", reference=curvatures, rates=rates)
    error = (1 / curvatures).expand(*rates.shape[:-1], -1)
    losses = [(curvatures * error).sum(dim=-1)]
    for rate in rates.unbind(dim=-1):
        steps = rate.unsqueeze(-1) * curvatures
        kept = 1 - 2 * steps + steps.square() * (1 + 1 / batch)
        spread = rate.unsqueeze(-1) * steps / batch
        error = kept * error + spread * (noise + losses[-1].unsqueeze(-1))
        losses.append((curvatures * error).sum(dim=-1))
    return (torch.stack(losses, dim=-1) / 2).nan_to_num(nan=torch.inf, posinf=torch.inf)


def streaming_regression(
    curvatures: Float[Tensor, "dim"],
    *,
    copies: int,
    batch: int,
    noise: float,
    generator: torch.Generator,
) -> tuple[torch.nn.Parameter, Callable[[], Float[Tensor, ""]]]:
    r"""The problem of `expected_losses`, to be trained, in many independent copies.

    Args:
        curvatures: The variances :math:`\lambda_i` of the features.
        copies: Runs that are simulated at once.
        batch: Samples :math:`b` of a step, for each copy.
        noise: Variance :math:`\sigma^2` of the targets' noise.
        generator: Draws the samples; on the CPU.

    Returns:
        The weights' errors :math:`w - w^*`, [copies, dim], to be driven to zero, and a function
        that draws a batch and returns the copies' losses, summed, so that each has the gradient
        of its own.

    Raises:
        TypeError: If ``curvatures`` is not floating point, or a count no whole number.
        ValueError: If a count is not positive or ``noise`` negative.

    Example:
        >>> import torch
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.streaming import streaming_regression
        >>> weights, draw_loss = streaming_regression(
        ...     torch.ones(2), copies=3, batch=4, noise=0.0, generator=cpu_generator(0))
        >>> draw_loss().backward()
        >>> weights.grad.shape
        torch.Size([3, 2])
    """
    _check(curvatures, batch, noise)
    check_whole(copies=copies)
    check_positive(copies=copies)
    start = curvatures.rsqrt().expand(copies, -1).clone()
    weights = torch.nn.Parameter(start)

    def draw_loss() -> Tensor:
        shape = (copies, batch, len(curvatures))
        normal = torch.randn(shape, generator=generator, dtype=curvatures.dtype)
        features = normal.to(curvatures.device) * curvatures.sqrt()
        targets = torch.randn(shape[:2], generator=generator, dtype=curvatures.dtype)
        predictions = (features @ weights.unsqueeze(-1)).squeeze(-1)
        residual = predictions - noise**0.5 * targets.to(curvatures.device)
        loss: Tensor = residual.square().mean(dim=1).sum() / 2
        return loss

    return weights, draw_loss
