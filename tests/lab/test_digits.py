"""Tests of lmlosses.lab.digits."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close

from lmlosses import cpu_generator
from lmlosses.lab.data import gaussian_blobs
from lmlosses.lab.digits import (
    Digits,
    Encoder,
    effective_rank,
    estimate,
    handwritten_digits,
    judge,
    linear_probe,
    pretrain,
    pretrained,
    random_views,
    retrieved,
)
from lmlosses.losses import nt_xent

# ---- the images


def test_the_file_is_cut_once_and_every_digit_is_on_both_sides():
    train, train_targets, test, test_targets = handwritten_digits()
    assert train.shape == (1200, 8, 8) and test.shape == (597, 8, 8)
    assert train.dtype == torch.float32 and train.min() == 0 and train.max() == 1
    for targets, least in ((train_targets, 110), (test_targets, 55)):
        assert targets.bincount().min() >= least and len(targets.bincount()) == 10


def test_no_test_image_is_among_the_training_images():
    digits = handwritten_digits()
    apart = torch.cdist(digits.test.flatten(1), digits.train.flatten(1))
    assert apart.min() > 0.1


# ---- views


def test_a_view_without_any_distortion_is_the_image():
    images = torch.rand(3, 8, 8, generator=cpu_generator(0))
    same = random_views(images, shift=0, noise=0.0, erased=0, generator=cpu_generator(1))
    assert torch.equal(same, images)


def test_a_shift_moves_by_at_most_so_much_and_reaches_every_place():
    dot = torch.zeros(200, 7, 7)
    dot[:, 3, 3] = 1
    views = random_views(dot, shift=2, noise=0.0, erased=0, generator=cpu_generator(0))
    places = {tuple(place.tolist()) for place in views.nonzero()[:, 1:]}
    assert places == {(row, column) for row in range(1, 6) for column in range(1, 6)}
    assert (views.sum(dim=(1, 2)) == 1).all()


def test_what_moves_out_is_lost_and_paper_comes_in():
    image = torch.ones(50, 4, 4)
    views = random_views(image, shift=1, noise=0.0, erased=0, generator=cpu_generator(0))
    assert set(views.sum(dim=(1, 2)).tolist()) == {9.0, 12.0, 16.0}


def test_the_erased_square_is_whole_and_may_lie_anywhere():
    views = random_views(
        torch.ones(300, 5, 5), shift=0, noise=0.0, erased=2, generator=cpu_generator(0)
    )
    holes = (views == 0).flatten(1)
    assert (holes.sum(dim=1) == 4).all()
    first = {int(hole.nonzero()[0]) for hole in holes}
    assert first == {5 * row + column for row in range(4) for column in range(4)}


def test_noise_has_the_deviation_asked_for_and_the_dtype_of_the_images():
    images = torch.zeros(100, 8, 8, dtype=torch.float64)
    views = random_views(images, shift=0, noise=0.3, erased=0, generator=cpu_generator(0))
    assert views.dtype == torch.float64
    assert abs(views.mean()) < 0.02 and abs(views.std() - 0.3) < 0.02


def test_the_same_seed_draws_the_same_views_and_another_does_not():
    images = torch.rand(4, 8, 8, generator=cpu_generator(0))
    once, again, other = (random_views(images, generator=cpu_generator(s)) for s in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_views_refuse_what_they_cannot_distort():
    with pytest.raises(ValueError, match="erased must be at most the side of an image; got 9"):
        random_views(torch.zeros(1, 8, 8), erased=9, generator=cpu_generator(0))
    with pytest.raises(ValueError, match="shift must"):
        random_views(torch.zeros(1, 8, 8), shift=-1, generator=cpu_generator(0))


@pytest.mark.bad_input
def test_views_of_one_image_need_three_axes_and_floating_point():
    with pytest.raises(ValueError, match="images must have 3"):
        random_views(torch.zeros(8, 8), generator=cpu_generator(0))
    with pytest.raises(TypeError, match="images must be a floating-point tensor"):
        random_views(torch.zeros(1, 8, 8, dtype=torch.long), generator=cpu_generator(0))


# ---- the encoder and its training


def test_an_encoder_is_its_seed_and_stays_in_float32():
    images = torch.rand(3, 8, 8, dtype=torch.float64, generator=cpu_generator(0))
    once, again, other = (Encoder(generator=cpu_generator(s)) for s in (0, 0, 1))
    assert torch.equal(once(images), again(images)) and not torch.equal(
        once(images), other(images)
    )
    assert once(images).dtype == torch.float32 and once(images).shape == (3, 64)


def test_the_head_follows_the_embedding():
    images = torch.rand(3, 8, 8, generator=cpu_generator(0))
    encoder = Encoder(12, 5, generator=cpu_generator(0))
    expected = encoder.embed(images).clamp(min=0) @ encoder.head.T + encoder.head_bias
    assert encoder.embed(images).shape == (3, 12)
    assert_close(encoder(images), expected)


@pytest.mark.bad_input
def test_an_encoder_sees_8_by_8_pixels():
    with pytest.raises(ValueError, match="images must have shape"):
        Encoder(generator=cpu_generator(0)).embed(torch.zeros(2, 9, 8))
    with pytest.raises(ValueError, match="dim must be positive"):
        Encoder(0, generator=cpu_generator(0))


def test_training_shows_the_loss_two_views_of_a_batch_without_repeats():
    images = torch.arange(20.0)[:, None, None].expand(20, 8, 8) / 20
    seen = []

    def loss(first, second, index):
        seen.append(index)
        assert first.shape == second.shape == (6, 64) and not torch.equal(first, second)
        return nt_xent(first, second).mean()

    encoder = Encoder(generator=cpu_generator(0))
    values = pretrain(encoder, images, loss, generator=cpu_generator(1), steps=4, batch=6)
    assert values.shape == (4,) and all(len(index.unique()) == 6 for index in seen)
    assert not torch.equal(seen[0], seen[1])


def test_training_lowers_the_loss_and_repeats_itself():
    images = handwritten_digits().train[:128]
    once, again = (
        pretrained(images, lambda a, b, _: nt_xent(a, b).mean(), seed=3, steps=3) for _ in range(2)
    )
    assert torch.equal(once(images), again(images))
    encoder, generator = Encoder(generator=cpu_generator(0)), cpu_generator(1)
    losses = pretrain(
        encoder, images, lambda a, b, _: nt_xent(a, b, temperature=0.1).mean(),
        generator=generator, steps=30, batch=32,
    )  # fmt: skip
    assert losses[-5:].mean() < losses[:5].mean() - 0.1


def test_a_batch_cannot_be_larger_than_the_set():
    encoder = Encoder(generator=cpu_generator(0))
    with pytest.raises(ValueError, match="batch must be at most the number of images, 4; got 5"):
        pretrain(
            encoder, torch.zeros(4, 8, 8), lambda a, b, _: (a - b).sum(),
            generator=cpu_generator(0), batch=5,
        )  # fmt: skip


# ---- what vectors are worth


def test_retrieval_agrees_with_a_search_by_hand():
    generator = cpu_generator(0)
    gallery, queries = (torch.randn(n, 3, generator=generator) for n in (30, 8))
    classes, own = (torch.randint(4, (n,), generator=generator) for n in (30, 8))
    for count in (1, 5):
        shares = retrieved(queries, own, gallery, classes, count=count)
        for query, label, share in zip(queries, own, shares, strict=True):
            cosines = [float(query @ other / query.norm() / other.norm()) for other in gallery]
            order = sorted(range(30), key=lambda n: -cosines[n])[:count]
            assert share == sum(int(classes[n] == label) for n in order) / count


def test_retrieval_refuses_a_gallery_that_is_too_small():
    with pytest.raises(ValueError, match="count must be at most the gallery's size, 2; got 3"):
        retrieved(torch.ones(1, 2), torch.zeros(1).long(), torch.ones(2, 2),
                  torch.zeros(2).long(), count=3)  # fmt: skip


@pytest.mark.bad_input
def test_retrieval_and_the_probe_refuse_shapes_that_disagree():
    zero = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="queries must have shape"):
        retrieved(torch.ones(2, 3), zero, torch.ones(2, 2), zero)
    with pytest.raises(ValueError, match="query_targets must have shape"):
        retrieved(torch.ones(2, 2), zero[:1], torch.ones(2, 2), zero)
    with pytest.raises(ValueError, match="gallery_targets must have shape"):
        retrieved(torch.ones(2, 2), zero, torch.ones(2, 2), zero[:1])
    with pytest.raises(ValueError, match="targets must have shape"):
        linear_probe(torch.ones(2, 2), zero[:1], torch.ones(2, 2), zero)
    with pytest.raises(ValueError, match="test must have shape"):
        linear_probe(torch.ones(2, 2), zero, torch.ones(2, 3), zero)
    with pytest.raises(ValueError, match="test_targets must have shape"):
        linear_probe(torch.ones(2, 2), zero, torch.ones(2, 2), zero[:1])
    with pytest.raises(ValueError, match="penalty must be positive"):
        linear_probe(torch.ones(2, 2), zero, torch.ones(2, 2), zero, penalty=0.0)


def test_the_probe_decides_as_logistic_regression_of_scikit_learn():
    centers = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    inputs, targets = gaussian_blobs(600, centers=centers, scale=1.0, generator=cpu_generator(0))
    inputs = torch.cat([5 + 3 * inputs, torch.ones(600, 1)], dim=1)  # and one that says nothing
    right = linear_probe(inputs[:300], targets[:300], inputs[300:], targets[300:], penalty=0.01)
    scaled = (inputs - inputs[:300].mean(0)) / inputs[:300].std(0, correction=0).clamp(min=1e-9)
    other = LogisticRegression(C=1 / (300 * 0.01), max_iter=1000, tol=1e-8)
    predicted = other.fit(scaled[:300].numpy(), targets[:300].numpy()).predict(
        scaled[300:].numpy()
    )
    same = right == (torch.from_numpy(predicted) == targets[300:])
    assert 0.7 < right.double().mean() < 0.9 and same.double().mean() > 0.99


def test_judging_looks_at_training_images_for_the_nearest_and_at_few_labels_last():
    digits = handwritten_digits()
    small = Digits(digits.train[:300], digits.train_targets[:300], *digits[2:])
    worth = judge(lambda images: images.flatten(1), small)
    pixels, unseen = small.train.flatten(1), small.test.flatten(1)
    assert torch.equal(
        worth.retrieved, retrieved(unseen, small.test_targets, pixels, small.train_targets)
    )
    assert worth.few_labels.mean() < worth.probed.mean() - 0.05
    same, other = (judge(lambda images: images.flatten(1), small, seed=s) for s in (0, 1))
    assert torch.equal(same.few_labels, worth.few_labels)
    assert not torch.equal(other.few_labels, worth.few_labels)
    with pytest.raises(ValueError, match="labels must be at most"):
        judge(lambda images: images.flatten(1), small, labels=200)


# ---- rank and interval


def test_effective_rank_counts_equal_directions():
    for dim in (1, 2, 5):
        cross = torch.cat([torch.eye(dim), -torch.eye(dim)])
        padded = torch.cat([cross, torch.zeros(2 * dim, 3)], dim=1) + 7  # a mean does not matter
        assert_close(effective_rank(padded), torch.tensor(float(dim)))
    assert effective_rank(torch.ones(4, 3)) == 0


def test_effective_rank_of_two_unequal_directions_is_the_exponential_of_an_entropy():
    vectors = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert_close(effective_rank(vectors).item(), math.exp(entropy), rtol=1e-5, atol=0)


def test_an_interval_covers_the_truth_nineteen_times_in_twenty():
    draws = torch.rand(1000, 200, generator=cpu_generator(0)) < 0.3
    found = [estimate(row.double()) for row in draws]
    covered = sum(abs(mean - 0.3) < within for mean, within in found)
    assert 925 < covered < 975


def test_an_interval_needs_two_values():
    with pytest.raises(ValueError, match="values must hold at least two; got 1"):
        estimate(torch.ones(1))
