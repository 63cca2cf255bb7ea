# The same share of channels everywhere, by L1 norm: the dense network trains for half of the epochs, is cut in one
# shot, and trains on with masks. What the cut costs before that is measured too, without and with re-calibrated norms.
_base_ = "../_base_/shapes_ssd.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="UniformL1", target=dict(macs=0.5), prune_shortcuts=False, round_to=1),
    scope="backbone",
    input_size=96,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(_base_.start, optim_wrapper=dict(optimizer=dict(lr=2e-3)))
train_cfg = dict(max_epochs=10, val_interval=10)
train_dataloader = dict(sampler=dict(start=2800))
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = _base_.half
recalibrate = 40
