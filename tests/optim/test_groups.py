import pytest
import torch
from torch import nn

from lmlosses.optim.adam import AdamW
from lmlosses.optim.groups import decay_groups, layerwise_groups, matrix_groups
from lmlosses.optim.muon import Muon


class Model(nn.Module):
    """A language model in small: a table shared with the output, two blocks, a norm."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Conv1d(4, 4, 2)) for _ in range(2)
        )
        self.norm = nn.RMSNorm((4,))
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight


def _names(model, group):
    by_id = {id(param): name for name, param in model.named_parameters()}
    return {by_id[id(param)] for param in group["params"]}


def _assert_each_trainable_once(model, groups):
    found = [id(param) for group in groups for param in group["params"]]
    expected = {id(param) for param in model.parameters() if param.requires_grad}
    assert len(found) == len(set(found)) and set(found) == expected


# decay


def test_biases_and_norms_do_not_decay():
    model = Model()
    decayed, exempt = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    kinds = {name.rsplit(".", 2)[-2:][0] for name in _names(model, decayed)}
    assert "table.weight" in _names(model, decayed) and kinds == {"table", "1", "2"}
    assert _names(model, exempt) == {
        f"blocks.{block}.{part}"
        for block in (0, 1)
        for part in ("0.weight", "0.bias", "1.bias", "2.bias")
    } | {"norm.weight"}
    _assert_each_trainable_once(model, [decayed, exempt])


def test_a_norm_over_an_image_is_exempt_though_it_has_three_axes():
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.LayerNorm((3, 5, 5)))
    decayed, exempt = decay_groups(model, 0.1)
    assert len(decayed["params"]) == 1 and len(exempt["params"]) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_exempt_on_request_also_where_the_output_shares_them(tied):
    model = Model(tied=tied)
    decayed, exempt = decay_groups(model, 0.1, exempt_embeddings=True)
    assert "table.weight" in _names(model, exempt)
    assert ("head.weight" in _names(model, decayed)) == (not tied)
    _assert_each_trainable_once(model, [decayed, exempt])


def test_frozen_parameters_are_in_no_group():
    model = Model()
    model.table.weight.requires_grad_(False)
    _assert_each_trainable_once(model, decay_groups(model, 0.1))


def test_a_group_without_parameters_is_left_out():
    assert len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


def test_exempt_parameters_stay_where_the_others_shrink():
    model = Model()
    optimizer = AdamW(decay_groups(model, 0.5), lr=0.1)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(model.table.weight.detach(), 0.95 * before["table.weight"])
    assert torch.equal(model.norm.weight.detach(), before["norm.weight"])


@pytest.mark.bad_input
def test_decay_is_checked():
    with pytest.raises(ValueError, match=r"weight_decay must not be negative; got -0\.1"):
        decay_groups(Model(), -0.1)


# layers


def _layers(model):
    return [model.table, *model.blocks, [model.norm, model.head]]


def test_each_layer_learns_at_a_fixed_share_of_the_next_ones_rate():
    model = Model(tied=False)
    groups = layerwise_groups(model, _layers(model), lr=0.8, decay=0.5)
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.4, 0.8]
    assert _names(model, groups[3]) == {"norm.weight", "head.weight"}
    _assert_each_trainable_once(model, groups)


def test_a_shared_parameter_learns_at_its_lowest_rate():
    model = Model(tied=True)
    groups = layerwise_groups(model, _layers(model), lr=0.8, decay=0.5)
    assert "table.weight" in _names(model, groups[0])
    assert _names(model, groups[3]) == {"norm.weight"}
    _assert_each_trainable_once(model, groups)


def test_a_frozen_layer_counts_but_has_no_group():
    model = Model(tied=False)
    model.blocks[0].requires_grad_(False)
    groups = layerwise_groups(model, _layers(model), lr=0.8, decay=0.5)
    assert [group["lr"] for group in groups] == [0.1, 0.4, 0.8]


def test_without_decay_all_layers_learn_alike():
    model = Model()
    groups = layerwise_groups(model, _layers(model), lr=0.3, decay=1.0)
    assert {group["lr"] for group in groups} == {0.3}


def test_layers_may_be_split_into_what_decays_and_what_does_not():
    model = Model(tied=False)
    layers = layerwise_groups(model, _layers(model), lr=0.8, decay=0.5)
    groups = decay_groups(model, 0.1, groups=layers)
    rates = [(group["lr"], group["weight_decay"]) for group in groups]
    split = [(rate, decay) for rate in (0.2, 0.4, 0.8) for decay in (0.1, 0.0)]
    assert rates == [(0.1, 0.1), *split]
    _assert_each_trainable_once(model, groups)
    assert [group["lr"] for group in AdamW(groups).param_groups] == [rate for rate, _ in rates]


@pytest.mark.bad_input
def test_a_parameter_in_no_layer_is_named():
    model = Model(tied=False)
    with pytest.raises(ValueError, match=r"every trainable parameter; got none with \['head.w"):
        layerwise_groups(model, [model.table, *model.blocks, model.norm], lr=0.1, decay=0.5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0, "decay": 0.5}, r"lr must not be negative; got -1\.0"),
        ({"lr": 1.0, "decay": 0.0}, r"decay must be positive; got 0\.0"),
        ({"lr": 1.0, "decay": 1.5}, r"decay must lie in \[0, 1\]; got 1\.5"),
    ],
)
def test_settings_of_layers_are_checked(settings, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        layerwise_groups(model, _layers(model), **settings)


# matrices


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_of_hidden_layers_are_for_muon(tied):
    model = Model(tied=tied)
    matrices, rest = matrix_groups(model, outputs=[model.head], companion={"lr": 3e-4})
    assert _names(model, matrices) == {"blocks.0.1.weight", "blocks.1.1.weight"}
    assert rest["companion"] is True and rest["lr"] == 3e-4 and "companion" not in matrices
    _assert_each_trainable_once(model, [matrices, rest])


def test_muon_takes_the_groups_and_those_split_for_decay():
    model = Model()
    groups = matrix_groups(model, outputs=[model.head], companion={"lr": 3e-4})
    optimizer = Muon(decay_groups(model, 0.1, groups=groups), lr=0.02)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    names = [set(optimizer.state[group["params"][0]]) for group in optimizer.param_groups]
    assert ["momentum_buffer" in held for held in names] == [True, False, False]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


@pytest.mark.bad_input
def test_the_companion_needs_a_rate():
    with pytest.raises(ValueError, match=r"companion must hold an lr; got \['betas'\]"):
        matrix_groups(Model(), outputs=[], companion={"betas": (0.9, 0.95)})
