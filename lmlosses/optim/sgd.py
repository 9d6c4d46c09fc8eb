"""Gradient descent with momentum, and descent by signs."""

from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from lmlosses._checks import check_in_unit_interval
from lmlosses.optim._base import Ready, state_dtype
from lmlosses.optim._elementwise import ElementwiseRule
from lmlosses.optim._tensors import Entries


class SGD(ElementwiseRule):
    r"""Gradient descent, with momentum if it is asked for.

    With gradient :math:`g_t` at step :math:`t \ge 1`, momentum :math:`\mu` and dampening
    :math:`\tau`,

    .. math::

        b_t &= \mu \, b_{t-1} + (1 - \tau) \, g_t , \qquad b_1 = g_1 \\
        w_{t+1} &= w_t - \eta \, b_t

    and :math:`g_t + \mu b_t` in place of :math:`b_t` under ``nesterov``. The first gradient is
    never dampened. Weight decay is the gradient of an L2 penalty: :math:`\lambda w_t` is added to
    :math:`g_t`.

    A gradient that does not change is followed with :math:`\eta / (1 - \mu)` in the end: momentum
    0.9 makes steps ten times as long.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`.
        momentum: Share :math:`\mu` of the last direction that is kept, in ``[0, 1)``. It may be
            scheduled, but not from zero, since only a group that has momentum at its first step
            gets a buffer.
        dampening: Share :math:`\tau` of a new gradient that is left out, in ``[0, 1]``.
        weight_decay: The number :math:`\lambda`.
        nesterov: Look ahead along the momentum; needs one, without dampening.
        maximize: Ascend instead of descending.
        foreach: See `ElementwiseRule`, as for ``compiled`` and ``stochastic_rounding``.
        compiled: Compile the rule.
        fused: Let torch's own fused kernel take the step; float32 and float64 only.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import SGD
        >>> w = torch.nn.Parameter(torch.tensor(0.0))
        >>> optimizer = SGD([w], lr=1.0, momentum=0.5)
        >>> for _ in range(3):
        ...     w.grad = torch.tensor(-1.0)
        ...     _ = optimizer.step()
        >>> w.data  # 1, then 1.5, then 1.75
        tensor(4.2500)

    References:
        Momentum: Polyak (1964), with :math:`\eta` outside of the buffer. Nesterov's form and this
        way of writing both: Sutskever et al. (2013). Notes, section 2.1, compare its weight decay.
    """

    remembered: ClassVar[dict[str, str]] = {"momentum": "momentum_buffer"}
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        fused: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "dampening": dampening,
             "weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize},
            foreach=foreach, compiled=compiled, fused=fused,
            stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """Momentum in ``[0, 1)``, dampening in ``[0, 1]``, Nesterov only where it is defined."""
        check_in_unit_interval(momentum=group["momentum"])
        check_in_unit_interval(dampening=group["dampening"], open_right=False)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov needs a positive momentum and no dampening; "
                f"got momentum {group['momentum']!r}, dampening {group['dampening']!r}"
            )

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The buffer at zero, if there is momentum."""
        if group["momentum"] == 0:
            return {}
        return {"momentum_buffer": torch.zeros_like(param, dtype=state_dtype(param))}

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """What is kept of the buffer and taken of the gradient; all of it at the first step."""
        dampening = group["dampening"]
        return {
            "kept": group["momentum"] or None,
            "new": 1 - dampening * (step > 1) if dampening else None,
            "ahead": group["momentum"] if group["nesterov"] else None,
        }

    @staticmethod
    def direction(param: Entries, grad: Entries, state: dict[str, Entries], n: Any) -> Entries:
        """The buffer, or what lies ahead of it."""
        if n["kept"] is None:
            return grad
        buffer = state["momentum_buffer"]
        buffer.mul_(n["kept"]).add_(grad if n["new"] is None else grad.mul(n["new"]))
        return buffer if n["ahead"] is None else buffer.mul(n["ahead"]).add_(grad)

    def fused_step(self, ready: list[Ready], group: dict[str, Any]) -> None:
        """Torch's kernel on the same state; it is told whose first step this is."""
        kinds: dict[bool, list[Ready]] = defaultdict(list)
        for one in ready:
            kinds[bool(one[2]["step"] == 0)].append(one)
        for first, alike in kinds.items():
            params, grads, states = map(list, zip(*alike, strict=True))
            buffers = [None if first else state.get("momentum_buffer") for state in states]
            sgd(
                params, grads, buffers, fused=True, maximize=group["maximize"],
                **{name: group[name] for name in
                   ("lr", "weight_decay", "momentum", "dampening", "nesterov")},
            )  # fmt: skip
            for state, buffer in zip(states, buffers, strict=True):
                state["step"] += 1
                if buffer is not None:
                    state["momentum_buffer"] = buffer


class SignSGD(ElementwiseRule):
    r"""Each entry moves by the learning rate, against the sign of its gradient.

    .. math::

        m_t &= \mu \, m_{t-1} + (1 - \mu) \, g_t \\
        w_{t+1} &= (1 - \eta \lambda) \, w_t - \eta \operatorname{sign} m_t

    with :math:`m_0 = 0`. Without momentum, :math:`m_t = g_t`; with it the method is also known as
    Signum. An entry whose :math:`m_t` is exactly zero only decays.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`.
        momentum: Decay rate :math:`\mu` of the mean whose sign is taken, in ``[0, 1)``.
        weight_decay: Decoupled decay :math:`\lambda`.
        maximize: Ascend instead of descending.
        foreach: See `ElementwiseRule`, as for the next two.
        compiled: Compile the rule.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import SignSGD
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> w.grad = torch.tensor([1e-6, -1e6, 0.0])
        >>> _ = SignSGD([w], lr=0.1).step()
        >>> w.data
        tensor([-0.1000,  0.1000,  0.0000])

    References:
        Bernstein et al. (2018), arXiv:1802.04434: signSGD and, with momentum, Signum. The
        decoupled decay is that of AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize},
            foreach=foreach, compiled=compiled, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """Momentum in ``[0, 1)``."""
        check_in_unit_interval(momentum=group["momentum"])

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The buffer at zero, if there is momentum."""
        if group["momentum"] == 0:
            return {}
        return {"momentum_buffer": torch.zeros_like(param, dtype=state_dtype(param))}

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """The share of the new gradient, if others have one."""
        return {"new": 1 - group["momentum"] if group["momentum"] else None}

    @staticmethod
    def direction(param: Entries, grad: Entries, state: dict[str, Entries], n: Any) -> Entries:
        """The sign of the gradient, or of its running mean."""
        if n["new"] is None:
            return grad.sign()
        return state["momentum_buffer"].lerp_(grad, n["new"]).sign()
