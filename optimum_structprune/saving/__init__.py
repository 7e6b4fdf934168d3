"""Writing a result so that it appears only when it is whole and plain `from_pretrained` has read it back."""
