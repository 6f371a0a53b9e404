"""Adapter files that are wrong: a small one of each dialect, and mutations of its bytes, each from a number alone."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lorakit.adapters import AdapterState
from lorakit.core.errors import LorakitError
from lorakit.export import read_adapter, write_adapter
from lorakit.export.digests import DIGEST
from lorakit.export.files import read_file, readable

FORMATS = ("kohya", "diffusers", "peft", "lorakit")


def model() -> Any:
    """A family of five layers: what reading and writing an adapter file asks of one."""
    unet = nn.ModuleDict({"to_q": nn.Linear(6, 4), "conv": nn.Conv2d(3, 4, 3), "deep": nn.Sequential(nn.Linear(4, 4))})
    text = nn.ModuleDict({"q_proj": nn.Linear(5, 5), "fc1": nn.Linear(5, 7)})
    return SimpleNamespace(
        name="five layers",
        components={"unet": unet, "text_encoder": text},
        backbone="unet",
        text_encoders=("text_encoder",),
        lora_prefixes={"unet": "lora_unet_", "text_encoder": "lora_te_"},
        fused={},
        original_name=lambda component, path: f"text_model.{path}" if component == "text_encoder" else path,
        metadata=dict,
    )


def adapter(*, rank: int = 2) -> AdapterState:
    shapes = {
        "unet.to_q": ((rank, 6), (4, rank)),
        "unet.conv": ((rank, 3, 3, 3), (4, rank, 1, 1)),
        "unet.deep.0": ((rank, 4), (4, rank)),
        "text_encoder.q_proj": ((rank, 5), (5, rank)),
        "text_encoder.fc1": ((rank, 5), (7, rank)),
    }
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{layer}.lora_{letter}.weight": torch.randn(shape, generator=draw)
        for layer, pair in shapes.items()
        for letter, shape in zip("AB", pair, strict=True)
    }
    return AdapterState("lora", tensors, {layer: 1.0 + i for i, layer in enumerate(shapes)})


def file_of(path: Path) -> Path:
    """The file to damage of an adapter at `path`."""
    return path / "unet" / "adapter_model.safetensors" if path.is_dir() else path


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any] | str, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + body


def flips(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    end = len(data) if draw.random() < 0.5 else min(len(data), 8 + int.from_bytes(data[:8], "little"))
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))] if draw.random() < 0.8 else data + draw.randbytes(draw.randrange(1, 64))


def a_length(data: bytes, draw: random.Random) -> bytes:
    return (
        draw.choice((0, 1, len(data), 2**31, 2**63, 2**64 - 1, draw.randrange(2**16))).to_bytes(8, "little") + data[8:]
    )


def entries(data: bytes, draw: random.Random) -> bytes:
    """Something in a tensor's entry is another: its place, shape or number format, or its name."""
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.sample(names, 2)
    number = draw.choice((-1, -8, 0, 1, 4, len(body), 2**31, 2**63, 2**64, 10**400, 1.5, None, "8"))
    match draw.randrange(9):
        case 0:
            header[one]["data_offsets"] = header[other]["data_offsets"]  # one lies over the other
        case 1:
            header[one], header[other] = header[other], header[one]
        case 2:
            header[one]["data_offsets"][draw.randrange(2)] = number
        case 3:
            header[one]["shape"][draw.randrange(4) :] = [number]
        case 4:
            header[one]["shape"].reverse()
        case 5:
            header[one]["dtype"] = draw.choice(
                ("F64", "F16", "BF16", "I32", "I64", "U32", "F8_E4M3", "C64", "F4", "", 7)
            )
        case 6:
            header[draw.choice(("x", "", "\0", one.upper(), one.replace("lora", "dora", 1)))] = header.pop(one)
        case 7:
            del header[one]
        case 8:
            return joined(json.dumps(header)[:-1] + f", {json.dumps(one)}: {json.dumps(header[other])}}}", body)
    return joined(header, body)


def notes(data: bytes, draw: random.Random) -> bytes:
    """Something in the metadata is another."""
    header, body = split(data)
    metadata = header["__metadata__"]
    entry = draw.choice(sorted(metadata))
    match draw.randrange(5):
        case 0:
            del metadata[entry]
        case 1:
            metadata[entry] = draw.choice(("", "{}", "[]", "null", "NaN", "9" * 5000, "[" * 5000, 1, None))
        case 2:
            metadata[entry] = metadata[entry].replace(str(draw.randrange(10)), str(draw.randrange(10)))
        case 3:
            metadata["lora_adapter_metadata"] = draw.choice(
                ('{"unet.r": 2, "unet.lora_alpha": 64}', '{"unet.alpha_pattern": 3}', '{"unet.lora_alpha": 1e999}')
            )
        case 4:
            metadata["lorakit.adapter"] = draw.choice(
                ('{"kind": "lora", "alphas": {}}', '{"kind": 1}', '{"kind": "dora", "alphas": {"unet.to_q": NaN}}')
            )
    return joined(header, body)


def values(data: bytes, draw: random.Random) -> bytes:
    """Weights that are not finite, or other ones."""
    header, body = split(data)
    changed = bytearray(body)
    at = 4 * draw.randrange(len(body) // 4)
    changed[at : at + 4] = draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\0\0\0\0", draw.randbytes(4)))
    return joined(header, bytes(changed))


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flips,
    flips,
    cut,
    a_length,
    entries,
    entries,
    notes,
    values,
)


def hammer(folder: Path, numbers: range) -> dict[str, int]:
    """Tries mutations `numbers`: each file gives our error, or an adapter, and that is the one that was written where
    the file says its digest. Returns how often which came of it."""
    family, whole = model(), {}
    for format in FORMATS:
        whole[format] = folder / (format if format == "peft" else f"{format}.safetensors")
        write_adapter(adapter(), whole[format], format=format, family=family)
    counts = {"refused": 0, "the same": 0, "changed, without a digest": 0}
    damaged = folder / "damaged"
    for number in numbers:
        draw = random.Random(number)
        format = draw.choice(FORMATS)
        source, state = whole[format], readable(adapter(), format, model())
        path = damaged if source.is_dir() else damaged.with_suffix(".safetensors")
        shutil.copytree(source, path, dirs_exist_ok=True) if source.is_dir() else None
        mutate = draw.choice(MUTATIONS)
        file_of(path).write_bytes(mutate(file_of(source).read_bytes(), draw))
        try:
            found = read_adapter(path, family=family, assume_alpha=draw.choice((None, 1.0)))
        except LorakitError:
            counts["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"mutation {number} ({mutate.__name__} of {source.name})") from error
        same = found.alphas == state.alphas and all(
            torch.equal(tensor, state.tensors[name]) for name, tensor in found.tensors.items()
        )
        sealed = all(f"{part}{DIGEST}" in read_file(path).metadata for part in (("unet/",) if path.is_dir() else ("",)))
        assert same or not sealed, f"mutation {number} ({mutate.__name__} of {source.name}) loads changed"
        counts["the same" if same else "changed, without a digest"] += 1
    return counts
