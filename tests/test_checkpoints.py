"""Tests of checkpoint.py: files are opened, checked, upgraded, saved, exported; ours, the original implementation's, under any prefix, never half loaded."""

import io

import numpy as np
import pandas as pd
import pytest
import torch

import train
from batches import Normalizer, StayDataset
from data import InputError, build_cohort
from checkpoint import Checkpoint
from model import SeqSetVAE, SeqSetVAEPretrain
from predictor import Predictor
from test_suite import main
from tests.plain_loop import close
from tests.tiny import FINETUNE, PLAIN, PRETRAIN, SHARED, build, one_error_line, tiny, write

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: any wrapper, nothing missing in silence, the original's outputs
# ----------------------------------------------------------------------------------------------------------------------

EMPTY = {"train": [], "valid": [], "test": []}
SOURCE = {"data": {}, "fingerprint": "", "command": "", "versions": {}, "seed": 0}


@pytest.mark.parametrize("container", ["ours", "bare", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_pretrained_backbone_loads_whole_behind_any_prefix(tmp_path, prefix, container):
    model, classifier = build(SeqSetVAEPretrain, tiny()), build(SeqSetVAE, tiny(), seed=2)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    if container == "ours":
        Checkpoint(None, "pretrain", model.config, state, model.setvae.vocabulary, PLAIN, EMPTY, EMPTY, SOURCE,
                   {"epoch": 1}).save(tmp_path / "some.pt")
    else:
        torch.save(state if container == "bare" else {"state_dict": state}, tmp_path / "some.pt")
    report = Checkpoint.open(tmp_path / "some.pt").backbone_into(classifier)
    assert report.complete and not report.unexpected and report.skipped == ["mask_token"]
    for name, tensor in classifier.state_dict().items():
        if name.startswith(SeqSetVAE.BACKBONE):
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_missing_backbone_tensor_stops_finetuning_unless_allowed(tmp_path, capsys, pretrained):
    content = torch.load(pretrained, weights_only=True)
    del content["model"]["history.tau"]
    content["model"]["setvae.embed.0.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "partial.pt")
    capsys.readouterr()
    command = [*FINETUNE, str(tmp_path / "partial.pt"), "--run_dir", str(tmp_path / "run")]
    assert train.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "history.tau" in error
    assert "setvae.embed.0.bias" in error
    assert train.main([*command, "--allow_partial"]) == 0


def fixture_of_the_original(name):
    """A checkpoint of the original implementation on the data of its expected outputs, these outputs, and its five
    sets as a batch. Every event is a variable of its own, because the original takes a vector an event."""
    path = SHARED / "fixtures" / f"{name}.ckpt"
    if not path.exists():
        pytest.skip(f"{path} is absent: compatibility with the original implementation was not tried")
    expected = {key: torch.from_numpy(x) for key, x in np.load(path.with_name(f"{name}_expected.npz")).items()}
    vectors, values = (torch.cat([expected[f"{kind}_{i}"] for i in range(5)]) for kind in ("var", "val"))
    minutes = expected["minutes"].double().numpy()
    names = [f"event {i:05d}" for i in range(len(values))]
    sizes = [len(expected[f"val_{i}"]) for i in range(5)]
    cohort = build_cohort("fixture", names, np.zeros(len(values), int), np.repeat(minutes, sizes),
                          np.arange(len(values)), values, ["stay"], [0],
                          vectors=pd.DataFrame(vectors.numpy(), index=names))
    plain = Normalizer(names, *(np.full(len(values), x, np.float32) for x in (0, 1, 0)), clip=np.inf)
    batch = StayDataset(cohort, plain, points=True)[np.array([0])]
    return Checkpoint.open(path).completed(cohort, np.array([0])), expected, batch


def test_an_original_pretraining_checkpoint_gives_its_outputs():
    checkpoint, expected, batch = fixture_of_the_original("original_small")
    model = SeqSetVAE(checkpoint.config, checkpoint.vocabulary).eval()
    report = checkpoint.backbone_into(model)
    assert report.complete and not report.unexpected
    with torch.no_grad():
        mu, logvar = model.setvae.encode(batch)
        h = model.history(mu, batch.minute)
    for mine, name in ((mu, "mu"), (logvar, "logvar"), (h, "h")):
        close(mine[0, :5], expected[name])


def test_an_original_finetuned_checkpoint_gives_its_features_and_logits():
    checkpoint, expected, batch = fixture_of_the_original("original_finetuned_small")
    model = checkpoint.classifier()
    with torch.no_grad():
        close(model.features(batch)[0, 0], expected["features"].squeeze())
        close(model(batch)[0, 0], expected["logits"].squeeze())


def test_an_original_checkpoint_alone_cannot_answer():
    path = SHARED / "fixtures" / "original_finetuned_small.ckpt"
    if not path.exists():
        pytest.skip(f"{path} is absent: compatibility with the original implementation was not tried")
    with pytest.raises(InputError, match="original_finetuned_small.ckpt: .* needs its data at hand"):
        Predictor(path, "cpu")


def test_features_that_an_earlier_version_recorded_when_pretraining_say_nothing(tmp_path, small_pretrained, capsys):
    content = torch.load(small_pretrained / "best.pt")
    content["model_config"]["features"] = "beliefs"
    torch.save(content, tmp_path / "old.pt")
    for name, path in (("new", small_pretrained / "best.pt"), ("old", tmp_path / "old.pt")):
        assert train.main([*FINETUNE, str(path), "--set", "trees=none", "--run_dir", str(tmp_path / name)]) == 0
    new, old = (torch.load(tmp_path / name / "best.pt") for name in ("new", "old"))
    assert all(torch.equal(new["model"][name], old["model"][name]) for name in new["model"] | old["model"])
    one_error_line(capsys, train.main([*FINETUNE, str(tmp_path / "old.pt"), "--set", "features=readout"]),
                   "stable or multiscale")


# ----------------------------------------------------------------------------------------------------------------------
# What a checkpoint was trained with comes along
# ----------------------------------------------------------------------------------------------------------------------

def table(folder, names=lambda name: name, factor=1., labels=("1", "0"), minute=None, first=0):
    """A long table of forty stays of three variables, whose first one tells the label."""
    rng = np.random.default_rng(first)
    events, told = ["stay_id,minute,variable,value"], ["stay_id,label" + ",hour" * (minute is not None)]
    for i in range(first, first + 40):
        for hour in range(6):
            for name, value in (("HR", 80 + 20 * (i % 2) + rng.normal()), ("pH", 7 + rng.normal()), ("K", 4.)):
                events.append(f"s{i},{60 * hour},{names(name)},{value / factor}")
        told.append(f"s{i},{labels[1 - i % 2]}" + (f",{minute / 60}" if minute is not None else ""))
    write(folder / "events.csv", "\n".join(events) + "\n")
    write(folder / "labels.csv", "\n".join(told) + "\n")
    return folder


@pytest.fixture
def mapped(tmp_path, small_models):
    """best.pt of a run on a table in other names and units, with words for labels; the map's file is gone."""
    data = table(tmp_path / "data", lambda name: f"their {name}", 4., ("dead", "alive"))
    names = write(tmp_path / "map.csv", "source,name,factor\n" + "".join(f"their {n},{n},4\n" for n in ("HR", "pH", "K")))
    words = ["--data_dir", str(data), "--variables", str(names), "--positive", "dead"]
    assert train.main([*PRETRAIN, *words, "--run_dir", str(tmp_path / "pre")]) == 0
    names.unlink()
    assert train.main([*FINETUNE, str(tmp_path / "pre/best.pt"), "--run_dir", str(tmp_path / "fine")]) == 0
    return tmp_path / "fine" / "best.pt"


def test_names_units_and_the_positive_word_are_kept_and_applied_to_other_data(tmp_path, capsys, monkeypatch, mapped):
    kept = Checkpoint.open(mapped)
    assert kept.maps == {"variables": {f"their {n}": (n, 4., 0.) for n in ("HR", "pH", "K")}, "positive": "dead"}
    assert kept.normalizer.variables == ["HR", "K", "pH"]
    kept.export(tmp_path / "given.pt")
    assert Checkpoint.open(tmp_path / "given.pt").maps == kept.maps
    other = table(tmp_path / "other", lambda name: f"their {name}", 4., ("dead", "alive"), first=100)
    plain = table(tmp_path / "plain", first=100)

    def scored(checkpoint, folder, *words):
        capsys.readouterr()
        code = main(["--checkpoint", str(checkpoint), "--data_dir", str(folder), "--predictions", str(tmp_path / "p.csv"),
                     "--device", "cpu", *words])
        return code, capsys.readouterr(), pd.read_csv(tmp_path / "p.csv") if code == 0 else None

    code, (out, _), theirs = scored(mapped, other)
    assert code == 0 and "kept from --variables: their HR as HR, their pH as pH, their K as K (--variables none" in out
    assert "kept from --positive: dead" in out and theirs["label"].tolist() == [0, 1] * 20
    code, (out, _), mine = scored(tmp_path / "given.pt", plain)     # which needs no map
    assert code == 0 and "labels that are 0 and 1, where the word dead is not looked for" in out
    np.testing.assert_allclose(mine["probability"], theirs["probability"], atol=1e-6)
    code, (_, error), _ = scored(mapped, other, "--variables", "none")
    assert code == 2 and "its vocabulary holds none of the data's variables" in error
    swapped = write(tmp_path / "swapped.csv", "source,name,factor\ntheir HR,pH,.1\n")
    _, (out, _), replaced = scored(mapped, other, "--variables", str(swapped))
    assert "kept from --variables" not in out and not np.allclose(replaced["probability"], theirs["probability"])

    predictor = Predictor(mapped, "cpu")
    with pytest.warns(UserWarning, match="renamed or rescaled"):
        told = predictor.predict(pd.read_csv(other / "events.csv"))
    np.testing.assert_allclose(told["probability"], theirs["probability"], atol=1e-6)
    for words, answered in (([], True), (["--variables", "none"], False)):
        monkeypatch.setattr("sys.stdin", io.StringIO("s,0,their HR,20\n"))
        assert main(["--checkpoint", str(mapped), "--follow", *words]) == 0
        out, error = capsys.readouterr()
        assert (out != "s,0,\n") == answered == ("kept from --variables" in error)


@pytest.mark.parametrize("asked", [["--hours", "2"], []])
def test_a_question_at_one_hour_is_kept_and_asked_of_later_stays(tmp_path, capsys, small_models, asked):
    """Learned with --hours or from labels at one hour."""
    data = table(tmp_path / "data", minute=None if asked else 120)
    assert train.main([*PRETRAIN, "--data_dir", str(data), "--run_dir", str(tmp_path / "pre")]) == 0
    assert train.main([*FINETUNE, str(tmp_path / "pre/best.pt"), *asked, "--run_dir", str(tmp_path / "fine")]) == 0
    path, other = tmp_path / "fine" / "best.pt", table(tmp_path / "other", first=100)
    assert Checkpoint.open(path).asked_at == 2
    minutes = {}
    for name, words in (("kept", []), ("0", ["--hours", "0"]), ("3", ["--hours", "3"]), ("end", ["--hours", "end"])):
        capsys.readouterr()
        assert main(["--checkpoint", str(path), "--data_dir", str(other), *words, "--predictions",
                     str(tmp_path / "p.csv")]) == 0
        minutes[name], out = set(pd.read_csv(tmp_path / "p.csv")["minute"]), capsys.readouterr().out
        assert ("asked 2 hours after admission" in out) == (name == "kept")
        assert ("its training questions lie at hour 2; asked now: " in out) == (name != "kept")
    assert minutes == {"kept": {120}, "0": {0}, "3": {180}, "end": {300}}
    events = pd.read_csv(other / "events.csv")
    assert set(Predictor(path, "cpu").predict(events)["minute"]) == {120}
    late = table(tmp_path / "late", minute=240, first=100)                 # its labels have times of their own
    assert main(["--checkpoint", str(path), "--data_dir", str(late), "--predictions", str(tmp_path / "p.csv")]) == 0
    assert set(pd.read_csv(tmp_path / "p.csv")["minute"]) == {240}


def test_a_checkpoint_of_format_2_is_upgraded_and_its_last_pt_refused(tmp_path, capsys, small_finetuned):
    content = torch.load(small_finetuned, weights_only=True)
    assert content["format"] == 3
    old = {name: value for name, value in content.items() if name not in ("maps", "asked_at", "task")} | {"format": 2}
    old["source"] = old["source"] | {"data": {"hours": 6.0}}
    torch.save(old, tmp_path / "old.pt")
    upgraded = Checkpoint.open(tmp_path / "old.pt")
    assert upgraded.asked_at == 6 and upgraded.maps is None
    upgraded.save(tmp_path / "new.pt")
    again = Checkpoint.open(tmp_path / "new.pt")
    assert again.asked_at == 6 and all(torch.equal(again.weights[name], x) for name, x in content["model"].items())
    torch.save(old | {"trainer": {}}, tmp_path / "last.pt")
    one_error_line(capsys, train.main(["--mode", "finetune", "--resume", str(tmp_path)]), "commit 96d43df resumes it")
