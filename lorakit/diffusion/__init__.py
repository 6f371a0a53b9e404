"""Latent diffusion on one page: each concept, its equation, and the function that is it. No network is in this package.

The same in pictures, drawn by these very functions: docs/latent-diffusion.md.

**Latent space** (Rombach et al. 2022, arXiv:2112.10752, section 3.1). An autoencoder takes pixels to latents and back,
z = scale · E(pixels), pixels = D(z / scale), with 4 to 16 channels and an eighth of the sides, so that everything below
happens on a few hundredths of the numbers. x0 is z. `lorakit.families`: `encode_images` of each family.

**Forward process**: noise is mixed into x0, the more the larger t.

- Gaussian diffusion (Ho et al. 2020, arXiv:2006.11239, eq. 4): x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, where a_t is
  the product of 1 - beta_s for all s up to t: `GaussianDiffusion.q_sample`. Which betas: `gaussian.SCHEDULES`; down to
  nothing but noise (Lin et al. 2023, arXiv:2305.08891): `gaussian.rescale_zero_terminal_snr`.
- Rectified flow (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206): x_t = (1 - t) x0 + t noise:
  `RectifiedFlow.q_sample`. Larger pictures need more noise to be hidden: `flow.shift_time`, `flow.DynamicShift`.
- How much of x0 is left, signal² / sigma²: `GaussianDiffusion.snr`, `RectifiedFlow.snr`.

**What is learned**: min E |predict(x_t, t, text) - target|² over x0, noise and t (Ho et al., eq. 14).

- The target is the noise, v = sqrt(a_t) noise - sqrt(1 - a_t) x0 (Salimans and Ho 2022, arXiv:2202.00512), or x0:
  `GaussianDiffusion.target`; or the velocity noise - x0: `RectifiedFlow.target`. At a given x_t each says what the
  others would: `GaussianDiffusion.convert`, `GaussianDiffusion.predict_x0`, `RectifiedFlow.predict_x0`.
- Which t is drawn: `timesteps.law`; with which noise: `noise.noises`; how much t counts: `weightings.weighting`; what a
  difference costs: `losses.loss`. They meet, in the mean over a picture, in `lorakit.diffusion.objectives`.

**Backbone**: `predict` is a U-Net (Rombach et al., section 3.2) or a transformer over patches of latents (Peebles and
Xie 2022, arXiv:2212.09748) that attends to the text's states: softmax(Q Kᵀ / sqrt(d)) V with Q of the latents, K and V
of the text (Rombach et al., section 3.3). `lorakit.families`: `encode_text` and `predict` of each family. Adapters are
low-rank changes of its weights, W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685): `lorakit.adapters`.

**Reverse process**: from noise back to x0, a step at a time.

- q(x_{t-1} | x_t, x0) is known, with its mean and variance (Ho et al., eq. 6 and 7): `GaussianDiffusion.q_posterior`;
  with x0 as predicted it is the step back, p(x_{t-1} | x_t): `GaussianDiffusion.p_mean_variance`; drawn (algorithm 2):
  `GaussianDiffusion.p_sample`, `GaussianDiffusion.p_sample_loop`.
- Longer steps, with as much fresh noise as eta says, or none (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16):
  `GaussianDiffusion.ddim_step`, `GaussianDiffusion.ddim_sample_loop`, at `GaussianDiffusion.trailing_timesteps`.
- A flow is followed against its velocity, dx_t / dt = v: `RectifiedFlow.euler_step`, `RectifiedFlow.heun_step`,
  `RectifiedFlow.sample_loop`, at the times `RectifiedFlow.sigmas`.

**Guidance** (Ho and Salimans 2022, arXiv:2207.12598, eq. 6): away from what the model predicts without the text,
predict(∅) + guidance · (predict(text) - predict(∅)). The predictions without text are learned by leaving captions out
now and then (`lorakit.data.captions`, `caption_dropout`) and asked for in sampling (`lorakit.sampling.pictures`).
"""

from lorakit.diffusion.flow import RectifiedFlow as RectifiedFlow
from lorakit.diffusion.gaussian import GaussianDiffusion as GaussianDiffusion
