"""What a run leaves behind while it goes and when it ends: metrics, checkpoints, samples, the adapter, the report.

Rank 0 writes; the others wait where they must. When each is called is the loop's affair.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lorakit.adapters import AdapterState, adapter_state
from lorakit.adapters.state import replaced, state_metadata
from lorakit.core.errors import LorakitError, LostProcess, StorageError
from lorakit.core.files import folder_aside, printable
from lorakit.core.processes import gather_objects, on_each_rank, on_first_rank, rank, world
from lorakit.export import export_adapter
from lorakit.export.files import DTYPES, write_adapter
from lorakit.export.verify import ExportReport
from lorakit.families.protocol import guided
from lorakit.optimizers.state import optimizer_state, weights_to_use
from lorakit.sampling.canvas import requests_over
from lorakit.sampling.pictures import Abandoned, Request, SampleSettings, draw, label
from lorakit.training import checkpoint
from lorakit.training.interrupt import Interrupt
from lorakit.training.loop import RunSettings
from lorakit.training.metrics import MetricsFile
from lorakit.training.processes import Runtime
from lorakit.training.report import write_report
from lorakit.training.sharding import jointly
from lorakit.training.step import Trainee
from lorakit.training.validation import CURVES, Validation, curves, evaluated, record, validation_loss

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class Keeper:
    """The loop's hooks for the run in folder `output`.

    `facts` are the entries of `state.json` that stay the same for the whole run; `recipe` is the text that the report
    shows, without paths, with `thumbnail(key)` for its pictures; `about` is the metadata of what is handed out.
    """

    output: Path
    run: RunSettings
    sampling: SampleSettings
    recipe: str
    about: Mapping[str, str]
    facts: Mapping[str, Any]
    trainee: Trainee
    runtime: Runtime
    interrupt: Interrupt
    validation: Validation | None
    file: MetricsFile | None
    validations: MetricsFile | None
    bar: Any
    thumbnail: Callable[[str], Image.Image] | None = None

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

    def save(self, step: int, *, needed: bool) -> bool:
        """Rank 0 writes the checkpoint of `step`; where the disk refuses and it is not `needed`, the run goes on."""
        try:
            on_first_rank(lambda: self._save(step))
        except StorageError as error:
            if needed:
                raise
            if rank() == 0:
                log.warning("step %d is not saved, and the run goes on: %s", step, printable(error))
            return False
        return True

    def _save(self, step: int) -> None:
        self.flush()
        trainee, folder = self.trainee, self.output / "checkpoints"
        # first the smaller part: a run that is killed between the two writes it again when it goes on
        with _tolerated(f"adapters/ has no file of step {step}"):
            write_adapter(
                self._handed_out(),
                self.output / "adapters" / f"{checkpoint.name_of(step)}.safetensors",
                format=self._format(),
                family=trainee.family,
                metadata=self._about(step),
                dtype=DTYPES[self.run.save_dtype],
            )
        state = adapter_state(trainee.adapted)
        optimizer, numbers = optimizer_state(trainee.optimizer, trainee.parameters, group_state=trainee.group_state)
        checkpoint.save(
            folder,
            step,
            tensors={
                "adapter": state.tensors,
                "optimizer": optimizer,
                **({"ema": trainee.average.tensors} if trainee.average else {}),
            },
            metadata=state_metadata(state),
            state={
                "step": step,
                "processes": world(),
                "batch_size": self.run.batch_size,
                "accumulate": self.run.accumulate,
                "threads": torch.get_num_threads(),
                "adapter": state_metadata(state),
                "optimizer": numbers,
                "scaler": trainee.scaler.state_dict() if trainee.scaler else None,
                **self.facts,
            },
        )
        self._prune()

    def _prune(self) -> None:
        folder = self.output / "checkpoints"
        with _tolerated("older checkpoints could not be removed"):
            best = checkpoint.best_steps(self.output / "validation.jsonl", folder, self.run.keep_best)
            checkpoint.prune(folder, keep_last=self.run.keep_last, keep_every=self.run.keep_every, keep=best)

    def sample(self, step: int) -> None:
        """Draws the prompts, each on one rank; the first writes all pictures or none."""
        folder = self.output / "samples" / checkpoint.name_of(step)
        # there is one of the step that a run goes on from
        if not self.sampling.prompts or on_first_rank(folder.exists):
            return
        family = self.trainee.family
        failed = _tolerated(f"sample pictures of step {step} failed")
        with failed, contextlib.suppress(Abandoned), self._shown(), family.at_hand():
            pipeline, wanted = family.live_pipeline(family.task), requests_over(self.sampling, family.drawing_multiple)
            settings: dict[str, Any] = {"steps": self.sampling.steps, "guidance": self.sampling.guidance}
            pictures = self._drawn(pipeline, wanted, settings)
            sampler = type(pipeline.scheduler).__name__

            def write() -> None:
                with folder_aside(folder) as aside:
                    for i, (request, picture) in enumerate(zip(wanted, pictures, strict=True)):
                        text = label(request, picture, **settings, sampler=sampler, trained_steps=step)
                        picture.save(aside / f"{i:02d}.png", format="PNG", pnginfo=text)

            on_first_rank(write)

    def _drawn(self, pipeline: Any, wanted: Sequence[Request], settings: Mapping[str, Any]) -> list[Image.Image]:
        """`wanted` in their order, on every rank. Raises Abandoned on all where a stop is asked for on one."""
        drawing = {**settings, "guided": guided(self.trainee.family)}
        if not self.trainee.sharded:
            of_ranks = on_each_rank(
                lambda: draw(pipeline, wanted[rank() :: world()], **drawing, abandon=lambda: self.interrupt.pending)
            )
        else:  # each step of a picture needs all ranks: all draw equally many, and stop between two
            own: list[Image.Image] = []
            for first in range(0, len(wanted), world()):
                if any(gather_objects(self.interrupt.pending)):
                    raise Abandoned
                with jointly(sharded=True):
                    own += draw(pipeline, [wanted[min(first + rank(), len(wanted) - 1)]], **drawing)
            of_ranks = gather_objects(own)
        return [of_ranks[i % world()][i // world()] for i in range(len(wanted))]

    def validate(self, step: int) -> None:
        """Measures the chosen pictures, on all ranks, and writes a line."""
        if self.validation is None:
            return
        started = time.perf_counter()
        with _tolerated(f"validation of step {step} failed"), self._shown():
            measured = validation_loss(self.trainee, self.validation, abandon=lambda: self.interrupt.pending)
            if measured is None or self.validations is None:
                return
            line = record(step, measured, seconds=time.perf_counter() - started)
            self.validations.write(line)
            self.validations.flush()
            numbers = curves(line)
            self.runtime.track({"step": step, **numbers})
            shown = [f"{name.replace('_', ' ')} {numbers[name]:.4f}" for name in CURVES.values() if name in numbers]
            log.info("step %d: %s", step, ", ".join(shown) or "the validation loss is not finite")

    def finish(self, step: int) -> Path:
        """The adapter after `step` steps in its dialect, verified against a fresh stock pipeline, and the report."""
        path = self.output / "adapter.safetensors"
        self.bar.close()
        on_first_rank(lambda: self._finish(path, self._about(step)))
        self.runtime.end()
        return path

    def _finish(self, path: Path, about: Mapping[str, str]) -> None:
        exported = self._export(self._handed_out(), path, about)
        log.info(
            "adapter of %d layers, %s, %s: read back by %s, its predictions differ by at most %.1e",
            exported.modules,
            exported.format,
            exported.dtype,
            exported.reader,
            exported.max_difference,
        )
        if self.trainee.average and self.run.ema and self.run.ema.export == "beside":
            self._export(self._with(self.trainee.average.tensors), path.with_name("adapter-ema.safetensors"), about)
        self.flush()
        self._prune()  # the last validation came after the last checkpoint
        with _tolerated("report.html could not be written"):
            write_report(self.output, prompts=self.sampling.prompts, recipe=self.recipe, thumbnail=self.thumbnail)

    def rescue(self, weights: Mapping[str, Tensor]) -> str:
        """Hands out `weights`, the last that gave a finite loss, as the adapter of a run that has gone wrong."""

        def export() -> str:
            try:
                self._export(self._with(weights), self.output / "adapter.safetensors", self.about)
            except LorakitError as error:
                return f"The last good weights could not be written: {error}"
            return f"The last good weights are in {printable(self.output / 'adapter.safetensors')}."

        return on_first_rank(export)

    def _export(self, state: AdapterState, path: Path, about: Mapping[str, str]) -> ExportReport:
        return export_adapter(
            state,
            format=self._format(),
            out=path,
            family=self.trainee.family,
            metadata=about,
            dtype=DTYPES[self.run.save_dtype],
        )

    def _about(self, step: int) -> dict[str, str]:
        epoch = step // self.facts["steps_per_epoch"]
        return {**self.about, "ss_steps": str(step), "ss_epoch": str(epoch)}

    def _format(self) -> str:
        return self.run.format or self.trainee.family.default_format

    # -- the weights that are handed out are not always those that are trained ----------------------------------------

    def _averaged(self) -> Mapping[str, Tensor] | None:
        """What is handed out in place of the trained weights, if anything is."""
        if self.trainee.average and self.run.ema and self.run.ema.export == "instead":
            return self.trainee.average.tensors
        return weights_to_use(self.trainee.optimizer, self.trainee.parameters)

    def _handed_out(self) -> AdapterState:
        averaged = self._averaged()
        return adapter_state(self.trainee.adapted) if averaged is None else self._with(averaged)

    def _with(self, weights: Mapping[str, Tensor]) -> AdapterState:
        with replaced(self.trainee.parameters, weights):
            return adapter_state(self.trainee.adapted)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """The model as its users will have it: the weights that are handed out, without dropout."""
        averaged = self._averaged()
        weights = contextlib.nullcontext() if averaged is None else replaced(self.trainee.parameters, averaged)
        with evaluated(self.trainee.adapted.values()), weights:
            yield


@contextlib.contextmanager
def _tolerated(what: str) -> Iterator[None]:
    """What is met within is a warning: it must not end a run whose state is safe."""
    try:
        yield
    except LostProcess:
        raise
    except Exception as error:
        if rank() == 0:
            log.warning("%s: %s: %s", what, type(error).__name__, printable(error))
