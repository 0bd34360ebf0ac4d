"""Pictures, as figures of matplotlib. Lines differ in style as well as in colour, so that they are readable
in grey."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.metrics import precision_recall_curve, roc_curve
from sklearn.preprocessing import StandardScaler

from data import InputError, event_table, write_atomically
from explain import influence
from metrics import CHECKPOINT, net_benefit


STYLES = [dict(color=color, linestyle=style)
          for color, style in (("black", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#888888", ":"),
                               ("#009E73", (0, (3, 1, 1, 1, 1, 1))))]
FAINT = dict(color="#bbbbbb", linewidth=.8)
LABEL_NAMES = {-1: "no label", 0: "label 0", 1: "label 1"}


def new_figure(columns: int, rows: int = 1, width: float = 4.4, height: float = 3.8, **options):
    """Returns a figure and its axes, row by row. width, height: inches of each. Without pyplot there is no
    window and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plots needs matplotlib; pip install matplotlib") from None
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(ax, columns: int = 0, **options) -> None:
    """Adds the legend inside the axes, or above them in this number of columns."""
    if columns:
        options |= {"ncols": columns, "loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0}
    ax.legend(frameon=False, fontsize=8, **options)


def picture_folder(path) -> Path:
    """Makes the folder and returns it. Raises InputError where it or matplotlib is not to be had, before
    anything is computed."""
    new_figure(1)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plots {path}: cannot be made ({error.strerror}); "
                         "choose another folder") from None
    return Path(path)


def save_figure(figure, path: Path) -> None:
    """Writes the figure as PNG. A `$` in a name is printed as it is and does not start a formula."""
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
    write_atomically(path, lambda out: figure.savefig(out, format="png", dpi=130))


# title, unit, and the columns of metrics.csv in training and on the validation stays
CURVES = [("loss", "loss", "loss", "val_loss"), ("KL divergence", "nats a set", "kl", "val_kl"),
          ("active units", "units of mu", "", "active_units"),
          ("AUROC", "AUROC", "", "val_auc"), ("AUPRC", "AUPRC", "", "val_auprc")]


def curve_panels(mode: str, path) -> list:
    """Returns (title, unit, epochs, {training or validation: values}) of each of CURVES that the metrics.csv
    beside this checkpoint holds, and says so where there is none."""
    metrics = path and Path(path).with_name("metrics.csv")
    if not metrics or not metrics.is_file():
        print(f"pictures: no curves of the {mode} run, as no metrics.csv lies beside "
              f"{path or 'its checkpoint, which is unknown'}")
        return []
    table, panels = pd.read_csv(metrics), []
    for title, unit, *columns in CURVES:
        lines = {name: table[column] for name, column in zip(("training", "validation"), columns)
                 if column in table}
        if lines:
            panels.append((f"{mode}: {title}", unit, table["epoch"], lines))
    return panels


def plot_curves(checkpoint, pretrained):
    """Draws the epochs of the run that made the checkpoint and of the one that it was finetuned from. Returns
    None where neither has a metrics.csv."""
    panels = curve_panels("pretraining", pretrained) + curve_panels("finetuning", checkpoint)
    if not panels:
        return None
    figure, axes = new_figure(3, -(-len(panels) // 3), height=3.2)
    for ax, (title, unit, epoch, lines) in zip(axes, panels):
        for name, values in lines.items():
            ax.plot(epoch, values, marker="o", markersize=3, label=name, **STYLES[name == "validation"])
        ax.set(title=title, xlabel="epoch", xlim=(.5, epoch.max() + .5), ylabel=unit)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        legend(ax)
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    return figure


def ranking_axes():
    """Returns a figure and the axes of ROC and of precision-recall in it."""
    figure, (roc, pr) = new_figure(2, width=5, height=4.8)
    limits = dict(xlim=(0, 1), ylim=(0, 1.01))
    roc.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate", **limits)
    pr.set(title="Precision-recall", xlabel="recall", ylabel="precision", **limits)
    return figure, (roc, pr)


def plot_ranking(label, methods: dict, measured: dict):
    """Draws ROC and precision-recall of the probabilities [n] of each method. measured: {method: its AUROC
    and AUPRC}, see `metrics.score_figures`."""
    figure, (roc, pr) = ranking_axes()
    for (name, p), style in zip(methods.items(), itertools.cycle(STYLES)):
        auroc, auprc = (measured[name][measure]["value"] for measure in ("auroc", "auprc"))
        roc.plot(*roc_curve(label, p)[:2], label=f"{name} ({auroc:.3f})", **style)
        precision, recall, _ = precision_recall_curve(label, p)
        pr.plot(recall, precision, label=f"{name} ({auprc:.3f})", drawstyle="steps-post", **style)
    roc.plot([0, 1], [0, 1], **FAINT)
    pr.axhline(label.mean(), **FAINT, label=f"prevalence ({label.mean():.3f})")
    roc.set_title(f"ROC, {len(label):,} points")
    pr.set_title(f"Precision-recall, {label.sum():,} positive")
    legend(roc, title="AUROC", loc="lower right")
    legend(pr, title="AUPRC", loc="upper right")
    return figure


def plot_calibration(figures: dict):
    """Draws the observed share of positives in each bin of the predicted probability, with its 95% interval,
    and the number of points. figures: see `metrics.score_figures`."""
    bins = pd.DataFrame(figures["calibration"])
    error = [bins["observed"] - bins["low"], bins["high"] - bins["observed"]]
    figure, (curve, bars) = new_figure(1, 2, width=5, height=3, sharex=True,
                                       gridspec_kw={"height_ratios": [3, 1]})
    figure.suptitle(f"Calibration: Brier {figures['brier']:.3f}, "
                    f"expected error {figures['calibration_error']:.3f}")
    curve.plot([0, 1], [0, 1], **FAINT, label="perfect")
    curve.errorbar(bins["predicted"], bins["observed"], error, color="black", marker="o", markersize=4,
                   linewidth=1, capsize=2, label="this checkpoint, 95% interval")
    curve.set(ylabel="observed share of positives", xlim=(0, 1), ylim=(0, 1.01))
    legend(curve, 2)
    bars.bar(bins["from"] + .05, bins["points"], width=.09, color="#777777")
    bars.set(xlabel="predicted probability", ylabel="points")
    return figure


def plot_decision(label, methods: dict):
    """Draws the net benefit of alarms from a threshold on, beside alarms for all and for none."""
    figure, (ax,) = new_figure(1, width=6, height=4.5)
    for (name, p), style in zip(methods.items(), itertools.cycle(STYLES)):
        curve = net_benefit(label, p)
        ax.plot(curve["threshold"], curve["net_benefit"], label=name, **style)
    ax.plot(curve["threshold"], curve["alarm_for_all"], **FAINT, label="alarm for all")
    ax.axhline(0, **FAINT, label="alarm for none")
    most = label.mean()
    ax.set(title=f"Decision curve, {label.sum():,} positive of {len(label):,}", ylabel="net benefit",
           xlabel="threshold of the probability", xlim=(0, min(1, 5 * most)), ylim=(-.2 * most, 1.1 * most))
    legend(ax)
    return figure


def binary_pictures(task, answers, methods: dict, figures: dict) -> dict:
    """Returns the pictures of an outcome that is 0 or 1, by name. As in those of the other kinds, answers are
    the true ones [n, A], methods {name: what it answers [n, k]}, figures those of the task."""
    label, methods = answers[:, 0].astype(int), {name: answer[:, 0] for name, answer in methods.items()}
    return {"ranking": plot_ranking(label, methods, figures["methods"]),
            "calibration": plot_calibration(figures), "decision": plot_decision(label, methods)}


def several_pictures(task, answers, methods: dict, figures: dict) -> dict:
    """ROC and precision-recall of each outcome."""
    figure, (roc, pr) = ranking_axes()
    for name, label, p, style in zip(task.names, answers.T, methods[CHECKPOINT].T, itertools.cycle(STYLES)):
        known = ~np.isnan(label)
        if (label == 1).any() and (label == 0).any():
            roc.plot(*roc_curve(label[known], p[known])[:2], label=name, **style)
            precision, recall, _ = precision_recall_curve(label[known], p[known])
            pr.plot(recall, precision, label=f"{name} (prevalence {label[known].mean():.3f})",
                    drawstyle="steps-post", **style)
    roc.plot([0, 1], [0, 1], **FAINT)
    legend(roc)
    legend(pr)
    return {"ranking": figure}


def classes_pictures(task, answers, methods: dict, figures: dict) -> dict:
    """How often a stay of each class is given each class as the likeliest."""
    classes, counts = range(len(task.names)), np.array(figures["confusion"])
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    figure, (ax,) = new_figure(1, width=2.5 + .7 * len(classes), height=2 + .6 * len(classes))
    ax.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        ax.text(column, row, f"{counts[row, column]:,}\n{share:.0%}", ha="center", va="center", fontsize=8,
                color="white" if share > .5 else "black")
    ax.set_xticks(classes, task.names, rotation=30, ha="right")
    ax.set_yticks(classes, task.names)
    ax.set(title="Confusion: counts and shares of the true class", xlabel="likeliest class",
           ylabel="true class")
    return {"confusion": figure}


def number_pictures(task, answers, methods: dict, figures: dict) -> dict:
    """The median and its interval against the true number."""
    true, (median, low, high) = answers[:, 0], methods[CHECKPOINT].T
    figure, (ax,) = new_figure(1, width=6, height=5)
    ax.vlines(true, low, high, color="#bbbbbb", linewidth=.6, label="80% interval")
    ax.plot(true, median, ".", color="black", markersize=4, label="median")
    limits = np.percentile(np.concatenate([true, median]), [0, 99])
    ax.plot(limits, limits, **FAINT)
    ax.set(title=f"Predicted against true, {len(true):,} points (up to the 99th percentile)", xlabel="true",
           ylabel="predicted", xlim=limits, ylim=limits)
    legend(ax)
    return {"numbers": figure}


OUTCOME_PICTURES = {"binary": binary_pictures, "several": several_pictures, "classes": classes_pictures,
                    "number": number_pictures}


def plot_features(features, label):
    """Draws the standardised head inputs [n, F], clipped as the head clips them, on their first two principal
    components. label: [n], -1 without one."""
    pca = PCA(2, random_state=0)
    place = pca.fit_transform(StandardScaler().fit_transform(features.numpy()).clip(-5, 5))
    figure, (ax,) = new_figure(1, width=6, height=5)
    styles = {-1: dict(marker=".", color="#bbbbbb"),
              0: dict(marker="o", edgecolors="#888888", facecolors="none"),
              1: dict(marker="^", color="black")}
    for value, style in styles.items():
        if (which := label == value).any():
            ax.scatter(*place[which].T, s=14, linewidths=.6, alpha=.8,
                       label=f"{LABEL_NAMES[value]} ({which.sum():,})", **style)
    figure.suptitle(f"Stay features ({features.shape[1]}) in two dimensions")
    x, y = (f"principal component {i} ({share:.0%} of the variance)"
            for i, share in enumerate(pca.explained_variance_ratio_, 1))
    ax.set(xlabel=x, ylabel=y)
    legend(ax, 3)
    return figure


def plot_trajectory(trajectory: dict, dataset, stay: int, threshold: float | None):
    """Draws the risk over time; below it the events of the MOST_ROWS variables that move its last value
    most, low and high values marked; and beside them by how much each moves it."""
    moved = influence(trajectory)
    rows = moved[:MOST_ROWS][::-1]
    minute, begin = trajectory["minute"], trajectory["admission"]
    if max(minute) < begin:  # all of it lies before minute 0
        begin = min(minute)
    span = max(max(minute) - begin, 60)
    unit, length = ("hour", 60) if span < 21 * 1440 else ("day", 1440)

    def time(minutes):  # on the axis
        return (np.array(minutes) - trajectory["admission"]) / length

    figure, (risk, corner, chart, bars) = new_figure(
        2, 2, width=5.5, height=1.7 + .09 * len(rows), sharex="col", sharey="row",
        gridspec_kw={"width_ratios": [4, 1], "height_ratios": [2.2, .8 + .18 * len(rows)]})
    label = LABEL_NAMES.get(trajectory["label"], trajectory["label"])
    figure.suptitle(f"Stay {trajectory['stay']} ({label})")
    corner.set_axis_off()
    draw_risk(risk, trajectory, time, threshold)
    draw_events(chart, dataset, stay, rows.index, time, begin)
    chart.set(xlabel=f"{unit}s since admission", xlim=time(begin + np.array([-.01, 1.01]) * span),
              ylabel=f"{len(rows)} of {len(moved)} variables")
    if trajectory["onset"] is not None:
        for ax in (risk, chart):
            ax.axvline(time(trajectory["onset"]), color="#0072B2", linestyle="--", label="onset of sepsis")
    legend(risk, 5)
    bars.barh(range(len(rows)), rows, height=.6, color=np.where(rows > 0, "#D55E00", "#0072B2"))
    bars.axvline(0, color="black", linewidth=.8)
    bars.set_title(f"moves the last {trajectory['followed']}\n({unit} {time(minute[-1]):.3g}) by", fontsize=8)
    return figure


def plot_forecast(table: pd.DataFrame, dataset, stay: int):
    """Draws of the six variables of a stay with the most values what was known, the forecast with its 80%
    interval, and what came. table: forecasts of this stay, of which those of the last `known_until` count."""
    cohort = dataset.cohort
    table = table[table["known_until"] == table["known_until"].max()].sort_values("minute")
    known = table["known_until"].iloc[0] / 60
    charted = event_table(cohort, np.array([stay])).dropna()
    charted["variable"] = np.array(cohort.variables)[charted["variable"]]
    charted["hour"] = (charted["minute"] - cohort.admission[stay]) / 60
    count = charted["variable"].value_counts().reindex(table["variable"].unique()).fillna(0)
    names = count.sort_values(ascending=False, kind="stable").index[:6]
    figure, axes = new_figure(1, len(names), width=7, height=1.6, sharex=True)
    figure.suptitle(f"Stay {cohort.stay_id[stay]}: forecasts from hour {known:.4g} on")
    for ax, name in zip(axes, names):
        own, told = (rows[rows["variable"] == name] for rows in (charted, table))
        hour, came = told["minute"] / 60, own["hour"] > known
        ax.plot(own["hour"][~came], own["value"][~came], ".", color="#888888", label="known")
        ax.plot(own["hour"][came], own["value"][came], "x", color="#D55E00", label="what came")
        ax.fill_between(hour, told["low"], told["high"], color="#0072B2", alpha=.2)
        error = [told["mean"] - told["low"], told["high"] - told["mean"]]
        ax.errorbar(hour, told["mean"], np.maximum(error, 0), color="#0072B2", marker="o", markersize=2,
                    linewidth=1, elinewidth=0 if len(hour) > 1 else 1, label="forecast, 80% interval")
        ax.axvline(known, **FAINT)
        ax.set_ylabel(name, fontsize=8)
    axes[-1].set_xlabel("hours since admission")
    legend(axes[0], 3)
    return figure


MOST_ROWS = 24  # variables under a trajectory


def draw_risk(ax, trajectory: dict, time, threshold: float | None) -> None:
    """Draws the risk, and any other answers as faint lines. threshold: None where there are no alarms."""
    hours, risk = time(trajectory["minute"]), np.array(trajectory["risk"])
    highest = risk.max()
    for name, answer in trajectory["answers"].items():
        if name != trajectory["followed"]:
            ax.step(hours, answer, where="post", **FAINT)
            ax.annotate(name, (hours[-1], answer[-1]), fontsize=7, color="#888888", ha="right")
    ax.step(hours, risk, where="post", color="black")
    if threshold is not None:
        ax.fill_between(hours, threshold, risk, where=risk >= threshold, step="post", color="#D55E00",
                        alpha=.15, label="alarm")
        ax.axhline(threshold, color="#888888", linestyle=":", label=f"threshold {threshold:.3g}")
    ax.plot(time(trajectory["highest"]), highest, "o", color="#D55E00", label=f"highest, {highest:.3g}")
    if labelled := trajectory["labelled"]:
        ax.plot(time(labelled), np.zeros(len(labelled)), "s", color="#0072B2", markersize=4, clip_on=False,
                label="label 1")
    ax.set(ylabel=trajectory["followed"], ylim=0)


def draw_events(ax, dataset, stay: int, rows: pd.Index, time, begin: float) -> None:
    """Draws the events of these variables from minute `begin` on, each by how far its value lies from the
    mean."""
    cohort = dataset.cohort
    events = event_table(cohort, np.array([stay]))
    events["row"] = rows.get_indexer(cohort.variables)[events["variable"]]
    events = events[(events["row"] >= 0) & (events["minute"] >= begin)]
    z = dataset.normalizer(dataset.variable[events["variable"]], events["value"].to_numpy())
    for name, which, marker, color in (("1 sd below the mean or lower", z <= -1, "v", "#0072B2"),
                                       ("between, or no number", ~(abs(z) >= 1), ".", "#888888"),
                                       ("1 sd above or higher", z >= 1, "^", "black")):
        ax.scatter(time(events["minute"][which]), events["row"][which], s=13, label=name, marker=marker,
                   color=color)
    ax.set_yticks(range(len(rows)), rows, fontsize=7)
    legend(ax, 3)
