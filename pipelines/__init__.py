"""From a data set to batches of augmented views on the training device."""
