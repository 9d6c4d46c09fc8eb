"""Training in few digits: clipping, loss scaling, log-sum-exp, and where naive forms break."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lmlosses._checks import (
    check_floating,
    check_non_negative,
    check_not_empty_axis,
    check_open_unit_interval,
    check_positive,
    check_whole,
    compute_dtype,
    reads_values,
)

# ---- clipping


def _whole(tensor: Tensor) -> Tensor:
    """A sharded number, the same on every rank; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: Tensor) -> Tensor:
    """The part that lies here, in the same memory; the whole tensor if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _alike(tensors: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Tensors of one device and dtype together."""
    kinds = list(map(attrgetter("device", "dtype"), tensors))
    groups = dict.fromkeys(kinds, tensors)
    if len(groups) > 1:
        pairs = list(zip(tensors, kinds, strict=True))
        return {kind: [tensor for tensor, own in pairs if own == kind] for kind in groups}
    return groups


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """There, waiting only where it must: what comes to a processor has to have arrived."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _scaled_norm(tensor: Tensor) -> Tensor:
    """Divide by the largest entry first, so that no square overflows or vanishes."""
    if tensor.numel() == 0:
        return tensor.new_zeros((), dtype=torch.float64)
    largest = torch.linalg.vector_norm(tensor, math.inf)
    scale = largest.where(largest.isfinite() & (largest > 0), 1.0)
    norm: Tensor = torch.linalg.vector_norm(tensor / scale) * scale
    return _whole(norm)


def _careful_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm in float64, infinite or NaN only if an entry is."""
    if tensor.dtype == torch.float64:
        return _scaled_norm(tensor)
    return _whole(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _quick_norms(tensors: list[Tensor]) -> Iterable[Tensor]:
    """Euclidean norms of tensors of one dtype, in at least float32, without a look at squares."""
    dtype = compute_dtype(tensors[0])
    # one call for all: with small tensors the calls are what takes time. It knows neither
    # sharded tensors nor functorch's.
    plain = {type(tensor) for tensor in tensors} <= {Tensor, nn.Parameter}
    if plain and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        norms: tuple[Tensor, ...] = torch._foreach_norm(tensors, 2, dtype=dtype)
        return norms
    return [_whole(torch.linalg.vector_norm(tensor, dtype=dtype)) for tensor in tensors]


def _widest(tensors: list[Tensor]) -> torch.dtype:
    """The dtype in which one number of all of them is given."""
    return compute_dtype(*{tensor.dtype: tensor for tensor in tensors}.values())


def _norm_of_all(tensors: list[Tensor]) -> Tensor:
    """One norm over all entries of all tensors, in float64 on the first one's device."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    # On a processor, where looking costs nothing, the quick norm is kept if no square was too
    # large for its dtype, or so small that it counts: five times as fast as summing in float64.
    groups = _alike(tensors)
    looking = not torch.compiler.is_compiling()
    if looking and all(device.type == "cpu" for device, _ in groups):
        # stacked by dtype, since stacking does not convert
        stacks = [torch.stack([*_quick_norms(group)]).double() for group in groups.values()]
        norm: Tensor = torch.linalg.vector_norm(torch.cat(stacks))
        if reads_values(norm):
            smallest = max(torch.finfo(compute_dtype(t[0])).tiny for t in groups.values()) ** 0.4
            if smallest <= norm.item() < math.inf:
                return norm
    device = tensors[0].device
    norms = [_moved(_careful_norm(tensor), device) for tensor in tensors]
    return _scaled_norm(torch.stack(norms))


def _is_dense(tensor: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
    )


def _checked(name: str, tensors: Iterable[Tensor] | Tensor) -> list[Tensor]:
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    # names are made for errors alone: those of thousands of tensors take as long as the norm
    if not all(map(_is_dense, listed)):
        for index, tensor in enumerate(listed):
            check_floating(**{f"{name}[{index}]": tensor})
            if tensor.layout != torch.strided:
                raise TypeError(f"{name}[{index}] must be dense; got {tensor.layout}")
    return listed


def _gradients(params: Iterable[Tensor] | Tensor) -> list[Tensor]:
    listed = [params] if isinstance(params, Tensor) else list(params)
    for index, param in enumerate(listed):
        if not isinstance(param, Tensor):
            raise TypeError(f"params[{index}] must be a torch.Tensor; got {type(param).__name__}")
    return _checked("gradients", [p.grad for p in listed if p.grad is not None])


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor] | Tensor) -> Float[Tensor, ""]:
    r"""Euclidean norm of all entries of all tensors, as if they were one vector.

    .. math:: \lVert g \rVert = \sqrt{\sum_k \lVert g_k \rVert^2}

    Entries whose squares overflow are no trouble: a hundred entries of 1e30 have norm 1e31. It
    waits for no device. Sharded tensors give the norm of the whole, the same on every rank.

    Args:
        tensors: Tensors of any floating dtypes and devices, or one.

    Returns:
        The norm in at least float32, on the first tensor's device; infinite or NaN if an entry
        is, or if the norm itself is too large for that dtype. Zero if there are no tensors.

    Raises:
        TypeError: If a tensor is not floating point or is sparse.

    Example:
        >>> import torch
        >>> from lmlosses.precision import global_norm
        >>> global_norm([torch.tensor([3e30]), torch.tensor([4e30])])
        tensor(5.0000e+30)

    References:
        Pascanu et al. (2013), arXiv:1211.5063, algorithm 1.
    """
    listed = _checked("tensors", tensors)
    return _norm_of_all(listed).to(_widest(listed))


@torch.no_grad()
def clip_by_global_norm(
    params: Iterable[Tensor] | Tensor, *, max_norm: float
) -> Float[Tensor, ""]:
    r"""Shorten the gradients, all by one factor, to a norm of at most ``max_norm``.

    .. math:: g' = \min\left(1, \frac{C}{\lVert g \rVert}\right) g

    The direction stays. Textbook equations (4.6.23) and (4.6.24). A clipped gradient has norm
    :math:`C`, up to rounding, where `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the norm it
    divides by. Entries of 1e30, whose squares overflow, are clipped like others. If one entry
    is infinite or NaN, the norm that is returned is, and no gradient changes. Nothing waits for
    a device, unless some gradients lie on one and others on the processor. Gradients may be
    sharded (DTensor): the norm is that of the whole.

    Args:
        params: Parameters, or one; those without a gradient are skipped.
        max_norm: The largest norm :math:`C`. With zero, gradients become zero.

    Returns:
        The norm before clipping, as `global_norm` gives it.

    Raises:
        TypeError: If a gradient is not floating point or is sparse.
        ValueError: If ``max_norm`` is negative or not finite.

    Example:
        >>> import torch
        >>> from lmlosses.precision import clip_by_global_norm
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> clip_by_global_norm([w], max_norm=1.0)
        tensor(5.)
        >>> w.grad
        tensor([0.6000, 0.8000])

    References:
        Pascanu et al. (2013), arXiv:1211.5063, algorithm 1.
    """
    check_non_negative(max_norm=max_norm)
    grads = _gradients(params)
    norm = _norm_of_all(grads)
    found = norm.to(_widest(grads))
    shorten = norm.isfinite() & (norm > max_norm)
    if reads_values(shorten) and not shorten:
        return found
    factor = (max_norm / norm).where(shorten, 1.0)
    for (device, _), group in _alike([_local(grad) for grad in grads]).items():
        torch._foreach_mul_(group, _moved(factor.to(compute_dtype(group[0])), device))
    return found


@torch.no_grad()
def clip_by_value(params: Iterable[Tensor] | Tensor, *, max_value: float) -> Float[Tensor, ""]:
    r"""Clip each entry of the gradients to an interval around zero.

    .. math:: g'_i = \min(\max(g_i, -C), C)

    Textbook equation (4.6.25). The direction may change. If one entry is infinite or NaN, the
    norm that is returned is, and no gradient changes.

    Args:
        params: Parameters, or one; those without a gradient are skipped.
        max_value: The largest magnitude :math:`C`.

    Returns:
        The norm of all gradients before clipping, as `global_norm` gives it.

    Raises:
        TypeError: If a gradient is not floating point or is sparse.
        ValueError: If ``max_value`` is negative or not finite.

    Example:
        >>> import torch
        >>> from lmlosses.precision import clip_by_value
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, -0.5])
        >>> norm = clip_by_value([w], max_value=1.0)
        >>> w.grad
        tensor([ 1.0000, -0.5000])

    References:
        Textbook equation (4.6.25).
    """
    check_non_negative(max_value=max_value)
    grads = _gradients(params)
    norm = _norm_of_all(grads)
    bound = torch.full_like(norm, max_value).where(norm.isfinite(), math.inf)
    for grad in grads:
        # a bound beyond the gradient's dtype becomes infinite there, which is no bound
        here = _moved(bound.to(grad.dtype), grad.device)
        _local(grad).clamp_(min=-here, max=here)
    return norm.to(_widest(grads))


# ---- loss scaling


class _Seen(NamedTuple):
    """What happened to one optimizer's gradients since the last update."""

    optimizer: Optimizer  # kept, so that its id is nobody else's
    finite: Tensor
    stepped_or_skipped: bool


def _to_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


class LossScaler(ABC):
    r"""A factor on the loss that keeps small gradients above zero in half precision.

    .. math:: \tilde L = S L , \qquad g = \frac{1}{S} \frac{\partial \tilde L}{\partial w}

    Textbook equation (4.6.26), with the names of :math:`g` set right there: what the backward
    pass yields is scaled, and its quotient is not. One iteration is ``scale(loss)`` and its
    backward pass, ``step(optimizer)``, then ``update()``; between them ``unscale(optimizer)`` if
    gradients are to be clipped or looked at. A step with an infinite or NaN gradient is left out.

    Keep the optimizer's parameters in float32 and cast them in the forward pass, as autocast
    does: gradients then arrive in float32, and nothing is lost in dividing. Parameters in
    float16 are taken too, but there a gradient that was too small is again so after division.

    `StaticLossScaler` keeps :math:`S`; `DynamicLossScaler` looks for the largest that works.

    Args:
        init_scale: The first :math:`S`, held in float32.

    References:
        Micikevicius et al. (2018), arXiv:1710.03740, section 3.2.
    """

    def __init__(self, init_scale: float = 2.0**16) -> None:
        check_positive(init_scale=init_scale)
        self._scale = _to_float32(init_scale)
        if not 0 < self._scale < math.inf:
            raise ValueError(f"init_scale must be a number in float32; got {init_scale!r}")
        self._seen: dict[int, _Seen] = {}

    def get_scale(self) -> float:
        """The factor :math:`S` in use."""
        return self._scale

    def scale(self, loss: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The loss times the factor, in at least float32.

        Args:
            loss: The loss in any floating dtype.

        Returns:
            What to start the backward pass from.
        """
        check_floating(loss=loss)
        return loss.to(compute_dtype(loss)) * self._scale

    @torch.no_grad()
    def unscale(self, optimizer: Optimizer) -> Float[Tensor, ""]:
        """Divide the gradients of an optimizer's parameters by the factor, once an iteration.

        Args:
            optimizer: The optimizer; parameters without a gradient are skipped.

        Returns:
            Whether all gradients are finite, as a tensor that is 1 or 0. Nothing waits for it.

        Raises:
            RuntimeError: If they were divided already since the last ``update()``.
        """
        if id(optimizer) in self._seen:
            raise RuntimeError(
                "unscale must come once for each optimizer before update(); got two"
            )
        grads = _gradients(p for group in optimizer.param_groups for p in group["params"])
        # judged after the division, which overflows too if the factor is below one
        inverse = _to_float32(1 / self._scale)
        for grad in grads:
            _local(grad).mul_(inverse)
        finite = _norm_of_all(grads).isfinite().float()
        self._seen[id(optimizer)] = _Seen(optimizer, finite, False)
        return finite

    def step(self, optimizer: Optimizer) -> bool:
        """Let the optimizer step if all its gradients are finite.

        Gradients are divided first, unless that was done. This reads one number from the device
        and waits for it, the only place in this module: a step is taken or not.

        Args:
            optimizer: The optimizer, which takes no closure here.

        Returns:
            Whether it stepped.

        Raises:
            RuntimeError: If it was called already since the last ``update()``.
        """
        if id(optimizer) not in self._seen:
            self.unscale(optimizer)
        seen = self._seen[id(optimizer)]
        if seen.stepped_or_skipped:
            raise RuntimeError("step must come once an optimizer before update(); got two")
        self._seen[id(optimizer)] = seen._replace(stepped_or_skipped=True)
        finite = bool(seen.finite.item())
        if finite:
            optimizer.step()
        return finite

    def update(self) -> None:
        """End the iteration: gradients of all optimizers were finite, or some were not.

        Raises:
            RuntimeError: If no gradients were divided since the last ``update()``.
        """
        if not self._seen:
            raise RuntimeError("update must come after step or unscale; got it without either")
        finite = all(bool(seen.finite.item()) for seen in self._seen.values())
        self._seen.clear()
        self._scale = self.next_scale(finite)

    @abstractmethod
    def next_scale(self, finite: bool) -> float:
        """The factor of the next iteration, given whether all gradients were finite."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"scale": self._scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where ``state_dict`` was saved, between iterations.

        Raises:
            ValueError: If the entries are not those of this kind of scaler.
        """
        expected = sorted(self.state_dict())
        if sorted(state_dict) != expected:
            raise ValueError(f"state_dict must have entries {expected}; got {sorted(state_dict)}")
        check_positive(scale=state_dict["scale"])
        self._scale = state_dict["scale"]
        self._seen.clear()


@final
class StaticLossScaler(LossScaler):
    """Loss scaling with one factor throughout. See `LossScaler`.

    Args:
        init_scale: The factor.

    Raises:
        ValueError: If the factor is not positive.

    Example:
        >>> import torch
        >>> from lmlosses.precision import StaticLossScaler
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer, scaler = torch.optim.SGD([w], lr=1.0), StaticLossScaler(1024.0)
        >>> half = w.half() * 6e-5 * 2e-4  # its gradient in float16 would be zero, 1.2e-8
        >>> scaler.scale(half.sum()).backward()
        >>> scaler.step(optimizer)
        True
        >>> bool(w.grad > 0)
        True

    References:
        Micikevicius et al. (2018), arXiv:1710.03740, section 3.2. Textbook equation (4.6.26).
    """

    def next_scale(self, finite: bool) -> float:
        """The same factor."""
        return self._scale


@final
class DynamicLossScaler(LossScaler):
    """Loss scaling that looks for the largest factor that works. See `LossScaler`.

    After ``growth_interval`` iterations in a row with finite gradients the factor grows; after
    one without it shrinks. It does not grow past the largest float32. The decisions are those of
    `torch.amp.GradScaler` until the factor would fall below ``min_scale``, which has no
    counterpart there.

    Args:
        init_scale: The first factor.
        growth_factor: What it grows by; above 1.
        backoff_factor: What it shrinks by; between 0 and 1.
        growth_interval: Iterations with finite gradients before it grows.
        min_scale: It shrinks no further. Gradients that are still not finite are the model's own.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lmlosses.precision import DynamicLossScaler
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer, scaler = torch.optim.SGD([w], lr=0.1), DynamicLossScaler(2.0**17)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     scaler.scale(w.half().sum()).backward()  # 2**17 is infinite in float16
        ...     print(scaler.get_scale(), scaler.step(optimizer))
        ...     scaler.update()
        131072.0 False
        65536.0 False
        >>> scaler.get_scale()
        32768.0

    References:
        Micikevicius et al. (2018), arXiv:1710.03740, section 3.2, the last paragraph on choosing
        the factor.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        *,
        min_scale: float = 1.0,
    ) -> None:
        super().__init__(init_scale)
        check_positive(growth_factor=growth_factor, min_scale=min_scale)
        if growth_factor <= 1:
            raise ValueError(f"growth_factor must be above 1; got {growth_factor!r}")
        check_open_unit_interval(backoff_factor=backoff_factor)
        check_whole(growth_interval=growth_interval)
        if growth_interval < 1:
            raise ValueError(f"growth_interval must be at least 1; got {growth_interval!r}")
        if min_scale > init_scale:
            raise ValueError(
                f"min_scale must be at most init_scale, {init_scale!r}; got {min_scale!r}"
            )
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.min_scale = min_scale
        self._finite_in_a_row = 0

    def next_scale(self, finite: bool) -> float:
        """Back off at once, grow after a while."""
        if not finite:
            self._finite_in_a_row = 0
            return max(_to_float32(self._scale * self.backoff_factor), self.min_scale)
        self._finite_in_a_row += 1
        if self._finite_in_a_row < self.growth_interval:
            return self._scale
        self._finite_in_a_row = 0
        grown = _to_float32(self._scale * self.growth_factor)
        return grown if math.isfinite(grown) else self._scale

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the factor, the settings and the count."""
        return {
            **super().state_dict(),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "min_scale": self.min_scale,
            "finite_in_a_row": self._finite_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where ``state_dict`` was saved, between iterations.

        Raises:
            ValueError: If the entries are not those of this kind of scaler.
        """
        super().load_state_dict(state_dict)
        self.growth_factor = state_dict["growth_factor"]
        self.backoff_factor = state_dict["backoff_factor"]
        self.growth_interval = state_dict["growth_interval"]
        self.min_scale = state_dict["min_scale"]
        self._finite_in_a_row = state_dict["finite_in_a_row"]


# ---- log-sum-exp, and where naive forms break


def log_sum_exp(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    r"""Logarithm of a sum of exponentials along the last axis, without overflow.

    .. math:: \log \sum_j e^{z_j} = M + \log \sum_j e^{z_j - M} , \qquad M = \max_j z_j

    Textbook equation (4.6.21), line by line; `torch.logsumexp` is the fast one. Equal logits
    :math:`z` give :math:`z + \log V`.

    Args:
        logits: Unnormalized log-probabilities. Those of :math:`-\infty` add nothing.

    Returns:
        One number per row, in at least float32: :math:`-\infty` where all logits are.

    Raises:
        TypeError: If ``logits`` is not floating point.
        ValueError: If there is nothing along the last axis.

    Example:
        >>> import torch
        >>> from lmlosses.precision import log_sum_exp
        >>> log_sum_exp(torch.tensor([500.0, 500.0]))
        tensor(500.6931)

    References:
        Textbook equation (4.6.21).
    """
    check_floating(logits=logits)
    check_not_empty_axis("logits", logits)
    logits = logits.to(compute_dtype(logits))
    # an infinite maximum would subtract from itself; shifting by any number gives the same sum,
    # so the maximum is a constant to the gradient
    largest = logits.detach().amax(dim=-1)
    shift = largest.where(largest.isfinite(), 0.0)
    return shift + (logits - shift.unsqueeze(-1)).exp().sum(dim=-1).log()


class BreakingPoint(NamedTuple):
    """The input from which on a naive form fails in a dtype."""

    form: str
    """The formula as it is typed, with x for the input's magnitude."""
    dtype: torch.dtype
    x: float
    """The smallest x of at least one, in that dtype, at which it fails."""
    naive: float
    """What the naive form gives there: infinite, NaN, or a zero that is none."""
    exact: float
    """The stable form in float64; exp(x) and exp(-x) have none and fail there as well."""


_Form = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _pair(x: Tensor) -> Tensor:
    return torch.stack([x, torch.zeros_like(x)])


def _softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum()


# Each naive form, and beside it the stable one. As x grows from one, none of them should ever
# be infinite, NaN or exactly zero; the first that is has no digit left.
_FORMS: dict[str, _Form] = {
    "exp(x)": (torch.exp, torch.exp),
    "exp(-x)": (lambda x: (-x).exp(), lambda x: (-x).exp()),
    "softmax([x, 0])[0]": (lambda x: _softmax(_pair(x))[0], lambda x: _pair(x).softmax(0)[0]),
    "softmax([-x, 0])[0]": (lambda x: _softmax(_pair(-x))[0], lambda x: _pair(-x).softmax(0)[0]),
    "log(softmax([x, 0]))[0]": (
        lambda x: _pair(x).softmax(0).log()[0],
        lambda x: -torch.nn.functional.softplus(-x, threshold=math.inf),
    ),
    "log(softmax([-x, 0]))[0]": (
        lambda x: _pair(-x).softmax(0).log()[0],
        lambda x: _pair(-x).log_softmax(0)[0],
    ),
    "log(sum(exp([x, x])))": (
        lambda x: torch.stack([x, x]).exp().sum().log(),
        lambda x: torch.stack([x, x]).logsumexp(0),
    ),
    "log(sum(exp([-x, -x])))": (
        lambda x: torch.stack([-x, -x]).exp().sum().log(),
        lambda x: torch.stack([-x, -x]).logsumexp(0),
    ),
    "log(1 + exp(x))": (lambda x: (1 + x.exp()).log(), lambda x: x + (-x).exp().log1p()),
    "log(1 + exp(-x))": (lambda x: (1 + (-x).exp()).log(), lambda x: (-x).exp().log1p()),
    "log1p(exp(x))": (lambda x: x.exp().log1p(), lambda x: x + (-x).exp().log1p()),
    "log(sigmoid(x))": (lambda x: x.sigmoid().log(), lambda x: -(-x).exp().log1p()),
    "log(sigmoid(-x))": (lambda x: (-x).sigmoid().log(), lambda x: -x - (-x).exp().log1p()),
}

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _first_failure(naive: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """Bisect on the bits of positive numbers, which are in the numbers' order."""
    bits = _BITS[dtype.itemsize]
    works, fails = (
        int(torch.tensor(end, dtype=dtype).view(bits)) for end in (1.0, torch.finfo(dtype).max)
    )
    while fails - works > 1:
        middle = (works + fails) // 2
        value = naive(torch.tensor(middle, dtype=bits).view(dtype))
        works, fails = (middle, fails) if value.isfinite() and value != 0 else (works, middle)
    return torch.tensor(fails, dtype=bits).view(dtype)


def breaking_points() -> list[BreakingPoint]:
    r"""Where naive forms of exponentials and logarithms fail, in each floating dtype.

    Each form is a function of :math:`x \ge 1` that is never infinite, NaN or zero in exact
    arithmetic. In a dtype it becomes so at some :math:`x` and stays so: the exponential
    overflows near :math:`\log` of the largest number and vanishes near :math:`\log` of the
    smallest, and adding one loses all of :math:`e^{-x}` near :math:`-\log` of the rounding step.
    The points are found by bisection on the processor, to the last bit, with torch's own
    functions. In half precision these compute in float32 and round each result.

    Returns:
        One `BreakingPoint` per form and dtype: float16, bfloat16, float32, float64.

    Example:
        >>> from lmlosses.precision import breaking_points
        >>> for point in breaking_points()[:4]:
        ...     print(point.form, point.dtype, round(point.x, 3), point.naive)
        exp(x) torch.float16 11.094 inf
        exp(x) torch.bfloat16 89.0 inf
        exp(x) torch.float32 88.723 inf
        exp(x) torch.float64 709.783 inf

    References:
        Blanchard, Higham and Higham (2021), Accurately computing the log-sum-exp and softmax
        functions, section 1. Textbook section 4.6.4.
    """
    points = []
    for form, (naive, stable) in _FORMS.items():
        for dtype in _DTYPES:
            x = _first_failure(naive, dtype)
            exact = stable(x.double()).item()
            points.append(BreakingPoint(form, dtype, x.item(), naive(x).item(), exact))
    return points
