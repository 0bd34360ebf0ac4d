"""Train SeqSetVAE: the command line and one explicit loop a mode.

    python train.py --mode pretrain [--data_dir D]
    python train.py --mode finetune --pretrained_ckpt checkpoints/.../best.pt [--full_training]
    torchrun --standalone --nproc_per_node=2 train.py ...   the same on several GPUs, or several processes of a CPU

A run has a folder under checkpoints/: best.pt (the best validation epoch), last.pt (to --resume from), metrics.csv (one row an epoch).
"""

import argparse
import ctypes
import fcntl
import io
import math
import os
import platform
import random
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
import torch
import torch.distributed as dist
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.model_selection import train_test_split
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (SPLITS, common_variables, Cohort, InputError, Normalizer, StayDataset, balanced_parts, epoch_batches, make_splits, sorted_batches, split_batch, stays_of,
                  variable_vectors, write_atomically)
from readers import load_cohort
from finetune_config import FinetuneConfig, boosted_trees, classification_loss, full_optimizer, head_optimizer, head_penalty
from model import (CHECKPOINT_FORMAT, ModelConfig, SeqSetVAE, SeqSetVAEPretrain, checkpoint_config, checkpoint_state, load_backbone,
                   read_checkpoint, real_sets)

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
EVALUATION_BATCH = 32  # stays
PRETRAIN = dict(batch_size=16, max_epochs=15, learning_rate=1.5e-3, weight_decay=0.01, betas=(0.9, 0.98), clip=1.0, warmup_steps=100,
                beta_warmup_steps=500, patience=5)
FINETUNE = dict(batch_size=64, max_epochs=20)
FULL_TRAINING = dict(batch_size=16, max_epochs=3)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain SeqSetVAE without labels, or finetune a pretrained one.", allow_abbrev=False,
                                     usage="python train.py --mode {pretrain,finetune} [options]")
    parser.add_argument("--mode", choices=("pretrain", "finetune"), required=True)
    defaults = {name: f"pretrain {PRETRAIN[name]}, finetune {FINETUNE[name]}, full training {FULL_TRAINING[name]}" for name in FULL_TRAINING}

    add = parser.add_argument_group("data (default: the embedded synthetic cohort; finetune: the checkpoint's)").add_argument
    add("--data_dir", help="folder of the data, of any layout that README.md lists")
    add("--params_map", "--params_map_path", dest="params_map", metavar="FILE", help="original layout: statistics, CSV variable,mean,std or .pkl")
    add("--label_file", "--label_path", dest="label_file", metavar="CSV", help="original layout: labels, ts_id,in_hospital_mortality")
    add("--synthetic_stays", type=positive, default=1000, metavar="N", help="size of the embedded cohort (default: %(default)s)")

    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=positive, metavar="N", help=f"stays a step, of all processes together (default: {defaults['batch_size']})")
    add("--max_epochs", type=positive, metavar="N", help=f"(default: {defaults['max_epochs']})")
    add("--seed", type=seed, default=0, metavar="N", help="of the split, the weights and the order of the batches (default: %(default)s)")
    add("--device", default="auto", help="auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, mps (never run so far) (default: %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 on CUDA and on CPUs with AMX, else fp32 (default: %(default)s)")
    add("--run_dir", metavar="DIR", help="folder of this run (default: a new one under checkpoints/)")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder, from its last.pt; its options are kept")

    add = parser.add_argument_group("pretrain").add_argument
    add("--objective", choices=("readout", "original"), default="readout", help="our objective, or the original's (default: %(default)s)")

    add = parser.add_argument_group("finetune").add_argument
    add("--pretrained_ckpt", metavar="CKPT", help="the pretrained checkpoint (needed); the original implementation's will do")
    add("--full_training", action="store_true", help="train everything, not the head alone")
    add("--label_fraction", type=fraction, default=1.0, metavar="X", help="share of the training labels used (default: %(default)s)")
    add("--random_init", action="store_true", help="the checkpoint's architecture, data and split, but an untrained backbone")
    add("--allow_partial", action="store_true", help="go on although backbone weights are missing in the checkpoint")
    add_head_options(add)
    arguments = parser.parse_args(argv)
    if arguments.resume:
        return resumed_arguments(arguments)
    if arguments.mode == "finetune" and not arguments.pretrained_ckpt:
        raise InputError("--mode finetune needs --pretrained_ckpt; make one with: python train.py --mode pretrain")
    return arguments


def settings_of(defaults: dict, arguments: argparse.Namespace) -> dict:
    """A mode's defaults, and what the command line says instead."""
    return defaults | {name: value for name in ("batch_size", "max_epochs") if (value := getattr(arguments, name))}


def add_head_options(add) -> None:
    """What the shapes in a bare state dict of the original implementation do not tell."""
    for option, of in (("--set_heads", "set encoder"), ("--transformer_heads", "Transformer")):
        add(option, type=positive, metavar="N", help=f"attention heads of the {of}, for a bare state dict of the original implementation")


def resumed_arguments(arguments: argparse.Namespace) -> argparse.Namespace:
    """The options with which the run to be resumed was started."""
    path = Path(arguments.resume) / "last.pt"
    content = read_checkpoint(path)
    if "trainer" not in content or content["trainer"]["arguments"]["mode"] != arguments.mode:
        raise InputError(f"{path}: not the last.pt of a run with --mode {arguments.mode}; resume it with its own mode")
    return argparse.Namespace(**{**vars(arguments), **content["trainer"]["arguments"], "resume": arguments.resume})


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def seed(text: str) -> int:
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 2**32)")
    return int(text)


def fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return float(text)


# ----------------------------------------------------------------------------------------------------------------------------------
# Several processes: each trains on its part of every batch and evaluates its part of the stays; rank 0 alone prints and writes
# ----------------------------------------------------------------------------------------------------------------------------------

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # by torchrun
LAUNCHER = "python" if WORLD == 1 else f"torchrun --standalone --nproc_per_node={WORLD}"


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def gathered(value) -> list:
    """`value` of every rank. Raises the InputError of a rank that failed meanwhile (see `main`), so that none waits for it forever."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    for value in values:
        if isinstance(value, InputError):
            raise value
    return values


def end_rank(code: int) -> None:
    """Of several processes: leave without Python's teardown, in which a thread of gloo may still want Python's lock. The teardown then aborts
    the finished process ("terminate called without an active exception"), or DistributedDataParallel's destructor waits for it forever."""
    if WORLD > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


@contextmanager
def rank_0_first():
    """The others begin when rank 0 is done: they then find the cache that it wrote."""
    if RANK:
        gathered(None)
    yield
    if not RANK:
        gathered(None)


def data_parallel(model, seed: int):
    """The model to call in training: its backward pass averages the gradients over ranks. (Every parameter takes part in every step:
    DistributedDataParallel need not look for unused ones.) From here on each rank draws masks, dropout and z of its own, so that a run of
    several ranks equals one of a single process where these are off: the objective itself is the same mean over the batch's stays."""
    if WORLD == 1:
        return model
    torch.manual_seed(seed + RANK)
    return DistributedDataParallel(model)


def own_parts(batches: list, events: np.ndarray) -> tuple[list, list]:
    """This rank's part of every batch, balanced by events, and the number of stays in each that count. A rank without a part, in a batch of
    fewer stays than ranks, takes the batch's first stay and counts 0: the backward pass of the others waits for it."""
    parts = [batch[balanced_parts(events[batch], WORLD)[RANK]] for batch in batches]
    return [part if len(part) else batch[:1] for part, batch in zip(parts, batches)], [len(part) for part in parts]


# ----------------------------------------------------------------------------------------------------------------------------------
# What both loops need: device, run folder, checkpoints
# ----------------------------------------------------------------------------------------------------------------------------------

def choose_device(name: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """The device and the autocast type (float32: no autocast). Raises InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and WORLD > 1:
            device = torch.device("cuda", LOCAL_RANK)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: not available here{' for each process' if WORLD > 1 else ''}; use --device auto") from None
    if device.type == "cuda" and WORLD > 1:
        torch.cuda.set_device(device)
    if precision == "auto":
        native = device.type == "cpu" and torch.cpu._is_amx_tile_supported()  # elsewhere a CPU emulates bf16, or gains little by it
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if device.type == "cuda" else "bf16" if native else "fp32"
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def keep_freed_memory() -> None:
    """glibc returns every freed block of over 32 MB to the system, and each page of the next one then costs a fault, a quarter of the time of
    an evaluation pass of a large model on a CPU: keep freed blocks for the next batch."""
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # parameters' numbers: malloc.h
        mallopt(trim_threshold, -1), mallopt(mmap_max, 0)


def loader(dataset: StayDataset, batches: list, device: torch.device):
    """Batches of stay indices -> EventBatches on the device. On CUDA a worker prepares them and the copies are asynchronous."""
    cuda = device.type == "cuda"
    batches = torch.utils.data.DataLoader(dataset, sampler=batches, batch_size=None, num_workers=2 if cuda else 0, pin_memory=cuda,
                                          worker_init_fn=leave_process_group,
                                          generator=torch.Generator())  # its own: the global one must not advance
    return (batch.to(device, non_blocking=cuda) for batch in batches)


def leave_process_group(worker: int) -> None:
    """torchrun signals a whole group of processes; a loader's worker that it ended would bring the run down before it has saved."""
    os.setpgrp()


def evaluation_batches(dataset: StayDataset, stays: np.ndarray) -> list[np.ndarray]:
    """This rank's batches of an evaluation pass, as positions into `stays`: every stay is in one batch of one rank."""
    return sorted_batches(dataset.sizes(stays))[RANK::WORLD]


def evaluation_loader(dataset: StayDataset, stays: np.ndarray, device: torch.device):
    return loader(dataset, [stays[b] for b in evaluation_batches(dataset, stays)], device)


def progress(iterable, total: int, what: str, batch_size: int = EVALUATION_BATCH):
    """tqdm over `total` batches, counted in stays, on a terminal; silent when piped."""
    return tqdm(iterable, total=total, desc=what, leave=False, disable=True if RANK else None, unit=" stays", unit_scale=batch_size)


class Run:
    """The folder of one training run, its checkpoints and metrics.csv, and what a signal asks of it. All ranks call its methods."""

    def __init__(self, arguments, cohort: Cohort):
        self.arguments, self.last = vars(arguments), None
        self.folder = Path(arguments.resume or arguments.run_dir or CHECKPOINTS / f"{arguments.mode}-{time.strftime('%Y%m%d-%H%M%S')}")
        if arguments.resume:
            last = read_checkpoint(self.folder / "last.pt")
            if last["source"]["fingerprint"] != cohort.fingerprint:
                raise InputError(f"{self.folder}/last.pt: the data changed since this run was started; start a new run")
            self.last = last if "model" in last else None  # killed before its first save, a run starts afresh
        if RANK == 0:
            self._take_folder(new=not arguments.resume)
        gathered(None)
        if not arguments.resume:
            self.save("last.pt", {"trainer": {"arguments": self.arguments}, "source": {"fingerprint": cohort.fingerprint}})
        self.rows = self.last["trainer"]["rows"] if self.last else []
        self.stop = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _take_folder(self, new: bool) -> None:
        """Make the run's folder where it is new, and lock it."""
        if new:
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError:
                raise InputError(f"{self.folder}: exists already; choose another --run_dir, or continue it with --resume {self.folder}") from None
            except OSError as error:
                raise InputError(f"{self.folder}: cannot be made ({error.strerror}); choose another --run_dir") from None
        try:
            self.lock = open(self.folder / ".lock", "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it, however the process ends
        except OSError:
            raise InputError(f"{self.folder}: another process is training in it, or it cannot be written; wait for it, or start a new run") from None
        for leftover in self.folder.glob(".*.*.*"):  # of a process that was killed while saving
            leftover.unlink()

    def _interrupt(self, number, frame):
        if self.stop and WORLD == 1:  # torchrun repeats the signal once the first rank has left
            os._exit(128 + number)
        if not self.stop and RANK == 0:
            once_more = "; once more to exit at once" if WORLD == 1 else ""
            print(f"interrupted: saving at the next step (head training: epoch){once_more}", file=sys.stderr)
        self.stop = True

    def stopping(self) -> bool:
        """Whether a signal reached any rank: all leave at the same step."""
        return any(gathered(self.stop))

    def leave(self) -> None:
        """End the interrupted run, whose last.pt is written."""
        print(f"saved; go on with: {LAUNCHER} train.py --mode {self.arguments['mode']} --resume {self.folder}")
        end_rank(130)
        sys.exit(130)

    def log(self, row: dict) -> None:
        """Append an epoch's figures to metrics.csv."""
        self.rows.append(row)
        if RANK == 0:
            write_atomically(self.folder / "metrics.csv", lambda path: pd.DataFrame(self.rows).to_csv(path, index=False))
        gathered(None)

    def save(self, name: str, content: dict) -> None:
        if RANK == 0:
            buffer = io.BytesIO()  # torch.save tells nothing of what went wrong with a file
            torch.save(content, buffer)
            write_atomically(self.folder / name, lambda path: path.write_bytes(buffer.getbuffer()))
        gathered(None)

    def save_last(self, content: dict, position: tuple, best: dict, totals=None, **parts) -> None:
        """Write last.pt: position is (epochs done, batches done in the next), totals its sums so far, parts what has a state_dict."""
        self.save("last.pt", content | {"trainer": {
            "arguments": self.arguments, "position": list(position), "best": best, "totals": totals, "rows": self.rows,
            "random": gathered(random_states()), "parts": {name: part.state_dict() for name, part in parts.items()}}})

    def restore(self, model, **parts) -> tuple[dict, tuple, object]:
        """Continue where last.pt was written: (best so far, position, totals)."""
        state = self.last["trainer"]
        model.load_state_dict(self.last["model"])
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        states = state["random"] if isinstance(state["random"], list) else [state["random"]]  # of each rank; of a run begun before there were ranks
        if len(states) != WORLD:
            print(f"resume: a run of {len(states)} processes goes on with {WORLD}: its random masks will be others")
        if RANK < len(states):
            restore_random_states(states[RANK])
        return state["best"], tuple(state["position"]), state["totals"]


def random_states() -> dict:
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    return states | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def restore_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"].cpu())
    random.setstate((states["python"][0], tuple(states["python"][1]), states["python"][2]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in states["cuda"]])


def model_content(mode, model, dataset: StayDataset, split: dict, source: dict, metrics: dict) -> dict:
    """What every checkpoint holds: enough to score new data, and to know which stays it has seen."""
    return {
        "format": CHECKPOINT_FORMAT, "mode": mode, "model_config": asdict(model.config), "model": model.state_dict(),
        "vocabulary": model.setvae.vocabulary, "normalizer": dataset.normalizer.state_dict(), "split": split, "source": source, "metrics": metrics,
    }


def source_of(arguments, cohort: Cohort) -> dict:
    """Where a checkpoint comes from, for whoever must reproduce it."""
    paths = {name: (path := getattr(arguments, name)) and str(Path(path).resolve()) for name in ("data_dir", "params_map", "label_file")}
    return {**paths, "synthetic_stays": arguments.synthetic_stays,
            "reader": cohort.reader, "fingerprint": cohort.fingerprint, "seed": arguments.seed,
            "command": shlex.join([*LAUNCHER.split(), Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {"torch": str(torch.__version__), "numpy": np.__version__, "scikit-learn": sklearn.__version__}}


def finite_or_stop(norm: torch.Tensor, step: int, batch_stays, scaler, every: int = 1) -> None:
    """Stop at a gradient that is not finite, looked at `every` so many steps: the last good checkpoint stays. In fp16 the scaler skips such
    a step and halves its scale, as it must at first; from 2^16 to 2^-4 are 20 in a row."""
    if not torch.isfinite(norm) and not (scaler.is_enabled() and scaler.get_scale() > 2**-4):
        cause = "it overflows fp16 again and again: use --precision bf16 or fp32" if scaler.is_enabled() else "lower the learning rate"
        raise InputError(f"step {step}{f' or up to {every - 1} before' if every > 1 else ''}: the loss or its gradient is not finite (stays "
                         f"{', '.join(batch_stays[:4])} ...); look at these stays' values, or {cause}; best.pt and last.pt hold the last good "
                         "weights")


def skipped(row: dict) -> str:
    """What an epoch's line says of steps that overflowed fp16."""
    return f", {row['skipped_steps']:.0f} steps skipped (fp16 overflow)" if row.get("skipped_steps") else ""


def update(model, loss, optimizer, scaler, clip: float) -> torch.Tensor:
    """One step of the optimizer on `loss`; the norm of the gradient before it is clipped."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer), scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ----------------------------------------------------------------------------------------------------------------------------------
# Pretraining
# ----------------------------------------------------------------------------------------------------------------------------------

def pretrain(arguments) -> Path:
    settings = settings_of(PRETRAIN, arguments)
    device, dtype = choose_device(arguments.device, arguments.precision)
    with rank_0_first():
        cohort = load_cohort(arguments.data_dir, arguments.synthetic_stays, params_map=arguments.params_map, label_file=arguments.label_file)
    print(cohort.describe())
    split = make_splits(cohort, arguments.seed)
    train, valid = stays_of(cohort, split["train"]), stays_of(cohort, split["valid"])
    if not len(train) or not len(valid):
        raise InputError(f"{cohort.reader}: its own split has {len(train)} train and {len(valid)} valid stays; "
                         "give some to each, or leave the split out")
    dataset = StayDataset(cohort, Normalizer.fit(cohort, train))
    lengths, events = np.diff(cohort.stay_start)[train], cohort.stay_events[train]

    torch.manual_seed(arguments.seed), random.seed(arguments.seed)
    config = (ModelConfig.original if arguments.objective == "original" else ModelConfig)(len(cohort.variables))
    config = replace(config, input_dim=cohort.vectors.shape[1] or config.input_dim)
    model = SeqSetVAEPretrain(config, variable_vectors(cohort.variables, config.input_dim, cohort.vectors)).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=settings["learning_rate"],
                                  betas=settings["betas"], weight_decay=settings["weight_decay"], fused=True)
    steps = settings["max_epochs"] * math.ceil(len(train) / settings["batch_size"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / settings["warmup_steps"])
                                                 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(arguments, cohort)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: SeqSetVAEPretrain, {parameters:,} parameters, all trainable; {device}, {dtype}".replace("torch.", ""))
    print(f"split: {len(train):,} train, {len(valid):,} valid, {len(split['test']):,} test stays (seed {arguments.seed}); labels unused; "
          f"run folder {run.folder}")

    parallel = data_parallel(model, arguments.seed)
    source, parts = source_of(arguments, cohort), dict(optimizer=optimizer, schedule=schedule, scaler=scaler)
    best, start, totals = run.restore(model, **parts) if run.last else ({"val_loss": math.inf, "epoch": 0}, (0, 0), None)
    step, every = schedule.last_epoch, 1 if device.type == "cpu" else 50  # on an accelerator every look costs a synchronisation
    for epoch in range(start[0], settings["max_epochs"]):
        if epoch + 1 - best["epoch"] > settings["patience"] + 1:
            print(f"early stop: val_loss has not improved for {settings['patience']} epochs")
            break
        began, model = time.time(), model.train()
        batches = epoch_batches(lengths, settings["batch_size"], arguments.seed, epoch)
        own, counts = own_parts(batches, events)
        done = start[1] if epoch == start[0] else 0
        bar = progress(loader(dataset, [train[b] for b in own[done:]], device), len(batches) - done, f"epoch {epoch + 1}", settings["batch_size"])
        for batch in bar:
            beta = config.max_beta * min(1, step / settings["beta_warmup_steps"])
            with torch.amp.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = parallel(batch, beta)
            weight = WORLD * counts[done] / len(batches[done])  # the mean over ranks is then the mean over the whole batch's stays
            norm, stopping = update(model, weight * losses["loss"], optimizer, scaler, settings["clip"]), run.stopping()
            if step % every == 0 or stopping or done + 1 == len(batches):
                finite_or_stop(norm, step, cohort.stay_id[train[batches[done]]], scaler, every)
                bar.set_postfix(loss=f"{losses['loss'].item():.3f}", refresh=False)
            schedule.step()
            names = [name for name in losses if name != "mu"]
            current = dict(zip(names, summed(torch.stack([losses[name].detach() for name in names]) * counts[done])))
            step, done = step + 1, done + 1
            if scaler.is_enabled():
                current["skipped_steps"] = ~torch.isfinite(norm) * len(train)  # a count, where the others are means
            totals = {name: totals[name] + value for name, value in current.items()} if totals else current
            if stopping:
                run.save_last(model_content("pretrain", model, dataset, split, source, best), (epoch, done), best, totals, **parts)
                run.leave()

        row = {"epoch": epoch + 1, **{name: value.item() / len(train) for name, value in totals.items()},
               **evaluate_pretraining(model, dataset, valid, device, dtype), "learning_rate": schedule.get_last_lr()[0]}
        totals = None
        run.log(row)
        improved = row["val_loss"] < best["val_loss"]
        content = model_content("pretrain", model, dataset, split, source, row)
        if improved:
            best = {"val_loss": row["val_loss"], "epoch": epoch + 1}
            run.save("best.pt", content)
        run.save_last(content, (epoch + 1, 0), best, **parts)
        print(f"epoch {epoch + 1:3d}: loss {row['loss']:.4f}, val_loss {row['val_loss']:.4f}{' *' if improved else ''}, "
              f"val_reconstruction {row['val_reconstruction']:.4f}, KL {row['val_kl']:.1f} a set, "
              f"active units {row['active_units']}/{config.latent_dim}, {time.time() - began:.0f} s{skipped(row)}")
        if row["active_units"] < config.latent_dim // 20:
            print("warning: the posterior has collapsed (hardly a unit of mu varies over the data); lower max_beta or raise free_bits")
    print(f"best checkpoint: {run.folder / 'best.pt'} (epoch {best['epoch']}, val_loss {best['val_loss']:.4f})")
    print(f"next: python train.py --mode finetune --pretrained_ckpt {run.folder / 'best.pt'}")
    return run.folder / "best.pt"


@torch.no_grad()
def evaluate_pretraining(model: SeqSetVAEPretrain, dataset: StayDataset, stays: np.ndarray, device, dtype) -> dict:
    """Validation loss (nothing hidden, nothing sampled: deterministic), its parts, and the active units of mu: variance over the sets of
    the data above 0.01 (Burda et al. 2016, section 5.2)."""
    model.eval()
    totals = {}
    for batch in evaluation_loader(dataset, stays, device):
        with torch.amp.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = model(batch, model.config.max_beta)
        mu = losses.pop("mu")[real_sets(batch)].cpu().double()                                       # [sets, d]; float64 is not on every device
        current = {name: value.cpu().double() * len(batch) for name, value in losses.items()}
        current |= {"sets": len(mu), "first": mu.sum(0), "second": mu.square().sum(0)}
        totals = {name: totals.get(name, 0) + value for name, value in current.items()}
    ranks = [part for part in gathered(totals) if part]  # one may have had no batch
    totals = {name: sum(part[name] for part in ranks) for name in ranks[0]}
    sets, first, second = (totals.pop(name) for name in ("sets", "first", "second"))
    active = int((second / sets - (first / sets).square() > 0.01).sum())
    return {**{f"val_{name}": value.item() / len(stays) for name, value in totals.items()}, "active_units": active}


# ----------------------------------------------------------------------------------------------------------------------------------
# Finetuning
# ----------------------------------------------------------------------------------------------------------------------------------

def open_checkpoint(path, data_dir=None, synthetic_stays=None, params_map=None, label_file=None):
    """A checkpoint and its data, or the data given: (content, cohort, dataset, split, new).

    `new`: the cohort is not the one that the checkpoint was trained on (by content). An original checkpoint holds no vocabulary,
    normalizer or split: they are then the data's own.
    """
    content = read_checkpoint(path)
    source = content.get("source", {})
    if data_dir is None and "format" in content:
        data_dir, synthetic_stays = source["data_dir"], source["synthetic_stays"]
        params_map, label_file = params_map or source.get("params_map"), label_file or source.get("label_file")
    with rank_0_first():
        cohort = load_cohort(data_dir, synthetic_stays or 1000, params_map=params_map, label_file=label_file)
    if "format" not in content:
        return content, cohort, None, None, True
    dataset = StayDataset(cohort, Normalizer.from_state(content["normalizer"], path), points=True)
    if len(dataset.unknown_variables) == len(cohort.variables):
        raise InputError(f"{path}: its vocabulary holds none of the data's variables ({', '.join(cohort.variables[:5])} ...); "
                         "pretrain on this data, or rename its variables")
    return content, cohort, dataset, content["split"], cohort.fingerprint != source["fingerprint"]


def splits_beside(known: dict, cohort: Cohort, seed: int) -> dict[str, list[str]]:
    """The split of other data than the checkpoint's: a stay that the checkpoint knows keeps its part, so that no test stay was ever trained on."""
    part_of = {stay: part for part, ids in known.items() for stay in ids}
    split = {name: [] for name in SPLITS}
    for name, ids in make_splits(cohort, seed).items():
        for stay in ids:
            split[part_of.get(stay, name)].append(stay)
    return split


def labelled(cohort: Cohort, ids: list) -> np.ndarray:
    stays = stays_of(cohort, ids)
    return stays[cohort.stay_label[stays] >= 0]


def label_subset(cohort: Cohort, stays: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A stratified, seeded share of labelled stays, as if only these had a label."""
    if fraction == 1:
        return stays
    try:
        return np.sort(train_test_split(stays, train_size=fraction, stratify=cohort.stay_label[stays], random_state=seed)[0])
    except ValueError as error:
        raise InputError(f"--label_fraction {fraction}: no such share of {len(stays)} stays keeps both classes ({error}); "
                         "give a larger one") from None


def parameter_counts(model) -> tuple[int, int]:
    """Trainable parameters, and all."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def finetune(arguments, config: FinetuneConfig = FinetuneConfig()) -> Path:
    full = arguments.full_training
    settings = settings_of(FULL_TRAINING if full else FINETUNE, arguments)
    device, dtype = choose_device(arguments.device, arguments.precision)
    content, cohort, dataset, split, new = open_checkpoint(arguments.pretrained_ckpt, arguments.data_dir, arguments.synthetic_stays,
                                                           arguments.params_map, arguments.label_file)
    if content.get("mode", "pretrain") != "pretrain":
        raise InputError(f"{arguments.pretrained_ckpt}: a checkpoint of --mode {content['mode']}; --pretrained_ckpt takes one of --mode pretrain")
    print(cohort.describe())
    if new:
        split = splits_beside(split or {}, cohort, arguments.seed)
    train, valid = labelled(cohort, split["train"]), labelled(cohort, split["valid"])
    for name, stays in (("train", train), ("valid", valid)):
        if len(np.unique(cohort.stay_label[stays])) < 2:
            raise InputError(f"{cohort.reader}: the labelled {name} stays hold {'one class only' if len(stays) else 'no label at all'}; "
                             "finetuning needs both classes: check the outcome or label file")
    train = label_subset(cohort, train, arguments.label_fraction, arguments.seed)
    if dataset is None:
        dataset = StayDataset(cohort, Normalizer.fit(cohort, train), points=True)
    elif dataset.unknown_variables:
        print(dataset.describe_unknown())

    torch.manual_seed(arguments.seed), random.seed(arguments.seed)
    backbone = checkpoint_config(content, len(dataset.normalizer.variables), arguments.pretrained_ckpt, arguments.set_heads,
                                 arguments.transformer_heads)
    trees = None if full and arguments.random_init else config.trees  # they are fitted to the backbone as it is before full training
    listed = common_variables(cohort, dataset, stays_of(cohort, split["train"]), config.head_variables)
    model_config = replace(backbone, classification_only=not full, fuse=config.fuse, features=config.features, summaries=config.summaries,
                           head_widths=config.head_widths, head_trees=trees, tree_depth=config.tree_depth,
                           head_variables=len(listed))
    vocabulary = content["vocabulary"] if "vocabulary" in content else variable_vectors(cohort.variables, backbone.input_dim, cohort.vectors)
    if "vocabulary" not in content and not cohort.vectors.shape[1]:
        print("warning: no cached.csv lies in the data: the original checkpoint was trained on other variable vectors than the hashed names used now")
    model = SeqSetVAE(model_config, vocabulary)
    model.head_variables.copy_(torch.from_numpy(listed))
    if arguments.random_init:
        print("backbone: untrained (--random_init)")
    else:
        report = load_backbone(model, checkpoint_state(content, arguments.pretrained_ckpt))
        if not report.complete and not arguments.allow_partial:
            raise InputError(f"{arguments.pretrained_ckpt}: {len(report.missing)} backbone weights missing, {len(report.mismatched)} of another "
                             f"shape ({', '.join((report.missing + report.mismatched)[:3])} ...); give a matching checkpoint, or --allow_partial")
        print(f"✅ Loaded pretrained weights: {len(report.loaded)} tensors\n{report}")
    model.to(device)
    trainable, total = parameter_counts(model)
    print(f"model: SeqSetVAE, {'full training' if full else 'frozen backbone'}, {trainable:,} of {total:,} parameters trainable "
          f"({trainable / total:.2%}); {device}, {dtype}".replace("torch.", ""))
    if not full and trainable > config.max_trainable_ratio * total:
        raise InputError(f"finetune_config.py: the head is {trainable / total:.1%} of all parameters; "
                         f"narrow head_widths below {config.max_trainable_ratio:.0%}")
    run = Run(arguments, cohort)
    print(f"split: {len(train):,} train ({(cohort.stay_label[train] == 1).sum():,} positive), "
          f"{len(valid):,} valid ({(cohort.stay_label[valid] == 1).sum():,} positive), {len(split['test']):,} test stays"
          f"{f' (seed {arguments.seed})' if new else ' of the checkpoint'}; run folder {run.folder}")

    source = source_of(arguments, cohort)
    if arguments.data_dir is None and "source" in content:  # the data are the checkpoint's
        source |= {key: content["source"].get(key) for key in ("data_dir", "synthetic_stays", "params_map", "label_file")
                   if key == "synthetic_stays" or source[key] is None}
    source["pretrained_ckpt"] = str(arguments.pretrained_ckpt)
    trainer = (train_everything if full else train_head)
    best = trainer(arguments, config, settings, run, model, dataset, split, source, train, valid, device, dtype)
    print(f"best checkpoint: {run.folder / 'best.pt'} (epoch {best['epoch']}, validation AUROC {best['val_auc']:.4f}, AUPRC {best['val_auprc']:.4f})")
    print(f"next: python test_suite.py --checkpoint {run.folder / 'best.pt'}")
    return run.folder / "best.pt"


def ranking(label: np.ndarray, probability: np.ndarray) -> dict:
    """AUROC, AUPRC and the probability from which a stay counts as positive (best F1) of the validation stays."""
    precision, recall, thresholds = precision_recall_curve(label, probability)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {"val_auc": float(roc_auc_score(label, probability)), "val_auprc": float(average_precision_score(label, probability)),
            "threshold": float(thresholds[f1[:-1].argmax()])}


@torch.no_grad()
def encode_stays(model: SeqSetVAE, dataset: StayDataset, stays: np.ndarray, device) -> torch.Tensor:
    """Head input of these stays before standardisation, [n, F], in their order: one pass of the backbone over the data, in float32 whatever
    the precision of training, so that a score does not depend on the machine."""
    model.eval()
    features = torch.zeros(len(stays), sum(model._feature_sizes().values()), device=device)
    batches = evaluation_batches(dataset, stays)
    for places, batch in zip(batches, progress(loader(dataset, [stays[b] for b in batches], device), len(batches), "encoding")):
        features[torch.from_numpy(places).to(device)] = model.features(batch)[:, 0]
    return summed(features)  # each rank filled in the stays of its batches


@torch.no_grad()
def predict(model: SeqSetVAE, features: torch.Tensor) -> np.ndarray:
    """Probability of the positive class of every stay, [n] float64, from `encode_stays`."""
    model.eval()
    return model.classify(features).float().softmax(-1)[:, 1].cpu().double().numpy()


@torch.no_grad()
def prepare_head(model: SeqSetVAE, features: torch.Tensor, label: torch.Tensor, config: FinetuneConfig, seed: int) -> None:
    """Standardise the head's untrained input with the training stays' statistics, start its bias at the log prior of the classes, and fit
    the trees beside it; features [n, F], label [n]."""
    untrained = features[:, features.shape[1] - len(model.feature_mean):]
    model.feature_mean.copy_(untrained.mean(0))
    model.feature_std.copy_(untrained.std(0).clamp(min=1e-6))
    model.cls_head[-1].bias.copy_(torch.bincount(label, minlength=model.config.classes).div(len(label)).log())
    if model.trees is not None:
        model.trees.fit(model.standardise(features), label, boosted_trees(config, seed))


def head_epoch(model, features, label, optimizer, config: FinetuneConfig, batches) -> float:
    """One epoch of the head on cached features [n, F], label [n]: the mean loss."""
    model.train()
    total = torch.zeros((), device=features.device)
    for i, batch in enumerate(batches):
        batch = torch.from_numpy(batch).to(features.device)
        loss = classification_loss(model.classify(features[batch]), label[batch], config)
        ((loss + head_penalty(model, config)) / config.accumulation).backward()
        total += loss.detach() * len(batch)
        if (i + 1) % config.accumulation == 0 or i + 1 == len(batches):
            torch.nn.utils.clip_grad_norm_(model.cls_head.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return total.item() / len(label)


def train_head(arguments, config, settings, run, model, dataset, split, source, train, valid, device, dtype) -> dict:
    """Frozen backbone: encode the cohort once, then train the head on the cached features. Equal to uncached training, since the
    backbone is deterministic in evaluation mode. Of several ranks each trains the same head on all features, from the same seed: that takes
    seconds, less than reducing the gradients of so small a model at every step."""
    features, val_features = (encode_stays(model, dataset, stays, device) for stays in (train, valid))
    label = torch.from_numpy(dataset.cohort.stay_label[train].astype(np.int64)).to(device)
    if not run.last:
        prepare_head(model, features, label, config, arguments.seed)
    optimizer, schedule = head_optimizer(model, config)
    parts = dict(optimizer=optimizer, schedule=schedule)
    best, (first, _), _ = run.restore(model, **parts) if run.last else UNTRAINED
    for epoch in range(first, settings["max_epochs"]):
        if config.patience and epoch - best["epoch"] >= config.patience:
            print(f"early stop: the validation AUROC has not improved for {config.patience} epochs")
            break
        batches = epoch_batches(np.ones(len(train)), settings["batch_size"], arguments.seed, epoch)
        loss = head_epoch(model, features, label, optimizer, config, progress(batches, len(batches), f"epoch {epoch + 1}", settings["batch_size"]))
        if not math.isfinite(loss):
            raise InputError(f"epoch {epoch + 1}: the loss is not finite; lower the learning rate in finetune_config.py")
        schedule.step()
        row = {"epoch": epoch + 1, "loss": loss, **ranking(dataset.cohort.stay_label[valid], predict(model, val_features))}
        best = end_of_epoch(run, model, dataset, split, source, row, best, not config.patience, **parts)
    return best


def train_everything(arguments, config, settings, run, model, dataset, split, source, train, valid, device, dtype) -> dict:
    """Full training: the head first, on the backbone as it is; then every parameter on classification + reconstruction + KL."""
    lengths, events = np.diff(dataset.cohort.stay_start)[train], dataset.cohort.stay_events[train]
    optimizer, schedule = full_optimizer(model, config, settings["max_epochs"], not arguments.random_init)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts, every = dict(optimizer=optimizer, schedule=schedule, scaler=scaler), 1 if device.type == "cpu" else 50
    if not run.last:
        features = encode_stays(model, dataset, train, device)
        label = torch.from_numpy(dataset.cohort.stay_label[train].astype(np.int64)).to(device)
        prepare_head(model, features, label, config, arguments.seed)
        warm_up, warm_schedule = head_optimizer(model, config)
        for epoch in range(FINETUNE["max_epochs"]):
            head_epoch(model, features, label, warm_up, config, epoch_batches(np.ones(len(train)), FINETUNE["batch_size"], arguments.seed, epoch))
            warm_schedule.step()
    parallel = data_parallel(model, arguments.seed)
    best, start, totals = run.restore(model, **parts) if run.last else UNTRAINED
    for epoch in range(start[0], settings["max_epochs"]):
        model.train()
        batches = epoch_batches(lengths, settings["batch_size"], arguments.seed, epoch)
        own, counts = own_parts(batches, events)
        done = start[1] if epoch == start[0] else 0
        totals = totals.to(device) if done else torch.zeros(4, device=device)
        bar = progress(loader(dataset, [train[b] for b in own[done:]], device), len(batches) - done, f"epoch {epoch + 1}", settings["batch_size"])
        for batch in bar:
            with torch.amp.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = parallel(batch, losses=True)
            classification = classification_loss(losses["logits"], batch.label, config)
            weight = WORLD * counts[done] / len(batches[done])  # as in pretraining
            loss = (weight * classification + head_penalty(model, config)
                    + weight * config.reconstruction_weight * (losses["reconstruction"] + model.config.max_beta * losses["kl"]))
            norm, stopping = update(model, loss, optimizer, scaler, config.clip), run.stopping()
            if done % every == 0 or stopping or done + 1 == len(batches):
                finite_or_stop(norm, done, dataset.cohort.stay_id[train[batches[done]]], scaler, every)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            means = torch.stack([classification, losses["reconstruction"], losses["kl"]]).detach()
            totals += torch.cat([summed(means * counts[done]), ~torch.isfinite(norm)[None]])
            done += 1
            if stopping:
                run.save_last(model_content("finetune", model, dataset, split, source, best), (epoch, done), best, totals, **parts)
                run.leave()
        schedule.step()
        (loss, reconstruction, kl), overflows = (totals[:3] / len(train)).tolist(), totals[3].item()
        row = {"epoch": epoch + 1, "loss": loss, "reconstruction": reconstruction, "kl": kl,
               **({"skipped_steps": overflows} if scaler.is_enabled() else {}),
               **ranking(dataset.cohort.stay_label[valid], predict(model, encode_stays(model, dataset, valid, device)))}
        best = end_of_epoch(run, model, dataset, split, source, row, best, False, **parts)
    return best


UNTRAINED = {"val_auc": -1.0, "val_auprc": -1.0, "epoch": 0, "threshold": 0.5}, (0, 0), None  # best so far, position, totals: see `Run.restore`


def end_of_epoch(run, model, dataset, split, source, row, best, keep_last, **parts) -> dict:
    """Log the epoch, save last.pt and, where the validation AUROC improved (`keep_last`: always), best.pt; obey a signal. Returns the best so far."""
    row = gathered(row)[0]  # all go on from the figures of rank 0, should another's device round otherwise
    run.log(row)
    improved = keep_last or row["val_auc"] > best["val_auc"]
    content = model_content("finetune", model, dataset, split, source, row)
    if improved:
        best = {name: row[name] for name in best}
        run.save("best.pt", content)
    run.save_last(content, (row["epoch"], 0), best, **parts)
    print(f"epoch {row['epoch']:3d}: loss {row['loss']:.4f}, validation AUROC {row['val_auc']:.4f}{' *' if improved and not keep_last else ''}, "
          f"AUPRC {row['val_auprc']:.4f}{skipped(row)}")
    if run.stopping():
        run.leave()
    return best


def main(argv=None) -> int:
    keep_freed_memory()
    if WORLD > 1:
        dist.init_process_group()  # gloo for what lies on a CPU, nccl on CUDA
    if RANK:
        sys.stdout = open(os.devnull, "w")
    code = 0
    try:
        arguments = parse_arguments(argv)
        (pretrain if arguments.mode == "pretrain" else finetune)(arguments)
    except InputError as error:
        if RANK == 0:
            print(f"error: {error}", file=sys.stderr)
        with suppress(InputError, RuntimeError):  # where the others told it, they have left
            gathered(error)
        code = 2
    except KeyboardInterrupt:  # before the run's folder exists; from then on see `Run`
        if RANK == 0:
            print("interrupted: nothing was trained yet", file=sys.stderr)
        code = 130
    end_rank(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
