"""A source's entry in a recipe. What its `path` leads to is looked at later, by `open_source`."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lorakit.core.settings import Neutral
from lorakit.data.captions import CaptionSettings
from lorakit.data.cut import PictureSettings
from lorakit.data.sources.generate import GenerateSettings
from lorakit.data.sources.sidecars import captions_of

# what only tables of `datasets` have
TABLE_KEYS = ("split", "subset", "revision", "image_column", "input_column", "caption_column", "streaming")


class SourceSettings(CaptionSettings, PictureSettings):
    """Pictures with captions: a folder, a dataset on disk or by name, parquet files or tars."""

    path: str
    """A folder (`a.jpg` with `a.txt` beside it, in any depth, hidden files left out), a dataset saved by `datasets`,
    parquet files, WebDataset tars (`x-{000..010}.tar`), or `hf://datasets/OWNER/NAME`."""

    role: Literal["train", "regularization", "validation"] = "train"
    """`regularization`: pictures of what the model shall keep, drawn as often as all training pictures together;
    `validation`: never trained on, only measured."""

    generate: GenerateSettings | None = None
    """Pictures that the base draws into `path`, a folder, before it is trained: for a regularization source."""

    repeats: int = Field(default=1, ge=1, le=1_000_000)
    """How often each picture is seen in an epoch (of a regularization source: how often relative to the others)."""

    samples_per_epoch: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """So many samples an epoch, whatever the number of pictures; they are walked through over the epochs."""

    weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Factor on the loss of this source's pictures."""

    start_step: int = Field(default=0, ge=0)
    """The source takes part in epochs that begin at this step or later."""

    end_step: int | None = Field(default=None, ge=1)
    """The source takes part in epochs that begin before this step."""

    default_caption: str | None = None
    """The caption of pictures that have none of their own."""

    allow_missing_captions: Neutral[bool] = False
    """Whether pictures without a caption may be trained on (with the trigger alone, if there is one)."""

    mask_path: str | None = None
    """A folder with a mask for each picture, under the same relative name but with `.png`; absent: `a.mask.png` beside
    `a.jpg`."""

    input_path: str | None = None
    """A folder with the picture that an editing model is to begin with for each picture, of the same shape and under
    the same relative name, whatever its suffix; the caption is the instruction."""

    split: str | None = None
    """Which split of a dataset (datasets and parquet only); absent: train."""

    subset: str | None = None
    """Which configuration of a dataset by name."""

    revision: str | None = None
    """Which revision of a dataset by name: a branch, tag or commit."""

    image_column: str = "image"
    """The column that holds the pictures (datasets and parquet only)."""

    input_column: str | None = None
    """The column that holds the pictures which an editing model is to begin with (datasets and parquet only)."""

    caption_column: str | None = None
    """The column, or the key in metadata.jsonl and metadata.csv, that holds the captions; absent: text, caption or
    prompt."""

    streaming: Neutral[bool] = False
    """Whether a dataset's rows are read as they come and kept in the cache, not downloaded and converted first."""

    @field_validator("generate")
    @classmethod
    def _of_what_is_kept(cls, value: GenerateSettings | None, info: ValidationInfo) -> GenerateSettings | None:
        if value is not None and info.data.get("role") != "regularization":
            raise ValueError('what the base draws is to be kept and not learnt: it needs role = "regularization".')
        if value is not None and info.data.get("path", "").endswith((".tar", ".parquet")):
            raise ValueError("it is drawn into a folder: name one as the source's path.")
        return value

    @field_validator("repeats", "samples_per_epoch", "start_step", "end_step")
    @classmethod
    def _only_in_training(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("role") == "validation" and value not in (
            None,
            cls.model_fields[str(info.field_name)].default,
        ):
            raise ValueError("a validation source is not trained on: remove it.")
        return value

    @model_validator(mode="after")
    def _all_has_effect(self) -> Self:
        if self.role == "validation":
            in_training = "weight", "flip", "color_jitter", "caption_dropout", "conditioning_dropout", "tag_dropout"
            for key in (*in_training, "shuffle_tags"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} has no effect on a validation source: remove it.")
        return self

    @field_validator("samples_per_epoch")
    @classmethod
    def _one_count(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("repeats", 1) > 1:
            raise ValueError("repeats and samples_per_epoch are both given: keep one of them.")
        return value

    @field_validator("end_step")
    @classmethod
    def _later(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value <= info.data.get("start_step", 0):
            raise ValueError(f"it must be greater than start_step, {info.data['start_step']}.")
        return value

    @field_validator("default_caption")
    @classmethod
    def _is_caption(cls, value: str | None) -> str | None:
        if value is not None:
            captions_of(value)
        return value

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if self.input_column is not None and self.input_path is not None:
            raise ValueError("input_path and input_column are both given: keep one of them.")
        if self.input_column is not None and self.streaming:
            raise ValueError("input_column is not read of rows that stream: remove streaming.")
        if self.conditioning_dropout and self.input_path is None and self.input_column is None:
            raise ValueError("conditioning_dropout is of pairs: name the pictures to begin with by input_path.")
        return self

    @field_validator("mask_path")
    @classmethod
    def _mask_is_used(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("mask", "auto") != "auto":
            raise ValueError(f'mask = "{info.data["mask"]}" leaves it unused: remove one of them.')
        return value
