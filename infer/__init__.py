"""Inference: sampling, batched generation, terminal chat. Imports `llama_jax`, never `train`."""
