"""Tests of the forecast benchmark, `python test_suite.py --forecast_benchmark`."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.model_selection import train_test_split

import forecast_benchmark
import train
from data import build_cohort
from forecast_benchmark import (BOOSTING, FROM_LAST, FROM_MEAN, LAST, MISTAKES, MODEL, ODD, USUAL, WITH_BOOSTING,
                                Forecasts, charted, crps, forecast_figures, forecast_sums, mistakes_found, mistyped,
                                random_split, suspicion, swapped, tenfold)
from readers import write_long_table
from test_suite import main
from tests.test_evaluate import rows_of
from tests.test_forecasts import checkpoint_of
from tests.tiny import one_error_line, tiny

def test_crps_is_the_integral_over_the_squared_distance_of_the_distributions():
    x = np.linspace(-80, 80, 400_001)
    for law in (stats.norm, stats.t(4)):
        for value, location, scale in ((0, 0, 1), (2.5, 0, 1), (-3, 1, 2), (7, 5, .5)):
            integral = np.trapezoid((law.cdf((x - location) / scale) - (x >= value)) ** 2, x)
            score = crps(lambda level: location + scale * law.ppf(level), np.array([value]))
            assert abs(score - integral) < .01 * integral
    assert crps(lambda level: np.array([1.]), np.array([1.])) == 0  # sure and right


def test_splits_of_forecasts_are_those_of_scikit_learn_on_the_sorted_ids():
    ids = [f"{i:03d}" for i in range(100)]
    rest, test = train_test_split(ids, train_size=.8, random_state=42)
    assert random_split(ids[::-1], 42) == {"train": rest[:60], "valid": rest[60:], "test": test}


def test_values_of_one_minute_are_averaged():
    cohort = build_cohort("made", ["HR", "K"], np.array([0, 0, 0, 0, 1]), np.array([0, 5, 5, 5, 5]),
                          np.array([0, 0, 0, 1, 0]), np.array([80, 60, 70, np.nan, -1]), ["a", "b"])
    assert charted(cohort).to_numpy().tolist() == [[0, 0, 0, 80], [0, 0, 5, 65], [1, 0, 5, -1]]


def test_forecasts_are_scored_in_each_variables_units():
    queries = pd.DataFrame({"stay": [3, 3, 3, 8], "variable": [0, 0, 1, 1], "value": [1., 2., 10., 30.]})
    units = pd.DataFrame({"range": [2., 20.], "sd": [1., 5.]})
    answers = Forecasts.gaussian(np.array([1., 4., 10., 20.]), np.array([1e-9, 2., 1., 1.]))
    figures = forecast_figures(forecast_sums(answers, queries, units))
    square, absolute = (0 + 1) / 2 / 2 + (0 + .25) / 2 / 2, (0 + 1) / 2 / 2 + (0 + .5) / 2 / 2
    score = crps(answers.quantile, queries["value"].to_numpy()) / [2, 2, 20, 20]
    expected = [1e3 * square, 1e2 * absolute, (0 + 4 + 0 + 4) / 4, 1e2 * score.mean(), 3 / 4]
    np.testing.assert_allclose(figures[0], expected, atol=1e-6)
    assert figures.shape == (201, 5) and {tuple(row) for row in figures[1:, 4:]} == {(1,), (.75,), (0,)}


def test_an_average_of_forecasts_has_the_averaged_quantiles():
    one, other = Forecasts.gaussian(np.zeros(1), 1.), Forecasts.gaussian(np.full(1, 10.), 3.)
    both = one.averaged(other, .25)
    assert both.mean == 7.5 and abs(both.quantile(.9) - (7.5 + 2.5 * stats.norm.ppf(.9))) < 1e-9


@pytest.mark.parametrize("value, others", [
    (98, {89}), (7.35, {3.75, 7.53}), (80, {8}), (100, {10}), (.95, {9.05, .59}), (-12.5, {-21.5, -15.2}), (11, {11}),
    (7, {7}), (0, {0})])
def test_two_neighbouring_digits_of_the_number_as_written_are_swapped(value, others):
    rng = np.random.default_rng(0)
    assert {swapped(np.float32(value), rng) for _ in range(40)} == others


def test_mistakes_are_drawn_from_the_values_of_the_stays_and_named():
    rng, n = np.random.default_rng(0), 4000
    value = np.append(rng.normal(80, 9, n - 200), np.append(np.zeros(100), np.full(100, np.nan)))
    cohort = build_cohort("made", ["x"], np.repeat([0, 1], n), np.tile(np.arange(n), 2), np.zeros(2 * n, int),
                          np.tile(value, 2), ["a", "b"])
    damaged, events = mistyped(cohort, np.array([1]), tenfold, 7)
    ratio = damaged.event_value[events] / cohort.event_value[events]
    assert {*np.round(ratio, 3)} == {np.float32(10), np.float32(.1)} and (events >= n).all()
    changed = np.flatnonzero((damaged.event_value != cohort.event_value) & ~np.isnan(cohort.event_value))
    assert changed.tolist() == sorted(events) and 30 < len(events) <= 39
    assert np.array_equal(events, mistyped(cohort, np.array([1]), tenfold, 7)[1])


def test_what_is_suspect_is_measured_from_the_last_value_of_an_earlier_minute():
    """x at 0, 5 (twice), 9 and y at 9 alone, of a normalizer with mean 10 and sd 2."""
    cohort = build_cohort("made", ["x", "y"], np.zeros(5, int), np.array([0, 5, 5, 9, 9]), np.array([0, 0, 0, 0, 1]),
                          np.array([10., 14, 16, 8, 6]), ["a"])
    model = checkpoint_of(cohort)
    model.normalizer.mean[:] = 10
    model.normalizer.std[:] = 2
    table = suspicion(model, cohort, np.array([0]))
    assert table.index.tolist() == [1, 2, 3, 4] and (table[ODD] < 0).all()
    assert table[FROM_MEAN].tolist() == [2, 3, 1, 2] and table[FROM_LAST].tolist() == [2, 3, 4, 2]


def test_an_untrained_model_finds_a_tenfold_of_values_that_hardly_vary():
    rng, n = np.random.default_rng(0), 500
    cohort = build_cohort("made", ["x"], np.repeat([0, 1], n), np.tile(np.arange(n), 2), np.zeros(2 * n, int),
                          rng.normal(80, 2, 2 * n), ["a", "b"])
    found = mistakes_found(checkpoint_of(cohort), cohort, np.arange(2), tenfold, 0)
    assert found.shape == (201, 3, 2) and (found[0, :, 0] > .97).all() and (found[:, 1] > .999).all()


def test_the_forecast_benchmark_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v, queries=8))
    rng, n = np.random.default_rng(0), 60
    stay, hour = np.divmod(np.arange(n * 48), 48)
    level = rng.normal(size=n)  # the last value and the mean of the stay tell what comes, boosting learns a rise
    value = level[stay] + (hour >= 24) * 3 + rng.normal(0, .1, n * 48)
    cohort = build_cohort("made", ["x", "never late"], np.append(stay, 0), np.append(hour * 60, 0),
                          np.append(0 * stay, 1), np.append(value, 5), [f"s{i:02d}" for i in range(n)])
    write_long_table(Path("table"), cohort, labels=False)
    words = ["--forecast_benchmark", "kept", "--data_dir", "table", "--seeds", "1", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    tables = out.split("Finding the 1% of the test stays' values that were mistyped: ")
    first, *mistakes = ({row[0]: row[1:] for row in rows_of(table)} for table in tables)
    assert [table.split("\n")[0] for table in tables[1:]] == [*MISTAKES]
    assert all({ODD, FROM_MEAN, FROM_LAST} <= table.keys() for table in mistakes)
    assert "288 values of 1 variables in 12 test stays" in out
    boosting, last, usual = (float(first[name][1].split()[0]) for name in (BOOSTING, LAST, USUAL))
    assert boosting < .2 * last and boosting < .2 * usual and first[LAST][0] == "2"
    assert {MODEL, WITH_BOOSTING} <= first.keys() and len(first) == 5
    for name in ("boosted", "pretrain", "forecast_at", "mistakes_found"):
        monkeypatch.setattr(forecast_benchmark, name, lambda *_: pytest.fail("done again"))
    assert main(words) == 0
    assert capsys.readouterr().out.split("\n| ", 1)[1] == out.split("\n| ", 1)[1]
    one_error_line(capsys, main(["--forecast_benchmark"]), "--forecast_benchmark needs --data_dir")
