"""Queries: what a variable will show at a later minute."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batches import Normalizer, StayDataset
from data import InputError
from history_statistics import draw_queries
from model import SeqSetVAEPretrain
from readouts import FREEDOM, student_nll
from settings import ModelConfig
from tests.plain_loop import close, plain_grid, plain_keys, plain_pass, plain_statistics
from tests.tiny import PLAIN, batch_of, build, cohort_of, random_stays, tiny


def drawn(model, batch, sample=False, number=40):
    question = model.setvae.ask(batch)
    return question, draw_queries(batch, question, number, sample)


@pytest.mark.parametrize("sample", [False, True])
def test_a_query_asks_for_a_later_measurement_of_its_stay(sample):
    stays = random_stays((1, 4, 9, 6), valueless=0.2)
    batch, model = batch_of(stays), build(SeqSetVAEPretrain, tiny(queries=40))
    torch.manual_seed(0)
    question, queries = drawn(model, batch, sample)
    assert not queries.real[0].any() and queries.real[1:].float().mean() > 0.3  # one set has no later one
    own = batch.variables[batch.stay_variables]
    for b, r in queries.real.nonzero().tolist():
        origin = question.slots[b, queries.origin[b, r]].item()
        variable = own[b][question.column[b] == queries.column[b, r]].item()
        wanted = stays[b][origin][0] + 60 * queries.hours[b, r].item()
        later = {minute: plain_grid(events) for minute, events in stays[b][origin + 1:]}
        minute = min(later, key=lambda m: abs(m - wanted))
        means, _, numbers = later[minute]
        assert abs(minute - wanted) < 1e-2 and numbers[variable]
        assert abs(means[variable] - queries.value[b, r].item()) < 1e-6


def test_random_queries_are_spread_over_variables_origins_and_measurements():
    batch, model = batch_of(random_stays((12,))), build(SeqSetVAEPretrain, tiny(queries=4000))
    torch.manual_seed(0)
    _, queries = drawn(model, batch, True, 4000)
    counts = torch.bincount(queries.column[0], minlength=7)
    assert (counts.float() / 4000 - 1 / 7).abs().max() < 0.03
    assert queries.origin[queries.real].unique().tolist() == list(range(11))


def test_the_negative_log_likelihood_is_that_of_a_student_t():
    x, location, log_scale = torch.randn(3, 50)
    true = -torch.distributions.StudentT(FREEDOM, location, log_scale.exp()).log_prob(x)
    close(student_nll(x, location, log_scale), true)


def test_the_loss_of_queries_is_that_of_a_plain_loop():
    stays = random_stays((5, 9), valueless=0.2)
    batch, model = batch_of(stays), build(SeqSetVAEPretrain, tiny(queries=40))
    readout, keys = model.query_readout, plain_keys(model.setvae)
    question, queries = drawn(model, batch)
    own = batch.variables[batch.stay_variables]
    with torch.no_grad():
        states, _ = plain_pass(model, stays)
        total = []
        for b, stay in enumerate(stays):
            past, exists = plain_statistics(stay)
            losses = []
            for r in queries.real[b].nonzero().flatten().tolist():
                v = own[b][question.column[b] == queries.column[b, r]].item()
                i = queries.origin[b, r].item()  # all sets are asked: the place is the position
                seen = [minute for minute, events in stay[:i + 1] if any(u == v for u, _ in events)]
                since, elapsed = (stay[i][0] - (seen[-1] if seen else stay[0][0])) / 60, (stay[i][0] - stay[0][0]) / 60
                hours = queries.hours[b, r].item()
                told = [*past[i, :, v], exists[i, 7, v], exists[i, 0, v], *map(math.log1p, (hours, since, since + hours)),
                        hours / 24, math.log1p(elapsed), 0, 0]  # no clock
                gain, shift = readout.key(keys[v]).split(256)
                hidden = F.gelu((1 + gain) * (readout.state(states[b][2][i]) + readout.known(torch.tensor(told).float()))
                                + shift)
                location, log_scale, offset, gate = readout.out(F.gelu(readout.hidden(hidden))).view(4, -1) @ keys[v]
                location = location + torch.lerp(*torch.tensor(past[i, [2, 0], v]).float(), gate.sigmoid())
                value = queries.value[b, r]
                losses.append(student_nll(value, location, log_scale.clamp(-5, 3))
                              + (value - location - offset).square() / 2)
            total.append(torch.stack(losses).mean())
        close(model(batch, 0.0)["queries"], model.config.query_weight * torch.stack(total).mean())


def test_queries_of_a_stay_do_not_depend_on_its_batch():
    model, stays = build(SeqSetVAEPretrain, tiny(queries=16, asked_sets=4)), random_stays((5, 3, 12))
    with torch.no_grad():
        alone = torch.stack([model(batch_of([stay]), 0.0)["queries"] for stay in stays])
        close(model(batch_of(stays), 0.0)["queries"], alone.mean())


def test_every_weight_of_the_read_out_and_the_history_learn_from_queries():
    model = build(SeqSetVAEPretrain, tiny(queries=16)).train()
    model(batch_of(random_stays()), 0.0)["queries"].backward()
    named = dict(model.named_parameters())
    learns = [name for name, p in named.items() if p.grad is not None and p.grad.abs().max() > 0]
    assert {name for name in named if name.startswith(("query_readout.", "history."))} <= {*learns}


def test_the_hour_of_the_day_counts_where_the_record_has_a_clock():
    model, cohort = build(SeqSetVAEPretrain, tiny(queries=16)), cohort_of(random_stays())
    losses = []
    for clock in ("NaT", "2021-05-04T03:00", "2099-01-02T03:00", "2021-05-04T15:00"):
        origin = np.full(len(cohort), clock, "datetime64[us]")
        batch = StayDataset(replace(cohort, origin=origin), PLAIN)[np.arange(len(cohort))]
        with torch.no_grad():
            losses.append(model(batch, 0.0)["queries"].item())
    assert losses[1] == losses[2] and len({*losses}) == 3  # the hour counts, not the date


def test_a_normalizer_keeps_the_range_of_its_values():
    cohort = cohort_of([[(0, [(0, 3.0), (1, float("nan"))]), (5, [(0, 7.0), (2, 1.0)]), (6, [(2, 1.0)])]])
    normalizer = Normalizer.fit(cohort, np.arange(1))
    assert [*normalizer.low[[0, 2]], *normalizer.high[[0, 2]]] == [3, 1, 7, 1]
    assert normalizer.low[1] > normalizer.high[1]  # it has no number
    state = normalizer.state_dict()
    again = Normalizer.from_state(state, "path")
    assert np.array_equal(again.low, normalizer.low) and again.clip == normalizer.clip
    old = Normalizer.from_state({name: x for name, x in state.items() if name not in ("low", "high")}, "path")
    assert np.isneginf(old.low).all() and np.isposinf(old.high).all()


def test_the_decoder_of_the_original_answers_no_queries():
    with pytest.raises(InputError, match="queries need the readout decoder"):
        ModelConfig(7, decoder="slots")
