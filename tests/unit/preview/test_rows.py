"""Rows as `show` has them: kinds of tokens and documents, against samples whose every token is known."""

from pathlib import Path
from typing import Any

from streaming import MDSWriter
from transformers import AutoTokenizer

from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.rows import CONTEXT, PADDING, TARGET, rows_of
from tests.support.looking import preview, with_job_data
from tests.support.reading import TURN, write_turns
from tests.support.streams import SEQ_LEN, TOKENIZER, job, loader_config, sample_tokens, write_stream, write_tokens

EOS = 1


def look(config: dict[str, Any], *samples: int, seq_len: int = SEQ_LEN) -> list[dict[str, Any]]:
    """The rows that samples make."""
    rows: list[dict[str, Any]] = with_job_data(config, lambda opened: rows_of(opened, samples), job(seq_len=seq_len))
    return rows


def spans(row: dict[str, Any]) -> list[list[tuple[str, int, list[int]]]]:
    """Kind, place and ids of the spans of each document."""
    return [[(span["kind"], span["begin"], span["ids"]) for span in part["spans"]] for part in row["documents"]]


def samples_of(row: dict[str, Any]) -> list[int]:
    """The ids of its samples."""
    return [sample["sample"] for sample in row["samples"]]


def lengths(row: dict[str, Any]) -> list[int]:
    """Tokens of its documents, which are those of their spans."""
    found = [document["tokens"] for document in row["documents"]]
    assert found == [sum(len(ids) for _, _, ids in document) for document in spans(row)]
    return found


def test_text_is_learned_but_for_its_first_token_and_ends_documents_with_eos(tmp_path: Path) -> None:
    tokens = [*range(20, 25), EOS, *range(30, 41)]
    [row] = look(loader_config(write_tokens(tmp_path, [tokens, tokens])), 0)
    assert spans(row) == [[(CONTEXT, 0, [20]), (TARGET, 1, tokens[1:6])], [(TARGET, 6, tokens[6:])]]
    assert (samples_of(row), row[PADDING], lengths(row)) == ([0], 0, [6, 11])
    decode = AutoTokenizer.from_pretrained(TOKENIZER).decode
    assert [span["text"] for document in row["documents"] for span in document["spans"]] == [
        decode(part) for part in ([20], tokens[1:6], tokens[6:])
    ]


def test_documents_are_those_that_begin_with_bos_where_the_loader_says_so(tmp_path: Path) -> None:
    tokens = [*range(20, 25), EOS, *range(30, 41)]
    config = loader_config(
        write_tokens(tmp_path, [tokens, tokens]), bos_token_id=33, override_bos_token_id_mismatch_error=True
    )
    [row] = look(config, 0)
    assert lengths(row) == [9, 8], "tokens before the first BOS are a document, too"


def test_padding_is_padding_and_the_rest_is_learned(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path), columns={"text": "str"}) as writer:
        for _ in range(2):
            writer.write({"text": "import os\n"})
    ids = AutoTokenizer.from_pretrained(TOKENIZER).encode("import os\n")
    [row] = look(loader_config(tmp_path), 0)
    assert spans(row) == [[(CONTEXT, 0, ids[:1]), (TARGET, 1, ids[1:])]]
    assert row[PADDING] == SEQ_LEN + 1 - len(ids) > 0
    assert (row[CONTEXT], row[TARGET]) == (1, len(ids) - 1)


def test_row_of_seq_len_tokens_has_one_target_less(tmp_path: Path) -> None:
    [row] = look(loader_config(write_stream(tmp_path, 2, length=SEQ_LEN), max_seq_len=SEQ_LEN), 0)
    assert (row[CONTEXT], row[TARGET]) == (1, SEQ_LEN - 1)


def finetuning(folder: Path, samples: int, **dataset: Any) -> dict[str, Any]:
    """A loader of prompts of 4 tokens with their responses."""
    settings = {"remote": str(write_turns(folder / "turns", samples)), "local": str(folder / "cache"), **dataset}
    settings["num_canonical_nodes"] = 1
    return {"name": "finetuning", "num_workers": 0, "dataset": settings}


def test_prompt_is_context_and_response_is_learned(tmp_path: Path) -> None:
    [row] = look(finetuning(tmp_path, 3), 2)
    [[(first, _, prompt), (second, _, response)]] = spans(row)
    assert (first, second, samples_of(row)) == (CONTEXT, TARGET, [2])
    assert prompt == sample_tokens(2)[:4].tolist()
    assert response == sample_tokens(2)[4:].tolist(), "an EOS has no room"


def test_packed_row_names_the_samples_of_its_documents(tmp_path: Path) -> None:
    config = finetuning(tmp_path, 12, packing_ratio=2)
    rows = look(config, 3, 5, 7, 9, seq_len=64)
    assert sorted(sample for row in rows for sample in samples_of(row)) == [3, 5, 7, 9]
    assert max(len(samples_of(row)) for row in rows) > 1
    for row in rows:
        assert len(row["documents"]) == len(samples_of(row))
        for sample, ((first, _, prompt), (second, _, response)) in zip(samples_of(row), spans(row), strict=True):
            assert (first, prompt) == (CONTEXT, sample_tokens(sample)[:4].tolist())
            assert (second, response) == (TARGET, [*sample_tokens(sample)[4:].tolist(), EOS])
        assert sum(lengths(row)) + row[PADDING] == row["tokens"] == 65


def test_equal_samples_of_a_packed_batch_are_named_each_once(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "twins"), columns=dict.fromkeys(TURN, "ndarray:int32")) as writer:
        for sample in range(12):
            tokens = sample_tokens(sample // 2)
            writer.write({"input_ids": tokens[:4], "labels": tokens[4:]})
    settings = {"remote": str(tmp_path / "twins"), "local": str(tmp_path / "cache"), "packing_ratio": 2}
    config = {"name": "finetuning", "num_workers": 0, "dataset": settings | {"num_canonical_nodes": 1}}
    rows = look(config, 0, 1, 4, 5, seq_len=64)
    assert sorted(sample for row in rows for sample in samples_of(row)) == [0, 1, 4, 5]


def test_sample_is_its_tokens_without_padding(tmp_path: Path) -> None:
    def tokens(opened: JobData) -> list[list[int]]:
        return [opened.tokens(sample) for sample in (0, 1)]

    found = with_job_data(finetuning(tmp_path, 2), tokens, job(seq_len=64))
    assert found == [[*sample_tokens(sample).tolist(), EOS] for sample in (0, 1)]


def test_show_has_so_many_rows_of_each_stream(files: Path) -> None:
    write_stream(files / "b", 3, first=100)
    (files / "loader.toml").write_text(
        'name = "text"\n[dataset]\nshuffle = true\n'
        f'[dataset.streams.a]\nlocal = "{files}/stream"\n[dataset.streams.b]\nlocal = "{files}/b"\n'
    )
    rows = preview(files, "show", "--rows=5")
    assert [row["samples"][0]["sample"] for row in rows] == [0, 1, 2, 3, 4, 100, 101, 102]
    assert rows[5]["samples"] == [
        {"sample": 100, "stream": "b", "sample_of_stream": 0, "shard": "shard.00000.mds", "sample_of_shard": 0}
    ]
    assert preview(files, "show", "--rows=5", "--stream=b") == rows[5:]
    plot = files / "lengths.png"
    preview(files, "show", "--rows=5", f"--plot={plot}")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_packed_rows_are_those_of_the_first_batches(files: Path) -> None:
    write_turns(files / "turns", 100)
    (files / "loader.toml").write_text(
        'name = "finetuning"\n[dataset]\npacking_ratio = "auto"\nshuffle = true\n'
        f'remote = "{files}/turns"\nlocal = "{files}/cache"\n'
    )
    titan = ("--training.seq_len=64",)
    rows = preview(files, "show", "--rows=3", titan=titan)
    assert len(rows) == 3
    steps = preview(files, "step", "1:2", titan=titan)
    first, second = (
        [sample["sample"] for sample in steps["samples"] if (sample["step"], sample["batch"]) == (step, 0)]
        for step in (1, 2)
    )
    assert len(first) > 2, "more than rows"
    shown = [[sample["sample"] for sample in row["samples"]] for row in rows]
    assert sorted(shown[0] + shown[1]) == sorted(first)
    assert set(shown[2]) <= set(second)
    plan = preview(files, "plan", titan=titan)["settings"]
    [ratio] = [setting["value"] for setting in plan if setting["setting"] == "dataset.packing_ratio"]
    assert int(2 * ratio) == len(first)
