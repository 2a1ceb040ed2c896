from fedex_lora.runs.autotune import settle_fuse  # noqa: F401
