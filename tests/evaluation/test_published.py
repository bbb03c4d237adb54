"""Published splits: the backbone's own classes among the unseen ones, counts of rows, and figures of papers."""

import pytest

from zsr.data.splits import published as splits
from zsr.evaluation import imagenet, published
from zsr.metrics import rank_hits


def test_the_21_classes_were_chosen_to_be_new_to_imagenet() -> None:
    """Yelamarthi et al. chose them so; by names, five have a part or a kind in it all the same."""
    found = imagenet.known(splits()["sketchy-21"]["unseen"])
    assert {label: names for label, names in found.items() if names and label != "songbird"} == {
        "cow": ("ox",),
        "dolphin": ("killer_whale",),
        "door": ("sliding_door",),
        "saw": ("chain_saw",),
    }
    assert "goldfinch" in found["songbird"]


@pytest.mark.parametrize(("split", "new"), [("sketchy-25", 5), ("sketchy-25-sempcyc", 3), ("quickdraw-30", 18)])
def test_other_splits_share_most_of_their_classes_with_imagenet(split: str, new: int) -> None:
    found = imagenet.known(splits()[split]["unseen"])
    assert sum(not names for names in found.values()) == new


def test_names_match_in_any_spelling_and_another_sense_does_not() -> None:
    found = imagenet.known(["jack_o_lantern", "t_shirt", "car_(sedan)", "mouse", "qzxv"])
    assert found["jack_o_lantern"] == ("jack_o_lantern",)
    assert found["t_shirt"] == ("jersey",)
    assert "convertible" in found["car_(sedan)"]
    assert found["mouse"] == found["qzxv"] == ()


def test_what_is_said_by_hand_names_nouns_of_the_tree() -> None:
    for label, nouns in imagenet.BY_HAND.items():
        assert bool(imagenet.known([label])[label]) == bool(nouns), label


def test_counts_of_a_published_split_are_compared_and_the_difference_is_named() -> None:
    unseen = tuple(splits()["sketchy-25-sempcyc"]["unseen"])
    assert "same sizes as in SEM-PCYC's released loader" in published.compare_counts(unseen, 14_421, 14_626)
    other = published.compare_counts(unseen, 14_421, 14_600)
    assert "equally many queries and 26 fewer gallery items" in other
    assert "14,421 x 14,626" in other
    two = published.compare_counts(tuple(splits()["sketchy-21"]["unseen"]), 12_694, 10_453)
    assert "same sizes as in the released loaders of CVAE" in two
    assert published.compare_counts(("bat", "cow"), 1, 1) == ""


def test_figures_are_those_of_the_same_split_and_protocol() -> None:
    unseen = tuple(splits()["tuberlin-30-sempcyc"]["unseen"])
    (zero_shot,), (generalised,) = (published.figures(unseen, p) for p in ("zero-shot", "generalised-sempcyc"))
    assert zero_shot.scores == {"mAP@all": 0.297, "P@100": 0.426}
    assert generalised.scores == {"mAP@all": 0.192, "P@100": 0.298}
    assert published.figures(unseen, "few-shot") == ()
    assert published.figures(unseen[1:], "zero-shot") == ()


def test_every_figure_is_of_a_kind_that_is_measured_here_and_above_chance() -> None:
    kinds = set(rank_hits([[True]], [1], 1, (100, 200)).means())
    for entry in splits().values():
        for protocol in ("zero-shot", "generalised-sempcyc"):
            for paper in published.figures(tuple(entry["unseen"]), protocol):
                assert set(paper.scores) <= kinds, paper.name
                assert min(paper.scores.values()) > 1 / len(entry["unseen"]), paper.name
                assert paper.source
