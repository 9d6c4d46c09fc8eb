"""Criteria for people who replace those of ``torch.nn``: the same arguments, the same numbers.

Each module here has the name and the arguments of its model in ``torch.nn`` and gives its result
within 4 units in the last place, in float32 and float64. It departs from it on purpose where:

* half-precision input gives a float32 loss, computed in float32;
* a mean over nothing (an empty batch, every target ignored, class weights that sum to zero) is 0
  with zero gradients, not NaN, and what stands in an ignored row never reaches a gradient;
* shapes that do not match are refused instead of broadcast with a warning;
* targets are checked on the CPU and never on a GPU, so that no call waits for one;
* ``size_average`` and ``reduce``, long replaced by ``reduction``, are refused.

`LinearCrossEntropyLoss` and `linear_cross_entropy`, which take the hidden states instead of the
logits, agree with their models in torch to the rounding of the products.

The functions in `lmlosses.losses`, followed by a named reduction, say more with less.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from lmlosses._checks import (
    check_floating,
    check_in_unit_interval,
    check_indices,
    check_integer,
    check_min_ndim,
    check_non_negative,
    check_not_empty_axis,
    check_positive,
    check_same_shape,
    check_shape,
    check_tensor,
    compute_dtype,
    reads_values,
)
from lmlosses.logprobs import linear_token_stats, token_stats
from lmlosses.logprobs._arguments import WORKSPACE
from lmlosses.losses import language
from lmlosses.losses.classification import (
    _binary_cross_entropy_as_torch,
    _check_broadcasts,
    _soft_cross_entropy_terms,
)
from lmlosses.losses.divergence import _kl_log_terms, _kl_terms
from lmlosses.losses.ranking import margin_ranking
from lmlosses.losses.regression import (
    _gaussian_nll_of_variances,
    absolute_error,
    huber,
    squared_error,
)
from lmlosses.reductions import masked_sum, token_mean

Reduction = Literal["none", "mean", "sum"]


class _Criterion(torch.nn.Module):
    """Holds the reduction, which is all that the criteria have in common."""

    _reductions: tuple[str, ...] = ("none", "mean", "sum")

    def __init__(self, size_average: None, reduce: None, reduction: str) -> None:
        super().__init__()
        for name, value in {"size_average": size_average, "reduce": reduce}.items():
            if value is not None:
                raise ValueError(f"{name} was replaced by reduction; got {name}={value!r}")
        if reduction not in self._reductions:
            raise ValueError(
                f"reduction must be one of {', '.join(self._reductions)}; got {reduction!r}"
            )
        self.reduction = reduction

    def _reduce(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.reduction == "none":
            return losses if mask is None else losses.masked_fill(~mask, 0.0)
        return token_mean(losses, mask) if self.reduction == "mean" else masked_sum(losses, mask)


def _checked_target(input: Tensor, target: Tensor) -> Tensor:
    """A target of the input's shape; whole numbers become floating point, as in torch."""
    check_floating(input=input)
    check_tensor(target=target)
    check_same_shape("target", target, of="input", reference=input)
    return target if target.is_floating_point() else target.to(compute_dtype(input))


class MSELoss(_Criterion):
    """Squared error as a module: `lmlosses.losses.squared_error`, then a reduction.

    Args:
        size_average: Refused; use ``reduction``.
        reduce: Refused; use ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        >>> import torch
        >>> from lmlosses.nn import MSELoss
        >>> MSELoss()(torch.tensor([3.0, -1.0]), torch.tensor([0.0, 1.0]))
        tensor(6.5000)
    """

    def __init__(
        self, size_average: None = None, reduce: None = None, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(size_average, reduce, reduction)

    def forward(
        self, input: Float[Tensor, "*batch"], target: Shaped[Tensor, "*batch"]
    ) -> Float[Tensor, "..."]:
        """Loss of predictions (``input``) against targets of the same shape."""
        return self._reduce(squared_error(input, _checked_target(input, target)))


class L1Loss(_Criterion):
    """Absolute error as a module: `lmlosses.losses.absolute_error`, then a reduction.

    Args:
        size_average: Refused; use ``reduction``.
        reduce: Refused; use ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        >>> import torch
        >>> from lmlosses.nn import L1Loss
        >>> L1Loss(reduction="sum")(torch.tensor([3.0, -1.0]), torch.tensor([0.0, 1.0]))
        tensor(5.)
    """

    def __init__(
        self, size_average: None = None, reduce: None = None, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(size_average, reduce, reduction)

    def forward(
        self, input: Float[Tensor, "*batch"], target: Shaped[Tensor, "*batch"]
    ) -> Float[Tensor, "..."]:
        """Loss of predictions (``input``) against targets of the same shape."""
        return self._reduce(absolute_error(input, _checked_target(input, target)))


class HuberLoss(_Criterion):
    """Huber loss as a module: `lmlosses.losses.huber`, then a reduction.

    Args:
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        delta: The error beyond which the loss grows linearly.

    Raises:
        TypeError: If ``delta`` is not a number.
        ValueError: If ``reduction`` is none of these or ``delta`` not positive.

    Example:
        >>> import torch
        >>> from lmlosses.nn import HuberLoss
        >>> HuberLoss(reduction="none")(torch.tensor([0.5, 3.0]), torch.zeros(2))
        tensor([0.1250, 2.5000])
    """

    def __init__(self, reduction: Reduction = "mean", delta: float = 1.0) -> None:
        super().__init__(None, None, reduction)
        check_positive(delta=delta)
        self.delta = delta

    def forward(
        self, input: Float[Tensor, "*batch"], target: Shaped[Tensor, "*batch"]
    ) -> Float[Tensor, "..."]:
        """Loss of predictions (``input``) against targets of the same shape."""
        return self._reduce(huber(input, _checked_target(input, target), delta=self.delta))


def _checked_variances(input: Tensor, var: Tensor | float) -> Tensor:
    """Variances of the input's shape, from any of the shapes torch takes."""
    if not isinstance(var, Tensor):
        check_non_negative(var=var)
        return torch.full_like(input, var, dtype=compute_dtype(input))
    check_floating(var=var)
    wanted = tuple(input.shape)
    if tuple(var.shape) == wanted[:-1] != wanted:
        var = var.unsqueeze(-1)
    pairs = zip(var.shape, wanted, strict=False)
    differing = [size for size, of_input in pairs if size != of_input]
    if var.ndim != input.ndim or differing not in ([], [1]):
        raise ValueError(
            f"var must have shape {wanted}, the shape of input, or that with one axis of "
            f"size 1 or without its last axis; got {tuple(var.shape)}"
        )
    if reads_values(var) and var.numel() > 0:
        smallest = var.detach().min().item()
        if not smallest >= 0:
            raise ValueError(f"var must not be negative or NaN; got {smallest:.3g}")
    return var.to(compute_dtype(input, var)).expand(wanted)


class GaussianNLLLoss(_Criterion):
    """Gaussian negative log-likelihood as a module, from variances.

    It differs from `lmlosses.losses.gaussian_nll` as torch does: it takes variances instead of
    their logarithms, raises those below ``eps`` to it (the gradient passes as if it had not), and
    leaves out the constant of half log 2 pi unless ``full`` is set.

    Args:
        full: Whether to include the constant.
        eps: Least variance.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        TypeError: If ``eps`` is not a number.
        ValueError: If ``reduction`` is none of these or ``eps`` not positive.

    Example:
        >>> import torch
        >>> from lmlosses.nn import GaussianNLLLoss
        >>> GaussianNLLLoss(full=True)(torch.zeros(2), torch.tensor([0.0, 1.0]), torch.ones(2))
        tensor(1.1689)
    """

    def __init__(
        self, *, full: bool = False, eps: float = 1e-6, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(None, None, reduction)
        check_positive(eps=eps)
        self.full = full
        self.eps = eps

    def forward(
        self,
        input: Float[Tensor, "*batch"],
        target: Shaped[Tensor, "*batch"],
        var: Float[Tensor, "..."] | float,
    ) -> Float[Tensor, "..."]:
        """Loss of means (``input``) and variances.

        ``var`` has the shape of the input, or that shape with one axis of size 1, or without
        its last axis, or is one number for all.
        """
        target = _checked_target(input, target)
        var = _checked_variances(input, var).clone()
        with torch.no_grad():
            var.clamp_(min=self.eps)
        losses = _gaussian_nll_of_variances(input, target, var)
        return self._reduce(losses + 0.5 * math.log(2 * math.pi) if self.full else losses)


def _sum_of_samples(values: Tensor) -> Tensor:
    """Sum in the order of additions of torch's own loss of class indices, by that very loss.

    ``values.sum()`` is a little more accurate, and up to six units in the last place from torch.
    """
    column = -values.reshape(-1, 1)
    first = torch.zeros(len(column), dtype=torch.long, device=values.device)
    return F.nll_loss(column, first, reduction="sum")


class CrossEntropyLoss(_Criterion):
    """Cross-entropy as a module, with the classes along axis 1 and an ignore index.

    Args:
        weight: Factor for each class. A mean over class indices divides by the weights of the
            targets that count.
        size_average: Refused; use ``reduction``.
        ignore_index: Target index that does not count; class indices only.
        reduce: Refused; use ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: Share of the target mass that is spread evenly over the classes whose
            logit is not ``-inf``.

    Raises:
        TypeError: If ``weight`` is not floating point or ``label_smoothing`` not a number.
        ValueError: If ``reduction`` is none of these or ``label_smoothing`` outside ``[0, 1]``.

    Example:
        >>> import torch
        >>> from lmlosses.nn import CrossEntropyLoss
        >>> logits = torch.zeros(2, 4, 3)  # batch, classes, time
        >>> CrossEntropyLoss()(logits, torch.tensor([[0, 1, -100], [-100, 2, 3]]))
        tensor(1.3863)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, " classes"] | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        if weight is not None:
            check_floating(weight=weight)
        check_in_unit_interval(open_right=False, label_smoothing=label_smoothing)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(
        self, input: Float[Tensor, "..."], target: Shaped[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Loss of logits (``input``) ``[classes]`` or ``[batch, classes, *axes]``.

        ``target`` has that shape without the classes and holds indices, or has that very shape
        and holds probabilities: its dtype decides.
        """
        check_floating(input=input)
        check_tensor(target=target)
        check_min_ndim("input", input, 1)
        axis = 1 if input.ndim > 1 else 0
        check_not_empty_axis("input", input, axis)
        if self.weight is not None:
            classes = (input.shape[axis],)
            check_shape("weight", self.weight, classes, meaning="one entry per class")
        if target.is_floating_point():
            return self._of_probabilities(input, target, axis)
        return self._of_indices(input, target, axis)

    def _of_indices(self, input: Tensor, target: Tensor, axis: int) -> Tensor:
        shape = (*input.shape[:axis], *input.shape[axis + 1 :])
        check_shape("target", target, shape, meaning="the shape of input without its classes")
        counted = target != self.ignore_index
        target = target.masked_fill(~counted, 0)
        of = "the classes of input, or be ignore_index"
        check_indices("target", target, input.shape[axis], of=of)
        weight = None if self.weight is None else self.weight.to(compute_dtype(input))
        stats = token_stats(
            input.movedim(axis, -1),
            target,
            mask=counted,
            mean_logp=self.label_smoothing > 0,
            class_weight=weight,
            implementation="reference",  # torch's own order of additions
        )
        surprise = -stats.logps if weight is None else -stats.logps * weight[target.long()]
        spread = 0 * surprise if stats.mean_logp is None else -stats.mean_logp
        if self.reduction == "none":
            return (1 - self.label_smoothing) * surprise + self.label_smoothing * spread
        loss = (1 - self.label_smoothing) * _sum_of_samples(surprise)
        loss = loss + self.label_smoothing * spread.sum()
        if self.reduction == "sum":
            return loss
        weights = torch.ones_like(surprise) if weight is None else weight[target.long()]
        divisor = _sum_of_samples(weights.masked_fill(~counted, 0.0))
        return loss / torch.where(divisor > 0, divisor, 1.0)

    def _of_probabilities(self, input: Tensor, target: Tensor, axis: int) -> Tensor:
        check_same_shape("target", target, of="input", reference=input)
        if self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index needs targets that are class indices; got ignore_index="
                f"{self.ignore_index} with targets of {target.dtype}"
            )
        logps, weight = self._logps(input.to(compute_dtype(input, target)), axis)
        target = target.movedim(axis, -1)
        terms = _soft_cross_entropy_terms(logps, target, self.label_smoothing, weight)
        if self.reduction == "none":
            return terms.sum(dim=-1)
        # all at once, as torch does, and not class by class first
        return terms.sum() / (max(terms[..., 0].numel(), 1) if self.reduction == "mean" else 1)

    def _logps(self, input: Tensor, axis: int) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities, normalized along torch's axis as torch does, and moved to the end."""
        logps = input.to(compute_dtype(input)).log_softmax(dim=axis).movedim(axis, -1)
        return logps, None if self.weight is None else self.weight.to(logps.dtype)


def _check_options(options: None) -> None:
    if options is not None:
        raise ValueError(
            "options tune torch's chunks, and there are none to tune here: leave them out, and "
            f"give a workspace in bytes if need be; got {options!r}"
        )


def linear_cross_entropy(
    input: Float[Tensor, "..."],
    linear_weight: Float[Tensor, "..."],
    target: Shaped[Tensor, "..."],
    *,
    linear_bias: Float[Tensor, "..."] | None = None,
    weight: Float[Tensor, " classes"] | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: None = None,
    workspace: int = WORKSPACE,
) -> Float[Tensor, "..."]:
    """Cross-entropy of a linear layer's output, with the arguments of torch's function.

    It stands in for ``torch.nn.functional.linear_cross_entropy`` and gives its numbers to the
    rounding of the products. `lmlosses.linear_cross_entropy` is the same loss in this library's
    own terms, with more of them.

    Args:
        input: Hidden states ``[dim]`` or ``[batch, dim]``.
        linear_weight: Output matrix ``[classes, *axes, dim]``.
        target: Class indices ``[batch, *axes]``, or probabilities ``[batch, classes, *axes]``:
            the dtype decides. Probabilities have the size of the logits, which are then formed
            as a whole.
        linear_bias: Added to the logits, ``[classes, *axes]``.
        weight: Factor for each class. A mean over class indices divides by the weights of the
            targets that count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Target index that does not count, -100 by default; class indices only.
        label_smoothing: Share of the target mass that is spread evenly over the classes.
        options: Refused; there are no chunks to tune.
        workspace: Bytes to work in, as in `lmlosses.linear_cross_entropy`.

    Returns:
        A scalar, or one loss per target for ``"none"``, in at least float32.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes disagree, a setting is out of range, or ``options`` are given.

    Example:
        >>> import torch
        >>> from lmlosses.nn import linear_cross_entropy
        >>> linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, -100]))
        tensor(1.3863)
    """
    criterion = CrossEntropyLoss(weight=weight, reduction=reduction)
    _check_options(options)
    check_floating(input=input, linear_weight=linear_weight)
    check_tensor(target=target)
    check_min_ndim("input", input, 1)
    check_min_ndim("linear_weight", linear_weight, 2)
    if input.ndim > 2 or (input.ndim == 1 and linear_weight.ndim > 2):
        raise ValueError(
            "input must have shape [batch, dim], or [dim] with a linear_weight of two axes; got "
            f"{tuple(input.shape)} with {tuple(linear_weight.shape)}"
        )
    classes, *axes, dim = linear_weight.shape
    if linear_bias is not None:
        check_floating(linear_bias=linear_bias)
        meaning = "the shape of linear_weight without its last axis"
        check_shape("linear_bias", linear_bias, (classes, *axes), meaning=meaning)
    if target.is_floating_point():
        logits = F.linear(
            input,
            linear_weight.reshape(-1, dim),
            None if linear_bias is None else linear_bias.reshape(-1),
        )
        criterion.label_smoothing = label_smoothing
        if ignore_index is not None:
            criterion.ignore_index = ignore_index
        result: Tensor = criterion(logits.reshape(*input.shape[:-1], classes, *axes), target)
        return result

    shape = (*input.shape[:-1], *axes)
    check_shape("target", target, shape, meaning="the batch of input, then the axes of loss")
    index = -100 if ignore_index is None else ignore_index
    check_integer(target=target)
    indices = target.long().masked_fill(target.long() == index, 0)
    check_indices("target", indices, classes, of="the classes, or be ignore_index")
    if weight is not None:
        check_floating(weight=weight)
        check_shape("weight", weight, (classes,), meaning="one entry per class")
    settings: dict[str, Any] = {"ignore_index": index, "class_weight": weight}
    losses: Any = _per_target
    if reduction != "none":
        losses = language.linear_cross_entropy
        dtype = compute_dtype(input)
        settings["normalizer"] = _normalizer(target, index, weight, reduction, dtype)

    # each position along the axes has an output matrix of its own
    found = [
        losses(
            input,
            linear_weight.reshape(classes, -1, dim)[:, position],
            target.reshape(*input.shape[:-1], -1)[..., position],
            bias=None if linear_bias is None else linear_bias.reshape(classes, -1)[:, position],
            label_smoothing=label_smoothing,
            workspace=workspace,
            **settings,
        )
        for position in range(math.prod(axes))
    ]
    if reduction == "none":
        return torch.stack(found, dim=-1).reshape(shape)
    return torch.stack(found).sum()


def _normalizer(
    target: Tensor, index: int, weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> float | Tensor:
    """What torch divides by; 1 where nothing counts."""
    if reduction == "sum":
        return 1.0
    counted = target.long() != index
    if weight is None:
        total = counted.sum().to(dtype)
    else:
        of_targets = weight.to(dtype)[target.long().masked_fill(~counted, 0)]
        total = of_targets.masked_fill(~counted, 0.0).sum()
    return total.masked_fill(total == 0, 1.0)


def _per_target(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    class_weight: Tensor | None,
    label_smoothing: float,
    workspace: int,
) -> Tensor:
    """One loss per target, from statistics."""
    stats = linear_token_stats(
        hidden, weight, targets, bias, mean_logp=label_smoothing > 0, ignore_index=ignore_index,
        class_weight=class_weight, workspace=workspace,
    )  # fmt: skip
    target_weight = None
    if class_weight is not None:
        counted = targets.long() != ignore_index
        target_weight = class_weight.to(stats.logps.dtype)[targets.long().masked_fill(~counted, 0)]
    return language.token_cross_entropy(
        stats, label_smoothing=label_smoothing, target_weight=target_weight
    )


class LinearCrossEntropyLoss(_Criterion):
    """Linear layer and cross-entropy as one module, lean in memory, with torch's arguments.

    The layer is ``self.linear``, as in ``torch.nn.LinearCrossEntropyLoss``, whose state this
    module loads; to tie it to an embedding set ``criterion.linear.weight = embedding.weight``.

    Args:
        in_features: Size of the hidden states.
        num_classes: Number of classes.
        out_features: Further axes of the target, each position with an output matrix of its own.
        bias: Whether the layer has a bias.
        device: Where the layer is made.
        dtype: Of the layer.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: Factor for each class.
        ignore_index: Target index that does not count, -100 by default; class indices only.
        label_smoothing: Share of the target mass that is spread evenly over the classes.
        options: Refused; there are no chunks to tune.
        workspace: Bytes to work in, as in `lmlosses.linear_cross_entropy`.

    Raises:
        TypeError: If ``weight`` is not floating point or a setting is no number.
        ValueError: If a setting is out of range, ``weight`` has not one entry per class, or
            ``options`` are given.

    Example:
        >>> import torch
        >>> from lmlosses.nn import LinearCrossEntropyLoss
        >>> criterion = LinearCrossEntropyLoss(3, 4)
        >>> _ = torch.nn.init.zeros_(criterion.linear.weight)
        >>> print(f"{criterion(torch.ones(2, 3), torch.tensor([0, 3])).item():.4f}")
        1.3863
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Float[Tensor, " classes"] | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: None = None,
        workspace: int = WORKSPACE,
    ) -> None:
        super().__init__(None, None, reduction)
        _check_options(options)
        check_in_unit_interval(open_right=False, label_smoothing=label_smoothing)
        if weight is not None:
            check_floating(weight=weight)
            check_shape("weight", weight, (num_classes,), meaning="one entry per class")
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        rows = num_classes * math.prod(self.out_features)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.workspace = workspace

    def forward(
        self, input: Float[Tensor, "..."], target: Shaped[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Loss of hidden states (``input``) ``[dim]`` or ``[batch, dim]``."""
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, -1),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,  # type: ignore[arg-type]  # checked when it was set
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            workspace=self.workspace,
        )


class BCEWithLogitsLoss(_Criterion):
    """Binary cross-entropy of logits as a module.

    It keeps torch's order of operations, and with it torch's error of about one rounding step of
    the logit for a confident no. `lmlosses.losses.binary_cross_entropy` is exact there.

    Args:
        weight: Factor on each loss; broadcasts to the input.
        size_average: Refused; use ``reduction``.
        reduce: Refused; use ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        pos_weight: Factor on the positive term; broadcasts to the input.

    Raises:
        TypeError: If ``weight`` or ``pos_weight`` is not floating point.
        ValueError: If ``reduction`` is none of these.

    Example:
        >>> import torch
        >>> from lmlosses.nn import BCEWithLogitsLoss
        >>> BCEWithLogitsLoss()(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor(1.4100)
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "..."] | None = None,
        size_average: None = None,
        reduce: None = None,
        reduction: Reduction = "mean",
        pos_weight: Float[Tensor, "..."] | None = None,
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        for name, values in {"weight": weight, "pos_weight": pos_weight}.items():
            if values is not None:
                check_floating(**{name: values})
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(
        self, input: Float[Tensor, "*batch"], target: Shaped[Tensor, "*batch"]
    ) -> Float[Tensor, "..."]:
        """Loss of logits (``input``) against probabilities of the same shape."""
        target = _checked_target(input, target)
        for name, values in {"weight": self.weight, "pos_weight": self.pos_weight}.items():
            if values is not None:
                _check_broadcasts(name, values, of="input", reference=input)
        losses = _binary_cross_entropy_as_torch(input, target, self.pos_weight)
        if self.weight is not None:
            losses = losses * self.weight.to(losses.dtype)
        return self._reduce(losses)


class KLDivLoss(_Criterion):
    """Kullback-Leibler divergence of a target from the model, entry by entry, as a module.

    Like torch's it takes the model first and sums over nothing: ``reduction="mean"`` divides by
    the number of entries, classes included, and only ``"batchmean"`` gives the divergence of
    distributions ``[batch, classes]``. `lmlosses.losses.kl_divergence` sums over the classes.

    Args:
        size_average: Refused; use ``reduction``.
        reduce: Refused; use ``reduction``.
        reduction: ``"none"``, ``"mean"``, ``"sum"``, or ``"batchmean"``, which is the sum
            divided by the size of the first axis.
        log_target: Whether the target holds log-probabilities.

    Raises:
        ValueError: If ``reduction`` is none of these.

    Example:
        >>> import torch
        >>> from lmlosses.nn import KLDivLoss
        >>> model, target = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
        >>> KLDivLoss(reduction="batchmean")(model.log(), target)
        tensor(0.5108)
    """

    _reductions = ("none", "mean", "sum", "batchmean")

    def __init__(
        self,
        size_average: None = None,
        reduce: None = None,
        reduction: Literal["none", "mean", "sum", "batchmean"] = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.log_target = log_target

    def forward(
        self, input: Float[Tensor, "*batch"], target: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "..."]:
        """Terms of the divergence of ``target`` from log-probabilities (``input``)."""
        check_floating(input=input, target=target)
        check_same_shape("target", target, of="input", reference=input)
        terms = _kl_log_terms(target, input) if self.log_target else _kl_terms(target, input)
        if self.reduction == "batchmean":
            return masked_sum(terms) / (max(input.shape[0], 1) if input.ndim > 0 else 1)
        return self._reduce(terms)


class MarginRankingLoss(_Criterion):
    """Margin ranking as a module: `lmlosses.losses.margin_ranking`, then a reduction.

    Args:
        margin: The lead that is wanted, at least 0.
        size_average: Refused; use ``reduction``.
        reduce: Refused; use ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        TypeError: If ``margin`` is not a number.
        ValueError: If ``reduction`` is none of these or ``margin`` negative.

    Example:
        >>> import torch
        >>> from lmlosses.nn import MarginRankingLoss
        >>> loss = MarginRankingLoss(margin=1.0)
        >>> loss(torch.tensor([2.0, 2.0]), torch.tensor([1.5, 1.5]), torch.tensor([1.0, -1.0]))
        tensor(1.)
    """

    def __init__(
        self,
        margin: float = 0.0,
        size_average: None = None,
        reduce: None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        check_non_negative(margin=margin)
        self.margin = margin

    def forward(
        self,
        input1: Float[Tensor, "*batch"],
        input2: Float[Tensor, "*batch"],
        target: Shaped[Tensor, "*batch"],
    ) -> Float[Tensor, "..."]:
        """Loss of first and second scores; ``target`` is 1 where the first should lead, or -1."""
        check_floating(input1=input1, input2=input2)
        check_same_shape("input2", input2, of="input1", reference=input1)
        check_tensor(target=target)
        check_same_shape("target", target, of="input1", reference=input1)
        if not target.is_floating_point():
            target = target.to(compute_dtype(input1))
        return self._reduce(margin_ranking(input1, input2, target, margin=self.margin))


class LearnedTemperature(torch.nn.Module):
    r"""A temperature that is learned and stays within bounds.

    .. math:: \tau = e^{-a} , \qquad -\log \tau_{\max} \le a \le -\log \tau_{\min}

    The parameter is the logarithm of the inverse, as in CLIP, so that it is positive and a step
    changes it by a factor. A loss on separable pairs falls for ever as :math:`\tau \to 0`:
    whenever the temperature is read, the parameter is first moved back to the bound that it
    passed. Keep it out of weight decay, which pulls :math:`\tau` towards 1.

    Args:
        initial: The temperature to start from.
        smallest: The least temperature, 0.01 in CLIP.
        largest: The greatest.

    Raises:
        TypeError: If a setting is no number.
        ValueError: If they are not positive and in order.

    Example:
        >>> import torch
        >>> from lmlosses import nn
        >>> temperature = nn.LearnedTemperature(0.07)
        >>> temperature()
        tensor(0.0700, grad_fn=<ExpBackward0>)
        >>> _ = temperature.log_inverse.data.fill_(50.0)
        >>> temperature().item()
        0.009999999776482582

    References:
        Radford et al. (2021), Learning transferable visual models from natural language
        supervision, arXiv:2103.00020, section 2.5.
    """

    def __init__(
        self, initial: float = 0.07, *, smallest: float = 0.01, largest: float = 1.0
    ) -> None:
        super().__init__()
        check_positive(initial=initial, smallest=smallest, largest=largest)
        if not smallest <= initial <= largest:
            raise ValueError(
                f"initial must lie between smallest, {smallest!r}, and largest, {largest!r}; "
                f"got {initial!r}"
            )
        self.smallest, self.largest = float(smallest), float(largest)
        self.log_inverse = torch.nn.Parameter(torch.tensor(-math.log(initial)))

    def forward(self) -> Float[Tensor, ""]:
        """The temperature, a scalar tensor."""
        with torch.no_grad():
            self.log_inverse.clamp_(-math.log(self.largest), -math.log(self.smallest))
        return (-self.log_inverse).exp()
