from fedex_lora.aggregation.delta import Delta as LowRank
from fedex_lora.aggregation.delta import concat  # noqa: F401


def from_dense(w):
    return LowRank(*LowRank(w).factors())


def dense(w):
    return w.dense() if isinstance(w, LowRank) else w
