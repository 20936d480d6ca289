"""Let a model speak: greedily, or drawn at a temperature.

What the model's own generation config says about sampling (top-k, top-p, penalties) is left aside, so that what is
read is the model and two models are compared on the same terms; its end-of-text tokens count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mismatch.errors import UsageError


@dataclass(frozen=True)
class Generated:
    """What came out.

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
    model: nn.Module,
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
        model, tokenizer: of one kind.
        prompt: the text.
        max_new_tokens: where it stops at the latest.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws.
        chat: the prompt is a message; it is put into the tokenizer's chat template.

    Raises:
        UsageError: numbers out of range, a prompt without a token, a text longer than the model's context, no chat
            template.
    """
    check(max_new_tokens, temperature)
    given = _encoded(tokenizer, prompt, chat).to(model.get_input_embeddings().weight.device)
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
    model: nn.Module, given: Mapping[str, Tensor], max_new_tokens: int, temperature: float
) -> Tensor:
    """The ids of prompt and continuation, `batch pos`.

    Args:
        model: of its own settings only the special tokens are read.
        given: `input_ids` and `attention_mask`, `batch pos`, on the device of the embedding.
        max_new_tokens, temperature: as of `generate`.
    """
    ends, own = _ends(model), model.generation_config
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {}
    told = GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends or None,
        # One text alone is never padded; transformers wants an id all the same.
        pad_token_id=ends[0] if ends else 0,
        **drawn,
    )
    with settings_aside(model):
        return model.generate(**given, generation_config=told)


@contextmanager
def settings_aside(model: nn.Module) -> Iterator[None]:
    """Inside, the model's own generation config is empty: transformers would fill in from it what a call leaves out."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: nn.Module) -> list[int]:
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
