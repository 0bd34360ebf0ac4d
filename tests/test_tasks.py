"""What is asked of a stay: columns of answers, from the cohort to the batch."""

import numpy as np

from batches import StayDataset
from data import at_end, at_every_set, labelled_points, with_points
from tables import open_cache, write_cache
from tests.tiny import PLAIN, cohort_of, random_stays

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
