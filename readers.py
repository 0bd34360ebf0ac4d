"""Readers."""

import argparse
import csv
import gzip
import hashlib
import io
import json
import pickle
import re
import shutil
import sys
import tarfile
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import pandas as pd

from data import (MINUTE, READER_VERSION, SPLITS, CACHE_DIR, Cohort, InputError, at_end, build_cohort, clear_write_error, open_cache, pieces,
                  ranges, with_points, write_cache)

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


def _columns(path: Path) -> list[str]:
    """The names of a table's columns."""
    if path.suffix == ".parquet":
        with _open_parquet(path) as file:
            return file.schema_arrow.names
    try:
        with open(path, encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct its path or permissions") from None
    except (UnicodeDecodeError, csv.Error):
        raise InputError(f"{path}: not UTF-8 text; save it with that encoding") from None


def _read_table(paths: list[Path], columns: dict, optional: dict = {}, rest=None, separator: str = ",", bodies=None) -> Table:
    """The files (all CSV in UTF-8, or all Parquet) as one `Table`.

    columns, optional: {name: str, float or np.datetime64 (Parquet only)}; rest: the type of every other named column (None: not read).
    Raises InputError for an empty or damaged file, a missing column, a row of another width, a cell of another type, and no row at all.
    """
    if len({path.suffix == ".parquet" for path in paths}) > 1:
        raise InputError(f"{paths[0].parent}: holds both CSV and Parquet; keep one of them")
    try:
        if paths[0].suffix == ".parquet":
            table = _read_parquet(paths, columns, optional, rest)
        else:
            table = _read_csv(paths, columns, optional, rest, separator, bodies or [path.read_bytes() for path in paths])
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


def _read_csv(paths, columns, optional, rest, separator, contents) -> Table:
    """Parses all files in one call, for thousands of small files as for one large one. Quoted cells may not hold line breaks."""
    header, bodies, rows = None, [], []
    for path, content in zip(paths, contents):
        if not content:
            raise InputError(f"{path}: an empty file; write it again, or remove it")
        first, _, body = content.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
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
    for name in (name for name, kind in wanted.items() if kind is np.datetime64):
        time = pd.to_datetime(frame[name], format="ISO8601", errors="coerce")
        table.refuse(name, (time.isna() & frame[name].notna()).to_numpy(), ", not a time like 2150-03-01 12:00:00; mend the line")
        table.columns[name] = time.to_numpy("datetime64[us]")
    return table


@contextmanager
def _open_parquet(path: Path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from None
    if not path.stat().st_size:
        raise InputError(f"{path}: an empty file; write it again, or remove it")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); write it again") from None


def _read_parquet(paths, columns, optional, rest) -> Table:
    tables = []
    for path in paths:
        with _open_parquet(path) as file:
            tables.append(file.read(columns=list(_choose_columns(path, file.schema_arrow.names, columns, optional, rest))))
    import pyarrow
    from pyarrow import types
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


_SPLIT_WORDS = {"train": 0, "valid": 1, "val": 1, "validation": 1, "dev": 1, "tuning": 1, "test": 2, "held_out": 2, "heldout": 2}


def _split_codes(table: Table) -> np.ndarray:
    """[rows] code of column `split`, -1 where it is empty."""
    split = table["split"]
    codes = np.array([_SPLIT_WORDS.get(word.strip().lower(), -2) for word in split.categories] + [-1])[split.codes]
    table.refuse("split", codes == -2, "; it is one of train, valid, test (or val, validation, dev, tuning, held_out)")
    return codes


def _plain_ids(ids) -> pd.Index:
    """Ids by which two tables meet: a whole number that one of them wrote as a float (200001.0) loses its .0."""
    return pd.Index([text[:-2] if text.endswith(".0") and text[:-2].isdigit() else text for text in map(str.strip, ids)], dtype=object)


# ----------------------------------------------------------------------------------------------------------------------------------
# Labels, splits and subjects: what is told of stays that were read, attached after the cache
# ----------------------------------------------------------------------------------------------------------------------------------

_IDS = ("stay_id", "ts_id", "RecordID", "subject_id")
_LABELS = ("label", "boolean_value", "in_hospital_mortality", "In-hospital_death")
_TIMES = {"minute": float, "hour": float, "prediction_time": np.datetime64}


def _table_files(path: Path) -> list[Path]:
    """The CSV and Parquet files of a folder, or the file itself."""
    return sorted(p for p in path.rglob("[!.]*") if p.suffix in (".csv", ".parquet")) if path.is_dir() else [path]


def _one_of(path: Path, names: list[str], wanted) -> str:
    found = [name for name in wanted if name in names]
    if not found:
        raise InputError(f"{path}: no column {' or '.join(wanted)} (it has {', '.join(names[:8])}); rename or add it")
    return found[0]


def _told(table: Table, ids: np.ndarray, column: str, value) -> pd.Series:
    """What a table tells of each id, empty cells aside; InputError where it tells two things of one."""
    told = pd.Series(value, index=ids, dtype=object).dropna()
    told = told[~pd.MultiIndex.from_arrays([told.index, told]).duplicated()]
    twice = told.index[told.index.duplicated()].unique()
    table.refuse(column, np.isin(ids, twice[:1]), f", and another elsewhere for the same stay ({_some(twice)}); give one")
    return told


def _some(names) -> str:
    """The first few, and how many more."""
    return ", ".join(map(str, names[:5])) + f" and {len(names) - 5} more" * (len(names) > 5)


def _with_splits(cohort: Cohort, told: pd.Series) -> Cohort:
    """The cohort with the split of these ids; a stay that is not told of belongs to none."""
    ids = _plain_ids(cohort.stay_id)
    split = told.reindex(ids).fillna(-1).to_numpy(np.int8)
    return replace(cohort, split=split, notes=cohort.notes | {
        "stays without a split (neither trained on nor scored)": int((split < 0).sum()),
        "splits of no stay with a usable event": int((~told.index.isin(ids)).sum())})


def _read_splits(files: list[Path]) -> pd.Series:
    """Split code by stay, of a file with an id and `split`."""
    id_column = _one_of(files[0], _columns(files[0]), _IDS)
    table = _read_table(files, {id_column: str, "split": str})
    table.refuse(id_column, table[id_column].codes < 0, "; name the stay or remove the line")
    codes = _split_codes(table)
    return _told(table, _plain_ids(table[id_column].categories)[table[id_column].codes], "split", np.where(codes < 0, None, codes))


def _with_labels(cohort: Cohort, files: list[Path], points: bool = True) -> Cohort:
    """The cohort with what its labels' files tell: an id, a label of 0 or 1 (or empty), and perhaps split, subject_id and a time: `minute`
    or `hour` of the stay or `prediction_time`. With times a row is a prediction point, without one a stay has one at its end.

    points: False takes split and subject alone. Raises InputError for another label, and for two labels of one point.
    """
    names = _columns(files[0])
    id_column, label_column = (_one_of(files[0], names, wanted) for wanted in (_IDS, _LABELS))
    timed = next((name for name in _TIMES if name in names), None)
    if not timed and "time" in names:
        raise InputError(f"{files[0]}: its column time has no unit; name it minute or hour")
    table = _read_table(files, {id_column: str, label_column: float}, {timed: _TIMES.get(timed), "split": str, "subject_id": str})
    key, label = table[id_column], table[label_column]
    table.refuse(id_column, key.codes < 0, "; name the stay or remove the line")
    table.refuse(label_column, ~(np.isnan(label) | (label == 0) | (label == 1)), ", not 0 or 1; mend the line")
    ids = _plain_ids(key.categories)[key.codes]
    stays = _plain_ids(cohort.stay_id)
    if id_column != "subject_id" and "subject_id" in table:
        subject = table["subject_id"]
        told = _told(table, ids, "subject_id", np.append(_plain_ids(subject.categories), None)[subject.codes]).reindex(stays)
        cohort = replace(cohort, subject=np.where(told.isna(), cohort.subject, told).astype(str))
    if "split" in table:
        codes = _split_codes(table)
        cohort = _with_splits(cohort, _told(table, ids, "split", np.where(codes < 0, None, codes)))
    if not points:
        return cohort

    rows = pd.DataFrame({"id": ids, "label": np.nan_to_num(label, nan=-1).astype(np.int8), "at": 0})
    if timed:
        rows["at"] = table[timed] if timed != "hour" else table[timed] * 60
        table.refuse(timed, ~np.isfinite(rows["at"].to_numpy()), "; give the time of the question")
    again = rows.duplicated().to_numpy()
    other = rows.duplicated(["id", "at"]).to_numpy() & ~again
    table.refuse(id_column, other, f", labelled twice and not alike ({_some(rows['id'][other].unique())}); keep one line of each")
    rows = rows[~again].sort_values(["id", "at"])
    asked, first, count = np.unique(rows["id"].to_numpy(str), return_index=True, return_counts=True)
    place = pd.Index(asked).get_indexer(stays)                             # [P] of each stay in `asked`, -1: nowhere
    count = np.append(count, 0)[place]                                     # [P]
    row = ranges(np.append(first, 0)[place], count)                        # [Q]
    stay, label, at = np.repeat(np.arange(len(cohort)), count), rows["label"].to_numpy()[row], rows["at"].to_numpy()[row]
    notes = {"labels given more than once": int(again.sum()),
             "outcomes of no stay with a usable event": int((~rows["id"].isin(stays)).sum())}
    if not timed:
        labels = np.full(len(cohort), -1)
        labels[stay] = label
        notes["stays without an outcome (unlabelled)"] = int((labels < 0).sum())
        return at_end(replace(cohort, notes=cohort.notes | notes), labels)
    notes["stays without a question"] = int((count == 0).sum())
    if timed == "prediction_time":
        origin = np.array(cohort.origin)
        if np.isnat(origin).all():
            raise InputError(f"{files[0]}: prediction_time is a clock time, which these data do not know; give minute or hour of the stay")
        # A stay of static events alone knows no clock: its first question sets it.
        unknown = np.isnat(origin) & (count > 0)
        origin[unknown] = at[np.searchsorted(stay, np.flatnonzero(unknown))].astype("datetime64[m]")
        cohort = replace(cohort, origin=origin)
        since = at.astype("datetime64[us]").astype(np.int64) - origin[stay].astype(np.int64)
        at = since // MINUTE + since % MINUTE / MINUTE
    return with_points(replace(cohort, notes=cohort.notes | notes), count, at, label)


def _usable_rows(table: Table, empty: bool = False) -> tuple[np.ndarray, dict]:
    """Mask of the rows with a variable and a finite value (`empty`: or none), and notes that count the others; InputError where a minute is
    no time."""
    minute, nameless = table["minute"], table["variable"].codes < 0
    table.refuse("minute", ~(np.abs(minute) < 1e8), "; give minutes since admission, between -1e8 and 1e8 (190 years)")
    with np.errstate(over="ignore"):
        value = table["value"].astype(np.float32)
    unusable = np.isinf(value) if empty else ~np.isfinite(value)
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
    return _unpacked_sources(_physionet2012_files(folder).values(), ".txt")


def _unpacked_sources(paths, suffix: str) -> list[Path]:
    """The records of folders; an archive is its own source."""
    return [file for path in paths for file in (sorted(path.glob(f"[!.]*{suffix}")) if path.is_dir() else [path])]


class _Unpacked(gzip.GzipFile):
    """A gzip file that gives no more at once than a record may hold: a tar header, too, can claim gigabytes."""

    def read(self, size=-1):
        if size > _RECORD_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def _records(path: Path, suffix: str):
    """Yield (record name, bytes) of a folder or archive, in order of name. Nothing is unpacked to disk."""
    if path.is_dir():
        files = _unpacked_sources([path], suffix)
        if not files:
            raise InputError(f"{path}: holds no <record>{suffix}; unpack {path.name}.tar.gz there again")
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
                if member.isfile() and inside.suffix == suffix and inside.name[0] != ".":
                    records.append((inside.stem, archive.extractfile(member).read()))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: damaged archive ({error}); download it again") from None
    if not records:
        raise InputError(f"{path}: holds no <record>{suffix}; download the archive again")
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
    for name, raw in _records(path, ".txt"):
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
    """Sets a, b, c of the Challenge 2012 (Silva et al. 2012), whichever lie in `folder`. Label: in-hospital death, of Outcomes-a.txt.

    The outcome files' scores and lengths of stay never become inputs. ICUType is categorical: one event per type, of value 1.
    """
    tables, names, stays = [], [], 0
    for letter, path in _physionet2012_files(folder).items():
        table, records = _parse_records(path)
        table["record"] += stays
        stays += len(records)
        tables.append(table)
        names += records
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

    return build_cohort("PhysioNet 2012 set " + "+".join(_physionet2012_files(folder)), kinds, record[keep], minutes[time.codes[keep]],
                        code[keep], value[keep], stay_id=names, notes=notes)


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


def read_original(folder: Path, params_map: Path | None = None) -> Cohort:
    """patient_ehr/{train,valid,test}/<id>.parquet or .csv: variable, value, minute and perhaps set_index, which then tells the sets apart.

    The folder is the stay's split. params_map: see `_read_statistics`; cached.csv beside patient_ehr: see `_read_vectors`. A set that spans
    several minutes is charted at its first.
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
    cached = files[0].parents[2] / "cached.csv"
    given = {"statistics": _read_statistics(params_map) if params_map else None, "vectors": _read_vectors(cached) if cached.is_file() else None}
    cohort = build_cohort("original layout (patient_ehr)", table["variable"].categories, stay, minute, table["variable"].codes[keep],
                          table["value"][keep], ids, split=[SPLITS.index(path.parent.name) for path in files], notes=notes, set_key=set_key,
                          **given)
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


def read_long_table(folder: Path) -> Cohort:
    """events.csv or events.parquet (stay_id, minute, variable, value). Minutes count from admission; an event without a value says that
    something happened."""
    events = _one_table(folder, "events")
    table = _read_table(events, {"stay_id": str, "minute": float, "variable": str, "value": float})
    stay, variable = table["stay_id"], table["variable"]
    table.refuse("stay_id", stay.codes < 0, "; name the stay or remove the line")
    keep, notes = _usable_rows(table, empty=True)
    return build_cohort(f"long table {events[0].name}", variable.categories, stay.codes[keep], table["minute"][keep], variable.codes[keep],
                        table["value"][keep], stay.categories, notes=notes)


# ----------------------------------------------------------------------------------------------------------------------------------
# Reader: MEDS (Medical Event Data Standard)
# ----------------------------------------------------------------------------------------------------------------------------------

def _meds_events(folder: Path) -> list[Path]:
    return sorted((folder / "data").rglob("[!.]*.parquet"))


def _meds_labels(folder: Path, task: str | None) -> list[Path]:
    """The files of one task: a file or folder directly in labels/; entries named by numbers, or like splits, are shards of one."""
    tasks = {}
    for path in sorted((folder / "labels").glob("[!.]*")):
        if files := [file for file in _table_files(path) if file.suffix in (".csv", ".parquet")]:
            tasks.setdefault("labels" if path.stem.isdigit() or path.stem in _SPLIT_WORDS else path.stem, []).extend(files)
    if len(tasks) > 1 and task is None or task is not None and task not in tasks:
        raise InputError(f"{folder / 'labels'}: holds the tasks {', '.join(tasks) or '(none)'}; choose one with --task NAME")
    return tasks[task or next(iter(tasks))] if tasks else []


def read_meds(folder: Path) -> Cohort:
    """data/**/*.parquet (subject_id, time or null = static, code, and perhaps numeric_value): a subject is a stay.

    Minutes count from the minute of the subject's first timed event; static events lie at minute 0. A code without a number is an event
    without a value. MEDS_DEATH never enters.
    """
    table = _read_table(_meds_events(folder), {"subject_id": str, "time": np.datetime64, "code": str}, {"numeric_value": float})
    table.refuse("subject_id", table["subject_id"].codes < 0, "; name the subject or remove the row")
    subjects, codes = table["subject_id"].categories, table["code"].categories
    value = (table["numeric_value"] if "numeric_value" in table else np.full(len(table["time"]), np.nan)).astype(np.float32)
    nameless, infinite = table["code"].codes < 0, np.isinf(value)
    death = np.append(np.array(codes.str.startswith("MEDS_DEATH"), dtype=bool), False)[table["code"].codes]
    notes = {"events without a code": int(nameless.sum()), "MEDS_DEATH events": int(death.sum()), "events of infinite value": int(infinite.sum())}

    timed = ~np.isnat(table["time"])
    keep = np.flatnonzero(~(nameless | infinite | death))
    keep = keep[np.argsort(timed[keep], kind="stable")]  # static events come first
    subject, time, value, code = table["subject_id"].codes[keep], table["time"][keep], value[keep], table["code"].codes[keep]
    minute, timed = time.astype("datetime64[m]"), timed[keep]
    origin = np.full(len(subjects), np.iinfo(np.int64).max)
    np.minimum.at(origin, subject[timed], minute[timed].astype(np.int64))
    known = origin < np.iinfo(np.int64).max
    offset = np.where(timed, time.view(np.int64) % MINUTE, 0)
    return build_cohort("MEDS", codes, subject, np.where(timed, minute.astype(np.int64) - origin[subject], 0), code, value,
                        subjects.to_numpy(str), notes=notes, offset=offset if offset.any() else None,
                        origin=np.where(known, origin, np.iinfo(np.int64).min).astype("datetime64[m]"))


# ----------------------------------------------------------------------------------------------------------------------------------
# Reader: PhysioNet / CinC Challenge 2019
# ----------------------------------------------------------------------------------------------------------------------------------

_HOURLY_DESCRIPTORS = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime", "ICULOS")  # repeated in every row of a record


def _physionet2019_files(folder: Path) -> list[Path]:
    """training_setA and training_setB: the unpacked folder where it exists, else the archive as downloaded."""
    sets = ([folder / f"training_set{letter}", folder / f"training_set{letter}.tar.gz"] for letter in "AB")
    return [found[0] for paths in sets if (found := [path for path in paths if path.exists()])]


def read_physionet2019(folder: Path) -> Cohort:
    """training_setA/*.psv or training_setA.tar.gz, and training_setB (Reyna et al. 2019): a stay a file, a row an hour (minute 60 * row),
    NaN = not measured.

    An hour is a prediction point, SepsisLabel its label (-1 where no file has the column), never an input. A descriptor, repeated every
    hour, enters once, where it is first recorded (ICULOS then says how long the stay had lasted when the record begins; later hours are
    the minutes themselves).
    """
    records = [(path, name, body) for path in _physionet2019_files(folder) for name, body in _records(path, ".psv")]
    files = [path / f"{name}.psv" for path, name, _ in records]
    table = _read_table(files, {}, {"SepsisLabel": float}, rest=float, separator="|", bodies=[body for *_, body in records])
    sepsis = table["SepsisLabel"] if "SepsisLabel" in table else np.full(table.rows.sum(), -1)
    if "SepsisLabel" in table:
        table.refuse("SepsisLabel", (sepsis != 0) & (sepsis != 1), ", not 0 or 1; mend the line")
    names = [name for name in table.columns if name != "SepsisLabel"]
    cells = np.stack([table[name] for name in names], axis=1)  # [hours, variables]
    row, variable = np.nonzero(~np.isnan(cells))
    stay, value = table.file[row], cells[row, variable]
    repeated = np.isin(variable, [i for i, name in enumerate(names) if name in _HOURLY_DESCRIPTORS])
    repeated &= pd.Series(stay * len(names) + variable).duplicated().to_numpy()
    infinite = np.isinf(value)
    keep = ~(repeated | infinite)
    minute = 60 * ranges(np.zeros(len(files), dtype=np.int64), table.rows)
    cohort = build_cohort("PhysioNet 2019", names, stay[keep], minute[row[keep]], variable[keep], value[keep], [path.stem for path in files],
                          notes={"repeated descriptors": int(repeated.sum()), "infinite values": int((infinite & ~repeated).sum())})
    asked = np.isin([path.stem for path in files], cohort.stay_id)
    hours = asked[table.file]
    return with_points(cohort, table.rows[asked], minute[hours], sepsis[hours])


# ----------------------------------------------------------------------------------------------------------------------------------
# Choosing a reader, and the cache
# ----------------------------------------------------------------------------------------------------------------------------------

class Reader(NamedTuple):
    name: str                                   # what it reads
    matches: Callable[[Path], bool]             # does it lie in this folder?
    sources: Callable[[Path], list[Path]]       # the files that its cohort depends on
    read: Callable[..., Cohort]                 # (folder, **options)
    labels: Callable[[Path, str | None], list[Path]] = lambda folder, task: []  # (folder, task): the files of its labels
    splits: Callable[[Path], list[Path]] = lambda folder: []                    # the files of its split
    options: tuple[str, ...] = ()               # what it takes beside the folder: files (params_map), or --task


READERS = [  # the first that matches is taken
    Reader("PhysioNet 2012 (set-a.tar.gz or set-a/ with Outcomes-a.txt)", lambda folder: bool(_physionet2012_files(folder)),
           _physionet2012_sources, read_physionet2012,
           lambda folder, _: [path for letter in _physionet2012_files(folder) if (path := folder / f"Outcomes-{letter}.txt").is_file()]),
    Reader("the original layout (patient_ehr/{train,valid,test}/<id>.parquet or .csv)", lambda folder: bool(_original_files(folder)),
           _original_sources, read_original, options=("params_map",)),
    Reader("a long table (events.csv or events.parquet, and labels.csv)", lambda folder: bool(_one_table(folder, "events")),
           lambda folder: _one_table(folder, "events"), read_long_table, lambda folder, _: _one_table(folder, "labels")),
    Reader("PhysioNet 2019 (training_setA/*.psv or training_setA.tar.gz, training_setB)", lambda folder: bool(_physionet2019_files(folder)),
           lambda folder: _unpacked_sources(_physionet2019_files(folder), ".psv"), read_physionet2019),
    Reader("MEDS (data/**/*.parquet)", lambda folder: bool(_meds_events(folder)), _meds_events, read_meds, _meds_labels,
           lambda folder: sorted(folder.glob("metadata/subject_splits.parquet")), ("task",)),
]


def load_cohort(data_dir: str | None = None, synthetic_stays: int = 1000, cache_dir: Path = CACHE_DIR, params_map: str | None = None,
                label_file: str | None = None, task: str | None = None, hours: float | None = None, split_file: str | None = None) -> Cohort:
    """The cohort at `data_dir` (None: the embedded one), parsed once and then memory-mapped from the cache; labels, subjects and splits are
    attached to it at each call, so that one cached cohort serves every task and its fingerprint knows none of them.

    params_map: statistics of the original layout; label_file: a file or folder of labels that lie elsewhere, see `_with_labels`; task: which
    of several in a MEDS folder; hours: one question a stay, asked so long after its first set or at its end; split_file: CSV stay_id,split
    that overrides the data's own. Raises InputError where the folder is missing, fits no reader, or holds a malformed file, and where an
    option is given that the reader does not take.
    """
    options = {name: Path(path) for name, path in (("params_map", params_map), ("label_file", label_file), ("split_file", split_file)) if path}
    folder = data_dir and Path(data_dir)
    if folder is None:
        reader = Reader(f"the embedded cohort of {synthetic_stays} stays", None, lambda _: [], None)
    elif not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data_dir takes the folder that holds the data")
    else:
        reader = next((r for r in READERS if r.matches(folder)), None)
        if reader is None:
            raise InputError(f"{folder}: no data that a reader knows; expected one of: " + "; ".join(r.name for r in READERS))
    for name, given in (("params_map", params_map), ("task", task)):
        if given and name not in reader.options:
            raise InputError(f"--{name} {given}: not read with {reader.name}; leave the option out")
    for name, path in options.items():
        if not path.exists():
            raise InputError(f"--{name} {path}: no such file; correct the path")
    own = {name: path for name, path in options.items() if name == "params_map"}
    key = {"reader": reader.name, "options": list(own), "version": READER_VERSION, "sources":
           [[str(p.resolve()), (s := p.stat()).st_size, s.st_mtime_ns] for p in [*reader.sources(folder), *own.values()]]}
    cached = Path(cache_dir) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    cohort = open_cache(cached)
    if cohort is None:
        with clear_write_error(cached):
            cached.parent.mkdir(parents=True, exist_ok=True)
        if folder is None and (size := synthetic_stays * _SYNTHETIC_BYTES) > (free := shutil.disk_usage(cached.parent).free):
            raise InputError(f"--synthetic_stays {synthetic_stays}: takes {size // 10**6:,} MB in {cached.parent}, where {free // 10**6:,} MB are "
                             "free; give fewer")
        write_cache(cached, [reader.read(folder, **own)] if folder else synthetic_parts(synthetic_stays))
        cohort = open_cache(cached)

    if splits := reader.splits(folder):
        cohort = _with_splits(cohort, _read_splits(splits))
    if label_file and task:
        raise InputError(f"--task {task}: --label_file names the labels already; leave one of them out")
    if not (label_file and "task" in reader.options) and (files := reader.labels(folder, task)):
        cohort = _with_labels(cohort, files, points=not label_file)
    if label_file:
        cohort = _with_labels(cohort, _table_files(options["label_file"]))
    if hours:
        if not np.array_equal(cohort.point_minute, at_end(cohort, np.zeros(len(cohort))).point_minute):
            raise InputError(f"--hours {hours:g}: these labels have times of their own; leave the option out")
        first, last = cohort.set_minute[cohort.stay_start[:-1]], cohort.point_minute
        cohort = with_points(cohort, np.ones(len(cohort), dtype=np.int64), np.minimum(first + 60 * hours, last), cohort.label)
    if split_file:
        cohort = _with_splits(cohort, _read_splits([options["split_file"]]))
    return cohort


# ----------------------------------------------------------------------------------------------------------------------
# An example of one's own table: python readers.py --example my_table
# ----------------------------------------------------------------------------------------------------------------------

def write_long_table(folder: Path, cohort: Cohort, labels: bool = True) -> Path:
    """Write a cohort as a long table: events.csv and, with `labels`, labels.csv of a new folder. Raises InputError where
    the folder exists."""
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
    folder = Path(parser.parse_args(argv).example)
    cohort = replace(synthetic_cohort(200), stay_id=np.arange(1001, 1201).astype(str))
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
