"""The language model of pages 4.5.4 and 4.5.5 aligned at length, by PPO and by DPO.

``python -m benchmarks.alignment_run``: one thread, some minutes. Stores ``results/rlhf.json`` and
draws ``results/rlhf.svg`` and ``results/dpo.svg`` from it.
"""

import copy
import json
import time

import matplotlib.pyplot as plt
import torch

from benchmarks.figures import RESULTS
from lmlosses import cpu_generator, token_mean
from lmlosses.advantages import FixedKLController
from lmlosses.lab import plotting
from lmlosses.lab.text import Text, batches, decode, shakespeare, windows
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
from lmlosses.lab.training import train
from lmlosses.lab.transformer import TinyTransformer, generate
from lmlosses.losses.next_token import causal_lm_loss
from lmlosses.losses.preference import dpo_loss
from lmlosses.losses.reward import bradley_terry_loss
from lmlosses.schedules import warmup_cosine

PROMPT, ANSWER = 8, 12
BETAS = (0.02, 0.1, 0.4)
SFT_STEPS, PAIRS, ROUNDS, BATCH = 1500, 2048, 100, 128
LAST = 10  # rounds that an end is averaged over
LR = 2e-3
PAIR_ROUNDS, PAIR_BATCH = 400, 64  # as many steps of as many answers as PPO
PAIR_LRS = (5e-4, LR)
LOOK = 20  # rounds of DPO between two looks, as many steps as 5 rounds of PPO


def language_model(text: torch.Tensor, steps: int = SFT_STEPS) -> TinyTransformer:
    model = TinyTransformer(256, dim=64, layers=2, heads=4, generator=cpu_generator(0))
    stream = batches(text, batch=32, length=32, generator=cpu_generator(1))
    optimizer = torch.optim.Adam(model.parameters())

    def step_loss() -> torch.Tensor:
        tokens = next(stream)
        return token_mean(*causal_lm_loss(model(tokens), tokens))

    train(step_loss, optimizer, steps=steps,
          lr=warmup_cosine(peak=5e-3, warmup_steps=20, total_steps=steps))  # fmt: skip
    return model


def comparisons(model: TinyTransformer, text: torch.Tensor) -> tuple[JudgedPairs, JudgedPairs]:
    """Pairs to learn from, and a quarter as many fresh ones."""
    held_out = PAIRS // 4
    prompts = next(batches(text, batch=PAIRS + held_out, length=PROMPT,
                           generator=cpu_generator(2)))  # fmt: skip
    pairs = judged_pairs(
        model, prompts, steps=ANSWER, reward=letter_reward, generator=cpu_generator(3)
    )
    return (JudgedPairs(*(side[:PAIRS] for side in pairs)),
            JudgedPairs(*(side[PAIRS:] for side in pairs)))  # fmt: skip


def right(leads: torch.Tensor, pairs: JudgedPairs) -> float:
    """Share of the pairs of different worth whose better answer is the one that leads."""
    chosen, rejected = (letter_reward(side[:, PROMPT:]) for side in pairs)
    told = chosen != rejected
    return ((leads > 0) == (chosen > rejected))[told].double().mean().item()


def reward_model(model: TinyTransformer, pairs: JudgedPairs) -> RewardModel:
    scorer, draws = RewardModel(model), cpu_generator(4)

    def step_loss() -> torch.Tensor:
        some = torch.randint(PAIRS, (64,), generator=draws)
        return bradley_terry_loss(*(scorer(side[some]) for side in pairs)).mean()

    steps = 3 * PAIRS // 64
    train(step_loss, torch.optim.Adam(scorer.parameters()), steps=steps,
          lr=warmup_cosine(peak=5e-3, warmup_steps=5, total_steps=steps))  # fmt: skip
    return scorer


def answers_of(policy: TinyTransformer, text: torch.Tensor) -> str:
    """Three answers to prompts from the held-out play."""
    answers = generate(policy, windows(text, length=PROMPT)[40:43],
                       steps=ANSWER, generator=cpu_generator(7))  # fmt: skip
    return " / ".join(" ".join(decode(answer[PROMPT:]).split()) for answer in answers)


@torch.no_grad()
def fresh(
    policy: TinyTransformer, model: TinyTransformer, prompts: torch.Tensor, draws: torch.Generator
) -> dict:
    """Where a policy stands: divergence and true reward, estimated on new answers."""
    tokens = generate(policy, prompts, steps=ANSWER, generator=draws)
    own, reference = (answer_logps(m, tokens, steps=ANSWER) for m in (policy, model))
    return {"kl": (own - reference).mean().item(),
            "true": letter_reward(tokens[:, PROMPT:]).mean().item()}  # fmt: skip


def by_pairs(
    model: TinyTransformer,
    pairs: JudgedPairs,
    held_out: JudgedPairs,
    text: Text,
    *,
    beta: float,
    lr: float,
) -> tuple[list[dict], dict]:
    """The course of DPO and its end."""
    policy, draws, which = copy.deepcopy(model), cpu_generator(9), {"lr": lr, "beta": beta}
    asked = batches(text.train, batch=5 * BATCH, length=PROMPT, generator=cpu_generator(8))
    both = torch.stack(held_out)
    with torch.no_grad():
        ref_logps = answer_logps(model, both, steps=ANSWER)
    looks: list[dict] = []
    looking = 0.0

    @torch.no_grad()
    def unseen() -> tuple[torch.Tensor, float]:
        """Change of the log-probabilities of held-out answers, and the loss there."""
        logps = answer_logps(policy, both, steps=ANSWER)
        return logps - ref_logps, dpo_loss(*logps, *ref_logps, beta=beta).mean().item()

    def look(number: int) -> None:
        nonlocal looking
        if number % LOOK == 0:
            before = time.process_time()
            found = fresh(policy, model, next(asked), draws) | {"held_out_loss": unseen()[1]}
            looks.append(which | {"round": number}
                         | {key: round(value, 3) for key, value in found.items()})  # fmt: skip
            looking += time.process_time() - before

    begin = time.process_time()
    run = align_by_pairs(
        policy, model, pairs, steps=ANSWER, rounds=PAIR_ROUNDS, beta=beta, lr=lr,
        generator=cpu_generator(5), batch=PAIR_BATCH, watch=look,
    )  # fmt: skip
    seconds = time.process_time() - begin - looking
    look(PAIR_ROUNDS)
    (chosen, rejected), loss = unseen()
    twice = torch.cat([next(asked), next(asked)])  # as many answers as an end of PPO
    end = {**which, **fresh(policy, model, twice, draws),
           "chosen": chosen.mean().item(), "rejected": rejected.mean().item(),
           "accuracy": right(chosen - rejected, held_out),
           "loss": run.losses[-5 * LOOK:].mean().item(), "held_out_loss": loss,
           "seconds": round(seconds), "answers": answers_of(policy, text.validation)}  # fmt: skip
    return looks, end


def measure() -> dict:
    torch.set_num_threads(1)
    begin = time.process_time()
    text = shakespeare()
    model = language_model(text.train)
    held_out = windows(text.validation, length=32)[:512]
    with torch.no_grad():
        surprise = token_mean(*causal_lm_loss(model(held_out), held_out)).item()
    pairs, fresh_pairs = comparisons(model, text.train)
    before = time.process_time()
    scorer = reward_model(model, pairs)
    scored = time.process_time() - before
    with torch.no_grad():
        chosen, rejected = (scorer(side) for side in fresh_pairs)
    accuracy = right(chosen - rejected, fresh_pairs)
    rounds, ends = [], []
    for beta in BETAS:
        actor, before = Actor(model), time.process_time()
        run = align(
            actor, model, scorer,
            batches(text.train, batch=BATCH, length=PROMPT, generator=cpu_generator(5)),
            steps=ANSWER, rounds=ROUNDS, controller=FixedKLController(beta), lr=LR,
            true_reward=letter_reward, generator=cpu_generator(6),
        )  # fmt: skip
        seconds = time.process_time() - before
        # the reward model's constant means nothing: both rewards begin at the same height
        shift = run.true_rewards[0] - run.rewards[0]
        rows = torch.stack([run.kl, run.rewards + shift, run.true_rewards], dim=1)
        for step, (kl, reward, true) in enumerate(rows.tolist()):
            rounds.append({"beta": beta, "round": step, "kl": round(kl, 3),
                           "reward": round(reward, 3), "true": round(true, 3)})  # fmt: skip
        kl, reward, true = rows[-LAST:].mean(dim=0).tolist()
        ends.append({"beta": beta, "kl": kl, "reward": reward, "true": true,
                     "seconds": round(seconds),
                     "answers": answers_of(actor.policy, text.validation)})  # fmt: skip
    courses = [
        by_pairs(model, pairs, fresh_pairs, text, beta=beta, lr=lr)
        for lr in PAIR_LRS
        for beta in BETAS
    ]
    start = rounds[0]["true"]
    return {
        "torch": torch.__version__.partition("+")[0],
        "seconds": round(time.process_time() - begin),
        "models": [{"what": "language model", "held_out_nats": surprise, "reward": start},
                   {"what": "reward model", "accuracy": accuracy, "seconds": round(scored)}],
        "ends": ends,
        "rounds": rounds,
        "dpo_ends": [end for _, end in courses],
        "dpo_rounds": [look for looks, _ in courses for look in looks],
    }  # fmt: skip


def smooth(values: list[float], width: int = 10) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unfold(0, width, width).mean(dim=-1)


def over_optimization(rounds: list[dict]) -> str:
    """What the reward model sees and what is true, against the divergence, as SVG."""
    plotting.use_style()
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    for beta in BETAS:
        rows = [row for row in rounds if row["beta"] == beta]
        kl, seen, true = (smooth([row[key] for row in rows]) for key in ("kl", "reward", "true"))
        for height, color in ((seen, plotting.COLORS[0]), (true, plotting.COLORS[1])):
            axes.plot(plotting.rounded(kl, 2), plotting.rounded(height, 2), color=color,
                      marker="o", markersize=3, linewidth=1.2)  # fmt: skip
        top = float(torch.maximum(seen, true)[-1]) + 0.5
        axes.text(round(float(kl[-1]), 2), round(top, 2), f"price {beta}", ha="center",
                  color=plotting.INK, fontsize=9)  # fmt: skip
    axes.text(27, 6.3, "seen", color=plotting.COLORS[0], ha="right")
    axes.text(30, 4.0, "true", color=plotting.COLORS[1])
    axes.set(xlim=(0, 45), ylim=(0, 8.2), xlabel="divergence from the reference, nats an answer",
             ylabel="reward")  # fmt: skip
    return plotting.svg(figure)


def two_ways(rounds: list[dict], dpo_rounds: list[dict]) -> str:
    """True reward against the divergence along PPO and along DPO at both rates, as SVG."""
    plotting.use_style()
    figure, axes = plt.subplots(figsize=(5.2, 3.8))
    blue, orange, green = plotting.COLORS[:3]
    slow, fast = ([row for row in dpo_rounds if row["lr"] == lr] for lr in PAIR_LRS)
    # as many answers behind each point, as many steps between two
    for color, courses, width in ((blue, fast, 1), (green, slow, 1), (orange, rounds, 5)):
        for beta in BETAS:
            rows = [row for row in courses if row["beta"] == beta]
            kl, true = (
                plotting.rounded(smooth([row[key] for row in rows], width), 2)
                for key in ("kl", "true")
            )
            line = 0 if color == blue else 1  # its points jump
            axes.plot(kl, true, color=color, marker="o", markersize=2.5, linewidth=line)
            axes.plot(kl[-1:], true[-1:], color=color, marker="o", markersize=6)
    for x, y, beta, color in ((20.8, 5.5, 0.1, orange), (40.8, 5.9, 0.02, orange),
                              (6.0, 1.8, 0.4, orange), (19.7, 3.65, 0.1, green),
                              (31.5, 3.3, 0.02, green), (8.3, 2.2, 0.4, green),
                              (34.8, 4.25, 0.1, blue), (58.8, 4.5, 0.02, blue),
                              (16.8, 2.9, 0.4, blue)):  # fmt: skip
        plotting.label_line(axes, x, y, f"{beta}", color, fontsize=9)
    plotting.label_line(axes, 10, 5.1, "PPO", orange)
    plotting.label_line(axes, 26, 2.2, "DPO, a quarter of the rate", green)
    plotting.label_line(axes, 26, 1.7, "DPO, at PPO's rate", blue)
    axes.set(xlim=(0, 70), ylim=(0, 6.5), xlabel="divergence from the reference, nats an answer",
             ylabel="true reward")  # fmt: skip
    return plotting.svg(figure)


def draw() -> None:
    stored = json.loads((RESULTS / "rlhf.json").read_text("utf-8"))
    (RESULTS / "rlhf.svg").write_text(over_optimization(stored["rounds"]), "utf-8")
    drawn = two_ways(stored["rounds"], stored["dpo_rounds"])
    (RESULTS / "dpo.svg").write_text(drawn, "utf-8")


if __name__ == "__main__":
    (RESULTS / "rlhf.json").write_text(json.dumps(measure(), indent=1) + "\n", "utf-8")
    draw()
