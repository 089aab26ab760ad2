"""What the fidelity benchmark is made of: cells and ways, what was made so far, the fewer-steps curve, the plot."""
