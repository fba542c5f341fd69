"""llm-foundry without what training never uses: the same llm-foundry, whose rest comes when it is used."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.upstream.lazy_imports import LATER, Later, can_wait, fetch

REPORT = """
import json, sys
from llmfoundry import registry
registries = {name: sorted(getattr(registry, name).get_all()) for name in registry.__all__}
LEFT = ("mlflow", "mcli", "sklearn", "git", "bs4", "matplotlib", "scipy.signal", "scipy.optimize")
packages = [name for name in LEFT if name in sys.modules]
"""

OURS = """
from examples.mosaic_streaming.upstream import cpu
from examples.mosaic_streaming.upstream import lazy_imports as imports
cpu.prepare_torchtitan()
true_import = __import__
imports.import_llm_foundry()
import examples.mosaic_streaming.dataloader, examples.mosaic_streaming.tokenizer, examples.mosaic_streaming.validator
{report}
waiting = [module + " in " + importer for importer, module in imports.LATER if module != "scipy.signal"
           and not any(isinstance(value, imports.Later) for name, one in list(sys.modules.items())
                       if (name + ".").startswith(importer + ".") for value in vars(one).values())]
from llmfoundry.callbacks import async_eval_callback, env_logging_callback, hf_checkpointer
from llmfoundry.utils import config_utils, model_download_utils
from transformers.generation import candidate_generator
from transformers.loss import loss_for_object_detection
import torch, torchmetrics
used = [
    candidate_generator.roc_curve([0, 1], [0.1, 0.9])[0].tolist(),
    model_download_utils.BeautifulSoup("<a>b</a>", "html.parser").text,
    env_logging_callback.pkg_resources.get_distribution("torchtitan").version,
    issubclass(env_logging_callback.git.NoSuchPathError, OSError),
    config_utils.http_dataset_source.HTTPDatasetSource("https://a/b").url,
    config_utils.mlflow.active_run(),
    async_eval_callback.RunConfig.__name__,
    callable(env_logging_callback.sdk.get_run),
    type(torchmetrics.MeanMetric().plot(torch.ones(2))[0]).__name__,
    loss_for_object_detection.linear_sum_assignment([[1, 2], [2, 1]])[1].tolist(),
    torchmetrics.scipy.signal.hamming(3).round(2).tolist(),
]
print(json.dumps([registries, packages, waiting, __import__ is true_import, used]))
"""

START = """
from examples.mosaic_streaming import titan, train
flags, titan_flags = train.parse_flags([
    "--config", "examples/mosaic_streaming/configs/mosaic_job.toml",
    "--mosaic-config", "examples/mosaic_streaming/configs/mosaic_dataloader.toml",
])
job = titan.load_job(flags, titan_flags)
titan.check_job(job, 1)
train.import_llm_foundry()
import examples.mosaic_streaming.dataloader, examples.mosaic_streaming.tokenizer, examples.mosaic_streaming.validator
{report}
print(json.dumps(packages))
"""

PLAIN = """
import llmfoundry
{report}
from sklearn.metrics import roc_curve
print(json.dumps([registries, packages, roc_curve([0, 1], [0.1, 0.9])[0].tolist()]))
"""


def run(code: str) -> Any:
    """The last line that a new Python prints for this code, read as JSON."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code).replace("{report}", REPORT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.long
def test_what_training_never_uses_is_imported_when_it_is_used() -> None:
    registries, packages, missed, restored, used = run(OURS)
    plain_registries, plain_packages, curve = run(PLAIN)
    assert registries == plain_registries and registries["dataloaders"]
    assert packages == [] and len(plain_packages) == 8
    assert missed == []
    assert restored
    assert used == [
        curve,
        "b",
        "0.2.2",
        True,
        "https://a/b",
        None,
        "RunConfig",
        True,
        "Figure",
        [0, 1],
        [0.08, 1.0, 0.08],
    ]


def test_a_start_imports_llm_foundry_without_them() -> None:
    """Nothing that comes before may import it plainly."""
    assert run(START) == []


@pytest.mark.parametrize(
    ("importer", "module", "names"),
    [
        ("llmfoundry.utils.config_utils", "mlflow.data", {"http_dataset_source", "another"}),
        ("llmfoundry.utils.config_utils", "mlflow", {"active_run"}),
        ("llmfoundry.utils.config_utils", "mlflow.data", set()),
        ("a_users_module", "mlflow", set()),
        ("torchmetrics_of_a_user", "torchmetrics.utilities.plot", {"_AX_TYPE"}),
    ],
)
def test_other_statements_are_carried_out_at_once(importer: str, module: str, names: set[str]) -> None:
    assert not can_wait(importer, module, names)


def test_a_package_that_is_not_installed_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LATER, ("a", "no_such_package"), "")
    assert not can_wait("a", "no_such_package", set())


def test_what_torchmetrics_does_for_speech_it_does_where_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "scipy.signal", raising=False)
    assert can_wait("torchmetrics", "scipy.signal", set())
    (tmp_path / "srmrpy.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not can_wait("torchmetrics", "scipy.signal", set())


def test_errors_are_those_of_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('no library')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OSError, match="no library"):
        Later("broken_package").anything()
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'json'"):
        Later("json", "nothing")()
    with pytest.raises(AttributeError, match="module 'json' has no attribute 'nothing'"):
        _ = Later("json").nothing
    assert fetch("xml", "sax") is sys.modules["xml.sax"]
