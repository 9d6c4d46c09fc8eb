"""A loss on a batch of embeddings that is larger than what the encoders can hold.

A contrastive loss needs all embeddings of a batch at once, its encoders need not: their
activations are what fills the memory. Embed the batch piece by piece without activations, take
the loss and its gradient in the embeddings, then embed each piece again and pass its gradient on.
The gradients are those of the whole batch, at the price of one more forward pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lmlosses._checks import check_floating, check_min_ndim, check_tensor

Encoder = Callable[[Any], Tensor]


class _Randomness:
    """The states of the random number generators at one moment, to be gone back to."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        cuda = {tensor.device.index for tensor in tensors if tensor.is_cuda}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
            # for an encoder that moves its pieces there
            cuda.add(torch.cuda.current_device())
        self._cuda = sorted(cuda)
        self._states = [torch.cuda.get_rng_state(index) for index in self._cuda]
        self._cpu = torch.get_rng_state()

    def restore(self) -> None:
        """Go back to them."""
        torch.set_rng_state(self._cpu)
        for index, state in zip(self._cuda, self._states, strict=True):
            torch.cuda.set_rng_state(state, index)


def _tensors(piece: Any) -> Iterable[Tensor]:
    """The tensors that a piece is made of."""
    if isinstance(piece, Tensor):
        yield piece
    elif isinstance(piece, Mapping):
        for value in piece.values():
            yield from _tensors(value)
    elif isinstance(piece, list | tuple):
        for value in piece:
            yield from _tensors(value)


def _embed(
    encoder: Encoder, pieces: Sequence[Any], side: int
) -> tuple[list[Tensor], list[_Randomness]]:
    """Embeddings of all pieces, without activations, and the randomness before each."""
    found, before = [], []
    for index, piece in enumerate(pieces):
        before.append(_Randomness(_tensors(piece)))
        with torch.no_grad():
            embedded = encoder(piece)
        if not isinstance(embedded, Tensor):
            raise TypeError(
                f"encoders[{side}] must return a tensor; got {type(embedded).__name__} for "
                f"piece {index}"
            )
        name = f"the result of encoders[{side}] for piece {index}"
        check_floating(**{name: embedded})
        check_min_ndim(name, embedded, 1)
        found.append(embedded)
    return found, before


def cached_backward(
    loss: Callable[..., Float[Tensor, ""]],
    encoders: Sequence[Encoder],
    pieces: Sequence[Sequence[Any]],
) -> Float[Tensor, ""]:
    r"""Backward pass of a loss on all embeddings, with the activations of one piece at a time.

    With embeddings :math:`e_i = f_\theta(x_i)` the chain rule is taken in two halves,

    .. math:: \frac{d L}{d \theta} = \sum_i
        \left( \frac{\partial e_i}{\partial \theta} \right)^{\!\top}
        \frac{\partial L}{\partial e_i} ,

    the right factor once for the whole batch, the left one piece by piece. Dropout draws the same
    masks both times. What an encoder computes across the examples of a batch, such as the
    statistics of batch normalization, it computes within a piece; running statistics are updated
    twice. Under ``DistributedDataParallel`` gradients are to be exchanged once: wrap the call in
    ``no_sync()`` and average them afterwards.

    Args:
        loss: From the embeddings of each side, all pieces one after the other along the first
            axis, to one number. Parameters of its own get their gradients too.
        encoders: One for each side, from a piece to its embeddings, one row per example. May be
            one and the same.
        pieces: For each side the pieces of the batch.

    Returns:
        The loss, detached; gradients have been added to ``grad`` as ``backward()`` does.

    Raises:
        TypeError: If an encoder does not return a floating-point tensor, or the loss no tensor.
        ValueError: If there are not as many lists of pieces as encoders, a list is empty, an
            encoder returns a scalar, or the loss is not one number.

    Example:
        >>> import torch
        >>> from lmlosses.gradient_cache import cached_backward
        >>> from lmlosses.losses import in_batch_info_nce
        >>> encoder, batch = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> def loss(queries, keys):
        ...     return in_batch_info_nce(queries, keys).mean()
        >>> value = cached_backward(loss, [encoder, encoder], [batch.split(2), batch.split(2)])
        >>> encoder.weight.grad.shape
        torch.Size([2, 3])

    References:
        Gao et al. (2021), Scaling deep contrastive learning batch size under memory limited
        setup, arXiv:2101.06983, section 3.2.
    """
    if len(encoders) != len(pieces):
        raise ValueError(
            f"pieces must have one list per encoder, {len(encoders)}; got {len(pieces)}"
        )
    for side, parts in enumerate(pieces):
        if len(parts) == 0:
            raise ValueError(f"pieces[{side}] must have at least one piece; got none")
    embedded = [
        _embed(encoder, parts, side)
        for side, (encoder, parts) in enumerate(zip(encoders, pieces, strict=True))
    ]
    # older versions of torch hand out casts that autocast kept without their gradient, #65766
    torch.clear_autocast_cache()
    leaves = [torch.cat(found).requires_grad_() for found, _ in embedded]
    value = loss(*leaves)
    check_tensor(**{"the result of loss": value})
    if value.numel() != 1:
        raise ValueError(f"loss must return one number; got shape {tuple(value.shape)}")
    torch.autograd.backward([value])
    after = _Randomness(leaves)
    for encoder, parts, leaf, (found, before) in zip(
        encoders, pieces, leaves, embedded, strict=True
    ):
        if leaf.grad is None:  # the loss does not ask for this side
            continue
        gradients = torch.split(leaf.grad, [len(part) for part in found])
        for part, gradient, randomness in zip(parts, gradients, before, strict=True):
            randomness.restore()
            again = encoder(part)
            if again.requires_grad:
                torch.autograd.backward([again], [gradient])
    after.restore()
    return value.detach()
