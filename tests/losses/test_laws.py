"""What every loss and normalizer promises, whatever it computes: one table, many laws."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lmlosses import losses, normalizers, token_stats
from lmlosses.losses import (
    classification,
    contrastive,
    distillation,
    divergence,
    in_batch,
    language,
    masked,
    next_token,
    policy,
    preference,
    ranking,
    regression,
    reward,
    tasks,
)

CLASSES = 5
MODULES = (
    *(classification, contrastive, distillation, divergence, in_batch, language, masked),
    next_token,
    *(policy, preference, ranking, regression, reward, tasks),
)


class Case(NamedTuple):
    """A loss, and what its arguments look like for a given batch shape."""

    function: Callable[..., Tensor]
    kinds: tuple[str, ...]


def _argument(kind: str, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if kind == "real":
        return 2 * torch.randn(batch, generator=generator, dtype=torch.float64)
    if kind == "row":
        return 2 * torch.randn((*batch, CLASSES), generator=generator, dtype=torch.float64)
    if kind == "flat":
        return torch.randn(math.prod(batch), generator=generator, dtype=torch.float64)
    if kind == "negative":
        return -0.1 - 3 * torch.rand(batch, generator=generator, dtype=torch.float64)
    if kind == "unit":
        return torch.rand(batch, generator=generator, dtype=torch.float64)
    if kind == "index":
        return torch.randint(CLASSES, batch, generator=generator)
    assert kind == "sign"
    return torch.randint(2, batch, generator=generator) * 2 - 1


def _arguments(
    case: Case, batch: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [_argument(kind, batch, generator) for kind in case.kinds]
    return [value.to(dtype) if value.is_floating_point() else value for value in drawn]


def _teacher(logits: Tensor) -> Tensor:
    """Logits of a teacher, which are constants to a student's loss."""
    ramp = torch.arange(CLASSES, dtype=logits.dtype, device=logits.device)
    return (0.5 * ramp).expand(logits.shape)


# called as they are, on numbers that need no preparation
PLAIN = {
    "squared_error": Case(losses.squared_error, ("real", "real")),
    "half_squared_error": Case(losses.half_squared_error, ("real", "real")),
    "absolute_error": Case(losses.absolute_error, ("real", "real")),
    "huber": Case(losses.huber, ("real", "real")),
    "log_cosh": Case(losses.log_cosh, ("real", "real")),
    "quantile_loss": Case(
        lambda prediction, target: losses.quantile_loss(prediction, target, quantile=0.8),
        ("real", "real"),
    ),
    "gaussian_nll": Case(losses.gaussian_nll, ("real", "real", "real")),
    "laplace_nll": Case(losses.laplace_nll, ("real", "real", "real")),
    "cross_entropy": Case(losses.cross_entropy, ("row", "index")),
    "smoothed cross_entropy": Case(
        lambda logits, target: losses.cross_entropy(
            logits,
            target,
            label_smoothing=0.1,
            weight=torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], device=logits.device),
        ),
        ("row", "index"),
    ),
    "binary_cross_entropy": Case(losses.binary_cross_entropy, ("real", "unit")),
    "weighted binary_cross_entropy": Case(
        lambda logits, target: losses.binary_cross_entropy(logits, target, pos_weight=3.0),
        ("real", "unit"),
    ),
    "zero_one": Case(losses.zero_one, ("row", "index")),
    "focal": Case(losses.focal, ("row", "index")),
    "focal with gamma 0.5": Case(
        lambda logits, target: losses.focal(logits, target, gamma=0.5), ("row", "index")
    ),
    "binary_focal": Case(
        lambda logits, target: losses.binary_focal(logits, target, alpha=0.25), ("real", "unit")
    ),
    "hinge": Case(losses.hinge, ("real", "unit")),
    "multiclass_hinge": Case(losses.multiclass_hinge, ("row", "index")),
    "pairwise_auc": Case(losses.pairwise_auc, ("flat", "flat")),
    "margin_ranking": Case(
        lambda first, second, target: losses.margin_ranking(
            first, second, target.to(first.dtype), margin=0.5
        ),
        ("real", "real", "sign"),
    ),
    "listnet": Case(losses.listnet, ("row", "row")),
    "dpo_loss": Case(losses.dpo_loss, ("real", "real", "real", "real")),
    "cdpo_loss": Case(
        lambda *logps: losses.cdpo_loss(*logps, label_smoothing=0.1),
        ("real", "real", "real", "real"),
    ),
    "ipo_loss": Case(losses.ipo_loss, ("real", "real", "real", "real")),
    "kto_loss": Case(
        lambda logps, ref_logps, sign: losses.kto_loss(logps, ref_logps, sign > 0, 0.3),
        ("real", "real", "sign"),
    ),
    "orpo_loss": Case(losses.orpo_loss, ("negative", "negative")),
    "simpo_loss": Case(
        lambda *logps: losses.simpo_loss(*logps, gamma=0.5), ("negative", "negative")
    ),
    "implicit_reward": Case(
        lambda *logps: losses.implicit_reward(*logps, beta=0.5), ("real", "real")
    ),
    "bradley_terry_loss": Case(losses.bradley_terry_loss, ("real", "real")),
    "plackett_luce_loss": Case(losses.plackett_luce_loss, ("row",)),
    "pairwise_ranking_loss": Case(losses.pairwise_ranking_loss, ("row",)),
    "kl_k1": Case(losses.kl_k1, ("real", "real")),
    "kl_k2": Case(losses.kl_k2, ("real", "real")),
    "kl_k3": Case(losses.kl_k3, ("real", "real")),
    # what is constant in a policy loss is given as such
    "reinforce_loss": Case(
        lambda logps: losses.reinforce_loss(logps, torch.full_like(logps, 1.5)), ("real",)
    ),
    "ppo_clip_loss": Case(
        lambda logps: losses.ppo_clip_loss(
            logps, torch.zeros_like(logps), torch.full_like(logps, -1.5)
        ),
        ("real",),
    ),
    "value_clip_loss": Case(
        lambda values: losses.value_clip_loss(
            values, torch.zeros_like(values), torch.ones_like(values), clip=0.5
        ),
        ("real",),
    ),
    "distillation_loss": Case(
        lambda z: losses.distillation_loss(z, _teacher(z), temperature=2.0), ("row",)
    ),
    "reverse_distillation_loss": Case(
        lambda z: losses.reverse_distillation_loss(z, _teacher(z), temperature=2.0), ("row",)
    ),
    "js_distillation_loss": Case(
        lambda z: losses.js_distillation_loss(z, _teacher(z), temperature=2.0), ("row",)
    ),
    "sequence_classification_loss": Case(losses.sequence_classification_loss, ("row", "index")),
    "softmax": Case(lambda z: normalizers.softmax(z, temperature=0.7), ("row",)),
    "log_softmax": Case(lambda z: normalizers.log_softmax(z, temperature=0.7), ("row",)),
    "softmax_jacobian": Case(lambda z: normalizers.softmax_jacobian(z, temperature=0.7), ("row",)),
}

# composed, with a normalization or with statistics, so that any real numbers make valid arguments
COMPOSED = {
    "cross_entropy of probabilities": Case(
        lambda z, t: losses.cross_entropy(z, t.softmax(-1), label_smoothing=0.1), ("row", "row")
    ),
    "token_cross_entropy": Case(
        lambda z, target: losses.token_cross_entropy(
            token_stats(z, target, mean_logp=True), label_smoothing=0.1, z_loss=0.2
        ),
        ("row", "index"),
    ),
    "z_loss": Case(lambda z, target: losses.z_loss(token_stats(z, target)), ("row", "index")),
    "kl_regularized_objective": Case(
        lambda z, ref, rewards: losses.kl_regularized_objective(
            z.log_softmax(-1), ref.log_softmax(-1), rewards, beta=0.5
        ),
        ("row", "row", "row"),
    ),
    "optimal_policy": Case(
        lambda ref, rewards: losses.optimal_policy(ref.log_softmax(-1), rewards, beta=0.5),
        ("row", "row"),
    ),
    "brier": Case(lambda z, target: losses.brier(z.softmax(-1), target), ("row", "index")),
    "brier of probabilities": Case(
        lambda z, t: losses.brier(z.softmax(-1), t.softmax(-1)), ("row", "row")
    ),
    "entropy": Case(lambda z: losses.entropy(z.log_softmax(-1)), ("row",)),
    "kl_divergence": Case(
        lambda p, q: losses.kl_divergence(p.log_softmax(-1), q.log_softmax(-1)), ("row", "row")
    ),
    "js_divergence": Case(
        lambda p, q: losses.js_divergence(p.log_softmax(-1), q.log_softmax(-1)), ("row", "row")
    ),
}

# they want a time axis, or return a scalar, or values with their mask: laws of their own in the
# tests of their modules
ELSEWHERE = {
    "linear_cross_entropy",
    *("NextTokens", "next_tokens", "causal_lm_loss", "padded_lm_loss"),
    *("completion_loss", "prefix_lm_loss", "denoising_loss"),
    *("mlm_loss", "span_mlm_loss", "whole_word_mlm_loss"),
    *("token_classification_loss", "span_extraction_loss"),
    *("clip_fraction", "grpo_loss", "dapo_loss", "dr_grpo_loss", "gspo_loss"),
    *("info_nce", "triplet_loss", "mutual_information_bound", "alignment", "uniformity"),
    *("in_batch_info_nce", "clip_loss", "nt_xent", "siglip_loss", "supervised_contrastive"),
}

EVERY = PLAIN | COMPOSED
NAMES = sorted(EVERY)
DIFFERENTIABLE = sorted(set(NAMES) - {"zero_one"})


def _scalar(case: Case, arguments: list[Tensor]) -> Tensor:
    """A sum with uneven weights, so that no gradient is that of a plain mean by luck."""
    values = case.function(*arguments)
    weights = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype, device=values.device)
    return (values.reshape(-1) * weights).sum()


def _track(arguments: list[Tensor]) -> list[Tensor]:
    for argument in arguments:
        argument.requires_grad_(argument.is_floating_point())
    return [argument for argument in arguments if argument.requires_grad]


def test_every_exported_loss_is_in_the_table():
    listed = {word for name in NAMES for word in name.split()}
    assert set(losses.__all__) - ELSEWHERE <= listed
    assert not ELSEWHERE & listed


def test_the_package_exports_what_its_modules_define():
    public = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    assert sorted(public) == losses.__all__


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_derivatives_match_finite_differences(name):
    arguments = _arguments(EVERY[name], (3,), seed=1)
    _track(arguments)
    assert torch.autograd.gradcheck(EVERY[name].function, arguments)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_match_finite_differences(name):
    arguments = _arguments(EVERY[name], (2,), seed=1)
    _track(arguments)
    assert torch.autograd.gradgradcheck(EVERY[name].function, arguments)


@pytest.mark.parametrize("name", sorted(PLAIN))
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_and_returned_in_float32(name, half):
    arguments = _arguments(PLAIN[name], (4, 3), dtype=half)
    exact = PLAIN[name].function(
        *(value.double() if value.is_floating_point() else value for value in arguments)
    )
    result = PLAIN[name].function(*arguments)
    assert result.dtype == torch.float32
    # float32 keeps seven digits; a step taken in half precision would keep three
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"zero_one"}))
def test_half_precision_arguments_receive_half_precision_gradients(name):
    arguments = _arguments(PLAIN[name], (4, 3), dtype=torch.bfloat16)
    tracked = _track(arguments)
    gradients = torch.autograd.grad(_scalar(PLAIN[name], arguments), tracked)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_single_and_double_precision_are_kept(name, dtype):
    assert EVERY[name].function(*_arguments(EVERY[name], (2,), dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "name", [name for name in sorted(PLAIN) if PLAIN[name].kinds[1:2] not in ((), ("index",))]
)
def test_of_two_precisions_the_finer_is_used(name):
    arguments = _arguments(PLAIN[name], (2,), dtype=torch.float32)
    arguments[1] = arguments[1].double()
    assert PLAIN[name].function(*arguments).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name):
    arguments = _arguments(EVERY[name], (4, 3))
    # every other element of a tensor whose rest is poison
    poison = {True: math.nan, False: -(2**62)}
    strided = [
        torch.stack([value, torch.full_like(value, poison[value.is_floating_point()])], -1)[..., 0]
        for value in arguments
    ]
    assert not any(value.is_contiguous() for value in strided)
    torch.testing.assert_close(
        EVERY[name].function(*strided), EVERY[name].function(*arguments), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_gives_an_empty_result_and_empty_gradients(name):
    arguments = _arguments(EVERY[name], (0,), dtype=torch.float32)
    tracked = _track(arguments)
    values = EVERY[name].function(*arguments)
    assert values.numel() == 0 and values.shape[0] == 0
    if name in DIFFERENTIABLE:
        gradients = torch.autograd.grad(values.sum(), tracked)
        assert [gradient.shape for gradient in gradients] == [value.shape for value in tracked]


@pytest.mark.parametrize("name", NAMES)
def test_one_value_per_entry_of_any_batch(name):
    arguments = _arguments(EVERY[name], (4, 3))
    values = EVERY[name].function(*arguments)
    if name == "pairwise_auc":
        assert values.shape == (12, 12)
    else:
        assert values.shape[:2] == (4, 3)
        single = EVERY[name].function(*(value[2, 1] for value in arguments))
        torch.testing.assert_close(values[2, 1], single)


@pytest.mark.parametrize("name", NAMES)
def test_runs_forward_and_backward_without_reading_a_value(name):
    arguments = [value.to("meta") for value in _arguments(EVERY[name], (4, 3), torch.float32)]
    tracked = _track(arguments)
    values = EVERY[name].function(*arguments)
    assert values.device.type == "meta"
    if name in DIFFERENTIABLE:
        gradients = torch.autograd.grad(_scalar(EVERY[name], arguments), tracked)
        assert [gradient.shape for gradient in gradients] == [value.shape for value in tracked]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_never_waits_for_the_gpu_and_agrees_with_the_cpu(name):
    arguments = _arguments(EVERY[name], (4, 3))
    expected = EVERY[name].function(*arguments).cuda()
    moved = [value.cuda() for value in arguments]
    tracked = _track(moved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = EVERY[name].function(*moved)
        if name in DIFFERENTIABLE:
            torch.autograd.grad(values.sum(), tracked)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"pairwise_auc"}))
def test_vmap_over_samples_is_the_batched_call(name):
    arguments = _arguments(EVERY[name], (4,))
    torch.testing.assert_close(
        torch.func.vmap(EVERY[name].function)(*arguments), EVERY[name].function(*arguments)
    )


# torch's own forward-mode rules are written with its own deprecated torch.jit.script
@pytest.mark.filterwarnings("ignore:`torch.jit.script` :DeprecationWarning")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functional_derivatives_agree_with_autograd(name):
    arguments = _arguments(EVERY[name], (3,))

    def scalar(first):
        return _scalar(EVERY[name], [first, *arguments[1:]])

    torch.testing.assert_close(
        torch.func.hessian(scalar)(arguments[0]),
        torch.autograd.functional.hessian(scalar, arguments[0]),
    )
    tracked = arguments[0].clone().requires_grad_()
    torch.testing.assert_close(
        torch.func.grad(scalar)(arguments[0]), torch.autograd.grad(scalar(tracked), tracked)[0]
    )


@pytest.mark.skipif(
    hasattr(losses.huber, "__wrapped__"),
    reason="a type checker around a function cannot be traced",
)
@pytest.mark.parametrize(
    "name", ["huber", "smoothed cross_entropy", "softmax", "kl_divergence", "margin_ranking"]
)
def test_compiles_into_one_graph(name):
    arguments = _arguments(EVERY[name], (4,))
    compiled = torch.compile(EVERY[name].function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), EVERY[name].function(*arguments))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_left_as_they_were(name):
    arguments = _arguments(EVERY[name], (4, 3))
    copies = [value.clone() for value in arguments]
    EVERY[name].function(*arguments)
    assert all(torch.equal(value, copy) for value, copy in zip(arguments, copies, strict=True))
