"""A run's life: begun, resumed, scored, exported."""
