"""The Lanczos method, for a matrix known by its products with lists of tensors."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lmlosses._checks import compute_dtype
from lmlosses.analysis._vectors import check_vectors, flatten, unflatten
from lmlosses.analysis.curvature import Product


class Ritz(NamedTuple):
    """Eigenpairs of the matrix within a basis, in float64 on the processor."""

    values: Tensor  # ascending
    vectors: Tensor  # columns, in the coordinates of the basis
    residuals: Tensor


def _ritz(coefficients: Tensor, held: int) -> Ritz:
    """Eigenpairs of the matrix within the basis; ``coefficients`` reach out of it below."""
    done = coefficients.shape[1]
    square, below = coefficients[:done], coefficients[done:held]
    values, vectors = torch.linalg.eigh((square + square.T) / 2)
    return Ritz(values, vectors, torch.linalg.vector_norm(below @ vectors, dim=0))


def _orthogonalize(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Take the basis out of a vector, in place; its coefficients and the length of the rest.

    Once leaves rounding errors that grow into copies of eigenvalues already found; twice is
    enough. A rest that loses half its length the second time was rounding, and counts as none.
    """
    first = basis @ vector
    vector.addmv_(basis.T, first, alpha=-1)
    before = torch.linalg.vector_norm(vector)
    second = basis @ vector
    vector.addmv_(basis.T, second, alpha=-1)
    length = torch.linalg.vector_norm(vector)
    return first + second, torch.where(length > 0.5 * before, length, 0)


def gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal entries, drawn where the generator is."""
    device = like.device if generator is None else generator.device
    drawn = torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator)
    return drawn.to(like.device)


def signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Entries plus or minus one, drawn where the generator is."""
    device = like.device if generator is None else generator.device
    bits = torch.randint(
        0, 2, like.shape, dtype=torch.int8, device=device, generator=generator
    )  # 2 is excluded
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def lanczos(
    product: Product,
    params: list[Tensor],
    starts: int,
    *,
    limit: int,
    draw: Callable[[Tensor, torch.Generator | None], Tensor],
    generator: torch.Generator | None,
    enough: Callable[[Ritz], bool],
) -> tuple[Tensor, Ritz]:
    """Band Lanczos with full re-orthogonalization: orthonormal rows, and what they span holds."""
    dtype = compute_dtype(*params)
    dim = sum(param.numel() for param in params)
    starts, limit = min(starts, dim), min(limit, dim)
    basis = torch.empty(min(limit + starts, dim), dim, dtype=dtype, device=params[0].device)
    coefficients = torch.zeros(len(basis), limit, dtype=torch.float64)
    held = 0
    for step in range(limit):
        while held < starts or held == step:  # at the start, or the space is closed: look outside
            basis[held] = draw(basis[held], generator)
            _, length = _orthogonalize(basis[held], basis[:held])
            basis[held] /= length
            held += 1
        image = product(unflatten(basis[step], params))
        vector = flatten(check_vectors("product", image, params), dtype)
        del image
        found, length = _orthogonalize(vector, basis[:held])
        column = torch.cat([found, length.reshape(1)]).to("cpu", torch.float64)
        if not column.isfinite().all():
            wrong = column[~column.isfinite()][0].item()
            raise ValueError(f"product must be finite; got {wrong} at product {step}")
        coefficients[:held, step] = column[:-1]
        if held < len(basis) and column[-1] > 0:
            coefficients[held, step] = column[-1]
            torch.div(vector, length, out=basis[held])
            held += 1
        del vector  # before the next product is made
        ritz = _ritz(coefficients[:, : step + 1], held)
        if enough(ritz):
            break
    done = len(ritz.values)
    _check_symmetric(coefficients[:done, :done], params)
    return basis[:done], ritz


def _check_symmetric(square: Tensor, params: list[Tensor]) -> None:
    rounding = max(torch.finfo(param.dtype).eps for param in params)
    scale, gap = square.abs().max().item(), (square - square.T).abs().max().item()
    if gap > 10 * math.sqrt(rounding) * scale:
        raise ValueError(
            f"product must be that of a symmetric matrix, the same at each call; "
            f"got entries up to {scale:.3g} that differ by {gap:.3g} from their mirror images"
        )
