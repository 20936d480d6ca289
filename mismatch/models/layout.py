"""Where the modules of a loaded model are: its family's paths (`mismatch.models.families`), bound to it.

`mismatch.forward.verify` proves the binding on the loaded model by a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mismatch.errors import LayoutError
from mismatch.models.families import Family, family_of, is_parallel
from mismatch.models.offloaded import device_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    # transformers' own annotation of a model with a language-modelling head that can generate.
    from transformers.models.auto.modeling_auto import _BaseModelWithGenerate as CausalLM

HEADS = "heads"
"""In place of a slot: what the heads of an attention give, which is what enters its output projection."""


@dataclass(frozen=True)
class Layout:
    """A family bound to one model. `Layout.of(model)` builds it."""

    model: CausalLM
    family: Family
    whole_blocks: frozenset[int] = frozenset()
    """Blocks that were replaced as a whole: what is inside them is not what is added to the stream."""

    @classmethod
    def of(cls, model: CausalLM) -> Layout:
        """Bind the family of `model.config` to `model` and check that every path is there.

        Raises:
            LayoutError: unknown family, or a path that this model lacks; names both.
        """
        layout = cls(model, family_of(model.config))
        missing = [
            f"block.{path}"
            for path in dict.fromkeys(layout.slot_paths(0).values())
            if not _has(layout.blocks[0], path)
        ]
        if missing:
            raise LayoutError(
                f"a model of family `{layout.family.name}` should have {', '.join(missing)}; this "
                f"{type(model).__name__} has not",
                hint="was it changed before? `mismatch` needs the untouched model",
            )
        return layout

    @property
    def config(self) -> Any:
        """transformers' config of the model; its attributes differ by family."""
        return self.model.config

    @property
    def decoder(self) -> nn.Module:
        """The model without its head: ids in, final-norm states out."""
        return self.model.base_model

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's blocks, in order: one a layer."""
        return self._of_decoder(self.family.blocks)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        return self._of_decoder(self.family.final_norm)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return self.config.hidden_size

    @property
    def n_heads(self) -> int:
        """Query heads of an attention."""
        return self.config.num_attention_heads

    @property
    def n_kv_heads(self) -> int:
        """Kv heads of an attention; a family without groups has as many as query heads."""
        return of_all_layers(self.config, "num_key_value_heads") or self.n_heads

    @property
    def heads_width(self) -> int:
        """Width of what enters the output projection of an attention: all query heads, flat."""
        own = of_all_layers(self.config, "head_dim") or self.d_model // self.n_heads
        return self.n_heads * own

    @property
    def vocab(self) -> int:
        """Rows of the head: the vocabulary, padding rows included."""
        return getattr(self.output, "out_features", None) or self.output.weight.shape[0]

    @property
    def embedding_device(self) -> torch.device:
        """The device that token ids must be on; under accelerate blocks may be on others."""
        return device_of(self._of_decoder(self.family.embed))

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block read the same stream."""
        return is_parallel(self.family, self.config)

    def head(self, final: Tensor) -> Tensor:
        """Final-norm states to logits, as the model itself does it, on any number of tokens.

        Args:
            final: `... d_model`.

        Returns:
            `... vocab`, in the dtype of the model.
        """
        logits = self.output(final)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap

    def slot_paths(self, layer: int) -> dict[str, str]:
        """Path in its block of each slot that a layer has."""
        kind = self._kind(layer)
        moved, lacks = self.family.elsewhere.get(kind, {}), self.family.lacks_in(self.config, kind)
        return {
            slot: moved.get(path, path)
            for slot, path in self.family.slots.items()
            if slot not in lacks
        }

    def site_path(self, layer: int, site: str) -> str:
        """Path in its block of the module whose output is added to the stream: `attn_out` or `mlp_out`."""
        path: str = getattr(self.family, site)
        return self.family.elsewhere.get(self._kind(layer), {}).get(path, path)

    def _kind(self, layer: int) -> str:
        kinds = getattr(self.config, "layer_types", None) or ()
        return kinds[layer] if layer < len(kinds) else ""

    def slot_path(self, layer: int | None, slot: str) -> str:
        """Dotted path, from the model, of the module in a slot. Of `rope` it is the attention, where positions enter.

        Raises:
            LayoutError: the family has no such slot.
        """
        decoder = self.model.base_model_prefix
        if slot == "final_norm":
            return f"{decoder}.{self.family.final_norm}"
        block = f"{decoder}.{self.family.blocks}.{layer}"
        if slot == "block":
            return block
        assert layer is not None
        here = self.family.lacks_in(self.config, self._kind(layer))
        if slot in here:
            raise LayoutError(
                f"layer{layer}.{slot}: {self.family.name} has no such slot here ({here[slot]})",
                hint=f"slots of layer {layer}: {', '.join((*self.slot_paths(layer), 'block'))}",
            )
        inner = self.slot_paths(layer).get("attn" if slot == "rope" else slot)
        if inner is None or slot in self.family.lacks:
            reason = self.family.lacks.get(slot)
            raise LayoutError(
                f"{self.family.name} has no slot `{slot}`" + (f" ({reason})" if reason else ""),
                hint=f"slots of {self.family.name}: {', '.join(self.family.slot_names())}",
            )
        return f"{block}.{inner}"

    @property
    def output(self) -> Any:
        """The last matrix: final states to logits, which `head` may cap."""
        return self.model.get_submodule(self.family.head)

    def _of_decoder(self, path: str) -> Any:
        if not _has(self.decoder, path):
            raise LayoutError(
                f"a model of family `{self.family.name}` should have `{path}` in its decoder; "
                f"{type(self.decoder).__name__} has: "
                + ", ".join(name for name, _ in self.decoder.named_children())
            )
        return self.decoder.get_submodule(path)


def of_all_layers(config: Any, name: str) -> Any:
    """What a config says of the whole model, None where it says nothing; single layers may differ (gemma4)."""
    if getattr(config, "model_type", None) == "gemma4_text":
        return config.to_dict().get(name)  # the attribute raises where layers differ
    return getattr(config, name, None)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
