# The same share of channels everywhere, by L1 norm: the dense network trains for half of the epochs, is cut in one
# shot, and trains on with masks. What the cut costs before that is measured too, without and with re-calibrated norms.
_base_ = "../_base_/digits_resnet20.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="UniformL1", target=dict(macs=0.52), prune_shortcuts=False, round_to=1),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(_base_.half, optim_wrapper=dict(optimizer=dict(lr=0.05)))
train_cfg = dict(max_epochs=20, val_interval=20)
optim_wrapper = dict(optimizer=dict(lr=0.025))
param_scheduler = _base_.half["param_scheduler"]
# Widths are whole numbers: these are the targets whose result is nearest to 50 % and 25 % (51 and 27 %).
at_25 = dict(model=dict(pruner=dict(target=dict(macs=0.28))))
recalibrate = 20
