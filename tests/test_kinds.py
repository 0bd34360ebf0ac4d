"""Outcomes of every kind from end to end: label files made by a command, learned, scored, written and answered
by the command lines, and what they refuse."""

import pandas as pd
import pytest

import labels
from tests.tiny import OUTCOMES, one_error_line, write, write_physionet

MORE = "132541,-1,-1,-1,-1,0\n132543,20,-1,3,9,0\n132545,12,4,15,2,1\n"


def test_label_files_of_physionet_2012_are_made_by_one_command(tmp_path, load, capsys):
    """The days of a death count to it, those of a survivor to discharge; -1 is none."""
    folder = write_physionet(tmp_path / "data", outcomes=OUTCOMES + MORE)
    assert labels.main([str(folder), str(tmp_path / "made")]) == 0
    said = capsys.readouterr().out
    files = {path.name: pd.read_csv(path, index_col="stay_id") for path in (tmp_path / "made").iterdir()}
    assert sorted(files) == ["classes.csv", "days.csv", "event.csv", "outcomes.csv", "saps.csv", "sofa.csv"]
    stays = [132539, 132540, 132543, 132545]
    assert files["days.csv"]["label"].to_dict() == dict(zip(stays, [5, 8, 3, 15]))
    assert files["classes.csv"]["label"].to_dict() == dict(zip(stays, ["4-7", "8-14", "0-3", "15+"]))
    assert files["event.csv"]["event"].to_dict() == dict(zip(stays, ["discharged", "died", "discharged", "died"]))
    assert files["event.csv"]["hours"].to_dict() == dict(zip(stays, [72, 48, 24, 12]))
    outcomes = files["outcomes.csv"].astype("Int64")
    assert outcomes["died"].to_dict() == {132539: 0, 132540: 1, 132541: 0, 132543: 0, 132545: 1}
    assert outcomes["long"].dropna().to_dict() == dict(zip(stays, [0, 1, 0, 1]))
    assert files["saps.csv"]["score"].to_dict() == {132539: 6, 132540: 16, 132543: 20, 132545: 12}
    assert files["sofa.csv"]["score"].to_dict() == {132539: 1, 132540: 8, 132545: 4}
    assert f"{tmp_path / 'made' / 'days.csv'}: 5 stays, 1 without label\n" in said
    assert f"{tmp_path / 'made' / 'outcomes.csv'}: 5 stays, 1 without long\n" in said
    read = load(folder, label_file=str(tmp_path / "made" / "event.csv"))
    assert read.kind == "event" and read.names == ("died", "discharged")
    assert read.answers.tolist() == [[72, 2], [48, 1]]


@pytest.mark.parametrize("outcomes, named", [
    (OUTCOMES + "132539,6,1,5,-1,0\n", "Outcomes-a.txt line 4: RecordID is '132539', named before"),
    (OUTCOMES + "132541,6,1,5,-1,2\n", "line 4: In-hospital_death is 2, not 0 or 1"),
    (OUTCOMES + "132541,6,1,five,-1,0\n", "line 4: Length_of_stay is 'five'"),
    ("RecordID,SAPS-I\n132541,6\n", "SOFA")])
def test_wrong_outcome_files_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, outcomes, named):
    folder = write_physionet(tmp_path / "data", outcomes=outcomes)
    one_error_line(capsys, labels.main([str(folder), str(tmp_path / "made")]), named)
    assert not (tmp_path / "made").exists()


def test_label_files_are_written_to_a_new_folder_alone(tmp_path, capsys):
    kept = write(tmp_path / "made" / "days.csv", "mine")
    folder = write_physionet(tmp_path / "data")
    one_error_line(capsys, labels.main([str(folder), str(tmp_path / "made")]), "made: exists already")
    assert kept.read_text() == "mine" and len(list(kept.parent.iterdir())) == 1
    one_error_line(capsys, labels.main([str(tmp_path), str(tmp_path / "more")]), "holds no Outcomes-a.txt")
    one_error_line(capsys, labels.main([str(folder)]), "folder; see --help")
