"""A checkpoint that answers: about a table or a cohort, over one stay, and at the bedside."""

import csv
import io
import math
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit

from batches import EventBatch, EventSets, StayDataset, answered_points, first_known, group_widths, raw
from data import (Cohort, InputError, event_table, make_splits, ranges, search_after, shortest,
                  stay_event_index, stays_of)
from tables import BEYOND, MISSING, NAMELESS, TRUTH, Report, plain_name
from checkpoint import Checkpoint
from explain import by_variable, explanations, questions_at, reasons, scale
from history_statistics import (HISTORY_STATISTICS, RunningStatistics, at_slots, statistics_at, summaries,
                                variables_of)
from labels import read_map, renames_and_labels
from metrics import AHEAD, of_challenge_2019
from questions import at_every_minute, describe_questions, with_points
from readers import cohort_of_frame
from readouts import FREEDOM, known_at
from runs import (answers_at, choose_device, encode_points, evaluation_loader, features_and_history,
                  from_rank_0, printable, read_cohort)
from settings import data_options


# ------------------------------------------------------------------------------------------------------------
# Opened beside its data
# ------------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def open_checkpoint(path, given: dict = {}) -> tuple[Checkpoint, Cohort]:
    """Returns a checkpoint and its data, or the data given (see `settings.DataSettings`), whose ids it
    recognises. The split of an original checkpoint is that of the data's folder, whatever --split says;
    without one it is empty."""
    checkpoint = from_rank_0(lambda: Checkpoint.open(path))
    data = checkpoint.data_settings(given)
    cohort = checkpoint.asked(read_cohort(data), data)
    for line in checkpoint.describe_kept(given):
        print(line)
    if checkpoint.original:
        apart = ("split_file", "label_file", "task", "positive")
        own = read_cohort({name: value for name, value in data.items() if name not in apart})
        if (own.split >= 0).any():
            checkpoint = replace(checkpoint, split=make_splits(own, 0))
    return checkpoint.recognising(cohort), cohort


class Predictor:
    """A checkpoint that answers, opened once: a finetuned one all, a pretrained one forecasts alone.

    The methods take `events`: a DataFrame with the columns stay_id, minute, variable and value of the long
    table (see README.md), a row an event, or a Cohort. A DataFrame may hold what a Parquet file may; the
    names and units that the checkpoint keeps are applied to it. What cannot be used raises InputError, or is
    left out and named in a warning."""

    def __init__(self, checkpoint: Checkpoint | str | Path, device: str = "auto"):
        self.device = choose_device(device, "fp32")[0]
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
        pretrained = self.checkpoint.mode == "pretrain" and self.checkpoint.config
        forecasts = pretrained and pretrained.queries
        model = self.checkpoint.forecaster() if forecasts else self.checkpoint.classifier()
        self.model = model.to(self.device)
        self.index = {name: i for i, name in enumerate(self.checkpoint.normalizer.variables)}
        self.rename, _ = renames_and_labels((self.checkpoint.maps or {}).get("variables", {}))

    @classmethod
    def with_data(cls, path, given: dict = {}, device: str = "auto", set_heads=None, transformer_heads=None
                  ) -> tuple["Predictor", StayDataset]:
        """A predictor and the data that its checkpoint names, or those given; see `open_checkpoint`."""
        checkpoint, cohort = open_checkpoint(path, given)
        if checkpoint.original and checkpoint.mode == "finetune":
            for what, known, mend in (("vectors", cohort.vectors, "put its cached.csv beside patient_ehr"),
                                      ("statistics", cohort.statistics, "give its --params_map")):
                if np.isnan(known).all():
                    raise InputError(f"{path}: an original checkpoint, made with {what} of the variables "
                                     f"that it does not hold; {mend}")
            checkpoint = replace(checkpoint, split=checkpoint.split or make_splits(cohort, 0))
            train = stays_of(cohort, checkpoint.split["train"])
            checkpoint = checkpoint.completed(cohort, train, set_heads, transformer_heads)
        then = checkpoint.source.get("asked")
        now = describe_questions(cohort, np.arange(len(cohort.point_minute)))
        if then not in (None, now):
            print(f"checkpoint: its training questions lie at {then}; asked now: {now}")
        predictor = cls(checkpoint, device)
        if checkpoint.mode == "finetune":
            cohort = predictor.model.task.recode(cohort)
        return predictor, checkpoint.dataset(cohort)

    # ---- whole stays ---------------------------------------------------------------------------------------

    def predict(self, events: pd.DataFrame | Cohort) -> pd.DataFrame:
        """The columns stay_id (text), minute and those of the answer (`Task.columns`): a row a question. A
        DataFrame is asked once a stay, in the order of the ids: at its last event, or where all training
        questions were (`Checkpoint.asked_at`). A stay without an answer has NaN."""
        self.checkpoint.check_finetuned()
        dataset, ids = self._dataset(events)
        task = self.model.task
        table = pd.DataFrame({"stay_id": pd.Series(ids, dtype=str),
                              **dict.fromkeys(["minute", *task.columns], np.nan)})
        if dataset is None:
            return table
        cohort, points = dataset.cohort, answered_points(dataset)
        answers = answers_at(self.model, dataset, points, self.device)
        asked = pd.DataFrame({"stay_id": cohort.stay_id[cohort.point_stay], "minute": cohort.point_minute,
                              **in_columns(task, cohort, points, answers)})
        silent = table[~np.isin(ids, cohort.stay_id)]  # stays without a usable event
        return pd.concat([asked, silent]).sort_values("stay_id", ignore_index=True) if len(silent) else asked

    def trajectory(self, events: pd.DataFrame | Cohort, stay_id: str) -> pd.DataFrame:
        """The answer at every minute of a stay at which something was charted or an answer is asked for: the
        columns minute, events and those of the answer (of a `binary` task: risk)."""
        self.checkpoint.check_finetuned()
        dataset, _ = self._dataset(events)
        if dataset is None:
            raise InputError("events: no usable event in any stay; check columns and values")
        risks = risk_over_time(self.model, dataset, find_stay(dataset, stay_id), self.device, why=False)
        return pd.DataFrame({"minute": risks["minute"], "events": risks["events"], **risks["answers"]})

    def explain(self, events: pd.DataFrame | Cohort, at: str | float = "last",
                largest: int = 10) -> pd.DataFrame:
        """What an answer would be without some events: the rows of `--explain`, see `explanations`. at: last,
        first_alarm, highest, all, or minutes after admission; largest: how many single events of a question
        (0: variables alone, which is much faster)."""
        self.checkpoint.check_finetuned()
        dataset, _ = self._dataset(events)
        if dataset is None:
            raise InputError("events: no usable event in any stay; check columns and values")
        dataset, points = questions_at(self.model, dataset, np.arange(len(dataset.cohort)), str(at),
                                       self.checkpoint.metrics.get("threshold"), self.device)
        return explanations(self.model, dataset, points, self.device, largest)

    def embed(self, events: pd.DataFrame | Cohort) -> pd.DataFrame:
        """h of the last set before each question that has an answer: the columns stay_id, minute, h0, h1,
        ..."""
        self.checkpoint.check_finetuned()
        dataset, _ = self._dataset(events)
        points = [] if dataset is None else answered_points(dataset)
        d = self.model.config.latent_dim
        if not len(points):
            return pd.DataFrame(columns=["stay_id", "minute", *(f"h{i}" for i in range(d))])
        h = encode_points(self.model, dataset, points, self.device, features_and_history)[:, -d:]
        cohort, table = dataset.cohort, pd.DataFrame(h.cpu()).add_prefix("h")
        table.insert(0, "stay_id", cohort.stay_id[cohort.point_stay[points]])
        table.insert(1, "minute", cohort.point_minute[points])
        return table

    def forecast(self, events: pd.DataFrame | Cohort, queries: pd.DataFrame) -> pd.DataFrame:
        """What was asked, in its order, with the columns mean, low and high (80%). queries: the columns
        stay_id, known_until, minute and variable (a name of the checkpoint). All at or before `known_until`
        is known and nothing after it; minutes are those of the events, of clock times those since the first
        event that is no birth. A query that cannot be answered has NaN, and is counted in a warning. Raises
        InputError where none can, and for a checkpoint whose pretraining asked no queries."""
        self.checkpoint.check_forecasts()
        if missing := [name for name in QUERY if name not in queries]:
            raise InputError(f"queries: no column {', '.join(missing)}; give {', '.join(QUERY)}")
        dataset, _ = self._dataset(events)
        if dataset is None:
            raise InputError("events: no usable event in any stay; check columns and values")
        asked = pd.DataFrame({name: queries[name].map(plain_name) if name in ("stay_id", "variable")
                              else pd.to_numeric(queries[name], errors="coerce") for name in QUERY})
        answers, lines = answered_queries(self, dataset, asked, "queries")
        if lines:
            warnings.warn("\n".join(lines), stacklevel=2)
        return queries.assign(**{name: answers[name].to_numpy() for name in FORECAST})

    def _dataset(self, events: pd.DataFrame | Cohort) -> tuple[StayDataset | None, np.ndarray]:
        """The events with the checkpoint's vocabulary (None: none is usable), and the ids of all stays. What
        is left out is named in one warning."""
        report = Report()
        if isinstance(events, Cohort):
            cohort, ids = events, events.stay_id
        else:
            cohort, ids = cohort_of_frame(events, report, self.rename)
            cohort = cohort if cohort is None else self.checkpoint.asked(cohort)
        lines, dataset = report.lines(), None
        if cohort is not None:
            dataset = StayDataset(cohort, self.checkpoint.normalizer, points=True)
            lines += dataset.describe_known().splitlines()[1:]
            lines += far_from_training(against_training(dataset, np.arange(len(cohort))))
            if bare := valueless(dataset):
                lines.append(f"{sum(bare.values()):,} rows without a value of variables that had numbers in "
                             f"training (their presence counts): {named(bare)}")
        if lines:
            warnings.warn("\n".join(lines), stacklevel=3)
        return dataset, ids

    # ---- at the bedside: equal to the whole pass, one set after another, in a time that grows with the sets
    # ---- before (O(L d)) and not with the vocabulary

    def start(self) -> "Bedside":
        """A stay without sets."""
        self.checkpoint.check_finetuned()
        like, config = self.model.feature_mean, self.model.config
        d = config.latent_dim
        return Bedside(Cache(1, like.double()), Cache(d, like), Cache(d, like),
                       [Cache(2 * d, like) for _ in self.model.history.layers], Cache(2 * d, like),
                       RunningStatistics(config.head_variables, like.device))

    @torch.no_grad()
    def step(self, state: "Bedside", minute: float, events) -> None:
        """Append the set charted at `minute`: pairs of a variable's name and its value (NaN: none), or no
        pair. Raises ValueError where the stay has a later set."""
        if not minute >= state.last:
            raise ValueError(f"a set at minute {minute} after one at minute {state.last}")
        model, device = self.model, self.device
        known = [(self.index[name], value) for name, value in events if name in self.index]
        if len(known) < len(events):
            unknown = sorted({name for name, _ in events} - self.index.keys())
            warnings.warn(f"left out: variables unknown to the checkpoint: {', '.join(unknown)}",
                          stacklevel=3)
        state.known |= bool(known)
        index, value = np.array(known, dtype=np.float64).reshape(-1, 2).T
        index = index.astype(np.int64)
        value = self.checkpoint.normalizer(index, value.astype(np.float32))
        variable, value = torch.from_numpy(index).to(device), torch.from_numpy(value).to(device)         # [E]
        valued, value = ~value.isnan(), value.nan_to_num()
        z = model.fused(*model.setvae.encode(EventSets.of_one(variable, value))).float()           # [1, 1, d]
        minutes = state.minute.append(value.new_tensor([[[minute]]], dtype=torch.float64))[..., 0]   # [1, L]
        h = model.history(z, minutes, state.past).float()
        state.z.append(z)
        state.h.append(h)
        if not model.config.classification_only:
            state.pool.append(model.feature_fusion.attention_pool.project_key_value(h))
        if model.config.summaries:
            listed = variable[:, None] == model.head_variables                                        # [E, K]
            numbers = (listed & valued[:, None]).sum(0)
            mean = (listed * value.double()[:, None]).sum(0) / numbers.clamp(min=1)
            state.exact.add(minute, mean.float(), numbers > 0, listed.sum(0))

    def features_at(self, state: "Bedside", minute: float) -> torch.Tensor:
        """What `SeqSetVAE.features` gives at a prediction point at `minute`, [1, 1, F]. Raises ValueError
        where the stay has no set or a later one."""
        if not -math.inf < state.last <= minute:
            raise ValueError(f"asked at minute {minute}, where the last set is at minute {state.last}")
        z, h, exact = state.z.rows, state.h.rows, None
        last = torch.tensor([[z.shape[1] - 1]], device=z.device)
        if self.model.config.summaries:
            since = (state.last - state.exact.minute.maximum(state.minute.rows[:, :1])).div(60).float()
            exact = summaries(state.exact.now(), since, z.new_tensor([[(minute - state.last) / 60]]))
        return self.model.head_input(z, h, last, exact, state.pool.rows)

    @torch.no_grad()
    def ask(self, state: "Bedside", minute: float) -> float | dict[str, float]:
        """The probability at `minute`, or the answer's columns where the task is not `binary`; NaN where the
        checkpoint knows no variable of the stay so far; see `features_at`."""
        task = self.model.task
        (answer,) = task.answer(self.model.classify(self.features_at(state, minute))[0])
        answer = dict(zip(task.columns, answer.tolist() if state.known else [math.nan] * len(answer)))
        return answer["probability"] if task.kind == "binary" else answer


class Cache:
    """Rows [1, L, width] of the sets of a stay, with room for more: one is added without copying those
    before."""

    def __init__(self, width: int, like: torch.Tensor):
        self.room = like.new_empty(1, 8, width)
        self.rows = self.room[:, :0]

    def append(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, n, width] -> all rows so far."""
        first, end = self.rows.shape[1], self.rows.shape[1] + x.shape[1]
        while end > self.room.shape[1]:
            self.room = torch.cat([self.room, self.room], dim=1)
        self.room[:, first:end] = x
        self.rows = self.room[:, :end]
        return self.rows


@dataclass
class Bedside:
    """What `Predictor.step` keeps of one stay of L sets: nothing of it grows with the vocabulary."""

    minute: Cache               # width 1, float64
    z: Cache                    # width d
    h: Cache                    # width d
    past: list[Cache]           # keys and values of every layer of the history, width 2d
    pool: Cache                 # keys and values of the learned attention pool, width 2d: in full training
    exact: RunningStatistics    # of the head's variables
    known: bool = False         # the checkpoint knows a variable of the stay

    @property
    def last(self) -> float:
        """The minute of the last set, -inf: there is none."""
        return self.minute.rows[0, -1].item() if self.minute.rows.numel() else -math.inf


# ------------------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------------------

def valueless(dataset: StayDataset) -> dict[str, int]:
    """The number of events without a value of each variable that had numbers in training."""
    cohort = dataset.cohort
    bare = np.bincount(cohort.event_variable[np.isnan(cohort.event_value)], minlength=len(cohort.variables))
    bare[(dataset.variable < 0) | ~dataset.normalizer.varies[dataset.variable]] = 0
    return {cohort.variables[v]: int(bare[v]) for v in np.flatnonzero(bare)}


MOST_COMPARED = 2**22  # events by which values are compared with those of training


def against_training(dataset: StayDataset, stays: np.ndarray) -> pd.DataFrame:
    """Returns how the values of these stays lie beside those of training: a row for each variable that had
    numbers in training and has some here, by its name, the furthest first.

    Columns: stays that have a value, values, their middle (the median; where they are two different values,
    as 0 and 1, the mean) and the centre of training (the mean), both in raw units, the distance between these
    in standard deviations of training, the share of the values that are clipped. Means of a variable taken on
    a log scale are those of the logarithms. Of many stays a seeded part is looked at."""
    cohort, normalizer = dataset.cohort, dataset.normalizer
    stays = np.random.default_rng(0).permutation(stays)
    stays = stays[:1 + np.searchsorted(np.cumsum(cohort.stay_events[stays]), MOST_COMPARED)]
    table = event_table(cohort, stays)
    table["variable"] = dataset.variable[table["variable"]]
    table = table[table["value"].notna() & (table["variable"] >= 0)]
    table = table[normalizer.varies[table["variable"]]]
    table["z"] = normalizer.unclipped(table["variable"], table["value"])
    table["clipped"] = abs(table["z"]) >= normalizer.clip
    by = table.groupby("variable")
    z = by["z"].median().where(by["value"].nunique() > 2, by["z"].mean())
    v, mean = z.index, normalizer.mean[z.index]
    middle, centre = (shortest(raw(x, normalizer.log_scale[v])) for x in (mean + normalizer.std[v] * z, mean))
    result = pd.DataFrame({"stays": by["stay"].nunique(), "values": by.size(), "middle": middle,
                           "centre": centre, "deviations": z, "clipped": by["clipped"].mean()})
    result = result.set_axis([normalizer.variables[i] for i in v])
    return result.sort_values("deviations", key=lambda distance: -distance.abs())


def far_from_training(compared: pd.DataFrame) -> list[str]:
    """Returns the line that names the variables whose middle lies more than two standard deviations from the
    centre of training (where fewer than ten stays have values: more than the five at which they are clipped);
    none where there is no such variable."""
    far = compared[compared["deviations"].abs() > np.where(compared["stays"] >= 10, 2, 5)]
    if far.empty:
        return []
    return [f"values of {len(far)} variables lie far from training, perhaps in other units (--variables "
            f"converts them): {beside_training(far)}"]


def beside_training(compared: pd.DataFrame, most: int = 5) -> str:
    named = [f"{row.Index} ({row.middle:.4g}, in training {row.centre:.4g}: {row.deviations:+.1f} sd)"
             for row in compared.head(most).itertuples()]
    return ", ".join(named) + " ..." * (len(compared) > most)


def in_columns(task, cohort: Cohort, points: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
    """The columns [Q] of the answers [n, k] at these points of the cohort; NaN at its others."""
    whole = np.full((len(cohort.point_minute), answers.shape[1]), np.nan)
    whole[points] = answers
    return dict(zip(task.columns, whole.T))


# ------------------------------------------------------------------------------------------------------------
# Forecasts
# ------------------------------------------------------------------------------------------------------------

QUERY = ("stay_id", "known_until", "minute", "variable")
FORECAST = ("mean", "low", "high")  # low, high: quantiles .1 and .9
_MOST_STATISTICS, _MOST_QUERIES = 2**23, 2**14  # that are held at once


def forecast_at(model, dataset: StayDataset, stay, known_until, variable, minute, device=CPU) -> pd.DataFrame:
    """What a variable will show at a later minute of a stay, from all at or before `known_until`: one pass of
    the backbone over the stays. Of n queries, [n] each: the stay (index in the data), the minutes as in the
    data, and the variable (index in the checkpoint's vocabulary). Returns a row for each: `FORECAST` in the
    variable's unit; location, log_scale and expected, the Student-t and its mean, normalised. NaN: no set is
    known by then, or (in units) the variable had no number in training.

    Where a set is known more finely than by the minute and `known_until` cuts it, the stay is encoded for
    that question alone."""
    cohort = dataset.cohort
    origins = pd.DataFrame({"stay": stay, "known": known_until})
    group = origins.groupby(["stay", "known"], sort=True)
    point, origins = group.ngroup().to_numpy(), group.size().reset_index()       # [n], and of each its origin
    at, known = origins["stay"].to_numpy(np.int64), origins["known"].to_numpy(np.float64)
    turn = turns(cohort, at, known)
    answers = np.full((len(point), 3), np.nan)
    for number in np.unique(turn):
        chosen = np.flatnonzero(turn == number)
        asked = with_points(cohort, np.bincount(at[chosen], minlength=len(cohort)), known[chosen])
        mine = np.flatnonzero(turn[point] == number)
        answers[mine] = answer_queries(model, dataset.of(asked), np.searchsorted(chosen, point[mine]),
                                       np.asarray(variable)[mine], np.asarray(minute, float)[mine], device)
    return forecasts_of(dataset.normalizer, np.asarray(variable), answers)


def turns(cohort: Cohort, stay, minute) -> np.ndarray:
    """[n] 0: no set is cut at this minute of the stay; else which of the stay's minutes that cut one it is.
    stay, minute: [n], sorted by both."""
    turn, first = np.zeros(len(stay), dtype=np.int64), cohort.stay_start[stay]
    last = search_after(cohort.set_minute, minute, first, cohort.stay_start[stay + 1]) - 1
    cut = (last >= first) & (cohort.set_end(last) > minute)
    turn[cut] = pd.Series(stay[cut]).groupby(stay[cut]).cumcount() + 1
    return turn


def forecasts_of(normalizer, variable, answers) -> pd.DataFrame:
    """The table of `forecast_at`. variable [n]; answers [n, 3]: location, log scale and expected value."""
    location, log_scale, expected = answers.T
    variance = FREEDOM / (FREEDOM - 2) * np.exp(2 * log_scale)
    low, high = (quantile_of(normalizer, variable, location, log_scale, level) for level in (.1, .9))
    return pd.DataFrame({"mean": normalizer.in_units(variable, expected, variance), "low": low, "high": high,
                         "location": location, "log_scale": log_scale, "expected": expected})


def quantile_of(normalizer, variable, location, log_scale, level: float) -> np.ndarray:
    """The quantile [n] at this level, in units, of what a Student-t [n] forecasts of variables [n]."""
    return normalizer.in_units(variable, location + np.exp(log_scale) * stdtrit(FREEDOM, level))


@torch.no_grad()
def answer_queries(model, dataset: StayDataset, point, variable, minute, device=CPU) -> np.ndarray:
    """Location, log scale and expected value, normalised, [n, 3] float64, of n queries: the index of the
    prediction point up to which all is known, of the variable in the checkpoint's vocabulary, and the minute,
    [n] each. NaN where no set lies before the point. Raises InputError where the checkpoint learned no
    queries."""
    model.eval()
    cohort = dataset.cohort
    stays, answers = np.unique(cohort.point_stay[point]), np.full((len(point), 3), np.nan)
    number = dataset.sizes(stays).sets
    if not number.any():
        return answers
    # Sets are padded as those that are known need it: nothing later may move the last bit.
    sets = np.diff(cohort.set_start)[ranges(cohort.stay_start[stays], number)]
    dataset = dataset.of(cohort)
    dataset.widths = group_widths(*np.unique(sets, return_counts=True), 8)
    order = np.argsort(point, kind="stable")
    start = np.searchsorted(point[order], np.arange(len(cohort.point_minute) + 1))
    for batch in evaluation_loader(dataset, stays[number > 0], device):
        asked, slot = (batch.point >= 0).nonzero(as_tuple=True)
        points = batch.point[asked, slot].cpu().numpy()
        count = start[points + 1] - start[points]
        query = order[ranges(start[points], count)]
        stay, origin = (np.repeat(x.cpu().numpy(), count) for x in (asked, slot))
        if len(query):
            answers[query] = answer_batch(model, batch, stay, origin, variable[query], minute[query])
    return answers


def answer_batch(model, batch: EventBatch, stay, origin, variable, minute) -> np.ndarray:
    """`answer_queries` of a batch. stay, origin [n]: the places of a query's stay and prediction point."""
    readout, device, size = model.query_readout, batch.minute.device, model.config.num_variables
    # A stay's variables that are asked for: its pairs with them, [k], and where each stay's begin.
    pairs, pair = np.unique(stay * size + variable, return_inverse=True)
    begin = np.searchsorted(pairs, np.arange(len(batch)) * size)
    width = int(np.diff(begin, append=len(pairs)).max())
    pairs, begin, pair, stay, origin, minute = (torch.from_numpy(x).to(device)
                                                for x in (pairs, begin, pair, stay, origin, minute))
    mine, held = variables_of(batch)
    mine = mine + size * torch.arange(len(batch), device=device)[:, None]                             # [B, D]
    place = torch.searchsorted(pairs, mine).clamp(max=len(pairs) - 1)
    column = torch.where(held & (pairs[place] == mine), place - begin[:, None], width)

    slots = batch.point_slot.masked_fill(batch.point < 0, batch.minute.shape[1])                      # [B, Q]
    state = readout.state(at_slots(model.forecasting(batch), slots))                               # [B, Q, w]
    key = model.setvae.keys_of(pairs % size)
    film = readout.key(key)
    hours = (minute - batch.minute.gather(1, batch.point_slot)[stay, origin]).div(60).clamp(min=0).float()
    answers = torch.zeros(len(stay), 3, device=device)
    block = max(1, _MOST_STATISTICS // (len(batch) * width * len(HISTORY_STATISTICS)))             # of points
    for first in range(0, slots.shape[1], block):
        some = slots[:, first:first + block].contiguous()
        exact = statistics_at(batch, some, column, width)
        inside = ((origin >= first) & (origin < first + block)).nonzero()[:, 0]
        for query in inside.split(_MOST_QUERIES):
            s, o, p = stay[query], origin[query], pair[query]
            known = known_at(batch, some, column, width, exact, s, o - first, p - begin[s], hours[query])
            answers[query] = torch.stack(readout(state[s, o], film[p], key[p], known), dim=-1)
    return answers.double().cpu().numpy()


def answered_queries(predictor: Predictor, dataset: StayDataset, queries: pd.DataFrame, path
                     ) -> tuple[pd.DataFrame, list[str]]:
    """The table of `forecast_at` for `QUERY` columns, a row for each, and lines that count those that cannot
    be answered (NaN). Minutes count from the zero of hours (`Cohort.admission`). Raises InputError, which
    names `path`, where none can."""
    cohort, normalizer = dataset.cohort, dataset.normalizer
    stay = pd.Index(cohort.stay_id).get_indexer(queries["stay_id"])
    variable = pd.Index(normalizer.variables).get_indexer(queries["variable"])
    known, minute = (queries[name].to_numpy(np.float64) + np.append(cohort.admission, 0)[stay]
                     for name in ("known_until", "minute"))
    reasons = {"of no stay of the data": stay < 0, "of a variable unknown to the checkpoint": variable < 0,
               "of a variable that had no number in training, which is not forecast":
                   ~normalizer.numeric[variable],
               "of a minute that is not after known_until": ~(minute > known),
               "of a known_until before all that the checkpoint knows":
                   ~(np.append(first_known(dataset), 0)[stay] <= known)}
    usable, lines = np.ones(len(queries), dtype=bool), []

    def leave_out(reason, wrong):
        if (wrong := wrong & usable).any():
            first = queries.iloc[int(wrong.argmax())]
            lines.append(f"{wrong.sum():,} queries {reason}, left empty, the first: "
                         + ", ".join(f"{name} {first[name]}" for name in QUERY))
            usable[wrong] = False
    for reason, wrong in reasons.items():
        leave_out(reason, wrong)
    answers = pd.DataFrame(np.nan, queries.index, [*FORECAST, "location", "log_scale", "expected"])
    if usable.any():
        asked = np.flatnonzero(usable)
        told = forecast_at(predictor.model, dataset, stay[asked], known[asked], variable[asked],
                           minute[asked], predictor.device)
        answers.iloc[asked] = told.to_numpy()
        leave_out(reason, answers["location"].isna().to_numpy())  # the known part of a minute
    if not usable.any():
        raise InputError(f"{path}: no query can be answered" + "".join(f"; {line}" for line in lines))
    return answers, lines


# ------------------------------------------------------------------------------------------------------------
# One stay over time
# ------------------------------------------------------------------------------------------------------------

def find_stay(dataset, stay_id) -> int | None:
    """Index of the stay with this id (None where none is asked for)."""
    if stay_id is None:
        return None
    cohort = dataset.cohort
    found = np.flatnonzero(cohort.stay_id == plain_name(stay_id))
    if not len(found):
        raise InputError(f"--trajectory {stay_id}: no such stay in the data ({', '.join(cohort.stay_id[:3])} "
                         "...); give the id of one")
    if (dataset.variable[cohort.event_variable[stay_event_index(cohort, found)]] < 0).all():
        raise InputError(f"--trajectory {stay_id}: the checkpoint knows none of its variables; rename them "
                         "with --variables, or give another stay")
    return int(found[0])


def risk_over_time(model, dataset, stay: int, device=CPU, why: bool = True) -> dict:
    """The answers at every minute at which something was charted or an answer is asked for, as if the stay
    had ended there: the model is causal, one pass answers all. One of them, `Task.followed`, is the risk.
    why: also how much each variable raises the last of them, see `by_variable`."""
    cohort, task = dataset.cohort, model.task
    sets, points = (slice(*start[stay:stay + 2]) for start in (cohort.stay_start, cohort.point_start))
    asked = cohort.point_minute[points]
    truth = cohort.answers[points] if cohort.kind == task.kind else np.full((len(asked), task.width), np.nan)
    label = np.nan_to_num(truth[:, 0], nan=-1) if task.kind == "binary" else np.full(len(asked), -1)
    dataset = dataset.of(at_every_minute(cohort, np.array([stay])))
    minute = dataset.cohort.point_minute
    place, size = np.searchsorted(minute, cohort.set_minute[sets]), np.diff(cohort.set_start)[sets]
    events = np.bincount(place, size, len(minute))
    answers = answers_at(model, dataset, np.arange(len(minute)), device)
    names, risk = ["risk"] if task.kind == "binary" else task.columns, answers[:, task.followed]
    septic = (label == 1).any() and of_challenge_2019(np.zeros(len(label)), asked, label)
    return {"stay": str(cohort.stay_id[stay]), "label": outcome_of(task, truth),
            "minute": minute.tolist(), "events": events.astype(int).tolist(), "risk": risk.tolist(),
            "followed": names[task.followed], "answers": dict(zip(names, answers.T.tolist())),
            "admission": float(cohort.admission[stay]),
            "onset": float(asked[label == 1][0] + 60 * AHEAD) if septic else None,
            "labelled": asked[label == 1].tolist() if len(label) > 1 else [],
            "highest": float(minute[risk.argmax()]),
            "scale": scale(task),
            "moved": by_variable(model, dataset, len(minute) - 1, device) if why else {}}


def outcome_of(task, answers: np.ndarray) -> int | str:
    """The largest of a stay's answers [n, A]: of a `binary` task 0, 1 or -1 (none), else as a text."""
    largest = np.fmax.reduce(answers, axis=0, initial=np.nan)
    if task.kind == "binary":
        return int(np.nan_to_num(largest[0], nan=-1))
    (row,) = task.labels(largest[None]).to_dict("records")
    known = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
             for name, value in row.items() if pd.notna(value)]
    return ", ".join(known) or "no label"


# ------------------------------------------------------------------------------------------------------------
# At the bedside: the risk as events come
# ------------------------------------------------------------------------------------------------------------

FOLLOWED = ["stay_id", "minute", "variable", "value"]


def followed_event(line: str, rename: dict = {}) -> tuple[str, float, str, float]:
    """What a line of `FOLLOWED` says, as the long table is read; value NaN: none; rename: see `read_map`.
    Raises ValueError where it is no event."""
    cells = [cell.strip() for cell in next(csv.reader([line]))]
    if len(cells) != len(FOLLOWED):
        raise ValueError(f"{len(cells)} cells where {','.join(FOLLOWED)} is due")
    stay, minute, variable, value = cells
    stay, variable = plain_name(stay), plain_name(variable, NAMELESS)
    if not stay or not variable:
        raise ValueError(f"no {'variable' if stay else 'stay_id'}")
    if "_" in minute + value:  # which Python takes for part of a number
        raise ValueError("a minute or value that is no number")
    value = TRUTH.get(value.lower(), value)
    beyond = BEYOND.fullmatch(value)
    minute, text = float(minute), "nan" if value in MISSING else beyond[1] if beyond else value
    variable, factor, offset = rename.get(variable, (variable, 1, 0))
    try:
        value = float(text) * factor + offset
    except ValueError:  # a category
        variable, value = f"{variable}={text}", math.nan
    if not abs(minute) < 1e8 or abs(value) > float(np.finfo(np.float32).max):
        raise ValueError("a minute or value out of range")
    return stay, minute, variable, value


class Ward:
    """The stays that are followed: their states, their open sets, and counts of what came."""

    RISKS, LATE = "risks", "events of an earlier minute than their stay's last, ignored"

    def __init__(self, predictor: Predictor, why: bool = False):
        """why: print reasons beside each answer, for which all sets so far are kept."""
        self.predictor, self.why = predictor, why
        self.charted = defaultdict(list)
        self.states, self.sets = defaultdict(predictor.start), {}  # a set: (minute, [(variable, value), ...])
        self.counts, self.unknown = Counter(), Counter()
        self.out = csv.writer(sys.stdout, lineterminator="\n")

    def add(self, stay: str, minute: float, variable: str, value: float) -> None:
        """Take an event; a later minute than its stay's ends the set before. What cannot be used is counted,
        and the first of its kind said at once."""
        now, _ = self.sets.get(stay, (self.states[stay].last, None))
        if minute < now:
            if not self.counts[self.LATE]:
                say(f"stay {stay}: an event at minute {minute:g} comes after one at minute {now:g} and is "
                    "ignored, as are all such events")
            self.counts[self.LATE] += 1
            return
        if stay in self.sets and minute > now:
            self.end_set(stay)
        _, events = self.sets.setdefault(stay, (minute, []))
        if variable in self.predictor.index:
            events.append((variable, value))
            return
        if variable not in self.unknown:
            say(f"stay {stay}, minute {minute:g}: {variable} is unknown to the checkpoint; its events are "
                "left out")
        self.unknown[variable] += 1

    def end_set(self, stay: str) -> None:
        """Print the answer after the stay's open set."""
        (minute, events), state = self.sets.pop(stay), self.states[stay]
        self.predictor.step(state, minute, events)
        answer = self.predictor.ask(state, minute)
        answer = answer.values() if isinstance(answer, dict) else [answer]
        shown = [f"{value:.6f}" if state.known else "" for value in answer]
        if self.why:
            self.charted[stay].append((minute, events))
            why = reasons(self.predictor, self.charted[stay], 3) if state.known else []
            shown += why + [""] * (3 - len(why))
        self.counts[self.RISKS] += state.known  # first: a signal may end the command once it is printed
        self.out.writerow([stay, int(minute) if minute.is_integer() else minute, *shown])

    def end_sets(self) -> None:
        for stay in list(self.sets):
            self.end_set(stay)

    def summary(self) -> None:
        say(f"{self.counts.pop(self.RISKS, 0):,} risks of {len(self.states):,} stays")
        for reason, count in self.counts.items():
            say(f"{count:,} {reason}")
        if self.unknown:
            say(f"{self.unknown.total():,} events of {len(self.unknown):,} variables unknown to the "
                f"checkpoint, left out: {named(self.unknown)}")


def named(counts: dict) -> str:
    """The ten most frequent names with their counts."""
    names = [f"{name} ({count:,})" for name, count in Counter(counts).most_common(10)]
    return ", ".join(names) + " ..." * (len(counts) > 10)


def say(line: str) -> None:
    print(f"follow: {printable(line)}", file=sys.stderr)


def follow(arguments) -> None:
    """Lines stay_id,minute,variable,value of standard input (no value: it happened), perhaps under a header
    -> after each set a printed line stay_id,minute and the answer's columns (empty: so far the checkpoint
    knows none of the stay's variables), with --explain also the three largest `reasons`. A set ends with a
    later minute of its stay, an empty line or the input. What cannot be used is counted on standard error."""
    (path,) = arguments.checkpoint
    checkpoint = Checkpoint.open(path)
    if checkpoint.original:
        predictor, _ = Predictor.with_data(path, data_options(arguments), arguments.device,
                                           arguments.set_heads, arguments.transformer_heads)
    else:  # its data need not be at hand
        predictor = Predictor(checkpoint, arguments.device)
    rename = predictor.rename
    if arguments.variables_map is not None:
        told = read_map(Path(arguments.variables_map)) if arguments.variables_map else {}
        rename, _ = renames_and_labels(told)
    elif rename:
        say(predictor.checkpoint.describe_kept({})[0])
    predictor.checkpoint.check_finetuned()
    ward = Ward(predictor, why=arguments.explain is not None)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # As tables are read, with a mark before the first line or without; what is no text is a malformed
        # line or an unknown variable.
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
    try:
        for number, line in enumerate(sys.stdin, 1):
            if not line.strip():
                ward.end_sets()
            elif number == 1 and FOLLOWED[0] in (names := [cell.strip() for cell in line.split(",")]):
                if names != FOLLOWED:
                    raise InputError(f"line 1: the columns {','.join(names)}; give {','.join(FOLLOWED)}")
            else:
                try:
                    event = followed_event(line, rename)
                except (ValueError, csv.Error) as error:
                    ward.counts["malformed lines, left out"] += 1
                    say(f"line {number}: {error}: {line.strip()}")
                else:
                    ward.add(*event)
        ward.end_sets()
    except KeyboardInterrupt:  # the usual end of a long-running command, by SIGINT or SIGTERM
        pass
    ward.summary()
