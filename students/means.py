"""The metrics of an optimiser step, put together from its micro-batches and from all processes."""

from __future__ import annotations

from torch import Tensor

from students.batch import Batch
from students.ranks import Ranks


class Means:
    """Means over the step's weighted tokens, all together and by mode; scalars are sums of shares."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, share: float) -> None:
        self._scalars[name] = self._scalars.get(name, 0.0) + share * value

    def add_tokens(self, batch: Batch, values: dict[str, Tensor]) -> None:
        for name, value_N in values.items():
            for prefix, mask_N in (("", None), ("think.", batch.think_N), ("no_think.", ~batch.think_N)):
                weight_N = batch.weight_N if mask_N is None else batch.weight_N * mask_N
                key = prefix + name
                self._sums[key] = self._sums.get(key, 0.0) + float((weight_N * value_N).sum())
                self._counts[key] = self._counts.get(key, 0.0) + float(weight_N.sum())

    def of_all(self, ranks: Ranks) -> Means:
        """Those of all processes together."""
        pooled = Means()
        pooled._sums, pooled._counts, pooled._scalars = map(ranks.sum, (self._sums, self._counts, self._scalars))
        return pooled

    def scalar(self, name: str) -> float:
        return self._scalars[name]

    def means(self) -> dict[str, float | None]:
        """A mode without tokens in this step has no mean: null, never NaN."""
        by_token = {key: self._sums[key] / self._counts[key] if self._counts[key] else None for key in self._sums}
        return {**by_token, **self._scalars}
