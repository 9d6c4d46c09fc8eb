"""Tests of lmlosses.schedules.scheduler."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

from lmlosses.schedules import as_scheduler, constant, linear, warmup_cosine, wsd
from tests.schedules.test_curves import EVERY, agree, every, rates_of

STEPS = 34


def bowl_gradient(weights, step):
    for index, weight in enumerate(weights):
        weight.grad = weight.detach() * (1 + index) + 0.01 * step


class Run:
    """Two parameters in groups of different rates, an optimizer with momentum, a scheduler."""

    def __init__(self, schedule, order="scheduler made first", checkpoint=None, tensor=False):
        rates = [torch.tensor(0.3), torch.tensor(0.03)] if tensor else [0.3, 0.03]
        self.weights = [torch.nn.Parameter(torch.full((2,), 1.0 + i)) for i in range(2)]
        groups = [{"params": [w], "lr": lr} for w, lr in zip(self.weights, rates, strict=True)]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        if checkpoint is None:
            self.scheduler = as_scheduler(self.optimizer, schedule)
            return
        weights, optimizer_state, scheduler_state = checkpoint
        for weight, saved in zip(self.weights, weights, strict=True):
            weight.data.copy_(saved)
        if order == "optimizer loaded, scheduler made and loaded":
            self.optimizer.load_state_dict(optimizer_state)
        self.scheduler = as_scheduler(self.optimizer, schedule)
        if order == "scheduler made, optimizer loaded, scheduler loaded":
            self.optimizer.load_state_dict(optimizer_state)
        self.scheduler.load_state_dict(scheduler_state)
        if order == "scheduler made and loaded, optimizer loaded":
            self.optimizer.load_state_dict(optimizer_state)
        if order == "everything loaded twice":
            for _ in range(2):
                self.scheduler.load_state_dict(scheduler_state)
                self.optimizer.load_state_dict(optimizer_state)

    def rates(self):
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def go(self, start, end):
        """Rates and weights of each step."""
        seen = []
        for step in range(start, end):
            bowl_gradient(self.weights, step)
            self.optimizer.step()
            seen.append((self.rates(), [weight.tolist() for weight in self.weights]))
            self.scheduler.step()
        return seen

    def checkpoint(self):
        return copy.deepcopy(
            (
                [weight.detach() for weight in self.weights],
                self.optimizer.state_dict(),
                self.scheduler.state_dict(),
            )
        )


ORDERS = [
    "optimizer loaded, scheduler made and loaded",
    "scheduler made, optimizer loaded, scheduler loaded",
    "scheduler made and loaded, optimizer loaded",
    "everything loaded twice",
]


# ---- the rates


@every
def test_each_group_keeps_its_own_rate_times_the_schedule(schedule):
    run = Run(schedule)
    seen = run.go(0, STEPS)
    for step, (rates, _) in enumerate(seen):
        assert rates == [0.3 * schedule(step), 0.03 * schedule(step)]
    assert run.scheduler.get_last_lr() == run.rates() == [
        0.3 * schedule(STEPS), 0.03 * schedule(STEPS),
    ]  # fmt: skip


def test_it_is_torchs_lambda_lr():
    schedule = EVERY["warmup_cosine"]
    theirs = rates_of(lambda o: lr_scheduler.LambdaLR(o, schedule))
    assert rates_of(lambda o: as_scheduler(o, schedule)) == theirs


def test_any_function_of_the_step_will_do():
    agree(linear(start=0.3, end=0.3 * 9.0, total_steps=8),
          rates_of(lambda o: as_scheduler(o, lambda step: 1.0 + step), steps=9))  # fmt: skip


# ---- resuming


@every
@pytest.mark.parametrize("order", ORDERS)
def test_resumed_at_any_step_in_any_order_a_run_is_the_run(schedule, order):
    whole = Run(schedule)
    seen = []
    for step in range(STEPS):
        resumed = Run(schedule, order, whole.checkpoint())
        assert resumed.rates() == whole.rates()
        assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
        assert resumed.scheduler.last_epoch == step
        near_the_end = step + 2
        once = copy.deepcopy(resumed.checkpoint())
        after = resumed.go(step, near_the_end)
        assert Run(schedule, order, once).go(step, near_the_end) == after
        seen += whole.go(step, step + 1)
        assert after[0] == seen[-1]


@pytest.mark.parametrize("order", ORDERS)
def test_a_resumed_run_ends_where_the_whole_one_does(order):
    schedule = EVERY["wsd, cosine"]
    end = Run(schedule).go(0, STEPS)
    for stop in range(STEPS):
        first = Run(schedule)
        first.go(0, stop)
        assert Run(schedule, order, first.checkpoint()).go(stop, STEPS) == end[stop:]


def test_the_schedulers_state_alone_brings_back_the_rates():
    first = Run(EVERY["wsd"])
    first.go(0, 27)
    other = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.Adam([{"params": [weight]} for weight in other], lr=7.0)
    as_scheduler(optimizer, EVERY["wsd"]).load_state_dict(first.scheduler.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == first.rates()


def test_state_is_numbers_that_survive_a_file():
    run = Run(EVERY["wsd"])
    run.go(0, 5)
    state = run.scheduler.state_dict()
    assert state == {"last_epoch": 5, "_step_count": 6, "base_lrs": [0.3, 0.03]}
    assert pickle.loads(pickle.dumps(state)) == state == copy.deepcopy(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state


def test_state_does_not_follow_the_run():
    run = Run(EVERY["wsd"], tensor=True)
    state = run.scheduler.state_dict()
    run.go(0, 5)
    state["base_lrs"][0].fill_(9.0)
    assert state["last_epoch"] == 0 and run.scheduler.state_dict()["base_lrs"][0] == 0.3


def test_another_schedule_takes_over_at_a_checkpoint():
    stable, decayed = wsd(warmup_steps=2, decay_steps=0, total_steps=99), linear(total_steps=20)
    first = Run(stable)
    first.go(0, 10)
    second = Run(decayed, ORDERS[0], first.checkpoint())
    assert second.rates() == [0.15, 0.015]


def test_a_run_of_torchs_lambda_lr_can_be_continued():
    schedule = EVERY["warmup_cosine"]
    first = Run(schedule)
    first.scheduler = lr_scheduler.LambdaLR(first.optimizer, schedule)
    first.go(0, 9)
    assert Run(schedule, ORDERS[1], first.checkpoint()).rates() == first.rates()


# ---- rates that are tensors


def test_a_rate_that_is_a_tensor_is_filled_in_place():
    run = Run(EVERY["warmup_cosine"], tensor=True)
    tensors = [group["lr"] for group in run.optimizer.param_groups]
    as_floats = Run(EVERY["warmup_cosine"])
    for step in range(STEPS):
        assert run.rates() == pytest.approx(as_floats.rates(), rel=1e-6, abs=1e-12)
        run.go(step, step + 1)
        as_floats.go(step, step + 1)
    run.scheduler.load_state_dict(run.scheduler.state_dict())
    for group, tensor in zip(run.optimizer.param_groups, tensors, strict=True):
        assert group["lr"] is tensor and group["initial_lr"] is not tensor
    last = run.scheduler.get_last_lr()
    last[0].fill_(5.0)
    assert run.rates()[0] != 5.0


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_with_tensor_rates_resumes_to_the_bit(order):
    schedule = EVERY["warmup_cosine"]
    end = Run(schedule, tensor=True).go(0, 20)
    for stop in (0, 1, 7, 19):
        first = Run(schedule, tensor=True)
        first.go(0, stop)
        resumed = Run(schedule, order, first.checkpoint(), tensor=True)
        assert resumed.go(stop, 20) == end[stop:]
        assert all(isinstance(g["lr"], torch.Tensor) for g in resumed.optimizer.param_groups)


def test_tensor_and_number_load_into_each_other():
    numbers, tensors = Run(EVERY["wsd"]), Run(EVERY["wsd"], tensor=True)
    numbers.go(0, 25), tensors.go(0, 25)
    into_tensor, into_number = Run(EVERY["wsd"], tensor=True), Run(EVERY["wsd"])
    into_tensor.scheduler.load_state_dict(numbers.scheduler.state_dict())
    into_number.scheduler.load_state_dict(tensors.scheduler.state_dict())
    assert into_tensor.rates() == pytest.approx(numbers.rates())
    assert into_number.rates() == pytest.approx(numbers.rates())
    assert type(into_number.optimizer.param_groups[0]["lr"]) is float


# ---- groups that come later


def with_a_third_group(run, lr=3.0):
    weight = torch.nn.Parameter(torch.ones(2))
    run.weights.append(weight)
    run.optimizer.add_param_group({"params": [weight], "lr": lr})


def test_a_group_added_later_joins_at_the_step_where_the_others_are():
    schedule = EVERY["warmup_cosine"]
    run = Run(schedule)
    run.go(0, 20)
    with_a_third_group(run)
    seen = run.go(20, STEPS)
    for step, (rates, _) in enumerate(seen, start=20):
        assert rates == [0.3 * schedule(step), 0.03 * schedule(step), 3.0 * schedule(step)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps_later", [0, 1, 3])
def test_a_group_added_before_a_checkpoint_resumes_too(order, steps_later):
    schedule, stop = EVERY["warmup_cosine"], 20 + steps_later
    whole = Run(schedule)
    whole.go(0, 20)
    with_a_third_group(whole)
    whole.go(20, stop)
    checkpoint = whole.checkpoint()

    resumed = Run(schedule)
    with_a_third_group(resumed, lr=1.0)  # its own rate comes from the checkpoint
    for weight, saved in zip(resumed.weights, checkpoint[0], strict=True):
        weight.data.copy_(saved)
    if order.startswith("optimizer loaded"):
        resumed.optimizer.load_state_dict(checkpoint[1])
        resumed.scheduler = as_scheduler(resumed.optimizer, schedule)
    if order.startswith("scheduler made, optimizer"):
        resumed.optimizer.load_state_dict(checkpoint[1])
    resumed.scheduler.load_state_dict(checkpoint[2])
    if order.startswith(("scheduler made and", "everything")):
        resumed.optimizer.load_state_dict(checkpoint[1])
    assert resumed.go(stop, STEPS) == whole.go(stop, STEPS)


def test_a_scheduler_that_is_gone_leaves_the_optimizer_alone():
    run = Run(constant(value=0.5))
    run.scheduler = None
    with_a_third_group(run)
    bowl_gradient(run.weights, 0)
    run.optimizer.step()
    assert run.rates()[2] == 3.0


# ---- where torch's differ


def test_torchs_lambda_lr_depends_on_the_order_of_loading():
    """Made after the optimizer's state was loaded it takes a step at the first rate; ours none."""
    schedule = warmup_cosine(warmup_steps=0, total_steps=20)
    first = Run(schedule)
    first.scheduler = lr_scheduler.LambdaLR(first.optimizer, schedule)
    first.go(0, 19)
    _, optimizer_state, scheduler_state = first.checkpoint()
    resumed = Run(schedule)
    resumed.optimizer.load_state_dict(optimizer_state)
    scheduler = lr_scheduler.LambdaLR(resumed.optimizer, schedule)
    scheduler.load_state_dict(scheduler_state)
    assert resumed.rates()[0] == 0.3 > 100 * first.rates()[0]
    ours = as_scheduler(resumed.optimizer, schedule)
    ours.load_state_dict(scheduler_state)
    assert resumed.rates() == first.rates()


@pytest.mark.bad_input
def test_what_cannot_be_scheduled_is_refused():
    optimizer = Run(constant()).optimizer
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer; got 3"):
        as_scheduler(3, constant())
    with pytest.raises(TypeError, match="schedule must be a function of the step; got 0.5"):
        as_scheduler(optimizer, 0.5)
