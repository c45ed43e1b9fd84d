"""Process groups, parallel layers, FSDP, the gradient norm and the loss: the only package that touches collectives and fairscale."""
