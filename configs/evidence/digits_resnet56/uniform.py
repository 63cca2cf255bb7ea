# As for ResNet-20, with 30 epochs before the cut and 30 after it.
_base_ = "../_base_/digits_resnet56.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="UniformL1", target=dict(macs=0.511), prune_shortcuts=False, round_to=1),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(_base_.half, optim_wrapper=dict(optimizer=dict(lr=0.1)))
train_cfg = dict(max_epochs=30, val_interval=30)
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = _base_.half["param_scheduler"]
# Widths are whole numbers: these are the targets whose result is nearest to 50 % and 25 %.
at_25 = dict(model=dict(pruner=dict(target=dict(macs=0.265))))
recalibrate = 20
