# As for ResNet-20, at the full learning rate.
_base_ = "../_base_/digits_mobilenetv2.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="UniformL1", target=dict(macs=0.5), round_to=1),
    scope="backbone",
    input_size=48,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(_base_.start, optim_wrapper=dict(optimizer=dict(lr=2e-3)))
train_cfg = dict(max_epochs=30, val_interval=30)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = _base_.half
recalibrate = 20
