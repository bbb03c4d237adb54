"""Find nearest neighbors: `zsr search --index-dir I --queries EMB --output neighbours.json`.

For a drawing, or a folder of drawings, give `--sketch PATH --checkpoint C` instead of `--queries`; for photos, `--photo
PATH`. For millions of queries, give a directory: `--output ROOT` becomes an artifact with one shard of results per
shard of queries, computed by many workers. Run again after a kill, the job resumes where it stopped.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from pydantic import Field

from zsr.artifact import Store, open_artifact
from zsr.commands.base import JobConfig, Results, made, main, wrote
from zsr.embedding.settings import Prices
from zsr.errors import ConfigError
from zsr.storage import files_below, is_file, read_file

if TYPE_CHECKING:
    from zsr.index.searching.results import Answers, SearchParams
    from zsr.index.searching.searcher import Searcher

logger = logging.getLogger("zsr")

CHECKED_SIDE: Final = 32  # side in pixels to which an image is decoded to check that it is readable


class Search(JobConfig):
    """Find the nearest items of an index for drawings, photos or embeddings.

    Attributes:
        index_dir: ROOT of the index, or one object in it.
        output: .json or .parquet with one row per neighbor; or, with `queries`, ROOT of a NEIGHBOURS artifact.
        queries: EMB of the queries, from the checkpoint that embedded the gallery.
        sketch: a drawing, or a folder of drawings, instead of `queries`; requires `checkpoint`.
        photo: a photo, or a folder of photos, instead of `queries`; requires `checkpoint`.
        checkpoint: the checkpoint that embedded the gallery.
        weights: weights of the checkpoint's backbone, if its package has none.
        k: neighbors per query.
        nprobe: number of lists to scan; by default that of the published operating point.
        refine_factor: number of candidates to re-rank, as a multiple of k; by default that of the published operating
            point.
        labels: return only items of these classes, under any spelling.
        replicas: for a NEIGHBOURS artifact: number of nodes that hold each segment of the index; with 0 every worker
            maps the whole index instead.
        list_ranges: for a NEIGHBOURS artifact: number of list ranges to scan, each by one worker that reads only the
            codes of its range, for an index larger than memory; 0 for none.
        num_workers: max workers that map the whole index; by default one per CPU.
        cpu_price: price per CPU hour, in any currency; the results of a NEIGHBOURS artifact then include the cost per
            million queries.
        measure: with --dry-run, for a NEIGHBOURS artifact: search for a few seconds to predict the total time and cost.
        picture: a PNG that shows the first queries and their results; requires `data`.
        data: DATA with the images of the gallery.
    """

    index_dir: Path
    output: Path
    queries: Path | None = None
    sketch: Path | None = None
    photo: Path | None = None
    checkpoint: Path | None = None
    weights: Path | None = None
    k: int = Field(default=10, ge=1)
    nprobe: int | None = Field(default=None, ge=1)
    refine_factor: int | None = Field(default=None, ge=1)
    labels: tuple[str, ...] = ()
    replicas: int = Field(default=0, ge=0)
    list_ranges: int = Field(default=0, ge=0)
    num_workers: int | None = Field(default=None, ge=1)
    cpu_price: float = 0.0
    measure: bool = False
    picture: Path | None = None
    data: Path | None = None

    def check(self) -> None:
        """Raise ConfigError for incompatible flags."""
        from zsr.index.searching.results import require_suffix

        if not self.offline:
            require_suffix(self.output)
        if sum(given is not None for given in (self.queries, self.sketch, self.photo)) != 1:
            raise ConfigError("give one of --queries (embeddings), --sketch (drawings) and --photo (photos)")
        if self.queries is None and self.checkpoint is None:
            raise ConfigError("--sketch and --photo require --checkpoint, the one that embedded the gallery")
        if self.picture is not None and self.data is None:
            raise ConfigError("--picture requires --data, which holds the gallery's images")
        if self.offline and (self.queries is None or self.picture is not None):
            raise ConfigError(f"--output {self.output} is a ROOT: it requires --queries and excludes --picture")
        if self.replicas and not self.offline:
            raise ConfigError("--replicas requires an --output that is a ROOT, not a file")
        if self.list_ranges and not self.offline:
            raise ConfigError("--list-ranges requires an --output that is a ROOT, not a file")

    @property
    def offline(self) -> bool:
        """Whether the results become an artifact."""
        from zsr.index.searching.results import into_file

        return not into_file(self.output)

    @property
    def images(self) -> tuple[Literal["sketch", "photo"], Path]:
        """Modality and path of queries that are image files."""
        return ("photo", self.photo) if self.photo is not None else ("sketch", self.sketch or Path())

    def asked(self, facts: Mapping[str, Any]) -> "SearchParams":
        """The search parameters for an index with these facts; k is at most its number of items."""
        from zsr.index.searching.results import SearchParams

        return SearchParams(min(self.k, int(facts["ntotal"])), self.nprobe, self.refine_factor, self.labels)


def plan(config: Search) -> Results:
    from zsr.index.searching.batch import predict
    from zsr.index.searching.list_major import require

    config.check()
    index = open_artifact(config.index_dir, "index")
    if config.list_ranges:
        require(index, config.asked(index.facts), config.replicas)
    point = index.facts["operating_point"]
    cost: Results = {}
    if config.queries is not None:
        queries = open_artifact(config.queries, "embeddings")
        count = queries.facts["rows"]
        if config.measure and config.offline and not config.replicas and not config.list_ranges:
            prices = Prices(config.cpu_price)
            cost = {
                "cost": predict(index, queries, config.asked(index.facts), workers=config.num_workers, prices=prices)
            }
    else:
        count = len(image_files(config.images[1]))
    return {
        "index": index.digest,
        "queries": count,
        "nprobe": config.nprobe or point["nprobe"],
        "refine_factor": config.refine_factor or point["refine_factor"],
        "bytes_mapped": sum(entry.bytes for entry in index.files),
        **cost,
    }


def image_files(place: Path) -> list[Path]:
    """`place` itself, or the images in the folder `place` and below, in name order.

    Raises:
        ConfigError: there is no image.
    """
    from zsr.data.decode import IMAGE_SUFFIXES

    if is_file(place):
        return [place]
    found = [path for path in files_below(place) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise ConfigError(f"{place}: no image found; expected an image file or a folder of images")
    return found


def from_files(config: Search, searcher: "Searcher") -> "tuple[Answers, list[bytes | None]]":
    """Search results for image files, and the bytes of the files."""
    from zsr.exported import of_checkpoint
    from zsr.index.searching.results import Answers

    modality, place = config.images
    checkpoint = open_artifact(config.checkpoint or Path(), "checkpoint")
    if checkpoint.digest != searcher.space.checkpoint:
        raise ConfigError(
            f"--checkpoint {config.checkpoint}: {checkpoint.digest[:12]} did not embed the gallery; give checkpoint "
            f"{searcher.space.checkpoint[:12]}, which did"
        )
    model = of_checkpoint(checkpoint, config.weights)
    files, images = readable(image_files(place))
    vectors = model.embed_sketch(files) if modality == "sketch" else model.embed_photo(files)
    if modality == "sketch":
        warn_of_photos(files, images)
    hits = config.asked(searcher.facts).of(searcher, vectors)
    keys = np.array([str(path) for path in files], object)
    return Answers(np.arange(len(files)), keys, np.full(len(files), None), hits), list(images)


def readable(files: Sequence[Path]) -> tuple[list[Path], list[bytes]]:
    """The `files` that can be decoded, and their bytes; the others are logged as a warning.

    Raises:
        ConfigError: no file can be decoded.
    """
    from zsr.data.decode import BadImage, Limits, decode

    images, bad = {}, []
    for path in files:
        try:
            data = read_file(path)
            decode(data, CHECKED_SIDE, Limits())
            images[path] = data
        except (BadImage, OSError) as error:
            bad.append(f"{path}: {error}")
    said = f"{len(bad)} of {len(files)} images cannot be read: {'; '.join(bad[:3])}{'; ...' if len(bad) > 3 else ''}"
    if not images:
        raise ConfigError(said)
    if bad:
        logger.warning("%s; searching for the others", said)
    return list(images), list(images.values())


def warn_of_photos(files: Sequence[Path], images: Sequence[bytes]) -> None:
    """Warn about drawings that look like photos: the sketch encoder's results for them are meaningless."""
    from zsr.data.drawing import looks_like_a_photo

    if photos := [path for path, image in zip(files, images, strict=True) if looks_like_a_photo(image)]:
        logger.warning(
            "%d of %d drawings look like photos, such as %s: their background is not uniform; to search by photo, "
            "give --photo instead of --sketch",
            len(photos),
            len(files),
            photos[0],
        )


def from_embeddings(config: Search, searcher: "Searcher") -> "tuple[Answers, list[bytes | None]]":
    """Search results for embeddings, and the images of the queries if DATA has them."""
    from zsr.index.searching.contact_sheet import pictures_in
    from zsr.index.searching.results import answer

    queries = open_artifact(config.queries or Path(), "embeddings")
    answers = answer(searcher, queries, config.asked(searcher.facts))
    if config.picture is None:
        return answers, []
    data = open_artifact(config.data or Path(), "data")
    drawn = dict(pictures_in(data, str(queries.facts["modality"]), set(answers.ids.tolist())))
    return answers, [drawn.get(int(identity)) for identity in answers.ids]


def to_artifact(config: Search) -> Results:
    """Search results for embeddings, as a NEIGHBOURS artifact."""
    from zsr.index.searching.batch import search_all

    index, queries = open_artifact(config.index_dir, "index"), open_artifact(config.queries or Path(), "embeddings")
    output = Store.at(config.output)
    found, told = search_all(
        index,
        queries,
        config.asked(index.facts),
        output,
        replicas=config.replicas,
        list_ranges=config.list_ranges,
        workers=config.num_workers,
        prices=Prices(config.cpu_price),
    )
    return made(found, config.output, index=index.digest, **found.facts, **told)


def work(config: Search) -> Results:
    from zsr.index.searching.contact_sheet import draw, pictures_in
    from zsr.index.searching.results import write_answers
    from zsr.index.searching.searcher import Searcher

    config.check()
    if config.offline:
        return to_artifact(config)
    index = open_artifact(config.index_dir, "index")
    searcher = Searcher.of(index)
    answers, queries = (from_files if config.queries is None else from_embeddings)(config, searcher)
    write_answers(answers, config.output)
    if config.picture is not None:
        ids = set(answers.hits.ids.ravel().tolist())
        found = dict(pictures_in(open_artifact(config.data or Path(), "data"), "photo", ids))
        draw(answers, found, queries, config.picture)
    k = answers.hits.ids.shape[1]
    about = {"index": index.digest, "queries": len(answers.ids), "k": k}
    return wrote(config.output, "neighbours", read_file(config.output), **about)


def run(argv: Sequence[str]) -> int:
    return main(Search, plan, work, argv, "zsr search")
