"""Adam: steps scaled by running moments of the gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_in_unit_interval, check_non_negative
from lmlosses.optim._base import UpdateRule


class Adam(UpdateRule):
    r"""Adaptive moment estimation.

    With gradient :math:`g_t` at step :math:`t \ge 1`, powers and roots taken entry by entry,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        w_{t+1} &= w_t - \eta \,
            \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    and :math:`m_0 = v_0 = 0`. The first step moves every entry by about :math:`\eta`, whatever
    the size of its gradient.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`; zero leaves the parameters where they are.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two moments, each in ``[0, 1)``.
        eps: Added to the root, outside of it, to keep the quotient finite.
        maximize: Ascend instead of descending.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import Adam
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = Adam([w], lr=0.1)
        >>> (w * torch.tensor([1.0, 100.0])).sum().backward()
        >>> _ = optimizer.step()
        >>> w.data
        tensor([0.9000, 0.9000])

    References:
        Kingma and Ba (2015), arXiv:1412.6980, algorithm 1. Textbook equations (4.3.23) to
        (4.3.26).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        maximize: bool = False,
    ) -> None:
        check_non_negative(lr=lr, eps=eps)
        check_in_unit_interval(beta1=betas[0], beta2=betas[1])
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize})

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Both moments at zero."""
        return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Equations (4.3.23) to (4.3.26)."""
        (beta1, beta2), step = group["betas"], state["step"].item()
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        corrected = exp_avg / (1 - beta1**step)
        root = (exp_avg_sq / (1 - beta2**step)).sqrt().add_(group["eps"])
        param.addcdiv_(corrected, root, value=-group["lr"])
