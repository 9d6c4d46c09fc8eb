"""Adagrad: steps divided by the root of all squared gradients so far."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_non_negative
from lmlosses.optim._base import Ready, state_dtype
from lmlosses.optim._elementwise import ElementwiseRule, Quotient
from lmlosses.optim._tensors import Entries


class Adagrad(ElementwiseRule):
    r"""Adaptive gradient method: entries with large gradients so far take smaller steps.

    With gradient :math:`g_t` at step :math:`t \ge 1`, powers and roots taken entry by entry,

    .. math::

        s_t &= s_{t-1} + g_t^2 \\
        w_{t+1} &= w_t - \frac{\eta}{1 + (t - 1) \, \gamma} \,
            \frac{g_t}{\sqrt{s_t} + \epsilon}

    The sum only grows. Under a constant gradient step :math:`t` is :math:`\eta / \sqrt t` long:
    a schedule is built in. Weight decay is the gradient of an L2 penalty, added to :math:`g_t`.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`.
        lr_decay: Further decay :math:`\gamma` of the rate with the step.
        weight_decay: The number :math:`\lambda` of which :math:`\lambda w` is added to the
            gradient.
        initial_accumulator_value: The start :math:`s_0`.
        eps: Added to the root, outside of it.
        maximize: Ascend instead of descending.
        foreach: See `ElementwiseRule`, as for ``compiled`` and ``stochastic_rounding``.
        compiled: Compile the rule.
        fused: Let torch's own fused kernel take the step; float32 and float64 only.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import Adagrad
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = Adagrad([w], lr=1.0)
        >>> for _ in range(4):
        ...     w.grad = torch.tensor([-1.0, -100.0])
        ...     _ = optimizer.step()
        >>> w.data  # 1 + 1/√2 + 1/√3 + 1/√4
        tensor([2.7845, 2.7845])

    References:
        Duchi, Hazan and Singer (2011), JMLR 12, the diagonal form without projection; ``eps`` and
        ``lr_decay`` as in torch.
    """

    state_names: ClassVar[tuple[str, ...]] = ("sum",)
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        fused: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay,
             "initial_accumulator_value": initial_accumulator_value, "eps": eps,
             "maximize": maximize},
            foreach=foreach, compiled=compiled, fused=fused,
            stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """None of them negative."""
        for name in ("lr_decay", "initial_accumulator_value", "eps"):
            check_non_negative(**{name: group[name]})

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The sum at its initial value."""
        start = group["initial_accumulator_value"]
        return {"sum": torch.full_like(param, start, dtype=state_dtype(param))}

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """The rate of this step."""
        return {"lr": group["lr"] / (1 + (step - 1) * group["lr_decay"]), "eps": group["eps"]}

    @staticmethod
    def direction(
        param: Entries, grad: Entries, state: dict[str, Entries], n: Any
    ) -> Entries | Quotient:
        """The gradient over the root of the sum."""
        total = state["sum"].addcmul_(grad, grad)
        return grad, total.sqrt().add_(n["eps"])

    def fused_step(self, ready: list[Ready], group: dict[str, Any]) -> None:
        """Torch's kernel on the same state."""
        for param, _, state in ready:  # where the kernel reads it
            state["step"] = state["step"].to(param.device)
        params, grads, states = map(list, zip(*ready, strict=True))
        adagrad(
            params, grads, [s["sum"] for s in states], [s["step"] for s in states], fused=True,
            maximize=group["maximize"],
            **{name: group[name] for name in ("lr", "weight_decay", "lr_decay", "eps")},
        )  # fmt: skip
