"""Gaussian diffusion: the forward process, its posterior, and the way back.

Here: `GaussianDiffusion`, the discrete process of DDPM with the prediction types epsilon, v and sample.
Not here: which t is drawn and how a loss is weighted (`objectives/`), and any network: every method takes what a
network predicted as a tensor. Next: `flow.py` is the straight-line sibling.

Sources: DDPM, Ho et al. 2020 (arXiv:2006.11239); DDIM, Song et al. 2021 (arXiv:2010.02502); improved DDPM, Nichol and
Dhariwal 2021 (arXiv:2102.09672); v-prediction, Salimans and Ho 2022 (arXiv:2202.00512); zero terminal SNR, Lin et al.
2023 (arXiv:2305.08891).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def _linear(timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """DDPM section 4: betas evenly spaced."""
    return torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)


def _scaled_linear(timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Latent diffusion: the square roots of the betas evenly spaced."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64) ** 2


def _cosine(timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Improved DDPM eq. 17; `beta_start` and `beta_end` have no part in it."""

    def alpha_bar(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / timesteps) / alpha_bar(i / timesteps) for i in range(timesteps)]
    return torch.tensor(betas, dtype=torch.float64).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
}


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas of (T,) shifted and scaled so that nothing of x0 is left at the last step (Lin et al., algorithm 1).

    Raises ValueError for a single beta: its step would be the first, which is kept, and the last, which is emptied.
    """
    if len(betas) < 2:
        raise ValueError("zero terminal SNR needs at least two timesteps")
    root = (1 - betas.double()).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


class GaussianDiffusion:
    """q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I) for t in 0 … timesteps - 1 (DDPM eq. 4).

    Tables are kept in double precision; results come in the dtype and on the device of the tensors handed in. `t` is
    an integer tensor of shape (B,).

    Raises ValueError for an unknown schedule or prediction type, betas outside (0, 1) (1 may be the last), and a `t`
    that is out of range, not of integers, or not of shape (B,). Of a `t` on a GPU the range is not looked at: the host
    would wait there in each step of a training.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        schedule: str = "linear",
        betas: Sequence[float] | Tensor | None = None,
        prediction_type: str = "epsilon",
        zero_terminal_snr: bool = False,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction type {prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
        if betas is None:
            if schedule not in SCHEDULES:
                raise ValueError(f"beta schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
            betas = SCHEDULES[schedule](timesteps, beta_start, beta_end)
        table = torch.as_tensor(betas, dtype=torch.float64)
        if table.ndim != 1 or not len(table):
            raise ValueError("betas must be a sequence of numbers")
        # a beta must change 1 - beta in double precision, and nothing follows where no signal is left; NaN fails too
        if not bool((1 - table < 1).all() and (table[:-1] < 1).all() and table[-1] <= 1):
            raise ValueError("betas must be above 0 (1e-16 is taken for 0) and below 1, the last at most 1")
        self.prediction_type = prediction_type
        self.betas = rescale_zero_terminal_snr(table) if zero_terminal_snr else table
        self.timesteps = len(self.betas)
        self.least_steps = 1
        self.most_steps: int | None = self.timesteps
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        rest = 1 - self.alphas_cumprod
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / rest
        self._tables = {
            "signal": self.alphas_cumprod.sqrt(),
            "sigma": rest.sqrt(),
            "snr": self.alphas_cumprod / rest,
            "of_x0": self.alphas_cumprod_prev.sqrt() * self.betas / rest,
            "of_xt": self.alphas.clamp(min=0).sqrt() * (1 - self.alphas_cumprod_prev) / rest,
            "posterior_variance": self.posterior_variance,
            # index 0 is the clean end, so that t_prev = -1 needs no special case
            "from_clean": torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod]),
        }
        self._there: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def from_scheduler_config(cls, config: dict) -> "GaussianDiffusion":
        """The process that a diffusers scheduler's configuration (its JSON as a dict) describes.

        Raises ValueError for a beta schedule or prediction type that is none of ours, and for a flow's scheduler.
        """
        if "FlowMatch" in config.get("_class_name", "") or config.get("use_flow_sigmas"):
            raise ValueError("the scheduler's configuration is a rectified flow's, which has no betas")
        schedules = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
        name = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is None and name not in schedules:
            raise ValueError(
                f"beta_schedule {name!r} of the scheduler's configuration is none of {', '.join(schedules)}"
            )
        return cls(
            config.get("num_train_timesteps", 1000),
            config.get("beta_start", 1e-4),
            config.get("beta_end", 0.02),
            schedule=schedules.get(name, "linear"),
            betas=config.get("trained_betas"),
            prediction_type=config.get("prediction_type", "epsilon"),
            zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        )

    def at(self, share: Tensor) -> Tensor:
        """The t at a `share` (B,) in 0 … 1 of the way from clean to noise: the step that it falls into."""
        return (share * self.timesteps).long().clamp(max=self.timesteps - 1)

    # -- the tables at t ------------------------------------------------------------------------------------------

    def _check(self, t: Tensor, like: Tensor) -> None:
        # a boolean t would be taken for a mask
        whole = not (t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool)
        if t.ndim != 1 or not whole or len(t) != len(like):
            raise ValueError(f"t must be integers of shape ({len(like)},), got {t.dtype} of shape {tuple(t.shape)}")
        if t.is_cpu and len(t) and (int(t.min()) < 0 or int(t.max()) >= self.timesteps):
            raise ValueError(f"t must lie in 0 … {self.timesteps - 1}, got {int(t.min())} … {int(t.max())}")

    def _of(self, table: str, t: Tensor) -> Tensor:
        """The table's values (B,) at t, in double precision, where t is: a table stays where it was once asked for."""
        key = table, t.device
        if key not in self._there:
            self._there[key] = self._tables[table].to(t.device)
        return self._there[key][t.long()]

    def _at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """The table's values at t, shaped (B, 1, …) in the dtype and on the device of `like`."""
        return self._like(self._of(table, t), like)

    def _like(self, values: Tensor, like: Tensor) -> Tensor:
        """Values of (B,) shaped (B, 1, …) in the dtype and on the device of `like`."""
        return values.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def _signal_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        self._check(t, like)
        return self._at("signal", t, like), self._at("sigma", t, like)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod) at t, of shape (B,), in double precision."""
        self._check(t, t.reshape(-1))
        return self._of("snr", t)

    # -- forward --------------------------------------------------------------------------------------------------

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alphas_cumprod_t) x0 + sqrt(1 - alphas_cumprod_t) noise (DDPM eq. 4); all of shape (B, …)."""
        signal, sigma = self._signal_noise(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network is asked for: noise, v = sqrt(a) noise - sqrt(1 - a) x0 (Salimans and Ho, app. D), or x0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self._signal_noise(t, x0)
        return signal * noise - sigma * x0

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of shape (B, …) and variance of shape (B, 1, …) of q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7)."""
        self._check(t, x_t)
        mean = self._at("of_x0", t, x_t) * x0 + self._at("of_xt", t, x_t) * x_t
        return mean, self._at("posterior_variance", t, x_t)

    # -- reverse --------------------------------------------------------------------------------------------------

    def predict_x0(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """x0 as the network's prediction implies it (DDPM eq. 15 for epsilon).

        With epsilon at a step without signal (zero terminal SNR) there is no answer: ValueError.
        """
        if self.prediction_type == "sample":
            return prediction
        signal, sigma = self._signal_noise(t, x_t)
        if self.prediction_type == "v_prediction":
            return signal * x_t - sigma * prediction
        if bool((signal == 0).any()):
            raise ValueError("epsilon says nothing about x0 where the signal is zero: use v_prediction or sample")
        return (x_t - sigma * prediction) / signal

    def predict_noise(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The noise that the network's prediction implies."""
        if self.prediction_type == "epsilon":
            return prediction
        signal, sigma = self._signal_noise(t, x_t)
        if self.prediction_type == "v_prediction":
            return signal * prediction + sigma * x_t
        return (x_t - signal * prediction) / sigma

    def predict_v(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """v = sqrt(a) noise - sqrt(1 - a) x0 as the prediction implies it; like `predict_x0`, none without signal."""
        if self.prediction_type == "v_prediction":
            return prediction
        signal, sigma = self._signal_noise(t, x_t)
        if self.prediction_type == "sample":
            return (signal * x_t - prediction) / sigma
        if bool((signal == 0).any()):
            raise ValueError("epsilon says nothing about v where the signal is zero: use v_prediction or sample")
        return (prediction - sigma * x_t) / signal

    def convert(self, x_t: Tensor, t: Tensor, prediction: Tensor, *, to: str) -> Tensor:
        """The prediction as one of type `to`: the three are linear in each other at a given x_t (Salimans, app. D)."""
        if to not in PREDICTION_TYPES:
            raise ValueError(f"prediction type {to!r} is none of {', '.join(PREDICTION_TYPES)}")
        implied = {"epsilon": self.predict_noise, "v_prediction": self.predict_v, "sample": self.predict_x0}[to]
        return implied(x_t, t, prediction)

    def p_mean_variance(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(x_{t-1} | x_t): the posterior at the predicted x0 (DDPM section 3.2)."""
        return self.q_posterior(self.predict_x0(x_t, t, prediction), x_t, t)

    def p_sample(self, x_t: Tensor, t: Tensor, prediction: Tensor, noise: Tensor) -> Tensor:
        """x_{t-1} drawn with the given standard normal `noise` (DDPM algorithm 2); none is added at t = 0."""
        mean, variance = self.p_mean_variance(x_t, t, prediction)
        return mean + variance.sqrt() * noise  # the posterior variance is exactly 0 at t = 0

    def ddim_step(
        self,
        x_t: Tensor,
        t: Tensor,
        t_prev: Tensor,
        prediction: Tensor,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x at `t_prev` < `t` (DDIM eq. 12 and 16); `t_prev` of -1 is the clean end. `noise` is needed if eta > 0."""
        self._check(t, x_t)
        if not 0 <= eta <= 1:  # above 1 more noise would be added than there is room for
            raise ValueError(f"eta must lie in 0 … 1, got {eta}")
        before = t_prev.long()  # unsigned integers are never below 0
        if t_prev.is_floating_point() or t_prev.shape != t.shape or bool(((before >= t) | (before < -1)).any()):
            raise ValueError(f"t_prev must be integers of shape {tuple(t.shape)}, below t and at least -1")
        x0 = self.predict_x0(x_t, t, prediction)
        implied = self.predict_noise(x_t, t, prediction)
        a, a_prev = (self._of("from_clean", s.long() + 1) for s in (t, before))  # in double: 1 - a is small near clean
        # eq. 16: eta = 1 is DDPM's posterior variance, eta = 0 adds nothing
        variance = eta**2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        direction = (1 - a_prev - variance).clamp(min=0).sqrt()
        x = self._like(a_prev.sqrt(), x_t) * x0 + self._like(direction, x_t) * implied
        if eta:
            if noise is None:
                raise ValueError("DDIM with eta > 0 needs noise")
            x = x + self._like(variance.sqrt(), x_t) * noise
        return x

    def trailing_timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps evenly spaced down from the last one (Lin et al., section 3.3)."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must lie in 1 … {self.timesteps}, got {steps}")
        return [round(self.timesteps - i * self.timesteps / steps) - 1 for i in range(steps)]

    def p_sample_loop(
        self, predict: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Yields x_{T-1} … x_0 from x_T, asking `predict(x_t, t)` once a step (DDPM algorithm 2)."""
        x = x_T
        for step in reversed(range(self.timesteps)):
            t = torch.full((len(x),), step, dtype=torch.long, device=x.device)
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
            x = self.p_sample(x, t, predict(x, t), noise)
            yield x

    def ddim_sample_loop(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        x_T: Tensor,
        *,
        steps: int,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yields x after each of `steps` trailing steps, the last one x_0 (DDIM section 4.2)."""
        x = x_T
        chosen = self.trailing_timesteps(steps)
        for step, before in zip(chosen, [*chosen[1:], -1]):
            t, t_prev = (torch.full((len(x),), s, dtype=torch.long, device=x.device) for s in (step, before))
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x) if eta else None
            x = self.ddim_step(x, t, t_prev, predict(x, t), eta=eta, noise=noise)
            yield x
