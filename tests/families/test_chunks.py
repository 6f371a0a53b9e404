"""Long captions in chunks: each is read as a caption of its own, and pictures are drawn from all of them."""

import pytest
import torch

from lorakit import families
from lorakit.families import FAMILIES, clip

FIRST, SECOND = " ".join("a" * 14), " ".join("b" * 9)  # a tiny chunk has 14 tokens
LONG = f"{FIRST} {SECOND}"


@pytest.fixture(params=["sd", "sdxl"])
def pair(request: pytest.FixtureRequest) -> tuple[families.Family, families.Family]:
    """Of one chunk, and of two."""
    path = str(FAMILIES.module(request.param).tiny().path)
    return families.load(request.param, path), families.load(request.param, path, caption_chunks=2)


@pytest.mark.parametrize("weighted", [False, True])
def test_each_chunk_is_read_as_a_caption_of_its_own(
    pair: tuple[families.Family, families.Family], weighted: bool
) -> None:
    one, two = pair
    with torch.no_grad():
        (first, second), (long, short) = (
            family.encode_text(captions, weighted=weighted)["states"]
            for family, captions in ((one, [FIRST, SECOND]), (two, [LONG, FIRST]))
        )
        cut = one.encode_text([LONG])["states"][0]
    torch.testing.assert_close(long, torch.cat([first, second]))
    torch.testing.assert_close(short[:16], first)
    torch.testing.assert_close(cut, first)
    pooled = [family.encode_text([FIRST]).get("pooled") for family in pair]
    if pooled[0] is not None:
        torch.testing.assert_close(*pooled)


def test_a_chunks_weights_are_those_of_its_own_words(pair: tuple[families.Family, families.Family]) -> None:
    tokenizer = pair[1].tokenizer  # type: ignore[attr-defined]
    ids, present, weights = clip.tokens(tokenizer, [f"{FIRST} (b b:1.5)"], weighted=True, chunks=2)
    assert weights is not None and ids.shape == present.shape == weights.shape == (2, 16)
    assert weights[0].tolist() == [1.0] * 16
    assert weights[1].tolist() == [1.0, 1.5, 1.5, *[1.0] * 13]
    assert present.sum(dim=1).tolist() == [16, 4]
    assert ids[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert [int(row[n - 1]) for row, n in zip(ids, (16, 4), strict=True)] == [tokenizer.eos_token_id] * 2


def test_what_is_counted_cut_and_cached_goes_by_the_chunks(pair: tuple[families.Family, families.Family]) -> None:
    one, two = pair
    assert (one.token_limit, two.token_limit) == (16, 30)
    described = families.describe(two.name, str(two.path), caption_chunks=2)
    assert described.token_limit == 30 < described.count_tokens("a " * 29)
    assert described.text_size == sum(tensor.numel() for tensor in two.encode_text(["a"]).values())
    assert one.fingerprint("text_encoder") != two.fingerprint("text_encoder")
    assert one.fingerprint("vae") == two.fingerprint("vae")


def test_pictures_are_drawn_from_all_chunks(pair: tuple[families.Family, families.Family]) -> None:
    pictures = []
    for family, prompt in ((pair[0], LONG), (pair[0], FIRST), (pair[1], LONG), (pair[1], FIRST)):
        pipeline = family.live_pipeline()
        told: list[torch.Tensor] = []
        pipeline.unet.register_forward_pre_hook(
            lambda module, args, kwargs, told=told: told.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        drawn = pipeline(
            prompt,
            negative_prompt="dark",
            num_inference_steps=1,
            width=32,
            height=32,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]
        pictures.append(torch.from_numpy(drawn))
        with torch.no_grad():
            torch.testing.assert_close(told[0], family.encode_text(["dark", prompt])["states"])
    assert torch.equal(pictures[0], pictures[1]), "the stock pipeline cuts"
    assert not torch.equal(pictures[2], pictures[3])
