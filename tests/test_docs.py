"""The API pages list the public surface, and every public function says what it takes and gives.

Public are the names in a package's `__all__`, the functions and classes of the modules among these and
of `MODULES`, the classes that such functions take or return, and `NAMES`.
"""

import ast
import importlib
import inspect
import itertools
import pathlib
import pkgutil
import re
import textwrap
import typing

import pytest

import invjax

PAGES = pathlib.Path(__file__).parents[1] / "docs" / "api"
MODULES = (
    "invjax.base",
    "invjax.conv",
    "invjax.defenses.base",
    "invjax.defenses.law",
    "invjax.evaluation.calibrate",
    "invjax.evaluation.course",
    "invjax.evaluation.parallel",
    "invjax.evaluation.tradeoff",
    "invjax.evaluation.utility",
    "invjax.report.course",
    "invjax.report.figures",
    "invjax.theory.two_layer",
)
NAMES = (
    "invjax.attacks.matching.generator.unet",
    "invjax.cli.audit.AuditConfig",
    "invjax.cli.privacy.PrivacyConfig",
    "invjax.cli.sweep.ReportConfig",
    "invjax.cli.sweep.SweepConfig",
    "invjax.cli.tradeoff.TradeoffConfig",
    "invjax.models.chain.Spec",
    "invjax.models.chain.chain_model",
)


def find(name):
    """Module or object of a dotted name; a module is preferred."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, last = name.rpartition(".")
        return getattr(find(parent), last)


def is_definition(thing):
    return inspect.isfunction(thing) or inspect.isclass(thing) or hasattr(thing, "__wrapped__")


def members(module):
    """Public objects of a module or package, modules inside `__all__` opened."""
    if hasattr(module, "__all__"):
        for name in module.__all__:
            thing = getattr(module, name)
            yield from members(thing) if inspect.ismodule(thing) else [(name, thing)]
        return
    for node in ast.parse(inspect.getsource(module)).body:
        names = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.asname for alias in node.names if alias.asname == alias.name]
        yield from ((name, getattr(module, name)) for name in names if name[0] != "_")


def mentioned(hint):
    """Classes of invjax anywhere in a type."""
    if inspect.isclass(hint) and hint.__module__.startswith("invjax"):
        yield hint
    for inner in typing.get_args(hint):
        for one in inner if isinstance(inner, list) else [inner]:
            yield from mentioned(one)


def with_classes(things):
    """The same, and the classes in their signatures and fields."""
    found, left = {}, list(things)
    while left:
        thing = left.pop()
        if id(thing) in found:
            continue
        found[id(thing)] = thing
        if is_definition(thing):
            for hint in typing.get_type_hints(thing).values():
                left += mentioned(hint)
    return list(found.values())


def packages():
    yield invjax
    for _, name, is_package in pkgutil.walk_packages(invjax.__path__, "invjax."):
        if is_package:
            yield importlib.import_module(name)


def surface():
    """Public objects."""
    modules = [*packages(), *map(importlib.import_module, MODULES)]
    things = [thing for module in modules for _, thing in members(module)]
    return with_classes([*things, *map(find_object, NAMES)])


def find_object(path):
    module, _, name = path.rpartition(".")
    return getattr(find(module), name)


def listed(text):
    """`module.name` of every `.. api::` directive of a page."""
    for block in re.findall(r"^```\{eval-rst\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        head, *rest = block.split("\n")
        module = re.fullmatch(r"\.\. api:: (\S+)", head)
        assert module, head
        yield from (f"{module[1]}.{name}" for name in " ".join(rest).split())


def called(thing):
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing)}"


def differences(names, things):
    """Public objects that no page lists, and listed names that are not public or listed twice."""
    pages = [(name, find_object(name)) for name in names]
    shown = [id(thing) for _, thing in pages]
    public = {id(thing) for thing in things}
    missing = [called(thing) for thing in things if id(thing) not in shown]
    unknown = [name for name, thing in pages if id(thing) not in public]
    twice = [name for name, thing in pages if shown.count(id(thing)) > 1]
    return missing, unknown, twice


def sections(text):
    """Sections of a Google docstring by name, each a text."""
    parts = re.split(
        r"^(Args|Returns|Raises|Yields|Attributes|Example):\n", text, flags=re.MULTILINE
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def complaints(function):
    """What the docstring of a function leaves out."""
    text = inspect.getdoc(function)
    if not text:
        return ["has no docstring"]
    said = sections(text)
    signature = inspect.signature(function)
    named = set(re.findall(r"^\s\s\*{0,2}(\w+):", said.get("Args", ""), re.MULTILINE))
    wrong = [f"Args leave out {name}" for name in signature.parameters if name not in named]
    wrong += [f"Args have {name}" for name in sorted(named - set(signature.parameters))]
    if signature.return_annotation not in (None, "None") and "Returns" not in said:
        wrong.append("no Returns")
    source = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    for error in sorted(raised(source)):
        if error not in said.get("Raises", ""):
            wrong.append(f"Raises leave out {error}")
    return wrong


def raised(function):
    """Errors that a function raises itself, those of functions inside it left out."""
    left = list(function.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if ast.unparse(node.exc.func) in ("ValueError", "TypeError"):
                yield ast.unparse(node.exc.func)
        left += ast.iter_child_nodes(node)


SURFACE = surface()
FUNCTIONS = [one for one in SURFACE if is_definition(one) and not inspect.isclass(one)]
CLASSES = [one for one in SURFACE if inspect.isclass(one)]


def test_the_pages_list_the_public_surface():
    names = [name for page in sorted(PAGES.glob("*.md")) for name in listed(page.read_text())]
    assert len(names) > 300
    missing, unknown, twice = differences(names, SURFACE)
    assert missing == [], "list these on a page of docs/api"
    assert unknown == [], "put these into their package's __all__, or take them off the page"
    assert twice == []


def test_differences_are_seen():
    names = ["invjax.chain", "invjax.defenses.chain", "invjax.linalg.taps"]
    found = differences(names, [invjax.chain, invjax.observe])
    assert found == (["invjax.observe.observe"], ["invjax.linalg.taps"], names[:2])


@pytest.mark.parametrize("function", FUNCTIONS, ids=called)
def test_a_function_says_what_it_takes_and_gives(function):
    assert complaints(function) == []


@pytest.mark.parametrize("thing", CLASSES, ids=called)
def test_a_class_names_its_fields(thing):
    assert thing.__doc__
    assert unnamed_fields(thing) == set()


def unnamed_fields(thing):
    """Fields neither in a class's `Attributes` nor followed by a text of their own."""
    said = sections(inspect.getdoc(thing)).get("Attributes", "")
    named = set(re.findall(r"^\s\s(\w+):", said, re.MULTILINE))
    body = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0].body
    followed = {
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    fields = {name for name in vars(thing).get("__annotations__", ()) if name[0] != "_"}
    return fields - named - followed


def test_complaints_are_made():
    def bare(a, *, b) -> int:
        """Does.

        Args:
          a: one.
          c: none of its own.
        """
        if a:
            raise ValueError(b)

        def inner():
            raise TypeError

        return inner

    assert complaints(bare) == [
        "Args leave out b",
        "Args have c",
        "no Returns",
        "Raises leave out ValueError",
    ]
    assert complaints(lambda: None) == ["has no docstring"]
