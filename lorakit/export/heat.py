"""A picture of what an adapter changes: for each component, blocks by places in them, the darker the more."""

from PIL import Image, ImageDraw, ImageFont

from lorakit.core.files import printable
from lorakit.export.survey import LayerSurvey, Survey

_CELL, _GAP, _MARGIN, _TEXT, _SMALL = (62, 30), 3, 32, 15, 12
_GROUND, _INK, _QUIET, _NONE, _DEAD = (255, 255, 255), (30, 34, 42), (110, 118, 130), (240, 241, 244), (214, 60, 60)
# dark for much: yellow, green, blue, violet, each read apart from the next also without colour
_SCALE = ((253, 231, 160), (134, 204, 120), (44, 140, 140), (52, 80, 140), (58, 18, 86))


def heat_map(found: Survey, *, title: str) -> Image.Image:
    """Rows are blocks, columns places; a cell is the norm of what is added to its weights, red where it is nothing."""
    tables = [(name, _table(found, name)) for name in found.components]
    columns = [list(dict.fromkeys(place for row in table.values() for place in row)) for _, table in tables]
    label = max((_width(block) for _, table in tables for block in table), default=0) + 16
    heads = [max((_width(place) for place in places), default=0) + 14 for places in columns]
    step, line = _CELL[0] + _GAP, _CELL[1] + _GAP
    width = max([2 * _MARGIN + label + step * len(places) for places in columns] + [720])
    height = 2 * _MARGIN + 28 + sum(head + line * len(t) + 64 for head, (_, t) in zip(heads, tables, strict=True))
    picture = Image.new("RGB", (width, height), _GROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), printable(title), _INK, _font(20))
    legend = "Frobenius norm of what the adapter adds to the weights; each part is coloured by its own largest"
    draw.text((_MARGIN, _MARGIN + 28), legend + ("; red: nothing" if found.dead else ""), _QUIET, _font(_TEXT))
    top = _MARGIN + 64
    for (name, table), places, head in zip(tables, columns, heads, strict=True):
        largest = max((norm for row in table.values() for norm in row.values()), default=0.0)
        whole = found.components[name]
        draw.text((_MARGIN, top), f"{printable(name) or 'one component'}: {whole.norm:.3g} in all", _INK, _font(17))
        top += 28 + head
        for i, place in enumerate(places):
            _upright(picture, printable(place), (_MARGIN + label + step * i + _CELL[0] // 2, top - 6))
        for block, row in table.items():
            draw.text((_MARGIN + label - 10, top + _CELL[1] // 2), block or "outside", _INK, _font(_TEXT), anchor="rm")
            for i, place in enumerate(places):
                _cell(draw, (_MARGIN + label + step * i, top), row.get(place), largest)
            top += line
        top += 36
    return picture


def _table(found: Survey, component: str) -> dict[str, dict[str, float]]:
    """Norms by block and place, blocks in their order."""
    table: dict[str, dict[str, float]] = {block: {} for block in found.components[component].blocks}
    layers: list[LayerSurvey] = [layer for layer in found.layers if layer.component == component]
    for layer in sorted(layers, key=lambda layer: layer.place):
        row = table[layer.block]
        row[layer.place] = (row.get(layer.place, 0.0) ** 2 + (layer.norm or 0.0) ** 2) ** 0.5
    return table


def _cell(draw: ImageDraw.ImageDraw, at: tuple[int, int], norm: float | None, largest: float) -> None:
    box = (*at, at[0] + _CELL[0] - 1, at[1] + _CELL[1] - 1)
    if norm is None:
        draw.rectangle(box, _NONE)
        return
    share = norm / largest if largest else 0.0
    colour = _colour(share) if norm else _DEAD
    draw.rectangle(box, colour)
    dark = sum(c * w for c, w in zip(colour, (0.299, 0.587, 0.114), strict=True)) < 140
    middle = (at[0] + _CELL[0] // 2, at[1] + _CELL[1] // 2)
    draw.text(middle, f"{norm:.2g}", _GROUND if dark else _INK, _font(_SMALL), anchor="mm")


def _colour(share: float) -> tuple[int, int, int]:
    at = share * (len(_SCALE) - 1)
    low = min(int(at), len(_SCALE) - 2)
    red, green, blue = (round(a + (b - a) * (at - low)) for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True))
    return red, green, blue


def _upright(picture: Image.Image, text: str, foot: tuple[int, int]) -> None:
    """`text` from below upwards, its foot's middle at `foot`."""
    strip = Image.new("RGB", (_width(text) + 4, 20), _GROUND)
    ImageDraw.Draw(strip).text((0, 10), text, _QUIET, _font(_TEXT), anchor="lm")
    turned = strip.rotate(90, expand=True)
    picture.paste(turned, (foot[0] - turned.width // 2, foot[1] - turned.height))


def _width(text: str) -> int:
    return round(_font(_TEXT).getlength(printable(text)))


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
