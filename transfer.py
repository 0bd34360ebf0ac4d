"""Beginning at a new hospital from old weights: who is trained on, the old head as a start that the site's
labels move as far as they can tell, and the scale and the variables of the site."""

import hashlib
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold

from batches import Normalizer, variable_vectors
from checkpoint import Checkpoint, splits_beside
from data import Cohort, InputError, events_of, make_splits, stays_of, subjects_with_label, variables_of
from finetune_config import FinetuneConfig, head_penalty
from metrics import FEW, excess, recalibration
from model import ModelConfig, SeqSetVAE, SeqSetVAEPretrain
from questions import labelled_points, stays_with
from readouts import VariableKeys
from runs import Run, encode_points, from_rank_0
from settings import changed
from tasks import Task


# ------------------------------------------------------------------------------------------------------------
# Who is trained on, and with what
# ------------------------------------------------------------------------------------------------------------

def drawn_split(arguments, cohort: Cohort) -> tuple[dict, str]:
    """The split of a cohort, and whose it is as a text."""
    seed = arguments.seed if arguments.split_seed is None else arguments.split_seed
    return make_splits(cohort, seed), " (of the data)" if (cohort.split >= 0).any() else f" (seed {seed})"


def split_beside(arguments, checkpoint: Checkpoint, cohort: Cohort, given: dict) -> tuple[dict, str]:
    """The same where a checkpoint is begun with: its own split is kept, unless the data are others, or have
    one that it did not know. given: the options that describe the data. Raises InputError where the split
    tests who it was trained or selected on."""
    drawn, whose = drawn_split(arguments, cohort)
    new, split, known = checkpoint.is_new(cohort), checkpoint.split, checkpoint.known_part(cohort)
    if (cohort.split >= 0).any() and (new or {"split_file", "label_file"} & given.keys()
                                      or set(drawn["test"]) != set(split["test"])):
        split = drawn
    elif new:
        split = splits_beside(known, drawn, cohort)
    else:
        whose = " of the checkpoint"
    tested = stays_of(cohort, split["test"])
    if leaks := np.unique(cohort.subject[tested[np.isin(known[tested], (0, 1))]]).tolist():
        raise InputError(f"{arguments.split_file or arguments.label_file or cohort.reader}: the split tests "
                         f"{len(leaks)} subjects ({', '.join(leaks[:3])} ...) that "
                         f"{arguments.pretrained_ckpt} was pretrained or selected on; pretrain with this "
                         "split and these labels")
    return split, whose


def pretrained_source(arguments) -> dict:
    """What a run records of the checkpoint that it begins with."""
    path = Path(arguments.pretrained_ckpt)
    digest = from_rank_0(lambda: hashlib.sha256(path.read_bytes()).hexdigest()[:16])
    return {"pretrained_ckpt": str(path), "pretrained": digest}


# ------------------------------------------------------------------------------------------------------------
# The old backbone
# ------------------------------------------------------------------------------------------------------------

def load_backbone(model, checkpoint: Checkpoint, allow_partial: bool):
    """The model with the weights of the checkpoint's backbone, each of which is accounted for. Raises
    InputError where some are missing."""
    report = checkpoint.backbone_into(model)
    if not report.complete and not allow_partial:
        named = ", ".join((report.missing + report.mismatched)[:3])
        raise InputError(f"{checkpoint.path}: backbone weights are missing or of another shape ({named} "
                         "...); give a matching checkpoint, or --allow_partial")
    print(f"✅ Loaded pretrained weights: {len(report.loaded)} tensors\n{report}")
    return model


def old_backbone(arguments, checkpoint: Checkpoint) -> SeqSetVAEPretrain:
    """The model that pretraining goes on with, with the checkpoint's weights; see `load_backbone`."""
    if checkpoint.original:
        raise InputError(f"{checkpoint.path}: of the original implementation, whose pretraining cannot go "
                         "on; finetune it, or pretrain anew")
    fixed = {f.name: getattr(checkpoint.config, f.name) for f in fields(ModelConfig)
             if f.metadata.get("scope") in (None, "loose") or f.name == "num_variables"}
    model = SeqSetVAEPretrain(changed(ModelConfig(**fixed), arguments.changes), checkpoint.vocabulary)
    return load_backbone(model, checkpoint, allow_partial=False)


# ------------------------------------------------------------------------------------------------------------
# Which head finetuning begins with
# ------------------------------------------------------------------------------------------------------------

def old_classifier(checkpoint: Checkpoint) -> SeqSetVAE:
    """The finetuned model, of which the head alone trains."""
    model = checkpoint.classifier().requires_grad_(False)
    model.cls_head.requires_grad_()
    return model


def begins_with_old_head(arguments, checkpoint: Checkpoint, cohort: Cohort) -> bool:
    """Whether finetuning begins with the checkpoint's head: by default where it has one and the labels ask
    what it answers. Raises InputError where it is asked for and cannot be."""
    said = "--recalibrate" if arguments.recalibrate else f"--head {arguments.head}"
    if not arguments.recalibrate and arguments.head != "old":
        usable = checkpoint.mode == "finetune" and not (checkpoint.original or arguments.full_training
                                                        or arguments.random_init)
        if arguments.head or not usable:
            return False
        if not asks_the_same(checkpoint, cohort):
            print(f"head: a new one, as {checkpoint.path} does not answer what the labels ask")
            return False
        return True
    for name in ("full_training", "random_init"):
        if getattr(arguments, name):
            raise InputError(f"{said}: does not go with --{name}, which trains more than the old head; leave "
                             "one out")
    if arguments.recalibrate and arguments.head == "new":
        raise InputError("--recalibrate: corrects the old head, where --head new asks for another; leave one "
                         "out")
    if checkpoint.mode != "finetune" or checkpoint.original:
        raise InputError(f"{said}: {checkpoint.path} has no head of train.py --mode finetune; leave the "
                         "option out")
    if not asks_the_same(checkpoint, cohort):
        task, other = Task.from_state(checkpoint.task, checkpoint.path), Task.of(cohort)
        raise InputError(f"{said}: {checkpoint.path} answers {task.kind} ({', '.join(task.names[:8])}), the "
                         f"labels are {other.kind} ({', '.join(other.names[:8])}); --head new learns these")
    if arguments.recalibrate and cohort.kind != "binary":
        raise InputError(f"--recalibrate: for outcomes that are 0 or 1, not of the kind {cohort.kind}; leave "
                         "it out, and the head begins with the old one")
    return True


def asks_the_same(checkpoint: Checkpoint, cohort: Cohort) -> bool:
    """Whether the cohort's labels, if it has any, ask what the finetuned checkpoint answers."""
    task = Task.from_state(checkpoint.task, checkpoint.path)
    return not cohort.labelled.any() or cohort.kind == task.kind and {*cohort.names} <= {*task.names}


# ------------------------------------------------------------------------------------------------------------
# The old head, corrected
# ------------------------------------------------------------------------------------------------------------

# Weights of the Gaussian prior on the change of the head, in units of the priors of a new one, see
# FinetuneConfig. (An infinite one leaves slope and intercept alone.)
STRENGTHS = (100., 30., 10., 3., 1.)
LEAST = .01  # slope of an old model that ranks these patients at all


@dataclass
class Correction:
    """What is made of the old logits of n points: slope * logits + intercept + change of the head."""

    slope: torch.Tensor      # []
    intercept: torch.Tensor  # [outputs]
    change: torch.Tensor     # [outputs, F], of the weights of a linear head

    def __call__(self, points: "SitePoints") -> torch.Tensor:
        """The corrected logits, [n, outputs]."""
        return self.slope * points.logits + self.intercept + points.share * (points.x @ self.change.T)


@dataclass
class SitePoints:
    """The site's labelled points, as the old model has them."""

    cohort: Cohort
    index: np.ndarray     # [n] in the cohort
    x: torch.Tensor       # [n, F] the head's input, standardised
    logits: torch.Tensor  # [n, outputs] of the old model
    answer: torch.Tensor  # [n, A]
    weight: torch.Tensor  # [n]
    share: torch.Tensor   # [outputs] that the head has in the logits, beside its trees

    @classmethod
    @torch.no_grad()
    def of_features(cls, model: SeqSetVAE, features, cohort: Cohort, index, weight) -> "SitePoints":
        """Those at these places [n] of the cohort, which have weights [n] and this input of the head [n, F],
        not yet standardised."""
        model.eval()
        answer, weight = (torch.from_numpy(array).to(features) for array in (cohort.answers[index], weight))
        share = 1 - model.trees_part() if model.trees is not None else features.new_ones(model.task.outputs)
        x, logits = model.standardise(features), model.classify(features)
        return cls(cohort, index, x, logits, answer, weight, share)

    def of(self, places: np.ndarray) -> "SitePoints":
        """The points at these places [m] of its own."""
        at = torch.from_numpy(places).to(self.x.device)
        return replace(self, index=self.index[places], x=self.x[at], logits=self.logits[at],
                       answer=self.answer[at], weight=self.weight[at])

    def describe(self, task: Task, when: str, logits: torch.Tensor) -> None:
        """Print how well these logits [n, outputs] answer; of a binary outcome also their calibration."""
        answer = task.answer(logits)
        text = task.describe(task.validation(self.cohort, self.index, answer)).removeprefix("validation ")
        if task.kind == "binary":
            label, weight = self.answer[:, 0].cpu().numpy(), self.weight.cpu().numpy()
            slope, intercept = recalibration(label, answer[:, 0], weight)
            (higher,) = excess(label, answer[:, 0], weight)
            text += (f", calibration slope {slope:.3f}, intercept {intercept:.3f}, observed - predicted "
                     f"{higher:.3f}")
        print(f"old head: {when}: {text}")

    @property
    def rarer(self) -> int:
        """How many patients have another label than most of them."""
        stays = stays_with(self.cohort, self.index)
        patients = np.bincount(1 + subjects_with_label(self.cohort, stays)[1])[1:]
        return int(patients.sum() - patients.max())


def correct(model: SeqSetVAE, config: FinetuneConfig, points: SitePoints, strength: float,
            with_slope: bool = True) -> Correction:
    """The correction that fits these points best: by the mean loss and the penalty of a new head, `strength`
    times, on the change (inf: no change). with_slope: the slope is learned too, and stays positive, so that
    it never turns the order of the answers round. The problem is small and smooth: L-BFGS (Liu & Nocedal
    1989) solves it."""
    log_slope = torch.zeros((), device=points.x.device, requires_grad=with_slope)
    intercept = torch.zeros_like(points.logits[0]).requires_grad_()
    unit = (strength * max(1, config.learned_prior)) ** -.5  # in which the penalty is as curved as the rest
    units = points.x.new_zeros(len(intercept), points.x.shape[1], requires_grad=unit > 0)
    learned = [part for part in (log_slope, intercept, units) if part.requires_grad]
    optimizer = torch.optim.LBFGS(learned, max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        change = units * unit
        corrected = Correction(log_slope.exp(), intercept, change)(points)
        total = model.task.loss(corrected, points.answer, config, points.weight)
        if unit > 0:
            total = total + strength * head_penalty(model, config, len(points.answer), change)
        total.backward()
        return total
    optimizer.step(loss)
    return Correction(log_slope.detach().exp(), intercept.detach(), units.detach() * unit)


@torch.no_grad()
def build_in(model: SeqSetVAE, correction: Correction) -> None:
    """Make the correction part of the weights: of the head's and its trees' alike, so that the trees keep
    their share."""
    last = model.cls_head[-1]
    for layer in (last, *(model.hidden_head[-1:] if hasattr(model, "hidden_head") else ())):
        layer.weight.mul_(correction.slope)
        layer.bias.mul_(correction.slope)
    last.bias.add_(correction.intercept)
    if len(model.cls_head) == 1:
        last.weight.add_(correction.change)
    if model.trees is not None:
        score = correction.intercept.view(model.task.ensembles, -1)  # see `Task.tree_logits`
        score = score.diff() if score.shape[1] == 2 else score
        model.trees.value.mul_(correction.slope)
        model.trees.prior.mul_(correction.slope).add_(score.view_as(model.trees.prior))


# The settings that the correction of an old head heeds: of its prior, its points and its loss.
HEEDED = {"learned_prior", "summaries_prior", "negatives", "few_points", "loss", "focal_alpha", "focal_gamma",
          "label_smoothing"}


def say_what_is_not_heeded(arguments, checkpoint: Checkpoint) -> None:
    """Say which settings given have no part in the correction of the checkpoint's head."""
    usual = asdict(checkpoint.config) | asdict(FinetuneConfig())
    given = {name for name, value in arguments.changes.items()
             if name not in HEEDED and value != usual[name]}
    if given := sorted(given | ({"horizons"} if arguments.horizons else set())):
        print(f"old head: its correction has no use for {', '.join(given)}; --head new has")


def say_what_flatters(checkpoint: Checkpoint, cohort: Cohort, stays: np.ndarray) -> None:
    """Warn where the old head has seen these labelled stays [n], by which it is to be corrected."""
    known = int(np.isin(checkpoint.known_part(cohort)[stays], (0, 1)).sum())
    if known:
        print(f"warning: of these {len(stays):,} labelled stays {known:,} are of patients that "
              f"{checkpoint.path} was trained or selected on: its answers flatter it there, and so does "
              "what is learned from them; give other stays (of another hospital with equal ids: --site), or "
              "--head new")


def learn_old_head(run: Run, config: FinetuneConfig, stays: np.ndarray, valid: np.ndarray,
                   checkpoint: Checkpoint, recalibrate: bool) -> None:
    """Correct the run's model, an old one, by the labels of these stays [n], of which some are `valid` [m]:
    by slope and intercept and, unless `recalibrate`, a change of the head whose prior cross-validation
    chooses. With fewer than FEW patients beside those of the most common label the intercept alone is
    learned, without different labels nothing. checkpoint: the old one."""
    model, cohort, task, old = run.model, run.dataset.cohort, run.model.task, checkpoint.metrics
    run.restore()
    for _ in run.epochs(1):
        asked = labelled_points(cohort, stays)
        if lacking := task.lacking(cohort.answers[asked]):
            print(f"old head: unchanged, as the labelled stays hold {lacking}; its figures are those of the "
                  "checkpoint")
            row = {name: old.get(name, value) for name, value in task.untrained.items()}
            run.end_of_epoch({"epoch": 1, "loss": math.nan, **row}, True, task.describe(row))
            continue
        used, weight = task.training_points(cohort, stays, config, run.seed, 0)
        features = encode_points(model, run.dataset, used, run.device)
        points = SitePoints.of_features(model, features, cohort, used, weight)
        few = points.rarer < FEW
        say_what_flatters(checkpoint, cohort, stays_with(cohort, used))
        print(f"old head: learns from {len(used):,} labels of train and valid stays, whose figures follow "
              "(by cross-validation, where that chooses)")
        points.describe(task, "before", points.logits)
        found, answered = correction_of(model, config, points, recalibrate, run.seed)
        points.describe(task, "after", answered)
        loss = task.loss(answered, points.answer, config, points.weight).item()
        build_in(model, found)
        if len(points.index) < len(asked):  # of a sample: the figures are of all of the validation stays
            points.index = labelled_points(cohort, valid)
            answered = encode_points(model, run.dataset, points.index, run.device, through=model.classify)
        row = task.validation(cohort, points.index, task.answer(answered))
        if few and "threshold" in row:
            row["threshold"] = old["threshold"]
        run.end_of_epoch({"epoch": 1, "loss": loss, **row}, True, task.describe(row))


def correction_of(model: SeqSetVAE, config: FinetuneConfig, points: SitePoints, recalibrate: bool,
                  seed: int) -> tuple[Correction, torch.Tensor]:
    """The correction that these points allow, see `learn_old_head`; and the logits [n, outputs] to judge it
    by, which are cross-validated where more was learned than slope and intercept."""
    if points.rarer < FEW:
        print(f"old head: {points.rarer} patients have another label than most; below {FEW} the intercept "
              "alone is learned")
        found = correct(model, config, points, math.inf, with_slope=False)
        return found, found(points)
    found = correct(model, config, points, math.inf)
    upright = found.slope.item() > LEAST
    if not upright:
        print("old head: it ranks the labels here no better than chance, so that it keeps its slope")
        found = correct(model, config, points, math.inf, with_slope=False)
    if recalibrate:
        return found, found(points)
    return cross_validated(model, config, points, upright, seed)


def cross_validated(model: SeqSetVAE, config: FinetuneConfig, points: SitePoints, with_slope: bool,
                    seed: int) -> tuple[Correction, torch.Tensor]:
    """The correction whose kind and prior answer best the patients that it was not learned from, in five
    parts of them: learned from all points; and the logits [n, outputs] of each part from the others."""
    cohort, stay = points.cohort, points.cohort.point_stay[points.index]
    parts = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    folds = [*parts.split(stay, cohort.stay_label[stay], cohort.subject[stay])]
    kinds = {"intercept": (math.inf, False)}  # name: strength of the prior, whether the slope is learned
    if with_slope:
        kinds["slope and intercept"] = (math.inf, True)
    if len(model.cls_head) == 1 and points.share.any():
        kinds |= {f"prior x {strength:g}": (strength, with_slope) for strength in STRENGTHS}
    losses, answers = [], []
    for kind in kinds.values():
        logits = torch.empty_like(points.logits)
        for rest, part in folds:
            found = correct(model, config, points.of(rest), *kind)
            logits[torch.from_numpy(part).to(logits.device)] = found(points.of(part))
        answers.append(logits)
        losses.append(model.task.loss(logits, points.answer, config, points.weight).item())
    best = int(np.argmin(losses))
    each = ", ".join(f"{name} {loss:.4f}" for name, loss in zip(kinds, losses))
    print(f"old head: loss in five-fold cross-validation: {each}; chosen: {[*kinds][best]}")
    return correct(model, config, points, *[*kinds.values()][best]), answers[best]


# ------------------------------------------------------------------------------------------------------------
# The scale and the variables of the site
# ------------------------------------------------------------------------------------------------------------

VALUES = 30  # of a variable in the site's training stays, below which the old scale is safer


def adapted(checkpoint: Checkpoint, cohort: Cohort, stays: np.ndarray) -> tuple[Checkpoint, dict]:
    """The checkpoint with the scale that variables have in these training stays [n] of a site, and with those
    variables that it did not know, behind its own. A variable keeps its old scale where it has fewer than
    VALUES values, or a constant one; whether a scale is logarithmic stays as it was. Returns also the names
    of the variables that were `rescaled`, `kept` their scale, `joined` or are `lacking`. Raises InputError
    where there are no such stays."""
    if not len(stays):
        raise InputError(f"--adapt: {cohort.reader}: the split has no training stays, whose scale is taken; "
                         "give some, or leave the option out")
    old, count = checkpoint.normalizer, np.zeros(len(cohort.variables), dtype=np.int64)
    for variable, value in events_of(cohort, stays):
        count += np.bincount(variable[~np.isnan(value)], minlength=len(count))
    fitted = Normalizer.fit(cohort, stays, like=old)
    print(fitted.describe())
    varies = (count >= VALUES) & fitted.varies
    place, held = {name: v for v, name in enumerate(old.variables)}, variables_of(cohort, stays)
    known = np.array([v for v in held if cohort.variables[v] in place], dtype=int)
    new, source = np.setdiff1d(held, known), known[varies[known]]
    kept = known[~varies[known] & (count[known] > 0)]
    arrays = {name: np.append(getattr(old, name), getattr(fitted, name)[new]) for name in Normalizer.ARRAYS}
    for name, array in arrays.items():
        array[[place[cohort.variables[v]] for v in source]] = getattr(fitted, name)[source]

    done = {what: [cohort.variables[v] for v in variables]
            for what, variables in (("rescaled", source), ("kept", kept), ("joined", new))}
    here = {cohort.variables[v] for v in known}
    done["lacking"] = [name for name in old.variables if name not in here]
    texts = {"rescaled": "have the scale of these stays", "joined": "join the vocabulary",
             "kept": f"keep their scale, as fewer than {VALUES} values or a constant one are here",
             "lacking": "that the checkpoint knows are not charted here (if one of them joins under another "
                        "name, the old head cannot know: tell it by --variables)"}
    for what, text in texts.items():
        if done[what]:
            more = " ..." if len(done[what]) > 8 else ""
            print(f"adapt: {len(done[what])} variables {text}: {', '.join(done[what][:8])}{more}")
    normalizer = replace(old, variables=[*old.variables, *done["joined"]], **arrays)
    checkpoint = replace(checkpoint, normalizer=normalizer)
    return (joined(checkpoint, done["joined"], cohort.vectors[new]) if len(new) else checkpoint), done


def joined(checkpoint: Checkpoint, names: list[str], given: np.ndarray) -> Checkpoint:
    """The checkpoint with vectors and keys of these new variables [n], as pretraining begins them; given
    [n, D]: vectors of the data, see `Cohort.vectors`. All else of a variable is a function of its vector."""
    config, weights, free = checkpoint.config, checkpoint.weights, "setvae.keys.free.weight"
    vectors = torch.cat([checkpoint.vocabulary, variable_vectors(names, config.input_dim, given)])
    if free in weights:
        keys = VariableKeys.begun(names, len(weights[free]), config.key_dim)
        weights = weights | {free: torch.cat([weights[free], keys])}
    return replace(checkpoint, config=replace(config, num_variables=len(vectors)), weights=weights,
                   vocabulary=vectors)
