"""Against what the model is measured: hand-made baselines, an untrained backbone, and the protocol that runs every
method on several splits with one command (`test_suite.py --protocol`)."""

import contextlib
import io
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

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

from data import InputError, labelled_points, ranges, search_after, stays_of, write_atomically
from evaluate import CPU, bootstrap, interval, open_classifier
from finetune_config import FinetuneConfig
from train import (
    choose_device,
    data_options,
    finetune,
    label_subset,
    labelled,
    open_checkpoint,
    parse_arguments,
    pretrain,
    probability_at,
)

# ----------------------------------------------------------------------------------------------------------------------
# Hand-made baselines
# ----------------------------------------------------------------------------------------------------------------------

BASELINES = ("logistic regression on summaries", "gradient boosting on summaries")


def summary_table(cohort, points) -> pd.DataFrame:
    """Hand-made features of the stay up to each prediction point: first, last, min, max, mean, sd, count and slope
    (a day) of every variable, descriptors included; raw units, NaN where a variable was not measured."""
    stays = cohort.point_stay[points]
    first, end = cohort.stay_start[stays], cohort.stay_start[stays + 1]
    end = search_after(cohort.set_minute, cohort.point_minute[points], first, end)
    number = cohort.set_start[end] - cohort.set_start[first]
    events = ranges(cohort.set_start[first], number)
    table = pd.DataFrame({"stay": np.repeat(np.arange(len(points)), number),
                          "variable": cohort.event_variable[events],
                          "value": cohort.event_value[events].astype(np.float64)})
    sets = np.searchsorted(cohort.set_start, events, side="right") - 1
    table["day"] = cohort.set_minute[sets] / 1440
    table["square"], table["product"] = table["day"] ** 2, table["day"] * table["value"]
    groups = table.groupby(["stay", "variable"])
    summary = groups["value"].agg(["first", "last", "min", "max", "mean", "std", "count"])
    day, square, product = (groups[name].mean() for name in ("day", "square", "product"))
    spread = square - day ** 2
    summary["slope"] = ((product - day * summary["mean"]) / spread.where(spread > 1e-9)).fillna(0)
    wide = summary.unstack("variable").reindex(range(len(points)))
    wide["count"] = wide["count"].fillna(0)
    wide.columns = [f"{cohort.variables[v]} {name}" for name, v in wide.columns]
    return wide


def hand_made_baselines(cohort, train, test) -> dict[str, np.ndarray]:
    """Probabilities at the test points by logistic regression (penalty chosen by cross-validation inside the training
    stays) and by HistGradientBoosting (scikit-learn's defaults, and shallow trees chosen likewise) on
    `summary_table`."""
    both = summary_table(cohort, np.concatenate([train, test]))
    both = both.loc[:, both.iloc[:len(train)].nunique() > 1]  # what is constant in training says nothing
    x, x_test, y = both.iloc[:len(train)], both.iloc[len(train):], cohort.label[train].astype(int)
    low, high = x.quantile(.005), x.quantile(.995)
    linear = make_pipeline(FunctionTransformer(lambda t: t.clip(low, high, axis=1)),
                           SimpleImputer(strategy="median", add_indicator=True),
                           StandardScaler(),
                           GridSearchCV(LogisticRegression(max_iter=500), {"C": [.0003, .001, .003, .01, .03, .1]},
                                        scoring="neg_log_loss", cv=5))
    boosting = GridSearchCV(HistGradientBoostingClassifier(learning_rate=.05, random_state=0),
                            {"max_iter": [100, 200], "max_leaf_nodes": [6, 15], "l2_regularization": [10.]},
                            scoring="neg_log_loss", cv=5)
    return {BASELINES[0]: linear.fit(x, y).predict_proba(x_test)[:, 1],
            BASELINES[1]: boosting.fit(x.to_numpy(), y).predict_proba(x_test.to_numpy())[:, 1]}


def baselines(arguments, content, cohort, dataset, points, new) -> dict[str, np.ndarray]:
    """Probabilities at the scored points by the hand-made baselines and by an untrained backbone of the checkpoint's
    config under the same head, all trained on the checkpoint's training stays."""
    if new or "format" not in content:
        raise InputError(f"{arguments.checkpoint}: --baselines are fitted on the data that train.py made the "
                         f"checkpoint with; leave {'--data_dir' if new else '--baselines'} out")
    methods = hand_made_baselines(cohort, labelled_points(cohort, stays_of(cohort, content["split"]["train"])), points)
    with tempfile.TemporaryDirectory() as folder:
        pretrained = Path(folder) / "untrained.pt"
        torch.save(content | {"mode": "pretrain"}, pretrained)
        given = [f"--{name}={value}" for name, value in data_options(arguments).items()]
        command = ["--mode", "finetune", "--pretrained_ckpt", str(pretrained), "--random_init",
                   "--run_dir", f"{folder}/run", "--device", arguments.device, *given]
        with contextlib.redirect_stdout(io.StringIO()):  # its log would stand in the middle of the report
            path = finetune(parse_arguments(command))
        model, device = open_classifier(path, data_options(arguments))[0], choose_device(arguments.device, "fp32")[0]
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
                resume = ["--resume", str(partial)] if (partial / "last.pt").exists() else ["--run_dir", str(partial)]
                if resume[0] == "--run_dir":
                    shutil.rmtree(partial, ignore_errors=True)
                pretrain(parse_arguments(["--mode", "pretrain", *common, *resume]))
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
    content, cohort, _, split, _ = open_checkpoint(checkpoint, given)
    train, test = labelled(cohort, split["train"]), labelled_points(cohort, stays_of(cohort, split["test"]))
    for fraction in FRACTIONS:
        if all(predictions_path(home, method, fraction).exists() for method in BASELINES):
            continue
        part = label_subset(cohort, train, fraction, seed)
        for method, probability in hand_made_baselines(cohort, labelled_points(cohort, part), test).items():
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
