"""Every method on several splits with one command (`test_suite.py --protocol`); and the model's speed and
memory beside a plain loop (`test_suite.py --benchmark`)."""

import contextlib
import itertools
import multiprocessing
import platform
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from baselines import ALONE, BASELINES, without_backbone
from batches import Normalizer, StayDataset, epoch_batches, sorted_batches, variable_vectors
from data import (InputError, build_cohort, clear_write_error, make_splits, point_table, stays_of,
                  write_atomically)
from checkpoint import Checkpoint, label_digest
from finetune_config import FinetuneConfig, tree_sizes
from metrics import (Points, best_shares, best_utility_threshold, bootstrap, bracketed, hours_since_onset,
                     interval, logit, normalised_utility, of_challenge_2019, resampled, utilities_by,
                     utility_draws)
from model import ModelConfig, SeqSetVAE, SeqSetVAEPretrain
from predictor import CPU, Predictor, open_checkpoint
from questions import at_end, labelled_points
from readers import load_cohort
from runs import CHECKPOINTS, answers_at, choose_device, encode_points, keep_freed_memory, read_cohort
from settings import DataSettings, changed, data_options, recorded
from tasks import Task
from train import HeadTraining, PretrainConfig, clip_and_step, finetune, labelled, pretrain, run_settings


# ------------------------------------------------------------------------------------------------------------
# The protocol: several splits, every method, one command
# ------------------------------------------------------------------------------------------------------------

# The options of train.py for each way to finetune a pretrained backbone.
CELLS = {"frozen": {}, "untrained": {"random_init": True}, "full": {"full_training": True},
         "scratch": {"full_training": True, "random_init": True}}
CELLS |= {f"{name}, learned features only": cell | {"changes": {"summaries": False}}
          for name, cell in CELLS.items()}
CELLS["frozen, mu alone"] = {"changes": {"fuse": False}}
METHODS = ("baselines", *CELLS)
FEW_LABELS = METHODS[:5]  # what is measured with fewer labels too
AVERAGED, AVERAGE = ("frozen", "full", *BASELINES), "average, weights from validation"
FIGURES = "figures.csv"


def protocol(given: dict, splits: list, seeds: list, methods: list, fractions: list, folder: Path) -> None:
    """For every split (a file, or None: drawn by the seed) and seed: pretrain on the training part without
    labels, finetune every cell, fit the baselines, score validation and test part once. What is finished lies
    in `folder` and is kept: stop and go on at will. given: the data's options, see `data_options`."""
    for split in filter(None, splits):
        if not Path(split).is_file():
            raise InputError(f"--splits {split}: no such file; correct the path")
    if len({Path(split or "").stem for split in splits}) < len(splits):
        raise InputError("--splits: two files of one name, by which what is finished is kept; rename one")
    turns = [(folder / f"{Path(split).stem}-seed{seed}" if split else folder / f"seed{seed}",
              given | ({"split_file": split} if split else {}), seed) for seed in seeds for split in splits]
    plan = [(method, fraction) for fraction in fractions for method in methods
            if fraction == 1 or method in FEW_LABELS]
    if not plan:
        raise InputError(f"--methods {' '.join(methods)}: measured with all labels alone; add 1 to "
                         "--fractions")
    for home, data, seed in turns:
        cohort = read_cohort(data)
        # Pretraining, which draws the split, does not see labels of other kinds.
        bare = cohort if cohort.kind == "binary" else read_cohort(data | {"kinds": ("binary",)})
        split = make_splits(bare, seed)
        Task.of(cohort).check(cohort, split)
        if (checkpoint := home / "pretrain" / "best.pt").exists():
            kept = Checkpoint.open(checkpoint)
            learned = {Checkpoint.open(path).source["labels"] for path in home.glob("*%/best.pt")}
            now = recorded(DataSettings(**data)), cohort.fingerprint, label_digest(bare), split
            then = [kept.source[name] for name in ("data", "fingerprint", "labels")]
            if now != (*then, kept.split) or learned - {label_digest(cohort)}:
                raise InputError(f"{home}: holds what was measured on other data, labels or splits, or asked "
                                 f"otherwise ({then[0]}); give another --protocol FOLDER")
    for (method, fraction), (home, data, seed) in itertools.product(plan, turns):
        common = dict(seed=seed, resume="auto", **data)
        once(home / "pretrain", lambda to: pretrain(run_settings(mode="pretrain", run_dir=str(to), **common)))
        checkpoint = home / "pretrain" / "best.pt"
        if method == "baselines":
            predict_baselines(checkpoint, home, seed, fraction, data)
            continue

        def finetune_and_score(to: Path) -> None:
            best = finetune(run_settings(mode="finetune", pretrained_ckpt=str(checkpoint), run_dir=str(to),
                                         label_fraction=fraction, **CELLS[method], **common))
            predictor, dataset = Predictor.with_data(best, data, "cpu")
            split = predictor.checkpoint.split
            points = scored_points(dataset.cohort, split)
            answers = answers_at(predictor.model, dataset, points, CPU)
            save_answers(to, predictor.model.task, dataset.cohort, split, points, answers)
            (to / "last.pt").unlink()

        once(folder_of(home, method, fraction), finetune_and_score)
    print_protocol(folder)


def once(folder: Path, work) -> None:
    """Do `work` in a partial folder, which then takes the name `folder`; nothing where that is there."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    with clear_write_error(folder):
        partial.mkdir(parents=True, exist_ok=True)
    work(partial)
    partial.rename(folder)


def folder_of(home: Path, method: str, fraction: float) -> Path:
    return home / f"{method} {100 * fraction:g}%"


def scored_points(cohort, split: dict) -> np.ndarray:
    """The labelled points of the validation and the test part."""
    return labelled_points(cohort, stays_of(cohort, [*split["valid"], *split["test"]]))


def save_answers(folder: Path, task, cohort, split: dict, points, answers) -> None:
    """Write the answers [n, columns] at the scored points as predictions.csv. Of other kinds than binary also
    figures.csv: the figures of the test part, then those of resampled patients, the same for every method."""
    stay = cohort.point_stay[points]
    part = np.where(np.isin(cohort.stay_id[stay], split["valid"]), "valid", "test")
    table = point_table(cohort, points).join(task.labels(cohort.answers[points]))
    table = table.assign(**dict(zip(task.columns, answers.T)), split=part)
    write_atomically(folder / "predictions.csv", lambda out: table.to_csv(out, index=False))
    if task.kind != "binary":
        test = part == "test"
        names, measure = task.measures(cohort.answers[points[test]].astype(float), answers[test])
        figures = pd.DataFrame(resampled(measure, cohort.subject[stay[test]]), columns=names)
        write_atomically(folder / FIGURES, lambda out: figures.to_csv(out, index=False))


def predict_baselines(checkpoint: Path, home: Path, seed: int, fraction: float, given: dict) -> None:
    """Answers by every one of BASELINES that can be had."""
    if folder_of(home, ALONE, fraction).exists():
        return
    opened, cohort = open_checkpoint(checkpoint, given)
    dataset, split, task = opened.dataset(cohort), opened.split, Task.of(cohort)
    train = task.subset(cohort, labelled(cohort, split["train"]), fraction, seed)
    task = task.fitted(cohort, *task.training_points(cohort, train, FinetuneConfig(), seed, 0))
    points = scored_points(cohort, split)
    valid = labelled_points(cohort, stays_of(cohort, split["valid"]))
    for method, answers in without_backbone(task, dataset, train, valid, points, seed).items():
        once(folder_of(home, method, fraction),
             lambda to: save_answers(to, task, cohort, split, points, answers))


def averaged(turns: dict[str, list[pd.DataFrame]]) -> dict[str, tuple[pd.DataFrame, np.ndarray]]:
    """Of every split, whose methods' predictions of the same points are given: the mean of their logits, and
    the shares in it, which are best on the validation parts of all splits, but for the stays that this split
    tests. (The few hundred validation stays of one split choose by luck.)"""
    logits = {turn: np.stack([logit(table["probability"].to_numpy(), least=1e-7) for table in tables])
              for turn, tables in turns.items()}
    every = np.concatenate([*logits.values()], axis=1)                                     # [methods, points]
    points = pd.concat([table for table, *_ in turns.values()], ignore_index=True)
    told = {}
    for turn, (table, *_) in turns.items():
        tested = table.loc[table["split"] == "test", "subject_id"]
        used = (points["split"].eq("valid") & ~points["subject_id"].isin(tested)).to_numpy()
        best = best_shares(every[:, used], points["label"].to_numpy()[used])
        told[turn] = table.assign(probability=1 / (1 + np.exp(-best @ logits[turn]))), best
    return told


def parts(table: pd.DataFrame) -> list[tuple[Points, np.ndarray]]:
    """Returns the points of the validation and of the test part, with their probabilities. The table is
    sorted by stay and minute."""
    table = table.assign(**{name: pd.factorize(table[name])[0] for name in ("stay_id", "subject_id")})
    both = (table[table["split"] == part] for part in ("valid", "test"))
    return [(Points(*(rows[name].to_numpy() for name in ("stay_id", "subject_id", "minute", "label"))),
             rows["probability"].to_numpy()) for rows in both]


def scores(table: pd.DataFrame, hourly: bool) -> np.ndarray:
    """Returns how the predictions of a method on a split do, [1 + 200, m]: AUROC, AUPRC and, if `hourly`,
    the utility of alarms from the threshold on that the validation part chose. Row 0 is of the test part, the
    others are of its resampled patients, the same for all methods; NaN: no sepsis."""
    (valid, p_valid), (test, p) = parts(table)
    value = [roc_auc_score(test.label, p), average_precision_score(test.label, p)]
    found = np.vstack([value, bootstrap(test.subject, test.label, p, repeats=200)[:, 0]])
    if hourly:
        since = hours_since_onset(valid.stay, valid.minute, valid.label)
        threshold, _ = best_utility_threshold(valid.stay, since, p_valid)
        since = hours_since_onset(test.stay, test.minute, test.label)
        utility = utilities_by(test.subject, since, p >= threshold)
        utility = np.append(normalised_utility(utility.sum(0)), utility_draws(utility))
        found = np.column_stack([found, utility])
    return found


def print_protocol(folder: Path) -> None:
    """The tables of RESULTS.md from what is finished: mean and standard deviation over the splits; the
    difference to the best baseline (by the mean of the first figure) with a bootstrap interval, paired by
    patient and drawn within each split."""
    found = {}
    for path in sorted(folder.glob("*/*%/predictions.csv")):
        method, fraction = path.parent.name.rsplit(" ", 1)
        found.setdefault(fraction, {}).setdefault(method, {})[path.parent.parent.name] = path
    for fraction, paths in sorted(found.items(), key=lambda item: -float(item[0].rstrip("%"))):
        some = next(iter(next(iter(paths.values())).values()))
        read = other_figures if some.with_name(FIGURES).exists() else binary_figures
        rows, names = read(paths)
        ranked = sorted(rows, key=lambda method: first_figure(rows[method]), reverse=names[0] != "mae")
        base = next((method for method in ranked if method in BASELINES), None)
        print(f"\n{fraction} of the training labels")
        print_methods(rows, ranked, base, names)


def binary_figures(paths: dict) -> tuple[dict, list[str]]:
    """The figures of methods and of their average, see `print_methods`, and their names. paths: method ->
    split -> its predictions."""
    tables = {method: {turn: read_predictions(path) for turn, path in turns.items()}
              for method, turns in paths.items()}
    turns = sorted({turn for by_turn in tables.values() for turn in by_turn})
    members = [method for method in AVERAGED if sorted(tables.get(method, [])) == turns]
    if len(members) > 1:
        told = averaged({turn: [tables[method][turn] for method in members] for turn in turns})
        tables[AVERAGE] = {turn: table for turn, (table, _) in told.items()}
        mean = np.mean([weights for _, weights in told.values()], axis=0)
        shares = [f"{share:.2f} {name}" for share, name in zip(mean, members)]
        print(f"\n{AVERAGE}, in the mean: {', '.join(shares)}")
    hourly = all(of_challenge_2019(part.stay, part.minute, part.label)
                 for turns in tables.values() for table in turns.values() for part, _ in parts(table))
    rows = {method: {turn: scores(table, hourly) for turn, table in turns.items()}
            for method, turns in tables.items()}
    return rows, ["AUROC", "AUPRC", *(["utility"] if hourly else [])]


def read_predictions(path: Path) -> pd.DataFrame:
    """The predictions of a method on a split, by stay and minute."""
    table = pd.read_csv(path, dtype={"stay_id": str, "subject_id": str}, keep_default_na=False)
    table = table.assign(subject_id=table.get("subject_id", table["stay_id"]))  # older files name stays alone
    return table.sort_values(["stay_id", "minute"], kind="stable")


def other_figures(paths: dict) -> tuple[dict, list[str]]:
    """The same of other kinds, of which no average is taken."""
    tables = {method: {turn: pd.read_csv(path.with_name(FIGURES)) for turn, path in turns.items()}
              for method, turns in paths.items()}
    names = next(iter(next(iter(tables.values())).values())).columns
    print("\nno average: it is taken of binary outcomes alone")
    return {method: {turn: table.to_numpy() for turn, table in turns.items()}
            for method, turns in tables.items()}, [*names]


def first_figure(turns: dict[str, np.ndarray]) -> float:
    """Returns the mean over the splits of a method's first figure, see `print_methods`."""
    return np.mean([each[0, 0] for each in turns.values()])


def print_methods(rows: dict, ranked: list[str], base: str | None, names: list[str]) -> None:
    """Prints a table of these methods and figures. rows: method -> split -> [1 + draws, m], the figures and
    those of resampled patients, which are the same for all methods of a split."""
    print(f"\n| method | splits | {' | '.join(names)} | difference to {base}: {' | '.join(names)} |\n"
          f"|---|---|{'---|' * 2 * len(names)}")
    for method in ranked:
        values = pd.DataFrame([each[0] for each in rows[method].values()])
        cells = [f"{m:.3f} ± {d:.3f}" for m, d in zip(values.mean(), values.std().fillna(0))]
        pairs = [each - rows[base][turn] for turn, each in rows[method].items()
                 if method != base and turn in rows.get(base, {})]
        if pairs:
            difference, *draws = np.mean(pairs, axis=0)
            limits = map(interval, np.transpose(draws))
            cells += [f"{d:+.3f} {bracketed(each)}" for d, each in zip(difference, limits)]
        else:
            cells += [""] * len(names)
        print(f"| {method} | {len(values)} | {' | '.join(cells)} |")


# ------------------------------------------------------------------------------------------------------------
# Speed and memory, beside a plain loop over single sets (`test_suite.py --benchmark`)
# ------------------------------------------------------------------------------------------------------------

PLAIN_LOOP, PRETRAIN_STEP, FINETUNING, INFERENCE = "plain loop", "pretrain step", "finetuning", "inference"
# Sizes: config of a number of variables, batches of pretraining, of evaluation, epochs of finetuning, ways to
# run it.
SIZES = {"original's sizes": (ModelConfig.original, 4, 3, 15, (PLAIN_LOOP, "float32", "bf16")),
         "our default": (ModelConfig, 16, 6, 20, ("float32", "bf16"))}
ROUNDS, LOOPED = 3, 8  # passes timed; stays of the plain loop
VOCABULARIES, ZIPF_STAYS = (100, 1000, 5000, 20_000), 300


def asked_at_the_end(cohort) -> StayDataset:
    """One question a stay, at its end, whatever the data ask: the plain loop knows no other."""
    return StayDataset(at_end(cohort), Normalizer.fit(cohort, np.arange(len(cohort))), points=True)


def spread(items, n: int) -> list:
    """n of the items at even distances, or all."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, n + 2)[1:-1].round().astype(int))]


def new_models(config, dataset) -> tuple[SeqSetVAEPretrain, SeqSetVAE, FinetuneConfig]:
    """A model to pretrain, a classifier of its sizes and the settings of its head: the default ones, or, with
    the original's decoder, the original's features, widths and loss."""
    d, settings = config.latent_dim, FinetuneConfig(hidden_width=None)
    if config.decoder == "slots":
        settings = replace(settings, summaries=False, head_widths=(d, d // 2, d // 4), trees=None,
                           loss="focal")
    vectors = variable_vectors(dataset.normalizer.variables, config.input_dim)
    head = asdict(settings) | tree_sizes(settings, 0)
    head["head_variables"] = min(config.num_variables, settings.most_variables)
    return SeqSetVAEPretrain(config, vectors), SeqSetVAE(changed(config, head), vectors), settings


def pretraining_pass(how, config, batches, dataset, device):
    """Steps on every batch. The plain loop goes backward after each stay, so it holds one in memory."""
    from tests.plain_loop import plain_pass, plain_stays
    model = new_models(config, dataset)[0].to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler, clip = torch.amp.GradScaler(device.type, enabled=False), PretrainConfig().clip

    def run():
        for stays in batches:
            if how == PLAIN_LOOP:
                for stay in plain_stays(dataset, stays):
                    _, (reconstruction, kl) = plain_pass(model, [stay])
                    ((reconstruction + config.max_beta * kl) / len(stays)).backward()
            else:
                with torch.amp.autocast(device.type, torch.bfloat16, enabled=how == "bf16"):
                    loss = model(dataset[stays].to(device), config.max_beta)["loss"]
                loss.backward()
            clip_and_step(model, optimizer, scaler, clip)
    return run


def classifier_pass(task, epochs, how, config, batches, dataset, device):
    """Inference, or a finetuning on the frozen backbone, of which the plain loop runs one epoch: it encodes
    every stay at each."""
    from tests.plain_loop import plain_features, plain_stays
    _, model, settings = new_models(config, dataset)
    stays = np.sort(np.concatenate(batches))
    alone = SimpleNamespace(model=model.to(device), seed=0, last=None)
    # Any answers take the same time, and some data have none.
    answer = (torch.arange(len(stays), device=device) % 2).float()[:, None]
    weight = torch.ones(len(stays), device=device)

    @torch.no_grad()
    def run():
        if how == PLAIN_LOOP:
            lists = plain_stays(dataset, stays)
            features = torch.stack([plain_features(model.eval(), stay) for stay in lists])
        else:
            with torch.amp.autocast(device.type, torch.bfloat16, enabled=how == "bf16"):
                features = encode_points(model, dataset, stays, device)  # a stay's point has its number
        if task == INFERENCE:
            return model.task.answer(model.classify(features))
        head = HeadTraining(alone, settings, features, answer, weight, len(stays))
        with torch.enable_grad():
            for epoch in range(1 if how == PLAIN_LOOP else epochs):
                head.epoch(epoch)
    return run


def peak_memory(device) -> float:
    """MB: of PyTorch's tensors on a GPU, else of this process. The latter never falls, so each work has a
    process of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        raise InputError("--benchmark measures memory by Python's module resource, which this system lacks; "
                         "run it on Linux or macOS") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def get_ready(threads: int, device, work) -> None:
    """Make the pass that this process alone runs, see `timed_pass`."""
    global run_pass
    keep_freed_memory()
    torch.set_num_threads(threads)
    run_pass = work()


def timed_pass(device) -> tuple[float, float]:
    """The seconds of a pass, and the peak memory so far."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run_pass()
    wait()
    return time.perf_counter() - began, peak_memory(device)


def take_turns(works: dict, device, rounds: int) -> dict:
    """For each work, which makes a pass in a process of its own: seconds of the fastest pass, peak memory in
    MB. The passes take turns, so that whatever else the machine does slows all alike."""
    context, passes = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload([Path(__file__).stem, "torch._dynamo"])  # which every optimizer imports
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(
            1, context, get_ready, (torch.get_num_threads(), device, work))) for name, work in works.items()}
        for _, (name, pool) in itertools.product(range(rounds), pools.items()):
            try:
                passes.append((name, *pool.submit(timed_pass, device).result()))
            except BrokenProcessPool:
                raise InputError(f"--benchmark: the process of {name} ended early; see above") from None
    passes = pd.DataFrame(passes, columns=["work", "seconds", "MB"]).groupby("work", sort=False)
    return passes.agg({"seconds": "min", "MB": "max"})


def benchmark(arguments) -> None:
    """Print times and memory beside the plain loop, and append the table to checkpoints/benchmark.csv."""
    if arguments.cache_dir:
        raise InputError(f"--cache_dir {arguments.cache_dir}: --benchmark measures reading, into a temporary "
                         "folder of its own; leave the option out")
    (device, dtype), rows = choose_device("auto", "auto"), {}
    peak_memory(device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        options = data_options(arguments) | {"cache_dir": Path(cache)}
        for what in ("parsed" if arguments.data_dir else "generated", "from the cache"):
            began, cohort = time.perf_counter(), load_cohort(**options)
            print(f"data, {what}: {time.perf_counter() - began:.3g} s")
    print(cohort.describe())
    dataset, lengths = asked_at_the_end(cohort), np.diff(cohort.stay_start)
    for sizes, (make_config, steps, passes, epochs, hows) in SIZES.items():
        config = make_config(len(dataset.normalizer.variables))
        trained = epoch_batches(lengths, PretrainConfig().batch_size, 0, 0)[:steps]
        scored = spread(sorted_batches(dataset.sizes(np.arange(len(cohort)))), passes)
        for task, make_pass, batches in ((PRETRAIN_STEP, pretraining_pass, trained),
                                         (FINETUNING, partial(classifier_pass, FINETUNING, epochs), scored),
                                         (INFERENCE, partial(classifier_pass, INFERENCE, epochs), scored)):
            print(f"measuring: {sizes}, {task}", flush=True)
            stays = np.concatenate(batches)
            looped = spread(stays[np.argsort(lengths[stays])], LOOPED)
            used = {how: [looped] if how == PLAIN_LOOP else batches
                    for how in hows if how != "bf16" or dtype == torch.bfloat16}
            works = {how: partial(make_pass, how, config, mine, dataset, device)
                     for how, mine in used.items()}
            for how, seconds, memory in take_turns(works, device, ROUNDS).itertuples():
                seconds *= epochs if (task, how) == (FINETUNING, PLAIN_LOOP) else 1
                mine = np.concatenate(used[how])
                rows[sizes, task, how] = {"ms a stay": 1e3 * seconds / len(mine),
                                          "ms a set": 1e3 * seconds / lengths[mine].sum(), "MB": memory}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["sizes", "work", "how"])
    plain = table["ms a set"].xs(PLAIN_LOOP, level="how")
    table["x plain"] = plain.reindex(table.index.droplevel("how")).to_numpy() / table["ms a set"]
    machine = {"machine": f"{machine_name(device)}, {torch.get_num_threads()} threads",
               "torch": str(torch.__version__), "data": f"{cohort.reader}, {len(cohort)} stays"}
    memory = "the tensors" if device.type == "cuda" else "a process that does this alone"
    print(f"\n{', '.join(map(str, machine.values()))}\n"
          f"Times: the fastest of {ROUNDS} passes, taken in turns. MB: peak memory of {memory}.\n"
          f"The plain loop runs {LOOPED} of the stays, and of a finetuning one epoch, whose time is "
          "multiplied.\nx plain: how many times faster a set is done.\n")
    print(table.to_string(float_format=lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}", na_rep=""))
    print_bedside_latency(dataset)
    path = CHECKPOINTS / "benchmark.csv"
    table = table.reset_index().assign(date=time.strftime("%Y-%m-%d %H:%M"), **machine)
    if path.exists():
        table = pd.concat([pd.read_csv(path), table])
    write_atomically(path, lambda out: table.to_csv(out, index=False))
    print(f"{len(rows)} rows appended to {path}")


def machine_name(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def print_bedside_latency(dataset) -> None:
    """The median times of our default classifier, on one thread of the CPU: of appending a set of 6 events
    to a stay of 200 sets, and of asking for the risk after it."""
    names, rng, times = dataset.normalizer.variables, np.random.default_rng(0), []
    model, threads = new_models(ModelConfig(len(names)), dataset)[1], torch.get_num_threads()
    predictor = Predictor(Checkpoint.of(model, dataset.normalizer), "cpu")
    state = predictor.start()
    torch.set_num_threads(1)
    for minute in 20. * np.arange(300):
        pairs = [(rng.choice(names), rng.normal()) for _ in range(6)]
        began = time.perf_counter()
        predictor.step(state, minute, pairs)
        stepped = time.perf_counter()
        predictor.ask(state, minute)
        times.append([stepped - began, time.perf_counter() - stepped])
    torch.set_num_threads(threads)
    step, ask = 1e3 * np.median(times[200:], axis=0)
    print(f"bedside, after 200 sets, one thread: a set of 6 events {step:.3g} ms\n"
          f"bedside, a question: {ask:.3g} ms")


# ---- scale: the cost follows the events, not the vocabulary ------------------------------------------------

def pretraining_of(variables: int, stays: int):
    """A pass of an epoch of pretraining with the defaults. The stays have 150 sets of 4 events,
    whatever the vocabulary, of variables drawn by Zipf's law with exponent 1."""
    rng, n = np.random.default_rng(0), stays * 600
    chance = 1 / np.arange(1, variables + 1)
    stay, place = np.divmod(np.arange(n), 600)
    cohort = build_cohort("Zipf", [f"v{i:05d}" for i in range(variables)], stay, place // 4 * 20.0,
                          rng.choice(variables, n, p=chance / chance.sum()), rng.normal(size=n),
                          np.arange(stays).astype(str))
    dataset = asked_at_the_end(cohort)
    config = ModelConfig(len(cohort.variables))
    batches = epoch_batches(np.diff(cohort.stay_start), PretrainConfig().batch_size, 0, 0)
    return pretraining_pass("float32", config, batches, dataset, CPU)


def scale() -> None:
    """Print how time and memory grow with the vocabulary at the same events."""
    print(f"{machine_name(CPU)}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
          f"one epoch of pretraining, {ZIPF_STAYS} stays x 150 sets x 4 events of V variables (Zipf), the "
          f"fastest of {ROUNDS} turns")
    works = {variables: partial(pretraining_of, variables, ZIPF_STAYS) for variables in VOCABULARIES}
    table = take_turns(works, CPU, ROUNDS).rename_axis("V")
    print(table.assign(**{"x first": table["seconds"] / table["seconds"].iloc[0]}).round(2).to_string())
