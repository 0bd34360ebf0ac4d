"""The forecast benchmark: the second day of PhysioNet 2012 from the first, and finding mistyped values,
beside baselines (`test_suite.py --forecast_benchmark`)."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Callable, NamedTuple

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from baselines import STATISTICS, summary_table
from checkpoint import Checkpoint
from data import SPLITS, Cohort, event_table, stay_event_index, stays_of, write_atomically
from metrics import bootstrap
from predictor import Predictor, forecast_at, quantile_of
from protocol import first_figure, once, print_methods
from questions import with_points
from report import odd_values
from runs import read_cohort
from train import pretrain, run_settings

KNOWN_UNTIL = 1439  # the last minute that is known; every later value is asked for
MOST_ROWS = 40_000  # values of a variable from which boosting learns
USUAL, LAST, BOOSTING = "mean of the training stays", "last value, else that mean", "boosting on summaries"
MODEL, WITH_BOOSTING = "pretrained model", "average of model and boosting"


def random_split(ids, seed: int) -> dict[str, list[str]]:
    """60, 20 and 20% of the sorted ids, as the field draws them."""
    rest, test = train_test_split(np.sort(ids), train_size=.8, random_state=seed)
    train, valid = np.split(rest, [len(rest) * 3 // 4])
    return {"train": train.tolist(), "valid": valid.tolist(), "test": test.tolist()}


def charted(cohort) -> pd.DataFrame:
    """A row a stay, variable and minute with a value, sorted by these: the mean of the values then."""
    events = event_table(cohort, np.arange(len(cohort))).astype({"value": float}).dropna()
    return events.groupby(["stay", "variable", "minute"], as_index=False).mean()


def boosted(known: np.ndarray, queries: pd.DataFrame, seed: int) -> np.ndarray:
    """Answers [n] to the queries whose part is not 0 by a HistGradientBoosting of each variable, learned from
    at most MOST_ROWS whose part is 0. It gets the STATISTICS of its variable, last, mean and hours since of
    all, and the minute. known: [P, V, 9], see `summary_table`."""
    of_all = known[..., [STATISTICS.index(name) for name in ("last", "mean", "hours since")]]
    of_all, rng = of_all.reshape(len(known), -1), np.random.default_rng(seed)
    stay, variable, minute, value, part = queries.to_numpy().T
    stay, variable = stay.astype(int), variable.astype(int)
    answer = np.full(len(queries), np.nan)

    def inputs(rows):
        return np.column_stack([known[stay[rows], variable[rows]], of_all[stay[rows]],
                                minute[rows].astype(np.float32)])

    for v in tqdm(np.unique(variable[part > 0]), desc=f"boosting, seed {seed}", disable=None):
        learned, asked = (np.flatnonzero((variable == v) & here) for here in (part == 0, part > 0))
        learned = rng.permutation(learned)[:MOST_ROWS]
        boosting = HistGradientBoostingRegressor(max_iter=150, max_leaf_nodes=15, early_stopping=False,
                                                 random_state=0)
        x = inputs(learned)
        says = np.fmin.reduce(x) < np.fmax.reduce(x)
        says[-1] = True  # of one query all are constant
        answer[asked] = boosting.fit(x[:, says], value[learned]).predict(inputs(asked)[:, says])
    return answer[part > 0]


def queries_answered(checkpoint: Checkpoint, cohort, queries: pd.DataFrame) -> np.ndarray:
    """Returns a checkpoint's answers to the queries: mean in the variable's unit, location and log scale,
    [3, n] float32."""
    dataset = checkpoint.dataset(cohort)
    stay, variable, minute = (queries[name].to_numpy() for name in ("stay", "variable", "minute"))
    answers = forecast_at(checkpoint.forecaster(), dataset, stay, np.full(len(stay), KNOWN_UNTIL),
                          dataset.variable[variable], minute)
    return answers[["mean", "location", "log_scale"]].to_numpy(np.float32).T


def forecasts_on(home: Path, checkpoint: Checkpoint, cohort, values, queries, known) -> dict[str, np.ndarray]:
    """Returns what every method sums up to on the test part of a split, see `forecast_sums`, from what lies
    in `home`. A baseline answers by a Gaussian around its value, whose sd is that of the variable's errors in
    the validation part. The average gives the model the share that is best there."""
    seen = values[values["part"] < 2].groupby("variable")["value"]
    units = pd.DataFrame({"range": seen.max() - seen.min(), "sd": seen.std()})
    units = units.reindex(range(known.shape[1])).fillna(0).replace(0, 1)  # of a constant: any
    variable, value = queries["variable"].to_numpy(), queries["value"].to_numpy()
    tested, width = (queries["part"] == 2).to_numpy(), units["range"].to_numpy()[variable]
    usual = values[values["part"] == 0].groupby("variable")["value"].mean().reindex(units.index)
    usual, last = usual.to_numpy()[variable], known[queries["stay"], variable, STATISTICS.index("last")]
    model, location, log_scale = np.load(home / "model" / "answers.npy").astype(float)
    means = {USUAL: usual, LAST: np.where(np.isnan(last), usual, last),
             BOOSTING: np.load(home / "boosting" / "answers.npy")}

    def valid_error(mean) -> pd.Series:
        """The mean square error of each variable, in units of its range."""
        return pd.Series(((mean - value) / width)[~tested] ** 2).groupby(variable[~tested]).mean()

    forecasts = {}
    for method, mean in means.items():
        sd = valid_error(mean).reindex(units.index).fillna(0).to_numpy()[variable] ** .5 * width
        forecasts[method] = Forecasts.gaussian(mean[tested], sd[tested])
    own = checkpoint.dataset(cohort).variable[variable[tested]]
    told = checkpoint.normalizer, own, location[tested], log_scale[tested]
    forecasts[MODEL] = Forecasts(model[tested], partial(quantile_of, *told))
    share = min(np.arange(11) / 10, key=lambda share: valid_error(
        share * model + (1 - share) * means[BOOSTING]).mean())
    forecasts[WITH_BOOSTING] = forecasts[MODEL].averaged(forecasts[BOOSTING], share)
    print(f"{home}: {tested.sum():,} values of {len(np.unique(variable[tested]))} variables in "
          f"{queries['stay'][tested].nunique():,} test stays; {share:g} of the average is the model",
          flush=True)
    return {method: forecast_sums(each, queries[tested], units) for method, each in forecasts.items()}


# ---- figures of forecasts ----------------------------------------------------------------------------------

FORECAST_FIGURES = ("MSE e-3", "MAE e-2", "MSE of z-scores", "CRPS e-2", "coverage of 80%")


class Forecasts(NamedTuple):
    """Answers to n queries, in the variables' units."""

    mean: np.ndarray    # [n]
    quantile: Callable  # of a level between 0 and 1, [n]

    @classmethod
    def gaussian(cls, mean, sd) -> "Forecasts":
        return cls(mean, lambda level: mean + sd * NormalDist().inv_cdf(level))

    def averaged(self, other: "Forecasts", share: float) -> "Forecasts":
        """This share of these means and quantiles, and the rest of the other's."""
        return Forecasts(share * self.mean + (1 - share) * other.mean,
                         lambda level: share * self.quantile(level) + (1 - share) * other.quantile(level))


def crps(quantile, value: np.ndarray, levels: int = 45) -> np.ndarray:
    """Returns the continuous ranked probability score [n] of forecasts of these values [n], in their unit:
    twice the pinball loss, in the mean over levels (Laio & Tamea 2007). quantile: the forecasts'
    quantiles [n] at a level between 0 and 1. 45 levels are within .1% for a Gaussian."""
    total = np.zeros(len(value))
    for level in (np.arange(levels) + .5) / levels:
        error = value - quantile(level)
        total += np.maximum(level * error, (level - 1) * error)
    return 2 * total / levels


def forecast_sums(forecasts: Forecasts, queries: pd.DataFrame, units: pd.DataFrame) -> np.ndarray:
    """Sums over the queries of each stay and variable, [6, stays, V]: their number; squared error, absolute
    error and CRPS in units of the variable's range; squared error in units of its sd; answers within the 80%
    interval."""
    variable, value = queries["variable"].to_numpy(), queries["value"].to_numpy()
    width, sd = units.to_numpy()[variable].T
    error = forecasts.mean - value
    within = (forecasts.quantile(.1) <= value) & (value <= forecasts.quantile(.9))
    each = [np.ones(len(value)), (error / width) ** 2, abs(error) / width,
            crps(forecasts.quantile, value) / width, (error / sd) ** 2, within]
    stay, stays = pd.factorize(queries["stay"])
    cell, shape = stay * len(units) + variable, (len(stays), len(units))
    return np.stack([np.bincount(cell, x, np.prod(shape)).reshape(shape) for x in each])


def forecast_figures(sums: np.ndarray, repeats: int = 200) -> np.ndarray:
    """FORECAST_FIGURES of `forecast_sums`, [1 + repeats, 5]: of these stays, then of resampled ones, the same
    for every method. Errors and CRPS are means over a variable's values, then over variables. The MSE of
    z-scores and the coverage are means over all values."""
    stays = sums.shape[1]
    drawn = np.random.default_rng(0).multinomial(stays, np.full(stays, 1 / stays), repeats)
    number, *totals, z, within = np.vstack([np.ones(stays), drawn]) @ sums                 # [1 + repeats, V]
    with np.errstate(invalid="ignore"):  # a variable without a value is in no mean
        square, absolute, score = (np.nanmean(total / number, axis=1) for total in totals)
    z, within = (total.sum(1) / number.sum(1) for total in (z, within))
    return np.stack([1e3 * square, 1e2 * absolute, z, 1e2 * score, within], axis=1)


# ---- mistyped values ---------------------------------------------------------------------------------------

MISTYPED = .01  # share of the values
ODD, FROM_MEAN, FROM_LAST = "tail of --odd", "z-score", "distance from the last value, else the mean"


def tenfold(values: np.ndarray, rng) -> np.ndarray:
    """Each of the values times ten or a tenth, at random."""
    return values * rng.choice([10, .1], len(values))


def swapped(value: np.float32, rng) -> float:
    """The value with two neighbouring digits, which differ, in each other's place, drawn from all such pairs
    of the number as it is written; the value itself where it has none."""
    text = np.format_float_positional(value, trim="-")
    digits = [i for i, sign in enumerate(text) if sign.isdigit()]
    pairs = [(i, j) for i, j in zip(digits, digits[1:]) if text[i] != text[j]]
    if not pairs:
        return value
    i, j = pairs[rng.integers(len(pairs))]
    return float(text[:i] + text[j] + text[i + 1:j] + text[i] + text[j + 1:])


MISTAKES = {"ten times or a tenth": tenfold,
            "two digits swapped": lambda values, rng: [swapped(value, rng) for value in values]}


def mistyped(cohort: Cohort, stays, mistake, seed: int) -> tuple[Cohort, np.ndarray]:
    """The cohort with mistakes in a random MISTYPED of the values of these stays, and the events [n] that
    they changed (0 has no tenfold, 11 no digits to swap)."""
    rng, value = np.random.default_rng(seed), cohort.event_value.copy()
    events = stay_event_index(cohort, stays)
    events = events[~np.isnan(value[events])]
    drawn = rng.choice(events, round(MISTYPED * len(events)), replace=False)
    value[drawn] = mistake(value[drawn], rng)
    return replace(cohort, event_value=value), drawn[value[drawn] != cohort.event_value[drawn]]


def suspicion(checkpoint: Checkpoint, cohort: Cohort, stays) -> pd.DataFrame:
    """How odd ODD, FROM_MEAN and FROM_LAST find each value of these stays that has an earlier set: a row,
    with its index, an event. The latter two count standard deviations of the checkpoint's normalizer; the
    last value is that of an earlier minute."""
    dataset = checkpoint.dataset(cohort)
    table = event_table(cohort, stays).set_axis(stay_event_index(cohort, stays)).dropna()
    variable, value = dataset.variable[table["variable"]], table["value"].to_numpy(float)
    table["z"] = dataset.normalizer.unclipped(variable, value)
    keys = ["stay", "variable", "minute"]
    last = table.groupby(keys)["z"].last().groupby(keys[:2]).shift().rename("last")
    table = table.join(last, on=keys).fillna({"last": 0})
    odd = odd_values(Predictor(checkpoint, "cpu"), dataset, stays)
    found = pd.DataFrame({"stay": table["stay"], ODD: -odd["tail"], FROM_MEAN: table["z"].abs(),
                          FROM_LAST: (table["z"] - table["last"]).abs()})
    return found.loc[odd.index]


def mistakes_found(checkpoint: Checkpoint, cohort: Cohort, stays, mistake, seed: int) -> np.ndarray:
    """AUROC and AUPRC of finding the mistakes in these stays by the three columns of `suspicion`, of these
    stays and of resampled ones, [1 + 200, 3, 2]. What was charted later follows the value as mistyped."""
    damaged, events = mistyped(cohort, stays, mistake, seed)
    table = suspicion(checkpoint, damaged, stays)
    wrong, stay = np.isin(table.index, events), table.pop("stay").to_numpy()
    scores = list(table.to_numpy().T)
    found = [[roc_auc_score(wrong, score), average_precision_score(wrong, score)] for score in scores]
    return np.concatenate([[found], bootstrap(stay, wrong, *scores, repeats=200)])


def forecast_benchmark(given: dict, seeds: list, folder: Path) -> None:
    """For the split of every seed: fit the baselines, pretrain with the defaults, answer every value after
    KNOWN_UNTIL, find mistyped values, score the test part. What is finished lies in `folder`, by the data's
    fingerprint, and is kept: stop and go on at will. given: the data's options, see `data_options`."""
    cohort = read_cohort(given)
    print(cohort.describe())
    values, stays, rows, found = charted(cohort), np.arange(len(cohort)), {}, {}
    asked = with_points(cohort, np.ones_like(stays), np.full(len(stays), KNOWN_UNTIL))
    known = summary_table(asked, stays, np.arange(len(cohort.variables)))
    for seed in seeds:
        home, split = folder / f"seed{seed}-{cohort.fingerprint}", random_split(cohort.stay_id, seed)
        part = sum(code * np.isin(cohort.stay_id, split[name]) for code, name in enumerate(SPLITS))
        values["part"] = part[values["stay"]]
        later = values["minute"] > KNOWN_UNTIL
        queries = values[later & values["stay"].isin(values["stay"][~later])]
        queries = queries[queries["variable"].isin(queries["variable"][queries["part"] == 0])]
        once(home / "boosting", lambda to: np.save(to / "answers.npy", boosted(known, queries, seed)))
        queries = queries[queries["part"] > 0]

        table = pd.DataFrame({"stay_id": cohort.stay_id, "split": np.take(SPLITS, part)})
        file = home / "split.csv"
        write_atomically(file, lambda out: table.to_csv(out, index=False))
        once(home / "pretrain", lambda to: pretrain(run_settings(
            mode="pretrain", run_dir=str(to), resume="auto", **given | {"split_file": str(file)})))
        checkpoint = Checkpoint.open(home / "pretrain" / "best.pt")
        once(home / "model", lambda to: np.save(to / "answers.npy",
                                                queries_answered(checkpoint, cohort, queries)))
        for method, sums in forecasts_on(home, checkpoint, cohort, values, queries, known).items():
            rows.setdefault(method, {})[home] = forecast_figures(sums)
        tested = stays_of(cohort, split["test"])
        for name, mistake in MISTAKES.items():
            once(home / name, lambda to: np.save(
                to / "found.npy", mistakes_found(checkpoint, cohort, tested, mistake, seed)))
            for method, figures in zip((ODD, FROM_MEAN, FROM_LAST),
                                       np.load(home / name / "found.npy").swapaxes(0, 1)):
                found.setdefault(name, {}).setdefault(method, {})[home] = figures
    ranked = sorted(rows, key=lambda method: first_figure(rows[method]))
    print_methods(rows, ranked, BOOSTING, FORECAST_FIGURES)
    for name, rows in found.items():
        print(f"\nFinding the {MISTYPED:.0%} of the test stays' values that were mistyped: {name}")
        print_methods(rows, list(rows), FROM_MEAN, ["AUROC", "AUPRC"])
