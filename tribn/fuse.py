"""Fusing what follows the batch norm layers of a model, as the forwards of its modules show it.

Nothing moves from one module to another, and no layer knows what it is fused with: where a forward
computes ``act(norm(x) + residual)``, its module gets a class with a forward that makes one call of
it, `call`. That call looks at everything anew. It takes activation, parameters and shapes as they
are then; and where somebody looks in between, by a hook, or what is fused is not what it was, it
computes one after another what the model says. Where a guard of the trace does not hold, or the
arguments are others, the class's own forward runs. So layers and activations may be shared, hooked
and replaced, `model.training` may change, and a part of the model taken out of it stays right.

The class is a subclass of the module's own with the same name, as FSDP makes one; the alternative,
torch.fx's GraphModule, is no instance of the class the module had. Pickles hold the class it had.
"""

from __future__ import annotations

import abc
import functools
import linecache
import operator
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_tracing
from torch.nn import functional as F

from tribn.activation import KINDS, Activation, of_module
from tribn.bytecode import Refused
from tribn.nn import Layer, watched
from tribn.trace import Alias, Arguments, Guard, Settled, Trace, trace, watching

# What a rewritten forward calls.


class Rest(NamedTuple):
    """What comes after a batch norm, each of it if it is there."""

    activation: nn.Module | Activation | None = None
    writes: bool = False  # the activation, over what it is given
    residual: Any = None
    place: int = 0  # of the residual in the sum; -1: the sum is written over the other term

    def __call__(self, y: Any) -> Any:
        """The same, one after another."""
        if self.residual is not None:
            terms = (self.residual, y) if self.place == 0 else (y, self.residual)
            y = (operator.iadd if self.place < 0 else operator.add)(*terms)
        if self.activation is None:
            return y
        return y.copy_(self.activation(y)) if self.writes else self.activation(y)


def call(
    module: nn.Module,
    args: tuple[Any, ...],
    activation: nn.Module | Activation | None = None,
    writes: bool = False,
    residual: Any = None,
    place: int = 0,
    then: Rest | None = None,
) -> Any:
    """``activation(module(*args) + residual)`` and `then` the rest, in one pass if possible."""
    rest = Rest(activation, writes, residual, place)
    if then is not None:  # there is no activation, and no residual where `then` has one
        rest = then if residual is None else then._replace(residual=residual, place=place)
    if not watched(module):
        if getattr(module.forward, "tribn_takes_then", False):
            return module(*args, tribn_then=rest)
        if isinstance(module, Layer) and len(args) == 1 and follows_plain(module):
            act = fusable(rest.activation)
            if act is not None and _alike(rest.residual, args[0]):
                return module(args[0], rest.residual, activation=act)
    return rest(module(*args))


def follows_plain(layer: Layer) -> bool:
    """Whether a residual and an activation can be fused behind what the layer does by itself."""
    return layer.activation.name is None and layer.order == "norm_act" and layer.memory == "input"


def fusable(activation: nn.Module | Activation | None) -> Activation | None:
    if activation is None:
        return Activation()
    if isinstance(activation, nn.Module):
        return None if watched(activation) else of_module(activation)
    return activation


def _alike(residual: Any, x: Any) -> bool:
    """Whether their sum needs neither broadcasting nor promotion, nor a choice of layouts."""
    return residual is None or (
        isinstance(residual, Tensor)
        and isinstance(x, Tensor)
        and (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
        and residual.stride() == x.stride()
        and type(residual).__torch_function__ in _PLAIN
    )


_PLAIN = (Tensor.__torch_function__, torch._C._disabled_torch_function_impl)


class Variant:
    """A rewritten forward, for calls with these arguments while the guards hold."""

    def __init__(
        self,
        source: str,
        names: dict[str, Any],
        arguments: Arguments,
        guards: tuple[Guard | Alias | Settled, ...],
        takes_then: bool,
    ) -> None:
        self.source, self.names, self.arguments = source, names, arguments
        self.guards, self.takes_then = guards, takes_then
        file = f"<tribn.fuse {hash(source):x}>"  # shown by debuggers and tracebacks
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        scope = _standard_names() | names
        exec(compile(source, file, "exec"), scope)
        self.forward = scope["forward"]

    def __reduce__(self) -> tuple[Any, ...]:
        return Variant, (self.source, self.names, self.arguments, self.guards, self.takes_then)

    def __deepcopy__(self, memo: Any) -> Variant:
        return self


@functools.cache
def _standard_names() -> dict[str, Any]:
    """What torch.fx takes for granted in the code it writes."""
    graph = fx.Graph()
    graph.output(None)
    return dict(graph.python_code("self").globals)


class Fused:
    """What the class of a module with a rewritten forward has before the class it had."""

    _tribn_variants: list[Variant]

    def __init_subclass__(cls) -> None:
        """Registers nothing where the class it had registers its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        variants = state.get("_tribn_variants", ()) if isinstance(state, dict) else ()
        if not all(map(_pickles, variants)):
            state = {name: value for name, value in state.items() if name != "_tribn_variants"}
        return _blank, (original(type(self)),), state, *rest


def _pickles(variant: Variant) -> bool:
    """Whether all the functions that its guards name are found by their names."""
    try:
        pickle.dumps(variant.guards)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _blank(cls: Any) -> Any:
    fused = fused_class(cls)
    return fused.__new__(fused)


def original(cls: type) -> Any:
    """The class that a module with this class had."""
    return cls.__bases__[1] if issubclass(cls, Fused) else cls


def fused_class(cls: Any) -> Any:
    """The subclass of a module's class whose forward is that of a variant."""
    return _fused_class(cls, *_forwards(cls))


def _forwards(cls: Any) -> list[Any]:
    return [vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base)]


@functools.cache
def _fused_class(cls: Any, *written: Any) -> Any:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, tribn_then: Rest | None = None, **kwargs: Any) -> Any:
        # Part of a Sequential is one of the same class without the variants. Others who trace a
        # model by torch.fx see what it was.
        variants = vars(self).get("_tribn_variants", ())
        if _forwards(cls) == list(written) and not is_fx_tracing():
            for variant in variants:
                if tribn_then is None or variant.takes_then:
                    values = variant.arguments.bind(args, kwargs)
                    if values is not None and all(guard.holds(self) for guard in variant.guards):
                        then = (tribn_then,) if variant.takes_then else ()
                        return variant.forward(self, *values, *then)
        y = cls.forward(self, *args, **kwargs)
        return y if tribn_then is None else tribn_then(y)

    forward.tribn_takes_then = True  # type: ignore[attr-defined]
    names = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (Fused, cls), names | {"__doc__": cls.__doc__})


# Finding what can be fused.


def _functions() -> Iterator[tuple[Any, str]]:
    """torch's functions and the tensors' methods that are activations."""
    for name in KINDS:
        for written in (name, f"{name}_"):
            for place in (F, torch):
                if hasattr(place, written):
                    yield getattr(place, written), name
            if hasattr(Tensor, written):
                yield written, name


_FUNCTIONS = dict(_functions())
_SUMS = {operator.add: False, torch.add: False, "add": False, operator.iadd: True, "add_": True}


@dataclass
class Chain:
    """A call of a batch norm, or of a module that ends with one, and what follows it."""

    head: fx.Node
    why: str = ""  # it ends where it ends
    after: fx.Node | None = None  # what is not fused any more
    sum: fx.Node | None = None
    residual: int = 0  # which of its terms is the residual; -1: and it is written over the other
    act: fx.Node | None = None
    activation: Activation | None = None
    between: list[str] = field(default_factory=list)  # modules that it lets pass, and itself
    identities: list[fx.Node] = field(default_factory=list)  # passed by
    returned: bool = False  # and nothing else is done to it in this forward

    @property
    def end(self) -> fx.Node:
        return self.act or self.sum or self.head

    @property
    def parts(self) -> str:
        parts = ["residual"] * (self.sum is not None) + [str(self.activation)] * bool(self.act)
        return ", ".join(parts)


@dataclass
class Site:
    """A module whose forward is known, with the chains in its graphs."""

    module: nn.Module
    traces: list[Trace]
    chains: list[list[Chain]]  # of each trace
    tails: list[Chain] = field(default_factory=list)  # the last of each, if parents may go on
    tail: str = ""  # what comes out: "norm", "sum" or something else


class Fusion:
    """All of a model. Layers are fused with what `fused` says, or not, for the reason in `why`."""

    def __init__(self, model: nn.Module) -> None:
        self.fused: dict[Layer, list[str]] = {}
        self.why: dict[Layer, str] = {}
        self.sites: dict[nn.Module, Site] = {}
        containers = [
            module
            for module in model.modules()
            if not isinstance(module, Layer) and _is_called(module) and _layers(module)
        ]
        with watching():
            for module in reversed(containers):  # which has those inside another before it
                try:
                    _check_class(module)
                    self.look(module, trace(module))
                except Exception as error:  # whatever the code of the model does, or has for values
                    refusal = error if isinstance(error, Refused) else f"is not followed: {error}"
                    for layer in _layers(module):
                        self.why.setdefault(layer, f"{type(module).__name__}.forward {refusal}")
        wanted: set[nn.Module] = set()  # whose calls get a rest
        for site in self.sites.values():
            for chains in site.chains:
                for chain in chains:
                    if chain.parts:
                        self.want(_called(site.module, chain.head), wanted)
        for site in self.sites.values():
            rewrite(site, takes_then=site.module in wanted)

    def want(self, module: nn.Module, wanted: set[nn.Module]) -> None:
        if module in self.sites and module not in wanted:
            wanted.add(module)
            for tail in self.sites[module].tails:
                self.want(_called(module, tail.head), wanted)

    def look(self, module: nn.Module, traces: list[Trace]) -> None:
        """Takes note of a module whose forward is known."""
        site = Site(module, traces, [self.chains(module, t.graph) for t in traces])
        self.sites[module] = site
        for chains in site.chains:
            for chain in chains:
                head = _called(module, chain.head)
                for layer in self.ends(head):
                    fused = self.fused.setdefault(layer, [])
                    into = chain.parts
                    if into and self.kind(head) == "sum":  # which is fused with the rest
                        into = f"residual, {into}"
                        fused[:] = [other for other in fused if other != "residual"]
                    if into and into not in fused:
                        fused.append(into)
                    self.why[layer] = chain.why
        tails = [chain for chains in site.chains for chain in chains if chain.returned]
        kinds = {"sum" if c.sum else self.kind(_called(module, c.head)) for c in tails}
        if len(tails) == len(traces) and len(kinds) == 1:
            site.tails, site.tail = tails, kinds.pop()

    def kind(self, module: nn.Module) -> str:
        """What comes out of a module: "norm", to which a residual can be added, "sum" or else."""
        if watched(module):
            return ""
        if isinstance(module, Layer):
            return "norm" if follows_plain(module) else ""
        return self.sites[module].tail if module in self.sites else ""

    def ends(self, module: nn.Module) -> list[Layer]:
        """The layers that a module ends with: itself, or one in each of its graphs."""
        if isinstance(module, Layer):
            return [module]
        site = self.sites[module]
        return [x for tail in site.tails for x in self.ends(_called(module, tail.head))]

    def chains(self, module: nn.Module, graph: fx.Graph) -> list[Chain]:
        heads = []
        for node in graph.nodes:
            if node.op == "call_module":
                called = _called(module, node)
                if isinstance(called, Layer) and not self.kind(called):
                    own = "it has an activation, an order or a memory of its own"
                    self.why[called] = "it has hooks" if watched(called) else own
                elif self.kind(called) and not node.kwargs:
                    heads.append(node)
                elif isinstance(called, Layer):
                    self.why[called] = "it is called with arguments by their names"
        taken: set[fx.Node | None] = set()
        chains = {}
        for head in reversed(heads):  # a sum of two goes to the later, which need not wait
            chain = self.chain(module, head, taken)
            if not self.can_wait(module, chain):
                chain = Chain(head, why="what is computed in between may change what goes in")
            taken.add(chain.sum)
            chains[head] = chain
        for chain in chains.values():
            if chain.after and chain.after in taken:
                chain.why = "it is the residual of another"
        return [chains[node] for node in graph.nodes if node in chains]

    def can_wait(self, module: nn.Module, chain: Chain) -> bool:
        """Whether the first call of a chain can take the place of the last without a difference."""
        head = _called(module, chain.head)
        made = [x for x in chain.head.all_input_nodes if x.op == "call_module"]
        fresh = len(made) == len(chain.head.all_input_nodes) and all(
            len(x.users) == 1 and _forwards(type(_called(module, x)))[0] in _FRESH for x in made
        )
        passed: list[fx.Node] = []
        node = chain.head.next
        while node is not chain.end and chain.end is not chain.head:
            if node is not chain.sum and node not in chain.identities:
                passed.append(node)
            node = node.next
        if passed:
            modules = [chain.head, *(made if fresh else ()), *passed]
            chain.between = [str(x.target) for x in modules if x.op == "call_module"]
        # A running statistic that was read before is seen to move.
        read = {str(n.target) for n in chain.head.graph.nodes if n.op == "get_attr"}
        moved = {id(buffer) for buffer in head.buffers()}
        if passed and any(id(operator.attrgetter(name)(module)) in moved for name in read):
            return False
        return all(self.lets_pass(module, node, head, fresh) for node in passed)

    def lets_pass(self, module: nn.Module, node: fx.Node, head: nn.Module, fresh: bool) -> bool:
        """Whether `head` may be called after what a node calls instead of before it.

        That must not write to what goes into it, unless nobody else has that, draw random numbers
        before it does, or share with it what moves.
        """
        if node.op in ("placeholder", "output"):
            return True
        if node.op == "get_attr":
            return node.target in dict(module.named_parameters())
        if node.op != "call_module":
            name = _name(module, node)
            drops = "drop" in name and isinstance(head, Layer)
            return not _writes(node) and (name in _QUIET or name in KINDS or drops)
        called = _called(module, node)
        parts = set(called.modules())
        if parts & set(head.modules()) or any(map(watched, parts)):
            return False
        if called in self.sites:
            nodes = [n for t in self.sites[called].traces for n in t.graph.nodes]
            return all(self.lets_pass(called, n, head, fresh) for n in nodes)
        return all(_is_quiet(part, isinstance(head, Layer), fresh) for part in parts)

    def chain(self, module: nn.Module, head: fx.Node, taken: set[fx.Node | None]) -> Chain:
        chain = Chain(head)
        kind = self.kind(_called(module, head))
        node = head
        while True:
            if len(node.users) != 1:
                chain.why = f"its output is used {len(node.users)} times"
                return chain
            (user,) = node.users
            if user.op == "output":
                chain.returned = user.args[0] is node
                chain.why = f"{type(module).__name__}.forward returns it"
                return chain
            if _is_identity(module, user):
                chain.identities.append(user)
            elif kind == "norm" and user not in taken and _is_sum(user, node):
                chain.sum, kind = user, "sum"
                chain.residual = -1 if _SUMS[user.target] else int(user.args[0] is node)
            elif activation := _activation(module, user, node):
                chain.act, chain.activation, chain.why = user, activation, ""
                return chain
            else:
                chain.after, chain.why = user, f"followed by {_name(module, user)}"
                return chain
            node = user


def _layers(module: nn.Module) -> list[Layer]:
    return [layer for layer in module.modules() if isinstance(layer, Layer)]


def _is_called(module: nn.Module) -> bool:
    """Unlike a ModuleList, but for a subclass that has a forward."""
    cls: Any = type(module)
    written = _forwards(cls)[0] is not nn.Module.forward
    return written or cls.__call__ is not nn.Module.__call__


def _called(module: nn.Module, node: fx.Node) -> nn.Module:
    return module.get_submodule(str(node.target))


def _check_class(module: nn.Module) -> None:
    """That a subclass with another forward does what the class does otherwise."""
    cls: Any = type(module)
    if "forward" in vars(module):
        raise Refused("was replaced in this module")
    if isinstance(module, Fused):
        raise Refused("has a class that was made after it had been converted")
    if isinstance(module, torch.jit.ScriptModule) or cls.__call__ is not nn.Module.__call__:
        raise Refused("is not what is called")
    if any(
        getattr(cls, name, None) is not getattr(nn.Module, name, None)
        for name in (
            "__reduce__",
            "__reduce_ex__",
            "__getnewargs__",
            "__getnewargs_ex__",
            "__deepcopy__",
        )
    ):
        raise Refused("belongs to a class that pickles or copies itself")
    if type(cls) not in (type, abc.ABCMeta):
        raise Refused(f"belongs to a class of the metaclass {type(cls).__name__}")
    try:
        module.__class__ = fused_class(cls)
        module.__class__ = cls
    except Exception as error:  # of slots, or whatever the class does
        raise Refused(f"belongs to a class that cannot be extended: {error}") from error


def _is_identity(module: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    called = _called(module, node)
    return type(called) is nn.Identity and not watched(called)


def _is_sum(node: fx.Node, y: fx.Node) -> bool:
    """Whether the node is y and something else, and is written over y if over anything."""
    if node.op not in ("call_function", "call_method") or node.target not in _SUMS:
        return False
    if len(node.args) != 2 or not node.kwargs.items() <= {"alpha": 1}.items():
        return False
    first, second = node.args
    other = second if first is y else first
    return (
        isinstance(other, fx.Node)
        and other is not y
        and not (first is other and _SUMS[node.target])
    )


def _activation(module: nn.Module, node: fx.Node, z: fx.Node) -> Activation | None:
    """The activation that the node is of z."""
    if not node.args or node.args[0] is not z:
        return None
    if node.op == "call_module":
        called = _called(module, node)
        alone = len(node.args) == 1 and not node.kwargs
        return of_module(called) if alone and not watched(called) else None
    name = _FUNCTIONS.get(node.target)
    if name is None:
        return None
    given = dict(zip([*KINDS[name].parameters, "inplace"], node.args[1:], strict=False))
    given |= node.kwargs
    if not isinstance(given.pop("inplace", False), bool):
        return None
    if name == "gelu":
        approximate = given.pop("approximate", "none")
        if approximate not in ("none", "tanh"):
            return None
        name = "gelu_tanh" if approximate == "tanh" else "gelu"
    values: dict[str, Any] = KINDS[name].parameters | given
    if values.keys() != KINDS[name].parameters.keys():
        return None
    numbers = [float(v) for v in values.values() if isinstance(v, (int, float))]
    return Activation(name, *numbers) if len(numbers) == len(values) else None


def _name(module: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        called = _called(module, node)
        return type(called).__name__ + (" with hooks" if watched(called) else "")
    return str(getattr(node.target, "__name__", node.target))


# What draws no random numbers, and moves and writes nothing: functions and methods by name
_QUIET = frozenset(
    (
        *("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "neg", "matmul", "bmm"),
        *("abs", "exp", "log", "sqrt", "rsqrt", "square", "clamp", "softmax", "hardtanh"),
        *("mean", "sum", "amax", "amin", "cat", "stack", "chunk", "split", "getitem", "getattr"),
        *("unpack", "size", "dim", "to", "float", "view", "reshape", "flatten", "unflatten"),
        *("permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand", "contiguous"),
        *("pad", "interpolate", "pixel_shuffle", "linear", "conv1d", "conv2d", "conv3d"),
        *(f"{kind}_pool{d}d" for d in "123" for kind in ("avg", "max")),
        *(f"adaptive_{kind}_pool{d}d" for d in "123" for kind in ("avg", "max")),
    )
)

# and modules of torch by the files that have them
_QUIET_FILES = (
    *("activation", "conv", "flatten", "linear", "normalization", "padding", "pixelshuffle"),
    *("pooling", "upsampling", "container", "dropout"),
)
_FRESH = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward)
_DRAW = (nn.RReLU, nn.MultiheadAttention)


def _is_quiet(part: nn.Module, may_drop: bool, may_write: bool) -> bool:
    if isinstance(part, Layer):
        return True
    package, _, file = type(part).__module__.rpartition(".")
    drops = file == "dropout" and not may_drop
    writes = getattr(part, "inplace", False) is not False and not may_write
    known = package == "torch.nn.modules" and file in _QUIET_FILES
    known = known or _forwards(type(part))[0] in (nn.Identity.forward, nn.Sequential.forward)
    return known and not isinstance(part, _DRAW) and not drops and not writes


def _writes(node: fx.Node) -> bool:
    """Whether a function or method writes to what it takes."""
    name = str(getattr(node.target, "__name__", node.target))
    in_place = getattr(operator, f"__{name}__", None) is node.target and name.startswith("i")
    return (
        in_place or name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    )


def rewrite(site: Site, takes_then: bool) -> None:
    """Gives the module a class whose forward fuses the chains."""
    if not takes_then and not any(chain.parts for chains in site.chains for chain in chains):
        return
    variants = []
    for traced, chains in zip(site.traces, site.chains, strict=True):
        graph, then, guards = traced.graph, None, list(traced.guards)
        if takes_then:
            with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
                then = graph.placeholder("tribn_then", default_value=None)
        for chain in chains:
            if chain.parts or (then and chain.returned):
                _fuse(graph, chain, then if chain.returned else None)
                passed = [*chain.between, *(str(node.target) for node in chain.identities)]
                guards += [Settled.of(site.module, path) for path in passed]
        code = graph.python_code("self")
        names = {k: v for k, v in code.globals.items() if k not in _standard_names()}
        variants.append(Variant(code.src, names, traced.arguments, tuple(guards), takes_then))
    cls: Any = type(site.module)
    site.module.__class__ = fused_class(cls)
    vars(site.module)["_tribn_variants"] = variants


def _fuse(graph: fx.Graph, chain: Chain, then: fx.Node | None) -> None:
    """Makes one call of the chain, where its last one was."""
    with graph.inserting_before(chain.end):
        module = graph.create_node("get_attr", chain.head.target)
        act: Any = chain.activation
        if chain.act and chain.act.op == "call_module":
            act = graph.create_node("get_attr", chain.act.target)
        residual = chain.sum.args[chain.residual] if chain.sum else None
        writes = isinstance(act, Activation) and chain.act is not None and _writes(chain.act)
        args = (module, chain.head.args, act, writes, residual, chain.residual, then)
        fused = graph.call_function(call, args)
    chain.end.replace_all_uses_with(fused)
    gone = {chain.head, chain.sum, chain.act, *chain.identities}
    for node in reversed(list(graph.nodes)):
        if node in gone and not node.users:
            graph.erase_node(node)


def unfuse(model: nn.Module) -> None:
    """Gives every module the class it had."""
    for module in model.modules():
        if isinstance(module, Fused):
            if Fused in type(module).__bases__:  # nobody has put another class on top
                module.__class__ = original(type(module))
            vars(module).pop("_tribn_variants", None)
