"""Text features: sentence embeddings of the text rows of a DATA shard, for the same FEATURES as those of images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from zsr.data.semantics.sentences import SentenceEncoder

SENTENCES: Final = 32  # texts per forward pass


class TextExtractor:
    """Encodes texts with the sentence encoder in `folder`, whose files have the digest `sha256`.

    Attributes:
        dim: width S of its features.

    Raises:
        ConfigError, DamagedArtifact: see SentenceEncoder.
    """

    def __init__(self, folder: Path, sha256: str, device: str, batch: int = SENTENCES) -> None:
        self.encoder = SentenceEncoder(folder, sha256, device)
        self.batch = batch
        self.dim = self.encoder.dim

    def __call__(self, shard: str, table: pa.Table) -> tuple[list[int], list[np.ndarray], list[dict[str, Any]]]:
        """Ids of the rows with a text, their unit vectors as blocks (B, S) float16, and quarantine entries of the other
        rows.

        Args:
            shard: its name, for the quarantine.
            table: columns id, key and text.
        """
        rows = table.to_pylist()
        good = [row for row in rows if row["text"]]
        bad = [
            {"shard": shard, "id": row["id"], "key": row["key"], "kind": "empty", "message": "the row has no text"}
            for row in rows
            if not row["text"]
        ]
        return [row["id"] for row in good], list(self._blocks([row["text"] for row in good])), bad

    def _blocks(self, texts: list[str]) -> Iterator[np.ndarray]:
        for start in range(0, len(texts), self.batch):
            yield self.encoder(texts[start : start + self.batch]).astype(np.float16)
