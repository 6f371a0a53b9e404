"""What a cache holds is known by all that made it, whether an adapter may go into it or not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit import families
from lorakit.data.cache import Filled
from lorakit.data.shards import Cache
from lorakit.training.caching import fill_cache

NAMES = families.FAMILIES.names()
CAPTIONS: Any = SimpleNamespace(
    settings=SimpleNamespace(weighted_tags=False), cached_latents=False, all_captions=lambda: ["a"]
)


@pytest.mark.parametrize("name", NAMES)
def test_text_goes_by_every_encoder_and_by_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changed = families.FAMILIES.module(name).tiny(), ""
    fingerprint = type(family).fingerprint
    monkeypatch.setattr(
        type(family), "fingerprint", lambda self, part: fingerprint(self, part) + ("-new" if part == changed else "")
    )

    def filled() -> Filled:
        return fill_cache(Cache(tmp_path), CAPTIONS, family, precision="fp32", text=True).captions

    assert (filled(), filled()) == (Filled(1, 0), Filled(0, 1))
    for part in family.components:
        changed = part
        anew = part not in (family.backbone, "vae")
        assert filled() == (Filled(1, 0) if anew else Filled(0, 1)), part
