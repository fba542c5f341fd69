"""What `upstream/large_index.py` relies on in streaming, and that it changes nothing but time and memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import StreamingDataset
from streaming.base.format.mds import reader
from streaming.base.spanner import Spanner

from examples.mosaic_streaming.upstream.large_index import SmallSpanner, large_indexes
from examples.mosaic_streaming.upstream.patch import replaced
from tests.support.ranks import run_rank_values
from tests.support.streams import write_stream


def test_spanner_tells_what_streamings_does() -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, 50)
    ours, theirs = SmallSpanner(sizes.copy()), Spanner(sizes.copy())
    assert vars(ours).keys() - {"_bounds"} <= vars(theirs).keys(), "streaming's spanner has other attributes"
    assert ours.num_samples == theirs.num_samples and (ours.shard_bounds == theirs.shard_bounds).all()
    for sample in [*range(0, int(sizes.sum()), 7), int(sizes.sum()) - 1]:
        assert ours[sample] == theirs[sample]
    for sample in (-1, int(sizes.sum())):
        with pytest.raises(IndexError) as wanted:
            theirs[sample]
        with pytest.raises(IndexError) as found:
            ours[sample]
        assert str(found.value) == str(wanted.value)


def test_datasets_are_the_same_and_share_what_shards_have_in_common(tmp_path: Path) -> None:
    write_stream(tmp_path, 40)

    def open_both() -> Any:
        copied: list[Any] = []
        original = reader.deepcopy

        def noted(entry: Any, *_: Any) -> Any:
            copied.append(entry)
            return original(entry)

        with replaced(reader, "deepcopy", noted):
            theirs = StreamingDataset(local=str(tmp_path), batch_size=1)
        with large_indexes():
            ours = StreamingDataset(local=str(tmp_path), batch_size=1)
        assert len(copied) == len(theirs.shards) > 1, "streaming no longer copies entries of an index with `deepcopy`"
        assert isinstance(ours.spanner, SmallSpanner), "streaming no longer looks `Spanner` up in base/dataset.py"
        assert not isinstance(theirs.spanner, SmallSpanner)
        first, second, *_ = ours.shards
        assert vars(first)["column_names"] is vars(second)["column_names"]
        known = [json.dumps([vars(shard) for shard in dataset.shards], default=vars) for dataset in (ours, theirs)]
        return known, [sample["tokens"].tolist() for sample in ours] == [sample["tokens"].tolist() for sample in theirs]

    [((ours, theirs), reads_the_same)] = run_rank_values(open_both)
    assert ours == theirs
    assert reads_the_same
