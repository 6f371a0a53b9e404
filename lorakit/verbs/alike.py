"""That all processes of a launch read the same recipe: each reads the file, and the command, of its own machine."""

from lorakit.core.errors import InputError
from lorakit.core.processes import gather_objects, together
from lorakit.recipe import Recipe, flat


def refuse_unlike(recipe: Recipe) -> None:
    """Raises InputError on all ranks, with the settings that one of them has otherwise than the first; of paths only
    the last names count, for a model may lie elsewhere on each machine."""
    first, *others = gather_objects(flat(recipe.to_dict(paths=False)))
    problems: dict[str, str] = {}
    for number, other in enumerate(others, start=1):
        for key in sorted(first.keys() | other.keys()):
            here, there = first.get(key, "not set"), other.get(key, "not set")
            if here != there and key not in problems:
                problems[key] = (
                    f"{key} is {here} in the first process and {there} in process {number}: start all with the same "
                    "recipe and overrides."
                )

    def check() -> None:
        if problems:
            raise InputError([*problems.values()])

    together(check)
