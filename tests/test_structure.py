"""What keeps the house in order: which way imports point, sizes, names, nothing private of
libraries.
"""

import ast
import subprocess

import pytest

from utils import ROOT

FILES = [
    path
    for path in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    if not path.startswith("tests/") and (ROOT / path).exists()
]
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in FILES}
LOW = {"system", "utils"}
MAY_IMPORT = {  # of our own packages
    "utils.py": set(),
    "system": {"system", "utils"},
    "prompt_datasets.py": LOW,
    "config.py": LOW,
    "command_line.py": {"config", "models", "prompt_datasets", *LOW},
    "models": {"models", "prompt_datasets", *LOW},
    "method": {"method", "models", "prompt_datasets", *LOW},
    "evaluation": {"evaluation", "method", "models", "prompt_datasets", *LOW},
    "tokens": {"tokens", "evaluation", "method", "models", "prompt_datasets", *LOW},
    "runs": {"runs", "config", "tokens", "evaluation", "method", "models", "prompt_datasets", *LOW},
}
OURS = {path.split("/")[0].removesuffix(".py") for path in FILES}
ONE_WORD = {"main", "require", "encode", "sample", "decode", "draw", "setting"}
# its place in torch's own guide to extending it
DOCUMENTED = {"torch.utils._python_dispatch.TorchDispatchMode"}
# overridden: argparse, io and torch name them
OF_LIBRARIES = {
    "error",
    "write",
    "flush",
    "forward",
    "backward",
}


def imported_modules(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def functions_of(tree: ast.AST):
    return [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def is_property(function: ast.FunctionDef) -> bool:
    """Named as what it gives, not as what it does."""
    return any(
        isinstance(node, ast.Name) and node.id in ("property", "cached_property")
        for node in function.decorator_list
    )


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path):
    allowed = MAY_IMPORT.get(path.split("/")[0])
    modules = {module.split(".")[0] for module, _ in imported_modules(TREES[path])}
    if allowed is not None:
        assert modules & OURS <= allowed
    else:  # entry points: experiments and benchmarks call the rooms, never run.py
        assert "run" not in modules or path == "app.py"


@pytest.mark.parametrize("path", FILES)
def test_nothing_private_of_libraries(path):
    private = [
        f"{module}.{name}"
        for module, names in imported_modules(TREES[path])
        for name in names or [module]
        if f"{module}.{name}" not in DOCUMENTED
        if any(
            part.startswith("_") and not part.startswith("__")
            for part in (*module.split("."), name)
        )
    ]
    assert not private


def test_few_function_names_of_one_word():
    found = {
        node.name
        for tree in TREES.values()
        for node in functions_of(tree)
        if not is_property(node)
        if "_" not in node.name.strip("_") and not node.name.startswith("__")
    }
    assert found <= ONE_WORD | OF_LIBRARIES


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NESTED_AT_MOST = 8  # in all the program


def is_nested(node: ast.AST) -> bool:
    """Whether a comprehension loops twice, over another or makes others."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    made = node.value if isinstance(node, ast.DictComp) else node.elt
    inside = [made, *(loop.iter for loop in node.generators)]
    return len(node.generators) > 1 or any(
        isinstance(part, COMPREHENSIONS) for expression in inside for part in ast.walk(expression)
    )


def is_truth_product(node: ast.AST) -> bool:
    """Whether a text or a list is multiplied by a truth value."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    sides = (node.left, node.right)
    texts = [
        side
        for side in sides
        if isinstance(side, (ast.JoinedStr, ast.List))
        or isinstance(side, ast.Constant)
        and isinstance(side.value, str)
    ]
    truths = [
        side
        for side in sides
        if isinstance(side, (ast.Compare, ast.BoolOp))
        or isinstance(side, ast.UnaryOp)
        and isinstance(side.op, ast.Not)
        or isinstance(side, ast.Call)
        and getattr(side.func, "id", "") in ("bool", "all", "any")
    ]
    return bool(texts and truths)


def test_a_statement_is_one_thought():
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    assert sum(map(is_nested, nodes)) <= NESTED_AT_MOST
    assert not any(map(is_truth_product, nodes))
