"""In-batch losses over all ranks of a group against one process that has the whole batch."""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmlosses.logprobs import gather_rows, tiling
from lmlosses.losses import clip_loss, in_batch_info_nce, siglip_loss
from lmlosses.nn import LearnedTemperature
from tests.logprobs.test_chunked import LiveMemory

ROOT = Path(__file__).parents[2]
RANKS = 4
SIZES = (2, 4)  # the groups of two are ranks 0 and 1, and ranks 2 and 3
BATCH, FURTHER, WIDTH, DIM = 12, 8, 5, 3
# a rounding step of float64 is 2e-16; the mistake to catch is a factor or a term left out
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Model(nn.Module):
    """Two encoders, a temperature and a bias: everything that such a loss may train."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, DIM), nn.Linear(WIDTH, DIM)
        self.temperature = LearnedTemperature(0.2)
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.double()
        generator = torch.Generator().manual_seed(0)
        for layer in (self.first, self.second):
            for param in layer.parameters():
                param.data.normal_(generator=generator)

    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(queries), self.second(keys)


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)

    return {
        "queries": draw(BATCH),
        "keys": draw(BATCH),
        "negatives": draw(FURTHER),
        # pairs of equal ids on one rank and on two
        "ids": torch.tensor([0, 1, 1, 2, 0, 3, 4, 5, 6, 5, 7, 1]),
    }


def part(rank: int, size: int) -> dict[str, Tensor]:
    """What one rank of a group holds."""
    return {name: tensor.chunk(size)[rank] for name, tensor in data().items()}


Group = dist.ProcessGroup | None
Case = Callable[[Model, dict[str, Tensor], Group], Tensor]


def info_nce(
    model: Model,
    batch: dict[str, Tensor],
    group: Group,
    *,
    negatives: bool = False,
    ids: bool = False,
    learned: bool = True,
    **settings,
) -> Tensor:
    queries, keys = model(batch["queries"], batch["keys"])
    return in_batch_info_nce(
        queries, keys, model.second(batch["negatives"]) if negatives else None,
        ids=batch["ids"] if ids else None,
        temperature=model.temperature() if learned else 0.3, group=group, **settings,
    )  # fmt: skip


def one_direction_with_keys_of_a_frozen_encoder(model, batch, group):
    queries, keys = model(batch["queries"], batch["keys"])
    return in_batch_info_nce(queries, keys.detach(), temperature=0.3, group=group)


def clip(model, batch, group):
    images, texts = model(batch["queries"], batch["keys"])
    return clip_loss(images, texts, temperature=model.temperature(), ids=batch["ids"], group=group)


def siglip(model, batch, group, *, ids=False):
    images, texts = model(batch["queries"], batch["keys"])
    return siglip_loss(
        images, texts, temperature=model.temperature(), bias=model.bias,
        ids=batch["ids"] if ids else None, group=group,
    )  # fmt: skip


CASES: dict[str, Case] = {
    "InfoNCE": info_nce,
    "InfoNCE, fixed temperature": functools.partial(info_nce, learned=False),
    "InfoNCE of inner products": functools.partial(info_nce, similarity="dot"),
    "InfoNCE, negatives": functools.partial(info_nce, negatives=True),
    "InfoNCE, ids": functools.partial(info_nce, ids=True),
    "InfoNCE, negatives and ids": functools.partial(info_nce, negatives=True, ids=True),
    "InfoNCE, frozen keys": one_direction_with_keys_of_a_frozen_encoder,
    "symmetric": functools.partial(info_nce, symmetric=True),
    "symmetric, negatives": functools.partial(info_nce, symmetric=True, negatives=True),
    "symmetric, ids": functools.partial(info_nce, symmetric=True, ids=True),
    "symmetric, negatives and ids": functools.partial(
        info_nce, symmetric=True, negatives=True, ids=True
    ),
    "CLIP": clip,
    "SigLIP": siglip,
    "SigLIP, ids": functools.partial(siglip, ids=True),
}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def of_all_pairs(
    batch: dict[str, Tensor], gather: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Gradients where every rank takes the loss of all pairs, gathered in some way."""
    model = Model()
    queries, keys = (gather(vectors) for vectors in model(batch["queries"], batch["keys"]))
    in_batch_info_nce(
        queries, keys, symmetric=True, temperature=model.temperature()
    ).mean().backward()
    return gradients(model)


def gathered_without_gradient(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The classic mistake: rows of other ranks are constants, one's own are put in their place."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.detach().contiguous(), group=group)
    parts[dist.get_rank(group)] = local
    return torch.cat(parts)


def refusals(rank: int, group: dist.ProcessGroup) -> dict[str, str]:
    """What each rank is told where their batches differ, or something else is wrong."""
    found = {}

    def told(name: str, call: Callable[[], object]) -> None:
        with pytest.raises((ValueError, RuntimeError)) as raised:
            call()
        found[name] = f"{type(raised.value).__name__}: {raised.value}"

    rows = torch.ones(2 if rank == 1 else 3, 2)
    told("keys", lambda: in_batch_info_nce(rows, rows, group=group))
    told("texts", lambda: siglip_loss(rows, rows, group=group))
    even = torch.ones(3, 2)
    told("negatives", lambda: in_batch_info_nce(even, even, rows, group=group))
    told("local", lambda: gather_rows(even if rank else even[0], group))
    told("empty", lambda: gather_rows(even[: 0 if rank == 2 else 3], group, name="views"))
    told("scalar", lambda: gather_rows(torch.tensor(1.0), group))
    mask = torch.ones(3, 3, dtype=torch.bool)
    told("mask", lambda: in_batch_info_nce(even, even, mask=mask, group=group))
    leaf = torch.ones(2, 2, requires_grad=True)
    (first,) = torch.autograd.grad(
        gather_rows(leaf, group).square().sum(), leaf, create_graph=True
    )
    told("second derivative", lambda: first.sum().backward())
    return found


def held(group: dist.ProcessGroup) -> dict[str, int]:
    """Bytes at the worst moment of a step with 512 pairs a rank, its inputs aside; on rank 0."""
    tiling._TILE_BYTES_CPU = 2**16
    found = {}
    for name, loss in (
        ("symmetric", functools.partial(in_batch_info_nce, symmetric=True)),
        ("SigLIP", siglip_loss),
    ):
        generator = torch.Generator().manual_seed(dist.get_rank())
        queries, keys = (torch.randn(512, 8, generator=generator) for _ in range(2))
        memory = LiveMemory() if dist.get_rank() == 0 else None
        with memory or contextlib.nullcontext():
            values = loss(queries.requires_grad_(), keys.requires_grad_(), group=group)
            values.sum().backward()
        if memory is not None:
            found[name] = memory.peak
    return found


def work(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    twos = [dist.new_group([first, first + 1]) for first in range(0, RANKS, 2)]
    groups = {2: twos[rank // 2], 4: dist.group.WORLD}
    found: dict[str, object] = {"refusals": refusals(rank, groups[4])}
    for size, group in groups.items():
        batch = part(dist.get_rank(group), size)
        for name, case in CASES.items():
            model = Model()
            losses = case(model, batch, group)
            losses.mean().backward()
            found[f"{name} on {size}"] = (losses.detach(), gradients(model))
        for name, gather in (
            ("gathered", lambda local, group=group: gather_rows(local, group)),
            ("detached", lambda local, group=group: gathered_without_gradient(local, group)),
        ):
            found[f"{name} on {size}"] = of_all_pairs(batch, gather)

    numbers = torch.arange(2) + 10 * rank
    found["order"] = [gather_rows(numbers.to(dtype), groups[4]) for dtype in
                      (torch.int64, torch.int32, torch.uint8, torch.bfloat16)]  # fmt: skip
    found["none"] = gather_rows(torch.empty(0, 3), groups[2])
    found["held"] = held(groups[4])
    torch.save(found, folder / f"found{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of one launch has to say."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment)
        for rank in range(RANKS)
    ]
    try:
        assert [rank.wait(timeout=600) for rank in ranks] == [0] * RANKS
    finally:
        for rank in ranks:  # one that failed would leave the others waiting
            rank.kill()
    return [torch.load(folder / f"found{rank}.pt") for rank in range(RANKS)]


def _of_groups(found, name, size):
    """What the ranks of each group of this size found, group by group."""
    everyone = [each[f"{name} on {size}"] for each in found]
    return [everyone[first : first + size] for first in range(0, RANKS, size)]


def _averaged(gradients_of_ranks):
    return {
        name: torch.stack([each[name] for each in gradients_of_ranks]).mean(dim=0)
        for name in gradients_of_ranks[0]
    }


@functools.cache
def _of_one_process(name):
    model = Model()
    losses = CASES[name](model, data(), None)
    losses.mean().backward()
    return losses.detach(), gradients(model)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_every_gradient_averaged_over_ranks_is_that_of_one_process(found, name, size):
    losses, true = _of_one_process(name)
    for group in _of_groups(found, name, size):
        torch.testing.assert_close(torch.cat([values for values, _ in group]), losses, **EXACT)
        torch.testing.assert_close(_averaged([each for _, each in group]), true, **EXACT)
    assert true["first.weight"].abs().max() > 0.01  # there is something to get wrong
    if "fixed" not in name and "frozen" not in name:
        assert true["temperature.log_inverse"].abs() > 0.01


def test_ranks_hold_different_data_and_have_different_gradients(found):
    for size in SIZES:
        for group in _of_groups(found, "symmetric", size):
            one, other = (gradients["first.weight"] for _, gradients in group[:2])
            assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("size", SIZES)
def test_the_loss_of_all_pairs_on_every_rank_has_the_same_gradient(found, size):
    _, true = _of_one_process("symmetric")
    for group in _of_groups(found, "gathered", size):
        torch.testing.assert_close(_averaged(group), true, **EXACT)


@pytest.mark.parametrize("size", SIZES)
def test_a_gather_without_gradient_would_be_off_by_the_number_of_ranks(found, size):
    _, true = _of_one_process("symmetric")
    for group in _of_groups(found, "detached", size):
        averaged = _averaged(group)
        for name in ("first.weight", "second.weight"):
            torch.testing.assert_close(size * averaged[name], true[name], **EXACT)
            with pytest.raises(AssertionError):
                torch.testing.assert_close(averaged[name], true[name], rtol=0.1, atol=0)


def test_rows_come_in_the_order_of_ranks_and_keep_their_dtype(found):
    expected = torch.tensor([0, 1, 10, 11, 20, 21, 30, 31])
    for each in found:
        for rows in each["order"]:
            assert torch.equal(rows, expected.to(rows.dtype))
        assert len({rows.dtype for rows in each["order"]}) == 4
        assert each["none"].shape == (0, 3)


@pytest.mark.parametrize("name", ["keys", "texts", "negatives"])
def test_uneven_batches_are_refused_on_all_ranks(found, name):
    for each in found:
        assert each["refusals"][name] == (
            f"ValueError: {name} must have the same shape on all ranks; "
            "got (3, 2), (2, 2), (3, 2), (3, 2) on ranks 0 to 3"
        )


def test_every_rank_learns_of_what_does_not_fit_together(found):
    same = "must have the same shape on all ranks; got"
    for each in found:
        told = each["refusals"]
        assert f"local {same} (2,), (3, 2), (3, 2), (3, 2) on ranks" in told["local"]
        assert f"views {same} (3, 2), (3, 2), (0, 2), (3, 2) on ranks" in told["empty"]
        assert told["scalar"] == "ValueError: local must have at least 1 axes; got shape ()"
        assert "mask must be None with a group of ranks (give ids instead)" in told["mask"]
        assert told["second derivative"].startswith("RuntimeError: trying to differentiate twice")


def test_a_rank_does_not_hold_its_part_of_the_matrix_of_scores(found):
    batch, dim, size = 4 * 512, 8, 4
    part_of_scores = 512 * batch * size
    vectors = batch * dim * size  # of one side on all ranks
    assert len(found[0]["held"]) == 2
    for peak in found[0]["held"].values():
        assert vectors < peak < part_of_scores / 4


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
