"""What a run leaves behind while it goes and when it ends: metrics, checkpoints, samples, the adapter, the report.

Rank 0 writes; the others wait where they must. When each is called is the loop's affair.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters import adapter_state
from lorakit.adapters.state import state_metadata
from lorakit.core.files import written_aside
from lorakit.core.processes import barrier, rank, world
from lorakit.core.types import Batch
from lorakit.export import export_adapter
from lorakit.export.files import DTYPES, write_adapter
from lorakit.sampling.pictures import SampleSettings, draw, requests
from lorakit.training import checkpoint
from lorakit.training.loop import RunSettings
from lorakit.training.metrics import MetricsFile
from lorakit.training.processes import Runtime
from lorakit.training.report import write_report
from lorakit.training.step import Trainee
from lorakit.training.validation import validation_loss

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class Keeper:
    """The loop's hooks for the run in folder `output`.

    `facts` are the entries of `state.json` that stay the same for the whole run; `recipe` is the text that the report
    shows, without paths.
    """

    output: Path
    run: RunSettings
    sampling: SampleSettings
    recipe: str
    facts: Mapping[str, Any]
    trainee: Trainee
    runtime: Runtime
    validation: Callable[[], Iterable[Batch]] | None
    file: MetricsFile | None
    validations: MetricsFile | None
    bar: Any

    def metrics(self, record: dict[str, Any]) -> None:
        if self.file is None:
            return
        self.file.write(record)
        self.bar.update()
        if record["loss"] is not None:
            self.bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        self.runtime.track(record)

    def flush(self) -> None:
        for file in (self.file, self.validations):
            if file is not None:
                file.flush()

    def save(self, step: int) -> None:
        self.flush()
        if self.file is not None:
            state = adapter_state(self.trainee.adapted)
            checkpoint.save(
                self.output / "checkpoints",
                step,
                adapter=state.tensors,
                metadata=state_metadata(state),
                optimizer=checkpoint.optimizer_tensors(self.trainee.optimizer, self.trainee.parameters),
                state={
                    "step": step,
                    "processes": world(),
                    "batch_size": self.run.batch_size,
                    "accumulate": self.run.accumulate,
                    "threads": torch.get_num_threads(),
                    "adapter": state_metadata(state),
                    "scaler": self.trainee.scaler.state_dict() if self.trainee.scaler else None,
                    **self.facts,
                },
            )
            write_adapter(
                state,
                self.output / "adapters" / f"{checkpoint.name_of(step)}.safetensors",
                format=self._format(),
                family=self.trainee.family,
                dtype=DTYPES[self.run.save_dtype],
            )
            checkpoint.prune(self.output / "checkpoints", keep=self.run.keep_last)
        barrier()

    def sample(self, step: int) -> None:
        if rank() == 0 and self.sampling.prompts:
            try:
                self._draw(step)
            except Exception as error:  # a picture that cannot be drawn must not end a run
                log.warning("sample pictures of step %d failed: %s: %s", step, type(error).__name__, error)
        barrier()

    def validate(self, step: int) -> None:
        """Measures the pictures put aside, on all ranks, and writes a line."""
        if self.validation is None:
            return
        started = time.perf_counter()
        loss, samples = validation_loss(self.trainee, self.validation())
        number = loss if math.isfinite(loss) else None
        record = {"step": step, "loss": number, "samples": samples, "seconds": time.perf_counter() - started}
        if self.validations is not None:
            self.validations.write(record)
            self.runtime.track({"step": step, "validation_loss": loss})
            log.info("step %d: validation loss %.4f", step, loss)

    def _draw(self, step: int) -> None:
        adapted = self.trainee.adapted.values()
        for module in adapted:
            module.eval()
        try:
            pipeline = self.trainee.family.live_pipeline()
            wanted = requests(self.sampling)
            pictures = draw(pipeline, wanted, steps=self.sampling.steps, guidance=self.sampling.guidance)
        finally:
            for module in adapted:
                module.train()
        for i, picture in enumerate(pictures):
            with written_aside(self.output / "samples" / checkpoint.name_of(step) / f"{i:02d}.png") as aside:
                picture.save(aside, format="PNG")

    def finish(self) -> Path:
        """The adapter in its dialect, verified against a fresh stock pipeline, and the report."""
        path = self.output / "adapter.safetensors"
        self.bar.close()
        if self.file is not None:
            exported = export_adapter(
                adapter_state(self.trainee.adapted),
                format=self._format(),
                out=path,
                family=self.trainee.family,
                dtype=DTYPES[self.run.save_dtype],
            )
            log.info(
                "adapter of %d layers, %s, %s: read back by %s, its predictions differ by at most %.1e",
                exported.modules,
                exported.format,
                exported.dtype,
                exported.reader,
                exported.max_difference,
            )
            write_report(self.output, prompts=self.sampling.prompts, recipe=self.recipe)
        self.runtime.end()
        barrier()
        return path

    def _format(self) -> str:
        return self.run.format or self.trainee.family.default_format
