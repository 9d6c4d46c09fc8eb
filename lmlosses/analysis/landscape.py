"""The loss around a point: slices, curvature over a region, and the noise of its gradient.

Functions that move the parameters put them back, to the bit, whatever happens in between. The loss
runs in the caller's gradient mode: under ``torch.no_grad()`` a slice saves the memory of a graph.

`smoothness` and `strong_convexity` read numbers from the device, as the eigenvalues that they ask
for do; nothing else here waits for it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_ndim,
    check_positive,
    check_whole,
    compute_dtype,
    reads_values,
)
from lmlosses.analysis._vectors import (
    check_differentiable,
    check_loss,
    check_params,
    check_variables,
    check_vectors,
)
from lmlosses.analysis.curvature import Loss, hessian_product
from lmlosses.analysis.spectrum import top_eigenvalues


class NoiseScale(NamedTuple):
    """The batch size beyond which averaging pays little, and the two parts it is made of."""

    value: Float[Tensor, ""]
    """Samples: ``noise / signal``."""
    noise: Float[Tensor, ""]
    """Trace of the covariance of one sample's gradient."""
    signal: Float[Tensor, ""]
    """Squared length of the true gradient. By chance the estimate can be negative."""


@contextmanager
def _kept(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Hand out a copy of the parameters and put it back afterwards."""
    saved = [param.detach().clone() for param in params]
    try:
        yield saved
    finally:
        _move(params, saved)


@torch.no_grad()
def _move(params: list[Tensor], values: Iterable[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)


def _shifted(origin: list[Tensor], *moves: tuple[Tensor, list[Tensor]]) -> Iterator[Tensor]:
    """The origin plus multiples of directions, one tensor at a time."""
    for index, start in enumerate(origin):
        yield start + sum((t.to(start.dtype) * direction[index] for t, direction in moves))


def _copied(name: str, vectors: Sequence[Tensor], params: list[Tensor]) -> list[Tensor]:
    """Vectors that stay where they are while the parameters, which may be the same, move."""
    return [vector.clone() for vector in check_vectors(name, vectors, params)]


def _check_line(name: str, values: Tensor) -> None:
    check_floating(**{name: values})
    check_ndim(name, values, 1)


def _place(values: Tensor, params: list[Tensor]) -> Tensor:
    return values.detach().to(params[0].device)


def loss_slice(
    loss: Loss,
    params: Iterable[Tensor],
    direction: Sequence[Tensor],
    distances: Float[Tensor, "points"],
) -> Float[Tensor, "points"]:
    r"""The loss along a line through the current parameters.

    .. math:: t \mapsto L(\theta + t u)

    Args:
        loss: The loss at the current parameters. See `lmlosses.analysis.curvature`.
        params: The parameters :math:`\theta`; they are put back to the bit, after errors too.
        direction: The vector :math:`u`, a tensor for each parameter; its length is the unit.
        distances: The numbers :math:`t`.

    Returns:
        One loss for each distance, without a graph, in at least float32.

    Raises:
        TypeError: If a tensor or the loss is not floating point.
        ValueError: If the loss is no single number, ``params`` has no entries or repeats a
            tensor, ``direction`` does not fit it or ``distances`` has not one axis.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.landscape import loss_slice
        >>> w = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> up = torch.tensor([0.0, 1.0])
        >>> loss_slice(lambda: w.square().sum(), [w], [up], torch.tensor([-2.0, 0.0, 1.0]))
        tensor([5., 1., 2.])

    References:
        Goodfellow, Vinyals and Saxe (2015), arXiv:1412.6544, section 2.
    """
    found = check_params(params)
    direction = _copied("direction", direction, found)
    _check_line("distances", distances)
    nowhere = [torch.zeros_like(vector) for vector in direction]
    plane = loss_plane(loss, found, direction, nowhere, distances, distances.new_zeros(1))
    return plane.squeeze(-1)


def loss_plane(
    loss: Loss,
    params: Iterable[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_distances: Float[Tensor, "rows"],
    second_distances: Float[Tensor, "columns"],
) -> Float[Tensor, "rows columns"]:
    r"""The loss on a plane through the current parameters.

    .. math:: (s, t) \mapsto L(\theta + s u + t v)

    Two eigenvectors of the Hessian show the directions of most curvature. Random directions
    nearly always look flat and bowl-shaped; and distances mean little while the scale of a layer
    can be moved into the next one.

    Args:
        loss: The loss at the current parameters. See `lmlosses.analysis.curvature`.
        params: The parameters :math:`\theta`; they are put back to the bit, after errors too.
        first: The vector :math:`u`, a tensor for each parameter; its length is the unit.
        second: The vector :math:`v`.
        first_distances: The numbers :math:`s`.
        second_distances: The numbers :math:`t`.

    Returns:
        A row for each :math:`s` with a loss for each :math:`t`, without a graph, in at least
        float32.

    Raises:
        TypeError: If a tensor or the loss is not floating point.
        ValueError: If the loss is no single number, ``params`` has no entries or repeats a
            tensor, a direction does not fit it or distances have not one axis.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.landscape import loss_plane
        >>> w = torch.zeros(2)
        >>> right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> ticks = torch.tensor([0.0, 1.0])
        >>> loss_plane(lambda: w[0] ** 2 + 3 * w[1] ** 2, [w], [right], [up], ticks, ticks)
        tensor([[0., 3.],
                [1., 4.]])

    References:
        Li et al. (2018), Visualizing the Loss Landscape of Neural Nets, arXiv:1712.09913,
        section 3.
    """
    found = check_params(params)
    first = _copied("first", first, found)
    second = _copied("second", second, found)
    _check_line("first_distances", first_distances)
    _check_line("second_distances", second_distances)
    rows, columns = _place(first_distances, found), _place(second_distances, found)
    losses = []
    with _kept(found) as origin:
        for s in rows:
            for t in columns:
                _move(found, _shifted(origin, (s, first), (t, second)))
                losses.append(check_loss(loss()).detach())
    return _stacked(losses, found).view(len(rows), len(columns))


def _stacked(losses: list[Tensor], params: list[Tensor]) -> Tensor:
    dtype = compute_dtype(*losses) if losses else compute_dtype(*params)
    if not losses:
        return torch.zeros(0, dtype=dtype, device=params[0].device)
    return torch.stack([loss.to(dtype) for loss in losses])


def convexity_gap(
    loss: Loss,
    params: Iterable[Tensor],
    start: Sequence[Tensor],
    end: Sequence[Tensor],
    shares: Float[Tensor, "points"],
) -> Float[Tensor, "points"]:
    r"""How far the loss lies below its chord between two points.

    .. math:: \lambda L(a) + (1 - \lambda) L(b) - L(\lambda a + (1 - \lambda) b)

    Textbook equation (4.6.1) says that it is never negative for a convex loss. One negative
    value, beyond rounding, proves that the loss is not convex; no number of others proves that it
    is.

    Args:
        loss: The loss at the current parameters. See `lmlosses.analysis.curvature`.
        params: The parameters; they are put back to the bit, after errors too.
        start: The point :math:`a`, a tensor for each parameter.
        end: The point :math:`b`.
        shares: The numbers :math:`\lambda`, between zero and one.

    Returns:
        One gap for each share, in the unit of the loss, in at least float32.

    Raises:
        TypeError: If a tensor or the loss is not floating point.
        ValueError: If the loss is no single number, ``params`` has no entries or repeats a
            tensor, a point does not fit it, or ``shares`` has not one axis or leaves [0, 1]; the
            last is only looked at on the processor.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.landscape import convexity_gap
        >>> w = torch.zeros(1)
        >>> ends = [torch.tensor([-1.0])], [torch.tensor([1.0])]
        >>> convexity_gap(lambda: w.square().sum(), [w], *ends, torch.tensor([0.5]))
        tensor([1.])
    """
    found = check_params(params)
    start = _copied("start", start, found)
    end = _copied("end", end, found)
    _check_line("shares", shares)
    if reads_values(shares) and not ((shares >= 0) & (shares <= 1)).all():
        # beyond the two points a convex loss lies above the line
        raise ValueError(f"shares must lie in [0, 1]; got {shares.tolist()}")
    shares = _place(shares, found)
    losses = []
    with _kept(found):
        for share in torch.cat([shares.new_tensor([1.0, 0.0]), shares]):
            zero = [torch.zeros_like(point) for point in start]
            _move(found, _shifted(zero, (share, start), (1 - share, end)))
            losses.append(check_loss(loss()).detach())
    heights = _stacked(losses, found)
    at_start, at_end, between = heights[0], heights[1], heights[2:]
    weight = shares.to(heights.dtype)
    return weight * at_start + (1 - weight) * at_end - between


def smoothness(
    loss: Loss,
    params: Iterable[Tensor],
    *,
    radius: float,
    samples: int = 10,
    tolerance: float = 1e-3,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    r"""Largest curvature met in a ball around the current parameters: a lower bound on :math:`L`.

    .. math:: \max_k \, \lVert \nabla^2 f(\theta_k) \rVert_2 \; \le \; L =
        \sup_{\lVert \theta' - \theta \rVert \le r} \lVert \nabla^2 f(\theta') \rVert_2

    :math:`L` is the Lipschitz constant of the gradient, the one that textbook equation (4.6.8)
    needs, where it prints the loss's own. Points are the center and draws from the uniform
    distribution in the ball: what lies between them is not seen, so that the true constant is at
    least this large. For a quadratic it is exact.

    Args:
        loss: The loss :math:`f` at the current parameters. See `lmlosses.analysis.curvature`.
        params: The center :math:`\theta`; it is put back to the bit, after errors too.
        radius: The radius :math:`r` of the ball, all parameters taken as one vector.
        samples: How many points, the center included.
        tolerance: Residual at which an eigenvalue is taken, relative to the largest.
        max_products: Products with the Hessian at each point, at most.
        generator: Source of the points and of random starts; the global one by default.

    Returns:
        The largest absolute eigenvalue that was found.

    Raises:
        TypeError: If a parameter or the loss is not floating point.
        ValueError: If the loss is no single number or has no graph; if ``params`` or a setting
            is out of range; if a Hessian is not finite.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.landscape import smoothness
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> round(smoothness(lambda: w[0] ** 2 - 2 * w[1] ** 2, [w], radius=1.0), 3)
        4.0

    References:
        Nesterov (2004), Introductory Lectures on Convex Optimization, section 1.2.2.
    """
    ends = _extremes(loss, params, radius, samples, (1, -1), tolerance, max_products, generator)
    return max(ends)


def strong_convexity(
    loss: Loss,
    params: Iterable[Tensor],
    *,
    radius: float,
    samples: int = 10,
    tolerance: float = 1e-3,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    r"""Least curvature met in a ball around the current parameters: an upper bound on :math:`\mu`.

    .. math:: \min_k \, \lambda_{\min}(\nabla^2 f(\theta_k)) \; \ge \; \mu =
        \inf_{\lVert \theta' - \theta \rVert \le r} \lambda_{\min}(\nabla^2 f(\theta'))

    :math:`\mu` is the constant of strong convexity in the ball; textbook equation (4.6.2) follows
    from it and is weaker. Points are the center and draws from the uniform distribution in the
    ball: the true constant is at most this large. A negative number says that the loss is not
    convex there.

    Args:
        loss: The loss :math:`f` at the current parameters. See `lmlosses.analysis.curvature`.
        params: The center :math:`\theta`; it is put back to the bit, after errors too.
        radius: The radius :math:`r` of the ball, all parameters taken as one vector.
        samples: How many points, the center included.
        tolerance: Residual at which an eigenvalue is taken, relative to the largest.
        max_products: Products with the Hessian at each point, at most.
        generator: Source of the points and of random starts; the global one by default.

    Returns:
        The smallest eigenvalue that was found.

    Raises:
        TypeError: If a parameter or the loss is not floating point.
        ValueError: If the loss is no single number or has no graph; if ``params`` or a setting
            is out of range; if a Hessian is not finite.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.landscape import strong_convexity
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> round(strong_convexity(lambda: w[0] ** 2 + 2 * w[1] ** 2, [w], radius=1.0), 3)
        2.0

    References:
        Nesterov (2004), Introductory Lectures on Convex Optimization, section 2.1.3.
    """
    ends = _extremes(loss, params, radius, samples, (-1,), tolerance, max_products, generator)
    return -max(ends)


def _extremes(
    loss: Loss,
    params: Iterable[Tensor],
    radius: float,
    samples: int,
    signs: tuple[int, ...],
    tolerance: float,
    max_products: int,
    generator: torch.Generator | None,
) -> list[float]:
    """At each point the largest eigenvalue of the Hessian times each sign."""
    found = check_variables(params)
    check_positive(radius=radius)
    check_whole(samples=samples)
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}")
    ends = []
    with _kept(found) as center:
        for sample in range(samples):
            if sample > 0:
                _move(found, _drawn_from_ball(center, radius, generator))
            product = hessian_product(loss, found)
            for sign in signs:
                top = top_eigenvalues(
                    lambda vectors, product=product, sign=sign: [  # type: ignore[misc]  # lambda
                        sign * image for image in product(vectors)
                    ],
                    found,
                    tolerance=tolerance,
                    max_products=max_products,
                    generator=generator,
                )
                ends.append(top.values[0].item())
    return ends


def _drawn_from_ball(
    center: list[Tensor], radius: float, generator: torch.Generator | None
) -> list[Tensor]:
    device = center[0].device if generator is None else generator.device
    dtype = compute_dtype(*center)
    steps = [
        torch.randn(start.shape, dtype=dtype, device=device, generator=generator)
        for start in center
    ]
    dim = sum(step.numel() for step in steps)
    share = torch.rand((), dtype=dtype, device=device, generator=generator) ** (1 / dim)
    length = torch.stack([torch.linalg.vector_norm(step) for step in steps]).norm()
    return [
        start + (radius * share / length * step).to(start)
        for start, step in zip(center, steps, strict=True)
    ]


def gradient_noise_scale(
    losses: Iterable[Callable[[], Tensor]], params: Iterable[Tensor], *, batch_size: int
) -> NoiseScale:
    r"""How many samples a batch needs before the gradient outweighs its own noise.

    From :math:`k` batches of :math:`b` samples each, with gradients :math:`g_i` and their mean
    :math:`\bar{g}`, which is the gradient of one batch of :math:`k b`,

    .. math:: S = \frac{\frac{1}{k} \sum_i \lVert g_i \rVert^2 - \lVert \bar{g} \rVert^2}
        {1 / b - 1 / (k b)} , \qquad
        \lVert G \rVert^2 = \frac{k \lVert \bar{g} \rVert^2
        - \frac{1}{k} \sum_i \lVert g_i \rVert^2}{k - 1} , \qquad
        B = \frac{S}{\lVert G \rVert^2}

    :math:`S` estimates the trace of the covariance of one sample's gradient and
    :math:`\lVert G \rVert^2` the squared length of the true gradient, both without bias; their
    ratio has one, and where :math:`\lVert G \rVert^2` comes out near zero or negative it says
    only that more batches are needed. To follow a run, average both parts over steps and divide
    last. Nothing is read from the device.

    Args:
        losses: For each batch the mean loss of its samples at the current parameters. Batches
            are independent draws; two at least.
        params: The parameters; all others are constants.
        batch_size: Samples in each batch, :math:`b`.

    Returns:
        :math:`B` in samples, :math:`S` and :math:`\lVert G \rVert^2`, in at least float32.

    Raises:
        TypeError: If a parameter or a loss is not floating point or ``batch_size`` not whole.
        ValueError: If a loss is no single number or has no graph; if ``params`` is empty,
            repeats a tensor or holds one that requires no gradient; if ``batch_size`` is below
            one or there are fewer than two batches.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.landscape import gradient_noise_scale
        >>> w = torch.zeros(1, requires_grad=True)
        >>> batches = [lambda: (3 * w).sum(), lambda: (5 * w).sum()]  # gradients 3 and 5
        >>> gradient_noise_scale(batches, [w], batch_size=1)
        NoiseScale(value=tensor(0.1333), noise=tensor(2.), signal=tensor(15.))

    References:
        McCandlish et al. (2018), An Empirical Model of Large-Batch Training, arXiv:1812.06162,
        appendix A.1.
    """
    variables = check_variables(params)
    check_whole(batch_size=batch_size)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    dtype = compute_dtype(*variables)
    mean = [torch.zeros_like(param, dtype=dtype) for param in variables]
    squares = []
    for count, loss in enumerate(losses, start=1):
        with torch.enable_grad():
            value = check_differentiable("loss", check_loss(loss()))
        gradient = torch.autograd.grad(value, variables, materialize_grads=True)
        squares.append(_square(gradient, dtype))
        for average, part in zip(mean, gradient, strict=True):
            average.add_((part.to(dtype) - average) / count)
    batches = len(squares)
    if batches < 2:
        raise ValueError(f"losses must hold at least two batches; got {batches}")

    small, big = torch.stack(squares).mean(), _square(mean, dtype)
    noise = (small - big) * batch_size * batches / (batches - 1)
    signal = (batches * big - small) / (batches - 1)
    return NoiseScale(noise / signal, noise, signal)


def _square(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([tensor.to(dtype).square().sum() for tensor in tensors]).sum()
