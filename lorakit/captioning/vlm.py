"""Captions by a vision-language model of transformers: BLIP, BLIP-2, Florence-2, LLaVA, PaliGemma, Idefics3, SmolVLM,
Qwen2-VL and Qwen2.5-VL, and others that take a picture in a chat.

Here: loading it and letting it write. Not here: what it is asked (`prompts.py`) and where its folder is (`models.py`).
"""

import contextlib
import importlib.util
import logging
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image
from pydantic import Field, model_validator

from lorakit.captioning.models import read_config, resolve
from lorakit.captioning.pictures import Picture, looked_at
from lorakit.captioning.prompts import DEFAULT, Manner, manner_of
from lorakit.captioning.protocol import WriterSettings, one_line
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.memory import is_lack
from lorakit.core.seeding import hashed

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOADED: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()  # two writers may share one
_OURS = {"trust_remote_code": False}  # said, or a model that brings code would have it asked for on the terminal
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PLACE = re.compile(r"<loc_\d+>")


class Settings(WriterSettings):
    """A model that looks and writes."""

    kind: Literal["vlm"]

    model: str
    """A folder with the model's config.json, safetensors and processor, or a hub name."""

    styles: list[Literal["short", "detailed", "tags", "subject"]] = Field(default_factory=list)
    """What is written: a sentence, some sentences, tags, or what is around a subject and changes, leaving its fixed
    features out. Each makes a caption. Absent: short. Models that do not chat have some of them only."""

    prompts: list[str] = Field(default_factory=list)
    """What the model is asked, in your words, in the place of styles; each makes a caption, without the prompt."""

    trigger: str = ""
    """The subject's name, for the style `subject`."""

    max_tokens: int = Field(default=150, ge=1)
    """So many tokens of the model's at most in a text."""

    temperature: float = Field(default=0.0, ge=0.0)
    """0: the likeliest words. Above: words are drawn, the more freely the higher."""

    captions: int = Field(default=1, ge=1)
    """How often a picture is asked about with each style or prompt; with a temperature the answers differ."""

    seed: int = 0
    """Of what is drawn. Answers follow from it and from which pictures are looked at together."""

    longest: int = Field(default=1024, ge=16)
    """Pixels of a picture's longer side that the model is shown at most."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the model computes in; auto: bf16 on a GPU that does, fp16 on others, fp32 without a GPU."""

    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Weights in fewer bits by bitsandbytes, on a GPU: half or a quarter of bf16's memory."""

    batch_size: int = Field(default=4, ge=1)
    """How many pictures are looked at together, on each process."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        problems = []
        if self.styles and self.prompts:
            problems.append("styles and prompts are both given: keep one of them.")
        if ("subject" in self.styles) != bool(self.trigger):
            problems.append("the style subject and a trigger go together: give both or none.")
        if self.captions > 1 and not self.temperature:
            problems.append(f"captions = {self.captions} would be {self.captions} times the same: give a temperature.")
        if problems:
            raise ValueError(" ".join(problems))
        return self

    @property
    def texts(self) -> int:
        return self.captions * max(1, len(self.styles) + len(self.prompts))


def check(settings: Settings) -> None:
    """Raises InputError where the folder holds no such model, or it or this machine cannot do what is asked."""
    folder = resolve(settings.model)
    model_type, where = str(read_config(folder).get("model_type")), f"model = {printable(settings.model)}"
    problems = []
    if model_type not in _known_types():
        raise InputError(
            f"{where} is a model of type {printable(model_type)}, which writes no text about pictures. Those that do: "
            "BLIP, BLIP-2, Florence-2, LLaVA, PaliGemma, Idefics3, SmolVLM, Qwen-VL."
        )
    if not any(folder.glob("*.safetensors")):
        problems.append(f"{where} holds no weights (*.safetensors): pickles are not read, save it as safetensors.")
    if not any((folder / name).is_file() for name in _TOKENIZERS):  # transformers would make one that knows no word
        problems.append(f"{where} holds no tokenizer ({', '.join(_TOKENIZERS)}): copy it from the original model.")
    manner = manner_of(model_type)
    lacking = [style for style in settings.styles if style not in manner.styles]
    if lacking:
        problems.append(
            f"styles: a {model_type} does not know {', '.join(lacking)}, only {', '.join(manner.styles)}: choose of "
            "these, give a prompt, or take a model that chats."
        )
    if settings.dtype == "fp16" and not torch.cuda.is_available():
        problems.append("dtype = fp16 needs a GPU, and there is none here: use bf16 or fp32.")
    if settings.quantize != "none" and not torch.cuda.is_available():
        problems.append(f"quantize = {settings.quantize} needs a GPU, and there is none here: leave it out.")
    elif settings.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(f'quantize = {settings.quantize} needs bitsandbytes: pip install "lorakit[bnb]".')
    if problems:
        raise InputError(problems)


def load(settings: Settings, *, root: Path, device: Any) -> "Vlm":
    """Raises InputError where transformers does not load it, or the folder lacks weights."""
    folder = resolve(settings.model)
    where, manner = f"model = {printable(settings.model)}", manner_of(str(read_config(folder).get("model_type")))
    key = f"{folder} {settings.dtype} {settings.quantize} {device}"
    if key in _LOADED:
        return Vlm(_LOADED[key], _processor(folder), settings, manner)
    try:
        processor = _processor(folder)
        model, found = _model(folder, settings, device)
    except Exception as error:  # of dozens of kinds, by what is missing or of another version
        if is_lack(error):
            raise
        raise InputError(f"{where}: transformers does not load it: {printable(error)[:500]}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(
            f"{where} lacks {len(missing)} weights of a {type(model).__name__}, like {missing[0]}: it was made for "
            "another kind or version of model."
        )
    if manner.chat and not processor.chat_template:
        raise InputError(f"{where} has no chat template (chat_template.jinja): copy it from the original model.")
    _LOADED[key] = model
    return Vlm(model, processor, settings, manner)


class Vlm:
    """Asks `model` about pictures, with each prompt as often as is wanted."""

    def __init__(self, model: Any, processor: Any, settings: Settings, manner: Manner) -> None:
        self._model, self._processor, self._settings, self._manner = model, processor, settings, manner
        self.batch_size = settings.batch_size
        styles: list[str] = [*settings.styles] or ([] if settings.prompts else [DEFAULT])
        asked = [(prompt, one_line) for prompt in settings.prompts]
        asked += [
            (manner.styles[style].format(trigger=settings.trigger), _tags if style == "tags" else one_line)
            for style in styles
        ]
        self._asked = [each for each in asked for _ in range(settings.captions)]

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[str, ...] | ValueError]:
        names = [picture.name for picture in pictures]
        return looked_at(pictures, lambda images: self._written(images, names), longest=self._settings.longest)

    def _written(self, images: list[Image.Image], names: Sequence[str]) -> list[tuple[str, ...]]:
        answers = []
        for number, (prompt, read) in enumerate(self._asked):
            with self._seeded(number, *names) if self._settings.temperature else contextlib.nullcontext():
                answers.append([read(text) for text in self._answers(images, prompt)])
        return list(zip(*answers))

    @contextlib.contextmanager
    def _seeded(self, *of: object) -> Iterator[None]:
        """Within it, torch's own generators draw what follows from the seed and `of`; afterwards they are as before."""
        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(hashed("caption", self._settings.seed, *of))
            yield

    @torch.inference_mode()
    def _answers(self, images: list[Image.Image], prompt: str) -> list[str]:
        inputs = self._inputs(images, prompt).to(self._model.device, self._model.dtype)
        sampled: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self._settings.temperature:
            sampled = {"do_sample": True, "temperature": self._settings.temperature}
        tokens = self._model.generate(**inputs, max_new_tokens=self._settings.max_tokens, **sampled)
        texts = self._processor.tokenizer.batch_decode(
            _new(tokens, inputs.get("input_ids")), skip_special_tokens=not self._manner.boxes
        )
        return [_names(text, self._processor.tokenizer) for text in texts] if self._manner.boxes else texts

    def _inputs(self, images: list[Image.Image], prompt: str) -> Any:
        """What the model takes: `prompt` beside each of `images`, padded in front, where it goes on at the end."""
        if self._manner.chat:
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
            prompt = self._processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        prompt = self._manner.mark + prompt
        texts = {"text": [prompt] * len(images)} if prompt else {}
        # each picture as a list of its own: models that may be shown several would take them all for the first prompt's
        nested = [[image] for image in images] if self._manner.chat else images
        try:
            return self._processor(images=nested, **texts, padding=True, padding_side="left", return_tensors="pt")
        except ValueError as error:  # as of words behind a task of Florence-2's
            raise InputError(f"the model does not take the prompt {prompt!r}: {printable(error)}") from error


def _known_types() -> Mapping[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _model(folder: Path, settings: Settings, device: Any) -> tuple[Any, Mapping[str, Any]]:
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    dtype = _dtype(settings.dtype)
    how: dict[str, Any] = {**_OURS, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if settings.quantize == "4bit":
        how["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    elif settings.quantize == "8bit":
        how["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if settings.quantize != "none":
        how["device_map"] = {"": device}
    report = logging.getLogger("transformers.modeling_utils")  # its table of keys is told in one line by `load`
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(folder, **how)
    finally:
        report.setLevel(level)
    return (model if settings.quantize != "none" else model.to(device)).eval(), found


def _dtype(name: str) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _processor(folder: Path) -> Any:
    """The model's processor; where its class reads videos too, which needs further packages, without that part."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    model_type = str(read_config(folder).get("model_type"))
    # SmolVLM's is Idefics3's for pictures, and cannot be made without a package that spells out numbers of frames
    smolvlm = model_type == "smolvlm"
    name = "Idefics3Processor" if smolvlm else PROCESSOR_MAPPING_NAMES.get(model_type)
    kind: Any = getattr(transformers, str(name), None)
    if kind is None or not (smolvlm or "video_processor" in kind.get_attributes()):
        return transformers.AutoProcessor.from_pretrained(folder, **_OURS)

    class OfPictures(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    return OfPictures.from_pretrained(folder, **_OURS)


def _new(tokens: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    """What `tokens` hold behind the prompt's: some models give it back, BLIP without its last token.

    Without a prompt they begin with a mark, which not every tokenizer of BLIP's knows.
    """
    if prompt is None:
        return tokens[:, 1:]
    for asked in (prompt, prompt[:, :-1]):
        length = asked.shape[1]
        if length and tokens.shape[1] >= length and torch.equal(tokens[:, :length], asked):
            return tokens[:, length:]
    return tokens


def _tags(text: str) -> str:
    """A list of tags as it was asked for, whatever list was answered: with commas between, each once."""
    plain = (re.sub(r"^\s*([-*•]|\d+[.)])\s*", "", part).strip(" .\t").lower() for part in re.split(r"[,;\n]", text))
    return ", ".join(dict.fromkeys(tag for tag in plain if tag))


def _names(text: str, tokenizer: Any) -> str:
    """A text with its special tokens left out; where places stand behind names, the names, each once."""
    special = sorted((str(token) for token in tokenizer.all_special_tokens), key=len, reverse=True)
    for token in special:
        if not _PLACE.fullmatch(token):
            text = text.replace(token, " ")
    if not _PLACE.search(text):
        return text
    return ", ".join(dict.fromkeys(name for part in _PLACE.split(text) if (name := one_line(part))))
