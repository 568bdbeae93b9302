"""The house: who may import whom, how large a file may be, one home for each name. Growth is a decision, made here.

The layers are those that the README draws: vision, model and data are the core; lib/ holds what the scripts lean on;
the scripts are at the top.
"""
import ast
import os
from collections import defaultdict
from graphlib import TopologicalSorter

import pytest
import torch
from helpers import ROOT

CORE = {"vision", "model", "data"}
SCRIPTS = {"train", "sample", "eval", "load_weights"}
MAY_IMPORT = {                          # file or room -> files and rooms; a file's own line replaces its room's
    "vision": {"lib.common"},
    "model": {"lib.common", "vision"},
    "data": {"lib.common", "lib.recipes", "lib.archives", "lib.pictures", "lib.records", "lib.schedule",
             "lib.tokenizer", "lib.workers"},               # which import nothing of it
    "train": CORE | {"lib", "load_weights"},
    "sample": CORE | {"lib", "load_weights"},
    "eval": CORE | {"lib", "load_weights", "benchmarks"},
    "load_weights": CORE | {"lib"},
    "lib.common": set(),
    "lib": CORE | {"lib"},
    "serve": {"lib.common", "lib.chat", "serve"},
    "benchmarks": {"lib.common", "lib.archives", "benchmarks"},
    "demo": CORE | {"lib", "demo"},
    "saved_model": set(),               # copied into every saved model, so that it stands alone
}
# What may be imported inside a function, where it is needed by one command out of several.
DOORS = {
    "data": {"lib.check_data", "lib.convert", "lib.show"},
    "sample": {"serve.server"},
    "train": {"lib.plot"},
    "eval": {"lib.asking", "load_weights"},     # so that scoring needs no torch
}

CODE = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", ".venv", "out")}
LINES = {name: len((ROOT / (name.replace(".", "/") + ".py")).read_text().splitlines()) for name in CODE}


def imports(tree: ast.AST) -> set[str]:
    """The modules of ours that are imported in a syntax tree, at its top or deeper down."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & CODE.keys()


def imports_inside_functions(tree: ast.AST) -> list[ast.AST]:
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    return [node for f in functions for node in ast.walk(f) if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("name", sorted(CODE))
def test_imports_run_downwards(name):
    room = name.split(".")[0]
    allowed = MAY_IMPORT.get(name, MAY_IMPORT[room]) | DOORS.get(name, set())
    above = {other for other in imports(CODE[name]) if not {other, other.split(".")[0]} & allowed}
    assert not above, f"{name} imports {sorted(above)}; it may import {sorted(allowed)}"


def test_no_two_files_import_each_other():
    """Doors aside. CycleError names them."""
    TopologicalSorter({name: imports(tree) - DOORS.get(name, set()) for name, tree in CODE.items()}).prepare()


def test_imports_stand_at_the_top_of_a_file():
    """An import inside a function hides what a file leans on. Each is a door that is listed above."""
    doors = [(name, ast.unparse(node)) for name, tree in CODE.items() for node in imports_inside_functions(tree)]
    assert not [(name, line) for name, line in doors if not imports(ast.parse(line)) & DOORS.get(name, set())]
    assert len(doors) <= 8


def test_files_stay_small():
    most = dict.fromkeys(LINES, 650) | {"model": 360}
    assert not {name: lines for name, lines in LINES.items() if lines > most[name]}
    assert sum(LINES[name] for name in CORE | {"train"}) <= 1800         # to be read in two hours
    assert sum(LINES[name] for name in CORE | SCRIPTS) <= 3100


def test_few_things_are_refused():
    """Each is a sentence that a user may meet. A new one may be due, but the number should not grow by itself."""
    raises = sum(isinstance(node, ast.Raise) for tree in CODE.values() for node in ast.walk(tree))
    assert raises <= 130


def test_a_name_has_one_home():
    """Whoever reads a name knows where to look. Benchmarks answer to one interface, scripts to another."""
    homes = defaultdict(set)
    for file, tree in CODE.items():
        for node in tree.body:
            for target in getattr(node, "targets", [getattr(node, "target", node)]):
                name = getattr(target, "name", getattr(target, "id", None))
                homes[name].add(file)
    interface = {"TASK", "read", "grade_answer", "summarize", "submission"}
    expected = {None, "main", "parse", "ARGS"} | {"Attention", "MLP", "Block"}
    twice = {name: files for name, files in homes.items() if len(files) > 1 and name not in expected
             and not (name in interface and all(file.startswith("benchmarks.") for file in files))}
    assert not twice


def test_tests_see_no_gpu():
    """Neither in this process nor in one that it starts, so that `make test` gives the same on a machine with GPUs."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
