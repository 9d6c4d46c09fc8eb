"""What subsection 4.4.5 says, held to numbers: in-batch negatives at scale."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from lmlosses.gradient_cache import cached_backward
from lmlosses.lab.memory import largest_tensor
from lmlosses.logprobs import pair_log_sigmoid, pair_stats
from lmlosses.losses import clip_loss, in_batch_info_nce, siglip_loss


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    return F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).t()


def surprise(scores: Tensor) -> Tensor:
    """At the diagonal, in each row."""
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")


def gradient(value: Tensor, point: Tensor) -> Tensor:
    return torch.autograd.grad(value, point)[0]


def test_eq_4_4_25():
    """A loop over queries, in plain Python."""
    queries, keys, tau = draw(6, 3), draw(6, 3, seed=1), 0.3
    expected = []
    for i, query in enumerate(queries):
        weights = [
            math.exp(float(query @ key) / float(query.norm() * key.norm()) / tau) for key in keys
        ]
        expected.append(-math.log(weights[i] / sum(weights)))
    found = in_batch_info_nce(queries, keys, temperature=tau)
    assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_eq_4_4_26():
    """Cross-entropy of the rows and of the columns, half of each."""
    images, texts = draw(7, 4), draw(7, 4, seed=1)
    scores = cosines(images, texts) / 0.2
    rows, columns = surprise(scores), surprise(scores.t())
    assert (rows - columns).abs().max() > 0.1  # they are two losses
    assert_close(clip_loss(images, texts, temperature=0.2), (rows + columns) / 2)
    assert_close(clip_loss(texts, images, temperature=0.2), (rows + columns) / 2)


def test_eq_4_4_27():
    """Pair by pair: binary cross-entropy with the label 1 on the diagonal."""
    images, texts = draw(5, 4), draw(5, 4, seed=1)
    logits = cosines(images, texts) / 0.2 - 3.0
    expected = F.binary_cross_entropy_with_logits(
        logits, torch.eye(5, dtype=torch.float64), reduction="none"
    ).sum(dim=1)
    assert_close(siglip_loss(images, texts, temperature=0.2, bias=-3.0), expected)


def test_claim_4_4_siglip_no_normalizer():
    """Further candidates add their own terms and change no other; in InfoNCE all terms change."""
    images, texts = F.normalize(draw(4, 3)), F.normalize(draw(6, 3, seed=1))
    own = torch.arange(4)
    two_halves = torch.zeros(4, dtype=torch.float64)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            logit = float(image @ text) - 1.0
            two_halves[i] -= math.log1p(math.exp(-logit if i == j else logit))
    assert_close(pair_log_sigmoid(images, texts, own, bias=-1.0), two_halves)
    few = siglip_loss(images, texts[:4], temperature=1.0, bias=-1.0)
    added = torch.log1p(torch.exp(images @ texts[4:].t() - 1.0)).sum(dim=1)
    assert_close(few + added, 0.0 - two_halves)
    # the derivative in one score knows nothing of the others
    some = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    slopes = []
    for other in (0.0, 5.0):
        keys = torch.tensor([[1.0, 0.0], [0.0, other]], dtype=torch.float64)
        value = pair_log_sigmoid(some, keys, torch.tensor([0])).sum()
        slopes.append(gradient(value, some)[0, 0])
    assert_close(torch.stack(slopes), torch.full((2,), 0.5, dtype=torch.float64))


def test_claim_4_4_siglip_bias():
    """Vectors that say nothing, whose scores are all 0: the loss is a function of the bias."""
    for batch in (64, 512):
        images = torch.zeros(batch, 2, dtype=torch.float64)
        images[:, 0] = 1.0
        texts = images.roll(1, dims=1)

        def cost(bias: float, images: Tensor = images, texts: Tensor = texts) -> float:
            return siglip_loss(images, texts, bias=bias).mean().item()

        best = -math.log(batch - 1)
        entropy = math.log(batch) + (batch - 1) * math.log(batch / (batch - 1))
        assert abs(cost(best) - entropy) < 1e-9
        assert all(cost(best + step) > entropy + 1e-3 for step in (-0.2, 0.2))
        assert abs(cost(0.0) - batch * math.log(2)) < 1e-9
    assert abs(cost(best) - 7.24) < 0.01 and abs(cost(-10.0) - 10.02) < 0.01
    assert abs(1 + math.exp(10) - 22_027) < 1  # the batch for which -10 is best


def test_eq_4_4_28():
    """Columns of equal ids are struck out of the matrix by hand."""
    queries, keys = draw(6, 4), draw(6, 4, seed=1)
    ids = torch.tensor([3, 1, 3, 2, 1, 3])
    scores = cosines(queries, keys) / 0.5
    rows, columns = [], []
    for i in range(6):
        kept = [j for j in range(6) if j == i or ids[j] != ids[i]]
        rows.append(scores[i, kept].logsumexp(0) - scores[i, i])
        columns.append(scores[kept, i].logsumexp(0) - scores[i, i])
    found = in_batch_info_nce(queries, keys, temperature=0.5, ids=ids)
    assert_close(found, torch.stack(rows))
    both = clip_loss(queries, keys, temperature=0.5, ids=ids)
    assert_close(both, (torch.stack(rows) + torch.stack(columns)) / 2)


def test_claim_4_4_more_negatives():
    """Four things, told apart perfectly, in batches that grow."""
    things = torch.eye(4, dtype=torch.float64)
    for batch in (2, 4, 8, 32):
        ids = torch.arange(batch) % 4
        found = in_batch_info_nce(things[ids], things[ids], temperature=0.02)
        floor = math.log(max(batch / 4, 1))
        assert_close(found, torch.full((batch,), floor, dtype=torch.float64))
        spared = in_batch_info_nce(things[ids], things[ids], temperature=0.02, ids=ids)
        assert spared.abs().max() < 1e-12
    # no other encoder of things does better
    for seed in range(3):
        encoder = draw(4, 4, seed=seed)
        assert in_batch_info_nce(encoder[ids], things[ids], temperature=0.02).mean() > floor


def test_eq_4_4_29():
    """Scores as free parameters: queries that are rows of scores, keys that are unit vectors."""
    scores, keys, tau = draw(5, 5).requires_grad_(), torch.eye(5, dtype=torch.float64), 0.7
    loss = in_batch_info_nce(scores, keys, temperature=tau, symmetric=True, similarity="dot")
    found = gradient(loss.mean(), scores)
    logits = scores.detach() / tau
    rows, columns = logits.softmax(dim=1), logits.softmax(dim=0)
    assert_close(found, (rows + columns - 2 * keys) / (2 * 5 * tau))
    stats = pair_stats(logits, keys, torch.arange(5), by_key=True)
    assert_close((logits - stats.log_normalizer[:, None]).exp(), rows)
    assert_close((logits - stats.key_log_normalizer[None, :]).exp(), columns)
    assert_close(stats.logps, rows.diagonal().log())
    assert_close(stats.key_logps, columns.diagonal().log())


def test_claim_4_4_quadratic_memory():
    """The largest tensor of both passes; all entries of the results against the whole matrix."""
    batch, own = 256, torch.arange(256)
    queries, keys = draw(batch, 2).requires_grad_(), draw(batch, 2, seed=1)
    scores = (queries @ keys.t()).detach()
    most = {}
    for implementation in ("reference", "chunked"):
        queries.grad = None
        found = []

        def both_ways(implementation: str = implementation, found: list = found) -> None:
            stats = pair_stats(
                queries, keys, own, by_key=True, implementation=implementation, workspace=2**16
            )
            (stats.logps + stats.key_logps).sum().backward()
            found += [part.detach() for part in stats]

        most[implementation] = largest_tensor(both_ways)
        logps, normalizer, key_logps, key_normalizer = found
        assert_close(logps, -surprise(scores))
        assert_close(key_logps, -surprise(scores.t()))
        assert_close(normalizer, scores.logsumexp(dim=1))
        assert_close(key_normalizer, scores.logsumexp(dim=0))
        both = scores.softmax(dim=1) + scores.softmax(dim=0)
        assert_close(queries.grad, (2 * torch.eye(batch, dtype=torch.float64) - both) @ keys)
    assert most["reference"] >= 8 * batch**2 and most["chunked"] <= 2 * batch**2


def test_claim_4_4_accumulation():
    """Micro-batches of two against the whole of eight, in the gradient of one matrix."""
    inputs, outputs, start = draw(8, 3), draw(8, 3, seed=1), draw(3, 3, seed=2)

    def loss(queries: Tensor, keys: Tensor) -> Tensor:
        return in_batch_info_nce(queries, keys, temperature=0.2).mean()

    matrix = start.clone().requires_grad_()
    scores = cosines(inputs @ matrix, outputs @ matrix) / 0.2
    truth = gradient(surprise(scores).mean(), matrix)
    pairs = list(zip(inputs.split(2), outputs.split(2), strict=True))
    accumulated = sum(gradient(loss(a @ matrix, b @ matrix), matrix) for a, b in pairs) / 4
    by_hand = sum(
        gradient(surprise(cosines(a @ matrix, b @ matrix) / 0.2).mean(), matrix) for a, b in pairs
    )
    assert_close(accumulated, by_hand / 4)
    assert (accumulated - truth).norm() > 0.3 * truth.norm()
    encoders = [lambda piece: piece @ matrix] * 2
    value = cached_backward(loss, encoders, [inputs.split(2), outputs.split(2)])
    assert_close(value, surprise(scores).mean().detach())
    assert_close(matrix.grad, truth)


def test_eq_4_4_30():
    """Two ranks played by one process; each has the loss of its own queries over all keys."""
    queries, keys = draw(6, 4), draw(6, 4, seed=1)
    queries, keys = queries.requires_grad_(), keys.requires_grad_()
    whole = in_batch_info_nce(queries, keys, temperature=0.5).mean()
    expected = gradient(surprise(cosines(queries, keys) / 0.5).mean(), keys)
    assert_close(gradient(whole, keys), expected)
    shares = []
    for rank in range(2):
        own = torch.arange(3) + 3 * rank
        mine = F.normalize(queries[own], dim=-1) / 0.5
        stats = pair_stats(mine, F.normalize(keys, dim=-1), own)
        shares.append(gradient(-stats.logps.mean(), keys))
    assert_close(sum(shares) / 2, expected)
    # the gradient that a rank finds for its own keys by itself is another one
    assert (shares[0][:3] / 2 - expected[:3]).norm() > 0.1 * expected[:3].norm()


def test_claim_4_4_gathered_gradient():
    """Every rank has the loss of all, and gradients for its own embeddings alone."""
    inputs, texts, start = draw(8, 3), draw(8, 3, seed=1), draw(3, 3, seed=2)
    matrix = start.clone().requires_grad_()
    truth = gradient(
        (surprise(cosines(inputs @ matrix, texts) / 0.5)
         + surprise(cosines(inputs @ matrix, texts).t() / 0.5)).mean() / 2, matrix
    )  # fmt: skip
    ranks = 4
    averaged, passed_back = torch.zeros_like(start), torch.zeros_like(start)
    for rank in range(ranks):
        embedded = inputs @ matrix
        own = torch.arange(8) // 2 == rank
        gathered = torch.where(own[:, None], embedded, embedded.detach())
        value = clip_loss(gathered, texts, temperature=0.5).mean()
        averaged += gradient(value, matrix) / ranks
        # a gather with gradients hands each rank what all ranks found for its rows
        everyone = embedded.detach().requires_grad_()
        found = gradient(clip_loss(everyone, texts, temperature=0.5).mean(), everyone) * ranks
        embedded = inputs @ matrix
        passed_back += gradient((embedded * found * own[:, None]).sum(), matrix) / ranks
    assert_close(averaged, truth / ranks)
    assert_close(passed_back, truth)
