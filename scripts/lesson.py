"""Makes the pictures and the numbers of docs/latent-diffusion.md: latent diffusion from pixels to adapter, as code.

    make demo                                                          # trains the adapter
    python scripts/lesson.py --adapter demo/run/adapter.safetensors    # some minutes on one core

Each function of `SECTIONS` is a section of the page, in its order, and shows lorakit's own functions at work on the
embedded base: `lesson_diffusion.py` up to the pictures, `lesson_training.py` what training chooses, `lesson_adapter.py`
the adapter. `lesson_base.py` is what they share, `figures.py` draws. The numbers lie beside the pictures in
numbers.json, and go into the page where it marks them.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lesson_adapter
import lesson_diffusion
import lesson_training
import torch
from lesson_base import QUICK, Effort, Model, Section
from PIL import Image

from lorakit.core.files import make_folder, write_json, write_text, written_aside
from lorakit.core.quiet import quiet_libraries

PAGE = Path(__file__).parent.parent / "docs" / "latent-diffusion.md"
PICTURES = PAGE.parent / "images" / "latent-diffusion"
MARKED = re.compile(r"([^ \n|(]+)<!--(\w+)-->")  # a number and its name, which no reader sees
SECTIONS: tuple[Callable[[Model], Section], ...] = (
    *lesson_diffusion.SECTIONS,
    *lesson_training.SECTIONS,
    *lesson_adapter.SECTIONS,
)


def into_page(page: str, numbers: Mapping[str, str]) -> str:
    """`page` with each number that is marked, `12<!--name-->`, as it is in `numbers`. KeyError for an unknown name."""
    return MARKED.sub(lambda found: f"{numbers[found[2]]}<!--{found[2]}-->", page)


def save(section: Section, out: Path) -> None:
    for name, picture in section.pictures.items():
        with written_aside(out / f"{name}.png") as aside:  # 256 colours are enough, in half the bytes
            picture.quantize(256, dither=Image.Dither.NONE).save(aside, format="PNG", optimize=True)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="the demo's adapter")
    parser.add_argument("--out", type=Path, help="where all goes; left out: the page's pictures and the page")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it works")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these functions; the other numbers stay")
    args = parser.parse_args(arguments)
    quiet_libraries()
    torch.set_num_threads(1)  # another number of them rounds otherwise
    out = make_folder(args.out or PICTURES)
    kept = out / "numbers.json"
    numbers: dict[str, str] = json.loads(kept.read_text()) if args.only and kept.exists() else {}
    model = Model(QUICK if args.quick else Effort(), args.adapter)
    for make in SECTIONS:
        if args.only is None or make.__name__ in args.only:
            print(make.__name__, flush=True)
            section = make(model)
            save(section, out)
            numbers |= section.numbers
    write_json(kept, numbers)
    if args.out is None:
        write_text(PAGE, into_page(PAGE.read_text(encoding="utf-8"), numbers))


if __name__ == "__main__":
    main()
