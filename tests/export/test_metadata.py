"""lorakit/export/metadata.py: what a file says of itself, what of it goes with it, and what does not."""

import base64
import io

import pytest
from PIL import Image

from lorakit.core.errors import InputError
from lorakit.export.metadata import AboutSettings, adapter_metadata, carried, thumbnail
from tests.export import fuzz


def test_what_is_said_stands_where_programs_look() -> None:
    about = AboutSettings(title="Zorp", author="A. N.", license="CC0-1.0", trigger="a zorp")
    assert about.entries() == {
        "modelspec.title": "Zorp",
        "modelspec.author": "A. N.",
        "modelspec.license": "CC0-1.0",
        "modelspec.trigger_phrase": "a zorp",
        "ss_output_name": "Zorp",
    }
    assert AboutSettings().entries() == {}


def test_what_holds_for_the_adapter_goes_with_it_and_what_holds_for_the_file_does_not() -> None:
    family = fuzz.model()
    family.metadata = lambda: {"ss_base_model_version": "ours"}
    theirs = {
        "format": "pt",
        "lora_adapter_metadata": "{}",
        "lorakit.adapter": "{}",
        "lorakit.digest": "0",
        "unet/adapter_config.json": "{}",
        "unet/lorakit.digest": "0",
        "sshs_model_hash": "0",
        "modelspec.hash_sha256": "0x0",
        "ss_network_dim": "4",
        "ss_base_model_version": "theirs",
        "modelspec.title": "zebra",
        "ss_output_name": "Not the file's name",
        "ss_tag_frequency": '{"1": {"a/b": 1}}',
        "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQSkZJRg/ABC/=",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "ss_sd_model_name": "/home/alice/models/x.safetensors",
        "ss_dataset_dirs": r'{"C:\\Users\\alice": 1}',
        "ss_reg_dataset_dirs": '{"a": "~/photos/of/bob"}',
    }
    kept = carried(theirs, family, name="zebra")
    assert list(kept) == [
        "ss_output_name", "ss_tag_frequency", "modelspec.thumbnail", "modelspec.implementation",
    ]  # fmt: skip


def test_ranks_and_alphas_that_differ_are_dynamic() -> None:
    found = adapter_metadata(fuzz.adapter(), fuzz.model(), name="x")
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["modelspec.title"]) == ("2", "Dynamic", "x")


def test_a_thumbnail_is_a_small_picture_without_what_a_camera_wrote(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken by alice"
    Image.new("RGBA", (900, 600), "red").convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    text = thumbnail(tmp_path / "a.jpg")["modelspec.thumbnail"]
    start, _, data = text.partition(",")
    assert start == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as small:
        assert small.size == (256, 171) and not small.getexif()
    (tmp_path / "b.png").write_bytes(b"no picture")
    for name in ("b.png", "c.png"):
        with pytest.raises(InputError, match="no picture that can be read"):
            thumbnail(tmp_path / name)
