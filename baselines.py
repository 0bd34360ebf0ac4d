"""What ours is compared with (`test_suite.py --checkpoint CKPT --baselines`): models of hand-made features,
the model's own head without its backbone, an untrained backbone."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from batches import common_variables
from checkpoint import Checkpoint
from data import InputError, search_after, stay_event_index, stays_of
from finetune_config import MANY_POINTS, OLDER, FinetuneConfig, tree_sizes
from history_statistics import summary_features
from labels import read_columns, read_scores
from metrics import (CHECKPOINT, RANKED, RANKS, bootstrap, enough, interval, measure_table, net_benefit,
                     ranks, with_intervals)
from model import ModelConfig, SeqSetVAE
from predictor import CPU
from questions import labelled_points
from runs import answers_at, choose_device, encode_points
from settings import changed
from tasks import LEVELS, Task
from train import HeadTraining, labelled


LOGISTIC, BOOSTING = "logistic regression on summaries", "gradient boosting on summaries"
RIDGE, USUAL = "ridge regression on summaries", "median of the training stays"  # of numbers
MARGINAL = "incidence of the training stays"                                    # of events
ALONE, UNTRAINED = "same head, exact summaries alone", "untrained backbone, same head"
BASELINES = (LOGISTIC, BOOSTING, ALONE, RIDGE, USUAL, MARGINAL)
STATISTICS = ("first", "last", "min", "max", "mean", "sd", "slope", "count", "hours since")


def summary_table(cohort, points, variables) -> np.ndarray:
    """Hand-made features of the stay up to each prediction point: STATISTICS of these variables [K] (indices
    in the cohort), descriptors included: [n, K, 9] float32, raw units, slope a day; NaN where there is none
    (count: 0)."""
    stay = cohort.point_stay[points]
    begin, after = cohort.stay_start[stay], cohort.stay_start[stay + 1]
    after = search_after(cohort.set_minute, cohort.point_minute[points], begin, after)
    begin, end = cohort.set_start[begin], cohort.set_start[after]               # [n] the events of each point
    events = stay_event_index(cohort, np.unique(stay))
    events = events[np.argsort(cohort.event_variable[events], kind="stable")]        # by variable, stay, time
    sorted_variables = cohort.event_variable[events]
    begins, ends = (np.searchsorted(sorted_variables, variables, side) for side in ("left", "right"))
    table = np.full((len(points), len(variables), len(STATISTICS)), np.nan, dtype=np.float32)
    for k, mine in enumerate(events[low:high] for low, high in zip(begins, ends)):
        last, before = np.searchsorted(mine, end) - 1, np.searchsorted(mine, begin)
        table[:, k, -2] = last + 1 - before
        seen = last >= before
        charted = cohort.set_minute[np.searchsorted(cohort.set_start, mine, side="right") - 1]
        table[seen, k, -1] = (cohort.point_minute[points[seen]] - charted[last[seen]]) / 60

        value = cohort.event_value[mine].astype(np.float64)
        valued = ~np.isnan(value)
        mine, value, day = mine[valued], value[valued], charted[valued] / 1440
        owner = np.searchsorted(cohort.set_start[cohort.stay_start], mine, side="right") - 1
        first = np.searchsorted(owner, owner)
        x, day, n = value - value[first], day - day[first], np.arange(len(mine)) - first + 1
        terms = pd.DataFrame({"x": x, "xx": x * x, "t": day, "tt": day * day, "tx": day * x})
        mean, square, days, spread, product = terms.groupby(owner).cumsum().to_numpy().T / n
        variance, spread = np.maximum(square - mean ** 2, 0), spread - days ** 2
        sd = np.sqrt(variance * n / np.where(n > 1, n - 1, np.nan))
        slope = np.where(spread > 1e-9, (product - days * mean) / np.maximum(spread, 1e-9), 0)
        so_far = pd.Series(value).groupby(owner)
        low, high = so_far.cummin(), so_far.cummax()
        statistics = np.stack([value[first], value, low, high, value[first] + mean, sd, slope], axis=1)
        last, before = np.searchsorted(mine, end) - 1, np.searchsorted(mine, begin)
        seen = last >= before
        table[seen, k, :-2] = statistics[last[seen]]
    return table


def hand_made_baselines(task, cohort, variables, train, weight, test) -> dict[str, np.ndarray]:
    """Answers [n, columns] at the test points by models of `summary_table`, from the training points and
    their weights: a linear one and HistGradientBoosting, or what has no features at all. From many points
    boosting alone learns, with the hours since each variable's last event and settings of its own."""
    if task.kind == "event":
        return {MARGINAL: np.tile(task.marginal, (len(test), 1))}
    many = len(train) > MANY_POINTS
    both = summary_table(cohort, np.concatenate([train, test]), variables)
    both = (both if many else both[..., :-1]).reshape(len(both), -1)
    x = both[:len(train)]
    # What is constant in training, or was never measured, says nothing.
    says = np.fmin.reduce(x) < np.fmax.reduce(x)
    x, x_test = x[:, says], both[len(train):, says]
    if many:
        slow = RIDGE if task.kind == "number" else LOGISTIC
        print(f"baselines: no {slow}: it takes too long for {len(train):,} points")
    return HAND_MADE[task.kind](task, x, cohort.answers[train], weight, x_test, many)


def linear(x, estimator):
    """A linear estimator behind what it needs of such features [n, F]: outliers clipped, an indicator beside
    what is missing, one scale."""
    low, high = np.nanquantile(x, [.005, .995], axis=0)
    return make_pipeline(FunctionTransformer(lambda t: t.clip(low, high)),
                         SimpleImputer(strategy="median", add_indicator=True),
                         StandardScaler(), estimator)


# Boosting: shallow trees, of which cross-validation chooses; from many points others.
SLOW = {"learning_rate": .05, "random_state": 0}
SHALLOW = {"max_iter": [100, 200], "max_leaf_nodes": [6, 15], "l2_regularization": [10.]}
LARGE = {"l2_regularization": 10., "early_stopping": False, "random_state": 0}


def classifiers(x, y, weight, many: bool) -> dict:
    """{name: classifier} fitted to the features x [n, F], classes y [n] and, where points are many, their
    weights [n]."""
    if many:
        return {BOOSTING: HistGradientBoostingClassifier(**LARGE).fit(x, y, weight)}
    classes, counts = np.unique(y, return_counts=True)
    folds = min(5, counts.min()) if len(classes) > 1 else 0
    if folds < 2:
        raise InputError(f"baselines: {len(y)} training labels, {counts.min()} of the rarest class, are too "
                         "few to choose a penalty by cross-validation: give more labels")
    chosen = partial(GridSearchCV, scoring="neg_log_loss", cv=folds)
    logistic = chosen(LogisticRegression(max_iter=500), {"C": [.0003, .001, .003, .01, .03, .1]})
    return {LOGISTIC: linear(x, logistic).fit(x, y),
            BOOSTING: chosen(HistGradientBoostingClassifier(**SLOW), SHALLOW).fit(x, y)}


def regressors(x, y, weight, many: bool) -> dict:
    """{name: regressor} fitted to numbers y [n], see `classifiers`; boosting by the absolute error."""
    boosting = partial(HistGradientBoostingRegressor, loss="absolute_error")
    if many:
        return {BOOSTING: boosting(**LARGE).fit(x, y, weight)}
    chosen = partial(GridSearchCV, scoring="neg_mean_absolute_error", cv=min(5, len(y)))
    return {RIDGE: linear(x, chosen(Ridge(), {"alpha": [30, 100, 300, 1000, 3000, 10_000]})).fit(x, y),
            BOOSTING: chosen(boosting(**SLOW), SHALLOW).fit(x, y).best_estimator_}


def each_outcome(task, x, answers, weight, x_test, many: bool) -> dict[str, np.ndarray]:
    """Probabilities of outcomes that are 0 or 1, each learned alone from its labels."""
    told = []
    for y, known in zip(answers.T, ~np.isnan(answers.T)):
        mine = slice(None) if known.all() else known  # the order in memory decides the last bit
        models = classifiers(x[mine], y[mine].astype(int), weight[mine], many)
        told.append({name: model.predict_proba(x_test)[:, 1] for name, model in models.items()})
    return {name: np.stack([each[name] for each in told], axis=1) for name in told[0]}


def each_class(task, x, answers, weight, x_test, many: bool) -> dict[str, np.ndarray]:
    """Probabilities of the classes, 0 of one without a training label."""
    told = {}
    for name, model in classifiers(x, answers[:, 0].astype(int), weight, many).items():
        told[name] = np.zeros((len(x_test), len(task.names)))
        told[name][:, model.classes_] = model.predict_proba(x_test)
    return told


def numbers(task, x, answers, weight, x_test, many: bool) -> dict[str, np.ndarray]:
    """Medians and intervals, learned on the task's scale. A regressor's are its prediction and the quantiles
    of its errors at training points that it did not learn from, by cross-validation."""
    answers = torch.from_numpy(answers)
    y = task.standardised(answers[:, 0]).numpy()
    told = {USUAL: task.answer(task.prior(answers, torch.from_numpy(weight)).expand(len(x_test), -1))}
    for name, model in regressors(x, y, weight, many).items():
        error = y - cross_val_predict(model, x, y, cv=min(5, len(y)))
        logits = model.predict(x_test)[:, None] + np.quantile(error, LEVELS)
        told[name] = task.answer(torch.from_numpy(logits))
    return told


HAND_MADE = {"binary": each_outcome, "several": each_outcome, "classes": each_class, "number": numbers}


class SummariesAlone(SeqSetVAE):
    """The classifier's head on the exact summaries of the stay and nothing else: its backbone is never
    run."""

    def feature_sizes(self) -> dict[str, int]:
        return {"plain": 0, "learned": 0, "summaries": summary_features(self.config.head_variables)}

    def features(self, batch) -> torch.Tensor:
        return self.exact_summaries(batch)


def of_a_frozen_head(model, dataset, train, valid, test, config: FinetuneConfig, seed: int,
                     device) -> np.ndarray:
    """Answers [n, columns] at the test points by this model, whose head is trained on its frozen backbone
    from the training stays; valid: the points by which it weighs its trees."""
    run = SimpleNamespace(model=model.to(device), dataset=dataset, seed=seed, device=device, last=None)
    HeadTraining.of(run, train, config).whole(encode_points(model, dataset, valid, device),
                                              dataset.cohort.answers[valid])
    return answers_at(model, dataset, test, device)


def summaries_alone(task, dataset, variables, train, valid, test, seed: int, device=CPU,
                    config=FinetuneConfig()) -> np.ndarray:
    """Answers [n, columns] at the test points by the default head (linear and trees) on exact summaries of
    these variables (indices in the dataset's vocabulary), see `of_a_frozen_head`."""
    points, _ = task.training_points(dataset.cohort, train, config, seed, 0)
    shape = ModelConfig(len(dataset.normalizer.variables), summaries=True, head_variables=len(variables),
                        head_widths=config.head_widths, classes=task.outputs,
                        **tree_sizes(config, len(points), task))
    torch.manual_seed(seed)
    model = SummariesAlone(shape, torch.zeros(shape.num_variables, shape.input_dim), task)
    model.head_variables.copy_(torch.from_numpy(variables))
    return of_a_frozen_head(model, dataset, train, valid, test, config, seed, device)


def without_backbone(task, dataset, train, valid, test, seed: int, device=CPU,
                     config=FinetuneConfig()) -> dict[str, np.ndarray]:
    """Answers [n, columns] at the test points by every baseline of the task's kind that can be had, learned
    from the training stays; valid: see `of_a_frozen_head`. The task is `fitted` to the same stays."""
    cohort = dataset.cohort
    variables = common_variables(cohort, dataset, train, config.most_variables)
    points, weight = task.training_points(cohort, train, config, seed, 0)
    own = np.flatnonzero(np.isin(dataset.variable, variables))
    return (hand_made_baselines(task, cohort, own, points, weight, test)
            | {ALONE: summaries_alone(task, dataset, variables, train, valid, test, seed, device, config)})


def baselines(arguments, checkpoint: Checkpoint, dataset, points) -> dict[str, np.ndarray]:
    """Answers [n, columns] at the scored points by the baselines and by an untrained backbone of the
    checkpoint's config, under a frozen head of its settings; all learn from the labels that the checkpoint
    learned from."""
    cohort, task = dataset.cohort, Task.from_state(checkpoint.task, checkpoint.path)
    new = checkpoint.is_new(cohort)
    if new or not checkpoint.run:
        raise InputError(f"{arguments.checkpoint[0]}: --baselines are fitted on the data that train.py made "
                         "the checkpoint with, as it recorded; leave "
                         f"{'--data_dir' if new else '--baselines'} out")
    config, seed = changed(FinetuneConfig(), OLDER | checkpoint.run["settings"]), checkpoint.source["seed"]
    share, device = checkpoint.run["options"]["label_fraction"], choose_device(arguments.device, "fp32")[0]
    train = task.subset(cohort, labelled(cohort, checkpoint.split["train"]), share, seed)
    valid = labelled_points(cohort, stays_of(cohort, checkpoint.split["valid"]))
    methods = without_backbone(task, dataset, train, valid, points, seed, device, config)
    torch.manual_seed(seed)
    model = SeqSetVAE(replace(checkpoint.config, classification_only=True), checkpoint.vocabulary, task)
    model.head_variables.copy_(checkpoint.weights["head_variables"])
    untrained = of_a_frozen_head(model, dataset, train, valid, points, config, seed, device)
    return methods | {UNTRAINED: untrained}


# ------------------------------------------------------------------------------------------------------------
# A score in use (`--compare FILE`)
# ------------------------------------------------------------------------------------------------------------

def score_of(arguments, cohort, scored) -> np.ndarray:
    """Returns the score of --compare at the scored points, [n], NaN: none, and says what was met. Raises
    InputError where it ranks nothing."""
    path = arguments.compare
    if not Path(path).is_file():
        raise InputError(f"--compare {path}: no such file; correct the path")
    score, lines = read_scores(cohort, Path(path), read_columns(arguments.columns))
    has_score, is_scored = ~np.isnan(score), np.isin(np.arange(len(score)), scored)
    for reason, points in (("scored points have no score", is_scored & ~has_score),
                           ("points have a score and are not scored", has_score & ~is_scored)):
        if points.any():
            first = cohort.stay_id[cohort.point_stay[np.argmax(points)]]
            lines.append(f"{points.sum():,} {reason}, the first: stay {first}")
    for line in lines:
        print(f"compare: {path}: {line}")
    score, known = score[scored], has_score[scored]
    if lacking := Task.of(cohort).lacking(cohort.answers[scored[known]]):
        raise InputError(f"--compare {path}: the points with a score hold {lacking}; both classes are "
                         "needed")
    if np.ptp(score[known]) == 0:
        raise InputError(f"--compare {path}: every score is {score[known][0]:g}, which ranks nothing; give "
                         "the column of the score")
    return score


def beside_score(cohort, scored, methods: dict, score: str) -> dict:
    """Returns AUROC and AUPRC of each method {name: answer [n, 1]} at the scored points that have a `score`
    (one of them, NaN: none; higher is worse), and those of CHECKPOINT less those of the score, with paired
    95% intervals by bootstrap over patients; and where all scores lie in [0, 1] the net benefit of both."""
    known = ~np.isnan(methods[score][:, 0])
    stay, label = cohort.point_stay[scored[known]], cohort.label[scored[known]].astype(int)
    subject = cohort.patient[stay]
    given = {name: answer[known, 0] for name, answer in methods.items()}
    own, other = given[CHECKPOINT], given[score]
    measures = {name: with_intervals(subject, label, p, RANKS) for name, p in given.items()}
    intervals = {}
    if enough(subject, label):
        draws = bootstrap(subject, label, own, other)
        intervals = dict(zip(RANKS[ranks], map(interval, (draws[:, 0] - draws[:, 1]).T)))
    difference = {name: {"value": measures[CHECKPOINT][name]["value"] - measures[score][name]["value"],
                         "interval": intervals.get(name)} for name in RANKS[ranks]}
    probable = 0 <= other.min() and other.max() <= 1
    benefit = {name: net_benefit(label, given[name]) for name in (CHECKPOINT, score)} if probable else None
    return {"score": score, "points": len(stay), "stays": len(np.unique(stay)), "positive": int(label.sum()),
            "without_a_score": int((~known).sum()), "methods": measures, "difference": difference,
            "net_benefit": benefit}


def score_tables(figures: dict) -> dict[str, pd.DataFrame]:
    """Returns `beside_score` as a table, by its title."""
    title = (f"Beside the score of {figures['score']}: {figures['points']:,} points in "
             f"{figures['stays']:,} stays, {figures['positive']:,} positive (left out, without a score: "
             f"{figures['without_a_score']:,})")
    if figures["net_benefit"] is None:
        title += "\nno net benefit: scores beyond 0 to 1 are no probabilities"
    rows = figures["methods"] | {f"{CHECKPOINT} less {figures['score']}": figures["difference"]}
    return {title: measure_table(rows, RANKED)}
