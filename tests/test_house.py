"""The house rules that a machine can check: one-way imports, small files and functions, no globals, docstrings."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
PACKAGES = ("policies", "profiler", "tiercache")  # a package imports from itself and from those to its left
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 50, 8
# What people call has as many options as it has.
PUBLIC_ENTRIES = {
    "tiercache.engine.offload.offload",
    "tiercache.store.convert.convert",
    "tiercache.calibrate.command.calibrate",
    "tiercache.quality.command.quality",
}
# Questions that one file alone may ask: (what is asked, where).
ONE_FILE_RULES = {
    r"\.type [!=]= \"(cpu|cuda)\"": ("tiercache/tiers/device.py",),
    r"\.given\b": ("tiercache/engine/source.py",),
    r"os\.environ|getenv|environb": ("tiercache/config/environment.py",),
    r"fcntl\.flock": ("tiercache/store/folders.py",),
    r"\bO_DIRECT\b": ("profiler/direct.py",),
    r"madvise": ("profiler/hugepages.py",),
    r"[!=]= \"source\"": ("tiercache/config/options.py",),
    r"(config|self)\.mode\b|get\(\"mode\"\)": ("tiercache/config/options.py", "tiercache/engine/session.py"),
    r"(plan|made|placed)\.hbm is|self\.hbm is": ("policies/plan.py", "tiercache/tiers/stack.py"),
}

# Lowest first: inside tiercache a file imports only from entries above it in this list. An entry that is a package
# stands for all of its files, which may import one another; "tiercache" is the package's own face, which hands out
# the engine.
LADDER = (
    *(
        "errors",
        "compat",
        "config.sizes",
        "config.environment",
        "config.cache_folder",
        "config.drafting",
        "config.options",
    ),
    *("stats.neurons", "stats.drafting", "stats.run", "stats.difference"),
    *("display", "notebook", "progress", "text", "pictures", "tiers.device"),
    *("quant.codes", "quant.packing", "quant.planes", "quant.hadamard", "model.meta_model"),
    *("kernels.activation", "kernels.blocks", "kernels.contract", "kernels.reference_blocks", "kernels.reference"),
    *("kernels.cpu", "kernels.cuda", "kernels.select"),
    *("quant.gptq", "quant.tune", "quant.corpus"),
    *("store.format", "store.header", "store.folders", "store.reader", "store.identity"),
    *("formats", "store.checkpoint", "store.catalog", "store.layout"),
    *("store.manifest", "store.manifests", "store.writer", "store.activations", "store.encode"),
    *("store.estimate", "store.journal", "store.conversion_plan"),
    *("store.convert", "store.planestore", "store.imagined", "store.calibration", "store.cache"),
    *(
        "tiers.slab",
        "tiers.breakeven",
        "tiers.link",
        "tiers.last_reads",
        "tiers.arrivals",
        "tiers.tier",
        "tiers.transfer",
    ),
    *("tiers.neurons", "tiers.stack"),
    *(
        "model.card_attention",
        "model.trace",
        "model.linear",
        "model.growing_cache",
        "model.layer_parts",
        "model.fused_layer",
        "model.head",
    ),
    *("model.importance", "model.choosing", "model.block_planes"),
    *("model.slotted_planes", "model.block_matmuls", "model.block_passes", "model.mixed", "model.shortlist"),
    *("model.binding", "model.embedding", "model.attach", "model.pass_hooks"),
    *("kv", "draft", "decode", "generation"),
    *(
        "engine.compute_dtype",
        "engine.card_memory",
        "engine.machine",
        "engine.source",
        "engine.memory",
        "engine.workload",
        "engine.budgets",
        "engine.prediction",
        "engine.explanation",
        "engine.probe_cache",
        "engine.this_hardware",
        "engine.on_cpu",
        "engine.run",
        "engine.drafting",
        "engine.placement",
        "engine.actuals",
    ),
    *("engine.mixed_plan", "engine.mixed", "engine.mixed_fit", "engine.attach_drafters"),
    *(
        "engine.drafting_choice",
        "engine.exact",
        "engine.planning",
        "engine.imagined_plan",
        "engine.handle",
        "engine.session",
        "engine.offload",
    ),
    "tiercache",
    *("doctor", "bench", "quality", "calibrate", "serve", "commands", "cli"),
    "__main__",
)

# The only torch-free promise that is made file by file.
TORCH_FILE = "profiler.probe"


def _files() -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((HOUSE / package).rglob("*.py")):
            parts = path.relative_to(HOUSE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = _files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@cache
def imports(name: str) -> set[str]:
    """Modules that a module imports, function-level imports included; ours as deep as they are files.

    An `if TYPE_CHECKING` block counts as well, for it hides a cycle and does not remove it.
    """
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            module = str(node.module)
            deeper = {f"{module}.{alias.name}" for alias in node.names} & FILES.keys()
            names_something_else = len(deeper) < len(node.names)
            found |= deeper | ({module} if names_something_else else set())
    return found - {name}


def rung(module: str) -> int | None:
    """Place on the ladder of a module of tiercache."""
    within = module.removeprefix("tiercache.")
    places = [place for place, entry in enumerate(LADDER) if within == entry or within.startswith(entry + ".")]
    return places[0] if places else None


def public(name: str) -> Iterator[tuple[str, ast.AST]]:
    """A module, its public classes and functions, and their public methods."""
    yield name, TREES[name]
    stack: list[tuple[str, ast.AST]] = [(name, TREES[name])]
    while stack:
        prefix, parent = stack.pop()
        for node in getattr(parent, "body", ()):
            if isinstance(node, _DEFINITIONS) and not node.name.startswith("_"):
                yield f"{prefix}.{node.name}", node
                if isinstance(node, ast.ClassDef):
                    stack.append((f"{prefix}.{node.name}", node))


def test_the_walk_finds_the_house() -> None:
    assert {"policies.residency", "profiler.probe", "tiercache", "tiercache.store.convert"} <= FILES.keys()
    assert "tiercache.store.reader" in imports("tiercache.store.convert")
    assert "policies.residency" in imports("tiercache.tiers.tier")


def files_of(package: str) -> list[str]:
    """The modules of one package."""
    return [name for name in FILES if name.split(".")[0] == package]


def roots(name: str) -> set[str]:
    """The packages that a module imports from."""
    return {module.split(".")[0] for module in imports(name)}


def test_packages_import_leftwards() -> None:
    for place, package in enumerate(PACKAGES):
        for name in files_of(package):
            assert not roots(name) & {*PACKAGES[place + 1 :], "examples", "tests"}, name


def test_policies_know_only_numpy_and_the_standard_library() -> None:
    for name in files_of("policies"):
        assert roots(name) <= {"policies", "numpy", *sys.stdlib_module_names}, name
        assert not roots(name) & {"time", "datetime", "random", "threading", "asyncio"}, name  # no clock, no chance


def test_profiler_uses_torch_only_in_the_probe() -> None:
    for name in files_of("profiler"):
        assert name == TORCH_FILE or not roots(name) & {"torch", "transformers"}, name


def test_tiercache_imports_down_the_ladder() -> None:
    wrong = [line for name in files_of("tiercache") for line in _off_the_ladder(name)]
    assert not wrong, "\n".join(wrong)


def _off_the_ladder(name: str) -> Iterator[str]:
    below = {module: rung(module) for module in imports(name) if module.split(".")[0] == "tiercache"}
    own = rung(name)
    if FILES[name].name == "__init__.py" and not below:
        return
    if own is None:
        yield f"{name} has no place on the ladder in {__file__}: enter it above whatever imports it"
        return
    for module, other in below.items():
        same_package = other == own and name.count(".") > 1
        if other is None:
            yield f"{name} imports {module}, which stands on no rung"
        elif other >= own and not same_package:
            yield f"{name} imports {module}, which does not stand below it"


def test_no_cycle_anywhere() -> None:
    left = {name: imports(name) & FILES.keys() for name in FILES}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import one another in a circle: {sorted(left)}"


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import tiercache; tiercache.TiercacheError", set()),
        ("import policies.pinned, policies.residency", set()),
        ("import tiercache, numpy", {"numpy"}),  # or the test would see nothing
    ],
)
def test_importing_the_package_imports_nothing_heavy(statement: str, loaded: set[str]) -> None:
    code = f"{statement}; import sys; print(*({{'torch', 'transformers', 'numpy', 'lmdb'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HOUSE)
    assert set(found.stdout.split()) == loaded


def test_habits() -> None:
    wrong = [f"{name}: {what}" for name in FILES for what in _bad_habits(name)]
    assert not wrong, "\n".join(wrong)


def _bad_habits(name: str) -> Iterator[str]:
    lines = FILES[name].read_text(encoding="utf-8").count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: bare except"
        if isinstance(node, _FUNCTIONS) and f"{name}.{node.name}" not in PUBLIC_ENTRIES and not _is_command(node):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name}: {length} lines"
            taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(taken) - (taken[:1] in (["self"], ["cls"]))
            if count > MAX_PARAMETERS:
                yield f"{node.name}: {count} parameters"


def _is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether typer makes a command of it, whose parameters are its options."""
    return any("command(" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("question", ONE_FILE_RULES)
def test_one_file_asks(question: str) -> None:
    asking = {
        str(path.relative_to(HOUSE)) for path in FILES.values() if re.search(question, path.read_text(encoding="utf-8"))
    }
    assert asking == set(ONE_FILE_RULES[question])


def test_everything_public_is_documented() -> None:
    files = [name for name, path in FILES.items() if path.stat().st_size]
    public_ones = ((what, node) for name in files for what, node in public(name))
    bare = [what for what, node in public_ones if ast.get_docstring(node) is None and not _is_told_above(what)]
    assert not bare


def _is_told_above(method: str) -> bool:
    """Whether a class that a method's class inherits from has a docstring for it."""
    *_, owner, leaf = method.split(".")
    for base in CLASSES[owner].bases if owner in CLASSES else ():
        above = CLASSES.get(ast.unparse(base).split("[")[0])
        for node in above.body if above is not None else ():
            if isinstance(node, _FUNCTIONS) and node.name == leaf and ast.get_docstring(node):
                return True
        if above is not None and _is_told_above(f"{above.name}.{leaf}"):
            return True
    return False


def test_one_file_knows_transformers_moving_parts() -> None:
    private = re.compile(r"_attn_implementation|_is_stateful|_supports_attention|past_key_values|_is_user_defined")
    for name, path in FILES.items():
        if name == "tiercache.compat":
            continue
        assert not {module for module in imports(name) if module.startswith("transformers.")}, name
        assert not private.search(path.read_text(encoding="utf-8")), name
