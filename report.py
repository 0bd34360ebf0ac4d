"""What a finetuned checkpoint is worth: `test_suite.py --checkpoint` prints its figures and writes what is asked for."""

import difflib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from checkpoint import Checkpoint, label_digest
from data import InputError, labelled_points, make_splits, point_slots, stay_event_index, stays_of, stays_with
from history_statistics import real_sets
from metrics import CHECKPOINT, FEW, mean_of_logits
from plots import (LABEL_NAMES, picture_folder, plot_calibration, plot_curves, plot_decision, plot_features,
                   plot_ranking, plot_trajectory)
from predictor import (Predictor, answered_points, encode_points, find_stay, history_at_points, influence, probability_at,
                       risk_over_time)
from runs import evaluation_loader
from settings import data_options
from tables import write_atomically


# ----------------------------------------------------------------------------------------------------------------------
# Performance analysis of a checkpoint
# ----------------------------------------------------------------------------------------------------------------------

def scored_stays(checkpoint: Checkpoint, cohort, split_file=None) -> tuple[np.ndarray, str]:
    """The stays that may be scored, and what they are: those that --split tests, or else the recorded split; of other
    data all. Subjects that were trained or selected on are left out."""
    new = checkpoint.is_new(cohort)
    if split_file:
        stays, what = stays_of(cohort, make_splits(cohort, 0)["test"]), f"the test part of {split_file}"
    elif new:
        stays, what = np.arange(len(cohort)), "all labelled stays of other data than the checkpoint's"
    else:
        recorded_by = "data" if checkpoint.original else "checkpoint"
        stays = stays_of(cohort, checkpoint.split["test"])
        what = f"the test split that the {recorded_by} recorded"
    seen = np.isin(checkpoint.known_part(cohort, new)[stays], (0, 1))
    if seen.any():
        what += f"; {seen.sum():,} stays left out of subjects that the checkpoint was trained or selected on"
    return stays[~seen], what


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


def performance(arguments, baselines=None) -> None:
    """Print the analysis of a finetuned checkpoint on the stays it may be scored on (see `scored_stays`), and write
    what is asked for; of several the mean of their logits is scored, on stays that all may be scored on."""
    path, *others = arguments.checkpoint
    folder = arguments.plots and picture_folder(arguments.plots)
    opened = [Predictor.with_data(path, data_options(arguments), arguments.device, arguments.set_heads,
                                  arguments.transformer_heads) for path in arguments.checkpoint]
    predictor, dataset = opened[0]
    model, checkpoint, device, cohort = predictor.model, predictor.checkpoint, predictor.device, dataset.cohort
    refuse_together(arguments, [data.cohort for _, data in opened])
    source, split = checkpoint.source, checkpoint.split
    figures = {"checkpoint": ", ".join(map(str, arguments.checkpoint)), "epoch": checkpoint.metrics["epoch"],
               "command": source["command"], "seed": source.get("seed"),
               "data": source["fingerprint"], "versions": source["versions"], "reader": cohort.reader, "scored": None}
    print(cohort.describe())
    print(dataset.describe_known())
    print("checkpoint: {checkpoint}, epoch {epoch}, made by: {command}".format(**figures))
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    print(f"checkpoint: seed {source.get('seed', 'unknown')}, data {source['fingerprint']}, {versions}")
    stay = find_stay(dataset, arguments.trajectory)
    unseen, what = scored_stays(checkpoint, cohort, arguments.split_file)
    answered = answered_points(dataset)
    for other, also in opened[1:]:
        unseen = np.intersect1d(unseen, scored_stays(other.checkpoint, cohort, arguments.split_file)[0])
        what = "those that each of the checkpoints may be scored on"
        split = parts_of_all(split, other.checkpoint.split)
        answered = np.intersect1d(answered, answered_points(also))
    points = labelled_points(cohort, unseen)
    own = [each.checkpoint.metrics["threshold"] for each, _ in opened]
    threshold = float(mean_of_logits(own)) if others else own[0]
    if len(strange := points[~np.isin(points, answered)]):
        named = cohort.stay_id[cohort.point_stay[strange[0]]]
        print(f"not scored: {len(strange):,} labelled points, as nothing that the checkpoint knows lies before them "
              f"(stay {named} at minute {cohort.point_minute[strange[0]]:g})")
    points = np.intersect1d(points, answered)
    label, task = cohort.label[points], model.task
    unscored = task.lacking(cohort.answers[points])
    if unscored:
        unscored = (f"{cohort.reader}: the stays to be scored hold {unscored} ({len(stays_with(cohort, points))} stays: "
                    f"{what}); AUROC needs both classes")
    if unscored and not (arguments.predictions or arguments.embeddings or arguments.trajectory):
        raise InputError(f"{unscored}; --predictions needs no label")
    stays = cohort.point_stay[points]
    groups = {name: subgroups(cohort, points, name) for name in arguments.subgroups}
    rows = answered if arguments.predictions or arguments.embeddings else points
    if not len(rows) and (arguments.predictions or arguments.embeddings):
        raise InputError(f"{cohort.reader}: no question has an answer, as nothing that the checkpoint knows lies "
                         "before any; give these stays' events, or their names by --variables")
    told = [probability_at(each.model, data, rows, device) for each, data in opened]
    probability = mean_of_logits(told) if others else told[0]
    if arguments.predictions:
        if cohort.reader.startswith("MEDS") and Path(arguments.predictions).suffix == ".parquet":
            write_meds_predictions(arguments.predictions, cohort, rows, probability, threshold, unseen)
        else:
            write_predictions(arguments.predictions, split, dataset, rows, probability)
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
            valid = labelled_points(cohort, stays_of(cohort, split["valid"]))
            asked = np.union1d(valid, points)
            told = baselines(arguments, checkpoint, dataset, asked)
            methods |= {name: p[np.searchsorted(asked, points)] for name, p in told.items()}
            at_valid = np.searchsorted(asked, valid)
            thresholds |= {name: task.validation(cohort, valid, p[at_valid, None])["threshold"] for name, p in told.items()}
        figures |= {"scored": what,
                    **task.figures(cohort, points, methods, thresholds, arguments.sensitivity, groups)}
        if not others:
            figures["model"] = model_figures(model, dataset, np.unique(stays), device)
        best = f"best {'utility' if 'val_utility' in checkpoint.metrics else 'F1'} of the validation split"
        best = "the mean of their thresholds" if others else best
        print_figures(figures, "no threshold was recorded" if checkpoint.original else best)
        if groups:
            print_subgroups(figures)
        if "sepsis" in figures:
            print_sepsis(figures["sepsis"])
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


def parts_of_all(split: dict, other: dict) -> dict[str, list[str]]:
    """The split of several checkpoints together: a stay that one was trained or selected on is no test stay of all."""
    part_of = {stay: part for part in ("test", "valid", "train") for of in (split, other) for stay in of[part]}
    return {part: [stay for stay, of in part_of.items() if of == part] for part in split}


def refuse_together(arguments, cohorts: list) -> None:
    """Raises InputError where several checkpoints cannot be scored as one."""
    for path, cohort in zip(arguments.checkpoint, cohorts):
        if (cohort.fingerprint, label_digest(cohort)) != (cohorts[0].fingerprint, label_digest(cohorts[0])):
            raise InputError(f"{path}: was trained on other data or labels than {arguments.checkpoint[0]}; give both "
                             "the same by --data_dir, or score them apart")
    for name in ("baselines", "embeddings", "trajectory", "plots"):
        if len(cohorts) > 1 and getattr(arguments, name):
            raise InputError(f"--{name}: of one checkpoint, where {len(cohorts)} are given; leave it or the others out")


MOST_SHOWN = 5000  # points in the picture of the features


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


def print_sepsis(methods: dict) -> None:
    """The report of `sepsis_figures` by method: the first in full."""
    first = next(iter(methods.values()))
    lead = "none" if first["lead_hours"] is None else f"median {first['lead_hours']:.1f} hours"
    print("\nAs the PhysioNet/CinC Challenge 2019 scores (the onset is six hours after the first label 1)")
    print("Utility              {value:.4f}  95% [{0:.3f}, {1:.3f}]".format(*first["utility"]["interval"],
                                                                            value=first["utility"]["value"])
          + f"  (no alarm: 0, the best possible: 1; alarm from {first['threshold']:.4f} on)")
    for key, name in (("all_hours", "All hours"), ("until_the_onset", "Up to the onset")):
        print(f"{name:20} AUROC {{auroc:.4f}}, AUPRC {{auprc:.4f}}  ({{hours:,}} hours)".format(**first[key]))
    print("Septic stays warned  {share_warned:.1%}  "
          "({warned:,} of {septic_stays:,} have an alarm in the 12 hours before the onset)".format(**first))
    print(f"Lead time            {lead}  "
          "({lead_stays:,} stays; {labelled_from_the_first_hour:,} labelled from the first hour aside)".format(**first))
    print("False alarms         {false_alarms_a_day:.2f} a patient-day  "
          "({false_alarms:,} in {patient_days:,.0f} days)".format(**first))
    if len(methods) > 1:
        print(f"\n{'':32}  utility  95% interval     AUROC   AUPRC   warned  lead  false alarms a day")
        for name, told in methods.items():
            low, high = told["utility"]["interval"]
            lead = "-" if told["lead_hours"] is None else f"{told['lead_hours']:.1f}"
            print(f"{name:32}  {told['utility']['value']:7.4f}  [{low:.3f}, {high:.3f}]  "
                  "{auroc:.4f}  {auprc:.4f}  ".format(**told["all_hours"])
                  + f"{told['share_warned']:6.1%}  {lead:>4}  {told['false_alarms_a_day']:.2f}")


def write_table(path, table: pd.DataFrame) -> None:
    """As Parquet where the path ends so, else as CSV."""
    if Path(path).suffix != ".parquet":
        return write_atomically(path, lambda out: table.to_csv(out, index=False))
    try:
        import pyarrow  # noqa: F401 (of which pandas makes use)
    except ImportError:
        raise InputError(f"--predictions {path}: Parquet needs pyarrow; pip install pyarrow") from None
    write_atomically(path, lambda out: table.to_parquet(out, index=False))


def write_predictions(path, parts: dict, dataset, points, probability) -> None:
    """A row a prediction point of the data: its probability (empty: no answer),
    label (empty: none) and the split that the checkpoint knows its stay from."""
    cohort = dataset.cohort
    split, answers = np.full(len(cohort), "", dtype=object), np.full(len(cohort.answers), np.nan)
    for name, ids in parts.items():
        split[stays_of(cohort, ids)] = name
    answers[points] = probability
    stay = cohort.point_stay
    table = pd.DataFrame({"stay_id": cohort.stay_id[stay], "minute": cohort.point_minute, "probability": answers,
                          "split": split[stay],
                          "label": pd.array(cohort.answers[:, 0], dtype="Int64")})
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
    others = len(cohort.answers) - len(points)
    print(f"predictions: {len(table):,} points of {len(np.unique(stay)):,} subjects written to {path}; left out: "
          f"{(~mine).sum():,} of subjects that are not to be scored, {others:,} without an answer")


@torch.no_grad()
def write_embeddings(path, model, dataset, points, device) -> None:
    """Of every point the head input before standardisation [n, F] and h of its set [n, d]."""
    features, cohort = encode_points(model, dataset, points, device), dataset.cohort
    h = encode_points(model, dataset, points, device, history_at_points)

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
# One stay over time
# ----------------------------------------------------------------------------------------------------------------------

def print_trajectory(trajectory: dict) -> None:
    print(f"\nStay {trajectory['stay']} ({LABEL_NAMES[trajectory['label']]}): "
          f"risk at {len(trajectory['risk'])} times\n           hour  events    risk")
    hours = (np.array(trajectory["minute"]) - trajectory["admission"]) / 60
    for i, (hour, events, risk) in enumerate(zip(hours, trajectory["events"], trajectory["risk"])):
        print(f"{i + 1:5d}  {hour:8.2f}  {events:6d}  {risk:6.4f}  {'#' * round(40 * risk)}")
    moved = ", ".join(f"{name} {x:+.4f}" for name, x in list(influence(trajectory).items())[:5])
    if moved:
        print(f"most of the highest risk, {max(trajectory['risk']):.4f}, comes and goes with: {moved}")
