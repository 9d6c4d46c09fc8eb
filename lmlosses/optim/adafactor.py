"""Adafactor: a second moment kept as its row and column means."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_non_negative, check_number
from lmlosses.optim._base import UpdateRule, state_dtype
from lmlosses.optim._matrices import check_whole_tensors, descend, named


class Adafactor(UpdateRule):
    r"""RMSProp whose second moment of a matrix is the product of two vectors.

    For a matrix of :math:`n` rows and :math:`m` columns with gradient :math:`G_t`, and
    :math:`\rho_t = t^{\tau}` the weight of the new gradient at step :math:`t \ge 1`,

    .. math::

        R_t &= (1 - \rho_t) R_{t-1} + \rho_t \, \text{mean}_{\text{columns}}(G_t^2) \\
        C_t &= (1 - \rho_t) C_{t-1} + \rho_t \, \text{mean}_{\text{rows}}(G_t^2) \\
        V_t &= R_t C_t / \max(\text{mean}(R_t), \epsilon_1) \\
        U_t &= G_t / \max(\sqrt{V_t}, \epsilon_1) \\
        W_t &= (1 - \eta \lambda) W_{t-1} - \alpha_t \, U_t / \max(1, \text{RMS}(U_t) / d)

    with the step :math:`\alpha_t = \max(\epsilon_2, \text{RMS}(W_{t-1})) \min(\eta, t^{-1/2})`
    relative to the size of the weights. The state of a matrix is :math:`n + m` numbers instead of
    :math:`n m`. Where :math:`G_t^2` has rank one, :math:`V_t` is what it would be unfactored.
    Vectors keep their whole second moment; of tensors with more axes the last two are factored.

    As in torch, whose class this agrees with, and other than in the paper: the paper's largest
    relative step, 0.01, is the argument ``lr``; :math:`\epsilon_1` bounds :math:`V_t` and the mean
    from below, where the paper adds it to :math:`G_t^2`; and the paper knows no weight decay.
    Other than in torch, half precision is computed in float32 and the state kept in it.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Largest relative step, and rate of the weight decay, :math:`\eta`.
        beta2_decay: Exponent :math:`\tau \le 0`; at the first step :math:`\rho_1 = 1`.
        eps: The numbers :math:`\epsilon_1, \epsilon_2`; None for the first means the rounding
            step of the dtype computed in.
        d: Largest root mean square of an update, at least 1.
        weight_decay: Decoupled decay :math:`\lambda`.
        maximize: Ascend instead of descending.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is out of its range.
        TypeError: If a parameter is a DTensor.

    Example:
        >>> import torch
        >>> from lmlosses.optim import Adafactor
        >>> w = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = Adafactor([w], lr=0.01)
        >>> (w * torch.tensor([[1.0], [100.0]])).sum().backward()
        >>> _ = optimizer.step()
        >>> w.data
        tensor([[0.9900, 0.9900, 0.9900],
                [0.9900, 0.9900, 0.9900]])

    References:
        Shazeer and Stern (2018), arXiv:1804.04235, algorithms 4 and 5.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d,
             "weight_decay": weight_decay, "maximize": maximize,
             "stochastic_rounding": stochastic_rounding},
        )  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `UpdateRule.add_param_group`; sharded tensors are refused."""
        params, pairs = named(param_group["params"])
        check_whole_tensors("Adafactor", pairs)
        super().add_param_group({**param_group, "params": params})

    def check_settings(self, group: dict[str, Any]) -> None:
        """Exponent not positive, ``d`` at least one, the rest not negative."""
        eps1, eps2 = group["eps"]
        check_non_negative(eps1=0.0 if eps1 is None else eps1, eps2=eps2)
        check_non_negative(weight_decay=group["weight_decay"])
        if check_number("beta2_decay", group["beta2_decay"]) > 0:
            raise ValueError(f"beta2_decay must not be positive; got {group['beta2_decay']!r}")
        if check_number("d", group["d"]) < 1:
            raise ValueError(f"d must be at least 1; got {group['d']!r}")

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Two thin tensors of zeros where there are two axes to factor, else one like it."""
        dtype = state_dtype(param)
        if param.ndim < 2:
            return {"variance": torch.zeros_like(param, dtype=dtype)}
        *batch, rows, columns = param.shape
        return {
            "row_var": param.new_zeros((*batch, rows, 1), dtype=dtype),
            "col_var": param.new_zeros((*batch, 1, columns), dtype=dtype),
        }

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """The paper's algorithm 4, or 5 for a vector."""
        step, lr = state["step"].item(), group["lr"]
        dtype = state_dtype(param)
        grad = grad.to(dtype)
        eps1, eps2 = group["eps"]
        if eps1 is None:
            eps1 = torch.finfo(dtype).eps

        variance = _second_moment(grad, state, step ** group["beta2_decay"], eps1)
        direction = variance.clamp_(min=eps1 * eps1).rsqrt_().mul_(grad)
        clipped = (_rms(direction) / group["d"]).clamp(min=1.0)
        relative = lr.clamp(max=step**-0.5) if isinstance(lr, Tensor) else min(lr, step**-0.5)
        rate = _rms(param.to(dtype)).clamp(min=eps2) * relative
        descend(
            param, direction, rate / clipped, weight_decay=lr * group["weight_decay"],
            stochastic_rounding=group["stochastic_rounding"],
        )  # fmt: skip


def _second_moment(grad: Tensor, state: dict[str, Any], new: float, eps1: float) -> Tensor:
    """What the gradient's square is expected to be, in a tensor that may be written to."""
    if "variance" in state:
        variance: Tensor = state["variance"].lerp_(grad.square(), new)
        return variance.clone()
    row_var: Tensor = state["row_var"]
    col_var: Tensor = state["col_var"]
    row_var.lerp_(_mean_square(grad, -1), new)
    col_var.lerp_(_mean_square(grad, -2), new)
    return (row_var / row_var.mean(dim=-2, keepdim=True).clamp_(min=eps1)) @ col_var


def _mean_square(tensor: Tensor, axis: int) -> Tensor:
    """Without a tensor of all the squares."""
    length: Tensor = torch.linalg.vector_norm(tensor, dim=axis, keepdim=True)
    return length.square_().div_(max(1, tensor.shape[axis]))


def _rms(tensor: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(tensor) / math.sqrt(max(1, tensor.numel()))
    return found
