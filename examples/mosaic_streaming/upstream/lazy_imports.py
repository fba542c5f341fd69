"""Imports llm-foundry without the packages that training never uses.

`import llmfoundry` takes longer than importing all of TorchTitan. Half of that goes to MLflow, MosaicML's cloud client,
scikit-learn, matplotlib and others, which upstream imports at module level and uses in a few functions (llm-foundry
0.22.0, composer 0.32.1, transformers 4.51.3, torchmetrics 1.7). Modules that import them where they are used make this
one needless.

While `import_llm_foundry` runs, the import statements listed in `LATER` bind a stand-in that imports on first use.
Afterwards Python imports as usual, and `sys.modules` only ever has real modules. A statement that upstream has moved or
changed is executed at once, which costs its seconds and nothing else.
"""

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from examples.mosaic_streaming.upstream.patch import replaced

LATER = {
    ("composer.loggers.mosaicml_logger", "mcli"): "",
    ("llmfoundry.callbacks.async_eval_callback", "mcli"): "Run RunConfig create_run get_run",
    ("llmfoundry.callbacks.env_logging_callback", "git"): "",
    ("llmfoundry.callbacks.env_logging_callback", "mcli"): "sdk",
    ("llmfoundry.callbacks.env_logging_callback", "pkg_resources"): "",
    ("llmfoundry.callbacks.hf_checkpointer", "mlflow.transformers"): "_fetch_model_card _write_license_information",
    ("llmfoundry.utils.config_utils", "mlflow"): "",
    ("llmfoundry.utils.config_utils", "mlflow.data"): (
        "delta_dataset_source http_dataset_source huggingface_dataset_source uc_volume_dataset_source"
    ),
    ("llmfoundry.utils.model_download_utils", "bs4"): "BeautifulSoup",
    ("torchmetrics", "scipy.signal"): "",
    ("torchmetrics", "torchmetrics.utilities.plot"): (
        "_AX_TYPE _CMAP_TYPE _PLOT_OUT_TYPE plot_confusion_matrix plot_curve plot_single_or_multi_val"
    ),
    ("transformers.data.metrics", "scipy.stats"): "pearsonr spearmanr",
    ("transformers.data.metrics", "sklearn.metrics"): "f1_score matthews_corrcoef",
    ("transformers.generation.candidate_generator", "sklearn.metrics"): "roc_curve",
    ("transformers.loss", "scipy.optimize"): "linear_sum_assignment",
}
"""Statements to defer: (importing module or package, imported module), and the names; none for `import module`."""


class Later:
    """A stand-in for a module, function or type that is imported on first use."""

    def __init__(self, module: str, name: str | None = None):
        self._statement = module, name

    def __repr__(self) -> str:
        return f"<{'.'.join(filter(None, self._statement))}, imported when it is used>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__typing_") or name == "__parameters__":  # an annotation doesn't count as use
            raise AttributeError(name)
        return getattr(fetch(*self._statement), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return fetch(*self._statement)(*args, **kwargs)


def fetch(module: str, name: str | None = None) -> Any:
    """Import what `import module`, or `from module import name`, binds, with the same errors."""
    found = builtins.__import__(module, fromlist=(name,) if name else ())
    if name and not hasattr(found, name):
        raise ImportError(f"cannot import name {name!r} from {module!r} ({found.__file__})", name=module)
    return getattr(found, name) if name else found


def can_wait(importer: str, module: str, names: set[str]) -> bool:
    """Whether a statement is in `LATER`, for a module that is installed and not yet imported."""
    listed = [known for (who, what), known in LATER.items() if what == module and f"{importer}.".startswith(f"{who}.")]
    return (
        any(names <= {*known.split()} and bool(names) == bool(known) for known in listed)
        and module not in sys.modules
        and importlib.util.find_spec(module.partition(".")[0]) is not None
        and (module != "scipy.signal" or importlib.util.find_spec("srmrpy") is None)
    )


def stand_in(module: str, names: set[str]) -> Any:
    """What a deferred statement binds.

    torchmetrics 1.7 imports scipy.signal only to restore a function that SciPy removed and SRMRpy (for speech) needs.
    It gets a stand-in that has the function; if SRMRpy is installed, the real module is imported at once.
    """
    if module == "scipy.signal":
        return SimpleNamespace(signal=SimpleNamespace(hamming=Later("scipy.signal.windows", "hamming")))
    return SimpleNamespace(**{name: Later(module, name) for name in names}) if names else Later(module)


def import_llm_foundry() -> None:
    """Import llm-foundry; call this before it, composer, streaming or transformers is imported."""
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
