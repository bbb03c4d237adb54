"""What of `make sanity` needs no training: the world is as hard as its description says."""

from statistics import median

import pytest
import torch

from tests.sanity.world import EACH, SEEN, Recipe, World, floors, prepared, seen, trained, world, zero_shot

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    return [world(seed) for seed in SEEDS]


def test_raw_features_rank_near_chance_and_a_linear_map_and_the_true_photo_well(worlds: list[World]) -> None:
    found = [floors(each, seed) for seed, each in enumerate(worlds)]
    middle = {name: median(scores[name] for scores in found) for name in found[0]}
    assert middle["raw cosine"] <= 0.20
    assert 0.65 < middle["least squares"] < middle["oracle"] < 0.95
    assert all(0.08 <= scores["shuffled test labels"] <= 0.11 for scores in found)


def test_a_seed_is_a_world() -> None:
    assert world(0).features["photo"].equal(world(0).features["photo"])
    assert not world(0).features["photo"].equal(world(1).features["photo"])


def test_training_sees_seen_rows_only_and_partners_share_their_number(worlds: list[World]) -> None:
    pool = seen(worlds[0], "photo")
    assert len(pool.features) == SEEN * EACH
    unseen = worlds[0].unseen_R
    poisoned = worlds[0].features["photo"].clone()
    poisoned[unseen] = float("nan")
    words = worlds[0].word_NS.clone()
    words[SEEN:] = float("nan")
    poison = World(words, worlds[0].label_R, {"photo": poisoned, "sketch": worlds[0].features["sketch"]})
    recipe = Recipe("sem-pcyc", {"dim": 8}, epochs=1, steps=3)
    clean, other = (trained(recipe, each, 0).state_dict() for each in (worlds[0], poison))
    assert all(value.equal(other[name]) for name, value in clean.items())


def test_an_untrained_model_ranks_near_chance(worlds: list[World]) -> None:
    model = trained(Recipe("sem-pcyc", {"dim": 16}), worlds[0], 0)
    assert zero_shot(model, worlds[0]) < 0.2
    assert zero_shot(model, worlds[0], generalised=True) < zero_shot(model, worlds[0])


def test_paired_batches_hold_the_sketch_s_own_photo(worlds: list[World]) -> None:
    model = trained(Recipe("cvae", {"latent": 4, "hidden": 8}), worlds[0], 0)
    batch = prepared(Recipe("cvae"), model, worlds[0], 0).batch(1, 32)
    row = (worlds[0].features["sketch"][:, None] == batch.sketch[None]).all(2).nonzero()[:, 0]
    own = (worlds[0].features["photo"][row][:, None] == batch.photo[None]).all(2).any(1)
    assert bool(own.all())
    assert torch.unique(batch.label).numel() > 10
