"""Train SeqSetVAE: the command line and one explicit loop a mode.

    python train.py --mode pretrain [--data_dir D]
    python train.py --mode finetune --pretrained_ckpt checkpoints/.../best.pt [--full_training]
    torchrun --standalone --nproc_per_node=2 train.py ...   the same on several GPUs, or processes of a CPU
    torchrun --nnodes=2 --nproc_per_node=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT train.py ...
                                                            the same on several machines

A run has a folder under checkpoints/: config.json (all its settings; --config gives them to another run),
metrics.csv (one row an epoch), best.pt (the epoch that README.md names for each mode), last.pt (to --resume
from); see runs.py."""

import difflib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import runs
from batches import Normalizer, StayDataset, common_variables, epoch_batches, split_batch, variable_vectors
from data import Cohort, InputError, stays_of, variables_of
from checkpoint import Checkpoint
from finetune_config import (OLDER, FinetuneConfig, adamw, boosted_trees, cosine, epochs_of_steps,
                             head_penalty, tree_sizes)
from history_statistics import real_sets
from labels import telling_variables
from model import ModelConfig, SeqSetVAE, SeqSetVAEPretrain
from predictor import open_checkpoint
from questions import at_every_set, at_moments, describe_questions, hours_asked, labelled_points, stays_with
from runs import (PRECISIONS, Run, Signals, choose_device, data_parallel, encode_points, end_rank,
                  evaluation_loader, exit_code, from_rank_0, gathered, join_ranks, loader, progress,
                  read_cohort, summed)
from settings import (SEED, SHARE, Parser, SharedSettings, changed, check_settings, data_options, option,
                      recorded, setting, value_of)
from tasks import Task
from transfer import (adapted, begins_with_old_head, drawn_split, learn_old_head, load_backbone,
                      old_backbone, old_classifier, pretrained_source, say_what_is_not_heeded, split_beside)


# ------------------------------------------------------------------------------------------------------------
# Settings, and the command line that changes them
# ------------------------------------------------------------------------------------------------------------

@dataclass
class PretrainConfig:
    batch_size: int = 16           # stays a step, of all processes together
    max_epochs: int | None = None  # None: as many as make 2,500 steps, but at most 10
    learning_rate: float = 1.5e-3  # after its warm-up; a cosine takes it to a hundredth
    weight_decay: float = 0.01     # of matrices
    betas: tuple = setting((0.9, 0.98), high=0.999999, length=2)
    clip: float = 1.0              # largest norm of the gradient
    warmup_steps: int = 100        # of the learning rate
    beta_warmup_steps: int = 500   # of the KL's weight, up to ModelConfig.max_beta
    patience: int = setting(5, low=0)  # epochs that may go by without a better val_loss

    __post_init__ = check_settings

    def epochs(self, stays: int) -> int:
        """Returns the number of epochs for a training set of this many stays."""
        return self.max_epochs or epochs_of_steps(2500, stays, self.batch_size, most=10)


@dataclass
class RunSettings(SharedSettings):
    """The options of train.py."""
    split_seed: int = option("seed of the split alone (default: --seed)", group="data", **SEED)
    label_fraction: float = option("finetune: share of the training labels used (default: 1)", 1.0,
                                   mode="finetune", **SHARE)
    horizons: tuple = option(
        "finetune: of events, up to which hours after the question their chances are answered (default: "
        "the quartiles of the training events' times)", (), nargs="+", type=float, metavar="HOURS",
        mode="finetune", low=1e-6)
    objective: str = option("pretrain: our objective, or the original's (default: readout)", "readout",
                            group="model", mode="pretrain", choices=("readout", "original"))
    pretrained_ckpt: str = option(
        "the checkpoint to begin with (finetune: needed): pretrained, finetuned or exported; to finetune, "
        "the original implementation's will do", scope="path")
    adapt: bool = option(
        "of this checkpoint: its variables get the scale of these data's training stays, and variables that "
        "it does not know join", False)
    head: str = option("finetune: the head to begin with: a new one, or the old one of a finetuned "
                       "checkpoint (default: old, where it answers what the labels ask)",
                       choices=("new", "old"), mode="finetune")
    recalibrate: bool = option("finetune: of a finetuned checkpoint correct slope and intercept of its "
                               "answers, nothing else", False, mode="finetune")
    random_init: bool = option(
        "finetune: the checkpoint's architecture, data and split, but an untrained backbone", False,
        mode="finetune")
    allow_partial: bool = option("finetune: go on although backbone weights are missing in the checkpoint",
                                 False, mode="finetune")
    mode: str = option("needed", group="training", scope="call", choices=("pretrain", "finetune"))
    full_training: bool = option("finetune: train everything, not the head alone", False, mode="finetune")
    batch_size: int = option(
        f"stays a step, of all processes together (default: pretrain {PretrainConfig.batch_size}, finetune "
        f"{FinetuneConfig.batch_size}, full training {FinetuneConfig.full_batch_size})", scope="call")
    max_epochs: int = option(
        "passes over the training stays (default: pretrain 10, finetune 20, full training 5; of large "
        "cohorts fewer)", scope="call")
    changes: dict = option(
        "any field of PretrainConfig (train.py), FinetuneConfig (finetune_config.py) or ModelConfig "
        "(settings.py); may be repeated", names=["--set"], scope="call", metavar="NAME=VALUE",
        action="append", type=lambda text: text.partition("=")[::2])
    seed: int = option("of the split, the weights and the order of the batches (default: 0)", 0, **SEED)
    run_dir: str = option("folder of this run (default: a new one under checkpoints/)", group="run",
                          scope="call")
    config: str = option(
        "take all settings from another run's config.json; what the command line says besides goes before it",
        scope="call")
    resume: str = option(
        "go on with the run in this folder, from its last.pt, with its settings; auto: with the one in "
        "--run_dir, or start it there", scope="call")
    precision: str = option("auto: bf16 on CUDA and on CPUs with AMX, else fp32 (default: auto)", "auto",
                            scope="machine", choices=("auto", *PRECISIONS))
    last = None    # the last.pt, a Checkpoint, to go on from
    origin = None  # `source` (see `source_of`) of the run whose settings these are


MODEL_FIELDS = fields(ModelConfig)


def settable(mode: str, untrained: bool) -> dict[str, Field]:
    """The settings that --set can change, by name; untrained: the backbone begins so."""
    scopes = {"loose"} | ({None} if untrained else set()) | {mode}
    config = PretrainConfig if mode == "pretrain" else FinetuneConfig
    of_model = [f for f in MODEL_FIELDS if f.metadata.get("scope") in scopes]
    return {f.name: f for f in (*fields(config), *of_model)}


def untrained(mode: str, options: dict) -> bool:
    """Whether with these options the backbone begins untrained, with sizes of its own."""
    return options.get("random_init") or mode == "pretrain" and not options.get("pretrained_ckpt")


EXAMPLES = """examples:
  python train.py --mode pretrain --data_dir my_table --run_dir checkpoints/mine --set latent_dim=96
  python train.py --mode finetune --pretrained_ckpt checkpoints/mine/best.pt --full_training --max_epochs 5
"""


def make_parser() -> Parser:
    return Parser(
        RunSettings, {"data": "data (default: the embedded synthetic cohort; finetune: the checkpoint's)",
                      "model": "model", "training": "training", "run": "run",
                      "original": "original implementation"},
        description="Pretrain SeqSetVAE without labels, or finetune a pretrained one.", epilog=EXAMPLES,
        usage="python train.py --mode {pretrain,finetune} [options]")


def run_settings(**given) -> RunSettings:
    """The settings of a run: the options given, over those that the run of --resume or --config recorded.
    Raises InputError where one is unknown or wrong, or is what a resumed run cannot become."""
    folder = folder_to_resume(given)
    last = folder and from_rank_0(lambda: read_last(folder, given.get("mode")))
    config = given.get("config") and read_config(given["config"], given.get("mode") or last and last.mode)
    before = over(RunSettings(changes={}), recorded_options(last.record) if last else {})
    settings = over(over(before, recorded_options(config) if config else {}), given)
    mode, changes, full = settings.mode, settings.changes, settings.full_training
    if not mode:
        raise InputError("--mode pretrain or --mode finetune is needed")
    if mode == "finetune" and not settings.pretrained_ckpt:
        raise InputError("--mode finetune needs --pretrained_ckpt; make one with: python train.py --mode "
                         "pretrain")
    for f in fields(settings):
        if f.metadata.get("mode", mode) != mode and getattr(settings, f.name) != f.default:
            raise InputError(f"--{f.name}: no option of --mode {mode}; leave it out")
    for name in [name for name in ("batch_size", "max_epochs") if name in given]:
        changes[f"full_{name}" if full else name] = given[name]
    if settings.adapt and not settings.pretrained_ckpt:
        raise InputError("--adapt: fits an old checkpoint to new data; give --pretrained_ckpt, or leave it "
                         "out")
    if settings.pretrained_ckpt and settings.objective != "readout":
        raise InputError("--objective: the pretrained checkpoint decides it; leave it out")
    known = settable(mode, untrained(mode, asdict(settings)))
    for name in changes:
        if name not in known:
            raise InputError(f"--set {name}: {why_unknown(name, known, mode)}")
        changes[name] = value_of(known[name], changes[name])
    if last:
        refuse_changes(before, settings, folder)
        settings.resume = folder
    settings.last = last
    settings.origin = last.source if last else config["source"] if config else None
    return settings


def over(settings: RunSettings, given: dict) -> RunSettings:
    """The settings with these options in place of their own."""
    return changed(settings, given | {"changes": settings.changes | dict(given.get("changes", {}))})


def why_unknown(name: str, known: dict, mode: str) -> str:
    if name in settable(mode, untrained=True):
        return "the pretrained checkpoint decides it; set it when pretraining, or add --random_init"
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"--mode {mode} has no such setting; {'near: ' + ', '.join(near) if near else 'see --help'}"


# ---- what a run recorded -----------------------------------------------------------------------------------

def recorded_options(record: dict) -> dict:
    """The options that a config.json, or a checkpoint, recorded, as `run_settings` takes them. What is none
    today, of a record of an older version, is said and left out."""
    mode, run = record["mode"], record["run"]
    options = {name: value for name, value in run["options"].items() if value is not None}
    known = settable(mode, untrained(mode, options))
    settings = OLDER | record["model_config"] | run["settings"]
    changes = {name: value for name, value in settings.items() if name in known}
    if unknown := [name for name in (*options, *run["settings"])
                   if name not in known and name not in RunSettings.__dataclass_fields__]:
        print(f"config: no longer a setting, and left out: {', '.join(unknown)}")
    return options | {"mode": mode, "changes": changes}


def folder_to_resume(given: dict) -> str | None:
    """The folder of --resume; of --resume auto the --run_dir, where it holds a last.pt."""
    resume, run_dir = given.get("resume"), given.get("run_dir")
    if resume != "auto":
        if resume and run_dir and Path(resume).resolve() != Path(run_dir).resolve():
            raise InputError(f"--run_dir {run_dir}: a resumed run stays in {resume}; leave the option out")
        return resume
    if not run_dir:
        raise InputError("--resume auto needs --run_dir, the folder of the run that is started or gone on "
                         "with")
    ranks = gathered(((Path(run_dir) / "last.pt").exists(), platform.node()))
    holders = [host for holds, host in ranks if holds]
    if holders and not ranks[0][0]:
        raise InputError(f"{run_dir}/last.pt: lies on {holders[0]}, but rank 0, which needs it, is on "
                         f"{ranks[0][1]}; copy the folder there, or start the machines in the order that "
                         "they had")
    return run_dir if holders else None


def read_last(folder: str, mode: str | None) -> Checkpoint:
    """The last.pt of a run. Raises InputError where it is none, or of another mode."""
    path = Path(folder) / "last.pt"
    last = Checkpoint.open(path)
    if not last.run or mode not in (None, last.mode):
        raise InputError(f"{path}: not the last.pt of a run with --mode {mode or 'pretrain or finetune'}; "
                         "resume it with its own mode, and with the version that started it")
    return last


def read_config(path: str, mode: str | None) -> dict:
    """A run's config.json. Raises InputError where it is none, or of another mode."""
    try:
        record = json.loads(Path(path).read_text())
        record["run"]["options"], record["run"]["settings"], record["model_config"], record["source"]
        if mode in (None, record["mode"]):
            return record
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"--config {path}: no readable JSON file of a run ({error}); give the config.json "
                         "that train.py wrote") from None
    raise InputError(f"--config {path}: of a run with --mode {record['mode']}; leave --mode out, or give "
                     "another")


def refuse_changes(before: RunSettings, after: RunSettings, folder: str) -> None:
    """Raises InputError where the command line asks a resumed run for what it cannot become."""
    old, new = (recorded(settings) | settings.changes for settings in (before, after))
    obeyed = {f.name for f in fields(RunSettings) if f.metadata.get("scope") in ("path", "machine")}
    obeyed.add("full_max_epochs" if after.full_training else "max_epochs")
    for name in new:
        if name not in obeyed and new[name] != old.get(name):
            raise InputError(f"--resume {folder}: {name} is {old.get(name)} in this run and cannot become "
                             f"{new[name]}; leave it out, or start a new run with --config "
                             f"{folder}/config.json")


# ------------------------------------------------------------------------------------------------------------
# The optimisation that pretraining and full training share
# ------------------------------------------------------------------------------------------------------------

class Training:
    """What the loops of pretraining and full training share: each step's batch, in parts that fit into memory
    and are spread over the ranks; autocast and scaler; sums of the reported terms; the end of a run that is
    asked to stop."""

    def __init__(self, run: Run, optimizer, batch_size: int):
        self.run, self.batch_size = run, batch_size
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self.parallel = data_parallel(run.model, run.seed)  # the model to call
        self.norm = None                                    # of the gradient of the last step
        run.restore(optimizer=optimizer, scaler=self.scaler)

    def steps(self, dataset: StayDataset, stays: np.ndarray):
        """Yield the steps that are left of the run's next epoch over these stays [n]: a step's number,
        counted from the first epoch's first, and its `parts`. A signal is obeyed at the end of a step."""
        run = self.run
        every = 1 if run.device.type == "cpu" else 50  # on an accelerator every look is a synchronisation
        Signals.held = True
        run.model.train()
        sizes = dataset.sizes(stays)
        batches = epoch_batches(sizes.sets, self.batch_size, run.seed, run.epoch)
        left = batches[run.done:]
        parts = [split_batch(sizes, batch, runs.WORLD)[runs.RANK::runs.WORLD] for batch in left]
        # A part without a stay takes the batch's first one, which counts nothing: other ranks wait for its
        # gradient.
        own = [stays[part if len(part) else batch[:1]] for batch, some in zip(left, parts) for part in some]
        stream = loader(dataset, own, run.device)
        bar = progress(zip(left, parts), len(left), f"epoch {run.epoch + 1}")
        for batch, some in bar:
            step = run.epoch * len(batches) + run.done
            self.terms = {}
            own_parts = itertools.islice(stream, len(some))
            yield step, self.parts(own_parts, [len(part) for part in some], len(batch))
            terms = dict(zip(self.terms, summed(torch.stack([*self.terms.values()]))))
            stopping = any(gathered(Signals.asked is not None))  # all leave at the same step
            run.done += 1
            if step % every == 0 or stopping or run.done == len(batches):
                finite_or_stop(self.norm, step, dataset.cohort.stay_id[stays[batch]], self.scaler, every)
                bar.set_postfix(loss=f"{terms['loss'].item() / len(batch):.3f}", refresh=False)
            if self.scaler.is_enabled():
                # A count, where the others are means.
                terms["skipped_steps"] = ~torch.isfinite(self.norm) * len(stays)
            run.totals = {name: run.totals.get(name, 0) + term for name, term in terms.items()}
            if stopping:
                run.save_last(run.best)
                raise KeyboardInterrupt(Signals.farewell)
        run.save_last(run.best)
        Signals.held = False  # evaluating can be left at any moment
        gathered(None)
        self.means = {name: total.item() / len(stays) for name, total in run.totals.items()}

    def parts(self, batches, counts: list[int], stays: int):
        """Yield this rank's parts of a step's batch of `stays` stays, and the factor of each part's loss: the
        mean over ranks of their sums is then the mean over all stays. The last part averages the gradient
        over ranks."""
        for i, (batch, self.count) in enumerate(zip(batches, counts)):
            last = i + 1 == len(counts)
            with nullcontext() if last or runs.WORLD == 1 else self.parallel.no_sync():
                yield batch, runs.WORLD * self.count / stays

    def report(self, terms: dict[str, torch.Tensor]) -> None:
        """Add the terms of a part, means over its stays, to what the epoch reports."""
        for name, term in terms.items():
            self.terms[name] = self.terms.get(name, 0) + term.detach() * self.count


def set_rate(run: Run, optimizer, rate: float) -> None:
    """Set the learning rate of the next step. Say it at the first step of a run resumed with other epochs."""
    if run.last and [run.epoch, run.done] == run.last.trainer["position"]:
        then, now = (record["run"]["settings"] for record in (run.last.record, run.record))
        if then != now:
            before = optimizer.param_groups[0]["lr"]
            tqdm.write(f"resume: the learning rate goes from {before:.3g} to {rate:.3g}: its cosine ends "
                       "with the last epoch, which --max_epochs has changed")
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_and_step(model, optimizer, scaler, clip: float) -> torch.Tensor:
    """Clip the gradient's norm, step, and return the norm before it was clipped."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def finite_or_stop(norm: torch.Tensor, step: int, batch_stays, scaler, every: int = 1) -> None:
    """Stop at a gradient that is not finite, which is looked at every `every` steps: the last good checkpoint
    stays. In fp16 the scaler skips such a step and halves its scale, as it must at first; from 2^16 to 2^-4
    are 20 in a row."""
    if torch.isfinite(norm) or scaler.is_enabled() and scaler.get_scale() > 2**-4:
        return
    cause = "lower the learning rate"
    if scaler.is_enabled():
        cause = "it overflows fp16 again and again: use --precision bf16 or fp32"
    before = f" or up to {every - 1} before" if every > 1 else ""
    named = ", ".join(batch_stays[:4])
    raise InputError(f"step {step}{before}: the loss or its gradient is not finite (stays {named} ...); look "
                     f"at these stays' values, or {cause}; best.pt and last.pt hold the last good weights")


def autocast(device, dtype):
    """The context in which a model is called: of a type below float32 its products alone."""
    return torch.amp.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ------------------------------------------------------------------------------------------------------------
# Pretraining
# ------------------------------------------------------------------------------------------------------------

def pretrain(arguments) -> Path:
    config = changed(PretrainConfig(), arguments.changes)
    device, dtype = choose_device(arguments.device, arguments.precision)
    data = data_options(arguments)
    given = data | {"kinds": ("binary",)}  # labels of other kinds would not stratify the split
    old, source = None, {}
    if arguments.pretrained_ckpt:
        old, cohort = open_checkpoint(arguments.pretrained_ckpt, given)
        data, source = old.data_settings(data), pretrained_source(arguments)
        split, whose = split_beside(arguments, old, cohort, given)
    else:
        cohort = read_cohort(given)
        split, whose = drawn_split(arguments, cohort)
    print(cohort.describe())
    train, valid = stays_of(cohort, split["train"]), stays_of(cohort, split["valid"])
    if not len(train) or not len(valid):
        raise InputError(f"{cohort.reader}: its own split has {len(train)} train and {len(valid)} valid "
                         "stays; give some to each, or leave the split out")
    if old:
        if arguments.adapt:
            old, source["adapted"] = adapted(old, cohort, train)
        dataset = StayDataset(cohort, old.normalizer)
    else:
        known = variables_of(cohort, train)  # what other stays alone hold would have no scale and no weights
        dataset = StayDataset(cohort, Normalizer.fit(cohort, train).of(known))
        print(dataset.normalizer.describe())
    if dataset.unknown_variables:
        print(f"{dataset.describe_known()}{', as no training stay holds them' * (old is None)}")

    torch.manual_seed(arguments.seed)
    model = old_backbone(arguments, old) if old else new_backbone(arguments, cohort, known)
    model, model_config = model.to(device), model.config
    run = Run(arguments, config, model, dataset, split, data, device, dtype, source=source,
              best={"val_loss": math.inf, "epoch": 0}, seen=old.subjects if old else {})
    print_size(model, device, dtype)
    print(f"split: {len(train):,} train, {len(valid):,} valid, {len(split['test']):,} test stays"
          f"{whose}; labels unused; run folder {run.folder}")

    epochs = config.epochs(len(train))
    steps = epochs * math.ceil(len(train) / config.batch_size)

    def rate(step):
        warm = config.learning_rate * min(1, (step + 1) / config.warmup_steps)
        return warm * (0.01 + 0.99 * cosine(1, step, steps))

    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = adamw(groups, config.learning_rate, config)
    training = Training(run, optimizer, config.batch_size)
    for epoch in run.epochs(epochs):
        if epoch - run.best["epoch"] > config.patience:
            print(f"early stop: val_loss has not improved for {epoch - run.best['epoch']} epochs")
            break
        began = time.time()
        for step, parts in training.steps(dataset, train):
            set_rate(run, optimizer, rate(step))
            beta = model_config.max_beta * min(1, step / config.beta_warmup_steps)
            for batch, share in parts:
                with autocast(device, dtype):
                    losses = training.parallel(batch, beta)
                training.scaler.scale(losses["loss"] * share).backward()
                del losses["mu"]
                training.report(losses)
            training.norm = clip_and_step(model, optimizer, training.scaler, config.clip)
        row = {"epoch": epoch + 1, **training.means,
               **evaluate_pretraining(model, dataset, valid, device, dtype),
               "learning_rate": optimizer.param_groups[0]["lr"]}
        improved = row["val_loss"] < run.best["val_loss"]
        star = " *" if improved else ""
        run.end_of_epoch(row, improved, f"val_loss {row['val_loss']:.4f}{star}, val_reconstruction "
                         f"{row['val_reconstruction']:.4f}, KL {row['val_kl']:.1f} a set, active units "
                         f"{row['active_units']}/{model_config.latent_dim}, {time.time() - began:.0f} s")
        if row["active_units"] < model_config.latent_dim // 20:
            print("warning: the posterior has collapsed (hardly a unit of mu varies over the data); lower "
                  "max_beta or raise free_bits")
    following = ["train.py", "--mode", "finetune", "--pretrained_ckpt"]
    return run.finish(f"val_loss {run.best['val_loss']:.4f}", following)


def new_backbone(arguments, cohort: Cohort, known: np.ndarray) -> SeqSetVAEPretrain:
    """An untrained model whose vocabulary are these variables [V] of the cohort."""
    config = (ModelConfig.original if arguments.objective == "original" else ModelConfig)(len(known))
    config = replace(config, input_dim=cohort.vectors.shape[1] or config.input_dim)
    config = changed(config, arguments.changes)
    names = [cohort.variables[v] for v in known]
    return SeqSetVAEPretrain(config, variable_vectors(names, config.input_dim, cohort.vectors[known]))


@torch.no_grad()
def evaluate_pretraining(model: SeqSetVAEPretrain, dataset: StayDataset, stays, device, dtype) -> dict:
    """Validation loss (nothing hidden, nothing sampled: deterministic), its parts, and the active units of
    mu: variance over the sets of the data above 0.01 (Burda et al. 2016, section 5.2)."""
    model.eval()
    totals, whole = Counter(), Counter()  # which add numbers and tensors by name
    for batch in evaluation_loader(dataset, stays, device):
        with autocast(device, dtype):
            losses = model(batch, model.config.max_beta)
        mu = losses.pop("mu")[real_sets(batch)].cpu().double()     # [sets, d]; float64 is not on every device
        totals.update({name: value.cpu().double() * len(batch) for name, value in losses.items()})
        totals.update(sets=len(mu), first=mu.sum(0), second=mu.square().sum(0))
    for part in gathered(totals):
        whole.update(part)
    sets, first, second = (whole.pop(name) for name in ("sets", "first", "second"))
    active = int((second / sets - (first / sets).square() > 0.01).sum())
    means = {f"val_{name}": value.item() / len(stays) for name, value in whole.items()}
    return means | {"active_units": active}


# ------------------------------------------------------------------------------------------------------------
# Finetuning
# ------------------------------------------------------------------------------------------------------------

def labelled(cohort: Cohort, ids: list) -> np.ndarray:
    """The stays [n] with these ids that have a labelled point."""
    return stays_with(cohort, labelled_points(cohort, stays_of(cohort, ids)))


def print_size(model, device, dtype) -> float:
    """Say how large the model is and where it runs. Returns the share of its parameters that is trained."""
    sizes = np.array([[p.numel(), p.numel() * p.requires_grad] for p in model.parameters()])
    total, trainable = sizes.sum(0)
    print(f"model: {type(model).__name__}, {trainable:,} of {total:,} parameters trainable "
          f"({trainable / total:.2%}); {device}, {dtype}".replace("torch.", ""))
    return trainable / total


def finetune(arguments, config: FinetuneConfig = FinetuneConfig()) -> Path:
    config, full = changed(config, arguments.changes), arguments.full_training
    device, dtype = choose_device(arguments.device, arguments.precision)
    given = data_options(arguments)
    checkpoint, cohort = open_checkpoint(arguments.pretrained_ckpt, given)
    old_head = begins_with_old_head(arguments, checkpoint, cohort)
    task = Task.from_state(checkpoint.task, checkpoint.path) if old_head else Task.of(cohort)
    cohort = task.recode(cohort) if old_head else cohort
    print(cohort.describe())
    split, whose = split_beside(arguments, checkpoint, cohort, given)
    if config.loss not in task.losses:
        raise InputError(f"--set loss={config.loss}: labels of the kind {task.kind} are learned by "
                         f"{task.losses[0]}; leave it out")
    if arguments.recalibrate:
        task.check(cohort, {"train and valid": split["train"] + split["valid"]})
    elif not old_head:
        task.check(cohort, {name: split[name] for name in ("train", "valid")})
    train, valid = labelled(cohort, split["train"]), labelled(cohort, split["valid"])
    train = task.subset(cohort, train, arguments.label_fraction, arguments.seed)
    checkpoint = checkpoint.completed(cohort, train, arguments.set_heads, arguments.transformer_heads)
    if checkpoint.original and not cohort.vectors.shape[1]:
        print("warning: no cached.csv lies in the data: the original checkpoint was trained on other "
              "variable vectors than the hashed names used now")
    source = pretrained_source(arguments)
    if arguments.adapt:
        if old_head:
            checkpoint.dataset(cohort)  # raises InputError where it knows none of the variables
        checkpoint, source["adapted"] = adapted(checkpoint, cohort, stays_of(cohort, split["train"]))
    dataset = checkpoint.dataset(cohort)
    print(dataset.describe_known())
    for name, auc in telling_variables(cohort, labelled_points(cohort, train)).items():
        print(f"warning: {name} alone tells the training labels, by its presence or last value (AUROC "
              f"{auc:.4f}): is it the outcome? leave it out of the events")

    torch.manual_seed(arguments.seed)
    learned, weight = task.training_points(cohort, train, config, arguments.seed, 0)
    if old_head:
        say_what_is_not_heeded(arguments, checkpoint)
        model = old_classifier(checkpoint)
    else:
        task = task.fitted(cohort, learned, weight, arguments.horizons)
        listed = common_variables(cohort, dataset, stays_of(cohort, split["train"]), config.most_variables)
        model = new_classifier(arguments, task, config, checkpoint, listed, len(learned))
    share = print_size(model.to(device), device, dtype)
    if not (full or old_head) and share > config.max_trainable_ratio:
        raise InputError(f"finetune_config.py: the head is {share:.1%} of all parameters; narrow head_widths "
                         f"below {config.max_trainable_ratio:.0%}")
    data = checkpoint.data_settings(given)
    asked = learned if len(learned) else np.arange(len(cohort.point_minute))
    hours = data.get("hours", None if cohort.timed else checkpoint.asked_at)
    source["asked"] = describe_questions(cohort, asked)
    learned_to = checkpoint.source.get("forecasts", True) and not arguments.random_init
    source["forecasts"] = bool(config.reconstruction_weight) if full else learned_to
    run = Run(arguments, config, model, dataset, split, data, device, dtype, source=source,
              best={"epoch": 0, **task.untrained}, seen=checkpoint.subjects,
              kept={"task": task.state_dict(), "asked_at": hours_asked(cohort, asked, hours)})
    counts = [f"{len(stays):,} {name} ({task.count(cohort, stays)})"
              for name, stays in (("train", train), ("valid", valid))]
    print(f"split: {', '.join(counts)}, {len(split['test']):,} test stays{whose}; run folder {run.folder}")

    asked = labelled_points(cohort, valid)
    if full:
        train_everything(arguments, config, run, train, asked)
    elif old_head:
        learn_old_head(run, config, np.union1d(train, valid), valid, checkpoint, arguments.recalibrate)
    else:
        train_head(config, run, train, asked)
    weighed = "" if old_head or model.trees is None else ", on stays that also set the trees' share"
    return run.finish(f"{task.describe(run.best)}{weighed}", ["test_suite.py", "--checkpoint"])


def new_classifier(arguments, task: Task, config: FinetuneConfig, checkpoint: Checkpoint, listed: np.ndarray,
                   points: int) -> SeqSetVAE:
    """The model to be finetuned, with the checkpoint's backbone or an untrained one of its sizes; listed [K]:
    the variables whose summaries its head gets; points: from how many it learns. Raises InputError where
    weights of the backbone are missing."""
    head = asdict(config) | tree_sizes(config, points, task)
    head |= {"classes": task.outputs, "classification_only": not arguments.full_training,
             "head_variables": len(listed), "drop_events": config.full_drop_events}
    model = SeqSetVAE(changed(checkpoint.config, arguments.changes | head), checkpoint.vocabulary, task)
    model.head_variables.copy_(torch.from_numpy(listed))
    if arguments.random_init:
        print("backbone: untrained (--random_init)")
        return model
    return load_backbone(model, checkpoint, arguments.allow_partial)


@torch.no_grad()
def prepare_head(model: SeqSetVAE, features, answer, weight, questions: int, config: FinetuneConfig,
                 seed: int) -> None:
    """Standardise the head's untrained input with the training points' statistics, start its bias at the
    task's prior, and fit the trees beside it; features [n, F], answer [n, A], weight [n]; questions: see
    HeadTraining."""
    untrained = features[:, features.shape[1] - len(model.feature_mean):]
    model.feature_mean.copy_(untrained.mean(0))
    model.feature_std.copy_(untrained.std(0).clamp(min=1e-6))
    model.cls_head[-1].bias.copy_(model.task.prior(answer, weight))
    if model.trees is not None:
        targets = model.task.tree_targets(answer).T
        model.trees.fit(model.tree_input(model.standardise(features)), targets, weight,
                        boosted_trees(config, questions, seed, model.task))


@torch.no_grad()
def fit_to_validation(model: SeqSetVAE, features, answers: np.ndarray) -> torch.Tensor:
    """Give the trees the share of the logits that is best at these validation points, and the task what it
    learns from them: features [n, F], answers [n, A]; see `Task.trees_share`, `Task.calibrated`. Returns
    their logits, [n, outputs]."""
    if model.trees is not None:
        logits = []  # of the head, of the trees
        for share in (0, 1):
            model.trees_share.fill_(share)
            logits.append(model.eval().classify(features))
        model.trees_share.copy_(torch.as_tensor(model.task.trees_share(*logits, answers)))
    logits = model.eval().classify(features)
    model.task = model.task.calibrated(logits, answers)
    return logits


class HeadTraining:
    """Epochs of the head on cached features [n, F] of the training points of a frozen backbone, answer [n, A]
    and weight [n]; questions: how many of them count, where the others are their stays' earlier moments (see
    `at_moments`). Equal to uncached training, since the backbone is deterministic in evaluation mode. Of
    several ranks each trains the same head on all features, from the same seed: that takes seconds, less than
    reducing the gradients of so small a model at every step."""

    def __init__(self, run: Run, config: FinetuneConfig, features, answer, weight, questions: int):
        self.run, self.config, self.questions = run, config, questions
        self.features, self.answer, self.weight = features, answer, weight
        if not run.last:
            prepare_head(run.model, features, answer, weight, questions, config, run.seed)
        self.optimizer = adamw(run.model.cls_head.parameters(), config.learning_rate, config)
        self.epochs = config.epochs(questions)

    @classmethod
    def of(cls, run: Run, train: np.ndarray, config: FinetuneConfig) -> "HeadTraining":
        """On the labelled points of these stays [n] and their earlier moments, encoded once."""
        points, weight = run.model.task.training_points(run.dataset.cohort, train, config, run.seed, 0)
        asked, weight = at_moments(run.dataset.cohort, points, weight, config.moments, run.seed)
        if len(weight) > len(points):
            print(f"head: learns from {len(points):,} questions and {len(weight) - len(points):,} earlier "
                  "moments of their stays")
        features = encode_points(run.model, run.dataset.of(asked), np.arange(len(weight)), run.device)
        answer, weight = (torch.from_numpy(array).to(run.device) for array in (asked.answers, weight))
        return cls(run, config, features, answer, weight, len(points))

    def epoch(self, epoch: int) -> float:
        """The mean loss of an epoch, before which several ranks may leave."""
        gathered(None)
        model, config, features, answer = self.run.model.train(), self.config, self.features, self.answer
        set_rate(self.run, self.optimizer, cosine(config.learning_rate, epoch, self.epochs))
        size = round(config.batch_size * len(answer) / self.questions)  # of as many stays
        batches = epoch_batches(np.ones(len(answer)), size, self.run.seed, epoch)
        total = torch.zeros((), device=features.device)
        for i, batch in enumerate(progress(batches, len(batches), f"epoch {epoch + 1}")):
            batch = torch.from_numpy(batch).to(features.device)
            loss = model.task.loss(model.classify(features[batch]), answer[batch], config, self.weight[batch])
            ((loss + head_penalty(model, config, self.questions)) / config.accumulation).backward()
            total += loss.detach() * len(batch)
            if (i + 1) % config.accumulation == 0 or i + 1 == len(batches):
                torch.nn.utils.clip_grad_norm_(model.cls_head.parameters(), config.clip)
                self.optimizer.step()
                model.zero_grad(set_to_none=True)  # not the optimizer's alone: full training goes on with all
        return total.item() / len(answer)

    def whole(self, features, answers: np.ndarray) -> None:
        """Every epoch, then the share of the trees by these validation points: features [n, F], answers
        [n, A]."""
        for epoch in range(self.epochs):
            self.epoch(epoch)
        fit_to_validation(self.run.model, features, answers)


def train_head(config: FinetuneConfig, run: Run, train, valid) -> None:
    """Train the head alone on a frozen backbone."""
    head = HeadTraining.of(run, train, config)
    val_features = encode_points(run.model, run.dataset, valid, run.device)
    run.restore(optimizer=head.optimizer)
    for epoch in run.epochs(head.epochs):
        if config.patience and epoch - run.best["epoch"] >= config.patience:
            print(f"early stop: {run.model.task.best} has not improved for {config.patience} epochs")
            break
        loss = head.epoch(epoch)
        if not math.isfinite(loss):
            raise InputError(f"epoch {epoch + 1}: the loss is not finite; give a lower rate, for instance "
                             f"--set learning_rate={config.learning_rate / 10:g}")
        row = {"epoch": epoch + 1, "loss": loss}
        evaluate_and_save(run, row, valid, val_features, keep_last=not config.patience)


def train_everything(arguments, config: FinetuneConfig, run: Run, train, valid) -> None:
    """Full training: the head first, on the backbone as it is; then every parameter on classification +
    reconstruction + KL."""
    model, cohort, epochs = run.model, run.dataset.cohort, config.full_epochs(len(train))
    labels = labelled_points(cohort, train)
    learned, _ = model.task.training_points(cohort, train, config, run.seed, 0)
    steps = epochs * math.ceil(len(train) / config.full_batch_size)
    if not run.last:
        head = HeadTraining.of(run, train, config)
        for epoch in range(head.epochs):
            head.epoch(epoch)
        del head

    highest = config.random_learning_rate if arguments.random_init else config.full_learning_rate
    optimizer = adamw(model.parameters(), config.full_learning_rate, config)
    training = Training(run, optimizer, config.full_batch_size)
    for epoch in run.epochs(epochs):
        points, weight = model.task.training_points(cohort, train, config, run.seed, epoch)
        stays = stays_with(cohort, points)
        if config.full_before and len(labels) == len(train):  # one label a stay
            weight = weight * (len(stays) / weight.sum())  # 1 a stay, on average
            asked, weight = at_every_set(cohort, points, weight, config.full_before)
        else:
            asked, weight = at_moments(cohort, points, weight, config.moments, [run.seed, epoch])
            weight = weight * (len(stays) / weight.sum())
        asked = run.dataset.of(asked, weight)
        for step, parts in training.steps(asked, stays):
            set_rate(run, optimizer, cosine(highest, step, steps))
            for batch, share in parts:
                with autocast(run.device, run.dtype):
                    terms = training.parallel(batch, losses=True)
                    logits = terms.pop("logits")
                    classification = model.task.loss(logits, batch.answer, config, batch.weight, len(batch))
                    unlabelled = terms["reconstruction"] + model.config.max_beta * terms["kl"]
                    loss = (classification + head_penalty(model, config, len(learned))
                            + config.reconstruction_weight * unlabelled)
                training.scaler.scale(loss * share).backward()
                training.report({"loss": classification, **terms})
            training.norm = clip_and_step(model, optimizer, training.scaler, config.clip)
        row = {"epoch": epoch + 1, **training.means}
        features = encode_points(model, run.dataset, valid, run.device)
        evaluate_and_save(run, row, valid, features, keep_last=False)


def evaluate_and_save(run: Run, row: dict, valid, val_features, keep_last: bool) -> None:
    """The end of an epoch: judge the answers at the validation points [n] from their features [n, F]; best.pt
    is the epoch of the best figure (`keep_last`: the last)."""
    cohort = run.dataset.cohort
    logits = fit_to_validation(run.model, val_features, cohort.answers[valid])
    task = run.model.task
    run.kept["task"] = task.state_dict()
    row |= task.validation(cohort, valid, task.answer(logits))
    row = gathered(row)[0]  # all go on from the figures of rank 0, should another's device round otherwise
    improved = keep_last or task.improves(row, run.best)
    star = " *" if improved and not keep_last else ""
    run.end_of_epoch(row, improved, f"{task.describe(row)}{star}")


def main(argv=None) -> int:
    if runs.RANK:
        sys.stdout = open(os.devnull, "w")

    def command():
        given = vars(make_parser().parse_args(argv))
        if runs.WORLD > 1:
            join_ranks(given.get("device", "auto"))
        settings = run_settings(**given)
        (pretrain if settings.mode == "pretrain" else finetune)(settings)
    code = exit_code(command)
    end_rank(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
