"""Settings of the documentation: `sphinx-build -W -b html docs build/docs`."""

import importlib
import inspect
import pathlib
import sys

from sphinx.util.docutils import SphinxDirective

import invjax

project = "invjax"
author = copyright = "the authors of invjax"
version = release = invjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
default_role = "literal"
smartquotes = False  # dashes of options stay two

nb_execution_mode = "off"  # notebooks are shown as they were run
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the signature has them
napoleon_use_ivar = True  # fields of a NamedTuple are listed once, under its docstring
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"invjax {version}"
html_copy_source = False


def find(name):
    """A module by its public name, by which it can be imported from then on."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package, _, last = name.rpartition(".")
        sys.modules[name] = getattr(find(package), last)
        return sys.modules[name]


class Api(SphinxDirective):
    """`.. api:: MODULE` and names of it below: their table, then the docstring of each."""

    required_arguments = 1
    has_content = True

    def run(self):
        """Write the directives of autosummary and autodoc, and let Sphinx read these."""
        (module,) = self.arguments
        names = " ".join(self.content).split()
        lines = [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names] + [""]
        for name in names:
            lines += [*entry(name, getattr(find(module), name)), ""]
        return self.parse_text_to_nodes("\n".join(lines))


def entry(name, thing):
    """Lines of one object; of a class with its own methods and properties."""
    if not inspect.isclass(thing):
        return [f".. autofunction:: {name}"] if callable(thing) else [f".. autodata:: {name}"]
    own = [
        key
        for key, value in vars(thing).items()
        if (inspect.isfunction(value) or isinstance(value, property))
        and (key == "__call__" or not key.startswith("_"))
        and inspect.getdoc(value)
    ]
    if "Attributes:" not in (inspect.getdoc(thing) or ""):  # options of commands: a text below each
        own += vars(thing).get("__dataclass_fields__", ())
    return [f".. autoclass:: {name}", *([f"   :members: {', '.join(own)}"] if own else [])]


def copy_notebooks(app):
    """Sphinx reads below its own folder only; a copy is written anew where it differs."""
    here = pathlib.Path(app.srcdir)
    (here / "notebooks").mkdir(exist_ok=True)
    texts = {
        path.name: path.read_text().replace("../benchmarks/RESULTS.md", "../results.md")
        for path in (here.parent / "notebooks").glob("*.ipynb")
    }
    for old in (here / "notebooks").iterdir():
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        copy = here / "notebooks" / name
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)


def link_results(app, path, parent, content):
    """What is included from above links to pages of ours."""
    content[0] = content[0].replace("(benchmarks/RESULTS.md)", "(results.md)")


def hide_colons(app, what, name, thing, options, lines):
    """Of the text below a field, where napoleon would read a type; the second time they come back."""
    if what == "attribute":
        lines[:] = [line.translate(str.maketrans(":\ue000", "\ue000:")) for line in lines]


def setup(app):
    """Add the directive, the notebooks and the links."""
    app.add_directive("api", Api)
    app.connect("builder-inited", copy_notebooks)
    app.connect("autodoc-process-docstring", hide_colons, priority=1)
    app.connect("autodoc-process-docstring", hide_colons, priority=999)
    app.connect("include-read", link_results)
