"""The noise that libraries make while they are imported and models are loaded, silenced message by message.

Only messages that are listed here disappear; every other log line and warning of a library stays visible. Nothing
heavy is imported.
"""

import logging
import os
import re
import sys
from collections.abc import Iterable

# what makes a library silent is read by it at import, so it must be set before; what the user has set himself stays
_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bar "Loading weights" obeys it too
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers complains in every loader process that is forked after use
}

# logger that says it -> (what the whole message looks like, why it says nothing to our users)
_KNOWN = {
    "transformers.utils.import_utils": [
        # lorakit feeds no picture through an image processor, and torchvision is left out on purpose
        r"`\w+` requires torchvision \(not installed\); falling back to `\w+Pil`",
    ],
    "transformers.integrations.peft": [
        # an adapter loaded into a text encoder: all weights but the adapter's are "missing", as they should be. A
        # report on a model's own files names their folder instead of None and stays, and so does one on adapter weights
        r"(\x1b\[\d*m)*\w+ LOAD REPORT(\x1b\[\d*m)* from: None\n(?!.*(lora_|UNEXPECTED|MISMATCH|CONVERSION))",
    ],
    "transformers.distributed.tensor_parallel": [
        # in every one of several processes, whether anybody asked for layers to be shared out or not
        r"The following layers were not sharded:",
    ],
    "transformers.modeling_utils": [
        # a language model that reads captions is loaded without the head by which it would answer, and nothing else is
        r"(\x1b\[\d*m)*\w+ LOAD REPORT(\x1b\[\d*m)* from: [^\n]*\nKey[^\n]*\n[^\n]*\nlm_head\.weight\b[^\n]*UNEXPECTED"
        r"[^\n]*\n\nNotes:",
    ],
    "transformers.tokenization_utils_base": [
        # said whenever tokens are counted; what is cut off a caption, lorakit and the stock pipeline say themselves
        r"Token indices sequence length is longer than the specified maximum sequence length for this model",
    ],
    "bitsandbytes.backends.cpu.ops": [
        # a faster product of 4-bit weights, which nothing here computes on a CPU
        r"Failed to load CPU gemm_4bit_forward from kernels-community",
    ],
    "diffusers.models.modeling_utils": [
        # the list of modules is empty
        r"There are modules in \w+ that should be kept in float32: \[\]\.",
    ],
    "diffusers.loaders.lora_base": [
        # an adapter for the backbone alone; the same message about a backbone stays
        r"No LoRA keys associated to \w+ found with the prefix='text_encoder(_\d)?'\.",
    ],
}


class _Known(logging.Filter):
    def __init__(self, patterns: Iterable[str]) -> None:
        super().__init__()
        self._patterns = [re.compile(pattern, re.DOTALL) for pattern in patterns]

    def filter(self, record: logging.LogRecord) -> bool:
        message = re.sub(r"^\[\w+\] ", "", record.getMessage())
        return not any(pattern.match(message) for pattern in self._patterns)


def quiet_libraries() -> None:
    """Silences the known noise; call it before the libraries are imported, and again after diffusers was.

    The second call is for the loading bars of libraries that are imported already, which only their own functions
    switch off ("Loading pipeline components" in any case).
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, patterns in _KNOWN.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Known) for known in logger.filters):
            logger.addFilter(_Known(patterns))
    if os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] in ("1", "true", "TRUE", "YES", "ON"):
        for library in ("diffusers", "transformers"):
            imported = sys.modules.get(f"{library}.utils.logging")
            if imported is not None:
                imported.disable_progress_bar()
