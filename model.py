"""SeqSetVAE: a set-VAE for every charted set, a causal Transformer across the sets of a stay.

`SetVAE` encodes one set of (variable, value) events, history-free. `SeqSetVAEPretrain` adds the history and
trains on reconstruction + KL, without labels. `SeqSetVAE` puts a classification head on the same blocks. The
two share building blocks and nothing else.

Nothing in a step grows with the vocabulary: what depends on a variable is computed for the U variables of a
batch, what is asked of a stay concerns its own, at some of its sets.

Shapes: B stays, S sets, E events, U variables, C measurements of a batch (see `EventBatch`); L sets of its
longest stay, D variables of the stay with the most; Q sets or prediction points that are asked about; M cells
of the padded groups of sets; V variables in all, K of the head; d latent_dim, w set_dim, r reduced_dim or
key_dim, m inducing points."""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from batches import EventBatch, EventSets
from finetune_config import BoostedTrees
from history_statistics import (Question, ask, at_slots, attention_pool, hours_since, prefix_moments,
                                real_sets, statistics_at, summaries, summary_features, variables_of)
from readouts import HistoryReadout, QueryReadout, ReadoutDecoder, VariableKeys, masked_mean
from settings import ModelConfig
from tasks import Binary, Task


# ------------------------------------------------------------------------------------------------------------
# Attention blocks
# ------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Fused multi-head attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * dim, dim)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def project_query(self, x: torch.Tensor) -> torch.Tensor:
        d = x.shape[-1]
        return F.linear(x, self.in_proj_weight[:d], self.in_proj_bias[:d])

    def project_key_value(self, x: torch.Tensor) -> torch.Tensor:
        d = x.shape[-1]
        return F.linear(x, self.in_proj_weight[d:], self.in_proj_bias[d:])  # [..., 2d]

    def attend(self, query, key_value, mask=None):
        """query [G, Nq, d], key_value [G, Nk, 2d], both projected;
        mask broadcastable to [G, heads, Nq, Nk] -> [G, Nq, d], not yet projected."""
        key, value = key_value.unflatten(-1, (2, self.heads, -1)).unbind(-3)       # [G, Nk, heads, d / heads]
        learned = mask is not None and mask.requires_grad  # an additive bias
        if key.shape[1] == 1 and not learned:  # softmax over one key is 1
            value = value.flatten(-2)
            if not torch.is_grad_enabled():
                return value.expand(-1, query.shape[1], -1)
            return value + 0 * query  # its gradient is 0, not none: see `data_parallel`
        query = query.unflatten(-1, (self.heads, -1))
        # On a CPU the fused kernel's backward pass is several times slower in bf16.
        if query.device.type == "cpu" and torch.is_grad_enabled():
            query, key, value = query.float(), key.float(), value.float()
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))        # [G, heads, N, d / heads]
        with torch.autocast("cpu", enabled=False):
            if query.device.type == "cpu" and learned:
                # No fused kernel learns a bias, and the one in PyTorch spends a quarter of its time on rows
                # that attend to nothing.
                bias = mask.expand(-1, self.heads, -1, -1).flatten(0, 1)
                query_, key_, value_ = (x.flatten(0, 1) for x in (query, key, value))
                score = torch.baddbmm(bias, query_, key_.mT, alpha=query.shape[-1]**-0.5)
                out = (score.softmax(-1) @ value_).view(query.shape)
            else:
                out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).flatten(-2)


class MAB(nn.Module):
    """Multihead attention block. `residual`: LN(H + FF(H)), H = LN(X + MHA(X, Y)) (Lee et al. 2019, eq. 6-7);
    without: LN(FF(LN(MHA(X, Y)))).

    Works on groups of sets (see `EventBatch`): everything but the attention itself is dense over the cells of
    all groups at once."""

    def __init__(self, dim: int, heads: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.multihead = Attention(dim, heads)
        self.ln1 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.ln2 = nn.LayerNorm(dim)

    def forward(self, x, y, groups, masks=None):
        """x: cells that attend, [sum S_k * Nx_k, d], or [n, d], the same n queries for every set; y: cells
        attended to, [sum S_k * Ny_k, d]; groups: k of (S_k, Nx_k, Ny_k); masks: k of [S_k, 1, 1, Ny_k], True
        where attended -> [sum S_k * Nx_k, d]."""
        query, key_value = self.multihead.project_query(x), self.multihead.project_key_value(y)
        shared = len(x) != sum(s * nx for s, nx, _ in groups)
        queries = [query] * len(groups) if shared else query.split([s * nx for s, nx, _ in groups])
        keys_values = key_value.split([s * ny for s, _, ny in groups])
        attended = []
        for q, kv, mask, (s, nx, ny) in zip(queries, keys_values, masks or [None] * len(groups), groups):
            q = q.expand(s, -1, -1) if shared else q.unflatten(0, (s, nx))                  # [S_k, Nx_k, d]
            attended.append(self.multihead.attend(q, kv.unflatten(0, (s, ny)), mask).flatten(0, 1))
        h = self.multihead.out_proj(torch.cat(attended))
        if not self.residual:
            return self.ln2(self.ff(self.ln1(h)))
        h = self.ln1(h.unflatten(0, (-1, len(x))).add(x).flatten(0, 1) if shared else x + h)
        return self.ln2(h + self.ff(h))


class ISAB(nn.Module):
    """Induced set attention block: m learned points attend to the set,
    the set attends to them (Lee et al. 2019, eq. 9-10)."""

    def __init__(self, dim: int, heads: int, inducing: int, residual: bool):
        super().__init__()
        self.inducing = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inducing, dim)))
        self.mab1 = MAB(dim, heads, residual)
        self.mab2 = MAB(dim, heads, residual)

    def forward(self, x, groups, masks=None):
        """x [M, d], groups: k of (S_k, N_k) -> [M, d]."""
        m = len(self.inducing)
        summary = self.mab1(self.inducing, x, [(s, m, n) for s, n in groups], masks)   # [S * m, d]
        return self.mab2(x, summary, [(s, n, m) for s, n in groups])


class TransformerLayer(nn.Module):
    """Pre-norm layer, its parameters named as in `nn.TransformerEncoderLayer` (which misreads a mask)."""

    def __init__(self, dim: int, heads: int, ff_dim: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, ff_dim), nn.Linear(ff_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x, bias, past=None):
        """x [B, n, d] of the last n of L sets; bias [B, heads or 1, n, L], or of long stays the function that
        gives its rows (see `attend_in_blocks`); past: keys and values of the L - n sets before, to which
        those of these are added (None: n is L)."""
        y = self.norm1(x)
        key_value = self.self_attn.project_key_value(y)
        if past:
            key_value = past.append(key_value)
        attend = partial(attend_in_blocks, self.self_attn) if callable(bias) else self.self_attn.attend
        y = attend(self.self_attn.project_query(y), key_value, bias)
        x = x + self.dropout(self.self_attn.out_proj(y))
        return x + self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(self.norm2(x))))))


LONG_STAY, QUERY_BLOCK = 1024, 256  # sets


def attend_in_blocks(attention: Attention, query, key_value, bias):
    """`attention.attend` of stays with themselves, causal, a block of queries after another, so that memory
    grows with L and not with its square; for a gradient each block is computed again. bias(first, end) -> [B,
    heads or 1, end - first, end]."""
    def attend(block, first):
        end = first + block.shape[1]
        return attention.attend(block, key_value[:, :end], bias(first, end))
    # The last block is the largest: taken first, it leaves room in the heap for all others.
    blocks = [checkpoint(attend, block, i * QUERY_BLOCK, use_reentrant=False, preserve_rng_state=False)
              for i, block in reversed([*enumerate(query.split(QUERY_BLOCK, dim=1))])]
    return torch.cat(blocks[::-1], dim=1)


def event_masks(batch: EventSets) -> list[torch.Tensor]:
    """k of [S_k, 1, 1, N_k] bool: True where a cell of the group holds an event."""
    real = batch.token_event < len(batch.event_value)                                                 # [M]
    parts = real.split([s * n for s, n in batch.groups])
    return [part.view(s, 1, 1, n) for part, (s, n) in zip(parts, batch.groups)]


def sinusoids(index: torch.Tensor, dim: int) -> torch.Tensor:
    """[..., dim] sinusoidal code of integer positions (Vaswani et al. 2017, section 3.5)."""
    frequency = torch.exp(torch.arange(0, dim, 2, device=index.device) * (-math.log(10000.0) / dim))
    angle = index[..., None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


# ------------------------------------------------------------------------------------------------------------
# The decoder of the original: a set of points
# ------------------------------------------------------------------------------------------------------------

class SlotPooling(nn.Module):
    """Pooling by multihead attention (Lee et al. 2019, eq. 11) to as many slots as a set has events."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mab = MAB(config.latent_dim, config.set_heads, config.mab_residual)
        self.ff = nn.Linear(config.latent_dim, config.latent_dim)
        self.ln = nn.LayerNorm(config.latent_dim)

    def forward(self, seeds, x, groups, masks):
        return self.ln(self.mab(seeds, F.relu(self.ff(x)), [(s, n, n) for s, n in groups], masks))


class SlotLevel(nn.Module):
    """An attentive bottleneck level: ISAB over the slots so far, then pooling to new slots at the seeds."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.isab = ISAB(config.latent_dim, config.set_heads, config.inducing, config.mab_residual)
        self.pma = SlotPooling(config)

    def forward(self, x, seeds, groups, masks):
        """x, seeds [M, d] -> [M, d]."""
        return seeds + self.pma(seeds, x + self.isab(x, groups, masks), groups, masks)


class SlotDecoder(nn.Module):
    """The original's decoder: from a code and a number of events to a set of points in the reduced space."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.noise_std, self.dim = config.noise_std, config.latent_dim
        # Of the slot's sinusoidal index.
        self.seeds = nn.Linear(config.latent_dim, config.latent_dim) if config.learned_seeds else None
        self.decoder_layers = nn.ModuleList(SlotLevel(config) for _ in range(config.levels))
        self.out = nn.Linear(config.latent_dim, config.reduced_dim)

    def _seeds(self, groups, device):
        """[M, d] learned seeds (plus noise in training); or pure noise at every call, as in the original."""
        m = sum(s * n for s, n in groups)
        if self.seeds is None:
            return torch.randn(m, self.dim, device=device)
        index = torch.cat([torch.arange(n, device=device).repeat(s) for s, n in groups])
        seeds = self.seeds(sinusoids(index, self.dim))
        return seeds + self.noise_std * torch.randn(m, self.dim, device=device) if self.training else seeds

    def forward(self, code, groups, masks):
        """code [S, d] in group order, masks: k of [S_k, 1, 1, N_k] -> [M, r]."""
        x = torch.cat([c[:, None].expand(-1, n, -1).flatten(0, 1)
                       for c, (_, n) in zip(code.split([s for s, _ in groups]), groups)])
        for level in self.decoder_layers:
            x = x + level(x, self._seeds(groups, code.device), groups, masks)
        return self.out(x)


# ------------------------------------------------------------------------------------------------------------
# Losses, each the mean over the sets of every stay, [B], in float32; then averaged over stays
# ------------------------------------------------------------------------------------------------------------

def kl_divergence(mu, logvar, free_bits: float = 0.0, logvar_bonus: float = 0.0):
    """KL(N(mu, exp logvar) || N(0, 1)) a set (Kingma & Welling 2014, appendix B),
    at least free_bits * d (Kingma et al. 2016): [..., d] -> [...]."""
    kl = 0.5 * (logvar.exp() + mu.square() - 1 - logvar).sum(-1)
    return kl.clamp(min=free_bits * mu.shape[-1]) - logvar_bonus * logvar.mean(-1)


def chamfer_loss(reconstruction, x, batch: EventBatch):
    """Weighted Chamfer distance of each set: direction (1 - cosine) + magnitude + 3 * squared distance, minus
    0.1 * variance of the reconstruction. reconstruction [M, r], x [M, r] in cells of the groups -> [S], in
    the groups' order."""
    losses, sizes = [], [s * n for s, n in batch.groups]
    parts = zip(reconstruction.split(sizes), x.split(sizes), event_masks(batch), batch.groups)
    for a, b, mask, (s, n) in parts:
        a, b, real = a.view(s, n, -1), b.view(s, n, -1), mask.view(s, n)
        count = real.sum(1).clamp(min=1)
        product = a @ b.mT                                                                    # [s, n, n]
        size_a, size_b = (x.square().sum(-1, keepdim=True).add(1e-12).sqrt() for x in (a, b))
        size_b = size_b.mT                                                         # [s, n, 1] and [s, 1, n]
        squared = (size_a.square() + size_b.square() - 2 * product).clamp(min=0)
        direction = 1 - product / (size_a * size_b).clamp(min=1e-6)
        cost = direction + (size_a - size_b).abs() + 3 * squared
        cost = cost.masked_fill(~(real[:, :, None] & real[:, None]), 1e9)
        forth, back = ((cost.amin(axis) * real).sum(1) / count for axis in (2, 1))
        weight = real[..., None] / count[:, None, None]
        variance = ((a - (a * weight).sum(1, keepdim=True)).square() * weight).sum((1, 2)) / a.shape[-1]
        losses.append(forth + back - 0.1 * variance)
    return torch.cat(losses)


# ------------------------------------------------------------------------------------------------------------
# SetVAE
# ------------------------------------------------------------------------------------------------------------

class SetVAE(nn.Module):
    """Variational autoencoder of one set of events, history-free.
    Its decoder is the one that the sequence models use on h_t."""

    def __init__(self, config: ModelConfig, vocabulary: torch.Tensor):
        """vocabulary: [V, input_dim], one (frozen) vector a variable."""
        super().__init__()
        self.config = config
        w, d = config.set_dim, config.latent_dim
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        self.dim_reducer = nn.Linear(config.input_dim, config.reduced_dim)
        self.presence = nn.Linear(config.input_dim, config.reduced_dim) if config.presence else None
        self.embed = nn.Sequential(nn.Linear(config.reduced_dim, w), nn.LayerNorm(w), nn.GELU())
        self.encoder_layers = nn.ModuleList(ISAB(w, config.set_heads, config.inducing, config.mab_residual)
                                            for _ in range(config.levels))
        self.mu_logvar = nn.Sequential(nn.Linear(w, d), nn.LayerNorm(d), nn.GELU(), nn.Dropout(0.1),
                                       nn.Linear(d, 2 * d))
        self.decoder = ReadoutDecoder(config) if config.decoder == "readout" else SlotDecoder(config)
        self.keys = VariableKeys(config) if config.decoder == "readout" else None

    def embed_events(self, batch: EventSets, presence: bool = True) -> torch.Tensor:
        """x = u_v * value (+ p_v) of every cell of the groups: [M, r], zeros in padding.
        Each variable is projected once."""
        vectors = self.vocabulary[batch.variables]                                            # [U, input_dim]
        direction = F.normalize(self.dim_reducer(vectors).float(), dim=-1)                           # [U, r]
        x = F.embedding(batch.event_variable, direction) * batch.event_value[:, None]                # [E, r]
        if presence and self.presence is not None:
            x = x + F.embedding(batch.event_variable, self.presence(vectors))
        return F.embedding(batch.token_event, F.pad(x, (0, 0, 0, 1)))                   # row E is the padding

    def _pooled_levels(self, batch: EventSets, drop_events: float = 0.0):
        """Yield the mean over its events of every set after each level, [S, w] in the groups' order."""
        masks = event_masks(batch)
        if drop_events:
            masks = [mask & (torch.rand(mask.shape, device=mask.device) >= drop_events) for mask in masks]
        counts = [mask.sum(-1, keepdim=True) for mask in masks]
        weights = [(mask / count.clamp(min=1)).flatten(1).unsqueeze(-1)
                   for mask, count in zip(masks, counts)]                                 # k of [S_k, N_k, 1]
        # An empty set attends to its padding; its mean is 0.
        masks = [mask | (count == 0) for mask, count in zip(masks, counts)]
        x = self.embed(self.embed_events(batch))                                                     # [M, w]
        for layer in self.encoder_layers:
            x = x + layer(x, batch.groups, masks)
            yield torch.cat([(part.view(s, n, -1) * weight).sum(1) for part, weight, (s, n)
                             in zip(x.split([s * n for s, n in batch.groups]), weights, batch.groups)])

    def _posterior(self, pooled, batch):
        # [B, L, 2d], zeros in padding
        mu_logvar = F.embedding(batch.slot_set, F.pad(self.mu_logvar(pooled).float(), (0, 0, 0, 1)))
        mu, logvar = mu_logvar.chunk(2, dim=-1)
        return mu, logvar.clamp(-10, 10)

    def encode(self, batch: EventSets, drop_events: float = 0.0):
        """Posterior of every set, from the last level: mu, logvar [B, L, d], float32."""
        *_, pooled = self._pooled_levels(batch, drop_events)
        return self._posterior(pooled, batch)

    @staticmethod
    def sample(mu, logvar):
        """Reparameterised z ~ N(mu, exp(logvar)) (Kingma & Welling 2014)."""
        return mu + torch.randn_like(mu) * (0.5 * logvar).exp()

    def keys_of(self, variables):
        """Keys [n, r] of the variables with these indices [n]."""
        return self.keys(self.vocabulary[variables], variables)

    def decode(self, code, batch: EventBatch):
        """code [B, L, d] -> values and measurement logits of each stay's own variables, [B, L, D] (readout),
        or reconstructed cells [M, r] (slots)."""
        if self.config.decoder == "readout":
            return self.decoder(code, F.embedding(batch.stay_variables, self.keys_of(batch.variables)))
        code = F.embedding(batch.group_slot, code.flatten(0, 1))                                  # [S, d]
        return self.decoder(code, batch.groups, event_masks(batch))

    def ask(self, batch: EventBatch) -> Question:
        """What the read-outs of a training step, or of an evaluation, are asked for. The fixed order of
        variables is that of their vectors' first entries, which is arbitrary."""
        return ask(batch, self.config, self.vocabulary[:, 0], self.training, self.keys_of)

    def reconstruction_losses(self, code, batch: EventBatch, question: Question | None) -> dict:
        """The terms of the reconstruction of every set from `code` [B, L, d]: name -> [B], means over sets.
        With the readout decoder each measured value given its variable (smooth L1), and at the sets of the
        `question` which variables were measured (cross-entropy)."""
        if self.config.decoder == "slots":
            points = self.embed_events(batch, presence=False)                                     # [M, r]
            chamfer = chamfer_loss(self.decode(code, batch).float(), points, batch)               # [S]
            return {"chamfer": masked_mean(F.pad(chamfer, (0, 1))[batch.slot_set], real_sets(batch))}
        slots = batch.minute.numel()
        own = F.embedding(batch.cell_slot, self.decoder.value(code).float().flatten(0, 1))           # [C, r]
        read = (own * F.embedding(batch.stay_variables.flatten()[batch.cell_pair], question.keys)).sum(-1)
        error = F.smooth_l1_loss(read, batch.cell_value, reduction="none") * batch.cell_valued
        error, number = (x.new_zeros(slots).index_add(0, batch.cell_slot, x).view(batch.minute.shape)
                         for x in (error, batch.cell_valued.float()))
        value = masked_mean(error / number.clamp(min=1), real_sets(batch))
        return {"value": value, "measured": self._measured_loss(code, question)}

    def _measured_loss(self, code, question: Question):
        """Mean cross-entropy of whether each variable of the question was measured in each set, [B]."""
        query = self.decoder.measured(at_slots(code, question.slots)).float()                     # [B, Q, r]
        held = question.held[:, None]                                                             # [B, 1, n]
        with torch.autocast("cuda" if query.is_cuda else "cpu", enabled=False):
            own, other = query @ question.own_keys.mT, query @ question.other_keys.T    # [B, Q, n], [B, Q, o]
        loss = (F.binary_cross_entropy_with_logits(own, question.measured, reduction="none") * held).sum(-1)
        loss = loss + (F.softplus(other) * question.absent[:, None]).sum(-1)
        return masked_mean(loss / (held.sum(-1) + question.absent.sum(-1)[:, None]), question.real)

    def forward(self, batch: EventBatch):
        """(decoded, z_list): the reconstruction from z of the last level (sampled in training, mu in
        evaluation); (z, mu, logvar) of every level."""
        z_list = []
        for pooled in self._pooled_levels(batch):
            mu, logvar = self._posterior(pooled, batch)
            z_list.append((self.sample(mu, logvar) if self.training else mu, mu, logvar))
        return self.decode(z_list[-1][0], batch), z_list

    def kl(self, mu, logvar, batch: EventBatch):
        """The KL term: mean over sets, then stays, []."""
        kl = kl_divergence(mu, logvar, self.config.free_bits, self.config.logvar_bonus)
        return masked_mean(kl, real_sets(batch)).mean()


# ------------------------------------------------------------------------------------------------------------
# History
# ------------------------------------------------------------------------------------------------------------

class History(nn.Module):
    """Causal Transformer over the sets of a stay; a bias falls with the time between two sets."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.latent_dim
        self.layers = nn.ModuleList(TransformerLayer(d, config.heads, config.ff_dim, config.dropout)
                                    for _ in range(config.layers))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.gap_embedding = nn.Embedding(64, d)
        nn.init.normal_(self.gap_embedding.weight, std=0.02)
        edges = torch.logspace(math.log10(0.5), math.log10(1440), 63)  # minutes
        self.register_buffer("gap_edges", edges, persistent=False)
        slope = 0.5 * 0.5 ** torch.arange(config.heads) if config.slope_per_head else torch.tensor(1.0)
        self.slope = nn.Parameter(slope)
        self.tau = nn.Parameter(torch.tensor(60.0))  # minutes

    def time_bias(self, minute: torch.Tensor, first: int = 0, end: int | None = None) -> torch.Tensor:
        """minute [B, L] -> additive attention bias [B, heads or 1, L, L]: -slope * log1p((t_i - t_j) / tau)
        for j <= i, else -inf; or its rows `first` to `end`, which see no set after `end`."""
        apart = (minute[:, None, first:end, None] - minute[:, None, None, :end]).clamp(min=0).float()
        distance = torch.log1p(apart / self.tau.abs().clamp(min=1.0))                           # [B, 1, L, L]
        future = torch.full(apart.shape[-2:], -math.inf, device=minute.device).triu(1 + first)
        return torch.addcmul(future, self.slope.abs().view(-1, 1, 1), distance, value=-1)

    def forward(self, z, minute, past: list | None = None):
        """z [B, n, d] of the last n sets, minute [B, L] of all -> h [B, n, d]. Later sets never reach earlier
        ones; a stay's padding lies after its last set. past: of every layer, see `TransformerLayer`."""
        n, length = z.shape[1], minute.shape[1]
        gap = F.pad(minute.diff(dim=1), (1, 0))[:, length - n:].clamp(min=0).float()
        position = sinusoids(torch.arange(length - n, length, device=z.device), z.shape[-1])          # [n, d]
        x = z + position + self.gap_embedding(torch.bucketize(gap, self.gap_edges))
        x = F.layer_norm(x, x.shape[-1:])
        bias = self.time_bias(minute, length - n) if n <= LONG_STAY else partial(self.time_bias, minute)
        for layer, cache in zip(self.layers, past or [None] * len(self.layers)):
            x = layer(x, bias, cache)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------------------
# Pretraining: reconstruction + KL, without labels
# ------------------------------------------------------------------------------------------------------------

class Backbone(nn.Module):
    """What pretraining and the classifier share: set-VAE, history and, with the readout decoder, the readouts
    of the history so far, the stay's future and a variable at a later minute."""

    def __init__(self, config: ModelConfig, vocabulary: torch.Tensor, hides_sets: bool):
        super().__init__()
        self.config = config
        self.setvae = SetVAE(config, vocabulary)
        self.history = History(config)
        if config.decoder == "readout":
            self.history_readout = HistoryReadout(config)
        if config.queries:
            self.query_readout = QueryReadout(config)
        if hides_sets and config.hide_sets:
            self.mask_token = nn.Parameter(0.02 * torch.randn(config.latent_dim))

    def fused(self, mu, logvar):
        """z that goes to the Transformer, [..., d]."""
        return mu

    def encode(self, batch: EventBatch):
        """mu, logvar, z and h, each [B, L, d]. In training some events are hidden from the encoder, and some
        sets from the history behind a learned mask token: their h must carry the history."""
        config, training = self.config, self.setvae.training
        mu, logvar = self.setvae.encode(batch, config.drop_events if training else 0.0)
        z = shown = self.fused(mu, logvar)
        if training and config.hide_sets:
            hidden = torch.rand(*z.shape[:2], 1, device=z.device) < config.hide_sets
            shown = torch.where(hidden, self.mask_token, z)
        return mu, logvar, z, self.history(shown, batch.minute)

    def forecasting(self, batch: EventBatch):
        """h [B, L, d] as its queries were learned from it: a frozen backbone's of mu, as in pretraining."""
        mu, logvar = self.setvae.encode(batch)
        return self.history(mu if self.config.classification_only else self.fused(mu, logvar), batch.minute)

    def sequence_losses(self, h, batch: EventBatch) -> tuple[dict, Question | None]:
        """The losses of h [B, L, d], name -> [B]: reconstruction and, with the readouts, history, future and
        (weighted) queries; and what the readouts were asked."""
        if self.config.decoder == "slots":
            return self.setvae.reconstruction_losses(h, batch, None), None
        question, config = self.setvae.ask(batch), self.config
        exact = statistics_at(batch, question.slots, question.column, question.held.shape[1])
        terms = self.setvae.reconstruction_losses(h, batch, question)
        terms |= self.history_readout.losses(h, question, exact)
        if config.queries:
            loss = self.query_readout.loss(h, batch, question, exact, config.queries)
            terms["queries"] = config.query_weight * loss
        return terms, question


class SeqSetVAEPretrain(Backbone):
    """Set-VAE + history, trained to reconstruct every set (and, with the readout decoder, the history so far,
    the stay's future and variables at later minutes) from h_t. Only mu goes to the Transformer. The loss also
    asks for the sets and events that are hidden in training."""

    def __init__(self, config: ModelConfig, vocabulary: torch.Tensor):
        super().__init__(config, vocabulary, hides_sets=True)

    def forward(self, batch: EventBatch, beta: float) -> dict[str, torch.Tensor]:
        """The loss and its terms (scalars, float32, means over sets, then stays), and mu [B, L, d]."""
        setvae = self.setvae
        mu, logvar, _, h = self.encode(batch)
        terms, question = self.sequence_losses(h, batch)
        if question and self.config.sample_z:
            code = setvae.sample(mu, logvar) if self.training else mu
            own = setvae.reconstruction_losses(code, batch, question)
            terms |= {f"set_{name}": term for name, term in own.items()}
        terms = {name: term.mean() for name, term in terms.items()}
        reconstruction, kl = sum(terms.values()), setvae.kl(mu, logvar, batch)
        loss = reconstruction + beta * kl
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl, **terms, "mu": mu}


# ------------------------------------------------------------------------------------------------------------
# Finetuning: a classification head on the same blocks
# ------------------------------------------------------------------------------------------------------------

def classification_head(features: int, widths: tuple, classes: int) -> nn.Sequential:
    """Hidden layers of Linear, LayerNorm, ReLU, Dropout, then the classes; Xavier initialised,
    a linear head at zero (it is convex)."""
    layers = []
    for i, width in enumerate(widths):
        dropout = nn.Dropout(0.2 if i < 2 else 0.1)
        layers += [nn.Linear(features, width), nn.LayerNorm(width), nn.ReLU(), dropout]
        features = width
    head = nn.Sequential(*layers, nn.Linear(features, classes))
    for layer in head:
        if isinstance(layer, nn.Linear):
            (nn.init.xavier_uniform_ if widths else nn.init.zeros_)(layer.weight)
            nn.init.zeros_(layer.bias)
    return head


class GatedFusion(nn.Module):
    """Learned fusion of mu and std (full training): g * A(mu) + (1 - g) * B(std), g = sigmoid(W [A(mu);
    B(std)]), times 1 + 0.1 * c(std).

    It starts as mu (A the identity, B zero, g near 1), on which the Transformer was pretrained."""

    def __init__(self, dim: int):
        super().__init__()
        self.mean_projection, self.var_projection = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.fusion_gate = nn.Sequential(nn.Linear(2 * dim, dim), nn.Sigmoid())
        self.uncertainty_calibration = nn.Sequential(
            nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, 1))
        nn.init.eye_(self.mean_projection.weight)
        nn.init.normal_(self.var_projection.weight, std=0.01)
        nn.init.normal_(self.fusion_gate[0].weight, std=0.01)
        nn.init.constant_(self.fusion_gate[0].bias, 4.0)
        for layer in (self.mean_projection, self.var_projection, self.uncertainty_calibration[2]):
            nn.init.zeros_(layer.bias)

    def forward(self, mu, logvar):
        std = (0.5 * logvar).exp()
        a, b = self.mean_projection(mu), self.var_projection(std)
        gate = self.fusion_gate(torch.cat([a, b], dim=-1))
        return (gate * a + (1 - gate) * b) * (1 + 0.1 * self.uncertainty_calibration(std))


class AttentionPool(nn.Module):
    """Full training: the h of a point attends to all h of the stay up to it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention_pool = Attention(dim, heads)

    def forward(self, key_value, last, slots):
        """key_value [B, L, 2d], projected from h by `attention_pool`, last h [B, Q, d] of the sets at slots
        [B, Q] -> [B, Q, d]."""
        pool = self.attention_pool
        reached = torch.arange(key_value.shape[1], device=last.device) <= slots[..., None]         # [B, Q, L]
        return pool.out_proj(pool.attend(pool.project_query(last), key_value, reached[:, None]))


class SeqSetVAE(Backbone):
    """Classifier on the set-VAE and its history. `config.classification_only`: the backbone is frozen and
    stays in evaluation mode; otherwise everything trains on classification + reconstruction + KL."""

    BACKBONE = ("setvae.", "history.", "history_readout.", "query_readout.", "mask_token")

    def __init__(self, config: ModelConfig, vocabulary: torch.Tensor, task: Task = Binary()):
        super().__init__(config, vocabulary, hides_sets=not config.classification_only)
        self.task, d = task, config.latent_dim
        if not config.classification_only:
            if config.fuse:
                self.vae_feature_fusion = GatedFusion(d)
            self.feature_fusion = AttentionPool(d, config.heads)
            self.feature_projection = nn.Sequential(nn.Linear(3 * d, d), nn.LayerNorm(d))
        # What the summaries are of (see `train.py`).
        self.register_buffer("head_variables", torch.arange(config.head_variables))
        # All that reaches the head untrained is standardised, with statistics of the training points (see
        # `train.py`).
        features = self.feature_sizes()
        standardised = features["learned"] + features["summaries"]
        self.register_buffer("feature_mean", torch.zeros(standardised))
        self.register_buffer("feature_std", torch.ones(standardised))
        widths = (d, d // 2, d // 4) if config.head_widths is None else config.head_widths
        self.cls_head = classification_head(sum(features.values()), widths, config.classes)
        if config.hidden_width and not config.classification_only:
            self.hidden_head = nn.Sequential(
                nn.Dropout(0.1), nn.Linear(sum(features.values()), config.hidden_width), nn.GELU(),
                nn.Dropout(0.3), nn.Linear(config.hidden_width, config.classes))
            nn.init.zeros_(self.hidden_head[-1].weight)
            nn.init.zeros_(self.hidden_head[-1].bias)
        self.trees, ensembles = None, task.ensembles
        if config.head_trees and ensembles:
            self.trees = BoostedTrees(config.head_trees, config.tree_depth, ensembles)
        # The share of each ensemble in its logits.
        self.register_buffer("trees_share", torch.full((ensembles,) if ensembles > 1 else (), 0.5),
                             persistent=bool(config.head_trees))
        if config.classification_only:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(not name.startswith(self.BACKBONE))

    def feature_sizes(self) -> dict[str, int]:
        """Numbers of head inputs: the trained projection is "plain", the others are standardised."""
        config, d = self.config, self.config.latent_dim
        return {"plain": 0 if config.classification_only else d,
                "learned": 8 * d if config.features == "multiscale" else d,
                "summaries": summary_features(config.head_variables) if config.summaries else 0}

    def train(self, mode: bool = True):
        """Keep the frozen backbone in evaluation mode."""
        super().train(mode)
        if self.config.classification_only:
            self.setvae.eval()
            self.history.eval()
        return self

    def fused(self, mu, logvar):
        """z that goes to the Transformer, [..., d]. Without parameters (classification only): with w =
        sigmoid(1 - mean(std)), w * mu * (1 + 0.05 tanh(std)) + (1 - w) * mu; in full training the learned
        gate; mu alone where the config says so."""
        if not self.config.fuse:
            return mu
        if not self.config.classification_only:
            return self.vae_feature_fusion(mu, logvar)
        std = (0.5 * logvar).exp()
        w = torch.sigmoid(1 - std.mean(-1, keepdim=True))
        return w * mu * (1 + 0.05 * torch.tanh(std)) + (1 - w) * mu

    def features_of(self, z, h, batch):
        """All that reaches the head at the batch's prediction points, [B, Q, F], not yet standardised."""
        exact = self.exact_summaries(batch) if self.config.summaries else None
        return self.head_input(z.float(), h.float(), batch.point_slot, exact)

    def head_input(self, z, h, slots, exact, key_value=None):
        """The head input [B, Q, F] at the sets `slots` [B, Q], from no later set. Of h [B, L, d]: stable
        [B, Q, d] = 0.7 * last + 0.3 * attention pool, or multiscale [B, Q, 4d] = last, attention pool, mean,
        max, beside [B, Q, 4d] of z. Full training: before them a projection [B, Q, d] of mean, max and
        learned attention pool, whose keys and values are `key_value` [B, L, 2d] (None: yet to be projected).
        After them the `summaries` of what was measured (None: left out)."""
        config, last = self.config, at_slots(h, slots)                                            # [B, Q, d]
        attention = attention_pool(h, last, slots)
        multiscale, features = config.features == "multiscale", []
        if multiscale or not config.classification_only:
            pools = prefix_moments(h, slots)[:2]                                                  # mean, max
        if not config.classification_only:
            if key_value is None:
                key_value = self.feature_fusion.attention_pool.project_key_value(h)
            pooled = self.feature_fusion(key_value, last, slots)
            features.append(self.feature_projection(torch.cat([*pools, pooled], dim=-1)))
        if multiscale:
            features += [last, attention, *pools, *prefix_moments(z, slots)]
        else:
            features.append(0.7 * last + 0.3 * attention)
        if exact is not None:
            features.append(exact)
        return torch.cat(features, dim=-1)

    def exact_summaries(self, batch: EventBatch) -> torch.Tensor:
        """The `summaries` of the head's variables at the batch's prediction points."""
        size, device = self.config.head_variables, batch.minute.device
        slots = batch.point_slot.masked_fill(batch.point < 0, batch.minute.shape[1])
        listed = torch.full((self.config.num_variables,), size, device=device)
        listed[self.head_variables] = torch.arange(size, device=device)
        mine, held = variables_of(batch)
        asked = batch, slots, listed[mine].masked_fill(~held, size), size
        return summaries(statistics_at(*asked), hours_since(*asked), batch.point_hours)

    def features(self, batch: EventBatch) -> torch.Tensor:
        """Head input of every prediction point before standardisation, [B, Q, F].
        Of a frozen backbone it never changes: compute it once."""
        _, _, z, h = self.encode(batch)
        return self.features_of(z, h, batch)

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., F], as `features` gives them -> the input of the head, [..., F]."""
        plain, rest = features.tensor_split([self.feature_sizes()["plain"]], dim=-1)
        return torch.cat([plain, ((rest - self.feature_mean) / self.feature_std).clamp(-5, 5)], dim=-1)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., F], as `features` gives them -> logits [..., classes]: in training the head's alone
        (no gradient passes a tree), in evaluation the mean with its trees', which have `trees_share`."""
        x = self.standardise(features)
        logits = self.cls_head(x)
        if hasattr(self, "hidden_head"):
            logits = logits + self.hidden_head(x)
        if self.training or self.trees is None:
            return logits
        return logits.lerp(self.task.tree_logits(self.trees(self.tree_input(x))), self.trees_part())

    def trees_part(self) -> torch.Tensor:
        """The share of the trees in each logit, [classes]."""
        return self.trees_share.view(-1, 1).expand(-1, self.task.outputs // self.task.ensembles).flatten()

    def tree_input(self, x):
        """x [..., F], standardised -> its exact summaries: the trees see what no training changes."""
        return x[..., x.shape[-1] - self.feature_sizes()["summaries"]:]

    def forward(self, batch: EventBatch, losses: bool = False):
        """Logits, see `classify`; or `losses`, because DistributedDataParallel calls `forward` alone."""
        return self.losses(batch) if losses else self.classify(self.features(batch))

    def losses(self, batch: EventBatch) -> dict[str, torch.Tensor]:
        """Full training: logits (see `classify`), reconstruction and KL of one pass."""
        mu, logvar, z, h = self.encode(batch)
        logits = self.classify(self.features_of(z, h, batch))
        terms, _ = self.sequence_losses(h, batch)
        reconstruction, kl = sum(terms.values()).mean(), self.setvae.kl(mu, logvar, batch)
        return {"logits": logits, "reconstruction": reconstruction, "kl": kl}
