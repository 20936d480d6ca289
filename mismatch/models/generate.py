"""Generate text from a model: greedily, or sampled at a temperature.

Sampling settings of the model's own generation config (top-k, top-p, penalties) are not used, so that the text shows
the model and two models are compared under the same settings. Its end-of-text tokens are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mismatch.errors import UsageError
from mismatch.models.offloaded import device_of

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM


@dataclass(frozen=True)
class Generated:
    """A generated text.

    Attributes:
        text: the prompt and what follows; of a chat the answer alone.
        tokens: number of new tokens, the end of the text included.
        ended: the model ended by itself.
    """

    text: str
    tokens: int
    ended: bool


def check(max_new_tokens: int, temperature: float) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        UsageError: a number out of range.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be 1 or more, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UsageError(
            f"--temperature must be 0 or more, got {temperature}",
            hint="0 takes the likeliest token each time",
        )


def generate(
    model: CausalLM,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> Generated:
    """Continue a text, or answer a message.

    Args:
        model, tokenizer: they belong together.
        prompt: the text.
        max_new_tokens: upper limit of new tokens.
        temperature: 0 takes the likeliest token each time.
        seed: random seed of the sampling.
        chat: the prompt is a message; it is put into the tokenizer's chat template.

    Raises:
        UsageError: numbers out of range, a prompt without a token, a text longer than the model's context, no chat
            template.
    """
    check(max_new_tokens, temperature)
    embedding: Any = model.get_input_embeddings()
    given = _encoded(tokenizer, prompt, chat).to(device_of(embedding))
    length = given["input_ids"].shape[1]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        raise UsageError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones are longer than the context of this model: "
            f"{limit} tokens",
            hint=f"take --max-new-tokens {limit - length} or less"
            if length < limit
            else "take a shorter prompt",
        )
    device = given["input_ids"].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = run(model, given, max_new_tokens, temperature)[0]
    new = out[length:]
    shown = new if chat else out
    return Generated(
        text=tokenizer.decode(shown, skip_special_tokens=True),
        tokens=len(new),
        ended=len(new) > 0 and int(new[-1]) in _ends(model),
    )


def run(
    model: CausalLM, given: Mapping[str, Tensor], max_new_tokens: int, temperature: float
) -> Tensor:
    """The ids of prompt and continuation, `batch pos`.

    Args:
        model: of its own generation config only the special tokens are used.
        given: `input_ids` and `attention_mask`, `batch pos`, on the device of the embedding.
        max_new_tokens, temperature: as of `generate`.
    """
    ends, own = _ends(model), model.generation_config
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends or None,
        # One text alone is never padded; transformers needs an id all the same.
        pad_token_id=ends[0] if ends else 0,
        **drawn,
    )
    untyped: Any = model  # transformers' annotation of `generate` refuses transformers' own models
    with settings_aside(model):
        return untyped.generate(**given, generation_config=settings)


@contextmanager
def settings_aside(model: CausalLM) -> Iterator[None]:
    """Empty the model's own generation config while the context lives.

    transformers would otherwise fill in from it what a call leaves out.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: CausalLM) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return [token for token in ends if token is not None]


def _encoded(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    elif tokenizer.chat_template is None:
        raise UsageError(
            "--chat: this model's tokenizer has no chat template", hint="leave --chat out"
        )
    else:
        message = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    if given["input_ids"].shape[1] == 0:
        raise UsageError(
            "the prompt is empty, and this model has no token that begins a text",
            hint='give some words, such as "Once upon a time"',
        )
    return given
