"""Augmentation keeps what a picture shows, and is a function of the batch's seed and the row's place alone."""

import numpy as np

from zsr.data.augment import crop_and_mirror, uniform


def test_a_crop_takes_its_colours_from_the_picture() -> None:
    picture = np.random.default_rng(0).integers(40, 90, (12, 12, 3), np.uint8)
    for draw in uniform(0, np.arange(16)):
        made = crop_and_mirror(picture, draw)
        assert made.shape == picture.shape
        assert made.dtype == np.uint8
        assert 40 <= made.min() <= made.max() < 90


def test_pictures_of_a_batch_are_cut_differently_and_some_are_mirrored() -> None:
    ramp = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (16, 16, 3))
    rises = np.array(
        [np.diff(crop_and_mirror(ramp, draw).astype(int), axis=1).mean() for draw in uniform(1, np.arange(64))]
    )
    assert 20 <= (rises > 0).sum() <= 44
    assert len(set(np.abs(rises))) > 32


def test_no_crop_reaches_beyond_the_picture() -> None:
    picture = np.full((7, 9, 3), 200, np.uint8)
    for corner in (0.0, 1.0 - 2**-53):
        assert (crop_and_mirror(picture, np.full(5, corner)) == 200).all()


def test_a_row_s_numbers_follow_from_the_seed_and_its_place() -> None:
    whole = uniform(3, np.arange(1000))
    assert np.array_equal(whole[400:], uniform(3, np.arange(400, 1000)))
    assert not np.isclose(whole, uniform(4, np.arange(1000))).any()
    assert np.abs(whole.mean(0) - 0.5).max() < 4 * 12**-0.5 / 1000**0.5
    assert ((whole >= 0) & (whole < 1)).all()
