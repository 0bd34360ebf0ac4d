"""Fixtures that several test files share: checkpoints (each trained once), readers with a cache of their own."""

import multiprocessing
import os
from functools import partial
from pathlib import Path

import pytest

import runs
import train
from readers import load_cohort
from tests.tiny import FINETUNE, PRETRAIN, make_small


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing that a test reads lands in the project's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_cohort", partial(load_cohort, cache_dir=tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """best.pt of one epoch of pretraining, default sizes, through the command line."""
    run = tmp_path_factory.mktemp("runs") / "pretrain"
    assert train.main([*PRETRAIN, "--run_dir", str(run)]) == 0
    return run / "best.pt"


@pytest.fixture(scope="session")
def finetuned(pretrained):
    """best.pt of one epoch of frozen finetuning on it."""
    run = pretrained.parent.parent / "finetune"
    assert train.main([*FINETUNE, str(pretrained), "--run_dir", str(run)]) == 0
    return run / "best.pt"


@pytest.fixture
def load(tmp_path):
    return lambda folder, **options: load_cohort(str(folder), cache_dir=tmp_path / "cache", **options)


@pytest.fixture
def small_models(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture
def small_pretrained(small_models, tmp_path):
    """The run folder of one epoch of pretraining a tiny model."""
    assert train.main([*PRETRAIN, "--run_dir", str(tmp_path / "pretrain")]) == 0
    return tmp_path / "pretrain"


@pytest.fixture(scope="session")
def processes():
    """Starts real processes, forked from a server that has imported everything already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(train.__file__).parent))
        context = multiprocessing.get_context("forkserver")
        # an optimizer imports the latter, for a second
        context.set_forkserver_preload(["tests.test_train", "tests.test_faults", "torch._dynamo"])
        context.Process(target=os.getpid).start()  # the server
        yield context.Process


@pytest.fixture(scope="session")
def small_finetuned(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        home = tmp_path_factory.mktemp("small")
        assert train.main([*PRETRAIN, "--run_dir", str(home / "pretrain")]) == 0
        assert train.main([*FINETUNE, str(home / "pretrain" / "best.pt"), "--run_dir", str(home / "finetune")]) == 0
    return home / "finetune" / "best.pt"
