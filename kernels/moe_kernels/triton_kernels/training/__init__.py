"""The sum over real experts with its derivatives: dense or int4 matrices, low-rank terms, routing weights, bias.

`operation.train_experts` is the way in; each kernel lies in a file of its own beside its twin in plain torch.
"""
