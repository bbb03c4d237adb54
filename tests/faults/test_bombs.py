"""Bombs cost nothing (B10): refused by their headers, before anything is decoded or unpacked, in flat memory."""

import json
import subprocess
import sys
from pathlib import Path

from tests.faults import bombs
from tests.faults.counts import count

RISE = 64  # MiB
TRIES = count(1, 100)

SCRIPT = """
import json, pathlib, resource, sys
import simplejpeg
from PIL import Image, ImageFile
import pyarrow.parquet as pq
from zsr.data.decode import BadImage, Limits, decode
from zsr.data.sources.folders import Folders
from zsr.data.sources.parquet import Parquet
from zsr.data.sources.quickdraw import QuickDraw
from zsr.errors import ZsrError

Image.init()  # some of its plug-ins draw a picture while they are imported
decoded = []
for owner, name in ((Image.Image, "load"), (ImageFile.ImageFile, "load"), (simplejpeg, "decode_jpeg"),
                    (pq.ParquetFile, "read_row_group"), (pq.ParquetFile, "read")):
    setattr(owner, name, lambda *args, name=name, **kwargs: decoded.append(name))

def refused(path):
    try:
        if path.suffix == ".parquet":
            return list(Parquet(path.parent.parent).items()) and None
        if path.suffix == ".gz":
            return list(QuickDraw(path.parent).items()) and None
        source = Folders(path.parent.parent.parent)
        item = next(item for item in source.items() if item.key.endswith(path.name))
        decode(source.load(item), 224, Limits())
    except (BadImage, ZsrError) as error:
        return getattr(error, "kind", type(error).__name__)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

paths = [pathlib.Path(line) for line in sys.argv[2:]]
refused(pathlib.Path(sys.argv[1]))  # what is loaded once is no rise
before = peak()
kinds = {path.name: refused(path) for path in paths}
print(json.dumps({"kinds": kinds, "decoded": decoded, "rise": peak() - before}))
"""


def test_twelve_bombs_are_refused_by_their_headers_in_flat_memory(tmp_path: Path) -> None:
    small = bombs.write(tmp_path / "small", {"photo/a/small.gif": b"GIF89a"})[0]
    for number in range(TRIES):
        paths = bombs.write(tmp_path / str(number), bombs.all_of_them(seed=number))
        assert len(paths) == 12
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, small, *paths], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])
        assert results["kinds"] == {Path(path).name: bombs.KINDS[Path(path).name] for path in paths}
        assert results["decoded"] == []
        assert results["rise"] < RISE
        for path in paths:
            Path(path).unlink()
