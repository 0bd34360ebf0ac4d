"""Readers: stays in any known layout, parsed once, part by part, into the cache; and what is told of them
beside it: labels, splits, subjects.

A reader yields `Events`, part after part; `_Spool` writes them to disk as they come and then sorts them into
a cohort, some stays at a time: what is held in memory does not grow with the data.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from data import (KINDS, MINUTE, READER_VERSION, SPLITS, SYNTHETIC_BYTES, Cohort, InputError, build_cohort,
                  clear_write_error, duplicates, event_table, new_folder, ranges, sets_charted, since_first,
                  synthetic_cohort, synthetic_parts, whole_cohort)
from labels import (SPLIT_WORDS, read_columns, read_map, read_splits, read_statistics, read_vectors,
                    renames_and_labels, with_labels, with_splits)
from questions import at_hours, with_points
from settings import LineParser
from tables import (ANY, CACHE_MEND, ID, OWNER, TIME, VALUE, Report, Table, cache_home, column_names,
                    files_in, frame_tables, named_tables, of_each, of_others, open_cache, plain_name, scratch,
                    some, table_files, tables, write_cache)


# ------------------------------------------------------------------------------------------------------------
# From events in any order to a cohort, in bounded memory
# ------------------------------------------------------------------------------------------------------------

BLOCK = 2**22  # events that are sorted at once; a stay is never divided
CATEGORIES = 50  # more texts than this of one variable are no categories
YEAR = 365 * 1440  # minutes
HERE = "\0"  # stands for the data's folder in what is cached


class Events(NamedTuple):
    """e events of a part of the source."""

    table: Table
    stay: pd.Categorical
    time: np.ndarray                       # [e] float64 minutes since admission; or datetime64[us], NaT:
                                           #     static
    variable: pd.Categorical
    value: np.ndarray                      # [e] NaN: none
    row: np.ndarray | slice = slice(None)  # [e] the row of each in the table
    skip: np.ndarray | bool = False        # [e] left out, and counted already
    set_key: np.ndarray | None = None      # [e] number that tells sets apart (None: their minutes do)
    subject: pd.Categorical | None = None  # [e] whose stay it is
    points: tuple | None = None            # codes of `stay`, minutes and answers [q] of prediction points
    text: pd.Categorical | None = None     # [e] a value that is no number


class Source(NamedTuple):
    """What a reader makes of a folder."""

    name: str
    events: Iterable[Events]
    by_id: bool = False  # stays are sorted by id; else they keep the source's order
    empty: bool = False  # an event without a value says that something happened; else it is left out
    split: dict = {}     # stay id -> code, complete when all events were read
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
        self.kinds, self.unmet = {}, set(rename)  # variable -> {text: its first place}; sources not met yet
        # The number of events of variable v, without a value at 2 v, with one at 2 v + 1.
        self.events = pd.Series(dtype=np.int64)
        stretches = []
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(desc="reading", unit=" events", unit_scale=True, disable=None,
                                           delay=5))
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
        """Stay [n] of the usable events, each stay in one stretch, and the arrays to write; the others are
        counted."""
        table, time = events.table, events.time
        place = _codes(self.stays, events.stay.categories)
        if events.points:
            self.points.append((place[events.points[0]], *events.points[1:]))
        if events.subject is not None:
            self.note_subjects(table, place[events.stay.codes], events.subject)
        # A clock time that is missing is static.
        timed = ~np.isnan(time) if time.dtype == np.float64 else True
        named = (place[events.stay.codes] >= 0) & timed & ~np.asarray(events.skip)
        value, variables = events.value, events.variable.categories
        if self.rename:
            factor, offset = of_each(events.variable, lambda name: self.rename.get(name, (name, 1., 0.))[1:],
                                     (1., 0.)).T
            value = value * factor + offset
            renamed = events.variable.isin(list(self.rename))
            table.note("values renamed or rescaled by --variables", renamed, events.row)
            self.unmet -= set(variables)
        with np.errstate(over="ignore"):
            value = value.astype(np.float32)
        unusable = np.isinf(value) if empty else ~np.isfinite(value)
        nameless = named & (events.variable.codes < 0)
        used = named & ~nameless & ~unusable
        for reason, bad in (("rows with an empty variable", nameless),
                            ("rows without a finite value", named & ~nameless & unusable)):
            table.note(reason, bad, events.row)

        names = [self.rename.get(name, (name,))[0] for name in variables]
        variable = np.array(events.variable.codes[used], dtype=np.int64)
        if events.text is not None:
            names = self.with_texts(names, variable, events.text.codes[used], events, np.flatnonzero(used))
        # A variable of which no event is usable does not exist.
        found = np.flatnonzero(np.bincount(variable, minlength=1))
        code = np.zeros(len(names) + 1, dtype=np.int32)
        code[found] = _codes(self.variables, [names[v] for v in found])[:-1]
        arrays = {"time": time[used], "variable": code[variable], "value": value[used]}
        if events.set_key is not None:
            arrays["set_key"] = events.set_key[used]
        if self.types and {name: array.dtype for name, array in arrays.items()} != self.types:
            raise InputError(f"{table.place(0)}: clock times or set numbers here and none elsewhere; write "
                             "all files alike")
        if time.dtype != np.float64 and not self.seconds:
            clock = arrays["time"][~np.isnat(arrays["time"])].view(np.int64)
            self.seconds = bool((clock % MINUTE).any())
        counts = np.bincount(2 * arrays["variable"] + ~np.isnan(arrays["value"]))
        self.events = self.events.add(pd.Series(counts), fill_value=0)

        stay = place[events.stay.codes[used]]
        if np.count_nonzero(np.diff(stay)) >= len(np.unique(stay)):  # some stay lies in several stretches
            order = np.argsort(stay, kind="stable")
            stay, arrays = stay[order], {name: array[order] for name, array in arrays.items()}
        return stay, arrays

    def with_texts(self, names: list, variable: np.ndarray, text: np.ndarray, events: Events, row: np.ndarray
                   ) -> list:
        """Make an event [n] of `variable` with a `text` (-1: none) one of the variable "name=text", in place.
        Returns the longer names; `merged` decides when all are known. row [n]: each event's row in the
        table."""
        said, texts = np.flatnonzero((text >= 0) & (variable >= 0)), events.text.categories
        pair, first, place = np.unique(variable[said] * len(texts) + text[said], return_index=True,
                                       return_inverse=True)
        variable[said] = len(names) + place
        pairs = [(names[p // len(texts)], texts[p % len(texts)]) for p in pair]
        for (name, said_there), at in zip(pairs, row[said[first]]):
            self.kinds.setdefault(name, {}).setdefault(said_there, events.table.place(int(at)))
        return names + [f"{name}={said_there}" for name, said_there in pairs]

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """[V] the code that each variable takes at last: a text beside numbers, or one of too many, only says
        that its variable was recorded; else it is a category. [V, 2] its events without and with a value."""
        for name in self.kinds:
            self.variables.setdefault(name, len(self.variables))
        events = self.events.reindex(range(2 * len(self.variables)), fill_value=0)
        events = events.to_numpy(np.int64).reshape(-1, 2)
        code = np.arange(len(self.variables))
        for name, texts in self.kinds.items():
            mine = [self.variables[f"{name}={text}"] for text in texts]
            reason = "texts of variables without numbers, entered as categories (name=text, without a value)"
            if events[self.variables[name], 1] or len(texts) > CATEGORIES:
                code[mine] = self.variables[name]
                reason = (f"texts among numbers, or of more than {CATEGORIES} kinds (they count as recorded, "
                          "without a value)")
            self.report.counts[reason] += int(events[mine, 0].sum())
            text, place = next(iter(texts.items()))
            self.report.examples.setdefault(reason, f"{place}, {name}={text}")
        return code, events

    def note_subjects(self, table: Table, stay: np.ndarray, subject: pd.Categorical) -> None:
        """Whose stay each is; a stay of two subjects is wrong."""
        names = [*subject.categories, None]
        pairs, rows = np.unique(stay * len(names) + subject.codes % len(names), return_index=True)
        for row in rows[(stay[rows] >= 0) & (subject.codes[rows] >= 0)]:
            known = self.subject.setdefault(stay[row], names[subject.codes[row]])
            table.refuse("subject_id", (np.arange(len(stay)) == row) & (known != names[subject.codes[row]]),
                         ", and another elsewhere for the same stay; give one")

    def parts(self, source: Source) -> Iterator[Cohort]:
        """The cohort, some stays at a time. What was noted of all lies with the last. Raises InputError where
        no event is usable."""
        if not len(self.stretch_stay):
            raise InputError(f"{source.name}: no usable event in any stay; check the files' columns and "
                             "values")
        code, valued = self.merged()
        stays, variables = (np.array(list(names), dtype=str) for names in (self.stays, self.variables))
        events = np.bincount(self.stretch_stay, self.stretch_length, len(stays)).astype(np.int64)  # [stays]
        used = np.flatnonzero(events)
        used = used[np.argsort(stays[used])] if source.by_id else used
        rank = np.full(len(stays), len(used))
        rank[used] = np.arange(len(used))
        kept = np.unique(code[valued.any(1)])
        kept = kept[np.argsort(variables[kept])]
        variable_rank = np.zeros(len(variables), dtype=np.int32)
        variable_rank[kept] = np.arange(len(kept))
        variable_rank, variables = variable_rank[code], variables[kept]
        self.note_variables(variables, valued[kept], source)
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
            arrays = self.memory or {name: np.memmap(self.folder / name, kind, "r")
                                     for name, kind in self.types.items()}
            read = {name: array[place] for name, array in arrays.items()}
            stay, offset = np.repeat(stretch_rank[some] - a, length[some]), None
            minute, origin = read["time"], None
            if minute.dtype != np.float64:
                minute, offset, origin = since_first(minute, stay)
            elif "set_key" in read:  # a set that spans several minutes is charted at its first
                minute, offset = sets_charted(minute, stay, read["set_key"])
            part = build_cohort(source.name, variables, stay, minute, variable_rank[read["variable"]],
                                read["value"], stays[used[a:b]], split=split[a:b], subject=subject[a:b],
                                set_key=read.get("set_key"), origin=origin, offset=offset, whole=True,
                                **source.given)
            if not self.seconds and "set_key" not in read:
                part.event_offset = np.zeros(0, dtype=np.int32)
            again = "events given more than once (same stay, minute, variable and value; kept)"
            self.report.counts[again] += duplicates(part)
            self.note_first_events(part)
            if points:
                rows = slice(*np.searchsorted(points[0], (a, b)))
                count = np.bincount(points[0][rows] - a, minlength=b - a)
                part = with_points(part, count, points[1][rows], points[2][rows])
            yield part.noting(self.report.counts, self.report.examples) if b == len(used) else part

    def note_variables(self, variables: np.ndarray, valued: np.ndarray, source: Source) -> None:
        """What is to be said of the vocabulary. valued: [V, 2] events without and with a value."""
        alike = {}
        for name in variables:
            alike.setdefault("".join(name.split()).casefold(), []).append(str(name))
        alike = [names for names in alike.values() if len(names) > 1]
        counts = self.report.counts
        if alike:
            reason = "variables whose names differ only by case or spaces (kept apart)"
            counts[reason], self.report.examples[reason] = sum(map(len, alike)), ", ".join(alike[0])
        reason = "events without a value of variables that have values elsewhere (their presence counts)"
        counts[reason] += int(valued[valued[:, 1] > 0, 0].sum())
        if self.unmet:
            counts[f"sources of --variables that met no event: {some(sorted(self.unmet))}"] = len(self.unmet)
        for name, rows in source.given.items():
            known = np.isin(variables, rows.index)
            how = "fitted" if name == "statistics" else "hashed from the name"
            counts[f"variables without given {name} ({how})"] = int((~known).sum())
            counts[f"given {name} of no variable"] = len(rows) - int(known.sum())

    def note_first_events(self, part: Cohort) -> None:
        """Count the stays that begin with what may be a date that stands for none, such as 1900-01-01."""
        first = part.first_set
        late = np.flatnonzero(part.set_minute[np.minimum(first + 1, part.stay_start[1:] - 1)]
                              - part.set_minute[first] >= YEAR)
        reason = "stays whose first event lies a year or more before their second"
        self.report.counts[reason] += len(late)
        if len(late):
            self.report.examples.setdefault(reason, f"stay {part.stay_id[late[0]]}")


# ------------------------------------------------------------------------------------------------------------
# Reader: PhysioNet / CinC Challenge 2012
# ------------------------------------------------------------------------------------------------------------

_DESCRIPTORS = ("Age", "Gender", "Height", "ICUType", "Weight")  # -1 means "not recorded"
_CLOCK = re.compile(r"(\d{1,6}):([0-5]\d)")


def _minute_of_clock(text: str) -> float:
    """The minute of HH:MM; NaN for another text."""
    clock = _CLOCK.fullmatch(text)
    return int(clock[1]) * 60 + int(clock[2]) if clock else np.nan


def _record_sets(folder: Path, name: str, letters: str) -> dict[str, Path]:
    """set letter -> its records: the unpacked folder where it exists, else the archive as downloaded."""
    found = {}
    for letter in letters:
        for path in (folder / f"{name}{letter}", folder / f"{name}{letter}.tar.gz"):
            if path.exists():
                found.setdefault(letter, path)
    return found


def _record_files(sets: dict[str, Path], suffix: str, counts: Counter) -> list[Path]:
    """The records of folders; an archive is one file."""
    files = []
    for path in sets.values():
        records = [file for file in files_in(path, counts) if file == path or file.suffix == suffix]
        if not records:
            raise InputError(f"{path}: holds no <record>{suffix}; unpack {path.name}.tar.gz there again")
        files += records
    return files


def _stay_a_file(table: Table, known: dict) -> pd.Categorical:
    """[rows] stays named by their files. known: stay -> file; InputError where two files give one name."""
    names = [plain_name(path.stem) for path in table.paths]
    for path, name in zip(table.paths, names):
        if name is None:
            raise InputError(f"{path}: its name is no id of a stay; rename it")
        if known.setdefault(name, path) != path:
            raise InputError(f"{path}: stay {name} occurs more than once, see {known[name]}; give each stay "
                             "an id of its own")
    return pd.Categorical.from_codes(table.file, names)


_physionet2012_sets = partial(_record_sets, name="set-", letters="abc")


def read_physionet2012(folder: Path, files: list[Path], report: Report) -> Source:
    """Sets a, b, c of the Challenge 2012 (Silva et al. 2012), whichever lie in `folder`. Label: in-hospital
    death, of Outcomes-a.txt.

    The outcome files' scores and lengths of stay never become inputs. ICUType is categorical: one event per
    type, of value 1.
    """
    def events(known={}):
        for table in tables(files, {"Time": str, "Parameter": str, "Value": VALUE}, report=report):
            stay, time, parameter = _stay_a_file(table, known), table["Time"], table["Parameter"]
            value = table["Value"].copy()
            minute = of_each(time, _minute_of_clock, np.nan)
            table.refuse("Time", np.isnan(minute), ", not HH:MM; mend or remove the line")
            kinds, code = list(parameter.categories), parameter.codes.astype(np.int64)
            identity, icu = (np.asarray(parameter == name) for name in ("RecordID", "ICUType"))
            own = pd.to_numeric(pd.Series(stay.categories), errors="coerce").to_numpy()[stay.codes]
            table.refuse("Value", identity & (value != own),
                         ", the RecordID of another record than the file's name says; rename the file")
            unrecorded = parameter.isin(_DESCRIPTORS) & (value == -1)
            table.note("descriptors not recorded (-1)", unrecorded)
            icu &= np.isfinite(value) & ~unrecorded
            for kind in np.unique(value[icu]):
                code[icu & (value == kind)] = len(kinds)
                kinds.append(f"ICUType={kind:g}")
            value[icu] = 1
            yield Events(table, stay, minute, pd.Categorical.from_codes(code, kinds), value,
                         skip=identity | unrecorded)
    return Source("PhysioNet 2012 set " + "+".join(_physionet2012_sets(folder)), events())


# ------------------------------------------------------------------------------------------------------------
# Reader: the original implementation's layout
# ------------------------------------------------------------------------------------------------------------

def _original_sources(folder: Path, counts: Counter) -> list[Path]:
    """The stays' files, patient_ehr/{train,valid,test}/*.parquet or *.csv of `folder`, which may be
    patient_ehr itself; and cached.csv beside patient_ehr."""
    home = folder if folder.name == "patient_ehr" else folder / "patient_ehr"
    files = [path for split in SPLITS for path in files_in(home / split, counts)
             if path.parent.name == split and path.suffix in (".parquet", ".csv")]
    cached = home.parent / "cached.csv"
    return files + [cached] * (bool(files) and cached.is_file())


def _minutes(table: Table) -> np.ndarray:
    """[rows] of column `minute`: minutes (NaN where they are none, which is refused) or clock times."""
    minute = table["minute"]
    good = ~np.isnat(minute) if minute.dtype != np.float64 else np.abs(minute) < 1e8
    table.refuse("minute", ~good, "; give minutes since admission, between -1e8 and 1e8 (190 years)")
    return np.where(good, minute, np.array(np.nan if minute.dtype == np.float64 else "NaT", minute.dtype))


def read_original(folder: Path, files: list[Path], report: Report, params_map: Path | None = None) -> Source:
    """patient_ehr/{train,valid,test}/<id>.parquet or .csv: variable, value, minute and perhaps set_index,
    which then tells the sets apart.

    The folder is the stay's split. params_map: see `read_statistics`; cached.csv beside patient_ehr: see
    `read_vectors`. A set that spans several minutes is charted at its first, and cut where a question lies
    within.
    """
    def events(known={}):
        for table in tables(stays, {"variable": str, "value": VALUE, "minute": TIME}, {"set_index": float},
                            report=report):
            key = table.columns.get("set_index")
            if key is not None:
                table.refuse("set_index", ~np.isfinite(key),
                             "; number the set, or leave the column out of all files")
            yield Events(table, _stay_a_file(table, known), _minutes(table), table["variable"],
                         table["value"], set_key=key)
    stays, given = [path for path in files if path.name != "cached.csv"], {}
    if params_map:
        given["statistics"] = read_statistics(params_map)
    if len(stays) < len(files):
        given["vectors"] = read_vectors(files[-1])
    split = {plain_name(path.stem): SPLITS.index(path.parent.name) for path in stays}
    return Source("original layout (patient_ehr)", events(), split=split, given=given)


# ------------------------------------------------------------------------------------------------------------
# Reader: one long table
# ------------------------------------------------------------------------------------------------------------

def read_long_table(folder: Path, files: list[Path], report: Report) -> Source:
    """The table `events` (see `named_tables`): stay_id, minute, variable, value, and perhaps subject_id.
    Minutes count from admission (they may be durations, or clock times, which then count from the stay's
    first); an event without a value says that something happened. A variable whose values are all text
    becomes categories."""
    return Source(f"long table {files[0].name}" + f" and {len(files) - 1} more" * (len(files) > 1),
                  _long_events(tables(files, LONG, OPTIONAL, report=report)), by_id=True, empty=True)


LONG, OPTIONAL = {"stay_id": ID, "minute": TIME, "variable": str, "value": ANY}, {"subject_id": OWNER}


def _long_events(parts: Iterable[Table]) -> Iterator[Events]:
    for table in parts:
        yield Events(table, table["stay_id"], _minutes(table), table["variable"], table["value"],
                     subject=table.columns.get("subject_id"), text=table.texts.get("value"))


def cohort_of_frame(events: pd.DataFrame, report: Report, rename: dict = {}
                    ) -> tuple[Cohort | None, np.ndarray]:
    """The cohort of a long table in memory (None: no event is usable), and the ids of all its stays in their
    order; rename: see `read_map`. Nothing is written. Raises InputError as `load_cohort` does."""
    source = Source("events", _long_events(frame_tables(events, "events", LONG, OPTIONAL, report)),
                    by_id=True, empty=True)
    spool = _Spool(source, report, None, rename)
    ids = np.array(sorted(spool.stays), dtype=str)
    return whole_cohort(spool.parts(source)) if len(spool.stretch_stay) else None, ids


# ------------------------------------------------------------------------------------------------------------
# Reader: MEDS (Medical Event Data Standard)
# ------------------------------------------------------------------------------------------------------------

def _meds_events(folder: Path, counts: Counter) -> list[Path]:
    return [path for path in files_in(folder / "data", counts) if path.suffix == ".parquet"]


# Names of files and folders that hold a part of a task.
_SHARD = re.compile(rf"((part|shard|chunk|data)?[-_.]?\d+\b.*|{'|'.join(SPLIT_WORDS)})", re.IGNORECASE)


def _meds_labels(folder: Path, task: list | None, outcomes: list | None, counts: Counter
                 ) -> list[Path] | dict[str, list[Path]]:
    """The files of one task, or by task those of several: those named by `task`, else `outcomes` where all
    are tasks. A task is a file or folder in labels/, at any depth, named by its path there
    (mortality/first_24h); what is named by a number, or like a split, is a shard of one."""
    tasks, home = {}, folder / "labels"
    for path in table_files(home, counts) if home.is_dir() else []:
        *folders, name = path.relative_to(home).parts
        name = "/".join(part for part in (*folders, name.partition(".")[0]) if not _SHARD.fullmatch(part))
        tasks.setdefault(name or "labels", []).append(path)
    if task is None and set(outcomes or [""]) <= tasks.keys():
        task = outcomes
    if len(tasks) > 1 and task is None or not set(task or []) <= tasks.keys():
        raise InputError(f"{home}: holds the tasks {', '.join(tasks) or '(none)'}; choose one with --task "
                         "NAME (several: each an outcome)")
    chosen = {name: tasks[name] for name in task or [*tasks][:1]}
    return chosen if len(chosen) > 1 else sum(chosen.values(), [])


def read_meds(folder: Path, files: list[Path], report: Report) -> Source:
    """data/**/*.parquet (subject_id, time or null = static, code, and perhaps numeric_value): a subject is a
    stay.

    Minutes count from the minute of the subject's first timed event; static events lie at minute 0. A code
    without a number is an event without a value. MEDS_DEATH never enters. Folders of data/ that are named
    like splits are the subjects' split.
    """
    split = {}

    def events():
        columns = {"subject_id": ID, "time": np.datetime64, "code": str}
        for table in tables(files, columns, {"numeric_value": float}, report=report):
            subject = table["subject_id"]
            part = SPLIT_WORDS.get(table.paths[0].relative_to(folder / "data").parts[0])
            if part is not None:
                other = of_each(subject, lambda name: split.setdefault(name, part) != part, False)
                table.refuse("subject_id", other,
                             ", and in another split's folder too; keep each subject in one")
            code = table["code"]
            death = of_each(code, lambda name: name.startswith("MEDS_DEATH"), False)
            table.note("MEDS_DEATH events", death)
            value = table.columns.get("numeric_value", np.full(len(death), np.nan))
            yield Events(table, subject, table["time"], code, value, skip=death)
    return Source("MEDS", events(), by_id=True, empty=True, split=split)


# ------------------------------------------------------------------------------------------------------------
# Reader: PhysioNet / CinC Challenge 2019
# ------------------------------------------------------------------------------------------------------------

# Repeated in every row of a record.
_HOURLY_DESCRIPTORS = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime", "ICULOS")


def read_physionet2019(folder: Path, files: list[Path], report: Report) -> Source:
    """training_setA/*.psv or training_setA.tar.gz, and training_setB (Reyna et al. 2019): a stay a file, a
    row an hour (minute 60 * row), NaN = not measured.

    An hour is a prediction point, SepsisLabel its answer (NaN where no file has the column), never an input.
    A descriptor, repeated every hour, enters once, where it is first recorded (ICULOS then says how long the
    stay had lasted when the record begins; later hours are the minutes themselves).
    """
    def events(known={}):
        for table in tables(files, {}, {"SepsisLabel": float}, rest=VALUE, report=report):
            file, sepsis = table.file, table.columns.get("SepsisLabel")
            if sepsis is None:
                sepsis = np.full(len(file), np.nan)
            else:
                table.refuse("SepsisLabel", ~np.isin(sepsis, (0, 1)), ", not 0 or 1; mend the line")
            names = [name for name in table.columns if name != "SepsisLabel"]
            cells = np.stack([table[name] for name in names], axis=1)  # [hours, variables]
            row, variable = np.nonzero(~np.isnan(cells))
            stay = _stay_a_file(table, known)
            repeated = np.isin(names, _HOURLY_DESCRIPTORS)[variable]
            repeated &= pd.Series(file[row] * len(names) + variable).duplicated().to_numpy()
            table.note("repeated descriptors", repeated, row)
            minute = 60.0 * ranges(np.zeros(len(table.rows), dtype=np.int64), table.rows)
            yield Events(table, stay[row], minute[row], pd.Categorical.from_codes(variable, names),
                         cells[row, variable], row, repeated,
                         points=(file, minute, sepsis))
    return Source("PhysioNet 2019", events())


# ------------------------------------------------------------------------------------------------------------
# Choosing a reader, and the cache
# ------------------------------------------------------------------------------------------------------------

class Reader(NamedTuple):
    name: str                                      # what it reads
    sources: Callable[[Path, Counter], list[Path]]  # the files of a folder that its cohort depends on
    read: Callable[..., Source]                    # (folder, those files, report, **options)
    # Its labels' files (by task where there are several): of which tasks or outcomes
    labels: Callable = lambda folder, task, outcomes, counts: []
    splits: Callable[[Path], list[Path]] = lambda folder: []   # its split's files
    options: tuple[str, ...] = ()                  # what only it takes: params_map, task


READERS = [  # the first that finds its files is taken
    Reader("PhysioNet 2012 (set-a.tar.gz or set-a/ with Outcomes-a.txt)",
           lambda folder, counts: _record_files(_physionet2012_sets(folder), ".txt", counts),
           read_physionet2012,
           lambda folder, *_: [path for letter in _physionet2012_sets(folder)
                               if (path := folder / f"Outcomes-{letter}.txt").is_file()]),
    Reader("the original layout (patient_ehr/{train,valid,test}/<id>.parquet or .csv)",
           _original_sources, read_original, options=("params_map",)),
    Reader("a long table (events.csv or events.parquet, and labels.csv)",
           lambda folder, counts: named_tables(folder, "events", counts), read_long_table,
           lambda folder, task, outcomes, counts: named_tables(folder, "labels", counts)),
    Reader("PhysioNet 2019 (training_setA/*.psv or training_setA.tar.gz, training_setB)",
           lambda folder, counts: _record_files(_record_sets(folder, "training_set", "AB"), ".psv", counts),
           read_physionet2019),
    Reader("MEDS (data/**/*.parquet)", _meds_events, read_meds, _meds_labels,
           lambda folder: sorted(folder.glob("metadata/subject_splits.parquet")), ("task",)),
]


class Found(NamedTuple):
    """Data that a reader found."""

    reader: Reader
    folder: Path
    files: list[Path]  # that its cohort depends on
    counts: Counter    # what was passed over when they were listed


def _found(folder: Path, readers: list[Reader] = READERS) -> Found | None:
    """What the first of these readers that finds its files in the folder finds."""
    for reader in readers:
        counts = Counter()
        if files := reader.sources(folder, counts):
            return Found(reader, folder, files, counts)


def _find(folder: Path) -> Found:
    """The data in the folder, or one level below or above it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data_dir takes the folder that holds the data")
    meds = READERS[-1:] if folder.name == "data" else []
    if found := _found(folder) or _found(folder.parent, meds):
        return found
    inside = [found for path in sorted(folder.iterdir())
              if path.is_dir() and path.name[0] not in "._" and (found := _found(path))]
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = some([found.folder.name for found in inside])
        raise InputError(f"{folder}: the folders {names} each hold data; name one with --data_dir")
    raise InputError(f"{folder}: no data that a reader knows; expected one of: "
                     + "; ".join(reader.name for reader in READERS))


def load_cohort(data_dir: str | None = None, synthetic_stays: int = 1000, cache_dir: Path | None = None,
                params_map: str | None = None, label_file: str | None = None, task: str | list | None = None,
                hours: float | None = None, split_file: str | None = None, positive: str | None = None,
                variables_map: str | dict | None = None, columns: str | None = None, kind: str | None = None,
                outcomes: list[str] | None = None, kinds: tuple = KINDS, site: str = "") -> Cohort:
    """The cohort at `data_dir` (None: the embedded one), parsed once and then memory-mapped from the cache;
    labels, subjects and splits are attached to it at each call, so that one cached cohort serves every task
    and its fingerprint knows none of them.

    Args:
        cache_dir: None: where the system keeps caches.
        params_map: statistics of the original layout.
        label_file: a file or folder of labels that lie elsewhere, see `with_labels`.
        positive: the word in it that is label 1.
        task: which of several in a MEDS folder; of a list of more than one, each is an outcome.
        kind, outcomes, kinds: of the labels, see `with_labels`.
        hours: one question a stay, asked so long after its admission (see `Cohort.admission`), or at its end
            if that comes earlier.
        split_file: CSV stay_id,split that overrides the data's own.
        variables_map: CSV that renames, rescales and labels variables as they are read, see `read_map`; or
            what it says.
        columns: the tables' own names of columns, see `read_columns`.
        site: see `Cohort.site`.
    Raises InputError where the folder is missing, fits no reader, or holds a malformed file, and where an
    option is given that the reader does not take.
    """
    given = {"params_map": params_map, "label_file": label_file, "split_file": split_file}
    options = {name: Path(path) for name, path in given.items() if path}
    told = variables_map or {}
    if not site.isprintable() or site != site.strip():
        raise InputError(f"--site {site!r}: give a name without control characters or blanks around it")
    rename, shown = renames_and_labels(told if isinstance(told, dict) else read_map(Path(told)))
    own = read_columns(columns)
    task = [task] if isinstance(task, str) else task
    if data_dir:
        reader, folder, files, listed = _find(Path(data_dir))
        listed["files read"] = len(files)
    else:
        reader = Reader(f"the embedded cohort of {synthetic_stays} stays", None, None)
        folder, files, listed = None, [], Counter()
    for name, value in (("params_map", params_map), ("task", " ".join(task or []))):
        if value and name not in reader.options:
            raise InputError(f"--{name} {value}: not read with {reader.name}; leave the option out")
    for name, path in options.items():
        if not path.exists():
            raise InputError(f"--{name} {path}: no such file; correct the path")
    if task and label_file:
        raise InputError(f"--task {' '.join(task)}: --label_file names the labels already; leave one of them "
                         "out")
    if rename and folder is None:
        raise InputError("--variables: the embedded cohort has its names and units; leave the option out, or "
                         "give none where a checkpoint keeps a map")
    labels = [] if label_file and "task" in reader.options else reader.labels(folder, task, outcomes, listed)
    elsewhere = table_files(options["label_file"], listed) if label_file else []
    if label_file and not elsewhere:
        raise InputError(f"--label_file {label_file}: a folder without CSV or Parquet files; name the "
                         "labels' file")
    split = [options["split_file"]] if split_file else []
    if own:
        found = {name for kind in (files, labels, elsewhere, split) for path in kind[:1]
                 for name in column_names(path)}
        if unknown := sorted(own.keys() - found):
            raise InputError(f"--columns {columns}: no table has a column {', '.join(unknown)}; correct the "
                             "names")

    cohort = _cached(reader, folder, files, synthetic_stays, cache_dir and Path(cache_dir), own,
                     {"params_map": options["params_map"]} if params_map else {}, rename).noting(listed)
    cohort.shown = shown
    if splits := reader.splits(folder):
        cohort = with_splits(cohort, read_splits(splits, own))
    if labels:
        cohort = with_labels(cohort, labels, positive, own, kind, outcomes, () if label_file else kinds)
    if elsewhere:
        cohort = with_labels(cohort, elsewhere, positive, own, kind, outcomes, kinds)
    if not (labels or elsewhere) and (outcomes or kind not in (None, "binary")) and cohort.labelled.any():
        raise InputError(f"{cohort.reader}: its own labels are 0 and 1, where those of the kind "
                         f"{kind or 'several'} are asked for; give these with --label_file")
    if hours is not None and (cohort := at_hours(cohort, hours)) is None:
        raise InputError(f"--hours {hours:g}: these labels have times of their own; leave the option out")
    if split:
        split_of = read_splits(split, own)
        cohort = with_splits(cohort, split_of)
        if (cohort.split < 0).all():
            raise InputError(f"--split {split_file}: names none of the stays, which are called "
                             f"{', '.join(cohort.stay_id[:3])} ... (the file's first: {split_of.index[0]}); "
                             "give their ids")
    if folder and folder != Path(data_dir):
        cohort = replace(cohort, reader=f"{cohort.reader} in {folder}")
    return replace(cohort, site=site)


def _cached(reader: Reader, folder: Path | None, files: list[Path], synthetic_stays: int, home: Path | None,
            columns: dict, options: dict[str, Path], rename: dict) -> Cohort:
    """The data alone, from the cache in `home` (None: the system's place, where caches of other users are
    passed over); read into it where they are not there yet."""
    own, home = home is None, home or cache_home()
    key = {"reader": reader.name, "options": list(options), "columns": columns, "version": READER_VERSION,
           "rename": sorted(rename.items()),
           "sources": [[str(p.resolve()), (s := p.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
                       for p in [*files, *options.values()]]}
    cached, notes = home / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16], {}
    if own and of_others(cached):
        notes = {f"cache of another user, not used: {cached}": 1}
        cached = cached.with_name(f"{cached.name}-{os.geteuid()}")
        if of_others(cached):
            raise InputError(f"{cached}: another user's cache; name another place with --cache_dir")
    if (cohort := open_cache(cached)) is None:
        with clear_write_error(cached, CACHE_MEND):
            home.mkdir(parents=True, exist_ok=True)
            size, free = synthetic_stays * SYNTHETIC_BYTES, shutil.disk_usage(home).free
            if folder is None and size > free:
                raise InputError(f"--synthetic_stays {synthetic_stays}: takes {size // 10**6:,} MB in "
                                 f"{home}, where {free // 10**6:,} MB are free; give fewer, or another place "
                                 "with --cache_dir")
            with scratch(home) as temporary:
                if folder is None:
                    parts = synthetic_parts(synthetic_stays)
                else:
                    report = Report(columns)
                    source = reader.read(folder, files, report, **options)
                    parts = (replace(part, examples={reason: place.replace(str(folder), HERE)
                                                     for reason, place in part.examples.items()})
                             for part in _Spool(source, report, temporary, rename).parts(source))
                write_cache(cached, parts)
        cohort = open_cache(cached)
    # A place is kept as it is called within the folder, which may have another name today.
    examples = {reason: place.replace(HERE, str(folder)) for reason, place in cohort.examples.items()}
    return cohort.noting(notes, examples)


# ------------------------------------------------------------------------------------------------------------
# An example of one's own table: python readers.py --example my_table
# ------------------------------------------------------------------------------------------------------------

def write_long_table(folder: Path, cohort: Cohort, labels: bool = True) -> Path:
    """Write a cohort as a long table: events.csv and, with `labels`, labels.csv of a new folder. Raises
    InputError where the folder exists."""
    events = event_table(cohort, np.arange(len(cohort))).rename(columns={"stay": "stay_id"})
    events["stay_id"] = cohort.stay_id[events["stay_id"]]
    events["variable"] = np.array(cohort.variables)[events["variable"]]
    with new_folder(folder):
        events.to_csv(folder / "events.csv", index=False)
        if labels:
            answers = pd.DataFrame({"stay_id": cohort.stay_id, "label": cohort.stay_label})
            answers.to_csv(folder / "labels.csv", index=False)
    return folder


def main(argv=None) -> int:
    from runs import exit_code  # which imports this module

    def write():
        parser = LineParser(
            description="Write an example of the long table that train.py --data_dir reads: 200 stays of the "
                        "embedded cohort.", allow_abbrev=False)
        parser.add_argument("--example", metavar="DIR", required=True,
                            help="the new folder of events.csv and labels.csv")
        folder, cohort = Path(parser.parse_args(argv).example), synthetic_cohort(200)
        cohort = replace(cohort, stay_id=np.arange(1001, 1001 + len(cohort)).astype(str))
        write_long_table(folder, cohort)
        print(f"{folder}: events.csv, {len(cohort.event_value):,} events of {len(cohort)} stays, and "
              "labels.csv")
        print(f"next: python train.py --mode pretrain --data_dir {folder}")
    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
