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
from forecast_benchmark import BOOSTING, LAST, MODEL, USUAL, WITH_BOOSTING, charted, random_split
from metrics import Forecasts, crps, forecast_figures, forecast_sums
from readers import write_long_table
from test_suite import main
from tests.test_evaluate import rows_of
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
    first = {row[0]: row[1:] for row in rows_of(out)}
    assert "288 values of 1 variables in 12 test stays" in out
    boosting, last, usual = (float(first[name][1].split()[0]) for name in (BOOSTING, LAST, USUAL))
    assert boosting < .2 * last and boosting < .2 * usual and first[LAST][0] == "2"
    assert {MODEL, WITH_BOOSTING} <= first.keys() and len(first) == 5
    for name in ("boosted", "pretrain", "forecast_at"):
        monkeypatch.setattr(forecast_benchmark, name, lambda *_: pytest.fail("done again"))
    assert main(words) == 0
    assert {row[0]: row[1:] for row in rows_of(capsys.readouterr().out)} == first
    one_error_line(capsys, main(["--forecast_benchmark"]), "--forecast_benchmark needs --data_dir")
