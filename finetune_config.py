"""The frozen-backbone settings of finetuning, in one place: what trains, the head, its optimizer, schedule, loss and early stopping."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.ensemble import GradientBoostingClassifier

from model import SeqSetVAE


@dataclass
class FinetuneConfig:
    # Head input and head
    features: str = "beliefs"        # of the frozen backbone: "stable", "beliefs" or "multiscale" (see ModelConfig)
    fuse: bool = True                # fused mu and logvar, or mu alone
    summaries: bool = True           # exact per-variable summaries of the stay beside the learned features
    head_variables: int = 128        # of which both speak, at most: the most common of the training stays
    head_widths: tuple = ()          # hidden widths of the head: none, it is linear
    trees: int | None = 400          # boosted trees beside it; their logits and the head's are averaged
    tree_depth: int = 4
    tree_rate: float = 0.03          # shrinkage
    tree_subsample: float = 0.5      # share of the stays that a tree sees
    tree_features: float = 0.05      # share of the features that a split may choose from
    tree_leaf: int = 20              # stays in a leaf, at least
    # Optimizer and schedule (cosine with restarts), of the head
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple = (0.9, 0.999)
    l2: float = 0.4                  # times half the squared norm of the head's first layer, in the loss
    restart_epochs: int = 20         # length of the first cosine cycle; the next is twice as long
    clip: float = 0.5
    accumulation: int = 1            # batches a step
    # Loss
    loss: str = "cross_entropy"      # or "focal"
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0     # of the cross-entropy
    # Early stopping of the head on the validation AUROC, in epochs. 0: none, the last epoch is kept: on a few hundred validation stays the
    # best epoch is mostly luck, and the regularised head does not overfit (cross-validated: 0.851/0.528 kept last, 0.848/0.522 picked)
    patience: int = 0
    max_trainable_ratio: float = 0.05
    # Full training: the head is first trained on the frozen backbone (Kumar et al. 2022), then everything at these rates
    full_learning_rate: float = 3e-5 # of a pretrained backbone
    random_learning_rate: float = 5e-4  # of an untrained one
    reconstruction_weight: float = 1.0


def classification_loss(logits: torch.Tensor, label: torch.Tensor, config: FinetuneConfig) -> torch.Tensor:
    """Focal loss (Lin et al. 2017, eq. 5) or label-smoothed cross-entropy: logits [..., classes], label [...] -> [], the mean over the
    prediction points that have a label (others: -1)."""
    logits, label = logits.float().flatten(0, -2), label.flatten()
    if config.loss == "cross_entropy":
        return F.cross_entropy(logits, label, label_smoothing=config.label_smoothing, ignore_index=-1)
    log_p = logits.log_softmax(-1).gather(1, label.clamp(min=0)[:, None]).squeeze(1)                 # of the true class
    alpha = torch.where(label == 1, config.focal_alpha, 1 - config.focal_alpha) * (label >= 0)
    return (-alpha * (1 - log_p.exp()) ** config.focal_gamma * log_p).sum() / (label >= 0).sum()


def head_penalty(model: SeqSetVAE, config: FinetuneConfig) -> torch.Tensor:
    """L2 penalty on the head's first layer, whose standardised inputs outnumber the positive stays: -> []."""
    return 0.5 * config.l2 * model.cls_head[0].weight.square().sum()


def boosted_trees(config: FinetuneConfig, seed: int) -> GradientBoostingClassifier:
    """What fits the trees beside the head: stochastic gradient boosting (Friedman 2002)."""
    return GradientBoostingClassifier(n_estimators=config.trees, max_depth=config.tree_depth, learning_rate=config.tree_rate, random_state=seed,
                                      subsample=config.tree_subsample, max_features=config.tree_features, min_samples_leaf=config.tree_leaf)


def head_optimizer(model: SeqSetVAE, config: FinetuneConfig):
    """AdamW over the head alone, and its schedule (cosine with restarts), stepped once an epoch."""
    optimizer = torch.optim.AdamW(model.cls_head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas,
                                  fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, config.restart_epochs, T_mult=2)


def full_optimizer(model: SeqSetVAE, config: FinetuneConfig, epochs: int, pretrained: bool):
    """AdamW over all parameters and one cosine to zero, stepped once an epoch."""
    rate = config.full_learning_rate if pretrained else config.random_learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=config.weight_decay, betas=config.betas, fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
