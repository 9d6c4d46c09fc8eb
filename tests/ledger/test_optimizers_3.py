"""What section 2.2 of the notes says, held to numbers: Lion, and its table beside AdamW."""

import math

import torch
from torch import Tensor
from torch.testing import assert_close

from lmlosses.optim import AdamW, Lion


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(steps: int, size: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, size, generator=generator, dtype=torch.float64)


def walk(kind: type, start: Tensor, gradients: Tensor, **settings: object) -> Tensor:
    """The points of an optimizer that is handed these gradients, start included."""
    param = torch.nn.Parameter(start.clone())
    optimizer = kind([param], **settings)
    path = [start]
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
        path.append(param.detach().clone())
    return torch.stack(path)


def sizes(path: Tensor) -> Tensor:
    return (path[1:] - path[:-1]).abs()


def state_of(kind: type, gradients: Tensor, **settings: object) -> dict[str, Tensor]:
    param = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = kind([param], **settings)
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return {name: value for name, value in optimizer.state[param].items() if name != "step"}


def test_notes_2_2_program_search():
    """The program that the search returned is Lion with odd numbers, but for its arcsine."""

    def found(start: Tensor, gradients: Tensor, *, arcsine: bool) -> Tensor:
        interp = lambda x, y, a: (1 - a) * x + a * y  # noqa: E731
        w, v, path = start, torch.zeros_like(start), [start]
        for g in gradients:
            m = interp(g.arcsin() if arcsine else g, v, 0.899)
            v = interp(g.arcsin() if arcsine else g, m, 1.109)
            w = w - 0.01 * (m / (m * m).sqrt() + 0.4602 * w)
            path.append(w)
        return torch.stack(path)

    start, gradients = f64(0.5, -0.2, 0.1, 0.9), drawn(60).clamp(-1, 1)
    ours = {"lr": 0.01, "betas": (0.899, 1.109 * 0.899), "weight_decay": 0.4602}
    assert_close(walk(Lion, start, gradients, **ours), found(start, gradients, arcsine=False))
    # people took the arcsine out, and made 0.99 of 0.997
    assert (found(start, gradients, arcsine=True) - found(start, gradients, arcsine=False)).any()
    rounded = walk(Lion, start, gradients, lr=0.01, betas=(0.9, 0.99), weight_decay=0.4602)
    assert (rounded - found(start, gradients, arcsine=False)).abs().max() > 0.005
    assert abs((1 - 1.109) + 1.109 * 0.101 - (1 - 1.109 * 0.899)) < 1e-12


def test_notes_2_2_momentum():
    """Unrolled: the gradient of k steps ago weighs (1 - b2) b2^k."""
    gradients = drawn(30)
    state = state_of(Lion, gradients, betas=(0.5, 0.8))
    by_hand = sum(0.2 * 0.8 ** (29 - t) * gradients[t] for t in range(30))
    assert_close(state["exp_avg"], by_hand)


def test_notes_2_2_update():
    """With m_{t-1} under the sign, as printed; with m_t, which the line above made, it differs."""
    start, gradients = f64(1.0, -2.0, 0.5, 0.0), drawn(50)

    def printed(*, new: bool) -> Tensor:
        lr, b1, b2, decay = 0.1, 0.7, 0.9, 0.3
        path = [start.tolist()]
        m = [0.0] * 4
        for g in gradients.tolist():
            after = [b2 * m[i] + (1 - b2) * g[i] for i in range(4)]
            under = after if new else m
            point = path[-1]
            c = [b1 * under[i] + (1 - b1) * g[i] for i in range(4)]
            path.append(
                [point[i] - lr * (math.copysign(1, c[i]) + decay * point[i]) for i in range(4)]
            )
            m = after
        return torch.tensor(path, dtype=torch.float64)

    ours = walk(Lion, start, gradients, lr=0.1, betas=(0.7, 0.9), weight_decay=0.3)
    assert_close(ours, printed(new=False))
    assert (ours - printed(new=True)).abs().max() > 0.1


def test_notes_2_2_same_amount():
    """Inside: no decay and no zero. Outside: an entry never used, and decay."""
    gradients = drawn(20) * f64(1e-6, 1.0, 1e3, 1e6)
    path = walk(Lion, f64(0.0, 1.0, 2.0, 3.0), gradients, lr=0.25)
    assert_close(sizes(path), torch.full((20, 4), 0.25, dtype=torch.float64))
    unused = walk(Lion, f64(1.0, 1.0), f64(1.0, 0.0).expand(3, 2), lr=0.25)
    assert unused[-1].tolist() == [0.25, 1.0]
    decayed = walk(Lion, f64(-2.0, 2.0), f64(1.0, 1.0).expand(1, 2), lr=0.25, weight_decay=0.5)
    assert decayed[-1].tolist() == [-2.0, 1.5]  # sizes 0 and 0.5


def test_notes_2_2_one_momentum():
    gradients = f64(2.0, -4.0).expand(1, 2)
    lion, adamw = state_of(Lion, gradients), state_of(AdamW, gradients)
    assert list(lion) == ["exp_avg"] and list(adamw) == ["exp_avg", "exp_avg_sq"]
    assert_close(lion["exp_avg"], f64(0.02, -0.04))
    assert_close(adamw["exp_avg"], f64(0.2, -0.4))
    assert_close(adamw["exp_avg_sq"], f64(0.004, 0.016))


def test_notes_2_2_memory_half():
    """Half of the state; a quarter of weights, gradients and state, before any activation."""

    def held(kind: type, dtype: torch.dtype) -> tuple[int, int]:
        param = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
        param.grad = torch.full_like(param, 0.5)
        optimizer = kind([param], lr=0.125, weight_decay=0.0)
        optimizer.step()
        assert_close(param.data, torch.full_like(param, -0.125))
        state = [v for k, v in optimizer.state[param].items() if k != "step"]
        assert abs(state[0].mean().item() - (0.005 if kind is Lion else 0.05)) < 1e-6
        count = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        return count(*state), count(param, param.grad, *state)

    (lion, lion_all), (adamw, adamw_all) = (held(k, torch.float32) for k in (Lion, AdamW))
    assert lion / adamw == 0.5 and lion_all / adamw_all == 0.75
    # bfloat16 weights and gradients, their float32 originals, and the moments in float32
    mixed = lambda state: 2 + 2 + 4 + state / 1000  # noqa: E731
    assert mixed(lion) / mixed(adamw) == 0.75


def test_notes_2_2_large_batch():
    """A sign is right with probability Phi(s sqrt(B)): a coin in small batches, sure in large."""
    signal, entries = 0.1, 20_000
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 16, 100, 2500):
        noise = torch.randn(entries, generator=generator, dtype=torch.float64)
        gradient = signal + noise / math.sqrt(batch)
        path = walk(Lion, torch.zeros_like(gradient), gradient[None], lr=0.5)
        share = (path[1] == -0.5).double().mean().item()
        expected = 0.5 * (1 + math.erf(signal * math.sqrt(batch / 2)))
        assert abs(share - expected) < 0.012
        if batch == 1:
            assert expected < 0.55  # next to a coin
        if batch == 2500:
            assert expected > 0.99  # and a still larger batch brings nothing more


class AsPrinted:
    """The notes' class in our words: state by tensor, step in place, memory last."""

    def __init__(self, params: list[Tensor], lr: float, betas: tuple[float, float], wd: float):
        self.lr, self.betas, self.wd = lr, betas, wd
        self.state = {p: torch.zeros_like(p) for p in params}

    def step(self, params: list[Tensor]) -> None:
        first, second = self.betas
        for p in params:
            direction = torch.sign(first * self.state[p] + (1 - first) * p.grad)
            p.data -= self.lr * (direction + self.wd * p.data)
            self.state[p].mul_(second).add_(p.grad, alpha=1 - second)


def test_notes_2_2_code():
    """Right for every parameter that has a gradient; one without ends the step."""
    start, gradients = f64(1.0, -1.0, 0.3, 0.0), drawn(50)
    param = torch.nn.Parameter(start.clone())
    printed = AsPrinted([param], 0.02, (0.8, 0.95), 0.5)
    for gradient in gradients:
        param.grad = gradient.clone()
        printed.step([param])
    ours = walk(Lion, start, gradients, lr=0.02, betas=(0.8, 0.95), weight_decay=0.5)
    assert_close(ours[-1], param.data, rtol=1e-12, atol=1e-12)
    idle = torch.nn.Parameter(f64(1.0))
    Lion([idle]).step()
    assert idle.item() == 1.0
    try:
        AsPrinted([idle], 0.1, (0.9, 0.99), 0.0).step([idle])
    except TypeError:
        return
    raise AssertionError("a gradient of None should have ended the step")


def test_notes_2_2_code_beta2():
    """After a gradient 1, an opposing one of 0.5 turns the sign only if memory took beta2."""
    gradients = f64(1.0, -0.5)[:, None]
    with_beta2 = walk(Lion, f64(0.0), gradients, lr=1.0, betas=(0.9, 0.99))
    with_beta1 = walk(Lion, f64(0.0), gradients, lr=1.0, betas=(0.9, 0.9))
    assert with_beta2.flatten().tolist() == [0.0, -1.0, 0.0]
    assert with_beta1.flatten().tolist() == [0.0, -1.0, -2.0]


def test_notes_2_2_defaults():
    gradients = drawn(20)
    defaults = walk(Lion, f64(1.0, 2.0, 3.0, 4.0), gradients)
    assert_close(sizes(defaults), torch.full((20, 4), 1e-4, dtype=torch.float64))
    m, signs = torch.zeros(4, dtype=torch.float64), []
    for g in gradients:
        signs.append((0.9 * m + 0.1 * g).sign())
        m = 0.99 * m + 0.01 * g
    assert_close(defaults[-1], f64(1.0, 2.0, 3.0, 4.0) - 1e-4 * torch.stack(signs).sum(dim=0))


def test_notes_2_2_table_memory():
    """Numbers per parameter, twice and once, in any shape."""
    for shape in ((3, 5), (7,), ()):
        gradient = torch.ones(1, *shape, dtype=torch.float64)
        numbers = {}
        for kind, first in ((AdamW, 0.1), (Lion, 0.01)):
            state = state_of(kind, gradient)
            assert_close(state["exp_avg"], torch.full(shape, first, dtype=torch.float64))
            numbers[kind] = sum(tensor.numel() for tensor in state.values())
        count = math.prod(shape)
        assert (numbers[AdamW], numbers[Lion]) == (2 * count, count)


def test_notes_2_2_table_update():
    """Each of AdamW's entries has a step of its own, Lion's one size; both forget the scale."""
    gradients = drawn(100) + f64(0.0, 0.5, 2.0, 10.0)
    start = torch.zeros(4, dtype=torch.float64)
    adamw = sizes(walk(AdamW, start, gradients, lr=0.1, weight_decay=0.0))[50:].mean(dim=0)
    lion = sizes(walk(Lion, start, gradients, lr=0.1))[50:].mean(dim=0)
    assert_close(lion, torch.full((4,), 0.1, dtype=torch.float64))
    assert (adamw.diff() > 0.005).all() and adamw[0] < 0.05 and adamw[3] < 0.101


def test_notes_2_2_table_lr():
    """In noise AdamW's steps are 4.4 times smaller; with a steady gradient they are as large."""
    zeros = torch.zeros(2000, dtype=torch.float64)
    noise = drawn(120, 2000)
    rms = lambda path: sizes(path)[100:].square().mean().sqrt().item()  # noqa: E731
    adamw = rms(walk(AdamW, zeros, noise, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0))
    lion = rms(walk(Lion, zeros, noise, lr=1.0))
    assert abs(lion - 1) < 1e-12 and 3 < lion / adamw < 10
    assert abs(1 / math.sqrt(0.1 / 1.9) - 4.36) < 0.01 and abs(lion / adamw - 4.36) < 0.3
    steady = torch.ones(120, 2000, dtype=torch.float64)
    still = rms(walk(AdamW, zeros, steady, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0))
    third = rms(walk(Lion, zeros, steady, lr=1 / 3))
    assert abs(still - 1) < 1e-6 and abs(third - 1 / 3) < 1e-12


def test_notes_2_2_table_decay():
    """What a weight without gradient loses in 501 steps; AdamW at 3e-4 and 0.1 as the measure."""
    nothing = torch.zeros(501, 1, dtype=torch.float64)

    def left(kind: type, lr: float, decay: float) -> float:
        return walk(kind, f64(1.0), nothing, lr=lr, weight_decay=decay)[-1].item()

    reference = left(AdamW, 3e-4, 0.1)
    assert abs(reference - math.exp(-501 * 3e-5)) < 1e-5
    for factor in (3, 10):  # 0.3 to 1.0 keeps the strength
        assert abs(left(Lion, 3e-4 / factor, 0.1 * factor) - reference) < 1e-5
    # the printed range, at the same rates: up to 33 times as strong
    assert abs(left(Lion, 3e-4 / 10, 10.0) - math.exp(-501 * 3e-4)) < 1e-4
    assert abs(left(Lion, 3e-4 / 3, 10.0) - math.exp(-501 * 1e-3)) < 1e-3
    # and 10 holds every weight below 0.1
    push = torch.full((300, 1), -1.0, dtype=torch.float64)
    assert abs(walk(Lion, f64(0.0), push, lr=0.01, weight_decay=10.0)[-1].item() - 0.1) < 1e-9


def test_notes_2_2_table_scenario():
    """Of a step, the share that is signal: Lion's noise is 4 times AdamW's, until batches grow."""
    zeros = torch.zeros(1000, dtype=torch.float64)

    def noise_of_steps(kind: type, batch: int, **settings: object) -> float:
        gradients = 0.1 + drawn(150, 1000) / math.sqrt(batch)
        path = walk(kind, zeros, gradients, lr=1.0, **settings)
        return (path[1:] - path[:-1])[100:].std().item()

    adamw = {b: noise_of_steps(AdamW, b, betas=(0.9, 0.95), weight_decay=0.0) for b in (1, 10_000)}
    lion = {b: noise_of_steps(Lion, b) for b in (1, 10_000)}
    assert lion[1] > 0.7 and 3 < lion[1] / adamw[1] < 5
    assert lion[10_000] < 1e-12 < adamw[10_000] < 0.1
