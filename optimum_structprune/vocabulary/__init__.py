"""The vocabulary: the tokens of a tokenizer, the choice of the kept tokens, and the smaller tokenizer."""
