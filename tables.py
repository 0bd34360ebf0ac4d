"""Tables of any size: CSV (plain, .gz, .zip, or many records in a .tar.gz) and Parquet, read part by part and
checked as they are read; and the cache of what was read.

Nothing here but the cache knows of stays or events.
"""

import csv
import gzip
import io
import json
import os
import platform
import re
import shutil
import sys
import tarfile
import tempfile
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import time
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import pandas as pd

from data import MINUTE, Cohort, InputError, met, pieces, sync
from questions import at_end

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


PART_BYTES, PART_ROWS = 2**25, 2**20  # of text, and of Parquet, that are parsed at once; no line is longer
# A record has a few thousand bytes, an archive of 20,000 records some 130 million.
_RECORD_BYTES, _ARCHIVE_BYTES = 2**26, 2**29


# What stands for no value: in numbers and ids all of these, in other text all but NA, which may be sodium.
_QUIET = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]
MISSING = _QUIET + ["n/a", "#N/A", "<NA>", "NaT", r"\N", "."]  # these are counted where a number is due
NAMELESS = [word for word in MISSING if word != "NA"]
_TABLE = re.compile(r"(.*?)(\.(csv|parquet|csv\.gz|csv\.zip))?")
_WHOLE = re.compile(r"(-?\d+)\.0+")
_SCIENTIFIC = re.compile(r"-?\d(\.\d+)?[eE]\+\d+")
_COMMA = re.compile(r"[<>]?=?\s*[-+]?[\d.]*,[\d.,]*\d")
_POINT = re.compile(r"[<>]?=?\s*[-+]?\d*\.\d+")
_DATE, _DURATION = re.compile(r"\d{4}-\d\d-\d\d"), re.compile(r"-?\d+ days?\b")
_WHOLE_NUMBERS = {16: 2.0**11, 32: 2.0**24, 64: 2.0**53}  # below which a float of so many bits holds all
TRUTH = {"true": "1", "false": "0"}  # as pandas reads a column of them alone
BEYOND = re.compile(r"[<>]=?\s*([-+]?[\d.]+)\s*[^\d.]*")  # >100, <0.5, >60/minute


# What a column may hold, beside str, float and np.datetime64 (a clock time):
ID = "id"        # text; nothing, or a word for it, is refused
OWNER = "owner"  # an id, or nothing
VALUE = "value"  # a number, or one beyond a measuring range (>100, <0.5), which enters as its bound
ANY = "any"      # a VALUE or other text, which is kept in `Table.texts`
TIME = "time"    # minutes; or a duration (which becomes minutes) or a clock time
HOURS = "hours"  # hours, which become minutes
_NUMBERS = (float, VALUE, ANY, TIME, HOURS)


def plain_name(text, missing=MISSING) -> str | None:
    """The one spelling of an id or a name: stripped, accents in one piece (Unicode NFC), and a whole number
    that was written as a float (1001.0) without its .0. None where it is one of the words `missing`."""
    text = unicodedata.normalize("NFC", str(text)).strip()
    whole = _WHOLE.fullmatch(text)
    text = whole[1] if whole else text
    return None if text in missing else text


def _inexact(text: str, limit: float) -> bool:
    """Whether a float of so few digits may have been another id: at or beyond `limit`, or in scientific
    notation."""
    whole = _WHOLE.fullmatch(text)
    return bool(_SCIENTIFIC.fullmatch(text) or whole and abs(float(whole[1])) >= limit)


def rounded(minutes: np.ndarray) -> np.ndarray:
    """Minutes to the microsecond, so that 2.05 hours are minute 123."""
    return np.rint(minutes * MINUTE) / MINUTE


def some(names) -> str:
    """The first few names, and how many more there are."""
    names = list(map(str, names))
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def of_each(column: pd.Categorical, function, none) -> np.ndarray:
    """[rows] what `function` makes of each row's text; `none` where the cell is empty."""
    return np.array([*map(function, column.categories), none])[column.codes]


class Report:
    """What was met while reading: how many rows are left out or named, the place of the first, and what is
    wrong.

    columns: {a table's own name of a column: the name by which it is read}, in lower case."""

    def __init__(self, columns: dict = {}):
        self.counts, self.examples, self.problems = Counter(), {}, {}
        self.columns, self.unread = columns, {}
        self.marks = {}  # decimal mark -> the place of the first number with it

    def lines(self) -> list[str]:
        """What was met, a line each, with the place of the first."""
        return met(self.counts, self.examples)

    def note_unread(self, name: str) -> None:
        """Count the columns of the table `name` that were not read."""
        if self.unread:
            self.counts[f"columns of {name} not read: {some(self.unread)}"] = len(self.unread)
            self.unread = {}

    def settle(self) -> None:
        """Raise the InputError that says everything that is wrong; pass where nothing is."""
        if len(self.marks) > 1:
            (mark, place), (other, there) = self.marks.items()
            self.problems["mark"] = (f"{there}: a number with {other!r}, where {place} has one with "
                                     f"{mark!r}: which is the decimal mark? write all numbers alike"), 1
        if self.problems:
            raise InputError(". Also: ".join(first + f" ({count:,} such rows)" * (count > 1)
                                             for first, count in self.problems.values()))


@dataclass
class Table:
    """Rows of files of one shape. Text is pd.Categorical (stripped; nothing is code -1), a number float64, a
    clock time datetime64[us]."""

    report: Report
    paths: list[Path]  # of each piece
    first: list[int]   # the number of each piece's first row in its file, or of its line in a text
    rows: np.ndarray   # [pieces] rows of each
    columns: dict
    counted: str       # what is numbered: line or row
    texts: dict = field(default_factory=dict)  # of a column of type ANY: pd.Categorical of what is no number

    def __getitem__(self, name: str):
        return self.columns[name]

    @property
    def file(self) -> np.ndarray:
        """[rows] index of each row's file."""
        return np.repeat(np.arange(len(self.paths)), self.rows)

    def place(self, row: int) -> str:
        """File and line or row of this row, the table's first being 0."""
        piece = int(np.searchsorted(np.cumsum(self.rows), row, side="right"))
        return f"{self.paths[piece]} {self.counted} {row + self.first[piece] - int(self.rows[:piece].sum())}"

    def note(self, reason: str, noted: np.ndarray, row: np.ndarray | slice = slice(None)) -> None:
        """Count the events of a mask, and keep the place of the first. row: the row of each event (all: they
        are the rows)."""
        self.report.counts[reason] += int(np.count_nonzero(noted))
        if noted.any():
            first = np.arange(self.rows.sum())[row][np.argmax(noted)]
            self.report.examples.setdefault(reason, self.place(int(first)))

    def refuse(self, name: str, bad: np.ndarray, problem: str) -> None:
        """Count the rows of the mask `bad` as wrong, and name the first and its cell of column `name`.
        `Report.settle` raises."""
        if bad.any():
            row = int(np.argmax(bad))
            cell = self[name][row]
            shown = f"{cell:g}" if isinstance(cell, float) else repr(str(cell))
            shown = "missing" if pd.isna(cell) else shown
            first, count = self.report.problems.get(
                (name, problem), (f"{self.place(row)}: {name} is {shown}{problem}", 0))
            self.report.problems[name, problem] = first, count + int(np.count_nonzero(bad))


def files_in(path: Path, counts: Counter) -> list[Path]:
    """The files in a folder at any depth, or the file itself, sorted. Links to folders are followed, each
    folder is entered once. What a name that begins with _ or . hides is left out and counted in `counts`."""
    if not path.is_dir():
        return [path]
    files, entered = [], set()
    for home, folders, names in os.walk(path, followlinks=True):
        if (own := os.path.realpath(home)) in entered:
            folders.clear()
            counts["folders met again through a link, not read again"] += 1
            continue
        entered.add(own)
        hidden = [name for name in folders + names if name[0] in "._"]
        counts["files and folders whose names begin with _ or ., not read"] += len(hidden)
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        files += [Path(home, name) for name in names if name[0] not in "._"]
    return sorted(files)


def table_files(path: Path, counts: Counter) -> list[Path]:
    """The CSV and Parquet files among `files_in`."""
    return [file for file in files_in(path, counts) if file == path or _TABLE.fullmatch(file.name)[2]]


def named_tables(folder: Path, name: str, counts: Counter) -> list[Path]:
    """The files of the table `name` in a folder: name.csv (.gz, .zip), name.parquet, parts such as
    name-000.csv, or a folder of parts called name, name.csv or name.parquet. InputError where several of
    these lie there."""
    found = {}
    for path in sorted(folder.glob(f"{name}*")):
        stem, suffix = _TABLE.fullmatch(path.name).group(1, 2)
        if (path.is_dir() or suffix) and (part := re.fullmatch(rf"{name}([-_].*)?", stem)):
            if files := table_files(path, counts):
                found.setdefault(f"{name}-*{suffix}" if part[1] else path.name, []).extend(files)
    if len(found) > 1:
        raise InputError(f"{folder}: holds both {' and '.join(list(found)[:2])}; keep one of them")
    return sum(found.values(), [])


def column_names(path: Path, columns: dict = {}) -> dict[str, bool]:
    """The names of a table's columns, in lower case, and whether each holds clock times or durations.
    columns: see `Report`."""
    if path.suffix == ".parquet":
        with _open_parquet(path) as file:
            from pyarrow import types
            names = file.schema_arrow.names
            clock = [types.is_temporal(kind) for kind in file.schema_arrow.types]
    else:
        _, header, _, rows = next(_pieces(path))
        names, separator = _header(header, path)
        first = rows.partition(b"\n")[0].decode(errors="replace").split(separator)
        clock = [bool(_DATE.match(cell.strip(' "'))) for cell in first] + [False] * len(names)
    return {_called(name, names, columns): is_clock for name, is_clock in zip(names, clock)}


def read_table(paths: list[Path], columns: dict, optional: dict = {}, rest=None, report=None) -> Table:
    """A small table, whole. See `tables`."""
    parts = list(tables(paths, columns, optional, rest, report))
    columns = {}
    for name, column in parts[0].columns.items():
        join = pd.api.types.union_categoricals if isinstance(column, pd.Categorical) else np.concatenate
        columns[name] = join([part[name] for part in parts])
    return Table(parts[0].report, sum((t.paths for t in parts), []), sum((t.first for t in parts), []),
                 np.concatenate([t.rows for t in parts]), columns, parts[0].counted)


def tables(paths: list[Path], columns: dict, optional: dict = {}, rest=None,
           report: Report | None = None) -> Iterator[Table]:
    """Yield the rows of files (all CSV in UTF-8, or all Parquet) in parts of bounded size.

    columns, optional: {name: type}, found whatever their case; rest: the type of every other named column
    (None: not read, which is counted). Separators are found in the header, a decimal comma is one where they
    are semicolons. Raises InputError for an empty or damaged file, a missing column, a row of another width
    and no row at all; and after the last part for all that `Table.refuse` met, cells of another type among
    it.
    """
    report, rows = report or Report(), 0
    if len({path.suffix == ".parquet" for path in paths}) > 1:
        raise InputError(f"{paths[0].parent}: holds both CSV and Parquet; keep one of them")
    read = _parquet_tables if paths[0].suffix == ".parquet" else _csv_tables
    for table in read(paths, columns, optional, rest, report):
        rows += table.rows.sum()
        yield table
    report.note_unread(paths[0].name)
    report.settle()
    if not rows:
        raise InputError(f"{paths[0]}: a header and no row; write the file again")


def _called(name: str, names: list[str], columns: dict) -> str:
    """The name by which a column is read, in lower case; empty where another column of the table has that
    name by `Report.columns`."""
    name = name.strip().lower()
    taken = {columns[own] for other in names if (own := other.strip().lower()) in columns}
    return columns[name] if name in columns else "" if name in taken else name


def _choose_columns(path: Path, names: list[str], columns: dict, optional: dict, rest, report: Report
                    ) -> list:
    """(name, type) by which each column is read, None where it is not; InputError where one is missing or
    occurs twice."""
    known = {name.lower(): (name, kind) for name, kind in (optional | columns).items()}
    own = [name.strip() for name in names]
    chosen = [known.get(_called(name, own, report.columns), (name, rest) if rest and name else None)
              for name in own]
    report.unread |= dict.fromkeys(name for name, c in zip(own, chosen) if name and not c)
    found = Counter(c[0] for c in chosen if c)
    if missing := [name for name in columns if name not in found]:
        raise InputError(f"{path}: no column {missing[0]} (it has {', '.join(names[:8])}); rename or add it")
    if twice := [name for name, count in found.items() if count > 1]:
        raise InputError(f"{path}: column {twice[0]} occurs twice; keep one")
    return chosen


# ------------------------------------------------------------------------------------------------------------
# CSV
# ------------------------------------------------------------------------------------------------------------

class _Unpacked(gzip.GzipFile):
    """A gzip file that gives no more at once than a record may hold: a tar header, too, can claim
    gigabytes."""

    def read(self, size=-1):
        if size > _RECORD_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def _records(path: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the .txt and .psv files of an archive, in order of name. Nothing is unpacked to
    disk."""
    records = []  # of which at most `_ARCHIVE_BYTES` are held
    with _Unpacked(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:
        for member in archive:
            inside = Path(member.name)
            # The holes of a sparse file take no room in the archive.
            plain = member.isdir() or member.isfile() and not member.issparse()
            if not plain or inside.is_absolute() or ".." in inside.parts:
                raise InputError(f"{path}: member {member.name} is a link, a device, a sparse file or leaves "
                                 "the folder; download the archive again")
            if member.size > _RECORD_BYTES or member.offset > _ARCHIVE_BYTES:
                raise InputError(f"{path}: member {member.name} of {member.size:,} bytes, {member.offset:,} "
                                 "bytes into the archive, is too large for a record; download the archive "
                                 "again, or pack records alone")
            if member.isfile() and inside.suffix in (".txt", ".psv") and inside.name[0] != ".":
                records.append((inside.name, archive.extractfile(member).read()))
    if not records:
        raise InputError(f"{path}: holds no record; download the archive again")
    return sorted(records)


def _streams(path: Path):
    """Yield (path, binary file) of each text in a file: itself, unpacked where it is packed, or its
    records."""
    if path.name.endswith(".tar.gz"):
        yield from ((path / name, io.BytesIO(content)) for name, content in _records(path))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith("/") and not name.startswith("__MACOSX/"):  # a folder, what a Mac adds
                    with archive.open(name) as file:
                        yield path, file
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield path, file


def _pieces(path: Path) -> Iterator[tuple[Path, bytes, int, bytes]]:
    """Yield (path, header, number of the first row's line, rows) of a file's texts, whole lines of at most
    about `PART_BYTES`."""
    try:
        for place, file in _streams(path):
            header, first, rest = None, 2, b""
            while block := file.read(PART_BYTES):
                block = rest + block
                if header is None:
                    if b"\n" not in block and len(block) > PART_BYTES // 2:
                        raise InputError(f"{place} line 1: a header of more than {len(block):,} bytes; "
                                         "write the file again")
                    header, _, block = block.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
                cut = block.rfind(b"\n") + 1
                if cut > PART_BYTES // 2:
                    # Blank lines may be the file's last.
                    cut = block.index(b"\n", len(block[:cut].rstrip(b"\r\n"))) + 1
                    yield place, header, first, block[:cut]
                    first += block.count(b"\n", 0, cut)
                    block = block[cut:]
                rest = block
                if len(rest) > PART_BYTES:
                    raise InputError(f"{place} line {first} or below: a line of more than "
                                     f"{PART_BYTES:,} bytes, or as many blank ones; write the file again")
            if header is None:
                raise InputError(f"{place}: an empty file; write it again, or remove it")
            rest = rest.rstrip(b"\r\n")
            yield place, header, first, rest + b"\n" if rest else b""
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error,
            RuntimeError) as error:
        raise InputError(f"{path}: damaged archive ({error}); write or download it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); correct its path or "
                         "permissions") from None


def _header(line: bytes, path: Path) -> tuple[list[str], str]:
    """The column names of a header, and what separates them: whichever of , ; tab | occurs most."""
    try:
        text = line.decode().strip("\r")
        separator = max(",;\t|", key=text.count)
        return next(csv.reader([text], delimiter=separator), []), separator
    except (UnicodeDecodeError, csv.Error):
        raise InputError(f"{path}: not UTF-8 text; save it with that encoding") from None


def _csv_tables(paths, columns, optional, rest, report) -> Iterator[Table]:
    """Parses thousands of small files in one call, and a large one in several. Quoted cells may not hold line
    breaks."""
    header, held, size = None, [], 0
    for place, line, first, body in (piece for path in paths for piece in _pieces(path)):
        if header is None:
            header, (names, separator) = line.rstrip(), _header(line, place)
            chosen = _choose_columns(place, names, columns, optional, rest, report)
        if line.rstrip() != header:
            raise InputError(f"{place} line 1: other columns than in {paths[0].name}; give all files one "
                             "header")
        held.append((place, first, body))
        size += len(body)
        if size > PART_BYTES // 2:
            yield _parse(held, separator, chosen, report)
            held, size = [], 0
    if held:
        yield _parse(held, separator, chosen, report)


def _parse(held, separator, chosen, report) -> Table:
    paths, first, bodies = map(list, zip(*held))
    rows = np.array([body.count(b"\n") for body in bodies])
    table = Table(report, paths, first, rows, {}, "line")
    source = b"".join(bodies)
    wanted = dict(c for c in chosen if c)
    places = [c[0] if c else f"ignored {i}" for i, c in enumerate(chosen)]
    numeric = [wanted.get(name) in _NUMBERS for name in places]
    missing = {name: _QUIET if is_number else [""] for name, is_number in zip(places, numeric)}
    where = f"{paths[0]}{' or a file beside it' * (len(paths) > 1)}"
    try:
        if _rows_in_doubt(source, separator, len(places)):
            _blame_row(table, source.decode(), separator, len(places))
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            for kind, mark in ((float, "."), *[(float, ",")] * (separator == ";"), (object, ".")):
                try:
                    frame = pd.read_csv(
                        io.BytesIO(source), header=None, names=places, sep=separator, na_values=missing,
                        keep_default_na=False, skip_blank_lines=False, index_col=False, decimal=mark,
                        dtype=dict(zip(places, np.where(numeric, kind, object))), usecols=list(wanted))
                    break
                except (ValueError, OverflowError):  # some cell is no number
                    if kind is object:
                        raise
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text; save it with that encoding") from None
    except pd.errors.EmptyDataError:
        frame = pd.DataFrame(columns=list(wanted), dtype=object)
    except (ValueError, OverflowError, csv.Error, pd.errors.ParserWarning) as error:
        raise InputError(f"{paths[0]}: {str(error).strip()}; mend the file") from None
    if len(frame) != rows.sum():
        raise InputError(f"{where}: a quoted cell holds a line break; remove it")
    for name, kind in wanted.items():
        column = frame[name]
        if kind in _NUMBERS and column.dtype == float:
            _add_numbers(table, name, column.to_numpy(), kind)
            if separator == ";":
                _note_mark(table, mark, np.mod(column.to_numpy(), 1) > 0)
        else:  # not dtype="category" above: pandas makes numbers of some categories, of 007 and 7 one stay
            _add_texts(table, name, *pd.factorize(column), kind, separator)
    return table


def _note_mark(table: Table, mark: str, found: np.ndarray) -> None:
    """Keep the place of the first number with this decimal mark."""
    if found.any():
        table.report.marks.setdefault(mark, table.place(int(np.argmax(found))))


def _add_numbers(table: Table, name: str, numbers: np.ndarray, kind) -> None:
    """A column of numbers; times are rounded once, and here only."""
    if kind in (TIME, HOURS):
        if numbers.dtype.kind == "f" and numbers.itemsize < 8:  # as it was written: 10.1, not 10.10000038
            numbers, place = np.unique(numbers, return_inverse=True)
            numbers = numbers.astype(str).astype(float)[place]
        numbers = rounded(numbers * (60.0 if kind == HOURS else 1.0))
    table.columns[name] = numbers.astype(float, copy=False)


def _rows_in_doubt(source: bytes, separator: str, width: int) -> bool:
    """Whether a line has other than width - 1 separators, or a separator may stand within quotes."""
    text = np.frombuffer(source, dtype=np.uint8)
    ends, at, quotes = (np.flatnonzero(text == ord(mark)) for mark in ("\n", separator, '"'))
    a_line = np.diff(np.searchsorted(at, ends), prepend=0)
    return bool((a_line != width - 1).any() or (np.searchsorted(quotes, at) % 2).any())


def _blame_row(table: Table, source: str, separator: str, width: int) -> None:
    """Find the first row of another width, and raise the InputError that names it; pass where quoted
    separators are all there is."""
    reader = csv.reader(io.StringIO(source, newline=""), delimiter=separator)
    for row, cells in enumerate(reader):
        if reader.line_num != row + 1:
            raise InputError(f"{table.place(row)}: a quoted cell holds a line break; remove it")
        if len(cells) != width:
            raise InputError(f"{table.place(row)}: {len(cells)} cells where the columns are {width}; mend "
                             "the line")


def _add_texts(table: Table, name: str, codes: np.ndarray, texts, kind, separator=",", limit=2.0**53) -> None:
    """A column of texts, by their type: names, clock times, or numbers among other cells.

    codes [rows] into texts, -1: none. limit: from which on a float of the source does not hold every whole
    number."""
    def each(values, none=None) -> np.ndarray:  # of each text -> [rows]
        return np.array([*values, none], dtype=object if none is None else None)[codes]

    def series(values) -> pd.Series:  # with a missing one, at -1
        return pd.Series([*values, None], dtype=object)

    texts = [str(text).strip() for text in texts]
    first = next((text for text in texts if text not in MISSING), "")
    if kind in (str, ID, OWNER):
        missing = NAMELESS if kind is str else MISSING
        place, names = pd.factorize(series(plain_name(text, missing) for text in texts))
        table.columns[name] = pd.Categorical.from_codes(place[codes], names)
        table.refuse(name, each((_inexact(text, limit) for text in texts), False),
                     f", a float of so many digits that other {name}s may have become the same; write whole "
                     "numbers or text")
        if kind == ID:
            table.refuse(name, place[codes] < 0, "; name the stay or remove the line")
        return
    empty = each((text in MISSING for text in texts), True)
    table.columns[name] = each(texts)  # what `Table.refuse` shows
    if kind is np.datetime64 or kind == TIME and _DATE.match(first):
        times = pd.to_datetime(series(texts), format="ISO8601", errors="coerce", utc=True)
        times = times.to_numpy("datetime64[us]")[codes]
        table.refuse(name, np.isnat(times) & ~empty, ", not a time like 2150-03-01 12:00:00; mend the line")
        table.columns[name] = times
        return
    beyond = [None] * len(texts)
    if kind == TIME and _DURATION.match(first):
        number = pd.to_timedelta(series(texts), errors="coerce") / pd.Timedelta(minutes=1)
    else:
        plain = texts
        if separator == ";":
            for mark, form in ((",", _COMMA), (".", _POINT)):
                _note_mark(table, mark, each(map(bool, map(form.fullmatch, texts)), False))
            plain = [text.replace(",", ".") for text in texts]
        if kind in (VALUE, ANY):
            beyond = list(map(BEYOND.fullmatch, plain))
        plain = [b[1] if b else TRUTH.get(text.lower(), text) for text, b in zip(plain, beyond)]
        number = pd.to_numeric(series(plain), errors="coerce")
    number = number.to_numpy(float)[codes]
    wrong = np.isnan(number) & ~empty
    comma = wrong & each(map(bool, map(_COMMA.fullmatch, texts)), False)
    table.refuse(name, comma, ", with a decimal comma or a comma between thousands; write a decimal point, "
                              "or save the table with semicolons between its columns")
    if kind == ANY:
        place, names = pd.factorize(series(texts))
        table.texts[name] = pd.Categorical.from_codes(np.where(wrong, place[codes], -1), names)
    else:
        table.refuse(name, wrong & ~comma, ", not a number; mend or remove the line")
    table.note("values beyond a measuring range (>100, <0.5), entered as their bound",
               each(map(bool, beyond), False) & ~wrong)
    table.note(r"cells of \N, <NA>, #N/A, n/a, NaT or . where a number is due, read as missing",
               each((text in MISSING and text not in _QUIET for text in texts), False))
    _add_numbers(table, name, number, kind)


# ------------------------------------------------------------------------------------------------------------
# Parquet
# ------------------------------------------------------------------------------------------------------------

@contextmanager
def _open_parquet(path: Path):
    """The ParquetFile at `path`; what goes wrong with it becomes an InputError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from None
    try:
        if not path.stat().st_size:
            raise InputError(f"{path}: an empty file; write it again, or remove it")
        schema = parquet.read_schema(path)
        # Text that the file holds as a dictionary is never spelled out.
        text = [name for name, kind in zip(schema.names, schema.types)
                if kind in (pyarrow.string(), pyarrow.large_string())]
        with parquet.ParquetFile(path, read_dictionary=text) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); write it "
                         "again") from None


def _parquet_tables(paths, columns, optional, rest, report) -> Iterator[Table]:
    for path in paths:
        with _open_parquet(path) as file:
            from pyarrow import RecordBatch
            names, first = file.schema_arrow.names, 1
            chosen = _choose_columns(path, names, columns, optional, rest, report)
            wanted = {own: c for own, c in zip(names, chosen) if c}
            batches = file.iter_batches(PART_ROWS, columns=list(wanted))
            if not file.metadata.num_rows:  # its columns are checked nevertheless
                batches = [RecordBatch.from_pylist([], schema=file.schema_arrow)]
            for batch in batches:
                table = Table(report, [path], [first], np.array([batch.num_rows]), {}, "row")
                for own, (name, kind) in wanted.items():
                    column = batch[own].to_pandas(date_as_object=False, integer_object_nulls=True)
                    _add_column(table, own, name, kind, column, batch[own].type)
                yield table
                first += batch.num_rows


# ------------------------------------------------------------------------------------------------------------
# A DataFrame in memory
# ------------------------------------------------------------------------------------------------------------

def frame_tables(frame: pd.DataFrame, name: str, columns: dict, optional: dict = {},
                 report: Report | None = None) -> Iterator[Table]:
    """Yield the rows of a DataFrame, called `name` in messages and counted from 0, as `tables` does those of
    a file. A column may hold what it may in Parquet, or text as in CSV; the frame is not changed."""
    if not isinstance(frame, pd.DataFrame):
        raise InputError(f"{name}: {type(frame).__name__} where a DataFrame belongs, with the columns "
                         f"{', '.join(columns)}; convert it")
    path, report = Path(name), report or Report()
    table = Table(report, [path], [0], np.array([len(frame)]), {}, "row")
    chosen = _choose_columns(path, [str(column) for column in frame.columns], columns, optional, None, report)
    for place, wanted in enumerate(chosen):
        if wanted:
            _add_column(table, wanted[0], *wanted, frame.iloc[:, place])
    yield table
    report.note_unread(name)
    report.settle()


def _add_column(table: Table, own: str, name: str, kind, column: pd.Series, held=None) -> None:
    """A column of typed cells. Raises InputError where cells of their type `held` (None: that of the Series)
    make no column of this kind. own: the column's name in its source."""
    types = pd.api.types
    if isinstance(column.dtype, pd.CategoricalDtype) and not types.is_string_dtype(column.cat.categories):
        column = column.astype(object)
    if column.dtype == object:
        column = column.infer_objects()
    clock = types.is_datetime64_any_dtype(column.dtype)
    duration = types.is_timedelta64_dtype(column.dtype)
    strange = [cell for cell in column if isinstance(cell, (bytes, time)) or not types.is_hashable(cell)
               ] if column.dtype == object else []
    if kind in _NUMBERS and types.is_numeric_dtype(column.dtype):
        plain = isinstance(column.dtype, np.dtype)
        numbers = column.to_numpy() if plain else column.to_numpy(float, na_value=np.nan)
        _add_numbers(table, name, numbers, kind)
    elif kind in (np.datetime64, TIME) and clock:
        column = column.dt.tz_convert("UTC").dt.tz_localize(None) if column.dt.tz else column
        table.columns[name] = column.to_numpy("datetime64[us]")
    elif kind == TIME and duration:
        _add_numbers(table, name, (column / pd.Timedelta(minutes=1)).to_numpy(float), kind)
    elif clock or duration or strange:
        held = held or (type(strange[0]).__name__ if strange else column.dtype)
        due = {str: "text or whole numbers", np.datetime64: "timestamps"} | dict.fromkeys(_NUMBERS, "numbers")
        due = due.get(kind, due[str])
        raise InputError(f"{table.paths[0]}: column {own} holds {held} where {due} belong; convert it")
    else:
        short = types.is_float_dtype(column.dtype) and 8 * column.dtype.itemsize
        _add_texts(table, name, *pd.factorize(column), kind, limit=_WHOLE_NUMBERS[short or 64])


# ------------------------------------------------------------------------------------------------------------
# The cache
# ------------------------------------------------------------------------------------------------------------

CACHE_MEND = "free space, or name another place with --cache_dir"


def open_cache(folder: Path) -> Cohort | None:
    """The cached cohort, memory-mapped; None where there is none or it is torn (a file missing or of another
    length)."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = _mapped(folder)
        if any(list(arrays[name].shape) != shape for name, shape in meta.pop("shapes").items()):
            return None
        cohort = Cohort(**meta, **arrays)
        return replace(cohort, timed=not np.array_equal(cohort.point_minute, at_end(cohort).point_minute))
    except (FileNotFoundError, NotADirectoryError, EOFError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise InputError(f"{folder}: the cache cannot be read ({error.strerror or error}); name another "
                         "place with --cache_dir") from None


def _mapped(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a cache, memory-mapped."""
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in Cohort.ARRAYS}


def of_others(folder: Path) -> bool:
    """Whether somebody else than the user or root owns this folder, or the link that stands for it. Windows
    has no such owners."""
    return bool(fcntl) and os.path.exists(folder) and not (
        {folder.stat().st_uid, folder.lstat().st_uid} <= {os.geteuid(), 0})


@contextmanager
def alone_in(folder: Path):
    """Processes that do this with one folder do it one after another, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl:
            os.close(handle)


@contextmanager
def scratch(home: Path):
    """A new folder in `home`, removed at the end; those that dead processes of this machine left are removed
    too."""
    mine = f".{platform.node()}-"
    for left in home.glob(f"{mine}*"):
        number = left.name.removeprefix(mine).partition("-")[0]
        if number.isdigit() and not _alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=home))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether the process may still run. On Windows the question itself would end it."""
    if not fcntl:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def write_cache(folder: Path, parts: Iterable[Cohort]) -> None:
    """Append part after part to files in a temporary folder beside the target, sync, rename: one part at a
    time is held in memory, and a reader never sees a half-written cache. Where another process was first, its
    cache stays."""
    with scratch(folder.parent) as temporary:
        headers, notes, examples = {}, Counter(), {}
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(temporary / f"{name}.npy", "wb"))
                     for name in Cohort.ARRAYS}
            for part, rows in pieces(parts):
                notes.update(part.notes)
                examples |= part.examples
                for name, array in rows.items():
                    array = np.ascontiguousarray(array)
                    if name not in headers:
                        headers[name] = np.lib.format.header_data_from_array_1_0(array)
                        np.lib.format.write_array_header_1_0(files[name], headers[name])
                    else:
                        headers[name]["shape"] = (headers[name]["shape"][0] + len(array), *array.shape[1:])
                    array.tofile(files[name])
            for name, header in headers.items():  # NumPy leaves room in a header for the rows to grow
                files[name].seek(0)
                np.lib.format.write_array_header_1_0(files[name], header)
        cohort = replace(part, notes=dict(notes), examples=examples, **_mapped(temporary))
        cohort.fingerprint = cohort.digest()
        meta = {f.name: getattr(cohort, f.name) for f in fields(Cohort)
                if f.name not in (*Cohort.ARRAYS, "kind", "names", "timed")}
        meta["shapes"] = {name: list(header["shape"]) for name, header in headers.items()}
        (temporary / "meta.json").write_text(json.dumps(meta))
        for path in temporary.iterdir():
            sync(path)
        with alone_in(folder.parent):
            if open_cache(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)


def cache_home() -> Path:
    """Where the system keeps caches. Raises InputError where the user has no home folder."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or (
            Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache"))
    except RuntimeError:
        raise InputError("this user has no home folder to keep what was read; name a place with --cache_dir"
                         ) from None
    return Path(home) / "seqsetvae"
