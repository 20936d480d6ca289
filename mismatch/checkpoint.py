"""Where saved checkpoints find what loads them: their config names this module. The code is
`mismatch.surgery.loading`."""

from mismatch.surgery.loading import MismatchConfig, MismatchForCausalLM

__all__ = ["MismatchConfig", "MismatchForCausalLM"]
