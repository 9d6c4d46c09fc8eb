"""Descent on a single tensor with the whole path kept for drawing, and a loop for small models.

Nothing here is meant for large models. In the first kind the point is a tensor, every step is
exact, and the path comes back as data; the second returns the loss of every step.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_ndim,
    check_non_negative,
    check_whole,
)
from lmlosses.analysis.geometry import Classifier, fisher_information, natural_gradient_step
from lmlosses.losses.classification import cross_entropy
from lmlosses.reductions import token_mean


def _gradient(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(point)
    check_floating(**{"the loss": value})
    check_ndim("the loss", value, 0)
    (gradient,) = torch.autograd.grad(value, point)
    return gradient


def gradient_descent(
    loss: Callable[[Float[Tensor, "*shape"]], Float[Tensor, ""]],
    start: Float[Tensor, "*shape"],
    *,
    lr: float,
    steps: int,
) -> Float[Tensor, "steps_and_start *shape"]:
    r"""The path of plain gradient descent, start included.

    .. math:: \theta_{t+1} = \theta_t - \eta \, \nabla L(\theta_t)

    Args:
        loss: A differentiable function of the point that returns one number.
        start: The point :math:`\theta_0`.
        lr: The rate :math:`\eta`.
        steps: Number of steps.

    Returns:
        All points, in the dtype of ``start``: entry ``t`` is the point after ``t`` steps. They
        carry no gradient.

    Raises:
        TypeError: If ``start`` or the loss is not floating point, or a setting not a number.
        ValueError: If ``lr`` or ``steps`` is negative or the loss is not one number.

    Example:
        >>> import torch
        >>> from lmlosses.lab.training import gradient_descent
        >>> bowl = lambda point: 0.5 * point.square().sum()
        >>> gradient_descent(bowl, torch.tensor([8.0]), lr=0.5, steps=3)
        tensor([[8.],
                [4.],
                [2.],
                [1.]])
    """
    check_floating(start=start)
    check_whole(steps=steps)
    check_non_negative(lr=lr, steps=steps)
    path = [start.detach()]
    for _ in range(steps):
        path.append(path[-1] - lr * _gradient(loss, path[-1]))
    return torch.stack(path)


def natural_gradient_descent(
    model: Classifier,
    start: Float[Tensor, "dim"],
    targets: Int[Tensor, "samples"],
    *,
    lr: float,
    steps: int,
    damping: float = 0.0,
) -> Float[Tensor, "steps_and_start dim"]:
    r"""The path of natural gradient descent on a classifier's mean cross-entropy.

    .. math:: \theta_{t+1} = \theta_t -
        \eta \, (I(\theta_t) + \lambda \, \mathbb{1})^{-1} \nabla L(\theta_t)

    Textbook equation (4.3.27), with the Fisher information of
    `lmlosses.analysis.geometry.fisher_information` as the metric. Where the logits are linear
    in the parameters this is Newton's method.

    Args:
        model: Parameters to logits of the samples. See `lmlosses.analysis.geometry`.
        start: The point :math:`\theta_0`, flattened.
        targets: Index of each sample's class.
        lr: The rate :math:`\eta`; 1 is the full step.
        steps: Number of steps.
        damping: The number :math:`\lambda`. See
            `lmlosses.analysis.geometry.natural_gradient_step`.

    Returns:
        All points, in at least float32: entry ``t`` is the point after ``t`` steps. They carry
        no gradient.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype, or a setting is not a number.
        ValueError: If the shapes do not fit, a setting is negative, or the Fisher information
            is singular and not damped.

    Example:
        >>> import torch
        >>> from lmlosses.lab.training import natural_gradient_descent
        >>> coin = lambda logit: torch.stack([logit, torch.zeros(1)], dim=-1).expand(4, 2)
        >>> heads_three_times_in_four = torch.tensor([0, 0, 0, 1])
        >>> path = natural_gradient_descent(
        ...     coin, torch.zeros(1), heads_three_times_in_four, lr=1.0, steps=4)
        >>> path[-1].sigmoid()
        tensor([0.7500])
    """
    check_floating(start=start)
    check_whole(steps=steps)
    check_non_negative(lr=lr, steps=steps)

    def loss(point: Tensor) -> Tensor:
        return token_mean(cross_entropy(model(point), targets))

    path = [start.detach().to(torch.promote_types(start.dtype, torch.float32))]
    for _ in range(steps):
        gradient = _gradient(loss, path[-1])
        fisher = fisher_information(model, path[-1])
        path.append(natural_gradient_step(path[-1], gradient, fisher, lr=lr, damping=damping))
    return torch.stack(path)


def train(
    step_loss: Callable[[], Float[Tensor, ""]],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    lr: Callable[[int], float] | None = None,
) -> Float[Tensor, "steps"]:
    r"""Steps of an optimizer, each on the loss of its own batch.

    .. math:: \theta_{t+1} = \text{step}\left( \theta_t , \nabla L_t(\theta_t) , \eta_t \right)

    The loop draws nothing: with the same model, optimizer and batches it repeats itself.

    Args:
        step_loss: Draws a batch and returns its mean loss :math:`L_t`.
        optimizer: Holds the parameters.
        steps: Number of steps.
        lr: The rate :math:`\eta_t` of step :math:`t`, counted from 0, for every group, such as
            `lmlosses.schedules.warmup_cosine` with a ``peak``; the optimizer's own without it.

    Returns:
        The loss of each step, before it was taken, on the CPU, without a gradient.

    Raises:
        TypeError: If a loss is not floating point, or ``steps`` no whole number.
        ValueError: If ``steps`` is negative or a loss is not one number.

    Example:
        >>> import torch
        >>> from lmlosses.lab.training import train
        >>> point = torch.nn.Parameter(torch.tensor(8.0))
        >>> train(lambda: point.square() / 2, torch.optim.SGD([point], lr=0.5), steps=3)
        tensor([32.,  8.,  2.])
    """
    check_whole(steps=steps)
    check_non_negative(steps=steps)
    losses = []
    for step in range(steps):
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr(step)
        optimizer.zero_grad()
        loss = step_loss()
        check_floating(**{"the loss": loss})
        check_ndim("the loss", loss, 0)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu() if losses else torch.empty(0)
