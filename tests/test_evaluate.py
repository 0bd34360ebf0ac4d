"""Tests of originals, exports, protocol.py and README.md: what users run with a checkpoint."""

import itertools
import json
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import baselines
import data
import labels
import protocol
import readers
import test_suite
import train
from baselines import (ALONE, BASELINES, BOOSTING, RIDGE, STATISTICS, USUAL, hand_made_baselines, summaries_alone,
                       summary_table)
from batches import StayDataset
from checkpoint import Checkpoint
from metrics import Points, best_utility_threshold, hours_since_onset, sepsis_figures
from model import ModelConfig, SeqSetVAE
from predictor import Predictor
from protocol import AVERAGE, PLAIN_LOOP, asked_at_the_end, averaged, new_models, print_protocol
from questions import with_points
from readers import synthetic_cohort, write_long_table
from tasks import Binary
from test_suite import main
from tests.plain_loop import close, plain_features, plain_pass, plain_stays
from tests.tiny import (FINETUNE, PLAIN, PRETRAIN, SHARED, cohort_of, labels_of, one_error_line,
                        random_stays, write)

# ----------------------------------------------------------------------------------------------------------------------
# What users bring and take away: original checkpoints, predictions, pictures, the commands of the README
# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def original_data(tmp_path_factory):
    """Options for a folder of the original layout with vectors of 24 dimensions, as the original's fixtures take: 40
    stays."""
    if not (SHARED / "fixtures").exists():
        pytest.skip("shared/fixtures is absent: compatibility with the original implementation was not tried")
    home, rng = tmp_path_factory.mktemp("original"), np.random.default_rng(0)
    names = [f"lab{v}" for v in range(7)]
    for i, stay in enumerate(random_stays(rng.integers(1, 9, 40))):
        lines = [f"{names[v]},{x + 5},{minute}" for minute, events in stay for v, x in events]
        write(home / f"patient_ehr/{data.SPLITS[i % 4 % 3]}/{i}.csv",
              "\n".join(["variable,value,minute", *lines]) + "\n")
    write(home / "oc.csv", "ts_id,in_hospital_mortality\n" + "".join(f"{i},{i // 4 % 2}\n" for i in range(40)))
    write(home / "stats.csv", "variable,mean,std\n" + "".join(f"{name},5,1\n" for name in names))
    pd.DataFrame(rng.normal(size=(7, 24))).assign(Key=names).to_csv(home / "cached.csv", index=False)
    return ["--data_dir", str(home), "--params_map_path", str(home / "stats.csv"), "--label_path", str(home / "oc.csv")]


def without_hyper_parameters(name: str, prefix: str, folder: Path) -> Path:
    """A fixture's bare state dict behind a wrapper's prefix."""
    state = torch.load(SHARED / "fixtures" / f"{name}.ckpt", weights_only=True)["state_dict"]
    torch.save({prefix + key: tensor for key, tensor in state.items()}, folder / "bare.pt")
    return folder / "bare.pt"


HEADS = ["--set_heads", "2", "--transformer_heads", "4"]  # of the fixtures


def test_an_original_checkpoint_is_finetuned_and_scored(tmp_path, capsys, original_data):
    path = SHARED / "fixtures" / "original_small.ckpt"
    assert train.main([*FINETUNE, str(path), *original_data, "--run_dir", str(tmp_path / "whole")]) == 0
    assert "Loaded pretrained weights" in capsys.readouterr().out
    bare = without_hyper_parameters("original_small", "module.", tmp_path)
    command = [*FINETUNE, str(bare), *original_data, "--run_dir", str(tmp_path / "bare")]
    one_error_line(capsys, train.main(command), "--set_heads")
    one_error_line(capsys, train.main([*command, "--set_heads", "2"]), "--transformer_heads")
    one_error_line(capsys, train.main([*command, "--set_heads", "5", "--transformer_heads", "4"]),
                   "of set_heads 5")
    assert train.main([*command, *HEADS]) == 0
    runs = [torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("whole", "bare")]
    assert runs[0]["model_config"] == runs[1]["model_config"]
    original = Checkpoint.open(path).weights
    for name, tensor in runs[0]["model"].items():
        assert tensor.equal(runs[1]["model"][name]), name
        assert not name.startswith(SeqSetVAE.BACKBONE) or tensor.equal(original[name]), name
    capsys.readouterr()
    assert main(["--checkpoint", str(tmp_path / "whole" / "best.pt")]) == 0
    assert "AUROC" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
def test_an_original_finetuned_checkpoint_is_scored_with_its_data(tmp_path, capsys, original_data, prefix):
    whole = SHARED / "fixtures" / "original_finetuned_small.ckpt"
    bare = without_hyper_parameters("original_finetuned_small", prefix, tmp_path)
    assert main(["--checkpoint", str(whole), *original_data, "--predictions", str(tmp_path / "whole.csv"), "--json",
                 str(tmp_path / "a.json")]) == 0
    assert main(["--checkpoint", str(bare), *original_data, *HEADS, "--predictions", str(tmp_path / "bare.csv")]) == 0
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "bare.csv").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["stays"] == 10  # patient_ehr/test

    # The probabilities are those of its weights on the data's values, vectors and statistics.
    options = dict(zip(("data_dir", "params_map", "label_file"), original_data[1::2]))
    predictor, dataset = Predictor.with_data(whole, options)
    model, cohort = predictor.model, dataset.cohort
    assert model.config.features == "stable" and model.config.head_widths is None and model.trees is None
    assert model.config.classification_only
    assert dataset.normalizer.mean.tolist() == [5] * 7
    assert torch.equal(model.setvae.vocabulary, torch.from_numpy(np.array(cohort.vectors)))
    table = pd.read_csv(tmp_path / "whole.csv")
    with torch.no_grad():
        expected = model(dataset[np.arange(len(cohort))]).softmax(-1)[:, 0, 1]
    np.testing.assert_allclose(table["probability"], expected, atol=1e-6)
    capsys.readouterr()
    one_error_line(capsys, main(["--checkpoint", str(whole), "--data_dir", original_data[1]]), "--params_map")
    one_error_line(capsys, main(["--checkpoint", str(whole)]), "cached.csv")
    one_error_line(capsys, main(["--checkpoint", str(SHARED / "fixtures" / "original_small.ckpt"), *original_data]),
                   "not a finetuned checkpoint")
    one_error_line(capsys, main(["--checkpoint", str(whole), *original_data, "--baselines"]), "--baselines")
    (tmp_path / "split.csv").write_text("".join(["stay_id,split\n", *(f"{stay},test\n" for stay in cohort.stay_id)]))
    asked = ["--split", str(tmp_path / "split.csv")]  # who lies in patient_ehr/train was learned from, all the same
    assert main(["--checkpoint", str(whole), *original_data, *asked]) == 0
    left_out = np.isin(np.array(cohort.split), (0, 1)).sum()
    assert f"; {left_out} stays left out of subjects that" in capsys.readouterr().out


def test_the_log_of_the_untrained_backbone_does_not_stand_in_the_report(capsys, monkeypatch, finetuned):
    monkeypatch.setattr(baselines, "hand_made_baselines",
                        lambda *given: {BASELINES[0]: np.zeros((len(given[-1]), 1))})
    capsys.readouterr()
    assert main(["--checkpoint", str(finetuned), "--baselines", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("untrained backbone, same head", BASELINES[0], BASELINES[2]))
    assert not any(line.startswith(("epoch", "model:", "split:", "best checkpoint:")) for line in out.splitlines())
    assert out.count("data: embedded") == 1


def test_baselines_learn_from_the_labels_and_settings_of_the_checkpoint(tmp_path, monkeypatch, small_finetuned):
    words = [*FINETUNE, str(small_finetuned.parents[1] / "pretrain/best.pt"), "--run_dir", str(tmp_path / "half")]
    words += ["--label_fraction", ".5", "--seed", "7", "--set", "max_trainable_ratio=1", "--set", "trees=5"]
    assert train.main(words) == 0
    content, learned = torch.load(tmp_path / "half/best.pt", weights_only=True), []
    monkeypatch.setattr(baselines, "without_backbone", lambda task, dataset, stays, valid, points, seed, device, config:
                        learned.append((len(stays), seed, config.trees)) or {})
    monkeypatch.setattr(baselines.HeadTraining, "of", lambda run, stays, config, of=train.HeadTraining.of:
                        learned.append((len(stays), run.seed, config.trees)) or of(run, stays, config))
    assert main(["--checkpoint", str(tmp_path / "half/best.pt"), "--baselines", "--device", "cpu"]) == 0
    assert learned == 2 * [(len(content["split"]["train"]) // 2, 7, 5)]


def test_a_renamed_and_rescaled_copy_of_the_data_scores_equally(tmp_path, capsys, small_finetuned):
    cohort = synthetic_cohort(24)
    other = replace(cohort, variables=[f"their {name}" for name in cohort.variables],
                    event_value=np.float32(4) * cohort.event_value)  # a power of two: to the last bit
    write(tmp_path / "map.csv", "source,name,factor\n"
          + "".join(f"their {name},{name},.25\n" for name in cohort.variables if name != "HR"))
    tables, printed = {}, {}
    for name, some in (("same", cohort), ("other", other)):
        options = ["--variables", str(tmp_path / "map.csv")] if name == "other" else []
        for kind in (name, f"{name} whole"):
            if kind == "other whole":
                write(tmp_path / "map.csv", (tmp_path / "map.csv").read_text() + "their HR,HR,.25\n")
            folder = tmp_path / name
            if not folder.exists():
                write_long_table(folder, some)
            assert main(["--checkpoint", str(small_finetuned), "--data_dir", str(folder), *options, "--predictions",
                         str(tmp_path / "p.csv")]) == 0
            tables[kind], printed[kind] = pd.read_csv(tmp_path / "p.csv"), capsys.readouterr().out
    assert tables["other whole"].equals(tables["same"]) and not tables["other"].equals(tables["same"])
    heart_rates = (cohort.event_variable == cohort.variables.index("HR")).sum()
    assert f"data: {1 - heart_rates / len(cohort.event_value):.1%} of the events are of variables" in printed["other"]
    assert f"1 variables unknown to the checkpoint: their HR ({heart_rates} events)\n" in printed["other"]
    assert "data: 100.0% of the events are of variables that the checkpoint knows\n" in printed["other whole"]


def test_an_exported_checkpoint_names_nobody_and_predicts_and_guards_alike(tmp_path, capsys, small_models, monkeypatch):
    """Pretrained on one table, finetuned on another that shares some patients; each exported in between."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--of-the-ward"])
    cohort = synthetic_cohort(40)
    ids = np.array([f"patient-{i:04d}-x" for i in range(40)])
    for name, some in (("first", slice(0, 30)), ("second", slice(10, 40))):
        part = np.arange(40)[some]
        table = pd.DataFrame({"stay_id": np.repeat(ids, cohort.stay_events),
                              "minute": np.repeat(cohort.set_minute, np.diff(cohort.set_start)),
                              "variable": np.array(cohort.variables)[cohort.event_variable],
                              "value": cohort.event_value})
        write(tmp_path / name / "events.csv", table[table["stay_id"].isin(ids[part])].to_csv(index=False))
        labels = pd.DataFrame({"stay_id": ids[part], "label": part % 2})
        write(tmp_path / name / "labels.csv", labels.to_csv(index=False))
    assert train.main([*PRETRAIN, "--data_dir", "first", "--run_dir", "run-a"]) == 0
    assert main(["--checkpoint", "run-a/best.pt", "--export", "a.pt"]) == 0
    for name, pretrained in (("plain", "run-a/best.pt"), ("given", "a.pt")):
        assert train.main([*FINETUNE, pretrained, "--data_dir", "second", "--run_dir", f"run-{name}"]) == 0
    assert main(["--checkpoint", "run-given/best.pt", "--export", "b.pt"]) == 0
    plain, given = (torch.load(f"run-{name}/best.pt", weights_only=True) for name in ("plain", "given"))
    assert plain["split"] == given["split"]
    assert all(tensor.equal(given["model"][name]) for name, tensor in plain["model"].items())

    for name, run in (("a.pt", "run-a"), ("b.pt", "run-given")):
        written, content = Path(name).read_bytes(), torch.load(f"{run}/best.pt", weights_only=True)
        assert content["source"]["command"] == "python train.py --of-the-ward"
        told = [*ids, str(tmp_path), *tmp_path.parts[1:], "first", "second", run, "train.py", "--of-the-ward",
                "run_dir", platform.node()]
        assert [text for text in told if len(text) > 2 and text.encode() in written] == []
        one_error_line(capsys, main(["--checkpoint", name, "--export", "a folder/c.pt"]), "a folder/c.pt")
    one_error_line(capsys, main(["--checkpoint", "b.pt"]), "which does not tell where its data lie; give --data_dir")

    printed = {}
    for data_dir in ("first", "second"):
        for name in ("run-plain/best.pt", "b.pt"):
            assert main(["--checkpoint", name, "--data_dir", data_dir, "--predictions", "p.csv"]) == 0
            lines = capsys.readouterr().out.splitlines()
            printed[data_dir, name] = pd.read_csv("p.csv"), [line for line in lines if "heckpoint" not in line]
        tables, lines = zip(*(printed[data_dir, name] for name in ("run-plain/best.pt", "b.pt")))
        assert tables[0].equals(tables[1]) and lines[0] == lines[1]
    test = torch.load("run-a/best.pt", weights_only=True)["split"]["test"]
    never = sorted({*test, *ids[30:]} - {*plain["split"]["train"], *plain["split"]["valid"]} - {*ids[30:]})
    main(["--checkpoint", "b.pt", "--data_dir", "first"])
    assert f"\nScored: {len(never)} stays" in capsys.readouterr().out


def test_the_hand_made_features_are_those_of_each_points_past():
    """Against pandas, a point and a variable at a time; two events of one set, events without a value, a stay that does
    not have the variable."""
    cohort = cohort_of(random_stays([9, 1, 30], seed=3, valueless=.2))
    minute = np.concatenate([np.unique(np.append(cohort.set_minute[slice(*cohort.stay_start[p:p + 2])], [0., 3100.]))
                             for p in range(3)])
    cohort = with_points(cohort, np.array([11, 3, 32]), minute, np.zeros(len(minute)))
    points = np.flatnonzero(np.arange(len(minute)) % 3 != 1)
    table = summary_table(cohort, points, np.array([1, 4]))
    assert table.shape == (len(points), 2, len(STATISTICS))
    sets = np.repeat(np.arange(len(cohort.set_minute)), np.diff(cohort.set_start))
    events = pd.DataFrame({"stay": np.searchsorted(cohort.stay_start, sets, side="right") - 1,
                           "minute": cohort.set_minute[sets], "variable": cohort.event_variable,
                           "value": cohort.event_value.astype(float)})
    for row, point in zip(table, points):
        for told, variable in zip(row, (1, 4)):
            past = events[(events["stay"] == cohort.point_stay[point]) & (events["variable"] == variable)
                          & (events["minute"] <= cohort.point_minute[point])]
            x = past["value"].dropna()
            day = past["minute"][x.index] / 1440
            slope = np.polyfit(day, x, 1)[0] if day.nunique() > 1 else 0
            expected = [x.iloc[0], x.iloc[-1], x.min(), x.max(), x.mean(), x.std(), slope] if len(x) else [np.nan] * 7
            since = (cohort.point_minute[point] - past["minute"].max()) / 60
            np.testing.assert_allclose(told, [*expected, len(past), since], rtol=1e-4, atol=1e-5)


def test_from_many_points_boosting_alone_learns_and_nothing_constant_kills_it(monkeypatch, capsys):
    rng = np.random.default_rng(0)
    stays = [[(60 * h, [(0, (i % 2) * h + rng.normal()), (1, 7.)]) for h in range(20)] for i in range(40)]
    cohort = cohort_of(stays)
    minute, label = np.tile(60. * np.arange(20), 40), np.repeat(np.arange(40) % 2, 20) * np.tile(np.arange(20) > 9, 40)
    cohort = with_points(cohort, np.full(40, 20), minute, label)
    train, test = np.arange(500), np.arange(500, 800)
    monkeypatch.setattr(baselines, "MANY_POINTS", 400)
    told = hand_made_baselines(Binary(), cohort, np.arange(7), train, np.ones(500), test)  # variables 2 to 6 never occur
    assert list(told) == [BASELINES[1]] and roc_auc_score(cohort.label[test], told[BASELINES[1]]) > .95
    assert BASELINES[0] in capsys.readouterr().out
    dataset = StayDataset(cohort, PLAIN, points=True)
    alone = summaries_alone(Binary(), dataset, np.arange(2), np.arange(25), test[:100], test, 0)
    assert roc_auc_score(cohort.label[test], alone) > .95
    assert (alone == summaries_alone(Binary(), dataset, np.arange(2), np.arange(25), test[:100], test, 0)).all()


def predictions_of(noise, seed, stays=60, hours=1):
    """A table as the protocol keeps it; a third of the stays turn 1 halfway, or are 1 at their one hour."""
    rng, hour = np.random.default_rng([seed, int(100 * noise)]), np.tile(np.arange(hours), stays)
    label = (np.repeat(np.arange(stays) % 3 == 0, hours) & (hour >= hours // 2)).astype(int)
    told = 1 / (1 + np.exp(-4 * label - 4 * noise * rng.normal(size=len(label)) + 2))
    stay = np.repeat([f"s{i:03d}" for i in range(stays)], hours)
    return pd.DataFrame({"stay_id": stay, "subject_id": stay, "minute": 60. * hour, "label": label, "probability": told,
                         "split": np.repeat(np.where(np.arange(stays) % 4 == 1, "valid", "test"), hours)})


def write_predictions_of(folder, noises, **sizes):
    for seed, (method, noise) in itertools.product(range(2), noises.items()):
        home = folder / f"seed{seed}" / f"{method} 100%"
        home.mkdir(parents=True)
        predictions_of(noise, seed, **sizes).to_csv(home / "predictions.csv", index=False)


def rows_of(text) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "±" in line]


def test_samples_without_sepsis_do_not_end_the_table(tmp_path, capsys):
    """Two splits with few septic stays: samples that hold none have no utility, others in each split."""
    for seed, septic in enumerate((2, 3)):
        for method, noise in (("frozen", .5), (BASELINES[1], 1)):
            table, home = predictions_of(noise, seed, hours=14), tmp_path / f"seed{seed}" / f"{method} 100%"
            kept = [group[group["label"] == 1]["stay_id"].unique()[:septic] for _, group in table.groupby("split")]
            table["label"] *= table["stay_id"].isin(np.concatenate(kept))
            home.mkdir(parents=True)
            table.to_csv(home / "predictions.csv", index=False)
    print_protocol(tmp_path)
    (row,) = [row for row in rows_of(capsys.readouterr().out) if row[0] == "frozen"]
    assert len(row) == 8 and not any("nan" in cell for cell in row)


def test_the_protocols_table_pairs_each_method_with_the_best_baseline(tmp_path, capsys):
    write_predictions_of(tmp_path, dict(zip((*BASELINES[:3], "untrained"), (1.5, 1.0, 2.5, 0.3))))
    print_protocol(tmp_path)
    rows = [row for row in rows_of(capsys.readouterr().out) if row[0] != AVERAGE]
    assert [row[0] for row in rows] == ["untrained", *(BASELINES[i] for i in (1, 0, 2))]
    assert all(row[1] == "2" for row in rows)
    assert rows[0][4].startswith("+0.") and rows[2][4].startswith("-0.") and len(rows[1]) == 4


def test_the_protocol_scores_utility_where_labels_are_the_challenges(tmp_path, capsys):
    write_predictions_of(tmp_path, {"frozen": .1, BASELINES[1]: 1.}, hours=20)
    print_protocol(tmp_path)
    frozen, = (row for row in rows_of(capsys.readouterr().out) if row[0] == "frozen")
    tables = [predictions_of(.1, seed, hours=20) for seed in range(2)]
    utility = []
    for table in tables:
        table["stay_id"] = table["stay_id"].str[1:].astype(int)
        arrays = {part: [rows[name].to_numpy() for name in ("stay_id", "stay_id", "minute", "label", "probability")]
                  for part, rows in table.groupby("split")}
        stay, _, minute, label, p = arrays["valid"]
        threshold, _ = best_utility_threshold(stay, hours_since_onset(stay, minute, label), p)
        *test, p = arrays["test"]
        utility.append(sepsis_figures(Points(*test), p, threshold)["utility"]["value"])
    assert frozen[4].startswith(f"{np.mean(utility):.3f} ±") and frozen[7].startswith("+")


def test_an_average_takes_the_weights_that_fit_the_validation_parts_best():
    good, noise = predictions_of(.3, 0, stays=400), predictions_of(.3, 0, stays=400)
    noise["probability"] = np.random.default_rng(1).random(400)

    def weights(good, **others):
        return averaged({"one": [good, noise], **others})["one"][1]

    alone = weights(good)
    assert alone[0] > .7 and alone.sum() == 1
    few = good["split"].eq("valid") & (np.arange(len(good)) < 48)
    kept = few | good["split"].eq("test")  # four validation stays of a class choose nothing
    assert (averaged({"one": [good[kept], noise[kept]]})["one"][1] == .5).all()
    worse = good.assign(probability=np.where(good["split"] == "test", 1 - good["probability"], good["probability"]))
    assert (weights(worse) == alone).all()  # nothing of the test part decides

    def other(part, stays=good["stay_id"]):  # a split in which the first method says the contrary
        contrary = good.assign(probability=1 - good["probability"])
        return [table.assign(stay_id=stays, subject_id=stays, split=part) for table in (contrary, noise)]

    elsewhere = other("valid", [f"other {stay}" for stay in good["stay_id"]])
    assert weights(good, two=elsewhere)[0] < .3  # its validation part decides too
    tested = other(np.where(good["split"] == "test", "valid", "test"))
    assert (weights(good, two=tested) == alone).all()  # but not by stays that this split tests


def test_the_protocol_keeps_what_is_finished_and_goes_on(tmp_path, monkeypatch, capsys, small_models):
    monkeypatch.chdir(tmp_path)
    write_long_table(Path("table"), synthetic_cohort(60), labels=True)
    words = ["--protocol", "kept", "--data_dir", "table", "--seeds", "3", "--fractions", "1", "--methods", "frozen"]
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "CELLS", {"frozen": {"changes": {"trees": 5}}})
        assert main(words) == 0
        first = [row for row in rows_of(capsys.readouterr().out) if row[0] == "frozen"]
        patch.setattr(protocol, "finetune", lambda *_: pytest.fail("finetuned again"))
        assert main(words) == 0
    out = capsys.readouterr().out
    assert len(first) == 1 and rows_of(out) == first and "epoch" not in out
    capsys.readouterr()
    one_error_line(capsys, main([*words, "--hours", "24"]), "kept/seed3: holds what was measured on other data")
    one_error_line(capsys, main([*words[:-1], "frozen, mu alone", "--fractions", ".1"]), "add 1 to --fractions")
    below_a_file = main(["--protocol", "table/events.csv", *words[2:]])
    one_error_line(capsys, below_a_file, "table/events.csv/seed3/pretrain: cannot be written (Not a directory)")
    table = pd.read_csv("table/labels.csv")
    table.assign(label=1 - table["label"]).to_csv("table/labels.csv", index=False)
    one_error_line(capsys, main(words), "kept/seed3: holds what was measured on other data, labels")
    turn = table.groupby("label").cumcount() % 3 % np.where(table["label"] == 1, 2, 3)  # no positive one is tested
    table.assign(split=turn.map({0: "train", 1: "valid", 2: "test"})).to_csv("table/labels.csv", index=False)
    one_error_line(capsys, main(["--protocol", "new", *words[2:]]), "the labelled test stays hold one class only")
    assert not Path("new").exists()
    assert sorted(path.name for path in Path("kept/seed3").iterdir()) == ["frozen 100%", "pretrain"]


def test_the_protocol_compares_methods_of_another_kind_by_its_own_figures(tmp_path, monkeypatch, capsys,
                                                                          small_models):
    monkeypatch.chdir(tmp_path)
    cohort = synthetic_cohort(60)
    write_long_table(Path("table"), cohort, labels=True)
    table = pd.read_csv("table/labels.csv").assign(label=np.exp(np.arange(60) % 7))
    table.to_csv("table/labels.csv", index=False)
    monkeypatch.setattr(baselines, "SHALLOW", {"max_iter": [5]})
    monkeypatch.setattr(protocol, "CELLS", {"frozen": {"changes": {"trees": 5}}})
    words = ["--protocol", "kept", "--data_dir", "table", "--seeds", "3", "--fractions", "1", "--kind", "number",
             "--methods", "baselines", "frozen"]
    assert main(words) == 0
    out = capsys.readouterr().out
    header, = (line for line in out.splitlines() if line.startswith("| method"))
    rows = rows_of(out)
    assert header.count("mae") == 2 and header.count("coverage") == 2 and "no average" in out
    assert {row[0] for row in rows} == {"frozen", ALONE, RIDGE, BOOSTING, USUAL}
    told = [float(row[2].split()[0]) for row in rows]
    assert told == sorted(told)                                      # the least error first
    answers = pd.read_csv(f"kept/seed3/{USUAL} 100%/predictions.csv")
    tested = answers[answers["split"] == "test"]
    mae = (tested["label"] - tested["median"]).abs().mean()
    assert [row[2].split()[0] for row in rows if row[0] == USUAL] == [f"{mae:.3f}"]
    monkeypatch.setattr(protocol, "finetune", lambda *_: pytest.fail("finetuned again"))
    assert main(words) == 0 and rows_of(capsys.readouterr().out) == rows
    table.assign(label=2 * table["label"]).to_csv("table/labels.csv", index=False)
    one_error_line(capsys, main(words), "kept/seed3: holds what was measured on other data, labels")


def test_the_benchmarks_plain_loop_agrees_with_the_batched_model():
    config = ModelConfig.original(7, input_dim=12, reduced_dim=8, latent_dim=16, inducing=3, layers=2, heads=2,
                                  ff_dim=24)
    dataset, stays = asked_at_the_end(cohort_of(random_stays())), np.arange(4)
    model, head, _ = new_models(replace(config, learned_seeds=True), dataset)  # no noise
    lists = plain_stays(dataset, stays)
    with torch.no_grad():
        losses, (_, plain) = model.eval()(dataset[stays], beta=1.0), plain_pass(model, lists)
        close(torch.stack([losses["reconstruction"], losses["kl"]]), torch.stack(plain))
        features = torch.stack([plain_features(head.eval(), stay) for stay in lists])
        close(head.features(dataset[stays])[:, 0], features)


def test_the_benchmark_prints_a_table_and_appends_to_its_csv(tmp_path, capsys, monkeypatch, processes):
    sizes = dict(input_dim=12, reduced_dim=8, latent_dim=16, inducing=3, layers=2, heads=2, ff_dim=24)
    tiny_sizes = {"tiny": (partial(ModelConfig.original, **sizes), 1, 1, 3, (PLAIN_LOOP, "float32"))}
    for name, value in {"SIZES": tiny_sizes, "ROUNDS": 1, "LOOPED": 2, "CHECKPOINTS": tmp_path}.items():
        monkeypatch.setattr(protocol, name, value)
    folder = write_long_table(tmp_path / "table", synthetic_cohort(24), labels=False)
    for runs in (1, 2):
        assert main(["--benchmark", "--data_dir", str(folder)]) == 0
        out, written = capsys.readouterr().out, pd.read_csv(tmp_path / "benchmark.csv")
        assert all(word in out for word in ("data, parsed", "x plain", "bedside, a question"))
        assert (written.groupby(["sizes", "work", "how"]).size() == runs).all() and len(written) == 6 * runs
        assert (written[["ms a stay", "ms a set", "MB", "x plain"]] > 0).all(axis=None)
    faster = written.loc[written["work"].eq("pretrain step") & written["how"].eq("float32"), "x plain"]
    assert len(faster) == 2 and (faster > 1).all()  # else the batches are worth nothing


def test_the_benchmark_of_scale_prints_a_row_a_vocabulary(capsys, monkeypatch, processes):
    monkeypatch.setattr(protocol, "ROUNDS", 1)
    monkeypatch.setattr(protocol, "VOCABULARIES", (20, 300))
    monkeypatch.setattr(protocol, "ZIPF_STAYS", 2)
    assert main(["--benchmark", "scale"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["20", "300"] and all(float(x) > 0 for row in rows for x in row)


def test_a_checkpoint_is_scored_without_pytest_and_without_the_tests(small_finetuned):
    code = ("import sys, test_suite; assert test_suite.main(sys.argv[1:]) == 0; "
            "assert not {'pytest', 'tests'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code, "--checkpoint", str(small_finetuned), "--device", "cpu"], check=True,
                   cwd=Path(train.__file__).parent, stdout=subprocess.DEVNULL)


def readme_blocks(marker: str) -> list[tuple[str, str]]:
    """What README.md shows in a fenced block after <!-- marker: argument -->: (argument, text)."""
    text = Path(train.__file__).with_name("README.md").read_text()
    found = re.findall(rf"<!-- {marker}:? ?([^\n]*?) ?-->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found, f"README.md holds no block marked <!-- {marker} -->"
    return found


@pytest.mark.parametrize("folder, reader, stay, label, options", [
    ("my_table", "long table", "1001", 0, {}), ("physionet2012", "PhysioNet 2012", "132539", 0, {}),
    ("physionet2019", "PhysioNet 2019", "p000001", 0, {}),
    ("original", "original layout", "200001", 0, {"params_map": "stats.csv", "label_file": "oc.csv"}),
    ("meds", "MEDS", "1", 0, {})])
def test_the_readmes_examples_of_data_are_read(tmp_path, load, monkeypatch, folder, reader, stay, label, options):
    for path, text in readme_blocks("file"):
        write(tmp_path / path, text)
    if folder == "meds":
        pytest.importorskip("pyarrow")
        monkeypatch.chdir(tmp_path)
        for folders, code in readme_blocks("python"):
            for name in folders.split():
                Path(name).mkdir(parents=True)
            exec(code, {})
    cohort = load(tmp_path / folder, **{name: str(tmp_path / folder / file) for name, file in options.items()})
    assert cohort.reader.startswith(reader) and labels_of(cohort) == {stay: label}
    assert not np.isnan(cohort.statistics).any() and not np.isnan(cohort.vectors).any() if options else True


def test_the_readmes_commands_for_ones_own_table(tmp_path, capsys, monkeypatch):
    """As printed there, but on 60 stays and for one epoch."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readers, "synthetic_cohort", lambda stays: synthetic_cohort(60))
    Path("checkpoints").mkdir()
    Path("checkpoints/physionet2012.pt").symlink_to(Path(train.__file__).with_name("checkpoints") / "physionet2012.pt")
    commands = {"readers.py": readers.main, "train.py": lambda options: train.main([*options, "--max_epochs", "1"]),
                "test_suite.py": main}
    for line in (line for _, block in readme_blocks("run") for line in block.splitlines()):
        python, script, *options = shlex.split(line, comments=True)
        assert python == "python" and commands[script](options) == 0, line
    assert "Stay 1001 (label" in capsys.readouterr().out
    assert json.loads(Path("mine.json").read_text())["stays"] == 12
    assert len(pd.read_csv("mine.csv")) == 60
    assert len(list(Path("mine-plots").glob("*.png"))) == 5


@pytest.mark.parametrize("document", ["README.md", "RESULTS.md"])
def test_every_command_of_the_documents_has_options_that_exist(monkeypatch, document):
    """Each line of a shell block, parsed by the command that it names, which then does nothing."""
    done = []
    for module, name in ((train, "pretrain"), (train, "finetune"), (readers, "write_long_table"),
                         (labels, "write_physionet2012_labels"), (test_suite, "performance"),
                         (test_suite, "forecasts"), (test_suite, "protocol"),
                         (test_suite, "forecast_benchmark"), (test_suite, "new_site"),
                         (test_suite, "benchmark"), (test_suite, "scale")):
        monkeypatch.setattr(module, name, lambda *a, name=name: done.append(name))
    monkeypatch.setattr(pytest, "main", lambda arguments: done.append("tests") or 0)
    monkeypatch.delenv("SEQSETVAE_SOAK", raising=False)
    commands = {"readers.py": readers.main, "labels.py": labels.main, "train.py": train.main, "test_suite.py": main}
    text = Path(train.__file__).with_name(document).read_text().replace("\\\n", "")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
             if line != "pip install -r requirements.txt"]
    for count, line in enumerate(lines, 1):
        launcher, script, *options = shlex.split(re.sub("^torchrun .*?(?=train.py)", "python ", line),
                                                 comments=True)
        assert launcher == "python" and commands[script](options) == 0 and len(done) == count, line
    assert lines
