"""Tests of checkpoint.py: files are opened, checked, upgraded, saved, exported; ours, the original implementation's, under any prefix, never half loaded."""

import numpy as np
import pandas as pd
import pytest
import torch

import train
from batches import StayDataset
from checkpoint import Checkpoint
from data import Normalizer, build_cohort
from model import SeqSetVAE, SeqSetVAEPretrain
from tests.plain_loop import close
from tests.tiny import FINETUNE, PLAIN, SHARED, build, one_error_line, tiny

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
