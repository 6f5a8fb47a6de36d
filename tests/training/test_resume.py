"""A run that is saved amid an epoch goes on, in new processes, as if nothing had happened."""

import itertools

import pytest

pytestmark = pytest.mark.multiprocess

LENGTH, BATCH, SAVED_AT = 26, 3, 2
WORLDS = (1, 2)
CASES = [
    (world, f"{kind}-{workers}-{way}")
    for world, kind, workers, way in itertools.product(
        WORLDS, ("map", "iterable", "stateful"), (0, 1, 4), ("shard", "dispatch")
    )
    if world > 1 or way == "shard"
]
ORDERS = ("sequential", "shuffled", "generator", "seedable")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def uninterrupted(run_worker, launch, checkpoints):
    return {n: run_worker(launch(n), "resume.py", "save", str(checkpoints)) for n in WORLDS}


@pytest.fixture(scope="module")
def resumed(run_worker, launch, checkpoints, uninterrupted):
    return {n: run_worker(launch(n), "resume.py", "load", str(checkpoints)) for n in WORLDS}


@pytest.mark.parametrize(("world", "case"), CASES)
def test_samples_and_weights_are_those_of_the_uninterrupted_run(uninterrupted, resumed, world, case):
    for expected, found in zip(uninterrupted[world], resumed[world], strict=True):
        assert found[case]["seen"] == expected[case]["seen"]
        assert found[case]["weights"] == expected[case]["weights"]
        assert found[case]["seen"][0]


@pytest.mark.parametrize(("world", "case"), [c for c in CASES if c[1].startswith("map")])
def test_a_set_with_indices_is_read_only_behind_the_checkpoint(resumed, world, case):
    ranks = [rank[case] for rank in resumed[world]]
    given = [sum(map(len, rank["seen"][0])) for rank in ranks]
    dispatched = case.endswith("dispatch")
    assert [rank["read"] for rank in ranks] == ([sum(given), 0] if dispatched else given)


@pytest.mark.parametrize(("world", "case"), [c for c in CASES if c[1].startswith("stateful")])
def test_a_set_with_a_state_is_read_only_behind_the_checkpoint(resumed, world, case):
    workers = max(1, int(case.split("-")[1]))
    behind = LENGTH - SAVED_AT * BATCH * world
    to_fill_up = 0 if world == 1 else min(workers, SAVED_AT * world) * BATCH * world
    readers = resumed[world][:1] if case.endswith("dispatch") else resumed[world]
    for rank in readers:
        assert behind <= rank[case]["read"] <= behind + to_fill_up
    assert sum(rank[case]["read"] for rank in resumed[world][len(readers) :]) == 0


@pytest.fixture(scope="module")
def elsewhere(run_worker, launch, checkpoints, uninterrupted):
    return {
        (then, now): run_worker(launch(now), "resume.py", "elsewhere", str(checkpoints), str(then))
        for then, now in ((2, 1), (2, 3), (1, 2))
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("worlds", [(2, 1), (2, 3), (1, 2)], ids=str)
def test_another_number_of_processes_goes_on_with_the_same_samples(uninterrupted, elsewhere, worlds, order):
    def real_samples(ranks):
        turns = zip(*(rank[order]["seen"][0] for rank in ranks), strict=True)
        samples = [sample for turn in turns for batch in turn for sample in batch]
        return samples[: LENGTH - SAVED_AT * BATCH * 2]  # what follows fills up the last round

    expected, found = real_samples(uninterrupted[worlds[0]]), real_samples(elsewhere[worlds])
    assert len(set(expected)) == LENGTH - SAVED_AT * BATCH * 2
    assert found == expected
