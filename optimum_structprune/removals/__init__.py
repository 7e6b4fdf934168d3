"""What is removed from the whole model: layers, experts, channels of the residual stream, tokens."""
