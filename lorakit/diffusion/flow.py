"""Rectified flow: a straight line from the data to the noise, its velocity, and the way back along it.

Here: `RectifiedFlow`, the process of SD 3, FLUX and their kin; how its times are shifted towards the noise for larger
pictures; Euler's and Heun's way back. Not here: which t is drawn in training and how a loss is weighted
(`objectives/`), and any network: every method takes what a network predicted as a tensor. Next: `gaussian.py` is the
discrete, curved sibling.

Sources: rectified flow, Liu et al. 2022 (arXiv:2209.03003); flow matching, Lipman et al. 2022 (arXiv:2210.02747);
SD 3 and the shift, Esser et al. 2024 (arXiv:2403.03206); Heun's method for sampling, Karras et al. 2022
(arXiv:2206.00364). Liu and Lipman run time from noise to data; here, as in SD 3, t = 0 is data and t = 1 noise.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = shift t / (shift t + 1 - t): the noise-to-signal ratio t / (1 - t) times `shift` (Esser et al., on
    "resolution-dependent shifting of timestep schedules"). 1 changes nothing; `1 / shift` is the inverse.

    Raises ValueError where `shift` is not above 0.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a number above 0, got {shift}")
    return shift * t / (shift * t + (1 - t))  # so written, it never leaves 0 … 1


@dataclass(frozen=True)
class DynamicShift:
    """A shift that follows the picture's size: mu is a line through (base_tokens, base_mu) and (max_tokens, max_mu).

    Tokens are what the transformer sees of a picture: its latents in patches of `patch` × `patch`. The line goes on
    beyond its two points. "exponential" shifts by exp(mu) (FLUX), "linear" by mu itself.
    """

    base_tokens: int = 256
    max_tokens: int = 4096
    base_mu: float = 0.5
    max_mu: float = 1.15
    kind: Literal["exponential", "linear"] = "exponential"
    patch: int = 2

    def __post_init__(self) -> None:
        if self.kind not in ("exponential", "linear"):
            raise ValueError(f"dynamic shift {self.kind!r} is none of exponential, linear")
        if self.base_tokens == self.max_tokens:
            raise ValueError(f"a line needs two points: base and max are both of {self.base_tokens} tokens")

    def tokens(self, height: int, width: int) -> int:
        """Those of latents of this size."""
        return (height // self.patch) * (width // self.patch)

    def mu(self, tokens: int) -> float:
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return self.base_mu + slope * (tokens - self.base_tokens)

    def at(self, tokens: int) -> float:
        """What `shift_time` takes for a picture of `tokens`."""
        return math.exp(self.mu(tokens)) if self.kind == "exponential" else self.mu(tokens)


class RectifiedFlow:
    """x_t = (1 - t) x0 + t noise for t in 0 … 1; its velocity dx_t/dt = noise - x0 is what a network predicts.

    Coefficients are taken in double precision; results come in the dtype and on the device of the tensors handed in.
    `t` is a floating-point tensor of shape (B,). `timesteps` is what a network's own clock counts at t = 1 (a family
    multiplies); `shift` or `dynamic` say at which times sampling asks the network, `shift_terminal` where its last
    question lies.

    Raises ValueError for a shift that is not above 0, both shifts at once, a `shift_terminal` outside 0 … 1, and a `t`
    that is out of range, not of floating point, or not of shape (B,). Of a `t` on a GPU the range is not looked at: the
    host would wait there in each step of a training.
    """

    prediction_type = "flow"

    def __init__(
        self,
        timesteps: int = 1000,
        *,
        shift: float = 1.0,
        dynamic: DynamicShift | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        if timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, got {timesteps}")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be a number above 0, got {shift}")
        if dynamic is not None and shift != 1:
            raise ValueError("a flow has one shift: either a constant or a dynamic one")
        if shift_terminal is not None and not 0 < shift_terminal < 1:
            raise ValueError(f"shift_terminal must lie between 0 and 1, got {shift_terminal}")
        self.timesteps = timesteps
        self.shift = shift
        self.dynamic = dynamic
        self.shift_terminal = shift_terminal
        self.least_steps = 2 if shift_terminal else 1  # the first time is 1, the last one another
        self.most_steps: int | None = None

    @classmethod
    def from_scheduler_config(cls, config: dict, *, patch: int = 2) -> "RectifiedFlow":
        """The process that a diffusers scheduler's configuration (its JSON as a dict) describes, for `DynamicShift`'s
        `patch`.

        Reads flow-match schedulers, and others with `use_flow_sigmas`. Raises ValueError for what is no flow's, and for
        every setting that would change the sampling and that is not here.
        """
        other = bool(config.get("use_flow_sigmas"))
        if not other and "FlowMatch" not in config.get("_class_name", "FlowMatch"):
            raise ValueError(f"{config['_class_name']} is not the scheduler of a rectified flow")
        if other and config.get("prediction_type") != "flow_prediction":
            raise ValueError(f"prediction type {config.get('prediction_type')!r} is not that of a rectified flow")
        absent = ["invert_sigmas", "stochastic_sampling", "use_lu_lambdas"]
        absent += [f"use_{name}_sigmas" for name in ("karras", "exponential", "beta")]
        found = [name for name in absent if config.get(name)]
        if found:
            raise ValueError(f"{', '.join(found)} of the scheduler's configuration: not known for a rectified flow")
        dynamic = None
        if config.get("use_dynamic_shifting"):
            dynamic = DynamicShift(
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15),
                config.get("time_shift_type", "exponential"),
                patch,
            )
        # beside a dynamic shift the constant one stands in configurations without a meaning
        shift = 1.0 if dynamic else config.get("flow_shift" if other else "shift", 1.0)
        return cls(
            config.get("num_train_timesteps", 1000),
            shift=shift,
            dynamic=dynamic,
            shift_terminal=config.get("shift_terminal") or None,
        )

    # -- t --------------------------------------------------------------------------------------------------------

    def at(self, share: Tensor) -> Tensor:
        """The t at a `share` (B,) in 0 … 1 of the way from clean to noise: the share itself."""
        return share

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """1 - t and t, shaped (B, 1, …) in the dtype and on the device of `like`, each rounded once."""
        self._check(t, like)
        shape = (-1, *[1] * (like.ndim - 1))
        exact = t.double()
        rest, t = ((c.to(device=like.device, dtype=like.dtype)).reshape(shape) for c in (1 - exact, exact))
        return rest, t

    def _check(self, t: Tensor, like: Tensor) -> None:
        if t.ndim != 1 or not t.dtype.is_floating_point or len(t) != len(like):
            raise ValueError(
                f"t must be floating-point numbers of shape ({len(like)},), got {t.dtype} of shape {tuple(t.shape)}"
            )
        if t.is_cpu and not bool(((t >= 0) & (t <= 1)).all()):  # NaN is refused too
            raise ValueError(f"t must lie in 0 … 1, got {float(t.min())} … {float(t.max())}")

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ((1 - t) / t)² at t, of shape (B,), in double precision: infinite at 0, 0 at 1."""
        self._check(t, t.reshape(-1))
        return ((1 - t.double()) / t.double()).square()

    # -- forward --------------------------------------------------------------------------------------------------

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = (1 - t) x0 + t noise (Esser et al., section 3, "rectified flow"); all of shape (B, …)."""
        rest, t = self._coefficients(t, x0)
        return rest * x0 + t * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network is asked for: the velocity noise - x0, the same all along the line (Liu et al., eq. 1)."""
        self._check(t, x0)
        return noise - x0

    # -- reverse --------------------------------------------------------------------------------------------------

    def predict_x0(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """x0 = x_t - t v: to the line's end at t = 0 with the predicted velocity."""
        _, t = self._coefficients(t, x_t)
        return x_t - t * prediction

    def predict_noise(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """noise = x_t + (1 - t) v: to the line's end at t = 1 with the predicted velocity."""
        rest, _ = self._coefficients(t, x_t)
        return x_t + rest * prediction

    def euler_step(self, x_t: Tensor, t: Tensor, t_next: Tensor, prediction: Tensor) -> Tensor:
        """x at `t_next` < `t` along the predicted velocity: x_t + (t_next - t) v (Euler's method)."""
        return x_t + self._span(t, t_next, x_t) * prediction

    def heun_step(self, x_t: Tensor, t: Tensor, t_next: Tensor, prediction: Tensor, *, ahead: Tensor) -> Tensor:
        """x at `t_next` < `t` by Heun's method: x_t + (t_next - t) (v + v') / 2.

        `ahead` is v', the velocity that the network predicts at `t_next` for what `euler_step` gives.
        """
        return x_t + self._span(t, t_next, x_t) * ((prediction + ahead) / 2)

    def _span(self, t: Tensor, t_next: Tensor, like: Tensor) -> Tensor:
        self._check(t, like)
        self._check(t_next, like)
        if bool((t_next >= t).any()):
            raise ValueError("t_next must lie below t")
        span = t_next.double() - t.double()
        return span.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    # -- sampling -------------------------------------------------------------------------------------------------

    def shift_at(self, tokens: int | None = None) -> float:
        """The shift for a picture of `tokens`; ValueError where a dynamic shift is not told them."""
        if self.dynamic is None:
            return self.shift
        if tokens is None:
            raise ValueError("a dynamic shift needs the number of tokens of the picture")
        return self.dynamic.at(tokens)

    def sigmas(
        self,
        steps: int,
        *,
        tokens: int | None = None,
        shift: float | None = None,
        spacing: Literal["trailing", "stock"] = "trailing",
    ) -> Tensor:
        """The times (steps + 1,) from 1 down to 0 between which `steps` steps lead, in double precision.

        Evenly spaced, then shifted: "trailing" from 1 to 1 / steps, as the pipelines of FLUX and others ask for, or
        "stock" down to 1 / timesteps, as a stock scheduler does that is asked for nothing (SD 3); a constant shift acts
        on that end twice there. `shift` overrides the process's own, for families with a rule of their own. With
        `shift_terminal` the last time above 0 is stretched to it (LTX-Video, Qwen-Image).

        Raises ValueError for too few steps, an unknown spacing, and a dynamic shift without `tokens`.
        """
        if steps < self.least_steps:
            raise ValueError(f"steps must be at least {self.least_steps}, got {steps}")
        if spacing not in ("trailing", "stock"):
            raise ValueError(f"spacing {spacing!r} is none of trailing, stock")
        end = torch.tensor(1 / steps, dtype=torch.float64)
        if spacing == "stock":
            end = shift_time(torch.tensor(1 / self.timesteps, dtype=torch.float64), self.shift)
        even = torch.linspace(1, float(end), steps, dtype=torch.float64)
        times = shift_time(even, self.shift_at(tokens) if shift is None else shift)
        if self.shift_terminal:
            times = 1 - (1 - times) * (1 - self.shift_terminal) / (1 - times[-1])
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])

    def sample_loop(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        x_1: Tensor,
        *,
        sigmas: Tensor,
        solver: Literal["euler", "heun"] = "euler",
    ) -> Iterator[Tensor]:
        """Yields x after each step between neighbouring `sigmas`, from noise x_1, asking `predict(x_t, t)`.

        "euler" asks once a step, its error falls with their number; "heun" twice, its error falls with the square. A
        step to 0 is Euler's in both (Karras et al., algorithm 1): networks have not learned from t = 0.
        """
        if solver not in ("euler", "heun"):
            raise ValueError(f"solver {solver!r} is none of euler, heun")
        x = x_1
        dtype = torch.promote_types(x.dtype, torch.float32)  # half precision would move the times themselves
        for now, then in pairwise(sigmas.tolist()):
            t, t_next = (torch.full((len(x),), time, dtype=dtype, device=x.device) for time in (now, then))
            velocity = predict(x, t)
            ahead = self.euler_step(x, t, t_next, velocity)
            if solver == "heun" and then > 0:
                ahead = self.heun_step(x, t, t_next, velocity, ahead=predict(ahead, t_next))
            x = ahead
            yield x
