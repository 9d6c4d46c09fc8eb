r"""How descent moves, and how fast at least: gradient flow, exact solutions, rates.

The rates need constants of the loss. It is :math:`L`-smooth if its gradient changes by at most
:math:`L` times the distance (no eigenvalue of the Hessian is outside :math:`[-L, L]`), and
:math:`\mu`-strongly convex if no eigenvalue is below :math:`\mu > 0`. A rate is a promise about
the worst loss with these constants, under the step size it names.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmlosses._checks import (
    check_finite,
    check_floating,
    check_integer,
    check_ndim,
    check_non_negative,
    check_not_empty_axis,
    check_positive,
    check_shape,
    check_whole,
    compute_dtype,
    reads_values,
)


class Flow(NamedTuple):
    """A path of gradient flow."""

    times: Tensor
    points: Tensor
    """Entry ``i`` is the point at time ``times[i]``."""


def gradient_flow(
    loss: Callable[[Float[Tensor, "*shape"]], Float[Tensor, ""]],
    start: Float[Tensor, "*shape"],
    times: Float[Tensor, "times"],
    *,
    tolerance: float = 1e-8,
    method: str = "RK45",
) -> Flow:
    r"""The path of gradient descent with steps of no length, by SciPy's solvers.

    .. math:: \frac{dw}{dt} = -\nabla L(w)

    Textbook equation (4.6.6). Gradient descent with rate :math:`\eta` is Euler's method on it:
    step :math:`k` is near time :math:`k \eta` as :math:`\eta` goes to zero. The solver chooses
    its own steps and keeps its state in float64 on the processor; it waits for the device of
    ``start`` at every gradient.

    Args:
        loss: A differentiable function of the point that returns one number.
        start: The point at time zero.
        times: When to look, from zero on and increasing.
        tolerance: Error allowed in each solver step, absolute and relative to each coordinate.
            In float32, gradients carry errors of 1e-7 themselves.
        method: A method of `scipy.integrate.solve_ivp`. Where curvatures differ by a factor of
            thousands, ``"Radau"`` and ``"LSODA"`` take far fewer steps.

    Returns:
        The times and the points, in the dtype of ``start``. They carry no gradient.

    Raises:
        ImportError: If SciPy is missing.
        RuntimeError: If the solver gives up, as when the path runs away in finite time.
        TypeError: If ``start``, ``times`` or the loss is not floating point.
        ValueError: If the times are empty, negative or do not increase, ``tolerance`` is not
            positive or the loss is not one number.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.dynamics import gradient_flow
        >>> bowl = lambda w: 0.5 * w.square().sum()
        >>> gradient_flow(bowl, torch.tensor([1.0]), torch.tensor([0.0, 1.0])).points
        tensor([[1.0000],
                [0.3679]])

    References:
        Textbook equation (4.6.6). Dormand and Prince (1980), A family of embedded Runge-Kutta
        formulae, for the default method.
    """
    check_floating(start=start, times=times)
    check_ndim("times", times, 1)
    check_not_empty_axis("times", times)
    check_finite(start=start, times=times)
    check_positive(tolerance=tolerance)
    when = times.detach().double().tolist()
    if when[0] < 0:
        raise ValueError(f"times must not be negative; got {when[0]}")
    if any(later <= sooner for sooner, later in pairwise(when)):
        raise ValueError(f"times must increase; got {when}")
    try:
        from scipy.integrate import solve_ivp  # type: ignore[import-untyped]  # SciPy has no types
    except ImportError as error:
        raise ImportError("gradient_flow needs SciPy: pip install 'lmlosses[analysis]'") from error

    def velocity(_time: float, state: object) -> object:
        flat = torch.as_tensor(state, dtype=start.dtype, device=start.device)
        return -_gradient(loss, flat.reshape(start.shape)).double().cpu().numpy().reshape(-1)

    first = start.detach().double().cpu().numpy().reshape(-1)
    found = solve_ivp(
        velocity,
        (0.0, max(when[-1], torch.finfo(torch.float64).tiny)),
        first,
        t_eval=when,
        method=method,
        rtol=tolerance,
        atol=tolerance,
    )
    if not found.success:
        raise RuntimeError(f"gradient flow stopped before time {when[-1]}: {found.message}")
    points = torch.as_tensor(found.y.T.copy(), dtype=start.dtype, device=start.device)
    return Flow(times, points.reshape(len(when), *start.shape))


def _gradient(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = point.detach().clone().requires_grad_()
        value = loss(leaf)
        check_floating(loss=value)
        if value.numel() != 1:
            raise ValueError(f"loss must return one number; got shape {tuple(value.shape)}")
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient


def gradient_descent_on_quadratic(
    hessian: Float[Tensor, "dim dim"],
    start: Float[Tensor, "dim"],
    steps: Int[Tensor, "*steps"],
    *,
    lr: float,
    linear: Float[Tensor, "dim"] | None = None,
) -> Float[Tensor, "*steps dim"]:
    r"""Where gradient descent on a quadratic is after any number of steps, without taking them.

    .. math::
        f(w) = \tfrac{1}{2} w^\top H w - b^\top w , \qquad
        w_k = \sum_i \left( r_i^k \langle u_i, w_0 \rangle
            + \eta \frac{1 - r_i^k}{1 - r_i} \langle u_i, b \rangle \right) u_i , \qquad
        r_i = 1 - \eta \lambda_i

    with :math:`\lambda_i` and :math:`u_i` the eigenvalues and eigenvectors of :math:`H`. Where
    :math:`\lambda_i = 0` the fraction is :math:`k`. A direction shrinks if
    :math:`0 < \eta \lambda_i < 2`, alternates in sign from :math:`\eta \lambda_i > 1` on, and
    grows beyond 2 and for negative :math:`\lambda_i`. Computed in float64; the decomposition waits
    for a device.

    Args:
        hessian: The symmetric matrix :math:`H`, of any signature.
        start: The point :math:`w_0`.
        steps: Numbers of steps :math:`k`, in any order.
        lr: The rate :math:`\eta`.
        linear: The vector :math:`b`; zero if left out, and then a minimum is at zero.

    Returns:
        One point for each number of steps, in at least float32.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype or ``lr`` is not a number.
        ValueError: If shapes disagree, ``hessian`` is not symmetric or finite, or ``lr`` or a
            number of steps is negative.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.dynamics import gradient_descent_on_quadratic
        >>> hessian = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> steps = torch.tensor([0, 1, 2, 1000])
        >>> gradient_descent_on_quadratic(hessian, torch.tensor([8.0, 8.0]), steps, lr=0.5)
        tensor([[ 8.,  8.],
                [ 4., -4.],
                [ 2.,  2.],
                [ 0.,  0.]])

    References:
        Goh (2017), Why Momentum Really Works, section "First Steps: Gradient Descent". Textbook
        equations (4.6.4) and (4.6.7).
    """
    check_floating(hessian=hessian, start=start)
    check_integer(steps=steps)
    check_ndim("start", start, 1)
    check_not_empty_axis("start", start)
    dim = len(start)
    check_shape("hessian", hessian, (dim, dim), meaning="one row and column per entry of start")
    check_finite(hessian=hessian)
    if linear is None:
        linear = torch.zeros_like(start)
    check_floating(linear=linear)
    check_shape("linear", linear, (dim,), meaning="the shape of start")
    check_non_negative(lr=lr)
    if reads_values(hessian) and not torch.allclose(hessian, hessian.T, rtol=1e-5, atol=0):
        worst = (hessian - hessian.T).abs().max().item()
        raise ValueError(f"hessian must be symmetric; got entries that differ by {worst:.3g}")
    if reads_values(steps) and steps.numel() > 0 and steps.min() < 0:
        raise ValueError(f"steps must not be negative; got {steps.min().item()}")

    eigenvalues, directions = torch.linalg.eigh(hessian.double())
    shrinking = lr * eigenvalues
    powers = torch.pow(1 - shrinking, steps.unsqueeze(-1))
    # 1 - r^k loses its digits where r is near 1, and needs another form there
    slow = shrinking.abs() < 0.5
    exponent = steps.unsqueeze(-1) * torch.log1p(-shrinking.where(slow, 0.0))
    gone = torch.where(slow, -torch.expm1(exponent), 1 - powers)
    flat = eigenvalues == 0
    sums = torch.where(flat, lr * steps.unsqueeze(-1), gone / eigenvalues.where(~flat, 1.0))
    along = powers * (start.double() @ directions) + sums * (linear.double() @ directions)
    points: Tensor = along @ directions.T
    return points.to(compute_dtype(hessian, start, linear))


# ---- rates


def _check_constants(smoothness: float, strong_convexity: float) -> None:
    check_positive(smoothness=smoothness, strong_convexity=strong_convexity)
    if strong_convexity > smoothness:
        raise ValueError(
            f"strong_convexity must be at most smoothness, {smoothness!r}; "
            f"got {strong_convexity!r}"
        )


def _check_descends(lr: float, largest: float, *, meaning: str) -> None:
    check_non_negative(lr=lr)
    # 2 / L and the like are rounded
    if lr > largest * (1 + 1e-12):
        raise ValueError(f"lr must be at most {largest:.6g}, {meaning}; got {lr!r}")


def best_lr(*, smoothness: float, strong_convexity: float) -> float:
    r"""The fixed rate whose worst contraction is the strongest.

    .. math:: \eta = \frac{2}{\mu + L}

    With it `distance_rate` is :math:`(\kappa - 1) / (\kappa + 1)`, where
    :math:`\kappa = L / \mu` is the condition number. At :math:`1 / L` it is
    :math:`1 - 1 / \kappa`.

    Args:
        smoothness: The constant :math:`L`, the largest curvature.
        strong_convexity: The constant :math:`\mu`, the smallest.

    Returns:
        The rate.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is not positive, or :math:`\mu > L`.

    Example:
        >>> from lmlosses.analysis.dynamics import best_lr
        >>> best_lr(smoothness=3.0, strong_convexity=1.0)
        0.5

    References:
        Nesterov (2018), Lectures on Convex Optimization, theorem 2.1.15.
    """
    _check_constants(smoothness, strong_convexity)
    return 2 / (strong_convexity + smoothness)


def distance_rate(*, lr: float, smoothness: float, strong_convexity: float) -> float:
    r"""What a step of gradient descent multiplies the distance to the minimum by, at most.

    .. math:: \lVert w_{k+1} - w^* \rVert \le \rho \, \lVert w_k - w^* \rVert , \qquad
        \rho = \max(|1 - \eta \mu|, |1 - \eta L|)

    For smooth and strongly convex losses and any :math:`\eta`; below one exactly if
    :math:`0 < \eta < 2 / L`. It is attained: a quadratic moves by just this factor, in every
    step, along the eigenvector of :math:`\mu` or that of :math:`L`.

    Args:
        lr: The rate :math:`\eta`.
        smoothness: The constant :math:`L`.
        strong_convexity: The constant :math:`\mu`.

    Returns:
        The factor :math:`\rho`. Its :math:`k`-th power bounds :math:`k` steps.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``lr`` is negative, a constant not positive, or :math:`\mu > L`.

    Example:
        >>> from lmlosses.analysis.dynamics import distance_rate
        >>> distance_rate(lr=0.5, smoothness=3.0, strong_convexity=1.0)  # kappa is 3
        0.5

    References:
        Polyak (1987), Introduction to Optimization, section 1.4, theorem 3.
    """
    _check_constants(smoothness, strong_convexity)
    check_non_negative(lr=lr)
    return max(abs(1 - lr * strong_convexity), abs(1 - lr * smoothness))


def gap_rate(*, lr: float, smoothness: float, strong_convexity: float) -> float:
    r"""What a step multiplies the loss above its minimum by, at most, if strongly convex.

    .. math:: f(w_{k+1}) - f^* \le \rho^2 \, (f(w_k) - f^*) , \qquad
        \rho = \max(|1 - \eta \mu|, |1 - \eta L|)

    For smooth and strongly convex losses and :math:`0 \le \eta \le 2 / L`; attained by quadratics.
    At :math:`\eta = 1 / L` it is :math:`(1 - \mu / L)^2`: the factor :math:`1 - \mu / L` of the
    textbook's equation (4.6.8) is right with this step and gives half the speed.

    Args:
        lr: The rate :math:`\eta`.
        smoothness: The constant :math:`L`.
        strong_convexity: The constant :math:`\mu`.

    Returns:
        The factor :math:`\rho^2`.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``lr`` is outside its range, a constant not positive, or :math:`\mu > L`.

    Example:
        >>> from lmlosses.analysis.dynamics import gap_rate
        >>> gap_rate(lr=0.5, smoothness=2.0, strong_convexity=1.0)
        0.25

    References:
        Taylor, Hendrickx and Glineur (2018), Exact worst-case convergence rates of the proximal
        gradient method for composite convex minimization, arXiv:1705.04398, section 3.
    """
    _check_constants(smoothness, strong_convexity)
    _check_descends(lr, 2 / smoothness, meaning="2 / smoothness")
    return distance_rate(lr=lr, smoothness=smoothness, strong_convexity=strong_convexity) ** 2


def polyak_lojasiewicz_rate(*, lr: float, smoothness: float, strong_convexity: float) -> float:
    r"""What a step multiplies the loss above its minimum by, at most, convex or not.

    .. math:: f(w_{k+1}) - f^* \le \left(1 - \eta \mu \, (2 - \eta L)\right) (f(w_k) - f^*)

    All that is needed of :math:`\mu` is the inequality of Polyak and Łojasiewicz,
    :math:`\lVert \nabla f(w) \rVert^2 \ge 2 \mu \, (f(w) - f^*)`, which strongly convex losses
    satisfy, and least squares of any rank with :math:`\mu` the smallest eigenvalue that is not
    zero. At :math:`\eta = 1 / L` the factor is :math:`1 - \mu / L`: textbook equation (4.6.8). It
    holds and is attained by no strongly convex loss, whose `gap_rate` is smaller.

    Args:
        lr: The rate :math:`\eta`, at most :math:`2 / L`.
        smoothness: The constant :math:`L` of the gradient, not of the loss itself.
        strong_convexity: The constant :math:`\mu` of the inequality.

    Returns:
        The factor.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``lr`` is outside its range, a constant not positive, or :math:`\mu > L`.

    Example:
        >>> from lmlosses.analysis.dynamics import polyak_lojasiewicz_rate
        >>> polyak_lojasiewicz_rate(lr=0.5, smoothness=2.0, strong_convexity=1.0)
        0.5

    References:
        Karimi, Nutini and Schmidt (2016), arXiv:1608.04636, theorem 1. Textbook equation (4.6.8).
    """
    _check_constants(smoothness, strong_convexity)
    _check_descends(lr, 2 / smoothness, meaning="2 / smoothness")
    return 1 - lr * strong_convexity * (2 - lr * smoothness)


def convex_gap(steps: int, *, lr: float, smoothness: float, distance: float) -> float:
    r"""How far above its minimum the loss is after some steps, at most, if only convex.

    .. math:: f(w_k) - f^* \le \frac{L \, d^2}{2 + 4 k \eta L} , \qquad
        d = \lVert w_0 - w^* \rVert

    For smooth convex losses and :math:`0 \le \eta \le 1 / L`. It is attained, by a loss that is
    quadratic near its minimum and linear beyond. The bound of most books,
    :math:`d^2 / (2 k \eta)`, is about twice as large.

    Args:
        steps: The number of steps :math:`k`.
        lr: The rate :math:`\eta`.
        smoothness: The constant :math:`L`.
        distance: The distance :math:`d` from the start to a minimum.

    Returns:
        The bound, in the loss's unit.

    Raises:
        TypeError: If an argument is not a number, or ``steps`` not a whole one.
        ValueError: If ``lr`` is outside its range, ``steps`` or ``distance`` negative, or
            ``smoothness`` not positive.

    Example:
        >>> from lmlosses.analysis.dynamics import convex_gap
        >>> convex_gap(12, lr=1.0, smoothness=1.0, distance=10.0)
        2.0

    References:
        Drori and Teboulle (2014), Performance of first-order methods for smooth convex
        minimization: a novel approach, arXiv:1206.3209, section 3.
    """
    check_whole(steps=steps)
    check_positive(smoothness=smoothness)
    check_non_negative(steps=steps, distance=distance)
    _check_descends(lr, 1 / smoothness, meaning="1 / smoothness")
    return smoothness * distance**2 / (2 + 4 * steps * lr * smoothness)


def flow_gap_rate(time: float, *, strong_convexity: float) -> float:
    r"""What gradient flow multiplies the loss above its minimum by in some time, at most.

    .. math:: f(w(t)) - f^* \le e^{-2 \mu t} \, (f(w(0)) - f^*)

    Under the same inequality as `polyak_lojasiewicz_rate`; attained by quadratics along the
    eigenvector of :math:`\mu`. The largest curvature does not matter: only steps have to be short.

    Args:
        time: The time :math:`t`.
        strong_convexity: The constant :math:`\mu`.

    Returns:
        The factor.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``time`` is negative or ``strong_convexity`` not positive.

    Example:
        >>> from lmlosses.analysis.dynamics import flow_gap_rate
        >>> round(flow_gap_rate(1.0, strong_convexity=0.5), 4)
        0.3679

    References:
        The inequality: Karimi, Nutini and Schmidt (2016), arXiv:1608.04636, section 2. The rest is
        one line: along the flow :math:`df/dt = -\lVert \nabla f \rVert^2 \le -2 \mu (f - f^*)`.
    """
    check_non_negative(time=time)
    check_positive(strong_convexity=strong_convexity)
    return math.exp(-2 * strong_convexity * time)
