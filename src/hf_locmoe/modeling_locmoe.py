# SPDX-License-Identifier: Apache-2.0
"""
The LocMoE decoder and its heads; one of its layers is in `layers_locmoe.py`.

Shapes: B = batch size, Q = sequence length, T = B * Q, d = hidden_size, n = num_experts, k = num_experts_per_tok,
L = number of MoE layers, S = len(RouterStat).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_locmoe import LocMoeConfig
from .distributed.router_scope import RouterScope
from .layers_locmoe import LocMoeAttention, LocMoeDecoderLayer, LocMoeSparseMoeBlock
from .loss_locmoe import causal_lm_loss
from .moe.baseline_gates import HashGate, SwitchGate
from .moe.experts import LocMoeExperts, LocMoeGatedExperts, kernels_serve_here
from .moe.losses import load_balancing_loss, locality_loss
from .moe.overflow import CapacityRule, RemoteTier
from .moe.routing import Router, RouterStat
from .norm_locmoe import LocMoeRMSNorm
from .pretrained_io import SafePretrainedMixin


try:
    from .distributed.parallel_run import ParallelRunMixin
except ImportError:  # transformers before 5.23; and the flat copy beside a checkpoint, which is for one process

    class ParallelRunMixin:  # type: ignore[no-redef]
        """Models are whole."""


@dataclass
class LocMoeModelOutputWithPast(MoeModelOutputWithPast):
    """
    Adds to [`~transformers.modeling_outputs.MoeModelOutputWithPast`]:

    Args:
        router_stats (`torch.Tensor` of shape `(L, S, n)`, *optional*): Float32 sums over this rank's tokens, rows named by
            [`RouterStat`]. In training, or with `output_router_stats=True`.
        router_hidden_sum (`torch.Tensor` of shape `(L, d)`, *optional*): Sums of the hidden states, with `gate_centering`.
    """

    router_stats: torch.Tensor | None = None
    router_hidden_sum: torch.Tensor | None = None


@dataclass
class LocMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """
    Adds to [`~transformers.modeling_outputs.MoeCausalLMOutputWithPast`] what
    [`LocMoeModelOutputWithPast`] has (without gradient), and:

    Args:
        router_aux_loss (`torch.Tensor`, *optional*): Load-balancing loss, mean over layers, without its coefficient.
            `aux_loss` is the same, under the name other models give it.
        locality_loss (`torch.Tensor`, *optional*): Locality loss, mean over layers, without its coefficient.
    """

    router_aux_loss: torch.Tensor | None = None
    locality_loss: torch.Tensor | None = None
    router_stats: torch.Tensor | None = None
    router_hidden_sum: torch.Tensor | None = None


class LocMoePreTrainedModel(ParallelRunMixin, SafePretrainedMixin, PreTrainedModel):
    """What the models share: initial weights, router losses and the router state that is not learned by gradient."""

    config: LocMoeConfig
    config_class = LocMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LocMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = [
        "e_score_correction_bias",
        "hidden_mean",
        "hidden_mean_updates",
        "rotation",
        "capacity_rule",
    ]
    _can_record_outputs = {
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": LocMoeDecoderLayer,
        "attentions": LocMoeAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in this file's source; the experts are in moe/experts.py
        return True

    def get_correct_experts_implementation(self, requested_experts):
        """Where nothing is asked for, `"capacity_bmm"` if its kernels serve, else transformers' choice."""
        if requested_experts is None and kernels_serve_here():
            requested_experts = "capacity_bmm"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for block in model.sparse_blocks:
            block.capacity_rule.refresh()
        return loaded

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LocMoeExperts | LocMoeGatedExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, SwitchGate):
            init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, Router | CapacityRule):
            module.reset_buffers(init.copy_)

    # Writes the card of a push to the Hub: set by the package's registration. None where this file stands beside a
    # checkpoint without the package, whose pushes carry transformers' own card.
    model_card_writer: Callable[..., object] | None = None

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # the last step of `PushToHubMixin.push_to_hub`, which has just put a card into the folder
        if self.model_card_writer is not None:
            self.model_card_writer(working_dir, self.config, architecture=type(self), model_id=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @property
    def sparse_blocks(self) -> list[LocMoeSparseMoeBlock]:
        """The MoE blocks, in the order of the layers of `router_stats`."""
        return [module for module in self.modules() if isinstance(module, LocMoeSparseMoeBlock)]

    def router_losses(self, router_stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The load-balancing and the locality loss of a batch, means over the MoE layers, without their coefficients. Over the
        tokens of all ranks, or of this one (`config.router_loss_scope`); the locality loss over those of this node, or of
        this rank. A collective with the first scope: all ranks call it.

        Args:
            router_stats (`torch.Tensor` of shape `(L, S, n)`): This rank's statistics.

        Returns:
            Two `torch.Tensor` scalars, float32.
        """
        scope = self.base_model.router_scope
        # a slice: a list as index is copied to the device, which is waited for
        sums = router_stats[:, RouterStat.PROB_SUM : RouterStat.TOKENS + 1]
        over_all, over_node = scope.reduce(sums) if self.config.router_loss_scope == "global" else (sums, sums)
        (prob_sum, tokens), node_prob_sum = over_all.unbind(dim=1), over_node[:, 0]
        num_tokens, num_node_tokens = (
            counts[:, 1].sum(dim=-1) / self.config.num_experts_per_tok for counts in (over_all, over_node)
        )
        router_aux_loss = load_balancing_loss(prob_sum, tokens, num_tokens).mean()
        near = scope.node_local_experts
        if near is None:
            return router_aux_loss, torch.zeros_like(router_aux_loss)
        near = near.to(node_prob_sum.device)
        locality = locality_loss(node_prob_sum, num_node_tokens, near, self.config.locality_remote_share)
        if scope.locality_scale is not None:
            locality = locality * scope.locality_scale.to(locality.device)
        return router_aux_loss, locality.mean()

    def weighted_router_loss(self, router_aux_loss: torch.Tensor, locality: torch.Tensor) -> torch.Tensor:
        """`L_aux + L_loc` with their coefficients (eq. 5-7)."""
        return self.config.router_aux_loss_coef * router_aux_loss + self.config.locality_loss_coef * locality

    @torch.no_grad()
    def update_router_state(self, router_stats: torch.Tensor, router_hidden_sum: torch.Tensor | None = None) -> None:
        """
        Moves the router state that no gradient reaches: balance bias, centring, measured capacity. To be called once per
        optimizer step; with Trainer a callback does it.

        Args:
            router_stats (`torch.Tensor` of shape `(L, S, n)`): The outputs of that name, summed over the step's
                micro-batches and over all ranks.
            router_hidden_sum (`torch.Tensor` of shape `(L, d)`, *optional*): Likewise.
        """
        blocks = self.sparse_blocks
        if router_stats.shape[0] != len(blocks):
            raise ValueError(
                f"`router_stats` has {router_stats.shape[0]} layers and the model {len(blocks)} MoE layers: pass the "
                f"`router_stats` that this model returned."
            )
        for layer, block in enumerate(blocks):
            hidden_sum = None if router_hidden_sum is None else router_hidden_sum[layer]
            block.gate.update_state(router_stats[layer, RouterStat.TOKENS], hidden_sum)
            block.capacity_rule.update_state(router_stats[layer])

    def limit_inter_node(self, node_local_experts: torch.Tensor, factor: float) -> None:
        """
        From here on, in training, a hard ceiling on the assignments that leave this rank's node: see [`RemoteTier`].

        Args:
            node_local_experts (`torch.Tensor` of shape `(L, n)`): Boolean, the experts of this rank's node.
            factor (`float`): Of what uniform routing would send to other nodes.
        """
        for experts, block in zip(node_local_experts, self.sparse_blocks, strict=True):
            block.remote_tier = RemoteTier(experts, factor)

    def resize_token_embeddings(self, *args, **kwargs):
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for block in self.sparse_blocks:
            if isinstance(block.gate, HashGate):
                block.gate.resize(embeddings.num_embeddings)
        return embeddings


class LocMoeModel(LocMoePreTrainedModel):
    """The decoder without a head. `router_scope` says which ranks share router statistics and which experts are near."""

    def __init__(self, config: LocMoeConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(LocMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LocMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.router_scope = RouterScope()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        domain_ids: torch.LongTensor | None = None,
        output_router_stats: bool | None = None,
        **kwargs,
    ) -> LocMoeModelOutputWithPast:
        """
        As other transformers decoders, and:

        Args:
            domain_ids (`torch.LongTensor` of shape `(B,)` or `(B, Q)`, *optional*): The expert group of each sample or
                token, from 0 to `num_expert_groups - 1` (two-level routing).
            output_router_stats (`bool`, *optional*): Whether to return `router_stats`; in training only if not given.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        _check_ids("input_ids", input_ids, "the vocabulary (`vocab_size`)", self.embed_tokens.num_embeddings)
        _check_ids("domain_ids", domain_ids, "`num_expert_groups`", self.config.num_expert_groups)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        shape = inputs_embeds.shape[:2]
        # positions of the caller's may belong to packed sequences, which transformers finds out by asking the device; those
        # made here do not, and without them it neither waits nor, while compiling, writes a mask out
        positions_for_mask = position_ids
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        causal_mask = make_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=positions_for_mask,
        )
        if output_router_stats is None:
            output_router_stats = self.config.output_router_stats
        if output_router_stats is None:
            output_router_stats = self.training
        token_mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -shape[1] :].bool()
        if domain_ids is not None:
            domain_ids = domain_ids.view(shape[0], -1).expand(shape)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        statistics = []
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            if decoder_layer.is_sparse and self.gradient_checkpointing and self.training:
                decoder_layer.mlp.limit_experts(shape.numel())  # before the layer, which may not where it is compiled
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                input_ids=input_ids,
                domain_ids=domain_ids,
                token_mask=token_mask,
                output_router_stats=output_router_stats,
                **kwargs,
            )
            if isinstance(hidden_states, tuple):
                hidden_states, *layer_statistics = hidden_states
                statistics.append(layer_statistics)
        stacked = [torch.stack(rows) for rows in zip(*statistics, strict=True)]
        return LocMoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_stats=stacked[0] if stacked else None,
            router_hidden_sum=stacked[1] if len(stacked) > 1 else None,
        )


class LocMoeForCausalLM(LocMoePreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head, whose training loss includes the router losses (eq. 7)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LocMoeConfig):
        super().__init__(config)
        self.model = LocMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        domain_ids: torch.LongTensor | None = None,
        output_router_stats: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> LocMoeCausalLMOutputWithPast:
        """
        As other transformers causal language models; see [`LocMoeModel.forward`] for `domain_ids` and
        `output_router_stats`. In training the loss is the cross-entropy plus the router losses; in evaluation it is the
        cross-entropy alone, so `exp(loss)` is the perplexity.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            domain_ids=domain_ids,
            output_router_stats=output_router_stats,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            # the user's own where one is set
            loss_function = causal_lm_loss if self.loss_function is ForCausalLMLoss else self.loss_function
            loss = loss_function(logits, labels, self.vocab_size, **kwargs)

        router_aux_loss = locality = None
        if outputs.router_stats is not None:
            router_aux_loss, locality = self.router_losses(outputs.router_stats)
            if loss is not None and self.training:
                share = share_of_step(labels, **kwargs)
                loss = loss + share * self.weighted_router_loss(router_aux_loss, locality).to(loss.device)
            outputs.router_stats = outputs.router_stats.detach()
        return LocMoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            aux_loss=router_aux_loss,
            router_aux_loss=router_aux_loss,
            locality_loss=locality,
            router_stats=outputs.router_stats,
            router_hidden_sum=outputs.router_hidden_sum,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def _add_router_losses(forward: Callable) -> Callable:
    """Wraps the forward of one of transformers' generic heads, which drop what they do not know of the decoder's output."""

    @can_return_tuple
    @wraps(forward)
    def forward_with_router_losses(self, *args, **kwargs):
        recorded: list[LocMoeModelOutputWithPast] = []
        hook = self.base_model.register_forward_hook(lambda module, inputs, outputs: recorded.append(outputs))
        try:
            outputs = forward(self, *args, **kwargs)
        finally:
            hook.remove()
        router_stats = recorded[0].router_stats
        if router_stats is not None:
            router_aux_loss, locality = self.router_losses(router_stats)
            if outputs.loss is not None and self.training:
                outputs.loss = outputs.loss + self.weighted_router_loss(router_aux_loss, locality).to(
                    outputs.loss.device
                )
            outputs["router_aux_loss"], outputs["locality_loss"] = router_aux_loss, locality
            outputs["router_stats"] = router_stats.detach()
            if recorded[0].router_hidden_sum is not None:
                outputs["router_hidden_sum"] = recorded[0].router_hidden_sum
        return outputs

    return forward_with_router_losses


class LocMoeForSequenceClassification(GenericForSequenceClassification, LocMoePreTrainedModel):
    """The decoder with a classification head on the last token; the training loss includes the router losses."""

    # the loss is a mean over this batch, so Trainer has to divide by the accumulation steps
    accepts_loss_kwargs = False
    forward = _add_router_losses(GenericForSequenceClassification.forward)


class LocMoeForTokenClassification(GenericForTokenClassification, LocMoePreTrainedModel):
    """The decoder with a classification head on every token; the training loss includes the router losses."""

    accepts_loss_kwargs = False
    forward = _add_router_losses(GenericForTokenClassification.forward)


def share_of_step(labels: torch.Tensor, num_items_in_batch=None, shift_labels=None, **kwargs) -> torch.Tensor | float:
    """
    The weight of this micro-batch's router losses: 1 where the loss is a mean over it, and its share of the step's targets
    where the loss is a sum divided by `num_items_in_batch`, so that the shares of a step's micro-batches and ranks add up
    to what the cross-entropy's do.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    num_targets = (targets != -100).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(num_targets.device)
    return num_targets / num_items_in_batch


def _check_ids(name: str, ids: torch.Tensor | None, of_what: str, limit: int) -> None:
    """Stops ids out of range with their name; on an accelerator without a host synchronisation."""
    if ids is None or ids.numel() == 0 or ids.is_meta or torch.compiler.is_compiling():
        return
    in_range = (ids.min() >= 0) & (ids.max() < limit)
    rule = f"must be from 0 to {limit - 1}, the last entry of {of_what}"
    if ids.device.type == "cpu":
        if not in_range:
            raise ValueError(
                f"`{name}` hold {int(ids.min())} to {int(ids.max())} and {rule}: check that the tokenizer and the data "
                f"belong to this checkpoint."
            )
    else:
        torch._assert_async(in_range, f"`{name}` {rule}")


__all__ = [
    "LocMoeForCausalLM",
    "LocMoeForSequenceClassification",
    "LocMoeForTokenClassification",
    "LocMoeModel",
    "LocMoePreTrainedModel",
    "share_of_step",
]
