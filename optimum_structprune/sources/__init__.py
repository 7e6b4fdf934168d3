"""Where activations come from: the text of a run, and what runs it where the layers are not all in memory."""
