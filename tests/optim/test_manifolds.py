import math

import pytest
import torch

from lmlosses.analysis.geometry import sphere_gradient_step
from lmlosses.optim.manifolds import Euclidean, Simplex, Sphere

DOUBLE = torch.float64
CURVED = [Sphere(), Simplex()]
ALL = [Euclidean(), *CURVED]

every = pytest.mark.parametrize("manifold", ALL, ids=repr)
curved = pytest.mark.parametrize("manifold", CURVED, ids=repr)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _point(manifold, seed=0):
    return manifold.project(_draw(4, 5, seed=seed).abs())


def _tangents(manifold, point):
    return [manifold.gradient(point, 0.3 * _draw(4, 5, seed=seed)) for seed in (1, 2)]


def _constraint(manifold, point, tangent):
    """How fast a tangent leaves the manifold."""
    if isinstance(manifold, Sphere):
        return (point * tangent).sum(dim=-1)
    return tangent.sum(dim=-1) if isinstance(manifold, Simplex) else torch.zeros(4, dtype=DOUBLE)


# values known by hand


def test_a_quarter_of_the_great_circle_leads_from_east_to_north():
    east, north = torch.eye(2, dtype=DOUBLE)
    sphere = Sphere()
    torch.testing.assert_close(sphere.walk(east, math.pi / 2 * north), north)
    # and what pointed north at the start points west there
    carried = sphere.transport(east, math.pi / 2 * north, north)
    torch.testing.assert_close(carried, -east)


def test_a_gradient_of_log_three_triples_the_odds():
    even, gradient = torch.tensor([0.5, 0.5]), torch.tensor([0.0, math.log(3.0)])
    walked = Simplex().walk(even, -Simplex().gradient(even, gradient))
    torch.testing.assert_close(walked, torch.tensor([0.75, 0.25]))


def test_rare_events_are_far_apart_in_the_fisher_metric():
    point = torch.tensor([0.01, 0.99], dtype=DOUBLE)
    tangent = torch.tensor([0.01, -0.01], dtype=DOUBLE)
    length = Simplex().inner(point, tangent, tangent)
    torch.testing.assert_close(length, torch.tensor([1e-4 / 0.01 + 1e-4 / 0.99], dtype=DOUBLE))


# laws


@every
def test_projections_are_on_the_manifold_and_points_stay_where_they_are(manifold):
    point = manifold.project(_draw(4, 5))
    assert manifold.distance(point).max() < 1e-15
    torch.testing.assert_close(manifold.project(point), point, rtol=1e-15, atol=1e-15)


@every
def test_the_gradient_is_tangent_and_measures_every_slope(manifold):
    point, slope = _point(manifold), _draw(4, 5, seed=3)
    gradient, (tangent, _) = manifold.gradient(point, slope), _tangents(manifold, point)
    assert _constraint(manifold, point, gradient).abs().max() < 1e-15
    # the inner product with the gradient is the derivative along any tangent
    inner = manifold.inner(point, gradient, tangent).sum()
    torch.testing.assert_close(inner, (slope * tangent).sum(), rtol=1e-13, atol=1e-13)


@every
def test_a_walk_starts_in_its_direction_and_stays_on_the_manifold(manifold):
    point = _point(manifold)
    tangent, _ = _tangents(manifold, point)
    assert torch.equal(manifold.distance(manifold.walk(point, 30 * tangent)) < 1e-15,
                       torch.ones_like(manifold.distance(point), dtype=torch.bool))  # fmt: skip
    near = 1e-6
    ahead = manifold.walk(point, near * tangent) - manifold.walk(point, -near * tangent)
    torch.testing.assert_close(ahead / (2 * near), tangent, rtol=1e-8, atol=1e-8)


@every
def test_without_a_tangent_nothing_moves(manifold):
    point = _point(manifold)
    vector, _ = _tangents(manifold, point)
    still = torch.zeros_like(point)
    torch.testing.assert_close(manifold.walk(point, still), point, rtol=1e-15, atol=1e-15)
    carried = manifold.transport(point, still, vector)
    torch.testing.assert_close(carried, vector, rtol=1e-14, atol=1e-14)


@every
def test_carried_vectors_are_tangent_where_they_arrive(manifold):
    point = _point(manifold)
    tangent, vector = _tangents(manifold, point)
    carried = manifold.transport(point, tangent, vector)
    assert _constraint(manifold, manifold.walk(point, tangent), carried).abs().max() < 1e-15


@every
def test_the_direction_of_a_walk_is_carried_along_with_it(manifold):
    point, near = _point(manifold), 1e-6
    tangent, _ = _tangents(manifold, point)
    ahead = manifold.walk(point, (1 + near) * tangent) - manifold.walk(point, (1 - near) * tangent)
    carried = manifold.transport(point, tangent, tangent)
    torch.testing.assert_close(carried, ahead / (2 * near), rtol=1e-8, atol=1e-8)


def test_parallel_transport_keeps_lengths_and_angles():
    sphere = Sphere()
    point = _point(sphere)
    tangent, vector = _tangents(sphere, point)
    end = sphere.walk(point, tangent)
    moved = [sphere.transport(point, tangent, v) for v in (tangent, vector)]
    for left in (0, 1):
        before = sphere.inner(point, (tangent, vector)[left], vector)
        torch.testing.assert_close(
            sphere.inner(end, moved[left], moved[1]), before, rtol=1e-13, atol=1e-13
        )
    # the same by both ends of the path alone
    both = (vector * end).sum(-1, keepdim=True) / (1 + (point * end).sum(-1, keepdim=True))
    torch.testing.assert_close(moved[1], vector - both * (point + end), rtol=1e-12, atol=1e-12)


def test_a_walk_on_the_sphere_is_the_step_of_the_analysis():
    sphere = Sphere()
    point, slope = _point(sphere), _draw(4, 5, seed=3)
    walked = sphere.walk(point, -0.2 * sphere.gradient(point, slope))
    expected = sphere_gradient_step(point, slope, lr=0.2)
    torch.testing.assert_close(walked, expected, rtol=1e-14, atol=1e-14)


def test_a_vector_carried_in_the_simplex_is_the_same_change_of_logits():
    simplex = Simplex()
    point = _point(simplex)
    tangent, vector = _tangents(simplex, point)
    end, carried = simplex.walk(point, tangent), simplex.transport(point, tangent, vector)
    change = carried / end - vector / point
    torch.testing.assert_close(change, change[:, :1].expand(4, 5), rtol=1e-13, atol=1e-13)


def test_a_probability_of_zero_stays_zero_whatever_its_gradient():
    simplex = Simplex()
    point = torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE)
    slope = torch.tensor([1.0, -1.0, -torch.inf], dtype=DOUBLE)
    tangent = -simplex.gradient(point, slope)
    walked = simplex.walk(point, tangent)
    torch.testing.assert_close(walked[:2], torch.tensor([-1.0, 1.0], dtype=DOUBLE).softmax(0))
    assert walked[2] == 0
    assert simplex.inner(point, tangent, tangent).isfinite().all()
    assert simplex.transport(point, tangent, tangent)[2] == 0


@curved
def test_distances_are_seen(manifold):
    point = _point(manifold)
    off = manifold.distance(1.01 * point)
    torch.testing.assert_close(off, torch.full((4,), 0.01, dtype=DOUBLE))
    assert Simplex().distance(torch.tensor([1.5, -0.5])) == 0.5


def test_manifolds_of_a_kind_are_one():
    assert Sphere() == Sphere() and Sphere() != Simplex()
    assert len({Sphere(), Sphere(), Euclidean()}) == 2 and repr(Sphere()) == "Sphere()"
