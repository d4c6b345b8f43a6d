import os
import struct
import warnings
import zlib
from pathlib import Path

import pydicom
import pytest
from dicoms import CANARIES, build_series, write, write_enhanced, write_series
from phantoms import REAL_DATA
from pydicom import datadict, uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medssl.errors import MedSSLError, ReadError
from medssl.io.dicom import elements as module
from medssl.io.dicom.dataset import Elements, convert
from medssl.io.dicom.elements import content, is_dicom, parse, read_elements
from medssl.io.dicom.tags import IMAGE, META, REFERENCES

SHIPPED = sorted(path for path in (Path(pydicom.__file__).parent / "data" / "test_files").rglob("*") if path.is_file())
REAL = sorted(
    path
    for folder in ("dicom_series", "dicom_files")
    for path in (REAL_DATA / folder).rglob("*")
    if path.is_file() and path.suffix not in {".gz", ".nii", ".csv", ".md", ".json", ".txt"}
)
PATH = Path("a.dcm")
_PRIVATE = 0x10000


def read_by_pydicom(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(path, force=True)


def standard(tag):
    return not (tag // _PRIVATE) % 2


def assert_same(elements: Elements, dataset: Dataset) -> int:
    """Every element of the table has the value that pydicom gives; returns how many were compared."""
    count = 0
    for tag, (keyword, kind) in IMAGE.items():
        if not standard(tag):
            continue
        element = dataset.get(tag)
        if element is None:
            assert keyword not in elements.values, keyword
            continue
        count += 1
        if kind == "SQ":
            items = elements.sequence(keyword)
            assert len(items) == len(element.value), keyword
            count += sum(assert_same(*pair) for pair in zip(items, element.value, strict=True))
            continue
        value = element.value
        value = list(value) if isinstance(value, pydicom.multival.MultiValue | list) else [value]
        if value in ([None], [""], []):
            assert keyword not in elements, keyword
        elif kind == "IS" and isinstance(value[0], str):
            with pytest.raises(ReadError):
                elements.numbers(keyword)
        elif "or" in datadict.dictionary_VR(tag):  # whether it is signed depends on the pixels: the header's affair
            assert [int(number) % (1 << 16) for number in elements.numbers(keyword)] == [
                number % (1 << 16) for number in value
            ]
        elif kind in {"DS", "IS", "FD", "FL", "UL"} or (kind == "US" and not isinstance(value[0], bytes)):
            assert elements.numbers(keyword) == tuple(float(number) for number in value), keyword
        elif kind == "AT":
            assert elements.values[keyword] == tuple(int(number) for number in value), keyword
        elif isinstance(value[0], str):
            assert elements.text(keyword).split("\\") == [str(part).strip() for part in value]
        elif isinstance(value[0], bytes):
            assert elements.raw(keyword) == value[0], keyword
    return count


def check_against_pydicom(path) -> bool:
    with path.open("rb") as file:
        if not is_dicom(file.read(160)):
            return False
    try:
        found = read_elements(path)
    except ReadError as error:
        assert error.code in {"E_HEADER", "E_BOMB"}  # noqa: PT017
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = read_by_pydicom(path)
        count = assert_same(found, dataset)
    if "PixelData" in dataset and found.pixels is not None:
        stored = content(path.read_bytes(), path)[found.pixels.offset :]
        native = found.pixels.length is not None
        assert stored[: found.pixels.length][: len(dataset.PixelData)] == dataset.PixelData if native else True
    return count > 0


@pytest.fixture(scope="module")
def plain():
    """Slice of a CT series with a nested sequence and a private block, as a pydicom data set."""
    ds = build_series((8, 10, 1))[0]
    inner = Dataset()
    inner.RadionuclideHalfLife = "6586.2"
    inner.IconImageSequence = Sequence([Dataset()])
    ds.RadiopharmaceuticalInformationSequence = Sequence([inner, Dataset()])
    unwanted = Dataset()
    unwanted.RequestAttributesSequence = Sequence([Dataset(), inner])
    ds.RequestAttributesSequence = Sequence([unwanted])
    ds.add_new(0x00091001, "OB", b"\1\2" * 5000)
    return ds


def test_table_names_each_element_as_the_standard_does():
    for tag, (keyword, kind) in (META | IMAGE | REFERENCES).items():
        if standard(tag):
            assert datadict.keyword_for_tag(tag) == keyword
            assert kind in datadict.dictionary_VR(tag)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_elements_equal_those_of_pydicom_on_its_own_files(path):
    check_against_pydicom(path)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL, reason="no real data here")
def test_elements_equal_those_of_pydicom_on_real_files():
    assert sum(check_against_pydicom(path) for path in REAL) > 0.95 * len(REAL)


@pytest.mark.parametrize(
    "syntax",
    [
        uid.ExplicitVRLittleEndian,
        uid.ImplicitVRLittleEndian,
        uid.DeflatedExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
    ],
)
def test_every_coding_gives_the_same_elements(tmp_path, plain, syntax):
    path = write(plain, tmp_path / "a.dcm", syntax=syntax)
    found = read_elements(path)
    assert found.transfer_syntax == syntax
    assert assert_same(found, read_by_pydicom(path)) > 20
    assert found.sequence("RadiopharmaceuticalInformationSequence")[0].number("RadionuclideHalfLife") == 6586.2
    start = content(path.read_bytes(), path)[found.pixels.offset :]
    assert len(start) == found.pixels.length == 160


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_undefined_lengths_are_walked(tmp_path, plain, syntax):
    for sequence in (plain.RadiopharmaceuticalInformationSequence, plain.RequestAttributesSequence):
        sequence.is_undefined_length = True
        for item in sequence:
            item.is_undefined_length_sequence_item = True
    found = read_elements(write(plain, tmp_path / "a.dcm", syntax=syntax))
    assert len(found.sequence("RadiopharmaceuticalInformationSequence")) == 2
    assert found.pixels.length == 160


def test_reading_stops_where_the_pixels_begin(tmp_path, monkeypatch):
    path = write_series(tmp_path, shape=(512, 512, 1))[0]
    read = []
    parse_bytes = module._walk
    monkeypatch.setattr(
        module, "_walk", lambda data, *args, **kw: read.append(len(data)) or parse_bytes(data, *args, **kw)
    )
    found = read_elements(path)
    assert sum(read) < 20_000 < path.stat().st_size
    assert read_elements(path, head_only=False).values == found.values


def test_long_headers_are_read_on_until_the_pixels(tmp_path, plain):
    plain.add_new(0x00091002, "OB", bytes(600_000))
    found = read_elements(write(plain, tmp_path / "a.dcm"))
    assert found.pixels.length == 160
    path = write_enhanced(tmp_path / "many.dcm", shape=(4, 4, 200))
    assert len(read_elements(path).sequence("PerFrameFunctionalGroupsSequence")) == 200


def test_further_elements_are_kept_on_request(tmp_path, plain):
    path = write(plain, tmp_path / "a.dcm")
    also = {0x00400275: ("RequestAttributesSequence", "SQ")}
    assert "RequestAttributesSequence" not in read_elements(path)
    assert len(read_elements(path, also=also).sequence("RequestAttributesSequence")) == 1
    assert parse(path.read_bytes(), path, also=also).pixels == read_elements(path).pixels


def test_no_name_date_or_free_text_is_kept(tmp_path):
    found = read_elements(write_series(tmp_path)[0])
    kept = " ".join(str(value) for keyword, value in found.values.items() if keyword not in {"PatientID", "SeriesDate"})
    assert not any(text in kept for text in CANARIES.values())


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble_or_meta_are_read_with_a_warning(tmp_path, plain, implicit):
    path = tmp_path / "a.dcm"
    bare = Dataset(dict(plain.items()))
    bare.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    data = path.read_bytes()
    assert data[128:132] != b"DICM"
    found = read_elements(path)
    assert found.integer("Rows") == 8
    assert [warning.split(":")[0] for warning in found.warnings] == ["W_NO_META"]


def test_programs_in_the_preamble_are_named(tmp_path, plain):
    path = write(plain, tmp_path / "a.dcm")
    for magic in (b"MZ", b"\x7fELF"):
        data = magic.ljust(128, b"\0") + path.read_bytes()[128:]
        assert "W_PREAMBLE" in parse(data, path).warnings[0]


def explicit(tag, vr, value, length=None):
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr
    size = len(value) if length is None else length
    long = vr in {b"SQ", b"OB", b"OW", b"UN"}
    return head + (struct.pack("<HI", 0, size) if long else struct.pack("<H", size)) + value


META_GROUP = explicit(0x00020010, b"UI", b"1.2.840.10008.1.2.1\0")
ROWS = explicit(0x00280010, b"US", b"\x08\0")
UNDEFINED = 0xFFFFFFFF
ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED)
ITEM_END, SEQUENCE_END = (struct.pack("<HHI", 0xFFFE, number, 0) for number in (0xE00D, 0xE0DD))


def file_of(*elements, meta=META_GROUP):
    return bytes(128) + b"DICM" + meta + b"".join(elements)


def test_encapsulated_icons_and_unknown_sequences_are_jumped_over():
    fragments = struct.pack("<HHI", 0xFFFE, 0xE000, 4) + b"abcd" + SEQUENCE_END
    icon = explicit(0x7FE00010, b"OB", fragments, UNDEFINED)
    nested = explicit(0x00880200, b"SQ", ITEM + icon + ITEM_END + SEQUENCE_END, UNDEFINED)
    implicit_item = ITEM + struct.pack("<HHI", 0x0011, 0x1001, 2) + b"ab" + ITEM_END + SEQUENCE_END
    unknown = explicit(0x00111010, b"UN", implicit_item, UNDEFINED)
    found = parse(file_of(unknown, ROWS, nested), PATH)
    assert found.integer("Rows") == 8
    assert found.pixels is None


def test_wanted_sequence_of_unknown_type_is_read_as_implicit():
    half_life = struct.pack("<HHI", 0x0018, 0x1075, 4) + b"6586"
    sequence = explicit(0x00540016, b"UN", ITEM + half_life + ITEM_END + SEQUENCE_END, UNDEFINED)
    found = parse(file_of(sequence), PATH).first("RadiopharmaceuticalInformationSequence")
    assert found.number("RadionuclideHalfLife") == 6586


def test_private_values_stored_as_bytes_are_converted():
    assert parse(file_of(explicit(0x0019100C, b"OB", b"800 ")), PATH).number("SiemensBValue") == 800
    assert parse(file_of(explicit(0x00280010, b"UN", b"\x09\0")), PATH).integer("Rows") == 9


def nested(depth):
    return b"".join([explicit(0x00289110, b"SQ", b"", UNDEFINED) + ITEM] * depth + [(ITEM_END + SEQUENCE_END)] * depth)


BROKEN = {
    "empty": (b"", "E_EMPTY"),
    "text": (b"not an image, " * 30, "E_FORMAT"),
    "value beyond the end": (file_of(explicit(0x00280030, b"DS", b"1\\1 ", 40)), "E_HEADER"),
    "unwanted value beyond the end": (file_of(explicit(0x00091001, b"OB", b"ab", 4_000_000)), "E_HEADER"),
    "half a tag": (file_of(ROWS, b"\x28\0\x11"), "E_HEADER"),
    "half a meta element": (bytes(128) + b"DICM" + META_GROUP[:7], "E_HEADER"),
    "meta beyond the end": (bytes(128) + b"DICM" + explicit(0x00020010, b"UI", b"1.2", 900), "E_HEADER"),
    "meta of long type cut off": (bytes(128) + b"DICM" + explicit(0x00020001, b"OB", b"")[:9], "E_HEADER"),
    "odd number": (file_of(explicit(0x00280010, b"US", b"\1\0\1")), "E_HEADER"),
    "nested 50,000 deep": (file_of(nested(50_000)), "E_HEADER"),
    "unwanted and nested": (file_of(nested(50_000).replace(b"\x28\0\x10\x91", b"\x40\0\x75\x02")), "E_HEADER"),
    "sequence beyond the end": (file_of(explicit(0x00289110, b"SQ", ITEM, 800)), "E_HEADER"),
    "sequence without end": (file_of(explicit(0x00289110, b"SQ", ITEM + ROWS, UNDEFINED)), "E_HEADER"),
    "deflated cut off": (
        file_of(zlib.compress(ROWS * 99, wbits=-15)[:-4], meta=explicit(0x00020010, b"UI", b"1.2.840.10008.1.2.1.99")),
        "E_HEADER",
    ),
    "deflated damaged": (
        file_of(b"\xff" * 60, meta=explicit(0x00020010, b"UI", b"1.2.840.10008.1.2.1.99")),
        "E_HEADER",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tmp_path, name):
    data, code = BROKEN[name]
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    for call in (lambda: read_elements(path), lambda: parse(data, path)):
        with pytest.raises(ReadError) as caught:
            call()
        assert caught.value.code == code
        assert str(path) in str(caught.value)


def test_deflate_bombs_are_refused_before_they_fill_memory(tmp_path):
    meta = explicit(0x00020010, b"UI", uid.DeflatedExplicitVRLittleEndian.encode())
    data = file_of(zlib.compress(bytes(80 << 20), wbits=-15), meta=meta)
    with pytest.raises(ReadError) as caught:
        parse(data, PATH)
    assert caught.value.code == "E_BOMB"


STRANGE = {
    "unknown representation": file_of(ROWS, explicit(0x00280012, b"ZZ", b"ab")),
    "sequence by another type": file_of(explicit(0x00289110, b"LO", b"ab")),
    "item end outside": file_of(ITEM_END, ROWS),
    "big endian garbage": file_of(b"\0\1\2\3" * 9, meta=explicit(0x00020010, b"UI", b"1.2.840.10008.1.2.2\0")),
    "explicit in truth": file_of(ROWS, meta=explicit(0x00020010, b"UI", b"1.2.840.10008.1.2\0")),
    "implicit in truth": file_of(struct.pack("<HHIH", 0x0028, 0x0010, 2, 8)),
    "odd item": file_of(explicit(0x00289110, b"SQ", ROWS + ROWS)),
    "odd fragment": file_of(explicit(0x00091001, b"OB", ROWS, UNDEFINED), ROWS),
    "undefined text": file_of(explicit(0x00091001, b"UT", b"", None)[:8] + b"\xff\xff\xff\xff" + ROWS),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_files_are_left_to_pydicom_and_never_raise_anything_else(name):
    try:
        found = parse(STRANGE[name], PATH)
    except MedSSLError as error:
        assert error.code == "E_HEADER"  # noqa: PT017
    else:
        assert found.integer("Rows") in {8, None}


def test_files_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    locked = tmp_path / "locked"
    locked.write_bytes(b"a")
    for path, code in (
        (tmp_path / "none", "E_MISSING"),
        (tmp_path, "E_NOT_REGULAR"),
        (tmp_path / "pipe", "E_NOT_REGULAR"),
    ):
        with pytest.raises(ReadError) as caught:
            read_elements(path)
        assert caught.value.code == code


@pytest.mark.parametrize(("error", "code"), [(PermissionError(), "E_PERMISSION"), (OSError(5, "broken"), "E_READ")])
def test_faults_of_the_disk_are_named(monkeypatch, error, code):
    def fail(_):
        raise error

    monkeypatch.setattr(module, "_open", fail)
    with pytest.raises(ReadError) as caught:
        read_elements(PATH)
    assert caught.value.code == code


@pytest.mark.parametrize("value", ["0,5", "nan", "1e999", "1_0", "", "a\\b", "1\\2"])
def test_decimal_strings_are_numbers_or_refused(value):
    elements = Elements(PATH, {"SliceThickness": value})
    if value:
        with pytest.raises(ReadError) as caught:
            elements.number("SliceThickness")
        assert caught.value.code == "E_TAG"
        assert "SliceThickness" in str(caught.value)
        assert value not in str(caught.value).replace(str(PATH), "")
    else:
        assert elements.number("SliceThickness") is None


def test_values_of_other_types_are_no_numbers_text_or_bytes():
    elements = Elements(PATH, {"Rows": b"ab", "Columns": (1, 2), "EchoTime": "2.5", "KVP": 3.5, "Empty": ()})
    for keyword in ("Rows", "Columns", "EchoTime"):
        with pytest.raises(ReadError):
            elements.integer(keyword)
    assert elements.integer("None") is None
    assert elements.number("KVP") == 3.5
    assert elements.numbers("Empty") is None
    assert elements.numbers("Columns") == (1, 2)
    assert elements.text("Rows") == ""
    assert elements.raw("EchoTime") == b""
    assert elements.sequence("Rows") == []
    assert elements.first("Rows") is None
    assert "Empty" not in elements


def test_numbers_convert_in_both_byte_orders():
    assert convert(b"\1\2", "US", order=">") == 0x0102
    assert convert(b"\1\2\3\4", "US") == (0x0201, 0x0403)
    assert convert(b"\xff\xff", "SS") == -1
    assert convert(b"\x28\0\x10\0", "AT") == (0x00280010,)


FOREIGN = {
    "nifti": struct.pack("<i", 348).ljust(348, b"\0"),
    "png": b"\x89PNG\r\n\x1a\n".ljust(160, b"\0"),
    "nrrd": b"NRRD0004\ntype: short\n".ljust(160, b" "),
    "zip": b"PK\3\4".ljust(160, b"\0"),
    "gzip": b"\x1f\x8b\x08".ljust(160, b"\0"),
    "text": b"\x08\tindented text without an end to it" * 8,
    "zeros": bytes(160),
    "short": b"\x08\0\5\0CS",
    "long length": b"\x08\0\5\0\xff\xff\xff\x7f".ljust(160, b"\0"),
    "unordered": explicit(0x00080008, b"CS", b"AB") + explicit(0x00080005, b"CS", b"AB").ljust(160, b"\0"),
    "big endian implicit": b"\0\x08\0\x05\0\0\0\4abcd".ljust(160, b"\0"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_not_taken_for_dicom(name):
    assert not is_dicom(FOREIGN[name][:160])


def test_dicom_is_known_with_and_without_a_preamble():
    kind = explicit(0x00080008, b"CS", b"ORIGINAL")
    assert is_dicom(file_of(ROWS)[:160])
    assert is_dicom((kind + explicit(0x00080016, b"UI", b"1.2.3\0")).ljust(160, b"\0"))
    assert is_dicom(explicit(0x00080008, b"CS", b"A" * 152)[:160])
    assert is_dicom(META_GROUP + kind)
