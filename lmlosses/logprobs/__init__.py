"""Token statistics: the one primitive under all language-model losses.

For each token the log-probability of its target, the log-normalizer, and on request the mean
log-probability over the vocabulary and the entropy. `token_stats` reads them off logits,
`linear_token_stats` computes them from hidden states and the output matrix without ever holding
the logits. A loss written on `TokenStats` is lean in memory by itself. `linear_divergence`
compares two models in the same way.
"""

from lmlosses.logprobs.divergences import Divergences, linear_divergence
from lmlosses.logprobs.pair_sigmoid import pair_log_sigmoid
from lmlosses.logprobs.pairs import PairStats, pair_stats
from lmlosses.logprobs.ranks import gather_rows
from lmlosses.logprobs.statistics import TokenStats
from lmlosses.logprobs.tokens import linear_token_stats, token_stats

__all__ = [
    "Divergences",
    "PairStats",
    "TokenStats",
    "gather_rows",
    "linear_divergence",
    "linear_token_stats",
    "pair_log_sigmoid",
    "pair_stats",
    "token_stats",
]
