"""Models and adapters as GGUF files, which llama.cpp reads."""
