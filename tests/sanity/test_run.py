"""What `make sanity` makes of its scores: gates that fail say so, and every claim is about something measured."""

from dataclasses import replace

import pytest

from tests.sanity.run import CLAIMS, TRIALS, Claim, but, direction, gate, ordered, verdicts
from tests.sanity.world import SEEN, WORDS
from zsr.models import build
from zsr.models.protocol import Inputs

FLOORS = {"raw cosine", "least squares", "oracle", "shuffled test labels"}
RANKED = {"sem-pcyc, all photos", "cvae, all photos", "sem-pcyc, binary"}


def test_a_bound_is_a_factor_of_the_other_side_and_something_more() -> None:
    scores = {"full": 0.40, "less": 0.30}
    assert Claim("full", "less", 1.0, 0.05).bound(scores) == pytest.approx(0.35)
    assert gate("full", "less", factor=3.0).bound(scores) == pytest.approx(0.9)
    assert gate("full", plus=0.35).bound(scores) == 0.35


def test_claims_hold_from_their_own_side() -> None:
    scores = {"full": 0.40, "less": 0.30}
    assert direction("full", "less", "a paper").holds(scores)
    assert not direction("less", "full", "a paper").holds(scores)
    assert gate("less", plus=0.3, below=True).holds(scores)
    assert not gate("full", plus=0.3, below=True).holds(scores)
    assert not gate("full", "absent").known(scores)


def test_a_failing_gate_fails_the_run_and_a_failing_direction_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    good = {"raw cosine": 0.15, "cvae": 0.5, "caae as written": 0.6}
    assert verdicts(good)
    assert "not here  cvae >= caae as written" in capsys.readouterr().out
    assert not verdicts(good | {"cvae": 0.3})
    assert "FAILS" in capsys.readouterr().out


def test_sides_that_are_close_are_a_tie_for_a_direction_and_not_for_a_gate() -> None:
    scores = {"full": 0.400, "less": 0.405}
    assert direction("full", "less", "a paper").verdict(scores) == "a tie"
    assert direction("less", "full", "a paper").verdict(scores) == "a tie"
    assert gate("full", "less").verdict(scores) == "FAILS"


def test_every_claim_is_about_scores_that_a_run_measures() -> None:
    measured = FLOORS | RANKED | set(TRIALS)
    assert {side for claim in CLAIMS for side in (claim.left, claim.right) if side} <= measured


@pytest.mark.parametrize("name", TRIALS)
def test_an_ablation_changes_options_that_its_model_has(name: str) -> None:
    recipe = TRIALS[name]
    classes = tuple(f"{number:02d}" for number in range(SEEN))
    build(recipe.model, recipe.options, Inputs(sketch_dim=8, photo_dim=8, semantic_dim=WORDS, classes=classes))
    if name != recipe.model:
        assert recipe != TRIALS.get(recipe.model)


def test_an_option_is_laid_over_the_others() -> None:
    recipe = TRIALS["sem-pcyc"]
    assert but(recipe, dim=4) == replace(recipe, options={**recipe.options, "dim": 4})


def test_what_is_ranked_in_another_way_stands_beside_its_trial() -> None:
    found = {name: {0: 0.5} for name in ("cvae, all photos", "cvae", "sem-pcyc", "raw cosine", "sem-pcyc, binary")}
    assert list(ordered(found)) == ["raw cosine", "sem-pcyc", "sem-pcyc, binary", "cvae, all photos", "cvae"]
