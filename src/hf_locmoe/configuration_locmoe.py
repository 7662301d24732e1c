# SPDX-License-Identifier: Apache-2.0
"""`LocMoeConfig`: the architecture of a LocMoE checkpoint, and nothing about the run that trains it."""

# Annotations have to be types here, not strings: `@strict` leaves a field whose type is a string unchecked.

import copy
import math
import os
from fnmatch import fnmatch
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import logging

from .remote_code import AUTO_MAP, write_remote_code
from .staged_save import staged_save


logger = logging.get_logger(__name__)


@strict
class LocMoeConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LocMoeModel`]: a decoder whose feed-forward network is, in the layers named below, a mixture of
    experts routed by the LocMoE gate (arXiv 2401.13920). [`LocMoeConfig.paper`] gives the paper's method to the letter.

    Args:
        vocab_size (`int`, defaults to 32000): Number of token ids.
        hidden_size (`int`, defaults to 2048): Width of the hidden states (the paper's `d`).
        intermediate_size (`int`, defaults to 8192): Width of the dense feed-forward layers.
        num_hidden_layers (`int`, defaults to 24): Number of decoder layers.
        num_attention_heads (`int`, defaults to 16): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key and value heads; `num_attention_heads` if not given.
        head_dim (`int`, *optional*): Width of a head; `hidden_size // num_attention_heads` if not given.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the experts and of the dense feed-forward layers.
        gated_mlp (`bool`, defaults to `False`): Whether experts and dense layers are gated, `act(gate(x)) * up(x)`, as in
            SwiGLU (with `hidden_act="silu"`). The paper's experts are two linear maps with GeLU between them.
        max_position_embeddings (`int`, defaults to 4096): Longest sequence the rotary positions were made for.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of the RMS norms.
        use_cache (`bool`, defaults to `True`): Whether the model returns its keys and values.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the output head is the input embedding.
        rope_parameters (`RopeParameters`, *optional*): Rotary positions, with any of transformers' scalings.
        attention_bias (`bool`, defaults to `False`): Whether the four attention projections have a bias.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention probabilities.
        qk_norm (`"head"` or `"full"`, *optional*): RMS norm of queries and keys: over each head (as in Qwen3) or over the
            whole projection (as in OLMoE). None if not given.
        clip_qkv (`float`, *optional*): Queries, keys and values are clamped to this absolute value (as in OLMoE).
        sliding_window (`int`, *optional*): Attention looks back at most this many tokens (as in Mistral).
        mlp_only_layers (`list[int]`, *optional*): Layers that have a dense feed-forward network.
        decoder_sparse_step (`int`, defaults to 1): Every so many layers is a mixture of experts, the others are dense.
        num_experts (`int`, defaults to 16): Number of routed experts (the paper's `n`).
        num_experts_per_tok (`int`, defaults to 1): Number of experts a token is sent to.
        moe_intermediate_size (`int`, *optional*): Width of one expert; `intermediate_size` if not given.
        num_shared_experts (`int`, defaults to 0): Experts every token goes through besides the routed ones, as one
            feed-forward network of width `num_shared_experts * moe_intermediate_size`.
        norm_topk_prob (`bool`, defaults to `False`): Whether a token's routing weights are scaled to sum to one.
        gate_type (`"locmoe"`, `"switch"` or `"hash"`, defaults to `"locmoe"`): Grouped average pooling without
            parameters, a learned dense gate, or a balanced hash of the token id.
        gate_affinity (`"cosine"` or `"mean"`, defaults to `"cosine"`): Logits of the `locmoe` gate: the cosine between the
            token and the gate weight, scaled to unit variance (`sqrt(hidden_size) * cos`), or the paper's group mean.
        gate_relu (`bool`, defaults to `False`): Whether the logits pass through a ReLU (eq. 2).
        gate_noise_std (`float`, defaults to 0.0): Standard deviation of the noise on the logits in training (the `eps` of
            eq. 2). Not used by the `hash` gate.
        gate_centering (`bool`, defaults to `False`): Whether a running mean of the hidden states is subtracted before
            pooling, which hidden states with outlier dimensions need.
        gate_rotation (`bool`, defaults to `False`): Whether the hidden states are pooled after a fixed random rotation.
        num_expert_groups (`int`, defaults to 1): Experts are split into so many groups of neighbours. A token's group is
            its `domain_ids` entry, or the best `topk_group` groups where the batch has none.
        topk_group (`int`, defaults to 1): Number of groups a token may reach.
        balance_bias_update_rate (`float`, defaults to 0.0): Step of the balance bias, which is added to the logits for
            selection only and moved by its sign towards equal load at each optimizer step (DeepSeek-V3). 0 is off.
        router_aux_loss_coef (`float`, defaults to 0.01): Weight of the load-balancing loss (alpha of eq. 5).
        locality_loss_coef (`float`, defaults to 0.01): Weight of the locality loss (mu of eq. 6). The loss is exactly zero
            on one node.
        locality_remote_share (`float`, defaults to 0.1): Share of the assignments that may leave the node before the
            locality loss pulls.
        router_loss_scope (`"global"` or `"micro_batch"`, defaults to `"global"`): Over which tokens the load-balancing
            statistics are taken: those of all ranks, or those of this rank.
        capacity_mode (`"dropless"`, `"factor"` or `"critical"`, defaults to `"dropless"`): Bound on the tokens an expert
            takes in training: none, `expert_capacity_factor` times an equal share, or the lower bound of Theorem 1
            measured over the first `critical_capacity_steps` steps.
        expert_capacity_factor (`float`, *optional*): See `capacity_mode`.
        capacity_overflow (`"drop"` or `"next_best"`, defaults to `"drop"`): Where a token goes whose expert is full: nowhere
            (the residual alone), or to its next-best expert with room.
        capacity_at_eval (`bool`, defaults to `False`): Whether the bound holds in evaluation and generation too, where
            results then depend on what else is in the batch.
        critical_capacity_steps (`int`, defaults to 50): Optimizer steps over which token-gate cosines are measured.
        critical_capacity_quantile (`float`, defaults to 0.5): Quantile of the cosines taken for the bound.
        critical_max_drop_rate (`float`, defaults to 0.05): Drop rate above which `critical` raises the capacity.
        router_check_finite (`bool`, defaults to `False`): Whether a NaN or infinite hidden state in a router stops the
            run with the layer's name. Costs one device synchronisation a layer.
        output_router_stats (`bool`, *optional*): Whether the model returns `router_stats`; in training only if not given.
    """

    model_type = "locmoe"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "router_logits",
        "router_stats",
        "router_hidden_sum",
        "aux_loss",
        "router_aux_loss",
        "locality_loss",
    ]
    attribute_map = {"num_local_experts": "num_experts"}

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.up_proj": "colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "gelu"
    gated_mlp: bool = False
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    qk_norm: Literal["head", "full"] | None = None
    clip_qkv: float | int | None = None
    sliding_window: int | None = None

    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: int = 1
    num_experts: int = 16
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    norm_topk_prob: bool = False

    gate_type: Literal["locmoe", "switch", "hash"] = "locmoe"
    gate_affinity: Literal["cosine", "mean"] = "cosine"
    gate_relu: bool = False
    gate_noise_std: float | int = 0.0
    gate_centering: bool = False
    gate_rotation: bool = False
    num_expert_groups: int = 1
    topk_group: int = 1
    balance_bias_update_rate: float | int = 0.0

    router_aux_loss_coef: float | int = 0.01
    locality_loss_coef: float | int = 0.01
    locality_remote_share: float = 0.1
    router_loss_scope: Literal["global", "micro_batch"] = "global"

    capacity_mode: Literal["dropless", "factor", "critical"] = "dropless"
    expert_capacity_factor: float | int | None = None
    capacity_overflow: Literal["drop", "next_best"] = "drop"
    capacity_at_eval: bool = False
    critical_capacity_steps: int = 50
    critical_capacity_quantile: float = 0.5
    critical_max_drop_rate: float = 0.05

    router_check_finite: bool = False
    output_router_logits: bool = False
    output_router_stats: bool | None = None

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        super().__post_init__(**kwargs)
        self.validate_architecture()
        self._choose_parallel_plans()

    @classmethod
    def paper(cls, **overrides: Any) -> "LocMoeConfig":
        """
        The method of arXiv 2401.13920 to the letter: group means through a ReLU with noise in training (eq. 2-4), top-1,
        GeLU experts (eq. 1), load balance with alpha = 0.01 and the locality loss (eq. 5-7).

        The paper prints no value for the noise (`gate_noise_std`, 0.01 here) or for mu (`locality_loss_coef`). The shape
        is any: pass `hidden_size`, `num_experts`, ... as overrides.
        """
        method: dict[str, Any] = {
            "gate_type": "locmoe",
            "gate_affinity": "mean",
            "gate_relu": True,
            "gate_noise_std": 0.01,
            "gate_centering": False,
            "gate_rotation": False,
            "balance_bias_update_rate": 0.0,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "gated_mlp": False,
            "hidden_act": "gelu",
            "router_aux_loss_coef": 0.01,
        }
        return cls(**{**method, **overrides})

    def _choose_parallel_plans(self):
        """The rules for what this architecture has: transformers warns of rules that match nothing."""
        tp_plan, ep_plan = dict(type(self).base_model_tp_plan), dict(type(self).base_model_ep_plan)
        if self.qk_norm == "full":
            # the norm runs over the whole projection, so a tensor-parallel rank has to gather it first
            tp_plan |= {f"layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
            tp_plan["layers.*.self_attn.o_proj"] = "rowwise_split_input"
        absent = ["experts.up_proj"] if self.gated_mlp else ["experts.gate_up_proj", "gate_proj"]
        if self.qk_norm != "head":
            absent += ["q_norm", "k_norm"]
        if not self.num_shared_experts:
            absent.append("shared_experts.*")
        if len(self.sparse_layers) == self.num_hidden_layers:
            absent += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        for plan in (tp_plan, ep_plan):
            for rule in [rule for rule in plan if any(fnmatch(rule, f"*.{pattern}") for pattern in absent)]:
                del plan[rule]
        self.base_model_tp_plan, self.base_model_ep_plan = tp_plan, ep_plan

    def for_run(self, **values: Any) -> "LocMoeConfig":
        """
        A copy with other values for one run: coefficients, capacity. They hold for the models built from it and are not
        saved: `config.json` keeps the checkpoint's.
        """
        config = copy.deepcopy(self)
        config._saved_values = {name: getattr(self, name) for name in values}
        for name, value in values.items():
            setattr(config, name, value)
        config.validate_architecture()
        return config

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("base_model_ep_plan", None)
        values.update(values.pop("_saved_values", {}))
        return values

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers whose feed-forward network is a mixture of experts."""
        return [
            index
            for index in range(self.num_hidden_layers)
            if index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0
        ]

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the relations between fields. Raises `ValueError`."""
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
            " max_position_embeddings decoder_sparse_step num_experts num_experts_per_tok moe_intermediate_size"
            " num_expert_groups topk_group critical_capacity_steps"
        ).split():
            _require(self, name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("num_shared_experts", "gate_noise_std", "balance_bias_update_rate"):
            _require(self, name, 0 <= getattr(self, name) < math.inf, "must be finite and not negative: 0 is off")
        for name in ("router_aux_loss_coef", "locality_loss_coef"):
            within = 0 <= getattr(self, name) < math.inf
            _require(self, name, within, "must be finite and not negative: set it to 0 to turn the loss off")
        for name in ("initializer_range", "rms_norm_eps"):
            _require(self, name, 0 < getattr(self, name) < math.inf, "must be finite and positive")
        _require(self, "attention_dropout", 0 <= self.attention_dropout < 1, "must be at least 0 and less than 1")
        for name in ("sliding_window", "clip_qkv"):
            value = getattr(self, name)
            _require(self, name, value is None or value > 0, "must be positive: leave it out (`None`) to turn it off")
        in_vocabulary = self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size
        _require(
            self,
            "pad_token_id",
            in_vocabulary,
            f"must be from 0 to {self.vocab_size - 1}, below `vocab_size` ({self.vocab_size}), or None for no padding",
        )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` ({self.hidden_act}) must be one of {sorted(ACT2FN)}.")
        rope_types, rope_type = ["default", *ROPE_INIT_FUNCTIONS], self.rope_parameters["rope_type"]
        if rope_type not in rope_types:
            raise ValueError(
                f"`rope_parameters` has `rope_type` ({rope_type}), which must be one of {sorted(set(rope_types))}."
            )

        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be divisible by `num_key_value_heads` "
                f"({self.num_key_value_heads}): set `num_key_value_heads` to {self.num_attention_heads} or 1."
            )
        _require(self, "head_dim", self.head_dim % 2 == 0, "must be even, rotary positions turn pairs of dimensions")
        wrong = [index for index in self.mlp_only_layers if not 0 <= index < self.num_hidden_layers]
        if wrong:
            raise ValueError(
                f"`mlp_only_layers` ({self.mlp_only_layers}) names layers {wrong} that do not exist: with "
                f"`num_hidden_layers` ({self.num_hidden_layers}) they run from 0 to {self.num_hidden_layers - 1}."
            )
        self._validate_experts()
        self._validate_capacity()

    def _validate_experts(self):
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must be at most `num_experts` ({self.num_experts}): "
                f"set `num_experts_per_tok` to {self.num_experts} or less."
            )
        if self.gate_type == "locmoe" and self.num_experts > self.hidden_size:
            raise ValueError(
                f"`num_experts` ({self.num_experts}) must be at most `hidden_size` ({self.hidden_size}) with `gate_type` "
                f"('locmoe'), which pools a block of hidden dimensions for each expert: use fewer experts or "
                f"`gate_type='switch'`."
            )
        if self.num_experts % self.num_expert_groups:
            divisors = [g for g in range(1, self.num_experts + 1) if self.num_experts % g == 0]
            raise ValueError(
                f"`num_experts` ({self.num_experts}) must be divisible by `num_expert_groups` ({self.num_expert_groups}): "
                f"set `num_expert_groups` to one of {divisors}."
            )
        _require(
            self,
            "topk_group",
            self.topk_group <= self.num_expert_groups,
            f"must be at most `num_expert_groups` ({self.num_expert_groups})",
        )
        reachable = self.num_experts // self.num_expert_groups * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) is more than the {reachable} experts in the "
                f"`topk_group` ({self.topk_group}) of `num_expert_groups` ({self.num_expert_groups}) groups that a token "
                f"reaches: raise `topk_group` or lower `num_expert_groups`."
            )
        share = self.locality_remote_share
        _require(self, "locality_remote_share", 0 < share < 1, "must be between 0 and 1, both excluded")
        if self.gate_type != "locmoe":
            for name in ("gate_centering", "gate_rotation", "gate_relu"):
                if getattr(self, name):
                    logger.warning_once(f"`{name}` (True) has no effect with `gate_type` ('{self.gate_type}').")
        if self.gate_type == "hash":
            for name in ("balance_bias_update_rate", "gate_noise_std", "norm_topk_prob"):
                if getattr(self, name):
                    logger.warning_once(f"`{name}` ({getattr(self, name)}) has no effect with `gate_type` ('hash').")

    def _validate_capacity(self):
        factor = self.expert_capacity_factor
        if self.capacity_mode == "factor" and not (factor is not None and 0 < factor < math.inf):
            raise ValueError(
                f"`expert_capacity_factor` ({factor}) must be finite and positive with `capacity_mode` ('factor'): set it "
                f"to 1.25, for example."
            )
        if self.capacity_mode != "factor" and factor is not None:
            logger.warning_once(
                f"`expert_capacity_factor` ({factor}) has no effect with `capacity_mode` ('{self.capacity_mode}')."
            )
        if self.capacity_mode == "dropless":
            for name, default in (("capacity_overflow", "drop"), ("capacity_at_eval", False)):
                if getattr(self, name) != default:
                    logger.warning_once(
                        f"`{name}` ({getattr(self, name)}) has no effect with `capacity_mode` ('dropless')."
                    )
        for name in ("critical_capacity_quantile", "critical_max_drop_rate"):
            _require(self, name, 0 < getattr(self, name) < 1, "must be between 0 and 1, both excluded")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As [`~transformers.PreTrainedConfig.get_config_dict`]; raises `ValueError` where there is no configuration."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:  # which transformers takes for the default, a model of many gigabytes
            raise ValueError(
                f"`{pretrained_model_name_or_path}` has no `config.json`: it is no checkpoint, or one whose saving was cut "
                f"off. Check the path, or pass the configuration as `config`."
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As [`~transformers.PreTrainedConfig.from_dict`]; raises `ValueError` for another architecture's configuration."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"`model_type` ({model_type!r}) is another architecture's, {cls.__name__} reads {cls.model_type!r}: load "
                f"the checkpoint with `AutoConfig`, `AutoModel` and their relatives."
            )
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """
        Writes `config.json` and, beside it, the modelling code as flat files, so that the checkpoint also loads where
        hf_locmoe is not installed (with `trust_remote_code=True`). All or nothing, see [`staged_save`].
        """
        self.auto_map = dict(AUTO_MAP)
        with staged_save(save_directory) as staging:
            write_remote_code(staging)
            super().save_pretrained(staging)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, **kwargs)


def _require(config: LocMoeConfig, name: str, condition: bool, rule: str):
    if not condition:
        raise ValueError(f"`{name}` ({getattr(config, name)}) {rule}.")


__all__ = ["LocMoeConfig"]
