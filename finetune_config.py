"""The frozen-backbone settings of finetuning, in one place: what trains, the head, its optimizer, schedule, loss and early stopping."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import SeqSetVAE


@dataclass
class FinetuneConfig:
    # Head input and head
    features: str = "multiscale"     # of the frozen backbone: "multiscale" or "stable"
    fuse: bool = True                # fused mu and logvar, or mu alone
    summaries: bool = False          # exact per-variable summaries of the stay beside the learned features
    head_widths: tuple = (32, 16, 8)
    # Optimizer and schedule (cosine with restarts), of the head
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple = (0.9, 0.999)
    restart_epochs: int = 5          # length of the first cosine cycle; the next is twice as long
    clip: float = 0.5
    accumulation: int = 1            # batches a step
    # Loss
    loss: str = "focal"              # "focal" or "cross_entropy"
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    label_smoothing: float = 0.05    # of the cross-entropy
    # Early stopping on the validation AUROC
    patience: int = 5                # epochs
    max_trainable_ratio: float = 0.05
    # Full training
    backbone_learning_rate: float = 2e-4
    reconstruction_weight: float = 0.1


def classification_loss(logits: torch.Tensor, label: torch.Tensor, config: FinetuneConfig) -> torch.Tensor:
    """Focal loss (Lin et al. 2017, eq. 5) or label-smoothed cross-entropy; logits [B, classes], label [B] -> []."""
    if config.loss == "cross_entropy":
        return F.cross_entropy(logits.float(), label, label_smoothing=config.label_smoothing)
    log_p = logits.float().log_softmax(-1).gather(1, label[:, None]).squeeze(1)                      # of the true class
    alpha = torch.where(label == 1, config.focal_alpha, 1 - config.focal_alpha)
    return (-alpha * (1 - log_p.exp()) ** config.focal_gamma * log_p).mean()


def build_optimizer(model: SeqSetVAE, config: FinetuneConfig, epochs: int):
    """AdamW over what trains and its schedule, stepped once an epoch.

    Frozen: the head alone, cosine with restarts. Full training: the pretrained backbone at its own rate, one cosine to zero.
    """
    backbone = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(SeqSetVAE.BACKBONE)]
    new = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(SeqSetVAE.BACKBONE)]
    groups = [{"params": new, "lr": config.learning_rate}] + ([{"params": backbone, "lr": config.backbone_learning_rate}] if backbone else [])
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, betas=config.betas, fused=True)
    if backbone:
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, config.restart_epochs, T_mult=2)
