"""What a finetuned checkpoint is worth: its scores, predictions, features, the risk over one stay, and pictures.

`predict` gives the probabilities of a table of events, from Python; `performance` is what `test_suite.py --checkpoint`
runs; `open_classifier` opens a checkpoint beside its data.
"""

import csv
import difflib
import io
import itertools
import json
import re
import secrets
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)
from sklearn.preprocessing import StandardScaler

import sepsis2019
from data import (HASHED, InputError, Normalizer, StayDataset, build_cohort, labelled_points, make_splits, point_slots,
                  salted, stay_event_index, stays_of, stays_with, variable_vectors, with_points, write_atomically)
from model import SeqSetVAE, at_slots, checkpoint_config, load_weights, original_classifier, read_checkpoint, real_sets
from readers import load_cohort, read_map
from runs import choose_device, evaluation_loader, label_digest, printable
from tables import BEYOND, MISSING, TRUTH
from train import (data_of, data_options, dataset_of, encode_points, known_part, open_checkpoint, probability_at,
                   ranking)

CPU = torch.device("cpu")


def predict(checkpoint, events: pd.DataFrame, device: str = "auto") -> pd.DataFrame:
    """The probability of every stay of a table of events, as `--predictions` gives it for the same table.

    checkpoint: path of a finetuned checkpoint of train.py. events: a row an event, with the columns stay_id, minute,
    variable and value of the long table (see README.md). Returns the columns stay_id (text) and probability, a row a
    stay in the order of the ids; NaN where the checkpoint knows nothing of a stay's events. Raises InputError as
    train.py.
    """
    content = read_checkpoint(checkpoint)
    model, device = classifier_of(checkpoint, content), choose_device(device, "fp32")[0]
    with tempfile.TemporaryDirectory() as folder:
        events.to_csv(Path(folder) / "events.csv", index=False)
        cohort = load_cohort(**data_of(content, {"data_dir": folder}), cache_dir=Path(folder) / "cache")
        dataset = dataset_of(checkpoint, content, cohort)
        points, probability = answered_points(dataset), np.full(len(cohort), np.nan)
        probability[cohort.point_stay[points]] = probability_at(model.to(device), dataset, points, device)
        return pd.DataFrame({"stay_id": cohort.stay_id, "probability": probability})


# ----------------------------------------------------------------------------------------------------------------------
# Performance analysis of a checkpoint
# ----------------------------------------------------------------------------------------------------------------------

def open_classifier(path, given: dict = {}, set_heads=None, transformer_heads=None):
    """A finetuned checkpoint ready to score: (model, content, cohort, dataset, new); see `train.open_checkpoint`."""
    content, cohort, dataset, split, new = open_checkpoint(path, given)
    if "format" not in content:
        return open_original(path, content, split, cohort, set_heads, transformer_heads)
    return classifier_of(path, content), content, cohort, dataset, new


def classifier_of(path, content: dict) -> SeqSetVAE:
    """The model of a finetuned checkpoint with this content, in evaluation mode."""
    if content.get("mode") != "finetune":
        raise InputError(f"{path}: not a finetuned checkpoint; make one with: "
                         f"python train.py --mode finetune --pretrained_ckpt {path}")
    variables = len(content["normalizer"]["variables"])
    model = SeqSetVAE(checkpoint_config(content, variables, path), content["vocabulary"])
    load_weights(model, content["model"], path)
    return model.eval()


def open_original(path, content, split, cohort, set_heads, transformer_heads):
    """The same of a checkpoint that the original implementation finetuned. It holds weights alone: the variables'
    vectors, their statistics and the split (empty: to be drawn) are the data's, and no threshold was chosen."""
    config = checkpoint_config(content, len(cohort.variables), path, set_heads, transformer_heads)
    for what, given, mend in (("vectors", cohort.vectors, "put its cached.csv beside patient_ehr"),
                              ("statistics", cohort.statistics, "give its --params_map")):
        if np.isnan(given).all():
            raise InputError(f"{path}: an original checkpoint, made with {what} of the variables "
                             f"that it does not hold; {mend}")
    model = original_classifier(content, config, variable_vectors(cohort.variables, config.input_dim, cohort.vectors),
                                path)
    split = split or make_splits(cohort, 0)
    dataset = StayDataset(cohort, Normalizer.fit(cohort, stays_of(cohort, split["train"])), points=True)
    source = {"command": "the original implementation", "fingerprint": cohort.fingerprint,
              "versions": {"pytorch-lightning": str(content.get("pytorch-lightning_version", "unknown"))}}
    metrics = {"epoch": content.get("epoch"), "threshold": 0.5}
    return model, content | {"source": source, "split": split, "metrics": metrics}, cohort, dataset, False


def scored_stays(content, cohort, new, split_file=None) -> tuple[np.ndarray, str]:
    """The stays that may be scored, and what they are: those that --split tests, or else the recorded split; of other
    data all. Subjects that were trained or selected on are left out."""
    if split_file:
        stays, what = stays_of(cohort, make_splits(cohort, 0)["test"]), f"the test part of {split_file}"
    elif new:
        stays, what = np.arange(len(cohort)), "all labelled stays of other data than the checkpoint's"
    else:
        recorded_by = "checkpoint" if "format" in content else "data"
        stays = stays_of(cohort, content["split"]["test"])
        what = f"the test split that the {recorded_by} recorded"
    seen = np.isin(known_part(content, content["split"], cohort, new)[stays], (0, 1))
    if seen.any():
        what += f"; {seen.sum():,} stays left out of subjects that the checkpoint was trained or selected on"
    return stays[~seen], what


def ranks(label, p, weight) -> tuple[float, float]:
    """AUROC and AUPRC as scikit-learn has them, of weighted points [n] in the order of falling p: without its sorting
    and checking, which would be nearly all of a bootstrap's time."""
    last = np.append(np.flatnonzero(np.diff(p)), len(p) - 1)                        # of each distinct p
    tp, alarms = np.cumsum(weight * label)[last], np.cumsum(weight)[last]
    fp, gained = alarms - tp, np.diff(tp, prepend=0)
    auroc = (np.diff(fp, prepend=0) * (tp - gained / 2)).sum() / (tp[-1] * fp[-1])
    return auroc, (gained * tp / np.maximum(alarms, 1e-300)).sum() / tp[-1]


def bootstrap(group, label, *probabilities, measures=(ranks,), repeats: int = 1000, seed: int = 0) -> np.ndarray:
    """[repeats, n, m] the m numbers that `measures` give of n methods on the same resampled groups, such as stays, of
    points (Efron & Tibshirani 1993): paired between methods. group, label [points]; each measure is a function of
    label, probability and weight [points], in the order of falling probability, and gives several numbers."""
    rng = np.random.default_rng(seed)
    group = np.unique(group, return_inverse=True)[1]
    orders = [np.argsort(-p, kind="stable") for p in probabilities]
    methods = [(label[order], p[order], group[order]) for order, p in zip(orders, probabilities)]
    groups, draws = group.max() + 1, []
    while len(draws) < repeats:
        weight = np.bincount(rng.integers(0, groups, groups), minlength=groups)
        if len(np.unique(label[weight[group] > 0])) == 2:
            draws.append([[number for measure in measures for number in measure(y, p, weight[of])]
                          for y, p, of in methods])
    return np.array(draws)


def logit(p, least: float = 1e-12) -> np.ndarray:
    """Log odds of probabilities, which are kept so far from 0 and 1."""
    p = np.clip(p, least, 1 - least)
    return np.log(p / (1 - p))


def recalibration(label, p, weight) -> tuple[float, float]:
    """Slope and intercept of logit P(label) = intercept + slope logit(p) (Cox 1958), by Newton's method: 1 and 0 where
    p is calibrated, NaN where they are not determined (p constant, or parting the classes). All [n]."""
    rate = weight @ label / weight.sum()
    x, slope, intercept = logit(p), 0.0, np.log(rate / (1 - rate))
    for _ in range(25):
        q = (1 + np.tanh((slope * x + intercept) / 2)) / 2
        error, spread = weight * (label - q), weight * q * (1 - q)
        gx, g1, hxx, hx1, h11 = error @ x, error.sum(), (spread * x) @ x, spread @ x, spread.sum()
        determinant = hxx * h11 - hx1 ** 2
        if not determinant > 1e-12 * hxx * h11:
            break
        step = (h11 * gx - hx1 * g1) / determinant, (hxx * g1 - hx1 * gx) / determinant
        slope, intercept = slope + step[0], intercept + step[1]
        if max(map(abs, step)) < 1e-6:
            return slope, intercept
    return np.nan, np.nan


def threshold_of(label, probability, sensitivity: float) -> float:
    """The highest probability from which on an alarm finds this share of the positives."""
    positives = np.sort(probability[label == 1])[::-1]
    return float(positives[int(np.ceil(sensitivity * len(positives) - 1e-9)) - 1])


def alarm_from(threshold: float):
    """The measure of an alarm from this probability on: sensitivity, positive predictive value (NaN: no alarm), alarms
    per 100 points."""
    def alarm(label, p, weight):
        raised = p >= threshold
        alarms, true = weight @ raised, weight @ (raised * label)
        return true / (weight @ label), true / alarms if alarms else np.nan, 100 * alarms / weight.sum()
    return alarm


THRESHOLDS = np.arange(1, 200) / 200


def net_benefit(label, probability) -> dict:
    """At each of THRESHOLDS t the share of true alarms less t / (1 - t) times that of false ones (Vickers & Elkin
    2006), of alarms from probability t on and of alarms for all; of no alarm it is 0."""
    true, false = (len(p) - np.searchsorted(np.sort(p), THRESHOLDS)
                   for p in (probability[label == 1], probability[label == 0]))
    odds, prevalence = THRESHOLDS / (1 - THRESHOLDS), label.mean()
    return {"threshold": THRESHOLDS.tolist(), "net_benefit": ((true - odds * false) / len(label)).tolist(),
            "alarm_for_all": (prevalence - odds * (1 - prevalence)).tolist()}


def subgroups(cohort, points, name: str) -> dict[str, np.ndarray]:
    """The groups of the stays of these points [m], ascending, by the first value of a variable in each, or (`events`)
    by how many events it had by its last point: {value: mask [m]}. More than six numbers are put into quartiles;
    variables without numbers such as ICUType=2 or GENDER//F are the categories of one."""
    stay_of_point = cohort.point_stay[points]
    stays = np.unique(stay_of_point)                                                                   # [n]
    kinds = {text: text[len(name) + len(mark):] for text in cohort.variables for mark in ("=", "//")
             if text.startswith(name + mark)}
    group = np.full(len(stays), "not recorded", dtype=object)
    if name in cohort.variables or kinds:
        asked = np.isin(cohort.variables, [name, *kinds])                                              # [V]
        events = stay_event_index(cohort, stays)
        place = np.repeat(np.arange(len(stays)), cohort.stay_events[stays])
        variable, value = cohort.event_variable[events], cohort.event_value[events]
        told = asked[variable] & (np.isin(cohort.variables, list(kinds))[variable] | ~np.isnan(value))
        place, first = np.unique(place[told], return_index=True)
        variable, value = variable[told][first], value[told][first]
        numbers = np.array([cohort.variables[v] == name for v in variable], dtype=bool)
        group[place[~numbers]] = [kinds[cohort.variables[v]] for v in variable[~numbers]]
        place, value = place[numbers], value[numbers]
    elif name == "events":
        index, slot = point_slots(cohort, stays)
        last = points[np.searchsorted(stay_of_point, stays, side="right") - 1]                         # of each stay
        first, end = cohort.stay_start[stays], slot[np.searchsorted(index, last)] + 1
        place, value = np.arange(len(stays)), cohort.set_start[first + end] - cohort.set_start[first]
    else:
        known = {re.split("=|//", text)[0] for text in cohort.variables} | {"events"}
        near = difflib.get_close_matches(name, known, n=4, cutoff=.4)
        raise InputError(f"--subgroups {name}: no variable of the data{'; near: ' * bool(near)}{', '.join(near)}; give "
                         "the names of variables, separated by commas, or events")
    order = list(dict.fromkeys(sorted(group[group != "not recorded"])))
    if len(distinct := np.unique(value)) > 6:
        edges = np.unique(np.quantile(value, (.25, .5, .75)))
        part = np.searchsorted(edges, value, side="right")
        names = {i: f"{value[part == i].min():g} to {value[part == i].max():g}" for i in np.unique(part)}
    else:
        part, names = np.searchsorted(distinct, value), {i: f"{x:g}" for i, x in enumerate(distinct)}
    group[place] = [names[i] for i in part]
    group = group[np.searchsorted(stays, stay_of_point)]                                               # [m]
    return {key: group == key for key in (*names.values(), *order, "not recorded") if (group == key).any()}


RESAMPLED_LESS = 20_000  # points, of which a bootstrap draws 200 samples, not 1,000
FEW = 10              # stays with a positive label, or with a negative one, below which an interval means nothing


def few(stays, label) -> str:
    """What to say where there is too little to give an interval; else nothing. stays, label [points]."""
    positive, negative = (len(np.unique(stays[label == value])) for value in (1, 0))
    return (f"stays with a positive label: {positive}, with a negative one: {negative}; below {FEW} of each no "
            "interval is given, and the figures may be chance" if min(positive, negative) < FEW else "")


def with_intervals(stays, label, probability, measures: dict) -> dict:
    """{name: {"value": .., "interval": 95% by resampling stays, None where they are few}} of these measures, functions
    as `bootstrap` takes them with the names of the numbers that each gives."""
    order = np.argsort(-probability, kind="stable")
    ordered = label[order], probability[order], np.ones(len(order))
    values = [number for measure in measures for number in measure(*ordered)]
    intervals = [None] * len(values)
    if not few(stays, label):
        draws = bootstrap(stays, label, probability, measures=measures,
                          repeats=200 if len(label) > RESAMPLED_LESS else 1000)[:, 0]
        determined = [column[np.isfinite(column)] for column in draws.T]
        intervals = [np.percentile(column, [2.5, 97.5]).tolist() if len(column) > len(draws) / 2 else None
                     for column in determined]
    names = [name for names in measures.values() for name in names]
    return {name: {"value": float(value) if np.isfinite(value) else None, "interval": interval}
            for name, value, interval in zip(names, values, intervals)}


RANKS = {ranks: ("auroc", "auprc")}


def interval(draws: np.ndarray) -> str:
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"[{low:.3f}, {high:.3f}]"


def calibration_error(label, probability, bins: int = 10) -> float:
    """Expected calibration error over bins of equal width (Guo et al. 2017, eq. 3)."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    gap = np.abs(np.bincount(which, label, bins) - np.bincount(which, probability, bins))
    return float(gap[count > 0].sum() / len(label))


def performance(arguments, baselines=None) -> None:
    """Print the analysis of a finetuned checkpoint on the stays it may be scored on (see `scored_stays`), and write
    what is asked for; of several the mean of their logits is scored, on stays that all may be scored on."""
    (path, *others), device = arguments.checkpoint, choose_device(arguments.device, "fp32")[0]
    folder = arguments.plots and picture_folder(arguments.plots)
    opened = [open_classifier(path, data_options(arguments), arguments.set_heads, arguments.transformer_heads)
              for path in arguments.checkpoint]
    model, content, cohort, dataset, new = opened[0]
    refuse_together(arguments, opened)
    model.to(device)
    source = content["source"]
    figures = {"checkpoint": ", ".join(map(str, arguments.checkpoint)), "epoch": content["metrics"]["epoch"],
               "command": source["command"], "seed": source.get("seed"),
               "data": source["fingerprint"], "versions": source["versions"], "reader": cohort.reader, "scored": None}
    print(cohort.describe())
    print(dataset.describe_known())
    print("checkpoint: {checkpoint}, epoch {epoch}, made by: {command}".format(**figures))
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    print(f"checkpoint: seed {source.get('seed', 'unknown')}, data {source['fingerprint']}, {versions}")
    stay = find_stay(dataset, arguments.trajectory)
    unseen, what = scored_stays(content, cohort, new, arguments.split_file)
    answered = answered_points(dataset)
    for _, other, _, also, is_new in opened[1:]:
        unseen = np.intersect1d(unseen, scored_stays(other, cohort, is_new, arguments.split_file)[0])
        what = "those that each of the checkpoints may be scored on"
        content = content | {"split": parts_of_all(content["split"], other["split"])}
        answered = np.intersect1d(answered, answered_points(also))
    points = labelled_points(cohort, unseen)
    own = [each["metrics"]["threshold"] for _, each, *_ in opened]
    threshold = float(mean_of_logits(own)) if others else own[0]
    if len(strange := points[~np.isin(points, answered)]):
        named = cohort.stay_id[cohort.point_stay[strange[0]]]
        print(f"not scored: {len(strange):,} labelled points, as nothing that the checkpoint knows lies before them "
              f"(stay {named} at minute {cohort.point_minute[strange[0]]:g})")
    points = np.intersect1d(points, answered)
    label = cohort.label[points].astype(int)
    unscored = len(np.unique(label)) < 2 and (f"{cohort.reader}: the stays to be scored hold one class or none "
                                              f"({len(stays_with(cohort, points))} stays: {what}); AUROC needs both")
    if unscored and not (arguments.predictions or arguments.embeddings or arguments.trajectory):
        raise InputError(f"{unscored}; --predictions needs no label")
    stays = cohort.point_stay[points]
    groups = {name: subgroups(cohort, points, name) for name in arguments.subgroups}
    rows = answered if arguments.predictions or arguments.embeddings else points
    if not len(rows) and (arguments.predictions or arguments.embeddings):
        raise InputError(f"{cohort.reader}: no question has an answer, as nothing that the checkpoint knows lies "
                         "before any; give these stays' events, or their names by --variables")
    told = [probability_at(each.to(device), data, rows, device) for each, _, _, data, _ in opened]
    probability = mean_of_logits(told) if others else told[0]
    if arguments.predictions:
        if cohort.reader.startswith("MEDS") and Path(arguments.predictions).suffix == ".parquet":
            write_meds_predictions(arguments.predictions, cohort, rows, probability, threshold, unseen)
        else:
            write_predictions(arguments.predictions, content, dataset, rows, probability)
    if arguments.embeddings:
        write_embeddings(arguments.embeddings, model, dataset, rows, device)
    scored = np.searchsorted(rows, points)
    methods = {CHECKPOINT: probability[scored]}
    if others:
        print(f"checkpoint: scored is the mean of the logits of {len(opened)} checkpoints")
        methods |= {name: p[scored] for name, p in zip(arguments.checkpoint, told)}
    if unscored:
        print(f"nothing to score: {unscored}")
    else:
        thresholds = {CHECKPOINT: threshold} | dict(zip(arguments.checkpoint, own))
        if baselines:
            valid = labelled_points(cohort, stays_of(cohort, content["split"]["valid"]))
            asked = np.union1d(valid, points)
            told = baselines(arguments, content, cohort, dataset, asked, new)
            methods |= {name: p[np.searchsorted(asked, points)] for name, p in told.items()}
            thresholds |= {name: ranking(cohort, valid, p[np.searchsorted(asked, valid)])["threshold"]
                           for name, p in told.items()}
        figures |= {"scored": what, **score_figures(stays, label, methods, threshold, arguments.sensitivity, groups)}
        if not others:
            figures["model"] = model_figures(model, dataset, np.unique(stays), device)
        best = f"best {'utility' if 'val_utility' in content['metrics'] else 'F1'} of the validation split"
        best = "the mean of their thresholds" if others else best
        print_figures(figures, best if "format" in content else "no threshold was recorded")
        if groups:
            print_subgroups(figures)
        hours = stays, cohort.point_minute[points], label
        if sepsis2019.of_this_kind(*hours):
            figures["sepsis"] = {name: sepsis2019.figures(*hours, p, thresholds[name]) for name, p in methods.items()}
            sepsis2019.print_figures(figures["sepsis"])
    if stay is not None:
        figures["trajectory"] = risk_over_time(model, dataset, stay, device)
        print_trajectory(figures["trajectory"])
    if arguments.json:
        write_atomically(arguments.json, lambda out: out.write_text(json.dumps(figures, indent=1)))
    if folder:
        plot_curves(folder, path, source.get("pretrained_ckpt"))
        if not unscored:
            plot_ranking(folder, label, methods)
            plot_calibration(folder, label, probability[scored])
            plot_decision(folder, label, methods)
        shown = np.random.default_rng(0).permutation(rows)[:MOST_SHOWN]
        if len(shown) > 2:
            shown.sort()
            plot_features(folder, encode_points(model, dataset, shown, device).cpu(), cohort.label[shown])
        if stay is not None:
            plot_trajectory(folder, figures["trajectory"], dataset, stay, threshold)
        print(f"pictures: {', '.join(sorted(file.name for file in folder.glob('*.png')))} in {folder}")


def mean_of_logits(probabilities) -> np.ndarray:
    """[n] of k of [n]."""
    return 1 / (1 + np.exp(-logit(probabilities).mean(0)))


def parts_of_all(split: dict, other: dict) -> dict[str, list[str]]:
    """The split of several checkpoints together: a stay that one was trained or selected on is no test stay of all."""
    part_of = {stay: part for part in ("test", "valid", "train") for of in (split, other) for stay in of[part]}
    return {part: [stay for stay, of in part_of.items() if of == part] for part in split}


def refuse_together(arguments, opened: list) -> None:
    """Raises InputError where several checkpoints cannot be scored as one."""
    for path, (_, _, cohort, _, _) in zip(arguments.checkpoint, opened):
        if (cohort.fingerprint, label_digest(cohort)) != (opened[0][2].fingerprint, label_digest(opened[0][2])):
            raise InputError(f"{path}: was trained on other data or labels than {arguments.checkpoint[0]}; give both "
                             "the same by --data_dir, or score them apart")
    for name in ("baselines", "embeddings", "trajectory", "plots"):
        if len(opened) > 1 and getattr(arguments, name):
            raise InputError(f"--{name}: of one checkpoint, where {len(opened)} are given; leave it or the others out")


CHECKPOINT = "this checkpoint"
MOST_SHOWN = 5000  # points in the picture of the features


def score_figures(stays, label, methods: dict, threshold: float, sensitivity: float = .8, groups: dict = {}) -> dict:
    """Plain numbers about the probabilities [n] of each method on points of these stays [n] with `label` [n]; the
    checkpoint's in full, also in groups: {variable: {group: mask [n]}}."""
    probability, prevalence = methods[CHECKPOINT], label.mean()
    alarm = threshold_of(label, probability, sensitivity)
    full = RANKS | {recalibration: ("slope", "intercept"), alarm_from(alarm): ("sensitivity", "ppv", "alarms")}
    compared = {name: with_intervals(stays, label, p, full if name == CHECKPOINT else RANKS)
                for name, p in methods.items()}
    divided = {variable: {key: group_figures(stays[mask], label[mask], probability[mask], full)
                          for key, mask in masks.items()} for variable, masks in groups.items()}
    tn, fp, fn, tp = confusion_matrix(label, probability >= threshold).ravel().tolist()
    return {"stays": len(np.unique(stays)), "points": len(label), "positive": int(label.sum()),
            "prevalence": float(prevalence), "few": few(stays, label), "methods": compared,
            "brier": float(brier_score_loss(label, probability)),
            "brier_of_prevalence": float(prevalence * (1 - prevalence)),
            "calibration_error": calibration_error(label, probability),
            "probability": {"mean": float(probability.mean()), "min": float(probability.min()),
                            "max": float(probability.max()),
                            "below_0.01": int((probability < .01).sum()), "above_0.99": int((probability > .99).sum())},
            "alarm": {"sensitivity": sensitivity, "threshold": alarm}, "subgroups": divided,
            "net_benefit": net_benefit(label, probability),
            "threshold": threshold, "confusion": {"tp": tp, "fp": fp, "fn": fn, "tn": tn},
            "f1": float(f1_score(label, probability >= threshold))}


def group_figures(stays, label, probability, measures: dict) -> dict:
    """The size of a group and, where it holds both classes, its measures."""
    size = {"stays": len(np.unique(stays)), "points": len(label), "positive": int(label.sum())}
    return size | (with_intervals(stays, label, probability, measures) if 0 < label.sum() < len(label) else {})


def model_figures(model, dataset, stays, device) -> dict:
    weights = torch.cat([p.detach().flatten()
                         for name, p in model.cls_head.named_parameters() if name.endswith("weight")])
    return {"head_parameters": sum(p.numel() for p in model.cls_head.parameters()),
            "parameters": sum(p.numel() for p in model.parameters()),
            "head_weights": {name: getattr(weights, name)().item() for name in ("mean", "std", "min", "max")},
            "active_units": active_units(model, dataset, stays, device), "latent_dim": model.config.latent_dim}


def print_figures(figures: dict, threshold_is: str) -> None:
    """The report of `score_figures` and `model_figures`; with baselines, the table of all methods."""
    def with_interval(measure):
        value = "not determined" if measure["value"] is None else f"{measure['value']:.4f}"
        return value + "  95% [{:.3f}, {:.3f}]".format(*measure["interval"]) if measure["interval"] else value

    own, spread = figures["methods"][CHECKPOINT], figures["probability"]
    points = f"{figures['points']:,} points in " * (figures["points"] > figures["stays"])
    print(f"\nScored: {points}"
          + "{stays:,} stays, {positive:,} positive ({prevalence:.1%}): {scored}".format(**figures))
    if figures["few"]:
        print(f"Few                  {figures['few']}")
    print(f"AUROC                {with_interval(own['auroc'])}")
    print(f"AUPRC                {with_interval(own['auprc'])}  (prevalence {figures['prevalence']:.4f})")
    print("Brier score          {brier:.4f}  (prevalence alone: {brier_of_prevalence:.4f})".format(**figures))
    print("Calibration error    {calibration_error:.4f}  (expected, 10 bins)".format(**figures))
    print(f"Calibration slope    {with_interval(own['slope'])}  (1 where calibrated)")
    print(f"  and intercept      {with_interval(own['intercept'])}  (0 where calibrated)")
    print("Alarm                from {threshold:.4f} on, where these labels' sensitivity reaches {sensitivity:g}"
          .format(**figures["alarm"]))
    print(f"  sensitivity        {with_interval(own['sensitivity'])}")
    print(f"  predictive value   {with_interval(own['ppv'])}  (positive: the share of alarms that are true)")
    print(f"  alarms             {with_interval(own['alarms'])}  (per 100 {'points' if points else 'stays'})")
    print(f"Probabilities        mean {spread['mean']:.4f}, range {spread['min']:.4f} to {spread['max']:.4f}, "
          f"below 0.01: {spread['below_0.01']}, above 0.99: {spread['above_0.99']}")
    print(f"Confusion            at {figures['threshold']:.4f} ({threshold_is}): "
          "TP {tp}, FP {fp}, FN {fn}, TN {tn}; ".format(**figures["confusion"]) + f"F1 {figures['f1']:.4f}")
    if head := figures.get("model"):
        print("Head                 {head_parameters:,} of {parameters:,} parameters; weights ".format(**head)
              + "mean {mean:.4f}, std {std:.4f}, range {min:.3f} to {max:.3f}".format(**head["head_weights"]))
        print("Active units         {active_units}/{latent_dim} (variance of mu over sets > 0.01)".format(**head))
    if len(figures["methods"]) > 1:
        print(f"\n{'':32}  AUROC   95% interval      AUPRC   95% interval      "
              f"(bootstrap over {figures['stays']:,} stays)")
        for name, measures in figures["methods"].items():
            row = f"{name:32}  {with_interval(measures['auroc']):26}  {with_interval(measures['auprc'])}"
            print(row.replace("  95%", " "))


GROUP_COLUMNS = {"auroc": "AUROC", "auprc": "AUPRC", "slope": "slope", "intercept": "intercept",
                 "sensitivity": "sensitivity"}


def print_subgroups(figures: dict) -> None:
    """A row a group: its size and each measure with its interval, where the group is large enough for one."""
    def cell(measure):
        if measure["value"] is None:
            return ""
        interval = " [{:.2f}, {:.2f}]".format(*measure["interval"]) if measure["interval"] else ""
        return f"{measure['value']:.2f}{interval}"

    own = figures["methods"][CHECKPOINT] | {name: figures[name] for name in ("stays", "positive")}
    rows = {"all": own} | {f"{variable} {key}": group for variable, groups in figures["subgroups"].items()
                           for key, group in groups.items()}
    print(f"\n{'':28}  stays  positive  "
          + "".join(f"{title:22}" for title in GROUP_COLUMNS.values()).rstrip()
          + f" from {figures['alarm']['threshold']:.4f} on")
    for name, group in rows.items():
        cells = "".join(f"{cell(group[measure]) if measure in group else '':22}" for measure in GROUP_COLUMNS)
        print(f"{name:28} {group['stays']:6,}  {group['positive']:8,}  {cells}".rstrip())
    print(f"(no interval below {FEW} stays with a positive or with a negative label, no figure of one class alone)")


def answered_points(dataset) -> np.ndarray:
    """Indices [n] of the points that have an answer: those with an event of a variable that the checkpoint knows at or
    before them."""
    cohort = dataset.cohort
    index, slot = point_slots(cohort, np.arange(len(cohort)))
    known = np.add.reduceat(dataset.variable[cohort.event_variable] >= 0, cohort.set_start[:-1], dtype=np.int64)
    known = np.append(0, np.cumsum(known))                                                          # [T+1]
    first = cohort.stay_start[cohort.point_stay[index]]
    return index[known[first + slot + 1] > known[first]]


def write_table(path, table: pd.DataFrame) -> None:
    """As Parquet where the path ends so, else as CSV."""
    if Path(path).suffix != ".parquet":
        return write_atomically(path, lambda out: table.to_csv(out, index=False))
    try:
        import pyarrow  # noqa: F401 (of which pandas makes use)
    except ImportError:
        raise InputError(f"--predictions {path}: Parquet needs pyarrow; pip install pyarrow") from None
    write_atomically(path, lambda out: table.to_parquet(out, index=False))


def write_predictions(path, content, dataset, points, probability) -> None:
    """A row a prediction point of the data: its probability (empty: no answer),
    label (empty: none) and the split that the checkpoint knows its stay from."""
    cohort = dataset.cohort
    split, answers = np.full(len(cohort), "", dtype=object), np.full(len(cohort.label), np.nan)
    for name, ids in content["split"].items():
        split[stays_of(cohort, ids)] = name
    answers[points] = probability
    stay = cohort.point_stay
    table = pd.DataFrame({"stay_id": cohort.stay_id[stay], "minute": cohort.point_minute, "probability": answers,
                          "split": split[stay],
                          "label": pd.array(np.where(cohort.label >= 0, cohort.label, np.nan), dtype="Int64")})
    write_table(path, table)
    print(f"predictions: {len(table):,} points of {len(np.unique(stay)):,} stays written to {path}")
    empty = table[table["probability"].isna()]
    if len(empty):
        print(f"predictions: {len(empty):,} without a probability, as nothing that the checkpoint knows lies before "
              f"them (stay {empty['stay_id'].iloc[0]} at minute {empty['minute'].iloc[0]:g})")


def write_meds_predictions(path, cohort, points, probability, threshold: float, stays) -> None:
    """The answered points of these stays, which may be scored, in the columns and types that the package
    meds-evaluation takes, to the microsecond."""
    mine = np.isin(cohort.point_stay[points], stays)
    stay, label = cohort.point_stay[points[mine]], cohort.label[points[mine]]
    table = pd.DataFrame({
        "subject_id": cohort.stay_id[stay].astype(np.int64),
        "prediction_time": cohort.clock(stay, cohort.point_minute[points[mine]]),
        "boolean_value": pd.array(np.where(label >= 0, label == 1, None), dtype="boolean"),
        "predicted_boolean_value": probability[mine] >= threshold,
        "predicted_boolean_probability": probability[mine].astype(np.float32)})
    write_table(path, table)
    others = len(cohort.label) - len(points)
    print(f"predictions: {len(table):,} points of {len(np.unique(stay)):,} subjects written to {path}; left out: "
          f"{(~mine).sum():,} of subjects that are not to be scored, {others:,} without an answer")


@torch.no_grad()
def write_embeddings(path, model, dataset, points, device) -> None:
    """Of every point the head input before standardisation [n, F] and h of its set [n, d]."""
    features, cohort = encode_points(model, dataset, points, device), dataset.cohort
    h = torch.zeros(len(points), model.config.latent_dim, device=device)
    asking = dataset.asking(points)
    for batch in evaluation_loader(asking, stays_with(cohort, points), device):
        real = batch.point >= 0
        h[batch.point[real]] = at_slots(model.encode(batch)[3], batch.point_slot)[real]

    def write(out):
        with open(out, "wb") as file:  # given a name, NumPy would append .npz
            np.savez(file, stay_id=cohort.stay_id[cohort.point_stay[points]], minute=cohort.point_minute[points],
                     features=features.cpu().numpy(), h=h.cpu().numpy())
    write_atomically(path, write)
    print(f"embeddings: {len(points):,} points, features [{features.shape[1]}] and h [{h.shape[1]}], written to {path}")


@torch.no_grad()
def active_units(model, dataset, stays, device) -> int:
    """Units of mu whose variance over the sets of these stays exceeds 0.01 (Burda et al. 2016, section 5.2)."""
    mus = []
    for batch in evaluation_loader(dataset, stays, device):
        mus.append(model.setvae.encode(batch)[0][real_sets(batch)])
    return int((torch.cat(mus).var(0) > 0.01).sum())


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint to give away
# ----------------------------------------------------------------------------------------------------------------------

def export(path, out) -> None:
    """Write a checkpoint of equal predictions that names no stay, subject, path, command or machine. What stands for
    ids (see `data.salted`) still tells whom of other data it was trained on, and of its own data the test split."""
    content = read_checkpoint(path)
    if "format" not in content:
        raise InputError(f"{path}: of the original implementation, which records no ids and paths; give it as it is")
    salt, source = secrets.token_hex(8), content["source"]
    data = {name: source["data"][name] for name in ("hours", "synthetic_stays") if name in source["data"]}
    kept = {name: content[name] for name in ("format", "mode", "model_config", "model", "vocabulary", "normalizer",
                                             "metrics")}
    kept["source"] = {name: source.get(name) for name in ("seed", "fingerprint", "commit", "versions", "precision")} | {
        "command": "a command that an exported checkpoint does not tell",
        "data": data | ({"data_dir": None} if source["data"].get("data_dir", "") != "" else {})}
    for name in ("split", "subjects"):
        kept[name] = {part: sorted(text if text.startswith(HASHED) else salted(salt, text) for text in ids)
                      for part, ids in content[name].items()}
    buffer = io.BytesIO()  # given a path, torch.save would record its name
    torch.save(kept, buffer)
    write_atomically(out, lambda file: file.write_bytes(buffer.getbuffer()))
    print(f"exported: {out}, without paths and commands; salted hashes stand for the ids of "
          f"{sum(map(len, kept['split'].values())):,} stays, names and statistics of the variables are in it")


# ----------------------------------------------------------------------------------------------------------------------
# One stay over time
# ----------------------------------------------------------------------------------------------------------------------

def find_stay(dataset, stay_id) -> int | None:
    """Index of the stay with this id (None where none is asked for)."""
    if stay_id is None:
        return None
    cohort = dataset.cohort
    found = np.flatnonzero(cohort.stay_id == stay_id)
    if not len(found):
        raise InputError(f"--trajectory {stay_id}: no such stay in the data ({', '.join(cohort.stay_id[:3])} ...); "
                         "give the id of one")
    if (dataset.variable[cohort.event_variable[stay_event_index(cohort, found)]] < 0).all():
        raise InputError(f"--trajectory {stay_id}: the checkpoint knows none of its variables; rename them with "
                         "--variables, or give another stay")
    return int(found[0])


def risk_over_time(model, dataset, stay: int, device=CPU, most: int = 40) -> dict:
    """The risk at every minute at which something was charted or a risk is asked for, as if the stay had ended there:
    the model is causal, one pass answers all. Where it is highest, the risk without each of the `most` charted
    variables."""
    cohort = dataset.cohort
    sets, points = (slice(*start[stay:stay + 2]) for start in (cohort.stay_start, cohort.point_start))
    asked, label = cohort.point_minute[points], cohort.label[points]
    minute = np.union1d(cohort.set_minute[sets], asked[asked >= cohort.set_minute[sets][0]])
    events = np.bincount(np.searchsorted(minute, cohort.set_minute[sets]), np.diff(cohort.set_start)[sets], len(minute))
    count = np.where(np.arange(len(cohort)) == stay, len(minute), 0)
    dataset = dataset.of(with_points(cohort, count, minute, np.full(len(minute), -1)))
    risk = probability_at(model, dataset, np.arange(len(minute)), device)
    highest = minute[risk.argmax()]
    septic = (label == 1).any() and sepsis2019.of_this_kind(np.zeros(len(label)), asked, label)
    return {"stay": str(cohort.stay_id[stay]), "label": int(cohort.stay_label[stay]), "minute": minute.tolist(),
            "events": events.astype(int).tolist(), "risk": risk.tolist(), "admission": float(cohort.admission[stay]),
            "onset": float(asked[label == 1][0] + 60 * sepsis2019.AHEAD) if septic else None,
            "labelled": asked[label == 1].tolist() if len(label) > 1 else [],
            "highest": float(highest), "without": risk_without(model, dataset, stay, highest, most, device)}


def risk_without(model, dataset, stay: int, minute: float, most: int, device) -> dict:
    """The risk at this minute by the variable whose events are left out, of the `most` charted until then that the
    model knows: the stay is repeated, each time without one. None: nothing is left to tell a risk by."""
    cohort = dataset.cohort
    events = stay_event_index(cohort, np.array([stay]))
    sets = np.searchsorted(cohort.set_start, events, side="right") - 1
    known = (cohort.set_minute[sets] <= minute) & (dataset.variable[cohort.event_variable[events]] >= 0)
    events, sets = events[known], sets[known]
    variables, count = np.unique(cohort.event_variable[events], return_counts=True)
    variables = variables[np.argsort(-count, kind="stable")[:most]]
    names = [cohort.variables[v] for v in variables]
    copy, event = np.nonzero(cohort.event_variable[events] != variables[:, None])
    if not len(copy):
        return dict.fromkeys(names)
    copies = build_cohort(cohort.reader, cohort.variables, copy, cohort.set_minute[sets[event]],
                          cohort.event_variable[events[event]], cohort.event_value[events[event]], names,
                          set_key=sets[event], whole=True)
    ones = np.ones(len(copies), dtype=int)
    dataset = dataset.of(with_points(copies, ones, minute * ones, -ones))
    risk = probability_at(model, dataset, np.arange(len(copies)), device)
    return dict.fromkeys(names) | dict(zip(copies.stay_id.tolist(), risk.tolist()))


def influence(trajectory: dict) -> dict:
    """By how much each variable raises the highest risk (lowers: negative), those that move it most first."""
    highest = max(trajectory["risk"])
    moved = {name: highest - risk for name, risk in trajectory["without"].items() if risk is not None}
    return dict(sorted(moved.items(), key=lambda item: -abs(item[1])))


LABEL_NAMES = {-1: "no label", 0: "label 0", 1: "label 1"}


def print_trajectory(trajectory: dict) -> None:
    print(f"\nStay {trajectory['stay']} ({LABEL_NAMES[trajectory['label']]}): "
          f"risk at {len(trajectory['risk'])} times\n           hour  events    risk")
    hours = (np.array(trajectory["minute"]) - trajectory["admission"]) / 60
    for i, (hour, events, risk) in enumerate(zip(hours, trajectory["events"], trajectory["risk"])):
        print(f"{i + 1:5d}  {hour:8.2f}  {events:6d}  {risk:6.4f}  {'#' * round(40 * risk)}")
    moved = ", ".join(f"{name} {x:+.4f}" for name, x in list(influence(trajectory).items())[:5])
    if moved:
        print(f"most of the highest risk, {max(trajectory['risk']):.4f}, comes and goes with: {moved}")


# ----------------------------------------------------------------------------------------------------------------------
# At the bedside: the risk as events come
# ----------------------------------------------------------------------------------------------------------------------

FOLLOWED = ["stay_id", "minute", "variable", "value"]


def followed_event(line: str, rename: dict = {}) -> tuple[str, float, str, float]:
    """What a line of `FOLLOWED` says, as the long table is read; value NaN: none; rename: see `read_map`. Raises
    ValueError where it is no event."""
    cells = [cell.strip() for cell in next(csv.reader([line]))]
    if len(cells) != len(FOLLOWED):
        raise ValueError(f"{len(cells)} cells where {','.join(FOLLOWED)} is due")
    stay, minute, variable, value = cells
    if not stay or not variable:
        raise ValueError(f"no {'variable' if stay else 'stay_id'}")
    if "_" in minute + value:  # which Python takes for part of a number
        raise ValueError("a minute or value that is no number")
    value = TRUTH.get(value.lower(), value)
    beyond = BEYOND.fullmatch(value)
    minute, value = float(minute), float("nan" if value in MISSING else beyond[1] if beyond else value)
    variable, factor, offset = rename.get(variable, (variable, 1, 0))
    value = value * factor + offset
    if not abs(minute) < 1e8 or abs(value) > float(np.finfo(np.float32).max):
        raise ValueError("a minute or value out of range")
    return stay, minute, variable, value


class Ward:
    """The stays that are followed: their states, their open sets, and counts of what came."""

    def __init__(self, model: SeqSetVAE, normalizer: Normalizer):
        self.model, self.normalizer = model, normalizer
        self.index = {name: i for i, name in enumerate(normalizer.variables)}
        self.states, self.sets, self.known = {}, {}, set()  # of stays; a set: (minute, [(variable, value), ...])
        self.counts, self.unknown = Counter(), Counter()
        self.out = csv.writer(sys.stdout, lineterminator="\n")

    def add(self, stay: str, minute: float, variable: str, value: float) -> None:
        """Take an event; a later minute than its stay's ends the set before."""
        if stay not in self.states:
            self.states[stay] = self.model.start()
        now = self.sets[stay][0] if stay in self.sets else self.states[stay].last
        if minute < now:
            self.counts["events of an earlier minute than their stay's last, ignored"] += 1
            return
        if stay in self.sets and minute > now:
            self.end_set(stay)
        _, events = self.sets.setdefault(stay, (minute, []))
        if variable in self.index:
            events.append((self.index[variable], value))
            self.known.add(stay)
        else:
            self.unknown[variable] += 1

    def end_set(self, stay: str) -> None:
        """Print the risk after the stay's open set."""
        (minute, events), state = self.sets.pop(stay), self.states[stay]
        variable, value = np.array(events, dtype=np.float64).reshape(-1, 2).T
        variable = variable.astype(np.int64)
        value = self.normalizer(variable, value.astype(np.float32))
        self.model.step(state, minute, [*zip(variable.tolist(), value.tolist())])
        risk = f"{self.model.ask(state, minute):.6f}" if stay in self.known else ""
        self.out.writerow([stay, int(minute) if minute.is_integer() else minute, risk])
        sys.stdout.flush()
        self.counts["risks"] += bool(risk)

    def end_sets(self) -> None:
        for stay in list(self.sets):
            self.end_set(stay)

    def describe(self) -> str:
        lines = [f"{self.counts.pop('risks', 0):,} risks of {len(self.states):,} stays"]
        lines += [f"{count:,} {reason}" for reason, count in self.counts.items() if count]
        if self.unknown:
            named = ", ".join(f"{name} ({count:,})" for name, count in self.unknown.most_common(10))
            lines.append(f"{self.unknown.total():,} events of {len(self.unknown):,} variables unknown to the "
                         f"checkpoint, left out: {named}{' ...' if len(self.unknown) > 10 else ''}")
        return "\n".join(f"follow: {line}" for line in lines)


def follow(arguments) -> None:
    """Lines stay_id,minute,variable,value of standard input (no value: it happened), perhaps under a header -> after
    each set a printed line stay_id,minute,risk (no risk: so far the checkpoint knows none of the stay's variables). A
    set ends with a later minute of its stay, an empty line or the input. What cannot be used is counted on standard
    error."""
    (path,), device = arguments.checkpoint, choose_device(arguments.device, "fp32")[0]
    content = read_checkpoint(path)
    if "format" in content:  # its data need not be at hand
        normalizer = Normalizer.from_state(content["normalizer"], path)
        model = classifier_of(path, content)
    else:
        model, _, _, dataset, _ = open_classifier(path, data_options(arguments), arguments.set_heads,
                                                  arguments.transformer_heads)
        normalizer = dataset.normalizer
    rename = read_map(Path(arguments.variables_map)) if arguments.variables_map else {}
    ward = Ward(model.to(device), normalizer)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text is a malformed line or an unknown variable
    try:
        for number, line in enumerate(sys.stdin, 1):
            if not line.strip():
                ward.end_sets()
            elif number == 1 and FOLLOWED[0] in (names := [cell.strip() for cell in line.split(",")]):
                if names != FOLLOWED:
                    raise InputError(f"line 1: the columns {','.join(names)}; give {','.join(FOLLOWED)}")
            else:
                try:
                    event = followed_event(line, rename)
                except (ValueError, csv.Error) as error:
                    ward.counts["malformed lines, left out"] += 1
                    print(f"follow: line {number}: {error}: {printable(line.strip())}", file=sys.stderr)
                else:
                    ward.add(*event)
        ward.end_sets()
    except KeyboardInterrupt:  # the usual end of a long-running command
        pass
    print(*map(printable, ward.describe().splitlines()), sep="\n", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: lines differ in style as well as in colour, so that they are readable in grey
# ----------------------------------------------------------------------------------------------------------------------

STYLES = [dict(color=color, linestyle=style)
          for color, style in (("black", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#888888", ":"),
                               ("#009E73", (0, (3, 1, 1, 1, 1, 1))))]


def new_figure(columns: int, rows: int = 1, width: float = 4.4, height: float = 3.8, **options):
    """A figure and its axes, row by row; width and height of one in inches. Without pyplot: no window, no global
    state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plots needs matplotlib; pip install matplotlib") from None
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def picture_folder(path) -> Path:
    """The folder, made. Raises InputError where it or matplotlib cannot be had, before anything is computed."""
    new_figure(1)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plots {path}: cannot be made ({error.strerror}); choose another folder") from None
    return Path(path)


def save_figure(figure, path: Path) -> None:
    """As PNG. A `$` in a name is a `$`, not the start of a formula."""
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
    write_atomically(path, lambda out: figure.savefig(out, format="png", dpi=130))


# title, unit, and the columns of metrics.csv in training and on the validation stays
CURVES = [("loss", "loss", "loss", "val_loss"), ("KL divergence", "nats a set", "kl", "val_kl"),
          ("active units", "units of mu", "", "active_units"),
          ("AUROC", "AUROC", "", "val_auc"), ("AUPRC", "AUPRC", "", "val_auprc")]


def plot_curves(folder: Path, checkpoint, pretrained) -> None:
    """curves.png, of the metrics.csv beside the checkpoint and beside the one that it was finetuned from, where they
    are still there."""
    panels = []
    for mode, path in (("pretraining", pretrained), ("finetuning", checkpoint)):
        if path and (metrics := Path(path).parent / "metrics.csv").is_file():
            table = pd.read_csv(metrics)
            for title, unit, *columns in CURVES:
                lines = {name: table[column] for name, column in zip(("training", "validation"), columns)
                         if column in table}
                panels += [(f"{mode}: {title}", unit, table["epoch"], lines)] if lines else []
        else:
            print(f"pictures: no curves of the {mode} run, as no metrics.csv lies beside "
                  f"{path or 'its checkpoint, which is unknown'}")
    if not panels:
        return
    figure, axes = new_figure(3, -(-len(panels) // 3), height=3.2)
    for ax, (title, unit, epoch, lines) in zip(axes, panels):
        for name, values in lines.items():
            ax.plot(epoch, values, marker="o", markersize=3, label=name, **STYLES[name == "validation"])
        ax.set(title=title, xlabel="epoch", xlim=(.5, epoch.max() + .5),
               ylabel=unit if len(lines) > 1 else f"{unit}, {name}")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if "units" in title:
            ax.set_ylim(0)
        if len(lines) > 1:
            ax.legend(frameon=False)
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    save_figure(figure, folder / "curves.png")


def plot_ranking(folder: Path, label, methods: dict) -> None:
    """ranking.png: ROC and precision-recall of the checkpoint and, where fitted, the baselines."""
    figure, (roc, pr) = new_figure(2, width=5, height=4.8)
    for (name, p), style in zip(methods.items(), itertools.cycle(STYLES)):
        roc.plot(*roc_curve(label, p)[:2], label=f"{name} ({roc_auc_score(label, p):.3f})", **style)
        precision, recall, _ = precision_recall_curve(label, p)
        pr.plot(recall, precision, label=f"{name} ({average_precision_score(label, p):.3f})", drawstyle="steps-post",
                **style)
    roc.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=.8)
    pr.axhline(label.mean(), color="#bbbbbb", linewidth=.8, label=f"prevalence ({label.mean():.3f})")
    roc.set(title=f"ROC, {len(label):,} points", xlabel="false positive rate", ylabel="true positive rate",
            xlim=(0, 1), ylim=(0, 1.01))
    pr.set(title=f"Precision-recall, {label.sum():,} positive", xlabel="recall", ylabel="precision", xlim=(0, 1),
           ylim=(0, 1.01))
    roc.legend(title="AUROC", frameon=False, fontsize=8, loc="lower right")
    pr.legend(title="AUPRC", frameon=False, fontsize=8, loc="upper right")
    save_figure(figure, folder / "ranking.png")


def plot_calibration(folder: Path, label, probability, bins: int = 10) -> None:
    """calibration.png: observed share of positives in bins of the predicted probability, with its 95% interval (Wilson
    1927), and how many."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    count, positive, total = (np.bincount(which, weights, bins) for weights in (None, label, probability))
    used = count > 0
    n, share, mean = count[used], positive[used] / count[used], total[used] / count[used]
    center = (share + 1.96 ** 2 / (2 * n)) / (1 + 1.96 ** 2 / n)
    half = 1.96 / (1 + 1.96 ** 2 / n) * np.sqrt(share * (1 - share) / n + 1.96 ** 2 / (4 * n ** 2))
    figure, (curve, bars) = new_figure(1, 2, width=5, height=3, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    curve.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=.8, label="perfect")
    curve.errorbar(mean, share, [(share - center + half).clip(0), (center + half - share).clip(0)], color="black",
                   marker="o", markersize=4, linewidth=1, capsize=2, label="this checkpoint, 95% interval")
    figure.suptitle(f"Calibration: Brier {brier_score_loss(label, probability):.3f}, "
                    f"expected error {calibration_error(label, probability, bins):.3f}")
    curve.set(ylabel="observed share of positives", xlim=(0, 1), ylim=(0, 1.01))
    curve.legend(frameon=False, ncols=2, fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1))
    bars.bar((np.arange(bins) + .5) / bins, count, width=.9 / bins, color="#777777")
    bars.set(xlabel="predicted probability", ylabel="points")
    bars.yaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, folder / "calibration.png")


def plot_decision(folder: Path, label, methods: dict) -> None:
    """decision.png: the net benefit of alarms from a threshold on, beside alarms for all and for none."""
    figure, (ax,) = new_figure(1, width=6, height=4.5)
    for (name, p), style in zip(methods.items(), itertools.cycle(STYLES)):
        ax.plot(THRESHOLDS, net_benefit(label, p)["net_benefit"], label=name, **style)
    ax.plot(THRESHOLDS, net_benefit(label, label)["alarm_for_all"], color="#bbbbbb", label="alarm for all")
    ax.axhline(0, color="#bbbbbb", linewidth=.8, label="alarm for none")
    most = label.mean()
    ax.set(title=f"Decision curve, {label.sum():,} positive of {len(label):,}", xlabel="threshold of the probability",
           ylabel="net benefit", xlim=(0, min(1, 5 * most)), ylim=(-.2 * most, 1.1 * most))
    ax.legend(frameon=False, fontsize=8)
    save_figure(figure, folder / "decision.png")


def plot_features(folder: Path, features, label) -> None:
    """features.png: the stays' standardised head inputs, clipped as the head clips them, on their first two principal
    components."""
    pca = PCA(2, random_state=0)
    place = pca.fit_transform(StandardScaler().fit_transform(features.numpy()).clip(-5, 5))
    figure, (ax,) = new_figure(1, width=6, height=5)
    styles = {-1: dict(marker=".", color="#bbbbbb"), 0: dict(marker="o", edgecolors="#888888", facecolors="none"),
              1: dict(marker="^", color="black")}
    for value, style in styles.items():
        if (which := label == value).any():
            ax.scatter(*place[which].T, s=14, linewidths=.6, alpha=.8, label=f"{LABEL_NAMES[value]} ({which.sum():,})",
                       **style)
    figure.suptitle(f"Stay features ({features.shape[1]}) in two dimensions")
    ax.set(**{f"{axis}label": f"principal component {i + 1} ({share:.0%} of the variance)"
              for i, (axis, share) in enumerate(zip("xy", pca.explained_variance_ratio_))})
    ax.legend(frameon=False, ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1))
    save_figure(figure, folder / "features.png")


def plot_trajectory(folder: Path, trajectory: dict, dataset, stay: int, threshold: float, most: int = 24) -> None:
    """trajectory.png: the risk over time, above the events of the `most` variables that move its highest value most,
    low and high ones marked, and by how much each moves it."""
    cohort, normalizer, moved = dataset.cohort, dataset.normalizer, influence(trajectory)
    shown = list(moved)[:most][::-1]
    events = stay_event_index(cohort, np.array([stay]))
    minute = cohort.set_minute[np.searchsorted(cohort.set_start, events, side="right") - 1]
    row = np.array([shown.index(name) if name in shown else -1 for name in cohort.variables])
    row = row[cohort.event_variable[events]]
    events, minute, row = (x[(row >= 0) & (minute >= trajectory["admission"])] for x in (events, minute, row))
    z = normalizer(dataset.variable[cohort.event_variable[events]], cohort.event_value[events])
    last = max(trajectory["minute"]) - trajectory["admission"]
    unit, length = ("hours", 60) if last < 21 * 1440 else ("days", 1440)

    def time(minutes):  # on the axis
        return (np.array(minutes) - trajectory["admission"]) / length

    figure, (risk, corner, chart, bars) = new_figure(
        2, 2, width=5.5, height=1.7 + .09 * len(shown), sharex="col", sharey="row",
        gridspec_kw={"width_ratios": [4, 1], "height_ratios": [2.2, .8 + .18 * len(shown)]})
    corner.set_axis_off()
    hours, value = time(trajectory["minute"]), np.array(trajectory["risk"])
    risk.step(hours, value, where="post", color="black", linewidth=1.2)
    risk.fill_between(hours, threshold, value, where=value >= threshold, step="post", color="#D55E00", alpha=.15,
                      linewidth=0, label="alarm")
    risk.axhline(threshold, color="#888888", linestyle=":", label=f"threshold {threshold:.3g}")
    highest = value.max()
    risk.plot(time(trajectory["highest"]), highest, "o", color="#D55E00", markersize=6, label=f"highest, {highest:.3g}")
    if trajectory["labelled"]:
        risk.plot(time(trajectory["labelled"]), np.zeros(len(trajectory["labelled"])), "s", color="#0072B2",
                  markersize=4, clip_on=False, label="label 1")
    if trajectory["onset"] is not None:
        for ax in (risk, chart):
            ax.axvline(time(trajectory["onset"]), color="#0072B2", linestyle="--", linewidth=1.2,
                       label="onset of sepsis" if ax is risk else None)
    figure.suptitle(f"Stay {trajectory['stay']} ({LABEL_NAMES[trajectory['label']]})")
    risk.set(ylabel="risk", ylim=(0, max(1.1 * highest, 1.1 * threshold if threshold < 2 * highest else 0, .01)))
    risk.legend(frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    for name, which, marker, color in (("1 sd below the mean or lower", z <= -1, "v", "#0072B2"),
                                       ("between, or no number", ~(abs(z) >= 1), ".", "#888888"),
                                       ("1 sd above or higher", z >= 1, "^", "black")):
        chart.scatter(time(minute[which]), row[which], s=13, linewidths=0, label=name, marker=marker, color=color)
    chart.set_yticks(range(len(shown)), shown, fontsize=7)
    chart.set(xlabel=f"{unit} since admission", ylim=(-1, len(shown)), xlim=np.array([-.01, 1.01]) * last / length,
              ylabel="variables" if len(shown) == len(moved) else f"{most} of the {len(moved)} most charted variables")
    chart.legend(frameon=False, ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    change = np.array([moved[name] for name in shown])
    bars.barh(range(len(shown)), change, height=.6, color=np.where(change > 0, "#D55E00", "#0072B2"))
    bars.axvline(0, color="black", linewidth=.8)
    bars.set_title(f"moves the highest risk\n({unit[:-1]} {time(trajectory['highest']):.3g}) by", fontsize=8)
    bars.spines["left"].set_visible(False)
    bars.tick_params(labelsize=7, left=False, labelleft=False)
    save_figure(figure, folder / "trajectory.png")
