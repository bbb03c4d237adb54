"""Registry of data sources. A new source is one new file and one line here, or an entry point of another package."""

from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from zsr import plugins
from zsr.data.sources import Source
from zsr.data.sources.parquet import Columns
from zsr.data.sources.quickdraw import QuickDrawOptions
from zsr.data.sources.restrict import restricted
from zsr.data.sources.sketchy import SketchyOptions
from zsr.data.sources.tree import Tree
from zsr.errors import ConfigError

# a source class is called with the root of the data and its own options from `Options`; one that includes its data and
# reads no input has `embedded = True`
SOURCES: Final[plugins.Registry[Any]] = plugins.Registry(
    plugins.SOURCES,
    "source",
    {
        "emoji": "zsr.data.sources.emoji:Emoji",
        "folders": "zsr.data.sources.folders:Folders",
        "pairs": "zsr.data.sources.pairs:Pairs",
        "parquet": "zsr.data.sources.parquet:Parquet",
        "quickdraw": "zsr.data.sources.quickdraw:QuickDraw",
        "sketchy": "zsr.data.sources.sketchy:Sketchy",
        "tuberlin": "zsr.data.sources.tuberlin:TUBerlin",
        "webdataset": "zsr.data.sources.webdataset:WebDataset",
        "wikipedia": "zsr.data.sources.wikipedia:Wikipedia",
    },
)


class Options(BaseModel):
    """Options of all sources; only those of the chosen source are used.

    Attributes:
        classes: rows of other classes are quarantined: "published" for the data set's own list, or a file with one
            name per line.
        columns: names of the parquet columns.
        sketchy: which photos and which rendering of Sketchy to read.
        quickdraw: which drawings of QuickDraw to read, and how to render them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: str = ""
    columns: Columns = Columns()
    sketchy: SketchyOptions = SketchyOptions()
    quickdraw: QuickDrawOptions = QuickDrawOptions()

    def of(self, name: str) -> list[BaseModel]:
        """Arguments of the source `name` after its root."""
        own: dict[str, BaseModel] = {"parquet": self.columns, "sketchy": self.sketchy, "quickdraw": self.quickdraw}
        return [own[name]] if name in own else []


def open_source(name: str, root: str | Path | None, options: Options) -> Source:
    """Open the source `name` over `root`, a path or a URL such as s3://bucket/prefix.

    Raises:
        ConfigError: no such source; `root` is missing or empty; the list of classes cannot be read.
        StorageError: `root` cannot be listed.
    """
    kind = SOURCES[name]
    if getattr(kind, "embedded", False):
        if root is not None:
            raise ConfigError(
                f"--source {name} is embedded and reads no --input, but {root} was given; leave one of them out"
            )
        return restricted(kind(), options.classes)
    if root is None or not Tree.at(root).entries():
        raise ConfigError(f"--source {name} requires --input, a directory that is not empty; found {root}")
    return restricted(kind(str(root), *options.of(name)), options.classes)
