"""Outcomes of every kind from end to end: label files made by a command, learned, scored, written and answered
by the command lines, and what they refuse."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, roc_auc_score

import labels
import train
from metrics import CHECKPOINT, uncensored
from predictor import Predictor
from test_suite import main
from tests.tiny import FINETUNE, OUTCOMES, PRETRAIN, make_small, one_error_line, write, write_physionet

# ------------------------------------------------------------------------------------------------------------
# Label files of PhysioNet 2012
# ------------------------------------------------------------------------------------------------------------

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


# ------------------------------------------------------------------------------------------------------------
# From a label file to every output
# ------------------------------------------------------------------------------------------------------------

STAYS = 150
OPTIONS = {"several": ["--outcomes", "ill", "well off"], "classes": ["--kind", "classes"],
           "number": ["--kind", "number"], "event": ["--horizons", "6", "24", "48"]}
ANSWERS = {"several": ["probability_ill", "probability_well off"],
           "classes": ["probability_home, alone", "probability_mäßig", "probability_ward"],
           "number": ["median", "low", "high"],
           "event": [f"{cause}_{hours}" for cause in ("died", "went home") for hours in (6, 24, 48)]}


def label_tables(seed: int = 0) -> tuple[np.ndarray, dict]:
    """What decides of each stay [STAYS], and the label file of each kind."""
    rng = np.random.default_rng(seed)
    x, stay_id = rng.normal(size=STAYS), [f"s{i}" for i in range(STAYS)]
    near = x + .2 * rng.normal(size=STAYS)
    until = rng.exponential(150 * np.exp(2 * np.stack([-near, near], 1)))                             # [n, 2]
    censored, cause = rng.uniform(25, 450, STAYS), np.array(["died", "went home"])[until.argmin(1)]
    files = {"several": {"ill": (near > 0) * 1., "well off": np.where(rng.random(STAYS) < .2, np.nan, near < -.5)},
             "classes": {"label": np.array(["ward", "mäßig", "home, alone"])[np.digitize(near, (-.5, .5))]},
             "number": {"label": 3 * np.exp(near)},
             "event": {"event": np.where(censored < until.min(1), "", cause),
                       "hours": np.minimum(censored, until.min(1))}}
    return x, {kind: pd.DataFrame({"stay_id": stay_id} | columns) for kind, columns in files.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a long table, a label file of each kind beside it and a pretrained tiny model."""
    home, rng = tmp_path_factory.mktemp("kinds"), np.random.default_rng(1)
    x, files = label_tables()
    rows = [(f"s{i}", minute, name, value) for i, tells in enumerate(x)
            for minute, name, value in ((0, "Sex=F" if i % 2 else "Sex=M", np.nan), (30, "tells", tells),
                                        (60 + i, "HR", 80 + 9 * rng.normal()))]
    (home / "data").mkdir()
    pd.DataFrame(rows, columns=["stay_id", "minute", "variable", "value"]).to_csv(home / "data" / "events.csv",
                                                                               index=False)
    for kind, table in files.items():
        table.to_csv(home / f"{kind}.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        assert train.main([*PRETRAIN[:2], *PRETRAIN[4:], "--data_dir", str(home / "data"),
                           "--run_dir", str(home / "pretrain")]) == 0
        yield home


def finetuned_on(world, labels, *options, run="run") -> int:
    """Of so few stays an epoch has two steps, and the usual penalty leaves nothing of what one input tells."""
    return train.main([*FINETUNE, str(world / "pretrain" / "best.pt"), "--label_file", str(labels),
                       "--max_epochs", "40", "--set", "learning_rate=.02", "--set", "summaries_prior=10",
                       "--set", "trees=40", "--run_dir", str(world / run), *options])


@pytest.fixture(scope="module", params=OPTIONS)
def scored(request, world):
    """A checkpoint of each kind and all that the analysis writes about it."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("pyarrow")
    kind = request.param
    assert finetuned_on(world, world / f"{kind}.csv", *OPTIONS[kind], run=kind) == 0
    path, out = str(world / kind / "best.pt"), world / f"out-{kind}"
    out.mkdir()
    assert main(["--checkpoint", path, "--predictions", str(out / "p.csv"), "--json", str(out / "f.json"),
                 "--subgroups", "Sex,HR", "--plots", str(out), "--trajectory", "s3"]) == 0
    assert main(["--checkpoint", path, "--predictions", str(out / "p.parquet")]) == 0
    table = pd.read_csv(out / "p.csv", keep_default_na=False, na_values={
        name: [""] for name in ("ill", "well off", "label")})
    return SimpleNamespace(kind=kind, path=path, out=out, table=table,
                           tested=table[table["split"] == "test"].reset_index(drop=True),
                           given=label_tables()[1][kind], answers=table[ANSWERS[kind]].to_numpy(float),
                           figures=json.loads((out / "f.json").read_text()))


def test_predictions_hold_the_answers_and_the_labels_as_they_were_given(scored):
    labels_given = [name for name in scored.given if name != "stay_id"]
    assert [*scored.table] == ["stay_id", "subject_id", "minute", *ANSWERS[scored.kind], "split", *labels_given]
    parquet = pd.read_parquet(scored.out / "p.parquet")
    assert [*parquet] == [*scored.table]
    np.testing.assert_allclose(parquet[ANSWERS[scored.kind]], scored.answers, rtol=1e-12)
    given = scored.given.set_index("stay_id").loc[scored.table["stay_id"]]
    for name in labels_given:
        for table in (scored.table, parquet):
            if name in ("event", "label") and given[name].dtype.kind not in "f":
                assert table[name].tolist() == given[name].replace("", "0").tolist()
            else:
                np.testing.assert_allclose(table[name].astype(float), given[name].astype(float), rtol=1e-6)


def test_answers_are_what_their_kind_says(scored):
    """Chances of classes sum to 1, an interval holds its median, incidences rise and sum to at most 1."""
    answers = scored.answers
    assert np.isfinite(answers).all() and len(answers) == STAYS and answers.std(0).min() > 0
    if scored.kind == "number":
        median, low, high = answers.T
        assert (low <= median).all() and (median <= high).all()
    else:
        assert (answers >= 0).all() and (answers <= 1).all()
    if scored.kind == "classes":
        np.testing.assert_allclose(answers.sum(1), 1, atol=1e-9)
    if scored.kind == "event":
        incidence = answers.reshape(STAYS, 2, 3)
        assert (np.diff(incidence, axis=2) >= 0).all() and (incidence.sum(1) <= 1 + 1e-9).all()


def test_python_answers_as_the_command_line_does(scored, world):
    events = pd.read_csv(world / "data" / "events.csv")
    answered = Predictor(scored.path).predict(events).set_index("stay_id").loc[scored.table["stay_id"]]
    assert [*answered] == ["minute", *ANSWERS[scored.kind]]
    np.testing.assert_allclose(answered[ANSWERS[scored.kind]], scored.answers, rtol=1e-4, atol=1e-6)


def event_figures(table, task, name: str) -> tuple[float, float]:
    """Concordance and integrated Brier score of a cause, by loops."""
    hours, event, curve = table["hours"].to_numpy(float), table["event"].to_numpy(), (task.times, task.share)
    g, risk, right, pairs = uncensored(curve, hours), table[f"{name}_48"].to_numpy(), 0, 0
    for i in np.flatnonzero((event == name) & (hours < 48)):
        for j in range(len(hours)):
            taken = event[j] not in ("0", name) and hours[j] <= hours[i]
            later = hours[j] > hours[i] or hours[j] == hours[i] and event[j] == "0"
            each = later / g[i]**2 + (taken / (g[i] * g[j]) if taken else 0)
            pairs += each
            right += each * ((risk[i] > risk[j]) + .5 * (risk[i] == risk[j]))
    brier = []
    for until in task.horizons:
        came, known = hours <= until, (event != "0") | (hours > until)
        weight = known / uncensored(curve, np.where(came, hours, until))
        brier.append((weight * ((came & (event == name)) - table[f"{name}_{until:g}"])**2).mean())
    return right / pairs, np.trapezoid(brier, task.horizons) / (48 - 6)


def recomputed(scored) -> dict:
    """Figures of the test stays, from the file of predictions alone."""
    table, answers = scored.tested, scored.tested[ANSWERS[scored.kind]].to_numpy(float)
    if scored.kind == "several":
        known = table["well off"].notna()
        each = [(table["ill"], answers[:, 0]), (table["well off"][known], answers[known, 1])]
        aucs, precisions = ([f(*pair) for pair in each] for f in (roc_auc_score, average_precision_score))
        return {"auc": np.mean(aucs), "auc_ill": aucs[0], "auc_well off": aucs[1], "auprc": np.mean(precisions)}
    if scored.kind == "classes":
        words = np.array([name.removeprefix("probability_") for name in ANSWERS["classes"]])
        return {"accuracy": accuracy_score(table["label"], words[answers.argmax(1)]),
                "auc": roc_auc_score(table["label"], answers, multi_class="ovr", labels=words),
                "log_loss": log_loss(table["label"], answers, labels=words)}
    if scored.kind == "number":
        label = table["label"].astype(float)
        return {"mae": abs(label - table["median"]).mean(), "rmse": ((label - table["median"])**2).mean()**.5,
                "spearman": label.corr(table["median"], "spearman"),
                "coverage": label.between(table["low"], table["high"]).mean(),
                "width": (table["high"] - table["low"]).mean()}
    task, figures = Predictor(scored.path).model.task, {}
    for name in task.names:
        figures[f"concordance_{name}"], figures[f"brier_{name}"] = event_figures(table, task, name)
    return figures


def test_the_figures_are_those_of_the_predictions(scored):
    own = {name: measure["value"] for name, measure in scored.figures["methods"][CHECKPOINT].items()}
    found = recomputed(scored)
    assert {name: own[name] for name in found} == pytest.approx(found, rel=1e-5)
    assert scored.figures["kind"] == scored.kind and scored.figures["stays"] == len(scored.tested) == 30
    for groups in (scored.figures["subgroups"]["Sex"], scored.figures["subgroups"]["HR"]):
        assert sum(group["stays"] for group in groups.values()) == 30
    assert [*scored.figures["subgroups"]["Sex"]] == ["F", "M"]


def test_what_one_variable_decides_is_learned(scored):
    """Figures of 30 test stays; of an event they are near those of the variable itself."""
    own = {name: measure["value"] for name, measure in scored.figures["methods"][CHECKPOINT].items()}
    least = {"several": {"auc_ill": .85, "auc_well off": .85}, "classes": {"auc": .85, "accuracy": .61},
             "number": {"spearman": .8}}.get(scored.kind, {})
    if scored.kind == "event":
        x, task = label_tables()[0], Predictor(scored.path).model.task
        x = x[scored.tested["stay_id"].str[1:].astype(int)]
        for name, risk in (("died", x), ("went home", -x)):
            best, _ = event_figures(scored.tested.assign(**{f"{name}_48": risk}), task, name)
            least[f"concordance_{name}"] = best - .05
        assert own["brier_died"] < .8 * scored.figures["brier_of_marginal"]["died"]
    for name, value in least.items():
        assert own[name] > value > .6, (name, value, own)


def test_pictures_and_trajectory_are_of_the_kind(scored):
    trajectory = scored.figures["trajectory"]
    assert {*trajectory["answers"]} == {*ANSWERS[scored.kind]} and trajectory["followed"] in ANSWERS[scored.kind]
    assert {"curves.png", "trajectory.png"} <= {path.name for path in scored.out.glob("*.png")}


# ------------------------------------------------------------------------------------------------------------
# What is refused, and what is odd and read
# ------------------------------------------------------------------------------------------------------------

def changed_labels(world, kind: str, change) -> str:
    """The label file of a kind with what `change` makes of its table."""
    table = label_tables()[1][kind].astype({"label": object} if kind in ("classes", "number") else {})
    change(table)
    table.to_csv(world / "changed.csv", index=False)
    return str(world / "changed.csv")


def put(column, value, rows=slice(None)):
    return lambda table: table.__setitem__(column, table[column].astype(object).mask(
        np.isin(np.arange(STAYS), np.arange(STAYS)[rows]), value))


@pytest.mark.parametrize("kind, change, options, message", [
    ("several", None, ["--horizons", "6"], "--horizons: labels of the kind several have none"),
    ("classes", None, ["--horizons", "6"], "--horizons: labels of the kind classes have none"),
    ("number", None, ["--horizons", "6"], "--horizons: labels of the kind number have none"),
    ("event", None, ["--horizons", "24", "6"], "--horizons 24 6: give rising hours above 0, up to"),
    ("event", None, ["--horizons", "-6"], "horizons is (-6.0,); it takes"),
    ("event", None, ["--horizons", "nan"], "horizons is (nan,); it takes"),
    ("event", None, ["--horizons", "9999"], "--horizons 9999: give rising hours above 0, up to"),
    ("event", None, ["--horizons", "soon"], "--horizons: invalid float value: 'soon'"),
    ("several", None, ["--outcomes", "ill", "worse"], "several.csv: no column worse (it has stay_id, ill, well off)"),
    ("several", None, ["--outcomes", "ill", "Ill"], "--outcomes ill Ill: names several outcomes, each once"),
    ("several", None, ["--outcomes", "stay_id"], "--outcomes stay_id: says which stay or when, and is no outcome"),
    ("several", put("ill", 0), [], "the training labels of ill hold one class only"),
    ("several", put("ill", 2, [5]), [], "line 7: ill is '2', not 0 or 1"),
    ("classes", put("label", "ward"), [], "the labelled train stays hold one class only, where at least two are"),
    ("number", put("label", 5), [], "the labelled train stays hold one number only, where different numbers are"),
    ("number", put("label", "inf", [5]), [], "line 7: label is inf, not finite; mend the line"),
    ("number", put("label", ""), [], "the labelled train stays hold no label at all"),
    ("event", put("hours", -1, [5]), [], "line 7: hours is -1; give a time from the question on, 0 or later"),
    ("event", put("hours", "inf", [5]), [], "line 7: hours is inf; give a time"),
    ("event", put("event", ""), [], "the labelled train stays hold no event after hour 0, where an event is needed"),
    ("event", put("hours", 0), [], "the labelled train stays hold no event after hour 0")])
def test_labels_that_cannot_be_learned_are_one_line(world, capsys, kind, change, options, message):
    path = changed_labels(world, kind, change) if change else world / f"{kind}.csv"
    options = [*({} if "--outcomes" in options or "--horizons" in options and kind == "event" else OPTIONS[kind]),
               *options]
    capsys.readouterr()
    one_error_line(capsys, finetuned_on(world, path, *options, run="refused"), message)
    assert not (world / "refused").exists()


@pytest.mark.parametrize("kind, change, said", [
    ("classes", put("label", "nur hier", [0]), "nur hier 1"),
    ("classes", put("label", "", slice(0, 40)), "40 stays without an outcome (unlabelled)"),
    ("number", put("label", "nan", slice(0, 40)), "40 stays without an outcome (unlabelled)"),
    ("event", put("hours", 0, slice(0, 60)), "150 labelled"),
    ("event", put("event", "", slice(0, 120)), "censored")])
def test_odd_labels_are_read_counted_and_learned(world, capsys, kind, change, said):
    """A class of one stay, many empty cells, events at once, events that are mostly censored."""
    run = f"odd-{kind}-{len(list(world.iterdir()))}"
    options = [] if kind == "event" else OPTIONS[kind]
    assert finetuned_on(world, changed_labels(world, kind, change), *options, run=run) == 0
    assert said in capsys.readouterr().out
    assert main(["--checkpoint", str(world / run / "best.pt"), "--predictions", str(world / "odd.csv")]) == 0
    answers = pd.read_csv(world / "odd.csv").filter(regex="probability|median|_[0-9]")
    assert len(answers) == STAYS and np.isfinite(answers).all(axis=None)


@pytest.mark.parametrize("kind, change, message", [
    ("classes", put("label", "nie gesehen", [0]), "its labels name nie gesehen, where the checkpoint knows home"),
    ("event", put("event", "moved", [0]), "its labels name moved, where the checkpoint knows died, went home")])
def test_a_later_label_file_with_an_unknown_name_is_refused(world, capsys, kind, change, message):
    run = f"later-{kind}"
    assert finetuned_on(world, world / f"{kind}.csv", *OPTIONS[kind], run=run) == 0
    capsys.readouterr()
    later = ["--checkpoint", str(world / run / "best.pt"), "--data_dir", str(world / "data")]
    one_error_line(capsys, main([*later, "--label_file", changed_labels(world, kind, change)]), message)
    other = "number" if kind == "classes" else "classes"
    one_error_line(capsys, main([*later, "--label_file", str(world / f"{other}.csv"), *OPTIONS[other]]),
                   f"its labels are of the kind {other}, where the checkpoint answers {kind}")


def test_figures_of_an_outcome_or_a_cause_are_called_in_english(scored, capsys):
    assert main(["--checkpoint", scored.path]) == 0
    printed = capsys.readouterr().out
    for name in {"several": ["AUROC of well off", "AUPRC of ill"], "classes": ["log loss"], "number": ["its width"],
                 "event": ["concordance of died", "integrated Brier score of went home"]}[scored.kind]:
        assert name in printed
    assert not any(f"{measure}_" in printed.split("Scored:")[1] for measure in ("auc", "concordance", "brier"))
