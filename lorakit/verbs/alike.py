"""That all processes of a launch have the same recipe and model: each reads the files, and the command, of its own
machine."""

from lorakit.core.errors import InputError
from lorakit.core.processes import gather_objects, on_each_rank, together
from lorakit.families.protocol import Family
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


def base_of(family: Family) -> dict[str, str]:
    """What the base is, by its parts: the digest of each part's files and of how they are read."""
    return {part: family.fingerprint(part) for part in (*family.components, "scheduler")}


def refuse_unlike_base(family: Family) -> None:
    """Raises InputError on all ranks, with the parts of the model that one of them has otherwise than the first."""
    first, *others = on_each_rank(lambda: base_of(family))
    for number, other in enumerate(others, start=1):
        if unlike := [part for part in first if first[part] != other.get(part)]:
            raise InputError(
                f"model.path: the files of {', '.join(unlike)} are not the same for process {number} as for the first: "
                "give every machine the same model."
            )
