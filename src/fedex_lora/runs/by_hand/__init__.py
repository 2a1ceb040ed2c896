"""Rounds whose messages people carry: a folder a client goes out, a PEFT adapter comes back."""
