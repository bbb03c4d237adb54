"""Tars are read in place: members become rows, and what is wrong with one of them is a bad row."""

import io
import tarfile
from pathlib import Path

import pytest

from tests.data.sources.helpers import jpeg, refused, rows
from zsr.data.sources.webdataset import WebDataset
from zsr.errors import ConfigError, DamagedArtifact


def tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path.parent


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_of_one_base_name_belong_together(tmp_path: Path) -> None:
    photo, sketch = jpeg((1, 2, 3)), jpeg((250, 2, 3))
    tar(
        tmp_path / "00000.tar",
        *(("a/17.jpg", photo), ("a/17.sketch.jpg", sketch), ("a/17.txt", b"a tree"), ("a/17.cls", b"Palm Tree\n")),
        *(("a/18.jpg", sketch), ("a/18.json", b'{"label": 7, "caption": "seven"}')),
    )
    source = WebDataset(tmp_path)
    found = rows(source)
    assert {(*at, item.label, item.pair, item.text) for at, item in found.items()} == {
        ("photo", "00000/a/17.jpg", "palm_tree", None, None),
        ("sketch", "00000/a/17.sketch.jpg", "palm_tree", "00000/a/17.jpg", None),
        ("text", "00000/a/17.txt", "palm_tree", "00000/a/17.jpg", "a tree"),
        ("photo", "00000/a/18.jpg", "7", None, None),
        ("text", "00000/a/18.txt", "7", "00000/a/18.jpg", "seven"),
    }
    assert source.load(found["photo", "00000/a/17.jpg"]) == photo
    assert source.load(found["sketch", "00000/a/17.sketch.jpg"]) == sketch
    assert source.load(found["text", "00000/a/18.txt"]) == b""


def test_loading_reads_the_bytes_of_one_member_alone(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", ("1.jpg", b"first"), ("2.jpg", b"second"), ("3.jpg", b"third"))
    source = WebDataset(tmp_path)
    found = rows(source)
    data = bytearray((tmp_path / "0.tar").read_bytes())
    at = data.index(b"second")
    data[:at] = bytes(at)  # nothing before the member is looked at
    (tmp_path / "0.tar").write_bytes(data[: at + 6])
    assert source.load(found["photo", "0/2.jpg"]) == b"second"


@pytest.mark.parametrize(
    ("member", "kind"),
    [
        (("../../etc/1.jpg", b"x"), "bad_path"),
        (("/etc/1.jpg", b"x"), "bad_path"),
        (special("1.jpg", tarfile.SYMTYPE, "/etc/passwd"), "wrong_type"),
        (special("1.jpg", tarfile.LNKTYPE, "0.jpg"), "wrong_type"),
        (special("1.jpg", tarfile.FIFOTYPE), "wrong_type"),
        (special("1.jpg", tarfile.CHRTYPE), "wrong_type"),
        (("1.txt", b"\xff\xff"), "bad_text"),
        (("1.txt", bytes((1 << 20) + 1)), "oversized"),
    ],
)
def test_a_bad_member_is_a_bad_row_and_the_next_one_is_used(
    tmp_path: Path, member: tuple[str, bytes] | tarfile.TarInfo, kind: str
) -> None:
    tar(tmp_path / "0.tar", member, ("9.jpg", jpeg()))
    source = WebDataset(tmp_path)
    good, bad = sorted(rows(source).values(), key=lambda item: item.problem)
    assert refused(source, bad) == kind
    assert source.load(good) == jpeg()


@pytest.mark.parametrize("text", [b"{", b"[1]", b'{"label": [1]}', b'{"label": NaN}', b'{"text": 5}'])
def test_json_that_says_nothing_makes_its_rows_bad(tmp_path: Path, text: bytes) -> None:
    tar(tmp_path / "0.tar", ("1.jpg", jpeg()), ("1.json", text))
    assert refused(WebDataset(tmp_path), rows(WebDataset(tmp_path))["photo", "0/1.jpg"]) in ("malformed", "wrong_type")


def test_a_tar_that_is_cut_or_none_is_damaged(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", ("1.jpg", bytes(2000)), ("2.jpg", bytes(2000)))
    whole = (tmp_path / "0.tar").read_bytes()
    for data in (whole[:4000], b"no tar at all" * 100):
        (tmp_path / "0.tar").write_bytes(data)
        with pytest.raises(DamagedArtifact, match="not readable as a tar"):
            list(WebDataset(tmp_path).items())


def test_a_header_that_claims_to_be_huge_is_damaged_and_costs_nothing(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        info = special("x", tarfile.GNUTYPE_LONGNAME)
        info.size = 1 << 33
        archive.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DamagedArtifact, match="a header of"):
        list(WebDataset(tmp_path).items())


def test_packed_tars_are_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="decompress it"):
        list(WebDataset(tmp_path).items())
