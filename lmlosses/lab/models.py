"""Attention and position encodings, written to be read.

Attention is the softmax classifier's mathematics used twice: it turns scores into a distribution
over positions, and returns an expectation under it.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lmlosses._checks import (
    check_bool,
    check_floating,
    check_min_ndim,
    check_non_negative,
    check_not_empty_axis,
    check_positive,
    check_shape,
    check_whole,
    compute_dtype,
)
from lmlosses.normalizers import softmax


class Attention(NamedTuple):
    """What attention returns, and the distribution it is an expectation under."""

    output: Float[Tensor, "*batch queries features"]
    weights: Float[Tensor, "*batch queries keys"]


def scaled_dot_product_attention(
    query: Float[Tensor, "*batch queries dim"],
    key: Float[Tensor, "*batch keys dim"],
    value: Float[Tensor, "*batch keys features"],
    *,
    mask: Bool[Tensor, "*batch queries keys"] | Bool[Tensor, "queries keys"] | None = None,
    temperature: float | Float[Tensor, ""] | None = None,
) -> Attention:
    r"""For each query, the mean value under a softmax over its similarity to the keys.

    .. math:: A_{ij} = \frac{\exp(q_i^\top k_j / \tau)}{\sum_{j'} \exp(q_i^\top k_{j'} / \tau)} ,
        \qquad o_i = \sum_j A_{ij} \, v_j = \mathbb{E}_{j \sim A_{i \cdot}} [v_j]

    Textbook equations (4.3.34) and (4.3.36). The default :math:`\tau = \sqrt{d}` is a
    temperature: it keeps scores of unit variance when the entries of :math:`q` and :math:`k`
    are independent with unit variance.

    Args:
        query: One vector per position that asks.
        key: One vector per position that may answer.
        value: What each position answers with.
        mask: True where a query may look at a key; for all of the batch alike when it has only
            the last two axes. A key and value that no query may look at is never read.
        temperature: The number :math:`\tau`; the square root of ``dim`` without it.

    Returns:
        The output and the weights, in at least float32. The weights of a query sum to one; a
        query that may look at nothing has weights and an output of zero.

    Raises:
        TypeError: If a tensor is not floating point or ``mask`` not boolean.
        ValueError: If the shapes do not fit, or ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> from lmlosses.lab.models import scaled_dot_product_attention
        >>> value = torch.tensor([[1.0], [3.0]])
        >>> scaled_dot_product_attention(torch.zeros(1, 4), torch.ones(2, 4), value).output
        tensor([[2.]])

    References:
        Vaswani et al. (2017), Attention Is All You Need, arXiv:1706.03762, equation (1).
    """
    _check_attention_shapes(query, key, value)
    dtype = compute_dtype(query, key, value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if mask is not None:
        mask = _check_attention_mask(mask, query, key)
        unseen = ~mask.any(dim=-2).unsqueeze(-1)
        key, value = key.masked_fill(unseen, 0.0), value.masked_fill(unseen, 0.0)

    scores = query @ key.transpose(-2, -1)
    if temperature is None:
        temperature = math.sqrt(query.shape[-1])
    weights = softmax(scores, temperature=temperature, mask=mask)
    return Attention(output=weights @ value, weights=weights)


def _check_attention_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_floating(query=query, key=key, value=value)
    check_min_ndim("query", query, 2)
    check_min_ndim("key", key, 2)
    check_min_ndim("value", value, 2)
    check_not_empty_axis("query", query)
    check_not_empty_axis("key", key, -2)
    batch, keys = query.shape[:-2], key.shape[-2]
    check_shape("key", key, (*batch, keys, query.shape[-1]), meaning="query's batch and dim")
    features = value.shape[-1]
    check_shape("value", value, (*batch, keys, features), meaning="one row per key")


def _check_attention_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    check_bool(mask=mask)
    shape = (*query.shape[:-1], key.shape[-2])
    if mask.ndim == 2:
        check_shape("mask", mask, shape[-2:], meaning="one row per query, one column per key")
    else:
        check_shape("mask", mask, shape, meaning="the batch, the queries and the keys")
    return mask.expand(shape)


def _angles(positions: Float[Tensor, "time"], dim: int, base: float) -> Float[Tensor, "time half"]:
    """Position times frequency, in radians, in float64: late positions turn many times."""
    check_whole(dim=dim)
    check_positive(dim=dim, base=base)
    if dim % 2:
        raise ValueError(f"dim must be even, since coordinates come in pairs; got {dim}")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    return positions.unsqueeze(-1) * base**-exponents


def sinusoidal_positions(
    length: int, dim: int, *, base: float = 10_000.0, device: torch.device | None = None
) -> Float[Tensor, "length dim"]:
    r"""A fixed vector for every position: sines and cosines from fast to slow.

    .. math:: P_{t, 2i} = \sin\left( t \, b^{-2i/d} \right) , \qquad
        P_{t, 2i+1} = \cos\left( t \, b^{-2i/d} \right)

    Every vector has length :math:`\sqrt{d/2}`, and the product of two depends on their distance
    alone: :math:`\langle P_s, P_t \rangle = \sum_i \cos((s - t) \, b^{-2i/d})`.

    Args:
        length: Number of positions, counted from 0.
        dim: The even number :math:`d` of coordinates.
        base: The number :math:`b`; the slowest pair turns once in :math:`2 \pi b^{1 - 2/d}`
            positions.
        device: Where to put the result; the CPU without it.

    Returns:
        One row per position, in float32.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``length`` is negative, ``dim`` is not even or ``base`` not positive.

    Example:
        >>> from lmlosses.lab.models import sinusoidal_positions
        >>> sinusoidal_positions(2, 4)
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0100, 0.9999]])

    References:
        Vaswani et al. (2017), arXiv:1706.03762, section 3.5.
    """
    check_whole(length=length)
    check_non_negative(length=length)
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = _angles(positions, dim, base)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).float()


class LearnedPositions(nn.Module):
    r"""A table of vectors, one per position, that is trained with the model.

    Nothing relates one row to the next, and there is no row past the end of the table.

    Args:
        length: Number of positions in the table.
        dim: Number of coordinates.
        std: Standard deviation of the normal distribution that the table starts from.
        generator: Source of the start, on the CPU; torch's default generator without it.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``length`` or ``dim`` is not positive, or ``std`` is negative.

    Example:
        >>> import torch
        >>> from lmlosses.lab.models import LearnedPositions
        >>> positions = LearnedPositions(length=16, dim=4)
        >>> (torch.zeros(2, 5, 4) + positions(5)).shape
        torch.Size([2, 5, 4])

    References:
        Gehring et al. (2017), Convolutional Sequence to Sequence Learning, arXiv:1705.03122,
        section 3.1.
    """

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        check_whole(length=length, dim=dim)
        check_positive(length=length, dim=dim)
        check_non_negative(std=std)
        super().__init__()
        self.table = nn.Parameter(std * torch.randn(length, dim, generator=generator))

    def forward(self, time: int) -> Float[Tensor, "time dim"]:
        """The first ``time`` rows of the table, to be added to a sequence of that length.

        Raises:
            ValueError: If the table is shorter.
        """
        check_whole(time=time)
        check_non_negative(time=time)
        if time > len(self.table):
            raise ValueError(f"time must be at most {len(self.table)}, the table; got {time}")
        return self.table[:time]


def rotary(
    x: Float[Tensor, "*batch time dim"], *, base: float = 10_000.0, offset: int = 0
) -> Float[Tensor, "*batch time dim"]:
    r"""Queries or keys turned by an angle proportional to their position.

    Coordinates :math:`2i` and :math:`2i + 1` are a plane, turned at position :math:`t` by
    :math:`\phi = t \, b^{-2i/d}` radians:

    .. math:: \begin{pmatrix} x'_{2i} \\ x'_{2i+1} \end{pmatrix} =
        \begin{pmatrix} \cos\phi & -\sin\phi \\ \sin\phi & \cos\phi \end{pmatrix}
        \begin{pmatrix} x_{2i} \\ x_{2i+1} \end{pmatrix}

    Lengths stay, and the product of a turned query with a turned key depends on their distance
    :math:`t - s` alone. This is the paper's pairing of neighbours. GPT-NeoX and Llama as
    published by Hugging Face pair coordinate :math:`i` with :math:`i + d/2` instead: weights
    made for one need their coordinates reordered for the other.

    Args:
        x: Queries or keys, with an even number :math:`d` of coordinates.
        base: The number :math:`b`.
        offset: Position of the first row, for example the number of tokens already in a cache.

    Returns:
        A tensor like ``x``, in at least float32.

    Raises:
        TypeError: If ``x`` is not floating point, or ``base`` not a number.
        ValueError: If ``x`` has fewer than two axes or an odd last one, or ``base`` is not
            positive.

    Example:
        >>> import math, torch
        >>> from lmlosses.lab.models import rotary
        >>> rotary(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # turned by 0 and by 1 radian
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])

    References:
        Su et al. (2021), RoFormer, arXiv:2104.09864, equation (34).
    """
    check_floating(x=x)
    check_min_ndim("x", x, 2)
    positions = torch.arange(x.shape[-2], dtype=torch.float64, device=x.device) + offset
    angles = _angles(positions, x.shape[-1], base)
    dtype = compute_dtype(x)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    pairs = x.to(dtype)
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
