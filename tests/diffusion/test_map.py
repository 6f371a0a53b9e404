"""The package's page names functions, papers and modules: each function is there, in a file that cites a paper."""

import importlib
import re

import lorakit.diffusion as diffusion


def named() -> list[str]:
    return re.findall(r"`([\w.]+)`", diffusion.__doc__ or "")


def test_every_function_of_the_map_is_there():
    dotted = {name for name in named() if "." in name}
    assert len(dotted) > 20
    for name in dotted:
        if name.startswith("lorakit."):
            importlib.import_module(name)
            continue
        first, *rest = name.split(".")
        found = importlib.import_module(f"lorakit.diffusion.{first}") if first.islower() else getattr(diffusion, first)
        for part in rest:
            found = getattr(found, part)
        assert callable(found) or isinstance(found, dict), name


def test_the_map_shows_both_processes_whole():
    """What a process can do is on the map, but for helpers of one line and what reads configurations."""
    beside = {"from_scheduler_config", "predict_noise", "predict_v", "shift_at", "at"}
    for process in (diffusion.GaussianDiffusion, diffusion.RectifiedFlow):
        public = {n for n, value in vars(process).items() if not n.startswith("_") and n != "prediction_type"}
        shown = {n.partition(".")[2] for n in named() if n.startswith(process.__name__ + ".")}
        assert public - beside == shown


def test_the_concepts_each_with_its_paper():
    page = diffusion.__doc__ or ""
    parts = re.split(r"\n\*\*(?=[A-Z])", page)[1:]
    heads = [part.partition("**")[0] for part in parts]
    assert heads == ["Latent space", "Forward process", "What is learned", "Backbone", "Reverse process", "Guidance"]
    for part in parts:
        assert re.search(r"eq\.|section|algorithm|arXiv", part), part
