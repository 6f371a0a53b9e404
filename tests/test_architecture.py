"""The rules that keep the house standing, read from the imports and calls in `lorakit/`.

`violations` says which rule a line broke. The second half plants one offence of each kind, so that the checker itself
is known to see them.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorakit.families import FAMILIES

ROOT = Path(__file__).parent.parent / "lorakit"
MAX_LINES = 400

# first name under lorakit -> floor; imports go down only
FLOORS = {
    **dict.fromkeys(["core", "errors"], 0),
    **dict.fromkeys(["diffusion", "adapters", "data", "optimizers"], 1),
    **dict.fromkeys(["families"], 2),
    **dict.fromkeys(["export", "sampling", "captioning", "evaluation"], 3),
    **dict.fromkeys(["training"], 4),
    **dict.fromkeys(["recipe"], 5),
    **dict.fromkeys(["verbs"], 6),
    **dict.fromkeys(["cli"], 7),
    **dict.fromkeys(["", "__main__"], 8),  # the public names in lorakit/__init__.py, and `python -m lorakit`
}

BASE = {"torch", "numpy", "pydantic", "safetensors", "PIL"}
MODELS = {"diffusers", "transformers", "tokenizers", "huggingface_hub", "bitsandbytes", "torchao", "onnxruntime"}
FENCE = {
    "diffusion": BASE - {"PIL"},
    "adapters": BASE | {"peft"},
    "data": BASE | {"datasets", "imagehash", "xxhash", "blake3", "pillow_heif", "pillow_jxl"},
    "optimizers": BASE | {"bitsandbytes", "prodigyopt", "schedulefree", "transformers"},
    **dict.fromkeys(["sampling", "captioning", "evaluation"], BASE | MODELS),
    "families": BASE | MODELS | {"triton"},
    "training": BASE | {"accelerate", "wandb", "tensorboard"},
    "recipe": BASE | {"tomli_w"},
    "cli": BASE | {"tomli_w", "rich"},
}
HEAVY = MODELS | {
    "peft",
    "accelerate",
    "datasets",
    "wandb",
    "tensorboard",
}  # seconds each: imported where they are used
START_UP = BASE | HEAVY | {"rich", "tomli_w"}  # what `--help` may not touch

DYNAMIC = {"importlib.import_module", "import_module", "__import__"}
# what turns bytes into code; torch.save writes a pickle
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle"}
UNSAFE_NAMES = {"torch.load", "torch.save", "torch.jit.load", "os.system", "os.popen"}


@dataclass(frozen=True)
class Import:
    """`target` is the dotted name; `lazy` is within a function, `typing` under `if TYPE_CHECKING`."""

    line: int
    target: str
    lazy: bool
    typing: bool


def read(folder: Path) -> dict[str, str]:
    """Dotted module name -> source, of all files in `folder`; a package's own file goes by the package's name."""
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        name = ".".join(parts[:-1]) if parts[-1] == "__init__" else ".".join(parts)
        sources[name] = path.read_text()
    return sources


def imports(module: str, tree: ast.AST, known: Mapping[str, str]) -> Iterator[Import]:
    """Every import, nested ones and those by importlib with a literal name included."""
    package = module if any(name.startswith(module + ".") for name in known) else module.rpartition(".")[0]

    def resolve(base: str, name: str) -> str:
        full = f"{base}.{name}"
        is_module = any(k == full or k.startswith(full + ".") for k in known)
        return full if is_module else base

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for target in {resolve(base, alias.name) for alias in node.names}:
                yield Import(node.lineno, target, lazy, typing)
        elif isinstance(node, ast.Call) and dotted(node.func) in DYNAMIC:
            literals = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            yield from (Import(node.lineno, str(name), lazy, typing) for name in literals)
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        guarded = isinstance(node, ast.If) and dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside, typing or (guarded and child in getattr(node, "body", [])))

    yield from walk(tree, False, False)


def dotted(node: ast.AST | None) -> str:
    """`a.b.c` of a chain of names, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def part(module: str) -> str:
    """What of lorakit a module belongs to: its first name below."""
    return (module.split(".") + [""])[1]


def violations(sources: Mapping[str, str], *, families: set[str]) -> list[str]:
    """One line for each broken rule: module, line, rule, and what to do."""
    trees = {module: ast.parse(source) for module, source in sources.items()}
    edges = {module: list(imports(module, tree, sources)) for module, tree in trees.items()}
    found = []
    for module, tree in trees.items():
        found += [f"{module}: {text}" for text in _size_and_name(module, sources[module])]
        for edge in edges[module]:
            found += [f"{module}:{edge.line}: {text}" for text in _import_rules(module, edge, families)]
        found += [f"{module}:{line}: {text}" for line, text in _unsafe(tree)]
        if part(module) != "families":
            found += [f"{module}:{line}: {text}" for line, text in _family_literals(tree, families)]
    return found + _cycles(edges) + _start_up(edges)


def _size_and_name(module: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > MAX_LINES:
        yield f"size: {lines} lines, {MAX_LINES} at most: split it by what belongs together"
    if re.search(r"(utils?|helpers?|managers?|handlers?)$", module):
        yield "name: a module is named after what it does"
    if part(module) not in FLOORS:
        yield f"floor: {part(module)} stands on no floor: add it to FLOORS"


def _import_rules(module: str, edge: Import, families: set[str]) -> Iterator[str]:
    own, top = part(module), edge.target.split(".")[0]
    if top == "lorakit":
        other = part(edge.target)
        here, there = FLOORS.get(own), FLOORS.get(other)
        if here is None or there is None or own == other:
            pass
        elif there > here:
            yield f"floor: {own} (floor {here}) imports {edge.target} (floor {there}): imports go down only"
        elif there == here and here != FLOORS["__main__"]:
            yield f"floor: {own} imports {edge.target} of its own floor {here}: let a higher floor bring them together"
        if other == "families" and own != "families" and set(edge.target.split(".")[2:]) & families:
            yield f"family: {edge.target} is imported by name: go through lorakit.families.load"
    elif top not in sys.stdlib_module_names:
        allowed = FENCE.get(own, BASE)
        if top not in allowed:
            yield f"fence: {own or 'lorakit'} may not import {top}, only {', '.join(sorted(allowed))}"
        elif top in HEAVY and not edge.lazy and not edge.typing:
            yield f"heavy: {top} takes seconds: import it in the function that uses it"
    if top in UNSAFE_MODULES:
        yield f"unsafe: {top} turns data into code: use safetensors and JSON"
    if edge.target in UNSAFE_NAMES:
        yield f"unsafe: {edge.target}: use safetensors and JSON"


def _unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in UNSAFE_NAMES:
            yield node.lineno, f"unsafe: {dotted(node)} reads or writes a pickle, or runs a shell"
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in UNSAFE_NAMES:
                    yield node.lineno, f"unsafe: {node.module}.{alias.name} reads or writes a pickle, or runs a shell"
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            yield node.lineno, f"unsafe: {node.func.id} runs text as code"
        for keyword in node.keywords:
            truthy = isinstance(keyword.value, ast.Constant) and bool(keyword.value.value)
            if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and truthy:
                yield node.lineno, f"unsafe: {keyword.arg}=True"


def _family_literals(tree: ast.AST, families: set[str]) -> Iterator[tuple[int, str]]:
    """Texts that are a family's name or begin with one ("sd", "sdxl_base"); prose and docstrings may speak of them."""
    pattern = re.compile(rf"({'|'.join(sorted(families, key=len, reverse=True))})([_.\d][\w.-]*)?$")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and pattern.match(node.value):
            yield node.lineno, f"family: {node.value!r} names a model family outside families/: ask the family instead"


def _cycles(edges: Mapping[str, list[Import]]) -> list[str]:
    """Every knot of modules that reach themselves; lazy and typing imports tie two modules together just as well."""
    graph = {m: {e.target for e in es if e.target in edges and e.target != m} for m, es in edges.items()}
    found = []
    for start in graph:
        paths = [[start]]
        seen = {start}
        while paths:
            path = paths.pop(0)
            if start in graph[path[-1]]:
                if start == min(path):
                    found.append(f"{start}: cycle: {' -> '.join([*path, start])}")
                break
            fresh = graph[path[-1]] - seen
            seen |= fresh
            paths += [[*path, n] for n in sorted(fresh)]
    return found


def _start_up(edges: Mapping[str, list[Import]]) -> list[str]:
    """What `lorakit --help` and `import lorakit` would load, packages' own files included."""
    now = {m: [e for e in es if not e.lazy and not e.typing] for m, es in edges.items()}
    todo = [(m, m) for m in now if m == "lorakit" or part(m) in ("cli", "__main__")]
    seen = {m for m, _ in todo}
    found = []
    while todo:
        module, way = todo.pop(0)
        for edge in now[module]:
            if edge.target.split(".")[0] in START_UP:
                found.append(
                    f"{module}:{edge.line}: start-up: {edge.target} is imported at start ({way}): import it later"
                )
            parts = edge.target.split(".")
            for name in (".".join(parts[:n]) for n in range(1, len(parts) + 1)):
                if name in now and name not in seen:
                    seen.add(name)
                    todo.append((name, f"{way} -> {name}"))
    return found


def test_the_house_stands():
    sources = read(ROOT)
    assert len(sources) > 10
    found = violations(sources, families=set(FAMILIES.names()))
    assert not found, "\n" + "\n".join(found)


# -- the checker sees each offence ----------------------------------------------------------------------------------

HOUSE = {
    "lorakit": "",
    "lorakit.core": "",
    "lorakit.core.errors": "",
    "lorakit.diffusion": "",
    "lorakit.data": "",
    "lorakit.families": "",
    "lorakit.families.sd": "",
    "lorakit.export": "",
    "lorakit.training": "",
    "lorakit.recipe": "",
    "lorakit.verbs": "",
    "lorakit.verbs.train": "",
    "lorakit.verbs.demo": "",
    "lorakit.cli": "",
    "lorakit.cli.main": "",
}

TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
OFFENCES = [
    ("lorakit.data", "from lorakit.families import load", "floor: data (floor 1) imports lorakit.families (floor 2)"),
    ("lorakit.data", "def f():\n    import lorakit.training", "imports go down only"),
    (
        "lorakit.data",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lorakit import recipe",
        "imports go down",
    ),
    ("lorakit.data.folder", "from ..families import load", "imports go down only"),
    ("lorakit.data", "import importlib\nimportlib.import_module('lorakit.families')", "imports go down only"),
    ("lorakit.data", "from lorakit.diffusion import GaussianDiffusion", "of its own floor 1"),
    ("lorakit.data", "import lorakit", "(floor 8)"),
    ("lorakit.elsewhere", "", "stands on no floor"),
    ("lorakit.data", "import diffusers", "fence: data may not import diffusers"),
    ("lorakit.diffusion", "from PIL import Image", "fence: diffusion may not import PIL"),
    ("lorakit.core.files", "def f():\n    import requests", "fence: core may not import requests"),
    ("lorakit.export", f"{TYPING}    import diffusers", "fence: export may not import diffusers"),
    ("lorakit.families.sd", "from diffusers import AutoencoderKL", "heavy: diffusers"),
    ("lorakit.training", "import pickle", "unsafe: pickle"),
    ("lorakit.training", "def f():\n    from yaml import safe_load", "unsafe: yaml"),
    ("lorakit.training", "import torch\nx = torch.load('f', weights_only=True)", "unsafe: torch.load"),
    ("lorakit.training", "from torch import save", "unsafe: torch.save"),
    ("lorakit.training", "eval('1')", "unsafe: eval"),
    ("lorakit.training", "import subprocess\nsubprocess.run('ls', shell=True)", "unsafe: shell=True"),
    ("lorakit.training", "import numpy\nnumpy.load('f', allow_pickle=True)", "unsafe: allow_pickle=True"),
    ("lorakit.training", "x = name == 'sd'", "family: 'sd' names a model family"),
    ("lorakit.training", "x = name.startswith('sdxl_base')", "family: 'sdxl_base' names"),
    ("lorakit.training", "from lorakit.families import sd", "family: lorakit.families.sd is imported by name"),
    ("lorakit.training", "x = 1\n" * (MAX_LINES + 1), "size: 401 lines"),
    ("lorakit.data.utils", "", "name: a module is named"),
    ("lorakit.cli.main", "import torch", "start-up: torch"),
    (
        "lorakit.cli.main",
        "import lorakit.recipe",
        "start-up: pydantic is imported at start",
    ),
]


@pytest.mark.parametrize(("module", "source", "message"), OFFENCES)
def test_an_offence_is_seen(module, source, message):
    house = {**HOUSE, "lorakit.recipe": "import pydantic"}
    assert violations(house, families={"sd", "sdxl"}) == []
    found = violations({**house, module: source}, families={"sd", "sdxl"})
    assert any(message in line for line in found), found
    assert all(line.startswith(module) or "start-up" in message for line in found), found


def test_cycles_are_seen_among_verbs_and_within_a_package():
    verbs = {**HOUSE, "lorakit.verbs.train": "from lorakit.verbs import demo"}
    assert violations(verbs, families={"sd"}) == []  # one way is allowed
    verbs["lorakit.verbs.demo"] = "def f():\n    from lorakit.verbs.train import train"
    found = violations(verbs, families={"sd"})
    assert found == ["lorakit.verbs.demo: cycle: lorakit.verbs.demo -> lorakit.verbs.train -> lorakit.verbs.demo"]
    package = {**HOUSE, "lorakit.data.a": "import lorakit.data.b", "lorakit.data.b": "from lorakit.data import a"}
    assert violations(package, families={"sd"}) == [
        "lorakit.data.a: cycle: lorakit.data.a -> lorakit.data.b -> lorakit.data.a"
    ]


def test_what_is_allowed_passes():
    house = {
        **HOUSE,
        "lorakit.families.sd": f"{TYPING}    from diffusers import UNet\n"
        "def load():\n    '''Of sd.'''\n    import transformers\n    x = 'sd'",
        "lorakit.training": "import torch\nfrom lorakit.families import load\nmodule.eval()\nx = 'kohya sd-scripts'",
        "lorakit.cli.main": "def run():\n    import lorakit.verbs.train\n    import torch",
    }
    assert violations(house, families={"sd", "sdxl"}) == []
