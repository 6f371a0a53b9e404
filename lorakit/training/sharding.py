"""The frozen backbone's weights shared out over the ranks (FSDP2, torch's `fully_shard`): a block is gathered to run.

For a model that does not fit one device. Adapters stay whole on every rank and keep plain gradients, which `step.py`
sums as ever; nothing frozen is ever reduced. What this asks of the rest of the house: a forward needs all ranks, so all
run equally many (`data/loader.py` pads with micro steps of weight 0). Accelerate's own plugin is not used: on the CPU
it becomes plain data parallelism without a word, and it wants to own model and optimizer.
"""

import contextlib
import inspect
import logging
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from lorakit.core.errors import LorakitError, LostProcess
from lorakit.core.memory import is_lack
from lorakit.core.processes import rank, world

log = logging.getLogger("lorakit")


def problems(settings: Mapping[str, bool]) -> list[str]:
    """Why `run.shard` cannot be kept, with these other settings (whether each is on)."""
    if world() == 1:
        return [
            "run.shard = true shares the model out over processes, and there is one: start several, or leave it out."
        ]
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:  # what keeps adapters whole
        return [f"run.shard = true needs a newer torch than {torch.__version__}: update it, or leave it out."]
    return [
        f"run.shard = true and {key} do not go together: leave one of them out." for key, on in settings.items() if on
    ]


def shard(module: nn.Module, whole: Collection[nn.Parameter], device: torch.device) -> None:
    """Leaves on `device` a part of the frozen `module`, and the parameters `whole` as they are; on all ranks together.

    `module` lies on the CPU: so no more than one block of it is ever whole on the device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (world(),), mesh_dim_names=("ranks",))
    before = sum(p.nbytes for p in module.parameters() if not p.requires_grad)
    for block in (*_blocks(module), module):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=set(whole))
    own = _obtained(module, whole)
    if rank() == 0:
        log.info("the frozen backbone lies in %d parts, %.2f of %.2f GiB here", world(), own / 2**30, before / 2**30)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """What diffusers calls the blocks of a model, inner ones first, as `fully_shard` has to meet them."""
    kinds = {*(getattr(module, "_repeated_blocks", None) or ()), *(getattr(module, "_no_split_modules", None) or ())}
    return [block for block in reversed([*module.modules()][1:]) if type(block).__name__ in kinds]


def _obtained(module: nn.Module, whole: Collection[nn.Parameter]) -> int:
    """The bytes of frozen weights that are here, after a look that what was asked for has been done."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    assert isinstance(module, FSDPModule)
    kept, own = {id(parameter) for parameter in whole}, 0
    for name, parameter in module.named_parameters():
        if id(parameter) in kept:
            assert not isinstance(parameter, DTensor) and parameter.requires_grad, f"{name} is to be trained whole"
        else:
            assert isinstance(parameter, DTensor) and not parameter.requires_grad, f"{name} is not shared out"
            assert parameter.device_mesh.size() == world() and parameter.placements[0].is_shard(), name
            own += parameter.to_local().nbytes
    return own


@contextlib.contextmanager
def jointly(*, sharded: bool) -> Iterator[None]:
    """Around forwards: where they need all ranks, one that fails cannot be made up for, and the others would wait."""
    try:
        yield
    except LorakitError:
        raise
    except Exception as error:
        if not sharded or is_lack(error):
            raise
        why = f"{type(error).__name__}: {error}".partition(". This is typically")[0]
        raise LostProcess(
            f"The {world()} processes, which share the model, could not go on together: look at what the others said. "
            f"What was saved is there to go on from. (rank {rank()}: {why})"
        ) from error
