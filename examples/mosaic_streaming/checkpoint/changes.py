"""What may change at a resume, and what may not: the past is fixed, the future is free."""

from collections.abc import Sequence

from examples.mosaic_streaming.checkpoint.fingerprint import START_ANEW, Fingerprint, differences
from examples.mosaic_streaming.checkpoint.state import State
from examples.mosaic_streaming.config import Plan, joined
from examples.mosaic_streaming.errors import ConfigError, text_table


def check_same_data(saved: State, plan: Plan, fingerprints: Sequence[Fingerprint]) -> None:
    """Raise ConfigError unless a run with a plan, whose stages have the fingerprints, can go on from a saved state."""
    batch = saved.read.batch(saved.steps)
    for skip in plan.skips:
        if saved.read.steps(skip.first - 1) < saved.read.steps(min(skip.last, batch)):
            raise ConfigError(
                f"The skip of {skip} in {plan.source} names batches that have been read: the checkpoint is of step "
                f"{saved.steps:,}, which read batch {batch:,}. {go_back(saved.read.steps(skip.first - 1), 'skip')}"
            )
    before, now = map(set, begun(saved, plan))
    if before < now:
        step = min(now - before)
        raise ConfigError(
            f"A stage in {plan.source} begins at step {step:,}, but the checkpoint is of step {saved.steps:,}, and "
            f"that step was read from the stage before. {go_back(step - 1, 'stage')}"
        )
    if rows := data_differences(saved, plan, fingerprints):
        files = dict.fromkeys([plan.source, *(stage.file.path for stage in plan.stages[: len(now)])])
        where = ", ".join(files)
        if (saved.past or saved.skipped) and len(files) == 1:
            where = "the plan, which --mosaic-config has to name again,"
        raise ConfigError(
            f"The checkpoint was written on other data. Going on from it would not give the samples that come next.\n"
            f"{text_table(['setting', 'checkpoint', 'now'], rows)}\n"
            f"Restore these in {where} and the job config, or {START_ANEW}."
        )


def begun(saved: State, plan: Plan) -> tuple[list[int], list[int]]:
    """Return the first steps of the stages that have begun at a saved position: then, and by the plan now."""
    before = [1, *(saved.read.steps(end) + 1 for end, _ in saved.past)]
    return before, [stage.from_step for stage in plan.stages if stage.from_step <= max(saved.steps, 1)]


def go_back(step: int, what: str) -> str:
    """Say which checkpoint would do."""
    if step < 1:
        return "It would have to begin with the run: no checkpoint is early enough."
    return f"Go back to a checkpoint of step {step:,} or before with --checkpoint.load_step, or change the {what}."


def data_differences(saved: State, plan: Plan, fingerprints: Sequence[Fingerprint]) -> list[list[str]]:
    """Return what differs of the stages and skips up to a saved position, as rows of a table."""
    batch, rows = saved.read.batch(saved.steps), []
    skips = (saved.read.skips, [skip for skip in plan.skips if skip.first <= batch])
    before, now = (", ".join(f"{first}:{last}" for first, last in joined(one)) or "none" for one in skips)
    if now != before:
        rows.append(["skipped batches", before, now])
    steps = [", ".join(f"{step:,}" for step in first_steps) for first_steps in begun(saved, plan)]
    if steps[0] != steps[1]:
        rows.append(["first steps of stages", *steps])
    for number, (old, new) in enumerate(zip(saved.stages, fingerprints, strict=False), start=1):
        place = f"stage {number}, " if saved.past else ""
        rows += [[f"{place}{key}", *values] for key, *values in differences(old, new)]
    return rows


def changes_ahead(saved: State, ahead: Sequence[str]) -> str:
    """Say what of the plan behind a saved position has changed; nothing if nothing has."""
    new, gone = ([one for one in of if one not in other] for of, other in ((ahead, saved.ahead), (saved.ahead, ahead)))
    parts = [f"{word}: {'; '.join(which)}" for word, which in (("New", new), ("Gone", gone)) if which]
    return f"The plan after step {saved.steps:,} has changed. {'. '.join(parts)}." if parts else ""
