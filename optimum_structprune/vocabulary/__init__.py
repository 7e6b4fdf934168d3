"""The vocabulary: its tokens, which of them stay, and the tokenizer without the others."""
