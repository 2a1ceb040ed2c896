"""Padding tokens."""

from transformers import PreTrainedTokenizerBase

from fedex_lora.errors import UserError


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, its end-of-text token made its padding token if it has none.

    Padding is masked everywhere, so that it does not matter which token it is.

    Raises:
        UserError: It has neither.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"model.name: the tokenizer of {tokenizer.name_or_path!r} has neither a padding "
                "nor an end-of-text token; add a pad_token to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
