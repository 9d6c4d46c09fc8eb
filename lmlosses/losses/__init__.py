"""Losses as functions: one value per sample, pair or list, never reduced."""

from lmlosses.losses.classification import (
    binary_cross_entropy,
    binary_focal,
    brier,
    cross_entropy,
    focal,
    hinge,
    multiclass_hinge,
    zero_one,
)
from lmlosses.losses.divergence import entropy, js_divergence, kl_divergence
from lmlosses.losses.language import linear_cross_entropy, token_cross_entropy
from lmlosses.losses.ranking import listnet, margin_ranking, pairwise_auc
from lmlosses.losses.regression import (
    absolute_error,
    gaussian_nll,
    half_squared_error,
    huber,
    laplace_nll,
    log_cosh,
    quantile_loss,
    squared_error,
)

__all__ = [
    "absolute_error",
    "binary_cross_entropy",
    "binary_focal",
    "brier",
    "cross_entropy",
    "entropy",
    "focal",
    "gaussian_nll",
    "half_squared_error",
    "hinge",
    "huber",
    "js_divergence",
    "kl_divergence",
    "laplace_nll",
    "linear_cross_entropy",
    "listnet",
    "log_cosh",
    "margin_ranking",
    "multiclass_hinge",
    "pairwise_auc",
    "quantile_loss",
    "squared_error",
    "token_cross_entropy",
    "zero_one",
]
