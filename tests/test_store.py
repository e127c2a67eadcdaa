"""The response store: nothing is lost, nothing is doubled, whatever happens to its files and writers."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pytest
from forked import FORKED
from pyarrow import parquet

import teachers.answers
from distill.errors import DistillError, StoppedError
from distill.sampler import OnFinished
from distill.types import Prompt, Request, Rollout, Sampling
from teachers.answers import answer
from teachers.store import ResponseStore, TeacherIdentity, default_root, response_key

TEACHER = TeacherIdentity("r1", "t1", "k1", name="owner/teacher")
SAMPLING = Sampling(max_new_tokens=64, temperature=0.6, top_p=0.95)


def request(number: int, *, sampling: Sampling = SAMPLING) -> Request:
    prompt = Prompt(({"role": "user", "content": f"question {number}"},))
    return Request(prompt, "think", "hard", (1, 2, number), sampling, seed=2**63 - 1 - number)


def respond(asked: Request, *, speaker: str = "owner/teacher", offset: int = 0) -> Rollout:
    number = asked.prompt_ids[-1] + offset
    ids = tuple(range(number, number + 5 + number % 7))
    logprobs = tuple(-0.125 * place for place in range(len(ids)))
    return Rollout(asked, ids, tuple(place == 1 for place in range(len(ids))), logprobs, "stop", speaker)


def requests(num: int, start: int = 0) -> list[Request]:
    return [request(number) for number in range(start, start + num)]


def filled(root: Path, *sizes: int) -> ResponseStore:
    """A store with one shard for each size."""
    store = ResponseStore(root)
    for start, size in zip([sum(sizes[:place]) for place in range(len(sizes))], sizes, strict=True):
        assert store.put(TEACHER, [respond(asked) for asked in requests(size, start)]) == size
    return store


def stored(root: Path, asked: Sequence[Request]) -> list[Rollout | None]:
    """What a new process would find."""
    found = ResponseStore(root).get(TEACHER, asked)
    keys = [response_key(TEACHER, one) for one in asked]
    return [found[key].rollout if key in found else None for key in keys]


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("*/part-*.parquet"))


def test_what_is_put_is_found_again(tmp_path: Path) -> None:
    asked = requests(600)
    filled(tmp_path, 300, 300)
    assert stored(tmp_path, asked[::-1]) == [respond(one) for one in asked[::-1]]
    assert stored(tmp_path, requests(5, 600)) == [None] * 5
    assert stored(tmp_path / "nowhere", asked) == [None] * 600
    assert not (tmp_path / "nowhere").exists(), "looking leaves nothing behind"


def test_everything_that_decides_a_response_is_in_its_key() -> None:
    base = request(1)
    others = [
        replace(base, prompt=Prompt(({"role": "user", "content": "another"},))),
        replace(base, prompt_ids=(1, 2)),
        replace(base, mode="no_think"),
        replace(base, switch="soft"),
        replace(base, sampling=replace(SAMPLING, top_k=20)),
        replace(base, seed=1),
    ]
    teachers = [replace(TEACHER, **{name: "x"}) for name in ("revision", "template_hash", "tokenizer_hash")]
    keys = {response_key(TEACHER, base)}
    keys |= {response_key(TEACHER, other) for other in others} | {response_key(other, base) for other in teachers}
    assert len(keys) == 10
    assert response_key(replace(TEACHER, name="tiny"), base) in keys, "the same weights under another name"
    assert response_key(TEACHER, replace(base, prompt=replace(base.prompt, answer="7", domain="x"))) in keys


def test_the_key_is_pinned() -> None:
    """A changed key would silently abandon every response that users have stored."""
    assert response_key(TEACHER, request(1)) == PINNED_KEY


PINNED_KEY = "5c48c509495aca1f44a08d69277db49b33320353b090165f65ef9f710ab04492"


def test_a_collection_holds_one_sampling_and_says_which(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    cool = [request(number, sampling=Sampling(max_new_tokens=8)) for number in range(2)]
    store.put(TEACHER, [respond(one) for one in cool])
    assert len(store.get(TEACHER, [*requests(2), *cool])) == 4
    collections = store.collections()
    assert {one.meta["sampling"]["max_new_tokens"] for one in collections} == {8, 64}
    assert all(one.folder.name.startswith("owner-teacher-") for one in collections)
    assert all(one.meta["revision"] == "r1" for one in collections)


def test_two_names_of_the_same_teacher_are_one_collection(tmp_path: Path) -> None:
    """Also where both runs looked before either had stored anything: the key is there once, and both find it."""
    names = [replace(TEACHER, name="tiny"), replace(TEACHER, name="/models/tiny")]
    stores = [ResponseStore(tmp_path / "store") for _ in names]
    for name, store in zip(names, stores, strict=True):
        assert not store.get(name, requests(2))
    assert stores[0].put(names[0], [respond(one) for one in requests(1)]) == 1
    assert stores[1].put(names[1], [respond(one, offset=100) for one in requests(2)]) == 1
    for name, store in [*zip(names, stores, strict=True), (TEACHER, ResponseStore(tmp_path / "store"))]:
        found = store.get(name, requests(2))
        assert [kept.rollout.response_ids[0] for kept in found.values()] == [0, 101]
    assert len(ResponseStore(tmp_path / "store").collections()) == 1


@pytest.mark.parametrize("content", ["{}", "[]", '{"teacher": "t"}', "{", ""])
def test_a_damaged_description_of_a_collection_is_a_sentence(tmp_path: Path, content: str) -> None:
    filled(tmp_path, 1)
    (meta,) = tmp_path.glob("*/meta.json")
    meta.write_text(content)
    with pytest.raises(DistillError, match=rf"^{meta} is damaged \(.*\); remove it"):
        ResponseStore(tmp_path).collections()
    assert stored(tmp_path, requests(1)) == [respond(request(0))], "whoever knows what he wants does not need it"


def test_other_tools_can_read_a_collection(tmp_path: Path) -> None:
    import datasets

    filled(tmp_path / "store", 3)
    (folder,) = (one.folder for one in ResponseStore(tmp_path / "store").collections())
    (folder / ".part-0.parquet.broken").write_text("set aside")
    for name, options in ((str(folder), {}), ("parquet", {"data_files": str(folder / "part-*.parquet")})):
        table = datasets.load_dataset(name, split="train", cache_dir=str(tmp_path / "cache"), **options)
        row = table[1]
        assert json.loads(row["messages"]) == [{"role": "user", "content": "question 1"}]
        assert json.loads(row["sampling"])["top_p"] == 0.95
        assert (row["seed"], row["prompt_ids"]) == (2**63 - 2, [1, 2, 1])
        assert (row["mode"], row["switch"], row["teacher"]) == ("think", "hard", "owner/teacher")


def test_the_first_response_of_a_key_stays(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    again = [respond(one, offset=100) for one in requests(4)]
    assert ResponseStore(tmp_path).put(TEACHER, again) == 1
    assert store.put(TEACHER, again) == 0
    assert stored(tmp_path, requests(4)) == [*[respond(one) for one in requests(3)], again[3]]
    twice = [respond(request(9)), respond(request(9), offset=100)]
    assert store.put(TEACHER, twice) == 1
    assert stored(tmp_path, [request(9)]) == twice[:1]


def test_of_two_stores_that_were_joined_the_first_response_wins(tmp_path: Path) -> None:
    filled(tmp_path / "a", 3)
    later = ResponseStore(tmp_path / "b")
    later.put(TEACHER, [respond(one, offset=100) for one in requests(4)])
    for shard in shards(tmp_path / "b"):
        shutil.copy(shard, shards(tmp_path / "a")[0].parent / "part-0.parquet")
    assert len(shards(tmp_path / "a")) == 2
    assert stored(tmp_path / "a", requests(4))[:3] == [respond(one) for one in requests(3)]
    store = ResponseStore(tmp_path / "a")
    store.get(TEACHER, requests(4))
    assert store.compact() == 2
    expected = [*[respond(one) for one in requests(3)], respond(request(3), offset=100)]
    assert stored(tmp_path / "a", requests(4)) == expected, "also after they were joined in one shard"
    (shard,) = shards(tmp_path / "a")
    assert parquet.read_table(shard).num_rows == 4


def cut(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def flip(file: Path, *, group: int = 0) -> None:
    """One bit of the response ids: the file's structure stays whole."""
    content = bytearray(file.read_bytes())
    metadata = parquet.ParquetFile(file).metadata
    places = {metadata.row_group(group).column(place).path_in_schema: place for place in range(metadata.num_columns)}
    column = metadata.row_group(group).column(places["response_ids.list.element"])
    begin = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    content[begin + column.total_compressed_size - 3] ^= 1
    file.write_bytes(content)


def exchange(file: Path) -> None:
    """A response that is not the one that was stored, in a file that parquet finds whole."""
    table = parquet.read_table(file)
    ids = table["response_ids"].to_pylist()
    ids[1] = [7]
    where = table.schema.get_field_index("response_ids")
    table = table.set_column(where, table.schema.field(where), pa.array(ids, table.schema.field(where).type))
    parquet.write_table(table, file)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda file: cut(file, 0.0), 4),
        (lambda file: cut(file, 0.5), 4),
        (lambda file: cut(file, 0.99), 4),
        (flip, 4),
        (exchange, 1),
        (lambda file: file.write_bytes(os.urandom(500)), 4),
    ],
    ids=["empty", "half", "end", "bit", "exchanged", "noise"],
)
def test_a_damaged_shard_is_set_aside_and_generated_again(
    tmp_path: Path, damage: Callable[[Path], None], lost: int, capsys: pytest.CaptureFixture[str]
) -> None:
    store = filled(tmp_path, 4, 4)
    by_size = {parquet.read_table(file)["prompt_ids"].to_pylist()[0][-1]: file for file in shards(tmp_path)}
    damage(by_size[0])
    asked = requests(8)
    for reader in (store, ResponseStore(tmp_path)):
        found = reader.get(TEACHER, asked)
        missing = [place for place, one in enumerate(asked) if response_key(TEACHER, one) not in found]
        assert missing == ([1] if lost == 1 else list(range(lost)))
        assert all(kept.rollout == respond(kept.rollout.request) for kept in found.values())
    heard = capsys.readouterr().err
    assert heard.count("is damaged") == 1
    assert f"{4 - lost} whole responses are saved from it" in heard
    assert f"{by_size[0].name}.broken and the others are generated again" in heard
    assert by_size[0].with_name(f".{by_size[0].name}.broken").exists()
    assert ResponseStore(tmp_path).put(TEACHER, [respond(one) for one in asked]) == lost
    assert stored(tmp_path, asked) == [respond(one) for one in asked]


def test_of_a_damaged_shard_all_is_saved_that_is_whole(tmp_path: Path) -> None:
    """One bit of a shard that was joined of many costs the rows that are read together with it, and no others."""
    filled(tmp_path, 300, 300).compact()
    (shard,) = shards(tmp_path)
    flip(shard, group=1)
    found = stored(tmp_path, requests(600))
    assert [one is None for one in found] == [False] * 256 + [True] * 256 + [False] * 88
    again = ResponseStore(tmp_path)
    assert again.put(TEACHER, [respond(one, offset=100) for one in requests(600)]) == 256
    assert stored(tmp_path, requests(600))[:256] == found[:256], "what a run has trained on stays"


def set_aside_and_die(root: Path) -> None:
    """A reader that notices the damage and is killed before anything is saved."""
    (collection,) = ResponseStore(root).collections()
    collection._read({response_key(TEACHER, one): one for one in requests(3)}, "t")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_reader_did_not_save_the_next_one_saves(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    (shard,) = shards(tmp_path)
    exchange(shard)
    reader = FORKED.Process(target=set_aside_and_die, args=(tmp_path,))
    reader.start()
    reader.join()
    assert reader.exitcode == -signal.SIGKILL and not shards(tmp_path)
    assert [one is not None for one in stored(tmp_path, requests(3))] == [True, False, True]


def write_many(root: Path, start: int, num: int) -> None:
    store = ResponseStore(root)
    for number in range(start, start + num):
        store.put(TEACHER, [respond(request(number), speaker=str(os.getpid()))])
        if number % 10 == 9:
            store.compact()


def test_concurrent_writers_store_each_key_once(tmp_path: Path) -> None:
    writers = [FORKED.Process(target=write_many, args=(tmp_path, start, 40)) for start in (0, 20, 20)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        found = sum(one is not None for one in stored(tmp_path, requests(60)))
        assert found >= seen, "a reader never loses what it has seen"
        seen = found
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert stored(tmp_path, requests(60)) == [respond(one) for one in requests(60)]
    keys = [key for shard in shards(tmp_path) for key in parquet.read_table(shard)["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == 60


def write_until_killed(root: Path, start: int, done: Connection) -> None:
    store = ResponseStore(root)
    for number in range(start, start + 10_000):
        store.put(TEACHER, [respond(request(number))])
        done.send(number)


def test_kill_9_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    for round_ in range(3):
        ours, theirs = FORKED.Pipe(duplex=False)
        writer = FORKED.Process(target=write_until_killed, args=(tmp_path, round_ * 10_000, theirs))
        writer.start()
        theirs.close()
        numbers = [ours.recv() for _ in range(5)]
        time.sleep(0.01 * round_)
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        while ours.poll():
            try:
                numbers.append(ours.recv())
            except EOFError:
                break
        assert None not in stored(tmp_path, [request(number) for number in numbers])
    assert not list(tmp_path.glob("*/*.broken"))


def die_half_way(root: Path, at: str) -> None:
    """Killed with half of the shard written, or with the whole shard on disk under its draft's name."""
    real = parquet.write_table

    def write_table(table: pa.Table, where: Path, **options: object) -> None:
        real(table, where, **options)
        if at == "half":
            cut(where, 0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    parquet.write_table = write_table
    ResponseStore(root).put(TEACHER, [respond(one) for one in requests(3)])


@pytest.mark.parametrize("at", ["half", "before the rename"])
def test_kill_9_in_the_middle_of_a_shard_leaves_no_trace(tmp_path: Path, at: str) -> None:
    filled(tmp_path, 1)
    writer = FORKED.Process(target=die_half_way, args=(tmp_path, at))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*/.draft-*"))) == 1
    assert stored(tmp_path, requests(3)) == [respond(request(0)), None, None]
    assert ResponseStore(tmp_path).put(TEACHER, [respond(one) for one in requests(3)]) == 2
    assert not list(tmp_path.glob("*/.draft-*"))
    assert stored(tmp_path, requests(3)) == [respond(one) for one in requests(3)]


def test_compaction_joins_small_shards(tmp_path: Path) -> None:
    store = filled(tmp_path, 3, 2, 4)
    reader = ResponseStore(tmp_path)
    assert len(reader.get(TEACHER, requests(9))) == 9
    broken = shards(tmp_path)[0]
    lost = {ids[-1] for ids in parquet.read_table(broken)["prompt_ids"].to_pylist()}
    cut(broken, 0.5)
    store = ResponseStore(tmp_path)
    store.get(TEACHER, requests(9))
    assert store.compact() == 2
    assert store.compact() == 0
    assert len(shards(tmp_path)) == 1
    expected = [None if number in lost else respond(request(number)) for number in range(9)]
    assert stored(tmp_path, requests(9)) == expected
    assert len(reader.get(TEACHER, requests(9))) == 9 - len(lost), "a reader with an old index looks again"


def fill_the_disk(root: Path, result: Connection) -> None:
    """A file-size limit stands in for a full disk: the write fails half way."""
    store = filled(root, 5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    num = 20_000
    noise = tuple(int.from_bytes(os.urandom(2), "big") for _ in range(num))
    long = Rollout(request(7), noise, (False,) * num, (0.0,) * num, "stop", "teacher")
    try:
        store.put(TEACHER, [long])
    except DistillError as error:
        result.send((error.exit_code, str(error)))


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path: Path) -> None:
    ours, theirs = FORKED.Pipe(duplex=False)
    writer = FORKED.Process(target=fill_the_disk, args=(tmp_path, theirs))
    writer.start()
    writer.join()
    assert ours.poll(), "the write did not fail"
    exit_code, sentence = ours.recv()
    assert exit_code == 1
    assert "File too large" in sentence
    assert "responses stored before are safe" in sentence
    assert not list(tmp_path.glob("*/.draft-*"))
    assert stored(tmp_path, requests(5)) == [respond(one) for one in requests(5)]


def test_a_root_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DistillError, match=r"the response store .*file.* cannot be used .*--store or DISTILL_STORE"):
        ResponseStore(tmp_path / "file").put(TEACHER, [respond(request(0))])


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_STORE", "~/mine")
    assert default_root() == Path.home() / "mine"
    monkeypatch.delenv("DISTILL_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "strong-to-weak" / "responses"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_root() == Path.home() / ".cache" / "strong-to-weak" / "responses"


class FakeSampler:
    """Answers by arithmetic, counts what it was asked, and stops after a number of responses if told to."""

    def __init__(self, *, stop_after: int | None = None, offset: int = 0) -> None:
        self.asked: list[Request] = []
        self.stop_after = stop_after
        self.offset = offset

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        rollouts = []
        for one in requests:
            if len(self.asked) == self.stop_after:
                raise StoppedError("stopped by SIGTERM", exit_code=75)
            self.asked.append(one)
            rollouts.append(respond(one, offset=self.offset))
            if on_finished is not None:
                on_finished(rollouts[-1])
        return rollouts


def test_only_what_is_missing_is_generated(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    asked = [request(number) for number in (5, 0, 4, 2, 5)]
    sampler = FakeSampler()
    answers = answer(asked, store, sampler, identity=TEACHER, run="mine", chunk=1)
    assert sampler.asked == [request(5), request(4)]
    assert answers.rollouts == tuple(respond(one) for one in asked)
    assert answers.keys == tuple(response_key(TEACHER, one) for one in asked)
    assert answers.reused == (False, True, False, True, False)
    # The second 5 was not generated again, and is not paid for again.
    assert (answers.num_reused, answers.num_generated) == (2, len(sampler.asked))
    assert answers.paid == [respond(request(number)) for number in (5, 4)]
    assert answers.reused_tokens == sum(len(respond(request(number)).response_ids) for number in (0, 2))
    assert answers.generated_tokens == sum(len(respond(request(number)).response_ids) for number in (5, 4))
    assert answer(asked, store, sampler, identity=TEACHER, run="mine", chunk=1) == answers
    assert answer(asked, store, sampler, identity=TEACHER, run="another").num_reused == 4


def test_an_interrupted_generation_goes_on_where_it_was(tmp_path: Path) -> None:
    asked = requests(20)
    with pytest.raises(StoppedError):
        answer(asked, ResponseStore(tmp_path), FakeSampler(stop_after=13), identity=TEACHER, run="mine", chunk=5)
    rest = FakeSampler()
    answers = answer(asked, ResponseStore(tmp_path), rest, identity=TEACHER, run="mine", chunk=5)
    assert rest.asked == asked[13:], "the third chunk's finished responses are kept too"
    assert answers.rollouts == tuple(respond(one) for one in asked)
    assert (answers.num_generated, answers.num_reused) == (20, 0), "a resumed run has paid for both parts"
    other = answer(asked, ResponseStore(tmp_path), FakeSampler(stop_after=0), identity=TEACHER, run="another")
    assert (other.num_generated, other.num_reused) == (0, 20)
    assert other.keys == answers.keys


def die_while_speaking(root: Path, seconds: float) -> None:
    """Killed when 13 of 20 responses are finished, all of them of one chunk."""

    class Killed(FakeSampler):
        def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
            try:
                return super().generate(requests, on_finished)
            except StoppedError:
                os.kill(os.getpid(), signal.SIGKILL)
                raise

    teachers.answers.STORE_SECONDS = seconds
    answer(requests(20), ResponseStore(root), Killed(stop_after=13), identity=TEACHER)


@pytest.mark.parametrize(("seconds", "num_kept"), [(0.0, 13), (30.0, 0)])
def test_kill_9_in_the_middle_of_a_chunk_loses_what_was_finished_lately(
    tmp_path: Path, seconds: float, num_kept: int
) -> None:
    process = FORKED.Process(target=die_while_speaking, args=(tmp_path, seconds))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    rest = FakeSampler()
    found = answer(requests(20), ResponseStore(tmp_path), rest, identity=TEACHER)
    assert rest.asked == requests(20)[num_kept:]
    assert found.rollouts == tuple(respond(one) for one in requests(20))


def test_the_store_decides_where_another_process_was_faster(tmp_path: Path) -> None:
    class Slow(FakeSampler):
        def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
            ResponseStore(tmp_path).put(TEACHER, [respond(one) for one in requests])
            return super().generate(requests, on_finished)

    answers = answer(requests(3), ResponseStore(tmp_path), Slow(offset=100), identity=TEACHER)
    assert answers.rollouts == tuple(respond(one) for one in requests(3))
    assert answers.num_generated == 3
