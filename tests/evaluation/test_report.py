"""The page holds the numbers of report.json, stands alone, and survives bad pictures and strange names."""

import base64
import html.parser
import io
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from zsr.errors import ConfigError
from zsr.evaluation.protocol import (
    Evaluation,
    Sampling,
    Search,
    Side,
    evaluate,
    evaluate_generalised,
    evaluate_hits,
)
from zsr.evaluation.report import (
    Backbone,
    Published,
    RecallCurve,
    RecallPoint,
    Report,
    Row,
    Seeds,
    Splits,
    SplitScores,
    Validation,
    as_json,
    write,
)
from zsr.evaluation.scatter import scatter
from zsr.metrics import top

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Tags in order, the text of each table cell, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def side(count: int, noise: float, seed: int, names: tuple[str, ...] = ("bat", "cow", "door")) -> Side:
    rng = np.random.default_rng(seed)
    code = np.arange(count) % len(names)
    labels = np.array(names)[code]
    keys = np.array([f"{label}/{i}.png" for i, label in enumerate(labels)])
    embeddings = np.eye(len(names))[code] + noise * rng.standard_normal((count, len(names)))
    ids = np.arange(count, dtype=np.int64)
    return Side(ids, keys, labels, embeddings.astype(np.float32), pairs=ids % 12)


def measured(name: str, noise: float, names: tuple[str, ...] = ("bat", "cow", "door")) -> Evaluation:
    sampling = Sampling(disjoint=names[:2])
    return evaluate(name, side(24, noise, 1, names), side(60, noise, 2, names), ks=(10, 20), sampling=sampling)


def generalised(name: str, noise: float) -> Evaluation:
    seen = side(10, noise, 3, ("bee", "cat"))
    both = side(100, noise, 2, ("bat", "cow", "door", "bee", "cat"))
    wide = [replace(s, embeddings=np.pad(s.embeddings, ((0, 0), (0, 5 - s.embeddings.shape[1])))) for s in (seen, both)]
    query = side(24, noise, 1)
    query = replace(query, embeddings=np.pad(query.embeddings, ((0, 0), (0, 2))))
    return evaluate_generalised(name, query, wide[0], wide[1], ks=(10, 20))


def through() -> Evaluation:
    query, gallery = side(24, 0.3, 1), side(60, 0.3, 2)
    items, _ = query.merged()
    others, embeddings = gallery.merged()
    hits = others.ids[top(query.embeddings, embeddings, "cosine", 15)]
    return evaluate_hits("contrastive", items, others, hits, Search("IVF4,PQ2", 2, 15, 0.93, 12_345_678), ks=(10, 20))


def full() -> Report:
    return Report(
        "Sketch to photo",
        "a set of three classes",
        (
            Row(measured("contrastive", 0.3), note="seed 0"),
            Row(measured("contrastive, best epoch", 0.25), "peak"),
            Row(measured("ridge", 0.5), "floor"),
            Row(measured("raw", 1.0), "floor"),
            Row(through(), note="seed 1", exact=measured("contrastive", 0.31).scores),
        ),
        unseen=("bat", "cow", "door"),
        curves=(
            RecallCurve("sketch queries", "IVF4,PQ2", 15, (RecallPoint(1, 15.0, 0.6), RecallPoint(2, 30.0, 0.93))),
        ),
        seeds=(Seeds("contrastive", {0: 0.99, 1: 0.98, 2: 0.1}),),
        splits=Splits(
            {"random:3:0": 0.3312, "random:3:1": 0.3421},
            (
                SplitScores("contrastive", {"random:3:0": 0.81234, "random:3:1": 0.72345}),
                SplitScores("ridge", {"random:3:0": 0.61119, "random:3:1": 0.66664}),
            ),
        ),
        validation=(Validation("contrastive", ((10, 0.2), (20, 0.5), (30, 0.4))),),
        published=(Published("SAKE", "ICCV 2019", {"mAP@all": 0.547, "P@20(min)": 0.692}),),
        backbone=Backbone("lite0", "ImageNet-1k", {"bat": (), "cow": (), "door": ("sliding_door",)}),
        scatter=scatter("contrastive", side(24, 0.3, 1), side(60, 0.3, 2), "cosine"),
        notes=("Zero-shot: said so.",),
        configuration={"metric": "cosine"},
        digests={"checkpoint": "f" * 64},
        attribution="Pictures by nobody, CC0.",
    )


def drawing(modality: str, identity: int) -> bytes:
    picture = Image.new("RGB", (320, 200), (40 * (identity % 6), 90, 120 if modality == "photo" else 200))
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


def no_picture(modality: str, identity: int) -> None:
    return None


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report")
    write(output, full(), drawing)
    return output


@pytest.fixture(scope="module")
def values(written: Path) -> Any:
    return json.loads((written / "report.json").read_text())


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text())


def test_every_tag_is_closed_and_nothing_is_fetched(page: Page, written: Path) -> None:
    assert page.open == []
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 9 * 11
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    text = (written / "report.html").read_text()
    assert not re.findall(r"url\((?!#)", text)
    assert "#010101" not in text


def test_the_page_shows_the_numbers_of_the_file(page: Page, values: Any) -> None:
    cells = " ".join(page.cells)
    for row in values["rows"]:
        for name in ("mAP@all", "P@10", "mAP@20(k)", "mAP@20(hits)", "mAP@20(min)"):
            assert f"{row['scores'][name]:.3f}" in cells
            assert f"{row['chance'][name]:.3f}" in cells
    shown = next(row for row in values["rows"] if row["name"] == values["shown"] and row["search"] is None)
    metric_table = page.cells[len(page.cells) - 1 - page.cells[::-1].index("mAP@all") :]
    for name, score in shown["scores"].items():
        at = metric_table.index(name)
        level = shown["chance"].get(name)
        assert metric_table[at + 1] == ("\N{EN DASH}" if level is None else f"{level:.3f}")
        assert metric_table[at + 2] == f"{score:.3f}"


@pytest.mark.parametrize("kind", ["zero-shot", "generalised"])
def test_every_number_on_the_page_is_in_the_file(tmp_path: Path, written: Path, kind: str) -> None:
    """Scores have three decimals on the page; nothing there is computed from something else than the file."""
    folder = written
    if kind == "generalised":
        folder = tmp_path
        rows = (Row(generalised("contrastive", 0.3)), Row(generalised("ridge", 0.5), "floor"))
        write(folder, Report("t", "d", rows, protocol="generalised"), no_picture)
    known = {f"{abs(value):.3f}" for value in numbers(json.loads((folder / "report.json").read_text()))}
    text = (folder / "report.html").read_text()
    for part in ("style", "svg", "pre"):
        text = re.sub(rf"<{part}\b.*?</{part}>", "", text, flags=re.DOTALL)
    shown = re.findall(r"\d\.\d{3}(?!\d)", re.sub(r"<[^>]*>", " ", text))
    assert len(shown) > 50
    assert set(shown) <= known


def numbers(value: Any) -> list[float]:
    """Every number in JSON values."""
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers(entry)]
    if isinstance(value, list):
        return [number for entry in value for number in numbers(entry)]
    return [value] if isinstance(value, int | float) else []


def test_spread_over_splits_is_that_of_the_scores(values: Any, written: Path) -> None:
    first, floor = values["splits"]["models"]
    assert first["mean"] == pytest.approx((0.81234 + 0.72345) / 2)
    assert first["deviation"] == pytest.approx(np.std([0.81234, 0.72345], ddof=1))
    differences = [0.81234 - 0.61119, 0.72345 - 0.66664]
    assert first["difference"] == pytest.approx(np.mean(differences))
    assert first["difference_deviation"] == pytest.approx(np.std(differences, ddof=1))
    assert floor["difference"] == 0


def test_published_figures_stand_beside_the_same_metric(page: Page, values: Any) -> None:
    shown = next(row for row in values["rows"] if row["name"] == values["shown"] and row["search"] is None)
    at = page.cells.index("P@20(min)")
    chance = shown["chance"]["P@20(min)"]
    assert page.cells[at + 1 : at + 4] == ["0.692", f"{shown['scores']['P@20(min)']:.3f}", f"{chance:.3f}"]


def test_classes_new_to_the_backbone_are_named(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert "1 of the 3 unseen classes" in text
    assert "sliding door" in text
    assert "Zero-shot: said so." in text


def test_the_scatter_is_seeded_and_holds_every_item(values: Any) -> None:
    again = scatter("contrastive", side(24, 0.3, 1), side(60, 0.3, 2), "cosine")
    assert again is not None
    assert [list(point) for point in again.query] == values["scatter"]["query"]
    assert (len(again.query), len(again.gallery)) == (24, 60)
    assert all(0 <= x <= 1 and 0 <= y <= 1 for x, y, _ in again.query + again.gallery)
    assert scatter("contrastive", side(3, 0.3, 1), side(3, 0.3, 2), "cosine") is None


def test_the_file_holds_what_was_measured(values: Any) -> None:
    report = full()
    for row, found in zip(report.rows, values["rows"], strict=True):
        assert found["scores"] == dict(row.evaluation.scores)
        assert found["chance"] == dict(row.evaluation.chance)
        assert tuple(found["curve"]) == row.evaluation.curve
        assert [entry["score"] for entry in found["per_class"]] == [c.score for c in row.evaluation.per_class]
    assert "replicates" not in json.dumps(values)
    assert values["digests"] == {"checkpoint": "f" * 64}


def test_floors_and_the_peak_are_marked(page: Page, written: Path) -> None:
    classes = [attributes.get("class") or "" for tag, attributes in page.tags if tag == "tr"]
    assert sum("floor" in name for name in classes) == 2
    assert sum("peak" in name for name in classes) == 1
    assert "not selectable" in (written / "report.html").read_text()


def test_right_and_wrong_have_a_mark_beside_the_colour(page: Page, values: Any, written: Path) -> None:
    shown = next(row for row in values["rows"] if row["name"] == values["shown"])
    right = sum(hit["right"] for example in shown["examples"] for hit in example["hits"])
    text = (written / "report.html").read_text()
    assert text.count(">\N{CHECK MARK}<") == right
    assert text.count(">\N{BALLOT X}<") == 90 - right
    assert right not in (0, 90)


def test_the_peak_is_never_the_headline(values: Any) -> None:
    assert values["shown"] == "contrastive"


def test_seeds_say_where_the_floor_stands(values: Any) -> None:
    (seeds,) = values["seeds"]
    assert (seeds["median"], seeds["lowest"], seeds["highest"]) == (0.98, 0.1, 0.99)
    assert "is above the ridge baseline" in seeds["sentence"]
    assert "2 of 3 seeds" in seeds["sentence"]


def test_an_index_stands_beside_exact_search_with_its_own_embeddings(page: Page, values: Any) -> None:
    """The table's row of that model may be another seed."""
    row = next(row for row in values["rows"] if row["search"] is not None)
    at = page.cells.index("IVF4,PQ2")
    shown = " ".join(page.cells[at : at + 9])
    assert row["exact"]["mAP@all"] != row["scores"]["mAP@all"]
    assert f"{row['exact']['mAP@all']:.3f}" in shown
    assert f"{row['scores']['mAP@all']:.3f}" in shown


def test_differences_are_paired_with_the_reference(values: Any) -> None:
    by_name = {row["name"]: row for row in values["rows"] if row["search"] is None}
    difference = by_name["contrastive"]["difference"]
    wanted = by_name["contrastive"]["scores"]["mAP@all"] - by_name["ridge"]["scores"]["mAP@all"]
    assert difference["score"] == pytest.approx(wanted)
    assert difference["interval"][0] <= wanted <= difference["interval"][1]
    assert by_name["ridge"]["difference"] is None


def test_other_queries_are_not_compared() -> None:
    other = evaluate("contrastive", side(27, 0.3, 1), side(60, 0.3, 2), ks=(10, 20))
    found = as_json(Report("t", "d", (Row(other), Row(measured("ridge", 0.5), "floor"))))
    assert found["rows"][0]["difference"] is None


def test_without_pictures_tiles_stand_with_key_and_class(tmp_path: Path) -> None:
    write(tmp_path, full(), no_picture)
    page = Page((tmp_path / "report.html").read_text())
    assert page.count("img") == 0
    tiles = [attributes for tag, attributes in page.tags if tag == "span" and attributes.get("class") == "tile"]
    assert len(tiles) == 9 * 11


def bomb() -> bytes:
    """A PNG header that claims 60,000 x 60,000 pixels."""
    size = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    end = b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + size + zlib.crc32(size).to_bytes(4, "big") + end


@pytest.mark.parametrize(
    "data",
    [b"", b"not a picture", drawing("photo", 1)[:60], b"\x89PNG\r\n\x1a\n" + b"\0" * 40, bomb()],
    ids=["empty", "text", "cut short", "zeros", "bomb"],
)
def test_a_picture_that_does_not_decode_becomes_a_tile(tmp_path: Path, data: bytes) -> None:
    write(tmp_path, full(), lambda modality, identity: data)
    assert Page((tmp_path / "report.html").read_text()).count("img") == 0


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def thumbnails(tmp_path: Path, data: bytes) -> list[np.ndarray]:
    """What the page shows where every row has this image."""
    write(tmp_path, full(), lambda modality, identity: data)
    found = re.findall(r'src="data:image/webp;base64,([^"]+)"', (tmp_path / "report.html").read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), int) for text in found]


def test_what_is_shown_is_what_was_embedded_whatever_browsers_show(tmp_path: Path) -> None:
    upright = Image.new("RGB", (60, 40), (250, 200, 40))
    upright.paste((20, 40, 200), (0, 0, 20, 10))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    wanted = thumbnails(tmp_path, saved(upright, "PNG"))
    assert len(wanted) == 9 * 11
    for data in (saved(stored, "PNG", exif=exif), saved(stored, "TIFF", exif=exif), saved(upright, "JPEG2000")):
        found = thumbnails(tmp_path, data)
        assert [np.abs(one - other).max() for one, other in zip(found, wanted, strict=True)] == [0] * len(wanted)


def test_names_are_escaped(tmp_path: Path) -> None:
    names = ("<script>alert(1)</script>", "a $x$ & b", "\u732b_")
    report = Report("<b>title</b>", "d & d", (Row(measured("_model $a$ <i>", 0.4, names)),))
    write(tmp_path, report, no_picture)
    text = (tmp_path / "report.html").read_text()
    assert Page(text).count("script") == 0
    assert "<i>" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    assert "\u732b" in text


def test_the_smallest_report_has_no_empty_section(tmp_path: Path) -> None:
    write(tmp_path, Report("t", "d", (Row(measured("raw", 1.0), "floor"),)), no_picture)
    text = (tmp_path / "report.html").read_text()
    headings = (
        "Spread over",
        "Recall against cost",
        "Validation",
        "Exact search and index",
        "Published",
        "Seen and unseen",
    )
    for heading in (*headings, "Embeddings", "Training classes of"):
        assert heading not in text


def test_equal_reports_give_equal_bytes(tmp_path: Path, written: Path) -> None:
    write(tmp_path, full(), drawing)
    for name in ("report.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_a_report_without_an_exact_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one row"):
        as_json(Report("t", "d", ()))
    with pytest.raises(ConfigError, match="'nobody'"):
        as_json(replace(full(), shown="nobody"))
