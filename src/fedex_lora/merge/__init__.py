"""Exact merging of PEFT adapters on disk."""
