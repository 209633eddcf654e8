"""Adapters against the definition, against peft's, and against the model that they are merged into."""

import pytest
import torch
import torch.nn.functional as F
from test_model import build, tokens

import lora
import train
from device import resolve
from dropout import dropout
from lora import LINEARS, LoRAConfig, inject, merge
from sizes import num_params

CPU = resolve("cpu", "float32", "false")
TARGETS = ["all", *LINEARS, "q_proj,v_proj", "gate_proj,up_proj,down_proj"]


def adapted(seed=3, rank=3, target="all", dropout=0.0, **toggles):
    """Returns a model with adapters of alpha 5 whose A and B are drawn at random, so that they act."""
    model = build(**toggles)
    inject(model, LoRAConfig(rank, 5.0, dropout, target))
    g = torch.Generator().manual_seed(seed)
    for name, x in lora.state_dict(model).items():
        x.copy_(torch.randn(x.shape, generator=g) * 0.3)
    return model.eval()


def linears(target, mlp="swiglu"):
    """Returns the names of the layers that target chooses in a model with this MLP."""
    names = LINEARS if target == "all" else target.split(",")
    return [name for name in names if name != "gate_proj" or mlp != "gelu"]


def test_one_layer_by_hand():
    base = torch.nn.Linear(2, 3)
    base.weight.data = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    base.bias.data = torch.tensor([1.0, 0, -1])
    layer = lora.LoRALinear(base, 1, 4.0, 0.0)
    layer.A.data = torch.tensor([[1.0, -1]])
    layer.B.data = torch.tensor([[1.0], [0], [2]])
    # x = (2, 1): Wx + b = (5, 10, 15), A x = 1, B A x = (1, 0, 2), alpha / rank = 4
    assert layer(torch.tensor([2.0, 1])).tolist() == [9, 10, 23]
    assert layer.merged().weight.tolist() == [[5, -2], [3, 4], [13, -2]]


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "moe"])
def test_zero_b_changes_no_bit_and_merged_is_unmerged(mlp, n_kv_head, norm_position):
    toggles = dict(mlp=mlp, n_kv_head=n_kv_head, norm_position=norm_position)
    idx = tokens()
    base = build(**toggles)
    weights = base.state_dict()
    with torch.no_grad():
        logits = base(idx)[0]
        for target in TARGETS:
            if mlp == "gelu" and "gate_proj" in target:
                continue
            model = build(**toggles)
            inject(model, LoRAConfig(target=target))
            assert torch.equal(model(idx)[0], logits), target

            model = adapted(target=target, **toggles).double()
            unmerged = model(idx)[0]
            assert (unmerged - logits).abs().max() > 1e-2, target
            merge(model)
            torch.testing.assert_close(model(idx)[0], unmerged, rtol=0, atol=1e-12, msg=target)
            assert all(p.requires_grad for p in model.parameters())
            merged = model.state_dict()
            assert merged.keys() == weights.keys()
            assert model.head.weight is model.wte.weight
            changed = [name for name in weights if not torch.equal(merged[name], weights[name].double())]
            assert {name.split(".")[-2] for name in changed} == set(linears(target, mlp))


def test_each_expert_has_an_adapter_of_its_own():
    """Which has a gradient, and is drawn as one of a Linear."""
    model = build(mlp="moe").train()
    inject(model, LoRAConfig(rank=4))
    assert model.blocks[0].mlp.gate_proj.A.shape == (8, 4, 32)
    assert model.blocks[0].mlp.down_proj.B.shape == (8, 32, 4)
    for name, x in lora.state_dict(model).items():
        if name.endswith("A"):
            bound = x.size(-1) ** -0.5
            assert 0.85 * bound < x.abs().max() <= bound, name
    assert lora.trainable(model)[0] == 2 * 4 * (2 * 64 + 2 * 64 + 8 * 3 * 80)
    model(tokens(8), targets=tokens(8, seed=5))[1].backward()
    assert (model.blocks[0].mlp.up_proj.B.grad.abs().amax((1, 2)) > 0).all()


def test_a_half_precision_weight_is_merged_in_float32():
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    weight = base.weight.detach().double()
    layer = lora.LoRALinear(base, 4, 8.0, 0.0)
    layer.B.data.normal_(generator=torch.Generator().manual_seed(0))
    exact = weight + 2 * layer.B.detach().double() @ layer.A.detach().double()
    # rounded once: to the nearest of numbers with 8 bits, but for float32's own error
    torch.testing.assert_close(layer.merged().weight.double(), exact, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("context", [lora.switched_off, lora.folded_in])
def test_a_failure_leaves_weights_and_adapters_as_they_were(context):
    model = adapted()
    expected = model(tokens())[0]
    with pytest.raises(ArithmeticError), context(model):
        raise ArithmeticError
    assert torch.equal(model(tokens())[0], expected)


def test_only_adapters_change():
    model = adapted().train()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    optimizers = train.make_optimizers(model, train.Config(optimizer="adamw"), CPU)
    for step in range(3):
        batch = {"idx": tokens(seed=step), "targets": tokens(seed=step + 9)}
        train.train_step(model, optimizers, [batch], CPU, (0, step))
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == set(lora.state_dict(model))
    assert len(changed) == 2 * 7 * 2  # blocks, layers, A and B


def test_dropout_is_on_the_input_of_the_adapter_and_in_training_alone():
    model = build()  # in eval mode
    lora.inject(model, lora.LoRAConfig(lora_dropout=0.5))
    assert not any(module.training for module in model.modules())
    layer = adapted(dropout=0.5).blocks[0].attn.q_proj
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
        layer.train()
        torch.manual_seed(1)
        computed = layer(x)
        torch.manual_seed(1)
        expected = layer.base(x) + 5 / 3 * dropout(x, 0.5) @ layer.A.T @ layer.B.T
        torch.testing.assert_close(computed, expected)


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
    model = adapted(target=target, **toggles)
    names = linears(target, toggles.get("mlp", "swiglu"))
    peft_config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=names)
    reference = peft.get_peft_model(build(**toggles), peft_config)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reference_params = {}
    for name, p in reference.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.")
            name = name.replace("lora_A.default.weight", "A").replace("lora_B.default.weight", "B")
            reference_params[name] = p
    assert params.keys() == reference_params.keys()
    for name, p in params.items():
        reference_params[name].data.copy_(p.data)

    logits, loss = model(tokens(), targets=tokens(seed=5))
    reference_logits, reference_loss = reference(tokens(), targets=tokens(seed=5))
    torch.testing.assert_close(logits, reference_logits, rtol=0, atol=1e-5)
    loss.backward()
    reference_loss.backward()
    for name, p in params.items():
        assert p.grad.abs().max() > 1e-5
        torch.testing.assert_close(p.grad, reference_params[name].grad, rtol=1e-4, atol=1e-7)
    assert lora.trainable(model) == reference.get_nb_trainable_parameters()


def test_a_is_drawn_as_pefts_and_the_number_of_trainable_parameters_is_right():
    model = build(n_kv_head=2)
    plain = num_params(model)
    torch.manual_seed(0)
    inject(model, LoRAConfig(rank=4))
    for name, x in lora.state_dict(model).items():
        if name.endswith("B"):
            assert not x.any(), name
        else:
            bound = x.size(1) ** -0.5  # kaiming_uniform_(a=sqrt(5)): uniform within 1/sqrt(in)
            assert 0.85 * bound < x.abs().max() <= bound, name
    # 2 layers, 4 x (in + out): q, o 32+32; k, v 32+16; gate, up, down 32+48
    adapters = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert lora.trainable(model) == (adapters, plain + adapters)


@pytest.mark.parametrize("target", ["head", "wte", "q_proj,embed", ""])
def test_embedding_and_head_are_refused(target):
    with pytest.raises(ValueError, match="takes no adapter"):
        LoRAConfig(target=target)


def test_an_impossible_adapter_is_refused_and_leaves_the_model_as_it_was():
    for model, config, message in (
        (build(mlp="gelu"), LoRAConfig(target="gate_proj"), "no gate_proj"),
        (build(n_kv_head=1), LoRAConfig(rank=9), "rank 9 is more than"),
        (torch.nn.Linear(2, 2), LoRAConfig(), "has no"),
    ):
        with pytest.raises(ValueError, match=message):
            inject(model, config)
        assert all(p.requires_grad for p in model.parameters())
        assert not lora.state_dict(model)


def test_adapters_are_loaded_and_those_of_another_model_are_refused():
    model = adapted()
    adapters = lora.state_dict(adapted(seed=4))
    lora.load_state_dict(model, adapters)
    assert all(torch.equal(x, adapters[name]) for name, x in lora.state_dict(model).items())
    for other, message in (
        (adapted(target="q_proj"), "other layers"),
        (adapted(rank=2), r"is \(2, 32\) and not \(3, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.load_state_dict(model, lora.state_dict(other))
