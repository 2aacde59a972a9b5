"""The mixture of experts: router, exchange of tokens between ranks, grouped experts, and the layer of them."""
