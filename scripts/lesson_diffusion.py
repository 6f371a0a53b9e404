"""The sections of docs/latent-diffusion.md from pixels to pictures: the base, and lorakit.diffusion at work on it."""

import random
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import figures
import scenes
import torch
from figures import Axes, Curve, Row
from lesson_base import NBSP, SHOWN, SIDE, Model, Section, at, drawings, percent, prompts, share_right
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lorakit.core.seeding import generator
from lorakit.diffusion import GaussianDiffusion
from lorakit.evaluation.judge import load_judge, pixels_of

TICKS = (0, 250, 500, 750, 1000)


def pixels_to_latents(model: Model) -> Section:
    """z = scale · E(pixels); pixels = D(z / scale)."""
    picture = scenes.draw(SHOWN, (SIDE, SIDE), random.Random(1))
    z = model.encode([picture])
    back = model.decode(z)[0]
    difference = (pixels_of(picture) - pixels_of(back))[0].abs()
    channels = [(figures.grey(channel, low=-3, high=3), f"channel {i}") for i, channel in enumerate(z[0])]
    row = [(picture, "pixels\n64 x 64 x 3"), *channels, (figures.false_colour(z[0]), "channels 0, 1, 2\nas colours")]
    row += [(back, "back in pixels"), (figures.rgb(difference * 16 - 1), "what was lost,\n8 times as bright")]
    _, many = drawings(model.effort.drawings, "round trip")
    latents = model.encode(many)
    before, after = (torch.cat([pixels_of(p) for p in pictures]) for pictures in (many, model.decode(latents)))
    error = (before - after) * 255
    parts = {name: sum(p.numel() for p in module.parameters()) for name, module in model.family.components.items()}
    numbers = {
        "pixel_numbers": f"{3 * 64 * 64:,}",
        "latent_numbers": f"{z.numel():,}",
        "fewer": f"{3 * 64 * 64 // z.numel()}",
        "factor": f"{model.family.side_multiple}",
        "drawings": f"{len(many)}",
        "error_levels": f"{error.abs().mean():.1f}",
        "psnr": f"{10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3))).mean():.1f}",
        "latent_deviation": f"{latents.std():.2f}",
        **{f"{name}_weights": f"{count / 1e6:.1f}{NBSP}million" for name, count in parts.items()},
    }
    return Section({"latents": figures.sheet([Row("", row)], side=96)}, numbers)


def forward_process(model: Model) -> Section:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise."""
    process = model.process
    x0, noise = model.encode([scenes.draw(SHOWN, (SIDE, SIDE), random.Random(1))]), model.noise(1, "forward")
    shown = (0, 100, 250, 400, 550, 700, 999)
    noised = [process.q_sample(x0, at(t), noise) for t in shown]
    rows = [
        Row("latents", [(figures.false_colour(x_t[0]), "") for x_t in noised]),
        Row("decoded", [(model.decode(x_t)[0], f"t = {t}") for t, x_t in zip(shown, noised)]),
    ]
    every = torch.arange(process.timesteps)
    signal, sigma, snr = process.alphas_cumprod.sqrt(), (1 - process.alphas_cumprod).sqrt(), process.snr(every)
    mixture = Axes("what x_t is mixed of", (0, 1000), (0, 1), "t", TICKS, (0, 0.5, 1))
    ratio = Axes(
        "signal-to-noise ratio", (0, 1000), (1e-5, 1e4), "t", TICKS, (1e-4, 1e-2, 1, 1e2, 1e4), logarithmic=True
    )
    shares = [Curve("of x0: sqrt(a)", every, signal), Curve("of noise: sqrt(1 - a)", every, sigma)]
    curves = figures.beside([figures.panel(mixture, shares), figures.panel(ratio, [Curve("a / (1 - a)", every, snr)])])
    numbers = {
        "timesteps": f"{process.timesteps:,}",
        "last_t": f"{process.timesteps - 1}",
        "snr_first": f"{snr[0]:,.0f}",
        "snr_last": f"{snr[-1]:g}",
        "half": f"{int((process.alphas_cumprod < 0.5).nonzero()[0])}",
    }
    return Section({"forward": figures.sheet(rows), "schedule": curves}, numbers)


def what_is_asked(model: Model) -> Section:
    """The network sees x_t, t and the caption, and is asked for what was mixed; here what its answer says of x0."""
    process = model.process
    x0, noise = model.encode([scenes.draw(SHOWN, (SIDE, SIDE), random.Random(1))]), model.noise(1, "forward")
    seen, told, untold, guessed = [], [], [], []
    for t in (100, 250, 400, 550, 700, 850, 999):
        x_t = process.q_sample(x0, at(t), noise)
        v = model.predict(x_t, at(t), [SHOWN.caption])
        seen.append((model.decode(x_t)[0], ""))
        guessed.append((figures.false_colour(process.predict_noise(x_t, at(t), v)[0]), ""))
        told.append((model.decode(process.predict_x0(x_t, at(t), v))[0], ""))
        blind = process.predict_x0(x_t, at(t), model.predict(x_t, at(t), [""]))
        untold.append((model.decode(blind)[0], f"t = {t}"))
    rows = [Row("x_t", seen), Row("noise, as\nthe network\nsays", guessed), Row("x0 from it", told)]
    rows.append(Row("the same\nwithout the\ncaption", untold))
    curve, numbers = _errors(model)
    return Section({"guesses": figures.sheet(rows, side=104), "errors": curve}, {**_sensitivity(process), **numbers})


def _errors(model: Model) -> tuple[Image.Image, dict[str, str]]:
    """How wrong the network is at each t, with the caption and without, over many drawings."""
    process, (asked, pictures) = model.process, drawings(model.effort.drawings, "errors")
    x0, captions = model.encode(pictures), [scene.caption for scene in asked]
    noise, steps = model.noise(len(x0), "errors"), [0, 5, 10, 25, *range(50, 1000, 50), 999]
    found: dict[str, list[list[float]]] = {"with its caption": [], "without": []}
    for t in steps:
        when = at(t, len(x0))
        x_t = process.q_sample(x0, when, noise)
        for name, words in zip(found, (captions, [""] * len(x0))):
            v = model.predict(x_t, when, words)
            of_v = (v - process.target(x0, when, noise)).square().mean()
            of_x0 = (process.predict_x0(x_t, when, v) - x0).square().mean()
            found[name].append([float(of_v), float(of_x0)])
    panels = []
    for i, title in enumerate(("squared error of v: the training loss", "squared error of x0")):
        axes = Axes(title, (0, 1000), (0, 1), "t", TICKS, (0, 0.25, 0.5, 0.75, 1))
        curves = [
            Curve(name, torch.tensor(steps), torch.tensor([errors[i] for errors in of_t]))
            for name, of_t in found.items()
        ]
        panels.append(figures.panel(axes, curves))
    told, untold = found.values()
    middle = steps.index(500)
    numbers = {
        "told_middle": f"{told[middle][1]:.2f}",
        "untold_middle": f"{untold[middle][1]:.2f}",
        "told_end": f"{told[-1][1]:.2f}",
        "untold_end": f"{untold[-1][1]:.2f}",
    }
    return figures.beside(panels), numbers


def _sensitivity(process: GaussianDiffusion) -> dict[str, str]:
    """By how much x0 is wrong where the network's answer is wrong by 0.1, for each prediction type."""
    x0, noise, numbers = torch.ones(1, 1), torch.ones(1, 1), {}
    for kind in ("epsilon", "v_prediction", "sample"):
        twin = GaussianDiffusion(betas=process.betas, prediction_type=kind)
        for t in (50, 500, 950):
            x_t = twin.q_sample(x0, at(t), noise)
            wrong = twin.predict_x0(x_t, at(t), twin.target(x0, at(t), noise) + 0.1)
            numbers[f"{kind}_{t}"] = f"{float((wrong - x0).abs()):.3f}"
    return numbers


def backbone(model: Model) -> Section:
    """softmax(Q Kᵀ / sqrt(d)) V, with Q of the latents and K, V of the text: which places look at which words."""
    t, picture = 500, scenes.draw(SHOWN, (SIDE, SIDE), random.Random(1))
    x_t = model.process.q_sample(model.encode([picture]), at(t), model.noise(1, "attention"))
    seen = attention(model, x_t, at(t), [SHOWN.caption])[0]  # (h, w, words)
    tiles: list[tuple[Image.Image | None, str]] = [(picture, "the picture")]
    for i, word in enumerate(("(start)", *SHOWN.caption.split(), "(end)")):
        tiles.append((figures.heat(picture, seen[..., i] / seen[..., i].max()), word))
    numbers = {"attention_side": f"{len(seen)}", "token_limit": f"{model.family.token_limit}"}
    return Section({"attention": figures.sheet([Row("", tiles)], side=80)}, {**numbers, **_inside(model, t)})


def attention(model: Model, x_t: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
    """The weights (B, h, w, words) of the U-Net's last layer of cross-attention, the mean over its heads."""
    layer = [m for name, m in model.family.unet.named_modules() if name.endswith("attn2")][
        -2
    ]  # mid_block is listed last
    kept, usual = [], layer.processor

    def listen(attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """A processor of diffusers' that does the arithmetic in the open."""
        q, k, v = (
            project(states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for project, states in (
                (attention.to_q, hidden_states),
                (attention.to_k, encoder_hidden_states),
                (attention.to_v, encoder_hidden_states),
            )
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, places, words)
        kept.append(weights.mean(1))
        return attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2))

    layer.processor = listen
    try:
        model.predict(x_t, t, captions)
    finally:
        layer.processor = usual
    return kept[0].unflatten(1, (round(kept[0].shape[1] ** 0.5), -1))


def _inside(model: Model, t: int) -> dict[str, str]:
    """How many times as much the places of the shape look at its word, and at the start token, as the others do."""
    asked, pictures = drawings(model.effort.drawings, "attention")
    x0, times = model.encode(pictures), at(t, len(pictures))
    x_t = model.process.q_sample(x0, times, model.noise(len(x0), "attention of many"))
    seen = attention(model, x_t, times, [scene.caption for scene in asked])
    pixels = torch.cat([pixels_of(picture) for picture in pictures])
    shape = ((pixels - pixels[..., :1, :1]).abs().sum(1, keepdim=True) > 0.3).float()  # the corner is background
    inside = adaptive_avg_pool2d(shape, seen.shape[1:3])[:, 0]
    numbers = {}
    for name, places in (("shape", [s.caption.split().index(s.shape) + 1 for s in asked]), ("start", [0] * len(asked))):
        weight = torch.stack([one[..., place] for one, place in zip(seen, places)])
        there, elsewhere = (weight * inside).sum() / inside.sum(), (weight * (1 - inside)).sum() / (1 - inside).sum()
        numbers[f"look_at_{name}"] = f"{there / elsewhere:.1f}"
    return numbers


def reverse_process(model: Model) -> Section:
    """From noise to a picture, step by step: x_t, and the x0 that the network has in mind."""
    process, steps = model.process, model.effort.steps
    guided, guesses = model.guided([SHOWN.caption], scale=4.0), list[Tensor]()

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        v = guided(x_t, t)
        guesses.append(process.predict_x0(x_t, t, v))
        return v

    x_T = model.noise(1, "reverse")
    states = [x_T, *process.ddim_sample_loop(predict, x_T, steps=steps)]
    chosen = [t for t in (0, 2, 5, 8, 11, 14, 17, 19) if t < steps]
    above = [(model.decode(states[i])[0], "") for i in chosen] + [(model.decode(states[-1])[0], "")]
    times = process.trailing_timesteps(steps)
    below = [(model.decode(guesses[i])[0], f"t = {times[i]}") for i in chosen] + [(None, "the end")]
    return Section(
        {"reverse": figures.sheet([Row("x_t", above), Row("x0, as\npredicted", below)], side=88)}, {"steps": f"{steps}"}
    )


def samplers(model: Model) -> Section:
    """DDIM (eta 0) and DDPM (eta 1) from the same noise in a few steps, and DDPM's own way, which takes all of them."""
    process, effort, judge, x_T = model.process, model.effort, load_judge(), model.noise(1, "reverse")
    asked, start = prompts(effort.prompts, "samplers"), model.noise(effort.prompts, "samplers")
    rows, numbers = [], {"prompts": f"{len(asked)}"}
    for eta, name in ((0.0, "DDIM\neta = 0"), (1.0, "DDPM\neta = 1")):
        row = Row(name, [])
        for steps in effort.step_counts:
            how = {"steps": steps, "eta": eta, "generator": generator("latent diffusion", "fresh noise", steps)}
            picture = model.draw([SHOWN.caption], x_T, **how)[0]
            row.tiles.append((picture, f"{steps} step{'s' * (steps > 1)}" if eta else ""))
            many = model.draw([entry["prompt"] for entry in asked], start, **how)
            numbers[f"right_{eta:g}_{steps}"] = percent(share_right(judge, asked, many))
        rows.append(row)
    predict, fresh = model.guided([SHOWN.caption], scale=4.0), generator("latent diffusion", "DDPM")
    *_, x0 = islice(process.p_sample_loop(predict, x_T, generator=fresh), effort.ancestral)
    rows[0].tiles.append((None, ""))
    rows[1].tiles.append((model.decode(x0)[0], f"all {process.timesteps:,}"))
    return Section({"samplers": figures.sheet(rows)}, numbers)


def guidance(model: Model) -> Section:
    """predict(empty) + scale · (predict(text) - predict(empty))."""
    effort, judge = model.effort, load_judge()
    asked, start = prompts(effort.prompts, "guidance"), model.noise(effort.prompts, "guidance")
    pair = [SHOWN.caption, scenes.Scene("star", "green", "orange", position="on the right").caption]
    rows, numbers = [Row("", []), Row("", [])], {}
    for scale in effort.scales:
        for row, picture in zip(rows, model.draw(pair, model.noise(2, "guided pair"), scale=scale)):
            row.tiles.append((picture, f"scale {scale:g}" if row is rows[1] else ""))
        many = model.draw([entry["prompt"] for entry in asked], start, scale=scale)
        pixels = torch.cat([pixels_of(picture) for picture in many])
        numbers[f"right_scale_{scale:g}"] = percent(share_right(judge, asked, many))
        numbers[f"extreme_scale_{scale:g}"] = percent(float(((pixels == 0) | (pixels == 1)).float().mean()))
    return Section({"guidance": figures.sheet(rows)}, numbers)


def conditioning(model: Model) -> Section:
    """Other words at the same noise; no words; and words to be led away from."""
    x_T = model.noise(1, "conditioning")
    wanted = [
        ("a red circle\non a blue background", {}),
        ("a red star\non a blue background", {}),
        ("a big red star\non a green background", {}),
        ("", {"scale": 1.0}),
        ("", {"negative": "a circle on a blue background"}),
    ]
    tiles = []
    for caption, how in wanted:
        picture = model.draw([caption.replace("\n", " ")], x_T, **how)[0]
        tiles.append(
            (picture, caption or ("away from a circle\non a blue background" if "negative" in how else "no words"))
        )
    return Section({"conditioning": figures.sheet([Row("", tiles)], side=144)})


SECTIONS: tuple[Callable[[Model], Section], ...] = (
    pixels_to_latents,
    forward_process,
    what_is_asked,
    backbone,
    reverse_process,
    samplers,
    guidance,
    conditioning,
)
