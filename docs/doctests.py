"""An extension for mkdocs.yml: shows a docstring's doctest as a session.

Markdown alone would take its >>> for a quotation.
"""

import re
from typing import Any

import griffe

SESSION = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SESSION.sub(
                lambda found: f"```pycon\n{found.group()}\n```", obj.docstring.value
            )
