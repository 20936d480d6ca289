"""Whether a tokenizer is there, and whether it is the model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mismatch.errors import ModelError, UsageError

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM


def need_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of a model that was handed over. Raises UsageError when it came without."""
    if tokenizer is None:
        raise UsageError(
            "the model was handed over without its tokenizer, and text is to be read",
            hint="pass (model, tokenizer): AutoTokenizer.from_pretrained(...) loads the one it was trained with",
        )
    return tokenizer


def check_vocabulary(model: CausalLM, tokenizer: Any, name: str) -> None:
    """Whether the embedding has a row for every token. Raises ModelError when it has not."""
    embedding: Any = model.get_input_embeddings()
    rows, ids = embedding.weight.shape[0], len(tokenizer)
    if ids > rows:
        raise ModelError(
            f"{name}: the tokenizer has {ids:,} tokens, the embedding {rows:,} rows",
            hint="is this the tokenizer of this model? If it was given new tokens: "
            "model.resize_token_embeddings(len(tokenizer))",
        )
