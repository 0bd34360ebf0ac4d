"""Data path of SeqSetVAE: files -> `Cohort` (ragged NumPy arrays, cached) -> `EventBatch` (tensors).

An ICU stay is a sequence of sets; a set is every (variable, value) event charted at one minute. Nothing here is padded: a cohort is
flat arrays plus offsets, and a batch is the same layout for a few stays, with the index tensors by which the model groups sets of
similar size. Nothing here knows of models, losses or devices (beyond `EventBatch.to`).
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Iterable

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
# The cache
# ----------------------------------------------------------------------------------------------------------------------------------

def open_cache(folder: Path) -> Cohort | None:
    """The cached cohort, memory-mapped; None where there is none or it is torn (a file missing or of another length)."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in Cohort.ARRAYS}
        if any(list(arrays[name].shape) != shape for name, shape in meta.pop("shapes").items()):
            return None
        return Cohort(**meta, **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cache(folder: Path, parts: Iterable[Cohort]) -> None:
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


def split_batch(cohort: Cohort, stays: np.ndarray, batch: np.ndarray, parts: int) -> list[np.ndarray]:
    """The parts of one step's batch (positions into `stays` [n]), a multiple of `parts`, balanced by events; some may be empty."""
    stays = stays[batch]
    events = cohort.set_start[cohort.stay_start[stays + 1]] - cohort.set_start[cohort.stay_start[stays]]
    return [batch[part] for part in balanced_parts(events, parts)]


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
