"""Schedule-Free AdamW: an average of the iterates in place of a decaying learning rate."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import (
    check_in_unit_interval,
    check_non_negative,
    check_number,
    check_open_unit_interval,
    check_whole,
)
from lmlosses.optim._base import state_dtype
from lmlosses.optim._elementwise import ElementwiseRule, local
from lmlosses.optim._tensors import Entries


class ScheduleFreeAdamW(ElementwiseRule):
    r"""AdamW on a fast sequence, evaluated at its average: no schedule, no stopping time.

    Three points start together. Gradients are taken at :math:`y`, steps at :math:`z`, and the
    model to use is the average :math:`x`. With :math:`g_t` the gradient at :math:`y_t` and
    :math:`t \ge 1`,

    .. math::

        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        z_{t+1} &= z_t - \eta_t \left( \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}
            + \lambda y_t \right) \\
        x_{t+1} &= (1 - c_t) \, x_t + c_t \, z_{t+1} , \qquad
            c_t = \frac{t^r \bar\eta_t^p}{\sum_{i \le t} i^r \bar\eta_i^p} \\
        y_{t+1} &= (1 - \beta_1) \, z_{t+1} + \beta_1 x_{t+1}

    where :math:`\eta_t` climbs to ``lr`` over the warmup and :math:`\bar\eta_t` is the largest of
    it so far. With ``r`` zero and no warmup :math:`c_t = 1/t`, a plain mean.

    The parameters hold :math:`y` while training. `eval` turns them into :math:`x` and `train` back
    into :math:`y`; :math:`x` is never stored. Evaluate and publish in evaluation mode. A
    checkpoint of parameters and `state_dict` taken at the same time goes on, in either mode, to
    the bit. Each change of mode rounds once, so save bfloat16 in training mode.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`; one to ten times larger than AdamW's with a schedule.
        betas: :math:`\beta_1`, how near gradients are taken to the average, in ``(0, 1)``, and the
            rate :math:`\beta_2` of the second moment, in ``[0, 1)``.
        eps: Added to the root, outside of it.
        weight_decay: The number :math:`\lambda`, taken at :math:`y`.
        warmup_steps: Steps over which :math:`\eta_t` climbs to ``lr``.
        r: Power of the step in the weights of the average.
        weight_lr_power: Power :math:`p` of the learning rate in them.
        maximize: Ascend instead of descending.
        foreach: See `ElementwiseRule`, as for the next two.
        compiled: Compile the rule.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import ScheduleFreeAdamW
        >>> w = torch.nn.Parameter(torch.tensor([4.0]))
        >>> optimizer = ScheduleFreeAdamW([w], lr=0.5)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     (w - 1).square().sum().backward()
        ...     _ = optimizer.step()
        >>> optimizer.eval()
        >>> bool((w - 1).abs() < 0.1)
        True

    References:
        Defazio et al. (2024), arXiv:2405.15682, algorithm 1, with the weights that its authors
        ship (``r``, and the largest rate so far for the rate). Bias is corrected by the number of
        gradients that a parameter has had; theirs counts the steps of its group.
    """

    state_names: ClassVar[tuple[str, ...]] = ("z", "exp_avg_sq")
    maskable: ClassVar[bool] = False  # three points move together

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        progress = {"k": 0, "train_mode": True, "lr_max": 0.0, "weight_sum": 0.0, "share": 0.0}
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
             "warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power,
             "maximize": maximize, **progress},
            foreach=foreach, compiled=compiled, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """``beta1`` strictly between 0 and 1: at 0 the average could not be found again."""
        check_open_unit_interval(beta1=group["betas"][0])
        check_in_unit_interval(beta2=group["betas"][1])
        check_whole(warmup_steps=group["warmup_steps"])
        check_non_negative(
            eps=group["eps"],
            warmup_steps=group["warmup_steps"],
            weight_lr_power=group["weight_lr_power"],
        )
        check_number("r", group["r"])

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The fast point at the parameter, the second moment at zero."""
        z = param.detach().to(state_dtype(param), copy=True)
        return {"z": z, "exp_avg_sq": torch.zeros_like(z)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `UpdateRule.step`.

        Raises:
            RuntimeError: In evaluation mode, where gradients are taken at the wrong point.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("step needs training mode: call the optimizer's train() before it")
        return super().step(closure)

    def train(self) -> None:
        """Let the parameters be the point where gradients are taken; nothing if they are it."""
        self._switch(to_train=True)

    def eval(self) -> None:
        """Let the parameters be the average, which is the model to use; nothing if they are it."""
        self._switch(to_train=False)

    @torch.no_grad()
    def _switch(self, *, to_train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == to_train:
                continue
            beta1 = group["betas"][0]
            towards_z = 1 - beta1 if to_train else 1 - 1 / beta1
            for param in group["params"]:
                if self.state[param]:
                    here, z = local(param), local(self.state[param]["z"])
                    here.copy_(here.to(z.dtype).lerp(z, towards_z))
            group["train_mode"] = to_train

    def update_group(self, ready: list[Any], group: dict[str, Any]) -> None:
        """Settle this step's share in the average, then move."""
        group["k"] += 1
        rate = _warm(group)
        largest = torch.maximum if isinstance(rate, Tensor) else max
        group["lr_max"] = largest(rate, _like(rate, group["lr_max"]))
        weight = group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        group["weight_sum"] = group["weight_sum"] + weight
        if isinstance(weight, Tensor):
            group["share"] = torch.nan_to_num(weight / group["weight_sum"])  # 0 / 0 at lr = 0
        else:
            group["share"] = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        super().update_group(ready, group)

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """Rates and share of this step; ``lr`` is that of the point of gradients."""
        beta1, beta2 = group["betas"]
        rate, share = _warm(group), group["share"]
        root = (1 - beta2**step) ** 0.5  # g / (sqrt(v) / root + eps) is root times a step below
        return {
            "lr": root * rate * (1 - beta1 * (1 - share)),
            "weight_decay": 0.0,
            "decay": group["weight_decay"] / root,
            "rate": root * rate,
            "share": share,
            "new2": 1 - beta2,
            "eps": group["eps"] * root,
        }

    @staticmethod
    def direction(param: Entries, grad: Entries, state: dict[str, Entries], n: Any) -> Entries:
        """The step of the fast point, which moves here and draws the point of gradients along."""
        z, exp_avg_sq, rate = state["z"], state["exp_avg_sq"], n["rate"]
        exp_avg_sq.lerp_(grad.mul(grad), n["new2"])
        step = grad.div(exp_avg_sq.sqrt().add_(n["eps"]))
        if isinstance(n["decay"], Tensor) or n["decay"] != 0:
            step.add_(param.mul(n["decay"]))
        param.lerp_(z, n["share"])
        if isinstance(rate, Tensor):
            z.sub_(step.mul(rate))
        else:
            z.add_(step, alpha=-rate)
        return step


def _warm(group: dict[str, Any]) -> Any:
    """The learning rate of step ``k``, counted from 1, on its way up or there."""
    return group["lr"] * min(1.0, group["k"] / max(1, group["warmup_steps"]))


def _like(rate: Any, number: Any) -> Any:
    """The number as a tensor beside a rate that is one."""
    if isinstance(rate, Tensor):
        return torch.as_tensor(number, dtype=rate.dtype, device=rate.device)
    return number
