"""The `Task`: what is asked, how an outcome is learned, answered and judged; and the boosted trees that help to
answer."""

import math
from dataclasses import dataclass

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
    """One outcome that is 0 or 1: how its answers [Q, 1] are learned, and how an output is answered and
    judged.

    Training, answering and scoring ask this class whatever depends on the kind of the outcome, so another
    kind is another class with these attributes and methods. The classifier carries its task; a checkpoint
    keeps `state_dict`."""

    kind: str = "binary"
    names: tuple[str, ...] = ("label",)  # of the answers' columns
    outputs = 2                          # logits of the head
    best = "val_auc"                     # the figure of `validation` that chooses the epoch: the highest
    untrained = {"val_auc": -1.0, "val_auprc": -1.0, "threshold": 0.5}

    # ---- what a checkpoint keeps ---------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """The kind and the names as plain types."""
        return {"kind": self.kind, "names": list(self.names)}

    @classmethod
    def from_state(cls, state: dict | None, path) -> "Task":
        """The task that the checkpoint at `path` records; None: it records none, and asks what the default
        asks. Raises InputError for a kind that this version does not know."""
        task = cls()
        if state is not None and state != task.state_dict():
            raise InputError(f"{path}: its task is {str(state)[:80]}, which this version does not know; use "
                             "the version that wrote it")
        return task

    # ---- which stays and points are learned from -----------------------------------------------------------

    def lacking(self, answers: np.ndarray) -> str:
        """What keeps these answers [n, 1] from being learned or scored; empty where nothing does."""
        positive = int((answers == 1).sum())
        if not len(answers):
            return "no label at all"
        one_class = positive in (0, len(answers))
        return f"one class only ({positive:,} of {len(answers):,} labels are 1)" if one_class else ""

    def check(self, cohort: Cohort, split: dict[str, list[str]]) -> None:
        """Raises InputError where the labels of one of these parts do not hold both classes."""
        for name, ids in split.items():
            if lacking := self.lacking(cohort.answers[labelled_points(cohort, stays_of(cohort, ids))]):
                raise InputError(f"{cohort.reader}: the labelled {name} stays hold {lacking}, where both "
                                 "classes are needed; check the label file, give more labels or a --split")

    def count(self, cohort: Cohort, stays: np.ndarray) -> str:
        """How many of these stays have the outcome."""
        return f"{(cohort.stay_label[stays] == 1).sum():,} positive"

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
        without = cohort.label[points] == 0
        negative = points[without]
        positives = len(points) - len(negative)
        most = max(1, int(max(config.negatives * positives, config.few_points - positives)))
        if len(negative) > most:
            sample = np.random.default_rng([seed, epoch]).choice(negative, most, replace=False)
            points = np.sort(np.concatenate([points[~without], sample]))
        weight = np.where(cohort.label[points] == 0, max(1, len(negative) / most), 1)
        return points, weight.astype(np.float32)

    # ---- how it is learned ---------------------------------------------------------------------------------

    def loss(self, logits, answer, config, weight=None, total=None) -> torch.Tensor:
        """Focal loss (Lin et al. 2017, eq. 5) or label-smoothed cross-entropy, as `config`, a FinetuneConfig,
        says: logits [..., 2], answer [..., 1] (NaN: none), weight [...] (None: 1 where there is an answer) ->
        [], the sum over points divided by `total` (None: the sum of the weights)."""
        logits, label = logits.float().flatten(0, -2), answer.nan_to_num(nan=-1).long().flatten()
        weight = (label >= 0).float() if weight is None else weight.flatten()
        if config.loss == "cross_entropy":
            loss = F.cross_entropy(logits, label, label_smoothing=config.label_smoothing, ignore_index=-1,
                                   reduction="none")
        else:
            log_p = logits.log_softmax(-1).gather(1, label.clamp(min=0)[:, None]).squeeze(1)  # true class
            alpha = torch.where(label == 1, config.focal_alpha, 1 - config.focal_alpha)
            loss = -alpha * (1 - log_p.exp()) ** config.focal_gamma * log_p
        return (weight * loss).sum() / (weight.sum() if total is None else total)

    def prior(self, answer, weight) -> torch.Tensor:
        """The logits [2] with which the head begins: the log of the classes' shares in these answers [n, 1],
        all there, and weights [n]."""
        return (torch.bincount(answer[:, 0].long(), weights=weight, minlength=2) / weight.sum()).log()

    def shares(self, logits: list, answers: np.ndarray) -> np.ndarray:
        """The shares [k] of k logits [n, 2] that fit these answers [n, 1] best, see `best_shares`."""
        log_odds = [each.diff()[:, 0].cpu().double().numpy() for each in logits]
        return best_shares(np.stack(log_odds), answers[:, 0].astype(int))

    # ---- how it is answered and judged ---------------------------------------------------------------------

    def answer(self, logits) -> np.ndarray:
        """Logits [n, 2] -> the probability of the outcome, [n, 1] float64."""
        return logits.float().softmax(-1)[:, 1:].cpu().double().numpy()

    def validation(self, cohort: Cohort, points: np.ndarray, answer: np.ndarray) -> dict:
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

    def describe(self, row: dict) -> str:
        """The figures of `validation` for the log."""
        utility = f", utility {row['val_utility']:.4f}" if "val_utility" in row else ""
        return f"validation AUROC {row['val_auc']:.4f}, AUPRC {row['val_auprc']:.4f}{utility}"

    def figures(self, cohort: Cohort, points: np.ndarray, methods: dict, thresholds: dict, sensitivity: float,
                groups: dict) -> dict:
        """Plain numbers about each method's probabilities [n] at these points [n], see `score_figures`; with
        labels of the challenge 2019 also its utility, as `sepsis`. thresholds: of each method. Patients are
        numbered as their first stays come: where each stay is a patient of its own, a bootstrap over them
        draws stays."""
        stay = cohort.point_stay[points]
        subject = pd.factorize(cohort.subject)[0][stay]
        scored = Points(stay, subject, cohort.point_minute[points], cohort.label[points].astype(int))
        figures = score_figures(scored, methods, thresholds[CHECKPOINT], sensitivity, groups)
        if of_challenge_2019(stay, scored.minute, scored.label):
            figures["sepsis"] = {name: sepsis_figures(scored, probability, thresholds[name])
                                 for name, probability in methods.items()}
        return figures


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
