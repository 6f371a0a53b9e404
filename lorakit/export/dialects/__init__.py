"""The dialects of adapter files, one file each, found by name.

A dialect's module defines:
- `FOLDER`: whether it is a folder (then keys begin with "<file's folder>/") or one file;
- `READER`: what loads it for its users: "stock pipeline", "peft", or "lorakit" itself;
- `PREFIXED`: whether its names begin with the family's `lora_prefixes`: it is for families that have such;
- `KINDS`: the adapter kinds that its readers make the same of;
- `ENDINGS`: its spelling of "lora_A.weight", "lora_B.weight" and, where such a key is read, "alpha";
- `recognises(keys, metadata)`: whether a file is of this dialect;
- `keymap(family)`: the names of the family's layers in this dialect (names come from the family, never from here);
- `component(base)`: the component that a layer's name belongs to, without knowing the family;
- `CONFIGURED`: the entry of the metadata that says alphas, if one does, and
  `configured_alpha(base, rank, metadata)`: the alpha that the metadata give to a layer, None where they do not say;
- `write(state, family, metadata)` and `read(tensors, metadata, family, assume_alpha=…)`, inverse of each other.
"""

from lorakit.core.registry import Registry

DIALECTS = Registry("lorakit.export.dialects", "adapter format")
