"""ZeRO stages, ranks and pieces of a batch train the same weights: one model of coupled terms, and one behind a tower.

All models, and half precision, are in `make stages`.
"""

import pytest

from tests.training.stages import EXACT, Job, Weights, bar, bits, doubled, gap, jobs_of, small, together

STEPS = 20
DOODLE = {
    "doodle: stage 2": Job("doodle2search", stage=2, pieces=2, tower=True),
    "doodle: stage 3, recomputed": Job(
        "doodle2search", stage=3, pieces=2, tower=True, recompute=True, like="doodle: stage 2"
    ),
    "contrastive: two pieces": Job("contrastive", pieces=2, tower=True),
    "contrastive: stage 1": Job("contrastive", stage=1, pieces=2, tower=True, like="contrastive: two pieces"),
}
SAME = jobs_of("lcale") | DOODLE
DOUBLE = [doubled("lcale"), doubled("doodle2search", tower=True), doubled("contrastive", tower=True)]
APART = {"apart": Job("lcale", apart=True, double=True)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    jobs = SAME | APART
    for more in DOUBLE:
        jobs |= more
    return together(jobs, STEPS, tmp_path_factory.mktemp("stages"))


def apart(name: str, job: Job, base: str, results: dict[str, Weights]) -> float:
    with bits(job.double):
        return gap(results[name], results[base], dict(small(job).state_dict()))


@pytest.mark.parametrize("name", [name for name, job in SAME.items() if job.like])
def test_stages_and_what_goes_on_at_another_stage_train_the_same_bits(name: str, results: dict[str, Weights]) -> None:
    assert apart(name, SAME[name], SAME[name].like, results) == 0.0


@pytest.mark.parametrize("jobs", DOUBLE, ids=lambda jobs: next(iter(jobs)).partition(":")[0])
def test_in_64_bits_ranks_and_pieces_are_the_same(jobs: dict[str, Job], results: dict[str, Weights]) -> None:
    base, *others = jobs
    gaps = {name: apart(name, jobs[name], base, results) for name in others}
    assert {name: gap for name, gap in gaps.items() if gap > bar(jobs[name])} == {}


def test_the_comparison_sees_ranks_that_do_not_gather(results: dict[str, Weights]) -> None:
    assert apart("apart", APART["apart"], next(iter(DOUBLE[0])), results) > 1000 * EXACT
