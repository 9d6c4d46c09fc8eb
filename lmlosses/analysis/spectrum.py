"""Eigenvalues of a matrix that is known by its products with vectors.

A product is a function from one list of tensors to another, both shaped like the parameters:
`lmlosses.analysis.curvature.hessian_product` or `gauss_newton_product`. Apart from the basis of
the Lanczos method, memory is a constant number of copies of the parameters.

`top_eigenvalues`, `spectral_density`, `condition_number` and `sharpness` read a few numbers from
the device at each product, since the eigenvalues of their small matrix are found on the processor.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lmlosses._checks import check_floating, check_positive, check_whole, compute_dtype
from lmlosses.analysis._lanczos import Ritz, gaussian, lanczos, signs
from lmlosses.analysis._vectors import (
    check_one_device,
    check_params,
    check_vectors,
    unflatten,
)
from lmlosses.analysis.curvature import Loss, Product, hessian_product


class Eigenpairs(NamedTuple):
    """Approximate eigenvalues, and how far each may be off."""

    values: Float[Tensor, "count"]
    """In descending order, float64, on the processor."""
    residuals: Float[Tensor, "count"]
    """Length of :math:`A v - \\lambda v`: that near to each value lies an eigenvalue."""
    vectors: list[list[Tensor]]
    """For each value its eigenvector of length one, a tensor for each parameter."""
    products: int
    """How many products it took."""
    converged: bool
    """Whether the residuals came below the tolerance."""


class Estimate(NamedTuple):
    """A mean over random probes and the standard error of that mean."""

    value: Float[Tensor, "*shape"]
    standard_error: Float[Tensor, "*shape"]


class SpectralDensity(NamedTuple):
    """For each probe a quadrature: eigenvalues, and the share of all eigenvalues near each."""

    nodes: Float[Tensor, "probes steps"]
    """Ascending, float64, on the processor."""
    weights: Float[Tensor, "probes steps"]
    """Not negative; they sum to one for each probe. Nodes that were not needed weigh zero."""


class ConditionNumber(NamedTuple):
    """The ratio of the largest to the smallest eigenvalue, and both of them."""

    value: float
    largest: float
    smallest: float


def _check_count(minimum: int = 1, **counts: int) -> None:
    check_whole(**counts)
    for name, count in counts.items():
        if count < minimum:
            raise ValueError(f"{name} must be at least {minimum}; got {count}")


def _check_space(params: Iterable[Tensor]) -> list[Tensor]:
    found = check_params(params)
    check_one_device(found)
    return found


def top_eigenvalues(
    product: Product,
    params: Iterable[Tensor],
    *,
    count: int = 1,
    tolerance: float = 1e-3,
    max_products: int = 100,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""The largest eigenvalues of a symmetric matrix, with the residual of each.

    .. math:: A v_i = \lambda_i v_i , \qquad \lambda_1 \ge \lambda_2 \ge \dots

    Lanczos: the eigenvalues of the matrix within the space of
    :math:`v, A v, A^2 v, \dots`, whose basis is kept orthogonal in full, so that no eigenvalue
    comes twice that is not double. It stops once every residual is below ``tolerance`` times
    the largest eigenvalue in absolute value, or after ``max_products``: look at the residuals.
    Values never exceed the true ones, up to rounding. For the smallest eigenvalues negate the
    product and the values.

    Args:
        product: The matrix times a vector. See `lmlosses.analysis.spectrum`.
        params: Tensors shaped like the vectors.
        count: How many eigenvalues; no more than there are entries.
        tolerance: Residual at which to stop, relative to the largest absolute eigenvalue.
        max_products: Products at most. The basis holds that many vectors and ``block_size`` more.
        block_size: Random vectors to start from. Eigenvalues are found up to that many times
            over; the default is ``count``. One needs the fewest products, and sees a multiple
            eigenvalue once.
        generator: Source of the random start; the global one by default.

    Returns:
        Values, residuals, vectors, the number of products, and whether they were enough.

    Raises:
        TypeError: If a parameter is not floating point or a count no whole number.
        ValueError: If a count or ``tolerance`` is out of range; if ``params`` has no entries; if
            the products are not finite, not symmetric or do not fit the parameters.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.spectrum import top_eigenvalues
        >>> diagonal = torch.tensor([1.0, 5.0, 3.0])
        >>> top_eigenvalues(lambda v: [diagonal * v[0]], [torch.zeros(3)], count=2).values
        tensor([5.0000, 3.0000], dtype=torch.float64)

    References:
        Golub and Van Loan (2013), Matrix Computations, 4th edition, sections 10.1 and 10.3;
        Ruhe (1979), Implementation Aspects of Band Lanczos Algorithms for Computation of
        Eigenvalues of Large Sparse Symmetric Matrices, Mathematics of Computation 33.
    """
    space = _check_space(params)
    dim = sum(param.numel() for param in space)
    block_size = count if block_size is None else block_size
    _check_count(count=count, block_size=block_size)
    _check_count(count, max_products=max_products)
    check_positive(tolerance=tolerance)
    if count > dim:
        raise ValueError(f"count must be at most {dim}, the number of entries; got {count}")

    def enough(ritz: Ritz) -> bool:
        scale = tolerance * ritz.values.abs().max()
        return len(ritz.values) >= count and bool((ritz.residuals[-count:] <= scale).all())

    basis, ritz = lanczos(
        product, space, block_size, limit=max_products, draw=gaussian,
        generator=generator, enough=enough,
    )  # fmt: skip
    mixtures = ritz.vectors[:, -count:].flip(-1).T.to(basis)
    vectors = mixtures @ basis
    return Eigenpairs(
        ritz.values[-count:].flip(0),
        ritz.residuals[-count:].flip(0),
        [unflatten(vector, space) for vector in vectors],
        len(basis),
        enough(ritz),
    )


def spectral_density(
    product: Product,
    params: Iterable[Tensor],
    *,
    probes: int = 8,
    steps: int = 50,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    r"""How the eigenvalues of a symmetric matrix are spread, by stochastic Lanczos quadrature.

    .. math:: \frac{1}{d} \mathrm{tr} f(A) = \mathbb{E}_v \, v^\top f(A) v
        \approx \frac{1}{k} \sum_{p=1}^k \sum_{j=1}^m w_{pj} \, f(\lambda_{pj})

    for random signs :math:`v`, scaled to length one. The quadrature of a probe is exact for
    polynomials up to degree :math:`2 m - 1`; what remains is chance, which `spectral_average`
    measures from probe to probe.

    Args:
        product: The matrix times a vector. See `lmlosses.analysis.spectrum`.
        params: Tensors shaped like the vectors.
        probes: The number :math:`k` of random vectors.
        steps: Products for each probe, :math:`m`, at most; the basis holds one vector more.
        generator: Source of the random signs; the global one by default.

    Returns:
        Nodes :math:`\lambda_{pj}` and weights :math:`w_{pj}`.

    Raises:
        TypeError: If a parameter is not floating point or a count no whole number.
        ValueError: If a count is below one; if ``params`` has no entries; if the products are
            not finite, not symmetric or do not fit the parameters.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.spectrum import spectral_density
        >>> diagonal = torch.tensor([1.0, 5.0, 3.0, 3.0])
        >>> density = spectral_density(
        ...     lambda v: [diagonal * v[0]], [torch.zeros(4)], probes=2, steps=3
        ... )
        >>> density.nodes[0], density.weights[0]
        (tensor([1.0000, 3.0000, 5.0000], dtype=torch.float64),
         tensor([0.2500, 0.5000, 0.2500], dtype=torch.float64))

    References:
        Ubaru, Chen and Saad (2017), Fast Estimation of tr(f(A)) via Stochastic Lanczos
        Quadrature, algorithm 1; Ghorbani, Krishnan and Xiao (2019), arXiv:1901.10159.
    """
    space = _check_space(params)
    _check_count(probes=probes, steps=steps)
    steps = min(steps, sum(param.numel() for param in space))
    nodes = torch.zeros(probes, steps, dtype=torch.float64)
    weights = torch.zeros(probes, steps, dtype=torch.float64)
    for probe in range(probes):
        _, ritz = lanczos(
            product, space, 1, limit=steps, draw=signs, generator=generator,
            enough=lambda ritz: bool((ritz.residuals == 0).all()),
        )  # fmt: skip
        found = len(ritz.values)
        nodes[probe, :found], nodes[probe, found:] = ritz.values, ritz.values[-1]
        weights[probe, :found] = ritz.vectors[0] ** 2
    return SpectralDensity(nodes, weights)


def spectral_average(density: SpectralDensity, function: Callable[[Tensor], Tensor]) -> Estimate:
    r"""Mean of a function over all eigenvalues, and its standard error over the probes.

    .. math:: \frac{1}{d} \sum_i f(\lambda_i)

    A bump of unit area in place of :math:`f` gives the smoothed density at its center. The error
    is that of chance; with few steps a function that is no polynomial has one of the quadrature
    besides, which more steps show.

    Args:
        density: What `spectral_density` found, with two probes or more.
        function: Elementwise in the nodes [probes, steps]; it may add axes in front.

    Returns:
        The mean and its standard error, of the shape of the axes in front.

    Raises:
        TypeError: If the function does not return floating-point numbers.
        ValueError: If there is only one probe, or the function lost the axes of the nodes.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.spectrum import spectral_average, spectral_density
        >>> diagonal = torch.tensor([1.0, 5.0, 3.0, 3.0])
        >>> density = spectral_density(lambda v: [diagonal * v[0]], [torch.zeros(4)], steps=3)
        >>> spectral_average(density, torch.square).value  # (1 + 25 + 9 + 9) / 4
        tensor(11.0000, dtype=torch.float64)
    """
    probes = len(density.nodes)
    _check_count(2, probes=probes)
    values = function(density.nodes)
    check_floating(function=values)
    if values.shape[-2:] != density.nodes.shape:
        raise ValueError(
            f"function must keep the last two axes {tuple(density.nodes.shape)} of the nodes; "
            f"got shape {tuple(values.shape)}"
        )
    return _mean((density.weights * values).sum(dim=-1))


def _mean(samples: Tensor) -> Estimate:
    return Estimate(samples.mean(dim=-1), samples.std(dim=-1) / math.sqrt(samples.shape[-1]))


def trace_estimate(
    product: Product,
    params: Iterable[Tensor],
    *,
    probes: int = 32,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Trace of a symmetric matrix, unbiased, with its standard error (Hutchinson).

    .. math:: \mathrm{tr} A = \mathbb{E}_v \, v^\top A v , \qquad
        \mathrm{Var}[v^\top A v] = 2 \sum_{i \ne j} A_{ij}^2

    for random signs :math:`v`. A diagonal matrix comes out exactly. With thirty probes or so the
    truth lies within two standard errors in about 95 of 100 cases. Nothing is read from the
    device.

    Args:
        product: The matrix times a vector. See `lmlosses.analysis.spectrum`.
        params: Tensors shaped like the vectors.
        probes: How many random vectors, at least two.
        generator: Source of the random signs; the global one by default.

    Returns:
        The estimate and its standard error, in at least float32.

    Raises:
        TypeError: If a parameter is not floating point or ``probes`` no whole number.
        ValueError: If ``probes`` is below two; if ``params`` has no entries; if the products do
            not fit the parameters.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.spectrum import trace_estimate
        >>> diagonal = torch.tensor([1.0, 5.0, 3.0])
        >>> trace_estimate(lambda v: [diagonal * v[0]], [torch.zeros(3)])
        Estimate(value=tensor(9.), standard_error=tensor(0.))

    References:
        Hutchinson (1990), A Stochastic Estimator of the Trace of the Influence Matrix.
    """
    space = _check_space(params)
    _check_count(2, probes=probes)
    dtype = compute_dtype(*space)
    samples = []
    for _ in range(probes):
        probe = [signs(param, generator) for param in space]
        images = check_vectors("product", product(probe), space)
        pairs = zip(probe, images, strict=True)
        parts = [(sign * image).sum(dtype=dtype) for sign, image in pairs]
        samples.append(torch.stack(parts).sum())
    return _mean(torch.stack(samples))


def condition_number(
    product: Product,
    params: Iterable[Tensor],
    *,
    tolerance: float = 1e-3,
    max_products: int = 200,
    generator: torch.Generator | None = None,
) -> ConditionNumber:
    r"""Largest over smallest eigenvalue of a positive semi-definite matrix.

    .. math:: \kappa = \frac{\lambda_{\max}}{\lambda_{\min}}

    One for a round bowl; gradient descent needs a number of steps in proportion to it, textbook
    equation (4.6.8). Infinite when the smallest eigenvalue is zero up to rounding. Eigenvalues
    found lie inside the spectrum, so that an eigenvalue missed makes the number too small, never
    too large.

    Args:
        product: The matrix times a vector. See `lmlosses.analysis.spectrum`.
        params: Tensors shaped like the vectors.
        tolerance: Residual at which to stop, relative to each of the two eigenvalues.
        max_products: Products at most; as many as there are entries always suffice.
        generator: Source of the random start; the global one by default.

    Returns:
        The ratio and both eigenvalues.

    Raises:
        TypeError: If a parameter is not floating point or a count no whole number.
        ValueError: If a setting is out of range; if ``params`` has no entries; if the products
            are not finite, not symmetric or do not fit; if the matrix has a negative
            eigenvalue; if ``max_products`` were not enough.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.spectrum import condition_number
        >>> diagonal = torch.tensor([1.0, 5.0, 3.0])
        >>> round(condition_number(lambda v: [diagonal * v[0]], [torch.zeros(3)]).value, 3)
        5.0
    """
    space = _check_space(params)
    _check_count(max_products=max_products)
    check_positive(tolerance=tolerance)
    dim = sum(param.numel() for param in space)
    rounding = dim * max(torch.finfo(param.dtype).eps for param in space)

    def enough(ritz: Ritz) -> bool:
        ends = [0, -1]
        noise = rounding * ritz.values.abs().max()
        wanted = (tolerance * ritz.values[ends].abs()).clamp(min=noise)
        return bool((ritz.residuals[ends] <= wanted).all() | (ritz.values[0] < -noise))

    _, ritz = lanczos(
        product, space, 1, limit=max_products, draw=gaussian, generator=generator, enough=enough
    )
    smallest, largest = ritz.values[0].item(), ritz.values[-1].item()
    if smallest < -rounding * ritz.values.abs().max():
        raise ValueError(
            f"product must be that of a positive semi-definite matrix; got the eigenvalue "
            f"{smallest:.3g}"
        )
    if not enough(ritz):
        raise ValueError(_not_enough(max_products, ritz.residuals[[0, -1]].max().item()))
    singular = smallest <= rounding * largest
    return ConditionNumber(math.inf if singular else largest / smallest, largest, smallest)


def _not_enough(max_products: int, residual: float) -> str:
    return (
        f"max_products must be larger, or tolerance: after {max_products} products "
        f"the residual is still {residual:.3g}"
    )


def sharpness(
    loss: Loss,
    params: Iterable[Tensor],
    *,
    tolerance: float = 1e-3,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    r"""Largest eigenvalue of the loss's Hessian at the current parameters.

    .. math:: \lambda_{\max}(\nabla_\theta^2 L)

    Gradient descent at a rate above :math:`2 / \lambda_{\max}` moves away from such a minimum.
    The number changes with the scale of the parameters; it compares points of one model, not
    models.

    Args:
        loss: The loss at the current parameters. See `lmlosses.analysis.curvature`.
        params: The parameters :math:`\theta`; all others are constants.
        tolerance: Residual at which to stop, relative to the largest absolute eigenvalue.
        max_products: Products with the Hessian at most.
        generator: Source of the random start; the global one by default.

    Returns:
        The eigenvalue; one lies within ``tolerance`` times the largest absolute one.

    Raises:
        TypeError: If a parameter or the loss is not floating point.
        ValueError: If the loss is no single number or has no graph; if ``params`` or a setting
            is out of range; if the Hessian is not finite; if ``max_products`` were not enough.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.spectrum import sharpness
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> round(sharpness(lambda: (w * w).sum() + w[0] ** 2, [w]), 3)
        4.0

    References:
        Cohen et al. (2021), Gradient Descent on Neural Networks Typically Occurs at the Edge of
        Stability, arXiv:2103.00065, section 2.
    """
    variables = list(params) if not isinstance(params, Tensor) else params
    product = hessian_product(loss, variables)
    top = top_eigenvalues(
        product, variables, tolerance=tolerance, max_products=max_products, generator=generator
    )
    if not top.converged:
        raise ValueError(_not_enough(max_products, top.residuals[0].item()))
    return top.values[0].item()
