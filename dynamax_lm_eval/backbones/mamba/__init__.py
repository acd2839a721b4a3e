"""Mamba and Mamba-2 decoders: ragged mixers and the conv and SSM states that rows keep."""
