import pytest

from mindspeed_lora.data.sampling import SampleOrder, seeded_permutation


def test_file_order_wraps() -> None:
    order = SampleOrder(3, shuffle=False)
    assert [order.order(i) for i in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    order = SampleOrder(50, seed=7)
    epochs = [[order.order(i) for i in range(50 * e, 50 * (e + 1))] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_any_sample_can_be_asked_for() -> None:
    forward = SampleOrder(10, seed=3)
    expected = [forward.order(i) for i in range(100)]
    for start in (0, 37, 95):
        again = SampleOrder(10, seed=3)
        assert [again.order(i) for i in range(start, 100)] == expected[start:]


def test_the_seed_counts() -> None:
    seeds = [0, 1, 2**32, -1, 2**40 + 5]
    assert len({tuple(seeded_permutation(30, seed).tolist()) for seed in seeds}) == len(seeds)


def test_the_order_of_earlier_releases_stays() -> None:
    # Resuming a run depends on these numbers.
    assert seeded_permutation(8, 1234).tolist() == [0, 2, 5, 3, 4, 7, 6, 1]
    assert seeded_permutation(8, 1234, epoch=1).tolist() == [6, 0, 5, 4, 3, 7, 1, 2]


def test_no_documents() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SampleOrder(0)


def test_epochs_of_whole_batches() -> None:
    order = SampleOrder(5, shuffle=False, multiple=4)
    assert [order.order(i) for i in range(17)] == [0, 1, 2, 3, 4, 0, 1, 2] * 2 + [0]
    shuffled = SampleOrder(5, seed=3, multiple=4)
    first, second = ([shuffled.order(i) for i in range(8 * e, 8 * e + 8)] for e in range(2))
    plain = SampleOrder(5, seed=3)
    assert first == [plain.order(i) for i in (0, 1, 2, 3, 4, 0, 1, 2)]
    assert sorted(second[:5]) == [0, 1, 2, 3, 4] and second[5:] == second[:3]
    assert [SampleOrder(2, shuffle=False, multiple=5).order(i) for i in range(6)] == [0, 1, 0, 1, 0, 0]


def test_whole_batches_already() -> None:
    assert SampleOrder(8, multiple=4).epoch_samples == 8
