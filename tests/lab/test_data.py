"""Tests of lmlosses.lab.data."""

import pytest
import scipy.stats
import torch

from lmlosses import cpu_generator
from lmlosses.lab.data import (
    gaussian_blobs,
    gaussian_noise,
    imbalanced_blobs,
    laplace_noise,
    noisy_line,
)

CENTERS = torch.tensor([[-3.0, 0.0], [0.0, 2.0], [4.0, 4.0]])

# ---- clouds of points


def test_classes_take_turns():
    blobs = gaussian_blobs(7, centers=CENTERS, scale=1.0, generator=cpu_generator(0))
    assert blobs.targets.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert blobs.inputs.shape == (7, 2) and blobs.inputs.dtype == torch.float32


def test_without_scale_every_point_is_its_center():
    inputs, targets = gaussian_blobs(6, centers=CENTERS, scale=0.0, generator=cpu_generator(0))
    torch.testing.assert_close(inputs, CENTERS[targets])


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: gaussian_blobs(3000, centers=CENTERS, scale=0.5, generator=generator),
        lambda generator: imbalanced_blobs(
            [1000, 1000, 1000], centers=CENTERS, scale=0.5, generator=generator
        ),
    ],
)
def test_each_cloud_is_round_and_normal_about_its_center(draw):
    inputs, targets = draw(cpu_generator(0))
    for label, center in enumerate(CENTERS):
        cloud = (inputs[targets == label] - center) / 0.5
        for coordinate in cloud.T:
            assert scipy.stats.kstest(coordinate.numpy(), "norm").pvalue > 0.01
        assert abs(torch.corrcoef(cloud.T)[0, 1].item()) < 0.1


def test_imbalanced_clouds_have_the_counts_asked_for():
    inputs, targets = imbalanced_blobs(
        [5, 0, 2], centers=CENTERS, scale=0.1, generator=cpu_generator(0)
    )
    assert targets.tolist() == [0, 0, 0, 0, 0, 2, 2]
    assert (inputs - CENTERS[targets]).abs().max() < 1


def test_the_same_seed_draws_the_same_points_and_another_does_not():
    def draw(seed):
        return gaussian_blobs(5, centers=CENTERS, scale=1.0, generator=cpu_generator(seed)).inputs

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_there_may_be_no_points():
    blobs = gaussian_blobs(0, centers=CENTERS, scale=1.0, generator=cpu_generator(0))
    assert blobs.inputs.shape == (0, 2) and blobs.targets.shape == (0,)


def test_the_best_classifier_is_the_linear_one_of_the_docstring():
    inputs, _ = gaussian_blobs(30, centers=CENTERS, scale=1.5, generator=cpu_generator(0))
    logits = inputs @ CENTERS.T / 1.5**2 - CENTERS.square().sum(-1) / (2 * 1.5**2)
    density = torch.distributions.Normal(CENTERS, 1.5).log_prob(inputs.unsqueeze(1)).sum(-1)
    torch.testing.assert_close(logits.softmax(-1), density.softmax(-1))


@pytest.mark.bad_input
def test_clouds_refuse_what_does_not_fit():
    generator = cpu_generator(0)
    with pytest.raises(ValueError, match="centers must have 2 axes"):
        gaussian_blobs(3, centers=CENTERS[0], scale=1.0, generator=generator)
    with pytest.raises(ValueError, match="centers must have at least one entry along axis 0"):
        gaussian_blobs(3, centers=CENTERS[:0], scale=1.0, generator=generator)
    with pytest.raises(TypeError, match="centers must be a floating-point tensor"):
        imbalanced_blobs([1, 1, 1], centers=CENTERS.long(), scale=1.0, generator=generator)


def test_clouds_refuse_bad_numbers():
    generator = cpu_generator(0)
    with pytest.raises(ValueError, match="count must not be negative; got -1"):
        gaussian_blobs(-1, centers=CENTERS, scale=1.0, generator=generator)
    with pytest.raises(ValueError, match="scale must not be negative; got -1.0"):
        gaussian_blobs(3, centers=CENTERS, scale=-1.0, generator=generator)
    with pytest.raises(ValueError, match="counts must not be negative; got -2"):
        imbalanced_blobs([1, -2, 1], centers=CENTERS, scale=1.0, generator=generator)
    with pytest.raises(ValueError, match="counts must have 3 entries, one per center; got 2"):
        imbalanced_blobs([1, 2], centers=CENTERS, scale=1.0, generator=generator)


# ---- noise and lines


@pytest.mark.parametrize(
    ("noise", "distribution"), [(gaussian_noise, "norm"), (laplace_noise, "laplace")]
)
def test_noise_follows_its_distribution(noise, distribution):
    drawn = noise(4000, scale=2.0, generator=cpu_generator(0)).numpy()
    assert scipy.stats.kstest(drawn / 2.0, distribution).pvalue > 0.01
    assert scipy.stats.kstest(drawn, distribution).pvalue < 1e-6  # the scale is seen
    other = {"norm": "laplace", "laplace": "norm"}[distribution]
    assert scipy.stats.kstest(drawn / drawn.std(), other).pvalue < 0.01


@pytest.mark.parametrize("noise", [gaussian_noise, laplace_noise])
def test_noise_is_reproducible_and_may_be_empty_or_absent(noise):
    def draw(seed):
        return noise(5, scale=1.0, generator=cpu_generator(seed))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert noise(0, scale=1.0, generator=cpu_generator(0)).shape == (0,)
    assert (noise(5, scale=0.0, generator=cpu_generator(0)) == 0).all()


@pytest.mark.parametrize("noise", [gaussian_noise, laplace_noise])
def test_noise_refuses_bad_numbers(noise):
    with pytest.raises(ValueError, match="count must not be negative; got -1"):
        noise(-1, scale=1.0, generator=cpu_generator(0))
    with pytest.raises(ValueError, match="scale must not be negative; got -1.0"):
        noise(1, scale=-1.0, generator=cpu_generator(0))


def test_a_line_is_slope_times_place_plus_intercept_plus_noise():
    line = noisy_line(3, slope=2.0, intercept=1.0, noise=torch.tensor([0.0, 0.5, -0.25]))
    torch.testing.assert_close(line.inputs, torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(line.targets, torch.tensor([-1.0, 1.5, 2.75]))


def test_a_line_follows_the_dtype_and_device_of_its_noise():
    double = noisy_line(2, slope=1.0, intercept=0.0, noise=torch.zeros(2, dtype=torch.float64))
    assert double.inputs.dtype == double.targets.dtype == torch.float64
    meta = noisy_line(2, slope=1.0, intercept=0.0, noise=torch.zeros(2, device="meta"))
    assert meta.targets.device.type == "meta"


@pytest.mark.bad_input
def test_a_line_refuses_noise_that_does_not_fit():
    with pytest.raises(ValueError, match=r"noise must have shape \(3,\), one entry per sample"):
        noisy_line(3, slope=1.0, intercept=0.0, noise=torch.zeros(2))
    with pytest.raises(TypeError, match="noise must be a floating-point tensor"):
        noisy_line(3, slope=1.0, intercept=0.0, noise=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="count must not be negative; got -1"):
        noisy_line(-1, slope=1.0, intercept=0.0, noise=torch.zeros(0))
