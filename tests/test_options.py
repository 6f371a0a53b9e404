"""Every option of a recipe does what it says: numeric ones change a number of the training, neutral ones none.

All settings classes are walked, so an option that is added without a case here fails. The numbers are what a training
leaves but for its times: `metrics.jsonl`, the checkpoint at its end, and the adapter that goes with it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from lorakit.core.errors import InputError
from lorakit.core.settings import is_neutral
from lorakit.families import DEFAULT, FAMILIES, sd, source
from lorakit.recipe import CHOSEN, FIXED, apply_override, build
from lorakit.training import execution
from lorakit.training.keeper import Keeper
from lorakit.verbs.train import train
from tests.families.single import single_file

# -- the options ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A field, "optimizer.betas", or the choice of a kind, "optimizer.kind=lion"; there where `chosen` is said."""

    key: str
    chosen: tuple[str, ...]
    neutral: bool = False

    def __str__(self) -> str:
        return " ".join((self.key, *(word.rpartition("=")[2] for word in self.chosen)))


def options() -> dict[str, Option]:
    """Every option of a recipe, by its name."""
    found: list[Option] = []
    for section, (registry, chooser, default) in CHOSEN.items():
        for kind in registry.names():
            word = () if kind == default else (f"{section}.{chooser}={kind}",)
            settings = registry.module(kind).Settings
            # what all families inherit is tried with one of them
            common = source.Settings.model_fields.keys() if word and issubclass(settings, source.Settings) else ()
            found += _of_class(settings, section, word, chooser, tried=frozenset(common))
    for section, settings in FIXED.items():
        found += _of_class(settings, section, ())
    return {str(option): option for option in found}


def _of_class(
    settings: type[BaseModel],
    where: str,
    chosen: tuple[str, ...],
    chooser: str = "kind",
    *,
    tried: frozenset[str] = frozenset(),
) -> Iterator[Option]:
    for name, field in settings.model_fields.items():
        key, models = f"{where}.{name}", list(_models(field.annotation))
        if name == chooser and len(get_args(field.annotation)) == 1:
            if chosen and chosen[-1].startswith(f"{key}=") and (field.is_required() or where in CHOSEN):
                yield Option(chosen[-1], chosen[:-1])
        elif not models and name not in tried:
            yield Option(key, chosen, is_neutral(settings, name))
        common: frozenset[str] = frozenset()  # what the kinds of one thing inherit is tried with the first of them
        for model in models:
            kind = model.model_fields.get("kind")
            word = (f"{key}.kind={get_args(kind.annotation)[0]}",) if kind and len(models) > 1 else ()
            yield from _of_class(
                model, f"{key}.0" if get_origin(field.annotation) is list else key, chosen + word, tried=common
            )
            common |= model.model_fields.keys() - model.__annotations__.keys()


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


# -- what each is changed to ------------------------------------------------------------------------------------------

FURTHER = [name for name in FAMILIES.names() if name != DEFAULT]  # families
# what a choice cannot do without
ALONG = {
    **{f"model.family={name}": f"model.path={name}" for name in FURTHER},
    "objective.timesteps.kind=list": "objective.timesteps.values=[10, 500]",
    "objective.preservation.kind=differential_output": "data.sources.0.class_words.thing=x",
}
# what both runs have where this is chosen
GIVEN = {
    **{f"objective.weighting.kind={kind}": ["model.path=v"] for kind in ("snr_v", "debiased", "edm")},
    "objective.weighting.kind=min_snr": ["objective.timesteps.max=0.1", "objective.timesteps.kind=uniform"],
    "objective.preservation.kind=masked_prior": ["data.sources.0.mask_path=masks"],
}
TEXT_ENCODER = ["adapter.text_encoder.rank=2"]
PATTERN = ["adapter.patterns=[{match='to_q',rank=1}]"]
OF_TEXT = [*TEXT_ENCODER, "adapter.text_encoder.patterns=[{match='mlp',rank=1}]"]
TWO = ["data.sources.1.path=two", "data.sources.1.caption_dropout=0"]
COMPARED = [*TWO, "data.sources.1.class_prompt=a dog", "objective.preservation={kind='differential_output'}"]
DRAWN = [
    "data.sources.1.path=two",
    "data.sources.0.path=drawn",
    "data.sources.0.role=regularization",
    "data.sources.0.generate={prompts=['thing'], count=2, steps=1, sizes=[[32, 32]]}",
]
OFFSET = ["objective.noise.offset.strength=0.1"]
PYRAMID = ["objective.noise.pyramid.iterations=3"]
PERTURBED = ["objective.noise.perturbation.gamma=0.1"]
TAGS = ["data.sources.0.path=tags"]
DATASET = ["data.sources.0.path=dataset"]
FINDING = ["optimizer.lr=1.0", "optimizer.d_coef=50.0", "run.steps=10"]  # Prodigy moves its estimate
EMA = ["run.ema.decay=0.5"]
FOR_GOOD = ["data.validation=0.5", "run.validate_every=1"]
EDIT = ["model.path=edit", "data.sources.0.input_path=two"]
COLUMNS = ["model.path=edit", *DATASET, "data.sources.0.input_column=image"]
INPAINT = ["model.path=inpaint", "data.sources.0.mask_path=masks"]
PROMPT = ["sample.prompts=['thing']", "sample.steps=1", "sample.width=32", "sample.height=32", "run.sample_every=1"]

OVER = [*PROMPT, "model.path=inpaint", "sample.image=one/0.png", "sample.mask=masks/0.png"]

# the change, or what both runs have and the change
CASES: dict[str, str | tuple[list[str], str]] = {
    "model.path": "model.path=other",
    "model.config": (["model.path=single.safetensors", "model.config=v"], "model.config=other"),
    "model.revision": (["model.path=some/model", "model.revision=first"], "model.revision=second"),
    "model.variant": (["model.path=variants"], "model.variant=own"),
    "model.vae": "model.vae=vae",
    "model.vae_tiling": (["data.buckets={resolution=96, max_upscale=4}"], "model.vae_tiling=64"),
    "model.dtype": "model.dtype=bf16",
    "model.quantize": "model.quantize=int8",
    "model.compute": "model.compute=int8",
    "model.max_sequence_length": "model.max_sequence_length=7",
    "model.guidance": "model.guidance=3.5",
    "model.caption_chunks": "model.caption_chunks=2",
    "model.true_mask": "model.true_mask=true",
    "model.system_prompt": "model.system_prompt=Draw well.",
    "adapter.init_from": "adapter.init_from=adapter.safetensors",
    "adapter.rslora": "adapter.rslora=true",
    "adapter.fused": "adapter.fused=false",
    "adapter.rank": "adapter.rank=3",
    "adapter.alpha": "adapter.alpha=1",
    "adapter.dropout": "adapter.dropout=0.5",
    "adapter.lr": "adapter.lr=0.02",
    "adapter.targets": "adapter.targets=['to_q']",
    "adapter.blocks": "adapter.blocks=mid_block",
    "adapter.patterns.0.match": (PATTERN, "adapter.patterns.0.match=attn2"),
    "adapter.patterns.0.rank": (PATTERN, "adapter.patterns.0.rank=3"),
    "adapter.patterns.0.alpha": (PATTERN, "adapter.patterns.0.alpha=3"),
    "adapter.patterns.0.lr": (PATTERN, "adapter.patterns.0.lr=0.02"),
    "adapter.text_encoder.rslora": (TEXT_ENCODER, "adapter.text_encoder.rslora=true"),
    "adapter.text_encoder.rank": "adapter.text_encoder.rank=2",
    "adapter.text_encoder.alpha": (TEXT_ENCODER, "adapter.text_encoder.alpha=1"),
    "adapter.text_encoder.dropout": (TEXT_ENCODER, "adapter.text_encoder.dropout=0.5"),
    "adapter.text_encoder.lr": (TEXT_ENCODER, "adapter.text_encoder.lr=0.02"),
    "adapter.text_encoder.targets": (TEXT_ENCODER, "adapter.text_encoder.targets=['q_proj']"),
    "adapter.text_encoder.blocks": (TEXT_ENCODER, "adapter.text_encoder.blocks=layers.1-3"),
    "adapter.text_encoder.patterns.0.match": (OF_TEXT, "adapter.text_encoder.patterns.0.match=fc1"),
    "adapter.text_encoder.patterns.0.rank": (OF_TEXT, "adapter.text_encoder.patterns.0.rank=3"),
    "adapter.text_encoder.patterns.0.alpha": (OF_TEXT, "adapter.text_encoder.patterns.0.alpha=3"),
    "adapter.text_encoder.patterns.0.lr": (OF_TEXT, "adapter.text_encoder.patterns.0.lr=0.02"),
    "objective.timesteps.min": "objective.timesteps.min=0.6",
    "objective.timesteps.max": "objective.timesteps.max=0.4",
    "objective.timesteps.mean": "objective.timesteps.mean=2",
    "objective.timesteps.std": "objective.timesteps.std=0.3",
    "objective.timesteps.scale": "objective.timesteps.scale=0.5",
    "objective.timesteps.alpha": "objective.timesteps.alpha=5",
    "objective.timesteps.beta": "objective.timesteps.beta=5",
    "objective.timesteps.shift": "objective.timesteps.shift=0.2",
    "objective.timesteps.power": "objective.timesteps.power=9",
    "objective.timesteps.values": "objective.timesteps.values=[700]",
    "objective.timesteps.stratified": "objective.timesteps.stratified=true",
    "objective.timesteps.model_shift": "objective.timesteps.model_shift=true",
    "objective.noise.offset.strength": "objective.noise.offset.strength=0.2",
    "objective.noise.offset.adaptive": (OFFSET, "objective.noise.offset.adaptive=0.5"),
    "objective.noise.offset.random": (OFFSET, "objective.noise.offset.random=true"),
    "objective.noise.pyramid.iterations": (PYRAMID, "objective.noise.pyramid.iterations=2"),
    "objective.noise.pyramid.discount": (PYRAMID, "objective.noise.pyramid.discount=0.8"),
    "objective.noise.perturbation.gamma": "objective.noise.perturbation.gamma=0.3",
    "objective.noise.perturbation.random": (PERTURBED, "objective.noise.perturbation.random=true"),
    "objective.weighting.gamma": "objective.weighting.gamma=0.5",
    "objective.weighting.soft": "objective.weighting.soft=true",
    "objective.weighting.k": "objective.weighting.k=3",
    "objective.weighting.power": "objective.weighting.power=-2",
    "objective.weighting.sigma_data": "objective.weighting.sigma_data=0.9",
    "objective.preservation.weight": "objective.preservation.weight=5",
    "objective.loss.delta": "objective.loss.delta=0.01",
    "objective.loss.schedule": "objective.loss.schedule=snr",
    "optimizer.lr": "optimizer.lr=0.003",
    "optimizer.max_grad_norm": "optimizer.max_grad_norm=1e-5",
    "optimizer.betas": "optimizer.betas=[0.5, 0.6]",
    "optimizer.eps": "optimizer.eps=0.01",
    "optimizer.weight_decay": "optimizer.weight_decay=0.5",
    "optimizer.weight_decay prodigy": (["optimizer.d0=1e-4"], "optimizer.weight_decay=0.5"),
    "optimizer.schedule.kind": "optimizer.schedule.kind=linear",
    "optimizer.schedule.warmup": "optimizer.schedule.warmup=2",
    "optimizer.schedule.floor": (["optimizer.schedule.kind=linear"], "optimizer.schedule.floor=0.5"),
    "optimizer.schedule.restarts": (["optimizer.schedule.kind=cosine"], "optimizer.schedule.restarts=1"),
    "optimizer.schedule.power": (["optimizer.schedule.kind=polynomial"], "optimizer.schedule.power=3"),
    "optimizer.schedule.decay": (["optimizer.schedule.kind=wsd"], "optimizer.schedule.decay=0.9"),
    "optimizer.clip_threshold": "optimizer.clip_threshold=0.1",
    "optimizer.decay_rate": "optimizer.decay_rate=-0.3",
    "optimizer.beta1": "optimizer.beta1=0.9",
    "optimizer.d_coef": (FINDING, "optimizer.d_coef=90.0"),
    "optimizer.d0": "optimizer.d0=1e-3",
    "optimizer.growth_rate": (FINDING, "optimizer.growth_rate=1.01"),
    "optimizer.bias_correction": "optimizer.bias_correction=false",
    "optimizer.safeguard_warmup": (["optimizer.schedule.warmup=2"], "optimizer.safeguard_warmup=false"),
    "optimizer.slice_p": "optimizer.slice_p=11",
    "data.sources.0.path": "data.sources.0.path=two",
    "data.sources.0.role": (TWO, "data.sources.0.role=regularization"),
    "data.sources.0.repeats": (TWO, "data.sources.0.repeats=2"),
    "data.sources.0.samples_per_epoch": (TWO, "data.sources.0.samples_per_epoch=1"),
    "data.sources.0.weight": "data.sources.0.weight=0.5",
    "data.sources.0.start_step": (TWO, "data.sources.0.start_step=1"),
    "data.sources.0.end_step": ([*TWO, "run.steps=6"], "data.sources.0.end_step=1"),
    "data.sources.0.generate.prompts": (DRAWN, "data.sources.0.generate.prompts=['other']"),
    "data.sources.0.generate.count": (DRAWN, "data.sources.0.generate.count=3"),
    "data.sources.0.generate.negative_prompt": (DRAWN, "data.sources.0.generate.negative_prompt=blur"),
    "data.sources.0.generate.steps": (DRAWN, "data.sources.0.generate.steps=2"),
    "data.sources.0.generate.guidance": (DRAWN, "data.sources.0.generate.guidance=2.0"),
    "data.sources.0.generate.seed": (DRAWN, "data.sources.0.generate.seed=7"),
    "data.sources.0.generate.sizes": (DRAWN, "data.sources.0.generate.sizes=[[48, 48]]"),
    "data.sources.0.default_caption": (
        ["data.sources.0.path=bare", "data.sources.0.allow_missing_captions=true"],
        "data.sources.0.default_caption=a thing",
    ),
    "data.sources.0.mask_path": "data.sources.0.mask_path=masks",
    "data.sources.0.split": (DATASET, "data.sources.0.split=test"),
    "data.sources.0.image_column": (DATASET, "data.sources.0.image_column=image_2"),
    "data.sources.0.caption_column": (DATASET, "data.sources.0.caption_column=text_2"),
    "data.sources.0.trigger": "data.sources.0.trigger=qzx",
    "data.sources.0.prefix": "data.sources.0.prefix=a photo of",
    "data.sources.0.suffix": "data.sources.0.suffix=at noon",
    "data.sources.0.caption_dropout": "data.sources.0.caption_dropout=1.0",
    "data.sources.0.shuffle_tags": (TAGS, "data.sources.0.shuffle_tags=true"),
    "data.sources.0.keep_tags": ([*TAGS, "data.sources.0.shuffle_tags=true"], "data.sources.0.keep_tags=2"),
    "data.sources.0.tag_dropout": (TAGS, "data.sources.0.tag_dropout=0.5"),
    "data.sources.0.drop_tags": ([*TAGS, "data.sources.0.tag_dropout=0.9"], "data.sources.0.drop_tags=['a']"),
    "data.sources.0.never_drop": ([*TAGS, "data.sources.0.tag_dropout=0.9"], "data.sources.0.never_drop=['b*']"),
    "data.sources.0.lines": (["data.sources.0.path=lines"], "data.sources.0.lines=text"),
    "data.sources.0.wildcards": (["data.sources.0.path=lines"], "data.sources.0.wildcards=false"),
    "data.sources.0.crop": "data.sources.0.crop=random",
    "data.sources.0.flip": "data.sources.0.flip=1.0",
    "data.sources.0.color_jitter": "data.sources.0.color_jitter=0.5",
    "data.sources.0.jitter_variants": (["data.sources.0.color_jitter=0.5"], "data.sources.0.jitter_variants=3"),
    "data.sources.0.background": (["data.sources.0.path=clear"], "data.sources.0.background=#112233"),
    "data.sources.0.mask": (["data.sources.0.path=clear"], "data.sources.0.mask=alpha"),
    "data.sources.0.input_path": (EDIT, "data.sources.0.input_path=tags"),
    "data.sources.0.input_column": (COLUMNS, "data.sources.0.input_column=image_2"),
    "data.sources.0.conditioning_dropout": (EDIT, "data.sources.0.conditioning_dropout=0.3"),
    "data.sources.0.mask_means": (INPAINT, "data.sources.0.mask_means=repaint"),
    "data.sources.0.mask_floor": (["data.sources.0.mask_path=masks"], "data.sources.0.mask_floor=0.5"),
    "data.buckets.resolution": "data.buckets.resolution=40",
    "data.buckets.multiple": "data.buckets.multiple=16",
    "data.buckets.max_aspect": "data.buckets.max_aspect=1.0",
    "data.buckets.max_upscale": (["data.buckets.resolution=[32, 64]"], "data.buckets.max_upscale=1.0"),
    "data.buckets.max_crop": "data.buckets.max_crop=0.49",
    "data.validation": "data.validation=0.5",
    "data.cache_latents": "data.cache_latents=false",
    "data.caption_variants": ([*TAGS, "data.sources.0.shuffle_tags=true"], "data.caption_variants=9"),
    "data.weighted_tags": (["data.sources.0.suffix=(shiny:1.6)"], "data.weighted_tags=true"),
    "data.cache": "data.cache=cache-2",
    "data.workers": "data.workers=1",
    "data.on_bad_image": "data.on_bad_image=skip",
    "data.sources.0.allow_missing_captions": "data.sources.0.allow_missing_captions=true",
    "data.sources.0.streaming": (DATASET, "data.sources.0.streaming=true"),
    "data.sources.0.subset": (DATASET, "data.sources.0.subset=small"),
    "data.sources.0.revision": (DATASET, "data.sources.0.revision=main"),
    "data.sources.0.class_prompt": (COMPARED, "data.sources.0.class_prompt=a thing"),
    "data.sources.0.class_words": (COMPARED, "data.sources.0.class_words.thing=x"),
    "optimizer.paged": "optimizer.paged=true",
    "run.steps": "run.steps=4",
    "run.epochs": (["run.steps=2"], "run.epochs=2"),
    "run.batch_size": "run.batch_size=1",
    "run.accumulate": "run.accumulate=2",
    "run.seed": "run.seed=1",
    "run.precision": "run.precision=bf16",
    "run.save_dtype": "run.save_dtype=bf16",
    "run.format": "run.format=diffusers",
    "run.ema.decay": "run.ema.decay=0.5",
    "run.ema.warmup": (EMA, "run.ema.warmup=false"),
    "run.ema.export": (EMA, "run.ema.export=beside"),
    "run.output": "run.output=elsewhere",
    **{f"run.about.{key}": f"run.about.{key}=x" for key in ("title", "author", "description", "license", "trigger")},
    "run.gradient_checkpointing": "run.gradient_checkpointing=true",
    "run.fit": "run.fit=auto",
    "run.offload": (["run.gradient_checkpointing=true"], "run.offload=0.5"),
    "run.offload_activations": "run.offload_activations=true",
    "run.attention": "run.attention=math",
    "run.channels_last": "run.channels_last=true",
    "run.compile": "run.compile=true",
    "run.compile_cache": (["run.compile=true"], "run.compile_cache=compiled"),
    "run.shard": "run.shard=true",
    "run.save_every": "run.save_every=1",
    "run.keep_last": (["run.save_every=1"], "run.keep_last=1"),
    "run.keep_every": (["run.save_every=1", "run.keep_last=1"], "run.keep_every=2"),
    "run.keep_best": ([*FOR_GOOD, "run.save_every=1", "run.keep_last=1"], "run.keep_best=1"),
    "run.sample_every": (PROMPT, "run.sample_every=2"),
    "run.validate_every": (FOR_GOOD, "run.validate_every=2"),
    "run.validate_training": (FOR_GOOD, "run.validate_training=1"),
    "run.check_model": "run.check_model=false",
    "run.deterministic": "run.deterministic=true",
    "run.trackers": "run.trackers=['tensorboard']",
    "sample.prompts": (PROMPT, "sample.prompts=['thing', 'other']"),
    "sample.negative_prompt": (PROMPT, "sample.negative_prompt=blur"),
    "sample.steps": (PROMPT, "sample.steps=2"),
    "sample.guidance": (PROMPT, "sample.guidance=2.0"),
    "sample.seed": (PROMPT, "sample.seed=3"),
    "sample.width": (PROMPT, "sample.width=64"),
    "sample.height": (PROMPT, "sample.height=64"),
    "sample.image": (OVER, "sample.image=two/0.png"),
    "sample.image_guidance": ([*EDIT, *PROMPT, "sample.image=two/0.png"], "sample.image_guidance=3.0"),
    "sample.mask": (OVER, "sample.mask=masks/2.png"),
}
OPTIONS = options()
# what would say nothing in these runs, and is refused
REFUSED = {
    *(f"optimizer.paged {kind}" for kind in ("adamw8bit", "lion", "lion8bit")),  # without a GPU
    *(f"optimizer.schedule.{key} schedule_free" for key in ("kind", "floor", "restarts", "power", "decay")),
    *(f"data.sources.0.{key}" for key in ("subset", "revision", "streaming")),  # of datasets that are fetched by name
    "objective.timesteps.model_shift uniform",  # of flows
    "run.offload",  # without a GPU
    "run.offload_activations",
    "run.shard",  # with one process
}


def test_every_option_has_a_case_and_every_case_an_option() -> None:
    keys = {option.key for option in OPTIONS.values() if "=" not in option.key}
    assert keys <= CASES.keys() <= keys | OPTIONS.keys()
    assert OPTIONS.keys() >= REFUSED


# -- runs -------------------------------------------------------------------------------------------------------------

Numbers = Mapping[str, object]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that cases name."""
    folder = tmp_path_factory.mktemp("options")
    captions = {"one": "thing {}", "two": "other thing {}", "tags": "a{}, b, c, d, e", "lines": "first {}\n{{x|y}} z"}
    for name, caption in captions.items():
        _pictures(folder / name, caption)
    _pictures(folder / "bare", None)
    _pictures(folder / "clear", "thing {}", mode="RGBA")
    _pictures(folder / "masks", None, mode="L")
    _dataset(folder / "dataset")
    model = sd.tiny().path
    (folder / "inpaint").symlink_to(sd.tiny("inpaint").path)
    (folder / "edit").symlink_to(sd.tiny("edit").path)
    for name, scheduler in {"v": {"prediction_type": "v_prediction"}, "other": {"beta_end": 0.02}}.items():
        shutil.copytree(model, folder / name)
        file = folder / name / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **scheduler}))
    file = shutil.copytree(model / "vae", folder / "vae") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scaling_factor": 0.3}))
    save_file(single_file("sd"), folder / "single.safetensors")
    shutil.copytree(model, folder / "variants")
    weights = next((folder / "variants" / "unet").glob("*.safetensors"))
    half = {name: tensor / 2 for name, tensor in load_file(weights).items()}
    save_file(half, weights.with_suffix(".own.safetensors"))
    for name in FURTHER:
        (folder / name).symlink_to(FAMILIES.module(name).tiny().path)
    return folder


def _pictures(folder: Path, caption: str | None, *, mode: str = "RGB") -> None:
    folder.mkdir()
    for i in range(4):
        width, height = ((48, 48), (70, 30))[i % 2]
        shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
        noise = np.random.default_rng([i, *folder.name.encode()]).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption.format(i))


def _dataset(folder: Path) -> None:
    from datasets import Dataset, DatasetDict
    from datasets import Image as ImageFeature

    def split(first: int) -> Dataset:
        pictures = [
            [
                Image.fromarray(np.random.default_rng([i, k]).integers(0, 256, (40, 40, 3), dtype=np.uint8))
                for i in range(first, first + 3)
            ]
            for k in range(2)
        ]
        texts = [[f"thing {i} {k}" for i in range(first, first + 3)] for k in range(2)]
        columns = {"image": pictures[0], "image_2": pictures[1], "text": texts[0], "text_2": texts[1]}
        rows = Dataset.from_dict(columns)
        return rows.cast_column("image", ImageFeature()).cast_column("image_2", ImageFeature())

    DatasetDict({"train": split(0), "test": split(3)}).save_to_disk(str(folder))


@pytest.fixture(scope="module")
def numbers(world: Path) -> Callable[[list[str]], Numbers]:
    """The numbers of a training with these overrides."""
    known: dict[str, Numbers] = {}

    def of(overrides: list[str]) -> Numbers:
        key = "\n".join(overrides)
        if key not in known:
            known[key] = _numbers(world, overrides, output=world / "runs" / str(len(known)))
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)  # overrides name what lies there
        # the export at the end is the slowest part of these runs, and gives what the last checkpoint's adapter is
        patch.setattr(Keeper, "finish", lambda self, step: self.output)
        patch.setattr(execution, "BACKEND", "eager")  # what is traced is computed by the same kernels then
        versions = {"first": "v", "second": "other"}  # of a model on the hub
        patch.setattr("huggingface_hub.snapshot_download", lambda _, *, revision, **__: str(world / versions[revision]))
        _numbers(world, ["run.steps=1"], output=world / "first")
        shutil.copy(world / "first" / "adapters" / "step-000001.safetensors", world / "adapter.safetensors")
        yield of


def _numbers(world: Path, overrides: list[str], *, output: Path) -> Numbers:
    values: dict[str, Any] = {
        "model": {"path": str(sd.tiny().path)},
        "adapter": {"rank": 2, "targets": ["to_q", "to_k"]},
        "data": {"sources": [{"path": "one"}], "cache": "cache", "buckets": {"resolution": 32}},
        "optimizer": {"lr": 0.01},
        "run": {
            "output": str(output),
            "steps": 3,
            "batch_size": 2,
            "save_every": 0,
            "save_dtype": "fp32",
            "precision": "fp32",
        },
    }
    for override in overrides:
        apply_override(values, override)
    if "epochs" in values["run"]:
        del values["run"]["steps"]
    run = train(build(values))
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    last = run.output / "checkpoints" / f"step-{run.steps:06d}"
    files = [*last.glob("*.safetensors"), *run.output.glob(f"adapters/{last.name}.safetensors")]
    return {
        "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "weights": {file.relative_to(run.output).as_posix(): _weights(file) for file in files},
        "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
    }


def _weights(file: Path) -> str:
    """A digest of names and values; what a file says of itself has all numeric settings in it."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        found.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _same(one: Numbers, other: Numbers, option: Option) -> bool:
    """To the last byte of the files where the option is neutral, and says nothing to people."""
    if option.neutral and not option.key.startswith("run.about"):
        return one == other
    return all(one[key] == other[key] for key in ("metrics", "weights"))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_does_what_it_is_declared_to(name: str, numbers: Callable[[list[str]], Numbers]) -> None:
    option = OPTIONS[name]
    case = option.key if "=" in option.key else CASES.get(name) or CASES[option.key]
    given, change = ([], case) if isinstance(case, str) else case
    choices = [word for choice in (*option.chosen, change) for word in GIVEN.get(choice, [])]
    both = [*choices, *option.chosen, *given]
    if name in REFUSED:
        with pytest.raises(InputError, match="schedule" if "schedule" in name else option.key.rpartition(".")[2]):
            numbers(_whole([*both, change]))
    else:
        assert _same(numbers(_whole(both)), numbers(_whole([*both, change])), option) == option.neutral


def _whole(words: list[str]) -> list[str]:
    return [part for word in words for part in (word, *([ALONG[word]] if word in ALONG else []))]
