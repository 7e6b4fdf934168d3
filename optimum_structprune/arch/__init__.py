"""Architecture knowledge: where each removable dimension of a model appears in its parameters."""
