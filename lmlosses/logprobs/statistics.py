"""What token statistics are, and the form that can be read beside the equations.

`reference` materializes everything and differentiates any number of times. The lean forms give
the same numbers: `lmlosses.logprobs.chunked` holds one tile of logits at a time.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from lmlosses._checks import compute_dtype

__all__ = ["TokenStats"]


class TokenStats(NamedTuple):
    r"""What language-model losses need to know of each token, in nats, in at least float32.

    With :math:`z` the logits after soft-capping and temperature, :math:`y` the target and
    :math:`p` the softmax of :math:`z`. Positions that do not count hold 0 everywhere.

    Attributes:
        logps: :math:`\log p_y`, the log-probability of the target.
        log_normalizer: :math:`\log \sum_v e^{z_v}`.
        mean_logp: :math:`\frac{1}{K} \sum_v u_v \log p_v` over the :math:`K` classes whose logit
            is not ``-inf``, with class weights :math:`u` (1 unless given); None unless asked for.
        entropy: :math:`-\sum_v p_v \log p_v`; None unless asked for.
    """

    logps: Float[Tensor, "*batch"]
    log_normalizer: Float[Tensor, "*batch"]
    mean_logp: Float[Tensor, "*batch"] | None
    entropy: Float[Tensor, "*batch"] | None


class Scaling(NamedTuple):
    """From a raw logit x to z: ``softcap * tanh(x / softcap)``, then over the temperature."""

    temperature: float
    softcap: float | None


def scaled(
    logits: Float[Tensor, "*batch vocab"], scaling: Scaling
) -> Float[Tensor, "*batch vocab"]:
    """Logits after soft-capping and temperature, in at least float32."""
    z = logits.to(compute_dtype(logits))
    if scaling.softcap is not None:
        z = scaling.softcap * (z / scaling.softcap).tanh()
    return z if scaling.temperature == 1 else z / scaling.temperature


def reference(
    logits: Float[Tensor, "*batch vocab"],
    targets: Integer[Tensor, "*batch"],
    counted: Bool[Tensor, "*batch"] | None,
    class_weight: Float[Tensor, " vocab"] | None,
    scaling: Scaling,
    mean: bool,
    entropy: bool,
) -> TokenStats:
    """Token statistics as their equations say them."""
    if counted is not None:
        logits = logits.masked_fill(~counted.unsqueeze(-1), 0.0)
        targets = targets.masked_fill(~counted, 0)
    z = scaled(logits, scaling)
    all_logps = z.log_softmax(dim=-1)
    found: list[Tensor | None] = [
        all_logps.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1),
        z.logsumexp(dim=-1),
        None,
        None,
    ]
    allowed = all_logps != -math.inf
    finite = all_logps.masked_fill(~allowed, 0.0)
    if mean:
        weighted = finite if class_weight is None else finite * class_weight.to(finite.dtype)
        found[2] = weighted.sum(dim=-1) / allowed.sum(dim=-1).to(finite.dtype)
    if entropy:
        found[3] = -(all_logps.exp() * finite).sum(dim=-1)
    if counted is not None:
        found = [None if value is None else value.masked_fill(~counted, 0.0) for value in found]
    return TokenStats(*found)  # type: ignore[arg-type]  # the first two are always tensors


def linear_logits(
    hidden: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "vocab dim"],
    bias: Float[Tensor, " vocab"] | None,
    counted: Bool[Tensor, "*batch"] | None,
) -> Float[Tensor, "*batch vocab"]:
    """The whole matrix of logits, in at least float32; what does not count is read as 0."""
    if counted is not None:
        hidden = hidden.masked_fill(~counted.unsqueeze(-1), 0.0)
    dtype = compute_dtype(hidden, weight)
    return torch.nn.functional.linear(
        hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )
