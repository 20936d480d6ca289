"""What can go into a slot. One mechanism = one file here and one line below.

The targets are strings, so that knowing a name imports nothing (see `mismatch.registry`).
"""

MECHANISMS = {
    # The mechanisms.
    "adapterplus": "mismatch.mechanisms.adapterplus:AdapterPlus",
    "dyt": "mismatch.mechanisms.dyt:DyT",
    "gated_attention": "mismatch.mechanisms.gated_attention:GatedAttention",
    "gated_deltanet": "mismatch.mechanisms.gated_deltanet:GatedDeltaNet",
    "gqa": "mismatch.mechanisms.gqa:GQA",
    "houlsby": "mismatch.mechanisms.houlsby:Houlsby",
    "infini": "mismatch.mechanisms.infini:Infini",
    "kda": "mismatch.mechanisms.kda:KDA",
    "kv_slots": "mismatch.mechanisms.kv_slots:KVSlots",
    "linear_attention": "mismatch.mechanisms.linear_attention:LinearAttention",
    "lora": "mismatch.mechanisms.lora:LoRA",
    "low_rank_mlp": "mismatch.mechanisms.low_rank_mlp:LowRankMLP",
    "mamba": "mismatch.mechanisms.mamba:Mamba",
    "mamba2": "mismatch.mechanisms.mamba2:Mamba2",
    "mla": "mismatch.mechanisms.mla:MLA",
    "moba": "mismatch.mechanisms.moba:MoBA",
    "nope": "mismatch.mechanisms.nope:NoPE",
    "parallel_adapter": "mismatch.mechanisms.parallel_adapter:ParallelAdapter",
    "partial_rope": "mismatch.mechanisms.partial_rope:PartialRope",
    "qlora": "mismatch.mechanisms.qlora:QLoRA",
    "quantized": "mismatch.mechanisms.quantized:Quantized",
    "ring": "mismatch.mechanisms.ring:Ring",
    "rope": "mismatch.mechanisms.rope:Rope",
    "rwkv": "mismatch.mechanisms.rwkv:RWKV",
    "short_conv": "mismatch.mechanisms.short_conv:ShortConv",
    "sliding_window": "mismatch.mechanisms.sliding_window:SlidingWindow",
    "topk": "mismatch.mechanisms.topk:TopK",
    "yarn": "mismatch.mechanisms.yarn:Yarn",
    # The controls, which bound the scale.
    "identity": "mismatch.mechanisms.identity:Identity",
    "linear": "mismatch.mechanisms.linear:Linear",
    "mean": "mismatch.mechanisms.mean:Mean",
    "random": "mismatch.mechanisms.random:Random",
    "skip": "mismatch.mechanisms.skip:Skip",
    "zero": "mismatch.mechanisms.zero:Zero",
    # Around another mechanism.
    "parallel": "mismatch.mechanisms.parallel:Parallel",
}
