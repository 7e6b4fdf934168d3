"""Running a model and watching it run, in one process or several: hooks, calls of single layers, perplexity. It knows
nothing of pruning.
"""
