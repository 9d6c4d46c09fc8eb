"""RMSprop: steps divided by the root of a running mean of squared gradients."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_in_unit_interval, check_non_negative
from lmlosses.optim._base import state_dtype
from lmlosses.optim._elementwise import ElementwiseRule, Quotient
from lmlosses.optim._tensors import Entries


class RMSprop(ElementwiseRule):
    r"""Steps scaled by the root mean square of recent gradients.

    With gradient :math:`g_t` at step :math:`t \ge 1`, powers and roots taken entry by entry,

    .. math::

        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2 \\
        w_{t+1} &= w_t - \eta \, \frac{g_t}{\sqrt{v_t} + \epsilon}

    with :math:`v_0 = 0`. That start is not corrected: the first step moves every entry by
    :math:`\eta / \sqrt{1 - \alpha}`, ten times the learning rate at the default. ``centered``
    puts :math:`v_t - \bar g_t^2` under the root, an estimate of the variance, with
    :math:`\bar g_t` the running mean of the gradient. ``momentum`` puts the buffer
    :math:`b_t = \mu b_{t-1} + g_t / (\sqrt{v_t} + \epsilon)` in place of the quotient.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`.
        alpha: Decay rate :math:`\alpha` of the running means, in ``[0, 1)``.
        eps: Added to the root, outside of it.
        weight_decay: The number :math:`\lambda` of which :math:`\lambda w` is added to the
            gradient.
        momentum: Share :math:`\mu` of the last direction that is kept, in ``[0, 1)``.
        centered: Divide by the spread around the mean. Under a gradient that hardly changes the
            spread is near zero and the step very long; where rounding would put a negative
            number under the root, and NaN into the weights, it is taken as zero.
        maximize: Ascend instead of descending.
        foreach: See `ElementwiseRule`, as for the next two.
        compiled: Compile the rule.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import RMSprop
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([1.0, -100.0])
        >>> _ = RMSprop([w], lr=0.01).step()
        >>> w.data
        tensor([-0.1000,  0.1000])

    References:
        Tieleman and Hinton (2012), Coursera lecture 6e. The centered form: Graves (2013),
        arXiv:1308.0850, equations (38) to (41), where the constant stands under the root; here
        it stands outside, as in torch.
    """

    remembered: ClassVar[dict[str, str]] = {
        "centered": "grad_avg",
        "momentum": "momentum_buffer",
    }
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay,
             "momentum": momentum, "centered": centered, "maximize": maximize},
            foreach=foreach, compiled=compiled, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """Both rates in ``[0, 1)``, ``eps`` not negative."""
        check_non_negative(eps=group["eps"])
        check_in_unit_interval(alpha=group["alpha"], momentum=group["momentum"])

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Zeros for the mean square and, where they are asked for, the mean and the buffer."""
        asked = {"grad_avg": group["centered"], "momentum_buffer": group["momentum"] > 0}
        names = ["square_avg", *(name for name, wanted in asked.items() if wanted)]
        return {name: torch.zeros_like(param, dtype=state_dtype(param)) for name in names}

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """The share of the new gradient, and what is kept of the buffer."""
        return {"new": 1 - group["alpha"], "eps": group["eps"], "kept": group["momentum"]}

    @staticmethod
    def direction(
        param: Entries, grad: Entries, state: dict[str, Entries], n: Any
    ) -> Entries | Quotient:
        """The gradient over its root mean square, or a buffer of such quotients."""
        square = state["square_avg"].lerp_(grad.mul(grad), n["new"])
        if "grad_avg" in state:
            mean = state["grad_avg"].lerp_(grad, n["new"])
            # rounding can bring the difference below zero, whose root would be NaN
            square = square.sub(mean.mul(mean)).clamp_min_(0.0)
        root = square.sqrt().add_(n["eps"])
        if "momentum_buffer" not in state:
            return grad, root
        return state["momentum_buffer"].mul_(n["kept"]).addcdiv_(grad, root)
