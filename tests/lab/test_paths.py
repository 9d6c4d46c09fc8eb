import pytest
import torch

from lmlosses.lab.paths import fewest_steps, follow, optimizer_path, state_per_parameter, valley
from lmlosses.optim import SGD, AdamW, ScheduleFreeAdamW, SignSGD, SophiaH


def bowl(point, step):
    return point.square().sum() / 2


class TestValley:
    @pytest.mark.parametrize("angle", [0.0, 30.0, 45.0, 120.0])
    def test_curvatures_are_one_and_the_condition_number(self, angle):
        hessian = torch.autograd.functional.hessian(
            lambda point: valley(angle, 50.0)(point, 0), torch.zeros(2, dtype=torch.float64)
        )
        expected = torch.tensor([1.0, 50.0], dtype=torch.float64)
        torch.testing.assert_close(torch.linalg.eigvalsh(hessian), expected)

    def test_floor_lies_along_the_angle(self):
        along = torch.tensor([3**0.5 / 2, 0.5], dtype=torch.float64)
        torch.testing.assert_close(valley(30.0, 1e6)(along, 0).item(), 0.5)

    @pytest.mark.bad_input
    def test_condition_that_is_not_positive_is_refused(self):
        with pytest.raises(ValueError, match="condition must be positive; got 0"):
            valley(0.0, 0)


class TestOptimizerPath:
    def test_gradient_descent_on_a_bowl_halves_the_way(self):
        path = optimizer_path(lambda p: SGD(p, lr=0.5), bowl, torch.tensor([8.0, 4.0]), steps=2)
        assert torch.equal(path, torch.tensor([[8.0, 4.0], [4.0, 2.0], [2.0, 1.0]]))

    def test_loss_knows_the_step(self):
        path = optimizer_path(
            lambda p: SGD(p, lr=1.0), lambda w, t: (t * w).sum(), torch.zeros(1), steps=4
        )
        assert path.flatten().tolist() == [0, 0, -1, -3, -6]

    def test_bound_pulls_points_back(self):
        path = optimizer_path(
            lambda p: SignSGD(p, lr=0.75), lambda w, t: w.sum(), torch.zeros(1), steps=3, bound=1
        )
        assert path.flatten().tolist() == [0, -0.75, -1, -1]

    def test_rate_of_each_step_may_be_given(self):
        path = optimizer_path(
            lambda p: SGD(p, lr=9.0), lambda w, t: w.sum(), torch.zeros(1), steps=3,
            lr=lambda step: 1.0 - step / 2,
        )  # fmt: skip
        assert path.flatten().tolist() == [0, -1, -1.5, -1.5]

    def test_path_of_schedule_free_is_its_average(self):
        make = lambda p: ScheduleFreeAdamW(p, lr=1.0, betas=(0.5, 0.0), eps=0.0)  # noqa: E731
        path = optimizer_path(make, lambda w, t: w.sum(), torch.zeros(1).double(), steps=3)
        # the fast point goes to -1, -2, -3, and these are its means
        expected = torch.tensor([0, -1, -1.5, -2], dtype=torch.float64)
        torch.testing.assert_close(path.flatten(), expected)

    def test_start_is_left_alone(self):
        start = torch.ones(2)
        optimizer_path(lambda p: SGD(p, lr=0.5), bowl, start, steps=2)
        assert torch.equal(start, torch.ones(2))

    @pytest.mark.bad_input
    def test_bad_settings_are_refused(self):
        make = lambda p: SGD(p, lr=0.5)  # noqa: E731
        with pytest.raises(ValueError, match="steps must not be negative; got -1"):
            optimizer_path(make, bowl, torch.ones(1), steps=-1)
        with pytest.raises(ValueError, match="bound must be positive; got 0"):
            optimizer_path(make, bowl, torch.ones(1), steps=1, bound=0)
        with pytest.raises(ValueError, match="the loss must have 0 axes"):
            optimizer_path(make, lambda w, t: w, torch.ones(1), steps=1)
        with pytest.raises(TypeError, match="start must be a floating-point tensor"):
            optimizer_path(make, bowl, torch.ones(1, dtype=torch.long), steps=1)


class TestFewestSteps:
    def test_halving_the_way_takes_two_steps_for_a_sixteenth_of_the_loss(self):
        make_at = lambda lr: lambda p: SGD(p, lr=lr)  # noqa: E731
        found = fewest_steps(make_at, (0.1, 0.5, 3.0), bowl, torch.ones(1), below=1 / 16, most=9)
        assert found == (2, 0.5)

    def test_runs_that_do_not_arrive_are_given_up(self):
        make_at = lambda lr: lambda p: SGD(p, lr=lr)  # noqa: E731
        assert fewest_steps(make_at, (3.0,), bowl, torch.ones(1), below=0.1, most=9) == (10, 3.0)

    @pytest.mark.bad_input
    def test_empty_grid_is_refused(self):
        with pytest.raises(ValueError, match="rates must hold at least one"):
            fewest_steps(lambda lr: AdamW, (), bowl, torch.ones(1), below=0.1, most=9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_holds_eight_bytes_a_parameter_and_a_count(dtype):
    held = state_per_parameter(AdamW, [(64, 64), (64,)], dtype=dtype)
    assert held == 8 + 2 * 4 / (64 * 64 + 64)


def test_sophia_is_given_its_curvature():
    assert 8 <= state_per_parameter(SophiaH, [(64, 64)], dtype=torch.float32) < 8.01


def hand_made(*values: float, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.tensor(values))], lr=lr)


def test_path_holds_the_start_and_every_step():
    path = follow(hand_made(8.0), lambda point, step: point, steps=3)
    assert path.flatten().tolist() == [8.0, 4.0, 2.0, 1.0] and not path.requires_grad


def test_gradient_may_look_at_the_step_alone():
    path = follow(hand_made(0.0, lr=1.0), lambda point, step: torch.tensor([float(step)]), steps=4)
    assert path.flatten().tolist() == [0.0, 0.0, -1.0, -3.0, -6.0]


def test_rate_may_change_from_step_to_step():
    path = follow(hand_made(0.0), lambda *_: torch.ones(1), steps=3, lr=lambda step: 10.0**step)
    assert path.flatten().tolist() == [0.0, -1.0, -11.0, -111.0]


def test_handed_gradient_is_not_written_to():
    gradient = torch.ones(1)
    follow(hand_made(0.0), lambda *_: gradient, steps=2)
    assert gradient.item() == 1.0


@pytest.mark.bad_input
def test_several_parameters_are_refused():
    two = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    with pytest.raises(ValueError, match="optimizer must hold one parameter; got 2"):
        follow(torch.optim.SGD(two), lambda point, step: point, steps=1)


@pytest.mark.bad_input
def test_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"gradient must have shape \(1,\)"):
        follow(hand_made(0.0), lambda point, step: torch.ones(2), steps=1)
