"""Runs across machines. `grid`, `server_app`, `client_app` and `superlink` alone know Flower."""
