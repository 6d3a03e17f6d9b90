"""The layout's promises: imports run downward, packages define nothing, files stay small."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "invjax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

FLOORS = (
    {"base", "calls", "checks", "files"},
    {"conv", "linalg", "metrics", "ranges", "datasets", "driver"},
    {"models", "gradients"},
    {"defenses", "observe"},
    {"attacks", "theory"},
    {"evaluation"},
    {"report", "cli", "__main__"},
)
# The only imports between neighbours of one floor.
SIDEWAYS = {
    ("base", "checks"),
    ("driver", "conv"),
    ("observe", "defenses"),
    ("cli", "report"),
    ("cli", "invjax"),
    ("__main__", "cli"),
}


def floor(module):
    """Floor of a top-level module; the package itself stands on the top one."""
    if module == "invjax":
        return len(FLOORS) - 1
    found = [level for level, modules in enumerate(FLOORS) if module in modules]
    assert found, (
        f"invjax.{module} has no floor: place it in FLOORS of {pathlib.Path(__file__).name}"
    )
    return found[0]


def imported(source):
    """Top-level modules of invjax that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head, _, rest = alias.name.partition(".")
                if head == "invjax":
                    yield rest.partition(".")[0] or "invjax"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import, write it in full"
            head, _, rest = str(node.module).partition(".")
            if head == "invjax" and rest:
                yield rest.partition(".")[0]
            elif head == "invjax":
                yield from (alias.name for alias in node.names)


def violations(module, source):
    """Imports of a top-level module's source that do not run downward."""
    return [
        f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)})"
        for other in imported(source)
        if other != module and (module, other) not in SIDEWAYS and floor(other) >= floor(module)
    ]


def top_level(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
class TestEveryFile:
    def test_imports_run_downward(self, path):
        if path != PACKAGE / "__init__.py":
            assert violations(top_level(path), path.read_text()) == []

    def test_has_a_docstring(self, path):
        assert ast.get_docstring(ast.parse(path.read_text()))

    def test_is_small(self, path):
        assert len(path.read_text().splitlines()) <= MAX_LINES

    def test_a_package_defines_nothing(self, path):
        if path.name == "__init__.py":
            allowed = {"__all__"} | ({"__version__"} if path.parent == PACKAGE else set())
            assert definitions(path.read_text()) - allowed == set()


def definitions(source):
    """What a module defines itself, docstring and imports aside."""
    found = set()
    for node in ast.parse(source).body[1:]:
        if isinstance(node, ast.Assign):
            found |= {ast.unparse(target) for target in node.targets}
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            found.add(ast.unparse(node).splitlines()[0])
    return found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("base", "import invjax.linalg"),
        ("base", "from invjax import models"),
        ("metrics", "from invjax.datasets import load"),
        ("defenses", "from invjax.observe import observe"),
        ("attacks", "def f():\n    from invjax.theory import bounds"),
        ("gradients", "import numpy, invjax.evaluation.run as run"),
        ("evaluation", "import invjax"),
        ("report", "from invjax import cli"),
    ],
)
def test_the_check_sees_an_upward_import(module, source):
    (found,) = violations(module, source)
    assert found.startswith(f"{module} (floor")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attacks", "from invjax.attacks import labels\nfrom invjax import gradients, conv"),
        ("observe", "from invjax.defenses import chain"),
        ("cli", "import invjax\nimport jax\nfrom optax import sgd"),
        ("base", "import invjaxlike.cli"),
    ],
)
def test_the_check_allows_a_downward_import(module, source):
    assert violations(module, source) == []


def test_a_module_without_a_floor_is_refused():
    with pytest.raises(AssertionError, match=r"invjax\.novel has no floor: place it"):
        violations("attacks", "from invjax import novel")
    with pytest.raises(AssertionError, match="relative import"):
        violations("attacks", "from . import labels")


def test_the_check_sees_a_definition():
    source = '"""Doc."""\nimport a\nfrom b import c\n__all__ = []\nx = 1\ndef f():\n    pass\n'
    assert definitions(source) == {"__all__", "x", "def f():"}


def test_every_floor_is_disjoint():
    modules = [module for modules in FLOORS for module in modules]
    assert len(modules) == len(set(modules))


def run_python(program):
    # With an unknown platform the first use of a device is an error.
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def test_importing_every_module_touches_no_device():
    imports = """
import importlib, pkgutil, invjax
for module in pkgutil.walk_packages(invjax.__path__, "invjax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""
    fine = run_python(imports)
    assert fine.returncode == 0, fine.stderr
    assert "invjax.attacks.labels" in fine.stdout.split()
    touched = run_python("import jax.numpy; jax.numpy.zeros(1)")
    assert touched.returncode != 0
    assert "no_such_platform" in touched.stderr


MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:" + "|".join(["work", "tmp", "home", "root"]) + ")/")


def test_no_file_mentions_a_path_of_some_machine():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.splitlines()]
    assert pathlib.Path(__file__) in paths
    mentions = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in paths
        if path.is_file()
        for line in path.read_text(errors="ignore").splitlines()
        if MACHINE_PATH.search(line)
    ]
    assert mentions == []


def test_machine_paths_are_recognised():
    slash = "/"
    for folder in ("work", "tmp", "home", "root"):
        assert MACHINE_PATH.search(f"open('{slash}{folder}{slash}x')")
    assert not MACHINE_PATH.search("https://example.org/work/x and shared/tmp/y")
