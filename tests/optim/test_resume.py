"""A training process is killed, another goes on from its checkpoint, and nobody can tell."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import torch

from lmlosses.optim.natural import NaturalGradient
from lmlosses.optim.sophia import SophiaG, SophiaH
from tests.optim.test_all import CASES, Case, curvature, start

ROOT = Path(__file__).parents[2]
STEPS, SAVED_EVERY = 12, 3


class Run:
    """One optimizer at work on its own parameters, with noise in everything it may be in."""

    def __init__(self, case: Case) -> None:
        rounds = case.takes("stochastic_rounding")
        self.params = start(case, dtype=torch.bfloat16 if rounds else torch.float32)
        settings = {"stochastic_rounding": True} if rounds else {}
        self.optimizer = case.build(self.params, **settings)

    def step(self) -> None:
        targets = [torch.randn(param.shape) for param in self.params]
        terms = zip(self.params, targets, strict=True)
        loss = sum((param - target).square().sum() for param, target in terms)
        self.optimizer.zero_grad()
        loss.backward()
        if isinstance(self.optimizer, SophiaG | SophiaH) and self.optimizer.needs_curvature:
            self.optimizer.update_curvature(curvature(self.params, type(self.optimizer)))
        if isinstance(self.optimizer, NaturalGradient):
            scale = 1 + torch.rand(())
            self.optimizer.step(fisher_product=lambda vectors: [scale * v for v in vectors])
        else:
            self.optimizer.step()

    def state_dict(self) -> dict:
        return {
            "params": [param.detach() for param in self.params],
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, saved: dict) -> None:
        for param, value in zip(self.params, saved["params"], strict=True):
            param.data.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])


def train(file: Path | None = None, die_at: tuple[int, int] | None = None) -> dict:
    """Train with all optimizers in turn, from the checkpoint if there is one."""
    torch.manual_seed(0)
    runs, done = {name: Run(case) for name, case in CASES.items()}, 0
    if file is not None and file.exists():
        saved = torch.load(file)
        done = saved["done"]
        for name, run in runs.items():
            run.load_state_dict(saved["runs"][name])
        torch.set_rng_state(saved["random"])
    for step in range(done, STEPS):
        for place, run in enumerate(runs.values()):
            if (step, place) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            run.step()
        if file is not None and (step + 1) % SAVED_EVERY == 0:
            states = {name: run.state_dict() for name, run in runs.items()}
            half_written = file.with_suffix(".tmp")
            torch.save(
                {"done": step + 1, "runs": states, "random": torch.get_rng_state()}, half_written
            )
            half_written.replace(file)
    return {name: run.state_dict() for name, run in runs.items()}


def in_a_process(*arguments: object) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def test_a_killed_run_ends_with_the_same_weights_to_the_bit(tmp_path):
    file = tmp_path / "checkpoint.pt"
    # in the middle of a step, after the first checkpoint
    killed_at = random.randrange(SAVED_EVERY, STEPS), random.randrange(len(CASES))
    assert in_a_process(file, *killed_at) == -signal.SIGKILL
    died_with = torch.load(file)["done"]
    assert SAVED_EVERY <= died_with <= killed_at[0]
    assert in_a_process(file) == 0
    resumed = torch.load(file)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        whole = train()
    torch.set_num_threads(threads)
    assert resumed["done"] == STEPS
    for name, expected in whole.items():
        found = resumed["runs"][name]
        where = f"{name}, killed at {killed_at}"
        for mine, theirs in zip(found["params"], expected["params"], strict=True):
            assert torch.equal(mine, theirs), where
        states = zip(
            found["optimizer"]["state"].values(),
            expected["optimizer"]["state"].values(),
            strict=True,
        )
        for mine, theirs in states:
            assert list(mine) == list(theirs), where
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), where


if __name__ == "__main__":
    given = sys.argv[1:]
    torch.set_num_threads(1)
    train(Path(given[0]), (int(given[1]), int(given[2])) if len(given) > 1 else None)
