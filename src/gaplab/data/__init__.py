"""Pictures as uint8 tensors, their splits, and the order in which they are trained on."""
