"""Faults of all kinds, injected into real jobs in an order and with parameters that a seed decides: `make soak`.

    python -m tests.soak [--seed N] [--minutes M] [--only KIND] [--faults N] [--kills N] [--stops N]

A job that meets a fault has to read what it would have read without, or stop on all ranks with one message that names
the cause; once the cause is gone, the same job has to go on from its last state and read the rest, each sample once.
Where it was killed or told to stop in training, losses have to be the same, too. No job may change the folder that its
stream lies in: each byte and each file's time are compared after each case. Cases run side by side, each in a process
of its own with a store and a folder of its own. A case that fails is shown with its parameters; `--only` its kind with
the same seed repeats it.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from torch.distributed.checkpoint import FileSystemWriter

from tests import conftest  # noqa: F401  # first: imports everything once, for all ranks
from tests.support.jobs import JOB, command, logged, losses
from tests.support.ranks import CLONE_NEWNS, MS_PRIVATE, MS_REC, call_libc, can_make_nodes, run_ranks
from tests.support.reading import Read, read_job, write_turns
from tests.support.recording import main, recorded, recording
from tests.support.store import Store, running_store
from tests.support.streams import mark, tree, write_stream

SLOTS = 3
"""Cases at a time: much of one is waiting."""
CASE_LIMIT = 150.0
"""Seconds until a case hangs."""
PATIENCE = 3
"""Seconds after which a download that stalls is given up: more than a busy machine keeps a healthy one waiting."""
STOP_LIMIT = 60.0
"""Seconds that a job may take from its last step, or its start, to its end; pauses between attempts not counted."""
COLUMNS = ("injected", "detected", "recovered", "lost", "repeated")
SAMPLES, STEPS, SHARDS = 100, 12, 8
"""Of the streams; at least so many shards."""
LOADERS = ("text", "finetuning")
TRAINING = [f"--training.steps={STEPS}", "--training.global_batch_size=8", "--training.local_batch_size=4"]
TRAINING += ["--checkpoint.enable", "--checkpoint.interval=2"]
DAMAGE = ("flip", "truncate")
"""Faults of the store that nobody notices who doesn't look at what arrives."""
MOMENTS = ("start", "step", "checkpoint")
"""At which a training run is killed."""
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
"""Source: Linux, mount.h."""

NOISE = re.compile(
    r"(\[rank\d\]: )?Traceback .*\n.*/multiprocessing/resource_sharer\.py.*\n((\[rank\d\]: )? .*\n)+"
    r"(\[rank\d\]: )?(EOFError|BrokenPipeError|Connection\w+Error).*\n"
)
"""Of a worker whose rank goes away while it hands a batch on: Python 3.11 prints it from a thread of its own."""


@dataclass
class Outcome:
    """What became of a case: numbers of faults and of samples, and the seconds that the job took to stop."""

    injected: int = 0
    detected: int = 0
    recovered: int = 0
    lost: int = 0
    repeated: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.injected == self.detected == self.recovered == 1


@dataclass
class Undisturbed:
    """The streams, and what is read where nothing fails: by loader and shuffle, and by ranks in training."""

    streams: dict[str, Path]
    read: dict[tuple[str, bool], list[list[int]]]
    trained: dict[int, tuple[list[list[int]], dict[int, float]]]


@dataclass
class Case:
    """One fault: its kind and the how-many-th of that kind it is decide its parameters, with the seed."""

    kind: str
    number: int
    seed: int
    folder: Path = Path()
    store: Store = field(default_factory=lambda: Store(0))
    outcome: Outcome = field(default_factory=Outcome)
    drawn: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The first parameters take turns; the others are drawn."""
        self.random = random.Random(f"{self.seed} {self.kind} {self.number}")
        self.lasting = self.number % 2 == 1
        self.num_workers = (0, 2)[(self.number // 2 + self.seed) % 2]
        self.world_size = (1, 2)[(self.number // 4 + self.seed) % 2]
        self.loader = self.random.choice(LOADERS)
        self.shuffle = self.random.random() < 0.5 or self.kind == "shards evicted"
        if self.kind in KILLS | STOPS:
            self.loader, self.shuffle = "text", True

    def __str__(self) -> str:
        given = {"workers": self.num_workers, "ranks": self.world_size, "loader": self.loader, "shuffle": self.shuffle}
        return f"{self.kind} {self.number} (seed {self.seed}): {given | self.drawn}"

    def draw(self, name: str, among: Iterable[Any]) -> Any:
        """A parameter of this case."""
        self.drawn[name] = self.random.choice(list(among))
        return self.drawn[name]

    def begin(self, undisturbed: Undisturbed) -> None:
        """Have a stream of one's own where it may be changed, and a working store."""
        self.whole, self.trained = undisturbed.read[self.loader, self.shuffle], undisturbed.trained
        self.stream, self.cache = self.folder / "stream", self.folder / "cache"
        shutil.copytree(undisturbed.streams[self.loader], self.stream)
        self.changed()
        self.remote: str | None = f"s3://bucket/{self.loader}"
        self.mark = self.folder / "injected"  # made by a rank that injects
        self.store.clear()
        os.environ |= self.store.environment()
        self.settings: dict[str, Any] = {"predownload": self.random.choice([1, 8, 64])}

    def changed(self) -> None:
        """Take the stream's folder as it is now: the case has changed it, and no job may."""
        self.source = tree(self.stream)

    def read(self, **options: Any) -> Read:
        """Read an epoch, or what is left of it."""
        local = str(self.cache if self.remote else self.stream)
        stream = {"remote": self.remote, "local": local}
        config = reader(self.loader, self.shuffle, self.num_workers, stream, **self.settings)
        notes = Path(tempfile.mkdtemp(prefix="notes-"))
        read = read_job(config, notes, self.world_size, **{"steps": STEPS, "timeout": math.inf} | options)
        for rank in read.ranks:
            rank.output = NOISE.sub("", rank.output)
        self.outcome.injected |= int(self.mark.exists() or any(self.store.injected()))
        paused = sum(map(float, re.findall(r"next in ([\d.]+) s", "".join(rank.output for rank in read.ranks))))
        last = min((notes / f"{rank}.jsonl").stat().st_mtime for rank in range(self.world_size))
        self.since_last_step = time.time() - last - paused
        return read

    def survives(self, told: str = "", **options: Any) -> None:
        """The job reads all as if nothing were, and says `told`, a regular expression."""
        read = self.read(**options)
        assert all(rank.code == 0 for rank in read.ranks), show(read)
        self.outcome.detected = int(any(re.search(told, rank.output) for rank in read.ranks))
        self.compare(read.steps, self.whole, show(read))

    def stops(self, told: str, waited: float = 0.0, **options: Any) -> Read:
        """The job stops in time and says `told` once; what it has read is right."""
        read = self.read(**options)
        self.outcome.seconds = max(0.0, self.since_last_step - waited)
        assert re.search(told, read.message), f"expected {told}, but: {read.message}"
        assert self.outcome.seconds < STOP_LIMIT, show(read)
        self.outcome.detected = 1
        return read

    def goes_on(self, stopped: Read) -> None:
        """The same job reads all the rest."""
        rest = self.read(state=stopped.state, steps=STEPS - len(stopped.steps))
        assert all(rank.code == 0 for rank in rest.ranks), show(rest)
        self.compare(stopped.steps + rest.steps, self.whole, show(rest))

    def compare(self, found: list[list[int]], expected: list[list[int]], shown: str) -> None:
        """Count what is missing and what is there too often."""
        delivered, wanted = Counter(itertools.chain(*found)), Counter(itertools.chain(*expected))
        self.outcome.lost, self.outcome.repeated = (wanted - delivered).total(), (delivered - wanted).total()
        assert found == expected, f"read {found}, expected {expected}\n{shown}"
        self.outcome.recovered = 1


def reader(loader: str, shuffle: bool, num_workers: int, stream: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The configuration of a loader of one stream."""
    dataset = {"streams": {"it": stream}, "num_canonical_nodes": 1, "shuffle": shuffle, **settings}
    dataset |= {"decoder_only_format": True} if loader == "finetuning" else {}
    return {"name": loader, "num_workers": num_workers, "dataset": dataset}


def show(read: Read) -> str:
    return "\n".join(f"rank {i} ended with {rank.code}:\n{rank.output}" for i, rank in enumerate(read.ranks))


def fail_at_store(case: Case, kind: str, told: str, survived: int = 1) -> None:
    """The store fails for one file: some times, or until somebody mends it.

    Args:
        case: the case.
        kind: of fault, as the store knows it.
        told: why a job stops.
        survived: the most requests that may fail with a job surviving: what two downloads do, less one.
    """
    # A changed index would be another index, not another fault.
    files = [f"shard.{number:05}.mds" for number in range(SHARDS)] + ["index.json"] * 2 * (kind not in DAMAGE)
    file, case.drawn["lasting"] = case.draw("file", files), case.lasting
    methods = case.draw("methods", [["GET"], ["HEAD"]] if kind in ("404", "403") else [["GET"]])
    times = None if case.lasting else case.draw("times", range(1, survived + 1))
    if kind == "flip" or case.draw("hash", [True, False]):
        case.settings["validate_hash"] = "xxh64"
    if kind == "stall":
        case.settings["download_timeout"] = PATIENCE
    fault = {"path": re.escape(file) + "$", "kind": kind, "times": times, "methods": methods, "seconds": 30.0}
    case.store.inject(fault)
    if not case.lasting:
        case.survives()
        return
    named = re.escape(f"{case.remote}/{file} of stream 'it' in loader.toml can't be fetched: ")
    stopped = case.stops(rf"DataError: {named}.*({told}).* Attempts: 2 ", waited=2 * PATIENCE * (kind == "stall"))
    case.store.clear()
    case.goes_on(stopped)


def harm(file: Path, how: str, random: random.Random) -> None:
    """Damage a file."""
    if how == "removed":
        file.unlink()
    elif how == "cut":
        os.truncate(file, random.randrange(file.stat().st_size))
    else:
        content = bytearray(file.read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        file.write_bytes(content)


def damage_before(case: Case, cached: bool) -> None:
    """A file is cut or changed before the start: it is fetched again, or the job stops until it is mended."""
    how = case.draw("how", ["cut", "changed"])
    if how == "changed" or case.draw("hash", [True, False]):
        case.settings["validate_hash"] = "xxh64"
    folder = case.stream
    if cached:
        shutil.copytree(case.stream, case.cache)
        folder = mark(case.cache)
    file = folder / f"shard.{case.draw('shard', range(SHARDS)):05}.mds"
    content = file.read_bytes()
    harm(file, how, case.random)
    case.outcome.injected = int(file.read_bytes() != content)
    if cached:
        case.survives(rf"{file.name}: its? .* They were removed, and will be fetched again\.")
    else:
        case.remote = case.draw("remote", [None, ""])
        case.changed()
        stopped = case.stops(rf"DataError: .*{re.escape(str(folder))}.*{file.name}: its? .*There is no remote")
        assert tree(case.stream) == case.source
        file.write_bytes(content)
        case.changed()
        case.goes_on(stopped)


def damage_in_use(case: Case, cached: bool) -> None:
    """All files vanish or are cut between two steps: they are fetched again, or the job stops until they are back."""
    ways = ["cut", "removed"]
    if case.shuffle and not cached:  # all may be open by then, and files that are removed while they are, are read on
        ways.remove("removed")
    how, at = case.draw("how", ways), case.draw("step", range(1, 6))
    saved = shutil.copytree(case.stream, case.folder / "saved")
    if not cached:
        case.remote = None

    def lose(step: int) -> None:
        for file in (case.cache if cached else case.stream).glob("shard.*") if step == at else ():
            harm(file, how, case.random)
            case.mark.touch()

    if cached:
        case.survives(at_step=lose)
        return
    file = rf"{re.escape(str(case.stream))}/shard\.\d+\.mds"
    stopped = case.stops(rf"DataError: {file} is (missing|damaged)", at_step=lose)
    shutil.copytree(saved, case.stream, dirs_exist_ok=True)
    case.changed()
    case.goes_on(stopped)


def alias_source(case: Case) -> None:
    """What is to be a cache is the source by another name, or somebody's only copy: refused, and left as it is."""
    how = case.draw("how", ["link", "linked split", "copy", "inside", "around"] + ["mount"] * can_make_nodes())
    few = 5 * max(file.stat().st_size for file in case.stream.iterdir())
    alias, told = case.folder / "alias", "would delete its only copy|overlaps with|is to be a cache"
    case.outcome.injected = 1
    if how == "link":
        alias.symlink_to(case.stream)
    elif how == "linked split":
        alias.mkdir()
        (alias / "stream").symlink_to(case.stream)
    elif how == "mount":
        alias.mkdir()
        call_libc("unshare", CLONE_NEWNS)
        call_libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        call_libc("mount", os.fsencode(case.stream), os.fsencode(alias), None, MS_BIND, None)
    elif how == "copy":
        shutil.copytree(case.stream, alias)
    else:
        alias = case.stream / "cache" if how == "inside" else case.folder
    before = tree(alias) if how == "copy" else {}
    split = {"split": "stream"} if how == "linked split" else {}
    case.remote, case.cache = str(case.folder if split else case.stream), alias
    case.settings |= {"cache_limit": few, **split}
    stopped = case.stops(f"ConfigError: .*({told})")
    assert tree(case.stream) == case.source and (how != "copy" or tree(alias) == before)
    case.cache = case.folder / "elsewhere"
    case.goes_on(stopped)


def evict(case: Case) -> None:
    """The cache holds few shards at a time."""
    sizes = sorted(file.stat().st_size for file in case.stream.glob("shard.*"))
    few = case.draw("shards", [4, 5])
    case.settings["cache_limit"] = (case.stream / "index.json").stat().st_size + few * sizes[-1] + 100
    case.survives()
    got = [request for request in case.store.requests() if request["method"] == "GET" and "shard" in request["path"]]
    case.outcome.injected = int(len(got) > len(sizes) or len(list(case.cache.glob("shard.*"))) < len(sizes))


def mount(case: Case) -> None:
    """Give the cache a small disk of its own, in a namespace of this process's own."""
    case.cache.mkdir()
    call_libc("unshare", CLONE_NEWNS)
    call_libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call_libc("mount", b"tmpfs", os.fsencode(case.cache), b"tmpfs", 0, b"size=64k")


def fill_disk(case: Case) -> None:
    """Something else has filled the disk but for some pages of 4 KiB."""
    mount(case)
    other = mark(case.cache) / "other"
    other.write_bytes(bytes(65536 - 4096 * case.draw("pages", range(SHARDS))))
    case.outcome.injected = 1
    stopped = case.stops(rf"DataError: {re.escape(str(case.cache))}.* can't be stored: No space left on device\.")
    other.unlink()
    case.goes_on(stopped)


def forbid_cache(case: Case) -> None:
    """The cache can't be written: below a plain file, or on a disk that is read-only."""
    if case.draw("read-only", [False, can_make_nodes()]):
        mount(case)
        call_libc("mount", None, os.fsencode(case.cache), None, MS_REMOUNT | MS_RDONLY, None)
        mend: Callable[[], None] = partial(call_libc, "mount", None, os.fsencode(case.cache), None, MS_REMOUNT, None)
        told = "Read-only file system"
    else:
        (case.folder / "file").touch()
        case.cache, mend, told = case.folder / "file/cache", (case.folder / "file").unlink, "Not a directory"
    case.outcome.injected = 1
    stopped = case.stops(rf"DataError: {re.escape(str(case.cache))}.* can't be stored: {told}\.")
    mend()
    case.goes_on(stopped)


LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "samples": (
        lambda shard: shard.update(samples=shard["samples"] - 1),
        r"the index says \d+|samples = '0', expected",
    ),
    "bytes": (lambda shard: shard["raw_data"].update(bytes=-1), r"bytes = '-1', expected"),
    "place": (lambda shard: shard["raw_data"].update(basename="../../x"), r"basename = '\.\./\.\./x', expected"),
}


def lie(case: Case) -> None:
    """The index says of all shards what isn't so, in the store or on the disk."""
    change, told = LIES[case.draw("lie", LIES)]
    index = case.stream / "index.json"
    true, content = index.read_bytes(), json.loads(index.read_bytes())
    for shard in content["shards"]:
        change(shard)
    index.write_text(json.dumps(content))
    case.changed()
    remote = case.store.upload(case.stream, f"lie-{case.number}")
    case.remote = case.draw("remote", [remote, None])
    case.outcome.injected = 1
    stopped = case.stops(f"DataError: .*{told}")
    case.store.put(f"lie-{case.number}/index.json", true)
    index.write_bytes(true)
    case.changed()
    case.goes_on(stopped)


def damage_index(case: Case) -> None:
    """The index in the cache is not an index, or another one that can be believed: then the next start heals."""
    content = (case.stream / "index.json").read_bytes()
    damaged = {"empty": b"", "half": content[: len(content) // 2], "list": b"[]", "noise": case.random.randbytes(500)}
    damaged |= {"other": re.sub(rb'"bytes": (\d+)', rb'"bytes": 1\1', content)}
    mark(case.cache)
    how = case.draw("content", damaged)
    (case.cache / "index.json").write_bytes(damaged[how])
    case.outcome.injected = 1
    if how == "other":
        case.goes_on(case.stops(r"DataError: .* can't be fetched: it has \d+ bytes, expected 1,?\d+"))
    else:
        case.survives(r"index\.json in the cache of stream 'it' in loader\.toml is fetched again")


def kill_worker(case: Case) -> None:
    """A dataloader worker is killed, as for want of memory."""
    case.num_workers, at = 2, case.draw("step", range(1, 6))

    def kill(step: int) -> None:
        if step == at:
            multiprocessing.active_children()[0].kill()
            case.mark.touch()

    stopped = case.stops(r"DataError: Dataloader worker \d \(pid \d+\) ended with exit code -9\.", at_step=kill)
    case.goes_on(stopped)


def share_cache(case: Case) -> None:
    """A second job takes the cache of a first one, which goes on undisturbed."""
    started, over, result = (case.folder / name for name in ("started", "over", "first"))

    def wait(step: int) -> None:
        if step == 2:
            (case.folder / "part").write_text(str(os.getpid()))
            (case.folder / "part").rename(started)
            wait_until(over.exists)

    if (first := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            result.write_bytes(pickle.dumps(case.read(at_step=wait)))
        os._exit(0)
    wait_until(started.exists)
    case.outcome.injected = 1
    try:
        refused = case.stops(rf"ConfigError: .* is the cache of another job, process {started.read_text()} on ")
    finally:
        over.touch()
        os.waitpid(first, 0)
    undisturbed: Read = pickle.loads(result.read_bytes())
    case.compare(undisturbed.steps, case.whole, show(undisturbed))
    case.outcome.recovered = 0
    case.goes_on(refused)


def wait_until(ready: Callable[[], bool]) -> None:
    """Look again and again; the case has a limit."""
    while not ready():
        time.sleep(0.005)


def train(files: Path, notes: str, world_size: int, *flags: str, **options: Any) -> Read:
    """Train, or go on, and note the samples of each step."""
    with recording(files / notes):
        ranks = run_ranks(
            lambda: main(command(files, *TRAINING, *flags)), world_size, **{"timeout": math.inf} | options
        )
    return Read(ranks, recorded(files / notes), None)


def write_job(files: Path, loader: str) -> None:
    """The files of a training job."""
    files.mkdir(exist_ok=True)
    (files / "job.toml").write_text(f'[job]\ndump_folder = "{files}/outputs"\n' + JOB)
    (files / "loader.toml").write_text(f'name = "text"\n{loader}\nshuffle = true\nnum_canonical_nodes = 1\n')


write_data = FileSystemWriter.write_data


def write_slowly(*arguments: Any) -> Any:
    """Write a checkpoint's files so that it can be met while it is written."""
    time.sleep(0.4)
    return write_data(*arguments)


def draw_training(case: Case, latest: float) -> tuple[list[str], float]:
    """Write a training job, and draw its flags and how many seconds after a moment it is disturbed."""
    flags = ["--checkpoint.async_mode=async"] if case.draw("async", [True, False]) else []
    place = case.draw("place", [f'local = "{case.stream}"', f'remote = "s3://bucket/text"\nlocal = "{case.cache}"'])
    write_job(case.folder, f"num_workers = {case.num_workers}\n[dataset]\n{place}")
    late = case.random.uniform(0, latest)
    case.drawn["late"] = round(late, 3)
    return flags, late


def all_have_read(case: Case, step: int) -> bool:
    """Whether all ranks have read so many steps, and one more."""
    notes = [case.folder / f"first/{rank}.jsonl" for rank in range(case.world_size)]
    return all(note.exists() and f'"step": {step}' in note.read_text() for note in notes)


def kill_training(case: Case, number: signal.Signals, whole_tree: bool) -> None:
    """Training is killed at its start, in a step or while it writes a checkpoint; the same command again goes on."""
    moment = case.drawn["moment"] = MOMENTS[case.number % len(MOMENTS)]
    at = case.draw("step", range(2, STEPS, 2))
    flags, late = draw_training(case, 0.3)
    checkpoints = case.folder / "outputs/checkpoint"
    victims = range(case.world_size) if whole_tree else [case.random.randrange(case.world_size)]
    killed_at = 0.0

    def is_time() -> bool:
        return (checkpoints / f"step-{at}").exists() if moment == "checkpoint" else all_have_read(case, at)

    def kill(pids: list[int], outputs: list[Path]) -> None:
        nonlocal killed_at
        wait_until(is_time if moment != "start" else lambda: all(output.exists() for output in outputs))
        time.sleep(late * (3 if moment == "start" else 1))
        killed_at = time.monotonic()
        case.outcome.injected = int(moment != "checkpoint" or not (checkpoints / f"step-{at}/.metadata").exists())
        for rank in victims:
            (os.killpg if whole_tree else os.kill)(pids[rank], number)

    with mock.patch.object(FileSystemWriter, "write_data", write_slowly):
        first = train(case.folder, "first", case.world_size, *flags, while_running=kill)
    case.outcome.seconds = time.monotonic() - killed_at
    assert all(rank.code != 0 for rank in first.ranks), show(first)
    if number == signal.SIGKILL:
        assert all(first.ranks[rank].code == -number for rank in victims), show(first)
    else:
        assert not any(rank.left for rank in first.ranks), [rank.left for rank in first.ranks]
    assert case.outcome.seconds < STOP_LIMIT, show(first)
    case.outcome.detected = 1
    saved = max([int(folder.parent.name.removeprefix("step-")) for folder in checkpoints.glob("*/.metadata")] or [0])
    rest = train(case.folder, "second", case.world_size, *flags)
    assert all(rank.code == 0 for rank in rest.ranks), show(rest)
    samples, expected = case.trained[case.world_size]
    assert losses(first.ranks[0].output).items() <= expected.items(), show(first)
    assert logged(rest.ranks) == {step: loss for step, loss in expected.items() if step > saved}, show(rest)
    case.compare(first.steps[:saved] + rest.steps, samples, show(rest))


def stop_training(case: Case, number: signal.Signals) -> None:
    """All ranks, or one, are told to stop at any moment of training; the step that is named then has a checkpoint."""
    at, told = case.draw("step", range(7)), case.draw("told", ["all", "one"])
    flags, late = draw_training(case, 0.4)
    stopped_at = 0.0

    def stop(pids: list[int], outputs: list[Path]) -> None:
        nonlocal stopped_at
        wait_until(lambda: all_have_read(case, at))
        time.sleep(late)
        stopped_at = time.monotonic()
        for pid in pids if told == "all" else [case.random.choice(pids)]:
            os.killpg(pid, number)
        case.outcome.injected = 1

    with mock.patch.object(FileSystemWriter, "write_data", write_slowly):
        first = train(case.folder, "first", case.world_size, *flags, while_running=stop)
    case.outcome.seconds = time.monotonic() - stopped_at
    code = 0 if number == signal.SIGUSR1 else 128 + number
    assert [rank.code for rank in first.ranks] == [code] * case.world_size, show(first)
    assert not any(rank.left for rank in first.ranks), [rank.left for rank in first.ranks]
    assert "Traceback" not in show(first)
    line = rf"Stopped by {number.name} after step (\d+); the same command goes on from the checkpoint of step \1\."
    [step] = map(int, re.findall(line, show(first)))
    case.outcome.detected = 1
    rest = train(case.folder, "second", case.world_size, *flags)
    assert all(rank.code == 0 for rank in rest.ranks), show(rest)
    samples, expected = case.trained[case.world_size]
    assert logged(first.ranks) == {number: loss for number, loss in expected.items() if number <= step}, show(first)
    assert logged(rest.ranks) == {number: loss for number, loss in expected.items() if number > step}, show(rest)
    case.compare(first.steps + rest.steps, samples, show(rest))


FAULTS: dict[str, Callable[[Case], None]] = {
    "download: other content": partial(fail_at_store, kind="flip", told=r"its xxh64 is \w+, expected"),
    "download: cut": partial(fail_at_store, kind="truncate", told=r"it has [\d,]+ bytes, expected"),
    "download: 404": partial(fail_at_store, kind="404", told=r"\(404\)|NoSuchKey"),
    "download: 403": partial(fail_at_store, kind="403", told=r"\(403\)|AccessDenied"),
    "download: 500": partial(fail_at_store, kind="500", told=r"InternalError", survived=5),
    "download: 503": partial(fail_at_store, kind="503", told=r"SlowDown", survived=5),
    "download: reset": partial(fail_at_store, kind="reset", told=r"(Connection|Read|Protocol)\w*Error", survived=9),
    "download: short": partial(fail_at_store, kind="short", told=r"IncompleteRead", survived=9),
    "download: stalled": partial(fail_at_store, kind="stall", told=rf"no progress for {PATIENCE} s"),
    "cached file damaged": partial(damage_before, cached=True),
    "local file damaged": partial(damage_before, cached=False),
    "cached files lost in use": partial(damage_in_use, cached=True),
    "local files lost in use": partial(damage_in_use, cached=False),
    "cache is the only copy": alias_source,
    "shards evicted": evict,
    "disk full": fill_disk,
    "cache not writable": forbid_cache,
    "index lies": lie,
    "cached index damaged": damage_index,
    "worker killed": kill_worker,
    "cache of another job": share_cache,
}
KILLS: dict[str, Callable[[Case], None]] = {
    "SIGKILL of a rank": partial(kill_training, number=signal.SIGKILL, whole_tree=False),
    "SIGKILL of all processes": partial(kill_training, number=signal.SIGKILL, whole_tree=True),
    "SIGINT": partial(kill_training, number=signal.SIGINT, whole_tree=True),
}
STOPS: dict[str, Callable[[Case], None]] = {
    number.name: partial(stop_training, number=number) for number in (signal.SIGTERM, signal.SIGUSR1)
}


def plan(seed: int, faults: int, kills: int, stops: int, only: str | None) -> list[Case]:
    """The cases of a run: all kinds take turns, in an order that is drawn."""
    order, cases = random.Random(seed), list[Case]()
    for kinds, number in ((FAULTS, faults), (KILLS, kills), (STOPS, stops)):
        able = [kind for kind in kinds if only in (None, kind) and (kind != "disk full" or can_make_nodes())]
        turns = [Case(kind, turn, seed) for turn in range(number) for kind in order.sample(able, len(able))]
        cases += turns[:number]
    return order.sample(cases, len(cases))


def prepare(folder: Path, stores: list[Store]) -> Undisturbed:
    """Write the streams, put them into the stores, and read them undisturbed."""
    streams = {"text": write_stream(folder / "text", SAMPLES), "finetuning": write_turns(folder / "tuning", SAMPLES)}
    for store, (loader, stream) in itertools.product(stores, streams.items()):
        store.upload(stream, loader)
    undisturbed = Undisturbed(streams, {}, {})
    for loader, shuffle in itertools.product(LOADERS, (False, True)):
        config = reader(loader, shuffle, 0, {"local": str(streams[loader])})
        read = read_job(config, folder / f"{loader} {shuffle}", steps=STEPS)
        undisturbed.read[loader, shuffle] = read.steps
        assert len(set(itertools.chain(*read.steps))) == STEPS * 8 == sum(map(len, read.steps)), show(read)
    return undisturbed


def train_undisturbed(folder: Path, undisturbed: Undisturbed) -> None:
    """Train on one and on two ranks, for the cases that are killed in training."""
    for world_size in (1, 2):
        write_job(folder / f"trained-{world_size}", f'[dataset]\nlocal = "{undisturbed.streams["text"]}"')
        done = train(folder / f"trained-{world_size}", "notes", world_size)
        assert len(done.steps) == STEPS, show(done)
        undisturbed.trained[world_size] = done.steps, logged(done.ranks)


def start(case: Case, undisturbed: Undisturbed) -> int:
    """Begin a case in a process of its own; return its pid."""
    case.folder.mkdir(parents=True)
    if pid := os.fork():
        return pid
    tempfile.tempdir = str(case.folder)
    try:
        case.begin(undisturbed)
        (FAULTS | KILLS | STOPS)[case.kind](case)
        assert tree(case.stream) == case.source, "a job has changed its source"
        assert case.outcome.ok, case.outcome
    except BaseException:
        case.outcome.problem = f"{case}\n{traceback.format_exc()}"
    (case.folder / "outcome").write_bytes(pickle.dumps(case.outcome))
    os._exit(0)


def end(case: Case, pid: int) -> None:
    """Take over the outcome of a case; one that hasn't ended hangs."""
    if (outcome := case.folder / "outcome").exists():
        case.outcome = pickle.loads(outcome.read_bytes())
    else:
        outputs = [file.read_text() for file in sorted(case.folder.glob("ranks-*/*.txt"))]
        case.outcome.problem = "\n".join([f"{case}\nhangs, or has lost its process.", *outputs])
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
                process.kill()
    if case.outcome.problem:
        numbers = " ".join(f"{flag} {case.number + 1}" for flag in ("--faults", "--kills", "--stops"))
        again = f"--only {case.kind!r} --seed {case.seed} {numbers}"
        print(f"FAILED: {case.outcome.problem}\nAgain: python -m tests.soak {again}\n", flush=True)
    shutil.rmtree(case.folder, ignore_errors=True)


def run(cases: list[Case], stores: list[Store], undisturbed: Undisturbed, folder: Path, until: float) -> list[Case]:
    """Run cases side by side, as many as begin in time; return those."""
    waiting, free, done = iter(cases), list(stores), list[Case]()
    running: dict[int, tuple[Case, float]] = {}
    while True:
        while free and time.monotonic() < until and (case := next(waiting, None)):
            case.store, case.folder = free.pop(), folder / str(len(done) + len(running))
            running[start(case, undisturbed)] = case, time.monotonic() + CASE_LIMIT
        if not running:
            return done
        for pid, (case, limit) in list(running.items()):
            ended, _ = os.waitpid(pid, os.WNOHANG)
            if ended or time.monotonic() > limit:
                end(case, pid)
                del running[pid]
                free.append(case.store)
                done.append(case)
        time.sleep(0.02)


def table(cases: list[Case]) -> str:
    """A row for each kind, and one for all."""
    lines = ["".join([f"{'fault':26}", *(f"{column:>10}" for column in (*COLUMNS, "stop"))])]
    rows = {kind: [case.outcome for case in cases if case.kind == kind] for kind in FAULTS | KILLS | STOPS}
    for name, outcomes in (rows | {"all": [case.outcome for case in cases]}).items():
        counts = [sum(getattr(outcome, column) for outcome in outcomes) for column in COLUMNS]
        seconds = max((outcome.seconds for outcome in outcomes), default=0.0)
        stop = f"{seconds:.1f} s" if seconds else "-"
        if outcomes:
            lines.append("".join([f"{name:26}", *(f"{count:>10}" for count in counts), f"{stop:>10}"]))
    return "\n".join(lines)


def soak(argv: list[str]) -> int:
    """Run as the flags say, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="decides order and parameters (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="until it fails (default: %(default)s)")
    parser.add_argument("--only", choices=[*FAULTS, *KILLS, *STOPS], metavar="KIND", help="one kind")
    parser.add_argument("--faults", type=int, default=200, help="to inject (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="of training runs (default: %(default)s)")
    parser.add_argument("--stops", type=int, default=40, help="signals that it saves after (default: %(default)s)")
    flags = parser.parse_args(argv)
    began, limit = time.monotonic(), 60 * flags.minutes
    cases = plan(flags.seed, flags.faults, flags.kills, flags.stops, flags.only)
    if not can_make_nodes():
        print("No rights to mount: without full and read-only disks.")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        stores = [stack.enter_context(running_store()) for _ in range(SLOTS)]
        undisturbed = prepare(folder, stores)
        train_undisturbed(folder, undisturbed)
        done = run(cases, stores, undisturbed, folder / "cases", began + limit - CASE_LIMIT)
    seconds, failed = time.monotonic() - began, sum(bool(case.outcome.problem) for case in done)
    print(table(done))
    print(
        f"seed {flags.seed}, {seconds:.0f} s of {limit:.0f} s, {len(done)} of {len(cases)} cases, {failed} failed; "
        "stop: the longest from a job's last step to its end"
    )
    return int(failed > 0 or len(done) < len(cases) or seconds > limit)


if __name__ == "__main__":
    sys.exit(soak(sys.argv[1:]))
