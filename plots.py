"""Pictures. Lines differ in style as well as in colour, so that they are readable in grey."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.metrics import (average_precision_score, brier_score_loss, precision_recall_curve,
                             roc_auc_score, roc_curve)
from sklearn.preprocessing import StandardScaler

from data import InputError, stay_event_index
from metrics import THRESHOLDS, calibration_error, net_benefit
from predictor import influence
from tables import write_atomically


STYLES = [dict(color=color, linestyle=style)
          for color, style in (("black", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#888888", ":"),
                               ("#009E73", (0, (3, 1, 1, 1, 1, 1))))]
LABEL_NAMES = {-1: "no label", 0: "label 0", 1: "label 1"}


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
