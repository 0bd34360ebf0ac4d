"""What a run is beside its mathematics: its processes, its device, its passes of evaluation, its folder and
checkpoints, signals."""

import ctypes
import errno
import io
import itertools
import json
import os
import platform
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Callable

import numpy as np
import pandas as pd
import sklearn
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from batches import EventBatch, StayDataset, sorted_batches
from data import Cohort, InputError, at_site, subjects_of, write_atomically
from checkpoint import Checkpoint, difference, git_commit, label_digest, load_weights, maps_of
from history_statistics import at_slots
from model import SeqSetVAE
from questions import stays_with
from readers import load_cohort
from settings import DataSettings, recorded


try:
    import fcntl
except ModuleNotFoundError:  # Windows: a run's folder is then not locked
    fcntl = None


CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


# ------------------------------------------------------------------------------------------------------------
# Several processes: each trains on its part of every batch and evaluates its part of the stays; rank 0 alone
# prints and writes, and reads what it wrote, for the machines need not share a disk
# ------------------------------------------------------------------------------------------------------------

# As torchrun sets them.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
MACHINE, MACHINES = int(os.environ.get("GROUP_RANK", 0)), int(os.environ.get("GROUP_WORLD_SIZE", 1))


def launcher() -> list[str]:
    """The words of a command line before the script, for as many processes as this run has."""
    if WORLD == 1:
        return ["python"]
    if MACHINES == 1:
        return ["torchrun", "--standalone", f"--nproc_per_node={WORLD}"]
    return ["torchrun", f"--nnodes={MACHINES}", f"--nproc_per_node={LOCAL_WORLD}", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"]


def join_ranks(device: str) -> None:
    """Form the group of several processes; device: the --device that was given. Objects and a CPU's tensors
    go over gloo, so that ranks can talk before each has chosen its GPU (see `choose_device`)."""
    cuda = torch.cuda.is_available() and not device.startswith("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def gathered(value) -> list:
    """`value` of every rank. Raises the InputError of a rank that failed meanwhile (see `exit_code`), so that
    none waits for it forever, and on all ranks the KeyboardInterrupt of one that is asked to leave (see
    `Signals`)."""
    value = leaving() or value
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    for value in values:
        if isinstance(value, (InputError, KeyboardInterrupt)):
            raise value
    return values


def from_rank_0(make: Callable):
    """What `make()` gives on rank 0, on every rank."""
    value = [make() if RANK == 0 else None]
    if WORLD > 1:
        gathered(None)  # it may have raised
        dist.broadcast_object_list(value)
    return value[0]


def end_rank(code: int) -> None:
    """Of several processes: leave without Python's teardown, in which a thread of gloo may still want
    Python's lock: it then aborts the finished process ("terminate called without an active exception"), or
    DistributedDataParallel's destructor waits for it forever."""
    if WORLD > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class Signals:
    """What SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 ask of a command: to leave at once, since the last.pt
    of a run is always valid; in a step at its end, since it can be saved. Several ranks leave together, where
    they gather."""
    asked = None   # the KeyboardInterrupt to leave by
    held = False   # in a step
    farewell = ""  # how to go on with the run, once there is one

    @classmethod
    def handle(cls, number, frame):
        if cls.asked and WORLD == 1:  # torchrun repeats the signal once the first rank has left
            os._exit(128 + number)
        cls.asked = cls.asked or KeyboardInterrupt(cls.farewell)
        if cls.held and RANK == 0:
            once_more = "; once more to exit at once" if WORLD == 1 else ""
            print(f"interrupted: saving at the end of the step{once_more}", file=sys.stderr)
        if leaving() and (WORLD == 1 or not cls.farewell):
            raise cls.asked


def leaving() -> KeyboardInterrupt | None:
    return None if Signals.held else Signals.asked


@contextmanager
def obeying_signals():
    Signals.asked = None
    Signals.held = False
    Signals.farewell = ""
    asked = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"}  # Windows lacks some
    numbers = [number for number in signal.Signals if number.name in asked]
    handlers = {number: signal.signal(number, Signals.handle) for number in numbers
                if signal.getsignal(number) != signal.SIG_IGN}  # as nohup has it
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@obeying_signals()
def exit_code(command: Callable) -> int:
    """Run a whole command: its exit code. What it raises is one line, told to the other ranks."""
    keep_freed_memory()
    make_streams_ready()
    try:
        return command() or 0
    except InputError as error:
        told, code = InputError(f"on {platform.node()}: {error}") if MACHINE else error, 2
        line = f"error: {printable(str(error))}"
    except KeyboardInterrupt as interrupt:
        told, code, line = interrupt, 130, str(interrupt) or "interrupted"
    except BrokenPipeError:  # its reader has left, such as head; Python would flush what is left at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        told, code, line = KeyboardInterrupt(), 141, None
    if RANK == 0 and line:
        print(line, file=sys.stderr)
    # Where the others told it, they have left; a ValueError: the ranks had not yet joined
    with suppress(InputError, KeyboardInterrupt, RuntimeError, ValueError):
        gathered(told)
    return code


@contextmanager
def in_turn():
    """One process of each machine goes before its neighbours, who then find the cache that it wrote; rank 0
    goes before those of the other machines, who find it too where the machines share a disk."""
    turn = 2 if LOCAL_RANK else 1 if RANK else 0
    for _ in range(turn):
        gathered(None)
    yield
    for _ in range(turn, 2):
        gathered(None)


def data_parallel(model, seed: int):
    """The model to call in training: its backward pass averages the gradients over ranks. (Every parameter
    takes part in every step, so none is looked for that does not; no step changes a buffer.) From here on
    each rank draws masks, dropout and z of its own, so that a run of several ranks equals one of a single
    process where these are off: the objective itself is the same mean over the batch's stays."""
    if WORLD == 1:
        return model
    torch.manual_seed(seed + RANK)
    parallel = DistributedDataParallel(model)
    # As an argument it is deprecated in new versions, whose name for it old ones lack.
    parallel.broadcast_buffers = False
    return parallel


# ------------------------------------------------------------------------------------------------------------
# Device, batches, the pass that evaluates
# ------------------------------------------------------------------------------------------------------------

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """The device, made the current one, and the autocast type (float32: no autocast). Raises InputError for a
    device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and WORLD > 1:
            device = torch.device("cuda", LOCAL_RANK)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        each = " for each process" if WORLD > 1 else ""
        raise InputError(f"--device {name}: not available here{each}; use --device auto") from None
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it compiles a graph for each shape of a batch
        if device.index is not None:
            torch.cuda.set_device(device)
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":  # where a CPU has no AMX it emulates bf16, or gains little by it
        precision = "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"
    return device, PRECISIONS[precision]


def keep_freed_memory() -> None:
    """glibc returns every freed block of over 32 MB to the system, and each page of the next one then costs a
    fault, a quarter of the time of an evaluation pass of a large model on a CPU: keep freed blocks for the
    next batch."""
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # parameters' numbers: malloc.h
        mallopt(trim_threshold, -1), mallopt(mmap_max, 0)


def loader(dataset: StayDataset, batches: list, device: torch.device):
    """Batches of stay indices -> EventBatches on the device. On CUDA workers prepare them; copies are
    asynchronous."""
    cuda = device.type == "cuda"
    batches = torch.utils.data.DataLoader(
        dataset, sampler=batches, batch_size=None, num_workers=2 if cuda else 0, pin_memory=cuda,
        worker_init_fn=leave_process_group,
        generator=torch.Generator())  # its own: the global one must not advance
    return (batch.to(device, non_blocking=cuda)
            for batch in itertools.takewhile(lambda _: not leaving(), batches))


def leave_process_group(worker: int) -> None:
    """torchrun signals a whole group of processes; a loader's worker that it ended would end the run
    unsaved."""
    if hasattr(os, "setpgrp"):  # Windows has no such groups
        os.setpgrp()


def evaluation_batches(dataset: StayDataset, stays: np.ndarray) -> list[np.ndarray]:
    """This rank's batches of an evaluation pass, as positions into `stays`: every stay is in one batch of one
    rank."""
    return sorted_batches(dataset.sizes(stays))[RANK::WORLD]


def evaluation_loader(dataset: StayDataset, stays: np.ndarray, device: torch.device):
    """The batches of an evaluation pass, see `evaluation_batches`, with a bar of progress."""
    batches = [stays[batch] for batch in evaluation_batches(dataset, stays)]
    return progress(loader(dataset, batches, device), len(batches), "evaluation")


def progress(iterable, total: int, what: str):
    """tqdm over `total` batches on a terminal; silent where the output goes elsewhere."""
    silent = True if RANK or not sys.stdout.isatty() else None
    return tqdm(iterable, total=total, desc=what, leave=False, disable=silent, unit=" batches")


@torch.no_grad()
def encode_points(model: SeqSetVAE, dataset: StayDataset, points: np.ndarray, device, at_points=None,
                  through=torch.nn.Identity()) -> torch.Tensor:
    """Head input of these prediction points before standardisation, [n, F], or what another function
    `at_points` of model and batch gives, [B, Q, F]; or `through` it (a function of [m, F] that gives [m, c]).
    One pass of the backbone over their stays, in float32 whatever the precision of training, so that a score
    does not depend on the machine."""
    model.eval()
    stays, result = stays_with(dataset.cohort, points), torch.zeros(len(points), 0, device=device)
    for batch in evaluation_loader(dataset.asking(points), stays, device):
        asked = batch.point >= 0                                                             # [B, Q]
        features = at_points(model, batch) if at_points else model.features(batch)           # [B, Q, F]
        features = through(features[asked])                                                  # [m, c]
        if not result.shape[1]:
            result = result.new_zeros(len(points), features.shape[1])
        result[batch.point[asked]] = features
    if WORLD > 1:  # each rank filled in the points of its batches; one may have had none
        width = max(gathered(result.shape[1]))
        result = summed(result if result.shape[1] else result.new_zeros(len(points), width))
    return result


def features_and_history(model: SeqSetVAE, batch: EventBatch) -> torch.Tensor:
    """Of each point the head input before standardisation, and h of the last set before it, [B, Q, F + d]."""
    _, _, z, h = model.encode(batch)
    return torch.cat([model.features_of(z, h, batch), at_slots(h, batch.point_slot)], dim=-1)


def answers_at(model: SeqSetVAE, dataset: StayDataset, points: np.ndarray, device) -> np.ndarray:
    """The answer at every point, [n, k] float64, see `Task.columns`."""
    if not len(points):
        return np.zeros((0, len(model.task.columns)))
    logits = encode_points(model, dataset, points, device, through=model.classify)
    return model.task.answer(logits)


CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """One line: a control character of a name or an id steers no terminal."""
    return text.replace("\n", "\\n").translate(CONTROLS)


def make_streams_ready() -> None:
    """A closed stream is an empty one. Each line is written as it is printed. A character that the terminal
    has not, such as the check mark, becomes a question mark, not an error; control characters are escaped in
    what is printed (standard error has the bars that need them)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper) and "write" not in vars(sys.stdout):
        sys.stdout.write = lambda text, write=sys.stdout.write: write(text.translate(CONTROLS))


# ------------------------------------------------------------------------------------------------------------
# The run: its folder, its checkpoints, where it stands, and what a signal asks of it
# ------------------------------------------------------------------------------------------------------------

class Run:
    """One training run. All ranks call its methods; rank 0 alone has the folder.

    best: figures of the best epoch; epoch: epochs done; done: steps done in the next, of which totals are the
    sums."""

    def __init__(self, arguments, config, model, dataset: StayDataset, split: dict, data: dict, device, dtype,
                 best: dict, source: dict = {}, seen: dict = {}, kept: dict = {}):
        """data: the options that the data were read with; source: entries beside those of `source_of`; seen:
        subjects by part that the pretrained checkpoint was trained or selected on; kept: optional entries of
        the checkpoints, see `Checkpoint`."""
        source = source_of(arguments, data, dataset.cohort, device, dtype) | source
        self.seed, self.device, self.dtype = arguments.seed, device, dtype
        self.seen, self.kept = seen, kept | {"maps": maps_of(data)}
        self.model, self.dataset, self.split, self.best = model, dataset, split, best
        self.epoch, self.done, self.totals, self.rows = 0, 0, {}, []
        options = recorded(arguments) | {name: source[name] for name in ("device", "precision")}
        self.record = {"mode": arguments.mode, "run": {"options": options, "settings": asdict(config)},
                       "model_config": asdict(model.config), "source": source}
        last = arguments.last
        if last:
            self._refuse_other_data(Path(arguments.resume) / "last.pt", last)
        # A run that was killed before its first save starts afresh.
        self.last = last if last and last.trainer else None
        if arguments.origin and (differing := difference(arguments.origin, source)):
            print(f"{'resume' if last else 'config'}: not as it was then: {differing}: the figures may "
                  "differ")
        self.folder = from_rank_0(lambda: self._take_folder(arguments))
        if not self.last:
            self.save("last.pt", self.checkpoint(best))
        if RANK == 0:
            text = json.dumps(self.record, indent=1)
            write_atomically(self.folder / "config.json", lambda path: path.write_text(text))
        again = [*launcher(), "train.py", "--mode", self.record["mode"], "--resume", str(self.folder)]
        Signals.farewell = f"saved; go on with: {shlex.join(again)}"

    def _refuse_other_data(self, path: Path, last: Checkpoint) -> None:
        source, then = self.record["source"], last.source
        where = source["data"].get("data_dir") or source["reader"]
        relabelled = self.record["mode"] == "finetune" and source["labels"] != then["labels"]
        other = ""
        if source["fingerprint"] != then["fingerprint"]:
            other = f"{where} holds other stays than when"
        elif source.get("pretrained") != then.get("pretrained"):
            other = f"{source['pretrained_ckpt']} was written anew since"
        elif relabelled or last.split != self.split:
            other = f"{where} holds other labels, or another split, than when"
        if other:
            raise InputError(f"{path}: {other} this run was started; give what it had (data that were moved: "
                             "--data_dir), or start a new run")

    def _take_folder(self, arguments) -> Path:
        """The run's folder, made where it is new, and locked."""
        folder = Path(arguments.resume) if arguments.last else new_folder(arguments)
        try:
            self.lock = open(folder / ".lock", "w")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); start a new run "
                             "elsewhere") from None
        unlocked = None if fcntl else "this system has no file locks"
        try:  # the system releases it, however the process ends
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise InputError(f"{folder}: another process is training in it; wait for it, or start a new "
                                 "run") from None
            unlocked = "it lies on a file system without locks"
        if unlocked:
            print(f"note: {unlocked}: keep other processes out of {folder}")
        for name in ("best.pt", "last.pt", "metrics.csv", "config.json"):
            for leftover in folder.glob(f".{name}.[0-9]*"):  # of a process that was killed while saving
                leftover.unlink()
        return folder

    def finish(self, figures: str, following: list) -> Path:
        """Say where the best checkpoint lies, its figures, the command that follows; give up the folder."""
        best = self.folder / "best.pt"
        print(f"best checkpoint: {best} (epoch {self.best['epoch']}, {figures})")
        print(f"next: {shlex.join(['python', *following, str(best)])}")
        Signals.farewell = ""
        if RANK == 0:
            self.lock.close()
        return best

    def epochs(self, most: int):
        """Yields the epochs still to be trained."""
        if self.epoch >= most:
            print(f"nothing left to train: {self.epoch} epochs are done; a larger --max_epochs goes on")
        yield from range(self.epoch, most)

    def end_of_epoch(self, row: dict, improved: bool, figures: str) -> None:
        """Log the epoch, in metrics.csv and by its figures as text; save best.pt where it improved, and
        last.pt."""
        self.rows.append(row)
        if RANK == 0:
            table = pd.DataFrame(self.rows)
            write_atomically(self.folder / "metrics.csv", lambda path: table.to_csv(path, index=False))
        gathered(None)
        if improved:
            self.best = {name: row[name] for name in self.best}
            self.save("best.pt", self.checkpoint(row))
        self.epoch, self.done, self.totals = row["epoch"], 0, {}
        self.save_last(row)
        skipped = row.get("skipped_steps")
        overflow = f", {skipped:.0f} steps skipped (fp16 overflow)" if skipped else ""
        print(f"epoch {row['epoch']:3d}: loss {row['loss']:.4f}, {figures}{overflow}")

    def checkpoint(self, metrics: dict, trainer: dict | None = None) -> Checkpoint:
        """The run as it stands: enough to score new data, and to know which stays it has seen."""
        cohort = self.dataset.cohort
        subjects = {part: at_site(cohort.site, ids) for part, ids in subjects_of(cohort, self.split).items()}
        subjects |= {part: sorted({*subjects[part], *self.seen.get(part, [])}) for part in ("train", "valid")}
        return Checkpoint(self.folder, self.record["mode"], self.model.config, self.model.state_dict(),
                          self.model.setvae.vocabulary, self.dataset.normalizer, self.split, subjects,
                          self.record["source"], metrics, self.record["run"], trainer=trainer, **self.kept)

    def save(self, name: str, checkpoint: Checkpoint) -> None:
        if RANK == 0:
            checkpoint.save(self.folder / name)
        gathered(None)

    def save_last(self, metrics: dict) -> None:
        """Write last.pt: a checkpoint, and all that `restore` needs."""
        self.save("last.pt", self.checkpoint(metrics, trainer={
            "best": self.best, "position": [self.epoch, self.done], "totals": self.totals, "rows": self.rows,
            "random": gathered(random_states(self.device)),
            "parts": {name: part.state_dict() for name, part in self.parts.items()}}))

    def restore(self, **parts) -> None:
        """Go on where last.pt was written, if it was; parts: what else has a state_dict, and is saved from
        now on."""
        self.parts = parts
        if not self.last:
            return
        state = self.last.trainer
        load_weights(self.model, self.last.weights, self.folder / "last.pt")
        for name, part in parts.items():
            if state["parts"][name]:  # a scaler is empty where the precision needs none
                part.load_state_dict(state["parts"][name])
        self.best, (self.epoch, self.done), self.rows = state["best"], state["position"], state["rows"]
        self.totals = {name: total.to(self.device) for name, total in state["totals"].items()}
        if RANK < len(state["random"]):
            restore_random_states(state["random"][RANK], self.device)


def new_folder(arguments) -> Path:
    """Make the folder of a new run: the one asked for, or one named after the mode and the time (and a
    number, where several start in one second)."""
    started = CHECKPOINTS / f"{arguments.mode}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = Path(arguments.run_dir or (started if number == 1 else f"{started}-{number}"))
        try:
            # With --resume auto a run may have died in it before its first save.
            folder.mkdir(parents=True, exist_ok=arguments.resume == "auto")
            return folder
        except FileExistsError:
            if arguments.run_dir:
                raise InputError(f"{folder}: exists already; choose another --run_dir, or continue it with "
                                 f"--resume {folder}") from None
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another --run_dir"
                             ) from None


def random_states(device: torch.device) -> dict:
    """Of this process and its own device."""
    states = {"torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_states(states: dict, device: torch.device) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def source_of(arguments, data: dict, cohort: Cohort, device: torch.device, dtype: torch.dtype) -> dict:
    """Where a checkpoint comes from, for whoever must reproduce it; data: the options that its data were read
    with."""
    data = {name: value for name, value in data.items() if not isinstance(value, dict)}  # `Checkpoint.maps`
    libraries = {"torch": torch, "numpy": np, "pandas": pd, "scikit-learn": sklearn}
    versions = {name: str(library.__version__) for name, library in libraries.items()}
    return {"data": recorded(DataSettings(**data)), "seed": arguments.seed, "reader": cohort.reader,
            "fingerprint": cohort.fingerprint, "labels": label_digest(cohort),
            "command": shlex.join([*launcher(), Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": git_commit(), "versions": {"python": platform.python_version(), **versions},
            "device": str(device) if WORLD == 1 else device.type,
            "precision": next(name for name, kind in PRECISIONS.items() if kind == dtype),
            "threads": torch.get_num_threads(), "processes": WORLD}


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------

def read_cohort(options: dict) -> Cohort:
    """The cohort of `load_cohort` with these options (see `data_options`), the same on all ranks. Raises
    InputError where machines hold different data."""
    with in_turn():
        cohort = load_cohort(**options)
    machines = gathered((cohort.fingerprint, label_digest(cohort), platform.node()))
    for rank, (*read, host) in enumerate(machines):
        if read != [*machines[0][:2]]:
            raise InputError(f"{cohort.reader}: rank {rank} on {host} read other data ({read[0]}) than rank "
                             f"0 on {machines[0][2]} ({machines[0][0]}); give every machine the same data "
                             "and labels")
    return cohort
