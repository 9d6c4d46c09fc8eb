"""Tests of lmlosses.lab.verses."""

import math
import subprocess
import sys
from importlib import resources

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from lmlosses import cpu_generator
from lmlosses.lab.verses import (
    BagEncoder,
    Hashed,
    bags,
    fit,
    hashed,
    load_verses,
    middle_words,
    rarity,
    retrieval,
    tfidf_scores,
    words_of,
)
from lmlosses.losses import in_batch_info_nce

FOLDER = resources.files("lmlosses.lab") / "texts"
TEXTS = ["In the beginning", "the earth was void; and the earth slept", "light"]


@pytest.fixture(scope="module")
def verses():
    return load_verses()


def pieces(text: str) -> list[str]:
    """Another way to count: every window of a word with its borders, by length."""
    found = []
    for word in text.lower().split():
        word = f"<{word}>"
        found.append(word)
        for length in (3, 4, 5):
            if length < len(word):
                windows = zip(*(word[k:] for k in range(length)), strict=False)
                found += ["".join(window) for window in windows]
    return found


# ---- the verses


def test_verses_have_the_sizes_that_are_documented(verses):
    sizes = [len(part.kjv) for part in verses]
    assert sizes == [9364, 430, 1004] and sum(sizes) == 10_798
    for number in (*sizes, sum(sizes)):
        assert f"{number:,}" in load_verses.__doc__
    for part in verses:
        assert len(part.places) == len(part.kjv) == len(part.web) == len(part.ids)


def test_books_are_split_in_advance(verses):
    books = [{place.rpartition(" ")[0] for place in part.places} for part in verses]
    assert books[1] == {"Romans"} and books[2] == {"Acts"}
    assert len(books[0]) == 7 and not books[0] & (books[1] | books[2])


def test_translations_say_the_same_in_other_words(verses):
    kjv, web = verses.train.kjv[0], verses.train.web[0]
    assert kjv == "In the beginning God created the heaven and the earth."
    assert web == "In the beginning, God created the heavens and the earth."
    same = sum(a == b for part in verses for a, b in zip(part.kjv, part.web, strict=True))
    assert same < 0.01 * 10_798


def test_nothing_is_left_of_markup_and_every_verse_has_words(verses):
    for part in verses:
        for text in part.kjv + part.web:
            assert not set(text) & set("<>[]{}\t¶") and "  " not in text
            assert text == text.strip() and words_of(text)


def test_ids_are_equal_where_verses_read_the_same(verses):
    part = verses.train
    spake = [i for i, text in enumerate(part.kjv) if text == part.kjv[1693]]
    spoke = [i for i, text in enumerate(part.kjv) if text.startswith("And the LORD spake unto M")]
    assert len(part.ids.unique()) == 9331 and len(spake) == 1
    assert len({part.kjv[i] for i in spoke}) < len(spoke)
    for texts in (part.kjv, part.web):
        by_text: dict[str, set[int]] = {}
        for text, number in zip(texts, part.ids.tolist(), strict=True):
            by_text.setdefault(text, set()).add(number)
        assert all(len(numbers) == 1 for numbers in by_text.values())
    assert len(verses.test.ids.unique()) == 1004 and len(verses.choice.ids.unique()) == 430


def test_less_than_a_megabyte_is_shipped_and_the_notice_names_it():
    assert len((FOLDER / "verses.tsv.gz").read_bytes()) < 1_000_000
    notice = (FOLDER / "NOTICE.txt").read_text("utf-8")
    for word in ("verses.tsv.gz", "10,798", "sword-text-kjv", "sword-text-web", "trademark"):
        assert word in notice


# ---- features


def test_words_are_letters_and_small():
    assert words_of("God’s Spirit, 3 Élan_vital") == ["god", "s", "spirit", "élan", "vital"]


def test_middle_words_are_in_the_middle():
    assert middle_words("a b c d e", 3) == "b c d"
    assert middle_words("a b c d e f", 3) == "b c d"
    assert middle_words("a b", 3) == "a b"


def test_features_are_words_and_their_pieces():
    found = hashed(["light be"], buckets=2**31)
    # no two of these fall into one bucket of so many
    assert len(found.features) == len(pieces("light be"))
    assert found.words.tolist() == [0, len(pieces("light")), len(pieces("light be"))]
    assert found.texts.tolist() == [0, 2]
    again = hashed(["be light"], buckets=2**31)
    assert sorted(again.features.tolist()) == sorted(found.features.tolist())


def test_features_are_the_same_on_every_machine():
    remainder = 0xFFFFFFFF  # CRC-32 by its definition, bit by bit
    for byte in b"<a>":
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0xEDB88320 if remainder & 1 else 0)
    assert hashed(["a"], buckets=1000).features.tolist() == [(remainder ^ 0xFFFFFFFF) % 1000]


def test_bags_of_whole_texts_and_of_some():
    texts = hashed(TEXTS)
    whole = bags(texts)
    sizes = torch.cat([whole.offsets, torch.tensor([len(whole.features)])]).diff()
    assert whole.features.equal(texts.features)
    assert sizes.tolist() == [sum(len(pieces(word)) for word in words_of(text)) for text in TEXTS]
    some = bags(texts, torch.tensor([2, 0, 2]))
    expected = [hashed([TEXTS[i]]).features for i in (2, 0, 2)]
    assert some.features.equal(torch.cat(expected))
    assert some.offsets.tolist() == [0, len(expected[0]), len(expected[0]) + len(expected[1])]


def test_middle_bags_are_those_of_the_middle_words():
    for count in (1, 2, 3, 50):
        expected = hashed([middle_words(text, count) for text in TEXTS]).features
        assert bags(hashed(TEXTS), words=count).features.equal(expected)


def test_drawn_words_begin_everywhere_and_nowhere_else():
    texts, text = hashed(["un deux trois quatre cinq"]), "un deux trois quatre cinq".split()
    windows = {
        tuple(hashed([" ".join(text[start : start + 2])]).features.tolist()): start
        for start in range(4)
    }
    generator = cpu_generator(0)
    seen = [
        windows[tuple(bags(texts, words=2, generator=generator).features.tolist())]
        for _ in range(200)
    ]
    assert set(seen) == {0, 1, 2, 3} and all(seen.count(start) > 30 for start in range(4))


def test_rarity_counts_texts_and_not_features():
    weights = rarity([hashed(["be be be", "be light"]), hashed(["light", "was"])])
    for word, texts in (("be", 2), ("light", 2), ("was", 1), ("dark", 0)):
        bucket = hashed([word]).features[0]
        torch.testing.assert_close(weights[bucket].item(), math.log(5 / (1 + texts)))


# ---- the encoder and its training


def test_encoder_sums_vectors_and_has_length_one():
    encoder = BagEncoder(torch.rand(16384), dim=5, generator=cpu_generator(0))
    texts = hashed(TEXTS)
    found = encoder(bags(texts)).detach()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    summed = encoder.vectors[hashed([TEXTS[1]]).features].sum(dim=0)
    torch.testing.assert_close(found[1], (summed / summed.norm()).detach())


def test_untrained_encoder_is_close_to_the_cosine_of_weighted_counts():
    weights = torch.rand(50, generator=cpu_generator(1))
    encoder = BagEncoder(weights, dim=2000, generator=cpu_generator(0))
    small = [(part % 50) for part in (hashed([text]).features for text in TEXTS[:2])]
    counts = torch.stack([torch.bincount(part, minlength=50) * weights for part in small])
    expected = torch.nn.functional.cosine_similarity(counts[0], counts[1], dim=0)
    vectors = [encoder.vectors[part].sum(dim=0) for part in small]
    found = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0)
    assert abs(found - expected) < 0.08


def words_apart(seed=0):
    """Two languages without a common word, eight sentences each."""
    old = [f"aa{k} bb{k} cc{k}".translate(str.maketrans("01234567", "abcdefgh")) for k in range(8)]
    new = [f"xx{k} yy{k}".translate(str.maketrans("01234567", "ijklmnop")) for k in range(8)]
    return hashed(old), hashed(new)


def trained(loss, **settings):
    old, new = words_apart()
    encoder = BagEncoder(torch.ones(16384), dim=8, generator=cpu_generator(0))
    given = dict(batch=8, steps=30, lr=0.1, words=2, generator=cpu_generator(1))
    values = fit(encoder, old, new, torch.arange(8), loss, **(given | settings))
    with torch.no_grad():
        scores = encoder(bags(old)) @ encoder(bags(new)).t()
    return values, scores


def test_fit_learns_a_language_that_shares_no_word():
    values, scores = trained(lambda q, k, ids: in_batch_info_nce(q, k, temperature=0.1))
    _, before = trained(lambda q, k, ids: in_batch_info_nce(q, k), steps=0)
    assert retrieval(scores).recall == retrieval(scores).back_recall == 1 > retrieval(before).mrr
    assert len(values) == 30 and values[-1] < 0.1 < 1 < values[0]


def test_fit_repeats_itself():
    loss = lambda q, k, ids: in_batch_info_nce(q, k, ids=ids)  # noqa: E731
    assert trained(loss)[1].equal(trained(loss)[1])


def test_fit_gives_each_verse_so_many_copies_and_its_id():
    seen = []

    def loss(queries, keys, ids):
        seen.append(ids)
        assert len(queries) == len(keys) == len(ids) == 7
        first = {number: index for index, number in reversed(list(enumerate(ids.tolist())))}
        for index, number in enumerate(ids.tolist()):
            assert torch.equal(keys[index], keys[first[number]])
        return in_batch_info_nce(queries, keys)

    trained(loss, batch=7, copies=3, steps=2)
    for ids in seen:
        assert sorted(ids.unique(return_counts=True)[1].tolist()) == [1, 3, 3]


# ---- retrieval


def test_retrieval_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.95, 0.2, 0.3], [0.0, 0.1, 0.5]])
    found = retrieval(scores)
    expected = (2 / 3, (1 + 1 / 3 + 1) / 3, 1 / 3, (1 / 2 + 1 / 2 + 1) / 3)
    assert found == pytest.approx(expected)


def test_a_tie_counts_against_the_own():
    assert retrieval(torch.zeros(4, 4)) == pytest.approx((0, 0.25, 0, 0.25))
    assert retrieval(torch.ones(1, 1)) == (1, 1, 1, 1)


@pytest.mark.parametrize("characters", [None, (2, 3)])
def test_tfidf_is_scikit_learns(characters):
    settings = {} if characters is None else {"analyzer": "char", "ngram_range": characters}
    vectorizer = TfidfVectorizer(sublinear_tf=True, **settings).fit(TEXTS)
    queries, keys = ["the light", "void"], TEXTS
    first, second = (vectorizer.transform(texts).toarray() for texts in (queries, keys))
    found = tfidf_scores(TEXTS, queries, keys, characters=characters)
    torch.testing.assert_close(found, torch.from_numpy(first @ second.T))


def test_module_does_without_scikit_learn():
    code = "import sys, lmlosses.lab.verses; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- errors


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"texts must each have a word; got none in texts\[1\]"):
        hashed(["light", "1 2"])
    with pytest.raises(ValueError, match="buckets must be positive; got 0"):
        hashed(["light"], buckets=0)
    with pytest.raises(ValueError, match="count must be positive; got 0"):
        middle_words("light", 0)
    with pytest.raises(ValueError, match="words must be positive; got -1"):
        bags(hashed(["light"]), words=-1)
    with pytest.raises(ValueError, match="dim must be positive; got 0"):
        BagEncoder(torch.ones(4), dim=0, generator=cpu_generator(0))
    with pytest.raises(ValueError, match="ids must hold at least 9 verses, a batch; got 8"):
        trained(lambda q, k, ids: in_batch_info_nce(q, k), batch=9)
    with pytest.raises(ValueError, match="copies must be positive; got 0"):
        trained(lambda q, k, ids: in_batch_info_nce(q, k), copies=0)


@pytest.mark.bad_input
def test_errors_of_what_annotations_forbid():
    with pytest.raises(TypeError, match="buckets must be a whole number"):
        hashed(["light"], buckets=2.5)
    with pytest.raises(ValueError, match="scores must have"):
        retrieval(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="scores must be a floating-point"):
        retrieval(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="weights must have"):
        BagEncoder(torch.ones(4, 1), dim=2, generator=cpu_generator(0))
    with pytest.raises(TypeError, match="weights must be a floating-point"):
        BagEncoder(torch.ones(4, dtype=torch.long), dim=2, generator=cpu_generator(0))


def test_named_tuples_are_what_annotations_say(verses):
    assert isinstance(hashed(["light"]), Hashed)
    assert verses.train.ids.dtype == torch.int64
