"""Training objectives, one file each. A module defines `Settings` and `build(settings, process) -> Objective`.

Beside them are `problems(settings, process)`, why they say nothing for a process, and `advice`, what a person should
know of them. An objective is called as `objective(predict, batch) -> LossReport`; it sees a model only through
`predict`.
"""

from lorakit.core.registry import Registry

OBJECTIVES = Registry("lorakit.diffusion.objectives", "objective")
