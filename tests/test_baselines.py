"""Tests of baselines.py for each kind of outcome."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression

import baselines
from baselines import (ALONE, BOOSTING, LOGISTIC, MARGINAL, RIDGE, SHALLOW, USUAL, each_class, each_outcome, numbers,
                       without_backbone)
from batches import StayDataset
from finetune_config import FinetuneConfig
from metrics import CHECKPOINT
from questions import labelled_points
from tasks import KINDS, Classes, Number, Several, Task
from tests.test_tasks import fitted_task, made_up
from tests.tiny import PLAIN

FEATURELESS = {"number": USUAL, "event": MARGINAL}
METHODS = {"binary": {LOGISTIC, BOOSTING, ALONE}, "several": {LOGISTIC, BOOSTING, ALONE},
           "classes": {LOGISTIC, BOOSTING, ALONE}, "number": {RIDGE, BOOSTING, USUAL, ALONE},
           "event": {MARGINAL, ALONE}}


@pytest.fixture(autouse=True)
def few_choices(monkeypatch):
    monkeypatch.setattr(baselines, "SHALLOW", {"max_iter": [30], "max_leaf_nodes": [6], "l2_regularization": [10.]})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_baselines_and_those_with_features_are_better_than_those_without(kind):
    cohort, x = made_up(kind, stays=300)
    stays, train, valid = np.arange(300), np.arange(160), np.arange(160, 200)
    test = labelled_points(cohort, np.arange(200, 300))
    points = labelled_points(cohort, train)
    task = Task.of(cohort).fitted(cohort, points, np.ones(len(points), dtype=np.float32))
    config = FinetuneConfig(trees=10, max_epochs=40, batch_size=16, learning_rate=.01, moments=0)
    told = without_backbone(task, StayDataset(cohort, PLAIN, points=True), train, labelled_points(cohort, valid), test, 0,
                            config=config)
    assert told.keys() == METHODS[kind]
    figures = {name: task.validation(cohort, test, given) for name, given in told.items()}
    for name, given in told.items():
        assert given.shape == (len(test), len(task.columns)) and np.isfinite(given).all(), name
        if name not in FEATURELESS.values() and kind in FEATURELESS:
            assert task.improves(figures[name], figures[FEATURELESS[kind]]), figures
        elif name not in FEATURELESS.values():
            assert figures[name][task.best] > .6, figures
