"""Imports llm-foundry without what it, composer and transformers import for things that training never does.

`import llmfoundry` takes longer than all of TorchTitan: half of it are MLflow, MosaicML's cloud client, scikit-learn,
matplotlib and others, which upstream imports at module level for use in a few functions (llm-foundry 0.22.0, composer
0.32.1, transformers 4.51.3, torchmetrics 1.7; modules that import them where they are used make this one unnecessary).

The statements of `LATER`, and no others, bind a stand-in that does the import when it is first used, and only while
`import_llm_foundry` runs: afterwards Python imports as ever, and `sys.modules` never has anything but true modules. A
statement that upstream has moved or changed is carried out at once: that costs its seconds and nothing else.
"""

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from examples.mosaic_streaming.upstream.patch import replaced

LATER: dict[tuple[str, str], set[str]] = {
    ("composer.loggers.mosaicml_logger", "mcli"): set(),
    ("llmfoundry.callbacks.async_eval_callback", "mcli"): {"Run", "RunConfig", "create_run", "get_run"},
    ("llmfoundry.callbacks.env_logging_callback", "git"): set(),
    ("llmfoundry.callbacks.env_logging_callback", "mcli"): {"sdk"},
    ("llmfoundry.callbacks.env_logging_callback", "pkg_resources"): set(),
    ("llmfoundry.callbacks.hf_checkpointer", "mlflow.transformers"): {
        "_fetch_model_card",
        "_write_license_information",
    },
    ("llmfoundry.utils.config_utils", "mlflow"): set(),
    ("llmfoundry.utils.config_utils", "mlflow.data"): {
        "delta_dataset_source",
        "http_dataset_source",
        "huggingface_dataset_source",
        "uc_volume_dataset_source",
    },
    ("llmfoundry.utils.model_download_utils", "bs4"): {"BeautifulSoup"},
    ("torchmetrics", "scipy.signal"): set(),
    ("torchmetrics", "torchmetrics.utilities.plot"): {
        "_AX_TYPE",
        "_CMAP_TYPE",
        "_PLOT_OUT_TYPE",
        "plot_confusion_matrix",
        "plot_curve",
        "plot_single_or_multi_val",
    },
    ("transformers.data.metrics", "scipy.stats"): {"pearsonr", "spearmanr"},
    ("transformers.data.metrics", "sklearn.metrics"): {"f1_score", "matthews_corrcoef"},
    ("transformers.generation.candidate_generator", "sklearn.metrics"): {"roc_curve"},
    ("transformers.loss", "scipy.optimize"): {"linear_sum_assignment"},
}
"""What is imported when it is used: (who imports, what from), and the names; none where the module itself is bound.

Who imports is a module of that name or, as with torchmetrics, any in a package of that name.
"""


class Later:
    """A stand-in for a module, a function or a type that upstream calls, asks for attributes or annotates with."""

    def __init__(self, module: str, name: str | None = None):
        self._statement = module, name

    def __repr__(self) -> str:
        return f"<{'.'.join(filter(None, self._statement))}, imported when it is used>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__typing_") or name == "__parameters__":  # to stand in an annotation is no use
            raise AttributeError(name)
        return getattr(fetch(*self._statement), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return fetch(*self._statement)(*args, **kwargs)


def fetch(module: str, name: str | None = None) -> Any:
    """What `import module`, or `from module import name`, binds; with its errors."""
    found = builtins.__import__(module, fromlist=(name,) if name else ())
    if name and not hasattr(found, name):
        raise ImportError(f"cannot import name {name!r} from {module!r} ({found.__file__})", name=module)
    return getattr(found, name) if name else found


def can_wait(importer: str, module: str, names: set[str]) -> bool:
    """Whether a statement is one of `LATER`, for a module that is there and has not been imported yet."""
    listed = [
        known
        for (who, what), known in LATER.items()
        if what == module and (importer == who or importer.startswith(f"{who}."))
    ]
    return (
        any(names <= known and bool(names) == bool(known) for known in listed)
        and module not in sys.modules
        and importlib.util.find_spec(module.partition(".")[0]) is not None
        and (module != "scipy.signal" or importlib.util.find_spec("srmrpy") is None)
    )


def stand_in(module: str, names: set[str]) -> Any:
    """What a statement binds for now.

    torchmetrics 1.7 imports scipy.signal only to give it back a function that SciPy has removed and SRMRpy, for speech,
    asks for. It is shown one that has it; where SRMRpy is installed, it gets the true one at once.
    """
    if module == "scipy.signal":
        return SimpleNamespace(signal=SimpleNamespace(hamming=Later("scipy.signal.windows", "hamming")))
    return SimpleNamespace(**{name: Later(module, name) for name in names}) if names else Later(module)


def import_llm_foundry() -> None:
    """Import llm-foundry, and with it composer, streaming and transformers; to call before any of them is imported."""
    true_import = builtins.__import__

    def import_or_wait(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        names = set(fromlist or ())
        if level == 0 and can_wait((globals or {}).get("__name__") or "", name, names):
            return stand_in(name, names)
        return true_import(name, globals, locals, fromlist, level)

    with replaced(builtins, "__import__", import_or_wait):
        importlib.import_module("llmfoundry")
