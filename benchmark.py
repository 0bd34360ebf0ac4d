"""Speed and memory of the batched model, beside a plain loop over single sets (`test_suite.py --benchmark`)."""

import contextlib
import itertools
import multiprocessing
import platform
import re
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from batches import StayDataset, epoch_batches, sorted_batches, split_batch
from data import InputError, Normalizer, at_end, build_cohort, variable_vectors, with_points
from finetune_config import FinetuneConfig, head_optimizer
from model import ModelConfig, SeqSetVAE, SeqSetVAEPretrain
from predictor import encode_points, probability_of
from readers import load_cohort
from runs import CHECKPOINTS, keep_freed_memory
from settings import data_options
from tables import write_atomically
from tests.plain_loop import close, plain_features, plain_pass
from train import clip_and_step, head_epoch, prepare_head


# ----------------------------------------------------------------------------------------------------------------------
# Benchmark: our batched model beside the plain loop (above), in one run and on one number of threads
# ----------------------------------------------------------------------------------------------------------------------

PLAIN_LOOP, PRETRAIN_STEP, INFERENCE, MATMUL_PEAK = "plain loop", "pretrain step", "inference", "matmul"


# sizes: (config of so many variables, batches of pretraining, of evaluation, epochs of a finetuning, ways to run it)
BENCHMARK = {
    "original's sizes": (ModelConfig.original, 4, 3, 15, (PLAIN_LOOP, "float32", "bf16")),
    "our default": (ModelConfig, 16, 6, 20, ("float32", "bf16")),
}
ROUNDS, LOOPED = 3, 8  # passes timed; stays of the plain loop


# width of the matrices whose product tells the peak, and products a pass: one alone would time the threads' waking
MATMUL, PRODUCTS = 3072, 8


def asked_at_the_end(cohort, normalizer) -> StayDataset:
    """One question a stay, at its end, whatever the data ask: the plain loop knows no other."""
    return StayDataset(at_end(cohort), normalizer, points=True)


def spread(items, n: int) -> list:
    """n of the items at even distances, or all."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, n + 2)[1:-1].round().astype(int))]


def plain_stays(dataset, stays) -> list:
    """Stays as the plain loop takes them: lists of (minute, events), an event being (variable, normalised value)."""
    cohort, lists = dataset.cohort, []
    for p in stays:
        lists.append([])
        for t in range(cohort.stay_start[p], cohort.stay_start[p + 1]):
            events = slice(cohort.set_start[t], cohort.set_start[t + 1])
            variable = dataset.variable[cohort.event_variable[events]]
            value = dataset.normalizer(variable, cohort.event_value[events])
            lists[-1].append((float(cohort.set_minute[t]), list(zip(variable.tolist(), value.tolist()))))
    return lists


def new_pretraining(config, dataset) -> SeqSetVAEPretrain:
    return SeqSetVAEPretrain(config, variable_vectors(dataset.normalizer.variables, config.input_dim))


def new_classifier(config, dataset) -> tuple[SeqSetVAE, FinetuneConfig]:
    """With our default head; at the original's objective with its features, its head's widths and its loss."""
    d, settings = config.latent_dim, FinetuneConfig()
    if config.decoder == "slots":
        settings = FinetuneConfig(features="stable", summaries=False, head_widths=(d, d // 2, d // 4), trees=None,
                                  loss="focal")
    config = replace(config, head_trees=settings.trees, fuse=settings.fuse, features=settings.features,
                     summaries=settings.summaries, head_widths=settings.head_widths,
                     head_variables=min(config.num_variables, settings.most_variables))
    return SeqSetVAE(config, variable_vectors(dataset.normalizer.variables, config.input_dim)), settings


def assert_plain_loop_agrees(config, dataset, stays) -> None:
    """The plain loop's losses and features are the batched model's, to 1e-5 (with learned seeds, as noise is never
    drawn alike)."""
    config, lists = replace(config, learned_seeds=True), plain_stays(dataset, stays)
    model, head = new_pretraining(config, dataset).eval(), new_classifier(config, dataset)[0].eval()
    with torch.no_grad():
        losses, (_, plain) = model(dataset[stays], beta=1.0), plain_pass(model, lists)
        close(torch.stack([losses["reconstruction"], losses["kl"]]), torch.stack(plain))
        close(head.features(dataset[stays])[:, 0], torch.stack([plain_features(head, stay) for stay in lists]))


def pretrain_work(how, config, batches, dataset, device):
    """Forward, backward and optimizer step of every batch. The plain loop goes backward after each stay, so it holds
    one stay in memory."""
    model, clip = new_pretraining(config, dataset).to(device).train(), train.PretrainConfig.clip
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    batches = [plain_stays(dataset, stays) if how == PLAIN_LOOP else dataset[stays].to(device) for stays in batches]

    def plain():
        for batch in batches:
            for stay in batch:
                _, (reconstruction, kl) = plain_pass(model, [stay])
                ((reconstruction + config.max_beta * kl) / len(batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step(), optimizer.zero_grad(set_to_none=True)

    def batched():
        for batch in batches:
            with torch.amp.autocast(device.type, torch.bfloat16, enabled=how == "bf16"):
                losses = model(batch, config.max_beta)
            losses["loss"].backward()
            clip_and_step(model, optimizer, scaler, clip)
    return plain if how == PLAIN_LOOP else batched


def classifier_work(task, epochs, how, config, batches, dataset, device):
    """Inference, or a finetuning on the frozen backbone, of which the plain loop runs one epoch: it encodes every stay
    at each."""
    (model, settings), stays = new_classifier(config, dataset), np.concatenate(batches)
    optimizer = head_optimizer(model.to(device), settings)
    # Any answers take the same time, and some data have none.
    answer = (torch.arange(len(stays), device=device) % 2).float()[:, None]
    weight = torch.ones(len(stays), device=device)
    lists = plain_stays(dataset, stays) if how == PLAIN_LOOP else None

    @torch.no_grad()
    def encode():
        if how == PLAIN_LOOP:
            model.eval()
            return torch.stack([plain_features(model, stay) for stay in lists])
        with torch.amp.autocast(device.type, torch.bfloat16, enabled=how == "bf16"):
            return encode_points(model, dataset, np.sort(stays), device)  # a stay's one point has the stay's number

    @torch.no_grad()
    def inference():
        return probability_of(model.classify(encode()))

    def finetuning():
        features = encode()
        prepare_head(model, features, answer, weight, settings, seed=0)
        for epoch in range(1 if how == PLAIN_LOOP else epochs):
            batches = epoch_batches(np.ones(len(stays)), settings.batch_size, 0, epoch)
            head_epoch(model, features, answer, weight, optimizer, settings, batches)
    return inference if task == INFERENCE else finetuning


def matmul_work(width, dataset, device):
    a = torch.randn(width, width, device=device)

    def products():
        for _ in range(PRODUCTS):
            a @ a
    return products


def pretrain_flops(config, batches, dataset) -> int:
    """Of forward and backward, padding included, counted on the meta device, where nothing is computed. Attention
    counts as its matrix products (the math kernel): `FlopCounterMode` does not know the CPU's flash kernel."""
    model = new_pretraining(config, dataset).to("meta").train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for stays in batches:
            model(dataset[stays].to("meta"), config.max_beta)["loss"].backward()
    return counter.get_total_flops()


def peak_memory(device) -> float:
    """MB: of PyTorch's tensors on a GPU, else of this process. The latter never falls, so each work has a process of
    its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        raise InputError("--benchmark measures memory by Python's module resource, which this system lacks; run it on "
                         "Linux or macOS") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def timed_process(pipe, threads, load, normalizer, device, work) -> None:
    """Get ready, tell what memory was taken before; then at every message run a pass, tell its seconds and the peak
    memory."""
    keep_freed_memory(), torch.set_num_threads(threads)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    imports, run = peak_memory(device), work(asked_at_the_end(load(), normalizer), device)
    pipe.send(imports)
    with contextlib.suppress(EOFError):  # the other end was closed
        while pipe.recv():
            wait()
            began = time.perf_counter()
            run(), wait()
            pipe.send((time.perf_counter() - began, peak_memory(device)))


def take_turns(works: dict, *common) -> tuple[dict, float]:
    """Of each work (dataset, device) -> pass, in a process of its own: (seconds of its fastest pass, peak memory in
    MB); and the memory of the imports alone. The passes take turns, so that whatever else the machine does slows all
    alike."""
    context, pipes, passes = multiprocessing.get_context("forkserver"), {}, {name: [] for name in works}
    context.set_forkserver_preload([Path(__file__).stem, "torch._dynamo"])  # which every optimizer imports
    with contextlib.ExitStack() as stack:
        for name, work in works.items():
            mine, theirs = context.Pipe()
            pipes[name] = stack.enter_context(mine)
            context.Process(target=timed_process, args=(theirs, torch.get_num_threads(), *common, work)).start()
            theirs.close()
        imports = [pipe.recv() for pipe in pipes.values()]
        for _, (name, pipe) in itertools.product(range(ROUNDS), pipes.items()):
            pipe.send("run")
            passes[name].append(pipe.recv())
    return {name: (min(done)[0], done[-1][1]) for name, done in passes.items()}, max(imports)


def machine_name(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def padding(dataset, batches) -> list:
    """Share of the cells of the groups of sets, and of the slots of the grid of stays, that hold nothing, in %."""
    counts = np.zeros(4)
    for batch in map(dataset.__getitem__, batches):
        counts += len(batch.event_value), len(batch.token_event), batch.lengths.sum(), batch.minute.numel()
    events, cells, sets, slots = counts
    return [("padding of the groups of sets", 100 * (1 - events / cells), "% of the cells"),
            ("padding of the grid of stays", 100 * (1 - sets / slots), "% of the slots")]


def measure(dataset, load, device) -> tuple[pd.DataFrame, float]:
    """One row a work: sizes, work, how -> seconds, stays, sets, FLOPs, MB; and the MB of the imports alone."""
    on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else on_cpu
    lengths, rows = np.diff(dataset.cohort.stay_start), {}
    for sizes, (make_config, steps, passes, epochs, hows) in BENCHMARK.items():
        config, finetune = make_config(len(dataset.normalizer.variables)), f"{epochs}-epoch finetune"
        pretrained = epoch_batches(lengths, train.PretrainConfig.batch_size, 0, 0)[:steps]
        evaluated = spread(sorted_batches(dataset.sizes(np.arange(len(dataset.cohort)))), passes)
        if PLAIN_LOOP in hows:
            assert_plain_loop_agrees(config, dataset, evaluated[-1][:2])
        flops = {PRETRAIN_STEP: pretrain_flops(config, pretrained, dataset), MATMUL_PEAK: PRODUCTS * 2 * MATMUL**3}
        for tasks, batches in (({PRETRAIN_STEP: pretrain_work}, pretrained),
                               ({task: partial(classifier_work, task, epochs) for task in (finetune, INFERENCE)},
                                evaluated)):
            print(f"measuring: {sizes}, {' and '.join(tasks)}", flush=True)
            stays = np.concatenate(batches)
            looped = spread(stays[np.argsort(lengths[stays])], LOOPED)
            works = {(task, how): partial(work, how, config, [looped] if how == PLAIN_LOOP else batches)
                     for task, work in tasks.items() for how in hows if bf16 or how != "bf16"}
            if PRETRAIN_STEP in tasks:
                works[MATMUL_PEAK, "float32"] = partial(matmul_work, MATMUL)
            timed, imports = take_turns(works, load, dataset.normalizer, device)
            for (task, how), (seconds, memory) in timed.items():
                used = [] if task == MATMUL_PEAK else looped if how == PLAIN_LOOP else stays
                rows[sizes, task, how] = {"seconds": seconds * (epochs if (task, how) == (finetune, PLAIN_LOOP) else 1),
                                          "stays": len(used) or np.nan, "sets": lengths[used].sum() or np.nan,
                                          "FLOPs": flops.get(task) if how != PLAIN_LOOP else np.nan, "MB": memory}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["sizes", "work", "how"]), imports


def bedside_latency(dataset, sets: int = 200, events: int = 6, timed: int = 100) -> list:
    """Of our default classifier, on one thread of the CPU: the median time of appending a set of so many events to a
    stay of so many sets, and of asking for the risk after it."""
    variables, rng, times = len(dataset.normalizer.variables), np.random.default_rng(0), np.zeros((sets + timed, 2))
    model, threads = new_classifier(ModelConfig(variables), dataset)[0].eval(), torch.get_num_threads()
    state = model.start()
    torch.set_num_threads(1)
    for i in range(sets + timed):
        pairs = list(zip(rng.integers(0, variables, events).tolist(), rng.normal(size=events).tolist()))
        began = time.perf_counter()
        model.step(state, 20.0 * i, pairs)
        stepped = time.perf_counter()
        model.ask(state, 20.0 * i)
        times[i] = stepped - began, time.perf_counter() - stepped
    torch.set_num_threads(threads)
    return [(f"bedside, {what} after {sets} sets, one thread", ms, "ms")
            for what, ms in zip((f"a set of {events} events", "a question"), 1e3 * np.median(times[sets:], axis=0))]


@torch.no_grad()
def cost_of_questions(dataset, questions: int = 40, stays: int = 64) -> list:
    """How many times as long as one question at its end so many take that are spread over each stay: one pass answers
    all."""
    cohort = dataset.cohort
    first, last = (cohort.set_minute[cohort.stay_start[i:len(cohort) + i] - i] for i in (0, 1))
    minute = first[:, None] + (last - first)[:, None] * np.arange(1, questions + 1) / questions              # [P, 40]
    often = with_points(cohort, np.full(len(cohort), questions), minute.ravel())
    model = new_classifier(ModelConfig(len(dataset.normalizer.variables)), dataset)[0].eval()
    seconds = []
    for asked in (dataset, dataset.of(often)):
        batches = [asked[part] for part in spread(sorted_batches(asked.sizes(np.arange(min(stays, len(cohort))))), 4)]
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for batch in batches:
                model(batch)
            times.append((time.perf_counter() - began) / sum(map(len, batches)))
        seconds.append(min(times))
    return [(f"a pass that answers {questions} questions a stay, to one that answers one", seconds[1] / seconds[0],
             "x")]


def in_row(column: pd.Series, **changes) -> list:
    """For every row the column's value in the row whose index has these `changes` (NaN: there is none)."""
    return [column.get(tuple((dict(zip(column.index.names, key)) | changes).values()), np.nan) for key in column.index]


def benchmark(arguments) -> None:
    """Measure, print the table, and append it to checkpoints/benchmark.csv, a row a number."""
    device, facts = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    if arguments.cache_dir:
        raise InputError(f"--cache_dir {arguments.cache_dir}: --benchmark measures reading, into a temporary folder of "
                         "its own; leave the option out")
    with tempfile.TemporaryDirectory() as cache:
        load = partial(load_cohort, **data_options(arguments) | {"cache_dir": Path(cache)})
        for what in ("parsed" if arguments.data_dir else "generated", "from the cache"):
            began, cohort = time.perf_counter(), load()
            facts.append((f"data, {what}", time.perf_counter() - began, "s"))
        print(cohort.describe())
        dataset = asked_at_the_end(cohort, Normalizer.fit(cohort, np.arange(len(cohort))))
        facts += padding(dataset, epoch_batches(np.diff(cohort.stay_start), train.PretrainConfig.batch_size, 0, 0)[:64])
        facts += bedside_latency(dataset) + cost_of_questions(dataset)
        rows, imports = measure(dataset, load, device)
    facts.append(("memory of the imports alone", imports, "MB"))
    a_set, flops = 1e3 * rows["seconds"] / rows["sets"], 1e-9 * rows["FLOPs"] / rows["seconds"]
    table = pd.DataFrame({
        "stays": rows["stays"], "stays/s": rows["stays"] / rows["seconds"],
        "ms a stay": 1e3 * rows["seconds"] / rows["stays"], "ms a set": a_set,
        "MB": rows["MB"], "x plain": in_row(a_set, how=PLAIN_LOOP) / a_set,
        "x float32": (in_row(a_set, how="float32") / a_set).filter(like="bf16"),
        "x inference": (a_set / in_row(a_set, work=INFERENCE)).filter(like="finetune"),
        "GFLOP/s": flops, "% of peak": 100 * flops / in_row(flops, work=MATMUL_PEAK)}, index=rows.index)

    machine, threads = machine_name(device), torch.get_num_threads()
    memory = "the tensors" if device.type == "cuda" else "a process that does this alone"
    print(f"""
{machine}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, {cohort.reader}
Times: the fastest of {ROUNDS} passes, taken in turns. MB: peak memory of {memory}.
The plain loop runs {LOOPED} of the stays, and of a finetuning one epoch, whose time is multiplied.
x plain, x float32: how many times faster a set is done; x inference: how many inferences it costs. FLOPs include
padding; % of peak: of the float32 product of two {MATMUL} x {MATMUL} matrices that took turns with the steps.
""")
    show = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    print(table.to_string(float_format=show, na_rep=""),
          *(f"{what}: {show(value)} {unit}" for what, value, unit in facts), sep="\n")
    facts += [(", ".join(name), value, unit) for name, row in table.iterrows() for unit, value in row.dropna().items()]
    common = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine, "threads": threads,
              "torch": str(torch.__version__), "data": f"{cohort.reader}, {len(cohort)} stays"}
    path = CHECKPOINTS / "benchmark.csv"
    old = path.read_text() if path.exists() else ""
    new = pd.DataFrame([common | {"what": what, "value": f"{value:.6g}", "unit": unit} for what, value, unit in facts])
    write_atomically(path, lambda out: out.write_text(old + new.to_csv(index=False, header=not old)))
    print(f"{len(new)} rows appended to {path}")


# ----------------------------------------------------------------------------------------------------------------------
# Scale: the cost follows the events, neither the vocabulary nor the number of subjects
# ----------------------------------------------------------------------------------------------------------------------

VOCABULARIES = (100, 1000, 5000, 20_000)
SUBJECTS, PART = 50_000, 20   # of the written MEDS data, and the part of it that is compared
STEPS, STAYS = 200, 2         # of training on it, and stays a step


def zipf(rng, size, variables: int) -> np.ndarray:
    """Indices of variables, drawn by Zipf's law with exponent 1."""
    chance = np.cumsum(1 / np.arange(1, variables + 1))
    return np.searchsorted(chance, rng.random(size) * chance[-1])


def zipf_cohort(variables: int, stays: int = 300, sets: int = 150, events: int = 4):
    """Stays of the same number of sets and events, whatever the vocabulary."""
    rng, n = np.random.default_rng(0), stays * sets * events
    stay, minute = np.repeat(np.arange(stays), sets * events), np.tile(np.repeat(20.0 * np.arange(sets), events), stays)
    return build_cohort("Zipf", [f"v{i:05d}" for i in range(variables)], stay, minute, zipf(rng, n, variables),
                        rng.normal(size=n), np.arange(stays).astype(str))


def write_meds(folder: Path, subjects: int, events: int = 2000, codes: int = 20_000, shard: int = 500) -> None:
    """A MEDS data set as large as a hospital's: half of its codes with a number, some four events a charted minute."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError("--benchmark scale writes Parquet, which needs pyarrow; pip install pyarrow") from None
    names = pyarrow.array([f"CODE//{i:05d}" for i in range(codes)])
    (folder / "data").mkdir(parents=True)
    for first in range(0, subjects, shard):
        rng, n = np.random.default_rng([0, first]), min(shard, subjects - first)
        code = zipf(rng, n * events, codes).astype(np.int32)
        minute = np.cumsum(rng.random((n, events)) < .25, axis=1) * 7 + rng.integers(0, 20_000_000, (n, 1))
        table = pyarrow.table({
            "subject_id": np.repeat(np.arange(first, first + n) + 10_000_000, events),
            "time": pyarrow.array((minute.ravel() * 60_000_000).astype("datetime64[us]")),
            "code": pyarrow.DictionaryArray.from_arrays(code, names).cast(pyarrow.string()),
            "numeric_value": pyarrow.array(rng.normal(size=n * events).astype(np.float32), mask=code % 2 > 0)})
        parquet.write_table(table, folder / "data" / f"{first // shard}.parquet")


def training_time(cohort, steps: int | None = None, batch_size: int = train.PretrainConfig.batch_size):
    """Seconds of so many steps of pretraining (None: an epoch) with the defaults, and their stays; one step before."""
    stays, settings = np.arange(len(cohort)), train.PretrainConfig()
    dataset = StayDataset(cohort, Normalizer.fit(cohort, stays))
    model = new_pretraining(ModelConfig(len(cohort.variables)), dataset).train()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cpu", enabled=False)
    sizes = dataset.sizes(stays)
    batches = epoch_batches(sizes.sets, batch_size, 0, 0)[:steps]
    for i, batch in enumerate([batches[0], *batches]):
        if i == 1:
            began = time.perf_counter()
        *parts, last = split_batch(sizes, batch, 1)
        for part in parts:
            (model(dataset[part], 0.0)["loss"] * len(part) / len(batch)).backward()
        (model(dataset[last], 0.0)["loss"] * len(last) / len(batch)).backward()
        clip_and_step(model, optimizer, scaler, settings.clip)
    return time.perf_counter() - began, sum(map(len, batches))


def vocabulary_work(variables: int):
    return training_time(zipf_cohort(variables))


def reading_work(folder: Path, cache: Path):
    began, cohort = time.perf_counter(), load_cohort(folder, cache_dir=cache)
    return time.perf_counter() - began, len(cohort.event_value)


def training_work(folder: Path, cache: Path):
    return training_time(load_cohort(folder, cache_dir=cache), STEPS, STAYS)


def answer(pipe, threads: int, work, arguments) -> None:
    keep_freed_memory(), torch.set_num_threads(threads)
    pipe.send((*work(*arguments), peak_memory(torch.device("cpu"))))


def alone(work, *arguments) -> tuple:
    """What `work` gives, and the peak memory in MB, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, torch.get_num_threads(), work, arguments))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise InputError(f"--benchmark scale: the measurement ended early (exit code {process.exitcode}); "
                         "see above") from None


def scale() -> None:
    """Print how time and memory grow with the vocabulary at the same events, and with the number of subjects."""
    print(f"{machine_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
          "\none epoch of pretraining, 300 stays x 150 sets x 4 events of V variables (Zipf), the fastest "
          f"of {ROUNDS} turns\n"
          "     V  seconds  x V=100  peak MB")
    turns = [[alone(vocabulary_work, variables) for variables in VOCABULARIES] for _ in range(ROUNDS)]
    fastest = [min(times) for times in zip(*turns)]
    for variables, (seconds, _, memory) in zip(VOCABULARIES, fastest):
        print(f"{variables:6,d}  {seconds:7.1f}  {seconds / fastest[0][0]:7.2f}  {memory:7,.0f}", flush=True)
    print(f"\nsharded MEDS, 2,000 events a subject, 20,000 codes; {STEPS} steps of pretraining, {STAYS} stays each\n"
          "subjects       events  read s  events/s  peak MB  stays/s trained  peak MB")
    with tempfile.TemporaryDirectory() as home:
        for subjects in (SUBJECTS // PART, SUBJECTS):
            folder, cache = Path(home) / str(subjects), Path(home) / f"cache {subjects}"
            write_meds(folder, subjects)
            seconds, events, memory = alone(reading_work, folder, cache)
            trained, stays, peak = alone(training_work, folder, cache)
            print(f"{subjects:8,d}  {events:11,d}  {seconds:6.1f}  {events / seconds:8,.0f}  {memory:7,.0f}  "
                  f"{stays / trained:15.2f}  {peak:7,.0f}", flush=True)
