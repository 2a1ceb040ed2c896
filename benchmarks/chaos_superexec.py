"""The SuperExec of a client that takes part in a rehearsal: it answers by `chaos_client`.

No server can bring a client to this; whoever rehearses starts it at the client.
"""

from fedex_lora.flower.superexec import main

if __name__ == "__main__":
    main("benchmarks.chaos_client:app")
