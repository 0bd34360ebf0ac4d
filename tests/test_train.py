"""Tests of train.py: an interrupted run, resumed, and a run of several processes end as the undisturbed single one."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import batches
import readers
import runs
import train
from batches import balanced_parts
from data import make_splits
from checkpoint import Checkpoint, splits_beside
from readers import synthetic_cohort, write_long_table
from tasks import Binary
from tests.plain_loop import close
from tests.tiny import FINETUNE, PRETRAIN, cohort_of, finished, random_stays, same_run, small_process, tiny

# ----------------------------------------------------------------------------------------------------------------------
# Resuming
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, precision, number", [
    (1, "fp32", signal.SIGTERM), (4, "fp32", signal.SIGHUP), (6, "fp32", signal.SIGUSR1), (6, "bf16", signal.SIGUSR2)])
def test_pretraining_interrupted_and_resumed_ends_with_equal_bits(tmp_path, monkeypatch, step, precision, number):
    """In the first epoch, at its last step, in the second."""
    monkeypatch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v))
    command = [*PRETRAIN, "--precision", precision, "--max_epochs", "2", "--batch_size", "3"]
    check = train.finite_or_stop
    assert train.main([*command, "--run_dir", str(tmp_path / "whole")]) == 0
    assert len(pd.read_csv(tmp_path / "whole" / "metrics.csv")) == 2

    def interrupting(norm, at, *rest):
        check(norm, at, *rest)
        if at == step:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(train, "finite_or_stop", interrupting)
    assert train.main([*command, "--run_dir", str(tmp_path / "cut")]) == 130
    monkeypatch.setattr(train, "finite_or_stop", check)
    assert train.main([*command, "--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("where, mode", [
    ("evaluate_pretraining", "pretrain"), ("encode_points", "head"), ("prepare_head", "head"), ("HeadTraining.epoch", "head"),
    ("HeadTraining.epoch", "full training"), ("Binary.validation", "full training")])
def test_outside_the_steps_a_signal_is_obeyed_at_once_and_the_resumed_run_ends_with_equal_bits(
        tmp_path, monkeypatch, capsys, small_pretrained, where, mode):
    command = [*FINETUNE, str(small_pretrained / "best.pt"), "--set", "trees=5"]
    command = {"pretrain": PRETRAIN, "head": command, "full training": [*command, "--full_training"]}[mode]
    assert train.main([*command, "--run_dir", str(tmp_path / "whole")]) == 0

    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        pytest.fail("it went on")
    with monkeypatch.context() as patch:
        patch.setattr(f"{'tasks' if where == 'Binary.validation' else 'train'}.{where}", interrupted)
        assert train.main([*command, "--run_dir", str(tmp_path / "cut")]) == 130
    steps_done = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["trainer"] is not None
    assert steps_done == (where in ("evaluate_pretraining", "Binary.validation"))  # a signal in evaluating loses no step
    assert capsys.readouterr().err.startswith("saved; go on with: python train.py --mode")
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_the_command_printed_at_an_interruption_goes_on_with_the_run(tmp_path, monkeypatch, capsys):
    """It names the run folder alone: data, epochs and batch size must come from the run, or other stays are trained on
    in silence."""
    monkeypatch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v))
    assert train.main([*PRETRAIN, "--max_epochs", "2", "--run_dir", str(tmp_path / "whole")]) == 0
    check = train.finite_or_stop
    monkeypatch.setattr(train, "finite_or_stop", lambda norm, at, *a: at == 0 and os.kill(os.getpid(), signal.SIGTERM))
    assert train.main([*PRETRAIN, "--max_epochs", "2", "--run_dir", str(tmp_path / "cut")]) == 130
    monkeypatch.setattr(train, "finite_or_stop", check)
    cohort, load = synthetic_cohort(24), runs.load_cohort
    monkeypatch.setattr(runs, "load_cohort", lambda *a, **k: cohort if load(*a, **k).fingerprint == cohort.fingerprint
                        else pytest.fail("other data"))
    command = next(line for line in capsys.readouterr().err.splitlines() if "python train.py" in line
                   and "--resume" in line)
    assert train.main(command.split("train.py ")[1].split()) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_stay_that_the_checkpoint_knows_keeps_its_part_in_other_data():
    """Else a stay pretrained on could be tested on after more data are put beside the old."""
    cohort = synthetic_cohort(60)
    known = {"train": cohort.stay_id[:30].tolist(), "valid": cohort.stay_id[30:34].tolist(),
             "test": cohort.stay_id[34:40].tolist()}

    def known_part(subjects):
        checkpoint = SimpleNamespace(subjects=subjects, split={}, is_new=lambda cohort: True, source={"data": {}})
        return Checkpoint.known_part(checkpoint, cohort)
    drawn = make_splits(cohort, 3)
    split = splits_beside(known_part(known), drawn, cohort)
    assert all(set(ids) <= set(split[part]) for part, ids in known.items())
    assert sorted(sum(split.values(), [])) == sorted(cohort.stay_id)
    assert splits_beside(known_part({}), drawn, cohort) == drawn


@pytest.mark.parametrize("precision, full_training", [("fp32", False), ("fp32", True), ("bf16", True)])
def test_finetuning_interrupted_and_resumed_ends_with_equal_bits(tmp_path, monkeypatch, precision, full_training):
    tiny_run = tmp_path / "pretrain"
    # of a tiny backbone the head is more than 5%
    monkeypatch.setattr(train.finetune.__defaults__[0], "max_trainable_ratio", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v))
        assert train.main([*PRETRAIN, "--run_dir", str(tiny_run)]) == 0
    command = [*FINETUNE, str(tiny_run / "best.pt"), "--precision", precision, "--max_epochs", "2"]
    command += ["--full_training"] * full_training
    assert train.main([*command, "--run_dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:  # a signal while the first epoch is evaluated
        judge = Binary.validation
        patch.setattr(Binary, "validation", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or judge(*a))
        assert train.main([*command, "--run_dir", str(tmp_path / "cut")]) == 130
    assert train.main([*command, "--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("full_training", [False, True])
def test_a_step_in_micro_batches_learns_what_it_learns_at_once(tmp_path, monkeypatch, small_models, full_training):
    """Nothing is hidden, dropped or sampled; passes that follow one another draw other masks."""
    monkeypatch.setattr(train, "ModelConfig",
                        lambda v: tiny(num_variables=v, hide_sets=0.0, drop_events=0.0, sample_z=False))
    monkeypatch.setattr(F, "dropout", lambda x, *_: x)
    assert train.main([*PRETRAIN, "--run_dir", str(tmp_path / "pretrain")]) == 0
    command = [*PRETRAIN, "--max_epochs", "2", "--batch_size", "7", "--set", "warmup_steps=1",
               "--set", "learning_rate=1e-4"]  # where a gradient is rounding alone, Adam's step is this long
    if full_training:
        command = [*FINETUNE, str(tmp_path / "pretrain" / "best.pt"), "--full_training", "--batch_size", "7",
                   "--set", "full_drop_events=0"]
    folders, passes = [tmp_path / "at once", tmp_path / "in parts"], []
    for run, most in zip(folders, (batches._MOST_EVENTS, 600)):
        loaded = []
        with monkeypatch.context() as patch:
            patch.setattr(batches, "_MOST_EVENTS", most)
            patch.setattr(train, "loader", lambda *a, of=train.loader: (loaded.append(0) or batch for batch in of(*a)))
            assert train.main([*command, "--run_dir", str(run)]) == 0
        passes.append(len(loaded))
    assert passes[1] > 1.5 * passes[0]
    pd.testing.assert_frame_equal(*(pd.read_csv(run / "metrics.csv") for run in folders), rtol=0, atol=1e-5)
    close(*(learned(run / "last.pt") for run in folders))


def learned(path) -> dict:
    """A checkpoint's weights without what is added to every key: it cancels in the softmax, so that its gradient is
    rounding, which Adam scales up."""
    weights = torch.load(path, weights_only=True)["model"]
    return {name: torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) if name.endswith("in_proj_bias") else x
            for name, x in weights.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Several processes: two ranks of torchrun against one process. 15 training stays in batches of 7: the last one has
# fewer stays than ranks. A batch holds so few events that steps are made of micro-batches, and the 4 validation stays
# of several batches
# ----------------------------------------------------------------------------------------------------------------------

RANKS = {"pretrain": [*PRETRAIN, "--batch_size", "7", "--max_epochs", "3",
                      "--set", "warmup_steps=1", "--set", "beta_warmup_steps=1",  # at full speed from the first step,
                      "--set", "learning_rate=2e-4"],  # but Adam's step is as long where a gradient is rounding alone
         "head": [*FINETUNE, "pretrain/best.pt", "--max_epochs", "3"],
         "full training": [*FINETUNE, "pretrain/best.pt", "--full_training", "--batch_size", "7", "--max_epochs", "2"]}


def small_rank(home: str, command: list, deterministic: bool = True, interrupted_at: int | None = None):
    """What a rank, or the single process that it is compared with, does. `deterministic`: nothing is hidden, dropped or
    sampled. `interrupted_at`: the step, or the epoch of the head, in which SIGTERM reaches the last rank alone."""
    def interrupting(steps, function):
        def call(*a):
            if next(steps) == interrupted_at and runs.RANK == runs.WORLD - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*a)
        return call
    batches._MOST_EVENTS = 60
    train.clip_and_step = interrupting(itertools.count(), train.clip_and_step)
    Binary.validation = interrupting(itertools.count(), Binary.validation)
    if deterministic:
        F.dropout = lambda x, *_: x
        train.finetune.__defaults__[0].full_drop_events = 0.
    small_process(home, command, **dict(hide_sets=0.0, drop_events=0.0, sample_z=False) if deterministic else {})


def forked_rank(rank: int, ranks: int, port: int, home: str, command: list, options: dict):
    """`small_rank` without torchrun: it starts at once, and nobody ends a rank that waits forever. Four ranks are two
    machines, each with a folder and a log of its own."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    runs.RANK, runs.LOCAL_RANK, runs.WORLD = rank, rank % 2, ranks
    if ranks == 4:
        runs.MACHINE, home = rank // 2, f"{home}/machine{rank // 2}"
        os.makedirs(home, exist_ok=True)
        written = open(f"{home}/written", "a", buffering=1)
        readers.write_cache = lambda *a, write=readers.write_cache: (write(*a), written.write(f"{rank}\n"))
    small_rank(home, command, **options)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def exit_codes(processes, ranks_home):
    """Runs forked ranks: their exit codes, and what they printed. `beside`: words for the last rank alone."""
    def run(*command, ranks=2, beside=(), **options):
        (ranks_home / "log").unlink(missing_ok=True)
        port, started = free_port(), []
        for rank in range(ranks):
            words = [*command, *(beside if rank + 1 == ranks else ())]
            started.append(processes(target=forked_rank, args=(rank, ranks, port, str(ranks_home), words, options),
                                     daemon=True))
            started[-1].start()
        codes = [finished(process) for process in started]
        return codes, "".join(log.read_text() for log in sorted(ranks_home.rglob("log")))
    return run


@pytest.fixture(scope="module")
def ranks_home(tmp_path_factory, processes):
    """The runs of one process with the deterministic objective: pretrain, head, full training."""
    home = tmp_path_factory.mktemp("ranks")
    for mode, command in RANKS.items():
        process = processes(target=small_rank, args=(str(home), [*command, "--run_dir", mode]))
        process.start()
        assert finished(process) == 0, (home / "log").read_text()
    return home


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_batch_is_divided_by_events_and_every_stay_is_in_one_part(ranks):
    rng = np.random.default_rng(ranks)
    for stays in [*range(1, 12), 64]:
        events = rng.integers(1, 2000, stays)
        parts = balanced_parts(events, ranks)
        assert sorted(np.concatenate(parts)) == list(range(stays)) and len(parts) == ranks
        assert all((np.diff(part) > 0).all() for part in parts)  # one rank: the batch as it is
        sums = np.array([events[part].sum() for part in parts])
        assert (sums > 0).sum() == min(stays, ranks)
        fullest = parts[sums.argmax()]
        # no stay can move and make the fullest less full
        assert len(fullest) == 1 or sums.max() - events[fullest].min() <= sums.min()


@pytest.mark.parametrize("mode", RANKS)
def test_two_ranks_of_torchrun_learn_what_one_process_learns(ranks_home, mode):
    """The same losses, validation figures and weights, and one set of files."""
    (ranks_home / "log").unlink(missing_ok=True)
    rank = [sys.executable, "-c",
            f"import sys; from tests.test_train import small_rank; small_rank({str(ranks_home)!r}, sys.argv[1:])"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python",
                *rank]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).resolve().parent)}
    ended = subprocess.run([*torchrun, *RANKS[mode], "--run_dir", f"ranks {mode}"], env=environment,
                           capture_output=True, text=True, timeout=300)
    printed = (ranks_home / "log").read_text()
    assert ended.returncode == 0, printed + ended.stderr
    one, two = ranks_home / mode, ranks_home / f"ranks {mode}"
    if mode == "head":  # the features are the same bits, and so is the head that every rank trains on them
        same_run(one, two)
    else:
        pd.testing.assert_frame_equal(*(pd.read_csv(run / "metrics.csv") for run in (one, two)), rtol=0, atol=1e-5)
    for name in ("best.pt", "last.pt"):
        close(*(learned(run / name) for run in (one, two)))
    assert sorted(path.name for path in two.iterdir()) == [".lock", "best.pt", "config.json", "last.pt", "metrics.csv"]
    assert printed.count("run folder") == printed.count("best checkpoint") == 1


@pytest.mark.parametrize("mode", RANKS)
def test_a_signal_to_one_rank_saves_and_the_resumed_run_ends_with_equal_bits(ranks_home, exit_codes, mode):
    whole, cut = f"random {mode}", f"cut {mode}"
    assert exit_codes(*RANKS[mode], "--run_dir", whole, deterministic=False)[0] == [0, 0]
    codes, printed = exit_codes(*RANKS[mode], "--run_dir", cut, deterministic=False, interrupted_at=1)
    assert codes == [130, 130] and printed.count("saved; go on with:") == 1, printed
    states = torch.load(ranks_home / cut / "last.pt", weights_only=True)["trainer"]["random"]
    # each rank draws masks of its own; the head is the same on all
    assert torch.equal(*(state["torch"] for state in states)) == (mode == "head")
    assert exit_codes(*RANKS[mode], "--resume", cut, deterministic=False)[0] == [0, 0]
    same_run(ranks_home / whole, ranks_home / cut)


@pytest.mark.parametrize("option, error", [
    # of rank 0 alone
    (["--run_dir", "pretrain"],
     "pretrain: exists already; choose another --run_dir, or continue it with --resume pretrain"),
    # of each
    (["--data_dir", "nowhere"], "nowhere: no such folder; --data_dir takes the folder that holds the data"),
])
def test_an_error_is_one_line_and_no_rank_waits(exit_codes, option, error):
    codes, printed = exit_codes(*RANKS["pretrain"], *option)
    assert codes == [2, 2] and "Traceback" not in printed
    assert [line for line in printed.splitlines() if line.startswith("error:")] == [f"error: {error}"]


def test_ranks_whose_stays_have_one_set_each_train(ranks_home, exit_codes):
    write_long_table(ranks_home / "short", cohort_of(random_stays([1] * 24)), labels=True)
    codes, printed = exit_codes(*RANKS["pretrain"], "--max_epochs", "1", "--data_dir", "short", "--run_dir", "one set")
    assert codes == [0, 0], printed


def test_ranks_that_read_other_data_stop_with_one_line(exit_codes):
    codes, printed = exit_codes(*RANKS["pretrain"], beside=["--synthetic_stays", "25"])
    assert codes == [2, 2] and "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "rank 1 on" in errors[0] and "read other data" in errors[0]


def test_each_machine_parses_its_data_once_and_the_run_lies_on_one(ranks_home, exit_codes):
    """Two machines of two processes, with folders of their own."""
    codes, printed = exit_codes(*RANKS["pretrain"], "--run_dir", "run", ranks=4)
    assert codes == [0] * 4, printed
    homes = [ranks_home / f"machine{machine}" for machine in range(2)]
    assert [(home / "written").read_text() for home in homes] == ["0\n", "2\n"]  # who wrote a cache
    assert (homes[0] / "run" / "last.pt").exists() and not (homes[1] / "run").exists()
    both = homes[0] / "run", ranks_home / "pretrain"
    pd.testing.assert_frame_equal(*(pd.read_csv(run / "metrics.csv") for run in both), rtol=0, atol=1e-5)
    (homes[0] / "run").rename(homes[1] / "run")  # rank 0 is elsewhere: it must not start anew in silence
    codes, printed = exit_codes(*RANKS["pretrain"], "--run_dir", "run", "--resume", "auto", ranks=4)
    assert codes == [2] * 4 and "run/last.pt: lies on" in printed


def machine_rank(home: str, command: list, ended_at: str):
    """What a rank of a torchrun agent does whose machine has the folder `home`: in step `ended_at` (or never) rank 1's
    agent is ended, and with it, a moment later, the rank."""
    steps, step = itertools.count(), train.clip_and_step

    def ended(*a):
        if str(next(steps)) == ended_at and runs.RANK == 1:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)
        return step(*a)
    train.clip_and_step = ended
    small_rank(home, command)


def test_two_machines_under_torchrun_are_ended_and_go_on_to_what_one_process_learns(ranks_home, tmp_path):
    """Two agents on the loopback address; each has a folder, a cache and no sight of the other's."""
    code = ("import os, sys; from tests.test_train import machine_rank; "
            "machine_rank(os.environ['MACHINE'], sys.argv[1:], {!r})")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).resolve().parent)}
    homes = [tmp_path / f"machine{machine}" for machine in range(2)]

    def both_run(*words, ended_at=""):
        launch = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}",
                  "--no-python", sys.executable, "-c", code.format(ended_at)]
        agents = []
        for home in homes:
            home.mkdir(exist_ok=True)
            agents.append(subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *launch, *words],
                                           env=environment | {"MACHINE": str(home)}, stderr=subprocess.DEVNULL,
                                           start_new_session=True))
        return [agent.wait(300) for agent in agents], launch, "".join((home / "log").read_text() for home in homes)

    codes, launch, printed = both_run(*RANKS["pretrain"], "--run_dir", "run", ended_at="4")
    assert all(codes) and "Traceback" not in printed, printed
    (home,) = [home for home in homes if (home / "run").exists()]
    assert sorted(home.iterdir()) == [home / "cache", home / "log", home / "run"]
    assert torch.load(home / "run" / "last.pt", weights_only=True)["trainer"]["position"] == [1, 2]
    told = next(line for line in printed.splitlines() if line.startswith("saved; go on with:"))
    assert told.startswith(f"saved; go on with: torchrun {' '.join(launch[:3])} --rdzv-endpoint=")

    codes, _, printed = both_run(*RANKS["pretrain"], "--resume", "run")
    assert codes == [0, 0] and "Warning" not in printed, printed
    one, two = ranks_home / "pretrain", home / "run"
    pd.testing.assert_frame_equal(*(pd.read_csv(run / "metrics.csv") for run in (one, two)), rtol=0, atol=1e-5)
    close(*(learned(run / "last.pt") for run in (one, two)))


def test_the_command_that_goes_on_starts_as_many_processes(monkeypatch):
    assert runs.launcher() == ["python"]
    monkeypatch.setattr(runs, "WORLD", 4)
    assert runs.launcher() == ["torchrun", "--standalone", "--nproc_per_node=4"]
    monkeypatch.setattr(runs, "MACHINES", 2), monkeypatch.setattr(runs, "LOCAL_WORLD", 2)
    monkeypatch.setenv("MASTER_ADDR", "head"), monkeypatch.setenv("MASTER_PORT", "29400")
    assert runs.launcher() == ["torchrun", "--nnodes=2", "--nproc_per_node=2", "--rdzv-backend=c10d",
                                "--rdzv-endpoint=head:29400"]
