"""Tests of data.py: how a cohort is built, split, normalised and batched, and that a batch forgets no event."""

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import runs
import train
from batches import (Normalizer, StayDataset, StaySizes, epoch_batches, group_widths, round_up,
                     sorted_batches, split_batch, variable_vectors)
from data import Cohort, InputError, build_cohort, make_splits, ranges, stays_of, subjects_of
from finetune_config import FinetuneConfig
from model import SeqSetVAE, SeqSetVAEPretrain
from questions import at_end, at_every_set, at_hours, at_moments, labelled_points, with_points
from readers import load_cohort, synthetic_cohort, synthetic_parts
from tasks import Binary
from tests.plain_loop import close, plain_grid
from tests.tiny import NAMES, PLAIN, PRETRAIN, as_lists, batch_of, build, cohort_of, random_stays, tiny
from train import clip_and_step

# ----------------------------------------------------------------------------------------------------------------------
# Batches: nothing forgotten, nothing twice, padding never counts
# ----------------------------------------------------------------------------------------------------------------------


def test_measurements_equal_a_plain_loop():
    stays = random_stays(valueless=.3)
    batch = batch_of(stays)
    length, width = batch.minute.shape[1], batch.stay_variables.shape[1]
    measured = {}
    for slot, pair, value, day, valued, count in zip(*(getattr(batch, f"cell_{name}").tolist() for name in (
            "slot", "pair", "value", "day", "valued", "count"))):
        stay, position = divmod(slot, length)
        variable = int(batch.variables[batch.stay_variables.flatten()[pair]])
        assert pair // width == stay and (stay, position, variable) not in measured
        measured[stay, position, variable] = value, day * 1440, valued, count, float(batch.first_value.flatten()[pair])
    for p, stay in enumerate(stays):
        first = {}  # minute and value of each variable's first value
        for i, (minute, events) in enumerate(stay):
            for v, (mean, count, numbers) in enumerate(zip(*plain_grid(events))):
                if numbers:
                    first.setdefault(v, (minute, mean))
                if count:
                    value, since, valued, number, origin = measured.pop((p, i, v))
                    assert (valued, number) == (numbers > 0, count) and abs(value - mean) < 1e-6
                    assert not valued or abs(since - (minute - first[v][0])) < 1e-3 and abs(origin - first[v][1]) < 1e-6
    assert not measured


def test_the_label_of_a_stays_one_point_is_asked_for_at_every_set_before_it_too():
    events = [(0, 1.)]
    cohort = cohort_of([[(0, events), (60, events), (180, events), (300, events)], [(5, events)], [(7, events)]])
    cohort = with_points(cohort, np.array([1, 1, 1]), np.array([240., 5., 7.]), np.array([1, 0, np.nan]))
    asked, weight = at_every_set(cohort, np.arange(2), np.array([1., 2.]), .6)
    assert asked.point_start.tolist() == [0, 3, 4, 4] and asked.label.tolist() == [1, 1, 1, 0]
    assert asked.point_minute.tolist() == [0, 60, 240, 5]
    np.testing.assert_allclose(weight, [0, .6, .4, 2])  # in proportion to the time; what has no other has all
    batch = StayDataset(cohort, PLAIN, points=True).of(asked, weight)[np.arange(2)]
    assert batch.point_slot[0, :3].tolist() == [0, 1, 2] and batch.weight.sum(1).tolist() == pytest.approx([1, 2])


def test_a_stays_one_question_is_asked_at_random_earlier_moments_too():
    """Which share its weight, lie after hour 3 and the first set, and before the question; labels that have times
    of their own have none, and without moments all is as it was."""
    sets = [(60 * m, [(0, 1.)]) for m in range(49)]
    cohort = at_end(cohort_of([sets, sets[:3], sets[40:], [(-60, [(0, 1.)]), *sets]]), [1, 0, 1, np.nan])
    points, weight = labelled_points(cohort, np.arange(4)), np.array([1, 1, 2.5], np.float32)
    asked, shares = at_moments(cohort, points, weight, 4, seed=0)
    assert asked.point_start.tolist() == [0, 5, 6, 11, 11] and shares.dtype == np.float32
    np.testing.assert_allclose(shares, [*[.25] * 4, 1, 1, *[.625] * 4, 2.5])
    assert asked.answers[:, 0].tolist() == [*[1] * 5, 0, *[1] * 5]
    for rows, low in ((slice(0, 5), 180), (slice(6, 11), 2400)):
        minute = asked.point_minute[rows]
        assert minute[-1] == 2880 and (np.diff(minute) > 0).all() and minute[0] >= low
    again, other = (at_moments(cohort, points, weight, 4, seed=seed)[0].point_minute for seed in (0, 1))
    assert again.tolist() == asked.point_minute.tolist() != other.tolist()
    at_six, _ = at_moments(at_hours(cohort, 6), points, weight, 1, seed=0)
    assert at_six.point_minute[1:].tolist() == [360, 120, 360] and 180 <= at_six.point_minute[0] < 360
    timed = with_points(cohort, np.array([1, 0, 2, 0]), np.array([2880, 2500, 2880]), np.ones(3))
    for own, moments, points in ((cohort, 0, points), (timed, 3, np.arange(3))):
        asked, shares = at_moments(own, points, weight, moments, seed=0)
        assert asked.point_minute.tolist() == own.point_minute[points].tolist() and shares.tolist() == weight.tolist()


def test_hours_count_from_the_first_set_whatever_they_were_before():
    cohort = at_end(cohort_of([[(0, [(0, 1.)]), (600, [(0, 1.)])], [(0, [(0, 1.)]), (60, [(0, 1.)])]]))
    assert at_hours(at_hours(cohort, 2), 5).point_minute.tolist() == [300, 60]
    assert at_hours(with_points(cohort, np.ones(2, dtype=int), np.array([120, 60])), 5) is None


def test_a_record_that_ends_before_the_hour_is_asked_with_all_events_of_its_last_minute():
    """Known to the microsecond: events 20 and 40 seconds after minutes 0, 60 and 120."""
    minute = np.repeat([0, 60, 120], 2)
    cohort = build_cohort("fine", ["a", "b"], 0 * minute, minute, np.arange(6) % 2, np.arange(6.), ["x"], [1],
                          offset=np.tile([20, 40], 3) * 1_000_000)
    end = at_end(cohort, [1])
    for hours, events, minute in ((1, 2, 60), (1 + .5 / 60, 3, 60.5), (2 + .5 / 60, 5, 120.5), (2 + .7 / 60, 6, 120),
                                  (3, 6, 120)):
        asked = at_hours(end, hours)
        sets = np.searchsorted(asked.set_minute, asked.point_minute[0], side="right")
        assert (asked.set_start[sets], asked.point_minute[0]) == (events, minute), hours


def test_a_point_sees_the_last_set_not_after_it_and_a_stay_ends_with_its_last_point():
    cohort = cohort_of([[(m, [(0, 1.0), (1, m)]) for m in (0, 10, 20, 30)], [(m, [(2, 1.0)]) for m in (5, 6)],
                        [(7, [(3, 0.0)])]])
    cohort = replace(cohort, point_start=np.array([0, 3, 6, 6]), point_minute=np.array([-1, 10, 25.5, 5, 5.5, 9]),
                     answers=np.array([[0], [0], [1], [np.nan], [0], [1]], dtype=np.float32))
    dataset = StayDataset(cohort, PLAIN, points=True)
    assert [x.tolist() for x in dataset.sizes(np.arange(3))] == [[3, 2, 0], [6, 2, 0], [2, 3, 0]]
    batch = dataset[np.array([1, 0])]
    assert batch.lengths.tolist() == [2, 3] and batch.minute[:, :3].tolist() == [[5, 6, 0], [0, 10, 20]]
    assert batch.point.tolist() == [[3, 4, 5], [1, 2, -1]] and batch.weight.tolist() == [[0, 1, 1], [1, 1, 0]]
    np.testing.assert_array_equal(batch.answer[..., 0], [[np.nan, 0, 1], [0, 1, np.nan]])
    assert batch.point_slot.tolist() == [[0, 0, 1], [1, 2, 0]]
    close(batch.point_hours, torch.tensor([[0, .5 / 60, 3 / 60], [0, 5.5 / 60, 0]]))
    assert len(batch.event_value) == 8 and batch.variables[:3].tolist() == [0, 1, 2]
    whole = StayDataset(cohort, PLAIN)
    assert whole[np.array([1, 0])].lengths.tolist() == [2, 4] and whole[np.array([0])].point.shape == (1, 0)


def test_no_event_and_no_set_is_forgotten():
    cohort = synthetic_cohort(24)
    dataset, events, sets = StayDataset(cohort, Normalizer.fit(cohort, np.arange(24))), 0, 0
    for stays in epoch_batches(np.diff(cohort.stay_start), 5, seed=0, epoch=0):
        batch = dataset[stays]
        cells = batch.token_event[batch.token_event < len(batch.event_value)]
        # every event in exactly one cell
        assert cells.sort().values.tolist() == list(range(len(batch.event_value)))
        slots = batch.slot_set[batch.slot_set < len(batch.group_slot)]
        assert sorted(slots.tolist()) == list(range(int(batch.lengths.sum())))
        assert batch.cell_count.sum() == len(batch.event_value) == cohort.stay_events[stays].sum()
        events, sets = events + len(batch.event_value), sets + int(batch.lengths.sum())
    assert events == len(cohort.event_value) and sets == len(cohort.set_minute)


@pytest.mark.parametrize("batches", [lambda sizes: epoch_batches(sizes.sets, 8, seed=1, epoch=2), sorted_batches],
                         ids=["epoch", "sorted"])
def test_every_stay_is_visited_once(batches):
    cohort = cohort_of(random_stays(np.random.default_rng(0).integers(1, 90, 297)))
    visited = batches(StayDataset(cohort, PLAIN, points=True).sizes(np.arange(297)))
    assert sorted(np.concatenate(visited)) == list(range(297))


@pytest.mark.parametrize("limit, most", [("_MOST_SETS_SQUARED", 6 * 9**2), ("_MOST_EVENTS", 270), ("_MOST_POINTS", 7)])
def test_evaluation_batches_are_bounded_by_their_cost(monkeypatch, limit, most):
    cohort = cohort_of(random_stays((9,) * 20 + (90, 80)))
    monkeypatch.setattr(f"batches.{limit}", most)
    batches = sorted_batches(StayDataset(cohort, PLAIN, points=True).sizes(np.arange(22)))
    cost = {"_MOST_SETS_SQUARED": lambda b: len(b) * max(np.diff(cohort.stay_start)[b])**2, "_MOST_POINTS": len,
            "_MOST_EVENTS": lambda b: cohort.stay_events[b].sum()}[limit]
    assert np.concatenate(batches).tolist() == [*range(20), 21, 20] and 3 <= len(batches) <= 8
    assert all(cost(b) <= most or len(b) == 1 for b in batches)
    assert all(cost(np.append(b, after[0])) > most for b, after in zip(batches, batches[1:]))  # as large as fits


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_batch_that_does_not_fit_is_split_into_equal_numbers_of_parts(parts):
    sizes = StaySizes(sets=np.r_[np.full(70, 50), 20_000, 3_000], events=np.r_[np.full(70, 400), 90_000, 9_000],
                      points=np.zeros(72, dtype=np.int64))
    batches = epoch_batches(sizes.sets, 16, seed=0, epoch=0)
    assert [len(b) for b in batches].count(16) == 4 and sorted(np.concatenate(batches)) == list(range(72))
    for batch in batches:
        lists = split_batch(sizes, batch, parts)
        assert len(lists) % parts == 0 and sorted(np.concatenate(lists)) == sorted(batch) and all(map(sizes.fit, lists))
        assert len(lists) == parts or not {70, 71}.isdisjoint(batch)
        assert [70] in [part.tolist() for part in lists] or 70 not in batch


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
        seen.append({name: x for name, x in losses.items() if name != "mu"}
                    | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(batch_of(stays, 1).groups) != len(batch_of(stays, 6).groups)
    close(*seen)


@pytest.mark.parametrize("decoder", ["readout", "slots"])
@pytest.mark.parametrize("mode", ["pretrain", "full training"])
def test_a_training_step_asks_the_device_for_no_value(mode, decoder):
    """Tensors of the meta device have no values: `.item()`, a boolean index or a shape that depends on data fails
    there."""
    config, batch = tiny(decoder=decoder, classification_only=False, hide_sets=.1), batch_of(random_stays()).to("meta")
    if mode == "pretrain":
        model = build(SeqSetVAEPretrain, config).to("meta").train()
        loss = model(batch, 1e-2)["loss"]
    else:
        model = build(SeqSetVAE, config).to("meta").train()
        losses = model(batch, losses=True)
        loss = losses["reconstruction"] + Binary().loss(losses["logits"], batch.answer, FinetuneConfig())
    loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    norm = clip_and_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 1.0)
    assert norm.device.type == "meta"


def test_padding_between_sets_of_one_stay_is_under_fifteen_percent():
    cohort = synthetic_cohort(200)
    dataset = StayDataset(cohort, Normalizer.fit(cohort, np.arange(200)))
    batches = epoch_batches(np.diff(cohort.stay_start), 8, 0, 0)
    cells = sum(len(dataset[stays].token_event) for stays in batches)
    assert 1 < cells / len(cohort.event_value) < 1.15


@pytest.mark.parametrize("groups", [1, 2, 3, 9])
def test_group_widths_are_optimal(groups):
    rng = np.random.default_rng(groups)
    for _ in range(20):
        sizes = rng.integers(1, 12, rng.integers(1, 15))
        cost = lambda bounds: sum(min(b for b in bounds if b >= s) for s in sizes)
        best = min(cost((*some, sizes.max())) for k in range(groups)
                   for some in itertools.combinations(np.unique(sizes), k))
        widths = group_widths(*np.unique(sizes, return_counts=True), groups)
        assert len(widths) <= groups and cost(widths) == best


def test_round_up_is_tight_and_leaves_few_sizes():
    rounded = [round_up(n) for n in range(1, 5000)]
    assert all(n <= r <= 1.125 * n + 1e-9 for n, r in enumerate(rounded, start=1)) and rounded == sorted(rounded)
    assert all(len({r for r in rounded if low < r <= 2 * low}) <= 8 for low in (16, 64, 1024))
    assert [round_up(r) for r in rounded] == rounded


def test_ranges_concatenate():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], int), np.array([], int)).tolist() == []


# ----------------------------------------------------------------------------------------------------------------------
# Data: cohorts, splits, normalisation, the cache
# ----------------------------------------------------------------------------------------------------------------------


def test_cohort_sorts_events_into_sets():
    # stay 1 has none
    events = [(2, 30, 1, 5.0), (0, 9, 2, 1.0), (2, 30, 0, 6.0), (0, 3, 2, 2.0), (2, 30, 1, 5.0), (0, 9, 1, 3.0)]
    cohort = build_cohort("handmade", ["z", "b", "a", "never"], *map(np.array, zip(*events)), stay_id=["p", "q", "r"],
                          answers=[1, 0, np.nan])
    assert as_lists(cohort) == {"p": [(3, [("a", 2)]), (9, [("a", 1), ("b", 3)])],
                                "r": [(30, [("b", 5), ("z", 6), ("b", 5)])]}
    assert cohort.variables == ["a", "b", "z"] and cohort.label.tolist() == [1, -1]
    assert cohort.notes["stays without a usable event"] == 1


def test_a_stay_id_that_occurs_twice_is_refused():
    with pytest.raises(InputError, match="stay p occurs more than once"):
        build_cohort("x", ["a"], np.array([0, 1]), np.array([0, 0]), np.array([0, 0]), np.array([1, 1]),
                     stay_id=["p", "p"], answers=[0, 0])


def test_normalizer_is_fitted_on_training_stays_only():
    cohort, training = synthetic_cohort(24), np.arange(12)
    trained = np.arange(len(cohort.event_value)) < cohort.set_start[cohort.stay_start[12]]
    changed = replace(cohort, event_value=np.where(trained, cohort.event_value, 1e6).astype(np.float32))
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


@pytest.mark.parametrize("share", [.03, .2])
def test_a_sentinel_leaves_scale_and_latents_as_they_are(tmp_path, capsys, monkeypatch, small_models, share):
    clean, rng = synthetic_cohort(60), np.random.default_rng(0)
    dirty = replace(clean, event_value=np.where(rng.random(len(clean.event_value)) < share, np.float32(9999999),
                                                clean.event_value))
    a, b = (Normalizer.fit(cohort, np.arange(60)) for cohort in (clean, dirty))
    common = np.bincount(clean.event_variable, minlength=len(clean.variables)) > 200
    common[clean.variables.index("Gender")] = False
    v, x = (array[common[clean.event_variable]] for array in (clean.event_variable, clean.event_value))
    assert common.sum() > 10 and abs(a(v, x) - b(v, x)).mean() < .1
    hits = ((dirty.event_value == 9999999) & (clean.event_variable == clean.variables.index("HR"))).sum()
    assert f"HR: {hits} values, most often 1e+07" in b.describe(most=99)
    monkeypatch.setattr(runs, "load_cohort", lambda **_: dirty)
    assert train.main([*PRETRAIN, "--run_dir", str(tmp_path / "run")]) == 0
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["active_units"].min() > 0


def test_a_constant_variable_stays_visible():
    normalizer = Normalizer.fit(cohort_of([[(0, [(0, 1.0)])], [(0, [(0, 1.0)])]]), np.arange(2))
    assert normalizer(np.array([0]), np.array([1.0])) == 1


def test_splits_are_seeded_stratified_disjoint_and_complete():
    cohort = synthetic_cohort(300)
    split = make_splits(cohort, 0)
    assert sorted(sum(split.values(), [])) == sorted(cohort.stay_id)
    assert [len(split[s]) for s in ("train", "valid", "test")] == [192, 48, 60]
    rates = [cohort.label[stays_of(cohort, ids)].mean() for ids in split.values()]
    assert max(rates) - min(rates) < 0.02
    assert make_splits(cohort, 0) == split != make_splits(cohort, 1)


def test_the_data_sets_own_split_is_kept():
    cohort = replace(cohort_of(random_stays()), split=np.array([2, 0, 1, 0], dtype=np.int8))
    assert make_splits(cohort, 0) == {"train": ["stay1", "stay3"], "valid": ["stay2"], "test": ["stay0"]}


def stays_with(label, subject=None, split=None):
    """A cohort of one event a stay."""
    n = len(label)
    return build_cohort("x", ["a"], np.arange(n), np.zeros(n), np.zeros(n, int), np.ones(n), np.arange(n), label, split,
                        subject=subject)


def divided(cohort, split) -> set:
    """The subjects with stays in two parts."""
    parts = [set(subjects) for subjects in subjects_of(cohort, split).values()]
    return set.union(*(a & b for a, b in itertools.combinations(parts, 2)))


def test_the_stays_of_a_subject_stay_in_one_part():
    label = np.random.default_rng(0).random(300) < .2
    cohort = stays_with(label, subject=[f"s{i // 3}" for i in range(300)])
    split = make_splits(cohort, 0)
    assert sorted(sum(split.values(), [])) == sorted(cohort.stay_id)
    assert [len(x) for x in split.values()] == [192, 48, 60]
    assert not divided(cohort, split) and not divided(cohort, make_splits(cohort, 1))
    rates = [cohort.stay_label[stays_of(cohort, ids)].mean() for ids in split.values()]
    assert max(rates) - min(rates) < .1
    given = replace(cohort, split=(np.arange(300) // 4 % 3).astype(np.int8))
    with pytest.raises(InputError, match=r"x: the split puts the stays of 50 patients into two parts \(s1, "):
        make_splits(given, 0)


@pytest.mark.parametrize("label, positive", [
    ([1] + [0] * 59, [1, 0, 0]), ([0] * 57 + [1, 1, np.nan], [1, 1, 0]), ([1, 1, 1, 0, 0, 0], [1, 1, 1]),
    ([1, 0, 0], [1, 0, 0]), ([np.nan] + [1, 0] * 10, None)])
def test_a_split_that_cannot_be_stratified_is_drawn_all_the_same(label, positive):
    for seed in range(20):
        split = make_splits(stays_with(label), seed)
        parts = [stays_of(stays_with(label), ids) for ids in split.values()]
        assert sorted(np.concatenate(parts)) == list(range(len(label))) and all(map(len, parts))
        found = [(np.array(label)[part] == 1).sum() for part in parts]
        assert found == positive if positive else min(found) > 0
        assert make_splits(stays_with(label), seed) == split


def test_two_stays_cannot_be_split():
    with pytest.raises(InputError, match="x: 2 stays or patients cannot be split into train, valid and test"):
        make_splits(stays_with([0, 1]), 0)


def test_valid_is_drawn_from_train_where_the_split_names_none():
    split = np.repeat([0, 2, -1], [50, 20, 5])
    cohort = stays_with(np.arange(75) % 5 == 0, subject=np.arange(75) // 2, split=split)
    parts = make_splits(cohort, 0)
    assert [len(ids) for ids in parts.values()] == [40, 10, 20] and not divided(cohort, parts)
    assert sorted(parts["train"] + parts["valid"], key=int) == cohort.stay_id[:50].tolist()
    assert parts != make_splits(cohort, 1)


def test_synthetic_cohort_is_deterministic():
    a, b = synthetic_cohort(24), synthetic_cohort(24)
    for name in Cohort.ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))  # NaN (no given statistics) equals NaN
    assert a.fingerprint == b.fingerprint
    assert synthetic_cohort(24, seed=1).fingerprint != a.fingerprint and len(a) == 24 and set(a.label) == {0, 1}


def test_a_large_synthetic_cohort_is_cached_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr("data._SYNTHETIC_BLOCK", 25)
    parts, cached = list(synthetic_parts(60)), load_cohort(None, 60, cache_dir=tmp_path)
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
    dataset = StayDataset(cohort_of(stays),
                          Normalizer(NAMES[:5], *np.array([[0] * 5, [1] * 5, [0] * 5], dtype=np.float32)))
    batch, model = dataset[np.arange(4)], build(SeqSetVAEPretrain, tiny(num_variables=5))
    names = [NAMES[v] for stay in stays for _, events in stay for v, _ in events]
    dropped = sorted(NAMES[5:], key=lambda name: -names.count(name))
    share = 1 - sum(map(names.count, dropped)) / len(names)
    assert dataset.describe_known() == (
        f"data: {share:.1%} of the events are of variables that the checkpoint knows\ndata: dropped: the events of 2 "
        "variables unknown to the checkpoint: "
        + ", ".join(f"{name} ({names.count(name)} events)" for name in dropped))
    assert dataset.unknown_variables == NAMES[5:] and len(batch.event_value) == sum(len(e) for s in known for _, e in s)
    with torch.no_grad():
        assert all(x.isfinite().all() for x in model(batch, 1.0).values())
