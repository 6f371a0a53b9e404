"""Small networks learn small distributions with each process and objective, and sample them: all of it together.

A U-Net and a transformer learn 8×8 pictures of which one half is bright, with noise of 0.1 on them. The measure is the
share of samples near a member of the data (a root mean square distance below 0.2), how near half of them are (the
data's own 0.1 and not much more), and how evenly the members are hit.
Settings of the objective go along with the cases, for a case takes seconds: what they do is tested in their own files.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.settings import validate
from lorakit.core.types import Batch
from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.diffusion.noise import extra
from lorakit.diffusion.objectives import OBJECTIVES

BATCH, WIDTH = 64, 0.1
HALVES = torch.ones(4, 1, 8, 8)
HALVES[0, :, :4] = HALVES[1, :, 4:] = HALVES[2, :, :, :4] = HALVES[3, :, :, 4:] = -1.0

PROCESSES: dict[str, Callable[[], GaussianDiffusion | RectifiedFlow]] = {
    "epsilon": lambda: GaussianDiffusion(50, 0.01, 0.12),
    "v_prediction": lambda: GaussianDiffusion(50, 0.01, 0.12, prediction_type="v_prediction", zero_terminal_snr=True),
    "sample": lambda: GaussianDiffusion(50, 0.01, 0.12, prediction_type="sample"),
    "flow": lambda: RectifiedFlow(),
}


def waves(t: Tensor, width: int) -> Tensor:
    """t in 0 … 1 as sines and cosines (B, width) of ever longer waves."""
    angles = t.float()[:, None] * 10.0 * 0.05 ** torch.linspace(0, 1, width // 2)
    return torch.cat([angles.sin(), angles.cos()], 1)


class Mixed(nn.Module):
    """A network's output beside its input, in parts that t decides: at much noise the one is nearly the other."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.parts = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        of_x, of_network = self.parts(waves(t, 16)).T.reshape(2, -1, *[1] * (x.ndim - 1))
        return of_x * x + (1 + of_network) * self.network(x, t)


class UNet(nn.Module):
    """8×8 to 4×4 and back, with one skip; where a pixel lies comes with it."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.clock = nn.ModuleList([nn.Linear(16, width), nn.Linear(16, 2 * width), nn.Linear(16, width)])
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.after = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 1, 3, padding=1)
        place = torch.linspace(-1, 1, 8)
        self.register_buffer("place", torch.stack(torch.meshgrid(place, place, indexing="ij"))[None])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second, third = (layer(waves(t, 16))[:, :, None, None] for layer in self.clock)
        wide = F.silu(self.enter(torch.cat([x, self.place.expand(len(x), -1, -1, -1)], 1)) + first)
        low = F.silu(self.down(wide) + second)
        low = low + F.silu(self.middle(low))
        joined = torch.cat([F.silu(self.up(low)), wide], 1)
        return self.leave(F.silu(self.after(joined) + third))


class Transformer(nn.Module):
    """Patches of 2×2 as 16 tokens, a token for t, two layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter, self.clock, self.leave = nn.Linear(4, width), nn.Linear(16, width), nn.Linear(width, 4)
        self.place = nn.Parameter(0.5 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.enter(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)) + self.place
        clock = self.clock(waves(t, 16))[:, None]
        seen = self.layers(torch.cat([clock, tokens + clock], 1))[:, 1:]
        return F.pixel_shuffle(self.leave(seen).transpose(1, 2).reshape(len(x), 4, 4, 4), 2)


def train(network: nn.Module, process: GaussianDiffusion | RectifiedFlow, settings: Any, *, steps: int) -> None:
    """DDPM algorithm 1, for either process and any objective."""
    g = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    objective = OBJECTIVES.module(settings.kind).build(settings, process)

    def predict(x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True) -> Tensor:
        return network(x_t, clock(process, t))

    for _ in range(steps):
        x0 = HALVES[torch.randint(len(HALVES), (BATCH,), generator=g)]
        x0 = x0 + WIDTH * torch.randn(x0.shape, generator=g)
        drawn = [extra(settings.noise, x0.shape[1:], lambda purpose: g) for _ in range(BATCH)]
        quantile = torch.rand(BATCH, generator=g)
        if settings.timesteps.stratified:
            quantile = (torch.randperm(BATCH, generator=g) + quantile) / BATCH
        batch = Batch(
            keys=("",) * BATCH,
            numbers=tuple(range(BATCH)),
            captions=("",) * BATCH,
            latents=x0,
            noise=torch.randn(x0.shape, generator=g),
            quantile=quantile,
            weight=torch.ones(BATCH),
            extra={name: torch.stack([sample[name] for sample in drawn]) for name in drawn[0]},
        )
        objective(predict, batch).per_example.mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def clock(process: GaussianDiffusion | RectifiedFlow, t: Tensor) -> Tensor:
    return t if isinstance(process, RectifiedFlow) else t / process.timesteps


@torch.no_grad()
def sample(network: nn.Module, process: GaussianDiffusion | RectifiedFlow, shape: tuple[int, ...]) -> Tensor:
    """Ancestral for the Gaussian process, Heun's for the flow."""
    g = torch.Generator().manual_seed(2)
    start = torch.randn(shape, generator=g)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return network(x, clock(process, t))

    if isinstance(process, RectifiedFlow):
        return list(process.sample_loop(predict, start, sigmas=process.sigmas(25), solver="heun"))[-1]
    return list(process.p_sample_loop(predict, start, generator=g))[-1]


def hits(samples: Tensor, data: Tensor, *, within: float) -> tuple[float, float, Tensor]:
    """The share of samples with a root mean square distance to a member `within`, the median distance, and each
    member's share of those within."""
    far, member = (torch.cdist(samples.flatten(1), data.flatten(1)) / data[0].numel() ** 0.5).min(1)
    near = far < within
    shares = torch.bincount(member[near], minlength=len(data)) / max(1, int(near.sum()))
    return near.float().mean().item(), far.median().item(), shares


STRATIFIED = {"kind": "uniform", "stratified": True}


@pytest.mark.parametrize(
    ("network", "kind", "limit", "objective"),
    [
        (UNet, "epsilon", 0.7, {}),
        (UNet, "v_prediction", 0.7, {"weighting": {"kind": "min_snr"}}),
        (UNet, "sample", 0.9, {"loss": {"kind": "pseudo_huber", "delta": 0.5}}),
        (UNet, "flow", 0.6, {"timesteps": {"kind": "logit_normal"}}),
        (Transformer, "epsilon", 0.9, {"noise": {"perturbation": {"gamma": 0.1}}}),
        (Transformer, "v_prediction", 0.9, {}),
        (Transformer, "sample", 0.9, {}),
        (Transformer, "flow", 0.9, {"timesteps": STRATIFIED}),
    ],
)
def test_a_network_learns_pictures_of_halves(network, kind, limit, objective):
    torch.manual_seed(0)
    model, process = Mixed(network()), PROCESSES[kind]()
    settings = validate(OBJECTIVES.module("denoising").Settings, objective, where="objective", name="denoising")
    # near the clean end epsilon is x_t over a small sigma, which takes longer to be learned
    train(model, process, settings, steps=260 if kind == "epsilon" else 180)
    near, distance, shares = hits(sample(model, process, (200, 1, 8, 8)), HALVES, within=0.2)
    assert near > limit
    assert distance < 0.14
    assert shares.min() > 0.08
    assert shares.max() < 0.5


def test_noise_is_not_near_anything():
    g = torch.Generator().manual_seed(0)
    assert hits(torch.randn(200, 1, 8, 8, generator=g), HALVES, within=0.2)[0] == 0
    assert hits(HALVES.mean(0, keepdim=True), HALVES, within=0.2)[0] == 0
