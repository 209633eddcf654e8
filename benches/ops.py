"""What bench.py rmsnorm and attention run: single operations against torch's own."""

import functools
import itertools
import math
import time

import torch
import torch.nn.functional as F

import rmsnorm
import rmsnorm_build
from device import fast_bfloat16, name_of, one_shape
from graphs import WARM_UP, Graph, without_cast_cache
from measure import draw, large_tensor, peak_memory, to_megabytes
from race import ms_columns, race, synchronize

LAUNCHES = 100  # calls over which a launch is timed


@functools.cache
def rmsnorm_kinds(device):
    """Returns {name: rmsnorm.Ops}, our implementations of RMSNorm that work on the device.

    Prints, once, why a GPU does without the CUDA kernel.
    """
    kinds = {"torch": rmsnorm.TORCH}
    if device.type == "cpu":
        kinds["cpu"] = rmsnorm.CPU
    if device.type == "cuda":
        missing = rmsnorm_build.load()
        if missing:
            print(f"without the CUDA kernel: {missing}")
        else:
            kinds["cuda"] = rmsnorm.CUDA
    return kinds


def race_both_ways(functions, inputs, gradients, seconds, device):
    """Times functions of the inputs, the forward and the backward pass alone.

    gradients: those of the outputs. On a GPU replays of a CUDA graph are timed, as the launch of a small kernel
    takes longer than the kernel. Returns {(way, name): times}, the times as race() returns them, with "host",
    the seconds in which a call is launched, None on a processor.
    """
    import torch._functorch.config

    # n: calls in a graph, several, as its launch too takes longer than a small kernel; untimed: calls before replays
    n, untimed = (10, WARM_UP) if device.type == "cuda" else (1, 0)
    times = {}
    # A compiled backward pass that may reuse its buffers refuses to run twice
    with torch._functorch.config.patch(donated_buffer=False):
        for way in "forward", "backward":
            graphs = {}
            host_seconds = {}
            for name, function in functions.items():
                graph = Graph(None, device)
                work = work_of(way, function, inputs, gradients, graph)
                with without_cast_cache():  # as in the graph, or it would be compiled twice
                    host_seconds[name] = launch_seconds(work, device)
                graph.function = functools.partial(repeat, work, n)
                graphs[name] = graph
            for name, result in race(graphs, seconds / 2, device, untimed).items():
                times[way, name] = {key: value / n for key, value in result.items()}
                times[way, name]["host"] = host_seconds[name]
    return times


def work_of(way, function, inputs, gradients, graph):
    """Returns what a graph is to replay, a function without arguments: the forward pass, or the backward pass alone."""
    forward = functools.partial(function, *inputs)
    if way == "forward":
        return forward
    with graph.beside():  # a backward pass runs on the stream of its forward pass
        outputs = forward()
    return functools.partial(torch.autograd.grad, outputs, inputs, gradients, retain_graph=True)


def repeat(work, n):
    for _ in range(n):
        work()


def launch_seconds(function, device):
    """Returns the seconds that the processor takes to launch a call on a GPU, without waiting for it; else None."""
    if device.type != "cuda":
        return None
    function()
    synchronize(device)
    start = time.perf_counter()
    repeat(function, LAUNCHES)
    seconds = (time.perf_counter() - start) / LAUNCHES
    synchronize(device)
    return seconds


def forward_and_backward(function, inputs, gradients):
    """Returns the outputs of a function, then the gradients of its inputs."""
    outputs = function(*inputs)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, inputs, gradients)]


def to_microseconds(seconds):
    return None if seconds is None else 1e6 * seconds


def to_float64(x):
    if x.device.type == "mps":  # which has no float64
        x = x.cpu()
    return x.double()


def relative_error(tensor, reference):
    difference = to_float64(tensor) - reference
    return (difference.norm() / reference.norm()).item()


def relative_errors(functions, exact, inputs, gradients):
    """Returns {name: error}, the largest ||f - exact|| / ||exact|| among outputs and gradients.

    The function `exact` is computed in float64.
    """
    exact_inputs = [to_float64(x.detach()).requires_grad_() for x in inputs]
    exact_gradients = [to_float64(gradient) for gradient in gradients]
    references = forward_and_backward(exact, exact_inputs, exact_gradients)
    errors = {}
    for name, function in functions.items():
        tensors = forward_and_backward(function, inputs, gradients)
        errors[name] = max(map(relative_error, tensors, references))
    return errors


# -----------------------------------------------------------------------------------------------------
# rmsnorm


def norm_shapes(cfg, device):
    """Returns (rows, hidden) of the tensors to norm: the model's own first."""
    shapes = [(cfg.batch_size * cfg.block_size, cfg.n_embd)]
    if device.type != "cuda":
        return [*shapes, (4096, 1024)]
    memory = torch.cuda.mem_get_info(device)[1]
    n_rows = 32768 if memory > 40e9 else 4096
    return shapes + [(n_rows, hidden) for hidden in (1024, 2048, 4096, 8192)]


def norm_dtypes(cfg, compute):
    if cfg.dtype != "auto":
        return [compute.dtype]
    if fast_bfloat16(compute.device):
        return [torch.bfloat16, torch.float32]
    if compute.device.type == "cuda":
        return [torch.float16, torch.float32]
    return [torch.float32]


def measure_copy(device):
    """Returns the bytes a second that a plain copy reads and writes."""
    source = large_tensor(device)
    target = large_tensor(device)
    times = race({"copy": functools.partial(target.copy_, source)}, 0.5, device)
    speed = 2 * source.nbytes / times["copy"]["median"]
    print(f"a copy of 256 MB: {speed / 1e9:,.1f} GB/s read and written")
    return speed


def least_traffic(x, weight):
    """Returns {(operation, way): bytes} that must be read and written."""
    size = x.nbytes
    inv_rms = 4 * len(x)  # one float32 a row
    forward = inv_rms + weight.nbytes
    backward = inv_rms + 2 * weight.nbytes  # the weight and its gradient
    return {
        ("norm", "forward"): 2 * size + forward,  # x -> y
        ("norm", "backward"): 3 * size + backward,  # dy, x -> dx
        ("add", "forward"): 4 * size + forward,  # x, a -> h, y
        ("add", "backward"): 4 * size + backward,  # dy, dh, h -> dx
    }


def print_limits(shape, traffic, copy_speed):
    """Prints how long each operation would take at the speed of a copy, bytes a second."""
    limits = []
    for (operation, way), size in traffic.items():
        milliseconds = 1e3 * size / copy_speed
        limits.append(f"{operation} {way} {size / 1e6:.4g} MB in {milliseconds:.3g} ms")
    print(f"{shape}: at the speed of a copy {', '.join(limits)}")


def stock_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


STOCK = rmsnorm.separate(stock_norm)


def norm_rivals(compute):
    """Returns {name: rmsnorm.Ops}: torch's own, compiled too where compute says so, and ours."""
    rivals = {"F.rms_norm": STOCK}
    if compute.compile:
        torch.compiler.reset()
        compiled = [torch.compile(function, dynamic=False) for function in STOCK]
        rivals["compiled"] = rmsnorm.Ops(*compiled)
    for kind, ops in rmsnorm_kinds(compute.device).items():
        rivals[f"ours, {kind}"] = ops
    return rivals


def norm_rows(cfg, compute, n_rows, hidden, dtype, copy_speed, seconds):
    """Yields the table's rows for one shape and dtype. copy_speed: bytes a second."""
    device = compute.device
    eps = cfg.norm_eps
    torch.manual_seed(cfg.seed)
    x, a, dy, dh = (torch.randn(n_rows, hidden, device=device).to(dtype) for _ in range(4))
    weight = 1 + 0.1 * torch.randn(hidden, device=device)
    weight = weight.to(dtype)  # in x's dtype: otherwise F.rms_norm leaves its fused path
    for tensor in x, a, weight:
        tensor.requires_grad_()

    traffic = least_traffic(x, weight)
    print_limits(f"{n_rows} x {hidden} {name_of(dtype)}", traffic, copy_speed)
    rivals = norm_rivals(compute)
    norms = {name: functools.partial(ops.norm, eps=eps) for name, ops in rivals.items()}
    adds = {name: functools.partial(ops.add_norm, eps=eps) for name, ops in rivals.items()}
    operations = (
        ("norm", norms, (x, weight), (dy,)),
        ("add", adds, (x, a, weight), (dh, dy)),
    )
    for operation, functions, inputs, gradients in operations:
        times = race_both_ways(functions, inputs, gradients, seconds / 2, device)
        errors = relative_errors(functions, functions["ours, torch"], inputs, gradients)
        for (way, name), rival_times in times.items():
            size = traffic[operation, way]
            speed = size / rival_times["median"]
            yield {
                "what": operation,
                "way": way,
                "rows": n_rows,
                "hidden": hidden,
                "dtype": name_of(dtype),
                "by": name,
                **ms_columns(rival_times),
                "host_us": to_microseconds(rival_times["host"]),
                "bytes": size,
                "gb_per_s": speed / 1e9,
                "of_copy": speed / copy_speed,
                "error": errors[name],
            }


def bench_rmsnorm(cfg, compute):
    """Times RMSNorm, and the sum with its norm (add), against torch's.

    gb_per_s counts the bytes that must move, of_copy is that speed as a share of a plain copy's; host_us is how
    long the launch of a call takes on a GPU.
    """
    rmsnorm_kinds(compute.device)  # builds the kernel
    copy_speed = measure_copy(compute.device)
    shapes = norm_shapes(cfg, compute.device)
    dtypes = norm_dtypes(cfg, compute)
    seconds = cfg.seconds / len(shapes) / len(dtypes)
    rows = []
    for (n_rows, hidden), dtype in itertools.product(shapes, dtypes):
        rows += norm_rows(cfg, compute, n_rows, hidden, dtype, copy_speed, seconds)
    norms = [row for row in rows if row["what"] == "norm"]
    drawn = [row for row in norms if row["dtype"] == name_of(dtypes[0])]
    draw(cfg, compute.device, "rmsnorm", drawn, x="hidden", y="of_copy", by=("by", "way"))
    return rows


# -----------------------------------------------------------------------------------------------------
# attention


def explicit_attention(q, k, v):
    """Returns causal attention of q, k, v (..., T, D), by its matrix of scores."""
    T = q.size(-2)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def attention_rows(cfg, compute, length, seconds):
    device = compute.device
    functions = {
        "sdpa": functools.partial(F.scaled_dot_product_attention, is_causal=True),  # as in model.py
        "explicit": explicit_attention,
    }
    torch.manual_seed(cfg.seed)
    shape = (1, cfg.n_head, length, cfg.head_dim)
    *inputs, dy = (torch.randn(shape, device=device).to(compute.dtype) for _ in range(4))
    for tensor in inputs:
        tensor.requires_grad_()
    times = race_both_ways(functions, inputs, [dy], seconds, device)

    # In float64 the scores of 8,192 tokens are large
    short_inputs = [x.detach()[:, :, :1024].clone().requires_grad_() for x in inputs]
    short_dy = dy[:, :, :1024]
    errors = relative_errors(functions, explicit_attention, short_inputs, [short_dy])
    peaks = {}
    for name, function in functions.items():
        work = functools.partial(forward_and_backward, function, inputs, [dy])
        peaks[name] = peak_memory(device, work)
    return [
        {
            "way": way,
            "tokens": length,
            "by": name,
            **ms_columns(rival_times),
            "against_sdpa": rival_times["median"] / times[way, "sdpa"]["median"],
            "peak_mb": to_megabytes(peaks[name]),
            "error": errors[name],
        }
        for (way, name), rival_times in times.items()
    ]


def bench_attention(cfg, compute):
    """Times causal attention over length, one row.

    sdpa is scaled_dot_product_attention, as model.py calls it; explicit has the matrices written out.
    """
    lengths = (128, 256, 512, 1024)
    if compute.device.type == "cuda":
        lengths = (512, 1024, 2048, 4096, 8192)
    rows = []
    for length in lengths:
        rows += one_shape()(attention_rows)(cfg, compute, length, cfg.seconds / len(lengths))
    draw(cfg, compute.device, "attention", rows, x="tokens", y="ms", by=("by", "way"))
    return rows
