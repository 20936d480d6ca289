"""Text sampled from the teacher, to train on beside the training text.

A training text is of one kind, and a layer that was repaired on speeches is less right elsewhere. What a model draws
from its own distribution is as wide as what it was trained on, and asks for no data (LLM-QAT, arXiv 2305.17888, section
3.1). Each piece begins with a token at random and goes on at temperature 1 over all tokens but the special ones, so
that nothing is chosen to suit a layer or the evaluation text. Pieces are short, for every token attends to all before
it; several make a window, and the teacher reads windows as they are.

Several ranks share the pieces that are sampled side by side, each with the draws that one process would give it. A
matrix of fewer rows may round differently, and a draw that falls on the border of two words then takes the other one:
that piece goes on differently.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from mismatch.models.generate import settings_aside
from mismatch.runs.batch_size import is_memory, no_room
from mismatch.runs.kept_pages import kept_pages
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.texts.windows import prefix_ids

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM

PIECE = 256  # tokens of a piece, at most
ROOM = 4e9  # bytes that pieces sampled side by side may take
SCORES = 16  # bytes per word of the vocabulary and piece: scores, and what is made of them to draw
TRIAL = 16  # tokens of each piece that are timed to know what all of them cost
BESIDE = 32  # pieces of a trial, at most: with more of them a token hardly gets cheaper
DEARER = 1.25  # a token of a whole piece against one of the trial: it looks back further


class Writer:
    """Draws windows from a model.

    Args:
        model, tokenizer: of one kind.
        seq_len: tokens per window.
        seed: of the draws.
        stopping: asked at each token; True stops.
        say: a line for the user.
        ranks: who shares the pieces; all of them get all windows.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        seq_len: int,
        *,
        seed: int,
        stopping: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda _line: None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.seq_len, self.seed = model, seq_len, seed
        self.stopping, self.say, self.ranks = stopping, say, ranks
        self.per_window = math.ceil(seq_len / PIECE)
        self.piece = math.ceil(seq_len / self.per_window)
        self.prefix = prefix_ids(tokenizer)
        self.device: Any = model.get_input_embeddings().weight.device
        special = {*tokenizer.all_special_ids}
        self.words = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
        self.rows = self._side_by_side()

    def write(self, tokens: int, seconds: float = math.inf, beside: float = 0.0) -> np.ndarray:
        """Windows, as many as were asked for or as there is time for.

        Args:
            tokens: to sample, at most.
            seconds: that it may take, and what each token entails.
            beside: seconds that each token entails.

        Returns:
            ids, int64 `n seq_len`.

        Raises:
            KeyboardInterrupt: stopped.
            MismatchError: no memory for a single piece.
        """
        with kept_pages():
            return self._written(tokens, seconds, beside)

    def _written(self, tokens: int, seconds: float, beside: float) -> np.ndarray:
        asked = tokens // self.seq_len
        wanted = self._affordable(asked, seconds, beside)
        self.say(f"{wanted * self.seq_len:,} tokens are sampled from the teacher, to train on")
        if wanted < asked:
            self.say(f"(for all {asked * self.seq_len:,} of --self-generated there is no time)")
        pieces: list[Tensor] = []
        while len(pieces) < wanted * self.per_window:
            missing = wanted * self.per_window - len(pieces)
            rows = math.ceil(missing / math.ceil(missing / self.rows))
            pieces += self._pieces(rows, self.piece, len(pieces))
        if not pieces:
            return np.zeros((0, self.seq_len), np.int64)
        return torch.stack(pieces).view(wanted, -1)[:, : self.seq_len].numpy()

    @torch.no_grad()
    def _side_by_side(self) -> int:
        """Pieces that there is room for: one token shows what a model keeps of each."""
        cache = DynamicCache(config=self.model.config)
        try:
            logits = self.model(self.words[:1, None].to(self.device), past_key_values=cache).logits
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            raise no_room("while the teacher is sampled") from error
        kept = sum(
            held.nbytes
            for layer in cache.layers
            if isinstance(layer, DynamicLayer)
            for held in (layer.keys, layer.values)
            if held is not None
        )
        room = max(1, int(ROOM / (kept * self.piece + SCORES * logits.shape[-1])))
        return self.ranks.from_first(room)

    def _affordable(self, windows: int, seconds: float, beside: float) -> int:
        """Windows that these seconds are enough for, at most as many as given. A token costs more the fewer pieces
        stand side by side, so where less than half of those that were timed are made, they are timed again."""
        if windows == 0 or seconds == math.inf:
            return windows
        rows, length = min(self.rows, windows * self.per_window, BESIDE), min(TRIAL, self.piece)
        started = time.monotonic()
        self._pieces(rows, length, 0)
        each = (time.monotonic() - started) / (rows * length) * DEARER
        found = self.ranks.from_first(min(windows, int(seconds / (each + beside) / self.seq_len)))
        again = 2 * found * self.per_window < rows
        return self._affordable(found, seconds, beside) if again else found

    def _pieces(self, rows: int, length: int, number: int) -> list[Tensor]:
        """Pieces side by side, from this number on; fewer where memory is short, on whichever rank."""
        while True:
            world, beside = self.ranks.world, min(rows, self.rows)
            try:
                own = self._drawn(beside, length, number)
            except (MemoryError, RuntimeError) as error:
                if not is_memory(error):
                    raise
                own = None
            parts = self.ranks.everywhere(own)
            found = [part for part in parts if part is not None]
            if len(found) == world:
                return [found[at % world][at // world] for at in range(beside)]
            if self.rows == 1:
                raise no_room("while the teacher is sampled")
            self.rows = max(1, beside // 2)
            self.say(f"out of memory: {self.rows} pieces side by side from here on")

    @torch.no_grad()
    def _drawn(self, rows: int, length: int, number: int) -> Tensor:
        """This rank's share of some pieces: `share length`."""
        mine = slice(self.ranks.rank, rows, self.ranks.world)
        if self.ranks.rank >= rows:
            return torch.empty(0, length, dtype=torch.long)
        seed = np.random.default_rng([self.seed, number]).integers(2**63)
        draws = torch.Generator().manual_seed(int(seed))
        first = self.words[torch.randint(len(self.words), (rows, 1), generator=draws)]
        begun = torch.cat([torch.tensor([self.prefix]).long().expand(rows, -1), first], 1)
        begun = begun[mine, :length].to(self.device)
        if begun.shape[1] == length:
            return begun.cpu()
        told = GenerationConfig(max_new_tokens=length - begun.shape[1], pad_token_id=0)
        with settings_aside(self.model):
            model: Any = self.model  # its stub knows no plain list of processors
            out: Tensor = model.generate(
                begun,
                attention_mask=torch.ones_like(begun),
                past_key_values=_roomy(self.model.config, length),
                generation_config=told,
                logits_processor=[_Draw(self.words.to(self.device), draws, rows, mine)],
                stopping_criteria=[_Stop(self.stopping)],
            )
        if out.shape[1] < length:
            raise KeyboardInterrupt
        return out.cpu()


def _roomy(config: Any, length: int) -> DynamicCache:
    """The cache of a model, with room for so many tokens in each layer that keeps all of them."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _Roomy(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class _Roomy(DynamicLayer):
    """Keys and values in one tensor from the start: transformers' own layer copies all of them at every token, which
    takes longer than the model."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = [self._room(new) for new in (key_states, value_states)]
        end = start + key_states.shape[-2]
        for room, new in zip(self.rooms, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self.rooms)
        return self.keys, self.values

    def _room(self, new: Tensor) -> Tensor:
        return new.new_empty((*new.shape[:-2], self.length, new.shape[-1]))


class _Draw(LogitsProcessor):
    """Draws a word per row at temperature 1 and leaves the others no chance, so that a greedy search takes it.

    The sum of chances is walked once: `torch.multinomial` draws a number for every word of every row, which takes as
    long on a CPU as the model itself. The scores are `generate`'s own copy, and are written over.
    """

    def __init__(self, words: Tensor, draws: torch.Generator, rows: int, mine: slice) -> None:
        self.words, self.draws = words, draws
        # Of all ranks: numbers are drawn for each; and of this one.
        self.rows, self.mine = rows, mine
        self.others: Tensor | None = None  # what the head knows and must not be drawn

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        if self.others is None:
            drawable = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            drawable[self.words] = True
            self.others = (~drawable).nonzero()[:, 0]
        scores.index_fill_(1, self.others, -math.inf)
        chances = scores.softmax(-1, torch.float32).cumsum(-1)
        numbers = torch.rand(self.rows, 1, generator=self.draws)[self.mine]
        drawn = numbers.to(chances) * chances[:, -1:]
        # A number that rounds up to the whole sum is the last word's.
        at = torch.searchsorted(chances, drawn, right=True).clamp_(max=int(self.words[-1]))
        return scores.fill_(-math.inf).scatter_(1, at, 0.0)


class _Stop(StoppingCriteria):
    """Ends all rows at once when asked to."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self.stopping = stopping

    def __call__(self, ids: Tensor, _scores: Tensor, **_more: Any) -> Tensor:
        return torch.full((len(ids),), self.stopping(), device=ids.device)
