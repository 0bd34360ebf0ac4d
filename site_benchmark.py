"""What old weights are worth to a new hospital (`test_suite.py --new_site`): learning curves over the number
of its labels, where each group of a data set's stays is a hospital that comes new in turn."""

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from baselines import ALONE, SummariesAlone
from checkpoint import Checkpoint
from data import InputError, draw, point_table, write_atomically
from finetune_config import FinetuneConfig, tree_sizes
from metrics import recalibration
from model import SeqSetVAE
from plots import new_figure, plot_new_site, save_figure
from predictor import CPU, Predictor, open_checkpoint
from protocol import first_figure, once, print_methods, read_predictions, scores
from questions import at_moments, labelled_points
from report import subgroups
from runs import answers_at, encode_points, read_cohort
from settings import changed
from tasks import Binary
from train import HeadTraining, finetune, pretrain, run_settings
from transfer import SitePoints, correction_of


LABELLED, DRAWS = (0, 30, 100, 300, 1000), 3
UNTOUCHED, RECALIBRATED, OLD_HEAD, NEW_HEAD = (
    "old model, untouched", "old model, recalibrated", "old head", "new head")
GONE_ON = "new head, pretrained on with unlabelled stays"
# What is trained as a whole, with the options of train.py, from a number of labels on.
FULL, SCRATCH = "everything trained", "from scratch"
TRAINED = {FULL: {"full_training": True}, SCRATCH: {"full_training": True, "random_init": True}}
ENOUGH = 300
OWN = (ALONE, SCRATCH)  # of the site's labels alone


def new_site(given: dict, variable: str, folder: Path) -> None:
    """Each group of stays by this variable is a site that comes new: a backbone is pretrained and a head
    finetuned on all other stays; then some of the site's stays have a label, in several draws, and what can
    be begun with is scored on two fifths of the site. What is finished lies in `folder` and is kept, a
    backbone too that was put there as VARIABLE-GROUP/pretrain/best.pt. given: the data's options, see
    `data_options`."""
    cohort = read_cohort(given)
    if cohort.kind != "binary" or cohort.timed:
        raise InputError(f"{cohort.reader}: --new_site is for one label of 0 or 1 a stay; give such labels")
    everyone = labelled_points(cohort, np.arange(len(cohort)))
    sites = {folder / f"{variable}-{name}": everyone[mask]
             for name, mask in subgroups(cohort, everyone, variable).items()}
    if len(sites) < 2:
        raise InputError(f"--subgroups {variable}: {cohort.reader} has one group of stays by it; give a "
                         "variable that tells sites apart")
    if nested := [str(home.relative_to(folder)) for home in sites if home.parent != folder]:
        raise InputError(f"--subgroups {variable}: the site {nested[0]} has a / in its name, which a folder "
                         "cannot have; give another variable")
    for home, points in sites.items():
        check_site(cohort, home.name, points)
    new_figure(1)  # raises InputError where there is no matplotlib
    common = given | dict(seed=0, resume="auto")

    def trained(home: Path, name: str, split: pd.DataFrame, learn, **more) -> Path:
        """Of a run with this split, which is kept beside it: its best.pt."""
        def work(to: Path):
            split.to_csv(to / "split.csv", index=False)
            learn(run_settings(run_dir=str(to), split_file=str(to / "split.csv"), **common, **more))
            (to / "last.pt").unlink()
        once(home / name, work)
        return home / name / "best.pt"

    for home, points in sites.items():
        train, valid = others(cohort, points)
        split = split_of(cohort, train=train, valid=valid, test=cohort.point_stay[points])
        backbone = trained(home, "pretrain", split, pretrain, mode="pretrain")
        old = trained(home, "old", split, finetune, mode="finetune", pretrained_ckpt=str(backbone))
        if {*Checkpoint.open(old).split["test"]} != {*cohort.stay_id[cohort.point_stay[points]]}:
            raise InputError(f"{old}: of other data, or of other stays of this site; give another folder")
        gone_on = None
        if home == next(iter(sites)):  # of one site: pretraining goes on with the stays that can have a label
            scored, pool = scored_and_rest(cohort, points)
            pool, valid = np.split(pool, [len(pool) * 9 // 10])
            split = split_of(cohort, train=cohort.point_stay[pool], valid=cohort.point_stay[valid],
                             test=cohort.point_stay[scored])
            gone_on = trained(home, "unlabelled", split, pretrain, mode="pretrain",
                              pretrained_ckpt=str(backbone))
        once(home / "heads", lambda to: learn_heads(old, gone_on, given, points, to))
    for turn, (home, points), number, (arm, options) in itertools.product(
            range(DRAWS), sites.items(), LABELLED, TRAINED.items()):
        scored, pool = scored_and_rest(cohort, points)
        if not ENOUGH <= number <= len(pool):
            continue
        train, valid = labelled_of(cohort, pool, number, turn)
        split = split_of(cohort, train=cohort.point_stay[train], valid=cohort.point_stay[valid],
                         test=cohort.point_stay[scored])

        def learn(settings):
            predictor, dataset = Predictor.with_data(finetune(settings), given, "cpu")
            answers = answers_at(predictor.model, dataset, scored, CPU)
            save_arms(Path(settings.run_dir), number, turn, dataset.cohort, scored, {arm: answers[:, 0]})
        trained(home, f"{arm} {number} {turn}", split, learn, mode="finetune",
                pretrained_ckpt=str(home / "old" / "best.pt"), **options)
    print_new_site(folder)


def check_site(cohort, name: str, points: np.ndarray) -> None:
    """Raises InputError where the site of these points [n] can have no old model, no draws of labels or no
    figures."""
    for part, what in zip(scored_and_rest(cohort, points), ("are scored", "can have a label")):
        positive = int(cohort.label[part].sum())
        if min(positive, len(part) - positive) < 2:
            raise InputError(f"{name}: of its {len(part):,} stays that {what} {positive:,} are positive, "
                             "where two of each class are needed; leave out its stays, or give more of them")
    train, valid = others(cohort, points)
    Binary().check(cohort, {f"train (beside {name})": cohort.stay_id[train],
                            f"valid (beside {name})": cohort.stay_id[valid]})


def others(cohort, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stays of the other sites than that of these points [n]: to learn from, and to validate."""
    rest = np.setdiff1d(np.arange(len(cohort)), cohort.point_stay[points])
    drawn = np.random.default_rng(0).random(len(rest)) < .1
    return rest[~drawn], rest[drawn]


def split_of(cohort, **parts) -> pd.DataFrame:
    """The split file's rows of these stays: part -> [n]."""
    return pd.concat([pd.DataFrame({"stay_id": cohort.stay_id[stays], "split": part})
                      for part, stays in parts.items()])


def scored_and_rest(cohort, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two fifths of a site's points [n], which are scored, and those that can have a label."""
    subject = cohort.subject[cohort.point_stay[points]]
    everyone = np.unique(subject)
    tested = np.random.default_rng(0).permutation(everyone)[:len(everyone) * 2 // 5]
    mask = np.isin(subject, tested)
    return points[mask], np.random.default_rng(0).permutation(points[~mask])


def labelled_of(cohort, pool: np.ndarray, number: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """The points that have a label in this draw, with at least two positives: four fifths to learn from, and
    the fifth that validates."""
    rng = np.random.default_rng([number, turn])
    chosen = rng.permutation(pool)[:number]
    while cohort.label[chosen].sum() < 2:
        chosen = rng.permutation(pool)[:number]
    rest, fifth = draw(cohort.label[chosen].astype(int), 1, turn)
    return np.sort(chosen[rest]), np.sort(chosen[fifth])


def learn_heads(old: Path, gone_on: Path | None, given: dict, points: np.ndarray, folder: Path) -> None:
    """Write the answers at the scored ones of a site's points [n] by what is learned on a frozen backbone,
    after each number of labels. The stays are encoded once, at their questions and the earlier moments of
    these. gone_on: the backbone after more pretraining, if any."""
    checkpoint, cohort = open_checkpoint(old, given)
    if np.isin(checkpoint.known_part(cohort)[cohort.point_stay[points]], (0, 1)).any():
        raise InputError(f"{old}: knows stays of the site that it is to come new to; give another backbone")
    model, config = checkpoint.classifier(), FinetuneConfig()
    asked, weight = at_moments(cohort, points, np.ones(len(points)), config.moments, 0)
    dataset = checkpoint.dataset(cohort).of(asked)
    seen = {NEW_HEAD: encode_points(model, dataset, np.arange(len(weight)), CPU)}
    seen[ALONE] = seen[NEW_HEAD]
    if gone_on:
        further = copy.deepcopy(model)
        Checkpoint.open(gone_on).backbone_into(further)
        seen[GONE_ON] = encode_points(further, dataset, np.arange(len(weight)), CPU)
    own = np.flatnonzero(np.diff(asked.point_stay, append=-1))  # the questions among their moments
    whole = SitePoints.of_features(model, seen[NEW_HEAD][own], cohort, points, np.ones(len(points)))
    scored, pool = scored_and_rest(cohort, points)
    tested = np.searchsorted(points, scored)
    tested_points = whole.of(tested)
    for number, turn in itertools.product(LABELLED, range(DRAWS)):
        if number > len(pool):
            print(f"new site: {len(pool):,} stays can have a label, fewer than {number:,}, which is left out")
            continue
        answers = {UNTOUCHED: tested_points.logits}
        if number:
            train, valid = labelled_of(cohort, pool, number, turn)
            chosen = whole.of(np.searchsorted(points, np.union1d(train, valid)))
            for arm, alone in ((RECALIBRATED, True), (OLD_HEAD, False)):
                found, _ = correction_of(model, config, chosen, alone, turn)
                answers[arm] = found(tested_points)
            mine = np.isin(asked.point_stay, cohort.point_stay[train])
            answer, counted = (torch.from_numpy(array[mine]) for array in (asked.answers, weight))
            fifth = np.searchsorted(points, valid)
            for arm, x in seen.items():
                torch.manual_seed(turn)
                kind = SummariesAlone if arm == ALONE else SeqSetVAE
                head = kind(changed(checkpoint.config, tree_sizes(config, len(train))), checkpoint.vocabulary)
                head.head_variables.copy_(model.head_variables)
                x = x[:, -sum(head.feature_sizes().values()):]
                run = SimpleNamespace(model=head, seed=turn, last=None)
                training = HeadTraining(run, config, x[mine], answer, counted, len(train))
                training.whole(x[own[fifth]], cohort.answers[valid])
                with torch.no_grad():
                    answers[arm] = head.eval().classify(x[own[tested]])
        answers = {arm: Binary().answer(logits)[:, 0] for arm, logits in answers.items()}
        save_arms(folder, number, turn, cohort, scored, answers)


def save_arms(folder: Path, number: int, turn: int, cohort, points, answers: dict) -> None:
    """Write the risks [n] of each arm at these points."""
    table = point_table(cohort, points).assign(label=cohort.label[points], split="test", **answers)
    write_atomically(folder / f"answers-{number}-{turn}.csv", lambda out: table.to_csv(out, index=False))


def print_new_site(folder: Path) -> None:
    """The tables of RESULTS.md from what is finished: of each number of labels the figures of each arm, their
    difference to the recalibrated old model and to the best of the site's own (paired by patient, over sites
    and draws), and how well they are calibrated; and new_site.png."""
    found, lines = {}, []
    for path in sorted(folder.glob("*/*/answers-*.csv")):
        if path.parent.name.endswith(".partial"):
            continue
        (number, turn), site = path.stem.split("-")[1:], path.parent.parent.name
        table = read_predictions(path)
        for arm in table.columns[5:]:
            each = table.assign(probability=table[arm])
            of_arm = found.setdefault(int(number), {}).setdefault(arm, {})
            of_arm[f"{site} {turn}"] = scores(each, hourly=False)
            slope, intercept = recalibration(each["label"], each["probability"], np.ones(len(each)))
            lines.append((int(number), arm, site, of_arm[f"{site} {turn}"][0, 0], slope, intercept))
    for number, rows in sorted(found.items()):
        ranked = sorted(rows, key=lambda arm: -first_figure(rows[arm]))
        own = [arm for arm in ranked if arm in OWN]
        print(f"\n{number:,} labelled stays of the site")
        for base in (RECALIBRATED if RECALIBRATED in rows else UNTOUCHED, *own[:1]):
            print_methods(rows, ranked, base, ["AUROC", "AUPRC"])
    curves = pd.DataFrame(lines, columns=["labels", "arm", "site", "auc", "calibration slope", "intercept"])
    means = curves.drop(columns="site").groupby(["labels", "arm"]).mean()
    print(f"\n{means.to_string(float_format='{:.3f}'.format)}")
    save_figure(plot_new_site(curves), folder / "new_site.png")
