"""For mkdocstrings: examples in docstrings, ``>>> ..`` and what they print, as code and not as quotations."""

from __future__ import annotations

import griffe


class DoctestsAsCode(griffe.Extension):
    """Puts fences round every example before docstrings are read as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called of every module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """An example lasts until the next empty line; what is indented by four is code already."""
    lines, within = [], False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if not within and line.lstrip().startswith(">>> ") and indent < 4:
            lines += ["", "```python"]
            within = True
        elif within and not line.strip():
            lines.append("```")
            within = False
        lines.append(line)
    return "\n".join([*lines, "```"] if within else lines)
