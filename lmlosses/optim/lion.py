"""Lion: the sign of a momentum."""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_in_unit_interval
from lmlosses.optim._elementwise import ElementwiseRule
from lmlosses.optim._tensors import Entries


class Lion(ElementwiseRule):
    r"""Evolved sign momentum: each entry moves by the learning rate, up or down.

    .. math::

        c_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        \theta_t &= \theta_{t-1} - \eta \, (\operatorname{sign} c_t + \lambda \theta_{t-1}) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    with :math:`m_0 = 0`. One number per entry is remembered, where Adam remembers two. Only an
    entry whose :math:`c_t` is exactly zero stays where it is.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`; three to ten times smaller than AdamW's.
        betas: The rates :math:`\beta_1` of the step and :math:`\beta_2` of the memory, each in
            ``[0, 1)``.
        weight_decay: Decoupled decay :math:`\lambda`; as many times larger than AdamW's as
            ``lr`` is smaller.
        maximize: Ascend instead of descending.
        foreach: See `ElementwiseRule`, as for the next two.
        compiled: Compile the rule.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import Lion
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = Lion([w], lr=0.1)
        >>> (w * torch.tensor([1.0, -100.0])).sum().backward()
        >>> _ = optimizer.step()
        >>> w.data
        tensor([0.9000, 1.1000])

    References:
        Chen et al. (2023), arXiv:2302.06675, algorithm 2. Notes, section 2.2.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize},
            foreach=foreach, compiled=compiled, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """Both rates in ``[0, 1)``."""
        check_in_unit_interval(beta1=group["betas"][0], beta2=group["betas"][1])

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """The two rates."""
        beta1, beta2 = group["betas"]
        return {"new_in_step": 1 - beta1, "new_in_memory": 1 - beta2}

    @staticmethod
    def direction(param: Entries, grad: Entries, state: dict[str, Entries], n: Any) -> Entries:
        """The sign of the interpolated momentum."""
        exp_avg = state["exp_avg"]
        step = exp_avg.lerp(grad, n["new_in_step"]).sign_()
        exp_avg.lerp_(grad, n["new_in_memory"])
        return step
