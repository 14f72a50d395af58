"""Distributed tensors with a shard of the batch in each process: values and gradients are those of whole tensors."""

import socket

import pytest
import torch.multiprocessing as mp
from sharding_cases import KINDS, process


@pytest.mark.parametrize(("world", "kinds"), [(1, ["dense"]), (2, list(KINDS))], ids=["1", "2"])
def test_shards_of_the_batch(world, kinds):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    failures = mp.get_context("spawn").SimpleQueue()
    mp.spawn(process, (world, port, kinds, failures), nprocs=world)
    lines = []
    while not failures.empty():
        lines.append(failures.get())
    assert not lines, "\n".join(lines)
