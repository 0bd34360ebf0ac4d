"""Tests of report.py and plots.py: what is printed of a checkpoint, the files and pictures that it writes."""

import json
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import plots
import report
import train
from data import InputError
from labels import read_scores
from metrics import CHECKPOINT, Points, logit, score_figures
from predictor import Predictor, risk_over_time
from questions import with_points
from readers import synthetic_cohort, write_long_table
from report import show, subgroups, write_meds_predictions
from tasks import Binary
from test_suite import main
from tests.test_readers import meds
from tests.tiny import FINETUNE, one_error_line, write


def points_of_stays(stays, label) -> Points:
    """Points of stays that are each a patient of their own."""
    return Points(stays, stays, np.zeros(len(stays)), label)


def print_tables(figures: dict) -> None:
    for title, table in Binary().tables(figures | {"threshold_is": "best F1"}).items():
        show(title, table)


def test_fewer_than_ten_positives_or_negatives_have_no_interval(capsys):
    rng = np.random.default_rng(0)
    few = "stays with a positive label: 9, with a negative one: 31; below 10 of each no interval is given"
    for positives, said in ((9, few), (10, "")):
        label = (np.arange(40) < positives).astype(int)
        methods = {CHECKPOINT: (label / 4 + rng.random(40)) / 2, "another": rng.random(40)}
        figures = score_figures(points_of_stays(np.arange(40), label), methods, .5)
        intervals = [measure["interval"] for measures in figures["methods"].values() for measure in measures.values()]
        assert figures["few"].startswith(said) and all((i is None) == bool(said) for i in intervals)
        print_tables(figures | {"scored": "these", "model": model_figures_of()})
        out = capsys.readouterr().out
        assert ("\n95% intervals by bootstrap over 40 stays\n" in out) == (" [0." in out) == (not said)
    # many points of few stays are no more evidence
    assert score_figures(points_of_stays(np.repeat(np.arange(9), 99), np.tile([0, 1, 1], 297)),
                         {CHECKPOINT: rng.random(891)}, .5)["few"]


def test_a_planted_miscalibration_shows_in_its_group_and_nowhere_else(capsys):
    rng, n = np.random.default_rng(1), 4000
    logit, sex, unit = rng.normal(size=n) * 1.5 - 1, rng.integers(0, 2, n), rng.integers(0, 2, n)
    label = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    told = np.where((sex == 1) & (unit == 0), 2 * logit + 1, logit)  # overconfident, and too high
    groups = {"unit and sex": {f"{u}{s}": (unit == u) & (sex == s) for u in (0, 1) for s in (0, 1)}}
    methods = {CHECKPOINT: 1 / (1 + np.exp(-told))}
    figures = score_figures(points_of_stays(np.arange(n), label), methods, .5, groups=groups)
    for name, group in figures["subgroups"]["unit and sex"].items():
        (a, b), (c, d) = group["slope"]["interval"], group["intercept"]["interval"]
        assert (a < 1 < b, c < 0 < d) == ((False, False) if name == "01" else (True, True)), (name, group)
        mask = groups["unit and sex"][name]
        low, high = group["excess"]["interval"]
        assert group["excess"]["value"] == pytest.approx((label - methods[CHECKPOINT])[mask].mean())
        assert group["stays"] == mask.sum() and (low < 0 < high) == (name != "01")
        assert group["sensitivity"]["interval"][0] < group["sensitivity"]["value"] < group["sensitivity"]["interval"][1]
    assert figures["methods"][CHECKPOINT]["sensitivity"]["value"] == pytest.approx(.8, abs=.001)
    print_tables(figures | {"scored": "these"})
    rows = capsys.readouterr().out.split("\nSubgroups")[1].splitlines()
    assert rows[1].split() == ["stays", "positive", "AUROC", "AUPRC", "slope", "intercept", "observed", "-",
                               "predicted", "sensitivity", "PPV", "alarms/100"]
    named = ["all", *(f"unit and sex {group}" for group in ("00", "01", "10", "11"))]
    assert [row.split("  ")[0] for row in rows[2:]] == named and all(row.count("[") == 8 for row in rows[2:])


def test_subgroups_are_first_values_categories_quartiles_and_numbers_of_events(tmp_path, load):
    rows = [f"{i},{m},{v},{x}" for i in range(9) for m, v, x in
            ((5, "Age", 30 + i), (0, "Sex", i % 2), (9, "Sex", 7), (1, f"Unit={i % 3}", 1),
             (2, f"RACE//{'AB'[i % 2]}", ""))
            if not (i == 8 and v != "Age")]
    write(tmp_path / "events.csv", "\n".join(["stay_id,minute,variable,value", *rows]) + "\n")
    cohort = load(tmp_path)
    found = {name: {key: np.flatnonzero(mask).tolist() for key, mask in subgroups(cohort, np.arange(9), name).items()}
             for name in ("Sex", "Unit", "RACE", "Age", "events")}
    assert found == {"Sex": {"0": [0, 2, 4, 6], "1": [1, 3, 5, 7], "not recorded": [8]},
                     "Unit": {"0": [0, 3, 6], "1": [1, 4, 7], "2": [2, 5], "not recorded": [8]},
                     "RACE": {"A": [0, 2, 4, 6], "B": [1, 3, 5, 7], "not recorded": [8]},
                     "Age": {"30 to 31": [0, 1], "32 to 33": [2, 3], "34 to 35": [4, 5], "36 to 38": [6, 7, 8]},
                     "events": {"1": [8], "5": list(range(8))}}
    with pytest.raises(InputError, match="--subgroups unit: no variable of the data; near: Unit, events; give"):
        subgroups(cohort, np.arange(9), "unit")
    alike = replace(cohort, shown={"Unit=0": "surgery", "Unit=2": "surgery", "Unit=1": "ward"})
    assert {key: mask.sum() for key, mask in subgroups(alike, np.arange(9), "Unit").items()} == {
        "surgery": 5, "ward": 3, "not recorded": 1}
    early = with_points(cohort, np.array([1, 2, *[1] * 7]), np.array([0, 1, 2, *[5] * 7]), np.zeros(10))
    found = {key: np.flatnonzero(mask).tolist() for key, mask in subgroups(early, np.arange(10), "events").items()}
    assert found == {"1": [0, 9], "3": [1, 2], "4": [3, 4, 5, 6, 7, 8]}  # by the stay's last point, for all of its own


def test_stays_of_one_patient_are_resampled_together(tmp_path, capsys, small_finetuned):
    """From labels.csv to the report: 48 stays of 24 patients; the file of predictions names the patients."""
    cohort = synthetic_cohort(48)
    ids = np.array([f"other-{i}" for i in range(48)])
    folder = write_long_table(tmp_path / "data", replace(cohort, stay_id=ids, subject=ids), labels=False)
    patients = np.repeat([f"p{i}" for i in range(24)], 2)
    labels = pd.DataFrame({"stay_id": ids, "subject_id": patients, "label": np.arange(48) // 2 % 2})
    labels.to_csv(folder / "labels.csv", index=False)
    figures = {}
    for unit in ("patients", "stays"):
        assert main(["--checkpoint", str(small_finetuned), "--data_dir", str(folder), "--json", str(tmp_path / "json"),
                     "--predictions", str(tmp_path / unit), "--subgroups", "Gender"]) == 0
        figures[unit] = json.loads((tmp_path / "json").read_text())
        printed = capsys.readouterr().out
        if unit == "patients":
            assert "Scored: 48 stays of 24 patients, 24 positive" in printed
            assert "95% intervals by bootstrap over 24 patients\n" in printed
            assert "no interval below 10 patients of a label" in printed
        else:
            assert "Scored: 48 stays, 24 positive" in printed and "bootstrap over 48 stays\n" in printed
        labels.drop(columns="subject_id").to_csv(folder / "labels.csv", index=False)
    auroc = {unit: told["methods"][CHECKPOINT]["auroc"] for unit, told in figures.items()}
    assert auroc["patients"]["value"] == auroc["stays"]["value"]
    assert auroc["patients"]["interval"] != auroc["stays"]["interval"]
    table = pd.read_csv(tmp_path / "patients").set_index("stay_id")
    assert table["subject_id"].to_dict() == dict(zip(ids, patients))
    assert table["probability"].tolist() == pd.read_csv(tmp_path / "stays")["probability"].tolist()


def model_figures_of():
    return dict(head_parameters=1, parameters=2, active_units=3, latent_dim=4)


def test_the_analysis_writes_what_is_asked_for_with_or_without_labels(tmp_path, capsys, finetuned):
    pytest.importorskip("matplotlib")
    predictor, dataset = Predictor.with_data(finetuned)
    model, cohort = predictor.model, dataset.cohort
    names = ("predictions", "embeddings", "json", "plots")
    options = [text for name in names for text in (f"--{name}", str(tmp_path / name))]
    options += ["--trajectory", cohort.stay_id[3], "--subgroups", "Gender,Age", "--sensitivity", ".5"]
    capsys.readouterr()
    assert main(["--checkpoint", str(finetuned), *options]) == 0
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "json").read_text())
    auroc = figures["methods"][CHECKPOINT]["auroc"]
    assert auroc["interval"] is None and re.search(f"AUROC +{auroc['value']:.4f}\n", printed)
    assert "\nstays with a positive label: 1, with a negative one: 4; below 10 of each" in printed
    table, arrays = pd.read_csv(tmp_path / "predictions"), np.load(tmp_path / "embeddings")
    assert table["stay_id"].tolist() == arrays["stay_id"].tolist() == cohort.stay_id.tolist()
    assert table["label"].tolist() == cohort.label.tolist()
    test = table[table["split"] == "test"]
    assert auroc["value"] == roc_auc_score(test["label"], test["probability"]) and figures["stays"] == len(test)
    assert list(table) == ["stay_id", "subject_id", "minute", "probability", "split", "label"]
    logits = model.classify(torch.from_numpy(arrays["features"]))
    np.testing.assert_allclose(Binary().answer(logits.detach())[:, 0], table["probability"], atol=1e-6)
    assert arrays["h"].shape == (24, model.config.latent_dim)
    trajectory = figures["trajectory"]
    assert trajectory["stay"] == cohort.stay_id[3]
    assert trajectory["risk"][-1] == pytest.approx(table["probability"][3], abs=1e-6)
    assert f"{trajectory['risk'][0]:.4f}" in printed
    assert set(figures["subgroups"]) == {"Gender", "Age"} and figures["alarm"]["sensitivity"] == .5
    assert sum(group["stays"] for group in figures["subgroups"]["Gender"].values()) == figures["stays"]
    pictures = [f"{name}.png" for name in ("calibration", "curves", "decision", "features", "ranking",
                                         "subgroups", "trajectory")]
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == pictures

    unlabelled = ["--checkpoint", str(finetuned), "--data_dir",
                  str(write_long_table(tmp_path / "unlabelled", cohort, labels=False))]
    assert main([*unlabelled, "--predictions", str(tmp_path / "new.csv")]) == 0
    assert "nothing to score" in capsys.readouterr().out
    again = pd.read_csv(tmp_path / "new.csv")
    np.testing.assert_allclose(again["probability"], table["probability"], atol=1e-5)
    assert again["label"].isna().all() and again["split"].tolist() == table["split"].tolist()
    one_error_line(capsys, main(unlabelled), "--predictions needs no label")
    one_error_line(capsys, main([*unlabelled, "--trajectory", "nobody"]), "nobody")


def test_scoring_needs_neither_pytest_nor_the_tests():
    loaded = "import sys, report; print([name for name in sys.modules if name.split('.')[0] in ('pytest', 'tests')])"
    home = Path(train.__file__).parent
    ended = subprocess.run([sys.executable, "-c", loaded], cwd=home, capture_output=True, text=True)
    assert ended.stdout == "[]\n", ended.stderr


def test_a_stay_wholly_before_minute_0_is_drawn_from_its_first_event(tmp_path, small_finetuned, capsys):
    pytest.importorskip("matplotlib")
    write(tmp_path / "events.csv", "stay_id,minute,variable,value\n1,-300,HR,80\n1,-300,GCS,15\n1,-120,HR,90\n")
    assert main(["--checkpoint", str(small_finetuned), "--data_dir", str(tmp_path), "--trajectory", "1",
                 "--plots", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out
    assert "Stay 1" in printed and "-5.00" in printed and "-2.00" in printed
    assert (tmp_path / "plots/trajectory.png").stat().st_size
    predictor, dataset = Predictor.with_data(small_finetuned, {"data_dir": str(tmp_path)}, "cpu")
    figure = plots.plot_trajectory(risk_over_time(predictor.model, dataset, 0), dataset, 0, .5)
    risk, _, chart, _ = figure.axes
    low, high = risk.get_xlim()
    assert low < -5 < -2 < high < 0
    assert sum(len(points.get_offsets()) for points in chart.collections) == 3


def test_a_stay_of_one_set_is_drawn_without_a_warning(tmp_path, small_finetuned):
    pytest.importorskip("matplotlib")
    write(tmp_path / "events.csv", "stay_id,minute,variable,value\n1,0,HR,80\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["--checkpoint", str(small_finetuned), "--data_dir", str(tmp_path), "--trajectory", "1",
                     "--plots", str(tmp_path / "plots")]) == 0
    assert (tmp_path / "plots/trajectory.png").stat().st_size


def test_a_stay_without_a_known_variable_has_no_probability_and_no_part_in_the_score(tmp_path, capsys, small_finetuned):
    cohort = synthetic_cohort(24)
    folder = write_long_table(tmp_path / "d", replace(cohort, stay_id=np.array([f"new-{i}" for i in range(24)]),
                                                      subject=np.array([f"new-{i}" for i in range(24)])))
    write(folder / "events.csv", (folder / "events.csv").read_text() + "X,0,their HR,80\nY,0,their HR,70\nY,9,HR,80\n")
    write(folder / "labels.csv", (folder / "labels.csv").read_text() + "X,1\n")
    options = ["--checkpoint", str(small_finetuned), "--data_dir", str(folder)]
    assert main([*options, "--predictions", str(tmp_path / "p.csv")]) == 0
    out, table = capsys.readouterr().out, pd.read_csv(tmp_path / "p.csv").set_index("stay_id")["probability"]
    assert table.isna().sum() == 1 and np.isnan(table["X"]) and 0 < table["Y"] < 1
    assert "not scored: 1 labelled points, as nothing that the checkpoint knows lies before them (stay X at" in out
    assert "Scored: 24 stays, 5 positive" in out
    assert "predictions: 1 without an answer, as nothing that the checkpoint knows lies before them (stay X" in out
    one_error_line(capsys, main([*options, "--trajectory", "X"]), "the checkpoint knows none of its variables")


@pytest.fixture
def meds_answers(tmp_path, load, capsys):
    """Of 28 of 30 subjects of MEDS data, each asked twice, made-up answers: the cohort, probabilities [60], the file
    that holds them, what was printed when it was written, and the times that were asked."""
    rng = np.random.default_rng(0)
    times = pd.Timestamp("2020-02-03 10:00:00.000001") + pd.to_timedelta(rng.integers(10**11, size=60), "us")
    subject = np.repeat(np.arange(1, 31), 2)
    meds(tmp_path / "meds", "data/0.parquet", subject_id=np.arange(1, 31), time=[times.min()] * 30, code=["HR"] * 30)
    meds(tmp_path / "meds", "labels/0.parquet", subject_id=subject, prediction_time=times,
         boolean_value=rng.random(60) < .4)
    cohort, probability = load(tmp_path / "meds"), rng.random(60)
    path = tmp_path / "answers.parquet"
    write_meds_predictions(path, cohort, np.arange(60), probability, .5, np.arange(2, 30))
    asked = pd.DataFrame({"subject_id": subject, "prediction_time": times})
    return cohort, probability, path, capsys.readouterr().out, asked


def test_predictions_of_meds_data_are_what_meds_evaluation_takes(meds_answers):
    from pyarrow import parquet
    cohort, probability, path, printed, asked = meds_answers
    assert {field.name: str(field.type) for field in parquet.read_schema(path)} == {
        "subject_id": "int64", "prediction_time": "timestamp[us]", "boolean_value": "bool",
        "predicted_boolean_value": "bool", "predicted_boolean_probability": "float"}
    table, of = pd.read_parquet(path), np.isin(cohort.point_stay, np.arange(2, 30))
    keys = ["subject_id", "prediction_time"]
    asked = asked[asked["subject_id"].isin(cohort.stay_id[2:].astype(int))].sort_values(keys)
    order = table.sort_values(keys)
    assert order["prediction_time"].tolist() == asked["prediction_time"].tolist()  # to the microsecond
    assert order["subject_id"].tolist() == asked["subject_id"].tolist()
    assert table["boolean_value"].tolist() == (cohort.label[of] == 1).tolist()
    assert table["predicted_boolean_value"].tolist() == (probability[of] >= .5).tolist()
    assert table["predicted_boolean_probability"].tolist() == probability[of].astype(np.float32).tolist()
    assert "56 points of 28 subjects" in printed and "4 of subjects that" in printed


def test_meds_evaluation_finds_our_auroc(meds_answers):
    evaluation = pytest.importorskip("meds_evaluation.evaluate")
    polars = pytest.importorskip("polars")
    cohort, probability, path, *_ = meds_answers
    told = evaluation.evaluate_binary_classification(polars.read_parquet(path))["samples_equally_weighted"]
    of = np.isin(cohort.point_stay, np.arange(2, 30))
    assert told["roc_auc_score"] == pytest.approx(roc_auc_score(cohort.label[of], probability[of].astype(np.float32)))


def test_predictions_as_parquet_have_the_columns_of_the_csv(tmp_path, finetuned):
    pytest.importorskip("pyarrow")
    for end in ("csv", "parquet"):
        assert main(["--checkpoint", str(finetuned), "--predictions", str(tmp_path / f"p.{end}")]) == 0
    csv, table = pd.read_csv(tmp_path / "p.csv", dtype={"stay_id": str}), pd.read_parquet(tmp_path / "p.parquet")
    assert list(csv) == list(table) and table["stay_id"].tolist() == csv["stay_id"].tolist()
    np.testing.assert_allclose(table["probability"], csv["probability"], rtol=1e-12)


def test_analysis_options_need_a_checkpoint_and_plots_need_matplotlib(capsys, monkeypatch, finetuned):
    one_error_line(capsys, main(["--plots", "x"]), "--checkpoint")
    one_error_line(capsys, main(["--checkpoint", "x", "--plot_format", "svg"]), "--plot_format needs --plots DIR")
    one_error_line(capsys, main(["--checkpoint", str(finetuned), "--device", "cuda:99"]), "--device cuda:99")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    one_error_line(capsys, main(["--checkpoint", str(finetuned), "--plots", "x"]), "pip install matplotlib")
    one_error_line(capsys, main(["--checkpoint", str(finetuned), "--unknown"]), "--unknown")
    one_error_line(capsys, main(["--protocol", "--methods", "frozen", "luck"]), "--methods: invalid choice: 'luck'")
    one_error_line(capsys, main(["--protocol", "--data_dir", "x", "--splits", "none.csv"]), "--splits none.csv: no such")
    one_error_line(capsys, main(["--benchmark", "luck"]), "invalid choice: 'luck'")
    for words, line in ((["--export", "y", "--json", "z"], "--export does not go with --json"),
                        (["--follow", "--predictions", "z", "--export", "y"],
                         "--export does not go with --follow, --predictions")):
        one_error_line(capsys, main(["--checkpoint", "x", *words]), line)
    one_error_line(capsys, main(["--seeds", "1", "-1"]), "seeds is (1, -1)")


def test_several_checkpoints_are_scored_as_the_mean_of_their_logits(tmp_path, capsys, small_finetuned):
    content = torch.load(small_finetuned, weights_only=True)
    content["model"]["cls_head.0.weight"] = -content["model"]["cls_head.0.weight"] + .01
    torch.save(content, tmp_path / "other.pt")
    ways, logits = {"a": [small_finetuned], "b": [tmp_path / "other.pt"],
                    "both": [small_finetuned, tmp_path / "other.pt"]}, {}
    for name, paths in ways.items():
        assert main(["--checkpoint", *map(str, paths), "--predictions", str(tmp_path / name), "--device", "cpu"]) == 0
        logits[name] = logit(pd.read_csv(tmp_path / name)["probability"], least=1e-7)
    np.testing.assert_allclose(logits["both"], (logits["a"] + logits["b"]) / 2, atol=1e-5)
    assert not np.allclose(logits["a"], logits["b"])
    capsys.readouterr()
    one_error_line(capsys, main(["--checkpoint", *map(str, ways["both"]), "--trajectory", "x"]),
                   "--trajectory: of one checkpoint, where 2 are given")


def test_few_points_have_a_calibration_without_formulas(tmp_path):
    pytest.importorskip("matplotlib")
    label, p = np.arange(30) % 3 // 2, np.linspace(.1, .4, 30)
    figures = score_figures(points_of_stays(np.arange(30), label), {CHECKPOINT: p}, .5)
    figure = plots.plot_calibration(label, p, figures)
    plots.save_figure(figure, tmp_path / "x.png")
    ticks = [text.get_text() for ax in figure.axes for which in ("major", "minor")
             for text in ax.yaxis.get_ticklabels(which=which)]
    assert "1" in ticks and not [text for text in ticks if "$" in text]


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    pytest.importorskip("matplotlib")
    figure, (ax,) = plots.new_figure(1)
    ax.plot([0, 1], label="$\\a {$")
    ax.set_yticks([0, 1], ["cost $", "$\\frac$"])
    ax.set_title("Stay $x_$")
    ax.legend()
    plots.save_figure(figure, tmp_path / "x.png")  # which raises at a formula that is none
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cost $", "$\\frac$"]


@pytest.mark.parametrize("option", ["predictions", "embeddings", "json", "explain", "report", "forecast", "odd"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(
        tmp_path, capsys, monkeypatch, small_finetuned, option):
    monkeypatch.setattr(report, "open_together", lambda _: pytest.fail("opened"))
    pytest.importorskip("matplotlib")
    other = "report" if option == "json" else "json"
    path, options = tmp_path / "x", ["--checkpoint", str(small_finetuned), f"--{option}"]
    more = ["--until", "2"] if option == "forecast" else []
    wrong = {tmp_path / "no" / "x": "its folder does not exist; make it", tmp_path: "is a folder",
             small_finetuned: "ends in .pt; name it with .", f"{path}.xlsx": "ends in .xlsx; name it with ."}
    for name, reason in wrong.items():
        one_error_line(capsys, main([*options, str(name), *more]), f"--{option} {name}: {reason}")
    if option not in ("forecast", "odd"):
        one_error_line(capsys, main([*options, str(path), f"--{other}", str(path)]), "; name another")
        one_error_line(capsys, main([*options, ""]), "give the FILE" if option == "explain" else "is a folder")
    with monkeypatch.context() as patch:
        patch.setattr(report.os, "access", lambda path, _: path != tmp_path)
        one_error_line(capsys, main([*options, str(path), *more]), "its folder cannot be written to")
    if report.WRITTEN[option] == report.TABLES:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pyarrow", None)
            one_error_line(capsys, main([*options, f"{path}.PARQUET", *more]), "pip install pyarrow")
    if option == "report":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        one_error_line(capsys, main([*options, str(path)]), "pip install matplotlib")


def others_data(tmp_path, stays: int = 60):
    """A folder of stays that no checkpoint knows, without labels, and its cohort."""
    cohort = synthetic_cohort(stays)
    ids = np.array([f"other-{i:02d}" for i in range(stays)])
    cohort = replace(cohort, stay_id=ids, subject=ids)
    return write_long_table(tmp_path / "data", cohort, labels=False), cohort


def test_at_hours_reports_what_each_hour_alone_reports_by_one_threshold(tmp_path, capsys, small_finetuned):
    folder, cohort = others_data(tmp_path)
    label = np.arange(60) % 2
    pd.DataFrame({"stay_id": cohort.stay_id, "label": label}).to_csv(folder / "labels.csv", index=False)
    command = ["--checkpoint", str(small_finetuned), "--data_dir", str(folder), "--device", "cpu"]
    ends = cohort.set_minute[cohort.stay_start[1:] - 1] / 60
    late = float(np.median(ends))
    assert main([*command, "--at_hours", str(late), "6", "6", "--json", str(tmp_path / "json")]) == 0
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "json").read_text())
    rows = figures["at_hours"]
    assert [row["hour"] for row in rows] == [6, late, None]
    assert [row["at_the_end"] for row in rows] == [(ends <= 6).sum(), (ends <= late).sum(), 60]
    threshold = torch.load(small_finetuned, weights_only=True)["metrics"]["threshold"]
    for row in rows:
        asked = ["--hours", f"{row['hour']}"] if row["hour"] else []
        assert main([*command, *asked, "--json", str(tmp_path / "alone"), "--predictions", str(tmp_path / "p")]) == 0
        alone, p = json.loads((tmp_path / "alone").read_text()), pd.read_csv(tmp_path / "p")["probability"].to_numpy()
        for name in ("auroc", "auprc", "slope", "intercept"):
            assert row["methods"][CHECKPOINT][name] == alone["methods"][CHECKPOINT][name]
        assert row["probability"] == alone["probability"] and row["stays"] == 60 and row["unanswered"] == 0
        raised, found = p >= threshold, row["methods"][CHECKPOINT]
        assert row["threshold"] == row["alarm"]["threshold"] == threshold
        assert found["alarms"]["value"] == pytest.approx(100 * raised.mean())
        assert found["sensitivity"]["value"] == pytest.approx(raised[label == 1].mean())
        assert found["specificity"]["value"] == pytest.approx(1 - raised[label == 0].mean())
    table = printed.split("At hours after admission")[1].splitlines()
    assert table[1].startswith(f"alarms from {threshold:.4f} on at each (best F1 of the validation split)")
    assert re.split("  +", table[2].strip()) == ["hour 6", f"hour {late:g}", "the question"]
    cells = {row[0]: row[1:] for row in (re.split("  +", line) for line in table[3:])}
    assert cells["asked at the end of their record"] == [str(row["at_the_end"]) for row in rows]
    assert cells["AUROC"][0].startswith(f"{rows[0]['methods'][CHECKPOINT]['auroc']['value']:.3f} [")


def test_at_hours_says_what_it_cannot_score_and_refuses_labels_with_times(tmp_path, capsys, small_finetuned):
    rows = [f"{i},{m},HR,{80 + i}" for i in range(40) for m in (60 * (1 + i % 2), 400)]
    folder = write(tmp_path / "data/events.csv", "\n".join(["stay_id,minute,variable,value", *rows]) + "\n").parent
    labels = pd.DataFrame({"stay_id": range(40), "label": np.arange(40) % 2})
    labels.to_csv(folder / "labels.csv", index=False)
    command = ["--checkpoint", str(small_finetuned), "--data_dir", str(folder), "--json", str(tmp_path / "json")]
    assert main([*command, "--at_hours", "1.5", "3"]) == 0  # by hour 1.5 only the stays of label 0 have an event
    printed, (early, later, _) = capsys.readouterr().out, json.loads((tmp_path / "json").read_text())["at_hours"]
    assert early == {"hour": 1.5, "at_the_end": 0, "unanswered": 20,
                     "lacking": "one class only (0 of 20 labels are 1)"}
    assert "\nhour 1.5: nothing to score: one class only (0 of 20 labels are 1)\n" in printed
    assert later["stays"] == 40 and later["unanswered"] == 0
    for hours in ("0", "nan", "inf", "-3"):
        one_error_line(capsys, main([*command, "--at_hours", "6", hours]), "at_hours is (6.0, ")
    labels.assign(minute=400).to_csv(folder / "labels.csv", index=False)
    one_error_line(capsys, main([*command, "--at_hours", "6"]), "--at_hours: these labels have times of their own")
    one_error_line(capsys, main([*command, "--follow", "--at_hours", "6"]), "--follow does not go with --at_hours")


def test_at_hours_has_the_figures_of_an_event_whose_time_grows(tmp_path, capsys, small_models, small_finetuned):
    folder, cohort = others_data(tmp_path)
    rng = np.random.default_rng(0)
    pd.DataFrame({"stay_id": cohort.stay_id, "event": rng.integers(0, 2, 60), "hours": rng.exponential(48, 60)}
                 ).to_csv(folder / "labels.csv", index=False)
    pretrained = small_finetuned.parents[1] / "pretrain/best.pt"
    assert train.main([*FINETUNE, str(pretrained), "--data_dir", str(folder), "--run_dir", str(tmp_path / "run")]) == 0
    assert main(["--checkpoint", str(tmp_path / "run/best.pt"), "--at_hours", "6", "--json", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    assert main(["--checkpoint", str(tmp_path / "run/best.pt"), "--hours", "6", "--json", str(tmp_path / "b")]) == 0
    both, alone = (json.loads((tmp_path / name).read_text()) for name in "ab")
    at_6, question = both["at_hours"]
    assert at_6["methods"] == alone["methods"] != question["methods"] == both["methods"]
    assert at_6["calibration"] == alone["calibration"] and at_6["stays"] == alone["stays"] == 12


def test_a_score_is_compared_on_the_stays_that_have_both(tmp_path, capsys, small_finetuned):
    pytest.importorskip("matplotlib")
    folder, cohort = others_data(tmp_path)
    label, rng = np.arange(60) % 2, np.random.default_rng(0)
    pd.DataFrame({"stay_id": cohort.stay_id, "label": label}).to_csv(folder / "labels.csv", index=False)
    score = pd.DataFrame({"stay_id": cohort.stay_id, "score": (10 * (label + rng.normal(size=60))).round()})
    score.loc[50:, "score"] = np.nan
    pd.concat([score, pd.DataFrame({"stay_id": ["nobody"], "score": [3]})]).to_csv(tmp_path / "s.csv.gz", index=False)
    command = ["--checkpoint", str(small_finetuned), "--data_dir", str(folder), "--device", "cpu",
               "--json", str(tmp_path / "json")]
    assert main([*command, "--compare", str(tmp_path / "s.csv.gz"), "--predictions", str(tmp_path / "p"),
                 "--plots", str(tmp_path / "plots")]) == 0
    printed, told = capsys.readouterr().out, json.loads((tmp_path / "json").read_text())["compare"]
    p = pd.read_csv(tmp_path / "p")["probability"][:50]
    own, others = roc_auc_score(label[:50], p), roc_auc_score(label[:50], score["score"][:50])
    assert told["methods"][CHECKPOINT]["auroc"]["value"] == pytest.approx(own)
    assert told["methods"]["s.csv.gz"]["auroc"]["value"] == pytest.approx(others)
    difference = told["difference"]["auroc"]
    assert difference["value"] == pytest.approx(own - others)
    assert difference["interval"][0] < difference["value"] < difference["interval"][1]
    assert told["points"] == 50 and told["without_a_score"] == 10 and told["net_benefit"] is None
    assert "10 scored points have no score, the first: stay other-50\n" in printed
    assert "1 rows of no stay with a usable event, the first: " in printed
    assert re.search(rf"this checkpoint less s.csv.gz +{own - others:.4f} \[", printed)
    assert "no net benefit: scores beyond 0 to 1" in printed and (tmp_path / "plots/ranking.png").stat().st_size

    same = pd.read_csv(tmp_path / "p")[["stay_id", "probability"]].rename(columns={"probability": "score"})
    same.to_csv(tmp_path / "same.csv", index=False)
    assert main([*command, "--compare", str(tmp_path / "same.csv")]) == 0
    told = json.loads((tmp_path / "json").read_text())["compare"]
    assert told["difference"]["auprc"] == {"value": 0, "interval": [0, 0]} and told["without_a_score"] == 0
    assert told["net_benefit"]["same.csv"] == told["net_benefit"][CHECKPOINT]

    capsys.readouterr()
    for rows, said in ((score.assign(score=4), "every score is 4, which ranks nothing"),
                       (score.assign(score="high"), "score is 'high', not a number"),
                       (score.rename(columns={"score": "points"}), "no column score"),
                       (pd.concat([score, score.assign(score=1)]), "given twice and not alike"),
                       (score.assign(score=score["score"].where(label == 1)), "one class only"),
                       (score.assign(stay_id="nobody").head(1), "no label at all")):
        rows.to_csv(tmp_path / "bad.csv", index=False)
        one_error_line(capsys, main([*command, "--compare", str(tmp_path / "bad.csv")]), said)
    one_error_line(capsys, main([*command, "--compare", "none.csv"]), "--compare none.csv: no such file")


def test_of_scores_with_times_the_last_that_is_not_after_the_question_counts(tmp_path):
    cohort = with_points(synthetic_cohort(3), np.array([2, 1, 1]), np.array([60., 120, 120, 120]), np.zeros(4))
    a, b, c = cohort.stay_id
    write(tmp_path / "s.csv", f"stay_id,hour,score\n{a},2,7\n{a},1,5\n{a},2.1,9\n{b},3,8\n{c},0,1\n{c},1,\n{c},0,1\n")
    score, lines = read_scores(cohort, tmp_path / "s.csv")
    np.testing.assert_array_equal(score, [5, 7, np.nan, 1])
    assert lines == [f"1 rows given more than once, the first: {tmp_path / 's.csv'} line 8"]
    write(tmp_path / "s.csv", f"stay_id,score\n{a},7\n{c},1\n")
    np.testing.assert_array_equal(read_scores(cohort, tmp_path / "s.csv")[0], [7, 7, np.nan, 1])
