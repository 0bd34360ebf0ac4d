"""Figures of probabilities (discrimination, calibration, alarms, the utility of the challenge 2019) and how
certain they are. Every function takes flat arrays over points."""

import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (average_precision_score, brier_score_loss, confusion_matrix, f1_score,
                             roc_auc_score)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer


# ------------------------------------------------------------------------------------------------------------
# Measures: functions of label, probability and weight [n], in the order of falling probability
# ------------------------------------------------------------------------------------------------------------

def ranks(label, p, weight) -> tuple[float, float]:
    """Returns AUROC and AUPRC as scikit-learn defines them. It leaves out scikit-learn's sorting and
    checking, which would take nearly all of a bootstrap's time."""
    last = np.append(np.flatnonzero(np.diff(p)), len(p) - 1)  # the last point of each distinct probability
    tp = np.cumsum(weight * label)[last]
    alarms = np.cumsum(weight)[last]
    fp, gained = alarms - tp, np.diff(tp, prepend=0)
    auroc = (np.diff(fp, prepend=0) * (tp - gained / 2)).sum() / (tp[-1] * fp[-1])
    return auroc, (gained * tp / np.maximum(alarms, 1e-300)).sum() / tp[-1]


def logit(p, least: float = 1e-12) -> np.ndarray:
    """Returns the log odds of probabilities, which are first clipped to [least, 1 - least]."""
    p = np.clip(p, least, 1 - least)
    return np.log(p / (1 - p))


def recalibration(label, p, weight) -> tuple[float, float]:
    """Returns slope and intercept of logit P(label) = intercept + slope logit(p) (Cox 1958), fitted by
    Newton's method. They are 1 and 0 where p is calibrated, NaN where they are not determined (p is constant,
    or it separates the classes)."""
    rate = weight @ label / weight.sum()
    x = np.stack([logit(p), np.ones(len(p))])  # [2, n]
    fitted = np.array([0, logit(rate)])
    for _ in range(25):
        q = (1 + np.tanh(fitted @ x / 2)) / 2
        hessian = (weight * q * (1 - q) * x) @ x.T
        if not np.linalg.det(hessian) > 1e-12 * hessian[0, 0] * hessian[1, 1]:
            break
        step = np.linalg.solve(hessian, x @ (weight * (label - q)))
        fitted += step
        if abs(step).max() < 1e-6:
            return tuple(fitted)
    return np.nan, np.nan


def excess(label, p, weight) -> tuple[float]:
    """Returns the share of label 1 less the mean p: 0 where p is calibrated in the large."""
    return (weight @ (label - p) / weight.sum(),)


def alarm_from(threshold: float):
    """Returns the measure of alarms from this probability on: sensitivity, specificity, positive predictive
    value (NaN without any alarm), alarms per 100 points."""
    def alarm(label, p, weight):
        raised = p >= threshold
        alarms, true = weight @ raised, weight @ (raised * label)
        specificity = 1 - (alarms - true) / (weight @ (1 - label))
        return (true / (weight @ label), specificity, true / alarms if alarms else np.nan,
                100 * alarms / weight.sum())
    return alarm


RANKS = {ranks: ("auroc", "auprc")}  # measures, and the names of the numbers that each returns


# ------------------------------------------------------------------------------------------------------------
# Uncertainty: the bootstrap resamples patients, since the stays and points of one patient are alike
# ------------------------------------------------------------------------------------------------------------

RESAMPLED_LESS = 20_000  # from this number of points on a bootstrap draws 200 samples instead of 1,000
FEW = 10                 # patients of each label, below which an interval means nothing


def bootstrap(group, label, *probabilities, measures=(ranks,), repeats: int | None = None) -> np.ndarray:
    """Returns [repeats, k, m]: the m numbers of `measures` for each of k methods, where every method is
    scored on the same resampled groups of points (Efron & Tibshirani 1993), so that differences are paired.

    group: [n] the patient of each point, any integer. Samples that hold one class alone are drawn anew.
    repeats: samples (None: 1,000, or 200 for many points)."""
    repeats = repeats or (200 if len(label) > RESAMPLED_LESS else 1000)
    rng = np.random.default_rng(0)
    group = np.unique(group, return_inverse=True)[1]
    orders = [np.argsort(-p, kind="stable") for p in probabilities]
    methods = [(label[order], p[order], group[order]) for order, p in zip(orders, probabilities)]
    groups, draws = group.max() + 1, []
    while len(draws) < repeats:
        weight = np.bincount(rng.integers(0, groups, groups), minlength=groups)
        if len(np.unique(label[weight[group] > 0])) == 2:
            draws.append([[number for measure in measures for number in measure(y, p, weight[of])]
                          for y, p, of in methods])
    return np.array(draws)


def interval(draws: np.ndarray) -> list[float] | None:
    """Returns the 95% interval: the 2.5th and the 97.5th percentile of the draws [repeats] that are finite.
    Returns None where fewer than half of them are."""
    finite = draws[np.isfinite(draws)]
    return np.percentile(finite, [2.5, 97.5]).tolist() if len(finite) > len(draws) / 2 else None


def bracketed(limits: list[float] | None, digits: int = 3) -> str:
    """Returns an interval as text, empty where there is none."""
    return f"[{limits[0]:.{digits}f}, {limits[1]:.{digits}f}]" if limits else ""


def groups_of_labels(group, label) -> list[int]:
    """Returns how many groups have a point of label 0, and how many one of label 1."""
    return [len(np.unique(group[label == value])) for value in (0, 1)]


def enough(group, label) -> bool:
    """Tells whether there are at least FEW groups of each label, so that an interval means something."""
    return min(groups_of_labels(group, label)) >= FEW


def with_intervals(group, label, probability, measures: dict) -> dict:
    """Returns {name: {"value", "interval"}} of the measures, with a 95% interval by bootstrap over the
    groups. The value is None where it is not determined, the interval where there are fewer than FEW groups
    of a label."""
    order = np.argsort(-probability, kind="stable")
    ordered = label[order], probability[order], np.ones(len(order))
    values = [number for measure in measures for number in measure(*ordered)]
    intervals = [None] * len(values)
    if enough(group, label):
        intervals = list(map(interval, bootstrap(group, label, probability, measures=measures)[:, 0].T))
    names = [name for names in measures.values() for name in names]
    return {name: {"value": float(value) if np.isfinite(value) else None, "interval": limits}
            for name, value, limits in zip(names, values, intervals)}


def calibration_bins(group, label, probability, bins: int = 10) -> pd.DataFrame:
    """Returns a row for each of `bins` bins of equal counts of points, in the order of their probability.
    Points of one probability lie in one bin.

    Columns: from (its lowest probability), points, predicted (mean probability), observed (share of label 1),
    low and high: its 95% interval (Agresti & Coull 1998), for the effective number of points where those of a
    group are alike (Korn & Graubard 1998)."""
    edges = np.unique(np.quantile(probability, np.arange(1, bins) / bins))
    points = pd.DataFrame({"bin": np.searchsorted(edges, probability, side="right"), "group": group,
                           "label": label, "probability": probability})
    by_bin = points.groupby("bin")
    table = by_bin.agg(**{"from": ("probability", "min")}, points=("label", "size"),
                       predicted=("probability", "mean"), observed=("label", "mean"))
    share = table["observed"]
    points["error"] = label - by_bin["label"].transform("mean")
    spread = points.groupby(["bin", "group"])["error"].sum().pow(2).groupby("bin").sum()
    n = (share * (1 - share) * table["points"] ** 2 / spread).where(spread > 0, by_bin["group"].nunique())
    n = n.clip(upper=table["points"]) + 1.96 ** 2
    centre = share + 1.96 ** 2 * (.5 - share) / n
    half = 1.96 * np.sqrt(centre * (1 - centre) / n)
    limits = {"low": (centre - half).clip(0, share), "high": (centre + half).clip(share, 1)}
    return table.assign(**limits).reset_index(drop=True)


def calibration_curve(label, probability) -> tuple[np.ndarray, np.ndarray]:
    """Returns probabilities, from their 1st to their 99th percentile, and the share of label 1 at each: a
    logistic regression on a cubic spline of the log odds, linear beyond its outer knots (Harrell 2015,
    section 2.4.6). Both are empty where the probabilities take too few values."""
    x = logit(probability)[:, None]
    knots = np.unique(np.quantile(x, [.05, .275, .5, .725, .95]))[:, None]
    if len(knots) < 3:
        return np.zeros(0), np.zeros(0)
    # The penalty is light: it bounds the fit where the spline separates the labels.
    model = make_pipeline(SplineTransformer(knots=knots, extrapolation="linear"),
                          LogisticRegression(C=100, max_iter=1000)).fit(x, label)
    shown = np.linspace(*np.quantile(x, [.01, .99]), 100)[:, None]
    return 1 / (1 + np.exp(-shown[:, 0])), model.predict_proba(shown)[:, 1]


def calibration_error(bins: pd.DataFrame) -> float:
    """Returns the expected calibration error (Guo et al. 2017, eq. 3) over these `calibration_bins`, which
    have equal counts (Nixon et al. 2019)."""
    gap = (bins["observed"] - bins["predicted"]).abs()
    return float(np.average(gap, weights=bins["points"]))


# ------------------------------------------------------------------------------------------------------------
# All figures of the methods that are compared
# ------------------------------------------------------------------------------------------------------------

CHECKPOINT = "this checkpoint"
THRESHOLDS = np.arange(1, 200) / 200


def threshold_of(label, probability, sensitivity: float) -> float:
    """Returns the highest threshold from which on alarms find this share of the positives."""
    positives = np.sort(probability[label == 1])[::-1]
    return float(positives[int(np.ceil(sensitivity * len(positives) - 1e-9)) - 1])


def net_benefit(label, probability) -> dict:
    """Returns, at each t of THRESHOLDS, the share of true alarms less t / (1 - t) times that of false ones
    (Vickers & Elkin 2006): of alarms from probability t on, and of alarms for all. Without any alarm it is
    0."""
    true, false = (len(p) - np.searchsorted(np.sort(p), THRESHOLDS)
                   for p in (probability[label == 1], probability[label == 0]))
    odds, prevalence = THRESHOLDS / (1 - THRESHOLDS), label.mean()
    return {"threshold": THRESHOLDS.tolist(), "net_benefit": ((true - odds * false) / len(label)).tolist(),
            "alarm_for_all": (prevalence - odds * (1 - prevalence)).tolist()}


def mean_of_logits(probabilities) -> np.ndarray:
    """Returns the mean over k methods, taken of their log odds: [k, n] -> [n]."""
    return 1 / (1 + np.exp(-logit(probabilities).mean(0)))


class Points(NamedTuple):
    """The points that are scored: [n] each."""

    stay: np.ndarray     # any integer
    subject: np.ndarray  # the patient: any integer
    minute: np.ndarray
    label: np.ndarray    # 0 or 1

    def size(self) -> dict:
        return {"stays": len(np.unique(self.stay)), "patients": len(np.unique(self.subject)),
                "points": len(self.label), "positive": int(self.label.sum())}


def score_figures(points: Points, methods: dict, threshold: float, sensitivity: float | None = .8,
                  groups: dict = {}) -> dict:
    """Returns plain numbers about the probabilities [n] of each method at these points.

    methods: {name: [n]}, of which CHECKPOINT gets all measures, the others AUROC and AUPRC. threshold: where
    the confusion is counted. sensitivity: what alarms shall find (None: they begin at the threshold). groups:
    {variable: {group: mask [n]}}, in which the checkpoint's measures are repeated."""
    _, subject, _, label = points
    size, probability, prevalence = points.size(), methods[CHECKPOINT], label.mean()
    unit = "patients" if size["patients"] < size["stays"] else "stays"
    negative, positive = groups_of_labels(subject, label)
    few = (f"{unit} with a positive label: {positive}, with a negative one: {negative}; below {FEW} of each "
           "no interval is given, and the figures may be chance")
    alarm = threshold if sensitivity is None else threshold_of(label, probability, sensitivity)
    full = RANKS | {recalibration: ("slope", "intercept"), excess: ("excess",),
                    alarm_from(alarm): ("sensitivity", "specificity", "ppv", "alarms")}
    bins = calibration_bins(subject, label, probability)
    tn, fp, fn, tp = confusion_matrix(label, probability >= threshold).ravel().tolist()

    def group_figures(mask):
        group = Points(*(column[mask] for column in points))
        both = 0 < group.label.sum() < len(group.label)
        measured = with_intervals(group.subject, group.label, probability[mask], full) if both else {}
        return group.size() | measured

    return {**size, "prevalence": float(prevalence), "resampled": unit,
            "few": "" if enough(subject, label) else few,
            "methods": {name: with_intervals(subject, label, p, full if name == CHECKPOINT else RANKS)
                        for name, p in methods.items()},
            "brier": float(brier_score_loss(label, probability)),
            "brier_of_prevalence": float(prevalence * (1 - prevalence)),
            "calibration_error": calibration_error(bins), "calibration": bins.to_dict("list"),
            "probability": {**pd.Series(probability).agg(["mean", "min", "max"]),
                            "below_0.01": int((probability < .01).sum()),
                            "above_0.99": int((probability > .99).sum())},
            "alarm": {"sensitivity": sensitivity, "threshold": alarm},
            "subgroups": {variable: {key: group_figures(mask) for key, mask in masks.items()}
                          for variable, masks in groups.items()},
            "net_benefit": net_benefit(label, probability),
            "threshold": threshold, "confusion": {"tp": tp, "fp": fp, "fn": fn, "tn": tn},
            "f1": float(f1_score(label, probability >= threshold))}


def best_shares(log_odds: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns the shares [k], in tenths, by which the log odds [k, n] of k answers are averaged with the
    least cross-entropy at these labels [n]. They are equal where a class has fewer than ten labels."""
    if np.bincount(label, minlength=2).min() < 10:
        return np.full(len(log_odds), 1 / len(log_odds))
    tenths = range(10, -1, -1)  # falling: of equally good shares the first answer gets the most
    shares = [s for s in itertools.product(tenths, repeat=len(log_odds)) if sum(s) == 10]
    shares, sign = np.array(shares) / 10, np.where(label == 1, -1, 1)
    return min(shares, key=lambda share: np.logaddexp(0, sign * (share @ log_odds)).mean())


# ------------------------------------------------------------------------------------------------------------
# The PhysioNet/CinC Challenge 2019: how an hour's alarm is scored (Reyna et al., Crit Care Med
# 2020;48(2):210-217)
# ------------------------------------------------------------------------------------------------------------

# The label of an hour turns 1 six hours before the onset of sepsis and stays 1. The record ends a few hours
# after the onset. An alarm is worth most at the first label, little twelve hours before the onset, nothing
# from three hours after it on. Arrays are [n], an element an hour: the stay (any integer), the minute, the
# label.

AHEAD, EARLY, LATE = 6, 12, 3  # hours: the label before the onset s; an alarm counts in [s - EARLY, s + LATE]
FALSE_ALARM = -0.05            # utility of an hour's alarm without sepsis, or too early


def of_challenge_2019(stay, minute, label) -> bool:
    """Tells whether these labelled points are the challenge's: they are hourly, a stay's label stays 1 once
    it is 1, and it is 1 for no more hours than from the first label to the end of the time that counts. The
    points of a stay must stand together, in the order of time."""
    within = np.diff(stay) == 0
    hourly, rising = np.diff(minute)[within] == 60, np.diff(label)[within] >= 0
    longest = pd.Series(label == 1).groupby(stay).sum().max()
    return bool(within.any() and hourly.all() and rising.all() and 1 < longest <= AHEAD + LATE + 1)


def hours_since_onset(stay, minute, label) -> np.ndarray:
    """Returns the hours since the onset of the stay's sepsis, six hours after its first label 1: [n],
    negative before the onset, -inf in a stay without sepsis."""
    first = pd.Series(np.where(label == 1, minute, np.inf)).groupby(stay).transform("min").to_numpy()
    return (minute - first) / 60 - AHEAD


def utilities(since) -> tuple[np.ndarray, np.ndarray]:
    """Returns the utility of no alarm and that of an alarm at each hour `since` the onset, [n] each."""
    quiet = np.interp(since, [-AHEAD, LATE], [0, -2], right=0)
    rise_from = -EARLY + FALSE_ALARM * (EARLY - AHEAD)  # at -EARLY an alarm is worth nothing, before less
    return quiet, np.interp(since, [rise_from, -AHEAD, LATE], [FALSE_ALARM, 1, 0])


def in_time(since) -> np.ndarray:
    """Tells at which hours the best possible forecast has its alarms: from 12 before the onset to 3 after
    it."""
    return (since >= -EARLY) & (since <= LATE)


def utilities_by(group, since, alarm) -> np.ndarray:
    """Returns the utility of each group of hours, a stay or a patient, in ascending order: [G, 3] with these
    alarms [n] bool, without any alarm, with the best possible ones."""
    quiet, loud = utilities(since)
    table = pd.DataFrame({"own": np.where(alarm, loud, quiet), "none": quiet,
                          "best": np.where(in_time(since), loud, quiet)})
    return table.groupby(group).sum().to_numpy()


def normalised_utility(utility) -> np.ndarray:
    """Scales sums of `utilities_by`, [..., 3] -> [...]: 0 without any alarm, 1 with the best possible
    ones."""
    own, none, best = np.moveaxis(utility, -1, 0)
    return (own - none) / (best - none)


def utility_draws(utility: np.ndarray, repeats: int = 200) -> np.ndarray:
    """Returns the normalised utility [repeats] of samples of the groups [G, 3] of `utilities_by`, drawn with
    replacement. It is NaN in a sample without sepsis."""
    groups = len(utility)
    sums = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), repeats) @ utility
    draws, septic = np.full(repeats, np.nan), sums[:, 2] > sums[:, 1]
    draws[septic] = normalised_utility(sums[septic])
    return draws


def best_utility_threshold(stay, since, probability) -> tuple[float, float]:
    """Returns the threshold from which on alarms gain most over these hours, and their normalised utility."""
    quiet, loud = utilities(since)
    order = np.argsort(-probability, kind="stable")
    last = np.append(np.diff(probability[order]) != 0, True)       # hours of one probability go together
    gain, cut = np.cumsum((loud - quiet)[order])[last], probability[order][last]
    best = gain.argmax()
    threshold = cut[best] if gain[best] > 0 else np.nextafter(cut[0], np.inf)  # above all: no alarm
    utility = utilities_by(stay, since, probability >= threshold).sum(0)
    return float(threshold), float(normalised_utility(utility))


def ward_figures(stay, since, alarm) -> dict:
    """Returns what a ward would ask of these alarms [n] bool: the share of the septic stays that have one in
    the twelve hours before the onset; the median lead time in hours from the first such alarm to the onset,
    over stays that are not labelled 1 from their first hour on; false alarms a patient-day, which begin
    outside the time that counts."""
    lead = np.where(alarm & (since >= -EARLY) & (since < 0), -since, 0)
    hours = pd.DataFrame({"since": since, "alarm": alarm, "lead": lead}).groupby(stay)
    first, lead = hours["since"].first(), hours["lead"].max()  # [P] each
    septic, late = first > -np.inf, first >= -AHEAD            # late: labelled 1 from the first hour on
    false = alarm & ~hours["alarm"].shift(fill_value=False).to_numpy(bool) & ~in_time(since)
    timely, days = lead[~late & (lead > 0)], len(stay) / 24
    return {"septic_stays": int(septic.sum()), "labelled_from_the_first_hour": int(late.sum()),
            "warned": int((lead > 0).sum()), "share_warned": float((lead > 0).sum() / septic.sum()),
            "lead_hours": float(np.median(timely)) if len(timely) else None, "lead_stays": len(timely),
            "patient_days": days, "false_alarms": int(false.sum()),
            "false_alarms_a_day": float(false.sum() / days)}


def sepsis_figures(points: Points, probability, threshold: float) -> dict:
    """Returns plain numbers about the risk at these hours: the normalised utility of alarms from the
    threshold on, with its 95% interval by bootstrap over patients; AUROC and AUPRC of all hours and of those
    up to the onset; and `ward_figures`."""
    stay, subject, minute, label = points
    since, alarm = hours_since_onset(stay, minute, label), probability >= threshold
    utility = utilities_by(subject, since, alarm)
    limits = interval(utility_draws(utility)) if enough(subject, label) else None
    result = {"threshold": threshold,
              "utility": {"value": float(normalised_utility(utility.sum(0))), "interval": limits}}
    for name, hours in (("all_hours", since < np.inf), ("until_the_onset", since <= 0)):
        some = label[hours], probability[hours]
        result[name] = {"hours": int(hours.sum()), "auroc": float(roc_auc_score(*some)),
                        "auprc": float(average_precision_score(*some))}
    return result | ward_figures(stay, since, alarm)


# ------------------------------------------------------------------------------------------------------------
# Figures of the other kinds of answers: functions of weights [R, n], a row each sample of a bootstrap
# ------------------------------------------------------------------------------------------------------------

def resampled(measure, group) -> np.ndarray:
    """Returns the m numbers of a measure, a function of weights [R, n] of n points -> [R, m], as [1 + R, m]:
    of the points as they are, then of samples of their groups [n], which are the same for every measure, so
    that differences are paired. R is 1,000, 200 for many points, 0 for fewer than FEW groups."""
    rows, group = [measure(np.ones((1, len(group))))], np.unique(group, return_inverse=True)[1]
    groups, rng = group.max() + 1, np.random.default_rng(0)
    repeats = 200 if len(group) > RESAMPLED_LESS else 1000
    for _ in range(0, repeats if groups >= FEW else 0, 50):
        drawn = rng.multinomial(groups, np.full(groups, 1 / groups), 50)
        rows.append(measure(drawn[:, group].astype(float)))
    return np.concatenate(rows)


def measured(names: list[str], rows: np.ndarray) -> dict:
    """Returns {name: {"value", "interval"}} of the m numbers that are `resampled` in these rows [1 + R, m],
    with 95% intervals. A value is None where it is not determined, an interval where nothing was drawn."""
    value, *draws = rows
    intervals = map(interval, np.transpose(draws)) if draws else [None] * len(value)
    return {name: {"value": float(number) if np.isfinite(number) else None, "interval": limits}
            for name, number, limits in zip(names, value, intervals)}


def weighted_mean(weight, *columns) -> np.ndarray:
    """Returns the means [R, k] of k columns [n] by weights [R, n]."""
    return weight @ np.stack(columns, axis=1) / weight.sum(1, keepdims=True)


def ranking_measure(label, probability):
    """Returns the measure of AUROC and AUPRC of k outcomes: label [n, k] of 0 and 1 (NaN: none), probability
    [n, k] -> a function of weights [R, n] -> [R, 2 + 2k], of which the first two are the macro averages over
    the outcomes that have both classes."""
    outcomes = []
    for y, p in zip(label.T, probability.T):
        order = np.argsort(-p, kind="stable")
        order = order[~np.isnan(y[order])]
        outcomes.append((order, y[order], p[order]))

    def measure(weight):
        found = np.full((len(weight), 2, len(outcomes)), np.nan)
        for k, (order, y, p) in enumerate(outcomes):
            if 0 < y.sum() < len(y):
                with np.errstate(invalid="ignore", divide="ignore"):  # a sample may hold one class alone
                    found[:, :, k] = [ranks(y, p, w) for w in weight[:, order]]
        with np.errstate(invalid="ignore"):
            macro = np.nansum(found, 2) / np.isfinite(found).sum(2)
        return np.concatenate([macro, found.transpose(0, 2, 1).reshape(len(weight), -1)], axis=1)
    return measure


def class_measure(label, probability):
    """Returns the measure of the probabilities [n, C] of C classes, label [n]: accuracy, macro
    one-versus-rest AUROC, log loss, Cohen's kappa (1960) of the most probable class: [R, n] -> [R, 4]."""
    n, classes = probability.shape
    guess, own = probability.argmax(1), probability[np.arange(n), label]
    ranking = ranking_measure((label[:, None] == np.arange(classes)).astype(float), probability)

    def measure(weight):
        right, loss = weighted_mean(weight, guess == label, -np.log(own.clip(1e-12))).T
        total = weight.sum(1)
        shares = [[np.bincount(x, w, classes) / t for w, t in zip(weight, total)] for x in (label, guess)]
        chance = np.multiply(*shares).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            kappa = (right - chance) / (1 - chance)
        return np.stack([right, ranking(weight)[:, 0], loss, kappa], axis=1)
    return measure


def number_measure(number, median, low, high):
    """Returns the measure of predicted medians and 80% intervals [n] of numbers [n]: mean absolute error,
    root mean square error and Spearman's rank correlation of the median, share of the numbers within the
    interval and its mean width: [R, n] -> [R, 5]."""
    places = [np.unique(x, return_inverse=True)[1] for x in (number, median)]

    def correlation(w):
        of_rank = []
        for place in places:
            count = np.bincount(place, w)
            rank = (np.cumsum(count) - count / 2)[place]  # of equal values the mean
            of_rank.append(rank - w @ rank / w.sum())
        a, b = of_rank
        return (w * a) @ b / np.sqrt((w @ a**2) * (w @ b**2))

    def measure(weight):
        error = number - median
        mae, square, within, width = weighted_mean(weight, abs(error), error**2,
                                                   (low <= number) & (number <= high), high - low).T
        with np.errstate(invalid="ignore", divide="ignore"):
            spearman = [correlation(w) for w in weight]
        return np.stack([mae, np.sqrt(square), spearman, within, width], axis=1)
    return measure


# ------------------------------------------------------------------------------------------------------------
# Times to events: hours [n] and cause [n], 0 where censored
# ------------------------------------------------------------------------------------------------------------

MOST_STEPS = 1000  # of a curve that is kept


def censoring_curve(hours, cause, weight) -> tuple[np.ndarray, np.ndarray]:
    """Returns the times [s] at which points are censored, and the share [s] not yet censored after each: the
    Kaplan-Meier estimate, where an event of the same time comes before. Of more than MOST_STEPS steps those
    are kept that divide its fall evenly."""
    time, place = np.unique(hours, return_inverse=True)
    total, censored = np.bincount(place, weight), np.bincount(place, weight * (cause == 0))
    at_risk = total[::-1].cumsum()[::-1] - (total - censored)
    share = np.cumprod(1 - censored / np.maximum(at_risk, 1e-300))
    steps = np.flatnonzero(censored)
    if len(steps) > MOST_STEPS:
        fall = np.linspace(share[steps[0]], share[steps[-1]], MOST_STEPS)
        steps = np.unique(steps[np.searchsorted(-share[steps], -fall).clip(max=len(steps) - 1)])
    return time[steps], share[steps]


def uncensored(curve: tuple, hours) -> np.ndarray:
    """Returns the share [n] not censored by these hours [n], of a `censoring_curve`."""
    time, share = curve
    return np.append(1, share)[np.searchsorted(time, hours, side="right")]


def incidence_curve(hours, cause, weight, causes: int, horizons) -> np.ndarray:
    """Returns the cumulative incidence [causes, horizons] of each cause: the Aalen-Johansen estimate."""
    time, place = np.unique(hours, return_inverse=True)
    total = np.bincount(place, weight)
    at_risk = total[::-1].cumsum()[::-1]
    hazard = np.stack([np.bincount(place, weight * (cause == k + 1)) / at_risk for k in range(causes)])
    free = np.append(1, np.cumprod(1 - hazard.sum(0))[:-1])  # before each time
    return np.pad((free * hazard).cumsum(1), ((0, 0), (1, 0)))[:, np.searchsorted(time, horizons, "right")]


class LaterAndLower:
    """Sums over the elements of a sequence [m] that come after one that asks, do not ask themselves and have
    a lower risk; those of equal risk count half. By merging, so that m elements take m log(m) steps."""

    def __init__(self, risk, asks):
        size, place, rank = 1, np.arange(len(risk)), np.unique(risk, return_inverse=True)[1]
        self.levels = []
        while size < len(risk):  # the later half of each block of 2 * size serves the earlier half
            block, later = place // (2 * size), place // size % 2 == 1
            key, gives = block * len(risk) + rank, np.flatnonzero(later & ~asks)
            gives = gives[np.argsort(key[gives], kind="stable")]
            takes = np.flatnonzero(~later & asks)
            begin, first = (np.searchsorted(key[gives], least[takes]) for least in (block * len(risk), key))
            last = np.searchsorted(key[gives], key[takes], side="right")
            self.levels.append((gives, takes, begin, first, last))
            size *= 2

    def sums(self, value) -> np.ndarray:
        """value [m, R] -> [m, R], 0 of those that do not ask. (Samples come last: a row is moved at once.)"""
        result = np.zeros_like(value)
        for gives, takes, begin, first, last in self.levels:
            total = np.zeros((len(gives) + 1, value.shape[1]))
            np.cumsum(value[gives], axis=0, out=total[1:])
            result[takes] += (total[first] + total[last]) / 2 - total[begin]
        return result


def concordance_measure(hours, cause, k: int, risk, curve: tuple, until: float):
    """Returns the measure of concordance of risk [n] and cause k: the share of pairs, of an event of cause k
    before `until` hours and a point still without an event at that time, or one that another cause took
    before, in which the former has the higher risk; pairs are weighted by the inverse probability that both
    are not censored (Uno et al. 2011; Wolbers et al. 2014, section 3.2). curve: a `censoring_curve`. [R, n]
    -> [R, 1]."""
    share = uncensored(curve, hours)
    inverse = np.divide(1, share, out=np.zeros(len(share)), where=share > 0)
    mine, other = (cause == k) & (hours < until), (cause != k) & (cause != 0)
    # A sequence in which the elements after an event of cause k are those that have none at its time: of one
    # time first the events, then what asks for the later ones (each event of cause k), then the censored.
    asking, n = np.flatnonzero(mine), len(hours)
    element = np.concatenate([np.arange(n), asking])
    rank = np.concatenate([np.where(cause == 0, 2, 0), np.ones(len(asking))])
    order = np.lexsort((rank, hours[element]))
    element, asks = element[order], order >= n
    lower, of = LaterAndLower(risk[element], asks), element[asks]
    place = np.unique(risk, return_inverse=True)[1]
    at = place[of]

    def later(value):
        """Sums over the later points, of a lower risk and of all: value [R, n] -> [R, asking] each."""
        value = np.where(asks[:, None], 0, value.T[element])
        everything = value[::-1].cumsum(0)[::-1]
        return lower.sums(value)[asks].T, everything[asks].T

    def measure(weight):
        taken = weight * inverse * other
        total = np.stack([np.bincount(place, row, place.max() + 1) for row in taken])
        below = (total.cumsum(1) - total / 2)[:, at]
        (lower_free, free), (lower_taken, later_taken) = later(weight), later(taken)
        g, w = inverse[of], weight[:, of]
        right = w * g * (g * lower_free + below - lower_taken)
        pairs = w * g * (g * free + taken.sum(1, keepdims=True) - later_taken)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (right.sum(1) / pairs.sum(1))[:, None]
    return measure


def censoring_weights(hours, cause, horizons, curve: tuple) -> np.ndarray:
    """Returns the weights [n, horizons] with which points stand for those censored before a horizon: the
    inverse of the share not censored by the event, or by the horizon where none came before; 0 for those
    censored before it (Graf et al. 1999)."""
    early = hours[:, None] <= horizons
    by = uncensored(curve, np.where(early, hours[:, None], horizons))
    known = (~early | (cause > 0)[:, None]) & (by > 0)
    return np.divide(known, by, out=np.zeros(by.shape), where=known)


def brier_scores(hours, cause, k: int, incidence, horizons, curve: tuple) -> np.ndarray:
    """Returns what each point adds to the Brier score of cause k at each horizon: incidence [n, horizons] ->
    [n, horizons]."""
    happened = (hours[:, None] <= horizons) & (cause == k)[:, None]
    return censoring_weights(hours, cause, horizons, curve) * (happened - incidence) ** 2


def integrated(scores, horizons) -> np.ndarray:
    """Returns the mean over time, by the trapezoidal rule, of scores [..., horizons] -> [...]; of one horizon
    the score itself."""
    if len(horizons) == 1:
        return scores[..., 0]
    return np.trapezoid(scores, horizons) / (horizons[-1] - horizons[0])


# ------------------------------------------------------------------------------------------------------------
# Figures as tables of texts
# ------------------------------------------------------------------------------------------------------------

def cell(measure: dict, digits: int = 4) -> str:
    """Returns a measure and its interval as text; "-" where it is not determined."""
    value, limits = measure["value"], measure["interval"]
    return "-" if value is None else f"{value:.{digits}f} {bracketed(limits, min(digits, 3))}"


def measure_table(rows: dict, columns: dict, digits: int = 4) -> pd.DataFrame:
    """Returns the measures of each method or group with their intervals; empty where a group has none.
    columns: {measure: title}."""
    return pd.DataFrame({name: {title: cell(row[measure], digits) if measure in row else ""
                                for measure, title in columns.items()} for name, row in rows.items()}).T


def format_table(rows: dict, columns: dict) -> pd.DataFrame:
    """Returns the figures of each method or group as texts. columns: {title: format}."""
    return pd.DataFrame({name: {title: text.format(**row) for title, text in columns.items()}
                         for name, row in rows.items()}).T


# What figures are called.
TITLES = {"auroc": "AUROC", "auprc": "AUPRC", "slope": "calibration slope",
          "intercept": "calibration intercept", "excess": "observed - predicted",
          "ppv": "predictive value", "alarms": "alarms per 100",
          "auc": "AUROC", "log_loss": "log loss",
          "mae": "mean absolute error", "rmse": "root mean square error",
          "spearman": "rank correlation", "coverage": "coverage of the 80% interval", "width": "its width",
          "concordance": "concordance", "brier": "integrated Brier score"}


def figure_title(figure: str) -> str:
    """Returns what a figure is called; one of an outcome or a cause is named measure_NAME."""
    measure, _, name = (figure, "", "") if figure in TITLES else figure.partition("_")
    return TITLES.get(measure, measure) + f" of {name}" * bool(name)


RANKED = {"auroc": "AUROC", "auprc": "AUPRC"}
CALIBRATED = {"slope": "slope", "intercept": "intercept", "excess": "observed - predicted",
              "sensitivity": "sensitivity", "ppv": "PPV", "alarms": "alarms/100"}
SEPSIS = {"AUROC": "{all_hours[auroc]:.4f}", "AUPRC": "{all_hours[auprc]:.4f}",
          "up to the onset": "{until_the_onset[auroc]:.4f}, {until_the_onset[auprc]:.4f}",
          "alarm from": "{threshold:.4f}", "warned in the 12 hours before": "{share_warned:.1%} ({warned:,})",
          "median lead in hours": "{lead_hours}", "false alarms a patient-day": "{false_alarms_a_day:.2f}"}


def tables_of(figures: dict) -> dict[str, pd.DataFrame]:
    """Returns the figures of another kind than binary, see `Task.figures`, as tables of texts by their
    titles."""
    unit, methods = figures["resampled"], figures["methods"]
    intervals = figures["few"] or f"95% intervals by bootstrap over {figures[unit]:,} {unit}"
    titles = {name: figure_title(name) for name in methods[CHECKPOINT]}
    scored = f"Scored: {figures['points']:,} points in {figures['stays']:,} stays: {figures['scored']}"
    tables = {f"{scored}\n{intervals}": measure_table(methods, titles).T}
    if figures["differences"]:
        tables[f"{CHECKPOINT} less each of the others, paired"] = (
            measure_table(figures["differences"], titles).T)
    for variable, groups in figures["subgroups"].items():
        tables[f"By {variable}"] = measure_table(groups, titles, digits=2)
    return tables


def binary_tables(figures: dict) -> dict[str, pd.DataFrame]:
    """Returns what `score_figures` returns as tables of texts by their titles, with the figures of the model
    and of sepsis where they are among it."""
    unit, methods = figures["resampled"], figures["methods"]
    intervals = figures["few"] or f"95% intervals by bootstrap over {figures[unit]:,} {unit}"
    points = f"{figures['points']:,} points in " * (figures["points"] > figures["stays"])
    patients = f" of {figures['patients']:,} patients" * (unit == "patients")
    scored = (f"Scored: {points}{figures['stays']:,} stays{patients}, {figures['positive']:,} positive "
              f"({figures['prevalence']:.1%}): {figures['scored']}")
    tables = {f"{scored}\n{intervals}": headline(figures)}
    if len(methods) > 1:
        tables["Compared"] = measure_table(methods, RANKED)
    if figures["subgroups"]:
        rows = {"all": figures | methods[CHECKPOINT]}
        rows |= {f"{variable} {key}": group for variable, groups in figures["subgroups"].items()
                 for key, group in groups.items()}
        sizes = format_table(rows, {"stays": "{stays:6,}", "positive": "{positive:6,}"})
        tables[f"Subgroups (no interval below {FEW} {unit} of a label, no figure of one class alone)"] = (
            sizes.join(measure_table(rows, RANKED | CALIBRATED, digits=2)))
    if "sepsis" in figures:
        sepsis = figures["sepsis"]
        title = ("As the PhysioNet/CinC Challenge 2019 scores (the onset of sepsis is six hours after the "
                 "first label 1)\n{septic_stays:,} septic stays, {labelled_from_the_first_hour:,} of them "
                 "labelled from the first hour on and left out of the lead; {patient_days:,.0f} patient-days")
        tables[title.format(**sepsis[CHECKPOINT])] = (
            measure_table(sepsis, {"utility": "utility"}).join(format_table(sepsis, SEPSIS)))
    return tables


def headline(figures: dict) -> pd.DataFrame:
    """Returns a row for each figure of the checkpoint: its value, its interval and what it means."""
    own, unit = figures["methods"][CHECKPOINT], "points" if figures["points"] > figures["stays"] else "stays"
    rows = {
        "AUROC": (cell(own["auroc"]), ""),
        "AUPRC": (cell(own["auprc"]), "prevalence {prevalence:.4f}"),
        "Brier score": ("{brier:.4f}", "prevalence alone: {brier_of_prevalence:.4f}"),
        "Calibration error": ("{calibration_error:.4f}", "expected, 10 bins of equal counts"),
        "Calibration slope": (cell(own["slope"]), "1 where calibrated"),
        "Calibration intercept": (cell(own["intercept"]), "0 where calibrated"),
        "Observed - predicted": (cell(own["excess"]), "0 where calibrated"),
        "Mean probability": ("{probability[mean]:.4f}",
                             "range {probability[min]:.4f} to {probability[max]:.4f}, below 0.01: "
                             "{probability[below_0.01]}, above 0.99: {probability[above_0.99]}"),
        "Sensitivity": (cell(own["sensitivity"]), "of alarms from {alarm[threshold]:.4f} on, where these "
                                                  "labels' sensitivity reaches {alarm[sensitivity]:g}"),
        "Predictive value": (cell(own["ppv"]), "the share of these alarms that are true"),
        f"Alarms per 100 {unit}": (cell(own["alarms"]), ""),
        "F1": ("{f1:.4f}", "from {threshold:.4f} on ({threshold_is}): TP {confusion[tp]}, "
                           "FP {confusion[fp]}, FN {confusion[fn]}, TN {confusion[tn]}")}
    if "model" in figures:
        rows |= {"Head parameters": ("{model[head_parameters]:,}", "of {model[parameters]:,}"),
                 "Active units": ("{model[active_units]}",
                                  "of {model[latent_dim]} (variance of mu over sets > 0.01)")}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value and 95% interval", ""])
    return table.map(lambda text: text.format(**figures))
