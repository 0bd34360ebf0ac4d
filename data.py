"""Data path of SeqSetVAE: files -> `Cohort` (ragged NumPy arrays, cached) -> `EventBatch` (tensors).

An ICU stay is a sequence of sets; a set is every (variable, value) event charted at one minute. Nothing here is padded: a cohort is
flat arrays plus offsets, and a batch is the same layout for a few stays, with the index tensors by which the model groups sets of
similar size. Nothing here knows of models, losses or devices (beyond `EventBatch.to`).
"""

import csv
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import warnings
import zlib
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import train_test_split

READER_VERSION = 3  # raise it when a reader's output changes: older caches are then rebuilt
CACHE_DIR = Path(__file__).resolve().parent / ".cache"
SPLITS = ("train", "valid", "test")  # codes 0, 1, 2 in `Cohort.split`; -1 is unassigned


class InputError(Exception):
    """A mistake in what the user gave: one line that names the file, the row or key, and the mend. Ends a command with exit code 2."""


def write_atomically(path, write) -> None:
    """Call `write` with a temporary path in the same folder, sync it to disk, rename it to `path`: a reader meets the old file or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with clear_write_error(path):
        try:
            write(temporary)
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def clear_write_error(path):
    """A failed write becomes an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); what was there before is untouched: free space or choose "
                         "another folder") from None


def sync(path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------------------------------------------
# The cohort
# ----------------------------------------------------------------------------------------------------------------------------------

@dataclass
class Cohort:
    """P stays, T sets, E events, V variables, as flat arrays; `*_start` are offsets into the next finer level."""

    reader: str
    variables: list[str]        # [V] vocabulary, sorted
    event_variable: np.ndarray  # [E] int16, or int32 for V > 32,767
    event_value: np.ndarray     # [E] float32, raw units
    set_start: np.ndarray       # [T+1] int64, in events
    set_minute: np.ndarray      # [T] float32, minutes since admission, rising within a stay
    stay_start: np.ndarray      # [P+1] int64, in sets
    stay_id: np.ndarray         # [P] str
    label: np.ndarray           # [P] int8, -1: none
    split: np.ndarray           # [P] int8, index into SPLITS, -1: unassigned
    statistics: np.ndarray      # [V, 2] float32, mean and standard deviation given with the data, NaN: none
    vectors: np.ndarray         # [V, D] float32, vectors given with the data, NaN: none; D is 0 where no variable has one
    notes: dict = field(default_factory=dict)  # what the reader skipped: reason -> count
    fingerprint: str = ""       # digest of the stays, not of their labels: a split holds when labels come later

    STAYS = ("event_variable", "event_value", "set_start", "set_minute", "stay_start", "stay_id", "split")
    ARRAYS = STAYS + ("label", "statistics", "vectors")

    def __len__(self) -> int:
        return len(self.stay_id)

    @property
    def stay_events(self) -> np.ndarray:
        """[P] number of events of each stay."""
        return np.diff(self.set_start[self.stay_start])

    def digest(self) -> str:
        """The fingerprint. Reads the arrays where they lie: a memory-mapped cohort is not copied."""
        digest = hashlib.sha256("\n".join(self.variables).encode())
        for name in Cohort.STAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).view(np.uint8))
        return digest.hexdigest()[:16]

    def describe(self) -> str:
        """The lines a command prints about what it read."""
        labelled = self.label >= 0
        lines = [f"data: {self.reader}: {len(self):,} stays, {len(self.set_minute):,} sets, {len(self.event_value):,} events, "
                 f"{len(self.variables)} variables, {labelled.sum():,} labelled ({(self.label == 1).sum():,} positive)"]
        lines += [f"data: skipped: {count:,} {reason}" for reason, count in self.notes.items() if count]
        return "\n".join(lines)


def build_cohort(reader, variables, stay, minute, variable, value, stay_id, label, split=None, notes=None, set_key=None, statistics=None,
                 vectors=None) -> Cohort:
    """Sort flat events into a `Cohort`. A set is all events of one stay at one minute; duplicates are kept (a set is a multiset).

    Args:
        variables: [V] names; stay, minute, variable, value: [E] stay index, minutes, variable index, raw value of each event.
        stay_id, label, split: [P]; split may be None (all unassigned).
        set_key: [E] number by which the source tells sets of one minute apart (None: it does not).
        statistics, vectors: what the data give for variables, as DataFrames indexed by name (None: nothing).
    Stays without any event are left out and counted in `notes`; the vocabulary keeps only variables that occur, sorted by name.
    Raises InputError when a stay id occurs twice.
    """
    notes = dict(notes or {})
    stay_id = np.asarray(stay_id, dtype=str)
    ids, counts = np.unique(stay_id, return_counts=True)
    if len(ids) < len(stay_id):
        raise InputError(f"{reader}: stay {ids[counts > 1][0]} occurs more than once; give each stay an id of its own")
    split = np.full(len(stay_id), -1) if split is None else np.asarray(split)

    used = np.unique(stay)
    notes["stays without a usable event"] = len(stay_id) - len(used)
    if not len(used):
        raise InputError(f"{reader}: no usable event in any stay; check the files' columns and values")
    stay = np.searchsorted(used, stay)
    present = np.unique(variable)
    order = np.argsort(np.asarray(variables, dtype=str)[present])
    rank = np.zeros(len(variables), dtype=np.int64)
    rank[present[order]] = np.arange(len(present))

    keys = ([] if set_key is None else [set_key]) + [np.asarray(minute), stay]
    sequence = np.lexsort(keys)  # stable: events of one set keep their order in the file
    keys = [key[sequence] for key in keys]
    minute, stay = keys[-2:]
    set_first = np.append(0, 1 + np.flatnonzero(np.any([key[1:] != key[:-1] for key in keys], axis=0)))
    names = [str(variables[i]) for i in present[order]]
    cohort = Cohort(
        reader=reader,
        variables=names,
        event_variable=rank[variable[sequence]].astype(np.int16 if len(present) < 2**15 else np.int32),
        event_value=np.asarray(value, dtype=np.float32)[sequence],
        set_start=np.append(set_first, len(stay)).astype(np.int64),
        set_minute=minute[set_first].astype(np.float32),
        stay_start=np.searchsorted(stay[set_first], np.arange(len(used) + 1)).astype(np.int64),
        stay_id=stay_id[used],
        label=np.asarray(label)[used].astype(np.int8),
        split=split[used].astype(np.int8),
        statistics=(pd.DataFrame(columns=["mean", "std"]) if statistics is None else statistics).reindex(names).to_numpy(np.float32),
        vectors=(pd.DataFrame() if vectors is None else vectors).reindex(names).to_numpy(np.float32),
        notes=notes,
    )
    cohort.fingerprint = cohort.digest()
    return cohort


def pieces(parts: Iterable[Cohort]):
    """Yield (part, {name of array: rows}), such that the rows of all parts, one after another, are the whole's. The parts agree in their
    variables and in the arrays' types."""
    sets = events = 0
    for part in parts:
        rows = {name: getattr(part, name) for name in Cohort.ARRAYS} | {"set_start": part.set_start + events, "stay_start": part.stay_start + sets}
        if sets:
            rows = {name: x[name.endswith("_start"):] for name, x in rows.items() if name not in ("statistics", "vectors")}
        yield part, rows
        sets, events = sets + len(part.set_minute), events + len(part.event_value)


# ----------------------------------------------------------------------------------------------------------------------------------
# Reader: the embedded synthetic cohort
# ----------------------------------------------------------------------------------------------------------------------------------

# name: (mean, standard deviation, loading on the four organ processes, panel it is charted with)
_SYNTHETIC_VARIABLES = {
    "HR": (86, 12, (.9, .3, 0, .3), "vitals"), "SysBP": (121, 15, (-.9, 0, 0, 0), "vitals"), "DiasBP": (62, 9, (-.7, 0, 0, 0), "vitals"),
    "MAP": (80, 10, (-.9, 0, 0, 0), "vitals"), "RespRate": (18, 4, (.2, .8, 0, .2), "vitals"), "SpO2": (97, 2, (0, -.8, 0, 0), "vitals"),
    "Temp": (37, .6, (0, 0, 0, .6), "vitals"), "Urine": (110, 60, (-.2, 0, -.8, 0), "vitals"), "GCS": (12, 2.5, (0, -.2, 0, -.8), "neuro"),
    "PupilSize": (3, .8, (0, 0, 0, .4), "neuro"), "CVP": (9, 3, (.5, 0, .3, 0), "neuro"), "FiO2": (.5, .12, (0, .8, 0, 0), "gas"),
    "pH": (7.38, .06, (-.3, -.4, -.5, 0), "gas"), "PaO2": (120, 40, (0, -.7, 0, 0), "gas"), "PaCO2": (40, 7, (0, .5, 0, 0), "gas"),
    "Lactate": (2, 1, (.9, .2, .2, .2), "gas"), "BaseExcess": (0, 3, (-.5, 0, -.5, 0), "gas"), "SaO2": (96, 2, (0, -.7, 0, 0), "gas"),
    "Na": (139, 4, (0, 0, .2, 0), "chemistry"), "K": (4.1, .5, (0, 0, .6, 0), "chemistry"), "Cl": (105, 5, (0, 0, .2, 0), "chemistry"),
    "HCO3": (24, 4, (-.2, 0, -.6, 0), "chemistry"), "BUN": (24, 12, (0, 0, .9, 0), "chemistry"),
    "Creatinine": (1.3, .6, (.1, 0, .9, 0), "chemistry"), "Glucose": (135, 35, (.2, 0, 0, .4), "chemistry"),
    "Mg": (2, .3, (0, 0, .2, 0), "chemistry"), "Ca": (8.4, .6, (0, 0, -.2, 0), "chemistry"), "Phosphate": (3.5, 1, (0, 0, .5, 0), "chemistry"),
    "HCT": (31, 4, (-.2, 0, 0, 0), "blood"), "Platelets": (200, 80, (0, 0, 0, -.5), "blood"), "WBC": (12, 5, (.1, 0, 0, .7), "blood"),
    "Haemoglobin": (10.4, 1.4, (-.2, 0, 0, 0), "blood"), "INR": (1.3, .3, (.2, 0, 0, .5), "blood"), "PTT": (35, 10, (.1, 0, 0, .4), "blood"),
    "ALT": (60, 40, (.3, 0, 0, .4), "liver"), "AST": (70, 50, (.4, 0, 0, .4), "liver"), "Bilirubin": (1.2, .8, (0, 0, 0, .6), "liver"),
    "Albumin": (3, .5, (0, 0, 0, -.5), "liver"), "ALP": (90, 35, (0, 0, 0, .3), "liver"), "Troponin": (1, .7, (.8, 0, 0, 0), "liver"),
}
# panel: (chance an hour at severity 0, added chance a unit of severity, chance that one variable of a drawn panel is missing)
_SYNTHETIC_PANELS = {"vitals": (.55, .15, .15), "neuro": (.2, .08, .3), "gas": (.06, .06, .1), "chemistry": (.07, .03, .1),
                     "blood": (.06, .02, .15), "liver": (.02, .015, .25)}
_SYNTHETIC_HOURS = 48
_SYNTHETIC_BLOCK = 1000  # stays
_SYNTHETIC_BYTES = 2500  # of a stay in the cache


def synthetic_cohort(stays: int = 1000, seed: int = 2012) -> Cohort:
    """The embedded cohort, whole in memory: deterministic in (stays, seed)."""
    parts, rows = zip(*pieces(synthetic_parts(stays, seed)))
    cohort = replace(parts[0], **{name: np.concatenate([r[name] for r in rows if name in r]) for name in Cohort.ARRAYS})
    cohort.fingerprint = cohort.digest()
    return cohort


def synthetic_parts(stays: int, seed: int = 2012):
    """Yield the embedded cohort in blocks of at most 1,000 stays and nearly equal size (so that each holds every variable): what is held
    in memory does not grow with the cohort."""
    blocks = -(-stays // _SYNTHETIC_BLOCK)
    for block in range(blocks):
        first, end = (stays * b // blocks for b in (block, block + 1))
        # NumPy pads a seed with zeros: block 0 of a cohort draws what the whole cohort drew before there were blocks.
        yield _synthetic_block([f"synthetic-{i:0{len(str(stays))}d}" for i in range(first, end)], np.random.default_rng([seed, stays, block]))


def _synthetic_block(ids: list[str], rng: np.random.Generator) -> Cohort:
    """The stays `ids` of the embedded cohort, vectorised over stays.

    Four organ processes a stay (circulation, lungs, kidneys, brain/infection) wander as mean-reverting noise around a level and a trend.
    Charted values load on them with a baseline of the stay's own, which hides the level; severe hours are charted more often. Death
    depends on the *trajectory*: how much the organs worsened over the stay, and whether two failed at once at the end.
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
    for name, x in (("Age", age.round()), ("Gender", rng.integers(0, 2, stays)), ("Height", rng.normal(170, 10, stays).round(1)),
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
                z = baseline[s[kept], v] + organs[s[kept], hour[kept]] @ np.array(loading) + rng.normal(0, .4, kept.sum())
                add(s[kept], at[kept], v, np.maximum(mean + sd * z, mean * .05 if mean > 0 else -np.inf))
    return build_cohort("embedded synthetic cohort", names, *(np.concatenate(x) for x in (stay, minute, variable, value)), stay_id=ids, label=label)


# ----------------------------------------------------------------------------------------------------------------------------------
# Tables: CSV and Parquet, checked as they are read
# ----------------------------------------------------------------------------------------------------------------------------------

_MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]  # in a column of numbers; in a column of text NA may be sodium


@dataclass
class Table:
    """Rows of files of one shape, file after file. Text is pd.Categorical (categories sorted), a number float64, a time datetime64[us]."""

    paths: list[Path]
    rows: np.ndarray  # [files] rows of each
    columns: dict

    def __getitem__(self, name: str):
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @property
    def file(self) -> np.ndarray:
        """[rows] index of each row's file."""
        return np.repeat(np.arange(len(self.paths)), self.rows)

    def place(self, row: int) -> str:
        """File and line (in Parquet: row) of a row, counted from 1."""
        file = int(np.searchsorted(np.cumsum(self.rows), row, side="right"))
        row -= int(self.rows[:file].sum())
        return f"{self.paths[file]} " + (f"row {row + 1}" if self.paths[file].suffix == ".parquet" else f"line {row + 2}")

    def refuse(self, name: str, bad: np.ndarray, problem: str) -> None:
        """Raise the InputError that names the first row of the mask `bad` and its cell of column `name`; pass where there is none."""
        if bad.any():
            row = int(np.argmax(bad))
            cell = self[name][row]
            shown = "missing" if pd.isna(cell) else f"{cell:g}" if isinstance(cell, float) else repr(str(cell))
            raise InputError(f"{self.place(row)}: {name} is {shown}{problem}")


def _read_table(paths: list[Path], columns: dict, optional: dict = {}, rest=None, separator: str = ",") -> Table:
    """The files (all CSV in UTF-8, or all Parquet) as one `Table`.

    columns, optional: {name: str, float or np.datetime64 (Parquet only)}; rest: the type of every other named column (None: not read).
    Raises InputError for an empty or damaged file, a missing column, a row of another width, a cell of another type, and no row at all.
    """
    if len({path.suffix == ".parquet" for path in paths}) > 1:
        raise InputError(f"{paths[0].parent}: holds both CSV and Parquet; keep one of them")
    try:
        empty = next((path for path in paths if not path.stat().st_size), None)
        if empty:
            raise InputError(f"{empty}: an empty file; write it again, or remove it")
        read = _read_parquet if paths[0].suffix == ".parquet" else _read_csv
        table = read(paths, columns, optional, rest, separator)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); correct its path or permissions") from None
    if not table.rows.sum():
        raise InputError(f"{paths[0]}: a header and no row; write the file again")
    return table


def _choose_columns(path: Path, names: list[str], columns: dict, optional: dict, rest) -> dict:
    """{name: type} of the columns to read; InputError where one is missing or occurs twice."""
    missing = [name for name in columns if name not in names]
    if missing:
        raise InputError(f"{path}: no column {missing[0]} (it has {', '.join(names[:8])}); rename or add it")
    wanted = {name: kind for name in names if name and (kind := (columns | optional).get(name, rest))}
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise InputError(f"{path}: column {twice[0]} occurs twice; keep one")
    return wanted


def _read_csv(paths, columns, optional, rest, separator) -> Table:
    """Parses all files in one call, for thousands of small files as for one large one. Quoted cells may not hold line breaks."""
    header, bodies, rows = None, [], []
    for path in paths:
        first, _, body = path.read_bytes().removeprefix(b"\xef\xbb\xbf").partition(b"\n")
        header = first.rstrip() if header is None else header
        if first.rstrip() != header:
            raise InputError(f"{path} line 1: other columns than in {paths[0].name}; give all files one header")
        bodies.append(body if not body or body.endswith(b"\n") else body + b"\n")
        rows.append(bodies[-1].count(b"\n"))
    table = Table(paths, np.array(rows), {})
    try:
        names = next(csv.reader([header.decode()], delimiter=separator), [])
        wanted = _choose_columns(paths[0], names, columns, optional, rest)
        places = [name if name in wanted else f"ignored {i}" for i, name in enumerate(names)]
        source = io.BytesIO(b"".join(bodies))
        del body, bodies
        missing = {name: _MISSING if wanted.get(name) is float else [""] for name in places}

        def parse(number):
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                source.seek(0)
                return pd.read_csv(source, header=None, names=places, sep=separator, na_values=missing, keep_default_na=False,
                                   skip_blank_lines=False, index_col=False,
                                   dtype={name: number if wanted.get(name) is float else object for name in places})
        try:
            frame = parse(float)
        except UnicodeDecodeError:
            raise
        except (ValueError, OverflowError):  # find the cell
            frame = parse(str)
            for name in (name for name in wanted if wanted[name] is float):
                table.columns[name] = frame[name].to_numpy(object)
                bad = frame[name].notna() & pd.to_numeric(frame[name], errors="coerce").isna()
                table.refuse(name, bad.to_numpy(), ", not a number; mend or remove the line")
            raise
    except UnicodeDecodeError:
        raise InputError(f"{paths[0]}{' or a file beside it' * (len(paths) > 1)}: not UTF-8 text; save it with that encoding") from None
    except pd.errors.ParserWarning:
        raise InputError(f"{table.place(0)}: more cells than the {len(names)} columns; mend the line") from None
    except pd.errors.EmptyDataError:
        return table
    except (ValueError, OverflowError, csv.Error) as error:
        wide = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        where = f"{table.place(int(wide[2]) - 1)}: {wide[3]} cells where the columns are {wide[1]}" if wide else f"{paths[0]}: {str(error).strip()}"
        raise InputError(f"{where}; mend the line") from None
    if len(frame) != sum(rows):
        raise InputError(f"{paths[0]}{' or a file beside it' * (len(paths) > 1)}: a quoted cell holds a line break; remove it")
    # Not dtype="category" above: pandas makes numbers of such categories where it can, and 007 and 7 one stay.
    table.columns = {name: frame[name].to_numpy() if kind is float else pd.Categorical(frame[name]) for name, kind in wanted.items()}
    return table


def _read_parquet(paths, columns, optional, rest, separator) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError:
        raise InputError(f"{paths[0]}: Parquet needs pyarrow; pip install pyarrow") from None
    tables = []
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                wanted = _choose_columns(path, file.schema_arrow.names, columns, optional, rest)
                tables.append(file.read(columns=list(wanted)))
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); write it again") from None
    try:
        whole = pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise InputError(f"{paths[0].parent}: the files' columns differ in type ({str(error).splitlines()[0]}); write them with one schema") from None
    table = Table(paths, np.array([len(t) for t in tables]), {})
    for name, kind in ((name, (columns | optional).get(name, rest)) for name in whole.column_names):
        column, own = whole[name], whole[name].type
        number = types.is_integer(own) or types.is_floating(own) or types.is_boolean(own) or types.is_decimal(own) or types.is_null(own)
        if kind is float and number:
            table.columns[name] = column.cast(pyarrow.float64(), safe=False).to_numpy()
        elif kind is np.datetime64 and (types.is_timestamp(own) or types.is_null(own)):
            table.columns[name] = column.cast(pyarrow.timestamp("us"), safe=False).to_numpy().astype("datetime64[us]")
        elif kind is str and (number or types.is_string(own) or types.is_large_string(own) or types.is_dictionary(own)):
            text = (column if types.is_dictionary(own) else column.dictionary_encode()).unify_dictionaries().to_pandas().array
            text = text.rename_categories([str(category) for category in text.categories])
            table.columns[name] = text.reorder_categories(sorted(text.categories))
        else:
            expected = {float: "numbers", str: "text or whole numbers", np.datetime64: "timestamps"}[kind]
            raise InputError(f"{paths[0]}: column {name} holds {own} where {expected} belong; convert it")
    return table


def _read_split(table: Table, words: tuple = SPLITS) -> np.ndarray:
    """[rows] code of column `split`, -1 where it is empty; `words` are the source's names of train, valid and test."""
    split = table["split"]
    codes = np.array([words.index(word) if word in words else -2 for word in split.categories] + [-1])[split.codes]
    table.refuse("split", codes == -2, f"; it is one of {', '.join(words)}")
    return codes


def _plain_ids(ids) -> pd.Index:
    """Ids by which two tables meet: a whole number that one of them wrote as a float (200001.0) loses its .0."""
    return pd.Index([text[:-2] if text.endswith(".0") and text[:-2].isdigit() else text for text in map(str.strip, ids)], dtype=object)


def _read_labels(path: Path, id_column: str, label_column: str) -> pd.DataFrame:
    """label (0, 1; -1 where the cell is empty) and split (-1: none) of each id. Raises InputError for another label and an id given twice."""
    table = _read_table([path], {id_column: str, label_column: float}, {"split": str})
    key, label = table[id_column], table[label_column]
    table.refuse(id_column, key.codes < 0, "; name the stay or remove the line")
    table.refuse(label_column, ~(np.isnan(label) | (label == 0) | (label == 1)), ", not 0 or 1; mend the line")
    ids = _plain_ids(key.categories)[key.codes]
    table.refuse(id_column, ids.duplicated(), ", which occurs twice; remove one line")
    return pd.DataFrame({"label": np.nan_to_num(label, nan=-1).astype(int), "split": _read_split(table) if "split" in table else -1}, index=ids)


def _join_labels(outcome: pd.DataFrame, ids: list[str], notes: dict) -> tuple[np.ndarray, np.ndarray]:
    """label and split [P] of the stays `ids`; what does not meet is counted in `notes`."""
    ids = _plain_ids(ids)
    label, split = outcome.reindex(ids, fill_value=-1).to_numpy().T
    notes["stays without an outcome (unlabelled)"] = int((label < 0).sum())
    notes["outcomes of no stay"] = int((~outcome.index.isin(ids)).sum())
    if (split >= 0).any():
        notes["stays without a split (neither trained on nor scored)"] = int((split < 0).sum())
    return label, split


def _usable_rows(table: Table) -> tuple[np.ndarray, dict]:
    """Mask of the rows with a variable and a finite value, and notes that count the others; InputError where a minute is no time."""
    minute, nameless = table["minute"], table["variable"].codes < 0
    table.refuse("minute", ~((minute >= 0) & (minute < 1e8)), "; give minutes since admission, 0 or more and below 1e8 (190 years)")
    with np.errstate(over="ignore"):
        unusable = ~np.isfinite(table["value"].astype(np.float32))
    return ~(nameless | unusable), {"rows with an empty variable": int(nameless.sum()),
                                    "rows without a finite value": int((unusable & ~nameless).sum())}


# ----------------------------------------------------------------------------------------------------------------------------------
# Reader: PhysioNet / CinC Challenge 2012
# ----------------------------------------------------------------------------------------------------------------------------------

_DESCRIPTORS = ("Age", "Gender", "Height", "ICUType", "Weight")  # -1 means "not recorded"
_RECORD_BYTES, _ARCHIVE_BYTES = 2**26, 2**31  # a record has a few thousand, a set of 4,000 some 30 million
_CLOCK = re.compile(r"\d{1,6}:[0-5]\d")


def _physionet2012_files(folder: Path) -> dict[str, Path]:
    """set letter -> its records: the unpacked folder where it exists, else the archive as downloaded."""
    found = {}
    for letter in "abc":
        for path in (folder / f"set-{letter}", folder / f"set-{letter}.tar.gz"):
            if path.exists():
                found.setdefault(letter, path)
    return found


def _physionet2012_sources(folder: Path) -> list[Path]:
    sources = []
    for letter, path in _physionet2012_files(folder).items():
        outcomes = folder / f"Outcomes-{letter}.txt"
        if not outcomes.is_file():
            raise InputError(f"{outcomes}: no such file; put the outcomes of set {letter} beside {path.name}")
        sources += [outcomes, *(sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    return sources


class _Unpacked(gzip.GzipFile):
    """A gzip file that gives no more at once than a record may hold: a tar header, too, can claim gigabytes."""

    def read(self, size=-1):
        if size > _RECORD_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def _records(path: Path):
    """Yield (record name, bytes) of a folder or archive, in order of name. Nothing is unpacked to disk."""
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise InputError(f"{path}: holds no <RecordID>.txt; unpack set-*.tar.gz there again")
        yield from ((file.stem, file.read_bytes()) for file in files)
        return
    try:
        with _Unpacked(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:
            records = []
            for member in archive:
                inside = Path(member.name)
                if not (member.isfile() or member.isdir()) or inside.is_absolute() or ".." in inside.parts:
                    raise InputError(f"{path}: member {member.name} is a link, a device or leaves the folder; download the archive again")
                if member.size > _RECORD_BYTES or member.offset > _ARCHIVE_BYTES:
                    raise InputError(f"{path}: member {member.name} of {member.size:,} bytes, {member.offset:,} bytes into the archive, is too large "
                                     "for a record; download the archive again, or pack records alone")
                if member.isfile() and inside.suffix == ".txt":
                    records.append((inside.stem, archive.extractfile(member).read()))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: damaged archive ({error}); download it again") from None
    if not records:
        raise InputError(f"{path}: holds no <RecordID>.txt; download the archive again")
    yield from sorted(records)


def _blame_record(path: Path, records: list[tuple[str, bytes]]):
    """Find the first malformed line after the fast parser gave up, and raise the InputError that names it."""
    for name, body in records:
        for number, line in enumerate(body.decode("utf-8", "replace").splitlines(), start=2):
            cells = line.split(",")
            if len(cells) != 3:
                problem = f"{len(cells)} columns where Time,Parameter,Value are 3"
            elif not _CLOCK.fullmatch(cells[0]):
                problem = f"time {cells[0]!r} is not HH:MM"
            elif not re.fullmatch(r"\s*([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?inf|nan)?\s*", cells[2], re.IGNORECASE):
                problem = f"value {cells[2]!r} of {cells[1]} is not a number"
            else:
                continue
            raise InputError(f"{path}/{name}.txt line {number}: {problem}; mend or remove the line")
    raise InputError(f"{path}: the records cannot be parsed as Time,Parameter,Value; download the set again")


def _parse_records(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """All records of one set as one table (record, Time, Parameter, Value), parsed in one call; and the records' names."""
    records, rows, commas = [], [], 0
    for name, raw in _records(path):
        header, _, body = raw.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
        if header.strip() != b"Time,Parameter,Value":
            raise InputError(f"{path}/{name}.txt line 1: not a PhysioNet 2012 record (no header Time,Parameter,Value); remove the file")
        body = body if not body or body.endswith(b"\n") else body + b"\n"
        records.append((name, body))
        rows.append(body.count(b"\n"))
        commas += body.count(b",")
    if commas != 2 * sum(rows):  # pandas would fill or drop cells of a ragged line
        _blame_record(path, records)
    try:
        table = pd.read_csv(io.BytesIO(b"".join(body for _, body in records)), header=None, names=["Time", "Parameter", "Value"],
                            dtype={"Time": "category", "Parameter": "category", "Value": np.float64}, quoting=csv.QUOTE_NONE,
                            skip_blank_lines=False, index_col=False, na_values=[""], keep_default_na=False)
    except (ValueError, pd.errors.ParserError):
        _blame_record(path, records)
    if len(table) != sum(rows) or table["Time"].isna().any() or not all(_CLOCK.fullmatch(str(time)) for time in table["Time"].cat.categories):
        _blame_record(path, records)
    table["record"] = np.repeat(np.arange(len(records)), rows)
    return table, [name for name, _ in records]


def read_physionet2012(folder: Path) -> Cohort:
    """Sets a, b, c of the Challenge 2012 (Silva et al. 2012), whichever lie in `folder`. Label: in-hospital death.

    The outcome files' scores and lengths of stay never become inputs. ICUType is categorical: one event per type, of value 1.
    """
    tables, names, labels, stays = [], [], [], 0
    for letter, path in _physionet2012_files(folder).items():
        table, records = _parse_records(path)
        table["record"] += stays
        stays += len(records)
        tables.append(table)
        names += records
        labels.append(_read_labels(folder / f"Outcomes-{letter}.txt", "RecordID", "In-hospital_death"))
    time, parameter = (pd.api.types.union_categoricals([t[c] for t in tables]) for c in ("Time", "Parameter"))
    record = np.concatenate([t["record"].to_numpy() for t in tables])
    value = np.concatenate([t["Value"].to_numpy() for t in tables])
    minutes = np.array([int(t[:-3]) * 60 + int(t[-2:]) for t in time.categories], dtype=np.float32)
    code, kinds = parameter.codes.astype(np.int64), [str(k) for k in parameter.categories]

    def is_kind(*wanted):  # [E] bool
        return np.isin(code, [kinds.index(k) for k in wanted if k in kinds])

    identity = is_kind("RecordID")
    wrong = np.flatnonzero(identity & (value != pd.to_numeric(pd.Series(names), errors="coerce").to_numpy()[record]))
    if len(wrong):
        raise InputError(f"{folder}: record {names[record[wrong[0]]]}.txt names itself RecordID {value[wrong[0]]:g}; rename or remove the file")
    empty, unrecorded, unusable = code < 0, is_kind(*_DESCRIPTORS) & (value == -1), ~np.isfinite(value)
    notes = {"rows with an empty parameter": int(empty.sum()), "descriptors not recorded (-1)": int(unrecorded.sum()),
             "rows without a finite value": int((unusable & ~empty).sum())}
    keep = ~(identity | empty | unrecorded | unusable)
    icu = is_kind("ICUType") & keep
    for kind in np.unique(value[icu]):
        code[icu & (value == kind)] = len(kinds)
        kinds.append(f"ICUType={kind:g}")
    value[icu] = 1

    label, _ = _join_labels(pd.concat(labels), names, notes)
    return build_cohort("PhysioNet 2012 set " + "+".join(_physionet2012_files(folder)), kinds, record[keep], minutes[time.codes[keep]],
                        code[keep], value[keep], stay_id=names, label=label, notes=notes)


# ----------------------------------------------------------------------------------------------------------------------------------
# Reader: the original implementation's layout
# ----------------------------------------------------------------------------------------------------------------------------------

def _original_files(folder: Path) -> list[Path]:
    """The stays' files: patient_ehr/{train,valid,test}/*.parquet or *.csv of `folder`, which may be patient_ehr itself."""
    home = folder if folder.name == "patient_ehr" else folder / "patient_ehr"
    return [path for split in SPLITS for path in sorted((home / split).glob("[!.]*")) if path.suffix in (".parquet", ".csv")]


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
    """Admits containers, strings, numbers and NumPy scalars, the last by stand-ins: nothing that the file names is imported or called."""

    _STAND_INS = {("numpy", "dtype"): _NumberType, ("numpy._core.multiarray", "scalar"): _NumberType.scalar,
                  ("numpy.core.multiarray", "scalar"): _NumberType.scalar, ("_codecs", "encode"): lambda text, _: text.encode("latin1")}

    def find_class(self, module, name):
        try:
            return self._STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _read_statistics(path: Path) -> pd.DataFrame:
    """mean and std by variable, from a CSV (variable,mean,std) or a pickle {variable: {"mean": .., "std": ..}}. Left out: those of a
    variable whose mean is not finite or whose std is zero or not finite, so that they are fitted. InputError for a negative std."""
    if path.suffix == ".pkl":
        try:
            with open(path, "rb") as file:
                content = _PlainUnpickler(file).load()
            known = {str(name): (float(entry["mean"]), float(entry["std"])) for name, entry in content.items()}
        except Exception as error:  # a damaged or hostile pickle raises anything
            raise InputError(f"{path}: not a plain pickle of {{variable: {{'mean': number, 'std': number}}}} ({type(error).__name__}: {error}); "
                             "write it so, or as CSV with variable,mean,std") from None
        given = pd.DataFrame.from_dict(known, orient="index", columns=["mean", "std"])
        if (given["std"] < 0).any():
            raise InputError(f"{path}: std of {given.index[given['std'] < 0][0]} is negative; mend it")
    elif path.suffix == ".csv":
        table = _read_table([path], {"variable": str, "mean": float, "std": float})
        names = pd.Index(table["variable"])
        table.refuse("variable", names.isna() | names.duplicated(), ", where each line names another one; mend or remove the line")
        table.refuse("std", table["std"] < 0, ", below 0; mend the line")
        given = pd.DataFrame({"mean": table["mean"], "std": table["std"]}, index=names.astype(object))
    else:
        raise InputError(f"{path}: statistics of this kind are not read; give .csv with variable,mean,std or .pkl")
    given = given.astype(np.float32)
    return given[np.isfinite(given).all(axis=1) & (given["std"] > 0)]


def _read_vectors(path: Path) -> pd.DataFrame:
    """One vector a variable: `Key`, then a column each dimension. A column without a name (a row number that pandas wrote) is none."""
    table = _read_table([path], {"Key": str}, rest=float)
    names = pd.Index(table["Key"])
    table.refuse("Key", names.isna() | names.duplicated(), ", where each line names another variable; mend or remove the line")
    columns = {name: column for name, column in table.columns.items() if name != "Key"}
    if not columns:
        raise InputError(f"{path}: no column beside Key; add one for each dimension")
    for name, column in columns.items():
        table.refuse(name, ~np.isfinite(column), ", not finite; mend the line")
    return pd.DataFrame(columns, index=names.astype(object), dtype=np.float32)


def read_original(folder: Path, params_map: Path | None = None, label_file: Path | None = None) -> Cohort:
    """patient_ehr/{train,valid,test}/<id>.parquet or .csv: variable, value, minute and perhaps set_index, which then tells the sets apart.

    The folder is the stay's split. params_map: see `_read_statistics`; label_file: CSV ts_id,in_hospital_mortality; cached.csv beside
    patient_ehr: see `_read_vectors`. A set that spans several minutes is charted at its first.
    """
    files = _original_files(folder)
    table = _read_table(files, {"variable": str, "value": float, "minute": float}, {"set_index": float})
    keep, notes = _usable_rows(table)
    stay, minute, set_key = table.file[keep], table["minute"][keep], None
    if "set_index" in table:
        table.refuse("set_index", ~np.isfinite(table["set_index"]), "; number the set, or leave the column out of all files")
        set_key = table["set_index"][keep]
        minute = pd.Series(minute).groupby([stay, set_key]).transform("min").to_numpy()
    ids = [path.stem for path in files]
    label = -np.ones(len(ids))
    if label_file:
        label, _ = _join_labels(_read_labels(label_file, "ts_id", "in_hospital_mortality"), ids, notes)
    cached = files[0].parents[2] / "cached.csv"
    given = {"statistics": _read_statistics(params_map) if params_map else None, "vectors": _read_vectors(cached) if cached.is_file() else None}
    cohort = build_cohort("original layout (patient_ehr)", table["variable"].categories, stay, minute, table["variable"].codes[keep],
                          table["value"][keep], ids, label, [SPLITS.index(path.parent.name) for path in files], notes, set_key, **given)
    for name, rows in given.items():
        if rows is not None:
            known = np.isin(cohort.variables, rows.index)
            cohort.notes |= {f"variables without given {name} ({'fitted' if name == 'statistics' else 'hashed from the name'})": int((~known).sum()),
                             f"given {name} of no variable": len(rows) - int(known.sum())}
    return cohort


# ----------------------------------------------------------------------------------------------------------------------------------
# Reader: one long table
# ----------------------------------------------------------------------------------------------------------------------------------

def _one_table(folder: Path, name: str) -> list[Path]:
    """The file `name`.csv or `name`.parquet of the folder, as a list of one or none; InputError where both lie there."""
    found = [path for suffix in (".csv", ".parquet") if (path := folder / (name + suffix)).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: holds both {found[0].name} and {found[1].name}; keep one of them")
    return found


def _long_table_sources(folder: Path) -> list[Path]:
    return _one_table(folder, "events") + _one_table(folder, "labels")


def read_long_table(folder: Path) -> Cohort:
    """events.csv or events.parquet (stay_id, minute, variable, value); labels.csv or .parquet (stay_id, label of 0 or 1, and perhaps split
    of train, valid or test), without which no stay has a label. Minutes count from admission."""
    events, *labels = _long_table_sources(folder)
    table = _read_table([events], {"stay_id": str, "minute": float, "variable": str, "value": float})
    stay, variable = table["stay_id"], table["variable"]
    table.refuse("stay_id", stay.codes < 0, "; name the stay or remove the line")
    keep, notes = _usable_rows(table)
    label, split = -np.ones(len(stay.categories)), None
    if labels:
        label, split = _join_labels(_read_labels(labels[0], "stay_id", "label"), stay.categories, notes)
    return build_cohort(f"long table {events.name}", variable.categories, stay.codes[keep], table["minute"][keep], variable.codes[keep],
                        table["value"][keep], stay.categories, label, split, notes)


# ----------------------------------------------------------------------------------------------------------------------------------
# Reader: MEDS (Medical Event Data Standard)
# ----------------------------------------------------------------------------------------------------------------------------------

_MINUTE = 60_000_000  # microseconds


def _meds_files(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Events, subjects' splits (one file or none), labels (any number)."""
    data, labels = (sorted((folder / name).rglob("[!.]*.parquet")) for name in ("data", "labels"))
    return data, sorted(folder.glob("metadata/subject_splits.parquet")), labels


def read_meds(folder: Path) -> Cohort:
    """data/**/*.parquet (subject_id, time or null = static, code, and perhaps numeric_value); metadata/subject_splits.parquet (subject_id,
    split of train, tuning or held_out); labels/**/*.parquet (subject_id, prediction_time, boolean_value).

    A sample is (subject, prediction_time): the subject's events up to and including that time, in minutes since its first timed event;
    static events lie at minute 0. Without labels, every subject is one sample. A code without a number is an event of value 1. MEDS_DEATH
    never enters. Raises InputError where subjects have several samples and no split, as one subject would be trained and tested on.
    """
    data_files, split_files, label_files = _meds_files(folder)
    table = _read_table(data_files, {"subject_id": str, "time": np.datetime64, "code": str}, {"numeric_value": float})
    table.refuse("subject_id", table["subject_id"].codes < 0, "; name the subject or remove the row")
    subjects, codes = table["subject_id"].categories, table["code"].categories
    value = table["numeric_value"] if "numeric_value" in table else np.full(len(table["time"]), np.nan)
    value = np.where(np.isnan(value), 1, value).astype(np.float32)
    nameless, infinite = table["code"].codes < 0, ~np.isfinite(value)
    death = np.append(np.array(codes.str.startswith("MEDS_DEATH"), dtype=bool), False)[table["code"].codes]
    notes = {"events without a code": int(nameless.sum()), "MEDS_DEATH events": int(death.sum()), "events of infinite value": int(infinite.sum())}

    rows = np.flatnonzero(~(nameless | infinite | death))
    time = table["time"].view(np.int64)  # null is the smallest: static events come first
    rows = rows[np.lexsort((time[rows], table["subject_id"].codes[rows]))]
    subject, time, value, code = table["subject_id"].codes[rows].astype(np.int64), time[rows], value[rows], table["code"].codes[rows]
    static = np.isnat(table["time"][rows])
    first = np.searchsorted(subject, np.arange(len(subjects) + 1))
    timed = first[:-1] + np.bincount(subject[static], minlength=len(subjects))  # a subject's first timed event
    origin = np.append(time, 0)[timed]
    minute = np.where(static, 0, time // _MINUTE - origin[subject] // _MINUTE)

    person, end, label, ids = np.arange(len(subjects)), first[1:], -np.ones(len(subjects)), subjects.to_numpy(str)
    if label_files:
        asked = _read_table(label_files, {"subject_id": str, "prediction_time": np.datetime64, "boolean_value": float})
        at, names = asked["prediction_time"], asked["subject_id"]
        asked.refuse("subject_id", names.codes < 0, "; name the subject or remove the row")
        asked.refuse("prediction_time", np.isnat(at), "; give the time up to which events may be used")
        twice = pd.DataFrame({"subject": names.codes, "at": at}).duplicated().to_numpy()
        asked.refuse("prediction_time", twice, ", twice for one subject; keep the labels of one task in labels/")
        known = (person := subjects.get_indexer(names.categories)[names.codes]) >= 0
        notes["labels of no subject"] = int((~known).sum())
        person, at, label = person[known], at[known], np.nan_to_num(asked["boolean_value"][known], nan=-1)
        # Events of rank < r are those up to the prediction time: one sorted search over (subject, rank of the time).
        times, rank = np.unique(time, return_inverse=True)
        end = np.searchsorted(subject * (len(times) + 1) + rank,
                              person * (len(times) + 1) + np.searchsorted(times, at.view(np.int64), side="right"))
        ids = np.char.add(np.char.add(ids[person], "@"), np.datetime_as_string(at, unit="auto"))
    split = None
    if split_files:
        listed = _read_table(split_files, {"subject_id": str, "split": str})
        names = pd.Index(listed["subject_id"])
        listed.refuse("subject_id", names.isna() | names.duplicated(), ", where each row names another subject; keep one row")
        split = pd.Series(_read_split(listed, ("train", "tuning", "held_out")), index=names.astype(object))
        split = split.reindex(subjects, fill_value=-1).to_numpy()[person]
        notes["samples without a split (neither trained on nor scored)"] = int((split < 0).sum())
    elif len(np.unique(person)) < len(person):
        raise InputError(f"{folder}: subjects with several samples and no metadata/subject_splits.parquet; add it, as one subject must not be "
                         "both trained and tested on")
    length = end - first[person]
    events = ranges(first[person], length)
    return build_cohort("MEDS", codes, np.repeat(np.arange(len(person)), length), minute[events], code[events], value[events], ids, label,
                        split, notes)


# ----------------------------------------------------------------------------------------------------------------------------------
# Reader: PhysioNet / CinC Challenge 2019
# ----------------------------------------------------------------------------------------------------------------------------------

_HOURLY_DESCRIPTORS = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime", "ICULOS")  # repeated in every row of a record


def _physionet2019_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("training_set[AB]/[!.]*.psv"))


def read_physionet2019(folder: Path) -> Cohort:
    """training_setA/*.psv and training_setB (Reyna et al. 2019): a stay a file, a row an hour (minute 60 * row), NaN = not measured.

    Label: whether SepsisLabel ever turns 1; the column is never an input. A descriptor, repeated every hour, enters once, where it is
    first recorded (ICULOS then says how long the stay had lasted when the record begins; later hours are the minutes themselves).
    """
    files = _physionet2019_files(folder)
    table = _read_table(files, {"SepsisLabel": float}, rest=float, separator="|")
    sepsis = table["SepsisLabel"]
    table.refuse("SepsisLabel", (sepsis != 0) & (sepsis != 1), ", not 0 or 1; mend the line")
    names = [name for name in table.columns if name != "SepsisLabel"]
    cells = np.stack([table[name] for name in names], axis=1)  # [hours, variables]
    row, variable = np.nonzero(~np.isnan(cells))
    stay, value = table.file[row], cells[row, variable]
    repeated = np.isin(variable, [i for i, name in enumerate(names) if name in _HOURLY_DESCRIPTORS])
    repeated &= pd.Series(stay * len(names) + variable).duplicated().to_numpy()
    infinite = np.isinf(value)
    keep = ~(repeated | infinite)
    minute = 60 * ranges(np.zeros(len(files), dtype=np.int64), table.rows)[row]
    return build_cohort("PhysioNet 2019", names, stay[keep], minute[keep], variable[keep], value[keep], [path.stem for path in files],
                        np.bincount(table.file, weights=sepsis, minlength=len(files)) > 0,
                        notes={"repeated descriptors": int(repeated.sum()), "infinite values": int((infinite & ~repeated).sum())})


# ----------------------------------------------------------------------------------------------------------------------------------
# Choosing a reader, and the cache
# ----------------------------------------------------------------------------------------------------------------------------------

class Reader(NamedTuple):
    name: str                                   # what it reads
    matches: Callable[[Path], bool]             # does it lie in this folder?
    sources: Callable[[Path], list[Path]]       # the files that it depends on
    read: Callable[..., Cohort]                 # (folder, **options)
    options: tuple[str, ...] = ()               # the files that it takes beside the folder


READERS = [  # the first that matches is taken
    Reader("PhysioNet 2012 (set-a.tar.gz or set-a/ with Outcomes-a.txt)", lambda folder: bool(_physionet2012_files(folder)),
           _physionet2012_sources, read_physionet2012),
    Reader("the original layout (patient_ehr/{train,valid,test}/<id>.parquet or .csv)", lambda folder: bool(_original_files(folder)),
           _original_sources, read_original, ("params_map", "label_file")),
    Reader("a long table (events.csv or events.parquet, and labels.csv)", lambda folder: bool(_one_table(folder, "events")),
           _long_table_sources, read_long_table),
    Reader("PhysioNet 2019 (training_setA/*.psv, training_setB)", lambda folder: bool(_physionet2019_files(folder)),
           _physionet2019_files, read_physionet2019),
    Reader("MEDS (data/**/*.parquet)", lambda folder: bool(_meds_files(folder)[0]), lambda folder: sum(_meds_files(folder), []), read_meds),
]


def load_cohort(data_dir: str | None = None, synthetic_stays: int = 1000, cache_dir: Path = CACHE_DIR, params_map: str | None = None,
                label_file: str | None = None) -> Cohort:
    """The cohort at `data_dir` (None: the embedded one), parsed once and then memory-mapped from the cache.

    params_map, label_file: statistics and labels of the original layout. Raises InputError where the folder is missing, fits no reader,
    or holds a malformed file, and where a file is given that the reader does not take.
    """
    options = {name: Path(path) for name, path in (("params_map", params_map), ("label_file", label_file)) if path}
    folder = data_dir and Path(data_dir)
    if folder is None:
        reader = Reader(f"the embedded cohort of {synthetic_stays} stays", None, lambda _: [], None)
    elif not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data_dir takes the folder that holds the data")
    else:
        reader = next((r for r in READERS if r.matches(folder)), None)
        if reader is None:
            raise InputError(f"{folder}: no data that a reader knows; expected one of: " + "; ".join(r.name for r in READERS))
    for name, path in options.items():
        if name not in reader.options:
            raise InputError(f"--{name} {path}: not read with {reader.name}; leave the option out")
        if not path.is_file():
            raise InputError(f"--{name} {path}: no such file; correct the path")
    key = {"reader": reader.name, "options": list(options), "version": READER_VERSION, "sources":
           [[str(p.resolve()), (s := p.stat()).st_size, s.st_mtime_ns] for p in [*reader.sources(folder), *options.values()]]}
    cached = Path(cache_dir) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    cohort = _open_cache(cached)
    if cohort is None:
        with clear_write_error(cached):
            cached.parent.mkdir(parents=True, exist_ok=True)
        if folder is None and (size := synthetic_stays * _SYNTHETIC_BYTES) > (free := shutil.disk_usage(cached.parent).free):
            raise InputError(f"--synthetic_stays {synthetic_stays}: takes {size // 10**6:,} MB in {cached.parent}, where {free // 10**6:,} MB are "
                             "free; give fewer")
        _write_cache(cached, [reader.read(folder, **options)] if folder else synthetic_parts(synthetic_stays))
        cohort = _open_cache(cached)
    return cohort


def _open_cache(folder: Path) -> Cohort | None:
    """The cached cohort, memory-mapped; None where there is none or it is torn (a file missing or of another length)."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in Cohort.ARRAYS}
        if any(list(arrays[name].shape) != shape for name, shape in meta.pop("shapes").items()):
            return None
        return Cohort(**meta, **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(folder: Path, parts: Iterable[Cohort]) -> None:
    """Append part after part to files in a temporary folder beside the target, sync, rename: one part at a time is held in memory, and a
    reader never sees a half-written cache."""
    with clear_write_error(folder):
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
        try:
            headers, notes = {}, Counter()
            with ExitStack() as stack:
                files = {name: stack.enter_context(open(temporary / f"{name}.npy", "wb")) for name in Cohort.ARRAYS}
                for part, rows in pieces(parts):
                    notes.update(part.notes)
                    for name, array in rows.items():
                        array = np.ascontiguousarray(array)
                        if name not in headers:
                            headers[name] = np.lib.format.header_data_from_array_1_0(array)
                            np.lib.format.write_array_header_1_0(files[name], headers[name])
                        else:
                            headers[name]["shape"] = (headers[name]["shape"][0] + len(array),)
                        array.tofile(files[name])
                for name, header in headers.items():  # NumPy leaves room in a header for the rows to grow
                    files[name].seek(0)
                    np.lib.format.write_array_header_1_0(files[name], header)
            cohort = replace(part, notes=dict(notes), **{name: np.load(temporary / f"{name}.npy", mmap_mode="r") for name in Cohort.ARRAYS})
            cohort.fingerprint = cohort.digest()
            meta = {f.name: getattr(cohort, f.name) for f in fields(Cohort) if f.name not in Cohort.ARRAYS}
            meta["shapes"] = {name: list(header["shape"]) for name, header in headers.items()}
            (temporary / "meta.json").write_text(json.dumps(meta))
            for path in temporary.iterdir():
                sync(path)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------------------
# Splits, normalisation, the vocabulary's vectors
# ----------------------------------------------------------------------------------------------------------------------------------

def make_splits(cohort: Cohort, seed: int) -> dict[str, list[str]]:
    """Stay ids of train, valid and test: the data set's own split where it has one, else 64/16/20 stratified by label, seeded.

    Raises InputError where a label is too rare to be stratified.
    """
    if (cohort.split >= 0).any():
        return {name: cohort.stay_id[cohort.split == code].tolist() for code, name in enumerate(SPLITS)}
    everyone = np.arange(len(cohort))
    try:
        rest, test = train_test_split(everyone, test_size=.2, stratify=cohort.label, random_state=seed)
        train, valid = train_test_split(rest, test_size=.2, stratify=cohort.label[rest], random_state=seed)
    except ValueError as error:
        raise InputError(f"{cohort.reader}: {len(cohort)} stays cannot be split into train, valid and test ({error}); "
                         "give more stays or a split of your own") from None
    return {name: cohort.stay_id[np.sort(part)].tolist() for name, part in zip(SPLITS, (train, valid, test))}


def stays_of(cohort: Cohort, ids: list[str]) -> np.ndarray:
    """Indices [n] of the stays with these ids, in the cohort's order."""
    return np.flatnonzero(np.isin(cohort.stay_id, ids))


def stay_event_index(cohort: Cohort, stays: np.ndarray) -> np.ndarray:
    """Indices [n] of all events of these stays, stay after stay."""
    return ranges(cohort.set_start[cohort.stay_start[stays]], cohort.stay_events[stays])


def ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Concatenation of arange(start_i, start_i + length_i)."""
    ends = np.cumsum(length)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - (ends - length), length)


@dataclass
class Normalizer:
    """z = clip((f(value) - mean) / std, -clip, clip), a variable each; f(x) = log(1 + x / log_scale) where log_scale is positive, else x.

    Fitted on training stays only; travels in the checkpoint.
    """

    variables: list[str]
    mean: np.ndarray       # [V] float32, of f(value)
    std: np.ndarray        # [V] float32, positive
    log_scale: np.ndarray  # [V] float32, raw units; 0: no logarithm
    clip: float = 5.0      # standard deviations

    @classmethod
    def fit(cls, cohort: Cohort, stays: np.ndarray, tail: float = .005, skewed: float = 1.5) -> "Normalizer":
        """Mean and standard deviation of each variable's values between its `tail` and 1 - `tail` quantiles (winsorised: one
        mistyped pH of 735 must not set the scale). A non-negative variable with a skewness above `skewed` (most enzymes, bilirubin,
        lactate) is taken on a log scale, relative to its median. A constant variable (an indicator) keeps its value: mean 0, std 1.
        Where the cohort was given a variable's statistics, they are taken instead."""
        sorted_values = []  # (the values of some stays by variable, where each variable begins): 4 bytes an event are held, not 30
        for part in np.array_split(stays, 1 + len(stays) // 1000):
            events = stay_event_index(cohort, part)
            variable = cohort.event_variable[events]
            order = np.argsort(variable, kind="stable")
            sorted_values.append((cohort.event_value[events][order], np.searchsorted(variable[order], np.arange(len(cohort.variables) + 1))))
        mean, std, log_scale = np.zeros((3, len(cohort.variables)), dtype=np.float32)
        std[:] = 1
        for v in range(len(cohort.variables)):
            x = np.concatenate([value[bounds[v]:bounds[v + 1]] for value, bounds in sorted_values]).astype(np.float64)
            if not len(x):
                continue
            x = x.clip(*np.quantile(x, (tail, 1 - tail)))
            if x.std() <= 1e-6 * max(1, abs(x.mean())):
                continue
            if x.min() >= 0 and ((x - x.mean()) ** 3).mean() > skewed * x.std() ** 3:
                log_scale[v] = np.median(x[x > 0])
                x = np.log1p(x / log_scale[v])
            mean[v], std[v] = x.mean(), x.std()
        given = ~np.isnan(cohort.statistics[:, 0])
        (mean[given], std[given]), log_scale[given] = cohort.statistics[given].T, 0
        return cls(cohort.variables, mean, std, log_scale)

    def __call__(self, variable: np.ndarray, value: np.ndarray) -> np.ndarray:
        scale = self.log_scale[variable]
        value = np.where(scale > 0, np.log1p(np.maximum(value, 0) / np.where(scale > 0, scale, 1)), value)
        return ((value - self.mean[variable]) / self.std[variable]).clip(-self.clip, self.clip).astype(np.float32)

    def state_dict(self) -> dict:
        """Plain types and tensors, for the checkpoint."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ("mean", "std", "log_scale")}
        return {"variables": list(self.variables), "clip": self.clip, **arrays}

    @classmethod
    def from_state(cls, state: dict, path) -> "Normalizer":
        """From the checkpoint at `path`. Raises InputError where the state is not that of a normalizer."""
        arrays = [state[name] for name in ("mean", "std", "log_scale")]
        if not isinstance(state["variables"], list) or not isinstance(state["clip"], float) or not all(
                torch.is_tensor(x) and x.shape == (len(state["variables"]),) and x.is_floating_point() for x in arrays):
            raise InputError(f"{path}: its normalizer is damaged or forged; make the checkpoint again")
        return cls(state["variables"], *(x.numpy() for x in arrays), state["clip"])


def variable_vectors(variables: list[str], dim: int, given: np.ndarray | None = None) -> torch.Tensor:
    """[V, dim] one unit vector a variable, seeded by a hash of its *name*: the same variable has the same vector in every data set.

    given: [V, D] vectors to take instead, where not NaN (`Cohort.vectors`; D = 0: none). Raises InputError where D is neither 0 nor `dim`.
    """
    rows = [np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")).standard_normal(dim)
            for name in variables]
    table = np.stack(rows)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    if given is not None and given.shape[1]:
        if given.shape[1] != dim:
            raise InputError(f"cached.csv: vectors of {given.shape[1]} dimensions where the model takes {dim}; give those that it was trained with")
        table = np.where(np.isnan(given), table, given)
    return torch.from_numpy(table).float()


# ----------------------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------------------

@dataclass
class EventBatch:
    """B stays and their E events as tensors. Sets are laid out twice: grouped by size for the set encoder, by stay for the Transformer.

    Groups: sets of similar size form a group of S_k sets, padded to its widest, N_k; `token_event` lists the groups' M cells, group after
    group, set after set, as indices of events, E (one past the end) where a cell is padding. Stays: a grid [B, L]; `slot_set` is the place
    of each slot's set in the concatenated groups, S (one past the end) after a stay's last set.

    S, M and L are rounded up (see `round_up`), by sets of padding in groups of their own, so that few distinct shapes occur: matrix
    kernels that are compiled for each shape (oneDNN, torch.compile) would else be compiled at every step.
    """

    event_variable: torch.Tensor   # [E] int64
    event_value: torch.Tensor      # [E] float32, normalised
    event_slot: torch.Tensor       # [E] int64, stay * L + position of the event's set
    groups: list[tuple[int, int]]  # (S_k, N_k)
    token_event: torch.Tensor      # [M] int64, M = sum of S_k * N_k
    group_slot: torch.Tensor       # [S] int64, the slot of each set of the groups (0 for padding)
    slot_set: torch.Tensor         # [B, L] int64
    minute: torch.Tensor           # [B, L] float32, of each set (0 in padding)
    lengths: torch.Tensor          # [B] int64, number of sets
    label: torch.Tensor            # [B] int64, -1: none
    stay: torch.Tensor             # [B] int64, index in the cohort

    def __len__(self) -> int:
        return len(self.label)

    def _map(self, function) -> "EventBatch":
        return EventBatch(**{f.name: function(x) if torch.is_tensor(x := getattr(self, f.name)) else x for f in fields(self)})

    def to(self, device, non_blocking: bool = False) -> "EventBatch":
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "EventBatch":
        return self._map(torch.Tensor.pin_memory)


class StayDataset(torch.utils.data.Dataset):
    """Turns an array of stay indices into an `EventBatch`: the data set behind a DataLoader whose sampler yields whole batches.

    Events of variables outside the normalizer's vocabulary are dropped here; `unknown_variables` names them.
    """

    def __init__(self, cohort: Cohort, normalizer: Normalizer, max_groups: int = 8):
        self.cohort, self.normalizer = cohort, normalizer
        lookup = {name: i for i, name in enumerate(normalizer.variables)}
        self.variable = np.array([lookup.get(name, -1) for name in cohort.variables])  # [V of the data] -> the model's vocabulary
        self.unknown_variables = [name for name in cohort.variables if name not in lookup]
        self.widths = group_widths(np.diff(cohort.set_start), max_groups)

    def describe_unknown(self) -> str:
        """The line that tells what was dropped, see `Cohort.describe`."""
        return f"data: dropped: events of {len(self.unknown_variables)} variables unknown to the checkpoint: {', '.join(self.unknown_variables)}"

    def __getitem__(self, stays: np.ndarray) -> EventBatch:
        cohort = self.cohort
        sets_per_stay = cohort.stay_start[stays + 1] - cohort.stay_start[stays]
        set_index = ranges(cohort.stay_start[stays], sets_per_stay)
        size = cohort.set_start[set_index + 1] - cohort.set_start[set_index]
        events = ranges(cohort.set_start[set_index], size)
        variable, value = self.variable[cohort.event_variable[events]], cohort.event_value[events]
        event_set = np.repeat(np.arange(len(set_index)), size)
        if self.unknown_variables:
            known = variable >= 0
            variable, value, event_set = variable[known], value[known], event_set[known]
            size = np.bincount(event_set, minlength=len(set_index))
        first, sets = np.cumsum(size) - size, len(size)
        length = round_up(sets_per_stay.max())
        slot = ranges(np.arange(len(stays)) * length, sets_per_stay)                       # [sets]

        width_class = np.searchsorted(self.widths, size)
        group_set = np.argsort(width_class, kind="stable")
        groups, token_event = [], []
        for members in np.split(group_set, np.flatnonzero(np.diff(width_class[group_set])) + 1):
            column = np.arange(max(1, size[members].max()))  # a set left empty by unknown variables is one cell of padding
            groups.append((len(members), len(column)))
            token_event.append(np.where(column < size[members, None], first[members, None] + column, len(variable)).ravel())
        padding_sets, cells = round_up(sets + 1) - sets, sum(s * n for s, n in groups)
        padding_cells = round_up(cells + padding_sets) - cells
        groups += [(s, n) for s, n in ((padding_sets - 1, 1), (1, padding_cells - padding_sets + 1)) if s]
        token_event.append(np.full(padding_cells, len(variable)))

        slot_set = np.full(len(stays) * length, sets + padding_sets)
        slot_set[slot[group_set]] = np.arange(sets)
        minute = np.zeros(len(stays) * length, dtype=np.float32)
        minute[slot] = cohort.set_minute[set_index]
        arrays = dict(
            event_variable=variable.astype(np.int64),
            event_value=self.normalizer(variable, value),
            event_slot=slot[event_set],
            token_event=np.concatenate(token_event),
            group_slot=np.append(slot[group_set], np.zeros(padding_sets, dtype=np.int64)),
            slot_set=slot_set.reshape(-1, length),
            minute=minute.reshape(-1, length),
            lengths=sets_per_stay.astype(np.int64),
            label=cohort.label[stays].astype(np.int64),
            stay=np.array(stays, dtype=np.int64),
        )
        return EventBatch(groups=groups, **{name: torch.from_numpy(array) for name, array in arrays.items()})


def round_up(n: int) -> int:
    """The next size with at most four leading significant bits: at most 12.5% larger, eight sizes an octave."""
    step = 1 << max(0, int(n).bit_length() - 4)
    return -(-int(n) // step) * step


def group_widths(sizes: np.ndarray, groups: int) -> np.ndarray:
    """At most `groups` upper bounds on set size that minimise the padded cells when each set is padded to the next bound.

    Exact dynamic programme over the distinct sizes u: cost[g, j] = min_i cost[g-1, i] + u_j * (number of sets with u_i < size <= u_j).
    """
    unique, count = np.unique(sizes, return_counts=True)
    below = np.concatenate([[0], np.cumsum(count)])                     # sets of the first i distinct sizes
    i, j = np.arange(len(unique))[None], np.arange(len(unique))[:, None]
    block = np.where(i <= j, unique[:, None] * (below[j + 1] - below[i]), np.inf)  # [j, i]
    cost, choice = block[:, 0], []
    for _ in range(min(groups, len(unique)) - 1):
        total = block + np.concatenate([[np.inf], cost[:-1]])[None]     # the previous bound is u_{i-1}
        total[:, 0] = block[:, 0]
        choice.append(total.argmin(1))
        cost = total.min(1)
    bounds, j = [], len(unique) - 1
    for pick in reversed(choice):
        bounds.append(unique[j])
        if pick[j] == 0:
            break
        j = pick[j] - 1
    else:
        bounds.append(unique[j])
    return np.array(sorted(set(bounds)))


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one training epoch: positions into `lengths`, every one once, in an order that (seed, epoch) decides.

    Stays are shuffled, then sorted by length within windows of 32 batches, so that a batch holds stays of similar length; the order of
    the batches is shuffled again. A run resumes inside an epoch by slicing the list.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    window = 32 * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = order[start:start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += bounded_batches(part, lengths, lengths, batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def balanced_parts(events: np.ndarray, parts: int) -> list[np.ndarray]:
    """Positions into `events`, every one once and in order, in so many parts of nearly equal sums: the largest first, each to the part that
    has the least so far (Graham 1969)."""
    part, total = np.zeros(len(events), dtype=np.int64), np.zeros(parts)
    for i in np.argsort(-events, kind="stable"):
        part[i] = total.argmin()
        total[part[i]] += events[i]
    return [np.flatnonzero(part == p) for p in range(parts)]


def sorted_batches(cohort: Cohort, stays: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The batches of an evaluation pass: positions in `stays` sorted by length, nothing random."""
    sets = np.diff(cohort.stay_start)[stays]
    return bounded_batches(np.argsort(sets, kind="stable"), sets, cohort.stay_events[stays], batch_size)


# What one batch may cost, beyond which it takes fewer stays: its longest stay's sets squared, times its stays (attention), and its events.
# 16 stays of 1,024 sets each, or 32 of 724; an ordinary cohort never comes near.
_MOST_SETS_SQUARED, _MOST_EVENTS = 2**24, 2**17


def bounded_batches(order: np.ndarray, sets: np.ndarray, events: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The stays of `order`, ascending in their number of sets, as batches of `batch_size`; a huge stay is a batch of its own."""
    batches, held = [], math.inf  # `held`: events of the last batch
    for i in order:
        if held + events[i] <= _MOST_EVENTS and len(batches[-1]) < batch_size and (len(batches[-1]) + 1) * sets[i]**2 <= _MOST_SETS_SQUARED:
            batches[-1].append(i)
            held += events[i]
        else:
            batches.append([i])
            held = events[i]
    return [np.array(batch) for batch in batches]
