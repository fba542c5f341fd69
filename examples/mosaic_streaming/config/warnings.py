"""Settings that are allowed, but that a start warns of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from examples.mosaic_streaming.config.folders import is_url
from examples.mosaic_streaming.config.job import Job
from examples.mosaic_streaming.config.loader import ResolvedLoader
from examples.mosaic_streaming.config.streams import has_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def warnings_of(loader: ResolvedLoader, job: Job, tokenizer: "Tokenizer", columns: Sequence[str]) -> list[str]:
    """Return what a start warns of in the training loader's configuration; `columns` are the first stream's."""
    found = [*warnings_of_documents(loader, job), *warnings_of_chats(loader, tokenizer, columns)]
    if algo := loader.dataset.get("partition_algo"):
        found.append(
            f"dataset.partition_algo = {algo!r} in {loader.source} has no effect: streaming's algorithms don't keep "
            "global batches the same on any number of ranks. Remove the key."
        )
    if job.layout.world_size > 1:
        found += warnings_of_timeouts(loader, job.collective_timeout)
    return found


def warnings_of_documents(loader: ResolvedLoader, job: Job) -> list[str]:
    """Warn if rows hold several documents, but attention is not kept within them."""
    dataset, rows = loader.dataset, job.training.local_batch_size
    packed = int(rows * (dataset.get("packing_ratio") or 1)) > rows
    marked = dataset.get("eos_token_id") is not None or dataset.get("bos_token_id") is not None
    if job.documents or not (packed or marked):
        return []
    documents = "packed examples" if packed else "documents (dataset.eos_token_id or bos_token_id)"
    flavors = ", ".join(job.document_flavors)
    hint = f"These flavors do, on a GPU: {flavors}." if flavors else "No flavor of this model does."
    return [
        f"Rows are made of {documents}, and model.flavor = {job.flavor!r} of {job.model} does not keep attention "
        f"within them: each token also sees those before it in its row. {hint}"
    ]


def warnings_of_chats(loader: ResolvedLoader, tokenizer: "Tokenizer", columns: Sequence[str]) -> list[str]:
    """Warn if a chat template is missing, or writes other tokens from day to day."""
    if loader.name != "finetuning" or {"turns", "input_ids"} & set(columns):
        return []
    found = []
    if "date_string" in str(tokenizer.chat_template):
        found.append(
            f"The chat template in model.hf_assets_path = {tokenizer.name_or_path!r} writes a date, and llm-foundry "
            "gives it today's: a run that goes on tomorrow reads other tokens. Remove `date_string` from the template."
        )
    if "messages" in columns and tokenizer.chat_template is None:
        found.append(
            f"The tokenizer in model.hf_assets_path = {tokenizer.name_or_path!r} has no chat template: llm-foundry "
            "writes chats in a form of its own (ChatML, with <|im_start|>). Set `chat_template` in "
            "tokenizer_config.json, or put a chat_template.jinja beside it."
        )
    return found


def warnings_of_timeouts(loader: ResolvedLoader, timeout: float) -> list[str]:
    """Warn if a rank may wait for a shard for longer than others wait for it (`comm.train_timeout_seconds`)."""
    found = []
    for name, stream in loader.streams.items():
        retry, patience = stream["download_retry"], stream["download_timeout"]
        if has_cache(stream) and is_url(stream["remote"]) and retry * patience >= timeout:
            found.append(
                f"{name} in {loader.source} gives a store that stalls {retry} (download_retry) x {patience:g} s "
                f"(download_timeout), but ranks wait for each other only {timeout:g} s (comm.train_timeout_seconds in "
                "the job config): they would stop before that one can say why. Lower the first two, or raise the last."
            )
    return found


def warnings_of_validation(validation: ResolvedLoader, training: Sequence[ResolvedLoader]) -> list[str]:
    """Warn if the validation streams are also trained on; `training` has the loader of each stage."""
    trained = {folder.source for stage in training for folder in stage.folders}
    same = trained & {folder.source for folder in validation.folders}
    return [f"Training reads the same as validation: {', '.join(sorted(same))}. The loss will tell less."] * bool(same)
