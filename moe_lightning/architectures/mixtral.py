"""Mixtral in transformers 5: a router in ``mlp.gate``, fused experts in ``mlp.experts``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_lightning.architectures.base import CONFIG_KEY, Architecture, Changes, MoELayer, OpenExperts
from moe_lightning.experts import CompressedExperts, Dense, NoMoE
from moe_lightning.plan import ExpertLayout, ModelShape


class MixtralArchitecture(Architecture):
    """``g(x)`` is the softmax over all experts in fp32, cut to the top k and renormalised to 1; no shared experts."""

    model_type: ClassVar[str] = "mixtral"
    compressed_model_type: ClassVar[str] = "moe_lightning_mixtral"
    layers_prefix: ClassVar[str] = "model.layers"
    attention_name: ClassVar[str] = "self_attn"
    attention_inputs: ClassVar[tuple[tuple[str, ...], ...]] = (("q_proj", "k_proj", "v_proj"), ("o_proj",))

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError where the layers are not where transformers 5 puts them."""
        inner = getattr(model, "model", None)
        layers = getattr(inner, "layers", None)
        if layers is None or not hasattr(model, "lm_head"):
            raise ValueError(
                f"{type(model).__name__} is not a MixtralForCausalLM: pass the model with its language head"
            )
        for layer in layers:
            mlp = getattr(layer, "mlp", None)
            if not isinstance(mlp, NoMoE) and (not hasattr(mlp, "gate") or not hasattr(mlp, "experts")):
                raise ValueError(
                    "this Mixtral does not have transformers 5's layout (mlp.gate, mlp.experts): use transformers>=5.15"
                )

    def shape_of_config(self, config: Any) -> ModelShape:
        """Return the shape that a Mixtral config describes, its plan applied."""
        everyone = tuple(range(config.num_local_experts))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_layers = self.original_layers(config)
        dtype = getattr(config, "dtype", None)
        shape = ModelShape(
            architecture=self.model_type,
            num_layers=num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=head_dim,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            layouts=tuple(ExpertLayout(layer, everyone) for layer in range(num_layers)),
            weight_bytes=dtype.itemsize if isinstance(dtype, torch.dtype) else 4,
        )
        return self.plan_of_config(config).check(shape)

    @staticmethod
    def original_layers(config: Any) -> int:
        """Return the decoder layers of the original model; the config of one with dropped blocks counts those left."""
        entry = getattr(config, CONFIG_KEY, None)
        original = entry.get("original") if isinstance(entry, dict) and entry.get("plan") else None
        return original["num_hidden_layers"] if original else config.num_hidden_layers

    def decoder_layers(self, model: Any) -> Sequence[Any]:
        """Return ``model.model.layers``."""
        return model.model.layers

    def moe_layers(self, model: Any) -> list[MoELayer]:
        """Return one entry for each decoder layer that has its sparse block: all of them in the original Mixtral."""
        layers = self.decoder_layers(model)
        blocks = self.shape_of_config(model.config).blocks
        return [
            MoELayer(
                index=number,
                name=f"model.layers.{place}.mlp",
                block=layer.mlp,
                router=layer.mlp.gate,
                experts=layer.mlp.experts,
                decoder_layer=layer,
                norm=layer.post_attention_layernorm,
            )
            for place, (number, layer) in enumerate(zip(blocks, layers, strict=True))
            if not isinstance(layer.mlp, NoMoE)
        ]

    def drop_moe(self, layer: MoELayer, change: Changes) -> None:
        """Put :class:`NoMoE` into ``mlp`` and nothing into the norm before it."""
        block = layer.decoder_layer
        prefix = layer.name.removesuffix(".mlp")
        change.drop(prefix, ("post_attention_layernorm", block.post_attention_layernorm), ("mlp", block.mlp))
        nothing = NoMoE()
        nothing.train(block.mlp.training)
        change.set(block, "mlp", nothing)
        change.set(block, "post_attention_layernorm", nn.Identity())

    def keep_blocks(self, model: Any, layers: Sequence[Any], change: Changes) -> None:
        """Rebuild ``model.model.layers`` and number its attentions."""
        change.set(model.model, "layers", nn.ModuleList(layers))
        for place, layer in enumerate(layers):
            change.set(layer.self_attn, "layer_idx", place)

    def fuse_layers(self, model: Any, change: Changes) -> None:
        """Give the decoder layers our class, and its name to those who keep whole layers on one device."""
        # Not before there is a model: the import of transformers makes our own classes known, which need this module.
        from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

        from moe_lightning.architectures.mixtral_layer import CompressedMixtralDecoderLayer

        for layer in self.decoder_layers(model):
            if type(layer) is MixtralDecoderLayer:
                change.set(layer, "__class__", CompressedMixtralDecoderLayer)
        for module in (model, model.model):
            whole = {*(module._no_split_modules or ()), CompressedMixtralDecoderLayer.__name__}
            change.set(module, "_no_split_modules", whole)

    def route(self, layer: MoELayer, logits_NR: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax in fp32, the top k, renormalised to 1."""
        weight_NK, index_NK = logits_NR.float().softmax(-1).topk(layer.router.top_k, dim=-1)
        return weight_NK / weight_NK.sum(-1, keepdim=True), index_NK

    def open_experts(self, layer: MoELayer) -> OpenExperts:
        """Return the weights of transformers' experts or of ours."""
        experts = layer.experts
        if isinstance(experts, CompressedExperts):
            device = layer.router.weight.device
            maps = experts.maps_on(device)
            return OpenExperts(experts.storage, experts.slot_map_on(device), experts.novices, experts.act_fn, maps)
        slot_map = torch.arange(experts.gate_up_proj.shape[0], device=experts.gate_up_proj.device)
        return OpenExperts(Dense(experts.gate_up_proj, experts.down_proj), slot_map, None, experts.act_fn)

    def plain_experts(self, layer: MoELayer) -> Any:
        """Return a ``MixtralExperts`` that shares the weights of the layer's experts."""
        # Not before it is needed: transformers' model file is slow to import.
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = layer.decoder_layer.self_attn.config
        held = layer.block.experts
        with torch.device("meta"):
            experts = MixtralExperts(config)
        experts.gate_up_proj, experts.down_proj = held.storage.gate_up_proj, held.storage.down_proj
        return experts.train(held.training)

    def attention_of(self, decoder_layer: Any) -> Any:
        """Return ``self_attn``."""
        return decoder_layer.self_attn

    def attention_norm(self, decoder_layer: Any) -> Any:
        """Return ``input_layernorm``."""
        return decoder_layer.input_layernorm
