"""Trains the papers' models on the synthetic world and holds what comes out against what should: `make sanity`.

    python -m tests.sanity.run [--only sem-pcyc cvae ...] [--seeds 0 1 2] [--workers N]

Every ablation is the same code under other options. Two kinds of claim stand in the table. A gate has to hold, by the
median over seeds, or the exit status is 1. A direction is a statement of a paper, or of the trial that set the gates
(marked "trial"), about real data or another implementation: it is shown beside what came out here, whichever that is.
Too long for the tests of each change: some minutes on two cores.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final

import torch

from tests.sanity.world import Recipe, floors, trained, world, zero_shot
from zsr.models.itq import Coded
from zsr.models.protocol import Rows

Scores = dict[str, dict[int, float]]  # by trial, then by seed

# -- trials ------------------------------------------------------------------------------------------------------------

PCYC: Final = Recipe("sem-pcyc", {"dim": 16, "generator_lr": 1e-3, "metric": "l2"}, epochs=40)
CVAE: Final = Recipe(
    "cvae", {"latent": 32, "hidden": 128, "lr": 1e-3, "betas": (0.9, 0.999), "features": "standardised"}, 25, steps=22
)
CAAE: Final = replace(CVAE, model="caae", options={**CVAE.options, "judge": (64, 32)})
LCALE: Final = Recipe(
    "lcale",
    {
        "dim": 16,
        "photo_hidden": (128, 128),
        "sketch_hidden": (128, 128),
        "word_hidden": (64, 64),
        "lr": 1e-3,
        "beta_epochs": (0, 9),
        "gamma_epochs": (2, 8),
        "delta_epochs": (1, 3),
    },
    epochs=10,
)
CFSA: Final = Recipe("cfsa", {"hidden": 128, "noise": 20, "lr": 1e-3}, epochs=10)
DOODLE: Final = Recipe("doodle2search", {"dim": 32, "layers": 2, "hidden": 128, "metric": "l2"}, epochs=30)
GCN: Final = Recipe("sketch-gcn", {"dim": 32, "hidden": 128, "latent": 16, "latent_hidden": 64, "lr": 1e-3}, epochs=10)

BARE: Final = {"cycle_weight": 0.0, "classification_weight": 0.0, "regression_weight": 0.0}


def but(recipe: Recipe, **options: Any) -> Recipe:
    """`recipe` under some other options."""
    return replace(recipe, options={**recipe.options, **options})


TRIALS: Final[Mapping[str, Recipe]] = {
    "sem-pcyc": PCYC,
    "sem-pcyc untrained": replace(PCYC, epochs=0),
    "sem-pcyc adversarial only": but(PCYC, **BARE),
    "sem-pcyc adversarial + cycle": but(PCYC, **BARE | {"cycle_weight": 1.0}),
    "sem-pcyc adversarial + classes": but(PCYC, **BARE | {"classification_weight": 1.0}),
    "sem-pcyc no adversarial": but(PCYC, adversarial_weight=0.0),
    "sem-pcyc no regression": but(PCYC, regression_weight=0.0),
    "sem-pcyc no sparsity": but(PCYC, l21_weight=0.0),
    "sem-pcyc trained classifiers": but(PCYC, classifiers="trained"),
    "sem-pcyc 4-d codes": but(PCYC, dim=4),
    "cvae": CVAE,
    "cvae untrained": replace(CVAE, epochs=0),
    "cvae 1 epoch": replace(CVAE, epochs=1),
    "cvae no way back": but(CVAE, sketch_weight=0.0),
    "cvae 1 sample": but(CVAE, samples=1),
    "cvae any photo of the class": replace(CVAE, paired=False),
    "caae as written": CAAE,
    "caae ours": but(CAAE, encoder_input="image+sketch", adversarial="non-saturating"),
    "lcale": LCALE,
    "lcale untrained": replace(LCALE, epochs=0),
    "lcale no cross": but(LCALE, cross_weight=0.0),
    "lcale no cycles": but(LCALE, class_cycle_weight=0.0, modality_cycle_weight=0.0),
    "lcale no wasserstein": but(LCALE, delta=0.0),
    "lcale no discrepancy": but(LCALE, mmd_weight=0.0),
    "lcale deterministic": but(LCALE, beta=0.0, noise="none"),
    "lcale shuffled labels": replace(LCALE, shuffled_labels=True),
    "cfsa": CFSA,
    "cfsa untrained": replace(CFSA, epochs=0),
    "cfsa no synthetic": but(CFSA, synthetic_weight=0.0),
    "cfsa no cycle": but(CFSA, cycle_weight=0.0),
    "cfsa no alignment": but(CFSA, alignment_weight=0.0),
    "cfsa coral": but(CFSA, alignment="coral"),
    "cfsa mmd": but(CFSA, alignment="mmd"),
    "cfsa modality classifier": but(CFSA, modality_weight=0.01),
    "cfsa shuffled words": replace(CFSA, shuffled_words=True),
    "doodle2search": DOODLE,
    "doodle2search untrained": replace(DOODLE, epochs=0),
    "doodle2search triplet": but(DOODLE, domain_weight=0.0, semantic_weight=0.0),
    "doodle2search triplet + domain": but(DOODLE, semantic_weight=0.0),
    "doodle2search triplet + semantic": but(DOODLE, domain_weight=0.0),
    "doodle2search shuffled words": replace(DOODLE, shuffled_words=True),
    "sketch-gcn": GCN,
    "sketch-gcn untrained": replace(GCN, epochs=0),
    "sketch-gcn identity graph": but(GCN, temperature=1e-3),
    "sketch-gcn warm graph": but(GCN, temperature=1.0),
    "sketch-gcn no feature loss": but(GCN, feature_weight=0.0),
    "sketch-gcn no classes": but(GCN, classification_weight=0.0),
    "sketch-gcn no divergence": but(GCN, beta=0.0),
}

TIE: Final = 0.01  # seeds of one trial lie further apart

# -- claims ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """`left` >= `factor` * `right` + `plus`, by medians over seeds; with `below`, <=. Without `right`, against `plus`.

    Attributes:
        says: who says so.
        gate: whether `make sanity` fails without it.
    """

    left: str
    right: str = ""
    factor: float = 1.0
    plus: float = 0.0
    below: bool = False
    gate: bool = False
    says: str = ""

    def bound(self, scores: Mapping[str, float]) -> float:
        """The right-hand side."""
        return self.plus + (self.factor * scores[self.right] if self.right else 0.0)

    def holds(self, scores: Mapping[str, float]) -> bool:
        """Whether it does, for a median by trial."""
        left, bound = scores[self.left], self.bound(scores)
        return left <= bound if self.below else left >= bound

    def verdict(self, scores: Mapping[str, float]) -> str:
        """In words; a direction whose sides are closer than `TIE` says nothing."""
        if self.gate:
            return "holds" if self.holds(scores) else "FAILS"
        if abs(scores[self.left] - self.bound(scores)) < TIE:
            return "a tie"
        return "as said" if self.holds(scores) else "not here"

    def known(self, scores: Mapping[str, float]) -> bool:
        """Whether both sides were measured."""
        return self.left in scores and (not self.right or self.right in scores)

    def __str__(self) -> str:
        factor = "" if self.factor == 1.0 else f"{self.factor:g} x "
        plus = f"{self.plus:g}" if not self.right else f" + {self.plus:g}" if self.plus else ""
        return f"{self.left} {'<=' if self.below else '>='} {factor}{self.right}{plus}".replace("+ -", "- ")


def gate(left: str, right: str = "", factor: float = 1.0, plus: float = 0.0, *, below: bool = False) -> Claim:
    """What has to hold: an acceptance gate of the benchmark, or of ours for models that it leaves out."""
    return Claim(left, right, factor, plus, below, gate=True)


def direction(better: str, worse: str, says: str) -> Claim:
    """That `better` scores at least as high as `worse`."""
    return Claim(better, worse, says=says)


CLAIMS: Final[Sequence[Claim]] = (
    gate("raw cosine", plus=0.20, below=True),
    gate("shuffled test labels", plus=0.08),
    gate("shuffled test labels", plus=0.11, below=True),
    gate("cvae", plus=0.35),
    gate("cvae", "raw cosine", factor=2.5),
    gate("cvae", "oracle", below=True),
    gate("cvae, all photos", "cvae", factor=0.6, below=True),
    gate("sem-pcyc", plus=0.35),
    gate("sem-pcyc", "sem-pcyc untrained", factor=3.0),
    gate("sem-pcyc adversarial only", plus=0.20, below=True),
    gate("sem-pcyc adversarial + cycle", plus=0.25, below=True),
    gate("sem-pcyc", "sem-pcyc no regression", plus=0.05),
    *(gate(model, f"{model} untrained", factor=2.0) for model in ("lcale", "cfsa", "doodle2search", "sketch-gcn")),
    gate("lcale shuffled labels", plus=0.20, below=True),
    direction("sem-pcyc", "sem-pcyc adversarial + cycle", "SEM-PCYC: no pair of terms is enough"),
    direction("sem-pcyc", "sem-pcyc adversarial + classes", "SEM-PCYC: no pair of terms is enough"),
    direction("sem-pcyc", "sem-pcyc no sparsity", "SEM-PCYC: slightly"),
    direction("sem-pcyc", "sem-pcyc 4-d codes", "SEM-PCYC: narrow codes lose"),
    direction("sem-pcyc", "sem-pcyc, all photos", "SEM-PCYC: generalised is harder"),
    direction("sem-pcyc", "sem-pcyc, binary", "SEM-PCYC: codes lose a little"),
    direction("sem-pcyc trained classifiers", "sem-pcyc", "trial"),
    direction("sem-pcyc", "sem-pcyc no adversarial", "SEM-PCYC; the trial: not here"),
    direction("cvae", "caae as written", "CVAE paper"),
    direction("cvae", "caae ours", "CVAE paper"),
    direction("cvae", "cvae any photo of the class", "CVAE: pairs matter"),
    direction("cvae", "cvae 1 epoch", "trial"),
    direction("cvae no way back", "cvae", "trial, and a replication: no loss"),
    Claim("cvae 1 sample", "cvae", plus=-0.01, says="CVAE as released: its latent is idle"),
    direction("lcale", "lcale no cross", "LCALE"),
    direction("lcale", "lcale no cycles", "LCALE"),
    direction("lcale", "lcale no wasserstein", "LCALE"),
    direction("lcale", "lcale no discrepancy", "LCALE"),
    direction("lcale", "lcale deterministic", "LCALE"),
    direction("cfsa", "cfsa no synthetic", "CFSA"),
    direction("cfsa", "cfsa no cycle", "CFSA"),
    direction("cfsa", "cfsa no alignment", "CFSA"),
    direction("cfsa modality classifier", "cfsa", "JFSE"),
    direction("cfsa", "cfsa shuffled words", "CFSA: class vectors carry the transfer"),
    direction("doodle2search", "doodle2search triplet + semantic", "Doodle2Search"),
    direction("doodle2search", "doodle2search triplet + domain", "Doodle2Search"),
    direction("doodle2search", "doodle2search triplet", "Doodle2Search"),
    direction("doodle2search", "doodle2search shuffled words", "Doodle2Search: words carry the transfer"),
    direction("sketch-gcn", "sketch-gcn identity graph", "SketchGCN: the claim of the paper"),
    direction("sketch-gcn warm graph", "sketch-gcn identity graph", "SketchGCN: the same, where classes mix"),
    direction("sketch-gcn", "sketch-gcn no feature loss", "SketchGCN"),
    direction("sketch-gcn", "sketch-gcn no classes", "SketchGCN"),
)

# -- running -----------------------------------------------------------------------------------------------------------


def run(name: str, seed: int) -> dict[str, float]:
    """mAP@all of one trial and seed; some are ranked in other ways too, by name."""
    torch.set_num_threads(1)
    of = world(seed)
    model = trained(TRIALS[name], of, seed)
    scores = {name: zero_shot(model, of)}
    if name in ("sem-pcyc", "cvae"):
        scores[f"{name}, all photos"] = zero_shot(model, of, generalised=True)
    if name == "sem-pcyc":
        codes = Coded(model, bits=model.dim)
        codes.fit(Rows(side, features[~of.unseen_R], of.label_R) for side, features in of.features.items())
        scores[f"{name}, binary"] = zero_shot(codes, of)
    return scores


def measure(names: Sequence[str], seeds: Sequence[int], workers: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Every trial and seed, in the order in which they end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        asked = {pool.submit(run, name, seed): seed for name in names for seed in seeds}
        for done in as_completed(asked):
            yield asked[done], done.result()


def table(scores: Scores) -> None:
    """A line a trial: its median and its seeds."""
    width = max(map(len, scores))
    for name, by_seed in scores.items():
        each = " ".join(f"{score:.3f}" for _, score in sorted(by_seed.items()))
        print(f"{name:{width}}  {median(by_seed.values()):.3f}   {each}")


def verdicts(scores: Mapping[str, float]) -> bool:
    """A line a claim; whether every gate holds."""
    known = [claim for claim in CLAIMS if claim.known(scores)]
    width = max(len(str(claim)) for claim in known)
    for claim in known:
        kind = "gate" if claim.gate else "direction"
        values = f"{scores[claim.left]:.3f} {'<=' if claim.below else '>='} {claim.bound(scores):.3f}"
        print(f"{kind:9}  {claim.verdict(scores):8}  {claim!s:{width}}  {values}   {claim.says}".rstrip())
    return all(claim.holds(scores) for claim in known if claim.gate)


def ordered(found: Scores) -> Scores:
    """`found` in the order of the trials, what was ranked in another way beside its trial."""
    first = [name for name in found if name.partition(",")[0] not in TRIALS]
    return {name: found[name] for name in first} | {
        name: found[name] for trial in TRIALS for name in found if name.partition(",")[0] == trial
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="trials of these models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    started = time.monotonic()
    names = [name for name, recipe in TRIALS.items() if arguments.only is None or recipe.model in arguments.only]
    scores: Scores = {}
    for seed in arguments.seeds:
        for name, score in floors(world(seed), seed).items():
            scores.setdefault(name, {})[seed] = score
    for number, (seed, found) in enumerate(measure(names, arguments.seeds, arguments.workers), 1):
        for name, score in found.items():
            scores.setdefault(name, {})[seed] = score
        print(f"\r{number} of {len(names) * len(arguments.seeds)}", end="", file=sys.stderr, flush=True)
    print(f"\nmAP@all of unseen classes: the median of seeds {arguments.seeds}, and each\n")
    table(ordered(scores))
    print()
    good = verdicts({name: median(by_seed.values()) for name, by_seed in scores.items()})
    print(f"\n{'every gate holds' if good else 'A GATE FAILS'}; {time.monotonic() - started:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
