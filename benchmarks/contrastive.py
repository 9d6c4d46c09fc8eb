"""In-batch contrastive losses against the full matrix, the broadcast form and peers.

Times are process seconds of forward and backward pass, as ratios to the first form of each group
in the same run; memory is the peak of a step beyond its inputs, each in a process of its own.
"""

import argparse
import ctypes
import json
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import in_new_process, median_ratio, peak, resident, seconds
from lmlosses import token_mean
from lmlosses.losses import in_batch_info_nce, nt_xent, siglip_loss, supervised_contrastive

MIB = 2**20
_MMAP_THRESHOLD = -3  # of glibc's mallopt
TEMPERATURE = 0.07
CLASSES = 64  # of the supervised loss
SHAPE = (4096, 256)  # pairs, dim
BROADCAST_SHAPE = (512, 256)  # what the broadcast form can hold
METRIC_SHAPE = (128, 256)  # and what pytorch-metric-learning can
LARGEST = (32768, 256)
GROWTH = [512, 1024, 2048, 4096, 8192, 16384]
FULL_GROWTH = 8192  # the last batch of which all scores are held

Row = dict[str, Any]
Way = Callable[[Tensor, Tensor], Tensor]


def inputs(pairs: int, dim: int) -> tuple[Tensor, Tensor]:
    """Unit vectors of a model in training: an own key is nearer than others, not by much."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, dim, generator=generator)
    second = 0.3 * first + torch.randn(pairs, dim, generator=generator)
    units = [F.normalize(vectors, dim=-1).requires_grad_() for vectors in (first, second)]
    return units[0], units[1]


def _scores(first: Tensor, second: Tensor) -> Tensor:
    return F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).t() / TEMPERATURE


def _own(first: Tensor) -> Tensor:
    return torch.arange(len(first), device=first.device)


def full_one_way(first: Tensor, second: Tensor) -> Tensor:
    return F.cross_entropy(_scores(first, second), _own(first))


def full_both_ways(first: Tensor, second: Tensor) -> Tensor:
    """As in the pseudocode of CLIP."""
    scores, own = _scores(first, second), _own(first)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2


def full_of_units(first: Tensor, second: Tensor) -> Tensor:
    """Of vectors that have been normalized before."""
    scores, own = first @ second.t() / TEMPERATURE, _own(first)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2


def broadcast(first: Tensor, second: Tensor) -> Tensor:
    """All pairs side by side, [pairs, pairs, dim], before their cosines are taken."""
    cosines = F.cosine_similarity(first.unsqueeze(1), second.unsqueeze(0), dim=-1)
    return F.cross_entropy(cosines / TEMPERATURE, _own(first))


def full_views(first: Tensor, second: Tensor) -> Tensor:
    views = torch.cat([first, second])
    scores = _scores(views, views)
    scores = scores.masked_fill(torch.eye(len(views), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, _own(views).roll(len(first)))


def full_sigmoid(first: Tensor, second: Tensor) -> Tensor:
    scores = _scores(first, second) - 10.0
    signs = 2 * torch.eye(len(first)) - 1
    return -F.logsigmoid(signs * scores).sum(dim=-1).mean()


def _labels(first: Tensor) -> Tensor:
    return torch.arange(len(first)) % CLASSES


def full_supervised(first: Tensor, second: Tensor) -> Tensor:
    scores, labels = _scores(first, first), _labels(first)
    self = torch.eye(len(first), dtype=torch.bool)
    logps = scores.masked_fill(self, -torch.inf).log_softmax(dim=-1)
    positive = (labels.unsqueeze(1) == labels) & ~self
    means = logps.masked_fill(~positive, 0.0).sum(dim=-1) / positive.sum(dim=-1)
    return -means.mean() + 0.0 * second.sum()


def ours_one_way(first: Tensor, second: Tensor) -> Tensor:
    return in_batch_info_nce(first, second, temperature=TEMPERATURE).mean()


def ours_both_ways(first: Tensor, second: Tensor) -> Tensor:
    return in_batch_info_nce(first, second, temperature=TEMPERATURE, symmetric=True).mean()


def ours_of_units(first: Tensor, second: Tensor) -> Tensor:
    return in_batch_info_nce(
        first, second, temperature=TEMPERATURE, symmetric=True, similarity="dot"
    ).mean()


def ours_views(first: Tensor, second: Tensor) -> Tensor:
    return nt_xent(first, second, temperature=TEMPERATURE).mean()


def ours_sigmoid(first: Tensor, second: Tensor) -> Tensor:
    return siglip_loss(first, second, temperature=TEMPERATURE).mean()


def ours_supervised(first: Tensor, second: Tensor) -> Tensor:
    found = supervised_contrastive(first, _labels(first), temperature=TEMPERATURE)
    return token_mean(*found) + 0.0 * second.sum()


def info_nce_pytorch(first: Tensor, second: Tensor) -> Tensor:
    from info_nce import info_nce

    result: Tensor = info_nce(first, second, temperature=TEMPERATURE)
    return result


@cache
def _sentence_losses() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.sentence_transformer import losses
    return losses


def sentence_transformers(**settings: Any) -> Way:
    def loss(first: Tensor, second: Tensor) -> Tensor:
        made = _sentence_losses().MultipleNegativesRankingLoss
        chosen = made(None, scale=1 / TEMPERATURE, **settings)
        result: Tensor = chosen.compute_loss_from_embeddings([first, second], None)
        return result

    return loss


def metric_learning(name: str, *, views: bool) -> Way:
    def loss(first: Tensor, second: Tensor) -> Tensor:
        from pytorch_metric_learning import losses

        made = getattr(losses, name)(temperature=TEMPERATURE)
        if views:
            result: Tensor = losses.SelfSupervisedLoss(made)(first, second)
            return result
        return made(first, _labels(first)) + 0.0 * second.sum()

    return loss


class Group:
    """Ways to one number, the first of which the others are compared with."""

    def __init__(self, what: str, shape: tuple[int, int], **ways: Way) -> None:
        self.what, self.shape = what, shape
        self.ways = {name.replace("_", " "): way for name, way in ways.items()}


# the package that a way needs, where it needs one
NEEDS = {
    "info-nce-pytorch": "info_nce",
    "sentence-transformers": "sentence_transformers",
    "pytorch-metric-learning": "pytorch_metric_learning",
}
GROUPS = [
    Group(
        "symmetric InfoNCE", SHAPE,
        **{"full matrix": full_both_ways, "lmlosses": ours_both_ways,
           "sentence-transformers": sentence_transformers(
               partition_mode="per_direction", directions=("query_to_doc", "doc_to_query"))},
    ),
    Group(
        "symmetric InfoNCE of unit vectors", SHAPE,
        **{"full matrix": full_of_units, "lmlosses": ours_of_units},
    ),
    Group(
        "InfoNCE", SHAPE,
        **{"full matrix": full_one_way, "lmlosses": ours_one_way,
           "info-nce-pytorch": info_nce_pytorch,
           "sentence-transformers": sentence_transformers()},
    ),
    Group(
        "InfoNCE, small batch", BROADCAST_SHAPE,
        **{"broadcast": broadcast, "full matrix": full_one_way, "lmlosses": ours_one_way},
    ),
    Group(
        "NT-Xent", (SHAPE[0] // 2, SHAPE[1]),
        **{"full matrix": full_views, "lmlosses": ours_views},
    ),
    Group(
        "NT-Xent, small batch", METRIC_SHAPE,
        **{"full matrix": full_views, "lmlosses": ours_views,
           "pytorch-metric-learning": metric_learning("NTXentLoss", views=True)},
    ),
    Group(
        "SigLIP", SHAPE, **{"full matrix": full_sigmoid, "lmlosses": ours_sigmoid}
    ),
    Group(
        "supervised contrastive", SHAPE,
        **{"full matrix": full_supervised, "lmlosses": ours_supervised,
           "pytorch-metric-learning": metric_learning("SupConLoss", views=False)},
    ),
]  # fmt: skip
QUICK = (
    "symmetric InfoNCE",
    "symmetric InfoNCE of unit vectors",
    "InfoNCE, small batch",
)


def here(name: str) -> bool:
    """Whether the package that a way needs is installed."""
    return name not in NEEDS or find_spec(NEEDS[name]) is not None


def group_of(what: str) -> Group:
    return next(group for group in GROUPS if group.what == what)


def step(way: Way, arguments: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Forward and backward pass of one way."""

    def run() -> None:
        for tensor in arguments:
            tensor.grad = None
        way(*arguments).backward()

    return run


def memory_of(what: str, name: str, shape: tuple[int, int]) -> dict[str, float]:
    """Peaks of a step in a process of its own, in MiB.

    Beyond its inputs, ``peak_mib``, and of the whole process with all that it has loaded,
    ``process_mib``.
    """
    settings = {"what": what, "name": name, "shape": shape}
    found: dict[str, float] = json.loads(
        in_new_process("benchmarks.contrastive", "--memory", json.dumps(settings))
    )
    return found


def _print_memory(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    # what is freed goes back at once; else vectors of a few MiB leave holes, each run others
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)
    way = group_of(settings["what"]).ways[settings["name"]]

    def prepare() -> Callable[[], None]:
        step(way, inputs(2 * CLASSES, 8))()  # loads the libraries
        return step(way, inputs(*settings["shape"]))

    beyond = peak(prepare)
    # not getrusage, whose maximum a new process inherits from the one that started it
    found = {"peak_mib": beyond / MIB, "process_mib": resident("VmHWM") / MIB}
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


def check_that_they_agree(losses: list[Tensor]) -> None:
    """What is compared computes the same number."""
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-5)


def compared(group: Group, *, threads: int = 1, rounds: int = 5, peers: bool = True) -> list[Row]:
    """Ratios of time to the first of the group, and the memory of each."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    arguments = inputs(*group.shape)
    names = [name for name in group.ways if here(name) and (peers or name not in NEEDS)]
    check_that_they_agree([group.ways[name](*arguments) for name in names])
    found = seconds({name: step(group.ways[name], arguments) for name in names}, rounds=rounds)
    torch.set_num_threads(before)
    peaks = {name: memory_of(group.what, name, group.shape)["peak_mib"] for name in names}
    first = names[0]
    return [
        {
            "what": group.what,
            "way": name,
            "shape": list(group.shape),
            "threads": threads,
            "ratio": round(median_ratio(found[name], found[first]), 3),
            "peak_mib": peaks[name],
            "peak_ratio": round(peaks[name] / peaks[first], 3),
        }
        for name in names
    ]


def rows(*, full: bool = False) -> list[Row]:
    """One row a group and way; by default a few groups alone, without other packages."""
    found = []
    for group in GROUPS:
        if full or group.what in QUICK:
            found += compared(group, rounds=5 if full else 3, peers=full)
    return found


def growth() -> list[Row]:
    """Memory of symmetric InfoNCE against the batch, the last one for the lean form alone."""
    found = []
    for pairs in [*GROWTH, LARGEST[0]]:
        for name in ("full matrix", "lmlosses"):
            if name == "lmlosses" or pairs <= FULL_GROWTH:
                peaks = memory_of("symmetric InfoNCE", name, (pairs, LARGEST[1]))
                found.append({"way": name, "pairs": pairs, **peaks})
    return found


def table(rows: list[Row]) -> str:
    """The rows as text, one line each."""
    lines = [f"{'what':34} {'way':24} {'shape':>12} {'time':>7} {'peak MiB':>9} {'ratio':>7}"]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        lines.append(
            f"{row['what']:34} {row['way']:24} {shape:>12} {row['ratio']:7.2f} "
            f"{row['peak_mib']:9.1f} {row['peak_ratio']:7.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", required=True)
    _print_memory(json.loads(parser.parse_args().memory))
