from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medssl.data import archive
from medssl.data.archive import is_archive, unpack
from medssl.data.scan import ScanConfig, scan
from medssl.errors import NoInputError, ReadError
from medssl.ledger import Outcome

Add = Callable[[zipfile.ZipFile], None]


def _zip(path: Path, add: Add) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/good.txt", "good")
        add(file)
    return path


def _tar(path: Path, *members: tarfile.TarInfo, mode: Any = "w:gz") -> Path:
    with tarfile.open(path, mode) as file:
        for member in members:
            file.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
    return path


def _member(name: str, *, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, link
    return member


def _link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def test_members_get_numbers_for_names_and_come_out_whole(tmp_path: Path) -> None:
    def add(file: zipfile.ZipFile) -> None:
        file.writestr("Doe John/1.2.840.5", b"one")
        file.writestr("Doe John/scan.nii.gz", b"two")
        file.writestr("Doe John/pair.hdr", b"three")
        file.writestr("Doe John/pair.img", b"four")
        file.writestr("back\\slash.dcm", b"five")

    found = dict(unpack(_zip(tmp_path / "x.zip", add), tmp_path / "out"))
    assert {str(name): path.read_bytes() for name, path in found.items()} == {
        "a/good.txt": b"good",
        "Doe John/1.2.840.5": b"one",
        "Doe John/scan.nii.gz": b"two",
        "Doe John/pair.hdr": b"three",
        "Doe John/pair.img": b"four",
        "back/slash.dcm": b"five",
    }
    places = {str(name): path for name, path in found.items()}
    assert not any("Doe" in str(path.relative_to(tmp_path)) for path in places.values())
    assert places["Doe John/scan.nii.gz"].name.endswith(".nii.gz")
    assert places["Doe John/pair.hdr"].with_suffix(".img") == places["Doe John/pair.img"]
    assert all(path.is_relative_to(tmp_path / "out") for path in places.values())


def test_what_was_unpacked_is_kept_until_the_archive_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _zip(tmp_path / "x.zip", lambda _: None)
    first = unpack(path, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_extract", lambda *_, **__: pytest.fail("unpacked again"))
        assert unpack(path, tmp_path / "out") == first
    first[0][1].write_bytes(b"cut")
    assert unpack(path, tmp_path / "out")[0][1].read_bytes() == b"good"
    (first[0][1].parents[1] / "members.json").write_text("[[1]]")
    assert unpack(path, tmp_path / "out")[0][1].read_bytes() == b"good"


@pytest.mark.parametrize(
    "add",
    [
        lambda file: file.writestr("../x", "x"),
        lambda file: file.writestr("a/../../x", "x"),
        lambda file: file.writestr("..\\x", "x"),
        lambda file: file.writestr("/etc/x", "x"),
        lambda file: file.writestr("C:\\x", "x"),
        lambda file: file.writestr(_link("link"), "/etc/passwd"),
        lambda file: file.writestr("a\\good.txt", "x"),
    ],
    ids=["up", "up later", "up by backslash", "absolute", "drive", "link", "twice"],
)
def test_a_member_that_leads_out_or_is_no_file_refuses_the_archive(tmp_path: Path, add: Add) -> None:
    with pytest.raises(ReadError) as error:
        unpack(_zip(tmp_path / "x.zip", add), tmp_path / "out")
    assert error.value.code == "E_ARCHIVE"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "member",
    [
        _member("../x"),
        _member("/x"),
        _member("l", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        _member("h", kind=tarfile.LNKTYPE, link="a"),
        _member("f", kind=tarfile.FIFOTYPE),
        _member("d", kind=tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_the_same_holds_for_tar(tmp_path: Path, member: tarfile.TarInfo) -> None:
    with pytest.raises(ReadError) as error:
        unpack(_tar(tmp_path / "x.tgz", _member("a", size=3), member), tmp_path / "out")
    assert error.value.code == "E_ARCHIVE"


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz")])
def test_tar_comes_out_whole(tmp_path: Path, name: str, mode: str) -> None:
    members = (_member("d", kind=tarfile.DIRTYPE), _member("d/a.dcm", size=3), _member("b" * 150, size=5))
    found = unpack(_tar(tmp_path / name, *members, mode=mode), tmp_path / "out")
    assert [(str(item), path.read_bytes()) for item, path in found] == [("d/a.dcm", b"xxx"), ("b" * 150, b"xxxxx")]


def test_an_archive_that_grows_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _zip(tmp_path / "x.zip", lambda file: file.writestr("zeros", bytes(3_000_000)))
    tar = _tar(tmp_path / "x.tgz", *(_member(str(number), size=0) for number in range(5)))
    monkeypatch.setattr(archive, "_FREE_RATIO_BYTES", 1 << 20)
    monkeypatch.setattr(archive, "_MOST_RATIO", 10)
    with pytest.raises(ReadError, match="unpacks to more than 1048576 bytes") as error:
        unpack(path, tmp_path / "out")
    assert error.value.code == "E_BOMB"
    monkeypatch.setattr(archive, "_MOST_MEMBERS", 4)
    with pytest.raises(ReadError, match="more than 4 members"):
        unpack(tar, tmp_path / "out")
    monkeypatch.setattr(archive, "_MOST_BYTES", 1000)
    with pytest.raises(ReadError, match="declares 3000004 bytes"):
        unpack(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_header_of_gigabytes_is_not_believed(tmp_path: Path) -> None:
    header = _member("pax", kind=tarfile.XHDTYPE)
    header.size = 3 << 30
    (tmp_path / "x.tar").write_bytes(header.tobuf() + bytes(2048))
    with pytest.raises(ReadError) as error:
        unpack(tmp_path / "x.tar", tmp_path / "out")
    assert error.value.code == "E_ARCHIVE"


def test_damage_is_named(tmp_path: Path) -> None:
    whole = _zip(tmp_path / "x.zip", lambda file: file.writestr("b", np.random.default_rng(0).bytes(5000))).read_bytes()
    flipped = bytearray(whole)
    flipped[2000] ^= 1
    for number, content in enumerate((b"", b"PK", whole[:3000], bytes(flipped))):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(content)
        with pytest.raises(ReadError) as error:
            unpack(path, tmp_path / "out")
        assert error.value.code == "E_ARCHIVE"
    (tmp_path / "y.tgz").write_bytes(_tar(tmp_path / "x.tgz", _member("a", size=20_000)).read_bytes()[:60])
    with pytest.raises(ReadError, match="is damaged"):
        unpack(tmp_path / "y.tgz", tmp_path / "out")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path: Path, mode: str) -> None:
    members = [_member(str(number), size=700) for number in range(3)]
    whole = _tar(tmp_path / "x.tar", *members, mode=mode).read_bytes()
    assert len(unpack(tmp_path / "x.tar", tmp_path / "out")) == 3
    last = len(whole) - 1 if mode == "w:gz" else 3 * (512 + 1024)
    for cut in range(10, last, 97 if mode == "w" else 7):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ReadError):
            unpack(tmp_path / "cut.tar", tmp_path / "out")


def test_only_some_names_are_archives() -> None:
    names = ("a.zip", "a.ZIP", "a.tar", "a.tar.gz", "a.tgz", "a.nii.gz", "a.gz", "zip", "a.npz")
    assert [is_archive(Path(name)) for name in names] == [True] * 5 + [False] * 4


def test_scan_looks_into_archives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(rng.integers(0, 99, (6, 7, 8)).astype(np.int16), np.eye(4)), raw / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((6, 7, 8), np.uint8), np.eye(4)), raw / "a_seg.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(rng.integers(0, 99, (6, 7, 8)).astype(np.int16)), str(raw / "c.mhd"))
    data = tmp_path / "d"
    data.mkdir()
    with zipfile.ZipFile(data / "export.zip", "w") as file:
        for path in raw.iterdir():
            file.write(path, path.name)
        file.writestr("inner.zip", b"")
        file.writestr("notes.txt", "")
    (data / "bad.zip").write_bytes(b"PK")
    config = ScanConfig(workers=1, names="keep")
    result = scan(data, tmp_path / "out", config=config)
    assert {entry.item: entry.outcome for entry in result.ledger} == {
        "bad.zip": Outcome.REJECTED,
        "export.zip/a.nii.gz": Outcome.ACCEPTED,
        "export.zip/b.nii.gz": Outcome.ACCEPTED,
        "export.zip/c.mhd": Outcome.ACCEPTED,
        "export.zip/c.raw": Outcome.IGNORED,
        "export.zip/inner.zip": Outcome.IGNORED,
        "export.zip/notes.txt": Outcome.IGNORED,
    }
    assert [(case.case_id, case.label is not None) for case in result.cohort] == [
        ("a", True),
        ("b", False),
        ("c", False),
    ]
    alone = scan(data / "export.zip", tmp_path / "alone", config=config)
    assert [case.case_id for case in alone.cohort] == ["a", "b", "c"]
    dry = scan(data, tmp_path / "dry", config=config, dry_run=True)
    assert [case.case_id for case in dry.cohort] == ["a", "b", "c"]
    assert not (tmp_path / "dry").exists()
    assert all(case.image.startswith(str(tmp_path / "dry")) for case in dry.cohort)
    again = scan(tmp_path, tmp_path / "out", config=config.model_copy(update={"image_glob": "export.zip/*"}))
    assert [case.case_id for case in again.cohort] == ["a", "b", "c"]


def test_a_file_that_is_no_archive_is_no_place_to_scan(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ReadError, match="is no folder and no archive"):
        scan(tmp_path / "x.txt", tmp_path / "out")
    with pytest.raises(NoInputError):
        scan(_zip(tmp_path / "x.zip", lambda _: None), tmp_path / "out")
