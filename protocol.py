"""Against what the model is measured: hand-made baselines, an untrained backbone, and the protocol that runs every
method on several splits with one command (`test_suite.py --protocol`)."""

import contextlib
import io
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

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

from data import (InputError, common_variables, labelled_points, search_after, stay_event_index, stays_of,
                  write_atomically)
from evaluate import CPU, bootstrap, interval, open_classifier
from finetune_config import MANY_POINTS, FinetuneConfig, number_of_trees
from model import HISTORY_STATISTICS, ModelConfig, SeqSetVAE, summaries
from runs import choose_device
from train import (HeadTraining, data_options, finetune, label_subset, labelled, open_checkpoint, parse_arguments,
                   pretrain, probability_at, training_points)

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
    low, high = np.nanquantile(x, [.005, .995], axis=0)
    linear = make_pipeline(FunctionTransformer(lambda t: t.clip(low, high)),
                           SimpleImputer(strategy="median", add_indicator=True),
                           StandardScaler(),
                           GridSearchCV(LogisticRegression(max_iter=500), {"C": [.0003, .001, .003, .01, .03, .1]},
                                        scoring="neg_log_loss", cv=5))
    boosting = GridSearchCV(HistGradientBoostingClassifier(learning_rate=.05, random_state=0),
                            {"max_iter": [100, 200], "max_leaf_nodes": [6, 15], "l2_regularization": [10.]},
                            scoring="neg_log_loss", cv=5)
    return {BASELINES[0]: linear.fit(x, y).predict_proba(x_test)[:, 1],
            BASELINES[1]: boosting.fit(x, y).predict_proba(x_test)[:, 1]}


class SummariesAlone(SeqSetVAE):
    """The classifier's head on the exact summaries of the stay and nothing else: its backbone is never run."""

    def _feature_sizes(self) -> dict[str, int]:
        return {"plain": 0, "standardised": (len(HISTORY_STATISTICS) + 1) * self.config.head_variables + 1}

    def features(self, batch) -> torch.Tensor:
        return torch.cat(summaries(self.exact_statistics(batch), batch.point_hours), dim=-1)


def summaries_alone(dataset, variables, train, test, seed: int, device=CPU, config=FinetuneConfig()) -> np.ndarray:
    """Probabilities at the test points by the default head (linear and trees) on exact summaries of these variables
    (indices in the dataset's vocabulary), trained like that of a frozen backbone on the training stays."""
    points, _ = training_points(dataset.cohort, train, config, seed, 0)
    shape = ModelConfig(len(dataset.normalizer.variables), summaries=True, head_variables=len(variables),
                        head_widths=config.head_widths, head_trees=number_of_trees(config, len(points)),
                        tree_depth=config.tree_depth)
    torch.manual_seed(seed)
    model = SummariesAlone(shape, torch.zeros(shape.num_variables, shape.input_dim))
    model.head_variables.copy_(torch.from_numpy(variables))
    run = SimpleNamespace(model=model.to(device), dataset=dataset, last=None)
    head = HeadTraining(run, train, config, seed, device)
    for epoch in range(config.max_epochs):
        head.epoch(epoch)
    return probability_at(model, dataset, test, device)


def without_backbone(dataset, train, test, seed: int, device=CPU, config=FinetuneConfig()) -> dict[str, np.ndarray]:
    """Probabilities at the test points by every one of BASELINES that can be had, learned from the training stays."""
    cohort = dataset.cohort
    variables = common_variables(cohort, dataset, train, config.most_variables)
    points, weight = training_points(cohort, train, config, seed, 0)
    own = np.flatnonzero(np.isin(dataset.variable, variables))
    return (hand_made_baselines(cohort, own, points, weight, test)
            | {BASELINES[2]: summaries_alone(dataset, variables, train, test, seed, device, config)})


def baselines(arguments, content, cohort, dataset, points, new) -> dict[str, np.ndarray]:
    """Probabilities at the scored points by BASELINES and by an untrained backbone of the checkpoint's config under the
    same head, all trained on the checkpoint's training stays."""
    if new or "format" not in content:
        raise InputError(f"{arguments.checkpoint}: --baselines are fitted on the data that train.py made the "
                         f"checkpoint with; leave {'--data_dir' if new else '--baselines'} out")
    train, device = labelled(cohort, content["split"]["train"]), choose_device(arguments.device, "fp32")[0]
    methods = without_backbone(dataset, train, points, content["source"]["seed"], device)
    with tempfile.TemporaryDirectory() as folder:
        pretrained = Path(folder) / "untrained.pt"
        torch.save(content | {"mode": "pretrain"}, pretrained)
        given = [f"--{name}={value}" for name, value in data_options(arguments).items()]
        command = ["--mode", "finetune", "--pretrained_ckpt", str(pretrained), "--random_init",
                   "--run_dir", f"{folder}/run", "--device", arguments.device, *given]
        with contextlib.redirect_stdout(io.StringIO()):  # its log would stand in the middle of the report
            path = finetune(parse_arguments(command))
        model = open_classifier(path, data_options(arguments))[0]
        return methods | {"untrained backbone, same head": probability_at(model.to(device), dataset, points, device)}


# ----------------------------------------------------------------------------------------------------------------------
# The protocol: five splits, every method, one command
# ----------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cell:
    """One finetuning of the protocol."""

    pretrained: bool = True
    full: bool = False
    fuse: bool = True
    summaries: bool = False
    labels: float = 1.0

    @property
    def name(self) -> str:
        backbone = f"{'full' if self.full else 'frozen'} {'pretrained' if self.pretrained else 'random'}"
        return f"{backbone}, {'mu + logvar' if self.fuse else 'mu'}{', + summaries' if self.summaries else ''}"


FRACTIONS = (1.0, 0.3, 0.1)
# In order of importance: a protocol that is stopped early has the first ones of every split.
CELLS = [
    [Cell(), Cell(summaries=True), Cell(pretrained=False)],
    [Cell(full=True, summaries=True)],
    [Cell(full=full, summaries=True, labels=f) for full in (False, True) for f in FRACTIONS[1:]]
    + [Cell(labels=f) for f in FRACTIONS[1:]], [Cell(fuse=False), Cell(pretrained=False, fuse=False)],
    [Cell(full=True, pretrained=pretrained, fuse=fuse) for fuse in (True, False) for pretrained in (True, False)],
]


def protocol(given: dict, seeds, folder: Path) -> None:
    """Pretrain on the training part of each split without labels, finetune every cell, fit the baselines, score the
    test part once. What is finished lies in `folder` (a CSV of test predictions a cell and split) and is kept: stop and
    go on at will. given: the data's options, see `data_options`."""
    for stage, cells in enumerate(CELLS):
        for seed in seeds:
            home = folder / f"seed{seed}"
            common = [f"--seed={seed}", *(f"--{name}={value}" for name, value in given.items())]
            checkpoint = home / "pretrain" / "best.pt"
            if not checkpoint.exists():
                partial = home / "pretrain.partial"
                command = ["--mode", "pretrain", *common, "--run_dir", str(partial), "--resume", "auto"]
                pretrain(parse_arguments(command))
                partial.rename(checkpoint.parent)
            for cell in cells:
                predict_cell(cell, checkpoint, home, common, given)
            if stage == 0:
                predict_baselines(checkpoint, home, seed, given)
    print_protocol(folder)


def predictions_path(home: Path, method: str, fraction: float) -> Path:
    return home / f"{method} {fraction:.0%}.csv"


def save_predictions(path: Path, cohort, points, probability) -> None:
    table = pd.DataFrame({"stay_id": cohort.stay_id[cohort.point_stay[points]], "minute": cohort.point_minute[points],
                          "label": cohort.label[points], "probability": probability})
    write_atomically(path, lambda out: table.to_csv(out, index=False))


def predict_cell(cell: Cell, checkpoint: Path, home: Path, common: list, given: dict) -> None:
    path, run = predictions_path(home, cell.name, cell.labels), home / "run"
    if path.exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    options = ["--mode", "finetune", "--pretrained_ckpt", str(checkpoint), "--run_dir", str(run), "--label_fraction",
               str(cell.labels), *common]
    options += ["--full_training"] * cell.full + ["--random_init"] * (not cell.pretrained)
    best = finetune(parse_arguments(options), replace(FinetuneConfig(), fuse=cell.fuse, summaries=cell.summaries))
    model, content, cohort, dataset, _ = open_classifier(best, given)
    points = labelled_points(cohort, stays_of(cohort, content["split"]["test"]))
    save_predictions(path, cohort, points, probability_at(model, dataset, points, CPU))


def predict_baselines(checkpoint: Path, home: Path, seed: int, given: dict) -> None:
    _, cohort, dataset, split, _ = open_checkpoint(checkpoint, given)
    train, test = labelled(cohort, split["train"]), labelled_points(cohort, stays_of(cohort, split["test"]))
    for fraction in FRACTIONS:
        if all(predictions_path(home, method, fraction).exists() for method in BASELINES):
            continue
        part = label_subset(cohort, train, fraction, seed)
        for method, probability in without_backbone(dataset, part, test, seed).items():
            save_predictions(predictions_path(home, method, fraction), cohort, test, probability)


def print_protocol(folder: Path) -> None:
    """The tables of README.md from the finished cells: mean and standard deviation over the splits; the difference to
    the better baseline (by mean AUROC) with a bootstrap interval, paired by stay and drawn within each split."""
    found = {}
    for path in sorted(folder.glob("seed*/*%.csv")):
        method, fraction = path.stem.rsplit(" ", 1)
        found.setdefault((method, fraction), {})[path.parent.name] = pd.read_csv(path)

    def scores(tables):
        return np.array([(roc_auc_score(t["label"], t["probability"]),
                          average_precision_score(t["label"], t["probability"])) for t in tables])

    for fraction in (f"{f:.0%}" for f in FRACTIONS):
        rows = {method: tables for (method, f), tables in found.items() if f == fraction}
        base = max((m for m in rows if m in BASELINES), key=lambda m: scores(rows[m].values())[:, 0].mean(),
                   default=None)
        print(f"\n{fraction} of the training labels\n\n| method | splits | AUROC | AUPRC "
              f"| difference to {base}: AUROC | AUPRC |\n|---|---|---|---|---|---|")
        for method, tables in sorted(rows.items(), key=lambda row: -scores(row[1].values())[:, 0].mean()):
            s = scores(tables.values())
            spread = s.std(0, ddof=1) if len(s) > 1 else np.zeros(2)
            cells = [f"{m:.3f} ± {d:.3f}" for m, d in zip(s.mean(0), spread)]
            if base and method != base:
                shared = [seed for seed in tables if seed in rows[base]]
                draws = np.mean([np.diff(bootstrap(tables[seed]["stay_id"].to_numpy(), tables[seed]["label"].to_numpy(),
                                                   rows[base][seed]["probability"].to_numpy(),
                                                   tables[seed]["probability"].to_numpy(), repeats=200, seed=i),
                                         axis=1)[:, 0]
                                 for i, seed in enumerate(shared)], axis=0)
                mean = (scores(tables[seed] for seed in shared) - scores(rows[base][seed] for seed in shared)).mean(0)
                cells += [f"{m:+.3f} {interval(draws[:, i])}" for i, m in enumerate(mean)]
            else:
                cells += ["", ""]
            print(f"| {method} | {len(s)} | {' | '.join(cells)} |")
