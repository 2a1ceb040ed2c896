"""What runs left, analysed: deviation, cost, comparison with intervals, the claims."""
