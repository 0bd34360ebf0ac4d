"""Readers: stays in any known layout, parsed once, part by part, into the cache; and what is told of them beside it:
labels, splits, subjects.

A reader yields `Events`, part after part; `_Spool` writes them to disk as they come and then sorts them into a cohort,
some stays at a time: what is held in memory does not grow with the data.
"""

import argparse
import hashlib
import json
import pickle
import re
import shutil
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from data import (MINUTE, READER_VERSION, SPLITS, Cohort, InputError, at_hours, build_cohort, pieces, ranges,
                  with_points)
from tables import (CACHE_MEND, TIME, VALUE, Report, Table, cache_home, clear_write_error, frame_tables, named_tables,
                    open_cache, read_table, table_files, tables, write_cache)
from tasks import _SPLIT_WORDS, _read_splits, _some, _with_labels, _with_splits


# ----------------------------------------------------------------------------------------------------------------------
# Reader: the embedded synthetic cohort
# ----------------------------------------------------------------------------------------------------------------------

# name: (mean, standard deviation, loading on the four organ processes, panel it is charted with)
_SYNTHETIC_VARIABLES = {
    "HR": (86, 12, (.9, .3, 0, .3), "vitals"), "SysBP": (121, 15, (-.9, 0, 0, 0), "vitals"),
    "DiasBP": (62, 9, (-.7, 0, 0, 0), "vitals"),
    "MAP": (80, 10, (-.9, 0, 0, 0), "vitals"), "RespRate": (18, 4, (.2, .8, 0, .2), "vitals"),
    "SpO2": (97, 2, (0, -.8, 0, 0), "vitals"),
    "Temp": (37, .6, (0, 0, 0, .6), "vitals"), "Urine": (110, 60, (-.2, 0, -.8, 0), "vitals"),
    "GCS": (12, 2.5, (0, -.2, 0, -.8), "neuro"),
    "PupilSize": (3, .8, (0, 0, 0, .4), "neuro"), "CVP": (9, 3, (.5, 0, .3, 0), "neuro"),
    "FiO2": (.5, .12, (0, .8, 0, 0), "gas"),
    "pH": (7.38, .06, (-.3, -.4, -.5, 0), "gas"), "PaO2": (120, 40, (0, -.7, 0, 0), "gas"),
    "PaCO2": (40, 7, (0, .5, 0, 0), "gas"),
    "Lactate": (2, 1, (.9, .2, .2, .2), "gas"), "BaseExcess": (0, 3, (-.5, 0, -.5, 0), "gas"),
    "SaO2": (96, 2, (0, -.7, 0, 0), "gas"),
    "Na": (139, 4, (0, 0, .2, 0), "chemistry"), "K": (4.1, .5, (0, 0, .6, 0), "chemistry"),
    "Cl": (105, 5, (0, 0, .2, 0), "chemistry"),
    "HCO3": (24, 4, (-.2, 0, -.6, 0), "chemistry"), "BUN": (24, 12, (0, 0, .9, 0), "chemistry"),
    "Creatinine": (1.3, .6, (.1, 0, .9, 0), "chemistry"), "Glucose": (135, 35, (.2, 0, 0, .4), "chemistry"),
    "Mg": (2, .3, (0, 0, .2, 0), "chemistry"), "Ca": (8.4, .6, (0, 0, -.2, 0), "chemistry"),
    "Phosphate": (3.5, 1, (0, 0, .5, 0), "chemistry"),
    "HCT": (31, 4, (-.2, 0, 0, 0), "blood"), "Platelets": (200, 80, (0, 0, 0, -.5), "blood"),
    "WBC": (12, 5, (.1, 0, 0, .7), "blood"),
    "Haemoglobin": (10.4, 1.4, (-.2, 0, 0, 0), "blood"), "INR": (1.3, .3, (.2, 0, 0, .5), "blood"),
    "PTT": (35, 10, (.1, 0, 0, .4), "blood"),
    "ALT": (60, 40, (.3, 0, 0, .4), "liver"), "AST": (70, 50, (.4, 0, 0, .4), "liver"),
    "Bilirubin": (1.2, .8, (0, 0, 0, .6), "liver"),
    "Albumin": (3, .5, (0, 0, 0, -.5), "liver"), "ALP": (90, 35, (0, 0, 0, .3), "liver"),
    "Troponin": (1, .7, (.8, 0, 0, 0), "liver"),
}


# panel: (chance an hour at severity 0, added chance a unit of severity, chance that one variable of a drawn panel is
# missing)
_SYNTHETIC_PANELS = {"vitals": (.55, .15, .15), "neuro": (.2, .08, .3), "gas": (.06, .06, .1),
                     "chemistry": (.07, .03, .1),
                     "blood": (.06, .02, .15), "liver": (.02, .015, .25)}
_SYNTHETIC_HOURS = 48
_SYNTHETIC_BLOCK = 1000  # stays
_SYNTHETIC_BYTES = 2500  # of a stay in the cache


def synthetic_cohort(stays: int = 1000, seed: int = 2012) -> Cohort:
    """The embedded cohort, whole in memory: deterministic in (stays, seed)."""
    return _whole(synthetic_parts(stays, seed))


def _whole(parts: Iterable[Cohort]) -> Cohort:
    """The cohort of these parts, in memory."""
    parts, rows = zip(*pieces(parts))
    arrays = {name: np.concatenate([r[name] for r in rows if name in r]) for name in Cohort.ARRAYS}
    cohort = replace(parts[-1], **arrays)
    cohort.fingerprint = cohort.digest()
    return cohort


def synthetic_parts(stays: int, seed: int = 2012):
    """Yield the embedded cohort in blocks of at most 1,000 stays and nearly equal size (so that each holds every
    variable): what is held in memory does not grow with the cohort."""
    blocks = -(-stays // _SYNTHETIC_BLOCK)
    for block in range(blocks):
        first, end = (stays * b // blocks for b in (block, block + 1))
        # NumPy pads a seed with zeros: block 0 of a cohort draws what the whole cohort drew before there were blocks.
        yield _synthetic_block([f"synthetic-{i:0{len(str(stays))}d}" for i in range(first, end)],
                               np.random.default_rng([seed, stays, block]))


def _synthetic_block(ids: list[str], rng: np.random.Generator) -> Cohort:
    """The stays `ids` of the embedded cohort, vectorised over stays.

    Four organ processes a stay (circulation, lungs, kidneys, brain/infection) wander as mean-reverting noise around a
    level and a trend. Charted values load on them with a baseline of the stay's own, which hides the level; severe
    hours are charted more often. Death depends on the *trajectory*: how much the organs worsened over the stay, and
    whether two failed at once at the end.
    """
    stays, hours = len(ids), np.arange(_SYNTHETIC_HOURS)
    # Organ processes [P, 48, 4]: level + trend + Ornstein-Uhlenbeck noise.
    level, trend = rng.normal(0, .8, (stays, 1, 4)), rng.normal(0, 1, (stays, 1, 4))
    noise = np.zeros((stays, _SYNTHETIC_HOURS, 4))
    for hour in hours[1:]:
        noise[:, hour] = .85 * noise[:, hour - 1] + rng.normal(0, .3, (stays, 4))
    organs = level + trend * (hours[:, None] / _SYNTHETIC_HOURS) + noise
    severity = organs.mean(-1).clip(-1, 3)  # [P, 48]

    age = rng.normal(64, 15, stays).clip(18, 95)
    worsening = (organs[:, -8:].mean(1) - organs[:, :12].mean(1)).sum(-1)  # [P]
    two_failing = np.sort(organs[:, -8:].mean(1), axis=-1)[:, -2]
    risk = 1.1 * worsening + 1.5 * (two_failing - 1).clip(0) + .02 * (age - 64)
    label = (rng.random(stays) < 1 / (1 + np.exp(-(risk - 2.9)))).astype(np.int8)

    names = list(_SYNTHETIC_VARIABLES) + ["Age", "Gender", "Height", "Weight"]
    stay, minute, variable, value = [], [], [], []

    def add(s, m, v, x):
        stay.append(s), minute.append(m), variable.append(np.full(len(s), v)), value.append(x)

    everyone = np.arange(stays)
    for name, x in (("Age", age.round()), ("Gender", rng.integers(0, 2, stays)),
                    ("Height", rng.normal(170, 10, stays).round(1)),
                    ("Weight", rng.normal(82, 18, stays).clip(35).round(1))):
        recorded = rng.random(stays) > (.3 if name == "Height" else .03)
        add(everyone[recorded], np.zeros(recorded.sum()), names.index(name), x[recorded])
    baseline = rng.normal(0, .8, (stays, len(_SYNTHETIC_VARIABLES)))
    for panel, (chance, slope, missing) in _SYNTHETIC_PANELS.items():
        s, hour = np.nonzero(rng.random(severity.shape) < (chance + slope * severity).clip(.01, .95))
        at = hour * 60 + 5 * rng.integers(0 if panel == "vitals" else 6, 12, len(s)) + (hour == 0) * 5
        for v, (mean, sd, loading, home) in enumerate(_SYNTHETIC_VARIABLES.values()):
            if home == panel:
                kept = rng.random(len(s)) > missing
                error = rng.normal(0, .4, kept.sum())
                z = baseline[s[kept], v] + organs[s[kept], hour[kept]] @ np.array(loading) + error
                add(s[kept], at[kept], v, np.maximum(mean + sd * z, mean * .05 if mean > 0 else -np.inf))
    return build_cohort("embedded synthetic cohort", names,
                        *(np.concatenate(x) for x in (stay, minute, variable, value)), stay_id=ids, answers=label)


# ----------------------------------------------------------------------------------------------------------------------
# From events in any order to a cohort, in bounded memory
# ----------------------------------------------------------------------------------------------------------------------

BLOCK = 2**22  # events that are sorted at once; a stay is never divided


class Events(NamedTuple):
    """e events of a part of the source."""

    table: Table
    stay: pd.Categorical
    time: np.ndarray                       # [e] float64 minutes since admission; or datetime64[us], NaT: static
    variable: pd.Categorical
    value: np.ndarray                      # [e] NaN: none
    row: np.ndarray | slice = slice(None)  # [e] the row of each in the table
    skip: np.ndarray | bool = False        # [e] left out, and counted already
    set_key: np.ndarray | None = None      # [e] number that tells sets apart (None: their minutes do)
    subject: pd.Categorical | None = None  # [e] whose stay it is
    points: tuple | None = None            # codes of `stay`, minutes and answers [q] of prediction points


class Source(NamedTuple):
    """What a reader makes of a folder."""

    name: str
    events: Iterable[Events]
    by_id: bool = False  # stays are sorted by id; else they keep the source's order
    empty: bool = False  # an event without a value says that something happened; else it is left out
    split: dict = {}     # stay id -> code
    given: dict = {}     # "statistics" and "vectors": DataFrames by variable


def _codes(known: dict, names) -> np.ndarray:
    """[names + 1] codes by which `known` has these names, new ones added; -1 at the end."""
    return np.array([known.setdefault(name, len(known)) for name in names] + [-1])


class _Spool:
    """Events on disk in the order in which they came, 16 bytes each, and the stay of each stretch of them."""

    def __init__(self, source: Source, report: Report, folder: Path | None, rename: dict):
        """folder: None keeps the events in memory; rename: {variable: (name, factor, offset)}."""
        self.folder, self.report, self.rename = folder, report, rename
        self.stays, self.variables, self.subject, self.points = {}, {}, {}, []  # names -> codes
        self.types, self.memory, self.seconds = {}, {}, False
        self.valued = np.zeros((2, 0), dtype=np.int64)  # [2, V] events without and with a value
        stretches = []
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(desc="reading", unit=" events", unit_scale=True, disable=None, delay=5))
            files = {}
            for events in source.events:
                stay, arrays = self.usable(events, source.empty)
                bar.update(len(stay))
                for name, array in arrays.items():
                    self.types.setdefault(name, array.dtype)
                    if folder is None:
                        self.memory[name] = np.append(self.memory.get(name, array[:0]), array)
                        continue
                    if name not in files:
                        files[name] = stack.enter_context(open(folder / name, "wb"))
                    array.tofile(files[name])
                start = np.flatnonzero(np.diff(stay, prepend=-1))
                stretches.append((stay[start], np.diff(start, append=len(stay))))
        self.stretch_stay, self.stretch_length = map(np.concatenate, zip(*stretches))

    def usable(self, events: Events, empty: bool) -> tuple[np.ndarray, dict]:
        """Stay [n] of the usable events, each stay in one stretch, and the arrays to write; the others are counted."""
        table, time = events.table, events.time
        place = _codes(self.stays, events.stay.categories)
        if events.points:
            self.points.append((place[events.points[0]], *events.points[1:]))
        if events.subject is not None:
            self.note_subjects(table, place[events.stay.codes], events.subject)
        timed = ~np.isnan(time) if time.dtype == np.float64 else True  # a clock time that is missing is static
        named = (place[events.stay.codes] >= 0) & timed & ~np.asarray(events.skip)
        value, variables = events.value, events.variable.categories
        if self.rename:
            scale = np.array([self.rename.get(name, (name, 1, 0))[1:] for name in variables] + [(1, 0)], dtype=float)
            value = value * scale[events.variable.codes, 0] + scale[events.variable.codes, 1]
            table.note("values renamed or rescaled by --variables", events.variable.isin(list(self.rename)), events.row)
        with np.errstate(over="ignore"):
            value = value.astype(np.float32)
        unusable = np.isinf(value) if empty else ~np.isfinite(value)
        nameless = named & (events.variable.codes < 0)
        used = named & ~nameless & ~unusable
        for reason, bad in (("rows with an empty variable", nameless),
                            ("rows without a finite value", named & ~nameless & unusable)):
            table.note(reason, bad, events.row)

        variable = events.variable.codes[used]
        # A variable of which no event is usable does not exist.
        found = np.flatnonzero(np.bincount(variable, minlength=1))
        code = np.zeros(len(variables), dtype=np.int32)
        code[found] = _codes(self.variables, [self.rename.get(name, (name,))[0] for name in variables[found]])[:-1]
        arrays = {"time": time[used], "variable": code[variable], "value": value[used]}
        if events.set_key is not None:
            arrays["set_key"] = events.set_key[used]
        if self.types and {name: array.dtype for name, array in arrays.items()} != self.types:
            raise InputError(f"{table.place(0)}: clock times or set numbers here and none elsewhere; write all files "
                             "alike")
        if time.dtype != np.float64 and not self.seconds:
            clock = arrays["time"][~np.isnat(arrays["time"])].view(np.int64)
            self.seconds = bool((clock % MINUTE).any())
        more = np.zeros((2, len(self.variables)), dtype=np.int64)
        more[:, :self.valued.shape[1]] = self.valued
        for row, valued in enumerate((np.isnan(arrays["value"]), ~np.isnan(arrays["value"]))):
            more[row] += np.bincount(arrays["variable"][valued], minlength=len(self.variables))
        self.valued = more

        stay = place[events.stay.codes[used]]
        if np.count_nonzero(np.diff(stay)) >= len(np.unique(stay)):  # some stay lies in several stretches
            order = np.argsort(stay, kind="stable")
            stay, arrays = stay[order], {name: array[order] for name, array in arrays.items()}
        return stay, arrays

    def note_subjects(self, table: Table, stay: np.ndarray, subject: pd.Categorical) -> None:
        """Whose stay each is; a stay of two subjects is wrong."""
        names = [*subject.categories, None]
        pairs, rows = np.unique(stay * len(names) + subject.codes % len(names), return_index=True)
        for row in rows[(stay[rows] >= 0) & (subject.codes[rows] >= 0)]:
            known = self.subject.setdefault(stay[row], names[subject.codes[row]])
            table.refuse("subject_id", (np.arange(len(stay)) == row) & (known != names[subject.codes[row]]),
                         ", and another elsewhere for the same stay; give one")

    def parts(self, source: Source) -> Iterator[Cohort]:
        """The cohort, some stays at a time. What was noted of all lies with the last. Raises InputError where no event
        is usable."""
        if not len(self.stretch_stay):
            raise InputError(f"{source.name}: no usable event in any stay; check the files' columns and values")
        stays, variables = (np.array(list(names), dtype=str) for names in (self.stays, self.variables))
        events = np.bincount(self.stretch_stay, self.stretch_length, len(stays)).astype(np.int64)  # [stays]
        used = np.flatnonzero(events)
        used = used[np.argsort(stays[used])] if source.by_id else used
        rank, order = np.full(len(stays), len(used)), np.argsort(variables)
        rank[used] = np.arange(len(used))
        variables, variable_rank = variables[order], np.argsort(order).astype(np.int32)
        self.note_variables(variables, self.valued[:, order], source)
        self.report.counts["stays without a usable event"] += len(stays) - len(used)
        subject = np.array([self.subject.get(s, stays[s]) for s in used], dtype=str)
        split = np.array([source.split.get(name, -1) for name in stays[used]], dtype=np.int8)
        points = None
        if self.points:
            stay, minute, answer = map(np.concatenate, zip(*self.points))
            by_stay = np.argsort(rank[stay], kind="stable")
            points = rank[stay][by_stay], minute[by_stay], answer[by_stay]

        stretch = np.argsort(rank[self.stretch_stay], kind="stable")
        stretch_rank, length = rank[self.stretch_stay[stretch]], self.stretch_length[stretch]
        first = (np.cumsum(self.stretch_length) - self.stretch_length)[stretch]
        before = np.cumsum(events[used]) - events[used]
        edges = [0, *(np.flatnonzero(np.diff(before // BLOCK)) + 1), len(used)]
        for a, b in tqdm([*zip(edges, edges[1:])], desc="sorting", disable=None, delay=5):
            some = slice(*np.searchsorted(stretch_rank, (a, b)))
            place = ranges(first[some], length[some])
            read = {name: (self.memory[name] if self.memory else np.memmap(self.folder / name, kind, "r"))[place]
                    for name, kind in self.types.items()}
            stay, offset = np.repeat(stretch_rank[some] - a, length[some]), None
            minute, origin = read["time"], None
            if minute.dtype != np.float64:
                minute, offset, origin = since_first(minute, stay)
            elif "set_key" in read:  # a set that spans several minutes is charted at its first
                minute = pd.Series(minute).groupby([stay, read["set_key"]]).transform("min").to_numpy()
            part = build_cohort(source.name, variables, stay, minute, variable_rank[read["variable"]], read["value"],
                                stays[used[a:b]], split=split[a:b], set_key=read.get("set_key"), subject=subject[a:b],
                                origin=origin, offset=offset, whole=True, **source.given)
            if not self.seconds:
                part.event_offset = np.zeros(0, dtype=np.int32)
            again = "events given more than once (same stay, minute, variable and value; kept)"
            self.report.counts[again] += duplicates(part)
            if points:
                rows = slice(*np.searchsorted(points[0], (a, b)))
                part = with_points(part, np.bincount(points[0][rows] - a, minlength=b - a), points[1][rows],
                                   points[2][rows])
            if b == len(used):
                part.notes, part.examples = {**part.notes, **self.report.counts}, self.report.examples
            yield part

    def note_variables(self, variables: np.ndarray, valued: np.ndarray, source: Source) -> None:
        """What is to be said of the vocabulary. valued: [2, V] events without and with a value."""
        alike = {}
        for name in variables:
            alike.setdefault("".join(name.split()).casefold(), []).append(str(name))
        alike = [names for names in alike.values() if len(names) > 1]
        counts = self.report.counts
        if alike:
            reason = "variables whose names differ only by case or spaces (kept apart)"
            counts[reason], self.report.examples[reason] = sum(map(len, alike)), ", ".join(alike[0])
        reason = "events without a value of variables that have values elsewhere (their presence counts)"
        counts[reason] += int(valued[0][valued[1] > 0].sum())
        for name, rows in source.given.items():
            known = np.isin(variables, rows.index)
            how = "fitted" if name == "statistics" else "hashed from the name"
            counts[f"variables without given {name} ({how})"] = int((~known).sum())
            counts[f"given {name} of no variable"] = len(rows) - int(known.sum())


def since_first(time: np.ndarray, stay: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minutes [e] since the minute of each stay's first event, microseconds [e] within the minute (-1: static, at
    minute 0), and that minute [stays] on the clock (NaT: all of the stay is static). time [e]: datetime64[us], NaT:
    static, stay after stay."""
    static, time, never = np.isnat(time), time.view(np.int64), np.iinfo(np.int64).max
    minute = time // MINUTE
    offset = time - minute * MINUTE
    minute[static], offset[static] = never, -1
    origin = np.minimum.reduceat(minute, np.flatnonzero(np.diff(stay, prepend=-1)))
    minute -= origin[stay]
    minute[static] = 0
    origin[origin == never] = np.datetime64("NaT").astype(np.int64)
    return minute, offset, origin.view("datetime64[m]")


def duplicates(cohort: Cohort) -> int:
    """How many events equal an earlier one of their set (by a 64-bit hash)."""
    key = np.repeat(np.arange(len(cohort.set_minute), dtype=np.uint64),
                    np.diff(cohort.set_start)) * np.uint64(len(cohort.variables))
    key += cohort.event_variable.astype(np.uint64)
    key *= np.uint64(0x9E3779B97F4A7C15)
    key ^= cohort.event_value.view(np.uint32).astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    key.sort()
    return int((key[1:] == key[:-1]).sum())


# ----------------------------------------------------------------------------------------------------------------------
# Reader: PhysioNet / CinC Challenge 2012
# ----------------------------------------------------------------------------------------------------------------------

_DESCRIPTORS = ("Age", "Gender", "Height", "ICUType", "Weight")  # -1 means "not recorded"
_CLOCK = re.compile(r"\d{1,6}:[0-5]\d")


def _record_sets(folder: Path, name: str, letters: str) -> dict[str, Path]:
    """set letter -> its records: the unpacked folder where it exists, else the archive as downloaded."""
    found = {}
    for letter in letters:
        for path in (folder / f"{name}{letter}", folder / f"{name}{letter}.tar.gz"):
            if path.exists():
                found.setdefault(letter, path)
    return found


def _record_files(sets: dict[str, Path], suffix: str) -> list[Path]:
    """The records of folders; an archive is one file."""
    files = []
    for path in sets.values():
        records = sorted(path.glob(f"[!.]*{suffix}")) if path.is_dir() else [path]
        if not records:
            raise InputError(f"{path}: holds no <record>{suffix}; unpack {path.name}.tar.gz there again")
        files += records
    return files


def _stay_a_file(table: Table, known: dict) -> pd.Categorical:
    """[rows] stays named by their files. known: stay -> file; InputError where two files give one name."""
    for path in table.paths:
        if known.setdefault(path.stem, path) != path:
            raise InputError(f"{path}: stay {path.stem} occurs more than once, see {known[path.stem]}; give each stay "
                             "an id of its own")
    return pd.Categorical.from_codes(table.file, [path.stem for path in table.paths])


def _physionet2012_sets(folder: Path) -> dict[str, Path]:
    return _record_sets(folder, "set-", "abc")


def read_physionet2012(folder: Path, report: Report) -> Source:
    """Sets a, b, c of the Challenge 2012 (Silva et al. 2012), whichever lie in `folder`. Label: in-hospital death, of
    Outcomes-a.txt.

    The outcome files' scores and lengths of stay never become inputs. ICUType is categorical: one event per type, of
    value 1.
    """
    def events(known={}):
        for table in tables(_record_files(sets, ".txt"), {"Time": str, "Parameter": str, "Value": VALUE},
                            report=report):
            stay, time, parameter, value = _stay_a_file(table,
                                                        known), table["Time"], table["Parameter"], table["Value"].copy()
            clock = np.array([bool(_CLOCK.fullmatch(text)) for text in time.categories] + [False])[time.codes]
            table.refuse("Time", ~clock, ", not HH:MM; mend or remove the line")
            minutes = np.array([int(t[:-3]) * 60 + int(t[-2:]) if _CLOCK.fullmatch(t) else np.nan
                                for t in time.categories] + [np.nan])
            kinds, code = list(parameter.categories), parameter.codes.astype(np.int64)
            identity, icu = (code == (kinds.index(name) if name in kinds else -2) for name in ("RecordID", "ICUType"))
            own = pd.to_numeric(pd.Series(stay.categories), errors="coerce").to_numpy()[stay.codes]
            table.refuse("Value", identity & (value != own),
                         ", the RecordID of another record than the file's name says; rename the file")
            unrecorded = np.isin(code, [i for i, name in enumerate(kinds) if name in _DESCRIPTORS]) & (value == -1)
            table.note("descriptors not recorded (-1)", unrecorded)
            icu &= np.isfinite(value) & ~unrecorded
            for kind in np.unique(value[icu]):
                code[icu & (value == kind)] = len(kinds)
                kinds.append(f"ICUType={kind:g}")
            value[icu] = 1
            yield Events(table, stay, minutes[time.codes], pd.Categorical.from_codes(code, kinds), value,
                         skip=identity | unrecorded)
    sets = _physionet2012_sets(folder)
    return Source("PhysioNet 2012 set " + "+".join(sets), events())


# ----------------------------------------------------------------------------------------------------------------------
# Reader: the original implementation's layout
# ----------------------------------------------------------------------------------------------------------------------

def _original_files(folder: Path) -> list[Path]:
    """The stays' files: patient_ehr/{train,valid,test}/*.parquet or *.csv of `folder`, which may be patient_ehr
    itself."""
    home = folder if folder.name == "patient_ehr" else folder / "patient_ehr"
    return [path for split in SPLITS for path in sorted((home / split).glob("[!.]*"))
            if path.suffix in (".parquet", ".csv")]


def _original_sources(folder: Path) -> list[Path]:
    files = _original_files(folder)
    cached = files[0].parents[2] / "cached.csv"
    return files + [cached] * cached.is_file()


class _NumberType:
    """Stands in for numpy.dtype in a pickle: keeps the code (f8) and the byte order, and can do nothing else."""

    def __init__(self, code, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    @staticmethod
    def scalar(kind, raw):
        if not re.fullmatch("[fiu][248]|[iub]1", kind.code):
            raise pickle.UnpicklingError(f"a NumPy scalar of type {kind.code!r}")
        return np.frombuffer(raw, kind.order + kind.code)[0].item()


class _PlainUnpickler(pickle.Unpickler):
    """Admits containers, strings, numbers and NumPy scalars, the last by stand-ins: nothing that the file names is
    imported or called."""

    _STAND_INS = {("numpy", "dtype"): _NumberType, ("numpy._core.multiarray", "scalar"): _NumberType.scalar,
                  ("numpy.core.multiarray", "scalar"): _NumberType.scalar, ("_codecs", "encode"): lambda text,
                  _: text.encode("latin1")}

    def find_class(self, module, name):
        try:
            return self._STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _read_statistics(path: Path) -> pd.DataFrame:
    """mean and std by variable, from a CSV (variable,mean,std) or a pickle {variable: {"mean": .., "std": ..}}. Left
    out: those of a variable whose mean is not finite or whose std is zero or not finite, so that they are fitted.
    InputError for a negative std."""
    if path.suffix == ".pkl":
        try:
            with open(path, "rb") as file:
                content = _PlainUnpickler(file).load()
            known = {str(name): (float(entry["mean"]), float(entry["std"])) for name, entry in content.items()}
        except Exception as error:  # a damaged or hostile pickle raises anything
            raise InputError(f"{path}: not a plain pickle of {{variable: {{'mean': number, 'std': number}}}} "
                             f"({type(error).__name__}: {error}); "
                             "write it so, or as CSV with variable,mean,std") from None
        given = pd.DataFrame.from_dict(known, orient="index", columns=["mean", "std"])
        if (given["std"] < 0).any():
            raise InputError(f"{path}: std of {given.index[given['std'] < 0][0]} is negative; mend it")
    elif path.suffix == ".csv":
        table = read_table([path], {"variable": str, "mean": float, "std": float})
        names = pd.Index(table["variable"])
        table.refuse("variable", names.isna() | names.duplicated(),
                     ", where each line names another one; mend or remove the line")
        table.refuse("std", table["std"] < 0, ", below 0; mend the line")
        table.report.settle()
        given = pd.DataFrame({"mean": table["mean"], "std": table["std"]}, index=names.astype(object))
    else:
        raise InputError(f"{path}: statistics of this kind are not read; give .csv with variable,mean,std or .pkl")
    given = given.astype(np.float32)
    return given[np.isfinite(given).all(axis=1) & (given["std"] > 0)]


def _read_vectors(path: Path) -> pd.DataFrame:
    """One vector a variable: `Key`, then a column each dimension. A column without a name (a row number that pandas
    wrote) is none."""
    table = read_table([path], {"Key": str}, rest=float)
    names = pd.Index(table["Key"])
    table.refuse("Key", names.isna() | names.duplicated(),
                 ", where each line names another variable; mend or remove the line")
    columns = {name: column for name, column in table.columns.items() if name != "Key"}
    if not columns:
        raise InputError(f"{path}: no column beside Key; add one for each dimension")
    for name, column in columns.items():
        table.refuse(name, ~np.isfinite(column), ", not finite; mend the line")
    table.report.settle()
    return pd.DataFrame(columns, index=names.astype(object), dtype=np.float32)


def _minutes(table: Table) -> np.ndarray:
    """[rows] of column `minute`: minutes (NaN where they are none, which is refused) or clock times."""
    minute = table["minute"]
    good = ~np.isnat(minute) if minute.dtype != np.float64 else np.abs(minute) < 1e8
    table.refuse("minute", ~good, "; give minutes since admission, between -1e8 and 1e8 (190 years)")
    return np.where(good, minute, np.array(np.nan if minute.dtype == np.float64 else "NaT", minute.dtype))


def read_original(folder: Path, report: Report, params_map: Path | None = None) -> Source:
    """patient_ehr/{train,valid,test}/<id>.parquet or .csv: variable, value, minute and perhaps set_index, which then
    tells the sets apart.

    The folder is the stay's split. params_map: see `_read_statistics`; cached.csv beside patient_ehr: see
    `_read_vectors`. A set that spans several minutes is charted at its first.
    """
    def events(known={}):
        for table in tables(files, {"variable": str, "value": VALUE, "minute": float}, {"set_index": float},
                            report=report):
            key = table["set_index"] if "set_index" in table else None
            if key is not None:
                table.refuse("set_index", ~np.isfinite(key), "; number the set, or leave the column out of all files")
            yield Events(table, _stay_a_file(table, known), _minutes(table), table["variable"], table["value"],
                         set_key=key)
    files = _original_files(folder)
    cached, given = files[0].parents[2] / "cached.csv", {}
    if params_map:
        given["statistics"] = _read_statistics(params_map)
    if cached.is_file():
        given["vectors"] = _read_vectors(cached)
    split = {path.stem: SPLITS.index(path.parent.name) for path in files}
    return Source("original layout (patient_ehr)", events(), split=split, given=given)


# ----------------------------------------------------------------------------------------------------------------------
# Reader: one long table
# ----------------------------------------------------------------------------------------------------------------------

def read_long_table(folder: Path, report: Report) -> Source:
    """The table `events` (see `named_tables`): stay_id, minute, variable, value, and perhaps subject_id. Minutes count
    from admission (in Parquet they may be durations, or clock times, which then count from the stay's first); an event
    without a value says that something happened."""
    files = named_tables(folder, "events")
    return Source(f"long table {files[0].name}" + f" and {len(files) - 1} more" * (len(files) > 1),
                  _long_events(tables(files, LONG, {"subject_id": str}, report=report)), by_id=True, empty=True)


LONG = {"stay_id": str, "minute": TIME, "variable": str, "value": VALUE}


def _long_events(parts: Iterable[Table]) -> Iterator[Events]:
    for table in parts:
        table.refuse("stay_id", table["stay_id"].codes < 0, "; name the stay or remove the line")
        subject = table["subject_id"] if "subject_id" in table else None
        yield Events(table, table["stay_id"], _minutes(table), table["variable"], table["value"], subject=subject)


def cohort_of_frame(events: pd.DataFrame, report: Report, rename: dict = {}) -> tuple[Cohort | None, np.ndarray]:
    """The cohort of a long table in memory (None: no event is usable), and the ids of all its stays in their order;
    rename: see `read_map`. Nothing is written. Raises InputError as `load_cohort` does."""
    source = Source("events", _long_events(frame_tables(events, "events", LONG, {"subject_id": str}, report)),
                    by_id=True, empty=True)
    spool = _Spool(source, report, None, rename)
    ids = np.array(sorted(spool.stays), dtype=str)
    return _whole(spool.parts(source)) if len(spool.stretch_stay) else None, ids


# ----------------------------------------------------------------------------------------------------------------------
# Reader: MEDS (Medical Event Data Standard)
# ----------------------------------------------------------------------------------------------------------------------

def _meds_events(folder: Path) -> list[Path]:
    return sorted((folder / "data").rglob("[!.]*.parquet"))


def _meds_labels(folder: Path, task: str | None) -> list[Path]:
    """The files of one task: a file or folder directly in labels/; entries named by numbers, or like splits, are shards
    of one."""
    tasks = {}
    for path in sorted((folder / "labels").glob("[!.]*")):
        if files := table_files(path):
            shard = path.stem.isdigit() or path.stem in _SPLIT_WORDS
            tasks.setdefault("labels" if shard else path.stem, []).extend(files)
    if len(tasks) > 1 and task is None or task is not None and task not in tasks:
        raise InputError(f"{folder / 'labels'}: holds the tasks {', '.join(tasks) or '(none)'}; choose one with --task "
                         "NAME")
    return tasks[task or next(iter(tasks))] if tasks else []


def read_meds(folder: Path, report: Report) -> Source:
    """data/**/*.parquet (subject_id, time or null = static, code, and perhaps numeric_value): a subject is a stay.

    Minutes count from the minute of the subject's first timed event; static events lie at minute 0. A code without a
    number is an event without a value. MEDS_DEATH never enters.
    """
    def events():
        columns = {"subject_id": str, "time": np.datetime64, "code": str}
        for table in tables(_meds_events(folder), columns, {"numeric_value": float}, report=report):
            table.refuse("subject_id", table["subject_id"].codes < 0, "; name the subject or remove the row")
            code = table["code"]
            death = np.array([name.startswith("MEDS_DEATH") for name in code.categories] + [False])[code.codes]
            table.note("MEDS_DEATH events", death)
            value = table["numeric_value"] if "numeric_value" in table else np.full(len(death), np.nan)
            yield Events(table, table["subject_id"], table["time"], code, value, skip=death)
    return Source("MEDS", events(), by_id=True, empty=True)


# ----------------------------------------------------------------------------------------------------------------------
# Reader: PhysioNet / CinC Challenge 2019
# ----------------------------------------------------------------------------------------------------------------------

_HOURLY_DESCRIPTORS = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime", "ICULOS")  # repeated in every row of a record


def _physionet2019_sets(folder: Path) -> dict[str, Path]:
    return _record_sets(folder, "training_set", "AB")


def read_physionet2019(folder: Path, report: Report) -> Source:
    """training_setA/*.psv or training_setA.tar.gz, and training_setB (Reyna et al. 2019): a stay a file, a row an hour
    (minute 60 * row), NaN = not measured.

    An hour is a prediction point, SepsisLabel its answer (NaN where no file has the column), never an input. A
    descriptor, repeated every hour, enters once, where it is first recorded (ICULOS then says how long the stay had
    lasted when the record begins; later hours are the minutes themselves).
    """
    def events(known={}):
        for table in tables(_record_files(_physionet2019_sets(folder), ".psv"), {}, {"SepsisLabel": float}, rest=VALUE,
                            report=report):
            file, sepsis = table.file, np.full(table.rows.sum(), np.nan)
            if "SepsisLabel" in table:
                sepsis = table["SepsisLabel"]
                table.refuse("SepsisLabel", (sepsis != 0) & (sepsis != 1), ", not 0 or 1; mend the line")
            names = [name for name in table.columns if name != "SepsisLabel"]
            cells = np.stack([table[name] for name in names], axis=1)  # [hours, variables]
            row, variable = np.nonzero(~np.isnan(cells))
            stay = _stay_a_file(table, known)
            repeated = np.isin(variable, [i for i, name in enumerate(names) if name in _HOURLY_DESCRIPTORS])
            repeated &= pd.Series(file[row] * len(names) + variable).duplicated().to_numpy()
            table.note("repeated descriptors", repeated, row)
            minute = 60.0 * ranges(np.zeros(len(table.rows), dtype=np.int64), table.rows)
            yield Events(table, stay[row], minute[row], pd.Categorical.from_codes(variable, names),
                         cells[row, variable], row, repeated,
                         points=(file, minute, sepsis))
    return Source("PhysioNet 2019", events())


# ----------------------------------------------------------------------------------------------------------------------
# Choosing a reader, and the cache
# ----------------------------------------------------------------------------------------------------------------------

class Reader(NamedTuple):
    name: str                                   # what it reads
    matches: Callable[[Path], bool]             # does it lie in this folder?
    sources: Callable[[Path], list[Path]]       # the files that its cohort depends on
    read: Callable[..., Source]                 # (folder, report, **options)
    labels: Callable[[Path, str | None], list[Path]] = lambda folder, task: []  # its labels' files; of which task
    splits: Callable[[Path], list[Path]] = lambda folder: []                    # its split's files
    options: tuple[str, ...] = ()               # what only it takes: params_map, task


READERS = [  # the first that matches is taken
    Reader("PhysioNet 2012 (set-a.tar.gz or set-a/ with Outcomes-a.txt)",
           lambda folder: bool(_physionet2012_sets(folder)),
           lambda folder: _record_files(_physionet2012_sets(folder), ".txt"), read_physionet2012,
           lambda folder, _: [path for letter in _physionet2012_sets(folder)
                              if (path := folder / f"Outcomes-{letter}.txt").is_file()]),
    Reader("the original layout (patient_ehr/{train,valid,test}/<id>.parquet or .csv)",
           lambda folder: bool(_original_files(folder)),
           _original_sources, read_original, options=("params_map",)),
    Reader("a long table (events.csv or events.parquet, and labels.csv)",
           lambda folder: bool(named_tables(folder, "events")),
           lambda folder: named_tables(folder, "events"), read_long_table,
           lambda folder, _: named_tables(folder, "labels")),
    Reader("PhysioNet 2019 (training_setA/*.psv or training_setA.tar.gz, training_setB)",
           lambda folder: bool(_physionet2019_sets(folder)),
           lambda folder: _record_files(_physionet2019_sets(folder), ".psv"), read_physionet2019),
    Reader("MEDS (data/**/*.parquet)", lambda folder: bool(_meds_events(folder)), _meds_events, read_meds, _meds_labels,
           lambda folder: sorted(folder.glob("metadata/subject_splits.parquet")), ("task",)),
]


def _choose_reader(folder: Path) -> tuple[Reader, Path]:
    """The reader of what lies in the folder, or one level below or above it, and where that is."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data_dir takes the folder that holds the data")
    for reader in READERS:
        if reader.matches(folder):
            return reader, folder
    if folder.name == "data" and READERS[-1].matches(folder.parent):
        return READERS[-1], folder.parent
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()
              and any(reader.matches(path) for reader in READERS)]
    if len(inside) == 1:
        return _choose_reader(inside[0])
    if inside:
        raise InputError(f"{folder}: the folders {_some([path.name for path in inside])} each hold data; name one with "
                         "--data_dir")
    raise InputError(f"{folder}: no data that a reader knows; expected one of: "
                     + "; ".join(reader.name for reader in READERS))


def read_map(path: Path) -> dict:
    """variable -> (name, factor, offset), of a CSV source,name,factor and perhaps offset: value * factor + offset is
    what enters."""
    table = read_table([path], {"source": str, "name": str, "factor": float}, {"offset": float})
    source, name, factor = table["source"], table["name"], table["factor"]
    offset = table["offset"] if "offset" in table else np.zeros(len(factor))
    table.refuse("source", (source.codes < 0) | pd.Series(source.codes).duplicated().to_numpy(),
                 ", where each line names another variable; mend or remove the line")
    table.refuse("name", name.codes < 0, "; give the name that the variable takes")
    table.refuse("factor", ~np.isfinite(factor), "; give 1 where the unit stays")
    table.refuse("offset", np.isinf(offset), "; give 0 where there is none")
    table.report.settle()
    return dict(zip(source, zip(name, factor.tolist(), np.nan_to_num(offset).tolist())))


def load_cohort(data_dir: str | None = None, synthetic_stays: int = 1000, cache_dir: Path | None = None,
                params_map: str | None = None, label_file: str | None = None, task: str | None = None,
                hours: float | None = None, split_file: str | None = None,
                positive: str | None = None, variables_map: str | dict | None = None) -> Cohort:
    """The cohort at `data_dir` (None: the embedded one), parsed once and then memory-mapped from the cache; labels,
    subjects and splits are attached to it at each call, so that one cached cohort serves every task and its fingerprint
    knows none of them.

    Args:
        cache_dir: None: where the system keeps caches.
        params_map: statistics of the original layout.
        label_file: a file or folder of labels that lie elsewhere, see `_with_labels`; positive: the word in it that is
            label 1.
        task: which of several in a MEDS folder.
        hours: one question a stay, asked so long after its first set (but a birth), or at its end if that comes
            earlier.
        split_file: CSV stay_id,split that overrides the data's own.
        variables_map: CSV that renames and rescales variables as they are read, see `read_map`, or what it says.
    Raises InputError where the folder is missing, fits no reader, or holds a malformed file, and where an option is
    given that the reader does not take.
    """
    given = {"params_map": params_map, "label_file": label_file, "split_file": split_file}
    options = {name: Path(path) for name, path in given.items() if path}
    rename = variables_map if isinstance(variables_map, dict) else read_map(Path(variables_map)) if variables_map else {}
    folder = data_dir and Path(data_dir)
    if not folder:
        reader = Reader(f"the embedded cohort of {synthetic_stays} stays", None, lambda _: [], None)
    else:
        reader, folder = _choose_reader(folder)
    for name, value in (("params_map", params_map), ("task", task)):
        if value and name not in reader.options:
            raise InputError(f"--{name} {value}: not read with {reader.name}; leave the option out")
    for name, path in options.items():
        if not path.exists():
            raise InputError(f"--{name} {path}: no such file; correct the path")
    if task and label_file:
        raise InputError(f"--task {task}: --label_file names the labels already; leave one of them out")
    if rename and folder is None:
        raise InputError("--variables: the embedded cohort has its names and units; leave the option out, or give none "
                         "where a checkpoint keeps a map")

    cohort = _cached(reader, folder, synthetic_stays, Path(cache_dir or cache_home()),
                     {"params_map": options["params_map"]} if params_map else {}, rename)
    if splits := reader.splits(folder):
        cohort = _with_splits(cohort, _read_splits(splits))
    if not (label_file and "task" in reader.options) and (files := reader.labels(folder, task)):
        cohort = _with_labels(cohort, files, positive, points=not label_file)
    if label_file:
        if not (files := table_files(options["label_file"])):
            raise InputError(f"--label_file {label_file}: a folder without CSV or Parquet files; name the labels' file")
        cohort = _with_labels(cohort, files, positive)
    if hours and (cohort := at_hours(cohort, hours)) is None:
        raise InputError(f"--hours {hours:g}: these labels have times of their own; leave the option out")
    if split_file:
        cohort = _with_splits(cohort, told := _read_splits([options["split_file"]]))
        if (cohort.split < 0).all():
            raise InputError(f"--split {split_file}: names none of the stays, which are called "
                             f"{', '.join(cohort.stay_id[:3])} ... (the file's first: {told.index[0]}); give their ids")
    return replace(cohort, reader=f"{cohort.reader} in {folder}") if folder and folder != Path(data_dir) else cohort


def _cached(reader: Reader, folder: Path | None, synthetic_stays: int, home: Path, options: dict[str, Path],
            rename: dict) -> Cohort:
    """The data alone, from the cache in `home`; read into it where they are not there yet."""
    key = {"reader": reader.name, "options": list(options), "version": READER_VERSION, "sources":
           [[str(p.resolve()), (s := p.stat()).st_size, s.st_mtime_ns]
            for p in [*reader.sources(folder), *options.values()]], "rename": sorted(rename.items())}
    cached = home / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    cohort = open_cache(cached)
    if cohort is not None:
        return cohort
    with clear_write_error(cached, CACHE_MEND):
        cached.parent.mkdir(parents=True, exist_ok=True)
    if folder is None:
        if (size := synthetic_stays * _SYNTHETIC_BYTES) > (free := shutil.disk_usage(cached.parent).free):
            raise InputError(f"--synthetic_stays {synthetic_stays}: takes {size // 10**6:,} MB in {cached.parent}, "
                             f"where {free // 10**6:,} MB are free; give fewer, or another place with --cache_dir")
        write_cache(cached, synthetic_parts(synthetic_stays))
    else:
        report = Report()
        source = reader.read(folder, report, **options)
        with (clear_write_error(cached, CACHE_MEND),
              tempfile.TemporaryDirectory(prefix=".reading-", dir=home) as temporary):
            write_cache(cached, _Spool(source, report, Path(temporary), rename).parts(source))
    return open_cache(cached)


# ----------------------------------------------------------------------------------------------------------------------
# An example of one's own table: python readers.py --example my_table
# ----------------------------------------------------------------------------------------------------------------------

def write_long_table(folder: Path, cohort: Cohort, labels: bool = True) -> Path:
    """Write a cohort as a long table: events.csv and, with `labels`, labels.csv of a new folder. Raises InputError
    where the folder exists."""
    if folder.exists():
        raise InputError(f"{folder}: exists already; give a new folder")
    sets = np.repeat(np.arange(len(cohort.set_minute)), np.diff(cohort.set_start))
    stay = np.searchsorted(cohort.stay_start, sets, side="right") - 1
    with clear_write_error(folder):
        folder.mkdir(parents=True)
        pd.DataFrame({"stay_id": cohort.stay_id[stay], "minute": cohort.set_minute[sets],
                      "variable": np.array(cohort.variables)[cohort.event_variable],
                      "value": cohort.event_value}).to_csv(folder / "events.csv", index=False)
        if labels:
            table = pd.DataFrame({"stay_id": cohort.stay_id, "label": cohort.stay_label})
            table.to_csv(folder / "labels.csv", index=False)
    return folder


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Write an example of the long table that train.py --data_dir reads: "
                                                 "200 stays of the embedded cohort.", allow_abbrev=False)
    parser.add_argument("--example", metavar="DIR", required=True, help="the new folder of events.csv and labels.csv")
    folder, cohort = Path(parser.parse_args(argv).example), synthetic_cohort(200)
    cohort = replace(cohort, stay_id=np.arange(1001, 1001 + len(cohort)).astype(str))
    try:
        write_long_table(folder, cohort)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: events.csv, {len(cohort.event_value):,} events of {len(cohort)} stays, and labels.csv")
    print(f"next: python train.py --mode pretrain --data_dir {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
