"""Published counts, class names and their spellings."""

import pytest

from zsr.data.published import Published, Spellings, published


@pytest.mark.parametrize(
    ("name", "classes", "totals"),
    [
        ("sketchy", 125, {"sketch": 75_481, "photo": 12_500}),
        ("sketchy-extended", 125, {"sketch": 75_481, "photo": 73_002}),
        ("tuberlin-extended", 250, {"sketch": 20_000, "photo": 204_489}),
        ("quickdraw", 345, {}),
    ],
)
def test_the_published_counts(name: str, classes: int, totals: dict[str, int]) -> None:
    known = published(name)
    assert (len(known.classes), known.totals) == (classes, totals)
    for modality, each in known.each.items():
        total = each * classes if isinstance(each, int) else sum(each.values())
        assert total == totals[modality]


@pytest.mark.parametrize("name", ["hot-air_balloon", "Hot Air Balloon", "hotairballoon", "HOT_AIR-BALLOON"])
def test_one_class_has_one_spelling(name: str) -> None:
    assert Spellings(published("sketchy").classes)(name) == "hot_air_balloon"


@pytest.mark.parametrize(("name", "label"), [("car (sedan)", "car_(sedan)"), ("car_sedan", "car_(sedan)")])
def test_brackets_may_be_missing(name: str, label: str) -> None:
    assert Spellings(published("sketchy").classes)(name) == label


def test_an_unknown_name_keeps_its_own_spelling_and_twins_are_not_mixed_up() -> None:
    spelling = Spellings(("hot_dog", "hotdog", "ant"))
    assert (spelling("Uni-Corn"), spelling("hot dog"), spelling("hotdog")) == ("uni_corn", "hot_dog", "hotdog")
    assert spelling("hot.dog") == "hot.dog"


def test_what_is_as_published_differs_in_nothing() -> None:
    known = Published("x", ("a", "b"), totals={"photo": 3}, each={"photo": {"a": 1, "b": 2}, "sketch": 2})
    assert known.differences({"photo": {"a": 1, "b": 2}, "sketch": {"a": 2, "b": 2}}) == []
    assert known.differences({"photo": {"a": 1, "b": 3}, "sketch": {"a": 2, "b": 2}}) == [
        "x: 4 photo rows, published are 3",
        "x: photo rows of 1 classes differ: b 3 for 2",
    ]
