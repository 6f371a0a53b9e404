"""What each way of holding on to the base costs and gives: the demo's subject, taught with each, scored by the judge.

    python scripts/preservation.py --out build/preservation     # all that is not done yet, then the table of the page
    python scripts/preservation.py --out build/preservation --only blank_prompt masked_prior

Each run is the demo's recipe (data/mascot) with as many pictures of the subject in a step; they differ in what is kept.
What is done stays done: a run that was ended goes on. The table goes into docs/preservation.md.
"""

import argparse
import json
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from lorakit import families
from lorakit.adapters import load_adapter_state
from lorakit.adapters.state import adapters_disabled
from lorakit.core.embedded import embedded
from lorakit.core.files import make_folder, write_json, write_text, written_aside
from lorakit.core.seeding import generator
from lorakit.evaluation.judge import load_judge, pixels_of
from lorakit.export.files import read_adapter
from lorakit.recipe import Recipe, anchor_paths, build
from lorakit.sampling.pictures import Request, draw
from lorakit.verbs import demo
from lorakit.verbs.class_pictures import draw_missing
from lorakit.verbs.train import resume, train

PAGE = Path(__file__).parent.parent / "docs" / "preservation.md"
BEGIN, END = "<!-- the table: scripts/preservation.py -->", "<!-- end of the table -->"
SUBJECTS = 8  # pictures of the subject in a step; the demo's batch of sixteen holds as many
TIMES = (100, 300, 500, 700, 900)
CLASS = {"zorp": "circle"}  # the shape of the base's world that is most like it


@dataclass(frozen=True)
class Way:
    """One way of keeping the base: what the table calls it, the preservation setting, class pictures or not."""

    label: str
    preservation: dict[str, Any]
    pictures: bool = False


WAYS = {
    "nothing": Way("nothing", {"kind": "none"}),
    "class_pictures": Way("class pictures", {"kind": "none"}, pictures=True),
    "differential_output": Way("differential output", {"kind": "differential_output"}),
    "blank_prompt": Way("blank prompt", {"kind": "blank_prompt"}),
    "masked_prior": Way("masked prior", {"kind": "masked_prior"}),
    "both": Way("class pictures and differential output", {"kind": "differential_output"}, pictures=True),
}


def recipe(name: str, out: Path, *, steps: int) -> Recipe:
    """The demo's recipe, kept as the way `name` says."""
    way, mascot = WAYS[name], embedded("mascot")
    values = tomllib.loads((mascot / "recipe.toml").read_text())
    anchor_paths(values, mascot)
    subject, kept = values["data"]["sources"]
    values["objective"]["preservation"] = way.preservation
    if way.preservation["kind"] == "differential_output":
        subject["class_words"] = CLASS
    if way.preservation["kind"] == "masked_prior":
        subject["mask_path"] = str(write_masks(out / "masks"))
    kept["path"] = str(out / "class-pictures")
    kept["generate"] = demo.generated(demo.read_prompts()["regularization"]).model_dump(mode="json")
    values["data"] |= {"sources": [subject, kept] if way.pictures else [subject], "cache": str(out / "cache")}
    values["run"] |= {"output": str(out / name), "steps": steps, "batch_size": SUBJECTS * (1 + way.pictures)}
    return build(values)


def write_masks(folder: Path) -> Path:
    """Masks of the subject: what is not of the corner's colour, and a little around it."""
    for file in sorted(embedded("mascot").glob("*.png")):
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.int16)
        away = np.abs(pixels - pixels[0, 0]).max(2) > 24
        mask = Image.fromarray((away * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(9))
        with written_aside(folder / file.name) as aside:
            mask.save(aside, format="PNG")
    return folder


def trained(asked: Recipe) -> tuple[Path, float]:
    """The adapter of a finished run, and the CPU seconds that this call took for it."""
    run, began = Path(asked.run.output), time.process_time()
    done = run / "exit.json"
    if (run / "recipe.toml").exists() and not (done.exists() and json.loads(done.read_text())["code"] == 0):
        adapter = resume(run).adapter
    else:
        adapter = train(asked).adapter
    return adapter, time.process_time() - began


def drift(adapter: Path | None, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[float, float]:
    """Mean squared difference of predictions with the adapter and without: at the prompts, and at no words.

    Of pictures that the base drew for them, at fixed noises and TIMES in turn.
    """
    if adapter is None:
        return 0.0, 0.0
    model = families.load(families.DEFAULT, "embedded")
    state = read_adapter(adapter, family=model)
    adapted = {name: model.components[name] for name in state.components()}
    load_adapter_state(adapted, state)
    found: list[list[float]] = []
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x0 = model.encode_images(pixels_of(picture) * 2 - 1)
        noise = torch.randn(x0.shape, generator=generator("drift", number))
        t = torch.tensor([TIMES[number % len(TIMES)]])
        x_t = model.process.q_sample(x0, t, noise)
        moved = []
        for text in (prompt, ""):
            with torch.no_grad():
                learned = model.predict(x_t, t, model.encode_text([text]))
                with adapters_disabled(adapted):
                    base = model.predict(x_t, t, model.encode_text([text]))
            moved.append((learned - base).square().mean().item())
        found.append(moved)
    at_prompts, at_none = np.mean(found, axis=0).tolist()
    return at_prompts, at_none


def old_pictures(folder: Path, wanted: Sequence[Request]) -> list[Image.Image]:
    """What the base draws for the old prompts, drawn once."""
    files = [folder / f"{i:02d}.png" for i in range(len(wanted))]
    if not all(file.exists() for file in files):
        base = families.load(families.DEFAULT, "embedded").stock_pipeline()
        for file, picture in zip(files, draw(base, wanted, steps=demo.STEPS, guidance=demo.GUIDANCE), strict=True):
            with written_aside(file) as aside:
                picture.save(aside, format="PNG")
    return [Image.open(file) for file in files]


def scored(adapter: Path | None, out: Path) -> dict[str, float]:
    """The demo's scores of a stock pipeline with `adapter`, and the drift."""
    prompts = demo.read_prompts()
    wanted = demo.requests(prompts["subject"], first_seed=1000), demo.requests(prompts["old"], first_seed=2000)
    pipeline = families.load(families.DEFAULT, "embedded").stock_pipeline()
    drawn = [[], old_pictures(out / "base", wanted[1])]
    if adapter is not None:
        pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
        drawn[1] = draw(pipeline, wanted[1], steps=demo.STEPS, guidance=demo.GUIDANCE)
    drawn[0] = draw(pipeline, wanted[0], steps=demo.STEPS, guidance=demo.GUIDANCE)
    scores = demo.scores(load_judge(), prompts, drawn)
    of_base = old_pictures(out / "base", wanted[1])
    at_prompts, at_none = drift(adapter, of_base, [request.prompt for request in wanted[1]])
    return {**scores.__dict__, "drift": at_prompts, "drift_blank": at_none}


def measure(name: str, out: Path, *, steps: int) -> None:
    """Trains the way `name`, unless it is done, and writes NAME.json."""
    asked, drawing = recipe(name, out, steps=steps), out / "class-pictures.json"
    began = time.process_time()
    if draw_missing(asked) and not drawing.exists():
        write_json(drawing, {"seconds": time.process_time() - began})
    adapter, seconds = trained(asked)
    write_json(out / f"{name}.json", {"steps": steps, "seconds": seconds, **scored(adapter, out)})


def table(out: Path) -> str:
    """A row for each way that is done, in Markdown."""
    lines = [
        "| what is kept by | subject | backgrounds | old prompts | traces | drift | drift, no words | CPU s a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, label in (("base", "(the base, untrained)"), *((name, way.label) for name, way in WAYS.items())):
        if not (out / f"{name}.json").exists():
            continue
        found = json.loads((out / f"{name}.json").read_text())
        shares = " | ".join(f"{found[key]:.0%}" for key in ("subject", "backgrounds", "old", "traces"))
        moved = " | ".join(f"{1000 * found[key]:.1f}" for key in ("drift", "drift_blank"))
        seconds = f"{found['seconds']:.0f}" if found["seconds"] else ""
        lines.append(f"| {label} | {shares} | {moved} | {seconds} |")
    drawing = out / "class-pictures.json"
    if drawing.exists():
        seconds = json.loads(drawing.read_text())["seconds"]
        lines += ["", f"Drawing the class pictures took {seconds:.0f} CPU s, once; runs share them."]
    return "\n".join(lines)


def into_page(page: str, text: str) -> str:
    """`page` with `text` between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE.name} has no place for the table"
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    out = make_folder(args.out.resolve())
    if not (out / "base.json").exists():
        write_json(out / "base.json", {"seconds": 0.0, **scored(None, out)})
    for name in args.only:
        if not (out / f"{name}.json").exists():
            measure(name, out, steps=args.steps)
            print(name, (out / f"{name}.json").read_text(), flush=True)
    text = table(out)
    print(text)
    if PAGE.exists():
        write_text(PAGE, into_page(PAGE.read_text(encoding="utf-8"), text))


if __name__ == "__main__":
    main()
