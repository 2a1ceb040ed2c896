"""`python -m fedex_lora` is the command line."""

from fedex_lora.cli import main

if __name__ == "__main__":
    main()
