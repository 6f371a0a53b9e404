"""What is trained, made from a recipe, and what feeds it: the model with its adapters, the optimizer over them, the
objective, the filled cache and its loader."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lorakit import families
from lorakit.adapters import ADAPTERS, copy_adapter_state, trainable_parameters
from lorakit.adapters.ema import Average
from lorakit.adapters.fused import fuse
from lorakit.adapters.state import state_from
from lorakit.core.errors import InputError
from lorakit.core.processes import rank, together, world
from lorakit.data.cache import default_folder
from lorakit.data.dataset import Dataset
from lorakit.data.loader import Loader
from lorakit.data.shards import Cache
from lorakit.diffusion.noise import extra
from lorakit.diffusion.objectives import OBJECTIVES
from lorakit.export.adapter import source_of
from lorakit.families.protocol import Family, guided
from lorakit.optimizers import OPTIMIZERS
from lorakit.optimizers.state import restore_optimizer
from lorakit.recipe import Recipe
from lorakit.training import kernels, sharding
from lorakit.training.caching import fill_cache, text_encoder
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.execution import blocks_of, compile_blocks, compute_again, use_channels_last
from lorakit.training.interrupt import Interrupt
from lorakit.training.offload import Offload, some_of, to_gpu
from lorakit.training.processes import Runtime
from lorakit.training.step import Trainee
from lorakit.training.warm import warm_start
from lorakit.verbs.alike import refuse_unlike_base

log = logging.getLogger("lorakit")


def prepared(
    recipe: Recipe, data: Dataset, runtime: Runtime, found: Checkpoint | None, interrupt: Interrupt
) -> tuple[Trainee, Loader]:
    """The model with its adapters, and what feeds it, from a filled cache.

    The backbone comes to the device when the cache is filled. What fills it is read for that alone, if it has to be and
    nothing else asks for it.
    """
    encoding = recipe.adapter.text_encoder is not None  # captions anew in each step
    seeing = not data.cached_latents or data.task != "text"  # pictures, or what the model is given of them
    later = tuple(name for name, asked in (("vae", seeing), ("text_encoder", encoding)) if not asked)

    def read() -> tuple[Family, dict[str, nn.Module]]:
        family = families.load_settings(recipe.model, precision=recipe.run.precision, later=later)
        others = [name for name in family.components if name != family.backbone]
        family.to(runtime.device, family.dtype, only=others)
        if recipe.sample.prompts:  # what its stock pipeline cannot be told is met now and not when it is to draw
            guided(family)(recipe.sample.guidance, recipe.sample.negative_prompt)
        adapted = components_to_adapt(recipe, family)
        inject_adapters(recipe, family, adapted)
        return family, adapted

    def placed() -> Trainee:
        _to_device(recipe, family, runtime.device)
        return make_trainee(recipe, data, family, adapted, runtime, found)

    family, adapted = together(read)  # memory that one rank lacks is a matter of all
    refuse_unlike_base(family)
    interrupt.check()
    loader = _loader(recipe, data, family, interrupt, runtime.device, text_encoders_adapted=encoding)
    trainee = together(placed)
    if recipe.run.attention == "fastest":
        trainee = replace(trainee, attention=kernels.fastest(trainee, loader.largest()))
    return trainee, loader


def _to_device(recipe: Recipe, family: Family, device: Any) -> None:
    """Moves the backbone there, or this process's part of it, but for the blocks that stay in the CPU's memory."""
    if recipe.run.shard:
        backbone = family.components[family.backbone]
        sharding.shard(backbone, [*trainable_parameters({family.backbone: backbone}).values()], device)
        return
    move = partial(family.to, device, family.dtype, only=[family.backbone])
    if recipe.run.offload is None:
        move()
        return
    blocks = blocks_of(family.components[family.backbone], key="run.offload")
    offload = Offload(some_of(blocks, recipe.run.offload))
    with offload.aside():
        move()
    offload.start(to_gpu(device), pinned=True)


def _loader(
    recipe: Recipe,
    data: Dataset,
    family: Family,
    interrupt: Interrupt,
    device: Any,
    *,
    text_encoders_adapted: bool,
) -> Loader:
    """Fills the cache, with the other ranks, and makes the loader that reads it."""
    cache = Cache(Path(recipe.data.cache) if recipe.data.cache else default_folder())
    encoded = fill_cache(
        cache, data, family, precision=recipe.run.precision, text=not text_encoders_adapted, check=interrupt.check
    )
    return Loader(
        data,
        cache,
        latents_fingerprint=encoded.latents,
        text_fingerprint=encoded.text,
        latent_shapes={bucket: family.latent_shape(*bucket) for bucket in data.buckets},
        seed=recipe.run.seed,
        batch_size=recipe.run.batch_size,
        stratified=recipe.objective.timesteps.stratified,
        extra=partial(extra, recipe.objective.noise),
        rank=rank(),
        world=world(),
        padded=recipe.run.shard,
        workers=recipe.data.workers,
        pin_memory=device.type == "cuda",
    )


def components_to_adapt(recipe: Recipe, family: Family) -> dict[str, nn.Module]:
    """The components that get an adapter, the backbone first."""
    names = [family.backbone]
    if recipe.adapter.text_encoder is not None:
        if not family.text_encoders:
            raise InputError(
                f"adapter.text_encoder: the stock pipeline of {family.name} loads no adapter for its text encoders: "
                "leave the section out."
            )
        names += family.text_encoders
    return {name: family.components[name] for name in names}


def inject_adapters(recipe: Recipe, family: Family, adapted: Mapping[str, nn.Module]) -> None:
    """Puts fresh adapters into `adapted` and makes them ready to be trained."""
    inject = ADAPTERS.module(recipe.adapter.kind).inject
    for name, module in adapted.items():
        part = _part(recipe, family, name)
        inject(module, part, targets=part.targets or family.default_targets[name], seed=recipe.run.seed)
        if recipe.adapter.fused:
            left = fuse(module)
            if left and rank() == 0:
                reasons = ", ".join(f"{reason} ({count})" for reason, count in left.items())
                log.info("%s: adapters that are not fused with their layers: %s", name, reasons)
        module.train()  # dropout of the adapter, gradient checkpointing
        if recipe.run.gradient_checkpointing:
            compute_again(module, share=recipe.run.gradient_checkpointing)
    backbone = adapted[family.backbone]
    if recipe.run.channels_last:
        use_channels_last(backbone)
    if recipe.run.compile:
        compile_blocks(backbone, cache=Path(recipe.run.compile_cache) if recipe.run.compile_cache else None)


def make_trainee(
    recipe: Recipe,
    data: Dataset,
    family: Family,
    adapted: Mapping[str, nn.Module],
    runtime: Runtime,
    found: Checkpoint | None,
) -> Trainee:
    """The trainee as the checkpoint `found` left it, else at its start: fresh, or from `adapter.init_from`."""
    if found:
        copy_adapter_state(adapted, state_from(found.tensors["adapter"], found.state["adapter"]))
    elif recipe.adapter.init_from is not None:
        warm_start(adapted, source_of(Path(recipe.adapter.init_from)), family=family)
    parameters = trainable_parameters(adapted)
    groups = _groups(recipe, family, adapted, parameters)
    chosen = OPTIMIZERS.module(recipe.optimizer.kind)
    optimizer = chosen.build(recipe.optimizer, groups)
    group_state = getattr(chosen, "GROUP_STATE", ())
    average = Average(parameters, recipe.run.ema) if recipe.run.ema else None
    if found:
        restore_optimizer(
            optimizer, parameters, found.tensors["optimizer"], found.state["optimizer"], group_state=group_state
        )
        if runtime.scaler:
            runtime.scaler.load_state_dict(found.state["scaler"])
        if average and "ema" in found.tensors:
            average.load(found.tensors["ema"])
        elif average and rank() == 0:
            log.warning("the run had no average of its weights: it begins with those of step %d", found.state["step"])
    return Trainee(
        family=family,
        encode_text=text_encoder(data, family),
        adapted=adapted,
        parameters=parameters,
        optimizer=optimizer,
        group_state=group_state,
        average=average,
        objective=OBJECTIVES.module(recipe.objective.kind).build(recipe.objective, family.process),
        device=runtime.device,
        autocast=runtime.autocast,
        scaler=runtime.scaler,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        seed=recipe.run.seed,
        preserves=recipe.objective.preservation.at is not None,
        computed_again=recipe.run.gradient_checkpointing,
        attention="auto" if recipe.run.attention == "fastest" else recipe.run.attention,
        offload_activations=recipe.run.offload_activations,
        sharded=recipe.run.shard,
    )


def _groups(
    recipe: Recipe, family: Family, adapted: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """The optimizer's groups: one for each component, and behind it those of the patterns that have rates."""
    groups: list[dict[str, Any]] = []
    for component in adapted:
        part, prefix = _part(recipe, family, component), f"{component}."
        own = {"": part.lr or recipe.optimizer.full_rate}  # by the pattern's name
        members: dict[str, list[nn.Parameter]] = {"": []}
        for key, parameter in parameters.items():
            if key.startswith(prefix):
                pattern, rate = part.rate_of(key.removeprefix(prefix).rpartition(".lora_")[0]) or ("", own[""])
                own[pattern] = rate
                members.setdefault(pattern, []).append(parameter)
        for pattern, rate in own.items():
            name = "_".join(
                word for word in ("" if pattern and component == family.backbone else component, pattern) if word
            )
            groups.append({"params": members[pattern], "lr": rate, "full_lr": rate, "name": name})
    names = [group["name"] for group in groups]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"adapter.patterns: two rates would be called lr_{twice[0]}: write the match otherwise.")
    return groups


def _part(recipe: Recipe, family: Family, component: str) -> Any:
    """The adapter settings of a component."""
    return recipe.adapter if component == family.backbone else recipe.adapter.text_encoder
