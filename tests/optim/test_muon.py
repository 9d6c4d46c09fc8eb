import copy
import math

import pytest
import torch
from torch import nn

from lmlosses.optim.adam import AdamW
from lmlosses.optim.muon import BATCH, Muon, _fastest, newton_schulz

CONVERGING = (1.875, -1.25, 0.375)


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def twins(shape, dtype):
    start = drawn(*shape, dtype=dtype)
    return nn.Parameter(start.clone()), nn.Parameter(start.clone())


def with_singular_values(values, rows, columns, seed=0):
    u, _ = torch.linalg.qr(drawn(rows, len(values), seed=seed))
    v, _ = torch.linalg.qr(drawn(columns, len(values), seed=seed + 1))
    return u, torch.tensor(values, dtype=torch.float64), v


def orthogonal(size, seed):
    return torch.linalg.qr(drawn(size, size, seed=seed))[0]


class TestNewtonSchulz:
    def test_one_by_one_matrix_follows_the_polynomial(self):
        s = 1.0  # divided by its norm
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        found = newton_schulz(torch.tensor([[-7.0]], dtype=torch.float64))
        assert found.item() == pytest.approx(-s, abs=1e-14)

    @pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
    def test_singular_values_go_through_the_polynomial_and_vectors_stay(self, shape):
        u, s, v = with_singular_values([5.0, 0.3, 0.02], *shape)
        expected = s / s.norm()
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        found = newton_schulz(u @ s.diag() @ v.T)
        torch.testing.assert_close(found, u @ expected.diag() @ v.T, rtol=1e-10, atol=1e-12)

    def test_default_coefficients_keep_values_between_068_and_114(self):
        for small in torch.logspace(-4, 0, 200, dtype=torch.float64):
            pair = torch.stack([small, torch.ones_like(small)])
            scaled, found = pair / pair.norm(), newton_schulz(pair.diag()).diagonal()
            kept = found[scaled >= 0.01]
            assert kept.min() > 0.68 and kept.max() < 1.14
            assert (found <= 3.4445**5 * scaled).all() and found.max() < 1.21

    @pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
    def test_converging_coefficients_reach_the_polar_factor(self, shape):
        matrix = drawn(*shape)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        found = newton_schulz(matrix, CONVERGING, steps=30)
        torch.testing.assert_close(found, u @ vh, rtol=0, atol=1e-12)

    def test_batch_is_the_matrices_one_by_one(self):
        matrices = drawn(2, 3, 5, 4)
        one_by_one = torch.stack(
            [torch.stack([newton_schulz(matrix) for matrix in row]) for row in matrices]
        )
        torch.testing.assert_close(newton_schulz(matrices), one_by_one, rtol=1e-12, atol=1e-13)

    def test_size_of_the_matrix_does_not_matter(self):
        matrix = drawn(4, 6)
        torch.testing.assert_close(newton_schulz(matrix), newton_schulz(matrix * 1e6))

    def test_zero_stays_zero(self):
        assert not newton_schulz(torch.zeros(3, 4)).any()

    def test_empty_matrix_stays_empty(self):
        assert newton_schulz(torch.zeros(0, 4)).shape == (0, 4)

    def test_no_steps_divide_by_the_norm(self):
        matrix = drawn(4, 6)
        torch.testing.assert_close(newton_schulz(matrix, steps=0), matrix / matrix.norm())

    def test_result_has_the_dtype_of_the_matrix(self):
        matrix = drawn(4, 6, dtype=torch.bfloat16)
        assert newton_schulz(matrix, dtype=torch.float32).dtype == torch.bfloat16

    def test_argument_is_left_alone(self):
        matrix = drawn(4, 6, dtype=torch.bfloat16)
        before = matrix.clone()
        newton_schulz(matrix, dtype=torch.bfloat16)
        assert torch.equal(matrix, before)

    def test_double_precision_stays_double(self):
        assert _fastest(drawn(2, 2)) == torch.float64
        assert _fastest(torch.zeros(2, 2, device="meta")) == torch.float32

    @pytest.mark.bad_input
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"steps": -1}, ValueError, "steps must not be negative; got -1"),
            ({"steps": 2.0}, TypeError, "steps must be a whole number"),
            ({"coefficients": (1.0, 2.0)}, ValueError, "coefficients must be three numbers"),
            ({"eps": -1.0}, ValueError, "eps must not be negative"),
            ({"dtype": torch.int32}, TypeError, "must be a floating-point dtype; got torch.int32"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, settings, error, message):
        with pytest.raises(error, match=message):
            newton_schulz(torch.eye(2), **settings)

    @pytest.mark.bad_input
    def test_vector_and_whole_numbers_are_refused(self):
        with pytest.raises(ValueError, match="matrix must have at least 2 axes"):
            newton_schulz(torch.ones(3))
        with pytest.raises(TypeError, match="matrix must be a floating-point tensor"):
            newton_schulz(torch.ones(3, 3, dtype=torch.long))


def test_first_step_by_hand():
    # the gradient of a 1 x 1 matrix becomes its sign times 0.7024 after five polynomials of 1
    s = 1.0
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    w = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    w.grad = torch.tensor([[300.0]], dtype=torch.float64)
    Muon([w], lr=0.1, weight_decay=0.5).step()
    assert w.item() == pytest.approx(2.0 * (1 - 0.05) - 0.1 * s, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 8), (40, 8)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": False, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.5, "lr": 0.02},
        {"ns_coefficients": CONVERGING, "ns_steps": 7, "eps": 1e-3},
    ],
)
def test_fifty_steps_in_bfloat16_agree_with_torch_to_the_bit(settings, shape, dtype):
    ours, theirs = twins(shape, dtype)
    mine = Muon([ours], ns_dtype=torch.bfloat16, **settings)
    reference = torch.optim.Muon([theirs], **settings)
    for step in range(50):
        ours.grad = drawn(*shape, seed=step, dtype=dtype)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    assert torch.equal(ours, theirs)
    buffers = (opt.state[p]["momentum_buffer"] for opt, p in ((mine, ours), (reference, theirs)))
    assert torch.equal(*buffers)


def test_fifty_steps_in_double_precision_agree_with_a_slow_loop():
    ours, theirs = twins((6, 4), torch.float64)
    optimizer, momentum = Muon([ours], lr=0.02), torch.zeros(6, 4, dtype=torch.float64)
    for step in range(50):
        gradient = drawn(6, 4, seed=step)
        ours.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        u, s, vh = torch.linalg.svd(0.95 * momentum + 0.05 * gradient, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        with torch.no_grad():
            theirs.mul_(1 - 0.02 * 0.1).sub_(0.02 * math.sqrt(6 / 4) * u @ s.diag() @ vh)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_matrices_of_one_shape_move_as_they_would_alone():
    together = [nn.Parameter(drawn(5, 3, seed=k)) for k in range(4)]
    together.append(nn.Parameter(drawn(3, 5, seed=9)))
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    for step in range(3):
        for k, param in enumerate(together):
            param.grad = drawn(*param.shape, seed=100 * step + k)
            alone[k].grad = param.grad.clone()
        if step == 0:
            batched, singly = Muon(together), [Muon([p]) for p in alone]
        batched.step()
        for optimizer in singly:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_batches_hold_a_bounded_number_of_entries(monkeypatch):
    from lmlosses.optim import muon

    sizes = []

    def watched(matrix, *arguments, **settings):
        sizes.append(matrix.shape)
        return newton_schulz(matrix, *arguments, **settings)

    monkeypatch.setattr(muon, "newton_schulz", watched)
    monkeypatch.setattr(muon, "BATCH", 2 * 15)
    params = [nn.Parameter(drawn(5, 3, seed=k)) for k in range(5)]
    for param in params:
        param.grad = torch.ones_like(param)
    Muon(params).step()
    assert sizes == [(2, 5, 3), (2, 5, 3), (5, 3)] and BATCH > 1e6


def test_turning_rows_and_columns_turns_the_path():
    left, right = orthogonal(5, 1), orthogonal(4, 2)
    plain, turned = nn.Parameter(drawn(5, 4)), nn.Parameter(left @ drawn(5, 4) @ right)
    optimizers = Muon([plain], lr=0.1), Muon([turned], lr=0.1)
    for step in range(10):
        plain.grad = drawn(5, 4, seed=step)
        turned.grad = left @ plain.grad @ right
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(left @ plain @ right, turned, rtol=1e-10, atol=1e-10)


def test_companion_moves_as_adamw_beside_untouched_matrices():
    settings = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    vector, twin = twins((7,), torch.float64)
    matrix, matrix_twin = twins((4, 3), torch.float64)
    both = Muon([{"params": [matrix]}, {"params": [vector], "companion": True, **settings}])
    apart = Muon([matrix_twin]), AdamW([twin], **settings)
    for step in range(10):
        vector.grad, matrix.grad = drawn(7, seed=step), drawn(4, 3, seed=step)
        twin.grad, matrix_twin.grad = vector.grad.clone(), matrix.grad.clone()
        both.step()
        for optimizer in apart:
            optimizer.step()
    assert torch.equal(vector, twin) and torch.equal(matrix, matrix_twin)
    assert set(both.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}


def test_companion_takes_the_defaults_of_adamw_and_the_direction_of_muon():
    vector = nn.Parameter(torch.zeros(3))
    optimizer = Muon([{"params": [vector], "companion": True, "lr": 0.1}], maximize=True)
    group = optimizer.param_groups[0]
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    assert group["weight_decay"] == 0.01
    vector.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(vector.data, torch.full((3,), 0.1))


def test_interrupted_run_with_companion_continues_to_the_bit():
    def start():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, Muon(
            [
                {"params": [model.weight], "lr": 0.02},
                {"params": [model.bias], "companion": True, "lr": 1e-3},
            ]
        )

    def advance(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(drawn(8, 4, seed=step, dtype=torch.float32)).square().mean().backward()
            optimizer.step()

    (whole, optimizer), (part, first), (resumed, second) = start(), start(), start()
    advance(whole, optimizer, range(6))
    advance(part, first, range(3))
    resumed.load_state_dict(part.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    advance(resumed, second, range(3, 6))
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)


def test_checkpoint_without_the_companion_is_refused():
    model = nn.Linear(3, 3)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "companion": True, "lr": 0.1}]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    saved = Muon(groups)
    saved.step()
    broken = copy.deepcopy(saved.state_dict())
    del broken["state"][1]["exp_avg_sq"]
    with pytest.raises(ValueError, match="state of parameter 1 must hold"):
        Muon(groups).load_state_dict(broken)


def test_rate_as_a_tensor_is_the_rate():
    ours, theirs = twins((4, 3), torch.float64)
    optimizers = Muon([ours], lr=torch.tensor(0.1, dtype=torch.float64)), Muon([theirs], lr=0.1)
    for optimizer, param in zip(optimizers, (ours, theirs), strict=True):
        param.grad = drawn(4, 3, seed=5)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


def test_momentum_of_half_precision_is_single_and_not_overwritten():
    param = nn.Parameter(drawn(4, 3, dtype=torch.bfloat16))
    optimizer = Muon([param], nesterov=False, ns_dtype=torch.bfloat16)
    param.grad = torch.ones_like(param)
    optimizer.step()
    buffer = optimizer.state[param]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    torch.testing.assert_close(buffer, torch.full((4, 3), 0.05))


def test_step_runs_on_the_meta_device():
    params = [nn.Parameter(torch.zeros(4, 3, device="meta")) for _ in range(2)]
    vector = nn.Parameter(torch.zeros(4, device="meta"))
    for param in (*params, vector):
        param.grad = torch.zeros_like(param)
    rate = torch.zeros((), device="meta")
    companion = {"params": [vector], "companion": True, "lr": rate}
    Muon([{"params": params}, companion], lr=rate).step()


@pytest.mark.bad_input
def test_what_is_no_matrix_is_refused_by_name():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"got shape \(2,\) for bias, which belongs in a group"):
        Muon(layer.named_parameters())
    with pytest.raises(ValueError, match=r"takes matrices; got shape \(2,\) for parameter 1"):
        Muon(layer.parameters())
    with pytest.raises(ValueError, match=r"got shape \(4, 3, 5, 5\)"):
        Muon([nn.Conv2d(3, 4, 5).weight])


@pytest.mark.bad_input
def test_sharded_matrix_is_refused():
    sharded = nn.Parameter(torch.zeros(2, 2))
    sharded.to_local = lambda: sharded
    with pytest.raises(TypeError, match="Muon reads whole tensors .* DTensor for parameter 0"):
        Muon([sharded])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1\.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative; got -0.1"),
        ({"adjust_lr_fn": "best"}, "adjust_lr_fn must be None, 'original' or .* got 'best'"),
        ({"ns_steps": -1}, "steps must not be negative; got -1"),
        ({"lr": -1.0}, "lr must not be negative"),
        ({"companion": True}, "a companion group must give its own lr"),
        ({"companion": True, "lr": 0.1, "betas": (1.0, 0.9)}, "beta1 must lie in"),
        ({"companion": True, "lr": 0.1, "weight_decay": -1.0}, "weight_decay must not be neg"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [nn.Parameter(torch.zeros(2, 2))], **settings}])
