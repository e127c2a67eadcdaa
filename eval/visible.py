"""Text that others wrote, as a page can show it: every character stands for itself, and none acts on its neighbours.

A model may say anything. Markup is escaped by the template; what is left are characters that no page may hold (NUL,
halves of surrogate pairs) and those that reorder or hide the text around them (direction marks, other controls).
"""

from __future__ import annotations

import re

_ACTING = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ud800-\\udfff\\ufffe\\uffff]"
)


def visible(text: str) -> str:
    """``text`` with the code point in brackets where a character cannot be shown or would act on the page.

    >>> visible("a\\x00b\\u202ec\\nd")
    'a[U+0000]b[U+202E]c\\nd'
    """
    return _ACTING.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)
