"""Batches of a picture stream follow from (seed, step, rank): whatever Ray does, wherever a run goes on."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.data import DataContext, ExecutionResources

from tests.data import picture_data
from tests.data.picture_data import CLASSES, SIDE, png
from zsr.artifact import Artifact
from zsr.batch import Batch
from zsr.data import stream
from zsr.data.decode import Pictures, Resize
from zsr.data.sampling import Draws
from zsr.data.stream import Sides, Stream, survey
from zsr.errors import ConfigError, DamagedArtifact

pytestmark = pytest.mark.usefixtures("ray_cluster")

SEEN = CLASSES[:4]
LAST = 9  # steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return picture_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sides(data: Artifact) -> Sides:
    return survey(data, ("sketch", "photo"), SEEN, 6, 0)


@pytest.fixture
def in_small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches a task, five tasks a leg."""
    monkeypatch.setattr(stream, "CHUNK", 2 * 3 * 8 * 3 * SIDE**2)
    monkeypatch.setattr(stream, "LEG", 2)


def make(data: Artifact, sides: Sides, **options: Any) -> Stream:
    given: dict[str, Any] = {"augment": True, "last_step": LAST, "repetitions": 2, **options}
    draws = Draws(sides.sketch, sides.photo, 5, triplets=True, paired=given.pop("paired", False))
    return Stream(data, Pictures(Resize(SIDE)), sides, draws, torch.eye(len(SEEN)), **given)


def batches(feed: Stream, first: int = 1, size: int = 8, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Both repetitions of every step."""
    with closing(feed):
        for step in range(first, LAST + 1):
            yield from (feed.batch(step, size, rank, world, repetition) for repetition in (0, 1, 0))


def equal(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("sketch", "photo", "negative", "label", "negative_label", "word")
    )


def same(some: Iterable[Batch], others: Iterable[Batch]) -> bool:
    return all(equal(one, other) for one, other in zip(some, others, strict=True))


def numbers(pixels: torch.Tensor) -> list[int]:
    """Which pictures these are."""
    return (pixels[:, 0, 0, 0].long() + 256 * pixels[:, 0, 0, 1].long()).tolist()


@pytest.fixture(scope="module")
def whole(data: Artifact, sides: Sides) -> list[Batch]:
    """An unbroken run."""
    return list(batches(make(data, sides)))


def test_pictures_have_the_classes_of_their_rows(data: Artifact, sides: Sides, whole: list[Batch]) -> None:
    with closing(make(data, sides, augment=False)) as feed:
        batch = feed.batch(1, 8)
    assert batch.negative is not None
    assert batch.negative_label is not None
    rows = ((batch.sketch, batch.label), (batch.photo, batch.label), (batch.negative, batch.negative_label))
    for pictures, labels in rows:
        assert [number % len(CLASSES) for number in numbers(pictures)] == labels.tolist()
    assert len(whole) == 3 * LAST
    assert equal(whole[0], whole[2])
    assert not equal(whole[0], whole[1])


@pytest.mark.usefixtures("in_small_tasks")
def test_other_blocks_and_cpus_give_the_same_bits(data: Artifact, sides: Sides, whole: list[Batch]) -> None:
    options = DataContext.get_current().execution_options
    before = options.resource_limits
    options.resource_limits = ExecutionResources(cpu=1)
    try:
        again = list(batches(make(data, sides)))
    finally:
        options.resource_limits = before
    assert same(whole, again)


@pytest.mark.usefixtures("in_small_tasks")
def test_a_resumed_stream_goes_on_and_decodes_nothing_that_was_passed(
    data: Artifact, sides: Sides, whole: list[Batch]
) -> None:
    feed = make(data, sides)
    resumed = list(batches(feed, first=6))
    assert same(whole[15:], resumed)
    assert 0 < feed.decoded <= 4 * 2 * 3 * 8  # steps, repetitions, sides, rows


def test_two_ranks_share_the_batches_of_one(data: Artifact, sides: Sides, whole: list[Batch]) -> None:
    halves = [list(batches(make(data, sides), size=4, rank=rank, world=2)) for rank in (0, 1)]
    assert [len(half) for half in halves] == [len(whole)] * 2
    for both, one, two in zip(whole, *halves, strict=True):
        assert torch.equal(both.photo, torch.cat([one.photo, two.photo]))
        assert torch.equal(both.label, torch.cat([one.label, two.label]))


def test_a_sketch_comes_with_its_own_photo(data: Artifact, sides: Sides) -> None:
    with closing(make(data, sides, augment=False, paired=True)) as feed:
        batch = feed.batch(1, 8)
    assert numbers(batch.sketch) == numbers(batch.photo)


def test_pictures_of_other_classes_are_never_looked_at(tmp_path: Path, whole: list[Batch]) -> None:
    poisoned = picture_data.write(
        tmp_path, image=lambda label, number: png(number) if label in SEEN else b"\xff\xd8\xff no JPEG"
    )
    again = batches(make(poisoned, survey(poisoned, ("sketch", "photo"), SEEN, 6, 0)))
    assert same(whole, again)


def test_a_picture_that_does_not_decode_names_shard_and_row(tmp_path: Path) -> None:
    broken = picture_data.write(tmp_path, image=lambda label, _: b"\x89PNG\r\n\x1a\n broken")
    feed = make(broken, survey(broken, ("sketch", "photo"), SEEN, 6, 0))
    with (
        closing(feed),
        pytest.raises(DamagedArtifact, match=r"part-0000\d.parquet: row \d+ was decoded by zsr prepare"),
    ):
        feed.batch(1, 8)


def test_rows_without_a_picture_are_left_out(tmp_path: Path) -> None:
    gaps = picture_data.write(tmp_path, image=lambda _, number: png(number) if number % 3 else None)
    assert len(survey(gaps, ("sketch", "photo"), SEEN, 6, 0).photo.ids) == 80
    bare = picture_data.write(tmp_path / "bare", image=lambda _, number: None)
    with pytest.raises(ConfigError, match=r"no sketch of the classes .* has an image"):
        survey(bare, ("sketch", "photo"), SEEN, 6, 0)


def test_waiting_for_data_is_counted(data: Artifact, sides: Sides) -> None:
    feed = make(data, sides)
    feed.batch(1, 8)
    once = feed.waited
    feed.batch(1, 8, repetition=1)
    assert 0 < once <= feed.waited < 1.01 * once
    feed.close()
