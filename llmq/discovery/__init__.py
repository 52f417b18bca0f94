"""The structure of a model, found by running it: blocks, their calls, matrix products, tensor names, scale pairs."""
