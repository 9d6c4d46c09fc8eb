"""Second derivatives of a loss, as products with vectors; the matrix itself where it is small.

A loss is a function without arguments that evaluates a model at its parameters as they are. The
parameters are a list of tensors, ``list(model.parameters())``, and so is every vector: one tensor
for each parameter, of its shape. Of a matrix only its product is needed, a function from one such
list to another; `hessian_product` and `gauss_newton_product` make them,
`lmlosses.analysis.spectrum` and natural gradients take them.

All of it differentiates twice. Attention through ``scaled_dot_product_attention`` allows that in
its math backend only.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lmlosses._checks import check_floating, compute_dtype
from lmlosses.analysis._vectors import (
    check_differentiable,
    check_loss,
    check_one_device,
    check_variables,
    check_vectors,
    flatten,
    unflatten,
)

Loss = Callable[[], Tensor]
"""The loss at the parameters as they are when it is called: one number, differentiable."""

Product = Callable[[list[Tensor]], Sequence[Tensor]]
"""A symmetric matrix times a vector, both as lists of tensors shaped like the parameters."""


def _gradient(loss: Loss, params: list[Tensor]) -> list[Tensor]:
    """The gradient with its own graph; zero where the loss does not depend on a parameter."""
    with torch.enable_grad():
        value = check_differentiable("loss", check_loss(loss()))
        return list(torch.autograd.grad(value, params, create_graph=True, materialize_grads=True))


def _pull_back(
    functions: Sequence[Tensor],
    variables: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    keep: bool,
) -> list[Tensor]:
    """Transposed Jacobian times a vector; constant functions contribute nothing."""
    pairs = [(f, v) for f, v in zip(functions, vectors, strict=True) if f.requires_grad]
    if not pairs:
        return [torch.zeros_like(variable) for variable in variables]
    curved, chosen = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(curved, variables, chosen, retain_graph=keep, materialize_grads=True)
    )


def hvp(loss: Loss, params: Iterable[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    r"""Hessian of the loss times a vector, at the cost of about three gradients.

    .. math:: H v = \nabla_\theta \left( \nabla_\theta L^\top v \right)

    The Hessian is that of textbook equation (4.6.3); it is never formed. Where the loss does not
    depend on a parameter the product is zero, and NaN in the loss comes out as NaN.

    Args:
        loss: The loss at the current parameters. See `lmlosses.analysis.curvature`.
        params: The parameters :math:`\theta`; all others are constants.
        vectors: The vector :math:`v`, a tensor for each parameter.

    Returns:
        :math:`H v`, a tensor for each parameter, in its dtype, without a graph.

    Raises:
        TypeError: If a parameter, a vector or the loss is not floating point.
        ValueError: If the loss is no single number or has no graph; if ``params`` is empty,
            repeats a tensor or holds one that requires no gradient; if ``vectors`` does not fit.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.curvature import hvp
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hvp(lambda: w[0] ** 2 * w[1], [w], [torch.tensor([1.0, 0.0])])
        [tensor([4., 2.])]

    References:
        Pearlmutter (1994), Fast Exact Multiplication by the Hessian, section 2.
    """
    variables = check_variables(params)
    vectors = check_vectors("vectors", vectors, variables)
    return _pull_back(_gradient(loss, variables), variables, vectors, keep=False)


def hessian_product(loss: Loss, params: Iterable[Tensor]) -> Product:
    r"""The Hessian at the current parameters as a function of the vector it multiplies.

    The same as `hvp`, which it saves the first gradient from the second product on: the loss is
    called once, here, and its graph is held until the function is dropped. All products thus see
    one batch and one dropout mask. After a step of the parameters make a new one.

    Args:
        loss: The loss at the current parameters. See `lmlosses.analysis.curvature`.
        params: The parameters :math:`\theta`; all others are constants.

    Returns:
        A function from vectors to vectors, each a tensor for each parameter.

    Raises:
        TypeError: If a parameter or the loss is not floating point.
        ValueError: If the loss is no single number or has no graph; if ``params`` is empty,
            repeats a tensor or holds one that requires no gradient.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.curvature import hessian_product
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> product = hessian_product(lambda: w[0] ** 2 * w[1], [w])
        >>> product([torch.tensor([0.0, 1.0])])
        [tensor([2., 0.])]
    """
    variables = check_variables(params)
    gradient = _gradient(loss, variables)

    def product(vectors: list[Tensor]) -> list[Tensor]:
        fitting = check_vectors("vectors", vectors, variables)
        return _pull_back(gradient, variables, fitting, keep=True)

    return product


def gauss_newton_vp(
    outputs: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    params: Iterable[Tensor],
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    r"""Generalized Gauss-Newton matrix times a vector.

    .. math:: G v = J^\top H_L J v , \qquad J = \frac{\partial z}{\partial \theta} ,
        \quad H_L = \nabla_z^2 L(z)

    It is the Hessian of the loss with the model replaced by its tangent, and the Hessian itself
    where the outputs :math:`z` are linear in the parameters. That gives textbook equations
    (4.6.4) and, with the Kronecker product that it leaves out, (4.6.5). It is positive
    semi-definite whenever the loss is convex in the outputs. With mean cross-entropy of logits
    it is the Fisher information.

    Args:
        outputs: The model's outputs :math:`z` at the current parameters, a tensor of any shape.
        loss: The outputs to one number :math:`L`.
        params: The parameters :math:`\theta`; all others are constants.
        vectors: The vector :math:`v`, a tensor for each parameter.

    Returns:
        :math:`G v`, a tensor for each parameter, in its dtype, without a graph.

    Raises:
        TypeError: If a parameter, a vector, the outputs or the loss is not floating point.
        ValueError: If the loss is no single number; if the loss or the outputs have no graph; if
            ``params`` is empty, repeats a tensor or holds one that requires no gradient; if
            ``vectors`` does not fit.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.curvature import gauss_newton_vp
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> half_square = lambda z: 0.5 * z.square().sum()
        >>> gauss_newton_vp(lambda: w**2, half_square, [w], [torch.ones(1)])  # (2 w)^2
        [tensor([36.])]

    References:
        Schraudolph (2002), Fast Curvature Matrix-Vector Products for Second-Order Gradient
        Descent, Neural Computation 14; Martens (2020), New Insights and Perspectives on the
        Natural Gradient Method, arXiv:1412.1193, sections 8 and 9.
    """
    return list(gauss_newton_product(outputs, loss, params)(list(vectors)))


def gauss_newton_product(
    outputs: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], params: Iterable[Tensor]
) -> Product:
    """The Gauss-Newton matrix at the current parameters, as a function of the vector.

    The same as `gauss_newton_vp`; the model and the loss are called once, here, and their graphs
    are held until the function is dropped. It is what `lmlosses.optim.NaturalGradient` asks for.

    Args:
        outputs: The model's outputs at the current parameters, a tensor of any shape.
        loss: The outputs to one number.
        params: The parameters; all others are constants.

    Returns:
        A function from vectors to vectors, each a tensor for each parameter.

    Raises:
        TypeError: If a parameter, the outputs or the loss is not floating point.
        ValueError: If the loss is no single number; if the loss or the outputs have no graph; if
            ``params`` is empty, repeats a tensor or holds one that requires no gradient.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.curvature import gauss_newton_product
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> product = gauss_newton_product(lambda: w**2, lambda z: z.square().sum(), [w])
        >>> product([torch.ones(1)])
        [tensor([72.])]
    """
    variables = check_variables(params)
    with torch.enable_grad():
        predicted = outputs()
        check_floating(outputs=predicted)
        check_differentiable("outputs", predicted)
        # J^T u is linear in u, so that its derivative by u, against v, is J v
        probe = torch.zeros_like(predicted, requires_grad=True)
        pulled = torch.autograd.grad(
            predicted, variables, probe, create_graph=True, materialize_grads=True
        )
        leaf = predicted.detach().requires_grad_()
        value = check_differentiable("loss", check_loss(loss(leaf)))
        slope = torch.autograd.grad(value, leaf, create_graph=True, materialize_grads=True)

    def product(vectors: list[Tensor]) -> list[Tensor]:
        fitting = check_vectors("vectors", vectors, variables)
        pushed = _pull_back(pulled, [probe], fitting, keep=True)
        bent = _pull_back(slope, [leaf], pushed, keep=True)
        return _pull_back([predicted], variables, bent, keep=True)

    return product


def hessian(loss: Loss, params: Iterable[Tensor]) -> Float[Tensor, "dim dim"]:
    r"""The whole Hessian of a small problem, row by row.

    .. math:: H_{ij} = \frac{\partial^2 L}{\partial \theta_i \, \partial \theta_j}

    Textbook equation (4.6.3), with all parameters flattened into one vector in their order. The
    memory is the square of their number.

    Args:
        loss: The loss at the current parameters. See `lmlosses.analysis.curvature`.
        params: The parameters :math:`\theta`; all others are constants.

    Returns:
        A matrix, symmetric up to rounding, in at least float32.

    Raises:
        TypeError: If a parameter or the loss is not floating point.
        ValueError: If the loss is no single number or has no graph; if ``params`` is empty,
            repeats a tensor, holds one that requires no gradient, or lies on several devices.

    Example:
        >>> import torch
        >>> from lmlosses.analysis.curvature import hessian
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian(lambda: w[0] ** 2 * w[1], [w])
        tensor([[4., 2.],
                [2., 0.]])
    """
    variables = check_variables(params)
    check_one_device(variables)
    product = hessian_product(loss, variables)
    dtype = compute_dtype(*variables)
    dim = sum(param.numel() for param in variables)
    unit = torch.zeros(dim, dtype=dtype, device=variables[0].device)
    rows = []
    for index in range(dim):
        unit[index] = 1
        rows.append(flatten(product(unflatten(unit, variables)), dtype))
        unit[index] = 0
    return torch.stack(rows)
