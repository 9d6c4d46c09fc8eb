"""The backward pass piece by piece against that of the whole batch."""

import collections

import pytest
import torch
from torch import nn

from lmlosses.gradient_cache import cached_backward
from lmlosses.losses import clip_loss, in_batch_info_nce
from lmlosses.nn import LearnedTemperature
from tests.logprobs.test_chunked import LiveMemory

DOUBLE = torch.float64
BATCH, WIDTH, DIM = 12, 5, 3
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def _normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def _encoder(seed, *, dropout=0.0, width=WIDTH):
    torch.manual_seed(seed)
    layers = nn.Linear(width, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, DIM)
    return nn.Sequential(*layers).double()


def _sides(*sizes):
    """Two sides of a batch, whole, and in pieces of these sizes."""
    whole = _normal(BATCH, WIDTH), _normal(BATCH, WIDTH, seed=1)
    return whole, [side.split(sizes[0] if len(sizes) == 1 else list(sizes)) for side in whole]


def _gradients(*modules):
    """The gradients of all parameters, which are forgotten."""
    params = [param for module in modules for param in module.parameters()]
    found = [None if param.grad is None else param.grad.clone() for param in params]
    for param in params:
        param.grad = None
    return found


def _mean_info_nce(queries, keys):
    return in_batch_info_nce(queries, keys).mean()


@pytest.mark.parametrize("sizes", [(12,), (4,), (1,), (5, 4, 3), (7,)], ids=str)
def test_two_encoders_get_the_gradients_of_the_whole_batch(sizes):
    first, second = _encoder(0), _encoder(1)
    whole, pieces = _sides(*sizes)
    expected = _mean_info_nce(first(whole[0]), second(whole[1]))
    expected.backward()
    gradients = _gradients(first, second)
    found = cached_backward(_mean_info_nce, [first, second], pieces)
    torch.testing.assert_close(found, expected.detach(), **EXACT)
    torch.testing.assert_close(_gradients(first, second), gradients, **EXACT)
    assert not found.requires_grad


def test_one_encoder_may_embed_both_sides_and_the_sides_may_be_cut_differently():
    encoder = _encoder(0)
    whole, _ = _sides(4)
    _mean_info_nce(encoder(whole[0]), encoder(whole[1])).backward()
    expected = _gradients(encoder)
    pieces = [whole[0].split(5), whole[1].split([2, 10])]
    cached_backward(_mean_info_nce, [encoder, encoder], pieces)
    torch.testing.assert_close(_gradients(encoder), expected, **EXACT)


def test_three_sides_of_different_lengths_are_one_more_encoder_and_list():
    encoders = [_encoder(0), _encoder(1), _encoder(2, width=4)]
    whole, pieces = _sides(4)
    negatives = _normal(7, 4, seed=2)

    def loss(queries, keys, negatives):
        return in_batch_info_nce(queries, keys, negatives).mean()

    embedded = [e(side) for e, side in zip(encoders, (*whole, negatives), strict=True)]
    loss(*embedded).backward()
    expected = _gradients(*encoders)
    cached_backward(loss, encoders, [*pieces, negatives.split(3)])
    torch.testing.assert_close(_gradients(*encoders), expected, **EXACT)


def test_dropout_draws_the_same_masks_both_times():
    first, second = _encoder(0, dropout=0.5), _encoder(1, dropout=0.5)
    _, pieces = _sides(5, 4, 3)
    torch.manual_seed(7)
    # piece after piece as there, but with all activations
    embedded = [
        torch.cat([encoder(piece) for piece in side])
        for encoder, side in zip((first, second), pieces, strict=True)
    ]
    expected = _mean_info_nce(*embedded)
    expected.backward()
    gradients = _gradients(first, second)
    after = torch.rand(3)
    torch.manual_seed(7)
    found = cached_backward(_mean_info_nce, [first, second], pieces)
    torch.testing.assert_close(found, expected.detach(), **EXACT)
    torch.testing.assert_close(_gradients(first, second), gradients, **EXACT)
    assert torch.equal(torch.rand(3), after)  # and goes on as if there had been one pass


def test_randomness_of_the_loss_is_part_of_the_sequence_too():
    encoder = _encoder(0, dropout=0.5)
    _, (pieces, _) = _sides(4)

    def loss(embedded):
        return (embedded * torch.rand_like(embedded)).sum()

    torch.manual_seed(7)
    loss(torch.cat([encoder(piece) for piece in pieces])).backward()
    expected, after = _gradients(encoder), torch.rand(3)
    torch.manual_seed(7)
    cached_backward(loss, [encoder], [pieces])
    torch.testing.assert_close(_gradients(encoder), expected, **EXACT)
    assert torch.equal(torch.rand(3), after)


def test_parameters_of_the_loss_get_their_gradients():
    first, second, temperature = _encoder(0), _encoder(1), LearnedTemperature(0.1).double()
    whole, pieces = _sides(4)

    def loss(images, texts):
        return clip_loss(images, texts, temperature=temperature()).mean()

    loss(first(whole[0]), second(whole[1])).backward()
    expected = _gradients(first, second, temperature)
    assert expected[-1].abs() > 1e-3
    cached_backward(loss, [first, second], pieces)
    torch.testing.assert_close(_gradients(first, second, temperature), expected, **EXACT)


def test_gradients_are_added_to_those_that_are_there():
    encoder = _encoder(0)
    _, pieces = _sides(4)
    cached_backward(_mean_info_nce, [encoder, encoder], pieces)
    once = [param.grad.clone() for param in encoder.parameters()]
    cached_backward(_mean_info_nce, [encoder, encoder], pieces)
    twice = _gradients(encoder)
    torch.testing.assert_close(twice, [2 * gradient for gradient in once], **EXACT)


@pytest.mark.parametrize("kind", [dict, collections.UserDict, tuple])
def test_pieces_may_be_whatever_the_encoder_takes(kind):
    encoder = _encoder(0)
    whole, pieces = _sides(4)

    def of_parts(piece):
        if kind is tuple:
            return encoder(piece[0]) * piece[1]
        return encoder(piece["inputs"]) * piece["scale"]

    def parts(piece):
        return kind((piece, 2.0)) if kind is tuple else kind(inputs=piece, scale=2.0)

    _mean_info_nce(2 * encoder(whole[0]), 2 * encoder(whole[1])).backward()
    expected = _gradients(encoder)
    as_parts = [[parts(piece) for piece in side] for side in pieces]
    cached_backward(_mean_info_nce, [of_parts, of_parts], as_parts)
    torch.testing.assert_close(_gradients(encoder), expected, **EXACT)


def test_a_side_that_the_loss_ignores_is_not_embedded_again():
    first, second = _encoder(0), _encoder(1)
    calls = []

    def counted(piece):
        calls.append(len(piece))
        return second(piece)

    _, pieces = _sides(4)
    cached_backward(lambda queries, keys: queries.square().sum(), [first, counted], pieces)
    assert calls == [4, 4, 4]
    assert all(param.grad is not None for param in first.parameters())
    assert all(param.grad is None for param in second.parameters())


def test_an_encoder_that_is_not_trained_is_left_alone():
    first, frozen = _encoder(0), _encoder(1).requires_grad_(False)
    whole, pieces = _sides(4)
    _mean_info_nce(first(whole[0]), frozen(whole[1])).backward()
    expected = _gradients(first)
    cached_backward(_mean_info_nce, [first, frozen], pieces)
    torch.testing.assert_close(_gradients(first), expected, **EXACT)
    assert all(param.grad is None for param in frozen.parameters())


def test_inputs_that_want_their_gradient_get_it():
    encoder = _encoder(0)
    inputs = _normal(BATCH, WIDTH).requires_grad_()
    expected = torch.autograd.grad(_mean_info_nce(encoder(inputs), encoder(inputs)), inputs)
    leaves = [piece.detach().requires_grad_() for piece in inputs.split(4)]
    cached_backward(_mean_info_nce, [encoder, encoder], [leaves, leaves])
    torch.testing.assert_close(torch.cat([leaf.grad for leaf in leaves]), *expected, **EXACT)


def test_under_autocast_all_parameters_get_their_gradients():
    encoder = _encoder(0).float()
    pieces = [side.float().split(4) for side in _sides(4)[0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = [torch.cat([encoder(piece) for piece in side]) for side in pieces]
        _mean_info_nce(*whole).backward()
        expected = _gradients(encoder)
        cached_backward(_mean_info_nce, [encoder, encoder], pieces)
    found = _gradients(encoder)
    for gradient, other in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        # the sums over a batch are rounded to bfloat16 in other places
        torch.testing.assert_close(gradient, other, rtol=0.05, atol=0.02)


def test_activations_of_one_piece_at_a_time_are_held():
    width, depth, batch, piece = 32, 16, 256, 16
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    encoder = nn.Sequential(*layers, nn.Linear(width, DIM))
    inputs = _normal(batch, width).float()

    def loss(queries, keys):  # which needs little memory of its own
        return (queries * keys).sum()

    with LiveMemory() as whole:
        loss(encoder(inputs), encoder(inputs)).backward()
    _gradients(encoder)
    with LiveMemory() as cached:
        pieces = inputs.split(piece)
        cached_backward(loss, [encoder, encoder], [pieces, pieces])
    activations = 2 * depth * batch * width * 4  # of both sides, one tensor a layer at least
    assert whole.peak > activations
    assert cached.peak < activations / 4


@pytest.mark.bad_input
def test_bad_arguments_are_named():
    encoder = _encoder(0)
    _, pieces = _sides(4)
    both = [encoder, encoder]
    with pytest.raises(ValueError, match="pieces must have one list per encoder, 2; got 1"):
        cached_backward(_mean_info_nce, both, pieces[:1])
    with pytest.raises(ValueError, match=r"pieces\[1\] must have at least one piece; got none"):
        cached_backward(_mean_info_nce, both, [pieces[0], []])
    with pytest.raises(TypeError, match=r"encoders\[1\] must return a tensor; got tuple for pie"):
        cached_backward(_mean_info_nce, [encoder, lambda x: (x,)], pieces)
    with pytest.raises(TypeError, match=r"encoders\[0\] for piece 0 must be a floating-point ten"):
        cached_backward(_mean_info_nce, [lambda x: x.long(), encoder], pieces)
    with pytest.raises(ValueError, match=r"encoders\[0\] for piece 0 must have at least 1 axes"):
        cached_backward(_mean_info_nce, [lambda x: x.sum(), encoder], pieces)
    with pytest.raises(ValueError, match=r"loss must return one number; got shape \(12,\)"):
        cached_backward(in_batch_info_nce, both, pieces)
    with pytest.raises(TypeError, match="the result of loss must be a torch.Tensor; got float 1"):
        cached_backward(lambda q, k: 1.0, both, pieces)
    assert all(param.grad is None for param in encoder.parameters())
