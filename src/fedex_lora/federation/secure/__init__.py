"""Secure aggregation: the server sees sums over clients, and no single client's numbers.

Double masking after Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine
Learning", CCS 2017, doi 10.1145/3133956.3133982. Values and pure functions; torch, numpy and
`cryptography`.
"""
