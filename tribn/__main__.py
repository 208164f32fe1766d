"""`python -m tribn`: versions, what computes batch norm on this machine, and a self-check."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tribn
from tribn import launch, ops
from tribn.functional import batch_norm, batch_stats

DESCRIPTION = """\
Shows versions and devices, says why kernels do not run on a GPU if they do not, and checks what
every operator computes on each device against float64: how far off it is, how far it may be, and
whether it gives the same bits again. Takes seconds; the first time on a GPU, kernels are compiled.
"""
EXIT = "Exits with 0 if everything is right, 1 if something is not, 2 for bad arguments."

OLDEST_TRITON = (3, 6)
MOMENTUM, EPS = 0.3, 1e-5
ALLOWED = 8 * torch.finfo(torch.float32).eps  # of arithmetic in float32

# By operator, what it gives by name
Results = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A batch norm in training, of values with a mean far from zero."""

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    fused: bool = False  # with a residual and relu

    @property
    def differentiated(self) -> list[str]:
        return ["x", "weight", "bias"] + ["residual"] * self.fused

    @property
    def gradients(self) -> list[str]:
        return [f"gradient of {name}" for name in self.differentiated]

    def inputs(self) -> dict[str, Tensor]:
        """By name; parameters and running statistics in float32, as in training by AMP."""
        generator = torch.Generator().manual_seed(0)

        def normal(mean: float, std: float) -> Tensor:
            values = torch.randn(self.shape, generator=generator) * std + mean
            return values.to(self.dtype, memory_format=self.memory_format)

        channels = torch.rand(4, self.shape[1], generator=generator) + 0.5
        names = ("weight", "bias", "running_mean", "running_var")
        return {
            "x": normal(3, 2),
            "residual": normal(0, 1),
            "dy": normal(0, 1),
            **dict(zip(names, channels.unbind(), strict=True)),
        }


# As small as can be with programs that wait for each other on a GPU: the interpreter is slow.
CASES = (
    Case("float32", (19, 2, 30, 30)),
    Case(
        "float16, channels_last, relu(batch_norm(x) + residual)",
        shape=(8, 40, 12, 12),
        dtype=torch.float16,
        memory_format=torch.channels_last,
        fused=True,
    ),
)


def computed(case: Case, device: str) -> tuple[Results, dict[str, list[str]]]:
    """What the operators give on a device, and the kernels that each of them has launched."""
    t = {name: value.to(device) for name, value in case.inputs().items()}
    wanted = [t[name].requires_grad_() for name in case.differentiated]
    running = {name: t[name] for name in ("running_mean", "running_var")}
    count = torch.zeros((), dtype=torch.int64, device=device)
    kernels = {}

    def norm(training: bool) -> Tensor:
        return batch_norm(
            t["x"],
            t["running_mean"],
            t["running_var"],
            t["weight"],
            t["bias"],
            training,
            MOMENTUM,
            EPS,
            num_batches_tracked=count if training else None,
            activation="relu" if case.fused else None,
            residual=t["residual"] if case.fused else None,
        )

    def run(operator: str, function: Callable[..., Any], *args: Any) -> Any:
        recorded = launch.launches = []
        try:
            return function(*args)
        finally:
            launch.launches = None
            kernels[operator] = [
                kept.function.__name__.removesuffix("_kernel") for kept, *_ in recorded
            ]

    with torch.no_grad():
        evaluated = run("batch_norm_eval", norm, False)
    y = run("batch_norm_train", norm, True)
    gradients = run("batch_norm_backward", torch.autograd.grad, y, wanted, t["dy"])
    statistics = run("batch_stats", batch_stats, t["x"])
    results = {
        "batch_norm_train": {"y": y, **running, "num_batches_tracked": count},
        "batch_norm_backward": dict(zip(case.gradients, gradients, strict=True)),
        "batch_norm_eval": {"y": evaluated},
        "batch_stats": dict(zip(("mean", "var", "count"), statistics, strict=True)),
    }
    return {
        operator: {name: value.detach().cpu() for name, value in given.items()}
        for operator, given in results.items()
    }, kernels


def exact(case: Case, y: Tensor) -> Results:
    """The same in float64 by PyTorch's operators.

    relu lets the gradient pass where it does for y, the output that is judged: a value that
    rounding has carried across zero is no error.
    """
    t = {name: value.double() for name, value in case.inputs().items()}
    wanted = [t[name].requires_grad_() for name in case.differentiated]

    def norm(*statistics: Tensor) -> Tensor:
        channels = (*statistics, t["weight"], t["bias"])
        mean, var, weight, bias = (c.view(-1, 1, 1) for c in channels)
        z = (t["x"] - mean) / (var + EPS).sqrt() * weight + bias
        return z + t["residual"] if case.fused else z

    def act(z: Tensor) -> Tensor:
        return z.detach().relu() if case.fused else z.detach()

    n = t["x"].numel() // t["x"].shape[1]
    var, mean = torch.var_mean(t["x"], (0, 2, 3), correction=0)
    z = norm(mean, var)
    gradients = torch.autograd.grad(z, wanted, t["dy"] * (y > 0) if case.fused else t["dy"])
    mean, var = mean.detach(), var.detach()
    return {
        "batch_norm_train": {
            "y": act(z),
            "running_mean": t["running_mean"].lerp(mean, MOMENTUM),
            "running_var": t["running_var"].lerp(var * n / (n - 1), MOMENTUM),
            "num_batches_tracked": torch.tensor(1),
        },
        "batch_norm_backward": dict(zip(case.gradients, gradients, strict=True)),
        "batch_norm_eval": {"y": act(norm(t["running_mean"], t["running_var"]))},
        "batch_stats": {"mean": mean, "var": var, "count": torch.tensor(n)},
    }


class Error(NamedTuple):
    """How far a result is from the exact one: ‖result − exact‖ / ‖exact‖."""

    result: str
    measured: float
    allowed: float

    @classmethod
    def of(cls, result: str, actual: Tensor, expected: Tensor) -> Error:
        error = (actual.double() - expected).norm() / expected.double().norm()
        if not actual.is_floating_point():  # a count
            return cls(result, error.item(), 0)
        return cls(result, error.item(), ALLOWED + torch.finfo(actual.dtype).eps / 2)

    @property
    def wrong(self) -> bool:
        return not self.measured <= self.allowed  # nor is NaN

    def __str__(self) -> str:
        return f"{self.result} is off by {self.measured:.1e}, {self.allowed:.1e} is allowed"


def check(case: Case, device: str) -> list[str]:
    """Prints a line for each operator; returns what is wrong."""
    try:
        before, _ = computed(case, device)
        actual, kernels = computed(case, device)
    except Exception as error:
        return [described(error)]
    expected = exact(case, actual["batch_norm_train"]["y"])
    problems = []
    print(f"  {'operator':<21}{'computed by':<30}{'worst result':<21}off by   allowed")
    for operator, results in actual.items():
        errors = [Error.of(name, t, expected[operator][name]) for name, t in results.items()]
        wrong = [str(error) for error in errors if error.wrong]
        wrong += [
            f"{name} is not the same bits again"
            for name, t in results.items()
            if not torch.equal(t, before[operator][name])
        ]
        worst = max(errors, key=lambda e: (e.wrong, e.measured / (e.allowed or 1)))
        by = ", ".join(kernels[operator]) or "PyTorch"
        row = f"{worst.result:<19}{worst.measured:8.1e}  {worst.allowed:8.1e}"
        print(f"  {operator:<21}{by:<30}{row}{'  FAILED' * bool(wrong)}")
        problems += [f"{operator}: {problem}" for problem in wrong]
    return problems


def described(error: Exception) -> str:
    """What a report says of an error, in one line."""
    first, *_ = str(error).strip().split("\n")
    return f"{type(error).__name__}: {first}"


def triton() -> tuple[str, str | None]:
    """Triton's version in words, and what keeps the kernels from being compiled with it."""
    problem = None
    try:
        import_module("tribn.kernels")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "no Triton", "Triton is not installed: pip install triton"
        problem = described(error)
    version = getattr(sys.modules.get("triton"), "__version__", None)
    if version is None:
        return "a broken Triton", f"importing Triton fails with {problem}"
    if problem and tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        problem = f"Triton {version} is older than {oldest}: pip install --upgrade triton"
    return f"Triton {version}", problem


def cuda() -> tuple[str, str | None]:
    """torch's CUDA in words, and what keeps tensors from being there or kernels from using it."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "no CUDA", "this torch is built without CUDA: install a build with it"
    problem = None
    try:
        torch.cuda.init()
    except Exception as error:
        problem = described(error)
    version = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return version, problem


def driver() -> str:
    """The NVIDIA driver's version in words."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return "no NVIDIA driver"
    first, *_ = done.stdout.split("\n")  # one for each device
    return f"NVIDIA driver {first}"


def title(device: str) -> str:
    """The hardware's name."""
    if device == "cpu":
        return f"{platform.machine()} CPU"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors"


def main(argv: Sequence[str] | None = None) -> int:
    ArgumentParser(prog="python -m tribn", description=DESCRIPTION, epilog=EXIT).parse_args(argv)
    start = time.perf_counter()
    of_triton, no_kernels = triton()
    of_cuda, no_device = cuda()
    if ops._INTERPRET:
        no_device = "TRITON_INTERPRET=1 is set: Triton's interpreter runs the kernels on the CPU"
    print(f"tribn {tribn.__version__}, Python {platform.python_version()}", end=", ")
    print(f"torch {torch.__version__}, {of_cuda}, {driver()}, {of_triton}")
    if no_device or no_kernels:
        print(f"The GPU path is not used: {no_device or no_kernels}")
    problems = []
    for device in ["cpu"] if no_device else ["cpu", "cuda"]:
        for case in CASES:
            print(f"\n{title(device)}, {case.name}", flush=True)
            problems += [f"{device}, {case.name}: {problem}" for problem in check(case, device)]
    took = f"{time.perf_counter() - start:.1f} s"
    if problems:
        print(f"\nFAILED, in {took}:", *problems, sep="\n  ")
        return 1
    print(f"\nEverything is right, in {took}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
