"""A checkpoint that answers: probabilities of a table or a cohort, the risk over one stay, and at the bedside."""

import csv
import io
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import runs
from batches import StayDataset
from checkpoint import Checkpoint
from data import (Cohort, InputError, Normalizer, build_cohort, make_splits, point_slots, stay_event_index, stays_of,
                  stays_with, with_points)
from metrics import AHEAD, of_challenge_2019
from model import SeqSetVAE
from readers import load_cohort, read_map
from runs import (choose_device, evaluation_batches, from_rank_0, gathered, loader, printable, progress,
                  read_cohort, summed)
from settings import data_options
from tables import BEYOND, MISSING, TRUTH


# ----------------------------------------------------------------------------------------------------------------------
# Opened beside its data
# ----------------------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def open_checkpoint(path, given: dict = {}) -> tuple[Checkpoint, Cohort]:
    """A checkpoint, which recognises the ids of its data, and these data, or those given (options, see DATA). The split
    of an original checkpoint is that of the data's folder, whatever --split says; without one it is empty."""
    checkpoint = from_rank_0(lambda: Checkpoint.open(path))
    data = checkpoint.data_settings(given)
    cohort = read_cohort(data)
    if checkpoint.original:
        apart = ("split_file", "label_file", "task", "positive")
        own = read_cohort({name: value for name, value in data.items() if name not in apart})
        if (own.split >= 0).any():
            checkpoint = replace(checkpoint, split=make_splits(own, 0))
    return checkpoint.recognising(cohort), cohort


class Predictor:
    """A finetuned checkpoint that answers, opened once."""

    def __init__(self, checkpoint: Checkpoint | str | Path, device: str = "auto"):
        self.device = choose_device(device, "fp32")[0]
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
        self.model = self.checkpoint.classifier().to(self.device)

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
        predictor = cls(checkpoint, device)
        return predictor, checkpoint.dataset(cohort)


# ----------------------------------------------------------------------------------------------------------------------
# Probabilities
# ----------------------------------------------------------------------------------------------------------------------

def predict(checkpoint, events: pd.DataFrame, device: str = "auto") -> pd.DataFrame:
    """The probability of every stay of a table of events, as `--predictions` gives it for the same table.

    checkpoint: path of a finetuned checkpoint of train.py. events: a row an event, with the columns stay_id, minute,
    variable and value of the long table (see README.md). Returns the columns stay_id (text) and probability, a row a
    stay in the order of the ids; NaN where the checkpoint knows nothing of a stay's events. Raises InputError as
    train.py.
    """
    predictor = Predictor(checkpoint, device)
    with tempfile.TemporaryDirectory() as folder:
        events.to_csv(Path(folder) / "events.csv", index=False)
        cohort = load_cohort(**predictor.checkpoint.data_settings({"data_dir": folder}), cache_dir=Path(folder) / "cache")
        dataset = predictor.checkpoint.dataset(cohort)
        points, probability = answered_points(dataset), np.full(len(cohort), np.nan)
        probability[cohort.point_stay[points]] = probability_at(predictor.model, dataset, points, predictor.device)
        return pd.DataFrame({"stay_id": cohort.stay_id, "probability": probability})


def answered_points(dataset) -> np.ndarray:
    """Indices [n] of the points that have an answer: those with an event of a variable that the checkpoint knows at or
    before them."""
    cohort = dataset.cohort
    index, slot = point_slots(cohort, np.arange(len(cohort)))
    known = np.add.reduceat(dataset.variable[cohort.event_variable] >= 0, cohort.set_start[:-1], dtype=np.int64)
    known = np.append(0, np.cumsum(known))                                                          # [T+1]
    first = cohort.stay_start[cohort.point_stay[index]]
    return index[known[first + slot + 1] > known[first]]


@torch.no_grad()
def encode_points(model: SeqSetVAE, dataset: StayDataset, points: np.ndarray, device, through=None) -> torch.Tensor:
    """Head input of these prediction points before standardisation, [n, F], or `through` it (a function of [m, F] that
    gives [m, c]): one pass of the backbone over their stays, in float32 whatever the precision of training, so that a
    score does not depend on the machine."""
    model.eval()
    dataset, stays = dataset.asking(points), stays_with(dataset.cohort, points)
    batches, result = evaluation_batches(dataset, stays), None
    stream = loader(dataset, [stays[b] for b in batches], device)
    for batch in progress(stream, len(batches), "encoding"):
        features = model.features(batch)[batch.point >= 0]                                   # [m, F]
        features = features if through is None else through(features)
        if result is None:
            result = torch.zeros(len(points), features.shape[1], device=device)
        result[batch.point[batch.point >= 0]] = features
    if runs.WORLD > 1:  # each rank filled in the points of its batches; one may have had none
        width = max(gathered(0 if result is None else result.shape[1]))
        result = summed(torch.zeros(len(points), width, device=device) if result is None else result)
    return result


def probability_at(model: SeqSetVAE, dataset: StayDataset, points: np.ndarray, device) -> np.ndarray:
    """Probability of the positive class at every point, [n] float64."""
    logits = encode_points(model, dataset, points, device, through=model.classify)
    return probability_of(logits)


def probability_of(logits: torch.Tensor) -> np.ndarray:
    """logits [n, 2] -> [n] float64."""
    return logits.float().softmax(-1)[:, 1].cpu().double().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# One stay over time
# ----------------------------------------------------------------------------------------------------------------------

def find_stay(dataset, stay_id) -> int | None:
    """Index of the stay with this id (None where none is asked for)."""
    if stay_id is None:
        return None
    cohort = dataset.cohort
    found = np.flatnonzero(cohort.stay_id == stay_id)
    if not len(found):
        raise InputError(f"--trajectory {stay_id}: no such stay in the data ({', '.join(cohort.stay_id[:3])} ...); "
                         "give the id of one")
    if (dataset.variable[cohort.event_variable[stay_event_index(cohort, found)]] < 0).all():
        raise InputError(f"--trajectory {stay_id}: the checkpoint knows none of its variables; rename them with "
                         "--variables, or give another stay")
    return int(found[0])


def risk_over_time(model, dataset, stay: int, device=CPU, most: int = 40) -> dict:
    """The risk at every minute at which something was charted or a risk is asked for, as if the stay had ended there:
    the model is causal, one pass answers all. Where it is highest, the risk without each of the `most` charted
    variables."""
    cohort = dataset.cohort
    sets, points = (slice(*start[stay:stay + 2]) for start in (cohort.stay_start, cohort.point_start))
    asked, label = cohort.point_minute[points], cohort.label[points]
    minute = np.union1d(cohort.set_minute[sets], asked[asked >= cohort.set_minute[sets][0]])
    events = np.bincount(np.searchsorted(minute, cohort.set_minute[sets]), np.diff(cohort.set_start)[sets], len(minute))
    count = np.where(np.arange(len(cohort)) == stay, len(minute), 0)
    dataset = dataset.of(with_points(cohort, count, minute))
    risk = probability_at(model, dataset, np.arange(len(minute)), device)
    highest = minute[risk.argmax()]
    septic = (label == 1).any() and of_challenge_2019(np.zeros(len(label)), asked, label)
    return {"stay": str(cohort.stay_id[stay]), "label": int(cohort.stay_label[stay]), "minute": minute.tolist(),
            "events": events.astype(int).tolist(), "risk": risk.tolist(), "admission": float(cohort.admission[stay]),
            "onset": float(asked[label == 1][0] + 60 * AHEAD) if septic else None,
            "labelled": asked[label == 1].tolist() if len(label) > 1 else [],
            "highest": float(highest), "without": risk_without(model, dataset, stay, highest, most, device)}


def risk_without(model, dataset, stay: int, minute: float, most: int, device) -> dict:
    """The risk at this minute by the variable whose events are left out, of the `most` charted until then that the
    model knows: the stay is repeated, each time without one. None: nothing is left to tell a risk by."""
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
    risk = probability_at(model, dataset, np.arange(len(copies)), device)
    return dict.fromkeys(names) | dict(zip(copies.stay_id.tolist(), risk.tolist()))


def influence(trajectory: dict) -> dict:
    """By how much each variable raises the highest risk (lowers: negative), those that move it most first."""
    highest = max(trajectory["risk"])
    moved = {name: highest - risk for name, risk in trajectory["without"].items() if risk is not None}
    return dict(sorted(moved.items(), key=lambda item: -abs(item[1])))


# ----------------------------------------------------------------------------------------------------------------------
# At the bedside: the risk as events come
# ----------------------------------------------------------------------------------------------------------------------

FOLLOWED = ["stay_id", "minute", "variable", "value"]


def followed_event(line: str, rename: dict = {}) -> tuple[str, float, str, float]:
    """What a line of `FOLLOWED` says, as the long table is read; value NaN: none; rename: see `read_map`. Raises
    ValueError where it is no event."""
    cells = [cell.strip() for cell in next(csv.reader([line]))]
    if len(cells) != len(FOLLOWED):
        raise ValueError(f"{len(cells)} cells where {','.join(FOLLOWED)} is due")
    stay, minute, variable, value = cells
    if not stay or not variable:
        raise ValueError(f"no {'variable' if stay else 'stay_id'}")
    if "_" in minute + value:  # which Python takes for part of a number
        raise ValueError("a minute or value that is no number")
    value = TRUTH.get(value.lower(), value)
    beyond = BEYOND.fullmatch(value)
    minute, value = float(minute), float("nan" if value in MISSING else beyond[1] if beyond else value)
    variable, factor, offset = rename.get(variable, (variable, 1, 0))
    value = value * factor + offset
    if not abs(minute) < 1e8 or abs(value) > float(np.finfo(np.float32).max):
        raise ValueError("a minute or value out of range")
    return stay, minute, variable, value


class Ward:
    """The stays that are followed: their states, their open sets, and counts of what came."""

    def __init__(self, model: SeqSetVAE, normalizer: Normalizer):
        self.model, self.normalizer = model, normalizer
        self.index = {name: i for i, name in enumerate(normalizer.variables)}
        self.states, self.sets, self.known = {}, {}, set()  # of stays; a set: (minute, [(variable, value), ...])
        self.counts, self.unknown = Counter(), Counter()
        self.out = csv.writer(sys.stdout, lineterminator="\n")

    def add(self, stay: str, minute: float, variable: str, value: float) -> None:
        """Take an event; a later minute than its stay's ends the set before."""
        if stay not in self.states:
            self.states[stay] = self.model.start()
        now = self.sets[stay][0] if stay in self.sets else self.states[stay].last
        if minute < now:
            self.counts["events of an earlier minute than their stay's last, ignored"] += 1
            return
        if stay in self.sets and minute > now:
            self.end_set(stay)
        _, events = self.sets.setdefault(stay, (minute, []))
        if variable in self.index:
            events.append((self.index[variable], value))
            self.known.add(stay)
        else:
            self.unknown[variable] += 1

    def end_set(self, stay: str) -> None:
        """Print the risk after the stay's open set."""
        (minute, events), state = self.sets.pop(stay), self.states[stay]
        variable, value = np.array(events, dtype=np.float64).reshape(-1, 2).T
        variable = variable.astype(np.int64)
        value = self.normalizer(variable, value.astype(np.float32))
        self.model.step(state, minute, [*zip(variable.tolist(), value.tolist())])
        risk = f"{self.model.ask(state, minute):.6f}" if stay in self.known else ""
        self.out.writerow([stay, int(minute) if minute.is_integer() else minute, risk])
        sys.stdout.flush()
        self.counts["risks"] += bool(risk)

    def end_sets(self) -> None:
        for stay in list(self.sets):
            self.end_set(stay)

    def describe(self) -> str:
        lines = [f"{self.counts.pop('risks', 0):,} risks of {len(self.states):,} stays"]
        lines += [f"{count:,} {reason}" for reason, count in self.counts.items() if count]
        if self.unknown:
            named = ", ".join(f"{name} ({count:,})" for name, count in self.unknown.most_common(10))
            lines.append(f"{self.unknown.total():,} events of {len(self.unknown):,} variables unknown to the "
                         f"checkpoint, left out: {named}{' ...' if len(self.unknown) > 10 else ''}")
        return "\n".join(f"follow: {line}" for line in lines)


def follow(arguments) -> None:
    """Lines stay_id,minute,variable,value of standard input (no value: it happened), perhaps under a header -> after
    each set a printed line stay_id,minute,risk (no risk: so far the checkpoint knows none of the stay's variables). A
    set ends with a later minute of its stay, an empty line or the input. What cannot be used is counted on standard
    error."""
    (path,) = arguments.checkpoint
    checkpoint = Checkpoint.open(path)
    if checkpoint.original:
        predictor, _ = Predictor.with_data(path, data_options(arguments), arguments.device, arguments.set_heads,
                                           arguments.transformer_heads)
    else:  # its data need not be at hand
        predictor = Predictor(checkpoint, arguments.device)
    rename = read_map(Path(arguments.variables_map)) if arguments.variables_map else {}
    ward = Ward(predictor.model, predictor.checkpoint.normalizer)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text is a malformed line or an unknown variable
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
                    print(f"follow: line {number}: {error}: {printable(line.strip())}", file=sys.stderr)
                else:
                    ward.add(*event)
        ward.end_sets()
    except KeyboardInterrupt:  # the usual end of a long-running command
        pass
    print(*map(printable, ward.describe().splitlines()), sep="\n", file=sys.stderr)
