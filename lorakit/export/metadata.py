"""What an adapter file says of itself, for programs that list, sort or refuse files by it.

No path, user, host, date or caption is among it: a file is made to be passed on, and equal runs give equal bytes.
"""

from lorakit.adapters.state import FIRST, AdapterState
from lorakit.families.protocol import Family


def adapter_metadata(state: AdapterState, family: Family, *, name: str) -> dict[str, str]:
    """kohya's `ss_…` entries and those of the model specification, all texts; `name` is what programs show."""
    ranks = {len(state.tensors[layer + FIRST]) for layer in state.layers()}
    alphas = set(state.alphas.values())
    return {
        "ss_network_module": "networks.lora",
        # "Dynamic" is what kohya's own tools write where layers differ
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        **family.metadata(),
    }
