"""The settings of finetuning, in one place: what trains, the head, its optimizer, schedule, loss and early
stopping; and the boosted trees that help to answer."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from sklearn.base import is_classifier
from sklearn.ensemble import (GradientBoostingClassifier, GradientBoostingRegressor,
                              HistGradientBoostingClassifier, HistGradientBoostingRegressor)

from settings import FEATURES, check_settings, setting
from tasks import LEVELS, Binary, Task


OLDER = {"moments": 0}  # of runs that recorded no such setting


@dataclass
class FinetuneConfig:
    # What the head gets, and the head
    features: str = setting("stable", choices=FEATURES)  # of the backbone; see ModelConfig
    fuse: bool = True                # mu and logvar fused, or mu alone
    summaries: bool = True           # exact summaries of the stay beside the learned features
    most_variables: int = setting(128, low=0)  # summarised, at most: those most common in training stays
    head_widths: tuple = setting((), items=(int,))  # hidden widths of the head. None: the head is linear
    trees: int | None = 400          # boosted trees of the summaries; validation chooses their share
    tree_depth: int = 4
    tree_rate: float = 0.03          # shrinkage
    tree_subsample: float = setting(0.5, low=1e-9, high=1)  # share of the stays that a tree sees
    tree_features: float = setting(0.05, low=1e-9, high=1)  # share of the features that a split chooses from
    tree_leaf: int = 20              # least number of stays in a leaf
    # Training of the head. A cosine takes the learning rate to zero
    moments: int = setting(3, low=0)  # random earlier times at which a stay's one question is asked too
    batch_size: int = 64             # stays a step
    max_epochs: int | None = None    # None: as many as make 10,000 steps, but at most 20
    accumulation: int = 1            # batches a step of the optimizer
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple = setting((0.9, 0.999), high=0.999999, length=2)
    # Weights of the penalty on the head's first layer: half the squared norm, beside the sum of all losses
    learned_prior: float = 300.0     # on the inputs that the backbone learned
    summaries_prior: float = 1000.0  # on the exact summaries
    clip: float = 0.5                # largest norm of the gradient
    # Each point with the outcome is learned from, and for each of them this many others (full training draws
    # another sample each epoch). A cohort of fewer than `few_points` is learned whole. Weights stand for what
    # is left out
    negatives: float = 10.0
    few_points: int = 65_536
    # Loss
    loss: str = setting("cross_entropy", choices=("cross_entropy", "focal"))
    focal_alpha: float = setting(0.25, high=1)
    focal_gamma: float = 2.0
    label_smoothing: float = setting(0.0, high=1)  # of the cross-entropy
    # Epochs without a better validation AUROC after which the head stops. 0: it never stops, and the last
    # epoch is kept: on a few hundred validation stays the best epoch is mostly luck, and the regularised head
    # does not overfit
    patience: int = setting(0, low=0)
    max_trainable_ratio: float = setting(0.05, high=1)  # of all parameters, where the backbone is frozen
    # Full training. First the head is trained on the frozen backbone, as above (Kumar et al. 2022), then
    # everything
    full_batch_size: int = 16        # stays a step, of all processes together
    full_max_epochs: int | None = None  # None: as many as make 1,800 steps, but at most 5
    full_learning_rate: float = 1e-4  # of a pretrained backbone
    random_learning_rate: float = 5e-4  # of an untrained one
    reconstruction_weight: float = 1.0  # of the terms of pretraining, which stay in the loss
    full_drop_events: float = setting(0.3, high=1)  # share of the events that are hidden from the encoder
    # Share of a stay's loss that lies on the sets before its point, where it has one point
    full_before: float = setting(0.5, high=1)
    hidden_width: int | None = 64    # of a hidden layer beside the linear head

    __post_init__ = check_settings

    def epochs(self, points: int) -> int:
        """Returns the head's number of epochs over this many training points."""
        return self.max_epochs or epochs_of_steps(10_000, points, self.batch_size, most=20)

    def full_epochs(self, stays: int) -> int:
        """Returns the number of epochs of full training over this many stays."""
        return self.full_max_epochs or epochs_of_steps(1800, stays, self.full_batch_size, most=5)


def epochs_of_steps(steps: int, stays: int, batch_size: int, most: int) -> int:
    """Returns the number of epochs that make this many steps, at most `most`. What is learned follows the
    steps, and an epoch of a large cohort has many."""
    return min(most, math.ceil(steps / math.ceil(stays / batch_size)))


def head_penalty(model: nn.Module, config: FinetuneConfig, points: int, change=None) -> torch.Tensor:
    """Returns the L2 penalty on the head's first layer, or on this change of it, [c, F] -> [], beside the
    mean loss over this number of training points. The layer's inputs outnumber the positive stays. The
    penalty stands for two Gaussian priors, on the inputs that the backbone learned and on the summaries. The
    more points there are, the less it counts."""
    weight = model.cls_head[0].weight if change is None else change
    square = model.task.squares(weight) if len(model.cls_head) == 1 else weight.square()  # [c, F]
    learned, exact = square.tensor_split([square.shape[1] - model.feature_sizes()["summaries"]], dim=1)
    return 0.5 / points * (config.learned_prior * learned.sum() + config.summaries_prior * exact.sum())


MANY_POINTS = 20_000  # for more, exact boosting takes hours: histograms, and fewer, larger trees


def tree_sizes(config: FinetuneConfig, points: int, task: Task = Binary()) -> dict:
    """Returns the number and depth of the trees of an ensemble for this number of training points, as fields
    of ModelConfig. Without summaries there are no trees, which see nothing else; nor of some kinds."""
    trees = config.trees if config.summaries and task.ensembles else None
    if trees and points > MANY_POINTS:
        return {"head_trees": min(trees, 100), "tree_depth": max(config.tree_depth, 6)}
    return {"head_trees": trees, "tree_depth": config.tree_depth}


def boosted_trees(config: FinetuneConfig, points: int, seed: int, task: Task = Binary()) -> list:
    """Returns an estimator an ensemble of trees for this number of training points: stochastic gradient
    boosting (Friedman 2002), or boosting on histograms (Ke et al. 2017) for more than MANY_POINTS. A number's
    are regressors of its quantiles."""
    trees, depth = tree_sizes(config, points).values()
    shared = dict(max_depth=depth, min_samples_leaf=config.tree_leaf, random_state=seed)
    if points > MANY_POINTS:
        kinds = HistGradientBoostingClassifier, HistGradientBoostingRegressor, "quantile"
        shared |= dict(max_iter=trees, learning_rate=0.1, l2_regularization=10., max_features=0.2,
                       early_stopping=False)
    else:
        kinds = GradientBoostingClassifier, GradientBoostingRegressor, "alpha"
        shared |= dict(n_estimators=trees, learning_rate=config.tree_rate, max_features=config.tree_features,
                       subsample=config.tree_subsample)
    classifier, regressor, level = kinds
    if task.kind == "number":
        return [regressor(loss="quantile", **{level: of}, **shared) for of in LEVELS]
    return [classifier(**shared) for _ in range(task.ensembles)]


def adamw(parameters, rate: float, config) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) at this learning rate with the config's other settings."""
    return torch.optim.AdamW(parameters, lr=rate, betas=config.betas, weight_decay=config.weight_decay,
                             fused=True)


def cosine(rate: float, done: int, total: int) -> float:
    """Returns the learning rate when `done` of `total` steps, or epochs, are done. It falls to zero at the
    end (Loshchilov & Hutter 2017)."""
    return rate * 0.5 * (1 + math.cos(math.pi * min(1, done / total)))


# ------------------------------------------------------------------------------------------------------------
# Boosted trees
# ------------------------------------------------------------------------------------------------------------

def trees_of(estimator):
    """Yield left and right child (of a leaf: -1), feature, threshold and value (with the shrinkage) of the
    nodes of each tree of a fitted (Hist)GradientBoosting estimator."""
    if isinstance(estimator, (GradientBoostingClassifier, GradientBoostingRegressor)):
        for tree in (each.tree_ for each in estimator.estimators_[:, 0]):
            value = estimator.learning_rate * tree.value[:, 0, 0]
            yield tree.children_left, tree.children_right, tree.feature, tree.threshold, value
    else:
        for (predictor,) in estimator._predictors:
            nodes, leaf = predictor.nodes, predictor.nodes["is_leaf"].astype(bool)
            left, right = (np.where(leaf, -1, nodes[side].astype(np.int64)) for side in ("left", "right"))
            yield left, right, nodes["feature_idx"].astype(np.int64), nodes["num_threshold"], nodes["value"]


class BoostedTrees(nn.Module):
    """Ensembles of gradient-boosted trees (Friedman 2001), fitted by scikit-learn and kept as tensors: each a
    complete binary tree, whose node n has the children 2n + 1 and 2n + 2. They see what a linear head cannot,
    such as a variable that matters beyond a threshold."""

    def __init__(self, trees: int, depth: int, ensembles: int = 1):
        super().__init__()
        self.depth, self.trees = depth, trees
        trees = trees * ensembles
        self.register_buffer("feature", torch.zeros(trees, 2**depth - 1, dtype=torch.int64))
        self.register_buffer("threshold", torch.full((trees, 2**depth - 1), math.inf))
        self.register_buffer("value", torch.zeros(trees, 2**depth))  # of the leaves
        self.register_buffer("prior", torch.zeros(ensembles if ensembles > 1 else ()))

    def fit(self, x, targets: list, weight, estimators: list) -> None:
        """x [n, F]; weight [n]; of each ensemble the target [n] (NaN: none), and a (Hist)GradientBoosting
        estimator of as many trees, no deeper: a classifier, whose score is the log odds, or a regressor."""
        for number, (target, estimator) in enumerate(zip(targets, estimators)):
            known = ~target.isnan()
            target, weights = target[known], weight[known]
            classifies = is_classifier(estimator)
            estimator.fit(x[known].cpu().numpy(), (target.long() if classifies else target).cpu().numpy(),
                          sample_weight=weights.cpu().numpy())
            if classifies:
                prior = ((weights * target).sum() / weights.sum()).logit()
            elif isinstance(estimator, GradientBoostingRegressor):
                prior = torch.tensor(estimator.init_.constant_.item())
            else:
                prior = torch.tensor(estimator._baseline_prediction.item())
            self.prior.view(-1)[number] = prior
            self._keep(estimator, number * self.trees)

    def _keep(self, estimator, first: int) -> None:
        """Keeps the trees of a fitted estimator, from this place on."""
        for i, (left, right, feature, cut, value) in enumerate(trees_of(estimator), first):
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
        """x [..., F] -> the score of each ensemble, [..., ensembles]."""
        shape, x = x.shape, x.flatten(0, -2)
        tree = torch.arange(len(self.value), device=x.device)
        node = torch.zeros(len(x), len(tree), dtype=torch.int64, device=x.device)               # [n, trees]
        for _ in range(self.depth):
            node = 2 * node + 1 + (x.gather(1, self.feature[tree, node]) > self.threshold[tree, node])
        values = self.value[tree, node - self.feature.shape[1]].unflatten(1, (-1, self.trees))
        return (self.prior + values.sum(-1)).view(*shape[:-1], -1)
