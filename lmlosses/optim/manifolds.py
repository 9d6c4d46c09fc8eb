"""Curved sets to descend along: unit vectors, probability vectors, and plain space among them."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Manifold(ABC):
    """A set on which an optimizer walks: how to stay on it, and how to measure there.

    The last axis of a parameter holds one point, other axes hold more points. Tangent vectors
    have the shape of the parameter.
    """

    @abstractmethod
    def project(self, point: Tensor) -> Tensor:
        """A point of the manifold for any tensor of a parameter's shape, to start from."""

    @abstractmethod
    def distance(self, point: Tensor) -> Tensor:
        """How far each point is off the manifold, zero or more; one number along the last axis."""

    @abstractmethod
    def gradient(self, point: Tensor, grad: Tensor) -> Tensor:
        """The tangent vector of steepest ascent, from the gradient in the coordinates."""

    @abstractmethod
    def inner(self, point: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The metric's product of two tangent vectors, its last axis kept with length one."""

    @abstractmethod
    def walk(self, point: Tensor, tangent: Tensor) -> Tensor:
        """Where a tangent vector leads, on the manifold to rounding."""

    @abstractmethod
    def transport(self, point: Tensor, tangent: Tensor, vector: Tensor) -> Tensor:
        """A tangent vector at ``point`` carried along to ``walk(point, tangent)``."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Euclidean(Manifold):
    """Plain space, in which each entry is a point of its own line.

    `RiemannianSGD` and `RiemannianAdam` then do what `SGD` and `Adam` do.
    """

    def project(self, point: Tensor) -> Tensor:
        """The point."""
        return point

    def distance(self, point: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(point)

    def gradient(self, point: Tensor, grad: Tensor) -> Tensor:
        """The gradient."""
        return grad

    def inner(self, point: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The product of two numbers, for every entry."""
        return left * right

    def walk(self, point: Tensor, tangent: Tensor) -> Tensor:
        """The sum."""
        return point + tangent

    def transport(self, point: Tensor, tangent: Tensor, vector: Tensor) -> Tensor:
        """The vector."""
        return vector


class Sphere(Manifold):
    r"""Vectors of length one along the last axis.

    Tangent to the sphere is what is orthogonal to the point. A step walks the great circle,
    :math:`x' = \cos(\lVert v \rVert) x + \sin(\lVert v \rVert) v / \lVert v \rVert`, and vectors
    are carried along it in parallel, so that they keep their lengths and angles.

    Example:
        >>> import math, torch
        >>> from lmlosses.optim.manifolds import Sphere
        >>> east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> Sphere().walk(east, math.pi / 6 * north)  # thirty degrees to the north
        tensor([0.8660, 0.5000])

    References:
        Absil, Mahony and Sepulchre (2008), Optimization Algorithms on Matrix Manifolds, sections
        3.6, 5.4 and 8.1.
    """

    def project(self, point: Tensor) -> Tensor:
        """The nearest unit vector; NaN for zero, which has none."""
        length: Tensor = torch.linalg.vector_norm(point, dim=-1, keepdim=True)
        return point / length

    def distance(self, point: Tensor) -> Tensor:
        """Difference of the length from one."""
        length: Tensor = torch.linalg.vector_norm(point, dim=-1)
        return (length - 1).abs()

    def gradient(self, point: Tensor, grad: Tensor) -> Tensor:
        """What is left without the part along the point."""
        return grad - (point * grad).sum(dim=-1, keepdim=True) * point

    def inner(self, point: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The ordinary scalar product."""
        return (left * right).sum(dim=-1, keepdim=True)

    def walk(self, point: Tensor, tangent: Tensor) -> Tensor:
        """Along the great circle, by the angle that is the length of the tangent."""
        angle = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
        # sinc(a / pi) = sin(a) / a, and 1 at a = 0; dividing stops rounding from adding up
        return self.project(angle.cos() * point + torch.sinc(angle / torch.pi) * tangent)

    def transport(self, point: Tensor, tangent: Tensor, vector: Tensor) -> Tensor:
        """In parallel: the part along the circle turns with it, the rest stays."""
        angle = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
        ahead = tangent / angle.clamp_min(torch.finfo(angle.dtype).tiny)
        along = (ahead * vector).sum(dim=-1, keepdim=True)
        # 1 - cos(a) = 2 sin(a / 2)^2 keeps its digits for small angles
        moved = vector - along * (2 * (angle / 2).sin() ** 2 * ahead + angle.sin() * point)
        return self.gradient(self.walk(point, tangent), moved)


class Simplex(Manifold):
    r"""Probabilities along the last axis, in the geometry of the Fisher metric.

    The metric is :math:`\langle u, v \rangle_p = \sum_i u_i v_i / p_i`; tangent vectors sum to
    zero. A step is taken in log-probabilities, :math:`p' \propto p \, e^{v / p}`, so that no
    probability becomes negative, and one of zero stays zero. A gradient step then is the
    exponentiated gradient, :math:`p' \propto p \, e^{-\eta g}`. Vectors are carried along as
    changes of the logits, which on this path are constant: momentum is momentum of logits. This
    keeps them tangent but, unlike parallel transport of the metric, not their lengths.

    Example:
        >>> import math, torch
        >>> from lmlosses.optim.manifolds import Simplex
        >>> even, gradient = torch.tensor([0.5, 0.5]), torch.tensor([0.0, math.log(3.0)])
        >>> Simplex().walk(even, -Simplex().gradient(even, gradient))  # triples the odds
        tensor([0.7500, 0.2500])

    References:
        Amari and Nagaoka (2000), Methods of Information Geometry, section 2.3, on paths that are
        straight in the logits.
    """

    def project(self, point: Tensor) -> Tensor:
        """Negative entries to zero, then divided by their sum; NaN if nothing is left."""
        positive = point.clamp_min(0.0)
        return positive / positive.sum(dim=-1, keepdim=True)

    def distance(self, point: Tensor) -> Tensor:
        """Difference of the sum from one, or the largest negative entry if that is more."""
        off = (point.sum(dim=-1) - 1).abs()
        return off.maximum(-point.amin(dim=-1))

    def gradient(self, point: Tensor, grad: Tensor) -> Tensor:
        """The gradient less its mean under the probabilities, times these."""
        # where nothing can move the gradient does not matter, even if it is infinite
        grad = grad.where(point > 0, 0.0)
        return point * (grad - (point * grad).sum(dim=-1, keepdim=True))

    def inner(self, point: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The Fisher metric."""
        return (_share(left, point) * right).sum(dim=-1, keepdim=True)

    def walk(self, point: Tensor, tangent: Tensor) -> Tensor:
        """A straight line in log-probabilities."""
        return (point.log() + _share(tangent, point)).softmax(dim=-1)

    def transport(self, point: Tensor, tangent: Tensor, vector: Tensor) -> Tensor:
        """The same change of the logits, at the new point."""
        return self.gradient(self.walk(point, tangent), _share(vector, point))


def _share(tangent: Tensor, point: Tensor) -> Tensor:
    """The tangent per probability; zero where there is none."""
    return torch.where(point > 0, tangent / point, 0.0)
