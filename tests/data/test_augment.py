"""Augmentation keeps what a picture shows, and is a function of torch's seed alone."""

import torch

from zsr.data.augment import crop_and_mirror


def test_a_crop_takes_its_colours_from_the_picture() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(40, 90, (16, 12, 12, 3), dtype=torch.uint8)
    made = crop_and_mirror(pixels)
    assert made.shape == pixels.shape
    assert bool((made >= 40).all())
    assert bool((made <= 90).all())


def test_pictures_of_a_batch_are_cut_differently_and_some_are_mirrored() -> None:
    torch.manual_seed(0)
    ramp = torch.arange(16, dtype=torch.uint8).mul(10).view(1, 1, 16, 1).expand(32, 16, 16, 3)
    rises = crop_and_mirror(ramp).diff(dim=2).mean((1, 2, 3))
    assert 8 <= int((rises > 0).sum()) <= 24
    assert len(set(rises.abs().tolist())) > 16


def test_the_same_seed_cuts_the_same() -> None:
    pixels = torch.randint(0, 255, (4, 8, 8, 3), dtype=torch.uint8)
    torch.manual_seed(3)
    first = crop_and_mirror(pixels)
    torch.manual_seed(3)
    assert crop_and_mirror(pixels).equal(first)
