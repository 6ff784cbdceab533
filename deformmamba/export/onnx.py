"""Exports programs to ONNX files that ONNX Runtime runs at the speed of its operators.

`torch.export` traces the model with `VisionMambaBlock`, `ModulatedDeformBlock` and `PatchEmbed` as one opaque operator
each; this module writes the graphs of those blocks. So a trace takes seconds, the deformable
convolution is ONNX's `DeformConv`, and the selective scan is optimised for speed:

One `Scan` runs all directions and channels. Its body computes `STEPS` time steps: the step sizes dt, exp(dt A) and
dt u B as one operation each, then one multiplication and one addition per step, then C . h as one batched matrix
product. Measured in ONNX Runtime on one core for the whole `SS2D` (72 channels, 8 states, 4 directions, 12,288 pixels):
4.8 and 4.4 ns a state in two runs with 32 steps a body; 5.2 and 5.7 in the same runs with the projections and the
reversal of the walks back outside of the body. Other programs ran at the same time.

The variant "linear-attention" writes each scan as one operator instead: LinearAttention of opset 27 with the rule
"gated", S[t] = exp(g[t]) S[t-1] + k[t] v[t], y[t] = q[t] . S[t]. Every channel is a head with N states and one value:
g = dt A, k = B (Euler) or phi B (zero-order hold), v = dt u or u, q = C. ONNX Runtime also has this operator for GPUs,
where a Scan of thousands of steps is slow.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deformmamba.layers import SS2D, ChannelAttention, ModulatedDeformBlock, PatchEmbed, VisionMambaBlock
from deformmamba.torch_private import without_fake_tensor_cache

OPSETS = {"scan": 20, "linear-attention": 27}  # by variant; DeformConv needs 19, LinearAttention 27
STEPS = 32  # time steps in the body of a Scan
# 2 artanh(z) / z as a polynomial of z^2 up to 1/9: Chebyshev interpolation, relative error 1.7e-7
ARTANH = (1.9999996802662279, 0.6667584866935501, 0.3959318567539399, 0.34203619366077115)
LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Identity, nn.SiLU)  # PyTorch's layers that this module can write
DOMAIN = "deformmamba"  # namespace of the opaque operators, which are all replaced before the file is written

Value = Any  # an onnx_ir.Value; onnx_ir is imported where it is used


class Opaque(nn.Module):
    """Replaces a block during the trace: an operator whose attribute is the block's number."""

    def __init__(self, number: int, block: nn.Module) -> None:
        super().__init__()
        self.number = number
        self.patch = 1
        self.channels: int | None = None  # as many as in
        if isinstance(block, PatchEmbed):
            self.patch, self.channels = block.patch, block.project.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to the block's shape."""
        b, c, h, w = x.shape
        shape = (b, self.channels or c, h // self.patch, w // self.patch)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Block", (x,), {"number": self.number}, dtype=x.dtype, shape=shape, version=1
        )


def hide_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Replaces each block that this module can write, in place; returns (name, block) by number."""
    hidden: list[tuple[str, nn.Module]] = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            if _writer(child) is not None:
                setattr(parent, name, Opaque(len(hidden), child))
                hidden.append((prefix + name, child))
            else:
                visit(child, f"{prefix}{name}.")

    visit(module, "")
    return hidden


def _writer(block: nn.Module) -> Callable[..., Value] | None:
    """The function that writes this block; None: PyTorch's exporter writes it."""
    for layer in block.modules():
        known = type(layer) in LAYERS or type(layer).__module__ == "deformmamba.layers"
        if not known or layer._forward_hooks or layer._forward_pre_hooks:
            return None
    if (
        type(block) is VisionMambaBlock
        and type(block.attention) in (ChannelAttention, nn.Identity)
        and type(block.pointwise) in (nn.Conv2d, nn.Identity)
    ):
        return _vision_mamba
    if (
        type(block) is ModulatedDeformBlock
        and block.stride == 1
        and block.weight.shape[0] == block.channels
        and block.norm is None
        and (block.activation is None or type(block.activation) is nn.SiLU)
    ):
        return _deform
    if type(block) is PatchEmbed:
        return _patch_embed
    return None


def write(
    program: torch.export.ExportedProgram,
    hidden: Sequence[tuple[str, nn.Module]],
    path: Path,
    names: Sequence[str],
    facts: dict[str, str],
    defaults: dict[str, np.ndarray],
    variant: str = "scan",
) -> None:
    """Writes the program of a module that `hide_blocks` has changed.

    Args:
        program: of `torch.export.export`.
        hidden: the result of `hide_blocks`.
        path: the file.
        names: of the inputs; the output is "sr".
        facts: becomes the file's metadata.
        defaults: values that inputs have if they are not given (ONNX: an initializer of the input's name).
        variant: a key of `OPSETS`.
    """
    import onnx_ir as ir

    # ONNX Runtime optimizes when it loads; onnxscript's optimizer takes minutes and gains nothing on top
    with without_fake_tensor_cache():  # PyTorch traces the program once more
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            optimize=False,
            input_names=list(names),
            output_names=["sr"],
            opset_version=OPSETS["scan"],
        )
    assert exported is not None
    graph = exported.model.graph
    for node in list(graph):
        if node.domain == DOMAIN:
            name, block = hidden[node.attributes["number"].as_int()]
            nodes = Nodes(graph, name, attention=variant == "linear-attention")
            writer = _writer(block)
            assert writer is not None
            with torch.no_grad():
                result = writer(nodes, block, node.inputs[0])
            output = node.outputs[0]
            result.name, result.shape, result.type = output.name, output.shape, output.type
            ir.convenience.replace_nodes_and_values(graph, node, [node], nodes.made, [output], [result])
    exported.model.opset_imports.pop(DOMAIN, None)
    # the operators that PyTorch writes have only got more types since
    exported.model.opset_imports[""] = OPSETS[variant]
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    for value in graph.inputs:
        if value.name in defaults:
            value.const_value = ir.tensor(defaults[value.name], name=value.name)
            graph.register_initializer(value)
    # PyTorch notes for every node the lines of the source that made it: a quarter of the file, with paths
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    exported.model.metadata_props.update(facts)
    exported.save(path, external_data=False)


class Nodes:
    """Makes nodes of one block, and the constants that they need.

    Attributes:
        made: the nodes, in order.
        attention: write scans as LinearAttention, not as Scan.
    """

    def __init__(self, graph: Any, prefix: str, *, attention: bool = False) -> None:
        self.made: list[Any] = []
        self.attention = attention
        self._graph, self._prefix = graph, prefix
        self._known: dict[bytes, Value] = {}

    def __call__(self, kind: str, *inputs: Value | None, outputs: int = 1, **attributes: Any) -> Any:
        """The output of a new node, or all of them if there are several."""
        import onnx_ir as ir

        given = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        node = ir.node(kind, given, attributes=attributes, num_outputs=outputs, name=f"{self._prefix}/{len(self.made)}")
        for k, value in enumerate(node.outputs):
            value.name = f"{node.name}.{k}"
        self.made.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(self, value: Any) -> Value:
        """An initializer: a tensor, or integers as int64 and floating-point numbers as float32."""
        import onnx_ir as ir

        if isinstance(value, Tensor):
            array = value.detach().contiguous().numpy()
        else:
            array = np.asarray(value)
            array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        key = f"{array.dtype} {array.shape}".encode() + array.tobytes()
        if key not in self._known:
            name = f"{self._prefix}.constant{len(self._known)}"
            made = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
            made.dtype = ir.DataType.from_numpy(array.dtype)
            self._graph.register_initializer(made)
            self._known[key] = made
        return self._known[key]

    def linear(self, x: Value, layer: nn.Linear) -> Value:
        """`layer` over the last axis."""
        y = self("MatMul", x, layer.weight.mT)
        return y if layer.bias is None else self("Add", y, layer.bias)

    def norm(self, x: Value, layer: nn.LayerNorm) -> Value:
        """`layer` over the last axis."""
        return self("LayerNormalization", x, layer.weight, layer.bias, axis=-1, epsilon=layer.eps)

    def silu(self, x: Value) -> Value:
        return self("Mul", x, self("Sigmoid", x))

    def conv(self, x: Value, layer: nn.Conv2d) -> Value:
        """`layer` on (b, c, h, w)."""
        pads, dilations, strides = ([int(n) for n in t] for t in (layer.padding, layer.dilation, layer.stride))
        return self(
            "Conv", x, layer.weight, layer.bias, kernel_shape=list(layer.kernel_size), pads=pads * 2,
            dilations=dilations, strides=strides, group=layer.groups,
        )  # fmt: skip


def _deform(nodes: Nodes, block: ModulatedDeformBlock, x: Value) -> Value:
    kernel = list(block.weight.shape[2:])
    offset, mask = nodes("Split", nodes.conv(x, block.offset_mask), [2 * block.taps, block.taps], outputs=2, axis=1)
    bias = torch.zeros(len(block.weight)) if block.bias is None else block.bias
    y = nodes(
        "DeformConv", x, block.weight, offset, bias, nodes("Sigmoid", mask), kernel_shape=kernel,
        pads=[block.padding] * 4, dilations=[block.dilation] * 2, strides=[1, 1],
        group=block.channels // block.weight.shape[1], offset_group=block.taps // (kernel[0] * kernel[1]),
    )  # fmt: skip
    return y if block.activation is None else nodes.silu(y)


def _patch_embed(nodes: Nodes, block: PatchEmbed, x: Value) -> Value:
    """A matrix product of patches: a convolution with kernel = stride = 4 and 16 channels gives wrong numbers in
    oneDNN's bfloat16, which OpenVINO uses on CPUs with AMX."""
    size, layer = block.patch, block.project
    width = layer.in_channels * size
    # not SpaceToDepth: of images whose size is computed by padding, OpenVINO (2026.4) makes empty ones with it
    x = nodes("Reshape", nodes("Transpose", x, perm=[0, 2, 3, 1]), [0, 0, -1, width])  # (b, h, w / size, (column, c))
    x = nodes("Reshape", nodes("Transpose", x, perm=[0, 2, 1, 3]), [0, 0, -1, size * width])  # (b, w', h', (row, ...))
    patches = nodes("Transpose", x, perm=[0, 2, 1, 3])
    matrix = layer.weight.permute(2, 3, 1, 0).reshape(-1, layer.out_channels)  # (row, column, channel)
    y = nodes("Add", nodes("MatMul", patches, matrix), layer.bias)
    return nodes("Transpose", nodes.norm(y, block.norm), perm=[0, 3, 1, 2])


def _vision_mamba(nodes: Nodes, block: VisionMambaBlock, x: Value) -> Value:
    z = nodes.norm(nodes("Transpose", x, perm=[0, 2, 3, 1]), block.norm)
    inner = nodes("Transpose", nodes.linear(z, block.inner), perm=[0, 3, 1, 2])
    inner = nodes.conv(inner, block.depthwise)
    if isinstance(block.pointwise, nn.Conv2d):
        inner = nodes.conv(inner, block.pointwise)
    inner = nodes("Transpose", nodes.silu(inner), perm=[0, 2, 3, 1])
    context = nodes.norm(scan_2d(nodes, block.ss2d, inner), block.inner_norm)
    mixed = nodes.linear(nodes("Mul", context, nodes.silu(nodes.linear(z, block.gate))), block.out)
    if isinstance(block.attention, ChannelAttention):
        mean = nodes("ReduceMean", mixed, [1, 2], keepdims=1)
        weight = nodes.linear(nodes("Relu", nodes.linear(mean, block.attention.squeeze)), block.attention.excite)
        mixed = nodes("Mul", mixed, nodes("Sigmoid", weight))
    return nodes("Add", x, nodes("Transpose", mixed, perm=[0, 3, 1, 2]))


def scan_2d(nodes: Nodes, block: SS2D, u: Value) -> Value:
    """`SS2D` of (b, h, w, d). Names of sizes: k directions, d channels, n states, r ranks, L = h * w steps."""
    k, d = block.directions, block.channels
    b, h, w, _ = nodes("Split", nodes("Shape", u), [1, 1, 1, 1], outputs=4, axis=0)
    length = nodes("Mul", h, w)
    shape = nodes("Concat", length, b, [d], axis=0)
    by_rows = nodes("Transpose", u, perm=[1, 2, 0, 3])
    walks = [nodes("Reshape", by_rows, shape)]
    if k == 4:
        # without this Reshape, ONNX Runtime fuses both transposes into one, and that one takes nine times as long
        pixels = nodes("Reshape", by_rows, nodes("Concat", h, w, [-1], axis=0))
        walks.append(nodes("Reshape", nodes("Transpose", pixels, perm=[1, 0, 2]), shape))
    rows, *columns = (_attention if nodes.attention else _scan)(nodes, block, walks, length, b)
    total = nodes("Reshape", rows, nodes("Concat", h, w, b, [d], axis=0))
    for column in columns:
        turned = nodes("Reshape", column, nodes("Concat", w, h, b, [d], axis=0))
        total = nodes("Add", total, nodes("Transpose", turned, perm=[1, 0, 2, 3]))
    return nodes("Add", nodes("Transpose", total, perm=[2, 0, 1, 3]), nodes("Mul", u, block.D.view(k, d).sum(0)))


def _backwards(nodes: Nodes, x: Value) -> Value:
    """`x` with axis 1 reversed."""
    return nodes("Slice", x, [-1], [np.iinfo(np.int64).min], [1], [-1])


def _projected(nodes: Nodes, block: SS2D, u: Value) -> list[Value]:
    """(k, L, d) to the low-rank step sizes (k, L, r), B (k, L, n) and C (k, L, n)."""
    n, r = block.d_state, block.dt_rank
    low, B, C = nodes("Split", nodes("MatMul", u, block.x_proj.mT), [r, n, n], outputs=3, axis=-1)
    return [low, B, C]


def _step_sizes(nodes: Nodes, block: SS2D, low: Value) -> Value:
    """softplus(dt_proj low + dt_bias) of (k, L, r): (k, L, d).

    softplus(x) = relu(x) + log(1 + e) with e = exp(-|x|), and log(1 + e) = 2 artanh(z) with z = e / (e + 2).
    ONNX Runtime's own Softplus and Log take several times as long.
    """
    x = nodes("Add", nodes("MatMul", low, block.dt_proj.mT), block.dt_bias.view(block.directions, 1, -1))
    e = nodes("Exp", nodes("Neg", nodes("Abs", x)))
    z = nodes("Div", e, nodes("Add", e, 2.0))
    square = nodes("Mul", z, z)
    series = nodes.constant(ARTANH[-1])
    for coefficient in ARTANH[-2::-1]:
        series = nodes("Add", nodes("Mul", square, series), coefficient)
    return nodes("Add", nodes("Relu", x), nodes("Mul", z, series))


def _decay(block: SS2D) -> Tensor:
    """A as (k, 1, 1, d, n)."""
    return -block.A_log.exp().view(block.directions, 1, 1, block.channels, block.d_state)


def _scan(nodes: Nodes, block: SS2D, walks: list[Value], length: Value, b: Value) -> list[Value]:
    """Each walk (L, b, d) there and, if k > 1, back, and the sum of both; one Scan for all.

    Its inputs are cut into chunks along axis 0, the only one that ONNX Runtime cuts without a copy.
    """
    k, d, n = block.directions, block.channels, block.d_state
    # zeros at the end, up to a multiple of STEPS: a walk back begins with them, and they leave its state at zero
    missing = nodes("Mod", nodes("Neg", length), [STEPS])
    zeros = nodes("ConstantOfShape", nodes("Concat", missing, b, [d], axis=0))
    shape = nodes("Concat", [-1, 1, STEPS], b, [d], axis=0)
    chunks = [nodes("Reshape", nodes("Concat", walk, zeros, axis=0), shape) for walk in walks]
    start = nodes("ConstantOfShape", nodes("Concat", [k, 1], b, [n, d], axis=0))
    directions = [0] * len(walks) + [1] * (k - len(walks))
    _, *ys = nodes(
        "Scan", start, *chunks, *chunks[: k - len(walks)], outputs=1 + k, body=_body(nodes, block), num_scan_inputs=k,
        scan_input_directions=directions, scan_output_directions=directions,
    )  # fmt: skip
    if k > 1:
        ys = [nodes("Add", there, back) for there, back in zip(ys[: k // 2], ys[k // 2 :], strict=True)]
    flat = nodes("Concat", [-1], b, [d], axis=0)
    return [nodes("Slice", nodes("Reshape", y, flat), [0], length, [0]) for y in ys]


def _attention(nodes: Nodes, block: SS2D, walks: list[Value], length: Value, b: Value) -> list[Value]:
    """As `_scan`, with a LinearAttention over (k, L * b, ...)."""
    k, d, n = block.directions, block.channels, block.d_state
    zoh = block.discretization == "zoh"
    walk = nodes("Concat", [1], length, b, [d], axis=0)
    there = nodes("Concat", *(nodes("Reshape", x, walk) for x in walks), axis=0)
    walked = nodes("Concat", there, _backwards(nodes, there), axis=0) if k > 1 else there
    u = nodes("Reshape", walked, [k, -1, d])
    low, B, C = _projected(nodes, block, u)
    dt, A = _step_sizes(nodes, block, low), _decay(block)

    def sequences(x: Value, *last: int) -> Value:
        """(k, L * b, ...) to (k, b, L, ...)."""
        split = nodes("Reshape", x, nodes("Concat", [k, -1], b, list(last), axis=0))
        return nodes("Transpose", split, perm=[0, 2, 1, *range(3, 3 + len(last))])

    step = sequences(dt, d, 1)
    exponent = nodes("Mul", step, A)
    ones = torch.ones(d, 1)
    query, key = (nodes("Mul", sequences(x, 1, n), ones) for x in (C, B))
    if zoh:
        key = nodes("Mul", key, _hold(nodes, step, exponent, nodes("Exp", exponent), A))
    heads = nodes("Concat", nodes("Mul", b, [k]), [-1, d * n], axis=0)
    values = nodes("Concat", nodes("Mul", b, [k]), [-1, d], axis=0)
    value = nodes("Reshape", sequences(u if zoh else nodes("Mul", dt, u), d), values)
    query, key, exponent = (nodes("Reshape", x, heads) for x in (query, key, exponent))
    y, _ = nodes(
        "LinearAttention", query, key, value, None, exponent, outputs=2,
        q_num_heads=d, kv_num_heads=d, update_rule="gated", scale=1.0,
    )  # fmt: skip
    y = nodes("Transpose", nodes("Reshape", y, nodes("Concat", [k], b, [-1, d], axis=0)), perm=[0, 2, 1, 3])
    if k > 1:
        there, back = nodes("Split", y, [k // 2, k // 2], outputs=2, axis=0)
        y = nodes("Add", there, _backwards(nodes, back))
    return list(nodes("Split", y, [1, 1], outputs=2, axis=0)) if k == 4 else [y]


def _body(outer: Nodes, block: SS2D) -> Any:
    """The body of the Scan: STEPS steps from state (k, 1, b, n, d), with a chunk (1, STEPS, b, d) of each direction.

    All that follows from the inputs is computed here, where it stays in the processor's cache. Chunks of the walks back
    are taken in reverse order by the Scan, and their steps are reversed here.
    """
    import onnx_ir as ir

    k, d, n = block.directions, block.channels, block.d_state
    name = f"{outer.made[-1].name}.body"
    nodes = Nodes(outer._graph, name)

    def given(what: str, *shape: Any) -> Value:
        return ir.Value(name=f"{name}.{what}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    def joined(values: list[Value], axis: int) -> Value:
        return nodes("Concat", *values, axis=axis) if len(values) > 1 else values[0]

    def split(value: Value, parts: int, axis: int) -> list[Value]:
        return list(nodes("Split", value, [1] * parts, outputs=parts, axis=axis)) if parts > 1 else [value]

    state = first = given("state", k, 1, "b", n, d)
    chunks = [given(f"u{i}", 1, STEPS, "b", d) for i in range(k)]
    there = (k + 1) // 2
    walked = chunks[:there]
    if k > 1:
        walked = [*walked, _backwards(nodes, joined(chunks[there:], 0))]
    flat = nodes("Reshape", joined(walked, 0), [k, -1, d])
    low, B, C = _projected(nodes, block, flat)
    u = nodes("Reshape", flat, [k, STEPS, -1, 1, d])
    dt = nodes("Reshape", _step_sizes(nodes, block, low), [k, STEPS, -1, 1, d])
    B, C = nodes("Reshape", B, [k, STEPS, -1, n, 1]), nodes("Reshape", C, [k, STEPS, -1, 1, n])
    zoh, A = block.discretization == "zoh", _decay(block).mT
    x = u if zoh else nodes("Mul", dt, u)
    exponent = nodes("Mul", dt, A)
    decay = nodes("Exp", exponent)
    entering = nodes("Mul", B, x)
    if zoh:
        entering = nodes("Mul", entering, _hold(nodes, dt, exponent, decay, A))
    states = []
    for a, e in zip(split(decay, STEPS, 1), split(entering, STEPS, 1), strict=True):
        state = nodes("Add", nodes("Mul", a, state), e)
        states.append(state)
    y = nodes("Reshape", nodes("MatMul", C, joined(states, 1)), [k, STEPS, -1, d])
    if k > 1:
        y, back = nodes("Split", y, [there, there], outputs=2, axis=0)
        ys = [*split(y, there, 0), *split(_backwards(nodes, back), there, 0)]
    else:
        ys = [y]
    outputs = [nodes("Identity", state), *ys]
    for value in outputs:
        value.dtype = ir.DataType.FLOAT
    return ir.Graph([first, *chunks], outputs, nodes=nodes.made, name=name)


def _hold(nodes: Nodes, dt: Value, exponent: Value, decay: Value, A: Tensor) -> Value:
    """phi of `reference.discretize` for exact zero-order hold."""
    small = nodes("Less", nodes("Abs", exponent), 0.2)
    near = nodes("Where", small, exponent, 0.0)
    series = nodes.constant(1.0)
    for m in range(8, 1, -1):  # the next term is below 0.2^8 / 9! = 7e-12
        series = nodes("Add", nodes("Mul", series, nodes("Mul", near, 1 / m)), 1.0)
    far = nodes("Div", nodes("Sub", decay, 1.0), A)
    return nodes("Where", small, nodes("Mul", dt, series), far)


def newest_opset() -> int:
    """The newest opset of the installed onnx."""
    import onnx.defs

    return int(onnx.defs.onnx_opset_version())


def runner(path: Path, threads: int | None = None) -> Callable[[dict[str, Tensor]], Tensor]:
    """The file as a function of its inputs by name, in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    known = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}

    def run(inputs: dict[str, Tensor]) -> Tensor:
        given = {name: x.numpy() for name, x in inputs.items() if name in known}
        return torch.from_numpy(session.run(["sr"], given)[0])

    return run
