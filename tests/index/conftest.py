"""A small gallery with sketches that lie off it."""

from pathlib import Path

import pytest

from tests.index.helpers import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """3,000 photos in 4 shards, 120 sketches; inner product."""
    return make_world(Path(tmp_path_factory.mktemp("world")), photos=3000, sketches=120)
