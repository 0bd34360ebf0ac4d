"""Everything that looks at SeqSetVAE from outside.

    python test_suite.py                       runs every test below through pytest
    python test_suite.py --soak                runs the kill and damage tests at length (minutes) and prints their counts
    python test_suite.py --checkpoint C        analyses a finetuned checkpoint on its test split [--baselines]
    python test_suite.py --protocol --data_dir D   measures the tables of README.md: five splits, every method
    python test_suite.py --benchmark [--data_dir D]   measures speed and memory beside a plain loop over single sets
"""

import argparse
import collections
import contextlib
import fcntl
import gzip
import io
import itertools
import json
import multiprocessing
import os
import pickle
import platform
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import (average_precision_score, brier_score_loss, confusion_matrix, f1_score, precision_recall_curve, roc_auc_score,
                             roc_curve)
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from data import (Cohort, EventBatch, InputError, Normalizer, StayDataset, balanced_parts, build_cohort, epoch_batches, group_widths, load_cohort,
                  make_splits, ranges, read_long_table, round_up, sorted_batches, stay_event_index, stays_of, synthetic_cohort, variable_vectors,
                  write_atomically)
from finetune_config import FinetuneConfig, boosted_trees, classification_loss, head_optimizer
from model import (_CHECKPOINT_ENTRIES, _CHECKPOINT_TYPES, BoostedTrees, History, ModelConfig, SeqSetVAE, SeqSetVAEPretrain, SetVAE, checkpoint_config,
                   checkpoint_state, history_statistics, load_backbone, load_checkpoint_weights, load_weights, measurement_grid,
                   original_classifier, read_checkpoint)
from train import (CHECKPOINTS, EVALUATION_BATCH, add_head_options, encode_stays, evaluation_loader, finetune, head_epoch, keep_freed_memory,
                   label_subset, labelled, open_checkpoint, parse_arguments, predict, prepare_head, pretrain, progress, update)

SHARED = Path(train.__file__).resolve().parent.parent / "shared"
CPU = torch.device("cpu")
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

# ----------------------------------------------------------------------------------------------------------------------------------
# A tiny world: stays as plain lists [[(minute, [(variable, value), ...]), ...], ...], seven variables, models of width 16
# ----------------------------------------------------------------------------------------------------------------------------------

NAMES = [f"lab{v}" for v in range(7)]
PLAIN = Normalizer(NAMES, np.zeros(7, np.float32), np.ones(7, np.float32), np.zeros(7, np.float32))  # values as they are


def random_stays(lengths=(1, 4, 9, 6), seed=0):
    """Sets of 1 to 9 events, variables drawn with replacement: multisets."""
    rng = np.random.default_rng(seed)
    return [[(int(minute), [(int(v), float(rng.normal())) for v in rng.integers(0, 7, rng.integers(1, 10))])
             for minute in np.sort(rng.choice(3000, length, replace=False))] for length in lengths]


def cohort_of(stays) -> Cohort:
    events = [(p, minute, v, x) for p, stay in enumerate(stays) for minute, events in stay for v, x in events]
    return build_cohort("handmade", NAMES, *map(np.array, zip(*events)), stay_id=[f"stay{p}" for p in range(len(stays))],
                        label=np.arange(len(stays)) % 2)


def batch_of(stays, max_groups=6) -> EventBatch:
    return StayDataset(cohort_of(stays), PLAIN, max_groups)[np.arange(len(stays))]


def tiny(**changes) -> ModelConfig:
    return ModelConfig(**{**dict(num_variables=7, input_dim=12, reduced_dim=8, set_dim=12, latent_dim=16, set_heads=2, inducing=3, layers=2, heads=2,
                                 ff_dim=24), **changes})


def build(kind, config, seed=1):
    """A model in evaluation mode whose every parameter is off its initial value (a LayerNorm that starts as the identity hides mistakes)."""
    torch.manual_seed(seed)
    model = kind(config, variable_vectors([f"lab{v}" for v in range(config.num_variables)], config.input_dim)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def encoded(model, stays):
    """mu, logvar, h of the sets, [B, L, d], as pretraining computes them."""
    batch = batch_of(stays)
    with torch.no_grad():
        mu, logvar = model.setvae.encode(batch)
        return mu, logvar, model.history(mu, batch.minute)


@pytest.fixture(autouse=True)
def signals_restored():
    """A training run installs handlers of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing that a test reads lands in the project's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_cohort", partial(load_cohort, cache_dir=tmp_path_factory.mktemp("cache")))
        yield


PRETRAIN = ["--mode", "pretrain", "--synthetic_stays", "24", "--device", "cpu", "--max_epochs", "1"]
FINETUNE = ["--mode", "finetune", "--device", "cpu", "--max_epochs", "1", "--pretrained_ckpt"]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """best.pt of one epoch of pretraining, default sizes, through the command line."""
    run = tmp_path_factory.mktemp("runs") / "pretrain"
    assert train.main([*PRETRAIN, "--run_dir", str(run)]) == 0
    return run / "best.pt"


@pytest.fixture(scope="session")
def finetuned(pretrained):
    """best.pt of one epoch of frozen finetuning on it."""
    run = pretrained.parent.parent / "finetune"
    assert train.main([*FINETUNE, str(pretrained), "--run_dir", str(run)]) == 0
    return run / "best.pt"


# ----------------------------------------------------------------------------------------------------------------------------------
# The model against a plain loop: one set, one stay at a time, as the original implementation works; nothing padded, nothing grouped.
# `--benchmark` times it.
# ----------------------------------------------------------------------------------------------------------------------------------

def plain_attention(attention, x, y, bias=None):
    return F.multi_head_attention_forward(x, y, y, x.shape[1], attention.heads, attention.in_proj_weight, attention.in_proj_bias, None, None, False,
                                          0.0, attention.out_proj.weight, attention.out_proj.bias, attn_mask=bias, need_weights=False)[0]


def plain_mab(mab, x, y):
    h = plain_attention(mab.multihead, x, y)
    if not mab.residual:
        return mab.ln2(mab.ff(mab.ln1(h)))
    h = mab.ln1(x + h)
    return mab.ln2(h + mab.ff(h))


def plain_isab(isab, x):
    return plain_mab(isab.mab2, x, plain_mab(isab.mab1, isab.inducing, x))


def plain_points(setvae, events):
    """u_v * value, [n, r], of one set."""
    u = setvae.dim_reducer(setvae.vocabulary[[v for v, _ in events]])
    return u / u.norm(dim=1, keepdim=True) * u.new_tensor([[x] for _, x in events])


def plain_encode(setvae, events):
    x = plain_points(setvae, events)
    if setvae.config.presence:
        x = x + setvae.presence(setvae.vocabulary[[v for v, _ in events]])
    x = setvae.embed(x)
    for isab in setvae.encoder_layers:
        x = x + plain_isab(isab, x)
    mu, logvar = setvae.mu_logvar(x.mean(0)).chunk(2)
    return mu, logvar.clamp(-10, 10)


def plain_sinusoids(x):
    """Of every row's place in x [n, d]: [n, d]."""
    n, d = x.shape
    angle = torch.arange(n, device=x.device)[:, None] / 10000 ** (torch.arange(0, d, 2, device=x.device) / d)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def plain_history(history, z, minutes):
    """z [n, d] of one stay -> h [n, d]."""
    n, d = z.shape
    edges = 10 ** np.linspace(np.log10(0.5), np.log10(1440), 63)
    x = F.layer_norm(z + plain_sinusoids(z) + history.gap_embedding.weight[np.searchsorted(edges, np.diff(minutes, prepend=minutes[0]))], (d,))
    minute = z.new_tensor(minutes)
    bias = -history.slope.abs().view(-1, 1, 1) * torch.log1p((minute[:, None] - minute).abs() / history.tau)
    bias = bias.masked_fill(z.new_ones(n, n).triu(1) > 0, -torch.inf)
    for layer in history.layers:
        y = layer.norm1(x)
        x = x + layer.dropout(plain_attention(layer.self_attn, y, y, bias.expand(layer.self_attn.heads, n, n)))
        x = x + layer.dropout(layer.linear2(layer.dropout(F.gelu(layer.linear1(layer.norm2(x))))))
    return history.norm(x)


def plain_slots(decoder, code, n):
    """n reconstructed points [n, r] from code [d]: learned seeds without their noise, or pure noise."""
    x = code.expand(n, -1)
    for level in decoder.decoder_layers:
        seeds = decoder.seeds(plain_sinusoids(x)) if decoder.seeds else torch.randn(x.shape, device=x.device)
        y = F.relu(level.pma.ff(x + plain_isab(level.isab, x)))
        x = x + seeds + level.pma.ln(plain_mab(level.pma.mab, seeds, y))
    return decoder.out(x)


def plain_chamfer(a, b):
    p, q = a[:, None], b[None]
    cost = 1 - F.cosine_similarity(p, q, dim=2) + (p.norm(dim=2) - q.norm(dim=2)).abs() + 3 * (p - q).square().sum(2)
    return cost.min(1).values.mean() + cost.min(0).values.mean() - 0.1 * a.var(0, unbiased=False).mean()


def plain_grid(events):
    """Means and counts [7] of one set."""
    values = [[x for v, x in events if v == variable] for variable in range(7)]
    return np.array([np.mean(x) if x else 0 for x in values]), np.array([len(x) for x in values])


def plain_statistics(stay):
    """[n, 7, 10], [n, 7]: what each prefix of the stay has shown, by the definition of each statistic."""
    out, seen = np.zeros((len(stay), 7, 10)), np.zeros((len(stay), 7), bool)
    for i, v in itertools.product(range(len(stay)), range(7)):
        shown = [(minute / 1440, *(a[v] for a in plain_grid(events))) for minute, events in stay[:i + 1]]
        shown = np.array([row for row in shown if row[2]])
        if len(shown):
            (day, x, n), seen[i, v] = shown.T, True
            slope = ((day - day.mean()) * (x - x.mean())).mean() / (day.var() + 0.1 ** 2)  # ridge of (0.1 day)^2
            out[i, v] = x[-1], x[0], x.mean(), x.max(), x.min(), x.std(), slope, np.log1p(n.sum()), abs(x[-1]), abs(x.mean())
    return out, seen


def plain_future(stay):
    """[n, 7, 3], [n, 7]: what each variable's means in the later sets are on average, at most and at least, and whether there is any."""
    out, seen = np.zeros((len(stay), 7, 3)), np.zeros((len(stay), 7), bool)
    for i, v in itertools.product(range(len(stay)), range(7)):
        later = [mean[v] for mean, count in (plain_grid(events) for _, events in stay[i + 1:]) if count[v]]
        if later:
            out[i, v], seen[i, v] = (np.mean(later), max(later), min(later)), True
    return out, seen


def plain_readout_loss(setvae, code, events):
    value, logit = setvae.decoder.value(code), setvae.decoder.measured(code)
    mean, count = (torch.tensor(a, dtype=torch.float32) for a in plain_grid(events))
    return F.smooth_l1_loss(value[count > 0], mean[count > 0]) + F.binary_cross_entropy_with_logits(logit, (count > 0).float())


def plain_posterior(setvae, stay):
    """mu, logvar [n, d] of one stay."""
    return (torch.stack(x) for x in zip(*(plain_encode(setvae, events) for _, events in stay)))


def plain_pass(model, stays):
    """Per stay: mu, logvar, h; and the mean reconstruction and KL over sets, then stays."""
    setvae, config, states, losses = model.setvae, model.config, [], []
    for stay in stays:
        mu, logvar = plain_posterior(setvae, stay)
        h = plain_history(model.history, mu, [minute for minute, _ in stay])
        states.append((mu, logvar, h))
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0, 1)).sum(1)
        kl = kl.clamp(min=config.free_bits * config.latent_dim) - config.logvar_bonus * logvar.mean(1)
        if config.decoder == "slots":
            terms = [plain_chamfer(plain_slots(setvae.decoder, h[i], len(events)), plain_points(setvae, events))
                     for i, (_, events) in enumerate(stay)]
        else:
            terms = [plain_readout_loss(setvae, h[i], events) + plain_readout_loss(setvae, mu[i], events) for i, (_, events) in enumerate(stay)]
            told = model.history_readout(h).view(len(stay), 7, 13).split((10, 3), dim=-1)
            for mine, (statistics, seen) in zip(told, (plain_statistics(stay), plain_future(stay))):
                for i in np.flatnonzero(seen.any(1)):
                    terms[i] = terms[i] + F.smooth_l1_loss(mine[i, seen[i]], torch.tensor(statistics[i, seen[i]], dtype=torch.float32))
        losses.append((torch.stack(terms).mean(), kl.mean()))
    return states, [torch.stack(x).mean() for x in zip(*losses)]


def plain_features(model, stay):
    """The stable head input [d] of one stay, from a frozen backbone."""
    mu, logvar = plain_posterior(model.setvae, stay)
    h = plain_history(model.history, model._fuse_vae_features(mu, logvar), [minute for minute, _ in stay])
    return 0.7 * h[-1] + 0.3 * (h @ h[-1]).softmax(0) @ h


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("presence", [True, False])
@pytest.mark.parametrize("mab_residual", [True, False])
@pytest.mark.parametrize("decoder", [dict(decoder="readout"), dict(decoder="slots", slope_per_head=False, free_bits=0.6, logvar_bonus=0.1)],
                         ids=lambda d: d["decoder"])
def test_a_batch_equals_a_plain_loop_over_single_sets(decoder, mab_residual, presence, levels):
    model, stays = build(SeqSetVAEPretrain, tiny(mab_residual=mab_residual, presence=presence, levels=levels, **decoder)), random_stays()
    with torch.no_grad():
        states, (reconstruction, kl) = plain_pass(model, stays)
    for mine, plain in zip(zip(*encoded(model, stays)), states):
        for batched, alone in zip(mine, plain):
            close(batched[:len(alone)], alone)
    with torch.no_grad():
        losses = model(batch_of(stays), beta=0.25)
    close(losses["reconstruction"], reconstruction)
    close(losses["kl"], kl)
    close(losses["loss"], reconstruction + 0.25 * kl)


@pytest.mark.parametrize("decoder", ["readout", "slots"])
def test_the_set_vae_stands_alone(decoder):
    model, batch = build(SetVAE, tiny(decoder=decoder, levels=2)), batch_of(random_stays())
    with torch.no_grad():
        (mu, logvar), (decoded, z_list), losses = model.encode(batch), model(batch), model.elbo_loss(batch, beta=0.5)
        close(losses["loss"], losses["reconstruction"] + 0.5 * losses["kl"])
        close(decoded, model.decode(mu, batch))
        assert len(z_list) == 2 and torch.equal(z_list[-1][1], mu) and torch.equal(z_list[-1][2], logvar)
        assert all(torch.equal(z, mean) for z, mean, _ in z_list)                    # evaluation: z is mu
        assert all(not torch.equal(z, mean) for z, mean, _ in model.train()(batch)[1])  # training: z is sampled
    torch.manual_seed(0)
    z = SetVAE.sample(torch.full((20_000,), 2.0), torch.full((20_000,), -1.0))
    assert abs(z.mean() - 2) < 0.02 and abs(z.std() - np.exp(-0.5)) < 0.02


@pytest.mark.parametrize("full_training", [False, True])
def test_a_stay_alone_and_in_any_batch_gets_the_same_logits(full_training):
    model, stays = build(SeqSetVAE, tiny(classification_only=not full_training, summaries=True)), random_stays((5, 1, 12, 3, 7))
    with torch.no_grad():
        together, turned = model(batch_of(stays)), model(batch_of(stays[::-1])).flip(0)
        alone = torch.cat([model(batch_of([stay])) for stay in stays])
    close(alone, together)
    close(turned, together)
    assert together.std(0).min() > 1e-3  # else equality says nothing


@pytest.mark.parametrize("mab_residual", [True, False])
def test_permuting_the_events_of_a_set_changes_nothing(mab_residual):
    model, stays = build(SeqSetVAEPretrain, tiny(mab_residual=mab_residual)), random_stays()
    for a, b in zip(encoded(model, stays), encoded(model, [[(minute, events[::-1]) for minute, events in stay] for stay in stays])):
        close(a, b)


def test_a_duplicate_counts_because_a_set_is_a_multiset():
    model = build(SeqSetVAEPretrain, tiny())
    once, twice = ([[(0, [(0, 1.0)] * n + [(1, -2.0)])]] for n in (1, 2))
    assert (encoded(model, once)[0] - encoded(model, twice)[0]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------------------------------
# History: causal, aware of time, the same in evaluation and in training
# ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", ["values", "minutes", "appended"])
def test_the_future_never_reaches_the_past(change):
    model, (stay,) = build(SeqSetVAEPretrain, tiny()), random_stays((8,))
    minute, events = stay[-1]
    other = {"values": stay[:-1] + [(minute, [(v, x + 3) for v, x in events])], "minutes": stay[:-1] + [(minute + 700, events)],
             "appended": stay + random_stays((9,), seed=5)[0]}[change]
    if change == "appended":
        other[8:] = [(minute + 10 + m, e) for m, e in other[8:]]
    (h,), (changed,) = encoded(model, [stay])[2], encoded(model, [other])[2]
    close(changed[:7], h[:7])
    if change != "appended":
        assert (changed[7] - h[7]).abs().max() > 1e-3  # the change is one that the model sees


def test_the_time_bias_falls_with_distance_and_hides_the_future():
    history = History(tiny())
    bias = history.time_bias(torch.tensor([[0.0, 10, 60, 600, 2000]]))[0]  # [heads, 5, 5]
    future = torch.ones(5, 5).triu(1).bool()
    assert (bias[:, future] == -np.inf).all() and (bias.diagonal(dim1=1, dim2=2) == 0).all()
    assert (bias[:, torch.ones(5, 5).tril(-1).bool()] < 0).all()
    assert all((bias[:, i, :i + 1].diff(dim=1) > 0).all() for i in range(1, 5))  # nearer sets weigh more
    close(bias[1, 3, 0], -history.slope[1] * np.log1p(600 / 60), check_dtype=False)


def test_the_time_bias_learns_in_pretraining():
    model = build(SeqSetVAEPretrain, tiny())
    model(batch_of(random_stays()), 1e-3)["loss"].backward()
    assert (model.history.slope.grad != 0).all() and model.history.tau.grad != 0


def test_long_stays_in_blocks_of_queries_equal_the_whole(monkeypatch):
    model, seen = build(SeqSetVAEPretrain, tiny()), []
    for longest in (1024, 4):
        monkeypatch.setattr("model.LONG_STAY", longest), monkeypatch.setattr("model.QUERY_BLOCK", 3)
        batch, first = batch_of(random_stays()), model(batch_of(random_stays()), 1e-3)
        model.zero_grad()
        first["loss"].backward()
        with torch.no_grad():
            h = model.history(first["mu"], batch.minute)
        seen.append({"h": h, "loss": first["loss"]} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    close(*seen)
    assert "history.slope" in seen[0] and "history.tau" in seen[0]


def test_history_in_evaluation_equals_history_in_training_without_dropout():
    """The fast path of nn.TransformerEncoder misreads a float mask, in evaluation only: ours must have no such second path."""
    history = build(lambda config, _: History(config), tiny(dropout=0.0))
    z, minute = torch.randn(3, 9, 16), torch.rand(3, 9).mul(2000).sort(1).values
    with torch.no_grad():
        assert torch.equal(history.eval()(z, minute), history.train()(z, minute))


def test_history_layer_equals_torch_encoder_layer_with_the_same_weights():
    history = build(lambda config, _: History(config), tiny(dropout=0.0))
    theirs = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True).train()
    theirs.load_state_dict(history.layers[0].state_dict())
    x, bias = torch.randn(3, 9, 16), history.time_bias(torch.rand(3, 9).mul(2000).sort(1).values)
    close(history.layers[0](x, bias), theirs(x, src_mask=bias.flatten(0, 1)))


# ----------------------------------------------------------------------------------------------------------------------------------
# What trains and what stays frozen
# ----------------------------------------------------------------------------------------------------------------------------------

def without_gradient(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any() or not p.grad.isfinite().all())}


@pytest.mark.parametrize("objective", [dict(), dict(decoder="slots"), dict(decoder="slots", learned_seeds=False, mab_residual=False)],
                         ids=["readout", "learned seeds", "original"])
def test_gradients_reach_every_parameter_in_pretraining(objective):
    model = build(SeqSetVAEPretrain, tiny(hide_sets=0.3, **objective)).train()
    model(batch_of(random_stays()), 1e-3)["loss"].backward()
    assert without_gradient(model) == set()


@pytest.mark.parametrize("decoder", ["readout", "slots"])
def test_gradients_reach_every_parameter_in_full_training(decoder):
    model = build(SeqSetVAE, tiny(classification_only=False, decoder=decoder), seed=3).train()  # a seed with a living ReLU among the gate's 4
    losses = model.losses(batch := batch_of(random_stays((4, 6, 9, 5))))
    (classification_loss(losses["logits"], batch.label, FinetuneConfig()) + losses["reconstruction"] + losses["kl"]).backward()
    assert without_gradient(model) == set()


def test_frozen_backbone_stays_in_evaluation_mode_and_only_the_head_trains():
    model = build(SeqSetVAE, tiny()).train()
    assert model.cls_head.training and not any(m.training for m in [*model.setvae.modules(), *model.history.modules()])
    assert all(p.requires_grad == name.startswith("cls_head.") for name, p in model.named_parameters())
    batch = batch_of(random_stays())
    classification_loss(model(batch), batch.label, FinetuneConfig()).backward()
    assert without_gradient(model) == set() and all(p.grad is None for name, p in model.named_parameters() if not name.startswith("cls_head."))


def test_frozen_finetuning_leaves_the_backbone_bit_equal(pretrained, finetuned):
    before, after = (torch.load(path, weights_only=True)["model"] for path in (pretrained, finetuned.with_name("last.pt")))
    backbone = [name for name in before if name.startswith(SeqSetVAE.BACKBONE)]
    assert set(before) - set(backbone) == {"mask_token"}
    assert all(torch.equal(before[name], after[name]) for name in backbone)


def test_cached_features_equal_uncached_ones(finetuned):
    content, cohort, dataset, split, new = train.open_checkpoint(finetuned)
    assert not new
    model = SeqSetVAE(ModelConfig(**content["model_config"]), content["vocabulary"])
    model.load_state_dict(content["model"])
    stays = stays_of(cohort, split["train"])
    cached = train.encode_stays(model, dataset, stays, CPU)
    model.train()
    with torch.no_grad():
        uncached = torch.cat([model.features(dataset[stays[i:i + 4]]) for i in range(0, len(stays), 4)])
    close(uncached, cached)
    close(model.feature_mean, cached.mean(0))  # the standardisation knows the training stays alone
    close(model.feature_std, cached.std(0).clamp(min=1e-6))


def test_trainable_share_is_under_five_percent_at_default_size():
    settings = FinetuneConfig()
    model = SeqSetVAE(ModelConfig(44, features=settings.features, fuse=settings.fuse, summaries=settings.summaries, head_widths=settings.head_widths),
                      torch.zeros(44, 64))
    total, trainable = (sum(p.numel() for p in model.parameters() if p.requires_grad or not t) for t in (False, True))
    assert 0 < trainable < 0.05 * total


def test_the_trees_of_the_head_predict_what_scikit_learn_fitted():
    torch.manual_seed(0)
    x = torch.randn(300, 9).mul(4).round().div(4)  # ties at the thresholds
    label = ((x[:, 0] > 0.5) ^ (x[:, 3] < 0)).long()
    classifier = boosted_trees(replace(FinetuneConfig(), trees=30, tree_features=1.0, tree_depth=3), seed=1)
    trees = BoostedTrees(30, 3)
    trees.fit(x[:200], label[:200], classifier)
    logits = trees(x).double()
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], classifier.decision_function(x.numpy()), atol=1e-5)
    assert roc_auc_score(label[200:], logits[200:, 1]) > 0.9


@pytest.mark.parametrize("classification_only", [True, False])
def test_trees_may_ask_for_every_feature_and_for_no_other(classification_only):
    model = build(SeqSetVAE, tiny(classification_only=classification_only, summaries=True, head_widths=(), head_trees=2))
    state, size = {name: x.clone() for name, x in model.state_dict().items()}, sum(model._feature_sizes().values())
    state["trees.feature"][0, 0] = size - 1
    load_weights(model, state, "best.pt")
    assert model(batch_of(random_stays())).shape == (4, 2)
    state["trees.feature"][0, 0] = size
    with pytest.raises(InputError, match="best.pt: its trees ask for features that the model does not have"):
        load_weights(model, state, "best.pt")


@pytest.mark.parametrize("decoder", ["readout", "slots"])
def test_validation_is_deterministic(decoder):
    model = build(SeqSetVAEPretrain, tiny(decoder=decoder)).train()  # evaluation itself must leave training mode
    dataset = StayDataset(cohort_of(random_stays()), PLAIN)
    first, second = (train.evaluate_pretraining(model, dataset, np.arange(4), CPU, torch.float32) for _ in range(2))
    assert first == second and np.isfinite(first["val_loss"])


# ----------------------------------------------------------------------------------------------------------------------------------
# Fusion, features, loss
# ----------------------------------------------------------------------------------------------------------------------------------

def test_fusion_without_parameters_equals_its_formula():
    model, (mu, logvar) = build(SeqSetVAE, tiny()), torch.randn(2, 3, 5, 16)
    m, std = mu.double().numpy(), np.exp(0.5 * logvar.double().numpy())
    w = 1 / (1 + np.exp(-(1 - std.mean(-1, keepdims=True))))
    close(model._fuse_vae_features(mu, logvar).double(), torch.from_numpy(w * m * (1 + 0.05 * np.tanh(std)) + (1 - w) * m))
    assert build(SeqSetVAE, tiny(fuse=False))._fuse_vae_features(mu, logvar) is mu


def test_gated_fusion_starts_near_mu():
    torch.manual_seed(0)
    model = SeqSetVAE(tiny(classification_only=False), torch.zeros(7, 12))
    mu, logvar = torch.randn(2, 50, 16)
    assert (model._fuse_vae_features(mu, logvar) - mu).norm() < 0.1 * mu.norm()


def test_focal_loss_equals_its_formula():
    logits, label = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 0, 1])
    p = np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum(1, keepdims=True)
    p = p[np.arange(6), label]
    expected = -np.where(label == 1, 0.25, 0.75) * (1 - p) ** 2 * np.log(p)  # Lin et al. 2017, eq. 5
    close(classification_loss(logits, label, FinetuneConfig(loss="focal", focal_alpha=0.25, focal_gamma=2.0)).double(), torch.tensor(expected.mean()))


@pytest.mark.parametrize("features", ["stable", "multiscale"])
@pytest.mark.parametrize("decoder", ["readout", "slots"])
@pytest.mark.parametrize("summaries", [True, False])
def test_feature_sizes_agree_with_the_features(features, decoder, summaries):
    model = build(SeqSetVAE, tiny(features=features, decoder=decoder, summaries=summaries))
    with torch.no_grad():
        assert model.features(batch_of(random_stays())).shape == (4, sum(model._feature_sizes().values())) == (4, model.cls_head[0].in_features)


def test_stable_features_are_the_last_state_and_attention_to_it():
    model, stays = build(SeqSetVAE, tiny(features="stable")), random_stays()
    with torch.no_grad():
        features, h = model.features(batch_of(stays)), model.encode(batch_of(stays))[3]
    for stay, feature, states in zip(stays, features, h):
        states = states[:len(stay)]
        close(feature, 0.7 * states[-1] + 0.3 * (states @ states[-1]).softmax(0) @ states)


def test_summaries_are_the_exact_statistics_of_the_whole_stay():
    model, stays = build(SeqSetVAE, tiny(summaries=True)), random_stays()
    with torch.no_grad():
        exact = model.features(batch_of(stays))[:, -11 * len(NAMES):]  # 10 statistics and whether it was seen, a variable each
    for stay, row in zip(stays, exact.double()):
        statistics, seen = plain_statistics(stay)
        close(row, torch.from_numpy(np.append(statistics[-1].ravel(), seen[-1])))


# ----------------------------------------------------------------------------------------------------------------------------------
# Batches: nothing forgotten, nothing twice, padding never counts
# ----------------------------------------------------------------------------------------------------------------------------------

def test_statistics_of_the_history_equal_a_plain_loop():
    stays = random_stays((1, 7, 12))
    batch = batch_of(stays)
    statistics, seen = history_statistics(*measurement_grid(batch, 7), batch.minute)
    for p, stay in enumerate(stays):
        plain, shown = plain_statistics(stay)
        close(statistics[p, :len(stay)].double(), torch.from_numpy(plain))
        assert np.array_equal(seen[p, :len(stay)], shown)


def test_statistics_of_a_nearly_constant_variable_are_exact():
    """Running sums of squares lose what a long stay far from zero varies by: E[x^2] - E[x]^2 cancels in float32."""
    stay = [(60 * i, [(0, 4.9 if i % 40 else 4.8)]) for i in range(120)]
    batch = batch_of([stay])
    statistics, _ = history_statistics(*measurement_grid(batch, 7), batch.minute)
    close(statistics[0, :120].double(), torch.from_numpy(plain_statistics(stay)[0]))


def test_measurement_grid_equals_a_plain_loop():
    stays = random_stays()
    mean, count = measurement_grid(batch_of(stays), 7)
    assert count.sum() == sum(len(events) for stay in stays for _, events in stay)
    for p, stay in enumerate(stays):
        for i, (_, events) in enumerate(stay):
            plain_mean, plain_count = plain_grid(events)
            close(mean[p, i].double(), torch.from_numpy(plain_mean))
            assert count[p, i].tolist() == plain_count.tolist()
        assert not count[p, len(stay):].any() and not mean[p, len(stay):].any()


def test_no_event_and_no_set_is_forgotten():
    cohort = synthetic_cohort(24)
    dataset, events, sets = StayDataset(cohort, Normalizer.fit(cohort, np.arange(24))), 0, 0
    for stays in epoch_batches(np.diff(cohort.stay_start), 5, seed=0, epoch=0):
        batch = dataset[stays]
        cells = batch.token_event[batch.token_event < len(batch.event_value)]
        assert cells.sort().values.tolist() == list(range(len(batch.event_value)))      # every event in exactly one cell
        assert sorted(batch.slot_set[batch.slot_set < len(batch.group_slot)].tolist()) == list(range(int(batch.lengths.sum())))
        assert measurement_grid(batch, 44)[1].sum() == len(batch.event_value) == cohort.stay_events[stays].sum()
        events, sets = events + len(batch.event_value), sets + int(batch.lengths.sum())
    assert events == len(cohort.event_value) and sets == len(cohort.set_minute)


@pytest.mark.parametrize("batches", [lambda cohort: epoch_batches(np.diff(cohort.stay_start), 8, seed=1, epoch=2),
                                     lambda cohort: sorted_batches(cohort, np.arange(len(cohort)), 8)], ids=["epoch", "sorted"])
def test_every_stay_is_visited_once(batches):
    visited = batches(cohort_of(random_stays(np.random.default_rng(0).integers(1, 90, 297))))
    assert sorted(np.concatenate(visited)) == list(range(297)) and max(map(len, visited)) == 8


@pytest.mark.parametrize("limit, most", [("_MOST_SETS_SQUARED", 6 * 9**2), ("_MOST_EVENTS", 270)])
def test_evaluation_batches_are_bounded_by_their_cost(monkeypatch, limit, most):
    cohort = cohort_of(random_stays((9,) * 20 + (90, 80)))
    monkeypatch.setattr(data, limit, most)
    batches = sorted_batches(cohort, np.arange(22), 32)
    cost = {"_MOST_SETS_SQUARED": lambda b: len(b) * 9**2, "_MOST_EVENTS": lambda b: cohort.stay_events[b].sum()}[limit]
    assert np.concatenate(batches).tolist() == [*range(20), 21, 20] and [len(b) for b in batches[-2:]] == [1, 1]
    assert all(cost(b) <= most for b in batches[:-2]) and len(batches) <= 8


def test_a_huge_stay_is_a_training_batch_of_its_own_and_the_others_batches_stay_full():
    lengths = np.r_[np.full(70, 50), 20_000, 3_000]
    batches = epoch_batches(lengths, 16, seed=0, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(72))
    assert [70] in [b.tolist() for b in batches] and all(len(b) * lengths[b].max()**2 <= 2**24 or len(b) == 1 for b in batches)
    assert sum(len(b) == 16 for b in batches) == 4


def test_a_batch_costs_as_much_memory_in_a_large_cohort(tmp_path):
    def peak(stays):
        cohort = load_cohort(None, stays, cache_dir=tmp_path)
        everyone = np.arange(stays)
        tracemalloc.start()
        normalizer = Normalizer.fit(cohort, everyone)
        fitted = tracemalloc.get_traced_memory()[1]
        dataset, batches = StayDataset(cohort, normalizer), epoch_batches(np.ones(stays), 8, 0, 0)[:20]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for batch in batches:
            dataset[everyone[batch]]
        used = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        return used, fitted, len(cohort.event_value)
    (small, _, _), (large, fitted, events) = peak(500), peak(4000)
    assert large < 1.3 * small and fitted < 10e6 + 6 * events


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    order = lambda seed, epoch: np.concatenate(epoch_batches(np.arange(100) % 7, 8, seed, epoch)).tolist()
    first = order(3, 1)
    np.random.seed(9), torch.manual_seed(9)
    assert order(3, 1) == first and order(3, 2) != first and order(4, 1) != first


@pytest.mark.parametrize("decoder", ["readout", "slots"])
def test_losses_and_gradients_are_the_same_whatever_the_padding(decoder):
    model, stays, seen = build(SeqSetVAEPretrain, tiny(decoder=decoder)), random_stays(), []
    for batch in (batch_of(stays, max_groups=1), batch_of(stays, max_groups=6)):
        model.zero_grad()
        losses = model(batch, 1e-2)
        losses["loss"].backward()
        seen.append({name: x for name, x in losses.items() if name != "mu"} | {name: p.grad.clone() for name, p in model.named_parameters()
                                                                            if p.grad is not None})
    assert len(batch_of(stays, 1).groups) != len(batch_of(stays, 6).groups)
    close(*seen)


@pytest.mark.parametrize("decoder", ["readout", "slots"])
@pytest.mark.parametrize("mode", ["pretrain", "full training"])
def test_a_training_step_asks_the_device_for_no_value(mode, decoder):
    """Tensors of the meta device have no values: `.item()`, a boolean index or a shape that depends on data fails there."""
    config, batch = tiny(decoder=decoder, classification_only=False, hide_sets=.1), batch_of(random_stays()).to("meta")
    if mode == "pretrain":
        model = build(SeqSetVAEPretrain, config).to("meta").train()
        loss = model(batch, 1e-2)["loss"]
    else:
        model = build(SeqSetVAE, config).to("meta").train()
        losses = model(batch, losses=True)
        loss = losses["reconstruction"] + classification_loss(losses["logits"], batch.label, FinetuneConfig())
    norm = update(model, loss, torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", enabled=False), 1.0)
    assert norm.device.type == "meta"


def test_padding_between_sets_of_one_stay_is_under_fifteen_percent():
    cohort = synthetic_cohort(200)
    dataset, batches = StayDataset(cohort, Normalizer.fit(cohort, np.arange(200))), epoch_batches(np.diff(cohort.stay_start), 8, 0, 0)
    cells = sum(len(dataset[stays].token_event) for stays in batches)
    assert 1 < cells / len(cohort.event_value) < 1.15


@pytest.mark.parametrize("groups", [1, 2, 3, 9])
def test_group_widths_are_optimal(groups):
    rng = np.random.default_rng(groups)
    for _ in range(20):
        sizes = rng.integers(1, 12, rng.integers(1, 15))
        cost = lambda bounds: sum(min(b for b in bounds if b >= s) for s in sizes)
        best = min(cost((*some, sizes.max())) for k in range(groups) for some in itertools.combinations(np.unique(sizes), k))
        widths = group_widths(sizes, groups)
        assert len(widths) <= groups and cost(widths) == best


def test_round_up_is_tight_and_leaves_few_sizes():
    rounded = [round_up(n) for n in range(1, 5000)]
    assert all(n <= r <= 1.125 * n + 1e-9 for n, r in enumerate(rounded, start=1)) and rounded == sorted(rounded)
    assert all(len({r for r in rounded if low < r <= 2 * low}) <= 8 for low in (16, 64, 1024)) and [round_up(r) for r in rounded] == rounded


def test_ranges_concatenate():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], int), np.array([], int)).tolist() == []


# ----------------------------------------------------------------------------------------------------------------------------------
# Data: cohorts, splits, normalisation, the cache
# ----------------------------------------------------------------------------------------------------------------------------------

def as_lists(cohort: Cohort):
    """stay id -> [(minute, [(variable name, value), ...]), ...]"""
    out = {}
    for p, name in enumerate(cohort.stay_id):
        out[str(name)] = [(float(cohort.set_minute[t]), [(cohort.variables[cohort.event_variable[e]], float(cohort.event_value[e]))
                                                         for e in range(cohort.set_start[t], cohort.set_start[t + 1])])
                          for t in range(cohort.stay_start[p], cohort.stay_start[p + 1])]
    return out


def test_cohort_sorts_events_into_sets():
    events = [(2, 30, 1, 5.0), (0, 9, 2, 1.0), (2, 30, 0, 6.0), (0, 3, 2, 2.0), (2, 30, 1, 5.0), (0, 9, 1, 3.0)]  # stay 1 has none
    cohort = build_cohort("handmade", ["z", "b", "a", "never"], *map(np.array, zip(*events)), stay_id=["p", "q", "r"], label=[1, 0, -1])
    assert as_lists(cohort) == {"p": [(3, [("a", 2)]), (9, [("a", 1), ("b", 3)])], "r": [(30, [("b", 5), ("z", 6), ("b", 5)])]}
    assert cohort.variables == ["a", "b", "z"] and cohort.label.tolist() == [1, -1] and cohort.notes["stays without a usable event"] == 1


def test_a_stay_id_that_occurs_twice_is_refused():
    with pytest.raises(InputError, match="stay p occurs more than once"):
        build_cohort("x", ["a"], np.array([0, 1]), np.array([0, 0]), np.array([0, 0]), np.array([1, 1]), stay_id=["p", "p"], label=[0, 0])


def test_normalizer_is_fitted_on_training_stays_only():
    cohort, training = synthetic_cohort(24), np.arange(12)
    changed = replace(cohort, event_value=np.where(np.arange(len(cohort.event_value)) < cohort.set_start[cohort.stay_start[12]],
                                                   cohort.event_value, 1e6).astype(np.float32))
    a, b = (Normalizer.fit(c, training) for c in (cohort, changed))
    assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("mean", "std", "log_scale"))
    assert not np.array_equal(a.mean, Normalizer.fit(changed, np.arange(24)).mean)


def test_normalised_values_are_standard_clipped_and_finite():
    cohort = synthetic_cohort(60)
    normalizer = Normalizer.fit(cohort, np.arange(60))
    z, hr = normalizer(cohort.event_variable, cohort.event_value), cohort.variables.index("HR")
    assert np.abs(z).max() <= 5 and np.isfinite(normalizer(np.arange(44), np.full(44, 1e30))).all()
    assert abs(z[cohort.event_variable == hr].mean()) < 0.02 and abs(z[cohort.event_variable == hr].std() - 1) < 0.05
    assert normalizer(np.array([hr]), np.array([1e9])) == 5 and normalizer(np.array([hr]), np.array([-1e9])) == -5
    again = Normalizer.from_state(normalizer.state_dict(), "a.pt")
    assert np.array_equal(again(cohort.event_variable, cohort.event_value), z)


def test_a_constant_variable_stays_visible():
    normalizer = Normalizer.fit(cohort_of([[(0, [(0, 1.0)])], [(0, [(0, 1.0)])]]), np.arange(2))
    assert normalizer(np.array([0]), np.array([1.0])) == 1


def test_splits_are_seeded_stratified_disjoint_and_complete():
    cohort = synthetic_cohort(300)
    split = make_splits(cohort, 0)
    assert sorted(sum(split.values(), [])) == sorted(cohort.stay_id) and [len(split[s]) for s in ("train", "valid", "test")] == [192, 48, 60]
    rates = [cohort.label[stays_of(cohort, ids)].mean() for ids in split.values()]
    assert max(rates) - min(rates) < 0.02
    assert make_splits(cohort, 0) == split != make_splits(cohort, 1)


def test_the_data_sets_own_split_is_kept():
    cohort = replace(cohort_of(random_stays()), split=np.array([2, 0, 1, 0], dtype=np.int8))
    assert make_splits(cohort, 0) == {"train": ["stay1", "stay3"], "valid": ["stay2"], "test": ["stay0"]}


def test_synthetic_cohort_is_deterministic():
    a, b = synthetic_cohort(24), synthetic_cohort(24)
    for name in Cohort.ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))  # NaN (no given statistics) equals NaN
    assert a.fingerprint == b.fingerprint
    assert synthetic_cohort(24, seed=1).fingerprint != a.fingerprint and len(a) == 24 and set(a.label) == {0, 1}


def test_a_large_synthetic_cohort_is_cached_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_SYNTHETIC_BLOCK", 25)
    parts, cached = list(data.synthetic_parts(60)), load_cohort(None, 60, cache_dir=tmp_path)
    assert [len(part) for part in parts] == [20, 20, 20] and len({part.fingerprint for part in parts}) == 3
    assert as_lists(cached) == {stay: sets for part in parts for stay, sets in as_lists(part).items()}
    assert cached.label.tolist() == [label for part in parts for label in part.label] and cached.notes == parts[0].notes
    whole = synthetic_cohort(60)
    assert cached.fingerprint == whole.fingerprint == cached.digest() and cached.variables == whole.variables
    for name in Cohort.ARRAYS:
        np.testing.assert_array_equal(getattr(cached, name), getattr(whole, name))
        assert isinstance(getattr(cached, name), np.memmap)


def test_the_default_synthetic_cohort_stays_what_it_was():
    cohort = synthetic_cohort()
    assert (len(cohort.event_value), len(cohort.set_minute), (cohort.label == 1).sum()) == (272_973, 45_726, 169)


def test_a_variable_has_the_same_unit_vector_in_every_vocabulary():
    few, many = variable_vectors(["HR", "Na"], 12), variable_vectors(["Age", "Na", "K", "HR"], 12)
    assert torch.equal(few[0], many[3]) and torch.equal(few[1], many[1]) and not torch.equal(few[0], few[1])
    close(many.norm(dim=1), torch.ones(4))


def test_an_event_of_an_unknown_variable_is_dropped_and_named():
    stays = random_stays()
    known = [[(minute, [(v, x) for v, x in events if v < 5]) for minute, events in stay] for stay in stays]
    dataset = StayDataset(cohort_of(stays), Normalizer(NAMES[:5], *np.array([[0] * 5, [1] * 5, [0] * 5], dtype=np.float32)))
    batch, model = dataset[np.arange(4)], build(SeqSetVAEPretrain, tiny(num_variables=5))
    assert dataset.unknown_variables == NAMES[5:] and len(batch.event_value) == sum(len(e) for s in known for _, e in s)
    with torch.no_grad():
        assert all(x.isfinite().all() for x in model(batch, 1.0).values())


# ----------------------------------------------------------------------------------------------------------------------------------
# PhysioNet 2012
# ----------------------------------------------------------------------------------------------------------------------------------

RECORDS = {
    "132539": "00:00,RecordID,132539\n00:00,Age,54\n00:00,Gender,0\n00:00,Height,-1\n00:00,ICUType,4\n00:00,Weight,-1\n"
              "00:07,HR,73\n00:07,HR,77\n00:07,,3\n26:05,BaseExcess,-1\n",
    "132540": "00:00,RecordID,132540\n00:00,Age,76\n00:00,Gender,1\n00:00,Height,175.3\n00:00,ICUType,2\n00:00,Weight,80\n01:10,HR,88\n",
}
OUTCOMES = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n132539,6,1,5,-1,0\n132540,16,8,8,4,1\n"


def write_physionet(folder: Path, archive=False, records=RECORDS, outcomes=OUTCOMES, header="Time,Parameter,Value\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "Outcomes-a.txt").write_text(outcomes)
    if archive:
        with tarfile.open(folder / "set-a.tar.gz", "w:gz") as tar:
            for name, body in records.items():
                member = tarfile.TarInfo(f"set-a/{name}.txt")
                member.size = len(content := (header + body).encode())
                tar.addfile(member, io.BytesIO(content))
    else:
        (folder / "set-a").mkdir()
        for name, body in records.items():
            (folder / "set-a" / f"{name}.txt").write_text(header + body)
    return folder


def test_physionet_sets_that_lie_together_are_read_together(tmp_path):
    """Set b as its own archive beside set a: the cohort of all records, each with its own set's outcome."""
    first, second = ({name: RECORDS[name]} for name in RECORDS)
    folder, other = write_physionet(tmp_path / "both", records=first, outcomes=OUTCOMES.replace("132540,16,8,8,4,1\n", "")), tmp_path / "other"
    write_physionet(other, archive=True, records=second, outcomes=OUTCOMES.replace("132539,6,1,5,-1,0\n", ""))
    (other / "set-a.tar.gz").rename(folder / "set-b.tar.gz")
    (other / "Outcomes-a.txt").rename(folder / "Outcomes-b.txt")
    both, together = load_cohort(folder, cache_dir=tmp_path), load_cohort(write_physionet(tmp_path / "one"), cache_dir=tmp_path)
    assert both.reader.endswith("a+b") and both.fingerprint == together.fingerprint and both.label.tolist() == together.label.tolist() == [0, 1]


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "tar.gz"])
def test_physionet_reader_gives_the_expected_cohort(tmp_path, archive):
    cohort = load_cohort(write_physionet(tmp_path / "data", archive), cache_dir=tmp_path / "cache")
    assert as_lists(cohort) == {
        "132539": [(0, [("Age", 54), ("Gender", 0), ("ICUType=4", 1)]), (7, [("HR", 73), ("HR", 77)]),  # -1 missing; duplicates kept
                   (1565, [("BaseExcess", -1)])],                                                       # -1 is a value elsewhere
        "132540": [(0, [("Age", 76), ("Gender", 1), ("Height", np.float32(175.3)), ("ICUType=2", 1), ("Weight", 80)]), (70, [("HR", 88)])]}
    assert cohort.label.tolist() == [0, 1] and {k: v for k, v in cohort.notes.items() if v} == {
        "rows with an empty parameter": 1, "descriptors not recorded (-1)": 2}
    assert cohort.variables == ["Age", "BaseExcess", "Gender", "HR", "Height", "ICUType=2", "ICUType=4", "Weight"]  # no outcome among them


def test_folder_and_archive_have_the_same_fingerprint(tmp_path):
    a, b = (load_cohort(write_physionet(tmp_path / str(archive), archive), cache_dir=tmp_path / "cache") for archive in (False, True))
    assert a.fingerprint == b.fingerprint


def test_a_stay_without_an_outcome_is_unlabelled_not_a_survivor(tmp_path):
    folder = write_physionet(tmp_path / "data", outcomes="".join(OUTCOMES.splitlines(keepends=True)[:2]))
    assert load_cohort(folder, cache_dir=tmp_path / "cache").label.tolist() == [0, -1]


def test_cached_cohort_equals_the_parsed_one_and_is_not_parsed_again(tmp_path, monkeypatch):
    folder = write_physionet(tmp_path / "data")
    first = load_cohort(folder, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("data._records", lambda path: pytest.fail("parsed again"))
    second = load_cohort(folder, cache_dir=tmp_path / "cache")
    assert as_lists(first) == as_lists(second) and first.fingerprint == second.fingerprint and first.notes == second.notes


@pytest.mark.parametrize("name", [f"{name}.npy" for name in Cohort.ARRAYS] + ["meta.json"])
def test_a_torn_cache_is_rebuilt(tmp_path, name):
    folder = write_physionet(tmp_path / "data")
    whole = as_lists(load_cohort(folder, cache_dir=tmp_path / "cache"))
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-3])
    assert as_lists(load_cohort(folder, cache_dir=tmp_path / "cache")) == whole


def test_a_stale_cache_is_rebuilt(tmp_path):
    folder = write_physionet(tmp_path / "data")
    load_cohort(folder, cache_dir=tmp_path / "cache")
    record = folder / "set-a" / "132540.txt"
    before = record.stat()
    record.write_text(record.read_text().replace("HR,88", "HR,99"))  # the same length: only the time of the change tells
    os.utime(record, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert as_lists(load_cohort(folder, cache_dir=tmp_path / "cache"))["132540"][-1] == (70, [("HR", 99)])


def test_set_a_of_physionet_2012_is_read_in_full_and_fast(tmp_path):
    folder = SHARED / "data" / "physionet2012"
    if not (folder / "set-a.tar.gz").exists():
        pytest.skip(f"PhysioNet 2012 set-a is not at {folder}: the reader was not tried on real data")
    began = time.process_time()
    cohort = load_cohort(folder, cache_dir=tmp_path)
    parsed, began = time.process_time() - began, time.process_time()
    load_cohort(folder, cache_dir=tmp_path)
    cached = time.process_time() - began
    assert (len(cohort), (cohort.label == 1).sum(), len(cohort.variables)) == (4000, 554, 44)
    assert (len(cohort.event_value), len(cohort.set_minute)) == (1_672_669, 292_178)
    assert parsed < 4 and cached < 0.5


# ----------------------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the file, exit code 2
# ----------------------------------------------------------------------------------------------------------------------------------

def with_line(line, at=3):
    """RECORDS with one line more in the second record, `at` lines below its header."""
    lines = RECORDS["132540"].splitlines(keepends=True)
    return RECORDS | {"132540": "".join(lines[:at] + [line + "\n"] + lines[at:])}


def tar_with(member: tarfile.TarInfo):
    def damage(folder):
        write_physionet(folder, archive=True)
        with tarfile.open(folder / "set-a.tar.gz", "w:gz") as tar:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return damage


def archive_that_claims(kind):
    """A tar header that promises a gigabyte, and nothing after it."""
    member = tarfile.TarInfo("set-a/1.txt")
    member.type, member.size = kind, 2**30
    return lambda folder: (write_physionet(folder, archive=True) / "set-a.tar.gz").write_bytes(gzip.compress(member.tobuf()))


def linked(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def cut_archive(folder, flip=False):
    path = write_physionet(folder, archive=True) / "set-a.tar.gz"
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 0xFF
    path.write_bytes(body if flip else body[:len(body) // 2])


BAD_DATA = {  # what is wrong: (make it at this folder, what the message names)
    "missing folder": (lambda f: None, "data: no such folder"),
    "empty folder": (lambda f: f.mkdir(), "data: no data"),
    "a file in its place": (lambda f: f.write_text("x"), "data: no such folder"),
    "bad header": (partial(write_physionet, header="a,b\n"), "132539.txt line 1"),
    "bad time": (lambda f: write_physionet(f, records=with_line("1h,HR,80")), "132540.txt line 5"),
    "no time": (lambda f: write_physionet(f, records=with_line(",HR,80")), "132540.txt line 5"),
    "text value": (lambda f: write_physionet(f, records=with_line("00:30,HR,high")), "132540.txt line 5"),
    "four columns": (lambda f: write_physionet(f, records=with_line("00:30,HR,80,90")), "132540.txt line 5"),
    "four columns at once": (lambda f: write_physionet(f, records=RECORDS | {"132539": "00:00,Age,54,1\n" + RECORDS["132539"]}), "132539.txt line 2"),
    "four columns throughout": (lambda f: write_physionet(f, records={"132539": "00:00,Age,54,1\n00:01,HR,80,1\n"}), "132539.txt line 2"),
    "two columns": (lambda f: write_physionet(f, records=with_line("00:30,HR")), "132540.txt line 5"),
    "another record's id": (lambda f: write_physionet(f, records={"132541": RECORDS["132540"]}), "132541.txt"),
    "record without text": (lambda f: write_physionet(f, records={"132539": ""}, header=""), "132539.txt"),
    "no record": (partial(write_physionet, records={}), "set-a"),
    "no outcome file": (lambda f: (write_physionet(f) / "Outcomes-a.txt").unlink(), "Outcomes-a.txt"),
    "outcome that is not 0 or 1": (partial(write_physionet, outcomes=OUTCOMES.replace(",4,1\n", ",4,yes\n")), "Outcomes-a.txt line 3"),
    "outcome column missing": (partial(write_physionet, outcomes=OUTCOMES.replace("In-hospital_death", "dead")), "Outcomes-a.txt"),
    "truncated archive": (cut_archive, "set-a.tar.gz"),
    "damaged archive": (partial(cut_archive, flip=True), "set-a.tar.gz"),
    "archive that leaves its folder": (tar_with(tarfile.TarInfo("../evil.txt")), "set-a.tar.gz: member ../evil.txt"),
    "archive with a link": (tar_with(linked("set-a/1.txt", "/etc/passwd")), "set-a.tar.gz: member set-a/1.txt"),
    "archive with a huge record": (archive_that_claims(tarfile.REGTYPE), "set-a.tar.gz: member set-a/1.txt of 1,073,741,824 bytes"),
    "archive with a huge header": (archive_that_claims(tarfile.XHDTYPE), "set-a.tar.gz: damaged archive (a header of 1,073,741,824 bytes)"),
    "too few stays to split": (write_physionet, "PhysioNet 2012"),
}


def one_error_line(capsys, code, named):
    """The whole contract of a refused input: exit code 2 and one line on stderr that starts with error: and names the culprit."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and str(named) in error, error


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_one_line_and_exit_code_2(tmp_path, capsys, what):
    make, named = BAD_DATA[what]
    make(tmp_path / "data")
    one_error_line(capsys, train.main(["--mode", "pretrain", "--device", "cpu", "--data_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run")]),
                   named)
    assert not (tmp_path / "run").exists() and not Path(tmp_path / "evil.txt").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


BAD_CHECKPOINTS = {
    "missing": lambda path, good: None,
    "a folder": lambda path, good: path.mkdir(),
    "empty": lambda path, good: path.write_bytes(b""),
    "garbage": lambda path, good: path.write_bytes(b"garbage" * 99),
    "truncated": lambda path, good: path.write_bytes(good.read_bytes()[:50_000]),
    "a list": lambda path, good: torch.save([1, 2], path),
    "no weights": lambda path, good: torch.save({"epoch": 3}, path),
    "format without weights": lambda path, good: torch.save({"format": 1}, path),
    "pickle that runs a command": lambda path, good: path.write_bytes(pickle.dumps({"state_dict": Malicious(path.with_name("executed"))}, protocol=2)),
    "zipped pickle that runs a command": lambda path, good: torch.save({"state_dict": Malicious(path.with_name("executed"))}, path),
    "another format": lambda path, good: torch.save(torch.load(good, weights_only=True) | {"format": 99}, path),
    "of the other mode": lambda path, good: torch.save(torch.load(good, weights_only=True) | {"mode": "finetune"}, path),
}


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_one_line_and_exit_code_2(tmp_path, capsys, pretrained, what):
    BAD_CHECKPOINTS[what](tmp_path / "bad.pt", pretrained)
    capsys.readouterr()
    one_error_line(capsys, train.main([*FINETUNE, str(tmp_path / "bad.pt"), "--run_dir", str(tmp_path / "run")]), tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


def test_bad_options_are_refused(tmp_path, capsys):
    one_error_line(capsys, train.main(["--mode", "finetune"]), "--pretrained_ckpt")
    one_error_line(capsys, train.main([*PRETRAIN, "--device", "abacus"]), "abacus")
    one_error_line(capsys, train.main([*PRETRAIN, "--run_dir", str(tmp_path)]), tmp_path)
    one_error_line(capsys, train.main(["--mode", "pretrain", "--resume", str(tmp_path / "none")]), tmp_path / "none")
    for wrong in ([], ["--mode", "both"], [*PRETRAIN, "--batch_size", "0"], [*PRETRAIN, "--unknown"], [*PRETRAIN, "--label_fraction", "2"]):
        with pytest.raises(SystemExit, match="2"):
            train.main(wrong)


# ----------------------------------------------------------------------------------------------------------------------------------
# Checkpoints: any wrapper, nothing missing in silence, the original's outputs
# ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("container", ["ours", "bare", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_pretrained_backbone_loads_whole_behind_any_prefix(tmp_path, prefix, container):
    model, classifier = build(SeqSetVAEPretrain, tiny()), build(SeqSetVAE, tiny(), seed=2)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    rest = {name: dict.fromkeys(_CHECKPOINT_ENTRIES.get(name, ())) if kind is dict else kind() for name, kind in _CHECKPOINT_TYPES.items()}
    torch.save({"ours": rest | {"format": 1, "model": state}, "bare": state, "state_dict": {"state_dict": state}}[container], tmp_path / "some.pt")
    report = load_backbone(classifier, load_checkpoint_weights(tmp_path / "some.pt"))
    assert report.complete and not report.unexpected and report.skipped == ["mask_token"]
    for name, tensor in classifier.state_dict().items():
        if name.startswith(SeqSetVAE.BACKBONE):
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_missing_backbone_tensor_stops_finetuning_unless_allowed(tmp_path, capsys, pretrained):
    content = torch.load(pretrained, weights_only=True)
    del content["model"]["history.tau"]
    content["model"]["setvae.embed.0.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "partial.pt")
    capsys.readouterr()
    command = [*FINETUNE, str(tmp_path / "partial.pt"), "--run_dir", str(tmp_path / "run")]
    assert train.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "history.tau" in error and "setvae.embed.0.bias" in error
    assert train.main([*command, "--allow_partial"]) == 0


def fixture_of_the_original(name):
    """(content of a checkpoint of the original implementation, its expected outputs, its five sets as a batch, their vectors, the path).
    Every event is a variable of its own, because the original takes a vector an event."""
    path = SHARED / "fixtures" / f"{name}.ckpt"
    if not path.exists():
        pytest.skip(f"{path} is absent: compatibility with the original implementation was not tried")
    expected = {key: torch.from_numpy(x) for key, x in np.load(path.with_name(f"{name}_expected.npz")).items()}
    vectors, values = (torch.cat([expected[f"{kind}_{i}"] for i in range(5)]) for kind in ("var", "val"))
    sizes = torch.tensor([len(expected[f"val_{i}"]) for i in range(5)])
    events, width, column = len(values), int(sizes.max()), torch.arange(int(sizes.max()))
    cells = torch.where(column < sizes[:, None], (sizes.cumsum(0) - sizes)[:, None] + column, events)
    batch = EventBatch(event_variable=torch.arange(events), event_value=values, event_slot=torch.arange(5).repeat_interleave(sizes),
                       groups=[(5, width)], token_event=cells.flatten(), group_slot=torch.arange(5), slot_set=torch.arange(5)[None],
                       minute=expected["minutes"].float()[None], lengths=torch.tensor([5]), label=torch.tensor([0]), stay=torch.tensor([0]))
    return read_checkpoint(path), expected, batch, vectors, path


def test_an_original_pretraining_checkpoint_gives_its_outputs():
    content, expected, batch, vectors, path = fixture_of_the_original("original_small")
    model = SeqSetVAE(checkpoint_config(content, len(vectors), path), vectors).eval()
    report = load_backbone(model, checkpoint_state(content, path))
    assert report.complete and not report.unexpected
    with torch.no_grad():
        mu, logvar = model.setvae.encode(batch)
        h = model.history(mu, batch.minute)
    for mine, name in ((mu, "mu"), (logvar, "logvar"), (h, "h")):
        close(mine[0], expected[name])


def test_an_original_finetuned_checkpoint_gives_its_features_and_logits():
    content, expected, batch, vectors, path = fixture_of_the_original("original_finetuned_small")
    model = SeqSetVAE(replace(checkpoint_config(content, len(vectors), path), features="stable"), vectors).eval()
    state = checkpoint_state(content, path)
    report = load_backbone(model, state)
    assert report.complete and not report.unexpected
    model.cls_head.load_state_dict({name.removeprefix("cls_head."): x for name, x in state.items() if name.startswith("cls_head.")})
    with torch.no_grad():
        close(model.features(batch)[0], expected["features"])
        close(model(batch)[0], expected["logits"])


# ----------------------------------------------------------------------------------------------------------------------------------
# Resuming
# ----------------------------------------------------------------------------------------------------------------------------------

def same_run(whole: Path, resumed: Path):
    assert (whole / "metrics.csv").read_text() == (resumed / "metrics.csv").read_text()
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(run / name, weights_only=True)["model"] for run in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("step", [1, 4, 6])  # in the first epoch, at its last step, in the second
def test_pretraining_interrupted_and_resumed_ends_with_equal_bits(tmp_path, monkeypatch, step):
    monkeypatch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v))
    command, check = ["--mode", "pretrain", "--synthetic_stays", "24", "--device", "cpu", "--max_epochs", "2", "--batch_size", "3"], train.finite_or_stop
    assert train.main([*command, "--run_dir", str(tmp_path / "whole")]) == 0
    assert len(pd.read_csv(tmp_path / "whole" / "metrics.csv")) == 2

    def interrupting(norm, at, *rest):
        check(norm, at, *rest)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train, "finite_or_stop", interrupting)
    with pytest.raises(SystemExit, match="130"):
        train.main([*command, "--run_dir", str(tmp_path / "cut")])
    monkeypatch.setattr(train, "finite_or_stop", check)
    assert train.main([*command, "--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_the_command_printed_at_an_interruption_goes_on_with_the_run(tmp_path, monkeypatch, capsys):
    """It names the run folder alone: data, epochs and batch size must come from the run, or other stays are trained on in silence."""
    monkeypatch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v))
    assert train.main([*PRETRAIN, "--max_epochs", "2", "--run_dir", str(tmp_path / "whole")]) == 0
    check = train.finite_or_stop
    monkeypatch.setattr(train, "finite_or_stop", lambda norm, at, *a: at == 0 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="130"):
        train.main([*PRETRAIN, "--max_epochs", "2", "--run_dir", str(tmp_path / "cut")])
    monkeypatch.setattr(train, "finite_or_stop", check)
    cohort, load = synthetic_cohort(24), train.load_cohort
    monkeypatch.setattr(train, "load_cohort", lambda *a, **k: cohort if load(*a, **k).fingerprint == cohort.fingerprint else pytest.fail("other data"))
    command = next(line for line in capsys.readouterr().out.splitlines() if "python train.py" in line and "--resume" in line)
    assert train.main(command.split("train.py ")[1].split()) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_stay_that_the_checkpoint_knows_keeps_its_part_in_other_data():
    """Else a stay pretrained on could be tested on after more data are put beside the old."""
    cohort = synthetic_cohort(60)
    known = {"train": cohort.stay_id[:30].tolist(), "valid": cohort.stay_id[30:34].tolist(), "test": cohort.stay_id[34:40].tolist()}
    split = train.splits_beside(known, cohort, seed=3)
    assert all(set(ids) <= set(split[part]) for part, ids in known.items())
    assert sorted(sum(split.values(), [])) == sorted(cohort.stay_id) and train.splits_beside({}, cohort, 3) == make_splits(cohort, 3)


@pytest.mark.parametrize("full_training", [False, True])
def test_finetuning_interrupted_and_resumed_ends_with_equal_bits(tmp_path, monkeypatch, full_training):
    tiny_run = tmp_path / "pretrain"
    monkeypatch.setattr(train.finetune.__defaults__[0], "max_trainable_ratio", 1.0)  # of a tiny backbone the head is more than 5%
    with monkeypatch.context() as patch:
        patch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v))
        assert train.main([*PRETRAIN, "--run_dir", str(tiny_run)]) == 0
    command = ["--mode", "finetune", "--device", "cpu", "--max_epochs", "2", "--pretrained_ckpt", str(tiny_run / "best.pt")]
    command += ["--full_training"] * full_training
    assert train.main([*command, "--run_dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:  # a signal in the first epoch is obeyed at its end
        patch.setattr(train, "ranking", lambda *a, rank=train.ranking: os.kill(os.getpid(), signal.SIGTERM) or rank(*a))
        with pytest.raises(SystemExit, match="130"):
            train.main([*command, "--run_dir", str(tmp_path / "cut")])
    assert train.main([*command, "--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


# ----------------------------------------------------------------------------------------------------------------------------------
# The other readers: each test writes its own small data and compares the exact cohort
# ----------------------------------------------------------------------------------------------------------------------------------

def events_of(cohort) -> dict:
    """{stay: [(minute, {variable: values of the set in order})...]}: a cohort spelled out."""
    stays = {}
    for p, stay in enumerate(cohort.stay_id):
        sets = []
        for t in range(cohort.stay_start[p], cohort.stay_start[p + 1]):
            events = slice(cohort.set_start[t], cohort.set_start[t + 1])
            sets.append((float(cohort.set_minute[t]), [(cohort.variables[v], round(float(x), 4))
                                                       for v, x in zip(cohort.event_variable[events], cohort.event_value[events])]))
        stays[str(stay)] = sets
    return stays


def labels_of(cohort) -> dict:
    return dict(zip(cohort.stay_id.tolist(), cohort.label.tolist()))


def splits_of(cohort) -> dict:
    return dict(zip(cohort.stay_id.tolist(), cohort.split.tolist()))


def counted(cohort) -> dict:
    return {reason: count for reason, count in cohort.notes.items() if count}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture
def load(tmp_path):
    return lambda folder, **options: load_cohort(str(folder), cache_dir=tmp_path / "cache", **options)


# ---- one long table ----------------------------------------------------------------------------------------------------------------

EVENTS = """stay_id,minute,variable,value
7,60,HR,80
007,0,NA,139
7,0,HR,90
7,60,HR,82
7,60,,1
7,61,pH,
7,61.5,K,inf
8,5,"Na, serum",140
9,5,K,
"""


def test_long_table_gives_the_exact_cohort(tmp_path, load):
    write(tmp_path / "d/events.csv", EVENTS)
    write(tmp_path / "d/labels.csv", "stay_id,label,split\n7,1,train\n8,,test\n9,0,valid\n12,1,test\n")
    cohort = load(tmp_path / "d")
    assert events_of(cohort) == {"007": [(0, [("NA", 139)])], "7": [(0, [("HR", 90)]), (60, [("HR", 80), ("HR", 82)])],
                                 "8": [(5, [("Na, serum", 140)])]}
    assert cohort.variables == ["HR", "NA", "Na, serum"]
    assert labels_of(cohort) == {"007": -1, "7": 1, "8": -1} and splits_of(cohort) == {"007": -1, "7": 0, "8": 2}
    assert counted(cohort) == {"rows with an empty variable": 1, "rows without a finite value": 3, "outcomes of no stay": 1,
                               "stays without an outcome (unlabelled)": 2, "stays without a split (neither trained on nor scored)": 1,
                               "stays without a usable event": 1}
    assert make_splits(cohort, 0) == {"train": ["7"], "valid": [], "test": ["8"]}


def test_long_table_needs_no_labels_and_labels_leave_the_stays_identity_alone(tmp_path, load):
    write(tmp_path / "d/events.csv", EVENTS)
    bare = load(tmp_path / "d")
    assert (bare.label == -1).all() and (bare.split == -1).all() and bare.vectors.shape == (3, 0) and np.isnan(bare.statistics).all()
    write(tmp_path / "d/labels.csv", "stay_id,label\n7,1\n")
    labelled = load(tmp_path / "d")
    assert labels_of(labelled)["7"] == 1 and labelled.fingerprint == bare.fingerprint


def test_parquet_and_csv_of_one_table_are_one_cohort(tmp_path, load):
    pytest.importorskip("pyarrow")
    table = pd.DataFrame({"stay_id": [10, 9, 9], "minute": [3, 0, 2], "variable": ["a", "b", "a"], "value": [1, 2.5, 3]})
    for name in "cp":
        (tmp_path / name).mkdir()
    table.to_csv(tmp_path / "c/events.csv", index=False)
    table.astype({"variable": "category"}).to_parquet(tmp_path / "p/events.parquet")
    from_csv, from_parquet = load(tmp_path / "c"), load(tmp_path / "p")
    assert events_of(from_csv) == events_of(from_parquet) == {"10": [(3, [("a", 1)])], "9": [(0, [("b", 2.5)]), (2, [("a", 3)])]}
    assert from_csv.fingerprint == from_parquet.fingerprint


@pytest.mark.parametrize("events, labels, message", [
    ("", None, r"events.csv: an empty file"),
    ("\n", None, r"events.csv: no column stay_id"),
    ("stay_id,minute,variable,value\n", None, r"events.csv: a header and no row"),
    ("stay_id;minute;variable;value\n1;2;a;3\n", None, r"no column stay_id \(it has stay_id;minute;variable;value\)"),
    ("stay_id,minute,variable\n1,2,a\n", None, r"no column value \(it has stay_id, minute, variable\)"),
    ("stay_id,minute,variable,value,value\n1,2,a,3,3\n", None, r"column value occurs twice"),
    ("stay_id,minute,variable,value\n1,2,a,3\n1,2,a,high\n", None, r"events.csv line 3: value is 'high', not a number"),
    ("stay_id,minute,variable,value\n1,00:30,a,3\n", None, r"line 2: minute is '00:30', not a number"),
    ("stay_id,minute,variable,value\n1,2,a,3\n1,-5,a,3\n", None, r"line 3: minute is -5; give minutes since admission"),
    ("stay_id,minute,variable,value\n1,,a,3\n", None, r"line 2: minute is missing; give minutes"),
    ("stay_id,minute,variable,value\n1,inf,a,3\n", None, r"line 2: minute is inf; give minutes"),
    ("stay_id,minute,variable,value\n,1,a,3\n", None, r"line 2: stay_id is missing"),
    ("stay_id,minute,variable,value\n1,2,a,3,5\n", None, r"line 2: more cells than the 4 columns"),
    ("stay_id,minute,variable,value\n1,2,a,3\n1,2,a,3,5\n", None, r"line 3: 5 cells where the columns are 4"),
    ("stay_id,minute,variable,value\n1,2,\"a\nb\",3\n", None, r"a quoted cell holds a line break"),
    ("stay_id,minute,variable,value\n1,2,\"a,3\n", None, r"events.csv"),
    ("stay_id,minute,variable,value\n1,2,température,3\n".encode("latin1"), None, r"events.csv: not UTF-8"),
    ("stay_id,minute,variable,value\n1,2,a,3\n".encode("utf-16"), None, r"events.csv: not UTF-8"),
    ("stay_id,minute,variable,value\n1,2,a,nan\n", None, r"no usable event"),
    (EVENTS, "stay_id,label\n7,2\n", r"labels.csv line 2: label is 2, not 0 or 1"),
    (EVENTS, "stay_id,label\n8,0\n7,dead\n", r"labels.csv line 3: label is 'dead', not a number"),
    (EVENTS, "stay_id,label\n7,1\n8,0\n7.0,1\n", r"labels.csv line 4: stay_id is '7.0', which occurs twice"),
    (EVENTS, "stay_id,label\n,1\n", r"labels.csv line 2: stay_id is missing"),
    (EVENTS, "stay_id,label,split\n7,1,train\n8,1,holdout\n", r"labels.csv line 3: split is 'holdout'; it is one of train, valid, test"),
    (EVENTS, "stay_id,died\n7,1\n", r"labels.csv: no column label"),
    (EVENTS, "stay_id,label\n", r"labels.csv: a header and no row"),
])
def test_long_table_bad_input(tmp_path, load, events, labels, message):
    write(tmp_path / "d/events.csv", events)
    if labels is not None:
        write(tmp_path / "d/labels.csv", labels)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "d")
    assert "\n" not in str(caught.value)


def test_windows_text_reads_the_same(tmp_path, load):
    write(tmp_path / "d/events.csv", b"\xef\xbb\xbf" + EVENTS.replace("\n", "\r\n").encode().rstrip())
    write(tmp_path / "e/events.csv", EVENTS)
    assert load(tmp_path / "d").fingerprint == load(tmp_path / "e").fingerprint


@pytest.mark.parametrize("columns, message", [
    ({"value": ["high"]}, "column value holds (large_)?string where numbers belong"),
    ({"stay_id": [pd.Timestamp(0)]}, "column stay_id holds timestamp.* where text or whole numbers belong"),
    ({"minute": [-1]}, "events.parquet row 1: minute is -1"),
])
def test_long_table_bad_parquet(tmp_path, load, columns, message):
    pytest.importorskip("pyarrow")
    pd.DataFrame({"stay_id": [1], "minute": [2], "variable": ["a"], "value": [3.0]} | columns).to_parquet(tmp_path / "events.parquet")
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_damaged_parquet_two_tables_and_no_pyarrow(tmp_path, load, monkeypatch):
    pytest.importorskip("pyarrow")
    write(tmp_path / "events.parquet", "PAR1 not really")
    with pytest.raises(InputError, match="events.parquet: not a readable Parquet file"):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        load(tmp_path)
    write(tmp_path / "events.csv", EVENTS)
    with pytest.raises(InputError, match="holds both events.csv and events.parquet"):
        load(tmp_path)


def test_long_table_reads_a_million_events_a_second_or_nearly(tmp_path):
    """A Python loop over rows would take minutes: the bound only tells vectorised code from a loop, on a busy machine too."""
    n, rng = 300_000, np.random.default_rng(0)
    pd.DataFrame({"stay_id": np.arange(n) // 300, "minute": np.tile(np.arange(300), n // 300), "variable": rng.integers(0, 40, n).astype(str),
                  "value": rng.normal(size=n).round(2)}).to_csv(tmp_path / "events.csv", index=False)
    start = time.perf_counter()
    cohort = read_long_table(tmp_path)
    assert len(cohort.event_value) == n and time.perf_counter() - start < 6


# ---- the original layout -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def original(tmp_path):
    home = tmp_path / "processed"
    write(home / "patient_ehr/train/200001.0.csv", "variable,value,minute\nHR,80,0\nK,4,30\nHR,90,0\n")
    write(home / "patient_ehr/valid/200002.0.csv", "variable,value,minute\nHR,70,15\nNew,nan,20\n")
    write(home / "patient_ehr/test/200003.0.csv", "variable,value,minute\nNew,3,1\n")
    write(home / "patient_ehr/test/200004.0.csv", "variable,value,minute\n")
    write(home / "cached.csv", ",Key,0,1,2\n0,HR,1,0,0.5\n1,K,0,2,0\n2,Unused,1,1,1\n")
    write(home / "oc.csv", "ts_id,in_hospital_mortality\n200001,1\n200003,0\n999,1\n")
    write(home / "stats.csv", "variable,mean,std\nHR,85,10\nK,4,0\nUnused,1,1\n")
    return home


def test_original_layout_gives_the_exact_cohort(original, load):
    cohort = load(original, params_map=str(original / "stats.csv"), label_file=str(original / "oc.csv"))
    assert events_of(cohort) == {"200001.0": [(0, [("HR", 80), ("HR", 90)]), (30, [("K", 4)])], "200002.0": [(15, [("HR", 70)])],
                                 "200003.0": [(1, [("New", 3)])]}
    assert labels_of(cohort) == {"200001.0": 1, "200002.0": -1, "200003.0": 0}
    assert splits_of(cohort) == {"200001.0": 0, "200002.0": 1, "200003.0": 2}
    np.testing.assert_array_equal(cohort.statistics, np.array([[85, 10], [np.nan] * 2, [np.nan] * 2], dtype=np.float32))
    np.testing.assert_array_equal(cohort.vectors, np.array([[1, 0, .5], [0, 2, 0], [np.nan] * 3], dtype=np.float32))
    assert counted(cohort) == {"rows without a finite value": 1, "stays without an outcome (unlabelled)": 2, "outcomes of no stay": 1,
                               "stays without a usable event": 1, "variables without given statistics (fitted)": 2,
                               "given statistics of no variable": 1, "variables without given vectors (hashed from the name)": 1,
                               "given vectors of no variable": 1}
    # patient_ehr itself may be named, as the original did
    assert load(original / "patient_ehr").fingerprint == cohort.fingerprint


def test_original_layout_feeds_normalizer_and_vectors(original, load):
    cohort = load(original, params_map=str(original / "stats.csv"))
    normalizer = Normalizer.fit(cohort, np.arange(len(cohort)))
    assert normalizer.mean.tolist() == [85, 0, 0] and normalizer.std.tolist() == [10, 1, 1]  # K and New: fitted, constant
    vectors = variable_vectors(cohort.variables, 3, cohort.vectors)
    assert vectors[:2].tolist() == [[1, 0, .5], [0, 2, 0]] and vectors[2].norm().item() == pytest.approx(1)
    assert vectors[2].equal(variable_vectors(["New"], 3)[0])
    with pytest.raises(InputError, match="vectors of 3 dimensions where the model takes 64"):
        variable_vectors(cohort.variables, 64, cohort.vectors)


def test_original_layout_set_index_tells_sets_apart(tmp_path, load):
    write(tmp_path / "patient_ehr/train/1.csv", "variable,value,minute,set_index\na,1,10,0\nb,2,10,1\nc,3,10,0\nd,4,20,2\ne,5,15,2\n")
    cohort = load(tmp_path)
    assert events_of(cohort) == {"1": [(10, [("a", 1), ("c", 3)]), (10, [("b", 2)]), (15, [("d", 4), ("e", 5)])]}
    write(tmp_path / "patient_ehr/train/1.csv", "variable,value,minute,set_index\na,1,10,0\nb,2,10,\n")
    with pytest.raises(InputError, match=r"1.csv line 3: set_index is missing"):
        load(tmp_path)


def test_original_layout_in_parquet_equals_csv(original, tmp_path, load):
    pytest.importorskip("pyarrow")
    for path in original.glob("patient_ehr/*/*.csv"):
        target = tmp_path / "parquet/patient_ehr" / path.parent.name / f"{path.stem}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pd.read_csv(path).to_parquet(target)
    assert load(tmp_path / "parquet").fingerprint == load(original).fingerprint
    write(tmp_path / "parquet/patient_ehr/test/5.csv", "variable,value,minute\na,1,1\n")
    with pytest.raises(InputError, match="holds both CSV and Parquet"):
        load(tmp_path / "parquet")


@pytest.mark.parametrize("name, text, message", [
    ("patient_ehr/valid/200002.0.csv", "", "200002.0.csv: an empty file"),
    ("patient_ehr/valid/200002.0.csv", "value,minute\n1,2\n", "200002.0.csv line 1: other columns than in 200001.0.csv"),
    ("patient_ehr/valid/200002.0.csv", "variable,value,minute\nHR,80,1\nHR,x,2\n", "200002.0.csv line 3: value is 'x', not a number"),
    ("patient_ehr/valid/200002.0.csv", "variable,value,minute\nHR,80,1\nHR,80,-2\n", "200002.0.csv line 3: minute is -2"),
    ("patient_ehr/valid/200002.0.csv", "variable,value,minute\nHR,80,1,3\n", "200002.0.csv line 2: 4 cells where the columns are 3"),
    ("patient_ehr/valid/200001.0.csv", "variable,value,minute\nHR,80,1\n", "stay 200001.0 occurs more than once"),
    ("oc.csv", "ts_id,in_hospital_mortality\n200001,3\n", "oc.csv line 2: in_hospital_mortality is 3, not 0 or 1"),
    ("oc.csv", "ts_id,in_hospital_mortality\n200001,1\n200001,1\n", "oc.csv line 3: ts_id is '200001', which occurs twice"),
    ("oc.csv", "id,in_hospital_mortality\n200001,1\n", "oc.csv: no column ts_id"),
    ("stats.csv", "variable,mean,std\nHR,1,1\nHR,1,1\n", "stats.csv line 3: variable is 'HR', where each line names another one"),
    ("stats.csv", "variable,mean,std\nHR,1,-1\n", "stats.csv line 2: std is -1, below 0"),
    ("stats.csv", "variable,mean,std\nHR,one,1\n", "stats.csv line 2: mean is 'one', not a number"),
    ("cached.csv", "Key,0,1\nHR,1,2\nHR,1,2\n", "cached.csv line 3: Key is 'HR', where each line names another"),
    ("cached.csv", "Key,0,1\nHR,1,\n", "cached.csv line 2: 1 is missing, not finite"),
    ("cached.csv", "Key\nHR\n", "cached.csv: no column beside Key"),
])
def test_original_layout_bad_input(original, load, name, text, message):
    write(original / name, text)
    with pytest.raises(InputError, match=message):
        load(original, params_map=str(original / "stats.csv"), label_file=str(original / "oc.csv"))


class Call:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_params_map_pickle_admits_plain_and_numpy_numbers(original, load, protocol):
    content = {"HR": {"mean": np.float64(85), "std": np.float32(10)}, "K": {"mean": np.int64(4), "std": 2.5}}
    write(original / "stats.pkl", pickle.dumps(content, protocol))
    cohort = load(original, params_map=str(original / "stats.pkl"))
    assert cohort.statistics[:2].tolist() == [[85, 10], [4, 2.5]]


@pytest.mark.parametrize("call", [Call(os.system, "touch {}"), Call(eval, "open('{}', 'w')"), Call(exec, "open('{}', 'w')"),
                                  Call(getattr, "", "join"), Call(np.array, [1.0])])
def test_params_map_pickle_executes_nothing(original, load, tmp_path, call):
    witness = tmp_path / "executed"
    call.call = call.call[0], tuple(a.format(witness) if isinstance(a, str) else a for a in call.call[1])
    write(original / "stats.pkl", pickle.dumps({"HR": {"mean": call, "std": 1.0}}))
    with pytest.raises(InputError, match=r"stats.pkl: not a plain pickle .*it asks for"):
        load(original, params_map=str(original / "stats.pkl"))
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", pickle.dumps([1, 2]), pickle.dumps({"HR": {"mean": 1}}), pickle.dumps({"HR": 3}),
                                     pickle.dumps({"HR": {"mean": "x", "std": 1}}), pickle.dumps({"HR": {"mean": 1, "std": -1}}),
                                     b"cnumpy\ndtype\n(S'O8'\ntR.", b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'abcdefgh'\ntR."])
def test_params_map_bad_pickle(original, load, content):
    write(original / "stats.pkl", content)
    with pytest.raises(InputError, match="stats.pkl"):
        load(original, params_map=str(original / "stats.pkl"))


def test_options_are_refused_where_nothing_reads_them(original, tmp_path, load):
    write(tmp_path / "d/events.csv", EVENTS)
    with pytest.raises(InputError, match="--label_file .*oc.csv: not read with a long table"):
        load(tmp_path / "d", label_file=str(original / "oc.csv"))
    with pytest.raises(InputError, match="--params_map .*: not read with the embedded cohort"):
        load_cohort(None, cache_dir=tmp_path / "cache", params_map=str(original / "stats.csv"))
    with pytest.raises(InputError, match="--label_file .*nowhere.csv: no such file"):
        load(original, label_file=str(original / "nowhere.csv"))
    with pytest.raises(InputError, match="give .csv with variable,mean,std or .pkl"):
        load(original, params_map=str(write(original / "stats.json", "{}")))


def test_cache_follows_the_options_and_their_files(original, load):
    assert (load(original).label == -1).all()
    assert labels_of(load(original, label_file=str(original / "oc.csv")))["200001.0"] == 1
    write(original / "oc.csv", "ts_id,in_hospital_mortality\n200001,0\n200003,1\n")
    assert labels_of(load(original, label_file=str(original / "oc.csv")))["200001.0"] == 0


# ---- MEDS ----------------------------------------------------------------------------------------------------------------------------

def at(text):
    return pd.Timestamp(f"2020-01-{text}") if text else pd.NaT


def meds(folder, name, **columns):
    pytest.importorskip("pyarrow")
    table = pd.DataFrame(columns)
    for column in ("time", "prediction_time"):
        if column in table:
            table[column] = table[column].astype("datetime64[us]")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / name, index=False)


@pytest.fixture
def meds_folder(tmp_path):
    folder = tmp_path / "meds"
    meds(folder, "data/train/0.parquet", subject_id=[5, 5, 5, 5, 5], code=["HR", "GENDER//F", "HR", "K", "MEDS_DEATH"],
         time=[at("01 10:00:30"), at(None), at("01 09:59:50"), at("01 12:00"), at("02 00:00")],
         numeric_value=np.array([80, np.nan, 70, 4, np.nan], dtype=np.float32))
    meds(folder, "data/held_out/0.parquet", subject_id=[6, 6, 7, 7], code=["ADMIT", "K", "GENDER//M", None],
         time=[at("03 00:00"), at("03 00:05"), at(None), at("03 00:00")])
    meds(folder, "metadata/subject_splits.parquet", subject_id=[5, 6, 7], split=["train", "held_out", "tuning"])
    return folder


def test_meds_without_labels_is_one_sample_a_subject(meds_folder, load):
    cohort = load(meds_folder)
    assert events_of(cohort) == {"5": [(0, [("GENDER//F", 1), ("HR", 70)]), (1, [("HR", 80)]), (121, [("K", 4)])],
                                 "6": [(0, [("ADMIT", 1)]), (5, [("K", 1)])], "7": [(0, [("GENDER//M", 1)])]}
    assert splits_of(cohort) == {"5": 0, "6": 2, "7": 1} and (cohort.label == -1).all()
    assert counted(cohort) == {"events without a code": 1, "MEDS_DEATH events": 1} and "MEDS_DEATH" not in cohort.variables


def test_meds_sample_holds_events_up_to_and_including_the_prediction_time(meds_folder, load):
    meds(meds_folder, "labels/death/0.parquet", subject_id=[5, 5, 5, 6, 99, 6],
         prediction_time=[at("01 12:00"), at("01 10:00:29"), at("05 00:00"), at("03 00:04"), at("01 00:00"), at("02 00:00")],
         boolean_value=[True, False, True, False, True, False])
    cohort = load(meds_folder)
    assert events_of(cohort) == {
        "5@2020-01-01T12:00": [(0, [("GENDER//F", 1), ("HR", 70)]), (1, [("HR", 80)]), (121, [("K", 4)])],
        "5@2020-01-01T10:00:29": [(0, [("GENDER//F", 1), ("HR", 70)])],  # the event one second later shares the minute, yet is the future
        "5@2020-01-05": [(0, [("GENDER//F", 1), ("HR", 70)]), (1, [("HR", 80)]), (121, [("K", 4)])],
        "6@2020-01-03T00:04": [(0, [("ADMIT", 1)])]}
    assert cohort.label.tolist() == [1, 0, 1, 0] and cohort.split.tolist() == [0, 0, 0, 2]
    assert counted(cohort) == {"events without a code": 1, "MEDS_DEATH events": 1, "labels of no subject": 1, "stays without a usable event": 1}
    (meds_folder / "metadata/subject_splits.parquet").unlink()
    with pytest.raises(InputError, match="subjects with several samples and no metadata/subject_splits.parquet"):
        load(meds_folder)


def test_meds_agrees_with_a_plain_loop(tmp_path, load):
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(3)
    n, start = 400, np.datetime64("2021-03-04T05:06:07", "us")
    subject, time = rng.integers(0, 12, n) * 10**17, start + rng.integers(0, 5000, n) * np.timedelta64(20, "s")
    time[rng.random(n) < .1] = np.datetime64("NaT")
    code, value = rng.choice(["a", "b", "c", "MEDS_DEATH"], n), np.where(rng.random(n) < .3, np.nan, rng.normal(size=n)).astype(np.float32)
    meds(tmp_path, "data/0.parquet", subject_id=subject, time=time, code=code, numeric_value=value)
    asked = pd.DataFrame({"s": rng.integers(0, 12, 30) * 10**17, "t": start + rng.integers(0, 5000, 30) * np.timedelta64(20, "s")}).drop_duplicates()
    meds(tmp_path, "labels/0.parquet", subject_id=asked.s, prediction_time=asked.t, boolean_value=rng.random(len(asked)) < .5)
    meds(tmp_path, "metadata/subject_splits.parquet", subject_id=np.arange(12) * 10**17, split=["train"] * 12)
    found = events_of(load(tmp_path))
    expected = {}
    for s, t in asked.itertuples(index=False):
        mine = (subject == s) & (code != "MEDS_DEATH")
        origin = np.nanmin(time[mine & ~np.isnat(time)]).astype("datetime64[m]")
        sets = {}
        for i in np.flatnonzero(mine & (np.isnat(time) | (time <= np.datetime64(t)))):
            minute = 0 if np.isnat(time[i]) else (time[i].astype("datetime64[m]") - origin).astype(int)
            sets.setdefault(float(minute), []).append((str(code[i]), 1.0 if np.isnan(value[i]) else round(float(value[i]), 4)))
        if sets:
            expected[f"{s}@{np.datetime_as_string(np.datetime64(t, 'us'), unit='auto')}"] = sorted((m, sorted(e)) for m, e in sets.items())
    assert {stay: [(m, sorted(e)) for m, e in sets] for stay, sets in found.items()} == expected


def test_meds_keeps_distinct_minutes_apart_decades_after_birth(tmp_path, load):
    pytest.importorskip("pyarrow")
    times = [pd.Timestamp("1940-01-01"), *(pd.Timestamp("2020-01-01 00:00") + pd.Timedelta(minutes=i) for i in range(4))]
    meds(tmp_path, "data/0.parquet", subject_id=[1] * 5, time=times, code=["MEDS_BIRTH", *"abcd"])
    cohort = load(tmp_path)
    assert np.diff(cohort.set_start).tolist() == [1] * 5 and (np.diff(cohort.set_minute) >= 0).all()


@pytest.mark.parametrize("name, columns, message", [
    ("data/1.parquet", {"subject_id": [5], "time": [at("01 00:00")]}, "1.parquet: no column code"),
    ("data/1.parquet", {"subject_id": [5], "time": [at("01 00:00")], "code": [3.5], "numeric_value": ["x"]}, "the files' columns differ in type"),
    ("data/1.parquet", {"subject_id": [None], "time": [at("01 00:00")], "code": ["a"]}, "data/1.parquet row 1: subject_id is missing"),
    ("metadata/subject_splits.parquet", {"subject_id": [5], "split": ["dev"]}, "row 1: split is 'dev'; it is one of train, tuning, held_out"),
    ("metadata/subject_splits.parquet", {"subject_id": [5, 5], "split": ["train", "train"]}, "row 2: subject_id is '5', where each row"),
    ("labels/0.parquet", {"subject_id": [5], "prediction_time": [at(None)], "boolean_value": [True]}, "row 1: prediction_time is missing"),
    ("labels/0.parquet", {"subject_id": [5, 5], "prediction_time": [at("01 00:00")] * 2, "boolean_value": [True, True]},
     "row 2: prediction_time is '2020-01-01.*', twice for one subject"),
    ("labels/0.parquet", {"subject_id": [99], "prediction_time": [at("01 00:00")], "boolean_value": [True]}, "no usable event"),
])
def test_meds_bad_input(meds_folder, load, name, columns, message):
    meds(meds_folder, name, **columns)
    with pytest.raises(InputError, match=message):
        load(meds_folder)


# ---- PhysioNet 2019 --------------------------------------------------------------------------------------------------------------------

def test_physionet2019_gives_the_exact_cohort(tmp_path, load):
    write(tmp_path / "training_setA/p000001.psv", "HR|Temp|Age|ICULOS|SepsisLabel\nNaN|NaN|70.5|1|0\n80|36.6|70.5|2|0\n82|NaN|70.5|3|1\n")
    write(tmp_path / "training_setB/p100001.psv", "HR|Temp|Age|ICULOS|SepsisLabel\n90|inf|NaN|4|0\nNaN|NaN|50|5|0\nNaN|37|50|6|0\n")
    cohort = load(tmp_path)
    assert events_of(cohort) == {"p000001": [(0, [("Age", 70.5), ("ICULOS", 1)]), (60, [("HR", 80), ("Temp", 36.6)]), (120, [("HR", 82)])],
                                 "p100001": [(0, [("HR", 90), ("ICULOS", 4)]), (60, [("Age", 50)]), (120, [("Temp", 37)])]}
    assert cohort.variables == ["Age", "HR", "ICULOS", "Temp"] and labels_of(cohort) == {"p000001": 1, "p100001": 0}
    assert counted(cohort) == {"repeated descriptors": 7, "infinite values": 1}


@pytest.mark.parametrize("text, message", [
    ("HR|SepsisLabel\n80|0\n81|2\n", r"p1.psv line 3: SepsisLabel is 2, not 0 or 1"),
    ("HR|SepsisLabel\n80|\n", r"p1.psv line 2: SepsisLabel is missing, not 0 or 1"),
    ("HR|SepsisLabel\nfast|0\n", r"p1.psv line 2: HR is 'fast', not a number"),
    ("HR|Temp\n80|37\n", r"p1.psv: no column SepsisLabel"),
    ("HR,SepsisLabel\n80,0\n", r"p1.psv: no column SepsisLabel"),
    ("", r"p1.psv: an empty file"),
    ("HR|SepsisLabel\n", r"a header and no row"),
])
def test_physionet2019_bad_input(tmp_path, load, text, message):
    write(tmp_path / "training_setA/p1.psv", text)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_unknown_folder_lists_every_reader(tmp_path, load):
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert all(reader.name in str(caught.value) for reader in data.READERS)


# ----------------------------------------------------------------------------------------------------------------------------------
# What users bring and take away: original checkpoints, predictions, pictures, the commands of the README
# ----------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def original_data(tmp_path_factory):
    """Options for a folder of the original layout with vectors of 24 dimensions, as the original's fixtures take: 40 stays."""
    if not (SHARED / "fixtures").exists():
        pytest.skip("shared/fixtures is absent: compatibility with the original implementation was not tried")
    home, rng = tmp_path_factory.mktemp("original"), np.random.default_rng(0)
    names = [f"lab{v}" for v in range(7)]
    for i, stay in enumerate(random_stays(rng.integers(1, 9, 40))):
        lines = [f"{names[v]},{x + 5},{minute}" for minute, events in stay for v, x in events]
        write(home / f"patient_ehr/{data.SPLITS[i % 4 % 3]}/{i}.csv", "\n".join(["variable,value,minute", *lines]) + "\n")
    write(home / "oc.csv", "ts_id,in_hospital_mortality\n" + "".join(f"{i},{i // 4 % 2}\n" for i in range(40)))
    write(home / "stats.csv", "variable,mean,std\n" + "".join(f"{name},5,1\n" for name in names))
    pd.DataFrame(rng.normal(size=(7, 24))).assign(Key=names).to_csv(home / "cached.csv", index=False)
    return ["--data_dir", str(home), "--params_map_path", str(home / "stats.csv"), "--label_path", str(home / "oc.csv")]


def without_hyper_parameters(name: str, prefix: str, folder: Path) -> Path:
    """A fixture's bare state dict behind a wrapper's prefix."""
    state = torch.load(SHARED / "fixtures" / f"{name}.ckpt", weights_only=True)["state_dict"]
    torch.save({prefix + key: tensor for key, tensor in state.items()}, folder / "bare.pt")
    return folder / "bare.pt"


HEADS = ["--set_heads", "2", "--transformer_heads", "4"]  # of the fixtures


def test_an_original_checkpoint_is_finetuned_and_scored(tmp_path, capsys, original_data):
    path = SHARED / "fixtures" / "original_small.ckpt"
    assert train.main([*FINETUNE, str(path), *original_data, "--run_dir", str(tmp_path / "whole")]) == 0
    assert "Loaded pretrained weights" in capsys.readouterr().out
    bare = without_hyper_parameters("original_small", "module.", tmp_path)
    command = [*FINETUNE, str(bare), *original_data, "--run_dir", str(tmp_path / "bare")]
    one_error_line(capsys, train.main(command), "--set_heads")
    one_error_line(capsys, train.main([*command, "--set_heads", "2"]), "--transformer_heads")
    one_error_line(capsys, train.main([*command, "--set_heads", "5", "--transformer_heads", "4"]), "do not divide")
    assert train.main([*command, *HEADS]) == 0
    runs = [torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("whole", "bare")]
    assert runs[0]["model_config"] == runs[1]["model_config"]
    original = load_checkpoint_weights(path)
    for name, tensor in runs[0]["model"].items():
        assert tensor.equal(runs[1]["model"][name]), name
        assert not name.startswith(SeqSetVAE.BACKBONE) or tensor.equal(original[name]), name
    capsys.readouterr()
    assert main(["--checkpoint", str(tmp_path / "whole" / "best.pt")]) == 0
    assert "AUROC" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
def test_an_original_finetuned_checkpoint_is_scored_with_its_data(tmp_path, capsys, original_data, prefix):
    whole = SHARED / "fixtures" / "original_finetuned_small.ckpt"
    bare = without_hyper_parameters("original_finetuned_small", prefix, tmp_path)
    assert main(["--checkpoint", str(whole), *original_data, "--predictions", str(tmp_path / "whole.csv"), "--json", str(tmp_path / "a.json")]) == 0
    assert main(["--checkpoint", str(bare), *original_data, *HEADS, "--predictions", str(tmp_path / "bare.csv")]) == 0
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "bare.csv").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["stays"] == 10  # patient_ehr/test

    # The probabilities are those of its weights on the data's values, vectors and statistics.
    model, _, cohort, dataset, _ = open_classifier(whole, original_data[1], original_data[3], original_data[5])
    assert model.config.features == "stable" and model.config.head_widths is None and model.trees is None and model.config.classification_only
    assert dataset.normalizer.mean.tolist() == [5] * 7 and torch.equal(model.setvae.vocabulary, torch.from_numpy(np.array(cohort.vectors)))
    table = pd.read_csv(tmp_path / "whole.csv")
    with torch.no_grad():
        expected = model(dataset[np.arange(len(cohort))]).softmax(-1)[:, 1]
    np.testing.assert_allclose(table["probability"], expected, atol=1e-6)
    capsys.readouterr()
    one_error_line(capsys, main(["--checkpoint", str(whole), "--data_dir", original_data[1]]), "--params_map")
    one_error_line(capsys, main(["--checkpoint", str(whole)]), "cached.csv")
    one_error_line(capsys, main(["--checkpoint", str(SHARED / "fixtures" / "original_small.ckpt"), *original_data]), "not a finetuned checkpoint")
    one_error_line(capsys, main(["--checkpoint", str(whole), *original_data, "--baselines"]), "--baselines")


@pytest.mark.parametrize("config", [dict(features="beliefs", summaries=True), dict(features="multiscale"), dict(classification_only=False),
                                    dict(decoder="slots", features="stable", summaries=True)])
def test_the_risk_over_time_equals_scoring_the_truncated_stay(config):
    stay = random_stays([37])[0]
    model, cohort = build(SeqSetVAE, tiny(**config)), cohort_of([random_stays([5])[0], stay])
    trajectory = risk_over_time(model, StayDataset(cohort, PLAIN), 1, together=8)
    truncated = StayDataset(cohort_of([stay[:end] for end in range(1, 38)]), PLAIN)
    np.testing.assert_allclose(trajectory["risk"], predict(model, encode_stays(model, truncated, np.arange(37), CPU)), atol=1e-5)  # float32, in other batches
    assert trajectory["minute"] == [minute for minute, _ in stay] and trajectory["events"] == [len(events) for _, events in stay]


def write_long_table(folder: Path, cohort, labels: bool) -> Path:
    """The long table of a cohort."""
    sets = np.repeat(np.arange(len(cohort.set_minute)), np.diff(cohort.set_start))
    stay = np.searchsorted(cohort.stay_start, sets, side="right") - 1
    folder.mkdir()
    pd.DataFrame({"stay_id": cohort.stay_id[stay], "minute": cohort.set_minute[sets], "variable": np.array(cohort.variables)[cohort.event_variable],
                  "value": cohort.event_value}).to_csv(folder / "events.csv", index=False)
    if labels:
        pd.DataFrame({"stay_id": cohort.stay_id, "label": cohort.label}).to_csv(folder / "labels.csv", index=False)
    return folder


def test_the_analysis_writes_what_is_asked_for_with_or_without_labels(tmp_path, capsys, finetuned):
    pytest.importorskip("matplotlib")
    model, content, cohort, dataset, _ = open_classifier(finetuned)
    names = ("predictions", "embeddings", "json", "plots")
    options = [text for name in names for text in (f"--{name}", str(tmp_path / name))] + ["--trajectory", cohort.stay_id[3]]
    capsys.readouterr()
    assert main(["--checkpoint", str(finetuned), *options]) == 0
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "json").read_text())
    auroc = figures["methods"][CHECKPOINT]["auroc"]
    assert f"AUROC                {auroc['value']:.4f}  95% [{auroc['interval'][0]:.3f}, {auroc['interval'][1]:.3f}]" in printed
    table, arrays = pd.read_csv(tmp_path / "predictions"), np.load(tmp_path / "embeddings")
    assert table["stay_id"].tolist() == arrays["stay_id"].tolist() == cohort.stay_id.tolist() and table["label"].tolist() == cohort.label.tolist()
    test = table[table["split"] == "test"]
    assert auroc["value"] == roc_auc_score(test["label"], test["probability"]) and figures["stays"] == len(test)
    np.testing.assert_allclose(predict(model, torch.from_numpy(arrays["features"])), table["probability"], atol=1e-6)
    assert arrays["h"].shape == (24, model.config.latent_dim)
    trajectory = figures["trajectory"]
    assert trajectory["stay"] == cohort.stay_id[3] and trajectory["risk"][-1] == pytest.approx(table["probability"][3], abs=1e-6)
    assert f"{trajectory['risk'][0]:.4f}" in printed
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == ["calibration.png", "curves.png", "features.png", "ranking.png", "trajectory.png"]

    unlabelled = ["--checkpoint", str(finetuned), "--data_dir", str(write_long_table(tmp_path / "unlabelled", cohort, labels=False))]
    assert main([*unlabelled, "--predictions", str(tmp_path / "new.csv")]) == 0
    assert "nothing to score" in capsys.readouterr().out
    again = pd.read_csv(tmp_path / "new.csv")
    np.testing.assert_allclose(again["probability"], table["probability"], atol=1e-5)
    assert again["label"].isna().all() and again["split"].tolist() == table["split"].tolist()
    one_error_line(capsys, main(unlabelled), "--predictions needs no label")
    one_error_line(capsys, main([*unlabelled, "--trajectory", "nobody"]), "nobody")


def test_analysis_options_need_a_checkpoint_and_plots_need_matplotlib(capsys, monkeypatch, finetuned):
    one_error_line(capsys, main(["--plots", "x"]), "--checkpoint")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    one_error_line(capsys, main(["--checkpoint", str(finetuned), "--plots", "x"]), "pip install matplotlib")
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint", str(finetuned), "--unknown"])


def test_the_protocols_table_pairs_each_method_with_the_better_baseline(tmp_path, capsys):
    rng, label = np.random.default_rng(0), np.arange(60) % 3 == 0
    for seed in range(2):
        for method, noise in zip((*BASELINES, Cell().name), (1.5, 1.0, 0.3)):
            (tmp_path / f"seed{seed}").mkdir(exist_ok=True)
            table = pd.DataFrame({"stay_id": range(60), "label": label.astype(int), "probability": label + noise * rng.normal(size=60)})
            table.to_csv(predictions_path(tmp_path / f"seed{seed}", method, 1.0), index=False)
    print_protocol(tmp_path)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "±" in line]
    assert [row[0][2:] for row in rows] == [Cell().name, BASELINES[1], BASELINES[0]] and all(row[1] == "2" for row in rows)
    assert rows[0][4].startswith("+0.") and rows[2][4].startswith("-0.") and rows[1][4].strip() == ""


def test_the_benchmarks_plain_loop_agrees_with_the_batched_model():
    config = ModelConfig.original(7, input_dim=12, reduced_dim=8, latent_dim=16, inducing=3, layers=2, heads=2, ff_dim=24)
    assert_plain_loop_agrees(config, StayDataset(cohort_of(random_stays()), PLAIN), np.arange(4))


def test_the_benchmark_prints_a_table_and_appends_to_its_csv(tmp_path, capsys, monkeypatch, processes):
    sizes = dict(input_dim=12, reduced_dim=8, latent_dim=16, inducing=3, layers=2, heads=2, ff_dim=24)
    for name, value in {"BENCHMARK": {"tiny": (partial(ModelConfig.original, **sizes), 1, 1, 3, (PLAIN_LOOP, "float32"))}, "ROUNDS": 1, "LOOPED": 2,
                        "MATMUL": 64, "CHECKPOINTS": tmp_path}.items():
        monkeypatch.setattr(sys.modules[__name__], name, value)
    folder = write_long_table(tmp_path / "table", synthetic_cohort(24), labels=False)
    for runs in (1, 2):
        assert main(["--benchmark", "--data_dir", str(folder)]) == 0
        out, written = capsys.readouterr().out, pd.read_csv(tmp_path / "benchmark.csv")
        assert all(word in out for word in ("pretrain step", "3-epoch finetune", "inference", "plain loop", "x plain", "% of peak"))
        assert (written.groupby(["what", "unit"]).size() == runs).all() and (written["value"] > 0).sum() > 40 * runs
    faster = written[written["what"].eq("tiny, pretrain step, float32") & written["unit"].eq("x plain")]["value"]
    assert len(faster) == 2 and (faster > 1).all()  # else the batches are worth nothing


def readme_blocks(marker: str) -> list[tuple[str, str]]:
    """What README.md shows in a fenced block after <!-- marker: argument -->: (argument, text)."""
    text = Path(train.__file__).with_name("README.md").read_text()
    found = re.findall(rf"<!-- {marker}:? ?([^\n]*?) ?-->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found, f"README.md holds no block marked <!-- {marker} -->"
    return found


@pytest.mark.parametrize("folder, reader, stay, label, options", [
    ("my_table", "long table", "1001", 0, {}), ("physionet2012", "PhysioNet 2012", "132539", 0, {}), ("physionet2019", "PhysioNet 2019", "p000001", 0, {}),
    ("original", "original layout", "200001", 0, {"params_map": "stats.csv", "label_file": "oc.csv"}), ("meds", "MEDS", "1@2020-01-02T08:00", 0, {})])
def test_the_readmes_examples_of_data_are_read(tmp_path, load, monkeypatch, folder, reader, stay, label, options):
    for path, text in readme_blocks("file"):
        write(tmp_path / path, text)
    if folder == "meds":
        pytest.importorskip("pyarrow")
        monkeypatch.chdir(tmp_path)
        for folders, code in readme_blocks("python"):
            for name in folders.split():
                Path(name).mkdir(parents=True)
            exec(code, {})
    cohort = load(tmp_path / folder, **{name: str(tmp_path / folder / file) for name, file in options.items()})
    assert cohort.reader.startswith(reader) and labels_of(cohort) == {stay: label}
    assert not np.isnan(cohort.statistics).any() and not np.isnan(cohort.vectors).any() if options else True


def test_the_readmes_commands_for_ones_own_table(tmp_path, capsys, monkeypatch):
    """As printed there, but on 60 stays and for one epoch."""
    pytest.importorskip("matplotlib")
    cohort = synthetic_cohort(60)
    write_long_table(tmp_path / "my_table", replace(cohort, stay_id=np.arange(1001, 1061).astype(str)), labels=True)
    monkeypatch.chdir(tmp_path)
    for line in (line for _, block in readme_blocks("run") for line in block.splitlines()):
        python, script, *options = shlex.split(line, comments=True)
        assert python == "python" and {"train.py": train.main, "test_suite.py": main}[script](options + ["--max_epochs", "1"] * (script == "train.py")) == 0, line
    assert "Stay 1001 (label" in capsys.readouterr().out
    assert json.loads(Path("mine.json").read_text())["stays"] == 12 and len(pd.read_csv("mine.csv")) == len(np.load("mine.npz")["h"]) == 60
    assert len(list(Path("mine-plots").glob("*.png"))) == 4


# ----------------------------------------------------------------------------------------------------------------------------------
# Trust: killed processes, failing disks, forged checkpoints, damaged inputs, leaks, reproducibility. `--soak` runs the random ones at length
# ----------------------------------------------------------------------------------------------------------------------------------

SOAK = "SEQSETVAE_SOAK" in os.environ  # set by `python test_suite.py --soak`
SMALL = {"pretrain": [*PRETRAIN, "--batch_size", "3", "--max_epochs", "3"], "head": [*FINETUNE, "pretrain/best.pt", "--max_epochs", "6"],
         "full training": [*FINETUNE, "pretrain/best.pt", "--full_training", "--batch_size", "3", "--max_epochs", "2"]}


def make_small(patch):
    patch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v))
    patch.setattr(finetune.__defaults__[0], "max_trainable_ratio", 1.0)  # of a tiny backbone the head is more than 5%


@pytest.fixture
def small_models(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture
def small_pretrained(small_models, tmp_path):
    """The run folder of one epoch of pretraining a tiny model."""
    assert train.main([*PRETRAIN, "--run_dir", str(tmp_path / "pretrain")]) == 0
    return tmp_path / "pretrain"


def small_process(home: str, command: list, **changes):
    """What a child process does: a run of a tiny model in the folder `home`, its output in the file log there."""
    os.chdir(home)
    sys.stdout = sys.stderr = open("log", "a", buffering=1)
    train.ModelConfig, train.load_cohort = lambda v: tiny(num_variables=v, **changes), partial(load_cohort, cache_dir="cache")
    finetune.__defaults__[0].max_trainable_ratio = 1.0
    sys.exit(train.main(command))


@pytest.fixture(scope="session")
def processes():
    """Starts real processes, forked from a server that has imported everything already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_suite", "torch._dynamo"])  # an optimizer imports the latter, for a second
        context.Process(target=os.getpid).start()  # the server
        yield context.Process


def finished(process, seconds=120) -> int:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("a hang")
    return process.exitcode


@pytest.mark.parametrize("mode", SMALL)
def test_a_process_killed_at_random_moments_and_resumed_ends_with_equal_bits(tmp_path, processes, mode):
    def start(command, run=None):
        """A process, from the moment on when the folder of its run exists."""
        process = processes(target=small_process, args=(str(tmp_path), command))
        process.start()
        while run and process.exitcode is None and not (tmp_path / run / "last.pt").exists():
            time.sleep(.002)
        return process
    for name in ["pretrain"] * (mode != "pretrain") + [mode]:
        process, began = start([*SMALL[name], "--run_dir", name], name), time.time()
        assert finished(process) == 0, (tmp_path / "log").read_text()
    duration, rng, ended = time.time() - began, np.random.default_rng(), collections.Counter()
    for i in range(20 if SOAK else 2):
        moment, number = rng.uniform(0, duration), (signal.SIGKILL, signal.SIGTERM)[i % 2]
        process = start([*SMALL[mode], "--run_dir", "cut"], "cut")
        process.join(moment)
        if process.exitcode is None:
            os.kill(process.pid, number)
        code = finished(process)
        assert code in (0, 130, -number), (moment, (tmp_path / "log").read_text())
        ended["finished before" if code == 0 else number.name] += 1
        assert finished(start([*SMALL[mode], "--resume", "cut"])) == 0, (tmp_path / "log").read_text()
        same_run(tmp_path / mode, tmp_path / "cut")
        assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [".lock", "best.pt", "last.pt", "metrics.csv"]
        shutil.rmtree(tmp_path / "cut")
    print(f"\n{mode}: killed at random moments of {duration:.1f} s: {dict(ended)}")


def test_a_run_folder_has_one_writer(tmp_path, processes, small_pretrained):
    with open(small_pretrained / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        process = processes(target=small_process, args=(str(tmp_path), [*PRETRAIN, "--resume", str(small_pretrained)]))
        process.start()
        assert finished(process) == 2
    assert "another process is training in it" in (tmp_path / "log").read_text()


def kill_while_saving(path):
    write_atomically(path, lambda out: (out.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL)))


def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(small_pretrained, processes):
    before = (small_pretrained / "last.pt").read_bytes()
    process = processes(target=kill_while_saving, args=(small_pretrained / "last.pt",))
    process.start()
    assert finished(process) == -signal.SIGKILL and len(list(small_pretrained.glob(".last.pt.*"))) == 1
    assert (small_pretrained / "last.pt").read_bytes() == before
    assert train.main([*PRETRAIN, "--resume", str(small_pretrained)]) == 0 and not list(small_pretrained.glob(".last.pt.*"))


@contextlib.contextmanager
def files_of_at_most(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size, file", [(10, "metrics.csv"), (50_000, "best.pt")])
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_space(tmp_path, capsys, monkeypatch, small_models, size, file):
    command = [*PRETRAIN, "--max_epochs", "2"]
    assert train.main([*command, "--run_dir", str(tmp_path / "whole")]) == 0
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        patch.setattr(train.Run, "log", lambda run, row, log=train.Run.log: (row["epoch"] == 2 and stack.enter_context(files_of_at_most(size)), log(run, row)))
        capsys.readouterr()
        one_error_line(capsys, train.main([*command, "--run_dir", str(tmp_path / "cut")]), f"{file}: cannot be written (File too large)")
    assert not list((tmp_path / "cut").glob(".*.*.*")) and len(pd.read_csv(tmp_path / "cut" / "metrics.csv")) == 1 + (file != "metrics.csv")
    assert train.main([*command, "--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_full_file_system_is_one_line(tmp_path, capsys, small_models):
    (disk := tmp_path / "disk").mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2> /dev/null"):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        one_error_line(capsys, train.main([*PRETRAIN, "--run_dir", str(disk / "run")]), "best.pt: cannot be written (No space left on device)")
        assert read_checkpoint(disk / "run" / "last.pt")
    finally:
        os.system(f"umount -l {disk}")


def test_a_cache_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    with files_of_at_most(1000), pytest.raises(InputError, match="cannot be written"):
        load_cohort(None, 24, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert len(load_cohort(None, 24, cache_dir=tmp_path / "cache")) == 24


def test_an_unwritable_folder_is_one_line(tmp_path, capsys, small_models):
    (tmp_path / "locked").mkdir(mode=0o555)
    (tmp_path / "a file").touch()
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(InputError, match="locked/x.csv: cannot be written"):
            write_atomically(tmp_path / "locked" / "x.csv", lambda path: path.touch())
        with pytest.raises(InputError, match="cannot be written"):
            load_cohort(None, 24, cache_dir=tmp_path / "locked" / "cache")
    finally:
        os.seteuid(user)
    with pytest.raises(InputError, match="x.csv: cannot be written"):
        write_atomically(tmp_path / "a file" / "x.csv", lambda path: path.touch())
    one_error_line(capsys, train.main([*PRETRAIN, "--run_dir", str(tmp_path / "a file" / "run")]), "a file/run")


# ---- checkpoints that lie --------------------------------------------------------------------------------------------------------------

def forged(good, **changes):
    """The content of the checkpoint with entries changed: a function of the old one, or the new."""
    content = torch.load(good, weights_only=True)
    return content | {name: change(content[name]) if callable(change) else change for name, change in changes.items()}


def flipped(good):
    """One bit of a weight."""
    body = bytearray(good.read_bytes())
    body[len(body) // 2] ^= 1
    return bytes(body)


FORGED = {  # of a finetuned checkpoint: its content, or its bytes
    **{f"cut at {tenth}0%": lambda good, tenth=tenth: good.read_bytes()[:good.stat().st_size * tenth // 10] for tenth in range(10)},
    "one bit flipped": flipped,
    **{f"{name} of {value!r}": lambda good, name=name, value=value: forged(good, model_config=lambda c: c | {name: value}) for name, value in [
        ("latent_dim", 10**9), ("latent_dim", -16), ("latent_dim", "16"), ("latent_dim", 17), ("latent_dim", 16.0), ("layers", 10**6), ("levels", 10**5),
        ("heads", 3), ("num_variables", 10**6), ("num_variables", 45), ("input_dim", 2**20), ("dropout", 2.0), ("max_beta", float("nan")),
        ("presence", 1), ("decoder", "none"), ("features", [1]), ("head_widths", (10**9,)), ("head_widths", 3), ("head_trees", 0), ("tree_depth", 30), ("classes", 3), ("depth", 4)]},
    "a weight of another shape": lambda good: forged(good, model=lambda m: m | {"history.tau": torch.zeros(3)}),
    "a weight missing": lambda good: forged(good, model=lambda m: {n: t for n, t in m.items() if n != "history.tau"}),
    "a weight too many": lambda good: forged(good, model=lambda m: m | {"more": torch.zeros(3)}),
    "a weight that is none": lambda good: forged(good, model=lambda m: m | {"history.tau": "60"}),
    "no weight": lambda good: forged(good, model={}),
    "no model config": lambda good: forged(good, model_config={}),
    "a vocabulary of text": lambda good: forged(good, vocabulary="HR"),
    "a vocabulary of another size": lambda good: forged(good, vocabulary=lambda v: v[1:]),
    "no normalizer": lambda good: forged(good, normalizer={}),
    "a normalizer of another size": lambda good: forged(good, normalizer=lambda n: n | {"mean": n["mean"][1:]}),
    "no source": lambda good: forged(good, source={}),
    "no split": lambda good: forged(good, split={}),
    "no metrics": lambda good: forged(good, metrics={}),
    "another version": lambda good: forged(good, format=2),
}


@pytest.fixture(scope="session")
def small_finetuned(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        home = tmp_path_factory.mktemp("small")
        assert train.main([*PRETRAIN, "--run_dir", str(home / "pretrain")]) == 0
        assert train.main([*FINETUNE, str(home / "pretrain" / "best.pt"), "--run_dir", str(home / "finetune")]) == 0
    return home / "finetune" / "best.pt"


@pytest.mark.parametrize("what", FORGED)
def test_a_checkpoint_that_lies_is_one_line_and_exit_code_2(tmp_path, capsys, small_finetuned, what):
    content = FORGED[what](small_finetuned)
    (tmp_path / "bad.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, tmp_path / "bad.pt")
    one_error_line(capsys, main(["--checkpoint", str(tmp_path / "bad.pt")]), tmp_path / "bad.pt")


# ---- inputs that are odd or wrong --------------------------------------------------------------------------------------------------------

def table_of(stays: dict) -> str:
    """events.csv of {stay: [(minute, variable, value)]}."""
    return "stay_id,minute,variable,value\n" + "".join(f"{stay},{m},{v},{x}\n" for stay, rows in stays.items() for m, v, x in rows)


def plain_stay(seed, rows=12):
    rng = np.random.default_rng(seed)
    return [(int(m), f"lab{v}", round(float(x), 2)) for m, v, x in zip(rng.integers(0, 900, rows), rng.integers(0, 4, rows), rng.normal(7, 2, rows))]


STAYS = {f"s{i:02d}": plain_stay(i) for i in range(30)}
LABELS = "stay_id,label\n" + "".join(f"s{i:02d},{i % 2}\n" for i in range(30))
ODD = {  # one stay of thirty: what works, in both modes
    "a stay with one event": [(3, "lab0", 1)],
    "a stay of 20,000 events": [(m // 40, f"lab{m % 4}", m % 7) for m in range(20_000)],
    "a set of 5,000 events": [(1, f"lab{m % 4}", m % 7) for m in range(5_000)],
    "values of 1e30": [(m, "lab1", 1e30) for m in range(5)],
    "values of -3e38 and 3e38": [(0, "lab1", -3e38), (1, "lab1", 3e38), (2, "lab2", 3e38)],
    "values that are no numbers": [(0, "lab1", "nan"), (1, "lab1", "inf"), (2, "lab1", "-inf"), (3, "lab1", 1e39), (4, "lab1", ""), (5, "lab1", 2)],
    "a constant variable": [(m, "constant", 7) for m in range(9)],
    "unsorted minutes": [(m, "lab1", m) for m in (9, 3, 7, 3, 0)],
    "a century": [(0, "lab0", 1), (52_560_000, "lab0", 2)],
    "a name in any script": [(0, "Na⁺ 血", 1)],
    "every row twice": plain_stay(3) * 2,
}


@pytest.mark.parametrize("what", ODD)
def test_odd_input_works_in_both_modes(tmp_path, small_models, what):
    write(tmp_path / "data/events.csv", table_of(STAYS | {"s04": ODD[what]}))
    write(tmp_path / "data/labels.csv", LABELS)
    data_dir = ["--data_dir", str(tmp_path / "data")]
    assert train.main([*PRETRAIN, *data_dir, "--run_dir", str(tmp_path / "run")]) == 0
    assert train.main([*FINETUNE, str(tmp_path / "run" / "best.pt"), "--run_dir", str(tmp_path / "head")]) == 0
    for run in ("run", "head"):
        assert np.isfinite(pd.read_csv(tmp_path / run / "metrics.csv").to_numpy()).all()


WRONG = {  # (events.csv, labels.csv, mode, what the message names)
    "minutes beyond any stay": (table_of(STAYS | {"s04": [(1e30, "lab0", 1)]}), LABELS, "pretrain", "events.csv line 50: minute is 1e+30"),
    "gzip where text belongs": (gzip.compress(table_of(STAYS).encode()), LABELS, "pretrain", "events.csv: not UTF-8"),
    "no number at all": (table_of({s: [(m, v, "nan") for m, v, _ in rows] for s, rows in STAYS.items()}), LABELS, "pretrain", "no usable event"),
    "a label that is no class": (table_of(STAYS), LABELS.replace("s07,1", "s07,3"), "pretrain", "labels.csv line 9: label is 3"),
    "no label in finetune": (table_of(STAYS), None, "finetune", "no label at all"),
    "one class in finetune": (table_of(STAYS), LABELS.replace(",1", ",0"), "finetune", "one class only"),
    "other variables in finetune": (table_of({s: [(m, "other", x) for m, _, x in rows] for s, rows in STAYS.items()}), LABELS, "finetune",
                                    "none of the data's variables"),
    "a split without valid": (table_of(STAYS), LABELS.replace("label\n", "label,split\n").replace(",0\n", ",0,train\n").replace(",1\n", ",1,test\n"),
                              "pretrain", "15 train and 0 valid stays"),
    "labels of nobody": (table_of(STAYS), LABELS.replace("s", "t").replace("ttay", "stay"), "finetune", "no label at all"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_before_training(tmp_path, capsys, small_finetuned, what):
    events, labels, mode, named = WRONG[what]
    write(tmp_path / "data/events.csv", events)
    if labels is not None:
        write(tmp_path / "data/labels.csv", labels)
    pretrained = small_finetuned.parent.parent / "pretrain" / "best.pt"
    if mode == "finetune" and "variables" not in what:  # a checkpoint that knows them
        torch.save(forged(pretrained, normalizer=lambda n: n | {"variables": ["lab0", *n["variables"][1:]]}), tmp_path / "known.pt")
        pretrained = tmp_path / "known.pt"
    command = [*FINETUNE, str(pretrained)] if mode == "finetune" else PRETRAIN
    one_error_line(capsys, train.main([*command, "--data_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run")]), named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--max_epochs", "-1"], ["--max_epochs", "0"], ["--batch_size", "x"], ["--batch_size", "-3"], ["--seed", "-1"],
                                     ["--seed", "1.5"], ["--synthetic_stays", "0"], ["--label_fraction", "nan"], ["--label_fraction", "0"],
                                     ["--precision", "fp8"], ["--objective", "mine"], ["--max_epoch", "3"]], ids=" ".join)
def test_a_wrong_option_is_named(capsys, options):
    with pytest.raises(SystemExit, match="2"):
        train.main([*PRETRAIN, *options])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and options[0] in error


@pytest.mark.parametrize("options, named", [(["--device", "cuda:99"], "--device cuda:99"), (["--device", "meta"], "--device meta"),
                                            (["--device", ""], "--device"), (["--synthetic_stays", "1"], "1 stays"),
                                            (["--synthetic_stays", "1" + "0" * 15], "MB are free"), (["--data_dir", "/dev/null"], "/dev/null")])
def test_an_option_that_cannot_be_met_is_one_line(tmp_path, capsys, options, named):
    one_error_line(capsys, train.main([*PRETRAIN, *options, "--run_dir", str(tmp_path / "run")]), named)


def test_a_label_fraction_too_small_is_one_line(tmp_path, capsys, small_pretrained):
    capsys.readouterr()
    one_error_line(capsys, train.main([*FINETUNE, str(small_pretrained / "best.pt"), "--label_fraction", "1e-9", "--run_dir", str(tmp_path / "run")]),
                   "--label_fraction 1e-09")


# ---- random damage -----------------------------------------------------------------------------------------------------------------------

def damaged(rng, body: bytes) -> bytes:
    """One to three of: bits flipped, a part cut out, a part repeated, a byte that means something put in, the end cut off."""
    body = bytearray(body)
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(0, max(1, len(body)))), int(rng.integers(1, 40))
        kind = rng.integers(0, 5)
        if kind == 0 and body:
            body[at % len(body)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del body[at:at + size]
        elif kind == 2:
            body[at:at] = body[at:at + size]
        elif kind == 3:
            body[at:at] = rng.choice([b",", b"\n", b"\r", b"\0", b'"', b"-", b"e9", b".", b"nan", b"\xff", b"1" * 30, b"\n\n", b" "])
        else:
            del body[at + (len(body) - at) // 2:]
    return bytes(body)


def damaged_table(rng, folder):
    body = damaged(rng, EVENTS.encode() + table_of(dict(list(STAYS.items())[:2])).split("\n", 1)[1].encode())
    write(folder / "events.csv", body)
    write(folder / "labels.csv", damaged(rng, b"stay_id,label\n7,1\n8,0\n") if rng.random() < .3 else "stay_id,label\n7,1\n8,0\n")
    return lambda: body.partition(b"\n")[2].rstrip(b"\n").count(b"\n") + 1


def damaged_physionet(rng, folder):
    write_physionet(folder, archive=rng.random() < .3)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    path = files[rng.integers(0, len(files))]
    path.write_bytes(damaged(rng, path.read_bytes()))
    return None


def works(folder, rows):
    """Read the data, and check what was read as far as it can be known."""
    cohort = load_cohort(str(folder), cache_dir=folder.parent / "cache")
    batch = StayDataset(cohort, Normalizer.fit(cohort, np.arange(len(cohort))))[np.arange(len(cohort))]
    assert torch.isfinite(batch.event_value).all() and torch.isfinite(batch.minute).all()
    assert all((np.diff(cohort.set_minute[a:b]) >= 0).all() for a, b in zip(cohort.stay_start, cohort.stay_start[1:]))
    assert len(batch.event_value) == len(cohort.event_value) == cohort.set_start[-1] and set(np.unique(cohort.label)) <= {-1, 0, 1}
    if rows:
        assert len(cohort.event_value) + sum(n for name, n in cohort.notes.items() if name.startswith("rows")) == rows()


def test_a_randomly_damaged_input_works_or_is_refused(tmp_path, small_finetuned):
    def hang(*_):
        pytest.fail("a hang")
    signal.signal(signal.SIGALRM, hang)
    ended = collections.Counter()
    for seed in range(2000 if SOAK else 200):
        rng, folder = np.random.default_rng([6, seed]), tmp_path / f"{seed}" / "data"
        folder.parent.mkdir()
        kind = ("table", "PhysioNet 2012", "checkpoint")[seed % 3]
        signal.alarm(20)
        try:
            if kind == "checkpoint":
                write(folder / "c.pt", damaged(rng, small_finetuned.read_bytes()))
                open_classifier(folder / "c.pt")
            else:
                works(folder, (damaged_table if kind == "table" else damaged_physionet)(rng, folder))
            ended[f"{kind} works"] += 1
        except InputError as error:
            assert "\n" not in str(error) and str(folder) in str(error) or "stay " in str(error), (seed, error)
            ended[f"{kind} refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kind}: {type(error).__name__}") from error
        finally:
            signal.alarm(0)
        shutil.rmtree(folder.parent)
    print(f"\nrandomly damaged inputs: {dict(ended)}")
    assert min(ended["table works"], ended["table refused"], ended["PhysioNet 2012 works"], ended["PhysioNet 2012 refused"], ended["checkpoint refused"]) > 5


# ---- numerics ----------------------------------------------------------------------------------------------------------------------------

def test_a_gradient_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, small_models):
    command = [*PRETRAIN, "--max_epochs", "2", "--batch_size", "3"]
    assert train.main([*command, "--run_dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", lambda *a, update=train.update, steps=itertools.count(): update(*a) * (np.nan if next(steps) == 7 else 1))
        capsys.readouterr()
        one_error_line(capsys, train.main([*command, "--run_dir", str(tmp_path / "cut")]), "step 7: the loss or its gradient is not finite (stays synthetic-")
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["trainer"]["position"] == [1, 0]
    assert train.main([*command, "--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("factor, scale, steps", [(1e10, 2.0**100, 12), (np.inf, 2.0**16, 40)])
def test_an_overflow_of_fp16_is_skipped_and_stops_the_run_when_it_persists(factor, scale, steps):
    model = nn.Linear(2, 1)
    before, scaler = model.weight.detach().clone(), torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer, overflows = torch.optim.SGD(model.parameters(), lr=1.0), 0
    try:
        for step in range(steps):
            norm = train.update(model, model(torch.ones(1, 2)).sum() * factor, optimizer, scaler, 1.0)
            overflows += not norm.isfinite()
            train.finite_or_stop(norm, step, ["a stay"], scaler)
            assert norm.isfinite() != torch.equal(model.weight, before)  # a step that overflows changes nothing
            before = model.weight.detach().clone()
        assert factor == 1e10 and overflows == 6 and torch.isfinite(model.weight).all()  # 2^100 * 1e10 / 2^6 is a float32
    except InputError as error:
        assert factor == np.inf and step == 19 and "fp16" in str(error) and torch.isfinite(model.weight).all()


# ---- no leak, the same twice -------------------------------------------------------------------------------------------------------------

def weights_equal(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"]) and all(
        torch.equal(a["normalizer"][name], b["normalizer"][name]) for name in ("mean", "std", "log_scale")) and a["metrics"] == b["metrics"]


def test_test_stays_change_nothing_that_is_learned_or_chosen(tmp_path, monkeypatch, small_models):
    """Other values, minutes and labels of the test stays: equal weights, normalizer, metrics, threshold and best epoch, in both modes."""
    cohort = synthetic_cohort(24)
    split = np.arange(24) % 3
    split[np.flatnonzero(cohort.label == 1)[:3]] = 0, 1, 2  # both classes in each part
    cohort = replace(cohort, split=split.astype(np.int8))
    test = np.flatnonzero(split == 2)
    other = replace(cohort, event_value=cohort.event_value.copy(), label=cohort.label.copy(), set_minute=cohort.set_minute.copy())
    other.event_value[stay_event_index(cohort, test)] *= -7
    other.set_minute[ranges(cohort.stay_start[test], np.diff(cohort.stay_start)[test])] += 99
    other.label[test] = 1 - other.label[test]
    for name, data_set in (("a", cohort), ("b", other)):
        monkeypatch.setattr(train, "load_cohort", lambda *_, data_set=data_set, **__: data_set)
        assert train.main([*PRETRAIN, "--max_epochs", "2", "--run_dir", str(tmp_path / name)]) == 0
        for mode in ([], ["--full_training"]):
            assert train.main([*FINETUNE, str(tmp_path / name / "best.pt"), "--max_epochs", "2", *mode, "--run_dir", str(tmp_path / f"{name}{len(mode)}")]) == 0
    for run in ("", "0", "1"):
        assert weights_equal(tmp_path / f"a{run}" / "best.pt", tmp_path / f"b{run}" / "best.pt")
        same_run(tmp_path / f"a{run}", tmp_path / f"b{run}")


def test_labels_never_reach_pretraining(tmp_path, monkeypatch, small_models):
    cohort = replace(synthetic_cohort(24), split=(np.arange(24) % 3).astype(np.int8))
    for name, label in (("a", cohort.label), ("b", 1 - cohort.label), ("c", np.full_like(cohort.label, -1))):
        monkeypatch.setattr(train, "load_cohort", lambda *_, label=label, **__: replace(cohort, label=label))
        assert train.main([*PRETRAIN, "--run_dir", str(tmp_path / name)]) == 0
    same_run(tmp_path / "a", tmp_path / "b"), same_run(tmp_path / "a", tmp_path / "c")


def test_outcome_columns_are_never_inputs(tmp_path):
    read = []
    for name, outcomes in (("a", OUTCOMES), ("b", OUTCOMES.replace("6,1,5,-1", "9,9,9,9").replace("16,8,8,4", "1,1,1,1"))):
        read.append(load_cohort(str(write_physionet(tmp_path / name, outcomes=outcomes)), cache_dir=tmp_path / "cache"))
    assert read[0].fingerprint == read[1].fingerprint
    assert not {"SAPS-I", "SOFA", "Length_of_stay", "Survival", "In-hospital_death", "RecordID"} & set(read[0].variables)


def test_scoring_data_that_overlap_the_training_stays_says_so(tmp_path, small_finetuned, capsys):
    cohort = synthetic_cohort(24)
    name = np.array(cohort.variables)[cohort.event_variable]
    stay = np.repeat(cohort.stay_id, cohort.stay_events)
    table = pd.DataFrame({"stay_id": stay, "minute": np.repeat(cohort.set_minute, np.diff(cohort.set_start)), "variable": name, "value": cohort.event_value})
    again = table.assign(stay_id="new-" + table["stay_id"])
    write(tmp_path / "data/events.csv", pd.concat([table, again]).to_csv(index=False))
    labels = pd.DataFrame({"stay_id": [*cohort.stay_id, *("new-" + cohort.stay_id.astype(object))], "label": [*cohort.label, *cohort.label]})
    write(tmp_path / "data/labels.csv", labels.to_csv(index=False))
    assert main(["--checkpoint", str(small_finetuned), "--data_dir", str(tmp_path / "data")]) == 0
    seen = forged(small_finetuned)["split"]
    assert f"{len(seen['train']) + len(seen['valid'])} stays left out whose ids the checkpoint was trained or selected on" in capsys.readouterr().out


@pytest.mark.parametrize("mode", SMALL)
def test_the_same_command_twice_gives_equal_bits(tmp_path, monkeypatch, small_pretrained, mode):
    monkeypatch.chdir(tmp_path)
    for name in ("once", "twice"):
        assert train.main([*SMALL[mode], "--run_dir", name]) == 0
    same_run(tmp_path / "once", tmp_path / "twice")
    assert weights_equal(tmp_path / "once" / "best.pt", tmp_path / "twice" / "best.pt")


def test_a_checkpoint_tells_where_it_comes_from(small_finetuned, capsys):
    assert main(["--checkpoint", str(small_finetuned)]) == 0
    source, out = forged(small_finetuned)["source"], capsys.readouterr().out
    for told in (source["command"], f"seed {source['seed']}", source["fingerprint"], f"torch {torch.__version__}", f"numpy {np.__version__}"):
        assert told in out


# ----------------------------------------------------------------------------------------------------------------------------------
# Several processes: two ranks of torchrun against one process. 15 training stays in batches of 7: the last one has fewer stays than ranks;
# 4 validation stays, evaluated 3 at a time
# ----------------------------------------------------------------------------------------------------------------------------------

RANKS = {"pretrain": [*PRETRAIN, "--precision", "fp32", "--batch_size", "7", "--max_epochs", "3"], "head": [*FINETUNE, "pretrain/best.pt", "--max_epochs", "3"],
         "full training": [*FINETUNE, "pretrain/best.pt", "--full_training", "--precision", "fp32", "--batch_size", "7", "--max_epochs", "2"]}


def small_rank(home: str, command: list, deterministic: bool = True, interrupted_at: int | None = None):
    """What a rank, or the single process that it is compared with, does. `deterministic`: nothing is hidden, dropped or sampled.
    `interrupted_at`: the step, or the epoch of the head, in which SIGTERM reaches the last rank alone."""
    def interrupting(steps, function):
        def call(*a):
            if next(steps) == interrupted_at and train.RANK == train.WORLD - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*a)
        return call
    train.EVALUATION_BATCH = 3
    train.update, train.ranking = (interrupting(itertools.count(), function) for function in (train.update, train.ranking))
    train.PRETRAIN |= dict(warmup_steps=1, beta_warmup_steps=1)  # at full speed from the first step
    if deterministic:
        F.dropout = lambda x, *_: x
    small_process(home, command, **dict(hide_sets=0.0, drop_events=0.0, sample_z=False) if deterministic else {})


def forked_rank(rank: int, port: int, home: str, command: list, options: dict):
    """`small_rank` as one of two, without torchrun: it starts at once, and nobody ends a rank that waits forever."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    train.RANK, train.WORLD = rank, 2
    small_rank(home, command, **options)


@pytest.fixture
def exit_codes(processes, ranks_home):
    """Runs two forked ranks: their exit codes, and what they printed."""
    def run(*command, **options):
        (ranks_home / "log").unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [processes(target=forked_rank, args=(rank, port, str(ranks_home), command, options), daemon=True) for rank in range(2)]
        for process in ranks:
            process.start()
        return [finished(process) for process in ranks], (ranks_home / "log").read_text()
    return run


@pytest.fixture(scope="module")
def ranks_home(tmp_path_factory, processes):
    """The runs of one process with the deterministic objective: pretrain, head, full training."""
    home = tmp_path_factory.mktemp("ranks")
    for mode, command in RANKS.items():
        process = processes(target=small_rank, args=(str(home), [*command, "--run_dir", mode]))
        process.start()
        assert finished(process) == 0, (home / "log").read_text()
    return home


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_batch_is_divided_by_events_and_every_stay_is_in_one_part(ranks):
    rng = np.random.default_rng(ranks)
    for stays in [*range(1, 12), 64]:
        events = rng.integers(1, 2000, stays)
        parts = balanced_parts(events, ranks)
        assert sorted(np.concatenate(parts)) == list(range(stays)) and len(parts) == ranks
        assert all((np.diff(part) > 0).all() for part in parts)  # one rank: the batch as it is
        sums = np.array([events[part].sum() for part in parts])
        assert (sums > 0).sum() == min(stays, ranks)
        fullest = parts[sums.argmax()]
        assert len(fullest) == 1 or sums.max() - events[fullest].min() <= sums.min()  # no stay can move and make the fullest less full


@pytest.mark.parametrize("mode", RANKS)
def test_two_ranks_of_torchrun_learn_what_one_process_learns(ranks_home, mode):
    """The same losses, validation figures and weights, and one set of files."""
    (ranks_home / "log").unlink(missing_ok=True)
    rank = [sys.executable, "-c", f"import sys, test_suite; test_suite.small_rank({str(ranks_home)!r}, sys.argv[1:])"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", *rank]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent)}
    ended = subprocess.run([*torchrun, *RANKS[mode], "--run_dir", f"ranks {mode}"], env=environment, capture_output=True, text=True, timeout=300)
    printed = (ranks_home / "log").read_text()
    assert ended.returncode == 0, printed + ended.stderr
    one, two = ranks_home / mode, ranks_home / f"ranks {mode}"
    if mode == "head":  # the features are the same bits, and so is the head that every rank trains on them
        same_run(one, two)
    else:
        pd.testing.assert_frame_equal(*(pd.read_csv(run / "metrics.csv") for run in (one, two)), rtol=0, atol=1e-5)
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(run / name, weights_only=True)["model"] for run in (one, two))
        assert list(a) == list(b)
        for weight in a:
            if weight.endswith("in_proj_bias"):  # what is added to every key cancels in the softmax: its gradient is rounding, which Adam scales up
                (a[weight], b[weight]) = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (a[weight], b[weight]))
            close(a[weight], b[weight])
    assert sorted(path.name for path in two.iterdir()) == [".lock", "best.pt", "last.pt", "metrics.csv"]
    assert printed.count("run folder") == printed.count("best checkpoint") == 1


@pytest.mark.parametrize("mode", RANKS)
def test_a_signal_to_one_rank_saves_and_the_resumed_run_ends_with_equal_bits(ranks_home, exit_codes, mode):
    whole, cut = f"random {mode}", f"cut {mode}"
    assert exit_codes(*RANKS[mode], "--run_dir", whole, deterministic=False)[0] == [0, 0]
    codes, printed = exit_codes(*RANKS[mode], "--run_dir", cut, deterministic=False, interrupted_at=1)
    assert codes == [130, 130] and printed.count("saved; go on with:") == 1, printed
    states = torch.load(ranks_home / cut / "last.pt", weights_only=True)["trainer"]["random"]
    assert torch.equal(*(state["torch"] for state in states)) == (mode == "head")  # each rank draws masks of its own; the head is the same on all
    assert exit_codes(*RANKS[mode], "--resume", cut, deterministic=False)[0] == [0, 0]
    same_run(ranks_home / whole, ranks_home / cut)


@pytest.mark.parametrize("option, error", [
    (["--run_dir", "pretrain"], "pretrain: exists already; choose another --run_dir, or continue it with --resume pretrain"),    # of rank 0 alone
    (["--data_dir", "nowhere"], "nowhere: no such folder; --data_dir takes the folder that holds the data"),                     # of each
])
def test_an_error_is_one_line_and_no_rank_waits(exit_codes, option, error):
    codes, printed = exit_codes(*RANKS["pretrain"], *option)
    assert codes == [2, 2] and "Traceback" not in printed
    assert [line for line in printed.splitlines() if line.startswith("error:")] == [f"error: {error}"]


# ----------------------------------------------------------------------------------------------------------------------------------
# Performance analysis of a checkpoint
# ----------------------------------------------------------------------------------------------------------------------------------

def open_classifier(path, data_dir=None, params_map=None, label_file=None, set_heads=None, transformer_heads=None):
    """A finetuned checkpoint ready to score: (model, content, cohort, dataset, new); see `train.open_checkpoint`."""
    content, cohort, dataset, _, new = open_checkpoint(path, data_dir, params_map=params_map, label_file=label_file)
    if "format" not in content:
        return open_original(path, content, cohort, set_heads, transformer_heads)
    if content.get("mode") != "finetune":
        raise InputError(f"{path}: not a finetuned checkpoint; make one with: python train.py --mode finetune --pretrained_ckpt {path}")
    model = SeqSetVAE(checkpoint_config(content, len(dataset.normalizer.variables), path), content["vocabulary"])
    load_weights(model, content["model"], path)
    return model.eval(), content, cohort, dataset, new


def open_original(path, content, cohort, set_heads, transformer_heads):
    """The same of a checkpoint that the original implementation finetuned. It holds weights alone: the variables' vectors, their statistics
    and the split are the data's, and no threshold was chosen."""
    config = checkpoint_config(content, len(cohort.variables), path, set_heads, transformer_heads)
    for what, given, mend in (("vectors", cohort.vectors, "put its cached.csv beside patient_ehr"),
                              ("statistics", cohort.statistics, "give its --params_map")):
        if np.isnan(given).all():
            raise InputError(f"{path}: an original checkpoint, made with {what} of the variables that it does not hold; {mend}")
    model = original_classifier(content, config, variable_vectors(cohort.variables, config.input_dim, cohort.vectors), path)
    split = make_splits(cohort, 0)
    dataset = StayDataset(cohort, Normalizer.fit(cohort, stays_of(cohort, split["train"])))
    source = {"command": "the original implementation", "fingerprint": cohort.fingerprint,
              "versions": {"pytorch-lightning": str(content.get("pytorch-lightning_version", "unknown"))}}
    metrics = {"epoch": content.get("epoch"), "threshold": 0.5}
    return model, content | {"source": source, "split": split, "metrics": metrics}, cohort, dataset, False


def scored_stays(content, cohort, new) -> tuple[np.ndarray, str]:
    """The labelled stays that may be scored, and what they are: the recorded test split; of other data, all that were not trained on."""
    if not new:
        return labelled(cohort, content["split"]["test"]), f"the test split that the {'checkpoint' if 'format' in content else 'data'} recorded"
    seen = np.isin(cohort.stay_id, content["split"]["train"] + content["split"]["valid"])
    stays = np.flatnonzero((cohort.label >= 0) & ~seen)
    overlap = f"; {seen.sum():,} stays left out whose ids the checkpoint was trained or selected on" if seen.any() else ""
    return stays, f"all labelled stays of other data than the checkpoint's{overlap}"


def bootstrap(label, *probabilities, repeats: int = 1000, seed: int = 0) -> np.ndarray:
    """[repeats, n, 2] AUROC and AUPRC of n methods on the same resampled stays (Efron & Tibshirani 1993): paired between methods."""
    rng = np.random.default_rng(seed)
    draws = []
    while len(draws) < repeats:
        i = rng.integers(0, len(label), len(label))
        if 0 < label[i].sum() < len(label):
            draws.append([(roc_auc_score(label[i], p[i]), average_precision_score(label[i], p[i])) for p in probabilities])
    return np.array(draws)


def interval(draws: np.ndarray) -> str:
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"[{low:.3f}, {high:.3f}]"


def calibration_error(label, probability, bins: int = 10) -> float:
    """Expected calibration error over bins of equal width (Guo et al. 2017, eq. 3)."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    gap = np.abs(np.bincount(which, label, bins) - np.bincount(which, probability, bins))
    return float(gap[count > 0].sum() / len(label))


def performance(arguments) -> None:
    """Print the analysis of a finetuned checkpoint on the stays it may be scored on (see `scored_stays`), and write what is asked for."""
    path = arguments.checkpoint
    folder = arguments.plots and picture_folder(arguments.plots)
    model, content, cohort, dataset, new = open_classifier(path, arguments.data_dir, arguments.params_map, arguments.label_file,
                                                           arguments.set_heads, arguments.transformer_heads)
    source = content["source"]
    figures = {"checkpoint": str(path), "epoch": content["metrics"]["epoch"], "command": source["command"], "seed": source.get("seed"),
               "data": source["fingerprint"], "versions": source["versions"], "reader": cohort.reader, "scored": None}
    print(cohort.describe())
    if dataset.unknown_variables:
        print(dataset.describe_unknown())
    print("checkpoint: {checkpoint}, epoch {epoch}, made by: {command}".format(**figures))
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    print(f"checkpoint: seed {source.get('seed', 'unknown')}, data {source['fingerprint']}, {versions}")
    stay = find_stay(cohort, arguments.trajectory)
    stays, what = scored_stays(content, cohort, new)
    label = cohort.label[stays].astype(int)
    unscored = None if len(np.unique(label)) == 2 else (f"{cohort.reader}: the stays to be scored hold one class or none "
                                                        f"({len(stays)} stays); AUROC needs both")
    if unscored and not (arguments.predictions or arguments.embeddings or arguments.trajectory):
        raise InputError(f"{unscored}; --predictions needs no label")

    rows = np.arange(len(cohort)) if arguments.predictions or arguments.embeddings else stays
    features, h = embed_stays(model, dataset, rows)
    probability = predict(model, features)
    if arguments.predictions:
        write_predictions(arguments.predictions, content, cohort, probability)
    if arguments.embeddings:
        write_embeddings(arguments.embeddings, cohort.stay_id[rows], features, h)
    scored = np.searchsorted(rows, stays)
    methods = {CHECKPOINT: probability[scored]}
    if unscored:
        print(f"nothing to score: {unscored}")
    else:
        if arguments.baselines:
            methods |= baselines(arguments, content, cohort, dataset, stays, new)
        figures |= {"scored": what, **score_figures(label, methods, content["metrics"]["threshold"]), "model": model_figures(model, dataset, stays)}
        print_figures(figures, "no threshold was recorded" if "format" not in content else "best F1 of the validation split")
    if stay is not None:
        figures["trajectory"] = risk_over_time(model, dataset, stay)
        print_trajectory(figures["trajectory"])
    if arguments.json:
        write_atomically(arguments.json, lambda out: out.write_text(json.dumps(figures, indent=1)))
    if folder:
        plot_curves(folder, path, source.get("pretrained_ckpt"))
        if not unscored:
            plot_ranking(folder, label, methods)
            plot_calibration(folder, label, probability[scored])
        if len(rows) > 2:
            plot_features(folder, features, cohort.label[rows])
        if stay is not None:
            plot_trajectory(folder, figures["trajectory"], dataset, stay, content["metrics"]["threshold"])
        print(f"pictures: {', '.join(sorted(file.name for file in folder.glob('*.png')))} in {folder}")


CHECKPOINT = "this checkpoint"


def score_figures(label, methods: dict, threshold: float) -> dict:
    """Plain numbers about the probabilities [n] of each method on the stays with `label` [n]; the checkpoint's in full."""
    probability, prevalence = methods[CHECKPOINT], label.mean()
    draws, compared = bootstrap(label, *methods.values()), {}
    for i, (name, p) in enumerate(methods.items()):
        values = {"auroc": roc_auc_score(label, p), "auprc": average_precision_score(label, p)}
        compared[name] = {measure: {"value": float(value), "interval": np.percentile(draws[:, i, j], [2.5, 97.5]).tolist()}
                          for j, (measure, value) in enumerate(values.items())}
    tn, fp, fn, tp = confusion_matrix(label, probability >= threshold).ravel().tolist()
    return {"stays": len(label), "positive": int(label.sum()), "prevalence": float(prevalence), "methods": compared,
            "brier": float(brier_score_loss(label, probability)), "brier_of_prevalence": float(prevalence * (1 - prevalence)),
            "calibration_error": calibration_error(label, probability),
            "probability": {"mean": float(probability.mean()), "min": float(probability.min()), "max": float(probability.max()),
                            "below_0.01": int((probability < .01).sum()), "above_0.99": int((probability > .99).sum())},
            "threshold": threshold, "confusion": {"tp": tp, "fp": fp, "fn": fn, "tn": tn}, "f1": float(f1_score(label, probability >= threshold))}


def model_figures(model, dataset, stays) -> dict:
    weights = torch.cat([p.detach().flatten() for name, p in model.cls_head.named_parameters() if name.endswith("weight")])
    return {"head_parameters": sum(p.numel() for p in model.cls_head.parameters()), "parameters": sum(p.numel() for p in model.parameters()),
            "head_weights": {name: getattr(weights, name)().item() for name in ("mean", "std", "min", "max")},
            "active_units": active_units(model, dataset, stays), "latent_dim": model.config.latent_dim}


def print_figures(figures: dict, threshold_is: str) -> None:
    """The report of `score_figures` and `model_figures`; with baselines, the table of all methods."""
    def with_interval(measure):
        return "{:.4f}  95% [{:.3f}, {:.3f}]".format(measure["value"], *measure["interval"])

    own, spread, head = figures["methods"][CHECKPOINT], figures["probability"], figures["model"]
    print("\nScored: {stays:,} stays, {positive:,} positive ({prevalence:.1%}): {scored}".format(**figures))
    print(f"AUROC                {with_interval(own['auroc'])}")
    print(f"AUPRC                {with_interval(own['auprc'])}  (prevalence {figures['prevalence']:.4f})")
    print("Brier score          {brier:.4f}  (prevalence alone: {brier_of_prevalence:.4f})".format(**figures))
    print("Calibration error    {calibration_error:.4f}  (expected, 10 bins)".format(**figures))
    print(f"Probabilities        mean {spread['mean']:.4f}, range {spread['min']:.4f} to {spread['max']:.4f}, "
          f"below 0.01: {spread['below_0.01']}, above 0.99: {spread['above_0.99']}")
    print(f"Confusion            at {figures['threshold']:.4f} ({threshold_is}): "
          "TP {tp}, FP {fp}, FN {fn}, TN {tn}; ".format(**figures["confusion"]) + f"F1 {figures['f1']:.4f}")
    print("Head                 {head_parameters:,} of {parameters:,} parameters; weights ".format(**head)
          + "mean {mean:.4f}, std {std:.4f}, range {min:.3f} to {max:.3f}".format(**head["head_weights"]))
    print("Active units         {active_units}/{latent_dim} (variance of mu over sets > 0.01)".format(**head))
    if len(figures["methods"]) > 1:
        print(f"\n{'':32}  AUROC   95% interval      AUPRC   95% interval      (bootstrap over {figures['stays']:,} stays)")
        for name, measures in figures["methods"].items():
            print(f"{name:32}  {with_interval(measures['auroc'])}  {with_interval(measures['auprc'])}".replace("  95%", " "))


def write_predictions(path, content, cohort, probability) -> None:
    """Probability of every stay of the data, with its label (empty: none) and the split the checkpoint knows it from."""
    split = np.full(len(cohort), "", dtype=object)
    for name, ids in content["split"].items():
        split[stays_of(cohort, ids)] = name
    table = pd.DataFrame({"stay_id": cohort.stay_id, "probability": probability, "split": split,
                          "label": pd.array(np.where(cohort.label >= 0, cohort.label, np.nan), dtype="Int64")})
    write_atomically(path, lambda out: table.to_csv(out, index=False))
    print(f"predictions: {len(table):,} stays written to {path}")


@torch.no_grad()
def embed_stays(model, dataset, stays) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every stay the head input before standardisation [n, F] (as `train.encode_stays`) and h after its last set [n, d]."""
    features, end = torch.zeros(len(stays), sum(model._feature_sizes().values())), torch.zeros(len(stays), model.config.latent_dim)
    batches = sorted_batches(dataset.cohort, stays, EVALUATION_BATCH)
    for places, batch in zip(batches, progress(evaluation_loader(dataset, stays, CPU), len(batches), "encoding")):
        _, _, z, h = model.encode(batch)
        features[places], end[places] = model._head_input(z, h, batch), h[torch.arange(len(h)), batch.lengths - 1]
    return features, end


def write_embeddings(path, stay_id, features, h) -> None:
    def write(out):
        with open(out, "wb") as file:  # given a name, NumPy would append .npz
            np.savez(file, stay_id=stay_id, features=features.numpy(), h=h.numpy())
    write_atomically(path, write)
    print(f"embeddings: {len(stay_id):,} stays, features [{features.shape[1]}] and h [{h.shape[1]}], written to {path}")


@torch.no_grad()
def active_units(model, dataset, stays) -> int:
    """Units of mu whose variance over the sets of these stays exceeds 0.01 (Burda et al. 2016, section 5.2)."""
    mus = []
    for batch in evaluation_loader(dataset, stays, torch.device("cpu")):
        mus.append(model.setvae.encode(batch)[0][batch.slot_set < len(batch.group_slot)])
    return int((torch.cat(mus).var(0) > 0.01).sum())


# ----------------------------------------------------------------------------------------------------------------------------------
# One stay over time
# ----------------------------------------------------------------------------------------------------------------------------------

def find_stay(cohort, stay_id) -> int | None:
    """Index of the stay with this id (None where none is asked for)."""
    if stay_id is None:
        return None
    found = np.flatnonzero(cohort.stay_id == stay_id)
    if not len(found):
        raise InputError(f"--trajectory {stay_id}: no such stay in the data ({', '.join(cohort.stay_id[:3])} ...); give the id of one")
    return int(found[0])


@torch.no_grad()
def risk_over_time(model, dataset, stay: int, together: int = 32) -> dict:
    """The risk after every set of a stay, as if the stay had ended there. The model is causal: one pass gives z and h of all L sets, and the
    L prefixes differ only in where they end; `together` of them make a batch."""
    batch, cohort = dataset[np.array([stay])], dataset.cohort
    _, _, z, h = model.encode(batch)                                                                 # [1, L, d]
    risk = []
    for ends in torch.arange(1, int(batch.lengths) + 1).split(together):
        n = len(ends)
        # What `_head_input` reads of a batch; events after a prefix's end lie in slots that no causal statistic at its end sees.
        prefixes = replace(batch, lengths=ends, label=batch.label.expand(n), minute=batch.minute.expand(n, -1),
                           event_variable=batch.event_variable.repeat(n), event_value=batch.event_value.repeat(n),
                           event_slot=(torch.arange(n)[:, None] * batch.minute.shape[1] + batch.event_slot).flatten())
        risk += predict(model, model._head_input(z.expand(n, -1, -1), h.expand(n, -1, -1), prefixes)).tolist()
    sets = np.arange(cohort.stay_start[stay], cohort.stay_start[stay + 1])
    return {"stay": str(cohort.stay_id[stay]), "label": int(cohort.label[stay]), "minute": cohort.set_minute[sets].tolist(),
            "events": np.diff(cohort.set_start)[sets].tolist(), "risk": risk}


LABEL_NAMES = {-1: "no label", 0: "label 0", 1: "label 1"}


def print_trajectory(trajectory: dict) -> None:
    print(f"\nStay {trajectory['stay']} ({LABEL_NAMES[trajectory['label']]}): risk after each of its {len(trajectory['risk'])} sets\n  set      hour  events    risk")
    for i, (minute, events, risk) in enumerate(zip(trajectory["minute"], trajectory["events"], trajectory["risk"])):
        print(f"{i + 1:5d}  {minute / 60:8.2f}  {events:6d}  {risk:6.4f}  {'#' * round(40 * risk)}")


# ----------------------------------------------------------------------------------------------------------------------------------
# Pictures: lines differ in style as well as in colour, so that they are readable in grey
# ----------------------------------------------------------------------------------------------------------------------------------

STYLES = [dict(color=color, linestyle=style) for color, style in (("black", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#888888", ":"))]


def new_figure(columns: int, rows: int = 1, width: float = 4.4, height: float = 3.8, **options):
    """A figure and its axes, row by row; width and height of one in inches. Without pyplot: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plots needs matplotlib; pip install matplotlib") from None
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def picture_folder(path) -> Path:
    """The folder, made. Raises InputError where it or matplotlib cannot be had, before anything is computed."""
    new_figure(1)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plots {path}: cannot be made ({error.strerror}); choose another folder") from None
    return Path(path)


def save_figure(figure, path: Path) -> None:
    write_atomically(path, lambda out: figure.savefig(out, format="png", dpi=130))


# title, unit, and the columns of metrics.csv in training and on the validation stays
CURVES = [("loss", "loss", "loss", "val_loss"), ("KL divergence", "nats a set", "kl", "val_kl"), ("active units", "units of mu", "", "active_units"),
          ("AUROC", "AUROC", "", "val_auc"), ("AUPRC", "AUPRC", "", "val_auprc")]


def plot_curves(folder: Path, checkpoint, pretrained) -> None:
    """curves.png, of the metrics.csv beside the checkpoint and beside the one that it was finetuned from, where they are still there."""
    panels = []
    for mode, path in (("pretraining", pretrained), ("finetuning", checkpoint)):
        if path and (metrics := Path(path).parent / "metrics.csv").is_file():
            table = pd.read_csv(metrics)
            for title, unit, *columns in CURVES:
                lines = {name: table[column] for name, column in zip(("training", "validation"), columns) if column in table}
                panels += [(f"{mode}: {title}", unit, table["epoch"], lines)] if lines else []
        else:
            print(f"pictures: no curves of the {mode} run, as no metrics.csv lies beside {path or 'its checkpoint, which is unknown'}")
    if not panels:
        return
    figure, axes = new_figure(3, -(-len(panels) // 3), height=3.2)
    for ax, (title, unit, epoch, lines) in zip(axes, panels):
        for name, values in lines.items():
            ax.plot(epoch, values, marker="o", markersize=3, label=name, **STYLES[name == "validation"])
        ax.set(title=title, xlabel="epoch", xlim=(.5, epoch.max() + .5), ylabel=unit if len(lines) > 1 else f"{unit}, {name}")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if "units" in title:
            ax.set_ylim(0)
        if len(lines) > 1:
            ax.legend(frameon=False)
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    save_figure(figure, folder / "curves.png")


def plot_ranking(folder: Path, label, methods: dict) -> None:
    """ranking.png: ROC and precision-recall of the checkpoint and, where fitted, the baselines."""
    figure, (roc, pr) = new_figure(2, width=5, height=4.8)
    for (name, p), style in zip(methods.items(), STYLES):
        roc.plot(*roc_curve(label, p)[:2], label=f"{name} ({roc_auc_score(label, p):.3f})", **style)
        precision, recall, _ = precision_recall_curve(label, p)
        pr.plot(recall, precision, label=f"{name} ({average_precision_score(label, p):.3f})", drawstyle="steps-post", **style)
    roc.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=.8)
    pr.axhline(label.mean(), color="#bbbbbb", linewidth=.8, label=f"prevalence ({label.mean():.3f})")
    roc.set(title=f"ROC, {len(label):,} stays", xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))
    pr.set(title=f"Precision-recall, {label.sum():,} positive", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    roc.legend(title="AUROC", frameon=False, fontsize=8, loc="lower right")
    pr.legend(title="AUPRC", frameon=False, fontsize=8, loc="upper right")
    save_figure(figure, folder / "ranking.png")


def plot_calibration(folder: Path, label, probability, bins: int = 10) -> None:
    """calibration.png: observed share of positives in bins of the predicted probability, with its 95% interval (Wilson 1927), and how many."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    count, positive, total = (np.bincount(which, weights, bins) for weights in (None, label, probability))
    used = count > 0
    n, share, mean = count[used], positive[used] / count[used], total[used] / count[used]
    center = (share + 1.96 ** 2 / (2 * n)) / (1 + 1.96 ** 2 / n)
    half = 1.96 / (1 + 1.96 ** 2 / n) * np.sqrt(share * (1 - share) / n + 1.96 ** 2 / (4 * n ** 2))
    figure, (curve, bars) = new_figure(1, 2, width=5, height=3, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    curve.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=.8, label="perfect")
    curve.errorbar(mean, share, [(share - center + half).clip(0), (center + half - share).clip(0)], color="black", marker="o", markersize=4,
                   linewidth=1, capsize=2, label="this checkpoint, 95% interval")
    figure.suptitle(f"Calibration: Brier {brier_score_loss(label, probability):.3f}, expected error {calibration_error(label, probability, bins):.3f}")
    curve.set(ylabel="observed share of positives", xlim=(0, 1), ylim=(0, 1.01))
    curve.legend(frameon=False, ncols=2, fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1))
    bars.bar((np.arange(bins) + .5) / bins, count, width=.9 / bins, color="#777777")
    bars.set(xlabel="predicted probability", ylabel="stays")
    bars.yaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, folder / "calibration.png")


def plot_features(folder: Path, features, label) -> None:
    """features.png: the stays' standardised head inputs, clipped as the head clips them, on their first two principal components."""
    pca = PCA(2, random_state=0)
    place = pca.fit_transform(StandardScaler().fit_transform(features.numpy()).clip(-5, 5))
    figure, (ax,) = new_figure(1, width=6, height=5)
    styles = {-1: dict(marker=".", color="#bbbbbb"), 0: dict(marker="o", edgecolors="#888888", facecolors="none"), 1: dict(marker="^", color="black")}
    for value, style in styles.items():
        if (which := label == value).any():
            ax.scatter(*place[which].T, s=14, linewidths=.6, alpha=.8, label=f"{LABEL_NAMES[value]} ({which.sum():,})", **style)
    figure.suptitle(f"Stay features ({features.shape[1]}) in two dimensions")
    ax.set(**{f"{axis}label": f"principal component {i + 1} ({share:.0%} of the variance)"
              for i, (axis, share) in enumerate(zip("xy", pca.explained_variance_ratio_))})
    ax.legend(frameon=False, ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1))
    save_figure(figure, folder / "features.png")


def plot_trajectory(folder: Path, trajectory: dict, dataset, stay: int, threshold: float, most: int = 40) -> None:
    """trajectory.png: the risk after every set, above the stay's events (its `most` charted variables), low and high ones marked."""
    cohort, normalizer = dataset.cohort, dataset.normalizer
    events = stay_event_index(cohort, np.array([stay]))
    hour = np.repeat(trajectory["minute"], trajectory["events"]) / 60
    variable = dataset.variable[cohort.event_variable[events]]
    hour, events, variable = (x[variable >= 0] for x in (hour, events, variable))
    z = normalizer(variable, cohort.event_value[events])
    names, count = np.unique(variable, return_counts=True)
    shown = np.sort(names[np.argsort(-count, kind="stable")[:most]])[::-1]
    figure, (risk, chart) = new_figure(1, 2, width=9, height=1.7 + .09 * len(shown), sharex=True,
                                       gridspec_kw={"height_ratios": [2.2, .8 + .18 * len(shown)]})
    risk.step(np.array(trajectory["minute"]) / 60, trajectory["risk"], where="post", color="black", marker=".", markersize=4)
    risk.axhline(threshold, color="#888888", linestyle=":", label=f"threshold {threshold:.2f}")
    risk.set(title=f"Stay {trajectory['stay']} ({LABEL_NAMES[trajectory['label']]})", ylabel="risk",
             ylim=(0, max(1.05 * max(*trajectory["risk"], threshold), .1)))
    risk.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    for name, which, marker, color in (("1 sd below the mean or lower", z <= -1, "v", "#0072B2"), ("between", abs(z) < 1, ".", "#888888"),
                                       ("1 sd above or higher", z >= 1, "^", "black")):
        which = which & np.isin(variable, shown)
        chart.scatter(hour[which], np.searchsorted(-shown, -variable[which]), s=13, linewidths=0, label=name, marker=marker, color=color)
    chart.set_yticks(range(len(shown)), [normalizer.variables[v] for v in shown], fontsize=7)
    chart.set(xlabel="hours since admission", ylim=(-1, len(shown)),
              ylabel="variables" if len(shown) == len(names) else f"the {most} most charted of {len(names)} variables")
    chart.legend(frameon=False, ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1))
    save_figure(figure, folder / "trajectory.png")


# ----------------------------------------------------------------------------------------------------------------------------------
# Hand-made baselines
# ----------------------------------------------------------------------------------------------------------------------------------

BASELINES = ("logistic regression on summaries", "gradient boosting on summaries")


def summary_table(cohort, stays) -> pd.DataFrame:
    """Hand-made features of each stay: first, last, min, max, mean, sd, count and slope (a day) of every variable, descriptors included;
    raw units, NaN where a variable was not measured."""
    events = stay_event_index(cohort, stays)
    table = pd.DataFrame({"stay": np.repeat(np.arange(len(stays)), cohort.stay_events[stays]), "variable": cohort.event_variable[events],
                          "value": cohort.event_value[events].astype(np.float64)})
    sets = np.searchsorted(cohort.set_start, events, side="right") - 1
    table["day"] = cohort.set_minute[sets] / 1440
    table["square"], table["product"] = table["day"] ** 2, table["day"] * table["value"]
    groups = table.groupby(["stay", "variable"])
    summary = groups["value"].agg(["first", "last", "min", "max", "mean", "std", "count"])
    day, square, product = (groups[name].mean() for name in ("day", "square", "product"))
    spread = square - day ** 2
    summary["slope"] = ((product - day * summary["mean"]) / spread.where(spread > 1e-9)).fillna(0)
    wide = summary.unstack("variable").reindex(range(len(stays)))
    wide["count"] = wide["count"].fillna(0)
    wide.columns = [f"{cohort.variables[v]} {name}" for name, v in wide.columns]
    return wide


def hand_made_baselines(cohort, train, test) -> dict[str, np.ndarray]:
    """Probabilities of the test stays by logistic regression (penalty chosen by cross-validation inside the training stays) and by
    HistGradientBoosting (scikit-learn's defaults, and shallow trees chosen likewise) on `summary_table`."""
    both = summary_table(cohort, np.concatenate([train, test]))
    both = both.loc[:, both.iloc[:len(train)].nunique() > 1]  # what is constant in training says nothing
    x, x_test, y = both.iloc[:len(train)], both.iloc[len(train):], cohort.label[train].astype(int)
    low, high = x.quantile(.005), x.quantile(.995)
    linear = make_pipeline(FunctionTransformer(lambda t: t.clip(low, high, axis=1)), SimpleImputer(strategy="median", add_indicator=True),
                           StandardScaler(), LogisticRegressionCV(Cs=[.0003, .001, .003, .01, .03, .1], cv=5, scoring="neg_log_loss", max_iter=500))
    boosting = GridSearchCV(HistGradientBoostingClassifier(learning_rate=.05, random_state=0),
                            {"max_iter": [100, 200], "max_leaf_nodes": [6, 15], "l2_regularization": [10.]}, scoring="neg_log_loss", cv=5)
    return {BASELINES[0]: linear.fit(x, y).predict_proba(x_test)[:, 1],
            BASELINES[1]: boosting.fit(x.to_numpy(), y).predict_proba(x_test.to_numpy())[:, 1]}


def baselines(arguments, content, cohort, dataset, stays, new) -> dict[str, np.ndarray]:
    """Probabilities of the scored stays by the hand-made baselines and by an untrained backbone of the checkpoint's config under the same
    head, all trained on the checkpoint's training stays."""
    if new or "format" not in content:
        raise InputError(f"{arguments.checkpoint}: --baselines are fitted on the data that train.py made the checkpoint with; leave "
                         f"{'--data_dir' if new else '--baselines'} out")
    methods = hand_made_baselines(cohort, labelled(cohort, content["split"]["train"]), stays)
    with tempfile.TemporaryDirectory() as folder:
        pretrained = Path(folder) / "untrained.pt"
        torch.save(content | {"mode": "pretrain"}, pretrained)
        given = [f"--{name}={path}" for name in ("data_dir", "params_map", "label_file") if (path := getattr(arguments, name))]
        path = finetune(parse_arguments(["--mode", "finetune", "--pretrained_ckpt", str(pretrained), "--random_init", "--run_dir", f"{folder}/run", *given]))
        model = open_classifier(path, arguments.data_dir, arguments.params_map, arguments.label_file)[0]
        return methods | {"untrained backbone, same head": predict(model, encode_stays(model, dataset, stays, CPU))}


# ----------------------------------------------------------------------------------------------------------------------------------
# The protocol: five splits, every method, one command
# ----------------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cell:
    """One finetuning of the protocol."""

    pretrained: bool = True
    full: bool = False
    fuse: bool = True
    summaries: bool = False
    labels: float = 1.0

    @property
    def name(self) -> str:
        return (f"{'full' if self.full else 'frozen'} {'pretrained' if self.pretrained else 'random'}, {'mu + logvar' if self.fuse else 'mu'}"
                f"{', + summaries' if self.summaries else ''}")


FRACTIONS = (1.0, 0.3, 0.1)
# In order of importance: a protocol that is stopped early has the first ones of every split.
CELLS = [
    [Cell(), Cell(summaries=True), Cell(pretrained=False)],
    [Cell(full=True, summaries=True)],
    [Cell(full=full, summaries=True, labels=f) for full in (False, True) for f in FRACTIONS[1:]] + [Cell(labels=f) for f in FRACTIONS[1:]],
    [Cell(fuse=False), Cell(pretrained=False, fuse=False)],
    [Cell(full=True, pretrained=pretrained, fuse=fuse) for fuse in (True, False) for pretrained in (True, False)],
]


def protocol(data_dir, seeds, folder: Path) -> None:
    """Pretrain on the training part of each split without labels, finetune every cell, fit the baselines, score the test part once.
    What is finished lies in `folder` (a CSV of test predictions a cell and split) and is kept: stop and go on at will."""
    for stage, cells in enumerate(CELLS):
        for seed in seeds:
            home = folder / f"seed{seed}"
            common = ["--data_dir", str(data_dir), "--seed", str(seed)]
            checkpoint = home / "pretrain" / "best.pt"
            if not checkpoint.exists():
                partial = home / "pretrain.partial"
                resume = ["--resume", str(partial)] if (partial / "last.pt").exists() else ["--run_dir", str(partial)]
                if resume[0] == "--run_dir":
                    shutil.rmtree(partial, ignore_errors=True)
                pretrain(parse_arguments(["--mode", "pretrain", *common, *resume]))
                partial.rename(checkpoint.parent)
            for cell in cells:
                predict_cell(cell, checkpoint, home, common)
            if stage == 0:
                predict_baselines(checkpoint, home, seed)
    print_protocol(folder)


def predictions_path(home: Path, method: str, fraction: float) -> Path:
    return home / f"{method} {fraction:.0%}.csv"


def save_predictions(path: Path, cohort, stays, probability) -> None:
    table = pd.DataFrame({"stay_id": cohort.stay_id[stays], "label": cohort.label[stays], "probability": probability})
    write_atomically(path, lambda out: table.to_csv(out, index=False))


def predict_cell(cell: Cell, checkpoint: Path, home: Path, common: list) -> None:
    path, run = predictions_path(home, cell.name, cell.labels), home / "run"
    if path.exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    options = ["--mode", "finetune", "--pretrained_ckpt", str(checkpoint), "--run_dir", str(run), "--label_fraction", str(cell.labels), *common]
    options += ["--full_training"] * cell.full + ["--random_init"] * (not cell.pretrained)
    best = finetune(parse_arguments(options), replace(FinetuneConfig(), fuse=cell.fuse, summaries=cell.summaries))
    model, content, cohort, dataset, _ = open_classifier(best)
    stays = labelled(cohort, content["split"]["test"])
    save_predictions(path, cohort, stays, predict(model, encode_stays(model, dataset, stays, torch.device("cpu"))))


def predict_baselines(checkpoint: Path, home: Path, seed: int) -> None:
    content, cohort, _, split, _ = open_checkpoint(checkpoint)
    train, test = labelled(cohort, split["train"]), labelled(cohort, split["test"])
    for fraction in FRACTIONS:
        if all(predictions_path(home, method, fraction).exists() for method in BASELINES):
            continue
        part = label_subset(cohort, train, fraction, seed)
        for method, probability in hand_made_baselines(cohort, part, test).items():
            save_predictions(predictions_path(home, method, fraction), cohort, test, probability)


def print_protocol(folder: Path) -> None:
    """The tables of README.md from the finished cells: mean and standard deviation over the splits; the difference to the better
    baseline (by mean AUROC) with a bootstrap interval, paired by stay and drawn within each split."""
    found = {}
    for path in sorted(folder.glob("seed*/*%.csv")):
        method, fraction = path.stem.rsplit(" ", 1)
        found.setdefault((method, fraction), {})[path.parent.name] = pd.read_csv(path)

    def scores(tables):
        return np.array([(roc_auc_score(t["label"], t["probability"]), average_precision_score(t["label"], t["probability"])) for t in tables])

    for fraction in (f"{f:.0%}" for f in FRACTIONS):
        rows = {method: tables for (method, f), tables in found.items() if f == fraction}
        base = max((m for m in rows if m in BASELINES), key=lambda m: scores(rows[m].values())[:, 0].mean(), default=None)
        print(f"\n{fraction} of the training labels\n\n| method | splits | AUROC | AUPRC | difference to {base}: AUROC | AUPRC |\n|---|---|---|---|---|---|")
        for method, tables in sorted(rows.items(), key=lambda row: -scores(row[1].values())[:, 0].mean()):
            s = scores(tables.values())
            spread = s.std(0, ddof=1) if len(s) > 1 else np.zeros(2)
            cells = [f"{m:.3f} ± {d:.3f}" for m, d in zip(s.mean(0), spread)]
            if base and method != base:
                shared = [seed for seed in tables if seed in rows[base]]
                draws = np.mean([np.diff(bootstrap(tables[seed]["label"].to_numpy(), rows[base][seed]["probability"].to_numpy(),
                                                   tables[seed]["probability"].to_numpy(), repeats=200, seed=i), axis=1)[:, 0]
                                 for i, seed in enumerate(shared)], axis=0)
                mean = (scores(tables[seed] for seed in shared) - scores(rows[base][seed] for seed in shared)).mean(0)
                cells += [f"{m:+.3f} {interval(draws[:, i])}" for i, m in enumerate(mean)]
            else:
                cells += ["", ""]
            print(f"| {method} | {len(s)} | {' | '.join(cells)} |")


# ----------------------------------------------------------------------------------------------------------------------------------
# Benchmark: our batched model beside the plain loop (above), in one run and on one number of threads
# ----------------------------------------------------------------------------------------------------------------------------------

PLAIN_LOOP, PRETRAIN_STEP, INFERENCE, MATMUL_PEAK = "plain loop", "pretrain step", "inference", "matmul"
BENCHMARK = {  # sizes: (config of so many variables, batches of pretraining and of evaluation, epochs of a finetuning, ways to run it)
    "original's sizes": (ModelConfig.original, 4, 3, 15, (PLAIN_LOOP, "float32", "bf16")),
    "our default": (ModelConfig, 16, 6, 20, ("float32", "bf16")),
}
ROUNDS, LOOPED = 3, 8  # passes timed; stays of the plain loop
MATMUL, PRODUCTS = 3072, 8  # width of the matrices whose product tells the peak, and products a pass: one alone would time the threads' waking


def spread(items, n: int) -> list:
    """n of the items at even distances, or all."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, n + 2)[1:-1].round().astype(int))]


def plain_stays(dataset, stays) -> list:
    """Stays as the plain loop takes them: lists of (minute, events), an event being (variable, normalised value)."""
    cohort, lists = dataset.cohort, []
    for p in stays:
        lists.append([])
        for t in range(cohort.stay_start[p], cohort.stay_start[p + 1]):
            events = slice(cohort.set_start[t], cohort.set_start[t + 1])
            variable = dataset.variable[cohort.event_variable[events]]
            value = dataset.normalizer(variable, cohort.event_value[events])
            lists[-1].append((float(cohort.set_minute[t]), list(zip(variable.tolist(), value.tolist()))))
    return lists


def new_pretraining(config, dataset) -> SeqSetVAEPretrain:
    return SeqSetVAEPretrain(config, variable_vectors(dataset.normalizer.variables, config.input_dim))


def new_classifier(config, dataset) -> tuple[SeqSetVAE, FinetuneConfig]:
    """With our default head; at the original's objective with its features, its head's widths and its loss."""
    d, settings = config.latent_dim, FinetuneConfig()
    if config.decoder == "slots":
        settings = FinetuneConfig(features="stable", summaries=False, head_widths=(d, d // 2, d // 4), trees=None, loss="focal")
    config = replace(config, head_trees=settings.trees, fuse=settings.fuse, features=settings.features, summaries=settings.summaries,
                     head_widths=settings.head_widths)
    return SeqSetVAE(config, variable_vectors(dataset.normalizer.variables, config.input_dim)), settings


def assert_plain_loop_agrees(config, dataset, stays) -> None:
    """The plain loop's losses and features are the batched model's, to 1e-5 (with learned seeds, as noise is never drawn alike)."""
    config, lists = replace(config, learned_seeds=True), plain_stays(dataset, stays)
    model, head = new_pretraining(config, dataset).eval(), new_classifier(config, dataset)[0].eval()
    with torch.no_grad():
        losses, (_, plain) = model(dataset[stays], beta=1.0), plain_pass(model, lists)
        close(torch.stack([losses["reconstruction"], losses["kl"]]), torch.stack(plain))
        close(head.features(dataset[stays]), torch.stack([plain_features(head, stay) for stay in lists]))


def pretrain_work(how, config, batches, dataset, device):
    """Forward, backward and optimizer step of every batch. The plain loop goes backward after each stay, so it holds one stay in memory."""
    model, clip = new_pretraining(config, dataset).to(device).train(), train.PRETRAIN["clip"]
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler(device.type, enabled=False)
    batches = [plain_stays(dataset, stays) if how == PLAIN_LOOP else dataset[stays].to(device) for stays in batches]

    def plain():
        for batch in batches:
            for stay in batch:
                _, (reconstruction, kl) = plain_pass(model, [stay])
                ((reconstruction + config.max_beta * kl) / len(batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step(), optimizer.zero_grad(set_to_none=True)

    def batched():
        for batch in batches:
            with torch.amp.autocast(device.type, torch.bfloat16, enabled=how == "bf16"):
                losses = model(batch, config.max_beta)
            update(model, losses["loss"], optimizer, scaler, clip)
    return plain if how == PLAIN_LOOP else batched


def classifier_work(task, epochs, how, config, batches, dataset, device):
    """Inference, or a finetuning on the frozen backbone, of which the plain loop runs one epoch: it encodes every stay at each."""
    (model, settings), stays = new_classifier(config, dataset), np.concatenate(batches)
    optimizer, _ = head_optimizer(model.to(device), settings)
    label = torch.arange(len(stays), device=device) % 2  # any labels take the same time, and some data have none
    lists = plain_stays(dataset, stays) if how == PLAIN_LOOP else None

    @torch.no_grad()
    def encode():
        if how == PLAIN_LOOP:
            model.eval()
            return torch.stack([plain_features(model, stay) for stay in lists])
        with torch.amp.autocast(device.type, torch.bfloat16, enabled=how == "bf16"):
            return encode_stays(model, dataset, stays, device)

    def finetuning():
        features = encode()
        prepare_head(model, features, label, settings, seed=0)
        for epoch in range(1 if how == PLAIN_LOOP else epochs):
            head_epoch(model, features, label, optimizer, settings, epoch_batches(np.ones(len(stays)), train.FINETUNE["batch_size"], 0, epoch))
    return (lambda: predict(model, encode())) if task == INFERENCE else finetuning


def matmul_work(width, dataset, device):
    a = torch.randn(width, width, device=device)

    def products():
        for _ in range(PRODUCTS):
            a @ a
    return products


def pretrain_flops(config, batches, dataset) -> int:
    """Of forward and backward, padding included, counted on the meta device, where nothing is computed. Attention counts as its matrix
    products (the math kernel): `FlopCounterMode` does not know the CPU's flash kernel."""
    model = new_pretraining(config, dataset).to("meta").train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for stays in batches:
            model(dataset[stays].to("meta"), config.max_beta)["loss"].backward()
    return counter.get_total_flops()


def peak_memory(device) -> float:
    """MB: of PyTorch's tensors on a GPU, else of this process. The latter never falls, so each work has a process of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def timed_process(pipe, threads, load, normalizer, device, work) -> None:
    """Get ready, tell what memory was taken before; then at every message run a pass, tell its seconds and the peak memory."""
    keep_freed_memory(), torch.set_num_threads(threads)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    imports, run = peak_memory(device), work(StayDataset(load(), normalizer), device)
    pipe.send(imports)
    with contextlib.suppress(EOFError):  # the other end was closed
        while pipe.recv():
            wait()
            began = time.perf_counter()
            run(), wait()
            pipe.send((time.perf_counter() - began, peak_memory(device)))


def take_turns(works: dict, *common) -> tuple[dict, float]:
    """Of each work (dataset, device) -> pass, in a process of its own: (seconds of its fastest pass, peak memory in MB); and the memory of the
    imports alone. The passes take turns, so that whatever else the machine does slows all alike."""
    context, pipes, passes = multiprocessing.get_context("forkserver"), {}, {name: [] for name in works}
    context.set_forkserver_preload([Path(__file__).stem, "torch._dynamo"])  # which every optimizer imports
    with contextlib.ExitStack() as stack:
        for name, work in works.items():
            mine, theirs = context.Pipe()
            pipes[name] = stack.enter_context(mine)
            context.Process(target=timed_process, args=(theirs, torch.get_num_threads(), *common, work)).start()
            theirs.close()
        imports = [pipe.recv() for pipe in pipes.values()]
        for _, (name, pipe) in itertools.product(range(ROUNDS), pipes.items()):
            pipe.send("run")
            passes[name].append(pipe.recv())
    return {name: (min(done)[0], done[-1][1]) for name, done in passes.items()}, max(imports)


def machine_name(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def padding(dataset, batches) -> list:
    """Share of the cells of the groups of sets, and of the slots of the grid of stays, that hold nothing, in %."""
    counts = np.zeros(4)
    for batch in map(dataset.__getitem__, batches):
        counts += len(batch.event_value), len(batch.token_event), batch.lengths.sum(), batch.minute.numel()
    events, cells, sets, slots = counts
    return [("padding of the groups of sets", 100 * (1 - events / cells), "% of the cells"),
            ("padding of the grid of stays", 100 * (1 - sets / slots), "% of the slots")]


def measure(dataset, load, device) -> tuple[pd.DataFrame, float]:
    """One row a work: sizes, work, how -> seconds, stays, sets, FLOPs, MB; and the MB of the imports alone."""
    bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    lengths, rows = np.diff(dataset.cohort.stay_start), {}
    for sizes, (make_config, steps, passes, epochs, hows) in BENCHMARK.items():
        config, finetune = make_config(len(dataset.normalizer.variables)), f"{epochs}-epoch finetune"
        pretrained = epoch_batches(lengths, train.PRETRAIN["batch_size"], 0, 0)[:steps]
        evaluated = spread(sorted_batches(dataset.cohort, np.arange(len(dataset.cohort)), EVALUATION_BATCH), passes)
        if PLAIN_LOOP in hows:
            assert_plain_loop_agrees(config, dataset, evaluated[-1][:2])
        flops = {PRETRAIN_STEP: pretrain_flops(config, pretrained, dataset), MATMUL_PEAK: PRODUCTS * 2 * MATMUL**3}
        for tasks, batches in (({PRETRAIN_STEP: pretrain_work}, pretrained),
                               ({task: partial(classifier_work, task, epochs) for task in (finetune, INFERENCE)}, evaluated)):
            print(f"measuring: {sizes}, {' and '.join(tasks)}", flush=True)
            stays = np.concatenate(batches)
            looped = spread(stays[np.argsort(lengths[stays])], LOOPED)
            works = {(task, how): partial(work, how, config, [looped] if how == PLAIN_LOOP else batches)
                     for task, work in tasks.items() for how in hows if bf16 or how != "bf16"}
            if PRETRAIN_STEP in tasks:
                works[MATMUL_PEAK, "float32"] = partial(matmul_work, MATMUL)
            timed, imports = take_turns(works, load, dataset.normalizer, device)
            for (task, how), (seconds, memory) in timed.items():
                used = [] if task == MATMUL_PEAK else looped if how == PLAIN_LOOP else stays
                rows[sizes, task, how] = {"seconds": seconds * (epochs if (task, how) == (finetune, PLAIN_LOOP) else 1),
                                          "stays": len(used) or np.nan, "sets": lengths[used].sum() or np.nan,
                                          "FLOPs": flops.get(task) if how != PLAIN_LOOP else np.nan, "MB": memory}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["sizes", "work", "how"]), imports


def in_row(column: pd.Series, **changes) -> list:
    """For every row the column's value in the row whose index has these `changes` (NaN: there is none)."""
    return [column.get(tuple((dict(zip(column.index.names, key)) | changes).values()), np.nan) for key in column.index]


def benchmark(arguments) -> None:
    """Measure, print the table, and append it to checkpoints/benchmark.csv, a row a number."""
    device, facts = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    with tempfile.TemporaryDirectory() as cache:
        load = partial(load_cohort, arguments.data_dir, cache_dir=Path(cache), params_map=arguments.params_map, label_file=arguments.label_file)
        for what in ("parsed" if arguments.data_dir else "generated", "from the cache"):
            began, cohort = time.perf_counter(), load()
            facts.append((f"data, {what}", time.perf_counter() - began, "s"))
        print(cohort.describe())
        dataset = StayDataset(cohort, Normalizer.fit(cohort, np.arange(len(cohort))))
        facts += padding(dataset, epoch_batches(np.diff(cohort.stay_start), train.PRETRAIN["batch_size"], 0, 0)[:64])
        rows, imports = measure(dataset, load, device)
    facts.append(("memory of the imports alone", imports, "MB"))
    a_set, flops = 1e3 * rows["seconds"] / rows["sets"], 1e-9 * rows["FLOPs"] / rows["seconds"]
    table = pd.DataFrame({
        "stays": rows["stays"], "stays/s": rows["stays"] / rows["seconds"], "ms a stay": 1e3 * rows["seconds"] / rows["stays"], "ms a set": a_set,
        "MB": rows["MB"], "x plain": in_row(a_set, how=PLAIN_LOOP) / a_set, "x float32": (in_row(a_set, how="float32") / a_set).filter(like="bf16"),
        "x inference": (a_set / in_row(a_set, work=INFERENCE)).filter(like="finetune"),
        "GFLOP/s": flops, "% of peak": 100 * flops / in_row(flops, work=MATMUL_PEAK)}, index=rows.index)

    machine, threads = machine_name(device), torch.get_num_threads()
    memory = "the tensors" if device.type == "cuda" else "a process that does this alone"
    print(f"""
{machine}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, {cohort.reader}
Times: the fastest of {ROUNDS} passes, taken in turns. MB: peak memory of {memory}.
The plain loop runs {LOOPED} of the stays, and of a finetuning one epoch, whose time is multiplied. x plain, x float32: how many times
faster a set is done; x inference: how many inferences it costs. FLOPs include padding; % of peak: of the float32 product of
two {MATMUL} x {MATMUL} matrices that took turns with the steps.
""")
    show = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    print(table.to_string(float_format=show, na_rep=""), *(f"{what}: {show(value)} {unit}" for what, value, unit in facts), sep="\n")
    facts += [(", ".join(name), value, unit) for name, row in table.iterrows() for unit, value in row.dropna().items()]
    common = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine, "threads": threads, "torch": str(torch.__version__),
              "data": f"{cohort.reader}, {len(cohort)} stays"}
    path = CHECKPOINTS / "benchmark.csv"
    old = path.read_text() if path.exists() else ""
    new = pd.DataFrame([common | {"what": what, "value": f"{value:.6g}", "unit": unit} for what, value, unit in facts])
    write_atomically(path, lambda out: out.write_text(old + new.to_csv(index=False, header=not old)))
    print(f"{len(new)} rows appended to {path}")


# ----------------------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------------------

def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Without options: run every test. With --checkpoint: analyse a finetuned checkpoint. "
                                                 "With --protocol: the measured tables of README.md. With --benchmark: speed and memory.",
                                     allow_abbrev=False, usage="python test_suite.py [--checkpoint CKPT | --protocol [FOLDER] | --benchmark] [options]")
    add = parser.add_argument_group("analysis of a checkpoint").add_argument
    add("--checkpoint", metavar="CKPT", help="the finetuned checkpoint, of train.py or of the original implementation")
    add("--baselines", action="store_true", help="compare with hand-made baselines and an untrained backbone")
    add("--predictions", metavar="CSV", help="write stay_id, probability, split, label of every stay of the data, labelled or not")
    add("--embeddings", metavar="NPZ", help="write stay_id, features and h after the last set of every stay")
    add("--trajectory", metavar="STAY", help="the risk after every set of this stay")
    add("--plots", metavar="DIR", help="draw curves, ROC and precision-recall, calibration, features and the --trajectory (needs matplotlib)")
    add("--json", metavar="FILE", help="write the analysis' figures")
    add_head_options(add)

    add = parser.add_argument_group("data (default: the checkpoint's, of which the recorded test split is scored)").add_argument
    add("--data_dir", help="score all labelled stays of this data instead; the protocol's or the benchmark's data")
    add("--params_map", "--params_map_path", metavar="FILE", help="original layout: statistics, CSV variable,mean,std or .pkl")
    add("--label_file", "--label_path", metavar="CSV", help="original layout: labels, ts_id,in_hospital_mortality")

    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", metavar="FOLDER", nargs="?", const=str(CHECKPOINTS / "protocol"),
        help="run the five-split protocol on --data_dir, keeping what is finished in FOLDER (default: checkpoints/protocol)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="splits of the protocol (default: 0 1 2 3 4)")
    add = parser.add_argument_group("benchmark").add_argument
    add("--benchmark", action="store_true", help="measure speed and memory on --data_dir or the embedded cohort (OMP_NUM_THREADS sets the threads)")

    add = parser.add_argument_group("tests").add_argument
    add("--soak", action="store_true", help="run the tests of killed processes and damaged inputs at length: 60 kills, 2,000 inputs")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    try:
        if arguments.soak:
            os.environ["SEQSETVAE_SOAK"] = "1"
            return pytest.main([__file__, "-q", "-s", "-k", "random"])
        if arguments.protocol:
            if not arguments.data_dir:
                raise InputError("--protocol needs --data_dir, for instance ../shared/data/physionet2012")
            protocol(arguments.data_dir, arguments.seeds, Path(arguments.protocol))
        elif arguments.benchmark:
            benchmark(arguments)
        elif arguments.checkpoint:
            performance(arguments)
        elif sys.argv[1:] if argv is None else argv:
            raise InputError("these options need --checkpoint (or --protocol, --benchmark); the tests run without any option")
        else:
            return pytest.main([__file__, "-q"])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
