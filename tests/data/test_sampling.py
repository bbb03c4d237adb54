"""Reservoirs and batches are functions of the rows and of (seed, step, rank)."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from zsr.data.sampling import Draws, Pool, Reservoir, Sampler, seed_of
from zsr.data.shards import Block
from zsr.errors import ConfigError

CLASSES = 5


def block(start: int, rows: int, dim: int = 3) -> Block:
    ids = np.arange(start, start + rows)
    features = np.repeat(ids[:, None], dim, axis=1).astype(np.float32)
    return Block(ids=ids, pairs=ids + 10_000, labels=ids % CLASSES, features=features)


def pool(rows: int, capacity: int = 1000, start: int = 0, offset: int = 0) -> Pool:
    held = Reservoir(CLASSES, capacity, seed=0)
    taken = block(start, rows)
    held.add(Block(taken.ids + offset, taken.pairs, taken.labels, taken.features))
    return held.finish("cpu")


def sampler(**options: Any) -> Sampler:
    photo = pool(60, offset=10_000)  # the ids that the sketches' pairs name
    return made(pool(40), photo, CLASSES, **options)


def made(sketch: Pool, photo: Pool, classes: int, **options: Any) -> Sampler:
    return Sampler(sketch, photo, Draws(sketch, photo, 0, **options), torch.eye(classes))


def test_a_roomy_reservoir_holds_every_row_in_any_order_of_blocks() -> None:
    one, two = Reservoir(CLASSES, 100, 0), Reservoir(CLASSES, 100, 0)
    one.add(block(0, 10))
    one.add(block(10, 7))
    two.add(block(10, 7))
    two.add(block(0, 10))
    assert torch.equal(one.finish("cpu").features, two.finish("cpu").features)
    assert one.finish("cpu").sizes.tolist() == [4, 4, 3, 3, 3]


def test_a_full_reservoir_is_bounded_and_depends_on_the_rows_alone() -> None:
    whole, pieces = Reservoir(CLASSES, 4, 0), Reservoir(CLASSES, 4, 0)
    whole.add(block(0, 500))
    for start in range(0, 500, 50):
        pieces.add(block(start, 50))
    assert whole.finish("cpu").sizes.tolist() == [4] * CLASSES
    assert whole.finish("cpu").ids.tolist() == pieces.finish("cpu").ids.tolist()


def test_a_full_reservoir_is_a_uniform_sample() -> None:
    kept = np.zeros(200)
    for seed in range(400):
        held = Reservoir(1, 20, seed)
        rows = block(0, 200)
        held.add(Block(rows.ids, rows.pairs, np.zeros(200, np.int64), rows.features))
        kept[held.finish("cpu").ids] += 1
    # each of 4 quarters of the stream is kept equally often: 2000 expected, sd about 38
    assert all(1850 < quarter.sum() < 2150 for quarter in np.split(kept, 4))


def test_rows_keep_their_features_and_classes() -> None:
    held = pool(40)
    assert torch.equal(held.features[:, 0].long(), torch.from_numpy(held.ids))
    bounds = np.cumsum([0, *held.sizes.tolist()])
    assert all(set(held.ids[a:b] % CLASSES) == {c} for c, (a, b) in enumerate(pairwise(bounds)))


def test_a_batch_pairs_within_a_class() -> None:
    batch = sampler().batch(step=3, size=64)
    assert torch.equal(batch.sketch[:, 0].long() % CLASSES, batch.label)
    assert torch.equal(batch.photo[:, 0].long() % CLASSES, batch.label)
    assert torch.equal(batch.word, torch.eye(CLASSES)[batch.label])


def test_classes_are_drawn_uniformly() -> None:
    drawn = torch.cat([sampler().batch(step, 200).label for step in range(100)])
    counts = torch.bincount(drawn, minlength=CLASSES).double()
    assert float(((counts - 4000).square() / 4000).sum()) < 18.5  # 99.9 % quantile at 4 degrees of freedom


def test_the_step_fixes_the_batch() -> None:
    assert torch.equal(sampler().batch(7, 16).sketch, sampler().batch(7, 16).sketch)
    assert not torch.equal(sampler().batch(7, 16).sketch, sampler().batch(8, 16).sketch)
    assert not torch.equal(sampler().batch(7, 16).sketch, sampler().batch(7, 16, repetition=1).sketch)


def test_two_ranks_share_the_batch_of_one() -> None:
    whole = sampler().batch(5, 32)
    halves = [sampler().batch(5, 16, rank, 2) for rank in range(2)]
    assert torch.equal(whole.photo, torch.cat([half.photo for half in halves]))


def test_paired_batches_take_the_sketch_s_own_photo() -> None:
    batch = sampler(paired=True).batch(1, 64)
    assert torch.equal(batch.sketch, batch.photo)  # photo 10,000 + i carries feature i, and so does sketch i


def test_pairing_without_pairs_is_refused() -> None:
    with pytest.raises(ConfigError, match="none has one"):
        made(pool(40), pool(40), CLASSES, paired=True)


def test_negatives_are_of_another_class_and_uniform() -> None:
    batches = [sampler(triplets=True).batch(step, 200) for step in range(50)]
    other = torch.cat([b.negative_label for b in batches if b.negative_label is not None])
    own = torch.cat([b.label for b in batches])
    assert bool((other != own).all())
    assert all(abs(int(n) - 2000) < 200 for n in torch.bincount(other, minlength=CLASSES))


def test_negatives_follow_weights_and_never_the_anchor_or_a_class_without_rows() -> None:
    weights = torch.rand(CLASSES + 1, CLASSES + 1, generator=torch.Generator().manual_seed(0)) + 0.05
    held = Reservoir(CLASSES + 1, 1000, seed=0)  # of the last class there is no row
    held.add(block(0, 40))
    drawer = made(held.finish("cpu"), held.finish("cpu"), CLASSES + 1, triplets=True, negatives=weights)
    batch = drawer.batch(step=0, size=100_000)
    assert batch.negative is not None
    assert batch.negative_label is not None
    assert torch.equal(batch.negative[:, 0].long() % CLASSES, batch.negative_label)
    wanted = weights[:CLASSES, :CLASSES].fill_diagonal_(0.0)
    wanted = wanted / wanted.sum(1, keepdim=True)
    for anchor in range(CLASSES):
        drawn = batch.negative_label[batch.label == anchor]
        share = torch.bincount(drawn, minlength=CLASSES) / len(drawn)
        sigma = (wanted[anchor] * (1 - wanted[anchor]) / len(drawn)).sqrt()
        assert bool(((share - wanted[anchor]).abs() <= 3 * sigma).all())


def test_weights_leave_all_else_of_a_batch_as_it_was() -> None:
    uniform, weighted = sampler(triplets=True), sampler(triplets=True, negatives=torch.ones(CLASSES, CLASSES))
    one, two = uniform.batch(3, 16), weighted.batch(3, 16)
    assert torch.equal(one.sketch, two.sketch)
    assert torch.equal(one.photo, two.photo)


@pytest.mark.parametrize(("weight", "total"), [(0.0, "0"), (float("nan"), "nan")])
def test_a_class_without_a_negative_is_refused(weight: float, total: str) -> None:
    weights = torch.ones(CLASSES, CLASSES)
    weights[3] = weight
    with pytest.raises(ConfigError, match=f"weights of class 3 for the others sum to {total}"):
        sampler(triplets=True, negatives=weights)


def test_one_class_is_too_few() -> None:
    held = Reservoir(1, 10, 0)
    rows = block(0, 10)
    held.add(Block(rows.ids, rows.pairs, np.zeros(10, np.int64), rows.features))
    with pytest.raises(ConfigError, match="at least 2"):
        made(held.finish("cpu"), held.finish("cpu"), 1)


def test_seeds_mix_their_parts_in_order() -> None:
    seeds = {seed_of(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
