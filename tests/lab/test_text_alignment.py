"""Tests of lmlosses.lab.text_alignment."""

import math

import pytest
import torch

from lmlosses import cpu_generator
from lmlosses.advantages import FixedKLController
from lmlosses.lab.text import encode
from lmlosses.lab.text_alignment import (
    Actor,
    JudgedPairs,
    RewardModel,
    align,
    align_by_pairs,
    answer_logps,
    judged_pairs,
    letter_reward,
)
from lmlosses.lab.transformer import TinyTransformer

VOCAB, STEPS = 5, 4


def tiny(seed=0):
    return TinyTransformer(VOCAB, dim=8, layers=1, heads=2, generator=cpu_generator(seed))


def prompts(count, length=3):
    return torch.randint(VOCAB, (count, length), generator=cpu_generator(9))


def count_of_ones(answers):
    return (answers == 1).sum(dim=-1).float()


# ---- the rule


@pytest.mark.parametrize(
    ("text", "worth"),
    [("eleven", 3), ("bees", 0), ("eee", -1), ("why not", 0), ("e e", 2), ("e", 1)],
)
def test_letters_count_and_doubled_ones_cost(text, worth):
    assert letter_reward(encode(text)) == worth


def test_rule_takes_batches_another_letter_and_another_price():
    tokens = torch.stack([encode("aab"), encode("aba")])
    assert letter_reward(tokens, letter="a", price=0.5).tolist() == [1.5, 2.0]


@pytest.mark.bad_input
def test_rule_refuses_what_is_no_single_letter_and_no_text():
    with pytest.raises(ValueError, match="letter must be a single byte"):
        letter_reward(encode("abc"), letter="ä")
    with pytest.raises(TypeError, match="tokens must be an integer tensor"):
        letter_reward(torch.zeros(3))


# ---- the reward model


def test_reward_model_starts_at_zero_and_leaves_the_model_alone():
    model = tiny()
    scorer = RewardModel(model)
    assert (scorer(prompts(4)) == 0).all()
    scorer.score.data.fill_(1.0)
    scorer.body.embedding.data.zero_()
    assert (model.embedding != 0).any()


def test_reward_is_the_sum_over_tokens():
    scorer = RewardModel(tiny())
    scorer.score.data.copy_(torch.linspace(-1, 1, 8))
    tokens = prompts(2)
    by_hand = [
        sum((scorer.body.hidden(row)[t] @ scorer.score).item() for t in range(3)) for row in tokens
    ]
    torch.testing.assert_close(scorer(tokens), torch.tensor(by_hand))


# ---- policy and values


def test_actor_gives_the_logps_of_next_tokens_and_nothing_of_the_prompt():
    model = tiny()
    tokens = prompts(2, 5)
    answer = torch.tensor([False, False, True, True, True]).expand(2, 5)
    logps, values = Actor(model)(tokens, answer)
    all_logps = model(tokens).log_softmax(dim=-1)
    for n in range(2):
        for t in range(5):
            counts = 1 <= t <= 3  # the position before each answer token
            expected = all_logps[n, t, tokens[n, t + 1]] if counts else torch.tensor(0.0)
            torch.testing.assert_close(logps[n, t], expected)
    assert (values == 0).all() and values.shape == (2, 5)


def test_values_do_not_change_the_policy():
    actor = Actor(tiny())
    actor.slope.data.fill_(1.0)
    answer = torch.ones(2, 3, dtype=torch.bool)
    actor(prompts(2), answer).values.sum().backward()
    assert all(parameter.grad is None for parameter in actor.policy.parameters())
    assert actor.slope.grad is not None and actor.level.grad == 6


# ---- the judge


def test_judge_prefers_with_the_probability_of_bradley_and_terry():
    # the reward is the first letter's number, so every lead is known
    pairs = judged_pairs(tiny(), prompts(4000), steps=1, generator=cpu_generator(1),
                         reward=lambda answers: answers[:, 0].double())  # fmt: skip
    lead = pairs.chosen[:, -1] - pairs.rejected[:, -1]
    for size in (1, 2, 3):
        of_size = lead.abs() == size
        share = (lead[of_size] > 0).double().mean().item()
        expected = 1 / (1 + math.exp(-size))
        error = math.sqrt(expected * (1 - expected) / of_size.sum().item())
        assert abs(share - expected) < 4 * error
    assert (pairs.chosen[:, :3] == pairs.rejected[:, :3]).all()


@pytest.mark.bad_input
def test_answers_need_a_token():
    with pytest.raises(ValueError, match="steps must be positive"):
        judged_pairs(tiny(), prompts(2), steps=0, generator=cpu_generator(1),
                     reward=count_of_ones)  # fmt: skip


# ---- the rounds


def batches_of(count):
    while True:
        yield prompts(count)


def run(beta, rounds=12, seed=0):
    model = tiny(seed)
    actor = Actor(model)
    history = align(
        actor, model, lambda tokens: count_of_ones(tokens[:, -STEPS:]), batches_of(64),
        steps=STEPS, rounds=rounds, controller=FixedKLController(beta), lr=0.02,
        true_reward=count_of_ones, generator=cpu_generator(2),
    )  # fmt: skip
    return model, actor, history


def test_policy_learns_to_say_what_pays():
    model, _, history = run(beta=0.0)
    assert history.rewards[-1] > history.rewards[0] + 1
    torch.testing.assert_close(history.rewards, history.true_rewards)
    assert history.kl[0] == 0 and history.kl[-1] > 0.5
    torch.testing.assert_close(model.embedding, tiny().embedding)  # the reference stays


def test_a_high_price_keeps_the_policy_near():
    near, far = (run(beta, rounds=8)[2].kl[-1].item() for beta in (5.0, 0.0))
    assert near < 0.3 < far


@pytest.mark.bad_input
def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="rounds must be positive"):
        run(beta=0.1, rounds=0)


# ---- answers as a whole


def by_hand(model, tokens, steps):
    """Log-probability of each answer, token by token, each read off a prefix of its own."""
    sums = []
    for row in tokens:
        places = range(len(row) - steps, len(row))
        sums.append(sum(model(row[:t])[-1].log_softmax(dim=-1)[row[t]] for t in places))
    return torch.stack(sums)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_logp_of_an_answer_is_the_sum_over_its_own_tokens(steps):
    model, tokens = tiny(), prompts(4, 7)
    torch.testing.assert_close(
        answer_logps(model, tokens, steps=steps), by_hand(model, tokens, steps)
    )


def test_answers_may_have_any_leading_axes():
    tokens = prompts(6, 5)
    together = answer_logps(tiny(), tokens.view(2, 3, 5), steps=2)
    torch.testing.assert_close(together, answer_logps(tiny(), tokens, steps=2).view(2, 3))


def test_probabilities_of_all_answers_to_a_prompt_sum_to_one():
    answers = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    tokens = torch.cat([torch.tensor([[2, 0]]).expand(VOCAB**2, 2), answers], dim=1)
    assert abs(answer_logps(tiny(), tokens, steps=2).exp().sum() - 1) < 1e-5


@pytest.mark.bad_input
def test_an_answer_has_tokens_and_a_prompt():
    with pytest.raises(ValueError, match="steps must be positive"):
        answer_logps(tiny(), prompts(2), steps=0)
    with pytest.raises(
        ValueError, match="steps must leave a token of the prompt, of 3 tokens; got 3"
    ):
        answer_logps(tiny(), prompts(2), steps=3)
    with pytest.raises(TypeError, match="tokens must be an integer tensor"):
        answer_logps(tiny(), torch.zeros(2, 3), steps=1)


# ---- learning from pairs


def some_pairs(count=48):
    return judged_pairs(tiny(), prompts(count), steps=STEPS, generator=cpu_generator(1),
                        reward=lambda answers: 3 * count_of_ones(answers))  # fmt: skip


def learned(pairs=None, start=0, **settings):
    policy = tiny(start)
    settings = {"rounds": 40, "beta": 0.2, "lr": 0.01, "batch": 16} | settings
    run = align_by_pairs(
        policy, tiny(), some_pairs() if pairs is None else pairs, steps=STEPS,
        generator=cpu_generator(3), **settings,
    )  # fmt: skip
    return policy, run


def test_a_policy_equal_to_its_reference_begins_at_log_2():
    _, run = learned(rounds=1)
    torch.testing.assert_close(run.losses, torch.full((1,), math.log(2), dtype=torch.float64))
    assert run.chosen == run.rejected == 0


def test_history_is_what_the_pairs_say_by_hand():
    pairs, reference, other = some_pairs(1), tiny(), tiny(4)
    _, run = learned(pairs, start=4, rounds=1, beta=0.7)
    chosen, rejected = (
        (by_hand(other, side, STEPS) - by_hand(reference, side, STEPS)).item() for side in pairs
    )
    assert abs(run.chosen.item() - chosen) < 1e-5 and abs(run.rejected.item() - rejected) < 1e-5
    assert abs(run.losses.item() - math.log(1 + math.exp(-0.7 * (chosen - rejected)))) < 1e-5


def test_first_step_follows_the_theorem():
    # at the reference each pair weighs one half: the gradient is that of -beta/2 times the margin
    pairs, model = some_pairs(1), tiny()
    chosen, rejected = (answer_logps(model, side, steps=STEPS) for side in pairs)
    (slope,) = torch.autograd.grad((rejected - chosen).sum(), [model.embedding])
    policy, _ = learned(pairs, rounds=1, lr=1e-3)
    moved = policy.embedding - tiny().embedding
    clear = slope.abs() > 1e-4  # the first step of Adam is the sign of the gradient
    torch.testing.assert_close(moved[clear], -1e-3 * slope[clear].sign(), rtol=2e-3, atol=0)


def test_margins_grow_and_the_policy_says_more_of_what_was_chosen():
    reference = tiny()
    policy, run = learned()
    assert run.losses[-5:].mean() < 0.6 < math.log(2)
    margins = run.chosen - run.rejected
    assert margins[-5:].mean() > margins[:5].mean() + 1
    earned = [
        judged_pairs(model, prompts(500), steps=STEPS, generator=cpu_generator(5),
                     reward=count_of_ones).chosen[:, -STEPS:].eq(1).sum().item() / 500
        for model in (reference, policy)
    ]  # fmt: skip
    assert earned[1] > earned[0] + 0.3
    torch.testing.assert_close(reference.embedding, tiny().embedding)


def test_a_watcher_sees_the_policy_before_each_round():
    policy, seen = tiny(), []
    align_by_pairs(
        policy, tiny(), some_pairs(), steps=STEPS, rounds=3, beta=0.2, lr=0.01,
        generator=cpu_generator(3), batch=4,
        watch=lambda number: seen.append((number, policy.embedding.detach().clone())),
    )  # fmt: skip
    assert [number for number, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[0][1], tiny().embedding)
    assert not torch.equal(seen[1][1], seen[0][1]) and not torch.equal(seen[2][1], seen[1][1])


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["rounds", "batch", "lr", "beta"])
def test_settings_of_learning_from_pairs_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        learned(**{name: 0})


@pytest.mark.bad_input
def test_pairs_must_be_there_and_match():
    pairs = some_pairs(4)
    with pytest.raises(ValueError, match="rejected must have shape"):
        learned(JudgedPairs(pairs.chosen, pairs.rejected[:2]))
    with pytest.raises(ValueError, match="pairs must have at least one entry along axis 1"):
        learned(JudgedPairs(pairs.chosen[:0], pairs.rejected[:0]))
