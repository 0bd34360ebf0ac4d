"""Tests that test stays decide nothing: no vocabulary, scale, threshold or variable of the head."""

import contextlib
import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score

import metrics
import runs
import train
from batches import Normalizer, common_variables, variable_vectors
from data import make_splits, stays_of
from model import ModelConfig, SeqSetVAEPretrain
from predictor import Predictor
from readers import load_cohort
from test_suite import main
from tests.tiny import FINETUNE, build, make_small, tiny, write

PARTS = {"train": 40, "valid": 30, "test": 90}


def write_shifted_test_stays(folder):
    """Stays of train and valid hold lab0 to lab3. Those of test hold lab0, at ten times the values, `rare`,
    which two training stays hold too, and `unseen`, which no training stay holds, but some of valid."""
    rng, rows, labels = np.random.default_rng(0), [], []
    for part, stays in PARTS.items():
        for i in range(stays):
            stay, label = f"{part}{i}", i % 2
            held = ["lab0", "rare", "unseen"] if part == "test" else [f"lab{v}" for v in range(4)]
            held += ["rare"] * (part == "train" and i < 2) + ["unseen"] * (part == "valid" and i < 5)
            scale = 10 if part == "test" else 1
            rows += [(stay, 60 * hour, name, scale * (rng.normal(7, 2) + label))
                     for hour in range(3) for name in held]
            labels.append((stay, label, part))
    rows += [("alone", 0, "unseen", 1.0)]
    labels += [("alone", 0, "valid")]
    for name, columns, table in (("events", ["stay_id", "minute", "variable", "value"], rows),
                                 ("labels", ["stay_id", "label", "split"], labels)):
        write(folder / f"{name}.csv", pd.DataFrame(table, columns=columns).to_csv(index=False))


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """Runs on such data: the cohort, its training stays, both checkpoints, what each mode printed."""
    home = tmp_path_factory.mktemp("shifted")
    write_shifted_test_stays(home / "data")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        for command in (["--mode", "pretrain", "--device", "cpu", "--max_epochs", "1", "--data_dir",
                         str(home / "data"), "--run_dir", str(home / "pretrain")],
                        [*FINETUNE, str(home / "pretrain" / "best.pt"), "--set", "most_variables=2",
                         "--run_dir", str(home / "finetune")]):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert train.main(command) == 0
            printed.append(out.getvalue())
    cohort = load_cohort(str(home / "data"), cache_dir=home / "cache")
    pretrained, finetuned = (torch.load(home / mode / "best.pt", weights_only=True)
                             for mode in ("pretrain", "finetune"))
    return SimpleNamespace(home=home, cohort=cohort, train=stays_of(cohort, make_splits(cohort, 0)["train"]),
                           printed=printed, pretrained=pretrained, finetuned=finetuned)


KNOWN = ["lab0", "lab1", "lab2", "lab3", "rare"]


def test_the_vocabulary_is_what_training_stays_hold_and_the_rest_is_named(shifted):
    assert shifted.cohort.variables == [*KNOWN, "unseen"]
    for content in (shifted.pretrained, shifted.finetuned):
        config = content["model_config"]
        assert content["normalizer"]["variables"] == KNOWN and config["num_variables"] == len(KNOWN)
        assert torch.equal(content["vocabulary"], variable_vectors(KNOWN, config["input_dim"]))
    events = 3 * (PARTS["test"] + 5) + 1
    for printed in shifted.printed:
        assert f"the events of 1 variables unknown to the checkpoint: unseen ({events} events)" in printed
    assert "as no training stay holds them" in shifted.printed[0]
    assert np.isfinite(shifted.pretrained["metrics"]["val_loss"])  # though a valid stay holds nothing else


def test_vectors_that_come_with_the_data_stay_with_their_variables(shifted, tmp_path, monkeypatch):
    """The variable that only other stays hold is the first by name here."""
    make_small(monkeypatch)
    names = [{"unseen": "a"}.get(name, name) for name in shifted.cohort.variables]
    vectors = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
    first = np.roll(np.arange(6), 1)  # its place before: [5, 0, 1, ...]
    cohort = replace(shifted.cohort, variables=[names[v] for v in first], vectors=vectors,
                     event_variable=((shifted.cohort.event_variable + 1) % 6).astype(np.int16))
    monkeypatch.setattr(runs, "load_cohort", lambda **_: cohort)
    assert train.main(["--mode", "pretrain", "--device", "cpu", "--max_epochs", "1", "--run_dir",
                       str(tmp_path / "run")]) == 0
    content = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert content["normalizer"]["variables"] == KNOWN
    assert torch.equal(content["vocabulary"], torch.from_numpy(vectors[1:]))
    assert torch.equal(content["normalizer"]["mean"], shifted.pretrained["normalizer"]["mean"])


def test_the_scales_in_a_checkpoint_are_those_of_training_stays(shifted):
    normalizer, fitted = shifted.pretrained["normalizer"], Normalizer.fit(shifted.cohort, shifted.train)
    for name in ("mean", "std", "log_scale"):
        assert normalizer[name].tolist() == getattr(fitted, name)[:len(KNOWN)].tolist()
    assert normalizer["mean"][0] == pytest.approx(7.5, abs=.5)  # as the training stays were drawn


def test_the_scales_under_an_original_checkpoint_are_those_of_training_stays(shifted, tmp_path, monkeypatch):
    """Its vocabulary is the data's: nothing in its weights depends on it."""
    make_small(monkeypatch)
    names = ("input_dim", "reduced_dim", "set_dim", "set_heads", "inducing", "layers", "heads", "ff_dim")
    config = ModelConfig.original(6, **{name: getattr(tiny(), name) for name in names}, latent_dim=12)
    torch.save(build(SeqSetVAEPretrain, config).state_dict(), tmp_path / "bare.pt")
    assert train.main([*FINETUNE, str(tmp_path / "bare.pt"), "--set_heads", "2", "--transformer_heads", "2",
                       "--data_dir", str(shifted.home / "data"), "--run_dir", str(tmp_path / "run")]) == 0
    normalizer = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["normalizer"]
    assert normalizer["variables"] == shifted.cohort.variables
    assert normalizer["mean"].tolist() == Normalizer.fit(shifted.cohort, shifted.train).mean.tolist()


def test_the_heads_variables_are_the_most_common_of_training_stays(shifted):
    chosen = [KNOWN[v] for v in shifted.finetuned["model"]["head_variables"]]
    assert chosen == ["lab0", "lab1"]
    _, dataset = Predictor.with_data(shifted.home / "finetune" / "best.pt")
    everyone = common_variables(shifted.cohort, dataset, np.arange(len(shifted.cohort)), 2)
    assert [KNOWN[v] for v in everyone] == ["lab0", "rare"]


def test_the_threshold_is_the_best_of_the_validation_stays(shifted, tmp_path):
    """The one that training records, and the one at which the analysis counts test stays."""
    best = shifted.home / "finetune" / "best.pt"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["--checkpoint", str(best), "--predictions", str(tmp_path / "p.csv"), "--json",
                     str(tmp_path / "json")]) == 0
    table, figures = pd.read_csv(tmp_path / "p.csv"), json.loads((tmp_path / "json").read_text())
    best_of = {}
    for part in ("valid", "test"):
        label, p = (table[table["split"] == part][name].to_numpy() for name in ("label", "probability"))
        best_of[part] = p[np.argmax([f1_score(label, p >= cut) for cut in p])]
    recorded = shifted.finetuned["metrics"]["threshold"]
    assert recorded == pytest.approx(best_of["valid"], abs=1e-6) != pytest.approx(best_of["test"], abs=1e-3)
    assert figures["threshold"] == recorded
    test = table[table["split"] == "test"]
    alarms = int((test["probability"] >= recorded).sum())
    assert figures["confusion"]["tp"] + figures["confusion"]["fp"] == alarms
    assert re.search(rf"F1 .* from {recorded:.4f} on \(best F1 of the validation split\): TP", out.getvalue())


# ---- what is printed as 95% --------------------------------------------------------------------------------

def test_an_interval_leaves_out_a_fortieth_of_the_draws_on_either_side(monkeypatch):
    """The 2.5th and the 97.5th percentile: of 1,001 draws 0 to 1,000, from 25 to 975."""
    draws = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert metrics.interval(draws) == [25, 975] and metrics.bracketed([25, 975]) == "[25.000, 975.000]"
    monkeypatch.setattr(metrics, "bootstrap", lambda *_, **__: np.stack([draws, draws], -1)[:, None])
    label = np.arange(40) % 2
    told = metrics.with_intervals(np.arange(40), label, label / 2, metrics.RANKS)
    assert [measure["interval"] for measure in told.values()] == [[25, 975]] * 2
    monkeypatch.setattr(metrics, "utility_draws", lambda *_: draws)
    stay, minute = np.repeat(np.arange(20), 20), 60.0 * np.tile(np.arange(20), 20)
    label = ((stay % 2 == 0) & (minute >= 600)).astype(int)
    points = metrics.Points(stay, stay, minute, label)
    assert metrics.sepsis_figures(points, label / 2, .4)["utility"]["interval"] == [25, 975]


def test_an_interval_of_a_mean_is_as_wide_as_statistics_says():
    """That of a sensitivity reaches 1.96 standard errors to each side; from 5% to 95% it would be 1.64."""
    rng = np.random.default_rng(0)
    label, p = np.repeat([1, 0], 2000), rng.random(4000)
    measures = {metrics.alarm_from(.5): ("sensitivity", "specificity", "precision", "alarms")}
    told = metrics.with_intervals(np.arange(4000), label, p, measures)["sensitivity"]
    error = np.sqrt(told["value"] * (1 - told["value"]) / 2000)
    assert np.diff(told["interval"])[0] / 2 / error == pytest.approx(1.96, abs=.15)
