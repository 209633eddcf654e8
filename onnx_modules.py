"""A model in the forms that onnx_graph.py traces: Graph(model), with nodes that any runtime has, and FusedGraph(model),
with onnxruntime's own attention, for which keys and values stay where they are.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from masks import attention_mask
from model import ComputedTable
from onnx_model import older_than

MICROSOFT = "com.microsoft"  # onnxruntime's own operators
FUSED_STEP = 16  # head_dim must be a multiple of it, for GroupQueryAttention to rotate heads
LEAST_GROUP = 16  # the fewest inputs that may share a scale in QMoE
EXPERTS_LEAST = "1.32"  # the first onnxruntime whose QMoE was tried


def compute_tables(tables, frequencies, scale=None):
    """Puts ComputedTables in the place of the cos and sin of a model.Float32Tables."""
    del tables.cos, tables.sin  # they are buffers, for which no other type may be set
    tables.cos = ComputedTable(torch.cos, frequencies, scale)
    tables.sin = ComputedTable(torch.sin, frequencies, scale)


def join(*linears):
    """Returns one Linear that gives the outputs of several Linears of one input, one after the other."""
    width = sum(linear.out_features for linear in linears)
    joined = nn.Linear(linears[0].in_features, width, bias=linears[0].bias is not None)
    states = [linear.state_dict() for linear in linears]
    joined.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
    return joined


class JoinedHeads(nn.Module):
    """The parts of a model.Attention, with one product for q, k and v."""

    def __init__(self, c, attn):
        super().__init__()
        self.config = c
        self.qkv_proj = join(attn.q_proj, attn.k_proj, attn.v_proj)
        self.o_proj = attn.o_proj
        self.q_norm = attn.q_norm
        self.k_norm = attn.k_norm


class JoinedAttention(JoinedHeads):
    """Computes what model.Attention does, in fewer nodes: a node costs time even for a single token.

    All heads are rotated together, those of v by an angle of 0. The weights of q hold the scale of the
    scores. x @ roll is x.roll(D / 2) in one node.
    """

    def __init__(self, c, attn, roll):
        scaled = attn.q_norm if c.qk_norm else attn.q_proj  # which has the last weights on the way to q
        for parameter in scaled.parameters():
            parameter.data /= math.sqrt(c.head_dim)
        super().__init__(c, attn)
        self.roll = roll

    def forward(self, x, context):
        """Maps states (T * B, C) to states (T * B, C), after a past k and v, each (P, B, G, D).

        context is (cos and sin, mask, past k and v, present). The k and v of all tokens, each (P + T, B, G, D),
        are appended to the list present.
        """
        cos_sin, mask, past, present = context
        c = self.config
        H, G, D = c.n_head, c.n_kv_head, c.head_dim
        B = past[0].size(1)
        heads = self.qkv_proj(x).view(-1, B, H + 2 * G, D)  # (T, B, heads, D)
        if c.qk_norm:
            q, k, v = heads.split((H, G, G), 2)
            heads = torch.cat((self.q_norm(q), self.k_norm(k), v), 2)
        if cos_sin is not None:
            cos, sin = cos_sin
            heads = heads * cos + heads @ self.roll * sin  # model.rotate
        q, k, v = heads.split((H, G, G), 2)
        k = torch.cat((past[0], k))
        v = torch.cat((past[1], v))
        present += [k, v]

        q = q.permute(1, 2, 0, 3)  # no node: onnxruntime makes permutations a part of its products
        if H != G:  # a group's queries follow each other, so that k and v are not copied for each
            q = q.reshape(B, G, -1, D)
        scores = q @ k.permute(1, 2, 3, 0) + mask
        y = scores.softmax(-1) @ v.permute(1, 2, 0, 3)
        if H != G:
            y = y.reshape(B, H, -1, D)
        return self.o_proj(y.permute(2, 0, 1, 3).reshape(-1, H * D))


class JoinedSwiGLU(nn.Module):
    """Computes what model.SwiGLU does, with one product for gate and up."""

    def __init__(self, mlp):
        super().__init__()
        self.both_proj = join(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj

    def forward(self, x):
        gate, up = self.both_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


def computes_silu(mlp):
    """Returns whether an MLP computes what JoinedSwiGLU does: it may have been changed in model.py."""
    x = torch.linspace(0, 9, 2 * mlp.up_proj.in_features).sin().view(2, -1)
    with torch.no_grad():
        expected = mlp(x)
        return (JoinedSwiGLU(mlp)(x) - expected).norm() <= 1e-4 * expected.norm()


class DenseMoE(nn.Module):
    """Computes what experts.MoE does, but each expert on each token, most of them weighted by 0: two products
    with all experts side by side, and nothing is sorted.
    """

    def __init__(self, moe):
        super().__init__()
        n_expert, n_inner, n_embd = moe.up_proj.weight.shape
        self.n_expert = n_expert
        self.route = moe.route
        self.both_proj = nn.Linear(n_embd, 2 * n_expert * n_inner, bias=False)
        self.down_proj = nn.Linear(n_expert * n_inner, n_embd, bias=False)
        both = torch.cat((moe.gate_proj.weight.flatten(0, 1), moe.up_proj.weight.flatten(0, 1)))
        self.both_proj.weight.data = both.detach()
        self.down_proj.weight.data = moe.down_proj.weight.detach().transpose(0, 1).flatten(1)
        self.router = moe.router  # a part of route

    def forward(self, x):
        """Maps states (..., C) to states (..., C)."""
        # of two axes, as such products keep the names of their weights: by its name a router stays float32
        tokens = x.flatten(0, -2)
        routing, scores = self.route(tokens)
        weights = torch.zeros_like(routing.probabilities).scatter(1, routing.experts, scores)
        gate, up = self.both_proj(tokens).chunk(2, -1)
        inner = (F.silu(gate) * up).view(-1, self.n_expert, gate.size(1) // self.n_expert)
        y = self.down_proj((inner * weights[..., None]).flatten(1))
        return y if x.dim() == 2 else y.view(x.shape)  # in Graph no node between a product and its sum


def additive_mask(model, P, T, window):
    """Returns what JoinedAttention adds to the scores of T new tokens after P others, in a layer with this window:
    0 or biases, and -inf.

    The shape is (T, P + T), with ALiBi (H, T, P + T). Where H / G query heads share keys, their tokens
    follow each other: (H / G * T, P + T), with ALiBi (G, H / G * T, P + T).
    """
    c = model.config
    places = torch.arange(P, P + T)
    mask, _ = attention_mask(places, torch.arange(P + T), bias=model.score_bias, window=window)
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    if c.n_head == c.n_kv_head:
        return mask
    if model.score_bias is not None:
        return mask.expand(c.n_head, T, P + T).reshape(c.n_kv_head, -1, P + T)
    return mask.repeat(c.n_head // c.n_kv_head, 1)


def joined_mlp(c, mlp, experts):
    """Returns a module that computes a block's MLP in fewer nodes, or the MLP itself. experts: the class for an MoE."""
    if c.mlp == "swiglu" and computes_silu(mlp):
        return JoinedSwiGLU(mlp)
    return experts(mlp) if c.mlp == "moe" else mlp


class JoinedModel(nn.Module):
    """A copy of a Transformer whose blocks have fewer nodes: make_attention(attn) takes the place of each Attention,
    experts(moe) that of each MoE.
    """

    def __init__(self, model, make_attention, experts):
        super().__init__()
        self.model = copy.deepcopy(model)
        for block in self.model.blocks:
            block.attn = make_attention(block.attn)
            block.mlp = joined_mlp(model.config, block.mlp, experts)
        if model.config.pos == "sinusoidal":
            compute_tables(self.model.add_pos, self.model.add_pos.frequencies)

    def first_inputs(self):
        """Returns the ids and places that the model is traced with, and which of their axes are free.

        B, T, K = 2, 3, 2, as torch.export silently takes a size of 1 for a constant.
        """
        most = self.model.config.block_size
        B = torch.export.Dim("B")
        T = torch.export.Dim("T", max=most)
        K = torch.export.Dim("K", max=most)
        inputs = {"ids": torch.zeros(2, 3, dtype=torch.long), "places": torch.tensor([0, 2])}
        return inputs, {"ids": {0: B, 1: T}, "places": {0: K}}


class Graph(JoinedModel):
    """A copy of a Transformer in the form in which it is traced.

    The tokens of all rows lie in one axis, (T * B, C), so that a product without a bias and the sum with
    the residual stream can be one Gemm. In keys and values the tokens are the first axis, so that new
    ones lie behind all old ones, whatever B is.
    """

    def __init__(self, model):
        c = model.config
        roll = nn.Buffer(torch.eye(c.head_dim).roll(c.head_dim // 2, 1))
        super().__init__(model, lambda attn: JoinedAttention(c, attn, roll), DenseMoE)
        if c.pos == "rope":
            frequencies = self.model.rotary.frequencies
            rotated = frequencies.expand(c.n_head + c.n_kv_head, -1)
            unrotated = torch.zeros(c.n_kv_head, len(frequencies))  # v
            scale = None
            if self.model.rotary.scale != 1:  # YaRN's, of q and k alone
                scale = torch.ones(len(rotated) + c.n_kv_head, 1)
                scale[: len(rotated)] = self.model.rotary.scale
            compute_tables(self.model.rotary, torch.cat((rotated, unrotated)), scale)  # (heads, D / 2)

    def example(self):
        """Returns the inputs that the model is traced with, with P = 4, and which of their axes are free."""
        c = self.model.config
        inputs, axes = self.first_inputs()
        past = tuple(torch.zeros(4, 2, c.n_kv_head, c.head_dim) for _ in range(2 * c.n_layer))
        P = torch.export.Dim("P", max=c.block_size)
        past_axes = tuple({0: P, 1: axes["ids"][0]} for _ in past)
        return inputs | {"past": past}, axes | {"past": past_axes}

    def rotation_by_head(self, table, neutral):
        """Returns a table (T, D) for the heads of q, k and v: (T, heads, D), neutral for v."""
        c = self.model.config
        T, D = table.shape
        rotated = table[:, None].expand(T, c.n_head + c.n_kv_head, D)
        unrotated = torch.full((1, c.n_kv_head, D), neutral).expand(T, c.n_kv_head, D)
        return torch.cat((rotated, unrotated), 1)

    def forward(self, ids, places, past):
        """Returns the logits (B, K, V) of the tokens at places (K,), and the keys and values of all tokens in the
        order of past.
        """
        model = self.model
        B, T = ids.shape
        P = past[0].size(0)
        pos = torch.arange(P, P + T)
        masks = {window: additive_mask(model, P, T, window) for window in model.windows}
        cos_sin = None
        if model.rotary is not None:
            cos, sin = model.rotary(pos)
            if cos.dim() == 2:  # a class of one's own: one rotation for all heads, and none for v
                cos = self.rotation_by_head(cos, 1.0)
                sin = self.rotation_by_head(sin, 0.0)
            cos_sin = (cos[:, None], sin[:, None])  # each (T, 1, heads, D)
        x = model.wte(ids)
        if model.add_pos is not None:
            x = model.add_pos(x, pos)
        x = x.transpose(0, 1).flatten(0, 1)  # (T * B, C)
        present = []
        for layer, block in enumerate(model.blocks):
            layer_past = past[2 * layer : 2 * layer + 2]
            mask = masks[model.config.window_of(layer)]
            x = block(x, (cos_sin, mask, layer_past, present))
        x = model.norm(x).view(T, B, -1).index_select(0, places)
        return model.logits(x.transpose(0, 1)), *present


# -----------------------------------------------------------------------------------------------------
# The module that is traced for onnxruntime alone


def turned_tables(model):
    """Returns cos and sin as GroupQueryAttention takes them, each (block_size, D / 2); () where nothing is rotated."""
    if model.rotary is None:
        return ()
    half = model.config.head_dim // 2
    cos, sin = model.rotary(torch.arange(model.config.block_size))
    return cos[:, :half].contiguous(), sin[:, half:].contiguous()


def can_fuse(model):
    """Returns whether FusedGraph computes what a Transformer does."""
    c = model.config
    if model.score_bias is not None or model.windows != [0] or c.head_dim % FUSED_STEP:
        return False
    if model.rotary is None:
        return True
    half = c.head_dim // 2
    cos, sin = model.rotary(torch.arange(c.block_size))  # a class of one's own may rotate otherwise
    return torch.equal(cos[:, :half], cos[:, half:]) and torch.equal(-sin[:, :half], sin[:, half:])


class FusedAttention(JoinedHeads):
    """Computes what model.Attention does by one of onnxruntime's own nodes, GroupQueryAttention, which rotates q and k,
    puts k and v into their arrays and attends.
    """

    def forward(self, x, context):
        """Maps states (B, T, C) to states (B, T, C).

        context is (tables, last, total, past k and v, present): tables are cos and sin or none, last (B,) is the
        place of each row's last token, total how many tokens there are then, and k and v are (B, G, S, D), S at
        least total. Those with the new tokens are appended to the list present.
        """
        tables, last, total, past, present = context
        c = self.config
        H, G, D = c.n_head, c.n_kv_head, c.head_dim
        B, T, _ = x.shape
        q, k, v = self.qkv_proj(x), None, None  # the node also takes all three as one
        if c.qk_norm:
            q, k, v = q.view(B, T, -1, D).split((H, G, G), 2)
            q, k, v = self.q_norm(q).flatten(2), self.k_norm(k).flatten(2), v.flatten(2)
        y, *new = torch.onnx.ops.symbolic_multi_out(
            f"{MICROSOFT}::GroupQueryAttention",
            [q, k, v, *past, last, total, *tables],
            {"num_heads": H, "kv_num_heads": G, "do_rotary": int(len(tables) > 0)},
            dtypes=[x.dtype] * 3,
            shapes=[(B, T, H * D), past[0].shape, past[1].shape],
            version=1,
        )
        present += new
        return self.o_proj(y)


def has_experts_node(c):
    """Returns whether the onnxruntime here has a node for the experts of config c, also in integers: QMoE makes their
    scores sum to 1 (findings/qmoe_weights.sh) and needs whole groups.
    """
    if not c.norm_topk_prob or older_than(EXPERTS_LEAST):
        return False
    return c.n_embd % LEAST_GROUP == 0 and c.n_inner % LEAST_GROUP == 0


class FusedMoE(nn.Module):
    """Computes what experts.MoE does by one node of onnxruntime's own, MoE: a token goes through its experts alone."""

    def __init__(self, moe):
        super().__init__()
        self.router = moe.router
        self.attributes = {
            "k": moe.top_k,
            "normalize_routing_weights": 1,
            "activation_type": "swiglu",
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "swiglu_fusion": 1,  # outputs of gate and up take turns
        }
        both = torch.stack((moe.gate_proj.weight, moe.up_proj.weight), 2)  # (E, I, 2, C)
        self.both = nn.Parameter(both.flatten(1, 2).detach())
        self.down = nn.Parameter(moe.down_proj.weight.detach())  # (E, C, I)

    def forward(self, x):
        """Maps states (B, T, C) to states (B, T, C)."""
        tokens = x.flatten(0, 1)
        inputs = [tokens, self.router(tokens), self.both, None, self.down]
        y = torch.onnx.ops.symbolic(
            f"{MICROSOFT}::MoE", inputs, self.attributes, dtype=x.dtype, shape=tokens.shape, version=1
        )
        return y.view(x.shape)


class FusedGraph(JoinedModel):
    """A copy of a Transformer in the form in which it is traced for onnxruntime."""

    def __init__(self, model):
        experts = FusedMoE if has_experts_node(model.config) else DenseMoE
        super().__init__(model, lambda attn: FusedAttention(model.config, attn), experts)
        self.tables = nn.ParameterList(nn.Buffer(table) for table in turned_tables(model))

    def example(self):
        """Returns what Graph.example does."""
        c = self.model.config
        inputs, axes = self.first_inputs()
        total = torch.tensor(7, dtype=torch.int32)
        past = tuple(torch.zeros(2, c.n_kv_head, 7, c.head_dim) for _ in range(2 * c.n_layer))
        S = torch.export.Dim("S", max=c.block_size)
        past_axes = tuple({0: axes["ids"][0], 2: S} for _ in past)
        return inputs | {"total": total, "past": past}, axes | {"total": {}, "past": past_axes}

    def forward(self, ids, places, total, past):
        """Returns the logits (B, K, V) of the tokens at places (K,) of the last T of total ones, and the keys and
        values in the order of past.
        """
        model = self.model
        B, T = ids.shape
        x = model.wte(ids)
        if model.add_pos is not None:
            x = model.add_pos(x, torch.arange(T) + total - T)
        last = (total - 1).expand(B)
        present = []
        for layer, block in enumerate(model.blocks):
            x = block(x, (list(self.tables), last, total, past[2 * layer : 2 * layer + 2], present))
        return model.logits(model.norm(x).index_select(1, places)), *present
