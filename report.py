"""The report of a finetuned checkpoint: `test_suite.py --checkpoint` prints its figures and writes what is
asked for."""

import difflib
import json
import os
import re
from dataclasses import replace
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtr

from baselines import beside_score, score_of, score_tables
from batches import answered_points, first_known
from checkpoint import Checkpoint, label_digest
from data import (SPLITS, InputError, event_table, make_splits, point_slots, point_table, shortest, stays_of,
                  write_atomically)
from explain import explanations, faithfulness, importance, moment, questions_at, scale
from history_statistics import real_sets
from metrics import CHECKPOINT, figure_title, format_table, mean_of_logits, measure_table
from page import characteristics, cohort_flow, table_parts, write_page
from plots import (LABEL_NAMES, OUTCOME_PICTURES, new_figure, picture_folder, plot_curves, plot_features,
                   plot_forecast, plot_groups, plot_importance, plot_trajectory, save_figure)
from predictor import (FORECAST, QUERY, Predictor, against_training, answer_queries, answered_queries,
                       beside_training, far_from_training, find_stay, forecast_at, forecasts_of, in_columns,
                       risk_over_time)
from questions import at_end, at_hours, labelled_points, stays_with
from readouts import FREEDOM
from runs import answers_at, encode_points, evaluation_loader, features_and_history
from settings import data_options
from tables import ID, TIME, of_each, read_table


# The options of the analysis, and those of them that also go with several checkpoints.
ANALYSIS = ("baselines", "predictions", "embeddings", "trajectory", "plots", "subgroups", "at_hours",
            "compare", "explain", "faithfulness", "json", "report")
OF_SEVERAL = ("predictions", "subgroups", "compare", "json")
# The files that options write, and how their names may end, which need no ending.
TABLES = (".csv", ".parquet")
WRITTEN = {"predictions": TABLES, "explain": TABLES, "forecast": TABLES, "odd": TABLES,
           "embeddings": (".npz",), "json": (".json",), "report": (".html", ".htm")}


def performance(arguments, baselines) -> None:
    """Prints the analysis of a finetuned checkpoint on the stays that it may be scored on (see
    `who_is_scored`), and writes what is asked for. Of several checkpoints the mean of their logits is
    scored."""
    folder = arguments.plots and picture_folder(arguments.plots)
    check_files(arguments)
    opened = open_together(arguments)
    predictor, dataset = opened[0]
    if predictor.checkpoint.mode == "pretrain":
        if len(opened) > 1 or any(getattr(arguments, name) for name in ANALYSIS if name != "json"):
            predictor.checkpoint.check_finetuned()
        return pretrained_report(arguments, predictor, dataset)
    cohort, task = dataset.cohort, predictor.model.task
    figures = origin(arguments.checkpoint, predictor.checkpoint, dataset)
    traced = find_stay(dataset, arguments.trajectory)
    if arguments.explain or arguments.faithfulness or arguments.report:
        moment(arguments.explain_at, predictor.checkpoint.metrics.get("threshold"))

    stays, who = who_is_scored(opened, arguments.split_file)
    answered = reduce(np.intersect1d, [answered_points(data) for _, data in opened])
    scored = points_to_score(cohort, stays, answered)
    scored_stays = stays_with(cohort, scored)
    to_file = arguments.predictions or arguments.embeddings
    if unscorable := task.lacking(cohort.answers[scored]):
        unscorable = (f"{cohort.reader}: the stays to be scored hold {unscorable} "
                      f"({len(scored_stays)} stays: {who}); {task.needed} needed")
        if arguments.report or not (to_file or arguments.trajectory or arguments.explain
                                    or arguments.faithfulness):
            raise InputError(f"{unscorable}; --predictions needs no label")
    looked_at = scored_stays if len(scored) else stays_with(cohort, answered)
    compared = against_training(dataset, looked_at)
    print_compared(compared)
    figures["variables"] = compared.to_dict("index")
    if arguments.report:
        parts = table_parts(predictor.checkpoint, cohort, scored_stays)
        figures |= {"flow": cohort_flow(predictor.checkpoint, cohort, stays, scored),
                    "characteristics": characteristics(cohort, parts)}
    if arguments.compare and not unscorable:
        score = score_of(arguments, cohort, scored)
    groups = {name: subgroups(cohort, scored, name) for name in arguments.subgroups}

    asked = answered if to_file else scored
    answers, thresholds = answers_of(arguments.checkpoint, opened, asked)
    write_answers(arguments, opened, asked, answers[CHECKPOINT], thresholds[CHECKPOINT], stays)

    methods = {name: answer[np.searchsorted(asked, scored)] for name, answer in answers.items()}
    if unscorable:
        print(f"nothing to score: {unscorable}")
    else:
        if baselines:
            others, others_thresholds = baseline_answers(arguments, baselines, opened[0], scored)
            methods |= others
            thresholds |= others_thresholds
        figures |= {"scored": who,
                    "threshold_is": threshold_source([each.checkpoint for each, _ in opened])}
        figures |= task.figures(cohort, scored, methods, thresholds, arguments.sensitivity, groups)
        if len(opened) == 1:
            figures["model"] = model_figures(predictor, dataset, scored_stays)
        tables = task.tables(figures)
        if arguments.at_hours:
            figures["at_hours"] = figures_at_hours(arguments.at_hours, predictor, dataset, stays,
                                                   methods[CHECKPOINT])
            tables |= tables_at_hours(figures)
        if arguments.compare:
            name = Path(arguments.compare).name
            methods[name] = score[:, None]
            figures["compare"] = beside_score(cohort, scored, methods, name)
            tables |= score_tables(figures["compare"])
        for title, table in tables.items():
            show(title, table)
    followed = traced
    if arguments.report and traced is None:
        followed = cohort.point_stay[scored[methods[CHECKPOINT][:, task.followed].argmax()]]
    if followed is not None:
        figures["trajectory"] = risk_over_time(predictor.model, dataset, followed, predictor.device)
    if arguments.trajectory:
        print_trajectory(figures["trajectory"], cohort.shown)
    figures |= why(arguments, predictor, dataset, stays, traced, looked_at)
    write_json(arguments.json, figures)
    if folder or arguments.report:
        images = pictures(figures, predictor, dataset, followed, scored, methods)
    if folder:
        save_pictures(folder, arguments.plot_format, images)
    if arguments.report:
        write_page(arguments.report, predictor, dataset, scored, figures, tables, images)


def check_files(arguments) -> None:
    """Raises InputError, before anything is computed, where a file that is asked for cannot be written or has
    the name of another."""
    if arguments.report is not None:
        new_figure(1)
    read = {name: getattr(arguments, name) for name in ("compare", "queries", "label_file", "split_file")}
    named = {Path(path).resolve(): f"--{name}" for name, path in read.items() if path}
    named |= {Path(path).resolve(): "--checkpoint" for path in arguments.checkpoint}
    for name, endings in WRITTEN.items():
        if (path := getattr(arguments, name)) is None:
            continue
        place = Path(path).resolve()
        device = place.exists() and not place.is_file()  # or a pipe
        ending = "" if device else place.suffix.lower()
        wrong = {"is a folder; name a file in it": place.is_dir(),
                 "its folder does not exist; make it, or name another place": not place.parent.is_dir(),
                 "its folder cannot be written to; name another place":
                     not os.access(place if device else place.parent, os.W_OK),
                 f"ends in {ending}; name it with {' or '.join(endings)}": ending not in ("", *endings),
                 "Parquet needs pyarrow; pip install pyarrow":
                     ending == ".parquet" and find_spec("pyarrow") is None,
                 f"is the file of {named.get(place)}; name another": place in named}
        for reason in (reason for reason, holds in wrong.items() if holds):
            raise InputError(f"--{name} {path}: {reason}")
        if not device:
            named[place] = f"--{name}"


def write_json(path: str | None, figures: dict) -> None:
    """Writes --json, where it is given."""
    if path:
        write_atomically(path, lambda out: out.write_text(json.dumps(figures, indent=1)))


# ------------------------------------------------------------------------------------------------------------
# Opened: the checkpoints, and where they come from
# ------------------------------------------------------------------------------------------------------------

def open_together(arguments) -> list[tuple]:
    """Returns a predictor and a dataset for each checkpoint. Raises InputError where several cannot be scored
    as one."""
    paths = arguments.checkpoint
    for name in ANALYSIS:
        if len(paths) > 1 and name not in OF_SEVERAL and getattr(arguments, name):
            raise InputError(f"--{name}: of one checkpoint, where {len(paths)} are given; leave it or the "
                             "others out")
    opened = [Predictor.with_data(path, data_options(arguments), arguments.device, arguments.set_heads,
                                  arguments.transformer_heads) for path in paths]
    others = [path for path, (_, data) in zip(paths, opened) if data.cohort.kind != "binary"]
    of_binary = {"--compare": arguments.compare, "several checkpoints": len(paths) > 1,
                 "--sensitivity": arguments.sensitivity != type(arguments).sensitivity}
    for name, asked in of_binary.items():
        if others and asked:
            raise InputError(f"{others[0]}: {name} is for binary outcomes, and its outcome is none; leave it "
                             "out")
    read = [(data.cohort.fingerprint, label_digest(data.cohort)) for _, data in opened]
    for path, its in zip(paths, read):
        if its != read[0]:
            raise InputError(f"{path}: was trained on other data or labels than {paths[0]}; give both "
                             "the same by --data_dir, or score them apart")
    if arguments.at_hours and opened[0][1].cohort.timed:
        raise InputError("--at_hours: these labels have times of their own; leave the option out")
    return opened


def origin(paths: list, checkpoint: Checkpoint, dataset) -> dict:
    """Prints what the data are and where the checkpoint comes from; returns the latter."""
    source = checkpoint.source
    figures = {"checkpoint": ", ".join(map(str, paths)), "epoch": checkpoint.metrics["epoch"],
               "command": source["command"], "seed": source.get("seed"), "data": source["fingerprint"],
               "versions": source["versions"], "reader": dataset.cohort.reader, "scored": None}
    print(dataset.cohort.describe())
    print(dataset.describe_known())
    print(f"checkpoint: {figures['checkpoint']}, epoch {figures['epoch']}, made by: {source['command']}")
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    print(f"checkpoint: seed {source.get('seed', 'unknown')}, data {source['fingerprint']}, {versions}")
    return figures


def print_compared(compared: pd.DataFrame) -> None:
    """Prints how the values that are scored lie beside those of training; see `against_training`."""
    if compared.empty:
        return
    clipped = compared.sort_values("clipped", ascending=False)["clipped"].head(3)
    share = np.average(compared["clipped"], weights=compared["values"])
    most = ", ".join(f"{name} {part:.2%}" for name, part in clipped.items() if part)
    print(f"data: {share:.2%} of these stays' values are clipped{', most of: ' * bool(most)}{most}")
    print(f"data: furthest from training lie {beside_training(compared, 3)}")
    for line in far_from_training(compared):
        print(f"warning: {line}")


# ------------------------------------------------------------------------------------------------------------
# Who is scored, at which points, in which groups
# ------------------------------------------------------------------------------------------------------------

def tested_stays(checkpoint: Checkpoint, cohort, split_file) -> tuple[np.ndarray, str]:
    """Returns the stays that a checkpoint may be scored on, and who they are: those that --split tests; else
    the recorded test split; of other data all. Subjects that it was trained or selected on are left out."""
    new = checkpoint.is_new(cohort)
    if split_file:
        stays, who = stays_of(cohort, make_splits(cohort, 0)["test"]), f"the test part of {split_file}"
    elif new:
        stays, who = np.arange(len(cohort)), "all labelled stays of other data than the checkpoint's"
    else:
        recorded_by = "data" if checkpoint.original else "checkpoint"
        stays = stays_of(cohort, checkpoint.split["test"])
        who = f"the test split that the {recorded_by} recorded"
    seen = np.isin(checkpoint.known_part(cohort)[stays], (0, 1))
    if seen.any():
        who += f"; {seen.sum():,} stays left out of subjects that the checkpoint was trained or selected on"
    return stays[~seen], who


def who_is_scored(opened: list, split_file) -> tuple[np.ndarray, str]:
    """Returns the stays that every checkpoint may be scored on, and who they are."""
    each = [tested_stays(predictor.checkpoint, data.cohort, split_file) for predictor, data in opened]
    who = each[0][1] if len(each) == 1 else "those that each of the checkpoints may be scored on"
    return reduce(np.intersect1d, [stays for stays, _ in each]), who


def points_to_score(cohort, stays, answered) -> np.ndarray:
    """Returns the labelled points of these stays that have an answer, and says which have none."""
    labelled = labelled_points(cohort, stays)
    lacking = np.setdiff1d(labelled, answered)
    if len(lacking):
        named = cohort.stay_id[cohort.point_stay[lacking[0]]]
        print(f"not scored: {len(lacking):,} labelled points, as nothing that the checkpoint knows lies "
              f"before them (stay {named} at minute {cohort.point_minute[lacking[0]]:g})")
    return np.intersect1d(labelled, answered)


def subgroups(cohort, points, name: str) -> dict[str, np.ndarray]:
    """Returns the groups of these points [m], ascending, by what their stays have: {value: mask [m]}.

    name: a variable, whose first value in the stay counts, or `events`: how many the stay had by its last
    point. More than six different numbers are put into quartiles. Variables without numbers such as ICUType=2
    or GENDER//F are the categories of one."""
    stays = np.unique(cohort.point_stay[points])
    found = events_until(cohort, points) if name == "events" else first_values(cohort, stays, name)
    found = found.astype(object)
    is_number = found.map(lambda value: isinstance(value, float)).astype(bool)
    number = found[is_number].astype(float).sort_values()
    if number.nunique() > 6:
        edges = np.unique(number.quantile([.25, .5, .75]))
        part = number.groupby(np.searchsorted(edges, number, side="right"))
        named = part.transform("min").map("{:g}".format) + " to " + part.transform("max").map("{:g}".format)
    else:
        named = number.map("{:g}".format)
    group = pd.concat([named, found[~is_number].sort_values()])
    group = group.map(lambda key: cohort.shown.get(f"{name}={key}", key))  # those shown alike are one
    keys = [*group.unique(), "not recorded"]
    group = group.reindex(cohort.point_stay[points], fill_value="not recorded").to_numpy()
    return {key: group == key for key in keys if (group == key).any()}


def first_values(cohort, stays, name: str) -> pd.Series:
    """Returns the first value of a variable in each of these stays that has one: a number, or a category's
    name."""
    pattern = re.compile(f"(?s){re.escape(name)}(?:(?:=|//)(.*))?")
    kinds = {v: found[1] for v, text in enumerate(cohort.variables) if (found := pattern.fullmatch(text))}
    if not kinds:
        known = {re.split("=|//", text)[0] for text in cohort.variables} | {"events"}
        near = difflib.get_close_matches(name, known, n=4, cutoff=.4)
        raise InputError(f"--subgroups {name}: no variable of the data{'; near: ' * bool(near)}"
                         f"{', '.join(near)}; give the names of variables, separated by commas, or events")
    table = event_table(cohort, stays).astype({"value": float})
    table = table[table["variable"].isin(list(kinds))]
    kind = table["variable"].map(kinds)  # None: the variable itself, whose value counts
    return kind.where(kind.notna(), table["value"]).dropna().groupby(table["stay"]).first()


def events_until(cohort, points) -> pd.Series:
    """Returns how many events each stay of these points had by the last of them."""
    stay = cohort.point_stay[points]
    _, slot = point_slots(cohort, np.arange(len(cohort)))
    first = cohort.stay_start[stay]
    count = cohort.set_start[first + slot[points] + 1] - cohort.set_start[first]
    return pd.Series(count.astype(float)).groupby(stay).max()


# ------------------------------------------------------------------------------------------------------------
# Answers, and the files that hold them
# ------------------------------------------------------------------------------------------------------------

def answers_of(paths: list, opened: list, points) -> tuple[dict, dict]:
    """Returns {method: answers [n, k] at these points} and {method: threshold} (None: of a kind without). The
    methods are CHECKPOINT and, where there are several, the path of each."""
    each = [answers_at(predictor.model, data, points, predictor.device) for predictor, data in opened]
    thresholds = [predictor.checkpoint.metrics.get("threshold") for predictor, _ in opened]
    if len(opened) == 1:
        return {CHECKPOINT: each[0]}, {CHECKPOINT: thresholds[0]}
    print(f"checkpoint: scored is the mean of the logits of {len(opened)} checkpoints")
    return tuple({CHECKPOINT: mean_of_logits(numbers)} | dict(zip(paths, numbers))
                 for numbers in (each, thresholds))


def baseline_answers(arguments, baselines, opened: tuple, scored) -> tuple[dict, dict]:
    """Returns {baseline: answers [n, k] at the scored points} and {baseline: threshold}, which the validation
    points choose (None: of a kind without)."""
    predictor, dataset = opened
    cohort = dataset.cohort
    valid = labelled_points(cohort, stays_of(cohort, predictor.checkpoint.split["valid"]))
    asked = np.union1d(valid, scored)
    answers = baselines(arguments, predictor.checkpoint, dataset, asked)
    at_valid = np.searchsorted(asked, valid)
    thresholds = {name: predictor.model.task.validation(cohort, valid, each[at_valid]).get("threshold")
                  for name, each in answers.items()}
    return {name: each[np.searchsorted(asked, scored)] for name, each in answers.items()}, thresholds


def write_answers(arguments, opened: list, points, answers, threshold: float | None, stays) -> None:
    """Writes --predictions and --embeddings. stays: those that may be scored."""
    predictor, dataset = opened[0]
    task, path = predictor.model.task, arguments.predictions
    if not len(points) and (path or arguments.embeddings):
        raise InputError(f"{dataset.cohort.reader}: no question has an answer, as nothing that the "
                         "checkpoint knows lies before any; give these stays' events, or their names by "
                         "--variables")
    of_meds = dataset.cohort.reader.startswith("MEDS") and task.kind == "binary"
    if path and of_meds and Path(path).suffix.lower() == ".parquet":
        write_meds_predictions(path, dataset.cohort, points, answers[:, 0], threshold, stays)
    elif path:
        splits = [each.checkpoint.split for each, _ in opened]
        write_predictions(path, task, splits, dataset.cohort, points, answers)
    if arguments.embeddings:
        write_embeddings(arguments.embeddings, predictor, dataset, points)


def write_table(path, table: pd.DataFrame) -> None:
    """Writes Parquet where the path ends in .parquet, else CSV."""
    write = table.to_parquet if Path(path).suffix.lower() == ".parquet" else table.to_csv
    write_atomically(path, lambda out: write(out, index=False))


def write_predictions(path, task, splits: list[dict], cohort, points, answers) -> None:
    """Writes a row for every prediction point of the data, with its answer [n, k] at these points (else
    empty), its label (empty: none) and the part of the checkpoint's split that holds its stay: of several
    splits the first of train, valid and test in which one of them has it."""
    stay, part = cohort.point_stay, np.full(len(cohort), "", dtype=object)
    for name in reversed(SPLITS):
        for split in splits:
            part[stays_of(cohort, split[name])] = name
    table = point_table(cohort, np.arange(len(stay))).assign(**in_columns(task, cohort, points, answers),
                                                             split=part[stay])
    table = table.join(task.labels(cohort.answers))
    write_table(path, table)
    print(f"predictions: {len(table):,} points of {len(np.unique(stay)):,} stays written to {path}")
    empty = table[table[task.columns[0]].isna()]
    if len(empty):
        print(f"predictions: {len(empty):,} without an answer, as nothing that the checkpoint knows lies "
              f"before them (stay {empty['stay_id'].iloc[0]} at minute {empty['minute'].iloc[0]:g})")


def write_meds_predictions(path, cohort, points, probability, threshold: float, stays) -> None:
    """Writes the answered points of these stays, which may be scored, in the columns and types that the
    package meds-evaluation takes. Times are exact to the microsecond."""
    mine = np.isin(cohort.point_stay[points], stays)
    stay, label = cohort.point_stay[points[mine]], cohort.answers[points[mine], 0]
    table = pd.DataFrame({
        "subject_id": cohort.stay_id[stay].astype(np.int64),
        "prediction_time": cohort.clock(stay, cohort.point_minute[points[mine]]),
        "boolean_value": pd.array(label, dtype="boolean"),
        "predicted_boolean_value": probability[mine] >= threshold,
        "predicted_boolean_probability": probability[mine].astype(np.float32)})
    write_table(path, table)
    others = len(cohort.answers) - len(points)
    print(f"predictions: {len(table):,} points of {len(np.unique(stay)):,} subjects written to {path}; left "
          f"out: {(~mine).sum():,} of subjects that are not to be scored, {others:,} without an answer")


def write_embeddings(path, predictor, dataset, points) -> None:
    """Writes the head input of every point before standardisation [n, F], and h of its set [n, d]."""
    model, cohort = predictor.model, dataset.cohort
    both = encode_points(model, dataset, points, predictor.device, features_and_history)
    features, h = both.tensor_split([-model.config.latent_dim], dim=1)

    def write(out):
        with open(out, "wb") as file:  # given a name, NumPy would append .npz
            np.savez(file, stay_id=cohort.stay_id[cohort.point_stay[points]],
                     minute=cohort.point_minute[points], features=features.cpu().numpy(), h=h.cpu().numpy())
    write_atomically(path, write)
    print(f"embeddings: {len(points):,} points, features [{features.shape[1]}] and h [{h.shape[1]}], "
          f"written to {path}")


# ------------------------------------------------------------------------------------------------------------
# Figures, printed
# ------------------------------------------------------------------------------------------------------------

def model_figures(predictor, dataset, stays) -> dict:
    """Returns the sizes of head and model, and the `active_units`."""
    model = predictor.model
    return {"head_parameters": sum(p.numel() for p in model.cls_head.parameters()),
            "parameters": sum(p.numel() for p in model.parameters()),
            "active_units": active_units(predictor, dataset, stays), "latent_dim": model.config.latent_dim}


@torch.no_grad()
def active_units(predictor, dataset, stays) -> int:
    """Returns how many units of mu have a variance over the sets of these stays above 0.01 (Burda et al.
    2016, section 5.2)."""
    mu = torch.cat([predictor.model.setvae.encode(batch)[0][real_sets(batch)]
                    for batch in evaluation_loader(dataset, stays, predictor.device)])
    return int((mu.var(0) > 0.01).sum())


def figures_at_hours(hours: tuple, predictor, dataset, stays, own: np.ndarray) -> list[dict]:
    """Returns the figures of the task for these stays, asked at each of these hours after admission or, where
    a record ends before, at its end; and last (`hour` None) at the questions themselves, where the answers
    are its `own` [n, k]. Alarms begin at the checkpoint's threshold throughout. Where the labels do not
    suffice, `lacking` says why instead."""
    task, threshold = predictor.model.task, predictor.checkpoint.metrics.get("threshold")
    ends, found = at_end(dataset.cohort).point_minute, []
    for hour in [*np.unique(hours).tolist(), None]:
        asked = dataset if hour is None else dataset.of(at_hours(dataset.cohort, hour))
        cohort = asked.cohort
        labelled = np.flatnonzero(cohort.labelled & np.isin(cohort.point_stay, stays))
        points = np.intersect1d(labelled, answered_points(asked))
        ended = cohort.point_minute[points] >= ends[cohort.point_stay[points]]
        row = {"hour": hour, "at_the_end": int(ended.sum()), "unanswered": len(labelled) - len(points)}
        if lacking := task.lacking(cohort.answers[points]):
            row["lacking"] = lacking
        else:
            answers = own if hour is None else answers_at(predictor.model, asked, points, predictor.device)
            row |= task.figures(cohort, points, {CHECKPOINT: answers}, {CHECKPOINT: threshold}, None, {})
        found.append(row)
    return found


AT_HOURS = {"stays": "{stays:,}", "asked at the end of their record": "{at_the_end:,}",
            "not scored: nothing known yet": "{unanswered:,}"}
PROBABLE = {"positive": "{prevalence:.1%}", "mean probability": "{probability[mean]:.1%}",
            "Brier score": "{brier:.3f}"}


def tables_at_hours(figures: dict) -> dict[str, pd.DataFrame]:
    """Returns `figures_at_hours` as a table, by its title."""
    rows = {"the question" if row["hour"] is None else f"hour {row['hour']:g}": row
            for row in figures["at_hours"]}
    title = "At hours after admission, of which a record that ends before is asked at its end"
    title += "".join(f"\n{name}: nothing to score: {row['lacking']}" for name, row in rows.items()
                     if "lacking" in row)
    rows = {name: row for name, row in rows.items() if "lacking" not in row}
    measures = {name: row["methods"][CHECKPOINT] for name, row in rows.items()}
    question = rows["the question"]
    if "threshold" in question:
        title += f"\nalarms from {question['threshold']:.4f} on at each ({figures['threshold_is']})"
    sizes = format_table(rows, AT_HOURS | (PROBABLE if "brier" in question else {}))
    titles = {name: figure_title(name) for name in measures["the question"]}
    return {title: sizes.join(measure_table(measures, titles, digits=3)).T}


def threshold_source(checkpoints: list[Checkpoint]) -> str:
    first, *others = checkpoints
    if others:
        return "the mean of their thresholds"
    if first.original:
        return "no threshold was recorded"
    return f"best {'utility' if 'val_utility' in first.metrics else 'F1'} of the validation split"


def show(title: str, table: pd.DataFrame) -> None:
    """Prints a table of texts under its title, after an empty line, with the texts to the left."""
    table = table.apply(lambda column: column.str.ljust(max(len(column.name), *column.str.len())))
    lines = table.to_string(justify="left").splitlines()
    print(f"\n{title}", *map(str.rstrip, lines), sep="\n")


def print_trajectory(trajectory: dict, shown: dict) -> None:
    """Prints the answers at each time, and what moves the last risk. shown: {variable: its label}."""
    risk, followed = np.array(trajectory["risk"]), trajectory["followed"]
    hours = (pd.Series(trajectory["minute"]) - trajectory["admission"]) / 60
    bars = (40 * risk.clip(0) / max(1, risk.max())).round().astype(int)
    table = pd.DataFrame({"hour": hours.map("{:.2f}".format), "events": map(str, trajectory["events"]),
                          **{name: map("{:.4f}".format, answer)
                             for name, answer in trajectory["answers"].items()}, "": ["#" * n for n in bars]})
    label = LABEL_NAMES.get(trajectory["label"], trajectory["label"])
    show(f"Stay {trajectory['stay']} ({label}): {followed} at {len(risk)} times", table)
    moved = ", ".join(f"{shown.get(name, name)} {change:+.3f}"
                      for name, change in list(trajectory["moved"].items())[:5] if change is not None)
    if moved:
        of = f"the {trajectory['scale']} of " * (trajectory["scale"] != followed)
        print(f"what moves {of}the last {followed}, {risk[-1]:.4f}, most: {moved}")


# ------------------------------------------------------------------------------------------------------------
# Why
# ------------------------------------------------------------------------------------------------------------

MOST_EXPLAINED = 500  # stays over which the global importance is averaged


def why(arguments, predictor, dataset, stays, traced: int | None, looked_at) -> dict:
    """Writes --explain of these stays, or of the one that is `traced`, and returns what the figures then hold
    of seeded draws of the stays `looked_at`: importance and faithfulness."""
    figures, seen = {}, drawn(looked_at, MOST_EXPLAINED)
    if arguments.explain:
        explained = stays if traced is None else np.array([traced])
        table = write_explanations(arguments, predictor, dataset, explained)
    of_all = arguments.explain and traced is None
    if of_all:
        table = table[table["stay_id"].isin(dataset.cohort.stay_id[seen])]
    elif arguments.report:
        asked, points = questions_of(arguments, predictor, dataset, seen)
        table = explanations(predictor.model, asked, points, predictor.device, events=0)
    if of_all or arguments.report:
        figures["importance"] = print_importance(table, predictor.model.task,
                                                 dataset.cohort.shown)
    if arguments.faithfulness:
        figures["faithfulness"] = faithfulness_figures(
            arguments, predictor, dataset, drawn(looked_at, arguments.faithfulness))
    return figures


def drawn(stays, most: int) -> np.ndarray:
    """Returns a seeded draw of at most so many of these stays, or points, ascending."""
    return np.sort(np.random.default_rng(0).permutation(stays)[:most])


def questions_of(arguments, predictor, dataset, stays) -> tuple:
    """Returns what `questions_at` gives for --explain_at, and says of how many stays it is."""
    asked, points = questions_at(predictor.model, dataset, stays, arguments.explain_at,
                                 predictor.checkpoint.metrics.get("threshold"), predictor.device)
    lacking = len(stays) - len(stays_with(asked.cohort, points))
    print(f"explain: {len(points):,} questions, at {arguments.explain_at}; left out: {lacking:,} stays "
          "without one that has an answer")
    return asked, points


def write_explanations(arguments, predictor, dataset, stays) -> pd.DataFrame:
    """Writes --explain of these stays and returns it."""
    asked, points = questions_of(arguments, predictor, dataset, stays)
    table = explanations(predictor.model, asked, points, predictor.device, arguments.explain_events)
    write_table(arguments.explain, table)
    print(f"explain: {len(table):,} rows written to {arguments.explain}; {table['change'].isna().sum():,} "
          "without a change, as nothing would be left to answer by")
    print("explain: the file holds patients' values; keep it as you keep their records")
    return table


def print_importance(table: pd.DataFrame, task, shown: dict) -> dict:
    """Prints and returns `importance`, {outcome: {variable: mean size of its change}}, of the rows that have
    a change; nothing where none has. shown: {variable: its label}."""
    table = table[table["change"].notna()]
    if table.empty:
        return {}
    means, questions = importance(table), len(table[["stay_id", "minute"]].drop_duplicates())
    show(f"What moves the answers: mean |change| of the {scale(task)} without a variable, over {questions:,} "
         "questions", means.head(20).rename(shown).map("{:.4f}".format).rename_axis(None)
         .rename_axis(columns=None))
    return means.to_dict()


def faithfulness_figures(arguments, predictor, dataset, stays) -> dict:
    """Prints and returns `faithfulness` over these stays."""
    asked, points = questions_of(arguments, predictor, dataset, stays)
    figures = faithfulness(predictor.model, asked, points, predictor.device)
    columns = {"raises": "area, events that raise first", "lowers": "area, events that lower first"}
    if predictor.model.task.kind == "binary":
        columns["auroc"] = "AUROC without 5% of the events"
    show(f"Faithfulness of explanations over {len(points):,} questions: area between the change of the "
         f"{scale(predictor.model.task)}\nover the share of events removed (0 to 0.5) and that of random "
         "orders; 95% intervals by bootstrap over stays", measure_table(figures["rows"], columns))
    return figures


# ------------------------------------------------------------------------------------------------------------
# Forecasts
# ------------------------------------------------------------------------------------------------------------

_QUERY_COLUMNS = {"stay_id": ID, "known_until": TIME, "minute": TIME, "variable": str}


def forecasts(arguments) -> None:
    """Writes --forecast or --odd, and draws the --trajectory's forecasts in --plots."""
    folder = arguments.plots and picture_folder(arguments.plots)
    path = arguments.forecast or arguments.odd
    check_files(arguments)
    if arguments.forecast and (arguments.queries is None) == (arguments.until is None):
        raise InputError(f"--forecast {path}: give either --queries FILE or --until HOURS")
    if bool(arguments.plots) != bool(arguments.trajectory):
        raise InputError(f"--forecast {path}: --plots DIR and --trajectory STAY draw it together; give both")
    Checkpoint.open(arguments.checkpoint[0]).check_forecasts()
    ((predictor, dataset),) = open_together(arguments)
    origin(arguments.checkpoint, predictor.checkpoint, dataset)
    traced = find_stay(dataset, arguments.trajectory)
    if arguments.odd:
        table = odd_values(predictor, dataset)
        write_table(path, table)
        others, odd = len(dataset.cohort.event_value) - len(table), (table["tail"] < .001).sum()
        print(f"odd: {len(table):,} values written to {path}, {odd:,} of them with a tail below .001; left "
              f"out: {others:,} events without an earlier set or without a number")
        return
    if arguments.queries:
        queries = read_queries(Path(arguments.queries))
    else:
        queries = grid_of_queries(dataset, arguments.origin, arguments.until, arguments.every)
    answers, lines = answered_queries(predictor, dataset, queries, arguments.queries or "--until")
    table = queries.assign(**{name: answers[name] for name in FORECAST})
    write_table(path, table)
    print(f"forecast: {len(table):,} queries of {table['stay_id'].nunique():,} stays written to {path}",
          *(f"forecast: {line}" for line in lines), sep="\n")
    if folder and traced is not None:
        own = table[(table["stay_id"] == dataset.cohort.stay_id[traced]) & table["mean"].notna()]
        if own.empty:
            raise InputError(f"--trajectory {arguments.trajectory}: nothing was forecast of this stay")
        save_pictures(folder, arguments.plot_format, {"forecast": plot_forecast(own, dataset, traced)})


def read_queries(path: Path) -> pd.DataFrame:
    """The `QUERY` columns of a file, CSV or Parquet. Raises InputError where it is none."""
    table = read_table([path], _QUERY_COLUMNS)
    table.report.settle()
    return pd.DataFrame({name: of_each(table[name], str, "") if isinstance(table[name], pd.Categorical)
                         else table[name] for name in QUERY})


def grid_of_queries(dataset, origin: float | None, until: float, every: float | None
                    ) -> pd.DataFrame:
    """`QUERY` of every stay and every variable with numbers: known until `origin` hours (None: the end of the
    record), at each `every` minutes up to `until` hours after it (None: then alone)."""
    cohort, normalizer = dataset.cohort, dataset.normalizer
    names = np.array(normalizer.variables, dtype=object)[normalizer.numeric]
    ends = cohort.set_end(cohort.stay_start[1:] - 1)
    known = ends - cohort.admission if origin is None else np.full(len(cohort), 60. * origin)
    stays = np.flatnonzero(first_known(dataset) <= known + cohort.admission)
    if len(stays) < len(cohort):
        print(f"forecast: {len(cohort) - len(stays):,} stays left out, as nothing that the checkpoint knows "
              "lies before their origin")
    later = 60. * until if every is None else np.arange(1, 60 * until // every + 1) * every
    later = np.atleast_1d(later)
    each = len(names) * len(later)
    known = np.repeat(known[stays], each)
    return pd.DataFrame({"stay_id": np.repeat(cohort.stay_id[stays], each), "known_until": known,
                         "minute": known + np.tile(np.repeat(later, len(names)), len(stays)),
                         "variable": np.tile(names, len(stays) * len(later))})


def odd_values(predictor: Predictor, dataset, stays=slice(None)) -> pd.DataFrame:
    """Every charted value of these stays beside what was expected of it from the sets of earlier minutes: a
    row, with its index, an event with a number and an earlier set: stay_id, minute, variable, value,
    expected, low, high, and tail, the chance of a value as far out on either side, 2 min(F, 1 - F) of the
    Student-t."""
    cohort, normalizer = dataset.cohort, dataset.normalizer
    stay = np.repeat(np.arange(len(cohort)), np.diff(cohort.stay_start))                                # [T]
    new = (np.diff(stay, prepend=-1) != 0) | (np.diff(cohort.set_minute, prepend=np.nan) != 0)
    point = np.cumsum(new) - 1                                            # [T] the minutes, as points
    asked = replace(cohort, point_start=np.searchsorted(stay[new], np.arange(len(cohort) + 1)),
                    point_minute=cohort.set_minute[new], answers=np.full((new.sum(), 1), np.nan, np.float32))
    sets = np.repeat(np.arange(len(stay)), np.diff(cohort.set_start))                                   # [E]
    variable = dataset.variable[cohort.event_variable]
    minutes = asked.point_minute[asked.point_start[:-1]]
    chosen = np.zeros(len(cohort), dtype=bool)
    chosen[stays] = True
    judged = (variable >= 0) & ~np.isnan(cohort.event_value) & normalizer.numeric[variable]
    judged &= (chosen[stay] & (cohort.set_minute > minutes[stay]))[sets]
    event = np.flatnonzero(judged)
    sets, variable, value = sets[event], variable[event], shortest(cohort.event_value[event])
    answers = answer_queries(predictor.model, dataset.of(asked), point[sets] - 1, variable,
                             cohort.set_minute[sets], predictor.device)
    forecasts = forecasts_of(normalizer, variable, answers)
    z = (normalizer.unclipped(variable, value) - forecasts["location"]) * np.exp(-forecasts["log_scale"])
    return pd.DataFrame({"stay_id": cohort.stay_id[stay[sets]],
                         "minute": cohort.set_minute[sets] - cohort.admission[stay[sets]],
                         "variable": np.array(normalizer.variables, dtype=object)[variable], "value": value,
                         "expected": forecasts["mean"], "low": forecasts["low"], "high": forecasts["high"],
                         "tail": 2 * stdtr(FREEDOM, -z.abs())}).set_axis(event)


def pretrained_report(arguments, predictor, dataset) -> None:
    """Prints what a pretrained checkpoint forecasts of the stays that it may be scored on, beside the last
    value, and its active units; writes --json."""
    stays, who = tested_stays(predictor.checkpoint, dataset.cohort, arguments.split_file)
    figures = origin(arguments.checkpoint, predictor.checkpoint, dataset)
    figures |= {"scored": who, "forecast": forecast_figures(predictor, dataset, stays),
                "active_units": active_units(predictor, dataset, stays),
                "latent_dim": predictor.model.config.latent_dim}
    told = figures["forecast"]
    rows = pd.DataFrame(told["variables"]).T.sort_values("values", ascending=False)
    shown = pd.DataFrame({"values": rows["values"].map("{:,.0f}".format), "skill": rows["skill"].map(
        "{:.3f}".format), "error": rows["error"].map("{:.3g}".format), "error of the last value":
        rows["error_of_last"].map("{:.3g}".format), "coverage": rows["coverage"].map("{:.1%}".format)})
    print(f"\nScored: {len(stays):,} stays: {who}")
    show(f"Forecasts of the second half of each record: {told['values']:,} values of {len(rows)} variables; "
         f"in the mean of these skill {told['skill']:.3f}, coverage of the 80% interval "
         f"{told['coverage']:.1%}\n(skill: 1 - squared error / that of the last value, or where none is "
         "of the training mean; error: mean absolute)", shown.head(24))
    if len(rows) > 24:
        print(f"... and {len(rows) - 24} more (--json has all)")
    print(f"\nActive units: {figures['active_units']} of {figures['latent_dim']} (variance of mu over sets > "
          "0.01)")
    write_json(arguments.json, figures)


def forecast_figures(predictor, dataset, stays) -> dict:
    """Returns the figures of every value in the second half of each of these stays, in time, asked from the
    first half: of each variable with ten values or more, and their plain mean."""
    cohort, normalizer = dataset.cohort, dataset.normalizer
    first, last = cohort.set_minute[cohort.stay_start[:-1]], cohort.set_minute[cohort.stay_start[1:] - 1]
    half = np.maximum((first + last) / 2, first_known(dataset))
    table = event_table(cohort, stays).astype({"value": float}).dropna()
    table["variable"] = dataset.variable[table["variable"]]
    table = table[(table["variable"] >= 0) & normalizer.numeric[table["variable"]]]
    known = table["minute"] <= half[table["stay"]]
    usual = table[known].groupby(["stay", "variable"])["value"].last().rename("last")
    table = table[~known].join(usual, on=["stay", "variable"])
    variable = table["variable"].to_numpy()
    counts = np.bincount(variable, minlength=1)
    if counts.max() < 10:
        raise InputError(f"{cohort.reader}: the stays to be scored have no ten values of any variable in the "
                         "second half of their records, by which forecasts are scored; give more stays")
    told = forecast_at(predictor.model, dataset, table["stay"].to_numpy(), half[table["stay"]], variable,
                       table["minute"].to_numpy(), predictor.device).set_index(table.index)
    table["last"] = table["last"].fillna(pd.Series(normalizer.in_units(variable, 0.), table.index))
    error, error_of_last = table["value"] - told["mean"], table["value"] - table["last"]
    within = table["value"].between(told["low"] - 1e-6 * told["low"].abs(),
                                    told["high"] + 1e-6 * told["high"].abs())  # float32 values
    by = pd.DataFrame({"variable": variable, "values": 1, "square": error**2, "of_last": error_of_last**2,
                       "error": error.abs(), "error_of_last": error_of_last.abs(), "coverage": within})
    by = by.groupby("variable").agg({"values": "sum"} | dict.fromkeys(by.columns[2:], "mean"))
    by = by[by["values"] >= 10]
    by["skill"] = (1 - by["square"] / by["of_last"]).where(by["of_last"] > 0)
    rows = {normalizer.variables[v]: row.dropna().to_dict()
            for v, row in by.drop(columns=["square", "of_last"]).iterrows()}
    return {"values": int(by["values"].sum()), "skill": float(by["skill"].mean()),
            "coverage": float(by["coverage"].mean()), "variables": rows}


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------

MOST_SHOWN = 5000  # points in the picture of the features


def pictures(figures: dict, predictor, dataset, traced, scored, methods: dict) -> dict:
    """Returns the pictures by their names. scored: the scored points, [n] as the answers of each of `methods`
    [n, k]."""
    checkpoint, task = predictor.checkpoint, predictor.model.task
    curves = plot_curves(checkpoint.path, checkpoint.source.get("pretrained_ckpt"))
    images = {"curves": curves} if curves else {}
    if figures["scored"]:
        answers = dataset.cohort.answers[scored]
        images |= OUTCOME_PICTURES[task.kind](task, answers, methods, figures)
        if figures["subgroups"]:
            images["subgroups"] = plot_groups(task, figures)
        if task.kind == "binary":
            label, risk = answers[:, 0].astype(int), methods[CHECKPOINT][:, 0]
            shown = drawn(np.arange(len(scored)), MOST_SHOWN)
            features = encode_points(predictor.model, dataset, scored[shown], predictor.device).cpu()
            images["features"] = plot_features(features, label[shown], risk[shown])
    if figures.get("importance"):
        images["importance"] = plot_importance(figures["importance"], dataset.cohort.shown)
    if traced is not None:
        threshold = checkpoint.metrics.get("threshold")
        images["trajectory"] = plot_trajectory(figures["trajectory"], dataset, traced, threshold)
    return images


def save_pictures(folder: Path, kind: str, images: dict) -> None:
    """Writes the pictures as files of this kind."""
    for name, figure in images.items():
        save_figure(figure, folder / f"{name}.{kind}")
    print(f"pictures: {', '.join(f'{name}.{kind}' for name in sorted(images))} in {folder}")
