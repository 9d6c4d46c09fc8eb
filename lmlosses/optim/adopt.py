"""ADOPT: Adam that divides by what it knew before the gradient came."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_in_unit_interval, check_positive
from lmlosses.optim._elementwise import ElementwiseRule
from lmlosses.optim._tensors import Entries


class ADOPT(ElementwiseRule):
    r"""Adam with the order turned around: divide first, then average.

    The first gradient :math:`g_0` only sets :math:`v_0 = g_0^2`; nothing moves. After it, for
    :math:`t \ge 1`, entry by entry,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \, \operatorname{clip}\left(
            \frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)} , \pm t^{1/4} \right) \\
        \theta_t &= \theta_{t-1} - \eta \, m_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2

    with :math:`m_0 = 0`. A gradient is divided by a root that does not contain it, so the two are
    independent, and the method converges for every :math:`\beta_2`, which Adam does not.
    With a gradient that never changes the first move is :math:`(1 - \beta_1) \, \eta` per entry.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two moments, each in ``[0, 1)``.
        eps: Smallest divisor; it replaces a smaller root and is not added to it.
        weight_decay: The number :math:`\lambda`.
        decouple: Shrink the parameters by :math:`1 - \eta \lambda` from the second call on,
            instead of adding :math:`\lambda \theta` to the gradient.
        maximize: Ascend instead of descending.
        foreach: See `ElementwiseRule`, as for the next two.
        compiled: Compile the rule.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import ADOPT
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> w.grad = torch.tensor([1.0, -100.0])
        >>> optimizer = ADOPT([w], lr=0.1)
        >>> _ = optimizer.step()
        >>> w.data
        tensor([1., 1.])
        >>> _ = optimizer.step()
        >>> w.data
        tensor([0.9900, 1.0100])

    References:
        Taniguchi et al. (2024), arXiv:2411.02853, algorithm 2, with the clipping that its authors
        recommend and ship, :math:`c_t = t^{1/4}` counted from the first move.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
             "decouple": decouple, "maximize": maximize},
            foreach=foreach, compiled=compiled, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """Both rates in ``[0, 1)``, ``eps`` positive: a root may be zero."""
        check_positive(eps=group["eps"])
        check_in_unit_interval(beta1=group["betas"][0], beta2=group["betas"][1])

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """The bound of the clip, which is 0 in the first call and so keeps everything still."""
        beta1, beta2 = group["betas"]
        moves = step > 1
        bound, decay = (step - 1) ** 0.25, group["weight_decay"]
        shrink = decay * moves if group["decouple"] else 0.0
        if group["compiled"] and step == 1:  # tensors, or the rule is compiled for zeros alone
            bound = torch.zeros((), dtype=torch.float64)
            shrink = torch.zeros_like(bound) if group["decouple"] and decay else 0.0
        return {
            "new1": 1 - beta1,
            "new2": 1.0 - beta2 * moves,
            "eps": group["eps"],
            "bound": bound,
            "weight_decay": shrink,
            "penalty": 0.0 if group["decouple"] else decay,
        }

    @staticmethod
    def direction(param: Entries, grad: Entries, state: dict[str, Entries], n: Any) -> Entries:
        """The average of gradients divided by the root of before."""
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        if isinstance(n["penalty"], Tensor) or n["penalty"] != 0:
            grad = grad.add(param.mul(n["penalty"]))
        normed = grad.div(exp_avg_sq.sqrt().clamp_min_(n["eps"]))
        normed = normed.clamp_max_(n["bound"]).clamp_min_(-n["bound"])
        exp_avg.lerp_(normed, n["new1"])
        exp_avg_sq.lerp_(grad.mul(grad), n["new2"])
        return exp_avg
