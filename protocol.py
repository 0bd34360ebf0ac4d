"""Against what the model is measured: hand-made baselines, an untrained backbone, and the protocol that runs every
method on several splits, or published ones, with one command (`test_suite.py --protocol`)."""

import contextlib
import io
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from batches import common_variables
from checkpoint import Checkpoint, label_digest, recorded
from data import InputError, labelled_points, make_splits, search_after, stay_event_index, stays_of
from finetune_config import MANY_POINTS, FinetuneConfig, tree_sizes
from history_statistics import summary_features
from metrics import (best_shares, best_utility_threshold, bootstrap, hours_since_onset, interval, logit,
                     normalised_utility, of_challenge_2019, stay_utilities, utility_draws)
from model import ModelConfig, SeqSetVAE
from predictor import CPU, Predictor, encode_points, open_checkpoint, probability_at
from runs import choose_device, read_cohort
from settings import changed, data_options
from tables import clear_write_error, write_atomically
from tasks import label_subset, need_both_classes
from train import HeadTraining, finetune, labelled, parse_arguments, pretrain, training_points, weigh_trees


# ----------------------------------------------------------------------------------------------------------------------
# Baselines: hand-made features, and the model's own head without its backbone
# ----------------------------------------------------------------------------------------------------------------------

BASELINES = ("logistic regression on summaries", "gradient boosting on summaries", "same head, exact summaries alone")
STATISTICS = ("first", "last", "min", "max", "mean", "sd", "slope", "count", "hours since")


def running(x: np.ndarray, first: np.ndarray, combine) -> np.ndarray:
    """[n] each x combined (np.add, np.maximum, np.minimum) with all before it in its segment, which begins at index
    `first` [n]. By doubling steps (Hillis & Steele 1986): nothing of another segment enters a sum, so nothing cancels.
    """
    x, index, step = x.copy(), np.arange(len(x)), 1
    while len(index := index[index - step >= first[index]]):
        x[index] = combine(x[index], x[index - step])
        step *= 2
    return x


def summary_table(cohort, points, variables) -> np.ndarray:
    """Hand-made features of the stay up to each prediction point: STATISTICS of these variables [K] (indices in the
    cohort), descriptors included: [n, K, 9] float32, raw units, slope a day; NaN where there is none (count: 0)."""
    stay = cohort.point_stay[points]
    begin, after = cohort.stay_start[stay], cohort.stay_start[stay + 1]
    after = search_after(cohort.set_minute, cohort.point_minute[points], begin, after)
    begin, end = cohort.set_start[begin], cohort.set_start[after]                         # [n] the events of each point
    events = stay_event_index(cohort, np.unique(stay))
    events = events[np.argsort(cohort.event_variable[events], kind="stable")]             # by variable, stay, time
    begins, ends = (np.searchsorted(cohort.event_variable[events], variables, side) for side in ("left", "right"))
    table = np.full((len(points), len(variables), len(STATISTICS)), np.nan, dtype=np.float32)
    for k, mine in enumerate(events[low:high] for low, high in zip(begins, ends)):
        last, before = np.searchsorted(mine, end) - 1, np.searchsorted(mine, begin)
        table[:, k, -2] = last + 1 - before
        seen = last >= before
        charted = cohort.set_minute[np.searchsorted(cohort.set_start, mine, side="right") - 1]
        table[seen, k, -1] = (cohort.point_minute[points[seen]] - charted[last[seen]]) / 60

        value = cohort.event_value[mine].astype(np.float64)
        valued = ~np.isnan(value)
        mine, value, day = mine[valued], value[valued], charted[valued] / 1440
        owner = np.searchsorted(cohort.set_start[cohort.stay_start], mine, side="right") - 1
        first = np.searchsorted(owner, owner)
        x, day, n = value - value[first], day - day[first], np.arange(len(mine)) - first + 1
        mean, square, days, spread, product = (running(term, first, np.add) / n
                                               for term in (x, x * x, day, day * day, x * day))
        variance, spread = np.maximum(square - mean ** 2, 0), spread - days ** 2
        sd = np.sqrt(np.where(n > 1, variance * n / np.maximum(n - 1, 1), np.nan))
        slope = np.where(spread > 1e-9, (product - days * mean) / np.where(spread > 1e-9, spread, 1), 0)
        statistics = np.stack([value[first], value, *(running(value, first, how) for how in (np.minimum, np.maximum)),
                               value[first] + mean, sd, slope], axis=1)
        last, before = np.searchsorted(mine, end) - 1, np.searchsorted(mine, begin)
        seen = last >= before
        table[seen, k, :-2] = statistics[last[seen]]
    return table


def hand_made_baselines(cohort, variables, train, weight, test) -> dict[str, np.ndarray]:
    """Probabilities at the test points by models of `summary_table`, from the training points and their weights:
    logistic regression (penalty chosen by cross-validation) and HistGradientBoosting (shallow trees, chosen likewise);
    from many points boosting alone, with the hours since each variable's last event and settings of its own."""
    many = len(train) > MANY_POINTS
    both = summary_table(cohort, np.concatenate([train, test]), variables)
    both = (both if many else both[..., :-1]).reshape(len(both), -1)
    x, y = both[:len(train)], cohort.label[train].astype(int)
    says = np.fmin.reduce(x) < np.fmax.reduce(x)  # what is constant in training, or was never measured, says nothing
    x, x_test = x[:, says], both[len(train):, says]
    if many:
        print(f"baselines: no {BASELINES[0]}: it takes too long for {len(train):,} points")
        boosting = HistGradientBoostingClassifier(l2_regularization=10., early_stopping=False, random_state=0)
        return {BASELINES[1]: boosting.fit(x, y, weight).predict_proba(x_test)[:, 1]}
    folds = min(5, np.bincount(y, minlength=2).min())
    if folds < 2:
        raise InputError(f"baselines: {y.sum()} of {len(y)} training labels are 1, too few to choose a penalty by "
                         "cross-validation: give more labels")
    low, high = np.nanquantile(x, [.005, .995], axis=0)
    linear = make_pipeline(FunctionTransformer(lambda t: t.clip(low, high)),
                           SimpleImputer(strategy="median", add_indicator=True),
                           StandardScaler(),
                           GridSearchCV(LogisticRegression(max_iter=500), {"C": [.0003, .001, .003, .01, .03, .1]},
                                        scoring="neg_log_loss", cv=folds))
    boosting = GridSearchCV(HistGradientBoostingClassifier(learning_rate=.05, random_state=0),
                            {"max_iter": [100, 200], "max_leaf_nodes": [6, 15], "l2_regularization": [10.]},
                            scoring="neg_log_loss", cv=folds)
    return {BASELINES[0]: linear.fit(x, y).predict_proba(x_test)[:, 1],
            BASELINES[1]: boosting.fit(x, y).predict_proba(x_test)[:, 1]}


class SummariesAlone(SeqSetVAE):
    """The classifier's head on the exact summaries of the stay and nothing else: its backbone is never run."""

    def feature_sizes(self) -> dict[str, int]:
        return {"plain": 0, "learned": 0, "summaries": summary_features(self.config.head_variables)}

    def features(self, batch) -> torch.Tensor:
        return self.exact_summaries(batch)


def summaries_alone(dataset, variables, train, valid, test, seed: int, device=CPU,
                    config=FinetuneConfig()) -> np.ndarray:
    """Probabilities at the test points by the default head (linear and trees) on exact summaries of these variables
    (indices in the dataset's vocabulary), trained like that of a frozen backbone on the training stays; valid: the
    points by which it weighs its trees."""
    points, _ = training_points(dataset.cohort, train, config, seed, 0)
    shape = ModelConfig(len(dataset.normalizer.variables), summaries=True, head_variables=len(variables),
                        head_widths=config.head_widths, **tree_sizes(config, len(points)))
    torch.manual_seed(seed)
    model = SummariesAlone(shape, torch.zeros(shape.num_variables, shape.input_dim))
    model.head_variables.copy_(torch.from_numpy(variables))
    run = SimpleNamespace(model=model.to(device), dataset=dataset, last=None)
    head = HeadTraining(run, train, config, seed, device)
    for epoch in range(head.epochs):
        head.epoch(epoch)
    weigh_trees(model, encode_points(model, dataset, valid, device), dataset.cohort.label[valid])
    return probability_at(model, dataset, test, device)


def without_backbone(dataset, train, valid, test, seed: int, device=CPU,
                     config=FinetuneConfig()) -> dict[str, np.ndarray]:
    """Probabilities at the test points by every one of BASELINES that can be had, learned from the training stays;
    valid: see `summaries_alone`."""
    cohort = dataset.cohort
    variables = common_variables(cohort, dataset, train, config.most_variables)
    points, weight = training_points(cohort, train, config, seed, 0)
    own = np.flatnonzero(np.isin(dataset.variable, variables))
    return (hand_made_baselines(cohort, own, points, weight, test)
            | {BASELINES[2]: summaries_alone(dataset, variables, train, valid, test, seed, device, config)})


def baselines(arguments, checkpoint: Checkpoint, dataset, points) -> dict[str, np.ndarray]:
    """Probabilities at the scored points by BASELINES and by an untrained backbone of the checkpoint's config, under a
    frozen head of its settings; all learn from the labels that the checkpoint learned from."""
    cohort = dataset.cohort
    new = checkpoint.is_new(cohort)
    if new or not checkpoint.run:
        raise InputError(f"{arguments.checkpoint[0]}: --baselines are fitted on the data that train.py made the "
                         f"checkpoint with, as it recorded; leave {'--data_dir' if new else '--baselines'} out")
    config, seed = changed(FinetuneConfig(), checkpoint.run["settings"]), checkpoint.source["seed"]
    share, device = checkpoint.run["options"]["label_fraction"], choose_device(arguments.device, "fp32")[0]
    train = label_subset(cohort, labelled(cohort, checkpoint.split["train"]), share, seed)
    valid = labelled_points(cohort, stays_of(cohort, checkpoint.split["valid"]))
    methods = without_backbone(dataset, train, valid, points, seed, device, config)
    with tempfile.TemporaryDirectory() as folder:
        pretrained = Path(folder) / "untrained.pt"
        replace(checkpoint, mode="pretrain").save(pretrained)
        parts = [(stay, part) for part in ("train", "valid") for stay in checkpoint.split[part]]
        pd.DataFrame(parts, columns=["stay_id", "split"]).to_csv(f"{folder}/split.csv", index=False)
        data = data_options(arguments) | {"split_file": f"{folder}/split.csv"}
        given = [f"--{name}={value}" for name, value in data.items()]
        command = ["--mode", "finetune", "--pretrained_ckpt", str(pretrained), "--random_init", f"--seed={seed}",
                   f"--label_fraction={share}", "--run_dir", f"{folder}/run", "--device", arguments.device, *given]
        with contextlib.redirect_stdout(io.StringIO()):  # its log would stand in the middle of the report
            path = finetune(parse_arguments(command), config)
        model = Predictor(path, arguments.device).model
        return methods | {"untrained backbone, same head": probability_at(model, dataset, points, device)}


# ----------------------------------------------------------------------------------------------------------------------
# The protocol: several splits, every method, one command
# ----------------------------------------------------------------------------------------------------------------------

# The words that train.py takes for each way to finetune a pretrained backbone.
CELLS = {
    "frozen": [], "untrained": ["--random_init"], "full": ["--full_training"],
    "scratch": ["--full_training", "--random_init"],
    "frozen, learned features only": ["--set", "summaries=false"],
    "untrained, learned features only": ["--random_init", "--set", "summaries=false"],
    "full, learned features only": ["--full_training", "--set", "summaries=false"],
    "scratch, learned features only": ["--full_training", "--random_init", "--set", "summaries=false"],
    "frozen, mu alone": ["--set", "fuse=false"]}
METHODS = ("baselines", *CELLS)
FEW_LABELS = METHODS[:5]  # what is measured with fewer labels too
AVERAGED, AVERAGE = ("frozen", "full", *BASELINES), "average, weights from validation"


def protocol(given: dict, splits: list, seeds: list, methods: list, fractions: list, folder: Path) -> None:
    """For every split (a file, or None: drawn by the seed) and seed: pretrain on the training part without labels,
    finetune every cell, fit the baselines, score validation and test part once. What is finished lies in `folder` and
    is kept: stop and go on at will. given: the data's options, see `data_options`."""
    if len({Path(split or "").stem for split in splits}) < len(splits):
        raise InputError("--splits: two files of one name, by which what is finished is kept; rename one")
    turns = [(folder / f"{Path(split).stem}-seed{seed}" if split else folder / f"seed{seed}",
              given | ({"split_file": split} if split else {}), seed) for seed in seeds for split in splits]
    plan = [(method, fraction) for fraction in fractions for method in methods if fraction == 1 or method in FEW_LABELS]
    if not plan:
        raise InputError(f"--methods {' '.join(methods)}: measured with all labels alone; add 1 to --fractions")
    for home, data, seed in turns:
        cohort = read_cohort(data)
        need_both_classes(cohort, split := make_splits(cohort, seed))
        if (checkpoint := home / "pretrain" / "best.pt").exists():
            kept = Checkpoint.open(checkpoint)
            then, now = kept.source, {"data": recorded(data), "fingerprint": cohort.fingerprint,
                                            "labels": label_digest(cohort)}
            if kept.split != split or any(then[name] != value for name, value in now.items()):
                raise InputError(f"{home}: holds what was measured on other data, labels or splits, or asked otherwise "
                                 f"({then['data']}); give another --protocol FOLDER")
    for (method, fraction), (home, data, seed) in itertools.product(plan, turns):
        common = [f"--seed={seed}", *(f"--{name}={value}" for name, value in data.items())]
        with finished(home / "pretrain") as partial:
            if partial:
                pretrain(parse_arguments(["--mode", "pretrain", *common, *kept_in(partial)]))
        checkpoint = home / "pretrain" / "best.pt"
        if method == "baselines":
            predict_baselines(checkpoint, home, seed, fraction, data)
            continue
        with finished(folder_of(home, method, fraction)) as partial:
            if partial:
                best = finetune(parse_arguments(["--mode", "finetune", "--pretrained_ckpt", str(checkpoint), *common,
                                                 "--label_fraction", str(fraction), *CELLS[method], *kept_in(partial)]))
                predictor, dataset = Predictor.with_data(best, data, "cpu")
                cohort, split = dataset.cohort, predictor.checkpoint.split
                points = scored_points(cohort, split)
                save_predictions(partial, cohort, split, points, probability_at(predictor.model, dataset, points, CPU))
                (partial / "last.pt").unlink()
    print_protocol(folder)


@contextlib.contextmanager
def finished(folder: Path):
    """Give the partial folder of a work that is to be done, or gone on with, which then takes the name `folder`; None
    where that is there."""
    if folder.exists():
        yield None
        return
    partial = folder.with_name(f"{folder.name}.partial")
    with clear_write_error(folder):
        partial.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.rename(folder)


def folder_of(home: Path, method: str, fraction: float) -> Path:
    return home / f"{method} {100 * fraction:g}%"


def kept_in(partial: Path) -> list[str]:
    return ["--run_dir", str(partial), "--resume", "auto"]


def scored_points(cohort, split: dict) -> np.ndarray:
    """The labelled points of the validation and the test part."""
    return labelled_points(cohort, stays_of(cohort, [*split["valid"], *split["test"]]))


def save_predictions(folder: Path, cohort, split: dict, points, probability) -> None:
    stay = cohort.stay_id[cohort.point_stay[points]]
    table = pd.DataFrame({"stay_id": stay, "minute": cohort.point_minute[points], "label": cohort.label[points],
                          "probability": probability,
                          "split": np.where(np.isin(stay, split["valid"]), "valid", "test")})
    write_atomically(folder / "predictions.csv", lambda out: table.to_csv(out, index=False))


def predict_baselines(checkpoint: Path, home: Path, seed: int, fraction: float, given: dict) -> None:
    """Every one of BASELINES that can be had."""
    if folder_of(home, BASELINES[-1], fraction).exists():
        return
    opened, cohort = open_checkpoint(checkpoint, given)
    dataset, split = opened.dataset(cohort), opened.split
    train, points = label_subset(cohort, labelled(cohort, split["train"]), fraction, seed), scored_points(cohort, split)
    valid = labelled_points(cohort, stays_of(cohort, split["valid"]))
    for method, probability in without_backbone(dataset, train, valid, points, seed).items():
        with finished(folder_of(home, method, fraction)) as partial:
            if partial:
                save_predictions(partial, cohort, split, points, probability)


def averaged(turns: dict[str, list[pd.DataFrame]]) -> dict[str, tuple[pd.DataFrame, np.ndarray]]:
    """Of every split, whose methods' predictions of the same points are given: the mean of their logits, and the shares
    in it, which are best on the validation parts of all splits, but for the stays that this split tests. (The few
    hundred validation stays of one split choose by luck.)"""
    logits = {turn: np.stack([logit(table["probability"].to_numpy(), least=1e-7) for table in tables])
              for turn, tables in turns.items()}
    every = np.concatenate([*logits.values()], axis=1)                                             # [methods, points]
    points = pd.concat([table for table, *_ in turns.values()], ignore_index=True)
    told = {}
    for turn, (table, *_) in turns.items():
        tested = table.loc[table["split"] == "test", "stay_id"]
        used = (points["split"].eq("valid") & ~points["stay_id"].isin(tested)).to_numpy()
        best = best_shares(every[:, used], points["label"].to_numpy()[used])
        told[turn] = table.assign(probability=1 / (1 + np.exp(-best @ logits[turn]))), best
    return told


class Scores(NamedTuple):
    """How a method did on a split."""

    value: np.ndarray  # [m] AUROC, AUPRC and, where the labels are those of the challenge 2019, utility
    draws: np.ndarray  # [repeats, m] of resampled test stays: the same ones for every method; utility NaN: no sepsis


def parts(table: pd.DataFrame) -> list:
    """Stay (an integer), minute, label and probability [n] of the points of the validation and of the test part."""
    table = table.assign(stay_id=np.unique(table["stay_id"], return_inverse=True)[1])
    return [[table.loc[table["split"] == part, name].to_numpy()
             for name in ("stay_id", "minute", "label", "probability")] for part in ("valid", "test")]


def scores(table: pd.DataFrame, hourly: bool, repeats: int = 200) -> Scores:
    """Of the predictions of a method on a split; hourly: with the utility of alarms at the threshold that the
    validation part chose."""
    valid, (stay, minute, label, probability) = parts(table)
    value = [roc_auc_score(label, probability), average_precision_score(label, probability)]
    draws = bootstrap(stay, label, probability, repeats=repeats)[:, 0]
    if hourly:
        since = hours_since_onset(*valid[:3])
        threshold, _ = best_utility_threshold(valid[0], since, valid[3])
        utility = stay_utilities(stay, hours_since_onset(stay, minute, label), probability >= threshold)
        value.append(normalised_utility(utility.sum(0)))
        draws = np.column_stack([draws, utility_draws(utility, repeats)])
    return Scores(np.array(value), draws)


def print_protocol(folder: Path) -> None:
    """The tables of RESULTS.md from what is finished: mean and standard deviation over the splits; the difference to
    the best baseline (by mean AUROC) with a bootstrap interval, paired by stay and drawn within each split."""
    found = {}
    for path in sorted(folder.glob("*/*%/predictions.csv")):
        method, fraction = path.parent.name.rsplit(" ", 1)
        table = pd.read_csv(path, dtype={"stay_id": str}, keep_default_na=False)
        table = table.sort_values(["stay_id", "minute"], kind="stable")
        found.setdefault(fraction, {}).setdefault(method, {})[path.parent.parent.name] = table
    for fraction, tables in sorted(found.items(), key=lambda item: -float(item[0].rstrip("%"))):
        turns = sorted({turn for by_turn in tables.values() for turn in by_turn})
        members = [method for method in AVERAGED if sorted(tables.get(method, [])) == turns]
        if len(members) > 1:
            told = averaged({turn: [tables[method][turn] for method in members] for turn in turns})
            tables[AVERAGE] = {turn: table for turn, (table, _) in told.items()}
            mean = np.mean([weights for _, weights in told.values()], axis=0)
            print(f"\n{AVERAGE}, in the mean: " + ", ".join(f"{w:.2f} {name}" for w, name in zip(mean, members)))
        hourly = all(of_challenge_2019(*part[:3])
                     for turns in tables.values() for table in turns.values() for part in parts(table))
        rows = {method: {turn: scores(table, hourly) for turn, table in turns.items()}
                for method, turns in tables.items()}
        mean = {method: np.mean([s.value for s in turns.values()], axis=0) for method, turns in rows.items()}
        base = max((m for m in rows if m in BASELINES), key=lambda m: mean[m][0], default=None)
        names = ("AUROC", "AUPRC", "utility")[:len(next(iter(mean.values())))]
        print(f"\n{fraction} of the training labels\n\n| method | splits | {' | '.join(names)} "
              f"| difference to {base}: {' | '.join(names)} |\n|---|---|{'---|' * 2 * len(names)}")
        for method, turns in sorted(rows.items(), key=lambda row: -mean[row[0]][0]):
            values = np.array([s.value for s in turns.values()])
            spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(names))
            cells = [f"{m:.3f} ± {d:.3f}" for m, d in zip(mean[method], spread)]
            shared = [turn for turn in turns if turn in rows.get(base, {})]
            if method == base or not shared:
                cells += [""] * len(names)
            else:
                difference = np.mean([turns[t].value - rows[base][t].value for t in shared], axis=0)
                draws = np.mean([turns[t].draws - rows[base][t].draws for t in shared], axis=0)
                draws = draws[np.isfinite(draws).all(1)]
                cells += [f"{d:+.3f} {interval(draws[:, i])}" for i, d in enumerate(difference)]
            print(f"| {method} | {len(values)} | {' | '.join(cells)} |")
