"""Saving of a result, with a check by plain `from_pretrained`, its export and its upload to the Hub."""
