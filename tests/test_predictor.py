"""Tests of predictor.py: answers to tables and cohorts, the risk over one stay, the bedside, --follow."""

import io
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import checkpoint
import test_suite
import train
from batches import Normalizer, StayDataset
from data import InputError
from checkpoint import Checkpoint
from model import SeqSetVAE
from predictor import (CPU, Predictor, against_training, beside_training, far_from_training, followed_event,
                       risk_over_time)
from questions import with_points
from readers import synthetic_cohort, write_long_table
from runs import answers_at, encode_points
from test_suite import main
from tests.plain_loop import close
from tests.tiny import NAMES, PLAIN, build, cohort_of, one_error_line, random_stays, tiny

# ----------------------------------------------------------------------------------------------------------------------
# Answers to a table in memory
# ----------------------------------------------------------------------------------------------------------------------

def test_predict_gives_what_predictions_writes_for_the_same_table(tmp_path, finetuned):
    cohort = synthetic_cohort(6, seed=5)
    folder = write_long_table(tmp_path / "new", cohort, labels=False)
    scoring = ["--checkpoint", str(finetuned), "--data_dir", str(folder)]
    assert main([*scoring, "--predictions", str(tmp_path / "new.csv")]) == 0
    events = pd.read_csv(folder / "events.csv")
    stranger = pd.DataFrame({"stay_id": ["stranger"], "minute": [0], "variable": ["unheard of"], "value": [1.0]})
    predictor = Predictor(finetuned, "cpu")
    with pytest.warns(UserWarning, match=r"1 variables unknown to the checkpoint: unheard of \(1 events\)"):
        table = predictor.predict(pd.concat([stranger, events.sample(frac=1, random_state=0)]))
    assert table.columns.tolist() == ["stay_id", "minute", "probability"]
    assert np.isnan(table.set_index("stay_id")["probability"].pop("stranger"))
    table = table[table["stay_id"] != "stranger"]
    written = pd.read_csv(tmp_path / "new.csv")
    assert table["stay_id"].tolist() == written["stay_id"].tolist()
    assert table["minute"].tolist() == written["minute"].tolist()
    np.testing.assert_allclose(table["probability"], written["probability"], rtol=0, atol=1e-6)
    whole = predictor.predict(cohort)
    np.testing.assert_allclose(whole["probability"], written["probability"], rtol=0, atol=1e-6)
    risk = predictor.trajectory(events, f" {cohort.stay_id[2]}")
    assert risk["events"].sum() == cohort.stay_events[2]
    assert risk["risk"].iloc[-1] == pytest.approx(written["probability"][2], abs=1e-6)
    h = predictor.embed(events)
    assert h["stay_id"].tolist() == written["stay_id"].tolist() and h.shape == (6, 2 + predictor.model.config.latent_dim)
    assert np.isfinite(h.iloc[:, 2:].to_numpy()).all() and h.iloc[:, 2:].std().min() > 0


def small_table() -> pd.DataFrame:
    return pd.DataFrame({"stay_id": [7, 7, 8, 7], "minute": [0, 60, 30, 61.5], "variable": ["HR", "HR", "pH", "Temp"],
                         "value": [80, 90, 7.4, 37]})


FRAMES = {  # the same events in every way in which a DataFrame can hold them
    "as they are": lambda t: t,
    "nullable": lambda t: t.astype({"stay_id": "Int64", "minute": "Float64", "variable": "string", "value": "Float32"}),
    "categories": lambda t: t.astype({"stay_id": "category", "variable": "category", "minute": "category"}),
    "objects": lambda t: t.astype(object),
    "text": lambda t: t.astype({"stay_id": str, "value": str, "minute": str}),
    "durations": lambda t: t.assign(minute=pd.to_timedelta(t["minute"], unit="min")),
    "clock times": lambda t: t.assign(minute=pd.Timestamp("2150-03-01 12:00") + pd.to_timedelta(t["minute"], "min")),
    "clock times of a zone": lambda t: t.assign(minute=pd.Timestamp("2150-03-01 12:00", tz="Asia/Tokyo")
                                                + pd.to_timedelta(t["minute"], "min")),
    "objects that are durations": lambda t: t.assign(minute=[pd.Timedelta(m, "min") for m in t["minute"]]).astype(object),
    "another index": lambda t: t.set_index(pd.Index([3, 3, 1, 1])),
    "columns in capitals": lambda t: t.rename(columns=str.upper)}


@pytest.mark.parametrize("form", FRAMES)
def test_what_a_parquet_file_may_hold_a_frame_may_hold(small_finetuned, form):
    predictor, frame = Predictor(small_finetuned, "cpu"), FRAMES[form](small_table())
    before, state = frame.copy(deep=True), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told, table = predictor.predict(frame), small_table()
        if "clock" in form:  # which count from each stay's first, and whose sets have whole minutes
            table["minute"] = [0, 60, 0, 61]
        expected = predictor.predict(table)
    pd.testing.assert_frame_equal(frame, before)
    assert torch.equal(torch.get_rng_state(), state)
    pd.testing.assert_frame_equal(told, expected)
    assert told["stay_id"].tolist() == ["7", "8"] and told["probability"].between(0, 1, inclusive="neither").all()


def test_opening_a_checkpoint_draws_nothing_from_the_global_generator(small_finetuned):
    state = torch.get_rng_state()
    Predictor(small_finetuned, "cpu").predict(small_table())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change, named", [
    (dict(minute=[0, 1, 2, "soon"]), "events row 3: minute is 'soon', not a number"),
    (dict(value=[80, None, "1,5", 37]), "events row 2: value is '1,5', with a decimal comma"),
    (dict(stay_id=[7, None, 8, 8]), "events row 1: stay_id is missing"),
    (dict(stay_id=pd.Timestamp("2150-03-01")), "events: column stay_id holds datetime64"),
    (dict(value=[[80], [90], [7.4], [37]]), "events: column value holds list where numbers belong"),
    (dict(minute=[0, 1, np.nan, 3]), "events row 2: minute is missing")], ids=str)
def test_an_error_names_the_row_and_column_of_the_frame(small_finetuned, change, named):
    predictor = Predictor(small_finetuned, "cpu")
    with pytest.raises(InputError, match=named):
        predictor.predict(small_table().assign(**change))
    with pytest.raises(InputError, match="events: no column value"):
        predictor.predict(small_table().drop(columns="value"))
    with pytest.raises(InputError, match="events: str where a DataFrame belongs"):
        predictor.predict("events.csv")


def test_values_lie_beside_training_as_the_same_measure_of_both_says():
    """Of a variable of two values, here 60% and a rare 10% of ones, the mean: their medians are 0 or 1."""
    rng = np.random.default_rng(0)

    def cohort(units):
        return cohort_of([[(0, [(0, p % 5 > 1), (1, p % 10 == 0), (2, units * rng.normal(80, 10))])]
                          for p in range(200)])
    trained = cohort(1)
    normalizer = Normalizer.fit(trained, np.arange(200))
    same, other = (against_training(StayDataset(each, normalizer, points=True), np.arange(200))
                   for each in (trained, cohort(2)))
    assert same.loc[["lab0", "lab1"], "deviations"].abs().max() < 1e-3 and same["deviations"].abs().max() < .2
    assert normalizer.log_scale[1] > 0 == normalizer.log_scale[0]
    assert same.loc["lab0", ["middle", "centre"]].tolist() == pytest.approx([.6, .6], abs=1e-5)
    assert beside_training(same[same.index == "lab0"]).startswith("lab0 (0.6, in training 0.6: ")
    assert far_from_training(same) == [] and "values of 1 variables lie far" in far_from_training(other)[0]
    assert other.loc["lab2", "middle"] == pytest.approx(160, abs=5) and other.index[0] == "lab2"


def test_what_python_leaves_out_is_warned_of_and_each_stay_has_its_row(small_finetuned):
    predictor = Predictor(small_finetuned, "cpu")
    more = pd.DataFrame({"stay_id": [9, 10, 7, 7], "minute": 0, "variable": ["HR", "Nothing Known", "GCS", None],
                         "value": [np.inf, 1, np.nan, 1]})
    with pytest.warns(UserWarning) as caught:
        told = predictor.predict(pd.concat([small_table(), more]).assign(unit="mmHg"))
    (text,) = [str(warning.message) for warning in caught]
    assert "1 rows without a finite value, the first: events row 4" in text
    assert "1 rows with an empty variable, the first: events row 7" in text
    assert "1 columns of events not read: unit" in text
    assert "1 variables unknown to the checkpoint: Nothing Known (1 events)" in text
    assert "1 rows without a value of variables that had numbers in training (their presence counts): GCS (1)" in text
    assert told["stay_id"].tolist() == ["10", "7", "8", "9"]
    assert told["probability"].isna().tolist() == [True, False, False, True]
    empty = predictor.predict(small_table()[:0])
    assert len(empty) == 0 and empty.columns.tolist() == ["stay_id", "minute", "probability"]
    assert predictor.embed(small_table()[:0]).shape == (0, 2 + predictor.model.config.latent_dim)
    with pytest.raises(InputError, match="events: no usable event"):
        predictor.trajectory(small_table()[:0], "7")
    with pytest.warns(UserWarning, match="4 variables|3 variables"):
        nothing = predictor.predict(small_table().assign(variable=["a", "b", "c", "a"]))
    assert nothing["stay_id"].tolist() == ["7", "8"] and nothing["probability"].isna().all()
    state = predictor.start()
    with pytest.warns(UserWarning, match="unknown to the checkpoint: Nothing Known"):
        predictor.step(state, 0, [("Nothing Known", 1.0)])
    assert np.isnan(predictor.ask(state, 0))


def test_a_second_call_on_three_events_takes_milliseconds(finetuned):
    """20 ms on one free core; a busy machine gets some room."""
    predictor, table, seconds = Predictor(finetuned, "cpu"), small_table()[:3], []
    for _ in range(7):
        began = time.perf_counter()
        predictor.predict(table)
        seconds.append(time.perf_counter() - began)
    assert min(seconds[1:]) < .06


RELEASED = Path(train.__file__).with_name("checkpoints") / "physionet2012.pt"
OLD_RELEASE = Path(__file__).with_name("released-2026-11-26.pt")  # an old format stays readable


def content_of(released: Path) -> dict:
    """What a released file holds, after it was found to name nobody."""
    content = torch.load(released, weights_only=True)
    assert all(stay.startswith(checkpoint.HASHED) for ids in content["split"].values() for stay in ids)
    assert content["source"]["data"] == {"data_dir": None} and released.stat().st_size < 2**24
    return content


@pytest.mark.parametrize("released", [RELEASED, OLD_RELEASE], ids=lambda path: path.name)
def test_the_released_weights_score_a_table_in_their_units_and_name_nobody(released):
    well = [(60 * hour, name, value) for hour in range(24) for name, value in
            (("HR", 80), ("GCS", 15), ("Urine", 100), ("BUN", 15), ("RespRate", 16))]
    ill = [(60 * hour, name, value) for hour in range(24) for name, value in
           (("HR", 130), ("GCS", 3), ("Urine", 5), ("BUN", 90), ("RespRate", 35))]
    table = pd.DataFrame([(stay, *event) for stay, events in (("well", well), ("ill", ill)) for event in events],
                         columns=["stay_id", "minute", "variable", "value"])
    risk = Predictor(released, "cpu").predict(table).set_index("stay_id")["probability"]
    assert 0 < risk["well"] < .1 < .4 < risk["ill"] < 1
    content_of(released)


def test_the_released_pretrained_weights_are_those_below_the_released_head():
    pretrained = content_of(RELEASED.with_name("physionet2012-pretrained.pt"))
    finetuned = content_of(RELEASED)
    assert pretrained["mode"] == "pretrain"
    assert all(len(pretrained["split"][part]) == len(stays) for part, stays in finetuned["split"].items())
    below = {name: weights for name, weights in pretrained["model"].items() if name != "mask_token"}
    assert below and all(torch.equal(finetuned["model"][name], weights) for name, weights in below.items())



CONFIGS = [dict(summaries=True, head_variables=5), dict(features="multiscale"), dict(classification_only=False),
           dict(decoder="slots", summaries=True, head_variables=7)]



@pytest.mark.parametrize("config", CONFIGS)
def test_the_risk_over_time_equals_scoring_the_truncated_stay(config):
    stay = random_stays([37], valueless=.1)[0]
    model, cohort = build(SeqSetVAE, tiny(**config)), cohort_of([random_stays([5])[0], stay])
    trajectory = risk_over_time(model, StayDataset(cohort, PLAIN, points=True), 1)
    truncated = StayDataset(cohort_of([stay[:end] for end in range(1, 38)]), PLAIN, points=True)
    # float32, in other batches
    np.testing.assert_allclose(trajectory["risk"], answers_at(model, truncated, np.arange(37), CPU)[:, 0], atol=1e-5)
    assert trajectory["minute"] == [minute for minute, _ in stay]
    assert trajectory["events"] == [len(events) for _, events in stay]



def test_the_last_risk_over_time_is_the_answer_where_events_are_known_to_the_second(small_finetuned):
    rows = pd.DataFrame({"stay_id": 7, "minute": [0, 60, 60.25, 61.5, 61.75], "value": [80, 90, 7., 39, 9],
                         "variable": ["HR", "HR", "pH", "Temp", "Lactate"]})
    rows["minute"] = pd.Timestamp("2150-03-01 12:00") + pd.to_timedelta(rows["minute"], "min")
    predictor = Predictor(small_finetuned, "cpu")
    trajectory = predictor.trajectory(rows, "7")
    assert trajectory["minute"].tolist() == [0, 60, 61] and trajectory["events"].tolist() == [1, 2, 2]
    assert trajectory["risk"].iloc[-1] == pytest.approx(predictor.predict(rows)["probability"][0], abs=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_comes_after_a_stays_last_point_changes_no_bit_of_its_features(config):
    model, (stay, other) = build(SeqSetVAE, tiny(**config)), random_stays([9, 12])
    minute = [float(m) for m, _ in stay]
    features = []
    for tail in (other, [(m + 1, [(v, x + 7) for v, x in events]) for m, events in other]):
        whole = stay + [(m + minute[-1] + 30, events) for m, events in tail]
        asked = np.array([minute[4], minute[-1] + 20])
        cohort = with_points(cohort_of([whole]), np.array([2]), asked, np.array([0, 1]))
        features.append(encode_points(model, StayDataset(cohort, PLAIN, points=True), np.arange(2), CPU))
    assert torch.equal(*features) and (features[0][0] - features[0][1]).abs().max() > 1e-3
    if config.get("summaries"):
        assert features[0][:, -1].tolist() == [0, pytest.approx(20 / 60)]  # hours since the last set



def lines_of(cohort, stay: int, name: str) -> list[tuple[float, str]]:
    """(minute, line of --follow) of every event of a stay."""
    sets = range(cohort.stay_start[stay], cohort.stay_start[stay + 1])
    return [(cohort.set_minute[t], f"{name},{cohort.set_minute[t]},{cohort.variables[cohort.event_variable[e]]},"
             + (f"{cohort.event_value[e]}" if cohort.event_value[e] == cohort.event_value[e] else "") + "\n")
            for t in sets for e in range(cohort.set_start[t], cohort.set_start[t + 1])]



def test_following_two_stays_gives_the_risks_of_their_trajectories(finetuned, capsys, monkeypatch):
    predictor, dataset = Predictor.with_data(finetuned)
    model, cohort = predictor.model, dataset.cohort
    events = sorted(lines_of(cohort, 3, '"a, b"') + lines_of(cohort, 5, "c"), key=lambda event: event[0])  # stable
    lines = ["stay_id,minute,variable,value\n", "d,7,Nothing Known,1\n", *(line for _, line in events)]
    lines[9:9] = ["c,soon,HR,80\n", "c,-5,HR,80\n", "c,9,HR\n", "c,1,HR,1e39\n", ",1,HR,80\n"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(lines)))
    capsys.readouterr()
    assert main(["--checkpoint", str(finetuned), "--follow"]) == 0
    out, error = capsys.readouterr()
    rows = pd.read_csv(io.StringIO(out), names=["stay_id", "minute", "risk"])
    for stay, name in ((3, "a, b"), (5, "c")):
        trajectory, mine = risk_over_time(model, dataset, stay), rows[rows["stay_id"] == name]
        assert mine["minute"].tolist() == trajectory["minute"]
        np.testing.assert_allclose(mine["risk"], trajectory["risk"], atol=1e-5)
    assert rows[rows["stay_id"] == "d"].isna()["risk"].tolist() == [True]  # no answer
    assert f"{len(rows) - 1} risks of 3 stays" in error and "4 malformed lines" in error
    assert "line 10: could not convert string to float: 'soon': c,soon,HR,80" in error and "line 12: 3 cells" in error
    assert "1 events of an earlier minute" in error and "1 events of 1 variables unknown" in error
    assert "Nothing Known (1)" in error



def test_what_is_late_or_unknown_is_said_at_once_and_the_summary_comes_on_sigterm(small_finetuned):
    command = [sys.executable, test_suite.__file__, "--checkpoint", str(small_finetuned), "--follow"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"x,5,HR,80\nx,5,Pulse,80\nx,6,Pulse,80\nx,4,HR,80\nx,3,HR,80\n\n")
        process.stdin.flush()
        assert b"stay x, minute 5: Pulse is unknown to the checkpoint" in process.stderr.readline()
        assert b"stay x: an event at minute 4 comes after one at minute 6" in process.stderr.readline()
        for minute in (b"5", b"6"):
            assert process.stdout.readline().startswith(b"x,%b,0." % minute)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
    assert b"2 risks of 1 stays" in error and b"2 events of an earlier minute" in error and b"Pulse (2)" in error


def test_follow_renames_and_rescales_as_the_other_readers_do(finetuned, tmp_path, capsys, monkeypatch):
    (tmp_path / "map.csv").write_text("source,name,factor,offset\nTemp F,Temp,.5556,-17.78\n")

    def risk(line, *words):
        monkeypatch.setattr(sys, "stdin", io.StringIO(line))
        assert main(["--checkpoint", str(finetuned), "--follow", *words]) == 0
        return capsys.readouterr().out

    celsius, words = f"7,30,Temp,{102 * .5556 - 17.78}\n", ["--variables", str(tmp_path / "map.csv")]
    assert risk("7,30,Temp F,102\n", *words) == risk(celsius) != risk("7,30,Temp F,102\n")
    one_error_line(capsys, main(["--checkpoint", str(finetuned), "--follow", "--variables", "nope.csv"]), "nope.csv")
    monkeypatch.setattr(sys, "stdin", io.StringIO("stay_id,variable,minute,value\n7,HR,1,80\n"))
    one_error_line(capsys, main(["--checkpoint", str(finetuned), "--follow"]), "give stay_id,minute,variable,value")



def test_a_line_of_follow_is_read_as_the_long_table_is():
    assert followed_event('7, 60 ,"Na, serum",>100\n') == ("7", 60, "Na, serum", 100)
    assert [np.isnan(followed_event(f"7,-1.5,HR,{text}")[3]) for text in ("", "NA", "null")] == [True] * 3
    assert [followed_event(f"7,1,Ventilated,{text}")[3] for text in ("true", "False")] == [1, 0]
    for line in ("7,nan,HR,1", "7,1e8,HR,1", "7,1,,1", "7,1,HR,inf", "7,soon,HR,1", "7,1,HR,1_000"):
        with pytest.raises(ValueError):
            followed_event(line)
    assert followed_event("1001.0,1,HR,80")[0] == "1001"  # ids in one spelling
    assert followed_event("u\u0308,1,HR,80")[0] == "\xfc"
    _, _, category, value = followed_event("7,0,sex,Female", {"sex": ("Sex", 1, 0)})
    assert category == "Sex=Female" and np.isnan(value)
    assert followed_event("7,1,HR,2", {"HR": ("Pulse", 3, -1)})[2:] == ("Pulse", 5)
    with pytest.raises(ValueError, match="out of range"):
        followed_event("7,1,HR,3e38", {"HR": ("HR", 2, 0)})



def test_a_followed_risk_is_printed_before_more_is_read(small_finetuned):
    command = [sys.executable, test_suite.__file__, "--checkpoint", str(small_finetuned), "--follow"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for chunk, minute in ((b"\xef\xbb\xbfx,1,HR,80\nx,1,Temp,37\nx,2.5,HR,90\n", b"1"), (b"\n", b"2.5")):
            process.stdin.write(chunk), process.stdin.flush()
            assert process.stdout.readline().startswith(b"x,%b,0." % minute)
        rest, error = process.communicate(b"x,2.5\xff,HR,1\n")
    assert process.returncode == 0 and rest == b"" and b"2 risks of 1 stays" in error and b"1 malformed" in error



@pytest.mark.parametrize("config", [
    dict(summaries=True, head_variables=5, head_widths=(), head_trees=3),
    dict(features="multiscale", head_variables=4, levels=2, slope_per_head=False),
    dict(classification_only=False, head_variables=3),
    dict(classification_only=False, features="multiscale", summaries=True, head_variables=5, fuse=False),
    dict(decoder="slots", summaries=True, head_variables=5, mab_residual=False, presence=False)])
def test_set_after_set_equals_the_whole_pass(config):
    """With events without a value, a set of unknown variables alone, two sets at one minute, questions between sets."""
    model, (stay,) = build(SeqSetVAE, tiny(**config)), random_stays([23], valueless=.2)
    model.head_variables.copy_(torch.tensor([5, 0, 2, 4, 3])[:config["head_variables"]])
    if model.trees:
        model.trees.feature.random_(40), model.trees.threshold.normal_(), model.trees.value.normal_()
    stay[7] = stay[7][0], [(6, 1.0)]
    minute = np.array([float(m) for m, _ in stay])
    minute[12] = minute[11]
    asked = np.append((minute[:-1] + minute[1:]) / 2, minute[-1] + 500)
    cohort = replace(cohort_of([stay]), set_minute=minute)
    six = Normalizer(NAMES[:6], PLAIN.mean[:6], PLAIN.std[:6], PLAIN.log_scale[:6])
    batch = StayDataset(with_points(cohort, np.array([23]), asked), six, points=True)[np.arange(1)]
    with torch.no_grad():
        (_, _, z, h), features, logits = model.encode(batch), model.features(batch), model(batch)

        predictor = Predictor(Checkpoint.of(model, six), "cpu")
        state = predictor.start()
        for i, (_, events) in enumerate(stay):
            predictor.step(state, minute[i], [(f"lab{v}", x) for v, x in events if v != 6])
            close(state.z.rows, z[:, :i + 1])
            close(state.h.rows, h[:, :i + 1])
            if i != 11:  # a question at the minute of two sets comes after both
                close(predictor.features_at(state, asked[i]), features[:, i:i + 1])
                assert predictor.ask(state, asked[i]) == pytest.approx(logits.softmax(-1)[0, i, 1].item(), abs=1e-5)
    assert logits.softmax(-1)[0, :, 1].std() > 1e-3


def test_at_the_bedside_time_goes_forward():
    predictor = Predictor(Checkpoint.of(build(SeqSetVAE, tiny()), PLAIN), "cpu")
    state = predictor.start()
    with pytest.raises(ValueError, match="asked at minute 5"):
        predictor.ask(state, 5)
    predictor.step(state, 10, [("lab0", 1.0), ("lab3", np.nan)])
    risk = predictor.ask(state, 10)
    for late in (lambda: predictor.ask(state, 9), lambda: predictor.step(state, 9, [("lab0", 1.0)]),
                 lambda: predictor.step(state, np.nan, [("lab0", 1.0)])):
        with pytest.raises(ValueError, match="is at minute 10|after one at minute 10"):
            late()
    assert predictor.ask(state, 10) == risk  # what was refused left no trace
    predictor.step(state, 10, [])
    assert predictor.ask(state, 10) != risk
