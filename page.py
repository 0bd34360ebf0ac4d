"""The report of a finetuned checkpoint as one HTML page, to hand in or to print: no script, no address, and
its pictures inside. It fills in what software can know of the items of TRIPOD+AI (Collins et al., BMJ
2024;385:e078378)."""

import hashlib
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from checkpoint import Checkpoint, git_commit
from data import SPLITS, event_table, met, stays_of, write_atomically
from explain import scale
from plots import inline_svg
from questions import describe_questions, labelled_points, stays_with


# ------------------------------------------------------------------------------------------------------------
# Of whom: the flow of the cohort, and Table 1
# ------------------------------------------------------------------------------------------------------------

def cohort_flow(checkpoint: Checkpoint, cohort, stays, scored) -> list[dict]:
    """Returns a row for each step from the data to what is scored: step, stays, patients, answers, and
    whether it is a `part` of the step before. stays: those that may be scored; scored: points."""
    labelled = labelled_points(cohort, np.arange(len(cohort)))

    def row(step, points=None, part=False):
        of = np.arange(len(cohort)) if points is None else stays_with(cohort, points)
        return {"step": step, "stays": len(of), "patients": len(np.unique(cohort.subject[of])),
                "answers": "" if points is None else cohort.describe_answers(points), "part": part}
    rows = [row("in the data"), row("with a label", labelled)]
    if not checkpoint.is_new(cohort):
        ids = {word: checkpoint.split[name] for word, name in zip(("training", "validation", "test"), SPLITS)}
        rows += [row(f"in the {word} part", labelled_points(cohort, stays_of(cohort, its)), part=True)
                 for word, its in ids.items()]
    return rows + [row("to be scored, as nothing was learned or chosen from them",
                       labelled_points(cohort, stays)),
                   row("scored, as something that the model knows was charted by the question", scored)]


MOST_DESCRIBED = 40  # variables in Table 1
FEW_VALUES = 6       # different whole numbers up to which a variable is described by their shares
BY_ANSWER = "scored: "  # begins the parts that are made by answers


def table_parts(checkpoint: Checkpoint, cohort, scored_stays) -> dict[str, np.ndarray]:
    """Returns the stays of each column of Table 1: of the parts of the split, and of the scored stays by
    their answers, as splits are stratified by (`Cohort.label`)."""
    parts = {}
    if not checkpoint.is_new(cohort):
        parts = {word: stays_of(cohort, checkpoint.split[name])
                 for word, name in zip(("training", "validation"), SPLITS)}
    parts["scored"] = scored_stays
    words = {"classes": cohort.names, "event": ("no event", "event"),
             "number": [f"quarter {i} of the number" for i in range(1, 5)]}
    label = cohort.stay_label[scored_stays]
    for value in np.unique(label[label >= 0])[:FEW_VALUES]:
        word = words[cohort.kind][value] if cohort.kind in words else f"{cohort.names[0]} {value}"
        parts[BY_ANSWER + word] = scored_stays[label == value]
    return parts


def first_recorded(cohort, stays) -> pd.Series:
    """Returns the first value of each variable in each of these stays by its last question, by (stay,
    variable): inf where the variable was charted without a value alone."""
    last, found = cohort.point_minute[cohort.point_start[stays + 1] - 1], []
    for part, until in zip(*(np.array_split(x, 1 + len(stays) // 5000) for x in (stays, last))):
        table = event_table(cohort, part)
        table = table[table["minute"] <= np.repeat(until, cohort.stay_events[part])]
        found.append(table.groupby(["stay", "variable"])["value"].first())
    return pd.concat(found).fillna(np.inf)


def described(values: pd.Series) -> str:
    """Returns the median and quartiles of numbers and what share of them is missing; of a condition the share
    in which it holds."""
    if values.dtype == bool:
        return f"{values.mean():.1%}"
    known = values.dropna()
    low, middle, high = (f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
                         for x in known.quantile([.25, .5, .75]))
    without = f"{1 - len(known) / len(values):.1%} without" * (len(known) < len(values))
    return "; ".join(filter(None, [f"{middle} [{low}, {high}]" * (len(known) > 0), without]))


def standardised_difference(values: pd.Series, other: pd.Series) -> str:
    """Returns the mean of these numbers or conditions less that of the others, in units of the root mean of
    the two variances, of a share p (1 - p) (Austin 2009); empty where nothing varies."""
    mean, ddof = values.mean(), 0 if values.dtype == bool else 1
    spread = np.sqrt((values.var(ddof=ddof) + other.var(ddof=ddof)) / 2)
    return f"{(mean - other.mean()) / spread:+.2f}" if spread > 1e-6 * abs(mean) else ""


def characteristics(cohort, parts: dict[str, np.ndarray]) -> dict:
    """Returns Table 1, {column: {row: text}}: of the stays of each part that are asked the patients, answers,
    length and events of the record, and the first value by the question of the MOST_DESCRIBED variables that
    most of the scored stays have: `described`, where there are few whole numbers as the share of each. Where
    the answers of the scored stays make two parts of them, a last column has the standardised differences of
    the second from the first."""
    asked = np.diff(cohort.point_start) > 0
    parts = {part: stays[asked[stays]] for part, stays in parts.items()}
    everyone = np.unique(np.concatenate([*parts.values()]))
    first = first_recorded(cohort, everyone)
    stay, variable = (first.index.get_level_values(level) for level in range(2))
    charted = np.bincount(variable[np.isin(stay, parts["scored"])], minlength=len(cohort.variables))
    common = np.sort(np.argsort(-charted, kind="stable")[:MOST_DESCRIBED])
    first = first[np.isin(variable, common)].unstack().reindex(everyone, columns=common)     # [stays, common]
    length = (cohort.point_minute[cohort.point_start[everyone + 1] - 1] - cohort.admission[everyone]) / 60
    rows = {"hours from admission to the last question": pd.Series(length, everyone),
            "events of the record": pd.Series(cohort.stay_events[everyone], everyone)}
    for v in common:
        name, values = cohort.variables[v], first[v].where(np.isfinite(first[v]))
        shown, different = cohort.shown.get(name, name), np.unique(values.dropna())
        if sum(label == shown for label in cohort.shown.values()) > 1:  # of several variables
            shown += f" ({name})"
        if not len(different):
            rows[shown] = first[v].notna()
        elif len(different) <= FEW_VALUES and (different == different.round()).all():
            rows |= {f"{shown} = {cohort.shown.get(f'{name}={value:g}', f'{value:g}')}": values == value
                     for value in different}
            rows[f"{shown} not recorded"] = values.isna()
        else:
            rows[shown] = values
    columns = {part: {"stays": f"{len(stays):,}", "patients": f"{len(np.unique(cohort.subject[stays])):,}",
                      "answers": cohort.describe_answers(labelled_points(cohort, stays)),
                      **{row: described(values[stays]) for row, values in rows.items()}}
               for part, stays in parts.items()}
    groups = [stays for part, stays in parts.items() if part.startswith(BY_ANSWER)]
    if len(groups) == 2:
        without, those = groups
        columns["standardised difference"] = dict.fromkeys(columns["scored"], "") | {
            row: standardised_difference(values[those], values[without]) for row, values in rows.items()}
    return columns


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------

AUTHORS = "[to be told by the authors]"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; max-width: 62rem; margin: 2rem auto }
body { padding: 0 1rem }
h2 { border-bottom: 1px solid #111; margin-top: 2.5rem }
h2, h3 { break-after: avoid }
table { border-collapse: collapse; font-size: .8rem; margin: .5rem 0 }
caption { text-align: left; white-space: pre-line; font-weight: 600; padding: .4rem 0 }
th, td { text-align: left; vertical-align: top; padding: .15rem .7rem .15rem 0 }
th, td { border-bottom: 1px solid #ccc }
th { font-weight: 500 }
.wide { overflow-x: auto }
figure { margin: 1.2rem 0; break-inside: avoid }
figcaption { font-size: .85rem }
svg { max-width: 100%; height: auto }
.flow { list-style: none; padding: 0; max-width: 36rem }
.flow li { border: 1px solid #111; padding: .4rem .8rem; break-inside: avoid }
.flow li + li { margin-top: 1.4rem; position: relative }
.flow li + li::before { content: "\\2193"; position: absolute; top: -1.45rem; left: 2rem }
.settings { columns: 3; list-style: none; padding: 0; font-size: .8rem; overflow-wrap: anywhere }
.flow li.part { margin: .3rem 0 0 3rem }
.flow li.part::before { content: none }
.item { font-weight: 600; border: 1px solid #111; padding: 0 .3rem; font-size: .8rem }
.authors { background: #eee }
@page { margin: 15mm }
@media print { body { font-size: 10pt; max-width: none; margin: 0 } table { font-size: 7pt }
  tr { break-inside: avoid } .wide { overflow: visible } nav { display: none } }
"""
# A browser then fetches nothing and runs nothing, whatever the page holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html_table(table: pd.DataFrame, caption: str = "", **options) -> str:
    """Returns a table of texts; whatever it holds is escaped."""
    text = table.to_html(border=0, classes="", **options).replace(' class="dataframe "', "")
    if caption:
        text = text.replace("<thead>", f"<caption>{escape(caption)}</caption>\n<thead>", 1)
    return f'<div class="wide">{text}</div>'


def html_figure(pictures: dict, name: str, caption: str) -> str:
    """Returns the picture of this name under its caption; nothing where there is none."""
    if name not in pictures:
        return ""
    return (f'<figure role="img" aria-label="{escape(caption)}">{inline_svg(pictures[name], name)}'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def item(numbers: str, text: str) -> str:
    """Returns a paragraph that answers these items of TRIPOD+AI."""
    return f'<p><span class="item">{numbers}</span> {escape(text)}</p>'.replace(
        escape(AUTHORS), f'<span class="authors">{escape(AUTHORS)}</span>')


def settings_list(settings: dict, caption: str) -> str:
    """Returns the settings that have a value, in columns."""
    known = {name: value for name, value in settings.items() if value not in (None, [], {}, ())}
    rows = "".join(f"<li>{escape(f'{name}: {value}')}</li>" for name, value in known.items())
    return f'<p>{escape(caption)}:</p><ul class="settings">{rows}</ul>' if known else ""


def page(predictor, dataset, scored, figures: dict, tables: dict, pictures: dict) -> str:
    """Returns the report as HTML. scored: points; figures: those of --json; tables: those printed, by their
    titles; pictures: figures of matplotlib, by their names."""
    checkpoint, cohort, task = predictor.checkpoint, dataset.cohort, predictor.model.task
    sections = {"Of whom": of_whom(checkpoint, cohort, scored, figures),
                "How the model was made": how_made(checkpoint, predictor.model, figures, pictures),
                "How well it answers": how_well(figures, tables, pictures, task),
                "What moves its answers": what_moves(figures, pictures, task, cohort.shown),
                "Limits": limits(figures, checkpoint.is_new(cohort)),
                "TRIPOD+AI": checklist()}
    links = " · ".join(f'<a href="#s{i}">{escape(title)}</a>' for i, title in enumerate(sections, 1))
    body = "\n".join(f'<section id="s{i}"><h2>{i} {escape(title)}</h2>\n{text}</section>'
                     for i, (title, text) in enumerate(sections.items(), 1))
    title = f"Report of {Path(figures['checkpoint']).name} on {cohort.reader}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1>
{item("1-4", f"Title, abstract, background and objectives: {AUTHORS}")}
<p><b>This page holds values of single patients (section 4). Keep it as you keep their records.</b></p>
<nav>{links}</nav>
{body}
</body></html>
"""


def of_whom(checkpoint: Checkpoint, cohort, scored, figures: dict) -> str:
    steps = ""
    for row in figures["flow"]:
        text = f"{row['stays']:,} stays of {row['patients']:,} patients {row['step']}"
        text += f": {row['answers']}" * bool(row["answers"])
        steps += f"<li{' class=part' * row['part']}>{escape(text)}</li>"
    skipped = "".join(f"<li>{escape(line)}</li>" for line in met(cohort.notes, cohort.examples))
    known = sum(name in checkpoint.normalizer.variables for name in cohort.variables)
    hours, more = describe_questions(cohort, scored), max(0, len(cohort.variables) - MOST_DESCRIBED)
    return "\n".join([
        item("5, 6", f"Sources of the data, dates, setting, eligibility, treatments: {AUTHORS}"),
        item("8a", f"The labels are of the kind {cohort.kind} ({', '.join(map(str, cohort.names))}), asked "
                   f"at {hours}. What they mean, who judged them and how: {AUTHORS}"),
        item("20a", "From the data to what is scored:"), f'<ol class="flow">{steps}</ol>',
        "<p>What the reader met or left out:</p><ul>" + skipped + "</ul>" if skipped else "",
        item("10, 21", "Nobody calculated a sample size: the sample is what the data hold. Its parts and "
                       "their outcomes are above. No interval is given where too few patients make one."),
        item("9b", f"Predictors are the {len(checkpoint.normalizer.variables):,} variables that the model "
                   f"knows, of which these data have {known:,}, each with the minute and value at which it "
                   f"was charted. Why these: {AUTHORS}"),
        html_table(pd.DataFrame(figures["characteristics"]).fillna(""),
                   "Table 1 (items 20b, 11). Median and quartiles of the first value by the last question, "
                   "or shares of the stays; without: the share in which the variable was not charted. "
                   "Standardised difference, where there are two answers: mean or share of the second less "
                   "that of the first, in units of the root mean of their variances (Austin 2009). Variables "
                   f"that fewer of the scored stays have, not shown: {more:,}.")])


def how_made(checkpoint: Checkpoint, model, figures: dict, pictures: dict) -> str:
    source, run, normalizer = checkpoint.source, checkpoint.run or {}, checkpoint.normalizer
    settings = run.get("settings", {})
    made = {"command": source["command"], "seed": source.get("seed"), "commit": source.get("commit"),
            "epoch kept": checkpoint.metrics["epoch"], "data": f"{figures['data']} (digest of the stays)",
            "device, precision": f"{source.get('device', 'unknown')}, {source.get('precision', 'unknown')}",
            **source["versions"], "this report's code": git_commit(),
            "checkpoint's SHA-256": hashlib.sha256(Path(checkpoint.path).read_bytes()).hexdigest()}
    sizes = ", ".join(f"{name} {len(ids):,}" for name, ids in checkpoint.split.items())
    logged = int((normalizer.log_scale > 0).sum())
    balance = ("Points without the outcome are sampled where they are many "
               f"({settings['negatives']:g} for each with it), and weigh so much more; the loss is "
               f"{settings['loss']}." if "negatives" in settings else
               "The checkpoint keeps no settings of its training.")
    return "\n".join([
        item("7, 11", "Events enter at the minute at which they were charted. Nothing is resampled and "
                      "nothing filled in: what was not charted is no event of its set."),
        item("12a", f"Stays of the checkpoint's split: {sizes or 'not known'}. Patients are in one part "
                    "only. Training stays set weights and scales, validation stays epoch and threshold."),
        item("12b", "A value is standardised by mean and standard deviation of the training stays and "
                    f"clipped at {normalizer.clip:g} of these; {logged} skewed variables are taken on a log "
                    "scale."),
        item("12c", "A set-VAE encodes the events of a minute, a causal Transformer the sets before the "
                    "question; a head answers from both and from exact summaries of the stay, with "
                    f"boosted trees beside it. {figures['model']['parameters']:,} parameters, "
                    f"{figures['model']['head_parameters']:,} of them in the head."),
        item("13, 14", f"{balance} No approach to fairness was taken in training; section 3 tells the "
                       "figures by subgroup."),
        item("15", f"The output: {', '.join(model.task.columns)}. "
                   + (f"Alarms begin at {figures['threshold']:.4f} ({figures['threshold_is']})."
                      if "threshold" in figures else "")),
        item("12g, 22", "The file of the checkpoint holds weights, scales and names. It answers by: python "
                        "test_suite.py --checkpoint FILE --data_dir FOLDER --predictions OUT, or in Python "
                        "by predictor.Predictor(FILE).predict(events)."),
        item("24", "The probabilities were "
                   + ("recalibrated after training." if checkpoint.calibration else "not updated.")),
        item("18f", f"The commit of the code is below. Where the code can be had: {AUTHORS}"),
        settings_list(made, "Where it comes from"),
        settings_list(run.get("options", {}) | settings, "Settings of its training (item 12c)"),
        settings_list(asdict(model.config), "Sizes of the model (item 22)"),
        html_figure(pictures, "curves", "Learning curves; a line marks the epoch that was kept (item 12c).")])


def how_well(figures: dict, tables: dict, pictures: dict, task) -> str:
    captions = {"ranking": "ROC and precision-recall with the thresholds of alarms.",
                "calibration": "Calibration: bins of equal counts with 95% intervals, and a smooth curve.",
                "confusion": "How often each true class is taken for each.",
                "numbers": "Predicted against true numbers, with 80% intervals.",
                "incidence": "Observed against predicted incidence, in fifths.",
                "subgroups": "Figures in subgroups with 95% intervals (item 23a); the number of stays in "
                             "brackets.",
                "decision": "Decision curve: net benefit of alarms from a threshold on (item 12e)."}
    benefit, chosen = figures.get("net_benefit"), slice(9, 100, 10)
    net = pd.DataFrame(benefit)[chosen].map("{:.4f}".format) if benefit else pd.DataFrame()
    return "\n".join([
        item("12e, 20c, 23a", "Discrimination, calibration and what alarms would do, with intervals by "
                              "bootstrap over patients. The same numbers are in the file of --json."),
        *(html_table(table, title) for title, table in tables.items()),
        *(html_figure(pictures, name, caption) for name, caption in captions.items()),
        "" if net.empty else html_table(net, "Net benefit at some thresholds", index=False),
        item("12d, 23b", "Differences between hospitals or wards: give their variable to --subgroups."
             if "site" not in figures["subgroups"] else "By site: see the subgroups.")])


def what_moves(figures: dict, pictures: dict, task, shown: dict) -> str:
    moves = pd.DataFrame(figures["importance"]).rename(shown)
    compared = pd.DataFrame(figures["variables"]).T.rename(shown)
    if len(compared):
        formats = {"stays": "{:,.0f}", "values": "{:,.0f}", "clipped": "{:.2%}", "deviations": "{:+.2f}"}
        compared = pd.DataFrame({name: column.map(formats.get(name, "{:.4g}").format)
                                 for name, column in compared.items()})
    return "\n".join([
        html_table(moves.head(20).map("{:.4f}".format),
                   f"Mean |change| of the {scale(task)} without a variable's events, over stays"),
        html_figure(pictures, "importance", "The same of more variables."),
        html_figure(pictures, "trajectory", "One stay: its answer over time, what was charted, and by how "
                                            "much each variable's events move the last answer."),
        item("16, 20c", "Values of the scored stays beside those of training, the furthest first: their "
                        "middle (median, or of two different values the mean) less the mean of training, in "
                        "standard deviations. What lies far away may be in other units. Other differences of "
                        f"setting and eligibility: {AUTHORS}"),
        html_table(compared)])


def limits(figures: dict, new: bool) -> str:
    known = [figures["few"],
             "" if new else "The scored stays come from the same data as those of training: another hospital "
                            "may see other figures.",
             "The data are of the past: nobody acted on an answer, and what is charted depends on how ill "
             "staff took a patient to be.",
             "By how much a variable moves an answer is found by leaving out its events. What two variables "
             "tell alike is missed, and it is no cause.",
             "A subgroup's interval is not widened for the number of subgroups.",
             "This software is no medical device."]
    shown = "".join(f"<li>{escape(line)}</li>" for line in known if line)
    return f"{item('26', 'Known to the software:')}<ul>{shown}</ul>" + item(
        "25, 27", "Interpretation, use in practice, how poor input is handled there, next steps: " + AUTHORS)


CHECKLIST = {
    "1, 2": ("title, abstract", 0), "3a-3c, 4": ("background, objectives", 0), "5a, 5b": ("data, dates", 0),
    "6a-6c": ("setting, eligibility, treatments", 0), "7": ("preparation of the data", 2),
    "8a": ("outcome", 0), "8b, 8c": ("assessment of the outcome", 0), "9a": ("choice of predictors", 0),
    "9b": ("predictors", 1), "9c": ("assessment of predictors", 0), "10": ("sample size", 1),
    "11": ("missing data", 1), "12a": ("use of the data", 2), "12b": ("handling of predictors", 2),
    "12c": ("type of model, building, validation", 2), "12d": ("heterogeneity", 3),
    "12e": ("measures of performance", 3), "12f": ("updating", 2), "12g": ("how predictions are made", 2),
    "13": ("class imbalance", 2), "14": ("fairness", 2), "15": ("output and thresholds", 2),
    "16": ("training versus evaluation", 4), "17": ("ethical approval", 0),
    "18a-18e": ("funding, conflicts, protocol, registration, data", 0), "18f": ("code", 2),
    "19": ("involvement of patients and the public", 0), "20a": ("flow of participants", 1),
    "20b": ("characteristics", 1), "20c": ("development and evaluation compared", 4),
    "21": ("participants and outcomes of each analysis", 1), "22": ("specification of the model", 2),
    "23a": ("performance, also in subgroups", 3), "23b": ("heterogeneity", 3),
    "24": ("results of updating", 2), "25": ("interpretation", 0), "26": ("limitations", 5),
    "27a-27c": ("use in practice", 0)}


def checklist() -> str:
    """Returns where each item is answered; 0: by the authors alone."""
    rows = [f"<tr><th>{numbers}</th><td>{about}</td><td>"
            + (f'<a href="#s{section}">section {section}</a>' if section else
               f'<span class="authors">{AUTHORS}</span>') + "</td></tr>"
            for numbers, (about, section) in CHECKLIST.items()]
    return f"<table><caption>Where each item stands</caption><tbody>{''.join(rows)}</tbody></table>"


def write_page(path: str, *parts) -> None:
    """Writes the `page` of these parts."""
    text = page(*parts)
    write_atomically(path, lambda out: out.write_text(text, encoding="utf-8"))
    print(f"report: {len(text.encode()) / 1e6:.2f} MB written to {path}; it holds values of single patients")
