"""Neural network definitions: plain `nn.Module`s whose attribute names are the public checkpoints' state-dict keys."""
