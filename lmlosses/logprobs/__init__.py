"""Token statistics: the one primitive under all language-model losses.

For each token the log-probability of its target, the log-normalizer, and on request the mean
log-probability over the vocabulary and the entropy. `token_stats` reads them off logits,
`linear_token_stats` computes them from hidden states and the output matrix without ever holding
the logits. A loss written on `TokenStats` is lean in memory by itself.
"""

from lmlosses.logprobs.statistics import TokenStats
from lmlosses.logprobs.tokens import linear_token_stats, token_stats

__all__ = ["TokenStats", "linear_token_stats", "token_stats"]
