"""The transformer: GPT-2 to LLaMA and everything between, chosen by toggles.

    from model import ModelConfig, Transformer
    model = Transformer(ModelConfig(vocab_size=4096, norm="layernorm", pos="learned", mlp="gelu"))
    logits, loss = model(idx, targets)            # idx, targets (B, T) int64; logits (B, T, vocab_size)

Toggles are decided when the model is built; `forward` has no if about them. An idea is one class and one
line: a norm in NORMS, a position scheme in POSITIONS, an MLP in MLPS, a residual layout in BLOCKS. masks.py
says which tokens a query sees, experts.py has the mixture of experts. Sizes are counted from the modules,
never written as formulas. Letters in shapes: B batch, T new tokens, S all tokens a query
may see (cache and new), C width, H heads, D head_dim, V vocabulary.
"""

import math
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cache import KVCache, positions
from config import check_choice, check_range
from dropout import Dropout, dropout
from experts import ExpertLinear, MoE, balance_loss, gated_width, recorded_routings
from masks import as_numbers, in_blocks, make_sight, with_previous
from products import Linear, joint_linear, product_dtype
from rope_scaling import rope_frequencies, rope_scale

LONGEST_WRITTEN_OUT = 1024  # tokens: from there on SDPA is nearly as fast, and it keeps no scores
LOGITS_AT_ONCE = 2**24  # that a chunked loss holds: 64 MB in float32


@dataclass
class ModelConfig:
    # fmt: off
    n_layer: int = 4             # blocks
    n_head: int = 4              # query heads
    n_kv_head: int = 0           # key and value heads: 0 = n_head (MHA), 1 = MQA, between = GQA (must divide n_head)
    n_embd: int = 128            # width
    head_dim: int = 0            # width of a head: 0 = n_embd / n_head
    n_inner: int = 0             # width inside the MLP: 0 = 4 n_embd, for swiglu 8/3 n_embd rounded up to 32
    block_size: int = 128        # context length, tokens
    vocab_size: int = 0          # the tokenizer's, filled in by the scripts
    norm: str = "rmsnorm"        # layernorm | rmsnorm
    norm_position: str = "pre"   # pre: x + f(norm(x)) | post: norm(x + f(x)), without a final norm
    norm_eps: float = 1e-5       # added to the variance or the mean of squares
    pos: str = "rope"            # learned | sinusoidal | rope | alibi | none
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    rope_scaling: str = "none"   # none | linear:FACTOR | ntk:FACTOR | yarn:... | llama3:..., see ROPE_SCALINGS
    window: int = 0              # tokens that a query in a windowed layer sees, itself included; 0 = all
    window_pattern: str = "S"    # one letter for each layer, repeated: S windowed | L full, as SSSL
    mlp: str = "swiglu"          # gelu | swiglu | moe
    n_expert: int = 8            # moe: MLPs in a layer, each a SwiGLU of width n_inner
    n_expert_per_token: int = 2  # moe: how many of them each token goes through
    norm_topk_prob: bool = True  # moe: the scores of a token's experts sum to 1 (Mixtral); False: as softmax gave them
    qk_norm: bool = True         # RMSNorm over each head's q and k, before rotation (as Qwen3)
    tie_embeddings: bool = True  # one matrix for the embedding and the output head
    bias: bool = False           # biases in every Linear but the head and moe's, and in LayerNorm
    dropout: float = 0.0         # on embeddings, attention weights and both residual branches
    # fmt: on

    def __post_init__(self):
        self.check_types()
        self.n_kv_head = self.n_kv_head or self.n_head
        check_range(
            self, "at least 1 and at most 1e7", "n_layer", "n_head", "n_kv_head", "n_embd", "block_size"
        )
        check_range(self, "at least 1 and at most 1e7", "n_expert", "n_expert_per_token")
        check_range(self, "at least 0 and at most 1e7", "head_dim", "n_inner", "vocab_size", "window")
        check_range(self, "at least 0 and below 1", "dropout")
        check_range(self, "above 0 and below inf", "norm_eps", "rope_theta")
        check_choice(self, "norm", NORMS)
        check_choice(self, "norm_position", BLOCKS)
        check_choice(self, "pos", POSITIONS)
        check_choice(self, "mlp", MLPS)
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}, or head_dim be given"
            )
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.n_expert_per_token > self.n_expert:
            raise ValueError(
                f"a token cannot go through n_expert_per_token={self.n_expert_per_token} of "
                f"n_expert={self.n_expert} experts"
            )
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(f"rope rotates pairs: head_dim={self.head_dim} must be even")
        if self.pos == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(
                f"window_pattern has an S (windowed) or L (full) a layer, not {self.window_pattern!r:.60}"
            )
        if len(self.window_pattern) > self.n_layer:
            raise ValueError(
                f"window_pattern={self.window_pattern:.60} has {len(self.window_pattern)} letters and "
                f"n_layer is {self.n_layer}"
            )
        if self.pos != "rope" and self.rope_scaling != "none":
            raise ValueError(f"rope_scaling={self.rope_scaling} stretches rope, and pos is {self.pos}")
        rope_frequencies(self)  # raises for a rope_scaling that it cannot read
        if not self.n_inner:
            inner_width = getattr(MLPS[self.mlp], "inner_width", None)
            self.n_inner = inner_width(self.n_embd) if inner_width else 4 * self.n_embd

    def window_of(self, layer):
        """Returns the window of a layer, 0 where it sees all tokens."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return self.window if letter == "S" else 0

    @property
    def what_ends_a_text(self):
        """Says why texts end at block_size; "" if they need not, because no layer ever sees that far."""
        position = POSITIONS[self.pos]
        if not self.window:
            return "window=0 lets all layers see the whole text"
        if "L" in self.window_pattern:
            return f"window_pattern={self.window_pattern} has layers that see the whole text"
        if position is not None and not getattr(position, "endless", False):
            return f"pos={self.pos} has no positions past block_size"
        return ""

    def check_types(self):
        """Raises ValueError for a value of the wrong type: a file from elsewhere may hold anything."""
        for field in fields(ModelConfig):
            value = getattr(self, field.name)
            is_whole_float = field.type is float and type(value) is int
            if type(value) is not field.type and not is_whole_float:
                raise ValueError(
                    f"{field.name} must be of type {field.type.__name__}, not {value!r:.60}"
                )


MODEL_KEYS = tuple(field.name for field in fields(ModelConfig))


def model_config(cfg):
    """Returns the ModelConfig in a script's config, which may have other keys too."""
    return ModelConfig(**{key: getattr(cfg, key) for key in MODEL_KEYS})


# -----------------------------------------------------------------------------------------------------
# Norms (Ba et al. 2016; Zhang & Sennrich 2019). A norm is built as Norm(dim, eps=, bias=)


def rms_norm(x, weight, eps):
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype. It is computed in
    float32 at least.
    """
    if x.dtype == weight.dtype and not torch.is_grad_enabled():
        # the same bits as below, sooner; with gradients the lines below are faster
        return F.rms_norm(x, weight.shape, weight, eps)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).type_as(x)


class RMSNorm(nn.Module):
    """RMSNorm with a gain and no bias, whatever `bias` says. rmsnorm.py has a faster way to train it on a processor,
    and a CUDA kernel (--rmsnorm=cuda); they are used only while they compute the same as this class.
    """

    def __init__(self, dim, eps, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm, computed in the dtype of its gain. On bfloat16 inputs a processor would add up the gradients of
    gain and bias in bfloat16: over 2,048 rows they are off by a twentieth (findings/layer_norm_bfloat16.sh).
    """

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).type_as(x)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


# -----------------------------------------------------------------------------------------------------
# Positions. A class has a `part`, where it acts:
#   "add"     forward(x, pos) returns the embeddings x (B, T, C) with positions pos (T,) or (B, T) added
#   "rotate"  forward(pos) returns the cos and sin that `rotate` turns q and k by
#   "bias"    forward(distance) returns what is added to scores, (H, T, S) or (B, H, T, S), for k's place minus q's
# and `endless = True` if it has positions past block_size too, for windows that never see that far


class LearnedPositions(nn.Embedding):
    """A learned vector a position, added to the embedding (GPT-2)."""

    part = "add"

    def __init__(self, c):
        super().__init__(c.block_size, c.n_embd)

    def forward(self, x, pos):
        return x + super().forward(pos)


class ComputedTable:
    """A table of cos or sin without an end: rows are computed when they are read, at positions ([B,] T), and
    multiplied by a scale, None for 1.
    """

    def __init__(self, function, frequencies, scale=None):
        self.function = function
        self.frequencies = frequencies
        self.scale = scale

    def __getitem__(self, pos):
        ones = [1] * self.frequencies.dim()
        rows = self.function(pos.view(*pos.shape, *ones) * self.frequencies.to(pos.device))
        return rows if self.scale is None else rows * self.scale


class Float32Buffers(nn.Module):
    """A module whose buffers stay float32 after model.to(dtype)."""

    def _apply(self, fn, recurse=True):
        exact = self._buffers.copy()
        super()._apply(fn, recurse)
        for name, x in exact.items():
            setattr(self, name, x.to(getattr(self, name).device))
        return self


class Float32Tables(Float32Buffers):
    """Two tables (block_size, n) of cos and sin, times a scale, which are never saved. Where texts need not end at
    block_size, their rows are computed instead.
    """

    endless = True

    def __init__(self, c, frequencies, scale=1.0):
        super().__init__()
        self.frequencies = frequencies
        self.scale = scale
        if not c.what_ends_a_text:
            self.cos = ComputedTable(torch.cos, frequencies, scale)
            self.sin = ComputedTable(torch.sin, frequencies, scale)
            return
        if torch.get_default_device().type == "meta":  # only sizes are wanted
            cos, sin = (torch.empty(c.block_size, len(frequencies)) for _ in range(2))
        else:
            # on the CPU whatever the default device is, so that their bits are the same everywhere
            places = torch.arange(c.block_size, dtype=torch.float32, device="cpu")
            angles = torch.outer(places, frequencies)
            cos, sin = angles.cos().mul_(scale), angles.sin_().mul_(scale)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not self._buffers:
            # there once for all steps: no CUDA graph copies what a processor holds
            device = fn(self.frequencies).device
            self.cos.frequencies = self.sin.frequencies = self.frequencies.to(device)
        return self


class SinusoidalPositions(Float32Tables):
    """Added to the embedding, which is scaled by sqrt(C) first (Vaswani et al. 2017, sections 3.4 and 3.5)."""

    part = "add"

    def __init__(self, c):
        exponents = torch.arange(0, c.n_embd, 2, dtype=torch.float32, device="cpu") / c.n_embd
        super().__init__(c, 10000.0**-exponents)

    def forward(self, x, pos):
        waves = torch.cat((self.sin[pos], self.cos[pos]), -1)
        return x * x.size(-1) ** 0.5 + waves.type_as(x)


class RoPE(Float32Tables):
    """Rotates q and k (Su et al. 2021), in the half-split layout of Hugging Face Llama: x[i] pairs with x[i + D/2]."""

    part = "rotate"

    def __init__(self, c):
        super().__init__(c, rope_frequencies(c), rope_scale(c))

    def forward(self, pos):
        """Returns cos and sin, each ([B, 1,] T, D), for positions (T,) or (B, T); the first half of the
        sines is negative.
        """
        cos, sin = self.cos[pos], self.sin[pos]
        if pos.dim() == 2:  # an axis for the heads
            cos, sin = cos[:, None], sin[:, None]
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Turns each pair of x (B, H, T, D) by its angle."""
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


class ALiBi(Float32Buffers):
    """Adds -slope * distance to scores, with a slope for each head (Press et al. 2021; for an H that is no
    power of 2, the authors' own rule).
    """

    part = "bias"
    endless = True

    def __init__(self, c):
        super().__init__()
        power = 2 ** math.floor(math.log2(c.n_head))
        slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
        slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (c.n_head - power), 2)]
        self.register_buffer("slopes", torch.tensor(slopes), persistent=False)

    def forward(self, distance):  # (T, S) -> (H, T, S), (B, 1, T, S) -> (B, H, T, S)
        return self.slopes[:, None, None] * distance


POSITIONS = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "rope": RoPE,
    "alibi": ALiBi,
    "none": None,
}


# -----------------------------------------------------------------------------------------------------
# Attention


class Context(NamedTuple):
    """What all layers share in one call: where its tokens stand, and which tokens each of them may see."""

    rotation: Any  # [cos, sin] for rotate(), or None
    sights: Any  # {window: Sight}
    cache: Any  # a KVCache, or None
    places: Any  # where the new tokens go in it

    def joint(self, layer):
        """Returns a layer's q, k and v weights as one matrix if the cache keeps them joined, else None."""
        return getattr(self.cache, "joint", {}).get(layer)


def attention(q, k, v, mask=None, is_causal=False, dropout_p=0.0):
    """Returns softmax(q k^T / sqrt(D) + mask) v for queries q (B, H, T, D), keys and values (B, n_kv_head,
    S, D), as F.scaled_dot_product_attention does.

    On a processor, training in bfloat16, PyTorch's function takes 2 to 5 times as long as the same steps written
    out, and still 1.2 times at 1,024 tokens; with dropout it writes them out itself and draws slowly (LOG.md). So
    there are two ways. To change the scores, by a cap or a sink, edit the second one and set is_written_out = True.
    """
    is_slow = q.dtype == torch.bfloat16 and q.size(-2) <= LONGEST_WRITTEN_OUT
    is_written_out = q.device.type == "cpu" and q.requires_grad and (is_slow or dropout_p > 0)
    n_kv_head = k.size(1)
    is_grouped = q.size(1) != n_kv_head
    # a token's queries of one KV head may be taken as several tokens' of one head: sooner but for a processor's float32
    is_folded = is_grouped and q.size(-2) == 1 and (q.is_cuda or q.dtype != torch.float32)
    if is_folded and not is_written_out:
        if mask is not None and mask.dim() > 2 and mask.size(-3) > 1:
            mask = mask.unflatten(-3, (n_kv_head, -1)).squeeze(-2)  # ([B,] n_kv_head, group, S)
        q = q.unflatten(1, (n_kv_head, -1)).squeeze(-2)  # (B, n_kv_head, group, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
        return y.flatten(1, 2).unsqueeze(-2)
    # on a GPU only cuDNN's takes groups under a mask, see device.one_shape; without it SDPA writes the scores out
    if is_written_out or is_grouped and mask is not None and q.device.type == "cuda":
        k, v = (x.repeat_interleave(q.size(1) // n_kv_head, 1) for x in (k, v))
        is_grouped = False
    if not is_written_out:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p, enable_gqa=is_grouped
        )
    T, S = q.size(-2), k.size(-2)
    if is_causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    scores = q * q.size(-1) ** -0.5 @ k.mT  # (B, H, T, S)
    if mask is not None and mask.dtype == torch.bool:
        mask = as_numbers(mask, q.dtype)
    if mask is not None:
        scores += mask
    return dropout(scores.softmax(-1), dropout_p) @ v


def attend(q, k, v, sight, dropout_p=0.0):
    """Returns what queries q (B, H, T, D) read from values v (B, n_kv_head, S, D) at keys k."""
    if not sight.block:
        return attention(q, k, v, sight.mask, sight.is_causal, dropout_p)
    B, _, T, _ = q.shape
    q, k, v = (in_blocks(x.transpose(1, 2), sight.block) for x in (q, k, v))  # (B, n, width, H, D)
    k, v = with_previous(k), with_previous(v)
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # (B n, H, width, D)
    copies = q.size(0) // sight.mask.size(0)  # without documents one mask serves all rows
    y = attention(q, k, v, sight.mask.repeat(copies, 1, 1, 1), False, dropout_p)
    y = y.transpose(1, 2).unflatten(0, (B, -1)).flatten(1, 2)  # (B, n width, H, D)
    return y[:, :T].transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention with n_head query and n_kv_head key and value heads (Ainslie et al. 2023
    between MHA and MQA).
    """

    def __init__(self, c, layer):
        super().__init__()
        self.layer = layer
        self.window = c.window_of(layer)
        self.head_dim = c.head_dim
        self.dropout = c.dropout
        self.q_proj = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.bias)
        self.k_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.bias)
        self.v_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        self.o_proj.into_residual = True  # see init_weights
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    @property
    def projections(self):
        return self.q_proj, self.k_proj, self.v_proj

    def forward(self, x, context):
        B, T, _ = x.shape
        q, k, v = joint_linear(x, self.projections, context.joint(self.layer))
        # q (B, H, T, D); k, v (B, n_kv_head, T, D)
        q = self.q_norm(q.view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(k.view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        if context.rotation is not None:
            q = rotate(q, *context.rotation)
            k = rotate(k, *context.rotation)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, context.places, k, v)  # (B, n_kv_head, S, D)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, context.sights[self.window], dropout)
        return self.o_proj(y.transpose(1, 2).flatten(2))


# -----------------------------------------------------------------------------------------------------
# MLPs. A class may have inner_width(n_embd), what n_inner=0 means for it (4 n_embd without), and sets
# into_residual = True on its last Linear, which is then drawn smaller


class GELU(nn.Module):
    """GPT-2's MLP, with its tanh approximation of GELU."""

    def __init__(self, c):
        super().__init__()
        self.up_proj = Linear(c.n_embd, c.n_inner, bias=c.bias)
        self.down_proj = Linear(c.n_inner, c.n_embd, bias=c.bias)
        self.down_proj.into_residual = True

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """LLaMA's MLP (Shazeer 2020): three matrices, so two thirds of the inner width for the same size."""

    inner_width = staticmethod(gated_width)

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.n_embd, c.n_inner, bias=c.bias)
        self.up_proj = Linear(c.n_embd, c.n_inner, bias=c.bias)
        self.down_proj = Linear(c.n_inner, c.n_embd, bias=c.bias)
        self.down_proj.into_residual = True

    def forward(self, x):
        gate, up = joint_linear(x, (self.gate_proj, self.up_proj), on_processor=False)
        return self.down_proj(F.silu(gate) * up)


MLPS = {"gelu": GELU, "swiglu": SwiGLU, "moe": MoE}


# -----------------------------------------------------------------------------------------------------
# Blocks. A layout is built as Block(config, layer); a final norm follows the last one unless the class
# has final_norm = False. With --rmsnorm=cuda, rmsnorm.py computes these two as long as the result is the same


class PreNorm(nn.Module):
    """Norms before each branch: the residual stream itself is never normed (GPT-2, LLaMA)."""

    def __init__(self, c, layer):
        super().__init__()
        self.norm1 = NORMS[c.norm](c.n_embd, eps=c.norm_eps, bias=c.bias)
        self.norm2 = NORMS[c.norm](c.n_embd, eps=c.norm_eps, bias=c.bias)
        self.attn = Attention(c, layer)
        self.mlp = MLPS[c.mlp](c)
        self.drop = Dropout(c.dropout)

    def forward(self, x, context):
        x = x + self.drop(self.attn(self.norm1(x), context))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return x


class PostNorm(PreNorm):
    """Norms after each sum, so the stream that leaves the last block is normed (Vaswani et al. 2017, the first GPT)."""

    final_norm = False

    def forward(self, x, context):
        x = self.norm1(x + self.drop(self.attn(x, context)))
        x = self.norm2(x + self.drop(self.mlp(x)))
        return x


BLOCKS = {"pre": PreNorm, "post": PostNorm}


# -----------------------------------------------------------------------------------------------------


def rows_at_once(vocab_size):
    """Returns of how many tokens a chunked loss holds the logits at once."""
    return max(1, LOGITS_AT_ONCE // vocab_size)


class Transformer(nn.Module):
    """A decoder-only language model. Attributes that are no part of the architecture:

    gradient_checkpointing: recompute each block in the backward pass; less memory, a third more time.
    chunked_loss: never hold all logits at once. A call with targets then returns no logits.
    balance: how much of balance_loss is added to the loss in training.
    quantization: how the integers are stored that quantized.py has put in place of matrices; None without.
    """

    gradient_checkpointing = False
    chunked_loss = False
    balance = 0.0
    quantization = None

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.vocab_size < 1:
            raise ValueError("vocab_size must be set: it is the tokenizer's")
        self.windows = sorted({c.window_of(layer) for layer in range(len(c.window_pattern))})
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.add_pos = self.build_position(c, "add")
        self.rotary = self.build_position(c, "rotate")
        self.score_bias = self.build_position(c, "bias")
        self.drop = Dropout(c.dropout)
        block = BLOCKS[c.norm_position]
        self.blocks = nn.ModuleList(block(c, layer) for layer in range(c.n_layer))
        self.norm = nn.Identity()
        if getattr(block, "final_norm", True):
            self.norm = NORMS[c.norm](c.n_embd, eps=c.norm_eps, bias=c.bias)
        self.head = Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.wte.weight
        self.init_weights()

    def build_position(self, c, part):
        """Returns the config's position scheme where it acts at this part, else None. Raises ValueError
        where it acts at none.
        """
        position = POSITIONS[c.pos]
        if position is None:
            return None
        if getattr(position, "part", None) not in ("add", "rotate", "bias"):
            raise ValueError(
                f"{position.__name__} must say its part: add, rotate or bias (see POSITIONS)"
            )
        return position(c) if position.part == part else None

    def init_weights(self):
        """Draws all Linears and Embeddings as GPT-2 does: N(0, 0.02), those that write into the residual stream
        smaller by sqrt(2 n_layer), biases 0. What else a class has, as a norm its gain of 1, stays as it made it.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, ExpertLinear)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if getattr(module, "into_residual", False):
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, idx, cache=None, doc=None):
        """Returns the final normed states (B, T, C) of tokens idx (B, T), which come after those in the
        cache.

        doc (B, T) int: a token sees only tokens of its own document, positions start anew in each, -1 is
        padding. Raises ValueError for tokens past block_size (unless texts need not end there) or past the
        cache's end.
        """
        B, T = idx.shape
        S = T
        if cache is None:
            places = torch.arange(T, device=idx.device)
            pos = places if doc is None else positions(doc)
            keys = dict.fromkeys(self.windows, (places, doc))
        else:
            places, pos, doc, keys = cache.begin(T, doc)
            S += cache.length
        # with documents this waits for the device, but only near the end of the context
        block_size = self.config.block_size
        is_past = S > block_size and self.config.what_ends_a_text
        if is_past and (doc is None or pos.max() >= block_size):
            longest = S if doc is None else int(pos.max()) + 1
            raise ValueError(f"{longest} tokens do not fit in block_size={block_size}")
        x = self.wte(idx)
        dtype = x.dtype
        sights = {
            window: make_sight(places, key_places, doc, key_doc, self.score_bias, dtype, window)
            for window, (key_places, key_doc) in keys.items()
        }
        if self.add_pos is not None:
            x = self.add_pos(x, pos)
        # autocast alone would keep x float32 and cast it at each product. In float16 x might overflow
        if product_dtype(x) == torch.bfloat16:
            x = x.bfloat16()
        if T == 1 and x.device.type in ("cpu", "cuda"):  # once, and not by SDPA in each layer
            for window, sight in sights.items():
                if sight.mask is not None and sight.mask.dtype == torch.bool:
                    sights[window] = sight._replace(mask=as_numbers(sight.mask, x.dtype))
        x = self.drop(x)
        rotation = None
        if self.rotary is not None:
            rotation = [table.type_as(x) for table in self.rotary(pos)]
        context = Context(rotation, sights, cache, places)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    # What generate.generate calls; onnx_model.OnnxModel has the same
    @property
    def device(self):
        return self.example.device

    @property
    def example(self):
        """A tensor with the device and dtype of the states: the embedding, or a scale of integers."""
        tensors = chain(self.parameters(), self.buffers())
        return next(x for x in tensors if x.is_floating_point())

    def new_cache(self, batch_size, max_len):
        """Returns an empty KVCache for batch_size rows of up to max_len tokens."""
        return KVCache(self, batch_size, max_len)

    def next_logits(self, idx, cache=None, doc=None):
        """Returns logits (B, V) of what comes after the last of tokens idx (B, T); cache and doc as in hidden."""
        return self.logits(self.hidden(idx, cache, doc)[:, -1])

    def logits(self, x):
        """Returns the logits (..., V) of final states x (..., C). All logits come from here."""
        return self.head(x)

    def token_nats(self, x, targets):
        """Returns -log p (R,) of targets (R,) after final states x (R, C), in nats; 0 for a target of -100."""
        return F.cross_entropy(self.logits(x).float(), targets, reduction="none")

    def chunked_nats(self, x, targets):
        """Returns what token_nats does, and holds LOGITS_AT_ONCE logits at most, which the backward pass makes again
        (Chen et al. 2016). Not by torch's linear_cross_entropy, which adds up in bfloat16
        (findings/linear_cross_entropy_chunks.sh).
        """
        rows = rows_at_once(self.config.vocab_size)
        if len(x) <= rows:
            return self.token_nats(x, targets)
        device = x.device.type
        chunks = zip(x.split(rows), targets.split(rows))
        # without a cache each chunk casts the weight by itself, and their gradients are added up in float32; with
        # --shard=full in bfloat16 they are not, as the weight comes rounded
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            nats = [
                checkpoint(self.token_nats, *chunk, use_reentrant=False, preserve_rng_state=False)
                for chunk in chunks
            ]
        return torch.cat(nats)

    def forward(self, idx, targets=None, cache=None, doc=None, reduction="mean"):
        """Returns (logits, loss): logits (B, T, V); loss None without targets, else cross-entropy in
        nats over targets (B, T).

        The loss is -log p, in evaluation too: what is added in training alone goes into Pretraining.loss
        (train.py). Targets of -100 do not count. reduction: mean | sum | none, where none gives (B, T). balance
        changes the gradient of a mean or a sum, and never its value.
        """
        with recorded_routings(self) as routings:
            x = self.hidden(idx, cache, doc)
        if targets is None:
            return self.logits(x), None
        logits = None
        if self.chunked_loss:
            loss = self.chunked_nats(x.flatten(0, 1), targets.flatten())
            if reduction != "none":
                loss = loss.sum()
            if reduction == "mean":
                loss = loss / (targets != -100).sum()
        else:
            logits = self.logits(x)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
        if reduction == "none":
            return logits, loss.view_as(targets)
        if routings and self.balance and self.training:
            balance = self.balance * balance_loss(routings, targets, doc, reduction)
            loss = loss + (balance - balance.detach())
        return logits, loss
