"""Figures of probabilities: discrimination, calibration, alarms, with bootstrap intervals. Functions of flat arrays."""

import itertools

import numpy as np
from sklearn.metrics import (average_precision_score, brier_score_loss, confusion_matrix, f1_score, roc_auc_score)


# ----------------------------------------------------------------------------------------------------------------------
# Discrimination, calibration, alarms
# ----------------------------------------------------------------------------------------------------------------------

def ranks(label, p, weight) -> tuple[float, float]:
    """AUROC and AUPRC as scikit-learn has them, of weighted points [n] in the order of falling p: without its sorting
    and checking, which would be nearly all of a bootstrap's time."""
    last = np.append(np.flatnonzero(np.diff(p)), len(p) - 1)                        # of each distinct p
    tp, alarms = np.cumsum(weight * label)[last], np.cumsum(weight)[last]
    fp, gained = alarms - tp, np.diff(tp, prepend=0)
    auroc = (np.diff(fp, prepend=0) * (tp - gained / 2)).sum() / (tp[-1] * fp[-1])
    return auroc, (gained * tp / np.maximum(alarms, 1e-300)).sum() / tp[-1]


def bootstrap(group, label, *probabilities, measures=(ranks,), repeats: int = 1000, seed: int = 0) -> np.ndarray:
    """[repeats, n, m] the m numbers that `measures` give of n methods on the same resampled groups, such as stays, of
    points (Efron & Tibshirani 1993): paired between methods. group, label [points]; each measure is a function of
    label, probability and weight [points], in the order of falling probability, and gives several numbers."""
    rng = np.random.default_rng(seed)
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


def logit(p, least: float = 1e-12) -> np.ndarray:
    """Log odds of probabilities, which are kept so far from 0 and 1."""
    p = np.clip(p, least, 1 - least)
    return np.log(p / (1 - p))


def recalibration(label, p, weight) -> tuple[float, float]:
    """Slope and intercept of logit P(label) = intercept + slope logit(p) (Cox 1958), by Newton's method: 1 and 0 where
    p is calibrated, NaN where they are not determined (p constant, or parting the classes). All [n]."""
    rate = weight @ label / weight.sum()
    x, slope, intercept = logit(p), 0.0, np.log(rate / (1 - rate))
    for _ in range(25):
        q = (1 + np.tanh((slope * x + intercept) / 2)) / 2
        error, spread = weight * (label - q), weight * q * (1 - q)
        gx, g1, hxx, hx1, h11 = error @ x, error.sum(), (spread * x) @ x, spread @ x, spread.sum()
        determinant = hxx * h11 - hx1 ** 2
        if not determinant > 1e-12 * hxx * h11:
            break
        step = (h11 * gx - hx1 * g1) / determinant, (hxx * g1 - hx1 * gx) / determinant
        slope, intercept = slope + step[0], intercept + step[1]
        if max(map(abs, step)) < 1e-6:
            return slope, intercept
    return np.nan, np.nan


def threshold_of(label, probability, sensitivity: float) -> float:
    """The highest probability from which on an alarm finds this share of the positives."""
    positives = np.sort(probability[label == 1])[::-1]
    return float(positives[int(np.ceil(sensitivity * len(positives) - 1e-9)) - 1])


def alarm_from(threshold: float):
    """The measure of an alarm from this probability on: sensitivity, positive predictive value (NaN: no alarm), alarms
    per 100 points."""
    def alarm(label, p, weight):
        raised = p >= threshold
        alarms, true = weight @ raised, weight @ (raised * label)
        return true / (weight @ label), true / alarms if alarms else np.nan, 100 * alarms / weight.sum()
    return alarm


THRESHOLDS = np.arange(1, 200) / 200


def net_benefit(label, probability) -> dict:
    """At each of THRESHOLDS t the share of true alarms less t / (1 - t) times that of false ones (Vickers & Elkin
    2006), of alarms from probability t on and of alarms for all; of no alarm it is 0."""
    true, false = (len(p) - np.searchsorted(np.sort(p), THRESHOLDS)
                   for p in (probability[label == 1], probability[label == 0]))
    odds, prevalence = THRESHOLDS / (1 - THRESHOLDS), label.mean()
    return {"threshold": THRESHOLDS.tolist(), "net_benefit": ((true - odds * false) / len(label)).tolist(),
            "alarm_for_all": (prevalence - odds * (1 - prevalence)).tolist()}


RESAMPLED_LESS = 20_000  # points, of which a bootstrap draws 200 samples, not 1,000
FEW = 10              # stays with a positive label, or with a negative one, below which an interval means nothing


def few(stays, label) -> str:
    """What to say where there is too little to give an interval; else nothing. stays, label [points]."""
    positive, negative = (len(np.unique(stays[label == value])) for value in (1, 0))
    return (f"stays with a positive label: {positive}, with a negative one: {negative}; below {FEW} of each no "
            "interval is given, and the figures may be chance" if min(positive, negative) < FEW else "")


def with_intervals(stays, label, probability, measures: dict) -> dict:
    """{name: {"value": .., "interval": 95% by resampling stays, None where they are few}} of these measures, functions
    as `bootstrap` takes them with the names of the numbers that each gives."""
    order = np.argsort(-probability, kind="stable")
    ordered = label[order], probability[order], np.ones(len(order))
    values = [number for measure in measures for number in measure(*ordered)]
    intervals = [None] * len(values)
    if not few(stays, label):
        draws = bootstrap(stays, label, probability, measures=measures,
                          repeats=200 if len(label) > RESAMPLED_LESS else 1000)[:, 0]
        determined = [column[np.isfinite(column)] for column in draws.T]
        intervals = [np.percentile(column, [2.5, 97.5]).tolist() if len(column) > len(draws) / 2 else None
                     for column in determined]
    names = [name for names in measures.values() for name in names]
    return {name: {"value": float(value) if np.isfinite(value) else None, "interval": interval}
            for name, value, interval in zip(names, values, intervals)}


RANKS = {ranks: ("auroc", "auprc")}


def interval(draws: np.ndarray) -> str:
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"[{low:.3f}, {high:.3f}]"


def calibration_error(label, probability, bins: int = 10) -> float:
    """Expected calibration error over bins of equal width (Guo et al. 2017, eq. 3)."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    gap = np.abs(np.bincount(which, label, bins) - np.bincount(which, probability, bins))
    return float(gap[count > 0].sum() / len(label))


def mean_of_logits(probabilities) -> np.ndarray:
    """[n] of k of [n]."""
    return 1 / (1 + np.exp(-logit(probabilities).mean(0)))


# ----------------------------------------------------------------------------------------------------------------------
# All figures of a method
# ----------------------------------------------------------------------------------------------------------------------

CHECKPOINT = "this checkpoint"


def score_figures(stays, label, methods: dict, threshold: float, sensitivity: float = .8, groups: dict = {}) -> dict:
    """Plain numbers about the probabilities [n] of each method on points of these stays [n] with `label` [n]; the
    checkpoint's in full, also in groups: {variable: {group: mask [n]}}."""
    probability, prevalence = methods[CHECKPOINT], label.mean()
    alarm = threshold_of(label, probability, sensitivity)
    full = RANKS | {recalibration: ("slope", "intercept"), alarm_from(alarm): ("sensitivity", "ppv", "alarms")}
    compared = {name: with_intervals(stays, label, p, full if name == CHECKPOINT else RANKS)
                for name, p in methods.items()}
    divided = {variable: {key: group_figures(stays[mask], label[mask], probability[mask], full)
                          for key, mask in masks.items()} for variable, masks in groups.items()}
    tn, fp, fn, tp = confusion_matrix(label, probability >= threshold).ravel().tolist()
    return {"stays": len(np.unique(stays)), "points": len(label), "positive": int(label.sum()),
            "prevalence": float(prevalence), "few": few(stays, label), "methods": compared,
            "brier": float(brier_score_loss(label, probability)),
            "brier_of_prevalence": float(prevalence * (1 - prevalence)),
            "calibration_error": calibration_error(label, probability),
            "probability": {"mean": float(probability.mean()), "min": float(probability.min()),
                            "max": float(probability.max()),
                            "below_0.01": int((probability < .01).sum()), "above_0.99": int((probability > .99).sum())},
            "alarm": {"sensitivity": sensitivity, "threshold": alarm}, "subgroups": divided,
            "net_benefit": net_benefit(label, probability),
            "threshold": threshold, "confusion": {"tp": tp, "fp": fp, "fn": fn, "tn": tn},
            "f1": float(f1_score(label, probability >= threshold))}


def group_figures(stays, label, probability, measures: dict) -> dict:
    """The size of a group and, where it holds both classes, its measures."""
    size = {"stays": len(np.unique(stays)), "points": len(label), "positive": int(label.sum())}
    return size | (with_intervals(stays, label, probability, measures) if 0 < label.sum() < len(label) else {})


def best_shares(log_odds: np.ndarray, label: np.ndarray, steps: int = 10) -> np.ndarray:
    """The shares (tenths) of k answers' log odds [k, n] that give the least cross-entropy at these labels [n]; equal
    ones, where ten of a class are not there to tell: [k]."""
    if np.bincount(label, minlength=2).min() < 10:
        return np.full(len(log_odds), 1 / len(log_odds))
    falling, sign = range(steps, -1, -1), np.where(label == 1, -1, 1)  # of equal ones the first answer's largest share
    shares = np.array([s for s in itertools.product(falling, repeat=len(log_odds)) if sum(s) == steps]) / steps
    return min(shares, key=lambda share: np.logaddexp(0, sign * (share @ log_odds)).mean())


# ----------------------------------------------------------------------------------------------------------------------
# The PhysioNet/CinC Challenge 2019: how an hour's alarm is scored (Reyna et al., Crit Care Med 2020;48(2):210-217)
# ----------------------------------------------------------------------------------------------------------------------

# The label of an hour turns 1 six hours before the onset of sepsis and stays 1; the record ends a few hours after it. An
# alarm is worth most at the first label, little twelve hours before the onset, nothing from three hours after it on.
# Everything here is a function of flat arrays over hours, [n] each: of the stay (any integer), the minute, the label.

AHEAD, EARLY, LATE = 6, 12, 3  # hours: the label before the onset s; an alarm counts in [s - EARLY, s + LATE]
FALSE_ALARM = -0.05            # utility of an hour's alarm without sepsis, or too early


def of_challenge_2019(stay, minute, label) -> bool:
    """Whether these labelled points are the challenge's: hourly, once 1 always 1, and 1 for no more hours than from the
    first label to the end of the time that counts. Points of a stay rise and stand together."""
    within = np.diff(stay) == 0
    hourly, rising = np.diff(minute)[within] == 60, np.diff(label)[within] >= 0
    longest = np.bincount(np.unique(stay, return_inverse=True)[1], label == 1).max(initial=0)
    return bool(within.any() and hourly.all() and rising.all() and 1 < longest <= AHEAD + LATE + 1)


def hours_since_onset(stay, minute, label) -> np.ndarray:
    """[n] hours since the onset of the stay's sepsis (six hours after the first label 1), negative before it; -inf in a
    stay without."""
    stay = np.unique(stay, return_inverse=True)[1]
    first = np.full(stay.max(initial=-1) + 1, np.inf)
    np.minimum.at(first, stay[label == 1], minute[label == 1])
    return (minute - first[stay]) / 60 - AHEAD


def utilities(since) -> tuple[np.ndarray, np.ndarray]:
    """Utility [n] of no alarm, and of an alarm, at hours `since` the onset."""
    early, late = since <= -AHEAD, (since > -AHEAD) & (since <= LATE)
    septic = since > -np.inf
    quiet = np.where(late, -2 * (since + AHEAD) / (AHEAD + LATE), 0)
    rise = np.maximum((since + EARLY) / (EARLY - AHEAD), FALSE_ALARM)
    alarm = np.where(early & septic, rise, np.where(late, (LATE - since) / (AHEAD + LATE), 0))
    return np.where(septic, quiet, 0), np.where(septic, alarm, FALSE_ALARM)


def in_time(since) -> np.ndarray:
    """Where the best possible has its alarms: from s - 12 to s + 3 in stays with sepsis, never in others."""
    return (since >= -EARLY) & (since <= LATE)


def stay_utilities(stay, since, alarm) -> np.ndarray:
    """[P, 3] utility of each stay, in ascending order: with these alarms [n] bool, without any, with the best."""
    quiet, loud = utilities(since)
    stay = np.unique(stay, return_inverse=True)[1]
    return np.stack([np.bincount(stay, np.where(chosen, loud, quiet))
                     for chosen in (alarm, np.zeros(len(alarm), dtype=bool), in_time(since))], axis=1)


def normalised_utility(utility) -> np.ndarray:
    """[..., 3] sums over stays of `stay_utilities` -> [...]: 0 without any alarm, 1 with the best possible."""
    own, none, best = np.moveaxis(utility, -1, 0)
    return (own - none) / (best - none)


def utility_draws(utility: np.ndarray, repeats: int, seed: int = 0) -> np.ndarray:
    """[repeats] normalised utility of as many stays, drawn from these [P, 3] anew; NaN: a sample without sepsis."""
    stays = len(utility)
    sums = np.random.default_rng(seed).multinomial(stays, np.full(stays, 1 / stays), repeats) @ utility
    draws, septic = np.full(repeats, np.nan), sums[:, 2] > sums[:, 1]
    draws[septic] = normalised_utility(sums[septic])
    return draws


def best_utility_threshold(stay, since, probability) -> tuple[float, float]:
    """The probability from which an alarm pays most over these hours, and the normalised utility that it gives."""
    quiet, loud = utilities(since)
    order = np.argsort(-probability, kind="stable")
    last = np.append(np.diff(probability[order]) != 0, True)       # hours of one probability go together
    gain, cut = np.cumsum((loud - quiet)[order])[last], probability[order][last]
    best = gain.argmax()
    threshold = cut[best] if gain[best] > 0 else np.nextafter(cut[0], np.inf)  # above all: no alarm
    return float(threshold), float(normalised_utility(stay_utilities(stay, since, probability >= threshold).sum(0)))


def ward_figures(stay, since, alarm) -> dict:
    """What a ward would ask of these alarms [n] bool: of the stays with sepsis the share with one in the twelve hours
    before the onset, the median lead time in hours from the first of these to the onset (stays whose first label is
    already 1 aside), and false alarms a patient-day: those that begin outside the time that counts."""
    begins = np.append(True, np.diff(stay) != 0)                   # the first hour of a stay
    stay = np.cumsum(begins) - 1
    septic, late = since[begins] > -np.inf, since[begins] >= -AHEAD  # [P]; late: labelled 1 from its first hour on
    warning, lead = alarm & (since >= -EARLY) & (since < 0), np.zeros(begins.sum())
    np.maximum.at(lead, stay[warning], -since[warning])
    false = alarm & (begins | ~np.append(False, alarm[:-1])) & ~in_time(since)
    timely, days = lead[~late & (lead > 0)], len(stay) / 24
    return {"septic_stays": int(septic.sum()), "labelled_from_the_first_hour": int(late.sum()),
            "warned": int((lead > 0).sum()), "share_warned": float((lead > 0).sum() / septic.sum()),
            "lead_hours": float(np.median(timely)) if len(timely) else None, "lead_stays": len(timely),
            "patient_days": days, "false_alarms": int(false.sum()), "false_alarms_a_day": float(false.sum() / days)}


def sepsis_figures(stay, minute, label, probability, threshold: float, repeats: int = 200, seed: int = 0) -> dict:
    """Plain numbers about the risk at these hours: normalised utility with its 95% interval over stays (bootstrap),
    AUROC and AUPRC of all hours and of those not after the onset, and what `ward_figures` tells."""
    since, alarm = hours_since_onset(stay, minute, label), probability >= threshold
    utility = stay_utilities(stay, since, alarm)
    interval = np.nanpercentile(utility_draws(utility, repeats, seed), [2.5, 97.5]).tolist()
    result = {"threshold": threshold, "utility": {"value": float(normalised_utility(utility.sum(0))), "interval": interval}}
    for name, hours in (("all_hours", since < np.inf), ("until_the_onset", since <= 0)):
        result[name] = {"hours": int(hours.sum()), "auroc": float(roc_auc_score(label[hours], probability[hours])),
                        "auprc": float(average_precision_score(label[hours], probability[hours]))}
    return result | ward_figures(stay, since, alarm)
