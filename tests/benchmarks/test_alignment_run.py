"""What pages 4.5.4 and 4.5.5 show of the long runs is what was measured."""

import json
import math

import torch

from benchmarks import alignment_run
from benchmarks.figures import RESULTS
from lmlosses import cpu_generator
from lmlosses.lab.text import encode
from lmlosses.lab.text_alignment import JudgedPairs
from lmlosses.lab.transformer import TinyTransformer

STORED = json.loads((RESULTS / "rlhf.json").read_text("utf-8"))


def test_figure_is_drawn_from_the_stored_rounds():
    drawn = alignment_run.over_optimization(STORED["rounds"])
    assert (RESULTS / "rlhf.svg").read_text("utf-8") == drawn


def test_every_price_was_run_to_its_end():
    for beta in alignment_run.BETAS:
        rounds = [row["round"] for row in STORED["rounds"] if row["beta"] == beta]
        assert rounds == list(range(alignment_run.ROUNDS))
    assert [row["beta"] for row in STORED["ends"]] == list(alignment_run.BETAS)


def test_both_rewards_begin_at_the_same_height():
    for row in STORED["rounds"]:
        if row["round"] == 0:
            assert row["reward"] == row["true"] and row["kl"] == 0


def test_a_lower_price_goes_farther():
    distances = [row["kl"] for row in STORED["ends"]]
    assert distances == sorted(distances, reverse=True)


def test_prose_about_the_curves_says_what_was_measured():
    far, middle, _ = STORED["ends"]
    assert 1.8 < far["kl"] / middle["kl"] < 2.2  # twice as far
    assert far["reward"] > middle["reward"] + 1.5  # in the eyes of the reward model
    assert abs(far["true"] - middle["true"]) < 0.3  # the truth hardly notices
    for row in STORED["rounds"]:  # near the reference both say the same
        if 0 < row["kl"] < 10:
            assert abs(row["reward"] - row["true"]) < 0.6


# ---- DPO, beside it

SLOW, FAST = ({row["beta"]: row for row in STORED["dpo_ends"] if row["lr"] == lr}
              for lr in alignment_run.PAIR_LRS)  # fmt: skip
PPO = {row["beta"]: row for row in STORED["ends"]}


def course(beta, lr=None):
    """The rounds of DPO at this rate; of PPO without one."""
    rows = STORED["rounds"] if lr is None else [r for r in STORED["dpo_rounds"] if r["lr"] == lr]
    return [row for row in rows if row["beta"] == beta]


def near(rows, nats, width):
    """Mean true reward where the divergence is about so large."""
    true = [row["true"] for row in rows if abs(row["kl"] - nats) < width]
    return sum(true) / len(true)


def test_figure_of_both_is_drawn_from_the_stored_rounds():
    drawn = alignment_run.two_ways(STORED["rounds"], STORED["dpo_rounds"])
    assert (RESULTS / "dpo.svg").read_text("utf-8") == drawn


def test_both_took_as_many_steps_of_as_many_answers():
    assert alignment_run.PAIR_ROUNDS == 400 == 4 * alignment_run.ROUNDS  # four steps a round
    assert 2 * alignment_run.PAIR_BATCH == alignment_run.BATCH == 128
    assert alignment_run.ROUNDS * alignment_run.BATCH == 12_800 and alignment_run.PAIRS == 2048
    assert alignment_run.PAIR_LRS == (alignment_run.LR / 4, alignment_run.LR)
    for lr in alignment_run.PAIR_LRS:
        for beta in alignment_run.BETAS:
            rounds = [row["round"] for row in course(beta, lr)]
            assert rounds == list(range(0, 401, alignment_run.LOOK))
            assert course(beta, lr)[0]["kl"] == 0
    assert list(SLOW) == list(FAST) == list(alignment_run.BETAS)


def test_dpo_takes_half_the_time():
    slow, fast, ppo = (sum(row["seconds"] for row in e.values()) for e in (SLOW, FAST, PPO))
    assert 0.4 < slow / ppo < 0.6 and 0.4 < fast / ppo < 0.6


def test_prose_about_the_middle_price_says_what_was_measured():
    dpo, ppo = course(0.1, 5e-4), course(0.1)
    assert 5 < dpo[2]["kl"] < 6 and 5 < ppo[5]["kl"] < 6  # rounds 40 and 5
    assert dpo[2]["round"] == 40 and dpo[2]["true"] > ppo[5]["true"] + 0.4
    for row in dpo[2:6]:  # and so for some nats more
        assert row["true"] > near(ppo, row["kl"], 0.75) + 0.15
    assert abs(near(dpo, 13, 1) - near(ppo, 13, 1)) < 0.15
    assert 18.5 < SLOW[0.1]["kl"] < 19.5 > PPO[0.1]["kl"] > 18.5
    assert SLOW[0.1]["true"] < PPO[0.1]["true"] - 1
    for row in STORED["dpo_rounds"]:  # PPO is ahead from 15 nats on
        if 15 < row["kl"] < 20:
            assert row["true"] < near(ppo, row["kl"], 0.75) - 0.1


def test_prose_about_the_ends_says_what_was_measured():
    assert abs(SLOW[0.4]["true"] - PPO[0.4]["true"]) < 0.15
    assert SLOW[0.4]["kl"] > PPO[0.4]["kl"] + 1.5
    for beta in (0.1, 0.02):
        assert max(SLOW[beta]["true"], FAST[beta]["true"]) < PPO[beta]["true"] - 0.9


def test_prose_about_the_best_of_dpo_says_what_was_measured():
    courses = course(0.02, 2e-3)
    stopped = min(courses, key=lambda row: row["held_out_loss"])
    assert stopped["round"] == 40
    within = [row["true"] for row in STORED["dpo_rounds"] if row["kl"] < 40]
    assert stopped["true"] > max(within) - 0.02  # the closest, to within the noise of a point
    assert max(within) < PPO[0.1]["true"] - 0.1 and PPO[0.1]["kl"] < 19.5
    for beta in alignment_run.BETAS:  # no other such stop comes as close
        for lr in alignment_run.PAIR_LRS:
            least = min(course(beta, lr), key=lambda row: row["held_out_loss"])
            assert least["true"] <= stopped["true"]


def test_alternative_text_says_what_was_measured():
    slow = [row for row in STORED["dpo_rounds"] if row["lr"] == 5e-4 and row["kl"] > 13]
    assert abs(sum(row["true"] for row in slow) / len(slow) - 4) < 0.1
    fast = [row for row in STORED["dpo_rounds"] if row["lr"] == 2e-3]
    assert round(max(row["kl"] for row in fast)) == 68
    assert round(min(row["true"] for row in fast[1:] if row["round"]), 1) == 0.6


def test_chosen_answers_that_were_not_trained_on_lose_probability():
    for row in (*SLOW.values(), *FAST.values()):
        assert row["rejected"] < row["chosen"] - 1 < -8


def test_dpo_learned_less_of_the_rule_and_some_of_the_noise():
    accuracy = STORED["models"][1]["accuracy"]
    assert all(row["accuracy"] < accuracy - 0.05 for row in STORED["dpo_ends"])
    assert SLOW[0.1]["loss"] < math.log(2) < SLOW[0.1]["held_out_loss"]


# ---- how it was measured


def test_right_leaves_out_pairs_of_equal_worth():
    better, worse = (encode("????????" + answer) for answer in ("eleven", "apples"))
    equal = encode("????????elated")
    pairs = JudgedPairs(torch.stack([better, worse, equal]), torch.stack([worse, better, equal]))
    assert alignment_run.right(torch.tensor([1.0, -1.0, 1.0]), pairs) == 1
    assert alignment_run.right(torch.tensor([1.0, 1.0, 1.0]), pairs) == 0.5


def test_a_policy_is_at_no_distance_from_itself_and_says_the_letter_by_chance():
    model = TinyTransformer(256, dim=8, layers=1, heads=2, generator=cpu_generator(0))
    model.embedding.data.zero_()  # uniform
    found = alignment_run.fresh(
        model, model, torch.zeros(2000, 8, dtype=torch.long), cpu_generator(1)
    )
    assert found["kl"] == 0 and abs(found["true"] - 12 / 256) < 0.02
