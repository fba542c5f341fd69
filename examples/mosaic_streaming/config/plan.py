"""A plan: which loader a run reads from which step on, and which global batches it skips."""

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from examples.mosaic_streaming.config.files import YAML, LoaderFile, expand_path, print_ignored, read_loader, read_toml
from examples.mosaic_streaming.config.folders import check_folders
from examples.mosaic_streaming.config.job import Job
from examples.mosaic_streaming.config.keys import unknown_keys
from examples.mosaic_streaming.config.loader import ResolvedLoader, check_file, resolve
from examples.mosaic_streaming.config.streams import streams_of
from examples.mosaic_streaming.config.values import refuse, wrong_value
from examples.mosaic_streaming.errors import ConfigError

TABLES: dict[str, dict[str, Any]] = {
    "stage": {"loader": str, "from_step": int, "restart": list[str]},
    "skip": {"batches": str, "reason": str},
}  # the tables of a plan, and the types of their keys
MAX_STEPS = 100_000_000  # more steps and global batches than any run has


class Skip(NamedTuple):
    """Global batches that are left out, counted from 1, both included."""

    first: int
    last: int
    reason: str = ""

    def __str__(self) -> str:
        batches = f"batches {self.first:,} to {self.last:,}" if self.first < self.last else f"batch {self.first:,}"
        return batches + f" ({self.reason})" * bool(self.reason)


class Stage(NamedTuple):
    """What a run reads from a step on, until the next stage begins."""

    from_step: int  # optimizer steps are counted from 1
    file: LoaderFile
    restart: tuple[str, ...] = ()  # streams that begin anew

    @property
    def recorded(self) -> dict[str, Any]:
        """What a checkpoint records of it beside its loader."""
        names = list(streams_of(self.file.config["dataset"])) if self.restart else []
        return {"streams that begin anew": [names.index(name) + 1 for name in self.restart]} if self.restart else {}


@dataclass(frozen=True)
class Plan:
    """The stages of a run, and what it skips. A run of one loader file is a plan with one stage."""

    stages: tuple[Stage, ...]
    skips: tuple[Skip, ...] = ()
    source: str = ""  # file of the plan, for messages

    @classmethod
    def of(cls, file: LoaderFile) -> "Plan":
        """Return the plan of a run that reads one loader."""
        return cls((Stage(1, file),), (), file.path)

    def batch(self, step: int) -> int:
        """Return the number of the batch that a step reads; 0 for step 0. It is `step` if nothing is skipped before."""
        batch = step
        for skip in self.skips if step else ():
            batch += skip.last - skip.first + 1 if skip.first <= batch else 0
        return batch

    def steps(self, batch: int) -> int:
        """Return how many steps have read their batch when a batch has been read or skipped."""
        return batch - sum(min(skip.last, batch) - skip.first + 1 for skip in self.skips if skip.first <= batch)

    @property
    def begins(self) -> list[int]:
        """Batches that have been read or skipped when each stage begins."""
        return [self.batch(stage.from_step - 1) for stage in self.stages]

    def runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the batches that are read after `begin` up to `end`: the number before the first one, and the last."""
        for skip in (*self.skips, Skip(end + 1, end)):
            if begin < (last := min(skip.first - 1, end)):
                yield begin, last
            begin = max(begin, skip.last)


def read_loaders(train: str, validation: str | None) -> tuple[Plan, LoaderFile | None]:
    """Parse the file of the training data, as `read_plan` does, and the validation loader's if there is one.

    ConfigError if a file is missing, can't be parsed, or is no plan and no loader.
    """
    plan, held_out = read_plan(train), read_loader(validation, "eval_loader") if validation else None
    if held_out and is_plan(held_out.config):
        raise ConfigError(f"{validation} is a plan, but --mosaic-validation-config takes one loader. Name its file.")
    read = [(stage.file.path, "train_loader") for stage in plan.stages]
    print_ignored([*read, *([(held_out.path, "eval_loader")] if held_out else [])])
    return plan, held_out


def read_plan(path: str) -> Plan:
    """Parse the file of the training data: a plan, or a loader's TOML or YAML, which is a plan of one stage."""
    if path.endswith(YAML) or not is_plan(content := read_toml(path)):
        return Plan.of(read_loader(path, "train_loader"))
    if of_loader := [key for key, value in content.items() if key not in TABLES and not isinstance(value, list)]:
        raise ConfigError(
            f"{path} has [[stage]] or [[skip]], which make it a plan, and keys of a loader: {', '.join(of_loader)}. "
            "Put these into a file of their own, and name it as a stage's `loader`."
        )
    check_tables(content, path)
    stages = tuple(read_stage(table, number, path) for number, table in enumerate(content.get("stage", ()), start=1))
    if not stages:
        raise ConfigError(f"{path} has no [[stage]]: a plan needs one at least, with the `loader` that it reads.")
    for number, (one, other) in enumerate(itertools.pairwise(stages), start=2):
        if other.from_step <= one.from_step:
            raise ConfigError(
                f"from_step = {other.from_step} in stage {number} of {path}, but the stage before begins at step "
                f"{one.from_step}. Expected rising steps."
            )
    skips = sorted(read_skip(table, number, path) for number, table in enumerate(content.get("skip", ()), start=1))
    for skip, after in itertools.pairwise(skips):
        if after.first <= skip.last:
            raise ConfigError(f"The skips of {skip} and of {after} in {path} overlap. Make one of them.")
    return Plan(stages, tuple(skips), path)


def is_plan(content: dict[str, Any]) -> bool:
    """Whether a TOML file is a plan: it has a table of one, or nothing but lists, which no loader has at the top."""
    return bool(TABLES.keys() & content) or (bool(content) and all(isinstance(one, list) for one in content.values()))


def check_tables(content: dict[str, Any], path: str) -> None:
    """Raise ConfigError for what is no table of a plan, and for unknown keys and wrong types in one."""
    if unknown := unknown_keys("", content, list(TABLES)):
        raise ConfigError(f"{path} has tables that no plan has: {'; '.join(unknown)}.")
    for section, tables in content.items():
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise ConfigError(f"{section} = {tables!r} in {path}, expected tables, each below a line [[{section}]].")
        for number, table in enumerate(tables, start=1):
            place, hints = f"{section} {number} of {path}", TABLES[section]
            if unknown := unknown_keys("", table, list(hints)):
                raise ConfigError(f"{place} has keys that nothing reads: {'; '.join(unknown)}.")
            refuse([wrong_value(key, table[key], hints[key], place) for key in table])


def read_stage(table: dict[str, Any], number: int, path: str) -> Stage:
    """Read a stage of a plan, and its loader; ConfigError if the loader isn't there, or is a plan itself."""
    place, first = f"stage {number} of {path}", table.get("from_step", 1 if number == 1 else 0)
    if "loader" not in table:
        raise ConfigError(f"{place} has no `loader`: name the loader's TOML, or an llm-foundry YAML.")
    if not 1 <= first <= MAX_STEPS or (number == 1 and first != 1):
        given = f"from_step = {first:,} in {place}" if "from_step" in table else f"{place} has no `from_step`"
        expected = "1: the first stage begins with the run" if number == 1 else "the first step that reads it"
        raise ConfigError(f"{given}, expected {expected}.")
    loader = os.path.join(os.path.dirname(path), expand_path(table["loader"], f"loader in {place}"))
    if not loader.endswith(YAML) and is_plan(read_toml(loader)):
        raise ConfigError(f"{loader}, the loader of {place}, is a plan itself. Name a loader's file.")
    file, restart = read_loader(loader, "train_loader"), table.get("restart", [])
    dataset = file.config.get("dataset")
    names = list(streams_of(dataset)) if isinstance(dataset, dict) else []
    if unknown := unknown_keys("", dict.fromkeys(restart), names):
        raise ConfigError(f"restart in {place} names streams that {loader} doesn't have: {'; '.join(unknown)}.")
    if restart and number == 1:
        raise ConfigError(f"restart = {restart} in {place}: nothing has been read before. Remove it.")
    return Stage(first, file, tuple(restart))


def read_skip(table: dict[str, Any], number: int, path: str) -> Skip:
    """Read a skip of a plan."""
    place = f"skip {number} of {path}"
    if not (text := table.get("batches")):
        raise ConfigError(f'{place} has no `batches`: name the global batches, as "FIRST:LAST" or as one number, "13".')
    found = re.fullmatch(r"(\d+(?:_\d+)*)(?::(\d+(?:_\d+)*))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= MAX_STEPS:
        raise ConfigError(
            f'batches = "{text}" in {place}, expected "FIRST:LAST", or one number: batches from 1 to {MAX_STEPS:,}, '
            "the first one first."
        )
    return Skip(first, last, table.get("reason", ""))


def joined(skips: Sequence[Skip]) -> list[list[int]]:
    """Return the first and last batches of skips, those that follow each other as one."""
    found: list[list[int]] = []
    for first, last, _ in skips:
        if found and found[-1][1] + 1 == first:
            found[-1][1] = last
        else:
            found.append([first, last])
    return found


def last_step(job: Job, position: str | None) -> float:
    """Return the last step of a run, or no end where it doesn't begin with the steps of its plan, at `position`."""
    return math.inf if position or job.checkpoints.counts_anew else job.steps


def check_files(plan: Plan, held_out: LoaderFile | None) -> None:
    """Raise ConfigError for what is wrong in files whatever the job is (`check_file`); `resolve` sees the rest."""
    for file in (*(stage.file for stage in plan.stages), *([held_out] if held_out else [])):
        check_file(file)
    check_orders(plan)


def check_orders(plan: Plan) -> None:
    """Raise ConfigError if a later stage has another order than "blend"."""
    for number, (_, file, _) in enumerate(plan.stages[1:], start=2):
        dataset = file.config.get("dataset")  # of a registered loader, which hasn't been checked, anything
        method = dataset.get("batching_method", "random") if isinstance(dataset, dict) else "blend"
        if method != "blend":
            raise ConfigError(
                f"dataset.batching_method = {method!r} in {file.path}, stage {number} of {plan.source}: stages need "
                "the order 'blend', in which each stream has a position. Only the first stage can have another."
            )


def resolve_stages(plan: Plan, job: Job, position: str | None = None) -> list[ResolvedLoader]:
    """Complete the configuration of each stage's loader, as `resolve` does.

    ConfigError if that refuses one, a later stage has another order than "blend", or a skip is beyond the run.
    """
    found = [resolve(stage.file, job.training, job.layout.replication) for stage in plan.stages]
    check_orders(plan)
    for before, one in itertools.combinations(found, 2):
        check_folders(one.folders, before.folders)
    for skip in plan.skips:
        if plan.steps(skip.first - 1) >= last_step(job, position):
            raise ConfigError(
                f"The skip of {skip} in {plan.source} is beyond the run, whose last step, training.steps = "
                f"{job.steps:,}, reads batch {plan.batch(job.steps):,}. Remove it, or raise training.steps."
            )
    return found


def warnings_of_plan(plan: Plan, job: Job, position: str | None = None) -> list[str]:
    """Return what a start warns of in a plan."""
    crossing = [
        f"The skip of {Skip(first, last)} in {plan.source} is in stage {number} alone: without it, stage {number + 1} "
        f"began with batch {begin - (last - first):,}, with it, it begins with batch {begin + 1:,}. Skip batches of "
        "one stage at a time, and look up those of later stages again."
        for number, begin in enumerate(plan.begins[1:], start=1)
        for first, last in joined(plan.skips)
        if 0 < begin - last < last - first + 1
    ]
    return crossing + [
        f"Stage {number} of {plan.source} begins at step {stage.from_step:,}, and the run ends with step {job.steps:,} "
        "(training.steps): it won't be read."
        for number, stage in enumerate(plan.stages, start=1)
        if stage.from_step > last_step(job, position)
    ]
