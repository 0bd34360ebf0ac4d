"""Runs: settings and config.json, resuming, run folders, poor places. (Equal bits after a resume: test_train.py.)"""

import argparse
import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import runs
import train
from finetune_config import FinetuneConfig
from readers import synthetic_cohort, write_long_table
from tests.tiny import FINETUNE, PRETRAIN, one_error_line, same_run

MODES = ("pretrain", "head", "full training")
CODE = Path(train.__file__).resolve().parent


def settings_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


@pytest.fixture
def command(small_pretrained):
    """Of a mode: the words that start a short run."""
    words = [*FINETUNE, str(small_pretrained / "best.pt"), "--set", "trees=5"]
    return {"pretrain": [*PRETRAIN, "--max_epochs", "2"], "head": words, "full training": [*words, "--full_training"]}


# ----------------------------------------------------------------------------------------------------------------------
# Devices, as far as a CPU can show them
# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def cuda(monkeypatch):
    """A machine with a GPU as PyTorch describes it, and the calls that it would have had: name -> arguments."""
    calls = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    for module, name in ((torch.cuda, "set_device"), (torch.backends.cuda, "enable_cudnn_sdp"),
                         (torch.distributed, "init_process_group")):
        monkeypatch.setattr(module, name, lambda *a, name=name: calls.update({name: a}))
    return calls


@pytest.mark.parametrize("name, world, device", [("cuda:1", 1, "cuda:1"), ("auto", 4, "cuda:3"), ("auto", 1, "cuda")])
def test_the_chosen_gpu_becomes_the_current_one(cuda, monkeypatch, name, world, device):
    monkeypatch.setattr(runs, "WORLD", world)
    monkeypatch.setattr(runs, "LOCAL_RANK", 3)
    # emulated bf16 is slower than fp16
    assert runs.choose_device(name, "auto") == (torch.device(device), torch.float16)
    assert cuda.pop("enable_cudnn_sdp") == (False,)
    assert cuda == ({} if device == "cuda" else {"set_device": (torch.device(device),)})


@pytest.mark.parametrize("device, gpu, backend", [
    ("auto", True, "cpu:gloo,cuda:nccl"), ("cuda:1", True, "cpu:gloo,cuda:nccl"), ("cpu", True, "gloo"),
    ("auto", False, "gloo")])
def test_ranks_gather_objects_over_gloo(cuda, monkeypatch, device, gpu, backend):
    """NCCL would need each rank's GPU, which is not yet chosen where a run is resumed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    runs.join_ranks(device)
    assert cuda == {"init_process_group": (backend,)}


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, changes", zip(MODES, (
    ["betas=0.8,0.95", "hide_sets=0.3", "layers=1"], ["learned_prior=1", "head_widths=[5]", "learning_rate=1e-2"],
    ["full_learning_rate=1e-2", "full_drop_events=0.5", "fuse=false", "trees=none", "batch_size=8"])))
def test_config_json_fed_back_gives_equal_bits(tmp_path, command, mode, changes):
    once, again, other = (tmp_path / name for name in ("once", "again", "other"))
    changes = [word for change in changes for word in ("--set", change)]
    assert train.main([*command[mode], *changes, "--run_dir", str(once)]) == 0
    assert train.main(["--config", str(once / "config.json"), "--run_dir", str(again)]) == 0
    same_run(once, again)
    a, b = settings_of(once), settings_of(again)
    assert a == b

    plain = tmp_path / "plain"
    assert train.main([*command[mode], "--run_dir", str(plain)]) == 0
    assert (plain / "metrics.csv").read_text() != (once / "metrics.csv").read_text()  # the settings did something

    # The command line goes before the file, and what it says is recorded and fed back in its turn.
    assert train.main(["--config", str(once / "config.json"), "--seed", "3", "--split_seed", "0", "--set", "clip=0.25",
                       "--batch_size", "5", "--run_dir", str(other)]) == 0
    recorded = settings_of(other)["run"]
    name = "full_batch_size" if mode == "full training" else "batch_size"
    assert recorded["options"] == {**a["run"]["options"], "seed": 3, "split_seed": 0}
    assert recorded["settings"] == {**a["run"]["settings"], "clip": 0.25, name: 5}
    assert train.main(["--config", str(other / "config.json"), "--run_dir", str(tmp_path / "other again")]) == 0
    same_run(other, tmp_path / "other again")


def test_config_json_and_the_checkpoints_tell_all_settings_and_circumstances(small_pretrained):
    record = settings_of(small_pretrained)
    assert record["run"]["settings"] == json.loads(json.dumps(asdict(train.PretrainConfig(max_epochs=1))))
    assert record["model_config"]["latent_dim"] == 16 and record["model_config"]["num_variables"] == 44
    assert record["run"]["options"]["synthetic_stays"] == 24 and record["run"]["options"]["device"] == "cpu"
    source = record["source"]
    assert source["versions"]["torch"] == str(torch.__version__) and source["versions"]["numpy"] == np.__version__
    assert (source["device"], source["threads"], source["processes"]) == ("cpu", torch.get_num_threads(), 1)
    if (CODE / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "-C", CODE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert source["commit"] in (head, f"{head} + changes")
    for name in ("best.pt", "last.pt"):
        content = torch.load(small_pretrained / name, weights_only=True)
        assert json.loads(json.dumps({key: content[key] for key in record})) == record


def test_a_run_under_other_circumstances_says_so(tmp_path, small_pretrained, capsys):
    record = settings_of(small_pretrained)
    record["source"]["versions"]["torch"], record["source"]["threads"] = "0.4", 77
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert train.main(["--config", str(tmp_path / "config.json"), "--run_dir", str(tmp_path / "run")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("config:"))
    assert f"threads {torch.get_num_threads()} (then 77)" in line and "(then 0.4)" in line and "device" not in line


@pytest.mark.parametrize("words, named", [
    (["--set", "learning_rat=1"], "--set learning_rat: --mode pretrain has no such setting; near: learning_rate"),
    (["--set", "qwertyuiop=1"], "--set qwertyuiop: --mode pretrain has no such setting; see --help"),
    (["--set", "trees=3"], "--set trees: --mode pretrain has no such setting"),
    (["--set", "num_variables=3"], "--set num_variables: --mode pretrain has no such setting"),
    (["--set", "layers=two"], "layers is 'two'; it takes int, 1 to 256"),
    (["--set", "layers=1.5"], "layers is 1.5; it takes int"),
    (["--set", "layers"], "layers is ''; it takes int"),
    (["--set", "presence=1"], "presence is 1; it takes bool"),
    (["--set", "clip=True"], "clip is True; it takes float"),
    (["--set", "betas=0.9"], "betas is 0.9; it takes tuple"),
    (["--set", "betas={[]:1}"], "betas is '{[]:1}'; it takes tuple"),
    (["--set", "betas=0.9,1"], "betas is (0.9, 1)"),
    (["--set", "betas=('a','b')"], "betas is ('a', 'b')"),
    (["--set", "clip=-1"], "clip is -1"),
    (["--set", "clip=1e999"], "clip is inf"),
    (["--set", "learning_rate=1e300"], "learning_rate is 1e+300; it takes float, 0 to 1e+09"),
    (["--max_epochs", "1" + "0" * 400], "max_epochs is 1000"),
    (["--set", "warmup_steps=0"], "warmup_steps is 0"),
    (["--set", "decoder=none"], "decoder is 'none'; it takes readout or slots"),
    (["--set", "heads=5"], "no multiple of heads 5"),
    (["--label_fraction", "0.5"], "--label_fraction: no option of --mode pretrain"),
    (["--set", "betas=0.9,"], "betas is (0.9,); it takes tuple, 0 to 0.999999"),
    (["--set", "patience=-1"], "patience is -1; it takes int, 0 to 1e+09"),
    (["--set", "hide_sets=1.5"], "hide_sets is 1.5; it takes float, 0 to 1"),
    (["--config", "nowhere.json"], "--config nowhere.json"),
    (["--config", "README.md"], "--config README.md: no readable JSON file of a run"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_setting_that_is_none_is_one_line(tmp_path, capsys, monkeypatch, words, named):
    monkeypatch.chdir(CODE)
    one_error_line(capsys, train.main([*PRETRAIN, *words, "--run_dir", str(tmp_path / "run")]), named)
    assert not (tmp_path / "run").exists()


def test_a_setting_that_the_checkpoint_decides_is_refused_but_for_an_untrained_backbone(tmp_path, command, capsys):
    capsys.readouterr()
    words = [*command["head"], "--set", "latent_dim=32", "--set", "heads=2", "--run_dir", str(tmp_path / "run")]
    one_error_line(capsys, train.main(words), "--set latent_dim: the pretrained checkpoint decides it")
    one_error_line(capsys, train.main([*command["head"], "--objective", "original"]), "--objective: no option of")
    assert train.main([*words, "--random_init"]) == 0
    assert settings_of(tmp_path / "run")["model_config"]["latent_dim"] == 32


def test_a_config_json_of_an_older_version_is_read_and_what_is_no_setting_today_is_said(tmp_path, small_pretrained,
                                                                                        capsys):
    record = settings_of(small_pretrained)
    record["run"]["options"] |= {"hours": None, "label_fraction": 1.0, "shuffled": True}  # as earlier versions wrote them
    record["run"]["settings"] |= {"momentum": 0.9, "patience": 1}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert train.main(["--config", str(tmp_path / "config.json"), "--run_dir", str(tmp_path / "run")]) == 0
    assert "config: no longer a setting, and left out: shuffled, momentum\n" in capsys.readouterr().out
    again = settings_of(tmp_path / "run")["run"]
    assert again["settings"]["patience"] == 1 and "momentum" not in again["settings"] and "shuffled" not in again["options"]


def test_what_is_given_in_code_is_what_the_command_line_would_say(tmp_path, command):
    words = [*command["pretrain"], "--batch_size", "5", "--set", "betas=0.8,0.9", "--set", "layers=1"]
    said = train.run_settings(**vars(train.make_parser().parse_args(words)))
    given = train.run_settings(mode="pretrain", synthetic_stays=24, device="cpu", precision="fp32", batch_size=5,
                               max_epochs=2, changes={"betas": (0.8, 0.9), "layers": 1})
    assert said == given and said.changes == {"betas": (0.8, 0.9), "layers": 1, "batch_size": 5, "max_epochs": 2}


@pytest.mark.parametrize("damage", [
    lambda record: [], lambda record: record | {"run": {}}, lambda record: record | {"mode": "finetune"},
    lambda record: record | {"run": record["run"] | {"settings": {"clip": "much"}}}])
def test_a_damaged_config_json_is_one_line(tmp_path, small_pretrained, capsys, damage):
    (tmp_path / "config.json").write_text(json.dumps(damage(settings_of(small_pretrained))))
    capsys.readouterr()
    words = ["--mode", "pretrain", "--config", str(tmp_path / "config.json"), "--run_dir", str(tmp_path / "run")]
    one_error_line(capsys, train.main(words), "clip is 'much'" if "much" in damage.__code__.co_consts else tmp_path)


def test_help_groups_the_options_and_ends_with_two_examples():
    text = train.make_parser().format_help()
    places = [text.index(f"\n{group}") for group in ("data", "model:", "training:", "run:", "original implementation:",
                                                     "examples:")]
    assert places == sorted(places) and text.count("\n  python train.py --mode") == 2
    for line in text[places[-1]:].splitlines()[2:]:
        assert train.make_parser().parse_args(line.split("train.py ")[1].split())


# ----------------------------------------------------------------------------------------------------------------------
# Resuming: what is asked for is obeyed or refused
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, named", [
    (["--batch_size", "2"], "batch_size is 16 in this run and cannot become 2"), (["--seed", "1"], "seed is 0"),
    (["--set", "learning_rate=1"], "learning_rate is 0.0015"), (["--set", "latent_dim=32"], "latent_dim is 16"),
    (["--objective", "original"], "objective is readout"), (["--synthetic_stays", "30"], "synthetic_stays is 24"),
    (["--run_dir", "elsewhere"], "--run_dir elsewhere"), (["--mode", "finetune"], "last.pt: not the last.pt of a run"),
    (["--device", "cuda:99"], "--device cuda:99: not available here")])
def test_what_a_resumed_run_cannot_become_is_refused_by_name(small_pretrained, capsys, words, named):
    capsys.readouterr()
    one_error_line(capsys, train.main(["--resume", str(small_pretrained), *words]), named)
    assert train.main(["--resume", str(small_pretrained)]) == 0
    assert "nothing left to train: 1 epochs are done" in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_a_finished_run_goes_on_with_more_epochs(tmp_path, command, capsys, mode):
    run = tmp_path / "run"
    assert train.main([*command[mode], "--max_epochs", "1", "--run_dir", str(run)]) == 0
    first, before = pd.read_csv(run / "metrics.csv"), torch.load(run / "last.pt", weights_only=True)["model"]
    optimizer = torch.load(run / "last.pt", weights_only=True)["trainer"]["parts"]["optimizer"]
    reached = optimizer["param_groups"][0]["lr"]
    assert train.main(["--resume", str(run), "--max_epochs", "2"]) == 0
    told = re.findall("resume: the learning rate goes from (.*) to (.*): its cosine", capsys.readouterr().out)
    if mode == "pretrain":
        reached, rate = pd.read_csv(run / "metrics.csv")["learning_rate"]
    else:  # half of a cosine's way is done, as if the first epoch had been one of two
        rate = getattr(FinetuneConfig, "full_learning_rate" if mode == "full training" else "learning_rate") / 2
    assert told == [(f"{reached:.3g}", f"{rate:.3g}")]
    pd.testing.assert_frame_equal(pd.read_csv(run / "metrics.csv").head(1), first)
    assert len(pd.read_csv(run / "metrics.csv")) == 2
    after = torch.load(run / "last.pt", weights_only=True)["model"]
    assert any(not torch.equal(before[name], after[name]) for name in before)  # at a rate that is not zero
    name = "full_max_epochs" if mode == "full training" else "max_epochs"
    assert settings_of(run)["run"]["settings"][name] == 2
    assert train.main(["--resume", str(run)]) == 0 and "learning rate" not in capsys.readouterr().out
    assert train.main(["--resume", str(run), "--precision", "bf16", "--max_epochs", "3"]) == 0  # obeyed too, and said
    assert "resume: not as it was then: precision bf16 (then fp32)" in capsys.readouterr().out


def test_a_run_whose_data_have_moved_goes_on_where_they_lie_now(tmp_path, small_models, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_long_table(Path("mine"), synthetic_cohort(24), labels=True)
    write_long_table(Path("other"), synthetic_cohort(30), labels=True)
    assert train.main([*PRETRAIN, "--data_dir", "mine", "--run_dir", "run"]) == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    words = ["--resume", str(tmp_path / "run"), "--max_epochs", "2"]
    assert train.main(words) == 0  # the path was recorded whole
    (tmp_path / "mine").rename("moved")
    capsys.readouterr()
    one_error_line(capsys, train.main(words), f"{tmp_path / 'mine'}: no such folder; --data_dir takes the folder")
    one_error_line(capsys, train.main([*words, "--data_dir", "../other"]), "moved: --data_dir), or start a new run")
    assert train.main([*words[:2], "--max_epochs", "3", "--data_dir", "moved"]) == 0
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == 3
    assert settings_of(tmp_path / "run")["source"]["data"]["data_dir"] == str(Path("moved").resolve())


def test_a_backbone_written_anew_since_is_not_mixed_with_the_old(tmp_path, command, capsys, small_pretrained):
    words = [*FINETUNE, str(small_pretrained / "best.pt"), "--run_dir", str(tmp_path / "head")]
    assert train.main(words) == 0
    assert train.main(["--resume", str(small_pretrained), "--max_epochs", "2"]) == 0
    capsys.readouterr()
    one_error_line(capsys, train.main(["--resume", str(tmp_path / "head"), "--max_epochs", "2"]), "was written anew")


def test_a_backbone_that_has_moved_can_be_named_where_it_lies_now(tmp_path, command, capsys, small_pretrained):
    assert train.main([*command["head"], "--run_dir", str(tmp_path / "head")]) == 0
    moved = small_pretrained.rename(tmp_path / "moved") / "best.pt"
    capsys.readouterr()
    words = ["--resume", str(tmp_path / "head"), "--max_epochs", "2"]
    one_error_line(capsys, train.main(words), f"{small_pretrained}/best.pt: no such checkpoint")
    one_error_line(capsys, train.main(["--mode", "pretrain", "--resume", str(moved)]),
                   f"{moved}/last.pt: no such checkpoint")
    assert train.main([*words, "--pretrained_ckpt", str(moved)]) == 0
    assert settings_of(tmp_path / "head")["run"]["options"]["pretrained_ckpt"] == str(moved)
    assert train.main([*FINETUNE, str(moved), "--set", "trees=5", "--max_epochs", "2", "--run_dir",
                       str(tmp_path / "whole")]) == 0
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("head", "whole"))
    assert len(one) == len(two) == 2 and one["loss"][0] == two["loss"][0]


def test_labels_that_changed_since_are_not_learned_by_a_resumed_run(tmp_path, command, capsys, monkeypatch):
    cohort = synthetic_cohort(24)
    assert train.main([*command["head"], "--run_dir", str(tmp_path / "run")]) == 0
    answers = cohort.answers.copy()
    answers[np.flatnonzero(cohort.label == 0)[0]] = 1
    monkeypatch.setattr(runs, "load_cohort", lambda *_, **__: replace(cohort, answers=answers))
    capsys.readouterr()
    one_error_line(capsys, train.main(["--resume", str(tmp_path / "run"), "--max_epochs", "2"]), "holds other labels")


def test_resume_auto_starts_or_goes_on(tmp_path, small_models, capsys):
    run = tmp_path / "run"
    run.mkdir()  # of a start that died before its first save
    (run / ".lock").touch()
    (run / ".best.pt.123.0f").touch()     # of a process that was killed
    (run / ".env.prod.local").touch()     # of somebody else
    words = [*PRETRAIN, "--max_epochs", "2", "--run_dir", str(run), "--resume", "auto"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_pretraining",
                      lambda *a, of=train.evaluate_pretraining: os.kill(os.getpid(), signal.SIGTERM) or of(*a))
        assert train.main(words) == 130
    assert torch.load(run / "last.pt", weights_only=True)["trainer"]["position"][0] == 0  # its steps are done
    assert (run / ".env.prod.local").exists() and not (run / ".best.pt.123.0f").exists()
    assert train.main(words) == 0 and len(pd.read_csv(run / "metrics.csv")) == 2
    assert train.main([*PRETRAIN, "--max_epochs", "2", "--run_dir", str(tmp_path / "whole")]) == 0
    same_run(run, tmp_path / "whole")
    capsys.readouterr()
    one_error_line(capsys, train.main([*words[:-4], "--resume", "auto"]), "--resume auto needs --run_dir")
    one_error_line(capsys, train.main([*words, "--seed", "4"]), "seed is 0")


# ----------------------------------------------------------------------------------------------------------------------
# Precision
# ----------------------------------------------------------------------------------------------------------------------

def test_automatic_precision_is_that_of_the_processor_and_a_named_one_is_computed_by_each(tmp_path, monkeypatch,
                                                                                           small_models):
    for amx, named in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        for precision, folder in ((named, named), ("auto", f"auto {named}")):
            assert train.main([*PRETRAIN, "--precision", precision, "--run_dir", str(tmp_path / folder)]) == 0
            assert settings_of(tmp_path / folder)["source"]["precision"] == named
        same_run(tmp_path / named, tmp_path / f"auto {named}")
    half, full = (pd.read_csv(tmp_path / named / "metrics.csv")["loss"] for named in ("bf16", "fp32"))
    assert (half != full).all() and np.allclose(half, full, rtol=.01)


# ----------------------------------------------------------------------------------------------------------------------
# Run folders, poor places, quiet ones
# ----------------------------------------------------------------------------------------------------------------------

def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda _: "20260101-000000")
    arguments = argparse.Namespace(mode="pretrain", run_dir=None, resume=None)
    names = [runs.new_folder(arguments).name for _ in range(3)]
    assert names == ["pretrain-20260101-000000", "pretrain-20260101-000000-2", "pretrain-20260101-000000-3"]


def test_a_system_without_file_locks_trains_and_says_so(tmp_path, small_models, capsys, monkeypatch):
    monkeypatch.setattr(runs, "fcntl", None)
    assert train.main([*PRETRAIN, "--run_dir", str(tmp_path / "run")]) == 0
    assert "note: this system has no file locks" in capsys.readouterr().out
    code = "import sys; sys.modules |= dict(fcntl=None, resource=None); import test_suite; test_suite.main(['--help'])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=CODE, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.startswith("usage:") and not ended.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EAGAIN])
def test_a_file_system_without_locks_is_said_and_not_fatal(tmp_path, small_models, capsys, monkeypatch, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(runs.fcntl, "lockf", lockf)
    code = train.main([*PRETRAIN, "--run_dir", str(tmp_path / "run")])
    if number == errno.EAGAIN:
        one_error_line(capsys, code, "another process is training in it")
    else:
        assert code == 0 and "lies on a file system without locks" in capsys.readouterr().out


def test_a_terminal_without_the_check_mark_gets_what_it_can_print(tmp_path, command, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert train.main([*command["head"], "--run_dir", str(tmp_path / "run")]) == 0
    sys.stdout.flush()
    assert b"? Loaded pretrained weights" in sys.stdout.buffer.getvalue()


def test_a_nested_training_can_be_run_in_silence_and_gives_the_signals_back(tmp_path, command):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    before = signal.getsignal(signal.SIGINT)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(Terminal()) as error:
        for mode in MODES:
            words = [*command[mode], "--run_dir", str(tmp_path / f"quiet {mode}")]
            settings = train.run_settings(**vars(train.make_parser().parse_args(words)))
            (train.pretrain if mode == "pretrain" else train.finetune)(settings)
    assert error.getvalue() == "" and out.getvalue().count("best checkpoint") == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_the_default_settings_of_the_head_and_of_full_training_are_in_one_place():
    config = FinetuneConfig()
    assert (config.batch_size, config.epochs(2560), config.full_batch_size, config.full_epochs(2560)) == (64, 20, 16, 5)
