"""Adam and AdamW: steps scaled by running moments of the gradient."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_in_unit_interval, check_non_negative
from lmlosses.optim._base import Ready
from lmlosses.optim._elementwise import ElementwiseRule, Quotient
from lmlosses.optim._tensors import Entries


class Adam(ElementwiseRule):
    r"""Adaptive moment estimation.

    With gradient :math:`g_t` at step :math:`t \ge 1`, powers and roots taken entry by entry,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        w_{t+1} &= w_t - \eta \,
            \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    and :math:`m_0 = v_0 = 0`. The first step moves every entry by about :math:`\eta`, whatever
    the size of its gradient. Weight decay is the gradient of an L2 penalty here, so it is scaled
    like any gradient; `AdamW` keeps it apart.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`; zero leaves the parameters where they are.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two moments, each in ``[0, 1)``.
        eps: Added to the root, outside of it, to keep the quotient finite.
        weight_decay: The number :math:`\lambda` of which :math:`\lambda w` is added to the
            gradient.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018), as torch does
            it: the maximum is taken before the correction of the bias.
        maximize: Ascend instead of descending.
        foreach: See `ElementwiseRule`, as for ``compiled`` and ``stochastic_rounding``.
        compiled: Compile the rule.
        fused: Let torch's own fused kernel take the step; float32 and float64 only.
        stochastic_rounding: Round bfloat16 parameters at random.

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
        (4.3.26); notes, section 2.1.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    remembered: ClassVar[dict[str, str]] = {"amsgrad": "max_exp_avg_sq"}
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        fused: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
             "amsgrad": amsgrad, "maximize": maximize},
            foreach=foreach, compiled=compiled, fused=fused,
            stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """Both rates in ``[0, 1)``, ``eps`` not negative."""
        check_non_negative(eps=group["eps"])
        check_in_unit_interval(beta1=group["betas"][0], beta2=group["betas"][1])

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Both moments at zero, and the largest second one if it is asked for."""
        state = super().init_state(param, group)
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        return state

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """Shares of the new gradient, and what corrects both moments for their start at zero."""
        beta1, beta2 = group["betas"]
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        return {
            "new1": 1 - beta1,
            "new2": 1 - beta2,
            # (m / bias1) / (sqrt(v / bias2) + eps) in fewer passes over the entries
            "scale": bias1 / bias2**0.5,
            "eps": group["eps"] * bias1,
        }

    @staticmethod
    def direction(
        param: Entries, grad: Entries, state: dict[str, Entries], n: Any
    ) -> Entries | Quotient:
        """Equations (4.3.23) to (4.3.26)."""
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.lerp_(grad, n["new1"])
        exp_avg_sq.lerp_(grad.mul(grad), n["new2"])
        if "max_exp_avg_sq" in state:
            exp_avg_sq = state["max_exp_avg_sq"].copy_(state["max_exp_avg_sq"].maximum(exp_avg_sq))
        return exp_avg, exp_avg_sq.sqrt().mul_(n["scale"]).add_(n["eps"])

    def fused_step(self, ready: list[Ready], group: dict[str, Any]) -> None:
        """Torch's kernel on the same state."""
        params, grads, states = map(list, zip(*ready, strict=True))
        beta1, beta2 = group["betas"]
        largest = [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else []
        adam(
            params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
            largest, [s["step"] for s in states], fused=True,
            decoupled_weight_decay=self.decoupled, amsgrad=group["amsgrad"], beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=group["maximize"],
        )  # fmt: skip


class AdamW(Adam):
    r"""Adam with weight decay that is not scaled by the moments.

    .. math:: w_{t+1} = (1 - \eta \lambda) \, w_t - \eta \,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    All weights shrink at the one rate :math:`\eta \lambda`, whatever their gradients: with
    :math:`\eta = 0.1`, :math:`\lambda = 0.5` and no gradient, by 5 % a step. Settings as for
    `Adam`, but for the default ``weight_decay=0.01``.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import AdamW
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> w.grad = torch.tensor([0.0, 100.0])
        >>> _ = AdamW([w], lr=0.1, weight_decay=0.5).step()
        >>> w.data
        tensor([0.9500, 0.8500])

    References:
        Loshchilov and Hutter (2019), arXiv:1711.05101, algorithm 2, with the decay multiplied by
        the learning rate as torch does. Notes, section 2.1.
    """

    decoupled: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        fused: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach,
            compiled=compiled, fused=fused, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip
