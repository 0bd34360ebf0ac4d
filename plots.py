"""Pictures, as figures of matplotlib. Lines differ in style as well as in colour, so that they are readable
in grey."""

import io
import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve
from sklearn.preprocessing import StandardScaler

from checkpoint import Checkpoint
from data import InputError, event_table, write_atomically
from metrics import CHECKPOINT, bracketed, calibration_curve, figure_title, incidence_curve, net_benefit


STYLES = [dict(color=color, linestyle=style)
          for color, style in (("black", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#888888", ":"),
                               ("#009E73", (0, (3, 1, 1, 1, 1, 1))))]
FAINT = dict(color="#999999", linewidth=.8)
LABEL_NAMES = {-1: "no label", 0: "label 0", 1: "label 1"}


def new_figure(columns: int, rows: int = 1, width: float = 4.4, height: float = 3.8, **options):
    """Returns a figure and its axes, row by row. width, height: inches of each. Without pyplot there is no
    window and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib; pip install matplotlib") from None
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(ax, columns: int = 0, **options) -> None:
    """Adds the legend inside the axes, or above them in this number of columns."""
    if columns:
        options |= {"ncols": columns, "loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0}
    ax.legend(frameon=False, fontsize=8, title_fontsize=8, **options)


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


def literal(figure):
    """Returns the figure, in which a `$` of a name is printed as it is and does not start a formula."""
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
    return figure


def save_figure(figure, path: Path) -> None:
    """Writes the figure in the format of the path's suffix."""
    literal(figure)
    write_atomically(path, lambda out: figure.savefig(out, format=path.suffix[1:], dpi=130))


def inline_svg(figure, name: str) -> str:
    """Returns the figure as an SVG element of a page, with its letters as text. Whatever is an address is
    left out, and each id begins with the `name`, so that the figures of a page have none in common."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        literal(figure).savefig(out, format="svg", metadata={"Date": None})
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", out.getvalue())
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg"):])
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)


# title, unit, and the columns of metrics.csv in training and on the validation stays
CURVES = [("loss", "loss", "loss", "val_loss"), ("KL divergence", "nats a set", "kl", "val_kl"),
          ("active units", "units of mu", "", "active_units"),
          ("AUROC", "AUROC", "", "val_auc"), ("AUPRC", "AUPRC", "", "val_auprc")]


def curve_panels(mode: str, path) -> list:
    """Returns (title, unit, epochs, {training or validation: values}, the epoch that was kept) of each of
    CURVES that the metrics.csv beside this checkpoint holds, and says so where there is none."""
    metrics = path and Path(path).with_name("metrics.csv")
    if not metrics or not metrics.is_file():
        print(f"pictures: no curves of the {mode} run, as no metrics.csv lies beside "
              f"{path or 'its checkpoint, which is unknown'}")
        return []
    try:
        kept = Checkpoint.open(path).metrics["epoch"]
    except InputError as error:
        print(f"pictures: no curves of the {mode} run: {error}")
        return []
    table, panels = pd.read_csv(metrics), []
    for title, unit, *columns in CURVES:
        lines = {name: table[column] for name, column in zip(("training", "validation"), columns)
                 if column in table}
        if lines:
            panels.append((f"{mode}: {title}", unit, table["epoch"], lines, kept))
    return panels


def plot_curves(checkpoint, pretrained):
    """Draws the epochs of the run that made the checkpoint and of the one that it was finetuned from, and
    marks those that were kept. Returns None where neither has a metrics.csv."""
    panels = curve_panels("pretraining", pretrained) + curve_panels("finetuning", checkpoint)
    if not panels:
        return None
    figure, axes = new_figure(3, -(-len(panels) // 3), height=3.2)
    for ax, (title, unit, epoch, lines, kept) in zip(axes, panels):
        ax.axvline(kept, **FAINT, label=f"kept: epoch {kept}")
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


def draw_ranking(roc, pr, label, probability, names: tuple[str, str], style: dict) -> None:
    """Draws the two curves of these probabilities [n], called by these names."""
    roc.plot(*roc_curve(label, probability)[:2], label=names[0], **style)
    precision, recall, _ = precision_recall_curve(label, probability)
    pr.plot(recall, precision, label=names[1], drawstyle="steps-post", **style)


def with_interval(measure: dict, digits: int = 3) -> str:
    value, limits = measure["value"], measure["interval"]
    return "undetermined" if value is None else f"{value:.{digits}f} {bracketed(limits, digits)}".rstrip()


def plot_ranking(label, methods: dict, figures: dict):
    """Draws ROC and precision-recall of the probabilities [n] of each method, and where the checkpoint's two
    thresholds of alarms lie. figures: see `metrics.score_figures`."""
    figure, (roc, pr) = ranking_axes()
    for (name, p), style in zip(methods.items(), itertools.cycle(STYLES)):
        own = figures["methods"][name]
        names = [f"{name} {with_interval(own[measure])}" for measure in ("auroc", "auprc")]
        draw_ranking(roc, pr, label, p, names, style)
    for threshold, marker in ((figures["alarm"]["threshold"], "o"), (figures["threshold"], "s")):
        tn, fp, fn, tp = confusion_matrix(label, methods[CHECKPOINT] >= threshold).ravel()
        style = dict(marker=marker, color="black", markerfacecolor="white", linestyle="", zorder=3,
                     label=f"alarms from {threshold:.3g} on")
        roc.plot(fp / (fp + tn), tp / (tp + fn), **style)
        if tp + fp:  # else there is no precision
            pr.plot(tp / (tp + fn), tp / (tp + fp), **style)
    roc.plot([0, 1], [0, 1], **FAINT)
    pr.axhline(label.mean(), **FAINT, label=f"prevalence {label.mean():.3f}")
    roc.set_title(f"ROC, {len(label):,} points")
    pr.set_title(f"Precision-recall, {label.sum():,} positive")
    legend(roc, title="AUROC [95% interval]", loc="lower right")
    legend(pr, title="AUPRC [95% interval]", loc="upper right")
    return figure


def plot_calibration(label, probability, figures: dict):
    """Draws the observed share of positives in each bin of the predicted probability, with its 95% interval,
    a smooth curve through the points, and how the probabilities [n] of each label lie. figures: see
    `metrics.score_figures`."""
    own, bins = figures["methods"][CHECKPOINT], pd.DataFrame(figures["calibration"])
    error = [bins["observed"] - bins["low"], bins["high"] - bins["observed"]]
    figure, (curve, spread) = new_figure(1, 2, width=5, height=3, sharex=True,
                                         gridspec_kw={"height_ratios": [3, 1]})
    figure.suptitle(f"Calibration: Brier {figures['brier']:.3f}, "
                    f"expected error {figures['calibration_error']:.3f}")
    top = min(1, 1.1 * max(bins["high"].max(), np.quantile(probability, .99)))
    curve.plot([0, 1], [0, 1], **FAINT, label="perfect")
    curve.plot(*calibration_curve(label, probability), **STYLES[1], label="smooth (spline)")
    curve.errorbar(bins["predicted"], bins["observed"], error, color="black", marker="o", markersize=4,
                   linestyle="", elinewidth=1, capsize=2,
                   label=f"{len(bins)} bins of equal counts, 95% interval")
    curve.set(ylabel="observed share of positives", xlim=(0, top), ylim=(0, top))
    legend(curve, 2, title=f"slope {with_interval(own['slope'], 2)}, "
                           f"intercept {with_interval(own['intercept'], 2)}")
    edges = np.linspace(0, top, 41)
    spread.hist(probability[label == 0].clip(max=top), edges, color="#bbbbbb", label=LABEL_NAMES[0])
    spread.hist(probability[label == 1].clip(max=top), edges, color="black", histtype="step",
                label=LABEL_NAMES[1])
    spread.set(xlabel="predicted probability", ylabel="points", yscale="log")
    # The usual formatters write powers as formulas, see `literal`.
    spread.yaxis.set_major_formatter("{x:g}")
    spread.yaxis.set_minor_formatter("")
    legend(spread, loc="upper right")
    return figure


def plot_new_site(curves: pd.DataFrame):
    """Draws the AUROC of each arm by the number of labelled stays, a panel for each site and the mean of the
    sites: columns labels, arm, site, auc; a row a draw."""
    sites, numbers = [*curves["site"].unique()], sorted(curves["labels"].unique())
    table = curves.groupby(["arm", "labels", "site"])["auc"].mean().unstack("site")
    figure, axes = new_figure(3, rows=-(-(2 + len(sites)) // 3), height=3, sharey=True)
    panels = {"mean of the sites": sites} | {site: [site] for site in sites}
    for ax, (title, shown) in zip(axes, panels.items()):
        for arm, style, marker in zip(curves["arm"].unique(), itertools.cycle(STYLES), "osv^DPX*"):
            of = table.loc[arm, shown].dropna().mean(axis=1)
            ax.plot([numbers.index(n) for n in of.index], of.to_numpy(), marker=marker, label=arm, **style)
        ax.set(title=title, xlabel="labelled stays of the site", ylabel="AUROC")
        ax.set_xticks(range(len(numbers)), [f"{n:,}" for n in numbers])
    for ax in axes[len(panels):]:
        ax.axis("off")
    axes[len(panels)].legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="center left")
    return figure


def plot_decision(label, methods: dict):
    """Draws the net benefit of alarms from a threshold on, beside alarms for all and for none, up to the
    threshold from which on no method differs from none."""
    figure, (ax,) = new_figure(1, width=6, height=4.5)
    most, last = label.mean(), label.mean()
    for (name, p), style in zip(methods.items(), itertools.cycle(STYLES)):
        curve = {key: np.array(values) for key, values in net_benefit(label, p).items()}
        threshold, benefit = curve["threshold"], curve["net_benefit"]
        ax.plot(threshold, benefit, label=name, **style)
        last = max(last, threshold[abs(benefit) > .01 * most].max(initial=0))
    ax.plot(threshold, curve["alarm_for_all"], **FAINT, label="alarm for all")
    ax.axhline(0, color="#888888", linestyle=(0, (1, 3)), label="alarm for none")
    ax.set(title=f"Decision curve, {label.sum():,} positive of {len(label):,}", ylabel="net benefit",
           xlabel="threshold of the probability", xlim=(0, min(1, 1.05 * last)),
           ylim=(-.2 * most, 1.1 * most))
    legend(ax)
    return figure


def binary_pictures(task, answers, methods: dict, figures: dict) -> dict:
    """Returns the pictures of an outcome that is 0 or 1, by name. As in those of the other kinds, answers are
    the true ones [n, A], methods {name: what it answers [n, k]}, figures those of the task. Where a method
    has no answer to some points (NaN), methods are drawn beside each other at the others alone."""
    label, methods = answers[:, 0].astype(int), {name: answer[:, 0] for name, answer in methods.items()}
    known = ~np.isnan(list(methods.values())).any(0)
    drawn = {name: p[known] for name, p in methods.items()}
    probable = {name: p for name, p in drawn.items() if 0 <= p.min() and p.max() <= 1}
    measures = figures.get("compare", figures)["methods"]
    return {"ranking": plot_ranking(label[known], drawn, figures | {"methods": measures}),
            "calibration": plot_calibration(label, methods[CHECKPOINT], figures),
            "decision": plot_decision(label[known], probable)}


def several_pictures(task, answers, methods: dict, figures: dict) -> dict:
    """ROC and precision-recall of each outcome."""
    figure, (roc, pr) = ranking_axes()
    for name, label, p, style in zip(task.names, answers.T, methods[CHECKPOINT].T, itertools.cycle(STYLES)):
        known = ~np.isnan(label)
        if (label == 1).any() and (label == 0).any():
            names = name, f"{name} (prevalence {label[known].mean():.3f})"
            draw_ranking(roc, pr, label[known], p[known], names, style)
    roc.plot([0, 1], [0, 1], **FAINT)
    legend(roc)
    legend(pr)
    return {"ranking": figure}


def classes_pictures(task, answers, methods: dict, figures: dict) -> dict:
    """How often a stay of each class is given each class as the likeliest."""
    classes, counts = range(len(task.names)), np.array(figures["confusion"])
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    figure, (ax,) = new_figure(1, width=2.5 + .7 * len(classes), height=2 + .6 * len(classes))
    ax.pcolormesh(classes, classes, shares, cmap="Greys", vmin=0, vmax=1, shading="nearest")
    ax.invert_yaxis()
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


def event_pictures(task, answers, methods: dict, figures: dict) -> dict:
    """A row a cause: its cumulative incidence in thirds of the risk at the largest horizon, observed (lines,
    see `incidence_curve`) and predicted (points); and at each horizon what came in fifths of the risk."""
    (hours, cause), horizons = answers.T, np.array(task.horizons)
    causes, given = len(task.names), methods[CHECKPOINT].reshape(len(answers), len(task.names), -1)
    figure, axes = new_figure(2, causes, width=5, height=4)
    until = np.linspace(0, horizons[-1], 200)
    for k, (name, (curve, calibration)) in enumerate(zip(task.names, axes.reshape(causes, 2))):
        risk = given[:, k]                                                                            # [n, H]
        third = np.searchsorted(np.quantile(risk[:, -1], (1 / 3, 2 / 3)), risk[:, -1])
        for part, (group, style) in enumerate(zip(("low", "middle", "high"), STYLES)):
            if (mine := third == part).any():
                came = incidence_curve(hours[mine], cause[mine], np.ones(mine.sum()), causes, until)[k]
                curve.plot(until, came, label=f"{group} risk ({mine.sum():,})", **style)
                curve.plot(horizons, risk[mine].mean(0), "o", color=style["color"], markersize=4)
        for hour, style in zip(task.horizons, itertools.cycle(STYLES)):
            fifths = pd.DataFrame(figures["calibration"][f"{name}_{hour:g}"]["fifths"])
            calibration.plot(fifths["predicted"], fifths["observed"], marker="o", markersize=4,
                             label=f"{hour:g} hours", **style)
        most = max(calibration.get_xlim()[1], calibration.get_ylim()[1])
        calibration.plot([0, most], [0, most], **FAINT)
        curve.set(title=f"{name}: observed, and predicted (points)", xlabel="hours from the question",
                  ylabel="cumulative incidence", xlim=(0, horizons[-1] * 1.02), ylim=0)
        calibration.set(title=f"{name}: calibration", xlabel="predicted, in fifths", ylabel="observed")
        legend(curve)
        legend(calibration)
    return {"incidence": figure}


OUTCOME_PICTURES = {"binary": binary_pictures, "several": several_pictures, "classes": classes_pictures,
                    "number": number_pictures, "event": event_pictures}


def plot_groups(task, figures: dict):
    """Draws what the checkpoint is judged by in each subgroup, with its intervals, beside that in all."""
    measures = ["auroc", "excess", "sensitivity", "ppv", "alarms"]
    if task.kind != "binary":
        measures = [name.removeprefix("val_") for name in task.untrained]
    rows = {f"all ({figures['stays']:,})": figures["methods"][CHECKPOINT]}
    rows |= {f"{variable} {key} ({group['stays']:,})": group
             for variable, groups in figures["subgroups"].items() for key, group in groups.items()}
    figure, axes = new_figure(len(measures), width=2 + 3 / len(measures), height=1.1 + .24 * len(rows),
                              sharey=True)
    for ax, measure in zip(axes, measures):
        found = {y: row[measure] for y, row in enumerate(rows.values()) if measure in row}
        found = {y: each for y, each in found.items() if each["value"] is not None}
        for y, each in found.items():
            ax.plot(each["interval"] or [], [y] * 2 if each["interval"] else [], color="black", linewidth=1)
            ax.plot(each["value"], y, "s" if y else "D", color="black", markersize=4)
        if 0 in found:
            ax.axvline(found[0]["value"], **FAINT)
        ax.set_title(figure_title(measure), fontsize=9)
        ax.tick_params(axis="x", labelsize=7)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].set_ylim(len(rows) - .5, -.5)
    return figure


def plot_features(features, label, risk):
    """Draws the standardised head inputs [n, F], clipped as the head clips them, on their first two principal
    components, coloured by the risk [n], with a marker for each label [n]."""
    pca = PCA(2, random_state=0)
    place = pca.fit_transform(StandardScaler().fit_transform(features.numpy()).clip(-5, 5))
    figure, (ax,) = new_figure(1, width=6, height=5)
    for value, marker, size in ((0, "o", 10), (1, "^", 22)):
        which = label == value
        points = ax.scatter(*place[which].T, c=risk[which], cmap="viridis_r", vmin=0, vmax=risk.max(), s=size,
                            marker=marker, edgecolors="black", linewidths=.3 * value,
                            label=f"{LABEL_NAMES[value]} ({which.sum():,})")
    figure.colorbar(points, label="risk")
    figure.suptitle(f"Stay features ({features.shape[1]}) in two dimensions")
    x, y = (f"principal component {i} ({share:.0%} of the variance)"
            for i, share in enumerate(pca.explained_variance_ratio_, 1))
    ax.set(xlabel=x, ylabel=y)
    legend(ax, 3)
    return figure


def plot_trajectory(trajectory: dict, dataset, stay: int, threshold: float | None):
    """Draws the risk over time; below it the events of the MOST_ROWS variables that move its last value most,
    low and high values marked; and beside them the last value of each, and by how much it moves the risk."""
    moved = pd.Series(trajectory["moved"], dtype=float)
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
    bars.set_xlabel(f"change of its {trajectory['scale']}", fontsize=8)
    return figure


def plot_importance(importance: dict, shown: dict):
    """Draws what moves the answers most, the MOST_ROWS first variables. importance: {outcome: {variable: mean
    size of its change}}; shown: {variable: its label}."""
    table = pd.DataFrame(importance)[:MOST_ROWS][::-1].rename(shown)
    figure, (ax,) = new_figure(1, width=5.5, height=1 + .2 * len(table))
    height, place = .8 / len(table.columns), np.arange(len(table))
    for k, (name, column) in enumerate(table.items()):
        ax.barh(place - k * height, column, height, color=STYLES[k % len(STYLES)]["color"], label=name)
    ax.set_yticks(place - .4 + height / 2, table.index, fontsize=7)
    ax.set(title="What moves the answers", xlabel="mean size of the change without a variable")
    if len(table.columns) > 1:
        legend(ax)
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
    ax.plot(hours[-1], risk[-1], "o", color="black", markerfacecolor="white", label=f"last, {risk[-1]:.3g}")
    if labelled := trajectory["labelled"]:
        ax.plot(time(labelled), np.zeros(len(labelled)), "s", color="#0072B2", markersize=4, clip_on=False,
                label="label 1")
    every = np.array([*trajectory["answers"].values()])
    ax.set(ylabel=trajectory["followed"],
           ylim=(1.1 * min(0, np.nanmin(every)), 1.1 * max(np.nanmax(every), threshold or 0)))


def draw_events(ax, dataset, stay: int, rows: pd.Index, time, begin: float) -> None:
    """Draws the events of these variables from minute `begin` on, each by how far its value lies from the
    mean, and writes the last value of each at the margin, in the unit of the data."""
    cohort, normalizer = dataset.cohort, dataset.normalizer
    events = event_table(cohort, np.array([stay]))
    events["row"] = rows.get_indexer(cohort.variables)[events["variable"]]
    last = events.groupby("row")["value"].last()  # that is a number
    events = events[(events["row"] >= 0) & (events["minute"] >= begin)]
    variable = dataset.variable[events["variable"]]
    z = np.where(normalizer.varies[variable], normalizer(variable, events["value"].to_numpy()), np.nan)
    for name, which, marker, color in (("1 sd below the mean or lower", z <= -1, "v", "#0072B2"),
                                       ("between, or no number", ~(abs(z) >= 1), ".", "#888888"),
                                       ("1 sd above or higher", z >= 1, "^", "black")):
        ax.scatter(time(events["minute"][which]), events["row"][which], s=13, label=name, marker=marker,
                   color=color)
    ax.set_yticks(range(len(rows)), [cohort.shown.get(name, name) for name in rows], fontsize=7)
    values = ["" if np.isnan(value) else cohort.shown.get(f"{name}={value:g}", f"{value:.4g}")
              for name, value in zip(rows, last.reindex(range(len(rows))))]
    margin = ax.secondary_yaxis("right")
    margin.set_yticks(range(len(rows)), values, fontsize=7)
    margin.spines["right"].set_visible(False)
    margin.tick_params(length=0)
    margin.set_ylabel("last value", fontsize=8)
    legend(ax, 3)
