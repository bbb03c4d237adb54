"""The command `zsr`: finds the command that its first words name, parses that command's flags, and runs it.

Only the module of the command that is called is imported: tyro would otherwise build the flags of all of them.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from zsr.commands.base import overview, refuse
from zsr.interrupt import WATCH

# in the order in which a newcomer needs them
COMMANDS: Final = {
    "demo": "Run everything on the embedded emoji: drawings find pictures of classes that no model was trained on.",
    "prepare": "Turn raw folders, archives or parquet into DATA, or look at DATA.",
    "features": "Compute backbone features of every image of DATA: FEATURES.",
    "semantics": "Make one embedding per class from word vectors, sentences or WordNet: SEMANTICS.",
    "train": "Train a model on the seen classes: a checkpoint.",
    "tune": "Search for the best settings of a model on its validation classes.",
    "embed": "Embed the rows of one modality by a checkpoint: EMB.",
    "index": "Build, change and verify an index of embeddings.",
    "search": "Find the nearest items of an index for drawings, photos or embeddings.",
    "evaluate": "Report every retrieval score of checkpoints and indexes.",
    "export": "Write a checkpoint as one safetensors file, for zsr.load.",
    "pipeline": "Run all stages from one YAML file.",
    "doctor": "Check every node of a cluster and say what to fix.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zsr ARGUMENTS` and return its exit code; the console script.

    Args:
        argv: the arguments; by default those of this process, which then also ends cleanly on signals.
    """
    if argv is None:
        WATCH.start()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        return overview("zsr", COMMANDS, words)
    try:
        command = import_module(f"zsr.commands.{words[0]}")
    except ImportError as error:
        return refuse(f"zsr {words[0]}: {error}; install the extra `cpu` (or `gpu`), as in pip install 'zsr[cpu]'")
    return int(command.run(words[1:]))
