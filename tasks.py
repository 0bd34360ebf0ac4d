"""The `Task`: what is asked, how an outcome is learned, answered and judged; and the boosted trees that help
to answer."""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Callable, ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.model_selection import train_test_split

from data import Cohort, InputError, shortest, stays_of, subjects_with_label
from batches import Normalizer
from metrics import (CHECKPOINT, FEW, Points, best_shares, best_utility_threshold, binary_tables,
                     brier_scores, censoring_curve, censoring_weights, class_measure, concordance_measure,
                     figure_title, hours_since_onset, incidence_curve, integrated, measured, number_measure,
                     of_challenge_2019, ranking_measure, resampled, score_figures,
                     sepsis_figures, tables_of, weighted_mean)
from questions import labelled_points


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
    best: ClassVar[str]                  # the figure of `validation` that chooses the epoch, see `improves`
    untrained: ClassVar[dict]
    losses: ClassVar[tuple] = ("cross_entropy",)  # settings `loss` that this kind can learn by
    width: ClassVar[int] = 1             # A, columns of the answers
    later: ClassVar[dict] = {}           # fields that checkpoints of earlier versions lack, with their values
    followed: ClassVar[int] = 0          # of `columns`, the one that stands for the whole answer: the risk

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
        return pd.DataFrame(shortest(answers), columns=self.label_columns)

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
            if task.state_dict() == task.later | state and task.sound():
                return task
        raise InputError(f"{path}: its task is {str(state)[:80]}, which this version does not know; use the "
                         "version that wrote it")

    def sound(self) -> bool:
        """Tells whether the fields can be those of a trained task: a checkpoint may come from a stranger."""
        values = {f.name: (getattr(self, f.name), type(f.default)) for f in fields(self)}
        numbers = [number for name, (value, _) in values.items() if name != "names"
                   for number in (value if isinstance(value, tuple) else [value])]
        return (all(type(value) is kind for value, kind in values.values())
                and set(map(type, self.names)) == {str} and len(set(self.names)) == len(self.names)
                and all(type(number) is float and math.isfinite(number) for number in numbers))

    def recode(self, cohort: Cohort) -> Cohort:
        """The cohort with its answers in the order of this task's names. Raises InputError where its labels
        are of another kind, or have names that this task does not know."""
        if cohort.labelled.any() and cohort.kind != self.kind:
            raise InputError(f"{cohort.reader}: its labels are of the kind {cohort.kind}, where the "
                             f"checkpoint answers {self.kind}; give labels of its kind, or --kind "
                             f"{self.kind}")
        if not cohort.labelled.any():
            answers = np.full((len(cohort.answers), self.width), np.nan, dtype=np.float32)
        elif unknown := [name for name in cohort.names if name not in self.names]:
            raise InputError(f"{cohort.reader}: its labels name {', '.join(unknown[:3])}, where the "
                             f"checkpoint knows {', '.join(self.names[:8])}; give labels of these alone")
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
        return cohort.describe_answers(np.isin(cohort.point_stay, stays))

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

    def tree_targets(self, answer) -> torch.Tensor:
        """What each ensemble of trees learns of the answers [n, A]: [n, ensembles], NaN: none."""
        return answer

    def tree_logits(self, score) -> torch.Tensor:
        """The scores of the ensembles as logits: log odds [..., ensembles] -> [..., outputs]."""
        return torch.stack([-score / 2, score / 2], dim=-1).flatten(-2)

    def trees_share(self, head, trees, answers: np.ndarray) -> np.ndarray:
        """The share of each ensemble of trees, in tenths, by which its logits and the head's, [n, outputs]
        each, are averaged so that they fit these answers [n, A] best."""
        raise NotImplementedError

    def calibrated(self, logits, answers: np.ndarray) -> "Task":
        """The task with what it learns of its answers from validation points: logits [n, outputs], answers
        [n, A]."""
        return self

    # ---- how it is answered and judged ---------------------------------------------------------------------

    def answer(self, logits) -> np.ndarray:
        """Logits [n, outputs] -> the answers in `columns`, [n, columns] float64."""
        raise NotImplementedError

    def measures(self, answers: np.ndarray, given: np.ndarray) -> tuple[list[str], Callable]:
        """The names of m numbers that judge what was `given` [n, columns] for these answers [n, A], and their
        measure, see `measured`."""
        raise NotImplementedError

    def validation(self, cohort: Cohort, points: np.ndarray, answer: np.ndarray) -> dict:
        """Figures of the answers [n, columns] at these validation points [n], of which `best` chooses the
        epoch."""
        names, measure = self.measures(cohort.answers[points].astype(float), answer)
        values = measure(np.ones((1, len(points))))[0].tolist()
        return {f"val_{name}": value for name, value in zip(names, values) if f"val_{name}" in self.untrained}

    def improves(self, row: dict, best: dict) -> bool:
        """Whether the epoch of these figures of `validation` is better than the `best` so far."""
        return row[self.best] > best[self.best]

    def describe(self, row: dict) -> str:
        """The figures of `validation` for the log."""
        figures = {name.removeprefix("val_"): row[name] for name in self.untrained}
        shown = ", ".join(f"{figure_title(name)} {value:.4f}" for name, value in figures.items())
        return f"validation {shown}"

    def figures(self, cohort: Cohort, points: np.ndarray, methods: dict, thresholds: dict = {},
                sensitivity: float | None = .8, groups: dict = {}) -> dict:
        """Plain numbers about each method's answers [n, columns] at these points [n], with 95% intervals by
        bootstrap over patients, and how far the checkpoint's lie from each other method's. groups: {variable:
        {group: mask [n]}}, in which the checkpoint's are repeated; thresholds, of each method, and
        sensitivity, of alarms (None: they begin at the threshold), are for a binary outcome."""
        stay, answers = cohort.point_stay[points], cohort.answers[points].astype(float)
        subject = cohort.patient[stay]
        own = methods[CHECKPOINT]

        def size(mask):
            return {"stays": len(np.unique(stay[mask])), "patients": len(np.unique(subject[mask])),
                    "points": int(mask.sum())}

        def drawn(given, mask=slice(None)):
            names, measure = self.measures(answers[mask], given[mask])
            return names, resampled(measure, subject[mask])

        whole, rows = size(np.ones(len(points), dtype=bool)), {}
        for name, given in methods.items():
            names, rows[name] = drawn(given)
        unit = "patients" if whole["patients"] < whole["stays"] else "stays"
        few = f"{unit}: {whole[unit]}; below {FEW} no interval is given, and the figures may be chance"
        return {"kind": self.kind, **whole, "resampled": unit, "few": few if whole[unit] < FEW else "",
                "methods": {name: measured(names, of) for name, of in rows.items()},
                "differences": {name: measured(names, rows[CHECKPOINT] - of)
                                for name, of in rows.items() if name != CHECKPOINT},
                "subgroups": {variable: {key: size(mask) | measured(*drawn(own, mask))
                                         for key, mask in masks.items()}
                              for variable, masks in groups.items()},
                **self.details(answers, own)}

    def details(self, answers: np.ndarray, given: np.ndarray) -> dict:
        """More plain numbers about what the checkpoint gave [n, columns] for these answers [n, A]."""
        return {}

    def tables(self, figures: dict) -> dict[str, pd.DataFrame]:
        """`figures` as tables of texts by their titles. They also hold who was `scored`, where the threshold
        comes from (`threshold_is`) and perhaps the figures of the `model`."""
        return tables_of(figures)


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

    def trees_share(self, head, trees, answers):
        """See `best_shares`."""
        log_odds = [each.diff()[:, 0].cpu().double().numpy() for each in (head, trees)]
        return best_shares(np.stack(log_odds), answers[:, 0].astype(int))[1]

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
        """See `score_figures`; with labels of the challenge 2019 also its utility, as `sepsis`."""
        stay = cohort.point_stay[points]
        subject = cohort.patient[stay]
        scored = Points(stay, subject, cohort.point_minute[points], cohort.label[points].astype(int))
        methods = {name: answer[:, 0] for name, answer in methods.items()}
        figures = score_figures(scored, methods, thresholds[CHECKPOINT], sensitivity, groups)
        if of_challenge_2019(stay, scored.minute, scored.label):
            figures["sepsis"] = {name: sepsis_figures(scored, probability, thresholds[name])
                                 for name, probability in methods.items()}
        return figures

    def tables(self, figures):
        return binary_tables(figures)


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

    def lacking(self, answers):
        both = ((answers == 0).any(0) & (answers == 1).any(0)).any()
        return super().lacking(answers) or ("" if both else "one class alone of each outcome")

    def check(self, cohort, split):
        """Also each outcome needs both classes among the training labels."""
        super().check(cohort, split)
        answers = cohort.answers[labelled_points(cohort, stays_of(cohort, split["train"]))]
        both = (answers == 0).any(0) & (answers == 1).any(0)
        if not both.all():
            lacking = [self.names[k] for k in np.flatnonzero(~both)]
            raise InputError(f"{cohort.reader}: the training labels of {', '.join(lacking[:3])} hold one "
                             "class only; leave out these outcomes, or give more labels")

    def occurs(self, answers):
        return (answers == 1).any(1)

    def point_loss(self, logits, answer, config):
        """The mean over the outcomes that have an answer."""
        label = answer.nan_to_num(nan=-1).long()                                                     # [n, k]
        loss = two_class_loss(logits.view(-1, 2), label.flatten(), config).view(label.shape)
        known = label >= 0
        return (loss * known).sum(1) / known.sum(1).clamp(min=1)

    def squares(self, weight):
        return weight.square() / len(self.names)

    def prior(self, answer, weight):
        """The log of the classes' shares of each outcome."""
        shares = [(weight[:, None] * (answer == label)).sum(0) for label in (0, 1)]
        return (torch.stack(shares, dim=1) / sum(shares)[:, None]).clamp(min=1e-6).log().flatten()

    def trees_share(self, head, trees, answers):
        both = torch.stack([each.view(len(each), -1, 2).diff()[..., 0] for each in (head, trees)])
        both, known = both.cpu().double().numpy(), ~np.isnan(answers)                             # [2, n, k]
        return np.array([best_shares(both[:, of, k], answers[of, k].astype(int))[1]
                         for k, of in enumerate(known.T)])

    def answer(self, logits):
        """The probability of each outcome."""
        return logits.float().view(len(logits), -1, 2).softmax(-1)[..., 1].cpu().double().numpy()

    def measures(self, answers, given):
        names = [f"{measure}{of}" for of in ("", *(f"_{name}" for name in self.names))
                 for measure in ("auc", "auprc")]
        return names, ranking_measure(answers, given)

    def details(self, answers, given):
        known = ~np.isnan(answers)
        return {"labelled": dict(zip(self.names, known.sum(0).tolist())),
                "positive": dict(zip(self.names, (answers == 1).sum(0).tolist()))}


class Classes(Task):
    """One of several classes, which exclude one another: the probability of each."""

    kind = "classes"
    needed = "at least two are"
    best = "val_auc"
    untrained = {"val_accuracy": -1.0, "val_auc": -1.0, "val_log_loss": math.inf}

    @property
    def outputs(self):
        return len(self.names)

    def labels(self, answers):
        words = np.array([*self.names, None], dtype=object)
        return pd.DataFrame({"label": words[np.nan_to_num(answers[:, 0], nan=-1).astype(int)]})

    def renamed(self, answers, place):
        return np.append(place, np.nan)[np.nan_to_num(answers, nan=-1).astype(int)].astype(np.float32)

    def lacking(self, answers):
        one = "" if len(np.unique(answers)) > 1 else "one class only"
        return super().lacking(answers) or one

    def point_loss(self, logits, answer, config):
        return F.cross_entropy(logits, answer[:, 0].nan_to_num(nan=-1).long(), reduction="none",
                               label_smoothing=config.label_smoothing, ignore_index=-1)

    def prior(self, answer, weight):
        """The log of the classes' shares; a class without a label counts half a one."""
        count = torch.bincount(answer[:, 0].long(), weights=weight, minlength=len(self.names)).clamp(min=.5)
        return (count / count.sum()).log()

    def answer(self, logits):
        """The probability of each class."""
        return logits.double().softmax(-1).cpu().numpy()

    def measures(self, answers, given):
        return ["accuracy", "auc", "log_loss", "kappa"], class_measure(answers[:, 0].astype(int), given)

    def details(self, answers, given):
        """The confusion: how many points of a class (row) are taken for each (column)."""
        size = len(self.names)
        pairs = answers[:, 0].astype(int) * size + given.argmax(1)
        return {"classes": list(self.names),
                "confusion": np.bincount(pairs, minlength=size**2).reshape(size, size).tolist()}


LEVELS = (.1, .5, .9)  # the quantiles that a number is answered by


@dataclass(frozen=True)
class Number(Task):
    """A number, such as days of stay: its median and an interval that holds it with a chance of 80%. The
    logits are its quantiles on a standardised scale, see `Normalizer`."""

    mean: float = 0.0       # of f(number)
    std: float = 1.0
    log_scale: float = 0.0  # f(x) = log(1 + x / log_scale); 0: x
    margin: float = 0.0     # on the standardised scale, by which the interval is widened on either side

    kind = "number"
    needed = "different numbers are"
    best = "val_mae"
    untrained = {"val_mae": math.inf, "val_coverage": -1.0}
    outputs = ensembles = len(LEVELS)
    columns = ("median", "low", "high")
    later = {"margin": 0.0}

    def sound(self):
        return super().sound() and self.std > 0 <= self.log_scale

    def lacking(self, answers):
        return super().lacking(answers) or ("" if np.ptp(answers) > 0 else "one number only")

    def fitted(self, cohort, points, weight, horizons=()):
        super().fitted(cohort, points, weight, horizons)
        scale = Normalizer(["label"], np.zeros(1), np.ones(1), np.zeros(1))
        scale.fit_variable(0, cohort.answers[points, 0].astype(float))
        return replace(self, mean=float(scale.mean[0]), std=float(scale.std[0]),
                       log_scale=float(scale.log_scale[0]))

    def standardised(self, answer) -> torch.Tensor:
        """Numbers as the logits are: a tensor of any shape -> the same."""
        if self.log_scale:
            answer = (answer.clamp(min=0) / self.log_scale).log1p()
        return (answer - self.mean) / self.std

    def pinball(self, logits, answer) -> torch.Tensor:
        """The loss of each quantile (Koenker & Bassett 1978): logits [..., 3], answer [n, 1] -> [..., 3]."""
        over = self.standardised(answer) - logits
        level = torch.tensor(LEVELS, device=logits.device)
        return torch.maximum(level * over, (level - 1) * over)

    def point_loss(self, logits, answer, config):
        there = ~answer[:, 0].isnan()
        return self.pinball(logits, answer.nan_to_num()).mean(1) * there

    def squares(self, weight):
        return weight.square() / len(LEVELS)

    def prior(self, answer, weight):
        """The quantiles of the weighted answers."""
        number, order = self.standardised(answer[:, 0].float()).sort()
        share = weight[order].cumsum(0) / weight.sum()
        level = torch.tensor(LEVELS, device=share.device)
        return number[torch.searchsorted(share, level).clamp(max=len(number) - 1)]

    def tree_targets(self, answer):
        return self.standardised(answer).expand(-1, len(LEVELS))

    def tree_logits(self, score):
        return score

    def trees_share(self, head, trees, answers):
        answers, shares = torch.from_numpy(answers).to(head.device), torch.arange(11) / 10
        mixed = torch.stack([head.lerp(trees, float(share)) for share in shares])                # [11, n, 3]
        loss = self.pinball(mixed, answers).double().mean(1)
        return shares[loss.argmin(0).cpu()].numpy()

    def calibrated(self, logits, answers):
        """With the margin by which the interval holds 80% of these answers: what was learned from fits the
        quantiles better than other points do (Romano et al. 2019, conformal quantile regression)."""
        number = self.standardised(torch.from_numpy(answers[:, 0]).to(logits.device))
        beyond = torch.maximum(logits[:, 0] - number, number - logits[:, -1]).double()
        level = min(1, (LEVELS[-1] - LEVELS[0]) * (1 + 1 / len(beyond)))
        return replace(self, margin=beyond.quantile(level).item())

    def answer(self, logits):
        """Median, low and high in the number's own unit. Quantiles that cross are put in order, which brings
        them nearer to the true ones (Chernozhukov et al. 2010)."""
        logits = logits.double().cpu() + self.margin * torch.tensor([-1, 0, 1])
        number = logits.sort(-1).values.numpy() * self.std + self.mean
        if self.log_scale:
            number = (np.expm1(number) * self.log_scale).clip(0)
        return number[:, [1, 0, 2]]

    def measures(self, answers, given):
        names = ["mae", "rmse", "spearman", "coverage", "width"]
        return names, number_measure(answers[:, 0], *given.T)

    def improves(self, row, best):
        return row[self.best] < best[self.best]


INTERVALS = 20  # about so many discrete hazards make a time


@dataclass(frozen=True)
class Event(Task):
    """The time to an event, which may never be seen (censored), of one or several causes, of which the first
    to come ends the wait: the chance of each cause up to each horizon, its cumulative incidence.

    Answers [Q, 2]: hours from the question to the event or the censoring; the cause, 0: censored. The logits
    [J, 1 + causes] are those of no event and of each cause in each of J intervals, for a point that came
    through the intervals before (Gensheimer & Narasimhan 2019)."""

    horizons: tuple = ()    # [H] hours
    edges: tuple = ()       # [J] hours, at which intervals end
    marginal: tuple = ()    # [causes * H] incidence of the training points
    times: tuple = ()       # the curve of censoring of the training points, see `censoring_curve`
    share: tuple = ()

    kind = "event"
    needed = "an event is"
    best = "val_concordance"
    untrained = {"val_concordance": -1.0, "val_brier": math.inf}
    width = 2
    label_columns = ("event", "hours")

    @property
    def followed(self):
        """The first cause at the largest horizon."""
        return len(self.horizons) - 1

    @property
    def outputs(self):
        return len(self.edges) * (1 + len(self.names))

    @property
    def columns(self):
        return tuple(f"{name}_{hours:g}" for name in self.names for hours in self.horizons)

    def sound(self):
        rising = all((np.diff([0, *times]) > 0).all() for times in (self.edges, self.horizons))
        return (super().sound() and rising and 0 < len(self.horizons) and {*self.horizons} <= {*self.edges}
                and len(self.marginal) == len(self.columns) and len(self.times) == len(self.share)
                and list(self.times) == sorted(self.times) and all(0 <= x <= 1 for x in self.share))

    def labels(self, answers):
        words = np.array(["0", *self.names, None], dtype=object)
        return pd.DataFrame({"event": words[np.nan_to_num(answers[:, 1], nan=-1).astype(int)],
                             "hours": shortest(answers[:, 0])})

    def renamed(self, answers, place):
        cause = np.array([0, *(at + 1 for at in place), np.nan], dtype=np.float32)
        return np.stack([answers[:, 0], cause[np.nan_to_num(answers[:, 1], nan=-1).astype(int)]], 1)

    def lacking(self, answers):
        some = ((answers[:, 1] > 0) & (answers[:, 0] > 0)).any()
        return super().lacking(answers) or ("" if some else "no event after hour 0")

    def occurs(self, answers):
        return answers[:, 1] > 0

    def fitted(self, cohort, points, weight, horizons=()):
        hours, cause = cohort.answers[points].astype(float).T
        events = hours[(cause > 0) & (hours > 0)]
        horizons = np.array(horizons or np.unique(np.quantile(events, (.25, .5, .75))))
        if (np.diff(horizons, prepend=0) <= 0).any() or horizons[-1] > hours.max():
            given = " ".join(map("{:g}".format, horizons))
            raise InputError(f"--horizons {given}: give rising hours above 0, up to the {hours.max():g} for "
                             "which a training stay is followed at most")
        edges = np.union1d(np.quantile(events, np.linspace(0, 1, INTERVALS + 1)[1:]), horizons)
        marginal = incidence_curve(hours, cause, weight, len(self.names), horizons).ravel()
        found = horizons, edges[edges > 0], marginal, *censoring_curve(hours, cause, weight)
        names = ("horizons", "edges", "marginal", "times", "share")
        return replace(self, **{name: tuple(array.tolist()) for name, array in zip(names, found)})

    def outcomes(self, answer) -> torch.Tensor:
        """answer [n, 2] -> [n, J] what came of each interval: 0 none, 1.. a cause, -1 not known. A point that
        is censored in the second half of an interval came through it."""
        edges = torch.tensor(self.edges, device=answer.device, dtype=answer.dtype)
        begin = F.pad(edges[:-1], (1, 0))
        hours, cause = answer[:, :1], answer[:, 1:]
        through = torch.where(cause > 0, hours > edges, hours >= (begin + edges) / 2)
        inside = (hours > begin) | (begin == 0)
        here = (cause > 0) & inside & (hours <= edges)
        return torch.where(here, cause, torch.where(through, 0., -1.)).nan_to_num(nan=-1).long()

    def point_loss(self, logits, answer, config):
        """The negative log likelihood of what came of the intervals."""
        outcome = self.outcomes(answer)
        loss = F.cross_entropy(logits.view(outcome.numel(), -1), outcome.flatten(), ignore_index=-1,
                               reduction="none")
        return loss.view(outcome.shape).sum(1)

    def squares(self, weight):
        """An input costs what it costs one outcome where it matters as much in all intervals, and more by how
        much it matters in an interval beside the mean of all."""
        weight = weight.view(len(self.edges), 1 + len(self.names), -1)
        mean = weight.mean(0, keepdim=True)
        return torch.cat([mean, weight - mean]).square().flatten(0, 1)

    def prior(self, answer, weight):
        """The log of the shares of what came of each interval; half a point more came to nothing known."""
        outcome = F.one_hot(self.outcomes(answer) + 1, 2 + len(self.names))[..., 1:]          # [n, J, 1 + c]
        count = torch.einsum("n,njc->jc", weight, outcome.float()) + .5 / (1 + len(self.names))
        return (count / count.sum(1, keepdim=True)).log().flatten()

    def answer(self, logits):
        """The cumulative incidence of each cause at each horizon."""
        chance = logits.double().view(len(logits), len(self.edges), -1).softmax(-1).cpu().numpy()
        free = np.pad(chance[:, :-1, 0].cumprod(1), ((0, 0), (1, 0)), constant_values=1)        # before each
        incidence = (free[..., None] * chance[..., 1:]).cumsum(1)                             # [n, J, causes]
        at = np.searchsorted(self.edges, self.horizons)
        return incidence[:, at].transpose(0, 2, 1).reshape(len(logits), -1)

    def _each_cause(self, given):
        """Yield each cause's number, name and incidence [n, H]."""
        incidence = given.reshape(len(given), len(self.names), -1)
        for k, name in enumerate(self.names):
            yield k + 1, name, incidence[:, k]

    def measures(self, answers, given):
        """Of each cause concordance of the incidence at the largest horizon and integrated Brier score; those
        of the first cause also under the names of all."""
        hours, cause, curve, until = *answers.T, (self.times, self.share), self.horizons[-1]
        names, concordances, scores = [], [], []
        for k, name, incidence in self._each_cause(given):
            names += [f"concordance_{name}", f"brier_{name}"]
            concordances.append(concordance_measure(hours, cause, k, incidence[:, -1], curve, until))
            scores.append(integrated(brier_scores(hours, cause, k, incidence, self.horizons, curve),
                                     self.horizons))

        def measure(weight):
            brier = weighted_mean(weight, *scores)                                                    # [R, k]
            ranked = np.concatenate([concordance(weight) for concordance in concordances], axis=1)
            return np.stack([ranked, brier], axis=2).reshape(len(weight), -1)
        return names, measure

    def validation(self, cohort, points, answer):
        names, measure = self.measures(cohort.answers[points].astype(float), answer)
        concordance, brier = measure(np.ones((1, len(points))))[0, :2].tolist()
        return {"val_concordance": concordance, "val_brier": brier}

    def details(self, answers, given):
        """The integrated Brier score of the training points' marginal curve; at each horizon what was
        predicted and what came, in all and in fifths of the prediction: observed incidences weigh points as
        `censoring_weights` does."""
        hours, cause, curve = *answers.T, (self.times, self.share)
        weights = censoring_weights(hours, cause, self.horizons, curve)                               # [n, H]
        marginal, calibration = np.tile(self.marginal, (len(given), 1)), {}
        of_marginal = {name: float(integrated(
            brier_scores(hours, cause, k, incidence, self.horizons, curve), self.horizons).mean())
            for k, name, incidence in self._each_cause(marginal)}
        for k, name, incidence in self._each_cause(given):
            for h, until in enumerate(self.horizons):
                came, weight, p = (cause == k) & (hours <= until), weights[:, h], incidence[:, h]
                fifth = np.searchsorted(np.quantile(p, (.2, .4, .6, .8)), p, side="left")
                parts = [fifth == part for part in range(5)]
                rows = [{"points": int(of.sum()), "predicted": float(p[of].mean()),
                         "observed": float(weight[of] @ came[of] / weight[of].sum())}
                        for of in [np.ones(len(p), dtype=bool), *parts] if weight[of].sum() > 0]
                calibration[f"{name}_{until:g}"] = {"all": rows[0], "fifths": rows[1:]}
        return {"causes": list(self.names), "horizons": list(self.horizons), "calibration": calibration,
                "brier_of_marginal": of_marginal,
                "events": {name: int((cause == k + 1).sum()) for k, name in enumerate(self.names)}}


KINDS = {kind.kind: kind for kind in (Binary, Several, Classes, Number, Event)}
