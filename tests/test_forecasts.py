"""Queries: what a variable will show at a later minute."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import predictor
import train
from batches import Normalizer, StayDataset, variable_vectors
from checkpoint import Checkpoint
from data import SPLITS, InputError, build_cohort, synthetic_cohort
from history_statistics import draw_queries
from model import SeqSetVAE, SeqSetVAEPretrain
from predictor import Predictor, forecast_at
from readouts import FREEDOM, student_nll
from report import odd_values
from settings import ModelConfig
from tests.plain_loop import close, plain_grid, plain_keys, plain_pass, plain_statistics
from test_suite import main
from tests.test_readers import at, meds, meds_folder  # noqa: F401 (a fixture)
from tests.tiny import (EVENTS, FINETUNE, NAMES, PLAIN, PRETRAIN, as_lists, batch_of, build, cohort_of, make_small,
                        one_error_line, random_stays, tiny, write, write_physionet)


def drawn(model, batch, sample=False, number=40):
    question = model.setvae.ask(batch)
    return question, draw_queries(batch, question, number, sample)


@pytest.mark.parametrize("sample", [False, True])
def test_a_query_asks_for_a_later_measurement_of_its_stay(sample):
    stays = random_stays((1, 4, 9, 6), valueless=0.2)
    batch, model = batch_of(stays), build(SeqSetVAEPretrain, tiny(queries=40))
    torch.manual_seed(0)
    question, queries = drawn(model, batch, sample)
    assert not queries.real[0].any() and queries.real[1:].float().mean() > 0.3  # one set has no later one
    own = batch.variables[batch.stay_variables]
    for b, r in queries.real.nonzero().tolist():
        origin = question.slots[b, queries.origin[b, r]].item()
        variable = own[b][question.column[b] == queries.column[b, r]].item()
        wanted = stays[b][origin][0] + 60 * queries.hours[b, r].item()
        later = {minute: plain_grid(events) for minute, events in stays[b][origin + 1:]}
        minute = min(later, key=lambda m: abs(m - wanted))
        means, _, numbers = later[minute]
        assert abs(minute - wanted) < 1e-2 and numbers[variable]
        assert abs(means[variable] - queries.value[b, r].item()) < 1e-6


def test_random_queries_are_spread_over_variables_origins_and_measurements():
    batch, model = batch_of(random_stays((12,))), build(SeqSetVAEPretrain, tiny(queries=4000))
    torch.manual_seed(0)
    _, queries = drawn(model, batch, True, 4000)
    counts = torch.bincount(queries.column[0], minlength=7)
    assert (counts.float() / 4000 - 1 / 7).abs().max() < 0.03
    assert queries.origin[queries.real].unique().tolist() == list(range(11))


def test_the_negative_log_likelihood_is_that_of_a_student_t():
    x, location, log_scale = torch.randn(3, 50)
    true = -torch.distributions.StudentT(FREEDOM, location, log_scale.exp()).log_prob(x)
    close(student_nll(x, location, log_scale), true)


def test_the_loss_of_queries_is_that_of_a_plain_loop():
    stays = random_stays((5, 9), valueless=0.2)
    batch, model = batch_of(stays), build(SeqSetVAEPretrain, tiny(queries=40))
    readout, keys = model.query_readout, plain_keys(model.setvae)
    question, queries = drawn(model, batch)
    own = batch.variables[batch.stay_variables]
    with torch.no_grad():
        states, _ = plain_pass(model, stays)
        total = []
        for b, stay in enumerate(stays):
            past, exists = plain_statistics(stay)
            losses = []
            for r in queries.real[b].nonzero().flatten().tolist():
                v = own[b][question.column[b] == queries.column[b, r]].item()
                i = queries.origin[b, r].item()  # all sets are asked: the place is the position
                seen = [minute for minute, events in stay[:i + 1] if any(u == v for u, _ in events)]
                since, elapsed = (stay[i][0] - (seen[-1] if seen else stay[0][0])) / 60, (stay[i][0] - stay[0][0]) / 60
                hours = queries.hours[b, r].item()
                told = [*past[i, :, v], exists[i, 7, v], exists[i, 0, v], *map(math.log1p, (hours, since, since + hours)),
                        hours / 24, math.log1p(elapsed), 0, 0]  # no clock
                gain, shift = readout.key(keys[v]).split(256)
                hidden = F.gelu((1 + gain) * (readout.state(states[b][2][i]) + readout.known(torch.tensor(told).float()))
                                + shift)
                location, log_scale, offset, gate = readout.out(F.gelu(readout.hidden(hidden))).view(4, -1) @ keys[v]
                location = location + torch.lerp(*torch.tensor(past[i, [2, 0], v]).float(), gate.sigmoid())
                value = queries.value[b, r]
                losses.append(student_nll(value, location, log_scale.clamp(-5, 3))
                              + (value - location - offset).square() / 2)
            total.append(torch.stack(losses).mean())
        close(model(batch, 0.0)["queries"], model.config.query_weight * torch.stack(total).mean())


def test_queries_of_a_stay_do_not_depend_on_its_batch():
    model, stays = build(SeqSetVAEPretrain, tiny(queries=16, asked_sets=4)), random_stays((5, 3, 12))
    with torch.no_grad():
        alone = torch.stack([model(batch_of([stay]), 0.0)["queries"] for stay in stays])
        close(model(batch_of(stays), 0.0)["queries"], alone.mean())


def test_every_weight_of_the_read_out_and_the_history_learn_from_queries():
    model = build(SeqSetVAEPretrain, tiny(queries=16)).train()
    model(batch_of(random_stays()), 0.0)["queries"].backward()
    named = dict(model.named_parameters())
    learns = [name for name, p in named.items() if p.grad is not None and p.grad.abs().max() > 0]
    assert {name for name in named if name.startswith(("query_readout.", "history."))} <= {*learns}


def test_the_hour_of_the_day_counts_where_the_record_has_a_clock():
    model, cohort = build(SeqSetVAEPretrain, tiny(queries=16)), cohort_of(random_stays())
    losses = []
    for clock in ("NaT", "2021-05-04T03:00", "2099-01-02T03:00", "2021-05-04T15:00"):
        origin = np.full(len(cohort), clock, "datetime64[us]")
        batch = StayDataset(replace(cohort, origin=origin), PLAIN)[np.arange(len(cohort))]
        with torch.no_grad():
            losses.append(model(batch, 0.0)["queries"].item())
    assert losses[1] == losses[2] and len({*losses}) == 3  # the hour counts, not the date


def test_a_normalizer_keeps_the_range_of_its_values():
    cohort = cohort_of([[(0, [(0, 3.0), (1, float("nan"))]), (5, [(0, 7.0), (2, 1.0)]), (6, [(2, 1.0)])]])
    normalizer = Normalizer.fit(cohort, np.arange(1))
    assert [*normalizer.low[[0, 2]], *normalizer.high[[0, 2]]] == [3, 1, 7, 1]
    assert normalizer.low[1] > normalizer.high[1]  # it has no number
    state = normalizer.state_dict()
    again = Normalizer.from_state(state, "path")
    assert np.array_equal(again.low, normalizer.low) and again.clip == normalizer.clip
    old = Normalizer.from_state({name: x for name, x in state.items() if name not in ("low", "high")}, "path")
    assert np.isneginf(old.low).all() and np.isposinf(old.high).all()


def test_the_decoder_of_the_original_answers_no_queries():
    with pytest.raises(InputError, match="queries need the readout decoder"):
        ModelConfig(7, decoder="slots")


# ------------------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------------------

ASKS = tiny(queries=8)
STAYS = random_stays((5, 9, 12, 3), valueless=.1)


def asked_of(stays, *queries, model=None):
    """The answers to queries (stay, known_until, variable, minute)."""
    dataset = StayDataset(cohort_of(stays), PLAIN, points=True)
    return forecast_at(model or build(SeqSetVAEPretrain, ASKS), dataset, *map(np.array, zip(*queries))).to_numpy()


def some_queries(number, seed=0):
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(4)), known := float(rng.integers(1500, 2990)), int(rng.integers(7)),
             known + float(rng.integers(1, 600))) for _ in range(number)]


@pytest.mark.parametrize("kind", [SeqSetVAEPretrain, SeqSetVAE])
def test_nothing_later_than_known_until_moves_an_answer_by_a_bit(kind):
    stay, model = random_stays((12,))[0], build(kind, tiny(queries=8, classification_only=False))
    queries = [(0, stay[5][0], v, stay[5][0] + 90.) for v in range(7)]
    whole, known = (asked_of([sets], *queries, model=model) for sets in (stay, stay[:6]))
    others = [(minute, [(v, 9. - x) for v, x in events] * 30) for minute, events in stay[6:]]
    assert np.array_equal(whole, known) and not np.isnan(whole).any()
    assert np.array_equal(asked_of([stay[:6] + others], *queries, model=model), known)
    at_the_minute = stay[:5] + [(stay[5][0], [(v, 9. - x) for v, x in stay[5][1]])]
    assert not np.isclose(asked_of([at_the_minute], *queries, model=model), known).all(1).any()


def test_in_company_nothing_later_than_known_until_moves_an_answer():
    queries = [(s, 1500., v, 1600.) for s in range(4) for v in range(7)]
    known = [[(minute, events) for minute, events in stay if minute <= 1500] for stay in STAYS]
    later = [[(1501 + 7 * i, [(i % 7, 50.)] * (3 + s)) for i in range(40 * s)] for s in range(4)]
    assert sum(map(len, known)) < sum(map(len, STAYS)) and all(known)
    answers = asked_of(known, *queries)
    for stays in (STAYS, [stay + others for stay, others in zip(known, later)]):
        np.testing.assert_allclose(asked_of(stays, *queries), answers, rtol=1e-5, atol=1e-5)


def test_later_origins_of_the_same_stay_move_no_answer():
    stay = random_stays((12,))[0]
    queries = [(0, minute + 1, v, minute + 60.) for minute, _ in stay for v in range(7)]
    alone = np.concatenate([asked_of([stay], query) for query in queries])
    np.testing.assert_allclose(asked_of([stay], *queries), alone, rtol=1e-5, atol=1e-5)


def test_queries_in_any_order_and_batch_give_equal_answers(monkeypatch):
    queries = some_queries(60)
    order = np.random.default_rng(1).permutation(60)
    answers = asked_of(STAYS, *queries)
    assert np.array_equal(asked_of(STAYS, *[queries[i] for i in order]), answers[order], equal_nan=True)
    alone = np.concatenate([asked_of(STAYS, query) for query in queries])
    np.testing.assert_allclose(alone, answers, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(predictor, "_MOST_STATISTICS", 1)
    monkeypatch.setattr(predictor, "_MOST_QUERIES", 3)
    np.testing.assert_allclose(asked_of(STAYS, *queries), answers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [SeqSetVAEPretrain, SeqSetVAE])
def test_a_forecast_is_what_pretraining_and_full_training_ask_and_score(kind):
    model, stays = build(kind, tiny(queries=40, classification_only=False)), random_stays((9, 7))
    batch = batch_of(stays)
    question, queries = drawn(model, batch)
    b, r = queries.real.nonzero(as_tuple=True)
    own, column = batch.variables[batch.stay_variables], question.column
    variable = [own[i][column[i] == queries.column[i, j]].item() for i, j in zip(b, r)]
    known = np.array([stays[i][queries.origin[i, j]][0] for i, j in zip(b, r)], float)
    minute = known + 60 * queries.hours[b, r].double().numpy()
    answers = asked_of(stays, *zip(b.tolist(), known, variable, minute), model=model)
    location, log_scale, expected = torch.tensor(answers[:, 3:]).unbind(1)
    value = queries.value[b, r]
    loss = student_nll(value, location, log_scale) + (value - expected).square() / 2
    own = torch.stack([loss[b == i].mean() for i in range(2)]).mean()
    with torch.no_grad():
        terms, _ = model.sequence_losses(model.encode(batch)[3], batch)
    close(terms["queries"].mean(), model.config.query_weight * own.float())


def test_before_the_first_set_nothing_is_forecast():
    answers = asked_of(STAYS, (0, -1., 2, 10.), (0, 3000., 2, 3010.))
    assert np.isnan(answers[0]).all() and not np.isnan(answers[1]).any()
    assert np.isnan(asked_of(STAYS, (0, -1., 2, 10.))).all()


def test_answers_come_in_the_units_and_the_range_of_training():
    rng = np.random.default_rng(0)
    x = rng.lognormal(1, 1, 400)
    cohort = cohort_of([[(i, [(0, x[i]), (1, 5.0), (2, 100 + 10 * rng.normal()), (3, np.nan)]) for i in range(400)]])
    normalizer = Normalizer.fit(cohort, np.arange(1))
    assert normalizer.log_scale[0] > 0 == normalizer.log_scale[2]
    for v in (0, 2):
        values = cohort.event_value[cohort.event_variable == v]
        z = normalizer.unclipped(np.full(400, v), values)
        np.testing.assert_allclose(normalizer.in_units(np.full(400, v), z), values, rtol=1e-5)
        assert np.float32(normalizer.in_units(np.array([v]), np.array([99.]))) == values.max()
    draws = normalizer.in_units(np.zeros(10**5, int), rng.normal(-1, .3, 10**5))  # a lognormal's mean
    assert abs(normalizer.in_units(np.array([0]), np.array([-1.]), .09) / draws.mean() - 1) < .01
    assert normalizer.in_units(np.array([1]), np.array([2.3])) == 5
    assert np.isnan(normalizer.in_units(np.array([3]), np.array([0.])))


def test_a_known_until_between_the_events_of_a_minute_is_exact(monkeypatch):
    """Events at 10:20 s and 10:50 s are one set; by 10.5 minutes the first is known."""
    stay, minute = np.zeros(4, int), np.array([0., 10., 10., 30.])
    seconds = np.array([0, 20, 50, 5]) * 10**6
    cohort = build_cohort("handmade", NAMES[:2], stay, minute, np.array([0, 0, 1, 1]), np.array([1., 2., 3., 4.]),
                          ["a"], offset=seconds)
    dataset = StayDataset(cohort, PLAIN, points=True)
    model = build(SeqSetVAEPretrain, ASKS)

    def answers(*known):
        n = len(known)
        return forecast_at(model, dataset, np.zeros(n, int), np.array(known), np.ones(n, int),
                           np.full(n, 60.)).to_numpy()
    first = build_cohort("handmade", NAMES[:2], stay[:2], minute[:2], np.array([0, 0]), np.array([1., 2.]), ["a"],
                         offset=seconds[:2])
    alone = forecast_at(model, StayDataset(first, PLAIN, points=True), [0], [11.], [1], [60.]).to_numpy()
    assert np.array_equal(answers(10.5), alone)
    together = answers(25., 10.5, 10.9, 10.)
    for i, known in enumerate((25., 10.5, 10.9, 10.)):
        np.testing.assert_allclose(together[i], answers(known)[0], rtol=1e-5, atol=1e-5)
    assert len(np.unique(together[:, 3].round(4))) == 3  # by 10.9 and 25 the same is known


# ------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------

def checkpoint_of(cohort, **changes) -> Checkpoint:
    """An untrained one of the cohort's vocabulary."""
    normalizer = Normalizer.fit(cohort, np.arange(len(cohort)))
    config = tiny(num_variables=len(cohort.variables), queries=8)
    vectors = variable_vectors(cohort.variables, config.input_dim)
    torch.manual_seed(0)
    return Checkpoint("tiny", "pretrain", config, SeqSetVAEPretrain(config, vectors).state_dict(), vectors, normalizer,
                      {part: [] for part in SPLITS}, {part: [] for part in SPLITS}, {"fingerprint": ""}, {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of a tiny pretrained checkpoint that forecasts and of its frozen head."""
    home = tmp_path_factory.mktemp("forecasts")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v, queries=8))
        assert train.main([*PRETRAIN, "--run_dir", str(home / "pretrain")]) == 0
        assert train.main([*FINETUNE, str(home / "pretrain" / "best.pt"), "--run_dir", str(home / "finetune")]) == 0
    return home


ASKED = """stay_id,known_until,minute,variable
synthetic-03,600,700,HR
nobody,600,700,HR
synthetic-04,600.5,2000,Lactate
synthetic-03,600,700,Nix
synthetic-03,600,600,HR
synthetic-03,-5,600,HR
"""


def test_a_file_of_queries_is_answered_and_each_that_cannot_be_is_counted(trained, tmp_path, capsys):
    path, out = write(tmp_path / "q.csv", ASKED), tmp_path / "f.csv"
    pretrained = str(trained / "pretrain" / "best.pt")
    assert main(["--checkpoint", pretrained, "--forecast", str(out), "--queries", str(path)]) == 0
    said, table, queries = capsys.readouterr().out, pd.read_csv(out), pd.read_csv(path)
    assert table[["stay_id", "known_until", "minute", "variable"]].equals(queries.astype({"known_until": float,
                                                                                        "minute": float}))
    assert table["mean"].notna().tolist() == [True, False, True, False, False, False]
    assert (table["low"] <= table["high"])[[0, 2]].all()
    for reason in ("1 queries of no stay", "1 queries of a variable unknown", "1 queries of a minute that is not after",
                   "1 queries of a known_until before"):
        assert reason in said
    # In Python, from a table in memory; frozen and exported checkpoints forecast what the pretrained one does.
    cohort = synthetic_cohort(24)
    events = pd.DataFrame([(stay, minute, name, value) for stay, sets in as_lists(cohort).items()
                           for minute, pairs in sets for name, value in pairs],
                          columns=["stay_id", "minute", "variable", "value"])
    with pytest.warns(UserWarning, match="no stay of the data"):
        answers = Predictor(pretrained).forecast(events, queries)
    np.testing.assert_allclose(answers[["mean", "low", "high"]], table[["mean", "low", "high"]], rtol=1e-6)
    frozen, exported = str(trained / "finetune" / "best.pt"), str(tmp_path / "exported.pt")
    assert main(["--checkpoint", frozen, "--export", exported]) == 0
    for other in (["--checkpoint", frozen], ["--checkpoint", exported, "--synthetic_stays", "24"]):
        assert main([*other, "--forecast", str(tmp_path / "g.csv"), "--queries", str(path)]) == 0
        np.testing.assert_allclose(pd.read_csv(tmp_path / "g.csv").iloc[:, 4:], table.iloc[:, 4:], rtol=1e-6)
    with pytest.raises(InputError, match="not a finetuned checkpoint"):
        Predictor(pretrained).predict(events)


def finetuned(trained, folder, *options) -> str:
    """The checkpoint of another finetuning of the tiny pretrained one."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        assert train.main([*FINETUNE, str(trained / "pretrain" / "best.pt"), "--run_dir", str(folder), *options]) == 0
    return str(folder / "best.pt")


def test_a_frozen_backbone_forecasts_as_before_and_a_trained_one_by_its_own_weights(trained, tmp_path):
    pretrained, frozen = (str(trained / mode / "best.pt") for mode in ("pretrain", "finetune"))
    full, cohort = finetuned(trained, tmp_path / "full", "--full_training"), synthetic_cohort(24)
    queries = pd.DataFrame({"stay_id": np.repeat(cohort.stay_id, 2), "known_until": 600, "minute": 900,
                            "variable": ["HR", "Lactate"] * 24})
    before, same, other = (Predictor(path).forecast(cohort, queries)[["mean", "low", "high"]].to_numpy()
                           for path in (pretrained, frozen, full))
    assert not np.isnan(before).any() and np.array_equal(same, before)
    assert not np.isnan(other).any() and not np.isclose(other, before, rtol=1e-6).all(1).any()
    then, now = (Checkpoint.open(path).weights for path in (pretrained, full))
    assert all((then[name] != now[name]).any() for name in then if name.startswith("query_readout."))


@pytest.mark.parametrize("options", [["--random_init"], ["--full_training", "--set", "reconstruction_weight=0"]])
def test_a_checkpoint_whose_forecasts_nothing_trained_refuses_them(trained, tmp_path, capsys, options):
    left, exported = finetuned(trained, tmp_path / "left", *options), str(tmp_path / "exported.pt")
    assert main(["--checkpoint", left, "--export", exported]) == 0
    for path in (left, exported):
        capsys.readouterr()
        code = main(["--checkpoint", path, "--synthetic_stays", "24", "--odd", str(tmp_path / "odd.csv")])
        one_error_line(capsys, code, "left its forecasts untrained")


def test_a_forecast_without_a_usable_query_is_one_error(trained, tmp_path, capsys, small_finetuned):
    path = write(tmp_path / "q.csv", "stay_id,known_until,minute,variable\nnobody,600,700,HR\n")
    pretrained, out = str(trained / "pretrain" / "best.pt"), str(tmp_path / "f.csv")
    capsys.readouterr()
    for told, named in (
            (["--checkpoint", pretrained, "--queries", str(path)], "no query can be answered; 1 queries of no stay"),
            (["--checkpoint", pretrained], "--queries FILE or --until HOURS"),
            (["--checkpoint", str(small_finetuned), "--until", "3"], "cannot forecast")):
        code = main([*told, "--forecast", out])
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and named in error
    one_error_line(capsys, main(["--checkpoint", pretrained, "--until", "3"]), "--forecast")


def test_from_now_on_every_variable_with_numbers_is_forecast(trained, tmp_path, capsys):
    checkpoint, out = str(trained / "pretrain" / "best.pt"), tmp_path / "f.csv"
    told = ["--checkpoint", checkpoint, "--forecast", str(out)]
    assert main([*told, "--until", "6"]) == 0
    table, cohort = pd.read_csv(out), synthetic_cohort(24)
    end = pd.Series(cohort.point_minute, cohort.stay_id)
    numbers = Checkpoint.open(checkpoint).normalizer.variables
    assert len(table) == 24 * len(numbers) and not table.isna().any().any()
    assert (table["known_until"].to_numpy() == end[table["stay_id"]].to_numpy()).all()
    assert (table["minute"] - table["known_until"] == 360).all()
    pytest.importorskip("matplotlib")
    plots = ["--plots", str(tmp_path), "--trajectory", "synthetic-03"]
    assert main([*told, "--origin", "24", "--until", "3", "--every", "60", *plots, "--plot_format", "svg"]) == 0
    table = pd.read_csv(out)
    assert sorted(set(table["minute"])) == [1500, 1560, 1620] and set(table["known_until"]) == {1440}
    assert (tmp_path / "forecast.svg").stat().st_size > 10_000
    for half in (plots[:2], plots[2:]):
        one_error_line(capsys, main([*told, "--until", "3", *half]), "--plots DIR and --trajectory STAY")


def test_every_value_is_compared_with_what_the_sets_before_let_expect(trained, tmp_path):
    checkpoint, out = str(trained / "pretrain" / "best.pt"), tmp_path / "odd.csv"
    assert main(["--checkpoint", checkpoint, "--odd", str(out)]) == 0
    table = pd.read_csv(out)
    cohort = synthetic_cohort(24)
    assert pd.read_csv(out, dtype=str)["value"].str.len().max() < 12  # no digits beyond those of a float32
    assert len(table) == len(cohort.event_value) - np.diff(cohort.set_start)[
        cohort.stay_start[:-1]].sum()  # all but each first set
    predictor, dataset = Predictor.with_data(checkpoint)
    rows = table.sample(20, random_state=0)
    normalizer = dataset.normalizer
    for _, row in rows.iterrows():
        p = list(cohort.stay_id).index(row["stay_id"])
        minutes = cohort.set_minute[cohort.stay_start[p]:cohort.stay_start[p + 1]]
        v = normalizer.variables.index(row["variable"])
        told = forecast_at(predictor.model, dataset, [p], [minutes[minutes < row["minute"]].max()], [v],
                           [row["minute"]]).iloc[0]
        z = (normalizer.unclipped(np.array([v]), np.array([row["value"]]))[0] - told["location"]) * np.exp(
            -told["log_scale"])
        share = scipy.stats.t.cdf(z, FREEDOM)
        np.testing.assert_allclose(row[["expected", "low", "high", "tail"]].astype(float),
                                   [told["mean"], told["low"], told["high"], 2 * min(share, 1 - share)], rtol=1e-4)


def test_a_mistyped_value_is_the_oddest():
    stays = random_stays((9, 12))
    normal, typed = (StayDataset(cohort_of(s), PLAIN, points=True) for s in (
        stays, [stays[0], [*stays[1][:6], (stays[1][6][0], [(3, 735.0)]), *stays[1][7:]]]))
    asking = SimpleNamespace(model=build(SeqSetVAEPretrain, ASKS), device=torch.device("cpu"))
    table = odd_values(asking, typed)
    worst = table.loc[table["tail"].idxmin()]
    assert worst["value"] == 735 and worst["tail"] < odd_values(asking, normal)["tail"].min()


def test_a_pretrained_checkpoint_is_scored_by_its_forecasts(trained, tmp_path, capsys):
    told = ["--checkpoint", str(trained / "pretrain" / "best.pt"), "--json", str(tmp_path / "r.json")]
    split = "".join(["stay_id,split\n", *(f"{stay},test\n" for stay in synthetic_cohort(24).stay_id)])
    assert main([*told, "--split", str(write(tmp_path / "split.csv", split))]) == 0
    said, figures = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert "stays left out of subjects that" in said and "coverage" in said and "Active units" in said
    rows = figures["forecast"]["variables"]
    assert figures["forecast"]["values"] == sum(row["values"] for row in rows.values())
    assert all(0 <= row["coverage"] <= 1 for row in rows.values()) and "HR" in rows
    one_error_line(capsys, main([*told[:2], "--predictions", str(tmp_path / "p.csv")]), "not a finetuned checkpoint")


def test_data_of_every_layout_are_forecast_and_minutes_count_from_admission(meds_folder, load, tmp_path):
    psv = "HR|Temp|SepsisLabel\n" + "".join(f"{80 + i}|37|0\n" for i in range(5))
    write(tmp_path / "cinc" / "training_setA" / "p000001.psv", psv)
    write(tmp_path / "long" / "events.csv", EVENTS.replace("7,61.5,K,inf\n", ""))
    for folder, stay, known, name in ((write_physionet(tmp_path / "2012"), "132539", 60, "HR"), (
            tmp_path / "cinc", "p000001", 130, "HR"), (tmp_path / "long", "7", 60, "HR"), (meds_folder, "5", 30, "HR")):
        cohort = load(folder)
        predictor = Predictor(checkpoint_of(cohort), "cpu")
        queries = pd.DataFrame({"stay_id": [stay], "known_until": [known], "minute": [known + 60], "variable": [name]})
        assert predictor.forecast(cohort, queries)["mean"].notna().all(), folder
    # Of clock times minutes count from the first event that is no birth.
    meds(tmp_path / "born", "data/0.parquet", subject_id=[5, 5, 5], code=["MEDS_BIRTH", "HR", "HR"],
         time=[at("01 00:00"), at("03 00:00"), at("03 02:00")], numeric_value=np.array([np.nan, 80, 90], np.float32))
    cohort = load(tmp_path / "born")
    model = Predictor(checkpoint_of(cohort), "cpu")
    queries = pd.DataFrame({"stay_id": ["5"] * 2, "known_until": [0, 119], "minute": 180, "variable": "HR"})
    answers = model.forecast(cohort, queries)
    direct = forecast_at(model.model, model.checkpoint.dataset(cohort), [0, 0], [2880, 2999], [0, 0], [3060, 3060])
    np.testing.assert_allclose(answers["mean"], direct["mean"], rtol=1e-6)
