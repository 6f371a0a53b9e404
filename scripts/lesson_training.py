"""The sections of docs/latent-diffusion.md on what training chooses: weights, times, rectified flow. Curves alone."""

from collections.abc import Callable

import figures
import torch
from figures import Axes, Curve
from lesson_base import Model, Section
from torch import Tensor

from lorakit.diffusion import RectifiedFlow, timesteps, weightings


def weights_and_times(model: Model) -> Section:
    """W(SNR), what a squared error of x0 counts; and how often laws of t draw which t."""
    every = torch.arange(0, model.process.timesteps, 9)  # with the last one
    snr = model.process.snr(every)
    counts = {  # of a loss of x0 itself, so that all are comparable; the widest line first, for they overlap
        "epsilon, unweighted": (weightings.SNRv(kind="snr_v"), 6.0),
        "v, unweighted": (weightings.EDM(kind="edm", sigma_data=1.0), 3.5),
        "min-SNR, gamma = 5": (weightings.MinSNR(kind="min_snr"), 1.8),
    }
    curves = [Curve(n, every, weightings.weight(kind, snr, "sample"), thick) for n, (kind, thick) in counts.items()]
    curves.append(Curve("x0, unweighted", every, torch.ones(len(every))))
    ticks = (1e-4, 1e-2, 1, 1e2, 1e4)
    axes = Axes(
        "what an error of x0 counts", (0, 1000), (1e-4, 1e4), "t", (0, 250, 500, 750, 1000), ticks, logarithmic=True
    )
    flow, quantiles, bins = RectifiedFlow(), (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000, 80
    laws = {
        "uniform": timesteps.Uniform(),
        "logit_normal": timesteps.LogitNormal(kind="logit_normal"),
        "shifted, shift = 3": timesteps.Shifted(kind="shifted"),
        "style": timesteps.Style(kind="style"),
    }
    middles, densities = (torch.arange(bins) + 0.5) / bins, []
    for name, settings in laws.items():
        drawn = torch.histc(timesteps.law(settings, flow)(quantiles), bins, 0, 1)
        densities.append(Curve(name, middles, drawn * bins / len(quantiles)))
    often = Axes("how often a t is drawn", (0, 1), (0, 3), "t, from clean to noise", (0, 0.5, 1), (0, 1, 2, 3))
    numbers = {"gamma_t": f"{int((model.process.snr(torch.arange(1000)) < 5).nonzero()[0])}"}
    return Section({"weights": figures.beside([figures.panel(axes, curves), figures.panel(often, densities)])}, numbers)


def rectified_flow(model: Model) -> Section:
    """Both ways back in a world of two points, 1 and -1, where the best prediction has a closed form."""
    gaussian, flow = model.process, RectifiedFlow()

    def best(x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t] for x_t = signal x0 + sigma noise, both points equally likely."""
        return (signal * x_t / sigma.square()).tanh()

    def v(x_t: Tensor, t: Tensor) -> Tensor:
        signal, sigma = (table[t][:, None] for table in (arc.sqrt(), (1 - arc).sqrt()))
        x0 = best(x_t, signal, sigma)
        return signal * (x_t - signal * x0) / sigma - sigma * x0

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t - best(x_t, 1 - t[:, None], t[:, None])) / t[:, None]

    arc = gaussian.alphas_cumprod
    x_T = torch.special.ndtri((torch.arange(24, dtype=torch.float64) + 0.5) / 24)[:, None]
    steps = 200
    ways = {
        "Gaussian diffusion": [x_T, *gaussian.ddim_sample_loop(v, x_T, steps=steps)],
        "rectified flow": [x_T, *flow.sample_loop(velocity, x_T, sigmas=flow.sigmas(steps))],
    }
    panels, share = [], torch.linspace(0, 1, steps + 1)
    for name, states in ways.items():
        axes = Axes(name, (0, 1), (-2.5, 2.5), "from noise to data", (0, 0.5, 1), (-2, -1, 0, 1, 2))
        paths = [Curve("to 1" if path[-1] > 0 else "to -1", share, path) for path in torch.cat(states, 1)]
        panels.append(figures.panel(axes, paths[::-1], width=290, height=270))
    mixtures = [
        Curve("Gaussian", arc.sqrt(), (1 - arc).sqrt()),
        Curve("flow", torch.tensor([0, 1]), torch.tensor([1, 0])),
    ]
    plane = Axes("what x_t is mixed of", (0, 1), (0, 1), "share of x0", (0, 0.5, 1), (0, 0.5, 1))
    panels.append(figures.panel(plane, mixtures, width=290, height=270))
    return Section({"paths": figures.beside(panels)})


SECTIONS: tuple[Callable[[Model], Section], ...] = (weights_and_times, rectified_flow)
