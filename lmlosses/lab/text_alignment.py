"""Learning from feedback on text: a small language model, and a judge that is a rule.

The stages are those of `lmlosses.lab.alignment`; only now nobody can write down all answers, so
the best policy is not known, and what the reward model thinks can be wrong where it has not seen
anything. The rule is known, so one can watch.
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lmlosses._checks import (
    check_integer,
    check_min_ndim,
    check_not_empty_axis,
    check_positive,
    check_same_shape,
    check_whole,
)
from lmlosses.advantages import AdaptiveKLController, FixedKLController
from lmlosses.lab.ppo import Evaluated, ppo_update
from lmlosses.lab.transformer import TinyTransformer, generate
from lmlosses.logprobs import token_stats
from lmlosses.losses.next_token import next_tokens
from lmlosses.losses.preference import dpo_loss
from lmlosses.reductions import sequence_sums


def letter_reward(
    tokens: Int[Tensor, "*batch time"], *, letter: str = "e", price: float = 2.0
) -> Float[Tensor, "*batch"]:
    r"""How often a letter stands in a text, less a price for each time it is doubled.

    .. math:: r(y) = |\{t : y_t = e\}| - c \, |\{t : y_t = y_{t+1} = e\}|

    Args:
        tokens: Bytes of the answers, without their prompts.
        letter: The letter :math:`e`, a single byte.
        price: The number :math:`c`.

    Returns:
        One reward per answer, in torch's default dtype.

    Raises:
        TypeError: If ``tokens`` are not whole numbers.
        ValueError: If there is no time axis or ``letter`` is not one byte.

    Example:
        >>> from lmlosses.lab.text import encode
        >>> from lmlosses.lab.text_alignment import letter_reward
        >>> letter_reward(encode("eleven bees"))
        tensor(3.)
    """
    check_integer(tokens=tokens)
    check_min_ndim("tokens", tokens, 1)
    if len(letter.encode()) != 1:
        raise ValueError(f"letter must be a single byte; got {letter!r}")
    found = tokens == ord(letter)
    doubled = found[..., 1:] & found[..., :-1]
    return found.sum(dim=-1).to(torch.get_default_dtype()) - price * doubled.sum(dim=-1)


class RewardModel(nn.Module):
    """A language model's body with one number read off at each token; the reward is their sum.

    Args:
        model: Where the body starts from; it is copied. The numbers start at zero.
    """

    def __init__(self, model: TinyTransformer) -> None:
        super().__init__()
        self.body = copy.deepcopy(model)
        # no intercept: comparisons say nothing about a constant
        self.score = nn.Parameter(torch.zeros_like(model.head[0]))

    def forward(self, tokens: Int[Tensor, "*batch time"]) -> Float[Tensor, "*batch"]:
        """Reward of each sequence, a prompt with its answer."""
        scores: Tensor = self.body.hidden(tokens) @ self.score
        return scores.sum(dim=-1)


class Actor(nn.Module):
    """A policy and its value model, which reads the policy's hidden states.

    Args:
        model: Where the policy starts from; it is copied. Values start at zero.
    """

    def __init__(self, model: TinyTransformer) -> None:
        super().__init__()
        self.policy = copy.deepcopy(model)
        self.slope = nn.Parameter(torch.zeros_like(model.head[0]))
        self.level = nn.Parameter(torch.zeros_like(model.head[0, 0]))

    def forward(
        self, tokens: Int[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
    ) -> Evaluated:
        """Log-probability of each next token that counts, and the value before it is chosen.

        Args:
            tokens: Prompts with their answers.
            mask: True for the tokens of the answers.
        """
        hidden = self.policy.hidden(tokens)
        targets, counted = next_tokens(tokens, mask)
        logps = token_stats(hidden @ self.policy.head.T, targets, mask=counted).logps
        # the value learns from the states but does not change them
        return Evaluated(logps, hidden.detach() @ self.slope + self.level)


class JudgedPairs(NamedTuple):
    """Prompts with two answers each, the preferred one first."""

    chosen: Int[Tensor, "pairs time"]
    rejected: Int[Tensor, "pairs time"]


def judged_pairs(
    model: TinyTransformer,
    prompts: Int[Tensor, "pairs time"],
    *,
    steps: int,
    reward: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> JudgedPairs:
    r"""Two answers of the model to each prompt, judged with the noise of Bradley and Terry.

    Args:
        model: Gives the answers.
        prompts: Their prompts.
        steps: Number of tokens of an answer.
        reward: The judge's reward of the answers alone.
        generator: Source of the answers and of the noise, on the CPU.

    Returns:
        The pairs, prompts included.

    Raises:
        TypeError: If ``prompts`` are not whole numbers.
        ValueError: If ``steps`` is not positive.
    """
    check_whole(steps=steps)
    check_positive(steps=steps)
    first, second = (generate(model, prompts, steps=steps, generator=generator) for _ in range(2))
    lead = reward(first[:, -steps:]) - reward(second[:, -steps:])
    heads = torch.rand(len(prompts), generator=generator, dtype=lead.dtype).to(lead.device)
    first_wins = (heads < lead.sigmoid()).unsqueeze(-1)
    return JudgedPairs(
        torch.where(first_wins, first, second), torch.where(first_wins, second, first)
    )


class TextRun(NamedTuple):
    """How a policy was aligned, round by round, each value taken before the round's steps.

    Attributes:
        rewards: Mean reward of the answers in the eyes of the reward model.
        true_rewards: Their mean true reward.
        kl: Their mean divergence from the reference, in nats per answer, estimated from them.
    """

    rewards: Float[Tensor, "rounds"]
    true_rewards: Float[Tensor, "rounds"]
    kl: Float[Tensor, "rounds"]


def align(
    actor: Actor,
    reference: TinyTransformer,
    reward_model: Callable[[Tensor], Tensor],
    prompts: Iterator[Int[Tensor, "batch time"]],
    *,
    steps: int,
    rounds: int,
    controller: FixedKLController | AdaptiveKLController,
    lr: float,
    true_reward: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    epochs: int = 4,
) -> TextRun:
    """Rounds of PPO: answers are drawn from the policy, judged by the reward model, learned from.

    Args:
        actor: What is trained, in place.
        reference: What it is held to.
        reward_model: Reward of whole sequences.
        prompts: One batch a round.
        steps: Number of tokens of an answer.
        rounds: Number of rounds.
        controller: Holds the price of a nat of divergence.
        lr: Learning rate of Adam.
        true_reward: The rule, for the record alone; it takes answers without prompts.
        generator: Source of the answers, on the CPU.
        epochs: Steps on each batch.

    Returns:
        The history.

    Raises:
        ValueError: If a setting is out of range.
    """
    check_whole(steps=steps, rounds=rounds)
    check_positive(steps=steps, rounds=rounds, lr=lr)
    optimizer = torch.optim.Adam(actor.parameters(), lr=lr)
    history = []
    for _ in range(rounds):
        tokens = generate(actor.policy, next(prompts), steps=steps, generator=generator)
        answer = torch.zeros_like(tokens, dtype=torch.bool)
        answer[:, -steps:] = True
        targets, counted = next_tokens(tokens, answer)
        with torch.no_grad():
            ref_logps = token_stats(reference(tokens), targets, mask=counted).logps
            rewards = reward_model(tokens)
        update = ppo_update(
            lambda: actor(tokens, answer),  # noqa: B023  # called within this round
            ref_logps, rewards, counted, optimizer, beta=controller.beta, epochs=epochs,
        )  # fmt: skip
        earned = true_reward(tokens[:, -steps:])
        history.append((rewards.mean().item(), earned.mean().item(), update.kl))
        controller.update(update.kl, len(tokens))
    return TextRun(*torch.tensor(history, dtype=torch.float64).unbind(dim=-1))


def answer_logps(
    model: TinyTransformer, tokens: Int[Tensor, "*batch time"], *, steps: int
) -> Float[Tensor, "*batch"]:
    r"""Log-probability of each answer given its prompt, in nats.

    .. math:: \log \pi(y \mid x) = \sum_{t=1}^{T} \log \pi(y_t \mid x, y_{<t})

    Of answers that a policy drew, the mean of its own less the reference's estimates the
    divergence :math:`D_{KL}(\pi \parallel \pi_{ref})`.

    Args:
        model: The policy :math:`\pi`, or a reference.
        tokens: Prompts with their answers.
        steps: Number of tokens :math:`T` of an answer; what stands before them is the prompt.

    Returns:
        One log-probability per answer.

    Raises:
        TypeError: If ``tokens`` are not whole numbers.
        ValueError: If ``steps`` is not positive or leaves no prompt.

    Example:
        >>> import torch
        >>> from lmlosses import cpu_generator
        >>> from lmlosses.lab.text_alignment import answer_logps
        >>> from lmlosses.lab.transformer import TinyTransformer
        >>> model = TinyTransformer(5, dim=8, layers=1, heads=2, generator=cpu_generator(0))
        >>> _ = model.embedding.data.zero_()  # every token is as likely as any other
        >>> print(f"{answer_logps(model, torch.tensor([3, 1, 4]), steps=2).exp():.2f}")
        0.04
    """
    check_integer(tokens=tokens)
    check_min_ndim("tokens", tokens, 1)
    check_whole(steps=steps)
    check_positive(steps=steps)
    if steps >= tokens.shape[-1]:
        raise ValueError(
            f"steps must leave a token of the prompt, of {tokens.shape[-1]} tokens; got {steps}"
        )
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    answer[..., -steps:] = True
    targets, counted = next_tokens(tokens, answer)
    return sequence_sums(token_stats(model(tokens), targets, mask=counted).logps, counted)


class PairRun(NamedTuple):
    """How a policy learned from pairs, each a mean over a batch, taken before its step.

    Attributes:
        losses: The loss of DPO, in nats.
        chosen: Change of the chosen answers' log-probability since the reference, in nats per
            answer. Less that of the rejected ones it is the margin.
        rejected: The same of the rejected answers.
    """

    losses: Float[Tensor, "rounds"]
    chosen: Float[Tensor, "rounds"]
    rejected: Float[Tensor, "rounds"]


def align_by_pairs(
    policy: TinyTransformer,
    reference: TinyTransformer,
    pairs: JudgedPairs,
    *,
    steps: int,
    rounds: int,
    beta: float,
    lr: float,
    generator: torch.Generator,
    batch: int = 64,
    watch: Callable[[int], None] | None = None,
) -> PairRun:
    r"""Rounds of DPO: one step each on a few of the pairs, and no answer is drawn.

    With :math:`\Delta \log \pi` the change of an answer's log-probability since the reference,
    whose part is computed once, each round takes a step of Adam on

    .. math:: L = -\frac{1}{B} \sum_{b=1}^{B} \log \sigma\bigl(
        \beta (\Delta \log \pi(y^+_b) - \Delta \log \pi(y^-_b))\bigr) .

    A policy equal to its reference begins at :math:`\log 2`.

    Args:
        policy: What is trained, in place.
        reference: What it is held to.
        pairs: From `judged_pairs`. They may repeat within a batch.
        steps: Number of tokens of an answer.
        rounds: Number of steps of Adam.
        beta: Price :math:`\beta` of a nat of divergence.
        lr: Learning rate of Adam.
        generator: Picks the pairs, on the CPU.
        batch: Number of pairs :math:`B` of a round.
        watch: Called with the number of each round, before its step.

    Returns:
        The history.

    Raises:
        TypeError: If the pairs are not whole numbers.
        ValueError: If there are no pairs, their shapes differ or a setting is out of range.
    """
    check_same_shape("rejected", pairs.rejected, of="chosen", reference=pairs.chosen)
    check_whole(rounds=rounds, batch=batch)
    check_positive(rounds=rounds, batch=batch, lr=lr)
    tokens = torch.stack(pairs)
    check_not_empty_axis("pairs", tokens, axis=1)
    with torch.no_grad():
        ref_logps = answer_logps(reference, tokens, steps=steps)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    history = []
    for number in range(rounds):
        if watch is not None:
            watch(number)
        some = torch.randint(tokens.shape[1], (batch,), generator=generator).to(tokens.device)
        logps, ref = answer_logps(policy, tokens[:, some], steps=steps), ref_logps[:, some]
        loss = dpo_loss(*logps, *ref, beta=beta).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        history.append(torch.stack([loss, *(logps - ref).mean(dim=1)]).detach().double())
    return PairRun(*torch.stack(history).unbind(dim=-1))
