"""Tests of lmlosses.analysis.spectrum."""

import math

import pytest
import torch

from lmlosses import cpu_generator
from lmlosses.analysis.spectrum import (
    condition_number,
    sharpness,
    spectral_average,
    spectral_density,
    top_eigenvalues,
    trace_estimate,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=cpu_generator(seed), dtype=torch.float64)


def matrix_with(eigenvalues):
    """A symmetric matrix, its product on two parameters, and these."""
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    dim = len(eigenvalues)
    rotation = torch.linalg.qr(draw(dim, dim)).Q
    matrix = rotation @ eigenvalues.diag() @ rotation.T
    params = [torch.zeros(1, 2, dtype=torch.float64), torch.zeros(dim - 2, dtype=torch.float64)]

    def product(vectors):
        image = matrix @ torch.cat([vector.flatten() for vector in vectors])
        return [image[:2].view(1, 2), image[2:]]

    return matrix, product, params


def flat(vectors):
    return torch.cat([vector.flatten() for vector in vectors])


# ---- top eigenvalues


def test_top_eigenvalues_agree_with_a_full_decomposition():
    matrix, product, params = matrix_with(draw(40, seed=3))
    top = top_eigenvalues(product, params, count=5, tolerance=1e-9, generator=cpu_generator(0))
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(top.values, exact[:5], rtol=1e-9, atol=1e-9)
    for value, residual, vector in zip(top.values, top.residuals, top.vectors, strict=True):
        assert [part.shape for part in vector] == [(1, 2), (38,)]
        assert abs(flat(vector).norm() - 1) < 1e-12
        true = (matrix @ flat(vector) - value * flat(vector)).norm()
        assert true <= residual + 1e-12


def test_residuals_are_true_before_convergence_too_and_values_never_too_large():
    matrix, product, params = matrix_with(torch.linspace(0, 1, 60))
    top = top_eigenvalues(
        product, params, count=3, block_size=1, max_products=8, generator=cpu_generator(0)
    )
    assert top.products == 8
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    assert (top.values <= exact[:3] + 1e-12).all()
    for value, residual, vector in zip(top.values, top.residuals, top.vectors, strict=True):
        true = (matrix @ flat(vector) - value * flat(vector)).norm()
        torch.testing.assert_close(true, residual, rtol=1e-8, atol=1e-12)
        assert (exact - value).abs().min() <= residual


def test_a_long_run_gives_no_ghost_copies():
    # without re-orthogonalization the far eigenvalue is found again and again within 40 steps
    eigenvalues = torch.cat([torch.linspace(0, 1, 99), torch.tensor([100.0])])
    _, product, params = matrix_with(eigenvalues)
    top = top_eigenvalues(
        product, params, count=3, block_size=1, tolerance=1e-13, generator=cpu_generator(0)
    )
    expected = torch.tensor([100.0, 1.0, 97 / 98], dtype=torch.float64)
    torch.testing.assert_close(top.values, expected, rtol=1e-8, atol=1e-8)


def test_lanczos_goes_on_until_the_tolerance_is_met():
    # a tight cluster at the top: ten steps are off, the stop by residual is not
    eigenvalues = torch.cat([torch.linspace(-1, 1, 150), torch.tensor([1.02])])
    _, product, params = matrix_with(eigenvalues)
    early = top_eigenvalues(product, params, max_products=5, generator=cpu_generator(0))
    late = top_eigenvalues(product, params, tolerance=1e-4, generator=cpu_generator(0))
    assert early.values[0] < 1.0 and early.residuals[0] > 0.05
    assert abs(late.values[0] - 1.02) < 1e-4 and early.products < late.products < 100
    assert late.converged and not early.converged


def test_a_multiple_eigenvalue_is_found_as_often_as_the_block_is_wide():
    _, product, params = matrix_with([3.0, 3.0, 2.0, 1.0, 1.0, 1.0, -4.0])
    top = top_eigenvalues(product, params, count=3)
    torch.testing.assert_close(top.values, torch.tensor([3.0, 3.0, 2.0], dtype=torch.float64))
    once = top_eigenvalues(product, params, count=2, block_size=1)
    torch.testing.assert_close(once.values, torch.tensor([3.0, 2.0], dtype=torch.float64))


def test_the_identity_closes_its_space_at_once_and_the_search_goes_on_outside():
    params = [torch.zeros(5, dtype=torch.float64)]
    top = top_eigenvalues(list, params, count=4, block_size=1)
    torch.testing.assert_close(top.values, torch.ones(4, dtype=torch.float64))
    vectors = torch.stack([flat(vector) for vector in top.vectors])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(4, dtype=torch.float64))


def test_a_zero_matrix_has_zero_eigenvalues():
    params = [torch.zeros(5)]
    top = top_eigenvalues(lambda v: [torch.zeros(5)], params, count=2)
    assert top.values.tolist() == [0, 0] and top.residuals.tolist() == [0, 0]


def test_one_entry_is_a_matrix():
    top = top_eigenvalues(lambda v: [7 * v[0]], [torch.tensor(0.0)])
    assert abs(top.values[0] - 7) < 1e-5 and top.residuals[0] == 0 and top.products == 1


def test_all_eigenvalues_of_a_small_matrix_can_be_asked_for():
    matrix, product, params = matrix_with(draw(8, seed=4))
    top = top_eigenvalues(product, params, count=8)
    torch.testing.assert_close(top.values.flip(0), torch.linalg.eigvalsh(matrix))


def test_float32_finds_what_float64_finds():
    diagonal = torch.logspace(-3, 1, 200)
    top = top_eigenvalues(
        lambda v: [diagonal * v[0]], [torch.zeros(200)], count=2, generator=cpu_generator(0)
    )
    torch.testing.assert_close(top.values.float(), diagonal.flip(0)[:2], rtol=1e-4, atol=0.0)


def test_the_same_seed_gives_the_same_eigenvalues():
    _, product, params = matrix_with(torch.linspace(0, 1, 60))
    runs = [
        top_eigenvalues(product, params, max_products=9, generator=cpu_generator(1))
        for _ in range(2)
    ]
    assert torch.equal(runs[0].values, runs[1].values)


# ---- spectral density


def test_quadrature_weights_are_shares():
    _, product, params = matrix_with(draw(30, seed=3))
    density = spectral_density(product, params, probes=3, steps=7)
    assert density.nodes.shape == density.weights.shape == (3, 7)
    assert (density.weights >= 0).all()
    torch.testing.assert_close(density.weights.sum(-1), torch.ones(3, dtype=torch.float64))


def test_quadrature_is_exact_for_each_probe_up_to_its_degree():
    matrix, product, params = matrix_with(draw(30, seed=3))
    density = spectral_density(product, params, probes=4, steps=4, generator=cpu_generator(1))
    again = cpu_generator(1)
    for probe in range(4):
        signs = 2 * torch.randint(0, 2, (30,), generator=again).double() - 1
        for power in range(8):  # 2 m - 1 = 7
            image = torch.linalg.matrix_power(matrix, power) @ signs
            found = density.weights[probe] @ density.nodes[probe] ** power
            torch.testing.assert_close(found, signs @ image / 30, rtol=1e-9, atol=1e-9)


def test_moments_lie_within_their_errors_and_the_errors_shrink_with_probes():
    eigenvalues = draw(60, seed=3)
    matrix, product, params = matrix_with(eigenvalues)
    few, many = (
        spectral_average(
            spectral_density(product, params, probes=k, steps=12, generator=cpu_generator(2)),
            torch.exp,
        )
        for k in (4, 64)
    )
    exact = eigenvalues.exp().mean()
    assert abs(many.value - exact) < 3 * many.standard_error
    off = torch.linalg.matrix_exp(matrix).tril(-1)
    predicted = (4 * off.square().sum() / 64).sqrt() / 60  # Hutchinson's, for the mean
    torch.testing.assert_close(many.standard_error, predicted, rtol=0.3, atol=0.0)
    assert many.standard_error < 0.6 * few.standard_error


def test_a_bump_gives_the_smoothed_density():
    eigenvalues = torch.cat([torch.full((45,), 1.0), torch.full((15,), 4.0)])
    _, product, params = matrix_with(eigenvalues)
    density = spectral_density(product, params, probes=32, steps=5, generator=cpu_generator(0))
    centers = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)

    def bump(nodes):
        return torch.distributions.Normal(centers[:, None, None], 0.1).log_prob(nodes).exp()

    found = spectral_average(density, bump)
    expected = torch.tensor([0.75, 0.0, 0.25]) / (0.1 * math.sqrt(2 * math.pi))
    assert found.value.shape == found.standard_error.shape == (3,)
    torch.testing.assert_close(found.value.float(), expected, rtol=0.1, atol=1e-6)


def test_spaces_that_close_early_leave_nodes_without_weight():
    density = spectral_density(list, [torch.zeros(9, dtype=torch.float64)], probes=2, steps=4)
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(density.weights, weights.expand(2, 4))
    torch.testing.assert_close(density.nodes, torch.ones(2, 4, dtype=torch.float64))
    more = spectral_density(list, [torch.zeros(2)], probes=1, steps=50)
    assert more.nodes.shape == (1, 2)


# ---- trace


def test_trace_of_a_diagonal_matrix_is_exact():
    diagonal = draw(7)
    found = trace_estimate(lambda v: [diagonal * v[0]], [torch.zeros(7, dtype=torch.float64)])
    torch.testing.assert_close(found.value, diagonal.sum())
    assert found.standard_error < 1e-14


def test_trace_is_unbiased_and_its_standard_error_is_hutchinsons():
    matrix, product, params = matrix_with(draw(12, seed=3))
    found = trace_estimate(product, params, probes=2000, generator=cpu_generator(0))
    off = matrix - matrix.diag().diag()
    predicted = (2 * off.square().sum() / 2000).sqrt()
    torch.testing.assert_close(found.standard_error, predicted, rtol=0.1, atol=0.0)
    assert abs(found.value - matrix.trace()) < 3 * predicted


def test_two_standard_errors_cover_the_trace_in_about_95_of_100_cases():
    matrix, product, params = matrix_with(draw(12, seed=3))
    generator = cpu_generator(1)
    hits = 0
    for _ in range(200):
        found = trace_estimate(product, params, probes=30, generator=generator)
        hits += int(abs(found.value - matrix.trace()) < 2 * found.standard_error)
    assert 180 <= hits <= 199


def test_trace_runs_without_reading_the_device():
    params = [torch.zeros(3, device="meta")]
    assert trace_estimate(lambda v: [2 * v[0]], params).value.device.type == "meta"


# ---- condition number and sharpness


def test_condition_number_agrees_with_the_ratio_of_singular_values():
    matrix, product, params = matrix_with(torch.logspace(-2, 1, 50))
    found = condition_number(product, params, tolerance=1e-6)
    assert found.value == pytest.approx(torch.linalg.cond(matrix).item(), rel=1e-5)
    assert found.largest == pytest.approx(10.0) and found.smallest == pytest.approx(0.01)


def test_condition_number_of_a_singular_matrix_is_infinite_and_of_the_identity_one():
    _, product, params = matrix_with([0.0, 1.0, 2.0, 3.0])
    assert condition_number(product, params).value == math.inf
    assert condition_number(list, [torch.zeros(4)]).value == pytest.approx(1.0)


def test_indefinite_matrices_have_no_condition_number():
    _, product, params = matrix_with([-1.0, 1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="positive semi-definite.*got the eigenvalue -"):
        condition_number(product, params)


def test_too_few_products_are_said_to_be_too_few():
    _, product, params = matrix_with(torch.logspace(-4, 1, 100))
    with pytest.raises(ValueError, match="max_products must be larger.*after 5 products"):
        condition_number(product, params, max_products=5)
    w = draw(100).requires_grad_()
    scales = torch.linspace(0, 1, 100, dtype=torch.float64)
    with pytest.raises(ValueError, match="max_products must be larger.*after 3 products"):
        sharpness(lambda: (scales * w * w).sum(), [w], max_products=3)


def test_descent_diverges_beyond_two_over_the_sharpness_and_not_below():
    scales = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    sharp = sharpness(lambda: 0.5 * (scales * w * w).sum(), [w], tolerance=1e-8)
    assert sharp == pytest.approx(9.0)
    for factor, grows in ((0.99, False), (1.01, True)):
        point = torch.ones(3, dtype=torch.float64)
        for _ in range(400):
            point = point - factor * 2 / sharp * scales * point
        assert (point.norm() > 10) == grows


def test_sharpness_takes_the_parameters_of_a_module():
    model = torch.nn.Linear(2, 1, bias=False).double()
    inputs = draw(9, 2)
    found = sharpness(lambda: 0.5 * model(inputs).square().mean(), model.parameters())
    exact = torch.linalg.eigvalsh(inputs.T @ inputs / 9)[-1].item()
    assert found == pytest.approx(exact)


# ---- bad input


def test_settings_out_of_range_are_refused():
    params = [torch.zeros(3)]
    with pytest.raises(ValueError, match="count must be at most 3.*got 4"):
        top_eigenvalues(list, params, count=4)
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        top_eigenvalues(list, params, count=0)
    with pytest.raises(ValueError, match="block_size must be at least 1; got 0"):
        top_eigenvalues(list, params, block_size=0)
    with pytest.raises(ValueError, match="max_products must be at least 3; got 2"):
        top_eigenvalues(list, params, count=3, max_products=2)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        top_eigenvalues(list, params, tolerance=0.0)
    with pytest.raises(ValueError, match="probes must be at least 1; got 0"):
        spectral_density(list, params, probes=0)
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        spectral_density(list, params, steps=0)
    with pytest.raises(ValueError, match="probes must be at least 2; got 1"):
        trace_estimate(list, params, probes=1)
    with pytest.raises(ValueError, match="probes must be at least 2; got 1"):
        spectral_average(spectral_density(list, params, probes=1), torch.exp)
    with pytest.raises(ValueError, match="params must hold at least one entry"):
        spectral_density(list, [])


def test_functions_that_lose_the_nodes_are_refused():
    density = spectral_density(list, [torch.zeros(3)], probes=2)
    with pytest.raises(
        ValueError, match=r"function must keep the last two axes.*got shape \(2,\)"
    ):
        spectral_average(density, lambda nodes: nodes.sum(-1))
    with pytest.raises(TypeError, match="function must be a floating-point tensor"):
        spectral_average(density, lambda nodes: nodes > 0)


def test_products_that_are_not_finite_are_refused():
    params = [torch.zeros(3)]
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="product must be finite; got .* at product 0"):
            top_eigenvalues(lambda v, wrong=wrong: [wrong * v[0]], params)


def test_products_that_are_not_symmetric_are_refused():
    skewed = draw(20, 20)
    params = [torch.zeros(20, dtype=torch.float64)]
    with pytest.raises(ValueError, match="product must be that of a symmetric matrix"):
        top_eigenvalues(lambda v: [skewed @ v[0]], params)


def test_products_that_do_not_fit_are_refused():
    params = [torch.zeros(3)]
    with pytest.raises(ValueError, match=r"product\[0\] must have shape \(3,\).*got \(2,\)"):
        top_eigenvalues(lambda v: [v[0][:2]], params)
    with pytest.raises(ValueError, match="product must be a list of 1 tensors.*got 0"):
        trace_estimate(lambda v: [], params)


@pytest.mark.bad_input
def test_counts_are_whole_numbers():
    with pytest.raises(TypeError, match="count must be a whole number; got float 2.0"):
        top_eigenvalues(list, [torch.zeros(3)], count=2.0)
