"""Losses against the packages that people use them from: TRL, Transformers, entmax and more.

TRL's formulas are methods of its trainers, which want models, data and a disk. They are called
here with just the settings that they read. The packages are loaded once; that takes half a minute.
Contrastive losses are compared with sentence-transformers, pytorch-metric-learning,
info-nce-pytorch and the models of Transformers.
"""

import itertools
import math
import os
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lmlosses import (
    cdpo_loss,
    clip_fraction,
    completion_loss,
    dapo_loss,
    dpo_loss,
    dr_grpo_loss,
    entmax15,
    grpo_loss,
    gspo_loss,
    ipo_loss,
    kl_k3,
    kto_loss,
    masked_sum,
    mlm_loss,
    orpo_loss,
    sequence_mean,
    simpo_loss,
    span_extraction_loss,
    sparsemax,
    token_classification_loss,
    token_mean,
    token_stats,
)
from lmlosses.losses import (
    clip_loss,
    in_batch_info_nce,
    info_nce,
    nt_xent,
    siglip_loss,
    supervised_contrastive,
    triplet_loss,
)

DTYPES = [torch.float64, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def peers():
    """The functions of other packages, loaded without a look at the network or their warnings."""
    offline = pytest.MonkeyPatch()
    offline.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import entmax
        from transformers.loss import loss_utils
        from trl.experimental.cpo.cpo_trainer import CPOTrainer
        from trl.experimental.kto.kto_trainer import KTOTrainer
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.utils import selective_log_softmax
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    yield SimpleNamespace(
        entmax=entmax, hf=loss_utils, selective_log_softmax=selective_log_softmax,
        dpo=DPOTrainer, grpo=GRPOTrainer, cpo=CPOTrainer, kto=KTOTrainer, orpo=ORPOTrainer,
    )  # fmt: skip
    offline.undo()


def _close(ours, theirs, inputs=(), *, steps=32):
    """Values and gradients equal to some rounding steps of the largest entry."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    pairs = [(ours, theirs)]
    if wanted:
        gradients = [torch.autograd.grad(loss.sum(), wanted) for loss in (ours, theirs)]
        pairs += list(zip(*gradients, strict=True))
    for mine, its in pairs:
        step = torch.finfo(its.dtype).eps * max(its.detach().abs().max().item(), 1.0)
        torch.testing.assert_close(mine, its, rtol=0, atol=steps * step)


def _logps(count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = -30 * torch.rand(count, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def _pairs(dtype):
    return [_logps(9, dtype, seed) for seed in range(4)]


# preference losses


def _trl_dpo(peers, kind, pairs, *, beta, label_smoothing=0.0):
    settings = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), reference_free=False, f_divergence_type=None,
        f_divergence_params=None, beta=beta, label_smoothing=label_smoothing,
    )  # fmt: skip
    return peers.dpo.dpo_loss(settings, *pairs, kind)[0]


@every_dtype
def test_dpo_and_ipo_are_trls(peers, dtype):
    pairs = _pairs(dtype)
    _close(dpo_loss(*pairs, beta=0.3), _trl_dpo(peers, "sigmoid", pairs, beta=0.3), pairs[:2])
    _close(ipo_loss(*pairs, beta=0.3), _trl_dpo(peers, "ipo", pairs, beta=0.3), pairs[:2])
    smoothed = _trl_dpo(peers, "sigmoid", pairs, beta=0.3, label_smoothing=0.1)
    _close(cdpo_loss(*pairs, beta=0.3, label_smoothing=0.1), smoothed, pairs[:2])


@every_dtype
@pytest.mark.parametrize("shift", [-2.0, 1.5])
def test_kto_is_trls(peers, dtype, shift):
    chosen, rejected, ref_chosen, ref_rejected = _pairs(dtype)
    settings = SimpleNamespace(
        calculate_KL=True, loss_type="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
    )  # fmt: skip
    kl = torch.full((1,), shift, dtype=dtype)
    theirs = peers.kto.kto_loss(
        settings, chosen, rejected, kl, ref_chosen, ref_rejected, torch.zeros_like(kl)
    )[0]
    desirable = torch.arange(18) < 9
    ours = kto_loss(
        torch.cat([chosen, rejected]), torch.cat([ref_chosen, ref_rejected]), desirable,
        max(shift, 0.0), beta=0.2, desirable_weight=1.5, undesirable_weight=0.5,
    )  # fmt: skip
    _close(ours, theirs, [chosen, rejected])


@every_dtype
def test_orpo_and_simpo_are_trls(peers, dtype):
    chosen, rejected = _logps(9, dtype, 0), _logps(9, dtype, 1)
    on_cpu = SimpleNamespace(device="cpu")
    theirs = peers.orpo.odds_ratio_loss(
        SimpleNamespace(beta=1.0, accelerator=on_cpu), chosen, rejected
    )[0]
    # TRL returns the logarithm of a sigmoid, to be subtracted
    _close(orpo_loss(chosen, rejected), -theirs, [chosen, rejected])
    settings = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.0, label_smoothing=0.0,
        accelerator=on_cpu,
    )  # fmt: skip
    theirs = peers.cpo.cpo_loss(settings, chosen, rejected)[0]
    _close(simpo_loss(chosen, rejected, beta=2.0, gamma=0.7), theirs, [chosen, rejected])


# policy losses


def _batch(dtype):
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(5, 7, generator=generator, dtype=torch.float64)
    logps = old + 0.4 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 6, 2]).unsqueeze(1)
    return logps.to(dtype).requires_grad_(), old.to(dtype), advantages.to(dtype), mask


def _trl_grpo(peers, kind, batch, *, level="token", high=0.2, ref_logps=None, beta=0.0):
    logps, old_logps, advantages, mask = batch
    metrics = defaultdict(lambda: defaultdict(list))
    settings = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps)),
        top_entropy_quantile=1.0, importance_sampling_level=level, beta=beta, loss_type=kind,
        epsilon_low=0.2, epsilon_high=high, tools=None, use_vllm=False, _metrics=metrics,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        max_completion_length=11,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda value: value.reshape(-1)),
    )  # fmt: skip
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1].long(), "completion_ids": ids,
        "completion_mask": mask.to(logps.dtype), "advantages": advantages,
        "old_per_token_logps": old_logps, "ref_per_token_logps": ref_logps,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = peers.grpo._compute_loss(settings, None, inputs)
    return loss, metrics["train"]


@every_dtype
def test_grpo_dapo_dr_grpo_and_gspo_are_trls(peers, dtype):
    batch = _batch(dtype)
    logps, mask = batch[0], batch[3]
    theirs, metrics = _trl_grpo(peers, "grpo", batch)
    _close(grpo_loss(*batch), theirs, [logps])
    per_token = batch[2].unsqueeze(1).expand_as(logps)
    (share,) = metrics["clip_ratio/region_mean"]
    assert 0 < share < 1
    assert clip_fraction(logps, batch[1], per_token, mask).item() == pytest.approx(share)
    _close(dapo_loss(*batch), _trl_grpo(peers, "dapo", batch, high=0.28)[0], [logps])
    theirs = _trl_grpo(peers, "dr_grpo", batch)[0]
    _close(dr_grpo_loss(*batch, length=11), theirs, [logps])
    theirs = _trl_grpo(peers, "grpo", batch, level="sequence")[0]
    _close(token_mean(gspo_loss(*batch, clip=0.2)), theirs, [logps])


@every_dtype
def test_grpo_with_a_price_of_divergence_is_trls(peers, dtype):
    batch = _batch(dtype)
    logps, old_logps, _, mask = batch
    reference = old_logps.flip(1)
    ours = grpo_loss(*batch) + 0.3 * sequence_mean(kl_k3(logps, reference, mask), mask)
    theirs = _trl_grpo(peers, "grpo", batch, ref_logps=reference, beta=0.3)[0]
    _close(ours, theirs, [logps])


@every_dtype
def test_log_probabilities_are_trls(peers, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 4, 50, generator=generator, dtype=torch.float64)
    logits = logits.to(dtype).requires_grad_()
    targets = torch.randint(50, (3, 4), generator=generator)
    theirs = peers.selective_log_softmax(logits, targets)
    _close(token_stats(logits, targets).logps, theirs, [logits])


# losses of Transformers' models, which compute in single precision


@pytest.fixture
def language():
    """Logits, tokens, what counts of them, and tokens with -100 where they do not."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 6, 20, generator=generator)).requires_grad_()
    tokens = torch.randint(20, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.5
    return logits, tokens, mask, tokens.masked_fill(~mask, -100)


def test_completion_loss_is_that_of_transformers_causal_models(peers, language):
    logits, tokens, mask, labels = language
    losses = completion_loss(logits, tokens, mask)
    _close(token_mean(*losses), peers.hf.ForCausalLMLoss(logits, labels, 20), [logits])
    # under gradient accumulation both divide by the count of the whole batch
    theirs = peers.hf.ForCausalLMLoss(logits, labels, 20, num_items_in_batch=torch.tensor(50))
    _close(masked_sum(*completion_loss(logits, tokens, mask)) / 50, theirs, [logits])


def test_mlm_and_token_classification_are_those_of_transformers(peers, language):
    logits, tokens, mask, labels = language
    theirs = peers.hf.ForMaskedLMLoss(logits, labels, 20)
    _close(token_mean(*mlm_loss(logits, tokens, mask)), theirs, [logits])
    config = SimpleNamespace(num_labels=20)
    theirs = peers.hf.ForTokenClassification(logits, labels, config)
    _close(token_mean(*token_classification_loss(logits, tokens, mask)), theirs, [logits])


def test_span_extraction_is_that_of_transformers(peers, language):
    logits = language[0][:, :, 0], language[0][:, :, 1]
    ends = torch.tensor([0, 3, 5]), torch.tensor([2, 3, 5])
    theirs = peers.hf.ForQuestionAnsweringLoss(*logits, *ends)
    ours = span_extraction_loss(*logits, *ends, torch.ones(3, 6, dtype=torch.bool))
    _close(ours.mean(), theirs, [language[0]])


# normalizers


@every_dtype
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_sparsemax_and_entmax_are_those_of_entmax(peers, dtype, scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(20, 11, generator=generator, dtype=torch.float64)
    logits = logits.to(dtype).requires_grad_()
    weights = torch.randn(20, 11, generator=generator, dtype=torch.float64).to(dtype)
    for ours, theirs in ((sparsemax, peers.entmax.sparsemax), (entmax15, peers.entmax.entmax15)):
        # theirs subtracts logits of up to `scale` times 4 from sums of eleven of them
        steps = 64 * max(scale, 1.0)
        _close(weights * ours(logits), weights * theirs(logits), [logits], steps=steps)


# contrastive losses


@pytest.fixture(scope="module")
def contrastive():
    """Contrastive losses of other packages, loaded in the same way."""
    offline = pytest.MonkeyPatch()
    offline.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import info_nce as info_nce_pytorch
        from pytorch_metric_learning import distances, losses, reducers
        from sentence_transformers.sentence_transformer import losses as sentence_losses
        from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
    yield SimpleNamespace(
        info_nce=info_nce_pytorch.info_nce, sentences=sentence_losses, metric=losses,
        distances=distances, reducers=reducers,
        models={"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)},
    )  # fmt: skip
    offline.undo()


def _vectors(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


@every_dtype
def test_info_nce_is_that_of_info_nce_pytorch(contrastive, dtype):
    queries, positives, shared, own = _vectors((5, 8), (5, 8), (7, 8), (5, 7, 8), dtype=dtype)
    for negatives, mode in ((shared, "unpaired"), (own, "paired")):
        theirs = contrastive.info_nce(
            queries, positives, negatives, temperature=0.2, reduction="none", negative_mode=mode
        )
        ours = info_nce(queries, positives, negatives, temperature=0.2)
        _close(ours, theirs, [queries, positives, negatives])
    theirs = contrastive.info_nce(queries, positives, temperature=0.2, reduction="none")
    _close(in_batch_info_nce(queries, positives, temperature=0.2), theirs, [queries, positives])


@every_dtype
def test_in_batch_losses_are_those_of_sentence_transformers(contrastive, dtype):
    queries, keys, negatives = _vectors((5, 8), (5, 8), (5, 8), dtype=dtype)
    ranking = contrastive.sentences.MultipleNegativesRankingLoss
    for columns in ((queries, keys), (queries, keys, negatives)):
        theirs = ranking(None, scale=20.0).compute_loss_from_embeddings(list(columns), None)
        _close(in_batch_info_nce(*columns, temperature=0.05).mean(), theirs, columns)
        # each direction with a softmax of its own, and hard negatives among the documents only
        both = ranking(
            None, scale=20.0, partition_mode="per_direction",
            directions=("query_to_doc", "doc_to_query"),
        ).compute_loss_from_embeddings(list(columns), None)  # fmt: skip
        ours = in_batch_info_nce(*columns, temperature=0.05, symmetric=True)
        _close(ours.mean(), both, columns)


def _small_model(contrastive, kind):
    """A model of Transformers of a few random numbers, and what it makes of five pairs."""
    config, model = contrastive.models[kind]
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_size": 16,
    }  # fmt: skip
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 6, "projection_dim": 8}
    vision = {**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    settings = {"projection_dim": 8} if kind == "clip" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = model(config(text_config=text, vision_config=vision, **settings)).eval()
        ids, pixels = torch.randint(20, (5, 6)), torch.randn(5, 3, 8, 8)
    ids[:, -1] = 19
    with torch.no_grad():
        return built, built(input_ids=ids, pixel_values=pixels, return_loss=True)


def test_clip_and_siglip_losses_are_those_of_transformers_models(contrastive):
    model, found = _small_model(contrastive, "clip")
    temperature = (-model.logit_scale).exp().detach()
    ours = clip_loss(found.image_embeds, found.text_embeds, temperature=temperature)
    _close(ours.mean(), found.loss, steps=64)
    model, found = _small_model(contrastive, "siglip")
    temperature = (-model.logit_scale).exp().squeeze().detach()
    bias = model.logit_bias.squeeze().detach()
    ours = siglip_loss(found.image_embeds, found.text_embeds, temperature=temperature, bias=bias)
    # theirs has a row for each text; the mean is over all pairs either way
    _close(ours.mean(), found.loss, steps=64)


@every_dtype
def test_nt_xent_is_that_of_pytorch_metric_learning(contrastive, dtype):
    first, second = _vectors((5, 8), (5, 8), dtype=dtype)
    wrapped = contrastive.metric.SelfSupervisedLoss(contrastive.metric.NTXentLoss(temperature=0.3))
    _close(nt_xent(first, second, temperature=0.3).mean(), wrapped(first, second), [first, second])


@every_dtype
def test_with_more_than_two_of_a_label_their_nt_xent_is_info_nce_of_each_positive(
    contrastive, dtype
):
    """Other positives are no candidates there, unlike in SimCLR's and the supervised formula."""
    (embeddings,) = _vectors((7, 8), dtype=dtype)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0])
    theirs = contrastive.metric.NTXentLoss(temperature=0.3)(embeddings, labels)
    pairs = [(i, p) for i, p in itertools.permutations(range(7), 2) if labels[i] == labels[p]]
    losses = [
        info_nce(embeddings[i], embeddings[p], embeddings[labels != labels[i]], temperature=0.3)
        for i, p in pairs
    ]
    ours = torch.stack(losses).mean()
    _close(ours, theirs, [embeddings])
    assert ours < token_mean(*supervised_contrastive(embeddings, labels, temperature=0.3))


def test_their_nt_xent_stops_at_87_nats_and_learns_nothing_there(contrastive):
    """They add the least positive number to a probability before its logarithm is taken."""
    first = torch.tensor([[1.0, 0.2], [-1.0, 0.0]], requires_grad=True)
    second = torch.tensor([[-1.0, 0.1], [1.0, 0.1]])
    wrapped = contrastive.metric.SelfSupervisedLoss(
        contrastive.metric.NTXentLoss(temperature=0.01)
    )
    theirs, ours = wrapped(first, second), nt_xent(first, second, temperature=0.01).mean()
    least = -math.log(torch.finfo(torch.float32).tiny)
    assert theirs.item() == pytest.approx(least) and ours.item() > 190
    assert (torch.autograd.grad(theirs, first)[0] == 0).all()
    assert (torch.autograd.grad(ours, first)[0] != 0).any()


@every_dtype
def test_supervised_contrastive_is_that_of_pytorch_metric_learning(contrastive, dtype):
    (embeddings,) = _vectors((7, 8), dtype=dtype)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0])  # one is alone
    theirs = contrastive.metric.SupConLoss(temperature=0.3)
    ours = token_mean(*supervised_contrastive(embeddings, labels, temperature=0.3))
    _close(ours, theirs(embeddings, labels), [embeddings])
    # with one label in the batch the formula holds too, and theirs gives up
    ours = token_mean(*supervised_contrastive(embeddings, torch.zeros(7, dtype=torch.long)))
    assert ours > math.log(6) and theirs(embeddings, torch.zeros(7, dtype=torch.long)) == 0


@every_dtype
def test_triplets_are_those_of_pytorch_metric_learning(contrastive, dtype):
    (embeddings,) = _vectors((6, 8), dtype=dtype)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    places = [
        (a, p, n)
        for a, p, n in itertools.product(range(6), repeat=3)
        if a != p and labels[a] == labels[p] and labels[a] != labels[n]
    ]
    columns = [list(place) for place in zip(*places, strict=True)]
    distances = {
        "euclidean": contrastive.distances.LpDistance(normalize_embeddings=False),
        "squared": contrastive.distances.LpDistance(normalize_embeddings=False, power=2),
        "cosine": contrastive.distances.CosineSimilarity(),
    }
    for name, distance in distances.items():
        settings = {"margin": 0.3, "distance": distance}
        triplets = [embeddings[column] for column in columns]
        losses = triplet_loss(*triplets, margin=0.3, distance=name)
        theirs = contrastive.metric.TripletMarginLoss(
            **settings, reducer=contrastive.reducers.MeanReducer()
        )
        # their squared distances of up to 40 are rounded before they are subtracted
        _close(losses.mean(), theirs(embeddings, labels), [embeddings], steps=256)
        # unless told so they average over those that are violated, which grow fewer
        theirs = contrastive.metric.TripletMarginLoss(**settings)
        assert (losses == 0).any()
        _close(losses[losses > 0].mean(), theirs(embeddings, labels), steps=256)
