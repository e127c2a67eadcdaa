"""Where the toolkit keeps what it can make again: a folder under the user's cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """``$XDG_CACHE_HOME/strong-to-weak``, or ``~/.cache/strong-to-weak`` where the variable is unset or relative."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG rules say that a relative path is to be ignored.
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "strong-to-weak"
