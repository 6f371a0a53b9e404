"""Optimizers, one file each, and the learning-rate schedules.

An optimizer's module defines `Settings` and `build(settings, groups)`.
"""

from lorakit.core.registry import Registry

OPTIMIZERS = Registry("lorakit.optimizers", "optimizer", frozenset({"common", "schedules", "state"}))
