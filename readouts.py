"""What a code must tell of each variable: its value in the set and whether it was measured, the stay's
history so far, its future, and its value at a later minute. The output of a read-out meets the variable's
key, so that nothing grows with the vocabulary.

Shapes as in model.py; R queries of a stay."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from batches import EventBatch, variable_vectors
from history_statistics import (FUTURE_STATISTICS, HISTORY_STATISTICS, Question, Statistics, at_slots,
                                draw_queries, hours_since)
from settings import ModelConfig


class VariableKeys(nn.Module):
    """The key by which a read-out asks for a variable: a projection of its vector plus a free part, learned.
    A read-out's weights of a variable are its key times a matrix that all variables share; with as many
    dimensions as variables that loses nothing."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.projection = nn.Linear(config.input_dim, config.key_dim, bias=False)
        self.free = nn.Embedding(config.num_variables, config.key_dim)
        if config.num_variables <= config.key_dim:  # each has its own dimension, as free rows of weights
            nn.init.zeros_(self.projection.weight)
            nn.init.eye_(self.free.weight)
        else:  # of length 1, as far from each other as chance has them
            nn.init.normal_(self.projection.weight, std=config.key_dim**-0.5)
            nn.init.zeros_(self.free.weight)

    @staticmethod
    def begun(names: list[str], known: int, size: int) -> torch.Tensor:
        """The free parts [n, size] of variables that join a vocabulary of `known` ones, as they begin: a
        dimension of its own where one is left; beyond that, of length 1 and drawn by the name, unless the
        projection gives such a key."""
        own = torch.eye(size)[known:known + len(names)]
        rest = names[len(own):]
        if rest and known <= size:
            return torch.cat([own, variable_vectors(rest, size)])
        return torch.cat([own, torch.zeros(len(rest), size)])

    def forward(self, vectors, variables):
        """vectors [n, input_dim] and indices [n] of variables -> [n, r]."""
        return self.projection(vectors).float() + self.free(variables)


class ReadoutDecoder(nn.Module):
    """From a code: for every variable asked for, its expected value (normalised) and the logit that it was
    measured. Two one-hidden-layer MLPs, whose output meets the variable's key."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, r = config.latent_dim, config.key_dim
        self.value = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, r))
        self.measured = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, r))

    def forward(self, code, keys):
        """code [B, L, d], keys [n, r], or [B, n, r] of each stay's variables -> values, logits [B, L, n]."""
        return self.value(code) @ keys.mT, self.measured(code) @ keys.mT


def masked_mean(x, real):
    """Mean over the sets of each stay: x [B, L] or [B, L, c], real [B, L] -> [B] or [B, c]."""
    weight = real / real.sum(1, keepdim=True).clamp(min=1)
    return (x * weight.view(*weight.shape, *[1] * (x.dim() - 2))).sum(1)


def statistics_loss(told, true, exists):
    """Returns the mean smooth L1 error of a readout's statistics that exist: [B, Q, k, n] -> [B, Q]."""
    error = F.smooth_l1_loss(told.float(), true, reduction="none") * exists
    return error.sum((2, 3)) / exists.sum((2, 3)).clamp(min=1)


class HistoryReadout(nn.Linear):
    """What h_t must tell linearly of each variable: its history so far and, as a forecast, its future."""

    def __init__(self, config: ModelConfig):
        statistics = len(HISTORY_STATISTICS) + len(FUTURE_STATISTICS)
        super().__init__(config.latent_dim, statistics * config.key_dim)

    def losses(self, h, question: Question, true: Statistics) -> dict[str, torch.Tensor]:
        """h [B, L, d], true: of the question -> name -> [B], means over the sets asked for."""
        keys = question.own_keys
        asked = self(at_slots(h, question.slots)).float().unflatten(-1, (-1, keys.shape[-1]))  # [B, Q, 13, r]
        with torch.autocast("cuda" if h.is_cuda else "cpu", enabled=False):
            answered = asked @ keys.mT[:, None]                                                # [B, Q, 13, n]
        past, future = answered.split((len(HISTORY_STATISTICS), len(FUTURE_STATISTICS)), dim=2)
        losses = {"history": statistics_loss(past, true.past, true.past_exists),
                  "future": statistics_loss(future, true.future, true.future_exists)}
        return {name: masked_mean(loss, question.real) for name, loss in losses.items()}


# ------------------------------------------------------------------------------------------------------------
# Queries: a variable at a later minute
# ------------------------------------------------------------------------------------------------------------

FREEDOM = 4  # of the Student-t: tails as heavy as charted values have them
_LOG_NORM = math.lgamma(FREEDOM / 2) - math.lgamma((FREEDOM + 1) / 2) + math.log(FREEDOM * math.pi) / 2
_LAST, _MEAN, _COUNT = (HISTORY_STATISTICS.index(name) for name in ("last", "mean", "log count"))
KNOWN = len(HISTORY_STATISTICS) + 9  # see `known_of_query`


def known_of_query(past, exists, since, hours, elapsed, clock) -> torch.Tensor:
    """What a query is told beside h and the variable's key, [..., KNOWN]. past, exists [..., 10]: the
    variable's statistics so far. The others are [...], hours: since its last event, to the minute asked for,
    since the stay's first set, and of the day at that minute (NaN: unknown)."""
    seen = exists[..., [_COUNT, _LAST]].float()
    angle = clock * (math.pi / 12)
    times = [hours.log1p(), since.log1p(), (since + hours).log1p(), hours / 24, elapsed.log1p(),
             angle.sin().nan_to_num(), angle.cos().nan_to_num()]
    return torch.cat([past, seen, torch.stack(times, dim=-1)], dim=-1)


def known_at(batch: EventBatch, slots, column, width: int, exact: Statistics, stay, origin, variable, hours
             ) -> torch.Tensor:
    """`known_of_query` of queries, [..., KNOWN]. slots [B, Q], column, width: of `statistics_at`, which gave
    `exact`; of each query, [...]: the stay, the place among the slots of its last known set, the place of its
    variable and the hours from that set."""
    place = stay * slots.shape[1] + origin
    row = place * width + variable
    past, exists = (x.mT.flatten(0, 2)[row] for x in (exact.past, exact.past_exists))           # [..., 10]
    since = hours_since(batch, slots, column, width).flatten()[row]
    minute = at_slots(batch.minute[..., None], slots).flatten()[place]
    elapsed = (minute - batch.minute[stay, 0]).clamp(min=0).div(60).float()
    clock = (batch.clock[stay] + minute / 60 + hours).float()
    return known_of_query(past, exists, since, hours, elapsed, clock)


def student_nll(x, location, log_scale) -> torch.Tensor:
    """The negative log density of a Student-t with FREEDOM degrees of freedom."""
    z = (x - location) * (-log_scale).exp()
    return log_scale + _LOG_NORM + (FREEDOM + 1) / 2 * (z.square() / FREEDOM).log1p()


class QueryReadout(nn.Module):
    """From h at the last known set: what a variable will show at a later minute, as a Student-t distribution
    and its expected value, all normalised. The location leans on the variable's last value and mean by a
    gate; it is robust, as a median is. The expected value, which has the least squared error, is an offset
    from it."""

    def __init__(self, config: ModelConfig, width: int = 256):
        super().__init__()
        self.state = nn.Linear(config.latent_dim, width)
        self.key = nn.Linear(config.key_dim, 2 * width)
        self.known = nn.Linear(KNOWN, width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 4 * config.key_dim)

    def forward(self, state, film, key, known):
        """state [..., w] and film [..., 2w]: `self.state` of h and `self.key` of the key [..., r]; known: see
        `known_of_query` -> location, log scale, expected value, [...] each."""
        gain, shift = film.chunk(2, dim=-1)
        x = F.gelu(torch.addcmul(shift, state + self.known(known), 1 + gain))
        out = self.out(F.gelu(self.hidden(x))).float().unflatten(-1, (4, -1))                    # [..., 4, r]
        location, log_scale, offset, gate = (out * key[..., None, :]).sum(-1).unbind(-1)
        usual = known[..., _MEAN].lerp(known[..., _LAST], gate.sigmoid())    # both 0 where there is no value
        location = location + usual
        return location, log_scale.clamp(-5, 3), location.detach() + offset

    def loss(self, h, batch: EventBatch, question: Question, exact: Statistics, number: int) -> torch.Tensor:
        """h [B, L, d], exact: of the question -> [B], the mean over `number` queries of each stay: the
        negative log likelihood, and half the squared error of the expected value."""
        queries, width = draw_queries(batch, question, number, self.training), question.held.shape[1]
        stay = torch.arange(len(batch), device=h.device)[:, None].expand_as(queries.origin)           # [B, R]
        known = known_at(batch, question.slots, question.column, width, exact, stay, queries.origin,
                         queries.column, queries.hours)
        state = at_slots(self.state(at_slots(h, question.slots)), queries.origin)                  # [B, R, w]
        key, film = (at_slots(x, queries.column) for x in (question.own_keys, self.key(question.own_keys)))
        location, log_scale, expected = self(state, film, key, known)
        loss = student_nll(queries.value, location, log_scale) + (queries.value - expected).square() / 2
        return masked_mean(loss, queries.real)
