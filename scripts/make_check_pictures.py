"""Makes docs/images/contact-sheet.png and check-page.png: what `lorakit check --out` shows of some photographs.

The photographs are cut to several shapes first, and a mask, a copy, a long caption and a caption of nothing are added,
so that there is something to see. The page's picture needs Chromium; without it only the sheet is made.

    python scripts/make_check_pictures.py ../shared/photos          about 20 seconds
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageOps

from lorakit.core.files import write_text, written_aside
from lorakit.recipe import load_recipe
from lorakit.verbs.check import check

SHAPES = ((1.0, 1.0), (1.0, 0.6), (0.6, 1.0))
"""Width and height that are kept of a photograph, as fractions; one after the other."""

DETAILS = ("on a stone wall", "in the grass, soft light", "seen from the side", "against a plain background")
WIDTH, PAGE = 1200, (1400, 2230)

RECIPE = """
[model]
path = "embedded"
[[data.sources]]
path = "toys"
crop = "focus"
repeats = 4
trigger = "sks"
[[data.sources]]
path = "things"
role = "regularization"
[data]
cache = "cache"
validation = 0.1
[data.buckets]
resolution = 512
max_aspect = 1.5
max_crop = 0.2
[run]
output = "run"
steps = 600
batch_size = 4
"""


def arrange(photos: Path, folder: Path) -> None:
    """Two folders of pictures made of `photos`, a folder of folders: of the subject, and of other things."""
    for n, path in enumerate(sorted(photos.glob("*/*.jpg"))):
        subject = path.parent.name
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        width, height = (round(side * part) for side, part in zip(image.size, SHAPES[n % len(SHAPES)]))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        target = folder / ("toys" if subject in ("rc_car", "dog") else "things") / f"{subject}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + width, top + height)).save(target, quality=92)
        text = f"a photo of a {subject.replace('_', ' ')}, {DETAILS[n % len(DETAILS)]}"
        write_text(target.with_suffix(".txt"), text)
    toys = sorted((folder / "toys").glob("*.jpg"))
    for path in toys[::2]:
        with Image.open(path) as image:
            width, height = image.size
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).ellipse((width * 0.1, height * 0.04, width * 0.9, height * 1.1), fill=255)
        mask.filter(ImageFilter.GaussianBlur(width / 40)).save(path.with_suffix(".mask.png"))
    write_text(toys[1].with_suffix(".txt"), "a photo of a dog, " + ", ".join(f"detail number {i}" for i in range(40)))
    shutil.copy(toys[2], folder / "toys" / "copy.jpg")
    write_text(folder / "toys" / "copy.txt", "a photo of a dog")
    write_text(folder / "toys" / "forgotten.txt", "a caption of nothing")


def screenshot(page: Path, target: Path, *, dark: bool = False) -> bool:
    """A picture of `page` as Chromium shows it; whether there is one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        return False
    look = ["--blink-settings=preferredColorScheme=0"] if dark else []
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *look]
        command += [f"--window-size={PAGE[0]},{PAGE[1]}", f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        save(Image.open(shot), target, width=WIDTH)
    return True


def save(image: Image.Image, target: Path, *, width: int) -> None:
    """`image` made `width` pixels wide."""
    size = width, round(image.height * width / image.width)
    with written_aside(target) as aside:
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(aside, "PNG", optimize=True)


def make(photos: Path, out: Path, *, originals: int = 12) -> list[Path]:
    """Both pictures, in `out`; those that could be made."""
    made = [out / "contact-sheet.png"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrange(photos, folder)
        write_text(folder / "toys.toml", RECIPE)
        recipe = load_recipe(folder / "toys.toml")
        found = check(recipe, out=folder / "out", originals=originals, title="toys.toml")
        assert not found.report.errors, found.report.errors
        save(Image.open(folder / "out" / "contact-sheet.png"), made[0], width=WIDTH)
        check(recipe, out=folder / "out", originals=6, title="toys.toml")
        if screenshot(folder / "out" / "check.html", out / "check-page.png"):
            made.append(out / "check-page.png")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of folders of photographs")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the pictures")
    args = parser.parse_args()
    made = make(args.photos, args.out)
    for path in made:
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    if len(made) < 2:
        print("There is no Chromium here: the page's picture was not made.")


if __name__ == "__main__":
    main()
