"""The commands that README and docs/ show, as a reader would copy them.

A fenced block of language `sh` is run by tests/acceptance; a second word says why one is not: it is `make` (which CI
calls) or an `install`, or it requires a `cluster`, a `gpu`, or `data` that this repository does not have.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
# in the order in which they are read: each goes on with what those before have made
DOCUMENTS: Final = ("README.md", "docs/guide.md", "docs/data.md", "docs/training.md", "docs/models.md",
                    "docs/indexing.md", "docs/evaluation.md", "docs/results.md", "docs/scaling.md",
                    "docs/cluster.md", "docs/concepts.md", "docs/contributing.md")  # fmt: skip
REASONS: Final = frozenset({"make", "install", "cluster", "gpu", "data"})
FENCE: Final = re.compile(r"^ *```(.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, the words behind its fence, and its lines."""

    document: str
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def runs(self) -> bool:
        return self.language == "sh"

    def commands(self) -> list[list[str]]:
        """The commands as words: continued lines joined, comments left out."""
        joined = "\n".join(self.lines).replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if fence is None:
            lines.append(line)
        elif opened is None:
            opened, lines = (number, fence[1].strip()), []
        else:
            yield Block(document, *opened, tuple(lines))
            opened = None


def loose_commands(document: str) -> list[str]:
    """Lines that show a command outside of every fence, where nothing would run them."""
    found, inside = [], False
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
        if FENCE.match(line):
            inside = not inside
        elif not inside and re.match(r"^\s+(?:\$ )?(?:zsr |python -m|make |pip install|ray |bash )", line):
            found.append(f"{document}:{number}: {line.strip()}")
    return found
