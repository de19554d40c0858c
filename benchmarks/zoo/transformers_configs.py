"""Tiny configurations for any architecture of transformers, by the names of their fields.

A field's name says what it sizes in nearly every architecture; the few that need other values are in `OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

HIDDEN, HEADS, KEY_HEADS, LAYERS, INNER = 64, 4, 2, 2, 256
#: Name of an integer field -> its value; the first pattern that matches the whole name counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*(q|kv)_lora_rank", 24),
    (r"qk_nope_head_dim|v_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"(linear|mamba|ssm|conv)_.*num_(key|value)_heads", 4),
    (r"linear_(key|value)_head_dim", 16),
    (r"mamba_(n|num)_heads|mamba_num_heads", 8),
    (r"mamba_d_ssm", 128),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_n_groups|n_groups", 1),
    (r"(mamba_d_)?state(_size)?|mamba_d_state|ssm_state_size", 16),
    (r".*(num_)?key_value_heads|num_kv_heads|n_head_kv|num_key_value_groups|multi_query_group_num", KEY_HEADS),
    (r"(global_|index_|attention_|rotary_|.*_)?head_(dim|size)|d_kv|attention_key_size|dim_head|kv_channels", 16),
    (r"index_n_heads", 4),
    (r"index_topk", 8),
    (r".*(attention_heads|num_heads|n_heads?|_heads|num_attention_heads_.*|attn_heads)|n_head|heads?", HEADS),
    (r"(num|n)_.*experts_per_tok(en)?|moe_topk|moe_top_k|top_k_experts|num_selected_experts|moe_k", 2),
    (r"first_k_dense_replace|num_dense_layers|n_dense_layers|moe_layer_start_index", 1),
    (r"topk_group|n_group", 1),
    (r"(num|n)_shared_experts|moe_num_shared_experts", 1),
    (r".*(num|n|local|routed)_.*experts|moe_num_experts|num_experts|n_routed_experts|encoder_expert.*", 4),
    (r".*(num_hidden_layers|num_layers|_layers|n_layers?|layer_num|num_blocks|depth)", LAYERS),
    (r"num_(encoder|decoder)_blocks", LAYERS),
    (
        r".*intermediate_size.*|.*ffn_dim|d_ff|dim_ff|dff|d_inner|n_inner|.*ffn_hidden_size|.*ffn_size|ffn_intermediate.*|mlp_dim",
        INNER,
    ),
    (r"num_hash_buckets", 128),
    (r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|embedding_size|n_embed|embedding_dim)", HIDDEN),
    (r"dim|dim_model|model_dim|width|d_embed|proj_size|.*projection_(dim|size)|projector_dim|out_hidden_size", HIDDEN),
    (r"fpn_.*_size|mask_feature_size|feature_size|hidden_channels|.*_channels_dim|conv_dim|decoder_dim", HIDDEN),
    (r"(vision_|image_|visual_)?(encoder_)?hidden_states_dim|cross_attention_dim|word_embed_proj_dim", HIDDEN),
    (r".*vocab_size.*", 120),
    (r".*max_.*position_embeddings|n_positions|max_.*positions|max_seq_len|max_sequence_length|block_size|n_ctx", 64),
    (r".*max_length|seq_length|max_2d_position_embeddings", 64),
    (r"sliding_window|attention_window|local_attention|attention_window_size|window_attn.*", 8),
    (r".*image_size|img_size|input_size", 32),
    (r".*patch_size", 8),
    (r"(temporal|spatial)_patch_size|tubelet_size", 2),
    (r"num_frames", 4),
    (r"num_queries|num_query_tokens|num_latents|.*num_latents|query_length", 8),
    (r"num_mel_bins|num_mel_channels|feature_size|n_mels|input_feat_per_channel", 16),
    (r"max_source_positions|max_target_positions", 64),
    (r"conv_channels|decoder_hidden_dim", HIDDEN),
)
#: Lists by name: their first values, as many as the default has.
LISTS: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"conv_dim|tdnn_dim", (64,) * 8),
    (r"depths|num_blocks|layer_depths|.*_depths?|num_conv_layers|layers", (1, 1, 1, 1, 1, 1, 1, 1)),
    (r".*num_heads|.*num_attention_heads|heads", (1, 2, 4, 4, 4)),
    (r"hidden_sizes|embed_dims?|.*hidden_sizes|neck_hidden_sizes|encoder_hidden_sizes|dims?", (32, 48, 64, 96, 96, 96)),
)
#: Kinds of layers where a model mixes them: two, of which one attends.
HYBRID = ["linear_attention", "full_attention"]
#: What belongs to a class of configuration and not to a name.
OVERRIDES: dict[str, dict[str, Any]] = {
    **{
        name: {"layer_types": HYBRID}
        for name in (
            "bailing_hybrid",
            "glm5_next_text",
            "kimi_linear",
            "qwen3_5_text",
            "qwen3_5_moe_text",
            "qwen3_next",
            "olmo_hybrid",
        )
    },
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    **{
        name: {"prediction_length": 8, "context_length": 16}
        for name in ("autoformer", "informer", "time_series_transformer")
    },
    **{
        name: {"window_size": 4, "image_size": 32, "patch_size": 2}
        for name in ("swin", "swinv2", "donut-swin", "maskformer-swin")
    },
    "codegen": {"rotary_dim": 8},
    **{name: {"global_head_dim": 16} for name in ("gemma4_text", "gemma4_unified_text")},
    "distilbert": {"hidden_dim": 256},
    "squeezebert": {"type_vocab_size": 2, "intermediate_size": 512},
    "luke": {"entity_emb_size": 32, "entity_vocab_size": 20, "type_vocab_size": 2},
    "tapas": {"type_vocab_sizes": [3, 16, 16, 2, 2, 10, 10], "intermediate_size": 384},
    "radio": {"max_img_size": 64, "intermediate_size": 384, "mlp_ratio": 8},
    **{name: {"image_size": [32, 32], "patch_size": [8, 8]} for name in ("internvl_vision", "qianfan_ocr_vision")},
    "vivit": {"tubelet_size": [2, 8, 8]},
    **{name: {"output_channels": 32} for name in ("sam_vision_model", "sam_hq_vision_model")},
    **{name: {"sr_ratios": [2, 2, 1, 1], "hidden_sizes": [32, 48, 64, 96]} for name in ("glpn", "segformer", "pvt_v2")},
    "swiftformer": {"down_patch_size": 3, "down_stride": 2, "down_pad": 1},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 64,
    },
    "higgs_audio_v2": {"codebook_size": 24},
    "cosmos3_edge_text": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4},
    },
    "gptj": {"rotary_dim": 8},
    "reformer": {"axial_pos_embds_dim": (24, 40), "axial_pos_shape": (4, 16), "attn_layers": ["local", "lsh"]},
    "bit": {"num_groups": 8},
    "dac": {
        "encoder_hidden_size": 16,
        "decoder_hidden_size": 256,
        "downsampling_ratios": [2, 2, 4, 4],
        "upsampling_ratios": [4, 4, 2, 2],
    },
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "funnel": {"block_sizes": [1, 1]},
    "perceiver": {"d_model": 64, "d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 2},
    "speecht5": {"vocab_size": 120},
    "swin2sr": {"embed_dim": 48, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "seamless_m4t": {"feature_projection_input_dim": 16},
    "seamless_m4t_v2": {"feature_projection_input_dim": 16},
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "pvt": {"hidden_sizes": [32, 48, 64, 96], "sequence_reduction_ratios": [8, 4, 2, 1], "image_size": 64},
    "lilt": {"channel_shrink_ratio": 4},
    "textnet": {"stem_out_channels": 32},
}


def tiny(config_class: type, **given: Any) -> Any:
    """A small configuration of that class, sub-configurations included."""
    fields = _fields(config_class)
    subs = getattr(config_class, "sub_configs", {}) or {}
    values: dict[str, Any] = {}
    shared = _value_heads(fields)
    for name, default in fields.items():
        if name in subs or name.endswith("_config"):
            continue
        chosen = shared.get(name) or _value(name, default)
        if chosen is not None:
            values[name] = chosen
    usual = _construct(config_class, {}) if subs else None
    for name, sub in subs.items():
        held = getattr(usual, name, None)  # a default says which class is meant where any would do
        kind = (
            sub if sub.__name__ not in ("AutoConfig", "PreTrainedConfig") else type(held) if held is not None else None
        )
        if getattr(kind, "model_type", "") == "timm_backbone":
            continue  # its size is in its name
        if name in fields and hasattr(kind, "sub_configs") and not isinstance(held, dict):
            values[name] = tiny(kind, **_stages(held))
    values |= _specials(fields)
    values |= OVERRIDES.get(getattr(config_class, "model_type", ""), {}) | given
    return _construct(config_class, values)


def _construct(config_class: type, values: dict[str, Any]) -> Any:
    """The configuration; a field that its validation refuses keeps its default."""
    for _ in range(12):
        try:
            return config_class(**values)
        except Exception as error:  # a library's own validation
            guilty = next((n for n in sorted(values, key=len, reverse=True) if f"'{n}'" in str(error)), None)
            if guilty is None:
                guilty = next(
                    (n for n in sorted(values, key=len, reverse=True) if re.search(rf"\b{n}\b", str(error))), None
                )
            if guilty is None:
                raise
            values = {k: v for k, v in values.items() if k != guilty}
    return config_class(**values)


def _value_heads(fields: dict[str, Any]) -> dict[str, int]:
    """As many key heads as query heads where the default has so."""
    heads = fields.get("num_attention_heads")
    return {"num_key_value_heads": HEADS} if heads and fields.get("num_key_value_heads") == heads else {}


def _stages(held: Any) -> dict[str, Any]:
    """Which stages a backbone gives, as its default does."""
    features = getattr(held, "out_features", None)
    return {"out_features": features} if features and hasattr(held, "stage_names") else {}


def _fields(config_class: type) -> dict[str, Any]:
    """Names and defaults of what the configuration is made with."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(config_class.__init__).parameters.items():
        if name not in ("self", "kwargs", "args"):
            found[name] = None if parameter.default is inspect.Parameter.empty else parameter.default
    if dataclasses.is_dataclass(config_class):
        for field in dataclasses.fields(config_class):
            if field.default is not dataclasses.MISSING:
                found[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                found[field.name] = field.default_factory()
    return found


def _value(name: str, default: Any) -> Any:
    if isinstance(default, bool):
        return None
    if isinstance(default, int) or default is None:
        for pattern, n in SIZES:
            if re.fullmatch(pattern, name):
                if default is None and pattern.startswith((".*max_length", ".*image_size")):
                    return None
                if isinstance(default, int) and default <= 1:
                    return None
                return min(n, default) if isinstance(default, int) and n in (LAYERS, 1, 2) else n
        return None
    if isinstance(default, (list, tuple)) and default and all(type(i) is int for i in default):
        for pattern, few in LISTS:
            if re.fullmatch(pattern, name) and len(default) <= len(few):
                return type(default)(few[: len(default)])
    return None


def _specials(fields: dict[str, Any]) -> dict[str, Any]:
    """Tokens with a meaning must lie within the small vocabulary."""
    tokens = ("pad", "bos", "eos", "sep", "cls", "mask", "decoder_start", "unk")
    return {f"{t}_token_id": i for i, t in enumerate(tokens) if f"{t}_token_id" in fields and t != "decoder_start"} | (
        {"decoder_start_token_id": 1} if "decoder_start_token_id" in fields else {}
    )
