"""What is asked of a stay: columns of answers, from the cohort to the batch, and their task."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batches import StayDataset
from data import InputError
from tables import open_cache, write_cache
from checkpoint import Checkpoint
from finetune_config import FinetuneConfig
from questions import at_end, at_every_set, labelled_points, with_points
from tasks import KINDS, Binary, Classes, Event, Number, Several, Task
from test_suite import main
from tests.tiny import PLAIN, cohort_of, one_error_line, random_stays

NAN = np.nan


def test_several_columns_of_answers_go_through_the_cache_to_the_batch(tmp_path):
    """A point counts as labelled where it has an answer in any column; one without any weighs nothing."""
    answers = np.array([[0, NAN, 2.5], [NAN, NAN, NAN], [1, 7, NAN], [NAN, 3, 1]], dtype=np.float32)
    cohort = at_end(cohort_of(random_stays()), answers)
    write_cache(tmp_path / "cached", [cohort, at_end(cohort_of(random_stays(seed=1)), answers[::-1])])
    cached = open_cache(tmp_path / "cached")
    np.testing.assert_array_equal(cached.answers, np.concatenate([answers, answers[::-1]]))
    assert labelled_points(cached, np.arange(8)).tolist() == [0, 2, 3, 4, 5, 7]
    assert cached.label.tolist() == [0, -1, 1, -1, -1, 1, -1, 0]
    batch = StayDataset(cohort, PLAIN, points=True)[np.array([2, 1, 0])]
    np.testing.assert_array_equal(batch.answer[:, 0], answers[[2, 1, 0]])
    assert batch.weight[:, 0].tolist() == [1, 0, 1]
    asked, weight = at_every_set(cohort, np.array([0, 2]), np.ones(2), .5)
    batch = StayDataset(cohort, PLAIN, points=True).of(asked, weight)[np.array([2])]
    np.testing.assert_array_equal(batch.answer[0, :9], np.tile(answers[2], (9, 1)))


def test_a_question_without_answers_has_one_empty_column():
    cohort = cohort_of(random_stays())
    for asked in (at_end(cohort), with_points(cohort, np.ones(4, dtype=int), cohort.point_minute)):
        assert asked.answers.shape == (4, 1) and not asked.labelled.any() and (asked.label == -1).all()
        assert len(labelled_points(asked, np.arange(4))) == 0


def test_a_finetuned_checkpoint_keeps_its_task_and_an_unknown_one_is_refused(small_finetuned, tmp_path, capsys):
    checkpoint = Checkpoint.open(small_finetuned)
    assert checkpoint.task == {"kind": "binary", "names": ["label"]}
    assert checkpoint.classifier().task.state_dict() == checkpoint.task
    assert Task.from_state(checkpoint.task, "x") == Task.from_state(None, "x") == Binary()
    with pytest.raises(InputError, match=f"{small_finetuned}: its task is"):  # of other weights
        replace(checkpoint, task={"kind": "several", "names": ["a", "b"]}).classifier()
    for strange in ({"kind": "number"}, {"kind": ["binary"]}, {}):
        path = tmp_path / "best.pt"
        replace(checkpoint, task=strange).save(path)
        one_error_line(capsys, main(["--checkpoint", str(path)]), f"{path}: its task is")


def test_points_without_an_answer_have_no_part_in_the_loss_nor_its_gradient():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, requires_grad=True)
    answer = torch.tensor([[[0.], [1.], [NAN]], [[1.], [NAN], [NAN]]])
    weight = torch.tensor([[1., 2., 0.], [.5, 0., 0.]])
    loss = Binary().loss(logits, answer, FinetuneConfig(), weight, total=2)
    known = F.cross_entropy(logits[[0, 0, 1], [0, 1, 0]], torch.tensor([0, 1, 1]), reduction="none")
    assert loss.item() == pytest.approx((known @ torch.tensor([1., 2., .5])).item() / 2)
    loss.backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad != 0).any(-1).tolist() == [[1, 1, 0], [1, 0, 0]]
    unweighted = Binary().loss(logits, answer, FinetuneConfig())
    assert unweighted.item() == pytest.approx(known.mean().item())


def test_the_answer_is_the_probability_whose_log_odds_are_the_logits_difference():
    answer = Binary().answer(torch.tensor([[0., 0.], [-1., 1.], [3., -2.]]))
    assert answer.dtype == np.float64 and answer.shape == (3, 1)
    np.testing.assert_allclose(answer[:, 0], 1 / (1 + np.exp([0, -2, 5])), rtol=1e-6)


def test_a_sampled_negative_stands_for_those_left_out_and_every_epoch_draws_anew():
    cohort = cohort_of([[(60 * m, [(0, 1.)]) for m in range(100)]])
    answers = np.where(np.arange(100) % 20 == 0, 1., 0.)
    answers[50:60] = NAN                                       # 5 positive, 85 negative, 10 unlabelled
    cohort = with_points(cohort, np.array([100]), cohort.set_minute, answers)
    config = FinetuneConfig(negatives=4., few_points=1)
    drawn = [Binary().training_points(cohort, np.arange(1), config, 0, epoch) for epoch in (0, 0, 1)]
    for points, weight in drawn:
        label = answers[points]
        assert (np.diff(points) > 0).all() and (label == 1).sum() == 5 and (label == 0).sum() == 20
        assert weight[label == 1].tolist() == [1] * 5 and weight[label == 0].sum() == pytest.approx(85)
    assert drawn[0][0].tolist() == drawn[1][0].tolist() != drawn[2][0].tolist()
    points, weight = Binary().training_points(cohort, np.arange(1), FinetuneConfig(), 0, 0)
    assert len(points) == 90 and (weight == 1).all()                         # so few are all learned from


def test_what_is_lacking_to_learn_is_named_with_its_counts():
    task = Binary()
    assert task.lacking(np.array([[0.], [1.]])) == ""
    assert task.lacking(np.zeros((1200, 1))) == "one class only (0 of 1,200 labels are 1)"
    assert task.lacking(np.ones((3, 1))) == "one class only (3 of 3 labels are 1)"
    assert task.lacking(np.zeros((0, 1))) == "no label at all"
    cohort = at_end(cohort_of(random_stays()), [0, 1, 1, NAN])
    task.check(cohort, {"train": ["stay0", "stay1"]})
    one_class = r"handmade: the labelled valid stays hold one class only \(1 of 1 labels are 1\)"
    with pytest.raises(InputError, match=one_class):
        task.check(cohort, {"train": ["stay0", "stay1"], "valid": ["stay2", "stay3"]})


def test_the_head_begins_at_the_weighted_prior_of_its_answers():
    prior = Binary().prior(torch.tensor([[0.], [1.], [0.]]), torch.tensor([1., 1., 2.]))
    assert prior.tolist() == pytest.approx([math.log(.75), math.log(.25)])


# ------------------------------------------------------------------------------------------------------------
# The kinds
# ------------------------------------------------------------------------------------------------------------

def made_up(kind: str, stays: int = 400, seed: int = 0):
    """A cohort of stays with one value of variable a each, on which the answers depend, and its names."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=stays)
    cohort = cohort_of([[(0, [(0, value), (1, 0.)])] for value in x])
    noise = rng.normal(size=(3, stays))
    if kind == "several":
        answers = (np.stack([x, -x, x], 1) + noise.T > .5).astype(float)
        answers[rng.random(answers.shape) < .2] = NAN
        names = ("a", "b", "c")
    elif kind == "classes":
        answers, names = np.digitize(x + .5 * noise[0], (-1, 1)).astype(float), ("high", "low", "middle")
    elif kind == "number":
        answers, names = np.exp(x + .5 * noise[0]), ("label",)
    elif kind == "event":
        hours, censored = rng.exponential(24 * np.exp(-x)), rng.exponential(60, stays)
        cause = np.where(censored < hours, 0, 1 + (rng.random(stays) < .3))
        answers, names = np.stack([np.minimum(hours, censored), cause], 1), ("death", "discharge")
    else:
        answers, names = (x + noise[0] > 0).astype(float), ("label",)
    return replace(at_end(cohort, answers), kind=kind, names=names), x


def fitted_task(kind: str, **changes):
    cohort, x = made_up(kind, **changes)
    points = labelled_points(cohort, np.arange(len(cohort)))
    return cohort, x, points, Task.of(cohort).fitted(cohort, points, np.ones(len(points), dtype=np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_head_learns_each_kind_better_than_its_prior(kind):
    """From the prior on, gradient steps on the loss give better figures on other stays."""
    cohort, x, points, task = fitted_task(kind)
    other, z = made_up(kind, seed=1)
    answer, weight = torch.from_numpy(cohort.answers[points]), torch.ones(len(points))
    head = torch.nn.Linear(1, task.outputs)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = task.prior(answer, weight)
    assert torch.isfinite(head.bias).all()
    inputs = [torch.from_numpy(each).float()[:, None] for each in (x[points], z)]
    asked = labelled_points(other, np.arange(len(other)))

    def judged():
        with torch.no_grad():
            given = task.answer(head(inputs[1]))[asked]
        assert given.shape == (len(asked), len(task.columns)) and given.dtype == np.float64
        return task.validation(other, asked, given)
    before, optimizer = judged(), torch.optim.Adam(head.parameters(), .05)
    assert set(task.untrained) <= set(before) and all(map(math.isfinite, before.values()))
    for _ in range(100):
        optimizer.zero_grad()
        task.loss(head(inputs[0]), answer, FinetuneConfig(), weight).backward()
        optimizer.step()
    after = judged()
    assert task.improves(after, before) and abs(after[task.best] - before[task.best]) > .05, (before, after)
    assert task.describe(after).startswith("validation ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_without_an_answer_gives_no_loss_and_no_gradient(kind):
    cohort, _, points, task = fitted_task(kind, stays=60)
    answer = torch.from_numpy(cohort.answers[points[:6]])
    answer[[1, 4]] = NAN
    logits = torch.randn(6, task.outputs, requires_grad=True)
    loss = task.point_loss(logits, answer, FinetuneConfig())
    assert (loss == 0).tolist() == [False, True, False, False, True, False]
    task.loss(logits, answer, FinetuneConfig()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad != 0).any(1).tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_goes_through_its_state_and_a_forged_state_is_refused(kind):
    _, _, _, task = fitted_task(kind)
    state = task.state_dict()
    assert Task.from_state(state, "x") == task and {str, list, float} >= set(map(type, state.values()))
    forgeries = [{"kind": "none"}, {"names": "label"}, {"names": ["a", "a"]}, {"more": 1.}, {"names": [1]}]
    forgeries += [{name: value} for name in state if name not in ("kind", "names")
                  for value in ([math.nan], "1", math.nan, [-1., 2.])]
    for forged in forgeries:
        with pytest.raises(InputError, match="x: its task is"):
            Task.from_state(state | forged, "x")


def test_the_loss_of_several_outcomes_is_the_mean_over_those_that_are_known():
    torch.manual_seed(0)
    logits, task = torch.randn(2, 6), Several(("a", "b", "c"))
    answer = torch.tensor([[1., NAN, 0.], [NAN, NAN, 1.]])
    first = [F.cross_entropy(logits[0, 2 * k:2 * k + 2], torch.tensor(label)) for k, label in ((0, 1), (2, 0))]
    close = pytest.approx([sum(first).item() / 2, F.cross_entropy(logits[1, 4:], torch.tensor(1)).item()])
    assert task.point_loss(logits, answer, FinetuneConfig()).tolist() == close


def test_quantiles_that_cross_are_put_in_order_and_answered_in_the_number_s_unit():
    task = Number(mean=.5, std=2., log_scale=3.)
    median, low, high = task.answer(torch.tensor([[1., 0., -1.]]))[0]
    assert (low, median, high) == pytest.approx((0, 3 * math.expm1(.5), 3 * math.expm1(2.5)))
    number = torch.tensor([[0.], [4.], [50.]])
    logits = task.standardised(number).expand(-1, 3)
    np.testing.assert_allclose(task.answer(logits), number.expand(-1, 3), rtol=1e-5, atol=1e-5)
    over = task.standardised(number) - torch.zeros(3)
    loop = [np.mean([max(level * x, (level - 1) * x) for level, x in zip((.1, .5, .9), row)])
            for row in over.tolist()]
    assert task.point_loss(torch.zeros(3, 3), number, None).tolist() == pytest.approx(loop)


def test_the_interval_of_a_number_is_widened_until_it_holds_80_of_100_validation_points():
    """Whose quantiles were learned too narrow; and an older state has no margin."""
    rng = np.random.default_rng(0)
    number, task = np.exp(rng.normal(size=(2000, 1))), Number(mean=.1, std=1.1, log_scale=2.)
    logits = task.standardised(torch.from_numpy(number)) + torch.from_numpy(rng.normal(size=(2000, 1)))
    logits = logits + torch.tensor([-.5, 0., .5])

    def held(task, points):
        median, low, high = task.answer(logits[points]).T
        assert ((low <= median) & (median <= high)).all()
        return ((low <= number[points, 0]) & (number[points, 0] <= high)).mean()
    calibrated = task.calibrated(logits[:1000], number[:1000])
    assert held(calibrated, slice(0, 1000)) == pytest.approx(.8, abs=.002) and held(task, slice(0, 1000)) < .6
    assert held(calibrated, slice(1000, 2000)) == pytest.approx(.8, abs=.04)
    assert Task.from_state(calibrated.state_dict(), "x") == calibrated
    older = {name: value for name, value in task.state_dict().items() if name != "margin"}
    assert Task.from_state(older, "x") == task


def test_the_loss_of_an_event_is_the_likelihood_of_its_intervals():
    """Intervals (0, 1], (1, 3], (3, 6] hours; a point censored in the second half of one came through it."""
    task = Event(("a", "b"), horizons=(3.,), edges=(1., 3., 6.), marginal=(.1, .1))
    torch.manual_seed(0)
    logits = torch.randn(6, 9)
    p = logits.view(6, 3, 3).softmax(-1).double()
    answer = torch.tensor([[2., 2.], [2., 0.], [1.9, 0.], [1., 1.], [9., 1.], [0., 1.]])
    expected = [p[0, 0, 0] * p[0, 1, 2], p[1, 0, 0] * p[1, 1, 0], p[2, 0, 0], p[3, 0, 1],
                p[4, 0, 0] * p[4, 1, 0] * p[4, 2, 0], p[5, 0, 1]]
    found = task.point_loss(logits, answer, None)
    assert found.tolist() == pytest.approx([-math.log(x) for x in expected], rel=1e-5)


def test_incidences_rise_with_the_horizon_and_sum_to_at_most_one():
    _, _, _, task = fitted_task("event")
    torch.manual_seed(0)
    given = task.answer(3 * torch.randn(50, task.outputs)).reshape(50, 2, -1)
    assert task.columns[0] == f"death_{task.horizons[0]:g}" and given.shape[2] == 3
    assert (np.diff(given, axis=2) >= 0).all() and (given >= 0).all() and (given.sum(1) <= 1 + 1e-9).all()
    np.testing.assert_allclose(task.answer(torch.from_numpy(np.tile(prior_of(task), (2, 1))))[0],
                               task.marginal, atol=.03)


def prior_of(task):
    cohort, _ = made_up("event")
    return task.prior(torch.from_numpy(cohort.answers), torch.ones(len(cohort))).numpy()


def test_horizons_are_the_quartiles_of_the_training_events_or_those_given_and_within_the_follow_up():
    cohort, _, points, task = fitted_task("event")
    hours, cause = cohort.answers[points].T
    np.testing.assert_allclose(task.horizons, np.quantile(hours[cause > 0], (.25, .5, .75)), rtol=1e-6)
    given = Task.of(cohort).fitted(cohort, points, np.ones(len(points)), (6., 12.))
    assert given.horizons == (6., 12.) and {6., 12.} <= {*given.edges}
    for wrong, said in (((1e6,), "1e[+]06"), ((12., 6.), "12 6"), ((6., 6.), "6 6"), ((0., 6.), "0 6")):
        with pytest.raises(InputError, match=f"--horizons {said}: give rising hours above 0, up to the"):
            Task.of(cohort).fitted(cohort, points, np.ones(len(points)), wrong)
    at_once = replace(cohort, answers=cohort.answers * [[0, 1]] ** (np.arange(len(cohort)) % 2)[:, None])
    assert min(Task.of(cohort).fitted(at_once, points, np.ones(len(points))).horizons) > 0
    with pytest.raises(InputError, match="--horizons: labels of the kind number have none"):
        fitted_task("number")[3].fitted(cohort, points, np.ones(len(points)), (6.,))


def test_labels_in_other_order_are_recoded_and_strange_ones_refused():
    cohort = replace(at_end(cohort_of(random_stays()), [[1, 0], [0, NAN], [NAN, NAN], [NAN, 1]]),
                     kind="several", names=("b", "c"))
    asked = Several(("a", "c", "b")).recode(cohort)
    np.testing.assert_array_equal(asked.answers, [[NAN, 0, 1], [NAN, NAN, 0], [NAN] * 3, [NAN, 1, NAN]])
    words = replace(at_end(cohort, [1, 0, NAN, 1]), kind="classes", names=("x", "y"))
    recoded = Classes(("y", "z", "x")).recode(words)
    np.testing.assert_array_equal(recoded.answers[:, 0], [0, 2, NAN, 0])
    assert Classes(("y", "z", "x")).labels(recoded.answers)["label"].fillna("-").tolist() == ["y", "x", "-", "y"]
    events = replace(at_end(cohort, [[5, 1], [6, 0], [NAN, NAN], [7, 2]]), kind="event", names=("x", "y"))
    recoded = Event(("y", "x")).recode(events)
    np.testing.assert_array_equal(recoded.answers, [[5, 2], [6, 0], [NAN, NAN], [7, 1]])
    assert Event(("y", "x")).labels(recoded.answers)["event"].fillna("-").tolist() == ["x", "0", "-", "y"]
    assert Number().labels(np.float32([[36.6], [1234567]]))["label"].tolist() == [36.6, 1234567]
    with pytest.raises(InputError, match="its labels name x, where the checkpoint knows y, z"):
        Classes(("y", "z")).recode(words)
    with pytest.raises(InputError, match="of the kind event, where the checkpoint answers binary"):
        Binary().recode(events)
    assert np.isnan(Several(("a", "b")).recode(at_end(cohort_of(random_stays()))).answers).all()
