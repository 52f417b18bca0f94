"""What a model is made of, found by running it: blocks, calls, products, names, pairs."""
