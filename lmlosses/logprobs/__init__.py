"""Token statistics: the one primitive under all language-model losses.

For each token the log-probability of its target, the log-normalizer, and on request the mean
log-probability over the vocabulary and the entropy. `token_stats` reads them off logits,
`linear_token_stats` computes them from hidden states and the output matrix without ever holding
the logits. A loss written on `TokenStats` is lean in memory by itself. `linear_divergence`
compares two models in the same way.
"""

from lmlosses.logprobs.divergences import Divergences, linear_divergence
from lmlosses.logprobs.statistics import TokenStats
from lmlosses.logprobs.tokens import linear_token_stats, token_stats

__all__ = [
    "Divergences",
    "TokenStats",
    "linear_divergence",
    "linear_token_stats",
    "token_stats",
]
