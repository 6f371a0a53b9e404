from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.types import Example
from lorakit.data import cache as module
from lorakit.data.buckets import Bucket
from lorakit.data.cache import Cache, default_folder, fill_latents, fill_text, latent_key, refuse_within, text_key
from lorakit.data.sources import SourceSettings, scan
from tests.data.pictures import folder_of, noise

BUCKET, WIDE = Bucket(16, 16), Bucket(24, 8)


def examples_of(root: Path, count: int = 6) -> tuple[tuple[Example, ...], list[Bucket]]:
    """`count` pictures, every third one wide."""
    folder_of(root, {f"{i}.png": (48, 16) if i % 3 == 2 else (32, 32) for i in range(count)})
    found = scan([SourceSettings(path=str(root))]).examples
    return found, [WIDE if e.size == (48, 16) else BUCKET for e in found]


class Encoder:
    """Means over 4×4 blocks; `seen` counts the pictures of each call."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.float32
        self.seen.append(len(pixels))
        return torch.nn.functional.avg_pool2d(pixels, 4)


def keys_of(examples: Sequence[Example], buckets: Sequence[Bucket], fingerprint: str = "vae") -> list[str]:
    return [latent_key(e.digest, b, fingerprint=fingerprint) for e, b in zip(examples, buckets)]


def test_each_picture_is_encoded_once_and_only_once(tmp_path: Path) -> None:
    examples, buckets = examples_of(tmp_path / "photos")
    cache, encoder, steps = Cache(tmp_path / "cache"), Encoder(), []
    twice = (*examples, *examples)
    count = fill_latents(
        cache, twice, [*buckets, *buckets], encode=encoder, fingerprint="vae", on_progress=steps.append
    )
    assert count == 6
    assert encoder.seen == steps == [1] * 6
    assert fill_latents(cache, examples, buckets, encode=encoder, fingerprint="vae") == 0
    shapes = [tuple(cache.read(key)["latents"].shape) for key in keys_of(examples, buckets)]
    assert shapes == [(3, 4, 4), (3, 4, 4), (3, 2, 6)] * 2


def test_what_is_stored_is_what_the_encoder_said_of_the_cut_picture(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    noise(16, 16).save(root / "a.png")
    examples = scan([SourceSettings(path=str(root), default_caption="x")]).examples
    cache = Cache(tmp_path / "cache")
    fill_latents(cache, examples, [BUCKET], encode=lambda x: x.double(), fingerprint="vae")
    stored = cache.read(keys_of(examples, [BUCKET])[0])["latents"]
    expected = torch.frombuffer(bytearray(noise(16, 16).tobytes()), dtype=torch.uint8).reshape(16, 16, 3)
    torch.testing.assert_close(stored, expected.permute(2, 0, 1).float() / 127.5 - 1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_work_whatever_is_missing_and_whoever_is_first(tmp_path: Path, world: int) -> None:
    examples, buckets = examples_of(tmp_path / "photos")
    folder = tmp_path / "cache"
    fill_latents(Cache(folder), examples[1:3], buckets[1:3], encode=Encoder(), fingerprint="vae")
    encoders = [Encoder() for _ in range(world)]
    for rank in reversed(range(world)):  # each sees what those before it have written already
        fill_latents(Cache(folder), examples, buckets, encode=encoders[rank], fingerprint="vae", rank=rank, world=world)
    assert Cache(folder).missing(keys_of(examples, buckets)) == []
    assert sum(sum(encoder.seen) for encoder in encoders) == 4


def test_an_interrupted_filling_keeps_what_it_had_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    examples, buckets = examples_of(tmp_path / "photos")

    class Interrupted(Encoder):
        def __call__(self, pixels: Tensor) -> Tensor:
            if len(self.seen) == 4:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    whole, broken = Cache(tmp_path / "whole"), Cache(tmp_path / "broken")
    fill_latents(whole, examples, buckets, encode=Encoder(), fingerprint="vae")
    with pytest.raises(KeyboardInterrupt):
        fill_latents(broken, examples, buckets, encode=Interrupted(), fingerprint="vae")
    assert fill_latents(Cache(tmp_path / "broken"), examples, buckets, encode=Encoder(), fingerprint="vae") == 2
    for key in keys_of(examples, buckets):
        assert torch.equal(whole.read(key)["latents"], broken.read(key)["latents"])


def test_shards_are_written_as_the_filling_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_ENTRIES", 2)
    examples, buckets = examples_of(tmp_path / "photos")
    fill_latents(Cache(tmp_path / "cache"), examples, buckets, encode=Encoder(), fingerprint="vae")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_batches_hold_one_bucket(tmp_path: Path) -> None:
    examples, buckets = examples_of(tmp_path / "photos")
    encoder, cache = Encoder(), Cache(tmp_path / "cache")
    fill_latents(cache, examples, buckets, encode=encoder, fingerprint="vae", batch_size=4)
    assert encoder.seen == [2, 1, 2, 1]
    single = Cache(tmp_path / "single")
    fill_latents(single, examples, buckets, encode=Encoder(), fingerprint="vae")
    for key in keys_of(examples, buckets):
        torch.testing.assert_close(cache.read(key), single.read(key))


def test_latents_that_are_not_finite_name_the_picture(tmp_path: Path) -> None:
    examples, buckets = examples_of(tmp_path / "photos")
    calls = []

    def overflows(pixels: Tensor) -> Tensor:
        calls.append(pixels)
        return pixels / (0.0 if len(calls) == 3 else 1.0)

    cache = Cache(tmp_path / "cache")
    with pytest.raises(InputError, match=r"2\.png: its latents are not finite"):
        fill_latents(cache, examples, buckets, encode=overflows, fingerprint="vae")
    assert cache.missing(keys_of(examples, buckets)) == keys_of(examples, buckets)[2:]


def test_a_picture_changed_since_the_scan_is_refused(tmp_path: Path) -> None:
    examples, buckets = examples_of(tmp_path / "photos")
    noise(32, 32, 99).save(examples[1].path)
    with pytest.raises(InputError, match=r"1\.png: it was changed"):
        fill_latents(Cache(tmp_path / "cache"), examples, buckets, encode=Encoder(), fingerprint="vae")
    examples[1].path.unlink()
    with pytest.raises(InputError, match=r"1\.png: it cannot be read"):
        fill_latents(Cache(tmp_path / "cache"), examples, buckets, encode=Encoder(), fingerprint="vae")


def test_captions_are_encoded_once_each(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    asked: list[str] = []

    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        asked.extend(captions)
        return {"states": torch.tensor([[len(c)] for c in captions]), "mask": torch.ones(len(captions), 2).bfloat16()}

    captions = ["a dog", "a cat!", "a dog", ""]
    assert [fill_text(cache, captions, encode=encode, fingerprint="clip", rank=r, world=2) for r in (0, 1)] == [2, 1]
    assert sorted(asked) == ["", "a cat!", "a dog"]
    assert cache.read(text_key("a cat!", fingerprint="clip"))["states"].tolist() == [6]
    assert cache.read(text_key("", fingerprint="clip"))["mask"].dtype == torch.bfloat16
    assert cache.missing([text_key("a dog", fingerprint="other"), text_key("a dog ", fingerprint="clip")])


def test_a_key_changes_with_each_input() -> None:
    keys = {
        latent_key("a" * 64, BUCKET, fingerprint="vae"),
        latent_key("a" * 63 + "b", BUCKET, fingerprint="vae"),
        latent_key("a" * 64, Bucket(16, 17), fingerprint="vae"),
        latent_key("a" * 64, BUCKET, fingerprint="vaf"),
        latent_key("a" * 64, BUCKET, fingerprint="vae", flip=True),
    }
    assert len(keys) == 5


def test_a_new_version_of_the_code_makes_new_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    before = latent_key("a", BUCKET, fingerprint="vae")
    monkeypatch.setattr(module, "LATENTS_VERSION", module.LATENTS_VERSION + 1)
    assert latent_key("a", BUCKET, fingerprint="vae") != before


def test_the_cache_never_lies_among_the_pictures(tmp_path: Path) -> None:
    photos, link = tmp_path / "photos", tmp_path / "link"
    photos.mkdir()
    link.symlink_to(photos, target_is_directory=True)
    for folder in (photos, photos / "a" / "b", link / "cache", photos / ".." / "photos" / "c"):
        with pytest.raises(InputError, match=r"data\.sources\.1\.path"):
            refuse_within(folder, [tmp_path / "other", photos], key="data.cache")
    for folder in (tmp_path, tmp_path / "photos2", tmp_path / "cache"):
        refuse_within(folder, [tmp_path / "other", photos], key="data.cache")


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/lorakit/data")
