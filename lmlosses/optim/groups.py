"""Parameter groups: which parameters decay, which learn slowly, which are matrices."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lmlosses._checks import check_in_unit_interval, check_non_negative, check_positive

Group = dict[str, Any]
"""A parameter group of torch: ``params`` and the settings they have for themselves."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    exempt_embeddings: bool = False,
    groups: Iterable[Group] | None = None,
) -> list[Group]:
    r"""Weight decay for matrices, none for biases and norms.

    Exempt is what has fewer than two axes, and everything in a normalization layer: their size
    is not the size of a map, and shrinking them does not make the model simpler. Each trainable
    parameter is in one group, once, even if two modules share it.

    Args:
        model: The model whose parameters are to be trained.
        weight_decay: Decay of those that are not exempt, in the optimizer's own meaning.
        exempt_embeddings: Exempt the tables of embedding layers too, also where an output layer
            shares them.
        groups: Groups to be split further, such as those of `layerwise_groups`, each keeping
            its settings. None means all of the model's trainable parameters in one.

    Returns:
        Groups with ``weight_decay`` set, those that decay first; empty ones are left out.

    Raises:
        ValueError: If ``weight_decay`` is negative.

    Example:
        >>> from torch import nn
        >>> from lmlosses.optim.groups import decay_groups
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        >>> [(len(g["params"]), g["weight_decay"]) for g in decay_groups(model, 0.1)]
        [(1, 0.1), (3, 0.0)]
    """
    check_non_negative(weight_decay=weight_decay)
    if groups is None:
        groups = [{"params": _trainable(model)}]
    exempt = _owned_by(model, _NORMS) | (
        _owned_by(model, _EMBEDDINGS) if exempt_embeddings else set()
    )
    split: list[Group] = []
    for group in groups:
        kept = [param for param in group["params"] if param.ndim < 2 or id(param) in exempt]
        without = {id(param) for param in kept}
        decayed = [param for param in group["params"] if id(param) not in without]
        split.append({**group, "params": decayed, "weight_decay": weight_decay})
        split.append({**group, "params": kept, "weight_decay": 0.0})
    return [group for group in split if group["params"]]


def layerwise_groups(
    model: nn.Module,
    layers: Sequence[nn.Module | Sequence[nn.Module]],
    *,
    lr: float,
    decay: float,
) -> list[Group]:
    r"""Learning rates that fall from the output of a model to its input.

    .. math:: \eta_\ell = \eta \, \xi^{L - 1 - \ell} , \qquad \ell = 0, \dots, L - 1

    so the last layer learns at :math:`\eta` and each layer below it at :math:`\xi` times the
    rate of the one above. Used to fine-tune, where layers near the input have the least to
    unlearn.

    Args:
        model: The model whose parameters are to be trained.
        layers: Its layers from input to output, which together hold every trainable parameter.
            Modules that share a rate stand in a list of their own:
            ``[embedding, *blocks, [norm, head]]``.
        lr: Rate :math:`\eta` of the last layer.
        decay: The factor :math:`\xi`, in ``(0, 1]``.

    Returns:
        A group a layer, from input to output, with ``lr`` set. A parameter that two layers share
        is in the group of the first, and learns at the lower rate. Layers with nothing to train
        have no group but count.

    Raises:
        ValueError: If ``lr`` or ``decay`` is out of range, or a trainable parameter is in no
            layer.

    Example:
        >>> from torch import nn
        >>> from lmlosses.optim.groups import layerwise_groups
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> [g["lr"] for g in layerwise_groups(model, model, lr=0.4, decay=0.5)]
        [0.1, 0.2, 0.4]

    References:
        Howard and Ruder (2018), arXiv:1801.06146, section 3.2, with 1 / 2.6 for the factor;
        Clark et al. (2020), ELECTRA, arXiv:2003.10555, with 0.8, and with the head as the last
        layer (their code leaves one power of the factor out below it).
    """
    check_non_negative(lr=lr)
    check_positive(decay=decay)
    check_in_unit_interval(open_right=False, decay=decay)
    trainable = {id(param) for param in _trainable(model)}
    groups: list[Group] = []
    seen: set[int] = set()
    depth = len(list(layers)) - 1
    for index, layer in enumerate(layers):
        parts = [layer] if isinstance(layer, nn.Module) else layer
        held = {id(param): param for part in parts for param in part.parameters()}
        params = [held[key] for key in held if key in trainable - seen]
        seen |= set(held)
        groups.append({"params": params, "lr": lr * decay ** (depth - index)})
    left = [name for name, param in model.named_parameters() if id(param) in trainable - seen]
    if left:
        raise ValueError(f"layers must hold every trainable parameter; got none with {left}")
    return [group for group in groups if group["params"]]


def matrix_groups(
    model: nn.Module, *, outputs: Iterable[nn.Module], companion: Mapping[str, Any]
) -> list[Group]:
    r"""The matrices of hidden layers for `Muon`, everything else for its companion.

    Hidden are matrices that map features to features. Embedding tables and output layers are
    matrices too, but one side of theirs is a list of tokens or classes, whose rows get gradients
    of very different sizes; they go to the companion with vectors, norms and kernels of
    convolutions. Each trainable parameter is in one group, once: a table that the output layer
    shares is the companion's.

    Args:
        model: The model whose parameters are to be trained.
        outputs: Its output layers. Embedding layers are known by their type; a layer that
            predicts looks like any other, so it has to be named. Empty if there is none.
        companion: Settings of the companion's group, ``lr`` among them.

    Returns:
        One group of matrices, and one with ``companion=True``; empty ones are left out.

    Raises:
        ValueError: If ``companion`` has no ``lr``.

    Example:
        >>> from torch import nn
        >>> from lmlosses.optim.groups import matrix_groups
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        >>> for group in matrix_groups(model, outputs=[model[2]], companion={"lr": 3e-4}):
        ...     print([tuple(p.shape) for p in group["params"]], group.get("companion", False))
        [(4, 4)] False
        [(9, 4), (4,), (9, 4), (9,)] True

    References:
        Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks".
    """
    if "lr" not in companion:
        raise ValueError(f"companion must hold an lr; got {sorted(companion)}")
    outside = _owned_by(model, _NORMS + _EMBEDDINGS)
    outside |= {id(param) for output in outputs for param in output.parameters()}
    params = _trainable(model)
    matrices = [param for param in params if param.ndim == 2 and id(param) not in outside]
    inside = {id(param) for param in matrices}
    others = [param for param in params if id(param) not in inside]
    groups: list[Group] = [
        {"params": matrices},
        {**companion, "params": others, "companion": True},
    ]
    return [group for group in groups if group["params"]]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that need a gradient, each once."""
    return [param for param in model.parameters() if param.requires_grad]


def _owned_by(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    """Identities of the parameters that modules of some kinds hold themselves."""
    return {
        id(param)
        for module in model.modules()
        if isinstance(module, kinds)
        for param in module.parameters(recurse=False)
    }
