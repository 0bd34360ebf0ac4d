"""A tiny world that the tests share: stays as plain lists, models of width 16, data folders of a few lines,
and the command lines that train on them."""

import io
import os
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

import runs
import train
from batches import EventBatch, Normalizer, StayDataset, variable_vectors
from data import Cohort, build_cohort
from model import ModelConfig
from readers import load_cohort
from train import finetune

SHARED = Path(train.__file__).resolve().parent.parent / "shared"


# ----------------------------------------------------------------------------------------------------------------------
# A tiny world: stays as plain lists [[(minute, [(variable, value), ...]), ...], ...], seven variables, models of width
# 16
# ----------------------------------------------------------------------------------------------------------------------

NAMES = [f"lab{v}" for v in range(7)]
# values as they are
PLAIN = Normalizer(NAMES, np.zeros(7, np.float32), np.ones(7, np.float32), np.zeros(7, np.float32))


def random_stays(lengths=(1, 4, 9, 6), seed=0, valueless=0.0):
    """Sets of 1 to 9 events, variables drawn with replacement: multisets. `valueless`: the share of events without a
    value."""
    rng = np.random.default_rng(seed)
    stays = [[(int(minute), [(int(v), float(rng.normal())) for v in rng.integers(0, 7, rng.integers(1, 10))])
              for minute in np.sort(rng.choice(3000, length, replace=False))] for length in lengths]
    if valueless:
        stays = [[(minute, [(v, np.nan if rng.random() < valueless else x) for v, x in events])
                  for minute, events in stay]
                 for stay in stays]
    return stays


def cohort_of(stays) -> Cohort:
    events = [(p, minute, v, x) for p, stay in enumerate(stays) for minute, events in stay for v, x in events]
    return build_cohort("handmade", NAMES, *map(np.array, zip(*events)),
                        stay_id=[f"stay{p}" for p in range(len(stays))], answers=np.arange(len(stays)) % 2)


def batch_of(stays, max_groups=6) -> EventBatch:
    return StayDataset(cohort_of(stays), PLAIN, max_groups, points=True)[np.arange(len(stays))]


def tiny(**changes) -> ModelConfig:
    return ModelConfig(**{**dict(num_variables=7, input_dim=12, reduced_dim=8, set_dim=12, latent_dim=16, set_heads=2,
                                 inducing=3, layers=2, heads=2, ff_dim=24, queries=0), **changes})


def build(kind, config, seed=1):
    """A model in evaluation mode whose every parameter is off its initial value (a LayerNorm that starts as the
    identity hides mistakes)."""
    torch.manual_seed(seed)
    model = kind(config, variable_vectors([f"lab{v}" for v in range(config.num_variables)], config.input_dim)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def encoded(model, stays):
    """mu, logvar, h of the sets, [B, L, d], as pretraining computes them."""
    batch = batch_of(stays)
    with torch.no_grad():
        mu, logvar = model.setvae.encode(batch)
        return mu, logvar, model.history(mu, batch.minute)


# The precision is named: `auto` depends on the processor.
SHORT = ["--device", "cpu", "--precision", "fp32", "--max_epochs", "1"]
PRETRAIN = ["--mode", "pretrain", "--synthetic_stays", "24", *SHORT]
FINETUNE = ["--mode", "finetune", *SHORT, "--pretrained_ckpt"]


def one_error_line(capsys, code, named):
    """The whole contract of a refused input: exit code 2 and one line on stderr that starts with error: and names the
    culprit."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and str(named) in error, error


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class Call:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def as_lists(cohort: Cohort):
    """stay id -> [(minute, [(variable name, value), ...]), ...]"""
    out = {}
    for p, name in enumerate(cohort.stay_id):
        out[str(name)] = [(float(cohort.set_minute[t]),
                           [(cohort.variables[cohort.event_variable[e]], float(cohort.event_value[e]))
                            for e in range(cohort.set_start[t], cohort.set_start[t + 1])])
                          for t in range(cohort.stay_start[p], cohort.stay_start[p + 1])]
    return out


RECORDS = {
    "132539": "00:00,RecordID,132539\n00:00,Age,54\n00:00,Gender,0\n00:00,Height,-1\n00:00,ICUType,4\n00:00,Weight,-1\n"
              "00:07,HR,73\n00:07,HR,77\n00:07,,3\n26:05,BaseExcess,-1\n",
    "132540": "00:00,RecordID,132540\n00:00,Age,76\n00:00,Gender,1\n00:00,Height,175.3\n"
              "00:00,ICUType,2\n00:00,Weight,80\n01:10,HR,88\n",
}
OUTCOMES = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n132539,6,1,5,-1,0\n132540,16,8,8,4,1\n"


def write_physionet(folder: Path, archive=False, records=RECORDS, outcomes=OUTCOMES,
                    header="Time,Parameter,Value\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "Outcomes-a.txt").write_text(outcomes)
    if archive:
        with tarfile.open(folder / "set-a.tar.gz", "w:gz") as tar:
            for name, body in records.items():
                member = tarfile.TarInfo(f"set-a/{name}.txt")
                member.size = len(content := (header + body).encode())
                tar.addfile(member, io.BytesIO(content))
    else:
        (folder / "set-a").mkdir()
        for name, body in records.items():
            (folder / "set-a" / f"{name}.txt").write_text(header + body)
    return folder


def same_run(whole: Path, resumed: Path):
    assert (whole / "metrics.csv").read_text() == (resumed / "metrics.csv").read_text()
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(run / name, weights_only=True)["model"] for run in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a)


def events_of(cohort) -> dict:
    """{stay: [(minute, [(variable, value or None), ...])...]}: a cohort spelled out."""
    stays = {}
    for p, stay in enumerate(cohort.stay_id):
        sets = []
        for t in range(cohort.stay_start[p], cohort.stay_start[p + 1]):
            events = slice(cohort.set_start[t], cohort.set_start[t + 1])
            pairs = zip(cohort.event_variable[events], cohort.event_value[events])
            sets.append((float(cohort.set_minute[t]),
                         [(cohort.variables[v], None if np.isnan(x) else round(float(x), 4)) for v, x in pairs]))
        stays[str(stay)] = sets
    return stays


def labels_of(cohort) -> dict:
    return dict(zip(cohort.stay_id.tolist(), cohort.label.tolist()))


def splits_of(cohort) -> dict:
    return dict(zip(cohort.stay_id.tolist(), cohort.split.tolist()))


def counted(cohort) -> dict:
    """What the reader noted, but how many files it read."""
    return {reason: count for reason, count in cohort.notes.items() if count and reason != "files read"}


EVENTS = """stay_id,minute,variable,value
7,60,HR,80
007,0,NA,139
7,0,HR,90
7,60,HR,82
7,60,,1
7,61,pH,
7,61.5,K,inf
8,5,"Na, serum",140
9,5,K,
"""

SOAK = "SEQSETVAE_SOAK" in os.environ  # set by `python test_suite.py --soak`
SMALL = {"pretrain": [*PRETRAIN, "--batch_size", "3", "--max_epochs", "3"],
         "head": [*FINETUNE, "pretrain/best.pt", "--max_epochs", "6"],
         "full training": [*FINETUNE, "pretrain/best.pt", "--full_training", "--batch_size", "3", "--max_epochs", "2"]}


def make_small(patch):
    patch.setattr(train, "ModelConfig", lambda v: tiny(num_variables=v))
    patch.setattr(finetune.__defaults__[0], "max_trainable_ratio", 1.0)  # of a tiny backbone the head is more than 5%


def small_process(home: str, command: list, **changes):
    """What a child process does: a run of a tiny model in the folder `home`, its output in the file log there."""
    os.chdir(home)
    sys.stdout = sys.stderr = open("log", "a", buffering=1)
    train.ModelConfig = lambda v: tiny(num_variables=v, **changes)
    runs.load_cohort = partial(load_cohort, cache_dir="cache")
    finetune.__defaults__[0].max_trainable_ratio = 1.0
    sys.exit(train.main(command))


def finished(process, seconds=120) -> int:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("a hang")
    return process.exitcode
