"""Natural gradient: steps whose length is measured in the model's predictions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmlosses._checks import check_non_negative, check_same_shape, check_whole
from lmlosses.optim._base import UpdateRule, state_dtype

FisherProduct = Callable[[list[Tensor]], Sequence[Tensor]]
"""The Fisher matrix times a vector, both as lists of tensors shaped like the parameters."""


class NaturalGradient(UpdateRule):
    r"""Gradient descent in the metric of the Fisher information.

    .. math:: (F + \lambda \mathbb{1}) \, d = g , \qquad \theta' = \theta - \eta \, d

    The Fisher matrix :math:`F` is never formed. Conjugate gradients need only its products with
    vectors, and a function that computes them is handed to each step, since they change with
    the parameters. Without damping, and solved to the end, the step does not depend, to first
    order, on how the parameters are chosen. Nothing is remembered from step to step.

    All parameters are solved for at once. One without a gradient is held fixed: it does not
    move, and the others step as if it were a constant.

    Args:
        params: Parameters, or groups of parameters with a ``lr``, ``damping`` and ``maximize`` of
            their own; the other settings must be the same in all groups.
        lr: Rate :math:`\eta`; with one and the exact Fisher matrix of a quadratic loss, a step
            goes to the minimum.
        damping: The number :math:`\lambda` added to the diagonal. A softmax over all classes has
            directions that change no prediction; there the Fisher matrix is zero and damping
            keeps the step short.
        iterations: Products with the Fisher matrix in a step, at most. As many as there are
            parameters solve the equation, up to rounding.
        tolerance: The solution is kept as it is once its residual is no longer than this share
            of the gradient. On a processor the remaining products are not computed.
        maximize: Ascend instead of descending.

    Raises:
        ValueError: If a setting is outside its range or differs between groups.

    Example:
        >>> import torch
        >>> from lmlosses.optim.natural import NaturalGradient
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([4.0, 1.0])
        >>> stretched = torch.tensor([4.0, 1.0])
        >>> optimizer = NaturalGradient([w], lr=0.5, damping=0.0)
        >>> _ = optimizer.step(fisher_product=lambda vectors: [stretched * v for v in vectors])
        >>> w.data
        tensor([-0.5000, -0.5000])

    References:
        Amari (1998), Natural Gradient Works Efficiently in Learning, theorem 1; Martens (2020),
        arXiv:1412.1193, for damping and conjugate gradients. Textbook equation (4.3.27).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        damping: float = 1e-3,
        iterations: int = 20,
        tolerance: float = 1e-6,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "damping": damping, "iterations": iterations, "tolerance": tolerance,
             "maximize": maximize},
        )  # fmt: skip

    def check_settings(self, group: dict[str, Any]) -> None:
        """``damping`` and ``tolerance`` not negative, at least one of ``iterations``."""
        check_non_negative(damping=group["damping"], tolerance=group["tolerance"])
        check_whole(iterations=group["iterations"])
        if group["iterations"] < 1:
            raise ValueError(f"iterations must be at least 1; got {group['iterations']}")
        for name in ("iterations", "tolerance"):
            if self.param_groups and group[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"{name} must be the same in all groups, whose parameters are solved for "
                    f"together: {self.param_groups[0][name]}; got {group[name]}"
                )

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move by a direction that is solved for already."""
        param.copy_(param - group["lr"] * grad)

    # not torch's signature: the curvature of this step has to come with it
    @torch.no_grad()
    def step(  # type: ignore[override]  # a product is needed as well
        self, closure: Callable[[], Any] | None = None, *, fisher_product: FisherProduct
    ) -> Any:
        """Solve for the direction and take one step.

        Args:
            closure: Re-evaluates the model and returns the loss; optional.
            fisher_product: Multiplies a vector by the Fisher matrix at the parameters as they are
                when it is called, which is after the closure. It takes and returns one tensor
                for each parameter of the optimizer, in the order of the groups, of that
                parameter's shape.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: If ``fisher_product`` is missing or a gradient is sparse or complex.
            ValueError: If ``fisher_product`` returns other shapes.
        """
        if not callable(fisher_product):
            raise TypeError(f"fisher_product must be a function; got {fisher_product!r}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moves = [(group, *ready) for group in self.param_groups for ready in self._ready(group)]
        if not moves:
            return loss

        moving = [param for _, param, _, _ in moves]
        fisher = self._product_with(fisher_product, moving)
        signed = [-grad if group["maximize"] else grad for group, _, grad, _ in moves]
        dampings = [torch.full_like(param, group["damping"]) for group, param, _, _ in moves]
        damping = _flat(dampings, moving)
        solution = conjugate_gradients(
            lambda vector: fisher(vector) + damping * vector,
            _flat(signed, moving),
            iterations=self.param_groups[0]["iterations"],
            tolerance=self.param_groups[0]["tolerance"],
        )
        for (group, param, _, state), step in zip(moves, _like(moving, solution), strict=True):
            self.update(param, step, state, group)
        return loss

    def _product_with(
        self, fisher_product: FisherProduct, moving: list[Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """The product on the flat vector of the parameters that move; the others stay at zero."""
        params = [param for group in self.param_groups for param in group["params"]]

        def product(vector: Tensor) -> Tensor:
            given = dict(zip(map(id, moving), _like(moving, vector), strict=True))
            vectors = [
                given[id(param)].to(param.dtype) if id(param) in given else torch.zeros_like(param)
                for param in params
            ]
            with torch.enable_grad():
                products = list(fisher_product(vectors))
            if len(products) != len(params):
                raise ValueError(
                    f"fisher_product must return {len(params)} tensors, one for each parameter; "
                    f"got {len(products)}"
                )
            for index, (found, param) in enumerate(zip(products, params, strict=True)):
                name = f"tensor {index} of fisher_product"
                check_same_shape(name, found, of="its parameter", reference=param)
            pairs = zip(products, params, strict=True)
            return _flat([found.detach() for found, param in pairs if id(param) in given], moving)

        return product


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, *, iterations: int, tolerance: float
) -> Tensor:
    r"""Solve :math:`A x = b` for a symmetric positive definite matrix known by its products.

    After convergence, or along a direction in which the matrix is not positive, :math:`x` stays
    as it is. Whether that has happened is only looked at where looking waits for no device.

    Args:
        product: Vector to matrix times vector.
        right: The vector :math:`b`.
        iterations: Products at most; the length of the vector suffices but for rounding.
        tolerance: Residual at which to stop, as a share of the length of :math:`b`.

    Returns:
        The solution, zero where :math:`b` is.

    Example:
        >>> import torch
        >>> from lmlosses.optim.natural import conjugate_gradients
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradients(
        ...     lambda v: matrix @ v, torch.tensor([3.0, 4.0]), iterations=2, tolerance=0.0
        ... )
        tensor([1.0000, 1.0000])

    References:
        Hestenes and Stiefel (1952), Methods of Conjugate Gradients for Solving Linear Systems.
    """
    solution, residual, direction = torch.zeros_like(right), right, right
    square = residual.dot(residual)
    enough = tolerance**2 * square
    active = square > enough
    for _ in range(iterations):
        if active.is_cpu and not active:
            break
        image = product(direction)
        curvature = direction.dot(image)
        active = active & (curvature > 0)
        length = torch.where(active, square / curvature, 0)
        solution = solution + length * direction
        residual = residual - length * image
        before, square = square, residual.dot(residual)
        active = active & (square > enough)
        direction = residual + torch.where(active, square / before, 0) * direction
    return solution


def _flat(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """All entries in one vector, in the widest dtype in which parameters are computed."""
    dtypes = [state_dtype(param) for param in params]
    dtype = functools.reduce(torch.promote_types, dtypes)
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])


def _like(params: Sequence[Tensor], vector: Tensor) -> list[Tensor]:
    """The entries of a vector in the shapes of the parameters."""
    parts = torch.split(vector, [param.numel() for param in params])
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]
