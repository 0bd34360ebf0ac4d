"""Why an answer is what it is: what it would be if some events had not been charted.

A model of sets can leave events out and still has a valid input: nothing is filled in. The backbone, the
summaries and the trees no longer see the events. A set that loses all of its events is gone too. The question
stays at its minute. Leaving one out misses what two variables tell alike: without either of them the other
still tells it."""

import zlib
from dataclasses import replace
from typing import Callable, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from batches import StayDataset, answered_points
from data import Cohort, InputError, build_cohort, ranges, search_after, shortest
from metrics import logit, measured, ranking_measure, resampled, weighted_mean
from questions import at_end, at_every_minute, with_points
from runs import answers_at, encode_points, progress


# ------------------------------------------------------------------------------------------------------------
# Which questions are explained
# ------------------------------------------------------------------------------------------------------------

def moment(at: str, threshold: float | None) -> float | None:
    """The number of minutes that `at` is; None: it is a word of `questions_at`. Raises InputError where it is
    neither, and for first_alarm without a threshold."""
    if at == "first_alarm" and threshold is None:
        raise InputError("--explain_at first_alarm: the checkpoint keeps no threshold of alarms; give "
                         "highest or last")
    if at in ("last", "first_alarm", "highest", "all"):
        return None
    try:
        minute = float(at)
    except ValueError:
        minute = np.nan
    if not abs(minute) < 1e8:
        raise InputError(f"--explain_at {at}: give last, first_alarm, highest, all or a number of minutes "
                         "after admission")
    return minute


def questions_at(model, dataset: StayDataset, stays, at: str, threshold: float | None, device
                 ) -> tuple[StayDataset, np.ndarray]:
    """The data, asked where `at` says, and the points [n] of these stays that are explained: of those with an
    answer the `last`, `all`, that of the `highest` risk or the `first_alarm` (the risk reaches the
    threshold), of all minutes at which something was charted or asked; or the one a number of minutes after
    admission. Raises InputError as `moment` does, and where there is no such point."""
    over_time, cohort, minute = at in ("highest", "first_alarm"), dataset.cohort, moment(at, threshold)
    if over_time:
        cohort = at_every_minute(cohort, stays)
    elif minute is not None:
        cohort = with_points(cohort, np.ones(len(cohort), dtype=np.int64), cohort.admission + minute)
    dataset = dataset.of(cohort)
    points = answered_points(dataset)
    points = points[np.isin(cohort.point_stay[points], stays)]
    rows = pd.DataFrame({"point": points, "stay": cohort.point_stay[points]})
    if over_time:
        rows["risk"] = answers_at(model, dataset, points, device)[:, model.task.followed]
    if at == "first_alarm":
        rows = rows[rows["risk"] >= threshold].drop_duplicates("stay")
    elif at == "highest":
        rows = rows.loc[rows.groupby("stay")["risk"].idxmax()]
    elif at != "all":
        rows = rows.drop_duplicates("stay", keep="last")
    if rows.empty:
        raise InputError(f"--explain_at {at}: none of {len(stays):,} stays has such a question with an "
                         "answer; give another moment")
    return dataset, rows["point"].to_numpy()


# ------------------------------------------------------------------------------------------------------------
# The answers without some events
# ------------------------------------------------------------------------------------------------------------

class Variants(NamedTuple):
    """What is left of the E events up to a question: variant i keeps those where keeps(key, value[i])."""

    keeps: Callable
    key: np.ndarray    # [E]
    value: np.ndarray  # [n]


def explained(task) -> tuple[str, ...]:
    """The names of the k numbers that are explained, see `log_odds`."""
    if task.kind == "event":
        return (task.columns[len(task.horizons) - 1],)
    return ("median",) if task.kind == "number" else task.names


def scale(task) -> str:
    """What a change is a change of."""
    return "median" if task.kind == "number" else "log odds"


def log_odds(task, logits) -> np.ndarray:
    """What is explained of logits [n, outputs], [n, k] float64: the log odds of each outcome or class; of a
    number its median; of an event the log odds of the first cause at the largest horizon."""
    if task.kind in ("binary", "several"):
        return logits.double().unflatten(-1, (-1, 2)).diff(dim=-1)[..., 0].cpu().numpy()
    answer = task.answer(logits)
    if task.kind == "classes":
        return logit(answer)
    answer = answer[:, [task.columns.index(explained(task)[0])]]
    return logit(answer) if task.kind == "event" else answer


_MOST_HELD = 2**18  # events of the variants that are held at once


def events_until(cohort: Cohort, points) -> tuple[np.ndarray, np.ndarray]:
    """[n] the first event of the stay of each of these points, and the end of those not after the point."""
    stay = cohort.point_stay[points]
    first = cohort.stay_start[stay]
    end = search_after(cohort.set_minute, cohort.point_minute[points], first, cohort.stay_start[stay + 1])
    return cohort.set_start[first], cohort.set_start[end]


def log_odds_of(model, dataset: StayDataset, points, variants: list[Variants], device) -> list[np.ndarray]:
    """What is explained (`log_odds`), [n, k] of the n variants of each of these points. NaN: the variant
    keeps no event of a variable that the checkpoint knows."""
    cohort, task = dataset.cohort, model.task
    first, end = events_until(cohort, points)
    known = [dataset.variable[cohort.event_variable[a:b]] >= 0 for a, b in zip(first, end)]
    count = np.array([len(each.value) for each in variants], dtype=np.int64)
    question, number = np.repeat(np.arange(len(points)), count), ranges(np.zeros_like(count), count)
    found = np.full((len(question), len(explained(task))), np.nan)
    part = np.cumsum((end - first)[question]) // _MOST_HELD
    parts = np.split(np.arange(len(question)), np.flatnonzero(np.diff(part)) + 1)
    for rows in progress(parts, len(parts), "explanations"):
        row, event = [], []
        for q in np.unique(question[rows]):
            mine, (keeps, key, value) = rows[question[rows] == q], variants[q]
            kept = keeps(key, value[number[mine], None])                                             # [r, E]
            place, of = np.nonzero(kept & (kept & known[q]).any(1, keepdims=True))
            row.append(mine[place])
            event.append(first[q] + of)
        used, copy = np.unique(np.concatenate(row), return_inverse=True)
        if len(used):
            asked = points[question[used]]
            copies, origin = rebuilt(cohort, cohort.point_stay[asked], copy, np.concatenate(event))
            size = np.diff(copies.set_start)
            whole = size == cohort.set_start[origin + 1] - cohort.set_start[origin]
            copies = dataset.of(replace(copies, point_minute=cohort.point_minute[asked]))
            same = np.where(whole, origin, -1 - np.arange(len(origin)))
            found[used] = log_odds(task, logits_of(model, copies, same, device))
    return np.split(found, np.cumsum(count)[:-1])


def rebuilt(cohort: Cohort, stay, copy, event) -> tuple[Cohort, np.ndarray]:
    """A cohort of n stays that hold some of these events, each asked at its end, and the set [T] of this
    cohort that each of its sets is a part of. stay [n]: whose ids and clock they have; copy [e], ascending:
    the new stay of each event; event [e]: its index."""
    sets = np.searchsorted(cohort.set_start, event, side="right") - 1
    begin = np.flatnonzero((np.diff(copy, prepend=-1) != 0) | (np.diff(sets, prepend=-1) != 0))         # [T]
    ids = {name: getattr(cohort, name)[stay] for name in ("stay_id", "subject", "origin", "split")}
    return at_end(replace(
        cohort, event_variable=cohort.event_variable[event], event_value=cohort.event_value[event],
        event_offset=cohort.event_offset[:0], set_start=np.append(begin, len(event)),
        set_minute=cohort.set_minute[sets[begin]],
        stay_start=np.searchsorted(copy[begin], np.arange(len(stay) + 1)), **ids)), sets[begin]


def logits_of(model, dataset: StayDataset, same, device) -> torch.Tensor:
    """The logits [n, outputs] at the one question of each stay. Sets with the same number, `same` [T], are
    encoded once: most sets of most variants are whole."""
    cohort = dataset.cohort
    _, alone, code = np.unique(same, return_index=True, return_inverse=True)
    size = cohort.set_start[alone + 1] - cohort.set_start[alone]
    stay = np.searchsorted(cohort.stay_start, alone, side="right") - 1
    sets, _ = rebuilt(cohort, stay, np.repeat(np.arange(len(alone)), size),
                      ranges(cohort.set_start[alone], size))
    z = encode_points(model, dataset.of(sets), np.arange(len(alone)), device,
                      lambda model, batch: model.fused(*model.setvae.encode(batch)))               # [sets, d]
    code, start = (torch.from_numpy(x).to(device) for x in (code, cohort.stay_start))
    code = F.pad(code, (0, 1), value=len(z))                                  # the last: of a slot of padding

    def features(model, batch):
        slot = torch.arange(batch.minute.shape[1], device=device)
        sets = torch.where(slot < batch.lengths[:, None], start[batch.stay, None] + slot, len(code) - 1)
        own = F.embedding(code[sets], F.pad(z, (0, 0, 0, 1)))                                     # [B, L, d]
        return model.features_of(own, model.history(own, batch.minute), batch)                 # [B, 1, F]
    return encode_points(model, dataset, np.arange(len(cohort)), device, features, model.classify)


# ------------------------------------------------------------------------------------------------------------
# Explanations
# ------------------------------------------------------------------------------------------------------------

def changes(model, dataset: StayDataset, points, level: str, device) -> list[tuple[np.ndarray, np.ndarray]]:
    """How much higher the log odds are with the events of each `variable`, or with each `event`, than without
    them. Returns for each point the group [E] of each event up to it (-1: the checkpoint does not know its
    variable) and the change [groups, k] of each (NaN: nothing would be left to answer by)."""
    cohort, groups = dataset.cohort, []
    for first, end in zip(*events_until(cohort, points)):
        variable = dataset.variable[cohort.event_variable[first:end]]
        known, group = variable >= 0, np.full(end - first, -1)
        group[known] = (np.unique(variable[known], return_inverse=True)[1] if level == "variable"
                        else np.arange(known.sum()))
        groups.append(group)
    # Nothing is of group -2: the first variant keeps all.
    variants = [Variants(np.not_equal, group, np.append(-2, np.arange(group.max() + 1))) for group in groups]
    found = log_odds_of(model, dataset, points, variants, device)
    return [(group, each[0] - each[1:]) for group, each in zip(groups, found)]


def explanations(model, dataset: StayDataset, points, device, events: int = 10) -> pd.DataFrame:
    """The rows of `--explain`: for each point every variable and its largest `events`, those that matter most
    first. event_minute and value are those of the event, of a variable its last; change: see `changes`.
    Minutes count from the zero of hours (`Cohort.admission`)."""
    cohort, names, rows = dataset.cohort, explained(model.task), []
    first, _ = events_until(cohort, points)
    for level, most in [("variable", None), ("event", events)][:1 + (events > 0)]:
        for q, (group, change) in enumerate(changes(model, dataset, points, level, device)):
            last, known = np.zeros(len(change), dtype=np.int64), np.flatnonzero(group >= 0)
            np.maximum.at(last, group[known], known)
            for k, outcome in enumerate(names):
                order = np.argsort(-np.abs(change[:, k]), kind="stable")[:most]
                rows.append(pd.DataFrame({"question": q, "outcome": outcome, "level": level,
                                          "event": first[q] + last[order], "change": change[order, k]}))
    table = pd.concat(rows).sort_values("question", kind="stable", ignore_index=True)
    event, point = table["event"].to_numpy(), points[table["question"]]
    sets = np.searchsorted(cohort.set_start, event, side="right") - 1
    stay = cohort.point_stay[point]
    zero = cohort.admission[stay]
    several = {"outcome": table["outcome"]} if len(names) > 1 else {}
    return pd.DataFrame({"stay_id": cohort.stay_id[stay], "minute": cohort.point_minute[point] - zero,
                         **several, "level": table["level"],
                         "variable": np.array(cohort.variables, dtype=object)[cohort.event_variable[event]],
                         "event_minute": cohort.set_minute[sets] - zero,
                         "value": shortest(cohort.event_value[event]), "change": table["change"]})


def by_variable(model, dataset: StayDataset, point: int, device) -> dict[str, float | None]:
    """How much each variable raises (lowers: negative) what this one question is answered, those that matter
    most first; of several outcomes the first. None: nothing would be left to answer by."""
    rows = explanations(model, dataset, np.array([point]), device, events=0)
    if "outcome" in rows:
        rows = rows[rows["outcome"] == explained(model.task)[0]]
    return {name: None if np.isnan(change) else change
            for name, change in zip(rows["variable"], rows["change"])}


def reasons(predictor, sets: list, most: int) -> list[str]:
    """The variables with the largest changes at the end of a stay of these sets, (minute, [(variable, value),
    ...]) each, as texts such as "Lactate +0.312"."""
    # An event that no checkpoint knows stands for a set without any.
    rows = [(i, minute, *event) for i, (minute, events) in enumerate(sets)
            for event in events or [("", np.nan)]]
    key, minute, variable, value = map(np.array, zip(*rows))
    names, variable = np.unique(variable, return_inverse=True)
    cohort = build_cohort("followed", names, np.zeros_like(key), minute, variable, value, ["stay"],
                          set_key=key)
    dataset = StayDataset(cohort, predictor.checkpoint.normalizer, points=True)
    changed = by_variable(predictor.model, dataset, 0, predictor.device)
    return [f"{name} {change:+.3f}" for name, change in list(changed.items())[:most] if change is not None]


def importance(table: pd.DataFrame) -> pd.DataFrame:
    """The mean |change| by variable over the questions of a table of `explanations`, a column an outcome, the
    largest first; a question without the variable counts as 0."""
    rows = table[table["level"] == "variable"]
    questions = len(rows[["stay_id", "minute"]].drop_duplicates())
    outcome = rows["outcome"] if "outcome" in rows else "mean |change|"
    means = rows.assign(outcome=outcome, size=rows["change"].abs()).pivot_table(
        index="variable", columns="outcome", values="size", aggfunc="sum", sort=False) / questions
    return means.loc[means.mean(axis=1).sort_values(ascending=False, kind="stable").index]


# ------------------------------------------------------------------------------------------------------------
# Are they faithful?
# ------------------------------------------------------------------------------------------------------------

SHARES = np.arange(11) / 20  # of a question's events that are removed
RANDOM_ORDERS = 5


def orders_of(dataset: StayDataset, first: int, group, changed: dict, name: str) -> dict[tuple, np.ndarray]:
    """The rank [E] in which a question's events, from the index `first` on, are removed in each order; beyond
    all where the checkpoint does not know the variable (group -1). changed: by level the change [E] of each
    event; name: of the stay, which seeds the random orders."""
    cohort, event = dataset.cohort, np.flatnonzero(group >= 0) + first
    value = np.nan_to_num(cohort.event_value[event])
    z = dataset.normalizer(dataset.variable[cohort.event_variable[event]], value)
    z[np.isnan(cohort.event_value[event])] = 0
    least_first = {("|z-score|", "both"): -np.abs(z)}
    for level, change in changed.items():
        change = change[group >= 0]
        least_first |= {(level, "raises"): -change, (level, "lowers"): change,
                        (level, "both"): -np.abs(change)}
    for i in range(RANDOM_ORDERS):
        least_first["random", i] = np.random.default_rng([i, zlib.crc32(name.encode())]).random(len(event))
    ranks = {}
    for order, score in least_first.items():
        ranks[order] = np.full(len(group), len(group))
        ranks[order][event - first] = np.argsort(np.argsort(score, kind="stable"))
    return ranks


def faithfulness(model, dataset: StayDataset, points, device) -> dict:
    """Removes the events of these questions [m] cumulatively in the order in which an explanation says that
    they raise or lower the log odds (of several outcomes those of the first). The area lies between the curve
    of the log odds over the `SHARES` removed and the mean of RANDOM_ORDERS random orders; it is positive
    where the explanation is better (Samek et al. 2017). The order of |z-score| does not know raise from
    lower. Of a binary outcome also the AUROC where the 5% with the largest |change| are gone. Intervals by
    bootstrap over stays."""
    cohort, stay = dataset.cohort, dataset.cohort.point_stay[points]
    by_level = {level: changes(model, dataset, points, level, device) for level in ("variable", "event")}
    ranks = []
    for q, first in enumerate(events_until(cohort, points)[0]):
        changed = {f"by {level}": np.append(np.nan_to_num(change[:, 0]), 0)[group]
                   for level, (group, change) in ((level, each[q]) for level, each in by_level.items())}
        ranks.append(orders_of(dataset, first, by_level["event"][q][0], changed, cohort.stay_id[stay[q]]))
    number = [np.rint(SHARES * (group >= 0).sum()).astype(int) for group, _ in by_level["event"]]
    curves = {}
    for order in ranks[0]:
        variants = [Variants(np.greater_equal, rank[order], size) for rank, size in zip(ranks, number)]
        curves[order] = np.stack([x[:, 0] for x in log_odds_of(model, dataset, points, variants, device)])
    random = [curves.pop(("random", i)) for i in range(RANDOM_ORDERS)]                          # [m, 11] each
    curves["random order", "both"] = np.mean(random, axis=0)

    names, areas = [], []
    for name in ("by variable", "by event", "|z-score|"):
        for side, sign in (("raises", 1), ("lowers", -1)):
            gap = sign * (curves["random order", "both"] - curves.get((name, side), curves[name, "both"]))
            names.append((name, side))
            areas.append(np.trapezoid(gap, SHARES, axis=1))
    found = measured(names, resampled(lambda weight: weighted_mean(weight, *areas), stay))
    rows = {name: {} for name in ("nothing left out", "by variable", "by event", "|z-score|", "random order")}
    for (name, side), value in found.items():
        rows[name][side] = value
    if model.task.kind == "binary":
        left = [curves["random order", "both"][:, 0]]
        left += [curves[name, "both"][:, 1] for name in ("by variable", "by event", "|z-score|")]
        left += [curve[:, 1] for curve in random]
        label = np.repeat(cohort.answers[points], len(left), axis=1)
        aurocs = ranking_measure(label, np.stack(left, axis=1))

        def measure(weight):
            each = aurocs(weight)[:, 2::2]
            return np.column_stack([each[:, :-RANDOM_ORDERS], each[:, -RANDOM_ORDERS:].mean(1)])
        for name, value in measured(list(rows), resampled(measure, stay)).items():
            rows[name]["auroc"] = value
    return {"questions": len(points), "shares": SHARES.tolist(), "rows": rows,
            "curves": {" ".join(order): (curve - curve[:, :1]).mean(0).tolist()
                       for order, curve in curves.items()}}
