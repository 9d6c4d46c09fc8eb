"""Verses of the Bible in two English translations: which verse is it, in other words?

A real task for contrastive losses that a processor can do in seconds. The King James Version of
1611, in a later spelling, and the World English Bible say the same in different words; a query is
a verse, or a few words of it, in the one, and the candidates are verses in the other. The books
are split in advance: one to test on, one to choose settings on, seven to learn from.

The encoder is small and old-fashioned: a text is a bag of words and pieces of words, and its
vector the sum of theirs. What counting says of the same bags, TF-IDF of scikit-learn, stands
beside it.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lmlosses._checks import (
    check_floating,
    check_ndim,
    check_positive,
    check_same_shape,
    check_whole,
)
from lmlosses.lab.training import train

TEST_BOOK = "Acts"
"""The book that results are measured on."""

CHOICE_BOOK = "Romans"
"""The book that settings are chosen on."""

BUCKETS = 16384
"""How many features there are; words and pieces of words share them by chance."""

_LETTERS = re.compile(r"[^\W\d_]+")
_PIECES = (3, 4, 5)  # lengths, in letters, of the pieces of a word


class Verses(NamedTuple):
    """Verses in two translations, one entry each."""

    places: list[str]
    kjv: list[str]
    web: list[str]
    ids: Int[Tensor, "verses"]
    """Equal where two verses read the same in either translation."""


class Split(NamedTuple):
    """Verses to learn from, to choose on and to test on; no book is in two of them."""

    train: Verses
    choice: Verses
    test: Verses


class Bags(NamedTuple):
    """Texts as bags of features, one after the other."""

    features: Int[Tensor, "features"]
    offsets: Int[Tensor, "texts"]
    """Where the features of each text begin."""


class Hashed(NamedTuple):
    """Texts as features, with the borders of words and of texts."""

    features: Int[Tensor, "features"]
    words: Int[Tensor, "words_and_end"]
    """Where the features of each word begin."""
    texts: Int[Tensor, "texts_and_end"]
    """Which word each text begins with."""


class Retrieval(NamedTuple):
    """How well queries find their keys, and keys their queries."""

    recall: float
    """Share of queries whose own key is first."""
    mrr: float
    """Mean of one over the place of a query's own key."""
    back_recall: float
    """Share of keys whose own query is first."""
    back_mrr: float
    """Mean of one over the place of a key's own query."""


def load_verses() -> Split:
    """Verses of nine books in the King James Version and the World English Bible.

    There are 10,798: 9,364 to learn from, 430 of Romans to choose on, and 1,004 of Acts to test
    on. Where they come from, and what was changed, is told in ``texts/NOTICE.txt`` beside this
    module.

    Returns:
        The three parts. Verses of equal ``ids`` answer the same query: God speaks to Moses in
        the same words many times.

    Example:
        >>> from lmlosses.lab.verses import load_verses
        >>> verses = load_verses().test
        >>> verses.places[1], verses.kjv[1][:27], verses.web[1][:27]
        ('Acts 1:2', 'Until the day in which he w', 'until the day in which he w')
    """
    packed = (resources.files("lmlosses.lab") / "texts" / "verses.tsv.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    parts: dict[str, list[list[str]]] = {"train": [], "choice": [], "test": []}
    for row in rows:
        book = row[0].rpartition(" ")[0]
        parts[{TEST_BOOK: "test", CHOICE_BOOK: "choice"}.get(book, "train")].append(row)
    return Split(**{name: _verses(part) for name, part in parts.items()})


def _verses(rows: list[list[str]]) -> Verses:
    places, kjv, web = ([row[column] for row in rows] for column in range(3))
    ids = list(range(len(rows)))
    for texts in (kjv, web):
        first: dict[str, int] = {}
        for index, text in enumerate(texts):
            same = first.setdefault(text, index)
            if ids[same] != ids[index]:
                low, high = sorted((ids[same], ids[index]))
                ids = [low if number == high else number for number in ids]
    return Verses(places, kjv, web, torch.tensor(ids))


def words_of(text: str) -> list[str]:
    """The words of a text in small letters; whatever is no letter divides them.

    Args:
        text: Any text.

    Returns:
        The words in order.

    Example:
        >>> from lmlosses.lab.verses import words_of
        >>> words_of("And God said, Let there be light")
        ['and', 'god', 'said', 'let', 'there', 'be', 'light']
    """
    return _LETTERS.findall(text.lower())


def middle_words(text: str, count: int) -> str:
    """So many words from the middle of a text, or all where there are no more.

    Args:
        text: Any text.
        count: Number of words.

    Returns:
        The words, with a blank between any two.

    Raises:
        TypeError: If ``count`` is no whole number.
        ValueError: If ``count`` is not positive.

    Example:
        >>> from lmlosses.lab.verses import middle_words
        >>> middle_words("And God said, Let there be light", 3)
        'said let there'
    """
    check_whole(count=count)
    check_positive(count=count)
    words = words_of(text)
    start = max(len(words) - count, 0) // 2
    return " ".join(words[start : start + count])


def _pieces(word: str) -> list[str]:
    """A word with its borders marked, and all its pieces of three to five letters."""
    marked = f"<{word}>"
    return [marked] + [
        marked[start : start + length]
        for length in _PIECES
        for start in range(len(marked) - length + 1)
        if length < len(marked)
    ]


def hashed(texts: Sequence[str], *, buckets: int = BUCKETS) -> Hashed:
    """Words and pieces of words of three to five letters, each as the number of a bucket.

    Args:
        texts: The texts.
        buckets: Number of buckets. Which bucket a word falls into is decided by its CRC-32, the
            same on every machine.

    Returns:
        The features of all texts in order.

    Raises:
        TypeError: If ``buckets`` is no whole number.
        ValueError: If ``buckets`` is not positive, or a text has no word.

    Example:
        >>> from lmlosses.lab.verses import hashed
        >>> hashed(["let be", "be"]).words  # let, <le, let, et>, <let, let>; be, <be, be>
        tensor([ 0,  6,  9, 12])
    """
    check_whole(buckets=buckets)
    check_positive(buckets=buckets)
    known: dict[str, list[int]] = {}
    features: list[int] = []
    words, starts = [0], [0]
    for index, text in enumerate(texts):
        found = words_of(text)
        if not found:
            raise ValueError(f"texts must each have a word; got none in texts[{index}]")
        for word in found:
            if word not in known:
                known[word] = [zlib.crc32(part.encode()) % buckets for part in _pieces(word)]
            features += known[word]
            words.append(len(features))
        starts.append(len(words) - 1)
    return Hashed(torch.tensor(features), torch.tensor(words), torch.tensor(starts))


def bags(
    texts: Hashed,
    index: Int[Tensor, "chosen"] | None = None,
    *,
    words: int | None = None,
    generator: torch.Generator | None = None,
) -> Bags:
    """The features of some texts, or of a few words of each.

    Args:
        texts: All texts, from `hashed`.
        index: Which of them, in which order; all without it.
        words: So many words from each text, the whole text without it.
        generator: Draws where the words begin, on the CPU; without it they are the middle ones,
            those of `middle_words`.

    Returns:
        One bag per chosen text, on the CPU.

    Raises:
        TypeError: If ``words`` is no whole number.
        ValueError: If ``words`` is not positive.

    Example:
        >>> from lmlosses.lab.verses import bags, hashed
        >>> texts = hashed(["let there be light", "be"])
        >>> bags(texts, words=1).offsets
        tensor([ 0, 13])
    """
    first, last = texts.texts[:-1], texts.texts[1:]
    if index is not None:
        first, last = first[index], last[index]
    if words is not None:
        check_whole(words=words)
        check_positive(words=words)
        room = (last - first - words).clamp(min=0)
        if generator is None:
            first = first + room // 2
        else:
            draws = torch.rand(len(room), generator=generator, dtype=torch.float64)
            first = first + (draws * (room + 1)).long()
        last = torch.minimum(first + words, last)
    begins, ends = texts.words[first], texts.words[last]
    lengths = ends - begins
    offsets = lengths.cumsum(0) - lengths
    places = torch.arange(int(lengths.sum())) + (begins - offsets).repeat_interleave(lengths)
    return Bags(texts.features[places], offsets)


def rarity(texts: Sequence[Hashed], *, buckets: int = BUCKETS) -> Float[Tensor, "buckets"]:
    r"""How rare each feature is: its inverse document frequency, in nats.

    .. math:: \log \frac{1 + N}{1 + N_k}

    with :math:`N` texts, of which :math:`N_k` hold feature :math:`k`.

    Args:
        texts: Collections of texts, counted together.
        buckets: Number of buckets that they were hashed into.

    Returns:
        One weight per bucket, in torch's default dtype.

    Example:
        >>> from lmlosses.lab.verses import hashed, rarity
        >>> weights = rarity([hashed(["let be", "be"], buckets=64)], buckets=64)
        >>> round(weights.max().item(), 3), weights.min().item()
        (1.099, 0.0)
    """
    counts = torch.zeros(buckets)
    total = 0
    for collection in texts:
        sizes = collection.words[collection.texts].diff()
        owner = torch.arange(len(sizes)).repeat_interleave(sizes)
        pairs = torch.unique(owner * buckets + collection.features)
        counts += torch.bincount(pairs % buckets, minlength=buckets)
        total += len(sizes)
    return ((1 + total) / (1 + counts)).log()


class BagEncoder(nn.Module):
    r"""A text's vector: the sum of the vectors of its features, scaled to length 1.

    .. math:: e = \frac{u}{\lVert u \rVert} , \qquad u = \sum_{k \in \text{text}} w_k

    Vectors start random, with lengths in proportion to ``weights``: inner products of texts are
    then about those of weighted counts, before anything is learned.

    Args:
        weights: How much each feature counts at the start, such as its `rarity`.
        dim: Length of the vectors.
        generator: Source of the start, on the CPU.

    Raises:
        TypeError: If ``weights`` are not floating point, or ``dim`` no whole number.
        ValueError: If ``weights`` is no vector, or ``dim`` is not positive.

    Example:
        >>> import torch
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.verses import BagEncoder, bags, hashed
        >>> encoder = BagEncoder(torch.ones(64), dim=8, generator=cpu_generator(0))
        >>> texts = hashed(["let there be light", "light let there be"], buckets=64)
        >>> vectors = encoder(bags(texts))
        >>> bool((vectors[0] @ vectors[1] - 1).abs() < 1e-6)  # a bag knows no order
        True
    """

    def __init__(
        self, weights: Float[Tensor, "buckets"], *, dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        check_floating(weights=weights)
        check_ndim("weights", weights, 1)
        check_whole(dim=dim)
        check_positive(dim=dim)
        noise = torch.randn(len(weights), dim, generator=generator) / dim**0.5
        self.vectors = nn.Parameter(noise.to(weights.dtype) * weights.unsqueeze(1))

    def forward(self, texts: Bags) -> Float[Tensor, "texts dim"]:
        """One unit vector per text."""
        features, offsets = (part.to(self.vectors.device) for part in texts)
        summed = nn.functional.embedding_bag(features, self.vectors, offsets, mode="sum")
        return nn.functional.normalize(summed, dim=-1)


PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From vectors of queries and of keys, and the ids of their verses, to one loss per pair."""


def fit(
    encoder: nn.Module,
    queries: Hashed,
    keys: Hashed,
    ids: Int[Tensor, "verses"],
    loss: PairLoss,
    *,
    batch: int,
    steps: int,
    lr: float,
    words: int,
    generator: torch.Generator,
    copies: int = 1,
) -> Float[Tensor, "steps"]:
    """Train an encoder of both sides by Adam, on batches of pairs.

    A query is a few words from a random place of a verse, its key the whole verse in the other
    translation. The learning rate falls linearly to zero.

    Args:
        encoder: From `Bags` to vectors; changed in place.
        queries: The verses of one translation.
        keys: The same verses in the other.
        ids: Equal where two verses answer the same query.
        loss: From the vectors of both sides and the ids to one loss per pair.
        batch: Pairs in a batch.
        steps: Number of steps.
        lr: The first learning rate.
        words: Number of words in a query.
        generator: Draws verses and words, on the CPU.
        copies: How often each verse of a batch occurs in it, each time with other words.

    Returns:
        The mean loss of each batch, before its step, on the CPU.

    Raises:
        TypeError: If a setting is no whole number.
        ValueError: If a setting is not positive, or there are fewer verses than a batch needs.

    Example:
        >>> import torch
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.verses import BagEncoder, fit, hashed
        >>> from lmlosses.losses import in_batch_info_nce
        >>> old, new = hashed(["thou art", "he was"]), hashed(["you are", "he has been"])
        >>> encoder = BagEncoder(torch.ones(16384), dim=8, generator=cpu_generator(0))
        >>> found = fit(
        ...     encoder, old, new, torch.arange(2), lambda q, k, ids: in_batch_info_nce(q, k),
        ...     batch=2, steps=9, lr=0.1, words=2, generator=cpu_generator(0))
        >>> bool(found[-1] < found[0])
        True
    """
    check_whole(batch=batch, steps=steps, copies=copies)
    check_positive(batch=batch, copies=copies)
    different = -(-batch // copies)
    if len(ids) < different:
        raise ValueError(f"ids must hold at least {different} verses, a batch; got {len(ids)}")

    def step_loss() -> Tensor:
        chosen = torch.randperm(len(ids), generator=generator)[:different]
        chosen = chosen.repeat_interleave(copies)[:batch]
        asked = encoder(bags(queries, chosen, words=words, generator=generator))
        offered = encoder(bags(keys, chosen))
        return loss(asked, offered, ids[chosen].to(asked.device)).mean()

    # one update of all parameters at once
    optimizer = torch.optim.Adam(encoder.parameters(), lr=lr)
    return train(step_loss, optimizer, steps=steps, lr=lambda step: lr * (1 - step / steps))


def retrieval(scores: Float[Tensor, "pairs pairs"]) -> Retrieval:
    """How often a query scores its own key highest, and a key its own query.

    Args:
        scores: One row per query, one column per key; own pairs on the diagonal. A tie counts
            against the own.

    Returns:
        Shares between 0 and 1, from queries to keys and back.

    Raises:
        TypeError: If ``scores`` are not floating point.
        ValueError: If they are not a square matrix.

    Example:
        >>> import torch
        >>> from lmlosses.lab.verses import retrieval
        >>> retrieval(torch.tensor([[0.9, 0.1], [0.8, 0.7]]))
        Retrieval(recall=0.5, mrr=0.75, back_recall=1.0, back_mrr=1.0)
    """
    check_floating(scores=scores)
    check_ndim("scores", scores, 2)
    check_same_shape("scores", scores, of="its transpose", reference=scores.t())
    found: list[float] = []
    for table in (scores, scores.t()):
        own = table.diagonal().unsqueeze(1)
        places = (table >= own).sum(dim=1).double()
        found += [(places == 1).double().mean().item(), (1 / places).mean().item()]
    return Retrieval(*found)


def tfidf_scores(
    corpus: Sequence[str],
    queries: Sequence[str],
    keys: Sequence[str],
    *,
    characters: tuple[int, int] | None = None,
) -> Float[Tensor, "queries keys"]:
    """Cosines of TF-IDF vectors, by scikit-learn, in float64.

    Args:
        corpus: Texts to count words in, none of those that are scored.
        queries: Texts, one row each.
        keys: Texts, one column each.
        characters: Shortest and longest of the sequences of characters that are counted, across
            words; words without it.

    Returns:
        The scores.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.

    Example:
        >>> from lmlosses.lab.verses import tfidf_scores
        >>> tfidf_scores(["let there be light", "it was so"], ["light"], ["be light", "so be it"])
        tensor([[0.7071, 0.0000]], dtype=torch.float64)
    """
    # here, so that the rest of the module does without scikit-learn
    from sklearn.feature_extraction.text import (  # type: ignore[import-untyped]  # it has none
        TfidfVectorizer,
    )

    vectorizer = (
        TfidfVectorizer(sublinear_tf=True)
        if characters is None
        else TfidfVectorizer(analyzer="char", ngram_range=characters, sublinear_tf=True)
    )
    vectorizer.fit(corpus)
    found = vectorizer.transform(queries) @ vectorizer.transform(keys).T
    return torch.from_numpy(found.toarray())
