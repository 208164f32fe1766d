"""Every kernel at every kind of plan, compiled for devices that are not there."""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from unittest import mock

import pytest
import torch
import triton
from cases import PLAIN, of_no_kernel

of_no_kernel()
pytest.importorskip("rich")

from perf import codegen
from perf.__main__ import main
from perf.cases import NETS, SETS, Layer, layers
from perf.codegen import (
    FIELDS,
    TARGETS,
    Resources,
    Variant,
    changes,
    compiling,
    ctas_per_sm,
    key,
    launched,
    registers,
    resources,
    rows_of,
    train_and_evaluate,
    warps_per_sm,
)
from perf.report import RESULTS
from tribn import kernels
from tribn.activation import KINDS
from tribn.kernels import host
from tribn.launch import LARGE_PER_THREAD
from tribn.reference import accumulator, new_bits, output

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
I64 = torch.int64

# shape, memory format, dtype: whether 16-byte accesses are possible
TENSORS = {
    "planes": ((128, 256, 56, 56), CONTIGUOUS, BF16, True),
    "pixels": ((128, 256, 56, 56), CHANNELS_LAST, BF16, True),
    "rows": ((4096, 512), CONTIGUOUS, F64, True),
    "odd channels": ((64, 65, 56, 56), CHANNELS_LAST, BF16, True),
    "odd planes": ((64, 512, 7, 7), CONTIGUOUS, F64, False),
}


def tensor(shape, memory_format, dtype):
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=memory_format) if len(shape) == 4 else x


@contextmanager
def two_launches():
    """As on a device that does not run programs at the same time."""
    refused = {torch.device("meta")}
    with mock.patch.object(host, "_refused", refused), mock.patch.dict(host._launchers, clear=True):
        yield


def compile_all(target, x, fused=True):
    """Every kernel that the operators launch on x, with everything optional there and not."""
    C = x.shape[1]
    f32, f64 = (torch.empty(C, dtype=dtype, device="meta") for dtype in (F32, F64))
    stat = f64 if x.dtype == F64 else f32
    half = torch.empty(C, dtype=x.dtype if x.element_size() == 2 else BF16, device="meta")
    counter = torch.empty((), dtype=torch.int64, device="meta")

    def train(*args, momentum=0.1, skip=False, act=PLAIN, residual=None, mask=None, bits=False):
        statistics = (*args[2:], momentum, 1, skip)
        kernels.batch_norm_train(x, *args[:2], residual, mask, *statistics, 1e-5, 1, *act, bits)

    def evaluate(act=PLAIN, residual=None, bits=False):
        kernels.batch_norm_eval(x, stat, stat, f32, f32, residual, None, 1e-5, 1, *act, bits)

    def backward(
        x, weight, training, wanted, act=PLAIN, residual=None, bits=None, mask=None, inplace=False
    ):
        count = None if mask is None else counter
        tensors = (dy, x, stat, stat, weight, weight, residual, bits, mask, count)
        flags = (*act, inplace, dy.dtype, dy.dtype, wanted)
        kernels.batch_norm_backward(*tensors, 1e-5, training, 1, *flags)

    dy, mask = x, x.select(1, 0).to(torch.bool)
    bits = new_bits(x, 1)
    every, none = [True, True, True, False], (None,) * 5
    with compiling(target) as compiled:
        kernels.batch_stats(x, None, 1)
        train(f32, f32, f32, f32, counter, momentum=None)
        train(half, None, half, half, counter, skip=True)
        train(*none)
        evaluate()
        backward(x, f32, True, every)
        backward(x, f32, False, every)
        backward(None, f32, False, [True, False, True, False])
        backward(None, None, False, [True, False, False, False])
        if not fused:
            return compiled
        # an activation, with a residual and a mask, behind the normalization and before it
        relu, gelu = ("relu", 0.0, 0.0, False), ("gelu_tanh", 0.0, 0.0, False)
        train(f32, f32, f32, f32, counter, act=relu, residual=x, bits=True)
        train(f32, f32, f32, f32, counter, act=gelu, mask=mask)
        train(f32, f32, f32, f32, counter, act=("gelu_tanh", 0.0, 0.0, True))
        evaluate(relu, x, True)
        evaluate(gelu)
        backward(x, f32, True, every, relu)
        backward(x, f32, True, [True] * 4, relu, bits=bits)
        backward(x, f32, True, every, gelu, residual=x, mask=mask)
        backward(x, f32, True, every, ("gelu_tanh", 0.0, 0.0, True))
        backward(None, f32, False, [True, False, False, True], relu, bits=bits)
        for name in ("leaky_relu", "elu"):
            backward(x, f32, True, every, (name, 1.0, 0.0, False), inplace=True)
    return compiled


# What the saved table does not have: everything optional there and not, two launches, float64
CASES = [
    ("pixels", "sm_90"),
    ("odd channels", "sm_90"),
    ("odd planes", "sm_90"),
    ("rows", "sm_90"),
    ("planes", "sm_100"),
    ("pixels", "gfx942"),
]
TWO_LAUNCHES = {("rows", "sm_90"), ("planes", "sm_100"), ("pixels", "gfx942")}
FUSED = {("pixels", "sm_90")}  # with everything around the normalization as well
SINGLE_LAUNCHES = {"forward", "backward"}
TENSOR_KERNELS = {"stats", "normalize", "backward_reduce", "backward_dx"}
READS_ONLY = {"stats", "backward_reduce"}


@pytest.mark.parametrize(("name", "target"), CASES)
def test_registers_and_accesses(name, target):
    *description, aligned = TENSORS[name]
    x = tensor(*description)
    compiled = compile_all(target, x, (name, target) in FUSED)
    if (name, target) in TWO_LAUNCHES:
        with two_launches():
            compiled += compile_all(target, x, fused=False)
    seen = set()
    for kernel in compiled:
        assert_addresses_are_64_bits_wide(kernel)
        found = resources(kernel)
        stage = found.name.removesuffix("_kernel")
        seen.add(stage)
        assert found.spills == 0, found
        least = found.warps if stage in SINGLE_LAUNCHES else 12
        assert warps_per_sm(target, found.registers) >= least, found
        if stage in SINGLE_LAUNCHES | TENSOR_KERNELS:
            if x.element_size() == 2:
                # Of what is aligned only half weights and running statistics of one channel, loaded
                # and stored, are accessed in two bytes.
                narrow = found.loads[2] + found.stores[2]
                assert narrow <= 1 + 2 * 2 if aligned else narrow > 0, found
            if aligned:
                assert found.loads[16] > 0, found
                assert found.stores[16] > 0 or stage in READS_ONLY, found
    assert seen >= SINGLE_LAUNCHES | TENSOR_KERNELS


def assert_addresses_are_64_bits_wide(kernel):
    """No tile of a tensor is addressed by 32-bit offsets, which 2^31 elements would overflow."""
    addresses = re.findall(r"tt\.addptr .* : .*", kernel.asm["ttir"])
    assert addresses, kernel.metadata.name
    for line in addresses:
        assert re.search(r"i64>?(?: loc\(.*\))?$", line), line


def compile_training(target, x, activation, residual=None):
    """The kernels of a step of training."""
    y = output(x, residual)
    stat = torch.empty(x.shape[1], dtype=accumulator(y.dtype), device="meta")
    given = (x, stat, stat, residual, None, stat, stat, None)
    saved = (y, x, stat, stat, stat, stat, residual, None, None, None)
    wanted = [True, True, True, residual is not None]
    dtypes = (x.dtype, None if residual is None else residual.dtype)
    with compiling(target) as compiled:
        kernels.batch_norm_train(*given, 0.1, 1, False, 1e-5, 1, *activation, False)
        kernels.batch_norm_backward(*saved, 1e-5, True, 1, *activation, False, *dtypes, wanted)
    return compiled


# These compute most, and are in both orders.
EXPENSIVE = {"mish", "gelu_tanh"}
ORDERS = [("planes", False), ("pixels", True)]  # each activation in one of them


@pytest.mark.parametrize(
    ("activation", "name", "act_first"),
    [
        (a, *order)
        for i, a in enumerate(KINDS)
        for order in (ORDERS if a in EXPENSIVE else [ORDERS[i % 2]])
    ],
)
def test_no_activation_needs_more_than_there_is(activation, act_first, name):
    """Over neighbouring channels a program with a large tile may have a multiprocessor alone."""
    x, last = tensor(*TENSORS[name][:3]), name == "pixels"
    for kernel in compile_training("sm_90", x, (activation, 0.0, 0.0, act_first)):
        name, warps = kernel.metadata.name, kernel.metadata.num_warps
        held, spilled = registers(kernel)
        assert spilled == 0, name
        ctas = TARGETS["sm_90"].facts.programs_per_sm(warps, held, kernel.metadata.shared)
        sizes = dict(re.findall(r"BLOCK_(.) (\d+)", Variant.of("sm_90", kernel).constants))
        tile = prod(int(sizes[axis]) for axis in "NCS") * x.itemsize
        large = last and tile == 32 * warps * LARGE_PER_THREAD
        assert ctas >= (1 if large else 2), name


@pytest.mark.parametrize("shape", [(1, 64, 56, 56), (64, 512, 28, 28)])
def test_a_thread_computes_for_one_of_neighbouring_channels(shape):
    """Not for the eight that an access of 16 bytes gives it; backward has a gradient's as well."""
    x = tensor(shape, CHANNELS_LAST, BF16)
    roots = {
        kernel.metadata.name: kernel.asm["ptx"].count("sqrt.rn.f32")
        for kernel in compile_training("sm_90", x, (None, 0.0, 0.0, False))
    }
    assert roots == {"forward_kernel": 1, "backward_kernel": 2}


SYNCHRONIZED = {
    "stats",
    "sync_combine",
    "backward_reduce",
    "sync_sum",
    "backward_dx",
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "ranks"), [("planes", 4), ("rows", 4096)])
def test_synchronized_stages(name, ranks, target):
    x = tensor(*TENSORS[name][:3])
    C, dtype = x.shape[1], accumulator(x.dtype)
    stat, counter = (torch.empty(n, dtype=d, device="meta") for n, d in ((C, dtype), ((), I64)))
    half, rows = (
        torch.empty(size, dtype=d, device="meta")
        for size, d in ((C, BF16), ((ranks, 2 + 2 * C), F64))
    )
    mask, sums = x.select(1, 0).to(torch.bool), torch.empty(1 + 2 * C, dtype=F64, device="meta")
    act = ("silu", 0.0, 0.0, False)
    tensors, at = (x, x, stat, stat, stat, stat, None, None), (1e-5, 1, *act)
    with compiling(target) as compiled:
        kernels.sync_stats(x, None, dtype, 1, *PLAIN)
        kernels.sync_stats(x, mask, dtype, 1, *act[:3], True)
        kernels.sync_combine(rows, stat, half, counter, None, 1, True, dtype)
        kernels.sync_combine(rows, None, None, None, 0.1, 0, False, dtype)
        kernels.sync_backward_reduce(*tensors, mask, *at, False, None, [True, True, False])
        kernels.sync_sum(rows)
        kernels.sync_backward_dx(*tensors, mask, counter, sums, *at, False, x.dtype)
    for kernel in compiled:
        assert_addresses_are_64_bits_wide(kernel)
        assert registers(kernel)[1] == 0, kernel.metadata.name
        merges = kernel.metadata.name.startswith("sync")
        assert ("process group differ" in kernel.asm["ttir"]) == merges
        assert any(end in kernel.asm["llir"] for end in ("__assertfail", "llvm.trap")) == merges
    assert {kernel.metadata.name.removesuffix("_kernel") for kernel in compiled} == SYNCHRONIZED


@pytest.mark.parametrize(
    ("dtypes", "target"),
    [
        *(((BF16, F64), target) for target in ("sm_90", "gfx942")),
        *((pair, "sm_90") for pair in [(F64, BF16), (F16, F64), (F64, F16), (BF16, F16)]),
    ],
)
def test_residual_of_another_dtype(dtypes, target):
    """All conversions there are to load and store."""
    x, residual = (tensor((64, 32, 14, 14), CONTIGUOUS, dtype) for dtype in dtypes)
    compiled = compile_training(target, x, ("silu", 0.0, 0.0, False), residual)
    assert {kernel.metadata.name.removesuffix("_kernel") for kernel in compiled} == SINGLE_LAUNCHES


def needs(registers, warps, shared=0):
    return Resources("", warps, registers, 0, shared, 0, Counter(), Counter())


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "ctas"),
    [
        ("sm_90", 32, 8, 0, 8),  # 64 warps
        ("sm_90", 33, 8, 0, 6),  # 40 registers of 512 for each of 51 warps, whole ones of 4
        ("sm_90", 128, 8, 0, 2),
        ("sm_90", 129, 8, 0, 1),
        ("sm_90", 168, 4, 0, 3),
        ("sm_90", 255, 8, 0, 1),
        ("sm_90", 16, 1, 0, 32),  # CTAs
        ("sm_90", 32, 8, 100 * 1024, 2),  # of 228 KB, and 1 KB for each
        ("sm_80", 32, 8, 100 * 1024, 1),
        ("sm_100", 32, 4, 75 * 1024, 3),
        ("sm_100", 32, 4, 75 * 1024 + 1, 2),
        ("gfx942", 64, 8, 0, 4),  # 32 waves
        ("gfx942", 65, 4, 0, 7),  # 72 registers of 512: 7 waves on each of 4 units
        ("gfx942", 128, 8, 0, 2),
        ("gfx942", 24, 4, 16 * 1024, 4),
    ],
)
def test_ctas_per_multiprocessor(target, registers, warps, shared, ctas):
    assert ctas_per_sm(target, needs(registers, warps, shared)) == ctas
    if TARGETS[target].gpu.backend == "cuda":
        assert TARGETS[target].facts.programs_per_sm(warps, registers, shared) == ctas


LAYER = Layer((32, 64, 56, 56), "relu", residual=True)


def test_waves_are_those_llvm_counts():
    with compiling("gfx942") as compiled:
        train_and_evaluate(tensor(*TENSORS["odd planes"][:3]), LAYER)
    for kernel in compiled:
        waves = int(re.search(r"; Occupancy: (\d+)", kernel.asm["amdgcn"])[1])
        found = resources(kernel)
        assert warps_per_sm("gfx942", found.registers, found.scalars) == 4 * waves


def test_a_residual_beside_slabs_in_registers_that_merge_in_two_steps():
    x = tensor((8, 64, 56, 56), CHANNELS_LAST, BF16)
    with compiling("sm_90") as compiled:
        train_and_evaluate(x, replace(LAYER, shape=tuple(x.shape)))
    variants = [Variant.of("sm_90", kernel) for kernel in compiled]
    constants = next(of.constants for of in variants if of.kernel == "forward")
    assert "HELD True" in constants
    assert "MERGERS 32" in constants


@pytest.fixture
def one_dtype(monkeypatch):
    monkeypatch.setattr(codegen, "DTYPES", {"bf16": BF16})
    monkeypatch.setattr(codegen, "LAYOUTS", ["channels-first"])


def test_layers_that_share_a_kernel_share_a_row(one_dtype):
    found = launched("sm_90", LAYER)
    assert {variant.kernel for variant in found} == {"forward", "backward", "normalize"}
    # A larger one of the same kind, and others
    assert launched("sm_90", replace(LAYER, shape=(32, 80, 56, 56))).keys() == found.keys()
    assert launched("sm_90", replace(LAYER, shape=(32, 64, 7, 7))).keys().isdisjoint(found)
    assert launched("sm_90", replace(LAYER, activation="silu")).keys() != found.keys()


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_caches_are_told_what_comes_again(one_dtype, target):
    """x, and dy, stay in the L2 cache until they are read for the last time."""
    found = launched(target, replace(LAYER, shape=(128, 256, 56, 56)))
    for variant, (kernel, _) in found.items():
        if variant.kernel in SINGLE_LAUNCHES:
            code = kernel.asm["ptx"]
            assert "FIRST evict_last, LAST evict_first" in variant.constants
            first = re.findall(r"ld\.global\S*evict_last\S*", code)
            assert len(first) >= {"forward": 2, "backward": 4}[variant.kernel], variant
            assert re.search(r"ld\.global\S*evict_first", code), variant
            assert re.search(r"st\.global\S*evict_first", code), variant


@pytest.mark.parametrize(
    ("name", "target"), [("planes", "sm_90"), *(("pixels", target) for target in TARGETS)]
)
def test_programs_that_wait_fit_the_device(name, target):
    """As many as the plan starts, in the registers and shared memory that they turn out to need."""
    x, found = tensor(*TENSORS[name][:3]), []
    with compiling(target), mock.patch.object(host, "start", lambda kept, *_: found.append(kept)):
        train_and_evaluate(x, LAYER)
    assert {kept.function.__name__ for kept in found} >= {"forward_kernel", "backward_kernel"}
    for kept in found:
        if kept.plan.tier is not None:
            assert kept.plan.waits
            assert kept.kernel.metadata.launch_cooperative_grid
            of_sm = ctas_per_sm(target, resources(kept.kernel))
            assert kept.plan.grid[0] <= of_sm * TARGETS[target].sms


def test_tiles_in_registers_shrink_where_they_would_spill():
    x = tensor((128, 96, 14, 14), CHANNELS_LAST, F32)
    with compiling("sm_90") as compiled:
        train_and_evaluate(x, Layer((128, 96, 14, 14), residual=True))
    assert "forward_kernel" in {kernel.metadata.name for kernel in compiled}
    assert all(registers(kernel)[1] == 0 for kernel in compiled)


SAVED = json.loads((RESULTS / "codegen.json").read_text())
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def test_saved_table_is_of_all_shapes_for_all_devices():
    assert SAVED["targets"] == [*TARGETS]
    assert SAVED["shapes"] == [*NETS, *SETS]
    assert {row["target"] for row in SAVED["rows"]} == TARGETS.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_of_the_saved_table_spills_or_accesses_less_than_it_could(target):
    rows = [row for row in SAVED["rows"] if row["target"] == target]
    assert rows
    for row in rows:
        assert row["spills"] == 0, row
        assert row["ctas_per_sm"] > 0, row
        (dtype,) = re.findall(r"(\w+) (?:\w+ )*x\b", row["tensors"])
        constants = dict(constant.split(" ", 1) for constant in row["constants"].split(", "))
        vector = int(constants["VEC"])
        tile = prod(int(constants[f"BLOCK_{axis}"]) for axis in "NCS")
        threads = row["warps"] * TARGETS[target].gpu.warp_size
        if tile >= threads * vector:  # else a thread has less than a vector
            wide = f"x{min(16, vector * BYTES[dtype])}"
            assert any(loads.endswith(wide) for loads in row["loads"].split()), row
            assert any(stores.endswith(wide) for stores in row["stores"].split()), row


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.skipif(
    SAVED["environment"]["triton"] != triton.__version__,
    reason="another Triton made the table, and gives registers its own way",
)
def test_saved_table_is_of_the_kernels_there_are(one_dtype, target):
    saved = {key(row): row for row in SAVED["rows"]}
    layer = next(of for of in layers("resnet50") if of.residual)
    for row in rows_of(target, layer):
        assert {**saved[key(row)], "example": ""} == {**row, "example": ""}


ROW = {**dict.fromkeys([*Variant._fields, *FIELDS], "same"), "example": "8x4"}


def test_changes():
    other, gone = ROW | {"warps": 4}, ROW | {"kernel": "gone"}
    assert changes([ROW, other], [other, ROW | {"example": "9x4"}]) == []
    grown = ROW | {"registers": 40, "loads": "1x16 4x4"}
    (line,) = changes([ROW, other], [grown, other])
    assert line.endswith(": registers same -> 40, loads same -> 1x16 4x4")
    added, removed = changes([gone], [other])
    assert added.startswith("+ same")
    assert removed.startswith("- same gone")


@pytest.fixture
def one_layer(monkeypatch):
    """A table of one layer in one dtype for two targets."""
    monkeypatch.setattr(codegen, "layers", lambda name: [Layer((64, 8))])
    monkeypatch.setattr(codegen, "DTYPES", {"bf16": BF16})
    monkeypatch.setattr(codegen, "TARGETS", {name: TARGETS[name] for name in ("sm_90", "gfx942")})


def test_table_and_what_changed_since_the_last(one_layer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(codegen, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))

    def run(*argv):
        main(["codegen", "--out", str(tmp_path), *argv])
        return capsys.readouterr().out

    assert "differ" not in run()
    path = tmp_path / "codegen.json"
    first = json.loads(path.read_text())
    assert first["command"] == "codegen"
    assert {row["target"] for row in first["rows"]} == {"sm_90", "gfx942"}
    assert first["rows"] == sorted(first["rows"], key=key)
    assert all(row["registers"] > 0 and row["ctas_per_sm"] > 0 for row in first["rows"])
    assert "0 rows differ" in run()

    changed, removed, *rest = [row for row in first["rows"] if row["target"] == "sm_90"]
    others = [row for row in first["rows"] if row["target"] != "sm_90"]
    saved = [{**changed, "registers": 999}, {**removed, "kernel": "gone"}, *rest, *others]
    path.write_text(json.dumps(first | {"rows": saved}))
    printed = run("--targets", "sm_90")
    assert "3 rows differ" in printed
    assert f"registers 999 -> {changed['registers']}" in printed
    assert f"+ sm_90 {removed['kernel']}: {removed['tensors']}" in printed
    assert "- sm_90 gone" in printed
    assert json.loads((tmp_path / "codegen-sm_90.json").read_text())["targets"] == ["sm_90"]
    # A part of the shapes says nothing about what is missing.
    assert "2 rows differ" in run("--targets", "sm_90", "--net", "resnet50")
    assert (tmp_path / "codegen-resnet50-sm_90.json").exists()


def test_other_processes_compile(one_layer, tmp_path):
    main(["codegen", "--targets", "sm_90", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "codegen-sm_90.json").read_text())["rows"]
    # Which know of all dtypes
    rows = [row for row in rows if " bf16 " in row["example"]]
    assert rows == sorted(rows_of("sm_90", Layer((64, 8))), key=key)


@pytest.mark.parametrize(
    "argv",
    [
        ["--targets", "sm_10"],
        ["--net", "alexnet"],
        ["--net", "resnet50", "--set", "hard"],
        ["--out", __file__],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["codegen", *argv])
    assert exit.value.code == 2
    assert "usage: python -m perf codegen" in capsys.readouterr().err


def test_the_interpreter_compiles_nothing(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit:
        main(["codegen"])
    assert exit.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
