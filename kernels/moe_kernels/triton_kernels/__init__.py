"""Kernels in Triton, one operation a file, each beside its twin in plain torch.

Nothing here is imported where triton is missing: what needs it imports it, and ``moe_kernels`` itself does not.
"""
