"""Muon: momentum made orthogonal, so that every direction of a matrix moves alike."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import (
    check_floating,
    check_in_unit_interval,
    check_min_ndim,
    check_non_negative,
    check_number,
    check_whole,
)
from lmlosses.optim._base import Ready, UpdateRule, state_dtype
from lmlosses.optim._matrices import check_whole_tensors, descend, multiple, named
from lmlosses.optim.adam import AdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's :math:`(a, b, c)`: they lift small singular values fast and leave others near one."""

# entries that one batched Newton-Schulz holds at most (a larger matrix goes alone)
BATCH = 2**22


def newton_schulz(
    matrix: Float[Tensor, "*batch rows columns"],
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    *,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch rows columns"]:
    r"""The matrix with its singular values moved toward one, and its singular vectors kept.

    From :math:`X_0 = G / \max(\lVert G \rVert_F, \epsilon)`, repeat

    .. math:: X \gets a X + (b \, X X^\top + c \, (X X^\top)^2) \, X ,

    which takes each singular value :math:`s` to :math:`a s + b s^3 + c s^5`. If all came to one,
    the result would be the polar factor :math:`U V^\top` of :math:`G = U S V^\top`. With the
    default coefficients and five steps, singular values of :math:`X_0` from 0.01 to 1 end
    between 0.68 and 1.14. They do not converge, and more steps do not bring them closer. Smaller
    ones grow at most :math:`3.4445^5 \approx 485` times; zero stays zero. With
    ``(1.875, -1.25, 0.375)`` every singular value that is not zero converges to one, given
    enough steps.

    Args:
        matrix: Any number of matrices, worked on at once.
        coefficients: The numbers :math:`(a, b, c)`.
        steps: How often the polynomial is applied.
        eps: Smallest norm that is divided by.
        dtype: Precision of the products. None means bfloat16 where the device multiplies it
            faster than float32 (CUDA from compute capability 8, processors with AMX), float64
            for float64, and float32 everywhere else.

    Returns:
        Matrices of the same shapes and dtype.

    Raises:
        TypeError: If ``matrix`` or ``dtype`` is not floating point.
        ValueError: If ``matrix`` has fewer than two axes, or a setting is out of its range.

    Example:
        >>> import torch
        >>> from lmlosses.optim import newton_schulz
        >>> stretched = torch.diag(torch.tensor([10.0, 1.0, 0.1]))
        >>> newton_schulz(stretched).diagonal()
        tensor([0.7021, 0.7087, 0.6967])

    References:
        Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks".
        Bernstein and Newhouse (2024), arXiv:2409.20325, on the iteration.
    """
    check_floating(matrix=matrix)
    check_min_ndim("matrix", matrix, 2)
    _check_newton_schulz(coefficients, steps, eps, dtype)
    a, b, c = coefficients
    x = matrix.to(dtype or _fastest(matrix))
    tall = matrix.shape[-2] > matrix.shape[-1]
    if tall:
        x = x.mT
    batch = x.shape[:-2]
    if len(batch) > 1:
        x = x.flatten(0, -3)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    multiply = torch.baddbmm if batch else torch.addmm
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply(x, multiply(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(*batch, *x.shape[-2:])
    return (x.mT if tall else x).to(matrix.dtype)


def _fastest(matrix: Tensor) -> torch.dtype:
    if matrix.dtype == torch.float64:
        return torch.float64
    if matrix.is_cuda:
        native = torch.cuda.get_device_capability(matrix.device)[0] >= 8
    else:
        # products in bfloat16 with AVX-512 alone take longer than in float32
        has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        native = matrix.is_cpu and bool(has_tiles())
    return torch.bfloat16 if native else torch.float32


def _check_newton_schulz(
    coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype | None
) -> None:
    if len(coefficients) != 3:
        raise ValueError(f"coefficients must be three numbers; got {coefficients!r}")
    for name, value in zip("abc", coefficients, strict=True):
        check_number(f"coefficient {name}", value)
    check_whole(steps=steps)
    check_non_negative(steps=steps, eps=eps)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"the dtype of Newton-Schulz must be a floating-point dtype; got {dtype}")


class Muon(UpdateRule):
    r"""Momentum orthogonalized by Newton–Schulz, for the weight matrices of hidden layers.

    For a matrix :math:`W` with :math:`A` rows and :math:`B` columns and its gradient :math:`G_t`,

    .. math::

        M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
        O_t &= \text{NewtonSchulz}(\mu M_t + (1 - \mu) G_t) \\
        W_t &= (1 - \eta \lambda) W_{t-1} - \eta \sqrt{\max(1, A / B)} \; O_t

    with :math:`M_0 = 0`; without ``nesterov`` the second line has :math:`M_t` alone. A step moves
    all singular directions of the momentum by about the rate, small ones as far as large ones.

    Embeddings, output layers, gains and biases are not for Muon. Give them in a group with
    ``companion=True`` and an ``lr`` of its own: it is moved by `AdamW`, with any of its
    settings, and is part of the same ``state_dict`` and the same schedule. Other parameters that
    are not matrices are refused. That includes kernels of convolutions, which the author's code
    takes as matrices of shape ``(out, rest)``: keep such a view as the parameter, or let the
    companion have them.

    Matrices of one shape go through Newton–Schulz together, up to 4 million entries at a time.
    Half precision is computed in float32, and the state kept in it, but for the products of
    Newton–Schulz.

    Args:
        params: Matrices, or groups of parameters with settings of their own.
        lr: Rate :math:`\eta`.
        weight_decay: Decoupled decay :math:`\lambda`.
        momentum: The number :math:`\mu`, in ``[0, 1)``.
        nesterov: Look ahead along the momentum.
        ns_coefficients: See `newton_schulz`, as for the next two.
        eps: Smallest norm that is divided by.
        ns_steps: Iterations.
        adjust_lr_fn: ``"original"`` or None for the factor above; ``"match_rms_adamw"`` for
            :math:`0.2 \sqrt{\max(A, B)}`, whose updates are about as large as AdamW's, so that
            its rate and decay can be used again.
        maximize: Ascend instead of descending.
        ns_dtype: Precision of the products. See ``dtype`` of `newton_schulz`; torch's class
            always takes bfloat16.
        stochastic_rounding: Round bfloat16 parameters at random.

    Raises:
        ValueError: If a setting is out of its range, or a parameter is no matrix.
        TypeError: If a parameter is a DTensor.

    Example:
        >>> import torch
        >>> from lmlosses.optim import Muon
        >>> layer = torch.nn.Linear(3, 3)
        >>> optimizer = Muon([
        ...     {"params": [layer.weight], "lr": 0.02},
        ...     {"params": [layer.bias], "companion": True, "lr": 3e-4},
        ... ])
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.eye(3)).square().sum().backward()
        >>> _ = optimizer.step()
        >>> moved = torch.linalg.svdvals(layer.weight.detach() - before * (1 - 0.02 * 0.1))
        >>> bool(((0.6 * 0.02 < moved) & (moved < 1.3 * 0.02)).all())
        True

    References:
        Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks". Weight
        decay and ``"match_rms_adamw"``: Liu et al. (2025), arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        maximize: bool = False,
        ns_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
             "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps,
             "adjust_lr_fn": adjust_lr_fn, "maximize": maximize, "ns_dtype": ns_dtype,
             "stochastic_rounding": stochastic_rounding, "companion": False},
        )  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add matrices, or with ``companion=True`` any parameters; see `UpdateRule`.

        Args:
            param_group: ``params`` and settings that differ from the defaults, which are
                AdamW's in a companion group.

        Raises:
            ValueError: If a setting is out of its range, a parameter is no matrix, or a companion
                group has no ``lr``.
            TypeError: If a parameter is a DTensor.
        """
        params, pairs = named(param_group["params"])
        param_group = {**param_group, "params": params}
        if param_group.get("companion"):
            if "lr" not in param_group:
                raise ValueError("a companion group must give its own lr, the rate of AdamW")
            shared = {name: self.defaults[name] for name in ("maximize", "stochastic_rounding")}
            param_group = {**_adamw().defaults, **shared, **param_group}
        else:
            check_whole_tensors("Muon", pairs)
            for name, param in pairs:
                if param.ndim != 2:
                    raise ValueError(
                        f"Muon takes matrices; got shape {tuple(param.shape)} for {name}, which "
                        "belongs in a group with companion=True, where AdamW moves it"
                    )
        super().add_param_group(param_group)

    def check_settings(self, group: dict[str, Any]) -> None:
        """Momentum in ``[0, 1)``, decay and ``eps`` not negative; AdamW's own for a companion."""
        if group["companion"]:
            AdamW([{**group, "params": [torch.empty(0)]}])
            return
        check_non_negative(weight_decay=group["weight_decay"])
        check_in_unit_interval(momentum=group["momentum"])
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ValueError(
                "adjust_lr_fn must be None, 'original' or 'match_rms_adamw'; "
                f"got {group['adjust_lr_fn']!r}"
            )
        _check_newton_schulz(
            group["ns_coefficients"], group["ns_steps"], group["eps"], group["ns_dtype"]
        )

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The momentum at zero; AdamW's two moments for a companion."""
        if group["companion"]:
            return _adamw().init_state(param, group)
        return {"momentum_buffer": torch.zeros_like(param, dtype=state_dtype(param))}

    def update_group(self, ready: list[Ready], group: dict[str, Any]) -> None:
        """Matrices of one shape together, the companion's parameters by AdamW."""
        if group["companion"]:
            _adamw().update_group(ready, group)
            return
        for alike in _batches(ready):
            if group["maximize"]:
                alike = [(param, -grad, state) for param, grad, state in alike]
            self._move(alike, group)

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move one matrix."""
        self._move([(param, grad, state)], group)

    def _move(self, alike: list[Ready], group: dict[str, Any]) -> None:
        momenta = [_momentum(grad, state["momentum_buffer"], group) for _, grad, state in alike]
        together = momenta[0] if len(momenta) == 1 else torch.stack(momenta)
        del momenta
        moved = newton_schulz(
            together, group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"],
            dtype=group["ns_dtype"],
        )  # fmt: skip
        directions = moved.unbind() if len(alike) > 1 else [moved]
        scale = _rate_factor(alike[0][0].shape, group["adjust_lr_fn"])
        for (param, _, _), direction in zip(alike, directions, strict=True):
            descend(
                param, direction, multiple(group["lr"], scale),
                weight_decay=group["lr"] * group["weight_decay"],
                stochastic_rounding=group["stochastic_rounding"],
            )  # fmt: skip


def _momentum(grad: Tensor, momentum_buffer: Tensor, group: dict[str, Any]) -> Tensor:
    momentum = group["momentum"]
    grad = grad.to(momentum_buffer.dtype)
    momentum_buffer.lerp_(grad, 1 - momentum)
    return grad.lerp(momentum_buffer, momentum) if group["nesterov"] else momentum_buffer


def _rate_factor(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _batches(ready: list[Ready]) -> Iterator[list[Ready]]:
    """Matrices of the same shape, dtype and device, not more than `BATCH` entries at a time."""
    kinds: dict[Any, list[Ready]] = defaultdict(list)
    for one in ready:
        kinds[one[0].shape, one[0].dtype, one[0].device].append(one)
    for (shape, _, _), alike in kinds.items():
        size = max(1, BATCH // max(1, shape.numel()))
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


@functools.cache
def _adamw() -> AdamW:
    """The rule of companion groups; it holds nothing but its defaults."""
    return AdamW([torch.empty(0)])
