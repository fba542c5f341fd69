"""Plan files: what they say, and what is wrong with them."""

import dataclasses
import re
from pathlib import Path

import pytest

from examples.mosaic_streaming.config.plan import Plan, Skip, read_loaders, resolve_stages, warnings_of_plan
from examples.mosaic_streaming.errors import ConfigError
from tests.support.streams import described, job, write_stream

STAGE = '[[stage]]\nloader = "web.toml"\n'
ANNEAL = '[[stage]]\nfrom_step = 40\nloader = "more/anneal.toml"\n'
SKIP = '[[skip]]\nbatches = "12:13"\n'


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream"), 20)


@pytest.fixture
def folder(tmp_path: Path, stream: Path) -> Path:
    """A folder with two loaders of a stream, each in its own place."""
    (tmp_path / "more").mkdir()
    for name in ("web.toml", "more/anneal.toml"):
        settings = f'batching_method = "blend"\n[dataset.streams.web]\nlocal = "{stream}"\n'
        (tmp_path / name).write_text(f'name = "text"\n[dataset]\n{settings}')
    return tmp_path


def read(folder: Path, text: str) -> Plan:
    (folder / "plan.toml").write_text(text)
    return read_loaders(f"{folder}/plan.toml", None)[0]


def test_plan_names_stages_and_skips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaders are found from the plan's folder."""
    more = '[[skip]]\nbatches = "1_000"\nreason = "a spike"\nrestart = ["web"]\n'.replace('restart = ["web"]\n', "")
    plan = read(folder, STAGE + ANNEAL + 'restart = ["web"]\n' + more + SKIP)
    assert [stage.from_step for stage in plan.stages] == [1, 40]
    assert [stage.file.path for stage in plan.stages] == [f"{folder}/web.toml", f"{folder}/more/anneal.toml"]
    assert [stage.restart for stage in plan.stages] == [(), ("web",)]
    assert plan.skips == (Skip(12, 13), Skip(1000, 1000, "a spike"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MORE", "more")
    (folder / "plan.toml").write_text(STAGE + ANNEAL.replace("more/", "$MORE/"))
    [_, second] = read_loaders("plan.toml", None)[0].stages
    assert second.file.path == "more/anneal.toml"


def test_validation_reads_one_loader(folder: Path) -> None:
    read(folder, STAGE)
    with pytest.raises(
        ConfigError, match=r"plan.toml is a plan, but --mosaic-validation-config takes one loader\. Name"
    ):
        read_loaders(f"{folder}/web.toml", f"{folder}/plan.toml")


def test_loader_file_is_a_plan_of_one_stage(folder: Path) -> None:
    plan, _ = read_loaders(f"{folder}/web.toml", None)
    assert (plan.source, plan.skips, plan.begins) == (f"{folder}/web.toml", (), [0])
    assert [(stage.from_step, stage.file.config["name"]) for stage in plan.stages] == [(1, "text")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STAGE + ANNEAL + ANNEAL, "from_step = 40 in stage 3 of PLAN, but the stage before begins at step 40. Expect"),
        (STAGE + ANNEAL + ANNEAL.replace("40", "30"), "from_step = 30 in stage 3 of PLAN, but the stage before begin"),
        (STAGE + STAGE, "stage 2 of PLAN has no `from_step`, expected the first step that reads it."),
        (STAGE + ANNEAL.replace("40", "0"), "from_step = 0 in stage 2 of PLAN, expected the first step that reads it."),
        (ANNEAL, "from_step = 40 in stage 1 of PLAN, expected 1: the first stage begins with the run."),
        (STAGE.replace("web", "wed"), "Can't read FOLDER/wed.toml: No such file or directory."),
        (STAGE.replace("web.toml", "plan.toml"), "FOLDER/plan.toml, the loader of stage 1 of PLAN, is a plan itself."),
        ("[[stage]]\nfrom_step = 1\n", "stage 1 of PLAN has no `loader`: name the loader's TOML, or an llm-foundry Y"),
        (SKIP, "PLAN has no [[stage]]: a plan needs one at least, with the `loader` that it reads."),
        (STAGE + SKIP + SKIP.replace("12:13", "13:15"), "The skips of batches 12 to 13 and of batches 13 to"),
        (STAGE + SKIP.replace("12:13", "13:12"), 'batches = "13:12" in skip 1 of PLAN, expected "FIRST:LAST", or on'),
        (STAGE + SKIP.replace("12:13", "0:3"), 'batches = "0:3" in skip 1 of PLAN, expected "FIRST:LAST", or on'),
        (STAGE + SKIP.replace("12:13", "some"), 'batches = "some" in skip 1 of PLAN, expected "FIRST:LAST", or on'),
        (STAGE + SKIP.replace("12:13", "1:_"), 'batches = "1:_" in skip 1 of PLAN, expected "FIRST:LAST", or on'),
        (STAGE + SKIP.replace("12:13", "1:100_000_001"), 'batches = "1:100_000_001" in skip 1 of PLAN, expected "FIRS'),
        (STAGE + ANNEAL.replace("40", "100_000_001"), "from_step = 100,000,001 in stage 2 of PLAN, expected the fir"),
        (STAGE + "[[skip]]\n", "skip 1 of PLAN has no `batches`: name the global batches, as "),
        (STAGE + '[[skip]]\nbatch = "3:4"\n', "skip 1 of PLAN has keys that nothing reads: batch (did you mean batch"),
        (STAGE + "form_step = 1\n", "stage 1 of PLAN has keys that nothing reads: form_step (did you mean from_step?"),
        (STAGE + '[[stages]]\nloader = "x"\n', "PLAN has tables that no plan has: stages (did you mean stage?)."),
        ('[[stages]]\nloader = "x"\n', "PLAN has tables that no plan has: stages (did you mean stage?)."),
        (STAGE + 'from_step = "1"\n', "from_step = '1' in stage 1 of PLAN, expected a whole number."),
        (STAGE + ANNEAL + 'restart = "web"\n', "restart = 'web' in stage 2 of PLAN, expected a list of strings."),
        (STAGE + ANNEAL + "restart = [1]\n", "restart = [1] in stage 2 of PLAN, expected a list of strings."),
        (STAGE + ANNEAL + 'restart = ["wbe"]\n', "restart in stage 2 of PLAN names streams that FOLDER/more/anneal.t"),
        (STAGE + 'restart = ["web"]\n', "restart = ['web'] in stage 1 of PLAN: nothing has been read before. Remove "),
        ('name = "text"\n' + STAGE, "PLAN has [[stage]] or [[skip]], which make it a plan, and keys of a loader: nam"),
        ('stage = "web.toml"\n', "stage = 'web.toml' in PLAN, expected tables, each below a line [[stage]]."),
    ],
)  # fmt: skip
def test_wrong_plan_is_refused_with_words(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(folder, text)
    told = message.replace("PLAN", f"{folder}/plan.toml").replace("FOLDER", str(folder))
    assert str(error.value).startswith(told)


def test_later_stage_needs_an_order_in_which_streams_have_positions(folder: Path) -> None:
    for name in ("web.toml", "more/anneal.toml"):
        loader = folder / name
        loader.write_text(loader.read_text().replace('"blend"', '"random"'))
        if name == "web.toml":
            assert len(resolve_stages(read(folder, STAGE + ANNEAL), described(job()))) == 2, "the first may have any"
    with pytest.raises(
        ConfigError, match=r"batching_method = 'random' in .*anneal.toml, stage 2 of .*plan.toml: stages n"
    ):
        resolve_stages(read(folder, STAGE + ANNEAL), described(job()))


def test_skip_beyond_the_run_is_refused_and_a_stage_warned_of(folder: Path) -> None:
    config = job()
    config.training.steps = 11
    made = described(config)
    told = re.escape("beyond the run, whose last step, training.steps = 11, reads batch 11. Remove it, or raise traini")
    with pytest.raises(ConfigError, match=told):
        resolve_stages(read(folder, STAGE + SKIP), made)
    assert resolve_stages(read(folder, STAGE + SKIP.replace("12:", "11:")), made)
    plan = read(folder, STAGE + ANNEAL)
    assert warnings_of_plan(plan, dataclasses.replace(made, steps=40)) == []
    assert warnings_of_plan(plan, dataclasses.replace(made, steps=39)) == [
        f"Stage 2 of {folder}/plan.toml begins at step 40, and the run ends with step 39 (training.steps): it won't be "
        "read."
    ]


def test_steps_of_a_plan_arent_compared_with_those_of_a_run_that_begins_elsewhere(folder: Path) -> None:
    """At another run's position, or with steps or streams that begin anew."""
    config = job()
    config.training.steps = 5
    made, plan = described(config), read(folder, STAGE + ANNEAL + SKIP)
    with pytest.raises(ConfigError, match="beyond the run"):
        resolve_stages(plan, made)
    assert len(resolve_stages(plan, made, "elsewhere/step-12")) == 2
    assert warnings_of_plan(plan, made, "elsewhere/step-12") == []
    anew = dataclasses.replace(made.checkpoints, exclude_from_loading=("train_state",))
    assert len(resolve_stages(plan, dataclasses.replace(made, checkpoints=anew))) == 2
