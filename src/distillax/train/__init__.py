"""Training: one loop and one step; methods differ in their objective and in where batches come from."""
