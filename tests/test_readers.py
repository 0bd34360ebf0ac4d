"""Tests of readers.py: each layout gives the exact cohort or one line that says what is wrong; no stale cache."""

import gzip
import io
import itertools
import os
import pickle
import shutil
import sys
import tarfile
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import readers
from batches import Normalizer, variable_vectors
from data import Cohort, InputError, build_cohort, make_splits
from labels import telling_variables
from questions import answers_moved, at_end, at_every_set, with_points
from readers import load_cohort
from tests.tiny import (EVENTS, OUTCOMES, RECORDS, SHARED, Call, as_lists, counted, events_of, labels_of,
                        splits_of, write, write_physionet)

# ----------------------------------------------------------------------------------------------------------------------
# PhysioNet 2012
# ----------------------------------------------------------------------------------------------------------------------


def test_physionet_sets_that_lie_together_are_read_together(tmp_path):
    """Set b as its own archive beside set a: the cohort of all records, each with its own set's outcome."""
    first, second = ({name: RECORDS[name]} for name in RECORDS)
    folder, other = tmp_path / "both", tmp_path / "other"
    write_physionet(folder, records=first, outcomes=OUTCOMES.replace("132540,16,8,8,4,1\n", ""))
    write_physionet(other, archive=True, records=second, outcomes=OUTCOMES.replace("132539,6,1,5,-1,0\n", ""))
    (other / "set-a.tar.gz").rename(folder / "set-b.tar.gz")
    (other / "Outcomes-a.txt").rename(folder / "Outcomes-b.txt")
    both = load_cohort(folder, cache_dir=tmp_path)
    together = load_cohort(write_physionet(tmp_path / "one"), cache_dir=tmp_path)
    assert both.reader.endswith("a+b") and both.fingerprint == together.fingerprint
    assert both.label.tolist() == together.label.tolist() == [0, 1]


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "tar.gz"])
def test_physionet_reader_gives_the_expected_cohort(tmp_path, archive):
    cohort = load_cohort(write_physionet(tmp_path / "data", archive), cache_dir=tmp_path / "cache")
    assert as_lists(cohort) == {
        # A descriptor of -1 is missing, elsewhere it is a value; duplicates are kept.
        "132539": [(0, [("Age", 54), ("Gender", 0), ("ICUType=4", 1)]), (7, [("HR", 73), ("HR", 77)]),
                   (1565, [("BaseExcess", -1)])],
        "132540": [(0, [("Age", 76), ("Gender", 1), ("Height", np.float32(175.3)), ("ICUType=2", 1), ("Weight", 80)]),
                   (70, [("HR", 88)])]}
    assert cohort.label.tolist() == [0, 1] and {k: v for k, v in cohort.notes.items() if v} == {
        "rows with an empty variable": 1, "descriptors not recorded (-1)": 2, "files read": 1 if archive else 2,
        "columns of Outcomes-a.txt not read: SAPS-I, SOFA, Length_of_stay, Survival": 4}
    # no outcome among them
    assert cohort.variables == ["Age", "BaseExcess", "Gender", "HR", "Height", "ICUType=2", "ICUType=4", "Weight"]


def test_folder_and_archive_have_the_same_fingerprint(tmp_path):
    a, b = (load_cohort(write_physionet(tmp_path / str(archive), archive), cache_dir=tmp_path / "cache")
            for archive in (False, True))
    assert a.fingerprint == b.fingerprint


def test_a_stay_without_an_outcome_is_unlabelled_not_a_survivor(tmp_path):
    folder = write_physionet(tmp_path / "data", outcomes="".join(OUTCOMES.splitlines(keepends=True)[:2]))
    assert load_cohort(folder, cache_dir=tmp_path / "cache").label.tolist() == [0, -1]


def test_cached_cohort_equals_the_parsed_one_and_is_not_parsed_again(tmp_path, monkeypatch):
    folder = write_physionet(tmp_path / "data")
    first = load_cohort(folder, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("readers._Spool", lambda *_: pytest.fail("parsed again"))
    second = load_cohort(folder, cache_dir=tmp_path / "cache")
    assert as_lists(first) == as_lists(second) and first.fingerprint == second.fingerprint
    assert first.notes == second.notes


@pytest.mark.parametrize("name", [f"{name}.npy" for name in Cohort.ARRAYS] + ["meta.json"])
def test_a_torn_cache_is_rebuilt(tmp_path, name):
    folder = write_physionet(tmp_path / "data")
    whole = as_lists(load_cohort(folder, cache_dir=tmp_path / "cache"))
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-3])
    assert as_lists(load_cohort(folder, cache_dir=tmp_path / "cache")) == whole


def test_a_stale_cache_is_rebuilt(tmp_path):
    folder = write_physionet(tmp_path / "data")
    load_cohort(folder, cache_dir=tmp_path / "cache")
    record = folder / "set-a" / "132540.txt"
    before = record.stat()
    # the same length: only the time of the change tells
    record.write_text(record.read_text().replace("HR,88", "HR,99"))
    os.utime(record, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert as_lists(load_cohort(folder, cache_dir=tmp_path / "cache"))["132540"][-1] == (70, [("HR", 99)])


def test_sets_a_b_and_c_of_physionet_2012_are_read_in_full_and_fast(tmp_path):
    folder = SHARED / "data" / "physionet2012"
    if not all((folder / f"set-{s}.tar.gz").exists() for s in "abc"):
        pytest.skip(f"PhysioNet 2012 is not at {folder}: the reader was not tried on real data")
    began = time.process_time()
    cohort = load_cohort(folder, cache_dir=tmp_path)
    parsed, began = time.process_time() - began, time.process_time()
    load_cohort(folder, cache_dir=tmp_path)
    cached = time.process_time() - began
    for name, deaths in (("a", 554), ("b", 568), ("c", 585)):
        stays = np.isin(cohort.stay_id, pd.read_csv(folder / f"Outcomes-{name}.txt", dtype=str)["RecordID"])
        assert (stays.sum(), cohort.label[stays].sum()) == (4000, deaths)
    assert (len(cohort), len(cohort.variables), len(cohort.set_minute)) == (12_000, 44, 898_352)
    # Every row but the stays' own numbers, the rows without a parameter and the descriptors that were not recorded.
    rows, notes = 1_757_980 + 1_762_535 + 1_765_303, counted(cohort)
    left_out = {"rows with an empty variable": 2403, "descriptors not recorded (-1)": 6739}
    assert notes == left_out | {"columns of Outcomes-a.txt not read: SAPS-I, SOFA, Length_of_stay, Survival": 4}
    assert len(cohort.event_value) == rows - len(cohort) - sum(left_out.values()) == 5_264_676
    assert parsed < 12 and cached < 0.5


# ----------------------------------------------------------------------------------------------------------------------
# The other readers: each test writes its own small data and compares the exact cohort
# ----------------------------------------------------------------------------------------------------------------------


# ---- one long table --------------------------------------------------------------------------------------------------


def test_long_table_gives_the_exact_cohort(tmp_path, load):
    write(tmp_path / "d/events.csv", EVENTS)
    write(tmp_path / "d/labels.csv", "stay_id,label,split\n7,1,train\n8,,test\n9,0,valid\n12,1,test\n")
    cohort = load(tmp_path / "d")
    assert events_of(cohort) == {
        "007": [(0, [("NA", 139)])], "7": [(0, [("HR", 90)]), (60, [("HR", 80), ("HR", 82)]), (61, [("pH", None)])],
        "8": [(5, [("Na, serum", 140)])], "9": [(5, [("K", None)])]}
    assert cohort.variables == ["HR", "K", "NA", "Na, serum", "pH"]
    assert labels_of(cohort) == {"007": -1, "7": 1, "8": -1, "9": 0}
    assert splits_of(cohort) == {"007": -1, "7": 0, "8": 2, "9": 1}
    assert counted(cohort) == {"rows with an empty variable": 1, "rows without a finite value": 1,
                               "rows of no stay with a usable event": 1, "splits of no stay with a usable event": 1,
                               "stays without an outcome (unlabelled)": 2,
                               "stays without a split (neither trained on nor scored)": 1}
    assert make_splits(cohort, 0) == {"train": ["7"], "valid": ["9"], "test": ["8"]}


def test_long_table_needs_no_labels_and_labels_leave_the_stays_identity_alone(tmp_path, load):
    write(tmp_path / "d/events.csv", EVENTS)
    bare = load(tmp_path / "d")
    assert (bare.label == -1).all() and (bare.split == -1).all() and bare.vectors.shape == (5, 0)
    assert np.isnan(bare.statistics).all()
    write(tmp_path / "d/labels.csv", "stay_id,label\n7,1\n")
    labelled = load(tmp_path / "d")
    assert labels_of(labelled)["7"] == 1 and labelled.fingerprint == bare.fingerprint


def test_parquet_and_csv_of_one_table_are_one_cohort(tmp_path, load):
    pytest.importorskip("pyarrow")
    table = pd.DataFrame({"stay_id": [10, 9, 9], "minute": [3, 0, 2], "variable": ["a", "b", "a"],
                          "value": [1, 2.5, 3]})
    for name in "cp":
        (tmp_path / name).mkdir()
    table.to_csv(tmp_path / "c/events.csv", index=False)
    table.astype({"variable": "category"}).to_parquet(tmp_path / "p/events.parquet")
    from_csv, from_parquet = load(tmp_path / "c"), load(tmp_path / "p")
    assert events_of(from_csv) == events_of(from_parquet) == {"10": [(3, [("a", 1)])],
                                                              "9": [(0, [("b", 2.5)]), (2, [("a", 3)])]}
    assert from_csv.fingerprint == from_parquet.fingerprint


@pytest.mark.parametrize("events, labels, message", [
    ("", None, r"events.csv: an empty file"),
    ("\n", None, r"events.csv: no column stay_id"),
    ("stay_id,minute,variable,value\n", None, r"events.csv: a header and no row"),
    ("id;minute;variable;value\n1;2;a;3\n", None, r"no column stay_id \(it has id, minute, variable, value\)"),
    ("stay_id,minute,variable\n1,2,a\n", None, r"no column value \(it has stay_id, minute, variable\)"),
    ("stay_id,minute,variable,value,value\n1,2,a,3,3\n", None, r"column value occurs twice"),
    ("stay_id,minute,variable,value\n1,2,a,3\n1,2,a,\"35,8\"\n", None,
     r"events.csv line 3: value is '35,8', with a decimal comma"),
    ("stay_id,minute,variable,value\n1,00:30,a,3\n", None, r"line 2: minute is '00:30', not a number"),
    ("stay_id,minute,variable,value\n1,2,a,3\n1,1e9,a,3\n", None,
     r"line 3: minute is 1e\+09; give minutes since admission"),
    ("stay_id,minute,variable,value\n1,,a,3\n", None, r"line 2: minute is missing; give minutes"),
    ("stay_id,minute,variable,value\n1,inf,a,3\n", None, r"line 2: minute is inf; give minutes"),
    ("stay_id,minute,variable,value\n,1,a,3\n", None, r"line 2: stay_id is missing"),
    ("stay_id,minute,variable,value\n1,2,a,3,5\n", None, r"line 2: 5 cells where the columns are 4"),
    ("stay_id,minute,variable,value\n1,2,a,3\n1,2,a,3,5\n", None, r"line 3: 5 cells where the columns are 4"),
    ("stay_id,minute,variable,value\n1,2,a\n1,2,a,3,5\n", None, r"line 2: 3 cells where the columns are 4"),
    ("stay_id,minute,variable,value\n1,2,\"Na, serum\"\n", None, r"line 2: 3 cells where the columns are 4"),
    ("stay_id,minute,variable,value\n1,2,\"a\nb\",3\n", None, r"a quoted cell holds a line break"),
    ("stay_id,minute,variable,value\n1,2,\"a,3\n", None, r"events.csv"),
    ("stay_id,minute,variable,value\n1,2,température,3\n".encode("latin1"), None, r"events.csv: not UTF-8"),
    ("stay_id,minute,variable,value\n1,2,a,3\n".encode("utf-16"), None, r"events.csv: not UTF-8"),
    ("stay_id,minute,variable,value\n1,2,a,inf\n", None, r"no usable event"),
    (EVENTS, "stay_id,label\n7,2\n", r"labels.csv line 2: label is '2', not 0 or 1"),
    (EVENTS, "stay_id,label\n8,0\n7,dead\n", r"labels.csv line 3: label is 'dead', not 0 or 1"),
    (EVENTS, "stay_id,label\n7,1\n8,0\n7.0,0\n",
     r"labels.csv line 4: stay_id is '7', given twice and not alike \(7\); keep one line of each"),
    (EVENTS, "stay_id,label,time\n7,1,3\n", r"labels.csv: its column time looks like a time, of no known unit; call it minute, hour or prediction_time"),
    (EVENTS, "stay_id,label,minute\n7,1,3\n8,1,\n",
     r"labels.csv line 3: minute is missing; give the time of the question"),
    (EVENTS, "stay_id,label,prediction_time\n7,1,2020-01-01\n",
     r"prediction_time is a clock time, which these data do not know"),
    (EVENTS, "stay_id,label,minute,split\n7,1,3,train\n7,1,4,test\n",
     r"line 3: split is 'test', and another elsewhere for the same stay \(7\)"),
    (EVENTS, "stay_id,label\n,1\n", r"labels.csv line 2: stay_id is missing"),
    (EVENTS, "stay_id,label,split\n7,1,train\n8,1,holdout\n",
     r"labels.csv line 3: split is 'holdout'; it is one of train, valid, test"),
    (EVENTS, "stay_id,died\n7,1\n", r"labels.csv: no column label"),
    (EVENTS, "stay_id,label\n", r"labels.csv: a header and no row"),
])
def test_long_table_bad_input(tmp_path, load, events, labels, message):
    write(tmp_path / "d/events.csv", events)
    if labels is not None:
        write(tmp_path / "d/labels.csv", labels)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "d")
    assert "\n" not in str(caught.value)


def test_windows_text_reads_the_same(tmp_path, load):
    write(tmp_path / "d/events.csv", b"\xef\xbb\xbf" + EVENTS.replace("\n", "\r\n").encode().rstrip())
    write(tmp_path / "e/events.csv", EVENTS)
    assert load(tmp_path / "d").fingerprint == load(tmp_path / "e").fingerprint


@pytest.mark.parametrize("columns, message", [
    ({"value": [[1.0]]}, "column value holds list.* where numbers belong"),
    ({"stay_id": [pd.Timestamp(0)]}, "column stay_id holds timestamp.* where text or whole numbers belong"),
    ({"minute": [1e8]}, "events.parquet row 1: minute is 1e\\+08"),
])
def test_long_table_bad_parquet(tmp_path, load, columns, message):
    pytest.importorskip("pyarrow")
    pd.DataFrame({"stay_id": [1], "minute": [2], "variable": ["a"],
                  "value": [3.0]} | columns).to_parquet(tmp_path / "events.parquet")
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_damaged_parquet_two_tables_and_no_pyarrow(tmp_path, load, monkeypatch):
    pytest.importorskip("pyarrow")
    write(tmp_path / "events.parquet", "PAR1 not really")
    with pytest.raises(InputError, match="events.parquet: not a readable Parquet file"):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        load(tmp_path)
    write(tmp_path / "events.csv", EVENTS)
    with pytest.raises(InputError, match="holds both events.csv and events.parquet"):
        load(tmp_path)


def test_long_table_reads_a_million_events_a_second_or_nearly(tmp_path):
    """A Python loop over rows would take minutes: the bound only tells vectorised code from a loop, on a busy machine
    too."""
    n, rng = 300_000, np.random.default_rng(0)
    pd.DataFrame({"stay_id": np.arange(n) // 300, "minute": np.tile(np.arange(300), n // 300),
                  "variable": rng.integers(0, 40, n).astype(str),
                  "value": rng.normal(size=n).round(2)}).to_csv(tmp_path / "events.csv", index=False)
    start = time.perf_counter()
    cohort = load_cohort(tmp_path, cache_dir=tmp_path / "cache")
    assert len(cohort.event_value) == n and time.perf_counter() - start < 6


# ---- the original layout ---------------------------------------------------------------------------------------------

@pytest.fixture
def original(tmp_path):
    home = tmp_path / "processed"
    write(home / "patient_ehr/train/200001.0.csv", "variable,value,minute\nHR,80,0\nK,4,30\nHR,90,0\n")
    write(home / "patient_ehr/valid/200002.0.csv", "variable,value,minute\nHR,70,15\nNew,nan,20\n")
    write(home / "patient_ehr/test/200003.0.csv", "variable,value,minute\nNew,3,1\n")
    write(home / "patient_ehr/test/200004.0.csv", "variable,value,minute\n")
    write(home / "cached.csv", ",Key,0,1,2\n0,HR,1,0,0.5\n1,K,0,2,0\n2,Unused,1,1,1\n")
    write(home / "oc.csv", "ts_id,in_hospital_mortality\n200001,1\n200003,0\n999,1\n")
    write(home / "stats.csv", "variable,mean,std\nHR,85,10\nK,4,0\nUnused,1,1\n")
    return home


def test_original_layout_gives_the_exact_cohort(original, load):
    cohort = load(original, params_map=str(original / "stats.csv"), label_file=str(original / "oc.csv"))
    assert events_of(cohort) == {"200001": [(0, [("HR", 80), ("HR", 90)]), (30, [("K", 4)])],
                                 "200002": [(15, [("HR", 70)])], "200003": [(1, [("New", 3)])]}
    assert labels_of(cohort) == {"200001": 1, "200002": -1, "200003": 0}
    assert splits_of(cohort) == {"200001": 0, "200002": 1, "200003": 2}
    np.testing.assert_array_equal(cohort.statistics, np.array([[85, 10], [np.nan] * 2, [np.nan] * 2], dtype=np.float32))
    np.testing.assert_array_equal(cohort.vectors, np.array([[1, 0, .5], [0, 2, 0], [np.nan] * 3], dtype=np.float32))
    assert counted(cohort) == {"rows without a finite value": 1, "stays without an outcome (unlabelled)": 1,
                               "rows of no stay with a usable event": 1,
                               "stays without a usable event": 1, "variables without given statistics (fitted)": 2,
                               "given statistics of no variable": 1,
                               "variables without given vectors (hashed from the name)": 1,
                               "given vectors of no variable": 1}
    # patient_ehr itself may be named, as the original did
    assert load(original / "patient_ehr").fingerprint == cohort.fingerprint


def test_original_layout_feeds_normalizer_and_vectors(original, load):
    cohort = load(original, params_map=str(original / "stats.csv"))
    normalizer = Normalizer.fit(cohort, np.arange(len(cohort)))
    # K and New: fitted, constant
    assert normalizer.mean.tolist() == [85, 0, 0] and normalizer.std.tolist() == [10, 1, 1]
    far = replace(cohort, statistics=np.array([[0, 1], [np.nan] * 2, [np.nan] * 2]))  # from all of HR, 3 of 5 values
    assert "60.00% of the training values" in Normalizer.fit(far, np.arange(len(far))).describe()
    vectors = variable_vectors(cohort.variables, 3, cohort.vectors)
    assert vectors[:2].tolist() == [[1, 0, .5], [0, 2, 0]] and vectors[2].norm().item() == pytest.approx(1)
    assert vectors[2].equal(variable_vectors(["New"], 3)[0])
    with pytest.raises(InputError, match="vectors of 3 dimensions where the model takes 64"):
        variable_vectors(cohort.variables, 64, cohort.vectors)


def test_original_layout_set_index_tells_sets_apart(tmp_path, load):
    write(tmp_path / "patient_ehr/train/1.csv",
          "variable,value,minute,set_index\na,1,10,0\nb,2,10,1\nc,3,10,0\nd,4,20,2\ne,5,15,2\n")
    cohort = load(tmp_path)
    assert events_of(cohort) == {"1": [(10, [("a", 1), ("c", 3)]), (10, [("b", 2)]), (15, [("e", 5), ("d", 4)])]}
    write(tmp_path / "patient_ehr/train/1.csv", "variable,value,minute,set_index\na,1,10,0\nb,2,10,\n")
    with pytest.raises(InputError, match=r"1.csv line 3: set_index is missing"):
        load(tmp_path)


def test_original_layout_in_parquet_equals_csv(original, tmp_path, load):
    pytest.importorskip("pyarrow")
    for path in original.glob("patient_ehr/*/*.csv"):
        target = tmp_path / "parquet/patient_ehr" / path.parent.name / f"{path.stem}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pd.read_csv(path).to_parquet(target)
    assert load(tmp_path / "parquet").fingerprint == load(original).fingerprint
    write(tmp_path / "parquet/patient_ehr/test/5.csv", "variable,value,minute\na,1,1\n")
    with pytest.raises(InputError, match="holds both CSV and Parquet"):
        load(tmp_path / "parquet")


@pytest.mark.parametrize("name, text, message", [
    ("patient_ehr/valid/200002.0.csv", "", "200002.0.csv: an empty file"),
    ("patient_ehr/valid/200002.0.csv", "value,minute\n1,2\n",
     "200002.0.csv line 1: other columns than in 200001.0.csv"),
    ("patient_ehr/valid/200002.0.csv", "variable,value,minute\nHR,80,1\nHR,x,2\n",
     "200002.0.csv line 3: value is 'x', not a number"),
    ("patient_ehr/valid/200002.0.csv", "variable,value,minute\nHR,80,1\nHR,80,-2e8\n",
     "200002.0.csv line 3: minute is -2e\\+08"),
    ("patient_ehr/valid/200002.0.csv", "variable,value,minute\nHR,80,1,3\n",
     "200002.0.csv line 2: 4 cells where the columns are 3"),
    ("patient_ehr/valid/200001.0.csv", "variable,value,minute\nHR,80,1\n", "stay 200001 occurs more than once"),
    ("oc.csv", "ts_id,in_hospital_mortality\n200001,3\n", "oc.csv line 2: in_hospital_mortality is '3', not 0 or 1"),
    ("oc.csv", "ts_id,in_hospital_mortality\n200001,1\n200001,0\n", "oc.csv line 3: ts_id is '200001', given twice"),
    ("oc.csv", "id,in_hospital_mortality\n200001,1\n", "oc.csv: no column stay_id or ts_id or RecordID or subject_id"),
    ("stats.csv", "variable,mean,std\nHR,1,1\nHR,1,1\n",
     "stats.csv line 3: variable is 'HR', where each line names another variable"),
    ("stats.csv", "variable,mean,std\nHR,1,-1\n", "stats.csv line 2: std is -1, below 0"),
    ("stats.csv", "variable,mean,std\nHR,one,1\n", "stats.csv line 2: mean is 'one', not a number"),
    ("cached.csv", "Key,0,1\nHR,1,2\nHR,1,2\n", "cached.csv line 3: Key is 'HR', where each line names another"),
    ("cached.csv", "Key,0,1\nHR,1,\n", "cached.csv line 2: 1 is missing, not finite"),
    ("cached.csv", "Key\nHR\n", "cached.csv: no column beside Key"),
])
def test_original_layout_bad_input(original, load, name, text, message):
    write(original / name, text)
    with pytest.raises(InputError, match=message):
        load(original, params_map=str(original / "stats.csv"), label_file=str(original / "oc.csv"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_params_map_pickle_admits_plain_and_numpy_numbers(original, load, protocol):
    content = {"HR": {"mean": np.float64(85), "std": np.float32(10)}, "K": {"mean": np.int64(4), "std": 2.5}}
    write(original / "stats.pkl", pickle.dumps(content, protocol))
    cohort = load(original, params_map=str(original / "stats.pkl"))
    assert cohort.statistics[:2].tolist() == [[85, 10], [4, 2.5]]


@pytest.mark.parametrize("call",
                         [Call(os.system, "touch {}"), Call(eval, "open('{}', 'w')"), Call(exec, "open('{}', 'w')"),
                          Call(getattr, "", "join"), Call(np.array, [1.0])])
def test_params_map_pickle_executes_nothing(original, load, tmp_path, call):
    witness = tmp_path / "executed"
    call.call = call.call[0], tuple(a.format(witness) if isinstance(a, str) else a for a in call.call[1])
    write(original / "stats.pkl", pickle.dumps({"HR": {"mean": call, "std": 1.0}}))
    with pytest.raises(InputError, match=r"stats.pkl: not a plain pickle .*it asks for"):
        load(original, params_map=str(original / "stats.pkl"))
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", pickle.dumps([1, 2]), pickle.dumps({"HR": {"mean": 1}}),
                                     pickle.dumps({"HR": 3}),
                                     pickle.dumps({"HR": {"mean": "x", "std": 1}}),
                                     pickle.dumps({"HR": {"mean": 1, "std": -1}}),
                                     b"cnumpy\ndtype\n(S'O8'\ntR.",
                                     b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'abcdefgh'\ntR."])
def test_params_map_bad_pickle(original, load, content):
    write(original / "stats.pkl", content)
    with pytest.raises(InputError, match="stats.pkl"):
        load(original, params_map=str(original / "stats.pkl"))


def test_options_are_refused_where_nothing_reads_them(original, tmp_path, load):
    write(tmp_path / "d/events.csv", EVENTS)
    with pytest.raises(InputError, match="--task death: not read with a long table"):
        load(tmp_path / "d", task="death")
    with pytest.raises(InputError, match="--params_map .*: not read with the embedded cohort"):
        load_cohort(None, cache_dir=tmp_path / "cache", params_map=str(original / "stats.csv"))
    with pytest.raises(InputError, match="--label_file .*nowhere.csv: no such file"):
        load(original, label_file=str(original / "nowhere.csv"))
    with pytest.raises(InputError, match="give .csv with variable,mean,std or .pkl"):
        load(original, params_map=str(write(original / "stats.json", "{}")))


def test_cache_follows_the_options_and_their_files(original, load):
    assert (load(original).label == -1).all()
    assert labels_of(load(original, label_file=str(original / "oc.csv")))["200001"] == 1
    write(original / "oc.csv", "ts_id,in_hospital_mortality\n200001,0\n200003,1\n")
    assert labels_of(load(original, label_file=str(original / "oc.csv")))["200001"] == 0


# ---- MEDS ------------------------------------------------------------------------------------------------------------

def at(text):
    return pd.Timestamp(f"2020-01-{text}") if text else pd.NaT


def meds(folder, name, **columns):
    pytest.importorskip("pyarrow")
    table = pd.DataFrame(columns)
    for column in ("time", "prediction_time"):
        if column in table:
            table[column] = table[column].astype("datetime64[us]")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / name, index=False)


@pytest.fixture
def meds_folder(tmp_path):
    folder = tmp_path / "meds"
    meds(folder, "data/train/0.parquet", subject_id=[5, 5, 5, 5, 5], code=["HR", "GENDER//F", "HR", "K", "MEDS_DEATH"],
         time=[at("01 10:00:30"), at(None), at("01 09:59:50"), at("01 12:00"), at("02 00:00")],
         numeric_value=np.array([80, np.nan, 70, 4, np.nan], dtype=np.float32))
    meds(folder, "data/held_out/0.parquet", subject_id=[6, 6, 7, 7], code=["ADMIT", "K", "GENDER//M", None],
         time=[at("03 00:00"), at("03 00:05"), at(None), at("03 00:00")])
    meds(folder, "metadata/subject_splits.parquet", subject_id=[5, 6, 7], split=["train", "held_out", "tuning"])
    return folder


def test_meds_without_labels_is_one_unlabelled_point_at_the_end_of_each_subject(meds_folder, load):
    cohort = load(meds_folder)
    assert events_of(cohort) == {
        "5": [(0, [("GENDER//F", None), ("HR", 70)]), (1, [("HR", 80)]), (121, [("K", 4)])],
        "6": [(0, [("ADMIT", None)]), (5, [("K", None)])], "7": [(0, [("GENDER//M", None)])]}
    assert splits_of(cohort) == {"5": 0, "6": 2, "7": 1} and (cohort.label == -1).all()
    assert counted(cohort) == {
        "rows with an empty variable": 1, "MEDS_DEATH events": 1,
        "events without a value of variables that have values elsewhere (their presence counts)": 1}
    assert "MEDS_DEATH" not in cohort.variables


def points_of(cohort) -> dict:
    """{stay: [(minute, label)...]}"""
    return {str(stay): [(float(m), int(y)) for m, y in zip(cohort.point_minute[a:b], cohort.label[a:b])]
            for stay, a, b in zip(cohort.stay_id, cohort.point_start, cohort.point_start[1:])}


def test_meds_subject_is_one_stay_of_many_points_and_no_set_straddles_one(meds_folder, load):
    bare = load(meds_folder)
    times = [at("01 12:00"), at("01 10:00:29"), at("05 00:00"), at("03 00:04"), at("01 00:00"), at("02 00:00")]
    meds(meds_folder, "data/train/1.parquet", subject_id=[5, 5], code=["Na", "K"], numeric_value=[1.0, 2],
         time=[at("01 10:00:29"), at("01 10:00:59")])
    meds(meds_folder, "labels/death/0.parquet", subject_id=[5, 5, 5, 6, 99, 6], prediction_time=times,
         boolean_value=[True, False, True, False, True, False])
    cohort = load(meds_folder)
    assert events_of(cohort) == {
        "5": [(0, [("GENDER//F", None), ("HR", 70)]), (1, [("Na", 1)]), (1.5, [("HR", 80), ("K", 2)]),
              (121, [("K", 4)])],
        "6": [(0, [("ADMIT", None)]), (5, [("K", None)])], "7": [(0, [("GENDER//M", None)])]}
    assert points_of(cohort) == {"5": [(1 + 29 / 60, 0), (121, 1), (5161, 1)], "6": [(-1440, 0), (4, 0)], "7": []}
    assert splits_of(cohort) == {"5": 0, "6": 2, "7": 1}
    assert counted(cohort) == {
        "rows with an empty variable": 1, "MEDS_DEATH events": 1,
        "events without a value of variables that have values elsewhere (their presence counts)": 1,
        "rows of no stay with a usable event": 1,
        "stays without a question": 1, "prediction points before the first set of their stay (no answer)": 1}
    shutil.rmtree(meds_folder / "labels")
    assert load(meds_folder).fingerprint == cohort.fingerprint != bare.fingerprint
    assert isinstance(cohort.event_value, np.memmap)
    clock = cohort.clock(cohort.point_stay, cohort.point_minute)
    assert sorted(clock) == sorted(np.delete(np.array(times, "datetime64[us]"), 4))


def test_a_clock_time_of_any_microsecond_of_a_long_life_can_be_written_back(tmp_path, load):
    rng, birth = np.random.default_rng(0), np.datetime64("1931-05-06T07:08:09.000001", "us")
    times = birth + np.sort(rng.choice(2**51 + 2**50, 500)).astype("timedelta64[us]")  # 107 years
    meds(tmp_path, "data/0.parquet", subject_id=[1, 1], time=[birth, times[100]], code=["MEDS_BIRTH", "a"])
    meds(tmp_path, "labels/0.parquet", subject_id=[1] * 500, prediction_time=times, boolean_value=[False] * 500)
    cohort = load(tmp_path)
    assert np.array_equal(cohort.clock(cohort.point_stay, cohort.point_minute), times)


def test_a_meds_task_is_chosen_among_several_and_shards_are_one(meds_folder, load):
    at_noon = dict(subject_id=[5], prediction_time=[at("01 12:00")])
    for shard, label in enumerate((True, False)):
        meds(meds_folder, f"labels/death/{shard}.parquet", **at_noon | {"subject_id": [5 + shard]},
             boolean_value=[label])
    assert points_of(load(meds_folder)) == {"5": [(121, 1)], "6": [(-2160, 0)], "7": []}
    meds(meds_folder, "labels/aki.parquet", **at_noon, boolean_value=[False])
    with pytest.raises(InputError, match="labels: holds the tasks aki, death; choose one with --task NAME"):
        load(meds_folder)
    with pytest.raises(InputError, match="holds the tasks aki, death"):
        load(meds_folder, task="sepsis")
    assert points_of(load(meds_folder, task="aki"))["5"] == [(121, 0)]
    assert points_of(death := load(meds_folder, task="death"))["5"] == [(121, 1)]
    elsewhere = load(meds_folder, label_file=str(meds_folder / "labels/aki.parquet"))
    assert points_of(elsewhere)["5"] == [(121, 0)] and elsewhere.fingerprint == death.fingerprint


def test_clock_times_of_several_offsets_are_taken_to_utc(meds_folder, load):
    """As a record over the change to summer time has them."""
    times = {"noon.csv": ("2020-01-01 12:00:00", "2020-01-01 12:00:00"),
             "offsets.csv": ("2020-01-01 13:00:00+01:00", "2020-01-01T14:00:00+02:00")}
    for name, (one, other) in times.items():
        (meds_folder / name).write_text(f"subject_id,prediction_time,boolean_value\n5,{one},1\n6,{other},0\n")
    noon, offsets = (points_of(load(meds_folder, label_file=str(meds_folder / name))) for name in times)
    assert noon == offsets == {"5": [(121, 1)], "6": [(-2160, 0)], "7": []}


def test_labels_at_times_are_points_in_minutes_or_hours(tmp_path, load):
    write(tmp_path / "d/events.csv", EVENTS)
    write(tmp_path / "d/labels.csv", "stay_id,label,hour,subject_id\n7,1,1.5,x\n7,0,0,x\n8,,-1,x\n7,1,1.5,\n")
    cohort = load(tmp_path / "d")
    assert points_of(cohort) == {"007": [], "7": [(0, 0), (90, 1)], "8": [(-60, -1)], "9": []}
    assert cohort.subject.tolist() == ["007", "x", "x", "9"] and cohort.stay_label.tolist() == [-1, 1, -1, -1]
    assert counted(cohort) == {
        "rows with an empty variable": 1, "rows without a finite value": 1, "rows given more than once": 1,
        "stays without a question": 2, "prediction points before the first set of their stay (no answer)": 1}
    assert "data: 3 prediction points in 2 stays" in cohort.describe()
    write(tmp_path / "d/labels.csv", "stay_id,label,minute\n7,1,90\n7,0,0\n8,,-60\n")
    assert points_of(load(tmp_path / "d")) == points_of(cohort)
    with pytest.raises(InputError, match="--hours 48: these labels have times of their own"):
        load(tmp_path / "d", hours=48)


def test_one_question_a_stay_after_some_hours_or_at_its_end(tmp_path, load):
    write(tmp_path / "events.csv", "stay_id,minute,variable,value\n1,-10,a,1\n1,50,a,1\n1,51,a,1\n2,5,a,1\n2,9,a,1\n")
    write(tmp_path / "labels.csv", "stay_id,label\n1,1\n")
    assert points_of(load(tmp_path)) == {"1": [(51, 1)], "2": [(9, -1)]}
    assert points_of(load(tmp_path, hours=50 / 60)) == {"1": [(50, 1)], "2": [(9, -1)]}
    assert points_of(load(tmp_path, hours=0)) == {"1": [(0, 1)], "2": [(0, -1)]}
    assert points_of(load(tmp_path, hours=np.inf)) == points_of(load(tmp_path))


@pytest.mark.parametrize("name, columns",
                         [("o.csv", "RecordID,In-hospital_death"), ("o/0.csv", "subject_id,boolean_value"),
                                           ("o/0.csv", "ts_id,in_hospital_mortality"), ("o.csv", "stay_id,label")])
def test_labels_that_lie_elsewhere_replace_the_datas_own_whatever_their_columns(tmp_path, load, name, columns):
    folder = write_physionet(tmp_path / "data")
    before = load(folder)
    write(tmp_path / name, f"{columns}\n132539,1\n132540.0,0\n")
    cohort = load(folder, label_file=str(tmp_path / name.split("/")[0]))
    assert labels_of(cohort) == {"132539": 1, "132540": 0} and labels_of(before) == {"132539": 0, "132540": 1}
    assert cohort.fingerprint == before.fingerprint and len(list((tmp_path / "cache").iterdir())) == 1  # parsed once


def test_a_split_file_overrides_the_datas_own_and_leaves_its_identity_alone(meds_folder, load):
    write(meds_folder / "split.csv", "stay_id,split\n5,Heldout\n6.0,VALIDATION\n8,dev\n")
    before, cohort = load(meds_folder), load(meds_folder, split_file=str(meds_folder / "split.csv"))
    assert splits_of(cohort) == {"5": 2, "6": 1, "7": -1} and cohort.fingerprint == before.fingerprint
    assert {"stays without a split (neither trained on nor scored)": 1,
            "splits of no stay with a usable event": 1}.items() <= counted(cohort).items()
    write(meds_folder / "split.csv", "stay_id,split\n5,train\n5,test\n")
    with pytest.raises(InputError,
                       match=r"split.csv line 3: split is 'test', and another elsewhere for the same stay \(5\)"):
        load(meds_folder, split_file=str(meds_folder / "split.csv"))
    (meds_folder / "split.csv").write_text("stay_id,split\np5,test\n")
    with pytest.raises(InputError, match=r"names none of the stays, .* 5, 6, 7 ... \(the file's first: p5"):
        load(meds_folder, split_file=str(meds_folder / "split.csv"))


def test_physionet_2012_without_outcomes_is_unlabelled(tmp_path, load):
    (write_physionet(tmp_path / "data") / "Outcomes-a.txt").unlink()
    cohort = load(tmp_path / "data")
    assert cohort.label.tolist() == [-1, -1] and "0 labelled" in cohort.describe()


def test_meds_agrees_with_a_plain_loop(tmp_path, load):
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(3)
    n, start = 400, np.datetime64("2021-03-04T05:06:07", "us")
    subject, time = rng.integers(0, 12, n) * 10**17, start + rng.integers(0, 400, n) * np.timedelta64(20, "s")
    time[rng.random(n) < .1] = np.datetime64("NaT")
    code = rng.choice(["a", "b", "c", "MEDS_DEATH"], n)
    value = np.where(rng.random(n) < .3, np.nan, rng.normal(size=n)).astype(np.float32)
    meds(tmp_path, "data/0.parquet", subject_id=subject, time=time, code=code, numeric_value=value)
    asked = pd.DataFrame({"s": rng.integers(0, 12, 900) * 10**17,
                          "t": start + rng.integers(0, 800, 900) * np.timedelta64(10, "s")}).drop_duplicates()
    meds(tmp_path, "labels/0.parquet", subject_id=asked.s, prediction_time=asked.t,
         boolean_value=rng.random(len(asked)) < .5)
    meds(tmp_path, "metadata/subject_splits.parquet", subject_id=np.arange(12) * 10**17, split=["train"] * 12)
    cohort, expected, known = load(tmp_path), {}, {}
    for s in np.unique(subject):
        mine = (subject == s) & (code != "MEDS_DEATH")
        origin = np.nanmin(time[mine & ~np.isnat(time)]).astype("datetime64[m]")
        sets = {}
        for i in np.flatnonzero(mine):
            minute = 0 if np.isnat(time[i]) else (time[i].astype("datetime64[m]") - origin).astype(int)
            x = None if np.isnan(value[i]) else round(float(value[i]), 4)
            sets.setdefault(float(minute), []).append((str(code[i]), x))
        expected[str(s)] = sorted((m, sorted(e, key=str)) for m, e in sets.items())
        for t in asked.t[asked.s == s]:
            known[str(s), t] = (mine & (np.isnat(time) | (time <= np.datetime64(t)))).sum()
    whole = replace(cohort, set_minute=np.floor(cohort.set_minute))
    found = {stay: [(m, sorted((e for _, events in group for e in events), key=str))
                    for m, group in itertools.groupby(sets, key=lambda s: s[0])]
             for stay, sets in events_of(whole).items()}
    assert found == expected and len(cohort.set_minute) > sum(map(len, expected.values()))  # some minutes are cut
    for p, minute, t in zip(cohort.point_stay, cohort.point_minute,
                            cohort.clock(cohort.point_stay, cohort.point_minute)):
        sets = slice(*cohort.stay_start[p:p + 2])
        seen = np.searchsorted(cohort.set_minute[sets], minute, side="right")
        events = cohort.set_start[cohort.stay_start[p] + seen] - cohort.set_start[cohort.stay_start[p]]
        assert events == (known[cohort.stay_id[p], pd.Timestamp(t)] if seen else 0)


def test_meds_keeps_distinct_minutes_apart_decades_after_birth(tmp_path, load):
    pytest.importorskip("pyarrow")
    times = [pd.Timestamp("1940-01-01"),
             *(pd.Timestamp("2020-01-01 00:00") + pd.Timedelta(minutes=i) for i in range(4))]
    meds(tmp_path, "data/0.parquet", subject_id=[1] * 5, time=times, code=["MEDS_BIRTH", *"abcd"])
    cohort = load(tmp_path)
    assert np.diff(cohort.set_start).tolist() == [1] * 5 and (np.diff(cohort.set_minute) >= 0).all()


@pytest.mark.parametrize("name, columns, message", [
    ("data/1.parquet", {"subject_id": [5], "time": [at("01 00:00")]}, "1.parquet: no column code"),
    ("data/1.parquet", {"subject_id": [5], "time": [at("01 00:00")], "code": [3.5], "numeric_value": ["x"]},
     "1.parquet row 1: numeric_value is 'x', not a number"),
    ("data/1.parquet", {"subject_id": [None], "time": [at("01 00:00")], "code": ["a"]},
     "data/1.parquet row 1: subject_id is missing"),
    ("metadata/subject_splits.parquet", {"subject_id": [5], "split": ["holdout"]},
     "row 1: split is 'holdout'; it is one of train"),
    ("metadata/subject_splits.parquet", {"subject_id": [5, 5], "split": ["train", "tuning"]},
     "row 2: split is 'tuning', and another"),
    ("labels/0.parquet", {"subject_id": [5], "prediction_time": [at(None)], "boolean_value": [True]},
     "row 1: prediction_time is missing"),
    ("labels/0.parquet", {"subject_id": [5, 5], "prediction_time": [at("01 00:00")] * 2,
                          "boolean_value": [True, False]},
     "row 2: subject_id is '5', given twice and not alike"),
])
def test_meds_bad_input(meds_folder, load, name, columns, message):
    meds(meds_folder, name, **columns)
    with pytest.raises(InputError, match=message):
        load(meds_folder)


# ---- PhysioNet 2019 --------------------------------------------------------------------------------------------------

def test_physionet2019_gives_the_exact_cohort(tmp_path, load):
    write(tmp_path / "training_setA/p000001.psv",
          "HR|Temp|Age|ICULOS|SepsisLabel\nNaN|NaN|70.5|1|0\n80|36.6|70.5|2|0\n82|NaN|70.5|3|1\n")
    write(tmp_path / "training_setB/p100001.psv",
          "HR|Temp|Age|ICULOS|SepsisLabel\n90|inf|NaN|4|0\nNaN|NaN|50|5|0\nNaN|37|50|6|0\n")
    cohort = load(tmp_path)
    assert events_of(cohort) == {"p000001": [(0, [("Age", 70.5), ("ICULOS", 1)]), (60, [("HR", 80), ("Temp", 36.6)]),
                                             (120, [("HR", 82)])],
                                 "p100001": [(0, [("HR", 90), ("ICULOS", 4)]), (60, [("Age", 50)]),
                                             (120, [("Temp", 37)])]}
    assert cohort.variables == ["Age", "HR", "ICULOS", "Temp"] and points_of(cohort) == {
        "p000001": [(0, 0), (60, 0), (120, 1)], "p100001": [(0, 0), (60, 0), (120, 0)]}
    assert counted(cohort) == {"repeated descriptors": 7, "rows without a finite value": 1}
    for letter in "AB":
        with tarfile.open(tmp_path / f"training_set{letter}.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / f"training_set{letter}", arcname=f"training_set{letter}")
        shutil.rmtree(tmp_path / f"training_set{letter}")
    packed = load(tmp_path)
    assert packed.fingerprint == cohort.fingerprint and points_of(packed) == points_of(cohort)


def test_physionet2019_without_labels_is_asked_every_hour(tmp_path, load):
    write(tmp_path / "training_setA/p1.psv", "HR|Temp\n80|37\nNaN|NaN\n")
    assert points_of(load(tmp_path)) == {"p1": [(0, -1), (60, -1)]}


@pytest.mark.parametrize("text, message", [
    ("HR|SepsisLabel\n80|0\n81|2\n", r"p1.psv line 3: SepsisLabel is 2, not 0 or 1"),
    ("HR|SepsisLabel\n80|\n", r"p1.psv line 2: SepsisLabel is missing, not 0 or 1"),
    ("HR|SepsisLabel\nfast|0\n", r"p1.psv line 2: HR is 'fast', not a number"),
    ("", r"p1.psv: an empty file"),
    ("HR|SepsisLabel\n", r"a header and no row"),
])
def test_physionet2019_bad_input(tmp_path, load, text, message):
    write(tmp_path / "training_setA/p1.psv", text)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_unknown_folder_lists_every_reader(tmp_path, load):
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert all(reader.name in str(caught.value) for reader in readers.READERS)


# ---- forms in which tables come --------------------------------------------------------------------------------------

ROWS = "stay_id,minute,variable,value\n2,5,Na,140.5\n1,0,HR,80\n1,60,HR,\n2,-5,K,4\n"
LABELLED = "stay_id,label\n1,1\n2,0\n"
SPELLED = {"1": [(0, [("HR", 80)]), (60, [("HR", None)])], "2": [(-5, [("K", 4)]), (5, [("Na", 140.5)])]}


def zipped(text, name="events.csv"):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("__MACOSX/._" + name, b"\0\5\x16\7")  # beside every file that a Mac packs
        archive.writestr(name, text)
    return packed.getvalue()


HEADER, *LINES = ROWS.splitlines(keepends=True)
FORMS = {
    "plain": {"events.csv": ROWS, "labels.csv": LABELLED},
    "gzip": {"events.csv.gz": gzip.compress(ROWS.encode()), "labels.csv.gz": gzip.compress(LABELLED.encode())},
    "zip": {"events.csv.zip": zipped(ROWS), "labels.csv.zip": zipped(LABELLED)},
    "parts": {"events-000.csv": HEADER + "".join(LINES[:3]), "events-001.csv": HEADER + LINES[3],
              "labels.csv": LABELLED},
    "parts that end in _n": {"events_0.csv": HEADER + LINES[0], "events_1.csv": HEADER + "".join(LINES[1:]),
                             "labels_0.csv": LABELLED[:18], "labels_1.csv": "stay_id,label\n2,0\n"},
    "folder": {"events/part-0.csv": HEADER + "".join(LINES[:3]), "events/part-1.csv": HEADER + LINES[3],
               "events/_SUCCESS": "", "labels/0.csv": LABELLED},
    "semicolon": {"events.csv": ROWS.replace(",", ";"), "labels.csv": LABELLED.replace(",", ";")},
    "decimal comma": {"events.csv": ROWS.replace(",", ";").replace(".", ","), "labels.csv": LABELLED},
    "tab": {"events.csv": ROWS.replace(",", "\t"), "labels.csv": LABELLED.replace(",", "\t")},
    "headers": {"events.csv": ROWS.replace("stay_id,minute,variable", " Stay_ID ,MINUTE,Variable"),
                "labels.csv": LABELLED.replace("stay_id,label", "STAY_ID, Label")},
    "spaces": {"events.csv": ROWS.replace("\n1,", "\n 1 ,").replace("HR,80", " HR ,80"),
               "labels.csv": LABELLED.replace("\n1,", "\n1 ,")},
    "blank lines at the end": {"events.csv": ROWS + "\n\r\n", "labels.csv": LABELLED + "\n"},
    "a comma in quotes": {"events.csv": ROWS.replace("HR,80", '"HR",80') + '2,5,"x, y",\n', "labels.csv": LABELLED},
    "one level down": {"mine/events.csv": ROWS, "mine/labels.csv": LABELLED},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_read_in_whatever_form_it_comes(tmp_path, load, form):
    for name, content in FORMS[form].items():
        write(tmp_path / "d" / name, content)
    cohort, spelled = load(tmp_path / "d"), dict(SPELLED)
    if form == "a comma in quotes":
        spelled["2"] = [(-5, [("K", 4)]), (5, [("Na", 140.5), ("x, y", None)])]
    assert events_of(cohort) == spelled and labels_of(cohort) == {"1": 1, "2": 0}


def test_parts_of_a_parquet_folder_durations_and_clock_times_are_one_cohort(tmp_path, load):
    pytest.importorskip("pyarrow")
    table = pd.read_csv(io.StringIO(ROWS))
    minute = pd.to_timedelta(table["minute"], unit="min")
    clock = pd.Timestamp("2020-03-01 10:00:30") + minute  # stay 2 begins at 09:55:30
    for name, column in {"number": table["minute"], "duration": minute, "clock": clock}.items():
        (tmp_path / name / "events.parquet").mkdir(parents=True)
        write(tmp_path / name / "events.parquet/_SUCCESS", "")
        for i, part in enumerate((table[:3], table[3:])):
            part.assign(minute=column).to_parquet(tmp_path / name / f"events.parquet/{i}.snappy.parquet")
    assert events_of(load(tmp_path / "number")) == events_of(load(tmp_path / "duration")) == SPELLED
    cohort = load(tmp_path / "clock")
    assert events_of(cohort) == SPELLED | {"2": [(0, [("K", 4)]), (10, [("Na", 140.5)])]}
    assert cohort.origin.tolist() == [pd.Timestamp("2020-03-01 10:00"), pd.Timestamp("2020-03-01 09:55")]
    assert cohort.clock(np.array([1]), cohort.set_minute[-1:]) == np.datetime64("2020-03-01T10:05")
    write(tmp_path / "clock/labels.csv", "stay_id,label,prediction_time\n2,1,2020-03-01 10:05:15\n")
    assert points_of(load(tmp_path / "clock"))["2"] == [(9 + 75 / 60, 1)]


def test_a_folder_that_holds_several_data_sets_or_meds_data_itself_is_understood(tmp_path, load, meds_folder):
    write(tmp_path / "all/a/events.csv", ROWS), write(tmp_path / "all/b/events.csv", ROWS)
    with pytest.raises(InputError, match="all: the folders a, b each hold data; name one with --data_dir"):
        load(tmp_path / "all")
    assert load(meds_folder / "data").fingerprint == load(meds_folder).fingerprint
    assert load(meds_folder / "data").reader == f"MEDS in {meds_folder}"


def test_a_table_in_any_order_and_in_parts_of_any_size_is_one_cohort(tmp_path, monkeypatch):
    n, rng = 5000, np.random.default_rng(0)
    table = pd.DataFrame({"stay_id": np.sort(rng.integers(0, 90, n)), "minute": rng.integers(-50, 300, n),
                          "variable": rng.integers(0, 40, n).astype(str), "value": np.arange(n)})
    for name, part in {"sorted": table, "shuffled": table.sample(frac=1, random_state=1)}.items():
        (tmp_path / name).mkdir()
        text = part.to_csv(index=False) + "\n\n\n" * (name == "shuffled")  # blank lines at the end are none
        (tmp_path / name / "events.csv").write_text(text)
    whole = load_cohort(tmp_path / "sorted", cache_dir=tmp_path / "cache")
    monkeypatch.setattr("tables.PART_BYTES", 2000), monkeypatch.setattr("readers.BLOCK", 300)
    for name in ("sorted", "shuffled"):
        cohort = load_cohort(tmp_path / name, cache_dir=tmp_path / f"cache {name}")
        assert cohort.variables == whole.variables and cohort.notes == whole.notes
        spelled = {stay: [(m, sorted(events)) for m, events in sets] for stay, sets in events_of(cohort).items()}
        assert spelled == {stay: [(m, sorted(events)) for m, events in sets] for stay, sets in events_of(whole).items()}
        assert (cohort.fingerprint == whole.fingerprint) == (name == "sorted")  # else a minute's events change places
    assert not list(tmp_path.glob("cache*/.*"))


def test_reading_holds_as_much_memory_for_many_stays_as_for_few(tmp_path, monkeypatch):
    monkeypatch.setattr("tables.PART_BYTES", 2**16), monkeypatch.setattr("readers.BLOCK", 2**12)

    def peak(stays):
        n = 100 * stays
        pd.DataFrame({"stay_id": np.arange(n) // 100, "minute": np.arange(n) % 100, "variable": np.arange(n) % 7,
                      "value": 1}).to_csv(write(tmp_path / f"{stays}/events.csv", ""), index=False)
        tracemalloc.start()
        load_cohort(tmp_path / f"{stays}", cache_dir=tmp_path / "cache")
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used
    assert peak(2000) < 1.3 * peak(200)


# ---- cells that are no plain numbers, and all that is wrong at once --------------------------------------------------


def test_values_beyond_a_measuring_range_enter_as_their_bound(tmp_path, load):
    write(tmp_path / "events.csv",
          "stay_id,minute,variable,value\n1,0,CRP,<0.5\n1,1,CRP,>=100\n1,2,HR,> 60/minute\n1,3,HR,NA\n")
    cohort = load(tmp_path)
    assert cohort.event_value[:3].tolist() == [.5, 100, 60] and np.isnan(cohort.event_value[3])
    reason = "values beyond a measuring range (>100, <0.5), entered as their bound"
    assert f"data: 3 {reason}, the first: {tmp_path / 'events.csv'} line 2" in cohort.describe()


def test_one_error_says_everything_that_is_wrong_with_its_number_and_first_place(tmp_path, load):
    write(tmp_path / "events.csv",
          "stay_id,minute,variable,value\n1,0,a,1\n,1,a,1\n1,x,a,1\n1,y,a,\"1,5\"\n1,,a,\"1,2\"\n1,5,a,2\n,6,a,1\n")
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    place = tmp_path / "events.csv"
    assert str(caught.value) == (
        f"{place} line 3: stay_id is missing; name the stay or remove the line (2 such rows). "
        f"Also: {place} line 4: minute is 'x', not a number; mend or remove the line (2 such rows). "
        f"Also: {place} line 5: value is '1,5', with a decimal comma or a comma between thousands; write a decimal "
        "point, or save the table with semicolons between its columns (2 such rows). "
        f"Also: {place} line 4: minute is missing; give minutes since admission, between -1e8 and 1e8 (190 years) "
        "(3 such rows)")


def test_duplicates_and_names_that_differ_by_case_are_said(tmp_path, load):
    write(tmp_path / "events.csv",
          "stay_id,minute,variable,value\n" + "1,0,HR,80\n" * 3 + "1,0,hr,80\n1,0,HR,81\n1,0,x,\n1,0,x,\n1,1,HR,80\n")
    cohort = load(tmp_path)
    assert counted(cohort) == {"variables whose names differ only by case or spaces (kept apart)": 2,
                               "events given more than once (same stay, minute, variable and value; kept)": 3}
    assert "kept apart), the first: HR, hr" in cohort.describe() and cohort.variables == ["HR", "hr", "x"]


def test_the_span_of_time_and_the_median_stay_are_said(tmp_path, load):
    write(tmp_path / "events.csv",
          "stay_id,minute,variable,value\n1,-30,a,1\n1,150,a,1\n1,150,b,1\n2,0,a,1\n2,60,a,1\n2,600,a,1\n")
    said = load(tmp_path).describe()
    assert "data: minutes -30 to 600; a median stay lasts 6.5 hours and has 2 sets, 3 events" in said


def test_hours_count_from_the_first_set_that_holds_no_birth(tmp_path, load):
    times = [None, pd.Timestamp("1950-01-01"), pd.Timestamp("2020-01-01 10:00"), pd.Timestamp("2020-01-03")]
    meds(tmp_path, "data/0.parquet", subject_id=[1] * 4, time=times, code=["GENDER//F", "MEDS_BIRTH", "a", "b"])
    cohort = load(tmp_path, hours=12)
    assert cohort.admission == cohort.set_minute[1] and cohort.point_minute == cohort.set_minute[1] + 720
    assert "a median stay lasts 38.0 hours" in cohort.describe()


@pytest.mark.parametrize("labels, positive, expected", [
    ("yes\nno\nNA\n", "YES", [1, 0, -1]), ("alive\ndead\nalive\n", "dead", [0, 1, 0]), ("1\n2\n\n", "2", [0, 1, -1])])
def test_labels_in_words_need_the_positive_one_named(tmp_path, load, labels, positive, expected):
    write(tmp_path / "events.csv", "stay_id,minute,variable,value\n" + "".join(f"s{i},0,a,1\n" for i in range(3)))
    write(tmp_path / "labels.csv",
          "stay_id,label\n" + "".join(f"s{i},{x}\n" for i, x in enumerate(labels.splitlines())))
    with pytest.raises(InputError, match="labels.csv line .: label is .*, not 0 or 1; .*--positive WORD"):
        load(tmp_path)
    assert load(tmp_path, positive=positive).label.tolist() == expected
    with pytest.raises(InputError, match="--positive maybe: label is one of .*; give one of two words"):
        load(tmp_path, positive="maybe")


def test_a_map_renames_and_rescales_variables_as_they_are_read(tmp_path, load):
    write(tmp_path / "d/events.csv",
          "stay_id,minute,variable,value\n1,0,Temp F,98.6\n1,1,Temp,37\n1,2,HR,80\n1,3,Temp F,\n")
    write(tmp_path / "map.csv", "source,name,factor,offset\nTemp F,Temp,0.5555555556,-17.7777777778\nunused,x,1,\n")
    plain, mapped = load(tmp_path / "d"), load(tmp_path / "d", variables_map=str(tmp_path / "map.csv"))
    assert events_of(mapped) == {"1": [(0, [("Temp", 37)]), (1, [("Temp", 37)]), (2, [("HR", 80)]),
                                       (3, [("Temp", None)])]}
    assert mapped.notes["values renamed or rescaled by --variables"] == 2 and plain.fingerprint != mapped.fingerprint
    write(tmp_path / "map.csv", "source,name,factor\nHR,,1\nHR,x,\n")
    with pytest.raises(InputError, match="line 3: source is 'HR', where .* Also: .*line 2: name is missing; .* Also: "):
        load(tmp_path / "d", variables_map=str(tmp_path / "map.csv"))


def test_a_stay_of_two_subjects_is_refused_and_subjects_of_events_are_kept(tmp_path, load):
    write(tmp_path / "events.csv",
          "stay_id,minute,variable,value,subject_id\n1,0,a,1,p\n1,1,a,1,\n2,0,a,1,p\n3,0,a,1,\n")
    cohort = load(tmp_path)
    assert cohort.subject.tolist() == ["p", "p", "3"]
    write(tmp_path / "events.csv", "stay_id,minute,variable,value,subject_id\n1,0,a,1,p\n1,1,a,1,q\n")
    with pytest.raises(InputError,
                       match="events.csv line 3: subject_id is 'q', and another elsewhere for the same stay"):
        load(tmp_path)


@pytest.mark.parametrize("content",
                         [gzip.compress(ROWS.encode())[:-12], gzip.compress(ROWS.encode())[:20], b"not gzip"])
def test_a_damaged_packed_table_is_one_line(tmp_path, load, content):
    write(tmp_path / "events.csv.gz", content)
    with pytest.raises(InputError, match="events.csv.gz: damaged archive"):
        load(tmp_path)


def test_the_cache_lies_where_the_system_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    load_cohort(None, 24)
    assert len(list((tmp_path / "caches/seqsetvae").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("sys.platform", "darwin")
    assert readers.cache_home() == Path.home() / "Library/Caches/seqsetvae"


# ---- one spelling of ids, one zero of hours, nothing silent ----------------------------------------------------------

HEAD = "stay_id,minute,variable,value\n"


def parquet(path, **columns):
    pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path, index=False)


def said(cohort) -> str:
    return cohort.describe()


def test_an_id_and_an_item_number_have_one_spelling_wherever_they_enter(tmp_path, load):
    events = dict(minute=[0, 1], value=[1.0, 2.0])
    parquet(tmp_path / "d/events/0.parquet", stay_id=[1001, 1002], variable=[220045, 7], **events)
    parquet(tmp_path / "d/events/1.parquet", stay_id=[1001.0, 1002.0], variable=[220045.0, 7.0], subject_id=[5.0, 6.0],
            **events)
    write(tmp_path / "d/labels.csv", "stay_id,label\n1001.00,1\n 1002 ,0\n")
    write(tmp_path / "split.csv", "stay_id,split\n1001.0,train\n1002,test\n")
    write(tmp_path / "map.csv", "source,name,factor\n220045.0,HR,10\n")
    cohort = load(tmp_path / "d", split_file=str(tmp_path / "split.csv"), variables_map=str(tmp_path / "map.csv"))
    assert events_of(cohort) == {"1001": [(0, [("HR", 10), ("HR", 10)])], "1002": [(1, [("7", 2), ("7", 2)])]}
    assert labels_of(cohort) == {"1001": 1, "1002": 0} and splits_of(cohort) == {"1001": 0, "1002": 2}
    assert cohort.subject.tolist() == ["5", "6"]
    write(tmp_path / "accents/events.csv", HEAD + "\xfc,0,\xe9,1\nu\u0308,1,e\u0301,1\n")
    assert events_of(load(tmp_path / "accents")) == {"\xfc": [(0, [("\xe9", 1)]), (1, [("\xe9", 1)])]}


@pytest.mark.parametrize("ids", [[2.0**53, 2.0**53 + 2], [123456789012345678.0, 1.0],
                                 np.array([2**24, 7], dtype=np.float32), ["1.23457E+17", "x"],
                                 ["9007199254740993.0", "x"]])
def test_a_float_id_that_may_have_been_another_is_refused(tmp_path, load, ids):
    parquet(tmp_path / "events.parquet", stay_id=ids, minute=[0, 1], variable=["a", "a"], value=[1.0, 1.0])
    with pytest.raises(InputError, match="events.parquet row 1: stay_id is .* a float of so many digits"):
        load(tmp_path)
    parquet(tmp_path / "events.parquet", stay_id=[2**53 + 1, 2**53], minute=[0, 1], variable=["a", "a"], value=[1., 1.])
    assert len(load(tmp_path)) == 2


def test_words_for_no_id_are_missing_ids(tmp_path, load):
    words = ["", "NaN", "nan", "None", "<NA>", "NaT", "null", "NA", "\\N"]
    write(tmp_path / "c/events.csv", HEAD + "1,0,a,1\n" + "".join(f"{word},1,a,1\n" for word in words))
    parquet(tmp_path / "p/events.parquet", stay_id=[1, np.nan, np.nan], minute=0, variable="a", value=1.0)
    for folder, row, count in (("c", "csv line 3", len(words)), ("p", "parquet row 2", 2)):
        with pytest.raises(InputError, match=rf"events.{row}: stay_id is missing; .* \({count} such rows\)"):
            load(tmp_path / folder)


def test_words_for_no_number_are_missing_and_counted(tmp_path, load):
    rows = "".join(f"1\t{i}\ta\t{cell}\n" for i, cell in enumerate([1, r"\N", "<NA>", "#N/A", "n/a", ".", "", "NULL"]))
    write(tmp_path / "events.csv", HEAD.replace(",", "\t") + rows)
    cohort = load(tmp_path)
    assert np.isnan(cohort.event_value).tolist() == [False] + [True] * 7
    reason = r"cells of \N, <NA>, #N/A, n/a, NaT or . where a number is due, read as missing"
    assert f"data: 5 {reason}, the first: {tmp_path / 'events.csv'} line 3" in said(cohort)


def test_a_meds_task_is_named_by_its_path_and_shards_are_none(tmp_path, load):
    meds(tmp_path, "data/0.parquet", subject_id=[5], time=[at("01 10:00")], code=["a"])
    one = dict(subject_id=[5], prediction_time=[at("01 12:00")])
    names = ["mortality/in_icu/first_24h/0", "mortality/in_hospital/first_48h/train/part-00000-ab.c000", "aki/tuning"]
    for i, name in enumerate(names):
        meds(tmp_path, f"labels/{name}.parquet", **one, boolean_value=[i == 1])
    with pytest.raises(InputError, match="tasks aki, mortality/in_hospital/first_48h, mortality/in_icu/first_24h; choose"):
        load(tmp_path)
    assert load(tmp_path, task="mortality/in_icu/first_24h").label.tolist() == [0]
    assert load(tmp_path, task="mortality/in_hospital/first_48h").label.tolist() == [1]


def test_folders_of_meds_data_that_are_named_like_splits_are_the_split(tmp_path, load):
    for subject, part in enumerate(("train", "tuning", "held_out")):
        meds(tmp_path, f"data/{part}/0.parquet", subject_id=[subject], time=[at("01 10:00")], code=["a"])
    assert splits_of(load(tmp_path)) == {"0": 0, "1": 1, "2": 2}
    meds(tmp_path, "metadata/subject_splits.parquet", subject_id=[0, 1, 2], split=["tuning", "train", "train"])
    assert splits_of(load(tmp_path)) == {"0": 1, "1": 0, "2": 0}
    meds(tmp_path, "data/held_out/1.parquet", subject_id=[0], time=[at("01 10:00")], code=["a"])
    with pytest.raises(InputError, match="row 1: subject_id is '0', and in another split's folder too"):
        load(tmp_path)


def test_columns_that_are_not_read_are_named_and_a_time_among_them_stops(tmp_path, load):
    write(tmp_path / "d/events.csv", "stay_id,minute,variable,value,ward,bed\n1,0,a,1,x,y\n1,9,a,1,x,y\n")
    write(tmp_path / "d/labels.csv", "stay_id,label,age\n1,1,30\n")
    lines = said(load(tmp_path / "d"))
    assert "data: 2 columns of events.csv not read: ward, bed" in lines
    assert "data: 1 columns of labels.csv not read: age" in lines
    for name, cell in (("timestamp", 5), ("asked_at", "2020-01-01 10:00"), ("label_hour", 1), ("Date", 1)):
        write(tmp_path / "d/labels.csv", f"stay_id,label,{name}\n1,1,{cell}\n")
        with pytest.raises(InputError, match=f"labels.csv: its column {name.lower()} looks like a time") as error:
            load(tmp_path / "d")
        assert f"{'prediction_time' if name == 'asked_at' else 'hour'}={name.lower()}" in str(error.value)
    assert load(tmp_path / "d", columns="minute=Date").point_minute.tolist() == [1]
    assert load(tmp_path / "d", columns="other=date").point_minute.tolist() == [9]


def test_a_time_is_rounded_once_so_that_a_question_meets_its_event(tmp_path, load):
    minutes = np.arange(0, 3000)
    write(tmp_path / "h/events.csv", HEAD + "".join(f"{m},{m},a,1\n{m},{m + 1},a,1\n" for m in minutes))
    write(tmp_path / "h/labels.csv", "stay_id,label,hour\n" + "".join(f"{m},1,{m / 60}\n" for m in minutes))
    cohort = load(tmp_path / "h")
    assert np.array_equal(cohort.point_minute, cohort.set_minute[::2])
    tenths = np.arange(3000) / 10
    parquet(tmp_path / "f/events.parquet", stay_id=np.arange(3000), minute=tenths.astype(np.float32), variable="a",
            value=1.0)
    write(tmp_path / "f/labels.csv", "stay_id,label,minute\n" + "".join(f"{i},1,{m}\n" for i, m in enumerate(tenths)))
    cohort = load(tmp_path / "f")
    assert np.array_equal(cohort.point_minute, cohort.set_minute)


def test_hours_have_one_zero_minute_0_or_the_first_event_that_is_no_birth(tmp_path, load):
    write(tmp_path / "t/events.csv", HEAD + "1,-600,a,1\n1,100,a,1\n1,500,a,1\n")
    write(tmp_path / "t.csv", "stay_id,label,hour\n1,1,2\n")
    asked = load(tmp_path / "t", hours=2), load(tmp_path / "t", label_file=str(tmp_path / "t.csv"))
    assert [cohort.point_minute.tolist() for cohort in asked] == [[120], [120]] and asked[0].admission.tolist() == [0]
    meds(tmp_path, "m/data/0.parquet", subject_id=[1] * 3, code=["MEDS_BIRTH", "a", "b"],
         time=[pd.Timestamp("1950-01-01"), at("01 10:00"), at("03 00:00")])
    asked = load(tmp_path / "m", hours=2), load(tmp_path / "m", label_file=str(tmp_path / "t.csv"))
    assert [cohort.clock(np.array([0]), cohort.point_minute) for cohort in asked] == [np.datetime64(at("01 12:00"))] * 2


def test_hidden_parts_are_skipped_and_counted_and_links_followed_once(tmp_path, load):
    write(tmp_path / "d/events/0.csv", HEAD + "1,0,a,1\n")
    for name in ("_temporary/0/1.csv", ".ipynb_checkpoints/0.csv", "_1.csv"):
        write(tmp_path / "d/events" / name, HEAD + "1,0,a,9\n")
    write(tmp_path / "elsewhere/2.csv", HEAD + "2,0,a,1\n")
    (tmp_path / "d/events/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "d/events")
    cohort = load(tmp_path / "d")
    assert cohort.stay_id.tolist() == ["1", "2"] and cohort.event_value.tolist() == [1, 1]
    for line in ("3 files and folders whose names begin with _ or ., not read", "2 files read",
                 "1 folders met again through a link, not read again"):
        assert f"data: {line}" in said(cohort)


@pytest.mark.parametrize("separator, cells, values", [
    (";", ["36,6", "1250", "80,5"], [36.6, 1250, 80.5]), (";", ["36.6", "1250"], [36.6, 1250]),
    (";", ["36.6", "1,250"], None), (";", ["1,250.5"], None), ("\t", ["35,8"], None), (",", ['"1,250"'], None)])
def test_a_table_has_one_decimal_mark(tmp_path, load, separator, cells, values):
    rows = "".join(f"1,{i},x,@\n".replace(",", separator).replace("@", cell) for i, cell in enumerate(cells))
    write(tmp_path / "events.csv", HEAD.replace(",", separator) + rows)
    if values is None:
        with pytest.raises(InputError, match="events.csv line .: .*(decimal|thousands)"):
            load(tmp_path)
    else:
        assert load(tmp_path).event_value.tolist() == np.float32(values).tolist()


def test_sources_of_a_map_that_met_no_event_are_named(tmp_path, load):
    write(tmp_path / "d/events.csv", HEAD + "1,0,a,1\n")
    write(tmp_path / "map.csv", "source,name,factor\nA,b,2\na,c,1\n")
    cohort = load(tmp_path / "d", variables_map=str(tmp_path / "map.csv"))
    assert "data: 1 sources of --variables that met no event: A" in said(cohort)


def test_a_first_event_long_before_the_second_is_counted(tmp_path, load):
    parquet(tmp_path / "events.parquet", stay_id=[1, 1, 2, 2], variable="a", value=1.0,
            minute=pd.to_datetime(["1900-01-01", "2020-01-01", "2020-01-01", "2020-01-02"]))
    assert ("data: 1 stays whose first event lies a year or more before their second, the first: stay 1"
            in said(load(tmp_path)))


def test_a_variable_of_texts_becomes_categories_and_a_text_among_numbers_its_presence(tmp_path, load, monkeypatch):
    monkeypatch.setattr("tables.PART_BYTES", 40)
    rows = "1,0,Sex,Female\n1,0,HR,80\n1,1,HR,refused\n2,0,Sex,Male\n2,0,CRP,<5\n2,1,CRP,haemolysed\n2,2,Sex,Female\n"
    write(tmp_path / "d/events.csv", HEAD + rows)
    cohort = load(tmp_path / "d")
    assert events_of(cohort) == {"1": [(0, [("Sex=Female", None), ("HR", 80)]), (1, [("HR", None)])],
                                 "2": [(0, [("Sex=Male", None), ("CRP", 5)]), (1, [("CRP", None)]),
                                       (2, [("Sex=Female", None)])]}
    assert cohort.variables == ["CRP", "HR", "Sex=Female", "Sex=Male"]
    place = tmp_path / "d/events.csv"
    assert ("data: 3 texts of variables without numbers, entered as categories (name=text, without a value), the first: "
            f"{place} line 2, Sex=Female") in said(cohort)
    assert (f"data: 2 texts among numbers, or of more than {readers.CATEGORIES} kinds (they count as recorded, without a "
            f"value), the first: {place} line 4, HR=refused") in said(cohort)
    write(tmp_path / "e/events.csv", HEAD + "".join(f"1,{i},note,text {i}\n" for i in range(readers.CATEGORIES + 1)))
    assert load(tmp_path / "e").variables == ["note"]
    parquet(tmp_path / "p/events.parquet", **pd.read_csv(tmp_path / "d/events.csv", dtype={"value": str}))
    assert events_of(load(tmp_path / "p")) == events_of(cohort)


def test_a_tables_own_column_names_are_taken(tmp_path, load):
    write(tmp_path / "d/events.csv", "Encounter_ID,charted,stay_id,item,value\n1,5,bed 3,a,2\n")
    write(tmp_path / "d/labels.csv", "encounter_id,died\n1,1\n")
    columns = "stay_id=encounter_id, minute=charted,variable=item,label=died"
    cohort = load(tmp_path / "d", columns=columns)
    assert events_of(cohort) == {"1": [(5, [("a", 2)])]} and cohort.label.tolist() == [1]
    with pytest.raises(InputError, match="--columns .*: no table has a column chartd"):
        load(tmp_path / "d", columns=columns.replace("charted", "chartd"))
    with pytest.raises(InputError, match="--columns x: takes pairs"):
        load(tmp_path / "d", columns="x")


def test_clock_times_and_durations_are_read_from_csv_as_from_parquet(tmp_path, load):
    clock = pd.to_datetime(["2020-03-01 10:00:30", "2020-03-01 11:00:00", "2020-03-02 09:00:00"])
    table = pd.DataFrame({"stay_id": [1, 1, 2], "variable": "a", "value": [1.0, 2.0, 3.0]})
    for name, minute in {"clock": clock, "duration": clock - clock[0]}.items():
        parquet(tmp_path / name / "p/events.parquet", **table.assign(minute=minute))
        (tmp_path / name / "c").mkdir()
        table.assign(minute=minute).to_csv(tmp_path / name / "c/events.csv", index=False)
        assert load(tmp_path / name / "p").fingerprint == load(tmp_path / name / "c").fingerprint
    write(tmp_path / "clock/c/events.csv", HEAD + "1,2020-03-01 10:00,a,1\n1,soon,a,1\n")
    with pytest.raises(InputError, match="line 3: minute is 'soon', not a time like"):
        load(tmp_path / "clock/c")


def test_a_set_of_several_minutes_is_cut_at_the_question(tmp_path, load):
    write(tmp_path / "patient_ehr/train/1.csv", "variable,value,minute,set_index\n"
          "a,1,10,0\nb,2,69,0\nc,3,40,0\nd,4,70.5,1\ne,5,130,1\n")
    labels = write(tmp_path / "l.csv", "stay_id,label,minute\n1,1,10\n1,0,50\n1,1,80\n")
    whole = {"1": [(10, [("a", 1), ("c", 3), ("b", 2)]), (70.5, [("d", 4), ("e", 5)])]}
    assert events_of(load(tmp_path)) == whole
    cohort = load(tmp_path, label_file=str(labels))
    assert events_of(cohort) == {"1": [(10, [("a", 1)]), (40, [("c", 3)]), (69, [("b", 2)]), (70.5, [("d", 4)]),
                                       (130, [("e", 5)])]}
    again = with_points(cohort, np.array([2]), np.array([10.0, 50.0]))
    assert events_of(again) == events_of(cohort)


def test_sets_that_begin_within_one_another_are_cut_where_the_other_begins(tmp_path, load):
    write(tmp_path / "patient_ehr/train/1.csv", "variable,value,minute,set_index\n"
          "a,1,10,0\nb,2,60,0\nc,3,20,1\nd,4,30,1\ne,5,30,2\nf,6,31,2\n")
    cohort = load(tmp_path)
    assert events_of(cohort) == {"1": [(10, [("a", 1)]), (20, [("c", 3)]), (30, [("d", 4)]), (30, [("e", 5), ("f", 6)]),
                                       (60, [("b", 2)])]}


@pytest.mark.parametrize("tells", ["presence", "value", "nothing"])
def test_a_variable_that_tells_the_label_alone_is_found(tells):
    rng, n = np.random.default_rng(0), 200
    label = rng.random(n) < .2
    events = [(i, 0, 0, rng.normal()) for i in range(n)] + [(i, 1, 1, float(rng.random() < .5)) for i in range(n)]
    if tells == "value":
        events += [(i, 2, 2, float(y)) for i, y in enumerate(label)]
    if tells == "presence":
        events += [(i, 2, 2, np.nan) for i, y in enumerate(label) if y]
    cohort = at_end(build_cohort("x", ["HR", "coin", "died"], *(np.array(x) for x in zip(*events)),
                                 stay_id=np.arange(n)), label)
    found = telling_variables(cohort, np.arange(n))
    assert found == ({} if tells == "nothing" else {"died": pytest.approx(1)})
    assert telling_variables(cohort, np.flatnonzero(~label)) == {}
    early = replace(cohort, point_minute=np.ones(n))  # before the event that tells it
    assert telling_variables(early, np.arange(n)) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Labels of other kinds than 0 and 1
# ----------------------------------------------------------------------------------------------------------------------

THREE = "stay_id,minute,variable,value\n" + "".join(f"{i},{m},a,1\n" for i in (1, 2, 3) for m in (0, 600))


def answers_of(cohort) -> list:
    """The answers, None: none."""
    return [[None if np.isnan(x) else float(x) for x in row] for row in cohort.answers]


@pytest.mark.parametrize("labels, options, kind, names, answers, said", [
    ("stay_id,died,over_7_days,x\n1,1,0,5\n2,,true,5\n3,,,5\n", dict(outcomes=["died", "over_7_days"]), "several",
     ("died", "over_7_days"), [[1, 0], [None, 1], [None, None]], "2 labelled (died 1 of 1, over_7_days 1 of 2)"),
    ("stay_id,label\n1,home\n2,NA\n3,a ward\n", dict(kind="classes"), "classes", ("a ward", "home"),
     [[1], [None], [0]], "2 labelled (classes a ward 1, home 1)"),
    ("stay_id,label\n1,10\n2,9.0\n3,-1\n", dict(kind="classes"), "classes", ("-1", "9", "10"), [[2], [1], [0]],
     "3 labelled (classes -1 1, 9 1, 10 1)"),
    ("stay_id,label\n1,5.5\n2,\n3,-2\n", dict(kind="number"), "number", ("label",), [[5.5], [None], [-2]],
     "2 labelled (median 1.75)"),
    ("stay_id,event,hours\n1,died,30\n2,,7.5\n3,0,0\n", {}, "event", ("died",), [[30, 1], [7.5, 0], [0, 0]],
     "3 labelled (1 died, 2 censored)"),
    ("stay_id,days,event\n1,.5,home\n2,,\n3,2,died\n", {}, "event", ("died", "home"),
     [[12, 2], [None, None], [48, 1]], "2 labelled (1 died, 1 home, 0 censored)")])
def test_label_files_of_each_kind(tmp_path, load, labels, options, kind, names, answers, said):
    write(tmp_path / "d/events.csv", THREE)
    plain = load(tmp_path / "d")
    write(tmp_path / "d/labels.csv", labels)
    cohort = load(tmp_path / "d", **options)
    assert (cohort.kind, cohort.names, answers_of(cohort)) == (kind, names, answers)
    assert said in cohort.describe() and cohort.fingerprint == plain.fingerprint
    unlabelled = sum(row == [None] * len(row) for row in answers)
    assert counted(cohort).get("stays without an outcome (unlabelled)", 0) == unlabelled
    assert answers_of(load(tmp_path / "d", kinds=("binary",), **options)) == [[None]] * 3  # as pretraining reads


@pytest.mark.parametrize("labels, options, message", [
    ("label\n2", {}, "label is '2', not 0 or 1; .*--kind number, --kind classes or .* --positive WORD"),
    ("label\ndead", {}, "label is 'dead', not 0 or 1; mend the line, or say how it is read: --kind classes or"),
    ("died\n1", {}, "no column label or .*; rename or add it, or name others with --kind or --outcomes"),
    ("label\n1", dict(outcomes=["died"]), "no column died "),
    ("died\n2", dict(outcomes=["died"]), "line 2: died is '2', not 0 or 1; .*--outcomes"),
    ("died\n1", dict(outcomes=["died", "died"]), "--outcomes died died: names several outcomes, each once"),
    ("died\n1", dict(outcomes=["died"], kind="classes"), "--outcomes died: .*--kind classes"),
    ("died\n1", dict(kind="several"), "--kind several: which columns. name them with --outcomes"),
    ("label\na", dict(kind="classes", positive="a"), "--positive a: .*kind classes; leave it out"),
    ("label\na", dict(kind="number"), "line 2: label is 'a', not a number"),
    ("label\n-inf", dict(kind="number"), "line 2: label is -inf, not finite; mend the line"),
    ("event,hours\ndied,-1", {}, "line 2: hours is -1; give a time from the question on, 0 or later"),
    ("event,hours\ndied,inf", {}, "line 2: hours is inf; give a time"),
    ("event,days\ndied,", {}, "line 2: days is missing, where its event is told; give the time from the question"),
    ("event,hours,days\n,1,1", {}, "holds both hours and days"),
    ("event,hour\ndied,1", dict(kind="event"), "no column hours or days"),
    ("label,hours\n1,3", {}, "its column hours looks like a time"),
    ("label,hours\n1,3", dict(kind="number"), "its column hours looks like a time")])
def test_labels_that_are_none_of_their_kind_are_one_line(tmp_path, load, labels, options, message):
    write(tmp_path / "d/events.csv", THREE)
    header, row = labels.split("\n")
    write(tmp_path / "d/labels.csv", f"stay_id,{header}\n1,{row}\n")
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "d", **options)
    assert "\n" not in str(caught.value)


def test_own_labels_of_0_and_1_are_not_taken_for_another_kind(tmp_path):
    with pytest.raises(InputError, match="its own labels are 0 and 1, where those of the kind number are"):
        load_cohort(None, 24, cache_dir=tmp_path, kind="number")


def test_labels_elsewhere_leave_those_in_the_folder_unread(tmp_path, load):
    write(tmp_path / "d/events.csv", THREE)
    write(tmp_path / "d/labels.csv", "stay_id,label,split\n1,whatever,train\n2,x,test\n3,y,valid\n")
    write(tmp_path / "days.csv", "stay_id,label\n1,2.5\n2,3\n")
    cohort = load(tmp_path / "d", label_file=str(tmp_path / "days.csv"), kind="number")
    assert answers_of(cohort) == [[2.5], [3], [None]] and cohort.split.tolist() == [0, 2, 1]


def test_meds_tasks_are_joined_into_several_outcomes(meds_folder, load):
    for name, hours, values in (("death", (12, 13), (True, False)), ("aki", (13, 14), (True, None))):
        meds(meds_folder, f"labels/{name}.parquet", subject_id=[5, 5], boolean_value=values,
             prediction_time=[at(f"01 {hour}:00") for hour in hours])
    cohort = load(meds_folder, task=["aki", "death"])
    assert (cohort.kind, cohort.names) == ("several", ("aki", "death"))
    assert cohort.point_minute.tolist() == [121, 181, 241]
    assert answers_of(cohort) == [[None, 1], [1, 0], [None, None]]
    assert answers_of(load(meds_folder, outcomes=["death", "aki"]))[1] == [0, 1]
    with pytest.raises(InputError, match="--outcomes aki death: .*--kind number"):
        load(meds_folder, task=["aki", "death"], kind="number")


def test_meds_values_of_other_types(meds_folder, load):
    values = dict(categorical_value=["a", "b"], float_value=[1.5, None], integer_value=pd.array([None, 7], dtype="Int64"))
    meds(meds_folder, "labels/0.parquet", subject_id=[5, 5], prediction_time=[at("01 12:00"), at("01 13:00")], **values)
    assert answers_of(load(meds_folder, kind="classes")) == [[0], [1]]
    assert answers_of(load(meds_folder, kind="number")) == [[1.5], [7]]


def test_hours_to_an_event_grow_as_the_question_comes_earlier_and_a_number_stays(tmp_path, load):
    write(tmp_path / "d/events.csv", THREE)
    write(tmp_path / "d/labels.csv", "stay_id,event,hours\n1,died,30\n2,,7.5\n3,,\n")
    assert answers_of(load(tmp_path / "d", hours=4)) == [[36, 1], [13.5, 0], [None, None]]
    cohort, stays = load(tmp_path / "d"), np.arange(3)
    later = answers_moved(cohort, stays, cohort.point_minute + 60 * 7.5)
    assert np.array_equal(later, [[22.5, 1], [np.nan, np.nan], [np.nan, np.nan]], equal_nan=True)
    every, _ = at_every_set(cohort, np.array([0]), np.ones(1), .5)
    assert every.answers.tolist() == [[40, 1], [30, 1]]
    write(tmp_path / "d/labels.csv", "stay_id,label\n1,5\n2,6\n3,7\n")
    assert answers_of(load(tmp_path / "d", hours=4, kind="number")) == [[5], [6], [7]]


@pytest.mark.parametrize("kind, answers, strata", [
    ("several", [[0, 1], [1, 0], [np.nan, 1]], [0, 1, -1]), ("classes", [[2], [0], [np.nan]], [2, 0, -1]),
    ("number", [[1], [2], [3], [4], [np.nan]], [0, 1, 2, 3, -1]),
    ("event", [[5, 2], [3, 0], [np.nan, np.nan]], [1, 0, -1])])
def test_what_a_split_is_stratified_by(tmp_path, kind, answers, strata):
    cohort = build_cohort("x", ["a"], np.arange(len(answers)), np.zeros(len(answers)), np.zeros(len(answers), int),
                          np.ones(len(answers)), [f"s{i}" for i in range(len(answers))], answers=answers)
    labels = replace(cohort, kind=kind).stay_label
    assert (np.sign(labels) if kind == "event" else labels).tolist() == strata


def test_a_split_holds_every_class_in_each_part(tmp_path):
    answers = np.repeat([0, 1, 2], [40, 30, 5])
    cohort = build_cohort("x", ["a"], np.arange(75), np.zeros(75), np.zeros(75, int), np.ones(75),
                          [f"s{i:02}" for i in range(75)], answers=answers)
    split = make_splits(replace(cohort, kind="classes", names=("a", "b", "c")), seed=0)
    for ids in split.values():
        assert set(cohort.answers[np.isin(cohort.stay_id, ids), 0]) == {0, 1, 2}


def test_a_variable_that_tells_one_of_several_outcomes_is_named(tmp_path):
    answers = np.stack([np.arange(40) % 2, np.arange(40) < 15], axis=1).astype(float)
    answers[:4, 1] = np.nan
    value = np.where(answers[:, 1] == 1, 5., 2.)
    cohort = build_cohort("x", ["a"], np.arange(40), np.zeros(40), np.zeros(40, int), value,
                          [f"s{i:02}" for i in range(40)], answers=answers)
    several = replace(cohort, kind="several", names=("odd", "first"))
    assert telling_variables(several, np.arange(40)) == {"a (of first)": 1}
    assert telling_variables(replace(cohort, kind="event"), np.arange(40)) == {}
