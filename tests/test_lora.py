"""Adapters against the definition, against peft's, and against the model that they are merged into."""

import pytest
import torch
import torch.nn.functional as F
from test_model import build, tokens

import lora
import train
from device import resolve
from lora import LINEARS, LoRAConfig, inject, merge
from model import num_params

CPU = resolve("cpu", "float32", "false")
TARGETS = ["all", *LINEARS, "q_proj,v_proj", "gate_proj,up_proj,down_proj"]


def adapted(seed=3, rank=3, alpha=5.0, target="all", dropout=0.0, **toggles):
    """A model with adapters, and B drawn at random, so that they say something."""
    model = build(**toggles)
    inject(model, LoRAConfig(rank, alpha, dropout, target))
    g = torch.Generator().manual_seed(seed)
    for name, x in lora.state_dict(model).items():
        x.copy_(torch.randn(x.shape, generator=g) * 0.3)
    return model.eval()


def test_one_layer_by_hand():
    base = torch.nn.Linear(2, 3)
    base.weight.data, base.bias.data = (
        torch.tensor([[1.0, 2], [3, 4], [5, 6]]),
        torch.tensor([1.0, 0, -1]),
    )
    layer = lora.LoRALinear(base, 1, 4.0, 0.0)
    layer.A.data, layer.B.data = torch.tensor([[1.0, -1]]), torch.tensor([[1.0], [0], [2]])
    # x = (2, 1): Wx + b = (5, 10, 15), A x = 1, B A x = (1, 0, 2), alpha / rank = 4
    assert layer(torch.tensor([2.0, 1])).tolist() == [9, 10, 23]
    assert layer.merged().weight.tolist() == [[5, -2], [3, 4], [13, -2]]


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_zero_b_changes_no_bit_and_merged_is_unmerged(mlp, n_kv_head, norm_position):
    toggles = dict(mlp=mlp, n_kv_head=n_kv_head, norm_position=norm_position)
    idx, plain = tokens(), build(**toggles)
    before = plain(idx)[0].detach()
    with torch.no_grad():
        for target in TARGETS:
            if mlp == "gelu" and "gate_proj" in target:
                continue
            model = build(**toggles)
            inject(model, LoRAConfig(target=target))
            assert torch.equal(model(idx)[0], before), target
            model = adapted(target=target, **toggles).double()
            unmerged = model(idx)[0]
            assert (unmerged - before).abs().max() > 1e-2, target
            merge(model)
            torch.testing.assert_close(model(idx)[0], unmerged, rtol=0, atol=1e-12, msg=target)
            changed = {
                name
                for name, w in model.state_dict().items()
                if not torch.equal(w, plain.state_dict()[name].double())
            }
            assert (
                model.state_dict().keys() == plain.state_dict().keys()
                and model.head.weight is model.wte.weight
            )
            assert {name.split(".")[-2] for name in changed} == set(
                LINEARS if target == "all" else target.split(",")
            ) - ({"gate_proj"} if mlp == "gelu" else set())


def test_a_half_precision_weight_is_merged_in_float32():
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    weight, layer = base.weight.detach().double(), lora.LoRALinear(base, 4, 8.0, 0.0)
    layer.B.data.normal_(generator=torch.Generator().manual_seed(0))
    exact = weight + 2 * layer.B.detach().double() @ layer.A.detach().double()
    assert torch.equal(layer.merged().weight, exact.float().bfloat16())  # rounded once


def test_only_adapters_change():
    model = adapted().train()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    optimizers = train.make_optimizers(model, train.Config(optimizer="adamw"), CPU)
    for step in range(3):
        train.train_step(
            model,
            optimizers,
            [{"idx": tokens(seed=step), "targets": tokens(seed=step + 9)}],
            CPU,
            (0, step),
        )
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == set(lora.state_dict(model)) and len(changed) == 2 * 7 * 2


def test_dropout_is_on_what_goes_into_the_adapter_and_in_training_alone():
    model = adapted(dropout=0.5)
    layer, x = (
        model.blocks[0].attn.q_proj,
        torch.randn(4, 32, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
        layer.train()
        torch.manual_seed(1)
        computed = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(
            computed, layer.base(x) + 5 / 3 * F.dropout(x, 0.5) @ layer.A.T @ layer.B.T
        )


@pytest.mark.parametrize("target", ["all", "q_proj,v_proj", "down_proj"])
@pytest.mark.parametrize(
    "toggles",
    [
        dict(n_kv_head=2),
        dict(norm="layernorm", norm_position="post", pos="learned", mlp="gelu", n_kv_head=1),
    ],
)
def test_peft_computes_the_same_logits_and_gradients(target, toggles):
    peft = pytest.importorskip("peft")
    ours = adapted(target=target, **toggles)
    names = [
        name
        for name in (LINEARS if target == "all" else target.split(","))
        if name != "gate_proj" or "mlp" not in toggles
    ]
    reference = peft.get_peft_model(
        build(**toggles), peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=names)
    )
    their_params = {
        name.removeprefix("base_model.model.")
        .replace("lora_A.default.weight", "A")
        .replace("lora_B.default.weight", "B"): p
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    our_params = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert our_params.keys() == their_params.keys()
    for name, p in our_params.items():
        their_params[name].data.copy_(p.data)
    losses = [model(tokens(), targets=tokens(seed=5)) for model in (ours, reference)]
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=0, atol=1e-5)
    for _, loss in losses:
        loss.backward()
    for name, p in our_params.items():
        assert p.grad.abs().max() > 1e-5
        torch.testing.assert_close(p.grad, their_params[name].grad, rtol=1e-4, atol=1e-7)
    trained, whole_list = reference.get_nb_trainable_parameters()
    assert lora.trainable(ours) == (trained, whole_list)


def test_a_is_drawn_as_pefts_and_the_share_is_the_truth():
    model = build(n_kv_head=2)
    plain = num_params(model)
    torch.manual_seed(0)
    inject(model, LoRAConfig(rank=4))
    for name, x in lora.state_dict(model).items():
        bound = x.size(1) ** -0.5  # kaiming_uniform_(a=sqrt(5)): uniform within 1/sqrt(in)
        assert not x.any() if name.endswith("B") else 0.85 * bound < x.abs().max() <= bound, name
    # 2 layers, 4 x (in + out): q, o 32+32; k, v 32+16; gate, up, down 32+48
    adapters = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert lora.trainable(model) == (adapters, plain + adapters)


@pytest.mark.parametrize(
    "target, words",
    [
        ("head", "takes no adapter"),
        ("wte", "takes no adapter"),
        ("q_proj,embed", "takes no adapter"),
        ("", "takes no adapter"),
    ],
)
def test_embedding_and_head_are_refused(target, words):
    with pytest.raises(ValueError, match=words):
        LoRAConfig(target=target)


def test_what_a_model_does_not_have_is_refused_and_leaves_it_as_it_was():
    for model, c, words in (
        (build(mlp="gelu"), LoRAConfig(target="gate_proj"), "no gate_proj"),
        (build(n_kv_head=1), LoRAConfig(rank=9), "rank 9 is more than"),
        (torch.nn.Linear(2, 2), LoRAConfig(), "has no"),
    ):
        with pytest.raises(ValueError, match=words):
            inject(model, c)
        assert all(p.requires_grad for p in model.parameters()) and not lora.state_dict(model)


def test_adapters_of_another_model_are_refused():
    model, other = adapted(), adapted(seed=4)
    lora.load_state_dict(model, lora.state_dict(other))
    assert all(
        torch.equal(x, lora.state_dict(other)[name]) for name, x in lora.state_dict(model).items()
    )
    for wrong, words in (
        (adapted(target="q_proj"), "other layers"),
        (adapted(rank=2), r"is \(2, 32\) and not \(3, 32\)"),
    ):
        with pytest.raises(ValueError, match=words):
            lora.load_state_dict(model, lora.state_dict(wrong))
