"""What files beside the events tell: names and units of variables, labels, splits and subjects of stays; and
whether a variable is the label.

    python labels.py PHYSIONET2012_DIR NEW_DIR   writes label files of every kind
"""

import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data import KINDS, MINUTE, Cohort, InputError, new_folder, ranges, search_after
from questions import at_end, with_points
from settings import LineParser
from tables import (HOURS, ID, MISSING, OWNER, TIME, Report, Table, column_names, of_each, plain_name,
                    read_table, some)


# ------------------------------------------------------------------------------------------------------------
# What is told of variables and columns
# ------------------------------------------------------------------------------------------------------------

def read_columns(text: str | None) -> dict:
    """{a table's own name of a column: the name by which it is read}, in lower case, of
    stay_id=encounter_id,..."""
    pairs = [pair.partition("=")[::2] for pair in text.lower().split(",")] if text else []
    columns = {own.strip(): name.strip() for name, own in pairs}
    if len(columns) < len(pairs) or not all((*columns, *columns.values())):
        raise InputError(f"--columns {text}: takes pairs such as stay_id=encounter_id,minute=charted_at")
    return columns


def read_map(path: Path) -> dict:
    """variable -> (name, factor, offset), or (name, factor, offset, label), of a CSV source,name,factor and
    perhaps offset and label: value * factor + offset is what enters. A label is what tables and pictures call
    the variable, or one of its values where the source is such as Gender=0; its line may leave name and
    factor empty."""
    table = read_table([path], {"source": str, "name": str, "factor": float}, {"offset": float, "label": str})
    source, factor = _named_once(table, "source"), table["factor"]
    name, label = (of_each(table[column], str, "") if column in table.columns else np.full(len(factor), "")
                   for column in ("name", "label"))
    offset = table.columns.get("offset", np.zeros(len(factor)))
    unlabelled = label == ""
    table.refuse("name", unlabelled & (name == ""), "; give the name that the variable takes")
    table.refuse("factor", np.isinf(factor) | (unlabelled & np.isnan(factor)),
                 "; give 1 where the unit stays")
    table.refuse("offset", np.isinf(offset), "; give 0 where there is none")
    table.report.settle()
    factor, offset = np.nan_to_num(factor, nan=1), np.nan_to_num(offset)
    rows = zip(source, *(column.tolist() for column in (name, factor, offset, label)))
    return {source: (name or source, factor, offset, *filter(None, [label]))
            for source, name, factor, offset, label in rows}


def renames_and_labels(told: dict) -> tuple[dict, dict]:
    """What `read_map` tells, in two: {variable: (name, factor, offset)} of those that change, and {name:
    label}."""
    renames = {source: to[:3] for source, to in told.items() if to[:3] != (source, 1, 0)}
    return renames, {to[0]: to[3] for to in told.values() if len(to) > 3}


def _named_once(table: Table, column: str) -> pd.Index:
    """[rows] the variable that each row names; none, or one named before, is refused."""
    names = pd.Index(of_each(table[column], str, None), dtype=object)
    table.refuse(column, names.isna() | names.duplicated(),
                 ", where each line names another variable; mend or remove the line")
    return names


class _NumberType:
    """Stands in for numpy.dtype in a pickle: keeps the code (f8) and the byte order, and can do nothing
    else."""

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
    """Admits containers, strings, numbers and NumPy scalars, the last by stand-ins: nothing that the file
    names is imported or called."""

    _STAND_INS = {"numpy.dtype": _NumberType, "numpy.multiarray.scalar": _NumberType.scalar,
                  "_codecs.encode": lambda text, _: text.encode("latin1")}

    def find_class(self, module, name):
        wanted = f"{module}.{name}"
        plain = re.sub(r"^numpy\._?core\.", "numpy.", wanted)  # NumPy 2 and 1
        if plain not in self._STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {wanted}")
        return self._STAND_INS[plain]


def read_statistics(path: Path) -> pd.DataFrame:
    """mean and std by variable, from a CSV (variable,mean,std) or a pickle {variable: {"mean": .., "std":
    ..}}. Left out: those of a variable whose mean is not finite or whose std is zero or not finite, so that
    they are fitted. InputError for a negative std."""
    if path.suffix == ".pkl":
        try:
            with open(path, "rb") as file:
                content = _PlainUnpickler(file).load()
            known = {str(name): (float(entry["mean"]), float(entry["std"]))
                     for name, entry in content.items()}
        except Exception as error:  # a damaged or hostile pickle raises anything
            raise InputError(f"{path}: not a plain pickle of {{variable: {{'mean': number, 'std': number}}}} "
                             f"({type(error).__name__}: {error}); "
                             "write it so, or as CSV with variable,mean,std") from None
        given = pd.DataFrame.from_dict(known, orient="index", columns=["mean", "std"])
        if (given["std"] < 0).any():
            raise InputError(f"{path}: std of {given.index[given['std'] < 0][0]} is negative; mend it")
    elif path.suffix == ".csv":
        table = read_table([path], {"variable": str, "mean": float, "std": float})
        given = pd.DataFrame({"mean": table["mean"], "std": table["std"]}, _named_once(table, "variable"))
        table.refuse("std", table["std"] < 0, ", below 0; mend the line")
        table.report.settle()
    else:
        raise InputError(f"{path}: statistics of this kind are not read; give .csv with variable,mean,std or "
                         ".pkl")
    given = given.astype(np.float32)
    return given[np.isfinite(given).all(axis=1) & (given["std"] > 0)]


def read_vectors(path: Path) -> pd.DataFrame:
    """One vector a variable: `Key`, then a column each dimension. A column without a name (a row number that
    pandas wrote) is none."""
    table = read_table([path], {"Key": str}, rest=float)
    names = _named_once(table, "Key")
    columns = {name: column for name, column in table.columns.items() if name != "Key"}
    if not columns:
        raise InputError(f"{path}: no column beside Key; add one for each dimension")
    for name, column in columns.items():
        table.refuse(name, ~np.isfinite(column), ", not finite; mend the line")
    table.report.settle()
    return pd.DataFrame(columns, names, dtype=np.float32)


# ------------------------------------------------------------------------------------------------------------
# Labels, splits and subjects: what is told of stays that were read, attached after the cache
# ------------------------------------------------------------------------------------------------------------

_IDS = ("stay_id", "ts_id", "RecordID", "subject_id")
_LABELS = ("label", "boolean_value", "in_hospital_mortality", "In-hospital_death")
_UNTIL = ("hours", "days")  # from the question to an event
MOST_CLASSES = 256
_TIMES = {"minute": TIME, "hour": HOURS, "prediction_time": np.datetime64}
_LIKE_A_TIME = re.compile(
    r"(^|[^a-z])(date|day|hour|minute|offset)s?($|[^a-z])|^time|(time|date|offset)$|stamp")
SPLIT_WORDS = {"train": 0, "valid": 1, "val": 1, "validation": 1, "dev": 1, "tuning": 1, "test": 2,
               "held_out": 2, "heldout": 2}


def _split_codes(table: Table) -> np.ndarray:
    """[rows] code of column `split`; None where it is empty."""
    codes = of_each(table["split"], lambda word: SPLIT_WORDS.get(word.lower(), -1), None)
    table.refuse("split", codes == -1,
                 "; it is one of train, valid, test (or val, validation, dev, tuning, held_out)")
    return codes


def _one_of(path: Path, names, wanted, mend: str = "rename or add it") -> str:
    found = [name for name in wanted if name.lower() in names]
    if not found:
        raise InputError(f"{path}: no column {' or '.join(wanted)} (it has {', '.join([*names][:8])}); "
                         f"{mend}")
    return found[0]


def _told(table: Table, ids: np.ndarray, column: str, value) -> pd.Series:
    """What a column says of each id, empty cells aside; two things of one are wrong."""
    said = pd.DataFrame({"id": ids, "value": value}).dropna().drop_duplicates()
    again = said["id"].duplicated()
    rows = np.isin(np.arange(len(ids)), said.index[again])
    table.refuse(column, rows,
                 f", and another elsewhere for the same stay ({some(said['id'][again].unique())}); give one")
    return said[~again].set_index("id")["value"]


def with_splits(cohort: Cohort, told: pd.Series) -> Cohort:
    """The cohort with the split of these ids; a stay that is not told of belongs to none."""
    split = told.reindex(cohort.stay_id, fill_value=-1).to_numpy(np.int8)
    return replace(cohort, split=split).noting({
        "stays without a split (neither trained on nor scored)": int((split < 0).sum()),
        "splits of no stay with a usable event": int((~told.index.isin(cohort.stay_id)).sum())})


def read_splits(files: list[Path], own: dict = {}) -> pd.Series:
    """Split code by stay, of a file with an id and `split`; own: see `read_columns`."""
    id_column = _one_of(files[0], column_names(files[0], own), _IDS)
    table = read_table(files, {id_column: ID, "split": str}, report=Report(own))
    told = _told(table, of_each(table[id_column], str, None), "split", _split_codes(table))
    table.report.settle()
    return told


def _labels(table: Table, name: str, positive: str | None, mend: str = "") -> np.ndarray:
    """[rows] float labels, NaN where the cell is empty. positive: the word that is label 1; else they are 0
    and 1, or true and false. mend: of other labels, beside mending the line."""
    known = {"0": 0, "false": 0, "1": 1, "true": 1}
    nothing = set(map(str.lower, MISSING))
    given = [word for word in map(str.lower, table[name].categories) if word not in nothing]
    if positive is not None:
        positive = plain_name(positive, missing=[]).lower()
        if positive not in given and set(given) <= known.keys():
            table.note(f"labels that are 0 and 1, where the word {positive} is not looked for",
                       table[name].codes >= 0)
        elif positive not in given or len(given) > 2:
            raise InputError(f"{table.paths[0]}: --positive {positive}: {name} is one of {some(given)}; give "
                             "one of two words")
        else:
            known = {word: word == positive for word in given}
    known |= dict.fromkeys(nothing, np.nan)
    label = of_each(table[name], lambda word: known.get(word.lower(), -1), np.nan)
    if not mend:
        numbers = pd.to_numeric(pd.Series(given, dtype=object), errors="coerce").notna().all()
        mend = f"{'--kind number, ' if numbers else ''}--kind classes or (one of two words) --positive WORD"
    table.refuse(name, label == -1, f", not 0 or 1; mend the line, or say how it is read: {mend}")
    return label


def _classes(table: Table, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """[rows, 1] the class of each row, NaN where the cell is empty; and the classes: whole numbers by size,
    then words."""
    number = re.compile(r"-?\d+")
    words = sorted((word for word in table[name].categories if word not in MISSING),
                   key=lambda word: (0, int(word), word) if number.fullmatch(word) else (1, 0, word))
    if len(words) > MOST_CLASSES:
        raise InputError(f"{table.paths[0]}: {name} holds {len(words):,} classes; give at most {MOST_CLASSES}"
                         ", or --kind number")
    place = {word: i for i, word in enumerate(words)}
    return of_each(table[name], lambda word: place.get(word, np.nan), np.nan)[:, None], tuple(words)


def _number(table: Table, columns: list[str]) -> np.ndarray:
    """[rows, 1] the number of each row, in the first of these columns that holds one; NaN where none does."""
    value = np.full(table.rows.sum(), np.nan)
    for name in columns:
        table.refuse(name, np.isinf(table[name]), ", not finite; mend the line")
        value = np.where(np.isnan(value), table[name], value)
    return value[:, None]


def _events(table: Table, time: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """[rows, 2] hours to the event or to the censoring of each row, and its cause (0: censored, else 1 + its
    place among the causes), both NaN where the row tells neither; and the causes, sorted."""
    censored, given = (*MISSING, "0", "false"), table["event"].codes >= 0
    causes = sorted(word for word in table["event"].categories if word.lower() not in censored)
    place = {word: i for i, word in enumerate(causes, 1)}
    cause, until = of_each(table["event"], lambda word: place.get(word, 0), 0), table[time]
    table.refuse(time, np.isnan(until) & given, ", where its event is told; give the time from the question")
    table.refuse(time, (until < 0) | np.isinf(until), "; give a time from the question on, 0 or later")
    hours = until * (24 if time == "days" else 1)
    return np.stack([hours, np.where(np.isnan(hours), np.nan, cause)], axis=1), tuple(causes)


def _value_columns(path: Path, names, kind: str, outcomes) -> dict:
    """{column: type} of the columns that hold the answers of this kind. Raises InputError where one is
    missing."""
    if kind == "binary":
        return {_one_of(path, names, _LABELS, "rename or add it, or "
                         "name others with --kind or --outcomes"): str}
    if kind == "several":
        return {_one_of(path, names, [name]): str for name in outcomes}
    if kind == "score":
        return {_one_of(path, names, ("score",)): float}
    if kind == "classes":
        return {_one_of(path, names, ("label", "categorical_value")): str}
    if kind == "number":
        first = _one_of(path, names, ("label", "float_value", "integer_value"))
        return {first: float} | ({"integer_value": float} if {first, "integer_value"} <= names.keys()
                                 and first != "label" else {})
    times = [_one_of(path, names, _UNTIL), *(name for name in _UNTIL if name in names)]
    if len(times) > 2:
        raise InputError(f"{path}: holds both hours and days to an event; keep one of them")
    return {_one_of(path, names, ("event",)): str, times[0]: float}


def kind_of(names, kind: str | None, outcomes: list | None, positive: str | None) -> str:
    """The kind of labels in a table with these columns. kind: None: implied by `outcomes`, or by columns
    event and hours or days, else binary. Raises InputError for options that contradict each other."""
    found = kind or ("several" if outcomes else
                     "event" if "event" in names and set(_UNTIL) & set(names) else "binary")
    named = list(map(str.lower, outcomes or ()))
    if outcomes and (found != "several" or len(set(named)) < len(named)):
        raise InputError(f"--outcomes {' '.join(outcomes)}: names several outcomes, each once; leave it out "
                         f"with --kind {found}, or name each column once")
    if other := {*map(str.lower, _IDS), *_TIMES, "split"} & {*named}:
        raise InputError(f"--outcomes {' '.join(other)}: says which stay or when, and is no outcome; leave "
                         "it out, or rename the column")
    if found == "several" and not outcomes:
        raise InputError("--kind several: which columns? name them with --outcomes")
    if positive is not None and found != "binary":
        raise InputError(f"--positive {positive}: is of labels that are one of two words, and these are of "
                         f"the kind {found}; leave it out")
    return found


def _answers(table: Table, kind: str, columns: list[str], positive: str | None
             ) -> tuple[np.ndarray, tuple[str, ...]]:
    """The answers [rows, A] in these columns, and what they are called, see `Cohort.names`."""
    if kind == "classes":
        return _classes(table, *columns)
    if kind == "event":
        return _events(table, columns[1])
    if kind in ("number", "score"):
        return _number(table, columns), ("label",)
    mend = "leave the column out of --outcomes" if kind == "several" else ""
    answers = np.stack([_labels(table, name, positive, mend) for name in columns], axis=1)
    return answers, tuple(columns) if kind == "several" else ("label",)


def with_labels(cohort: Cohort, files: list[Path] | dict[str, list[Path]], positive: str | None = None,
                own: dict = {}, kind: str | None = None, outcomes: list[str] | None = None,
                kinds: tuple = KINDS) -> Cohort:
    """The cohort with what its labels' files tell: an id, answers (README.md lists the columns of each kind;
    an empty cell is none), and perhaps split, subject_id and a time: `minute` or `hour` of the stay or
    `prediction_time`. With times a row is a prediction point, without one a stay has one at its end.

    files: of one table, or by outcome those of one table each, of labels 0 or 1, whose rows of equal stay and
    time are joined. positive: the word that is label 1, the other one is 0. own: see `read_columns`. kind,
    outcomes: see `kind_of`. kinds: of which the answers are read; of others split and subject alone. Raises
    InputError for an answer that is none of its kind, and for two of one point.
    """
    report, joined, said = Report(own), None, {}
    tasks = files if isinstance(files, dict) else {"": files}
    several = len(tasks) > 1
    for number, (task, files) in enumerate(tasks.items()):
        found = kind_of(column_names(files[0], own), kind, [*tasks] if several else outcomes, positive)
        told = _read_labels(cohort, files, "binary" if several else found, outcomes, positive, report,
                            found in kinds)
        for column, value in told.said.items():
            said[column] = said[column].combine_first(value) if column in said else value
        if told.rows is None:
            continue
        rows = told.rows.rename(columns={0: number}) if several else told.rows
        if joined is None:
            joined, timed = rows, told.timed
        elif told.timed != timed:
            raise InputError(f"{files[0]}: {told.timed or 'no time'} where the first task has "
                             f"{timed or 'none'}; ask tasks with and without times apart")
        else:
            joined = joined.merge(rows, how="outer", on=["id", "at"])

    if (subject := said.get("subject_id")) is not None:
        subject = subject.reindex(cohort.stay_id)
        cohort = replace(cohort, subject=np.where(subject.isna(), cohort.subject, subject).astype(str))
    if "split" in said:
        cohort = with_splits(cohort, said["split"])
    if joined is None:
        return cohort
    cohort = replace(cohort, kind=found, names=tuple(tasks) if several else told.names)
    return _asking(cohort, joined, timed, files[0], report)


class _Told(NamedTuple):
    """What a table of labels tells."""

    rows: pd.DataFrame | None  # id, at: the time or 0, and the answers in columns 0, 1, ...; None: not read
    names: tuple[str, ...]     # what the answers are called, see `Cohort.names`
    timed: str | None          # the column of its times
    said: dict                 # split and subject_id by id, where it has them


def _read_labels(cohort: Cohort, files: list[Path], kind: str, outcomes: list[str] | None,
                 positive: str | None, report: Report, read: bool) -> _Told:
    """What one table tells; of its answers only if they are to be `read`."""
    names = column_names(files[0], report.columns)
    id_column = _one_of(files[0], names, _IDS)
    values = _value_columns(files[0], names, kind, outcomes) if read else {}
    timed = next((name for name in _TIMES if name in names), None) if read else None
    times = [name for name, clock in names.items()
             if (clock or _LIKE_A_TIME.search(name)) and name not in map(str.lower, values)]
    if read and not timed and times:
        unit = "prediction_time" if names[times[0]] else "hour"
        raise InputError(f"{files[0]}: its column {times[0]} looks like a time, of no known unit; call it "
                         f"minute, hour or prediction_time, here or by --columns {unit}={times[0]} "
                         f"(other={times[0]}: not read)")
    columns = {id_column: ID, **values} | ({timed: _TIMES[timed]} if timed else {})
    optional = {name: type_ for name, type_ in (("split", str), ("subject_id", OWNER)) if name not in columns}
    table = read_table(files, columns, optional, report=report)
    ids = of_each(table[id_column], str, None)
    answers, called = _answers(table, kind, [*values], positive) if read else (None, ())
    said = {}
    for column in [name for name in optional if name in table.columns]:
        value = _split_codes(table) if column == "split" else of_each(table[column], str, None)
        said[column] = _told(table, ids, column, value)
    if timed:
        table.refuse(timed, ~np.isfinite(table[timed]), "; give the time of the question")
    report.settle()
    if not read:
        return _Told(None, called, timed, said)

    rows = pd.DataFrame({"id": ids, "at": table[timed] if timed else 0}).join(pd.DataFrame(answers))
    again = rows.duplicated().to_numpy()
    other = rows.duplicated(["id", "at"]).to_numpy() & ~again
    named = some(np.unique(ids[other]))
    table.refuse(id_column, other, f", given twice and not alike ({named}); keep one line of each")
    report.settle()
    table.note("rows given more than once", again)
    strange = ~rows["id"].isin(cohort.stay_id).to_numpy()
    table.note("rows of no stay with a usable event", strange & ~again)
    return _Told(rows[~strange & ~again], called, timed, said)


def _asking(cohort: Cohort, rows: pd.DataFrame, timed: str | None, path: Path, report: Report) -> Cohort:
    """The cohort with a prediction point for each of these rows (see `_Told`), or without times one at
    the end of each stay."""
    rows = rows.assign(stay=pd.Index(cohort.stay_id).get_indexer(rows["id"])).sort_values(["stay", "at"])
    stay, at = rows["stay"].to_numpy(), rows["at"].to_numpy()                                      # [Q]
    answers = rows.drop(columns=["id", "at", "stay"]).to_numpy(float)                              # [Q, A]
    count = np.bincount(stay, minlength=len(cohort))
    if not timed:
        at_ends = np.full((len(cohort), answers.shape[1]), np.nan)
        at_ends[stay] = answers
        report.counts["stays without an outcome (unlabelled)"] = int(np.isnan(at_ends).all(1).sum())
        return at_end(cohort.noting(report.counts, report.examples), at_ends)
    report.counts["stays without a question"] = int((count == 0).sum())
    if at.dtype.kind == "M":
        origin = np.array(cohort.origin)
        if np.isnat(origin).all():
            raise InputError(f"{path}: {timed} is a clock time, which these data do not know; give minute or "
                             "hour of the stay")
        # A stay of static events alone knows no clock: its first question sets it.
        unknown = np.isnat(origin) & (count > 0)
        origin[unknown] = at[np.searchsorted(stay, np.flatnonzero(unknown))].astype("datetime64[m]")
        cohort = replace(cohort, origin=origin)
        since = at.astype("datetime64[us]").astype(np.int64) - origin[stay].astype(np.int64)
        at = since // MINUTE + since % MINUTE / MINUTE
    elif timed == "hour":
        at = at + cohort.admission[stay]
    return with_points(cohort.noting(report.counts, report.examples), count, at, answers)


def read_scores(cohort: Cohort, path: Path, own: dict = {}) -> tuple[np.ndarray, list[str]]:
    """The score of each prediction point [Q], NaN: none, that a file tells of an id, `score` and perhaps a
    time (see `with_labels`): of a stay with several the last that is not after the point; and lines of what
    was met. own: see `read_columns`."""
    report = Report(own)
    told = _read_labels(cohort, [path], "score", None, None, report, True)
    lines = report.lines()
    asked = _asking(cohort, told.rows.dropna(subset=[0]), told.timed, path, report)
    scores = pd.DataFrame({"stay": asked.point_stay, "at": asked.point_minute if told.timed else -np.inf,
                           "score": asked.answers[:, 0].astype(float)}).dropna()
    points = pd.DataFrame({"stay": cohort.point_stay, "at": cohort.point_minute})
    found = pd.merge_asof(points.reset_index().sort_values("at"), scores.sort_values("at"), on="at",
                          by="stay")
    return found.sort_values("index")["score"].to_numpy(), lines


def telling_variables(cohort: Cohort, points: np.ndarray) -> dict[str, float]:
    """{variable: AUROC} of those whose presence or last value alone tells the labels (0 or 1) of these points
    [n] with an AUROC above 0.98: it may be the outcome itself. Of several outcomes "variable (of outcome)";
    of another kind none. Looks at the last of these points of at most 5,000 stays; a value counts where at
    least ten points of each class have one."""
    if cohort.kind == "binary":
        return _telling(cohort, points, cohort.answers[points, 0])
    return {f"{variable} (of {name})": auc
            for name, answer in zip(cohort.names, cohort.answers[points].T) if cohort.kind == "several"
            for variable, auc in _telling(cohort, points[answer >= 0], answer[answer >= 0]).items()}


def _telling(cohort: Cohort, points: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """See `telling_variables`; label [n]: 0 or 1 of each point."""
    enough, stay = 10, cohort.point_stay[points]
    chosen = np.flatnonzero(np.append(stay[1:] != stay[:-1], True)[:len(points)])
    chosen = chosen[::1 + len(chosen) // 5000]
    points, stay, positive = points[chosen], stay[chosen], label[chosen] == 1
    negatives, positives = np.bincount(positive, minlength=2)
    if min(negatives, positives) < enough:
        return {}
    begin, end = cohort.stay_start[stay], cohort.stay_start[stay + 1]
    end = search_after(cohort.set_minute, cohort.point_minute[points], begin, end)
    first = cohort.set_start[begin]
    count = cohort.set_start[end] - first
    event, asked = ranges(first, count), np.repeat(np.arange(len(points)), count)
    last = pd.DataFrame({"variable": cohort.event_variable[event], "value": cohort.event_value[event],
                         "one": positive[asked], "zero": ~positive[asked], "point": asked})
    last = last.groupby(["variable", "point"]).last()
    held, valued = last.groupby("variable").sum(), last.dropna()
    presence = (1 + held["one"] / positives - held["zero"] / negatives) / 2
    # Of the last values: the Mann-Whitney statistic.
    valued = valued.assign(rank=valued.groupby("variable")["value"].rank() * valued["one"])
    sums = valued.groupby("variable")[["one", "zero", "rank"]].sum()
    ones, zeros = sums["one"], sums["zero"]
    value = (sums["rank"] - ones * (ones + 1) / 2) / (ones * zeros)
    scores = pd.concat([presence, value[(ones >= enough) & (zeros >= enough)]])
    best = np.maximum(scores, 1 - scores).groupby(level=0).max().sort_values(ascending=False)
    return {cohort.variables[v]: float(auc) for v, auc in best[best > .98].items()}


# ------------------------------------------------------------------------------------------------------------
# Label files of PhysioNet 2012: python labels.py PHYSIONET2012_DIR NEW_DIR
# ------------------------------------------------------------------------------------------------------------

def physionet2012_labels(folder: Path) -> dict[str, pd.DataFrame]:
    """{file: table} of labels and scores, of the Outcomes-*.txt in a folder of PhysioNet 2012 (Silva et al.
    2012); an unknown one is empty (-1 there). Days count from admission; hours to an event count from the end
    of the 48 that are recorded, at least 12. Raises InputError where a row is wrong or there is no file."""
    files, outcomes = sorted(folder.glob("Outcomes-?.txt")), {}
    if not files:
        raise InputError(f"{folder}: holds no Outcomes-a.txt, -b or -c; give the folder of PhysioNet 2012")
    names = ("SAPS-I", "SOFA", "Length_of_stay", "Survival", "In-hospital_death")
    table = read_table(files, {"RecordID": ID} | dict.fromkeys(names, float))
    stay_id = of_each(table["RecordID"], str, None)
    table.refuse("RecordID", pd.Index(stay_id).duplicated(), ", named before; keep one line of each stay")
    table.refuse(names[-1], ~np.isin(table[names[-1]], (0, 1)), ", not 0 or 1; mend the line")
    for name in names[:-1]:
        outcomes[name] = pd.Series(table[name]).where(table[name] != -1)
    table.report.settle()
    days, died = outcomes["Length_of_stay"], pd.Series(table[names[-1]])
    until = outcomes["Survival"].where(died == 1, days)
    columns = {
        "days.csv": {"label": days},
        "outcomes.csv": {"died": died, "long": (days > 7).astype(float).where(days.notna())},
        "classes.csv": {"label": pd.cut(days, [-np.inf, 3, 7, 14, np.inf],
                                        labels=["0-3", "4-7", "8-14", "15+"])},
        "event.csv": {"event": died.map({0: "discharged", 1: "died"}).where(until.notna()),
                      "hours": (24 * until - 48).clip(lower=12)},
        "saps.csv": {"score": outcomes["SAPS-I"]}, "sofa.csv": {"score": outcomes["SOFA"]}}
    return {file: pd.DataFrame({"stay_id": stay_id, **its}).convert_dtypes()
            for file, its in columns.items()}


def write_physionet2012_labels(source: Path, folder: Path) -> None:
    """Writes `physionet2012_labels` of one folder as CSV to a new one, where a stay without a label has no
    row."""
    tables = physionet2012_labels(source)
    with new_folder(folder):
        for file, table in tables.items():
            table.dropna(thresh=2).to_csv(folder / file, index=False)
            lacking = [f"{count:,} without {name}" for name, count in table.isna().sum().items() if count]
            print(f"{folder / file}: {', '.join([f'{len(table):,} stays', *lacking])}")


def main(argv=None) -> int:
    from runs import exit_code  # which imports this module

    def write():
        parser = LineParser(description="Write label files of every kind from the outcome files of PhysioNet "
                                        "2012, and its scores SAPS-I and SOFA.", allow_abbrev=False)
        parser.add_argument("physionet2012", type=Path, help="the folder of Outcomes-a.txt")
        parser.add_argument("folder", type=Path, help="the new folder to write in")
        given = parser.parse_args(argv)
        write_physionet2012_labels(given.physionet2012, given.folder)
    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
