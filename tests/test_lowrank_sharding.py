"""Distributed tensors with a shard of the batch in each process: values and gradients are those of whole tensors."""

import socket
import subprocess
import sys

import pytest
import torch.multiprocessing as mp
from sharding_cases import KINDS, process


@pytest.mark.parametrize(("world", "kinds"), [(1, ["dense", "linear"]), (2, list(KINDS))], ids=["1", "2"])
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


def test_nobody_imports_distributed_tensors_but_those_who_use_them():
    code = "import sys, lowrank_mvn; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
