"""What transformers on flows share: the process is the scheduler's, and what is no flow's is refused by its file."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorakit.core.errors import InputError
from lorakit.families import base, sd, sd3, transformer, vae
from lorakit.families.source import Source


def test_the_flow_is_the_schedulers_own() -> None:
    pipeline = sd3.tiny().stock_pipeline()
    pipeline.scheduler.set_timesteps(5)
    flow = transformer.process(sd3.tiny().source)
    assert (flow.prediction_type, flow.shift) == ("flow", 3.0)
    sigmas = flow.sigmas(5, spacing="stock").float()
    torch.testing.assert_close(sigmas, pipeline.scheduler.sigmas, rtol=1e-5, atol=1e-6)


def test_a_scheduler_of_no_flow_is_refused_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    for stock in (sd.tiny().path / "scheduler" / base.SCHEDULER, None):
        file = tmp_path / "scheduler" / base.SCHEDULER
        if stock:
            shutil.copy(stock, file)
        else:
            file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}))
        with pytest.raises(InputError, match=r"scheduler_config\.json: .*(no|not).* flow\.$"):
            transformer.process(Source(tmp_path))


def test_a_description_counts_in_patches() -> None:
    factor = vae.factor(sd3.tiny().path)
    found = transformer.describe(
        sd3.tiny().source,
        sd3.StableDiffusion3,
        factor=factor,
        channels=8,
        patch=2,
        resolution=32,
        token_limit=5,
        count_tokens=len,
        text_size=7,
    )
    assert found.side_multiple == found.drawing_multiple == 2 * factor
    assert found.latent_size(32, 64) == 8 * (32 // factor) * (64 // factor)
    assert found.weight_shapes("transformer")["transformer_blocks.0.attn.to_q"] == (16, 16)
