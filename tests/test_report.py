"""The report of a synthetic run: what it says, that it says nothing it should not, and that it needs no network."""

import dataclasses
import json
import math
import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest

from distill.embedded.task import ask, solution
from distill.embedded.tokenizer import build_tokenizer
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import Shape
from distill.sampler import OnFinished
from distill.types import MODES, Prompt, Request, Rollout, Sampling
from eval import report
from eval.curve_charts import Places, score_charts
from eval.figure import Series, line_chart, short
from eval.gantt import LEFT, RIGHT, WIDTH, gantt_charts, strips
from eval.page import MODE_NAMES, count, duration
from eval.report import render, verdict, write_report
from eval.run_files import RunFiles
from eval.runner import evaluate
from eval.statistics import estimate
from eval.switching import ModeSwitching
from eval.tasks import Task, load_task

HOSTILE = "</script><script>alert('x')</script> & \"quotes\" \x00 \u202e ' onclick='y'"
SHAPE = Shape(3, 4, 2, 32, 128, 384, 320, True)
SKILL = {
    "teacher": {"think": 0.99, "no_think": 0.45},
    "start": {"think": 0.02, "no_think": 0.1},
    "off_policy": {"think": 0.45, "no_think": 0.31},
    "on_policy": {"think": 0.95, "no_think": 0.42},
}


class Pretender:
    """Answers the embedded task with a given skill."""

    def __init__(self, encoder: Encoder, skill: float) -> None:
        self.encoder, self.skill = encoder, skill

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Rollout:
        source = random.Random(request.seed)
        text, answer = request.prompt.messages[0]["content"], str(request.prompt.answer)
        if source.random() > self.skill:
            answer = source.choice([digit for digit in "0123456789" if digit != answer])
        thought = solution(ask(text)) if text.endswith("=") else f"Hm. {HOSTILE}"
        ids = self.encoder.tokenizer.encode(
            f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>" if request.mode == "think" else f"{answer}<|im_end|>",
            add_special_tokens=False,
        )
        if request.mode == "think" and source.random() > self.skill + 0.4:
            ids = ids[: len(ids) // 2]
        stop = "stop" if ids[-1] in self.encoder.stop_ids else "length"
        return Rollout(request, tuple(ids), (False,) * len(ids), (0.0,) * len(ids), stop, speaker="x")  # type: ignore[arg-type]


def metrics() -> list[dict[str, Any]]:
    """What 128 off-policy and 60 on-policy steps would record."""
    source = random.Random(0)
    rows: list[dict[str, Any]] = []
    for stage, num_steps in (("off_policy", 128), ("on_policy", 60)):
        for step in range(num_steps):
            share = (step + 1) / num_steps
            row: dict[str, Any] = {"stage": stage, "step": step, "global_step": len(rows) + 1}
            if stage == "off_policy":
                row |= {"loss": 5.5 * math.exp(-6 * share) + 0.2 + 0.02 * source.random(), "reverse_kl": None}
                row |= {"forward_kl": None, "student_entropy": 0.3 + 3 * math.exp(-5 * share)}
            else:
                row |= {"loss": 0.4 * math.exp(-3 * share) + 0.02 * source.random()}
                row |= {
                    "reverse_kl": row["loss"],
                    "forward_kl": row["loss"] * 1.4,
                    "student_entropy": 0.4 - 0.2 * share,
                }
                row |= {"teacher_entropy": 0.21 + 0.01 * source.random()}
            row |= {"grad_norm": 1.5 + source.random(), "num_tokens": 2000 + source.randrange(300), "seconds": 0.8}
            row |= {"seconds.sample": 0.32, "seconds.score": 0.08, "seconds.train": 0.2, "length": 20.0}
            row |= {"flops": 1e9, "tokens.student_train": 700, "tokens.student_sample": 300}
            for mode, length in (("think", 31.0), ("no_think", 2.1)):
                seen = mode == "think" or source.random() > 0.2
                row |= {
                    f"{mode}.length": length + source.random() if seen else None,
                    f"{mode}.closure": 1 - 0.1 * source.random() if seen else None,
                    f"{mode}.truncation": 0.05 * source.random() if seen else None,
                }
            rows.append(row)
    return rows


def cost(tokens: int, flops: float, seconds: float, *stages: str, reused: int = 0) -> dict[str, Any]:
    shown = {"tokens": tokens, "flops": flops, "seconds": seconds, "reused_tokens": reused}
    shown["tokens_per_second"] = tokens / seconds if seconds else None
    return {**shown, "stages": {stage: dict(shown) for stage in stages}}


WARNING = {
    **{"stage": "on_policy", "step": 31, "global_step": 160, "guard": "repetition", "verdict": "warn"},
    "sentence": f"the share of repeated 4-grams has risen by 0.31 {HOSTILE}",
}


def recorded() -> list[dict[str, Any]]:
    """What the run keeps of the student's tokens: a question in both modes, before and after the stage."""
    return [
        {
            **{"stage": "on_policy", "step": step, "global_step": 128 + step, "prompt_id": "p"},
            **{"prompt": "3+4=", "reference": "7", "mode": mode, "finish_reason": "stop", "divergence": "reverse_kl"},
            **{"tokens": ["7", f"\ud800{HOSTILE}", "\n"], "kl": [0.02, kl, 0.5], "logprob": [-0.1, -2.5, 0.0]},
        }
        for step, kl in ((0, 7.5), (60, 0.04))
        for mode in MODES
    ]


def curve() -> list[dict[str, Any]]:
    """Points of a learning curve; each counts what its stage has spent."""
    return [
        {
            **{"stage": stage, "step": step, "global_step": before + step, "tokens": 1000 * step, "flops": 1e9 * step},
            "scores": [
                {"task": "validation", "mode": "think", "metric": "avg@1", "mean": mean, "ci95": [mean - 0.1, mean]}
            ],
        }
        for stage, before, step, mean in (
            *(("off_policy", 0, 0, 0.1), ("off_policy", 0, 128, 0.4)),
            *(("on_policy", 128, 0, 0.4), ("on_policy", 128, 60, 0.9)),
        )
    ]


def switching() -> ModeSwitching:
    shares = {"right_mode": 0.75, "right_mode@1": 0.9, "right_mode@2": 0.6, "right_mode/both": 0.5}
    metrics = {name: estimate({"a": [share], "b": [share]}) for name, share in shares.items()}
    return ModeSwitching(
        checkpoint="on_policy",
        settings_hash="",
        num_dialogues=2,
        num_turns=2,
        metrics=metrics,
        leakage=None,
        num_broken=0,
        num_tokens=9,
        num_prompt_tokens=9,
        flops=None,
        seconds=1.0,
    )


def make_run(run: Path, *, num_questions: int = 60, samples: int = 4) -> Path:
    """A run directory as a finished run leaves it."""
    encoder = Encoder(build_tokenizer())
    task = load_task("embedded", num_questions=num_questions)
    odd = Prompt(messages=({"role": "user", "content": f"What is {HOSTILE}?\n" + "Very long. " * 30},), answer="7")
    task = Task(task.name, (odd, *task.prompts), task.grader)
    scores = []
    for checkpoint, skill in SKILL.items():
        for mode in MODES:
            found = evaluate(
                task,
                mode,
                sampler=Pretender(encoder, skill[mode]),
                encoder=encoder,
                sampling=Sampling(max_new_tokens=96, temperature=0.6, top_p=0.95, top_k=20),
                samples=samples,
                seed=0,
                checkpoint=checkpoint,
                out=run / "eval",
                shape=SHAPE,
            )
            scores += found.entries
    costs = {
        "teacher_generate": cost(0, 0.0, 0.0, "off_policy", reused=61_000),
        "student_sample": cost(112_000, 1.2e11, 31.0, "on_policy"),
        "teacher_score": cost(180_000, 4.4e11, 9.5, "on_policy"),
        "student_train": cost(310_000, 9.9e11, 96.0, "off_policy", "on_policy"),
        "evaluate": cost(52_000, 6.0e10, 24.0, *SKILL),
    }
    summary = {
        "run": str(run),
        "scores": scores,
        "gap_closed": {"think": 0.926, "no_think": None},
        "costs": costs,
        "peak_memory_bytes": {"student_train": 812_000_000, "student_sample": 3_300_000_000},
    }
    manifest = {
        "command": f"distill run --out {run} --seed 0 --set 'name={HOSTILE}'",
        "seed": 0,
        "teacher": {"name": "tiny", "revision": "a" * 40},
        "versions": {"torch": "2.13.0", "transformers": "5.19.0", "python": "3.11.7"},
        "preflight": [{"name": "vocabulary", "same": True}],
        "stages": {"off_policy": {"responses": [f"key{number:04}" for number in range(2000)]}},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "costs.json").write_text(json.dumps(costs))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in recorded()))
    (run / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve()))
    (run / "warnings.jsonl").write_text(json.dumps(WARNING) + "\n")
    (run / "eval" / "on_policy-mode_switching.json").write_text(json.dumps(switching().to_json()))
    (run / "config.yaml").write_text(f"name: tiny-to-nano\nseed: 0\n# {HOSTILE}\n")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny-to-nano")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collects elements and checks that they nest."""

    VOID = ("meta", "br", "line", "path", "circle", "polyline", "polygon", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.feed(page)
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag, f"{tag} closes something else"


def test_the_page_nests_and_needs_nothing_from_outside(page: str) -> None:
    elements = Elements(page).found
    tags = {tag for tag, _ in elements}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    for _, attributes in elements:
        assert not {"src", "href", "onclick", "onload"} & attributes.keys()
    assert "http" not in re.sub(r"HTTP|httpx", "", page)
    assert "@import" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and 'name="viewport"' in page


def test_what_models_and_people_wrote_is_escaped(page: str) -> None:
    assert "<script>" not in page
    # Question, thinking, command and configuration all hold the hostile text.
    assert page.count("&lt;script&gt;alert(") >= 4
    assert page.count("[U+0000] [U+202E]") >= 4 and "[U+D800]" in page, "half a surrogate pair comes from a .jsonl"
    assert not set("\x00\u202e\ud800") & set(page)


def test_the_verdict_says_what_was_reached_in_each_mode(page: str) -> None:
    page = page.replace("\u00a0", " ")
    assert "In thinking mode the on-policy student closed 93 % of the gap to the teacher.</p>" in page
    assert "In non-thinking mode the teacher leads by no more than chance, so there is no gap to close.</p>" in page


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.02, "reached the teacher (102 % of the gap closed)"), (0.5, "closed 50 % of"), (-0.25, "fell back by 25 %")],
)
def test_the_verdict_is_as_plain_about_failure(share: float, words: str) -> None:
    (sentence,) = verdict(
        {"gap_closed": {"think": share}}, [{"checkpoint": who, "mode": "think"} for who in ("teacher", "on_policy")]
    )
    assert words in sentence


def test_every_checkpoint_is_there_in_both_modes_with_its_interval(page: str, run: Path) -> None:
    entries = json.loads((run / "summary.json").read_text())["scores"]
    assert len(entries) == 16
    for entry in entries:
        low, high = entry["ci95"]
        interval = f'<span class="range95">{100 * low:.1f} to {100 * high:.1f}</span>'
        assert f"<strong>{100 * entry['mean']:.1f} %</strong> {interval}" in page
    places = [page.index(f"<strong>{name}</strong>") for name in ("teacher", "start", "off-policy", "on-policy")]
    assert places == sorted(places), "checkpoints stand in the order of the run"


def test_curves_costs_and_samples_are_there(page: str) -> None:
    titles = ("Loss", "Reverse KL to the teacher", "The student&#39;s entropy", "Response length", "Share with closed")
    for title in titles:
        assert f"<figcaption>{title}" in page
    assert "grad norm</figcaption>" in page, "a metric that the page does not know is shown all the same"
    assert page.count('class="boundary"') >= 6
    assert "61,000" in page and "student train" in page and "774 MiB" in page and "9.90e+11" in page
    assert "<figcaption>embedded, thinking" in page
    assert page.count('class="badge">last student wrong') >= 1 and page.count('class="badge">learned') >= 1
    assert "transformers 5.19.0" in page
    assert "key0007" in page and "key0008" not in page and "and 1,992 more" in page


@pytest.mark.parametrize(
    ("closed", "thinking", "finish_reason", "sentence"),
    [
        (False, "3+4", "length", "still thinking at the token limit"),
        (False, "3+4", "stop", "ended while still thinking"),
        # A base model that ends at once was said to be at the token limit.
        (False, "", "stop", "nothing was said"),
        (True, "3+4=7", "stop", "nothing was said"),
    ],
)
def test_a_response_without_an_answer_is_said_to_be_what_it_is(
    closed: bool, thinking: str, finish_reason: str, sentence: str
) -> None:
    row = {"closed": closed, "thinking": thinking, "finish_reason": finish_reason, "answer": "", "correct": False}
    folder = Path(report.__file__).parent / "templates"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True)
    environment.filters |= dict.fromkeys(("percent", "interval", "count", "short", "seconds", "bytes", "named"), str)
    macros: Any = environment.get_template("macros.html.jinja").module
    shown = macros.said({"num_tokens": 1, **row}, "think", MODE_NAMES, 100)
    assert sentence in shown and shown.count('class="note"') == 1


def phased(step: int, begin: float, *, stage: str = "on_policy", **timeline: list[list[float]]) -> dict[str, Any]:
    lanes = {"sample": [], "score": [], "sync": [], "train": [], **timeline}
    busy = {f"busy.{name}": sum(b - a for a, b in spans) for name, spans in lanes.items()}
    moved = {name: [[begin + a, begin + b] for a, b in spans] for name, spans in lanes.items()}
    row = {"stage": stage, "step": step, "staleness": 1.0, "overlap_efficiency": 0.75, "seconds": 4.0}
    return {**row, "seconds.train": 1.0, **busy, "timeline": moved}


def overlapping(num: int, begin: float = 0.0) -> list[dict[str, Any]]:
    """Steps of 4 seconds, each sampled while the one before is trained on."""
    lanes = {"sample": [[0.0, 3.0]], "score": [[1.0, 2.0], [2.5, 3.5]], "train": [[4.0, 7.0]]}
    return [phased(step, begin + 4.0 * step, **lanes) for step in range(num)]


def test_a_strip_shows_when_each_phase_worked() -> None:
    (chart,) = gantt_charts(overlapping(2))
    assert chart.title == "on-policy, steps 0 to 1: overlap 75 %"
    svg = str(chart.views["steps"])
    # 0 to 11 seconds over 336 units: the second step's training is at 8 to 11 seconds.
    scale = (WIDTH - LEFT - RIGHT) / 11
    bars = re.findall(
        r'<rect class="(\S+) (\S+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)".*?<title>(.*?)</title>', svg
    )
    assert len(bars) == 2 * 4
    last = bars[-1]
    assert last[:2] == ("s2", "weak") and last[-1] == "train, step 1: 8 to 11 s"
    assert float(last[2]) == pytest.approx(LEFT + 8 * scale, abs=0.1)
    assert float(last[4]) == pytest.approx(3 * scale, abs=0.1)
    assert len({y for _, _, _, y, _, _ in bars}) == 3  # lanes; nobody sent weights
    assert all(float(x) >= LEFT and float(x) + float(width) <= WIDTH - RIGHT + 0.1 for _, _, x, _, width, _ in bars)
    assert 'aria-label="on-policy, steps 0 to 1: overlap 75 %; busy a step: sample 3 s, score 2 s, ' in svg
    Elements(svg)


def test_strips_are_the_first_the_middle_and_the_last_steps() -> None:
    def steps(rows: list[dict[str, Any]]) -> list[list[int]]:
        return [[row["step"] for row in strip] for strip in strips(rows)]

    assert steps(overlapping(100)) == [[0, 1, 2, 3], [48, 49, 50, 51], [96, 97, 98, 99]]
    assert steps(overlapping(6)) == [[0, 1, 2, 3], [4, 5]]
    assert steps([]) == []
    # A process that resumed the run after two steps began its clock again.
    resumed = [*overlapping(2, begin=50.0), *overlapping(4)[2:]]
    assert steps(resumed) == [[0, 1], [2, 3]]
    # What was recorded before there were phases, and stages in which the teacher speaks, have none.
    assert gantt_charts([{"stage": "on_policy", "step": 0}, phased(0, 0.0) | {"timeline": {}}]) == []
    spoken = phased(0, 0.0, stage="off_policy", train=[[0.0, 1.0]])
    del spoken["staleness"]
    assert gantt_charts([spoken]) == []


def test_the_page_has_the_strips_and_the_overlap(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    rows = [row | {"global_step": row["step"] + 1, "stage": f"a{HOSTILE}"} for row in overlapping(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    Elements(page)
    assert "<script>" not in page and page.count("busy a step: sample 3 s") == 3
    assert "When each phase worked" in page and "<td>75 %</td>" in page


def test_the_page_is_a_function_of_the_files(run: Path) -> None:
    assert render(run) == render(run)


def test_an_unfinished_run_gets_a_page_of_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    assert "not finished" in write_report(tmp_path).read_text()
    lines = [json.dumps(row) for row in metrics()[:5]]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "off_po']))
    page = write_report(tmp_path).read_text()
    Elements(page)
    assert "<figcaption>Loss" in page
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "{", lines[1]]))
    with pytest.raises(UserError, match="line 2 is not JSON"):
        write_report(tmp_path)


def test_a_run_that_a_guard_stopped_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "warnings.jsonl").write_text(json.dumps(WARNING | {"verdict": "stop", "sentence": "it rambles"}) + "\n")
    page = write_report(tmp_path).read_text()
    assert "The guard repetition stopped this run at on-policy step 31." in page and "it rambles" in page
    assert '<span class="stop">Stopped</span> by the guard repetition' in page


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run directory"):
        write_report(tmp_path)


def test_a_line_stands_where_its_numbers_are() -> None:
    line = Series("a", (((0.0, 0.0), (10.0, 1.0)),), 2)
    svg = line_chart("t", [line])
    # The frame is x from 48 to 390 and y from 196 (lowest tick) up to 14 (highest tick).
    assert '<polyline class="s2" points="48.0,196.0 390.0,14.0">' in svg
    logarithmic = line_chart("t", [Series("a", (((0.0, 1.0), (1.0, 10.0), (2.0, 100.0)),), 0)])
    assert "219.0,105.0" in logarithmic, "ten lies in the middle of 1 and 100"


def test_charts_survive_constants_single_points_and_many_points() -> None:
    assert "<circle" in line_chart("t", [Series("a", (((3.0, 0.0),),), 0)])
    for value in (0.0, 5.0, -2.0, 1e-12, 1e15):
        svg = line_chart("t", [Series("a", (((1.0, value), (2.0, value)),), 0)])
        assert "nan" not in svg and "inf" not in svg
    many = line_chart("t", [Series("a", (tuple((float(n), float(n % 7)) for n in range(50_000)),), 0)])
    assert many.count(",") < 400
    assert "&lt;b&gt;" in line_chart("<b>", [Series("<b>", (((1.0, 1.0), (2.0, 2.0)),), 0)])


def test_numbers_for_readers() -> None:
    assert [short(value) for value in (0, 0.25, 1500, 25_000, 3.2e9, 0.0004)] == [
        *("0", "0.25", "1500", "25k", "3.2G", "4e-4")
    ]
    assert [count(value) for value in (1234.6, 1.5e12)] == ["1,235", "1.50e+12"]
    assert [duration(value) for value in (4.21, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 05 min"]


def test_a_thinking_budget_is_a_row_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_questions=4, samples=1)
    encoder = Encoder(build_tokenizer())
    sampling = Sampling(max_new_tokens=96, thinking_budget=24)
    task = load_task("embedded", num_questions=4)
    evaluate(
        task,
        "think",
        sampler=Pretender(encoder, 0.5),
        encoder=encoder,
        sampling=dataclasses.replace(sampling, top_k=20),
        samples=1,
        seed=0,
        checkpoint="on_policy",
        out=run / "eval",
    )
    page = write_report(run).read_text()
    Elements(page)
    assert "Score against thinking budget" in page and "(budget 24)" in page


def test_curves_are_there_against_steps_tokens_and_flops_without_a_script(page: str) -> None:
    for axis in ("steps", "tokens", "flops"):
        assert (f'id="axis-{axis}"' in page and f"#axis-{axis}" in page) or axis == "steps"
        assert page.count(f'<div class="view on-{axis}">') >= 8
    # The last of 188 steps of 1000 tokens each.
    assert "Score between the steps: validation" in page and "150k" in page


def test_a_curve_stands_behind_what_the_stages_before_it_spent(run: Path) -> None:
    files = RunFiles.read(run)
    places = Places.of(files)
    assert places.after["steps"][-1] == 188 and places.after["tokens"][-1] == 188_000
    assert places.begun["flops"] == [(0.0, "off_policy"), (128e9, "on_policy")]
    (chart,) = score_charts(files, places)
    # The second stage's line begins where the first one's 128e9 FLOPs end, 128 / 188 of the way, and goes to the edge.
    assert 'points="280.9,123.2 390.0,32.2"' in chart.views["flops"]
    assert chart.views["steps"].count("<polyline") == 2 and chart.views["steps"].count("<polygon") == 1


def test_without_a_curve_the_scores_after_each_stage_are_one(run: Path) -> None:
    files = dataclasses.replace(RunFiles.read(run), curve=())
    (chart,) = score_charts(files, Places.of(files))
    assert chart.title == "Score after each stage: embedded"
    assert chart.views["flops"].count("<polyline") == 2, "a line a mode"


def test_tokens_are_shaded_by_their_divergence(page: str) -> None:
    shades = re.findall(r'<i(?: class="(k\d)")? title="([^"]*)">', page)
    assert shades[:3] == [("", "0.02 nats, log p -0.1"), ("k5", "7.5 nats, log p -2.5"), ("k3", "0.5 nats, log p 0")]
    assert [shade for shade, _ in shades[6:9]] == ["", "k1", "k3"], "after the stage"
    assert "before its first step" in page and "after step 60" in page
    assert "reverse KL to the teacher over the whole vocabulary" in page


def test_guards_phases_and_mode_switching_are_there(page: str) -> None:
    assert "<strong>Warning</strong> of the guard repetition, on-policy step 31" in page
    assert "<td>40 %</td><td>10 %</td><td>25 %</td><td>25 %</td><td>60</td><td>48.0 s</td>" in page
    assert "Turns in the right mode" in page and "<strong>50.0 %</strong>" in page
    assert "leakage" in page and "quoted flags" not in page, "what nobody measured has no column"


def test_a_run_that_measured_little_has_few_sections(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    headings = re.findall(r"<h2>(.*?)</h2>", write_report(tmp_path).read_text())
    assert headings == ["How to make it again"]


def test_what_was_examined_later_is_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_questions=4, samples=1)
    encoder = Encoder(build_tokenizer())
    for budget in (None, 8, 32):
        evaluate(
            load_task("embedded", num_questions=4),
            "think",
            sampler=Pretender(encoder, 0.5),
            encoder=encoder,
            sampling=Sampling(max_new_tokens=96, thinking_budget=budget),
            samples=1,
            seed=0,
            checkpoint="run",
            out=run / "eval" / "later",
        )
    page = write_report(run).read_text()
    Elements(page)
    assert "Examined after the run: embedded" in page and "<figcaption>student, embedded" in page
    assert page.count("<strong>student</strong>") == 3


def test_a_page_stays_small_whatever_the_models_say(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_questions=4, samples=1)
    long = recorded()[0] | {"tokens": ["<b>"] * 4000, "kl": [0.5] * 4000, "logprob": [-1.0] * 4000}
    lines = [json.dumps(long | {"prompt_id": str(n), "mode": mode}) for n in range(40) for mode in MODES]
    (run / "samples.jsonl").write_text("\n".join(lines))
    assert len(write_report(run).read_bytes()) < 3_000_000
