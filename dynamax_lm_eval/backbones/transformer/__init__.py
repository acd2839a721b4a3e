"""Transformer decoders: attention over flat ragged batches and the K and V that rows keep."""
