"""Steps that remove units of the whole model: tokens, whole layers, experts and hidden channels."""
