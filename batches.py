"""From a `Cohort` to tensors: values normalised, stays as an `EventBatch` whose sets of similar size are
computed together, and the order in which an epoch meets the batches."""

import copy
import hashlib
import heapq
import itertools
from bisect import bisect_right
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from data import Cohort, InputError, events_of, point_slots, ranges, shortest, stay_event_index

# ------------------------------------------------------------------------------------------------------------
# Normalised values, and the variables' vectors
# ------------------------------------------------------------------------------------------------------------

TAIL, SKEWED, FAR, MOST_VALUES = .005, 1.5, 25, 2**24  # see `Normalizer.fit`


@dataclass
class Normalizer:
    """z = clip((f(value) - mean) / std, -clip, clip), a variable each; f(x) = log(1 + x / log_scale) where
    log_scale is positive, else x.

    Fitted on training stays only; travels in the checkpoint.
    """

    variables: list[str]
    mean: np.ndarray       # [V] float32, of f(value)
    std: np.ndarray        # [V] float32, positive
    log_scale: np.ndarray  # [V] float32, raw units; 0: no logarithm
    # [V] float32, raw units: the range of the values that `fit` kept, which no forecast leaves; high < low:
    # there was none. None: unknown, as if it had no end
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    clip: float = 5.0      # standard deviations
    # What `fit` found: variable -> (values far outside the quartiles, the most frequent of them).
    outside: dict = field(default_factory=dict)
    clipped: float = 0.0   # share of the values that `fit` saw beyond `clip`

    ARRAYS = ("mean", "std", "log_scale", "low", "high")

    def __post_init__(self):
        if self.low is None:
            self.low, self.high = (np.full(len(self.mean), side, np.float32) for side in (-np.inf, np.inf))

    @property
    def numeric(self) -> np.ndarray:
        """[V] bool: the variable had a number when it was fitted (True where that is not known)."""
        return self.low <= self.high

    @classmethod
    def fit(cls, cohort: Cohort, stays: np.ndarray, like: "Normalizer | None" = None) -> "Normalizer":
        """Returns the normalizer of these stays.

        Values further than FAR interquartile ranges from the quartiles are left out: 3% of 9999999 must not
        set the scale. The others are clipped to their TAIL and 1 - TAIL quantiles: nor may one mistyped pH
        of 735. Mean and standard deviation are those of what is left. A non-negative variable with a
        skewness above SKEWED (most enzymes, bilirubin, lactate) is taken on a log scale, relative to its
        median. A constant variable (an indicator) keeps its value: mean 0, std 1. Statistics that the cohort
        was given are taken instead. Of more than MOST_VALUES values a seeded share is looked at, in which
        rare variables keep all of theirs. like: whose choice between log and linear scale is taken, where it
        knows the variable."""
        logarithmic = dict(zip(like.variables, like.log_scale > 0)) if like else {}
        counts = np.zeros(len(cohort.variables), dtype=np.int64)
        for variable, value in events_of(cohort, stays):
            counts += np.bincount(variable[~np.isnan(value)], minlength=len(counts))
        # The largest cap under which all variables together keep at most MOST_VALUES.
        cap = bisect_right(range(1, int(counts.max(initial=0)) + 1), MOST_VALUES,
                           key=lambda cap: np.minimum(counts, cap).sum())
        share = np.minimum(1, max(1, cap) / counts.clip(min=1))
        # The values of some stays by variable, where each variable begins.
        sorted_values, rng = [], np.random.default_rng(0)
        for variable, value in events_of(cohort, stays):
            kept = ~np.isnan(value)
            if share.min() < 1:
                kept[kept] = rng.random(kept.sum()) < share[variable[kept]]
            variable, value = variable[kept], value[kept]
            order = np.argsort(variable, kind="stable")
            sorted_values.append((value[order], np.searchsorted(variable[order], np.arange(len(counts) + 1))))
        mean, std, log_scale = np.zeros((3, len(counts)), dtype=np.float32)
        std[:] = 1
        given = ~np.isnan(cohort.statistics[:, 0])
        mean[given], std[given] = cohort.statistics[given].T
        low, high = (np.full(len(counts), side, np.float32) for side in (np.inf, -np.inf))
        result = cls(cohort.variables, mean, std, log_scale, low, high)
        beyond = seen = 0
        for v in np.flatnonzero(counts):
            x = np.concatenate([value[bounds[v]:bounds[v + 1]] for value, bounds in sorted_values])
            x = x.astype(np.float64)
            if len(x):
                result.fit_variable(v, x, logarithmic.get(cohort.variables[v]))
                if given[v]:
                    (mean[v], std[v]), log_scale[v] = cohort.statistics[v], 0
                seen += len(x)
                if given[v] or (mean[v], std[v]) != (0, 1):  # else a constant, at which nothing is lost
                    beyond += int((np.abs(result(np.full(len(x), v), x)) >= result.clip).sum())
        result.clipped = beyond / max(1, seen)
        return result

    def fit_variable(self, v: int, x: np.ndarray, logarithmic: bool | None = None) -> None:
        """Mean, std, log_scale and range of variable v from its values x. logarithmic: whether on a log
        scale, which no negative value can be (None: where they are skewed)."""
        low, middle, high = np.quantile(x, (.25, .5, .75))
        if low == high:  # more than half of the values are equal
            low, high = np.quantile(x, (.05, .95))
        width = high - low or max(1.0, abs(middle))
        within = (x >= low - FAR * width) & (x <= high + FAR * width)
        if not within.all():
            values, count = np.unique(x[~within], return_counts=True)
            self.outside[self.variables[v]] = (int(count.sum()), float(values[count.argmax()]))
        x = x[within]
        self.low[v], self.high[v] = x.min(), x.max()
        x = x.clip(*np.quantile(x, (TAIL, 1 - TAIL)))
        if x.std() <= 1e-6 * max(1, abs(x.mean())):
            return
        if logarithmic is None:
            logarithmic = ((x - x.mean()) ** 3).mean() > SKEWED * x.std() ** 3
        if x.min() >= 0 and logarithmic:
            self.log_scale[v] = np.median(x[x > 0])
            x = np.log1p(x / self.log_scale[v])
        self.mean[v], self.std[v] = x.mean(), x.std()

    def __call__(self, variable: np.ndarray, value: np.ndarray) -> np.ndarray:
        return self.unclipped(variable, value).clip(-self.clip, self.clip).astype(np.float32)

    def unclipped(self, variable: np.ndarray, value: np.ndarray) -> np.ndarray:
        scale = self.log_scale[variable]
        value = np.where(scale > 0, np.log1p(np.maximum(value, 0) / np.where(scale > 0, scale, 1)), value)
        return (value - self.mean[variable]) / self.std[variable]

    def in_units(self, variable: np.ndarray, z: np.ndarray, variance: np.ndarray | float = 0) -> np.ndarray:
        """Raw values [n] of normalised ones, within the range of the training values (NaN: the variable had
        none). On a log scale that is the mean of a lognormal, exp(m + v / 2), where z is a mean and has a
        `variance`, which counts up to 1 of f(value)."""
        scale, std = (x[variable].astype(np.float64) for x in (self.log_scale, self.std))
        low, high = (shortest(x)[variable] for x in (self.low, self.high))
        value = z * std + self.mean[variable]
        value = raw(np.where(scale > 0, value + np.minimum(variance * std**2, 1) / 2, value), scale)
        return np.where(low <= high, value.clip(low, high), np.nan)

    @property
    def varies(self) -> np.ndarray:
        """[V] bool: the variable had numbers in training, and not one alone."""
        return (self.mean != 0) | (self.std != 1) | (self.log_scale != 0)

    def describe(self, most: int = 5) -> str:
        """The lines that tell what `fit` found, see `Cohort.describe`."""
        line = (f"data: {self.clipped:.2%} of the training values lie beyond {self.clip:g} standard "
                "deviations and are clipped")
        if not self.outside:
            return line
        worst = sorted(self.outside.items(), key=lambda item: -item[1][0])
        named = "; ".join(f"{name}: {count:,} values, most often {value:g}"
                          for name, (count, value) in worst[:most])
        return (f"{line}\ndata: far outside the quartiles, and no part of the scale, are values of "
                f"{len(worst)} variables: {named}{' ...' if len(worst) > most else ''}")

    def of(self, variables: np.ndarray) -> "Normalizer":
        """The same for these variables alone: indices [n] in its vocabulary."""
        arrays = {name: getattr(self, name)[variables] for name in Normalizer.ARRAYS}
        return replace(self, variables=[self.variables[v] for v in variables], **arrays)

    def state_dict(self) -> dict:
        """Plain types and tensors, for the checkpoint."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in Normalizer.ARRAYS}
        return {"variables": list(self.variables), "clip": self.clip, **arrays}

    @classmethod
    def from_state(cls, state: dict, path) -> "Normalizer":
        """From the checkpoint at `path`. Raises InputError where the state is not that of a normalizer."""
        names, clip = state.get("variables"), state.get("clip")
        known = cls.ARRAYS if "low" in state else cls.ARRAYS[:3]  # earlier versions kept no range
        arrays = [state.get(name) for name in known]
        sound = isinstance(names, list) and isinstance(clip, float) and all(isinstance(x, str) for x in names)
        sound = sound and clip > 0 and len(set(names)) == len(names) and all(
            torch.is_tensor(x) and x.shape == (len(names),) and x.dtype == torch.float32
            and not x.isnan().any() for x in arrays) and all(x.isfinite().all() for x in arrays[:3])
        if not (sound and (arrays[1] > 0).all() and (arrays[2] >= 0).all()):
            raise InputError(f"{path}: its normalizer is damaged or forged; make the checkpoint again")
        return cls(names, *(x.numpy() for x in arrays), clip=clip)


def raw(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[n] values in their units of values that are logarithms where their log scale [n] is above 0."""
    with np.errstate(over="ignore"):  # an infinite one is too large
        return np.where(scale > 0, np.expm1(np.where(scale > 0, value, 0)) * scale, value)


def variable_vectors(variables: list[str], dim: int, given: np.ndarray | None = None) -> torch.Tensor:
    """[V, dim] one unit vector a variable, seeded by a hash of its *name*:
    the same variable has the same vector in every data set.

    given: [V, D] vectors to take instead, where not NaN (`Cohort.vectors`; D = 0: none).
    Raises InputError where D is neither 0 nor `dim`.
    """
    seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") for name in variables]
    table = np.stack([np.random.default_rng(seed).standard_normal(dim) for seed in seeds])
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    if given is not None and given.shape[1]:
        if given.shape[1] != dim:
            raise InputError(f"cached.csv: vectors of {given.shape[1]} dimensions where the model takes "
                             f"{dim}; give those that it was trained with")
        table = np.where(np.isnan(given), table, given)
    return torch.from_numpy(table).float()


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------

@dataclass
class EventSets:
    """Sets of events, all that the set encoder takes; see `EventBatch`."""

    variables: torch.Tensor        # [U] int64, indices into the model's vocabulary (padding: 0)
    event_variable: torch.Tensor   # [E] int64, place in `variables`
    event_value: torch.Tensor      # [E] float32, normalised; 0 where the event has none
    groups: list[tuple[int, int]]  # (S_k, N_k)
    token_event: torch.Tensor      # [M] int64, M = sum of S_k * N_k
    slot_set: torch.Tensor         # [B, L] int64

    @classmethod
    def of_one(cls, variable: torch.Tensor, value: torch.Tensor) -> "EventSets":
        """A single set: variable [E], value [E] (0: none). Without events it is a cell of padding."""
        cell = torch.arange(max(1, len(value)), device=value.device)
        return cls(variable, cell[:len(value)], value, [(1, len(cell))], cell, cell[:1, None])


@dataclass
class EventBatch(EventSets):
    """B stays, their E events and Q prediction points as tensors: nothing in it grows with the vocabulary.

    Variables: `variables` names the batch's U distinct ones, and all else speaks of places in it; a stay's
    own are its row of `stay_variables`. Sets are laid out twice: grouped by size for the set encoder, by stay
    for the Transformer.

    Groups: sets of similar size form a group of S_k sets, padded to its widest, N_k; `token_event` lists the
    groups' M cells, group after group, set after set, as indices of events, E (one past the end) where a cell
    is padding. Stays: a grid [B, L]; `slot_set` is the place of each slot's set in the concatenated groups, S
    (one past the end) after a stay's last.

    Measurements: a variable in a set, however many of the set's events name it: C of them, sorted by stay,
    variable and time. Their value is the mean of the events that have one; their day counts from the
    variable's first value in the stay, so that nothing depends on where a stay's clock begins.

    S, M, L, U, D and Q are rounded up (see `round_up`; sets of padding are groups of their own), so that few
    distinct shapes occur: matrix kernels that are compiled for each shape (oneDNN, torch.compile) would else
    be compiled at every step."""

    group_slot: torch.Tensor       # [S] int64, the slot of each set of the groups (0 for padding)
    minute: torch.Tensor           # [B, L] float64, of each set (0 in padding)
    clock: torch.Tensor            # [B] float32, hour of the day at minute 0; NaN: unknown
    lengths: torch.Tensor          # [B] int64, number of sets
    stay_variables: torch.Tensor   # [B, D] int64, places in `variables`
    variable_counts: torch.Tensor  # [B] int64, how many of a row of `stay_variables` are no padding
    first_value: torch.Tensor      # [B, D] float32, normalised, of each variable in the stay (0: no value)
    cell_slot: torch.Tensor        # [C] int64, the slot of each measurement
    cell_pair: torch.Tensor        # [C] int64, stay * D + place in its row of `stay_variables`
    cell_value: torch.Tensor       # [C] float32, normalised; 0 where no event has a value
    cell_day: torch.Tensor         # [C] float32, days since the first value
    cell_valued: torch.Tensor      # [C] bool: some event has a value
    cell_count: torch.Tensor       # [C] float32, number of events
    point: torch.Tensor            # [B, Q] int64, index in the cohort (-1: padding)
    point_slot: torch.Tensor       # [B, Q] int64, position of the last set not after the point (0 in padding)
    point_hours: torch.Tensor      # [B, Q] float32, hours from that set to the point
    answer: torch.Tensor           # [B, Q, A] float32, NaN: none, or padding
    weight: torch.Tensor           # [B, Q] float32, of the point in the loss; 0 without an answer
    stay: torch.Tensor             # [B] int64, index in the cohort

    def __len__(self) -> int:
        return len(self.stay)

    def _map(self, function) -> "EventBatch":
        return EventBatch(**{f.name: function(x) if torch.is_tensor(x := getattr(self, f.name)) else x
                             for f in fields(self)})

    def to(self, device, non_blocking: bool = False) -> "EventBatch":
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "EventBatch":
        return self._map(torch.Tensor.pin_memory)


class StayDataset(torch.utils.data.Dataset):
    """Turns an array of stay indices into an `EventBatch`: the data set behind a DataLoader whose sampler
    yields whole batches.

    `points`: with the cohort's prediction points, and of each stay no set after its last one (so that nothing
    later can reach a prediction); else whole stays without points. A point before a stay's first set has no
    answer and is left out. Events of variables outside the normalizer's vocabulary are dropped here;
    `unknown_variables` names them."""

    def __init__(self, cohort: Cohort, normalizer: Normalizer, max_groups: int = 8, points: bool = False):
        self.cohort, self.normalizer = cohort, normalizer
        lookup = {name: i for i, name in enumerate(normalizer.variables)}
        # Index of a variable of the data -> the model's, -1: unknown.
        self.variable = np.array([lookup.get(name, -1) for name in cohort.variables])
        self.unknown_variables = [name for name in cohort.variables if name not in lookup]
        self.widths = group_widths(*set_sizes(cohort), max_groups)
        self.points, self.weight = points, None

    def describe_known(self) -> str:
        """The lines that tell how much of the data the checkpoint knows and which variables it drops, the
        most frequent first; see `Cohort.describe`."""
        events = self.cohort.event_variable
        count = sum(np.bincount(part, minlength=len(self.variable))
                    for part in np.array_split(events, 1 + len(events) // 2**24))
        unknown = [v for v in np.argsort(-count, kind="stable") if self.variable[v] < 0]
        share = 1 - count[unknown].sum() / count.sum()
        line = f"data: {share:.1%} of the events are of variables that the checkpoint knows"
        if not unknown:
            return line
        named = ", ".join(f"{self.cohort.variables[v]} ({count[v]:,} events)" for v in unknown[:10])
        more = " ..." if len(unknown) > 10 else ""
        return (f"{line}\ndata: dropped: the events of {len(unknown)} variables unknown to the checkpoint: "
                f"{named}{more}")

    def asking(self, points: np.ndarray, weight: np.ndarray | None = None) -> "StayDataset":
        """The same data with these prediction points alone (indices in the cohort, ascending), and their
        weights in the loss (None: 1): a batch's `point` is then the place of each in `points`."""
        cohort = self.cohort
        asked = replace(cohort, point_start=np.searchsorted(points, cohort.point_start),
                        answers=cohort.answers[points], point_minute=cohort.point_minute[points])
        return self.of(asked, weight)

    def of(self, cohort: Cohort, weight: np.ndarray | None = None) -> "StayDataset":
        """The same stays, asked at the points of another cohort."""
        other = copy.copy(self)
        other.cohort, other.weight = cohort, weight
        return other

    def sizes(self, stays: np.ndarray) -> "StaySizes":
        """What these stays cost in a batch."""
        cohort = self.cohort
        first, sets = cohort.stay_start[stays], np.diff(cohort.stay_start)[stays]
        _, place, slot = self._answerable(stays)
        points = np.bincount(place, minlength=len(stays))
        if self.points:
            sets = np.zeros_like(sets)
            np.maximum.at(sets, place, slot + 1)
        return StaySizes(sets, cohort.set_start[first + sets] - cohort.set_start[first], points)

    def _answerable(self, stays: np.ndarray) -> list[np.ndarray]:
        """The prediction points of these stays that lie after a set, [n]: index, place of the stay, slot of
        the last set."""
        stays = stays if self.points else stays[:0]
        index, slot = point_slots(self.cohort, stays)
        place = np.repeat(np.arange(len(stays)), np.diff(self.cohort.point_start)[stays])
        return [array[slot >= 0] for array in (index, place, slot)]

    def __getitem__(self, stays: np.ndarray) -> EventBatch:
        cohort, sizes = self.cohort, self.sizes(stays)
        set_index = ranges(cohort.stay_start[stays], sizes.sets)
        size = cohort.set_start[set_index + 1] - cohort.set_start[set_index]
        events = ranges(cohort.set_start[set_index], size)
        variable, value = self.variable[cohort.event_variable[events]], cohort.event_value[events]
        event_set = np.repeat(np.arange(len(set_index)), size)
        if self.unknown_variables:
            known = variable >= 0
            variable, value, event_set = variable[known], value[known], event_set[known]
            size = np.bincount(event_set, minlength=len(set_index))
        valued = ~np.isnan(value)
        value = np.where(valued, self.normalizer(variable, np.where(valued, value, 0)), np.float32(0))
        variables, local = np.unique(variable, return_inverse=True)
        length = round_up(max(1, sizes.sets.max()))
        slot = ranges(np.arange(len(stays)) * length, sizes.sets)                          # [sets]
        minute = np.zeros(len(stays) * length)
        minute[slot] = cohort.set_minute[set_index]
        origin = np.array(cohort.origin[stays])
        arrays = dict(
            variables=np.pad(variables, (0, round_up(len(variables) + 1) - len(variables))),
            event_variable=local.reshape(-1),
            event_value=value,
            minute=minute.reshape(-1, length),
            clock=((origin - origin.astype("datetime64[D]")) / np.timedelta64(1, "h")).astype(np.float32),
            lengths=sizes.sets,
            stay=np.array(stays, dtype=np.int64),
            **self._measurements(len(stays), local.reshape(-1), value, valued, slot[event_set], minute),
            **self._points(stays),
        )
        groups, arrays["token_event"], group_set = self._groups(size, len(variable))
        sets, padding_sets = len(size), sum(s for s, _ in groups) - len(size)
        arrays["group_slot"] = np.append(slot[group_set], np.zeros(padding_sets, dtype=np.int64))
        slot_set = np.full(len(stays) * length, sets + padding_sets)
        slot_set[slot[group_set]] = np.arange(sets)
        arrays["slot_set"] = slot_set.reshape(-1, length)
        return EventBatch(groups=groups, **{name: torch.from_numpy(array) for name, array in arrays.items()})

    def _groups(self, size: np.ndarray, events: int) -> tuple[list, np.ndarray, np.ndarray]:
        """The groups of sets of these sizes, `token_event`, and the real sets in the groups' order."""
        first, sets = np.cumsum(size) - size, len(size)
        width_class = np.searchsorted(self.widths, size)
        group_set = np.argsort(width_class, kind="stable")
        groups, token_event = [], []
        for members in np.split(group_set, np.flatnonzero(np.diff(width_class[group_set])) + 1):
            # A set that lost all its events to unknown variables is a cell of padding.
            column = np.arange(max(1, size[members].max()))
            groups.append((len(members), len(column)))
            event = np.where(column < size[members, None], first[members, None] + column, events)
            token_event.append(event.ravel())
        padding_sets, cells = round_up(sets + 1) - sets, sum(s * n for s, n in groups)
        padding_cells = round_up(cells + padding_sets) - cells
        groups += [(s, n) for s, n in ((padding_sets - 1, 1), (1, padding_cells - padding_sets + 1)) if s]
        return groups, np.concatenate([*token_event, np.full(padding_cells, events)]), group_set

    @staticmethod
    def _measurements(stays: int, local, value, valued, slot, minute) -> dict[str, np.ndarray]:
        """The batch's measurements, and each stay's variables, from its events: local variable, value,
        whether it is one, slot, [E] each; minute [B * L] of every slot."""
        length = len(minute) // stays
        order = np.lexsort((slot, local, slot // length))
        stay_change = np.diff(slot[order] // length, prepend=-1) != 0                                   # [E]
        pair_change = stay_change | (np.diff(local[order], prepend=-1) != 0)                            # [E]
        begin = np.flatnonzero(pair_change | (np.diff(slot[order], prepend=-1) != 0))         # [C], in events
        count = np.diff(begin, append=len(order))
        numbers = np.add.reduceat(valued[order].astype(np.int64), begin)
        total = np.add.reduceat(value[order].astype(np.float64), begin)
        cell_value = (total / np.maximum(numbers, 1)).astype(np.float32)
        cell_slot, cell_valued = slot[order][begin], numbers > 0
        pair = np.cumsum(pair_change)[begin] - 1                                                         # [C]
        pair_begin = np.flatnonzero(np.diff(pair, prepend=-1))                             # [pairs], in cells
        pair_stay = cell_slot[pair_begin] // length
        counts = np.bincount(pair_stay, minlength=stays)
        width = round_up(max(1, counts.max()))
        first_pair = np.cumsum(counts) - counts                                                    # [B]
        place = pair_stay * width + np.arange(len(pair_begin)) - first_pair[pair_stay]             # [pairs]
        # The first measurement with a value: of those of a pair, the smallest index (none: the pair's first).
        index = np.arange(len(begin))
        valued_index = np.where(cell_valued, index, len(index))
        first = np.minimum.reduceat(valued_index, pair_begin)
        first = np.where(first < len(index), first, pair_begin)
        stay_variables = np.zeros(stays * width, dtype=np.int64)
        stay_variables[place] = local[order][begin[pair_begin]]
        first_value = np.zeros(stays * width, dtype=np.float32)
        first_value[place] = cell_value[first]
        return dict(
            stay_variables=stay_variables.reshape(stays, width),
            variable_counts=counts,
            first_value=first_value.reshape(stays, width),
            cell_slot=cell_slot,
            cell_pair=place[pair],
            cell_value=cell_value,
            cell_day=((minute[cell_slot] - minute[cell_slot[first]][pair]) / 1440).astype(np.float32),
            cell_valued=cell_valued,
            cell_count=count.astype(np.float32),
        )

    def _points(self, stays: np.ndarray) -> dict[str, np.ndarray]:
        """The answerable prediction points of these stays, [B, Q] each; `answer` is [B, Q, A]."""
        cohort = self.cohort
        index, stay, slot = self._answerable(stays)
        counts = np.bincount(stay, minlength=len(stays))
        width = round_up(max(1, counts.max())) if self.points else 0
        place = stay * width + ranges(np.zeros(len(stays), dtype=np.int64), counts)
        point, point_slot = np.zeros((2, len(stays) * width), dtype=np.int64)
        hours, weight = np.zeros((2, len(stays) * width), dtype=np.float32)
        answer = np.full((len(stays) * width, cohort.answers.shape[1]), np.nan, dtype=np.float32)
        point[:] = -1
        point[place] = index
        point_slot[place] = slot
        answer[place] = cohort.answers[index]
        last_set = cohort.stay_start[stays][stay] + slot
        hours[place] = (cohort.point_minute[index] - cohort.set_minute[last_set]) / 60
        labelled = ~np.isnan(answer[place]).all(1)  # `cohort.labelled` looks at every point of the data
        weight[place] = labelled * (1 if self.weight is None else self.weight[index])
        grids = dict(point=point, point_slot=point_slot, point_hours=hours, answer=answer, weight=weight)
        return {name: array.reshape(len(stays), width, *array.shape[1:]) for name, array in grids.items()}


def round_up(n: int) -> int:
    """The next size with four significant bits at most: no more than 12.5% larger, eight sizes an octave."""
    step = 1 << max(0, int(n).bit_length() - 4)
    return -(-int(n) // step) * step


def set_sizes(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """The distinct sizes of the cohort's sets, ascending, and how many sets have each.
    A million sets are looked at at a time."""
    count = np.zeros(1, dtype=np.int64)
    for begin in range(0, len(cohort.set_minute), 2**20):
        part = np.bincount(np.diff(cohort.set_start[begin:begin + 2**20 + 1]))
        count = np.pad(count, (0, max(0, len(part) - len(count))))
        count[:len(part)] += part
    return np.flatnonzero(count), count[count > 0]


def group_widths(unique: np.ndarray, count: np.ndarray, groups: int) -> np.ndarray:
    """At most `groups` upper bounds on set size that minimise the padded cells when each set is padded to the
    next bound; unique, count: see `set_sizes`.

    Exact dynamic programme over the distinct sizes u: cost[g, j] = min_i cost[g-1, i] + u_j * (number of sets
    with u_i < size <= u_j)."""
    below = np.concatenate([[0], np.cumsum(count)])                     # sets of the first i distinct sizes
    i, j = np.arange(len(unique))[None], np.arange(len(unique))[:, None]
    block = np.where(i <= j, unique[:, None] * (below[j + 1] - below[i]), np.inf)  # [j, i]
    cost, choice = block[:, 0], [np.zeros(len(unique), dtype=np.int64)]
    for _ in range(min(groups, len(unique)) - 1):
        total = block + np.concatenate([[np.inf], cost[:-1]])[None]     # the previous bound is u_{i-1}
        total[:, 0] = block[:, 0]
        choice.append(total.argmin(1))
        cost = total.min(1)
    bounds, j = [], len(unique) - 1
    for pick in reversed(choice):
        bounds.append(unique[j])
        j = pick[j] - 1
        if j < 0:
            break
    return np.array(bounds[::-1])


class StaySizes(NamedTuple):
    """What stays cost in a batch, [n] each; see `StayDataset.sizes`."""

    sets: np.ndarray
    events: np.ndarray
    points: np.ndarray

    def fit(self, batch: np.ndarray) -> bool:
        """Whether these stays may be one batch: few enough events, squares of the longest stay (attention),
        and points. A stay of any size is a batch of its own."""
        longest, most_points = self.sets[batch].max(initial=1), self.points[batch].max(initial=0)
        return len(batch) <= 1 or (self.events[batch].sum() <= _MOST_EVENTS
                                   and len(batch) * most_points <= _MOST_POINTS
                                   and len(batch) * max(longest, most_points) ** 2 <= _MOST_SETS_SQUARED)


# What one batch may hold. 16 stays of 1,024 sets each, or 64 of 512; 37 stays of PhysioNet 2012.
_MOST_SETS_SQUARED, _MOST_EVENTS, _MOST_POINTS = 2**24, 2**14, 2**14


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one training epoch: positions into `lengths`, every one once, in an order that (seed,
    epoch) decides.

    Stays are shuffled, then sorted by length within windows of 32 batches, so that a batch holds stays of
    similar length; the order of the batches is shuffled again. A run resumes inside an epoch by slicing the
    list."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    window = 32 * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = order[start:start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def split_batch(sizes: StaySizes, batch: np.ndarray, parts: int) -> list[np.ndarray]:
    """The stays of `batch` (positions into `sizes`) as a multiple of `parts` lists of nearly equal events,
    each of which fits into memory (see `StaySizes.fit`); some may be empty."""
    for number in itertools.count(parts, parts):
        lists = [batch[part] for part in balanced_parts(sizes.events[batch], number)]
        if all(map(sizes.fit, lists)):
            return lists


def balanced_parts(events: np.ndarray, parts: int) -> list[np.ndarray]:
    """Positions into `events`, every one once and in order, in `parts` lists of nearly equal sums: the
    largest first, each to the part that has the least so far (Graham 1969)."""
    part, heap = np.zeros(len(events), dtype=np.int64), [(0, 0, p) for p in range(parts)]
    for i in np.argsort(-events, kind="stable"):
        total, held, least = heap[0]
        part[i] = least
        heapq.heapreplace(heap, (total + events[i], held + 1, least))
    return [np.flatnonzero(part == p) for p in range(parts)]


def sorted_batches(sizes: StaySizes) -> list[np.ndarray]:
    """The batches of an evaluation pass: positions into `sizes`, ascending in their number of sets,
    nothing random; each as large as fits."""
    batches = []
    for i in np.argsort(sizes.sets, kind="stable"):
        grown = np.append(batches[-1], i) if batches else None
        if grown is not None and sizes.fit(grown):
            batches[-1] = grown
        else:
            batches.append(np.array([i]))
    return batches


# ------------------------------------------------------------------------------------------------------------
# What a data set has of a checkpoint's variables
# ------------------------------------------------------------------------------------------------------------

def common_variables(cohort: Cohort, dataset: "StayDataset", stays: np.ndarray,
                     most: int) -> np.ndarray:
    """Indices in the dataset's vocabulary of the variables that at least 1% of the stays have, `most` at
    most: the most common, of which half the places are for variables with numbers first; ties by name.
    Ascending."""
    size = len(cohort.variables)
    held, valued = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=bool)
    for part in np.array_split(stays, 1 + len(stays) // 1000):
        events = stay_event_index(cohort, part)
        place = np.repeat(np.arange(len(part)), cohort.stay_events[part])
        variable = cohort.event_variable[events].astype(np.int64)
        held += np.bincount(np.unique(place * size + variable) % size, minlength=size)
        valued[variable[~np.isnan(cohort.event_value[events])]] = True
    by_frequency = np.argsort(-held, kind="stable")  # the vocabulary is sorted by name
    known = (held >= max(1, 0.01 * len(stays))) & (dataset.variable >= 0)
    common = by_frequency[known[by_frequency]]
    numbers = common[valued[common]][:most // 2]
    rest = common[~np.isin(common, numbers)]
    return np.sort(dataset.variable[np.append(numbers, rest)[:most]])


def answered_points(dataset) -> np.ndarray:
    """Indices [n] of the points that have an answer: those with an event of a variable that the checkpoint
    knows at or before them."""
    cohort = dataset.cohort
    return np.flatnonzero(first_known(dataset)[cohort.point_stay] <= cohort.point_minute)


def first_known(dataset) -> np.ndarray:
    """[P] the minute of each stay's first event of a variable that the checkpoint knows, inf: none."""
    cohort = dataset.cohort
    known = dataset.variable[cohort.event_variable] >= 0                                                # [E]
    known = np.logical_or.reduceat(known, cohort.set_start[:-1])                                        # [T]
    minute = np.where(known, cohort.set_minute, np.inf)
    return np.minimum.reduceat(minute, cohort.stay_start[:-1])
