"""Tests of transfer.py: a new hospital begins with old weights."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import site_benchmark
import test_suite
import train
import transfer
from batches import variable_vectors
from checkpoint import Checkpoint
from data import stays_of
from finetune_config import FinetuneConfig
from metrics import logit, recalibration
from model import SeqSetVAE
from predictor import CPU, Predictor, open_checkpoint
from questions import labelled_points
from readers import synthetic_cohort, write_long_table
from readouts import VariableKeys
from runs import answers_at, encode_points
from tests.tiny import FINETUNE, PRETRAIN, SHORT, make_small, one_error_line
from transfer import SitePoints, adapted, build_in, correct


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Folders of one site's 250 stays with all their labels, without any, with one class, with few of one."""
    home, cohort = tmp_path_factory.mktemp("sites"), synthetic_cohort(250, seed=7)
    table = pd.DataFrame({"stay_id": cohort.stay_id, "label": cohort.stay_label})
    few = pd.concat([table[table["label"] == 1][:4], table[table["label"] == 0]])
    tables = {"all": table, "none": None, "one class": table[table["label"] == 0], "few": few}
    for name, labels in tables.items():
        write_long_table(home / name, cohort, labels=False)
        if labels is not None:
            labels.to_csv(home / name / "labels.csv", index=False)
    return {name: str(home / name) for name in tables}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """best.pt of a tiny model that has learned something of another hospital."""
    home = tmp_path_factory.mktemp("old")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        size = ["--synthetic_stays", "300"]
        assert train.main([*PRETRAIN, *size, "--run_dir", str(home / "pretrain")]) == 0
        assert train.main([*FINETUNE, str(home / "pretrain" / "best.pt"), "--max_epochs", "20", "--set", "trees=20",
                           "--run_dir", str(home / "finetune")]) == 0
    return home / "finetune" / "best.pt"


def begin(checkpoint, site, run, *options) -> Checkpoint:
    """The checkpoint of a run that begins at this site with another one."""
    assert train.main([*FINETUNE, str(checkpoint), "--data_dir", site, "--run_dir", str(run), *options]) == 0
    return Checkpoint.open(run / "best.pt")


def log_odds(checkpoint, cohort) -> np.ndarray:
    return logit(Predictor(checkpoint, "cpu").predict(cohort)["probability"].to_numpy())


COHORT = synthetic_cohort(250, seed=7)


@pytest.mark.parametrize("site, said", [("none", "no label at all"), ("one class", "one class only")])
def test_without_different_labels_the_old_head_answers_as_it_did_to_the_bit(sites, old, tmp_path, capsys,
                                                                           site, said):
    new, before = begin(old, sites[site], tmp_path / "run"), Checkpoint.open(old)
    assert f"old head: unchanged, as the labelled stays hold {said}" in capsys.readouterr().out
    assert new.weights.keys() == before.weights.keys()
    assert all(torch.equal(weight, before.weights[name]) for name, weight in new.weights.items())
    assert new.metrics["threshold"] == before.metrics["threshold"]


def test_below_ten_positives_the_intercept_alone_is_learned(sites, old, tmp_path, capsys):
    new, before = begin(old, sites["few"], tmp_path / "run"), Checkpoint.open(old)
    assert "below 10 the intercept alone is learned" in capsys.readouterr().out
    moved = log_odds(new, COHORT) - log_odds(before, COHORT)
    assert np.ptp(moved) < 1e-4 < abs(moved[0]) and new.metrics["threshold"] == before.metrics["threshold"]


def test_stays_that_the_old_head_has_seen_and_settings_that_it_does_not_heed_are_named(
        sites, old, tmp_path, capsys):
    first = begin(old, sites["all"], tmp_path / "run", "--set", "trees=7", "--set", "negatives=9", "--site", "B")
    printed = capsys.readouterr().out
    assert "old head: its correction has no use for max_epochs, trees; --head new has" in printed
    assert "warning" not in printed and "labels of train and valid stays, whose figures follow" in printed
    known = len(first.split["train"]) + len(first.split["valid"])
    begin(first.path, sites["all"], tmp_path / "again", "--recalibrate", "--site", "B")
    assert f"of these {known} labelled stays {known} are of patients that" in capsys.readouterr().out
    config = str(tmp_path / "run" / "config.json")
    assert train.main(["--config", config, "--run_dir", str(tmp_path / "same"), "--max_epochs", "2"]) == 0
    assert "no use for max_epochs, max_trainable_ratio, trees;" in capsys.readouterr().out  # the second of `small`


def test_an_old_head_that_knows_no_variable_of_the_site_is_refused(old, tmp_path, capsys):
    other = replace(COHORT, variables=[f"new {name}" for name in COHORT.variables])
    write_long_table(tmp_path / "site", other)
    words = [*FINETUNE, str(old), "--data_dir", str(tmp_path / "site"), "--adapt", "--run_dir"]
    one_error_line(capsys, train.main([*words, str(tmp_path / "run")]), "holds none of the data's variables")
    assert train.main([*words, str(tmp_path / "run"), "--head", "new"]) == 0


@pytest.mark.parametrize("options, named", [
    (["--site", "B\n"], r"--site 'B\n': give a name"), (["--site", " B"], "--site ' B': give a name"),
    (["--adapt", "--split", "test.csv"], "the split has no training stays")])
def test_a_site_of_an_odd_name_and_adapting_to_nobody_are_refused(sites, old, tmp_path, capsys, monkeypatch,
                                                                  options, named):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"stay_id": COHORT.stay_id, "split": "test"}).to_csv("test.csv", index=False)
    words = [*FINETUNE, str(old), "--data_dir", sites["all"], "--run_dir", "run", "--site", "B", *options]
    one_error_line(capsys, train.main(words), named)


def test_recalibration_restores_slope_and_intercept_and_keeps_the_order(sites, old, tmp_path):
    new = begin(old, sites["all"], tmp_path / "run", "--recalibrate")
    used = np.isin(COHORT.stay_id, new.split["train"] + new.split["valid"])
    after, before = (log_odds(checkpoint, COHORT) for checkpoint in (new, old))
    label, one = COHORT.stay_label[used], np.ones(used.sum())
    slope, intercept = recalibration(label, 1 / (1 + np.exp(-before[used])), one)
    assert abs(slope - 1) > .05 or abs(intercept) > .05
    np.testing.assert_allclose(recalibration(label, 1 / (1 + np.exp(-after[used])), one), (1, 0), atol=.01)
    np.testing.assert_allclose(after, slope * before + intercept, atol=.01)


def test_few_labels_move_the_head_as_far_as_its_prior_lets_them(sites, old):
    """A prior ten thousand times as strong as that of a new head leaves slope and intercept alone; a weak one fits the
    points better. What was found is built into the weights exactly, the trees' too."""
    checkpoint, cohort = open_checkpoint(old, {"data_dir": sites["all"]})
    model, dataset = checkpoint.classifier(), checkpoint.dataset(cohort)
    index, config = labelled_points(cohort, np.arange(len(cohort))), FinetuneConfig()
    features = encode_points(model, dataset, index, CPU)
    points = SitePoints.of_features(model, features, cohort, index, np.ones(len(index)))
    assert model.trees is not None and 0 < model.trees_share < 1

    def found(strength):
        return correct(model, config, points, strength)

    def loss(correction):
        return model.task.loss(correction(points), points.answer, config).item()
    strong, weak, fixed = found(1e4), found(.1), found(math.inf)
    np.testing.assert_allclose(strong(points), fixed(points), atol=2e-3)
    assert not fixed.change.any() and loss(weak) < loss(fixed) - .02
    build_in(model, weak)
    expected = model.task.answer(weak(points))
    np.testing.assert_allclose(answers_at(model, dataset, index, CPU), expected, atol=1e-5)


def test_cross_validation_chooses_how_far_the_head_moves(sites, old, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transfer, "STRENGTHS", (.1,))
    new, before = begin(old, sites["all"], tmp_path / "run"), Checkpoint.open(old)
    printed = capsys.readouterr().out
    assert "old head: loss in five-fold cross-validation: intercept 0." in printed and "; chosen: " in printed
    changed = {name for name, weight in new.weights.items() if not torch.equal(weight, before.weights[name])}
    assert changed <= {"cls_head.0.weight", "cls_head.0.bias", "trees.value", "trees.prior"} and changed
    assert new.task == before.task and new.normalizer.variables == before.normalizer.variables


def test_a_finetuned_checkpoint_can_also_begin_with_a_new_head_or_train_everything(sites, old, tmp_path):
    before = Checkpoint.open(old)
    for run, options in (("new", ["--head", "new"]), ("full", ["--full_training"])):
        new = begin(old, sites["all"], tmp_path / run, *options)
        frozen = torch.equal(new.weights["setvae.embed.0.weight"], before.weights["setvae.embed.0.weight"])
        assert frozen == (run == "new") and new.split["test"]
    begin(tmp_path / "full" / "best.pt", sites["all"], tmp_path / "again")  # a fully trained one keeps its head too
    begin(tmp_path / "full" / "best.pt", sites["all"], tmp_path / "anew", "--head", "new")


@pytest.mark.parametrize("options, named", [
    (["--head", "old", "--full_training"], "--head old: does not go with --full_training"),
    (["--recalibrate", "--random_init"], "--recalibrate: does not go with --random_init"),
    (["--recalibrate", "--head", "new"], "--recalibrate: corrects the old head"),
    (["--head", "old", "--kind", "number"], "answers binary (label), the labels are number (label)"),
    (["--recalibrate", "--kind", "number"], "--head new learns these")])
def test_what_the_old_head_cannot_be_is_one_line(sites, old, tmp_path, capsys, options, named):
    words = [*FINETUNE, str(old), "--data_dir", sites["none"], "--run_dir", str(tmp_path / "run")]
    labels = pd.DataFrame({"stay_id": COHORT.stay_id, "label": np.arange(250)})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    words += ["--label_file", str(tmp_path / "labels.csv")] if "--kind" in options else []
    one_error_line(capsys, train.main([*words, *options]), named)
    assert not (tmp_path / "run").exists()


def test_labels_that_the_old_head_does_not_answer_begin_a_new_one_with_a_line(sites, old, tmp_path, capsys):
    labels = pd.DataFrame({"stay_id": COHORT.stay_id, "label": np.arange(250)})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    new = begin(old, sites["none"], tmp_path / "run", "--label_file", str(tmp_path / "labels.csv"), "--kind", "number")
    assert f"head: a new one, as {old} does not answer what the labels ask" in capsys.readouterr().out
    assert new.task["kind"] == "number"


def test_the_old_head_is_that_of_a_finetuned_checkpoint_and_recalibration_needs_both_classes(
        sites, old, tmp_path, capsys):
    pretrained = old.parent.parent / "pretrain" / "best.pt"
    words = ["--data_dir", sites["one class"], "--run_dir", str(tmp_path / "run")]
    one_error_line(capsys, train.main([*FINETUNE, str(pretrained), "--head", "old", *words]), "has no head")
    one_error_line(capsys, train.main([*FINETUNE, str(old), "--recalibrate", *words]),
                   "train and valid stays hold one class only")


# ----------------------------------------------------------------------------------------------------------------------
# Who was trained on, at which site
# ----------------------------------------------------------------------------------------------------------------------

def test_the_guard_knows_the_patients_of_both_sites_and_keeps_equal_ids_of_other_sites_apart(sites, old, tmp_path):
    """The old hospital's ids are bare; the new one's are of the site B, in an export too."""
    before = Checkpoint.open(old)
    new = begin(old, sites["all"], tmp_path / "run", "--site", "B")
    new.export(tmp_path / "export.pt")
    for path in (tmp_path / "run" / "best.pt", tmp_path / "export.pt"):
        for site, part_of in (("", before.split), ("B", new.split), ("C", {})):
            other = replace(COHORT, fingerprint="other", site=site)
            ids = part_of.get("train", []) + part_of.get("valid", [])
            stays = np.array([*ids, "nobody"] if ids else COHORT.stay_id)
            other = replace(other, stay_id=stays, subject=stays)
            part = Checkpoint.open(path).recognising(other).known_part(other)
            assert (np.isin(part, (0, 1)) == np.isin(stays, ids)).all()


def test_who_forgets_the_site_tests_nobody_that_was_trained_on_there(sites, old, tmp_path, capsys):
    new = begin(old, sites["all"], tmp_path / "run", "--site", "B")
    new.export(tmp_path / "export.pt")
    for path in (tmp_path / "run" / "best.pt", tmp_path / "export.pt"):
        other = replace(COHORT, fingerprint="other")
        part = Checkpoint.open(path).recognising(other).known_part(other)
        trained = np.isin(COHORT.stay_id, new.split["train"] + new.split["valid"])
        assert np.isin(part[trained], (0, 1)).all()
    open_checkpoint(new.path, {"data_dir": sites["all"]})
    assert "of the sites B; without --site equal ids of these data are taken for theirs" in capsys.readouterr().out


def test_a_split_that_tests_who_the_old_hospital_trained_on_is_refused(sites, old, tmp_path, capsys):
    """The site's ids are those of the old hospital, which a name for the site tells apart."""
    ids = Checkpoint.open(old).split["train"][:50]
    cohort = synthetic_cohort(50, seed=8)
    write_long_table(tmp_path / "site", replace(cohort, stay_id=np.array(ids)))
    pd.DataFrame({"stay_id": ids, "split": ["train", "valid", "test", "train", "test"] * 10}).to_csv(
        tmp_path / "split.csv", index=False)
    words = [*FINETUNE, str(old), "--data_dir", str(tmp_path / "site"), "--split", str(tmp_path / "split.csv"),
             "--run_dir", str(tmp_path / "run")]
    one_error_line(capsys, train.main(words), "the split tests 20 subjects")
    assert train.main([*words, "--site", "B"]) == 0


# ----------------------------------------------------------------------------------------------------------------------
# The scale and the variables of a site
# ----------------------------------------------------------------------------------------------------------------------

def test_adapting_to_a_site_in_other_units_gives_the_predictions_of_the_old_units(old, tmp_path):
    """A copy of the checkpoint's own training stays: every variable that is measured often times 1000, and shifted
    where its scale is not logarithmic."""
    checkpoint, cohort = Checkpoint.open(old), synthetic_cohort(300)
    stays, scale = stays_of(cohort, checkpoint.split["train"]), checkpoint.normalizer
    same, done = adapted(checkpoint, cohort, stays)
    np.testing.assert_array_equal(same.normalizer.mean, scale.mean)
    place = np.array([scale.variables.index(name) for name in cohort.variables])[cohort.event_variable]
    often = np.isin(np.array(scale.variables)[place], done["rescaled"])
    shift = np.where(scale.log_scale[place] == 0, 50, 0)
    value = np.where(often, 1000. * cohort.event_value + shift, cohort.event_value)
    other = replace(cohort, event_value=value.astype(np.float32))
    new, again = adapted(checkpoint, other, stays)
    assert again == done and len(done["rescaled"]) > 20 and not done["joined"]
    np.testing.assert_allclose(*(Predictor(made, "cpu").predict(asked)["probability"] for made, asked in
                                 ((checkpoint, cohort), (new, other))), atol=1e-4)


def test_new_variables_join_behind_the_old_ones_which_keep_their_weights_to_the_bit(sites, old, tmp_path):
    checkpoint, (known, size) = Checkpoint.open(old), Checkpoint.open(old).vocabulary.shape
    renamed = {name: f"new {name}" for name in ("HR", "Lactate", "GCS")}
    cohort = replace(COHORT, variables=[renamed.get(name, name) for name in COHORT.variables])
    write_long_table(tmp_path / "site", cohort)
    new = begin(old, str(tmp_path / "site"), tmp_path / "run", "--adapt", "--head", "old")
    names = sorted(renamed.values())
    assert new.normalizer.variables == checkpoint.normalizer.variables + names
    assert torch.equal(new.vocabulary, torch.cat([checkpoint.vocabulary, variable_vectors(names, size)]))
    assert new.source["adapted"]["joined"] == names and {*new.source["adapted"]["lacking"]} == renamed.keys()
    assert new.config.num_variables == known + 3
    for name, weight in checkpoint.weights.items():
        if name.startswith(SeqSetVAE.BACKBONE) or name in ("head_variables", "feature_mean"):
            assert torch.equal(new.weights[name][:len(weight)] if weight.dim() else new.weights[name], weight), name
    assert np.isfinite(log_odds(new, cohort)).all()


@pytest.mark.parametrize("key_dim", [8, 45, 64])
def test_a_new_variable_begins_with_a_key_as_pretraining_begins_it(key_dim):
    """With a dimension of its own where one is left; else of length 1 in all, projection and free part."""
    begun = VariableKeys.begun(["a", "b"], 44, key_dim)
    length = begun.norm(dim=1)
    assert torch.equal(length, torch.zeros(2)) if key_dim == 8 else torch.allclose(length, torch.ones(2))
    if key_dim == 64:
        assert torch.equal(begun, torch.eye(64)[44:46])


def test_pretraining_goes_on_from_an_exported_finetuned_checkpoint_on_stays_without_labels(sites, old, tmp_path,
                                                                                          capsys):
    Checkpoint.open(old).export(tmp_path / "old.pt")
    words = ["--mode", "pretrain", *SHORT, "--data_dir", sites["none"], "--pretrained_ckpt", str(tmp_path / "old.pt")]
    assert train.main([*words, "--adapt", "--site", "B", "--run_dir", str(tmp_path / "on")]) == 0
    new, before = Checkpoint.open(tmp_path / "on" / "best.pt"), Checkpoint.open(old)
    assert new.mode == "pretrain" and new.source["adapted"]["rescaled"] and new.task is None
    assert {name.removeprefix("B\x1f") for name in new.subjects["train"]} >= {*new.split["train"]}
    assert len(new.subjects["train"]) == len(new.split["train"]) + len(before.subjects["train"])
    fresh = train.main([*words[:-2], "--run_dir", str(tmp_path / "fresh")])
    losses = [pd.read_csv(tmp_path / run / "metrics.csv")["loss"][0] for run in ("on", "fresh")]
    assert fresh == 0 and losses[0] < losses[1]
    begin(tmp_path / "on" / "best.pt", sites["all"], tmp_path / "head", "--site", "B")
    capsys.readouterr()
    one_error_line(capsys, train.main([*words, "--set", "latent_dim=32"]), "the pretrained checkpoint decides it")
    one_error_line(capsys, train.main([*words[:-2], "--adapt"]), "--adapt: fits an old checkpoint")


# ----------------------------------------------------------------------------------------------------------------------
# What old weights are worth to a new hospital
# ----------------------------------------------------------------------------------------------------------------------

def test_the_learning_curves_of_new_sites_keep_what_is_finished(tmp_path, monkeypatch, capsys):
    """Two sites by a variable; the draws hold at least two positives and no stay that is scored."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(site_benchmark, "LABELLED", (0, 40, 1000))
    monkeypatch.setattr(site_benchmark, "DRAWS", 1)
    monkeypatch.setattr(site_benchmark, "ENOUGH", 40)
    cohort = synthetic_cohort(200)
    write_long_table(tmp_path / "table", cohort)
    sexes = pd.DataFrame({"stay_id": cohort.stay_id, "minute": 0,
                          "variable": np.where(np.arange(200) % 2, "S=1", "S=2"), "value": ""})
    sexes.to_csv(tmp_path / "table" / "events.csv", mode="a", header=False, index=False)
    words = ["--new_site", "sites", "--data_dir", "table", "--subgroups", "S"]
    for name, least in (("trees", 5), ("full_max_epochs", 1)):
        monkeypatch.setattr(train.finetune.__defaults__[0], name, least)
    monkeypatch.setattr(train, "epochs_of_steps", lambda *_, **__: 1)  # of pretraining
    assert test_suite.main(words) == 0
    printed = capsys.readouterr().out
    assert "40 labelled stays of the site" in printed and "fewer than 1,000, which is left out" in printed
    assert "| everything trained | 2 |" in printed and "difference to same head" in printed
    for home in (tmp_path / "sites").glob("S-*"):
        paths = sorted((home / "heads").glob("answers-*.csv"))
        assert [path.stem for path in paths] == ["answers-0-0", "answers-40-0"]
        tables = [pd.read_csv(path) for path in [*paths, *home.glob("everything trained 40 0/answers-40-0.csv")]]
        assert len(tables) == 3 and all(table[["stay_id", "label"]].equals(tables[0][["stay_id", "label"]])
                                        for table in tables)
        of_one = (home / "unlabelled").exists()
        assert of_one == (home.name == "S-1")
        arms = ("UNTOUCHED", "RECALIBRATED", "OLD_HEAD", "NEW_HEAD", "ALONE", *["GONE_ON"][:of_one])
        assert {*tables[1].columns[5:]} == {getattr(site_benchmark, name) for name in arms}
        for run in ("pretrain", "old", *["unlabelled"][:of_one], "everything trained 40 0", "from scratch 40 0"):
            known = Checkpoint.open(home / run / "best.pt").split
            assert not {*tables[0]["stay_id"].astype(str)} & {*known["train"], *known["valid"]}
        labelled = {*known["train"], *known["valid"]}
        positive = cohort.stay_id[cohort.stay_label == 1]
        assert len(labelled) == 40 and len(labelled & {*positive}) >= 2
    assert (tmp_path / "sites" / "new_site.png").stat().st_size > 10_000
    for name in ("pretrain", "finetune", "learn_heads"):
        monkeypatch.setattr(site_benchmark, name, lambda *_: pytest.fail("done again"))
    assert test_suite.main(words) == 0
    assert printed.endswith(capsys.readouterr().out)
    pd.read_csv("table/labels.csv").drop(index=0).to_csv("fewer.csv", index=False)
    one_error_line(capsys, test_suite.main([*words, "--label_file", "fewer.csv"]), "give another folder")
    one_error_line(capsys, test_suite.main(words[:2]), "--new_site needs --data_dir")
    one_error_line(capsys, test_suite.main([*words[:5], "nothing"]), "--subgroups nothing")


@pytest.mark.parametrize("positive, group, named", [
    (slice(0), "S=2", "S-1: of its 8 stays that are scored 0 are positive"),
    (slice(0, 40, 2), "S=2", "S-1: of its 8 stays that are scored 8 are positive"),
    (slice(0), "S=a/b", "the site S-a/b has a / in its name"),
    (slice(0, 40, 2), "S=1", "one group of stays")])
def test_sites_that_can_have_no_curve_are_one_line_before_anything_is_learned(
        tmp_path, monkeypatch, capsys, positive, group, named):
    monkeypatch.setattr(site_benchmark, "pretrain", lambda *_: pytest.fail("something was learned"))
    ids = np.arange(40)
    events = pd.DataFrame({"stay_id": ids, "minute": 0, "value": "",
                           "variable": np.where(ids % 2, group, "S=1")})
    events.to_csv(tmp_path / "events.csv", index=False)
    label = np.zeros(40, dtype=int)
    label[positive] = 1
    pd.DataFrame({"stay_id": ids, "label": label}).to_csv(tmp_path / "labels.csv", index=False)
    words = ["--new_site", str(tmp_path / "sites"), "--data_dir", str(tmp_path), "--subgroups", "S"]
    one_error_line(capsys, test_suite.main(words), named)
    one_error_line(capsys, test_suite.main([*words, "--checkpoint", "any.pt"]), "looks at no --checkpoint")
    assert not (tmp_path / "sites").exists()
