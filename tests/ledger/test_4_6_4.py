"""What textbook subsection 4.6.4 says, held to numbers: numerical stability."""

import math
from decimal import Decimal, localcontext

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lmlosses.lab.transformer import TinyTransformer
from lmlosses.losses import cross_entropy
from lmlosses.normalizers import softmax_jacobian
from lmlosses.optim import SGD, Adam
from lmlosses.precision import (
    BreakingPoint,
    DynamicLossScaler,
    StaticLossScaler,
    breaking_points,
    clip_by_global_norm,
    clip_by_value,
    global_norm,
    log_sum_exp,
)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def f32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_gradient(gradient: Tensor) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.zeros_like(gradient))
    param.grad = gradient.clone()
    return param


def point(form: str, dtype: torch.dtype) -> BreakingPoint:
    (found,) = [p for p in breaking_points() if p.form == form and p.dtype == dtype]
    return found


def exact_log_sum_exp(logits: list[float]) -> float:
    """In decimal arithmetic, whose exponents have no end that matters here."""
    with localcontext() as context:
        context.prec = 40
        return float(sum(Decimal(z).exp() for z in logits).ln())


def test_claim_4_6_numerical_failures():
    """One of each: infinite, zero under a logarithm, and every digit gone."""
    over = point("log(sum(exp([x, x])))", torch.float32)
    assert over.naive == math.inf and abs(over.exact - over.x - math.log(2)) < 1e-6
    under = point("log(softmax([-x, 0]))[0]", torch.float32)
    assert under.naive == -math.inf and abs(under.exact + under.x) < 1e-6
    digits = point("log(1 + exp(-x))", torch.float32)
    assert digits.naive == 0 and abs(digits.exact - math.exp(-digits.x)) < 1e-12
    for found, x in ((over, 88.03), (under, 103.97), (digits, 16.64)):
        assert abs(found.x - x) < 0.02


def test_claim_4_6_exp_overflow():
    """The logarithm of each format's largest number; double precision has its own, 709.78."""
    largest = {
        torch.float16: math.log(65504),
        torch.bfloat16: math.log((2 - 2**-7) * 2.0**127),
        torch.float32: math.log((2 - 2**-23) * 2.0**127),
        torch.float64: math.log(2 - 2**-52) + 1023 * math.log(2),
    }
    for dtype, bound in largest.items():
        found = point("exp(x)", dtype)
        assert abs(found.x - bound) < bound * 0.004 and found.naive == math.inf
    assert round(point("exp(x)", torch.float16).x, 2) == 11.09
    assert round(point("exp(x)", torch.float64).x, 2) == 709.78
    assert torch.tensor(709.0, dtype=torch.float64).exp().isfinite()


def test_claim_4_6_exp_underflow():
    """Inside: all terms vanish, or a logarithm follows. Outside: one term of several."""
    printed = lambda z: z.exp() / z.exp().sum()  # noqa: E731
    one = printed(f32(0, -200))
    assert one.tolist() == [1.0, 0.0] and abs(one[1].item() - math.exp(-200)) < 1e-45
    assert printed(f32(-200, -201)).isnan().all()
    assert (-one[1].log()).item() == math.inf
    assert_close(cross_entropy(f32(0, -200), torch.tensor(1)), torch.tensor(200.0))
    assert_close(log_sum_exp(f32(-200, -200)), torch.tensor(math.log(2) - 200))


def test_def_4_6_9():
    for logits in ([1e4, 9999.0, -1e4], [-5e3, -5001.0, -5000.5], [0.1, 800.0, 799.0]):
        naive = f64(*logits).exp().sum().log()
        assert not naive.isfinite()
        assert abs(log_sum_exp(f64(*logits)).item() - exact_log_sum_exp(logits)) < 1e-11


def test_eq_4_6_21():
    """Right with the largest logit, and on paper with any other number in its place."""
    for row in normal(20, 6).mul(3).tolist():
        left = math.log(math.fsum(math.exp(z) for z in row))
        for taken_out in (max(row), min(row), 2.5):
            right = taken_out + math.log(math.fsum(math.exp(z - taken_out) for z in row))
            assert abs(left - right) < 1e-12
        assert abs(log_sum_exp(f64(*row)).item() - left) < 1e-12


class Exponentials(TorchDispatchMode):
    """Keeps the arguments of every exponential that is taken, and the names of what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[Tensor] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        if func.overloadpacket is torch.ops.aten.exp:
            self.arguments.append(args[0].clone())
        return func(*args, **(kwargs or {}))


def test_claim_4_6_fused_cross_entropy():
    logits, target = f64(2.0, -1.0, 0.5), torch.tensor(1)
    with Exponentials() as seen:
        loss = cross_entropy(logits, target)
    assert not {"softmax", "_softmax"} & set(seen.names)
    by_hand = -math.log(math.exp(-1) / (math.exp(2) + math.exp(-1) + math.exp(0.5)))
    assert abs(loss.item() - by_hand) < 1e-12
    theirs = torch.nn.functional.cross_entropy(logits, target)
    assert_close(loss, theirs)


def test_eq_4_6_22():
    """Four lines, one number."""
    logits, target = normal(40, 7).mul(4), torch.arange(40) % 7
    of_target = logits.gather(1, target[:, None])[:, 0]
    largest = logits.amax(dim=1)
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    lines = [
        -p.gather(1, target[:, None])[:, 0].log(),
        -(of_target - logits.exp().sum(dim=1).log()),
        -of_target + log_sum_exp(logits),
        -of_target + largest + (logits - largest[:, None]).exp().sum(dim=1).log(),
    ]
    for line in lines:
        assert_close(line, lines[0], rtol=1e-10, atol=1e-10)
    assert_close(cross_entropy(logits, target), lines[0], rtol=1e-10, atol=1e-10)


def test_claim_4_6_avoids_exp():
    """Printed: no exponential is computed. There are seven, of arguments up to 0."""
    logits = f64(3.0, 1000.0, -2.0, 999.0, 0.0, 5.0, 1000.0)
    with Exponentials() as seen:
        value = log_sum_exp(logits)
    (arguments,) = seen.arguments
    assert len(arguments) == 7  # and not 0
    assert (arguments <= 0).all() and arguments.max() == 0
    assert abs(value.item() - (1000 + math.log(2 + math.exp(-1)))) < 1e-12


def test_claim_4_6_overflow_solved():
    """Inside: finite logits, in the right order. Outside: the other order; infinite logits."""
    rows = (normal(500, 20) + 1e4).float()
    targets = torch.arange(500) % 20
    of_target = rows.gather(1, targets[:, None])[:, 0]
    shifted = [[z - 1e4 for z in row] for row in rows.tolist()]
    truth = f64(*[
        math.log(math.fsum(math.exp(z) for z in row)) - row[t]
        for row, t in zip(shifted, targets.tolist(), strict=True)
    ])  # fmt: skip
    error = lambda loss: (loss.double() - truth).abs().max().item()  # noqa: E731
    largest = rows.amax(dim=1)
    from_left_to_right = -of_target + largest + (rows - largest[:, None]).exp().sum(dim=1).log()
    assert error(cross_entropy(rows, targets)) < 1e-6 and error(from_left_to_right) < 1e-6
    merged = -of_target + log_sum_exp(rows)  # the sum of M and the logarithm first
    assert 1e-4 < error(merged) < 1e-3
    half = torch.tensor([70000.0, 0.0]).half()
    assert half[0] == math.inf and (half - half.amax()).isnan().any()
    sure = cross_entropy(f32(20, 0), torch.tensor(0))
    assert sure == 0 and math.log1p(math.exp(-20)) > 2e-9


def test_claim_4_6_exploding_gradients():
    """A recurrence explodes or fades; a Transformer with norms in front does neither."""
    turn = torch.linalg.qr(normal(4, 4)).Q
    for factor, grown in ((1.1, 117.39), (0.9, 0.00515)):
        start = normal(4, seed=1).requires_grad_()
        state = start
        for _ in range(50):
            state = factor * turn @ state
        (gradient,) = torch.autograd.grad(state @ f64(1, 0, 0, 0), start)
        assert abs(global_norm([gradient]).item() / grown - 1) < 1e-2

    norms = []
    for layers in (1, 16):
        generator = torch.Generator().manual_seed(0)
        model = TinyTransformer(32, dim=16, layers=layers, heads=2, generator=generator).double()
        tokens = torch.arange(24).reshape(2, 12) % 11
        logits = model(tokens)
        assert_close(logits.detach().std(), f64(0.25)[0], rtol=0.35, atol=0)
        loss = cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(global_norm(gradients).item())
    assert 0.5 < norms[1] / norms[0] < 2, norms


def test_def_4_6_10():
    """Over all tensors together, whatever their shapes."""
    for bound in (0.5, 3.0, 100.0):
        params = [with_gradient(normal(*shape, seed=s)) for s, shape in enumerate([(3, 4), (5,)])]
        numbers = [x for param in params for x in param.grad.flatten().tolist()]
        before = math.sqrt(math.fsum(x * x for x in numbers))
        reported = clip_by_global_norm(params, max_norm=bound)
        assert abs(reported.item() - before) < 1e-12
        after = global_norm([param.grad for param in params])
        assert abs(after.item() - min(before, bound)) < 1e-12


def test_eq_4_6_23():
    """Entry by entry, and beside torch, which adds 1e-6 to the norm."""
    param = with_gradient(f64(3, -4, 12))
    assert clip_by_global_norm(param, max_norm=2.0) == 13
    assert_close(param.grad, f64(6, -8, 24) / 13, rtol=1e-14, atol=0)
    theirs = with_gradient(f64(3, -4, 12))
    torch.nn.utils.clip_grad_norm_([theirs], 2.0)
    ratio = (theirs.grad / param.grad)[0].item()
    assert abs((1 - ratio) * 13 - 1e-6) < 1e-9


def test_eq_4_6_24():
    """The two cases meet at C, where nothing jumps."""
    direction = f64(0.6, 0.8)
    for length in (0.0, 0.3, 1 - 1e-9, 1.0, 1 + 1e-9, 7.0):
        param = with_gradient(length * direction)
        assert abs(clip_by_global_norm(param, max_norm=1.0).item() - length) < 1e-14
        assert_close(param.grad, (length if length <= 1 else 1.0) * direction)


def test_eq_4_6_25():
    gradient = normal(30).mul(2)
    param = with_gradient(gradient)
    norm = clip_by_value(param, max_value=0.7)
    assert param.grad.tolist() == [min(max(x, -0.7), 0.7) for x in gradient.tolist()]
    assert abs(norm.item() - math.sqrt(math.fsum(x * x for x in gradient.tolist()))) < 1e-12
    assert (param.grad != gradient).any() and (param.grad == gradient).any()


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def test_claim_4_6_clip_direction():
    """By value by up to arccos of 2 sqrt(r) / (1 + r), r being C over the largest entry."""
    for seed in range(60):
        gradient = normal(1 + seed, seed=seed) ** 3
        largest = gradient.abs().max().item()
        ratio = (1 + seed) / 70
        by_norm, by_value = with_gradient(gradient), with_gradient(gradient)
        length = clip_by_global_norm(by_norm, max_norm=ratio)
        assert abs(length.item() - math.sqrt(math.fsum((gradient**2).tolist()))) < 1e-10
        assert abs(cosine(by_norm.grad, gradient) - 1) < 1e-12
        assert_close(clip_by_value(by_value, max_value=ratio * largest), length)
        kept = cosine(by_value.grad, gradient)
        bound = 2 * math.sqrt(ratio) / (1 + ratio)
        assert kept > max(bound, 1 / math.sqrt(1 + seed)) - 1e-12
    turned = with_gradient(f64(1, 0.01))
    clip_by_value(turned, max_value=0.01)
    angle = math.degrees(math.acos(cosine(turned.grad, f64(1, 0.01))))
    assert abs(angle - (45 - math.degrees(math.atan(0.01)))) < 1e-9


def test_claim_4_6_effective_rate():
    """Printed: the smaller of 0.001 and 1/10, so 0.001. The step taken has 0.0001."""
    lr, bound = 1e-3, 1.0
    for length in (0.2, 10.0, 400.0):
        gradient = length * f64(0.6, 0.8)
        param = with_gradient(gradient)
        reported = clip_by_global_norm(param, max_norm=bound)
        assert abs(reported.item() - length) < 1e-9
        torch.optim.SGD([param], lr=lr).step()
        rate = (-param.detach() / gradient)[0].item()
        printed = min(lr, bound / length)
        assert abs(rate - lr * min(1, bound / length)) < 1e-15
        assert (abs(rate - printed) < 1e-15) == (length < bound)
        if length > bound:
            assert printed > 9 * rate


def adams_steps(gradients: list[float], max_norm: float) -> list[float]:
    param = with_gradient(f64(0.0))
    optimizer, steps = Adam([param], lr=0.01), []
    for gradient in gradients:
        param.grad = f64(gradient)
        assert abs(clip_by_global_norm(param, max_norm=max_norm).item() - abs(gradient)) < 1e-12
        before = param.item()
        optimizer.step()
        steps.append(before - param.item())
    return steps


def test_claim_4_6_clip_limits_rate():
    """Inside: gradient descent. Outside: Adam, to which C = 1 and C = 0.001 are the same."""
    param = with_gradient(f64(30, -40))
    clip_by_global_norm(param, max_norm=2.0)
    torch.optim.SGD([param], lr=0.1).step()
    assert abs(param.detach().norm().item() - 0.2) < 1e-12

    always = [5.0 + t % 3 for t in range(30)]
    for bound in (1.0, 1e-3):
        for step in adams_steps(always, bound):
            assert abs(step - 0.01) < 1e-6
    # what it does change: how long one outlier holds the steps down
    outlier = [1.0] * 50 + [1000.0] + [1.0] * 50
    assert abs(adams_steps(outlier, 1.0)[-1] - 0.01) < 1e-6
    assert 0 < adams_steps(outlier, 1e9)[-1] < 0.001


def test_claim_4_6_clip_stability():
    """Inside: a quartic. Outside: lopsided noise, and an infinite gradient."""
    for bound, arrives in ((1.0, True), (1e300, False)):
        w = 10.0
        for _ in range(300):
            param = with_gradient(f64(4 * w**3 if abs(w) < 1e90 else math.inf))
            clip_by_global_norm(param, max_norm=bound)
            w -= 0.05 * param.grad.item()
        assert (abs(w) < 0.2) == arrives

    targets, w = [0.0] * 9 + [10.0], 1.0  # at their mean, where the plain descent rests
    for _ in range(400):
        clipped = []
        for x in targets:
            param = with_gradient(f64(w - x))
            assert abs(clip_by_global_norm(param, max_norm=1.0).item() - abs(w - x)) < 1e-12
            clipped.append(param.grad.item())
        w -= 0.1 * sum(clipped) / 10
    assert abs(w - 1 / 9) < 1e-9
    broken = f64(math.inf, 1.0)
    assert (1.0 * broken / broken.norm()).isnan().any()


def test_claim_4_6_attention_gradients():
    """Inside: the scores. Outside: the weights."""
    query, key, value = normal(5, 3), normal(6, 3, seed=1), normal(6, 3, seed=2)
    scores = (query @ key.T / math.sqrt(3)).requires_grad_()
    weights = scores.softmax(dim=-1)
    loss = (weights @ value).sin().sum()
    of_scores, of_weights = torch.autograd.grad(loss, [scores, weights])
    assert_close(of_scores.sum(dim=1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-14)
    assert of_weights.sum(dim=1).abs().min() > 0.01
    through = (softmax_jacobian(scores.detach()) @ of_weights[:, :, None])[:, :, 0]
    assert_close(through, of_scores)


def test_claim_4_6_overclipping():
    """Inside: clipping by value. Outside: by norm, for any C."""
    gradient = f64(0.9, -0.5, -0.4)  # of one row of scores: it sums to zero
    for bound in (0.5, 1e-6):
        by_norm, by_value = with_gradient(gradient), with_gradient(gradient)
        for length in (
            clip_by_global_norm(by_norm, max_norm=bound),
            clip_by_value(by_value, max_value=bound),
        ):
            assert abs(length.item() - math.sqrt(0.81 + 0.25 + 0.16)) < 1e-12
        assert abs(by_norm.grad.sum().item()) < 1e-16
        assert_close(by_norm.grad * (length / bound), gradient)  # all of it comes back
        assert abs(by_value.grad.sum().item()) > 0.3 * bound
    twin = with_gradient(f64(7.0, -2.0, -0.4))
    first = with_gradient(gradient)
    clip_by_value(twin, max_value=0.3), clip_by_value(first, max_value=0.3)
    assert torch.equal(twin.grad, first.grad)


def test_claim_4_6_mixed_precision():
    """Inside: a product. Outside: a sum, and a norm, without more digits."""
    a, b = normal(8, 32).half(), normal(32, 8, seed=1).half()
    product = (a @ b).double()
    assert (product - a.double() @ b.double()).abs().max() < 0.01
    count = torch.zeros((), dtype=torch.float16)
    for _ in range(3000):
        count = count + 1
    assert count == 2048
    large = torch.full((100,), 256.0, dtype=torch.float16)
    assert large.square().sum().sqrt() == math.inf and (large - 1).square().isfinite().all()
    assert global_norm([large]) == 2560


def test_def_4_6_11():
    """A thousand updates of 1e-4 to a weight of 1, by the two readings."""
    kept = torch.nn.Parameter(torch.ones(1))
    stored = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    for param in (kept, stored):
        optimizer = SGD([param], lr=1e-4)
        for _ in range(1000):
            param.grad = torch.ones_like(param)
            optimizer.step()
    by_hand = torch.ones(1, dtype=torch.float16)  # an update in float32, stored in float16
    by_hand = (by_hand.float() - 1e-4).half()
    assert by_hand == 1 and stored.item() == 1
    assert abs(kept.item() - 0.9) < 1e-4


def scaled_gradient(scale: float, factors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradient of a sum of weights times factors that arrives in float16: carried, divided."""
    param = torch.nn.Parameter(torch.ones(len(factors), dtype=dtype))
    scaler = StaticLossScaler(scale)
    loss = (param.half() * 2.0**-13).float() @ (factors * 2.0**13)
    scaler.scale(loss).backward()
    carried = param.grad.clone()
    scaler.unscale(torch.optim.SGD([param], lr=1.0))
    return carried, param.grad


def test_claim_4_6_gradient_underflow():
    """Inside: one small gradient, divided in float32. Outside: in float16; too wide a spread."""
    tiny = f32(2.0**-26)
    without, _ = scaled_gradient(1.0, tiny, torch.float32)
    carried, divided = scaled_gradient(1024.0, tiny, torch.float32)
    assert without == 0 and carried == 2.0**-16 and divided == 2.0**-26
    carried, divided = scaled_gradient(1024.0, tiny, torch.float16)
    assert carried == 2.0**-16 and divided == 0
    for exponent in range(-4, 20):
        both, _ = scaled_gradient(2.0**exponent, f32(2.0**-26, 2.0**16), torch.float32)
        assert both[0] == 0 or both[1] == math.inf


def test_eq_4_6_26():
    """A loss of 3 w: the backward pass yields 3 S, and the quotient is the gradient."""
    w = torch.nn.Parameter(f32(2.0))
    scaler = StaticLossScaler(256.0)
    loss = 3 * w.sum()
    assert scaler.scale(loss.detach()) == 256 * 6
    scaler.scale(loss).backward()
    by_name_unscaled = w.grad.clone()
    scaler.unscale(torch.optim.SGD([w], lr=1.0))
    assert by_name_unscaled == 768 and w.grad == 3  # the second is what (4.6.7) asks for


def follow(scaler: DynamicLossScaler | StaticLossScaler, gradients: list[float]) -> list[float]:
    """The factor before each iteration, with gradients that arrive in float16."""
    scales = []
    for gradient in gradients:
        param = torch.nn.Parameter(torch.zeros(1))
        scales.append(scaler.get_scale())
        loss = scaler.scale((param.half() * 1.0).float().sum() * gradient)
        loss.backward()
        scaler.step(torch.optim.SGD([param], lr=0.0))
        scaler.update()
    return scales


def test_claim_4_6_dynamic_scaling():
    """Norms a million apart, the same factors; an overflow, and it is halved."""
    paths = [
        follow(DynamicLossScaler(16.0, growth_interval=3), [size] * 8) for size in (1e-3, 1e3)
    ]
    assert paths[0] == paths[1] == [16, 16, 16, 32, 32, 32, 64, 64]
    growing = follow(DynamicLossScaler(16.0, growth_interval=3), [0.1 * 3**t for t in range(8)])
    assert growing == paths[0]  # by its norm it would have to shrink
    overflow = follow(DynamicLossScaler(16.0, growth_interval=3), [1, math.inf, 1, 1, 1, 1e4])
    assert overflow == [16, 16, 8, 8, 8, 16]
    assert follow(StaticLossScaler(16.0), [1e-3, math.inf, 1e3]) == [16, 16, 16]
    assert StaticLossScaler(16.0).scale(torch.tensor(2.0)) == 32
    assert DynamicLossScaler(16.0).scale(torch.tensor(2.0)) == 32


def descend(scaler: DynamicLossScaler | StaticLossScaler, sizes: list[float]) -> list[float]:
    """Steps of plain descent on a slope that changes; forward and backward in float16."""
    w, steps = torch.nn.Parameter(torch.zeros(1)), []
    optimizer = torch.optim.SGD([w], lr=1.0)
    for size in sizes:
        optimizer.zero_grad()
        w.data.zero_()  # so that the step is not rounded against the weight
        scaler.scale((w.half() * 1.0).float().sum() * size).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(-w.item() / size)
    return steps


def test_claim_4_6_dynamic_better():
    """Inside: gradients that fade by 2^40. Outside: those that stay in range."""
    fading = [2.0 ** (10 - t / 3) for t in range(120)]
    assert descend(StaticLossScaler(16.0), fading)[-1] == 0
    followed = descend(DynamicLossScaler(16.0, growth_interval=3), fading)
    assert abs(followed[-1] - 1) < 0.01
    steady = [0.75] * 40
    fixed = descend(StaticLossScaler(1024.0), steady)
    moved = descend(DynamicLossScaler(1024.0, growth_interval=3), steady)
    assert fixed == [1.0] * 40
    assert moved.count(0.0) >= 3 and set(moved) == {0.0, 1.0}  # it had to find the edge
    assert StaticLossScaler(4.0).scale(torch.tensor(2.0)) == 8
    assert DynamicLossScaler(4.0).scale(torch.tensor(2.0)) == 8


def test_claim_4_6_ce_half():
    found = point("log(softmax([-x, 0]))[0]", torch.float16)
    assert abs(found.x - 25 * math.log(2)) < 0.02 and found.naive == -math.inf
    logits = torch.tensor([-18.0, 0.0], dtype=torch.float16)
    assert logits.softmax(dim=0).log()[0] == -math.inf
    assert abs(cross_entropy(logits, torch.tensor(0)).item() - 18) < 1e-6


def test_claim_4_6_ce_float32():
    """Inside: half logits. Outside: a half loss, which the usual factor makes infinite."""
    logits, target = f32(1.0, 2.5, 0.5), torch.tensor(0)
    by_hand = math.log(math.exp(1) + math.exp(2.5) + math.exp(0.5)) - 1
    loss = cross_entropy(logits.half(), target)
    assert loss.dtype == torch.float32 and abs(loss.item() - by_hand) < 1e-6
    scaler = StaticLossScaler(2.0**16)
    assert abs(scaler.scale(loss).item() / 2**16 - by_hand) < 1e-6
    assert loss.half() * 2.0**16 == math.inf and by_hand > 1
