"""The questions: at which moments of which stays the model answers, and what the labels then say.

A point is a minute of a stay at which an answer is asked for: the end of the record, an hour after admission
(`--hours`), or times that the labels bring along.
"""

from dataclasses import replace

import numpy as np

from data import MINUTE, Cohort, answer_columns, point_slots, ranges, search_after


def at_end(cohort: Cohort, answers=None) -> Cohort:
    """The cohort with one point a stay, at the minute of its last set; answers: see `answer_columns`."""
    return replace(cohort, timed=False, point_start=np.arange(len(cohort) + 1),
                   point_minute=np.array(cohort.set_minute[cohort.stay_start[1:] - 1]),
                   answers=answer_columns(answers, len(cohort)))


def answers_moved(cohort: Cohort, points: np.ndarray, minute: np.ndarray) -> np.ndarray:
    """The answers [n, A] of these points [n], asked at other minutes [n] of their stays. The hours to an
    event or to its censoring grow by as much as the question comes earlier; a question that comes no sooner
    than the event has no answer left. Answers of other kinds stay."""
    answers = np.array(cohort.answers[points])
    if cohort.kind == "event":
        later = (minute - cohort.point_minute[points]) / 60
        hours = answers[:, 0] - later
        answers[:, 0] = hours
        answers[(later > 0) & (hours <= 0)] = np.nan
    return answers


def at_hours(cohort: Cohort, hours: float) -> Cohort | None:
    """The cohort asked once a stay, `hours` after its admission, or at its end where that is earlier: then,
    as by `at_end`, at the minute of its last set, of which all events count. None: its points have times of
    their own."""
    if cohort.timed:
        return None
    stays, last = np.arange(len(cohort)), cohort.stay_start[1:] - 1
    hour, end = cohort.admission + 60 * hours, cohort.set_end(last)
    minute = np.where(end <= hour, cohort.set_minute[last], hour)
    answers = answers_moved(cohort, stays, minute)
    asked = with_points(cohort, np.ones_like(stays), np.minimum(hour, end), answers)
    return replace(asked, timed=False, point_minute=minute)


def hours_of(cohort: Cohort, points: np.ndarray) -> np.ndarray:
    """[n] hours from admission to these points."""
    return (cohort.point_minute[points] - cohort.admission[cohort.point_stay[points]]) / 60


def hours_asked(cohort: Cohort, points: np.ndarray, given: float | None = None) -> float | None:
    """The hour after admission at which all these points lie: that `given` by --hours (inf: the ends), or
    their own. None: there are several, or they are the ends."""
    if given is not None:
        return given if np.isfinite(given) else None
    hours = hours_of(cohort, points)
    one = len(points) and np.ptp(hours) < 1e-6 and cohort.timed
    return float(hours[0]) if one else None


def describe_questions(cohort: Cohort, points: np.ndarray) -> str:
    """When these points are asked."""
    stay = cohort.point_stay[points]
    if np.array_equal(cohort.point_minute[points], cohort.set_minute[cohort.stay_start[stay + 1] - 1]):
        return "the end of each record"
    hours = hours_of(cohort, points)
    return f"hours {hours.min():.4g} to {hours.max():.4g}" if np.ptp(hours) else f"hour {hours[0]:.4g}"


def with_points(cohort: Cohort, count: np.ndarray, minute: np.ndarray, answers=None) -> Cohort:
    """The cohort asked at these points: count [P] of each stay, minute [Q], rising within a stay, and their
    answers (see `answer_columns`). A set never straddles a point: where the source knows events more finely
    than by the minute, those after the point become a set at the exact time of their first."""
    start = np.append(0, np.cumsum(count)).astype(np.int64)
    cohort = replace(cohort, point_start=start, point_minute=minute.astype(np.float64), timed=True,
                     answers=answer_columns(answers, len(minute)))
    stay = cohort.point_stay
    first = cohort.stay_start[stay]
    last = search_after(cohort.set_minute, minute, first, cohort.stay_start[stay + 1]) - 1
    asked = last >= first
    if len(cohort.event_offset):
        last, at = last[asked], minute[asked]
        offset = np.rint((at - np.floor(cohort.set_minute[last])) * MINUTE)
        first, end = cohort.set_start[last], cohort.set_start[last + 1]
        event = search_after(cohort.event_offset, offset, first, end)     # the first one after the point
        later, index = np.unique(event[event < end], return_index=True)
        last = last[event < end][index]                                   # [cuts] its set
        exact = np.floor(cohort.set_minute[last]) + cohort.event_offset[later] / MINUTE
        whole = later == cohort.set_start[last]                           # all events of the set are after it
        if len(later):
            set_minute = np.array(cohort.set_minute)
            set_minute[last[whole]] = exact[whole]
            at, later, exact = last[~whole] + 1, later[~whole], exact[~whole]
            event_offset = cohort.event_offset
            moved = (np.floor(exact) - np.floor(set_minute[last[~whole]])).astype(np.int64) * MINUTE
            if moved.any():  # a set of several minutes: its later part counts from its own minute
                end = np.minimum(np.append(later[1:], len(event_offset)), cohort.set_start[at])
                event_offset = np.array(event_offset)
                event_offset[ranges(later, end - later)] -= np.repeat(moved, end - later)
            added = np.searchsorted(at, cohort.stay_start, side="right")
            cohort = replace(cohort, event_offset=event_offset,
                             set_start=np.insert(cohort.set_start, at, later),
                             set_minute=np.insert(set_minute, at, exact),
                             stay_start=cohort.stay_start + added)
    unanswered = int((minute < cohort.set_minute[cohort.stay_start[stay]]).sum())
    return cohort.noting({"prediction points before the first set of their stay (no answer)": unanswered})


def at_every_minute(cohort: Cohort, stays: np.ndarray) -> Cohort:
    """The cohort asked at the minute of every set of these stays, after all of the set, and at those of its
    points that have a set before them."""
    sets = ranges(cohort.stay_start[stays], np.diff(cohort.stay_start)[stays])
    points, slot = point_slots(cohort, stays)
    points = points[slot >= 0]
    own = np.repeat(stays, np.diff(cohort.stay_start)[stays])
    rows = np.stack([np.append(own, cohort.point_stay[points]),
                     np.append(cohort.set_minute[sets], cohort.point_minute[points])])
    stay, minute = np.unique(rows, axis=1)
    # No set is cut: those that a point divides were cut when it was asked.
    return replace(cohort, timed=True, point_start=np.searchsorted(stay, np.arange(len(cohort) + 1)),
                   point_minute=minute, answers=answer_columns(None, len(minute)))


def labelled_points(cohort: Cohort, stays: np.ndarray) -> np.ndarray:
    """Indices [n] of the points of these stays that have a label and an answer: a set at or before them."""
    index, slot = point_slots(cohort, stays)
    return index[(slot >= 0) & cohort.labelled[index]]


def at_every_set(cohort: Cohort, points: np.ndarray, weight: np.ndarray,
                 before: float) -> tuple[Cohort, np.ndarray]:
    """The cohort asked for the answer to each of these points [n], one a stay, also at every set before it;
    and the weights [Q] of all. A point keeps 1 - `before` of its own weight [n]. The sets before share the
    rest in proportion to their time since admission."""
    stay = cohort.point_stay[points]
    first, count = cohort.stay_start[stay], np.zeros(len(cohort), dtype=np.int64)
    end = search_after(cohort.set_minute, cohort.point_minute[points], first, cohort.stay_start[stay + 1])
    number = count[stay] = end - first
    own = np.cumsum(number) - 1                                                  # [n] of all, the stay's last
    minute = cohort.set_minute[ranges(first, number)]
    since = np.maximum(minute - np.repeat(cohort.admission[stay], number), 0)
    minute[own], since[own] = cohort.point_minute[points], 0
    total = np.repeat(np.add.reduceat(since, own + 1 - number), number)
    share = np.where(total > 0, before * since / np.maximum(total, 1e-9), 0)
    share[own] = np.where(total[own] > 0, 1 - before, 1)
    asked = replace(cohort, point_start=np.append(0, np.cumsum(count)), point_minute=minute,
                    answers=answers_moved(cohort, np.repeat(points, number), minute))
    return asked, (share * np.repeat(weight, number)).astype(np.float32)


FIRST_MOMENT = 3  # hours after admission: before, hardly anything is charted


def at_moments(cohort: Cohort, points: np.ndarray, weight: np.ndarray, moments: int,
               seed) -> tuple[Cohort, np.ndarray]:
    """The cohort asked for the answer to each of these points [n], ascending, and where a stay has one, whose
    time is not its own, also at this number of random minutes before it; and the weights [Q] of all. The
    hours since admission are log-uniform, from FIRST_MOMENT, or the first set if that comes later, to the
    point's. A point keeps its weight [n]. Its moments share another of the same size."""
    stay, asked = cohort.point_stay[points], cohort.point_minute[points]
    admission = cohort.admission[stay]
    begin = np.maximum(admission + 60 * FIRST_MOMENT, cohort.set_minute[cohort.first_set[stay]])
    earlier = (begin < asked) & (not cohort.timed)
    low, high = (np.where(earlier, minute - admission, 1)[:, None] for minute in (begin, asked))
    drawn = low * (high / low) ** np.random.default_rng(seed).random((len(points), moments))
    drawn = np.clip(np.sort(admission[:, None] + drawn), begin[:, None], asked[:, None])    # [n, moments]
    count = moments * earlier
    own = np.cumsum(count + 1) - 1                                               # [n] places of the points
    minute, share = (np.repeat(x, count + 1) for x in (asked, weight / np.maximum(count, 1)))
    minute[np.delete(np.arange(len(minute)), own)] = drawn[earlier].ravel()
    share[own] = weight
    number = np.bincount(stay, count + 1, minlength=len(cohort)).astype(np.int64)
    answers = answers_moved(cohort, np.repeat(points, count + 1), minute)
    asked = replace(cohort, point_start=np.append(0, np.cumsum(number)), point_minute=minute, answers=answers)
    return asked, share.astype(np.float32)


def stays_with(cohort: Cohort, points: np.ndarray) -> np.ndarray:
    """The stays [n] to which these points (ascending) belong, each once."""
    return np.unique(np.searchsorted(cohort.point_start, points, side="right") - 1)
