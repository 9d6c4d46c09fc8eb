"""Distances and steps that follow the distributions, not the coordinates that describe them.

A model is a callable here: it takes one vector of parameters and returns the logits (or the
predicted means) of a fixed set of samples. ``torch.func.functional_call`` makes one out of a
module. It runs in the dtype of the parameters and must allow forward-mode differentiation; give
float64 where digits count.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_indices,
    check_leading_shape,
    check_ndim,
    check_non_negative,
    check_not_empty_axis,
    check_positive,
    check_probabilities,
    check_same_shape,
    check_shape,
    compute_dtype,
    reads_values,
)

Classifier = Callable[[Tensor], Tensor]
"""A classifier on fixed samples: parameters [dim] to logits [samples, classes]."""

Regressor = Callable[[Tensor], Tensor]
"""A regression on fixed samples: parameters [dim] to predicted means [samples]."""


def _log_probabilities(model: Classifier, params: Tensor) -> Tensor:
    logits = model(params)
    check_floating(logits=logits)
    check_ndim("logits", logits, 2)
    check_not_empty_axis("logits", logits)
    return logits.to(compute_dtype(logits)).log_softmax(dim=-1)


def _scores(model: Classifier, params: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of every log-probability [samples, classes, dim], and the log-probabilities."""
    check_floating(params=params)
    check_ndim("params", params, 1)

    def logps_twice(point: Tensor) -> tuple[Tensor, Tensor]:
        logps = _log_probabilities(model, point)
        return logps, logps

    # forward mode: one pass per parameter, where reverse mode needs one per sample and class
    scores, logps = torch.func.jacfwd(logps_twice, has_aux=True)(params)
    return scores.to(logps.dtype), logps


def _target_logps(logps: Tensor, targets: Tensor) -> Tensor:
    check_leading_shape("targets", targets, of="logits", reference=logps)
    check_indices("targets", targets, logps.shape[-1], of="the number of classes")
    return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def fisher_information(
    model: Classifier, params: Float[Tensor, "dim"]
) -> Float[Tensor, "dim dim"]:
    r"""Fisher information of a classifier: mean over samples, expected under the model itself.

    .. math:: I(\theta) = \frac{1}{N} \sum_n \sum_c p_{nc} \,
        \nabla_\theta \log p_{nc} \, (\nabla_\theta \log p_{nc})^\top
        = \frac{1}{N} \sum_n J_n^\top \left( \mathrm{diag}(p_n) - p_n p_n^\top \right) J_n

    with :math:`J_n` the Jacobian of the logits. The sum over classes is exact, nothing is
    drawn, and no label is used: the expectation is over the classes that the model predicts.

    Textbook equation (4.3.20), and (4.3.28), corrected. The printed
    :math:`\mathbb{E}[(\hat{p} - p)(\hat{p} - p)^\top]` has the shape of the classes: it is the
    metric in the logits, and only if the labels :math:`p` are drawn from :math:`\hat{p}`. In
    the parameters it is :math:`\mathbb{E}[J^\top (\hat{p} - p)(\hat{p} - p)^\top J]`.

    Args:
        model: Parameters to logits of the samples. See `lmlosses.analysis.geometry`.
        params: The point :math:`\theta`, flattened.

    Returns:
        A symmetric positive semi-definite matrix, in at least float32; zero without samples.

    Raises:
        TypeError: If ``params`` or the logits are not floating point.
        ValueError: If ``params`` is not a vector, or the logits not a matrix with a class.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.geometry import fisher_information
        >>> coin = lambda logit: torch.stack([logit, torch.zeros(1)], dim=-1)
        >>> fisher_information(coin, torch.zeros(1))  # p (1 - p) at p = 1/2
        tensor([[0.2500]])

    References:
        Martens (2020), New Insights and Perspectives on the Natural Gradient Method,
        arXiv:1412.1193.
    """
    scores, logps = _scores(model, params)
    samples = max(logps.shape[0], 1)
    return torch.einsum("nc,nci,ncj->ij", logps.exp(), scores, scores) / samples


def observed_information(
    model: Classifier, params: Float[Tensor, "dim"], targets: Int[Tensor, "samples"]
) -> Float[Tensor, "dim dim"]:
    r"""Hessian of the mean negative log-likelihood at the labels that were seen.

    .. math:: H(\theta) = -\frac{1}{N} \sum_n \nabla_\theta^2 \log p_{n y_n}

    It equals the Fisher information where the logits are linear in the parameters, and on
    average over labels drawn from the model; elsewhere it differs and may have negative
    eigenvalues. Textbook equation (4.3.21), which claims equality without a condition.

    Args:
        model: Parameters to logits of the samples. See `lmlosses.analysis.geometry`.
        params: The point :math:`\theta`, flattened.
        targets: Index of the class that was seen.

    Returns:
        A symmetric matrix, in at least float32; zero without samples.

    Raises:
        TypeError: If ``params`` or the logits are not floating point, or ``targets`` not
            integer.
        ValueError: If ``params`` is not a vector, the logits not a matrix with a class, or
            ``targets`` does not fit them.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.geometry import observed_information
        >>> coin = lambda logit: torch.stack([logit, torch.zeros(1)], dim=-1)
        >>> observed_information(coin, torch.zeros(1), torch.tensor([1]))
        tensor([[0.2500]])
    """
    check_floating(params=params)
    check_ndim("params", params, 1)

    def mean_nll(point: Tensor) -> Tensor:
        logps = _log_probabilities(model, point)
        return -_target_logps(logps, targets).sum() / max(logps.shape[0], 1)

    hessian: Tensor = torch.func.hessian(mean_nll)(params)
    return hessian.to(compute_dtype(hessian))


def empirical_fisher(
    model: Classifier, params: Float[Tensor, "dim"], targets: Int[Tensor, "samples"]
) -> Float[Tensor, "dim dim"]:
    r"""Mean outer product of the samples' own gradients, at the labels that were seen.

    .. math:: \hat{F}(\theta) = \frac{1}{N} \sum_n
        \nabla_\theta \log p_{n y_n} \, (\nabla_\theta \log p_{n y_n})^\top

    In textbook equation (4.3.28) this is what comes of taking the expectation over the data's
    own labels. It is the Fisher information only on average over labels drawn from the model; a
    model that fits every label has an empirical Fisher near zero, whatever the labels.

    Args:
        model: Parameters to logits of the samples. See `lmlosses.analysis.geometry`.
        params: The point :math:`\theta`, flattened.
        targets: Index of the class that was seen.

    Returns:
        A symmetric positive semi-definite matrix, in at least float32; zero without samples.

    Raises:
        TypeError: If ``params`` or the logits are not floating point, or ``targets`` not
            integer.
        ValueError: If ``params`` is not a vector, the logits not a matrix with a class, or
            ``targets`` does not fit them.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.geometry import empirical_fisher
        >>> biased = lambda logit: torch.stack([logit, torch.zeros(1)], dim=-1)
        >>> params = torch.tensor([0.75]).logit()
        >>> empirical_fisher(biased, params, torch.tensor([0]))  # (1 - p)^2, Fisher: p (1 - p)
        tensor([[0.0625]])

    References:
        Kunstner, Balles and Hennig (2019), Limitations of the Empirical Fisher Approximation,
        arXiv:1905.12558.
    """
    scores, logps = _scores(model, params)
    _target_logps(logps, targets)
    chosen = scores.take_along_dim(targets[:, None, None], dim=1).squeeze(1)
    return chosen.T @ chosen / max(logps.shape[0], 1)


def gaussian_fisher_information(
    model: Regressor, params: Float[Tensor, "dim"], *, variance: float = 1.0
) -> Float[Tensor, "dim dim"]:
    r"""Fisher information of a regression whose noise is Gaussian with a known variance.

    .. math:: I(\theta) = \frac{1}{N \sigma^2} \sum_n
        \nabla_\theta \hat{y}_n \, (\nabla_\theta \hat{y}_n)^\top
        = \frac{J^\top J}{N \sigma^2}

    For a linear model this is :math:`X^\top X / (N \sigma^2)`, the Hessian of half the mean
    squared error divided by the variance: squared error has its Fisher information too.

    Args:
        model: Parameters to predicted means. See `lmlosses.analysis.geometry`.
        params: The point :math:`\theta`, flattened.
        variance: The noise's variance :math:`\sigma^2`, in the squared unit of the targets.

    Returns:
        A symmetric positive semi-definite matrix, in at least float32; zero without samples.

    Raises:
        TypeError: If ``params`` or the predictions are not floating point, or ``variance`` not
            a number.
        ValueError: If ``params`` or the predictions are not vectors or ``variance`` is not
            positive.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.geometry import gaussian_fisher_information
        >>> inputs = torch.tensor([1.0, 2.0])
        >>> gaussian_fisher_information(lambda w: inputs * w, torch.zeros(1), variance=0.5)
        tensor([[5.]])
    """
    check_floating(params=params)
    check_ndim("params", params, 1)
    check_positive(variance=variance)

    def predictions(point: Tensor) -> Tensor:
        means = model(point)
        check_floating(predictions=means)
        check_ndim("predictions", means, 1)
        return means.to(compute_dtype(means))

    jacobian: Tensor = torch.func.jacfwd(predictions)(params)
    jacobian = jacobian.to(compute_dtype(jacobian))
    return jacobian.T @ jacobian / (max(jacobian.shape[0], 1) * variance)


def natural_gradient_step(
    params: Float[Tensor, "dim"],
    gradient: Float[Tensor, "dim"],
    fisher: Float[Tensor, "dim dim"],
    *,
    lr: float,
    damping: float = 0.0,
) -> Float[Tensor, "dim"]:
    r"""One step downhill as the metric measures distance.

    .. math:: \theta' = \theta - \eta \, (I(\theta) + \lambda \, \mathbb{1})^{-1} \nabla L

    Textbook equation (4.3.27), with damping :math:`\lambda`. Without damping the step is, to
    first order, the same however the parameters are chosen; much damping turns it into a
    gradient step of rate :math:`\eta / \lambda`.

    Args:
        params: The point :math:`\theta`, flattened.
        gradient: The gradient of the loss there.
        fisher: The metric: symmetric, positive semi-definite. Only this much is asked of it.
        lr: The rate :math:`\eta`.
        damping: The number :math:`\lambda` added to the diagonal. A softmax over all classes
            has directions that change no probability; there the Fisher information is zero and
            damping is needed.

    Returns:
        The next point, in at least float32.

    Raises:
        TypeError: If a tensor is not floating point, or ``lr`` or ``damping`` not a number.
        ValueError: If the shapes do not fit, ``lr`` or ``damping`` is negative, or the damped
            matrix is singular or indefinite. That last check reads values, so it is made on the
            CPU; elsewhere such a matrix gives whatever the solver returns.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.geometry import natural_gradient_step
        >>> stretched = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> natural_gradient_step(torch.zeros(2), torch.tensor([4.0, 1.0]), stretched, lr=0.5)
        tensor([-0.5000, -0.5000])

    References:
        Amari (1998), Natural Gradient Works Efficiently in Learning, theorem 1.
    """
    check_floating(params=params, gradient=gradient, fisher=fisher)
    check_ndim("params", params, 1)
    check_same_shape("gradient", gradient, of="params", reference=params)
    dim = len(params)
    check_shape("fisher", fisher, (dim, dim), meaning="two axes of the length of params")
    check_non_negative(lr=lr, damping=damping)

    dtype = compute_dtype(params, gradient, fisher)
    metric = fisher.to(dtype) + damping * torch.eye(dim, dtype=dtype, device=fisher.device)
    _check_positive_definite(metric, damping)
    direction: Tensor = torch.linalg.solve_ex(metric, gradient.to(dtype)).result
    return params.to(dtype) - lr * direction


def _check_positive_definite(metric: Tensor, damping: float) -> None:
    if not reads_values(metric) or metric.numel() == 0:
        return
    eigenvalues = torch.linalg.eigvalsh(metric.detach())
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    # below this, rounding decides the sign of an eigenvalue that should be zero
    if not smallest > len(metric) * torch.finfo(metric.dtype).eps * largest:
        raise ValueError(
            f"fisher must be positive definite once damping is added; with damping={damping!r} "
            f"its eigenvalues run from {smallest:.3g} to {largest:.3g}: raise damping"
        )


def sphere_gradient_step(
    point: Float[Tensor, "*batch dim"], gradient: Float[Tensor, "*batch dim"], *, lr: float
) -> Float[Tensor, "*batch dim"]:
    r"""One gradient step along the unit sphere: walk the great circle that starts downhill.

    .. math:: v = -\eta \left( g - \langle x, g \rangle x \right) , \qquad
        x' = \cos(\lVert v \rVert) \, x + \sin(\lVert v \rVert) \, \frac{v}{\lVert v \rVert}

    The first formula leaves of the gradient what is tangent to the sphere, the second is the
    sphere's exponential map: :math:`\lVert v \rVert` is the angle walked, in radians.

    Args:
        point: Unit vectors :math:`x` along the last axis.
        gradient: The gradient in the surrounding space.
        lr: The rate :math:`\eta`.

    Returns:
        Unit vectors, in at least float32.

    Raises:
        TypeError: If a tensor is not floating point or ``lr`` not a number.
        ValueError: If the shapes differ, ``lr`` is negative or a point is off the sphere.

    Example:
        >>> import math, torch
        >>> from lmlosses.analysis.geometry import sphere_gradient_step
        >>> east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> sphere_gradient_step(east, -north, lr=math.pi / 6)  # thirty degrees to the north
        tensor([0.8660, 0.5000])

    References:
        Absil, Mahony and Sepulchre (2008), Optimization Algorithms on Matrix Manifolds,
        sections 3.6 and 5.4.
    """
    check_floating(point=point, gradient=gradient)
    check_not_empty_axis("point", point)
    check_same_shape("gradient", gradient, of="point", reference=point)
    check_non_negative(lr=lr)
    _check_unit_norm(point)

    dtype = compute_dtype(point, gradient)
    point, gradient = point.to(dtype), gradient.to(dtype)
    tangent = gradient - (point * gradient).sum(dim=-1, keepdim=True) * point
    angle: Tensor = lr * torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
    # sinc(a / pi) = sin(a) / a, and 1 at a = 0
    moved = angle.cos() * point - torch.sinc(angle / torch.pi) * lr * tangent
    # the map keeps the length, rounding does not, and its errors would grow from step to step
    length: Tensor = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    return moved / length


def _check_unit_norm(point: Tensor) -> None:
    if not reads_values(point) or point.numel() == 0:
        return
    norms = point.detach().to(compute_dtype(point)).norm(dim=-1).flatten()
    worst = norms[(norms - 1).abs().argmax()].item()
    if not abs(worst - 1) <= 8 * torch.finfo(point.dtype).eps:
        raise ValueError(f"point must lie on the unit sphere; got a vector of norm {worst:.6g}")


def _log_or_minus_inf(probabilities: Tensor) -> Tensor:
    """Logarithms; -inf at zero, with a gradient of zero there rather than NaN."""
    positive = probabilities > 0
    return probabilities.where(positive, 1.0).log().where(positive, -torch.inf)


def simplex_gradient_step(
    probabilities: Float[Tensor, "*batch classes"],
    gradient: Float[Tensor, "*batch classes"],
    *,
    lr: float,
) -> Float[Tensor, "*batch classes"]:
    r"""One gradient step among probability vectors, in the geometry of the Fisher metric.

    .. math:: \mathrm{grad}\, L = p \odot \left( g - \langle p, g \rangle \right) , \qquad
        p'_i = \frac{p_i \, e^{-\eta g_i}}{\sum_j p_j \, e^{-\eta g_j}}

    The first formula is the gradient as the Fisher-Rao metric sees it. The second follows it
    back onto the simplex: to first order in :math:`\eta` it moves along
    :math:`-\mathrm{grad}\, L`, and it is mirror descent with the entropy (exponentiated
    gradient), not the metric's geodesic. It never leaves the simplex, and a probability of zero
    stays zero. In logits it is a plain step, :math:`z' = z - \eta g`.

    Args:
        probabilities: The point :math:`p`.
        gradient: The gradient :math:`g` in the probabilities themselves; adding a constant to
            it changes nothing.
        lr: The rate :math:`\eta`.

    Returns:
        Probabilities, in at least float32.

    Raises:
        TypeError: If a tensor is not floating point or ``lr`` not a number.
        ValueError: If the shapes differ, there are no classes, ``lr`` is negative or the
            probabilities do not sum to one.

    Example:
        >>> import math, torch
        >>> from lmlosses.analysis.geometry import simplex_gradient_step
        >>> gradient = torch.tensor([0.0, math.log(3.0)])  # a unit step triples the odds
        >>> simplex_gradient_step(torch.tensor([0.5, 0.5]), gradient, lr=1.0)
        tensor([0.7500, 0.2500])

    References:
        Kivinen and Warmuth (1997), Exponentiated Gradient versus Gradient Descent; Beck and
        Teboulle (2003), Mirror descent and nonlinear projected subgradient methods, section 5.
    """
    check_floating(probabilities=probabilities, gradient=gradient)
    check_not_empty_axis("probabilities", probabilities)
    check_same_shape("gradient", gradient, of="probabilities", reference=probabilities)
    check_probabilities("probabilities", probabilities)
    check_non_negative(lr=lr)

    dtype = compute_dtype(probabilities, gradient)
    logps = _log_or_minus_inf(probabilities.to(dtype))
    # what stands at a probability of zero does not matter, even if it is infinite
    downhill = -lr * gradient.to(dtype).masked_fill(probabilities == 0, 0.0)
    return (logps + downhill).softmax(dim=-1)


def _root_or_zero(probabilities: Tensor) -> Tensor:
    """Square roots, with a gradient of zero at zero rather than infinity."""
    positive = probabilities > 0
    return probabilities.where(positive, 1.0).sqrt().where(positive, 0.0)


def fisher_rao_distance(
    p: Float[Tensor, "*batch classes"], q: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    r"""Length of the shortest path between two distributions, measured by the Fisher metric.

    .. math:: d(p, q) = 2 \arccos \sum_i \sqrt{p_i q_i}
        = 4 \arcsin \tfrac{1}{2} \lVert \sqrt{p} - \sqrt{q} \rVert

    Square roots of probabilities lie on the unit sphere, and the metric is the sphere's with
    radius two. Unlike the Kullback-Leibler divergence it is symmetric, obeys the triangle
    inequality and is never more than :math:`\pi`, reached where nothing overlaps. Close by, half
    its square is the divergence: textbook equation (4.3.22). Computed in the second form, which
    keeps its digits there.

    Args:
        p: Probabilities along the last axis.
        q: Probabilities along the last axis.

    Returns:
        One distance per pair, between 0 and :math:`\pi`, in at least float32. Its gradient is
        taken as zero in probabilities that are zero, where it has none, and at :math:`p = q`.

    Raises:
        TypeError: If an argument is not floating point.
        ValueError: If the shapes differ, there are no classes or an argument does not sum to
            one.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.geometry import fisher_rao_distance
        >>> fisher_rao_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(3.1416)

    References:
        Miyamoto et al. (2024), On Closed-Form Expressions for the Fisher-Rao Distance,
        arXiv:2304.14885, on categorical distributions.
    """
    check_floating(p=p, q=q)
    check_not_empty_axis("p", p)
    check_same_shape("q", q, of="p", reference=p)
    check_probabilities("p", p)
    check_probabilities("q", q)
    dtype = compute_dtype(p, q)
    difference = _root_or_zero(p.to(dtype)) - _root_or_zero(q.to(dtype))
    return 4 * torch.asin(0.5 * torch.linalg.vector_norm(difference, dim=-1))
