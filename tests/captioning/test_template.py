"""Captions by template: every kind of field, and what is said of those that are not there."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from lorakit.captioning import check_settings, load_writers, validate_settings
from lorakit.captioning.pictures import Picture
from lorakit.core.errors import InputError

XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:p="http://ns.adobe.com/photoshop/1.0/" p:City="Lodz">
<dc:subject><rdf:Bag><rdf:li>dog</rdf:li><rdf:li>grass</rdf:li></rdf:Bag></dc:subject></rdf:Description>
</rdf:RDF></x:xmpmeta>"""


def iptc(*entries: tuple[int, bytes]) -> bytes:
    """A JPEG's block of IPTC fields, as Photoshop writes it."""
    data = b"".join(b"\x1c\x02" + bytes([n]) + len(text).to_bytes(2, "big") + text for n, text in entries)
    data += b"\0" * (len(data) % 2)
    return b"Photoshop 3.0\0" + b"8BIM" + (0x0404).to_bytes(2, "big") + b"\0\0" + len(data).to_bytes(4, "big") + data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "my_pets" / "red-dog_2"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x013B] = "Ann"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0wet nose"
    exif[0x9C9B] = "a title".encode("utf-16-le")
    picture = Image.new("RGB", (8, 8))
    picture.save(folder / "big_nose_012.jpg", exif=exif, xmp=XMP.encode())
    plain = (folder / "big_nose_012.jpg").read_bytes()
    block = iptc((25, b"pet"), (25, b"lawn"), (120, "a dög".encode()))
    segment = b"\xff\xed" + (len(block) + 2).to_bytes(2, "big") + block
    (folder / "big_nose_012.jpg").write_bytes(plain[:2] + segment + plain[2:])
    (tmp_path / "my_pets" / "metadata.jsonl").write_text(
        json.dumps({"file_name": "red-dog_2/big_nose_012.jpg", "title": "Rex", "words": ["a", "b"]}) + "\n"
    )
    return tmp_path / "my_pets"


def filled(root: Path, template: str, name: str = "red-dog_2/big_nose_012.jpg", **more: Any) -> Any:
    (settings,) = validate_settings({"template": template, **more})
    check_settings([settings])
    (outcome,) = load_writers([settings], root=root, device=None)([Picture(name, (root / name).read_bytes)])
    return outcome


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a photo of {folder}, {parent}", "a photo of red dog, my pets"),
        ("{name} at {path}", "big nose at red-dog_2/big_nose_012.jpg"),
        ("by {exif.Artist}: {exif.UserComment}, {exif.xptitle}", "by Ann: wet nose, a title"),
        ("{iptc.keywords}; {iptc.Caption}", "pet, lawn; a dög"),
        ("{xmp.subject} in {xmp.city}", "dog, grass in Lodz"),
        ("{column.title} {column.words}", "Rex a, b"),
        ("{exif.Model=some camera}{column.none=}", "some camera"),
        ("{red|blue} {folder}", "{red|blue} red dog"),
    ],
)
def test_a_field_stands_for_what_the_picture_says(root: Path, template: str, text: str) -> None:
    assert filled(root, template) == (text,)


def test_names_may_stay_as_they_are_and_numbers_are_names_too(root: Path) -> None:
    assert filled(root, "{folder} {name}", plain_names=False) == ("red-dog_2 big_nose_012",)
    Image.new("RGB", (8, 8)).save(root / "0001.png")
    assert filled(root, "{folder} {name} {parent}", "0001.png") == (
        f"my pets 0001 {filled(root, '{parent}', '0001.png')[0]}",
    )


def test_what_surrounds_and_replaces(root: Path) -> None:
    more = {"prefix": "qzx,", "suffix": "photo", "replace": [["red ", "brown "]]}
    assert filled(root, "a {folder}", **more) == ("qzx, a brown dog photo",)
    assert filled(root, "a {folder}", regex=True, replace=[[r"(\w+) dog", r"dog of \1"]]) == ("a dog of red",)


def test_a_field_that_is_not_there_is_the_pictures_problem(root: Path) -> None:
    assert "it has no exif.Model" in str(filled(root, "{exif.Model}"))
    (root / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    assert "damaged" in str(filled(root, "{exif.Model=x}", "broken.jpg"))
    assert filled(root, "{name}", "broken.jpg") == ("broken",), "what needs no look takes none"


def test_a_packet_that_defines_entities_is_not_read(root: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<!DOCTYPE x [<!ENTITY a "aaaa">]>' + XMP)
    Image.new("RGB", (8, 8)).save(root / "x.png", pnginfo=info)
    assert filled(root, "{xmp.city=none}", "x.png") == ("none",)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP)
    Image.new("RGB", (8, 8)).save(root / "y.png", pnginfo=info)
    assert filled(root, "{xmp.city=none}", "y.png") == ("Lodz",)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"template": "{fodler}"}, "Did you mean folder?"),
        ({"template": "{exif}"}, "{exif} names no field"),
        ({"template": "{iptc.colour}"}, "keywords"),
        ({"template": "x", "replace": [["(", "b"]], "regex": True}, "no regular expression"),
        ({"template": "x", "replace": [["a", r"\2"]], "regex": True}, "no regular expression"),
        ({"template": "x", "replace": [["", "b"]]}, "empty"),
        ({"template": "x", "temlpate": "y"}, "Did you mean template?"),
        ({"template": "x", "combine": {"kind": "templet"}}, "combine.kind = 'templet'"),
        ({}, "name a model"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_read(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_settings(validate_settings(values))
    assert said in str(caught.value)
