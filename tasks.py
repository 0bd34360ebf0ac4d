"""The `Task`: what is asked, how an outcome is learned, answered and judged; and the boosted trees that help
to answer."""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.model_selection import train_test_split

from data import Cohort, InputError, labelled_points, stays_of, subjects_with_label
from metrics import (CHECKPOINT, Points, best_shares, best_utility_threshold, hours_since_onset,
                     of_challenge_2019, score_figures, sepsis_figures)


# ------------------------------------------------------------------------------------------------------------
# What is asked
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """What is asked: how answers [Q, A] of one kind are learned, and how an output is answered and judged.

    Training, answering and scoring ask this class whatever depends on the kind of the outcome; each kind is a
    class with these attributes and methods. The classifier carries its task; a checkpoint keeps
    `state_dict`. Of `names` and what training adds to them every field is plain: texts, numbers, tuples."""

    names: tuple[str, ...] = ("label",)  # of the outcomes, the classes or the causes

    kind: ClassVar[str]
    needed: ClassVar[str]                # of labels to be learned or scored
    best: ClassVar[str]                  # the figure of `validation` that chooses the epoch: the highest
    untrained: ClassVar[dict]
    losses: ClassVar[tuple] = ("cross_entropy",)  # settings `loss` that this kind can learn by
    width: ClassVar[int] = 1             # A, columns of the answers

    @staticmethod
    def of(cohort: Cohort) -> "Task":
        """The task that the labels of a cohort ask for, not yet `fitted`."""
        return KINDS[cohort.kind](tuple(cohort.names))

    # ---- shapes and names ----------------------------------------------------------------------------------

    @property
    def outputs(self) -> int:
        """The number of logits of the head."""
        raise NotImplementedError

    @property
    def ensembles(self) -> int:
        """The number of ensembles of boosted trees beside the head."""
        return 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of what `answer` gives."""
        return tuple(f"probability_{name}" for name in self.names)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The names of what `labels` gives."""
        return ("label",)

    def labels(self, answers: np.ndarray) -> pd.DataFrame:
        """Answers [n, A] as a label file has them, in `label_columns`; an answer that is none is an empty
        cell."""
        return pd.DataFrame(answers, columns=self.label_columns)

    # ---- what a checkpoint keeps ---------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """The kind and all fields as plain types."""
        return {"kind": self.kind} | {name: list(value) if isinstance(value, tuple) else value
                                      for name, value in asdict(self).items()}

    @staticmethod
    def from_state(state: dict | None, path) -> "Task":
        """The task that the checkpoint at `path` records; None: it records none, and asks what the default
        asks. Raises InputError for one that this version does not know."""
        if state is None:
            return Binary()
        with suppress(TypeError, KeyError, ValueError, LookupError):
            given = {name: tuple(value) if isinstance(value, list) else value
                     for name, value in state.items() if name != "kind"}
            task = KINDS[state["kind"]](**given)
            if task.state_dict() == state and task.sound():
                return task
        raise InputError(f"{path}: its task is {str(state)[:80]}, which this version does not know; use the "
                         "version that wrote it")

    def sound(self) -> bool:
        """Tells whether the fields can be those of a trained task: a checkpoint may come from a stranger."""
        return set(map(type, self.names)) == {str} and len(set(self.names)) == len(self.names)

    def recode(self, cohort: Cohort) -> Cohort:
        """The cohort with its answers in the order of this task's names. Raises InputError where its labels
        are of another kind, or have names that this task does not know."""
        if cohort.labelled.any() and cohort.kind != self.kind:
            raise InputError(f"{cohort.reader}: its labels are of the kind {cohort.kind}, where the "
                             f"checkpoint answers {self.kind}; give labels of its kind, or --kind {self.kind}")
        if not cohort.labelled.any():
            answers = np.full((len(cohort.answers), self.width), np.nan, dtype=np.float32)
        elif unknown := [name for name in cohort.names if name not in self.names]:
            raise InputError(f"{cohort.reader}: its labels name {', '.join(unknown[:3])}, where the checkpoint "
                             f"knows {', '.join(self.names[:8])}; give labels of these alone")
        else:
            answers = self.renamed(cohort.answers, [self.names.index(name) for name in cohort.names])
        return replace(cohort, answers=answers, kind=self.kind, names=self.names)

    def renamed(self, answers: np.ndarray, place: list[int]) -> np.ndarray:
        """Answers [Q, A] of names that stand at these places among this task's."""
        return answers

    # ---- which stays and points are learned from -----------------------------------------------------------

    def lacking(self, answers: np.ndarray) -> str:
        """What keeps these answers [n, A] from being learned or scored; empty where nothing does."""
        return "" if len(answers) else "no label at all"

    def check(self, cohort: Cohort, split: dict[str, list[str]]) -> None:
        """Raises InputError where the labels of one of these parts lack what is needed."""
        for name, ids in split.items():
            if lacking := self.lacking(cohort.answers[labelled_points(cohort, stays_of(cohort, ids))]):
                raise InputError(f"{cohort.reader}: the labelled {name} stays hold {lacking}, where "
                                 f"{self.needed} needed; check the label file, give more labels or a --split")

    def count(self, cohort: Cohort, stays: np.ndarray) -> str:
        """What the labels of these stays are, in short."""
        raise NotImplementedError

    def occurs(self, answers: np.ndarray) -> np.ndarray:
        """[n] bool: the answers [n, A] from which every epoch learns, however many there are."""
        return np.zeros(len(answers), dtype=bool)

    def subset(self, cohort: Cohort, stays: np.ndarray, fraction: float, seed: int) -> np.ndarray:
        """The stays of a stratified, seeded share of the subjects of labelled stays, as if only these had a
        label."""
        if fraction == 1:
            return stays
        subject, label = subjects_with_label(cohort, stays)
        everyone = np.arange(len(label))
        try:
            part, _ = train_test_split(everyone, train_size=fraction, stratify=label, random_state=seed)
        except ValueError as error:
            raise InputError(f"--label_fraction {fraction}: no such share of {len(label)} subjects keeps "
                             f"both classes ({error}); give a larger one") from None
        return stays[np.isin(subject, part)]

    def training_points(self, cohort: Cohort, stays: np.ndarray, config, seed: int,
                        epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The labelled points [n] of these stays from which an epoch learns: all with the outcome and, where
        points are many, a seeded sample of the others; and their weights [n], so that a sampled one stands
        for those left out. config: a FinetuneConfig."""
        points = labelled_points(cohort, stays)
        occurs = self.occurs(cohort.answers[points])
        others, number = points[~occurs], int(occurs.sum())
        most = max(1, int(max(config.negatives * number, config.few_points - number)))
        kept = others
        if len(others) > most:
            kept = np.random.default_rng([seed, epoch]).choice(others, most, replace=False)
        weight = np.where(occurs, 1, max(1, len(others) / most))
        chosen = occurs | np.isin(points, kept)
        return points[chosen], weight[chosen].astype(np.float32)

    def fitted(self, cohort: Cohort, points: np.ndarray, weight: np.ndarray, horizons: tuple = ()) -> "Task":
        """The task with what it must know of these training points [n], which have weights [n]. horizons: in
        hours, of events alone."""
        if horizons:
            raise InputError(f"--horizons: labels of the kind {self.kind} have none; leave it out, or give "
                             "labels with the columns event and hours")
        return self

    # ---- how it is learned ---------------------------------------------------------------------------------

    def loss(self, logits, answer, config, weight=None, total=None) -> torch.Tensor:
        """The loss by which an answer is learned: logits [..., outputs], answer [..., A] (NaN: none), weight
        [...] (None: 1 where there is an answer) -> [], the sum over points divided by `total` (None: the sum
        of the weights). config: a FinetuneConfig."""
        answer = answer.flatten(0, -2)
        there = (~answer.isnan()).any(-1).float()
        weight = there if weight is None else weight.flatten()
        loss = self.point_loss(logits.float().flatten(0, -2), answer, config)
        return (weight * loss).sum() / (weight.sum() if total is None else total)

    def point_loss(self, logits, answer, config) -> torch.Tensor:
        """The loss [n] of each point: logits [n, outputs] in float32, answer [n, A]; 0 where it is none."""
        raise NotImplementedError

    def squares(self, weight) -> torch.Tensor:
        """The squares [k, F] that the penalty on a linear head's weights [outputs, F] adds up, such that an
        input that matters costs as much whatever the number of outputs."""
        return weight.square()

    def prior(self, answer, weight) -> torch.Tensor:
        """The logits [outputs] with which the head begins: those that answer these answers [n, A], of weights
        [n], best without any input."""
        raise NotImplementedError

    def shares(self, logits: list, answers: np.ndarray) -> np.ndarray:
        """The shares [k], in tenths, of k logits [n, outputs] that fit these answers [n, A] best: those of
        the least loss."""
        raise NotImplementedError

    # ---- how it is answered and judged ---------------------------------------------------------------------

    def answer(self, logits) -> np.ndarray:
        """Logits [n, outputs] -> the answers in `columns`, [n, columns] float64."""
        raise NotImplementedError

    def validation(self, cohort: Cohort, points: np.ndarray, answer: np.ndarray) -> dict:
        """Figures of the answers [n, columns] at these validation points [n], of which `best` chooses the
        epoch."""
        raise NotImplementedError

    def describe(self, row: dict) -> str:
        """The figures of `validation` for the log."""
        raise NotImplementedError

    def figures(self, cohort: Cohort, points: np.ndarray, methods: dict, thresholds: dict, sensitivity: float,
                groups: dict) -> dict:
        """Plain numbers about each method's answers [n, columns] at these points [n]. groups: {variable:
        {group: mask [n]}}, in which the checkpoint's are repeated; thresholds, of each method, and
        sensitivity, of alarms, are for a binary outcome."""
        raise NotImplementedError

    def tables(self, figures: dict) -> dict[str, pd.DataFrame]:
        """`figures` as tables of texts by their titles."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# The kinds
# ------------------------------------------------------------------------------------------------------------

def two_class_loss(logits, label, config) -> torch.Tensor:
    """Focal loss (Lin et al. 2017, eq. 5) or label-smoothed cross-entropy, as `config`, a FinetuneConfig,
    says: logits [n, 2], label [n] (-1: none) -> [n]."""
    if config.loss == "cross_entropy":
        return F.cross_entropy(logits, label, label_smoothing=config.label_smoothing, ignore_index=-1,
                               reduction="none")
    log_p = logits.log_softmax(-1).gather(1, label.clamp(min=0)[:, None]).squeeze(1)  # true class
    alpha = torch.where(label == 1, config.focal_alpha, 1 - config.focal_alpha)
    return -alpha * (1 - log_p.exp()) ** config.focal_gamma * log_p


class Binary(Task):
    """One outcome that is 0 or 1, answered by its probability."""

    kind = "binary"
    needed = "both classes are"
    best = "val_auc"
    untrained = {"val_auc": -1.0, "val_auprc": -1.0, "threshold": 0.5}
    losses = ("cross_entropy", "focal")
    outputs = 2
    ensembles = 1
    columns = ("probability",)

    def labels(self, answers):
        return pd.DataFrame({"label": pd.array(answers[:, 0], dtype="Int64")})

    def lacking(self, answers):
        positive = int((answers == 1).sum())
        if not len(answers):
            return super().lacking(answers)
        one_class = positive in (0, len(answers))
        return f"one class only ({positive:,} of {len(answers):,} labels are 1)" if one_class else ""

    def count(self, cohort, stays):
        return f"{(cohort.stay_label[stays] == 1).sum():,} positive"

    def occurs(self, answers):
        return answers[:, 0] != 0

    def point_loss(self, logits, answer, config):
        return two_class_loss(logits, answer[:, 0].nan_to_num(nan=-1).long(), config)

    def prior(self, answer, weight):
        """The log of the classes' shares."""
        return (torch.bincount(answer[:, 0].long(), weights=weight, minlength=2) / weight.sum()).log()

    def shares(self, logits, answers):
        """See `best_shares`."""
        log_odds = [each.diff()[:, 0].cpu().double().numpy() for each in logits]
        return best_shares(np.stack(log_odds), answers[:, 0].astype(int))

    def answer(self, logits):
        """Logits [n, 2] -> the probability of the outcome, [n, 1] float64."""
        return logits.float().softmax(-1)[:, 1:].cpu().double().numpy()

    def validation(self, cohort, points, answer):
        """AUROC and AUPRC of the answers [n, 1] at these validation points [n], and the probability from
        which an answer counts as positive: that of the best F1 or, where the labels are those of the
        challenge 2019, of the best utility."""
        stay, minute, label = cohort.point_stay[points], cohort.point_minute[points], cohort.label[points]
        probability = answer[:, 0]
        precision, recall, thresholds = precision_recall_curve(label, probability)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        row = {"val_auc": float(roc_auc_score(label, probability)),
               "val_auprc": float(average_precision_score(label, probability)),
               "threshold": float(thresholds[f1[:-1].argmax()])}
        if of_challenge_2019(stay, minute, label):
            since = hours_since_onset(stay, minute, label)
            row["threshold"], row["val_utility"] = best_utility_threshold(stay, since, probability)
        return row

    def describe(self, row):
        utility = f", utility {row['val_utility']:.4f}" if "val_utility" in row else ""
        return f"validation AUROC {row['val_auc']:.4f}, AUPRC {row['val_auprc']:.4f}{utility}"

    def figures(self, cohort, points, methods, thresholds, sensitivity, groups):
        """See `score_figures`; with labels of the challenge 2019 also its utility, as `sepsis`. Patients are
        numbered as their first stays come: where each stay is a patient of its own, a bootstrap over them
        draws stays."""
        stay = cohort.point_stay[points]
        subject = pd.factorize(cohort.subject)[0][stay]
        scored = Points(stay, subject, cohort.point_minute[points], cohort.label[points].astype(int))
        methods = {name: answer[:, 0] for name, answer in methods.items()}
        figures = score_figures(scored, methods, thresholds[CHECKPOINT], sensitivity, groups)
        if of_challenge_2019(stay, scored.minute, scored.label):
            figures["sepsis"] = {name: sepsis_figures(scored, probability, thresholds[name])
                                 for name, probability in methods.items()}
        return figures


class Several(Task):
    """Several outcomes that are 0 or 1 each, or not known (NaN): a probability each."""

    kind = "several"
    needed = "both classes of an outcome are"
    best = "val_auc"
    untrained = {"val_auc": -1.0, "val_auprc": -1.0}
    losses = ("cross_entropy", "focal")

    @property
    def width(self):
        return len(self.names)

    @property
    def outputs(self):
        return 2 * len(self.names)

    @property
    def ensembles(self):
        return len(self.names) if len(self.names) <= 8 else 0

    @property
    def label_columns(self):
        return self.names

    def labels(self, answers):
        return pd.DataFrame({name: pd.array(column, dtype="Int64")
                             for name, column in zip(self.names, answers.T)})

    def renamed(self, answers, place):
        result = np.full((len(answers), len(self.names)), np.nan, dtype=np.float32)
        result[:, place] = answers
        return result


class Classes(Task):
    """One of several classes, which exclude one another: the probability of each."""

    kind = "classes"
    needed = "at least two are"
    best = "val_auc"
    untrained = {"val_auc": -1.0, "val_accuracy": -1.0, "val_log_loss": math.inf}

    @property
    def outputs(self):
        return len(self.names)

    def labels(self, answers):
        words = np.array([*self.names, None], dtype=object)
        return pd.DataFrame({"label": words[np.nan_to_num(answers[:, 0], nan=-1).astype(int)]})

    def renamed(self, answers, place):
        return np.append(place, np.nan)[np.nan_to_num(answers, nan=-1).astype(int)].astype(np.float32)


class Number(Task):
    """A number, such as days of stay: its median and an interval that holds it with a chance of 80%."""

    kind = "number"
    needed = "different numbers are"
    best = "val_neg_mae"
    untrained = {"val_mae": math.inf, "val_neg_mae": -math.inf}
    outputs = 3
    ensembles = 3
    columns = ("median", "low", "high")


class Event(Task):
    """The time to an event, which may never be seen (censored), of one or several causes, of which the first
    to come ends the wait: the chance of each cause up to each horizon, its cumulative incidence.

    Answers [Q, 2]: hours from the question to the event or the censoring; the cause, 0: censored."""

    kind = "event"
    needed = "an event is"
    best = "val_concordance"
    untrained = {"val_concordance": -1.0}
    width = 2
    label_columns = ("event", "hours")

    def labels(self, answers):
        words = np.array(["0", *self.names, None], dtype=object)
        return pd.DataFrame({"event": words[np.nan_to_num(answers[:, 1], nan=-1).astype(int)],
                             "hours": answers[:, 0].astype(float)})

    def renamed(self, answers, place):
        cause = np.array([0, *(at + 1 for at in place), np.nan])
        return np.stack([answers[:, 0], cause[np.nan_to_num(answers[:, 1], nan=-1).astype(int)]], 1)


KINDS = {kind.kind: kind for kind in (Binary, Several, Classes, Number, Event)}


# ------------------------------------------------------------------------------------------------------------
# Boosted trees
# ------------------------------------------------------------------------------------------------------------

def trees_of(classifier):
    """Yield left and right child (of a leaf: -1), feature, threshold and value (in log odds, with the
    shrinkage) of the nodes of each tree of a fitted (Hist)GradientBoostingClassifier."""
    if isinstance(classifier, GradientBoostingClassifier):
        for tree in (estimator.tree_ for estimator in classifier.estimators_[:, 0]):
            value = classifier.learning_rate * tree.value[:, 0, 0]
            yield tree.children_left, tree.children_right, tree.feature, tree.threshold, value
    else:
        for (predictor,) in classifier._predictors:
            nodes, leaf = predictor.nodes, predictor.nodes["is_leaf"].astype(bool)
            left, right = (np.where(leaf, -1, nodes[side].astype(np.int64)) for side in ("left", "right"))
            yield left, right, nodes["feature_idx"].astype(np.int64), nodes["num_threshold"], nodes["value"]


class BoostedTrees(nn.Module):
    """Gradient-boosted trees for two classes (Friedman 2001), fitted by scikit-learn and kept as tensors:
    each a complete binary tree, whose node n has the children 2n + 1 and 2n + 2. They see what a linear head
    cannot, such as a variable that matters beyond a threshold."""

    def __init__(self, trees: int, depth: int):
        super().__init__()
        self.depth = depth
        self.register_buffer("feature", torch.zeros(trees, 2**depth - 1, dtype=torch.int64))
        self.register_buffer("threshold", torch.full((trees, 2**depth - 1), math.inf))
        self.register_buffer("value", torch.zeros(trees, 2**depth))  # of the leaves, in log odds
        self.register_buffer("prior", torch.zeros(()))

    def fit(self, x, label, weight, classifier) -> None:
        """x [n, F], label [n], weight [n]; classifier: a (Hist)GradientBoostingClassifier of as many trees,
        no deeper."""
        classifier.fit(x.cpu().numpy(), label.cpu().numpy(), sample_weight=weight.cpu().numpy())
        self.prior.copy_(((weight * label).sum() / weight.sum()).logit())
        for i, (left, right, feature, cut, value) in enumerate(trees_of(classifier)):
            node = np.zeros(1, dtype=np.int64)
            for level in range(self.depth):  # where a tree ends early, all go left, down to the same leaf
                leaf, at = left[node] < 0, slice(2**level - 1, 2**(level + 1) - 1)
                threshold = cut[node].astype(np.float32)
                below = np.nextafter(threshold, np.float32(-np.inf))
                threshold = np.where(threshold > cut[node], below, threshold)  # every x keeps its side
                self.feature[i, at] = torch.from_numpy(np.where(leaf, 0, feature[node]))
                self.threshold[i, at] = torch.from_numpy(np.where(leaf, np.float32(np.inf), threshold))
                children = [np.where(leaf, node, child[node]) for child in (left, right)]
                node = np.stack(children, axis=1).ravel()
            self.value[i] = torch.from_numpy(value[node].astype(np.float32))

    def forward(self, x):
        """x [..., F] -> logits [..., 2]."""
        shape, x = x.shape, x.flatten(0, -2)
        tree = torch.arange(len(self.value), device=x.device)
        node = torch.zeros(len(x), len(tree), dtype=torch.int64, device=x.device)               # [n, trees]
        for _ in range(self.depth):
            node = 2 * node + 1 + (x.gather(1, self.feature[tree, node]) > self.threshold[tree, node])
        odds = self.prior + self.value[tree, node - self.feature.shape[1]].sum(1)
        return torch.stack([-odds / 2, odds / 2], dim=-1).view(*shape[:-1], 2)
