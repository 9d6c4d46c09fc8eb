"""Small synthetic data whose truth is known.

Everything is drawn on the CPU with the caller's generator, in torch's default dtype, so that a
page sees the same numbers on every device: draw, then move.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_ndim,
    check_non_negative,
    check_not_empty_axis,
    check_shape,
    check_whole,
)


class Labelled(NamedTuple):
    """Points and the class that each was drawn from."""

    inputs: Float[Tensor, "samples dim"]
    targets: Int[Tensor, "samples"]


class Line(NamedTuple):
    """Places along a line and the noisy values measured there."""

    inputs: Float[Tensor, "samples"]
    targets: Float[Tensor, "samples"]


def _blobs(targets: Tensor, centers: Tensor, scale: float, generator: torch.Generator) -> Labelled:
    check_non_negative(scale=scale)
    centers = centers.float()
    noise = torch.randn(len(targets), centers.shape[1], generator=generator)
    return Labelled(centers[targets] + scale * noise, targets)


def _check_centers(centers: Tensor) -> None:
    check_floating(centers=centers)
    check_ndim("centers", centers, 2)
    check_not_empty_axis("centers", centers, 0)


def gaussian_blobs(
    count: int,
    *,
    centers: Float[Tensor, "classes dim"],
    scale: float,
    generator: torch.Generator,
) -> Labelled:
    r"""A round Gaussian cloud of points about each center, one class per center.

    .. math:: x_n = \mu_{y_n} + \sigma \, \epsilon_n , \qquad
        \epsilon_n \sim \mathcal{N}(0, \mathbb{1})

    The classes take turns, 0, 1, …, 0, 1, …, so their counts differ by at most one. The best
    classifier is linear: its logits are :math:`\langle \mu_c, x \rangle / \sigma^2 - \lVert
    \mu_c \rVert^2 / (2 \sigma^2)`.

    Args:
        count: Number of points, over all classes.
        centers: The means :math:`\mu_c`.
        scale: The standard deviation :math:`\sigma` in every direction.
        generator: Source of the noise, on the CPU.

    Returns:
        ``inputs`` in torch's default dtype and ``targets``, on the CPU.

    Raises:
        TypeError: If ``centers`` is not floating point, or a setting not a number.
        ValueError: If ``centers`` is not a matrix with a row, or a setting is negative.

    Example:
        >>> import torch
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.data import gaussian_blobs
        >>> centers = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> inputs, targets = gaussian_blobs(
        ...     5, centers=centers, scale=0.5, generator=cpu_generator(0))
        >>> inputs.shape, targets
        (torch.Size([5, 2]), tensor([0, 1, 0, 1, 0]))
    """
    check_whole(count=count)
    check_non_negative(count=count)
    _check_centers(centers)
    return _blobs(torch.arange(count) % len(centers), centers, scale, generator)


def imbalanced_blobs(
    counts: Sequence[int],
    *,
    centers: Float[Tensor, "classes dim"],
    scale: float,
    generator: torch.Generator,
) -> Labelled:
    r"""Gaussian clouds with a number of points of its own for each class.

    .. math:: x_n = \mu_{y_n} + \sigma \, \epsilon_n , \qquad
        |\{n : y_n = c\}| = n_c

    The points come sorted by class.

    Args:
        counts: Number of points :math:`n_c` of each class.
        centers: The means :math:`\mu_c`.
        scale: The standard deviation :math:`\sigma` in every direction.
        generator: Source of the noise, on the CPU.

    Returns:
        ``inputs`` in torch's default dtype and ``targets``, on the CPU.

    Raises:
        TypeError: If ``centers`` is not floating point, or a setting not a number.
        ValueError: If ``centers`` is not a matrix with a row for each count, or a count or the
            scale is negative.

    Example:
        >>> import torch
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.data import imbalanced_blobs
        >>> centers = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> imbalanced_blobs(
        ...     [4, 1], centers=centers, scale=0.5, generator=cpu_generator(0)).targets
        tensor([0, 0, 0, 0, 1])
    """
    _check_centers(centers)
    for count in counts:
        check_whole(counts=count)
        check_non_negative(counts=count)
    if len(counts) != len(centers):
        raise ValueError(
            f"counts must have {len(centers)} entries, one per center; got {len(counts)}"
        )
    targets = torch.arange(len(centers)).repeat_interleave(torch.tensor(list(counts)))
    return _blobs(targets, centers, scale, generator)


def gaussian_noise(
    count: int, *, scale: float, generator: torch.Generator
) -> Float[Tensor, "count"]:
    r"""Independent draws from a normal distribution with mean zero, under which squares add up.

    .. math:: \epsilon \sim \frac{1}{\sigma \sqrt{2 \pi}} \, e^{-\epsilon^2 / (2 \sigma^2)}

    Args:
        count: Number of draws.
        scale: The standard deviation :math:`\sigma`.
        generator: Source of the noise, on the CPU.

    Returns:
        The draws, in torch's default dtype, on the CPU.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is negative.

    Example:
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.data import gaussian_noise
        >>> gaussian_noise(3, scale=0.1, generator=cpu_generator(0)).shape
        torch.Size([3])
    """
    check_whole(count=count)
    check_non_negative(count=count, scale=scale)
    return scale * torch.randn(count, generator=generator)


def laplace_noise(
    count: int, *, scale: float, generator: torch.Generator
) -> Float[Tensor, "count"]:
    r"""Independent draws from a Laplace distribution with mean zero: heavier tails, a sharp peak.

    .. math:: \epsilon \sim \frac{1}{2b} \, e^{-|\epsilon| / b}

    The mean absolute value is :math:`b`, the standard deviation :math:`\sqrt{2} \, b`.

    Args:
        count: Number of draws.
        scale: The scale :math:`b`.
        generator: Source of the noise, on the CPU.

    Returns:
        The draws, in torch's default dtype, on the CPU.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is negative.

    Example:
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.data import laplace_noise
        >>> laplace_noise(3, scale=0.1, generator=cpu_generator(0)).shape
        torch.Size([3])
    """
    check_whole(count=count)
    check_non_negative(count=count, scale=scale)
    # the difference of two exponential draws is Laplace, and never infinite
    exponential = torch.empty(2, count).exponential_(generator=generator)
    return scale * (exponential[0] - exponential[1])


def noisy_line(
    count: int, *, slope: float, intercept: float, noise: Float[Tensor, "count"]
) -> Line:
    r"""Values along a straight line at evenly spaced places, with the noise that is passed in.

    .. math:: y_n = a \, x_n + b + \epsilon_n , \qquad x_n = -1 + \frac{2 n}{N - 1}

    Textbook equation (4.3.29) for a linear truth.

    Args:
        count: Number of samples :math:`N`.
        slope: The number :math:`a`.
        intercept: The number :math:`b`.
        noise: The :math:`\epsilon_n`, for example from `gaussian_noise` or `laplace_noise`.

    Returns:
        ``inputs`` from -1 to 1 and ``targets``, in the dtype and on the device of ``noise``.

    Raises:
        TypeError: If ``noise`` is not floating point, or ``count`` not a number.
        ValueError: If ``count`` is negative or ``noise`` does not have that many entries.

    Example:
        >>> import torch
        >>> from lmlosses.lab.data import noisy_line
        >>> noisy_line(3, slope=2.0, intercept=1.0, noise=torch.tensor([0.0, 0.5, 0.0]))
        Line(inputs=tensor([-1.,  0.,  1.]), targets=tensor([-1.0000,  1.5000,  3.0000]))
    """
    check_whole(count=count)
    check_non_negative(count=count)
    check_floating(noise=noise)
    check_shape("noise", noise, (count,), meaning="one entry per sample")
    inputs = torch.linspace(-1.0, 1.0, count, dtype=noise.dtype, device=noise.device)
    return Line(inputs, slope * inputs + intercept + noise)
