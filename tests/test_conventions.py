"""The rules of CONTRIBUTING.md that a program can check, each with an example that it refuses."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "apportion"

# Left to right. A module imports from its own layer and from those on its left.
LAYERS = (
    *(
        "checks",
        "masked",
        "batch",
        "streams",
        "bars",
        "data",
        "sampling",
        "logprobs",
        "microbatches",
        "models",
        "pretrained",
        "rollout",
        "score",
    ),
    *("credit", "parsing", "update", "train", "evaluate", "recipes", "stages", "quickstart", "control", "cli"),
    "__main__",
)
# Tensors and numbers in, tensors out: no model, no device, no file.
PURE = ("checks", "masked", "batch", "credit", "update.aggregation", "update.losses")
PURE_LIBRARIES = {"torch", "jaxtyping"}
# These may use NumPy besides, for what lies on the host: texts, and what a CPU does quicker so.
ON_HOST = {"credit.characters", "credit.row_keys"}
# Calls that make a GPU wait for the host.
SYNCHRONISING = {"item", "tolist", "cpu", "numpy"}
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "matplotlib")
# What runs inside of a box: the standard library, and its own folder.
BOXED = "score.boxed."
BANNED_NAMES = {"utils", "common", "base", "helpers", "misc", "types", "core"}
LONGEST_FILE, LONGEST_FUNCTION = 450, 45
# Where the name to import is not the name to install.
DISTRIBUTIONS = {"huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Check = Callable[[str, ast.Module], Iterator[str]]


def modules() -> dict[str, str]:
    """Map each module's name below apportion, such as `credit.assign`, to its source."""
    paths = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(p for p in parts if p != "__init__"): path.read_text() for parts, path in paths.items()}


def within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def imported(tree: ast.Module) -> Iterator[str]:
    """List the full names of the modules that a module imports, inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "apportion.(a relative import)"
        elif isinstance(node, ast.ImportFrom) and node.module == "apportion":
            yield from (f"apportion.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def imports_from_its_right(name: str, tree: ast.Module) -> Iterator[str]:
    here = name.split(".")[0]
    if not here:
        return  # apportion/__init__.py gathers the public names
    if here not in LAYERS:
        yield f"{name}: place {here!r} in LAYERS"
        return
    for module in imported(tree):
        root, _, inner = module.partition(".")
        if name.startswith(BOXED) and root in sys.stdlib_module_names | {"apportion"}:
            continue  # its modules alone are sent into a box: they know each other by relative imports
        if name.startswith(BOXED):
            yield f"{name} imports {module}, which a box does not have"
        layer = inner.split(".")[0]
        if root == "apportion" and (layer not in LAYERS or LAYERS.index(layer) > LAYERS.index(here)):
            yield f"{name} imports {module}, which is not on its left"


def counts_one_by_one(loop: ast.expr) -> bool:
    """Recognise range(n), but neither blocks, which have a step, nor the log2(n) rounds of a doubling."""
    if not isinstance(loop, ast.Call) or not isinstance(loop.func, ast.Name) or loop.func.id != "range":
        return False
    return len(loop.args) < 3 and not ast.unparse(loop.args[-1]).endswith(".bit_length()")


def impurities(name: str, tree: ast.Module) -> Iterator[str]:
    if not within(name, PURE):
        return
    for module in imported(tree):
        root, _, inner = module.partition(".")
        libraries = PURE_LIBRARIES | ({"numpy"} if name in ON_HOST else set())
        allowed = within(inner, PURE) if root == "apportion" else root in libraries | sys.stdlib_module_names
        if not allowed:
            yield f"{name} imports {module}; the pure core knows {', '.join(sorted(PURE_LIBRARIES))} and itself"
    # On a CPU there is no device to wait for.
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    on_cpu = [node for node in branches if ast.unparse(node.test).endswith("device.type == 'cpu'")]
    exempt = {node for branch in on_cpu for line in branch.body for node in ast.walk(line)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in SYNCHRONISING and node not in exempt:
            yield f"{name}:{node.lineno} calls .{node.attr}, which waits for the device"
        if isinstance(node, ast.For | ast.comprehension) and counts_one_by_one(node.iter):
            yield f"{name}:{node.iter.lineno} loops over range(...); rows and tokens are tensor axes"


def body_length(function: Function) -> int:
    """Count the lines of a body, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def what_is_too_long(name: str, tree: ast.Module) -> Iterator[str]:
    if (lines := max((getattr(node, "end_lineno", 0) or 0 for node in tree.body), default=0)) > LONGEST_FILE:
        yield f"{name} has {lines} lines; {LONGEST_FILE} is the most, one idea a file"
    for function in functions(tree):
        if (lines := body_length(function)) > LONGEST_FUNCTION:
            yield f"{name}:{function.lineno} {function.name} has {lines} lines; {LONGEST_FUNCTION} is the most"


def public_nodes(node: ast.AST) -> Iterator[Function | ast.ClassDef]:
    """List what a reader of a module meets: its public functions and classes, and the public methods of those."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public_nodes(child)


def missing_docstrings(name: str, tree: ast.Module) -> Iterator[str]:
    if tree.body and not ast.get_docstring(tree):
        yield f"{name} has no docstring"
    for node in public_nodes(tree):
        if not ast.get_docstring(node):
            yield f"{name}:{node.lineno} {node.name} has no docstring"


def dimensions(text: str) -> list[str]:
    """Read `B T1`, `B T+1` and `B, T + 1` as the same axes, and `*any` as `...`."""
    parts = re.sub(r"\s*\+\s*", "+", text).replace(",", " ").split()
    return [re.sub(r"^([A-Z]+)1$", r"\1+1", re.sub(r"^\*.*", "...", part)) for part in parts]


def annotated_shapes(annotation: ast.expr | None) -> list[tuple[str, list[str]]]:
    """List the (kind, axes) of the tensors in an annotation: one in `Float[Tensor, "B T"] | None`, many in a tuple."""
    return [
        (node.value.id, dimensions(node.slice.elts[1].value))
        for node in (ast.walk(annotation) if annotation else ())
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
        if isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2
        if isinstance(node.slice.elts[1], ast.Constant) and isinstance(node.slice.elts[1].value, str)
        if node.value.id in {"Float", "Int", "Bool", "Shaped", "Num"}
    ]


def documented_shapes(docstring: str, section: str) -> dict[str, tuple[list[str], str]]:
    """Read the entries `name: (B, T) float.` of one section of a docstring as name -> (axes, dtype)."""
    text = re.search(rf"^{section}:\n((?:[ ]+.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    entry = re.compile(r"^ {4}(?:(\w+): )?\(([^()]*)\)(?: (\w+))?", re.MULTILINE)
    found = entry.findall(text.group(1)) if text else []
    return {name or str(index): (dimensions(axes), dtype) for index, (name, axes, dtype) in enumerate(found)}


def agrees(kind: str, axes: list[str], documented: tuple[list[str], str]) -> bool:
    """Compare the axes up to the first variadic one, and the dtype where the docstring names one."""
    dtype = {"Float": "float", "Int": "int", "Bool": "bool"}.get(kind, "")
    named = re.fullmatch(r"(float|int|bool)\d*", documented[1])
    fixed = axes.index("...") if "..." in axes else None
    return axes[:fixed] == documented[0][:fixed] and (not named or not dtype or named.group(1) == dtype)


def annotated_names(node: Function | ast.ClassDef) -> dict[str, ast.expr | None]:
    if isinstance(node, ast.ClassDef):
        fields = (child for child in node.body if isinstance(child, ast.AnnAssign))
        return {field.target.id: field.annotation for field in fields if isinstance(field.target, ast.Name)}
    return {a.arg: a.annotation for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


def shapes_that_disagree(name: str, tree: ast.Module) -> Iterator[str]:
    for node in (n for n in ast.walk(tree) if isinstance(n, Function | ast.ClassDef)):
        docstring, section = ast.get_docstring(node) or "", "Attributes" if isinstance(node, ast.ClassDef) else "Args"
        documented = documented_shapes(docstring, section)
        for argument, annotation in annotated_names(node).items():
            shapes = annotated_shapes(annotation)
            if shapes and argument in documented and not any(agrees(*s, documented[argument]) for s in shapes):
                yield f"{name}:{node.lineno} {node.name}: the docstring gives {argument} another shape or dtype"
        returned = [] if isinstance(node, ast.ClassDef) else annotated_shapes(node.returns)
        told = list(documented_shapes(docstring, "Returns").values())
        if returned and len(told) == len(returned) and not all(map(agrees, *zip(*returned, strict=True), told)):
            yield f"{name}:{node.lineno} {node.name}: the docstring gives the result another shape or dtype"


def undeclared_libraries(name: str, tree: ast.Module) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in (*project["dependencies"], *extras)}
    for module in imported(tree):
        root = module.split(".")[0]
        if root not in sys.stdlib_module_names | {"apportion"} and DISTRIBUTIONS.get(root, root) not in declared:
            yield f"{name} imports {root}, which pyproject.toml does not declare"


def places_outside(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.search(r"(^|[ /.])shared/|/work\b", str(node.value)):
            yield f"{name}:{node.lineno} names a folder outside of the project"


def undefined_metrics(name: str, tree: ast.Module) -> Iterator[str]:
    """A metric key such as `score/mean` has its own row in docs/metrics.md."""
    rows = set(re.findall(r"^\| `([a-z]+/\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    stages = "|".join(sorted({row.split("/")[0] for row in rows}))
    key = re.compile(rf"({stages})/[a-z]\w*")
    if within(name, ("evaluate",)):
        return  # reads what others log, and knows names that a run may lack
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Constant)):
        if isinstance(node.value, str) and node.value not in rows and key.fullmatch(node.value):
            yield f"{name}:{node.lineno} {node.value} is not defined in docs/metrics.md"


CHECKS: tuple[Check, ...] = (
    imports_from_its_right,
    impurities,
    what_is_too_long,
    missing_docstrings,
    shapes_that_disagree,
    undeclared_libraries,
    places_outside,
    undefined_metrics,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_the_rule(check: Check) -> None:
    found = [complaint for name, source in modules().items() for complaint in check(name, ast.parse(source))]
    assert not found, "\n".join(found)


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION + 1)
SHAPES = 'def f(x: Float[Tensor, "B T"]{more}) -> {result}:\n    """Do.\n\n    {section}:\n        {entry}\n    """'


@pytest.mark.parametrize(
    ("check", "name", "source"),
    [
        (imports_from_its_right, "credit.gae", "from apportion.update.losses import policy_loss"),
        (imports_from_its_right, "rollout", "def f():\n    import apportion.train.ppo"),
        (imports_from_its_right, "score", "from apportion import GAE"),
        (imports_from_its_right, "score", "from . import attention"),
        (imports_from_its_right, "novelty", ""),
        (impurities, "credit.gae", "import transformers"),
        (impurities, "credit.gae", "import numpy"),
        (impurities, "credit.gae", "from apportion.data import reviews"),
        (impurities, "update.losses", "x = loss.item()"),
        (impurities, "credit.gae", "if x.device.type == 'cpu':\n    pass\nelse:\n    x.numpy()"),
        (impurities, "credit.gae", "for t in range(T):\n    pass"),
        (impurities, "credit.gae", "x = [row for b in range(B)]"),
        (what_is_too_long, "credit", LONG_FUNCTION),
        (what_is_too_long, "credit", "x = 1\n" * (LONGEST_FILE + 1)),
        (missing_docstrings, "credit", "x = 1"),
        (missing_docstrings, "credit", '"""A module."""\nclass A:\n    """A class."""\n    def f(self): ...'),
        (shapes_that_disagree, "a", SHAPES.format(more="", result="None", section="Args", entry="x: (B, N) float.")),
        (shapes_that_disagree, "a", SHAPES.format(more="", result="None", section="Args", entry="x: (B, T) bool.")),
        (
            shapes_that_disagree,
            "a",
            SHAPES.format(more="", result='Float[Tensor, " B"]', section="Returns", entry="(B, T) float."),
        ),
        (
            shapes_that_disagree,
            "a",
            'class A:\n    """A.\n\n    Attributes:\n        x: (B) int64.\n    """\n    x: Int[T, "T"]',
        ),
        (undeclared_libraries, "a", "import numba.core"),
        (places_outside, "a", 'x = open("../shared/data/x")'),
        (undefined_metrics, "a", 'metrics = {"score/mood": 1.0}'),
    ],
)
def test_a_violation_is_found(check: Check, name: str, source: str) -> None:
    assert list(check(name, ast.parse(source)))


def test_shapes_that_agree_are_read_and_accepted() -> None:
    entries = "x: (B, T) float. Text.\n        y: (B, T + 1) or None. (Text)"
    more = ', y: Int[Tensor, "B T1"] | None'
    source = SHAPES.format(more=more, result='Bool[Tensor, " B"]', section="Args", entry=entries)
    tree = ast.parse(source)
    read = documented_shapes(ast.get_docstring(next(functions(tree))) or "", "Args")
    assert read == {"x": (["B", "T"], "float"), "y": (["B", "T+1"], "or")}
    assert not list(shapes_that_disagree("a", tree))


def test_no_file_has_a_name_that_holds_anything() -> None:
    banned = [path for path in PACKAGE.rglob("*") if path.stem in BANNED_NAMES]
    assert not banned, f"a helper lives with its one caller: {banned}"


def place_in_all(name: str) -> tuple[int, str]:
    """Sort as ruff does: constants, classes, the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_the_public_names_are_complete_sorted_and_importable() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if within(str(node.module), ("apportion",))]
    homes = {alias.name: str(node.module) for node in ours for alias in node.names}
    package = importlib.import_module("apportion")
    listed = list(getattr(package, "__all__", []))
    assert listed == sorted(set(listed), key=place_in_all)
    assert homes.keys() == set(listed)
    for name, home in homes.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("names", ["__doc__", "Limits, Outcome, Tests, run_many, run_tests", "Benepar, Parser, Stanza"])
def test_what_needs_nothing_heavy_loads_nothing_heavy(names: str) -> None:
    """Processes that parse or run programs begin in a tenth of a second so."""
    code = f"import sys\nfrom apportion import {names}\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not loaded
