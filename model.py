"""The transformer: GPT-2 to LLaMA and everything between, chosen by toggles, and the KV cache.

    from model import KVCache, ModelConfig, Transformer
    model = Transformer(ModelConfig(vocab_size=4096, norm="layernorm", pos="learned", mlp="gelu"))
    logits, loss = model(idx, targets)                    # idx, targets (B, T) int64; logits (B, T, vocab_size)

Every toggle is decided when the model is built; `forward` has no if about them. Adding a norm is a class and a line in NORMS.
Letters in shapes: B batch, T new tokens, S all tokens a query may see (cache and new), C width, H heads, D head_dim, V vocabulary.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import rmsnorm

HAS_CHUNKED_LOSS = hasattr(nn, "LinearCrossEntropyOptions")  # from torch 2.13 on


@dataclass
class ModelConfig:
    n_layer: int = 4             # blocks
    n_head: int = 4              # query heads
    n_kv_head: int = 0           # key and value heads: 0 = n_head (MHA), 1 = MQA, between = GQA (must divide n_head)
    n_embd: int = 128            # width
    head_dim: int = 0            # width of a head: 0 = n_embd / n_head
    n_inner: int = 0             # width inside the MLP: 0 = 4 n_embd, for swiglu 8/3 n_embd rounded up to 32
    block_size: int = 128        # context length, tokens
    vocab_size: int = 0          # the tokenizer's; a script fills it in
    norm: str = "rmsnorm"        # layernorm | rmsnorm
    norm_position: str = "pre"   # pre: x + f(norm(x)) | post: norm(x + f(x)), without a final norm
    norm_eps: float = 1e-5       # added to the variance or the mean of squares
    pos: str = "rope"            # learned | sinusoidal | rope | alibi | none
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    rope_scaling: str = "none"   # none | linear:FACTOR | llama3:FACTOR,LOW_FREQ_FACTOR,HIGH_FREQ_FACTOR,ORIGINAL_CONTEXT
    mlp: str = "swiglu"          # gelu | swiglu
    qk_norm: bool = True         # RMSNorm over each head's q and k, before rotation (as Qwen3)
    tie_embeddings: bool = True  # one matrix for the embedding and the output head
    bias: bool = False           # biases in every Linear but the head, and in LayerNorm
    dropout: float = 0.0         # on embeddings, attention weights and both residual branches

    def __post_init__(self):
        for f in fields(self):  # a file that was not written here may hold anything
            if type(value := getattr(self, f.name)) is not f.type and (f.type, type(value)) != (float, int):
                raise ValueError(f"{f.name} must be of type {f.type.__name__}, not {value!r:.60}")
        self.n_kv_head = self.n_kv_head or self.n_head
        for key, least in ("n_layer", 1), ("n_head", 1), ("n_kv_head", 1), ("n_embd", 1), ("head_dim", 0), ("block_size", 1), ("n_inner", 0), ("vocab_size", 0):
            if not least <= getattr(self, key) <= 10 ** 7:
                raise ValueError(f"{key} must be at least {least} and at most ten million, not {getattr(self, key)}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}, or head_dim be given")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        for key, choices in ("norm", NORMS), ("norm_position", BLOCKS), ("mlp", MLPS), ("pos", POSITIONS):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} must be one of {' | '.join(choices)}, not {getattr(self, key)!r}")
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(f"rope rotates pairs: head_dim={self.head_dim} must be even")
        if self.pos == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.norm_eps <= 0 or self.rope_theta <= 0:
            raise ValueError("norm_eps and rope_theta must be above 0")
        rope_frequencies(self)
        if not self.n_inner:
            self.n_inner = 4 * self.n_embd if self.mlp == "gelu" else math.ceil(8 * self.n_embd / 3 / 32) * 32


# ---------------------------------------------------------------------------------------------------------------------
# Norms (Ba et al. 2016; Zhang & Sennrich 2019)

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in float32 at least, returned in x's dtype."""

    ops = rmsnorm.TORCH  # or rmsnorm.CUDA: see use_rmsnorm

    def __init__(self, dim, eps, bias=False):  # bias: for LayerNorm's signature; this norm never has one
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return self.ops.norm(x, self.weight, self.eps)

    def add(self, x, a):
        """(x + a, its norm)."""
        return self.ops.add_norm(x, a, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def add(self, x, a):
        x = x + a
        return x, self(x)


def use_rmsnorm(model, ops):
    """Has each RMSNorm of a model computed by rmsnorm.TORCH or rmsnorm.CUDA. A run-time switch: the weights are the same."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.ops = ops


def choose_rmsnorm(model, setting, compute):
    """use_rmsnorm, by a setting auto | torch | cuda; returns what to say of it. The first process builds the kernel, the others find it built."""
    if compute.first:
        rmsnorm.choose(setting, compute.device)
    compute.wait()
    ops, said = rmsnorm.choose(setting, compute.device)
    use_rmsnorm(model, ops)
    return said and f", {said}"


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


# ---------------------------------------------------------------------------------------------------------------------
# Positions: each choice fills one of three places, and leaves None in the others

class LearnedPositions(nn.Embedding):
    """Added to the embedding (GPT-2)."""

    def __init__(self, c):
        super().__init__(c.block_size, c.n_embd)

    def forward(self, x, pos):
        return x + super().forward(pos)


class Float32Tables(nn.Module):
    """Two float32 tables (block_size, n) of cos and sin: never saved, and float32 whatever model.to(dtype) does."""

    def __init__(self, c, frequencies):
        super().__init__()
        self.frequencies = frequencies
        angles = torch.outer(torch.arange(c.block_size, dtype=torch.float32, device="cpu"), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _apply(self, fn, recurse=True):
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self


class SinusoidalPositions(Float32Tables):
    """Added to the embedding, which is scaled by sqrt(C) first (Vaswani et al. 2017, sections 3.4 and 3.5)."""

    def __init__(self, c):
        super().__init__(c, 10000.0 ** (-torch.arange(0, c.n_embd, 2, dtype=torch.float32, device="cpu") / c.n_embd))

    def forward(self, x, pos):
        return x * x.size(-1) ** 0.5 + torch.cat((self.sin[pos], self.cos[pos]), -1).type_as(x)


class RoPE(Float32Tables):
    """Rotates q and k (Su et al. 2021), in the half-split layout of Hugging Face Llama: x[i] pairs with x[i + D/2]."""

    def __init__(self, c):
        super().__init__(c, rope_frequencies(c))

    def at(self, pos):
        """cos and sin for positions (T,) or (B, T), with an axis for the heads: ([B, 1,] T, D). The first half of the sines is negative."""
        cos, sin = (self.cos[pos], self.sin[pos]) if pos.dim() == 1 else (self.cos[pos][:, None], self.sin[pos][:, None])
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):  # x (B, H, T, D)
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)


def rope_frequencies(c):
    """The angle a position adds to each pair, float32 (D/2,), after rope_scaling (Llama 3's is by wavelength)."""
    freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim)
    kind, _, numbers = c.rope_scaling.partition(":")
    try:
        numbers = [float(n) for n in numbers.split(",") if n]
    except ValueError:
        numbers = []
    if kind == "linear" and len(numbers) == 1 and numbers[0] > 0:
        freq = freq / numbers[0]
    elif kind == "llama3" and len(numbers) == 4 and min(numbers) > 0 and numbers[1] < numbers[2]:
        factor, low, high, original = numbers
        turns = original * freq / (2 * math.pi)  # full rotations over the context of pre-training
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelengths, left alone; 0: long ones, stretched
        freq = keep * freq + (1 - keep) * freq / factor
    elif c.rope_scaling != "none":
        raise ValueError(f"rope_scaling must be none, linear:FACTOR or llama3:FACTOR,LOW,HIGH,CONTEXT, not {c.rope_scaling!r}")
    return freq


class ALiBi(nn.Module):
    """Biases scores by -slope * distance, a slope a head (Press et al. 2021; the authors' rule where H is no power of 2)."""

    def __init__(self, c):
        super().__init__()
        p = 2 ** math.floor(math.log2(c.n_head))
        slopes = [2 ** (-8 * (i + 1) / p) for i in range(p)]
        slopes += [2 ** (-4 * (i + 1) / p) for i in range(0, 2 * (c.n_head - p), 2)]
        self.slopes = slopes

    def forward(self, q_pos, k_pos):  # (T,), (S,) -> (H, T, S)
        slopes = torch.tensor(self.slopes, device=q_pos.device)
        return slopes[:, None, None] * (k_pos - q_pos[:, None])


POSITIONS = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions, "rope": RoPE, "alibi": ALiBi, "none": None}


# ---------------------------------------------------------------------------------------------------------------------
# Attention and the KV cache

class KVCache:
    """Keys and values of the tokens seen so far: a buffer pair a layer [B, n_kv_head, max_len, D], written in place.

    One generation makes one. `length` tokens are in it; model.hidden moves it on when all layers have written.
    """

    def __init__(self, model, batch_size, max_len):
        c, p = model.config, model.wte.weight
        shape = batch_size, c.n_kv_head, max_len, c.head_dim
        self.k = [torch.zeros(shape, dtype=p.dtype, device=p.device) for _ in range(c.n_layer)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.length, self.max_len = 0, max_len
        self.doc = None  # (B, max_len) once a document or padding was named: which one each token belongs to

    def update(self, layer, k, v):
        """Stores k, v (B, n_kv_head, T, D) of new tokens; returns those of all tokens (B, n_kv_head, S, D), as views."""
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def update_doc(self, doc, B, T):
        """Stores doc (B, T) of new tokens, None meaning that each row goes on with its last; returns all (B, S) or None."""
        if self.length + T > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens: {self.length} are in it and {T} more do not fit")
        if doc is None and self.doc is None:
            return None
        if self.doc is None:
            self.doc = torch.zeros(B, self.max_len, dtype=torch.long, device=doc.device)
        if doc is None:
            doc = self.doc[:, max(self.length - 1, 0), None]
        self.doc[:, self.length:self.length + T] = doc
        return self.doc[:, :self.length + T]

    def rewind(self, n):
        """Forgets the last n tokens."""
        if not 0 <= n <= self.length:
            raise ValueError(f"cannot rewind {n} tokens: the cache holds {self.length}")
        self.length -= n


def attention_mask(start, T, doc, alibi, dtype, device):
    """The one mask rule: (mask, is_causal) for T new tokens after `start` cached ones.

    SDPA's is_causal aligns queries and keys at the first token, so it is right only when there is nothing in the cache.
    A lone query sees everything. All else gets a mask from absolute positions: boolean, or ALiBi's biases with -inf.
    A padding token (doc -1) sees the padding before it: nobody reads what it computes, but it must not be nan.
    """
    if doc is None and alibi is None and (T == 1 or start == 0):
        return None, T > 1
    q, k = torch.arange(start, start + T, device=device), torch.arange(start + T, device=device)
    mask = k <= q[:, None]  # (T, S)
    if doc is not None:
        mask = (mask & (doc[:, start:, None] == doc[:, None, :]))[:, None]  # (B, 1, T, S)
    if alibi is not None:
        mask = alibi(q, k).masked_fill(~mask, -math.inf).to(dtype)  # ([B,] H, T, S)
    return mask, False


def positions(doc):
    """Each token's place in its own document: (B, S) -> (B, S). A document is a run of equal numbers."""
    t = torch.arange(doc.size(1), device=doc.device)
    new = torch.ones_like(doc, dtype=torch.bool)
    new[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return t - torch.where(new, t, 0).cummax(dim=1).values


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.D, self.dropout = layer, c.head_dim, c.dropout
        self.grouped = c.n_kv_head != c.n_head
        self.q_proj = nn.Linear(c.n_embd, c.n_head * self.D, bias=c.bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * self.D, bias=c.bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * self.D, bias=c.bias)
        self.o_proj = nn.Linear(c.n_head * self.D, c.n_embd, bias=c.bias)
        self.q_norm = RMSNorm(self.D, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.D, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos_sin, mask, is_causal, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.D)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.D)).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = self.v_proj(x).view(B, T, -1, self.D).transpose(1, 2)
        if cos_sin is not None:
            q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, n_kv_head, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=self.grouped,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------------------------------
# MLPs and blocks

class GELU(nn.Module):
    """GPT-2's MLP, with its tanh approximation of GELU."""

    def __init__(self, c):
        super().__init__()
        self.up_proj = nn.Linear(c.n_embd, c.n_inner, bias=c.bias)
        self.down_proj = nn.Linear(c.n_inner, c.n_embd, bias=c.bias)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """LLaMA's MLP (Shazeer 2020): three matrices, so two thirds of the inner width for the same size."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.n_inner, bias=c.bias)
        self.up_proj = nn.Linear(c.n_embd, c.n_inner, bias=c.bias)
        self.down_proj = nn.Linear(c.n_inner, c.n_embd, bias=c.bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


MLPS = {"gelu": GELU, "swiglu": SwiGLU}


class PreNorm(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.norm1, self.norm2 = (NORMS[c.norm](c.n_embd, eps=c.norm_eps, bias=c.bias) for _ in range(2))
        self.attn, self.mlp = Attention(c, layer), MLPS[c.mlp](c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, *where):
        h, x = self.norm2.add(x, self.drop(self.attn(self.norm1(x), *where)))
        return h + self.drop(self.mlp(x))


class PostNorm(PreNorm):
    def forward(self, x, *where):
        x = self.norm1.add(x, self.drop(self.attn(x, *where)))[1]
        return self.norm2.add(x, self.drop(self.mlp(x)))[1]


BLOCKS = {"pre": PreNorm, "post": PostNorm}


# ---------------------------------------------------------------------------------------------------------------------

class Transformer(nn.Module):
    """A decoder-only language model. Two run-time switches, not part of the architecture, are plain attributes:
    gradient_checkpointing (recompute each block in the backward pass: less memory, a third more time) and
    chunked_loss (never hold all logits at once; then a call with targets returns no logits)."""

    gradient_checkpointing = False
    chunked_loss = False

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.vocab_size < 1:
            raise ValueError("vocab_size must be set: it is the tokenizer's")
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.add_pos = POSITIONS[c.pos](c) if c.pos in ("learned", "sinusoidal") else None
        self.rope = RoPE(c) if c.pos == "rope" else None
        self.alibi = ALiBi(c) if c.pos == "alibi" else None
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(BLOCKS[c.norm_position](c, layer) for layer in range(c.n_layer))
        self.norm = NORMS[c.norm](c.n_embd, eps=c.norm_eps, bias=c.bias) if c.norm_position == "pre" else nn.Identity()
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self):
        """GPT-2's: N(0, 0.02), the projections into the residual stream smaller by sqrt(2 n_layer), biases 0.
        Norms start by themselves: gains 1, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for module in block.attn.o_proj, block.mlp.down_proj:
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, idx, cache=None, doc=None):
        """The final normed states (B, T, C) of tokens idx (B, T), which come after those in the cache.

        doc (B, T) int: a token sees only tokens of its own document, positions restart in each, -1 is padding.
        Raises ValueError past block_size or the end of the cache.
        """
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        if cache is not None:
            doc = cache.update_doc(doc, B, T)
        if doc is None:
            pos = torch.arange(start, start + T, device=idx.device)
            if start + T > self.config.block_size:
                raise ValueError(f"{start + T} tokens do not fit in block_size={self.config.block_size}")
        else:
            pos = positions(doc)[:, start:]
        mask, is_causal = attention_mask(start, T, doc, self.alibi, self.wte.weight.dtype, idx.device)
        cos_sin = self.rope.at(pos) if self.rope is not None else None
        x = self.wte(idx)
        x = self.drop(self.add_pos(x, pos) if self.add_pos is not None else x)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, cos_sin, mask, is_causal, cache, use_reentrant=False)
            else:
                x = block(x, cos_sin, mask, is_causal, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    # What sample.generate calls; onnx_model.OnnxModel has the same
    @property
    def device(self):
        return self.wte.weight.device

    def new_cache(self, batch_size, max_len):
        return KVCache(self, batch_size, max_len)

    def next_logits(self, idx, cache, doc=None):
        """Logits (B, V) of what comes after the last of tokens idx (B, T); cache and doc as in hidden."""
        return self.head(self.hidden(idx, cache, doc)[:, -1])

    def forward(self, idx, targets=None, cache=None, doc=None, reduction="mean"):
        """(logits, loss): logits (B, T, V); loss None without targets, else cross-entropy in nats over targets (B, T).

        targets of -100 do not count. reduction: mean | sum | none, the last giving (B, T).
        """
        x = self.hidden(idx, cache, doc)
        if targets is None:
            return self.head(x), None
        logits, flat = None, targets.flatten()
        if self.chunked_loss:
            loss = F.linear_cross_entropy(x.flatten(0, 1), self.head.weight, flat, reduction=reduction,
                                          options=nn.LinearCrossEntropyOptions())
        else:
            logits = self.head(x)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), flat, reduction=reduction)
        return logits, loss.view_as(targets) if reduction == "none" else loss


# ---------------------------------------------------------------------------------------------------------------------
# Sizes

def num_params(model, positions=True):
    """Parameters, a tied matrix counted once; positions=False leaves out a learned position table, as nanoGPT does."""
    n = sum(p.numel() for p in model.parameters())
    return n if positions or model.config.pos != "learned" else n - model.add_pos.weight.numel()


def num_weights(c):
    """Parameters in matrices, from the config alone; without a learned position table."""
    inside = c.n_embd * (2 * c.head_dim * (c.n_head + c.n_kv_head) + (2 if c.mlp == "gelu" else 3) * c.n_inner)
    return c.n_layer * inside + (1 if c.tie_embeddings else 2) * c.vocab_size * c.n_embd


def flops_per_token(model, T):
    """Floating-point operations of training on one token at context T, forward and backward (PaLM, appendix B):
    6 for each weight that is multiplied (the embedding look-up is none), 12 H D T a layer for scores, not halved for causality."""
    c = model.config
    look_ups = 0 if c.tie_embeddings else model.wte.weight.numel()
    return 6 * (num_params(model, positions=False) - look_ups) + 12 * c.n_layer * c.n_head * c.head_dim * T


def kv_cache_bytes(c, batch_size, length, bytes_per_number=2):
    """Bytes of the keys and values of `length` tokens."""
    return 2 * c.n_layer * batch_size * c.n_kv_head * length * c.head_dim * bytes_per_number
