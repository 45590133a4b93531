"""`fuse` on models of Hugging Face's transformers, built small with random weights.

They are compared like those in test_fuse_models.py, to the last bit.
"""

import subprocess
import sys
import warnings

import pytest
import torch

import support
from relu_mlp import fuse
from support.fusing import compiled, fused_like, make_exact, round_input, run, same

#: Nothing here depends on whether the native node records a graph.
backend = support.backend_fixture(support.BACKENDS)

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
T5 = transformers.models.t5.modeling_t5


def t5(dropout=0.0, act="relu"):
    config = transformers.T5Config(
        vocab_size=11,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        feed_forward_proj=act,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).double()
    networks = [m for m in model.modules() if isinstance(m, T5.T5DenseActDense)]
    for network in networks:
        network.register_forward_pre_hook(round_input)
    return make_exact(model, [(n, "wi", "wo") for n in networks], [], networks)


def opt(dropout=0.0, act="relu", **arguments):
    config = transformers.OPTConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=8,
        dropout=dropout,
        activation_function=act,
        **arguments,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).double()
    networks = model.model.decoder.layers
    first = arguments.get("do_layer_norm_before", True)
    norms = [n.final_layer_norm if first else n.self_attn_layer_norm for n in networks]
    # After the network comes the residual, and then the end of the layer or its norm.
    last = networks if first else []
    if not first:
        for n in networks:
            n.final_layer_norm.register_forward_pre_hook(round_input)
    return make_exact(model, [(n, "fc1", "fc2") for n in networks], norms, last)


TOKENS = torch.arange(12).reshape(2, 6) % 7 + 3


@pytest.mark.parametrize("training", [True, False])
def test_t5(backend, training):
    model = t5(0.0 if training else 0.5).train(training)
    fused_like(model, TOKENS, decoder_input_ids=TOKENS, runs=4, became=4)


def test_t5_in_training_drops_the_same(backend):
    model = t5(0.5).train()
    expected = run(model, TOKENS, decoder_input_ids=TOKENS)
    with support.count_calls() as calls:
        actual = run(fuse(model), TOKENS, decoder_input_ids=TOKENS)
    assert calls["forward"] == 0
    assert same(actual, expected)


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5", "LongT5"])
def test_the_dense_layer_of_the_t5_family(backend, name):
    module = getattr(transformers.models, name.lower())
    kind = getattr(getattr(module, f"modeling_{name.lower()}"), f"{name}DenseActDense")
    config = transformers.T5Config(d_model=3, d_ff=5, dropout_rate=0.0, feed_forward_proj="relu")
    x = torch.randint(-2, 3, (2, 4, 3)).float()
    fused_like(support.integers_(kind(config)), x, runs=1, became=1)


def test_t5_with_one_layer_kept_in_float32(backend):
    # as from_pretrained(dtype=torch.bfloat16) leaves it: wo in float32
    config = transformers.T5Config(d_model=3, d_ff=5, dropout_rate=0.0, feed_forward_proj="relu")
    model = support.integers_(T5.T5DenseActDense(config))
    model.wi.bfloat16()
    x = torch.randint(-2, 3, (2, 4, 3)).bfloat16()
    expected = run(model, x)
    (entry,) = fuse(model, report=True).replaced
    assert entry.note.endswith("native without autocast, because the dtypes of the Linears differ")
    assert same(run(model, x), expected)
    model.wo.bfloat16()
    with support.count_calls() as calls:
        run(model, x)
    assert calls["forward"] == 1


@pytest.mark.parametrize("make", [t5, opt])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_autocast(backend, make, kept):
    # T5 casts to the dtype of wo and back, which changes nothing, so both give the same bits
    model = make().float()
    for module in model.modules():
        for name in ("wo", "fc2"):
            getattr(module, name, model).to(kept)
    arguments = {"decoder_input_ids": TOKENS} if make is t5 else {}
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast:
        expected = run(model, TOKENS, **arguments)
    assert len(fuse(model, report=True).replaced) == (4 if make is t5 else 2)
    with autocast, support.count_calls() as calls:
        actual = run(model, TOKENS, **arguments)
    assert calls["forward"] == calls["backward"] == (4 if make is t5 else 2)
    assert same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_autocast_where_the_cast_of_t5_matters(backend, dtype):
    # float16 can't represent all of bfloat16; autocast does not cast float64
    config = transformers.T5Config(d_model=3, d_ff=5, dropout_rate=0.0, feed_forward_proj="relu")
    model = T5.T5DenseActDense(config)
    model.wo.to(dtype)
    x = 1e6 * torch.randn(2, 4, 3)
    outputs = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), support.count_calls() as calls:
            outputs.append(model(x))
        assert calls["forward"] == 0
        fuse(model)
    assert type(model) is not T5.T5DenseActDense
    assert outputs[0].isfinite().all() == (dtype is torch.float64)
    torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("first", [True, False])
def test_opt(backend, first, dropout):
    # the dropout is not between the Linears, so training is fused too
    model = opt(dropout, do_layer_norm_before=first, enable_bias=first).train()
    fused_like(model, TOKENS, runs=2, became=2)


def test_opt_with_gradient_checkpointing(backend):
    model = opt()
    expected = run(model, TOKENS)
    fuse(model)
    for decoder_layer in model.model.decoder.layers:
        # the effect of activation_checkpointing_enable, whose arguments depend on the version
        decoder_layer.gradient_checkpointing = True
        decoder_layer._gradient_checkpointing_func = lambda function, *args: (
            torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)
        )
    with support.count_calls() as calls:
        actual = run(model, TOKENS, use_cache=False)
    assert (calls["forward"], calls["backward"]) == (4, 2)  # twice for each layer
    assert same(actual, expected)


@pytest.mark.parametrize("make", [t5, opt])
def test_generation_and_hidden_states(backend, make):
    model = make().eval()
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    outputs = []
    for _ in range(2):
        arguments = {"decoder_input_ids": TOKENS} if make is t5 else {}
        with torch.no_grad(), support.count_calls() as calls:
            found = model(TOKENS, output_hidden_states=True, output_attentions=True, **arguments)
            hidden = found.decoder_hidden_states if make is t5 else found.hidden_states
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of generation settings
                outputs.append([found.logits, *hidden, model.generate(TOKENS, **settings)])
        fuse(model)
    assert calls["forward"] >= 2 * 5  # a call for each layer and each new token
    assert same(*outputs)


@pytest.mark.parametrize("make", [t5, opt])
def test_other_activations_are_left_as_they_are(make):
    model = make(act="gelu")
    kinds = [type(m) for m in model.modules()]
    report = fuse(model, report=True)
    assert [type(m) for m in model.modules()] == kinds
    assert not report.replaced
    reasons = {entry.reason for entry in report.left if "Attention" not in entry.kind}
    assert len(reasons) == 1
    name = "act" if make is t5 else "activation_fn"
    assert reasons.pop().startswith(f"its {name} is GELU")


def test_transformers_is_not_imported():
    code = """
import sys
import relu_mlp
from torch import nn
relu_mlp.fuse(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 4)))
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_subclass_has_no_rule():
    class Mine(T5.T5DenseActDense):
        pass

    (entry,) = fuse(Mine(transformers.T5Config(d_model=8, d_ff=16)), report=True).left
    reason = "is a subclass of T5DenseActDense: see register_fusion"
    assert entry == ("", "Mine", reason)


def test_torch_compile_of_t5(backend):
    config = transformers.T5Config(d_model=8, d_ff=16, dropout_rate=0.0, feed_forward_proj="relu")
    model, x = fuse(T5.T5DenseActDense(config)), torch.randn(2, 4, 8)
    function, graphs = compiled(model)
    assert torch.equal(function(x), model(x))
    operators = [node for node in graphs[0].graph.nodes if "relu_mlp" in str(node.target)]
    assert len(operators) == (backend == "extension")


def test_torch_compile_of_opt():
    model = fuse(opt().float())
    for module in model.modules():
        module._forward_hooks.clear()
    function, graphs = compiled(model.model.decoder.layers[0])
    x = torch.randn(2, 4, 8)
    assert torch.equal(function(x), model.model.decoder.layers[0](x))
    operators = [node for node in graphs[0].graph.nodes if "relu_mlp" in str(node.target)]
    assert len(operators) == ("extension" in support.BACKENDS)
