"""A Hugging Face model as pipeline layers: blocks, heads, split layers, costs, cuts, weights."""
