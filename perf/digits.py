"""Trains the digits network on all processes that torchrun starts, and on one with their batches.

    torchrun --standalone --nproc-per-node 2 -m perf.digits

Both curves are printed, and are the same: with `SyncBatchNorm` the parts of a batch that processes
have are normalized as one. DistributedDataParallel averages over processes, so that the parts have
to be of one size: 1, 2, 4, ... processes. With a GPU for each they run there.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tribn
from perf.demo import BATCH, CLASSES, DEEP, PIXELS, WIDTH, Digits, load

EPOCHS, RATE = 6, 0.3


def network() -> nn.Sequential:
    """`perf.demo`'s deep network, in float64: a rounding of float32 grows from step to step."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([PIXELS] + [WIDTH] * DEEP.depth):
        layers += [nn.Linear(inputs, outputs), tribn.BatchNorm1d(outputs, activation="sigmoid")]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=DEEP.gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    return model


def train(model: nn.Module, data: Digits, rank: int, size: int) -> Tensor:
    """The loss of each epoch on every size-th image of each batch, beginning with the rank-th."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    shuffle = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(EPOCHS):
        steps = []
        for batch in torch.randperm(len(data.y), generator=shuffle).split(BATCH)[:-1]:
            mine = batch[rank::size].to(data.x.device)
            loss = nn.functional.cross_entropy(model(data.x[mine].double() / 16), data.y[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.detach())
        losses.append(torch.stack(steps).mean())
    return torch.stack(losses)


def main() -> None:
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit(
            "torchrun starts this: torchrun --standalone --nproc-per-node 2 -m perf.digits"
        )
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = f"cuda:{local}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, size, data = dist.get_rank(), dist.get_world_size(), load(device)

    model = tribn.convert_sync_batchnorm(network().to(device))
    losses = train(DistributedDataParallel(model), data, rank, size)
    dist.all_reduce(losses)
    losses /= size
    dist.destroy_process_group()

    if rank == 0:
        alone = train(network().to(device), data, 0, 1)
        print(f"epoch  loss of {size} processes  loss of one")
        for epoch, (a, b) in enumerate(zip(losses.tolist(), alone.tolist(), strict=True), start=1):
            print(f"{epoch:5}  {a:19.12f}  {b:11.12f}")
        print(f"largest difference {(losses - alone).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
