"""Sophia: momentum over curvature, clipped, with two ways to estimate the curvature."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import ParamsT

from lmlosses._checks import (
    check_bool,
    check_floating,
    check_in_unit_interval,
    check_leading_shape,
    check_ndim,
    check_not_empty_axis,
    check_positive,
    check_same_device,
    check_whole,
    compute_dtype,
)
from lmlosses.optim._base import state_dtype
from lmlosses.optim._elementwise import ElementwiseRule
from lmlosses.optim._tensors import Entries

AGE = "curvature_age"  # steps taken since the last estimate, on the CPU; infinite before the first


class Sophia(ElementwiseRule):
    r"""What `SophiaG` and `SophiaH` share: the step, and the watch on the curvature's age.

    A step without a curvature, or with one that has served ``update_every`` steps, is an error:
    the clip would otherwise turn it into a sign step, and nobody would notice.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "hessian")
    counters: ClassVar[tuple[str, ...]] = ("step", AGE)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        weight_decay: float,
        update_every: int,
        *,
        maximize: bool,
        foreach: bool | None,
        compiled: bool,
        stochastic_rounding: bool,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay,
             "update_every": update_every, "maximize": maximize},
            foreach=foreach, compiled=compiled, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """Both rates in ``[0, 1)``; ``gamma``, ``eps`` and ``update_every`` positive."""
        check_in_unit_interval(beta1=group["betas"][0], beta2=group["betas"][1])
        check_whole(update_every=group["update_every"])
        check_positive(gamma=group["gamma"], eps=group["eps"], update_every=group["update_every"])

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Both averages at zero, and a curvature that was never estimated."""
        return {**super().init_state(param, group), AGE: torch.tensor(math.inf)}

    def numbers(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """The share of the new gradient, the scale of the curvature and its floor."""
        return {"new": 1 - group["betas"][0], "gamma": group["gamma"], "eps": group["eps"]}

    @staticmethod
    def direction(param: Entries, grad: Entries, state: dict[str, Entries], n: Any) -> Entries:
        """Algorithm 3, line 13: the clipped quotient."""
        exp_avg = state["exp_avg"].lerp_(grad, n["new"])
        curvature = state["hessian"].mul(n["gamma"]).clamp_min_(n["eps"])
        return exp_avg.div(curvature).clamp_(-1.0, 1.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss; optional.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a parameter with a gradient has no curvature, or one that is too
                old. Nothing has moved then.
            TypeError: If a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._check_age(self._age(param), group["update_every"])
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param][AGE] += 1
        return loss

    @property
    def needs_curvature(self) -> bool:
        """Whether the next step wants `update_curvature` first.

        Parameters that the last update did not reach are not asked.
        """
        return any(
            not self.state.get(param) or group["update_every"] <= self._age(param) < math.inf
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad
        )

    def _age(self, param: Tensor) -> float:
        state = self.state.get(param)
        return float(state[AGE]) if state else math.inf

    def _check_age(self, age: float, update_every: int) -> None:
        if age < update_every:
            return
        found = (
            "a parameter with a gradient has no curvature: none was estimated, or what it was "
            "estimated from did not depend on this parameter"
            if age == math.inf
            else f"the curvature has served {age:.0f} steps, and update_every is {update_every}"
        )
        raise RuntimeError(f"{found}; call {type(self).__name__}.update_curvature before step")

    def _trainable(self, name: str, value: Tensor) -> list[Tensor]:
        """The parameters to differentiate in, if ``value`` has a graph at all."""
        if not value.requires_grad:
            raise ValueError(f"{name} must depend on the parameters; got a tensor without a graph")
        return [
            param for group in self.param_groups for param in group["params"]
            if param.requires_grad
        ]  # fmt: skip

    @torch.no_grad()
    def _average_in(
        self, name: str, params: Sequence[Tensor], estimates: Sequence[Tensor | None]
    ) -> None:
        """Algorithm 3, line 8. What was not reached keeps its average and goes on aging."""
        if all(estimate is None for estimate in estimates):
            raise ValueError(f"{name} must depend on a parameter of this optimizer")
        found = dict(zip(params, estimates, strict=True))
        for group in self.param_groups:
            for param in group["params"]:
                if param not in found:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state.update(self.init_state(param, group))
                estimate = found[param]
                if estimate is not None:
                    estimate = self.estimate_of(estimate, group)
                    state["hessian"].lerp_(estimate, 1 - group["betas"][1])
                    state[AGE].zero_()

    def estimate_of(self, estimate: Tensor, group: dict[str, Any]) -> Tensor:
        """The estimate as it enters the average of a group."""
        return estimate


def _dense(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients in the dtype of the state."""
    for grad in grads:
        if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
            raise TypeError(f"Sophia takes dense real gradients; got {grad.layout}, {grad.dtype}")
    return [
        None if grad is None else grad.to(state_dtype(param))
        for grad, param in zip(grads, params, strict=True)
    ]


def _sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One class a row from the softmax: the first of exponential clocks that run at its rates.

    Exact for rare classes as well, and unlike `torch.multinomial` it takes a generator of any
    device; nothing waits for a device.
    """
    device = logits.device if generator is None else generator.device
    clock = torch.empty(logits.shape, dtype=logits.dtype, device=device)
    clock.exponential_(generator=generator).clamp_min_(torch.finfo(logits.dtype).tiny)
    return (logits - clock.to(logits.device, non_blocking=True).log_()).argmax(dim=-1)


class SophiaG(Sophia):
    r"""Sophia with the Gauss–Newton–Bartlett estimate, for models that predict classes.

    Every :math:`k` steps labels :math:`\hat y_b` are drawn from the model's own predictions at
    the :math:`B` counted positions, and the gradient of their mean cross-entropy is squared:

    .. math::

        \hat g &= \nabla_\theta \, \frac{1}{B} \sum_b -\log p_\theta(\hat y_b \mid x_b) , \qquad
        h \gets \beta_2 h + (1 - \beta_2) \, B \, \hat g^2 \\
        m &\gets \beta_1 m + (1 - \beta_1) \, g \\
        \theta &\gets (1 - \eta \lambda) \, \theta - \eta \,
            \operatorname{clip}\!\left( \frac{m}{\max(\gamma h, \epsilon)} , 1 \right)

    with :math:`m = h = 0` at first. No entry moves by more than :math:`\eta`, apart from the
    decay. :math:`B \, \hat g^2` is right on average: its expectation is the diagonal of the
    Gauss–Newton matrix, which for logits is the Fisher information. The true labels have no part
    in it; with them :math:`\hat g` would be the ordinary gradient, which vanishes at a minimum,
    where the curvature does not.

    Args:
        params: Parameters, or groups of parameters with settings of their own.
        lr: Step size :math:`\eta`, the most an entry moves; about AdamW's, or a little less.
        betas: The rates :math:`\beta_1` of the momentum and :math:`\beta_2` of the curvature, each
            in ``[0, 1)``. An estimate comes every ``update_every`` steps, so at
            :math:`\beta_2 = 0.99` the average reaches back a thousand steps.
        gamma: Scale :math:`\gamma` of the curvature. The paper tunes it until a tenth to a half of
            the entries are not clipped.
        eps: Floor :math:`\epsilon` of the denominator.
        weight_decay: Decoupled decay :math:`\lambda`.
        update_every: The number :math:`k` of steps that an estimate may serve.
        maximize: Ascend instead of descending; the curvature is used as it is.
        foreach: See `ElementwiseRule`, as for the next two.
        compiled: Compile the rule.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is outside its range.
        TypeError: If ``update_every`` is no whole number.

    Example:
        >>> import torch
        >>> from lmlosses.optim import SophiaG
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = SophiaG(model.parameters(), lr=0.01)
        >>> inputs, targets = torch.randn(8, 2), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
        >>> for _ in range(25):
        ...     logits = model(inputs)
        ...     if optimizer.needs_curvature:  # before steps 1, 11 and 21
        ...         optimizer.update_curvature(logits)
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(logits, targets).backward()
        ...     _ = optimizer.step()

    Notes:
        This is the algorithm of the paper's version 4. Version 1 clips at :math:`\rho` instead,
        :math:`\eta_1 \operatorname{clip}(m / \max(h, \epsilon_1), \rho)`: the same step with
        :math:`\eta = \eta_1 \rho`, :math:`\gamma = \rho`, :math:`\epsilon = \rho \epsilon_1` and
        :math:`\lambda = \lambda_1 / \rho`. The authors' code keeps :math:`B` out of its average
        and multiplies by ``bs`` in the step: its ``rho`` is our ``gamma`` if its ``bs`` is the
        number of positions of the estimate. It adds 1e-15 where the paper takes a maximum, and
        its loop takes the first :math:`k` steps with :math:`h = 0`, which are sign steps.

        As in the paper neither average is corrected for its start at zero. The curvature's
        needs a thousand steps for 63 % of its size at the defaults, so that early on more entries
        are clipped than later.

        The estimate is this process's own. With replicas, average ``state[param]["hessian"]``
        over them after each update.

    References:
        Liu et al. (2023), arXiv:2305.14342, algorithms 2 and 3. Notes, section 2.3.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        update_every: int = 10,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, gamma, eps, weight_decay, update_every, maximize=maximize,
            foreach=foreach, compiled=compiled, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def update_curvature(
        self,
        logits: Float[Tensor, "*batch vocab"],
        mask: Bool[Tensor, "*batch"] | None = None,
        *,
        generator: torch.Generator | None = None,
        retain_graph: bool = True,
    ) -> None:
        r"""Average in a new estimate, from the logits of a batch and nothing else.

        The logits of the training step itself will do, before or after its backward pass; some
        of their rows are enough. Neither gradients nor parameters are touched. Parameters that
        the logits do not depend on keep their curvature, and age.

        Args:
            logits: The model's output with its graph.
            mask: True where a position counts; all do without it. Where none does, the estimate
                is zero.
            generator: Source of the labels, on any device; torch's own without it.
            retain_graph: Whether the logits will be differentiated again, by a backward pass of
                the training loss that comes after.

        Raises:
            TypeError: If ``logits`` is not floating point, ``mask`` not boolean, or a gradient
                sparse or complex.
            ValueError: If ``mask`` does not fit ``logits``, or these depend on no parameter here.
        """
        check_floating(logits=logits)
        check_not_empty_axis("logits", logits)
        if mask is not None:
            check_bool(mask=mask)
            check_leading_shape("mask", mask, of="logits", reference=logits)
            check_same_device(of="logits", reference=logits, mask=mask)
        params = self._trainable("logits", logits)
        with torch.enable_grad():
            loss, count = _mean_at_own_labels(logits, mask, generator)
        grads = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
        estimates = [
            None if grad is None else grad.square().mul_(count) for grad in _dense(grads, params)
        ]
        self._average_in("logits", params, estimates)


def _mean_at_own_labels(
    logits: Tensor, mask: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | int]:
    """Algorithm 2 up to its gradient: the mean loss, and the number of labels in it."""
    rows = logits.to(compute_dtype(logits)).reshape(-1, logits.shape[-1])
    if mask is not None:
        rows = rows.masked_fill(~mask.reshape(-1, 1), 0.0)
    labels = _sample(rows.detach(), generator)
    losses = functional.cross_entropy(rows, labels, reduction="none")
    if mask is None:
        return losses.sum() / max(len(rows), 1), len(rows)
    count = mask.sum()
    return losses.masked_fill(~mask.reshape(-1), 0.0).sum() / count.clamp(min=1), count


class SophiaH(Sophia):
    r"""Sophia with Hutchinson's estimate, for any loss that can be differentiated twice.

    Every :math:`k` steps one vector :math:`u` of random signs goes through the Hessian
    :math:`H` of a loss:

    .. math::

        h &\gets \beta_2 h + (1 - \beta_2) \; u \odot (H u) \\
        m &\gets \beta_1 m + (1 - \beta_1) \, g \\
        \theta &\gets (1 - \eta \lambda) \, \theta - \eta \,
            \operatorname{clip}\!\left( \frac{m}{\max(\gamma h, \epsilon)} , 1 \right)

    with :math:`m = h = 0` at first. The expectation of :math:`u \odot (H u)` is the diagonal of
    :math:`H`, negative entries included; where :math:`h` is negative, the floor and the clip make
    it a sign step.

    Settings as for `SophiaG`, but for the default ``gamma=0.01``; under ``maximize`` the curvature
    is that of the negated loss.

    Raises:
        ValueError: If a setting is outside its range.
        TypeError: If ``update_every`` is no whole number.

    Example:
        >>> import torch
        >>> from lmlosses.optim import SophiaH
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = SophiaH([w], lr=0.5, betas=(0.0, 0.0), gamma=1.0, weight_decay=0.0)
        >>> loss = (w.square() * torch.tensor([4.0, -4.0])).sum() / 2
        >>> optimizer.update_curvature(loss)  # [4, -4]
        >>> loss.backward()
        >>> _ = optimizer.step()  # half of Newton's step, and a sign step downhill
        >>> w.data
        tensor([0.5000, 1.5000])

    Notes:
        The paper draws :math:`u` from the normal distribution. Signs have the same expectation
        and less variance: :math:`\sum_{j \ne i} H_{ij}^2` for entry :math:`i`, where the normal
        distribution adds :math:`2 H_{ii}^2`. On the rest, versions of the paper included, see
        `SophiaG`.

        The loss is differentiated twice. Attention must then run on torch's math backend
        (``torch.nn.attention.sdpa_kernel``), and a compiled model will not do.

    References:
        Liu et al. (2023), arXiv:2305.14342, algorithms 1 and 3. Notes, section 2.3.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        update_every: int = 10,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, gamma, eps, weight_decay, update_every, maximize=maximize,
            foreach=foreach, compiled=compiled, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def update_curvature(
        self,
        loss: Float[Tensor, ""],
        *,
        generator: torch.Generator | None = None,
        retain_graph: bool = True,
    ) -> None:
        r"""Average in a new estimate, from the loss of a batch.

        The loss of the training step itself will do, before its backward pass; neither gradients
        nor parameters are touched. Parameters that the loss does not depend on keep their
        curvature, and age; those it is linear in have curvature zero.

        Args:
            loss: The mean loss of a batch with its graph.
            generator: Source of the signs, on any device; torch's own without it.
            retain_graph: Whether the loss will be differentiated again.

        Raises:
            TypeError: If ``loss`` is not floating point, or a gradient sparse or complex.
            ValueError: If ``loss`` is not one number or depends on no parameter here.
        """
        check_floating(loss=loss)
        check_ndim("loss", loss, 0)
        params = self._trainable("loss", loss)
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            _dense(grads, params)
            signs = [_signs_like(param, generator) for param in params]
            slope = loss.new_zeros(())
            for grad, sign in zip(grads, signs, strict=True):
                if grad is not None:
                    slope = slope + (grad * sign).sum()
        products: Sequence[Tensor | None] = [None] * len(params)
        if slope.requires_grad:
            products = torch.autograd.grad(
                slope, params, retain_graph=retain_graph, allow_unused=True
            )
        estimates = [
            None if grad is None
            else torch.zeros_like(sign) if product is None  # linear in this parameter
            else sign * product
            for grad, sign, product in zip(grads, signs, _dense(products, params), strict=True)
        ]  # fmt: skip
        self._average_in("loss", params, estimates)

    def estimate_of(self, estimate: Tensor, group: dict[str, Any]) -> Tensor:
        """The curvature of the negated loss where that is what goes down."""
        return -estimate if group["maximize"] else estimate


def _signs_like(param: Tensor, generator: torch.Generator | None) -> Tensor:
    """Minus and plus one with equal chances, in the dtype of the state."""
    device = param.device if generator is None else generator.device
    coins = torch.randint(2, param.shape, generator=generator, device=device)
    return (2 * coins - 1).to(param.device, state_dtype(param), non_blocking=True)
