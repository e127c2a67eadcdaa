"""A vLLM engine in this process, which shares its cores or its GPU: asked, stepped and given weights by whoever has it.

It is made from the very words that a server is started with, and starts when it is first wanted. vLLM takes a process
for its own and changes what belongs to all: variables of the environment, random streams, ``torch.set_num_threads``,
where its log goes. Here all of it is as it was when the engine has started. What stays is a process group of one
process, until the engine is closed; so there is no engine beside another process group.

On a GPU it has a stream of its own, which is the current one in its own calls alone. vLLM waits for the stream that it
began on, whichever is current in the thread that asks; and it makes one current for good, while the trainer's other
threads go on where they were, so that nothing would order what they hand to each other.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from distill.errors import DistillError, GoneError, UserError
from distill.progress import say
from distill.vllm.launch import Launch
from distill.vllm.segments import Question, Segment, checked
from distill.vllm.worker import set_weights

_WHO = "vLLM in this process"


class Engine:
    """Answers questions, in one step after the other.

    ``launch`` is what a server of the same kind would be started with; ``log`` gets what vLLM logs.
    """

    def __init__(self, launch: Launch, *, log: Path) -> None:
        self.launch, self.log = launch, log
        self._engine: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._handler: logging.Handler | None = None
        self._asked: dict[str, tuple[int, Question]] = {}
        self._num_asked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_asked(self) -> int:
        """Questions under way."""
        return len(self._asked)

    def start(self) -> None:
        """Nothing where it has started. Raises UserError for arguments that vLLM does not take, DistillError where it
        cannot start."""
        if self._engine is not None:
            return
        name = f"{self.launch.whose} {self.launch.checkpoint.name}"
        say(f"{name}: starting vLLM in this process to {self.launch.role}, log in {self.log}")
        started = time.monotonic()
        self._log_to_file()
        with _undisturbed(on_gpu=self.launch.on_gpu):
            os.environ.update(self.launch.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
            self._engine = self._started()
        say(f"{name}: ready to {self.launch.role} after {time.monotonic() - started:.0f} s")

    def _log_to_file(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(self.log)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("vllm")
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        # Standard output is the run's own.
        logger.propagate = False

    def _started(self) -> Any:
        # Read when vLLM is imported: it leaves the handlers as they are.
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        def refuse(message: str) -> NoReturn:
            raise UserError(f"vLLM does not take sampler.server_args as they are: {message}")

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        parser.error = refuse
        # Nothing is text here; a bar for a file that is loaded tells nothing.
        words = [*self.launch.model_flags(), "--skip-tokenizer-init", "--no-use-tqdm-on-load", "--disable-log-stats"]
        arguments = EngineArgs.from_cli_args(parser.parse_args(words))
        if self.launch.on_gpu:
            self._stream = torch.cuda.Stream()
        try:
            # Not before vLLM was imported: it watches which stream is made the current one.
            with self._at_work():
                return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
        except (ValueError, RuntimeError, OSError) as error:
            raise GoneError(
                f"{_WHO} could not start for the {self.launch.whose}: {error}; {self.log} says more"
            ) from error

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """A block of vLLM's own, on its stream: behind what the caller's has been given, and before what comes next."""
        if self._stream is None:
            yield
            return
        ours = torch.cuda.current_stream()
        self._stream.wait_stream(ours)
        try:
            with torch.cuda.stream(self._stream), _variables(self.launch.precision()):
                yield
        finally:
            ours.wait_stream(self._stream)

    def close(self) -> None:
        """Give back all that it holds."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None
            self._asked.clear()
            gc.collect()
        if self._handler is not None:
            logging.getLogger("vllm").removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def ask(self, place: int, question: Question) -> None:
        """Put a question; ``place`` comes back with its answer. Raises DistillError for one that vLLM refuses."""
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._num_asked += 1
        name = str(self._num_asked)
        try:
            sampling = SamplingParams(**question.sampling, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
            self._engine.add_request(name, {"prompt_token_ids": question.prompt}, sampling)
        except (ValueError, VLLMValidationError) as error:
            raise DistillError(f"{_WHO} refuses a request ({error})") from error
        self._asked[name] = place, question

    def step(self) -> list[tuple[int, Segment]]:
        """One pass of the model, and the answers that it ended. Raises DistillError for one that is none."""
        # Every question has a seed; vLLM draws from the process's random stream besides.
        with self._at_work(), torch.random.fork_rng(_devices(on_gpu=self.launch.on_gpu)):
            outputs = self._engine.step()
        return [self._answer(output) for output in outputs]

    def _answer(self, output: Any) -> tuple[int, Segment]:
        place, question = self._asked.pop(output.request_id)
        (said,) = output.outputs
        ids = list(said.token_ids)
        prompt_logprobs = []
        if "prompt_logprobs" in question.sampling:
            entries = zip(output.prompt_logprobs[1:], question.prompt[1:], strict=True)
            prompt_logprobs = [float(entry[token].logprob) for entry, token in entries]
        logprobs = [float(entry[token].logprob) for entry, token in zip(said.logprobs, ids, strict=True)]
        segment = Segment(ids, logprobs, prompt_logprobs)
        vocabulary = self.launch.checkpoint.shape.vocabulary
        return place, checked(segment, said.finish_reason, question, who=_WHO, vocabulary=vocabulary)

    def drop(self) -> None:
        """Call off the questions under way."""
        if self._asked:
            self._engine.abort_request(list(self._asked))
            self._asked.clear()

    def take_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Mapping[str, str] | None:
        """Replace every weight of the model by ``weights``, which have the names of a plain checkpoint.

        The fingerprint of each as the layers hold it, by name; None on a GPU, where vLLM's own reload returns nothing.
        """
        if self.launch.on_gpu:
            with self._at_work():
                self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            return None
        # vLLM's own way leaves wrong weights on a CPU.
        tensors = dict(weights)
        (held,) = self._engine.apply_model(lambda model: set_weights(model, tensors))
        return dict(held)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache. Raises DistillError where some of it is kept."""
        with self._at_work():
            has_forgotten = self._engine.reset_prefix_cache(reset_running_requests=True)
        if not has_forgotten:
            raise DistillError(f"{_WHO} cannot empty its prefix cache; {self.log} may say why")

    def sleep(self, level: Literal[1, 2]) -> None:
        with self._at_work():
            self._engine.sleep(level)

    def wake(self, part: Literal["weights", "kv_cache"]) -> bool:
        """Whether it is awake as a whole then."""
        with self._at_work():
            return bool(self._engine.wake_up([part]))


def check_installed() -> None:
    """Raise UserError where this environment has no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "sampler.place=in_process runs vLLM in this process, and it is not installed in this environment "
            "(`./do setup-server` installs it); install it, or set sampler.backend to transformers"
        )


@contextmanager
def _undisturbed(*, on_gpu: bool) -> Iterator[None]:
    """Behind the block the process is as it was: its environment, its random streams, its threads."""
    variables, set_num_threads = dict(os.environ), torch.set_num_threads
    streams = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(_devices(on_gpu=on_gpu)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        torch.set_num_threads = set_num_threads
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        os.environ.update(variables)


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """A block in which the environment has those, where the user has not set them."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _devices(*, on_gpu: bool) -> list[int]:
    """Those whose random streams vLLM draws from, beside the processor's."""
    return [torch.cuda.current_device()] if on_gpu else []
