"""The sources by name. One more source is one new file and one line here."""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, get_args

from pydantic import BaseModel, ConfigDict

from zsr.data.sources import Source
from zsr.data.sources.emoji import Emoji
from zsr.data.sources.folders import Folders
from zsr.data.sources.pairs import Pairs
from zsr.data.sources.parquet import Columns, Parquet
from zsr.data.sources.quickdraw import QuickDraw, QuickDrawOptions
from zsr.data.sources.restrict import restricted
from zsr.data.sources.sketchy import Sketchy, SketchyOptions
from zsr.data.sources.tree import Tree
from zsr.data.sources.tuberlin import TUBerlin
from zsr.data.sources.webdataset import WebDataset
from zsr.data.sources.wikipedia import Wikipedia
from zsr.errors import ConfigError

Name = Literal["emoji", "folders", "pairs", "parquet", "quickdraw", "sketchy", "tuberlin", "webdataset", "wikipedia"]
NAMES: Final[tuple[Name, ...]] = get_args(Name)


class Options(BaseModel):
    """Options of the sources; those of other sources than the chosen one say nothing.

    Attributes:
        classes: rows of other classes are quarantined: "published" for the data set's own list, or a file of a name
            a line.
        columns: what the columns of parquet files are called.
        sketchy: which photos, and which rendering.
        quickdraw: how strokes are drawn, and which.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: str = ""
    columns: Columns = Columns()
    sketchy: SketchyOptions = SketchyOptions()
    quickdraw: QuickDrawOptions = QuickDrawOptions()


Make = Callable[[str, Options], Source]
SOURCES: Final[dict[Name, Make]] = {
    "emoji": lambda root, options: Emoji(),
    "folders": lambda root, options: Folders(root),
    "pairs": lambda root, options: Pairs(root),
    "parquet": lambda root, options: Parquet(root, options.columns),
    "quickdraw": lambda root, options: QuickDraw(root, options.quickdraw),
    "sketchy": lambda root, options: Sketchy(root, options.sketchy),
    "tuberlin": lambda root, options: TUBerlin(root),
    "webdataset": lambda root, options: WebDataset(root),
    "wikipedia": lambda root, options: Wikipedia(root),
}


def open_source(name: Name, root: str | Path | None, options: Options) -> Source:
    """The source called `name` over `root`, a path or a URL such as s3://bucket/prefix.

    Raises:
        ConfigError: `root` is missing or holds nothing; the list of classes cannot be read.
        StorageError: `root` cannot be listed.
    """
    if name == "emoji" and root is not None:
        raise ConfigError(
            f"--source emoji is embedded and reads no --input, but {root} was given; leave one of them out"
        )
    if name != "emoji" and (root is None or not Tree.at(root).entries()):
        raise ConfigError(f"--source {name} requires --input, a directory with something in it; found {root}")
    return restricted(SOURCES[name](str(root), options), options.classes)
