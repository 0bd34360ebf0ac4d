"""What can go wrong: bad data, checkpoints and options, killed processes, full disks, damaged files, leaks, numerics.

A refusal is one line and exit code 2. The tests named `random` are short here and long under `test_suite.py --soak`.
"""

import collections
import contextlib
import copy
import fcntl
import gzip
import io
import itertools
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn

import runs
import tables
import train
from batches import Normalizer, StayDataset
from data import InputError, ranges, stay_event_index, write_atomically
from checkpoint import Checkpoint
from model import ModelConfig
from predictor import Predictor
from readers import load_cohort, synthetic_cohort
from test_suite import main
from tests.tiny import (EVENTS, FINETUNE, OUTCOMES, PRETRAIN, RECORDS, SMALL, SOAK, finished, one_error_line,
                        same_run, small_process, write, write_physionet)

CODE = Path(train.__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the file, exit code 2
# ----------------------------------------------------------------------------------------------------------------------

def with_line(line, at=3):
    """RECORDS with one line more in the second record, `at` lines below its header."""
    lines = RECORDS["132540"].splitlines(keepends=True)
    return RECORDS | {"132540": "".join(lines[:at] + [line + "\n"] + lines[at:])}


def tar_with(member: tarfile.TarInfo):
    def damage(folder):
        write_physionet(folder, archive=True)
        with tarfile.open(folder / "set-a.tar.gz", "w:gz") as tar:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return damage


def archive_that_claims(kind):
    """A tar header that promises a gigabyte, and nothing after it."""
    member = tarfile.TarInfo("set-a/1.txt")
    member.type, member.size = kind, 2**30
    body = gzip.compress(member.tobuf())
    return lambda folder: (write_physionet(folder, archive=True) / "set-a.tar.gz").write_bytes(body)


def linked(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def cut_archive(folder, flip=False):
    path = write_physionet(folder, archive=True) / "set-a.tar.gz"
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 0xFF
    path.write_bytes(body if flip else body[:len(body) // 2])


BAD_DATA = {  # what is wrong: (make it at this folder, what the message names)
    "missing folder": (lambda f: None, "data: no such folder"),
    "empty folder": (lambda f: f.mkdir(), "data: no data"),
    "a file in its place": (lambda f: f.write_text("x"), "data: no such folder"),
    "bad header": (partial(write_physionet, header="a,b\n"), "132539.txt: no column Time"),
    "bad time": (lambda f: write_physionet(f, records=with_line("1h,HR,80")), "132540.txt line 5"),
    "no time": (lambda f: write_physionet(f, records=with_line(",HR,80")), "132540.txt line 5"),
    "text value": (lambda f: write_physionet(f, records=with_line("00:30,HR,high")), "132540.txt line 5"),
    "four columns": (lambda f: write_physionet(f, records=with_line("00:30,HR,80,90")), "132540.txt line 5"),
    "four columns at once": (lambda f: write_physionet(f, records=RECORDS
                                                       | {"132539": "00:00,Age,54,1\n" + RECORDS["132539"]}),
                             "132539.txt line 2"),
    "four columns throughout": (lambda f: write_physionet(f, records={"132539": "00:00,Age,54,1\n00:01,HR,80,1\n"}),
                                "132539.txt line 2"),
    "two columns": (lambda f: write_physionet(f, records=with_line("00:30,HR")), "132540.txt line 5"),
    "another record's id": (lambda f: write_physionet(f, records={"132541": RECORDS["132540"]}), "132541.txt"),
    "record without text": (lambda f: write_physionet(f, records={"132539": ""}, header=""), "132539.txt"),
    "no record": (partial(write_physionet, records={}), "set-a"),
    "outcome that is not 0 or 1": (partial(write_physionet, outcomes=OUTCOMES.replace(",4,1\n", ",4,yes\n")),
                                    "Outcomes-a.txt line 3"),
    "outcome column missing": (partial(write_physionet, outcomes=OUTCOMES.replace("In-hospital_death", "dead")),
                               "Outcomes-a.txt"),
    "truncated archive": (cut_archive, "set-a.tar.gz"),
    "damaged archive": (partial(cut_archive, flip=True), "set-a.tar.gz"),
    "archive that leaves its folder": (tar_with(tarfile.TarInfo("../evil.txt")), "set-a.tar.gz: member ../evil.txt"),
    "archive with a link": (tar_with(linked("set-a/1.txt", "/etc/passwd")), "set-a.tar.gz: member set-a/1.txt"),
    "archive with a huge record": (archive_that_claims(tarfile.REGTYPE),
                                   "set-a.tar.gz: member set-a/1.txt of 1,073,741,824 bytes"),
    "archive with a huge header": (archive_that_claims(tarfile.XHDTYPE),
                                   "set-a.tar.gz: damaged archive (a header of 1,073,741,824 bytes)"),
    "too few stays to split": (write_physionet, "PhysioNet 2012"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_one_line_and_exit_code_2(tmp_path, capsys, what):
    make, named = BAD_DATA[what]
    make(tmp_path / "data")
    one_error_line(capsys, train.main(["--mode", "pretrain", "--device", "cpu", "--data_dir", str(tmp_path / "data"),
                                       "--run_dir", str(tmp_path / "run")]),
                   named)
    assert not (tmp_path / "run").exists() and not Path(tmp_path / "evil.txt").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def malicious(path) -> dict:
    """A checkpoint's content that leaves a file `executed` beside `path` when it is unpickled."""
    return {"state_dict": Malicious(path.with_name("executed"))}


BAD_CHECKPOINTS = {
    "missing": lambda path, good: None,
    "a folder": lambda path, good: path.mkdir(),
    "empty": lambda path, good: path.write_bytes(b""),
    "garbage": lambda path, good: path.write_bytes(b"garbage" * 99),
    "truncated": lambda path, good: path.write_bytes(good.read_bytes()[:50_000]),
    "a list": lambda path, good: torch.save([1, 2], path),
    "no weights": lambda path, good: torch.save({"epoch": 3}, path),
    "format without weights": lambda path, good: torch.save({"format": 1}, path),
    "pickle that runs a command": lambda path, good: path.write_bytes(pickle.dumps(malicious(path), protocol=2)),
    "zipped pickle that runs a command": lambda path, good: torch.save(malicious(path), path),
    "another format": lambda path, good: torch.save(torch.load(good, weights_only=True) | {"format": 99}, path),
    "of the other mode": lambda path, good: torch.save(torch.load(good, weights_only=True) | {"mode": "finetune"},
                                                       path),
}


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_one_line_and_exit_code_2(tmp_path, capsys, pretrained, what):
    BAD_CHECKPOINTS[what](tmp_path / "bad.pt", pretrained)
    capsys.readouterr()
    one_error_line(capsys, train.main([*FINETUNE, str(tmp_path / "bad.pt"), "--run_dir", str(tmp_path / "run")]),
                   tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


def test_bad_options_are_refused(tmp_path, capsys):
    one_error_line(capsys, train.main(["--mode", "finetune"]), "--pretrained_ckpt")
    one_error_line(capsys, train.main([*PRETRAIN, "--device", "abacus"]), "abacus")
    one_error_line(capsys, train.main([*PRETRAIN, "--run_dir", str(tmp_path)]), tmp_path)
    one_error_line(capsys, train.main(["--mode", "pretrain", "--resume", str(tmp_path / "none")]), tmp_path / "none")
    for words, named in (([], "--mode pretrain or --mode finetune"), (["--mode", "both"], "invalid choice: 'both'"),
                         ([*PRETRAIN, "--unknown"], "--unknown"), ([*PRETRAIN, "--seed"], "--seed")):
        one_error_line(capsys, train.main(words), named)


# ----------------------------------------------------------------------------------------------------------------------
# Trust: killed processes, failing disks, forged checkpoints, damaged inputs, leaks, reproducibility. `--soak` runs the
# random ones at length
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SMALL)
def test_a_process_killed_at_random_moments_and_resumed_ends_with_equal_bits(tmp_path, processes, mode):
    def start(command, run=None):
        """A process, from the moment on when the folder of its run exists."""
        process = processes(target=small_process, args=(str(tmp_path), command))
        process.start()
        while run and process.exitcode is None and not (tmp_path / run / "last.pt").exists():
            time.sleep(.002)
        return process
    for name in ["pretrain"] * (mode != "pretrain") + [mode]:
        process, began = start([*SMALL[name], "--run_dir", name], name), time.time()
        assert finished(process) == 0, (tmp_path / "log").read_text()
    duration, rng, ended = time.time() - began, np.random.default_rng(), collections.Counter()
    for i in range(20 if SOAK else 2):
        moment, number = rng.uniform(0, duration), (signal.SIGKILL, signal.SIGTERM)[i % 2]
        process = start([*SMALL[mode], "--run_dir", "cut"], "cut")
        process.join(moment)
        if process.exitcode is None:
            os.kill(process.pid, number)
        code = finished(process)
        assert code in (0, 130, -number), (moment, (tmp_path / "log").read_text())
        ended["finished before" if code == 0 else number.name] += 1
        assert finished(start([*SMALL[mode], "--resume", "cut"])) == 0, (tmp_path / "log").read_text()
        same_run(tmp_path / mode, tmp_path / "cut")
        assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
            ".lock", "best.pt", "config.json", "last.pt", "metrics.csv"]
        shutil.rmtree(tmp_path / "cut")
    print(f"\n{mode}: killed at random moments of {duration:.1f} s: {dict(ended)}")


def test_a_run_folder_has_one_writer(tmp_path, processes, small_pretrained):
    with open(small_pretrained / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        process = processes(target=small_process, args=(str(tmp_path), [*PRETRAIN, "--resume", str(small_pretrained)]))
        process.start()
        assert finished(process) == 2
    assert "another process is training in it" in (tmp_path / "log").read_text()


def kill_while_saving(path):
    write_atomically(path, lambda out: (out.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL)))


def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(small_pretrained, processes):
    before = (small_pretrained / "last.pt").read_bytes()
    process = processes(target=kill_while_saving, args=(small_pretrained / "last.pt",))
    process.start()
    assert finished(process) == -signal.SIGKILL and len(list(small_pretrained.glob(".last.pt.*"))) == 1
    assert (small_pretrained / "last.pt").read_bytes() == before
    assert train.main([*PRETRAIN, "--resume", str(small_pretrained)]) == 0
    assert not list(small_pretrained.glob(".last.pt.*"))


def test_a_link_is_written_through_and_a_pipe_or_device_directly(tmp_path):
    target, link, pipe = tmp_path / "target" / "x.csv", tmp_path / "x.csv", tmp_path / "pipe"
    target.parent.mkdir()
    link.symlink_to("target/x.csv")
    for text in ("new", "again"):
        write_atomically(link, lambda out: out.write_text(text))
        assert link.is_symlink() and target.read_text() == text and os.listdir(target.parent) == ["x.csv"]
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    write_atomically(pipe, lambda out: Path(out).write_text("through"))
    assert reader.communicate(timeout=20)[0] == "through" and pipe.is_fifo()
    write_atomically("/dev/null", lambda out: out.write_text("gone"))
    assert Path("/dev/null").is_char_device()
    if os.path.isdir("/proc/self/fd"):
        code = "from data import write_atomically; write_atomically('/dev/stdout', lambda out: open(out, 'w').write('a'))"
        printed = subprocess.run([sys.executable, "-c", code], cwd=CODE, capture_output=True, text=True, check=True)
        assert printed.stdout == "a"


def test_a_temporary_name_cannot_be_guessed_and_the_file_gets_the_usual_permissions(tmp_path):
    names = []
    for _ in range(2):
        write_atomically(tmp_path / "x.csv", lambda out: (names.append(out.name), out.write_text("")))
    assert names[0] != names[1] and all(name.startswith(f".x.csv.{os.getpid()}.") for name in names)
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode


@contextlib.contextmanager
def files_of_at_most(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size, file", [(10, "metrics.csv"), (50_000, "best.pt")])
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_space(tmp_path, capsys, monkeypatch, small_models, size,
                                                                     file):
    command = [*PRETRAIN, "--max_epochs", "2"]
    assert train.main([*command, "--run_dir", str(tmp_path / "whole")]) == 0
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        def end_of_epoch(run, row, *rest, of=train.Run.end_of_epoch):
            if row["epoch"] == 2:
                stack.enter_context(files_of_at_most(size))
            of(run, row, *rest)
        patch.setattr(train.Run, "end_of_epoch", end_of_epoch)
        capsys.readouterr()
        one_error_line(capsys, train.main([*command, "--run_dir", str(tmp_path / "cut")]),
                       f"{file}: cannot be written (File too large)")
    assert not list((tmp_path / "cut").glob(".*.*.*"))
    assert len(pd.read_csv(tmp_path / "cut" / "metrics.csv")) == 1 + (file != "metrics.csv")
    assert train.main([*command, "--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_full_file_system_is_one_line(tmp_path, capsys, small_models):
    (disk := tmp_path / "disk").mkdir()
    if os.system(f"mount -t tmpfs -o size=600k tmpfs {disk} 2> /dev/null"):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        one_error_line(capsys, train.main([*PRETRAIN, "--run_dir", str(disk / "run")]),
                       "last.pt: cannot be written (No space left on device)")
        assert Checkpoint.open(disk / "run" / "last.pt").trainer is None
    finally:
        os.system(f"umount -l {disk}")


def test_a_cache_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    with files_of_at_most(1000), pytest.raises(InputError, match="cannot be written"):
        load_cohort(None, 24, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert len(load_cohort(None, 24, cache_dir=tmp_path / "cache")) == 24


def test_the_caches_place_is_an_option_and_no_setting_of_the_run(tmp_path, capsys, monkeypatch, small_models):
    monkeypatch.setattr(runs, "load_cohort", load_cohort)  # without the tests' own cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "a file", "")))
    command = [*PRETRAIN, "--run_dir", str(tmp_path / "run")]
    one_error_line(capsys, train.main(command), "another place with --cache_dir")
    assert train.main([*command, "--cache_dir", str(tmp_path / "kept")]) == 0
    checkpoint = tmp_path / "run" / "best.pt"
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert b"kept" not in checkpoint.read_bytes() + (tmp_path / "run" / "config.json").read_bytes()
    one_error_line(capsys, train.main([*FINETUNE, str(checkpoint)]), "another place with --cache_dir")
    tuned = tmp_path / "tuned" / "best.pt"
    assert train.main([*FINETUNE, str(checkpoint), "--cache_dir", str(tmp_path / "kept"), "--run_dir",
                       str(tuned.parent)]) == 0
    assert main(["--checkpoint", str(tuned), "--cache_dir", str(tmp_path / "other")]) == 0
    assert len(list((tmp_path / "other").iterdir())) == 1
    assert train.main(["--resume", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "kept"),
                       "--max_epochs", "2"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_reading_leaves_nothing_behind(tmp_path, monkeypatch, capsys, number):
    write(tmp_path / "table" / "events.csv", EVENTS)
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    monkeypatch.setattr(runs, "load_cohort", load_cohort)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    seen = []

    def interrupted(*_):
        seen.extend([*temporary.iterdir(), *cache.iterdir()])
        os.kill(os.getpid(), number)
    monkeypatch.setattr(tables, "sync", interrupted)
    before = signal.getsignal(number)
    assert train.main(["--mode", "pretrain", "--data_dir", str(tmp_path / "table"), "--cache_dir", str(cache),
                       "--run_dir", str(tmp_path / "run")]) == 130
    assert seen and not [*temporary.iterdir(), *cache.iterdir()] and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == "interrupted\n" and signal.getsignal(number) is before


def command_process(code: str, shell: str = "{}"):
    """A process that runs `code` as a command, within the words of a shell."""
    code = f"import sys, runs\ndef command():\n    {code}\nsys.exit(runs.exit_code(command))"
    words = shlex.join([sys.executable, "-c", code])
    return subprocess.run(["bash", "-c", shell.format(words)], cwd=CODE, capture_output=True, text=True, timeout=60)


def test_a_closed_pipe_or_closed_streams_end_quietly():
    ended = command_process("for i in range(100_000): print(i)", "set -o pipefail; {} | head -1")
    assert (ended.returncode, ended.stdout, ended.stderr) == (141, "0\n", "")
    ended = command_process("print('x'); print('x', file=sys.stderr); return len([*runs.progress(sys.stdin, 0, '')])",
                            "{} <&- >&- 2>&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_line_reaches_a_pipe_as_it_is_printed():
    assert command_process("import os; print('first'); os._exit(0)").stdout == "first\n"


def test_control_characters_are_escaped_in_what_is_printed(capsys):
    def command():
        print("stay \x1b[2Jé\r\x9b7")
        raise InputError("stay \x1b[2J\nerror: x")
    assert runs.exit_code(command) == 2
    assert capsys.readouterr() == ("stay \\x1b[2Jé\\x0d\\x9b7\n", "error: stay \\x1b[2J\\nerror: x\n")


def test_an_unwritable_folder_is_one_line(tmp_path, capsys, small_models):
    (tmp_path / "locked").mkdir(mode=0o555)
    (tmp_path / "a file").touch()
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(InputError, match="locked/x.csv: cannot be written"):
            write_atomically(tmp_path / "locked" / "x.csv", lambda path: path.touch())
        with pytest.raises(InputError, match="cannot be (read|written).*--cache_dir"):
            load_cohort(None, 24, cache_dir=tmp_path / "locked" / "cache")
    finally:
        os.seteuid(user)
    with pytest.raises(InputError, match="x.csv: cannot be written"):
        write_atomically(tmp_path / "a file" / "x.csv", lambda path: path.touch())
    one_error_line(capsys, train.main([*PRETRAIN, "--run_dir", str(tmp_path / "a file" / "run")]), "a file/run")


# ---- checkpoints that lie --------------------------------------------------------------------------------------------

def forged(good, **changes):
    """The content of the checkpoint with entries changed: a function of the old one, or the new."""
    content = torch.load(good, weights_only=True)
    return content | {name: change(content[name]) if callable(change) else change for name, change in changes.items()}


def flipped(good):
    """One bit of a weight."""
    body = bytearray(good.read_bytes())
    body[len(body) // 2] ^= 1
    return bytes(body)


def packed(good, zeros: int) -> bytes:
    """The same file, its members deflated; zeros: bytes of one member more."""
    out = io.BytesIO()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("archive/data/bomb", bytes(zeros))
    return out.getvalue()


def overlapping(good) -> bytes:
    """The same file, a hundred further names for its largest member."""
    out = io.BytesIO(good.read_bytes())
    with zipfile.ZipFile(out, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        for i in range(100):
            again = copy.copy(largest)
            again.filename = f"{largest.filename}{i}"
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    return out.getvalue()


TOO_LARGE = [  # the first: 206 GB
    dict(summaries=True, head_variables=2**20, hidden_width=2**12, classification_only=False), dict(inducing=2**20),
    dict(summaries=True, head_variables=2**18, head_widths=(2**12,)), dict(head_widths=(2**12,) * 100),
    dict(classes=2**20)]


@pytest.mark.parametrize("sizes", TOO_LARGE, ids=str)
def test_sizes_that_fill_the_memory_are_refused_before_they_do(sizes):
    with pytest.raises(InputError, match="it takes int, . to|it takes tuple, 1 to|sizes of about .* weights"):
        ModelConfig(44, **sizes)


FORGED = {  # of a finetuned checkpoint: its content, or its bytes
    **{f"cut at {tenth}0%": lambda good, tenth=tenth: good.read_bytes()[:good.stat().st_size * tenth // 10]
       for tenth in range(10)},
    "one bit flipped": flipped,
    **{f"{name} of {value!r}": lambda good, change={name: value}: forged(good, model_config=lambda c: c | change)
       for name, value in [
        ("latent_dim", 10**9), ("latent_dim", -16), ("latent_dim", "16"), ("latent_dim", 17), ("latent_dim", 16.0),
        ("layers", 10**6), ("levels", 10**5),
        ("heads", 3), ("num_variables", 10**6), ("num_variables", 45), ("input_dim", 2**20), ("dropout", 2.0),
        ("max_beta", float("nan")),
        ("presence", 1), ("decoder", "none"), ("features", [1]), ("head_widths", (10**9,)), ("head_widths", 3),
        ("head_trees", 0), ("tree_depth", 30), ("classes", 3), ("depth", 4)]},
    **{f"sizes of {sizes}": lambda good, change=sizes: forged(good, model_config=lambda c: c | change)
       for sizes in TOO_LARGE},
    "a weight of another shape": lambda good: forged(good, model=lambda m: m | {"history.tau": torch.zeros(3)}),
    "a weight missing": lambda good: forged(good, model=lambda m: {n: t for n, t in m.items() if n != "history.tau"}),
    "a weight too many": lambda good: forged(good, model=lambda m: m | {"more": torch.zeros(3)}),
    "a weight that is none": lambda good: forged(good, model=lambda m: m | {"history.tau": "60"}),
    "no weight": lambda good: forged(good, model={}),
    **{f"weights of {kind}": lambda good, kind=kind: forged(good, model=lambda m: m | {
        "history.tau": m["history.tau"].to(kind)}) for kind in (torch.float16, torch.float64, torch.complex64, torch.int8)},
    "a sparse weight": lambda good: forged(good, model=lambda m: m | {
        "setvae.dim_reducer.weight": m["setvae.dim_reducer.weight"].to_sparse()}),
    **{f"{name} of {value} in the normalizer": lambda good, name=name, value=value: forged(
        good, normalizer=lambda n: n | {name: torch.full_like(n[name], value)})
       for name, value in [("std", 0), ("std", -1), ("std", np.nan), ("mean", np.inf), ("log_scale", -1)]},
    "a normalizer of numbers for names": lambda good: forged(
        good, normalizer=lambda n: n | {"variables": [*range(len(n["variables"]))]}),
    **{f"{name} of {value!r} in the source's data": lambda good, name=name, value=value: forged(
        good, source=lambda s: s | {"data": {name: value}})
       for name, value in [("cache_dir", "elsewhere"), ("unheard_of", 1), ("data_dir", 7), ("synthetic_stays", "24"),
                           ("hours", True), ("label_file", ["a"])]},
    **{f"{name} of {value!r} in the source": lambda good, name=name, value=value: forged(
        good, source=lambda s: s | {name: value})
       for name, value in [("data", []), ("fingerprint", 7), ("command", None), ("versions", "2.0")]},
    **{f"{name} of {value!r}": lambda good, name=name, value=value: forged(good, **{name: value})
       for name, value in [("asked_at", "6"), ("maps", []), ("mode", 3), ("run", "options")]},
    "a split of numbers": lambda good: forged(good, split=lambda s: s | {"test": [1, 2]}),
    "subjects that are one text": lambda good: forged(good, subjects=lambda s: s | {"test": "1, 2"}),
    **{f"a threshold of {value!r}": lambda good, value=value: forged(good, metrics=lambda m: m | {"threshold": value})
       for value in (2.0, "0.5", np.nan)},
    "a model config of more weights than the file holds": lambda good: forged(
        good, model_config=lambda c: c | {"ff_dim": 2**18}),
    "a weight of one element that claims a million million": lambda good: forged(
        good, model=lambda m: m | {"cls_head.0.weight": torch.zeros(1).expand(2**40)}),
    "packed": lambda good: packed(good, 0), "a bomb": lambda good: packed(good, 2**26),
    "members that overlap": lambda good: overlapping(good),
    "no model config": lambda good: forged(good, model_config={}),
    "features of an earlier version": lambda good: forged(good, model_config=lambda c: c | {"features": "beliefs"}),
    "a vocabulary of text": lambda good: forged(good, vocabulary="HR"),
    "a vocabulary of another size": lambda good: forged(good, vocabulary=lambda v: v[1:]),
    "no normalizer": lambda good: forged(good, normalizer={}),
    "a normalizer of another size": lambda good: forged(good, normalizer=lambda n: n | {"mean": n["mean"][1:]}),
    "no source": lambda good: forged(good, source={}),
    "no split": lambda good: forged(good, split={}),
    "no metrics": lambda good: forged(good, metrics={}),
    "another version": lambda good: forged(good, format=4), "an earlier version": lambda good: forged(good, format=1),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_checkpoint_that_lies_is_one_line_and_exit_code_2(tmp_path, capsys, small_finetuned, what):
    content = FORGED[what](small_finetuned)
    if isinstance(content, bytes):
        (tmp_path / "bad.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "bad.pt")
    one_error_line(capsys, main(["--checkpoint", str(tmp_path / "bad.pt")]), tmp_path / "bad.pt")


# ---- inputs that are odd or wrong ------------------------------------------------------------------------------------

def table_of(stays: dict) -> str:
    """events.csv of {stay: [(minute, variable, value)]}."""
    return "stay_id,minute,variable,value\n" + "".join(f"{stay},{m},{v},{x}\n" for stay, rows in stays.items()
                                                       for m, v, x in rows)


def plain_stay(seed, rows=12):
    rng = np.random.default_rng(seed)
    return [(int(m), f"lab{v}", round(float(x), 2))
            for m, v, x in zip(rng.integers(0, 900, rows), rng.integers(0, 4, rows), rng.normal(7, 2, rows))]


STAYS = {f"s{i:02d}": plain_stay(i) for i in range(30)}
LABELS = "stay_id,label\n" + "".join(f"s{i:02d},{i % 2}\n" for i in range(30))
ODD = {  # one stay of thirty: what works, in both modes
    "a stay with one event": [(3, "lab0", 1)],
    "a stay of 20,000 events": [(m // 40, f"lab{m % 4}", m % 7) for m in range(20_000)],
    "a set of 5,000 events": [(1, f"lab{m % 4}", m % 7) for m in range(5_000)],
    "values of 1e30": [(m, "lab1", 1e30) for m in range(5)],
    "values of -3e38 and 3e38": [(0, "lab1", -3e38), (1, "lab1", 3e38), (2, "lab2", 3e38)],
    "values that are no numbers": [(0, "lab1", "nan"), (1, "lab1", "inf"), (2, "lab1", "-inf"), (3, "lab1", 1e39),
                                   (4, "lab1", ""), (5, "lab1", 2)],
    "a constant variable": [(m, "constant", 7) for m in range(9)],
    "unsorted minutes": [(m, "lab1", m) for m in (9, 3, 7, 3, 0)],
    "a century": [(0, "lab0", 1), (52_560_000, "lab0", 2)],
    "a name in any script": [(0, "Na⁺ 血", 1)],
    "every row twice": plain_stay(3) * 2,
}


@pytest.mark.parametrize("what", ODD)
def test_odd_input_works_in_both_modes(tmp_path, small_models, what):
    write(tmp_path / "data/events.csv", table_of(STAYS | {"s04": ODD[what]}))
    write(tmp_path / "data/labels.csv", LABELS)
    data_dir = ["--data_dir", str(tmp_path / "data")]
    assert train.main([*PRETRAIN, *data_dir, "--run_dir", str(tmp_path / "run")]) == 0
    assert train.main([*FINETUNE, str(tmp_path / "run" / "best.pt"), "--run_dir", str(tmp_path / "head")]) == 0
    for run in ("run", "head"):
        assert np.isfinite(pd.read_csv(tmp_path / run / "metrics.csv").to_numpy()).all()


WRONG = {  # (events.csv, labels.csv, mode, what the message names)
    "minutes beyond any stay": (table_of(STAYS | {"s04": [(1e30, "lab0", 1)]}), LABELS, "pretrain",
                                "events.csv line 50: minute is 1e+30"),
    "gzip where text belongs": (gzip.compress(table_of(STAYS).encode()), LABELS, "pretrain", "events.csv: not UTF-8"),
    "no number at all": (table_of({s: [(m, v, "inf") for m, v, _ in rows] for s, rows in STAYS.items()}), LABELS,
                            "pretrain", "no usable event"),
    "a label that is no class": (table_of(STAYS), LABELS.replace("s07,1", "s07,3"), "pretrain",
                                 "labels.csv line 9: label is '3'"),
    "no label in finetune": (table_of(STAYS), None, "finetune", "no label at all"),
    "one class in finetune": (table_of(STAYS), LABELS.replace(",1", ",0"), "finetune",
                              "train stays hold one class only (0 of 19 labels are 1)"),
    "other variables in finetune": (table_of({s: [(m, "other", x) for m, _, x in rows] for s, rows in STAYS.items()}),
                                    LABELS, "finetune", "none of the data's variables"),
    "a split without train": (table_of(STAYS),
                              LABELS.replace("label\n", "label,split\n").replace(",0\n", ",0,valid\n")
                              .replace(",1\n", ",1,test\n"), "pretrain", "0 train and 15 valid stays"),
    "labels of nobody": (table_of(STAYS), LABELS.replace("s", "t").replace("ttay", "stay"), "finetune",
                         "no label at all"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_before_training(tmp_path, capsys, small_finetuned, what):
    events, labels, mode, named = WRONG[what]
    write(tmp_path / "data/events.csv", events)
    if labels is not None:
        write(tmp_path / "data/labels.csv", labels)
    pretrained = small_finetuned.parent.parent / "pretrain" / "best.pt"
    if mode == "finetune" and "variables" not in what:  # a checkpoint that knows them
        torch.save(forged(pretrained, normalizer=lambda n: n | {"variables": ["lab0", *n["variables"][1:]]}),
                   tmp_path / "known.pt")
        pretrained = tmp_path / "known.pt"
    command = [*FINETUNE, str(pretrained)] if mode == "finetune" else PRETRAIN
    one_error_line(capsys, train.main([*command, "--data_dir", str(tmp_path / "data"), "--run_dir",
                                       str(tmp_path / "run")]), named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--max_epochs", "-1"], ["--max_epochs", "0"], ["--batch_size", "x"],
                                     ["--batch_size", "-3"], ["--seed", "-1"],
                                     ["--seed", "1.5"], ["--synthetic_stays", "0"], ["--synthetic_stays", "1" + "0" * 15], ["--label_fraction", "nan"],
                                     ["--label_fraction", "0"], ["--label_fraction", "2"],
                                     ["--precision", "fp8"], ["--objective", "mine"], ["--max_epoch", "3"]],
                         ids=" ".join)
def test_a_wrong_option_is_named(capsys, options):
    one_error_line(capsys, train.main([*PRETRAIN, *options]), options[0].lstrip("-"))


@pytest.mark.parametrize("options, named",
                         [(["--device", "cuda:99"], "--device cuda:99"), (["--device", "meta"], "--device meta"),
                          (["--device", ""], "--device"), (["--synthetic_stays", "1"], "1 stays"),
                          (["--synthetic_stays", "1" + "0" * 9], "MB are free"),
                          (["--data_dir", "/dev/null"], "/dev/null")])
def test_an_option_that_cannot_be_met_is_one_line(tmp_path, capsys, options, named):
    one_error_line(capsys, train.main([*PRETRAIN, *options, "--run_dir", str(tmp_path / "run")]), named)


def test_a_label_fraction_too_small_is_one_line(tmp_path, capsys, small_pretrained):
    capsys.readouterr()
    one_error_line(capsys, train.main([*FINETUNE, str(small_pretrained / "best.pt"), "--label_fraction", "1e-9",
                                       "--run_dir", str(tmp_path / "run")]),
                   "--label_fraction 1e-09")


# ---- random damage ---------------------------------------------------------------------------------------------------

def damaged(rng, body: bytes) -> bytes:
    """One to three of: bits flipped, a part cut out, a part repeated, a byte that means something put in, the end cut
    off."""
    body = bytearray(body)
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(0, max(1, len(body)))), int(rng.integers(1, 40))
        kind = rng.integers(0, 5)
        if kind == 0 and body:
            body[at % len(body)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del body[at:at + size]
        elif kind == 2:
            body[at:at] = body[at:at + size]
        elif kind == 3:
            body[at:at] = rng.choice([b",", b"\n", b"\r", b"\0", b'"', b"-", b"e9", b".", b"nan", b"\xff", b"1" * 30,
                                      b"\n\n", b" "])
        else:
            del body[at + (len(body) - at) // 2:]
    return bytes(body)


def damaged_table(rng, folder):
    body = damaged(rng, EVENTS.encode() + table_of(dict(list(STAYS.items())[:2])).split("\n", 1)[1].encode())
    write(folder / "events.csv", body)
    write(folder / "labels.csv",
          damaged(rng, b"stay_id,label\n7,1\n8,0\n") if rng.random() < .3 else "stay_id,label\n7,1\n8,0\n")
    return lambda: body.partition(b"\n")[2].rstrip(b"\n").count(b"\n") + 1


def damaged_physionet(rng, folder):
    write_physionet(folder, archive=rng.random() < .3)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    path = files[rng.integers(0, len(files))]
    path.write_bytes(damaged(rng, path.read_bytes()))
    return None


def works(folder, rows):
    """Read the data, and check what was read as far as it can be known."""
    cohort = load_cohort(str(folder), cache_dir=folder.parent / "cache")
    batch = StayDataset(cohort, Normalizer.fit(cohort, np.arange(len(cohort))))[np.arange(len(cohort))]
    given = torch.from_numpy(~np.isnan(cohort.event_value))
    assert torch.isfinite(batch.event_value[given]).all() and torch.isfinite(batch.minute).all()
    assert all((np.diff(cohort.set_minute[a:b]) >= 0).all() for a, b in zip(cohort.stay_start, cohort.stay_start[1:]))
    assert len(batch.event_value) == len(cohort.event_value) == cohort.set_start[-1]
    assert set(np.unique(cohort.label)) <= {-1, 0, 1}
    if rows:
        assert len(cohort.event_value) + sum(n for name, n in cohort.notes.items() if name.startswith("rows")) == rows()


def test_a_randomly_damaged_input_works_or_is_refused(tmp_path, small_finetuned):
    def hang(*_):
        pytest.fail("a hang")
    signal.signal(signal.SIGALRM, hang)
    ended = collections.Counter()
    for seed in range(2000 if SOAK else 200):
        rng, folder = np.random.default_rng([6, seed]), tmp_path / f"{seed}" / "data"
        folder.parent.mkdir()
        kind = ("table", "PhysioNet 2012", "checkpoint")[seed % 3]
        signal.alarm(20)
        try:
            if kind == "checkpoint":
                write(folder / "c.pt", damaged(rng, small_finetuned.read_bytes()))
                Predictor.with_data(folder / "c.pt")
            else:
                works(folder, (damaged_table if kind == "table" else damaged_physionet)(rng, folder))
            ended[f"{kind} works"] += 1
        except InputError as error:
            assert "\n" not in str(error) and str(folder) in str(error) or "stay " in str(error), (seed, error)
            ended[f"{kind} refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kind}: {type(error).__name__}") from error
        finally:
            signal.alarm(0)
        shutil.rmtree(folder.parent)
    print(f"\nrandomly damaged inputs: {dict(ended)}")
    assert min(ended["table works"], ended["table refused"], ended["PhysioNet 2012 works"],
               ended["PhysioNet 2012 refused"], ended["checkpoint refused"]) > 5


# ---- numerics --------------------------------------------------------------------------------------------------------

def test_a_gradient_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, small_models):
    command = [*PRETRAIN, "--max_epochs", "2", "--batch_size", "3"]
    assert train.main([*command, "--run_dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "clip_and_step", lambda *a, step=train.clip_and_step, steps=itertools.count():
                      step(*a) * (np.nan if next(steps) == 7 else 1))
        capsys.readouterr()
        one_error_line(capsys, train.main([*command, "--run_dir", str(tmp_path / "cut")]),
                       "step 7: the loss or its gradient is not finite (stays synthetic-")
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["trainer"]["position"] == [1, 0]
    assert train.main([*command, "--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("factor, scale, steps", [(1e10, 2.0**100, 12), (np.inf, 2.0**16, 40)])
def test_an_overflow_of_fp16_is_skipped_and_stops_the_run_when_it_persists(factor, scale, steps):
    model = nn.Linear(2, 1)
    before, scaler = model.weight.detach().clone(), torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer, overflows = torch.optim.SGD(model.parameters(), lr=1.0), 0
    try:
        for step in range(steps):
            scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
            norm = train.clip_and_step(model, optimizer, scaler, 1.0)
            overflows += not norm.isfinite()
            train.finite_or_stop(norm, step, ["a stay"], scaler)
            assert norm.isfinite() != torch.equal(model.weight, before)  # a step that overflows changes nothing
            before = model.weight.detach().clone()
        # 2^100 * 1e10 / 2^6 is a float32
        assert factor == 1e10 and overflows == 6 and torch.isfinite(model.weight).all()
    except InputError as error:
        assert factor == np.inf and step == 19 and "fp16" in str(error) and torch.isfinite(model.weight).all()


# ---- no leak, the same twice -----------------------------------------------------------------------------------------

def weights_equal(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"]) and all(
        torch.equal(a["normalizer"][name], b["normalizer"][name])
        for name in ("mean", "std", "log_scale")) and a["metrics"] == b["metrics"] and (
        a["normalizer"]["variables"] == b["normalizer"]["variables"])


def test_test_stays_change_nothing_that_is_learned_or_chosen(tmp_path, monkeypatch, small_models):
    """Other variables (one that only they hold), values, minutes and labels of the test stays: equal weights,
    normalizer, metrics, threshold and best epoch, in both modes."""
    cohort = synthetic_cohort(24)
    split = np.arange(24) % 3
    split[np.flatnonzero(cohort.label == 1)[:3]] = 0, 1, 2  # both classes in each part
    cohort = replace(cohort, split=split.astype(np.int8))
    test = np.flatnonzero(split == 2)
    other = replace(cohort, event_value=cohort.event_value.copy(), answers=cohort.answers.copy(),
                    set_minute=cohort.set_minute.copy(), variables=[*cohort.variables, "unseen"],
                    event_variable=cohort.event_variable.copy(), vectors=np.zeros((45, 0), np.float32),
                    statistics=np.full((45, 2), np.nan, np.float32))
    tested = stay_event_index(cohort, test)
    other.event_value[tested] *= -7
    other.event_variable[tested] = np.where(np.arange(len(tested)) % 2, cohort.variables.index("Weight"), 44)
    other.set_minute[ranges(cohort.stay_start[test], np.diff(cohort.stay_start)[test])] += 99
    other.answers[test] = 1 - other.answers[test]
    for name, data_set in (("a", cohort), ("b", other)):
        monkeypatch.setattr(runs, "load_cohort", lambda *_, data_set=data_set, **__: data_set)
        assert train.main([*PRETRAIN, "--max_epochs", "2", "--run_dir", str(tmp_path / name)]) == 0
        for mode in ([], ["--full_training"]):
            words = ["--max_epochs", "2", "--set", "most_variables=6", *mode]
            assert train.main([*FINETUNE, str(tmp_path / name / "best.pt"), *words, "--run_dir",
                               str(tmp_path / f"{name}{len(mode)}")]) == 0
    for run in ("", "0", "1"):
        assert weights_equal(tmp_path / f"a{run}" / "best.pt", tmp_path / f"b{run}" / "best.pt")
        same_run(tmp_path / f"a{run}", tmp_path / f"b{run}")


def test_labels_never_reach_pretraining(tmp_path, monkeypatch, small_models):
    cohort = replace(synthetic_cohort(24), split=(np.arange(24) % 3).astype(np.int8))
    for name, answers in (("a", cohort.answers), ("b", 1 - cohort.answers), ("c", cohort.answers * np.nan)):
        monkeypatch.setattr(runs, "load_cohort", lambda *_, answers=answers, **__: replace(cohort, answers=answers))
        assert train.main([*PRETRAIN, "--run_dir", str(tmp_path / name)]) == 0
    same_run(tmp_path / "a", tmp_path / "b"), same_run(tmp_path / "a", tmp_path / "c")


def test_outcome_columns_are_never_inputs(tmp_path):
    read = []
    for name, outcomes in (("a", OUTCOMES),
                           ("b", OUTCOMES.replace("6,1,5,-1", "9,9,9,9").replace("16,8,8,4", "1,1,1,1"))):
        read.append(load_cohort(str(write_physionet(tmp_path / name, outcomes=outcomes)), cache_dir=tmp_path / "cache"))
    assert read[0].fingerprint == read[1].fingerprint
    assert not {"SAPS-I", "SOFA", "Length_of_stay", "Survival", "In-hospital_death",
                "RecordID"} & set(read[0].variables)


def test_scoring_data_that_overlap_the_training_stays_says_so(tmp_path, small_finetuned, capsys):
    cohort = synthetic_cohort(24)
    name = np.array(cohort.variables)[cohort.event_variable]
    stay = np.repeat(cohort.stay_id, cohort.stay_events)
    table = pd.DataFrame({"stay_id": stay, "minute": np.repeat(cohort.set_minute, np.diff(cohort.set_start)),
                          "variable": name, "value": cohort.event_value})
    again = table.assign(stay_id="new-" + table["stay_id"])
    write(tmp_path / "data/events.csv", pd.concat([table, again]).to_csv(index=False))
    labels = pd.DataFrame({"stay_id": [*cohort.stay_id, *("new-" + cohort.stay_id.astype(object))],
                           "label": [*cohort.label, *cohort.label]})
    write(tmp_path / "data/labels.csv", labels.to_csv(index=False))
    assert main(["--checkpoint", str(small_finetuned), "--data_dir", str(tmp_path / "data")]) == 0
    seen = forged(small_finetuned)["split"]
    left_out = len(seen["train"]) + len(seen["valid"])
    told = capsys.readouterr().out
    assert f"{left_out} stays left out of subjects that the checkpoint was trained or selected on" in told


def test_who_was_pretrained_on_is_not_tested_when_labels_and_other_times_come_later(tmp_path, capsys, small_models):
    """Labels come after pretraining, then questions at other times, then the same patients under other stay ids."""
    stays = {f"s{i:02d}": plain_stay(i) for i in range(60)}
    data, again = tmp_path / "data", tmp_path / "again"
    write(data / "events.csv", table_of(stays))
    assert train.main([*PRETRAIN, "--data_dir", str(data), "--run_dir", str(tmp_path / "run")]) == 0
    write(data / "labels.csv", "stay_id,label\n" + "".join(f"s{i:02d},{i % 2}\n" for i in range(60)))
    assert train.main([*FINETUNE, str(tmp_path / "run/best.pt"), "--run_dir", str(tmp_path / "head")]) == 0
    before, after = (forged(tmp_path / run / "best.pt")["split"] for run in ("run", "head"))
    assert before == after
    capsys.readouterr()
    write(tmp_path / "hourly.csv", "stay_id,label,minute\n" + "".join(f"s{i:02d},{i % 2},500\n" for i in range(60)))
    command = ["--checkpoint", str(tmp_path / "head/best.pt")]
    assert main([*command, "--label_file", str(tmp_path / "hourly.csv")]) == 0
    assert f"Scored: {len(after['test'])} stays" in capsys.readouterr().out

    write(again / "events.csv", table_of({f"new {name}": rows for name, rows in stays.items()}))
    write(again / "labels.csv", "stay_id,label,subject_id\n" + "".join(
        f"new s{i:02d},{i % 2},s{i:02d}\n" for i in range(60)))
    assert main([*command, "--data_dir", str(again)]) == 0
    said = "48 stays left out of subjects that the checkpoint was trained or selected on"
    out = capsys.readouterr().out
    assert said in out and "Scored: 12 stays" in out


def test_no_split_tests_whom_the_checkpoint_learned_from(tmp_path, monkeypatch, capsys, small_models):
    """Whether patients come with labels that are given late, with a split of theirs, or with other data's."""
    monkeypatch.chdir(tmp_path)
    stays = {f"s{i:02d}": plain_stay(i) for i in range(60)}
    write(Path("data/events.csv"), table_of(stays))
    write(Path("more/events.csv"), table_of(stays | {f"n{i}": plain_stay(i) for i in range(20)}))
    assert train.main([*PRETRAIN, "--data_dir", "data", "--run_dir", "run"]) == 0
    ids = [*stays, *(f"n{i}" for i in range(20))]
    table = pd.DataFrame({"stay_id": ids, "label": [i % 2 for i in range(80)], "part": [i // 20 for i in range(80)]})
    table["split"] = table["part"].map({0: "test", 1: "valid", 2: "train", 3: "train"})
    table["subject_id"] = [f"p{i - 30 if 30 <= i < 40 else i}" for i in range(80)]  # ten have two stays
    table[["stay_id", "label"]].to_csv("labels.csv", index=False)
    table[["stay_id", "label"]].to_csv("more/labels.csv", index=False)
    table[["stay_id", "label", "subject_id"]][:60].to_csv("patients.csv", index=False)
    table[["stay_id", "label", "split"]][:60].to_csv("labels with split.csv", index=False)
    table[["stay_id", "split"]].to_csv("split.csv", index=False)
    capsys.readouterr()
    for name, words in (("patients.csv", ["--label_file", "patients.csv"]),
                        ("labels with split.csv", ["--label_file", "labels with split.csv"]),
                        ("split.csv", ["--label_file", "labels.csv", "--split", "split.csv"]),
                        ("split.csv", ["--data_dir", "more", "--split", "split.csv"])):
        code = train.main([*FINETUNE, "run/best.pt", "--run_dir", "refused", *words])
        one_error_line(capsys, code, f"{name}: the split tests ")
        assert not Path("refused").exists()

    assert train.main([*FINETUNE, "run/best.pt", "--run_dir", "head", "--label_file", "labels.csv"]) == 0
    Path("labels with split.csv").rename("data/labels.csv")  # a split that the folder tells later
    capsys.readouterr()
    code = train.main([*FINETUNE, "run/best.pt", "--run_dir", "refused"])
    one_error_line(capsys, code, "long table events.csv: the split tests ")
    split = forged(Path("head/best.pt"))["split"]
    seen, tested = {*split["train"], *split["valid"]}, set(split["test"])
    capsys.readouterr()
    assert main(["--checkpoint", "head/best.pt", "--label_file", "patients.csv"]) == 0
    whose = table.set_index("stay_id")["subject_id"]
    again = sum(whose[stay] in set(whose[list(seen)]) for stay in tested)
    assert again and f"; {again} stays left out of subjects that" in capsys.readouterr().out
    assert main(["--checkpoint", "head/best.pt", "--split", "split.csv"]) == 0
    asked = set(table["stay_id"][:20])
    out = capsys.readouterr().out
    renamed = pd.read_csv("more/labels.csv").assign(subject_id=[f"p{i}" for i in range(80)])
    renamed.to_csv("more/labels.csv", index=False)  # other data, which names patients that the checkpoint does not
    assert main(["--checkpoint", "head/best.pt", "--data_dir", "more"]) == 0
    assert f"Scored: {80 - len(seen)} stays" in capsys.readouterr().out
    assert train.main([*FINETUNE, "run/best.pt", "--run_dir", "beside", "--data_dir", "more"]) == 0
    assert not seen & {*forged(Path("beside/best.pt"))["split"]["test"]}
    assert f"Scored: {len(asked - seen)} stays" in out and f"split.csv; {len(asked & seen)} stays left out" in out


@pytest.mark.parametrize("mode", SMALL)
def test_the_same_command_twice_gives_equal_bits(tmp_path, monkeypatch, small_pretrained, mode):
    monkeypatch.chdir(tmp_path)
    for name in ("once", "twice"):
        assert train.main([*SMALL[mode], "--run_dir", name]) == 0
    same_run(tmp_path / "once", tmp_path / "twice")
    assert weights_equal(tmp_path / "once" / "best.pt", tmp_path / "twice" / "best.pt")


def test_a_checkpoint_tells_where_it_comes_from(small_finetuned, capsys):
    assert main(["--checkpoint", str(small_finetuned)]) == 0
    source, out = forged(small_finetuned)["source"], capsys.readouterr().out
    for told in (source["command"], f"seed {source['seed']}", source["fingerprint"], f"torch {torch.__version__}",
                 f"numpy {np.__version__}"):
        assert told in out
