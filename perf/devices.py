"""GPUs and networks by their vendors' numbers, for what can be said without having them."""

from __future__ import annotations

from dataclasses import dataclass

from tribn.launch import Device


@dataclass(frozen=True)
class Gpu:
    """A device, and its multiprocessors, which are from the CUDA programming guide's tables."""

    name: str
    bandwidth: float  # of DRAM, bytes a second; what kernels reach is less
    l2: int  # bytes
    sms: int
    shared: int  # bytes of shared memory of a multiprocessor
    source: str
    threads: int = 2048  # of a multiprocessor
    registers: int = 2**18  # bytes, of a multiprocessor

    @property
    def facts(self) -> Device:
        return Device(
            sms=self.sms,
            l2=self.l2,
            registers=self.registers,
            shared=self.shared,
            threads=self.threads,
        )


GPUS = {
    "H100": Gpu(
        "NVIDIA H100 SXM5 80 GB",
        bandwidth=3.35e12,
        l2=50 * 2**20,
        sms=132,
        shared=228 * 1024,
        source="NVIDIA H100 Tensor Core GPU datasheet; architecture white paper",
    ),
    "H200": Gpu(
        "NVIDIA H200 SXM 141 GB",
        bandwidth=4.8e12,
        l2=50 * 2**20,
        sms=132,
        shared=228 * 1024,
        source="NVIDIA H200 Tensor Core GPU datasheet; H100 architecture white paper",
    ),
    "A100": Gpu(
        "NVIDIA A100 SXM4 80 GB",
        bandwidth=2.039e12,
        l2=40 * 2**20,
        sms=108,
        shared=164 * 1024,
        source="NVIDIA A100 Tensor Core GPU datasheet; architecture white paper",
    ),
    "L4": Gpu(
        "NVIDIA L4 24 GB",
        bandwidth=300e9,
        l2=48 * 2**20,
        sms=58,
        shared=100 * 1024,
        source="NVIDIA L4 Tensor Core GPU datasheet; CUDA device properties",
        threads=1536,
    ),
}


@dataclass(frozen=True)
class Network:
    """GPUs in nodes, and a ring of all of them, in seconds and bytes a second."""

    name: str
    gpus: int  # of a node
    start: float  # of a collective
    within: float  # a step from one GPU to the next in a node
    between: float  # a step to another node
    bandwidth: float  # of a ring in one node
    bandwidth_between: float  # of a ring over nodes
    source: str

    def all_gather(self, ranks: int, size: int) -> float:
        """Seconds until every rank has `size` bytes of each."""
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // self.gpus)
        steps = (ranks - nodes) * self.within + (nodes - 1) * self.between
        bandwidth = self.bandwidth if nodes == 1 else self.bandwidth_between
        return self.start + steps + (ranks - 1) * size / bandwidth


NETWORKS = {
    "H100": Network(
        "nodes of 8 NVIDIA H100, NVLink in and InfiniBand between them",
        gpus=8,
        start=6.6e-6,
        within=0.6e-6,
        between=2.7e-6,
        bandwidth=141e9,
        bandwidth_between=45e9,
        source="what NCCL reckons with for rings by its LL protocol on Hopper: baseLat, hwLat and "
        "llMaxBws in src/graph/tuning.cc of NCCL 2.27",
    ),
}
