"""What section 2.3 of the optimizer notes says about Sophia, held to numbers."""

import itertools
import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lmlosses.optim.adam import AdamW
from lmlosses.optim.sophia import SophiaG, SophiaH

F64 = torch.float64
NEWTON = {"betas": (0.0, 0.0), "gamma": 1.0, "weight_decay": 0.0}


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64)


def moved(point: Tensor, curvature: Tensor, slope: Tensor, **settings) -> Tensor:
    """Where one step of Sophia-H leads in a bowl of given curvature, at a given gradient."""
    param = torch.nn.Parameter(point.clone())
    optimizer = SophiaH([param], **settings)
    optimizer.update_curvature((curvature * param.square()).sum() / 2)
    param.grad = slope.clone()
    optimizer.step()
    return param.detach()


def softmax_regression() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weights, and the diagonal of the Hessian by hand; labels have no part in it."""
    inputs, weight = normal(4, 2), normal(3, 2, seed=1)
    p = (inputs @ weight.T).softmax(dim=-1)
    return inputs, weight, torch.einsum("nc,ni->ci", p * (1 - p), inputs.square()) / 4


def gnb(inputs: Tensor, weight: Tensor, seed: int) -> Tensor:
    """One estimate, read off a step: unclipped, the step is lr * gradient / h."""
    param = torch.nn.Parameter(weight.clone())
    optimizer = SophiaG([param], lr=1.0, **NEWTON)
    generator = torch.Generator().manual_seed(seed)
    optimizer.update_curvature(inputs @ param.T, generator=generator)
    param.grad = torch.full_like(param, 1e-6)
    optimizer.step()
    return 1e-6 / (weight - param.detach())


def test_notes_2_3_preconditioner():
    """Newton's step along each axis where it is not clipped; a sign step where it is."""
    slope = f64(1.0, -2.0, 0.5)
    step = moved(torch.zeros(3, dtype=F64), f64(4.0, 5.0, 2.0), slope, lr=1.0, **NEWTON)
    assert_close(step, -slope / f64(4.0, 5.0, 2.0))
    for curvature in (-100.0, -1.0, 0.0, 0.1, 0.2):  # too flat for the slope: all the same step
        step = moved(f64(0.0), f64(curvature), f64(0.5), lr=0.3, **NEWTON)
        assert_close(step, f64(-0.3))


def test_notes_2_3_update():
    """The printed quotient is version 1 without its floor."""
    rho, lr = 0.5, 0.2
    ours = partial(moved, lr=lr * rho, betas=(0.0, 0.0), gamma=rho, eps=rho * 1e-12)

    def printed(point: Tensor, h: Tensor, m: Tensor) -> Tensor:
        return point - lr * (m / h).clamp(-rho, rho)

    point, m = f64(1.0, 1.0, 1.0), f64(0.3, -0.01, 9.0)
    inside = f64(2.0, 0.1, 3.0)
    assert_close(ours(point, inside, m, weight_decay=0.0), printed(point, inside, m))
    # with decay lambda of the last version
    decayed = ours(point, inside, m, weight_decay=0.3)
    assert_close(decayed, printed(point, inside, m) - lr * rho * 0.3 * point)
    # negative curvature: the printed step climbs, the paper's descends
    assert printed(f64(1.0), f64(-2.0), f64(0.6)).item() > 1.0
    assert_close(ours(f64(1.0), f64(-2.0), f64(0.6), weight_decay=0.0), f64(0.9))
    # nothing to do and no curvature: NaN
    assert printed(f64(1.0), f64(0.0), f64(0.0)).isnan()
    assert_close(ours(f64(1.0), f64(0.0), f64(0.0), weight_decay=0.0), f64(1.0))
    # and Sophia-G takes the same step
    param = torch.nn.Parameter(torch.zeros(1, 2, dtype=F64))
    optimizer = SophiaG([param], lr=0.1, **NEWTON)
    optimizer.update_curvature(param)  # p - one_hot = ±1/2, so h = 1/4 for both
    param.grad = torch.tensor([[0.1, -7.0]], dtype=F64)
    optimizer.step()
    assert_close(param.detach(), torch.tensor([[-0.04, 0.1]], dtype=F64))


def test_notes_2_3_first_moment():
    """The same average of gradients as Adam's, not yet corrected for its start."""
    expected, gradients = torch.zeros(2, dtype=F64), normal(5, 2)
    params = [torch.nn.Parameter(torch.zeros(1, 2, dtype=F64)) for _ in range(2)]
    sophia, adam = SophiaG(params[:1], betas=(0.9, 0.99)), AdamW(params[1:], betas=(0.9, 0.99))
    sophia.update_curvature(params[0])
    for gradient in gradients:
        for param, optimizer in zip(params, (sophia, adam), strict=True):
            param.grad = gradient.clone().unsqueeze(0)
            optimizer.step()
        expected = 0.9 * expected + 0.1 * gradient
    for param, optimizer in zip(params, (sophia, adam), strict=True):
        assert_close(optimizer.state[param]["exp_avg"], expected.unsqueeze(0))


def test_notes_2_3_hessian():
    """Sophia-H: the Hessian's diagonal, negative entries too. Sophia-G: Gauss-Newton's."""
    # log p of class 0 is -log(1 + exp(-w v)): the logits are not linear in w and v
    point, label = f64(1.0, -1.5), torch.tensor([1])

    def logits(p: Tensor) -> Tensor:
        return torch.stack([p[0] * p[1], p[0] * 0]).unsqueeze(0)

    def loss(p: Tensor) -> Tensor:
        return functional.cross_entropy(logits(p), label)

    s = 1 / (1 + math.exp(1.5))  # probability of class 0
    diagonal = s * (1 - s) * f64(1.5**2, 1.0)  # of both matrices here
    for label_value, curvature in ((1, diagonal), (0, diagonal)):
        label = torch.tensor([label_value])
        assert_close(torch.func.hessian(loss)(point).diagonal(), curvature)
    # bend the first: class 0 scores w^2, whose own curvature 2 enters with the error of the label
    param = torch.nn.Parameter(f64(1.0))
    square = torch.stack([param.square(), 0 * param], dim=-1)
    p0 = 1 / (1 + math.exp(-1.0))
    gauss_newton, bend = p0 * (1 - p0) * 4, (p0 - 1) * 2
    settings = {"betas": (0.0, 0.9), "gamma": 1.0, "weight_decay": 0.0, "lr": 1.0}
    hutchinson = SophiaH([param], **settings)
    for n in range(1, 4):
        hutchinson.update_curvature(functional.cross_entropy(square, torch.tensor([0])))
        found = hutchinson.state[param]["hessian"].item()
        assert math.isclose(found, (1 - 0.9**n) * (gauss_newton + bend))
    expected = sum(chance * 4 * (p0 - (k == 0)) ** 2 for k, chance in ((0, p0), (1, 1 - p0)))
    assert math.isclose(expected, gauss_newton) and abs(bend) > 0.5
    # over both labels Sophia-G's estimate is the first term alone
    bartlett, weights = [], []
    for seed in range(40):
        other = torch.nn.Parameter(f64(1.0))
        optimizer = SophiaG([other], lr=1.0, **NEWTON)
        out = torch.stack([other.square(), 0 * other], dim=-1)
        optimizer.update_curvature(out, generator=torch.Generator().manual_seed(seed))
        bartlett.append(optimizer.state[other]["hessian"].item())
        other.grad = f64(1e-3)
        optimizer.step()
        assert math.isclose(1 - other.item(), 1e-3 / bartlett[-1], rel_tol=1e-9)
        weights.append(p0 if bartlett[-1] < 1 else 1 - p0)
    kinds = dict(zip((round(b, 9) for b in bartlett), weights, strict=True))
    assert len(kinds) == 2
    assert math.isclose(sum(b * w for b, w in kinds.items()), gauss_newton, abs_tol=1e-8)
    # and the step of Sophia-H by its own curvature
    param.grad = f64(1e-3)
    hutchinson.step()
    assert math.isclose(1 - param.item(), 1e-3 / ((1 - 0.9**3) * (gauss_newton + bend)))


def test_notes_2_3_clip():
    """No entry moves by more than eta rho, whatever curvature and momentum are."""
    rho, lr = 0.04, 0.1
    values = (-1e20, -1.0, -1e-20, 0.0, 1e-20, 1.0, 1e20)
    for h, m in itertools.product(values, values):
        step = moved(f64(0.0), f64(h), f64(m), lr=lr * rho, **NEWTON | {"gamma": rho}).item()
        assert abs(step) <= lr * rho and step * m <= 0
    assert math.isclose(
        moved(f64(0.0), f64(1e-20), f64(3.0), lr=lr * rho, **NEWTON | {"gamma": rho}).item(),
        -lr * rho,
    )


def test_notes_2_3_sophia_g():
    """Labels of the model, squared, times B: unbiased. The batch's own gradient is not."""
    inputs, weight, truth = softmax_regression()
    estimates = torch.stack([gnb(inputs, weight, seed) for seed in range(300)])
    error = estimates.std(dim=0) / math.sqrt(300)
    assert ((estimates.mean(dim=0) - truth).abs() < 4 * error).all()
    assert ((estimates.mean(dim=0) / 4 - truth).abs() > 4 * error / 4).all()  # B is needed
    # the printed square at a point where the data's gradient is zero: every input twice, with
    # both of two classes, at equal logits
    twice, labels = torch.cat([inputs, inputs]), torch.arange(8) // 4
    param = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    loss = functional.cross_entropy(twice @ param.T, labels)
    (gradient,) = torch.autograd.grad(loss, param)
    assert (8 * gradient.square()).max() < 1e-12
    curvature = inputs.square().mean(dim=0) / 4
    assert curvature.min() > 0.01
    sampled = torch.stack([gnb(twice, param.detach(), seed) for seed in range(300)])
    error = sampled.std(dim=0) / math.sqrt(300)
    assert ((sampled.mean(dim=0) - curvature).abs() < 4 * error).all()


def test_notes_2_3_sophia_h():
    """u * (H u) over signs has the mean diag H; the product H u alone has the mean zero."""
    matrix = normal(3, 3)
    hessian = matrix @ matrix.T + 3 * torch.eye(3, dtype=F64)
    found, products = [], []
    for seed in range(60):
        coins = torch.randint(2, (3,), generator=torch.Generator().manual_seed(seed))
        u = (2 * coins - 1).to(F64)
        param = torch.nn.Parameter(torch.zeros(3, dtype=F64))
        optimizer = SophiaH([param], lr=1.0, **NEWTON)
        generator = torch.Generator().manual_seed(seed)
        optimizer.update_curvature(param @ hessian @ param / 2, generator=generator)
        products.append(hessian @ u)
        found.append(u * products[-1])
        param.grad = torch.full((3,), 1e-6, dtype=F64)
        optimizer.step()
        positive = found[-1] > 1e-3
        assert_close(param.detach()[positive], -1e-6 / found[-1][positive])
    error = torch.stack(found).std(dim=0) / math.sqrt(60)
    assert ((torch.stack(found).mean(dim=0) - hessian.diagonal()).abs() < 4 * error).all()
    assert (torch.stack(products).mean(dim=0).abs() < hessian.diagonal() / 2).all()


def steps_to_reach(optimizer, param: Tensor, hessian: Tensor, share: float = 1e-3) -> int:
    generator, first = torch.Generator().manual_seed(0), None
    for step in range(150):
        loss = param @ hessian @ param / 2
        first = loss.item() if first is None else first
        if loss.item() < share * first:
            return step
        if isinstance(optimizer, SophiaH) and optimizer.needs_curvature:
            optimizer.update_curvature(loss, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 150


def test_notes_2_3_twice_as_fast():
    """True in a bowl along the axes, false in the same bowl turned: a fact about problems."""
    turn = f64(1, 1, 1, 1, 1, -1, 1, -1, 1, 1, -1, -1, 1, -1, -1, 1).view(4, 4) / 2
    bowl, start = f64(1.0, 10.0, 100.0, 1000.0).diag(), 2 * normal(4)
    # each with the best rates out of (0.1, 0.3, 1, 3) and second rates out of two
    tuned = {
        "along": (torch.eye(4, dtype=F64), (3.0, 0.9), (1.0, 0.0)),
        "turned": (turn, (1.0, 0.9), (3.0, 0.9)),
    }
    ratios = {}
    for name, (axes, (adam_lr, adam_beta), (sophia_lr, sophia_beta)) in tuned.items():
        param, other = (torch.nn.Parameter(axes @ start) for _ in range(2))
        adam = AdamW([param], adam_lr, (0.9, adam_beta), weight_decay=0.0)
        sophia = SophiaH([other], sophia_lr, (0.9, sophia_beta), 1.0, weight_decay=0.0)
        hessian = axes @ bowl @ axes.T
        ratios[name] = steps_to_reach(adam, param, hessian) / steps_to_reach(
            sophia, other, hessian
        )
    assert ratios["along"] > 2 > 1.2 > ratios["turned"]
    # both optimizers by hand, one step
    param = torch.nn.Parameter(f64(2.0))
    param.grad = f64(0.3)
    AdamW([param], 0.5, weight_decay=0.1).step()
    assert math.isclose(param.item(), 2 * 0.95 - 0.5, rel_tol=1e-6)
    assert_close(moved(f64(2.0), f64(4.0), f64(2.0), lr=0.5, **NEWTON), f64(1.75))


def test_notes_2_3_every_k_steps():
    """Multiplications counted: an estimate costs some, and a tenth of that at k = 10."""
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 30), torch.nn.Tanh(),
        torch.nn.Linear(30, 10),
    )  # fmt: skip
    inputs, targets = torch.randn(8, 20), torch.arange(8)

    def count(work) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def loss() -> Tensor:
        return functional.cross_entropy(model(inputs), targets)

    step = count(lambda: loss().backward())
    logits, value = model(inputs), loss()
    g, h = SophiaG(model.parameters(), **NEWTON), SophiaH(model.parameters(), **NEWTON)
    extra_g = count(lambda: g.update_curvature(logits))
    extra_h = count(lambda: h.update_curvature(value))
    assert 0.5 * step < extra_g < 0.75 * step  # a backward pass; the logits were there
    assert 1.0 * step < extra_h < 3 * step
    assert extra_g / 10 < 0.08 * step and extra_h / 10 < 0.25 * step
    # and k steps are what one estimate serves, each a finite step
    for optimizer in (g, h):
        for k in range(10):
            assert not optimizer.needs_curvature, k
            before = [param.detach().clone() for param in model.parameters()]
            optimizer.step()
            moved_by = max(
                (p.detach() - b).abs().max().item()
                for p, b in zip(model.parameters(), before, strict=True)
            )
            assert 0 < moved_by <= 1.001e-4
        assert optimizer.needs_curvature
