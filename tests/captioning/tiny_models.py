"""Vision-language models with their true configuration, processor and tokenizer classes, and small random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LETTERS = [chr(c) for c in range(33, 127)]
SIDE = 32  # pixels that a picture is made to, where the model wants one size
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_TEXT, "image_size": SIDE, "patch_size": 8}
_CHAT = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}assistant: "
)


def chat(image: str) -> str:
    return _CHAT.replace("IMAGE", image)


def letters_with(*special: str) -> dict[str, int]:
    """A vocabulary of what can be read, and blank and line end as bytes are written, behind special tokens."""
    return {entry: i for i, entry in enumerate([*special, "Ġ", "Ċ", *LETTERS])}


def save(folder: Path, model_class: Any, config: Any, processor: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class(config)
        for parameter in model.parameters():  # larger than models begin with: answers shall depend on pictures
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None  # what says nothing would show nothing
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _size() -> dict[str, Any]:
    return {"size": {"height": SIDE, "width": SIDE}}


def blip(folder: Path) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    letters = [c for c in LETTERS if not c.isupper()]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    tokenizer = BertTokenizer(vocab={entry: i for i, entry in enumerate(entries)})
    # as in the published ones, whose tokenizer does not know the mark that texts begin with
    text = {**_TEXT, "vocab_size": len(entries) + 1, "encoder_hidden_size": 32, "bos_token_id": len(entries)}
    text |= {"pad_token_id": 0}
    config = BlipConfig(
        text_config={**text, "eos_token_id": 3, "sep_token_id": 3}, vision_config=_VISION, projection_dim=16
    )
    return save(
        folder, BlipForConditionalGeneration, config, BlipProcessor(BlipImageProcessorPil(**_size()), tokenizer)
    )


def blip_2(folder: Path) -> Path:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, GPT2Tokenizer
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = GPT2Tokenizer(
        vocab=letters_with("<pad>", "</s>", "<unk>"), merges=[], pad_token="<pad>", bos_token="</s>", eos_token="</s>"
    )
    processor = Blip2Processor(BlipImageProcessorPil(**_size()), tokenizer, num_query_tokens=4)
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = {"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    text |= {
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = Blip2Config(
        vision_config=_VISION,
        qformer_config={**_TEXT, "vocab_size": 8, "encoder_hidden_size": 32},
        text_config=text,
        num_query_tokens=4,
        image_token_index=image,
    )
    return save(folder, Blip2ForConditionalGeneration, config, processor)


def florence2(folder: Path) -> Path:
    from transformers import BartTokenizer, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    places = [f"<loc_{i}>" for i in range(8)]
    tokenizer = BartTokenizer(
        vocab=letters_with("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
        merges=[],
        additional_special_tokens=places,
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    images.image_seq_length = 2
    vision = {"embed_dim": (8, 8, 8, 16), "num_heads": (1, 1, 1, 2), "num_groups": (1, 1, 1, 2)}
    config = Florence2Config(
        vision_config={**vision, "depths": (1, 1, 1, 1), "window_size": 2, "projection_dim": 32},
        text_config={
            "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return save(folder, Florence2ForConditionalGeneration, config, Florence2Processor(images, tokenizer))


def llava(folder: Path) -> Path:
    from transformers import LlamaTokenizer, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    entries = ["<unk>", "<s>", "</s>", "<pad>", "▁", *LETTERS]
    tokenizer = LlamaTokenizer(
        vocab={e: i for i, e in enumerate(entries)}, merges=[], pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("<image>"),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION, "projection_dim": 16},
        text_config={
            "model_type": "llama",
            **_TEXT,
            "vocab_size": len(tokenizer),
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return save(folder, LlavaForConditionalGeneration, config, processor)


def paligemma(folder: Path) -> Path:
    from transformers import GemmaTokenizer, PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    entries = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = GemmaTokenizer(vocab={e: i for i, e in enumerate(entries)}, merges=[])
    images = SiglipImageProcessorPil(**_size())
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "projection_dim": 32},
        text_config={
            "model_type": "gemma", **_TEXT, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )  # fmt: skip
    return save(folder, PaliGemmaForConditionalGeneration, config, processor)


_ROWS = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
_IDEFICS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_ROWS)


def _idefics(folder: Path, config_class: Any, model_class: Any, images: Any) -> Path:
    from transformers import GPT2Tokenizer, Idefics3Processor

    tokenizer = GPT2Tokenizer(
        vocab=letters_with("<|endoftext|>", "<pad>"),
        merges=[],
        pad_token="<pad>",
        additional_special_tokens=[*_IDEFICS],
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=chat("<image>"))
    config = config_class(
        vision_config={**_VISION, "image_size": SIDE},
        text_config={
            "model_type": "llama",
            **_TEXT,
            "vocab_size": len(tokenizer),
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return save(folder, model_class, config, processor)


def idefics3(folder: Path) -> Path:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil as Images

    images = Images(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    return _idefics(folder, Idefics3Config, Idefics3ForConditionalGeneration, images)


def smolvlm(folder: Path) -> Path:
    """Its own processor needs packages for videos, so what it would save is written by hand."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil as Images

    images = Images(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    _idefics(folder, SmolVLMConfig, SmolVLMForConditionalGeneration, images)
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": "SmolVLMProcessor"}))
    return folder


def _qwen(folder: Path, config_class: Any, model_class: Any, vision: dict[str, Any]) -> Path:
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Images

    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(vocab=letters_with("<|endoftext|>"), merges=[], additional_special_tokens=special)
    tokenizer.chat_template = chat("<|vision_start|><|image_pad|><|vision_end|>")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"),
        ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end"),
    )}  # fmt: skip
    text = {**_TEXT, "num_key_value_heads": 1, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = config_class(
        text_config=text, vision_config={"patch_size": 8, "num_heads": 2, "depth": 2, **vision}, **ids
    )
    images = Images(patch_size=8, min_pixels=256, max_pixels=32 * 32)
    save(folder, model_class, config, tokenizer)
    images.save_pretrained(folder)
    return folder


def qwen2_vl(folder: Path) -> Path:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"embed_dim": 32, "hidden_size": 32}
    return _qwen(folder, Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision)


def qwen2_5_vl(folder: Path) -> Path:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 32}
    vision["fullatt_block_indexes"] = [1]
    return _qwen(folder, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)


MODELS: dict[str, Callable[[Path], Path]] = {
    made.__name__: made for made in (blip, blip_2, florence2, llava, paligemma, idefics3, smolvlm, qwen2_vl, qwen2_5_vl)
}
