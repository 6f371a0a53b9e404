"""What a picture's file says of it beside the pixels: EXIF, IPTC and XMP fields, by name."""

import contextlib
import functools
import io
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from PIL import ExifTags, Image, ImageFile, IptcImagePlugin

from lorakit.data.images import formats

IPTC = {
    "title": (2, 5),
    "keywords": (2, 25),
    "byline": (2, 80),
    "city": (2, 90),
    "country": (2, 101),
    "headline": (2, 105),
    "credit": (2, 110),
    "caption": (2, 120),
}
_NAMESPACE = re.compile(r"\{[^}]*\}")  # as ElementTree writes it before a name


class Facts:
    """The fields in a file's bytes; nothing is read before it is asked for. ValueError where it is no picture."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def exif(self, name: str) -> str:
        """A tag by its name as in the standard, "Artist"; "" where it is not there."""
        return self._exif.get(name.lower(), "")

    def iptc(self, name: str) -> str:
        """One of the fields IPTC; "" where it is not there."""
        value = (IptcImagePlugin.getiptcinfo(self._image) or {}).get(IPTC[name.lower()], b"")
        return ", ".join(_text(part) for part in (value if isinstance(value, list) else [value]))

    def xmp(self, name: str) -> str:
        """A property by its name without the namespace, "subject"; lists with commas between."""
        return self._xmp.get(name.lower(), "")

    @functools.cached_property
    def _image(self) -> ImageFile.ImageFile:
        try:
            return Image.open(io.BytesIO(self._data), formats=tuple(formats()))
        except Exception:  # whatever a damaged header leads to
            raise ValueError("it is damaged or no picture of a known format: save or copy it again") from None

    @functools.cached_property
    def _exif(self) -> dict[str, str]:
        found: dict[str, str] = {}
        with contextlib.suppress(SyntaxError, OSError, KeyError, TypeError):  # broken EXIF says nothing
            exif = self._image.getexif()
            for tags in (exif, exif.get_ifd(ExifTags.IFD.Exif)):
                for number, value in tags.items():
                    found[ExifTags.TAGS.get(number, str(number)).lower()] = _exif_text(number, value)
        return found

    @functools.cached_property
    def _xmp(self) -> dict[str, str]:
        info = self._image.info
        packet = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
        packet = packet.encode() if isinstance(packet, str) else packet
        if b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:  # no packet has them, and entities can be made to explode
            return {}
        with contextlib.suppress(ElementTree.ParseError, ValueError):
            return dict(_properties(ElementTree.fromstring(packet.strip(b"\0 \r\n"))))
        return {}


def _properties(root: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for description in root.iter():
        if _local(description.tag) != "description" or "rdf-syntax" not in description.tag:
            continue
        yield from ((_local(name), value.strip()) for name, value in description.attrib.items())
        for entry in description:
            items = [(item.text or "").strip() for item in entry.iter() if _local(item.tag) == "li"]
            yield _local(entry.tag), ", ".join(filter(None, items)) or (entry.text or "").strip()


def _local(tag: str) -> str:
    return _NAMESPACE.sub("", tag).lower()


def _exif_text(number: int, value: Any) -> str:
    if ExifTags.TAGS.get(number, "").startswith("XP"):  # Windows' own, in UTF-16
        return bytes(value).decode("utf-16-le", "replace").strip("\0 ")
    if number == ExifTags.Base.UserComment and isinstance(value, bytes):  # eight bytes name the encoding
        encoding = "utf-16" if value[:7] == b"UNICODE" else "utf-8"
        return value[8:].decode(encoding, "replace").strip("\0 ")
    return _text(value)


def _text(value: Any) -> str:
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip("\0 ")
