"""The verifier: whether a response gives the prompt's answer. It reads what was written and executes none of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from distill.encode import Encoder
from distill.errors import UserError
from distill.prompts import PromptSource
from distill.response import opening
from distill.types import Prompt, Rollout
from eval.equality import WORKERS
from eval.graders import GRADERS, grade, grader_of
from eval.tasks import suited_grader


class Verifier:
    """Judges responses to prompts that have an answer. ``grader`` is a key of ``eval.graders.GRADERS``."""

    def __init__(self, grader: str, encoder: Encoder) -> None:
        assert grader in GRADERS, f"unknown grader {grader}"
        self.grader, self.encoder = grader, encoder

    @classmethod
    def for_prompts(
        cls, source: PromptSource, prompts: Sequence[Prompt], encoder: Encoder, *, grader: str | None, stage: str
    ) -> Verifier:
        """The verifier of the prompts that a stage will ask.

        ``grader`` None leaves the choice to the prompts' source or to their answers. Raises UserError for a prompt
        without an answer and for a grader that does not exist.
        """
        answers = [prompt.answer for prompt in prompts if prompt.answer is not None]
        if len(answers) < len(prompts):
            open_prompt = next(prompt for prompt in prompts if prompt.answer is None)
            raise UserError(
                f"stage {stage} rewards right answers, and {len(prompts) - len(answers)} of its {len(prompts)} prompts "
                f"have none, for example {str(open_prompt.messages[-1]['content'])[:60]!r}; give every prompt an "
                "answer (the column 'answer'), or take an on_policy stage, which needs none"
            )
        return cls(grader_of(grader) if grader else source.grader or suited_grader(answers), encoder)

    def verdicts(self, rollouts: Sequence[Rollout]) -> list[bool]:
        """Right or wrong, a response each; one whose thinking is not closed is wrong."""
        # Threads wait for the processes that compare expressions; the other graders take no time.
        with ThreadPoolExecutor(max_workers=WORKERS if self.grader == "math" else 1) as pool:
            return list(pool.map(self._is_right, rollouts))

    def _is_right(self, rollout: Rollout) -> bool:
        answer = rollout.request.prompt.answer
        assert answer is not None, "for_prompts saw an answer to every prompt"
        text = opening(rollout, self.encoder) + self.encoder.decode(rollout.response_ids)
        return grade(self.grader, text, answer)


def verdicts_where_known(rollouts: Sequence[Rollout], source: PromptSource, encoder: Encoder) -> list[bool | None]:
    """Right or wrong, by one grader for all; None where the prompt has no answer."""
    answered = [rollout for rollout in rollouts if rollout.request.prompt.answer is not None]
    prompts = [rollout.request.prompt for rollout in answered]
    verifier = Verifier.for_prompts(source, prompts, encoder, grader=None, stage="")
    verdicts = iter(verifier.verdicts(answered))
    return [None if rollout.request.prompt.answer is None else next(verdicts) for rollout in rollouts]
