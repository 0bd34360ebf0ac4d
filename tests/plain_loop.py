"""The model once more, written as the original implementation works: one stay, one set, one event at a time.

tests/test_model.py compares the batched model's numbers with these, and `--benchmark` its speed.
"""

import itertools
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The model against a plain loop: one set, one stay at a time, as the original implementation works; nothing padded,
# nothing grouped. `--benchmark` times it.
# ----------------------------------------------------------------------------------------------------------------------

def plain_attention(attention, x, y, bias=None):
    return F.multi_head_attention_forward(
        x, y, y, x.shape[1], attention.heads, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0,
        attention.out_proj.weight, attention.out_proj.bias, attn_mask=bias, need_weights=False)[0]


def plain_mab(mab, x, y):
    h = plain_attention(mab.multihead, x, y)
    if not mab.residual:
        return mab.ln2(mab.ff(mab.ln1(h)))
    h = mab.ln1(x + h)
    return mab.ln2(h + mab.ff(h))


def plain_isab(isab, x):
    return plain_mab(isab.mab2, x, plain_mab(isab.mab1, isab.inducing, x))


def plain_points(setvae, events):
    """u_v * value, [n, r], of one set."""
    u = setvae.dim_reducer(setvae.vocabulary[[v for v, _ in events]])
    return u / u.norm(dim=1, keepdim=True) * u.new_tensor([[0.0 if np.isnan(x) else x] for _, x in events])


def plain_encode(setvae, events):
    x = plain_points(setvae, events)
    if setvae.config.presence:
        x = x + setvae.presence(setvae.vocabulary[[v for v, _ in events]])
    x = setvae.embed(x)
    for isab in setvae.encoder_layers:
        x = x + plain_isab(isab, x)
    mu, logvar = setvae.mu_logvar(x.mean(0)).chunk(2)
    return mu, logvar.clamp(-10, 10)


def plain_sinusoids(x):
    """Of every row's place in x [n, d]: [n, d]."""
    n, d = x.shape
    angle = torch.arange(n, device=x.device)[:, None] / 10000 ** (torch.arange(0, d, 2, device=x.device) / d)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def plain_history(history, z, minutes):
    """z [n, d] of one stay -> h [n, d]."""
    n, d = z.shape
    edges = 10 ** np.linspace(np.log10(0.5), np.log10(1440), 63)
    x = F.layer_norm(z + plain_sinusoids(z)
                     + history.gap_embedding.weight[np.searchsorted(edges, np.diff(minutes, prepend=minutes[0]))], (d,))
    minute = z.new_tensor(minutes)
    bias = -history.slope.abs().view(-1, 1, 1) * torch.log1p((minute[:, None] - minute).abs() / history.tau)
    bias = bias.masked_fill(z.new_ones(n, n).triu(1) > 0, -torch.inf)
    for layer in history.layers:
        y = layer.norm1(x)
        x = x + layer.dropout(plain_attention(layer.self_attn, y, y, bias.expand(layer.self_attn.heads, n, n)))
        x = x + layer.dropout(layer.linear2(layer.dropout(F.gelu(layer.linear1(layer.norm2(x))))))
    return history.norm(x)


def plain_slots(decoder, code, n):
    """n reconstructed points [n, r] from code [d]: learned seeds without their noise, or pure noise."""
    x = code.expand(n, -1)
    for level in decoder.decoder_layers:
        seeds = decoder.seeds(plain_sinusoids(x)) if decoder.seeds else torch.randn(x.shape, device=x.device)
        y = F.relu(level.pma.ff(x + plain_isab(level.isab, x)))
        x = x + seeds + level.pma.ln(plain_mab(level.pma.mab, seeds, y))
    return decoder.out(x)


def plain_chamfer(a, b):
    p, q = a[:, None], b[None]
    cost = 1 - F.cosine_similarity(p, q, dim=2) + (p.norm(dim=2) - q.norm(dim=2)).abs() + 3 * (p - q).square().sum(2)
    return cost.min(1).values.mean() + cost.min(0).values.mean() - 0.1 * a.var(0, unbiased=False).mean()


def plain_grid(events):
    """Mean [7], number of events [7] and of values [7] of each variable in one set."""
    values = [np.array([x for v, x in events if v == variable]) for variable in range(7)]
    numbers = [x[~np.isnan(x)] for x in values]
    means = np.array([x.mean() if len(x) else 0 for x in numbers])
    return means, np.array([*map(len, values)]), np.array([*map(len, numbers)])


def plain_statistics(stay):
    """[n, 10, 7], and whether there is one: what each prefix of the stay has shown, by the definition of each
    statistic."""
    out = np.zeros((len(stay), 10, 7))
    exists = np.zeros(out.shape, bool)
    for i, v in itertools.product(range(len(stay)), range(7)):
        shown = np.array([(minute / 1440, *(a[v] for a in plain_grid(events))) for minute, events in stay[:i + 1]])
        if shown[:, 2].any():
            out[i, 7, v], exists[i, 7, v] = np.log1p(shown[:, 2].sum()), True
        if shown[:, 3].any():
            day, x, _, _ = shown[shown[:, 3] > 0].T
            slope = ((day - day.mean()) * (x - x.mean())).mean() / (day.var() + 0.1 ** 2)  # ridge of (0.1 day)^2
            out[i, [0, 1, 2, 3, 4, 5, 6, 8, 9], v] = (x[-1], x[0], x.mean(), x.max(), x.min(), x.std(), slope,
                                                      abs(x[-1]), abs(x.mean()))
            exists[i, :, v] = True
    return out, exists


def plain_future(stay):
    """[n, 3, 7]: what each variable's means in the later sets are on average, at most and at least, and whether there
    is any."""
    out = np.zeros((len(stay), 3, 7))
    exists = np.zeros(out.shape, bool)
    for i, v in itertools.product(range(len(stay)), range(7)):
        later = [mean[v] for mean, _, numbers in (plain_grid(events) for _, events in stay[i + 1:]) if numbers[v]]
        if later:
            out[i, :, v], exists[i, :, v] = (np.mean(later), max(later), min(later)), True
    return out, exists


def plain_keys(setvae):
    """[7, r]."""
    return setvae.vocabulary @ setvae.keys.projection.weight.T + setvae.keys.free.weight


def plain_readout_loss(setvae, code, events):
    value, logit = (plain_keys(setvae) @ mlp(code) for mlp in (setvae.decoder.value, setvae.decoder.measured))
    mean, count, numbers = (torch.tensor(a, dtype=torch.float32) for a in plain_grid(events))
    loss = F.binary_cross_entropy_with_logits(logit, (count > 0).float())
    return loss + F.smooth_l1_loss(value[numbers > 0], mean[numbers > 0]) if numbers.any() else loss


def plain_posterior(setvae, stay):
    """mu, logvar [n, d] of one stay."""
    return (torch.stack(x) for x in zip(*(plain_encode(setvae, events) for _, events in stay)))


def plain_pass(model, stays):
    """Per stay: mu, logvar, h; and the mean reconstruction and KL over sets, then stays."""
    setvae, config, states, losses = model.setvae, model.config, [], []
    for stay in stays:
        mu, logvar = plain_posterior(setvae, stay)
        h = plain_history(model.history, mu, [minute for minute, _ in stay])
        states.append((mu, logvar, h))
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0, 1)).sum(1)
        kl = kl.clamp(min=config.free_bits * config.latent_dim) - config.logvar_bonus * logvar.mean(1)
        if config.decoder == "slots":
            terms = [plain_chamfer(plain_slots(setvae.decoder, h[i], len(events)), plain_points(setvae, events))
                     for i, (_, events) in enumerate(stay)]
        else:
            terms = [plain_readout_loss(setvae, h[i], events) + plain_readout_loss(setvae, mu[i], events)
                     for i, (_, events) in enumerate(stay)]
            told = (model.history_readout(h).view(len(stay), 13, -1) @ plain_keys(setvae).T).split((10, 3), dim=1)
            for mine, (statistics, exists) in zip(told, (plain_statistics(stay), plain_future(stay))):
                for i in np.flatnonzero(exists.any((1, 2))):
                    true = torch.tensor(statistics[i, exists[i]], dtype=torch.float32)
                    terms[i] = terms[i] + F.smooth_l1_loss(mine[i, exists[i]], true)
        losses.append((torch.stack(terms).mean(), kl.mean()))
    return states, [torch.stack(x).mean() for x in zip(*losses)]


def plain_features(model, stay):
    """The stable head input [d] of one stay, from a frozen backbone."""
    mu, logvar = plain_posterior(model.setvae, stay)
    h = plain_history(model.history, model.fused(mu, logvar), [minute for minute, _ in stay])
    return 0.7 * h[-1] + 0.3 * (h @ h[-1]).softmax(0) @ h


def plain_stays(dataset, stays) -> list:
    """Stays as the plain loop takes them: lists of (minute, events), an event being (variable, normalised value)."""
    cohort, lists = dataset.cohort, []
    for p in stays:
        lists.append([])
        for t in range(cohort.stay_start[p], cohort.stay_start[p + 1]):
            events = slice(cohort.set_start[t], cohort.set_start[t + 1])
            variable = dataset.variable[cohort.event_variable[events]]
            value = dataset.normalizer(variable, cohort.event_value[events])
            lists[-1].append((float(cohort.set_minute[t]), list(zip(variable.tolist(), value.tolist()))))
    return lists
