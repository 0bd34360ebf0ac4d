"""Tests of explain.py: what an answer would be without some events, and whether that is faithful."""

import io
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import report
import train
from batches import StayDataset
from data import InputError
from explain import (SHARES, by_variable, changes, explained, explanations, faithfulness, importance, log_odds,
                     questions_at)
from metrics import logit
from model import SeqSetVAE
from predictor import CPU, Predictor, risk_over_time
from questions import with_points
from readers import synthetic_cohort, write_long_table
from runs import answers_at
from tasks import Classes, Event, Number, Several
from test_suite import main
from tests.tiny import NAMES, PLAIN, build, cohort_of, make_small, one_error_line, random_stays, tiny, write

# ----------------------------------------------------------------------------------------------------------------------
# A change is what a plain loop finds
# ----------------------------------------------------------------------------------------------------------------------

CONFIGS = [dict(summaries=True, head_variables=5), dict(features="multiscale"), dict(classification_only=False),
           dict(decoder="slots", summaries=True, head_variables=7)]


def log_odds_at(model, stay, minute: float) -> float:
    """Of a stay as a plain list, asked at this minute."""
    cohort = with_points(cohort_of([stay, random_stays([1])[0]]), np.array([1, 0]), np.array([minute]))
    (p,) = answers_at(model, StayDataset(cohort, PLAIN, points=True), np.arange(1), CPU)[:, 0]
    return np.log(p / (1 - p))


def without(stay, leave_out) -> list:
    """The stay without the events for which `leave_out` (of minute, place in its set, variable); an empty set is
    gone."""
    rest = [(minute, [(v, x) for i, (v, x) in enumerate(events) if not leave_out(minute, i, v)])
            for minute, events in stay]
    return [(minute, events) for minute, events in rest if events]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_change_is_the_difference_to_the_answer_of_a_record_without_the_events(config):
    stays = random_stays([12, 7], valueless=.2)
    model, cohort = build(SeqSetVAE, tiny(**config)), cohort_of(stays)
    table = explanations(model, StayDataset(cohort, PLAIN, points=True), np.arange(2), CPU, events=10**6)
    variables, events = (table[table["level"] == level] for level in ("variable", "event"))
    assert len(events) == len(cohort.event_value)
    for p, stay in enumerate(stays):
        minute = stay[-1][0]
        base = log_odds_at(model, stay, minute)
        of_stay = variables[variables["stay_id"] == f"stay{p}"].set_index("variable")
        assert sorted(of_stay.index) == sorted({NAMES[v] for _, events in stay for v, _ in events})
        assert (-of_stay["change"].abs()).is_monotonic_increasing
        for name, row in of_stay.iterrows():
            left = without(stay, lambda minute, i, v: NAMES[v] == name)
            assert row["change"] == pytest.approx(base - log_odds_at(model, left, minute), abs=1e-5)
            last = [(m, x) for m, events in stay for v, x in events if NAMES[v] == name][-1]
            assert (row["event_minute"], row["value"]) == pytest.approx(last, nan_ok=True)
        expected = [(at, NAMES[v], base - log_odds_at(model, without(stay, lambda m, j, _: (m, j) == (at, i)), minute))
                    for at, events in stay for i, (v, _) in enumerate(events)]
        found = events[events["stay_id"] == f"stay{p}"]
        rows = zip(*(found[name] for name in ("event_minute", "variable", "change")))
        for (*place, change), (*other, right) in zip(sorted(rows), sorted(expected)):
            assert place == other and change == pytest.approx(right, abs=1e-5)


def test_without_its_only_variable_a_stay_has_no_answer_and_the_trajectory_says_what_moves_its_last():
    model, stays = build(SeqSetVAE, tiny(summaries=True, head_variables=5)), [random_stays([12])[0], [(5, [(3, 1.)])]]
    dataset = StayDataset(cohort_of(stays), PLAIN, points=True)
    moved = by_variable(model, dataset, 0, CPU)
    assert sorted(moved) == NAMES and by_variable(model, dataset, 1, CPU) == {"lab3": None}
    trajectory = risk_over_time(model, dataset, 0)
    assert trajectory["highest"] == trajectory["minute"][np.argmax(trajectory["risk"])]
    assert trajectory["moved"] == pytest.approx(moved, abs=1e-5) and trajectory["scale"] == "log odds"
    assert risk_over_time(model, dataset, 0, why=False)["moved"] == {}


def test_what_is_explained_of_each_kind():
    logits = torch.randn(5, 4, dtype=torch.float64)
    several, classes, number = Several(("a", "b")), Classes(("x", "y", "z")), Number(mean=2., std=3.)
    event = Event(("death", "home"), horizons=(2., 5.), edges=(2., 5.), marginal=(.1,) * 4)
    close = np.testing.assert_allclose
    close(log_odds(several, logits), (logits[:, 1::2] - logits[:, ::2]).numpy())
    p = logits[:, :3].softmax(-1).numpy()
    close(log_odds(classes, logits[:, :3]), np.log(p / (1 - p)))
    close(log_odds(number, logits[:, :3]), 2 + 3 * logits[:, :3].median(1, keepdim=True).values.numpy())
    six = torch.randn(5, 6, dtype=torch.float64)
    close(log_odds(event, six)[:, 0], logit(event.answer(six)[:, event.columns.index("death_5")]))
    assert [explained(task) for task in (several, classes, number, event)] == [
        ("a", "b"), ("x", "y", "z"), ("median",), ("death_5",)]


def test_each_of_several_outcomes_has_its_own_change():
    task = Several(("a", "b"))
    torch.manual_seed(0)
    model = SeqSetVAE(tiny(classes=4, head_widths=(8,)), torch.randn(7, 12), task).eval()
    dataset = StayDataset(cohort_of(random_stays([6])), PLAIN, points=True)
    table = explanations(model, dataset, np.arange(1), CPU, events=3)
    assert table.groupby(["level", "outcome"]).size().to_dict() == {
        ("event", "a"): 3, ("event", "b"): 3, ("variable", "a"): 7, ("variable", "b"): 7}
    (_, change), = changes(model, dataset, np.arange(1), "variable", CPU)
    for k, name in enumerate("ab"):
        mine = table[(table["outcome"] == name) & (table["level"] == "variable")].sort_values("variable")
        np.testing.assert_allclose(mine["change"], change[:, k], atol=1e-6)
    assert list(importance(table).columns) == ["a", "b"]


def test_where_nothing_would_be_left_no_size_of_a_change_is_made_up(small_finetuned, tmp_path):
    """A stay of one variable has no change of it: it counts in no mean, and of such stays alone there is none."""
    rows = "stay_id,minute,variable,value\n"
    two = "".join(f"{i},0,HR,{60 + i}\n{i},0,Lactate,{i}\n" for i in range(5))
    found = {}
    for name, text in {"one": "one,0,HR,80\n", "both": two + "one,0,HR,80\n", "two": two}.items():
        write(tmp_path / name / "events.csv", rows + text)
        assert main(["--checkpoint", str(small_finetuned), "--data_dir", str(tmp_path / name), "--explain",
                     str(tmp_path / "why.csv"), "--faithfulness", "2", "--json", str(tmp_path / "json")]) == 0
        found[name] = json.loads((tmp_path / "json").read_text())["importance"]
    assert found["one"] == {} and found["both"] == found["two"] != {}


def test_without_labels_explanations_are_judged_and_variables_have_their_labels(small_finetuned, tmp_path, capsys):
    folder = write_long_table(tmp_path / "new", synthetic_cohort(5, seed=3), labels=False)
    options = ["--checkpoint", str(small_finetuned), "--data_dir", str(folder)]
    assert main([*options, "--faithfulness", "3"]) == 0
    assert "Faithfulness of explanations over 3 questions" in capsys.readouterr().out
    names = write(tmp_path / "names.csv", "source,name,factor,offset,label\nHR,,,,heart rate\n")
    why = ["--explain", str(tmp_path / "why.csv"), "--explain_events", "0"]
    assert main([*options, *why, "--variables", str(names)]) == 0
    assert "\nheart rate  " in capsys.readouterr().out
    assert "HR" in pd.read_csv(tmp_path / "why.csv")["variable"].tolist()


def test_python_says_that_no_question_can_be_explained(small_finetuned):
    predictor, events = Predictor(small_finetuned, "cpu"), pd.DataFrame(
        {"stay_id": ["a", "a"], "minute": [5, 9], "variable": ["HR", "Lactate"], "value": [80., 2.]})
    assert len(predictor.explain(events, at="all", largest=0)) == len(predictor.explain(events, at=9, largest=0)) == 2
    for at in (-1, 4.9):
        with pytest.raises(InputError, match="none of 1 stays has such a question"):
            predictor.explain(events, at=at)
    with pytest.raises(InputError, match="none of 1 stays"), pytest.warns(UserWarning, match="unknown"):
        predictor.explain(events.assign(variable="Unheard"), at="highest")


# ----------------------------------------------------------------------------------------------------------------------
# Where one variable's jump decides the label
# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def jumps(tmp_path_factory):
    """A folder of 200 stays, of which those whose `signal` jumps have label 1, and a checkpoint that learned them."""
    rng, home = np.random.default_rng(0), tmp_path_factory.mktemp("jumps")
    label, rows = np.arange(200) % 2, []
    for stay in range(200):
        for hour in range(8):
            for name in rng.permutation(["signal", "a", "b", "c", "d"])[:4]:
                jump = 4 * (name == "signal" and hour > 5 and label[stay])
                rows.append((stay, 60 * hour, name, rng.normal() + jump))
        rows.append((stay, 450, "signal", rng.normal() + 4 * label[stay]))
    (home / "data").mkdir()
    pd.DataFrame(rows, columns=["stay_id", "minute", "variable", "value"]).to_csv(home / "data/events.csv", index=False)
    pd.DataFrame({"stay_id": range(200), "label": label}).to_csv(home / "data/labels.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        data = ["--data_dir", str(home / "data"), "--device", "cpu", "--precision", "fp32"]
        assert train.main(["--mode", "pretrain", *data, "--max_epochs", "1", "--run_dir", str(home / "before")]) == 0
        assert train.main(["--mode", "finetune", *data, "--pretrained_ckpt", str(home / "before/best.pt"),
                           "--run_dir", str(home / "run")]) == 0
    return home / "data", home / "run" / "best.pt"


def test_the_variable_that_decides_comes_first_and_its_order_is_faithful(jumps, tmp_path, capsys):
    _, checkpoint = jumps
    pytest.importorskip("matplotlib")
    options = ["--explain", str(tmp_path / "why.csv"), "--faithfulness", "20", "--json", str(tmp_path / "all.json")]
    assert main(["--checkpoint", str(checkpoint), *options, "--plots", str(tmp_path)]) == 0
    table, figures = pd.read_csv(tmp_path / "why.csv"), json.loads((tmp_path / "all.json").read_text())
    variables = table[table["level"] == "variable"]
    first = variables.drop_duplicates("stay_id")
    positive = first["stay_id"] % 2 == 1
    assert len(first) == 40 and positive.sum() == 20
    right = (first["variable"] == "signal") & (first["change"] > 0)
    assert right[positive].mean() >= .95
    assert next(iter(figures["importance"]["mean |change|"])) == "signal"
    size = variables.assign(change=variables["change"].abs()).groupby("variable")["change"].sum() / 40
    assert figures["importance"]["mean |change|"] == pytest.approx(size.to_dict())
    rows = figures["faithfulness"]["rows"]
    assert min(rows[f"by {level}"][side]["interval"][0] for level in ("variable", "event")
               for side in ("raises", "lowers")) > 0
    assert rows["by event"]["auroc"]["value"] <= rows["nothing left out"]["auroc"]["value"]
    assert figures["faithfulness"]["shares"] == SHARES.tolist() and (tmp_path / "importance.png").stat().st_size
    printed = capsys.readouterr().out
    assert "the file holds patients' values" in printed and "over 40 questions" in printed


def test_events_are_removed_in_the_order_of_the_explanation():
    """The curve of one stay against a plain loop."""
    model, stay = build(SeqSetVAE, tiny(summaries=True, head_variables=5)), random_stays([9])[0]
    dataset = StayDataset(cohort_of([stay]), PLAIN, points=True)
    (_, change), = changes(model, dataset, np.arange(1), "event", CPU)
    places = [(m, i) for m, events in stay for i in range(len(events))]
    curves = faithfulness(model, dataset, np.arange(1), CPU)["curves"]
    for side, order in (("raises", np.argsort(-change[:, 0])), ("lowers", np.argsort(change[:, 0]))):
        for share, found in zip(SHARES, curves[f"by event {side}"]):
            gone = {places[e] for e in order[:int(np.rint(share * len(places)))]}
            left = without(stay, lambda m, i, v: (m, i) in gone)
            expected = log_odds_at(model, left, stay[-1][0]) - log_odds_at(model, stay, stay[-1][0])
            assert found == pytest.approx(expected, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The file, Python and the bedside
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["why.csv", "why.parquet"])
def test_file_and_python_are_equal_in_any_order_of_stays(name, tmp_path, small_finetuned, capsys):
    folder = write_long_table(tmp_path / "new", synthetic_cohort(5, seed=3), labels=False)
    options = ["--checkpoint", str(small_finetuned), "--data_dir", str(folder), "--explain", str(tmp_path / name)]
    assert main([*options, "--explain_events", "4"]) == 0
    read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
    written, events = read(tmp_path / name), pd.read_csv(folder / "events.csv")
    assert written.columns.tolist() == ["stay_id", "minute", "level", "variable", "event_minute", "value", "change"]
    assert (written[written["level"] == "event"].groupby("stay_id").size() == 4).all()
    assert set(written["value"].dropna()) <= set(events["value"])  # to the last digit, though held as float32
    predictor = Predictor(small_finetuned, "cpu")
    pd.testing.assert_frame_equal(predictor.explain(events, largest=4), written, atol=1e-6, rtol=1e-6)
    other = {name: f"{9 - i}" for i, name in enumerate(events["stay_id"].unique())}
    turned = predictor.explain(events.assign(stay_id=events["stay_id"].map(other)), largest=4)
    assert turned["stay_id"].iloc[0] == other[written["stay_id"].iloc[-1]]
    back = {new: old for old, new in other.items()}
    key = ["stay_id", "level", "variable", "event_minute"]
    turned = turned.assign(stay_id=turned["stay_id"].map(back))
    both = [table.sort_values([*key, "value"], ignore_index=True) for table in (turned, written)]
    pd.testing.assert_frame_equal(*both, atol=1e-6, rtol=1e-5)


def test_the_moment_that_is_explained(small_finetuned):
    predictor, dataset = Predictor.with_data(small_finetuned, device="cpu")
    cohort, stays = dataset.cohort, np.array([2, 5, 7])
    risks = {stay: risk_over_time(predictor.model, dataset, stay, why=False) for stay in stays}
    middle = float(np.median([max(risk["risk"]) for risk in risks.values()]))

    def minutes(at, threshold=None):
        data, points = questions_at(predictor.model, dataset, stays, at, threshold, CPU)
        return dict(zip(data.cohort.point_stay[points], data.cohort.point_minute[points]))
    assert minutes("last") == minutes("all") == {stay: risk["minute"][-1] for stay, risk in risks.items()}
    assert minutes("highest") == {stay: risk["highest"] for stay, risk in risks.items()}
    assert minutes("600") == dict.fromkeys(stays, 600)
    alarms = {stay: next(m for m, p in zip(risk["minute"], risk["risk"]) if p >= middle)
              for stay, risk in risks.items() if max(risk["risk"]) >= middle}
    assert minutes("first_alarm", middle) == alarms and len(alarms) == 2
    table = predictor.explain(cohort, at=600, largest=0)
    assert (table["minute"] == 600).all() and (table["event_minute"] <= 600).all()


def test_minutes_of_clock_times_count_from_the_first_event_that_is_no_birth(small_finetuned):
    clock = pd.to_datetime(["1950-05-01", "2020-01-01 08:00", "2020-01-01 08:30", "2020-01-01 09:00"], format="mixed")
    events = pd.DataFrame({"stay_id": "a", "minute": clock, "variable": ["MEDS_BIRTH", "HR", "Lactate", "HR"],
                           "value": [np.nan, 80, 2, 90]})
    with pytest.warns(UserWarning, match="MEDS_BIRTH"):
        table = Predictor(small_finetuned, "cpu").explain(events, at=30, largest=0)
    assert table["minute"].tolist() == [30, 30]
    assert dict(zip(table["variable"], table["event_minute"])) == {"HR": 0, "Lactate": 30}


def test_follow_appends_the_three_largest_reasons(small_finetuned, capsys, monkeypatch):
    lines = "7,0,HR,80\n7,0,MAP,70\n7,30,Unheard,1\n7,60,Lactate,4\n7,60,Temp,39\n8,0,HR,120\n9,5,Unheard,1\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["--checkpoint", str(small_finetuned), "--follow", "--explain"]) == 0
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert {len(row) for row in rows} == {6}
    given = pd.read_csv(io.StringIO(lines), names=["stay_id", "minute", "variable", "value"])
    with pytest.warns(UserWarning, match="Unheard"):
        table = Predictor(small_finetuned, "cpu").explain(given[given["stay_id"] == 7], largest=0)
    expected = [f"{name} {change:+.3f}" for name, change in zip(table["variable"], table["change"])]
    told = {(row[0], row[1]): row[3:] for row in rows}
    assert told["7", "60"] == expected[:3]
    assert [bool(cell) for cell in told["7", "0"]] == [True, True, False]
    assert told["8", "0"] == told["9", "5"] == [""] * 3  # nothing would be left; nothing is known


def test_what_cannot_be_explained_is_one_error(small_finetuned, small_pretrained, tmp_path, capsys, monkeypatch):
    options, why = ["--checkpoint", str(small_finetuned)], ["--explain", str(tmp_path / "why.csv")]
    one_error_line(capsys, main([*options, "--explain"]), "--explain: give the FILE")
    one_error_line(capsys, main([*options, "--explain_at", "highest"]), "needs --explain FILE, --faithfulness or --rep")
    one_error_line(capsys, main([*options, "--faithfulness", "--explain_events", "3"]), "_events needs --explain FILE")
    one_error_line(capsys, main([*options, "--follow", *why]), "--follow --explain takes no FILE")
    content = torch.load(small_finetuned, weights_only=True)
    del content["metrics"]["threshold"]
    torch.save(content, tmp_path / "quiet.pt")
    with monkeypatch.context() as patch:
        patch.setattr(report, "answers_of", None)  # these are found before anything is computed
        for wrong in ("soon", "nan", "inf", "1e300", ""):
            one_error_line(capsys, main([*options, *why, "--explain_at", wrong]), f"--explain_at {wrong}: give last, ")
        one_error_line(capsys, main(["--checkpoint", str(tmp_path / "quiet.pt"), *why, "--explain_at", "first_alarm"]),
                       "keeps no threshold of alarms")
    pretrained = ["--checkpoint", str(small_pretrained / "best.pt")]
    one_error_line(capsys, main([*pretrained, *why]), "pretrain")
    one_error_line(capsys, main([*options, *why, "--explain_at", "-5000"]), "give another moment")
    assert not (tmp_path / "why.csv").exists()
