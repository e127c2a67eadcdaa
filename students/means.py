"""The metrics of an optimiser step, put together from its micro-batches and from all processes."""

from __future__ import annotations

from torch import Tensor

from students.batch import Batch
from students.ranks import Ranks


class Means:
    """Means over weighted tokens, all together and by mode, kept as sums and counts: these can be added."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add_sum(self, name: str, total: float, num_tokens: float) -> None:
        """A metric's sum over so many weighted tokens."""
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + num_tokens

    def add_tokens(self, batch: Batch, values: dict[str, Tensor]) -> None:
        for name, value_N in values.items():
            for prefix, mask_N in (("", None), ("think.", batch.think_N), ("no_think.", ~batch.think_N)):
                weight_N = batch.weight_N if mask_N is None else batch.weight_N * mask_N
                self.add_sum(prefix + name, float((weight_N * value_N).sum()), float(weight_N.sum()))

    def add(self, other: Means) -> None:
        """Those of other tokens: of a step's next update."""
        for name, total in other._sums.items():
            self.add_sum(name, total, other._counts[name])

    def of_all(self, ranks: Ranks) -> Means:
        """Those of all processes together."""
        pooled = Means()
        pooled._sums, pooled._counts = map(ranks.sum, (self._sums, self._counts))
        return pooled

    def means(self) -> dict[str, float | None]:
        """A mode without tokens in this step has no mean: null, never NaN."""
        return {key: self._sums[key] / self._counts[key] if self._counts[key] else None for key in self._sums}
