"""What a server says where it does not do what it was asked for."""

from __future__ import annotations

from typing import Any

import httpx

from distill.errors import DistillError, UserError


class RefusedError(DistillError):
    """A server refused a request for what it asks; ``complaint`` is what it said."""

    def __init__(self, url: str, complaint: str) -> None:
        super().__init__(f"{url} refuses a request ({complaint}); its log says why")
        self.url, self.complaint = url, complaint


def complaint(answer: httpx.Response) -> str:
    """What a server says about a request it did not answer."""
    try:
        document = answer.json()
        message = document.get("error", document)
        text = str(message.get("message", message) if isinstance(message, dict) else message)
    except (ValueError, AttributeError):
        text = answer.text
    return f"status {answer.status_code}: {' '.join(text.split())[:300]}"


def document_of(answer: httpx.Response, url: str) -> Any:
    """The JSON that ``url`` answered. Raises DistillError where it is none: who answers is no vLLM server then."""
    try:
        return answer.json()
    except ValueError:  # neither JSON nor UTF-8
        said = " ".join(answer.content[:80].decode(errors="replace").split())
        raise DistillError(
            f"{url} answered with status {answer.status_code} and no JSON ({said!r}); something else than a vLLM "
            f"server answers there, a proxy for one"
        ) from None


def refusal(url: str, status: int, trouble: str) -> DistillError:
    """The error that a refused request to ``url`` is; ``trouble`` is the server's complaint."""
    # vLLM also forbids what a flag would open, and names the flag.
    if status in (401, 403) and "--enable-" not in trouble:
        return UserError(f"{url} refuses the API key ({trouble}); set DISTILL_TEACHER_API_KEY to the server's")
    if status in (404, 405):
        return UserError(
            f"{url} does not exist ({trouble}); a server has one role: hidden states come from one that was started to "
            f"score, responses and log-probabilities from one that was started to generate"
        )
    return RefusedError(url, trouble)
