"""The most memory that a process took for 16,384 tokens of one layer of SmolLM2's shapes, in bytes:

python tests/mechanisms/peak_memory.py "sliding_window(window=256)" forward
"""

from __future__ import annotations

import resource
import sys

LENGTH = 16384
SHAPES = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "num_hidden_layers": 1, "max_position_embeddings": LENGTH,
}  # fmt: skip


def main(call: str, way: str) -> None:
    import torch
    from tiny_models import swap, tiny, tokens

    torch.set_num_threads(1)
    model = tiny("llama", **SHAPES).requires_grad_(way == "backward")
    if call != "full":
        model = swap(model, f"layer0:{call}").model
    with torch.set_grad_enabled(way == "backward"):
        out = model.model(tokens(1, LENGTH), use_cache=False).last_hidden_state
        if way == "backward":
            out.sum().backward()
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main(*sys.argv[1:])
