"""Turns the references of docstrings, [`Class`], into links of the API pages, and their types into plain text."""

import re
from pathlib import Path

import griffe


_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
_TYPE = re.compile(r"^( +[\w, ]+ \()(.+)(\):)", flags=re.MULTILINE)  # name (`int`, *optional*, defaults to 1):
_RAISED = re.compile(r"^( +)\[`~?(?:\w+\.)*(\w+)`\]:", flags=re.MULTILINE)  # [`~module.Error`]: If ...
_PAGES = Path(__file__).parent / "api"
_DOCUMENTED = {
    path.rpartition(".")[2]: path
    for page in _PAGES.glob("*.md")
    for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
}


class References(griffe.Extension):
    """Links what the API pages document; other names, such as those of diffusers, become code."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = _RAISED.sub(r"\1\2:", _TYPE.sub(_plain_type, obj.docstring.value))
            obj.docstring.value = _REFERENCE.sub(_link, text)


def _link(match: re.Match) -> str:
    parts = match[1].split(".")
    for i, owner in enumerate(parts):
        if owner in _DOCUMENTED:
            return f"[`{'.'.join(parts[i:])}`][{'.'.join([_DOCUMENTED[owner], *parts[i + 1 :]])}]"
    return f"`{match[1]}`"


def _plain_type(match: re.Match) -> str:
    """Returns the type alone, without marks: the page shows the default from the signature."""
    marks = re.compile(r", \*optional\*.*|\[(?=`)|(?<=`)\]|`|~(?:\w+\.)*")
    return match[1] + marks.sub("", match[2]) + match[3]
