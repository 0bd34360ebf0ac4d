"""Exact statistics of what a stay showed so far: one implementation for loss, head and bedside."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from batches import EventBatch


# ------------------------------------------------------------------------------------------------------------
# Statistics at given sets
# ------------------------------------------------------------------------------------------------------------

# |last| and |mean|: values are standardised, so these are distances from the usual, and risk rises on both
# sides of it.
HISTORY_STATISTICS = ("last", "first", "mean", "max", "min", "std", "slope", "log count", "|last|", "|mean|")
FUTURE_STATISTICS = ("mean", "max", "min")


class Statistics(NamedTuple):
    """What the stays showed of n variables up to and with Q sets of each, and will show after them."""

    past: torch.Tensor         # [B, Q, 10, n] in the order of HISTORY_STATISTICS, 0: none; slope a day
    past_exists: torch.Tensor  # [B, Q, 10, n] bool: the count once it was seen, others once it had a value
    future: torch.Tensor | None = None         # [B, Q, 3, n] in the order of FUTURE_STATISTICS
    future_exists: torch.Tensor | None = None  # [B, Q, 3, n] bool


def summands(x, day, valued, count) -> torch.Tensor:
    """What a measurement adds to the sums from which all statistics come, [7, ...]: 1, x, x^2, t, t^2 and t x
    if it has a value, and its number of events. x is relative to the variable's first value, t in days since
    then."""
    terms = torch.stack([torch.ones_like(x), x, x.square(), day, day.square(), day * x]) * valued
    return torch.cat([terms, count.to(x.dtype).expand_as(x)[None]])


def extremes(x, valued) -> torch.Tensor:
    """[2, ...]: x and -x of a measurement with a value, else -inf, of which the largest are kept."""
    return torch.stack([x, -x]).masked_fill(~valued, -math.inf)


def past_statistics(sums, largest, latest, first) -> Statistics:
    """The statistics of the past, from the sums of `summands` [7, B, Q, n] and the maxima of `extremes` [2,
    B, Q, n] so far, the latest x and the variables' first values, [B, Q, n]."""
    number, seen = sums[0], sums[6]
    x, xx, t, tt, tx = (s / number.clamp(min=1) for s in sums[1:6])
    std = (xx - x.square()).clamp(min=1e-12).sqrt()
    # Least-squares slope over the times of measurement, ridge of (0.1 day)^2: two close together say little.
    slope = (tx - t * x) / ((tt - t.square()).clamp(min=0) + 0.01)
    last, mean, high, low = first + latest, first + x, first + largest[0], first - largest[1]
    past = torch.stack([last, first.expand_as(mean), mean, high, low, std, slope, seen.log1p(), last.abs(),
                        mean.abs()], dim=-2)
    counts = torch.tensor([name == "log count" for name in HISTORY_STATISTICS], device=seen.device)
    exists = (number > 0)[..., None, :] | counts[:, None] & (seen > 0)[..., None, :]
    return Statistics(past.masked_fill(~exists, 0), exists)


def row_of_cells(batch: EventBatch, slots, column, width: int) -> torch.Tensor:
    """[C] where each of the batch's measurements counts: (stay * (Q + 1) + interval between asked sets) *
    width + variable; B (Q + 1) width: left out. The interval of a set is the place in `slots` of the first
    one at or after it, Q where there is none. The arguments are those of `statistics_at`."""
    (stays, length), asked = batch.minute.shape, slots.shape[1]
    column = column.flatten()[batch.cell_pair]
    position = torch.arange(length, device=slots.device).expand(stays, length).contiguous()
    interval = torch.searchsorted(slots.contiguous(), position).flatten()[batch.cell_slot]
    row = (batch.cell_slot // length * (asked + 1) + interval) * width + column
    return torch.where(column < width, row, stays * (asked + 1) * width)


def by_interval(cells, row, shape: tuple, start, reduce: str = "amax"):
    """cells [k, C] -> [k, *shape], those of each interval reduced by `reduce`, `start` where there is none;
    row [C]: see `row_of_cells`; shape: (B, Q + 1, n)."""
    k, size = len(cells), math.prod(shape)
    reduced = cells.new_full((k, size + 1), start).scatter_reduce(1, row.expand(k, -1), cells, reduce)
    return reduced[:, :size].unflatten(1, shape)


def statistics_at(batch: EventBatch, slots, column, width: int) -> Statistics:
    """The exact statistics of the stays' measurements, by sums over the intervals between asked sets, which
    compose: O(C + B Q width). slots [B, Q]: positions of sets, ascending, L where padding; column [B, D]: the
    place among `width` variables of each of the stay's variables, `width` where it is left out."""
    stays, asked = slots.shape
    shape = stays, asked + 1, width
    first = batch.first_value.new_zeros(stays, width + 1)
    first = first.scatter(1, column, batch.first_value)[:, None, :width]                           # [B, 1, n]
    x, valued = batch.cell_value - batch.first_value.flatten()[batch.cell_pair], batch.cell_valued    # [C]
    row = row_of_cells(batch, slots, column, width)        # of a stay's variable: ascending in time
    sums = by_interval(summands(x, batch.cell_day, valued, batch.cell_count), row, shape, 0, "sum")
    largest = by_interval(extremes(x, valued), row, shape, -math.inf)
    index = torch.where(valued, torch.arange(len(x), device=x.device), -1)
    last = by_interval(index[None], row, shape, -1)[0, :, :asked].cummax(1).values                 # [B, Q, n]
    past = past_statistics(sums[:, :, :asked].cumsum(2), largest[:, :, :asked].cummax(2).values,
                           F.pad(x, (1, 0))[last + 1], first)

    times, total = sums[:2, :, 1:].flip(2).cumsum(2).flip(2)       # over the intervals after each asked set
    high, low = largest[:, :, 1:].flip(2).cummax(2).values.flip(2)
    future = torch.stack([first + total / times.clamp(min=1), first + high, first - low], dim=2)
    exists = (times > 0)[:, :, None].expand_as(future)
    return past._replace(future=future.masked_fill(~exists, 0), future_exists=exists)


def hours_since(batch: EventBatch, slots, column, width: int) -> torch.Tensor:
    """Hours from the last event of each variable, or where there is none yet from the stay's first set, to
    the sets `slots`: [B, Q, width]; the arguments are those of `statistics_at`."""
    (stays, asked), row = slots.shape, row_of_cells(batch, slots, column, width)
    minute = batch.minute.flatten()[batch.cell_slot]                                                     # [C]
    latest = by_interval(minute[None], row, (stays, asked + 1, width), -math.inf)
    latest = latest[0, :, :asked].cummax(1).values
    latest = latest.maximum(batch.minute[:, :1, None])
    since = at_slots(batch.minute[..., None], slots) - latest                       # negative in padding
    return since.div(60).float().clamp(min=0)


class RunningStatistics:
    """The statistics of `statistics_at` at the last set of one stay, kept up to date set after set."""

    def __init__(self, n: int, device):
        self.latest, self.first = torch.zeros(2, 1, 1, n, device=device)
        self.sums = torch.zeros(7, 1, 1, n, device=device)
        self.largest = torch.full((2, 1, 1, n), -math.inf, device=device)
        self.begin = torch.zeros(1, 1, n, dtype=torch.float64, device=device)  # minute of the first value
        self.minute = self.begin - math.inf                                    # of the last event

    def add(self, minute: float, value, valued, count) -> None:
        """value [n], valued [n] bool: the set measured it; count [n] of events."""
        new = valued & (self.sums[0] == 0)
        self.first, self.begin = torch.where(new, value, self.first), torch.where(new, minute, self.begin)
        x, day = value - self.first, ((minute - self.begin) / 1440).float()                        # [1, 1, n]
        self.sums += summands(x, day, valued, count)
        self.largest = self.largest.maximum(extremes(x, valued))
        self.latest = torch.where(valued, x, self.latest)
        self.minute = torch.where(count > 0, minute, self.minute)

    def now(self) -> Statistics:
        return past_statistics(self.sums, self.largest, self.latest, self.first)


def summaries(exact: Statistics, since, hours) -> torch.Tensor:
    """What the head gets of n variables at points: their statistics at the last set, whether they were
    seen, the hours since then (log1p; see `hours_since` [B, Q, n]) and the `hours` [B, Q] since that set: [B,
    Q, (10 + 2) n + 1]."""
    seen, hours = exact.past_exists[:, :, HISTORY_STATISTICS.index("log count")].float(), hours[..., None]
    return torch.cat([exact.past.flatten(2), seen, (since + hours).log1p(), hours], dim=-1)


def summary_features(n: int) -> int:
    return (len(HISTORY_STATISTICS) + 2) * n + 1


# ------------------------------------------------------------------------------------------------------------
# Pools of a stay's vectors up to given sets
# ------------------------------------------------------------------------------------------------------------

POINT_BLOCK = 256  # points whose [Q, L] weights are held at once


def attention_pool(h, last, slots):
    """Parameter-free: mean of h_t up to a point's set, weighted by softmax(h_t . h_last): h [B, L, d], last
    [B, Q, d] of the sets at slots [B, Q] -> [B, Q, d]. A block of points after another: of a long stay asked
    at each set [Q, L] is too much."""
    position = torch.arange(h.shape[1], device=h.device)
    pooled = []
    for queries, ends in zip(last.split(POINT_BLOCK, dim=1), slots.split(POINT_BLOCK, dim=1)):
        score = (queries @ h.mT).masked_fill(position > ends[..., None], -math.inf)            # [B, block, L]
        pooled.append(score.softmax(-1) @ h)
    return torch.cat(pooled, dim=1)


def prefix_moments(x, slots):
    """Mean, maximum, minimum and standard deviation over the sets of each stay up to the sets `slots`:
    x [B, L, c], slots [B, Q] -> four of [B, Q, c]."""
    count = (slots + 1)[..., None]
    mean = at_slots(x.cumsum(1), slots) / count
    centre = at_slots(x, slots[:, -1:])                                   # squares cancel less around a value
    shifted = x - centre
    shift = at_slots(shifted.cumsum(1), slots) / count
    spread = (at_slots(shifted.square().cumsum(1), slots) / count - shift.square()).clamp(min=0)
    high, low = at_slots(x.cummax(1).values, slots), at_slots(x.cummin(1).values, slots)
    return [mean, high, low, (spread + 1e-8).sqrt()]


# ------------------------------------------------------------------------------------------------------------
# What a step asks for
# ------------------------------------------------------------------------------------------------------------

def real_sets(batch: EventBatch) -> torch.Tensor:
    """[B, L] bool: True where a slot holds a set."""
    return torch.arange(batch.minute.shape[1], device=batch.minute.device) < batch.lengths[:, None]


def variables_of(batch: EventBatch):
    """The stays' own variables: indices [B, D], and which of them are no padding, [B, D] bool."""
    own = batch.variables[batch.stay_variables]
    return own, torch.arange(own.shape[1], device=own.device) < batch.variable_counts[:, None]


def at_slots(x, slots):
    """x [B, L, c] at slots [B, Q] (of padding: the last) -> [B, Q, c]."""
    return x.gather(1, slots.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[-1]))


def measured_at(batch: EventBatch, slots, column, width: int) -> torch.Tensor:
    """[B, Q, width]: 1 where an asked set measured a variable, else 0; arguments as in `statistics_at`."""
    (stays, asked), length = slots.shape, batch.minute.shape[1]
    asked_set = torch.zeros(stays, length + 1, device=slots.device).scatter(1, slots, 1)[:, :length]
    cells = asked_set.flatten()[batch.cell_slot]            # [C] 1: of a set that is asked
    row = row_of_cells(batch, slots, column, width)
    return by_interval(cells[None], row, (stays, asked + 1, width), 0)[0, :, :asked]


class Question(NamedTuple):
    """Which sets and variables of each stay the read-outs of a step are asked for (see `ask`)."""

    slots: torch.Tensor       # [B, Q] positions of sets, ascending; L where padding
    real: torch.Tensor        # [B, Q] bool, no padding
    column: torch.Tensor      # [B, D] place among the n of each of the stay's variables, n: left out
    held: torch.Tensor        # [B, n] bool: the variable is no padding
    measured: torch.Tensor    # [B, Q, n] 1 where the set measured it
    absent: torch.Tensor      # [B, o] bool: the stay does not hold this one of the others
    keys: torch.Tensor        # [U, r] of `batch.variables`
    own_keys: torch.Tensor    # [B, n, r] of the variables
    other_keys: torch.Tensor  # [o, r] of the others


def ask(batch: EventBatch, config, order: torch.Tensor, sample: bool, keys_of) -> Question:
    """All sets and variables of each stay, or `config`'s numbers of them where it has more: `sample`d at
    random, or evenly spaced sets and the first variables in the fixed order [V], so that a stay's question
    does not depend on its batch. Others: all of a vocabulary of at most twice their number. keys_of: indices
    [n] -> keys [n, r]."""
    (stays, length), device = batch.minute.shape, batch.minute.device
    number = min(length, config.asked_sets)
    position = torch.arange(number, device=device)
    if sample and number < length:
        draw = torch.rand(stays, length, device=device).masked_fill(~real_sets(batch), 2)
        slots = draw.topk(number, largest=False).indices.sort(1).values
    else:
        even = (position + 1) * batch.lengths[:, None] // number - 1
        slots = torch.where(batch.lengths[:, None] <= number, position, even)
    real = position < batch.lengths[:, None]

    mine, held = variables_of(batch)
    width = min(mine.shape[1], config.asked_variables)
    draw = torch.rand(mine.shape, device=device) if sample else order[mine]
    chosen = draw.masked_fill(~held, math.inf).topk(width, largest=False, sorted=False).indices.sort(1).values
    places = torch.arange(width, device=device).expand(stays, -1)
    column = torch.full_like(mine, width).scatter(1, chosen, places).masked_fill(~held, width)

    if config.num_variables <= 2 * config.other_variables:
        others = torch.arange(config.num_variables, device=device)
    elif sample:
        others = torch.randint(config.num_variables, (config.other_variables,), device=device)
    else:
        others = order.topk(config.other_variables).indices
    absent = ~((mine[..., None] == others) & held[..., None]).any(1)
    slots, keys = torch.where(real, slots, length), keys_of(batch.variables)
    own_keys = F.embedding(batch.stay_variables.gather(1, chosen), keys)
    measured = measured_at(batch, slots, column, width)
    return Question(slots, real, column, held.gather(1, chosen), measured, absent, keys, own_keys,
                    keys_of(others))


class Queries(NamedTuple):
    """What will a variable show at a later minute? R queries of each stay, [B, R] each."""

    origin: torch.Tensor  # place among the Q asked sets of the last one that is known
    column: torch.Tensor  # place among the n asked variables
    hours: torch.Tensor   # from that set to the minute asked for
    value: torch.Tensor   # what was measured then, normalised
    real: torch.Tensor    # bool: there is such a query


def draw_queries(batch: EventBatch, question: Question, number: int, sample: bool) -> Queries:
    """Draw a variable of the stay, one of its measurements, and one of the asked sets before that, each
    uniformly: at random (`sample`), or by the sequence of Roberts (2018, R3), so that a stay's queries do not
    depend on its batch."""
    (stays, length), device = batch.minute.shape, batch.minute.device
    if sample:
        draw = torch.rand(3, stays, number, device=device)
    else:
        step = 1.2207440846057596 ** -torch.arange(1., 4, device=device)
        draw = step[:, None] * torch.arange(1, number + 1, device=device) % 1
        draw = draw[:, None].expand(-1, stays, -1)                                                 # [3, B, R]
    column = (draw[0] * question.held.sum(1, keepdim=True)).long()                                    # [B, R]
    own = question.column.shape[1]
    place = question.column.new_zeros(stays, question.held.shape[1] + 1)                          # [B, n + 1]
    place = place.scatter(1, question.column, torch.arange(own, device=device).expand(stays, -1))
    pair = torch.arange(stays, device=device)[:, None] * own + place.gather(1, column)
    first, end = (torch.searchsorted(batch.cell_pair, pair, right=right) for right in (False, True))
    cell = (first + (draw[1] * (end - first)).long()).clamp(max=len(batch.cell_pair) - 1)
    slot = batch.cell_slot[cell] % length
    before = torch.searchsorted(question.slots, slot)                                             # asked sets
    origin = (draw[2] * before).long()
    known = at_slots(batch.minute[..., None], question.slots.gather(1, origin))[..., 0]
    hours = (batch.minute.gather(1, slot) - known).clamp(min=0).div(60).float()
    real = (before > 0) & batch.cell_valued[cell] & question.held.any(1, keepdim=True)
    return Queries(origin, column, hours, batch.cell_value[cell], real)
