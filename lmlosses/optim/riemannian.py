"""Descent along curved sets, on which every step stays."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import (
    check_in_unit_interval,
    check_min_ndim,
    check_non_negative,
    reads_values,
)
from lmlosses.optim._base import UpdateRule, state_dtype
from lmlosses.optim.manifolds import Euclidean, Manifold


class RiemannianRule(UpdateRule):
    """What `RiemannianSGD` and `RiemannianAdam` share: checks of manifolds and of points.

    Groups may have manifolds of their own: ``{"params": [...], "manifold": Sphere()}``. These are
    no part of a checkpoint, which then is of plain numbers and tensors.
    """

    def check_settings(self, group: dict[str, Any]) -> None:
        """A manifold that is one."""
        if not isinstance(group["manifold"], Manifold):
            raise TypeError(f"manifold must be a Manifold; got {group['manifold']!r}")

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Refuse a parameter that is off its manifold; values are read on the CPU only."""
        manifold = group["manifold"]
        if isinstance(manifold, Euclidean):
            return {}
        check_min_ndim("a parameter on a manifold", param, 1)
        if param.numel() and reads_values(param):
            worst = manifold.distance(param.to(state_dtype(param))).max().item()
            # what rounding each entry to the parameter's dtype may come to
            slack = 8 * torch.finfo(param.dtype).eps * param.shape[-1] ** 0.5
            if not worst <= slack:
                raise ValueError(
                    f"parameters must start on their manifold, {manifold!r}, where its project "
                    f"puts them; got one of shape {tuple(param.shape)} that is {worst:.3g} off"
                )
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Settings and state, without the manifolds."""
        found = super().state_dict()
        for group in found["param_groups"]:
            del group["manifold"]
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, to the bit, on this optimizer's manifolds.

        Args:
            state_dict: What `state_dict` of an optimizer of the same kind returned.

        Raises:
            ValueError: If groups, names or shapes are not those of this optimizer; nothing is
                loaded then.
        """
        pairs = zip(state_dict["param_groups"], self.param_groups, strict=False)
        groups = [{**saved, "manifold": group["manifold"]} for saved, group in pairs]
        groups += state_dict["param_groups"][len(groups) :]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def move(
        self, param: Tensor, direction: Tensor, carried: Tensor, group: dict[str, Any]
    ) -> None:
        """Walk against a direction and carry a vector along, both in place."""
        point, tangent = param.to(direction.dtype), -group["lr"] * direction
        carried.copy_(group["manifold"].transport(point, tangent, carried))
        param.copy_(group["manifold"].walk(point, tangent))


class RiemannianSGD(RiemannianRule):
    r"""Gradient descent with momentum on a manifold.

    With the metric's gradient :math:`\operatorname{grad} L` and the path that starts at :math:`x`
    in a direction,

    .. math::

        m_t &= \mu \, \tau_{t-1} + \operatorname{grad} L(x_{t-1}) \\
        x_t &= \operatorname{walk}_{x_{t-1}}(-\eta \, m_t) , \qquad
        \tau_t = m_t \text{ carried from } x_{t-1} \text{ to } x_t

    with :math:`\tau_0 = 0`. In plain space this is `SGD`.

    Args:
        params: Parameters, or groups of parameters with settings of their own, which start on
            the manifold.
        lr: Rate :math:`\eta`.
        momentum: The number :math:`\mu`, in ``[0, 1)``.
        manifold: Where the parameters live: `Sphere`, `Simplex` or `Euclidean`, or one of your
            own; a group may have another.
        maximize: Ascend instead of descending.

    Raises:
        ValueError: If a setting is outside its range; at a parameter's first step, if it is off
            its manifold.
        TypeError: If ``manifold`` is none.

    Example:
        >>> import torch
        >>> from lmlosses.optim.manifolds import Sphere
        >>> from lmlosses.optim.riemannian import RiemannianSGD
        >>> matrix = torch.diag(torch.tensor([3.0, 1.0]))
        >>> x = torch.nn.Parameter(torch.tensor([0.6, 0.8]))
        >>> optimizer = RiemannianSGD([x], lr=0.1, manifold=Sphere(), maximize=True)
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     (x @ matrix @ x).backward()
        ...     _ = optimizer.step()
        >>> x.data.round(decimals=4)  # the leading eigenvector
        tensor([1., 0.])

    References:
        Bonnabel (2013), Stochastic Gradient Descent on Riemannian Manifolds, arXiv:1111.5280.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.0,
        *,
        manifold: Manifold,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "manifold": manifold, "maximize": maximize}
        )

    def check_settings(self, group: dict[str, Any]) -> None:
        """Momentum in ``[0, 1)``."""
        super().check_settings(group)
        check_in_unit_interval(momentum=group["momentum"])

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The momentum at zero."""
        super().init_state(param, group)
        return {"momentum_buffer": torch.zeros_like(param, dtype=state_dtype(param))}

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Two lines of the equations, and `RiemannianRule.move`."""
        buffer = state["momentum_buffer"]
        slope = group["manifold"].gradient(param.to(buffer.dtype), grad.to(buffer.dtype))
        buffer.mul_(group["momentum"]).add_(slope)
        self.move(param, buffer, buffer, group)


class RiemannianAdam(RiemannianRule):
    r"""Adam on a manifold: one step size for each point, from the lengths of its gradients.

    .. math::

        g_t &= \operatorname{grad} L(x_{t-1}) \\
        m_t &= \beta_1 \, \tau_{t-1} + (1 - \beta_1) \, g_t , \qquad
        v_t = \beta_2 \, v_{t-1} + (1 - \beta_2) \, \lVert g_t \rVert_{x_{t-1}}^2 \\
        x_t &= \operatorname{walk}_{x_{t-1}} \left( -\eta \,
            \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \right) , \qquad
        \tau_t = m_t \text{ carried from } x_{t-1} \text{ to } x_t

    with :math:`\tau_0 = v_0 = 0`. An entry of a point has no step size of its own, since the
    quotient would leave the tangent space; a point has, so :math:`v` holds one number for each.
    In plain space, where each entry is a point, this is `Adam`.

    Args:
        params: Parameters, or groups of parameters with settings of their own, which start on
            the manifold.
        lr: Rate :math:`\eta`; on the sphere the first step turns by this angle, in radians.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two moments, each in ``[0, 1)``.
        eps: Added to the root.
        amsgrad: Divide by the largest :math:`v` so far, for which the paper proves convergence;
            the maximum is taken before the correction, as in `Adam`.
        manifold: See `RiemannianSGD`.
        maximize: Ascend instead of descending.

    Raises:
        ValueError: If a setting is outside its range; at a parameter's first step, if it is off
            its manifold.
        TypeError: If ``manifold`` is none.

    Example:
        >>> import torch
        >>> from lmlosses.optim.manifolds import Sphere
        >>> from lmlosses.optim.riemannian import RiemannianAdam
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> x.grad = torch.tensor([5.0, -0.01])  # along the point, and a little to the north
        >>> _ = RiemannianAdam([x], lr=0.1, manifold=Sphere()).step()
        >>> x.data  # a tenth of a radian to the north
        tensor([0.9950, 0.0998])

    References:
        Bécigneul and Ganea (2019), arXiv:1810.00760, figure 1, which leaves out :math:`\epsilon`
        and the correction of the moments for their start at zero.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        *,
        manifold: Manifold,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "amsgrad": amsgrad, "manifold": manifold,
             "maximize": maximize},
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """Both rates in ``[0, 1)``, ``eps`` not negative."""
        super().check_settings(group)
        check_non_negative(eps=group["eps"])
        check_in_unit_interval(beta1=group["betas"][0], beta2=group["betas"][1])

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Both moments at zero: a vector, and a number for each point."""
        super().init_state(param, group)
        exp_avg = torch.zeros_like(param, dtype=state_dtype(param))
        lengths = torch.zeros_like(group["manifold"].inner(exp_avg, exp_avg, exp_avg))
        state = {"exp_avg": exp_avg, "exp_avg_sq": lengths}
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(lengths)
        return state

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """The equations line by line."""
        manifold, (beta1, beta2) = group["manifold"], group["betas"]
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        point = param.to(exp_avg.dtype)
        slope = manifold.gradient(point, grad.to(exp_avg.dtype))
        exp_avg.lerp_(slope, 1 - beta1)
        exp_avg_sq.lerp_(manifold.inner(point, slope, slope), 1 - beta2)
        if group["amsgrad"]:
            largest = state["max_exp_avg_sq"]
            exp_avg_sq = largest.copy_(largest.maximum(exp_avg_sq))
        steps = state["step"].item()
        bias1, bias2 = 1 - beta1**steps, 1 - beta2**steps
        root = (exp_avg_sq / bias2).sqrt() + group["eps"]
        self.move(param, exp_avg / bias1 / root, exp_avg, group)
