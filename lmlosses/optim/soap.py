"""SOAP: Adam in the slowly turning axes along which the gradients vary independently."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import (
    check_in_unit_interval,
    check_non_negative,
    check_number,
    check_positive,
    check_whole,
)
from lmlosses.optim._base import UpdateRule, state_dtype
from lmlosses.optim._matrices import check_whole_tensors, descend, multiple, named


class SOAP(UpdateRule):
    r"""Adam in the eigenbasis of Shampoo's preconditioner.

    For a matrix with gradient :math:`G_t`, whose rows and columns have the correlations

    .. math::

        L_t = \beta L_{t-1} + (1 - \beta) G_t G_t^\top , \qquad
        R_t = \beta R_{t-1} + (1 - \beta) G_t^\top G_t ,

    let the columns of :math:`Q_L, Q_R` be their eigenvectors. Adam runs on the gradient
    :math:`Q_L^\top G_t Q_R` seen along these axes, and its step :math:`N_t` is turned back:

    .. math:: W_{t+1} = (1 - \eta \lambda) (W_t - \eta \, Q_L N_t Q_R^\top) .

    The first step moves nothing: it finds the axes of its gradient. After each later step the
    correlations take in its gradient, and every ``precondition_frequency`` steps one power
    iteration and a QR decomposition turn the axes: the momentum is turned with them, and the
    second moments stay where they are, sorted anew by eigenvalue. A tensor with more axes has a
    correlation for each. Turning the parameters and their gradients by orthogonal matrices turns
    the whole path by them, except for ``eps``.

    As the authors' code does, and its published algorithm leaves open: the first step is skipped,
    gradients of a step are never seen in axes that know them, and weight decay comes last. Their
    ``merge_dims`` and ``data_format``, which reshape kernels of convolutions, are left out; pass a
    view of the shape that you want. Half precision is computed in float32, and the state kept in
    it.

    Along axes in which no gradient has a part there is only rounding, and Adam scales it up like
    the rest: in float32 ``eps`` does not prevent that.

    Eigenvectors (`torch.linalg.eigh`), in the first step of a parameter alone, are the one place
    where a GPU is waited for.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`.
        betas: Decay rates of Adam's two moments, each in ``[0, 1)``.
        shampoo_beta: Decay rate :math:`\beta` of the correlations; a negative one means
            ``betas[1]``.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay :math:`\lambda`.
        precondition_frequency: Steps from one turn of the axes to the next.
        max_precond_dim: Axes longer than this are left as they are; at 0 all are, which leaves
            Adam, one step late.
        precondition_1d: Turn vectors as well.
        normalize_grads: Divide the update of each tensor by its root mean square.
        correct_bias: Correct both moments for their start at zero.
        maximize: Ascend instead of descending.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is out of its range.
        TypeError: If a parameter is a DTensor.

    Example:
        >>> import torch
        >>> from lmlosses.optim import SOAP
        >>> w = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        >>> optimizer = SOAP([w], lr=0.1)
        >>> for _ in range(2):  # the same gradient twice: its singular values, 3 and 1, become 1
        ...     w.grad = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        ...     _ = optimizer.step()
        >>> w.diagonal().data.float(), bool(w[0, 1].abs() < 1e-6)
        (tensor([-0.0999, -0.0999]), True)

    References:
        Vyas et al. (2024), arXiv:2409.11321, algorithms 3 and 4. Shampoo: Gupta et al. (2018),
        arXiv:1802.09568.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "eps": eps,
             "weight_decay": weight_decay, "precondition_frequency": precondition_frequency,
             "max_precond_dim": max_precond_dim, "precondition_1d": precondition_1d,
             "normalize_grads": normalize_grads, "correct_bias": correct_bias,
             "maximize": maximize, "stochastic_rounding": stochastic_rounding},
        )  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `UpdateRule.add_param_group`; sharded tensors are refused."""
        params, pairs = named(param_group["params"])
        check_whole_tensors("SOAP", pairs)
        super().add_param_group({**param_group, "params": params})

    def check_settings(self, group: dict[str, Any]) -> None:
        """Rates in ``[0, 1)``, whole numbers where steps and entries are counted."""
        check_non_negative(eps=group["eps"], weight_decay=group["weight_decay"])
        check_in_unit_interval(beta1=group["betas"][0], beta2=group["betas"][1])
        if check_number("shampoo_beta", group["shampoo_beta"]) >= 0:
            check_in_unit_interval(shampoo_beta=group["shampoo_beta"])
        counts = {key: group[key] for key in ("precondition_frequency", "max_precond_dim")}
        check_whole(**counts)
        check_positive(precondition_frequency=counts["precondition_frequency"])
        check_non_negative(max_precond_dim=counts["max_precond_dim"])

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Moments at zero; correlations ``GG_k`` and axes ``Q_k`` of each axis ``k`` turned."""
        dtype = state_dtype(param)
        state = {name: torch.zeros_like(param, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
        if param.ndim == 1 and not group["precondition_1d"]:
            return state
        for axis, size in enumerate(param.shape):
            if size <= group["max_precond_dim"]:
                state[f"GG_{axis}"] = param.new_zeros((size, size), dtype=dtype)
                state[f"Q_{axis}"] = param.new_zeros((size, size), dtype=dtype)
        return state

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """A step of Adam along the axes, then the gradient's part in turning them."""
        grad = grad.to(state["exp_avg"].dtype)
        steps = int(state["step"].item()) - 1  # the first one moves nothing
        if steps > 0:
            self._step_along_axes(param, grad, state, group, steps)
        _correlate(grad, state, 1 - _shampoo_beta(group))
        if steps == 0:
            for axis in _axes(state):
                state[f"Q_{axis}"].copy_(torch.linalg.eigh(state[f"GG_{axis}"])[1].flip(1))
        elif steps % group["precondition_frequency"] == 0:
            _turn_axes(state)

    def _step_along_axes(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        steps: int,
    ) -> None:
        beta1, beta2 = group["betas"]
        seen = _turned(grad, state)
        exp_avg = state["exp_avg"].lerp_(seen, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].lerp_(seen.square(), 1 - beta2)
        direction = _turned(exp_avg / exp_avg_sq.sqrt().add_(group["eps"]), state, back=True)
        if group["normalize_grads"]:
            direction = direction / (direction.square().mean().sqrt() + 1e-30)

        shrink = group["lr"] * group["weight_decay"]
        bias = (1 - beta2**steps) ** 0.5 / (1 - beta1**steps) if group["correct_bias"] else 1.0
        descend(
            param, direction, multiple(group["lr"], bias) * (1 - shrink), weight_decay=shrink,
            stochastic_rounding=group["stochastic_rounding"],
        )  # fmt: skip


def _shampoo_beta(group: dict[str, Any]) -> float:
    beta: float = group["shampoo_beta"]
    return beta if beta >= 0 else group["betas"][1]


def _axes(state: dict[str, Any]) -> list[int]:
    """Those along which the tensor is turned."""
    return [axis for axis in range(state["exp_avg"].ndim) if f"Q_{axis}" in state]


def _turned(tensor: Tensor, state: dict[str, Any], *, back: bool = False) -> Tensor:
    """The tensor along the axes, or back from them."""
    for axis in range(tensor.ndim):  # the first axis goes last, so each has its turn in front
        turn = state.get(f"Q_{axis}")
        if turn is None:
            tensor = tensor.movedim(0, -1)
        else:
            tensor = torch.tensordot(tensor, turn, dims=([0], [1 if back else 0]))
    return tensor


def _correlate(grad: Tensor, state: dict[str, Any], new: float) -> None:
    for axis in _axes(state):
        others = [other for other in range(grad.ndim) if other != axis]
        state[f"GG_{axis}"].lerp_(torch.tensordot(grad, grad, dims=(others, others)), new)


def _turn_axes(state: dict[str, Any]) -> None:
    """One power iteration, made orthonormal by QR; the momentum follows the axes."""
    exp_avg, exp_avg_sq = _turned(state["exp_avg"], state, back=True), state["exp_avg_sq"]
    for axis in _axes(state):
        old = state[f"Q_{axis}"]
        product = state[f"GG_{axis}"] @ old
        order = (old * product).sum(dim=0).argsort(descending=True)
        exp_avg_sq = exp_avg_sq.index_select(axis, order)
        old.copy_(torch.linalg.qr(product.index_select(1, order))[0])
    state["exp_avg"].copy_(_turned(exp_avg, state))
    state["exp_avg_sq"].copy_(exp_avg_sq)
