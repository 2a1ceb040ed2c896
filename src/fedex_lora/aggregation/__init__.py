"""The paper: factors, their aggregation, and what becomes of the residual. Torch alone."""
