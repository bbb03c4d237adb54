"""ZeRO stages, ranks and pieces of a batch train the same weights: one model of coupled terms, and one behind a tower.

All models, and half precision, are in `make stages`.
"""

import pytest

from tests.training.stages import CONTROL, EXACT, TOLERANCE, Job, Weights, bits, doubled, gap, jobs_of, small, together

STEPS = 20
LCALE = jobs_of("lcale")
DOODLE = {
    "doodle: whole": Job("doodle2search", tower=True),
    "doodle: stage 3, two pieces, recomputed": Job("doodle2search", stage=3, pieces=2, tower=True, recompute=True),
    "contrastive: whole": Job("contrastive", tower=True),
    "contrastive: two pieces": Job("contrastive", stage=1, pieces=2, tower=True),
}
DOUBLE = doubled("lcale")
APART = {"apart": Job("lcale", apart=True)}
COMPARED = [
    (name, base)
    for base, jobs in (("lcale: stage 0", LCALE), ("doodle: whole", DOODLE), ("contrastive: whole", DOODLE))
    for name, job in jobs.items()
    if name != base and name.partition(":")[0] == base.partition(":")[0] and not job.half
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    return together(LCALE | DOODLE | APART | DOUBLE, STEPS, tmp_path_factory.mktemp("stages"))


def start(job: Job) -> Weights:
    return dict(small(job).state_dict())


@pytest.mark.parametrize(("name", "base"), COMPARED)
def test_the_weights_are_those_of_stage_0_in_one_piece(name: str, base: str, results: dict[str, Weights]) -> None:
    assert gap(results[name], results[base], start((LCALE | DOODLE)[base])) <= TOLERANCE


def test_in_64_bits_ranks_and_pieces_are_the_same_far_more_closely(results: dict[str, Weights]) -> None:
    with bits(double=True):
        begin = start(DOUBLE["lcale: 64 bits, two ranks"])
    whole, *others = (results[name] for name in DOUBLE)
    assert max(gap(other, whole, begin) for other in others) <= EXACT


def test_the_comparison_sees_ranks_that_do_not_gather(results: dict[str, Weights]) -> None:
    assert gap(results["apart"], results["lcale: stage 0"], start(APART["apart"])) > CONTROL
