"""kvstore: a KV cache layer daemon for LLM inference."""

__version__ = "0.1.0"
