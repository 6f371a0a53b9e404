import logging
import os
import subprocess
import sys

import pytest

from lorakit.core.quiet import quiet_libraries

SILENCED = [
    ("transformers.distributed.tensor_parallel", "The following layers were not sharded: model.a, model.b"),
    (
        "transformers.utils.import_utils",
        "`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIPImageProcessorPil` for "
        "backward compatibility.",
    ),
    (
        "transformers.integrations.peft",
        "\x1b[1mCLIPTextModel LOAD REPORT\x1b[0m from: None\nKey | Status |\nfinal_layer_norm.bias | MISSING |",
    ),
    (
        "transformers.modeling_utils",
        "[transformers] \x1b[1mQwen3Model LOAD REPORT\x1b[0m from: base/te\nKey            | Status     |  | \n"
        "---------------+---------\nlm_head.weight | \x1b[38;5;208mUNEXPECTED\x1b[0m |  | \n\nNotes:\n- UNEXPECTED:",
    ),
    (
        "diffusers.models.modeling_utils",
        "There are modules in UNet2DConditionModel that should be kept in float32: []. Casting directly with `to()` …",
    ),
    (
        "diffusers.loaders.lora_base",
        "No LoRA keys associated to CLIPTextModel found with the prefix='text_encoder'. This is safe to ignore …",
    ),
    (
        "transformers.tokenization_utils_base",
        "[transformers] Token indices sequence length is longer than the specified maximum sequence length for this "
        "model (60 > 32).",
    ),
]
KEPT = [
    ("transformers.utils.import_utils", "Disabling PyTorch because PyTorch >= 2.6 is required but found 1.0"),
    (
        "transformers.integrations.peft",
        "\x1b[1mCLIPTextModel LOAD REPORT\x1b[0m from: base/te\nKey | Status |\nfinal_layer_norm.bias | MISSING |",
    ),
    (
        "transformers.modeling_utils",
        "Qwen3Model LOAD REPORT from: base/te\nKey | Status |\n---+---\nlm_head.weight | UNEXPECTED |\n"
        "norm.weight | MISSING |\n\nNotes:",
    ),
    (
        "transformers.integrations.peft",
        "CLIPTextModel LOAD REPORT from: None\nKey | Status |\nlayers.0.q_proj.lora_A.weight | MISSING |",
    ),
    (
        "diffusers.models.modeling_utils",
        "There are modules in T5EncoderModel that should be kept in float32: ['wo']. Casting directly with `to()` …",
    ),
    ("diffusers.loaders.lora_base", "No LoRA keys associated to UNet2DConditionModel found with the prefix='unet'."),
    ("diffusers.loaders.lora_pipeline", "Loading adapter weights from state_dict led to unexpected keys"),
]


def says(logger, message):
    record = logging.LogRecord(logger, logging.WARNING, "file.py", 1, message, (), None)
    return bool(logging.getLogger(logger).filter(record))


@pytest.mark.parametrize(("logger", "message"), SILENCED)
def test_known_noise_is_silent(logger, message):
    quiet_libraries()
    assert not says(logger, message)


@pytest.mark.parametrize(("logger", "message"), KEPT)
def test_what_matters_is_heard(logger, message):
    quiet_libraries()
    assert says(logger, message)


def test_twice_is_once():
    quiet_libraries()
    count = len(logging.getLogger(SILENCED[0][0]).filters)
    quiet_libraries()
    assert len(logging.getLogger(SILENCED[0][0]).filters) == count


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    quiet_libraries()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def run(code):
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_quiet_itself_imports_nothing_heavy():
    run(
        "import sys; from lorakit.core.quiet import quiet_libraries; quiet_libraries();"
        'assert not {"torch", "diffusers", "transformers", "numpy", "pydantic"} & set(sys.modules)'
    )


def test_importing_the_libraries_says_nothing(monkeypatch):
    """A library that changes its words is noticed here; its bars obey even a call that comes late."""
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    run("""
import transformers.utils.logging
from lorakit.core.quiet import quiet_libraries
quiet_libraries()
from diffusers import StableDiffusionPipeline
quiet_libraries()
import diffusers.utils.logging
assert not diffusers.utils.logging.is_progress_bar_enabled()
assert not transformers.utils.logging.is_progress_bar_enabled()
""")
