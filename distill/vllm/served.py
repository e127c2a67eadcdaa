"""What one can know of a server by a single question, without a client: its model, and whether it is well."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from distill.errors import UserError
from distill.vllm.address import checked_url, is_loopback
from distill.vllm.refusal import complaint, refusal


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of its model: the name it has there, and the most tokens of prompt and response together."""

    name: str
    context: int | None

    @classmethod
    def of(cls, answer: httpx.Response, url: str) -> ServedModel:
        """What ``answer`` to GET /v1/models says. Raises UserError or DistillError where it says nothing of a model."""
        if answer.status_code != 200:
            raise refusal(f"{url}/v1/models", answer.status_code, complaint(answer))
        try:
            model = answer.json()["data"][0]
            context = model.get("max_model_len")
            return cls(str(model["id"]), None if context is None else int(context))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"{url}/v1/models does not name a model; is this the URL of a vLLM server?") from None


def served_model(url: str, *, api_key: str | None = None) -> ServedModel:
    """The model behind ``url``. Raises UserError where there is no server, or it does not say."""
    url = checked_url(url)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=10.0, trust_env=not is_loopback(url))
    except httpx.TransportError as error:
        raise UserError(f"no server answers at {url} ({error}); start it, or check the address") from None
    return ServedModel.of(answer, url)


def is_healthy(url: str) -> bool:
    """Whether a server answers at ``url`` and says that it is well."""
    try:
        return httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
