import math

import pytest
import torch
from torch import nn

from lmlosses.analysis.geometry import simplex_gradient_step, sphere_gradient_step
from lmlosses.optim.manifolds import Euclidean, Simplex, Sphere
from lmlosses.optim.riemannian import RiemannianAdam, RiemannianSGD

DOUBLE = torch.float64
KINDS = [RiemannianSGD, RiemannianAdam]
kinds = pytest.mark.parametrize("kind", KINDS)
curved = pytest.mark.parametrize("manifold", [Sphere(), Simplex()], ids=repr)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _start(manifold, dtype=DOUBLE):
    return nn.Parameter(manifold.project(_draw(4, 5).abs()).to(dtype))


def _follow(optimizer, param, steps=50):
    for step in range(steps):
        param.grad = _draw(*param.shape, seed=step + 1).to(param.dtype)
        optimizer.step()
    return param.detach()


# values known by hand


def test_the_first_step_of_adam_turns_by_the_rate_whatever_the_gradient():
    for scale in (1e-3, 1e3):
        param = nn.Parameter(torch.tensor([1.0, 0.0], dtype=DOUBLE))
        param.grad = torch.tensor([7.0, -scale], dtype=DOUBLE)
        RiemannianAdam([param], lr=math.pi / 6, eps=0.0, manifold=Sphere()).step()
        expected = torch.tensor([3**0.5 / 2, 0.5], dtype=DOUBLE)
        torch.testing.assert_close(param.data, expected)


def test_adam_remembers_one_length_for_each_point():
    param = _start(Sphere())
    optimizer = RiemannianAdam([param], manifold=Sphere())
    _follow(optimizer, param, steps=1)
    assert optimizer.state[param]["exp_avg_sq"].shape == (4, 1)


# agreement with something independent


@pytest.mark.parametrize(
    ("manifold", "step"), [(Sphere(), sphere_gradient_step), (Simplex(), simplex_gradient_step)]
)
def test_descent_without_momentum_agrees_with_the_steps_of_the_analysis(manifold, step):
    param = _start(manifold)
    expected = param.detach().clone()
    for seed in range(1, 51):
        expected = step(expected, _draw(4, 5, seed=seed), lr=0.1)
    _follow(RiemannianSGD([param], lr=0.1, manifold=manifold), param)
    torch.testing.assert_close(param.data, expected, rtol=1e-12, atol=1e-12)


def test_in_plain_space_they_are_sgd_and_adam():
    pairs = [
        (RiemannianSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (RiemannianAdam, torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95)}),
        (RiemannianAdam, torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    ]
    for ours, theirs, settings in pairs:
        params = [nn.Parameter(_draw(4, 5)) for _ in range(2)]
        found = _follow(ours([params[0]], manifold=Euclidean(), **settings), params[0])
        expected = _follow(theirs([params[1]], **settings), params[1])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _slow_loop_on_the_circle(gradients, lr, rule):
    """Angles instead of vectors: the circle is a line rolled up, so momentum is a number."""
    angle, first, second = 0.3, 0.0, 0.0
    for step, (east, north) in enumerate(gradients, start=1):
        slope = -math.sin(angle) * east + math.cos(angle) * north
        if rule == "sgd":
            first = 0.9 * first + slope
            angle -= lr * first
        else:
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope**2
            mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
            angle -= lr * mean / (square**0.5 + 1e-8)
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=DOUBLE)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_on_the_circle_they_agree_with_a_loop_over_angles(rule):
    start = torch.tensor([math.cos(0.3), math.sin(0.3)], dtype=DOUBLE)
    param = nn.Parameter(start)
    settings = {"lr": 0.1, "manifold": Sphere()}
    if rule == "sgd":
        optimizer = RiemannianSGD([param], momentum=0.9, **settings)
    else:
        optimizer = RiemannianAdam([param], **settings)
    found = _follow(optimizer, param)
    gradients = [_draw(2, seed=step + 1).tolist() for step in range(50)]
    expected = _slow_loop_on_the_circle(gradients, 0.1, rule)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_momentum_in_the_simplex_is_momentum_of_logits():
    param = _start(Simplex())
    logits, buffer = param.detach().log(), torch.zeros(4, 5, dtype=DOUBLE)
    for seed in range(1, 51):
        gradient = _draw(4, 5, seed=seed)
        buffer = 0.9 * buffer + gradient
        logits = logits - 0.02 * buffer
    _follow(RiemannianSGD([param], lr=0.02, momentum=0.9, manifold=Simplex()), param)
    torch.testing.assert_close(param.data, logits.softmax(-1), rtol=1e-10, atol=1e-10)


# laws


@kinds
@curved
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_steps_do_not_leave_the_manifold(kind, manifold, dtype):
    param = _start(manifold, dtype)
    optimizer = kind([param], lr=0.05, manifold=manifold)
    gradients = [_draw(4, 5, seed=seed).to(dtype) for seed in range(20)]
    for step in range(1000):
        param.grad = gradients[step % 20]
        optimizer.step()
    slack = 2 * torch.finfo(dtype).eps
    assert manifold.distance(param.detach().float()).max() < slack
    assert param.isfinite().all()


@kinds
def test_the_quotient_of_rayleigh_is_climbed_to_the_leading_eigenvector(kind):
    root = _draw(6, 6)
    matrix = root @ root.T
    param = nn.Parameter(Sphere().project(_draw(6, seed=3)))
    settings = {"betas": (0.9, 0.99)} if kind is RiemannianAdam else {}
    optimizer = kind([param], lr=0.02, manifold=Sphere(), maximize=True, **settings)
    for _ in range(400):
        optimizer.zero_grad()
        (param @ matrix @ param).backward()
        optimizer.step()
    leading = torch.linalg.eigh(matrix)[1][:, -1]
    assert (param @ leading).abs() > 1 - 1e-6


def test_cross_entropy_in_the_simplex_is_descended_to_the_target():
    target = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
    param = nn.Parameter(torch.full((3,), 1 / 3, dtype=DOUBLE))
    optimizer = RiemannianSGD([param], lr=0.5, manifold=Simplex())
    for _ in range(100):
        optimizer.zero_grad()
        (-(target * param.log()).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(param.data, target, rtol=1e-8, atol=1e-8)


@kinds
def test_each_group_may_have_its_own_manifold(kind):
    vector, weights = _start(Sphere()), nn.Parameter(_draw(4, 5))
    before = weights.detach().clone()
    groups = [{"params": [vector], "manifold": Sphere()}, {"params": [weights]}]
    optimizer = kind(groups, lr=0.1, manifold=Euclidean())
    for param in (vector, weights):
        param.grad = _draw(4, 5, seed=1)
    optimizer.step()
    assert Sphere().distance(vector.detach()).max() < 1e-15
    assert not torch.equal(weights.detach(), before)


@kinds
def test_a_checkpoint_holds_no_manifold_and_keeps_each_groups_own(kind):
    def build():
        params = [_start(Sphere()), _start(Simplex())]
        groups = [
            {"params": [param], "manifold": manifold}
            for param, manifold in zip(params, (Sphere(), Simplex()), strict=True)
        ]
        return kind(groups, manifold=Euclidean())

    optimizer, saved = build(), build().state_dict()
    assert all("manifold" not in group for group in saved["param_groups"])
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(saved)
    assert [group["manifold"] for group in optimizer.param_groups] == [Sphere(), Simplex()]
    assert optimizer.param_groups[0]["lr"] == 0.5


# errors


@kinds
@curved
@pytest.mark.bad_input
def test_a_start_off_the_manifold_is_refused_and_can_be_put_right(kind, manifold):
    param = nn.Parameter(3 * _start(manifold).detach())
    before = param.detach().clone()
    optimizer = kind([param], lr=0.1, manifold=manifold)
    param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must start on their manifold.*\(4, 5\) that is 2"):
            optimizer.step()
        assert torch.equal(param, before)
    with torch.no_grad():
        param.copy_(manifold.project(param))
    optimizer.step()


@kinds
@pytest.mark.bad_input
def test_a_number_is_no_point(kind):
    param = nn.Parameter(torch.tensor(1.0))
    param.grad = torch.tensor(1.0)
    with pytest.raises(ValueError, match="a parameter on a manifold must have at least 1 axes"):
        kind([param], manifold=Sphere()).step()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RiemannianSGD, {"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1\.0"),
        (RiemannianAdam, {"betas": (1.0, 0.9)}, r"beta1 must lie in \[0, 1\); got 1\.0"),
        (RiemannianAdam, {"betas": (0.9, 1.0)}, r"beta2 must lie in \[0, 1\); got 1\.0"),
        (RiemannianAdam, {"eps": -1.0}, r"eps must not be negative; got -1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(torch.zeros(1))], manifold=Sphere(), **settings)


@kinds
@pytest.mark.bad_input
def test_a_manifold_has_to_be_one(kind):
    with pytest.raises(TypeError, match="manifold must be a Manifold; got 'sphere'"):
        kind([nn.Parameter(torch.zeros(1))], manifold="sphere")
