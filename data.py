"""The cohort: what was read, as flat arrays; its splits; and how a mistake and a file are told.

An ICU stay is a sequence of sets. A set is every (variable, value) event charted at one minute. Nothing
is padded: a cohort is flat arrays and offsets. Nothing here knows of models, losses or devices.
"""

import hashlib
import io
import os
import secrets
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterable

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

READER_VERSION = 7  # raise it when a reader's output changes: older caches are then rebuilt
SPLITS = ("train", "valid", "test")  # codes 0, 1, 2 in `Cohort.split`; -1 is unassigned
KINDS = ("binary", "several", "classes", "number", "event")  # of outcomes
MINUTE = 60_000_000  # microseconds


class InputError(Exception):
    """A mistake in what the user gave: one line that names the file, the row or key, and the mend. Ends a
    command with exit code 2."""


def write_atomically(path, write) -> None:
    """Call `write` with a temporary path in the same folder, sync it to disk, rename it to `path`: a reader
    meets the old file or the new. Of a symbolic link the target is written; a pipe or a device is given to
    `write` itself."""
    with clear_write_error(path):
        if os.path.exists(path) and not os.path.isfile(path):
            write(Path(path))
            return
        target = Path(os.path.realpath(path))
        # The number of the process tells leftovers (see `Run`); nobody can guess the name and put a link
        # there.
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(8)}")
        try:
            temporary.touch(exist_ok=False)
            write(temporary)
            sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def clear_write_error(path, mend: str = "free space or choose another folder"):
    """A failed write becomes an InputError that names `path` and the mend."""
    try:
        yield
    except BrokenPipeError:  # see `runs.exit_code`
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); what was there before is "
                         f"untouched: {mend}") from None


@contextmanager
def new_folder(folder: Path):
    """Makes a folder, in which the block writes. Raises InputError where it exists, or cannot be written."""
    if folder.exists():
        raise InputError(f"{folder}: exists already; give a new folder")
    with clear_write_error(folder):
        folder.mkdir(parents=True)
        yield


def sync(path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------------
# The cohort
# ------------------------------------------------------------------------------------------------------------

@dataclass
class Cohort:
    """P stays, T sets, E events, V variables, Q prediction points, as flat arrays; `*_start` are offsets into
    the next finer level.

    A prediction point asks for a stay's risk at a minute, from every event up to and including that minute.
    One label a stay, without a time, is a point at the minute of its last set."""

    reader: str
    variables: list[str]        # [V] vocabulary, sorted
    event_variable: np.ndarray  # [E] int16, or int32 for V > 32,767
    event_value: np.ndarray     # [E] float32, raw units; NaN: an event without a value
    event_offset: np.ndarray    # [E] int32, microseconds since its set's whole minute; [0]: none are known;
                                #     int64 where sets may span minutes
    set_start: np.ndarray       # [T+1] int64, in events
    set_minute: np.ndarray      # [T] float64, minutes since admission, rising within a stay; may be negative
    stay_start: np.ndarray      # [P+1] int64, in sets
    stay_id: np.ndarray         # [P] str
    subject: np.ndarray         # [P] str, whose stay it is: splits, folds and leaks go by subject
    origin: np.ndarray          # [P] datetime64[us], clock time of minute 0; NaT: unknown
    split: np.ndarray           # [P] int8, index into SPLITS, -1: unassigned
    point_start: np.ndarray     # [P+1] int64, in points
    point_minute: np.ndarray    # [Q] float64, rising within a stay
    # [Q, A] float32, NaN: none. binary: 0 or 1; several: 0 or 1 of each; classes: the index in `names`;
    # number: the number; event: hours from the question to the event or censoring, and the cause: 0
    # (censored), or 1 + the index in `names`.
    answers: np.ndarray
    statistics: np.ndarray      # [V, 2] float32, mean and standard deviation given with the data, NaN: none
    vectors: np.ndarray         # [V, D] float32, vectors given with the data, NaN: none (D may be 0)
    notes: dict = field(default_factory=dict)     # what the reader skipped or met: reason -> count
    examples: dict = field(default_factory=dict)  # reason -> the place of the first
    shown: dict = field(default_factory=dict)     # variable, or variable=value -> its name in what is shown
    fingerprint: str = ""       # digest of the stays, not of their labels: a split outlives new labels
    kind: str = "binary"        # of the labels that were read, one of `KINDS`; no cache holds it
    names: tuple[str, ...] = ("label",)  # of outcomes (several), classes or causes (event)
    timed: bool = False         # whether the points have times of their own, not a stay's end or --hours
    site: str = ""              # of --site: ids of different sites are different people's

    STAYS = ("event_variable", "event_value", "event_offset", "set_start", "set_minute", "stay_start",
             "stay_id", "subject", "origin", "split")
    ARRAYS = STAYS + ("point_start", "point_minute", "answers", "statistics", "vectors")

    def __len__(self) -> int:
        return len(self.stay_id)

    @property
    def labelled(self) -> np.ndarray:
        """[Q] bool: the point has an answer in some column."""
        return ~np.isnan(self.answers).all(1)

    @property
    def label(self) -> np.ndarray:
        """[Q] int16, the class by which splits are stratified, -1 where there is no answer: the first outcome
        or the class; of a number its quarter (0 to 3); of an event whether there is one."""
        answer = self.answers[:, int(self.kind == "event")]
        if self.kind == "number":
            answer = np.searchsorted(np.nanquantile(answer, (.25, .5, .75)), answer) + 0 * answer
        return np.nan_to_num(answer, nan=-1).astype(np.int16)

    @property
    def stay_label(self) -> np.ndarray:
        """[P] the largest label of the stay's points, -1 where none has one."""
        label = np.full(len(self), -1, dtype=np.int16)
        np.maximum.at(label, self.point_stay, self.label)
        return label

    @property
    def patient(self) -> np.ndarray:
        """[P] the number of each stay's patient, as their first stays come. Where each stay is a patient of
        its own, a bootstrap over them draws stays."""
        return pd.factorize(self.subject)[0]

    @property
    def stay_events(self) -> np.ndarray:
        """[P] number of events of each stay."""
        return np.diff(self.set_start[self.stay_start])

    @property
    def first_set(self) -> np.ndarray:
        """[P] index of each stay's first set; where that holds a birth (MEDS_BIRTH), of its second."""
        first, last = self.stay_start[:-1], self.stay_start[1:] - 1
        births = [v for v, name in enumerate(self.variables) if name.startswith("MEDS_BIRTH")]
        if births:
            events = np.diff(self.set_start)[first]
            born = np.isin(self.event_variable[ranges(self.set_start[first], events)], births)
            first = first + (np.bincount(np.repeat(np.arange(len(self)), events), born) > 0) * (last > first)
        return first

    @property
    def admission(self) -> np.ndarray:
        """[P] the minute from which hours count, in labels, `--hours` and pictures: 0, and of clock times
        that of the first set that is no birth."""
        return np.where(np.isnat(self.origin), 0, self.set_minute[self.first_set])

    def set_end(self, sets: np.ndarray) -> np.ndarray:
        """[n] the minute of the last event of these sets, as exact as it is known."""
        if not len(self.event_offset):
            return self.set_minute[sets]
        offset = self.event_offset[self.set_start[sets + 1] - 1]
        return np.floor(self.set_minute[sets]) + offset / MINUTE

    @property
    def point_stay(self) -> np.ndarray:
        """[Q] the stay of each point."""
        return np.repeat(np.arange(len(self)), np.diff(self.point_start))

    def clock(self, stay: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """[n] datetime64[us] of minutes of stays, exact to the microsecond (up to 2^27 minutes, 255 years);
        NaT where the origin is."""
        whole = np.floor(minute)
        microseconds = whole.astype(np.int64) * MINUTE + np.rint((minute - whole) * MINUTE).astype(np.int64)
        return self.origin[stay] + microseconds.astype("timedelta64[us]")

    def digest(self) -> str:
        """The fingerprint. Reads the arrays where they lie: a memory-mapped cohort is not copied."""
        digest = hashlib.sha256("\n".join(self.variables).encode())
        for name in Cohort.STAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).view(np.uint8))
        return digest.hexdigest()[:16]

    def describe(self) -> str:
        """The lines a command prints about what it read."""
        lines = [f"data: {self.reader}: {len(self):,} stays, {len(self.set_minute):,} sets, "
                 f"{len(self.event_value):,} events, {len(self.variables)} variables, "
                 f"{self.labelled.sum():,} labelled ({self.describe_answers()})"]
        first, last = self.set_minute[self.first_set], self.set_minute[self.stay_start[1:] - 1]
        hours, sets = np.median(last - first) / 60, np.median(np.diff(self.stay_start))
        lines.append(f"data: minutes {first.min():,.0f} to {last.max():,.0f}; a median stay lasts "
                     f"{hours:,.1f} hours and has {sets:,.0f} sets, "
                     f"{np.median(self.stay_events):,.0f} events")
        if len(self.answers) != len(self):
            asked = (np.diff(self.point_start) > 0).sum()
            lines.append(f"data: {len(self.answers):,} prediction points in {asked:,} stays")
        return "\n".join(lines + [f"data: {line}" for line in met(self.notes, self.examples)])

    def describe_answers(self, points=slice(None)) -> str:
        """How many of these points (indices or a mask) have which answer."""
        answers = self.answers[points]
        answer, ones = answers[:, -1], (answers == 1).sum(0)
        if self.kind == "binary":
            return f"{ones[0]:,} positive"
        if self.kind == "number":
            return f"median {pd.Series(answer).median():.4g}"
        if self.kind == "several":
            counts = zip(self.names, ones, (answers >= 0).sum(0))
            counts = [f"{name} {positive:,} of {known:,}" for name, positive, known in counts]
        elif self.kind == "classes":
            counts = [f"{name} {(answer == i).sum():,}" for i, name in enumerate(self.names)]
        else:
            names = [*enumerate(self.names, 1), (0, "censored")]
            counts = [f"{(answer == i).sum():,} {name}" for i, name in names]
        shown = ", ".join(counts[:8]) + " ..." * (len(counts) > 8)
        return f"classes {shown}" if self.kind == "classes" else shown

    def noting(self, notes: dict, examples: dict = {}) -> "Cohort":
        """The cohort with more notes, and examples of them."""
        return replace(self, notes=self.notes | notes, examples=self.examples | examples)


def met(counts: dict, examples: dict) -> list[str]:
    """A line for each reason that was met: how often, and where first."""
    return [f"{count:,} {reason}" + (f", the first: {examples[reason]}" if reason in examples else "")
            for reason, count in counts.items() if count]


def build_cohort(reader, variables, stay, minute, variable, value, stay_id, answers=None, split=None,
                 set_key=None, statistics=pd.DataFrame(columns=["mean", "std"]), vectors=pd.DataFrame(),
                 subject=None, origin="NaT", offset=None, whole=False) -> Cohort:
    """Sort flat events into a `Cohort`. A set is all events of one stay at one minute. It is a multiset:
    duplicates are kept.

    Args:
        variables: [V] names.
        stay, minute, variable, value: [E] stay index, minutes, variable index and raw value of each event.
        stay_id, split, subject, origin: [P]; without the last three all are unassigned, each stay is a
            subject of its own, clock times are unknown.
        answers: of each stay, see `answer_columns`.
        offset: [E] microseconds since the minute, -1 for static events, which come first (None: none).
        set_key: [E] number by which the source tells sets of one minute apart (None: it does not).
        statistics, vectors: what the data give for variables, as DataFrames indexed by name.
        whole: these are some stays of a larger cohort, whose vocabulary `variables` is, in order.
    Stays without any event are left out and counted in `notes`; the vocabulary keeps only variables that
    occur, sorted by name. Raises InputError when a stay id occurs twice.
    """
    stay_id = np.asarray(stay_id, dtype=str)
    ids, counts = np.unique(stay_id, return_counts=True)
    if len(ids) < len(stay_id):
        raise InputError(f"{reader}: stay {ids[counts > 1][0]} occurs more than once; give each stay an id "
                         "of its own")
    split = np.broadcast_to(-1 if split is None else split, len(stay_id))
    origin = np.broadcast_to(np.asarray(origin, "datetime64[us]"), len(stay_id))

    events = np.bincount(stay, minlength=len(stay_id))
    used = np.flatnonzero(events)
    if not len(used):
        raise InputError(f"{reader}: no usable event in any stay; check the files' columns and values")
    stay = (np.cumsum(events > 0) - 1)[stay]
    occurs = np.bincount(variable, minlength=len(variables)) > 0
    present = np.arange(len(variables)) if whole else np.flatnonzero(occurs)
    order = np.argsort(np.asarray(variables, dtype=str)[present])
    rank = np.zeros(len(variables), dtype=np.int64)
    rank[present[order]] = np.arange(len(present))

    keys = ([] if set_key is None else [set_key]) + [np.asarray(minute), stay]
    fine = ([] if offset is None else [np.asarray(offset)]) + keys
    rising = True
    for key in fine:
        step = np.diff(key)
        rising = (step > 0) | (step == 0) & rising
    if not np.all(rising):
        sequence = np.lexsort(fine)  # stable: events of one time keep their order in the file
        variable, value = variable[sequence], value[sequence]
        keys = [key[sequence] for key in keys]
        offset = offset if offset is None else offset[sequence]
    minute, stay = keys[-2:]
    set_first = np.append(0, 1 + np.flatnonzero(np.any([key[1:] != key[:-1] for key in keys], axis=0)))
    stay_start = np.searchsorted(stay[set_first], np.arange(len(used) + 1)).astype(np.int64)
    names = [str(variables[i]) for i in present[order]]
    minutes = minute[set_first].astype(np.float64)
    offset = np.zeros(0) if offset is None else np.maximum(offset, 0)
    subject = stay_id if subject is None else np.asarray(subject, dtype=str)
    cohort = Cohort(
        reader=reader,
        variables=names,
        event_variable=rank[variable].astype(np.int16 if len(present) < 2**15 else np.int32),
        event_value=np.asarray(value, dtype=np.float32),
        set_start=np.append(set_first, len(stay)).astype(np.int64),
        set_minute=minutes,
        event_offset=offset.astype(np.int32 if set_key is None else np.int64),
        stay_start=stay_start,
        stay_id=stay_id[used],
        subject=subject[used],
        origin=origin[used],
        split=split[used].astype(np.int8),
        point_start=np.arange(len(used) + 1),
        point_minute=minutes[stay_start[1:] - 1],
        answers=answer_columns(answers, len(stay_id))[used],
        statistics=statistics.reindex(names).to_numpy(np.float32),
        vectors=vectors.reindex(names).to_numpy(np.float32),
        notes={"stays without a usable event": len(stay_id) - len(used)},
    )
    cohort.fingerprint = cohort.digest()
    return cohort


def answer_columns(answers, points: int) -> np.ndarray:
    """[Q, A] float32 from the answers of Q points: [Q], [Q, A], or None where no point has an answer."""
    answers = np.full(points, np.nan) if answers is None else np.asarray(answers)
    return (answers if answers.ndim == 2 else answers[:, None]).astype(np.float32)


def sets_charted(minute: np.ndarray, stay: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The minute [e] of the first event of each event's set (told apart by stay and `key`, [e] each) and the
    microseconds [e] since its whole minute. A set ends where another one begins: its later events are a set
    of their own, so that the sets of a stay follow one another."""
    events = pd.DataFrame({"stay": stay, "key": key, "minute": minute})
    events["begin"] = events.groupby(["stay", "key"])["minute"].transform("min")
    if (events["begin"] == minute).all():
        return minute, np.rint((minute - np.floor(minute)) * MINUTE).astype(np.int64)
    begins = events[["stay", "begin", "key"]].drop_duplicates()
    shared = begins.groupby(["stay", "begin"])["key"].transform("size") > 1
    begins = begins.assign(shared=shared).drop_duplicates(["stay", "begin"]).sort_values(["begin", "stay"])
    order = np.argsort(minute, kind="stable")
    latest = pd.merge_asof(events.loc[order, ["stay", "minute"]], begins.rename(columns={"begin": "latest"})
                           [["stay", "latest", "shared"]], left_on="minute", right_on="latest", by="stay")
    # Of sets that begin together each minute is one: they would otherwise lie within one another.
    latest = np.where(latest["shared"], latest["minute"], latest["latest"])
    events.loc[order, "latest"] = latest
    charted = events.groupby(["stay", "key", "latest"])["minute"].transform("min").to_numpy()
    return charted, np.rint((minute - np.floor(charted)) * MINUTE).astype(np.int64)


def since_first(time: np.ndarray, stay: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minutes [e] since the minute of each stay's first event, microseconds [e] within the minute (-1:
    static, at minute 0), and that minute [stays] on the clock (NaT: all of the stay is static). time [e]:
    datetime64[us], NaT: static, stay after stay."""
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


def search_after(values: np.ndarray, key: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[n] the first index in [low, high) whose value is above `key`, `high` where none is: binary searches in
    sorted stretches of `values`."""
    low, high = np.array(low), np.array(high)
    while (open_ := low < high).any():
        middle = np.where(open_, (low + high) // 2, 0)
        above = values[middle] > key
        high, low = np.where(open_ & above, middle, high), np.where(open_ & ~above, middle + 1, low)
    return low


def pieces(parts: Iterable[Cohort]):
    """Yield (part, {name of array: rows}). The rows of all parts, one after another, are the arrays of the
    whole cohort. The parts agree in their variables and in the arrays' types."""
    sets = events = points = 0
    for part in parts:
        rows = {name: getattr(part, name) for name in Cohort.ARRAYS} | {
            "set_start": part.set_start + events, "stay_start": part.stay_start + sets,
            "point_start": part.point_start + points}
        if sets:
            rows = {name: x[name.endswith("_start"):] for name, x in rows.items()
                    if name not in ("statistics", "vectors")}
        yield part, rows
        sets += len(part.set_minute)
        events += len(part.event_value)
        points += len(part.answers)


def whole_cohort(parts: Iterable[Cohort]) -> Cohort:
    """The cohort of these parts, in memory."""
    parts, rows = zip(*pieces(parts))
    arrays = {name: np.concatenate([r[name] for r in rows if name in r]) for name in Cohort.ARRAYS}
    cohort = replace(parts[-1], **arrays)
    cohort.fingerprint = cohort.digest()
    return cohort


# ------------------------------------------------------------------------------------------------------------
# Splits, and the events of some stays
# ------------------------------------------------------------------------------------------------------------

def make_splits(cohort: Cohort, seed: int) -> dict[str, list[str]]:
    """Stay ids of train, valid and test: the data's own split where it has one (valid is drawn from train
    where it names none), else 64/16/20, seeded, stratified by the largest label of each subject. The stays of
    a subject stay together.

    Raises InputError where there are fewer than three subjects, or the data's own split divides one.
    """
    subject, label = subjects_with_label(cohort, np.arange(len(cohort)))
    part = np.array(cohort.split)
    if (part < 0).all():
        if len(label) < 3:
            raise InputError(f"{cohort.reader}: {len(label)} stays or patients cannot be split into train, "
                             "valid and test; give more or a split of your own")
        part_of = np.zeros(len(label), dtype=np.int8)
        rest, test = draw(label, 2, seed)
        part_of[test], part_of[rest[draw(label[rest], 1, seed)[1]]] = 2, 1
        part = part_of[subject]
    elif not (part == 1).any() and len(rest := np.unique(subject[part == 0])) > 1:
        part[(part == 0) & np.isin(subject, rest[draw(label[rest], 1, seed)[1]])] = 1
    split = {name: cohort.stay_id[part == code].tolist() for code, name in enumerate(SPLITS)}
    parts = Counter(name for subjects in subjects_of(cohort, split).values() for name in subjects)
    if divided := [name for name, count in parts.items() if count > 1]:
        raise InputError(f"{cohort.reader}: the split puts the stays of {len(divided):,} patients into two "
                         f"parts ({', '.join(divided[:3])} ...); give all stays of a patient one part, or no "
                         "subject_id")
    return split


def subjects_with_label(cohort: Cohort, stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The subject [n] of each of these stays, numbered as they come, and each subject's largest label."""
    subject, names = pd.factorize(cohort.subject[stays])
    label = np.full(len(names), -1, dtype=np.int16)
    np.maximum.at(label, subject, cohort.stay_label[stays])
    return subject, label


def draw(label: np.ndarray, others: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in `label` of four fifths and of the fifth drawn, stratified. Where that cannot be done, or
    leaves the fifth without one of the labels above 0 though more have it than the `others` parts need, every
    fifth is drawn from a seeded order that begins with the largest labels."""
    everyone = np.arange(len(label))
    try:
        rest, fifth = train_test_split(everyone, test_size=.2, stratify=label, random_state=seed)
        number = np.bincount(label[label > 0])
        if np.isin(np.flatnonzero(number > others), label[fifth]).all():
            return rest, fifth
    except ValueError:  # a label too rare to be stratified
        pass
    order = np.random.default_rng(seed).permutation(everyone)
    order = order[np.argsort(-label[order], kind="stable")]
    drawn = everyone % 5 == others
    return order[~drawn], order[drawn]


def stays_of(cohort: Cohort, ids: list[str]) -> np.ndarray:
    """Indices [n] of the stays with these ids, in the cohort's order."""
    return np.flatnonzero(np.isin(cohort.stay_id, ids))


def at_site(site: str, ids) -> list[str]:
    """Ids of stays or subjects as checkpoints keep them, which know those of several sites: behind the name
    of their site, where it has one."""
    return [f"{site}\x1f{name}" if site else str(name) for name in ids]


def subjects_of(cohort: Cohort, split: dict[str, list[str]]) -> dict[str, list[str]]:
    """The subjects whose stays the parts of a split hold."""
    return {name: np.unique(cohort.subject[stays_of(cohort, ids)]).tolist() for name, ids in split.items()}


def stay_event_index(cohort: Cohort, stays: np.ndarray) -> np.ndarray:
    """Indices [n] of all events of these stays, stay after stay."""
    return ranges(cohort.set_start[cohort.stay_start[stays]], cohort.stay_events[stays])


def event_table(cohort: Cohort, stays: np.ndarray) -> pd.DataFrame:
    """A row for each event of these stays, stay after stay: stay and variable (indices), minute, value."""
    events = stay_event_index(cohort, stays)
    sets = np.searchsorted(cohort.set_start, events, side="right") - 1
    return pd.DataFrame({"stay": np.repeat(stays, cohort.stay_events[stays]),
                         "minute": cohort.set_minute[sets], "variable": cohort.event_variable[events],
                         "value": cohort.event_value[events]})


def point_table(cohort: Cohort, points: np.ndarray) -> pd.DataFrame:
    """stay_id, subject_id and minute of these prediction points [n]."""
    stay = cohort.point_stay[points]
    return pd.DataFrame({"stay_id": cohort.stay_id[stay], "subject_id": cohort.subject[stay],
                         "minute": cohort.point_minute[points]})


def shortest(value: np.ndarray) -> np.ndarray:
    """float64 of float32 values: the numbers with the fewest digits that give them back, 36.6 and not
    36.59999847."""
    return np.asarray(value, dtype=np.float32).astype(str).astype(np.float64)


def ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Concatenation of arange(start_i, start_i + length_i)."""
    ends = np.cumsum(length)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - (ends - length), length)


def events_of(cohort: Cohort, stays: np.ndarray):
    """Yields (variable, value) of all events of these stays, 1,000 stays at a time."""
    for part in np.array_split(stays, 1 + len(stays) // 1000):
        events = stay_event_index(cohort, part)
        yield cohort.event_variable[events], cohort.event_value[events]


def variables_of(cohort: Cohort, stays: np.ndarray) -> np.ndarray:
    """Indices [n] of the variables that these stays hold, ascending."""
    held = np.zeros(len(cohort.variables), dtype=bool)
    for variable, _ in events_of(cohort, stays):
        held[variable] = True
    return np.flatnonzero(held)


# ------------------------------------------------------------------------------------------------------------
# Prediction points
# ------------------------------------------------------------------------------------------------------------

def point_slots(cohort: Cohort, stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices [n] of all points of these stays, stay after stay, and of each the position [n] of its stay's
    last set not after it (-1: it lies before the first)."""
    count = np.diff(cohort.point_start)[stays]
    index = ranges(cohort.point_start[stays], count)
    first, end = (np.repeat(cohort.stay_start[stays + i], count) for i in (0, 1))
    return index, search_after(cohort.set_minute, cohort.point_minute[index], first, end) - first - 1


# ------------------------------------------------------------------------------------------------------------
# The embedded synthetic cohort
# ------------------------------------------------------------------------------------------------------------

def _written(text: str) -> pd.DataFrame:
    """A table by its first column."""
    return pd.read_table(io.StringIO(text), sep=r"\s+", index_col=0)


# The panel that each variable is charted with, and how it loads on the four organ processes.
_SYNTHETIC_VARIABLES = _written("""
    variable     panel      mean   sd  circulation  lungs  kidneys  brain
    HR           vitals       86   12           .9     .3        0     .3
    SysBP        vitals      121   15          -.9      0        0      0
    DiasBP       vitals       62    9          -.7      0        0      0
    MAP          vitals       80   10          -.9      0        0      0
    RespRate     vitals       18    4           .2     .8        0     .2
    SpO2         vitals       97    2            0    -.8        0      0
    Temp         vitals       37   .6            0      0        0     .6
    Urine        vitals      110   60          -.2      0      -.8      0
    GCS          neuro        12  2.5            0    -.2        0    -.8
    PupilSize    neuro         3   .8            0      0        0     .4
    CVP          neuro         9    3           .5      0       .3      0
    FiO2         gas          .5  .12            0     .8        0      0
    pH           gas        7.38  .06          -.3    -.4      -.5      0
    PaO2         gas         120   40            0    -.7        0      0
    PaCO2        gas          40    7            0     .5        0      0
    Lactate      gas           2    1           .9     .2       .2     .2
    BaseExcess   gas           0    3          -.5      0      -.5      0
    SaO2         gas          96    2            0    -.7        0      0
    Na           chemistry   139    4            0      0       .2      0
    K            chemistry   4.1   .5            0      0       .6      0
    Cl           chemistry   105    5            0      0       .2      0
    HCO3         chemistry    24    4          -.2      0      -.6      0
    BUN          chemistry    24   12            0      0       .9      0
    Creatinine   chemistry   1.3   .6           .1      0       .9      0
    Glucose      chemistry   135   35           .2      0        0     .4
    Mg           chemistry     2   .3            0      0       .2      0
    Ca           chemistry   8.4   .6            0      0      -.2      0
    Phosphate    chemistry   3.5    1            0      0       .5      0
    HCT          blood        31    4          -.2      0        0      0
    Platelets    blood       200   80            0      0        0    -.5
    WBC          blood        12    5           .1      0        0     .7
    Haemoglobin  blood      10.4  1.4          -.2      0        0      0
    INR          blood       1.3   .3           .2      0        0     .5
    PTT          blood        35   10           .1      0        0     .4
    ALT          liver        60   40           .3      0        0     .4
    AST          liver        70   50           .4      0        0     .4
    Bilirubin    liver       1.2   .8            0      0        0     .6
    Albumin      liver         3   .5            0      0        0    -.5
    ALP          liver        90   35            0      0        0     .3
    Troponin     liver         1   .7           .8      0        0      0
""")


# The chance an hour at severity 0, the added chance a unit of severity, and the chance that one variable of a
# drawn panel is missing.
_SYNTHETIC_PANELS = _written("""
    panel      chance  slope  missing
    vitals        .55    .15      .15
    neuro          .2    .08       .3
    gas           .06    .06       .1
    chemistry     .07    .03       .1
    blood         .06    .02      .15
    liver         .02   .015      .25
""")
_SYNTHETIC_HOURS = 48
_SYNTHETIC_BLOCK = 1000  # stays
SYNTHETIC_BYTES = 2500  # of a stay in the cache


def synthetic_cohort(stays: int = 1000, seed: int = 2012) -> Cohort:
    """The embedded cohort, whole in memory: deterministic in (stays, seed)."""
    return whole_cohort(synthetic_parts(stays, seed))


def synthetic_parts(stays: int, seed: int = 2012):
    """Yield the embedded cohort in blocks of at most 1,000 stays and nearly equal size (so that each holds
    every variable): what is held in memory does not grow with the cohort."""
    blocks = -(-stays // _SYNTHETIC_BLOCK)
    for block in range(blocks):
        first, end = (stays * b // blocks for b in (block, block + 1))
        # NumPy pads a seed with zeros: block 0 of a cohort draws what the whole cohort drew before there were
        # blocks.
        yield _synthetic_block([f"synthetic-{i:0{len(str(stays))}d}" for i in range(first, end)],
                               np.random.default_rng([seed, stays, block]))


def _synthetic_block(ids: list[str], rng: np.random.Generator) -> Cohort:
    """The stays `ids` of the embedded cohort, vectorised over stays.

    Four organ processes a stay (circulation, lungs, kidneys, brain/infection) wander as mean-reverting noise
    around a level and a trend. Charted values load on them with a baseline of the stay's own, which hides the
    level; severe hours are charted more often. Death depends on the *trajectory*: how much the organs
    worsened over the stay, and whether two failed at once at the end.
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

    names = list(_SYNTHETIC_VARIABLES.index) + ["Age", "Gender", "Height", "Weight"]
    columns = []  # (stay, minute, variable, value) of some events

    def add(stay, minute, v, value):
        columns.append((stay, minute, np.full(len(stay), v), value))

    everyone = np.arange(stays)
    for name, x in (("Age", age.round()), ("Gender", rng.integers(0, 2, stays)),
                    ("Height", rng.normal(170, 10, stays).round(1)),
                    ("Weight", rng.normal(82, 18, stays).clip(35).round(1))):
        recorded = rng.random(stays) > (.3 if name == "Height" else .03)
        add(everyone[recorded], np.zeros(recorded.sum()), names.index(name), x[recorded])
    baseline = rng.normal(0, .8, (stays, len(_SYNTHETIC_VARIABLES)))
    for panel, chance, slope, missing in _SYNTHETIC_PANELS.itertuples():
        s, hour = np.nonzero(rng.random(severity.shape) < (chance + slope * severity).clip(.01, .95))
        at = hour * 60 + 5 * rng.integers(0 if panel == "vitals" else 6, 12, len(s)) + (hour == 0) * 5
        for v, (home, mean, sd, *loading) in enumerate(_SYNTHETIC_VARIABLES.itertuples(index=False)):
            if home == panel:
                kept = rng.random(len(s)) > missing
                error = rng.normal(0, .4, kept.sum())
                z = baseline[s[kept], v] + organs[s[kept], hour[kept]] @ np.array(loading) + error
                add(s[kept], at[kept], v, np.maximum(mean + sd * z, mean * .05 if mean > 0 else -np.inf))
    return build_cohort("embedded synthetic cohort", names, *(np.concatenate(x) for x in zip(*columns)),
                        stay_id=ids, answers=label)
