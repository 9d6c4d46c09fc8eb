"""Vectors made ready for scores: what a similarity and a temperature do to them."""

from typing import Literal

import torch
from torch import Tensor

from lmlosses._checks import (
    check_finite,
    check_floating,
    check_not_empty_axis,
    check_positive,
    check_same_device,
    check_shape,
    compute_dtype,
    reads_values,
)

__all__: list[str] = []  # how it is done; what is done is in the other modules

Similarity = Literal["cosine", "dot"]


def check_similarity(similarity: str) -> None:
    """One of the two."""
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity must be 'cosine' or 'dot'; got {similarity!r}")


def check_temperature(temperature: float | Tensor, like: Tensor) -> None:
    """A positive number, or a scalar tensor that is one."""
    if not isinstance(temperature, Tensor):
        check_positive(temperature=temperature)
        return
    check_floating(temperature=temperature)
    check_shape("temperature", temperature, (), meaning="one number")
    check_same_device(of="the vectors", reference=like, temperature=temperature)
    if reads_values(temperature):
        check_positive(temperature=temperature.item())


def _sizes(vectors: Tensor) -> Tensor:
    """The largest magnitude in each vector, without a gradient; 1 where all entries are 0."""
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
    return largest.masked_fill(largest == 0, 1.0)


def lengths(vectors: Tensor) -> Tensor:
    """Euclidean norms, whose squares neither overflow nor vanish; gradient zero at zero."""
    sizes = _sizes(vectors)
    norms: Tensor = torch.linalg.vector_norm(vectors / sizes, dim=-1)
    return norms * sizes.squeeze(-1)


def unit_vectors(name: str, vectors: Tensor) -> Tensor:
    """Vectors over their norms, in at least float32, whatever their size.

    A zero vector has no direction: an error where values can be read, elsewhere zero with
    gradient zero. What is not finite is an error as well, and elsewhere stays NaN.
    """
    check_not_empty_axis(name, vectors)
    values = vectors.to(compute_dtype(vectors))
    check_finite(where="", **{name: values})
    if reads_values(values):
        zero = (values == 0).all(dim=-1).nonzero()
        if len(zero):
            raise ValueError(
                f"{name} must have no zero vector, whose cosine is undefined; "
                f"got one at index {tuple(zero[0].tolist())}"
            )
    # the direction does not depend on the scale, so that a scale without a gradient will do
    scaled = values / _sizes(values)
    norms = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(norms == 0, 0.0, scaled / norms.masked_fill(norms == 0, 1.0))


def prepared(name: str, vectors: Tensor, similarity: Similarity) -> Tensor:
    """Vectors whose inner products are the similarities, in at least float32."""
    if similarity == "cosine":
        return unit_vectors(name, vectors)
    check_finite(where="", **{name: vectors})
    return vectors.to(compute_dtype(vectors))


def over_temperature(vectors: Tensor, temperature: float | Tensor) -> Tensor:
    """Vectors over the temperature; a learned one gets its gradient here."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(vectors.dtype)
    return vectors / temperature
