"""What a code must tell of each variable: its value in the set and whether it was measured, the stay's history so
far, and its future. A read-out meets the variable's key, so that nothing grows with the vocabulary.

Shapes as in model.py."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from batches import EventBatch
from history_statistics import FUTURE_STATISTICS, HISTORY_STATISTICS, Question, at_slots, statistics_at
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

    def losses(self, h, batch: EventBatch, question: Question) -> dict[str, torch.Tensor]:
        """h [B, L, d] -> name -> [B], means over the sets asked for."""
        keys = question.own_keys
        true = statistics_at(batch, question.slots, question.column, keys.shape[1])
        asked = self(at_slots(h, question.slots)).float().unflatten(-1, (-1, keys.shape[-1]))  # [B, Q, 13, r]
        with torch.autocast("cuda" if h.is_cuda else "cpu", enabled=False):
            answered = asked @ keys.mT[:, None]                                                # [B, Q, 13, n]
        past, future = answered.split((len(HISTORY_STATISTICS), len(FUTURE_STATISTICS)), dim=2)
        losses = {"history": statistics_loss(past, true.past, true.past_exists),
                  "future": statistics_loss(future, true.future, true.future_exists)}
        return {name: masked_mean(loss, question.real) for name, loss in losses.items()}
