"""The probe collector: every sample once, whatever the epochs."""

import torch

from splitwatch.collect import ProbeCollector


def epochs(data, size, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        yield from data[torch.randperm(len(data), generator=generator)].split(size)


def test_no_sample_is_collected_twice_over_several_epochs():
    data = torch.randn(100, 5)
    collector = ProbeCollector(4096)
    for rows in epochs(data, 16, 3):
        collector.add((rows, rows[:, 0]))
    collected = torch.cat([batch[0] for batch in collector.batches])
    assert len(collected) == 100
    assert len(collected.unique(dim=0)) == 100
    assert collector.ready


def test_the_target_bounds_the_probe_and_later_batches_cost_nothing():
    collector = ProbeCollector(64)
    for rows in epochs(torch.randn(1000, 3), 16, 1):
        collector.add(rows)
    assert collector.samples == 64
    assert collector.ready


def test_a_probe_is_not_ready_while_new_samples_keep_coming():
    collector = ProbeCollector(4096)
    for rows in torch.randn(100, 3).split(10):
        collector.add(rows)
        assert not collector.ready


def test_the_batches_are_copies():
    batch = torch.randn(8, 3)
    collector = ProbeCollector(100)
    collector.add(batch)
    before = collector.batches[0].clone()
    batch.zero_()
    assert torch.equal(collector.batches[0], before)


def test_integer_samples_and_dictionaries_are_told_apart():
    collector = ProbeCollector(100)
    tokens = torch.randint(0, 256, (20, 33))
    collector.add({"ids": tokens, "name": "text"})
    collector.add({"ids": tokens.flip(0), "name": "text"})
    assert collector.samples == 20
    assert len(collector.batches) == 1


def test_a_few_repeated_samples_do_not_end_the_collecting():
    data, generator = torch.randn(1000, 3), torch.Generator().manual_seed(0)
    collector = ProbeCollector(512)
    while not collector.ready:
        collector.add(data[torch.randint(1000, (1,), generator=generator)])
    assert collector.samples == 512


def test_nothing_is_looked_at_once_the_data_are_known(monkeypatch):
    data = torch.randn(100, 3)
    collector = ProbeCollector(4096)
    for rows in epochs(data, 50, 2):
        collector.add(rows)
    monkeypatch.setattr("splitwatch.collect._fingerprints", None)
    collector.add(data)
    assert collector.samples == 100


def test_what_several_ranks_collect_stays_with_the_first_of_them(monkeypatch):
    data = torch.randn(60, 3)
    ranks = [ProbeCollector(4096), ProbeCollector(4096)]
    for own, order in zip(ranks, ((0, 1, 2), (1, 0, 2)), strict=True):
        for i in order:
            own.add(data[20 * i : 20 * i + 20])
    prints = [[n for i, batch in enumerate(own._prints) for value in batch for n in (i, value)] for own in ranks]
    monkeypatch.setattr("splitwatch.collect.gathered", lambda own: prints)
    monkeypatch.setattr("splitwatch.collect.rank_count", lambda: 2)
    found = []
    for number, own in enumerate(ranks):
        monkeypatch.setattr("splitwatch.collect.rank", lambda number=number: number)
        monkeypatch.setattr("splitwatch.collect.everywhere", lambda flag: True)
        found.append(own.probe(mean).half("all"))
    assert [torch.equal(batch, data[:20]) for batch in found[0]] == [True, False]
    assert len(torch.cat([*found[0], *found[1]]).unique(dim=0)) == 60
    monkeypatch.setattr("splitwatch.collect.everywhere", lambda flag: False)  # one rank would be left without
    assert len(ranks[1].probe(mean).half("all")) == 3


def mean(model, batch):
    return model(batch).mean()


def test_a_single_batch_that_comes_again_and_again_is_a_probe():
    batch = torch.randn(64, 3)
    collector = ProbeCollector(4096)
    collector.add(batch)
    assert not collector.ready
    collector.add(batch)
    assert collector.ready
    assert [len(half) for half in collector.probe(mean).half("all")] == [32, 32]


def test_a_few_new_samples_are_no_batch():
    data = torch.randn(100, 3)
    collector = ProbeCollector(4096)
    for rows in (data[:40], data[20:60], data[50:80], data[50:90]):
        collector.add(rows)
    assert [len(batch) for batch in collector.batches] == [40, 20, 20]


def test_samples_with_nan_in_them_and_complex_ones_are_known_again():
    nans, numbers = torch.randn(64, 3), torch.randn(64, 3)
    nans[:, 0] = torch.nan
    collector = ProbeCollector(4096)
    for _ in range(2):
        collector.add((nans, torch.complex(torch.zeros(64, 3), numbers)))
    assert collector.ready
    assert collector.samples == 64
