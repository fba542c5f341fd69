"""Checks from the indexes that a loader can read the columns of its streams, and read them together."""

from collections.abc import Iterable, Mapping, Sequence

from streaming import StreamingDataset
from streaming.base.format import Reader

from examples.mosaic_streaming.errors import ConfigError

TEXT, IDS, LISTS = ("str", "json", "pkl"), ("ndarray", "bytes", "pkl"), ("json", "pkl")
"""The encodings that a loader accepts for a kind of column."""

FORMS: dict[str, list[dict[str, tuple[str, ...]]]] = {
    "text": [{"text": TEXT}, {"tokens": IDS}],
    "finetuning": [
        {"turns": LISTS},
        {"input_ids": IDS, "labels": IDS},
        {"messages": LISTS},
        {"prompt": TEXT, "response": TEXT},
        {"prompt": TEXT, "completion": TEXT},
    ],
}
"""The columns that each loader reads, with their encodings; of several that fit a sample, it reads the first form.

Source: llm-foundry 0.22.0, data/text_data.py and data/finetuning/tasks.py.
"""

ALONE = {"messages", "prompt"}  # columns of forms beside which llm-foundry accepts no other columns


def columns_of(shard: Reader) -> dict[str, str]:
    """Map the names of a shard's columns to their encodings; JSON and CSV columns are text."""
    if isinstance(columns := getattr(shard, "columns", None), dict):
        return columns
    return dict(zip(shard.column_names, shard.column_encodings, strict=True))  # type: ignore[attr-defined]


def form_of(columns: Mapping[str, str], loader: str) -> tuple[str, ...]:
    """The columns that a loader reads, out of a sample's columns and encodings; empty if none fit."""
    for form in FORMS[loader]:
        if set(form) <= set(columns) and not (set(form) & ALONE and len(columns) > len(form)):
            return tuple(form)
    return ()


def check_columns(dataset: StreamingDataset, loader: str, labels: Sequence[str], path: str) -> None:
    """Raise ConfigError unless a loader can read all shards of all streams, and mix them in a batch."""
    if loader not in FORMS:
        return
    found: dict[tuple[str, ...], list[str]] = {}
    for number, label in enumerate(labels):
        begin = int(dataset.shard_offset_per_stream[number])
        shards = dataset.shards[begin : begin + int(dataset.shards_per_stream[number])]
        kinds = {tuple(columns_of(shard).items()): shard for shard in reversed(shards)}
        for columns, shard in reversed(kinds.items()):
            where = f"{label}, {shard.file_pairs[0][0].basename}," if len(kinds) > 1 else label
            form = check_form(dict(columns), loader, where, path)
            found.setdefault(form, []).append(f"{where} has {listed(dict(columns), form)}")
    if loader == "text" and len(found) > 1:  # the finetuning loader converts each form to turns
        raise ConfigError(
            f"{'; '.join(one for some in found.values() for one in some)}: a batch of the text loader has samples of "
            f"one form. Write all with the same column, or leave some out in {path}."
        )


def check_form(columns: Mapping[str, str], loader: str, where: str, path: str) -> tuple[str, ...]:
    """The columns that a loader reads of a shard or stream (`where`); ConfigError if it can't read any."""
    form = form_of(columns, loader)
    if not form:
        others = [name for name in FORMS if form_of(columns, name)]
        hint = f'set name = "{others[0]}" in {path}' if others else f"write it with these, or leave it out in {path}"
        forms = [f"`{'` and `'.join(one)}`" + " alone" * bool(ALONE & one.keys()) for one in FORMS[loader]]
        read = f"the {loader} loader reads {' or '.join(forms)}"
        raise ConfigError(f"{where} has {listed(columns, columns)}, but {read}: {hint}.")
    encodings = {name: kinds for columns_read in FORMS[loader] for name, kinds in columns_read.items()}
    for name in form:
        kind, _, dtype = columns[name].partition(":")
        if kind not in encodings[name] or dtype.startswith("float"):
            expected = f"{' or '.join(encodings[name][:2])}{' of whole numbers' * (encodings[name] == IDS)}"
            read = f"the {loader} loader reads that column as {expected}"
            raise ConfigError(f"{where} has {listed(columns, [name])}, but {read}. Write it so.")
    return form


def listed(columns: Mapping[str, str], names: Iterable[str]) -> str:
    """List columns with their encodings, for a message."""
    return ", ".join(f"`{name}` ({columns[name]})" for name in names)
