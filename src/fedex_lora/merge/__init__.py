"""Exact merging of PEFT adapters on disk: the weighted mean of their updates.

`factors` is the mathematics of one layer, `adapters` reads, `plan` checks that adapters go
together, `write` makes one adapter of them, `base` adds them to a full model.
"""
