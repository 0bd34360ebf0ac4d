"""Why an answer is what it is: how it changes where events are left out."""

import numpy as np
import pandas as pd

from data import build_cohort, stay_event_index
from questions import with_points
from runs import answers_at


def risk_without(model, dataset, stay: int, minute: float, most: int, device) -> dict:
    """The risk at this minute by the variable whose events are left out, of the `most` charted until then
    that the model knows: the stay is repeated, each time without one. None: nothing is left to tell a risk
    by."""
    cohort = dataset.cohort
    events = stay_event_index(cohort, np.array([stay]))
    sets = np.searchsorted(cohort.set_start, events, side="right") - 1
    known = (cohort.set_minute[sets] <= minute) & (dataset.variable[cohort.event_variable[events]] >= 0)
    events, sets = events[known], sets[known]
    variables, count = np.unique(cohort.event_variable[events], return_counts=True)
    variables = variables[np.argsort(-count, kind="stable")[:most]]
    names = [cohort.variables[v] for v in variables]
    copy, event = np.nonzero(cohort.event_variable[events] != variables[:, None])
    if not len(copy):
        return dict.fromkeys(names)
    copies = build_cohort(cohort.reader, cohort.variables, copy, cohort.set_minute[sets[event]],
                          cohort.event_variable[events[event]], cohort.event_value[events[event]], names,
                          set_key=sets[event], whole=True)
    ones = np.ones(len(copies), dtype=int)
    dataset = dataset.of(with_points(copies, ones, minute * ones))
    risk = answers_at(model, dataset, np.arange(len(copies)), device)[:, model.task.followed]
    return dict.fromkeys(names) | dict(zip(copies.stay_id.tolist(), risk.tolist()))


def influence(trajectory: dict) -> pd.Series:
    """By how much each variable raises the last risk (lowers: negative), by its name, those that move it
    most first."""
    without = pd.Series(trajectory["without"], dtype=float).dropna()
    moved = trajectory["risk"][-1] - without
    return moved.sort_values(key=lambda change: -change.abs(), kind="stable")
