"""Griffe extension: shows docstrings as they are written.

Docstrings here are plain text in which only `code` is marked up. Markdown would read the stars of π* and Q*G as
emphasis, [ranks][micro-batches] as a link, and <answer> as HTML.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_CODE = re.compile(r"(`[^`]*`)")


class PlainDocstrings(griffe.Extension):
    """Escapes what Markdown would interpret."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "".join(
                part if part.startswith("`") else _escaped(part) for part in _CODE.split(obj.docstring.value)
            )


def _escaped(text: str) -> str:
    text = re.sub(r"<(?=[\w/])", "&lt;", text)
    text = re.sub(r"(?<=\w)\*", r"\\*", text)
    return text.replace("][", r"]\[")
