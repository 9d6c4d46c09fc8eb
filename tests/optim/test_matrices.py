import pytest
import torch

from lmlosses.optim._matrices import check_whole_tensors, descend, multiple, named


def test_descent_by_hand():
    param = torch.tensor([2.0, -4.0])
    descend(param, torch.tensor([1.0, 1.0]), 0.5, weight_decay=0.25)
    assert torch.equal(param, torch.tensor([1.0, -3.5]))


def test_rate_may_be_a_tensor_and_is_left_alone():
    param, direction, rate = torch.ones(2), torch.ones(2), torch.tensor(0.5)
    descend(param, direction, rate)
    assert torch.equal(param, torch.full((2,), 0.5))
    assert rate.item() == 0.5 and torch.equal(direction, torch.ones(2))


def test_half_precision_is_rounded_once():
    param = torch.tensor([1.0], dtype=torch.bfloat16)
    # two roundings, after the decay and after the step, would lose both
    descend(param, torch.tensor([0.0025]), 1.0, weight_decay=0.0025)
    assert param.item() == torch.tensor(0.995).bfloat16().item() != 1.0


def test_random_rounding_keeps_small_steps_on_average():
    torch.manual_seed(0)
    param = torch.ones(20_000, dtype=torch.bfloat16)
    descend(param, torch.full((20_000,), 1e-3), 1.0, stochastic_rounding=True)
    assert abs(param.double().mean().item() - 0.999) < 1e-4
    plain = torch.ones(1, dtype=torch.bfloat16)
    descend(plain, torch.full((1,), 1e-3), 1.0)
    assert plain.item() == 1.0


def test_parameters_are_named_by_their_names_or_places():
    one, two = torch.zeros(1), torch.zeros(2)
    assert named(one)[1] == [("parameter 0", one)]
    assert [name for name, _ in named(iter([one, two]))[1]] == ["parameter 0", "parameter 1"]
    given, pairs = named([("weight", one)])
    assert given == [("weight", one)] and pairs == [("weight", one)]


def test_multiple_of_a_rate_keeps_its_kind():
    assert multiple(2.0, 3.0) == 6.0
    assert torch.equal(multiple(torch.tensor(2.0), 3.0), torch.tensor(6.0))


@pytest.mark.bad_input
def test_sharded_tensor_is_refused_by_name():
    tensor = torch.zeros(1)
    tensor.to_local = lambda: tensor
    with pytest.raises(TypeError, match="SOAP reads whole tensors .* got a DTensor for weight"):
        check_whole_tensors("SOAP", [("weight", tensor)])
