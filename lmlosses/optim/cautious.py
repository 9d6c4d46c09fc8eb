"""Caution: leave out the entries in which a step disagrees with the gradient."""

from typing import Any, TypeVar, cast

from lmlosses.optim._elementwise import ElementwiseRule
from lmlosses.optim._tensors import Entries

Rule = TypeVar("Rule", bound=ElementwiseRule)

_MADE: dict[type[ElementwiseRule], type[ElementwiseRule]] = {}


def cautious(rule: type[Rule]) -> type[Rule]:
    r"""The same optimizer, moving only those entries in which step and gradient agree in sign.

    With :math:`u` the direction of the rule, :math:`g` the gradient, and :math:`d` entries in a
    tensor,

    .. math:: \theta \gets \theta - \eta \, \frac{d}{1 + \sum_i \phi_i} \; \phi \odot u ,
        \qquad \phi_i = 1 \text{ if } u_i g_i > 0 \text{ else } 0 .

    The factor returns to the others what the masked entries lost; where all agree it is
    :math:`d / (d + 1)`. In a tensor of one entry that is a half, as in the paper. The state of
    the rule knows nothing of the mask. Whatever momentum remembers, a small enough step never
    raises the loss whose gradient was given.

    Decoupled weight decay is left as it is: it shrinks all entries, masked or not. Decay that is
    added to the gradient belongs to the gradient with which directions are compared, except in
    `ADOPT`. The share is counted over a whole tensor, so nothing is sliced; of a
    sharded tensor each rank counts its own part.

    Args:
        rule: An optimizer whose `direction` points uphill, such as `Lion` or `AdamW`.

    Returns:
        A class with the arguments of ``rule``, the same at every call. Its instances can be
        pickled.

    Raises:
        TypeError: If ``rule`` is no `ElementwiseRule`, or one whose direction is no step.

    Example:
        >>> import torch
        >>> from lmlosses.optim import Lion, cautious
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = cautious(Lion)([w], lr=0.1)
        >>> w.grad = torch.tensor([1.0, 1.0, 1.0])
        >>> _ = optimizer.step()  # all agree: three quarters of the rate
        >>> w.data
        tensor([-0.0750, -0.0750, -0.0750])
        >>> w.grad = torch.tensor([1.0, 1.0, -0.01])
        >>> _ = optimizer.step()  # the last gradient turned round, its momentum did not
        >>> w.data
        tensor([-0.1750, -0.1750, -0.0750])

    References:
        Liang et al. (2024), arXiv:2411.16085, algorithm 1, with its default :math:`\xi = 1`.
    """
    if not (isinstance(rule, type) and issubclass(rule, ElementwiseRule)):
        raise TypeError(f"rule must be an ElementwiseRule such as Lion; got {rule!r}")
    if not getattr(rule, "maskable", True):
        raise TypeError(f"rule must be one that can skip entries; {rule.__name__} cannot")
    if rule not in _MADE:
        _MADE[rule] = _make(rule)
    return cast(type[Rule], _MADE[rule])


def _make(rule: type[ElementwiseRule]) -> type[ElementwiseRule]:
    def direction(param: Entries, grad: Entries, state: dict[str, Entries], n: Any) -> Entries:
        step: Any = rule.direction(param, grad, state, n)
        step = step[0].div(step[1]) if isinstance(step, tuple) else step
        # signs before the product: that of two small numbers may vanish
        kept = step.sign().mul_(grad.sign()).clamp_min_(0.0)
        factor = kept.sum().add_(1.0).reciprocal_().mul_(kept.numel())
        return kept.mul_(factor).mul_(step)  # type: ignore[no-any-return]  # a quotient or a step

    name = f"Cautious{rule.__name__}"
    direction.__qualname__ = f"{name}.direction"  # the compiler keeps rules apart by this
    return type(name, (_Cautious, rule), {
        "__doc__": f"`{rule.__name__}` with caution. See `cautious`.",
        "__module__": __name__,
        "rule": rule,
        "direction": staticmethod(direction),
        "sliced": False,
    })  # fmt: skip


class _Cautious(ElementwiseRule):
    """What all cautious classes share."""

    rule: type[ElementwiseRule]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; torch's fused kernels are refused, since they know no mask.

        Raises:
            ValueError: If ``fused`` is true.
        """
        if {**self.defaults, **param_group}["fused"]:
            raise ValueError("fused must be false, its kernels have no mask; got True")
        super().add_param_group(param_group)

    def __reduce__(self) -> Any:
        """Found again through its rule, since the class itself stands in no module."""
        return _blank, (self.rule,), self.__getstate__()


def _blank(rule: type[ElementwiseRule]) -> ElementwiseRule:
    kind = cautious(rule)
    return kind.__new__(kind)
