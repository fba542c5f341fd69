"""What `make soak` does many times: here, once each, what no other test does."""

import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.__main__ import KILLS, MOMENTS, STOPS, Case, Undisturbed, prepare, run, train_undisturbed
from tests.support.ranks import can_make_nodes
from tests.support.store import Store, running_store

Place = tuple[Store, Undisturbed]


@pytest.fixture(scope="module")
def place(module_path: Path) -> Iterator[Place]:
    """A store with streams, and what is read from them undisturbed."""
    with running_store() as store:
        yield store, prepare(module_path, [store])


@pytest.fixture(scope="module")
def trained(place: Place, module_path: Path) -> Place:
    """The same, and how undisturbed training goes."""
    train_undisturbed(module_path, place[1])
    return place


def goes_well(case: Case, place: Place) -> None:
    store, undisturbed = place
    with tempfile.TemporaryDirectory() as folder:  # pytest's are too long for a worker's sockets
        [done] = run([case], [store], undisturbed, Path(folder), math.inf)
    assert not done.outcome.problem


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        pytest.param(kind, moment, id=f"{kind}-{MOMENTS[moment]}")
        for kind, moment in itertools.product(KILLS, range(len(MOMENTS)))
    ],
)
def test_killed_training_goes_on_exactly(trained: Place, kind: str, moment: int) -> None:
    """On streams with a remote in one of two, by the case's seed."""
    goes_well(Case(kind, moment, seed=1), trained)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "number"), [(kind, 4 * number) for number, kind in enumerate(STOPS)])
def test_training_that_is_told_to_stop_goes_on_exactly(trained: Place, kind: str, number: int) -> None:
    """On one rank, and on two."""
    goes_well(Case(kind, number, seed=1), trained)


@pytest.mark.long
@pytest.mark.skipif(not can_make_nodes(), reason="no rights to mount a disk")
@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("disk full", 5),
        pytest.param("disk full", 1, marks=pytest.mark.long),
        *(pytest.param("cache not writable", number, marks=pytest.mark.long) for number in (1, 5)),
    ],
)
def test_cache_that_cannot_be_written_stops_the_job(place: Place, kind: str, number: int) -> None:
    goes_well(Case(kind, number, seed=1), place)


def test_cache_below_a_file_stops_the_job(place: Place) -> None:
    goes_well(Case("cache not writable", 0, seed=1), place)
