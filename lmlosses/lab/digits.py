"""Real images: scikit-learn's digits, two views of each, and what an embedding is worth.

Contrastive learning sees two distorted views of an image and no label. What it has learned is
judged afterwards, by the images that lie nearest to each other and by a linear classifier, on
images of a part of the file that was set aside before anything was trained.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from lmlosses._checks import (
    check_floating,
    check_ndim,
    check_non_negative,
    check_not_empty_axis,
    check_positive,
    check_shape,
    check_whole,
)
from lmlosses.device import cpu_generator
from lmlosses.lab.training import train
from lmlosses.losses.classification import cross_entropy
from lmlosses.schedules import warmup_cosine

TRAIN_IMAGES = 1200
"""The first images of the file are learned from; the other 597 are never trained on."""


class Digits(NamedTuple):
    """Images to learn from, and images that were held out."""

    train: Float[Tensor, "train 8 8"]
    train_targets: Int[Tensor, " train"]
    test: Float[Tensor, "test 8 8"]
    test_targets: Int[Tensor, " test"]


class Worth(NamedTuple):
    """What vectors are worth, one value for each test image.

    Attributes:
        retrieved: 1 where the nearest training image is of its class.
        probed: 1 where a linear classifier is right that learned from all training labels.
        few_labels: 1 where one is right that learned from a few labels of each class.
    """

    retrieved: Float[Tensor, " test"]
    probed: Float[Tensor, " test"]
    few_labels: Float[Tensor, " test"]


class Interval(NamedTuple):
    """A mean, and the half-width of its 95 % interval."""

    mean: float
    within: float


def handwritten_digits() -> Digits:
    """The 1797 digits that come with scikit-learn, 8 by 8 pixels, ink as 1 and paper as 0.

    The file is kept in its order and cut once: 1200 images to learn from, 597 to test on.

    Returns:
        Both parts in float32, on the CPU.

    Raises:
        ImportError: Without scikit-learn, which the images come with.

    Example:
        >>> from lmlosses.lab.digits import handwritten_digits
        >>> images = handwritten_digits()
        >>> images.train.shape, images.test_targets[:5]
        (torch.Size([1200, 8, 8]), tensor([7, 7, 3, 5, 1]))

    References:
        Alpaydin and Kaynak (1998), Optical recognition of handwritten digits, UCI machine
        learning repository, doi:10.24432/C50P49, its test set.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it has no types

    file = load_digits()
    images = torch.from_numpy(file.images / 16).float()
    targets = torch.from_numpy(file.target).long()
    cut = TRAIN_IMAGES
    return Digits(images[:cut], targets[:cut], images[cut:], targets[cut:])


def random_views(
    images: Float[Tensor, "images height width"],
    *,
    generator: torch.Generator,
    shift: int = 1,
    noise: float = 0.1,
    erased: int = 3,
) -> Float[Tensor, "images height width"]:
    """One distorted view of each image: moved, a square of it erased, and noise on top.

    What comes in from beyond the edge is 0, and so is the square, which lies within the image.

    Args:
        images: Pixels.
        generator: Source of all that is random, on the CPU.
        shift: Pixels by which it moves at most, in each direction.
        noise: Standard deviation of what is added to each pixel.
        erased: Side of the square; 0 for none.

    Returns:
        As many images, in the same dtype and on the same device.

    Raises:
        TypeError: If ``images`` is not floating point or a setting not a number.
        ValueError: If there are not three axes, a setting is negative, or the square is larger
            than an image.

    Example:
        >>> import torch
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.digits import random_views
        >>> image = torch.eye(3).unsqueeze(0)
        >>> random_views(image, shift=1, noise=0.0, erased=0, generator=cpu_generator(2))
        tensor([[[0., 0., 0.],
                 [0., 1., 0.],
                 [0., 0., 1.]]])
    """
    check_floating(images=images)
    check_ndim("images", images, 3)
    check_whole(shift=shift, erased=erased)
    check_non_negative(shift=shift, noise=noise, erased=erased)
    count, height, width = images.shape
    if erased > min(height, width):
        raise ValueError(f"erased must be at most the side of an image; got {erased}")
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)

    def places(room: int) -> Tensor:
        """Where something begins, one place for each image, with so much room behind it."""
        return torch.randint(room + 1, (count, 1), generator=generator).to(images.device)

    every = torch.arange(count, device=images.device)[:, None, None]
    down, right = places(2 * shift) + rows, places(2 * shift) + columns
    padded = F.pad(images, (shift, shift, shift, shift))
    views = padded[every, down[:, :, None], right[:, None, :]]

    above, before = rows - places(height - erased), columns - places(width - erased)
    in_rows, in_columns = (above >= 0) & (above < erased), (before >= 0) & (before < erased)
    views = views.masked_fill(in_rows[:, :, None] & in_columns[:, None, :], 0.0)
    drawn = torch.randn(images.shape, generator=generator, dtype=torch.float32)
    return views + noise * drawn.to(views)


class Encoder(nn.Module):
    """From 8 by 8 pixels to a vector: two convolutions, a linear layer, and a head after it.

    As in SimCLR the loss sees what the head returns, the projection, and the embedding before it
    is what is kept. Parameters are float32 whatever torch's default is.

    Args:
        dim: Length of an embedding.
        projection: Length of what the head returns.
        generator: Source of the start, on the CPU. The same seed gives the same encoder.

    Raises:
        TypeError: If a setting is no number.
        ValueError: If a setting is not positive.

    Example:
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.digits import Encoder, handwritten_digits
        >>> encoder = Encoder(generator=cpu_generator(0))
        >>> images = handwritten_digits().train[:5]
        >>> encoder.embed(images).shape, encoder(images).shape
        (torch.Size([5, 128]), torch.Size([5, 64]))

    References:
        Chen et al. (2020), A simple framework for contrastive learning of visual representations,
        arXiv:2002.05709, section 4.2, on the head.
    """

    def __init__(
        self, dim: int = 128, projection: int = 64, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        check_whole(dim=dim, projection=projection)
        check_positive(dim=dim, projection=projection)

        def matrix(*shape: int) -> nn.Parameter:
            std = math.sqrt(1 / (3 * math.prod(shape[1:])))  # as torch's layers start
            values = torch.randn(*shape, generator=generator, dtype=torch.float32)
            return nn.Parameter(std * values)

        def bias(size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, dtype=torch.float32))

        self.fine, self.fine_bias = matrix(16, 1, 3, 3), bias(16)
        self.coarse, self.coarse_bias = matrix(32, 16, 3, 3), bias(32)
        self.flat, self.flat_bias = matrix(dim, 32 * 4 * 4), bias(dim)
        self.head, self.head_bias = matrix(projection, dim), bias(projection)

    def embed(self, images: Float[Tensor, "images 8 8"]) -> Float[Tensor, "images dim"]:
        """The embedding of each image, before the head.

        Args:
            images: Pixels, from 0 to 1.

        Returns:
            One vector each, in float32.

        Raises:
            TypeError: If ``images`` is not floating point.
            ValueError: If they are not 8 by 8.
        """
        check_floating(images=images)
        check_shape("images", images, (len(images), 8, 8), meaning="8 by 8 pixels each")
        x = F.conv2d(images.to(self.fine).unsqueeze(1), self.fine, self.fine_bias, padding=1)
        x = F.conv2d(x.relu(), self.coarse, self.coarse_bias, stride=2, padding=1)
        return F.linear(x.relu().flatten(1), self.flat, self.flat_bias)

    def forward(self, images: Float[Tensor, "images 8 8"]) -> Float[Tensor, "images projection"]:
        """The projection of each image, which the loss compares."""
        return F.linear(self.embed(images).relu(), self.head, self.head_bias)


def pretrain(
    encoder: Encoder,
    images: Float[Tensor, "images 8 8"],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    generator: torch.Generator,
    steps: int = 120,
    batch: int = 128,
    peak: float = 3e-3,
) -> Float[Tensor, " steps"]:
    """Train an encoder on two random views of each image; no label is looked at here.

    AdamW with torch's settings; the learning rate rises for a tenth of the steps and falls as
    a cosine. A batch holds no image twice.

    Args:
        encoder: Trained in place.
        images: Pixels, from 0 to 1.
        loss: Takes the projections of both views and the places of the images in ``images``, and
            returns one number.
        generator: Source of batches and views, on the CPU.
        steps: Number of steps.
        batch: Images a step.
        peak: The largest learning rate.

    Returns:
        The loss of each step, on the CPU.

    Raises:
        TypeError: If a tensor or a setting has the wrong type.
        ValueError: If the batch is larger than the set, or a setting is not positive.

    Example:
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.digits import Encoder, handwritten_digits, pretrain
        >>> from lmlosses.losses import nt_xent
        >>> generator = cpu_generator(0)
        >>> encoder, images = Encoder(generator=generator), handwritten_digits().train
        >>> losses = pretrain(
        ...     encoder, images, lambda first, second, _: nt_xent(first, second).mean(),
        ...     generator=generator, steps=20, batch=32)
        >>> bool(losses[-5:].mean() < losses[:5].mean())
        True
    """
    check_whole(steps=steps, batch=batch)
    check_positive(steps=steps, batch=batch, peak=peak)
    if batch > len(images):
        raise ValueError(f"batch must be at most the number of images, {len(images)}; got {batch}")

    def step_loss() -> Tensor:
        chosen = torch.randperm(len(images), generator=generator)[:batch].to(images.device)
        both = random_views(images[chosen].repeat(2, 1, 1), generator=generator)
        first, second = encoder(both).chunk(2)
        return loss(first, second, chosen)

    return train(
        step_loss,
        torch.optim.AdamW(encoder.parameters()),
        steps=steps,
        lr=warmup_cosine(peak=peak, warmup_steps=steps // 10, total_steps=steps),
    )


def pretrained(
    images: Float[Tensor, "images 8 8"],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    seed: int,
    steps: int = 120,
) -> Encoder:
    """A new encoder, trained with `pretrain`; the seed decides its start, batches and views.

    Args:
        images: Pixels, from 0 to 1.
        loss: As in `pretrain`.
        seed: Whole number.
        steps: Number of steps.

    Returns:
        The encoder, on the device of the images, its parameters frozen.

    Raises:
        TypeError: As `pretrain`.
        ValueError: As `pretrain`.

    Example:
        >>> from lmlosses.lab.digits import handwritten_digits, pretrained
        >>> from lmlosses.losses import alignment
        >>> images = handwritten_digits().train
        >>> encoder = pretrained(images, lambda a, b, _: alignment(a, b).mean(), seed=0, steps=2)
        >>> encoder(images).requires_grad
        False
    """
    generator = cpu_generator(seed)
    encoder = Encoder(generator=generator).to(images.device)
    pretrain(encoder, images, loss, generator=generator, steps=steps)
    return encoder.requires_grad_(False)


def retrieved(
    queries: Float[Tensor, "queries dim"],
    query_targets: Integer[Tensor, " queries"],
    gallery: Float[Tensor, "gallery dim"],
    gallery_targets: Integer[Tensor, " gallery"],
    *,
    count: int = 1,
) -> Float[Tensor, " queries"]:
    """Share of each query's nearest vectors, by cosine, that are of its class.

    Args:
        queries: Vectors to search with.
        query_targets: Their classes.
        gallery: Vectors to search among.
        gallery_targets: Their classes.
        count: How many of the nearest are looked at.

    Returns:
        One share each, in float64; the mean is the precision at ``count``.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes disagree or the gallery has fewer than ``count`` vectors.

    Example:
        >>> import torch
        >>> from lmlosses.lab.digits import retrieved
        >>> gallery, classes = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([3, 7])
        >>> retrieved(torch.tensor([[2.0, 1.0]]), torch.tensor([3]), gallery, classes)
        tensor([1.], dtype=torch.float64)
    """
    check_floating(queries=queries, gallery=gallery)
    check_ndim("gallery", gallery, 2)
    check_shape(
        "queries", queries, (len(queries), gallery.shape[1]), meaning="with the axis of gallery"
    )
    check_shape("query_targets", query_targets, (len(queries),), meaning="one class per query")
    check_shape("gallery_targets", gallery_targets, (len(gallery),), meaning="one class each")
    check_whole(count=count)
    check_positive(count=count)
    if count > len(gallery):
        raise ValueError(f"count must be at most the gallery's size, {len(gallery)}; got {count}")
    cosines = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).t()
    nearest = cosines.topk(count, dim=1).indices
    same: Tensor = gallery_targets[nearest] == query_targets.unsqueeze(1)
    return same.double().mean(dim=1)


def linear_probe(
    features: Float[Tensor, "samples dim"],
    targets: Integer[Tensor, " samples"],
    test: Float[Tensor, "test dim"],
    test_targets: Integer[Tensor, " test"],
    *,
    penalty: float = 1e-3,
) -> Bool[Tensor, " test"]:
    r"""Which test samples a linear classifier gets right that was trained on fixed features.

    .. math:: \min_{W, b} \frac{1}{N} \sum_n \ell(W x_n + b, y_n)
        + \frac{\lambda}{2} \lVert W \rVert^2

    Multinomial logistic regression, of features that have mean 0 and variance 1 on the samples
    it learns from, by L-BFGS.

    Args:
        features: What to classify by.
        targets: Classes, counted from 0.
        test: Features of the test samples.
        test_targets: Their classes.
        penalty: The number :math:`\lambda`.

    Returns:
        True for each test sample that is classified correctly.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes disagree or the penalty is not positive.

    Example:
        >>> import torch
        >>> from lmlosses.lab.digits import linear_probe
        >>> features, classes = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> linear_probe(features, classes, torch.tensor([[3.0], [0.1]]), torch.tensor([1, 0]))
        tensor([ True, False])
    """
    check_floating(features=features, test=test)
    check_ndim("features", features, 2)
    check_not_empty_axis("features", features, 0)
    check_shape("targets", targets, (len(features),), meaning="one class per sample")
    check_shape("test", test, (len(test), features.shape[1]), meaning="with the axis of features")
    check_shape("test_targets", test_targets, (len(test),), meaning="one class per sample")
    check_positive(penalty=penalty)
    center, spread = features.mean(dim=0), features.std(dim=0, correction=0)
    spread = spread.masked_fill(spread == 0, 1.0)  # pixels that are never inked
    samples, unseen = ((part - center) / spread for part in (features, test))
    classes = int(targets.max()) + 1
    weights = samples.new_zeros(classes, samples.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def scores(inputs: Tensor) -> Tensor:
        return inputs @ weights[:, 1:].t() + weights[:, 0]

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(scores(samples), targets).mean()
        value = value + penalty / 2 * weights[:, 1:].square().sum()
        value.backward()  # type: ignore[no-untyped-call]  # torch's own
        return value

    optimizer.step(objective)  # type: ignore[no-untyped-call]  # torch's own
    return scores(unseen).argmax(dim=1) == test_targets


def judge(
    features: Callable[[Tensor], Tensor], digits: Digits, *, seed: int = 0, labels: int = 5
) -> Worth:
    """What features of images are worth: by the nearest image, by linear classifiers.

    Args:
        features: Images to vectors.
        digits: Images to learn from and to test on.
        seed: Draws the labeled images of the third measure, the same for all features.
        labels: How many of each class it has.

    Returns:
        One value per test image and measure, in float64.

    Raises:
        TypeError: If a setting is no whole number.
        ValueError: If a class has fewer images than that.

    Example:
        >>> from lmlosses.lab.digits import handwritten_digits, judge
        >>> by_pixels = judge(lambda images: images.flatten(1), handwritten_digits())
        >>> by_pixels.retrieved.mean() > by_pixels.probed.mean() > by_pixels.few_labels.mean()
        tensor(True)
    """
    check_whole(labels=labels)
    check_positive(labels=labels)
    known, unseen = features(digits.train), features(digits.test)
    generator, few = cpu_generator(seed), []
    for digit in range(int(digits.train_targets.max()) + 1):
        places = (digits.train_targets == digit).nonzero().squeeze(1)
        if len(places) < labels:
            raise ValueError(f"labels must be at most {len(places)}; got {labels}")
        few.append(places[torch.randperm(len(places), generator=generator)[:labels]])
    chosen = torch.cat(few)
    targets, test_targets = digits.train_targets, digits.test_targets
    return Worth(
        retrieved(unseen, test_targets, known, targets),
        linear_probe(known, targets, unseen, test_targets).double(),
        linear_probe(known[chosen], targets[chosen], unseen, test_targets).double(),
    )


def effective_rank(vectors: Float[Tensor, "vectors dim"]) -> Float[Tensor, ""]:
    r"""How many directions the variance of vectors fills, counted softly.

    .. math:: \exp\left( -\sum_i v_i \log v_i \right) , \qquad
        v_i = \frac{s_i^2}{\sum_j s_j^2}

    with :math:`s_i` the singular values after the mean has been taken off. 1 on a line, the
    dimension where all directions have the same variance.

    Args:
        vectors: One a row.

    Returns:
        A number from 1 to the dimension; 0 if all vectors are equal.

    Raises:
        TypeError: If ``vectors`` is not floating point.
        ValueError: If there are not two axes, or no vector.

    Example:
        >>> import torch
        >>> from lmlosses.lab.digits import effective_rank
        >>> round(effective_rank(torch.cat([torch.eye(2), -torch.eye(2)])).item(), 3)
        2.0
    """
    check_floating(vectors=vectors)
    check_ndim("vectors", vectors, 2)
    check_not_empty_axis("vectors", vectors, 0)
    variances: Tensor = torch.linalg.svdvals(vectors - vectors.mean(dim=0)).square()
    total = variances.sum()
    if total == 0:
        return total
    shares = variances / total
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def estimate(values: Float[Tensor, "*batch"]) -> Interval:
    r"""The mean of independent values and the half-width of its 95 % interval.

    .. math:: \bar x \pm 1.96 \, \frac{s}{\sqrt{N}}

    The interval is the normal one: for some hundred values, such as one per test image. Give it
    the differences of two methods on the same images to compare them.

    Args:
        values: One per sample.

    Returns:
        Two plain numbers.

    Raises:
        TypeError: If ``values`` is not floating point.
        ValueError: If there are fewer than two.

    Example:
        >>> import torch
        >>> from lmlosses.lab.digits import estimate
        >>> estimate(torch.tensor([0.0, 1.0] * 50)).mean
        0.5
    """
    check_floating(values=values)
    if values.numel() < 2:
        raise ValueError(f"values must hold at least two; got {values.numel()}")
    numbers = values.double().flatten()
    half = 1.96 * numbers.std() / math.sqrt(len(numbers))
    return Interval(numbers.mean().item(), half.item())
