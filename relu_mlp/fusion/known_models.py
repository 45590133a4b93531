"""The rules that come with this package: layers of `nn.Transformer`, T5 and OPT."""

from __future__ import annotations

from .rules import register_fusion


def register_known_models() -> None:
    for name in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        register_fusion(
            f"torch.nn.modules.transformer.{name}",
            ["linear1", "linear2"],
            activation="activation",
            dropout="dropout",
            method="_ff_block",  # not forward, which has a fast path that must stay
        )
    for name, path in {
        "T5": "t5.modeling_t5",
        "MT5": "mt5.modeling_mt5",
        "UMT5": "umt5.modeling_umt5",
        "LongT5": "longt5.modeling_longt5",
    }.items():
        register_fusion(
            f"transformers.models.{path}.{name}DenseActDense",
            ["wi", "wo"],
            activation="act",
            dropout="dropout",
        )
    register_fusion(
        "transformers.models.opt.modeling_opt.OPTDecoderLayer",
        ["fc1", "fc2"],
        activation="activation_fn",
    )
