"""Tests of metrics.py: discrimination, calibration, alarms, intervals; the utility of the challenge 2019."""

import json

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

import train
from checkpoint import Checkpoint
from metrics import (CHECKPOINT, Points, alarm_from, best_utility_threshold, bootstrap, brier_scores,
                     calibration_bins, calibration_error, censoring_curve, censoring_weights, class_measure,
                     concordance_measure, hours_since_onset, incidence_curve, integrated, measured, net_benefit,
                     number_measure, ranking_measure, uncensored,
                     normalised_utility, of_challenge_2019, ranks, recalibration, resampled, score_figures, sepsis_figures, threshold_of,
                     utilities, utilities_by, ward_figures)
from test_suite import main
from tests.tiny import FINETUNE, PRETRAIN, SHARED, write


def test_intervals_resample_stays_not_points():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 40)
    p = label + rng.normal(size=40)
    once = bootstrap(np.arange(40), label, p, repeats=300)
    many = bootstrap(np.repeat(np.arange(40), 25), np.repeat(label, 25), np.repeat(p, 25), repeats=300)
    assert np.allclose(once[..., 0], many[..., 0])  # the same points again are no more evidence
    fresh = bootstrap(np.arange(1000), np.repeat(label, 25), np.repeat(p, 25), repeats=300)
    assert fresh.std(0)[0, 0] < .4 * once.std(0)[0, 0]


def test_a_bootstraps_measures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    for n in (5, 30, 2000):
        label, weight = rng.permutation(np.arange(n) % 3 == 0).astype(int), rng.poisson(1, n)
        weight[:np.flatnonzero(np.diff(label))[0] + 2] += 1  # both classes
        p = np.round(rng.random(n) / 2 + label / 4, 2)  # with ties
        order = np.argsort(-p)
        np.testing.assert_allclose(ranks(label[order], p[order], weight[order]),
                                   [measure(label, p, sample_weight=weight)
                                    for measure in (roc_auc_score, average_precision_score)], atol=1e-12)


def test_recalibration_is_unpenalised_logistic_regression_on_the_logit():
    rng = np.random.default_rng(0)
    for scale, shift in ((1, 0), (3, 1), (.2, -4)):
        logit = rng.normal(size=500) * 2 - 1
        label = (rng.random(500) < 1 / (1 + np.exp(-logit))).astype(int)
        weight, p = rng.poisson(1, 500), 1 / (1 + np.exp(-(scale * logit + shift)))
        fitted = LogisticRegression(C=np.inf, tol=1e-9).fit(np.log(p / (1 - p))[:, None], label, sample_weight=weight)
        np.testing.assert_allclose(recalibration(label, p, weight), (fitted.coef_[0, 0], fitted.intercept_[0]),
                                   atol=1e-4)
    for p in (np.full(500, .3), np.where(label == 1, .9, .1), np.where(label == 1, 1., 0.)):
        assert np.isnan(recalibration(label, p, np.ones(500))).all()


def test_alarms_at_a_fixed_sensitivity_and_net_benefit_are_what_counting_gives():
    label, p = np.array([1, 0, 1, 1, 0, 0, 0, 1, 0, 0]), np.array([.9, .8, .7, .7, .6, .5, .4, .3, .2, .1])
    assert [threshold_of(label, p, share) for share in (.25, .5, .75, .76, 1)] == [.9, .7, .7, .3, .3]
    assert alarm_from(.7)(label, p, np.ones(10)) == (3 / 4, 5 / 6, 3 / 4, 40)
    assert np.isnan(alarm_from(.95)(label, p, np.ones(10))[2])
    curve = net_benefit(label, p)
    for t, found, everyone in zip(*curve.values()):
        true, false = ((p >= t) & (label == 1)).sum(), ((p >= t) & (label == 0)).sum()
        assert found == pytest.approx(true / 10 - false / 10 * t / (1 - t))
        assert everyone == pytest.approx(.4 - .6 * t / (1 - t))


def test_the_bootstrap_scores_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    label, group, p = rng.integers(0, 2, 90), rng.integers(0, 30, 90), rng.random(90).round(1)  # with ties
    draws, rng = bootstrap(group, label, p, 1 - p, repeats=20), np.random.default_rng(0)
    groups = len(np.unique(group))
    for scored in draws:
        drawn = np.bincount(rng.integers(0, groups, groups), minlength=groups)
        weight = drawn[np.unique(group, return_inverse=True)[1]]
        for q, (auroc, auprc) in zip((p, 1 - p), scored):
            assert auroc == pytest.approx(roc_auc_score(label, q, sample_weight=weight), abs=1e-12)
            assert auprc == pytest.approx(average_precision_score(label, q, sample_weight=weight), abs=1e-12)


@pytest.fixture(scope="module")
def official():
    path = SHARED / "fixtures" / "sepsis2019_utility.json"
    if not path.exists():
        pytest.skip("shared/fixtures is absent: the official scorer's utility was not compared")
    return json.loads(path.read_text())


def flat(stays, *names):
    """Of stays as lists of hours: place of the stay, minute, and the named lists, [n] each."""
    hours = [len(stay[names[0]]) for stay in stays]
    return (np.repeat(np.arange(len(stays)), hours), np.concatenate([60.0 * np.arange(n) for n in hours]),
            *(np.concatenate([stay[name] for stay in stays]) for name in names))


def test_the_utility_is_the_official_scorers(official):
    stay, minute, label, prediction = flat(official["stays"], "label", "prediction")
    assert of_challenge_2019(stay, minute, label)
    utility = utilities_by(stay, hours_since_onset(stay, minute, label), prediction == 1)
    expected = [[s["utility"], s["inaction"], s["best"]] for s in official["stays"]]
    np.testing.assert_allclose(utility, expected, rtol=0, atol=1e-9)
    assert abs(normalised_utility(utility.sum(0)) - official["normalised_utility"]) < 1e-9


def test_the_figures_of_hours_are_the_official_scorers(official):
    stay, minute, label, probability, prediction = flat(official["stays"], "label", "probability", "prediction")
    threshold = probability[prediction == 1].min()
    assert ((probability >= threshold) == prediction).all()
    told = sepsis_figures(Points(stay, stay, minute, label), probability, threshold)
    assert abs(told["all_hours"]["auroc"] - official["auroc"]) < 1e-9
    assert abs(told["utility"]["value"] - official["normalised_utility"]) < 1e-9
    low, high = told["utility"]["interval"]
    assert low < official["normalised_utility"] < high
    assert told["until_the_onset"]["hours"] == (hours_since_onset(stay, minute, label) <= 0).sum() < len(label)


def random_hours(seed, stays=40):
    """Stays of 1 to 60 hours, every third with sepsis, probabilities with ties."""
    rng, hours = np.random.default_rng(seed), []
    for i in range(stays):
        n = int(rng.integers(1, 60))
        label = np.zeros(n, dtype=int)
        if i % 3 == 0:
            label[max(0, n - int(rng.integers(1, 11))):] = 1
        hours.append({"label": label, "probability": (rng.random(n) + .3 * label).round(2)})
    return flat(hours, "label", "probability")


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all(seed):
    stay, minute, label, probability = random_hours(seed)
    since = hours_since_onset(stay, minute, label)
    values = {cut: normalised_utility(utilities_by(stay, since, probability >= cut).sum(0))
              for cut in (*np.unique(probability), 9)}
    threshold, utility = best_utility_threshold(stay, since, probability)
    assert utility == max(values.values()) == values[threshold]


def test_where_no_alarm_pays_there_is_none():
    stay, minute = np.repeat([0, 1], [9, 91]), 60.0 * np.append(np.arange(9), np.arange(91))
    label = (np.arange(100) == 99).astype(int)
    threshold, utility = best_utility_threshold(stay, hours_since_onset(stay, minute, label), 1 - label * .5)
    assert threshold > 1 and utility == 0


def test_the_utility_by_the_hours_since_onset():
    since = np.array([-np.inf, -20, -12, -11, -6, -5, 0, 3, 4])
    quiet, alarm = utilities(since)
    np.testing.assert_allclose(quiet, [0, 0, 0, 0, 0, -2 / 9, -12 / 9, -2, 0])
    np.testing.assert_allclose(alarm, [-.05, -.05, 0, 1 / 6, 1, 8 / 9, 3 / 9, 0, 0], atol=1e-12)


def test_what_a_ward_would_ask():
    """Two stays of 24 hours, onset at hour 20 of the first; one of 6 hours, labelled 1 from the first on."""
    hours = np.array([24, 24, 6])
    label = np.zeros(54, dtype=int)
    label[14:24], label[48:] = 1, 1
    stay, minute = np.repeat([7, 8, 9], hours), 60.0 * np.concatenate([np.arange(n) for n in hours])
    alarm = np.zeros(54, dtype=bool)
    alarm[[2, 3, 5, 16, 17]] = True  # hours of the first stay
    alarm[[24, 30, 31]] = True       # 0, 6, 7 of the second
    alarm[50] = True                 # 2 of the third, whose onset is at hour 6
    told = ward_figures(stay, hours_since_onset(stay, minute, label), alarm)
    assert told["septic_stays"] == told["warned"] == 2 and told["share_warned"] == 1
    assert told["lead_hours"] == 4 and told["lead_stays"] == told["labelled_from_the_first_hour"] == 1
    assert told["false_alarms"] == 4 and told["false_alarms_a_day"] == pytest.approx(4 / (54 / 24))


def test_other_labels_are_not_taken_for_the_challenges():
    stay, minute, label, _ = random_hours(0)
    assert of_challenge_2019(stay, minute, label)
    assert not of_challenge_2019(stay, minute * 2, label)                             # not hourly
    assert not of_challenge_2019(stay, minute, 1 - label)                             # falls
    assert not of_challenge_2019(np.arange(9), 60.0 * np.arange(9), np.arange(9) % 2)  # one question a stay
    assert not of_challenge_2019(np.zeros(60), 60.0 * np.arange(60), (np.arange(60) > 20).astype(int))  # 39 hours of label 1


def test_hourly_sepsis_labels_are_scored_as_the_challenge_does(tmp_path, capsys, small_models):
    """From the reader to the report: the threshold is the validation stays' best."""
    rng, header = np.random.default_rng(0), "HR|Temp|Age|SepsisLabel\n"
    for i in range(48):
        hours, septic = int(rng.integers(14, 22)), i % 3 == 0
        rows = [f"{80 + 4 * rng.normal() + 3 * septic * h:.1f}|{'NaN' if h % 4 else 37}|60|{int(septic and h >= 11)}\n"
                for h in range(hours)]
        write(tmp_path / "data" / "training_setA" / f"p{i:06}.psv", header + "".join(rows))
    assert train.main([*PRETRAIN, "--data_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "pre")]) == 0
    assert train.main([*FINETUNE, str(tmp_path / "pre" / "best.pt"), "--set", "trees=20", "--run_dir",
                       str(tmp_path / "fine")]) == 0
    assert "utility" in capsys.readouterr().out
    metrics = Checkpoint.open(tmp_path / "fine" / "best.pt").metrics
    assert main(["--checkpoint", str(tmp_path / "fine" / "best.pt"), "--predictions", str(tmp_path / "p.csv"), "--json",
                 str(tmp_path / "json")]) == 0
    printed, told = capsys.readouterr().out, json.loads((tmp_path / "json").read_text())["sepsis"][CHECKPOINT]
    assert "best utility of the validation split" in printed and "a patient-day" in printed
    table = pd.read_csv(tmp_path / "p.csv")
    for part, expected in (("valid", metrics["val_utility"]), ("test", told["utility"]["value"])):
        rows = table[table["split"] == part]
        stay = pd.factorize(rows["stay_id"])[0]
        since = hours_since_onset(stay, rows["minute"].to_numpy(), rows["label"].to_numpy())
        probability = rows["probability"].to_numpy()
        utility = normalised_utility(utilities_by(stay, since, probability >= told["threshold"] - 1e-6).sum(0))
        assert utility == pytest.approx(expected, abs=1e-9)
        if part == "valid":
            found = best_utility_threshold(stay, since, probability)[0]
            assert found == pytest.approx(metrics["threshold"], abs=1e-5)


def test_six_stays_of_a_patient_are_one_patient():
    """The share of alarms is a mean: its interval is as wide as that of the patients' means."""
    rng, patients = np.random.default_rng(0), 400
    subject, stay = np.repeat(np.arange(patients), 6), np.arange(6 * patients)
    label, alike = (subject % 2 == 0).astype(int), rng.random(patients) < .5
    p = np.where(alike[subject] ^ (rng.random(len(subject)) < .05), .9, .1)
    figures = {unit: score_figures(Points(stay, group, 0 * stay, label), {CHECKPOINT: p}, .5, sensitivity=.4)
               for unit, group in (("patients", subject), ("stays", stay))}
    alarms = 100 * (p > .5).reshape(-1, 6).mean(1)  # [patients]
    half = {unit: np.diff(told["methods"][CHECKPOINT]["alarms"]["interval"])[0] / 2
            for unit, told in figures.items()}
    assert half["patients"] == pytest.approx(1.96 * alarms.std(ddof=1) / np.sqrt(patients), rel=.1)
    assert half["stays"] < .5 * half["patients"]
    assert [told["resampled"] for told in figures.values()] == ["patients", "stays"]
    assert [told["patients"] for told in figures.values()] == [patients, len(stay)]
    wide, narrow = (np.subtract(told["calibration"]["high"], told["calibration"]["low"])
                    for told in figures.values())
    assert (wide > 2 * narrow).all()


def test_few_patients_have_no_interval_however_many_their_stays():
    subject = np.repeat(np.arange(18), 6)
    label, stays = (subject % 2 == 0).astype(int), np.arange(len(subject))
    p = np.random.default_rng(0).random(len(subject))
    figures = score_figures(Points(stays, subject, np.zeros(len(stays)), label), {CHECKPOINT: p}, .5,
                            groups={"part": {"all": subject >= 0}})
    assert figures["few"].startswith("patients with a positive label: 9, with a negative one: 9; below 10")
    for measures in (figures["methods"][CHECKPOINT], figures["subgroups"]["part"]["all"]):
        assert measures["auroc"]["interval"] is None


def test_the_interval_of_an_observed_share_is_that_of_independent_points_where_each_is_a_patient():
    """Agresti & Coull 1998."""
    label, p = np.array([1] * 8 + [0] * 12 + [0] * 20), np.repeat([.35, .05], 20)
    bins = calibration_bins(np.arange(40), label, p)
    assert bins["points"].tolist() == [20, 20] and bins["from"].tolist() == [.05, .35]
    assert bins["observed"].tolist() == [0, .4] and bins["predicted"].tolist() == pytest.approx([.05, .35])
    centre = (8 + 1.96 ** 2 / 2) / (20 + 1.96 ** 2)
    half = 1.96 * np.sqrt(centre * (1 - centre) / (20 + 1.96 ** 2))
    assert bins.loc[1, ["low", "high"]].tolist() == pytest.approx([centre - half, centre + half])
    assert bins.loc[0, "low"] == 0 < bins.loc[0, "high"] < .25
    assert calibration_error(bins) == pytest.approx(.05)


# ----------------------------------------------------------------------------------------------------------------------
# Other kinds of answers
# ----------------------------------------------------------------------------------------------------------------------

def made_up_times(seed: int, n: int = 300):
    """Hours (with ties) and causes of n points of which a third is censored, and a risk that tells of them."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n).round(1)
    hours, censored = rng.exponential(20 * np.exp(-risk)).round() + 1, rng.exponential(40, n).round() + 1
    cause = np.where(censored < hours, 0, 1 + (rng.random(n) < .3))
    return np.minimum(hours, censored), cause, risk


def test_concordance_and_brier_score_of_one_cause_are_those_of_scikit_survival():
    reference = pytest.importorskip("sksurv.metrics", reason="scikit-survival is not installed: the figures of "
                                    "events are not compared with it")
    (time, cause, _), (hours, happened, risk) = made_up_times(0), made_up_times(1)
    cause, happened, horizons = np.minimum(cause, 1), np.minimum(happened, 1), np.array([5., 12., 30.])
    curve = censoring_curve(time, cause, np.ones(len(time)))
    train, test = (np.array([*zip(c == 1, h)], dtype=[("e", bool), ("t", float)])
                   for c, h in ((cause, time), (happened, hours)))
    mine = concordance_measure(hours, happened, 1, risk, curve, 30.)(np.ones((1, 300)))[0, 0]
    assert mine == pytest.approx(reference.concordance_index_ipcw(train, test, risk, tau=30.)[0], abs=1e-9)
    incidence = 1 / (1 + np.exp(-risk[:, None] - np.array([-1., 0., 1.])))
    mine = integrated(brier_scores(hours, happened, 1, incidence, horizons, curve), horizons).mean()
    assert mine == pytest.approx(reference.integrated_brier_score(train, test, 1 - incidence, horizons), abs=1e-9)


def test_concordance_of_competing_causes_equals_a_loop_over_pairs_and_weights_count_as_copies():
    hours, cause, risk = made_up_times(2, 80)
    curve = censoring_curve(*made_up_times(0)[:2], np.ones(300))
    g, until, copies = uncensored(curve, hours), 30, np.random.default_rng(0).integers(0, 4, 80)
    for k in (1, 2):
        def loop(weight):
            right = pairs = 0
            for i in np.flatnonzero((cause == k) & (hours < until)):
                for j in range(80):
                    if hours[j] > hours[i] or hours[j] == hours[i] and cause[j] == 0:
                        each = 1 / g[i]**2
                    elif cause[j] not in (0, k) and hours[j] <= hours[i]:
                        each = 1 / (g[i] * g[j])
                    else:
                        continue
                    each *= weight[i] * weight[j]
                    pairs += each
                    right += each * ((risk[i] > risk[j]) + .5 * (risk[i] == risk[j]))
            return right / pairs
        found = concordance_measure(hours, cause, k, risk, curve, until)(np.stack([np.ones(80), copies]))[:, 0]
        np.testing.assert_allclose(found, [loop(np.ones(80)), loop(copies)], rtol=1e-10)


def test_without_censoring_incidence_is_the_share_that_came_and_no_point_is_weighted():
    hours, cause = np.array([1., 2., 2., 5.]), np.array([1, 2, 1, 1])
    found = incidence_curve(hours, cause, np.ones(4), 2, [1., 2., 4., 6.])
    np.testing.assert_allclose(found, [[.25, .5, .5, .75], [0, .25, .25, .25]])
    curve = censoring_curve(hours, cause, np.ones(4))
    assert (censoring_weights(hours, cause, np.array([1., 3.]), curve) == 1).all()


def test_a_curve_of_many_steps_keeps_a_thousand_near_the_whole():
    hours, cause = np.random.default_rng(0).exponential(size=5000), np.zeros(5000)
    time, share = censoring_curve(hours, cause, np.ones(5000))
    assert len(time) <= 1000 and share[-1] == 0
    at = np.linspace(0, 5, 50)
    np.testing.assert_allclose(uncensored((time, share), at), [(hours > t).mean() for t in at], atol=2e-3)


def test_figures_of_classes_numbers_and_several_outcomes_are_those_of_scikit_learn_and_weights_count_as_copies():
    rng = np.random.default_rng(0)
    label, p = rng.integers(0, 3, 90), rng.dirichlet((1, 1, 1), 90)
    number, median = rng.normal(size=(2, 90)).round(1)
    outcome = (rng.random((90, 2)) < p[:, :2]).astype(float)
    outcome[:9, 0] = np.nan
    copies = rng.integers(0, 3, 90)
    measures = [class_measure(label, p), number_measure(number, median, median - 1, median + 1),
                ranking_measure(outcome, p[:, :2])]
    found = [measure(np.stack([np.ones(90), copies])) for measure in measures]
    for row, of in enumerate((np.arange(90), np.repeat(np.arange(90), copies))):
        y, q, a, b = label[of], p[of], number[of], median[of]
        np.testing.assert_allclose(found[0][row], [
            (y == q.argmax(1)).mean(), roc_auc_score(y, q, multi_class="ovr"), sklearn.metrics.log_loss(y, q),
            sklearn.metrics.cohen_kappa_score(y, q.argmax(1))])
        inside = ((b - 1 <= a) & (a <= b + 1)).mean()
        np.testing.assert_allclose(found[1][row], [
            abs(a - b).mean(), np.sqrt(((a - b)**2).mean()), pd.Series(a).corr(pd.Series(b), "spearman"), inside, 2])
        known = ~np.isnan(outcome[of, 0])
        each = [[f(outcome[of, k][m], q[m, k]) for f in (roc_auc_score, average_precision_score)]
                for k, m in ((0, known), (1, known | True))]
        np.testing.assert_allclose(found[2][row], [*np.mean(each, 0), *each[0], *each[1]])


def test_an_interval_holds_the_value_and_narrows_with_more_patients():
    widths = []
    for n in (50, 800):
        x = np.random.default_rng(0).normal(size=n)
        rows = resampled(lambda weight: weight @ x[:, None] / weight.sum(1, keepdims=True), np.arange(n))
        row = measured(["mean"], rows)["mean"]
        low, high = row["interval"]
        assert low < row["value"] < high and row["value"] == pytest.approx(x.mean())
        assert high - low == pytest.approx(2 * 1.96 * x.std() / np.sqrt(n), rel=.15)
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    rows = resampled(lambda weight: weight[:, :1], np.zeros(20))
    assert measured(["mean"], rows)["mean"]["interval"] is None
