"""Training with example-level differential privacy: DP-SGD at each client, and its account."""
