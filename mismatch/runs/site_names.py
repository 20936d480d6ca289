"""The names of the sites: where numbers are taken (`mismatch.forward.sites` says what each is). No torch, no pandas."""

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "final", "logits")
"""Where numbers are taken, in the order of computation."""

READ_AT = {
    **dict.fromkeys(SITES, ("stream",)),
    **dict.fromkeys(("attn_out", "mlp_out"), ("stream", "update")),
    "resid_post": ("stream", "lens"),
    "logits": ("logits",),
}
"""What metrics are taken of (`Metric.at`) at each site."""

BLOCK_SITES = SITES[:5]
"""Those that every block has."""
