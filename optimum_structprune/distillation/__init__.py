"""Training with the divergence from a teacher, inside any Trainer: a live teacher or a teacher file."""
