"""Tests of model.py: batched equals one by one, nothing leaks from the future, losses equal their formulas."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

import train
from batches import StayDataset
from data import InputError, stays_of
from checkpoint import load_weights
from finetune_config import (MANY_POINTS, BoostedTrees, FinetuneConfig, boosted_trees, head_penalty,
                             tree_sizes)
from history_statistics import real_sets, statistics_at
from model import History, ModelConfig, SeqSetVAE, SeqSetVAEPretrain, SetVAE
from readouts import masked_mean
from predictor import CPU
from questions import at_moments, labelled_points, with_points
from tasks import Binary
from tests.plain_loop import close, plain_future, plain_pass, plain_statistics
from tests.tiny import PLAIN, batch_of, build, cohort_of, encoded, random_stays, tiny
from train import fit_to_validation


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("presence", [True, False])
@pytest.mark.parametrize("mab_residual", [True, False])
@pytest.mark.parametrize("decoder, valueless", [
    (dict(decoder="readout"), 0.0), (dict(decoder="readout"), 0.3),
    (dict(decoder="slots", slope_per_head=False, free_bits=0.6, logvar_bonus=0.1), 0.0)],
                         ids=["readout", "valueless", "slots"])
def test_a_batch_equals_a_plain_loop_over_single_sets(decoder, mab_residual, presence, levels, valueless):
    model = build(SeqSetVAEPretrain, tiny(mab_residual=mab_residual, presence=presence, levels=levels, **decoder))
    stays = random_stays(valueless=valueless)
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
        (mu, logvar), (decoded, z_list) = model.encode(batch), model(batch)
        close(decoded, model.decode(mu, batch))
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0, 1)).sum(-1)
        close(model.kl(mu, logvar, batch), masked_mean(kl, real_sets(batch)).mean())
        assert len(z_list) == 2 and torch.equal(z_list[-1][1], mu) and torch.equal(z_list[-1][2], logvar)
        assert all(torch.equal(z, mean) for z, mean, _ in z_list)                    # evaluation: z is mu
        assert all(not torch.equal(z, mean) for z, mean, _ in model.train()(batch)[1])  # training: z is sampled
    torch.manual_seed(0)
    z = SetVAE.sample(torch.full((20_000,), 2.0), torch.full((20_000,), -1.0))
    assert abs(z.mean() - 2) < 0.02 and abs(z.std() - np.exp(-0.5)) < 0.02


@pytest.mark.parametrize("full_training", [False, True])
def test_a_stay_alone_and_in_any_batch_gets_the_same_logits(full_training):
    model = build(SeqSetVAE, tiny(classification_only=not full_training, summaries=True, head_variables=7))
    stays = random_stays((5, 1, 12, 3, 7), valueless=.2)
    with torch.no_grad():
        together, turned = model(batch_of(stays)), model(batch_of(stays[::-1])).flip(0)
        alone = torch.cat([model(batch_of([stay])) for stay in stays])
    assert together.shape == (5, 1, 2)
    close(alone, together)
    close(turned, together)
    assert together.std(0).min() > 1e-3  # else equality says nothing


@pytest.mark.parametrize("valueless", [0.0, 0.3])
def test_a_sampled_question_of_a_stay_does_not_depend_on_its_batch(valueless):
    """More sets and variables than are asked for, more of the vocabulary than is named: in evaluation the same ones."""
    model = build(SeqSetVAEPretrain, tiny(asked_sets=3, asked_variables=2, other_variables=2))
    stays = random_stays((5, 1, 12, 3), valueless=valueless)
    with torch.no_grad():
        together = model(batch_of(stays), 0.5)
        alone = [model(batch_of([stay]), 0.5) for stay in stays]
    for name in ("loss", "measured", "history", "future", "set_measured"):
        close(together[name], torch.stack([losses[name] for losses in alone]).mean())


def test_sampled_questions_are_those_of_the_whole_on_average():
    stays = random_stays((9, 11))
    asked, whole = (build(SeqSetVAEPretrain, tiny(hide_sets=0.0, drop_events=0.0, sample_z=False, **some))
                    for some in (dict(asked_sets=4), {}))
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([asked.train()(batch_of(stays), 0.0)["history"] for _ in range(400)])
        all_sets = whole.train()(batch_of(stays), 0.0)["history"]
    assert draws.std() > 0 and abs(draws.mean() - all_sets) < 4 * draws.std() / 20


@pytest.mark.parametrize("mab_residual", [True, False])
def test_permuting_the_events_of_a_set_changes_nothing(mab_residual):
    model, stays = build(SeqSetVAEPretrain, tiny(mab_residual=mab_residual)), random_stays()
    for a, b in zip(encoded(model, stays),
                    encoded(model, [[(minute, events[::-1]) for minute, events in stay] for stay in stays])):
        close(a, b)


def test_a_duplicate_counts_because_a_set_is_a_multiset():
    model = build(SeqSetVAEPretrain, tiny())
    once, twice = ([[(0, [(0, 1.0)] * n + [(1, -2.0)])]] for n in (1, 2))
    assert (encoded(model, once)[0] - encoded(model, twice)[0]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# History: causal, aware of time, the same in evaluation and in training
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", ["values", "minutes", "appended"])
def test_the_future_never_reaches_the_past(change):
    model, (stay,) = build(SeqSetVAEPretrain, tiny()), random_stays((8,))
    minute, events = stay[-1]
    other = {"values": stay[:-1] + [(minute, [(v, x + 3) for v, x in events])],
             "minutes": stay[:-1] + [(minute + 700, events)], "appended": stay + random_stays((9,), seed=5)[0]}[change]
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
        for name, size in {"model.LONG_STAY": longest, "model.QUERY_BLOCK": 3,
                           "history_statistics.POINT_BLOCK": 3}.items():
            monkeypatch.setattr(name, size)
        batch, first = batch_of(random_stays()), model(batch_of(random_stays()), 1e-3)
        model.zero_grad()
        first["loss"].backward()
        with torch.no_grad():
            h = model.history(first["mu"], batch.minute)
        seen.append({"h": h, "loss": first["loss"]}
                    | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    close(*seen)
    assert "history.slope" in seen[0] and "history.tau" in seen[0]


def test_history_in_evaluation_equals_history_in_training_without_dropout():
    """The fast path of nn.TransformerEncoder misreads a float mask, in evaluation only: ours must have no such second
    path."""
    history = build(lambda config, _: History(config), tiny(dropout=0.0))
    z, minute = torch.randn(3, 9, 16), torch.rand(3, 9).mul(2000).sort(1).values
    with torch.no_grad():
        assert torch.equal(history.eval()(z, minute), history.train()(z, minute))


def test_history_layer_equals_torch_encoder_layer_with_the_same_weights():
    history = build(lambda config, _: History(config), tiny(dropout=0.0))
    theirs = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, activation="gelu", batch_first=True,
                                        norm_first=True).train()
    theirs.load_state_dict(history.layers[0].state_dict())
    x, bias = torch.randn(3, 9, 16), history.time_bias(torch.rand(3, 9).mul(2000).sort(1).values)
    close(history.layers[0](x, bias), theirs(x, src_mask=bias.flatten(0, 1)))


# ----------------------------------------------------------------------------------------------------------------------
# What trains and what stays frozen
# ----------------------------------------------------------------------------------------------------------------------

def without_gradient(model):
    return {name for name, p in model.named_parameters() if p.requires_grad
            and (p.grad is None or not p.grad.any() or not p.grad.isfinite().all())}


@pytest.mark.parametrize("objective", [dict(), dict(decoder="slots"),
                                       dict(decoder="slots", learned_seeds=False, mab_residual=False)],
                         ids=["readout", "learned seeds", "original"])
def test_gradients_reach_every_parameter_in_pretraining(objective):
    model = build(SeqSetVAEPretrain, tiny(hide_sets=0.3, **objective)).train()
    model(batch_of(random_stays()), 1e-3)["loss"].backward()
    assert without_gradient(model) == set()


@pytest.mark.parametrize("decoder", ["readout", "slots"])
def test_gradients_reach_every_parameter_in_full_training(decoder):
    # a seed with a living ReLU among the gate's 4
    model = build(SeqSetVAE, tiny(classification_only=False, decoder=decoder), seed=3).train()
    losses = model.losses(batch := batch_of(random_stays((4, 6, 9, 5))))
    (Binary().loss(losses["logits"], batch.answer, FinetuneConfig()) + losses["reconstruction"]
     + losses["kl"]).backward()
    assert without_gradient(model) == set()


def test_frozen_backbone_stays_in_evaluation_mode_and_only_the_head_trains():
    model = build(SeqSetVAE, tiny()).train()
    assert model.cls_head.training and not any(m.training for m in [*model.setvae.modules(), *model.history.modules()])
    assert all(p.requires_grad == name.startswith("cls_head.") for name, p in model.named_parameters())
    batch = batch_of(random_stays())
    Binary().loss(model(batch), batch.answer, FinetuneConfig()).backward()
    assert without_gradient(model) == set()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("cls_head."))


def test_frozen_finetuning_leaves_the_backbone_bit_equal(pretrained, finetuned):
    before, after = (torch.load(path, weights_only=True)["model"]
                     for path in (pretrained, finetuned.with_name("last.pt")))
    backbone = [name for name in before if name.startswith(SeqSetVAE.BACKBONE) and name != "mask_token"]
    assert set(before) - set(backbone) == {"mask_token"}
    assert all(torch.equal(before[name], after[name]) for name in backbone)


def test_cached_features_equal_uncached_ones(finetuned):
    checkpoint, cohort = train.open_checkpoint(finetuned)
    assert not checkpoint.is_new(cohort)
    model, dataset = checkpoint.classifier(), checkpoint.dataset(cohort)
    stays = stays_of(cohort, checkpoint.split["train"])
    points, config = labelled_points(cohort, stays), FinetuneConfig()
    cached = train.encode_points(model, dataset, points, CPU)
    model.train()
    with torch.no_grad():
        uncached = torch.cat([model.features(dataset[stays[i:i + 4]])[:, 0] for i in range(0, len(stays), 4)])
    close(uncached, cached)
    asked, weight = at_moments(cohort, points, np.ones(len(points)), config.moments, checkpoint.source["seed"])
    cached = train.encode_points(model, dataset.of(asked), np.arange(len(weight)), CPU)
    close(model.feature_mean, cached.mean(0))  # the standardisation knows the training stays alone
    close(model.feature_std, cached.std(0).clamp(min=1e-6))


def test_trainable_share_is_under_five_percent_at_default_size():
    settings = FinetuneConfig()
    model = SeqSetVAE(ModelConfig(44, features=settings.features, fuse=settings.fuse, summaries=settings.summaries,
                                  head_widths=settings.head_widths, head_variables=44),
                      torch.zeros(44, 64))
    total, trainable = (sum(p.numel() for p in model.parameters() if p.requires_grad or not t) for t in (False, True))
    assert 0 < trainable < 0.05 * total


@pytest.mark.parametrize("points", [200, MANY_POINTS + 1])
def test_the_trees_of_the_head_predict_what_scikit_learn_fitted(points):
    torch.manual_seed(0)
    x = torch.randn(300, 9).mul(4).round().div(4)  # ties at the thresholds
    label = ((x[:, 0] > 0.5) ^ (x[:, 3] < 0)).long()
    config = replace(FinetuneConfig(), trees=30, tree_features=1.0, tree_depth=3, tree_leaf=5)
    [classifier] = boosted_trees(config, points, seed=1)
    assert isinstance(classifier, HistGradientBoostingClassifier) == (points > MANY_POINTS)
    trees, weight = BoostedTrees(*tree_sizes(config, points).values()), torch.where(label == 0, 2.0, 1.0)
    trees.fit(x[:200], [label[:200].float()], weight[:200], [classifier])
    logits = Binary().tree_logits(trees(x)).double()
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], classifier.decision_function(x.numpy()), atol=1e-5)
    assert roc_auc_score(label[200:], logits[200:, 1]) > 0.9


@pytest.mark.parametrize("classification_only", [True, False])
def test_trees_may_ask_for_every_feature_and_for_no_other(classification_only):
    model = build(SeqSetVAE, tiny(classification_only=classification_only, summaries=True, head_variables=7,
                                  head_widths=(), head_trees=2))
    state, size = {name: x.clone() for name, x in model.state_dict().items()}, model.feature_sizes()["summaries"]
    state["trees.feature"][0, 0] = size - 1
    load_weights(model, state, "best.pt")
    assert model(batch_of(random_stays())).shape == (4, 1, 2)
    state["trees.feature"][0, 0] = size
    with pytest.raises(InputError, match="best.pt: its trees ask for features that the model does not have"):
        load_weights(model, state, "best.pt")


@pytest.mark.parametrize("decoder", ["readout", "slots"])
def test_validation_is_deterministic(decoder):
    model = build(SeqSetVAEPretrain, tiny(decoder=decoder)).train()  # evaluation itself must leave training mode
    dataset = StayDataset(cohort_of(random_stays()), PLAIN)
    first, second = (train.evaluate_pretraining(model, dataset, np.arange(4), CPU, torch.float32) for _ in range(2))
    assert first == second and np.isfinite(first["val_loss"])


# ----------------------------------------------------------------------------------------------------------------------
# Fusion, features, loss
# ----------------------------------------------------------------------------------------------------------------------

def test_fusion_without_parameters_equals_its_formula():
    model, (mu, logvar) = build(SeqSetVAE, tiny()), torch.randn(2, 3, 5, 16)
    m, std = mu.double().numpy(), np.exp(0.5 * logvar.double().numpy())
    w = 1 / (1 + np.exp(-(1 - std.mean(-1, keepdims=True))))
    close(model.fused(mu, logvar).double(),
          torch.from_numpy(w * m * (1 + 0.05 * np.tanh(std)) + (1 - w) * m))
    assert build(SeqSetVAE, tiny(fuse=False)).fused(mu, logvar) is mu


def test_gated_fusion_starts_near_mu():
    torch.manual_seed(0)
    model = SeqSetVAE(tiny(classification_only=False), torch.zeros(7, 12))
    mu, logvar = torch.randn(2, 50, 16)
    assert (model.fused(mu, logvar) - mu).norm() < 0.1 * mu.norm()


def test_focal_loss_equals_its_formula():
    logits, label = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 0, 1])
    p = np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum(1, keepdims=True)
    p = p[np.arange(6), label]
    expected = -np.where(label == 1, 0.25, 0.75) * (1 - p) ** 2 * np.log(p)  # Lin et al. 2017, eq. 5
    focal = FinetuneConfig(loss="focal", focal_alpha=0.25, focal_gamma=2.0)
    close(Binary().loss(logits, label[:, None].float(), focal).double(), torch.tensor(expected.mean()))


def test_every_hidden_layer_of_the_head_that_is_asked_for_is_built():
    head = build(SeqSetVAE, tiny(head_widths=(9, 8, 7, 6, 5))).cls_head
    assert [layer.out_features for layer in head if isinstance(layer, nn.Linear)] == [9, 8, 7, 6, 5, 2]
    assert [layer.p for layer in head if isinstance(layer, nn.Dropout)] == [.2, .2, .1, .1, .1]


@pytest.mark.parametrize("classification_only", [True, False])
def test_learned_features_and_summaries_have_priors_of_their_own(classification_only):
    model = build(SeqSetVAE, tiny(summaries=True, head_variables=5, head_widths=(),
                                  classification_only=classification_only))
    sizes = model.feature_sizes()
    torch.nn.init.ones_(model.cls_head[0].weight)
    penalty = head_penalty(model, FinetuneConfig(learned_prior=3., summaries_prior=7.), points=50)
    learned = sizes["plain"] + sizes["learned"]
    close(penalty, torch.tensor(.5 / 50 * 2 * (3 * learned + 7 * sizes["summaries"])))  # a row of weights a class


@pytest.mark.parametrize("features", ["stable", "multiscale"])
@pytest.mark.parametrize("decoder", ["readout", "slots"])
@pytest.mark.parametrize("summaries", [True, False])
def test_feature_sizes_agree_with_the_features(features, decoder, summaries):
    model = build(SeqSetVAE, tiny(features=features, decoder=decoder, summaries=summaries, head_variables=5))
    with torch.no_grad():
        features = model.features(batch_of(random_stays()))
    assert features.shape == (4, 1, sum(model.feature_sizes().values())) == (4, 1, model.cls_head[0].in_features)


def test_stable_features_are_the_last_state_and_attention_to_it():
    model, stays = build(SeqSetVAE, tiny()), random_stays()
    with torch.no_grad():
        features, h = model.features(batch_of(stays)), model.encode(batch_of(stays))[3]
    for stay, (feature,), states in zip(stays, features, h):
        states = states[:len(stay)]
        close(feature, 0.7 * states[-1] + 0.3 * (states @ states[-1]).softmax(0) @ states)


def test_summaries_are_the_exact_statistics_of_the_stay_up_to_the_point():
    model, stays = build(SeqSetVAE, tiny(summaries=True, head_variables=4)), random_stays(valueless=.2)
    listed = [5, 0, 2, 6]
    model.head_variables.copy_(torch.tensor(listed))
    asked = np.array([stay[-1][0] + 90. for stay in stays])
    cohort = with_points(cohort_of(stays), np.ones(4, dtype=int), asked, np.zeros(4))
    with torch.no_grad():
        # 10 statistics, whether it was seen and hours since, a variable each; hours since the last set
        exact = model.features(StayDataset(cohort, PLAIN, points=True)[np.arange(4)])[:, 0, -12 * 4 - 1:]
    for stay, row, minute in zip(stays, exact.double(), asked):
        statistics, exists = plain_statistics(stay)
        last = [max([m for m, events in stay if v in dict(events)], default=stay[0][0]) for v in listed]
        since = np.log1p((minute - np.array(last)) / 60)
        close(row, torch.from_numpy(np.concatenate([statistics[-1][:, listed].ravel(), exists[-1, 7, listed], since,
                                                    [1.5]])))


def all_statistics(stays):
    """The batch's statistics at every set, of every variable in the order of the vocabulary."""
    batch = batch_of(stays)
    column = batch.variables[batch.stay_variables]
    column[torch.arange(column.shape[1]) >= batch.variable_counts[:, None]] = 7
    slots = torch.arange(batch.minute.shape[1]).expand(len(stays), -1)
    return statistics_at(batch, torch.where(slots < batch.lengths[:, None], slots, slots.shape[1]), column, 7)


@pytest.mark.parametrize("valueless", [0.0, 0.4])
def test_statistics_of_history_and_future_equal_a_plain_loop(valueless):
    stays = random_stays((1, 7, 12), valueless=valueless)
    mine = all_statistics(stays)
    for p, stay in enumerate(stays):
        for ours, exists, (plain, there) in ((mine.past, mine.past_exists, plain_statistics(stay)),
                                             (mine.future, mine.future_exists, plain_future(stay))):
            close(ours[p, :len(stay)].double(), torch.from_numpy(plain))
            assert np.array_equal(exists[p, :len(stay)], there)


def test_statistics_at_some_sets_are_those_of_all_sets():
    stays = random_stays((1, 7, 12, 9), valueless=.2)
    batch, everywhere = batch_of(stays), all_statistics(stays)
    slots = torch.tensor([[0, 12, 12], [2, 5, 5], [0, 7, 11], [8, 12, 12]])  # a set twice, and padding
    column = batch.variables[batch.stay_variables]
    padded = torch.arange(column.shape[1]) >= batch.variable_counts[:, None]
    some = torch.where(column < 3, column, 3).masked_fill(padded, 3)
    for ours, whole in zip(statistics_at(batch, slots, some, 3), everywhere):
        for p, q in itertools.product(range(4), range(3)):
            if slots[p, q] < 12:
                close(ours[p, q], whole[p, slots[p, q], :, :3])


def test_adding_a_constant_to_all_minutes_of_a_stay_changes_nothing():
    model = build(SeqSetVAE, tiny(summaries=True, head_variables=7, features="multiscale"))
    (stay,) = random_stays((12,))
    shifted = [(minute + 40 * 365.25 * 1440, events) for minute, events in stay]
    with torch.no_grad():
        assert torch.equal(model.features(batch_of([stay])), model.features(batch_of([shifted])))


def test_an_event_decades_earlier_leaves_the_statistics_of_the_others_alone():
    (stay,) = random_stays((12,))
    stay = [(minute, [(v % 6, x) for v, x in events]) for minute, events in stay]
    born = [(-60 * 365.25 * 1440, [(6, 1.0)]), *stay]
    close(all_statistics([born]).past[0, 1:13, :, :6], all_statistics([stay]).past[0, :12, :, :6])


def test_statistics_of_a_nearly_constant_variable_are_exact():
    """Running sums of squares lose what a long stay far from zero varies by: E[x^2] - E[x]^2 cancels in float32."""
    stay = [(60 * i, [(0, 4.9 if i % 40 else 4.8)]) for i in range(120)]
    statistics = all_statistics([stay]).past
    close(statistics[0, :120].double(), torch.from_numpy(plain_statistics(stay)[0]))


# ----------------------------------------------------------------------------------------------------------------------
# At the bedside
# ----------------------------------------------------------------------------------------------------------------------


def test_the_trees_have_the_share_that_fits_the_validation_points_best():
    model = build(SeqSetVAE, tiny(summaries=True, head_variables=7, head_widths=(), head_trees=1, tree_depth=1))
    torch.manual_seed(0)
    features, first = torch.randn(400, model.cls_head[0].in_features), model.feature_sizes()["learned"]
    model.trees.feature.zero_(), model.trees.threshold.zero_(), model.trees.prior.zero_()
    model.trees.value.copy_(torch.tensor([[-3., 3.]]))                       # by the first of the summaries
    for name, right, share in (("trees", first, 1), ("neither", None, 0.)):
        label = (features[:, right] > 0).long() if right else torch.randint(2, (400,))
        model.cls_head[0].weight.data.zero_(), model.cls_head[0].bias.data.zero_()
        fit_to_validation(model, features, label[:, None].numpy())
        assert model.trees_share == share, name
    fit_to_validation(model, features[:12], np.arange(12)[:, None] // 9)                 # too few to tell
    assert model.trees_share == .5


@pytest.mark.parametrize("events", [1, 2])
@pytest.mark.parametrize("config", [
    tiny(), tiny(decoder="slots"), tiny(decoder="slots", mab_residual=False, learned_seeds=False)],
                         ids=["ours", "slots", "original"])
def test_every_parameter_has_a_gradient_where_attention_has_one_key(config, events):
    """DistributedDataParallel waits for each: of stays of one set, and of sets of one event."""
    batch = batch_of([[(60, [(v, 1.0) for v in range(events)])] for _ in range(3)])
    pretraining = build(SeqSetVAEPretrain, config).train()
    pretraining(batch, 0.1)["loss"].backward()
    full = build(SeqSetVAE, replace(config, classification_only=False)).train()
    losses = full(batch, losses=True)
    (losses["logits"].sum() + losses["reconstruction"] + losses["kl"]).backward()
    for model in (pretraining, full):
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert pretraining.history.slope.grad.eq(0).all() and pretraining.history.tau.grad == 0


def test_the_loss_of_measured_or_not_is_float32_under_autocast():
    setvae, batch = build(SetVAE, tiny()), batch_of(random_stays())
    question = setvae.ask(batch)
    setvae.decoder.measured = nn.Identity()  # bf16 itself
    code = torch.randn(*batch.minute.shape, question.own_keys.shape[-1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = setvae._measured_loss(code, question)
    assert torch.equal(low, setvae._measured_loss(code, question))


def test_the_losses_of_history_and_future_are_float32_under_autocast():
    model, batch = build(SeqSetVAEPretrain, tiny()), batch_of(random_stays())
    question, readout = model.setvae.ask(batch), model.history_readout
    told = torch.randn(*question.slots.shape, readout.out_features)
    readout.forward = lambda h: told  # else bf16 itself
    h = torch.randn(*batch.minute.shape, readout.in_features)
    exact = statistics_at(batch, question.slots, question.column, question.held.shape[1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = readout.losses(h, question, exact)
    full = readout.losses(h, question, exact)
    assert low.keys() == {"history", "future"} and all(torch.equal(low[name], full[name]) for name in low)

