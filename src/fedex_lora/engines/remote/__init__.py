"""Clients on other machines: what is said, who takes part, and what each side does."""
