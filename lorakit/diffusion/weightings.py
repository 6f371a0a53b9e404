"""How much each t counts: weights of the loss, as functions of the signal-to-noise ratio.

One guess of x0 costs differently in each prediction type. With S the SNR, a squared error e of x0 is

    e                 as x0
    S · e             as epsilon, for noise = (x_t - a x0) / s with S = a² / s²
    (S + 1) · e       as v = a noise - s x0 (Salimans and Ho 2022, arXiv:2202.00512, section 4)
    (1 + √S)² · e     as a flow's velocity noise - x0, for x_t = (1 - t) x0 + t noise

So a paper's weight is written here as W(S), that of x0, and `weighting` divides it by these: the same W means the same
training whatever the network predicts. Only `sigma` multiplies the loss as it is. Not here: which t is drawn
(`timesteps.py`), and the loss (`losses.py`).
"""

from collections.abc import Callable
from typing import Annotated, Literal, assert_never

import torch
from pydantic import Field
from torch import Tensor

from lorakit.core import settings as core_settings
from lorakit.core.types import Process

SNR_RANGE = (1e-20, 1e12)  # without signal or noise the limits are taken: no 0 / 0
LEAST_SIGMA = 1e-3  # the smallest of a stock flow's thousand: a negative power of less would be all of the loss


class NoWeighting(core_settings.Settings):
    kind: Literal["none"] = "none"
    """Every timestep counts alike."""


class MinSNR(core_settings.Settings):
    kind: Literal["min_snr"]
    """Easy timesteps count less (Hang et al. 2023, arXiv:2303.09556). Not for flows."""
    gamma: float = Field(5.0, gt=0)
    """The signal-to-noise ratio above which a timestep counts less."""
    soft: bool = False
    """Whether they count less gradually, SNR · gamma / (SNR + gamma), in place of min(SNR, gamma) (2401.11605)."""


class P2(core_settings.Settings):
    kind: Literal["p2"]
    """Steps at which only detail is left count less: epsilon's loss over (k + SNR)^gamma (2204.00227)."""
    k: float = Field(1.0, gt=0)
    """What keeps the weight of the noisy steps finite."""
    gamma: float = Field(1.0, gt=0)
    """How strongly."""


class Debiased(core_settings.Settings):
    kind: Literal["debiased"]
    """Noisy steps count more: epsilon's loss over √SNR (2310.08442)."""


class SNRv(core_settings.Settings):
    kind: Literal["snr_v"]
    """v (or a flow's velocity, or x0) is weighted as epsilon would be: v's loss times SNR / (SNR + 1)."""


class Sigma(core_settings.Settings):
    kind: Literal["sigma"]
    """The loss times sigma^power, sigma being the noise's factor in x_t: t of a flow, √(1 - alphas_cumprod)."""
    power: float = Field(1.0, ge=-4, le=4)
    """1: noisy steps count more; -2 is what SD3's training script calls sigma_sqrt. Sigma counts as 0.001 at least."""


class EDM(core_settings.Settings):
    kind: Literal["edm"]
    """What EDM gives x0: SNR + 1 / sigma_data² (Karras et al. 2022, arXiv:2206.00364, table 1)."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the data; at 1 this is v's own weighting."""


Weighting = Annotated[NoWeighting | MinSNR | P2 | Debiased | SNRv | Sigma | EDM, Field(discriminator="kind")]


def weighting(settings: Weighting, process: Process) -> Callable[[Tensor], Tensor] | None:
    """The weight as a function from t (B,) to (B,) in double precision; None: nothing is weighted.

    Raises ValueError where the weighting says nothing for the process's prediction type.
    """
    if isinstance(settings, NoWeighting):
        return None
    _refuse(settings, process)
    return lambda t: weight(settings, process.snr(t), process.prediction_type)


def weight(settings: MinSNR | P2 | Debiased | SNRv | Sigma | EDM, snr: Tensor, prediction_type: str) -> Tensor:
    """The weight (B,) of a loss of `prediction_type` at `snr` (B,)."""
    snr = snr.clamp(*SNR_RANGE)
    if isinstance(settings, Sigma):
        sigma = 1 / (1 + snr.sqrt()) if prediction_type == "flow" else (1 + snr).rsqrt()
        return sigma.clamp(min=LEAST_SIGMA) ** settings.power
    return _of_x0(settings, snr) / _cost_of_x0(snr, prediction_type)


def _of_x0(settings: MinSNR | P2 | Debiased | SNRv | EDM, snr: Tensor) -> Tensor:
    """W(S): what the squared error of x0 counts."""
    match settings:
        case MinSNR(gamma=gamma, soft=soft):
            return snr * gamma / (snr + gamma) if soft else snr.clamp(max=gamma)
        case P2(k=k, gamma=gamma):
            return snr / (k + snr) ** gamma
        case Debiased():
            return snr.sqrt()
        case SNRv():
            return snr
        case EDM(sigma_data=sigma_data):
            return snr + 1 / sigma_data**2
        case _:
            assert_never(settings)


def _cost_of_x0(snr: Tensor, prediction_type: str) -> Tensor:
    """What a squared error of 1 in x0 costs as a loss of `prediction_type`."""
    if prediction_type == "flow":
        return (1 + snr.sqrt()) ** 2
    return {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]


def _refuse(settings: MinSNR | P2 | Debiased | SNRv | Sigma | EDM, process: Process) -> None:
    what = f"objective.weighting.kind = {settings.kind!r}"
    if isinstance(settings, MinSNR) and process.prediction_type == "flow":
        raise ValueError(f"{what} is not defined for a flow, which this model is: use debiased, sigma, edm or none.")
    if process.prediction_type != "epsilon":
        return
    if isinstance(settings, SNRv):
        raise ValueError(f"{what} changes nothing for a model that predicts the noise, as this one does: leave it out.")
    if isinstance(settings, Debiased | EDM) and not process.snr(torch.tensor([process.timesteps - 1])).all():
        raise ValueError(f"{what} has no bound where no signal is left, as at this model's last step: use min_snr.")
