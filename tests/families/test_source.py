"""Where a model's parts come from: single files, other VAEs, variants and versions are read as they are said to be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.families import flux, sd, sd3, source, zimage
from tests.families.single import single_file


def same(own: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))


def without_weights(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, Path]:
    """A single file of Stable Diffusion, and a folder of its configurations alone."""
    save_file(single_file("sd"), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", without_weights(sd.tiny().path, tmp_path)


def test_a_single_file_holds_all_weights(whole: tuple[Path, Path]) -> None:
    file, config = whole
    family = families.load("sd", str(file), config=str(config))
    pipeline = family.stock_pipeline()
    for name, module in sd.tiny().components.items():
        assert same(family.components[name], module), name
        assert same(getattr(pipeline, name), module), name
    assert families.describe("sd", str(file), config=str(config)).resolution == 32
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(family.encode_images(pixels), sd.tiny().encode_images(pixels))


def test_what_a_single_file_lacks_is_read_from_the_folder(whole: tuple[Path, Path]) -> None:
    file, _ = whole
    own = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("cond_stage_model.")}
    save_file({name: tensor * 1.5 for name, tensor in own.items()}, file)
    family = families.load("sd", str(file), config=str(sd.tiny().path))
    assert same(family.components["text_encoder"], sd.tiny().text_encoder)
    assert not same(family.components["unet"], sd.tiny().unet) and not same(family.components["vae"], sd.tiny().vae)


def test_a_single_file_may_be_the_backbone_alone(tmp_path: Path) -> None:
    tiny = flux.tiny()
    weights = {name: tensor / 2 for name, tensor in tiny.transformer.state_dict().items()}
    save_file(weights, tmp_path / "half.safetensors")
    family = families.load("flux", str(tmp_path / "half.safetensors"), config=str(tiny.path), dtype="bf16")
    pipeline = family.stock_pipeline()
    for name, tensor in weights.items():
        assert torch.equal(family.components["transformer"].state_dict()[name], tensor.bfloat16())
        assert torch.equal(pipeline.transformer.state_dict()[name], tensor)
    assert same(pipeline.text_encoder_2, tiny.text_encoder_2)
    assert family.fingerprint("transformer") != tiny.fingerprint("transformer")


def test_a_single_file_that_lacks_weights_of_the_backbone_is_refused(tmp_path: Path) -> None:
    weights = dict(list(flux.tiny().transformer.state_dict().items())[3:])
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"part\.safetensors"):
        families.load("flux", str(tmp_path / "part.safetensors"), config=str(flux.tiny().path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "model.safetensors"}, r"one file: give a diffusers folder of such a model as model\.config"),
        ({"path": "config", "config": "config"}, r"model\.config goes with a model\.path that is one"),
        ({"path": "config", "revision": "main"}, r"model\.revision chooses among versions on the hub"),
        ({"path": "config", "variant": "fp16"}, r"model\.variant = fp16: .* has no weights called \*\.fp16\.safe"),
        ({"path": "model.ckpt"}, r"model\.path = .*: a pickle can run any code"),
        ({"path": "model.safetensors", "config": "none"}, r"model\.config = none does not exist"),
        ({"path": "config", "vae": "none"}, r"model\.vae = none does not exist"),
        ({"path": "config", "vae": "other"}, r"model\.vae = .*other.vae is of another make .*latent_channels"),
        ({"path": "nothing.safetensors", "config": "config"}, r"no safetensors file"),
    ],
)
def test_what_does_not_go_together_is_told(
    whole: tuple[Path, Path], settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, config = whole
    monkeypatch.chdir(file.parent)
    shutil.copytree(sd.tiny().path, config, dirs_exist_ok=True)
    shutil.copytree(zimage.tiny().path / "vae", "other/vae")
    Path("model.ckpt").touch()
    Path("nothing.safetensors").write_text("no weights")
    with pytest.raises(InputError, match=message):
        families.load("sd", **settings)


def test_another_vae_takes_the_models_place(tmp_path: Path) -> None:
    tiny = sd.tiny()
    folder = Path(shutil.copytree(tiny.path / "vae", tmp_path / "vae"))
    weights = next(folder.glob("*.safetensors"))
    save_file({name: tensor * 1.1 for name, tensor in load_file(weights).items()}, weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.3}))
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    for given in (folder, tmp_path):  # the VAE's own folder, and a model's
        family = families.load("sd", str(tiny.path), vae=str(given))
        with torch.no_grad():
            wanted = family.vae.encode(pixels).latent_dist.mean * 0.3  # type: ignore[attr-defined]
        assert torch.equal(family.encode_images(pixels), wanted)
        assert not torch.equal(wanted, tiny.encode_images(pixels))
        assert same(family.stock_pipeline().vae, family.components["vae"])
        assert family.fingerprint("vae") != tiny.fingerprint("vae")
    family = families.load("sd", str(tiny.path), vae=str(weights))  # one file, with the model's own configuration
    torch.testing.assert_close(family.encode_images(pixels), wanted / 0.3 * tiny.vae.config.scaling_factor)


def test_a_variant_is_read_where_a_part_has_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd.tiny().path, tmp_path / "model"))
    weights = next((folder / "unet").glob("*.safetensors"))
    half = {name: tensor / 2 for name, tensor in load_file(weights).items()}
    save_file(half, weights.with_suffix(".ema.safetensors"))
    family = families.load("sd", str(folder), variant="ema")
    assert torch.equal(family.components["unet"].conv_in.weight, half["conv_in.weight"])
    assert torch.equal(family.stock_pipeline().unet.conv_in.weight, half["conv_in.weight"])
    assert same(family.components["text_encoder"], sd.tiny().text_encoder)


def test_weights_are_read_and_kept_in_the_precision_that_is_said() -> None:
    path = str(sd3.tiny().path)
    family = families.load_settings(families.validate_settings({"family": "sd3", "path": path}), precision="bf16")
    assert family.dtype == torch.bfloat16
    kept = families.load("sd3", path, dtype="fp16")
    assert kept.dtype == torch.float16
    kept.to("cpu", torch.float32)
    for own, dtype in ((family, torch.bfloat16), (kept, torch.float16)):
        assert own.components["transformer"].dtype == dtype
        assert own.components["vae"].dtype == torch.float32
        t = own.process.at(torch.tensor([0.5]))
        shape = own.latent_shape(64, 64)
        assert own.predict(torch.zeros(1, *shape), t, own.encode_text(["a"])).isfinite().all()
    assert family.stock_pipeline().transformer.dtype == torch.float32


@pytest.mark.parametrize("name", families.FAMILIES.names())
def test_large_pictures_go_through_the_vae_in_tiles(name: str) -> None:
    module: Any = families.FAMILIES.module(name)
    tiny = module.tiny()
    side = 64 if tiny.factor < 16 else 128
    family = module.load(module.Settings(path=str(tiny.path), vae_tiling=side))
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.rand(1, 3, s, s, generator=generator) * 2 - 1 for s in (side, side * 2))
    assert torch.equal(family.encode_images(small), tiny.encode_images(small))
    tiled, whole = family.encode_images(large), tiny.encode_images(large)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.5 * whole.std()
    assert family.fingerprint("vae") != tiny.fingerprint("vae")


def test_a_version_on_the_hub_is_asked_for_and_its_commit_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(sd.tiny().path, folder)

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    settings = sd.Settings(path="a/b")
    found = families.pinned(settings)
    assert isinstance(found, source.Settings) and found.revision == "0" * 40
    families.load_settings(found)
    assert asked == [None, "0" * 40]
    assert families.pinned(found) is found
    here = sd.Settings(path=str(folder))
    assert families.pinned(here) is here
