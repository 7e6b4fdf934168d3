"""How many units each layer keeps, from a share, given widths or a budget. It needs shapes, never text."""
