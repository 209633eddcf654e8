"""What bench.py quantize runs: what 8 and 4 bits lose, how large they are and how fast they write."""

import copy
import functools
import io

import torch

import checkpoint
import dataset
import quantize
import quantized
from benches.decode import begun_steps, timed_steps
from benches.step import build_model
from config import Refusal
from device import fast_bfloat16, name_of, resolve
from race import ms_columns, race
from score import bits_per_nat, evaluate


def held_out(cfg, model):
    """Returns (rows of ids to look at, ids of the held-out text, how many bits a byte one nat a token is). Where
    init_from's own data is not here, returns random ids, None and None, and prints why.
    """
    T = model.config.block_size
    reason = "weights are random"
    if cfg.init_from != "scratch":
        start = checkpoint.open_checkpoint(cfg.init_from)
        try:
            meta, data, tokenizer = dataset.load_data(dataset.data_folder(start), start)
            settings = quantize.Config(to="nowhere")
            rows = quantize.read_rows(settings, data, "", tokenizer, T)
            return rows, data["val"], bits_per_nat(meta["splits"]["val"])
        except Refusal as e:
            reason = str(e)
    print(f"without losses: {reason}")
    return torch.randint(model.config.vocab_size, (8, T)), None, None


def quantized_models(cfg, model, rows):
    """Yields (name, model) for each way to store a float model's weights: float32 first."""
    yield "float32", model
    ways = {"int8 rtn": dict(method="rtn", bits=8)}
    ways |= {f"int4 {method}": dict(method=method, bits=4) for method in quantized.METHODS}
    ways["int4 gptq act_order"] = dict(method="gptq", bits=4, act_order=True)
    for name, way in ways.items():
        size = cfg.group_size if way["bits"] == 4 else 0
        settings = quantize.Config(to="nowhere", group_size=size, **way)
        try:
            quantized.check_matrices(model, settings.group_size)
        except ValueError as e:
            print(f"without {name}: {e}")
            continue
        numbers = copy.deepcopy(model)
        codes, _ = quantize.quantize_model(numbers, settings, None if settings.method == "rtn" else rows)
        quantization = quantized.Quantization(settings.bits, settings.group_size, settings.method)
        yield name, quantized.quantized(numbers, quantization, codes)


def torchao_models(cfg, model, dtype):
    """Yields (name, model) of what torchao makes of a float model's matrices, where it is installed, for products
    in dtype: of 8 bits, and with bfloat16 also of 4 with a head of 8, as ours are. The embedding stays float.
    """
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        print("without torchao: pip install torchao")
        return
    numbers = copy.deepcopy(model).to(dtype)
    quantize_(numbers, Int8WeightOnlyConfig())
    yield "torchao int8", numbers
    if dtype != torch.bfloat16:
        return
    numbers = copy.deepcopy(model).to(dtype)
    quantize_(numbers.blocks, PrototypeInt4WeightOnlyConfig(group_size=cfg.group_size))
    quantize_(numbers, Int8WeightOnlyConfig(), lambda module, _: module is numbers.head)
    yield "torchao int4", numbers


def file_bytes(model):
    """Returns how large a file of the model's weights is."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def stored_models(cfg, compute, model, rows):
    """Yields (name, model, bytes of its file, the dtype to time it in) for each way to store a model's weights."""
    fast = compute.dtype
    if cfg.dtype == "auto" and quantized.has_kernels(cfg) and fast_bfloat16(compute.device):
        fast = torch.bfloat16
    for name, other in quantized_models(cfg, model, rows):
        size = file_bytes(other)
        yield name, other.float(), size, fast if other.quantization else compute.dtype
    for name, other in torchao_models(cfg, model, fast):
        yield name, other, file_bytes(other), fast


def bench_quantize(cfg, compute):
    """Compares a model's weights in 8 and 4 bits, by quantize.py, with float32: bits a byte on about
    eval_tokens of held-out text, the size of their file, and greedy tokens/s, one row, on a CPU in bfloat16
    where that is what sample.py takes. torchao's, where it is installed, are evaluated in that dtype too.

    of_gap is how much of what rounding to the nearest loses at 4 bits a method wins back.
    """
    model = build_model(cfg).eval()
    rows, ids, bits_a_byte = held_out(cfg, model)
    T = model.config.block_size
    plain = resolve("cpu", "float32", "false")
    n = min(64, T // 2)
    n_read, n_timed = timed_steps(compute.device, n)
    sizes, losses, rivals, dtypes = {}, {}, {}, {}
    for name, other, size, dtype in stored_models(cfg, compute, model, rows):
        sizes[name] = size
        dtypes[name] = dtype
        losses[name] = None
        if ids is not None:
            nats = evaluate(other, ids, T, cfg.batch_size, plain, cfg.eval_tokens)
            losses[name] = nats * bits_a_byte
        other = copy.deepcopy(other).to(compute.device, dtype)
        rivals[name] = (functools.partial(begun_steps, other, [[0]], n, n_read), list)
    times = race(rivals, cfg.seconds, compute.device)
    exact, nearest = losses["float32"], losses.get("int4 rtn")
    for name, rival_times in times.items():
        loss = losses[name]
        is_better = name.startswith(("int4 gptq", "int4 awq")) and loss is not None
        yield {
            "weights": name,
            "bits_per_byte": loss,
            "more": loss / exact - 1 if loss is not None and name != "float32" else None,
            "of_gap": (nearest - loss) / (nearest - exact) if is_better else None,
            "mb": sizes[name] / 1e6,
            "of_float32": sizes[name] / sizes["float32"],
            "dtype": name_of(dtypes[name]),
            "tokens_per_s": n_timed / rival_times["median"],
            **ms_columns(rival_times),
        }
