"""Any decoder of transformers: the model makes its blocks' arguments, and the engine calls the blocks with them."""
