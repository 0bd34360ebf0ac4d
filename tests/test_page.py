"""Tests of page.py: the report as one HTML page."""

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import page
import train
from metrics import CHECKPOINT, cell
from questions import labelled_points
from readers import synthetic_cohort, write_long_table
from test_suite import main
from tests.tiny import FINETUNE, make_small, one_error_line, write

pytest.importorskip("matplotlib")


class Parsed(HTMLParser):
    """The tags, attributes, texts, tables (rows of cells) and items of a flow in a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = Counter(), [], []
        self.tables, self.lines, self.open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "li":
            self.lines.append("")
        self.open = tag

    def handle_data(self, text):
        self.texts.append(text)
        if self.open in ("td", "th"):
            self.tables[-1][-1][-1] += text
        elif self.open == "li":
            self.lines[-1] += text

    def handle_endtag(self, tag):
        self.open = None

    def rows(self) -> dict:
        """The cells of each row by its first, of equal ones those that come first."""
        return {row[0]: row[1:] for table in reversed(self.tables) for row in reversed(table) if len(row) > 1}


def check_sound(text: str) -> Parsed:
    """A browser has nothing to fetch or to run, every id is there once, and every link leads to one."""
    parsed = Parsed(text)
    fetched = [value for name, value in parsed.attributes
               if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
    fetched += re.findall(r"url\(\s*([^)]*)\)", text)
    assert fetched and all(address.strip("\"'").startswith("#") for address in fetched), set(fetched)
    assert "@import" not in text and "http:" not in text and "https:" not in text
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & parsed.tags.keys()
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    ids = Counter(value for name, value in parsed.attributes if name == "id")
    assert max(ids.values()) == 1 and {address.strip("\"'")[1:] for address in fetched} <= ids.keys()
    assert len(text.encode()) < 3e6
    return parsed


@pytest.fixture(scope="module")
def reported(tmp_path_factory, finetuned):
    """The page of a checkpoint, and the figures of --json."""
    folder = tmp_path_factory.mktemp("page")
    assert main(["--checkpoint", str(finetuned), "--report", str(folder / "r.html"), "--json", str(folder / "json"),
                 "--subgroups", "Gender,events",
                 "--at_hours", "6"]) == 0
    return folder / "r.html", json.loads((folder / "json").read_text())


def test_the_page_needs_nothing_but_itself_and_holds_every_picture(reported):
    parsed = check_sound(reported[0].read_text())
    assert parsed.tags["figure"] == parsed.tags["svg"] == 7  # curves, ROC, calibration, groups, decision, all stays, one
    assert parsed.tags["html"] == parsed.tags["h1"] == 1


def test_the_numbers_of_the_page_are_those_of_json(reported):
    text, figures = reported[0].read_text(), reported[1]
    parsed = Parsed(text)
    rows, own = parsed.rows(), figures["methods"][CHECKPOINT]
    named = {"AUROC": "auroc", "AUPRC": "auprc", "Calibration slope": "slope", "Calibration intercept": "intercept",
             "Sensitivity": "sensitivity", "Predictive value": "ppv", "Alarms per 100 stays": "alarms"}
    for title, measure in named.items():
        assert rows[title][0].strip() == cell(own[measure]).strip(), title
    assert rows["Brier score"][0].strip() == f"{figures['brier']:.4f}"
    groups = [(f"{variable} {key}", group) for variable, groups in figures["subgroups"].items()
              for key, group in groups.items()]
    assert len(groups) > 2
    for name, group in groups:
        assert [int(x.replace(",", "")) for x in rows[name][:2]] == [group["stays"], group["positive"]]
    assert all(any(line.startswith(f"{step['stays']:,} stays of {step['patients']:,} patients {step['step']}")
                   for line in parsed.lines) for step in figures["flow"])
    assert any("not shown: 4." in text for text in parsed.texts)  # of 44 variables
    assert figures["flow"][0]["stays"] == 24 and figures["flow"][-1]["stays"] == figures["stays"]
    for column, cells in figures["characteristics"].items():
        (table,) = (table for table in parsed.tables if column in table[0])
        at = table[0].index(column)
        assert {row[0]: row[at] for row in table[1:]} == {name: cells[name] for name in [row[0] for row in table[1:]]}
    for name, size in [*figures["importance"]["mean |change|"].items()][:20]:
        assert [name, f"{size:.4f}"] in [row for table in parsed.tables for row in table]
    (hour,) = (table for table in parsed.tables if "hour 6" in table[0])
    auroc = {row[0]: row[1:] for row in hour}["AUROC"]
    assert [text.strip() for text in auroc] == [
        cell(row["methods"][CHECKPOINT]["auroc"], 3).strip() for row in figures["at_hours"]]
    for name, compared in figures["variables"].items():
        (row,) = (row for table in parsed.tables if "deviations" in table[0] for row in table[1:] if row[0] == name)
        assert f"{compared['deviations']:+.2f}" in row and f"{compared['clipped']:.2%}" in row


def test_every_item_of_tripod_is_answered_or_left_to_the_authors(reported):
    text = reported[0].read_text()
    shown = {part for found in re.findall(r'class="item">([^<]*)<', text) for part in found.split(", ")}
    ours = "7 9b 10 11 12a 12b 12c 12e 12g 13 15 16 18f 20a 20b 20c 21 22 23a 24 26".split()
    assert not [number for number in ours if number not in text]
    assert set("7 9b 10 12a 12b 12e 12g 13 15 16 18f 20a 21 22 24".split()) <= shown
    assert text.count(page.AUTHORS) > 10
    listed = " ".join(page.CHECKLIST)
    assert [number for number in map(str, range(1, 28)) if not re.search(rf"\b{number}[a-g]?\b", listed)] == []


def test_what_the_data_hold_is_escaped(tmp_path, small_finetuned, capsys):
    cohort = synthetic_cohort(24)
    ids = np.array([f"<i>{i}&\"" for i in range(24)])
    folder = write_long_table(tmp_path / "d", replace(cohort, stay_id=ids, subject=ids))
    rows = "".join(f'"<i>{i}&""",0,"<script>alert(1)</script>",{i}.5\n' for i in range(24))
    write(folder / "events.csv", (folder / "events.csv").read_text() + rows)
    assert main(["--checkpoint", str(small_finetuned), "--data_dir", str(folder), "--report",
                 str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    parsed = check_sound(text)
    assert "<script>alert(1)</script>" in parsed.rows() and not parsed.tags["i"]
    assert "holds values of single patients" in text and "holds values of single patients" in capsys.readouterr().out


def test_table_1_is_what_counting_by_hand_gives(tmp_path, load):
    write(tmp_path / "events.csv", "stay_id,minute,variable,value\n1,0,A,1.5\n1,60,A,9\n1,0,Sex,0\n2,0,A,3\n2,9,B,\n"
          "3,0,Sex,1\n3,50,A,4\n4,0,Sex,1\n")
    write(tmp_path / "labels.csv", "stay_id,minute,label\n1,60,0\n2,60,1\n3,30,1\n4,30,0\n")
    cohort = load(tmp_path)
    parts = {"all": np.arange(4), "scored": np.arange(4), "one": np.array([2])}
    cells = page.characteristics(replace(cohort, shown={"Sex": "sex", "Sex=1": "male"}), parts)
    whole = cells["all"]
    assert whole["stays"] == "4" and whole["answers"] == "2 positive" and cells["one"]["answers"] == "1 positive"
    assert whole["hours from admission to the last question"] == "0.75 [0.5, 1]"
    assert whole["A"] == "2.25 [1.88, 2.62]; 50.0% without"  # 3's comes after its question
    assert whole["B"] == "25.0%" and cells["one"]["B"] == "0.0%"
    assert (whole["sex = 0"], whole["sex = male"], whole["sex not recorded"]) == ("25.0%", "50.0%", "25.0%")
    assert cells["one"]["A"] == "100.0% without" and "standardised difference" not in cells
    alike = page.characteristics(replace(cohort, shown={"A": "x", "B": "x"}), parts)["all"]
    assert (alike["x (A)"], alike["x (B)"]) == (whole["A"], whole["B"])
    groups = {f"scored: label {label}": np.flatnonzero(cohort.label == label) for label in (0, 1)}
    difference = page.characteristics(cohort, {"scored": np.arange(4), **groups})["standardised difference"]
    # shares 1/2 and 0: -1/2 in units of sqrt((1/4 + 0) / 2); A has one value a group, of which none varies
    assert {row: text for row, text in difference.items() if text} == {
        "Sex = 0": "-1.41", "Sex = 1": "+0.00", "Sex not recorded": "+1.41", "B": "+1.41",
        "events of the record": "+0.00", "hours from admission to the last question": "+0.00"}
    assert page.standardised_difference(pd.Series([1., 3, np.nan]), pd.Series([0., 2])) == "+0.71"  # sd sqrt(2)
    assert len(labelled_points(cohort, np.arange(4))) == 4


OF_KINDS = {"several": (lambda i: {"dead": i % 2, "sepsis": i // 2 % 2}, ["--outcomes", "dead", "sepsis"], "ranking"),
            "classes": (lambda i: {"label": "abc"[i % 3]}, ["--kind", "classes"], "confusion"),
            "number": (lambda i: {"label": 1 + i / 7}, ["--kind", "number"], "numbers"),
            "event": (lambda i: {"event": i % 2, "hours": 5. + i}, [], "incidence")}


@pytest.mark.parametrize("kind", OF_KINDS)
def test_other_kinds_have_a_page_of_their_own_figures(kind, tmp_path, small_finetuned, monkeypatch):
    make_small(monkeypatch)
    label, options, picture = OF_KINDS[kind]
    ids = synthetic_cohort(24).stay_id
    labels = pd.DataFrame([{"stay_id": stay, **label(i)} for i, stay in enumerate(ids)])
    labels.to_csv(tmp_path / "labels.csv", index=False)
    pretrained = small_finetuned.parent.parent / "pretrain" / "best.pt"
    assert train.main([*FINETUNE, str(pretrained), "--run_dir", str(tmp_path / "run"), "--label_file",
                       str(tmp_path / "labels.csv"), *options]) == 0
    assert main(["--checkpoint", str(tmp_path / "run/best.pt"), "--report", str(tmp_path / "r.html"), "--json",
                 str(tmp_path / "json"), "--subgroups", "events"]) == 0
    text, figures = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "json").read_text())
    parsed = check_sound(text)
    assert f'id="{picture}-' in text and 'id="trajectory-' in text
    cells = {text.strip() for table in parsed.tables for row in table for text in row}
    measures = figures["methods"][CHECKPOINT]
    assert measures and {cell(measure).strip() for measure in measures.values()} <= cells


def test_a_report_without_labels_or_of_several_checkpoints_is_refused(tmp_path, capsys, small_finetuned):
    folder = write_long_table(tmp_path / "d", synthetic_cohort(24), labels=False)
    path = str(tmp_path / "r.html")
    one_error_line(capsys, main(["--checkpoint", str(small_finetuned), "--data_dir", str(folder), "--report", path,
                                 "--predictions", str(tmp_path / "p")]), "both classes are needed")
    one_error_line(capsys, main(["--checkpoint", *[str(small_finetuned)] * 2, "--report", path]), "--report: of one")
    one_error_line(capsys, main(["--checkpoint", str(small_finetuned), "--report", str(tmp_path / "no/r.html")]),
                   "its folder does not exist")


def test_a_browser_shows_the_page_and_prints_it(reported, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no chromium or chrome is installed: that a browser shows the report was NOT tested")
    path, _ = reported
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--enable-logging=stderr", "--v=0"]
    shown = subprocess.run([*words, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    assert shown.stdout.count("<figure") == path.read_text().count("<figure") and shown.stdout.count("</svg>") == 7
    assert "CONSOLE" not in shown.stderr  # nothing was blocked, nothing went wrong
    subprocess.run([*words, f"--print-to-pdf={tmp_path / 'r.pdf'}", "--no-pdf-header-footer", path.as_uri()],
                   capture_output=True, timeout=120)
    assert (tmp_path / "r.pdf").read_bytes().startswith(b"%PDF")
