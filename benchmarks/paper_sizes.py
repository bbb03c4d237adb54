"""Every model at the sizes of its paper or released code: two training steps on random data, and what it weighs.

    python -m benchmarks.paper_sizes [--only cvae ...] [--batch 4]

The steps are those of a run: one DeepSpeed engine a parameter group, all phases, in one process. Each model has a
process of its own, so that the peak of memory is its own. A count that a specification gives stands beside ours; exit
status 1 where they differ or a term is not finite. Doodle2Search trains two VGG-16 with batch norm along, from pictures
of 224 pixels; all others eat features, which are random too.
"""

import argparse
import math
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from zsr.batch import Batch
from zsr.models import backbones, build, configure
from zsr.models.protocol import Inputs, Model, Tower
from zsr.training.config import Precision
from zsr.training.engines import Engines, deepspeed_config, init_distributed

STEPS: Final = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters whose names begin in one of some ways, and their number as a specification gives it.

    Attributes:
        digits: decimal places that the number was rounded to, as `round` counts them; -6 for "about 46 M".
    """

    beginnings: tuple[str, ...]
    published: int
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A model at published sizes."""

    model: str
    preset: str
    photo: int
    sketch: int
    words: int
    classes: int
    parts: Mapping[str, Part] = field(default_factory=dict)
    pictures: bool = False

    def inputs(self) -> Inputs:
        """The sizes, with towers where the case trains them."""
        tower = None
        if self.pictures:
            made = backbones.architecture("vgg16-bn", layer="fc7", scaling="unit", attention=True)
            tower = Tower(architecture=made, size=224, shared=False, rate=1.0)
        names = tuple(f"{number:03d}" for number in range(self.classes))
        return Inputs(sketch_dim=self.sketch, photo_dim=self.photo, semantic_dim=self.words, classes=names, tower=tower)

    def items(self, rows: int, side: str) -> Tensor:
        """Random non-negative features (B, F), or pictures (B, 224, 224, 3)."""
        if self.pictures:
            return torch.randint(256, (rows, 224, 224, 3), dtype=torch.uint8)
        return torch.randn(rows, self.photo if side == "photo" else self.sketch).relu()

    def batch(self, rows: int, word: Tensor) -> Batch:
        """Random rows of random classes."""
        label = torch.randint(self.classes, (rows,))
        return Batch(
            sketch=self.items(rows, "sketch"),
            photo=self.items(rows, "photo"),
            label=label,
            word=word[label],
            negative=self.items(rows, "photo"),
            negative_label=(label + 1) % self.classes,
        )


ENCODER: Final = 135_317_824
ATTENTION: Final = 195_321

# widths: 4096-d fc7 of VGG, 300-d word2vec or Doc2Vec; SEM-PCYC 512-d features and 354 + 300 class entries
CASES: Final[Mapping[str, Case]] = {
    "sem-pcyc": Case("sem-pcyc", "released", 512, 512, 654, 100),
    "cvae": Case(
        "cvae",
        "released",
        *(4096, 4096, 300, 104),
        parts={
            "encoder": Part(("encoder.",), 46_000_000, -6),
            "decoder": Part(("decoder.",), 19_000_000, -6),
            "way back": Part(("to_sketch.",), 17_000_000, -6),
        },
    ),
    "cvae paper": Case("cvae", "paper", 4096, 4096, 300, 104),
    "caae": Case("caae", "paper", 4096, 4096, 300, 104),
    "doodle2search": Case(
        "doodle2search",
        "released",
        *(4096, 4096, 300, 104),
        parts={
            "an encoder": Part(("towers.sketch.", "encoder.sketch."), ENCODER + ATTENTION),
            "its attention": Part(("towers.sketch.network.attention.",), ATTENTION),
            "both encoders": Part(("towers.", "encoder."), 271_026_290),
            "domain classifier": Part(("domain.",), 20_673),
            "semantic decoder": Part(("semantic.",), 167_400),
        },
        pictures=True,
    ),
    "sketch-gcn": Case("sketch-gcn", "zsih", 4096, 4096, 300, 100),
    "lcale": Case("lcale", "released", 4096, 300, 300, 100),
    "cfsa": Case("cfsa", "released", 4096, 300, 300, 100),
}


@dataclass(frozen=True, slots=True)
class Weighed:
    """What came out of a case.

    Attributes:
        groups: parameters by group.
        parts: parameters by part.
        bad: terms that were not finite.
        seconds: of the second step.
        gibibytes: peak resident memory.
    """

    groups: Mapping[str, int]
    parts: Mapping[str, int]
    bad: tuple[str, ...]
    seconds: float
    gibibytes: float


def weigh(name: str, rows: int) -> Weighed:
    """Build the case, take two steps, and count. In a process of its own."""
    torch.manual_seed(0)
    case = CASES[name]
    model = build(case.model, configure(case.model, {}, case.preset).model_dump(), case.inputs())
    assert isinstance(model, Model)
    word = torch.randn(case.classes, case.words)
    model.begin(word)
    engines = start(model, rows)
    bad: tuple[str, ...] = ()
    for _ in range(STEPS):
        began = time.monotonic()
        terms = engines.train_batch(lambda _: case.batch(rows, word))
        seconds = time.monotonic() - began
        bad += tuple(term for term, value in terms.items() if not math.isfinite(float(value)))
    dist.destroy_process_group()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Weighed(
        {group: sum(p.numel() for p in held.module.parameters()) for group, held in model.trained.items()},
        {name: count(model, part) for name, part in case.parts.items()},
        bad,
        seconds,
        peak,
    )


def start(model: Model, rows: int, precision: Precision = "fp32") -> Engines:
    """Engines of a group of one process, on the model's own device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    backend = "nccl" if next(model.parameters()).is_cuda else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    init_distributed(backend)
    return Engines(model.train(), rows, deepspeed_config(precision=precision))


def count(model: Model, part: Part) -> int:
    """Parameters of a part."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(part.beginnings))


def show(name: str, case: Case, weighed: Weighed) -> bool:
    """Print a case; whether its counts and terms are as they should be."""
    total = sum(weighed.groups.values())
    sizes = "pictures" if case.pictures else f"{case.photo}-d photos, {case.sketch}-d queries"
    print(f"{name} ({case.preset}; {sizes}, {case.words}-d class vectors): {total:,} parameters")
    print(
        f"  step {weighed.seconds:.1f} s, peak {weighed.gibibytes:.1f} GiB; terms not finite: {weighed.bad or 'none'}"
    )
    for group, number in weighed.groups.items():
        print(f"  group {group:20} {number:>13,}")
    good = not weighed.bad
    for part, ours in weighed.parts.items():
        said = case.parts[part]
        equal = round(ours, said.digits) == said.published
        about = "about " if said.digits else ""
        print(f"  {part:26} {ours:>13,}   published {about}{said.published:,}{'' if equal else '   DIFFERS'}")
        good &= equal
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    good = True
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in arguments.only:
            good &= show(name, CASES[name], pool.submit(weigh, name, arguments.batch).result())
            sys.stdout.flush()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
