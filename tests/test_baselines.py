"""Tests of baselines.py for each kind of outcome."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

import baselines
from baselines import (ALONE, BOOSTING, LOGISTIC, MARGINAL, RIDGE, USUAL, each_class, each_outcome, numbers,
                       without_backbone)
from batches import StayDataset
from finetune_config import FinetuneConfig
from metrics import CHECKPOINT, incidence_curve
from plots import event_pictures
from questions import labelled_points
from tasks import KINDS, Classes, Number, Several, Task
from tests.test_tasks import fitted_task, made_up
from tests.tiny import PLAIN

ONE_CHOICE = {"max_iter": [30], "max_leaf_nodes": [6], "l2_regularization": [10.]}
BOOSTED = {"max_iter": 30, "max_leaf_nodes": 6, "l2_regularization": 10., "learning_rate": .05, "random_state": 0}
FEATURELESS = {"number": USUAL, "event": MARGINAL}
METHODS = {"binary": {LOGISTIC, BOOSTING, ALONE}, "several": {LOGISTIC, BOOSTING, ALONE},
           "classes": {LOGISTIC, BOOSTING, ALONE}, "number": {RIDGE, BOOSTING, USUAL, ALONE},
           "event": {MARGINAL, ALONE}}


@pytest.fixture(autouse=True)
def few_choices(monkeypatch):
    monkeypatch.setattr(baselines, "SHALLOW", ONE_CHOICE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_baselines_and_those_with_features_are_better_than_those_without(kind):
    cohort, _ = made_up(kind, stays=300)
    train, valid = np.arange(160), np.arange(160, 200)
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


def test_boosting_is_scikit_learns_of_each_outcome_and_of_the_classes_in_their_places():
    rng = np.random.default_rng(0)
    x, x_test, weight = rng.normal(size=(90, 3)), rng.normal(size=(20, 3)), np.ones(90)
    answers = (x[:, :2] + rng.normal(size=(90, 2)) > 0).astype(float)
    answers[::3, 0] = np.nan
    told = each_outcome(Several(("a", "b")), x, answers, weight, x_test, many=False)[BOOSTING]
    for k, rows in enumerate((np.arange(90) % 3 > 0, slice(None))):
        alone = HistGradientBoostingClassifier(**BOOSTED).fit(x[rows], answers[rows, k])
        np.testing.assert_array_equal(told[:, k], alone.predict_proba(x_test)[:, 1])
    words = np.where(answers[:, 1:] == 1, 2., 0.)  # of three classes that in the middle has no label
    told = each_class(Classes(("p", "q", "r")), x, words, weight, x_test, many=False)
    expected = HistGradientBoostingClassifier(**BOOSTED).fit(x, words[:, 0]).predict_proba(x_test)
    np.testing.assert_array_equal(told[BOOSTING][:, [0, 2]], expected)
    assert all((each[:, 1] == 0).all() and np.allclose(each.sum(1), 1) for each in told.values())


def test_numbers_are_learned_on_the_tasks_scale_and_answered_in_their_unit():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(600, 2)), rng.normal(size=600)
    y = (np.exp(1 + x[:, :1] + .3 * noise[:, None])).astype(np.float32)
    task, train, test = Number(mean=1., std=2., log_scale=3.), slice(0, 400), slice(400, 600)
    told = numbers(task, x[train], y[train], np.ones(400, dtype=np.float32), x[test], many=False)
    scaled = (np.log1p(y[:, 0] / 3) - 1) / 2
    boosting = HistGradientBoostingRegressor(loss="absolute_error", **BOOSTED).fit(x[train], scaled[train])
    center = 3 * np.expm1(2 * boosting.predict(x[test]) + 1)
    assert np.corrcoef(np.log(told[BOOSTING][:, 0]), np.log(center))[0, 1] > .9999
    assert abs(np.median(told[BOOSTING][:, 0] - center)) < .1
    for name, (median, low, high) in ((name, each.T) for name, each in told.items()):
        assert .7 < ((low <= y[test, 0]) & (y[test, 0] <= high)).mean() < .9, name
    assert told[USUAL][0].tolist() == pytest.approx(np.quantile(y[train], [.5, .1, .9]), rel=.05)
    error = {name: abs(each[:, 0] - y[test, 0]).mean() for name, each in told.items()}
    assert error[BOOSTING] < .7 * error[USUAL] and error[RIDGE] < .7 * error[USUAL]


@pytest.mark.parametrize("kind", set(KINDS) - {"binary"})
def test_a_methods_difference_is_paired_with_the_checkpoint_and_stands_in_the_tables(kind):
    cohort, _, points, task = fitted_task(kind)
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(len(points), task.outputs)))
    given = {CHECKPOINT: task.answer(logits), "the same": task.answer(logits), "other": task.answer(-logits)}
    figures = task.figures(cohort, points, given)
    assert figures["differences"].keys() == {"the same", "other"}
    for name, measure in figures["differences"]["the same"].items():
        assert measure == {"value": 0, "interval": [0, 0]}, name
    own, other = figures["methods"][CHECKPOINT], figures["methods"]["other"]
    for name, measure in figures["differences"]["other"].items():
        assert measure["value"] == pytest.approx(own[name]["value"] - other[name]["value"])
    first, second = list(task.tables(figures | {"scored": "these"}).values())
    assert list(first) == [CHECKPOINT, "the same", "other"] and list(second) == ["the same", "other"]


def test_the_picture_of_an_event_shows_what_came_in_each_third_and_its_calibration():
    pytest.importorskip("matplotlib")
    cohort, x, points, task = fitted_task("event")
    answers = cohort.answers[points].astype(float)
    risk = np.exp(x[points] - 4)[:, None] * np.array(task.horizons)
    given = np.concatenate([.7 * (1 - np.exp(-risk)), .3 * (1 - np.exp(-risk))], axis=1)
    methods = {CHECKPOINT: given}
    (picture,) = event_pictures(task, answers, methods, task.figures(cohort, points, methods)).values()
    curve, calibration = picture.axes[:2]
    low = x[points] <= np.sort(x[points])[len(points) // 3 - 1]
    time, came = curve.lines[0].get_data()
    expected = incidence_curve(*answers[low].T, np.ones(low.sum()), 2, time)[0]
    np.testing.assert_allclose(came, expected, atol=.01)
    assert len(picture.axes) == 4 and len(curve.lines) == 6 and len(calibration.lines) == 1 + len(task.horizons)
    assert task.columns[task.followed] == f"death_{task.horizons[-1]:g}"
