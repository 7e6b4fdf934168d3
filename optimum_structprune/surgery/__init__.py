"""Changing a model: the plan, the refit, and the only code that creates or cuts parameters."""
