"""Where optimizers go on problems small enough to see through."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmlosses._checks import (
    check_floating,
    check_ndim,
    check_non_negative,
    check_positive,
    check_same_shape,
    check_whole,
)
from lmlosses.optim import ScheduleFreeAdamW, SophiaH, state_bytes

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer of some parameters, its settings chosen."""

StepLoss = Callable[[Tensor, int], Tensor]
"""The loss at a point in a step, counted from 0; steps differ where data come in batches."""


def valley(angle: float, condition: float) -> StepLoss:
    r"""A quadratic valley in the plane, turned by an angle.

    .. math:: L(w) = \tfrac12 (w \cdot u)^2 + \tfrac{\kappa}{2} (w \cdot v)^2

    with :math:`u = (\cos \phi, \sin \phi)` along the valley and :math:`v` across it.

    Args:
        angle: The angle :math:`\phi`, in degrees; at 0 the valley lies along the first axis.
        condition: The condition number :math:`\kappa`, how much steeper the walls are.

    Returns:
        The loss of a point of the plane, the same in each step.

    Raises:
        ValueError: If ``condition`` is not positive.

    Example:
        >>> import torch
        >>> from lmlosses.lab.paths import valley
        >>> valley(90.0, 100.0)(torch.tensor([1.0, 0.0]), 0)
        tensor(50.)
    """
    check_positive(condition=condition)
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def loss(point: Tensor, step: int) -> Tensor:
        along = cosine * point[0] + sine * point[1]
        across = cosine * point[1] - sine * point[0]
        return (along.square() + condition * across.square()) / 2

    return loss


def optimizer_path(
    make: Make,
    loss: StepLoss,
    start: Float[Tensor, "*shape"],
    *,
    steps: int,
    lr: Callable[[int], float] | None = None,
    bound: float | None = None,
) -> Float[Tensor, "steps_and_start *shape"]:
    """The points that an optimizer visits, start included.

    Of `ScheduleFreeAdamW` it is the path of the average, which is the point to use.

    Args:
        make: Makes the optimizer of one parameter.
        loss: The loss at a point in a step.
        start: The first point.
        steps: Number of steps.
        lr: The learning rate of a step, counted from 0; the optimizer's own without it.
        bound: Largest absolute value of an entry, to which a point is pulled back after each
            step; None for no bound.

    Returns:
        All points, without a gradient: entry ``t`` is the point after ``t`` steps.

    Raises:
        TypeError: If ``start`` or the loss is not floating point, or a setting no number.
        ValueError: If ``steps`` is negative, ``bound`` not positive, or the loss not one number.

    Example:
        >>> import torch
        >>> from lmlosses.lab.paths import optimizer_path
        >>> from lmlosses.optim import SignSGD
        >>> bowl = lambda point, step: point.square().sum()
        >>> optimizer_path(lambda p: SignSGD(p, lr=0.5), bowl, torch.tensor([1.0]), steps=3)
        tensor([[1.0000],
                [0.5000],
                [0.0000],
                [0.0000]])
    """
    check_floating(start=start)
    check_whole(steps=steps)
    check_non_negative(steps=steps)
    if bound is not None:
        check_positive(bound=bound)
    point = nn.Parameter(start.detach().clone())
    optimizer = make([point])
    path = [point.detach().clone()]
    for step in range(steps):
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr(step)
        _descend(optimizer, loss, point, step)
        if bound is not None:
            point.data.clamp_(-bound, bound)
        path.append(_published(optimizer, point))
    return torch.stack(path)


def follow(
    optimizer: torch.optim.Optimizer,
    gradient: Callable[[Float[Tensor, "*shape"], int], Float[Tensor, "*shape"]],
    *,
    steps: int,
    lr: Callable[[int], float] | None = None,
) -> Float[Tensor, "steps_and_start *shape"]:
    r"""The path of an optimizer's only parameter under given gradients, start included.

    .. math:: \theta_{t+1} = \text{step}\left( \theta_t , g(\theta_t, t) , \eta_t \right)

    Args:
        optimizer: Holds one parameter, and goes on from the state that it has.
        gradient: The gradient at a point and step, counted from 0. One that looks at the step
            alone is a stream of gradients, which shows an optimizer's rule without any loss.
        steps: Number of steps.
        lr: The rate :math:`\eta_t` of step :math:`t`; the optimizer's own without it.

    Returns:
        All points: entry ``t`` is the parameter after ``t`` steps. They carry no gradient.

    Raises:
        TypeError: If ``steps`` is no whole number.
        ValueError: If ``steps`` is negative, the optimizer holds more than one parameter, or a
            gradient does not have the parameter's shape.

    Example:
        >>> import torch
        >>> from lmlosses.lab.paths import follow
        >>> point = torch.nn.Parameter(torch.tensor([8.0]))
        >>> follow(torch.optim.SGD([point], lr=0.5), lambda point, step: point, steps=3)
        tensor([[8.],
                [4.],
                [2.],
                [1.]])
    """
    check_whole(steps=steps)
    check_non_negative(steps=steps)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if len(params) != 1:
        raise ValueError(f"optimizer must hold one parameter; got {len(params)}")
    (param,) = params
    path = [param.detach().clone()]
    for step in range(steps):
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr(step)
        slope = gradient(path[-1], step)
        check_same_shape("gradient", slope, of="the parameter", reference=param)
        param.grad = slope.detach().clone()
        optimizer.step()
        path.append(param.detach().clone())
    return torch.stack(path)


def fewest_steps(
    make_at: Callable[[float], Make],
    rates: Sequence[float],
    loss: StepLoss,
    start: Float[Tensor, "*shape"],
    *,
    below: float,
    most: int,
) -> tuple[int, float]:
    """Steps until the loss has fallen to a share of its first value, at the best of some rates.

    Args:
        make_at: The optimizer's maker for a learning rate.
        rates: The learning rates that are tried.
        loss: The loss at a point in a step.
        start: The first point.
        below: Share of the first loss that counts as arrived.
        most: Steps after which a run is given up.

    Returns:
        The number of steps and the rate that needed them, the first such rate; ``most + 1`` if
        none arrives.

    Raises:
        ValueError: If ``rates`` is empty, ``below`` not positive, or ``most`` negative.

    Example:
        >>> import torch
        >>> from lmlosses.lab.paths import fewest_steps, valley
        >>> from lmlosses.optim import SGD
        >>> rates = (0.005, 0.01, 0.1)
        >>> fewest_steps(lambda lr: lambda p: SGD(p, lr=lr), rates, valley(0.0, 100.0),
        ...              torch.ones(2), below=0.001, most=500)
        (115, 0.01)
    """
    check_floating(start=start)
    check_positive(below=below)
    check_whole(most=most)
    check_non_negative(most=most)
    if not rates:
        raise ValueError("rates must hold at least one learning rate; got none")
    best = (most + 1, rates[0])
    for rate in rates:
        point = nn.Parameter(start.detach().clone())
        optimizer = make_at(rate)([point])
        first = float(_loss(loss, point, 0).detach())
        for step in range(min(most + 1, best[0])):
            if _descend(optimizer, loss, point, step) <= below * first:
                best = (step, rate)
                break
    return best


def state_per_parameter(
    make: Make, shapes: Sequence[tuple[int, ...]], *, dtype: torch.dtype
) -> float:
    """Bytes of an optimizer's state for each parameter, counted after a step.

    Tensors are on the meta device, where they take no memory and no time. `SophiaH` is given the
    curvature of a quadratic first.

    Args:
        make: Makes the optimizer; it must be able to step on the meta device.
        shapes: Shapes of the model's parameters.
        dtype: Their dtype.

    Returns:
        Bytes per entry of a parameter. See `lmlosses.optim.state_bytes`.

    Example:
        >>> import torch
        >>> from lmlosses.lab.paths import state_per_parameter
        >>> from lmlosses.optim import Muon
        >>> state_per_parameter(Muon, [(512, 512)], dtype=torch.bfloat16)
        4.0000152587890625
    """
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype, device="meta")) for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = make(params)
    if isinstance(optimizer, SophiaH):
        squares = [param.float().square().sum() for param in params]
        optimizer.update_curvature(torch.stack(squares).sum())
    optimizer.step()
    return state_bytes(optimizer).per_parameter


def _published(optimizer: torch.optim.Optimizer, point: nn.Parameter) -> Tensor:
    if not isinstance(optimizer, ScheduleFreeAdamW):
        return point.detach().clone()
    optimizer.eval()
    average = point.detach().clone()
    optimizer.train()
    return average


def _loss(loss: StepLoss, point: Tensor, step: int) -> Tensor:
    with torch.enable_grad():
        value = loss(point, step)
    check_floating(**{"the loss": value})
    check_ndim("the loss", value, 0)
    return value


def _descend(
    optimizer: torch.optim.Optimizer, loss: StepLoss, point: nn.Parameter, step: int
) -> float:
    """One step; the loss before it."""
    value = _loss(loss, point, step)
    (point.grad,) = torch.autograd.grad(value, point)
    optimizer.step()
    return value.item()
