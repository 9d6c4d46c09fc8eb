"""Tests of lmlosses.lab.models."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmlosses import cpu_generator
from lmlosses.lab.models import (
    LearnedPositions,
    rotary,
    scaled_dot_product_attention,
    sinusoidal_positions,
)

BATCH, QUERIES, KEYS, DIM, FEATURES = 2, 3, 5, 4, 6


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=cpu_generator(seed), dtype=dtype)


def inputs():
    return (
        draw(BATCH, QUERIES, DIM),
        draw(BATCH, KEYS, DIM, seed=1),
        draw(BATCH, KEYS, FEATURES, seed=2),
    )


def torch_attention(query, key, value, **settings):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **settings)


# ---- attention


def test_equal_scores_give_the_plain_mean_of_the_values():
    value = torch.tensor([[1.0], [3.0]])
    attended = scaled_dot_product_attention(torch.zeros(1, 4), torch.ones(2, 4), value)
    assert attended.output.item() == 2.0
    torch.testing.assert_close(attended.weights, torch.tensor([[0.5, 0.5]]))


def test_a_score_higher_by_the_square_root_of_dim_is_one_nat():
    key = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    query = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    weights = scaled_dot_product_attention(query, key, key).weights
    assert (weights[0, 1] / weights[0, 0]).item() == pytest.approx(math.e, rel=1e-6)


def test_attention_agrees_with_torch():
    torch.testing.assert_close(
        scaled_dot_product_attention(*inputs()).output,
        torch_attention(*inputs()),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("per_batch", [False, True])
def test_masked_attention_agrees_with_torch(per_batch):
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(1)
    if per_batch:
        mask = torch.stack([mask, mask.flip(-1)])
    torch.testing.assert_close(
        scaled_dot_product_attention(*inputs(), mask=mask).output,
        torch_attention(*inputs(), attn_mask=mask),
        rtol=1e-12,
        atol=1e-12,
    )


def test_temperature_is_one_over_torchs_scale_and_may_be_learned():
    torch.testing.assert_close(
        scaled_dot_product_attention(*inputs(), temperature=0.7).output,
        torch_attention(*inputs(), scale=1 / 0.7),
        rtol=1e-12,
        atol=1e-12,
    )
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def total(temperature):
        return scaled_dot_product_attention(*inputs(), temperature=temperature).output

    assert torch.autograd.gradcheck(total, temperature)


def test_the_output_is_the_expectation_of_the_values_under_the_weights():
    query, key, value = inputs()
    attended = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(
        attended.weights.sum(-1), torch.ones(BATCH, QUERIES, dtype=torch.float64)
    )
    for b in range(BATCH):
        for i in range(QUERIES):
            expected = sum(attended.weights[b, i, j] * value[b, j] for j in range(KEYS))
            torch.testing.assert_close(attended.output[b, i], expected)


def test_a_query_that_may_look_at_nothing_gets_zero_and_finite_gradients():
    query, key, value = (tensor.requires_grad_() for tensor in inputs())
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    mask[1] = False
    attended = scaled_dot_product_attention(query, key, value, mask=mask)
    assert (attended.output[:, 1] == 0).all() and (attended.weights[:, 1] == 0).all()
    attended.output.sum().backward()
    assert (query.grad[:, 1] == 0).all() and (query.grad[:, 0] != 0).any()
    for tensor in (query, key, value):
        assert tensor.grad.isfinite().all()


def test_what_stands_at_positions_nobody_may_see_is_ignored_even_nan():
    query, key, value = inputs()
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    mask[:, 3] = False
    expected = scaled_dot_product_attention(query, key, value, mask=mask).output
    key[:, 3], value[:, 3] = torch.nan, torch.inf
    query, key, value = (tensor.requires_grad_() for tensor in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, mask=mask).output
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad.isfinite().all()


def test_attention_passes_gradcheck_twice():
    arguments = [tensor[:1, :2, :2].clone().requires_grad_() for tensor in inputs()]

    def output(query, key, value):
        return scaled_dot_product_attention(query, key, value).output

    assert torch.autograd.gradcheck(output, arguments)
    assert torch.autograd.gradgradcheck(output, arguments)


def test_attention_saturates_cleanly_at_extreme_scores():
    query, key, value = (tensor.float() for tensor in inputs())
    output = scaled_dot_product_attention(1e4 * query, key, value).output
    best = (query @ key.transpose(-2, -1)).argmax(dim=-1)
    expected = value.gather(1, best.unsqueeze(-1).expand(-1, -1, FEATURES))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attention_is_computed_in_float32(dtype):
    rounded = [tensor.to(dtype) for tensor in inputs()]
    value = scaled_dot_product_attention(*rounded)
    exact = scaled_dot_product_attention(*(tensor.double() for tensor in rounded))
    assert value.output.dtype == value.weights.dtype == torch.float32
    assert exact.output.dtype == torch.float64
    torch.testing.assert_close(value.output.double(), exact.output, rtol=1e-5, atol=1e-5)


def test_attention_takes_any_batch_axes_layout_and_an_empty_batch():
    query, key, value = inputs()
    plain = scaled_dot_product_attention(query[0], key[0], value[0]).output
    batched = scaled_dot_product_attention(query, key, value).output
    heads = [tensor.unsqueeze(1).expand(-1, 2, -1, -1) for tensor in inputs()]
    torch.testing.assert_close(plain, batched[0])
    torch.testing.assert_close(scaled_dot_product_attention(*heads).output[:, 1], batched)
    strided = [tensor.transpose(-2, -1).contiguous().transpose(-2, -1) for tensor in inputs()]
    torch.testing.assert_close(scaled_dot_product_attention(*strided).output, batched)
    empty = scaled_dot_product_attention(query[:0], key[:0], value[:0]).output
    assert empty.shape == (0, QUERIES, FEATURES)


def test_attention_runs_where_values_cannot_be_read():
    tensors = [tensor.to("meta").requires_grad_() for tensor in inputs()]
    mask = torch.empty(QUERIES, KEYS, dtype=torch.bool, device="meta")
    scaled_dot_product_attention(*tensors, mask=mask).output.sum().backward()
    assert all(tensor.grad.device.type == "meta" for tensor in tensors)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4,), (5, 4), (5, 6)], "query must have at least 2 axes"),
        ([(3, 4), (4,), (5, 6)], "key must have at least 2 axes"),
        ([(3, 4), (5, 4), (5,)], "value must have at least 2 axes"),
        ([(3, 4), (5, 3), (5, 6)], r"key must have shape \(5, 4\), query's batch and dim"),
        ([(2, 3, 4), (1, 5, 4), (2, 5, 6)], r"key must have shape \(2, 5, 4\), query's batch"),
        ([(3, 4), (5, 4), (4, 6)], r"value must have shape \(5, 6\), one row per key"),
        ([(3, 0), (5, 0), (5, 6)], "query must have at least one entry along axis -1"),
        ([(3, 4), (0, 4), (0, 6)], "key must have at least one entry along axis -2"),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.bad_input
def test_attention_refuses_masks_that_do_not_fit_and_bad_temperatures():
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 5\), one row per query"):
        scaled_dot_product_attention(*inputs(), mask=torch.ones(5, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3, 5\), the batch, the"):
        scaled_dot_product_attention(*inputs(), mask=torch.ones(1, 3, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        scaled_dot_product_attention(*inputs(), mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="temperature must be positive; got 0.0"):
        scaled_dot_product_attention(*inputs(), temperature=0.0)
    with pytest.raises(TypeError, match="value must be a floating-point tensor"):
        scaled_dot_product_attention(*inputs()[:2], torch.zeros(2, 5, 6, dtype=torch.long))


# ---- sinusoidal positions


def test_the_first_positions_by_hand():
    expected = [[0.0, 1.0, 0.0, 1.0], [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)]]
    torch.testing.assert_close(sinusoidal_positions(2, 4), torch.tensor(expected))


def test_sinusoidal_positions_agree_with_a_slow_loop_far_from_the_start():
    length, dim, base = 3000, 6, 50.0
    table = sinusoidal_positions(length, dim, base=base)
    assert table.shape == (length, dim) and table.dtype == torch.float32
    for position in (0, 1, 17, 2999):
        row = []
        for i in range(dim // 2):
            angle = position / base ** (2 * i / dim)
            row += [math.sin(angle), math.cos(angle)]
        torch.testing.assert_close(table[position], torch.tensor(row), rtol=0, atol=1e-6)


def test_sinusoidal_products_depend_on_the_distance_alone():
    table = sinusoidal_positions(40, 8).double()
    products = table @ table.T
    for distance in range(20):
        frequencies = 10_000.0 ** -(torch.arange(0, 8, 2).double() / 8)
        expected = (distance * frequencies).cos().sum().expand(20)
        diagonal = products.diagonal(distance)[:20]
        torch.testing.assert_close(diagonal, expected, rtol=0, atol=1e-6)


def test_no_positions_are_an_empty_table():
    assert sinusoidal_positions(0, 4).shape == (0, 4)


def test_sinusoidal_positions_are_made_on_the_device_asked_for():
    assert sinusoidal_positions(3, 4, device=torch.device("meta")).device.type == "meta"
    assert sinusoidal_positions(3, 4).device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "base", "message"),
    [
        ((2, 3), 10.0, "dim must be even, since coordinates come in pairs; got 3"),
        ((2, 0), 10.0, "dim must be positive; got 0"),
        ((-1, 2), 10.0, "length must not be negative; got -1"),
        ((2, 2), 0.0, "base must be positive; got 0.0"),
    ],
)
def test_sinusoidal_positions_refuse(arguments, base, message):
    with pytest.raises(ValueError, match=message):
        sinusoidal_positions(*arguments, base=base)


# ---- learned positions


def test_learned_positions_are_the_first_rows_of_a_trained_table():
    positions = LearnedPositions(8, 3)
    torch.testing.assert_close(positions(5), positions.table[:5])
    positions(5).sum().backward()
    expected = torch.tensor([[1.0]] * 5 + [[0.0]] * 3).expand(8, 3)
    torch.testing.assert_close(positions.table.grad, expected)
    assert [name for name, _ in positions.named_parameters()] == ["table"]
    assert positions(0).shape == (0, 3)
    assert positions(8).shape == (8, 3)


def test_learned_positions_start_small_and_reproducibly():
    one = LearnedPositions(200, 50, std=0.1, generator=cpu_generator(3))
    two = LearnedPositions(200, 50, std=0.1, generator=cpu_generator(3))
    assert torch.equal(one.table, two.table)
    assert one.table.std().item() == pytest.approx(0.1, rel=0.03)
    assert abs(one.table.mean().item()) < 0.005
    assert LearnedPositions(200, 50).table.std().item() == pytest.approx(0.02, rel=0.03)


def test_learned_positions_end_with_their_table():
    with pytest.raises(ValueError, match="time must be at most 8, the table; got 9"):
        LearnedPositions(8, 3)(9)
    with pytest.raises(ValueError, match="time must not be negative; got -1"):
        LearnedPositions(8, 3)(-1)


@pytest.mark.parametrize(
    ("arguments", "std", "message"),
    [
        ((0, 3), 0.02, "length must be positive; got 0"),
        ((8, 0), 0.02, "dim must be positive; got 0"),
        ((8, 3), -1.0, "std must not be negative; got -1.0"),
    ],
)
def test_learned_positions_refuse(arguments, std, message):
    with pytest.raises(ValueError, match=message):
        LearnedPositions(*arguments, std=std)


# ---- rotary positions


def test_a_vector_turns_by_one_radian_a_position():
    turned = rotary(torch.tensor([[1.0, 0.0]] * 3))
    expected = [[math.cos(t), math.sin(t)] for t in range(3)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_rotary_is_a_complex_multiplication_of_neighbouring_pairs():
    x, base = draw(2, 7, 6), 100.0
    frequencies = base ** -(torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    angles = torch.arange(7, dtype=torch.float64).unsqueeze(-1) * frequencies
    turns = torch.polar(torch.ones_like(angles), angles)
    expected = torch.view_as_real(torch.view_as_complex(x.reshape(2, 7, 3, 2)) * turns)
    torch.testing.assert_close(rotary(x, base=base), expected.flatten(-2), rtol=1e-12, atol=1e-12)


def test_rotary_products_depend_on_the_distance_alone():
    query, key = draw(1, 8), draw(1, 8, seed=1)

    def product(at, to):
        return (rotary(query, offset=at) * rotary(key, offset=to)).sum()

    near = product(3, 1)
    torch.testing.assert_close(product(1002, 1000), near, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(product(0, -2), near, rtol=1e-12, atol=1e-12)
    assert (product(1, 3) - near).abs() > 1e-2  # the direction counts


def test_rotary_keeps_lengths_and_starts_where_told():
    x = draw(2, 9, 4)
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotary(x[:, 4:], offset=4), rotary(x)[:, 4:])
    torch.testing.assert_close(rotary(x)[:, 0], x[:, 0])


def test_the_other_pairing_is_a_reordering_of_the_coordinates():
    x, half = draw(5, 6), 3
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(5, dtype=torch.float64).unsqueeze(-1) * frequencies
    first, second = x[:, :half], x[:, half:]
    halves = torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            first * angles.sin() + second * angles.cos(),
        ],
        dim=-1,
    )
    order = torch.tensor([0, 3, 1, 4, 2, 5])  # (i, i + d/2) become neighbours
    torch.testing.assert_close(rotary(x[:, order]), halves[:, order], rtol=1e-12, atol=1e-12)


def test_late_positions_keep_their_angle_in_float32():
    x = torch.tensor([[1.0, 0.0]])
    turned = rotary(x, offset=10_000_019)  # whose float32 product with a frequency is off by 1
    expected = [[math.cos(10_000_019), math.sin(10_000_019)]]
    torch.testing.assert_close(turned, torch.tensor(expected), rtol=0, atol=1e-6)
    late = rotary(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), offset=1_000_003)
    angle = 1_000_003 / 100
    torch.testing.assert_close(
        late[0, 2:], torch.tensor([math.cos(angle), math.sin(angle)]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_turn_in_float32(dtype):
    x = draw(5, 4).to(dtype)
    assert rotary(x).dtype == torch.float32
    torch.testing.assert_close(rotary(x).double(), rotary(x.double()), rtol=1e-6, atol=1e-6)


def test_rotary_passes_gradcheck_and_takes_any_layout():
    x = draw(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(rotary, x)
    assert torch.autograd.gradgradcheck(rotary, x)
    torch.testing.assert_close(rotary(draw(4, 3).T), rotary(draw(4, 3).T.contiguous()))
    assert rotary(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert rotary(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


def test_rotary_runs_where_values_cannot_be_read():
    x = torch.empty(3, 4, device="meta", requires_grad=True)
    rotary(x).sum().backward()
    assert x.grad.device.type == "meta"


@pytest.mark.bad_input
def test_rotary_refuses():
    with pytest.raises(ValueError, match="dim must be even, since coordinates come in pairs; go"):
        rotary(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="x must have at least 2 axes"):
        rotary(torch.zeros(4))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        rotary(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="base must be positive; got -1.0"):
        rotary(torch.zeros(2, 4), base=-1.0)
