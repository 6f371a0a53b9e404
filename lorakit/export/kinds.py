"""What a file is that is no LoRA of a known layout: told by its keys, with the way out."""

import re
from collections.abc import Iterable

from lorakit.core.files import printable

_MERGE = "Fold it into its base with the program that made it, or train a LoRA."

# what one key is enough for, what the file then is, and what to do; the first that is found is told
_KINDS = (
    (
        r"\.(dora_scale|lora_magnitude_vector)\b",
        "a DoRA, whose magnitudes every program reads otherwise",
        "Without them it is another adapter: fold it into its base with the program that trained it.",
    ),
    (r"\.hada_[wt][12]", "a LoHa", _MERGE),
    (r"\.lokr_[wt][12]", "a LoKr", _MERGE),
    (r"\.lora_mid\.", "a LoRA in Tucker's form, with a third matrix", _MERGE),
    (r"\.([ab][12]\.weight|bm[12])$", "a GLoRA", _MERGE),
    (r"\.b?oft_", "an OFT or BOFT", _MERGE),
    (r"\.(ia3_l|on_input$)", "an (IA)³", _MERGE),
    (r"\.(vera_lambda|hra_u|fourierft_)", "an adapter of another of peft's kinds", _MERGE),
    (r"\.lora_(A|B|up|down)\.bias$", "a LoRA with biases", _MERGE),
    (r"\.lora_embedding_[AB]\b", "a LoRA of an embedding", _MERGE),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "a full difference of weights and no low-rank adapter", _MERGE),
    (
        r"_lora\.(up|down)\.weight$",
        "in the layout of older versions of diffusers",
        "Load it with diffusers and save it again with save_lora_weights.",
    ),
    (
        r"^(emb_params|string_to_param|clip_[lg])\b",
        "an embedding (textual inversion) and no adapter",
        "Load it as such in the program that draws.",
    ),
    (
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders)\.",
        "a whole model and no adapter",
        "Give it as the base.",
    ),
)


def other_kind(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, and what to do with it; None where nothing speaks against a LoRA."""
    keys = sorted(keys)
    for pattern, what, remedy in _KINDS:
        found = [key for key in keys if re.search(pattern, key)]
        if found:
            count = f"{len(found)} of its {len(keys)} keys say so, the first is {printable(found[0])}"
            return f"it is {what} ({count}), and only plain LoRA is read here. {remedy}"
    return None
