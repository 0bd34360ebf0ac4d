"""What is asked of a stay: columns of answers, from the cohort to the batch, and their task."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batches import StayDataset
from data import InputError, at_end, at_every_set, labelled_points, with_points
from tables import open_cache, write_cache
from checkpoint import Checkpoint
from finetune_config import FinetuneConfig
from tasks import Binary, Task
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
    for strange in ({"kind": "several", "names": ["a", "b"]}, {"kind": ["binary"]}, {}):
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
