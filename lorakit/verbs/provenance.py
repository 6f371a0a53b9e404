"""What a training knows of itself, for the metadata of its adapter: base, data, settings; counts and digests, no paths.

Only what the numbers of the adapter follow from is told: equal runs give equal files, wherever and however they ran.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lorakit.data.dataset import Dataset
from lorakit.data.report import DataReport
from lorakit.families.protocol import Family
from lorakit.optimizers.schedules import depends_on_total
from lorakit.recipe import Recipe, flat
from lorakit.verbs.resume import binding
from lorakit.verbs.survey import global_batch

_TAGS = 200  # of each source, the commonest
_LONGEST_TAG = 40  # what is longer is a sentence, which may say more than its author wants to pass on
_PATHS = ("path", "mask_path", "input_path", "init_from")


def provenance(recipe: Recipe, data: Dataset, report: DataReport, family: Family) -> dict[str, str]:
    """Entries of the adapter's metadata; reads the base's files once for their digest."""
    parts = {"": recipe.adapter, "text_encoder": recipe.adapter.text_encoder}
    lr = {name: part and (part.lr or recipe.optimizer.full_rate) for name, part in parts.items()}
    trained = [s for s in report.sources if s.role == "train"]
    kept = [s for s in report.sources if s.role == "regularization"]
    triggers = list(dict.fromkeys(s.trigger for s in recipe.data.sources if s.trigger))
    base = {part: family.fingerprint(part) for part in (family.backbone, *family.text_encoders)}
    values = {
        "ss_sd_model_name": _public(recipe.model.path),
        "ss_learning_rate": lr[""],
        "ss_unet_lr": lr[""],
        "ss_text_encoder_lr": lr["text_encoder"],
        "ss_optimizer": recipe.optimizer.kind,
        "ss_lr_scheduler": recipe.optimizer.schedule.kind,
        "ss_lr_warmup_steps": recipe.optimizer.schedule.warmup,
        "ss_seed": recipe.run.seed,
        "ss_mixed_precision": "no" if recipe.run.precision == "fp32" else recipe.run.precision,
        "ss_total_batch_size": global_batch(recipe),
        "ss_num_batches_per_epoch": data.plan.steps_per_epoch,
        "ss_num_train_images": sum(s.pictures * s.repeats for s in trained),
        "ss_num_reg_images": sum(s.pictures * s.repeats for s in kept),
        "ss_resolution": str((max(report.resolutions, default=0),) * 2),
        "ss_enable_bucket": len(report.buckets) > 1,
        "ss_bucket_info": json.dumps({"buckets": _buckets(report)}),
        "ss_dataset_dirs": json.dumps(
            {f"source_{i}": {"n_repeats": s.repeats, "img_count": s.pictures} for i, s in enumerate(report.sources)}
        ),
        "ss_tag_frequency": json.dumps(_tags(data), ensure_ascii=False),
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(family.process.prediction_type),
        "modelspec.resolution": "x".join([str(max(report.resolutions, default=0))] * 2),
        "modelspec.trigger_phrase": ", ".join(triggers) or None,
        "lorakit.base": json.dumps({"family": family.name, **base}),
        "lorakit.data": json.dumps(
            {"pictures": report.pictures, "captions": report.captions, "digest": data.plan.digest()}
        ),
        "lorakit.recipe": json.dumps(_settings(recipe), ensure_ascii=False),
    }
    about = recipe.run.about.entries() if recipe.run.about else {}
    return {key: str(value) for key, value in values.items() if value is not None} | about


def _public(path: str) -> str | None:
    """A name that means the same to everybody; None for a path of this machine."""
    named = path == "embedded" or (path.count("/") == 1 and path[0] not in "./~" and not Path(path).exists())
    return path if named or path.startswith("hf://") else None


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that the numbers follow from, by their dotted keys: each could be said on a command line."""
    written = flat(recipe.to_dict())
    # how long the run went on after this file is nothing to it, unless the learning rate knew
    length = () if depends_on_total(recipe.optimizer.schedule) else ("run.steps", "run.epochs")
    values = {key: json.loads(written[key]) for key in sorted(binding(recipe)) if key not in length}
    return {key: v for key, v in values.items() if key.rpartition(".")[2] not in _PATHS or _public(v)}


def _buckets(report: DataReport) -> dict[str, Any]:
    sizes = ((name, count, name.split("×")) for name, count in sorted(report.buckets.items()))
    return {
        str(i): {"resolution": [int(width), int(height)], "count": count}
        for i, (_, count, (width, height)) in enumerate(sizes)
    }


def _tags(data: Dataset) -> dict[str, dict[str, int]]:
    """How often each tag, what stands between commas, is in the captions of each training source."""
    counts: dict[int, Counter[str]] = {}
    for example in data.examples:
        if example.role == "train":
            settings = data.settings.sources[example.source]
            text = ",".join((settings.trigger, *(line for c in example.captions for line in c.splitlines())))
            tags = {tag for tag in map(str.strip, text.split(",")) if 0 < len(tag) <= _LONGEST_TAG}
            counts.setdefault(example.source, Counter()).update(tags)
    return {
        f"source_{source}": dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))[:_TAGS])
        for source, found in sorted(counts.items())
    }
