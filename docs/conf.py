"""Sphinx: Markdown pages, and a reference made from docstrings.

Docstrings of this project are Markdown in Google's layout: single backticks are code, a block indented by four spaces
is a program, a fence is a drawing. `_as_rst` turns that into what autodoc reads, and links the names that are public.
"""

# ruff: noqa: ARG001, PLR0917 - what Sphinx passes to its listeners

import inspect
import re
import sys
import typing
from pathlib import Path

import msgspec
from sphinx.domains.python import PyObject
from sphinx.pycode import ModuleAnalyzer

sys.path.insert(0, str(Path(__file__).parent.parent))

import chatkore_async
from chatkore_async import testing, types

project = "chatkore_async"
author = "chatkore_async contributors"
copyright = f"2025, {author}"  # noqa: A001 - the name of Sphinx's setting
version = release = chatkore_async.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "chatkore_async"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
# Readable on a white and on a black page; Furo's own defaults are low in contrast for comments.
pygments_style = "friendly"
pygments_dark_style = "github-dark"

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["pyarrow", "ray"]  # large, and this manual is built without them
autodoc_type_aliases = {"Session": "aiohttp.ClientSession"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

# No inventories are fetched while the manual is built, so names of other packages cannot be links.
nitpick_ignore_regex = [
    (r"py:.*", r"(aiohttp|asyncio|collections|contextlib|logging|msgspec|os|ssl|starlette|types|typing|yarl)\..*"),
    # What `create` takes: the fields of ChatCompletionRequest and CallOptions, which are described each for itself.
    (r"py:class", r"chatkore_async\._options\.CallParams"),
    # Whatever type a data set has.
    (r"py:class", r"chatkore_async\.integrations\.ray\.D"),
    # Annotations that autodoc shows as they are written, and which no page of ours describes.
    (r"py:class", r"UnsetType|UNSET|URL|SSLContext|optional|Self|Unpack.*|TracebackType|_\w+"),
]

# Where a user imports a public name from. The rooms they live in are not told.
_PUBLIC = dict.fromkeys(types.__all__, "chatkore_async.types")
_PUBLIC |= dict.fromkeys(chatkore_async.__all__, "chatkore_async")
_PUBLIC |= dict.fromkeys(testing.__all__, "chatkore_async.testing")

# Unions that have a name; at run time only their members are left.
_MESSAGE = (
    "SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | ChatCompletionMessage"
    " | Mapping[str, object]"
)
_PARTS = "TextPart | ImagePart | AudioPart | FilePart"

_SPAN = re.compile(r"(?<![`:\w])`([^`]+)`(?![`_])")
_COLON = "\ue000"  # napoleon takes a colon in a property's first line for the end of a type
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*)")


def _linked(match: re.Match[str]) -> str:
    text = " ".join(match[1].split())
    after = match.string[match.end() : match.end() + 1]
    seam = r"\ " if after.isalnum() else ""  # `ValueError`s
    if text in _PUBLIC and inspect.isclass(getattr(sys.modules[_PUBLIC[text]], text)):
        return f":py:class:`~{_PUBLIC[text]}.{text}`{seam}"
    return f"``{text}``{seam}"


def _blocks(lines: list[str]) -> list[str]:
    """Give fences and indented programs the directives that reStructuredText wants."""
    out: list[str] = []
    fenced = program = False
    section = False  # inside "Args:" and the like, where an indented line is no program
    for number, line in enumerate(lines):
        bare = line.strip()
        if bare.startswith("```"):
            fenced = not fenced
            out += ["", ".. code-block:: text", ""] if fenced else [""]
            continue
        if fenced:
            out.append("    " + line)
            continue
        if bare and not line.startswith(" "):
            section = program = False
        if re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", line):
            section = True
        before = lines[number - 1].strip() if number else ""
        marked = next((each for each in reversed(lines[:number]) if each.strip()), "").endswith("::")
        if line.startswith("    ") and not (before or section or program or marked):
            program = True
            out += [".. code-block:: python", ""]
        out.append(line)
    return out


def _with_attributes(thing: type, lines: list[str]) -> list[str]:
    """Turn "Attributes:" into fields; for a struct or a TypedDict, with the type of each and with those left out."""
    hints: dict[str, object] = {}
    if issubclass(thing, msgspec.Struct):
        hints = {name: _hint(thing, name) for name in thing.__struct_fields__ if not name.startswith("_")}
    elif typing.is_typeddict(thing):
        hints = dict(thing.__annotations__)
    told: dict[str, list[str]] = {}
    rest: list[str] = []
    names: list[str] = []
    inside = False
    for line in lines:
        if inside and line and not line.startswith(" "):
            inside = False
        if line == "Attributes:":
            inside = True
        elif not inside:
            rest.append(line)
        elif match := _ENTRY.match(line):
            names = match[1].split(", ")
            told |= {name: [match[2]] for name in names}
        elif line.strip():
            for name in names:
                told[name].append(line.strip())
    out: list[str] = []
    for name in hints or told:
        out.append(f":ivar {name}: {' '.join(told.get(name) or [_default(thing, name)])}")
        if name in hints:
            out.append(f":vartype {name}: {_shown(hints[name])}")
    return [*rest, "", *out, ""] if out else lines


def _hint(thing: type, name: str) -> object:
    return next(base.__annotations__[name] for base in thing.__mro__ if name in vars(base).get("__annotations__", {}))


def _shown(hint: object) -> str:
    """A type as it is read aloud, with links to what this manual describes."""
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    text = re.sub(r"typing\.Required\[(.*)\]$", r"\1", text)
    text = re.sub(r"\b(?:chatkore_async|collections|typing|msgspec|ssl)(?:\.\w+)*\.(?=\w)", "", text)
    text = re.sub(r"Annotated\[(\w+), Meta\(.*?\)\]", r"\1", text)
    text = re.sub(r"Optional\[(\w+)\]", r"\1 | None", text)
    text = re.sub(r"^Union\[(.*)\]$", lambda match: match[1].replace(", ", " | "), text).replace("NoneType", "None")
    text = text.replace(_MESSAGE, "Message").replace(_PARTS, "ContentPart").replace("UnsetType", "UNSET")
    text = text.replace("Mapping[str, object]", "JSON object")
    pieces = [piece for piece in re.split(r"(\w+)", text) if piece]
    done: list[str] = []
    for piece in pieces:
        if piece in _PUBLIC and inspect.isclass(getattr(sys.modules[_PUBLIC[piece]], piece)):
            done.append(f":py:class:`~{_PUBLIC[piece]}.{piece}`")
        elif done and done[-1].startswith("``"):
            done[-1] = f"{done[-1][:-2]}{piece}``"
        else:
            done.append(f"``{piece}``")
    return "\\ ".join(re.sub(r"^``( *)(.*?)( *)``$", r"\1``\2``\3", each) for each in done)


def _default(thing: type, name: str) -> str:
    """The default, where it is more than "nothing"."""
    if not issubclass(thing, msgspec.Struct):
        return ""
    field = next(field for field in msgspec.structs.fields(thing) if field.name == name)
    if (
        field.default is msgspec.NODEFAULT or isinstance(field.default, msgspec.Struct) or not field.default
    ):  # UNSET is false too
        return ""
    return f"``{field.default!r}`` by default."


def _as_rst(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    out = _blocks(lines)
    if inspect.isclass(thing):
        out = _with_attributes(thing, out)
    if what == "property":
        out[0] = out[0].replace(": ", f"{_COLON} ")
    # A span of code may be broken over two lines, but not over two paragraphs.
    paragraphs = "\n".join(out).split("\n\n")
    done = [each if each.lstrip().startswith(".. code-block") else _SPAN.sub(_linked, each) for each in paragraphs]
    # Attributes are fields of their class, and no targets of their own.
    lines[:] = re.sub(r":attr:`([^`]+)`", r"``\1``", "\n\n".join(done)).split("\n")


def _with_colons(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _without_fields(
    app: object, what: str, name: str, thing: object, options: object, signature: str, returns: str
) -> tuple[str, str] | None:
    """Leave out the constructor of exceptions, which nobody makes, and of structs but settings: fields stand below."""
    if name.rpartition(".")[2] in ("Timeout", "Limits", "RetryPolicy", "RetryBudget"):
        return None
    if signature and inspect.isclass(thing) and issubclass(thing, msgspec.Struct | Exception):
        return "", ""
    return None


def _found(app: typing.Any, env: typing.Any, node: typing.Any, content: typing.Any) -> typing.Any:
    """Lead a name that is spelt by its room (`chatkore_async._config.Timeout`) to where it is public."""
    _, _, name = node.get("reftarget", "").rpartition(".")
    if node.get("refdomain") != "py" or name not in _PUBLIC:
        return None
    target, kind = f"{_PUBLIC[name]}.{name}", node["reftype"]
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, kind, target, node, content)


def setup(app: typing.Any) -> None:
    """Sphinx asks for this."""
    app.connect("autodoc-process-docstring", _as_rst, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", _with_colons, priority=900)  # after it
    app.connect("autodoc-process-signature", _without_fields)
    app.connect("missing-reference", _found)
    # `create` has four overloads, which say less than the one signature that the page gives.
    client = ModuleAnalyzer.for_module("chatkore_async._client")
    client.analyze()
    client.overloads.clear()
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Fields"
