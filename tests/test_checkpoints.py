"""Tests of checkpoint loading in model.py: ours, the original implementation's, under any prefix, never half loaded."""

import numpy as np
import pytest
import torch

import train
from batches import StayDataset
from checkpoint import (_CHECKPOINT_ENTRIES, _CHECKPOINT_TYPES, checkpoint_config, checkpoint_state,
                        load_backbone, load_checkpoint_weights, read_checkpoint)
from data import Normalizer, build_cohort
from model import SeqSetVAE, SeqSetVAEPretrain
from tests.plain_loop import close
from tests.tiny import FINETUNE, SHARED, build, one_error_line, tiny

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: any wrapper, nothing missing in silence, the original's outputs
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("container", ["ours", "bare", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_pretrained_backbone_loads_whole_behind_any_prefix(tmp_path, prefix, container):
    model, classifier = build(SeqSetVAEPretrain, tiny()), build(SeqSetVAE, tiny(), seed=2)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    rest = {name: dict.fromkeys(_CHECKPOINT_ENTRIES.get(name, ())) if kind is dict else kind()
            for name, kind in _CHECKPOINT_TYPES.items()}
    torch.save({"ours": rest | {"format": 2, "model": state}, "bare": state,
                "state_dict": {"state_dict": state}}[container], tmp_path / "some.pt")
    report = load_backbone(classifier, load_checkpoint_weights(tmp_path / "some.pt"))
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
    """(content of a checkpoint of the original implementation, its expected outputs, its five sets as a batch, their
    vectors, the path). Every event is a variable of its own, because the original takes a vector an event."""
    path = SHARED / "fixtures" / f"{name}.ckpt"
    if not path.exists():
        pytest.skip(f"{path} is absent: compatibility with the original implementation was not tried")
    expected = {key: torch.from_numpy(x) for key, x in np.load(path.with_name(f"{name}_expected.npz")).items()}
    vectors, values = (torch.cat([expected[f"{kind}_{i}"] for i in range(5)]) for kind in ("var", "val"))
    minutes = expected["minutes"].double().numpy()
    names = [f"event {i:05d}" for i in range(len(values))]
    sizes = [len(expected[f"val_{i}"]) for i in range(5)]
    cohort = build_cohort("fixture", names, np.zeros(len(values), int), np.repeat(minutes, sizes),
                          np.arange(len(values)), values, ["stay"], [0])
    plain = Normalizer(names, *(np.full(len(values), x, np.float32) for x in (0, 1, 0)), clip=np.inf)
    batch = StayDataset(cohort, plain, points=True)[np.array([0])]
    return read_checkpoint(path), expected, batch, vectors, path


def test_an_original_pretraining_checkpoint_gives_its_outputs():
    content, expected, batch, vectors, path = fixture_of_the_original("original_small")
    model = SeqSetVAE(checkpoint_config(content, len(vectors), path), vectors).eval()
    report = load_backbone(model, checkpoint_state(content, path))
    assert report.complete and not report.unexpected
    with torch.no_grad():
        mu, logvar = model.setvae.encode(batch)
        h = model.history(mu, batch.minute)
    for mine, name in ((mu, "mu"), (logvar, "logvar"), (h, "h")):
        close(mine[0, :5], expected[name])


def test_an_original_finetuned_checkpoint_gives_its_features_and_logits():
    content, expected, batch, vectors, path = fixture_of_the_original("original_finetuned_small")
    model = SeqSetVAE(checkpoint_config(content, len(vectors), path), vectors).eval()
    state = checkpoint_state(content, path)
    report = load_backbone(model, state)
    assert report.complete and not report.unexpected
    model.cls_head.load_state_dict({name.removeprefix("cls_head."): x
                                    for name, x in state.items() if name.startswith("cls_head.")})
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
