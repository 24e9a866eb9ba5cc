"""What keeps the house in order: which way imports point, names, and small statements."""

import ast
import subprocess

from utils import ROOT

LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.split()
FILES = [path for path in LISTED if not path.startswith("tests/") and (ROOT / path).exists()]
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
ENTRIES = {"run", "app", "export", "experiments", "benchmarks"}
ONE_WORD = {"main", "require", "encode", "sample", "decode", "draw", "setting"}
# Their places in torch's own guide to extending it.
DOCUMENTED = {"torch.utils._python_dispatch.TorchDispatchMode"}
# Overridden: argparse, io and torch name them.
OF_LIBRARIES = {"error", "write", "flush", "forward", "backward"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NESTED_AT_MOST = 8  # comprehensions in comprehensions, in all the program


def imported_modules(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def is_property(function: ast.FunctionDef) -> bool:
    """Named as what it gives, not as what it does."""
    return any(
        isinstance(node, ast.Name) and node.id in ("property", "cached_property")
        for node in function.decorator_list
    )


def all_nodes(*kinds):
    return [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, kinds)]


def test_imports_point_one_way():
    wrong = []
    for path, tree in TREES.items():
        room = path.split("/")[0]
        modules = {module.split(".")[0] for module, _ in imported_modules(tree)} & OURS
        # entry points call the rooms, never each other
        allowed = MAY_IMPORT.get(room, OURS - ENTRIES | {room.removesuffix(".py")})
        if modules - allowed:
            wrong.append((path, modules - allowed))
    assert not wrong


def test_nothing_private_of_libraries():
    imported = [
        f"{module}.{name}"
        for tree in TREES.values()
        for module, names in imported_modules(tree)
        for name in names or [""]
    ]
    private = [
        name
        for name in imported
        if any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    ]
    assert set(private) <= DOCUMENTED


def test_few_function_names_of_one_word():
    names = {
        node.name
        for node in all_nodes(ast.FunctionDef, ast.AsyncFunctionDef)
        if not is_property(node) and not node.name.startswith("__")
    }
    one_word = {name for name in names if "_" not in name.strip("_")}
    assert one_word <= ONE_WORD | OF_LIBRARIES


def is_nested(node: ast.AST) -> bool:
    """Whether a comprehension loops twice, over another or makes others."""
    made = node.value if isinstance(node, ast.DictComp) else node.elt
    inside = [made, *(loop.iter for loop in node.generators)]
    return len(node.generators) > 1 or any(
        isinstance(part, COMPREHENSIONS) for expression in inside for part in ast.walk(expression)
    )


def is_text(node: ast.AST) -> bool:
    is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_string or isinstance(node, (ast.JoinedStr, ast.List))


def is_truth(node: ast.AST) -> bool:
    is_negation = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("bool", "all", "any")
    return is_negation or is_call or isinstance(node, (ast.Compare, ast.BoolOp))


def test_a_statement_is_one_thought():
    """Few comprehensions in comprehensions, and no text or list times a truth value."""
    assert sum(map(is_nested, all_nodes(*COMPREHENSIONS))) <= NESTED_AT_MOST
    products = [node for node in all_nodes(ast.BinOp) if isinstance(node.op, ast.Mult)]
    for product in products:
        left, right = product.left, product.right
        assert not (is_text(left) and is_truth(right) or is_text(right) and is_truth(left))
