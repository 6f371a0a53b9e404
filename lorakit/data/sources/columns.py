"""Which of a table's columns hold pictures, captions and boxes."""

from collections.abc import Mapping
from typing import Any

from lorakit.core.files import printable
from lorakit.data.sources.settings import SourceSettings
from lorakit.data.sources.sidecars import BOX_KEYS, CAPTION_KEYS, Said, from_mapping


class Columns:
    """What the columns of a table with these `features` are; ValueError says what is missing, and what there is.

    `caption` is the column of the captions, None where they may be missing and there is none; `told` are all columns
    that say something about a picture.
    """

    def __init__(self, features: Mapping[str, Any], settings: SourceSettings, *, needs_caption: bool) -> None:
        there = f"its columns are {', '.join(printable(name) for name in features)}"
        image = settings.image_column
        if image not in features:
            raise ValueError(f"there is no column '{printable(image)}': set image_column ({there})")
        if not _is_picture(features[image]):
            raise ValueError(f"column '{printable(image)}' holds no pictures: set image_column ({there})")
        shown = settings.input_column
        if shown is not None and (shown not in features or not _is_picture(features[shown])):
            raise ValueError(f"there is no column of pictures '{printable(shown)}': set input_column ({there})")
        self.caption = settings.caption_column
        if self.caption is None:
            given = [name for name in CAPTION_KEYS if name in features]
            if len(given) > 1:
                raise ValueError(f"columns {' and '.join(given)} may both be captions: set caption_column ({there})")
            self.caption = given[0] if given else None
            if not given and needs_caption:
                raise ValueError(f"no column is named text, caption or prompt: set caption_column ({there})")
        elif self.caption not in features:
            raise ValueError(f"there is no column '{printable(self.caption)}': set caption_column ({there})")
        if self.caption is not None and not _is_text(features[self.caption]):
            raise ValueError(f"column '{printable(self.caption)}' holds no text: set caption_column ({there})")
        boxes = [name for name in BOX_KEYS if name in features]
        self.told = [*([self.caption] if self.caption is not None else []), *boxes]

    def said(self, values: Mapping[str, Any]) -> Said | str:
        """What a row says, or what is wrong with it."""
        try:
            # an empty key is no column's: no caption is looked for
            return from_mapping(values, caption_key=self.caption or "")
        except ValueError as error:
            return str(error)


def _is_picture(feature: Any) -> bool:
    # without the metadata of `datasets` a column of pictures is one of {bytes, path}
    if isinstance(feature, Mapping):
        return "bytes" in feature
    return type(feature).__name__ == "Image" or "binary" in str(getattr(feature, "dtype", ""))


def _is_text(feature: Any) -> bool:
    if isinstance(feature, list):
        return len(feature) == 1 and _is_text(feature[0])
    inner = getattr(feature, "feature", None)
    return _is_text(inner) if inner is not None else "string" in str(getattr(feature, "dtype", ""))
