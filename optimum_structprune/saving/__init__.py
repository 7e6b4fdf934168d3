"""Writing a result that plain `from_pretrained` has read back, in other forms, and to the Hub."""
