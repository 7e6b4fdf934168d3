"""Choose widths by measured losses: losses of single layers, of shapes, and of prunings within a loss budget."""
