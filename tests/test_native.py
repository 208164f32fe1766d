"""What PyTorch does with a model goes on working: compilation, export, precision, parallelism."""

import copy
import io
import pickle
import shutil

import pytest
import torch
from cases import F64, of_no_kernel
from torch import nn
from torch.nn.utils import parametrize

of_no_kernel()

import tribn

# Dynamo itself makes an instance of every autograd.Function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

C = 4
OPTIONS = {
    "plain": {},
    "average": {"momentum": None},
    "relu": {"activation": "relu"},
    "first": {"activation": "silu", "order": "act_norm", "nonfinite": "skip"},
    "inplace": {"activation": "leaky_relu", "memory": "inplace", "correction": 0},
    "last axis": {"activation": "mish", "channel_axis": -1},
    "untracked": {"track_running_stats": False},
    "without parameters": {"affine": False, "activation": "hardswish"},
    "statistics in double": {"stats_dtype": F64},
}


# Memory "inplace" keeps the input where a graph is made, but else the output, and undoes its 1e-7.
UNDONE = 1e-4

NAMES = list(OPTIONS)


class Net(nn.Module):
    """Two layers, the first of which has a residual and a mask if `around`."""

    def __init__(self, options, device, around=False):
        super().__init__()
        torch.manual_seed(0)
        self.around = around
        self.first = tribn.BatchNorm2d(C, device=device, **options)
        self.second = tribn.BatchNorm2d(C, device=device, **options)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 1, 0.2)

    def forward(self, x):
        if not self.around:
            return self.second(self.first(x) * 2)
        mask = x.detach().select(self.first.channel_axis, 0) > 0
        return self.second(self.first(x, x.flip(0), mask=mask) * 2)


def net(name, device, training=True, around=False):
    around = around and OPTIONS[name].get("memory") != "inplace"
    return Net(OPTIONS[name], device, around).train(training)


def images(count, device, size=5):
    """C channels in either axis that may be theirs."""
    torch.manual_seed(count)
    return 1 + torch.randn(count, C, size, C, device=device)


def observe(model, sizes, device, training):
    """Outputs, gradients and state over some batches."""
    seen = []
    for count, size in sizes:
        x = images(count, device, size)
        if not training:  # compiled, the gradient comes in another layout, and is summed otherwise
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_(training)
        y = model(x)
        if training:
            y.square().sum().backward()
            seen.append(x.grad)
        assert y.stride() == x.stride()
        seen.append(y.detach())
    seen += [p.grad for p in model.parameters() if training]
    return [*seen, *model.buffers()]


def compare_compiled(name, training, dynamic, device):
    torch._dynamo.reset()
    eager = net(name, device, training, around=dynamic)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    sizes = [(6, 5), (4, 5), (5, 7)] if dynamic else [(6, 5)] * 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        seen = observe(compiled, sizes, device, training)
    undone = UNDONE if training and OPTIONS[name].get("memory") else 0
    for result, expected in zip(seen, observe(eager, sizes, device, training), strict=True):
        torch.testing.assert_close(result, expected, rtol=undone, atol=undone)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_compiled_once_without_graph_breaks_and_equal(name, device):
    compare_compiled(name, True, True, device)


@pytest.mark.parametrize("name", NAMES[:3])
def test_so_is_evaluation(name, device):
    compare_compiled(name, False, True, device)


@pytest.mark.parametrize("name", NAMES[1:3])
def test_so_is_what_has_one_shape(name, device):
    compare_compiled(name, True, False, device)


@pytest.mark.parametrize("activation", [None, "softplus"])
def test_one_layer_at_two_dynamic_sizes_of_a_graph(activation, device):
    torch._dynamo.reset()
    layer = tribn.BatchNorm2d(C, activation=activation, device=device)
    eager = copy.deepcopy(layer)
    shrink = nn.functional.max_pool2d
    compiled = torch.compile(
        lambda x: layer(shrink(layer(x), 2)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in (6, 8):
        x = torch.randn(4, C, size, size, device=device)
        torch.testing.assert_close(compiled(x), eager(shrink(eager(x), 2)), rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict(), rtol=0, atol=0)


def test_planes_of_any_size_are_one_graph(device):
    """Some lie side by side and some do not; bits are kept of all."""
    torch._dynamo.reset()
    layer = tribn.BatchNorm2d(C, activation="relu", device=device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (5, 10, 7, 40):
            x = torch.randn(6, C, size, 2, device=device, requires_grad=True)
            residual = torch.randn_like(x, requires_grad=True)
            found, expected = (
                torch.autograd.grad(f(x, residual).square().sum(), (x, residual))
                for f in (compiled, layer)
            )
            torch.testing.assert_close(found, expected)


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs g++ for code on a CPU"
)


@needs_compiler
def test_inductors_code_equals_eager(device):
    torch._dynamo.reset()
    eager = net("relu", device, around=True)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    sizes = [(6, 5)] * 2
    seen = observe(compiled, sizes, device, True)
    # What is around the layers rounds as torch's own compilation makes it.
    for result, expected in zip(seen, observe(eager, sizes, device, True), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("name", "strict"), [*((n, False) for n in NAMES), ("relu", True)])
def test_exported_saved_loaded_and_run(name, training, strict, device):
    eager = net(name, device, training, around=True)
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    model = copy.deepcopy(eager)
    program = torch.export.export(model, (images(6, device),), dynamic_shapes=shapes, strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    # By running statistics it needs no tribn where it runs.
    batch = training or OPTIONS[name].get("track_running_stats") is False
    assert batch == any(target.startswith("tribn.") for target in names)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (6, 3):
        results = []
        for model in (loaded, eager):
            x = images(count, device).requires_grad_()
            y = model(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad))
        torch.testing.assert_close(*results)
    # Untracked layers are there partly PyTorch's, whose float32 sums of 120 values round otherwise.
    tolerance = {"rtol": UNDONE, "atol": UNDONE} if name in ("inplace", "untracked") else {}
    parameters, buffers = dict(eager.named_parameters()), dict(eager.named_buffers())
    for key, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[key].grad, **tolerance)
    for key, buffer in loaded.named_buffers():
        torch.testing.assert_close(buffer, buffers[key])


@needs_compiler
@pytest.mark.filterwarnings("ignore::FutureWarning")  # its own
def test_compiled_ahead_of_time_for_a_cpu(tmp_path):
    eager = net("relu", "cpu", training=False, around=True)
    x = images(6, "cpu")
    program = torch.export.export(eager, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), eager(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the exporter's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["plain", "relu", "inplace", "first", "last axis"])
def test_onnx_has_batch_normalization_and_the_activation(name, tmp_path):
    onnx, runtime = (pytest.importorskip(m) for m in ("onnx", "onnxruntime"))
    eager = net(name, "cpu", training=False)
    x, path = images(6, "cpu"), str(tmp_path / "net.onnx")
    torch.onnx.export(eager, (x,), path, dynamo=True, verbose=False)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    activations = {"relu": "Relu", "inplace": "LeakyRelu", "first": "Sigmoid"}
    assert kinds.count("BatchNormalization") == 2
    assert kinds.count(activations.get(name)) == (2 if name in activations else 0)
    (y,) = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), eager(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the exporter's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_batch_statistics_that_move_nothing_are_exported_without_tribn(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    eager, x = net("untracked", "cpu", training=False), images(6, "cpu")
    nodes = torch.export.export(eager, (x,)).graph.nodes
    assert not [node for node in nodes if str(node.target).startswith("tribn.")]
    torch.onnx.export(eager, (x,), str(tmp_path / "net.onnx"), dynamo=True, verbose=False)
    (y,) = runtime.InferenceSession(str(tmp_path / "net.onnx")).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), eager(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_torchscript():
    eager = net("relu", "cpu", training=False)
    traced = torch.jit.trace(eager, images(6, "cpu"))
    x = images(3, "cpu")
    torch.testing.assert_close(traced(x), eager(x))


@pytest.mark.parametrize("name", NAMES)
def test_symbolically_traced_a_layer_is_one_call(name, device):
    eager = net(name, device, around=True)
    traced = torch.fx.symbolic_trace(copy.deepcopy(eager))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["first", "second"]
    x = images(6, device)
    for training in (False, True):
        assert torch.equal(traced.train(training)(x), eager.train(training)(x))
    assert all(map(torch.equal, traced.buffers(), eager.buffers()))
    with pytest.raises(TypeError, match="traced by itself: a layer is one call; trace a module"):
        torch.fx.symbolic_trace(eager.first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_gradient_scaler(dtype, device):
    """Layers take what autocast gives them; a step that overflows changes no parameter."""
    model = nn.Sequential(nn.Conv2d(C, C, 1), tribn.BatchNorm2d(C, activation="relu")).to(device)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**4)
    x = images(6, device)
    with torch.autocast(device, dtype):
        y = model(x)
        hidden = plain[0](x)
    assert y.dtype == dtype
    assert torch.equal(y, plain[1](hidden))
    scaler.scale(y.float().square().mean()).backward()
    plain[1](hidden).float().square().mean().backward()
    scaler.unscale_(optimizer)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=1e-3)
    scaler.step(optimizer)
    scaler.update()
    before = [p.clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(x).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, model.parameters(), before))
    assert scaler.get_scale() == 2.0**3


def test_update_bn_averages_over_batches(device):
    model = net("relu", device)
    reference = nn.BatchNorm2d(C, device=device)
    batches = [images(n, device) for n in (3, 6, 4)]
    for module in (model.first, reference):
        torch.optim.swa_utils.update_bn(batches, module)
    torch.testing.assert_close(model.first.running_mean, reference.running_mean)
    torch.testing.assert_close(model.first.running_var, reference.running_var)
    assert model.first.momentum == 0.1


def test_update_bn_leaves_frozen_layers_alone(device):
    layer = tribn.freeze(tribn.BatchNorm2d(C, device=device))
    layer.running_mean.fill_(2)
    layer.running_var.fill_(3)
    torch.optim.swa_utils.update_bn([images(6, device)], layer)
    assert layer.running_mean.tolist() == [2.0] * C
    assert layer.running_var.tolist() == [3.0] * C


def test_a_parametrized_weight_is_trained(device):
    layer = tribn.BatchNorm2d(C, activation="relu", device=device)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    original = layer.parametrizations.weight.original
    nn.init.normal_(original)
    other = tribn.BatchNorm2d(C, activation="relu", device=device)
    weight = original.detach().clone().requires_grad_()
    x = images(6, device)
    y = layer(x)
    y.square().sum().backward()
    expected = tribn.functional.batch_norm(
        *(x, other.running_mean, other.running_var, nn.functional.softplus(weight), other.bias),
        training=True,
        activation="relu",
    )
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(original.grad, weight.grad)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_mode_and_inference_mode(name, device):
    expected = observe(net(name, device), [(6, 5)], device, training=True)
    torch.use_deterministic_algorithms(True)
    try:
        seen = observe(net(name, device), [(6, 5)], device, training=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, seen, expected))
    model = net(name, device, training=False)
    with torch.inference_mode():
        y = model(images(6, device))
    assert y.is_inference()
    assert torch.equal(y, model(images(6, device)))


def test_default_device_meta_then_materialized(device):
    with torch.device("meta"):
        model = Net({"activation": "relu"}.copy(), None)
        lazy = tribn.LazyBatchNorm2d()
        y = model(lazy(torch.empty(6, C, 5, 5)))
        y.sum().backward()
    assert y.is_meta
    assert model.first.weight.grad.is_meta
    assert lazy.weight.shape == (C,)
    model.to_empty(device=device)
    for layer in (model.first, model.second):
        layer.reset_parameters()
    x = images(6, device)
    expected = nn.BatchNorm2d(C, device=device)(x).relu()
    torch.testing.assert_close(model.first(x), expected)


def test_hooks_see_and_change_what_passes(device):
    layer = tribn.BatchNorm2d(C, activation="relu", device=device)
    x = images(6, device).requires_grad_()
    seen = []
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, y: seen.append(args[0]) or y + 1)
    layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 3,))
    y = layer(x)
    other = tribn.BatchNorm2d(C, activation="relu", device=device)
    z = x.detach().mul(2).requires_grad_()
    expected = other(z)
    assert torch.equal(seen[0], z)
    assert torch.equal(y, expected + 1)
    y.square().sum().backward()
    (expected + 1).square().sum().backward()
    assert torch.equal(x.grad, z.grad * 3 * 2)


@pytest.mark.parametrize("name", NAMES)
def test_weights_only_loading_and_pickles(name, device, tmp_path):
    model = net(name, device)
    model(images(6, device))
    path = tmp_path / "net.pt"
    torch.save(model.state_dict(), path)
    other = net(name, device)
    other.load_state_dict(torch.load(path, weights_only=True))
    copied = pickle.loads(pickle.dumps(model))
    x = images(5, device)
    expected = model(x)
    assert torch.equal(other(x), expected)
    assert torch.equal(copied(x), expected)
    for buffer, *others in zip(model.buffers(), other.buffers(), copied.buffers(), strict=True):
        assert all(torch.equal(buffer, o) for o in others)
