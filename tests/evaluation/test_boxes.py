"""Boxes beyond the recorded cases of `parity/test_metrics.py`."""

from lmm_jax.evaluation import boxes


def test_the_first_box_of_four_numbers_is_read():
    assert boxes.read_box("[1, 2, 3] or [0.1,0.2 , 0.3, -4]") == (0.0, 0.0, 0.0, 0.0)  # a space before a comma
    assert boxes.read_box("[1, 2, 3] or [ 0.1,0.2, 0.3, -4 ] [0,0,1,1]") == (0.1, 0.2, 0.3, -4.0)


def test_boxes_without_area_overlap_in_nothing():
    assert boxes.overlap((0, 0, 0, 0), (0.5, 0.5, 0.5, 0.5)) == 0.0
    assert boxes.overlap((0, 0, 1, 1), (0, 0, 1, 1)) == 1.0
    assert boxes.within((0, 0, 1, 1), (0.5, 0.5, 1.5, 1.5)) == 1.0  # on the edge
