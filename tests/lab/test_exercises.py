import pytest
import torch

from lmlosses.lab import exercises
from lmlosses.lab.exercises import EXERCISES, Exercise, WrongAnswer

ALL = [pytest.param(name, id=name) for name in sorted(EXERCISES)]


@pytest.mark.parametrize("name", ALL)
def test_missing_answer_is_refused(name):
    with pytest.raises(WrongAnswer, match=f"{name}: no answer yet"):
        exercises.check(name, None)


@pytest.mark.parametrize("name", ALL)
def test_solution_is_accepted(name, capsys):
    exercises.check(name, EXERCISES[name].solution())
    assert capsys.readouterr().out == f"{name}: right.\n"


@pytest.mark.parametrize("name", ALL)
def test_likely_mistakes_are_refused_each_with_its_hint(name):
    assert EXERCISES[name].mistakes
    for mistake, hint in EXERCISES[name].mistakes:
        with pytest.raises(WrongAnswer) as caught:
            exercises.check(name, mistake)
        assert hint in str(caught.value) and len(hint) > 20


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("nonsense", ["?", object(), float("nan"), [], torch.zeros(3, 3, 3)])
def test_nonsense_is_refused(name, nonsense):
    with pytest.raises(WrongAnswer, match=f"{name}: not yet"):
        exercises.check(name, nonsense)


def test_answer_within_tolerance_is_right_and_outside_is_not():
    exercise = Exercise(solution=lambda: 2.0, mistakes=[], tolerance=1e-2)
    assert exercise.agrees(2.02, 2.0) and not exercise.agrees(2.2, 2.0)


def test_answer_of_another_shape_is_not_broadcast():
    exercise = Exercise(solution=lambda: [1.0, 1.0], mistakes=[])
    assert not exercise.agrees(1.0, [1.0, 1.0])


def test_function_is_compared_on_the_probes():
    exercise = Exercise(solution=lambda: lambda x: x**2, mistakes=[], probes=[(2.0,), (3.0,)])
    assert exercise.agrees(lambda x: x * x, exercise.solution())
    assert not exercise.agrees(lambda x: 2 * x, exercise.solution())


def test_truth_value_is_not_taken_for_a_number():
    exercise = Exercise(solution=lambda: True, mistakes=[])
    assert exercise.agrees(True, True) and not exercise.agrees(1, True)


def test_unknown_exercise_is_named():
    with pytest.raises(KeyError, match="no exercise '0.0.0-z'"):
        exercises.check("0.0.0-z", 1)
