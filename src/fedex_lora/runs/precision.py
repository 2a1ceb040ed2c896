from fedex_lora.runs.autotune import settle_precision as settle  # noqa: F401
